"""Both scripts, when standard output or standard error is closed, full, or has lost its reader."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from servers import free_port, wait_until

EXEC = ["-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"]  # for programs not in Python


@pytest.fixture
def shell(run):
    """Run a script with redirections of the shell's: shell(url, "2>&-", "worker.py", ...)."""

    def start(url, redirection, name, *arguments):
        script = f'exec {sys.executable} "$@" {redirection}'
        return run(url, *EXEC, "sh", "-c", script, "sh", ROOT / name, *arguments)

    return start


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_a_worker_outlives_a_standard_error_that_takes_nothing(
    fragile_broker, shell, send, queue, redirection
):
    worker = shell(fragile_broker.url, redirection, "worker.py", "-q", queue)
    worker.wait_for("Waiting")
    fragile_broker.rabbitctl_output("close_all_connections", "maintenance")
    worker.wait_for("Waiting", times=2)  # with a line of diagnostics in between
    send(fragile_broker, queue, "task")
    worker.wait_for("Done")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert not any("[!]" in line for line in worker.out)


def test_a_worker_outlives_a_reader_of_its_standard_error(fragile_broker, send, queue):
    reading, writing = os.pipe()
    worker = subprocess.Popen(
        [sys.executable, ROOT / "worker.py", "-q", queue, "sh", "-c", "echo done >&3"],
        env={**os.environ, "AMQP_URL": fragile_broker.url},
        stdout=subprocess.PIPE,
        stderr=writing,
    )
    with worker:
        os.close(writing)
        assert b"Waiting" in worker.stdout.readline()
        os.close(reading)
        fragile_broker.rabbitctl_output("close_all_connections", "maintenance")
        assert b"Waiting" in worker.stdout.readline()
        worker.terminate()
        assert worker.wait(60) == 0
        assert worker.stdout.read() == b""


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_the_exit_status_tells_of_a_failure_that_no_line_can_tell(
    broker, shell, script, redirection
):
    url = broker.url_of(login="guest:wrong")
    failing = shell(url, redirection, script)
    assert failing.wait() == 1
    assert not any("[!]" in line for line in failing.out)


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_wrong_usage_is_exit_status_2_without_standard_error(broker, shell, redirection):
    for script in ("new_task.py", "worker.py"):
        assert shell(broker.url, redirection, script, "--unknown").wait() == 2


def test_a_worker_whose_output_is_lost_gives_its_task_back(broker, shell, send, queue):
    send(broker, queue, "task")
    worker = shell(broker.url, ">/dev/full", "worker.py", "-q", queue)
    assert worker.wait() == 1
    (line,) = worker.err
    assert "standard output" in line
    wait_until(lambda: broker.ready(queue) == 1)


def test_nothing_is_left_of_a_worker_that_can_tell_nobody(shell, queue):
    nowhere = f"amqp://127.0.0.1:{free_port()}"
    worker = shell(nowhere, "2>&- >&-", "worker.py", "-q", queue)
    with pytest.raises(subprocess.TimeoutExpired):  # for it waits for a broker
        worker.process.wait(3)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
