#!/usr/bin/env python3
"""Send tasks to a RabbitMQ work queue, for worker.py to do.

usage: new_task.py [-u URL] [-q QUEUE] [TASK ...]

    new_task.py First message.      one task, a second of work for every dot
    new_task.py                     sends Hello World!
    new_task.py - < tasks.txt       a task for every line of standard input
    new_task.py -- --dry-run.       a task that begins with a dash

  -u, --url URL      AMQP URL, or several with commas between them, tried in order
                     (default: the environment variable AMQP_URL, or else the broker
                     on this machine)
  -q, --queue QUEUE  default: task_queue
  -h, --help         show this

A task is called sent once the broker has confirmed that it keeps it. If not every
task could be confirmed, the exit status is 1 and standard error says how many were.
"""

import collections
import functools
import getopt
import os
import re
import reprlib
import sys
import threading
import time

import pika
from pika.adapters.select_connection import IOLoop

DEFAULT_URL = "amqp://guest:guest@localhost:5672/%2F"
WINDOW = 1000  # tasks of up to 10 kB that may wait for their confirmation at one time
RECONNECT_FOR = 30  # seconds to try for, when a connection that worked is lost
BLOCKED_FOR = 15  # seconds to wait for a broker that is short of memory or disk

HINTS = {  # words of an error: what to do about it
    "Connection refused": "is RabbitMQ running there? To start one: docker compose up -d --wait",
    "AuthenticationError": "check user and password in the URL",
    "AccessDeniedError": "check the virtual host in the URL",
    "IncompatibleProtocolError": "is the broker still starting? Or is it no AMQP port? TLS needs amqps://",
    "CERTIFICATE": "name a CA of your own in the URL: ?ssl_options={'ca_certs':'/path/ca.pem'}",
    "'durable'": "its tasks would not survive a restart: delete it or take another --queue",
}

SHORTENED = reprlib.Repr()
SHORTENED.maxstring = 200  # characters


class Producer:
    """Publishes tasks without waiting for one confirmation before the next task.

    The methods are the tutorial's steps in the tutorial's order; pika calls each one
    when the broker has answered the one before.
    """

    def __init__(self, nodes, queue, tasks):
        """Prepare to send tasks, an iterable of (line number, body), to a queue."""
        self.nodes = nodes
        self.queue = queue
        self.tasks = tasks
        self.loop = IOLoop()
        self.channel = None  # open, the queue declared: ready to publish
        self.refusal = None  # why the broker would not declare the queue as we asked
        self.deadline = 0  # time.monotonic() at which to stop reconnecting
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.window = threading.Semaphore(WINDOW)
        self.all_read = False
        self.unconfirmed = collections.deque()  # (line number, body), oldest first
        self.first_tag = 1  # delivery tag of the oldest
        self.answers = {}  # delivery tag: whether the broker accepted the task
        self.confirmed = 0
        self.confirmed_line = 0
        on_terminal = sys.stderr and sys.stderr.isatty()
        self.counting = on_terminal and not (sys.stdout and sys.stdout.isatty())

    def run(self):
        """Return when every task is confirmed, exit the program if that can't be."""
        self.connect()
        self.loop.start()
        self.count(end="\n")

    def connect(self):
        pika.SelectConnection.create_connection(
            self.nodes, on_done=self.on_connected, custom_ioloop=self.loop
        )

    def on_connected(self, result):
        if isinstance(result, Exception):
            self.on_connection_closed(None, result.exceptions[-1])
        else:
            self.connection = result
            self.connection.add_on_close_callback(self.on_connection_closed)
            self.connection.channel(on_open_callback=self.on_channel_open)

    def on_channel_open(self, channel):
        channel.add_on_close_callback(self.on_channel_closed)
        channel.add_on_return_callback(self.on_returned)
        channel.confirm_delivery(self.on_confirmed)
        channel.queue_declare(
            self.queue,
            durable=True,
            passive=bool(self.refusal),
            callback=lambda _: self.on_queue_declared(channel),
        )

    def on_queue_declared(self, channel):
        self.channel, self.refusal = channel, None
        self.first_tag = 1
        self.answers.clear()
        for _, body in self.unconfirmed:  # from a connection that was lost
            self.publish(body)
        if not self.unconfirmed:
            self.deadline = None
        if not self.reader.ident:
            self.reader.start()

    def read(self):
        # In a thread of its own: a read may block for minutes, heartbeats must not.
        try:
            for line, body in self.tasks:
                for _ in range(permits(body)):
                    self.window.acquire()
                self.loop.add_callback_threadsafe(functools.partial(self.on_task, line, body))
            at_end = self.on_all_read
        except OSError as error:
            at_end = functools.partial(self.give_up, f"Can't read standard input: {error}")
        self.loop.add_callback_threadsafe(at_end)

    def on_task(self, line, body):
        self.unconfirmed.append((line, body))
        if self.channel:
            self.publish(body)

    def publish(self, body):
        self.channel.basic_publish(
            exchange="",
            routing_key=self.queue,
            body=body,
            properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
            mandatory=True,  # without its queue, the task comes back: on_returned()
        )

    def on_confirmed(self, frame):
        if not self.channel:
            return  # it is being closed
        tag, multiple = frame.method.delivery_tag, frame.method.multiple
        for answered in range(self.first_tag, tag + 1) if multiple else (tag,):
            self.answers.setdefault(answered, isinstance(frame.method, pika.spec.Basic.Ack))
        while self.first_tag in self.answers:  # in the order of the tasks
            if not self.answers.pop(self.first_tag):
                refused = "The broker refused a task: is its queue full?"
                if self.deadline is None:
                    self.give_up(refused)
                # Just after a node was lost, its queue may still be electing a leader.
                self.channel = None
                self.connection.close(reply_text=refused)
                return
            self.first_tag += 1
            self.confirmed_line, body = self.unconfirmed.popleft()
            self.confirmed += 1
            self.deadline = None
            self.window.release(permits(body))
            say(f" [x] Sent {shown(body)}")
        self.count()
        self.close_when_done()

    def on_all_read(self):
        self.all_read = True
        self.close_when_done()

    def close_when_done(self):
        if self.all_read and not self.unconfirmed:
            if self.connection.is_open:
                self.connection.close()
            else:
                self.loop.stop()

    def on_returned(self, *_):
        self.give_up(f"There is no queue {self.queue!r} any more")

    def on_channel_closed(self, _channel, reason):
        if not isinstance(reason, pika.exceptions.ChannelClosedByBroker):
            return  # its connection was closed
        undeclared = not self.channel and not self.refusal and "'durable'" not in reason.reply_text
        if undeclared and reason.reply_code in (403, 406):
            # The queue may be there with other properties, or not be this user's to
            # declare. If it is there, it will do.
            self.refusal = reason
            self.connection.channel(on_open_callback=self.on_channel_open)
        else:
            self.give_up(explain(self.refusal or reason))

    def on_connection_closed(self, _connection, reason):
        self.channel = self.refusal = None
        if self.all_read and not self.unconfirmed:
            self.loop.stop()
        elif isinstance(reason, pika.exceptions.ConnectionBlockedTimeout):
            self.give_up("The broker takes no messages: it is short of memory or disk space")
        else:
            if self.deadline is None:
                self.deadline = time.monotonic() + RECONNECT_FOR
                self.count(end="\n")
                complain(f"Connection lost: {explain(reason)}; trying again")
            if time.monotonic() > self.deadline:
                where = ", ".join(f"{node.host}:{node.port}" for node in self.nodes)
                self.give_up(f"No connection to {where}: {explain(reason)}")
            self.loop.call_later(1, self.connect)

    def count(self, end=""):
        if self.counting:
            print(f"\r [x] Sent {self.confirmed}", end=end, file=sys.stderr, flush=True)

    def give_up(self, reason, status=1):
        self.count(end="\n")
        rest = f", send the rest from line {self.confirmed_line + 1} on" if self.confirmed else ""
        complain(f"{reason}; tasks confirmed: {self.confirmed}{rest}")
        sys.exit(status)


def permits(body):
    """Return a body's share of WINDOW, so that large tasks don't fill the memory."""
    return min(WINDOW, 1 + len(body) // 10_000)


def shown(body):
    """Return a body as text that is safe on a terminal: escaped, and not endless."""
    return SHORTENED.repr(body.decode(errors="surrogateescape"))


def say(line):
    try:
        print(line)
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
    while inner := getattr(error, "exception", None):
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


def parse_arguments():
    """Return the command line as pika's connection parameters, queue name and words."""
    urls, queue = os.environ.get("AMQP_URL") or DEFAULT_URL, "task_queue"
    try:
        # Unlike argparse, it takes all from the first word on as text, and starts 5 ms sooner.
        options, words = getopt.getopt(sys.argv[1:], "u:q:h", ["url=", "queue=", "help"])
        for option, value in options:
            if option in ("-h", "--help"):
                say(__doc__.strip())
                sys.exit()
            elif option in ("-u", "--url"):
                urls = value
            else:
                queue = value
        if not queue.isprintable() or not 0 < len(queue.encode()) < 256:
            raise ValueError(f"--queue: there is no such name: {SHORTENED.repr(queue)}")
        if words == ["-"] and not sys.stdin:
            raise ValueError("standard input is closed")
        return nodes_of(urls), queue, words
    except getopt.GetoptError as error:
        problem = error.msg.partition(":")[0]  # behind it, a password might follow
    except ValueError as error:
        problem = error
    complain(f"{problem} (see new_task.py --help)")
    sys.exit(2)


def tasks_of(words):
    """Yield (line number, body) for each task."""
    if words == ["-"]:
        with open(0, "rb", closefd=False) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.removesuffix(b"\n")
    else:
        yield 1, os.fsencode(" ".join(words)) if words else b"Hello World!"


def main():
    if sys.stdout:
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    nodes, queue, words = parse_arguments()
    producer = Producer(nodes, queue, tasks_of(words))
    try:
        producer.run()
    except KeyboardInterrupt:
        producer.give_up("Interrupted", status=130)


if __name__ == "__main__":
    main()
