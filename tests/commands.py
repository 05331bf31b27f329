"""Commands for a worker to run, and a look at the processes of these and of functions."""

import contextlib

import psutil
from servers import wait_until

GRACE = 5  # seconds between SIGTERM and SIGKILL for a command

# Two processes that tell their ids; the first says so when it is asked to end.
POLITE = ["sh", "-c", "trap 'echo asked; exit' TERM; sleep 60 & echo pids $$ $!; wait"]
# Two processes that ignore SIGTERM.
STUBBORN = ["sh", "-c", "trap '' TERM; sleep 60 & echo pids $$ $!; wait"]


def pids_of(worker):
    """Return the process ids of a worker's first POLITE or STUBBORN command, once it runs."""
    worker.wait_for("pids ")
    line = next(line for line in worker.out if line.startswith("pids "))
    return list(map(int, line.split()[1:]))


def child_of(worker):
    """Return the process that a worker has started: for its function, or for a command."""
    return wait_until(lambda: psutil.Process(worker.process.pid).children())[0]


def assert_ended(pids):
    def runs(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            # An orphan that nobody waits for stays a zombie.
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    # At once, but a killed process needs a turn on the processor to end.
    wait_until(lambda: not any(map(runs, pids)), timeout=GRACE / 2)


def kill_child_of(worker):
    """Kill the process that a worker has started, and wait for its end; return it."""
    process = child_of(worker)
    process.kill()
    assert_ended([process.pid])
    return process
