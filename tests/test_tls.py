"""Both scripts, with TLS: the broker's certificate has to be good, or one line says why not."""

from datetime import datetime, timedelta, timezone

import port_for
import pytest
import trustme
from servers import free_port, wait_until

BOUND = 30  # seconds in which a script that can't work has ended
NOW = datetime.now(timezone.utc)


@pytest.fixture(scope="module")
def new_tls_broker(new_broker, tmp_path_factory):
    """Start a server with a certificate of a CA of its own: new_tls_broker(not_after)."""

    def start(not_after=NOW + timedelta(days=1)):
        folder, ca = tmp_path_factory.mktemp("tls"), trustme.CA()
        ca.cert_pem.write_to_path(folder / "ca.pem")
        certificate = ca.issue_cert("localhost", not_after=not_after)
        certificate.private_key_pem.write_to_path(folder / "key.pem")
        certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
        port = free_port()
        broker = new_broker(
            f"""
            listeners.ssl.default = 127.0.0.1:{port}
            ssl_options.certfile = {folder / "certificate.pem"}
            ssl_options.keyfile = {folder / "key.pem"}
            """
        )
        wait_until(lambda: port_for.port_is_used(port))  # it may open later than the other port
        broker.trusted = f"?ssl_options={{'ca_certs':'{folder / 'ca.pem'}'}}"
        broker.tls = lambda host, query="": f"amqps://guest:guest@{host}:{port}/%2F{query}"
        return broker

    return start


@pytest.fixture(scope="module")
def tls_broker(new_tls_broker):
    """A server whose certificate is good for one who knows its CA."""
    return new_tls_broker()


@pytest.fixture(scope="module")
def expired_broker(new_tls_broker):
    """A server whose certificate was good until yesterday."""
    return new_tls_broker(NOW - timedelta(days=1))


def refused(script, *words):
    assert script.wait(BOUND) == 1, script.out
    (line,) = script.err
    assert line.startswith(" [!] ")
    for word in ("CERTIFICATE_VERIFY_FAILED", *words):
        assert word in line


both_scripts = pytest.mark.parametrize("script", ["new_task.py", "worker.py"])


@both_scripts
def test_a_certificate_is_accepted_with_its_ca_in_the_url(run, tls_broker, queue, script):
    accepted = run(tls_broker.tls("localhost", tls_broker.trusted), script, "-q", queue)
    accepted.wait_for("Sent" if script == "new_task.py" else "Waiting")


@both_scripts
def test_a_certificate_of_an_unknown_ca_is_refused(run, tls_broker, queue, script):
    refused(run(tls_broker.tls("localhost"), script, "-q", queue), "?ssl_options=")


@both_scripts
def test_a_certificate_for_another_host_is_refused(run, tls_broker, queue, script):
    url = tls_broker.tls("127.0.0.1", tls_broker.trusted)
    refused(run(url, script, "-q", queue), "not valid for '127.0.0.1'")


@both_scripts
def test_an_expired_certificate_is_refused(run, expired_broker, queue, script):
    url = expired_broker.tls("localhost", expired_broker.trusted)
    refused(run(url, script, "-q", queue), "certificate has expired")
