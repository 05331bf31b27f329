"""The producer of RabbitMQ's tutorial "Work queues", to compare ours with.

AMQP_URL names the broker. With DECLARE=quorum the queue is declared as the tutorial has
done it since March 2026, without it as all the years before.
"""

import os
import sys

import pika

arguments = {"x-queue-type": "quorum"} if os.environ.get("DECLARE") == "quorum" else None

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()

channel.queue_declare(queue="task_queue", durable=True, arguments=arguments)

message = " ".join(sys.argv[1:]) or "Hello World!"
channel.basic_publish(
    exchange="",
    routing_key="task_queue",
    body=message,
    properties=pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent),
)
print(f" [x] Sent {message}")
connection.close()
