"""`worker.py --function`: a Python function does the tasks, in a process that lasts."""

import hashlib
import signal
import sys
import time

import pytest
from commands import assert_ended, child_of, kill_child_of, pids_of
from conftest import EXEC, WAITING, refused
from servers import PATIENCE, wait_until

DO = ["--function", "tests.functions:do"]  # what the task says
ONCE = ["--retries", "0", *DO]
AT_ONCE = 1  # second
LONG = "time.sleep(60)"

FAILURES = {  # task: why it fails
    "raise ValueError('too \\x1b[31m\\udcff wide')": r"ValueError('too \x1b[31m\udcff wide')",
    "raise LookupError('x' * 10_000)": "LookupError('xxx",
    "sys.exit('no')": "SystemExit('no')",
    "raise SystemExit": "SystemExit()",
    "raise KeyboardInterrupt": "KeyboardInterrupt()",
    "raise BaseException(1)": "BaseException(1)",
    "no Python": "SyntaxError",
    "raise Silent": "Silent",
    "raise Loud": r"\x1b[31m\x1b[31m",
    "crash()": "signal 11: Segmentation fault",
    "os.abort()": "signal 6: Aborted",
    "os._exit(3)": "exit status 3",
    "os._exit(0)": "without an answer",
    "os.closerange(3, 99); time.sleep(60)": "signal 15",  # it could not answer any more
    "raise Mute": "Mute",
    "raise Angry": "Angry",
    "raise set('of a name that others have')": "set(",
    "raise type('', (Exception,), {'__repr__': lambda self: ''})": "an exception",
    "raise ValueError('x' * 10_000_000)": "ValueError('xxx",
    "raise SyntaxError('odd', (1, 2, 3, 4))": "SyntaxError",
    "sys.stderr.close(); raise ValueError('unheard')": "ValueError('unheard')",
    "sys.stderr = None; raise ValueError('nor this')": "ValueError('nor this')",
    "fork_one_that_holds_the_pipe()": "exit status 7",
}


@pytest.fixture
def job(tmp_path):
    """Write a module with the function do() for a worker that is started in its folder."""

    def write(text):
        (tmp_path / "job.py").write_text(text)
        return tmp_path

    return write


def reasons(broker, queue, number):
    """Wait for so many dead letters; return why each of these tasks failed."""
    wait_until(lambda: broker.ready(f"{queue}.dlq") == number)
    with broker.channel() as channel:
        got = [channel.basic_get(f"{queue}.dlq", auto_ack=True) for _ in range(number)]
    return {body.decode(): properties.headers["x-last-error"] for _, properties, body in got}


# ---- A call ----


def test_one_process_does_every_task_and_what_it_prints_comes_before_done(worker, publish):
    publish(b"print(os.getpid())")
    publish(b"print(len(calls), calls[0], end='')  # not flushed")
    calling = worker(*DO)
    calling.wait_for("Done", times=2)
    process = child_of(calling)
    publish(b"print(os.getpid())")
    calling.wait_for("Done", times=3)
    assert [line for line in calling.out if "Received" not in line] == [
        WAITING,
        str(process.pid),
        " [x] Done",
        "2 b'print(os.getpid())' [x] Done",
        str(process.pid),
        " [x] Done",
    ]
    calling.signal(signal.SIGTERM)
    assert calling.wait() == 0
    assert_ended([process.pid])
    assert calling.err == []


def test_a_process_ends_with_its_worker_and_takes_along_what_it_has_started(worker, publish):
    publish(b"print('pids', os.getpid(), subprocess.Popen(['sleep', '60']).pid)")
    calling = worker(*DO)
    calling.wait_for("Done")
    calling.signal(signal.SIGTERM)
    assert calling.process.wait(PATIENCE) == 0
    assert_ended(pids_of(calling))


def test_any_body_arrives_as_it_is(worker, publish, job):
    bodies = [b"", bytes(range(256)), b"x" * 10_000_000]
    for body in bodies:
        publish(body)
    hashing = "import hashlib\ndef do(body):\n    print(type(body), hashlib.md5(body).hexdigest())"
    calling = worker("--function", "job:do", cwd=job(hashing))
    calling.wait_for("Done", times=len(bodies))
    assert calling.out[2::3] == [
        f"<class 'bytes'> {hashlib.md5(body).hexdigest()}" for body in bodies
    ]


def test_the_current_folder_comes_first_and_a_method_can_be_called(worker, publish, job):
    folder = job("import antigravity\nclass Job:\n    do = staticmethod(antigravity.do)")
    (folder / "antigravity.py").write_text("def do(body):\n    print('ours')")
    publish(b"task")
    calling = worker("--function", "job:Job.do", cwd=folder)
    calling.wait_for("Done")
    assert calling.out[2] == "ours"


def test_whatever_a_call_raises_or_does_to_its_process_fails_the_task(
    broker, worker, publish, queue
):
    for task in FAILURES:
        publish(task.encode())
        publish(b"print('next')")
    calling = worker(*ONCE)
    calling.wait_for("Done", times=len(FAILURES))
    failed = reasons(broker, queue, len(FAILURES))
    for task, why in FAILURES.items():
        assert why in failed[task], task
        assert failed[task].isprintable()
        assert len(failed[task]) <= 300
        (line,) = (line for line in calling.out if f"Failed: {failed[task]}; moved" in line)
        assert line.isprintable()
    errors = "\n".join(calling.err)
    assert "Traceback" in errors
    assert "in do" in errors
    assert "\x1b" not in errors
    assert r"ValueError: too \x1b[31m\udcff wide" in errors
    assert calling.out.count(" [x] Done") == len(FAILURES)
    assert calling.process.poll() is None


LAZY = """
import asyncio, functools, sys

def wrapped(function):
    return functools.wraps(function)(lambda *args: function(*args))

async def work(body):
    await asyncio.sleep(0.01)
    print("worked on", body.decode())
    if body == b"bad":
        raise ValueError("after a while")

def lazy(body):
    print("never")
    yield

async def lazy_and_async(body):
    print("never")
    yield

class Callable:
    async def __call__(self, body):
        await work(body)

class Generator:
    __call__ = staticmethod(lazy)

decorated, cached, called = wrapped(work), functools.lru_cache(work), Callable()
decorated_lazy, generator = wrapped(lazy), Generator()
"""


@pytest.mark.parametrize("name", ["work", "decorated", "cached", "called"])
def test_an_async_function_is_run_however_it_is_wrapped(broker, worker, send, queue, job, name):
    send(broker, queue, "good", "bad")
    calling = worker("--retries", "0", "--function", f"job:{name}", cwd=job(LAZY))
    calling.wait_for("ValueError('after a while'); moved")
    assert calling.out[2:4] == ["worked on good", " [x] Done"]
    assert calling.out.count(" [x] Done") == 1
    assert "worked on bad" in calling.out


@pytest.mark.parametrize("name", ["lazy", "lazy_and_async", "decorated_lazy", "generator"])
def test_a_generator_is_a_failure_as_nothing_of_it_has_run(broker, worker, send, queue, job, name):
    send(broker, queue, "task")
    calling = worker("--retries", "0", "--function", f"job:{name}", cwd=job(LAZY))
    calling.wait_for("generator")
    calling.wait_for("moved")
    assert not {" [x] Done", "never"} & {*calling.out}


@pytest.mark.parametrize(
    "task",
    [
        "sys.stdout.close()",
        "sys.stderr.close()",
        "sys.stdout = sys.stderr = None",
        "with open('/dev/null', 'w') as sys.stdout: print('lost')",
        "with open('/dev/full', 'w') as sys.stdout, open('/dev/null', 'w') as sys.stderr: pass",
    ],
)
def test_what_a_function_does_to_its_streams_harms_no_task(broker, worker, publish, queue, task):
    publish(task.encode())
    publish(b"len(calls)")
    publish(task.encode())
    calling = worker(*ONCE)
    calling.wait_for("Done", times=3)
    assert not any("Failed" in line for line in calling.out)


def test_an_exception_between_two_tasks_ends_the_process_and_blames_no_task(
    worker, publish, broker, queue
):
    # Given a process that has started another one, and whose handler of a signal raises.
    publish(
        b"import signal; signal.signal(signal.SIGUSR1, lambda *_: sys.exit('in between'))\n"
        b"print('pids', os.getpid(), subprocess.Popen(['sleep', '60']).pid)"
    )
    calling = worker(*ONCE)
    calling.wait_for("Done")
    pids = pids_of(calling)
    child_of(calling).send_signal(signal.SIGUSR1)
    assert_ended(pids)
    publish(b"print('next')")
    calling.wait_for("Done", times=2)
    assert calling.out[-2:] == ["next", " [x] Done"]
    assert broker.ready(f"{queue}.dlq") is None


def test_only_the_original_of_a_function_that_forks_answers(broker, worker, publish, queue):
    publish(b"if os.fork() == 0: raise ValueError('of the copy')")
    publish(b"os.fork() or time.sleep(0.5)")
    publish(b"time.sleep(1)  # the copies have ended")
    publish(b"raise ValueError('of this task')")
    calling = worker(*ONCE)
    calling.wait_for("Failed")
    assert reasons(broker, queue, 1) == {
        "raise ValueError('of this task')": "ValueError('of this task')"
    }
    assert calling.out.count(" [x] Done") == 3
    # The third answer is not that of a copy, which comes after half a second.
    assert calling.moments("Done")[2] - calling.moments("Received")[2] > 0.8


def test_a_call_past_the_time_limit_is_killed_with_all_that_it_has_started(worker, publish):
    publish(b"stubborn()")
    calling = worker("--time-limit", "1", *ONCE)
    failed = calling.wait_for("Failed: exceeded the time limit of 1 s")
    assert failed - calling.wait_for("Received") < 1 + 2 * AT_ONCE
    assert_ended(pids_of(calling))
    publish(b"print('next')")
    calling.wait_for("Done")


def test_starting_and_importing_take_nothing_of_the_time_limit(worker, publish, job):
    folder = job("import os, time\ntime.sleep(3)\ndo = exec")
    publish(b"import os; os._exit(1)")
    publish(b"print('next')")
    limits = ["--time-limit", "1", "--retries", "0", "--function", "job:do"]
    calling = worker(*limits, cwd=folder)
    calling.wait_for("exit status 1")
    calling.wait_for("Done")
    assert not any("time limit" in line for line in calling.out)


def test_a_process_that_was_killed_between_two_tasks_is_replaced(worker, publish):
    publish(b"print('pids', os.getpid(), subprocess.Popen(['sleep', '60']).pid)")
    calling = worker(*DO)
    calling.wait_for("Done")
    first = kill_child_of(calling)
    publish(b"print('two')")
    calling.wait_for("Done", times=2)
    assert child_of(calling) != first
    assert_ended(pids_of(calling))  # with what it had started
    assert calling.err == []
    assert not any("Failed" in line for line in calling.out)


def test_a_process_that_cannot_be_replaced_leaves_the_task_in_hand(broker, worker, job, queue):
    folder = job("do = exec")
    calling = worker("--function", "job:do", cwd=folder)
    job("import no_such_module")
    kill_child_of(calling)
    with broker.channel() as channel:
        channel.basic_publish("", queue, b"print('done')")
    calling.wait_for("trying again in 3 s")
    line = calling.err[0]
    assert "Can't call job:do" in line
    assert "No module named 'no_such_module'" in line
    assert broker.ready(queue) == 0
    calling.signal(signal.SIGTERM)
    assert calling.wait() == 0
    wait_until(lambda: broker.ready(queue) == 1)
    assert not any("Failed" in line for line in calling.out)


def test_a_task_in_hand_is_done_when_its_function_can_be_imported_again(
    broker, worker, job, publish
):
    folder = job("do = exec")
    calling = worker("--retries", "0", "--function", "job:do", cwd=folder)
    job("raise ValueError(10_000_000 * 'x')")
    kill_child_of(calling)
    publish(b"print('done')")
    calling.wait_for("trying again in 3 s", times=3)
    assert all("Can't call job:do: ValueError('xxx" in line for line in calling.err)
    job("do = exec  # mended")
    calling.wait_for("Done")
    assert calling.out[2:] == ["done", " [x] Done"]


def test_a_function_that_cannot_be_called_is_refused_at_the_start(run, broker, queue, job):
    folder = job("value = 1\nclass Odd(Exception):\n def __str__(self): 1 / 0\n __repr__ = __str__")
    (folder / "leaving.py").write_text("import sys; sys.exit()")
    (folder / "crashing.py").write_text("import os; os._exit(0)")
    (folder / "odd.py").write_text("import job; raise job.Odd")
    (folder / "broken.py").write_text("import job, no_such_module")
    names = {
        "no_such:do": "no_such",
        "job:no_such": "no_such",
        "job": "job",
        "job:value": "value",
        "odd:do": "Odd",
        "job:": "",
        "a b": "",
        "leaving:do": "SystemExit",
        "crashing:do": "without an answer",
        "broken:do": "no_such_module",
    }
    workers = {
        name: run(broker, "worker.py", "-q", queue, "--function", name, cwd=folder)
        for name in names
    }
    for name, each in workers.items():
        refused(each, name, names[name])
        assert len(each.err) == 1
        assert each.out == []
    both = run(broker, "worker.py", *DO, "cat")
    assert both.wait() == 2
    assert "--function" in both.err[-1]


def test_lost_streams_harm_no_call(broker, run, queue):
    # What a function prints must not get into a socket or pipe that has a stream's number.
    command = f"exec {sys.executable} worker.py --function tests.functions:do -q"
    tasks = [b"print('x' * 100_000); os.system('echo y >&2')", b"os._exit(0)", b"print('z')"]
    for number, redirection in enumerate(["2>&-", "<&- 2>&-", "2>/dev/full", ">/dev/full"]):
        name = f"{queue}-{number}"
        with broker.channel() as channel:
            channel.queue_declare(name, durable=True)
            for task in tasks:
                channel.basic_publish("", name, task)
        calling = run(broker, *EXEC, "sh", "-c", f"{command} {name} --retries 0 {redirection}")
        if redirection == ">/dev/full":
            refused(calling, "standard output")
            wait_until(lambda name=name: broker.ready(name) == len(tasks))
        else:
            calling.wait_for("moved to")
            calling.wait_for("Done", times=2)
            calling.signal(signal.SIGTERM)
            assert calling.wait() == 0
            assert broker.ready(name) == 0
            assert calling.err == []


# ---- Signals, and the connection ----


def test_ctrl_c_kills_the_call_and_sigterm_lets_it_finish(broker, worker, send, queue):
    calls = {}
    for name, task in (
        ("int", "stubborn()"),
        ("term", "print('begun', flush=True); time.sleep(2)"),
    ):
        send(broker, f"{queue}-{name}", task, "print('next')")
        calls[name] = worker("-q", f"{queue}-{name}", *DO)
    pids = pids_of(calls["int"])
    calls["term"].wait_for("begun")
    begin = time.monotonic()
    calls["int"].signal(signal.SIGINT)
    assert calls["int"].wait() == 130
    assert time.monotonic() - begin < 2 * AT_ONCE
    assert_ended(pids)
    calls["term"].signal(signal.SIGTERM)
    assert calls["term"].wait() == 0
    assert calls["term"].out[-2:] == ["begun", " [x] Done"]
    assert calls["int"].err + calls["term"].err == []
    wait_until(lambda: broker.ready(f"{queue}-int") == 2)
    assert broker.ready(f"{queue}-term") == 1


@pytest.mark.parametrize(("second", "status"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_second_signal_kills_the_call(broker, worker, send, queue, second, status):
    send(broker, queue, "stubborn()")
    calling = worker(*DO)
    pids = pids_of(calling)
    calling.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert calling.process.poll() is None
    begin = time.monotonic()
    calling.signal(signal.Signals[second])
    assert calling.wait() == status
    assert time.monotonic() - begin < 2 * AT_ONCE
    assert_ended(pids)
    wait_until(lambda: broker.ready(queue) == 1)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_worker_whose_function_does_not_take_its_task(
    broker, worker, publish, second
):
    calling = worker(*DO)
    process = child_of(calling)
    process.suspend()
    publish(b"#" + b"x" * 5_000_000)
    calling.wait_for("Received")
    calling.signal(signal.SIGTERM)
    time.sleep(0.3)
    assert calling.process.poll() is None
    calling.signal(second)
    assert calling.wait(5) == (0 if second == signal.SIGTERM else 130)
    assert_ended([process.pid])


def test_after_sigkill_of_its_worker_a_call_goes_on_and_then_its_process_ends(
    broker, worker, send, queue, tmp_path
):
    send(broker, queue, f"time.sleep(3); open('{tmp_path}/done', 'a').write('x')")
    calling = worker(*DO)
    calling.wait_for("Received")
    process = child_of(calling)
    other = worker(*DO)
    begin = time.monotonic()
    calling.signal(signal.SIGKILL)
    assert other.wait_for("redelivered") - begin < AT_ONCE
    calling.process.wait()
    wait_until((tmp_path / "done").exists)
    assert_ended([process.pid])
    other.wait_for("Done")


def test_a_lost_connection_or_queue_kills_the_call(broker, vhosts, worker, send, queue):
    started = {}
    for kind, url in vhosts.items():
        started[kind] = worker("-q", f"{queue}-{kind}", *DO, url=url)
        send(url, f"{queue}-{kind}", "stubborn()")
    pids = {kind: pids_of(each) for kind, each in started.items()}
    with broker.channel(vhosts["quorum"]) as channel:
        channel.queue_delete(f"{queue}-quorum")
    started["quorum"].wait_for("queue was deleted")
    assert_ended(pids["quorum"])
    broker.rabbitctl_output("close_all_connections", "maintenance")
    started["classic"].wait_for("maintenance")
    assert_ended(pids["classic"])
    started["classic"].wait_for("redelivered")
    for each in started.values():
        assert not any("Done" in line or "Failed" in line for line in each.out)
        assert not any("never mind" in line for line in each.out)
