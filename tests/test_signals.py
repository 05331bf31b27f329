"""What a worker's tasks, and its exit status, become when a signal ends it."""

import signal
import subprocess
import time
from statistics import median

import psutil
import pytest
from commands import STUBBORN, assert_ended, pids_of
from conftest import WAITING
from servers import PATIENCE, free_port, wait_until

HEAVY = "heavy" + 60 * "."
AT_ONCE = 1  # second, of the median of some: a busy machine makes single ones longer
SOME = 3


def stop(script, *numbers):
    """Send signals; return the exit status and the seconds that the end took."""
    start = time.monotonic()
    for number in numbers:
        script.signal(number)
    return script.wait(), time.monotonic() - start


@pytest.mark.parametrize(("number", "status"), [("SIGKILL", -signal.SIGKILL), ("SIGINT", 130)])
def test_another_worker_gets_the_task_of_one_that_ends_in_mid_task_within_a_second(
    broker, worker, send, queue, number, status
):
    workers = [worker()]
    send(broker, queue, HEAVY)
    workers[0].wait_for("Received")
    pauses = []
    for _ in range(SOME):
        workers.append(worker())
        start = time.monotonic()
        workers[-2].signal(signal.Signals[number])
        pauses.append(workers[-1].wait_for("Received") - start)
    first, second = workers[:2]
    assert first.wait() == status
    assert first.out == [WAITING, f" [x] Received '{HEAVY}'"]
    assert first.err == []
    assert second.wait() == status
    assert second.out == [WAITING, f" [x] Received '{HEAVY}' (redelivered)"]
    assert median(pauses) < AT_ONCE


def test_sigterm_lets_a_worker_finish_the_task_in_hand_and_begin_no_other(
    broker, worker, send, queue
):
    workers = {}
    for prefetch_count in ("1", "0", "5"):
        name = f"{queue}-{prefetch_count}"
        send(broker, name, "in hand....", "waiting")
        first = worker("-q", name, "--prefetch-count", prefetch_count)
        workers[prefetch_count] = first
        first.wait_for("Received")
        assert broker.ready(name) == (1 if prefetch_count == "1" else 0)
        first.signal(signal.SIGTERM)
    for prefetch_count, first in workers.items():
        assert first.wait() == 0
        assert first.out == [WAITING, " [x] Received 'in hand....'", " [x] Done"]
        assert first.err == []
        second = worker("-q", f"{queue}-{prefetch_count}")
        second.wait_for("Done")
        handed_over = "" if prefetch_count == "1" else " (redelivered)"
        assert second.out == [WAITING, f" [x] Received 'waiting'{handed_over}", " [x] Done"]
        assert stop(second, signal.SIGTERM)[0] == 0
        assert broker.bodies(f"{queue}-{prefetch_count}") == []


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_worker_that_is_idle_or_waits_for_a_broker_ends_at_once(worker, run, number, status):
    nowhere = f"amqp://127.0.0.1:{free_port()}"
    without_a_broker = [run(nowhere, "worker.py") for _ in range(SOME)]
    idle = [worker() for _ in range(SOME)]
    for each in without_a_broker:
        each.wait_for("reconnecting in 3 s")
    for scripts, out in ((idle, [WAITING]), (without_a_broker, [])):
        ends = [stop(each, signal.Signals[number]) for each in scripts]
        assert [end for end, _ in ends] == [status] * SOME
        assert median(seconds for _, seconds in ends) < AT_ONCE
        assert all(each.out == out for each in scripts)
    assert all(each.err == [] for each in idle)


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [("SIGTERM", "SIGINT", 130), ("SIGINT", "SIGTERM", 130), ("SIGTERM", "SIGTERM", 0)],
)
def test_a_second_signal_ends_a_worker_at_once(broker, worker, send, queue, first, second, status):
    first, second = signal.Signals[first], signal.Signals[second]

    # Idle, both at the same time.
    ends = [stop(worker(), first, second) for _ in range(SOME)]
    assert {end for end, _ in ends} <= {0, status}  # 0 where it has ended before the second
    assert median(seconds for _, seconds in ends) < AT_ONCE

    # In the middle of a task, which a first one lets it finish, or whose command it waits for.
    commands = [[], STUBBORN] * SOME
    workers = [worker("-q", f"{queue}-{n}", *command) for n, command in enumerate(commands)]
    with broker.channel() as channel:
        for number in range(len(workers)):
            channel.basic_publish("", f"{queue}-{number}", HEAVY.encode())
    pids = []
    for busy, command in zip(workers, commands):
        busy.wait_for("Received")
        pids.append(pids_of(busy) if command else [])
    waiting = [busy for busy, each in zip(workers, pids) if each or first == signal.SIGTERM]
    for busy in waiting:  # the others end at once anyway
        busy.signal(first)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting[0].process.wait(0.5)
    ends = []
    for number, (busy, those) in enumerate(zip(workers, pids)):
        ends.append(stop(busy, *([second] if busy in waiting else [first, second])))
        assert_ended(those)  # by SIGKILL, with all that the command has started
        assert busy.err == []
        wait_until(lambda name=f"{queue}-{number}": broker.ready(name) == 1)
    assert {end for end, _ in ends} == {status}
    for kind in (ends[::2], ends[1::2]):
        assert median(seconds for _, seconds in kind) < AT_ONCE


def test_ctrl_c_in_a_terminal_ends_the_worker_below_the_dots_of_its_task(
    broker, terminal, publish, queue
):
    publish(b"heavy..........")
    shown = terminal("worker.py", "-q", queue)
    shown.expect_exact(f"{WAITING}\r\n [x] Received 'heavy..........'\r\n..")
    shown.sendintr()
    assert shown.read() in ("^C\r\n", ".^C\r\n")
    assert shown.wait() == 130
    assert broker.bodies(queue) == [b"heavy.........."]


def test_two_signals_end_a_worker_whose_terminal_takes_no_more(terminal, publish, queue):
    publish(b"heavy" + 60 * b".")
    shown = terminal("worker.py", "-q", queue)
    shown.expect_exact("heavy")
    shown.send("\x13")  # CTRL+S
    time.sleep(2.5)  # for a dot
    for number in (signal.SIGTERM, signal.SIGINT):
        shown.kill(number)
    assert_ended([shown.pid])


# ---- At any moment ----

BATCHES = 10  # of twelve workers


def functions_of(queues):
    """The processes that call a function for workers of some queues."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [line for line in lines if "--serve" in " ".join(line) and {*queues} & {*line}]


def test_whenever_signals_come_no_task_is_lost_and_no_process_is_left(
    broker, run, queue, tmp_path, monkeypatch, moments
):
    record = tmp_path / "record"
    monkeypatch.setenv("RECORD", str(record))
    function = ["--function", "tests.functions:record"]
    unending = ["--function", "tests.functions:never"]
    short = ["sh", "-c", "sleep 0.01; cat >> $0", record]
    endless = ["sleep", f"{10_000 + moments.random()}"]  # no other run's
    term, interrupt = signal.SIGTERM, signal.SIGINT
    any_one_or_two = [[interrupt], [interrupt, term], [term, interrupt], [term, term]]

    # Twelve workers at a time: the work of each, how it may be stopped, its exit status.
    slots = [
        ([], [[term]], {0}),
        (short, [[term]], {0}),
        (short, any_one_or_two, {0, 130}),
        (endless, any_one_or_two[:3], {130}),
        (function, any_one_or_two, {0, 130}),
        (unending, any_one_or_two[:3], {130}),
    ] * 2
    queues = [f"{queue}-{slot}" for slot in range(len(slots))]
    sent, done = [[[] for _ in slots] for _ in range(2)]
    problems = []
    for batch in range(BATCHES):
        with broker.channel() as channel:
            for name, bodies in zip(queues, sent):
                channel.queue_declare(name, durable=True)
                for number in range(50):
                    bodies.append(f"{name} {batch} {number}")
                    channel.basic_publish("", name, f"{bodies[-1]}\n".encode())
        workers = [
            run(broker, "worker.py", "-q", name, *command)
            for name, (command, *_) in zip(queues, slots)
        ]
        ways = []
        for script, (command, possible, _) in zip(workers, slots):
            # Wait for the task in hand, or for one of the next if there are so many.
            begun = len(script.tasks("Received"))
            last = 1 if command in (endless, unending) else 50
            script.wait_for("Received", times=min(begun + moments.randint(1, 5), last))
            # A command takes about as long to start.
            time.sleep(moments.uniform(0, 0.003))
            ways.append(moments.choice(possible))
            for number in ways[-1]:
                script.signal(number)
                time.sleep(moments.uniform(0, 0.003))
        for script in workers:
            script.process.wait(PATIENCE)
        # A second signal may come in the very moment in which a command is being started. One that
        # is left holds its worker's output open.
        excused = sum(slot[0] is endless and len(way) > 1 for slot, way in zip(slots, ways))
        for process in psutil.process_iter(["cmdline"]):
            if process.info["cmdline"] == endless:
                process.kill()
                excused -= 1
                if excused < 0:
                    problems.append("a command is left")
        for script, way, received, (*_, statuses) in zip(workers, ways, done, slots):
            status = script.wait()
            received += [task.removesuffix("\\n") for task in script.tasks("Received")]
            if status not in statuses or script.err:
                problems.append((way, status, script.err))
        # A function's process ends when its worker has ended, if it isn't killed before.
        wait_until(lambda: not functions_of(queues))
    assert problems == []

    # Done, and not there any more, or the other way round; both only after CTRL+C.
    recorded = record.read_text().splitlines()
    for name, bodies, received, (command, ways, _) in zip(queues, sent, done, slots):
        if command:
            received = [line for line in recorded if line.split()[0] == name]
        rest = []

        def all_there(name=name, bodies=bodies, received=received, rest=rest):
            rest += [body.decode().strip() for body in broker.bodies(name)]
            return set(received + rest) == set(bodies)

        wait_until(all_there)
        if ways == [[term]]:
            assert sorted(received + rest) == sorted(bodies)
