"""What a worker's tasks, and its exit status, become when a signal ends it."""

import os
import random
import signal
import subprocess
import sys
import time

import pexpect
import pytest
from conftest import ROOT
from servers import PATIENCE, free_port, wait_until

WAITING = " [*] Waiting for messages. To exit press CTRL+C"
AT_ONCE = 1  # seconds, of the quickest of some: a busy machine makes others longer
SOME = 3
STOPS = 40
SEED = random.randrange(1_000_000)


@pytest.fixture
def worker(run, broker, queue):
    """A worker of this test's queue, ready to receive."""

    def start(*arguments):
        script = run(broker, "worker.py", "-q", queue, *arguments)
        script.wait_for("Waiting")
        return script

    return start


@pytest.fixture
def nowhere():
    """The URL of a broker that isn't there."""
    return f"amqp://127.0.0.1:{free_port()}"


def stop(script, number):
    """Send a signal; return the exit status and the seconds that the end took."""
    start = time.monotonic()
    script.signal(number)
    return script.wait(), time.monotonic() - start


@pytest.mark.parametrize(("number", "status"), [("SIGKILL", -signal.SIGKILL), ("SIGINT", 130)])
def test_another_worker_gets_the_task_of_one_that_ends_in_mid_task_within_a_second(
    broker, worker, send, queue, number, status
):
    heavy = "heavy" + 60 * "."
    workers = [worker()]
    send(broker, queue, heavy)
    workers[0].wait_for("Received")
    pauses = []
    for _ in range(SOME):
        workers.append(worker())
        start = time.monotonic()
        workers[-2].signal(signal.Signals[number])
        pauses.append(workers[-1].wait_for("Received") - start)
    first, second = workers[:2]
    assert first.wait() == status
    assert first.out == [WAITING, f" [x] Received '{heavy}'"]
    assert first.err == []
    assert second.wait() == status
    assert second.out == [WAITING, f" [x] Received '{heavy}' (redelivered)"]
    assert min(pauses) < AT_ONCE


@pytest.mark.parametrize("prefetch_count", ["1", "0", "5"])
def test_sigterm_lets_a_worker_finish_the_task_in_hand_and_begin_no_other(
    broker, worker, send, queue, prefetch_count
):
    first = worker("--prefetch-count", prefetch_count)
    send(broker, queue, "in hand....", "waiting")
    first.wait_for("Received")
    assert broker.ready(queue) == (1 if prefetch_count == "1" else 0)
    assert stop(first, signal.SIGTERM)[0] == 0
    assert first.out == [WAITING, " [x] Received 'in hand....'", " [x] Done"]
    assert first.err == []
    second = worker()
    second.wait_for("Done")
    handed_over_before = "" if prefetch_count == "1" else " (redelivered)"
    assert second.out == [WAITING, f" [x] Received 'waiting'{handed_over_before}", " [x] Done"]
    assert stop(second, signal.SIGTERM)[0] == 0
    assert broker.bodies(queue) == []


def test_sigterm_and_then_sigint_ends_a_worker_at_once(broker, worker, send, queue):
    heavy = "heavy" + 60 * "."
    send(broker, queue, heavy)
    pauses = []
    for times in range(SOME):
        script = worker()
        script.wait_for("Received")
        script.signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):  # for it is finishing the task
            script.process.wait(0.5)
        status, seconds = stop(script, signal.SIGINT)
        assert status == 130
        pauses.append(seconds)
        again = " (redelivered)" if times else ""
        assert script.out == [WAITING, f" [x] Received '{heavy}'{again}"]
        assert script.err == []
    assert min(pauses) < AT_ONCE
    wait_until(lambda: broker.ready(queue) == 1)


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_an_idle_worker_ends_at_once(worker, number, status):
    pauses = []
    for script in [worker() for _ in range(SOME)]:
        end, seconds = stop(script, signal.Signals[number])
        assert end == status
        pauses.append(seconds)
        assert script.out == [WAITING]
        assert script.err == []
    assert min(pauses) < AT_ONCE


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_worker_that_waits_for_a_broker_ends_at_once(run, nowhere, number, status):
    pauses = []
    for script in [run(nowhere, "worker.py") for _ in range(SOME)]:
        script.wait_for("trying again in 4 s")
        end, seconds = stop(script, signal.Signals[number])
        assert end == status
        pauses.append(seconds)
        assert script.out == []
    assert min(pauses) < AT_ONCE


def test_ctrl_c_in_a_terminal_ends_the_worker_under_the_dots_it_has_worked_off(broker, send, queue):
    terminal = pexpect.spawn(
        sys.executable,
        [str(ROOT / "worker.py"), "-q", queue],
        env={**os.environ, "AMQP_URL": broker.url},
        timeout=PATIENCE,
    )
    with terminal:
        terminal.expect_exact(f"{WAITING}\r\n")
        send(broker, queue, "heavy..........")
        terminal.expect_exact(" [x] Received 'heavy..........'\r\n..")
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
        assert terminal.before in (b"^C\r\n", b".^C\r\n")
    assert terminal.exitstatus == 130
    assert broker.bodies(queue) == [b"heavy.........."]


def test_whenever_sigterm_comes_no_task_is_lost_or_done_twice(broker, worker, send, queue):
    print(f"seed {SEED}")
    moments = random.Random(SEED)
    tasks, done = [], []
    for stopped in range(STOPS):
        more = [f"task {stopped}-{number}" for number in range(100)]
        send(broker, queue, *more)  # each time, as a slow signal lets a worker do all of them
        tasks += more
        script = worker()
        script.wait_for("Received", times=moments.randint(1, 50))
        time.sleep(moments.uniform(0, 0.002))
        assert stop(script, signal.SIGTERM)[0] == 0
        assert script.err == []
        assert script.out.count(" [x] Done") == len(script.tasks("Received"))
        done += script.tasks("Received")
    rest = [body.decode() for body in broker.bodies(queue)]
    assert sorted(done + rest) == sorted(tasks)


@pytest.mark.parametrize(
    ("number", "word", "status"), [("SIGINT", "Interrupted", 130), ("SIGTERM", "Terminated", 143)]
)
def test_a_producer_that_a_signal_ends_says_how_many_tasks_were_confirmed(
    run, broker, queue, number, word, status
):
    pauses = []
    for _ in range(SOME):
        producer = run(broker, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
        producer.process.stdin.write(b"one\ntwo\n\nthree\n")
        producer.process.stdin.flush()
        producer.wait_for("Sent 'three'")
        end, seconds = stop(producer, signal.Signals[number])
        assert end == status
        pauses.append(seconds)
        assert producer.err == [f" [!] {word}; tasks confirmed: 3, send the rest from line 5 on"]
        assert broker.bodies(queue) == [b"one", b"two", b"three"]
    assert min(pauses) < AT_ONCE
