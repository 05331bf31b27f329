"""`worker.py` retries until it has a connection, and keeps it; without it, no work goes on.

The broker closes a connection from which it hears nothing for two heartbeats.
"""

import signal
import subprocess
import time
from statistics import median
from types import SimpleNamespace

import pytest
from commands import POLITE, STUBBORN, assert_ended, pids_of
from conftest import ROOT, WAITING, Script
from servers import free_port, wait_until

HEARTBEAT = 1  # seconds, the shortest that AMQP has
LONG = "long" + 60 * "."
LONG_TASK = "long" + 20 * HEARTBEAT * "."
LONG_CALL = f"time.sleep({21 * HEARTBEAT})"
LONG_COMPUTATION = f"compute({21 * HEARTBEAT})"
DO = ["--function", "tests.functions:do"]
NEVER = ["--function", "tests.functions:never"]  # comes to its end
PAUSE = 8 * HEARTBEAT


@pytest.fixture(scope="module", autouse=True)
def scene(broker):
    """Scripts that need many heartbeats, at the same time, and beside other tests of this file.

    Those that end the broker's connections come when the scripts with a connection are done.
    """
    url = broker.url_of(query=f"?heartbeat={HEARTBEAT}")
    worker, nowhere = ROOT / "worker.py", f"amqp://127.0.0.1:{free_port()}"
    scripts = SimpleNamespace(
        sleeping=Script([worker, "-q", "heartbeats"], url),
        running=Script([worker, "-q", "heartbeats-command", "sleep", str(20 * HEARTBEAT)], url),
        calling=Script([worker, "-q", "heartbeats-calling", *DO], url),
        computing=Script([worker, "-q", "heartbeats-computing", *DO], url),
        tutorials=Script(["-u", ROOT / "tests" / "tutorial" / "worker.py"], url),
        producer=Script(
            [ROOT / "new_task.py", "-q", "heartbeats-pause", "-"], url, stdin=subprocess.PIPE
        ),
        nowhere=Script([worker], nowhere),
    )
    tasks = dict.fromkeys(["heartbeats", "heartbeats-command", "task_queue"], LONG_TASK)
    tasks["heartbeats-calling"] = LONG_CALL
    tasks["heartbeats-computing"] = LONG_COMPUTATION
    for queue, task in tasks.items():
        sender = Script([ROOT / "new_task.py", "-q", queue, task], broker.url)
        assert sender.wait() == 0, sender.err
    scripts.producer.process.stdin.write(b"before\n")
    scripts.producer.process.stdin.flush()
    yield scripts
    for script in vars(scripts).values():
        script.end()
    with broker.channel() as channel:
        channel.queue_delete("task_queue")  # and the task that the tutorial's worker left there


# ---- A task that the broker takes back ----

AT_TWO = 1  # second, at most, in which a task may be at two workers
TIMEOUT = 2500  # milliseconds that the broker gives a task, in place of half an hour
IMPATIENCE = {  # settings of the server; the second and third say how often it looks, in ms
    "consumer_timeout": TIMEOUT,
    "channel_tick_interval": 500,
    "quorum_tick_interval": 500,
}


@pytest.fixture(scope="module")
def impatient_broker(new_broker):
    """A server that takes a task back after a moment, with two virtual hosts in `urls`."""
    broker = new_broker()
    settings = (f"application:set_env(rabbit, {name}, {ms})" for name, ms in IMPATIENCE.items())
    broker.rabbitctl_output("eval", f"{{{', '.join(settings)}}}.")
    broker.urls = {"classic": broker.url, "quorum": broker.add_quorum_vhost()}
    return broker


def in_hand(worker, task):
    """From when to when, or until now, a worker has had a task in hand, by its output."""
    lines = [(time.monotonic(), "")] + [
        (worker.seen[id(stream), number], line)
        for stream in (worker.out, worker.err)
        for number, line in enumerate(stream)
    ]
    lines.sort()
    return [
        (begin, end)
        for (begin, line), (end, _) in zip(lines, lines[1:])
        if f"Received '{task}'" in line
    ]


def test_a_worker_outlives_its_queue_and_ends_its_task(broker, vhosts, worker, send, queue):
    workers = []
    for url in vhosts.values():
        for name, *command in (["idle"], ["sleeping"], ["running", *POLITE]):
            workers.append(
                (f"{queue}-{name}", url, worker("-q", f"{queue}-{name}", *command, url=url))
            )
            if name != "idle":
                send(url, f"{queue}-{name}", LONG)
                workers[-1][2].wait_for("Received")
    running = [pids_of(each) for name, _, each in workers if name.endswith("running")]
    for name, url, _ in workers:
        with broker.channel(url) as channel:
            channel.queue_delete(name)

    for pids in running:
        assert_ended(pids)
    for name, url, each in workers:
        each.wait_for("Waiting", times=2)
        (line,) = each.err
        assert "queue was deleted" in line
        assert "consumer_timeout" in line
        assert "reconnecting in 3 s" in line
        assert broker.ready(f"{name}.retry", url) is None
        if not name.endswith("running"):
            send(url, name, "later")
            each.wait_for("Done")
            assert each.tasks("Received")[-1:] == ["later"]


def test_a_task_that_takes_longer_than_consumer_timeout_is_at_one_worker_at_a_time(
    impatient_broker, worker, send, queue
):
    url = impatient_broker.urls["quorum"]
    pairs = []
    work = {"sleep": [], "command": ["sleep", "60"], "function": NEVER}
    for number, command in enumerate([*work.values()] * 3):
        name = f"{queue}-{number}"
        pairs.append([worker("-q", name, *command, url=url) for _ in range(2)])
        send(url, name, LONG)
    overlaps = {kind: [] for kind in work}
    for workers, kind in zip(pairs, [*work] * 3):
        # One hand-over is waited for: RabbitMQ 4.3.6 may forget the time of the next, until
        # something else happens to the queue.
        wait_until(lambda pair=workers: any("redelivered" in line for w in pair for line in w.out))
        wait_until(lambda pair=workers: any(each.err for each in pair))
        before, after = sorted(span for each in workers for span in in_hand(each, LONG))[:2]
        overlaps[kind].append(abs(after[0] - before[1]))
        for each in workers:
            assert all("consumer_timeout" in line for line in each.err)
            assert not any("Done" in line or "Failed" in line for line in each.out)
    for seconds in overlaps.values():
        assert median(seconds) < AT_TWO  # a busy machine makes single ones longer


def test_a_task_that_takes_too_long_makes_no_copy_and_shorter_ones_are_done(
    impatient_broker, worker, send, queue
):
    url = impatient_broker.urls["quorum"]
    behind = [f"short {number}." for number in range(5)]
    send(url, f"{queue}-prefetched", LONG, *behind)
    send(url, f"{queue}-failing", "task")
    would_fail = ["sh", "-c", f"sleep {2 * TIMEOUT / 1000}; false"]
    failing = worker("-q", f"{queue}-failing", "--retry-delay", "0", *would_fail, url=url)
    first = worker("-q", f"{queue}-prefetched", "--prefetch-count", "10", url=url)

    # What was prefetched with it goes back with it, and is not called done.
    first.wait_for("consumer_timeout")
    assert first.tasks("Received") == [LONG]
    workers = [first, worker("-q", f"{queue}-prefetched", url=url)]  # either has the long one
    wait_until(lambda: sum(each.out.count(" [x] Done") for each in workers) == len(behind))
    assert {task for each in workers for task in each.tasks("Received")} == {LONG, *behind}

    failing.wait_for("consumer_timeout", times=2)
    assert impatient_broker.ready(f"{queue}-failing.retry", url) is None
    assert not any("Failed" in line for line in failing.out)


def test_a_classic_queue_has_that_timeout_before_rabbitmq_4_3(
    impatient_broker, worker, send, queue
):
    url = impatient_broker.urls["classic"]
    busy = worker(url=url)
    send(url, queue, "long.....")
    if impatient_broker.version() < (4, 3):
        busy.wait_for("consumer_timeout", times=2)
        assert not any("Done" in line for line in busy.out)
    else:
        busy.wait_for("Done")
        assert busy.err == []


# ---- Heartbeats, and the time that they take ----


def test_a_task_of_20_heartbeats_is_done_once_and_acknowledged(scene, broker):
    for queue, script, task in (
        ("heartbeats", scene.sleeping, LONG_TASK),
        ("heartbeats-command", scene.running, LONG_TASK),
        ("heartbeats-calling", scene.calling, LONG_CALL),
        ("heartbeats-computing", scene.computing, LONG_COMPUTATION),
    ):
        script.wait_for("Done")
        script.signal(signal.SIGTERM)
        assert script.wait() == 0
        assert script.out == [WAITING, f" [x] Received '{task}'", " [x] Done"]
        assert script.err == []
        assert broker.bodies(queue) == []


def test_the_tutorials_worker_dies_on_a_task_of_20_heartbeats(scene, broker):
    assert scene.tutorials.wait() == 1
    assert "pika.exceptions" in scene.tutorials.err[-1], scene.tutorials.err
    assert broker.bodies("task_queue") == [LONG_TASK.encode()]


def test_a_pause_of_8_heartbeats_in_a_producers_input_is_no_problem(scene, broker):
    producer = scene.producer
    begin = producer.wait_for("Sent 'before'")
    time.sleep(max(0, begin + PAUSE - time.monotonic()))
    producer.process.stdin.write(b"after\n")
    producer.process.stdin.close()
    assert producer.wait() == 0
    assert producer.out == [" [x] Sent 'before'", " [x] Sent 'after'"]
    assert producer.err == []
    assert broker.bodies("heartbeats-pause") == [b"before", b"after"]


# ---- Without a broker ----


def test_workers_and_tasks_outlive_their_broker(broker, worker, run, send, queue):
    url = broker.url
    in_mid_task = worker("-q", f"{queue}-busy", url=url)
    idle = worker("-q", f"{queue}-idle", url=url)
    send(broker, f"{queue}-later", "nobody is here")
    broker.settle()
    long = "long....."
    send(broker, f"{queue}-busy", long, "after")
    in_mid_task.wait_for("Received")

    broker.kill()
    for each in (in_mid_task, idle):
        each.wait_for("reconnecting in 3 s")
    early = run(broker, "worker.py", "-q", f"{queue}-later")
    early.wait_for("reconnecting in 3 s")

    broker.start()
    early.wait_for("Done")
    assert early.tasks("Received") == ["nobody is here"]
    in_mid_task.wait_for("Done", times=2)
    assert in_mid_task.tasks("Received") == [long, long, "after"]
    assert in_mid_task.out[2:4] == [WAITING, f" [x] Received '{long}' (redelivered)"]
    send(broker, f"{queue}-idle", "back")
    idle.wait_for("Done")
    assert idle.out == [WAITING, WAITING, " [x] Received 'back'", " [x] Done"]


def test_a_lost_connection_ends_the_work_before_the_worker_reconnects(broker, worker, send, queue):
    workers = []
    for number, command in enumerate(([], POLITE, STUBBORN)):
        workers.append(worker("-q", f"{queue}-{number}", *command, url=broker.url))
        send(broker, f"{queue}-{number}", LONG)
        workers[-1].wait_for("Received")
    pids = [pids_of(each) for each in workers[1:]]
    broker.rabbitctl_output("close_all_connections", "maintenance")
    for each in workers:
        each.wait_for("reconnecting in 3 s")
    for each in pids:
        assert_ended(each)
    for each in workers:
        each.wait_for("redelivered")
        (line,) = each.err
        assert "maintenance" in line
        assert not any("Done" in line or "Failed" in line for line in each.out)
    received = f" [x] Received '{LONG}'"
    assert workers[0].out == [WAITING, received, WAITING, f"{received} (redelivered)"]


def test_a_worker_tries_to_connect_every_3_seconds(scene):
    worker = scene.nowhere
    worker.wait_for("reconnecting in 3 s", times=5)
    moments = worker.moments("reconnecting in 3 s")
    pauses = [after - before for before, after in zip(moments, moments[1:])]
    assert 2.9 < median(pauses) < 4  # the lines come through a pipe
    assert all(line.endswith("reconnecting in 3 s") for line in worker.err)
