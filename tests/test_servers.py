"""No process and no file of the tests' servers is left, whoever started them is interrupted."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, started_in
from servers import PATIENCE, wait_until

START = """
import time
from servers import servers
with servers() as start:
    print("begun", flush=True)
    start()
    print("started", flush=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("moment", ["begun", "erl_child_setup", "beam.smp", "started"])
def test_nothing_is_left_of_servers_whoever_started_them_is_killed(moment, number, tmp_path):
    starter = subprocess.Popen(
        [sys.executable, "-c", START],
        cwd=ROOT / "tests",
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with starter:
        while moment in ("begun", "started") and moment not in starter.stdout.readline():
            assert starter.poll() is None
        wait_until(lambda: moment in ("begun", "started") or started_in(tmp_path, moment))
        starter.send_signal(number)
        starter.wait(PATIENCE)
    wait_until(lambda: not started_in(tmp_path) and not list(tmp_path.iterdir()))
