"""`worker.py`: a failed task is tried again after a delay, and ends as a dead letter."""

import contextlib
import signal
import struct

import pika
import pika.data
import pytest
from servers import wait_until

FAIL = ["sh", "-c", "cat >&2; exit 3"]
SOON = ["--retry-delay", "0.2"]
PROPERTIES = {
    "content_type": "text/x-task",
    "content_encoding": "identity",
    "priority": 3,
    "correlation_id": "c-1",
    "reply_to": "answers",
    "message_id": "m-1",
    "timestamp": 1_700_000_000,
    "type": "task",
    "app_id": "tests",
}
HEADERS = {"tenant": "Zoë", "attempt": 7, "nested": {"list": [1, None, True]}, "x-mine": "kept"}


@pytest.fixture(params=["classic", "quorum"])
def url(request, vhosts):
    """The URL of a virtual host, for either type of queue."""
    return vhosts[request.param]


@pytest.fixture
def publish(broker, url, queue):
    """Publish a task of somebody else's, with properties of their own."""

    def publish(body, headers=None, **properties):
        properties = pika.BasicProperties(headers=headers, **properties)
        with broker.channel(url) as channel:
            channel.queue_declare(queue, durable=True)
            channel.confirm_delivery()
            channel.basic_publish("", queue, body, properties, mandatory=True)

    return publish


@pytest.fixture
def dead_letter(broker, url, queue):
    """Wait for a message in QUEUE.dlq, take it; give its properties and its body."""

    def take(name=f"{queue}.dlq"):
        def get():
            not_there_yet = contextlib.suppress(pika.exceptions.AMQPError)
            with not_there_yet, broker.channel(url) as channel:
                return channel.basic_get(name, auto_ack=True)[1:]

        properties, body = wait_until(lambda: (got := get()) and got[0] and got)
        properties.headers.pop("x-delivery-count", None)  # of this delivery, by a quorum queue
        return properties, body

    return take


@pytest.fixture
def careful(broker):
    """The URL of a user whose permissions may be taken away."""
    broker.rabbitctl_output("add_user", "careful", "secret")
    broker.rabbitctl_output("set_permissions", "careful", ".*", ".*", ".*")
    yield broker.url_of(login="careful:secret")
    broker.rabbitctl_output("delete_user", "careful")


def left(broker, url, queue):
    with broker.channel(url) as channel:
        return channel.queue_declare(queue, passive=True).method.message_count


def test_a_task_past_its_time_limit_comes_back_twice_and_then_is_a_dead_letter(
    run, broker, url, queue, publish, dead_letter
):
    limits = ["--time-limit", "2", "--retries", "2", "--retry-delay", "2"]
    worker = run(url, "worker.py", "-q", queue, *limits)
    publish(b"Too long.....", HEADERS, **PROPERTIES)
    for times in (1, 2):
        failed = worker.wait_for("Failed: time limit of 2 s", times)
        publish(b"meanwhile")
        back = worker.wait_for("Received 'Too long.....'", times + 1)
        assert worker.wait_for("Done", times) < back
        assert 1.5 < back - failed < 10  # far from no delay, and from the 30 s without the option
    worker.wait_for(f"Failed: time limit of 2 s; it goes to {queue}.dlq")

    properties, body = dead_letter()
    assert body == b"Too long....."
    assert properties.delivery_mode == 2
    assert properties.headers == {
        **HEADERS,
        "x-retry-count": 2,
        "x-last-error": "time limit of 2 s",
    }
    for name, value in PROPERTIES.items():
        assert getattr(properties, name) == value
    assert worker.out.count(" [x] Received 'Too long.....'") == 3
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.err == []
    assert [left(broker, url, name) for name in (queue, f"{queue}.retry")] == [0, 0]


def test_a_task_as_long_as_the_time_limit_is_done(run, broker, queue, send):
    send(broker, queue, "just..")
    worker = run(broker, "worker.py", "-q", queue, "--time-limit", "2")
    worker.wait_for("Done")


def test_dead_letters_are_worked_off_with_all_their_tries(run, url, queue, publish, dead_letter):
    publish(b"task", HEADERS)
    worker = run(url, "worker.py", "-q", queue, "--retries", "0", *FAIL)
    worker.wait_for("it goes to")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    again = run(url, "worker.py", "-q", f"{queue}.dlq", "--retries", "1", *SOON, *FAIL)
    properties, body = dead_letter(f"{queue}.dlq.dlq")
    assert body == b"task"
    assert properties.headers == {**HEADERS, "x-retry-count": 1, "x-last-error": "exit status 3"}
    assert again.out.count(" [x] Received 'task'") == 2


@pytest.mark.parametrize("count", [-5, "many", None, True, [1], 2**62])
def test_a_retry_count_of_somebody_elses_making_does_no_harm(
    run, url, queue, publish, dead_letter, count
):
    publish(b"task", {"x-retry-count": count, "x-delivery-count": 100})
    run(url, "worker.py", "-q", queue, "--retries", "1", "--retry-delay", "0", *FAIL)
    properties, _ = dead_letter()
    assert properties.headers["x-last-error"] == "exit status 3"


def test_an_expiration_does_not_make_a_dead_letter_vanish(run, url, queue, publish, dead_letter):
    publish(b"task", expiration="60000")
    run(url, "worker.py", "-q", queue, "--retries", "0", *FAIL)
    assert dead_letter()[0].expiration is None


@pytest.mark.parametrize("user", ["guest", "careful"])
def test_the_name_of_the_user_who_sent_a_task_is_not_on_its_copy(run, broker, queue, careful, user):
    sender = {"guest": broker.url, "careful": careful}[user]
    with broker.channel(sender) as channel:
        channel.queue_declare(queue, durable=True)
        channel.basic_publish("", queue, b"task", pika.BasicProperties(user_id=user))
    worker = run(broker, "worker.py", "-q", queue, "--retries", "1", *SOON, *FAIL)
    worker.wait_for("it goes to")
    wait_until(lambda: broker.ready(f"{queue}.dlq"))
    with broker.channel() as channel:
        assert channel.basic_get(f"{queue}.dlq")[1].user_id is None


def test_the_headers_by_which_the_broker_would_route_or_count_are_not_on_the_copy(
    run, broker, url, queue, publish, dead_letter
):
    death = [{"queue": queue, "reason": "expired", "count": 1, "exchange": "", "routing-keys": []}]
    publish(
        b"task",
        {
            **HEADERS,
            "CC": [queue],
            "BCC": [queue],
            "x-death": death,
            "x-first-death-queue": queue,
            "x-first-death-reason": "expired",
            "x-first-death-exchange": "",
            "x-last-death-queue": queue,
            "x-delivery-count": 7,
            "x-acquired-count": 7,
        },
    )
    worker = run(url, "worker.py", "-q", queue, "--retries", "1", *SOON, *FAIL)
    properties, _ = dead_letter()
    assert properties.headers == {**HEADERS, "x-retry-count": 1, "x-last-error": "exit status 3"}
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.out.count(" [x] Received 'task'") == 2
    queues = (queue, f"{queue}.retry", f"{queue}.dlq")
    assert [left(broker, url, name) for name in queues] == [0, 0, 0]


def test_a_header_that_pika_cannot_send_is_left_out_and_named(
    run, broker, url, queue, dead_letter, monkeypatch
):
    def with_floats(pieces, value, encode=pika.data.encode_value):
        if not isinstance(value, float):
            return encode(pieces, value)
        pieces.append(struct.pack(">cd", b"d", value))  # as other clients do
        return 9

    with broker.channel(url) as channel, monkeypatch.context() as patched:
        patched.setattr(pika.data, "encode_value", with_floats)
        channel.queue_declare(queue, durable=True)
        headers = {"weight": 1e300, "tenant": "Zoë"}
        channel.basic_publish("", queue, b"task", pika.BasicProperties(headers=headers))
    worker = run(url, "worker.py", "-q", queue, "--retries", "0", *FAIL)
    worker.wait_for("Failed: exit status 3")
    assert "'weight'" in worker.out[2]
    properties, body = dead_letter()
    assert body == b"task"
    assert properties.headers == {
        "tenant": "Zoë",
        "x-retry-count": 0,
        "x-last-error": "exit status 3",
    }


def make_full(broker, url, queue):
    limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
    with broker.channel(url) as channel:
        channel.queue_declare(f"{queue}.dlq", durable=True, arguments=limits)
        channel.confirm_delivery()
        with contextlib.suppress(pika.exceptions.NackError):
            for _ in range(3):  # a quorum queue takes one more
                channel.basic_publish("", f"{queue}.dlq", b"in the way")


def make_room(broker, url, queue):
    with broker.channel(url) as channel:
        channel.queue_purge(f"{queue}.dlq")


def make_transient(broker, url, queue):
    with broker.channel() as channel:
        channel.queue_declare(f"{queue}.dlq")


def make_forbidden(broker, url, queue):
    broker.rabbitctl_output("set_permissions", "careful", "^[^.]*$", ".*", ".*")


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (make_full, "is that queue full"),
        (make_transient, "'durable'"),
        (make_forbidden, "ACCESS_REFUSED"),
    ],
)
def test_a_failed_task_that_cannot_be_published_stays_in_hand_until_sigterm(
    run, broker, queue, send, careful, obstacle, reason
):
    obstacle(broker, broker.url, queue)
    send(broker, queue, "task")
    worker = run(careful, "worker.py", "-q", queue, "--retries", "0", *FAIL)
    worker.wait_for(f"Can't put the failed task into {queue}.dlq")
    assert reason in worker.err[-1]
    assert worker.err[-1].endswith("trying again in 30 s")
    assert broker.ready(queue) == 0
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert broker.bodies(queue) == [b"task"]


def test_a_failed_task_stays_in_hand_until_it_can_be_published(
    run, broker, url, queue, publish, dead_letter
):
    make_full(broker, url, queue)
    publish(b"task")
    url_of_short_heartbeats = f"{url}?heartbeat=2"
    worker = run(url_of_short_heartbeats, "worker.py", "-q", queue, "--retries", "0", *FAIL)
    worker.wait_for("trying again in 30 s")
    make_room(broker, url, queue)
    properties, body = dead_letter()
    assert body == b"task"
    assert properties.headers == {"x-retry-count": 0, "x-last-error": "exit status 3"}
    publish(b"next")
    worker.wait_for("Received 'next'")
    assert worker.out.count(" [x] Received 'task'") == 1  # for it was never given back
    assert len(worker.err) == 1  # nor was the connection lost


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 0)])
def test_a_signal_ends_a_worker_that_has_a_failed_task_in_hand(
    run, broker, url, queue, publish, number, status
):
    make_full(broker, url, queue)
    publish(b"task")
    worker = run(url, "worker.py", "-q", queue, "--retries", "0", *FAIL)
    worker.wait_for("trying again in 30 s")
    worker.signal(signal.Signals[number])
    assert worker.wait(timeout=15) == status
    wait_until(lambda: left(broker, url, queue) == 1)


def test_a_worker_that_is_to_stop_says_too_why_a_task_went_back(run, broker, queue, send):
    make_full(broker, broker.url, queue)
    send(broker, queue, "task")
    command = ["sh", "-c", "echo begun; sleep 1; exit 3"]
    worker = run(broker, "worker.py", "-q", queue, "--retries", "0", *command)
    worker.wait_for("begun")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    (line,) = worker.err
    assert line.endswith("is that queue full?")
    assert broker.bodies(queue) == [b"task"]


BACK = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "QUEUE"}  # the test's own


def declare_retry(broker, url, queue, arguments, **options):
    arguments = {name: queue if text == "QUEUE" else text for name, text in arguments.items()}
    with broker.channel(url) as channel:
        channel.queue_declare(f"{queue}.retry", durable=True, arguments=arguments, **options)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"x-dead-letter-exchange": "elsewhere"},
        {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "elsewhere"},
        {"x-message-ttl": 1000},
        {"x-expires": 60_000},
        {"x-max-length": 1000},
        {"x-queue-type": "quorum", "x-message-ttl": 1000},
        {"x-queue-type": "quorum", "x-expires": 60_000, **BACK},
        {"x-expires": 60_000, **BACK},
    ],
    ids=lambda arguments: " ".join(arguments) or "plain",
)
def test_a_retry_queue_from_which_a_task_might_not_come_back_is_not_used(
    run, broker, url, queue, publish, arguments
):
    declare_retry(broker, url, queue, arguments)
    publish(b"task")
    worker = run(url, "worker.py", "-q", queue, *FAIL)
    worker.wait_for(f"Can't put the failed task into {queue}.retry")
    assert "PRECONDITION_FAILED" in worker.err[-1]
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert [left(broker, url, name) for name in (queue, f"{queue}.retry")] == [1, 0]


@pytest.mark.parametrize(
    "more",
    [
        {"x-queue-type": "quorum"},
        {"x-max-length": 1000},
        {"x-single-active-consumer": True},
        {"x-message-ttl": 60_000, "x-max-length-bytes": 10_000_000},
        {
            "x-queue-type": "quorum",
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    ],
    ids=lambda more: list(more)[-1],
)
def test_a_retry_queue_with_more_properties_is_used(run, broker, url, queue, publish, more):
    declare_retry(broker, url, queue, {**BACK, **more})
    publish(b"task")
    worker = run(url, "worker.py", "-q", queue, *SOON, *FAIL)
    worker.wait_for("Received", times=2)
    assert worker.err == []


def test_a_user_who_may_not_declare_queues_uses_the_retry_queue_that_is_there(
    run, broker, queue, send, careful
):
    declare_retry(broker, broker.url, queue, {**BACK, "x-message-ttl": 60_000})
    send(broker, queue, "task")
    broker.rabbitctl_output("set_permissions", "careful", "^$", ".*", ".*")
    worker = run(careful, "worker.py", "-q", queue, *SOON, *FAIL)
    worker.wait_for("Received", times=2)
    assert worker.err == []


@pytest.fixture
def in_alarm(fragile_broker):
    """Give the server no disk space, until the end or until it is called."""

    def switch(limit):
        fragile_broker.rabbitctl_output("set_disk_free_limit", limit)
        alarms = ["eval", "rabbit_alarm:get_alarms()."]
        on = limit != "50MB"
        wait_until(lambda: ("disk" in fragile_broker.rabbitctl_output(*alarms)) == on)

    switch("100000GB")
    yield lambda: switch("50MB")
    switch("50MB")


@pytest.fixture
def blocked(in_alarm, fragile_broker, run, queue):
    """A worker with a failed task in hand, which it can't publish."""
    url = fragile_broker.url_of(query="?heartbeat=3")
    worker = run(url, "worker.py", "-q", queue, "--retries", "0", *FAIL)
    worker.wait_for(f"Can't put the failed task into {queue}.dlq")
    assert "short of memory or disk" in worker.err[-1]
    return worker


@pytest.fixture
def sent_before(fragile_broker, send, queue):
    send(fragile_broker, queue, "task")


def test_under_an_alarm_a_failed_task_stays_in_hand(sent_before, blocked, fragile_broker, queue):
    assert fragile_broker.ready(queue) == 0
    blocked.signal(signal.SIGTERM)
    assert blocked.wait() == 0
    assert fragile_broker.bodies(queue) == [b"task"]


def test_after_an_alarm_there_is_one_copy_whatever_was_tried_meanwhile(
    sent_before, in_alarm, blocked, fragile_broker, queue
):
    blocked.wait_for(f"Can't put the failed task into {queue}.dlq", times=2)
    in_alarm()
    wait_until(lambda: fragile_broker.ready(f"{queue}.dlq"))
    blocked.signal(signal.SIGTERM)
    assert blocked.wait() == 0
    assert not any("redelivered" in line for line in blocked.out)  # heartbeats went on
    assert fragile_broker.bodies(f"{queue}.dlq") == [b"task"]
    assert fragile_broker.bodies(queue) == []


def test_ctrl_c_ends_a_worker_at_once_that_an_alarm_keeps_from_publishing(
    sent_before, in_alarm, fragile_broker, run, queue
):
    url = fragile_broker.url_of(query="?blocked_connection_timeout=60")
    worker = run(url, "worker.py", "-q", queue, "--retries", "0", *FAIL)
    worker.wait_for("Failed")
    states = ["list_connections", "state"]
    wait_until(lambda: "blocked" in fragile_broker.rabbitctl_output(*states))
    worker.signal(signal.SIGINT)
    assert worker.wait(timeout=15) == 130
    in_alarm()
    wait_until(lambda: fragile_broker.ready(queue) == 1)
    assert fragile_broker.ready(f"{queue}.dlq") is None
