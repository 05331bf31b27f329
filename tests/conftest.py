"""The real scripts as processes, and the servers that they talk to, for every test."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pexpect
import pika
import psutil
import pytest
from servers import PATIENCE, servers, wait_until

ROOT = Path(__file__).parent.parent
WAITING = " [*] Waiting for messages. To exit press CTRL+C"
EXEC = ["-c", "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"]  # a program not in Python

os.environ.pop("PYTHONUNBUFFERED", None)  # it would hide lines that are not flushed

# Ignored, as in the background of a shell script, they would be to the scripts as well.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# Files that begin first, so that no process is left alone with one of them.
LONGEST = ["failed_tasks", "readme", "confirms", "cluster", "lost_connection", "soak", "signals"]


def copy_checkout(folder):
    """Copy this checkout as it would be cloned; return the path of the copy."""
    not_cloned = shutil.ignore_patterns(".git", ".venv", ".env", ".*_cache", "__pycache__")
    return shutil.copytree(ROOT, folder, ignore=not_cloned)


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


class Script:
    """A running new_task.py or worker.py, its output collected line by line."""

    def __init__(self, arguments, url, stdin=None, stdout=subprocess.PIPE, cwd=ROOT):
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env={**os.environ, "AMQP_URL": url},
        )
        self.out, self.err = [], []
        self.seen = {}  # the time.monotonic() at which each line came, by stream and number
        self.changed = threading.Condition()
        self.readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((self.process.stdout, self.out), (self.process.stderr, self.err))
            if stream
        ]
        for reader in self.readers:
            reader.start()

    def _read(self, stream, lines):
        for line in stream:
            with self.changed:
                self.seen[id(lines), len(lines)] = time.monotonic()
                lines.append(line.decode().removesuffix("\n"))
                self.changed.notify_all()

    def moments(self, text):
        """When the lines came, of either stream, that hold a text."""
        with self.changed:
            return sorted(
                self.seen[id(lines), number]
                for lines in (self.out, self.err)
                for number, line in enumerate(lines)
                if text in line
            )

    def wait_for(self, text, times=1, timeout=PATIENCE):
        """Wait for the nth line, of either stream, that holds a text; return when it came."""
        with self.changed:
            found = self.changed.wait_for(lambda: len(self.moments(text)) >= times, timeout)
            last = "\n".join(self.out[-20:] + self.err[-20:])
            assert found, f"no {text!r} ({times}) in {timeout} s; the last lines are:\n{last}"
            return self.moments(text)[times - 1]

    def tasks(self, word):
        """The tasks of the lines that say "Received" or "Sent", as they are shown."""
        return [line.split("'")[1] for line in self.out if word in line]

    def tracebacks(self):
        """The lines of tracebacks that are the script's own, not those of a function it calls."""
        wrong = '(new_task|worker).py", line|Exception ignored'
        if "--function" not in self.process.args:
            wrong += "|Traceback"
        return [line for line in self.err if re.search(wrong, line)]

    def wait(self, timeout=PATIENCE):
        """Wait for the end; return the exit status."""
        status = self.process.wait(timeout)
        for reader in self.readers:
            reader.join(PATIENCE)
        return status

    def end(self):
        """Kill the process, and the commands that it runs."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            process.suspend()  # so that it starts no other
            for command in process.children():
                command.kill()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(command.pid, signal.SIGKILL)  # with what it has started
            process.kill()
        self.wait()

    def signal(self, number):
        self.process.send_signal(number)


def refused(script, *words):
    """Assert that a script fails, and says why in lines that hold some words."""
    assert script.wait() == 1, script.err
    assert script.err
    assert all(line.startswith(" [!] ") for line in script.err), script.err
    for word in words:
        assert word in "\n".join(script.err)


def longest_pause(moments):
    return max(after - before for before, after in zip(moments, moments[1:]))


@pytest.fixture(scope="session")
def new_broker():
    """Start another server: new_broker("lines of rabbitmq.conf")."""
    with servers() as start:
        yield start


@pytest.fixture(scope="session")
def broker(new_broker):
    """The server of this process; a test that stops or throttles it leaves it running and well."""
    return new_broker()


@pytest.fixture(scope="session")
def vhosts(broker):
    """URLs of two virtual hosts, by the type of queue that a plain declaration makes there."""
    return {"classic": broker.url, "quorum": broker.add_quorum_vhost()}


@pytest.fixture
def moments():
    """Random numbers; SEED=... in the environment brings back those of an earlier run."""
    seed = int(os.environ.get("SEED") or random.randrange(1_000_000))
    print(f"SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def queue(request):
    """A queue name of this test's own."""
    return re.sub(r"\W+", "-", request.node.name)


@pytest.fixture
def run():
    """Start a script: run(broker, "worker.py", "-q", queue). Ends with the test."""
    scripts = []

    def start(broker, name, *arguments, url=None, **options):
        url = url or getattr(broker, "url", None) or broker
        path = name if name == "-c" else ROOT / name
        scripts.append(Script([path, *arguments], url, **options))
        return scripts[-1]

    yield start
    for script in scripts:
        script.end()
    for script in scripts:
        assert not script.tracebacks(), script.err


@pytest.fixture
def send(run):
    """Send tasks and wait for their confirmation: send(broker, queue, "one.", "two..")."""

    def start(broker, queue, *tasks):
        producer = run(broker, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
        producer.process.stdin.write("\n".join(tasks).encode())
        producer.process.stdin.close()
        assert producer.wait() == 0, producer.err

    return start


@pytest.fixture
def worker(run, broker, queue):
    """Start a worker of this test's queue that waits for tasks: worker("--retries", "0")."""

    def start(*arguments, url=None, **options):
        script = run(url or broker, "worker.py", "-q", queue, *arguments, **options)
        script.wait_for("Waiting")
        return script

    return start


@pytest.fixture
def publish(broker, queue):
    """Publish a message, confirmed, as another program would: publish(b"task", priority=3)."""
    name = queue

    def publish(body, headers=None, url=None, queue=name, **properties):
        properties = pika.BasicProperties(headers=headers, **properties)
        with broker.channel(url) as channel:
            if queue == name:
                channel.queue_declare(queue, durable=True)
            channel.confirm_delivery()
            channel.basic_publish("", queue, body, properties, mandatory=True)

    return publish


@pytest.fixture
def alarm(broker):
    """Switch the broker's disk alarm: alarm(True), alarm(False). Off at the end."""
    is_on = False

    def switch(on):
        nonlocal is_on
        is_on = on
        broker.rabbitctl_output("set_disk_free_limit", "1000000GB" if on else "1MB")
        alarms = ["eval", "rabbit_alarm:get_alarms()."]
        wait_until(lambda: ("disk" in broker.rabbitctl_output(*alarms)) == on)

    yield switch
    if is_on:
        switch(False)


@pytest.fixture
def terminal(request):
    """Run one of the scripts, or any program, in a terminal: terminal("worker.py", "-q", queue).

    Returns what pexpect.spawn() does. All that runs in it ends with the test.
    """
    terminals = []

    def spawn(name, *arguments, url=None, env=os.environ, **options):
        argv = [name, *map(str, arguments)]
        if name.endswith(".py"):
            argv = [sys.executable, str(ROOT / name), *argv[1:]]
        options = {"timeout": PATIENCE, "encoding": "utf-8", **options}
        url = request.getfixturevalue("broker").url if url is None else url
        environment = {**env, "AMQP_URL": url}
        terminals.append(pexpect.spawn(argv[0], argv[1:], env=environment, **options))
        return terminals[-1]

    yield spawn
    for each in terminals:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(each.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        each.close(force=True)
