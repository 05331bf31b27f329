"""README.md, done from top to bottom: its commands in its terminals, what appears compared.

What is to be done with a block stands behind its language, where a reader does not see it:

    terminal 1, 2       type these lines in both, each when the shell is ready for it
    shows 1, 2          this is all that each of them shows next
    columns 1, 2        the same, side by side; which worker gets the first task may vary
    by hand: WHY        not done here

and, in comments between the words,

    wait 1, 2: TEXT     until both show a line that holds it, which is then passed over
    either 1, 2: TEXT   until one of them shows it; that one is called 1 from here on
    press 1, 2: KEY
    restart             the broker (by hand in README; here it is the test's own)
"""

import contextlib
import os
import re
import shutil
import time

import pexpect
import psutil
import pytest
from conftest import ROOT
from servers import PATIENCE

README = (ROOT / "README.md").read_text()
BY_HAND = 3  # blocks: Docker, root's rights
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__")
PROMPT, MORE = "<ready>", "<more>"
KEYS = {"CTRL+C": "c", "CTRL+Z": "z"}
DOTS_CUT_SHORT = re.compile(r"^\.*\n(?= \[!\] )", re.MULTILINE)
VERBS = "terminal|shows|columns|by hand|wait|either|press|restart"
STEP = re.compile(rf"({VERBS})(?: ([\d, ]+))?(?:: (.+))?")
REFUSED_AGAIN = re.compile(r"^( \[!\] ConnectionRefused.*\n) \[!\] ConnectionRefused.*\n", re.M)


class Terminal:
    def __init__(self, folder, environment):
        self.shell = pexpect.spawn(
            "bash",
            ["--norc", "--noprofile", "--noediting"],
            cwd=folder,
            env={**environment, "PS1": PROMPT, "PS2": MORE},
            encoding="utf-8",
            echo=False,
        )
        self.text = ""  # what has appeared and was not compared yet
        self.all_is_shown = False  # in README, since the last command

    def read(self):
        with contextlib.suppress(pexpect.TIMEOUT):
            while True:
                self.text += self.shell.read_nonblocking(4096, timeout=0)
        return self.text

    def visible(self):
        return normalised(self.text.replace(PROMPT, "").replace(MORE, ""))

    def wait_until(self, condition):
        deadline = time.monotonic() + PATIENCE
        while True:
            self.read()
            if condition():
                return
            assert time.monotonic() < deadline, f"this terminal has shown:\n{self.text}"
            time.sleep(0.01)

    def wait_for_prompt(self):
        self.wait_until(lambda: self.text.endswith((PROMPT, MORE)))

    def finish(self):
        """Before anything new is done: where output is shown, none of it may be left out."""
        assert not self.all_is_shown or not self.visible(), f"not in README:\n{self.visible()}"
        self.all_is_shown = False

    def type(self, lines):
        self.wait_for_prompt()
        self.finish()
        self.text = PROMPT
        for line in lines:
            self.wait_for_prompt()
            self.text = self.text.removesuffix(PROMPT).removesuffix(MORE)
            self.shell.sendline(line)

    def press(self, key):
        self.read()
        self.finish()
        self.text = ""
        self.shell.sendcontrol(KEYS[key])
        self.wait_for_prompt()

    def shows(self, expected):
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
        self.wait_until(lambda: re.search(f"{re.escape(words)}.*\n", self.text))
        self.text = re.split(f"{re.escape(words)}.*\n", self.text, maxsplit=1)[1]
        self.all_is_shown = False

    def is_first_with(self, words, other):
        """Wait until one of two terminals shows some words; tell whether it is this one."""
        self.wait_until(lambda: words in self.text + other.read())
        first = self if words in self.text else other
        first.wait_for(words)
        return first is self

    def end(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.shell.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.shell.close(force=True)


def normalised(text):
    """Leave out what differs from run to run: where work was cut short, how often refused."""
    text = DOTS_CUT_SHORT.sub("...\n", text.replace("\r\n", "\n"))
    while (fewer := REFUSED_AGAIN.sub(r"\1", text)) != text:
        text = fewer
    return "\n".join(line.rstrip() for line in text.splitlines())


def steps_of(text):
    """Yield (number of the line, what to do, numbers of terminals, detail, lines of the block)."""
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        fence = re.fullmatch(r"( *)```(.*)", line)
        if fence:
            indent, told = fence.groups()
            ends = (inside.removeprefix(indent) for _, inside in lines)
            block = list(iter(lambda ends=ends: next(ends), "```"))
            told = [told.partition(" ")[2]]
        else:
            told, block = re.findall("<!-- (.*?) -->", line), None
        for one in told:
            found = STEP.fullmatch(one)
            assert found, f"line {number}: {one!r} says nothing that this test understands"
            verb, names, detail = found.groups()
            numbers = [int(name) for name in re.findall(r"\d", names or "")]
            yield number, verb, numbers, detail, block


def do(text, terminals, broker):
    for number, verb, names, detail, block in steps_of(text):
        print(f"line {number}: {verb} {names} {detail or ''}")  # who reads a failure wants to know
        those = [terminals[name - 1] for name in names]
        if verb == "columns":
            rows = [row.split("│") for row in block[1:]]  # below a line of titles
            columns = [[cell[at > 0 :] for cell in column] for at, column in enumerate(zip(*rows))]
            columns = [normalised("\n".join(column)).rstrip("\n") for column in columns]
        for terminal in those:
            if verb == "terminal":
                terminal.type(block)
            elif verb == "shows":
                terminal.shows([normalised("\n".join(block))])
            elif verb == "columns":
                columns.remove(terminal.shows(columns))
            elif verb == "wait":
                terminal.wait_for(detail)
            elif verb == "press":
                terminal.press(detail)
        if verb == "either":
            one, other = names
            if those[1].is_first_with(detail, those[0]):
                terminals[one - 1], terminals[other - 1] = terminals[other - 1], terminals[one - 1]
        elif verb == "restart":
            broker.stop()
            broker.start()
    for terminal in terminals:
        terminal.read()
        terminal.finish()


@pytest.fixture(scope="module")
def readers_broker(new_broker):
    return new_broker()


@pytest.fixture
def terminals(tmp_path, readers_broker):
    """Three terminals in a copy of this checkout, whose broker is the test's own."""
    folder = shutil.copytree(ROOT, tmp_path / "checkout", ignore=NOT_COPIED)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
        "AMQP_URL": readers_broker.url,
        "VIRTUAL_ENV_DISABLE_PROMPT": "yes",
        "LC_ALL": "C.UTF-8",
        "TERM": "dumb",
        "HISTFILE": os.devnull,
    }
    three = [Terminal(folder, environment) for _ in range(3)]
    yield three
    for terminal in three:
        terminal.end()


def test_readme_does_what_it_says(terminals, readers_broker):
    do(README, terminals, readers_broker)


def test_what_is_done_by_hand_is_counted():
    steps = [verb for _, verb, *_ in steps_of(README)]
    assert steps.count("by hand") == BY_HAND
    assert steps.count("restart") == 1


@pytest.mark.parametrize(
    "lie",
    [
        "```text shows 3\n1\n3\n```",
        "```text shows 3\n1\n```",
        "```text shows 3\n1\n2\n3\n```",
        "```text columns 3\nTERMINAL 3\n2\n1\n```",
        "```text shows 3\n1\n2\n```\n```text shows 3\n3\n```",
    ],
)
def test_what_does_not_appear_is_noticed(terminals, lie):
    # The last command waits until all of the others' output is there.
    told = f"```sh terminal 3\necho 1\necho 2\n```\n{lie}\n```sh terminal 3\ntrue\n```\n"
    with pytest.raises(AssertionError):
        do(told, terminals, None)
