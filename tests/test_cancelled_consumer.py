"""A worker whose consumer the broker cancelled says so, and is set up anew."""

import pytest

WAITING = " [*] Waiting for messages. To exit press CTRL+C"
TIMEOUT = 1500  # milliseconds that the broker gives a task, in place of half an hour
INTERVAL = 500  # milliseconds between two looks at that, in place of a minute


@pytest.fixture
def worker(run, fragile_broker, queue):
    """A worker of this test's queue, ready to receive."""
    script = run(fragile_broker, "worker.py", "-q", queue)
    script.wait_for("Waiting")
    return script


@pytest.fixture
def impatient_broker(fragile_broker):
    """A server that takes a task back after a moment: for connections from now on."""
    settings = {"consumer_timeout": TIMEOUT, "channel_tick_interval": INTERVAL}

    def evaluate(template, items):
        commands = ", ".join(template.format(*item) for item in items)
        return fragile_broker.rabbitctl_output("eval", f"{{{commands}}}.")

    before = evaluate("element(2, application:get_env(rabbit, {0}))", settings.items()).strip()
    evaluate("application:set_env(rabbit, {0}, {1})", settings.items())
    yield fragile_broker
    evaluate("application:set_env(rabbit, {0}, {1})", zip(settings, before.strip("{}").split(",")))


def delete(broker, queue):
    with broker.channel() as channel:
        channel.queue_delete(queue)


def test_a_worker_outlives_its_queue_while_idle(fragile_broker, worker, send, queue):
    delete(fragile_broker, queue)
    worker.wait_for("Waiting", times=2)
    send(fragile_broker, queue, "later")
    worker.wait_for("Done")
    assert worker.out == [WAITING, WAITING, " [x] Received 'later'", " [x] Done"]
    assert len(worker.err) == 1
    assert "cancelled the consumer" in worker.err[0]
    assert fragile_broker.bodies(queue) == []


def test_a_worker_outlives_its_queue_in_mid_task(fragile_broker, worker, send, queue):
    send(fragile_broker, queue, "long..")
    worker.wait_for("Received")
    delete(fragile_broker, queue)
    worker.wait_for("Waiting", times=2)
    send(fragile_broker, queue, "later")
    worker.wait_for("Received 'later'")
    worker.wait_for("Done", times=2)
    assert worker.tasks("Received") == ["long..", "later"]
    assert len(worker.err) == 1
    assert "cancelled the consumer" in worker.err[0]
    assert fragile_broker.bodies(queue) == []


def test_a_task_that_takes_longer_than_consumer_timeout_is_reported_with_that_setting(
    impatient_broker, run, send, queue
):
    worker = run(impatient_broker, "worker.py", "-q", queue)
    worker.wait_for("Waiting")
    send(impatient_broker, queue, "long..........")
    worker.wait_for("Received 'long..........' (redelivered)")
    assert len(worker.err) == 1
    assert "raise consumer_timeout" in worker.err[0]
    with impatient_broker.channel() as channel:
        channel.queue_purge(queue)
    worker.wait_for("consumer_timeout", times=2)
    assert not any("Done" in line for line in worker.out)
