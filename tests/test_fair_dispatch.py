"""`worker.py`: a prefetch count of 1 is fair dispatch, 0 is round-robin."""

from conftest import WAITING
from servers import wait_until

FIVE = ("First message.", "Second message..", "Third message...")
FIVE += ("Fourth message....", "Fifth message.....")
HEAVY_AND_LIGHT = ("heavy 1...", "light 1.", "heavy 2...", "light 2.")
ROUND_ROBIN = 6  # seconds, as both heavy tasks are one worker's


def lines(*tasks):
    return [WAITING] + [line for task in tasks for line in (f" [x] Received '{task}'", " [x] Done")]


def all_done(workers, tasks):
    wait_until(lambda: sum(each.out.count(" [x] Done") for each in workers) == len(tasks))


def test_a_prefetch_count_of_1_is_fair_dispatch_and_0_is_round_robin(broker, worker, send, queue):
    # Six workers at the same time, two for each of three queues.
    tutorials = [worker("-q", "task_queue") for _ in range(2)]
    fair = [worker() for _ in range(2)]
    dealt_out = [worker("-q", f"{queue}-0", "--prefetch-count", "0") for _ in range(2)]
    send(broker, "task_queue", *FIVE)
    send(broker, queue, *HEAVY_AND_LIGHT)
    send(broker, f"{queue}-0", *HEAVY_AND_LIGHT)

    # Two idle workers share the tutorial's five tasks.
    all_done(tutorials, FIVE)
    assert sorted(each.out for each in tutorials) == [
        lines("First message.", "Third message...", "Fifth message....."),
        lines("Second message..", "Fourth message...."),
    ]

    # With fair dispatch, both are busy to the end.
    all_done(fair, HEAVY_AND_LIGHT)
    assert sorted(each.tasks("Received") for each in fair) == [
        ["heavy 1...", "light 2."],
        ["light 1.", "heavy 2..."],
    ]
    begin = min(each.wait_for("Received") for each in fair)
    assert max(each.wait_for("Done", times=2) for each in fair) - begin < ROUND_ROBIN

    # Without a limit, one has all the heavy ones, though the other is idle.
    all_done(dealt_out, HEAVY_AND_LIGHT)
    assert sorted(each.tasks("Received") for each in dealt_out) == [
        ["heavy 1...", "heavy 2..."],
        ["light 1.", "light 2."],
    ]
