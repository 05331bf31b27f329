"""Both scripts: wrong usage, and what can't work, is told in words that help; never a password."""

import shutil
import socket
import struct
import sys
import threading

import pytest
from conftest import EXEC, ROOT, Script, refused
from servers import free_port, wait_until

SCRIPTS = ["new_task.py", "worker.py"]
both_scripts = pytest.mark.parametrize("script", SCRIPTS)
TO_START = ("docker compose up -d --wait", "sudo systemctl start rabbitmq-server")

WRONG_USAGE = [  # arguments, and what is said about them
    ("new_task.py", "--unknown"),
    ("new_task.py", "-u"),
    *((script, "-u", url) for script in SCRIPTS for url in ("http://localhost", "localhost:5672")),
    *((script, "--queue", name) for script in SCRIPTS for name in ("", "two\nlines", b"\xff")),
    *((script, "--queue", "x" * 246) for script in SCRIPTS),  # .dlq.retry would not fit
    ("worker.py", "--unknown"),
    *(("worker.py", "--prefetch-count", value) for value in ("-1", "65536", "many")),
    *(("worker.py", "--retries", value) for value in ("-1", "1.5")),
    *(("worker.py", "--retry-delay", value) for value in ("-1", "4294968", "nan")),
    *(("worker.py", "--time-limit", value) for value in ("0", "soon", "nan")),
    ("worker.py", "--retry", "5"),  # of --retries or of --retry-delay?
    # Such a worker would sleep, and acknowledge the tasks that it should work on.
    ("worker.py", "--function", ""),
    ("worker.py", "--function="),
    ("worker.py", "--"),
    ("worker.py", "-p", "5", "--"),
]

SECRETS = ("s3cr3t", "987654", "t0ken")  # no piece of any password may be printed
URLS = [
    "amqp://guest:s3cr3t@127.0.0.1:1",  # nothing listening
    "amqp://guest:s3cr3t@127.0.0.1:{port}",  # wrong
    "amqp://guest:s3cr3t@127.0.0.1:{port}/t",  # unknown virtual host
    "amqp://guest:s3cr3t/t0ken@127.0.0.1:{port}",  # special characters in it
    "amqp://guest:987654/t0ken@127.0.0.1",
    "amqp://guest:s3cr3t?t0ken@127.0.0.1",
    "amqp://guest:987654?heartbeat=t0ken@127.0.0.1",
    "amqp://guest:987654#t0ken@127.0.0.1",
    "amqp://guest:987654@s3cr3t@127.0.0.1:1",
    "amqp://guest:987654@s3cr3t/t0ken@127.0.0.1",
    "amqp://guest:s3cr3t:t0ken@127.0.0.1:1",
    "amqp://guest:s3cr3t,t0ken@127.0.0.1:1",
    "amqp://guest:s3cr3t%zzt0ken@127.0.0.1:1",
    "amqp://guest:s3cr3t@127.0.0.1:port",  # a wrong port
    "amqp://guest:s3cr3t@127.0.0.1:99999",
    "amqp://guest:s3cr3t@127.0.0.1?heartbeat=t0ken",  # wrong settings
    "amqp://guest:s3cr3t@127.0.0.1?t0ken=1",
    "amqp://guest:s3cr3t@[::1",  # wrong hosts
    "amqp://guest:s3cr3t@a..b:1",
    "https://guest:s3cr3t@127.0.0.1",  # wrong schemes
    "guest:s3cr3t@127.0.0.1",
    "s3cr3t",
    "amqp://s3cr3t@127.0.0.1",
    "amqp://guest:s3cr3t@127.0.0.1:1,amqp://guest:t0ken@h:x",  # a good one and a wrong one
    "amqps://guest:s3cr3t@127.0.0.1?ssl_options={{'certfile':'/n','password':'t0ken'}}",
]


@pytest.fixture(scope="module")
def answering():
    """The ports of servers: one talks HTTP, one says nothing, one resets every connection."""
    ports = []
    for answer in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None):

        def talk(server, answer):
            silent = []
            while True:
                client, _ = server.accept()
                silent.append(client)
                if answer is None:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.close()
                elif answer:
                    client.recv(100)
                    client.sendall(answer)
                    client.close()

        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=talk, args=(server, answer), daemon=True).start()
        ports.append(server.getsockname()[1])
    return ports


@pytest.fixture(scope="module")
def users(broker):
    """URLs of users who may only read or write, by name."""
    for name, rights in {"reader": ("^$", "^$", ".*"), "writer": ("^$", ".*", "^$")}.items():
        broker.rabbitctl_output("add_user", name, "secret")
        broker.rabbitctl_output("set_permissions", name, *rights)
    return {name: broker.url_of(login=f"{name}:secret") for name in ("reader", "writer")}


# ---- Wrong usage ----


def test_wrong_usage_is_told_with_the_usage_line_and_status_2(run, broker):
    for arguments, ended in [(each, run(broker, *each)) for each in WRONG_USAGE]:
        assert ended.wait() == 2, arguments
        assert ended.err[0].startswith(f"usage: {arguments[0]} ")
        assert f"{arguments[0]}: error: " in ended.err[-1]
        assert arguments[1].strip("-=") in ended.err[-1], arguments
        assert ended.out == []


def test_a_closed_standard_input_is_told(run, broker, queue):
    script = f"exec {sys.executable} {ROOT / 'new_task.py'} -q {queue} - <&-"
    ended = run(broker, *EXEC, "sh", "-c", script)
    refused(ended, "standard input", "resume from line 1")


def test_the_bounds_of_values_are_accepted(run, broker, worker):
    worker("--prefetch-count", "0", "--retries", "0", "--retry-delay", "0")
    worker("--prefetch-count", "65535", "--retry-delay", "4294967", "--time-limit", "0.1")
    run(broker, "worker.py", "-q", "x" * 245).wait_for("Waiting")
    assert run(broker, "new_task.py", "-q", "x" * 245).wait() == 0


@both_scripts
def test_help_shows_examples_options_and_defaults_but_no_url(run, script):
    helped = run("amqp://guest:s3cr3t@127.0.0.1", script, "-h")
    assert helped.wait() == 0
    text = " ".join(" ".join(helped.out).split())
    assert text.count(f" {script} ") >= 3
    assert "--url" in text
    assert "AMQP_URL" in text
    assert "s3cr3t" not in text
    assert "default: task_queue" in text
    if script == "worker.py":
        for option in ("--prefetch-count", "--retries", "--retry-delay", "--time-limit"):
            assert option in text


def test_the_defaults_are_three_retries_after_30_seconds_each(broker, queue, worker, publish):
    publish(b"task")
    failing = worker("false")
    for tries in (1, 2, 3):
        failing.wait_for("retrying in 30 s", times=tries)
        wait_until(lambda: broker.ready(f"{queue}.retry") == 1)
        with broker.channel() as channel:
            _, properties, body = channel.basic_get(f"{queue}.retry", auto_ack=True)
            assert properties.headers["x-retry-count"] == tries
            assert properties.expiration == "30000"
            # So that the test need not wait for it.
            properties.expiration = None
            channel.basic_publish("", queue, body, properties)
    failing.wait_for(f"moved to {queue}.dlq")


def test_the_option_goes_before_the_environment_and_several_urls_are_tried_in_order(
    run, broker, queue
):
    nowhere = f"amqp://127.0.0.1:{free_port()}"
    assert run(nowhere, "new_task.py", "-u", broker.url, "-q", queue).wait() == 0
    run(f"{nowhere},{broker.url}", "worker.py", "-q", queue).wait_for("Done")
    # A node whose name can't be resolved, as if it were gone, is no reason to stop there.
    urls = f" amqp://host.invalid, {nowhere} ,{broker.url} "
    assert run(urls, "new_task.py", "-q", queue).wait() == 0
    run(urls, "worker.py", "-q", queue).wait_for("Waiting")


@both_scripts
def test_a_script_works_alone_in_another_folder(broker, queue, tmp_path, script):
    folder = tmp_path / "\udcff"  # not even its name is UTF-8
    folder.mkdir()
    shutil.copy(ROOT / script, folder)
    alone = Script([folder / script, "-q", queue], broker.url)
    try:
        alone.wait_for("Sent" if script == "new_task.py" else "Waiting")
    finally:
        alone.end()


# ---- Passwords ----


def no_secret_in(scripts):
    for script in scripts:
        wait_until(lambda script=script: script.err or script.process.poll() is not None)
        if "reconnecting" not in "".join(script.err):
            assert script.wait() in (1, 2)
        printed = "\n".join(script.out + script.err)
        assert not any(secret in printed for secret in SECRETS), printed


def test_no_password_is_printed_for_any_failing_url(run, broker):
    urls = [url.format(port=broker.port) for url in URLS]
    started = [run(url, SCRIPTS[number % 2]) for number, url in enumerate(urls)]
    # The same for the other script, by the option.
    started += [run("", SCRIPTS[number % 2 - 1], "-u", url) for number, url in enumerate(urls)]
    no_secret_in(started)


@both_scripts
def test_no_password_is_printed_for_an_invalid_value(run, script):
    mistaken = ["--url={},", "-u {}@", "--queue={}\n"]
    if script == "worker.py":
        mistaken += ["-p{}", "--retries {}", "--time-limit={}", "--retry-delay={}"]
    no_secret_in([run("", script, *each.format(URLS[0]).split(" ")) for each in mistaken])


# ---- The broker ----


def unreachable(broker, answering):
    http, silent, _ = answering
    nowhere = f"127.0.0.1:{free_port()}"
    return {
        f"amqp://{nowhere}": ["Connection refused", *TO_START],
        "amqp://host.invalid": [],
        f"amqp://127.0.0.1:{http}": ["AMQP port", "amqps://"],
        f"amqp://127.0.0.1:{silent}?stack_timeout=1": ["Timeout"],
        f"amqps://127.0.0.1:{broker.port}": ["SSL", "amqp://"],
    }


def hopeless(broker):
    return {
        broker.url_of(login="guest:wrong"): ["password in the URL"],
        broker.url_of(login="nobody:wrong"): ["password in the URL"],
        broker.url_of(vhost="nowhere"): ["virtual host in the URL"],
        broker.url_of(vhost="/"): ["virtual host in the URL"],  # that is, an empty one
    }


def test_a_producer_that_can_not_connect_ends_at_once(run, broker, answering):
    cases = {**unreachable(broker, answering), **hopeless(broker)}
    for url, producer in {url: run(url, "new_task.py", "-") for url in cases}.items():
        refused(producer, *cases[url], "0 tasks confirmed; resume from line 1")
        assert len(producer.err) == 2
        assert producer.out == []


def test_a_worker_that_will_never_be_let_in_ends_at_once(run, broker):
    cases = hopeless(broker)
    for url, worker in {url: run(url, "worker.py") for url in cases}.items():
        refused(worker, *cases[url])
        assert len(worker.err) == 1


def test_a_worker_waits_for_a_broker(run, broker, answering):
    cases = unreachable(broker, answering)
    for url, worker in {url: run(url, "worker.py") for url in cases}.items():
        first, second = (worker.wait_for("reconnecting in 3 s", times=each) for each in (1, 2))
        assert second - first > 2.9  # the lines come through a pipe
        assert all(word in worker.err[0] for word in cases[url]), worker.err
        assert worker.process.poll() is None


def test_a_peer_that_resets_every_connection_is_told(run, answering):
    # Many, as each reset may strike at another line of pika's.
    url = f"amqp://127.0.0.1:{answering[2]}"
    producers = [run(url, "new_task.py") for _ in range(20)]
    workers = [run(url, "worker.py") for _ in range(5)]
    for producer in producers:
        refused(producer)
        assert len(producer.err) == 1
    for worker in workers:
        worker.wait_for("reconnecting", times=3)


def test_a_worker_that_was_let_in_once_waits_to_be_let_in_again(run, broker, queue):
    broker.rabbitctl_output("add_user", "moody", "secret")
    broker.rabbitctl_output("set_permissions", "moody", ".*", ".*", ".*")
    worker = run(broker.url_of(login="moody:secret"), "worker.py", "-q", queue)
    worker.wait_for("Waiting")
    broker.rabbitctl_output("change_password", "moody", "another")
    broker.rabbitctl_output("close_all_connections", "maintenance")
    worker.wait_for("check the user name")
    broker.rabbitctl_output("change_password", "moody", "secret")
    worker.wait_for("Waiting", times=2)


# ---- The queue ----


@both_scripts
def test_a_stream_is_refused(run, broker, queue, script):
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "stream"})
    refused(run(broker, script, "-q", queue), "stream", "--queue")
    with broker.channel() as channel:  # a queue of this name is used
        channel.queue_declare("stream", durable=True, arguments={"x-max-priority": 5})
    used = run(broker, script, "-q", "stream")
    used.wait_for("Sent" if script == "new_task.py" else "Waiting")


@both_scripts
def test_a_queue_that_can_not_be_used_is_refused(run, broker, queue, script):
    with broker.channel() as channel:
        channel.queue_declare(queue)
        channel.basic_publish("", queue, b"kept")
    refused(run(broker, script, "-q", queue), "'durable'", "--queue")
    assert broker.bodies(queue) == [b"kept"]


def test_a_queue_that_another_connection_has_for_itself_is_waited_for_by_a_worker(
    run, broker, queue
):
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True, exclusive=True)
        refused(run(broker, "new_task.py", "-q", queue), "RESOURCE_LOCKED")
        worker = run(broker, "worker.py", "-q", queue)
        worker.wait_for("reconnecting")
        assert "RESOURCE_LOCKED" in worker.err[0]
    worker.wait_for("Waiting")


def test_a_permission_that_is_missing_is_told(run, broker, queue, users):
    # The queue is not there, nor may they make it: a worker waits until somebody has made it.
    refused(run(users["writer"], "new_task.py", "-q", queue), "NOT_FOUND", f"no queue '{queue}'")
    waiting = run(users["reader"], "worker.py", "-q", queue)
    waiting.wait_for("NOT_FOUND")
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True)
    waiting.wait_for("Waiting")
    refused(run(users["reader"], "new_task.py", "-q", queue), "access to exchange")
    refused(run(users["writer"], "worker.py", "-q", queue), f"access to queue '{queue}'")
