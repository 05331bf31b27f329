"""The usual way to confirm: every line of standard input is a task, and a round trip."""

import os
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.queue_declare(queue="task_queue", durable=True)
channel.confirm_delivery()
for line in sys.stdin.buffer:
    channel.basic_publish(
        exchange="",
        routing_key="task_queue",
        body=line.removesuffix(b"\n"),
        properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
        mandatory=True,
    )
    print(f" [x] Sent {line!r}")
connection.close()
