"""What the scripts use of a system, Windows has, too; worker.py says what it can't do there.

The names that Windows lacks are taken away here. Windows itself is not at hand.
"""

import signal
import subprocess

import pytest
from conftest import ROOT, refused

MISSING = {
    "os": ["killpg", "getpgid", "setsid", "fork", "getuid", "set_blocking"],
    "signal": ["SIGHUP", "SIGQUIT", "SIGCHLD", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGPIPE"],
}
RUN = f"""
import os, runpy, select, signal, sys
for module, names in {MISSING}.items():
    for name in names:
        if hasattr(sys.modules[module], name):
            delattr(sys.modules[module], name)
def not_a_socket(*_):
    raise OSError("Windows can only select sockets")
select.select, sys.argv = not_a_socket, sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def on_windows(run, broker, queue):
    def start(name, *arguments, **options):
        return run(broker, "-c", RUN, ROOT / name, "-q", queue, *arguments, **options)

    return start


def test_without_what_windows_lacks_all_but_commands_and_functions_works(on_windows):
    assert on_windows("new_task.py", "First message.").wait() == 0
    producer = on_windows("new_task.py", "-", stdin=subprocess.PIPE)
    producer.process.stdin.write(b"Second message..")
    producer.process.stdin.close()
    assert producer.wait() == 0
    worker = on_windows("worker.py")
    worker.wait_for("Done", times=2)
    assert worker.tasks("Received") == ["First message.", "Second message.."]
    worker.signal(signal.SIGINT)
    assert worker.wait() == 130
    assert worker.err == []

    for work in (["wc", "-c"], ["--function", "builtins:print"]):
        refusing = on_windows("worker.py", *work)
        refused(refusing, "Windows")
        assert len(refusing.err) == 1
        assert refusing.out == []
