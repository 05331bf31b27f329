"""`worker.py COMMAND`: real work, a process for every task, which ends with its worker."""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pexpect
import psutil
import pytest
from conftest import ROOT, Script
from servers import PATIENCE, wait_until

WAITING = " [*] Waiting for messages. To exit press CTRL+C"
GRACE = 5  # seconds between "please" and SIGKILL
RANDOM = random.Random(1)

EXEC = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"  # for programs not in Python

# Two processes that tell their ids; the first says so when it is asked to end.
POLITE = "trap 'echo asked; exit' TERM; sleep 60 & echo pids $$ $!; wait"
# Two processes that don't listen.
STUBBORN = "trap '' TERM; sleep 60 & echo pids $$ $!; wait"


@pytest.fixture
def publish(broker, queue):
    """Publish a body, whatever is in it."""

    def publish(body):
        with broker.channel() as channel:
            channel.queue_declare(queue, durable=True)
            channel.basic_publish("", queue, body)

    return publish


def running(worker):
    """Return the processes of a command, once it has told its ids."""
    worker.wait_for("pids ")
    (line,) = (line for line in worker.out if line.startswith("pids "))
    return [psutil.Process(int(pid)) for pid in line.split()[1:]]


def wait_until_none_is_left(processes):
    def alive(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.status() != psutil.STATUS_ZOMBIE  # an orphan that nobody waits for

    # At once, but for the turn on the processor that a killed process needs to end.
    wait_until(lambda: not any(map(alive, processes)), timeout=GRACE / 2)


@pytest.mark.parametrize(
    "body", [b"", b"\x00", b"two\nlines", b"\xff\xfe", RANDOM.randbytes(1_000_000)], ids=len
)
def test_the_command_gets_the_exact_body_on_standard_input(run, broker, queue, publish, body):
    publish(body)
    worker = run(broker, "worker.py", "-q", queue, "md5sum")
    worker.wait_for("Done")
    assert worker.out[2] == f"{hashlib.md5(body).hexdigest()}  -"


def test_the_commands_output_passes_through_in_order(run, broker, queue, send):
    send(broker, queue, "First message.", "Second message..")
    worker = run(broker, "worker.py", "-q", queue, "sh", "-c", "wc -c; echo to stderr >&2")
    worker.wait_for("Done", times=2)
    worker.wait_for("to stderr", times=2)
    assert worker.out == [
        WAITING,
        " [x] Received 'First message.'",
        "14",
        " [x] Done",
        " [x] Received 'Second message..'",
        "16",
        " [x] Done",
    ]
    assert worker.err == ["to stderr"] * 2


@pytest.mark.parametrize(
    ("script", "reason"),
    [("exit 3", "exit status 3"), ("kill -9 $$", "signal 9: Killed"), ("kill -34 $$", "signal 34")],
)
def test_a_command_that_does_not_exit_with_0_has_failed(run, broker, queue, send, script, reason):
    send(broker, queue, "task")
    worker = run(broker, "worker.py", "-q", queue, "sh", "-c", script)
    worker.wait_for(f" [!] Failed: {reason}")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert broker.ready(f"{queue}.retry") == 1
    assert worker.out.count(" [x] Done") == 0


def test_a_command_that_does_not_read_its_input_is_no_failure(run, broker, queue, publish):
    publish(b"x" * 1_000_000)
    run(broker, "worker.py", "-q", queue, "true").wait_for("Done")


def test_a_command_may_have_options_of_its_own(run, broker, queue, send):
    send(broker, queue, "task")
    worker = run(broker, "worker.py", "-q", queue, "--", "echo", "-q", "--help", "-")
    worker.wait_for("Done")
    assert worker.out[2] == "-q --help -"


@pytest.mark.parametrize(
    "command", ["no-such-command", "/no-such-file", str(ROOT / "README.md"), str(ROOT)]
)
def test_a_command_that_cannot_be_run_is_refused_at_the_start(run, broker, queue, send, command):
    send(broker, queue, "task")
    worker = run(broker, "worker.py", "-q", queue, command)
    assert worker.wait() == 1
    (line,) = worker.err
    assert command in line
    assert worker.out == []
    with broker.channel() as channel:
        method, _, body = channel.basic_get(queue)
        assert body == b"task"
        assert not method.redelivered


def test_a_command_that_can_no_longer_be_run_does_not_fail_its_task(
    run, broker, queue, send, tmp_path
):
    command = tmp_path / "command"
    command.write_text("no first line that names an interpreter")
    command.chmod(0o755)
    send(broker, queue, "task")
    worker = run(broker, "worker.py", "-q", queue, command)
    worker.wait_for("#!/bin/sh")
    assert worker.err[0].endswith("trying again in 30 s")
    assert broker.ready(queue) == 0  # for it stays in hand
    command.write_text("#!/bin/sh\necho mended")
    worker.wait_for("mended")
    worker.wait_for("Done")
    assert worker.out.count(" [x] Received 'task'") == 1
    assert len(worker.err) == 1


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 0)])
def test_a_signal_ends_a_worker_whose_command_can_no_longer_be_run(
    run, broker, queue, send, tmp_path, number, status
):
    command = tmp_path / "command"
    command.write_text("no first line that names an interpreter")
    command.chmod(0o755)
    send(broker, queue, "task", "next")
    worker = run(broker, "worker.py", "-q", queue, "--prefetch-count", "2", command)
    worker.wait_for("trying again in 30 s")
    worker.signal(signal.Signals[number])
    assert worker.wait(timeout=15) == status
    wait_until(lambda: broker.ready(queue) == 2)


def test_nothing_of_a_task_reaches_a_shell_the_arguments_or_the_environment(
    run, broker, queue, publish, tmp_path
):
    publish(
        f"'; touch {tmp_path}/proof; $(touch {tmp_path}/proof) `touch {tmp_path}/proof`".encode()
    )
    look = "tr '\\0' '\\n' < /proc/$PPID/cmdline; tr '\\0' '\\n' < /proc/$$/cmdline; env"
    worker = run(broker, "worker.py", "-q", queue, "sh", "-c", look)
    worker.wait_for("Done")
    assert not any("proof" in line for line in worker.out[2:])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [POLITE, STUBBORN])
def test_the_time_limit_ends_the_commands_whole_process_group(run, broker, queue, send, command):
    send(broker, queue, "task", "next")
    url = broker.url_of(query="?heartbeat=1")
    worker = run(url, "worker.py", "-q", queue, "--time-limit", "1", "sh", "-c", command)
    processes = running(worker)
    received = worker.wait_for("Received")
    failed = worker.wait_for("Failed: time limit of 1 s")
    wait_until_none_is_left(processes)
    if command == POLITE:
        assert "asked" in worker.out
        assert failed - received < 1 + GRACE / 2
    else:
        assert GRACE < failed - received < 1 + 2 * GRACE
    worker.wait_for("Received 'next'")
    assert worker.err == []  # no connection was lost meanwhile


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
@pytest.mark.parametrize("command", [POLITE, STUBBORN])
def test_ctrl_c_ends_the_commands_whole_process_group(run, broker, queue, send, command, number):
    send(broker, queue, "task")
    worker = run(broker, "worker.py", "-q", queue, "sh", "-c", command)
    processes = running(worker)
    worker.signal(number)
    assert worker.wait() == 130
    wait_until_none_is_left(processes)
    assert ("asked" in worker.out) == (command == POLITE)
    assert worker.err == []
    assert broker.bodies(queue) == [b"task"]


def test_whenever_ctrl_c_comes_no_command_is_left_running(run, broker, queue, send):
    send(broker, queue, "task")
    moments = random.Random(1)
    command = ["sleep", str(10_000 + os.getpid())]  # no other run's
    for _ in range(20):
        worker = run(broker, "worker.py", "-q", queue, *command)
        worker.wait_for("Received")
        time.sleep(moments.uniform(0, 0.003))  # about as long as the start of a process takes
        worker.signal(signal.SIGINT)
        assert worker.process.wait(PATIENCE) == 130
        assert not [
            each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == command
        ]


def test_a_worker_that_was_started_to_ignore_ctrl_c_does_so(run, broker, queue, send):
    send(broker, queue, "task")
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which its processes inherit
    try:
        worker = run(broker, "worker.py", "-q", queue, "sh", "-c", "echo begun; sleep 1")
    finally:
        signal.signal(signal.SIGINT, handler)
    worker.wait_for("begun")
    worker.signal(signal.SIGINT)
    worker.wait_for("Done")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0


def test_ctrl_c_twice_does_not_wait_for_a_command(run, broker, queue, send):
    send(broker, queue, "task")
    worker = run(broker, "worker.py", "-q", queue, "sh", "-c", STUBBORN)
    processes = running(worker)
    worker.signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):  # for it waits for the command
        worker.process.wait(0.5)
    worker.signal(signal.SIGINT)
    worker.process.wait(GRACE / 2)
    assert worker.wait() == 130
    wait_until_none_is_left(processes)
    assert worker.err == []


def test_ctrl_c_in_a_terminal_reaches_the_command_through_its_worker(broker, queue, send):
    terminal = pexpect.spawn(
        sys.executable,
        [str(ROOT / "worker.py"), "-q", queue, "sh", "-c", POLITE],
        env={**os.environ, "AMQP_URL": broker.url},
        timeout=PATIENCE,
    )
    with terminal:
        send(broker, queue, "task....")
        terminal.expect(r"'task\.\.\.\.'\r\npids (\d+) (\d+)\r\n")
        processes = [psutil.Process(int(pid)) for pid in terminal.match.groups()]
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
        assert terminal.before == b"^Casked\r\n"
    assert terminal.exitstatus == 130
    wait_until_none_is_left(processes)
    assert broker.bodies(queue) == [b"task...."]


@pytest.mark.parametrize("command", [POLITE, STUBBORN])
def test_a_closed_terminal_ends_the_command(broker, queue, send, command):
    terminal = pexpect.spawn(
        sys.executable,
        [str(ROOT / "worker.py"), "-q", queue, "sh", "-c", command],
        env={**os.environ, "AMQP_URL": broker.url},
        timeout=PATIENCE,
    )
    send(broker, queue, "task")
    terminal.expect(r"pids (\d+) (\d+)\r\n")
    processes = [psutil.Process(int(pid)) for pid in terminal.match.groups()]
    terminal.kill(signal.SIGHUP)  # from its shell; and from the system:
    terminal.ptyproc.fileobj.close()
    assert terminal.wait() == 130
    wait_until_none_is_left(processes)
    assert broker.bodies(queue) == [b"task"]


def test_a_closed_terminal_is_nothing_to_a_worker_under_nohup(run, broker, queue, send):
    send(broker, queue, "task")
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which its processes inherit
    try:
        worker = run(broker, "worker.py", "-q", queue, "sh", "-c", "echo begun; sleep 1")
    finally:
        signal.signal(signal.SIGHUP, handler)
    worker.wait_for("begun")
    worker.signal(signal.SIGHUP)
    worker.wait_for("Done")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0


def test_sigterm_lets_the_command_finish(run, broker, queue, send):
    send(broker, queue, "task", "next")
    worker = run(broker, "worker.py", "-q", queue, "sh", "-c", "echo begun; sleep 2; echo finished")
    worker.wait_for("begun")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.out[-3:] == ["begun", "finished", " [x] Done"]
    assert worker.err == []
    assert broker.bodies(queue) == [b"next"]


def test_a_command_that_runs_for_20_heartbeats_is_done_once(run, broker, queue, send):
    send(broker, queue, "task")
    worker = run(broker.url_of(query="?heartbeat=1"), "worker.py", "-q", queue, "sleep", "20")
    worker.wait_for("Done")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.out == [WAITING, " [x] Received 'task'", " [x] Done"]
    assert worker.err == []
    assert broker.bodies(queue) == []


@pytest.mark.parametrize("command", [POLITE, STUBBORN])
def test_a_lost_connection_ends_the_command_before_the_worker_connects_again(
    run, fragile_broker, queue, send, command
):
    send(fragile_broker, queue, "task")
    worker = run(fragile_broker, "worker.py", "-q", queue, "sh", "-c", command)
    processes = running(worker)
    fragile_broker.rabbitctl_output("close_all_connections", "maintenance")
    worker.wait_for("maintenance; trying again")
    wait_until_none_is_left(processes)
    worker.wait_for("Received 'task' (redelivered)")


def test_a_command_costs_no_more_than_5_ms_over_its_start(run, broker, queue, send):
    tasks = 200
    started = []
    for _ in range(tasks):
        begin = time.perf_counter()
        subprocess.run(["true"], check=True)
        started.append(time.perf_counter() - begin)
    send(broker, queue, *["task"] * tasks)
    worker = run(broker, "worker.py", "-q", queue, "true")
    worker.wait_for("Done", times=tasks)
    done = [worker.seen[id(worker.out), line] for line in range(2, 2 * tasks + 1, 2)]
    took = [after - before for before, after in zip(done, done[1:])]
    # What else the machine does makes most of them longer, but not the quickest twentieth.
    quickly = [statistics.quantiles(times, n=20)[0] for times in (took, started)]
    assert quickly[0] - quickly[1] < 0.005


def test_a_command_that_ends_just_in_time_is_done(run, broker, queue, send):
    # As long as the steps in which the worker looks are, just before the limit.
    send(broker, queue, "task")
    command = ["sh", "-c", "sleep 1.95; echo finished"]
    worker = run(broker, "worker.py", "-q", queue, "--time-limit", "2", *command)
    worker.wait_for("finished")
    worker.wait_for("Done")
    assert not any("Failed" in line for line in worker.out)


def test_a_command_fails_also_where_child_processes_are_ignored(run, broker, queue, send):
    send(broker, queue, "task")
    handler = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # which its processes inherit
    try:
        worker = run(broker, "worker.py", "-q", queue, "false")
    finally:
        signal.signal(signal.SIGCHLD, handler)
    worker.wait_for("Failed: exit status 1")


def test_a_command_finds_the_brokers_url_in_its_environment(run, broker, queue, send):
    send(broker, queue, "task")
    worker = run(broker, "worker.py", "-q", queue, "sh", "-c", "echo $AMQP_URL")
    worker.wait_for("Done")
    assert worker.out[2] == broker.url


def test_a_command_can_send_tasks_itself(run, broker, queue, send):
    send(broker, queue, "first", "second")
    command = [sys.executable, ROOT / "new_task.py", "-q", f"{queue}-next", "-"]
    worker = run(broker, "worker.py", "-q", queue, *command)
    worker.wait_for("Done", times=2)
    assert broker.bodies(f"{queue}-next") == [b"first", b"second"]


def test_without_room_for_the_tasks_file_the_task_stays_in_hand(run, broker, queue, publish):
    publish(b"x" * 100_000)
    limited = ["sh", "-c", 'ulimit -f 10; exec "$@"', "sh", sys.executable, ROOT / "worker.py"]
    worker = Script(["-c", EXEC, *limited, "-q", queue, "wc", "-c"], broker.url)
    try:
        worker.wait_for("trying again in 30 s")
        assert "Can't run wc" in worker.err[0]
        assert broker.ready(queue) == 0
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert broker.ready(queue) == 1
    finally:
        worker.end()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a worker process 1")
def test_a_worker_that_is_process_1_ends_a_command_as_fast(broker, queue, send):
    as_process_1 = ["unshare", "--pid", "--fork", "--kill-child", sys.executable]
    options = ["-q", queue, "--time-limit", "1", "--", "sh", "-c", "sleep 60 & wait"]
    worker = Script(["-c", EXEC, *as_process_1, ROOT / "worker.py", *options], broker.url)
    try:
        send(broker, queue, "task")
        received = worker.wait_for("Received")
        assert worker.wait_for("Failed: time limit of 1 s") - received < 1 + GRACE / 2
    finally:
        worker.end()


NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def nobody_can_run_python():
    return os.getuid() == 0 and not subprocess.call(
        [*NOBODY, sys.executable, "-c", ""], stderr=subprocess.DEVNULL
    )


@pytest.mark.skipif(not nobody_can_run_python(), reason="needs root, and others' use of its Python")
class TestAnotherUsersCommand:
    """As of sudo: here the worker is nobody's, and its command becomes root's."""

    @pytest.fixture
    def start(self, broker, queue, send):
        started = []
        folder = Path(tempfile.mkdtemp())  # pytest's own are closed to others
        folder.chmod(0o755)

        def start(*options, script="echo pids $$; exec sleep 30"):
            as_root = shutil.copy(shutil.which("setpriv"), folder)
            os.chmod(as_root, 0o4755)
            command = [as_root, "--reuid=0", "--regid=0", "--clear-groups", "sh", "-c", script]
            shutil.copy(ROOT / "worker.py", folder)
            worker = [sys.executable, folder / "worker.py", "-q", queue, *options]
            send(broker, queue, "task", "next")
            started.append(Script(["-c", EXEC, *NOBODY, *worker, "--", *command], broker.url))
            return started[-1]

        yield start
        for script in started:
            script.end()
        shutil.rmtree(folder)

    def test_at_its_time_limit_the_worker_says_that_it_cannot_end_it_and_waits(self, start):
        worker = start("--time-limit", "1", script="echo pids $$; exec sleep 9")
        (process,) = running(worker)
        worker.wait_for("another user's", timeout=15)
        assert process.is_running()
        worker.wait_for("Failed: time limit of 1 s")
        assert not process.is_running()
        worker.wait_for("Received 'next'")
        assert len([line for line in worker.err if "another user's" in line]) == 1

    def test_ctrl_c_ends_the_worker_and_says_what_is_left(self, start):
        worker = start()
        (process,) = running(worker)
        worker.signal(signal.SIGINT)
        assert worker.process.wait(timeout=15) == 130
        worker.wait_for("another user's")
        (line,) = worker.err
        assert "another user's" in line
        assert str(process.pid) in line
        process.kill()
