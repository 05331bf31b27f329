#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pika>=1.3.2,<2"]
# ///
"""Process the tasks that new_task.py sends to a RabbitMQ work queue.

  worker.py                                  sleep a second for each dot in a task
  worker.py --prefetch-count 0               no limit on prefetched tasks: round-robin dispatch
  worker.py -q thumbs --function thumbs:make call a Python function with each task, as bytes
  worker.py -q thumbs ./thumb.sh             run a command for each task, with the task on stdin

Start as many workers as you like: each task goes to one of them. It is acknowledged when
done, so if a worker dies, another gets its task, which may then be done twice. A failed
task is retried via QUEUE.retry; after the last retry it is moved to QUEUE.dlq. CTRL+C stops
a worker; SIGTERM lets it finish its task; a second signal stops it at once.
"""

import argparse
import collections
import contextlib
import inspect
import math
import os
import pkgutil
import re
import reprlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import pika
from pika.adapters.utils.connection_workflow import AMQPConnectorException

TICK = 0.1  # maximum seconds between checks of the connection and signals
LONGEST_PAUSE = 30  # seconds between attempts
STABLE_AFTER = 60  # seconds connected, after which the pauses restart at 1
GRACE = 5  # seconds between SIGTERM and SIGKILL for a command
MAX_DELIVERIES = 15  # of a task that is never finished; a quorum queue would drop it after 20

# What pika may raise.
ERRORS = (pika.exceptions.AMQPError, AMQPConnectorException, OSError, ValueError)
# Windows lacks two of these.
INTERRUPTS = {getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGHUP", "SIGQUIT")}


class TimeLimitExceeded(Exception):
    """The task in hand has taken longer than --time-limit."""


class Worker:
    """Consumes a queue, one task at a time, and reconnects when necessary."""

    def __init__(self, options):
        self.options = options
        self.has_consumed = False
        self.pause = 1  # seconds until the next attempt to connect
        self.signals = []  # received so far
        self.busy = False  # a task is in hand, so a first signal is left to wait() and consume()
        self.working = False  # a process may be running, so every signal is left to wait()
        self.deadline = math.inf  # of the task, by time.monotonic()
        self.process = None  # in which the function is called; self.pipe leads to it

    def consume(self, connection):
        queue = self.options.queue
        channel = declare(connection, queue)
        channel.basic_qos(prefetch_count=self.options.prefetch_count)

        # The tutorial does the work in this callback. But until it returns, pika can't report that
        # the broker has cancelled the consumer, so the loop below does the work.
        deliveries = collections.deque()
        channel.basic_consume(queue, on_message_callback=lambda *args: deliveries.append(args))

        say(" [*] Waiting for messages. To exit press CTRL+C")
        self.has_consumed = True
        while channel.consumer_tags:  # until the broker cancels the consumer
            if deliveries and not self.signals:
                self.busy = True
                self.process_task(*deliveries.popleft())
            self.busy = bool(deliveries)
            if self.signals:
                channel.stop_consuming()
                # Give back what was prefetched. Closing the connection would do that, too, but a
                # quorum queue counts it as a failed delivery, and drops a task after 20.
                channel.basic_nack(0, multiple=True, requeue=True)  # 0: all unacknowledged
                connection.close()
                self.exit()
            connection.process_data_events(time_limit=0 if deliveries else None)
        raise pika.exceptions.ConsumerCancelled(CANCELLED)

    def process_task(self, ch, method, properties, body):
        say(f" [x] Received {shown(body)}{' (redelivered)' if method.redelivered else ''}")

        # Unless a task is redelivered, x-delivery-count may come from the sender.
        deliveries = count_in(properties.headers, "x-delivery-count") if method.redelivered else 0
        retries = self.options.retries
        if deliveries >= MAX_DELIVERIES:
            failure = f"delivered {deliveries} times, never finished"
            retries = 0
        else:
            failure = self.work(ch, body)
        if failure:
            self.move_failed_task(ch, properties, body, printable(failure)[:300], retries)

        if self.signals:
            ch.stop_consuming()  # otherwise the acknowledgement would bring the next task
        ch.basic_ack(delivery_tag=method.delivery_tag)
        self.pause = 1
        if not failure:
            say(" [x] Done")

    # ---- The work ----

    def work(self, ch, body):
        """Do a task. Return None when it is done, or why it failed.

        Code of your own here must not raise errors, and must call self.wait(ch) often.
        """
        self.working = bool(self.options.function or self.options.command)
        try:
            if self.options.function:
                return self.call_function(ch, body)
            if self.options.command:
                return self.run_command(ch, body)
            return self.sleep(ch, body)
        except TimeLimitExceeded:
            return f"time limit of {self.options.time_limit:g} s"
        finally:
            self.working, self.deadline = False, math.inf
            for stream in (sys.stdout, sys.stderr):  # some commands leave them non-blocking
                with contextlib.suppress(AttributeError):  # on Windows
                    os.set_blocking(stream.fileno(), True)

    def wait(self, ch, until=None):
        """Wait until a moment of time.monotonic(), by default now; let pika answer heartbeats.

        Raises ConsumerCancelled if the broker has taken the task back, TimeLimitExceeded if the
        task's deadline comes first, SystemExit if a signal says to stop at once.
        """
        until = until or time.monotonic()
        while True:
            left = min(until, self.deadline) - time.monotonic()
            ch.connection.process_data_events(time_limit=min(max(0, left), TICK))
            if not ch.consumer_tags:
                raise pika.exceptions.ConsumerCancelled(CANCELLED)
            if INTERRUPTS.intersection(self.signals) or len(self.signals) > 1:
                self.exit()
            if left <= 0:
                if self.deadline < until:
                    raise TimeLimitExceeded
                return

    def sleep(self, ch, body):
        """Sleep a second for each dot."""
        start = time.monotonic()
        self.deadline = start + self.options.time_limit
        dots = body.count(b".")
        show_dots = dots and sys.stdout.isatty()
        try:
            for second in range(1, dots + 1):
                self.wait(ch, start + second)
                if show_dots:
                    say(".", end="", flush=True)
        finally:
            if show_dots and len(self.signals) < 2:  # a stopped terminal would block
                say("")

    def run_command(self, ch, body):
        process = self.start_command(ch, body)
        try:
            self.deadline = time.monotonic() + self.options.time_limit
            while process.poll() is None:
                try:
                    process.wait(TICK)
                except subprocess.TimeoutExpired:
                    self.wait(ch)
        except BaseException:
            self.terminate(process)
            raise
        return outcome(process.returncode)

    def start_command(self, ch, body):
        """Start the command in a process group of its own, with a task as its standard input."""
        command = self.options.command
        while True:
            try:
                with tempfile.TemporaryFile() as stdin:
                    stdin.write(body)
                    stdin.seek(0)
                    return subprocess.Popen(command, stdin=stdin, start_new_session=True)
            except OSError as error:
                self.keep_in_hand(ch, f"Can't run {command[0]}: {explain(error)}")

    def terminate(self, process):
        """End a command, and all that it has started: with SIGTERM, finally with SIGKILL."""
        deadline = time.monotonic() + GRACE
        with contextlib.suppress(ProcessLookupError, PermissionError):  # ended, or another user's
            os.killpg(process.pid, signal.SIGTERM)
            while time.monotonic() < deadline and len(self.signals) < 2:
                process.poll()  # reap it: a zombie still counts as alive
                os.killpg(process.pid, 0)  # is any of them left?
                time.sleep(0.02)
        kill_group(process)

    def call_function(self, ch, body):
        """Call the function in its process, which may have ended since the last task."""
        if self.process.poll() is not None or self.pipe.poll():  # the pipe's end
            kill_group(self.process)
            while problem := self.start_function(ch):
                self.keep_in_hand(ch, f"Can't call {self.options.function}: {problem}")
        self.deadline = time.monotonic() + self.options.time_limit
        with contextlib.suppress(OSError):  # it has ended just now
            self.pipe.send_bytes(body)
        return self.wait_for_answer(ch)

    def start_function(self, ch=None):
        """Start the function's process: this script once more, see serve().

        Return None when it is ready, or why it is not.
        """
        import multiprocessing  # costs a MiB

        try:
            self.pipe, theirs = multiprocessing.Pipe()
            with theirs:
                fd = theirs.fileno()
                command = [sys.executable, __file__, f"--serve={fd}", *sys.argv[1:]]
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[fd], start_new_session=True
                )
        except OSError as error:
            return explain(error)
        return self.wait_for_answer(ch)

    def wait_for_answer(self, ch):
        """Wait for the answer of the function's process: None, or why the call failed.

        If the wait ends in any other way, the process is killed.
        """
        try:
            while not self.pipe.poll(TICK) and self.process.poll() is None:
                if ch:
                    self.wait(ch)
        except BaseException:
            kill_group(self.process)
            raise
        with contextlib.suppress(EOFError, OSError):  # it has ended without an answer
            if self.pipe.poll():
                return self.pipe.recv_bytes().decode() or None
        kill_group(self.process)
        return outcome(self.process.poll()) or "its process ended without an answer"

    def keep_in_hand(self, ch, problem):
        """Keep a task that can't be finished now, until the next attempt.

        Requeued, it would come back at once, and a quorum queue may drop it after 20 deliveries.
        """
        self.exit_or_report(problem, LONGEST_PAUSE)
        self.wait(ch, time.monotonic() + LONGEST_PAUSE)
        self.busy = True

    # ---- Tasks that fail ----

    def move_failed_task(self, ch, properties, body, failure, retries):
        """Publish a copy to QUEUE.retry or, when its retries are used up, to QUEUE.dlq.

        Then say so, on standard output, where the outcome of every task is printed.
        """
        headers = properties.headers or {}
        # x-last-error marks a dead letter being reprocessed: it gets all its retries again.
        retried = 0 if "x-last-error" in headers else count_in(headers, "x-retry-count")
        copied = [name for name in headers if not re.fullmatch(NOT_COPIED, str(name))]
        properties.headers = {name: headers[name] for name in copied}
        try:
            properties.encode()
        except Exception:  # pika can't encode all that it decodes
            properties.headers = {}
        properties.user_id = None  # the broker would refuse another user's
        properties.delivery_mode = pika.DeliveryMode.Persistent.value  # pika wants the number here
        if retried < retries:
            queue = f"{self.options.queue}.retry"
            arguments = {**RETRY_ARGUMENTS, "x-dead-letter-routing-key": self.options.queue}
            properties.expiration = str(round(1000 * self.options.retry_delay))
            properties.headers["x-retry-count"] = retried + 1
            fate = f"retrying in {self.options.retry_delay:g} s"
        else:
            queue, arguments = f"{self.options.queue}.dlq", None
            properties.expiration = None
            properties.headers["x-retry-count"] = retried
            properties.headers["x-last-error"] = failure
            fate = f"moved to {queue}"

        while True:
            try:
                self.publish_copy(ch, queue, arguments, properties, body)
                break
            except pika.exceptions.AMQPChannelError as error:
                if not ch.consumer_tags:
                    raise  # the task is no longer ours
                self.keep_in_hand(ch, f"Can't move the failed task to {queue}: {explain(error)}")
        say(f" [!] Failed: {failure}; {fate}")

    def publish_copy(self, ch, queue, arguments, properties, body):
        """Publish to a queue, and wait for the publisher confirm, however long an alarm lasts."""
        # On a channel of its own, as errors close it.
        channel = declare(ch.connection, queue, arguments)
        channel.confirm_delivery()
        self.wait(ch)  # is the task still ours?
        try:
            channel.basic_publish(
                exchange="", routing_key=queue, body=body, properties=properties, mandatory=True
            )
        except (pika.exceptions.NackError, pika.exceptions.UnroutableError):
            channel.close()
            raise
        channel.close()

    # ---- Connections and signals ----

    def run(self):
        """Consume, and reconnect when necessary; exit if the broker permanently refuses access."""
        for number in (signal.SIGTERM, *INTERRUPTS):
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored in the background, or by nohup
                signal.signal(number, self.on_signal)
        if self.options.function and (problem := self.start_function()):
            complain(f"Can't call {self.options.function}: {problem}")
            sys.exit(1)
        while True:
            connection = None
            try:
                connection = pika.BlockingConnection(self.options.nodes)
                connected_at = time.monotonic()
                self.consume(connection)
            except ERRORS as error:
                if not self.has_consumed and re.match(PERMANENT, repr(error)):
                    complain(explain(error))
                    sys.exit(1)
                if connection and time.monotonic() > connected_at + STABLE_AFTER:
                    self.pause = 1
                self.exit_or_report(explain(error), self.pause)
            if connection:
                with contextlib.suppress(pika.exceptions.AMQPError):
                    connection.close()
            time.sleep(self.pause)
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
            # The next node first: pika tries none after one whose name can't be resolved.
            self.options.nodes.append(self.options.nodes.pop(0))

    def exit_or_report(self, problem, pause):
        """Report why the work can't go on for now. From here on, any signal exits at once."""
        self.busy = False
        if self.signals:
            complain(problem)
            self.exit()
        complain(f"{problem}; retrying in {pause} s")

    def on_signal(self, number, _):
        self.signals.append(number)
        if not self.busy or (len(self.signals) > 1 and not self.working):
            self.exit()

    def exit(self):
        sys.exit(130 if INTERRUPTS.intersection(self.signals) else 0)


# ---- Processes ----

LAZY = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


def kill_group(process):
    """End a process, and all that it has started, at once."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # ended, or another user's
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def outcome(status):
    """Return None for the exit status 0, else a description."""
    if not status:
        return None
    return (
        f"signal {-status}: {signal.strsignal(-status)}" if status < 0 else f"exit status {status}"
    )


def serve(fd, name):
    """Run in the function's process: call the function with each body that comes through a pipe.

    Answers b"" when it is ready and after each call, or why that failed.
    """
    from multiprocessing.connection import Connection

    os.set_inheritable(fd, False)
    pipe, process_id, failure = Connection(fd), os.getpid(), ""
    try:
        sys.path.insert(0, os.getcwd())
        function = pkgutil.resolve_name(name)
        if not callable(function) or any(is_kind(function) for is_kind in LAZY):
            # Calling a lazy one would run nothing, yet the task would count as done.
            raise TypeError("expected a function, not async, and not a generator")
    except BaseException as error:
        function, failure = None, explain(error)
    with contextlib.suppress(EOFError, OSError):  # the worker has ended
        pipe.send_bytes(failure.encode(errors="backslashreplace"))
        while function is not None:
            failure = call(function, pipe.recv_bytes())
            if os.getpid() != process_id:
                os._exit(0)  # the function has forked: only the original may answer
            pipe.send_bytes(failure.encode(errors="backslashreplace"))
    os.killpg(0, signal.SIGKILL)  # itself, and whatever it has started


def call(function, body):
    """Call a function; return "", or why it failed, with a traceback on standard error."""
    try:
        try:
            function(body)
        finally:
            sys.stdout.flush()
    except BaseException as error:
        trace = traceback.format_exception(type(error), error, error.__traceback__.tb_next)
        with contextlib.suppress(OSError):
            for line in "".join(trace).splitlines():
                print(printable(line), file=sys.stderr)
        return SHORTENED.repr(error) or type(error).__name__  # a custom __repr__ may return ""
    return ""


# ---- The broker ----

# QUEUE.retry: expired messages are dead-lettered to QUEUE, and deleted only once they are there
# (at-least-once, which needs a quorum queue and reject-publish).
# See https://www.rabbitmq.com/docs/quorum-queues#dead-lettering
RETRY_ARGUMENTS = {
    "x-queue-type": "quorum",
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}
# Headers that would make the broker route, count or drop the copy, and those that are replaced.
NOT_COPIED = "CC|BCC|x-death|x-(first|last)-death-.*|x-(delivery|acquired|retry)-count|x-last-error"
# By repr(), errors that retrying can't cure: a refused login or permission "(403) ...", queue
# "(406) ...", virtual host "(530) ...", or certificate. Limits and exclusive use may end.
PERMANENT = r"(?!.* limit |.* in exclusive use).*(\((403|406|530)\)|CERTIFICATE_VERIFY_FAILED)"
CANCELLED = "the queue was deleted, or a task took longer than consumer_timeout in rabbitmq.conf"


def declare(connection, queue, arguments=None):
    """Declare a durable queue, or use one that exists; return a channel for it."""
    channel = connection.channel()
    try:
        channel.queue_declare(queue=queue, durable=True, arguments=arguments)
    except pika.exceptions.ChannelClosedByBroker as refusal:
        # A durable queue that differs (406) or that we may not declare (403) is used as it is, but
        # not a QUEUE.retry that differs: it might lose tasks, or never return them.
        usable = (403,) if arguments else (403, 406)
        if refusal.reply_code not in usable or re.search(UNSAFE, refusal.reply_text):
            raise
        channel = connection.channel()
        try:
            channel.queue_declare(queue=queue, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            raise refusal from None
    return channel


def count_in(headers, name):
    """Return the count in a header, or 0 if there is no sensible one."""
    value = (headers or {}).get(name)
    return value if isinstance(value, int) and 0 < value < 2**31 else 0


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
PREFETCH_HELP = "unacknowledged tasks the broker may hand over, 0 for no limit (default: 1)"
FUNCTION_HELP = "call for each task, with its body as bytes; an exception means it failed"
COMMAND_HELP = "run for each task, with the task on stdin; exit status 0 means done"


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


def number(kind, low, high):
    """Return a function that reads a number from the command line."""

    def read(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"expected {low} to {high}")

    return read


def read_command_line():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    option, seconds = parser.add_argument, {"metavar": "SECONDS"}
    url = {"dest": "nodes", "metavar": "URL", "type": amqp_urls, "default": DEFAULT_URL}
    count = {"metavar": "N", "type": number(int, 0, 65535)}
    delay = number(float, 0, 4_294_967)  # 32 bits of milliseconds
    limit = {"type": number(float, 0.001, math.inf), "default": math.inf}
    option("-u", "--url", **url, help=URL_HELP)
    option("-q", "--queue", default="task_queue", help="default: task_queue")
    option("-p", "--prefetch-count", **count, default=1, help=PREFETCH_HELP)
    option("--retries", **count, default=3, help="retries of a failed task (default: 3)")
    option(
        "--retry-delay",
        **seconds,
        type=delay,
        default=30,
        help="wait before each retry (default: 30)",
    )
    option("--time-limit", **seconds, **limit, help="fail tasks that take longer (default: none)")
    option("--function", metavar="MODULE:NAME", help=FUNCTION_HELP)
    option("--serve", type=int, help=argparse.SUPPRESS)  # the function's process; see serve()
    option("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=COMMAND_HELP)
    options = parser.parse_args()
    if not options.queue.isprintable() or not 0 < len(options.queue.encode()) <= 249:
        parser.error("--queue: expected 1 to 249 bytes of printable text")  # 255, less ".retry"
    if options.command[:1] == ["--"]:
        del options.command[0]
    if options.function and options.command:
        parser.error("--function and COMMAND are mutually exclusive")
    return options


def main():
    while os.open(os.devnull, os.O_RDWR) < 2:
        pass  # occupy closed standard streams, so that no socket gets their numbers
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if hasattr(signal, "SIGCHLD"):  # inherited as ignored, it would hide exit statuses
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    options = read_command_line()
    if options.serve is not None:
        serve(options.serve, options.function)  # does not return
    if (options.command or options.function) and not hasattr(os, "killpg"):
        complain("Can't run commands or functions on Windows")
        sys.exit(1)
    if options.command and not shutil.which(options.command[0]):
        complain(f"Can't run {options.command[0]}: not found, or not executable")
        sys.exit(1)
    Worker(options).run()


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        os._exit(end.code)  # Python's own shutdown may have to wait for a DNS lookup
    except OSError:  # before Python 3.11: argparse can't print help or usage
        os._exit(2)
