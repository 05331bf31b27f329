#!/usr/bin/env python3
"""Kill workers, brokers and connections at random while tasks stream; print what came of it.

    tests/soak.py                        1,000 tasks, four workers, classic queues: three minutes
    tests/soak.py --quorum               quorum queues
    tests/soak.py --cluster              three nodes; one after the other is killed and comes back
    tests/soak.py --seed 7               the same faults at the same tasks once more

Some tasks fail once or twice, some always. Half of the workers run a command, half call a
function, and both write down what became of a task: that, not what a worker says, tells what was
done. To be run by hand; test_soak.py has a short form.
"""

import argparse
import collections
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from conftest import ROOT, Script, longest_pause
from servers import (
    PATIENCE,
    accepts_connections,
    free_port,
    servers,
    start_cluster,
    wait_until,
)

HEARTBEAT = 2  # seconds
STALL = 3 * HEARTBEAT  # seconds, longer than the two after which a connection counts as lost
STOOD_STILL = 5  # seconds without a task, that a cluster is allowed
RETRIES = 2
RETRY_DELAY = 2  # seconds
QUIET = 2 * RETRY_DELAY + 1  # seconds after which nothing more comes from QUEUE.retry, ...
STUCK = 200  # ... but when a node was lost: RabbitMQ moves a task once more after three minutes
ALWAYS = 99  # times that a task fails
FAILURES = {0: 85, 1: 6, 2: 5, ALWAYS: 4}  # times that a task fails: how many percent do

# A task's text is its name, and how often it is to fail. Both do the same with it, in the same
# folder; but a function also takes its process with it when it fails for the first time.
COMMAND = """
read name fails times
sleep 0.3
[ "$(grep -cx "$name" failed)" -ge "$times" ] || { echo "$name" >> failed; exit 3; }
echo "$name" >> done
"""
FUNCTION = """
import os, sys, time

def note(name, file):
    with open(file, "a") as lines:
        print(name, file=lines)

def work(body):
    name, _, times = body.decode().split()
    time.sleep(0.3)
    with open("failed") as lines:
        failures = lines.read().split().count(name)
    if failures < int(times):
        note(name, "failed")
        sys.exit(3) if failures else os._exit(3)
    note(name, "done")
"""
WORKS = (["sh", "-c", COMMAND], ["--function", "job:work"])  # of one worker, of the next, ...
REASONS = ("exit status 3", "SystemExit(3)")


class Soak:
    """A broker behind a proxy, or a cluster; a producer; workers, started again when killed."""

    def __init__(self, nodes, vhost, folder, workers, moments):
        self.nodes = nodes
        self.vhost = vhost
        self.folder = folder
        for name in ("done", "failed"):
            (folder / name).touch()
        (folder / "job.py").write_text(FUNCTION)
        self.moments = moments
        self.url = nodes[0].url_of(vhost=vhost)  # for what is done beside the scripts
        self.proxy = None
        self.urls = [node.url_of(vhost=vhost) for node in nodes]
        if len(nodes) == 1:
            port, target = free_port(), nodes[0].port
            command = [sys.executable, ROOT / "tests" / "proxy.py", str(port), str(target)]
            self.proxy = subprocess.Popen(command)
            wait_until(lambda: accepts_connections(port))
            url = nodes[0].url_of(vhost=vhost, query=f"?heartbeat={HEARTBEAT}")
            self.urls = [url.replace(f":{target}/", f":{port}/")]
        self.scripts = []  # all, those that were killed, too
        self.events = []  # (time.monotonic(), what was done to them)
        self.unsure = 0  # tasks that may be in a queue twice, by whatever was killed
        self.workers = [self.worker(number) for number in range(workers)]
        self.producer = self.script("new_task.py", "-", stdin=subprocess.PIPE)
        self.tasks = {}  # those written: how often each is to fail
        self.peak = 0  # of the tasks that are not confirmed

        self.write("first", ALWAYS)  # its queues are to be there, and safe, before the first fault
        wait_until(lambda: nodes[0].ready("task_queue.dlq", self.url))
        nodes[0].settle()
        self.begin = time.monotonic()

    # ---- The scripts ----

    def script(self, name, *arguments, **options):
        self.moments.shuffle(self.urls)
        self.scripts.append(Script([ROOT / name, *arguments], ",".join(self.urls), **options))
        return self.scripts[-1]

    def worker(self, number):
        options = ["--retries", str(RETRIES), "--retry-delay", str(RETRY_DELAY)]
        return self.script("worker.py", *options, *WORKS[number % 2], cwd=self.folder)

    def write(self, name, times):
        self.producer.process.stdin.write(f"{name} fails {times}\n".encode())
        self.producer.process.stdin.flush()
        self.tasks[name] = times
        self.peak = max(self.peak, self.unconfirmed())

    def stream(self, failures, rate):
        for number, times in enumerate(failures):
            self.write(f"task-{number}", times)
            time.sleep(1 / rate)
        self.producer.process.stdin.close()

    def unconfirmed(self):
        return len(self.tasks) - len(self.producer.out)

    def died(self):
        """The workers that ended by themselves."""
        return [worker for worker in self.workers if worker.process.poll() is not None]

    # ---- Faults ----

    def kill_worker(self):
        number = self.moments.randrange(len(self.workers))
        self.note(f"killing worker {self.workers[number].process.pid}")
        self.workers[number].signal(signal.SIGKILL)
        self.workers[number] = self.worker(number)

    def kill_broker(self):
        node = self.moments.choice(self.nodes)
        self.note(f"killing {node.url}")
        self.unsure += self.unconfirmed() + self.forgotten()
        node.kill()
        time.sleep(self.moments.uniform(0, 2))
        node.start()
        started = time.monotonic()
        self.note(f"started {node.url}")
        wait_until(self.is_whole, 3 * PATIENCE)
        # The producer tries for no more than 30 s: one outage at a time.
        wait_until(lambda: not self.unconfirmed() or self.moments_of("Sent")[-1] > started)

    def cut_connections(self):
        # rabbitmqctl takes a second or more until it cuts: what is in hand then, counts.
        self.note("cutting connections")
        self.peak = self.unconfirmed()
        self.nodes[0].rabbitctl_output("close_all_connections", "--global", "soak")
        self.unsure += self.peak

    def stall_network(self):
        self.note("stalling the network")
        before = self.unconfirmed()
        self.proxy.send_signal(signal.SIGSTOP)
        time.sleep(STALL)
        self.unsure += max(before, self.unconfirmed())
        self.proxy.send_signal(signal.SIGCONT)

    def note(self, text):
        self.events.append((time.monotonic(), text))

    def is_whole(self):
        """Whether each quorum queue has a member on every node: else the next kill is one too many.

        It is enough that they are there: one that lags behind can vote for one that doesn't.
        """
        if len(self.nodes) == 1:
            return True
        online = self.nodes[0].rabbitctl_output("-q", "list_queues", "-p", self.vhost, "online")
        return all(line.count("@") == len(self.nodes) for line in online.splitlines()[1:])

    def forgotten(self):
        """How many tasks a classic queue has forgotten, when killed, that it was rid of.

        It writes that to the disk no sooner than a task that is sent there: if none is, it
        forgets the acknowledgements of minutes.
        """
        if self.vhost == "q":
            return 0
        sent = max(self.moments_of("Sent"))
        rid_of = [*self.moments_of("Failed"), *self.moments_of("Done")]
        return sum(moment > sent - 0.5 for moment in rid_of)

    # ---- What came of it ----

    def moments_of(self, word):
        return [moment for script in self.scripts for moment in script.moments(word)]

    def lines(self, name):
        """How often each task is in a file."""
        return collections.Counter((self.folder / name).read_text().split())

    def ready(self, suffix):
        return self.nodes[0].ready(f"task_queue{suffix}", self.url)

    def wait_for_the_end(self):
        """Wait until every task has come to its end, or nothing happens any more."""
        since, before, complete = time.monotonic(), None, False
        while time.monotonic() < since + (QUIET if complete else STUCK):
            done, failed = self.lines("done"), self.lines("failed")
            waiting = self.ready(""), self.ready(".retry")
            if before != (done, failed, waiting):
                since, before = time.monotonic(), (done, failed, waiting)
            complete = not any(waiting) and all(
                failed[name] > RETRIES if times == ALWAYS else name in done
                for name, times in self.tasks.items()
            )
            time.sleep(0.2)

    def dead_letters(self):
        """Take out all dead letters: (task, why)."""
        with self.nodes[0].channel(self.url) as channel:
            got = iter(lambda: channel.basic_get("task_queue.dlq", auto_ack=True), (None,) * 3)
            return [
                (body.decode().split()[0], properties.headers["x-last-error"])
                for _, properties, body in got
            ]

    def acknowledged(self):
        """How often workers called each task done."""
        found = collections.Counter()
        for script in self.scripts:
            name = None
            for line in script.out:
                name = line.split("'")[1].split()[0] if "Received" in line else name
                found[name] += "Done" in line
        return found

    def history(self):
        """All that was done and said, by the second: for who has to find out why."""
        said = [
            (
                script.seen[id(lines), number],
                f"{script.process.args[1].name} {script.process.pid} {line}",
            )
            for script in self.scripts
            for lines in (script.out, script.err)
            for number, line in enumerate(lines)
        ]
        return "".join(
            f"{moment - self.begin:9.3f} {text}\n" for moment, text in sorted(said + self.events)
        )

    def end(self):
        """End all; return the exit statuses of the workers that were not killed."""
        if self.proxy:
            self.proxy.send_signal(signal.SIGCONT)
        for worker in self.workers:
            worker.signal(signal.SIGTERM)
        statuses = [worker.wait() for worker in self.workers]
        self.producer.process.kill()
        self.producer.wait()
        if self.proxy:
            self.proxy.kill()
            self.proxy.wait()
        return statuses


def soak(nodes, folder, *, vhost, seed, tasks, rate, workers, kills, outages, cuts, stalls):
    """Return figures, by name; those that have to be zero begin with "lost" or "wrong"."""
    moments = random.Random(seed)
    run = Soak(nodes, vhost, folder, workers, moments)
    failures = moments.choices([*FAILURES], [*FAILURES.values()], k=tasks)
    faults = [run.kill_worker] * kills + [run.kill_broker] * outages
    faults += [run.cut_connections] * cuts + [run.stall_network] * stalls
    moments.shuffle(faults)
    writer = threading.Thread(target=run.stream, args=(failures, rate), daemon=True)
    writer.start()
    died = set()
    try:
        for number, fault in zip(sorted(moments.sample(range(tasks), len(faults))), faults):
            wait_until(lambda n=number: len(run.tasks) > n or not writer.is_alive(), tasks)
            died.update(run.died())
            fault()
        sent_status = run.producer.wait(PATIENCE + tasks / rate)
        run.wait_for_the_end()
        seconds = time.monotonic() - run.begin
        for worker in run.workers:
            worker.wait_for("Waiting")  # the last one may not listen to signals yet
        died.update(run.died())
    finally:
        statuses = run.end()
        (folder / "history").write_text(run.history())

    names = {line.split("'")[1].split()[0] for line in run.producer.out}
    done, letters = run.lines("done"), run.dead_letters()
    ends = done + collections.Counter(name for name, _ in letters)
    right = [run.tasks[name] == ALWAYS and why in REASONS for name, why in letters]
    repeated = sum(ends.values()) - len(ends)
    unacknowledged = sum((done - run.acknowledged()).values())
    in_hand = len(run.moments_of("Waiting"))  # for no connection ends with more than one task
    sent = [moment for moment in run.producer.moments("Sent") if moment > run.begin]
    worked = [*run.moments_of("Done"), *run.moments_of("Failed")]
    worked = sorted(moment for moment in worked if moment > run.begin)
    still = max(longest_pause([run.begin, *sent]), longest_pause([run.begin, *worked]))
    called = [script for script in run.scripts if "--function" in script.process.args]
    return {
        "seed": seed,
        "seconds": round(seconds),
        "tasks": len(run.tasks),
        "confirmed": len(names),
        "failed once or twice, and then done": sum(
            0 < times < ALWAYS for times in run.tasks.values()
        ),
        "done by a function": sum(len(script.moments("Done")) for script in called),
        "failed always: dead letters": len({name for name, _ in letters}),
        "workers killed": kills,
        "broker killed": outages,
        "connections cut": cuts,
        "network stalled": stalls,
        "lost: confirmed, neither done nor a dead letter": len(names - set(ends)),
        "lost: left in task_queue": run.ready(""),
        "lost: left in task_queue.retry": run.ready(".retry"),
        "wrong: dead letters that should not be": right.count(False),
        "repeated": repeated,
        "of these, dead letters": len(letters) - len({name for name, _ in letters}),
        "of these, done before, but not acknowledged": unacknowledged,
        "in hand when a worker was killed or cut off, at most": in_hand,
        "sent and not yet confirmed, or forgotten, at a fault, at most": run.unsure,
        "wrong: repeated more": max(0, repeated - in_hand - run.unsure, unacknowledged - in_hand),
        "longest time without a task, s": round(still, 1),
        "wrong: a cluster stood still": int(len(nodes) > 1 and still > STOOD_STILL),
        "wrong: workers that ended by themselves": len(died) + sum(map(bool, statuses)),
        "wrong: exit status of the producer": sent_status,
        "wrong: tracebacks": sum(len(script.tracebacks()) for script in run.scripts),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quorum", action="store_true", help="queues, in place of classic ones")
    parser.add_argument("--cluster", action="store_true", help="of three, with quorum queues")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=8, help="tasks a second")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20, help="of workers, by SIGKILL")
    parser.add_argument("--outages", type=int, default=3, help="of a broker, by SIGKILL")
    parser.add_argument("--cuts", type=int, default=4, help="of all connections")
    parser.add_argument("--stalls", type=int, default=2, help="of the network; none in a cluster")
    parser.add_argument("--keep", type=Path, help="a new folder, for what was said, and logs")
    options = vars(parser.parse_args())
    quorum, cluster, keep = (options.pop(name) for name in ("quorum", "cluster", "keep"))
    print(f"seed {options['seed']}", flush=True)
    if cluster:
        options["stalls"] = 0  # there is no proxy
    with servers() as start:
        nodes = start_cluster(start) if cluster else [start()]
        if quorum and not cluster:
            nodes[0].add_quorum_vhost()
        vhost = "q" if quorum or cluster else "%2F"
        figures = soak(nodes, nodes[0].folder, vhost=vhost, **options)
        print("| | |\n| --- | --- |")
        for name, value in figures.items():
            print(f"| {name} | {value} |")
        if keep:
            shutil.copytree(nodes[0].folder, keep, ignore=shutil.ignore_patterns("mnesia"))
            for number, node in enumerate(nodes[1:], 2):
                shutil.copytree(node.folder / "log", keep / f"log-{number}")
    return any(value for name, value in figures.items() if name.startswith(("lost", "wrong")))


if __name__ == "__main__":
    sys.exit(main())
