"""A quorum queue drops a task after 20 deliveries: a worker puts it aside before, and no other.

The broker counts deliveries to workers that never began the task, too.
"""

import signal

import pytest
from servers import wait_until

LIMIT = 15  # deliveries
POISON = ["sh", "-c", "if grep -q poison; then kill -9 $PPID; fi"]


@pytest.fixture
def url(vhosts):
    return vhosts["quorum"]


@pytest.fixture
def worker(run, url, queue):
    def start(*arguments):
        return run(url, "worker.py", "-q", queue, *arguments)

    return start


def killed(worker, *arguments):
    """Start a worker that is killed by its task; return it when the broker has noticed."""
    script = worker(*arguments, *POISON)
    assert script.wait() == -signal.SIGKILL
    return script


def has_no_consumer(broker, url, queue):
    with broker.channel(url) as channel:
        return channel.queue_declare(queue, passive=True).method.consumer_count == 0


def test_a_task_that_kills_its_worker_is_a_dead_letter_before_the_broker_drops_it(
    broker, url, worker, send, queue
):
    send(url, queue, "poison", "behind it")
    for _ in range(LIMIT):
        assert killed(worker).tasks("Received") == ["poison"]
    last = worker(*POISON)
    last.wait_for("Done")
    assert last.tasks("Received") == ["poison", "behind it"]
    assert f"Failed: delivered {LIMIT} times, never finished" in last.out[2]
    with broker.channel(url) as channel:
        _, properties, body = channel.basic_get(f"{queue}.dlq", auto_ack=True)
    assert body == b"poison"
    properties.headers.pop("x-delivery-count", None)  # of this delivery
    assert properties.headers == {
        "x-retry-count": 0,
        "x-last-error": f"delivered {LIMIT} times, never finished",
    }


def test_eight_kills_make_no_dead_letter_of_the_tasks_behind_the_one_that_kills(
    broker, url, worker, send, queue
):
    innocent = [f"innocent {number}" for number in range(3)]
    send(url, queue, "poison", *innocent)
    for _ in range(8):
        killed(worker, "--prefetch-count", "10")
        wait_until(lambda: has_no_consumer(broker, url, queue))
    after = worker("--prefetch-count", "10", "true")
    after.wait_for("Done", times=4)
    assert sorted(after.tasks("Received")) == sorted(["poison", *innocent])


def test_nine_polite_stops_make_no_dead_letter_of_tasks_that_were_not_begun(
    url, worker, send, queue
):
    tasks = [f"task {number}" for number in range(12)]
    send(url, queue, *tasks)
    done = []
    for _ in range(9):
        stopped = worker("--prefetch-count", "20", "sleep", "0.3")
        stopped.wait_for("Received")
        stopped.signal(signal.SIGTERM)
        assert stopped.wait() == 0
        assert stopped.err == []
        assert not any("Failed" in line for line in stopped.out)
        done += stopped.tasks("Received")
    rest = worker("true")
    rest.wait_for("Done", times=12 - len(done))
    assert sorted(done + rest.tasks("Received")) == sorted(tasks)
