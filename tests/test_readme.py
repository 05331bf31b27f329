"""README.md, done from top to bottom: its commands in its terminals, what appears compared.

A block belongs to the terminals that the label above it names. Lines of `sh` are typed, one when
the shell is ready for it; `text` is all that appears next (side by side: which worker gets the
first task may vary); other blocks are saved under the name in the label. What else README says
to do stands in its sentences: CUES quotes them, in their order, with what is done then. A command
or a key that README tells and neither a cue nor ELSEWHERE knows is an error, like a cue that
README does not tell. The `sh` blocks of .docs/production.md are run, too.

The test's own brokers take the place of Docker's, and of the system's: see Stage.administer().
"""

import contextlib
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pexpect
import pytest
from conftest import EXEC, ROOT, copy_checkout
from servers import PATIENCE, start_cluster, wait_until

README = (ROOT / "README.md").read_text()
PRODUCTION = (ROOT / ".docs" / "production.md").read_text()
REFERENCE = (ROOT / ".docs" / "reference.md").read_text()
PROMPT, MORE = "<ready>", "<more>"
BLOCK = re.compile(r"^```(\w+)\n((?:.*\n)*?)```$", re.MULTILINE)
LABEL = re.compile(
    r"(Terminals? [\d, and]+|The other terminal|Save as `(.+?)`)"
    r"(, at the end)?:$"
)
COMMAND = re.compile(
    r"`((?:docker|sudo|uv|python3|pip|\.venv/\S+|tests/\S+\.sh|rabbitmqctl)(?: [^`]*)?)`"
)
KEYS = re.compile(r"[Pp]ress CTRL\+C\b")
# What uv says of its own work differs from run to run.
UV = re.compile(r"^Installed \d+ packages? in .*\n", re.MULTILINE)

# Commands that are not done here, and why.
ELSEWHERE = {
    "docker compose up -d --wait": "tests/compose.sh",
    "docker compose stop": "tests/compose.sh",
    "docker compose --profile '*' down --volumes": "tests/compose.sh",
    "sudo apt-get update && sudo apt-get install rabbitmq-server python3-venv": "tests/setup.sh",
    "sudo service rabbitmq-server start": "the system's broker is not the tests'",
    "sudo service rabbitmq-server restart": "the system's broker is not the tests'",
    "sudo": "part of a command",
    "docker compose exec rabbitmq": "part of a command",
    "sudo apt-get": "tests/setup.sh",
    "tests/setup.sh": "below, in a block",
}
# Lines of blocks that other tests do.
ONE_LINE = {
    "tests/setup.sh && .venv/bin/python tests/demo.py": "test_one_line.py",
    "tests/setup.sh && .venv/bin/pytest tests": "test_one_line.py",
}

CUES = [
    ("Press CTRL+C to stop the worker.", lambda stage, _: stage.press(1)),
    (
        "**pika** with uv | `uv venv --allow-existing && uv pip install -r requirements.txt`",
        lambda stage, command: stage.type([command], 1),
    ),
    (
        "without uv | `python3 -m venv .venv && .venv/bin/pip install -r requirements.txt`",
        lambda stage, command: stage.type([command], 1),
    ),
    (
        "Start a worker.",
        lambda stage, _: stage.shells[0].wait_for_prompt(),
    ),
    (
        "The worker prints `Hello, World`.",
        lambda stage, words: (stage.wait(words, 1), stage.wait("Done", 1)),
    ),
    ("Press CTRL+C in terminal 1.", lambda stage, _: stage.press(1)),
    ("When both workers say `Waiting`", lambda stage, _: stage.wait("Waiting", 1, 2)),
    (
        "press CTRL+C in the terminal that shows it.",
        lambda stage, _: (stage.either("Received 'A long task"), stage.press(1)),
    ),
    (
        "After `Done`, press CTRL+C there, too.",
        lambda stage, _: stage.press(2),
    ),
    ("When both say `Waiting`", lambda stage, _: stage.wait("Waiting", 1, 2)),
    ("Press CTRL+C in both terminals.", lambda stage, _: stage.press(1, 2)),
    (
        "When both say `Waiting`, send the same four tasks again in terminal 3.",
        lambda stage, _: (stage.wait("Waiting", 1, 2), stage.type(stage.last_typed[3], 3)),
    ),
    ("Press CTRL+C in terminal 2.", lambda stage, _: stage.press(2)),
    (
        "restart the broker in terminal 2: `docker compose restart`",
        lambda stage, command: stage.later.append(command),
    ),
    (
        "the worker reconnects, trying every 3 seconds, and does the task again.",
        lambda stage, _: (
            stage.wait("Received 'A task", 1),
            stage.administer(stage.later.pop()),
            stage.wait("reconnecting in 3 s", 1),
            stage.wait("Received 'A task............' (redelivered)", 1),
            stage.wait("Done", 1),
        ),
    ),
    ("Press CTRL+C in terminal 1.", lambda stage, _: stage.press(1)),
    (
        "If it raises an exception, the task has [failed](#when-a-task-fails).",
        lambda stage, _: stage.let_function_raise(),
    ),
    (
        "put it after the options: `python3 worker.py -q words wc -w`.",
        lambda stage, command: (
            stage.type([command], 2),
            stage.type(["python3 new_task.py -q words How many words?"], 3),
            stage.wait("\n3", 2),
            stage.wait("Done", 2),
            stage.press(2),
        ),
    ),
    ("Run `python3 send.py` in terminal 3.", lambda stage, command: stage.type([command], 3)),
    (
        "Terminal 1 shows the task.",
        lambda stage, _: (
            stage.wait("eva.jpg: a thumbnail of 300 pixels", 1),
            stage.wait("Done", 1),
        ),
    ),
    (
        "with the reason in the header `x-last-error`.",
        lambda stage, name: stage.check_dead_letter(name, "exceeded the time limit of 5 s"),
    ),
    (
        "It prints `max.jpg: a thumbnail of 1000 pixels`.",
        lambda stage, words: (stage.wait(words, 2), stage.wait("Done", 2)),
    ),
    (
        "`rabbitmqctl purge_queue thumbs` deletes waiting tasks, "
        "`rabbitmqctl delete_queue thumbs` the queue.",
        lambda stage, _: stage.empty_and_delete("thumbs"),
    ),
    ("Press CTRL+C in terminals 1 and 2.", lambda stage, _: stage.press(1, 2)),
    (
        "Add two nodes, to which queues are replicated: "
        "`docker compose --profile cluster up -d --wait`.",
        lambda stage, command: stage.administer(command),
    ),
    ("When both say `Waiting`", lambda stage, _: stage.wait("Waiting", 1, 2)),
    (
        "kill the node that they use from the fourth: `docker compose kill rabbitmq`.",
        lambda stage, command: (stage.wait("Sent 'Task 9.'", 3), stage.administer(command)),
    ),
    ("all 60 tasks are sent and done.", lambda stage, _: stage.wait_for_all_tasks(60)),
    (
        "Start the node again: `docker compose --profile cluster up -d --wait`.",
        lambda stage, command: stage.administer(command),
    ),
]


class Shell:
    """A shell in a terminal, and what it has shown."""

    def __init__(self, terminal, folder, url, environment):
        options = ["--norc", "--noprofile", "--noediting"]
        environment = {
            **{name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
            **{"PS1": PROMPT, "PS2": MORE, "VIRTUAL_ENV_DISABLE_PROMPT": "yes"},
            **{"LC_ALL": "C.UTF-8", "TERM": "dumb", "HISTFILE": os.devnull},
            **environment,
        }
        self.shell = terminal("bash", *options, url=url, env=environment, cwd=folder, echo=False)
        self.text = ""  # what has appeared and was not compared yet
        self.all_is_shown = False  # in README, since the last command

    def visible(self):
        return normalised(self.text.replace(PROMPT, "").replace(MORE, ""))

    def read(self):
        with contextlib.suppress(pexpect.TIMEOUT):
            while True:
                self.text += self.shell.read_nonblocking(4096, timeout=0).replace("\r\n", "\n")
        return self.text

    def wait_until(self, condition):
        deadline = time.monotonic() + PATIENCE
        while self.read() is None or not condition():
            assert time.monotonic() < deadline, f"this terminal has shown:\n{self.text}"
            time.sleep(0.01)

    def finish(self):
        """Before anything new is done: where output is shown, none of it may be left out."""
        self.read()
        assert not self.all_is_shown or not self.visible(), f"not in README:\n{self.visible()}"
        self.text, self.all_is_shown = "", False

    def wait_for_prompt(self):
        self.wait_until(lambda: self.text.endswith((PROMPT, MORE)))

    def type(self, lines):
        self.wait_for_prompt()
        self.finish()
        for line in lines:
            self.shell.sendline(line)
            if line != lines[-1]:
                self.wait_for_prompt()
                self.text = self.text.removesuffix(PROMPT).removesuffix(MORE)

    def press_ctrl_c(self):
        self.finish()
        self.shell.sendcontrol("c")
        self.wait_for_prompt()

    def show(self, *expected):
        """Wait for the first of some texts that appears; return it."""

        def decided():
            # With the prompt behind it, or longer than expected, it can't become right any more.
            return (
                self.visible() in expected
                or self.text.endswith(PROMPT)
                or len(self.visible()) > max(map(len, expected))
            )

        self.wait_until(decided)
        seen = self.visible()
        assert seen in expected
        self.text = PROMPT if self.text.endswith(PROMPT) else ""
        self.all_is_shown = True
        return seen

    def wait_for(self, words):
        self.wait_until(lambda: re.search(f"{re.escape(words)}.*\n?", self.text))
        self.text = re.split(f"{re.escape(words)}.*\n?", self.text, maxsplit=1)[1]
        self.all_is_shown = False


def normalised(text):
    return "\n".join(line.rstrip() for line in UV.sub("", text).splitlines())


class Stage:
    """The terminals, the folder and the brokers that README's reader has."""

    def __init__(self, shells, folder, nodes=(), cluster=None):
        self.shells, self.folder = shells, folder
        self.nodes, self.cluster = list(nodes), cluster
        self.last_typed = {}  # lines, by terminal
        self.later = []  # commands

    # ---- What README says ----

    def perform(self, text, cues):
        cues, begin = list(cues), 0
        for block in BLOCK.finditer(text):
            prose = text[begin : block.start()]
            self.follow(prose, cues)
            self.do(LABEL.search(prose.rstrip()), *block.groups())
            begin = block.end()
        self.follow(text[begin:], cues)
        assert not cues, f"README does not say: {cues[0][0]}"
        for shell in self.shells:
            shell.finish()

    def follow(self, prose, cues):
        """Do what sentences say."""
        assert "```" not in prose, f"not understood: {prose}"
        prose = " ".join(prose.split())
        while cues and cues[0][0] in prose:
            words, action = cues.pop(0)
            before, _, prose = prose.partition(words)
            self.check_that_nothing_is_told(before)
            print(words)  # for the reader of a failure
            action(self, (re.findall("`([^`]+)`", words) or [None])[-1])
        self.check_that_nothing_is_told(prose)

    def check_that_nothing_is_told(self, prose):
        assert not KEYS.search(prose), f"no cue for: {prose}"
        commands = set(COMMAND.findall(prose)) - set(ELSEWHERE)
        assert not commands, f"no cue for: {commands}"

    def do(self, label, language, block):
        print(label and label[0], block)
        if language != "sh" and label is None:
            assert "─" in block, f"which terminal shows this?\n{block}"  # a diagram
            return
        assert label, f"in which terminal?\n{block}"
        lines = block.splitlines()
        if lines[0] in ONE_LINE or label[3]:
            return
        numbers = [int(number) for number in re.findall(r"\d", label[1])] or [2]  # the other one
        if label[2]:
            (self.folder / label[2]).write_text(self.with_own_urls(block))
        elif language == "sh":
            self.type(lines, *numbers)
        else:
            assert language == "text"
            self.compare(lines, numbers)

    def compare(self, lines, numbers):
        columns = ["\n".join(lines)]
        if len(numbers) > 1:
            rows = [line.split("│") for line in lines]
            columns = [
                "\n".join(cell[at > 0 :] for cell in column) for at, column in enumerate(zip(*rows))
            ]
        columns = [normalised(column).rstrip("\n") for column in columns]
        for number in numbers:
            columns.remove(self.shells[number - 1].show(*columns))

    # ---- What cues do ----

    def type(self, lines, *numbers):
        for number in numbers:
            self.last_typed[number] = lines
            if typed := [self.with_own_urls(line) for line in lines if not self.administer(line)]:
                self.shells[number - 1].type(typed)

    def press(self, *numbers):
        for number in numbers:
            self.shells[number - 1].press_ctrl_c()

    def wait(self, words, *numbers):
        for number in numbers:
            self.shells[number - 1].wait_for(words)

    def either(self, words, then=None):
        """Wait until one of the workers shows it; that is terminal 1 from here on."""
        one, other, *_ = self.shells
        one.wait_until(lambda: words in one.text + other.read())
        if words not in one.text:
            self.shells[:2] = other, one
        self.wait(words, 1)
        if then:
            self.wait(then, 1)

    def wait_for_all_tasks(self, count):
        expected = {f"Task {number}." for number in range(1, count + 1)}
        workers, producer = self.shells[:2], self.shells[2]
        producer.wait_for_prompt()
        sent = set(re.findall(r"Sent '(.+)'", producer.text))
        assert sent == {task for task in expected if int(task[5:-1]) > 9}  # those behind the wait
        assert all("Connection lost: " in line for line in re.findall(r" \[!\] .*", producer.text))

        def done():
            text = "".join(worker.read() for worker in workers)
            return set(re.findall(r"Received '(.+)'.*\n(?:\.\n)? \[x\] Done", text))

        wait_until(lambda: done() == expected)

    def check_dead_letter(self, header, reason):
        with self.nodes[0].channel(self.nodes[0].url_of(vhost="q")) as channel:
            _, properties, body = channel.basic_get("thumbs.dlq", auto_ack=True)
            assert properties.headers[header] == reason
            channel.confirm_delivery()
            channel.basic_publish("", "thumbs.dlq", body, properties)  # not marked as redelivered

    def empty_and_delete(self, queue):
        node, command = self.nodes[0], "docker compose exec rabbitmq rabbitmqctl"
        url = node.url_of(vhost="q")
        self.press(1)
        with node.channel(url) as channel:
            channel.confirm_delivery()
            channel.basic_publish("", queue, b"waiting", mandatory=True)
        wait_until(lambda: node.ready(queue, url) == 1)
        self.administer(f"{command} purge_queue {queue}")
        assert node.ready(queue, url) == 0
        self.administer(f"{command} delete_queue {queue}")
        assert node.ready(queue, url) is None

    def let_function_raise(self):
        self.type(["python3 worker.py -q raising --function thumbs:make"], 2)
        self.type(["python3 new_task.py -q raising 'not JSON'"], 3)
        self.wait("Traceback (most recent call last)", 2)
        self.wait("[!] Failed: JSONDecodeError('Expecting value: line 1 column 1", 2)
        self.press(2)

    # ---- In place of Docker, and of an administrator ----

    def administer(self, command):
        """Do a command to the test's own brokers, if it is one for brokers; return what it says."""
        if command == "docker compose up -d --wait":
            return "it is up"
        if command == "docker compose restart":
            self.nodes[0].stop()
            self.nodes[0].start()
            return "restarted"
        if command == "docker compose --profile cluster up -d --wait":
            if len(self.nodes) == 1:
                self.nodes = self.cluster.result()
            else:
                self.nodes[0].start()
            return "it is up"
        if command == "docker compose kill rabbitmq":
            self.nodes[0].kill()
            return "killed"
        if found := re.match("(sudo|docker compose exec rabbitmq) rabbitmqctl (.+)", command):
            name, *arguments = shlex.split(found[2])
            if name == "add_user":
                arguments.append("PASSWORD")  # which it would ask for
            else:
                arguments = ["-p", "q", *arguments]
            return self.nodes[0].rabbitctl_output(name, *arguments) or "done"
        assert not command.startswith(("docker", "sudo")), f"can't be done here: {command}"
        return None

    def with_own_urls(self, text):
        if not self.nodes:
            return text
        for port, node in zip((5672, 5673, 5674), self.nodes):
            text = text.replace(f"amqp://localhost:{port}", node.url_of(vhost="q"))
        return re.sub("amqp://localhost(?!:)", self.nodes[0].url_of(vhost="q"), text)


@pytest.fixture(scope="module")
def uv(tmp_path_factory):
    """The environment of a terminal with uv, which finds pika as pip does."""
    folder = tmp_path_factory.mktemp("uv")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "install", "--target", folder, "uv"], check=True)
    requirements = ["-r", ROOT / "requirements.txt"]
    subprocess.run([*pip, "download", "-d", folder / "pika", *requirements], check=True)
    (folder / "uv.toml").write_text(f'no-index = true\nfind-links = ["{folder / "pika"}"]\n')
    return {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "NO_COLOR": "1",
        "UV_CONFIG_FILE": str(folder / "uv.toml"),
        "UV_CACHE_DIR": str(folder / "cache"),
        "UV_PYTHON": sys.executable,
    }


def test_readme_does_what_it_says(broker, vhosts, new_broker, terminal, tmp_path, uv):
    folder = copy_checkout(tmp_path / "checkout")
    with broker.channel(vhosts["quorum"]) as channel:
        channel.queue_delete("task_queue")
    shells = [Shell(terminal, folder, vhosts["quorum"], uv) for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        cluster = pool.submit(start_cluster, new_broker)  # while the first sections are done
        stage = Stage(shells, folder, [broker], cluster)
        stage.perform(README, CUES)

    stage.press(1, 2)


def assert_that_a_task_that_comes_back_too_often_is_a_dead_letter(node):
    with node.channel(node.url_of(vhost="q")) as channel:
        channel.queue_delete("thumbs")
        channel.queue_purge("thumbs.dlq")
        limit = {} if node.version() >= (4, 0) else {"x-delivery-limit": 20}  # the default
        channel.queue_declare("thumbs", durable=True, arguments=limit)
        channel.confirm_delivery()
        channel.basic_publish("", "thumbs", b"unreadable", mandatory=True)
        for _ in range(21):
            method, _, _ = wait_until(lambda: next_of(channel, "thumbs"))
            channel.basic_reject(method.delivery_tag)
        _, properties, body = wait_until(lambda: next_of(channel, "thumbs.dlq"))
        assert body == b"unreadable"
        assert properties.headers["x-death"][0]["reason"] == "delivery_limit"


def next_of(channel, queue):
    got = channel.basic_get(queue)
    return got if got[0] else None


def test_what_production_says_can_be_done(broker, run, send, vhosts, tmp_path):
    for name in ("worker.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("opt", "etc/systemd/system"):
        (tmp_path / name).mkdir(parents=True)
    here = Stage([], tmp_path, [broker])

    def moved(text):
        """Into a folder of the test's own, as are the users."""
        return re.sub("(?<![.\\w])/(opt|etc)/", rf"{tmp_path}/\1/", text)

    policies, not_here = [], ["useradd", "systemctl", "systemctl"]  # they would change this machine
    try:
        (module,) = (
            block for label, _, block in blocks(README) if label and label[2] == "thumbs.py"
        )
        (tmp_path / "thumbs.py").write_text(module)
        for label, language, block in blocks(PRODUCTION):
            assert label, f"in which terminal?\n{block}"
            if label[2]:
                url = broker.url_of("thumbs:PASSWORD", "q")
                told = block.replace("amqp://thumbs:PASSWORD@localhost", url)
                (tmp_path / label[2]).write_text(moved(told))
                continue
            assert language == "sh"
            for command in block.splitlines():
                assert command.startswith(("sudo ", "rm ")), command
                if "set_policy" in command:
                    policies.append(command)
                elif command.startswith("sudo rabbitmqctl"):
                    here.administer(command)
                elif (program := command.split()[1]) in not_here:
                    not_here.remove(program)
                else:
                    command = moved(command.replace("sudo ", ""))
                    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert not not_here

        unit = tmp_path / "etc/systemd/system/thumbs@.service"
        settings = dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line)
        if analyze := shutil.which("systemd-analyze"):
            verified = subprocess.run([analyze, "verify", unit], capture_output=True, text=True)
            assert verified.returncode == 0, verified.stderr
            assert "thumbs@" not in verified.stderr, verified.stderr
        else:
            print("systemd-analyze is not installed: its syntax was not verified")

        environment = tmp_path / "etc/thumbs.env"
        assert settings["EnvironmentFile"] == str(environment)
        assert stat.S_IMODE(environment.stat().st_mode) == 0o600
        assert not (tmp_path / "thumbs.env").exists()
        program, *arguments = settings["ExecStart"].split()
        assert program == f"{settings['WorkingDirectory']}/.venv/bin/python"
        url = environment.read_text().strip().removeprefix("AMQP_URL=")
        options = ["--retries", "1", "--retry-delay", "1"]
        worker = run(url, *EXEC, program, *arguments, *options, cwd=settings["WorkingDirectory"])
        worker.wait_for("Waiting")
        send(vhosts["quorum"], "thumbs", '{"file": "zoe.jpg", "width": 200}')
        worker.wait_for("zoe.jpg: a thumbnail of 200 pixels")
        worker.wait_for("Done")
        # Its least rights are enough for retries and dead letters, and no more.
        send(vhosts["quorum"], "thumbs", "not JSON")
        worker.wait_for("retrying in 1 s")
        worker.wait_for("moved to thumbs.dlq")
        worker.process.terminate()
        assert worker.wait() == 0
        other = run(url, "new_task.py", "-q", "other", "Hello")
        assert other.wait() == 1
        assert re.search("NOT_FOUND|ACCESS_REFUSED", other.err[0])
    finally:
        broker.rabbitctl_output("delete_user", "thumbs")

    (create,) = re.findall("`python3 (new_task.py .+) - < /dev/null`", " ".join(PRODUCTION.split()))
    producer = run(vhosts["quorum"], *create.split(), "-", stdin=subprocess.DEVNULL)
    assert producer.wait() == 0
    assert_that_a_policy_keeps_what_comes_back_too_often(broker, policies)


def assert_that_a_policy_keeps_what_comes_back_too_often(broker, policies):
    (policy,) = policies
    if broker.version() < (3, 12):
        policy = policy.replace(', "consumer-timeout": 7200000', "")
    Stage([], None, [broker]).administer(policy)
    try:
        assert_that_a_task_that_comes_back_too_often_is_a_dead_letter(broker)
    finally:
        broker.rabbitctl_output("clear_policy", "-p", "q", "thumbs")


def blocks(page):
    """Yield the label, the language and the text of each block of a page."""
    for block in BLOCK.finditer(page):
        yield LABEL.search(page[: block.start()].rstrip()), *block.groups()


def test_the_pages_are_short_and_plain_text():
    assert len(README.splitlines()) <= 300
    for text, words in ((README, 2000), (PRODUCTION, 1300), (REFERENCE, 850)):
        assert "<!--" not in text
        assert len(text.split()) <= words
        prose = [line for line in BLOCK.sub("", text).splitlines() if not line.startswith("|")]
        assert max(prose, key=len)[110:] == ""


TOLD = """
First, send it. Terminal 3:
```sh
echo 1
for number in 2 3; do
    echo $number
done
```
Wait for it. {}:
```text
{}
```
Terminal 3:
```sh
echo {}
```
Terminals 1 and 3:
```text
4          │ 5
```
"""
WAIT = ("Wait for it.", lambda stage, _: stage.wait("1", 3))


@pytest.mark.parametrize(
    ("label", "shown", "last", "cues", "is_true"),
    [
        ("Terminal 3", "2\n3", "5", [WAIT], True),
        ("Terminal 3", "3", "5", [WAIT], False),
        ("Terminal 3", "2", "5", [WAIT], False),
        ("Terminal 3", "2\n3\n4", "5", [WAIT], False),
        ("Terminal 3", "2\n3", "6", [WAIT], False),
        ("Terminal 2", "2\n3", "5", [WAIT], False),
        ("Somewhere", "2\n3", "5", [WAIT], False),
        ("Terminal 3", "2\n3", "5", [WAIT, WAIT], False),
        ("Terminal 3", "2\n3", "5\nsudo true", [WAIT], False),
    ],
)
def test_what_is_not_so_is_noticed(terminal, tmp_path, label, shown, last, cues, is_true):
    stage = Stage([Shell(terminal, tmp_path, "", {}) for _ in range(3)], tmp_path)
    told = f"Terminal 1:\n```sh\necho 4\n```\n{TOLD.format(label, shown, last)}"
    with contextlib.nullcontext() if is_true else pytest.raises(AssertionError):
        stage.perform(told, cues)


@pytest.mark.parametrize(
    "told", ["Press CTRL+C.", "Run `sudo reboot`.", "Then `python3 worker.py`."]
)
def test_what_is_told_and_not_done_is_noticed(tmp_path, told):
    with pytest.raises(AssertionError, match="no cue"):
        Stage([], tmp_path).perform(told, [])
