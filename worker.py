#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pika>=1.3.2,<2"]
# ///
"""Process the tasks that new_task.py sends to a RabbitMQ work queue.

  worker.py                       sleep a second for each dot in a task
  worker.py --prefetch-count 0    no prefetch limit: tasks are dealt out in turn
  worker.py -q thumbs --function thumbs:make
                                  call a Python function with each task
  worker.py -q thumbs ./thumb.sh  run a command with each task on standard input

Start as many workers as you like: each task goes to one of them. It is
acknowledged when done, so if a worker dies, another gets its task, which may
then be done twice. A failed task is retried via QUEUE.retry; after the last
retry it is moved to QUEUE.dlq, as a dead letter (a task that was given up).
CTRL+C stops a worker at once, and its task is requeued; SIGTERM lets it finish
the task; a second signal stops it whatever it is doing.
"""

import argparse
import asyncio
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
from multiprocessing.connection import Connection, Pipe

import pika
from pika.adapters.utils.connection_workflow import AMQPConnectorException

TICK = 0.1  # maximum seconds between checks of the connection and signals
PAUSE = 3  # seconds until the next attempt: to connect, to move a failed task, to start a process
GRACE = 5  # seconds between SIGTERM and SIGKILL for a command or function
MAX_DELIVERIES = 15  # of a task that is never finished; a quorum queue would drop it after 20

# What pika may raise: ValueError if the connection is reset at once, or a host name is malformed.
ERRORS = (pika.exceptions.AMQPError, AMQPConnectorException, OSError, ValueError)
# Windows lacks two of these.
INTERRUPTS = {getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGHUP", "SIGQUIT")}


class TimeLimitExceeded(Exception):
    """The task in hand has taken longer than --time-limit."""


class Worker:
    """Consumes a queue, one task at a time, and reconnects when necessary."""

    def __init__(self, options):
        self.options = options
        self.nodes = options.url  # of the broker, as pika's connection parameters
        self.channel = None  # on which the tasks are delivered
        self.has_consumed = False
        self.signals = []  # received so far
        self.busy = False  # tasks are in hand, so the first signal is left to consume() and wait()
        self.deadline = math.inf  # of the task, by time.monotonic()
        self.process = None  # of the command, while it runs, or of the function
        self.pipe = None  # to the function's process

    def consume(self, connection):
        queue = self.options.queue
        self.channel = channel = declare(connection, queue)
        channel.basic_qos(prefetch_count=self.options.prefetch_count)

        # The tutorial does the work in this callback. But until it returns, pika does not report
        # that the broker has cancelled the consumer, so another worker might already be doing the
        # task again; and it answers heartbeats only if asked to. So the loop below does the work.
        deliveries = collections.deque()
        channel.basic_consume(queue, on_message_callback=lambda *args: deliveries.append(args))

        say(" [*] Waiting for messages. To exit press CTRL+C")
        self.has_consumed = True
        while channel.consumer_tags:  # until the broker or process_task() cancels the consumer
            # In this order: each signal either ends the script in on_signal(), or is seen here.
            self.busy = bool(deliveries)
            if self.signals:
                break
            connection.process_data_events(time_limit=0 if deliveries else None)
            if deliveries and channel.consumer_tags and not self.signals:
                self.busy = True
                self.process_task(*deliveries.popleft())
        if not self.signals:
            raise pika.exceptions.ConsumerCancelled(CANCELLED)
        # Requeue what was prefetched. Closing the connection would do that, too, but counts as a
        # failed delivery, of which a quorum queue takes 20. RabbitMQ 4.3 does not count a nack.
        channel.stop_consuming()
        channel.basic_nack(0, multiple=True, requeue=True)  # 0: all unacknowledged
        connection.close()
        sys.exit(self.exit_status())

    def process_task(self, ch, method, properties, body):
        say(f" [x] Received {shown(body)}{' (redelivered)' if method.redelivered else ''}")

        # Quorum queues count in this header how often they have delivered a task before; in a
        # task delivered for the first time, it may come from the sender.
        delivered = count_in(properties.headers, "x-delivery-count") if method.redelivered else 0
        retries = self.options.retries
        if delivered >= MAX_DELIVERIES:
            failure = f"delivered {delivered} times, never finished"
            retries = 0
        else:
            failure = self.work(body)
        if failure:
            self.move_failed_task(properties, body, escaped(failure)[:300], retries)

        if self.signals:
            ch.stop_consuming()  # otherwise the acknowledgement would bring the next task
        ch.basic_ack(delivery_tag=method.delivery_tag)
        if not failure:
            say(" [x] Done")

    # ---- The work ----

    def work(self, body):
        """Do a task. Return None when it is done, or the reason why it failed.

        Code of your own is best called by --function. Here, it would have to call self.wait()
        often. An exception would requeue the task: OSError, ValueError and pika's errors make the
        worker reconnect, any other one ends it.
        """
        try:
            if self.options.function:
                return self.call_function(body)
            if self.options.command:
                return self.run_command(body)
            return self.sleep(body)
        except TimeLimitExceeded:
            return f"exceeded the time limit of {self.options.time_limit:g} s"
        finally:
            self.deadline = math.inf

    def start_clock(self):
        """Begin the time limit; starting a process doesn't count towards it."""
        self.deadline = time.monotonic() + self.options.time_limit

    def wait(self, until=None):
        """Wait until a moment of time.monotonic(), by default now; let pika answer heartbeats.

        Raises ConsumerCancelled if the broker has taken the task back, TimeLimitExceeded if the
        task's deadline comes first, SystemExit if a signal says to stop at once.
        """
        until = until or time.monotonic()
        while True:
            left = min(until, self.deadline) - time.monotonic()
            self.channel.connection.process_data_events(time_limit=min(max(0, left), TICK))
            if not self.channel.consumer_tags:
                raise pika.exceptions.ConsumerCancelled(CANCELLED)
            if INTERRUPTS.intersection(self.signals):
                sys.exit(self.exit_status())
            if left <= 0:
                if self.deadline < until:
                    raise TimeLimitExceeded
                return

    def sleep(self, body):
        """Sleep a second for each dot."""
        start = time.monotonic()  # before the clock, so that just the time limit is not too long
        self.start_clock()
        dots = body.count(b".")
        show_dots = dots and sys.stdout.isatty()
        try:
            for second in range(1, dots + 1):
                self.wait(start + second)
                if show_dots:
                    say(".", end="", flush=True)
        finally:
            if show_dots:
                say("")

    def run_command(self, body):
        """Run the command with a task as its standard input."""
        self.process = process = self.start_command(body)
        self.start_clock()
        try:
            while process.poll() is None:
                try:
                    process.wait(TICK)  # returns as soon as it ends
                except subprocess.TimeoutExpired:
                    self.wait()
        except BaseException:
            self.terminate()
            raise
        self.process = None  # so that what it has left running is left alone
        return outcome(process.returncode)

    def start_command(self, body):
        command = self.options.command
        while True:
            try:
                # A pipe would have to be fed while pika answers heartbeats.
                with tempfile.TemporaryFile() as stdin:
                    stdin.write(body)
                    stdin.seek(0)
                    return subprocess.Popen(command, stdin=stdin, start_new_session=True)
            except OSError as error:
                self.keep_in_hand(f"Can't run {command[0]}: {explain(error)}")

    def call_function(self, body):
        """Call the function in its process, which may have ended since the last task."""
        # Something to read before a call means that the pipe's other end is closed.
        while not self.process or self.process.poll() is not None or self.pipe.poll():
            if problem := self.start_function():
                self.keep_in_hand(f"Can't call {self.options.function}: {problem}")
        self.start_clock()
        with contextlib.suppress(OSError):  # it has ended just now
            self.pipe.send_bytes(body)
        return self.wait_for_answer()

    def start_function(self):
        """Start the function's process: this script once more, see serve().

        A thread could not be stopped, and a function that keeps Python busy would hold up its
        heartbeats; a process of multiprocessing would inherit the connection to the broker.
        Return None when the process is ready, or why it is not.
        """
        self.terminate()
        try:
            self.pipe, theirs = Pipe()
            with theirs:
                fd = theirs.fileno()
                command = [sys.executable, __file__, f"--serve={fd}", *sys.argv[1:]]
                self.process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[fd], start_new_session=True
                )
        except OSError as error:
            return explain(error)
        return self.wait_for_answer()

    def wait_for_answer(self):
        """Wait for the answer of the function's process: None, or why the call failed.

        If the wait ends in any other way, the process is ended.
        """
        process = self.process
        try:
            # Both, as what the function has started may hold the pipe open after its process's end.
            while not self.pipe.poll(TICK) and process.poll() is None:
                if self.channel:
                    self.wait()
        except BaseException:
            self.terminate()
            raise
        with contextlib.suppress(EOFError, OSError):  # it has ended without an answer
            if self.pipe.poll():
                answer = self.pipe.recv_bytes().decode()
                if process.returncode is not None:  # it has answered, and then ended
                    self.terminate()
                return answer or None
        self.terminate()
        return outcome(process.returncode) or "its process ended without an answer"

    def terminate(self):
        """End the process of the command or function, if any, and all that it has started."""
        if not self.process:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # ended, or another user's
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None  # its id may soon be another process's

    def keep_in_hand(self, problem):
        """Keep a task that can't be finished now, until the next attempt.

        Requeued, it would come back at once, and some versions would count a failed delivery.
        """
        self.exit_or_report(problem, "trying again")
        self.wait(time.monotonic() + PAUSE)
        self.busy = True

    # ---- Tasks that fail ----

    def move_failed_task(self, properties, body, failure, retries):
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
        except Exception:  # pika reads headers that it can't send, such as very large floats
            properties.headers = {}
        properties.user_id = None  # the broker would refuse another user's
        properties.delivery_mode = pika.DeliveryMode.Persistent.value  # only __init__ converts it
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
                # On a channel of its own, as errors close it.
                with declare(self.channel.connection, queue, arguments) as channel:
                    channel.confirm_delivery()
                    self.wait()  # is the task still ours?
                    # While the broker is short of memory or disk space, this waits.
                    channel.basic_publish(
                        exchange="",
                        routing_key=queue,
                        body=body,
                        properties=properties,
                        mandatory=True,
                    )
                break
            except pika.exceptions.AMQPChannelError as error:
                if not self.channel.consumer_tags:
                    raise  # the task is no longer ours
                self.keep_in_hand(f"Can't move the failed task to {queue}: {explain(error)}")
        say(f" [!] Failed: {failure}; {fate}")

    # ---- Connections and signals ----

    def run(self):
        """Consume, and reconnect when necessary; exit if the broker refuses access at the start."""
        for number in (signal.SIGTERM, *INTERRUPTS):
            # What nohup, or a shell for a background job, has set to be ignored stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.on_signal)
        if self.options.function and (problem := self.start_function()):
            complain(f"Can't call {self.options.function}: {problem}")
            sys.exit(1)
        while True:
            connection = None
            try:
                connection = pika.BlockingConnection(self.nodes)
                self.consume(connection)
            except ERRORS as error:
                if not self.has_consumed and re.search(PERMANENT, repr(error)):
                    complain(explain(error))
                    sys.exit(1)
                self.exit_or_report(explain(error), "reconnecting")
            if connection:
                with contextlib.suppress(pika.exceptions.AMQPError):
                    connection.close()
            time.sleep(PAUSE)
            # The next node first: pika tries none after one whose name can't be resolved.
            self.nodes.append(self.nodes.pop(0))

    def exit_or_report(self, problem, remedy):
        """Report why the work can't go on for now. From here on, any signal exits at once."""
        self.busy = False
        if self.signals:
            complain(problem)
            sys.exit(self.exit_status())
        complain(f"{problem}; {remedy} in {PAUSE} s")

    def on_signal(self, number, _):
        """Note a signal. If nothing is in hand, or it is the second one, exit at once.

        It must not wait for the process: what it has interrupted may hold a lock of Popen's.
        """
        self.signals.append(number)
        if not self.busy or len(self.signals) > 1:
            if self.process:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            os._exit(self.exit_status())

    def exit_status(self):
        return 130 if INTERRUPTS.intersection(self.signals) else 0


# ---- Processes ----


def outcome(status):
    """Return None for the exit status 0, else a description."""
    if not status:
        return None
    if status < 0:
        return f"signal {-status}: {signal.strsignal(-status)}"
    return f"exit status {status}"


def serve(fd, name):
    """Run in the function's process: call the function with each body that comes through a pipe.

    Answers b"" when it is ready and after each call, or why that failed.
    """
    os.set_inheritable(fd, False)
    pipe, process_id = Connection(fd), os.getpid()
    try:
        sys.path.insert(0, os.getcwd())
        try:
            function = pkgutil.resolve_name(name)
            if not callable(function):
                raise TypeError(f"{name} is not callable")
        except BaseException as error:
            pipe.send_bytes(reason(error))
            return
        answer = b""
        while os.getpid() == process_id:  # only the original answers, if the function forks
            pipe.send_bytes(answer)
            answer = call(function, pipe.recv_bytes())
        os._exit(0)
    except (EOFError, OSError):  # the worker has ended
        pass
    finally:
        os.killpg(0, signal.SIGKILL)  # itself, and whatever it has started


def call(function, body):
    """Call a function; return b"", or why it failed, with a traceback on standard error."""
    try:
        result = function(body)
        if inspect.iscoroutine(result):
            asyncio.run(result)
        elif inspect.isgenerator(result) or inspect.isasyncgen(result):
            raise TypeError("the function is a generator, so nothing of it has run")
    except BaseException as error:
        with contextlib.suppress(Exception):  # whatever is wrong with the error, or with stderr
            trace = traceback.format_exception(type(error), error, error.__traceback__.tb_next)
            for line in "".join(trace).splitlines():
                sys.stderr.write(escaped(line) + "\n")
        return reason(error)
    finally:
        with contextlib.suppress(Exception):  # the function may have closed or replaced it
            sys.stdout.flush()
    return b""


def reason(error):
    """Return the repr of a function's error, for an answer."""
    try:
        text = repr(error)[:300]
    except BaseException:  # a __repr__ or __str__ of the function's own
        text = ""
    text = text or type(error).__name__ or "an exception"  # an empty answer would mean done
    return text.encode(errors="backslashreplace")


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
# In the repr() of an error: a refused login or permission, queue, virtual host, or certificate.
PERMANENT = r"\((403|406|530)\)|CERTIFICATE_VERIFY_FAILED"
CANCELLED = (
    "the queue was deleted, or a task took longer than consumer_timeout (default: 30 minutes)"
)


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
        channel.queue_declare(queue=queue, passive=True)  # only checks that the queue exists
    return channel


def count_in(headers, name):
    """Return the count in a header, or 0 if there is no sensible one."""
    value = (headers or {}).get(name)
    return value if isinstance(value, int) and 0 < value < 2**31 else 0


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
PREFETCH_HELP = "maximum unacknowledged tasks, 0 for no limit (default: 1)"
RETRIES_HELP = "retries of a failed task (default: 3)"
DELAY_HELP = "seconds to wait before each retry (default: 30)"
LIMIT_HELP = "fail tasks that take longer (default: no limit)"
FUNCTION_HELP = "call for each task, with its body as bytes; an exception means the task failed"
COMMAND_HELP = "run for each task, with the task on standard input; exit status 0 means done"
SECONDS = 4_294_967  # maximum: the broker counts 32 bits of milliseconds


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


def between(low, high, kind=float):
    """Return a function that reads a number in that range from the command line."""

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
    count = between(0, 65535, int)
    delay, limit = between(0, SECONDS), between(0.001, SECONDS)
    add = parser.add_argument
    add("-u", "--url", metavar="URL", type=amqp_urls, default=DEFAULT_URL, help=URL_HELP)
    add("-q", "--queue", metavar="NAME", type=queue_name, default="task_queue", help=QUEUE_HELP)
    add("-p", "--prefetch-count", metavar="N", type=count, default=1, help=PREFETCH_HELP)
    add("--retries", metavar="N", type=count, default=3, help=RETRIES_HELP)
    add("--retry-delay", metavar="SECONDS", type=delay, default=30, help=DELAY_HELP)
    add("--time-limit", metavar="SECONDS", type=limit, default=math.inf, help=LIMIT_HELP)
    add("--function", metavar="MODULE:NAME", help=FUNCTION_HELP)
    add("--serve", type=int, help=argparse.SUPPRESS)  # the function's process; see serve()
    add("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=COMMAND_HELP)
    options = parser.parse_args()
    if options.command[:1] == ["--"]:
        del options.command[0]
    # Empty by mistake (an unset variable of a shell), the worker would sleep, and lose the tasks.
    if options.function == "" or (sys.argv[-1] == "--" and not options.command):
        parser.error("--function or COMMAND is empty")
    if options.function and options.command:
        parser.error("--function and COMMAND are mutually exclusive")
    return options


def main():
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if hasattr(signal, "SIGCHLD"):  # if inherited as ignored, exit statuses would be lost
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    options = read_command_line()
    if options.serve is not None:
        serve(options.serve, options.function)  # and end this process
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
        os._exit(end.code)  # Python's own shutdown may wait for a DNS lookup or a broken pipe
