"""A worker whose consumer the broker cancelled says so, and is set up anew.

That ends the task in hand, which is another worker's from then on.
"""

import time

import psutil
import pytest
from servers import wait_until

LONG = "long" + 60 * "."
WAITING = " [*] Waiting for messages. To exit press CTRL+C"
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


@pytest.fixture(params=["classic", "quorum"])
def url(request, vhosts):
    """The URL of a virtual host, for either type of queue."""
    return vhosts[request.param]


@pytest.fixture
def impatient_url(impatient_broker):
    """The URL of a virtual host for quorum queues, from which tasks are taken back."""
    return impatient_broker.urls["quorum"]


@pytest.fixture
def start(run, queue):
    """Start a worker of this test's queue; return it when it is ready to receive."""

    def start(url, *arguments):
        script = run(url, "worker.py", "-q", queue, *arguments)
        script.wait_for("Waiting")
        return script

    return start


def delete(broker, url, queue):
    with broker.channel(url) as channel:
        channel.queue_delete(queue)


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


def test_a_worker_outlives_its_queue_while_idle(broker, url, start, send, queue):
    idle = start(url)
    delete(broker, url, queue)
    idle.wait_for("Waiting", times=2)
    send(url, queue, "later")
    idle.wait_for("Done")
    assert idle.out == [WAITING, WAITING, " [x] Received 'later'", " [x] Done"]
    (line,) = idle.err
    assert "cancelled the consumer" in line
    assert "consumer_timeout" not in line
    assert broker.bodies(queue, url) == []


@pytest.mark.parametrize("command", [[], ["sh", "-c", "echo pid $$; read task; sleep 60"]])
def test_the_task_of_a_queue_that_was_deleted_ends_at_once(
    broker, url, start, send, queue, command
):
    worker = start(url, *command)
    send(url, queue, LONG)
    worker.wait_for("pid" if command else "Received")
    delete(broker, url, queue)
    worker.wait_for("Waiting", times=2)
    if command:
        pid = next(line for line in worker.out if line.startswith("pid ")).split()[1]
        assert not psutil.pid_exists(int(pid))
    else:
        send(url, queue, "later")
        worker.wait_for("Done")
        assert worker.tasks("Received") == [LONG, "later"]
    (line,) = worker.err
    assert "cancelled the consumer" in line
    assert "consumer_timeout" not in line
    assert broker.ready(f"{queue}.retry", url) is None


@pytest.mark.parametrize("command", [[], ["sleep", "60"]], ids=["sleep", "command"])
def test_a_task_that_takes_longer_than_consumer_timeout_is_at_one_worker_at_a_time(
    impatient_url, start, send, queue, command
):
    queues = [f"{queue}-{number}" for number in range(3)]
    pairs = [[start(impatient_url, "-q", name, *command) for _ in range(2)] for name in queues]
    for name in queues:
        send(impatient_url, name, LONG)
    overlaps = []
    for workers in pairs:
        # One hand-over is waited for: RabbitMQ 4.3.6 may forget the time of the next, until
        # something else happens to the queue.
        wait_until(lambda pair=workers: any("redelivered" in line for w in pair for line in w.out))
        wait_until(lambda pair=workers: any(worker.err for worker in pair))
        before, after = sorted(span for worker in workers for span in in_hand(worker, LONG))[:2]
        overlaps.append(abs(after[0] - before[1]))
        for worker in workers:
            assert all("raise consumer_timeout" in line for line in worker.err)
            assert not any("Done" in line or "Failed" in line for line in worker.out)
    assert min(overlaps) < AT_TWO  # a busy machine makes some of them longer


def test_a_command_that_would_fail_after_consumer_timeout_makes_no_copy(
    impatient_broker, impatient_url, start, send, queue
):
    command = ["sh", "-c", f"sleep {2 * TIMEOUT / 1000}; false"]
    worker = start(impatient_url, "--retry-delay", "0", *command)
    send(impatient_url, queue, "task")
    worker.wait_for("raise consumer_timeout", times=3)
    assert impatient_broker.ready(f"{queue}.retry", impatient_url) is None
    assert not any("Failed" in line for line in worker.out)


def test_what_was_prefetched_with_a_task_that_took_too_long_goes_back_with_it(
    impatient_url, start, send, queue
):
    behind = [f"short {number}" for number in range(5)]
    send(impatient_url, queue, LONG, *behind)
    first = start(impatient_url, "--prefetch-count", "10")
    first.wait_for("raise consumer_timeout")
    assert first.tasks("Received") == [LONG]
    workers = [first, start(impatient_url)]  # whichever of them has to do with the long one
    wait_until(lambda: sum(worker.out.count(" [x] Done") for worker in workers) == len(behind))
    assert {task for worker in workers for task in worker.tasks("Received")} == {LONG, *behind}


def test_a_classic_queue_has_that_timeout_before_rabbitmq_4_3(impatient_broker, start, send, queue):
    url = impatient_broker.urls["classic"]
    worker = start(url)
    send(url, queue, "long.....")
    if impatient_broker.version() < (4, 3):
        worker.wait_for("raise consumer_timeout", times=2)
        assert not any("Done" in line for line in worker.out)
    else:
        worker.wait_for("Done")
        assert worker.err == []


def test_tasks_that_are_shorter_than_the_timeout_are_done(
    impatient_broker, impatient_url, start, send, queue
):
    worker = start(impatient_url)
    send(impatient_url, queue, *["short."] * 4)
    worker.wait_for("Done", times=4)
    assert worker.err == []
    wait_until(lambda: impatient_broker.ready(queue, impatient_url) == 0)
