"""RabbitMQ servers of one's own, alone or in a cluster, for tests, demo, soak and benchmark.

Nothing here touches a server that was running before: ports, data and the port mapper (epmd) are
of one's own. When it ends, or is interrupted or killed at any moment, all of it is gone.
"""

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pika
import port_for
from mirakuru import TCPExecutor
from mirakuru.base import cleanup_subprocesses
from mirakuru.base_env import processes_with_env
from mirakuru.exceptions import ProcessExitedWithError
from pytest_rabbitmq.factories.executor import RabbitMqExecutor

PROGRAMS = Path("/usr/lib/rabbitmq/bin")  # of Debian's package; those on PATH insist on being root
TEMPORARY = Path(tempfile.gettempdir())  # once, as it tries a file, which an interrupt would leave
PATIENCE = 60  # seconds after which something that has not come is an error
MARK = "WORK_QUEUE_STARTED_BY"  # in the environment of all that is started: the folders
taken = []  # sockets that keep other runs from choosing the same ports

# It kills whatever has the digits of this process's id anywhere in its mark: others' servers, too.
atexit.unregister(cleanup_subprocesses)


class Broker(RabbitMqExecutor):
    """A RabbitMQ server; stop(), kill() and start() keep its data.

    Raises mirakuru's ProcessExitedWithError where it does not start.
    """

    def __init__(self, folder, epmd_port, config=""):
        self.folder = folder
        self.epmd_port = epmd_port
        folder.mkdir()
        (folder / "rabbitmq.conf").write_text(config)
        (folder / "plugins").write_text("[].")
        port = free_port()
        super().__init__(
            str(PROGRAMS / "rabbitmq-server"),
            host="127.0.0.1",
            port=port,
            distribution_port=free_port(),
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
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            **super().envvars,
            "HOME": str(self.folder.parent),  # of the cookie that lets rabbitmqctl in
            "ERL_EPMD_PORT": str(self.epmd_port),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
        }

    @property
    def _popen_kwargs(self):
        return {
            **super()._popen_kwargs,
            "cwd": self.folder,  # for its crash dump
            "stdout": subprocess.DEVNULL,  # nobody reads it
        }

    def check_subprocess(self):
        # The script that starts the server says 0 even where that fails, which mirakuru takes for
        # the beginning of a daemon.
        status = self.process.poll()
        if status is not None:
            self.kill()
            raise ProcessExitedWithError(self, status)
        return super().check_subprocess()

    def kill(self, *arguments, **options):
        # It waits for the shell that started the server; a port that is still open would let
        # a script in once more.
        super().kill(*arguments, **options)
        wait_until(lambda: not self.pre_start_check())
        return self

    def join(self, other):
        """Make this a node of another server's cluster; what it has stored is gone."""
        self.rabbitctl_output("stop_app")
        self.rabbitctl_output("reset")
        self.rabbitctl_output("join_cluster", other.envvars["RABBITMQ_NODENAME"])
        self.rabbitctl_output("start_app")

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
        """A plain pika channel, for what is done beside the scripts."""
        with pika.BlockingConnection(pika.URLParameters(url or self.url)) as connection:
            yield connection.channel()

    def ready(self, queue, url=None):
        """The number of messages in a queue that no consumer holds; None if it isn't there."""
        with self.channel(url) as channel:
            try:
                return channel.queue_declare(queue, passive=True).method.message_count
            except pika.exceptions.ChannelClosedByBroker as error:
                if error.reply_code != 404:
                    raise
                return None

    def bodies(self, queue, url=None):
        """Take every ready message out of a queue, and return what they say."""
        with self.channel(url) as channel:
            got = iter(lambda: channel.basic_get(queue, auto_ack=True)[2], None)
            return list(got)


@contextlib.contextmanager
def nothing_left():
    """Give a new folder. At the end it is gone, and so is every process started in this block.

    Also when this process is interrupted or killed: another one, which nobody interrupts, waits
    for the end of a pipe. Servers start processes in sessions of their own, and daemons: they are
    found by what they all have in their environment.
    """
    folder = TEMPORARY / f"work-queue-{uuid.uuid4()}"
    before = os.environ.get(MARK, "")
    remover = subprocess.Popen(
        [sys.executable, __file__, folder],
        env={**os.environ, MARK: ""},  # or that of a block around this one would kill it
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    os.environ[MARK] = f"{before} {folder}"
    try:
        folder.mkdir()
        yield folder
    finally:
        os.environ[MARK] = before
        remover.stdin.close()
        remover.wait()


def remove(folder):
    """Kill all that was started for a folder, then remove it."""
    # Again and again: one that ends may just have started another, or still write a file.
    while (found := processes_with_env(MARK, folder)) or os.path.exists(folder):
        # All stand still first: a server complains on the terminal of a part that ended before it.
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def servers():
    """Give a function that starts a server: start("lines of rabbitmq.conf"). They end with it."""
    with nothing_left() as folder:
        epmd_port = free_port()
        environment = {**os.environ, "HOME": str(folder), "ERL_EPMD_PORT": str(epmd_port)}
        epmd = TCPExecutor(
            ["epmd"],
            host="127.0.0.1",
            port=epmd_port,
            envvars=environment,
            timeout=PATIENCE,
            stderr=subprocess.DEVNULL,  # it mentions each knock at its port
        )
        started = [epmd.start()]  # an executor that is forgotten kills its process

        def start(config=""):
            started.append(Broker(folder / str(len(started)), epmd_port, config))
            return started[-1].start()

        yield start


def start_cluster(start, nodes=3):
    """Start a cluster, by the function that servers() gives, with quorum queues in "q"."""
    first, *others = [start() for _ in range(nodes)]
    first.add_quorum_vhost()
    for node in others:
        node.join(first)
    return [first, *others]


def free_port():
    """Return a port that nobody listens on, and that no other run chooses while this one lasts."""
    while True:
        port = port_for.select_random()
        # The same number for UDP, which nobody uses, tells others that it is taken.
        lock = socket.socket(type=socket.SOCK_DGRAM)
        with contextlib.suppress(OSError):
            lock.bind(("127.0.0.1", port))
            taken.append(lock)
            return port


def wait_until(condition, timeout=PATIENCE):
    """Wait until a condition holds; return its value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.01)
    return value


if __name__ == "__main__":
    sys.stdin.read()
    remove(sys.argv[1])
