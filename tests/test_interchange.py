"""Both scripts: they share a queue with the tutorial's, whoever made it and however."""

import pytest

DURABLE, QUORUM = "durable", "quorum"  # the declarations of the tutorial, older and newer

OF_OTHERS = {  # what others may have declared a queue with, besides durable=True
    "quorum": {"x-queue-type": "quorum"},
    "length limit": {"x-max-length": 1000, "x-overflow": "reject-publish"},
    "dead letters": {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"},
    "time to live": {"x-message-ttl": 3_600_000, "x-expires": 3_600_000},
    "priorities": {"x-max-priority": 5},
    "one consumer": {"x-single-active-consumer": True},
}


@pytest.fixture
def url(request, broker, vhosts):
    """The URL of a virtual host where nobody has made the tutorial's queue yet."""
    url = vhosts[getattr(request, "param", "classic")]
    with broker.channel(url) as channel:
        channel.queue_delete("task_queue")
    yield url
    with broker.channel(url) as channel:
        channel.queue_delete("task_queue")


@pytest.fixture
def tutorial(run, url, monkeypatch):
    """Start the tutorial's script of a name, with its older or newer declaration."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")

    def start(name, declaration, *words):
        monkeypatch.setenv("DECLARE", declaration)
        return run(url, f"tests/tutorial/{name}", *words)

    return start


either_declaration = pytest.mark.parametrize("declaration", [DURABLE, QUORUM])

where_the_declaration_agrees = pytest.mark.parametrize(
    ("url", "declaration"),
    [("classic", DURABLE), ("quorum", DURABLE), ("quorum", QUORUM)],
    indirect=["url"],
)


@either_declaration
def test_our_producer_sends_to_the_queue_of_the_tutorials_worker(run, url, tutorial, declaration):
    theirs = tutorial("worker.py", declaration)
    theirs.wait_for("Waiting")
    ours = run(url, "new_task.py", "First message.")
    assert ours.wait() == 0, ours.err
    theirs.wait_for("Done")
    assert theirs.out[1:] == [" [x] Received First message.", " [x] Done"]


@either_declaration
def test_our_worker_works_off_the_queue_of_the_tutorials_producer(run, url, tutorial, declaration):
    assert tutorial("new_task.py", declaration, "First message.").wait() == 0
    ours = run(url, "worker.py")
    ours.wait_for("Done")
    assert ours.out[1:] == [" [x] Received 'First message.'", " [x] Done"]
    # and what ours did there has not changed the queue: the tutorial's still agrees with it
    assert tutorial("new_task.py", declaration, "Second message.").wait() == 0
    ours.wait_for("Done", times=2)


@where_the_declaration_agrees
def test_the_tutorials_producer_sends_to_the_queue_of_our_worker(run, url, tutorial, declaration):
    ours = run(url, "worker.py")
    ours.wait_for("Waiting")
    assert tutorial("new_task.py", declaration, "First message.").wait() == 0
    ours.wait_for("Done")
    assert ours.out[1:] == [" [x] Received 'First message.'", " [x] Done"]


@where_the_declaration_agrees
def test_the_tutorials_worker_works_off_the_queue_of_our_producer(run, url, tutorial, declaration):
    ours = run(url, "new_task.py", "First message.")
    assert ours.wait() == 0, ours.err
    theirs = tutorial("worker.py", declaration)
    theirs.wait_for("Done")
    assert theirs.out[1:] == [" [x] Received First message.", " [x] Done"]


@pytest.mark.parametrize("properties", OF_OTHERS.values(), ids=OF_OTHERS)
def test_a_durable_queue_with_other_properties_is_used_as_it_is(run, broker, queue, properties):
    def declare():
        with broker.channel() as channel:
            channel.queue_declare(queue, durable=True, arguments=properties)

    declare()
    producer = run(broker, "new_task.py", "-q", queue, "First message")
    assert producer.wait() == 0, producer.err
    worker = run(broker, "worker.py", "-q", queue)
    worker.wait_for("Done")
    assert producer.err + worker.err == []
    declare()  # is refused if the queue has changed


def test_a_user_who_may_not_configure_queues_uses_the_one_that_is_there(run, broker, queue):
    broker.rabbitctl_output("add_user", "clerk", "secret")
    broker.rabbitctl_output("set_permissions", "clerk", "^$", ".*", ".*")
    url = broker.url_of(login="clerk:secret")
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True, arguments={"x-max-priority": 5})
    producer = run(url, "new_task.py", "-q", queue, "First message")
    assert producer.wait() == 0, producer.err
    worker = run(url, "worker.py", "-q", queue)
    worker.wait_for("Done")
    assert producer.err + worker.err == []


def test_our_messages_are_persistent(run, broker, queue):
    producer = run(broker, "new_task.py", "-q", queue, "First message.")
    assert producer.wait() == 0, producer.err
    with broker.channel() as channel:
        assert channel.basic_get(queue)[1].delivery_mode == 2
