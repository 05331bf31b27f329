#!/bin/sh
# What the tests and the demo need, on a bare Debian or Ubuntu: RabbitMQ's server, and Python
# packages in .venv. What is there already is left as it is.
set -eu
cd "$(dirname "$0")/.."

if ! [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || ! python3 -c 'import ensurepip'; then
    as_root=$([ "$(id -u)" = 0 ] || echo sudo)
    echo "Installing RabbitMQ's server and Python's venv with apt-get ..."
    $as_root apt-get update
    $as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y --no-install-recommends --no-upgrade rabbitmq-server python3-venv
fi
echo "Installing the tests' Python packages into .venv ..."
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/pip install --quiet --requirement tests/requirements.txt
