"""Both scripts: a line of diagnostics says what to do, if that is known, and misleads nobody."""

import pytest
from servers import free_port

BOTH_WAYS = ("docker compose up -d --wait", "sudo systemctl start rabbitmq-server")
both_scripts = pytest.mark.parametrize("script", ["new_task.py", "worker.py"])


@pytest.fixture
def crowded(broker, request):
    """The URL of a user, or of a virtual host, that has one connection, and may have no more."""
    what = request.param
    broker.rabbitctl_output("add_user", what, "secret")
    broker.rabbitctl_output("add_vhost", what)
    broker.rabbitctl_output("set_permissions", "-p", what, what, ".*", ".*", ".*")
    limit = '{"max-connections": 1}'
    if what == "user":
        broker.rabbitctl_output("set_user_limits", what, limit)
    else:
        broker.rabbitctl_output("set_vhost_limits", "-p", what, limit)
    url = broker.url_of(login=f"{what}:secret", vhost=what)
    with broker.channel(url) as channel:
        yield url, channel.connection
    broker.rabbitctl_output("delete_user", what)
    broker.rabbitctl_output("delete_vhost", what)


@both_scripts
def test_where_nothing_listens_both_ways_to_start_a_broker_are_named(run, script):
    nowhere = run(f"amqp://127.0.0.1:{free_port()}", script)
    nowhere.wait_for("[!]")
    assert all(way in nowhere.err[0] for way in BOTH_WAYS)


def test_a_worker_names_them_once_in_an_outage(fragile_broker, run, queue):
    worker = run(fragile_broker, "worker.py", "-q", queue)
    worker.wait_for("Waiting")
    for outage in (1, 2):
        fragile_broker.stop()
        worker.wait_for("trying again in 4 s", times=outage)
        fragile_broker.start()
        worker.wait_for("Waiting", times=1 + outage)
        assert len([line for line in worker.err if BOTH_WAYS[0] in line]) == outage


@both_scripts
def test_tls_to_a_port_without_it_is_told_the_other_scheme(run, broker, script):
    script = run(f"amqps://127.0.0.1:{broker.port}", script)
    script.wait_for("[!]")
    assert "amqp://" in script.err[0]


@pytest.mark.parametrize("crowded", ["user", "vhost"], indirect=True)
def test_a_limit_on_connections_is_waited_for_by_a_worker(run, crowded, queue):
    url, other = crowded
    worker = run(url, "worker.py", "-q", queue)
    worker.wait_for("trying again")
    assert "connection limit (1) is reached" in worker.err[0]
    assert "check" not in worker.err[0]
    other.close()
    worker.wait_for("Waiting")


def test_an_exclusive_consumer_of_others_is_waited_for_by_a_worker(run, broker, queue):
    with broker.channel() as channel:
        channel.queue_declare(queue, durable=True)
        channel.basic_consume(queue, lambda *_: None, exclusive=True)
        worker = run(broker, "worker.py", "-q", queue)
        worker.wait_for("exclusive")
        assert "trying again" in worker.err[0]
    worker.wait_for("Waiting")
