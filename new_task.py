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
A broker out of reach is an error at once; a connection that is lost in mid-stream is
made anew for up to 30 s.
"""

import collections
import contextlib
import getopt
import math
import os
import re
import reprlib
import select
import signal
import socket
import sys
import threading
import time

import pika
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import AMQPConnectionWorkflowFailed

WINDOW = 1000  # tasks of up to 10 kB that may be on their way at one time
BATCH = 100  # tasks to publish before pika sends them, and hears the broker
RECONNECT_FOR = 30  # seconds to try for, when a connection that worked is lost
BLOCKED_FOR = 15  # seconds to wait for a broker that is short of memory or disk

ERRORS = (pika.exceptions.AMQPError, AMQPConnectionWorkflowFailed, OSError, MemoryError)


class CantSend(Exception):
    """Why the rest of the tasks can't be sent, in words for the user."""


class OutputLost(Exception):
    """Standard output is full, or nobody reads it any more."""


class Stopped(BaseException):
    """A signal has come. As it is no Exception, nobody but main() catches it."""


class Producer:
    """The tutorial's producer is send(); all else is what it leaves out."""

    def __init__(self):
        self.nodes = self.queue = None  # where to, as run() is told
        self.tasks = collections.deque()  # read, to be published: (line number, body)
        self.unconfirmed = collections.deque()  # published, oldest first
        self.oldest_tag = 1  # delivery tag of the first of these
        self.answers = {}  # not yet printed, by delivery tag: whether the broker keeps the task
        self.confirmed = self.confirmed_line = 0  # how many tasks, and the last one's line
        self.room = threading.Semaphore(WINDOW)
        self.reading = True
        self.read_error = None
        self.loop = IOLoop()  # pika works only while we run its loop
        self.news = collections.deque()  # what pika has told us meanwhile
        self.connection = None
        self.retry_until = 0  # time.monotonic(), till when to try; 0 while the connection works

    def send(self):
        # The tutorial's BlockingConnection would wait for each confirmation before the next task.
        # Here many tasks are on their way: pika tells hear() what comes, wait() returns it.
        # When the connection is lost, run() does all of this once more.
        self.oldest_tag, self.answers = 1, {}
        self.news.clear()
        pika.SelectConnection.create_connection(
            self.nodes, on_done=self.hear, custom_ioloop=self.loop
        )
        self.connection = self.wait()
        self.connection.add_on_close_callback(self.hear)

        channel = self.open_channel()
        try:
            channel.queue_declare(queue=self.queue, durable=True, callback=self.hear)
            self.wait()
        except pika.exceptions.ChannelClosedByBroker as refusal:
            channel = self.use_as_it_is(refusal)

        if not self.unconfirmed:  # else a confirmation is to prove that the connection works
            self.retry_until = 0
        self.tasks.extendleft(reversed(self.unconfirmed))  # from a connection that was lost
        self.unconfirmed.clear()
        properties = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
        while self.reading or self.tasks or self.unconfirmed:
            if self.oldest_tag in self.answers and not is_held_up(sys.stdout):
                say(f" [x] Sent {shown(self.take_confirmed())}")
            elif self.news:
                self.note_answer(self.wait().method)
            else:
                for _ in range(min(BATCH, len(self.tasks))):
                    self.unconfirmed.append(self.tasks.popleft())
                    channel.basic_publish(
                        exchange="",
                        routing_key=self.queue,
                        body=self.unconfirmed[-1][1],
                        properties=properties,
                        mandatory=True,  # without its queue, the task comes back
                    )
                self.run_loop()

        self.close(patience=5)

    # ---- What pika tells ----

    def hear(self, *arguments):
        """Keep a callback's last argument: what is open now, what was answered, or an error."""
        self.news.append(arguments[-1])
        self.loop.stop()

    def wait(self):
        """Return what pika tells next, or raise it."""
        while not self.news:
            self.loop.start()
        news = self.news.popleft()
        if isinstance(news, Exception):
            raise news
        return news

    def run_loop(self):
        """Let pika work until there is something to do."""
        self.show_count()
        if self.tasks:  # one turn only
            self.loop.add_callback_threadsafe(self.loop.stop)
        elif self.oldest_tag in self.answers:  # but standard output is held up
            self.loop.call_later(0.1, self.loop.stop)
        self.loop.start()

    def note_answer(self, method):
        tag = method.delivery_tag
        for answered in range(self.oldest_tag, tag + 1) if method.multiple else [tag]:
            # Not those among them that were refused before.
            self.answers.setdefault(answered, isinstance(method, pika.spec.Basic.Ack))

    def take_confirmed(self):
        """Return the body of the oldest task: in the order of the input, not of the answers."""
        if not self.answers.pop(self.oldest_tag):
            raise CantSend("The broker refused a task: is its queue full, or deleted?")
        self.oldest_tag += 1
        self.confirmed_line, body = self.unconfirmed.popleft()
        self.confirmed += 1
        self.retry_until = 0
        self.room.release(size(body))
        return body

    # ---- Connections and channels ----

    def run(self, nodes, queue, words):
        """Send all tasks, over one connection after the other, or raise why it can't be done."""
        self.nodes, self.queue = nodes, queue
        threading.Thread(target=self.read, args=[words], daemon=True).start()
        while True:
            try:
                self.send()
                break
            except (*ERRORS, CantSend) as error:
                blocked = isinstance(error, pika.exceptions.ConnectionBlockedTimeout)
                lost = isinstance(error, pika.exceptions.AMQPConnectionError) and not blocked
                if lost and not self.retry_until:
                    self.retry_until = time.monotonic() + RECONNECT_FOR
                    self.show_count(end="\n")
                    complain(f"Connection lost: {explain(error)}; trying again")
                if time.monotonic() > self.retry_until:
                    raise CantSend(self.describe(error)) from None
            self.close()
            time.sleep(1)
        if self.read_error:
            raise CantSend(f"Can't read standard input: {explain(self.read_error)}")

    def open_channel(self):
        self.connection.channel(on_open_callback=self.hear)
        channel = self.wait()
        channel.add_on_close_callback(self.hear)
        no_queue = CantSend(f"There is no queue {self.queue!r} any more")
        channel.add_on_return_callback(lambda *_: self.hear(no_queue))
        channel.confirm_delivery(self.hear)
        return channel

    def use_as_it_is(self, refusal):
        """Return a new channel, for a queue that this user may not declare so: if it is there.

        It has other properties (406), or may not be configured (403). If it is durable, it will do.
        """
        if refusal.reply_code not in (403, 406) or "'durable'" in refusal.reply_text:
            raise refusal
        channel = self.open_channel()
        try:
            channel.queue_declare(queue=self.queue, passive=True, callback=self.hear)
            self.wait()
        except pika.exceptions.ChannelClosedByBroker:
            raise refusal from None
        return channel

    def close(self, patience=math.inf):
        deadline = time.monotonic() + patience  # seconds, for a broker that says nothing
        if self.connection.is_open:
            self.connection.close()
        while not self.connection.is_closed and time.monotonic() < deadline:
            self.loop.call_later(1, self.loop.stop)
            self.loop.start()

    def describe(self, error):
        if isinstance(error, CantSend):
            return str(error)
        if isinstance(error, AMQPConnectionWorkflowFailed):
            where = ", ".join(f"{node.host}:{node.port}" for node in self.nodes)
            return f"No connection to {where}: {explain(error.exceptions[-1])}"
        too_large = re.search(r"message size (\d+)", str(error))
        for line, body in self.unconfirmed if too_large else []:
            if len(body) == int(too_large[1]):
                return f"Line {line}, {shown(body)}: {explain(error)}"
        return explain(error)

    def show_count(self, end=""):
        """Tell how far we are, on a terminal that does not show the tasks."""
        on_terminal = sys.stderr and sys.stderr.isatty()
        if on_terminal and not is_held_up(sys.stderr) and not (sys.stdout and sys.stdout.isatty()):
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), f"\r [x] Sent {self.confirmed}{end}".encode())

    # ---- Input ----

    def read(self, words):
        """Read tasks, in a thread of its own: it may wait for minutes, heartbeats must not."""
        try:
            for line, body in tasks_of(words):
                for _ in range(size(body)):
                    self.room.acquire()
                self.tasks.append((line, body))
                if len(self.tasks) == 1:  # while there are more, send() does not wait for one
                    self.loop.add_callback_threadsafe(self.loop.stop)
        except Exception as error:
            self.read_error = error
        self.reading = False
        self.loop.add_callback_threadsafe(self.loop.stop)


def tasks_of(words):
    """Yield (line number, body) for each task."""
    if words != ["-"]:
        yield 1, os.fsencode(" ".join(words)) if words else b"Hello World!"
        return
    # Some programs leave a pipe non-blocking: a pause would look like its end.
    with contextlib.suppress(AttributeError, OSError):  # on Windows
        os.set_blocking(0, True)
    with open(0, "rb", closefd=False) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.removesuffix(b"\n")


def size(body):
    """Return a body's share of WINDOW, so that large ones don't fill the memory."""
    return min(WINDOW, 1 + len(body) // 10_000)


# ---- The terminal ----

HINTS = {  # words of an error: what to do about it
    "Connection refused": "is RabbitMQ running there? To start it: docker compose up -d --wait, "
    "or: sudo systemctl start rabbitmq-server",
    "AuthenticationError": "check user and password in the URL",
    "AccessDeniedError(?!.* limit )": "check the virtual host in the URL",
    "IncompatibleProtocolError": "is the broker still starting? Or is it no AMQP port? "
    "TLS needs amqps://",
    "WRONG_VERSION_NUMBER": "is it a port without TLS? Then the URL begins with amqp://",
    "CERTIFICATE": "name a CA of your own in the URL: ?ssl_options={'ca_certs':'/path/ca.pem'}",
    "'durable'": "its tasks would not survive a restart: delete it or take another --queue",
    "BlockedTimeout": "the broker takes no messages: it is short of memory or disk space",
    "MemoryError": "a task has to fit into memory several times",
}

SHORTENED = reprlib.Repr()
SHORTENED.maxstring = 200  # characters


def is_held_up(stream):
    """Whether a write would have to wait for a reader that pauses, and heartbeats with it."""
    try:
        return bool(stream) and not select.select([], [stream], [], 0)[1]
    except OSError:  # Windows can't tell
        return False


def shown(body):
    """Return a body as text that is safe on a terminal: escaped, and not endless."""
    return SHORTENED.repr(body.decode(errors="surrogateescape"))


def say(line, **options):
    try:
        print(line, **options)
    except OSError as error:
        # Python would try once more at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputLost(error) from None


def complain(text):
    """Write a line to standard error. Nobody may be there to read it: that is no error."""
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    if sys.stderr:
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f" [!] {line}\n".encode(errors="backslashreplace"))


def explain(error):
    """Return on one line the error that pika has wrapped in others, and what to do about it."""
    while inner := getattr(error, "exception", None) or next(
        (arg for arg in error.args if isinstance(arg, Exception)), None
    ):
        error = inner
    text = getattr(error, "reply_text", None) or f"{type(error).__name__}: {error}"
    return "; ".join([text, *(hint for words, hint in HINTS.items() if re.search(words, text))])


# ---- The command line ----

DEFAULTS = {  # option: its value where it is not given
    "--url": os.environ.get("AMQP_URL") or "amqp://guest:guest@localhost:5672/%2F",
    "--queue": "task_queue",
}
LETTERS = "u:q:h"
SHORT = {"-u": "--url", "-q": "--queue", "-h": "--help"}
LONGEST_NAME = 255  # bytes of a queue's name

LAST_WORDS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}


def read_command_line():
    """Return the options' values by name, and the words behind them."""
    names = ["help", *(f"{name[2:]}=" for name in DEFAULTS)]
    try:
        # Unlike argparse, it takes all from the first word on as it is.
        given, words = getopt.getopt(sys.argv[1:], LETTERS, names)
    except getopt.GetoptError as error:
        wrong_usage(error.msg.partition(":")[0])  # behind it, a password might follow
    options = {**DEFAULTS, **{SHORT.get(name, name): value for name, value in given}}
    if "--help" in options:
        say(__doc__.strip())
        sys.exit()
    queue = options["--queue"]
    if not queue.isprintable() or not 0 < len(queue.encode()) <= LONGEST_NAME:
        wrong_usage(f"--queue: expected 1 to {LONGEST_NAME} bytes, not {SHORTENED.repr(queue)}")
    return options, words


def wrong_usage(problem):
    complain(f"{problem} (see {os.path.basename(sys.argv[0])} --help)")
    sys.exit(2)


def nodes_of(urls):
    """Return pika's connection parameters for each of some comma-separated AMQP URLs."""
    nodes = []
    for url in re.split(",(?=amqps?://)", urls):
        try:
            # With a character in the password that should be escaped, a piece of it would be
            # taken for the host, and printed.
            if not re.fullmatch("amqps?://([^@/?#]*@)?[^@#]*", url):
                raise ValueError
            node = pika.URLParameters(url)
            node.host.encode("idna")
        except Exception:
            # Whatever pika stumbled on. Its message may quote a password, so it is not shown.
            wrong_usage(
                "URL: expected amqp://USER:PASSWORD@HOST:PORT/VHOST, special characters as in %40"
            )
        if node.blocked_connection_timeout is None:
            node.blocked_connection_timeout = BLOCKED_FOR
        name = f"{os.path.basename(sys.argv[0])}, process {os.getpid()} on {socket.gethostname()}"
        node.client_properties = {"connection_name": name, **(node.client_properties or {})}
        nodes.append(node)
    return nodes


def on_signal(number, _):
    for each in LAST_WORDS:  # which a second signal must not interrupt with a traceback
        signal.signal(each, signal.SIG_DFL)
    raise Stopped(number)


def main():
    if sys.stdout:
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    producer, status, problem = Producer(), 1, None
    try:
        for number in LAST_WORDS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as in the background
                signal.signal(number, on_signal)
        options, words = read_command_line()
        nodes = nodes_of(options["--url"])
        if words == ["-"] and not sys.stdin:
            wrong_usage("standard input is closed")
        producer.run(nodes, options["--queue"], words)
        status = 0
    except CantSend as error:
        problem = error
    except OutputLost as lost:
        problem = f"Can't write to standard output: {explain(lost)}"
    except Stopped as stop:
        problem, status = LAST_WORDS[stop.args[0]], 128 + stop.args[0]
    producer.show_count(end="\n")
    if problem:
        rest = f", send the rest from line {producer.confirmed_line + 1} on"
        done = f"{producer.confirmed}{rest if producer.confirmed else ''}"
        complain(f"{problem}; tasks confirmed: {done}")
    sys.exit(status)


if __name__ == "__main__":
    main()
