"""RQ, with the Redis that REDIS_URL names; as a script, sends standard input's lines."""

import os
import sys

from redis import Redis
from rq import Queue


def do(text):
    pass


if __name__ == "__main__":
    queue = Queue("rq", connection=Redis.from_url(os.environ["REDIS_URL"]))
    for line in sys.stdin:
        queue.enqueue("rq_tasks.do", line.removesuffix("\n"), result_ttl=0)
