"""The least that a stream with confirms does: count_loop.py TASKS. It reads and prints nothing."""

import os
import sys

import pika

TASKS = int(sys.argv[1])
WINDOW = 1000  # tasks that may be unconfirmed
PERSISTENT = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)


class Stream:
    def __init__(self):
        self.unconfirmed, self.oldest, self.tag = set(), 1, 0

    def on_open(self, connection):
        self.connection = connection
        connection.channel(on_open_callback=self.on_channel)

    def on_channel(self, channel):
        self.channel = channel
        channel.queue_declare("task_queue", durable=True)
        channel.confirm_delivery(self.on_confirm, callback=lambda _: self.publish())

    def publish(self):
        while self.tag < TASKS and len(self.unconfirmed) < WINDOW:
            self.tag += 1
            self.unconfirmed.add(self.tag)
            body = b"%010d" % self.tag
            self.channel.basic_publish("", "task_queue", body, PERSISTENT, mandatory=True)

    def on_confirm(self, frame):
        tag = frame.method.delivery_tag
        if frame.method.multiple:
            self.unconfirmed.difference_update(range(self.oldest, tag + 1))
            self.oldest = tag + 1
        else:
            self.unconfirmed.discard(tag)
        self.publish()
        if not self.unconfirmed:
            self.connection.close()


stream = Stream()
parameters = pika.URLParameters(os.environ["AMQP_URL"])
connection = pika.SelectConnection(parameters, stream.on_open)
connection.add_on_close_callback(lambda *_: connection.ioloop.stop())
connection.ioloop.start()
