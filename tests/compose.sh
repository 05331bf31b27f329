#!/usr/bin/env bash
# Run docker-compose.yml on a Docker engine: the broker alone, the whole demo, then a cluster whose
# nodes are killed in mid-stream; check what they show, and remove everything. Takes three minutes.
# The ports are moved to free ones, so that a broker of your own may go on running.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x $python ] || python=python3
output=$(mktemp -d)

# Docker would choose other ports after a restart. From 32768 on, clients might take them meanwhile.
ports=($(for port in $(shuf -i 20000-30000 -n 20); do
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || echo "$port"
done))
urls="amqp://localhost:${ports[0]},amqp://localhost:${ports[1]},amqp://localhost:${ports[2]}"

edited= # more lines for the second file
compose() {
    docker compose --file docker-compose.yml --file - "$@" <<END
name: work-queue-test
services:
  rabbitmq:
    ports: !override ["127.0.0.1:${ports[0]}:5672", "127.0.0.1::15672"]
  rabbitmq2:
    ports: !override ["127.0.0.1:${ports[1]}:5672"]
  rabbitmq3:
    ports: !override ["127.0.0.1:${ports[2]}:5672"]
$edited
END
}
clean_up() {
    status=$?
    set +e
    [ $status = 0 ] || { compose --profile '*' logs --tail 20; tail "$output"/*; }
    kill $(jobs -p) 2>/dev/null
    compose --profile '*' down --volumes --rmi local >/dev/null 2>&1
    rm -r "$output"
    exit $status
}
trap clean_up EXIT

within() { # seconds, command to repeat until it succeeds
    local end=$((SECONDS + $1))
    until "${@:2}"; do
        [ $SECONDS -lt $end ] || { echo "not within $1 s: ${*:2}"; return 1; }
        sleep 0.2
    done
}
ctl() {
    docker exec work-queue-test-rabbitmq-1 rabbitmqctl -q "$@"
}
state_of() { # service, what docker inspect has about it
    docker inspect -f "{{$2}}" "work-queue-test-$1"
}

# ---- The broker alone ----

compose up --detach --wait
[ "$(compose ps --all --quiet | wc -l)" = 1 ]
ctl list_vhosts name default_queue_type | grep -P '^/\tquorum$'

# ---- The demo ----

workers() {
    for number in 1 2; do docker logs "work-queue-test-worker-$number" 2>&1; done
}
workers_print() { # number of lines, text
    [ "$(workers | grep -c "$2")" -ge "$1" ]
}
compose --profile demo up --detach
[ "$(timeout 60 docker wait work-queue-test-producer-1)" = 0 ]
within 60 workers_print 5 ' \[x\] Done'
shares=$(for number in 1 2; do
    docker logs "work-queue-test-worker-$number" | sed -n "s/.*Received '\(\w*\).*/\1/p" | paste -sd ' '
done | sort)
echo "$shares"
[ "$shares" = $'First Third Fifth\nSecond Fourth' ]
ctl list_queues name type | grep -P '^task_queue\tquorum$'
[ "$(docker exec work-queue-test-worker-1 id -u)" != 0 ]

docker exec work-queue-test-worker-1 python new_task.py A last task....
within 60 workers_print 1 'A last task'
docker stop work-queue-test-worker-1 work-queue-test-worker-2
[ "$(state_of worker-1 .State.ExitCode) $(state_of worker-2 .State.ExitCode)" = '0 0' ]
within 60 workers_print 6 ' \[x\] Done'
compose --profile demo rm --force worker producer

# ---- A container of your own ----

run() { # options of docker run and the image, then the command
    docker run --rm --network work-queue-test_default "$@"
}
has_tasks() { # queue, number
    ctl list_queues name messages | grep -P "^$1\t$2$"
}
run -e AMQP_URL=amqp://guest:guest@rabbitmq work-queue-test-worker python new_task.py -q named Hello
within 30 has_tasks named 1
status=0
run work-queue-test-worker python new_task.py 2>"$output/refused" || status=$?
[ $status = 1 ]
grep 'localhost is the container itself' "$output/refused"

# ---- A cluster on top of the broker, which has tasks ----

send() {
    AMQP_URL=$urls $python new_task.py - >>"$output/sent"
}
is_waiting() { # worker, at least so many times
    [ "$(grep -c Waiting "$output/worker-$1")" -ge "$2" ]
}
done_tasks() {
    awk -F "'" '/ Received / {task = $2} / Done/ {print task}' "$output"/worker-*
}
some_done() { # number of tasks
    [ "$(done_tasks | wc -l)" -ge "$1" ]
}
all_done() {
    diff <(sort -u "$output/tasks") <(done_tasks | sort -u) >"$output/missing"
}
first_done() { # the first so many tasks
    [ -z "$(comm -23 <(head -n "$1" "$output/tasks" | sort) <(done_tasks | sort))" ]
}
three_online() { # members of the queue
    ctl list_queues name members online | grep -P '^task_queue(\t\[(rabbit@\w+(, )?){3}\]){2}$'
}
stream() { # at least 20,000 lines, the second half of them fast only after the second kill
    local line=0 lines
    while [ $line -lt 20000 ]; do
        lines=100
        [ $line -lt 10000 ] || [ "$(wc -l <"$output/killed")" = 2 ] || lines=10
        seq $((line + 1)) $((line += lines))
        sleep 0.1
    done
}
kill_node_of_worker_1() { # for the first or the second time
    local node
    node=$(ctl list_connections pid client_properties |
        sed -n "s/^<rabbit@\(\w*\)\..*\"worker.py ${pids[1]}\".*/\1/p")
    compose kill "$node"
    echo "$node" >>"$output/killed"
    within 30 is_waiting 1 $(($1 + 1))
    within 30 first_done $(($(done_tasks | wc -l) + 20)) # with those that were in hand
    [ "$(state_of "$node-1" .State.Status)" = exited ]
    compose --profile cluster up --detach --wait
    within 60 three_online
}
seq -f 'before %g' 1000 | tee "$output/tasks" | send
compose --profile cluster up --detach --wait
within 60 three_online
for number in 1 2; do # each line that they print gets the time
    AMQP_URL=$urls $python worker.py --prefetch-count 10 > >($python -uc '
import sys, time
for line in sys.stdin:
    print(time.time(), line, end="")' >"$output/worker-$number") 2>&1 &
    pids[number]=$!
done
within 60 is_waiting 1 1
within 60 is_waiting 2 1
touch "$output/killed"
stream | tee -a "$output/tasks" | send &
within 60 some_done 3000
kill_node_of_worker_1 1
kill_node_of_worker_1 2
wait $! # its status is 0 if every task was confirmed
[ "$(wc -l <"$output/sent")" = "$(wc -l <"$output/tasks")" ]
within 60 all_done
kill "${pids[@]}"
for number in 1 2; do
    awk '/ Done/ {if (last && $1 - last > pause) pause = $1 - last; last = $1}
        END {printf "longest pause: %.1f s\n", pause; exit pause > 5}' "$output/worker-$number"
done

# ---- A crash, and a stop of all nodes ----

docker exec work-queue-test-rabbitmq2-1 rabbitmqctl eval 'halt(1).' >/dev/null 2>&1 || :
restarted() { [ "$(state_of rabbitmq2-1 .RestartCount)" = 1 ]; }
within 30 restarted
within 60 three_online
seq 10 | send
compose --profile cluster stop
compose --profile cluster up --detach --wait
within 60 three_online
within 30 has_tasks task_queue 10

# ---- An edited config ----

disconnected_timeout() {
    ctl environment | grep -oP 'consumer_disconnected_timeout,\K\d+'
}
[ "$(disconnected_timeout)" = 5000 ]
# Without --force-recreate, Compose keeps the old one: github.com/docker/compose/issues/11900.
edited='configs: {queues: {content: consumer_disconnected_timeout = 7000}}'
compose --profile cluster up --detach --wait --force-recreate
[ "$(disconnected_timeout)" = 7000 ]
within 60 three_online
within 30 has_tasks task_queue 10
edited=

# ---- A cluster from nothing, with a cookie of its own ----

compose --profile cluster down --volumes
export COOKIE=a-secret
compose --profile cluster up --detach --wait
[ "$(ctl eval 'erlang:get_cookie().')" = "'a-secret'" ]
echo Hello World! | send
within 60 three_online
compose --profile cluster down --volumes
for kind in container volume network; do
    [ -z "$(docker $kind ls -q --filter label=com.docker.compose.project=work-queue-test)" ]
done
echo "docker-compose.yml works as README says"
