"""`worker.py`: a failed task is tried again after a delay, and ends as a dead letter."""

import contextlib
import signal

import pika
import pytest
from conftest import wait_until

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
    "user_id": "guest",
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
    limits = ["--time-limit", "2", "--retries", "2", "--retry-delay", "1"]
    worker = run(url, "worker.py", "-q", queue, *limits)
    publish(b"Too long.....", HEADERS, **PROPERTIES)
    for times in (1, 2):
        failed = worker.wait_for("Failed: time limit of 2 s", times)
        publish(b"meanwhile")
        back = worker.wait_for("Received 'Too long.....'", times + 1)
        assert worker.wait_for("Done", times) < back
        assert 0.9 < back - failed < 2  # as both are seen by a reader of its output
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


def test_a_task_in_another_users_name_is_tried_again(run, broker, queue, careful):
    with broker.channel(careful) as channel:
        channel.queue_declare(queue, durable=True)
        channel.basic_publish("", queue, b"task", pika.BasicProperties(user_id="careful"))
    worker = run(broker, "worker.py", "-q", queue, *SOON, *FAIL)
    worker.wait_for("Received 'task'", times=2)


def make_full(broker, queue):
    limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
    with broker.channel() as channel:
        channel.queue_declare(f"{queue}.dlq", durable=True, arguments=limits)
        channel.basic_publish("", f"{queue}.dlq", b"in the way")


def make_transient(broker, queue):
    with broker.channel() as channel:
        channel.queue_declare(f"{queue}.dlq")


def make_forbidden(broker, queue):
    broker.rabbitctl_output("set_permissions", "careful", "^[^.]*$", ".*", ".*")


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (make_full, "is that queue full?"),
        (make_transient, "'durable'"),
        (make_forbidden, "ACCESS_REFUSED"),
    ],
)
def test_a_failed_task_that_cannot_be_published_goes_back_to_its_queue(
    run, broker, queue, send, careful, obstacle, reason
):
    obstacle(broker, queue)
    send(broker, queue, "task")
    worker = run(careful, "worker.py", "-q", queue, "--retries", "0", *FAIL)
    worker.wait_for(f"Can't put the failed task into {queue}.dlq")
    assert reason in worker.err[-1]
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert broker.bodies(queue) == [b"task"]


def test_a_worker_that_is_to_stop_says_too_why_a_task_went_back(run, broker, queue, send):
    make_full(broker, queue)
    send(broker, queue, "task")
    command = ["sh", "-c", "echo begun; sleep 1; exit 3"]
    worker = run(broker, "worker.py", "-q", queue, "--retries", "0", *command)
    worker.wait_for("begun")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    (line,) = worker.err
    assert line.endswith("is that queue full?")
    assert broker.bodies(queue) == [b"task"]


@pytest.mark.parametrize("arguments", [{}, {"x-dead-letter-exchange": "elsewhere"}])
def test_a_retry_queue_from_which_no_task_comes_back_is_not_used(
    run, broker, queue, send, arguments
):
    with broker.channel() as channel:
        channel.queue_declare(f"{queue}.retry", durable=True, arguments=arguments)
    send(broker, queue, "task")
    worker = run(broker, "worker.py", "-q", queue, *FAIL)
    worker.wait_for(f"Can't put the failed task into {queue}.retry")
    assert "x-dead-letter" in worker.err[-1]
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert broker.bodies(queue) == [b"task"]


def test_a_retry_queue_with_more_properties_is_used(run, broker, queue, send):
    arguments = {
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": queue,
        "x-queue-type": "quorum",
    }
    with broker.channel() as channel:
        channel.queue_declare(f"{queue}.retry", durable=True, arguments=arguments)
    send(broker, queue, "task")
    worker = run(broker, "worker.py", "-q", queue, *SOON, *FAIL)
    worker.wait_for("Received", times=2)


def test_under_an_alarm_a_failed_task_goes_back_to_its_queue(run, fragile_broker, queue, send):
    send(fragile_broker, queue, "task")
    fragile_broker.rabbitctl_output("set_disk_free_limit", "100000GB")
    try:
        alarms = ["eval", "rabbit_alarm:get_alarms()."]
        wait_until(lambda: "disk" in fragile_broker.rabbitctl_output(*alarms))
        url = fragile_broker.url_of(query="?blocked_connection_timeout=1")
        worker = run(url, "worker.py", "-q", queue, *FAIL)
        worker.wait_for(f"Can't put the failed task into {queue}.retry")
        assert "short of memory or disk" in worker.err[-1]
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    finally:
        fragile_broker.rabbitctl_output("set_disk_free_limit", "50MB")
    assert fragile_broker.bodies(queue) == [b"task"]


@pytest.mark.parametrize("url", ["quorum"], indirect=True)
def test_a_task_that_kills_its_worker_is_a_dead_letter_after_a_handful_of_deliveries(
    run, broker, url, queue, dead_letter
):
    with broker.channel(url) as channel:
        channel.queue_declare(queue, durable=True)
        for body in (b"poison", b"behind it"):
            channel.basic_publish("", queue, body)
    command = ["sh", "-c", "if grep -q poison; then kill -9 $PPID; fi"]
    for _ in range(5):
        worker = run(url, "worker.py", "-q", queue, *command)
        assert worker.wait() == -signal.SIGKILL
        assert worker.tasks("Received") == ["poison"]
    worker = run(url, "worker.py", "-q", queue, *command)
    worker.wait_for("Done")
    assert worker.tasks("Received") == ["poison", "behind it"]
    assert "begun 5 times and never finished" in worker.out[2]
    properties, body = dead_letter()
    assert body == b"poison"
    assert properties.headers == {
        "x-retry-count": 0,
        "x-last-error": "begun 5 times and never finished, does it kill its worker?",
    }
