"""`new_task.py -`: a task is called sent once the broker has it, and no other task is."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys

import pexpect
import pytest
from conftest import ROOT
from servers import PATIENCE, wait_until

# As input: task n is on line n, every tenth line is blank. The first part fits into a pipe.
LINES = [b"" if number % 10 == 0 else b"%d" % number for number in range(1, 10_001)]
TASKS = [line for line in LINES if line]
BEFORE, AFTER = LINES[:9_000], LINES[9_000:]


@pytest.fixture
def producer(run, queue):
    """Start `new_task.py -`, to be fed with write()."""

    def start(broker, queue=queue, url=None, **options):
        options = {"stdin": subprocess.PIPE, **options}
        return run(broker, "new_task.py", "-q", queue, "-", url=url, **options)

    return start


@pytest.fixture
def alarm(fragile_broker):
    """Switch the broker's disk alarm on or off; it is off at the end."""

    def switch(on):
        limit = "1000000GB" if on else "1MB"
        fragile_broker.rabbitctl_output("set_disk_free_limit", limit)
        alarms = ["eval", "rabbit_alarm:get_alarms()."]
        wait_until(lambda: ("disk" in fragile_broker.rabbitctl_output(*alarms)) == on)

    yield switch
    switch(False)


def write(producer, *lines, end=False):
    producer.process.stdin.write(b"".join(line + b"\n" for line in lines))
    producer.process.stdin.flush()
    if end:
        producer.process.stdin.close()


def sent(producer):
    return [task.encode() for task in producer.tasks("Sent")]


def counted(said):
    """How many tasks were confirmed, and the line from which to go on, by what was said."""
    confirmed, line = re.search(r"confirmed: (\d+), .* line (\d+) on", said).groups()
    return int(confirmed), int(line)


def rest(producer, lines):
    """The lines that a producer, on its last line of diagnostics, says to send again."""
    confirmed, line = counted(producer.err[-1])
    assert confirmed == len(producer.out)
    return lines[line - 1 :]


def take(broker, queue):
    """Take every message out of a queue; return their bodies."""
    with broker.channel() as channel:
        count = channel.queue_declare(queue, passive=True).method.message_count
        messages = channel.consume(queue, auto_ack=True)
        return [body for _, (_, _, body) in zip(range(count), messages)]


def without_repetitions(tasks):
    return list(dict.fromkeys(tasks))


def test_every_task_is_in_the_queue_and_printed_once_in_order(broker, queue, producer, tmp_path):
    (tmp_path / "tasks").write_bytes(b"\n".join(LINES))
    with open(tmp_path / "tasks", "rb") as lines:
        ours = producer(broker, stdin=lines)
    assert ours.wait() == 0, ours.err
    assert take(broker, queue) == TASKS
    assert sent(ours) == TASKS
    assert len(ours.out) == len(TASKS)
    assert ours.err == []


def test_a_line_is_sent_before_the_next_one_is_written(broker, queue, producer):
    ours = producer(broker)
    write(ours, b"one")
    ours.wait_for("Sent 'one'")
    write(ours, b"two", end=True)
    assert ours.wait() == 0, ours.err
    assert sent(ours) == broker.bodies(queue) == [b"one", b"two"]


def test_blank_lines_are_no_tasks_and_a_last_line_needs_no_end(broker, queue, producer):
    ours = producer(broker)
    ours.process.stdin.write(b"\n  \none\n\r\n\t\ntwo")
    ours.process.stdin.close()
    assert ours.wait() == 0, ours.err
    assert sent(ours) == broker.bodies(queue) == [b"one", b"two"]


def test_a_terminal_that_does_not_show_the_tasks_shows_their_number(broker, queue, tmp_path):
    (tmp_path / "tasks").write_bytes(b"\n".join(LINES))
    script = f"{sys.executable} {ROOT / 'new_task.py'} -q {queue}"
    command = f"{script} - < {tmp_path / 'tasks'} > {tmp_path / 'sent.log'}"
    environment = {**os.environ, "AMQP_URL": broker.url}
    shown, status = pexpect.run(
        f"sh -c '{command}'", env=environment, timeout=PATIENCE, withexitstatus=True
    )
    assert status == 0
    *_, last = shown.decode().split("\r [x] Sent ")
    assert last == f"{len(TASKS)}\r\n"
    assert len((tmp_path / "sent.log").read_text().splitlines()) == len(TASKS)


def test_no_input_sends_nothing(broker, queue, producer):
    ours = producer(broker, stdin=subprocess.DEVNULL)
    assert ours.wait() == 0, ours.err
    assert ours.out + ours.err == broker.bodies(queue) == []


def test_a_reader_of_its_output_that_goes_away_ends_it_with_the_count(
    broker, queue, producer, tmp_path
):
    (tmp_path / "tasks").write_bytes(b"\n".join(LINES))
    head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with open(tmp_path / "tasks", "rb") as lines, head:
        ours = producer(broker, stdin=lines, stdout=head.stdin)
        head.stdin.close()
        assert head.stdout.read() == b" [x] Sent '1'\n"
    assert ours.wait() == 1
    (line,) = ours.err
    count, next_line = counted(line)
    assert "standard output" in line
    assert take(broker, queue)[:count] == [line for line in LINES[: next_line - 1] if line]


def test_a_full_disk_under_its_output_ends_it_with_the_count(broker, queue, producer):
    with open("/dev/full", "wb") as full:
        ours = producer(broker, stdout=full)
    write(ours, b"one")
    assert ours.wait() == 1
    (line,) = ours.err
    assert "No space left" in line
    assert counted(line) == (1, 2)
    assert broker.bodies(queue) == [b"one"]


@pytest.fixture(params=["pipe", "terminal"])
def pausing_reader(request):
    """The two ends of an output whose reader pauses at first, and what makes it go on."""
    if request.param == "pipe":
        reading, output = os.pipe()
    else:
        reading, output = pty.openpty()
        os.write(reading, b"\x13")  # CTRL+S
        wait_until(lambda: not select.select([], [output], [], 0)[1])

    def read():
        if request.param == "terminal":
            os.write(reading, b"\x11")  # CTRL+Q
        printed = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while more := os.read(reading, 65536):
                printed += more
        return printed

    yield output, read
    os.close(reading)


def test_a_reader_of_its_output_that_pauses_for_ten_heartbeats_costs_nothing(
    broker, queue, producer, pausing_reader, tmp_path
):
    (tmp_path / "tasks").write_bytes(b"\n".join(LINES))
    output, read = pausing_reader
    url = broker.url_of(query="?heartbeat=1")
    with open(tmp_path / "tasks", "rb") as lines:
        ours = producer(broker, url=url, stdin=lines, stdout=output)
    os.close(output)
    with pytest.raises(subprocess.TimeoutExpired):  # for nobody reads
        ours.process.wait(10)
    words = [[b"[x]", b"Sent", b"'%s'" % task] for task in TASKS]
    assert read().split() == [word for line in words for word in line]
    assert ours.wait() == 0
    assert ours.err == []
    assert take(broker, queue) == TASKS


def test_a_connection_lost_between_two_lines_is_made_anew(fragile_broker, queue, producer):
    ours = producer(fragile_broker)
    write(ours, b"one")
    ours.wait_for("Sent 'one'")
    fragile_broker.rabbitctl_output("close_all_connections", "maintenance")
    ours.wait_for("Connection lost")
    write(ours, b"two", end=True)
    assert ours.wait() == 0, ours.err
    assert sent(ours) == fragile_broker.bodies(queue) == [b"one", b"two"]


def test_nothing_is_called_sent_while_the_broker_is_short_of_disk(
    fragile_broker, queue, producer, alarm
):
    ours = producer(
        fragile_broker, url=fragile_broker.url_of(query="?blocked_connection_timeout=60")
    )
    write(ours, b"one")
    ours.wait_for("Sent 'one'")
    alarm(True)
    write(ours, b"two", end=True)
    states = ["list_connections", "state"]
    wait_until(lambda: "blocked" in fragile_broker.rabbitctl_output(*states))  # by a task
    assert sent(ours) == [b"one"]
    alarm(False)
    assert ours.wait() == 0, ours.err
    assert sent(ours) == fragile_broker.bodies(queue) == [b"one", b"two"]


def test_a_broker_that_stays_short_of_disk_is_given_up(fragile_broker, queue, producer, alarm):
    lines = [b"one", b"", b"two", b"three"]
    ours = producer(
        fragile_broker, url=fragile_broker.url_of(query="?blocked_connection_timeout=1")
    )
    write(ours, *lines[:2])
    ours.wait_for("Sent 'one'")
    alarm(True)
    write(ours, *lines[2:])
    assert ours.wait() == 1
    assert sent(ours) == [b"one"]
    assert "disk" in ours.err[0]
    alarm(False)
    again = producer(fragile_broker)
    write(again, *rest(ours, lines), end=True)
    assert again.wait() == 0, again.err
    assert without_repetitions(fragile_broker.bodies(queue)) == [b"one", b"two", b"three"]


def test_a_full_queue_is_given_up_and_the_rest_can_be_sent_when_there_is_room(
    broker, queue, producer
):
    with broker.channel() as channel:
        limit = {"x-max-length": 4_000, "x-overflow": "reject-publish"}
        channel.queue_declare(queue, durable=True, arguments=limit)
    lines, taken = LINES, []
    while lines:
        ours = producer(broker)
        write(ours, *lines, end=True)
        status = ours.wait()
        taken += take(broker, queue)
        assert taken[-len(ours.out) :] == sent(ours)
        if status:
            assert status == 1
            assert "full" in ours.err[0]
        lines = rest(ours, lines) if status else []
    assert taken == TASKS


def test_a_queue_deleted_in_mid_stream_is_reported(broker, queue, producer):
    lines = [b"one", b"", b"two"]
    ours = producer(broker)
    write(ours, b"one", b"")
    ours.wait_for("Sent 'one'")
    with broker.channel() as channel:
        channel.queue_delete(queue)
    write(ours, b"two")
    assert ours.wait() == 1
    assert sent(ours) == [b"one"]
    assert "no queue" in ours.err[0]
    again = producer(broker)
    write(again, *rest(ours, lines), end=True)
    assert again.wait() == 0, again.err
    assert broker.bodies(queue) == [b"two"]


@pytest.fixture
def streaming(fragile_broker, queue, producer):
    """Producers that have sent some lines and wait for more, by their queues: of either type."""
    started = {}
    for queue_type in ("classic", "quorum"):
        name = f"{queue}-{queue_type}"
        with fragile_broker.channel() as channel:
            channel.queue_declare(name, durable=True, arguments={"x-queue-type": queue_type})
        started[name] = producer(fragile_broker, name)
    # RabbitMQ notes on disk with a delay of seconds that there is a new quorum queue. Killed
    # before, it starts that queue empty and for ever without a leader, whoever published.
    fragile_broker.rabbitctl_output("eval", "[dets:sync(Table) || Table <- dets:all()].")
    fragile_broker.settle()
    for ours in started.values():
        write(ours, *BEFORE)
    wait_until(lambda: all(len(ours.out) > 1000 for ours in started.values()))
    return started


def test_a_stream_goes_on_by_itself_when_a_killed_broker_is_back(fragile_broker, streaming):
    fragile_broker.kill()
    for ours in streaming.values():
        ours.wait_for("Connection lost")
        write(ours, *AFTER, end=True)
    fragile_broker.start()
    for queue, ours in streaming.items():
        assert ours.wait() == 0, ours.err
        assert sent(ours) == TASKS
        assert without_repetitions(take(fragile_broker, queue)) == TASKS


def test_a_stream_that_a_killed_broker_ended_can_be_sent_from_where_it_was(
    fragile_broker, producer, streaming
):
    fragile_broker.kill()
    for ours in streaming.values():
        ours.wait_for("Connection lost")
        ours.signal(signal.SIGINT)
        assert ours.wait() == 130
    fragile_broker.start()
    for queue, ours in streaming.items():
        again = producer(fragile_broker, queue)
        write(again, *rest(ours, LINES), end=True)
        assert again.wait() == 0, again.err
        taken = take(fragile_broker, queue)
        assert taken[: len(ours.out)] == sent(ours)
        assert without_repetitions(taken) == TASKS
