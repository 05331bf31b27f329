#!/usr/bin/env python3
"""Process the tasks that new_task.py sends to a RabbitMQ work queue.

  worker.py                          sleep a second for each dot in a task
  worker.py --prefetch-count 0       no limit on prefetched tasks: round-robin dispatch
  worker.py -q thumbs ./thumb.py     run a command per task, with the task on stdin

Start as many workers as you like: each task goes to one of them. It is acknowledged when
done, so if a worker dies, another gets its task, which may then be done twice. A failed
task is retried via QUEUE.retry; after the last retry it is moved to QUEUE.dlq. CTRL+C stops
a worker; SIGTERM lets it finish its task; a second signal stops it at once.
"""

import argparse
import collections
import contextlib
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

LONGEST_PAUSE = 30  # seconds between attempts
GRACE = 5  # seconds between SIGTERM and SIGKILL for a command
MAX_DELIVERIES = 15  # of a task that is never finished; a quorum queue would drop it after 20

ERRORS = (pika.exceptions.AMQPError, AMQPConnectorException, OSError, ValueError)  # from pika
# Windows lacks two of these.
INTERRUPTS = {getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGHUP", "SIGQUIT")}


class Worker:
    """Consumes a queue, one task at a time, and reconnects when necessary."""

    def __init__(self, options):
        self.options = options
        self.has_consumed = False
        self.pause = 1  # seconds until the next attempt to connect
        self.signals = []  # received so far
        # How many signals are only recorded, for wait() and consume() to act on: 0 when idle, 1
        # with a task, any number while a command runs, so that it is never left running.
        self.deferred = 0

    def consume(self, connection):
        queue = self.options.queue
        channel = declare(connection, queue)
        channel.basic_qos(prefetch_count=self.options.prefetch_count)

        # The tutorial does the work in this callback. But until it returns, pika can't report that
        # the broker has cancelled the consumer, so the loop below does the work.
        tasks = collections.deque()
        channel.basic_consume(queue=queue, on_message_callback=lambda *task: tasks.append(task))

        say(" [*] Waiting for messages. To exit press CTRL+C")
        self.has_consumed, self.pause = True, 1
        while channel.consumer_tags:
            if tasks and not self.signals:
                self.callback(*tasks.popleft())
            self.deferred = 1 if tasks else 0
            if self.signals:
                channel.stop_consuming()
                channel.basic_nack(0, multiple=True, requeue=True)  # what was prefetched
                connection.close()
                self.exit()
            connection.process_data_events(time_limit=0 if tasks else None)
        raise pika.exceptions.ConsumerCancelled(CANCELLED)

    def callback(self, ch, method, properties, body):
        self.deferred = 1
        say(f" [x] Received {shown(body)}{' (redelivered)' if method.redelivered else ''}")

        deliveries = count(properties.headers, "x-delivery-count") if method.redelivered else 0
        if deliveries >= MAX_DELIVERIES:
            failure, retries = f"delivered {deliveries} times, never finished", 0
        else:
            failure, retries = self.work(ch, body), self.options.retries
        if failure:
            self.move_failed_task(ch, properties, body, failure, retries)

        if self.signals:
            ch.stop_consuming()  # otherwise the acknowledgement would bring the next task
        ch.basic_ack(delivery_tag=method.delivery_tag)
        if not failure:
            say(" [x] Done")

    # ---- The work ----

    def work(self, ch, body):
        try:
            return self.run_command(ch, body) if self.options.command else self.sleep(ch, body)
        except Exception as error:
            if ch.is_open and ch.consumer_tags:
                return SHORTENED.repr(error)
            raise  # the task is no longer ours

    def sleep(self, ch, body):
        """Sleep a second per dot. Put your own work here.

        Return None when done, or why the task failed. An exception also fails it, but don't catch
        those of wait(). Only wait() answers heartbeats and CTRL+C: long work must call it often.
        """
        dots, limit = body.count(b"."), self.options.time_limit
        on_terminal = dots and sys.stdout and sys.stdout.isatty()
        try:
            for second in range(1, dots + 1):
                if second > limit:
                    self.wait(ch, limit - second + 1)
                    return f"time limit of {limit:g} s"
                self.wait(ch, 1)
                if on_terminal:
                    say(".", end="", flush=True)
        finally:
            if on_terminal:
                say("")
        return None

    def run_command(self, ch, body):
        self.deferred = sys.maxsize
        process = self.start_command(ch, self.options.command, body)
        begin, limit = time.monotonic(), self.options.time_limit
        try:
            while process.poll() is None:
                seconds = time.monotonic() - begin
                if seconds >= limit:
                    return f"time limit of {limit:g} s"
                # Look often at first, so that short commands are not delayed.
                self.wait(ch, min(max(0.001, seconds / 10), 0.1, limit - seconds))
        finally:
            if process.poll() is None:
                self.end_command(process)
            self.deferred = 1

        if process.returncode < 0:
            return f"signal {-process.returncode}: {signal.strsignal(-process.returncode)}"
        return f"exit status {process.returncode}" if process.returncode else None

    def wait(self, ch, seconds):
        """Sleep, but answer heartbeats.

        Raises ConsumerCancelled if the broker has taken the task back, SystemExit to stop at once.
        """
        deadline = time.monotonic() + seconds
        while True:
            left = deadline - time.monotonic()
            ch.connection.process_data_events(time_limit=min(max(0, left), 0.1))
            if not ch.consumer_tags:
                raise pika.exceptions.ConsumerCancelled(CANCELLED)
            if INTERRUPTS.intersection(self.signals) or len(self.signals) > 1:
                self.exit()
            if left <= 0:
                return

    def keep_in_hand(self, ch, problem):
        """Keep a task that can't be finished now, until the next attempt.

        Requeued, it would come back at once, and a quorum queue may drop it after 20 deliveries.
        """
        deferred = self.deferred
        self.report(problem, LONGEST_PAUSE)
        self.wait(ch, LONGEST_PAUSE)
        self.deferred = deferred

    def start_command(self, ch, command, body):
        """Start a command in its own process group, with a task as its standard input."""
        while True:
            try:
                with tempfile.TemporaryFile() as task:
                    task.write(body)
                    task.seek(0)
                    return subprocess.Popen(command, stdin=task, start_new_session=True)
            except OSError as error:
                self.keep_in_hand(ch, f"Can't run {command[0]}: {explain(error)}")

    def end_command(self, process):
        """End a command's process group: with SIGTERM, then with SIGKILL."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # ended, or another user's
            os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline and len(self.signals) < 2:
                process.poll()  # reap it: a zombie still counts as alive
                os.killpg(process.pid, 0)
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    # ---- Tasks that fail ----

    def move_failed_task(self, ch, properties, body, failure, retries):
        """Publish a copy to QUEUE.retry or, when its retries are used up, to QUEUE.dlq."""
        headers = properties.headers or {}
        # x-last-error marks a dead letter being reprocessed: it gets all its retries again.
        retried = 0 if "x-last-error" in headers else count(headers, "x-retry-count")
        copied = [name for name in headers if not re.fullmatch(NOT_COPIED, str(name))]
        properties.headers = {name: headers[name] for name in copied}
        try:
            properties.encode()
        except Exception:  # pika can't encode all that it decodes
            properties.headers = {}
        properties.user_id = None  # the broker would refuse another user's
        properties.delivery_mode = pika.DeliveryMode.Persistent.value
        if retried < retries:
            queue = f"{self.options.queue}.retry"
            arguments = {**RETRY_ARGUMENTS, "x-dead-letter-routing-key": self.options.queue}
            properties.expiration = str(round(1000 * self.options.retry_delay))
            properties.headers["x-retry-count"] = retried + 1
            say(f" [!] Failed: {failure}; retrying in {self.options.retry_delay:g} s")
        else:
            queue, arguments = f"{self.options.queue}.dlq", None
            properties.expiration = None
            properties.headers["x-retry-count"] = retried
            properties.headers["x-last-error"] = str(failure)[:1000]
            say(f" [!] Failed: {failure}; moved to {queue}")

        while True:
            try:
                return self.publish(ch, queue, arguments, properties, body)
            except pika.exceptions.AMQPChannelError as error:
                if not ch.consumer_tags:
                    raise  # the task is no longer ours
                self.keep_in_hand(ch, f"Can't move the failed task to {queue}: {explain(error)}")

    def publish(self, ch, queue, arguments, properties, body):
        # Errors close a channel, so use a second one. Blocks during a memory or disk alarm.
        channel = declare(ch.connection, queue, arguments)
        channel.confirm_delivery()
        self.wait(ch, 0)  # is the task still ours?
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
        """Consume, and reconnect when necessary; exit if the broker will never let us in."""
        for number in (signal.SIGTERM, *INTERRUPTS):
            if signal.getsignal(number) != signal.SIG_IGN:  # ignored in the background, or by nohup
                signal.signal(number, self.on_signal)
        while True:
            connection = None
            try:
                connection = pika.BlockingConnection(self.options.url)
                self.consume(connection)
            except ERRORS as error:
                if not self.has_consumed and re.match(PERMANENT, repr(error)):
                    complain(explain(error))
                    sys.exit(1)
                self.report(explain(error), self.pause)
            if connection:
                with contextlib.suppress(pika.exceptions.AMQPError):
                    connection.close()
            time.sleep(self.pause)
            self.pause = min(2 * self.pause, LONGEST_PAUSE)
            # The next node first: pika tries none after one whose name can't be resolved.
            self.options.url.append(self.options.url.pop(0))

    def report(self, problem, pause):
        """Report why the work can't go on, and exit if told to stop: the worker is idle now."""
        self.deferred = 0
        if self.signals:
            complain(problem)
            self.exit()
        complain(f"{problem}; retrying in {pause} s")

    def on_signal(self, number, _):
        self.signals.append(number)
        if len(self.signals) > self.deferred:
            self.exit()

    def exit(self):
        sys.exit(130 if INTERRUPTS.intersection(self.signals) else 0)


# ---- The broker ----

# QUEUE.retry: expired messages are dead-lettered to QUEUE, and deleted only once they are there.
# See https://www.rabbitmq.com/docs/quorum-queues#dead-lettering
RETRY_ARGUMENTS = {
    "x-queue-type": "quorum",
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}
# Headers that would make the broker route, count or drop the copy, and those that are replaced.
NOT_COPIED = "CC|BCC|x-death|x-(first|last)-death-.*|x-(delivery|acquired|retry)-count|x-last-error"
# Permanent errors, unlike a connection limit: login, permission, queue, certificate.
PERMANENT = r"(?!.* limit |.* in exclusive use).*(\((403|406|530)\)|CERTIFICATE_VERIFY_FAILED)"
CANCELLED = "the queue was deleted, or a task took longer than consumer_timeout in rabbitmq.conf"


def declare(connection, queue, arguments=None):
    """Declare a durable queue, or use one that exists; return a channel for it."""
    channel = connection.channel()
    try:
        channel.queue_declare(queue=queue, durable=True, arguments=arguments)
    except pika.exceptions.ChannelClosedByBroker as refusal:
        # A durable queue that differs (406) or that we may not declare (403) is used as it is.
        usable = (403,) if arguments else (403, 406)  # QUEUE.retry may not differ
        if refusal.reply_code not in usable or "arg 'durable'" in refusal.reply_text:
            raise
        channel = connection.channel()
        try:
            channel.queue_declare(queue=queue, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            raise refusal from None
    return channel


def count(headers, name):
    """Return the count in a header, or 0 if it is missing or invalid."""
    value = (headers or {}).get(name)
    return value if isinstance(value, int) and 0 < value < 2**31 else 0


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
PREFETCH_HELP = "unacknowledged tasks the broker may hand over, 0 for no limit (default: 1)"
COMMAND_HELP = "run per task, with the task on stdin; exit status 0 means done (default: sleep)"


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
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option, number = parser.add_argument, {"metavar": "N", "type": int}
    seconds = {"metavar": "SECONDS", "type": float}
    option("-u", "--url", type=amqp_urls, default=DEFAULT_URL, help=URL_HELP)
    option("-q", "--queue", default="task_queue", help="default: task_queue")
    option("-p", "--prefetch-count", **number, default=1, help=PREFETCH_HELP)
    option("--retries", **number, default=3, help="retries of a failed task (default: 3)")
    option("--retry-delay", **seconds, default=30, help="pause before each retry (default: 30)")
    option("--time-limit", **seconds, default=float("inf"), help="time for a task (default: none)")
    option("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=COMMAND_HELP)
    options = parser.parse_args()
    if not options.queue.isprintable() or not 0 < len(options.queue.encode()) <= 249:
        parser.error("--queue: expected 1 to 249 bytes of printable text")  # 255, less ".retry"
    if not 0 <= options.prefetch_count <= 65535:
        parser.error("--prefetch-count: expected 0 to 65535")
    if options.retries < 0 or not options.time_limit > 0:
        parser.error("--retries: expected 0 or more; --time-limit: more than 0 seconds")
    if not 0 <= options.retry_delay <= 4_294_967:
        parser.error("--retry-delay: expected 0 to 4294967 seconds")  # 32 bits of milliseconds
    if options.command[:1] == ["--"]:
        del options.command[0]
    return options


def main():
    if sys.stdout:
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if hasattr(signal, "SIGCHLD"):  # if it is ignored, commands always seem successful
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    options = read_command_line()
    if options.command and not (shutil.which(options.command[0]) and hasattr(os, "killpg")):
        complain(f"Can't run {options.command[0]}: not found, not executable, or on Windows")
        sys.exit(1)
    try:
        Worker(options).run()
    except SystemExit as end:
        os._exit(end.code)  # Python's own shutdown may have to wait for a DNS lookup


if __name__ == "__main__":
    main()
