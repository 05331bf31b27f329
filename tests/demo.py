#!/usr/bin/env python3
"""Draw how a work queue shares out its tasks: round-robin, and then fair dispatch.

    tests/demo.py                                  two workers, long and short tasks in turn
    tests/demo.py --workers 3 --tasks 12           more of both
    tests/demo.py --long 5 --short 2               other lengths, in seconds
    tests/demo.py --svg picture.svg                a picture as well
    AMQP_URL=amqp://... tests/demo.py              on that broker

The same tasks are played twice with the real scripts: to workers with --prefetch-count 0, and
to workers with the default, 1. Without AMQP_URL, an installed rabbitmq-server is started for
the demo alone. The queue is "work-queue-demo". tests/setup.sh installs what all this needs.
"""

import signal

if __name__ == "__main__":  # CTRL+C amid the imports ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import functools
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pika
import rich
from conftest import ROOT, Script
from mirakuru.exceptions import ProcessExitedWithError
from rich.live import Live
from rich.text import Text
from servers import PROGRAMS, servers

QUEUE = "work-queue-demo"
WAYS = {"round-robin": 0, "fair dispatch": 1}  # prefetch counts
UNICODE, ASCII = {"long": "█", "short": "░"}, {"long": "#", "short": "-"}
COLOURS = {"long": "yellow", "short": "cyan"}
STYLE = """<title>Round-robin against fair dispatch</title>
<style>text { fill: #6e7781 } .title { font-weight: bold }
.clock { text-anchor: end; font-weight: bold }
.long { fill: #b45309 } .in-long { fill: #ffffff }
.short { fill: #a5d8ff; stroke: #1c7ed6 } .in-short { fill: #10243a }</style>"""

console = rich.get_console()
console.show_cursor = lambda show=True: False  # if Live hid it, `kill -9` would leave it so


class Play:
    """One run of all the tasks, as it has been seen so far."""

    def __init__(self, way, options):
        self.way, self.options = way, options
        default = " (the default)" if WAYS[way] == 1 else ""
        self.title = f"{way}: worker.py --prefetch-count {WAYS[way]}{default}"
        self.workers = []  # running scripts

    def moments(self, word):
        return [moment for worker in self.workers for moment in worker.moments(word)]

    def seconds(self):
        """Seconds since the first task began; at the end, until the last one was done."""
        begins, ends = self.moments("Received"), self.moments("Done")
        end = max(ends) if len(ends) >= self.options.tasks else time.monotonic()
        return end - min(begins, default=end)

    def rows(self):
        """The tasks of each worker, as [(kind, label, begin, end)]; one in work ends now."""
        all_begins = [worker.moments("Received") for worker in self.workers]
        first = min(itertools.chain(*all_begins), default=0)
        for worker, begins in zip(self.workers, all_begins):
            ends = [*worker.moments("Done"), first + self.seconds()]
            row = []
            for text, begin, end in zip(worker.tasks("Received"), begins, ends):
                kind, number = text.rstrip(".").split()
                row.append((kind, kind[0].upper() + number, begin - first, end - first))
            yield row


def tasks_of(options):
    """Long and short tasks in turn."""
    for number in range(options.tasks):
        kind = ("long", "short")[number % 2]
        yield f"{kind} {number // 2 + 1}" + "." * getattr(options, kind)


def longest(options):
    """Return the seconds for which the charts have room: those of round-robin, and some more."""
    lengths = [text.count(".") for text in tasks_of(options)]
    return 1.02 * max(sum(lengths[number :: options.workers]) for number in range(options.workers))


def best(options):
    """Return the seconds that the best possible schedule of the tasks takes."""

    @functools.cache
    def fit_in(longs, workers, seconds):
        """The most short tasks that they can do in that time, beside these long ones."""
        if not workers:
            return float("-inf") if longs else 0
        return max(
            (seconds - own * options.long) // options.short
            + fit_in(longs - own, workers - 1, seconds)
            for own in range(min(longs, seconds // options.long) + 1)
        )

    shorts, odd = divmod(options.tasks, 2)
    return next(n for n in itertools.count(1) if fit_in(shorts + odd, options.workers, n) >= shorts)


def chart(play):
    fills = ASCII if console.options.ascii_only else UNICODE
    columns = min(max(console.width, 40), 120) - 1
    scale = (columns - 12) / max(longest(play.options), play.seconds())
    title = play.title[: columns - 10].ljust(columns - 10)
    text = Text(f"{title}{play.seconds():7.1f} s", no_wrap=True, overflow="crop")
    for number, row in enumerate(play.rows(), 1):
        name = f"worker {number}"
        text.append(f"\n{name}")
        column = len(name) - 10
        for kind, label, begin, end in row:
            left, right = int(scale * begin), int(scale * end)
            bar = f"|{label}".ljust(right - left, fills[kind])[: right - left]
            text.append(" " * (left - column)).append(bar, COLOURS[kind])
            column = right
    return text


def summary(plays, options):
    kinds = f"long {options.long} s and short {options.short} s"
    totals = [f"{play.way} {play.seconds():.1f} s" for play in plays]
    yield f"{options.tasks} tasks, in turn {kinds}, {options.workers} workers"
    yield f"{', '.join(totals)}, best possible {best(options)} s"


def picture(plays, options):
    """Return the plays as an SVG picture, readable on light and on dark."""
    scale = 670 / max(longest(options), *(play.seconds() for play in plays))
    shapes, y = [], 24
    for play in plays:
        shapes.append(f'<text class="title" x="0" y="{y}">{play.title}</text>')
        shapes.append(f'<text class="clock" x="750" y="{y}">{play.seconds():.1f} s</text>')
        for number, row in enumerate(play.rows(), 1):
            y += 30
            shapes.append(f'<text x="0" y="{y}">worker {number}</text>')
            for kind, label, begin, end in row:
                x, width = 80 + scale * begin, scale * (end - begin) - 2
                shapes.append(
                    f'<rect class="{kind}" x="{x:.1f}" y="{y - 16}" '
                    f'width="{width:.1f}" height="22" rx="3"/>'
                    f'<text class="in-{kind}" x="{x + 6:.1f}" y="{y}">{label}</text>'
                )
        y += 60
    for line in summary(plays, options):
        shapes.append(f'<text x="0" y="{y - 8}">{line}</text>')
        y += 20
    attributes = f'viewBox="0 0 760 {y - 8}" font-family="sans-serif" font-size="14"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>'
    return "\n".join([head, STYLE, *shapes, "</svg>\n"])


def run(play, url):
    """Play all the tasks, and draw them meanwhile; without a terminal, only once."""
    with contextlib.ExitStack() as stack:
        for _ in range(play.options.workers):
            arguments = ["-q", QUEUE, "--prefetch-count", str(WAYS[play.way])]
            play.workers.append(Script([ROOT / "worker.py", *arguments], url))
            stack.callback(play.workers[-1].end)
            play.workers[-1].wait_for(" [")  # [*] it waits, known to the queue as the next; or [!]
        producer = Script([ROOT / "new_task.py", "-q", QUEUE, "-"], url, stdin=subprocess.PIPE)
        stack.callback(producer.end)
        with contextlib.suppress(BrokenPipeError), producer.process.stdin as tasks:
            tasks.write("\n".join(tasks_of(play.options)).encode())
        piped = not console.is_terminal
        with Live(get_renderable=lambda: chart(play), auto_refresh=False, transient=piped) as live:
            while len(play.moments("Done")) < play.options.tasks:
                for script in (*play.workers, producer):
                    if script.err:
                        sys.exit(script.err[0].strip())
                live.refresh()
                time.sleep(0.1)
    if piped:
        console.print(chart(play))
    console.line()


def start_broker(stack):
    """Start a RabbitMQ server that ends with a stack; return its URL."""
    if not (PROGRAMS / "rabbitmq-server").exists():
        sys.exit(
            "No RabbitMQ server is installed: set AMQP_URL, for instance to the broker of "
            "`docker compose up -d --wait`, or run tests/setup.sh"
        )
    start = stack.enter_context(servers())
    try:
        return start().url
    except ProcessExitedWithError as error:
        sys.exit(f"rabbitmq-server has ended, with exit status {error.exit_code}")


def delete_queue(url):
    nodes = [pika.URLParameters(node) for node in re.split(",(?=amqps?://)", url)]
    try:
        with pika.BlockingConnection(nodes) as connection:
            connection.channel().queue_delete(QUEUE)
    except (pika.exceptions.AMQPError, OSError) as error:
        sys.exit(f"The broker does not let us in: {error!r}")


def listen(handler):
    """Have CTRL+C and SIGTERM handled so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def interrupt(number, _frame):
    listen(signal.SIG_IGN)  # all that was started is ended now, however impatient somebody is
    sys.exit(128 + number)


def main():
    listen(interrupt)
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--tasks", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--long", type=int, default=3, metavar="SECONDS", help="default: 3")
    parser.add_argument("--short", type=int, default=1, metavar="SECONDS", help="default: 1")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a picture, too")
    options = parser.parse_args()
    if min(options.workers, options.tasks, options.long, options.short) < 1:
        parser.error("all numbers have to be 1 or more")

    plays = [Play(way, options) for way in WAYS]
    with contextlib.ExitStack() as stack:
        with Live(Text("Waiting for the broker ..."), auto_refresh=False, transient=True):
            url = os.environ.get("AMQP_URL") or start_broker(stack)
            delete_queue(url)
        stack.callback(delete_queue, url)
        stack.callback(listen, signal.SIG_IGN)  # as all that follows is cleaning up
        for play in plays:
            run(play, url)
    print("\n".join(summary(plays, options)))
    if options.svg:
        options.svg.write_text(picture(plays, options))


if __name__ == "__main__":
    main()
