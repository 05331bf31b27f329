"""A consumer with kombu, of tasks without work: late acknowledgement, prefetch count 1."""

import os

from kombu import Connection, Queue


def callback(message):
    print(f" [x] Received {bytes(message.body).decode()}")
    print(" [x] Done")
    message.ack()


with Connection(os.environ["AMQP_URL"]) as connection:
    queue = Queue("task_queue", durable=True)
    with connection.Consumer(queue, on_message=callback, prefetch_count=1):
        while True:
            connection.drain_events()
