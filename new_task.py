#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pika>=1.3.2,<2"]
# ///
"""Send tasks to a RabbitMQ work queue, for worker.py to process.

  new_task.py First message.       one task; each dot is a second of work
  new_task.py                      sends Hello World!
  new_task.py - < tasks.txt        one task for each line of standard input

A task is printed as sent once the broker has confirmed it. If any task is unconfirmed,
the exit status is not 0, and standard error says why. The broker must be reachable at
the start. If the connection is lost later, new_task.py tries to reconnect for 30 seconds
and sends unconfirmed tasks again, so some may then be in the queue twice.
"""

import argparse
import collections
import contextlib
import itertools
import math
import os
import re
import reprlib
import select
import signal
import sys
import time

import pika
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import AMQPConnectorException

PATIENCE = 30  # seconds for the broker to confirm a task, and for reconnecting after that
BLOCKED_FOR = 15  # seconds to wait for a broker that is short of memory or disk space
CLOSE_WITHIN = 5  # seconds for the broker to close the connection
SLOWEST = 50_000  # bytes; for every so many in a batch, the broker gets another second
BATCH = 4000  # tasks that may be unconfirmed at the same time, at most
BATCH_BYTES = 512 * 1024  # of tasks, approximately
READ = 128 * 1024  # bytes to read at a time

# What pika may raise.
ERRORS = (pika.exceptions.AMQPError, AMQPConnectorException, OSError, ValueError)
# The broker refuses a task or the queue, or is blocked by an alarm: reconnecting would not help.
REFUSALS = (pika.exceptions.AMQPChannelError, pika.exceptions.ConnectionBlockedTimeout)


class Producer:
    """Publishes batches of tasks to a queue, and waits for each batch to be confirmed.

    pika's BlockingConnection would wait for each task, which is ten times slower than having
    a batch of them unconfirmed. SelectConnection calls back instead; see next_event().
    """

    def __init__(self, nodes, queue):
        self.nodes = nodes
        self.queue = queue
        self.unconfirmed = {}  # tasks of the batch that is being sent: body by line number
        self.next_line = 1  # the line after that batch
        self.confirmed = 0  # tasks so far
        # Longer than blocked_for, so that ConnectionBlockedTimeout comes before our TimeoutError.
        blocked_for = max(node.blocked_connection_timeout for node in nodes)
        self.patience = max(PATIENCE, blocked_for + 1)

    def connect(self):
        for node in self.nodes:  # one by one: pika stops at a name that can't be resolved
            # pika does all its work in this loop. A new one runs no callbacks of a lost connection.
            self.loop = IOLoop()
            self.events = collections.deque()  # from pika, oldest first
            pika.SelectConnection.create_connection([node], self.on_event, custom_ioloop=self.loop)
            try:
                self.connection = self.next_event()  # pika has a time limit of its own here
                break
            except ERRORS:
                if node is self.nodes[-1]:
                    raise
        self.connection.add_on_close_callback(self.on_event)
        try:
            self.open_channel(durable=True)
        except pika.exceptions.ChannelClosedByBroker as refusal:
            # A durable queue that differs (406) or that we may not declare (403) is used as it is.
            if refusal.reply_code not in (403, 406) or re.search(UNSAFE, refusal.reply_text):
                raise
            try:
                self.open_channel(passive=True)  # only check that the queue exists
            except pika.exceptions.ChannelClosedByBroker:
                raise refusal from None

    def open_channel(self, **declaration):
        self.connection.channel(on_open_callback=self.on_event)
        self.channel = self.next_event(self.patience)
        self.tag = 0  # delivery tag of the last task published on this channel
        self.channel.add_on_close_callback(self.on_event)
        unroutable = pika.exceptions.UnroutableError([self.queue])
        self.channel.add_on_return_callback(lambda *_: self.on_event(unroutable))
        self.channel.confirm_delivery(ack_nack_callback=self.on_event)  # for the confirms only
        self.channel.queue_declare(queue=self.queue, callback=self.on_event, **declaration)
        self.next_event(self.patience)  # the queue is declared

    def send(self, tasks):
        """Publish a batch of tasks (body by line number), and return when all are confirmed.

        If the connection is lost, reconnect and publish the unconfirmed ones again. Until the next
        confirmation, every error is retried: a node may be down, or a queue without a leader.
        """
        self.unconfirmed = tasks
        self.next_line = max(tasks) + 1
        # Run the loop once, to notice a connection that was lost while the input paused.
        self.loop.call_later(0, self.loop.stop)
        self.loop.start()
        reconnecting, give_up_at = self.connection.is_closed, None
        while True:
            confirmed = self.confirmed
            try:
                if reconnecting:
                    self.connect()
                return self.publish()
            except ERRORS as error:
                if self.confirmed > confirmed:  # a new failure, of a connection that worked
                    reconnecting, give_up_at = False, None
                if not reconnecting and isinstance(error, REFUSALS):
                    raise
                if not give_up_at:
                    complain(f"Connection lost: {explain(error)}; reconnecting")
                    give_up_at = time.monotonic() + PATIENCE
                if time.monotonic() > give_up_at:
                    raise
                reconnecting = True
            self.close()
            time.sleep(1)
            self.nodes.append(self.nodes.pop(0))  # another node, as this one may be cut off

    def publish(self):
        """Publish all unconfirmed tasks, and take the publisher confirms."""
        lines = {}  # by delivery tag
        persistent = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
        for line, body in self.unconfirmed.items():
            self.tag += 1
            lines[self.tag] = line
            self.channel.basic_publish(
                exchange="",
                routing_key=self.queue,
                body=body,
                properties=persistent,
                mandatory=True,
            )

        patience = self.patience + sum(map(len, self.unconfirmed.values())) / SLOWEST
        refused = []
        while lines:
            confirm = self.next_event(patience).method  # an ack or a nack
            # multiple: this tag and all earlier ones
            first = next(iter(lines)) if confirm.multiple else confirm.delivery_tag
            for tag in range(first, confirm.delivery_tag + 1):
                if tag not in lines:  # confirmed earlier
                    continue
                line = lines.pop(tag)
                if isinstance(confirm, pika.spec.Basic.Nack):
                    refused.append(line)
                    continue
                body = self.unconfirmed.pop(line)
                self.confirmed += 1
                say(f" [x] Sent {shown(body)}")
        if refused:
            raise pika.exceptions.NackError(refused)

    # ---- Waiting for pika's callbacks ----

    def on_event(self, *arguments):
        """Queue a callback's last argument: a connection, a channel, a frame, or an error."""
        self.events.append(arguments[-1])
        self.loop.stop()

    def next_event(self, seconds=math.inf):
        """Run pika's loop until there is an event; return it, or raise it if it is an error.

        Raises TimeoutError if there is none within that many seconds.
        """
        turns = 0  # of a second each, as this process may have been suspended for longer
        while not self.events:
            if turns >= seconds:
                raise TimeoutError(f"no answer from the broker within {seconds:.0f} s")
            timer = self.loop.call_later(1, self.loop.stop)
            self.loop.start()
            self.loop.remove_timeout(timer)
            turns += 1
        event = self.events.popleft()
        if isinstance(event, Exception):
            raise event
        return event

    def close(self):
        """Close the connection, if the broker still answers."""
        if self.connection.is_open:
            self.connection.close()
        while not self.connection.is_closed:
            try:
                self.next_event(CLOSE_WITHIN)
            except TimeoutError:
                return
            except ERRORS:  # reporting that the channel, then the connection, has closed
                pass


# ---- Input ----


def batches(words):
    """Yield non-empty dicts of up to BATCH bodies, by ascending line number.

    Put your own source of tasks here.
    """
    if words != ["-"]:
        yield {1: os.fsencode(" ".join(words)) if words else b"Hello World!"}
        return
    count, rest, ended = 0, b"", False  # lines so far; the start of an unfinished line
    while not ended:
        try:
            piece, ended = read_input()
            *lines, rest = (rest + piece).split(b"\n")
            if not lines and not ended:  # a long line, or one that comes slowly
                rest += sys.stdin.buffer.readline()
                ended = not rest.endswith(b"\n")
                lines, rest = [rest.removesuffix(b"\n")], b""
        except OSError as error:
            complain(f"Can't read standard input: {error}")
            sys.exit(1)
        if ended:
            lines.append(rest)
        tasks = ((line, body) for line, body in enumerate(lines, count + 1) if body.strip())
        while batch := dict(itertools.islice(tasks, BATCH)):
            yield batch
        count += len(lines)


def read_input():
    """Return available standard input (waiting if there is none), and whether it has ended.

    read1() returns first what readline() has left in Python's buffer, which select() can't see.
    """
    with contextlib.suppress(AttributeError, OSError):  # on Windows
        os.set_blocking(0, True)  # another process may have changed it
    data = piece = sys.stdin.buffer.read1(READ)
    while piece and len(data) < BATCH_BYTES and data.count(b"\n") < BATCH and has_more_input():
        piece = sys.stdin.buffer.read1(READ)
        data += piece
    return data, not piece


def has_more_input():
    with contextlib.suppress(OSError):  # Windows can't tell
        return bool(select.select([0], [], [], 0)[0])


# ---- The terminal (the same in both scripts) ----

STREAM = "current is (the value )?'stream'"
UNSAFE = f"arg 'durable'|{STREAM}"  # why the broker refuses a queue that can't be used
UNREADABLE = r"Stream connection lost: (Value|Overflow|InvalidField|OSError\(75)"
HINTS = {  # pattern in an error: what to do
    "ConnectionRefusedError": "is RabbitMQ running? To start it: docker compose up -d --wait, "
    "or: sudo systemctl start rabbitmq-server",
    "AuthenticationError": "check the user name and password in the URL",
    "AccessDeniedError(?!.* limit )": "check the virtual host in the URL",
    "IncompatibleProtocolError": "is RabbitMQ still starting? Is this an AMQP port? For TLS: amqps://",
    "WRONG_VERSION_NUMBER": "is this a TLS port? For a plain one, use amqp://",
    "arg 'durable'": "the existing queue is not durable; delete it or choose another --queue",
    STREAM: "a stream can't be used as a work queue; choose another --queue",
    "BlockedTimeout": "the broker is short of memory or disk space",
    "NackError|UnroutableError": "is the queue full, or was it deleted?",
    "no answer": "is the broker stuck, or has the queue lost the majority of its nodes?",
    # worker.py only: pika can't decode a header (75: a number is too large for a time).
    UNREADABLE: "a message in the queue may have a header that pika can't read",
}
SHORTENED = reprlib.Repr()
SHORTENED.maxstring = SHORTENED.maxother = 200  # characters


def shown(body):
    """Return a body, escaped and shortened for a terminal."""
    return SHORTENED.repr(body.decode(errors="surrogateescape"))


def printable(text):
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def say(line, **options):
    """Print a line; exit if standard output can't be written."""
    try:
        print(line, **options)
    except OSError as error:
        complain(f"Can't write to standard output: {explain(error)}")
        sys.exit(1)


def complain(text):
    """Print a line to standard error, if that can be written."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f" [!] {printable(text)}\n".encode())


def explain(error):
    """Describe the innermost error, which is the most specific, with a hint."""
    # Where pika's exceptions keep their causes:
    inner = [*getattr(error, "exceptions", []), getattr(error, "exception", None), *error.args]
    if inner := [each for each in inner if isinstance(each, Exception)]:
        return explain(inner[-1])
    text = getattr(error, "reply_text", None) or f"{type(error).__name__}: {error}"
    return text + "".join(f" ({HINTS[pattern]})" for pattern in HINTS if re.search(pattern, text))


# ---- The command line ----

DEFAULT_URL = os.environ.get("AMQP_URL") or "amqp://guest:guest@localhost:5672/%2F"
URL_FORM = "expected amqp://USER:PASSWORD@HOST:PORT/VHOST, percent-encoded (@ in a password: %40)"
URL_HELP = "AMQP URLs, comma-separated, tried in order (default: $AMQP_URL or the local broker)"
TASK_HELP = "words of a task; - alone sends each non-blank line of standard input"


def amqp_urls(urls):
    """Return pika's connection parameters for comma-separated AMQP URLs."""
    nodes = []
    for url in re.split(r"\s*,\s*(?=amqps?://)", urls.strip()):
        try:
            # With an unescaped / or @, part of a password would be the host, which errors show.
            if not re.fullmatch("amqps?://([^@/?#]*@)?[^@#]*", url):
                raise ValueError
            node = pika.URLParameters(url)
            node.host.encode("idna")  # as the DNS lookup does
        except Exception:
            raise argparse.ArgumentTypeError(URL_FORM) from None  # the cause may quote a password
        name = f"{os.path.basename(sys.argv[0])} {os.getpid()}"  # for rabbitmqctl list_connections
        node.client_properties = node.client_properties or {"connection_name": name}
        nodes.append(node)
    return nodes


def read_command_line():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option = parser.add_argument
    url = {"dest": "nodes", "metavar": "URL", "type": amqp_urls, "default": DEFAULT_URL}
    option("-u", "--url", **url, help=URL_HELP)
    option("-q", "--queue", default="task_queue", help="default: task_queue")
    option("words", nargs=argparse.REMAINDER, metavar="TASK", help=TASK_HELP)
    options = parser.parse_args()
    if not options.queue.isprintable() or not 0 < len(options.queue.encode()) <= 255:
        parser.error("--queue: expected 1 to 255 bytes of printable text")
    if options.words[:1] == ["--"]:
        del options.words[0]
    if options.words == ["-"] and not sys.stdin:
        parser.error("standard input is closed")
    return options


def main():
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass  # occupy closed standard streams, so that no socket gets their numbers
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as by shells for background jobs
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    options = read_command_line()
    for node in options.nodes:
        node.blocked_connection_timeout = node.blocked_connection_timeout or BLOCKED_FOR
    producer = Producer(options.nodes, options.queue)
    try:
        producer.connect()
        for batch in batches(options.words):
            producer.send(batch)
        producer.close()
        return 0
    except SystemExit as end:  # a signal, or standard input or output failed
        status = end.code
    except (*ERRORS, MemoryError) as error:  # MemoryError: a line of input is too long
        complain(explain(error))
        status = 1
    if options.words == ["-"]:
        line = next(iter(producer.unconfirmed), producer.next_line)
        tasks = "1 task" if producer.confirmed == 1 else f"{producer.confirmed} tasks"
        complain(f"{tasks} confirmed; resume from line {line}")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SystemExit as end:
        os._exit(end.code)  # Python's own shutdown may have to wait for a DNS lookup
    except OSError:  # before Python 3.11: argparse can't print help or usage
        os._exit(2)
