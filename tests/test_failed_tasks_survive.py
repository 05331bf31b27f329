"""Failed tasks outlive their broker: waiting for another try, as dead letters, and on the way."""

import signal

import pytest
from servers import wait_until

FAIL_IF_BAD = ["sh", "-c", "read task; echo $task >> $0; case $task in bad*) exit 3; esac"]


def test_what_waits_for_another_try_and_the_dead_letters_survive_a_restart(
    fragile_broker, run, send, queue
):
    for retries, suffix in (("1", "retry"), ("0", "dlq")):
        send(fragile_broker, queue, "task")
        options = ["--retries", retries, "--retry-delay", "600"]
        worker = run(fragile_broker, "worker.py", "-q", queue, *options, "false")
        worker.wait_for("Failed")
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert fragile_broker.ready(f"{queue}.{suffix}") == 1
    fragile_broker.settle()
    fragile_broker.stop()
    fragile_broker.start()
    assert fragile_broker.ready(queue) == 0
    assert fragile_broker.ready(f"{queue}.retry") == 1
    assert fragile_broker.bodies(f"{queue}.dlq") == [b"task"]


def test_of_tasks_that_fail_while_the_broker_is_killed_each_is_a_dead_letter(
    fragile_broker, run, send, queue, tmp_path
):
    done = tmp_path / "done"
    command = [*FAIL_IF_BAD, done]
    workers = [
        run(fragile_broker, "worker.py", "-q", queue, "--retries", "0", *command) for _ in range(2)
    ]
    send(fragile_broker, queue, "bad, so that the dead-letter queue is made")
    wait_until(lambda: done.exists() and fragile_broker.ready(queue) == 0)
    fragile_broker.settle()
    tasks = [f"{kind} {number}" for number in range(300) for kind in ("good", "bad")]
    send(fragile_broker, queue, *tasks)
    for part in (100, 300):
        wait_until(lambda part=part: done.read_text().count("\n") > part)
        fragile_broker.kill()
        fragile_broker.start()
    wait_until(lambda: set(tasks) <= set(done.read_text().splitlines()))
    for worker in workers:
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert fragile_broker.ready(queue) == 0
    letters = {body.decode() for body in fragile_broker.bodies(f"{queue}.dlq")}
    assert {task for task in tasks if task.startswith("bad")} <= letters
    assert not any(letter.startswith("good") for letter in letters)


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_what_becomes_due_while_the_broker_is_killed_and_comes_back_is_not_lost(
    fragile_broker, fragile_vhosts, run, send, queue, kind
):
    url = fragile_vhosts[kind]
    tasks = [b"task %d" % number for number in range(150)]
    send(url, queue, "first")
    worker = run(url, "worker.py", "-q", queue, "--retry-delay", "6", "false")
    worker.wait_for("Failed")
    fragile_broker.settle()
    send(url, queue, *map(bytes.decode, tasks))
    worker.wait_for("Failed", times=1 + len(tasks))
    wait_until(lambda: fragile_broker.ready(queue, url) == 0)
    fragile_broker.kill()
    worker.end()
    fragile_broker.start()
    back = set()
    wait_until(lambda: back.update(fragile_broker.bodies(queue, url)) or set(tasks) <= back)
