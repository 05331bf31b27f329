"""Heartbeats keep flowing: during a task of any length, and while standard input is silent.

The broker closes a connection from which it hears nothing for two heartbeats.
"""

import signal
import subprocess
from types import SimpleNamespace

import pytest
from conftest import ROOT, Script

HEARTBEAT = 1  # seconds, the shortest that AMQP has
LONG_TASK = "long" + 20 * HEARTBEAT * "."
SILENCE = 10 * HEARTBEAT


@pytest.fixture(scope="module")
def scene(broker):
    """Our worker and the tutorial's with a long task each, and our producer beside them.

    All at the same time, because each needs its many heartbeats.
    """
    url = broker.url_of(query=f"?heartbeat={HEARTBEAT}")
    scripts = SimpleNamespace(
        worker=Script([ROOT / "worker.py", "-q", "heartbeats"], url),
        tutorials=Script(["-u", ROOT / "tests" / "tutorial" / "worker.py"], url),
        producer=Script(
            [ROOT / "new_task.py", "-q", "heartbeats-idle", "-"], url, stdin=subprocess.PIPE
        ),
    )
    for queue in ("heartbeats", "task_queue"):
        sender = Script([ROOT / "new_task.py", "-q", queue, LONG_TASK], broker.url)
        assert sender.wait() == 0, sender.err
    yield scripts
    for script in vars(scripts).values():
        script.process.kill()
        script.wait()
    with broker.channel() as channel:
        channel.queue_delete("task_queue")  # and the task that the tutorial's worker left there


def test_a_producer_with_nothing_to_read_for_ten_heartbeats_stays_connected(scene, broker):
    producer = scene.producer
    producer.process.stdin.write(b"before\n")
    producer.process.stdin.flush()
    producer.wait_for("Sent 'before'")
    with pytest.raises(subprocess.TimeoutExpired):  # for it is still there
        producer.process.wait(SILENCE)
    producer.process.stdin.write(b"after\n")
    producer.process.stdin.close()
    assert producer.wait() == 0
    assert producer.out == [" [x] Sent 'before'", " [x] Sent 'after'"]
    assert producer.err == []
    assert broker.bodies("heartbeats-idle") == [b"before", b"after"]


def test_a_task_of_20_heartbeats_is_done_once_and_acknowledged(scene, broker):
    worker = scene.worker
    worker.wait_for("Done")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.out == [
        " [*] Waiting for messages. To exit press CTRL+C",
        f" [x] Received '{LONG_TASK}'",
        " [x] Done",
    ]
    assert worker.err == []
    assert broker.bodies("heartbeats") == []


def test_the_tutorials_worker_dies_on_a_task_of_20_heartbeats(scene, broker):
    tutorials = scene.tutorials
    assert tutorials.wait() == 1
    assert "pika.exceptions" in tutorials.err[-1], tutorials.err
    assert broker.bodies("task_queue") == [LONG_TASK.encode()]
