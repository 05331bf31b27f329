"""`worker.py`: a prefetch count of 1 is fair dispatch, 0 is round-robin."""

import pytest
from servers import wait_until

FIVE = ("First message.", "Second message..", "Third message...")
FIVE += ("Fourth message....", "Fifth message.....")
HEAVY_AND_LIGHT = ("heavy 1...", "light 1.", "heavy 2...", "light 2.")
HEAVY_AND_LIGHT += ("heavy 3...", "light 3.", "heavy 4...", "light 4.")
BEST_SCHEDULE = 8  # seconds: 16 dots on two workers
ROUND_ROBIN = 12  # seconds, as all heavy tasks are one worker's


@pytest.fixture
def two_workers(run, broker):
    def start(*arguments):
        workers = [run(broker, "worker.py", *arguments) for _ in range(2)]
        for worker in workers:
            worker.wait_for("Waiting")
        return workers

    return start


def lines(*tasks):
    waiting = [" [*] Waiting for messages. To exit press CTRL+C"]
    return waiting + [line for task in tasks for line in (f" [x] Received '{task}'", " [x] Done")]


def all_done(workers, tasks):
    wait_until(lambda: sum(worker.out.count(" [x] Done") for worker in workers) == len(tasks))


def test_two_idle_workers_share_the_tutorials_five_tasks(broker, two_workers, send):
    workers = two_workers()
    send(broker, "task_queue", *FIVE)
    all_done(workers, FIVE)
    assert sorted(worker.out for worker in workers) == [
        lines("First message.", "Third message...", "Fifth message....."),
        lines("Second message..", "Fourth message...."),
    ]


def test_without_a_prefetch_limit_one_worker_does_all_the_heavy_tasks(
    broker, two_workers, send, queue
):
    workers = two_workers("-q", queue, "--prefetch-count", "0")
    send(broker, queue, *HEAVY_AND_LIGHT)
    all_done(workers, HEAVY_AND_LIGHT)
    assert sorted(worker.tasks("Received") for worker in workers) == [
        ["heavy 1...", "heavy 2...", "heavy 3...", "heavy 4..."],
        ["light 1.", "light 2.", "light 3.", "light 4."],
    ]


def test_with_fair_dispatch_both_workers_are_busy_to_the_end(broker, two_workers, send, queue):
    workers = two_workers("-q", queue)
    send(broker, queue, *HEAVY_AND_LIGHT)
    start = min(worker.wait_for("Received") for worker in workers)
    all_done(workers, HEAVY_AND_LIGHT)
    ends = [worker.wait_for("Done", times=worker.out.count(" [x] Done")) for worker in workers]
    seconds_of_work = ["".join(worker.tasks("Received")).count(".") for worker in workers]
    assert seconds_of_work == [BEST_SCHEDULE, BEST_SCHEDULE]
    assert max(ends) - start < ROUND_ROBIN
