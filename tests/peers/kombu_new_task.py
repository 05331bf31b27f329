"""kombu with confirms, a round trip each; sends standard input's lines."""

import os
import sys

from kombu import Connection, Queue

options = {"confirm_publish": True}
with Connection(os.environ["AMQP_URL"], transport_options=options) as connection:
    producer = connection.Producer()
    Queue("task_queue", channel=producer.channel, durable=True).declare()
    for line in sys.stdin.buffer:
        producer.publish(
            line.removesuffix(b"\n"),
            routing_key="task_queue",
            content_type="application/octet-stream",
            content_encoding="binary",
            mandatory=True,
        )
        print(f" [x] Sent {line!r}")
