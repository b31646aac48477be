"""Launch the kernels for an H100 that is not there, once `compiling_only` and once in earnest; say what became of them.

    python tests/kernels/ahead_sm90.py [threads]

A line a pass: its name, kernels compiled, loaded and launched in it, seconds.  Then the same of a kernel that cannot be
compiled: what its launch raised.  A driver of our own stands for the GPU.
"""

import sys
import time
from collections import Counter
from types import SimpleNamespace

import triton
from compile_sm90 import main
from triton import knobs
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ablab.kernels.ahead import compiling_only

count = Counter()


def noted(what, answer=None):
    def note(*_, **__):
        count[what] += 1
        return answer

    return note


driver.set_active(
    SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=lambda source, metadata: noted("launched"),
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=noted("loaded", (1, 1, 32, 0, 1024)),
        ),
    )
)
knobs.runtime.jit_post_compile_hook = noted("compiled")


@triton.jit
def broken():
    tl.static_assert(False)


def report(name, began):
    print(
        name,
        count["compiled"],
        count["loaded"],
        count["launched"],
        f"{time.perf_counter() - began:.2f}",
        flush=True,
    )
    count.clear()


if __name__ == "__main__":
    began = time.perf_counter()
    with compiling_only(int(sys.argv[1]) if sys.argv[1:] else 2):
        main()
    report("ahead", began)
    began = time.perf_counter()
    main()
    report("then", began)
    with compiling_only(1):
        broken[(1,)]()
    try:
        broken[(1,)]()
    except triton.CompilationError as flaw:
        print("broken", type(flaw).__name__)
