#!/usr/bin/env python3
"""Compare the two scripts with others on one private broker; print tests/README.md's tables.

    tests/benchmark.py                         everything: about half an hour
    tests/benchmark.py consumers one-shot      some of it
    tests/benchmark.py --runs 1 --tasks 2000 --lines 5000 --million 100000     a quick look

To be run by hand on a quiet machine: rates are this machine's, and only their ratios travel.
Celery and Dramatiq take part if they are installed (benchmark-requirements.txt), and so do the
programs of Debian's amqp-tools.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
from conftest import ROOT
from servers import servers

PEERS = ROOT / "tests" / "peers"
TUTORIAL = ROOT / "tests" / "tutorial"
PYTHON = sys.executable
STUCK = 30  # seconds after which a consumer is measured by what it has done so far

NEW_TASK = [PYTHON, ROOT / "new_task.py", "-"]
CONFIRM_LOOP = [PYTHON, PEERS / "confirm_loop.py"]
AMQP_PUBLISH = ["amqp-publish", "-l", "-p", "-r", "task_queue"]
CELERY = [PYTHON, PEERS / "celery_tasks.py"]
DRAMATIQ = [PYTHON, PEERS / "dramatiq_tasks.py"]

WORKER = [PYTHON, ROOT / "worker.py"]
LOOP = [PYTHON, TUTORIAL / "worker.py"]
AMQP_CONSUME = ["amqp-consume", "-q", "task_queue", "-p", "1", "cat"]
CELERY_WORKER = [PYTHON, "-m", "celery", "--app", "celery_tasks", "--quiet", "worker"]
CELERY_WORKER += ["--pool", "solo", "--loglevel", "ERROR"]
CELERY_WORKER += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
DRAMATIQ_WORKER = [PYTHON, "-m", "dramatiq", "dramatiq_tasks", "--processes", "1", "--threads", "1"]

CONSUMERS = {  # name: command, queue, what fills the queue
    "worker.py": (WORKER, "task_queue", NEW_TASK),
    "tutorial's loop": (LOOP, "task_queue", NEW_TASK),
    "amqp-consume, `cat`": (AMQP_CONSUME, "task_queue", NEW_TASK),
    "Celery, solo pool": (CELERY_WORKER, "celery", CELERY),
    "Celery, solo pool, multiplier 4": (["env", "MULTIPLIER=4", *CELERY_WORKER], "celery", CELERY),
    "Dramatiq, one thread": (DRAMATIQ_WORKER, "dramatiq", DRAMATIQ),
}

PRODUCERS = {  # name: command, queue, its share of the lines: fewer for a round trip each
    "new_task.py -": (NEW_TASK, "task_queue", 1),
    "loop, a confirm each": (CONFIRM_LOOP, "task_queue", 0.1),
    "amqp-publish -l -p, unconfirmed": (AMQP_PUBLISH, "task_queue", 1),
    "Celery": (CELERY, "celery", 0.1),
    "Dramatiq": (DRAMATIQ, "dramatiq", 0.1),
}

INSTALLED = {  # how the names of peers begin: whether they are here
    "amqp-": shutil.which("amqp-publish"),
    "Celery": find_spec("celery"),
    "Dramatiq": find_spec("dramatiq"),
}


class Bench:
    """Starts commands against a broker and measures them."""

    def __init__(self, broker, folder, url):
        self.broker = broker
        self.folder = folder
        self.input = folder / "input"
        self.url = url

    def start(self, command, **streams):
        if str(command[0]).startswith("amqp-"):
            command = [command[0], "--url", self.url, *command[1:]]
        environment = {**os.environ, "AMQP_URL": self.url, "dramatiq_queue_prefetch": "1"}
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams}
        return subprocess.Popen(command, env=environment, cwd=PEERS, **streams)

    @contextlib.contextmanager
    def queue(self, name):
        """Make a queue anew, where its users agree on how; give what counts its messages."""
        with self.broker.channel(f"{self.url}?heartbeat=0") as channel:
            channel.queue_delete(name)
            if name == "task_queue":
                channel.queue_declare(name, durable=True)
            yield lambda: channel.queue_declare(name, passive=True).method.message_count
            channel.queue_delete(name)

    def produce(self, command, tasks, size=10):
        """Send so many tasks of so many bytes; return the seconds that it took."""
        with open(self.input, "w") as lines:
            lines.writelines(f"{number:0{size}}\n" for number in range(tasks))
        with open(self.input, "rb") as lines:
            begin = time.perf_counter()
            status = self.start(command, stdin=lines).wait()
            seconds = time.perf_counter() - begin
        assert status == 0, command
        return seconds

    def consume(self, command, waiting, full, tasks, consumers=1):
        """Let consumers do some of the waiting tasks; return tasks per second, and the memory."""
        assert waiting() == full
        processes = [self.start(command) for _ in range(consumers)]
        while (first := waiting()) == full:
            assert processes[0].poll() is None, command
            time.sleep(0.01)
        begin = time.perf_counter()
        while (left := waiting()) > full - tasks and time.perf_counter() < begin + STUCK:
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        memory = statistics.mean(map(peak_memory, processes))
        for process in processes:
            end(process)
        return (first - left) / seconds, memory


def peak_memory(process):
    """Return the peak memory, in MiB, of a process and its children."""
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(True))]
    status = "".join(Path(f"/proc/{pid}/status").read_text() for pid in family)
    return sum(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) / 1024


def end(process):
    for member in (*psutil.Process(process.pid).children(True), process):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def table(*rows):
    """Print rows, the first being the names of columns."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows), flush=True)


def medians(runs, measure, cases):
    """Measure the cases, argument tuples by name, in turn; return the medians of each one."""
    figures = {
        name: []
        for name in cases
        if all(found for peer, found in INSTALLED.items() if name.startswith(peer))
    }
    for _ in range(runs):
        for name, measured in figures.items():
            measured.append(measure(*cases[name]))
    return {name: [*map(statistics.median, zip(*each))] for name, each in figures.items()}


def consumers(bench, options):
    def measure(command, name, filler):
        with bench.queue(name) as waiting:
            bench.produce(filler, options.tasks)
            return bench.consume(command, waiting, options.tasks, options.tasks)

    results = medians(options.runs, measure, CONSUMERS)
    base, _ = results["tutorial's loop"]
    rows = [
        (name, f"{rate:.0f}", f"{rate / base:.2f}", f"{peak:.1f}")
        for name, (rate, peak) in results.items()
    ]
    table(("consumer, no-op tasks, prefetch 1", "tasks/s", "tutorial's = 1", "peak MiB"), *rows)


def producers(bench, options):
    def measure(command, name, share):
        tasks = int(options.lines * share)
        with bench.queue(name):
            return (tasks / bench.produce(command, tasks),)

    results = medians(options.runs, measure, PRODUCERS)
    (base,) = results["loop, a confirm each"]
    rows = [(name, f"{rate:.0f}", f"{rate / base:.1f}") for name, (rate,) in results.items()]
    table(("producer, a task for each line", "tasks/s", "loop = 1"), *rows)


def one_shot(bench, options):
    def measure(folder):
        begin = time.perf_counter()
        assert bench.start([PYTHON, folder / "new_task.py", "Hello"]).wait() == 0
        return (1000 * (time.perf_counter() - begin),)

    cases = {"new_task.py Hello": (ROOT,), "tutorial's": (TUTORIAL,)}
    with bench.queue("task_queue"):
        results = medians(10 * options.runs, measure, cases)
    (base,) = results["tutorial's"]
    rows = [(name, f"{ms:.1f}", f"{ms / base:.2f}") for name, (ms,) in results.items()]
    table(("one task", "ms", "tutorial's = 1"), *rows)


def memory(bench, options):
    """A thousand lines and a million, a hundredth of a million waiting tasks and all."""

    def measure_producer(tasks):
        # Its input stays open when all is sent, so that it can be looked at.
        hold = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        lines = subprocess.Popen(["sh", "-c", f"seq {tasks}; cat"], **hold)
        with bench.queue("task_queue"):
            process = bench.start(NEW_TASK, stdin=lines.stdout, stdout=subprocess.PIPE)
            for _ in range(tasks):
                process.stdout.readline()
            peak = peak_memory(process)
            lines.communicate()
            assert process.wait() == 0
        return (peak,)

    def measure_worker(waiting_tasks):
        with bench.queue("task_queue") as waiting:
            bench.produce(NEW_TASK, waiting_tasks)
            return bench.consume(WORKER, waiting, waiting_tasks, options.million // 100)

    few, many = options.million // 1000, options.million
    cases = {f"new_task.py, {tasks:,} lines": (tasks,) for tasks in (few, many)}
    lines = medians(1, measure_producer, cases)
    cases = {f"worker.py, {tasks:,} waiting": (tasks,) for tasks in (10 * few, many)}
    waiting = medians(options.runs, measure_worker, cases)
    table(
        ("script", "tasks/s", "peak MiB"),
        *((name, "", f"{peak:.1f}") for name, (peak,) in lines.items()),
        *((name, f"{rate:.0f}", f"{peak:.1f}") for name, (rate, peak) in waiting.items()),
    )


SCALE = {  # what: workers, tasks that wait, bytes of each, how many of them are done
    "1 worker": (1, 30_000, 10, 20_000),
    "2 workers": (2, 30_000, 10, 20_000),
    "4 workers": (4, 30_000, 10, 20_000),
    "8 workers": (8, 30_000, 10, 20_000),
    "16 workers": (16, 30_000, 10, 20_000),
    "1,000 tasks wait": (1, 1_000, 10, 800),
    "100,000 tasks wait": (1, 100_000, 10, 20_000),
    "1,000,000 tasks wait": (1, 1_000_000, 10, 20_000),
    "bodies of 10 kB": (1, 10_000, 10_000, 8_000),
    "bodies of 1 MB": (1, 200, 1_000_000, 180),
}


def scale(bench, options):
    """Classic and quorum queues: sent and done per second, and the memory of a worker."""
    quorum = Bench(bench.broker, bench.folder, bench.broker.add_quorum_vhost())

    def measure(workers, tasks, size, done):
        figures = []
        for each in (bench, quorum):
            with each.queue("task_queue") as waiting:
                figures.append(tasks / each.produce(NEW_TASK, tasks, size))
                figures += each.consume(WORKER, waiting, tasks, done, workers)
        return figures

    rows = []
    for name, case in SCALE.items():
        runs = 1 if "1,000,000" in name else options.runs
        figures = medians(runs, measure, {name: case})[name]
        sent, done, memory, sent_quorum, done_quorum, memory_quorum = figures
        rates = (f"{rate:.0f}" for rate in (sent, sent_quorum, done, done_quorum))
        rows.append((name, *rates, f"{max(memory, memory_quorum):.1f}"))
    table(("", "sent/s, classic", "quorum", "done/s, classic", "quorum", "MiB a worker"), *rows)


SECTIONS = {
    "scale": scale,
    "consumers": consumers,
    "producers": producers,
    "one-shot": one_shot,
    "memory": memory,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--tasks", type=int, default=20_000, help="for each consumer")
    parser.add_argument("--lines", type=int, default=100_000, help="for each producer")
    parser.add_argument("--million", type=int, default=1_000_000, help="for memory")
    parser.add_argument("--runs", type=int, default=3, help="of which medians are taken")
    options = parser.parse_args()
    with servers() as start:
        broker = start()
        bench = Bench(broker, broker.folder, broker.url)
        for name in options.sections or SECTIONS:
            SECTIONS[name](bench, options)


if __name__ == "__main__":
    main()
