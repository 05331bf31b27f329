"""Functions for `worker.py --function` to call: what a task says is done."""

import ctypes
import os
import subprocess
import sys
import time

calls = []  # the bodies so far, in this process


def do(body):
    calls.append(body)
    exec(body, globals())


def compute(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(10_000))


class Silent(Exception):
    def __repr__(self):
        return ""


class Loud(Exception):
    def __repr__(self):
        return 40 * "\x1b[31m"


class Mute(Exception):
    def __str__(self):
        raise ValueError("not to be shown")

    __repr__ = __str__


class Angry(Exception):
    def __repr__(self):
        sys.exit("at once")


class set(Exception):
    pass


def crash():
    ctypes.string_at(0)


def stubborn():
    """Never end, whatever is raised. Tell the ids of this process and of one that it starts."""
    print("pids", os.getpid(), subprocess.Popen(["sleep", "60"]).pid, flush=True)
    while True:
        try:
            time.sleep(1)
        except Exception:
            print("never mind", flush=True)


def fork_one_that_holds_the_pipe():
    if os.fork() == 0:
        time.sleep(60)
    os._exit(7)


def record(body):
    """Note a task in a file, after some work."""
    time.sleep(0.01)
    with open(os.environ["RECORD"], "ab") as file:
        file.write(body)


def never(body):
    time.sleep(10_000)
