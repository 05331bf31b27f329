"""Nothing is lost, whatever is killed: the short form of soak.py."""

import random

from soak import soak


def test_every_confirmed_task_is_done_whatever_is_killed_meanwhile(new_broker, tmp_path):
    faults = {"kills": 4, "outages": 1, "cuts": 1, "stalls": 1}
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    figures = soak(new_broker(), tmp_path, seed=seed, tasks=150, workers=4, **faults)
    print(figures)
    assert figures["confirmed"] == 150
    wrong = {name: value for name, value in figures.items() if name.startswith(("lost", "wrong"))}
    assert not any(wrong.values())
