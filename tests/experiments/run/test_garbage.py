"""How often Python looks for garbage, in a process of its own."""

import subprocess
import sys

SCRIPT = """
import gc
from ablab.experiments.run.garbage import collect_seldom
looks = []
gc.callbacks.append(lambda phase, info: looks.append(info["generation"]))
if seldom:
    collect_seldom()
kept = [[] for _ in range(50_000)]
a, b = [], []
a.append(b), b.append(a)
print(len(looks), gc.get_threshold()[0] > 0)
"""


def looks(seldom: bool) -> int:
    ended = subprocess.run(
        [sys.executable, "-c", f"{seldom=}\n{SCRIPT}"],
        capture_output=True,
        text=True,
        check=True,
    )
    count, goes_on = ended.stdout.split()
    assert goes_on == "True"
    return int(count)


def test_fifty_thousand_objects_that_stay_are_not_looked_through():
    assert looks(seldom=True) == 0
    assert looks(seldom=False) > 10
