"""What is asked of `ablab` with odd words and odd files, and how it must answer."""

import os
import time

import pytest

from ablab.core.errors import LONGEST_LINE

SECONDS = 2.0  # of a core
GOOD = """\
question: q
base: [base, mini]
with: [qk_norm]
runtime: {device: cpu}
"""


@pytest.fixture
def said(lab, ablab):
    """A function: what `ablab WORDS` answers, having checked how."""
    (lab.root / "good.yaml").write_text(GOOD)
    for words in (("show",), ("run", "--dry-run")):
        ablab(*words, "good.yaml")  # imports torch, once

    def say(*words: str):
        outside = names_outside(lab)
        began = (
            time.thread_time()
        )  # what other tests left running in this process is not the command's
        ended = ablab(*words)
        seconds = time.thread_time() - began
        assert names_outside(lab) == outside
        assert ended.code in (0, 2), ended
        assert "Traceback" not in ended.err
        assert seconds < SECONDS, (seconds, ended)
        if ended.code == 2:
            assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
            assert len(ended.err) <= LONGEST_LINE + 20
            ended.err.encode()
        return ended

    return say


def names_outside(lab) -> list[str]:
    """Of what stands beside the store, and beside the folder in which commands are given."""
    return sorted([*os.listdir(lab.root), *os.listdir(lab.root.parent), *os.listdir("/")])
