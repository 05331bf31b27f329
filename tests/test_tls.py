"""Both scripts, with TLS: the broker's certificate has to be good, or one line says why not."""

import contextlib
import socket
import ssl
import threading
from datetime import datetime, timedelta, timezone

import pytest
import trustme
from conftest import refused
from servers import accepts_connections, free_port, wait_until

both_scripts = pytest.mark.parametrize("script", ["new_task.py", "worker.py"])


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate authority, and a folder with its certificate."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    authority.folder = folder
    authority.trusted = f"?ssl_options={{'ca_certs':'{folder / 'ca.pem'}'}}"
    return authority


@pytest.fixture(scope="module")
def port(new_broker, authority):
    """The TLS port of a server whose certificate is good for localhost."""
    certificate, folder, port = authority.issue_cert("localhost"), authority.folder, free_port()
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
    new_broker(
        f"""
        listeners.ssl.default = 127.0.0.1:{port}
        ssl_options.certfile = {folder / "certificate.pem"}
        ssl_options.keyfile = {folder / "key.pem"}
        """
    )
    wait_until(lambda: accepts_connections(port))  # it may open later than the other port
    return port


@pytest.fixture(scope="module")
def expired_port(authority):
    """The port of a peer whose certificate was good until yesterday."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    yesterday = datetime.now(timezone.utc) - timedelta(days=1)
    authority.issue_cert("localhost", not_after=yesterday).configure_cert(context)
    server = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            with contextlib.suppress(ssl.SSLError, ConnectionError), server.accept()[0] as client:
                context.wrap_socket(client, server_side=True)

    threading.Thread(target=accept, daemon=True).start()
    return server.getsockname()[1]


@both_scripts
def test_a_certificate_is_accepted_with_its_authority_in_the_url(
    run, authority, port, queue, script
):
    accepted = run(f"amqps://localhost:{port}/{authority.trusted}", script, "-q", queue)
    accepted.wait_for("Sent" if script == "new_task.py" else "Waiting")


@both_scripts
def test_a_certificate_that_does_not_verify_is_refused(
    run, authority, port, expired_port, queue, script
):
    cases = {
        f"amqps://localhost:{port}/": "issuer certificate",
        f"amqps://127.0.0.1:{port}/{authority.trusted}": "not valid for '127.0.0.1'",
        f"amqps://localhost:{expired_port}/{authority.trusted}": "certificate has expired",
    }
    for url, ended in {url: run(url, script, "-q", queue) for url in cases}.items():
        refused(ended, "CERTIFICATE_VERIFY_FAILED", cases[url])
        assert len(ended.err) == 1


@both_scripts
def test_an_authority_that_is_not_there_is_told(run, port, script):
    ended = run(f"amqps://localhost:{port}/?ssl_options={{'ca_certs':'/no/such.pem'}}", script)
    assert ended.wait() == 2
    assert "No such file" in ended.err[-1]
