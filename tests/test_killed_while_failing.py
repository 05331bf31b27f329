"""`worker.py`, killed at any moment between a task's failure and its acknowledgement."""

import signal

import pytest
from conftest import ROOT
from servers import wait_until

AT_ONCE = 8  # workers, each to be killed at another step


@pytest.mark.parametrize(
    ("kind", "retries", "suffix"), [("classic", "1", "retry"), ("quorum", "0", "dlq")]
)
def test_a_failed_task_is_in_one_queue_or_in_two_and_never_in_none(
    run, broker, vhosts, queue, kind, retries, suffix
):
    with broker.channel(vhosts[kind]) as channel:

        def start(step):
            name = f"{queue}-{step}"
            back = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": name}
            channel.queue_declare(name, durable=True)
            channel.queue_declare(
                f"{name}.{suffix}", durable=True, arguments=back if suffix == "retry" else None
            )
            channel.basic_publish("", name, b"task")
            options = ["-q", name, "--retries", retries, "--retry-delay", "600"]
            worker = ROOT / "worker.py"
            return name, run(vhosts[kind], "tests/kill_at.py", str(step), worker, *options, "false")

        def waiting(name):
            return tuple(
                channel.queue_declare(each, passive=True).method.message_count
                for each in (name, f"{name}.{suffix}")
            )

        def without_consumer(name):
            return channel.queue_declare(name, passive=True).method.consumer_count == 0

        copies, finished, step = [], False, 1
        while not finished:
            for name, worker in [start(step + number) for number in range(AT_ONCE)]:
                wait_until(lambda w=worker, n=name: w.process.poll() or waiting(n) == (0, 1))
                worker.signal(signal.SIGTERM)  # if it was not killed, it has nothing in hand
                finished = worker.wait() == 0
                wait_until(lambda n=name: without_consumer(n))
                copies.append(wait_until(lambda n=name: any(found := waiting(n)) and found))
            step += AT_ONCE
        print(copies)
    assert copies[0] == (1, 0)
    assert copies[-1] == (0, 1)
    assert set(copies) == {(1, 0), (1, 1), (0, 1)}
