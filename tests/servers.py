"""RabbitMQ servers of one's own, alone or in a cluster, for tests, demo, soak and benchmark.

Ports, data and the port mapper (epmd) are of one's own: no other server is touched.
"""

import atexit
import contextlib
import functools
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import pika
import port_for
import psutil
from mirakuru import TCPExecutor
from mirakuru.base import cleanup_subprocesses
from mirakuru.exceptions import ProcessExitedWithError

PROGRAMS = Path("/usr/lib/rabbitmq/bin")  # of Debian's package; those on PATH insist on being root
PATIENCE = 60  # seconds after which something that has not come is an error
SHARES = 64  # of this machine's ports, as many as processes that test at the same time, at most

# It kills whatever has the digits of this process's id anywhere in its mark: others' servers, too.
atexit.unregister(cleanup_subprocesses)


class Broker(TCPExecutor):
    """A RabbitMQ server; stop(), kill() and start() keep its data.

    Raises mirakuru's ProcessExitedWithError if it does not start.
    """

    process = None  # mirakuru's __del__ looks at it, even if CTRL+C has interrupted __init__

    def __init__(self, parent, epmd_port, config="", seed=None):
        port = free_port()
        self.node = f"test-{port}@localhost"
        config = f"cluster_formation.discovery_retry_limit = 99\n{config}"  # tries
        for number, node in enumerate([seed.node, self.node] if seed else [], 1):
            config += f"cluster_formation.classic_config.nodes.{number} = {node}\n"
        self.folder = folder = parent / self.node
        folder.mkdir()
        (folder / "rabbitmq.conf").write_text(config)
        (folder / "plugins").write_text("[].")
        environment = {
            "RABBITMQ_CONFIG_FILE": folder / "rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": folder / "none",
            "RABBITMQ_ENABLED_PLUGINS_FILE": folder / "plugins",
            "RABBITMQ_LOG_BASE": folder / "log",
            "RABBITMQ_MNESIA_BASE": folder / "mnesia",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_PORT": port,
            "RABBITMQ_DIST_PORT": free_port(),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none +sbwtdcpu none +sbwtdio none",
            "ERL_EPMD_PORT": epmd_port,
            "HOME": parent,  # of the cookie that lets rabbitmqctl in
        }
        environment = {name: str(value) for name, value in environment.items()}
        command = [str(PROGRAMS / "rabbitmq-server")]
        super().__init__(command, "127.0.0.1", port, timeout=PATIENCE, envvars=environment)
        self.url = self.url_of()

    def start(self):
        # mirakuru would run Python between fork and exec, and CTRL+C then is a traceback, or lost.
        self.process = self.process or subprocess.Popen(
            self.command_parts,
            env=self.envvars,
            cwd=self.folder,  # for its crash dump
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return super().start()

    def pre_start_check(self):
        return accepts_connections(self.port)  # mirakuru's own fails if CTRL+C interrupts it

    def check_subprocess(self):
        # The script that starts the server exits with 0 even if that fails, which mirakuru takes
        # for the start of a daemon.
        status = self.process.poll()
        if status is not None:
            raise ProcessExitedWithError(self, status)
        return super().check_subprocess()

    def kill(self, *arguments, **options):
        # This waits for the shell that started the server; until the port is closed, a script
        # could still connect.
        super().kill(*arguments, **options)
        wait_until(lambda: not self.pre_start_check())
        return self

    def rabbitctl_output(self, *arguments):
        """Run rabbitmqctl; return what it prints."""
        command = [PROGRAMS / "rabbitmqctl", *arguments]
        return subprocess.check_output(command, env=self.envvars, text=True)

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


def accepts_connections(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@functools.cache
def own_ports():
    """Return ports that no other process with these tests chooses, whatever started it.

    The first one of a share is taken for as long as this process lives, with what is returned.
    """
    ports = sorted(port_for.available_good_ports())
    for number in range(SHARES):
        with contextlib.suppress(OSError):
            mark = socket.create_server(("127.0.0.1", ports[number]))
            return mark, set(ports[SHARES + number :: SHARES])
    raise port_for.PortForException("too many tests on this machine")


def free_port():
    _, ports = own_ports()
    port = port_for.select_random(ports)
    ports.remove(port)
    return port


@contextlib.contextmanager
def servers():
    """Give a function that starts a server: start("lines of rabbitmq.conf").

    At the end, also after CTRL+C, every process that this one has started is killed (servers,
    scripts and all), and the servers' files are removed.
    """
    folder, started = Path(tempfile.gettempdir()) / f"work-queue-{uuid.uuid4()}", []
    try:
        folder.mkdir()
        port = free_port()
        subprocess.Popen(["epmd", "-port", str(port)], stderr=subprocess.DEVNULL)
        wait_until(lambda: accepts_connections(port))

        def start(config="", seed=None):
            started.append(Broker(folder, port, config, seed))
            return started[-1].start()

        yield start
    finally:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing may interrupt this
        while children := psutil.Process().children(recursive=True):
            for action in (psutil.Process.suspend, psutil.Process.kill):  # so that none reacts
                for child in children:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        action(child)
            psutil.wait_procs(children, timeout=5)
        for executor in started:
            executor.kill()
        shutil.rmtree(folder)
        signal.signal(signal.SIGINT, handler)


def start_cluster(start):
    """Start a cluster of three, by the function that servers() gives, with a virtual host "q"."""
    first = start()
    others = [start(seed=first) for _ in range(2)]  # one by one: two that join at once may fail
    first.add_quorum_vhost()
    return [first, *others]


def wait_until(condition, timeout=PATIENCE):
    """Wait until a condition holds; return its value."""
    begin = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - begin
        assert waited < timeout, "it has not come true"
        time.sleep(min(0.01 + waited / 10, 0.2))  # a look may cost others processor time
    return value
