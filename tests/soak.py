#!/usr/bin/env python3
"""Kill workers, brokers and connections at random while tasks stream; print what came of it.

    tests/soak.py                    1,000 tasks, four workers: about two minutes
    tests/soak.py --seed 7           the same faults at the same moments once more

Every task is a command that writes its name into a file after its work: that, not what a worker
says, tells what was done. To be run by hand; test_soak.py has a short form.
"""

import argparse
import collections
import contextlib
import random
import signal
import subprocess
import sys
import threading
import time

import port_for
from conftest import ROOT, Script
from servers import PATIENCE, free_port, servers, wait_until

HEARTBEAT = 2  # seconds
STALL = 3 * HEARTBEAT  # seconds, longer than the two after which a connection counts as lost
WORK = "read task; sleep 0.3; echo $task >> {}"


class Soak:
    """A broker behind a proxy, a producer, and workers that are started again when killed."""

    def __init__(self, broker, folder, workers):
        self.broker = broker
        self.done_file = folder / "done"
        self.done_file.touch()
        self.proxy_port = free_port()
        target = [str(self.proxy_port), str(broker.port)]
        self.proxy = subprocess.Popen([sys.executable, ROOT / "tests" / "proxy.py", *target])
        wait_until(lambda: port_for.port_is_used(self.proxy_port))
        query = f"?heartbeat={HEARTBEAT}"
        self.url = f"amqp://guest:guest@127.0.0.1:{self.proxy_port}/%2F{query}"
        self.ended = []  # workers that were killed
        self.workers = [self.worker() for _ in range(workers)]
        for worker in self.workers:
            worker.wait_for("Waiting")
        broker.settle()
        self.producer = self.script("new_task.py", "-", stdin=subprocess.PIPE)
        self.written = 0
        self.peak = 0  # of the tasks that are not confirmed
        self.in_hand = 0  # tasks, whenever something was killed

    def script(self, name, *arguments, **options):
        return Script([ROOT / name, *arguments], self.url, **options)

    def worker(self):
        return self.script("worker.py", "sh", "-c", WORK.format(self.done_file))

    def write(self, tasks, seconds):
        """Stream tasks to the producer, spread over a time."""
        for number in range(tasks):
            self.producer.process.stdin.write(b"task-%d\n" % number)
            self.producer.process.stdin.flush()
            self.written += 1
            self.peak = max(self.peak, self.unconfirmed())
            time.sleep(seconds / tasks)
        self.producer.process.stdin.close()

    def unconfirmed(self):
        return self.written - len(self.producer.out)

    def kill_worker(self, moments):
        number = moments.randrange(len(self.workers))
        self.in_hand += 1
        self.workers[number].signal(signal.SIGKILL)
        self.ended.append(self.workers[number])
        self.workers[number] = self.worker()

    def kill_broker(self, moments):
        self.in_hand += len(self.workers) + self.unconfirmed()
        self.broker.kill()
        time.sleep(moments.uniform(0, 2))
        self.broker.start()

    def cut_connections(self, _):
        # rabbitmqctl takes a second or more until it cuts: what is in hand then, counts.
        self.peak = self.unconfirmed()
        self.broker.rabbitctl_output("close_all_connections", "soak")
        self.in_hand += len(self.workers) + self.peak

    def stall_network(self, _):
        before = self.unconfirmed()
        self.proxy.send_signal(signal.SIGSTOP)
        time.sleep(STALL)
        self.in_hand += len(self.workers) + max(before, self.unconfirmed())
        self.proxy.send_signal(signal.SIGCONT)

    def done(self):
        return collections.Counter(self.done_file.read_text().split())

    def end(self):
        """End all; return the exit statuses of the workers that were not killed."""
        with contextlib.suppress(ProcessLookupError):
            self.proxy.send_signal(signal.SIGCONT)
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        statuses = [worker.wait() for worker in self.workers]
        self.producer.process.kill()
        self.proxy.kill()
        self.proxy.wait()
        return statuses


def soak(broker, folder, *, seed, tasks, workers, kills, outages, cuts, stalls):
    """Return figures, by name; those that have to be zero begin with "lost" or "wrong"."""
    moments = random.Random(seed)
    run = Soak(broker, folder, workers)
    faults = [run.kill_worker] * kills + [run.kill_broker] * outages
    faults += [run.cut_connections] * cuts + [run.stall_network] * stalls
    moments.shuffle(faults)
    begin = time.monotonic()
    writer = threading.Thread(target=run.write, args=(tasks, tasks * 0.3 / workers), daemon=True)
    writer.start()
    by_themselves = 0
    try:
        for fault in faults:
            time.sleep(moments.uniform(0, 2 * tasks * 0.3 / workers / len(faults)))
            by_themselves += sum(worker.process.poll() is not None for worker in run.workers)
            fault(moments)
        sent_status = run.producer.wait(PATIENCE + tasks)
        confirmed = {line.split("'")[1] for line in run.producer.out}
        with contextlib.suppress(AssertionError):
            wait_until(lambda: confirmed <= set(run.done()), PATIENCE + tasks)
        seconds = time.monotonic() - begin
        for worker in run.workers:
            worker.wait_for("Waiting")  # the last one may not listen to signals yet
        by_themselves += sum(worker.process.poll() is not None for worker in run.workers)
    finally:
        statuses = run.end()
    done = run.done()
    errors = [line for script in (*run.ended, *run.workers, run.producer) for line in script.err]
    queue_left = broker.ready("task_queue")
    return {
        "seed": seed,
        "seconds": round(seconds),
        "tasks": tasks,
        "confirmed": len(confirmed),
        "workers killed": kills,
        "broker killed": outages,
        "connections cut": cuts,
        "network stalled": stalls,
        "lost: confirmed and not done": len(confirmed - set(done)),
        "lost: left in the queue": queue_left,
        "repeated": sum(done.values()) - len(done),
        "in hand at a fault, at most": run.in_hand,
        "wrong: repeated more": max(0, sum(done.values()) - len(done) - run.in_hand),
        "wrong: workers that ended by themselves": by_themselves + sum(map(bool, statuses)),
        "wrong: exit status of the producer": sent_status,
        "wrong: tracebacks": sum("Traceback" in line for line in errors),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20, help="of workers, by SIGKILL")
    parser.add_argument("--outages", type=int, default=3, help="of the broker, by SIGKILL")
    parser.add_argument("--cuts", type=int, default=4, help="of all connections")
    parser.add_argument("--stalls", type=int, default=2, help="of the network")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with servers() as start:
        broker = start()
        figures = soak(broker, broker.folder, **vars(options))
    print("| | |\n| --- | --- |")
    for name, value in figures.items():
        print(f"| {name} | {value} |")
    return any(value for name, value in figures.items() if name.startswith(("lost", "wrong")))


if __name__ == "__main__":
    sys.exit(main())
