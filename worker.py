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

In the source, consume() and callback() are RabbitMQ's tutorial; what it leaves out follows.
"""

import collections
import contextlib
import getopt
import math
import os
import re
import reprlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pika
from pika.adapters.utils.connection_workflow import AMQPConnectorException

LONGEST_PAUSE = 30  # seconds between two attempts to do what can't be done yet
BLOCKED_FOR = 1  # second to wait, without heartbeats, for a broker short of memory or disk
GRACE = 5  # seconds that a command has to end in, when told to
MAX_DELIVERIES = 15  # of a task that is never finished; quorum queues drop it after 20

ERRORS = (pika.exceptions.AMQPError, AMQPConnectorException, OSError)  # what pika raises
# Windows lacks two of these.
INTERRUPT = {getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGHUP", "SIGQUIT")}
ANY_SIGNAL = {signal.SIGTERM, *INTERRUPT}


class TaskLost(Exception):
    """The broker has taken the task in hand back, and gives it to another worker."""


class OutputLost(Exception):
    """Standard output is full, or nobody reads it any more."""


class Worker:
    """Consumes one queue, a task at a time, over as many connections as it takes."""

    def __init__(self, nodes, queue, command, prefetch_count, retries, retry_delay, time_limit):
        self.nodes = nodes
        self.queue = queue
        self.command = command  # none: sleep
        self.prefetch_count = prefetch_count
        self.retries = retries
        self.retry_delay = retry_delay
        self.time_limit = time_limit
        self.pause = 1  # seconds until the next attempt to connect
        self.connected_before = False
        self.signals = []  # that have come, to stop this worker
        self.exit_signals = ANY_SIGNAL  # see on_signal()

    def consume(self, connection):
        channel = connection.channel()
        try:
            channel.queue_declare(queue=self.queue, durable=True)
        except pika.exceptions.ChannelClosedByBroker as refusal:
            channel = use_as_it_is(connection, self.queue, refusal)

        channel.basic_qos(prefetch_count=self.prefetch_count)

        # The tutorial does the task in this callback. But pika passes on no news while one
        # runs, not even that the broker took the task back: here the loop below does it.
        tasks = collections.deque()
        channel.basic_consume(
            queue=self.queue, on_message_callback=lambda *task: tasks.append(task)
        )

        say(" [*] Waiting for messages. To exit press CTRL+C")
        self.pause = 1
        self.connected_before = True

        while True:
            self.exit_on(INTERRUPT if tasks else ANY_SIGNAL)
            connection.process_data_events(time_limit=0 if tasks else None)
            self.exit_on(INTERRUPT)
            if not channel.consumer_tags:
                raise TaskLost
            if tasks and not self.signals:
                self.callback(*tasks.popleft())
            if self.signals:
                self.give_back_and_exit(channel)

    def callback(self, ch, method, properties, body):
        say(f" [x] Received {shown(body)}{' (redelivered)' if method.redelivered else ''}")

        deliveries = count(properties, "x-delivery-count") if method.redelivered else 0
        if deliveries >= MAX_DELIVERIES:
            failure, retries = f"delivered {deliveries} times, never finished", 0
        else:
            failure = self.run_command(ch, body) if self.command else self.sleep(ch, body)
            retries = self.retries
        if failure:
            self.move_failed_task(ch, properties, body, failure, retries)

        if self.signals:
            ch.stop_consuming()  # or the acknowledgement would bring the next task
        ch.basic_ack(delivery_tag=method.delivery_tag)
        if not failure:
            say(" [x] Done")

    # ---- The work: a function for each kind, which returns why it failed, or None ----

    def sleep(self, ch, body):
        dots = body.count(b".")
        on_terminal = dots and sys.stdout and sys.stdout.isatty()
        begin = time.monotonic()
        try:
            for second in range(1, dots + 1):
                self.wait_until(begin + min(second, self.time_limit), ch)
                if second > self.time_limit:
                    return f"time limit of {self.time_limit:g} s"
                if on_terminal:
                    say(".", end="", flush=True)
        finally:
            if on_terminal:
                say("")
        return None

    def run_command(self, ch, body):
        self.exit_on(set())  # first the command has to be ended
        process = self.keep_trying(f"run {self.command[0]}", ch, start_command, self.command, body)
        begin = now = time.monotonic()
        try:
            while process.poll() is None and not self.is_interrupted():
                if now - begin >= self.time_limit:
                    return f"time limit of {self.time_limit:g} s"
                # Often at first, so that a short command takes no longer than it needs.
                look_again = now + min(max(0.001, (now - begin) / 10), 0.1)
                self.wait_until(min(look_again, begin + self.time_limit), ch)
                now = time.monotonic()
        finally:
            if process.poll() is None:
                self.end_command(process, ch.connection)
            self.exit_on(INTERRUPT)

        if process.returncode < 0:
            return f"signal {-process.returncode}: {signal.strsignal(-process.returncode)}"
        return f"exit status {process.returncode}" if process.returncode else None

    def wait_until(self, moment, ch):
        """Sleep, but answer heartbeats; raise TaskLost when the broker takes the task back."""
        while True:
            seconds = moment - time.monotonic()
            ch.connection.process_data_events(time_limit=max(0, seconds))
            if not ch.consumer_tags:
                raise TaskLost
            if seconds <= 0:
                return

    def end_command(self, process, connection):
        """End a command and all that it has started: politely, after GRACE seconds not."""
        deadline = time.monotonic() + GRACE
        left = signal_group(process, signal.SIGTERM)
        # Who presses CTRL+C again is in a hurry.
        while left and time.monotonic() < deadline and self.signals.count(signal.SIGINT) < 2:
            sleep_with_heartbeats(connection, 0.02)
            left = signal_group(process, 0)
        if signal_group(process, signal.SIGKILL) != "another user's":
            process.wait()
            return
        complain(f"Can't end {self.command[0]}, process {process.pid}, which is another user's")
        while signal_group(process, 0) and not self.is_interrupted():  # or there would be two
            sleep_with_heartbeats(connection, 0.1)

    # ---- A task that failed: its copy goes to another queue, then it is acknowledged ----

    def move_failed_task(self, ch, properties, body, failure, retries):
        """Publish a copy to QUEUE.retry or, when all retries are used up, to QUEUE.dlq."""
        headers, lost = copyable(properties.headers or {})
        # A dead letter that is worked off has all its tries again.
        tries = 0 if headers.pop("x-last-error", None) else count(properties, "x-retry-count")
        if tries < retries:
            queue = f"{self.queue}.retry"
            what_next = f"to be tried again in {self.retry_delay:g} s"
            headers["x-retry-count"] = tries + 1
            properties.expiration = str(round(1000 * self.retry_delay))
            # When a copy expires there, the broker returns it to this queue.
            arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": self.queue}
        else:
            queue = f"{self.queue}.dlq"
            what_next = f"it goes to {queue}"
            headers["x-retry-count"] = tries
            headers["x-last-error"] = failure
            properties.expiration = None  # or the dead letter would vanish
            arguments = None
        properties.headers = headers
        properties.user_id = None  # the broker takes no other than the connection's
        properties.delivery_mode = pika.DeliveryMode.Persistent.value

        without = f", without what pika can't send: {', '.join(lost)}" if lost else ""
        say(f" [!] Failed: {failure}; {what_next}{without}")
        doing = f"put the failed task into {queue}"
        self.keep_trying(doing, ch, self.publish, ch, queue, arguments, properties, body)

    def publish(self, ch, queue, arguments, properties, body):
        # Not on the worker's connection: in an alarm, the broker blocks one that publishes.
        connection = pika.BlockingConnection(self.nodes)
        try:
            # In an alarm the broker reads no further than the first message, until it is over. So
            # an empty one goes first, to no queue: a copy that had to wait would come later, too.
            connection.channel().basic_publish(exchange="", routing_key="", body=b"")
            channel = declare_for_copies(connection, queue, arguments)
            channel.confirm_delivery()
            self.wait_until(time.monotonic(), ch)  # is the task still ours?
            channel.basic_publish(
                exchange="", routing_key=queue, body=body, properties=properties, mandatory=True
            )
        finally:
            if not self.is_interrupted():  # in an alarm, it would take BLOCKED_FOR
                with contextlib.suppress(*ERRORS):
                    connection.close()

    def keep_trying(self, doing, ch, function, *arguments):
        """Return what a function returns, as soon as it can. Its task stays in hand meanwhile.

        To give the task back would count as a delivery, and after 20 the broker drops it.
        """
        while True:
            try:
                return function(*arguments)
            except ERRORS as error:
                if not ch.is_open:
                    raise
                problem = f"Can't {doing}: {explain(error)}"
            if self.signals:
                complain(problem)
                self.give_back_and_exit(ch)
            complain(f"{problem}; trying again in {LONGEST_PAUSE} s")
            again_at = time.monotonic() + LONGEST_PAUSE
            while time.monotonic() < again_at:
                self.wait_until(time.monotonic() + 0.1, ch)
                if self.signals:
                    self.give_back_and_exit(ch)

    # ---- Connections and signals ----

    def run(self):
        """Work over one connection after the other; exit if no broker will ever let us in."""
        if hasattr(signal, "SIGCHLD"):  # ignored, it would make every command a success
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in ANY_SIGNAL:
            if signal.getsignal(number) != signal.SIG_IGN:  # as in the background, or under nohup
                signal.signal(number, self.on_signal)
        told = None
        while True:
            connection = None
            try:
                connection = pika.BlockingConnection(self.nodes)
                self.consume(connection)
            except TaskLost:
                problem = why_lost(connection, self.queue)
            except ERRORS as error:
                problem = explain(error)
                permanent = re.search(PERMANENT, repr(error)) and not re.search(PASSING, problem)
                if permanent and not self.connected_before:
                    complain(problem)
                    sys.exit(1)
            if self.signals:
                complain(problem)
            self.exit_on(ANY_SIGNAL)
            line = problem.partition("; ")[0] if problem == told else problem  # a hint once
            told = problem
            complain(f"{line}; trying again in {self.pause} s")
            if connection:
                with contextlib.suppress(pika.exceptions.AMQPError):
                    connection.close()
            time.sleep(self.pause)
            self.pause = min(2 * self.pause, LONGEST_PAUSE)

    # Which signals end the worker at once? While it waits: all. While it works: CTRL+C and its
    # like. While it has a command to end first: none. The others are only noted.

    def on_signal(self, number, _):
        self.signals.append(number)
        if number in self.exit_signals:
            self.exit()

    def exit_on(self, signals):
        """Exit if one of these signals has come, or as soon as one comes."""
        self.exit_signals = signals
        if signals.intersection(self.signals):
            self.exit()

    def is_interrupted(self):
        return bool(INTERRUPT.intersection(self.signals))

    def exit(self):
        sys.exit(130 if self.is_interrupted() else 0)

    def give_back_and_exit(self, channel):
        """Give back the tasks that were not begun, or can't be finished, and exit."""
        self.exit_signals = INTERRUPT
        channel.stop_consuming()
        channel.basic_nack(0, multiple=True, requeue=True)
        channel.connection.close()
        self.exit()


def start_command(command, body):
    """Start a command in a process group of its own, with a task as its standard input."""
    with tempfile.TemporaryFile() as task:
        task.write(body)
        task.seek(0)
        return subprocess.Popen(command, stdin=task, start_new_session=True)


def signal_group(process, number):
    """Send a signal to a command and all that it has started, 0 for none; tell what is left."""
    # Who has ended is still there until waited for; as process 1, we inherit orphans, too.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-process.pid, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "another user's"
    return "ours"


def sleep_with_heartbeats(connection, seconds):
    if connection.is_open:
        with contextlib.suppress(pika.exceptions.AMQPError):
            connection.sleep(seconds)
    else:
        time.sleep(seconds)


# ---- Queues and messages ----

# When a task expires in a queue with these, it is gone only once it is stored in its next queue.
LOSE_NONE = {
    "x-queue-type": "quorum",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}
# How the broker says which property of a queue differs from what was asked for.
DIFFERENCE = r"arg '(x-[\w-]+)' .* current is (?:the value )?'([^']*)'"
# Headers by which it would route, count or drop a copy.
NOT_COPIED = "CC|BCC|x-death|x-(first|last)-death-.*|x-(delivery|acquired)-count"


def use_as_it_is(connection, queue, refusal):
    """Return a new channel, for a queue that the broker has refused to declare as asked.

    It has other properties (406), or this user may not configure it (403). As long as it is
    there, and durable, it will do. Otherwise: raise why not.
    """
    if refusal.reply_code not in (403, 406) or "'durable'" in refusal.reply_text:
        raise refusal
    channel = connection.channel()
    try:
        channel.queue_declare(queue=queue, passive=True)
    except pika.exceptions.ChannelClosedByBroker:
        raise refusal from None
    return channel


def declare_for_copies(connection, queue, arguments):
    """Return a channel, with the queue declared, that failed tasks are to go to.

    With arguments, their copies have to come back from there: a new queue is to lose none. One
    that is there may have other properties, as long as these hold and it does not expire itself.
    The broker names only the first that differs: so ask again with it, until all are known.
    """
    if arguments:
        with contextlib.suppress(pika.exceptions.ChannelClosedByBroker):
            channel = connection.channel()
            channel.queue_declare(queue=queue, durable=True, arguments={**arguments, **LOSE_NONE})
            return channel
    while True:
        channel = connection.channel()
        try:
            channel.queue_declare(queue=queue, durable=True, arguments=arguments)
            return channel
        except pika.exceptions.ChannelClosedByBroker as refusal:
            if refusal.reply_code == 403 or not arguments:
                return use_as_it_is(connection, queue, refusal)
            found = re.search(DIFFERENCE, refusal.reply_text)
            if not found or found[1] in {*arguments, "x-expires"}:
                raise
            name, value = found.groups()
            value = True if value == "true" else int(value) if value.isdigit() else value
            arguments = {**arguments, name: value}


def why_lost(connection, queue):
    """Say why the broker has taken its tasks back. Whether the queue is still there tells."""
    try:
        # While a quorum queue is being deleted, it is there for a moment longer.
        sleep_with_heartbeats(connection, 0.5)
        connection.channel().queue_declare(queue=queue, passive=True)
    except pika.exceptions.ChannelClosedByBroker as error:
        return f"The broker cancelled the consumer, its queue is gone: {explain(error)}"
    except pika.exceptions.AMQPError as error:
        return explain(error)
    return (
        "The broker cancelled the consumer: for tasks that take longer than consumer_timeout, "
        "raise consumer_timeout in rabbitmq.conf"
    )


def count(properties, name):
    """Return the number in a header, 0 where a stranger has put something else there."""
    value = (properties.headers or {}).get(name)
    return min(max(0, value), 2**62) if isinstance(value, int) else 0


def copyable(headers):
    """Return the sender's headers, and the names of those that pika has read but can't send."""
    kept, lost = {}, []
    for name, value in headers.items():
        if re.fullmatch(NOT_COPIED, str(name)):  # one that is not UTF-8 comes as bytes
            continue
        try:
            pika.BasicProperties(headers={name: value}).encode()
            kept[name] = value
        except Exception:  # pika lets pass what struct raises, and more
            lost.append(SHORTENED.repr(name))
    return kept, lost


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
    # How pika reports what it can't read.
    "lost: ValueError": "pika can't read a message of this queue; a date past the year 9999 in its "
    "headers is such a case. Take it out in RabbitMQ's management page: Get messages, "
    "Automatic ack",
    "BlockedTimeout": "the broker takes no messages: it is short of memory or disk space",
    "NackError": "the broker refused it: is that queue full?",
    "Exec format": "does it begin with a line like #!/bin/sh?",
}
# Login, permission, queue, virtual host, certificate: refused today, refused tomorrow ...
PERMANENT = r"\((403|406|530)\)|CERTIFICATE_VERIFY_FAILED"
PASSING = " limit |exclusive"  # ... but for these reasons of the broker's

SHORTENED = reprlib.Repr()
SHORTENED.maxstring = 200  # characters


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
    "--prefetch-count": "1",
    "--retries": "3",
    "--retry-delay": "30",
    "--time-limit": "inf",
}
LETTERS = "u:q:p:h"
SHORT = {"-u": "--url", "-q": "--queue", "-p": "--prefetch-count", "-h": "--help"}
LONGEST_NAME = 249  # bytes of a queue's name: with .retry behind it, it has the 255 of AMQP

NUMBERS = {  # option: type, lowest and highest value, and how to call these
    "--prefetch-count": (int, 0, 65535, "a whole number from 0 to 65535"),
    "--retries": (int, 0, math.inf, "a whole number, 0 or more"),
    "--retry-delay": (float, 0, 4_294_967, "seconds, from 0 to 4294967"),  # 32 bits of ms
    "--time-limit": (float, 0.001, math.inf, "seconds, 0.001 or more"),
}


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


def number_of(options, name):
    kind, lowest, highest, expected = NUMBERS[name]
    with contextlib.suppress(ValueError):
        if lowest <= kind(options[name]) <= highest:
            return kind(options[name])
    return wrong_usage(f"{name}: expected {expected}")


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


def main():
    if sys.stdout:
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        options, command = read_command_line()
        nodes = nodes_of(options["--url"])
        numbers = {name[2:].replace("-", "_"): number_of(options, name) for name in NUMBERS}
        if command and not shutil.which(command[0]):
            complain(f"Can't run {command[0]}: there is no such command, or it is not executable")
            sys.exit(1)
        if command and not hasattr(os, "killpg"):
            complain("Can't run commands on this system, which has no process groups")
            sys.exit(1)
        Worker(nodes, options["--queue"], command, **numbers).run()
    except OutputLost as lost:
        if not isinstance(lost.args[0], BrokenPipeError):  # the end of `| head` is no error
            complain(f"Can't write to standard output: {explain(lost)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
