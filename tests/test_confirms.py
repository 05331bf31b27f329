"""`new_task.py -`: what is called sent is the broker's, and the rest can be resumed from a line."""

import os
import re
import signal
import socket
import struct
import subprocess
import time

import pytest
from conftest import refused
from servers import accepts_connections, free_port, wait_until

# As input: task n is on line n, and every tenth line is blank. The first part fits into a pipe.
LINES = [b"" if number % 10 == 0 else b"%d" % number for number in range(1, 10_001)]
TASKS = [line for line in LINES if line]
BEFORE, AFTER = LINES[:9_000], LINES[9_000:]


@pytest.fixture
def network(run, broker):
    """Something between a producer and the broker, that can end: its URL, and its process."""
    port = free_port()
    process = run("", "tests/proxy.py", str(port), str(broker.port))
    wait_until(lambda: accepts_connections(port))
    return f"amqp://127.0.0.1:{port}", process


@pytest.fixture
def producer(run, queue):
    """Start `new_task.py -`, to be fed with write()."""

    def start(broker, queue=queue, stdin=subprocess.PIPE, **options):
        return run(broker, "new_task.py", "-q", queue, "-", stdin=stdin, **options)

    return start


def write(producer, *lines, end=False):
    producer.process.stdin.write(b"".join(line + b"\n" for line in lines))
    producer.process.stdin.flush()
    if end:
        producer.process.stdin.close()


def sent(producer):
    return [task.encode() for task in producer.tasks("Sent")]


def counted(producer):
    """What a producer says at its end: how many are confirmed, and the line to resume from."""
    words = r" \[!\] (\d+) tasks? confirmed; resume from line (\d+)"
    return map(int, re.fullmatch(words, producer.err[-1]).groups())


def rest(producer, lines=LINES):
    """The lines that a producer says to send again, which have to be right."""
    confirmed, line = counted(producer)
    done, left = lines[: line - 1], lines[line - 1 :]
    assert confirmed == len(producer.out)
    assert {task for task in done if task} <= set(sent(producer))
    assert next(task for task in left if task) not in sent(producer)
    return left


def take(broker, queue, url=None):
    """Take every message out of a queue; return their bodies, without repetitions."""
    with broker.channel(url) as channel:
        count = channel.queue_declare(queue, passive=True).method.message_count
        messages = channel.consume(queue, auto_ack=True)
        return list(dict.fromkeys(body for _, (_, _, body) in zip(range(count), messages)))


def limited(broker, queue, **limits):
    with broker.channel() as channel:
        arguments = {"x-queue-type": "classic", "x-overflow": "reject-publish", **limits}
        channel.queue_declare(queue, durable=True, arguments=arguments)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_every_line_is_in_the_queue_in_order_and_printed_once(
    broker, vhosts, queue, producer, queue_type
):
    url = vhosts[queue_type]
    ours = producer(url)
    write(ours, *LINES, end=True)
    assert ours.wait() == 0, ours.err
    assert broker.ready(queue, url) == len(ours.out) == len(TASKS)
    assert take(broker, queue, url) == TASKS
    assert set(sent(ours)) == set(TASKS)
    assert ours.err == []


def test_a_line_is_sent_before_the_next_one_is_written_and_never_in_pieces(broker, queue, producer):
    reading, writing = os.pipe()
    ours = producer(broker, stdin=reading)
    os.close(reading)
    # When a line comes with half of the next one, then that one's end, and a line without an end.
    os.write(writing, b"one\ntw")
    ours.wait_for("Sent 'one'")
    os.write(writing, b"o\n")
    ours.wait_for("Sent 'two'")
    os.write(writing, b"three")
    os.close(writing)
    # Then each is a task.
    assert ours.wait() == 0, ours.err
    assert ours.tasks("Sent") == ["one", "two", "three"]
    assert broker.bodies(queue) == [b"one", b"two", b"three"]


def test_blank_lines_are_no_tasks_and_no_task_is_no_error(broker, queue, producer):
    ours = producer(broker)
    write(ours, b"", b"  \r", b"\t", end=True)
    assert ours.wait() == 0
    assert ours.out + ours.err == broker.bodies(queue) == []


def test_tasks_that_a_full_queue_refuses_are_not_counted(broker, queue, producer):
    limited(broker, queue, **{"x-max-length": 5_000})
    ours = producer(broker)
    write(ours, *LINES, end=True)
    refused(ours, "full")
    assert sent(ours) == take(broker, queue) == TASKS[:5_000]

    # What comes from that line on is all that is missing.
    again = producer(broker)
    write(again, *rest(ours), end=True)
    assert again.wait() == 0, again.err
    assert take(broker, queue) == TASKS[5_000:]


def test_a_task_refused_before_others_were_confirmed_is_resumed_from(broker, queue, producer):
    limited(broker, queue, **{"x-max-length": 100})
    with broker.channel() as channel:
        taken = []
        ours = producer(broker)
        write(ours, *BEFORE)
        channel.basic_qos(prefetch_count=1)  # slower than the producer
        for method, _, body in channel.consume(queue, inactivity_timeout=0.1):
            if body:
                taken.append(body)
                channel.basic_ack(method.delivery_tag)
            elif ours.process.poll() is not None:
                break
    refused(ours, "full")
    rest(ours)
    assert sorted(taken) == sorted(sent(ours))


def test_a_queue_deleted_meanwhile_is_told_and_the_rest_can_be_sent(broker, queue, producer):
    lines = [b"one", b"", b"two", b"three"]
    ours = producer(broker)
    write(ours, b"one", b"")
    ours.wait_for("Sent 'one'")
    with broker.channel() as channel:
        channel.queue_delete(queue)
    write(ours, b"two", b"three")
    refused(ours, "deleted")
    again = producer(broker)
    write(again, *rest(ours, lines), end=True)
    assert again.wait() == 0, again.err
    assert broker.bodies(queue) == [b"two", b"three"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_the_count(broker, queue, producer, number):
    # Given one that waits for its input, and one in mid-stream.
    waiting, streaming = producer(broker), producer(broker, f"{queue}-stream")
    write(waiting, b"one", b"")
    waiting.wait_for("Sent 'one'")
    write(streaming, *BEFORE)
    wait_until(lambda: len(streaming.out) > 500)
    for ours in (waiting, streaming):
        ours.signal(number)
    assert waiting.wait() == streaming.wait() == 128 + number
    assert rest(waiting, [b"one", b"", b"two"])
    confirmed, line = counted(streaming)
    done = [task for task in LINES[: line - 1] if task]
    assert take(broker, f"{queue}-stream")[: len(done)] == done
    # The signal may come between a task's confirmation, its count, and its line.
    assert confirmed - len(streaming.out) in (0, 1)
    assert len(done) - len(streaming.out) in (0, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_at_its_end_changes_nothing(broker, producer, number):
    producers = [producer(broker) for _ in range(10)]
    for ours in producers:
        write(ours, b"one")
    for ours in producers:
        ours.wait_for("Sent 'one'")
        ours.signal(number)
        ours.wait_for("1 task confirmed")
        ours.signal(number)
    assert {ours.wait() for ours in producers} == {128 + number}
    assert all(line.startswith(" [!] ") for ours in producers for line in ours.err)


def test_input_that_cannot_be_read_any_more_ends_it_with_the_count(broker, queue, producer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        reading = socket.create_connection(server.getsockname())
        writing, _ = server.accept()
    with reading:
        ours = producer(broker, stdin=reading)
    writing.sendall(b"one\n\ntwo\nhalf a line")
    ours.wait_for("Sent 'two'")
    writing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writing.close()  # by a reset, which is a read error
    refused(ours, "Can't read standard input", "reset")
    assert rest(ours, [b"one", b"", b"two", b"half a line"]) == [b"half a line"]
    assert broker.bodies(queue) == [b"one", b"two"]


def test_input_that_does_not_block_is_told_and_not_taken_for_its_end(broker, queue, producer):
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.write(writing, b"one\ntw")
    ours = producer(broker, stdin=reading)
    os.close(reading)
    refused(ours, "Can't read standard input", "1 task confirmed; resume from line 2")
    os.close(writing)
    assert broker.bodies(queue) == [b"one"]


def test_input_that_cannot_be_read_at_all_is_told(broker, producer, tmp_path):
    with open(tmp_path / "only to write to", "wb") as unreadable:
        ours = producer(broker, stdin=unreadable)
    refused(ours, "Can't read standard input", "0 tasks confirmed; resume from line 1")


def test_nothing_is_called_sent_in_an_alarm_which_is_given_up_in_the_end(
    broker, queue, producer, run, alarm
):
    # Given a producer that waits long enough, one that waits as long as it does by itself, and
    # one that is started in the alarm.
    url = broker.url_of(query="?blocked_connection_timeout=120")
    patient, other = producer(url), producer(broker)
    for ours in (patient, other):
        write(ours, b"one", b"")
        ours.wait_for("Sent 'one'")
    broker.rabbitctl_output("set_vm_memory_high_watermark", "0.0000001")
    try:
        late = run(broker, "new_task.py", "-q", queue, "late")
        began = time.monotonic()
        for ours in (patient, other):
            write(ours, b"two", end=True)
        alarm(True)  # a broker that lacks disk space, too
    finally:
        broker.rabbitctl_output("set_vm_memory_high_watermark", "0.4")
    # When the alarm lasts, then two give up.
    for ours in (other, late):
        refused(ours, "memory or disk")
    assert rest(other, [b"one", b"", b"two"]) == [b"two"]
    assert len(late.err) == 1
    assert late.out == []
    # When it is over, then the third one goes on.
    assert sent(patient) == [b"one"]
    alarm(False)
    assert patient.wait() == 0, patient.err
    assert sent(patient) == [b"one", b"two"]
    if time.monotonic() - began < 30:  # later, it reconnects, as no answer came
        assert patient.err == []
    assert set(broker.bodies(queue)) >= {b"one", b"two"}


def test_a_connection_lost_after_the_last_confirmation_is_no_error(producer, network):
    url, process = network
    ours = producer(url)
    write(ours, b"one")
    ours.wait_for("Sent 'one'")
    process.end()
    ours.process.stdin.close()
    assert ours.wait() == 0, ours.err
    assert ours.err == []


def test_a_broker_that_falls_silent_is_given_up_with_the_count(producer, network):
    url, process = network
    ours = producer(url)
    write(ours, b"one")
    ours.wait_for("Sent 'one'")
    process.signal(signal.SIGSTOP)
    write(ours, b"two", end=True)
    assert ours.process.wait(100) == 1  # 30 s without an answer, 30 s of attempts, and the last one
    assert list(counted(ours)) == [1, 2]
    assert "Connection lost: TimeoutError: no answer" in ours.err[0]
    assert all(line.startswith(" [!] ") for line in ours.err)
    assert len(ours.err) == 3


@pytest.fixture
def disconnected(broker, queue, producer):
    """A producer that has lost its connection while it waited for input, and a limited queue."""

    def start(limit, url=None):
        limited(broker, queue, **{"x-max-length": limit})
        ours = producer(url or broker)
        write(ours, b"one")
        ours.wait_for("Sent 'one'")
        broker.rabbitctl_output("close_all_connections", "for a test")
        return ours

    return start


MORE_TASKS = [b"%0100d" % number for number in range(600)]  # they fit into a pipe


def test_until_a_new_connection_has_confirmed_its_batch_a_refusal_is_no_end(
    broker, queue, disconnected
):
    ours = disconnected(limit=100)
    # When it reads on, and the new connection confirms some of the tasks and refuses others,
    write(ours, *MORE_TASKS, end=True)
    ours.wait_for("reconnecting")
    ours.wait_for("Sent", times=100)
    with broker.channel() as channel:
        channel.queue_delete(queue)  # it declares one without a limit
    # then it tries again, and sends those that were refused.
    assert ours.wait() == 0, ours.err
    assert sent(ours) == [b"one", *MORE_TASKS]
    assert take(broker, queue) == sent(ours)[-len(MORE_TASKS) + 99 :]


def test_after_a_new_connection_has_confirmed_a_batch_a_refusal_is_the_end(disconnected):
    ours = disconnected(limit=2)
    write(ours, b"two")
    ours.wait_for("Sent 'two'")
    write(ours, b"three", end=True)
    refused(ours, "full", "2 tasks confirmed; resume from line 3")
    assert len(ours.err) == 2  # it did not try again


def test_after_a_refusal_by_a_new_connection_it_tries_the_next_node(
    broker, vhosts, queue, disconnected
):
    ours = disconnected(limit=1, url=f"{broker.url},{vhosts['quorum']}")
    write(ours, b"two", end=True)
    assert ours.wait() == 0, ours.err
    assert broker.bodies(queue, vhosts["quorum"]) == [b"two"]


def test_a_killed_broker_costs_no_task(broker, queue, producer, network):
    names = ["classic", "quorum", "interrupted", "terminated", "idle"]
    with broker.channel() as channel:
        for name in names:
            arguments = {"x-queue-type": "quorum" if name == "quorum" else "classic"}
            channel.queue_declare(f"{queue}-{name}", durable=True, arguments=arguments)
    # RabbitMQ notes on disk with a delay of seconds that there is a new quorum queue. Killed
    # before, it starts that queue empty and for ever without a leader, whoever published.
    broker.rabbitctl_output("eval", "[dets:sync(Table) || Table <- dets:all()].")

    # Given a producer whose broker is gone for good, and others in mid-stream, ...
    url, process = network
    gone = producer(url)
    write(gone, *BEFORE)
    wait_until(lambda: len(gone.out) > 500)
    process.end()
    write(gone, *AFTER)
    gone.wait_for("Connection lost")
    started = {name: producer(broker, f"{queue}-{name}") for name in names}
    *streams, idle = started.values()
    write(idle, b"one")
    idle.wait_for("Sent 'one'")
    broker.settle()
    for ours in streams:
        write(ours, *BEFORE)
    wait_until(lambda: all(len(ours.out) > 500 for ours in streams))
    # ... when the broker is killed, ...
    broker.kill()
    for ours in streams:
        write(ours, *AFTER, end=True)
        ours.wait_for("Connection lost")
    for name, number in (("interrupted", signal.SIGINT), ("terminated", signal.SIGTERM)):
        started[name].signal(number)
        assert started[name].wait() == 128 + number
    broker.start()

    # ... then those that were told to end can be resumed,
    for name in ("interrupted", "terminated"):
        again = producer(broker, f"{queue}-{name}")
        write(again, *rest(started[name]), end=True)
        assert again.wait() == 0, again.err
    # the others go on by themselves,
    for name in ("classic", "quorum"):
        assert started[name].wait() == 0, started[name].err
        assert sorted(sent(started[name])) == sorted(TASKS)
    for name in names[:4]:
        assert take(broker, f"{queue}-{name}") == TASKS
    # one that had nothing to do does not even mention it,
    write(idle, b"two", end=True)
    assert idle.wait() == 0, idle.err
    assert idle.err == []
    assert broker.bodies(f"{queue}-idle") == [b"one", b"two"]
    # and one that finds no broker for half a minute gives up.
    refused(gone, "Connection lost", "Connection refused")
    rest(gone)
    assert gone.wait_for("tasks confirmed") - gone.wait_for("Connection lost") > 29
