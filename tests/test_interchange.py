"""Both scripts: they share a queue with the tutorial's, whoever made it and however."""

import subprocess

import pytest
from servers import wait_until

OF_OTHERS = {  # what others may have declared a queue with, besides durable=True
    "quorum": {"x-queue-type": "quorum"},
    "length-limit": {"x-max-length": 1000, "x-overflow": "reject-publish"},
    "dead-letters": {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"},
    "time-to-live": {"x-message-ttl": 3_600_000, "x-expires": 3_600_000},
    "priorities": {"x-max-priority": 5},
    "one-consumer": {"x-single-active-consumer": True},
}


@pytest.fixture
def tutorial(run, monkeypatch):
    """Start the tutorial's script of a name, which declares its queue plain, or as a quorum one."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")

    def start(url, name, declaration, *words):
        monkeypatch.setenv("DECLARE", declaration)
        return run(url, f"tests/tutorial/{name}", *words)

    return start


@pytest.mark.parametrize(
    ("queue_type", "declaration"),  # of a plain declaration there, and of the tutorial's
    [("classic", "durable"), ("classic", "quorum"), ("quorum", "durable"), ("quorum", "quorum")],
)
def test_either_side_does_the_tasks_of_the_other(
    run, broker, vhosts, tutorial, queue_type, declaration
):
    url = vhosts[queue_type]

    def ours(name, *words):
        return run(url, name, *words)

    def theirs(name, *words):
        return tutorial(url, name, declaration, *words)

    def done(worker):
        worker.wait_for("Done")
        worker.end()
        return [line.replace("'", "") for line in worker.out[1:]]

    makers = {theirs: ours, ours: theirs}  # whoever is first makes the queue
    if (queue_type, declaration) == ("classic", "quorum"):
        del makers[ours]  # the tutorial's newer scripts don't accept a classic one
    for first, second in makers.items():
        with broker.channel(url) as channel:
            channel.queue_delete("task_queue")
        worker = first("worker.py")
        worker.wait_for("Waiting")
        assert second("new_task.py", "First message.").wait() == 0
        assert done(worker) == [" [x] Received First message.", " [x] Done"]

        with broker.channel(url) as channel:
            channel.queue_delete("task_queue")
        assert first("new_task.py", "Second message.").wait() == 0
        assert done(second("worker.py")) == [" [x] Received Second message.", " [x] Done"]
        # Nor has the second one changed the queue, or the first one would be refused.
        assert first("new_task.py", "Third message.").wait() == 0
    with broker.channel(url) as channel:
        channel.queue_delete("task_queue")


def test_a_durable_queue_with_other_properties_is_used_as_it_is_by_any_user(run, broker, queue):
    # Given queues that others have made, and a user who may not configure any.
    broker.rabbitctl_output("add_user", "clerk", "secret")
    broker.rabbitctl_output("set_permissions", "clerk", "^$", ".*", ".*")
    urls = {f"{queue}-{name}": broker.url for name in OF_OTHERS}
    urls["durable"] = broker.url  # the broker's refusals quote the name, and what differs
    urls["clerk"] = broker.url_of(login="clerk:secret")

    def declare():  # which is refused if the queue has changed
        with broker.channel() as channel:
            for name in urls:
                arguments = OF_OTHERS.get(name.removeprefix(f"{queue}-"), {"x-max-priority": 5})
                channel.queue_declare(name, durable=True, arguments=arguments)

    declare()
    scripts = []
    for name, url in urls.items():
        scripts += [run(url, each, "-q", name) for each in ("new_task.py", "worker.py")]
    for producer, worker in zip(scripts[::2], scripts[1::2]):
        assert producer.wait() == 0, producer.err
        worker.wait_for("Done")
        assert producer.err + worker.err == []
    declare()


def test_a_connection_is_named_after_its_script_and_process(run, broker, queue):
    producer = run(broker, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
    started = {"new_task.py": producer, "worker.py": run(broker, "worker.py", "-q", queue)}

    def named():
        output = broker.rabbitctl_output("-q", "list_connections", "client_properties")
        words = [(name, str(each.process.pid)) for name, each in started.items()]
        return all(
            any(all(word in line for word in each) for line in output.splitlines())
            for each in words
        )

    wait_until(named)
