"""aio-pika with confirms, a thousand awaited together; sends standard input's lines."""

import asyncio
import itertools
import os
import sys

import aio_pika


async def main():
    async with await aio_pika.connect(os.environ["AMQP_URL"]) as connection:
        channel = await connection.channel()
        await channel.declare_queue("task_queue", durable=True)

        async def publish(line):
            body, mode = line.removesuffix(b"\n"), aio_pika.DeliveryMode.PERSISTENT
            message = aio_pika.Message(body, delivery_mode=mode)
            await channel.default_exchange.publish(message, routing_key="task_queue")

        while window := [*itertools.islice(sys.stdin.buffer, 1000)]:
            await asyncio.gather(*map(publish, window))
            for line in window:
                print(f" [x] Sent {line!r}")


asyncio.run(main())
