#!/usr/bin/env python3
"""Compare the two scripts with others on one private broker; print tests/MEASUREMENTS.md's tables.

    tests/benchmark.py                         everything: 15 to 20 minutes
    tests/benchmark.py --quorum                the same with quorum queues
    tests/benchmark.py consumers one-shot      some of it
    tests/benchmark.py --runs 1 --tasks 2000 --lines 5000 --million 100000     a quick look

To be run by hand on a quiet machine: rates are this machine's, and only their ratios travel.
The packages in benchmark-requirements.txt take part if they are installed, and so do the programs
of Debian's amqp-tools and redis-server (for RQ).
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
from servers import accepts_connections, free_port, servers, wait_until

PEERS = ROOT / "tests" / "peers"
TUTORIAL = ROOT / "tests" / "tutorial"
PYTHON = sys.executable
STUCK = 10  # seconds after which a consumer is measured by what it has done so far

NEW_TASK = [PYTHON, ROOT / "new_task.py", "-"]
COUNT_LOOP = [PYTHON, PEERS / "count_loop.py", "TASKS"]
CONFIRM_LOOP = [PYTHON, PEERS / "confirm_loop.py"]
AMQP_PUBLISH = ["amqp-publish", "-l", "-p", "-r", "task_queue"]
KOMBU = [PYTHON, PEERS / "kombu_new_task.py"]
AIO_PIKA = [PYTHON, PEERS / "aio_pika_new_task.py"]
CELERY = [PYTHON, PEERS / "celery_tasks.py"]
DRAMATIQ = [PYTHON, PEERS / "dramatiq_tasks.py"]
RQ = [PYTHON, PEERS / "rq_tasks.py"]

WORKER = [PYTHON, ROOT / "worker.py"]
CALLING = [*WORKER, "--function", "builtins:len"]
LOOP = [PYTHON, TUTORIAL / "worker.py"]
ACK_LOOP = [PYTHON, PEERS / "ack_loop.py"]
KOMBU_WORKER = [PYTHON, PEERS / "kombu_worker.py"]
AIO_PIKA_WORKER = [PYTHON, PEERS / "aio_pika_worker.py"]
AMQP_CONSUME = ["amqp-consume", "-q", "task_queue", "-p", "1", "cat"]
CELERY_WORKER = [PYTHON, "-m", "celery", "--app", "celery_tasks", "--quiet", "worker"]
CELERY_WORKER += ["--concurrency", "1", "--loglevel", "ERROR"]
CELERY_WORKER += ["--without-gossip", "--without-mingle", "--without-heartbeat", "--pool"]
CELERY_THREAD, CELERY_PREFORK = [*CELERY_WORKER, "threads"], [*CELERY_WORKER, "prefork"]
DRAMATIQ_WORKER = [PYTHON, "-m", "dramatiq", "dramatiq_tasks", "--processes", "1", "--threads", "1"]
RQ_WORKER = ["sh", "-c", f'exec "{PYTHON}" -m rq.cli worker --quiet --url $REDIS_URL rq']

CONSUMERS = {  # name: command, queue, what fills the queue
    "worker.py": (WORKER, "task_queue", NEW_TASK),
    "tutorial's loop": (LOOP, "task_queue", NEW_TASK),
    "loop, acknowledges only": (ACK_LOOP, "task_queue", NEW_TASK),
    "kombu": (KOMBU_WORKER, "task_queue", NEW_TASK),
    "aio-pika": (AIO_PIKA_WORKER, "task_queue", NEW_TASK),
    "amqp-consume, `cat`": (AMQP_CONSUME, "task_queue", NEW_TASK),
    # Not its solo pool: with late acknowledgement that of 5.7 comes to a halt in mid-stream.
    "Celery, one thread": (CELERY_THREAD, "celery", CELERY),
    "Celery, one thread, prefetch 4": (["env", "MULTIPLIER=4", *CELERY_THREAD], "celery", CELERY),
    "Dramatiq, one thread": (DRAMATIQ_WORKER, "dramatiq", DRAMATIQ),
}

FUNCTIONS = {  # a Python function is called for each task
    "worker.py, sleeping": (WORKER, "task_queue", NEW_TASK),
    "worker.py --function": (CALLING, "task_queue", NEW_TASK),
    "Celery, prefork pool": (CELERY_PREFORK, "celery", CELERY),
    "Dramatiq, one thread": (DRAMATIQ_WORKER, "dramatiq", DRAMATIQ),
    "RQ, a fork for each task": (RQ_WORKER, "rq", RQ),
}

PRODUCERS = {  # name: command, queue, its share of the lines: fewer for a round trip each
    "new_task.py -": (NEW_TASK, "task_queue", 1),
    "bare loop, counts confirms": (COUNT_LOOP, "task_queue", 1),
    "loop, a confirm each": (CONFIRM_LOOP, "task_queue", 0.1),
    "amqp-publish -l -p, unconfirmed": (AMQP_PUBLISH, "task_queue", 1),
    "kombu": (KOMBU, "task_queue", 0.1),
    "aio-pika, 1,000 confirms at once": (AIO_PIKA, "task_queue", 1),
    "Celery": (CELERY, "celery", 0.1),
    "Dramatiq": (DRAMATIQ, "dramatiq", 0.1),
}

INSTALLED = {  # how the names of peers begin: whether they are here
    "amqp-": shutil.which("amqp-publish"),
    "kombu": find_spec("kombu"),
    "aio-pika": find_spec("aio_pika"),
    "Celery": find_spec("celery"),
    "Dramatiq": find_spec("dramatiq"),
    "RQ": find_spec("rq") and shutil.which("redis-server"),
}


class Bench:
    """Starts commands against a broker and measures them."""

    def __init__(self, broker, quorum):
        self.broker = broker
        self.input = broker.folder / "input"
        self.url = broker.add_quorum_vhost() if quorum else broker.url
        self.environment = {
            **os.environ,
            "AMQP_URL": self.url,
            "DECLARE": "quorum" if quorum else "classic",
            "dramatiq_queue_prefetch": "1",
            "PYTHONUNBUFFERED": "1",  # all print lines as they come, as on a terminal
        }
        if INSTALLED["RQ"]:
            port = free_port()
            redis = ["redis-server", "--port", str(port), "--save", "", "--dir", broker.folder]
            subprocess.Popen(redis, stdout=subprocess.DEVNULL)
            wait_until(lambda: accepts_connections(port))
            self.environment["REDIS_URL"] = f"redis://127.0.0.1:{port}"

    def start(self, command, **streams):
        if str(command[0]).startswith("amqp-"):
            command = [command[0], "--url", self.url, *command[1:]]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **streams}
        return subprocess.Popen(command, env=self.environment, cwd=PEERS, **streams)

    @contextlib.contextmanager
    def queue(self, name):
        """Make a queue anew, where its users agree on how; give what counts its messages."""
        if name == "rq":
            from redis import Redis

            with Redis.from_url(self.environment["REDIS_URL"]) as redis:
                yield lambda: redis.llen("rq:queue:rq")
                redis.flushall()
            return
        with self.broker.channel(f"{self.url}?heartbeat=0") as channel:
            channel.queue_delete(name)
            if name == "task_queue":
                channel.queue_declare(name, durable=True)
            yield lambda: channel.queue_declare(name, passive=True).method.message_count
            channel.queue_delete(name)

    def produce(self, command, tasks, size=10):
        """Send so many tasks of so many bytes; return the seconds that it took."""
        command = [str(tasks) if part == "TASKS" else part for part in command]
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
        wait_until(lambda: waiting() < full or processes[0].poll() is not None)
        assert processes[0].poll() is None, command
        begin, first = time.perf_counter(), waiting()
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
    compare(bench, options, CONSUMERS, "no-op tasks", "tutorial's")


def functions(bench, options):
    compare(bench, options, FUNCTIONS, "function calls", "sleeping")


def compare(bench, options, cases, kind, base):
    """Measure consumers, and compare their rates with that of the one whose name holds `base`."""

    def measure(command, name, filler):
        with bench.queue(name) as waiting:
            bench.produce(filler, options.tasks)
            return bench.consume(command, waiting, options.tasks, options.tasks)

    results = medians(options.runs, measure, cases)
    (one,) = (rate for name, (rate, _) in results.items() if base in name)
    rows = [
        (name, f"{rate:.0f}", f"{rate / one:.2f}", f"{peak:.1f}")
        for name, (rate, peak) in results.items()
    ]
    table((f"consumer, {kind}, prefetch 1", "tasks/s", f"{base} = 1", "peak MiB"), *rows)


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
    def milliseconds(folder):
        begin = time.perf_counter()
        assert bench.start([PYTHON, folder / "new_task.py", "Hello"]).wait() == 0
        return 1000 * (time.perf_counter() - begin)

    def measure():
        ours, tutorial = milliseconds(ROOT), milliseconds(TUTORIAL)
        return ours, tutorial, ours / tutorial  # of two that ran at the same moment

    with bench.queue("task_queue"):
        ((ours, tutorial, ratio),) = medians(30 * options.runs, measure, {"": ()}).values()
    table(
        ("one task", "ms", "tutorial's = 1"),
        ("new_task.py Hello", f"{ours:.1f}", f"{ratio:.3f}"),
        ("tutorial's", f"{tutorial:.1f}", "1"),
    )


def memory(bench, options):
    def measure(tasks):
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

    cases = {f"{tasks:,} lines": (tasks,) for tasks in (options.million // 1000, options.million)}
    rows = [(name, f"{peak:.1f}") for name, (peak,) in medians(1, measure, cases).items()]
    table(("new_task.py -", "peak MiB"), *rows)


def scale(bench, options):
    """Sent and done per second, and the memory of a worker."""

    def measure(workers, tasks, size):
        with bench.queue("task_queue") as waiting:
            sent = tasks / bench.produce(NEW_TASK, tasks, size)
            done = min(2 * options.tasks, int(0.8 * tasks))  # while others still wait
            return sent, *bench.consume(WORKER, waiting, tasks, done, workers)

    cases = {f"workers: {workers}": (workers, 30_000, 10) for workers in (1, 2, 4, 8, 16)}
    for tasks in (1_000, 100_000, options.million):
        cases[f"tasks that wait: {tasks:,}"] = (1, tasks, 10)
    cases["bodies of 10 kB"] = (1, 10_000, 10_000)
    cases["bodies of 1 MB"] = (1, 200, 1_000_000)

    rows = []
    for name, case in cases.items():
        runs = 1 if options.million in case else options.runs  # it takes long
        ((sent, done, peak),) = medians(runs, measure, {name: case}).values()
        rows.append((name, f"{sent:.0f}", f"{done:.0f}", f"{peak:.1f}"))
    table(("new_task.py -, worker.py", "sent/s", "done/s", "MiB a worker"), *rows)


SECTIONS = {
    "scale": scale,
    "consumers": consumers,
    "functions": functions,
    "producers": producers,
    "one-shot": one_shot,
    "memory": memory,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--tasks", type=int, default=10_000, help="for each consumer")
    parser.add_argument("--lines", type=int, default=50_000, help="for each producer")
    parser.add_argument("--million", type=int, default=1_000_000, help="for memory, scale")
    parser.add_argument("--runs", type=int, default=3, help="of which medians are taken")
    parser.add_argument("--quorum", action="store_true", help="quorum queues, not classic ones")
    options = parser.parse_args()
    with servers() as start:
        broker = start()
        version = ".".join(map(str, broker.version()))
        kind = "quorum" if options.quorum else "classic"
        print(f"RabbitMQ {version}, {kind} queues, Python {sys.version.split()[0]}")
        bench = Bench(broker, options.quorum)
        for name in options.sections or SECTIONS:
            SECTIONS[name](bench, options)


if __name__ == "__main__":
    main()
