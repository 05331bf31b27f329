"""Both scripts, when standard output or standard error is closed, full, or has lost its reader."""

import re
import signal
import subprocess
import sys

import pytest
from conftest import EXEC, ROOT, refused
from servers import wait_until

LOST = ["&-", "/dev/full", " >(true)"]  # closed, full, or without a reader


@pytest.fixture
def shell(run):
    """Start a script with redirections of the shell's: shell(url, "2>&-", "worker.py", ...)."""

    def start(url, redirection, name, *arguments, **options):
        script = f'exec {sys.executable} "$@" {redirection}'
        return run(url, *EXEC, "bash", "-c", script, "-", ROOT / name, *arguments, **options)

    return start


def test_a_worker_outlives_its_standard_error(broker, shell, queue, publish):
    # Given workers, each with a queue of its own, ...
    started = {
        f"{queue}-{number}": shell(broker.url, f"2>{lost}", "worker.py", "-q", f"{queue}-{number}")
        for number, lost in enumerate(LOST)
    }
    for worker in started.values():
        worker.wait_for("Waiting")
    # ... when there is something to complain of,
    with broker.channel() as channel:
        for name in started:
            channel.queue_delete(name)
    # then they go on, and nothing of it moves to standard output.
    for name, worker in started.items():
        worker.wait_for("Waiting", times=2)
        publish(b"task", queue=name)
        worker.wait_for("Done")
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert not any("[!]" in line for line in worker.out)


def test_the_exit_status_is_the_same_without_a_standard_error(broker, shell, queue):
    cases = [
        (0, broker.url, "new_task.py", "-q", queue, "task"),
        (1, broker.url_of(login="guest:wrong"), "new_task.py", "task"),
        (1, broker.url_of(login="guest:wrong"), "worker.py"),
    ]
    for lost in LOST:
        started = [(each, shell(url, f"2>{lost}", *words)) for each, url, *words in cases]
        for status, script in started:
            assert script.wait() == status
            assert not any("[!]" in line for line in script.out)
    assert broker.bodies(queue) == [b"task"] * len(LOST)


@pytest.mark.parametrize("lost", LOST[1:])
def test_a_worker_that_loses_its_output_gives_its_task_back(broker, shell, send, queue, lost):
    send(broker, queue, "task")
    refused(shell(broker.url, f">{lost}", "worker.py", "-q", queue), "standard output")
    wait_until(lambda: broker.ready(queue) == 1)


def test_a_producer_whose_output_is_lost_counts_what_is_confirmed(broker, shell, queue):
    full = shell(broker.url, ">/dev/full", "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
    full.process.stdin.write(b"\none\n")
    full.process.stdin.flush()
    refused(full, "standard output", "No space left", "1 task confirmed; resume from line 3")
    # In mid-stream, too.
    headless = shell(
        broker.url, "> >(head -1 >&2)", "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE
    )
    headless.process.stdin.write(b"".join(b"%d\n" % number for number in range(1, 10_001)))
    headless.process.stdin.close()
    assert headless.wait() == 1
    order = ("[x]", "standard output", "confirmed")
    sent, _, count = (next(line for line in headless.err if word in line) for word in order)
    assert len(headless.err) == len(order)
    assert sent == " [x] Sent '1'"
    numbers = re.fullmatch(r" \[!\] (\d+) tasks? confirmed; resume from line (\d+)", count).groups()
    confirmed, line = map(int, numbers)
    assert 1 <= confirmed == line - 1
    stored = [b"one", *(b"%d" % number for number in range(1, line))]
    assert broker.bodies(queue)[: len(stored)] == stored
