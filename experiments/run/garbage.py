"""How often Python looks for garbage: what a process imports and compiles stays, and each look goes through all of it.

Processor seconds until torch and its compiler are imported: 2.27 to 2.42 by Python's own thresholds, 1.90 to 1.94 by
these.
"""

import gc

NEW = 100_000  # objects more than were freed, before the young are looked at; Python's own: 700 to 2,000
YOUNG = 20  # looks at these before one at the middle-aged; Python's own: 10
MIDDLE_AGED = 100  # looks at these before one at all; Python's own: 10


def collect_seldom() -> None:
    """From here on, in this process.  What has to be free at once is collected by name.

    So are models, which are in cycles, before the next one's memory comes: core/train/trainer.py:Warm,
    core/interop/weights.py:built, ablations/checks/liveness.py:trace.
    """
    gc.set_threshold(NEW, YOUNG, MIDDLE_AGED)
