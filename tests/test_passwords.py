"""Both scripts: a password is in no output, whatever is wrong with its URL."""

import pytest
from servers import wait_until

SECRETS = ("s3cr3t", "987654", "t0ken")  # no piece of any password may be printed

URLS = {
    "nothing listening": "amqp://guest:s3cr3t@127.0.0.1:1",
    "wrong password": "amqp://guest:s3cr3t@127.0.0.1:{port}",
    "unknown virtual host": "amqp://guest:s3cr3t@127.0.0.1:{port}/t",
    "a slash in it": "amqp://guest:s3cr3t/t0ken@127.0.0.1:{port}",
    "a slash after a number": "amqp://guest:987654/t0ken@127.0.0.1",
    "a question mark in it": "amqp://guest:s3cr3t?t0ken@127.0.0.1",
    "a question mark and a setting": "amqp://guest:987654?heartbeat=t0ken@127.0.0.1",
    "a hash after a number": "amqp://guest:987654#t0ken@127.0.0.1",
    "an at sign in it": "amqp://guest:987654@s3cr3t@127.0.0.1:1",
    "an at sign and a slash": "amqp://guest:987654@s3cr3t/t0ken@127.0.0.1",
    "a colon in it": "amqp://guest:s3cr3t:t0ken@127.0.0.1:1",
    "a comma in it": "amqp://guest:s3cr3t,t0ken@127.0.0.1:1",
    "a per cent sign in it": "amqp://guest:s3cr3t%zzt0ken@127.0.0.1:1",
    "a bad port": "amqp://guest:s3cr3t@127.0.0.1:port",
    "a port out of range": "amqp://guest:s3cr3t@127.0.0.1:99999",
    "a bad setting": "amqp://guest:s3cr3t@127.0.0.1?heartbeat=t0ken",
    "an unknown setting": "amqp://guest:s3cr3t@127.0.0.1?t0ken=1",
    "a bad IPv6 address": "amqp://guest:s3cr3t@[::1",
    "a scheme that isn't AMQP's": "https://guest:s3cr3t@127.0.0.1",
    "no scheme": "guest:s3cr3t@127.0.0.1",
    "a password alone": "s3cr3t",
    "a user alone": "amqp://s3cr3t@127.0.0.1",
    "a host that can't be": "amqp://guest:s3cr3t@a..b:1",
    "a good one and a bad one": "amqp://guest:s3cr3t@127.0.0.1:1,amqp://guest:t0ken@h:x",
    "a key's password": "amqps://guest:s3cr3t@127.0.0.1?ssl_options={{'certfile':'/n','password':'t0ken'}}",
}


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_no_password_is_printed_for_any_failing_url(run, broker, script):
    urls = [url.format(port=broker.port) for url in URLS.values()]
    started = [run(url, script) for url in urls]
    started += [run(broker, script, "--url", url) for url in urls]
    started += [run(broker, script, f"--ulr={url}") for url in urls]
    for name, ended in zip(3 * list(URLS), started):
        wait_until(lambda ended=ended: ended.err)
        if "trying again" not in ended.err[0]:
            assert ended.wait() in (1, 2), name
        printed = "\n".join(ended.out + ended.err)
        assert not any(secret in printed for secret in SECRETS), f"{name}: {printed}"


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_help_shows_no_value_of_the_environment(run, script):
    helped = run("amqp://guest:s3cr3t@127.0.0.1", script, "--help")
    assert helped.wait() == 0
    assert "AMQP_URL" in "\n".join(helped.out)
    assert not any("s3cr3t" in line for line in helped.out + helped.err)
