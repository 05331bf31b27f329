"""A consumer with aio-pika, of tasks without work: late acknowledgement, prefetch count 1."""

import asyncio
import os

import aio_pika


async def callback(message):
    async with message.process():  # which acknowledges
        print(f" [x] Received {message.body.decode()}")
        print(" [x] Done")


async def main():
    async with await aio_pika.connect(os.environ["AMQP_URL"]) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=1)
        queue = await channel.declare_queue("task_queue", durable=True)
        await queue.consume(callback)
        await asyncio.Future()


asyncio.run(main())
