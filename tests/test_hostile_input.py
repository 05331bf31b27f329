"""Both scripts, whatever comes in: no traceback, no control character, every dot, every header.

Examples are made by hypothesis. A process a piece would take too long, so each example is a list.
"""

import datetime
import os
import re
import signal
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import pika
from conftest import ROOT, Script
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as some
from servers import wait_until

FEW = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # to shrink takes a process for every try
    suppress_health_check=list(HealthCheck),
)

BODIES = some.binary(max_size=300) | some.text(max_size=100).map(str.encode)
VALUES = some.recursive(
    some.none()
    | some.booleans()
    | some.integers(-(2**31), 2**63 - 1)  # pika 1.3 sends smaller ones as unsigned
    | some.text(max_size=50)
    | some.binary(max_size=50)
    | some.decimals(min_value=-20_000, max_value=20_000, places=4)
    | some.datetimes(
        datetime.datetime(1970, 1, 1),
        datetime.datetime(2100, 1, 1),
        timezones=some.just(datetime.timezone.utc),
    ).map(lambda moment: moment.replace(microsecond=0)),
    lambda inner: (
        some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=20), inner, max_size=4)
    ),
    max_leaves=8,
)
NAMES = some.text(max_size=60).filter(lambda name: not name.startswith("x-"))
ARGUMENTS = some.text(
    some.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=30
)


def harmless(lines):
    """Whether lines hold no traceback, and nothing that a terminal takes as a command."""
    characters = {character for line in lines for character in line}
    return not any(unicodedata.category(each) in ("Cc", "Cf") for each in characters) and not any(
        "Traceback" in line for line in lines
    )


def end(script):
    script.signal(signal.SIGTERM)
    assert script.wait() == 0
    assert harmless(script.out + script.err)


@FEW
@given(some.lists(BODIES, min_size=20, max_size=40))
def test_any_body_is_one_line_that_is_safe_on_a_terminal(broker, bodies):
    queue = "hostile-bodies"
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True)
        for body in bodies:
            channel.basic_publish("", queue, body.replace(b".", b","))
    worker = Script([ROOT / "worker.py", "-q", queue], broker.url)
    worker.wait_for("Done", times=len(bodies))
    end(worker)
    assert len(worker.out) == 1 + 2 * len(bodies)
    assert all(line.startswith(" [x] Received ") for line in worker.out[1::2])


@FEW
@given(some.lists(BODIES, min_size=10, max_size=20), some.lists(some.integers(0, 2), min_size=20))
def test_every_dot_is_a_second_and_nothing_else_is(broker, bodies, dots):
    queue = "hostile-dots"
    workers = [Script([ROOT / "worker.py", "-q", queue], broker.url) for _ in range(10)]
    for worker in workers:
        worker.wait_for("Waiting")
    wanted = {}
    with broker.channel() as channel:
        for number, (body, count) in enumerate(zip(bodies, dots)):
            body = b"%d " % number + body.replace(b".", b",")[:100] + count * b"."
            wanted[number] = count
            channel.basic_publish("", queue, body)
    wait_until(lambda: sum(worker.out.count(" [x] Done") for worker in workers) == len(wanted))
    for worker in workers:
        end(worker)
    for worker in workers:
        for line in range(1, len(worker.out), 2):
            number = int(re.search(r"\d+", worker.out[line])[0])
            took = worker.seen[id(worker.out), line + 1] - worker.seen[id(worker.out), line]
            assert round(took) == wanted.pop(number)
    assert wanted == {}


@FEW
@given(some.lists(some.dictionaries(NAMES, VALUES, max_size=6), min_size=20, max_size=40))
def test_headers_of_any_type_are_carried_through_a_retry_unchanged(broker, headers):
    queue = "hostile-headers"
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True)
        for number, each in enumerate(headers):
            properties = pika.BasicProperties(headers=each)
            channel.basic_publish("", queue, str(number), properties)
        # Pika 1.3 reads times without their zone.
        read = [channel.basic_get(queue)[1].headers for _ in headers]
    options = ["-q", queue, "--retries", "1", "--retry-delay", "0", "false"]
    worker = Script([ROOT / "worker.py", *options], broker.url)
    worker.wait_for(f"it goes to {queue}.dlq", times=len(headers))
    end(worker)
    with broker.channel() as channel:
        for _ in headers:
            _, properties, body = channel.basic_get(f"{queue}.dlq", auto_ack=True)
            reason = {"x-retry-count": 1, "x-last-error": "exit status 1"}
            assert properties.headers == {**read[int(body)], **reason}


def test_a_header_whose_name_is_not_utf_8_is_carried_too(broker, run, queue):
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True)
        channel.basic_publish("", queue, b"", pika.BasicProperties(headers={b"\xff": 1}))
    worker = run(broker, "worker.py", "-q", queue, "--retries", "0", "false")
    worker.wait_for("it goes to")
    end(worker)
    with broker.channel() as channel:
        assert channel.basic_get(f"{queue}.dlq")[1].headers[b"\xff"] == 1


@FEW
@given(some.lists(some.lists(ARGUMENTS, max_size=3), min_size=10, max_size=20))
def test_any_words_are_a_task_or_a_usage_error(broker, words):
    def send(arguments):
        return subprocess.run(
            [sys.executable, ROOT / "new_task.py", "-q", "hostile-words", *arguments],
            env={**os.environ, "AMQP_URL": broker.url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )

    with ThreadPoolExecutor(4) as pool:
        for arguments, ended in zip(words, pool.map(send, words)):
            assert harmless(ended.stdout.decode().splitlines() + ended.stderr.decode().splitlines())
            if arguments[:1] and arguments[0][:1] == "-":
                assert ended.returncode in (0, 2)
            else:
                assert ended.returncode == 0, ended.stderr
                assert ended.stdout.startswith(b" [x] Sent ")
    broker.bodies("hostile-words")


@FEW
@given(
    some.lists(ARGUMENTS, min_size=10, max_size=20),
    some.sampled_from(["", "amqp://", "amqps://127.0.0.1:1/"]),
)
def test_any_url_is_refused_in_one_line(broker, urls, scheme):
    def send(url):
        return subprocess.run(
            [sys.executable, ROOT / "new_task.py", "--url", f"{scheme}{url}", "task"],
            capture_output=True,
            timeout=60,
        )

    with ThreadPoolExecutor(4) as pool:
        for ended in pool.map(send, urls):
            lines = ended.stderr.decode().splitlines()
            assert harmless(lines)
            assert ended.returncode in (1, 2)
            assert len(lines) == 1
