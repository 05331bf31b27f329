"""`worker.py`: a failed task is retried after a delay, ends as a dead letter, and is never lost."""

import contextlib
import resource
import signal
import struct
import subprocess
import time

import pika
import pika.data
import psutil
import pytest
from commands import GRACE, child_of, kill_child_of
from servers import wait_until

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
MAX_DELIVERIES = 15
BEFORE_IT_TRIES_AGAIN = 2  # seconds
# It fails for a task that begins with "bad", and notes each of them in a file.
FAIL_IF_BAD = ["sh", "-c", "read task; echo $task >> $0; case $task in bad*) exit 3; esac"]
POISON = ["sh", "-c", "if grep -q poison; then kill -9 $PPID; fi"]  # it kills its worker


def take(broker, name, url=None):
    """Wait for a message in a queue, and take it; return its properties and its body."""
    wait_until(lambda: broker.ready(name, url))
    with broker.channel(url) as channel:
        _, properties, body = channel.basic_get(name, auto_ack=True)
    assert properties.headers.pop("x-delivery-count", 0) == 0  # of this delivery, by the broker
    return properties, body


@pytest.fixture(scope="module")
def careful(broker):
    """The URL of a user who may not declare a queue with a dot in its name."""
    broker.rabbitctl_output("add_user", "careful", "secret")
    broker.rabbitctl_output("set_permissions", "careful", "^[^.]*$", ".*", ".*")
    return broker.url_of(login="careful:secret")


# ---- Retries and dead letters ----


def test_a_task_past_its_time_limit_is_retried_twice_and_then_is_a_dead_letter(
    broker, vhosts, worker, publish, queue
):
    by_the_broker = {  # headers by which it would route, count or drop the copy
        "CC": [queue],
        "BCC": [queue],
        "x-death": [{"queue": queue, "reason": "expired", "count": 1, "exchange": ""}],
        "x-first-death-queue": queue,
        "x-first-death-reason": "expired",
        "x-first-death-exchange": "",
        "x-last-death-queue": queue,
        "x-delivery-count": 7,
        "x-acquired-count": 7,
    }
    limits = ["--time-limit", "1", "--retries", "2", "--retry-delay", "2"]
    workers = {url: worker(*limits, url=url) for url in vhosts.values()}
    for url in workers:
        headers = {**HEADERS, **by_the_broker}
        publish(b"long...", headers, url, expiration="60000", user_id="guest", **PROPERTIES)

    for times in (1, 2):
        failed = {}
        for url, each in workers.items():
            failed[url] = each.wait_for(
                "Failed: exceeded the time limit of 1 s; retrying in 2 s", times
            )
            publish(b"meanwhile", url=url)
        for url, each in workers.items():
            back = each.wait_for("Received 'long...'", times + 1)
            assert each.wait_for("Done", times) < back
            assert 1.5 < back - failed[url] < 10  # neither at once nor the default of 30 s

    for url, each in workers.items():
        each.wait_for(f"Failed: exceeded the time limit of 1 s; moved to {queue}.dlq")
        properties, body = take(broker, f"{queue}.dlq", url)
        assert body == b"long..."
        ours = {"x-retry-count": 2, "x-last-error": "exceeded the time limit of 1 s"}
        assert properties.headers == {**HEADERS, **ours}
        assert properties.delivery_mode == 2
        assert properties.expiration is None
        assert properties.user_id is None
        for name, value in PROPERTIES.items():
            assert getattr(properties, name) == value
        each.signal(signal.SIGTERM)
        assert each.wait() == 0
        assert each.err == []
        assert each.out.count(" [x] Received 'long...'") == 3
        assert [broker.ready(f"{queue}{suffix}", url) for suffix in ("", ".retry")] == [0, 0]


def test_a_task_that_ends_just_within_its_time_limit_is_done(broker, worker, send, queue):
    sleeping = worker("--time-limit", "2")
    running = worker("-q", f"{queue}-command", "--time-limit", "2", "sleep", "1")
    for name in (queue, f"{queue}-command"):
        send(broker, name, "just..")
    # The worker looks at a command again when it has ended, and its time is up as well.
    begin, command = running.wait_for("Received"), child_of(running)
    running.signal(signal.SIGSTOP)
    wait_until(lambda: command.status() == psutil.STATUS_ZOMBIE)
    wait_until(lambda: time.monotonic() > begin + 2.5)
    running.signal(signal.SIGCONT)
    for each in (sleeping, running):
        each.wait_for("Done")
        assert not any("Failed" in line for line in each.out)


def test_dead_letters_are_reprocessed_with_all_their_retries(
    broker, vhosts, worker, publish, queue
):
    url = vhosts["quorum"]
    publish(b"task", HEADERS, url)
    worker("--retries", "1", *SOON, "false", url=url).wait_for("moved to")
    again = worker("-q", f"{queue}.dlq", "--retries", "1", *SOON, "false", url=url)
    properties, body = take(broker, f"{queue}.dlq.dlq", url)
    assert body == b"task"
    assert properties.headers == {**HEADERS, "x-retry-count": 1, "x-last-error": "exit status 1"}
    assert again.tasks("Received") == ["task", "task"]


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_retry_count_of_the_senders_does_no_harm(broker, vhosts, worker, publish, queue, kind):
    counts = [-5, "many", None, True, [1], 2**62]
    for count in counts:
        publish(b"task", {"x-retry-count": count, "x-delivery-count": 100}, vhosts[kind])
    worker("--retries", "1", "--retry-delay", "0", "false", url=vhosts[kind])
    for _ in counts:
        properties, _ = take(broker, f"{queue}.dlq", vhosts[kind])
        assert properties.headers == {"x-retry-count": 1, "x-last-error": "exit status 1"}


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_dead_letter_has_neither_the_senders_expiration_nor_its_delivery_counts(
    broker, vhosts, worker, publish, queue, kind
):
    headers = {**HEADERS, "x-delivery-count": 7, "x-acquired-count": 7}
    publish(b"task", headers, vhosts[kind], expiration="60000")
    worker("--retries", "0", "false", url=vhosts[kind])
    properties, _ = take(broker, f"{queue}.dlq", vhosts[kind])
    assert properties.headers == {**HEADERS, "x-retry-count": 0, "x-last-error": "exit status 1"}
    assert properties.expiration is None


def test_of_headers_that_pika_cannot_send_the_copy_has_none_but_all_else(
    broker, worker, queue, monkeypatch
):
    def with_floats(pieces, value, encode=pika.data.encode_value):
        if not isinstance(value, float):
            return encode(pieces, value)
        pieces.append(struct.pack(">cd", b"d", value))  # as other clients do
        return 9

    with broker.channel() as channel, monkeypatch.context() as patched:
        patched.setattr(pika.data, "encode_value", with_floats)
        channel.queue_declare(queue, durable=True)
        headers = {"weight": 1e300, "tenant": "Zoë"}
        channel.basic_publish("", queue, b"task", pika.BasicProperties(headers=headers, type="t"))
    worker("--retries", "0", "false")
    properties, body = take(broker, f"{queue}.dlq")
    assert body == b"task"
    assert properties.type == "t"
    assert properties.headers == {"x-retry-count": 0, "x-last-error": "exit status 1"}


def test_a_user_who_may_not_declare_queues_uses_those_that_are_there(
    broker, careful, worker, publish, queue
):
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}
    with broker.channel() as channel:
        channel.queue_declare(f"{queue}.retry", durable=True, arguments=arguments)
        channel.queue_declare(f"{queue}.dlq", durable=True, arguments={"x-max-length": 10})
    publish(b"task", user_id="guest")  # which is not the user of the copy's connection
    failing = worker("--retries", "1", *SOON, "false", url=careful)
    properties, _ = take(broker, f"{queue}.dlq")
    assert properties.user_id is None
    assert failing.tasks("Received") == ["task", "task"]
    assert failing.err == []


# ---- A task that can't be finished stays in hand ----


def make_full(channel, name):
    limits = {"x-max-length": 1, "x-overflow": "reject-publish"}
    channel.queue_declare(f"{name}.dlq", durable=True, arguments=limits)
    channel.confirm_delivery()
    with contextlib.suppress(pika.exceptions.NackError):
        for _ in range(3):  # a quorum queue takes one more
            channel.basic_publish("", f"{name}.dlq", b"in the way")


def make_transient(channel, name):
    channel.queue_declare(f"{name}.dlq")


def make_retry(**arguments):
    """Return what declares a QUEUE.retry that is not the worker's."""
    more = {f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}

    def declare(channel, name):
        back = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": name}
        channel.queue_declare(f"{name}.retry", durable=True, arguments={**back, **more})

    return declare


def make_nothing(channel, name):
    pass


SAFE = {
    "queue_type": "quorum",
    "dead_letter_strategy": "at-least-once",
    "overflow": "reject-publish",
}
OBSTACLES = [
    (make_full, "dlq", "full"),
    (make_transient, "dlq", "'durable'"),
    (make_nothing, "dlq", "NOT_FOUND"),  # careful may not make it
    (make_retry(), "retry", "PRECONDITION_FAILED"),
    (make_retry(queue_type="quorum"), "retry", "PRECONDITION_FAILED"),
    (make_retry(**SAFE, message_ttl=1000), "retry", "PRECONDITION_FAILED"),
    (make_retry(**SAFE, dead_letter_routing_key="elsewhere"), "retry", "PRECONDITION_FAILED"),
]


@pytest.fixture
def not_to_be_run(tmp_path):
    """A command that is there, but fails to start: without a line that names an interpreter."""
    command = tmp_path / "command"
    command.write_text("echo done")
    command.chmod(0o755)
    return command


def give_task(broker, name, obstacle=make_nothing, url=None, bodies=(b"task",)):
    with broker.channel(url) as channel:
        obstacle(channel, name)
        channel.queue_declare(name, durable=True)
        channel.confirm_delivery()
        for body in bodies:
            channel.basic_publish("", name, body)


def test_a_failed_task_that_cannot_be_moved_stays_in_hand_until_a_signal(
    broker, careful, worker, not_to_be_run, queue
):
    workers = []
    for number, (obstacle, suffix, reason) in enumerate(OBSTACLES):
        name = f"{queue}-{number}"
        give_task(broker, name, obstacle)
        options = ["-q", name, "--retries", "0" if suffix == "dlq" else "1", "false"]
        url = careful if reason == "NOT_FOUND" else None
        workers.append((name, worker(*options, url=url)))

    # The broker's reason is said, and the task is not given back.
    for (name, each), (_, suffix, reason) in zip(workers, OBSTACLES):
        each.wait_for("trying again in 3 s")
        line = each.err[0]
        assert f"Can't move the failed task to {name}.{suffix}" in line
        assert reason in line
        assert broker.ready(name) == 0

    # Signals are heeded meanwhile, and give it back.
    for number, (name, each) in enumerate(workers):
        sent, status = ((signal.SIGTERM, 0), (signal.SIGINT, 130))[number % 2]
        each.signal(sent)
        assert each.wait(BEFORE_IT_TRIES_AGAIN) == status
        wait_until(lambda name=name: broker.ready(name) == 1)
        assert not broker.ready(f"{name}.retry")

    # So are they by one that can't run its command, and has prefetched another task.
    name = f"{queue}-command"
    give_task(broker, name, bodies=[b"task", b"next"])
    broken = worker("-q", name, "--prefetch-count", "2", not_to_be_run)
    broken.wait_for("trying again in 3 s")
    broken.signal(signal.SIGTERM)
    assert broken.wait(BEFORE_IT_TRIES_AGAIN) == 0
    wait_until(lambda: broker.ready(name) == 2)

    # A worker that was told to stop before tries once, and says why the task went back.
    give_task(broker, queue, make_full)
    stopping = worker("--retries", "0", "sh", "-c", "echo begun; sleep 1; exit 3")
    stopping.wait_for("begun")
    stopping.signal(signal.SIGTERM)
    assert stopping.wait() == 0
    (line,) = stopping.err
    assert "full" in line
    assert "again" not in line
    assert broker.bodies(queue) == [b"task"]


def test_a_task_stays_in_hand_until_it_can_be_finished(
    broker, vhosts, worker, not_to_be_run, queue, tmp_path
):
    # At the same time, with many heartbeats:
    workers = {}

    def start(trouble, *arguments, kind="classic", **more):
        options = ["-q", f"{queue}-{trouble}", "--retry-delay", "600", *arguments]
        workers[trouble] = worker(*options, url=f"{vhosts[kind]}?heartbeat=2", **more)

    def give(trouble, obstacle=make_nothing, kind="classic"):
        tasks = [b"x" * 20_000, b"next"]
        give_task(broker, f"{queue}-{trouble}", obstacle, vhosts[kind], tasks)
        workers[trouble].wait_for("trying again in 3 s")
        assert broker.ready(f"{queue}-{trouble}", vhosts[kind]) == 1

    start("classic", "--retries", "0", "false")
    give("classic", make_full)
    start("quorum", "--retries", "0", "false", kind="quorum")
    give("quorum", make_full, kind="quorum")
    start("retry", "false")
    give("retry", make_retry())
    # The time in hand does not count towards the time limit of a task.
    start("command", "--time-limit", "5", not_to_be_run)
    give("command")
    module = tmp_path / "job.py"
    module.write_text("def do(body): pass")
    start("function", "--time-limit", "5", "--function", "job:do", cwd=tmp_path)
    module.write_text("import no_such_module")
    kill_child_of(workers["function"])
    give("function")
    start("room", "md5sum")  # which gets its standard input from a file
    resource.prlimit(workers["room"].process.pid, resource.RLIMIT_FSIZE, (10_000, -1))
    give("room")
    assert "Can't run" in workers["room"].err[0]

    # When what was wrong has been put right,
    for trouble, url in (("classic", None), ("quorum", vhosts["quorum"]), ("retry", None)):
        with broker.channel(url) as channel:
            suffix = "retry" if trouble == "retry" else "dlq"
            channel.queue_delete(f"{queue}-{trouble}.{suffix}")
    not_to_be_run.write_text("#!/bin/sh\necho begun; sleep 2")
    module.write_text("def do(body): pass  # mended")
    resource.prlimit(workers["room"].process.pid, resource.RLIMIT_FSIZE, (-1, -1))

    # it is finished, by a worker that is told to stop, too, and otherwise the next one is begun.
    stopping = workers.pop("command")
    stopping.wait_for("begun")
    stopping.signal(signal.SIGTERM)
    assert stopping.wait() == 0
    assert stopping.out[2:] == ["begun", " [x] Done"]
    wait_until(lambda: broker.ready(f"{queue}-classic.dlq") == 2)
    wait_until(lambda: broker.ready(f"{queue}-quorum.dlq", vhosts["quorum"]) == 2)
    wait_until(lambda: broker.ready(f"{queue}-retry.retry") == 2)
    for trouble in ("function", "room"):
        workers[trouble].wait_for("Done", times=2)
    for each in workers.values():
        assert len(each.tasks("Received")) == 2
        assert not any("redelivered" in line for line in each.out)
        assert all("trying again in 3 s" in line for line in each.err)  # no connection was lost


def test_of_a_task_that_was_taken_back_before_it_failed_there_is_no_copy(
    broker, worker, send, queue
):
    failing = worker("sh", "-c", "sleep 1; exit 3")
    send(broker, queue, "task")
    command = child_of(failing)
    # The worker notices both at the same time: that its queue is gone, and that the command is.
    failing.signal(signal.SIGSTOP)
    with broker.channel() as channel:
        channel.queue_delete(queue)
    wait_until(lambda: command.status() == psutil.STATUS_ZOMBIE)
    failing.signal(signal.SIGCONT)
    failing.wait_for("queue was deleted")
    assert not broker.ready(f"{queue}.retry")
    assert not any("Failed" in line for line in failing.out)


def test_in_an_alarm_a_failed_task_waits_in_hand_and_then_there_is_one_copy(
    broker, vhosts, worker, alarm, queue
):
    kinds = {"dlq": "classic", "retry": "quorum", "stopping": "classic", "twice": "quorum"}
    for name, kind in kinds.items():
        tasks = [b"bad", b"good"]
        give_task(broker, f"{queue}-{name}", url=vhosts[kind], bodies=tasks)

    alarm(True)
    begin = time.monotonic()
    workers = {}
    for name, kind in kinds.items():
        retries = ["--retries", "1" if name == "retry" else "0", "--retry-delay", "600"]
        command = [*FAIL_IF_BAD, "/dev/null"]
        url = f"{vhosts[kind]}?heartbeat=2"
        workers[name] = worker("-q", f"{queue}-{name}", *retries, *command, url=url)
        workers[name].wait_for("Received")
    states = ["list_connections", "state"]
    wait_until(lambda: broker.rabbitctl_output(*states).count("blocked") == len(kinds))

    # A first signal is only noted. A second one ends the worker at once.
    workers["stopping"].signal(signal.SIGTERM)
    workers["twice"].signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        workers["twice"].process.wait(1)
    workers["twice"].signal(signal.SIGTERM)
    assert workers.pop("twice").wait(timeout=GRACE) == 130

    # The others keep their connections for many heartbeats, and say nothing.
    time.sleep(max(0, begin + 20 - time.monotonic()))
    assert all(each.err == [] for each in workers.values())
    assert not any("Failed" in line for each in workers.values() for line in each.out)
    alarm(False)

    # Then there is one copy of each task, and two workers go on.
    for name in ("dlq", "retry"):
        workers[name].wait_for("Done")
        assert workers[name].tasks("Received") == ["bad", "good"]
    assert workers["stopping"].wait() == 0
    assert workers["stopping"].tasks("Received") == ["bad"]
    for name, each in workers.items():
        assert not any("redelivered" in line for line in each.out)
        assert each.err == []
        suffix, url = "retry" if name == "retry" else "dlq", vhosts[kinds[name]]
        assert broker.bodies(f"{queue}-{name}.{suffix}", url) == [b"bad"]
    assert broker.bodies(f"{queue}-stopping") == [b"good"]
    url = vhosts[kinds["twice"]]
    wait_until(lambda: broker.ready(f"{queue}-twice", url) == 2)


# ---- None is lost ----


def test_failed_tasks_survive_a_broker_that_is_killed(
    broker, vhosts, worker, send, queue, tmp_path
):
    # Two workers that fail half of their tasks, and others whose tasks wait for a retry.
    begun = tmp_path / "begun"
    options = ["--retries", "0", *FAIL_IF_BAD, begun]
    busy = [worker(*options, url=broker.url) for _ in range(2)]
    send(broker, queue, "bad, so that the dead-letter queue is made")
    waiting, delay = {}, 15  # seconds
    # Several of the kind that QUEUE.retry can lose, if it isn't declared as it should be.
    urls = {"classic": vhosts["classic"], **{f"quorum-{n}": vhosts["quorum"] for n in range(4)}}
    for kind, url in urls.items():
        options = ["-q", f"{queue}-{kind}", "--retry-delay", str(delay), "--time-limit", "0.001"]
        waiting[kind] = worker(*options, url=url)
        send(url, f"{queue}-{kind}", "so that the retry queue is made.")
        waiting[kind].wait_for("Failed")
    wait_until(lambda: broker.ready(f"{queue}.dlq"))
    broker.settle()
    due = [f"task {number}." for number in range(40)]
    for kind, url in urls.items():
        send(url, f"{queue}-{kind}", *due)
    for each in waiting.values():
        each.wait_for("Failed", times=1 + len(due))
        each.signal(signal.SIGTERM)  # so that what comes back stays in the queue
        assert each.wait() == 0

    all_due = time.monotonic() + delay

    # The broker is killed with tasks in hand, and comes back when others have become due.
    tasks = [f"{kind} {number}" for number in range(300) for kind in ("good", "bad")]
    send(broker, queue, *tasks)
    wait_until(lambda: begun.read_text().count("\n") > 50)
    assert all(broker.ready(f"{queue}-{kind}.retry", url) for kind, url in urls.items())
    broker.kill()
    time.sleep(max(0, all_due - time.monotonic()))
    broker.start()
    wait_until(lambda: begun.read_text().count("\n") > 300)
    broker.kill()
    broker.start()

    # All that failed is there, and nothing else.
    wait_until(lambda: set(tasks) <= set(begun.read_text().splitlines()))
    for each in busy:
        each.signal(signal.SIGTERM)
        assert each.wait() == 0
    assert broker.ready(queue) == 0
    letters = {body.decode() for body in broker.bodies(f"{queue}.dlq")}
    assert {task for task in tasks if task.startswith("bad")} <= letters
    assert not any(letter.startswith("good") for letter in letters)
    for kind, url in urls.items():
        back = set()

        def all_back(name=f"{queue}-{kind}", url=url, back=back):
            back.update(body.decode() for body in broker.bodies(name, url))
            return set(due) <= back

        wait_until(all_back)


def test_a_worker_killed_at_any_moment_leaves_a_failed_task_in_one_queue_or_in_two(
    broker, vhosts, worker, send, queue, moments
):
    tasks = [f"task {number}." for number in range(1500)]
    destinations = {"retry": ("1", vhosts["classic"]), "dlq": ("0", vhosts["quorum"])}
    for suffix, (_, url) in destinations.items():
        send(url, f"{queue}-{suffix}", *tasks)

    kills = 12  # of two workers each
    for _ in range(kills):
        workers = []
        for suffix, (retries, url) in destinations.items():
            options = ["--time-limit", "0.001", "--retries", retries, "--retry-delay", "600"]
            workers.append(worker("-q", f"{queue}-{suffix}", *options, url=url))
        for each in workers:
            each.wait_for("Failed", times=moments.randint(2, 4))
            time.sleep(moments.uniform(0, 0.03))
            each.signal(signal.SIGKILL)
        for each in workers:
            assert each.wait() == -signal.SIGKILL

    for suffix, (_, url) in destinations.items():
        names = [f"{queue}-{suffix}", f"{queue}-{suffix}.{suffix}"]
        found = {name: [] for name in names}

        def all_there(url=url, found=found):  # the last one is given back a little later
            for name, bodies in found.items():
                bodies += map(bytes.decode, broker.bodies(name, url))
            return set().union(*found.values()) == set(tasks)

        wait_until(all_there)
        copies = found[names[1]]
        print(len(copies), sum(map(len, found.values())) - len(tasks))
        assert len(copies) > kills
        assert sum(map(len, found.values())) <= len(tasks) + kills


@pytest.fixture
def killed(worker, vhosts):
    """Start a worker of quorum queues that is killed by its task: killed("-p", "10")."""

    def start(*arguments):
        script = worker(*arguments, *POISON, url=vhosts["quorum"])
        assert script.wait() == -signal.SIGKILL
        return script

    return start


def test_a_task_that_kills_its_worker_is_a_dead_letter_before_the_broker_drops_it(
    broker, vhosts, worker, killed, send, queue
):
    url = vhosts["quorum"]
    send(url, queue, "poison", "behind it")
    for _ in range(MAX_DELIVERIES):
        assert killed().tasks("Received") == ["poison"]
    last = worker(*POISON, url=url)
    last.wait_for("Done")
    assert last.tasks("Received") == ["poison", "behind it"]
    failure = f"delivered {MAX_DELIVERIES} times, never finished"
    assert f"Failed: {failure}" in last.out[2]
    properties, body = take(broker, f"{queue}.dlq", url)
    assert body == b"poison"
    assert properties.headers == {"x-retry-count": 0, "x-last-error": failure}


def test_after_15_deliveries_tasks_that_were_never_begun_are_dead_letters_too(
    broker, vhosts, worker, killed, send, queue
):
    url = vhosts["quorum"]
    innocent = [f"innocent {number}" for number in range(3)]
    send(url, f"{queue}-killed", "poison", *innocent)
    tasks = [f"task {number}" for number in range(60)]
    send(url, f"{queue}-stopped", *tasks)

    # As many crashes as stops, each with all tasks prefetched.
    options = ["--prefetch-count", "100"]
    done = []
    for _ in range(MAX_DELIVERIES):
        stopped = worker("-q", f"{queue}-stopped", *options, "sleep", "0.2", url=url)
        stopped.wait_for("Received")
        stopped.signal(signal.SIGTERM)
        assert killed("-q", f"{queue}-killed", *options).tasks("Received") == ["poison"]
        assert stopped.wait() == 0
        assert stopped.err == []
        assert not any("Failed" in line for line in stopped.out)
        done += stopped.tasks("Received")

    # Crashes make dead letters of all that was prefetched; so do stops, before RabbitMQ 4.3.
    failure = f"Failed: delivered {MAX_DELIVERIES} times, never finished"
    after = worker("-q", f"{queue}-killed", *options, *POISON, url=url)
    after.wait_for(failure, times=1 + len(innocent))
    assert sorted(after.tasks("Received")) == sorted(["poison", *innocent])
    rest = worker("-q", f"{queue}-stopped", "true", url=url)
    counted = broker.version() < (4, 3)
    rest.wait_for(failure if counted else "Done", times=len(tasks) - len(done))
    assert sorted(done + rest.tasks("Received")) == sorted(tasks)
