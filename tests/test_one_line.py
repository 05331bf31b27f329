"""README's two lines that do everything on a bare machine."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, copy_checkout

README = (ROOT / "README.md").read_text()
DEMO, TESTS = re.findall(r"^```sh\n(tests/setup\.sh .+)\n```$", README, re.MULTILINE)


@pytest.fixture
def checkout():
    """A copy of this checkout that any user can reach, unlike pytest's own folders."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield copy_checkout(Path(folder) / "checkout")


def test_the_first_line_shows_what_readme_shows_to_any_user(checkout):
    program, environment = ["sh", "-c", DEMO], {**os.environ, "HOME": str(checkout)}
    if os.getuid() == 0:
        subprocess.run(["chown", "-R", "nobody", checkout], check=True)
        program = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *program]
        environment["PATH"] = "/usr/local/bin:/usr/bin:/bin"  # where nobody may look
    output = subprocess.check_output(program, cwd=checkout, env=environment, text=True)

    (told,) = re.findall(r"^Terminal 1, at the end:\n```text\n((?:.*\n)*?)```$", README, re.M)
    assert without_times(output).endswith(without_times(told))


def without_times(text):
    return re.sub(r"\d+\.\d s", "", text)


def test_ci_runs_the_second_line_from_a_bare_checkout():
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands.index(TESTS) == min(
        number for number, line in enumerate(commands) if "tests/" in line
    )
