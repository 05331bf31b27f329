"""README.md, done from top to bottom: its commands in its terminals, what appears compared.

What to do with a block is told behind its language, where a reader doesn't see it:

    sh terminal 1, 2      type these lines in both, each when the shell is ready for it
    text shows 1, 2       this is all that each of them shows next
    text columns 1, 2     the same, side by side; which worker gets the first task may vary
    sh by hand: WHY       not done here

and what else to do is told in comments, each on a line of its own, between sentences:

    <!-- wait 1, 2: TEXT -->      until both show a line that holds it, which is then passed over
    <!-- either 1, 2: TEXT -->    until one of them shows it; that one is called 1 from here on
    <!-- press 1, 2: KEY -->
    <!-- restart 1: TEXT -->      the broker (here the test's own), when that shows it
"""

import contextlib
import os
import re
import shutil
import time

import pexpect
import pytest
from conftest import ROOT
from servers import PATIENCE

README = (ROOT / "README.md").read_text()
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__")
PROMPT, MORE = "<ready>", "<more>"
KEYS = {"CTRL+C": "c", "CTRL+Z": "z"}
BLOCK = r"^( *)```\w+ (.+)\n((?:.*\n)*?) *```$"
COMMENT = r"^ *<!-- (.+) -->$"
VERBS = "terminal|shows|columns|by hand|wait|either|press|restart"
# What differs from run to run: where work was cut short, how often a connection was refused.
CUT_SHORT = re.compile(r"^\.*\n(?= \[!\] )", re.MULTILINE)
REFUSED = re.compile(r"^( \[!\] ConnectionRefused.*\n)( \[!\] .*; retrying in \d+ s\n)+", re.M)


class Shell:
    """A shell in a terminal, and what it has shown."""

    def __init__(self, terminal, folder, url):
        options = ["--norc", "--noprofile", "--noediting"]
        environment = {
            **{name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"},
            **{"PS1": PROMPT, "PS2": MORE, "VIRTUAL_ENV_DISABLE_PROMPT": "yes"},
            **{"LC_ALL": "C.UTF-8", "TERM": "dumb", "HISTFILE": os.devnull},
        }
        self.shell = terminal("bash", *options, url=url, env=environment, cwd=folder, echo=False)
        self.text = ""  # what has appeared and was not compared yet
        self.all_is_shown = False  # in README, since the last command

    def visible(self):
        return normalised(self.text.replace(PROMPT, "").replace(MORE, ""))

    def read(self):
        with contextlib.suppress(pexpect.TIMEOUT):
            while True:
                self.text += self.shell.read_nonblocking(4096, timeout=0)
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

    def press(self, key):
        self.finish()
        self.shell.sendcontrol(KEYS[key])
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
        self.wait_until(lambda: re.search(f"{re.escape(words)}.*\n", self.text))
        self.text = re.split(f"{re.escape(words)}.*\n", self.text, maxsplit=1)[1]
        self.all_is_shown = False


def normalised(text):
    text = CUT_SHORT.sub("...\n", text.replace("\r\n", "\n"))
    return "\n".join(line.rstrip() for line in REFUSED.sub(r"\1", text).splitlines())


def steps_of(text):
    """Yield (what to do, numbers of terminals, detail, lines of the block)."""
    for found in re.finditer(f"{BLOCK}|{COMMENT}|.*(```|<!--).*", text, re.MULTILINE):
        indent, told, block, comment, _ = found.groups()
        step = re.fullmatch(rf"({VERBS})(?: ([\d, ]+))?(?:: (.+))?", told or comment or "")
        assert step, f"not understood: {found[0]}"
        lines = [line.removeprefix(indent) for line in (block or "").splitlines()]
        numbers = [int(number) for number in re.findall(r"\d", step[2] or "")]
        print(step[0])  # for the reader of a failure
        yield step[1], numbers, step[3], lines


def do(text, shells, broker=None):
    for verb, numbers, detail, lines in steps_of(text):
        those = [shells[number - 1] for number in numbers]
        if verb == "columns":
            rows = [row.split("│") for row in lines[1:]]  # below a line of titles
            columns = [[cell[at > 0 :] for cell in column] for at, column in enumerate(zip(*rows))]
            columns = [normalised("\n".join(column)).rstrip("\n") for column in columns]
        for shell in those:
            if verb == "terminal":
                shell.type(lines)
            elif verb == "shows":
                shell.show(normalised("\n".join(lines)))
            elif verb == "columns":
                columns.remove(shell.show(*columns))
            elif verb in ("wait", "restart"):
                shell.wait_for(detail)
            elif verb == "press":
                shell.press(detail)
        if verb == "either":
            those[0].wait_until(lambda these=those, a=detail: a in these[0].text + these[1].read())
            if detail not in those[0].text:
                one, other = (number - 1 for number in numbers)
                shells[one], shells[other] = shells[other], shells[one]
            shells[numbers[0] - 1].wait_for(detail)
        elif verb == "restart":
            broker.stop()
            broker.start()
    for shell in shells:
        shell.finish()


def test_readme_does_what_it_says(broker, terminal, tmp_path):
    folder = shutil.copytree(ROOT, tmp_path / "checkout", ignore=NOT_COPIED)
    with broker.channel() as channel:
        channel.queue_delete("task_queue")
    do(README, [Shell(terminal, folder, broker.url) for _ in range(3)], broker)


def test_no_comment_stands_inside_a_sentence():
    before = "."
    for line in README.splitlines():
        if "<!--" in line:
            assert re.match(COMMENT, line)
            assert not before or before.endswith((".", ":", "!", "?", "```")), before
        else:
            before = line.rstrip(" *_)")


TOLD = """
```sh terminal 3
echo 1
for number in 2 3; do
    echo $number
done
```
<!-- wait 3: 1 -->
```text {}
```
```sh terminal 3
echo {}
```
```text columns 1, 3
TERMINAL 1 │ TERMINAL 3
4          │ 5
```
"""


@pytest.mark.parametrize(
    ("shown", "last", "is_true"),
    [
        ("shows 3\n2\n3", "5", True),
        ("shows 3\n3", "5", False),
        ("shows 3\n2", "5", False),
        ("shows 3\n2\n3\n4", "5", False),
        ("shows 3\n2\n3", "6", False),
    ],
)
def test_what_does_not_appear_is_noticed(terminal, tmp_path, shown, last, is_true):
    shells = [Shell(terminal, tmp_path, "") for _ in range(3)]
    told = f"```sh terminal 1\necho 4\n```\n{TOLD.format(shown, last)}"
    with contextlib.nullcontext() if is_true else pytest.raises(AssertionError):
        do(told, shells)
