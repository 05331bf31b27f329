"""`worker.py COMMAND`: real work, a process for every task, which ends with its worker."""

import hashlib
import random
import signal
import sys

import pytest
from commands import GRACE, POLITE, STUBBORN, assert_ended, pids_of
from conftest import ROOT, WAITING
from servers import wait_until

RANDOM = random.Random(1)


@pytest.fixture
def start_ignoring(worker):
    """Start a worker that ignores a signal, as its parent does: start_ignoring(number, ...)."""

    def start(number, *arguments):
        handler = signal.signal(number, signal.SIG_IGN)
        try:
            return worker(*arguments)
        finally:
            signal.signal(number, handler)

    return start


def test_the_command_gets_the_exact_body_on_standard_input(worker, publish):
    bodies = [b"", b"\x00", b"two\nlines", b"\xff\xfe", RANDOM.randbytes(1_000_000)]
    for body in bodies:
        publish(body)
    summing = worker("md5sum")
    summing.wait_for("Done", times=len(bodies))
    assert summing.out[2::3] == [f"{hashlib.md5(body).hexdigest()}  -" for body in bodies]


def test_the_commands_output_passes_through_in_order(worker, publish):
    publish(b"First message.")
    publish(b"Second message..")
    counting = worker("sh", "-c", "wc -c; echo to stderr >&2")
    counting.wait_for("Done", times=2)
    counting.wait_for("to stderr", times=2)
    assert counting.out == [
        WAITING,
        " [x] Received 'First message.'",
        "14",
        " [x] Done",
        " [x] Received 'Second message..'",
        "16",
        " [x] Done",
    ]
    assert counting.err == ["to stderr"] * 2


def test_nothing_of_a_task_reaches_a_shell_the_arguments_or_the_environment(
    worker, publish, tmp_path
):
    proof = f"touch {tmp_path}/proof"
    publish(f"'; {proof}; $({proof}) `{proof}`".encode())
    look = "tr '\\0' '\\n' < /proc/$PPID/cmdline; tr '\\0' '\\n' < /proc/$$/cmdline; env"
    looking = worker("--", "sh", "-c", look, "-q", "--help", "-")  # options of its own
    looking.wait_for("Done")
    assert looking.out.count("--help") == 2
    assert not any("proof" in line for line in looking.out[2:])
    assert not list(tmp_path.iterdir())


def test_a_command_can_send_tasks_itself(broker, worker, send, queue):
    send(broker, queue, "first", "second")
    sending = worker(sys.executable, ROOT / "new_task.py", "-q", f"{queue}-next", "-")
    sending.wait_for("Done", times=2)
    assert broker.bodies(f"{queue}-next") == [b"first", b"second"]


def test_a_command_that_does_not_exit_with_0_has_failed(broker, start_ignoring, send, queue):
    send(broker, queue, "exit 3", "kill -9 $$", "kill -34 $$", "exit 0", "cat no-such-file")
    # Ignored child processes, as under some parents, would seem to exit with 0.
    running = start_ignoring(signal.SIGCHLD, "sh")
    for failure in ("exit status 3", "signal 9: Killed", "signal 34", "exit status 1"):
        running.wait_for(f" [!] Failed: {failure}")
    wait_until(lambda: broker.ready(f"{queue}.retry") == 4)
    assert running.out.count(" [x] Done") == 1


def test_a_command_that_does_not_read_its_input_is_no_failure(worker, publish):
    publish(b"x" * 1_000_000)
    worker("true").wait_for("Done")


def test_a_command_that_cannot_be_run_is_refused_at_the_start(broker, run, publish, queue):
    publish(b"task")
    commands = ["no-such-command", "/no-such-file", str(ROOT / "README.md"), str(ROOT)]
    workers = {command: run(broker, "worker.py", "-q", queue, command) for command in commands}
    for command, each in workers.items():
        assert each.wait() == 1
        (line,) = each.err
        assert command in line
        assert each.out == []
    with broker.channel() as channel:
        method, _, body = channel.basic_get(queue)
        assert body == b"task"
        assert not method.redelivered


def test_the_time_limit_ends_the_commands_whole_process_group(broker, worker, send, queue):
    workers = {}
    for name, command in (("polite", POLITE), ("stubborn", STUBBORN)):
        send(broker, f"{queue}-{name}", "task", "next")
        workers[name] = worker("-q", f"{queue}-{name}", "--time-limit", "1", *command)
    pids = {name: pids_of(each) for name, each in workers.items()}
    took = {}
    for name, each in workers.items():
        failed = each.wait_for("Failed: exceeded the time limit of 1 s")
        took[name] = failed - each.wait_for("Received 'task'")
        assert_ended(pids[name])
        each.wait_for("Received 'next'")
    assert "asked" in workers["polite"].out
    assert took["polite"] < 1 + GRACE
    assert took["stubborn"] > GRACE


def test_ctrl_c_ends_the_commands_whole_process_group(broker, worker, send, queue):
    workers = []
    for command in (POLITE, STUBBORN):
        for number in (signal.SIGINT, signal.SIGQUIT):
            name = f"{queue}-{len(workers)}"
            send(broker, name, "task")
            workers.append((name, command, number, worker("-q", name, *command)))
    pids = [pids_of(each) for *_, each in workers]
    for _, _, number, each in workers:
        each.signal(number)
    for (name, command, _, each), those in zip(workers, pids):
        assert each.wait() == 130
        assert_ended(those)
        assert ("asked" in each.out) == (command == POLITE)
        assert each.err == []
        assert broker.bodies(name) == [b"task"]


def test_ctrl_c_in_a_terminal_reaches_the_command_through_its_worker(
    broker, terminal, publish, queue
):
    publish(b"task....")
    shown = terminal("worker.py", "-q", queue, *POLITE)
    shown.expect(r"'task\.\.\.\.'\r\npids (\d+) (\d+)\r\n")
    pids = list(map(int, shown.match.groups()))
    shown.sendintr()
    shown.expect_exact("^Casked\r\n")
    assert shown.read() == ""
    assert shown.wait() == 130
    assert_ended(pids)
    assert broker.bodies(queue) == [b"task...."]


def test_a_closed_terminal_ends_the_command(broker, terminal, send, queue):
    closed = []
    for name, command in (("polite", POLITE), ("stubborn", STUBBORN)):
        send(broker, f"{queue}-{name}", "task")
        shown = terminal("worker.py", "-q", f"{queue}-{name}", *command)
        shown.expect(r"pids (\d+) (\d+)\r\n")
        pids = list(map(int, shown.match.groups()))
        shown.kill(signal.SIGHUP)  # from its shell; and from the system:
        shown.ptyproc.fileobj.close()
        closed.append((name, shown, pids))
    for name, shown, pids in closed:
        assert shown.wait() == 130
        assert_ended(pids)
        assert broker.bodies(f"{queue}-{name}") == [b"task"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["background", "nohup"])
def test_a_worker_that_was_started_to_ignore_a_signal_does_so(start_ignoring, publish, number):
    publish(b"task")
    ignoring = start_ignoring(number, "sh", "-c", "echo begun; sleep 1")
    ignoring.wait_for("begun")
    ignoring.signal(number)
    ignoring.wait_for("Done")
    ignoring.signal(signal.SIGTERM)
    assert ignoring.wait() == 0


def test_sigterm_lets_the_command_finish(broker, worker, send, queue):
    send(broker, queue, "task", "next")
    running = worker("sh", "-c", "echo begun; sleep 2; echo finished")
    running.wait_for("begun")
    running.signal(signal.SIGTERM)
    assert running.wait() == 0
    assert running.out[-3:] == ["begun", "finished", " [x] Done"]
    assert running.err == []
    assert broker.bodies(queue) == [b"next"]
