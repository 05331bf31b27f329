"""Both scripts: their connections have names, which the broker's tools show."""

import socket
import subprocess

import pytest
from servers import wait_until


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_a_connection_is_named_after_script_process_and_host(run, broker, queue, script):
    arguments = ["-q", queue, *(["-"] if script == "new_task.py" else [])]
    running = run(broker, script, *arguments, stdin=subprocess.PIPE)

    def line():
        lines = broker.rabbitctl_output("-q", "list_connections", "client_properties").splitlines()
        return next((line for line in lines if str(running.process.pid) in line), None)

    name = wait_until(line)
    assert script in name
    assert socket.gethostname() in name
