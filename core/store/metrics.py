"""The numbers that a run leaves, by name: which way is better where that is known, and in which unit.  No torch here.

Held-out and training losses are logged (core/train/run.py:Loop), a pace and a peak of memory stand in the result.
Names below `layer/` and `eval/` are open: who logs them is not asked here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Known:
    """better: None where neither way is, as of a gradient's norm.

    nears: its curve says how far training has come, so that a speedup can be read off it.
    """

    better: Better | None
    unit: str
    nears: bool = False


LOGGED: Mapping[str, Known] = {  # by every run
    "val/bits_per_byte": Known("lower", "bits/byte", nears=True),
    "val/loss": Known("lower", "nats/token", nears=True),
    "train/loss": Known("lower", "nats/token", nears=True),
    "train/grad_norm": Known(None, "norm"),
    "optim/lr": Known(None, "rate"),
}
MEASURED: Mapping[str, Known] = {  # of the machine: fields of a result
    "tokens_per_second": Known("higher", "tokens/s"),
    "seconds": Known("lower", "s"),
    "peak_bytes": Known("lower", "bytes"),
}
OPEN = ("eval/", "layer/")  # what such names begin with
LAST: Mapping[str, Known] = {  # by the last part of a name
    "loss": Known("lower", "nats/token", nears=True),
    "bits_per_byte": Known("lower", "bits/byte", nears=True),
    "perplexity": Known("lower", "perplexity", nears=True),
    "accuracy": Known("higher", "accuracy", nears=True),
}
SUITES: Mapping[str, Known] = {  # eval/SUITE..., of an evaluation
    "core": Known("higher", "centered accuracy"),
    "blimp": Known("higher", "accuracy"),
    "bpb": Known("lower", "bits/byte"),
}
SUITE = re.compile(r"eval/([a-z]+)(?=[_@/]|$)")
EVALUATED = "val/"  # at every evaluation, so that a pruner can judge by it


def known(metric: str) -> Known:
    """By its name, else by the last part of it; of an unknown one nothing but its name."""
    exact = LOGGED.get(metric) or MEASURED.get(metric)
    if exact:
        return exact
    if metric.startswith(f"{EVALUATED}bits_per_byte/"):  # of one source of a mix
        return LOGGED[f"{EVALUATED}bits_per_byte"]
    suite = SUITE.match(metric)
    if suite and suite[1] in SUITES:
        return SUITES[suite[1]]
    return LAST.get(metric.rpartition("/")[2]) or Known(None, metric, nears=True)
