"""The real scripts as processes, and the servers that they talk to, for every test."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from servers import MARK, PATIENCE, servers

ROOT = Path(__file__).parent.parent

for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:  # as in the background of a script
        signal.signal(number, signal.SIG_DFL)  # or the scripts would ignore it, too


class Script:
    """A running new_task.py or worker.py, its output collected line by line."""

    def __init__(self, arguments, url, stdin=None, stdout=subprocess.PIPE):
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
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
            assert found, f"no {text!r} ({times}) in {timeout} s: {self.out} {self.err}"
            return self.moments(text)[times - 1]

    def tasks(self, word):
        """The tasks of the lines that say "Received" or "Sent", as they are shown."""
        return [line.split("'")[1] for line in self.out if word in line]

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


def started_in(folder, name=""):
    """The processes of servers(), and of nothing_left(), in a folder: all, or of that name."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # others' may not be looked at
            if name in process.name() and str(folder) in process.environ().get(MARK, ""):
                found.append(process)
    return found


def longest_pause(moments):
    return max(after - before for before, after in zip(moments, moments[1:]))


@pytest.fixture(scope="session")
def new_broker():
    """Start another server: new_broker("lines of rabbitmq.conf")."""
    with servers() as start:
        yield start


@pytest.fixture(scope="session")
def broker(new_broker):
    """The server for every test that does not stop or configure it."""
    return new_broker()


@pytest.fixture(scope="session")
def fragile_broker(new_broker):
    """A server to stop, kill and throttle; each test leaves it running and well."""
    return new_broker()


@pytest.fixture(scope="session")
def vhosts(broker):
    """URLs of two virtual hosts, by the type of queue that a plain declaration makes there."""
    return {"classic": broker.url, "quorum": broker.add_quorum_vhost()}


@pytest.fixture(scope="session")
def fragile_vhosts(fragile_broker):
    """The same of the server that may be stopped."""
    return {"classic": fragile_broker.url, "quorum": fragile_broker.add_quorum_vhost()}


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
        assert not any("Traceback" in line or "Exception" in line for line in script.err), (
            script.err
        )


@pytest.fixture
def send(run):
    """Send tasks and wait for their confirmation: send(broker, queue, "one.", "two..")."""

    def start(broker, queue, *tasks):
        producer = run(broker, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
        producer.process.stdin.write("\n".join(tasks).encode())
        producer.process.stdin.close()
        assert producer.wait() == 0, producer.err

    return start
