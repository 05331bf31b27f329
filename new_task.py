#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pika>=1.3.2,<2"]
# ///
"""Send tasks to a RabbitMQ work queue, for worker.py to process.

  new_task.py First message.       one task; each dot is a second of work
  new_task.py                      sends Hello World!
  new_task.py - < tasks.txt        one task for each line of standard input

A task is printed as sent once the broker has confirmed it. If any task is
unconfirmed, the exit status is not 0, and standard error says why. The broker
must be reachable at the start. If the connection is lost later, new_task.py
tries to reconnect for 30 seconds and sends unconfirmed tasks again, so some
may then be in the queue twice.
"""

import argparse
import collections
import contextlib
import os
import re
import reprlib
import signal
import sys
import time

import pika
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import AMQPConnectorException

PATIENCE = 30  # seconds to wait for an answer from the broker, and to keep trying to reconnect
BLOCKED_FOR = 15  # seconds to wait for a broker that is short of memory or disk space
CLOSE_WITHIN = 5  # seconds to wait for the broker to close the connection
READ = 128 * 1024  # bytes to read at a time

# What pika may raise: ValueError if the connection is reset at once, or a host name is malformed.
ERRORS = (pika.exceptions.AMQPError, AMQPConnectorException, OSError, ValueError)
# What reconnecting would not cure: the broker refuses the queue, or a task (by a nack, by
# returning it, or by closing the channel), or it stays short of memory or disk space.
REFUSALS = (pika.exceptions.AMQPChannelError, pika.exceptions.ConnectionBlockedTimeout)


class Producer:
    """Publishes batches of tasks to a queue, and waits until each batch is confirmed.

    pika's BlockingConnection waits for each single confirm, which is ten times slower.
    SelectConnection does not wait, but calls back; next_event() waits for such a callback.
    """

    def __init__(self, nodes, queue):
        self.nodes = nodes  # of the broker, as pika's connection parameters
        for node in nodes:
            node.blocked_connection_timeout = node.blocked_connection_timeout or BLOCKED_FOR
        self.queue = queue
        self.unconfirmed = {}  # the batch that is being sent: body by line number
        self.next_line = 1  # the line after that batch
        self.confirmed = 0  # tasks so far
        self.loop = self.connection = self.channel = None
        self.events = None  # from pika, oldest first
        self.tag = 0  # delivery tag of the last task published on this channel

    def connect(self):
        for node in self.nodes:  # one by one: pika stops at a name that can't be resolved
            # pika runs every callback in this loop. With a new one for each attempt, late
            # callbacks of a lost connection can't run.
            self.loop = IOLoop()
            self.events = collections.deque()
            pika.SelectConnection.create_connection([node], self.on_event, custom_ioloop=self.loop)
            try:
                self.connection = self.next_event(seconds=None)  # pika has time limits of its own
                break
            except ERRORS:
                if node is self.nodes[-1]:
                    raise
        self.connection.add_on_close_callback(self.on_event)
        try:
            self.declare(durable=True)
        except pika.exceptions.ChannelClosedByBroker as refusal:
            # A durable queue that differs (406) or that we may not declare (403) is used as it is.
            if refusal.reply_code not in (403, 406) or re.search(UNSAFE, refusal.reply_text):
                raise
            self.declare(passive=True)  # only checks that the queue exists

    def declare(self, **properties):
        self.connection.channel(on_open_callback=self.on_event)
        self.channel = self.next_event()
        self.tag = 0
        self.channel.add_on_close_callback(self.on_event)
        # If a task is returned, the callback gets its body last, so this queues an error instead.
        unroutable = pika.exceptions.UnroutableError([self.queue])
        self.channel.add_on_return_callback(lambda *_: self.on_event(unroutable))
        self.channel.confirm_delivery(ack_nack_callback=self.on_event)
        self.channel.queue_declare(queue=self.queue, callback=self.on_event, **properties)
        self.next_event()

    def send(self, tasks):
        """Publish a batch of tasks (body by line number), and return when all are confirmed.

        If the connection is lost, reconnect and publish the unconfirmed ones again. From then on
        every error is retried: a node may be down, or the queue may have no leader yet.
        """
        self.unconfirmed = tasks
        self.next_line = max(tasks) + 1
        # One turn of the loop, to notice that the connection was lost while the input paused.
        self.loop.call_later(0, self.loop.stop)
        self.loop.start()
        reconnecting, give_up_at = not self.connection.is_open, None
        while True:
            try:
                if not self.connection.is_open:
                    self.connect()
                self.publish()
                return
            except ERRORS as error:
                if isinstance(error, REFUSALS) and not reconnecting:
                    raise
                if not give_up_at:
                    complain(f"Connection lost: {explain(error)}; reconnecting")
                    give_up_at = time.monotonic() + PATIENCE
                elif time.monotonic() > give_up_at:
                    raise
            reconnecting = True
            self.close()
            time.sleep(1)
            self.nodes.append(self.nodes.pop(0))  # another node, as this one may be cut off

    def publish(self):
        """Publish all unconfirmed tasks, and take the publisher confirms."""
        line_by_tag = {}
        persistent = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
        for line, body in self.unconfirmed.items():
            self.tag += 1
            line_by_tag[self.tag] = line
            self.channel.basic_publish(
                exchange="",
                routing_key=self.queue,
                body=body,
                properties=persistent,
                mandatory=True,  # the broker returns it if the queue is not there
            )

        while line_by_tag:
            confirm = self.next_event().method  # an ack or a nack
            # multiple: this tag and all earlier ones
            first = next(iter(line_by_tag)) if confirm.multiple else confirm.delivery_tag
            for tag in range(first, confirm.delivery_tag + 1):
                line = line_by_tag.pop(tag, None)  # None: confirmed earlier
                if line and isinstance(confirm, pika.spec.Basic.Ack):
                    body = self.unconfirmed.pop(line)
                    self.confirmed += 1
                    say(f" [x] Sent {shown(body)}")
        if self.unconfirmed:
            raise pika.exceptions.NackError(self.unconfirmed)

    # ---- Waiting for pika's callbacks ----

    def on_event(self, *arguments):
        """Append a callback's last argument: a connection, a channel, a frame, or an error."""
        self.events.append(arguments[-1])
        self.loop.stop()

    def next_event(self, seconds=PATIENCE):
        """Run pika's loop until there is an event; return it, or raise it if it is an error.

        Raises TimeoutError if there is none within that many seconds.
        """
        if not self.events:
            timer = self.loop.call_later(seconds, self.loop.stop) if seconds else None
            self.loop.start()  # until on_event() or the timer stops it
            if timer:
                self.loop.remove_timeout(timer)
        if not self.events:
            raise TimeoutError(f"no answer from the broker within {seconds} s")
        event = self.events.popleft()
        if isinstance(event, Exception):
            raise event
        return event

    def close(self):
        """Close the connection, if the broker still answers."""
        if not self.connection.is_open:
            return
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
    """Yield batches of tasks, body by line number: the words, or what standard input has ready.

    Put your own source of tasks here.
    """
    if words != ["-"]:
        yield {1: os.fsencode(" ".join(words) or "Hello World!")}
        return
    # os.read() returns what is there: slow lines one by one, fast ones in batches.
    count, rest, ended = 0, bytearray(), False  # lines so far; the beginning of the next one
    while not ended:
        try:
            piece = os.read(0, READ)  # waits if there is nothing to read
        except OSError as error:
            complain(f"Can't read standard input: {explain(error)}")
            sys.exit(1)
        ended = not piece
        piece = piece or b"\n"  # the last line need not end with a line break
        rest += piece
        if b"\n" in piece:
            *lines, rest = rest.split(b"\n")
            batch = {n: bytes(text) for n, text in enumerate(lines, count + 1) if text.strip()}
            count += len(lines)
            if batch:
                yield batch


# ---- The terminal (the same in both scripts) ----

# The broker refuses a queue that can't be used, for example: "PRECONDITION_FAILED - inequivalent
# arg 'durable' for queue 'task_queue' in vhost '/': received 'true' but current is 'false'"
STREAM = "current is (the value )?'stream'"
UNSAFE = f"arg 'durable'|{STREAM}"
HINTS = {  # pattern in an error: what to do
    "ConnectionRefusedError": "is RabbitMQ running? To start it: docker compose up -d --wait, "
    "or: sudo systemctl start rabbitmq-server; in a container, localhost is the container itself",
    "AuthenticationError": "check the user name and password in the URL",
    "AccessDeniedError": "check the virtual host in the URL, and who may use it",
    "IncompatibleProtocolError": "is RabbitMQ still starting? Is this an AMQP port? For TLS: amqps://",
    "WRONG_VERSION_NUMBER": "is this a TLS port? For a plain one, use amqp://",
    "arg 'durable'": "the existing queue is not durable; delete it or choose another --queue",
    STREAM: "a stream can't be used as a work queue; choose another --queue",
    "BlockedTimeout": "the broker is short of memory or disk space",
    "NackError|UnroutableError": "the broker refused it: is the queue full, or was it deleted?",
    "no answer": "is the broker stuck, or has the queue lost the majority of its nodes?",
}
SHORTENED = reprlib.Repr()
SHORTENED.maxstring = 200  # characters


def shown(body):
    """Return a task's body, escaped and shortened for a terminal."""
    return SHORTENED.repr(body.decode(errors="surrogateescape"))


def say(text, **options):
    """Print a line; exit if standard output can't be written."""
    try:
        print(text, **options)
    except OSError as error:
        complain(f"Can't write to standard output: {explain(error)}")
        sys.exit(1)


def escaped(text):
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def complain(text):
    """Print a line to standard error, if that can be written."""
    if sys.stderr:  # None if it is closed
        with contextlib.suppress(OSError):
            # In one piece, whatever signal comes.
            os.write(sys.stderr.fileno(), f" [!] {escaped(text)}\n".encode())


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
QUEUE_HELP = "default: task_queue"
TASK_HELP = "words of one task; - alone sends each non-blank line of standard input"


def amqp_urls(urls):
    """Return pika's connection parameters for comma-separated AMQP URLs."""
    nodes = []
    for url in re.split(r"\s*,\s*(?=amqps?://)", urls.strip()):
        try:
            if not re.match("amqps?://", url):  # pika would take it for a URL of localhost
                raise ValueError
            node = pika.URLParameters(url)
        except OSError as error:
            raise argparse.ArgumentTypeError(f"ssl_options: {error.strerror}") from None
        except Exception:  # which may quote the password
            raise argparse.ArgumentTypeError(URL_FORM) from None
        name = f"{os.path.basename(sys.argv[0])} {os.getpid()}"  # for rabbitmqctl list_connections
        node.client_properties = node.client_properties or {"connection_name": name}
        nodes.append(node)
    return nodes


def queue_name(text):
    """Return a name that fits into the broker's 255 bytes with .dlq.retry appended."""
    if text.isprintable() and 0 < len(text.encode()) <= 245:
        return text
    raise argparse.ArgumentTypeError("expected 1 to 245 bytes of printable text")


def read_command_line():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-u", "--url", metavar="URL", type=amqp_urls, default=DEFAULT_URL, help=URL_HELP)
    add("-q", "--queue", metavar="NAME", type=queue_name, default="task_queue", help=QUEUE_HELP)
    add("words", nargs=argparse.REMAINDER, metavar="TASK", help=TASK_HELP)
    options = parser.parse_args()
    if options.words[:1] == ["--"]:
        del options.words[0]
    return options


def main():
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # by a shell in the background
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    options = read_command_line()
    producer = Producer(options.url, options.queue)
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
        os._exit(end.code)  # Python's own shutdown may wait for a DNS lookup or a broken pipe
