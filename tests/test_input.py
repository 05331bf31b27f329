"""`new_task.py -`: whatever standard input is and does, no line is lost in silence."""

import os
import socket
import struct
import subprocess
import sys

import pytest
from conftest import ROOT
from servers import PATIENCE, wait_until


def test_input_that_is_non_blocking_is_read_to_its_end(run, broker, queue):
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    producer = run(broker, "new_task.py", "-q", queue, "-", stdin=reading)
    os.close(reading)
    os.write(writing, b"one\ntw")
    producer.wait_for("Sent 'one'")
    with pytest.raises(subprocess.TimeoutExpired):  # for half a line is no task yet
        producer.process.wait(1)
    os.write(writing, b"o\nthree")
    os.close(writing)
    assert producer.wait() == 0, producer.err
    assert producer.tasks("Sent") == ["one", "two", "three"]
    assert broker.bodies(queue) == [b"one", b"two", b"three"]


@pytest.mark.parametrize("megabytes", [220, 600])
def test_a_line_that_does_not_fit_into_memory_is_one_line_of_diagnostics(broker, queue, megabytes):
    line = f"head -c {megabytes}000000 /dev/zero | tr '\\0' x"
    script = f"{sys.executable} {ROOT / 'new_task.py'} -q {queue} -"
    ended = subprocess.run(
        f"(echo; echo one; {line}) | (ulimit -v 500000; exec {script})",
        shell=True,
        env={**os.environ, "AMQP_URL": broker.url},
        capture_output=True,
        timeout=PATIENCE,
        text=True,
    )
    assert ended.returncode == 1
    assert ended.stdout == " [x] Sent 'one'\n"
    (said,) = ended.stderr.splitlines()
    assert "MemoryError" in said
    assert "tasks confirmed: 1, send the rest from line 3 on" in said
    assert broker.bodies(queue) == [b"one"]


def test_after_a_read_error_what_was_published_is_still_waited_for(run, fragile_broker, queue):
    with socket.create_server(("127.0.0.1", 0)) as server:
        reading = socket.create_connection(server.getsockname())
        writing, _ = server.accept()
    url = fragile_broker.url_of(query="?blocked_connection_timeout=60")
    with reading:
        producer = run(url, "new_task.py", "-q", queue, "-", stdin=reading)
    writing.sendall(b"one\n")
    producer.wait_for("Sent 'one'")

    fragile_broker.rabbitctl_output("set_disk_free_limit", "1000000GB")
    try:
        alarms = ["eval", "rabbit_alarm:get_alarms()."]
        wait_until(lambda: "disk" in fragile_broker.rabbitctl_output(*alarms))
        writing.sendall(b"two\n")
        states = ["list_connections", "state"]
        wait_until(lambda: "blocked" in fragile_broker.rabbitctl_output(*states))  # by a task
        writing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writing.close()  # by a reset, which is a read error
        with pytest.raises(subprocess.TimeoutExpired):  # for it waits for the confirmation
            producer.process.wait(1)
    finally:
        fragile_broker.rabbitctl_output("set_disk_free_limit", "1MB")

    assert producer.wait() == 1
    assert producer.tasks("Sent") == ["one", "two"]
    (said,) = producer.err
    assert "Can't read standard input: ConnectionResetError" in said
    assert "tasks confirmed: 2, send the rest from line 3 on" in said
    assert fragile_broker.bodies(queue) == [b"one", b"two"]


def test_input_that_cannot_be_read_at_all_is_reported(run, broker, queue, tmp_path):
    with open(tmp_path / "only to write to", "wb") as unreadable:
        producer = run(broker, "new_task.py", "-q", queue, "-", stdin=unreadable)
    assert producer.wait() == 1
    (said,) = producer.err
    assert "Can't read standard input" in said
    assert "tasks confirmed: 0" in said
