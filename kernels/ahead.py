"""Kernels compiled before their first launch, many at a time: one after another they hold up a cold start.

Works on the launches of Triton 3.5 and later: `warmup` compiles without launching, `AsyncCompileMode` hands that to
a pool.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from triton import AsyncCompileMode, FutureKernel
from triton.runtime.jit import JITFunction


@contextmanager
def compiling_only(threads: int) -> Iterator[None]:
    """In here a launch by this thread compiles its kernel and writes nothing; on leaving, all are ready to launch.

    A kernel that cannot be compiled is left to its first launch, which says why.  In Triton's interpreter kernels
    run as ever.
    """
    launch = JITFunction.run
    met: dict[int, Any] = {}

    def compile_only(self: JITFunction, *values: Any, warmup: bool, **named: Any) -> None:
        kernel = launch(self, *values, warmup=True, **named)
        met[id(kernel)] = kernel

    with ThreadPoolExecutor(threads) as pool:
        with (
            AsyncCompileMode(pool, ignore_errors=True),
            patch.object(JITFunction, "run", compile_only),
        ):
            yield
        list(pool.map(_load, met.values()))


def _load(met: Any) -> Any:
    """The launcher, for which Triton builds a C module and loads the binary; None where there is no kernel."""
    kernel = met.kernel if isinstance(met, FutureKernel) else met
    return kernel and kernel.run
