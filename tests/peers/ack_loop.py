"""The least that a consumer does with pika: it acknowledges, and neither prints nor decodes."""

import os

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.queue_declare(queue="task_queue", durable=True)
channel.basic_qos(prefetch_count=1)
channel.basic_consume("task_queue", lambda ch, method, *_: ch.basic_ack(method.delivery_tag))
channel.start_consuming()
