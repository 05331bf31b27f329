"""Run a worker that is killed by SIGKILL at the nth step after a task of its has failed.

    tests/kill_at.py N worker.py [OPTION ...] COMMAND ...

A step is a line of the worker's own, or the moment in which pika begins to wait for the broker.
"""

import os
import runpy
import signal
import sys

step = int(sys.argv.pop(1))
script = sys.argv[1]
steps = 0
failed = False


def trace(frame, event, _):
    global failed, steps
    name = frame.f_code.co_name
    own = frame.f_code.co_filename == script
    failed = failed or "Failed" in str(own and frame.f_locals.get("line"))
    if failed and (own or name == "_flush_output"):
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace if own else None


sys.argv = sys.argv[1:]
sys.settrace(trace)
runpy.run_path(script, run_name="__main__")
