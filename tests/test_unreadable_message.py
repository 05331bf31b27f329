"""`worker.py`: a message that pika can't read is in the way: the line says so, and what to do."""

import struct

import pika
import pika.data


def test_a_date_past_the_year_9999_is_named_with_the_way_to_get_rid_of_it(
    run, broker, queue, monkeypatch
):
    def with_late_dates(pieces, value, encode=pika.data.encode_value):
        if value != "late":
            return encode(pieces, value)
        pieces.append(struct.pack(">cQ", b"T", 1_700_000_000_000))  # milliseconds, for seconds
        return 9

    with broker.channel() as channel, monkeypatch.context() as patched:
        patched.setattr(pika.data, "encode_value", with_late_dates)
        channel.queue_declare(queue, durable=True)
        channel.basic_publish("", queue, b"task", pika.BasicProperties(headers={"when": "late"}))
        channel.basic_publish("", queue, b"next")
    worker = run(broker, "worker.py", "-q", queue)
    worker.wait_for("trying again in 2 s")
    assert "year" in worker.err[0]
    assert "Get messages" in worker.err[0]
    with broker.channel() as channel:
        channel.queue_purge(queue)
        channel.basic_publish("", queue, b"later")
    worker.wait_for("Done")
    assert worker.tasks("Received") == ["later"]
