#!/usr/bin/env python3
"""Show two workers share the tutorial's five tasks, on a broker started for the occasion.

    tests/demo.py            ends by itself, after nine seconds of work
    AMQP_URL=... tests/demo.py    the same, on that broker

Needs pika, and RabbitMQ's server unless AMQP_URL is set; uses the queue "demo".
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")  # where Debian's package has it
TASKS = (
    "First message.",
    "Second message..",
    "Third message...",
    "Fourth message....",
    "Fifth message.....",
)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def accepts_connections(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def private_broker():
    """Run a RabbitMQ server with its own ports and folder; give its URL."""
    if not SERVER.exists():
        sys.exit("No RabbitMQ server here; to install one: sudo apt-get install rabbitmq-server")
    port, epmd = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="demo-broker-") as folder:
        environment = {
            **os.environ,
            "HOME": folder,
            "ERL_EPMD_PORT": str(epmd),
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/none",
            "RABBITMQ_NODENAME": f"demo-{port}@localhost",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": folder,
            "RABBITMQ_LOG_BASE": folder,
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
        }
        server = subprocess.Popen(
            [SERVER], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            while not accepts_connections(port):
                time.sleep(0.1)
            yield f"amqp://guest:guest@127.0.0.1:{port}/%2F"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
            subprocess.run(["epmd", "-kill"], env=environment, stdout=subprocess.DEVNULL)


def start(url, name, happened, script, *arguments):
    """Run a script; show its lines under a name, and tell happened() of each."""
    process = subprocess.Popen(
        [sys.executable, ROOT / script, "--queue", "demo", *arguments],
        env={**os.environ, "AMQP_URL": url},
        stdout=subprocess.PIPE,
        text=True,
    )

    def show():
        for line in process.stdout:
            print(f"{name} |{line}", end="", flush=True)
            happened(line)

    threading.Thread(target=show, daemon=True).start()
    return process


def main():
    waiting, done = threading.Semaphore(0), threading.Semaphore(0)

    def happened(line):
        if "Waiting" in line:
            waiting.release()
        if "Done" in line:
            done.release()

    with contextlib.ExitStack() as stack:
        url = os.environ.get("AMQP_URL") or stack.enter_context(private_broker())
        for name in ("worker 1", "worker 2"):
            stack.callback(start(url, name, happened, "worker.py").terminate)
        waiting.acquire()
        waiting.acquire()
        for task in TASKS:
            start(url, "producer", happened, "new_task.py", *task.split()).wait()
        for _ in TASKS:
            done.acquire()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
