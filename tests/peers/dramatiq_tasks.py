"""Dramatiq with confirms (it acknowledges late); as a script, sends standard input's lines."""

import os
import sys

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

dramatiq.set_broker(RabbitmqBroker(url=os.environ["AMQP_URL"], confirm_delivery=True))


@dramatiq.actor(queue_name="dramatiq")
def do(text):
    pass


if __name__ == "__main__":
    for line in sys.stdin:
        do.send(line.removesuffix("\n"))
