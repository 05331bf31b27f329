"""`tests/demo.py`: draws a real run of each way of dispatch, and leaves nothing behind."""

import contextlib
import os
import time
import xml.etree.ElementTree
from pathlib import Path

import pexpect
import psutil
import pytest
from servers import PATIENCE, wait_until

FEW = ["--workers", "2", "--tasks", "4", "--long", "2", "--short", "1"]
DEMO = ["tests/demo.py", *FEW]


def started_in(folder):
    """The processes whose temporary files are to be in a folder."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # others' may not be looked at
            if process.environ().get("TMPDIR") == str(folder):
                yield process.name()


def test_the_picture_of_a_run_shows_round_robin_and_fair_dispatch(broker, run, tmp_path):
    demo = run(broker, *DEMO, "--svg", tmp_path / "picture.svg")
    assert demo.wait() == 0
    rows = ["".join(filter(str.isalnum, line)) for line in demo.out]
    assert demo.out[0].startswith("round-robin: worker.py --prefetch-count 0")
    assert sorted(rows[1:3]) == ["worker1L1L2", "worker2S1S2"]
    assert demo.out[4].startswith("fair dispatch: worker.py --prefetch-count 1 (the default)")
    assert {row[7:] for row in rows[5:7]} in ({"L1", "S1S2L2"}, {"L1S2", "S1L2"})
    assert demo.out[8] == "4 tasks, in turn long 2 s and short 1 s, 2 workers"
    assert demo.out[9].endswith("best possible 3 s")
    round_robin, fair = (float(part.split()[-2]) for part in demo.out[9].split(",")[:2])
    assert round_robin >= 4
    assert fair >= 3
    assert "\033" not in "".join(demo.out)
    assert demo.err == []
    words = [each.text for each in xml.etree.ElementTree.parse(tmp_path / "picture.svg").iter()]
    assert sorted(word for word in words if word and len(word) == 2) == sorted(
        2 * ["L1", "L2", "S1", "S2"]
    )
    assert broker.ready("work-queue-demo") is None


def wait_for_child(pid, number):
    """Wait until a process begins to start its nth child, and not any longer."""
    children, seen = Path(f"/proc/{pid}/task/{pid}/children"), set()
    end = time.monotonic() + PATIENCE
    while len(seen) < number:
        seen.update(children.read_text().split())
        assert time.monotonic() < end


@pytest.mark.parametrize("moment", [*4 * ["first child", "second child"], "beam.smp", "|L1"])
def test_ctrl_c_leaves_no_process_no_file_and_no_terminal_setting(moment, terminal, tmp_path):
    without_broker = {**os.environ, "TMPDIR": str(tmp_path)}
    demo = terminal(*DEMO, url="", env=without_broker)
    if "child" in moment:
        wait_for_child(demo.pid, 1 + (moment == "second child"))
    elif moment == "beam.smp":
        wait_until(lambda: moment in started_in(tmp_path))
    else:
        demo.expect_exact(moment)
    demo.sendintr()
    demo.expect(pexpect.EOF)
    demo.close()
    assert demo.exitstatus == 130
    assert "Traceback" not in demo.before
    assert "\033[?" not in demo.before  # no mode was set
    wait_until(lambda: not list(started_in(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_broker_that_goes_away_ends_the_demo_with_its_workers(broker, run):
    demo = run(broker, *DEMO, "--long", "30")
    consumers = ["-q", "list_consumers", "queue_name"]
    wait_until(lambda: broker.rabbitctl_output(*consumers).count("work-queue-demo") == 2)
    workers = psutil.Process(demo.process.pid).children()
    broker.rabbitctl_output("close_all_connections", "maintenance")
    assert demo.wait() == 1
    assert "maintenance" in demo.err[0]
    assert psutil.wait_procs(workers, timeout=5)[1] == []


def test_a_broker_that_is_not_there_or_does_not_start_is_reported(run, monkeypatch):
    monkeypatch.setenv("ERL_FLAGS", "-no-such-option +no-such-option")
    for url, words in (("amqp://127.0.0.1:1", "does not let us in"), ("", "exit status")):
        demo = run(url, *DEMO)
        assert demo.wait() == 1
        assert words in "".join(demo.err)
