#!/usr/bin/env python3
"""Draw how a work queue shares out its tasks: round-robin, and then fair dispatch.

    tests/demo.py                                  two workers, heavy and light tasks in turn
    tests/demo.py --workers 3 --tasks 12           more of both
    tests/demo.py --heavy 5 --light 2              other lengths, in seconds
    tests/demo.py --svg picture.svg                a picture as well
    AMQP_URL=amqp://... tests/demo.py              on that broker

The same tasks are played twice with the real scripts: to workers with --prefetch-count 0, and
to workers with the default, 1. Without AMQP_URL, a broker of the demo's own is started: an
installed rabbitmq-server, or else a container. The queue is "work-queue-demo". Needs pika.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pika

ROOT = Path(__file__).parent.parent
SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # Debian's on PATH is for root alone
IMAGE = "rabbitmq:4.3-management"  # as in docker-compose.yml
QUEUE = "work-queue-demo"
START = 120  # seconds that a broker has to start in
WAYS = {"round-robin": 0, "fair dispatch": 1}  # prefetch counts
UNICODE, ASCII = {"heavy": "█", "light": "░"}, {"heavy": "#", "light": "-"}
COLOURS = {"heavy": "\033[33m", "light": "\033[36m"}


class Play:
    """One run of all the tasks, as it has been seen so far."""

    def __init__(self, way, options):
        self.title = f"{way}: worker.py --prefetch-count {WAYS[way]}"
        self.workers = [[] for _ in range(options.workers)]  # [kind, label, begin, end] each
        self.waiting = threading.Semaphore(0)
        self.problem = None
        self.begin = None  # of the first task
        self.left = options.tasks

    def now(self):
        """Seconds since the first task began; at the end, until the last one was done."""
        ends = [task[3] for worker in self.workers for task in worker]
        if self.left or not ends:
            return time.monotonic() - (self.begin or time.monotonic())
        return max(ends)

    def read(self, number, lines):
        """Follow the output of a worker."""
        for line in lines:
            if "Waiting" in line:
                self.waiting.release()
            elif received := re.search(r"Received '((\w)\w* (\d+))", line):
                self.begin = self.begin or time.monotonic()
                name, initial, count = received.groups()
                task = [name.split()[0], initial.upper() + count, self.now(), None]
                self.workers[number].append(task)
            elif "Done" in line:
                self.workers[number][-1][3] = self.now()
                self.left -= 1
            else:
                self.problem = line.strip()
                self.waiting.release()

    def finish(self, draw):
        """Draw until the last task is done."""
        while self.left and not self.problem:
            draw()
            time.sleep(0.1)
        if self.problem:
            sys.exit(self.problem)


def tasks_of(options):
    """Heavy and light tasks in turn, as (kind, text)."""
    for number in range(options.tasks):
        kind = ("heavy", "light")[number % 2]
        yield kind, f"{kind} {number // 2 + 1}" + "." * getattr(options, kind)


def best(options):
    """Return the seconds that the best possible schedule of the tasks takes."""
    light_tasks = options.tasks // 2
    heavy_tasks = options.tasks - light_tasks
    lengths = {
        heavy * options.heavy + light * options.light
        for heavy in range(heavy_tasks + 1)
        for light in range(light_tasks + 1)
    }
    for limit in sorted(lengths):
        most = {0: 0}  # the heavy tasks that fit in: the most light ones beside them
        for _ in range(options.workers):
            more = {}
            for heavy, light in most.items():
                for added in range(min(heavy_tasks - heavy, limit // options.heavy) + 1):
                    beside = light + (limit - added * options.heavy) // options.light
                    more[heavy + added] = max(more.get(heavy + added, 0), beside)
            most = more
        if most.get(heavy_tasks, -1) >= light_tasks:
            return limit
    raise AssertionError("one worker alone can do them all")


def longest(options):
    """Return the seconds for which the charts have room."""
    lengths = [len(text.partition(".")[2]) + 1 for _, text in tasks_of(options)]
    dealt_out = [sum(lengths[number :: options.workers]) for number in range(options.workers)]
    return 1.02 * max(dealt_out)


def chart(play, options, columns, colour):
    """Return a play as lines of text."""
    encoding = sys.stdout.encoding or "ascii"
    fills = UNICODE if "utf" in encoding.lower() else ASCII
    scale = (columns - 12) / max(longest(options), play.now())
    yield f"{play.title}"[: columns - 10].ljust(columns - 10) + f"{play.now():7.1f} s"
    for number, tasks in enumerate(play.workers, 1):
        line, column = f"worker {number}".ljust(10), 0
        for kind, label, begin, end in tasks:
            left, right = (int(scale * (play.now() if at is None else at)) for at in (begin, end))
            bar = f"|{label}".ljust(right - left, fills[kind])[: right - left]
            bar = f"{COLOURS[kind]}{bar}\033[0m" if colour else bar
            line += " " * (left - column) + bar
            column = right
        yield line
    yield ""


def summary(plays, options):
    kinds = [f"{kind} {getattr(options, kind)} s" for kind in ("heavy", "light")]
    totals = [f"{way} {play.now():.1f} s" for way, play in zip(WAYS, plays)]
    yield f"{options.tasks} tasks, in turn {' and '.join(kinds)}, {options.workers} workers"
    yield f"{', '.join(totals)}, best possible {best(options)} s"


class Screen:
    """The charts on a terminal, drawn over and over in the same place."""

    def __init__(self, options):
        self.options = options
        self.lines = 0
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def show(self, plays):
        columns, rows = shutil.get_terminal_size()
        columns = min(max(columns, 40), 120) - 1
        lines = [line for play in plays for line in chart(play, self.options, columns, self.colour)]
        if sys.stdout.isatty():
            lines = lines[-(rows - 4) :]  # what has scrolled away can't be drawn over
            up = f"\033[{self.lines}A" if self.lines else ""
            sys.stdout.write(up + "\r\033[J" + "".join(f"{line}\n" for line in lines))
            self.lines = len(lines)
        else:
            print("\n".join(line.rstrip() for line in lines))
        sys.stdout.flush()


def picture(plays, options):
    """Return the plays as an SVG picture, readable on light and on dark."""
    width, left, row, bar = 760, 80, 30, 22
    scale = (width - left - 10) / max(longest(options), *(play.now() for play in plays))
    shapes, y = [], 24
    for play in plays:
        shapes.append(f'<text class="title" x="0" y="{y}">{play.title}</text>')
        shapes.append(f'<text class="clock" x="{width - 10}" y="{y}">{play.now():.1f} s</text>')
        for number, tasks in enumerate(play.workers, 1):
            y += row
            shapes.append(f'<text x="0" y="{y}">worker {number}</text>')
            for kind, label, begin, end in tasks:
                x, length = left + scale * begin, scale * (end - begin) - 2
                shapes.append(
                    f'<rect class="{kind}" x="{x:.1f}" y="{y - 16}" '
                    f'width="{length:.1f}" height="{bar}" rx="3"/>'
                    f'<text class="in-{kind}" x="{x + 6:.1f}" y="{y}">{label}</text>'
                )
        y += 2 * row
    for line in summary(plays, options):
        shapes.append(f'<text x="0" y="{y - 8}">{line}</text>')
        y += 20
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y - 8}" '
            'font-family="sans-serif" font-size="14">',
            "<title>Round-robin against fair dispatch</title>",
            "<style>text { fill: #6e7781 } .title { font-weight: bold }",  # on white and on black
            ".clock { text-anchor: end; font-weight: bold }",
            ".heavy { fill: #b45309 } .in-heavy { fill: #ffffff }",
            ".light { fill: #a5d8ff; stroke: #1c7ed6 } .in-light { fill: #10243a }</style>",
            *shapes,
            "</svg>\n",
        ]
    )


def free_port():
    while True:
        # Not one of those that the system gives to clients, and may have given by then.
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def accepts_connections(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def listen(handler):
    """Have CTRL+C and SIGTERM handled so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def interrupt(number, _frame):
    listen(signal.SIG_IGN)  # all that was started is ended now, however impatient somebody is
    sys.exit(128 + number)


@contextlib.contextmanager
def running(command, **options):
    """Run a process; kill it at the end.

    It is in a session of its own, as CTRL+C is for the demo, which ends them all.
    """
    early = []  # amid the start, an exception would leave the process behind
    listen(lambda number, _frame: early.append(number))
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        listen(interrupt)
        if early:
            interrupt(early[0], None)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # when it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process, port):
    """Wait until a process accepts connections; exit the program if it ends instead."""
    while not accepts_connections(port):
        if process.poll() is not None:
            sys.exit(f"{process.args[0]} has ended, with exit status {process.returncode}")
        time.sleep(0.1)


@contextlib.contextmanager
def installed_broker(server):
    """Run an installed RabbitMQ server with its own ports and folder; give its URL."""
    port, dist_port, epmd_port = free_port(), free_port(), free_port()
    # The killed server may still be closing files there.
    with tempfile.TemporaryDirectory(prefix="demo-", ignore_cleanup_errors=True) as folder:
        environment = {
            **os.environ,
            "HOME": folder,
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_FLAGS": "-start_epmd false",  # a daemon would be hard to end
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/none",
            "RABBITMQ_NODENAME": f"demo-{port}@localhost",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(dist_port),
            "RABBITMQ_MNESIA_BASE": folder,
            "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
        }
        quiet = subprocess.DEVNULL
        with running(["epmd"], env=environment, stderr=quiet) as epmd:  # Erlang's port mapper
            wait_for(epmd, epmd_port)
            with running([server], env=environment, cwd=folder, stdout=quiet) as process:
                try:
                    wait_for(process, port)
                    yield f"amqp://guest:guest@127.0.0.1:{port}/%2F"
                finally:
                    # Before that port, it starts a node in a session of its own, to start epmd.
                    wait_for(process, dist_port)


@contextlib.contextmanager
def container_broker():
    """Run a RabbitMQ container; give its URL."""
    name = f"{QUEUE}-{os.getpid()}"
    port = free_port()
    publish = f"127.0.0.1:{port}:5672"
    try:
        # In a session of its own, so that CTRL+C ends it in one way only.
        subprocess.run(
            ["docker", "run", "--rm", "--detach", "--name", name, "--publish", publish, IMAGE],
            check=True,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        yield f"amqp://guest:guest@127.0.0.1:{port}/%2F"
    finally:
        remove = ["docker", "rm", "--force", "--volumes", name]
        subprocess.run(remove, check=False, capture_output=True, start_new_session=True)


def some_broker():
    if url := os.environ.get("AMQP_URL"):
        return contextlib.nullcontext(url)
    if server := (SERVER.exists() and SERVER) or shutil.which("rabbitmq-server"):
        return installed_broker(server)
    if shutil.which("docker"):
        return container_broker()
    sys.exit(
        "No broker: set AMQP_URL, or install one: sudo apt-get install rabbitmq-server "
        "(or Docker: https://docs.docker.com/get-docker/)"
    )


def delete_queue(url):
    """Delete the demo's queue, as soon as the broker lets us in."""
    nodes = [pika.URLParameters(node) for node in re.split(",(?=amqps?://)", url)]
    deadline = time.monotonic() + (0 if os.environ.get("AMQP_URL") else START)
    while True:
        try:
            with pika.BlockingConnection(nodes) as connection:
                connection.channel().queue_delete(QUEUE)
                return
        except (pika.exceptions.AMQPError, OSError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"The broker does not let us in: {error!r}")
        time.sleep(0.2)


def script(url, name, *arguments):
    """Run one of the scripts; kill it at the end."""
    return running(
        [sys.executable, ROOT / name, "--queue", QUEUE, *arguments],
        env={**os.environ, "AMQP_URL": url},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(url, play, options, prefetch_count, draw):
    """Play all the tasks."""
    with contextlib.ExitStack() as stack:
        for number in range(options.workers):
            counted = ["--prefetch-count", str(prefetch_count)]
            worker = stack.enter_context(script(url, "worker.py", *counted))
            reader = threading.Thread(target=play.read, args=(number, worker.stdout), daemon=True)
            reader.start()
            play.waiting.acquire()  # so that the queue knows them in their order
        producer = stack.enter_context(script(url, "new_task.py", "-"))
        sent, _ = producer.communicate("\n".join(text for _, text in tasks_of(options)))
        if producer.returncode:
            sys.exit(sent.strip())
        play.finish(draw)


def parse_arguments():
    def positive(text):
        if int(text) < 1:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="default: 2")
    parser.add_argument("--tasks", type=positive, default=8, metavar="N", help="default: 8")
    parser.add_argument("--heavy", type=positive, default=3, metavar="SECONDS", help="default: 3")
    parser.add_argument("--light", type=positive, default=1, metavar="SECONDS", help="default: 1")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a picture, too")
    return parser.parse_args()


def play_all(url, options):
    """Play the tasks in each of the ways, and show how it went."""
    plays, screen = [], Screen(options)
    on_terminal = sys.stdout.isatty()
    for way, prefetch_count in WAYS.items():
        plays.append(Play(way, options))
        draw = (lambda: screen.show(plays)) if on_terminal else (lambda: None)
        run(url, plays[-1], options, prefetch_count, draw)
    screen.show(plays)
    print("\n".join(summary(plays, options)))
    if options.svg:
        options.svg.write_text(picture(plays, options))


def main():
    listen(interrupt)
    options = parse_arguments()
    with contextlib.ExitStack() as stack:
        if sys.stdout.isatty():
            print("Waiting for the broker ...", end="", flush=True)
        url = stack.enter_context(some_broker())
        delete_queue(url)
        stack.callback(delete_queue, url)
        stack.callback(listen, signal.SIG_IGN)  # as all that follows is cleaning up
        play_all(url, options)


if __name__ == "__main__":
    main()
