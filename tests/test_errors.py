"""Both scripts: never a traceback, never a hang; one line says what happened."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from servers import free_port, wait_until

BOUND = 30  # seconds in which a script that can't work has ended

# Who may not do what: configure, write and read permission, as rabbitmqctl takes them.
USERS = {"reader": ("^$", "^$", ".*"), "writer": ("^$", ".*", "^$")}


@pytest.fixture(scope="module")
def users(broker):
    for user, permissions in USERS.items():
        broker.rabbitctl_output("add_user", user, "secret")
        broker.rabbitctl_output("set_permissions", user, *permissions)


@pytest.fixture(scope="module")
def answering():
    """The ports of a server that talks HTTP, and of one that says nothing."""

    def talk(server, answer):
        silent = []
        while True:
            client, _ = server.accept()
            silent.append(client)
            if answer:
                client.recv(100)
                client.sendall(answer)
                client.close()

    ports = []
    for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b""):
        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=talk, args=(server, answer), daemon=True).start()
        ports.append(server.getsockname()[1])
    return ports


def refused(script, *words):
    """Check that a script ends with exit status 1 and one line that holds the words."""
    assert script.wait(BOUND) == 1, script.out
    (line,) = script.err
    assert line.startswith(" [!] ")
    for word in words:
        assert word in line
    return line


def unreachable(broker, answering):
    http, silent = answering
    return {
        "nothing listening": (f"amqp://127.0.0.1:{free_port()}", "refused"),
        "host not found": ("amqp://host.invalid", "host.invalid"),
        "not an AMQP port": (f"amqp://127.0.0.1:{http}", "AMQP port"),
        "a silent peer": (f"amqp://127.0.0.1:{silent}?stack_timeout=1", "Timeout"),
        "no TLS port": (f"amqps://127.0.0.1:{broker.port}", "SSL"),
    }


def hopeless(broker):
    return {
        "wrong password": (broker.url_of(login="guest:wrong"), "password in the URL"),
        "unknown user": (broker.url_of(login="nobody:wrong"), "password in the URL"),
        "unknown virtual host": (broker.url_of(vhost="nowhere"), "virtual host in the URL"),
        "empty virtual host": (broker.url_of(vhost="/"), "virtual host in the URL"),
        "no access to the virtual host": (broker.url_of(login="guest:guest", vhost="no"), "vhost"),
    }


def test_the_producer_ends_at_once_if_the_broker_cannot_be_reached(run, broker, answering):
    cases = {**unreachable(broker, answering), **hopeless(broker)}
    producers = {name: run(url, "new_task.py", "-") for name, (url, _) in cases.items()}
    for name, producer in producers.items():
        refused(producer, cases[name][1], "tasks confirmed: 0")
        assert producer.out == []


def test_the_worker_ends_at_once_if_it_will_never_be_let_in(run, broker):
    cases = hopeless(broker)
    workers = {name: run(url, "worker.py") for name, (url, _) in cases.items()}
    for name, worker in workers.items():
        refused(worker, cases[name][1])


def test_the_worker_goes_on_trying_if_the_broker_cannot_be_reached(run, broker, answering):
    cases = unreachable(broker, answering)
    workers = {name: run(url, "worker.py") for name, (url, _) in cases.items()}
    for name, worker in workers.items():
        worker.wait_for("trying again in 1 s", timeout=BOUND)
        worker.wait_for("trying again in 2 s", timeout=BOUND)
        if name != "host not found":  # whose host is in the URL only
            assert cases[name][1] in worker.err[0]
        assert worker.process.poll() is None


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
@pytest.mark.parametrize("name", ["", "x" * 256, "two\nlines", b"\xff"])
def test_a_queue_name_that_no_queue_can_have_is_a_usage_error(run, broker, script, name):
    ended = run(broker, script, "--queue", name)
    assert ended.wait(BOUND) == 2
    (line,) = ended.err
    assert "--queue" in line


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_a_queue_name_that_the_broker_refuses_is_reported(run, broker, script):
    refused(run(broker, script, "--queue", "amq.reserved"), "reserved prefix")


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_a_queue_that_is_not_durable_is_refused(run, broker, queue, script):
    with broker.channel() as channel:
        channel.queue_declare(queue)
        channel.basic_publish("", queue, b"kept")
    refused(run(broker, script, "-q", queue), "'durable'", "--queue")
    assert broker.bodies(queue) == [b"kept"]


def test_a_queue_of_another_connection_alone_is_refused(run, broker, queue):
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True, exclusive=True)
        said = refused(run(broker, "new_task.py", "-q", queue), "RESOURCE_LOCKED")
        assert ";" not in said.partition("; tasks confirmed")[0]  # a hint would mislead
        worker = run(broker, "worker.py", "-q", queue)
        worker.wait_for("RESOURCE_LOCKED")
    worker.wait_for("Waiting")  # as soon as the other one is gone


def test_missing_permissions_are_reported(run, broker, queue, users):
    reader, writer = (broker.url_of(login=f"{user}:secret") for user in USERS)
    for script in ("new_task.py", "worker.py"):  # the queue is not there, nor may they make it
        refused(run(writer, script, "-q", queue), f"access to queue '{queue}'")
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True)
    refused(run(reader, "new_task.py", "-q", queue), "access to exchange")
    refused(run(writer, "worker.py", "-q", queue), f"access to queue '{queue}'")
    assert run(writer, "new_task.py", "-q", queue, "one").wait(BOUND) == 0
    run(reader, "worker.py", "-q", queue).wait_for("Done")


@pytest.mark.parametrize(
    ("setting", "normal"),
    [("set_disk_free_limit 1000000GB", "1MB"), ("set_vm_memory_high_watermark 0.0000001", "0.4")],
    ids=["disk", "memory"],
)
def test_an_alarm_ends_the_producer_and_leaves_the_worker_at_work(
    fragile_broker, run, queue, setting, normal
):
    command, value = setting.split()
    assert run(fragile_broker, "new_task.py", "-q", queue, "before").wait() == 0
    fragile_broker.rabbitctl_output(command, value)
    try:
        alarms = ["eval", "rabbit_alarm:get_alarms()."]
        wait_until(lambda: "resource_limit" in fragile_broker.rabbitctl_output(*alarms))
        producer = run(fragile_broker, "new_task.py", "-q", queue, "during")
        worker = run(fragile_broker, "worker.py", "-q", queue)
        worker.wait_for("Done")
        assert worker.tasks("Received") == ["before"]
        refused(producer, "short of memory or disk", "tasks confirmed: 0")
    finally:
        fragile_broker.rabbitctl_output(command, normal)


def test_a_full_queue_that_rejects_takes_what_fits(run, broker, queue):
    with broker.channel() as channel:
        limits = {"x-max-length": 3, "x-overflow": "reject-publish"}
        channel.queue_declare(queue, durable=True, arguments=limits)
    producer = run(broker, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
    producer.process.stdin.write(b"1\n2\n3\n4\n5\n")
    producer.process.stdin.close()
    refused(producer, "full, or deleted?", "tasks confirmed: 3, send the rest from line 4 on")
    assert producer.tasks("Sent") == ["1", "2", "3"]
    assert broker.bodies(queue) == [b"1", b"2", b"3"]


def test_a_body_over_the_brokers_limit_is_refused_by_its_line_and_how_it_begins(
    run, new_broker, queue
):
    strict = new_broker("max_message_size = 1000")
    producer = run(strict, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
    producer.process.stdin.write(b"small\n\n")
    producer.process.stdin.flush()
    producer.wait_for("Sent 'small'")
    producer.process.stdin.write(b"small, too\nlarge" + b"x" * 1001 + b"\nsmall again\n")
    producer.process.stdin.close()
    said = refused(producer, "Line 4, 'largexxx", "larger than configured max size")
    count = len(producer.out)
    assert f"tasks confirmed: {count}, send the rest from line {count + 1 + (count > 1)} on" in said
    assert strict.bodies(queue)[:1] == [b"small"]


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", "| true"])
@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_a_closed_or_full_standard_output_is_no_traceback(run, broker, queue, script, redirection):
    url = {**os.environ, "AMQP_URL": broker.url}
    start = time.monotonic()
    command = f"timeout -s TERM 3 {sys.executable} {ROOT / script} -q {queue} {redirection}"
    ended = subprocess.run(command, shell=True, env=url, capture_output=True, timeout=BOUND)
    assert b"Traceback" not in ended.stderr
    assert b"Exception" not in ended.stderr
    lines = ended.stderr.splitlines()
    if script == "new_task.py" and redirection != ">&-":
        lost = [line for line in lines if b"tasks confirmed: 1" in line]
        assert len(lines) == len(lost)
        assert len(lost) == 1 or redirection == "| true"  # which may have ended after it, too
    else:
        assert len(lines) == (1 if "full" in redirection else 0)
    assert time.monotonic() - start < BOUND


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_help_that_cannot_be_written_is_no_traceback(script):
    command = f"{sys.executable} {ROOT / script} --help >/dev/full"
    ended = subprocess.run(command, shell=True, capture_output=True, timeout=BOUND)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert b"No space left" in line


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2> >(true)"])
def test_a_lost_standard_error_changes_nothing_else(broker, queue, redirection):
    script = f"{sys.executable} {ROOT / 'new_task.py'} -q {queue}"
    nowhere = f"amqp://127.0.0.1:{free_port()}"
    for url, status in ((broker.url, 0), (nowhere, 1)):
        ended = subprocess.run(
            ["bash", "-c", f"{script} {redirection}"],
            env={**os.environ, "AMQP_URL": url},
            stdout=subprocess.PIPE,
            timeout=BOUND,
        )
        assert ended.returncode == status
        assert ended.stdout == (b"" if status else b" [x] Sent 'Hello World!'\n")


def test_hints_name_both_ways_to_start_a_broker_and_a_port_without_tls(run, broker):
    nowhere = f"127.0.0.1:{free_port()}"
    producer = run(f"amqp://{nowhere}", "new_task.py")
    refused(producer, nowhere, "docker compose up", "systemctl start rabbitmq-server")
    refused(run(f"amqps://127.0.0.1:{broker.port}", "new_task.py"), "begins with amqp://")


def test_a_limit_on_connections_is_told_without_a_hint_at_the_virtual_host(run, broker):
    broker.rabbitctl_output("add_vhost", "narrow")
    broker.rabbitctl_output("set_permissions", "-p", "narrow", "guest", ".*", ".*", ".*")
    broker.rabbitctl_output("set_vhost_limits", "-p", "narrow", '{"max-connections": 0}')
    said = refused(run(broker.url_of(vhost="narrow"), "new_task.py"), "limit", "confirmed: 0")
    assert "in the URL" not in said


def test_a_closed_standard_input_is_a_usage_error(broker, queue):
    command = f"{sys.executable} {ROOT / 'new_task.py'} -q {queue} - <&-"
    url = {**os.environ, "AMQP_URL": broker.url}
    ended = subprocess.run(command, shell=True, env=url, capture_output=True, timeout=BOUND)
    assert ended.returncode == 2
    assert ended.stderr.count(b"\n") == 1
