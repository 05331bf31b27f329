"""What the scripts use of a system, Windows has, too; worker.py COMMAND says that it can't there.

The names that Windows lacks are taken away here. Windows itself is not at hand.
"""

import os
import signal
import subprocess

import pytest

MISSING = {
    "os": ["killpg", "getpgid", "setsid", "fork", "getuid", "set_blocking"],
    "signal": ["SIGHUP", "SIGQUIT", "SIGCHLD", "SIGKILL", "SIGALRM", "SIGUSR1", "SIGPIPE"],
}
RUN = (
    "import os, runpy, signal, sys\n"
    + "".join(
        f"hasattr({module}, {name!r}) and delattr({module}, {name!r})\n"
        for module, names in MISSING.items()
        for name in names
    )
    + "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.fixture
def on_windows(run, broker, queue):
    def start(name, *arguments, **options):
        script = os.path.join(os.path.dirname(os.path.dirname(__file__)), name)
        return run(broker, "-c", RUN, script, "-q", queue, *arguments, **options)

    return start


def test_tasks_are_sent_and_done(on_windows):
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


def test_a_command_is_refused_in_one_line(on_windows):
    worker = on_windows("worker.py", "wc", "-c")
    assert worker.wait() == 1
    assert len(worker.err) == 1
    assert worker.out == []
