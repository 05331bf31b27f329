"""Both scripts: any bytes are a task, arrive as they are, and are printed as one safe line."""

import signal
import subprocess

import pytest

ARGUMENTS = {  # the words on the command line, and the task they make
    "words": (["First", "message."], b"First message."),
    "no words": ([], b"Hello World!"),
    "no dots": (["no dots"], b"no dots"),
    "only dots": (["..."], b"..."),
    "empty": ([""], b""),
    "spaces": (["two  spaces", "", "between"], b"two  spaces  between"),
    "dashes": (["words", "--url", "-q", "--help"], b"words --url -q --help"),
    "dashes first": (["--", "--dry-run", "--", "-x"], b"--dry-run -- -x"),
    "a dash first": (["-", "is", "a", "dash"], b"- is a dash"),
    "quotes": (["it's", '"quoted"', "`id`", "$HOME", "\\n"], b'it\'s "quoted" `id` $HOME \\n'),
    "newlines": (["two\nlines\r\n"], b"two\nlines\r\n"),
    "escape sequence": (["\x1b[2J"], b"\x1b[2J"),
    "not UTF-8": ([b"\xff", b"caf\xe9"], b"\xff caf\xe9"),
    "emoji": (["🐇"], "🐇".encode()),
}

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

MEGABYTE = b"<" + b"x" * 1_000_000 + b">"


def is_safe(line):
    return line.isprintable() and len(line) < 300


@pytest.fixture
def send_input(run, broker, queue):
    """Send bytes through standard input; return what was printed."""

    def start(data):
        producer = run(broker, "new_task.py", "-q", queue, "-", stdin=subprocess.PIPE)
        producer.process.stdin.write(data)
        producer.process.stdin.close()
        assert producer.wait() == 0, producer.err
        return producer.out

    return start


@pytest.fixture
def do(run, broker, queue):
    """Publish bodies as anyone could, let a worker do them; return what it says it received."""

    def start(*bodies):
        with broker.channel() as channel:
            channel.queue_declare(queue, durable=True)
            for body in bodies:
                channel.basic_publish("", queue, body)
        worker = run(broker, "worker.py", "-q", queue)
        worker.wait_for("Done", times=len(bodies))
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0, worker.err
        assert broker.ready(queue) == 0  # all of them acknowledged
        return [line for line in worker.out if "Received" in line]

    return start


@pytest.mark.parametrize(("words", "task"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_arrive_byte_for_byte(run, broker, queue, words, task):
    producer = run(broker, "new_task.py", "-q", queue, *words)
    assert producer.wait() == 0, producer.err
    assert broker.bodies(queue) == [task]
    (line,) = producer.out
    assert line.startswith(" [x] Sent ")
    assert is_safe(line)


def test_lines_of_input_arrive_byte_for_byte(broker, queue, send_input):
    printed = send_input(b"\n".join(SHOWN))
    assert broker.bodies(queue) == list(SHOWN)
    assert printed == [f" [x] Sent {text}" for text in SHOWN.values()]


def test_a_line_of_one_megabyte_arrives_whole_and_is_shown_shortened(broker, queue, send_input):
    (line,) = send_input(MEGABYTE)
    assert broker.bodies(queue) == [MEGABYTE]
    assert line.startswith(" [x] Sent '<xx")
    assert line.endswith("xx>'")
    assert is_safe(line)


def test_a_worker_does_whatever_bytes_were_published(do):
    received = do(*SHOWN, b"", b"two\nlines")
    assert received == [
        f" [x] Received {text}" for text in (*SHOWN.values(), "''", r"'two\nlines'")
    ]


@pytest.mark.parametrize(
    ("body", "start", "end"),
    [(MEGABYTE, "<xx", "xx>"), (bytes(range(256)), r"\x00\x01", r"\udcfe\udcff")],
    ids=["one megabyte", "every byte"],
)
def test_a_worker_shows_a_long_task_shortened(do, body, start, end):
    (line,) = do(body)
    assert line.startswith(f" [x] Received '{start}")
    assert line.endswith(f"{end}'")
    assert is_safe(line)


def test_output_that_cannot_show_a_character_escapes_it(run, broker, queue, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    producer = run(broker, "new_task.py", "-q", queue, "🐇")
    assert producer.wait() == 0, producer.err
    worker = run(broker, "worker.py", "-q", queue)
    worker.wait_for("Done")
    assert producer.out == [r" [x] Sent '\U0001f407'"]
    assert worker.out[1] == r" [x] Received '\U0001f407'"
