"""Both scripts: options, their defaults, and what is a usage error."""

import shutil

import port_for
import pytest
from conftest import ROOT, Script


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_help_shows_examples_and_options(run, broker, script):
    helped = run(broker, script, "-h")
    assert helped.wait() == 0
    text = "\n".join(helped.out)
    assert text.count(f"    {script}") >= 3
    assert "--url" in text
    assert "--queue" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["new_task.py", "--unknown"],
        ["new_task.py", "-u"],
        ["new_task.py", "-u", "http://localhost"],
        ["worker.py", "--unknown"],
        ["worker.py", "-p", "-1"],
        ["worker.py", "-p", "65536"],
        ["worker.py", "-p", "many"],
    ],
)
def test_wrong_options_are_a_usage_error_of_one_line(run, broker, arguments):
    ended = run(broker, *arguments)
    assert ended.wait() == 2
    (line,) = ended.err
    assert "--help" in line
    assert ended.out == []


@pytest.mark.parametrize("prefetch_count", ["0", "65535"])
def test_the_bounds_of_the_prefetch_count_are_accepted(run, broker, queue, prefetch_count):
    run(broker, "worker.py", "-q", queue, "-p", prefetch_count).wait_for("Waiting")


def test_the_option_goes_before_the_environment(run, broker, queue):
    nowhere = f"amqp://127.0.0.1:{port_for.select_random()}"
    assert run(nowhere, "new_task.py", "-u", broker.url, "-q", queue).wait() == 0


def test_several_urls_are_tried_in_order(run, broker, queue):
    nowhere = f"amqp://127.0.0.1:{port_for.select_random()}"
    urls = f"{nowhere},{broker.url}"
    assert run(urls, "new_task.py", "-q", queue, "First message").wait() == 0
    run(urls, "worker.py", "-q", queue).wait_for("Done")


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_a_script_works_alone_in_another_folder(broker, queue, tmp_path, script):
    shutil.copy(ROOT / script, tmp_path)
    alone = Script([tmp_path / script, "-q", queue], broker.url)
    try:
        alone.wait_for("Sent" if script == "new_task.py" else "Waiting")
    finally:
        alone.process.kill()
