#!/usr/bin/env python3
"""Do the tasks that new_task.py sends to a RabbitMQ work queue.

usage: worker.py [-u URL] [-q QUEUE] [-p N] [--retries N] [--retry-delay SECONDS]
                 [--time-limit SECONDS] [COMMAND [ARG ...]]

    worker.py                       a second of work for every dot, until CTRL+C
    worker.py -q reports            the tasks of another queue
    worker.py --prefetch-count 0    all tasks dealt out at once: round-robin dispatch
    worker.py wc -c                 a command for every task, which is its standard input

  -u, --url URL             AMQP URL, or several with commas between them, tried in order
                            (default: the environment variable AMQP_URL, or else the
                            broker on this machine)
  -q, --queue QUEUE         default: task_queue
  -p, --prefetch-count N    unacknowledged tasks the broker may hand over, 0 for no limit
                            (default: 1)
  --retries N               times a failed task is tried again (default: 3) before it
                            goes to the dead-letter queue, QUEUE.dlq
  --retry-delay SECONDS     pause before such a try (default: 30)
  --time-limit SECONDS      a task that takes longer fails (default: none)
  -h, --help                show this

Start as many workers as you like; each task goes to one of them. It is acknowledged
after the work: when a worker dies, another one gets its task. SIGTERM lets a worker
finish the task in hand. Without a broker, a worker waits for one.
"""

import contextlib
import getopt
import math
import os
import re
import reprlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pika
from pika.adapters.utils.connection_workflow import AMQPConnectorException

DEFAULT_URL = "amqp://guest:guest@localhost:5672/%2F"
LONGEST_PAUSE = 30  # seconds between two attempts to connect; the first is 1 s, then doubled
BLOCKED_FOR = 15  # seconds to wait for a broker that is short of memory or disk
GRACE = 5  # seconds that a command has to end in, when told to
MAX_DELIVERIES = 5  # of a task that takes its workers down; quorum queues drop it after 20

NUMBERS = {  # option: type, default, lowest and highest value
    "--prefetch-count": (int, 1, 0, 65535),
    "--retries": (int, 3, 0, math.inf),
    "--retry-delay": (float, 30, 0, 4_294_967),  # the broker's milliseconds have 32 bits
    "--time-limit": (float, math.inf, 0.001, math.inf),
}

HINTS = {  # words of an error: what to do about it
    "Connection refused": "is RabbitMQ running there? To start one: docker compose up -d --wait",
    "AuthenticationError": "check user and password in the URL",
    "AccessDeniedError": "check the virtual host in the URL",
    "IncompatibleProtocolError": "is the broker still starting? Or is it no AMQP port? TLS needs amqps://",
    "CERTIFICATE": "name a CA of your own in the URL: ?ssl_options={'ca_certs':'/path/ca.pem'}",
    "'durable'": "its tasks would not survive a restart: delete it or take another --queue",
    "acknowledgement": "another worker gets the task: raise consumer_timeout in rabbitmq.conf",
    "BlockedTimeout": "the broker takes no messages: it is short of memory or disk space",
    "NackError": "the broker refused it: is that queue full?",
    "Exec format": "does it begin with a line like #!/bin/sh?",
}
# Login, permission, virtual host, certificate, queue: refused today, refused tomorrow.
PERMANENT = re.compile(r"\((403|406|530)\b|CERTIFICATE_VERIFY_FAILED")

SHORTENED = reprlib.Repr()
SHORTENED.maxstring = 200  # characters


class Failed(Exception):
    """The task was not done, for the reason given."""


class Hopeless(Failed):
    """It was not done, and is not to be tried again."""


class Lost(Exception):
    """The broker took the task back, and start_consuming() will tell why."""


class Unable(Exception):
    """This worker can't go on with its task, which goes back to the queue."""


class Worker:
    """Consumes a queue, one task at a time, over as many connections as it takes."""

    def __init__(self, nodes, queue, command, *, prefetch_count, retries, retry_delay, time_limit):
        self.nodes = nodes
        self.users = [getattr(node.credentials, "username", None) for node in nodes]
        self.queue = queue
        self.command = command  # none: sleep
        self.prefetch_count = prefetch_count
        self.retries = retries
        self.retry_delay = retry_delay
        self.time_limit = time_limit
        self.connected_before = False
        self.working = False
        self.stopping = False

    def run(self):
        """Return after SIGTERM; exit the program if no broker will ever let us work."""
        signal.signal(signal.SIGTERM, self.on_sigterm)
        pause = 1
        while not self.stopping:
            connection = problem = None
            try:
                connection = pika.BlockingConnection(self.nodes)
                channel = self.consume(connection)
                pause = 1
                channel.start_consuming()
                if not self.stopping:
                    problem = "The broker cancelled the consumer: its queue was deleted, or moved"
            except Unable as error:
                problem, pause = str(error), LONGEST_PAUSE
            except (pika.exceptions.AMQPError, AMQPConnectorException, OSError) as error:
                problem = explain(error)
                if PERMANENT.search(repr(error)) and not self.connected_before:
                    complain(problem)
                    sys.exit(1)
            if connection:
                with contextlib.suppress(pika.exceptions.AMQPError):
                    connection.close()
            if problem and self.stopping:
                complain(problem)
            elif problem:
                complain(f"{problem}; trying again in {pause} s")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def consume(self, connection):
        channel = self.declare(connection, self.queue)
        channel.basic_qos(prefetch_count=self.prefetch_count)
        channel.basic_consume(queue=self.queue, on_message_callback=self.callback)
        self.connected_before = True
        say(" [*] Waiting for messages. To exit press CTRL+C")
        return channel

    def declare(self, connection, queue, arguments=None):
        """Return a channel on which a durable queue with these arguments was declared."""
        channel = connection.channel()
        try:
            channel.queue_declare(queue=queue, durable=True, arguments=arguments)
        except pika.exceptions.ChannelClosedByBroker as refusal:
            asked_for = [f"'{name}'" for name in ("durable", *(arguments or ()))]
            differs = any(name in refusal.reply_text for name in asked_for)
            if refusal.reply_code not in (403, 406) or differs:
                raise
            # The queue has more properties, or is not this user's to declare. If it is
            # there, it will do.
            channel = connection.channel()
            try:
                channel.queue_declare(queue=queue, passive=True)
            except pika.exceptions.ChannelClosedByBroker:
                raise refusal from None
        return channel

    def callback(self, ch, method, properties, body):
        self.working = True
        try:
            again = " (redelivered)" if method.redelivered else ""
            say(f" [x] Received {shown(body)}{again}")
            try:
                beware(method, properties)
                self.work(ch, body)
            except Failed as failure:
                self.set_aside(ch, properties, body, failure)
                self.acknowledge(ch, method)
            else:
                self.acknowledge(ch, method)
                say(" [x] Done")
        except Lost:
            return
        finally:
            self.working = False
        if self.stopping:  # since acknowledge() asked
            ch.stop_consuming()

    def acknowledge(self, ch, method):
        if self.stopping:
            ch.stop_consuming()  # first, as the acknowledgement brings the next task
        ch.basic_ack(delivery_tag=method.delivery_tag)

    def work(self, ch, body):
        begin = time.monotonic()
        deadline = begin + self.time_limit

        def wait_until(moment):
            # Unlike time.sleep(), it answers heartbeats.
            ch.connection.sleep(max(0, min(moment, deadline) - time.monotonic()))
            if ch.is_closed:
                raise Lost
            if moment > deadline:
                raise Failed(f"time limit of {self.time_limit:g} s")

        if self.command:
            self.run_command(ch, body, wait_until)
            return
        dots = body.count(b".")
        on_terminal = dots and sys.stdout and sys.stdout.isatty()
        try:
            for second in range(1, dots + 1):
                wait_until(begin + second)
                if on_terminal:
                    say(".", end="", flush=True)
        finally:
            if on_terminal:
                say("")

    def run_command(self, ch, body, wait_until):
        process = None
        try:
            # An interrupt amid the start, or in poll(), would leave a process, or a lock, behind.
            with interrupts_held_back() as interrupts:
                process = self.start_command(body)
                begin = time.monotonic()
                while process.poll() is None and not interrupts:
                    now = time.monotonic()
                    wait_until(now + min(max(0.001, (now - begin) / 10), 0.1))
        except Failed:
            end(process, ch.connection.sleep)
            raise
        except BaseException:  # CTRL+C, or the connection is lost
            if process:
                end(process, time.sleep)
            raise
        if process.returncode < 0:
            name = signal.strsignal(-process.returncode)
            raise Failed(f"signal {-process.returncode}: {name}")
        if process.returncode:
            raise Failed(f"exit status {process.returncode}")

    def start_command(self, body):
        with tempfile.TemporaryFile() as task:
            task.write(body)
            task.seek(0)
            try:
                return subprocess.Popen(self.command, stdin=task, start_new_session=True)
            except OSError as error:
                raise Unable(f"Can't run {self.command[0]}: {explain(error)}") from None

    def set_aside(self, ch, properties, body, failure):
        """Publish a failed task, to come back after the delay or as a dead letter."""
        headers = lasting(properties.headers or {}, self.queue)
        # A dead letter that is worked off has all its tries again.
        tries = 0 if headers.pop("x-last-error", None) else count(headers, "x-retry-count")
        if tries < self.retries and not isinstance(failure, Hopeless):
            what_next = f"to be tried again in {self.retry_delay:g} s"
            queue = f"{self.queue}.retry"
            arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": self.queue}
            properties.expiration = str(round(1000 * self.retry_delay))
            headers["x-retry-count"] = tries + 1
        else:
            queue = f"{self.queue}.dlq"
            what_next = f"it goes to {queue}"
            arguments = None
            properties.expiration = None  # or the dead letter would be dropped by then
            headers["x-retry-count"] = tries
            headers["x-last-error"] = str(failure)
        properties.headers = headers
        if properties.user_id not in self.users:
            properties.user_id = None  # the broker would refuse it
        properties.delivery_mode = pika.DeliveryMode.Persistent.value
        say(f" [!] Failed: {failure}; {what_next}")
        try:
            channel = self.declare(ch.connection, queue, arguments)
            channel.confirm_delivery()
            channel.basic_publish("", queue, body, properties, mandatory=True)
            channel.close()
        except pika.exceptions.AMQPError as error:
            raise Unable(f"Can't put the failed task into {queue}: {explain(error)}") from None

    def on_sigterm(self, *_):
        if not self.working:
            sys.exit(0)
        self.stopping = True


def beware(method, properties):
    """Raise Hopeless for a task that was begun again and again, and never finished."""
    deliveries = count(properties.headers or {}, "x-delivery-count")  # by quorum queues
    if method.redelivered and deliveries >= MAX_DELIVERIES:
        raise Hopeless(f"begun {deliveries} times and never finished, does it kill its worker?")


def count(headers, name):
    return max(0, headers[name]) if isinstance(headers.get(name), int) else 0


def lasting(headers, queue):
    """Return a task's headers without those that the broker adds on its way through queues."""
    passing = "x-(delivery|acquired)-count"
    if headers.get("x-first-death-queue") == f"{queue}.retry":  # so it died nowhere else
        passing += "|x-death|x-(first|last)-death-.*"
    # A name that is not UTF-8 comes as bytes.
    return {name: headers[name] for name in headers if not re.fullmatch(passing, str(name))}


@contextlib.contextmanager
def interrupts_held_back():
    """Raise KeyboardInterrupt at the end; until then, only note CTRL+C in the list yielded.

    A closed terminal is such an interrupt, too.
    """
    interrupts = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:  # as it is in the background of a script, or under nohup
            signal.signal(number, lambda *_: interrupts.append("CTRL+C"))
    try:
        yield interrupts
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if interrupts:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal may send two
            raise KeyboardInterrupt


def end(process, sleep):
    """End a command and its whole process group: politely, after GRACE seconds not."""
    deadline = time.monotonic() + GRACE
    try:
        with contextlib.suppress(ProcessLookupError):  # when all of them have ended
            os.killpg(process.pid, signal.SIGTERM)
            while time.monotonic() < deadline:
                sleep(0.02)
                process.poll()
                os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def shown(body):
    """Return a body as text that is safe on a terminal: escaped, and not endless."""
    return SHORTENED.repr(body.decode(errors="surrogateescape"))


def say(line, **options):
    try:
        print(line, **options)
    except OSError as error:
        # Python would try once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # the end of `| head` is no error
            complain(f"Can't write to standard output: {error}")
        sys.exit(1)


def complain(text):
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    print(f" [!] {text}", file=sys.stderr)


def explain(error):
    """Return the error that pika has wrapped in others, on one line, with a hint."""
    while inner := getattr(error, "exception", None) or next(
        (arg for arg in error.args if isinstance(arg, Exception)), None
    ):
        error = inner
    text = getattr(error, "reply_text", None) or f"{type(error).__name__}: {error}"
    return "; ".join([text, *(hint for words, hint in HINTS.items() if words in text)])


def nodes_of(urls):
    """Parse comma-separated AMQP URLs into a list of pika's connection parameters."""
    nodes = []
    for url in re.split(",(?=amqps?://)", urls):
        try:
            if not re.fullmatch("amqps?://([^@/?#]*@)?[^@#]*", url):
                raise ValueError
            nodes.append(pika.URLParameters(url))
            nodes[-1].host.encode("idna")
        except Exception:
            # Whatever pika stumbled on. Its message may quote a password, so it is not shown.
            raise ValueError(
                "URL: expected amqp://USER:PASSWORD@HOST:PORT/VHOST, special characters as in %40"
            ) from None
        if nodes[-1].blocked_connection_timeout is None:
            nodes[-1].blocked_connection_timeout = BLOCKED_FOR
    return nodes


def number(option, text):
    kind, _, lowest, highest = NUMBERS[option]
    with contextlib.suppress(ValueError):
        if lowest <= kind(text) <= highest:
            return kind(text)
    raise ValueError(f"{option}: expected a number from {lowest} to {highest}")


def parse_arguments():
    """Return the command line: connection parameters, queue name, command, and numbers by name."""
    given = {"--url": os.environ.get("AMQP_URL") or DEFAULT_URL, "--queue": "task_queue"}
    short = {"-u": "--url", "-q": "--queue", "-p": "--prefetch-count", "-h": "--help"}
    names = ["help", *(f"{option[2:]}=" for option in (*given, *NUMBERS))]
    try:
        options, command = getopt.getopt(sys.argv[1:], "u:q:p:h", names)
        given.update((short.get(option, option), value) for option, value in options)
        if "--help" in given:
            say(__doc__.strip())
            sys.exit()
        queue = given["--queue"]
        if not queue.isprintable() or not 0 < len(queue.encode()) < 256:
            raise ValueError(f"--queue: there is no such name: {SHORTENED.repr(queue)}")
        numbers = {
            option[2:].replace("-", "_"): number(option, given.get(option, default))
            for option, (_, default, _, _) in NUMBERS.items()
        }
        return nodes_of(given["--url"]), queue, command, numbers
    except getopt.GetoptError as error:
        problem = error.msg.partition(":")[0]  # behind it, a password might follow
    except ValueError as error:
        problem = error
    complain(f"{problem} (see worker.py --help)")
    sys.exit(2)


def main():
    if sys.stdout:
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    nodes, queue, command, numbers = parse_arguments()
    if command and not shutil.which(command[0]):
        complain(f"Can't run {command[0]}: there is no such command, or it is not executable")
        sys.exit(1)
    try:
        Worker(nodes, queue, command, **numbers).run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
