"""`AMQP_URL` with the nodes of a cluster: both scripts outlive the node they are connected to."""

import contextlib
import signal
import subprocess
import threading
import time

import pytest
from conftest import longest_pause, refused
from servers import start_cluster, wait_until

STOOD_STILL = 5  # seconds that are allowed, from the death of a node to the next task
TASKS = 300


def feed(producer):
    with contextlib.suppress(OSError):  # when CTRL+C ends the tests
        for number in range(TASKS):
            producer.process.stdin.write(b"task %d\n" % number)
            producer.process.stdin.flush()
            time.sleep(0.1)
        producer.process.stdin.close()


def stood_still(scripts, killed_at):
    """Wait until tasks are sent and done again; return the longest pause that began then."""
    pauses = []
    for script, word in scripts.items():
        since = len([moment for moment in script.moments(word) if moment < killed_at])
        script.wait_for(word, times=since + 20)
        pauses.append(longest_pause([killed_at, *script.moments(word)[since:]]))
    print(f"a node was killed: no task was sent, or none done, for {max(pauses):.1f} s")
    return max(pauses)


def leader(nodes, queue):
    """Return the node that leads a queue; None while there is an election."""
    listed = nodes[-1].rabbitctl_output("-q", "list_queues", "-p", "q", "name", "leader")
    leaders = dict(line.split("\t") for line in listed.splitlines())
    return next((node for node in nodes if node.node == leaders[queue]), None)


@pytest.fixture(scope="module")
def nodes(new_broker):
    return start_cluster(new_broker)


def test_scripts_go_on_when_their_node_and_the_queues_leader_die(run, nodes, queue):
    first, connected, other = nodes
    # A quorum queue that the first node leads, and a classic one that only another node holds.
    with first.channel(first.url_of(vhost="q")) as channel:
        channel.queue_declare(queue, durable=True)
    with connected.channel() as channel:
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "classic"})
    connected.settle()
    urls = ",".join(node.url_of(vhost="q") for node in (connected, first, other))
    worker = run(urls, "worker.py", "-q", queue)
    worker.wait_for("Waiting")
    producer = run(urls, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
    threading.Thread(target=feed, args=[producer], daemon=True).start()
    urls = f"{connected.url},{other.url}"
    homeless = run(urls, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
    homeless.process.stdin.write(b"one\n")
    homeless.process.stdin.flush()
    homeless.wait_for("Sent 'one'")
    worker.wait_for("Done", times=10)

    scripts = {producer: "Sent", worker: "Done"}
    killed_at = time.monotonic()
    connected.kill()
    homeless.process.stdin.write(b"two\n")
    homeless.process.stdin.close()
    assert stood_still(scripts, killed_at) < STOOD_STILL
    assert homeless.process.poll() is None  # for the other node knows of its queue
    assert homeless.tasks("Sent") == ["one"]
    connected.start()
    assert homeless.wait() == 0, homeless.err
    assert homeless.tasks("Sent") == ["one", "two"]
    assert connected.ready(queue) == 2

    dying = wait_until(lambda: leader(nodes, queue))
    killed_at = time.monotonic()
    dying.kill()
    assert stood_still(scripts, killed_at) < STOOD_STILL

    assert producer.wait() == 0, producer.err
    sent = [f"task {number}" for number in range(TASKS)]
    assert sorted(producer.tasks("Sent")) == sorted(sent)
    wait_until(lambda: set(sent) <= set(worker.tasks("Received")))
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    survivor = next(node for node in nodes if node is not dying)
    assert survivor.ready(queue, survivor.url_of(vhost="q")) == 0


def test_a_queue_that_has_lost_its_majority_is_given_up_with_the_reason(run, nodes, queue):
    survivor, *others = (node for node in nodes if node.running())
    url = survivor.url_of(vhost="q")
    producer = run(url, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
    producer.process.stdin.write(b"one\n")
    producer.process.stdin.flush()
    producer.wait_for("Sent 'one'")
    for node in others:
        node.kill()
    producer.process.stdin.write(b"two\n")
    producer.process.stdin.close()
    producer.wait_for("Connection lost", timeout=40)
    producer.wait_for("confirmed", timeout=80)
    refused(producer, "no answer", "majority", "1 task confirmed; resume from line 2")
    assert producer.tasks("Sent") == ["one"]
