#!/usr/bin/env bash
# Run docker-compose.yml on a Docker engine: the broker alone, then the whole demo; check what
# they show, and remove everything. Takes half a minute. The broker's ports are moved to free
# ones, so that one of your own may go on running.
set -euo pipefail
cd "$(dirname "$0")/.."

compose() {
    docker compose --file docker-compose.yml --file - "$@" <<'END'
name: work-queue-test
services:
  rabbitmq:
    ports: !override ["127.0.0.1::5672", "127.0.0.1::15672"]
END
}
workers() {
    for number in 1 2; do docker logs "work-queue-test-worker-$number" 2>&1; done
}
until_workers_print() { # number of lines, text
    for _ in $(seq 300); do
        [ "$(workers | grep -c "$2")" -lt "$1" ] || return 0
        sleep 0.2
    done
    workers
    return 1
}
trap 'compose --profile demo down --volumes --rmi local >/dev/null 2>&1' EXIT

compose up --detach --wait
docker exec work-queue-test-rabbitmq-1 rabbitmqctl -q list_vhosts name default_queue_type |
    grep -P '^/\tquorum$'

compose --profile demo up --detach
[ "$(timeout 60 docker wait work-queue-test-producer-1)" = 0 ]
until_workers_print 5 ' \[x\] Done'
shares=$(for number in 1 2; do
    docker logs "work-queue-test-worker-$number" | sed -n "s/.*Received '\(\w*\).*/\1/p" | paste -sd ' '
done | sort)
echo "$shares"
[ "$shares" = $'First Third Fifth\nSecond Fourth' ]
docker exec work-queue-test-rabbitmq-1 rabbitmqctl -q list_queues name type |
    grep -P '^task_queue\tquorum$'
[ "$(docker exec work-queue-test-worker-1 id -u)" != 0 ]

docker exec work-queue-test-worker-1 python new_task.py A last task....
until_workers_print 1 'A last task'
docker stop work-queue-test-worker-1 work-queue-test-worker-2
[ "$(docker inspect -f '{{.State.ExitCode}}' work-queue-test-worker-{1,2} | sort -u)" = 0 ]
until_workers_print 6 ' \[x\] Done'
echo "docker-compose.yml works as README says"
