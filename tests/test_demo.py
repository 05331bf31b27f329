"""`tests/demo.py`: draws a real run of each way of dispatch, and leaves nothing behind."""

import os
import subprocess
import sys
import xml.etree.ElementTree

import pexpect
import psutil
import pytest
from conftest import ROOT, started_in
from servers import PATIENCE, wait_until

DEMO = ROOT / "tests" / "demo.py"
FEW = ["--workers", "2", "--tasks", "4", "--heavy", "2", "--light", "1"]


@pytest.fixture
def queues(broker):
    """The names of all queues of a broker."""
    return lambda: broker.rabbitctl_output("-q", "list_queues", "name").split()


def test_the_picture_of_a_run_shows_round_robin_and_fair_dispatch(broker, queues, tmp_path):
    before = queues()
    picture = tmp_path / "picture.svg"
    played = subprocess.run(
        [sys.executable, DEMO, *FEW, "--svg", picture],
        env={**os.environ, "AMQP_URL": broker.url},
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    lines = played.stdout.decode().splitlines()
    assert "\033" not in "".join(lines)
    assert lines[0].startswith("round-robin: worker.py --prefetch-count 0")
    rows = sorted("".join(filter(str.isalnum, line)) for line in lines[1:3])
    assert rows == ["worker1H1H2", "worker2L1L2"]
    assert lines[4].startswith("fair dispatch: worker.py --prefetch-count 1")
    rows = sorted("".join(filter(str.isalnum, line))[7:] for line in lines[5:7])
    assert rows in (["H1", "L1L2H2"], ["H1L2", "L1H2"])
    assert lines[8] == "4 tasks, in turn heavy 2 s and light 1 s, 2 workers"
    assert lines[9].endswith("best possible 3 s")
    totals = [float(part.split()[-2]) for part in lines[9].split(",")[:2]]
    assert 4 <= totals[0] < 5
    assert 3 <= totals[1] < 4
    assert played.stderr == b""

    tree = xml.etree.ElementTree.parse(picture)
    words = [element.text for element in tree.iter() if element.tag.endswith("text")]
    assert [word for word in words if word in ("H1", "H2", "L1", "L2")].count("H1") == 2
    assert queues() == before


@pytest.mark.parametrize(
    ("moment", "beginning"),
    [
        ("Waiting for the broker", None),
        ("Waiting for the broker", "epmd"),
        ("Waiting for the broker", "beam.smp"),
        ("round-robin", None),
        ("|H1", None),
        ("fair dispatch", None),
    ],
)
def test_ctrl_c_at_any_time_leaves_no_process_and_no_terminal_setting(moment, beginning, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "AMQP_URL"}
    terminal = pexpect.spawn(
        sys.executable,
        [str(DEMO), *FEW],
        env={**environment, "TMPDIR": str(tmp_path)},
        timeout=PATIENCE,
        encoding="utf-8",
        dimensions=(24, 80),
    )
    with terminal:
        terminal.expect_exact(moment)
        wait_until(lambda: not beginning or started_in(tmp_path, beginning))
        started = psutil.Process(terminal.pid).children(recursive=True)
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
        assert "Traceback" not in terminal.before
        shown = terminal.before
    assert terminal.exitstatus == 130
    assert "\033[?" not in shown  # no mode was set
    _, alive = psutil.wait_procs(started, timeout=PATIENCE)
    assert not alive
    assert started_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_start_is_reported(tmp_path):
    (tmp_path / "broken.conf").write_text("broken")
    environment = {key: value for key, value in os.environ.items() if key != "AMQP_URL"}
    demo = subprocess.run(
        [sys.executable, DEMO, *FEW],
        env={**environment, "RABBITMQ_CONFIG_FILE": str(tmp_path / "broken.conf")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert demo.returncode == 1
    assert "rabbitmq-server has ended, with exit status" in demo.stderr
    assert "Traceback" not in demo.stderr


def test_a_broker_that_goes_away_ends_the_demo_with_its_workers(fragile_broker):
    demo = subprocess.Popen(
        [sys.executable, DEMO, *FEW, "--heavy", "30"],
        env={**os.environ, "AMQP_URL": fragile_broker.url},
        stderr=subprocess.PIPE,
        text=True,
    )

    def workers():
        children = psutil.Process(demo.pid).children()
        return [child for child in children if "worker.py" in " ".join(child.cmdline())]

    wait_until(lambda: len(workers()) == 2)
    started = workers()
    wait_until(lambda: fragile_broker.rabbitctl_output("list_consumers", "ack_required"))
    fragile_broker.rabbitctl_output("close_all_connections", "maintenance")
    assert demo.wait(PATIENCE) == 1
    assert "maintenance" in demo.stderr.read()
    _, alive = psutil.wait_procs(started, timeout=PATIENCE)
    assert not alive


def test_an_unreachable_broker_is_reported():
    ended = subprocess.run(
        [sys.executable, DEMO],
        env={**os.environ, "AMQP_URL": "amqp://127.0.0.1:1"},
        capture_output=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 1
    assert b"does not let us in" in ended.stderr
    assert b"Traceback" not in ended.stderr
