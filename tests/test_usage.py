"""Both scripts: options, their defaults, and what is a usage error."""

import shutil

import pytest
from conftest import ROOT, Script
from servers import free_port, wait_until


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
        ["worker.py", "-p", "1.5"],
        ["worker.py", "--retries", "-1"],
        ["worker.py", "--retries", "1.5"],
        ["worker.py", "--retries", "many"],
        ["worker.py", "--retry-delay", "-1"],
        ["worker.py", "--retry-delay", "4294968"],
        ["worker.py", "--retry-delay", "soon"],
        ["worker.py", "--retry-delay", "nan"],
        ["worker.py", "--time-limit", "0"],
        ["worker.py", "--time-limit", "-1"],
        ["worker.py", "--time-limit", "soon"],
    ],
)
def test_wrong_options_are_a_usage_error_of_one_line(run, broker, arguments):
    ended = run(broker, *arguments)
    assert ended.wait() == 2
    (line,) = ended.err
    assert "--help" in line
    assert ended.out == []


def test_a_wrong_number_of_retries_is_told_what_is_expected(run, broker):
    ended = run(broker, "worker.py", "--retries", "1.5")
    assert ended.wait() == 2
    assert "--retries: expected a whole number, 0 or more" in ended.err[0]


def test_the_defaults_are_three_retries_after_30_seconds_each(run, broker, queue, send):
    send(broker, queue, "task")
    worker = run(broker, "worker.py", "-q", queue, "false")
    for tries in (1, 2, 3):
        worker.wait_for("to be tried again in 30 s", times=tries)
        wait_until(lambda: broker.ready(f"{queue}.retry") == 1)
        with broker.channel() as channel:
            _, properties, body = channel.basic_get(f"{queue}.retry", auto_ack=True)
            assert properties.headers["x-retry-count"] == tries
            assert properties.expiration == "30000"
            properties.expiration = None  # so that the test need not wait for it
            channel.basic_publish("", queue, body, properties)
    worker.wait_for(f"it goes to {queue}.dlq")


def test_the_default_is_no_time_limit_and_the_tutorials_queue(run, broker):
    helped = run(broker, "worker.py", "--help")
    assert helped.wait() == 0
    text = " ".join(" ".join(helped.out).split())
    assert "takes longer fails (default: none)" in text
    assert "--queue QUEUE default: task_queue" in text


@pytest.mark.parametrize("length", [249, 250])
def test_a_worker_takes_queue_names_with_room_for_retry_behind_them(run, broker, length):
    worker = run(broker, "worker.py", "-q", "x" * length)
    if length == 249:
        worker.wait_for("Waiting")
    else:
        assert worker.wait() == 2
        assert "--queue" in worker.err[0]


@pytest.mark.parametrize("prefetch_count", ["0", "65535"])
def test_the_bounds_of_the_prefetch_count_are_accepted(run, broker, queue, prefetch_count):
    run(broker, "worker.py", "-q", queue, "-p", prefetch_count).wait_for("Waiting")


def test_the_option_goes_before_the_environment(run, broker, queue):
    nowhere = f"amqp://127.0.0.1:{free_port()}"
    assert run(nowhere, "new_task.py", "-u", broker.url, "-q", queue).wait() == 0


def test_several_urls_are_tried_in_order(run, broker, queue):
    nowhere = f"amqp://127.0.0.1:{free_port()}"
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
