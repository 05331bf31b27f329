#!/usr/bin/env python3
"""Compare the two scripts with the tutorial's, on a private broker; print a Markdown table.

    tests/benchmark.py                   all of it, with a million waiting tasks: some minutes
    tests/benchmark.py --tasks 2000 --waiting 20000 --runs 1

To be run by hand on a quiet machine: rates are of this machine, only their ratios travel.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import port_for
from conftest import ROOT, Broker

TUTORIAL = ROOT / "tests" / "tutorial"
QUEUE = "task_queue"

CONFIRM_LOOP = """
import os, sys, pika
connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.queue_declare(queue="task_queue", durable=True)
channel.confirm_delivery()
for line in sys.stdin.buffer:
    channel.basic_publish("", "task_queue", line[:-1], pika.BasicProperties(delivery_mode=2))
    print(f" [x] Sent {line[:-1]}")
connection.close()
"""


def lines(count):
    return b"".join(b"task number %d\n" % number for number in range(count))


def peak(process):
    """Return a running process's peak memory in MiB (VmHWM of proc_pid_status(5))."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def timed(url, command, data=b""):
    """Run a command to its end; return its seconds."""
    with tempfile.TemporaryFile() as stdin:
        stdin.write(data)
        stdin.seek(0)
        start = time.perf_counter()
        environment = {**os.environ, "AMQP_URL": url}
        subprocess.run(command, stdin=stdin, stdout=subprocess.DEVNULL, env=environment, check=True)
        return time.perf_counter() - start


def streamed(url, count):
    """Send so many tasks with new_task.py; return its peak memory in MiB at the last one."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "new_task.py", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "AMQP_URL": url},
    )
    feeder = threading.Thread(target=process.stdin.write, args=(lines(count),))
    feeder.start()
    for _ in range(count):
        process.stdout.readline()
    feeder.join()
    memory = peak(process)
    process.communicate()
    return memory


def consumed(broker, command, tasks):
    """Let a consumer do so many tasks; return tasks per second and its memory in MiB."""
    with broker.channel() as channel:

        def left():
            return channel.queue_declare(QUEUE, passive=True).method.message_count

        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, env={**os.environ, "AMQP_URL": broker.url}
        )
        begin = left()
        while (start := left()) > begin - tasks // 10:  # started, and warm
            time.sleep(0.05)
        clock = time.perf_counter()
        while (now := left()) > start - tasks:
            time.sleep(0.05)
        rate = (start - now) / (time.perf_counter() - clock)
        memory = peak(process)
        process.kill()
        process.wait()
    return rate, memory


def row(name, results, digits=0):
    """Print the medians of some runs as a row of the table; return the first of them."""
    medians = [statistics.median(column) for column in zip(*results)]
    print(f"| {name} | " + " | ".join(f"{median:.{digits}f}" for median in medians) + " |")
    return medians[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=20_000)
    parser.add_argument("--waiting", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    ours, theirs = [sys.executable, ROOT / "worker.py"], [sys.executable, TUTORIAL / "worker.py"]
    stream = [sys.executable, ROOT / "new_task.py", "-"]

    with tempfile.TemporaryDirectory() as folder:
        broker = Broker(Path(folder), port_for.select_random())
        broker.start()
        try:
            url = broker.url

            def purge():
                with broker.channel() as channel:
                    channel.queue_delete(QUEUE)

            def consumer(command, tasks):
                timed(url, stream, lines(2 * tasks))
                result = consumed(broker, command, tasks)
                purge()
                return result

            def producer(command, tasks):
                rate = tasks / timed(url, command, lines(tasks))
                purge()
                return (rate,)

            print("| consumer | tasks/s | MiB |\n|---|---|---|")
            commands = {"worker.py": ours, "the tutorial's": theirs}
            results = {name: [] for name in commands}
            for _ in range(options.runs):
                for name, command in commands.items():
                    results[name].append(consumer(command, options.tasks))
            rates = [row(name, result, 1) for name, result in results.items()]
            print(f"| ratio | {rates[0] / rates[1]:.2f} | |")

            print("\n| producer | tasks/s |\n|---|---|")
            loop = [sys.executable, "-c", CONFIRM_LOOP]
            amqp_publish = ["amqp-publish", "--url", url.removesuffix("/%2F")]
            amqp_publish += ["-l", "-p", "-r", QUEUE]
            producers = {
                "new_task.py -": (stream, 5 * options.tasks),
                "a confirm for each task": (loop, options.tasks // 4),
                "amqp-publish, unconfirmed": (amqp_publish, 5 * options.tasks),
            }
            results = {name: [] for name in producers}
            for _ in range(options.runs):
                for name, arguments in producers.items():
                    results[name].append(producer(*arguments))
            for name, result in results.items():
                row(name, result)

            print("\n| one task | ms |\n|---|---|")
            scripts = {"new_task.py Hello": ROOT, "the tutorial's": TUTORIAL}
            results = {name: [] for name in scripts}
            for _ in range(10 * options.runs):
                for name, where in scripts.items():
                    command = [sys.executable, where / "new_task.py", "Hello"]
                    results[name].append((1000 * timed(url, command),))
            times = [row(name, result, 1) for name, result in results.items()]
            print(f"| ratio | {times[0] / times[1]:.2f} |")
            purge()

            print(
                "\n| waiting tasks | producer's MiB | worker's tasks/s | MiB |\n|---|---|---|---|"
            )
            for waiting in (2 * options.tasks, options.waiting):
                memory = streamed(url, waiting)
                row(waiting, [(memory, *consumed(broker, ours, options.tasks))], 1)
                purge()
        finally:
            broker.kill()
            epmd = ["epmd", "-kill"]
            subprocess.run(epmd, env=broker.envvars, check=False, capture_output=True)


if __name__ == "__main__":
    main()
