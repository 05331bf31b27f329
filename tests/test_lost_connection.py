"""A worker outlives its broker, and its tasks outlive both."""

import re
import signal

import port_for
import psutil
import pytest
from conftest import ROOT, Script

WAITING = " [*] Waiting for messages. To exit press CTRL+C"
PAUSES = [1, 2, 4, 8, 16, 30]  # seconds between attempts to connect, as CONTRACT.md has them


@pytest.fixture(scope="module", autouse=True)
def lonely():
    """A worker whose broker never comes; the other tests run while it goes on trying."""
    script = Script([ROOT / "worker.py"], f"amqp://127.0.0.1:{port_for.select_random()}")
    yield script
    script.process.kill()
    script.wait()


@pytest.fixture
def worker(run, fragile_broker):
    """A worker of the broker that is about to go away."""

    def start(queue, *arguments):
        return run(fragile_broker, "worker.py", "-q", queue, *arguments)

    return start


def stop(broker):
    broker.stop()
    assert not servers(broker)


def kill(broker):
    broker.kill()
    assert not servers(broker)


def servers(broker):
    """The Erlang processes of a broker: rabbitmq-server itself is only a shell script."""
    return [
        process
        for process in psutil.process_iter(["name", "environ"])
        if process.info["name"] == "beam.smp"
        and (process.info["environ"] or {}).get("RABBITMQ_NODE_PORT") == str(broker.port)
    ]


def pauses(script):
    return [int(found[1]) for line in script.err if (found := re.search(r"in (\d+) s$", line))]


@pytest.mark.parametrize(("end", "clean"), [(stop, True), (kill, False)])
def test_tasks_and_workers_outlive_the_end_of_their_broker(
    fragile_broker, worker, send, queue, end, clean
):
    idle, busy, hoarding, early = (f"{queue}-{name}" for name in ("idle", "busy", "0", "early"))
    idler, worker_in_mid_task, hoarder = worker(idle), worker(busy), worker(hoarding, "-p", "0")
    idler.wait_for("Waiting")
    for at_work, its_queue in ((worker_in_mid_task, busy), (hoarder, hoarding)):
        at_work.wait_for("Waiting")
        send(fragile_broker, its_queue, "long...", "next")
        at_work.wait_for("Received 'long...'")
    send(fragile_broker, early, "sent before")
    assert len(servers(fragile_broker)) == 1

    end(fragile_broker)
    waits = worker(early)
    waits.wait_for("Connection refused")
    fragile_broker.start()

    for carries_on in (idler, worker_in_mid_task, hoarder):
        carries_on.wait_for("Waiting", times=2)
        assert ("CONNECTION_FORCED" in carries_on.err[0]) == clean, carries_on.err
        assert pauses(carries_on)[:2] == [1, 2]
    send(fragile_broker, idle, "sent after")
    idler.wait_for("Done")
    assert idler.out == [WAITING, WAITING, " [x] Received 'sent after'", " [x] Done"]
    waits.wait_for("Done")
    assert waits.tasks("Received") == ["sent before"]
    assert len(pauses(waits)) == len(waits.err) >= 1
    for at_work in (worker_in_mid_task, hoarder):
        at_work.wait_for("Done", times=2)
        assert at_work.tasks("Received") == ["long...", "long...", "next"]
        assert at_work.out.count(" [x] Done") == 2
    for script in (idler, worker_in_mid_task, hoarder, waits):
        script.signal(signal.SIGTERM)  # to the process that it was before
        assert script.wait() == 0
    for its_queue in (idle, busy, hoarding, early):
        assert fragile_broker.bodies(its_queue) == []


def test_a_connection_lost_in_mid_task_ends_the_work_and_the_task_is_done_again(
    fragile_broker, worker, send, queue
):
    script = worker(queue)
    send(fragile_broker, queue, "long...")
    script.wait_for("Received")
    fragile_broker.rabbitctl_output("close_all_connections", "maintenance")
    lost = script.wait_for("maintenance; trying again in 1 s")
    assert script.wait_for("Received", times=2) - lost < 2
    script.wait_for("Done")
    assert script.out == [
        WAITING,
        " [x] Received 'long...'",
        WAITING,
        " [x] Received 'long...' (redelivered)",
        " [x] Done",
    ]
    assert len(script.err) == 1


def test_the_pauses_between_attempts_to_connect_grow_from_1_to_30_seconds(lonely):
    lonely.wait_for("in 30 s")
    assert pauses(lonely) == PAUSES
    moments = [lonely.wait_for("trying again", times=number + 1) for number in range(len(PAUSES))]
    for pause, earlier, later in zip(PAUSES, moments, moments[1:]):
        assert pause <= later - earlier < pause + 1
    assert lonely.out == []
