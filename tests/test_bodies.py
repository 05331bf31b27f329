"""Both scripts: any bytes are a task, arrive as they are, and are printed as one safe line."""

import datetime
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pika
from conftest import EXEC, ROOT, refused
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as some
from servers import wait_until

WORDS = [  # on the command line, and the task they make
    (["First", "message."], b"First message."),
    ([], b"Hello World!"),
    (["..."], b"..."),
    ([""], b"Hello World!"),
    (["two  spaces", "", "between"], b"two  spaces  between"),
    (["words", "--url", "-q", "--help"], b"words --url -q --help"),
    (["--", "--dry-run", "--", "-x"], b"--dry-run -- -x"),
    (["-", "is", "a", "dash"], b"- is a dash"),
    (["it's", '"quoted"', "`id`", "$HOME", "\\n"], b'it\'s "quoted" `id` $HOME \\n'),
    (["two\nlines\r\n"], b"two\nlines\r\n"),
    (["\x1b[2J"], b"\x1b[2J"),
    ([b"\xff", b"caf\xe9"], b"\xff caf\xe9"),
]

SHOWN = {  # tasks that can be lines of input, and how they are printed
    b"no dots": "'no dots'",
    b".": "'.'",
    b" spaces ": "' spaces '",
    b"carriage return\r": r"'carriage return\r'",
    b"it's": '''"it's"''',
    b"\x00": r"'\x00'",
    b"\x1b[2J": r"'\x1b[2J'",
    b"\x9b2J": r"'\udc9b2J'",
    b"\xff": r"'\udcff'",
    "🐇".encode(): "'🐇'",
    "\N{RIGHT-TO-LEFT OVERRIDE}".encode(): r"'\u202e'",
    "\N{LINE SEPARATOR}".encode(): r"'\u2028'",
}

BODIES = some.binary(max_size=300) | some.text(max_size=100).map(str.encode)
TEXT = some.text(
    some.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=30
)
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


def examples(strategy, number):
    """Let hypothesis make examples, for one process to take them all."""
    made = []

    @settings(
        max_examples=number,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def make(example):
        made.append(example)

    make()
    return made


def is_safe(line):
    return line.isprintable() and len(line) < 500


def in_parallel(function, arguments):
    with ThreadPoolExecutor(4) as pool:
        return list(zip(arguments, pool.map(function, arguments)))


def test_words_arrive_byte_for_byte_and_are_printed_safely(run, broker, queue):
    def send(number):
        producer = run(broker, "new_task.py", "-q", f"{queue}-{number}", *WORDS[number][0])
        assert producer.wait() == 0, producer.err
        return producer.out

    for number, (line,) in in_parallel(send, range(len(WORDS))):
        assert broker.bodies(f"{queue}-{number}") == [WORDS[number][1]]
        assert line.startswith(" [x] Sent ")
        assert is_safe(line)


def test_lines_arrive_byte_for_byte_and_are_printed_safely(run, broker, queue, worker):
    # Given lines, one of which is a megabyte long,
    large = b"<" + b"x" * 1_000_000 + b">"
    data = b"\n".join([*SHOWN, large])
    # when they are sent, and done,
    producer = run(broker, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
    producer.process.stdin.write(data)
    producer.process.stdin.close()
    assert producer.wait() == 0, producer.err
    with broker.channel() as channel:
        stored = [channel.basic_get(queue) for _ in [*SHOWN, large]]
        assert [body for _, _, body in stored] == [*SHOWN, large]
        assert {properties.delivery_mode for _, properties, _ in stored} == {2}  # persistent
    doing = worker()
    doing.wait_for("Done", times=len(stored))
    # then they are shown as they are, if that is safe, and shortened.
    for lines, word in ((producer.out, "Sent"), (doing.out[1::2], "Received")):
        shown = [
            re.fullmatch(rf" \[x\] {word} (.*?)( \(redelivered\))?", line)[1] for line in lines
        ]
        assert shown[:-1] == list(SHOWN.values())
        assert re.fullmatch("'<xx.*xx>'", shown[-1])
        assert is_safe(shown[-1])


def test_any_body_is_done_and_shown_in_one_safe_line(broker, queue, worker):
    bodies = [b"", b"two\nlines", bytes(range(256)), *examples(BODIES, 150)]
    bodies = [body.replace(b".", b",") for body in bodies]
    doing = worker()
    with broker.channel() as channel:
        for body in bodies:
            channel.basic_publish("", queue, body)
    doing.wait_for("Done", times=len(bodies))
    doing.signal(signal.SIGTERM)
    assert doing.wait() == 0
    assert len(doing.out) == 1 + 2 * len(bodies)
    assert all(line.startswith(" [x] Received ") and is_safe(line) for line in doing.out[1::2])
    assert doing.err == []


def test_every_dot_is_a_second_and_nothing_else_is(broker, queue, worker):
    workers = [worker() for _ in range(4)]
    wanted = {}
    with broker.channel() as channel:
        for number, body in enumerate(examples(BODIES, 12)):
            wanted[number] = number % 3
            body = body.replace(b".", b",") + number % 3 * b"."
            channel.basic_publish("", queue, b"%d " % number + bytes(reversed(body)))
    wait_until(lambda: sum(each.out.count(" [x] Done") for each in workers) == len(wanted))
    for each in workers:
        for line in range(1, len(each.out), 2):
            number = int(re.search(r"\d+", each.out[line])[0])
            took = each.seen[id(each.out), line + 1] - each.seen[id(each.out), line]
            assert round(took) == wanted.pop(number)
    assert wanted == {}


def test_headers_of_any_type_are_carried_through_a_retry_unchanged(broker, queue, worker):
    headers = [{b"\xff": 1}, *examples(some.dictionaries(NAMES, VALUES, max_size=6), 40)]
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True)
        for number, each in enumerate(headers):
            channel.basic_publish("", queue, str(number), pika.BasicProperties(headers=each))
        # Pika 1.3 reads times without their zone.
        read = [channel.basic_get(queue)[1].headers for _ in headers]
    failing = worker("--retries", "1", "--retry-delay", "0", "false")
    failing.wait_for(f"moved to {queue}.dlq", times=len(headers))
    failing.signal(signal.SIGTERM)
    assert failing.wait() == 0
    with broker.channel() as channel:
        for _ in headers:
            _, properties, body = channel.basic_get(f"{queue}.dlq", auto_ack=True)
            reason = {"x-retry-count": 1, "x-last-error": "exit status 1"}
            assert properties.headers == {**read[int(body)], **reason}


def test_any_words_are_a_task_or_a_usage_error(run, broker, queue):
    def send(words):
        producer = run(broker, "new_task.py", "-q", queue, *words, stdin=subprocess.DEVNULL)
        return producer, producer.wait()

    words = [["-\n"], *examples(some.lists(TEXT, min_size=1, max_size=3), 15)]
    for (first, *_), (producer, status) in in_parallel(send, words):
        if status or not producer.out:
            assert first[:1] == "-"
            assert status in (0, 2)  # of options, or of no standard input
        else:
            assert producer.out[0].startswith(" [x] Sent ")
            assert is_safe(producer.out[0]), first


def test_any_url_is_refused_in_safe_lines(run):
    def send(url):
        producer = run("", "new_task.py", "--url", url, "task")
        return producer, producer.wait()

    schemes = some.sampled_from(["", "amqp://", "amqps://127.0.0.1:1/"])
    urls = examples(some.builds(str.__add__, schemes, TEXT), 15)
    for url, (producer, status) in in_parallel(send, urls):
        assert status in (1, 2), url
        assert producer.err
        assert all(is_safe(line) for line in producer.err), url


def test_output_that_cannot_show_a_character_escapes_it(run, broker, queue, worker, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    producer = run(broker, "new_task.py", "-q", queue, "🐇")
    assert producer.wait() == 0, producer.err
    doing = worker()
    doing.wait_for("Done")
    assert producer.out == [r" [x] Sent '\U0001f407'"]
    assert doing.out[1] == r" [x] Received '\U0001f407'"


def test_a_line_of_any_length_takes_time_in_proportion_to_it(run, broker, queue):
    def start(queue, megabytes, limits):
        lines = f"echo; echo one; head -c {megabytes}000000 /dev/zero | tr '\\0' x"
        script = f"exec {sys.executable} {ROOT / 'new_task.py'} -q {queue} -"
        return run(broker, *EXEC, "bash", "-c", f"({lines}) 2>&- | ({limits}; {script})")

    # Copied for each piece that is read, such a line would take more than a minute of CPU time.
    cases = {
        "MemoryError": start(f"{queue}-0", 600, "ulimit -v 500000 -t 20"),
        # The broker takes 16 MiB; before 4.0, it took 128.
        "larger than configured max size": start(f"{queue}-1", 140, "ulimit -t 20"),
    }
    for number, (why, producer) in enumerate(cases.items()):
        refused(producer, why, "1 task confirmed; resume from line 3")
        assert len(producer.err) == 2
        assert broker.bodies(f"{queue}-{number}") == [b"one"]
