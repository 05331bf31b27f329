"""Celery with late acknowledgement and confirms; as a script, sends standard input's lines."""

import os
import sys

from celery import Celery

app = Celery(broker=os.environ["AMQP_URL"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_native_delayed_delivery_queue_type="classic",  # 28 queues, which nobody uses here
    broker_transport_options={"confirm_publish": True},
    task_acks_late=True,
    task_default_queue="celery",
    # Only told of a quorum queue does it leave out the global QoS, which these refuse.
    task_default_queue_type=os.environ.get("DECLARE", "classic"),
    task_ignore_result=True,
    worker_prefetch_multiplier=int(os.environ.get("MULTIPLIER", "1")),
)


@app.task(name="do")
def do(text):
    pass


if __name__ == "__main__":
    for line in sys.stdin:
        do.delay(line.removesuffix("\n"))
