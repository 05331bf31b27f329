"""`worker.py`: no broker yet, or the connection lost: it says so, tries again, and carries on."""

import pytest
from servers import free_port

WAITING = " [*] Waiting for messages. To exit press CTRL+C"
LONG = "long.........."


@pytest.fixture(params=["stop", "kill"])
def outage(request, fragile_broker):
    """Take the broker away, cleanly or by SIGKILL."""
    yield getattr(fragile_broker, request.param)
    if not fragile_broker.running():
        fragile_broker.start()


def test_workers_and_tasks_outlive_their_broker(fragile_broker, run, send, queue, outage):
    in_mid_task = run(fragile_broker, "worker.py", "-q", f"{queue}-busy")
    idle = run(fragile_broker, "worker.py", "-q", f"{queue}-idle")
    idle.wait_for("Waiting")
    in_mid_task.wait_for("Waiting")
    send(fragile_broker, f"{queue}-later", "nobody is here")
    fragile_broker.settle()
    send(fragile_broker, f"{queue}-busy", LONG, "after")
    in_mid_task.wait_for("Received")

    outage()
    for worker in (in_mid_task, idle):
        worker.wait_for("trying again")
    early = run(fragile_broker, "worker.py", "-q", f"{queue}-later")
    early.wait_for("trying again in 4 s")
    assert all(line.endswith(f"in {pause} s") for line, pause in zip(early.err, (1, 2, 4)))

    fragile_broker.start()
    early.wait_for("Done")
    assert early.tasks("Received") == ["nobody is here"]
    in_mid_task.wait_for("Done", times=2)
    assert in_mid_task.tasks("Received") == [LONG, LONG, "after"]
    assert in_mid_task.out[2:4] == [WAITING, f" [x] Received '{LONG}' (redelivered)"]
    send(fragile_broker, f"{queue}-idle", "back")
    idle.wait_for("Done")
    assert idle.out == [WAITING, WAITING, " [x] Received 'back'", " [x] Done"]


def test_a_connection_closed_in_mid_task_ends_the_work_and_it_is_begun_again(
    fragile_broker, run, send, queue
):
    task = "as long as rabbitmqctl may take" + 60 * "."
    worker = run(fragile_broker, "worker.py", "-q", queue)
    send(fragile_broker, queue, task)
    worker.wait_for("Received")
    fragile_broker.rabbitctl_output("close_all_connections", "maintenance")
    worker.wait_for("redelivered")
    received = f" [x] Received '{task}'"
    assert worker.out == [WAITING, received, WAITING, f"{received} (redelivered)"]
    assert len(worker.err) == 1
    assert "maintenance" in worker.err[0]


def test_the_pause_between_two_attempts_to_connect_grows_to_30_seconds_and_no_more(run):
    worker = run(f"amqp://127.0.0.1:{free_port()}", "worker.py")
    begun = worker.wait_for("trying again in 1 s")
    worker.wait_for("trying again in 30 s", times=2, timeout=100)  # 61 s later
    pauses = [int(line.split()[-2]) for line in worker.err]
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    # The lines come through a pipe, to a reader that may have to wait for its turn.
    assert 0.95 * 61 < worker.seen[id(worker.err), 6] - begun < 61 + 30
