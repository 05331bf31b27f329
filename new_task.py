#!/usr/bin/env python3
"""Send tasks to a RabbitMQ work queue, for worker.py to process.

  new_task.py First message.       one task; each dot is a second of work
  new_task.py                      sends Hello World!
  new_task.py - < tasks.txt        one task for each line of standard input

A task is printed as sent once the broker has confirmed it. If any task is unconfirmed,
the exit status is not 0, and standard error says how many were confirmed. The broker must
be reachable at the start. If the connection is lost later, new_task.py tries to reconnect for
30 seconds and sends unconfirmed tasks again, so some may then be in the queue twice.
"""

import argparse
import collections
import contextlib
import functools
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

RECONNECT_FOR = 30  # seconds to keep trying after the connection is lost
BLOCKED_FOR = 15  # seconds to wait for a broker that is short of memory or disk space
MAX_UNCONFIRMED = 1000  # tasks, before more input is read
MAX_UNCONFIRMED_BYTES = 1_000_000

ERRORS = (pika.exceptions.AMQPError, AMQPConnectorException, OSError, ValueError)  # from pika
# Tasks refused or returned, a queue refused, an alarm: retried only while reconnecting.
NOT_RETRIED = (pika.exceptions.AMQPChannelError, pika.exceptions.ConnectionBlockedTimeout)


class Producer:
    """Publishes tasks to a queue, and keeps each one until the broker has confirmed it.

    pika's BlockingConnection would wait for each confirmation, which is ten times slower than
    leaving many tasks unconfirmed. SelectConnection calls back instead; see next_event().
    """

    def __init__(self, nodes, queue):
        self.nodes, self.queue = nodes, queue
        self.unconfirmed = {}  # published tasks by delivery tag: (line number, body)
        self.nacked = []  # tasks that the broker has refused
        self.confirmed = 0  # tasks
        self.next_line = 1  # first line not yet published
        self.lost = False  # connection lost, and no task confirmed since
        self.give_up_at = 0  # monotonic deadline for reconnecting; 0: not reconnecting

    def connect(self):
        for node in self.nodes:  # one by one: pika stops at a name that can't be resolved
            self.loop = IOLoop()  # in which pika does all its work
            self.events = collections.deque()  # from pika, oldest first
            pika.SelectConnection.create_connection([node], self.on_event, custom_ioloop=self.loop)
            try:
                self.connection = self.next_event()
                break
            except ERRORS:
                if node is self.nodes[-1]:
                    raise
        self.connection.add_on_close_callback(self.on_event)
        try:
            self.open_channel(durable=True)
        except pika.exceptions.ChannelClosedByBroker as refusal:
            # A durable queue that differs (406) or that we may not declare (403) is used as it is.
            if refusal.reply_code not in (403, 406) or "arg 'durable'" in refusal.reply_text:
                raise
            try:
                self.open_channel(passive=True)
            except pika.exceptions.ChannelClosedByBroker:
                raise refusal from None

    def open_channel(self, **declaration):
        self.connection.channel(on_open_callback=self.on_event)
        self.channel = self.next_event()
        self.tag = 0  # delivery tag of the last task published on this channel
        self.channel.add_on_close_callback(self.on_event)
        unroutable = pika.exceptions.UnroutableError([self.queue])
        self.channel.add_on_return_callback(lambda *_: self.on_event(unroutable))
        self.channel.confirm_delivery(ack_nack_callback=self.on_event)
        self.channel.queue_declare(queue=self.queue, callback=self.on_event, **declaration)
        self.next_event()  # the queue is declared

    def publish(self, tasks):
        queue = self.queue
        properties = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
        for line, body in tasks:
            self.tag += 1
            self.unconfirmed[self.tag] = line, body
            self.next_line = line + 1
            self.channel.basic_publish(
                exchange="", routing_key=queue, body=body, properties=properties, mandatory=True
            )

    def send(self, tasks, limit):
        """Publish tasks, then wait until no more than the limit are unconfirmed.

        After a lost connection, reconnect and publish the unconfirmed ones again; until the next
        confirmation, every error is retried.
        """
        if not self.unconfirmed:
            if not tasks:
                return
            self.loop.call_later(0, self.loop.stop)
            self.loop.start()  # notice a connection that was lost while the input paused
        while True:
            try:
                if self.connection.is_closed:
                    self.lost = True
                    self.connect()
                    # A set, as tasks that were published are unconfirmed, too.
                    tasks = sorted({*self.nacked, *self.unconfirmed.values(), *tasks})
                    self.next_line = tasks[0][0]
                    self.unconfirmed, self.nacked = {}, []
                self.publish(tasks)
                tasks = []
                while len(self.unconfirmed) > (0 if self.nacked or self.events else limit):
                    self.on_confirm(self.next_event().method)
                if not self.nacked:
                    return
                raise pika.exceptions.NackError(self.nacked)
            except ERRORS as error:
                if not self.give_up_at and (self.lost or not isinstance(error, NOT_RETRIED)):
                    complain(f"Connection lost: {explain(error)}; reconnecting")
                    self.give_up_at = time.monotonic() + RECONNECT_FOR
                if time.monotonic() > self.give_up_at:  # always, if not reconnecting
                    raise
            self.close()
            time.sleep(1)

    def on_confirm(self, confirm):
        """Handle a publisher confirm: an ack or nack, of one task or of all up to it."""
        first = next(iter(self.unconfirmed)) if confirm.multiple else confirm.delivery_tag
        for tag in range(first, confirm.delivery_tag + 1):
            if tag not in self.unconfirmed:  # confirmed before, by itself
                continue
            if isinstance(confirm, pika.spec.Basic.Nack):
                self.nacked.append(self.unconfirmed[tag])
                del self.unconfirmed[tag]
            else:
                _, body = self.unconfirmed.pop(tag)
                self.confirmed += 1
                self.lost, self.give_up_at = False, 0
                say(f" [x] Sent {shown(body)}")

    # ---- Waiting for pika's callbacks ----

    def on_event(self, *arguments):
        """Queue a callback's last argument: a connection, a channel, a frame, or an error."""
        self.events.append(arguments[-1])
        self.loop.stop()

    def next_event(self):
        """Run pika's loop until there is an event; return it, or raise it if it is an error."""
        while not self.events:
            self.loop.start()
        event = self.events.popleft()
        if isinstance(event, Exception):
            raise event
        return event

    def close(self):
        if self.connection.is_open:
            self.connection.close()
        while not self.connection.is_closed:
            self.loop.start()


# ---- Input ----


def batches(words):
    """Yield pairs: a list of (line number, body), and how many tasks may stay unconfirmed.

    Put your own source here. Yield 0 before any wait, as nothing answers heartbeats meanwhile.
    """
    if words != ["-"]:
        yield [(1, os.fsencode(" ".join(words)) if words else b"Hello World!")], 0
        return
    with contextlib.suppress(AttributeError, OSError):  # on Windows
        os.set_blocking(0, True)  # an earlier process may have changed it
    count, rest, ended = 0, bytearray(), False  # lines so far; the start of an unfinished line
    while not ended:
        try:
            piece = os.read(0, 16384)  # what is available: up to thousands of short lines
        except OSError as error:
            complain(f"Can't read standard input: {error}")
            sys.exit(1)
        ended = not piece
        *lines, end = (piece or b"\n").split(b"\n")  # the end of the input ends a line, too
        if lines:
            lines[0], rest = b"".join([rest, lines[0]]), bytearray()
        rest += end
        tasks = [(line, body) for line, body in enumerate(lines, count + 1) if body.strip()]
        count += len(lines)
        limit = 0  # before a read that may block
        with contextlib.suppress(OSError):  # Windows can't tell
            if not ended and select.select([0], [], [], 0)[0]:
                longest = max((len(body) for _, body in tasks), default=1)
                limit = min(MAX_UNCONFIRMED, MAX_UNCONFIRMED_BYTES // longest)
        yield tasks, limit


# ---- The terminal ----

HINTS = {  # pattern in an error: what to do
    "ConnectionRefusedError": "is RabbitMQ running? To start it: docker compose up -d --wait, "
    "or: sudo systemctl start rabbitmq-server",
    "AuthenticationError": "check the user name and password in the URL",
    "AccessDeniedError(?!.* limit )": "check the virtual host in the URL",
    "IncompatibleProtocolError": "is RabbitMQ still starting? Is this an AMQP port? For TLS: amqps://",
    "WRONG_VERSION_NUMBER": "is this a TLS port? For a plain one, use amqp://",
    "arg 'durable'": "the existing queue is not durable; delete it or choose another --queue",
    "BlockedTimeout": "the broker is short of memory or disk space",
    "NackError|UnroutableError": "is the queue full, or was it deleted?",
}
SHORTENED = reprlib.Repr()
SHORTENED.maxstring = SHORTENED.maxother = 200  # characters


def shown(body):
    """Return a body, escaped and shortened for a terminal."""
    return SHORTENED.repr(body.decode(errors="surrogateescape"))


def say(line, **options):
    """Print a line; exit if standard output can't be written."""
    try:
        print(line, **options)
    except OSError as error:
        complain(f"Can't write to standard output: {explain(error)}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails
        sys.exit(1)


def complain(text):
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    with contextlib.suppress(OSError, AttributeError):
        os.write(sys.stderr.fileno(), f" [!] {line}\n".encode())


def explain(error):
    """Return the innermost error, with a hint."""
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


class Parser(argparse.ArgumentParser):
    def print_help(self, file=None):
        say(self.format_help(), end="")  # unlike argparse, notices a full disk

    def error(self, message):  # without values, as one may be a URL with a password
        message = re.sub("(=|'|[^ -~]|amqps?://(?!USER)).*", "...", message, flags=re.DOTALL)
        text = f"{self.format_usage()}{self.prog}: error: {message}\n"
        with contextlib.suppress(OSError, AttributeError):
            os.write(sys.stderr.fileno(), text.encode())
        sys.exit(2)


def amqp_urls(urls):
    """Return pika's connection parameters for comma-separated AMQP URLs."""
    nodes = []
    for url in re.split(",(?=amqps?://)", urls):
        try:
            # An unescaped / or @ would make part of the password the host, which errors show.
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
    # A fixed width saves the import of shutil at every start.
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, width=88)
    parser = Parser(description=__doc__, formatter_class=formatter)
    parser.add_argument("-u", "--url", type=amqp_urls, default=DEFAULT_URL, help=URL_HELP)
    parser.add_argument("-q", "--queue", default="task_queue", help="default: task_queue")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="TASK", help=TASK_HELP)
    options = parser.parse_args()
    if not options.queue.isprintable() or not 0 < len(options.queue.encode()) <= 255:
        parser.error("--queue: expected 1 to 255 bytes of printable text")
    if options.words[:1] == ["--"]:
        del options.words[0]
    if options.words == ["-"] and not sys.stdin:
        parser.error("standard input is closed")
    return options


def main():
    if sys.stdout:
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored in the background
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    options = read_command_line()
    for node in options.url:
        node.blocked_connection_timeout = node.blocked_connection_timeout or BLOCKED_FOR
    producer = Producer(options.url, options.queue)
    status = 1
    try:
        producer.connect()
        for batch in batches(options.words):
            producer.send(*batch)
        producer.close()
        status = 0
    except SystemExit as end:  # a signal, or standard input or output failed
        status = end.code
    except (*ERRORS, MemoryError) as error:
        complain(explain(error))
    if status:
        left = [line for line, _ in [*producer.nacked, *producer.unconfirmed.values()]]
        line = min([producer.next_line, *left])
        resume = f"; resume from line {line}" if options.words == ["-"] else ""
        complain(f"{producer.confirmed} tasks confirmed{resume}")
    os._exit(status)  # Python's own shutdown may have to wait for a DNS lookup


if __name__ == "__main__":
    main()
