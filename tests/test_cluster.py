"""`AMQP_URL` with the nodes of a cluster: both scripts outlive the node they are connected to."""

import signal
import subprocess
import threading
import time

import pytest
from conftest import longest_pause
from servers import start_cluster, wait_until

STOOD_STILL = 10  # seconds that are allowed, from the death of a node to the next task
TASKS = 300


@pytest.fixture
def cluster(new_broker):
    """Three nodes, with quorum queues in the virtual host "q"."""
    return start_cluster(new_broker)


def leader(nodes, queue):
    """Return the node that leads a queue."""
    name = nodes[-1].rabbitctl_output("-q", "list_queues", "-p", "q", "name", "leader")
    (line,) = (line for line in name.splitlines() if line.startswith(f"{queue}\t"))
    (node,) = (node for node in nodes if node.envvars["RABBITMQ_NODENAME"] == line.split("\t")[1])
    return node


class Stream:
    """A producer that is fed slowly, and a worker, on the same queue."""

    def __init__(self, run, nodes, queue):
        urls = ",".join(node.url_of(vhost="q") for node in nodes)
        self.worker = run(urls, "worker.py", "-q", queue)
        self.worker.wait_for("Waiting")
        options = ["-q", queue, "-"]
        pipe = subprocess.PIPE
        self.producer = run(urls, "new_task.py", *options, stdin=pipe)
        threading.Thread(target=self.feed, daemon=True).start()

    def feed(self):
        for number in range(TASKS):
            self.producer.process.stdin.write(b"task %d\n" % number)
            self.producer.process.stdin.flush()
            time.sleep(0.1)
        self.producer.process.stdin.close()

    def stood_still(self, killed_at):
        """Wait until tasks are sent and done again; return the longest pause that began then."""
        pauses = []
        for script, word in ((self.producer, "Sent"), (self.worker, "Done")):

            def later(script=script, word=word):
                return [moment for moment in script.moments(word) if moment > killed_at]

            wait_until(lambda later=later: len(later()) > 20)
            pauses.append(longest_pause([killed_at, *later()]))
        return max(pauses)


def test_both_scripts_go_on_when_their_node_and_the_queues_leader_die(run, cluster, queue):
    first, connected, _ = cluster
    with first.channel(first.url_of(vhost="q")) as channel:  # which makes this one lead it
        channel.queue_declare(queue, durable=True)
    stream = Stream(run, [connected, *cluster], queue)
    for victim in ("node of both scripts", "queue's leader"):
        stream.worker.wait_for("Done", times=10)
        dying = connected if victim == "node of both scripts" else leader(cluster, queue)
        killed_at = time.monotonic()
        dying.kill()
        pause = stream.stood_still(killed_at)
        print(f"the {victim} was killed: {pause:.1f} s without a task")
        assert pause < STOOD_STILL
        dying.start()

    assert stream.producer.wait() == 0
    sent = stream.producer.tasks("Sent")
    assert sent == [f"task {number}" for number in range(TASKS)]
    wait_until(lambda: set(sent) <= set(stream.worker.tasks("Received")))
    stream.worker.signal(signal.SIGTERM)
    assert stream.worker.wait() == 0
    with first.channel(first.url_of(vhost="q")) as channel:
        assert channel.queue_declare(queue, passive=True).method.message_count == 0


def test_a_stream_goes_on_when_the_only_node_of_its_queue_is_back(run, cluster, queue):
    home, other, _ = cluster
    with home.channel() as channel:  # which makes this one, and none else, hold it
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "classic"})
    home.settle()
    urls = f"{home.url},{other.url}"
    producer = run(urls, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
    producer.process.stdin.write(b"one\n")
    producer.process.stdin.flush()
    producer.wait_for("Sent 'one'")
    home.kill()
    producer.wait_for("Connection lost")
    producer.process.stdin.write(b"two\n")
    producer.process.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):  # for the other node knows of that queue
        producer.process.wait(5)
    home.start()
    assert producer.wait() == 0, producer.err
    assert producer.tasks("Sent") == ["one", "two"]
    with home.channel() as channel:
        assert channel.queue_declare(queue, passive=True).method.message_count == 2
