"""Real RabbitMQ servers, and the real scripts as processes, for every test.

Nothing here touches a broker that was running before: servers, their data, their ports and
their port mapper (epmd) are the tests' own, and are gone at the end.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pika
import port_for
import psutil
import pytest
from pytest_rabbitmq.factories.executor import RabbitMqExecutor

ROOT = Path(__file__).parent.parent
PROGRAMS = Path("/usr/lib/rabbitmq/bin")  # of Debian's package; those on PATH insist on being root
PATIENCE = 60  # seconds after which an event that has not come fails its test


class Broker(RabbitMqExecutor):
    """A RabbitMQ server of the tests' own; stop(), kill() and start() keep its data."""

    def __init__(self, folder, epmd_port, config=""):
        self.folder = folder
        self.epmd_port = epmd_port
        (folder / "rabbitmq.conf").write_text(config)
        (folder / "plugins").write_text("[].")
        port = port_for.select_random()
        super().__init__(
            str(PROGRAMS / "rabbitmq-server"),
            host="127.0.0.1",
            port=port,
            distribution_port=port_for.select_random(exclude_ports=[port]),
            rabbit_ctl=str(PROGRAMS / "rabbitmqctl"),
            logpath=folder / "log",
            path=folder,
            plugin_path=folder,
            node_name=f"test-{port}@localhost",
        )
        self.url = self.url_of()

    @property
    def envvars(self):
        return {
            **super().envvars,
            "HOME": str(self.folder.parent),  # of the cookie that lets rabbitmqctl in
            "ERL_EPMD_PORT": str(self.epmd_port),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def kill(self, *arguments, **options):
        # It waits for the shell that started the server; a port that is still open would let
        # a script in once more.
        super().kill(*arguments, **options)
        wait_until(lambda: not self.pre_start_check())
        return self

    def add_quorum_vhost(self):
        """Add a virtual host, in which a plain declaration makes a quorum queue; return its URL."""
        self.rabbitctl_output("add_vhost", "q", "--default-queue-type", "quorum")
        self.rabbitctl_output("set_permissions", "-p", "q", "guest", ".*", ".*", ".*")
        return self.url_of(vhost="q")

    def version(self):
        """The server's version, as (major, minor)."""
        return tuple(map(int, self.rabbitctl_output("-q", "version").split(".")[:2]))

    def settle(self):
        """Wait until a queue that was declared is safe from SIGKILL.

        RabbitMQ 3.10.8, killed 1.2 to 1.9 s after it was declared, came back without it, and
        without its confirmed messages, in 4 of 86 tries; after 2 s and more in none of 59.
        """
        time.sleep(4)

    def url_of(self, login="guest:guest", vhost="%2F", query=""):
        return f"amqp://{login}@127.0.0.1:{self.port}/{vhost}{query}"

    @contextlib.contextmanager
    def channel(self, url=None):
        """A plain pika channel, for what a test does beside the scripts."""
        with pika.BlockingConnection(pika.URLParameters(url or self.url)) as connection:
            yield connection.channel()

    def ready(self, queue, url=None):
        """The number of messages in a queue that no consumer holds; None if it isn't there."""
        with self.channel(url) as channel:
            try:
                return channel.queue_declare(queue, passive=True).method.message_count
            except pika.exceptions.ChannelClosedByBroker as error:
                assert error.reply_code == 404, error  # noqa: PT017 - this is no test
                return None

    def bodies(self, queue, url=None):
        """Take every ready message out of a queue, and return what they say."""
        with self.channel(url) as channel:
            got = iter(lambda: channel.basic_get(queue, auto_ack=True)[2], None)
            return list(got)


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

    def wait_for(self, text, times=1, timeout=PATIENCE):
        """Wait for the nth line, of either stream, that holds a text; return when it came."""

        def moments():
            return sorted(
                self.seen[id(lines), number]
                for lines in (self.out, self.err)
                for number, line in enumerate(lines)
                if text in line
            )

        with self.changed:
            found = self.changed.wait_for(lambda: len(moments()) >= times, timeout)
            assert found, f"no {text!r} ({times}) in {timeout} s: {self.out} {self.err}"
            return moments()[times - 1]

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


@contextlib.contextmanager
def private_broker():
    """Run a server for one who is no test; give it, and a folder for whatever else."""
    # The killed server may still be closing files there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        (folder := Path(name, "broker")).mkdir()
        broker = Broker(folder, port_for.select_random())
        try:
            yield broker.start(), Path(name)
        finally:
            broker.kill()
            end_port_mapper(broker.epmd_port)


def end_port_mapper(port):
    environment = {**os.environ, "ERL_EPMD_PORT": str(port)}
    subprocess.run(["epmd", "-kill"], env=environment, check=False, capture_output=True)


@pytest.fixture(scope="session")
def epmd_port():
    """A port for Erlang's port mapper, which servers start and would leave running."""
    port = port_for.select_random()
    yield port
    end_port_mapper(port)


@pytest.fixture(scope="session")
def new_broker(tmp_path_factory, epmd_port):
    """Start another server: new_broker(config="lines of rabbitmq.conf")."""
    started = []

    def start(config=""):
        broker = Broker(tmp_path_factory.mktemp("broker"), epmd_port, config)
        started.append(broker)
        return broker.start()

    yield start
    for broker in started:
        broker.kill()
        shutil.rmtree(broker.folder)


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


def wait_until(condition, timeout=PATIENCE):
    """Wait until a condition of more than one script's output holds; return its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.01)
    return value
