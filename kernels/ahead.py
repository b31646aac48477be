"""Kernels compiled before their first launch, many at a time: one after another they hold up a cold start.

Works on the launches of Triton 3.5 and later: `warmup` compiles without launching, `AsyncCompileMode` hands that to
a pool.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
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

    with ThreadPoolExecutor(threads, initializer=_works_for(_current_device())) as pool:
        with (
            AsyncCompileMode(pool, ignore_errors=True),
            patch.object(JITFunction, "run", compile_only),
        ):
            yield
        list(pool.map(_load, met.values()))


def _current_device() -> int | None:
    """Of this thread; None without a GPU."""
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _works_for(device: int | None) -> Callable[[], None]:
    """What a new thread does first: it begins on GPU 0, and loads binaries into the GPU on which it is."""
    if device is None:
        return lambda: None
    return partial(torch.cuda.set_device, device)


def _load(met: Any) -> Any:
    """The launcher, for which Triton builds a C module and loads the binary; None where there is no kernel."""
    kernel = met.kernel if isinstance(met, FutureKernel) else met
    return kernel and kernel.run
