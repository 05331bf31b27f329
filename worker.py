#!/usr/bin/env python3
"""Do the tasks that new_task.py sends to a RabbitMQ work queue.

    worker.py                       a second of work for every dot, until CTRL+C
    worker.py -q reports            the tasks of another queue
    worker.py --prefetch-count 0    all tasks dealt out at once: round-robin dispatch

Start as many workers as you like; each task goes to one of them. It is acknowledged
after the work: when a worker dies, another one gets its task. SIGTERM lets a worker
finish the task in hand. Without a broker, a worker waits for one.
"""

import argparse
import contextlib
import functools
import os
import re
import reprlib
import signal
import sys
import time

import pika
from pika.adapters.utils.connection_workflow import AMQPConnectorException

DEFAULT_URL = "amqp://guest:guest@localhost:5672/%2F"
LONGEST_PAUSE = 30  # seconds between two attempts to connect; the first is 1 s, then doubled

HINTS = {  # words of an error: what to do about it
    "Connection refused": "is RabbitMQ running there? To start one: docker compose up -d --wait",
    "AuthenticationError": "check user and password in the URL",
    "AccessDeniedError": "check the virtual host in the URL",
    "IncompatibleProtocolError": "is that an AMQP port? A TLS port needs amqps://",
    "CERTIFICATE": "name its CA in the URL: ?ssl_options={'ca_certs':'/path/ca.pem'}",
    "'durable'": "its tasks would not survive a restart: delete it or take another --queue",
    "acknowledgement": "another worker gets the task: raise consumer_timeout in rabbitmq.conf",
}
# Login, permission, virtual host, certificate, queue: refused today, refused tomorrow.
PERMANENT = re.compile(r"\((403|406|530)\b|CERTIFICATE_VERIFY_FAILED")

SHORTENED = reprlib.Repr()
SHORTENED.maxstring = 200  # characters


class Worker:
    """Consumes a queue, one task at a time, over as many connections as it takes."""

    def __init__(self, nodes, queue, prefetch_count):
        self.nodes = nodes
        self.queue = queue
        self.prefetch_count = prefetch_count
        self.connected_before = False
        self.working = False
        self.stopping = False

    def run(self):
        """Return after SIGTERM; exit the program if no broker will ever let us work."""
        signal.signal(signal.SIGTERM, self.on_sigterm)
        pause = 1
        while not self.stopping:
            connection = None
            try:
                connection = pika.BlockingConnection(self.nodes)
                channel = self.consume(connection)
                pause = 1
                channel.start_consuming()
                problem = "The broker cancelled the consumer: its queue was deleted, or has moved"
            except (pika.exceptions.AMQPError, AMQPConnectorException, OSError) as error:
                problem = explain(error)
                if PERMANENT.search(repr(error)) and not self.connected_before:
                    complain(problem)
                    sys.exit(1)
            if connection:
                with contextlib.suppress(pika.exceptions.AMQPError):
                    connection.close()
            if not self.stopping:
                complain(f"{problem}; trying again in {pause} s")
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    def consume(self, connection):
        channel = connection.channel()
        try:
            channel.queue_declare(queue=self.queue, durable=True)
        except pika.exceptions.ChannelClosedByBroker as refusal:
            if refusal.reply_code not in (403, 406) or "'durable'" in refusal.reply_text:
                raise
            # The queue has other properties, or is not this user's to declare. If it is
            # there, it will do.
            channel = connection.channel()
            try:
                channel.queue_declare(queue=self.queue, passive=True)
            except pika.exceptions.ChannelClosedByBroker:
                raise refusal from None
        channel.basic_qos(prefetch_count=self.prefetch_count)
        channel.basic_consume(queue=self.queue, on_message_callback=self.callback)
        self.connected_before = True
        say(" [*] Waiting for messages. To exit press CTRL+C")
        return channel

    def callback(self, ch, method, properties, body):
        self.working = True
        try:
            again = " (redelivered)" if method.redelivered else ""
            say(f" [x] Received {shown(body)}{again}")
            self.work(ch, body)
            if ch.is_closed:
                return  # and start_consuming() tells why
            if self.stopping:
                ch.stop_consuming()  # first, as the acknowledgement brings the next task
            ch.basic_ack(delivery_tag=method.delivery_tag)
            say(" [x] Done")
        finally:
            self.working = False
        if self.stopping:  # since the question above
            ch.stop_consuming()

    def work(self, ch, body):
        dots = body.count(b".")
        on_terminal = dots and sys.stdout and sys.stdout.isatty()
        try:
            for _ in range(dots):
                ch.connection.sleep(1)  # unlike time.sleep(), it answers heartbeats
                if ch.is_closed:
                    return
                if on_terminal:
                    say(".", end="", flush=True)
        finally:
            if on_terminal:
                say("")

    def on_sigterm(self, *_):
        if not self.working:
            sys.exit(0)
        self.stopping = True


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
            raise argparse.ArgumentTypeError(
                "expected amqp://USER:PASSWORD@HOST:PORT/VHOST, special characters as in %40"
            ) from None
    return nodes


def queue_name(text):
    if not 0 < len(text.encode()) < 256 or not text.isprintable():
        raise ValueError
    return text


def prefetch_count(text):
    if not 0 <= int(text) <= 65535:
        raise ValueError
    return int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parse_arguments():
    parser = Parser(
        description=__doc__,
        # Without a width, argparse imports much to find it: 3 ms of every start.
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=88),
        allow_abbrev=False,
    )
    parser.add_argument(
        "-u",
        "--url",
        type=nodes_of,
        default=os.environ.get("AMQP_URL") or DEFAULT_URL,
        help="AMQP URL, or several with commas between them, tried in order "
        "(default: the environment variable AMQP_URL, or else the broker on this machine)",
    )
    parser.add_argument(
        "-q", "--queue", type=queue_name, default="task_queue", help="default: task_queue"
    )
    parser.add_argument(
        "-p",
        "--prefetch-count",
        type=prefetch_count,
        default=1,
        metavar="N",
        help="unacknowledged tasks the broker may hand over, 0 for no limit (default: 1)",
    )
    options, unknown = parser.parse_known_args()
    if unknown:  # --ulr=amqp://..., for example: the name alone, as there may be a password
        parser.error(f"unknown option {re.match('-*[a-z]*', unknown[0])[0]}")
    return options


def main():
    options = parse_arguments()
    if sys.stdout:
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        Worker(options.url, options.queue, options.prefetch_count).run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
