"""Nothing is lost, whatever is killed: the short form of soak.py."""

from soak import soak


def test_every_confirmed_task_comes_to_its_end_whatever_is_killed(
    broker, vhosts, moments, tmp_path
):
    kind = "quorum" if broker.version() >= (4, 0) else "classic"
    with broker.channel(vhosts[kind]) as channel:
        for suffix in ("", ".retry", ".dlq"):
            channel.queue_delete(f"task_queue{suffix}")
    faults = {"kills": 3, "outages": 1, "cuts": 1, "stalls": 1}
    size = {"tasks": 100, "rate": 10, "workers": 4}
    seed = moments.randrange(10**6)
    vhost = "q" if kind == "quorum" else "%2F"
    figures = soak([broker], tmp_path, vhost=vhost, seed=seed, **size, **faults)
    print(figures)
    assert figures["confirmed"] == figures["tasks"]
    wrong = {name: value for name, value in figures.items() if name.startswith(("lost", "wrong"))}
    assert not any(wrong.values())
