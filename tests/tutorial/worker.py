"""The consumer of RabbitMQ's tutorial "Work queues", to compare ours with.

AMQP_URL names the broker. With DECLARE=quorum the queue is declared as the tutorial has
done it since March 2026, without it as all the years before.
"""

import os
import time

import pika

arguments = {"x-queue-type": "quorum"} if os.environ.get("DECLARE") == "quorum" else None

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()

channel.queue_declare(queue="task_queue", durable=True, arguments=arguments)
print(" [*] Waiting for messages. To exit press CTRL+C")


def callback(ch, method, properties, body):
    print(f" [x] Received {body.decode()}")
    time.sleep(body.count(b"."))
    print(" [x] Done")
    ch.basic_ack(delivery_tag=method.delivery_tag)


channel.basic_qos(prefetch_count=1)
channel.basic_consume(queue="task_queue", on_message_callback=callback)

channel.start_consuming()
