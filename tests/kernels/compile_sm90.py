"""Compile the Triton kernels for sm_90 on a machine without a GPU, as they would be launched, and say what they take.

    python tests/kernels/compile_sm90.py [B T H KV D [replacements of TILES, as Python]]
    python tests/kernels/compile_sm90.py 48 768 18 6 64 '{"keys": (128, 32, 8, 3, 0)}'

A line a kernel: name, tile, launch options, registers a thread, bytes spilled, bytes of shared memory, and how many
asynchronous matrix instructions (wgmma) stand in its code.  bf16, every optional part of attention on; the shapes of the
70M model, a row of 32,000 logits without and with a cap.
"""

import ast
import re
import subprocess
import sys
import tempfile

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from ablab.kernels import (
    attention,
    attention_backward,
    attention_forward,
    cross_entropy,
    newton_schulz,
    optimizer_step,
    swiglu,
)

TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


def instead_of_launching(kernel, *values, grid, warmup, **named):
    """Specialise on the arguments as a launch does (1 and None constant, multiples of 16 known), compile, report."""
    options = {
        name: named.pop(name)
        for name in ("num_warps", "num_stages", "maxnreg")
        if name in named
    }
    signature, constants, aligned = {}, {}, {}
    for i, (parameter, value) in enumerate(
        zip(
            kernel.params,
            (*values, *(named[one.name] for one in kernel.params[len(values) :])),
            strict=True,
        )
    ):
        if parameter.is_constexpr or value is None or isinstance(value, int) and value == 1:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            signature[parameter.name] = (
                TYPES[value.dtype]
                if isinstance(value, torch.Tensor)
                else "fp32"
                if isinstance(value, float)
                else "i32"
            )
            if isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0:
                aligned[(i,)] = [["tt.divisibility", 16]]
    made = compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    tile = "x".join(
        str(named[name])
        for name in ("ROWS", "M", "N", "D", "BLOCK", "DEPTH", "FORM")
        if name in named
    )
    report(kernel.__name__, tile, options, made)


def report(name, tile, options, made):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        told = subprocess.run(
            [get_ptxas(90).path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers, spilled = (
        re.search(r"Used (\d+) registers", told)[1],
        re.search(r"(\d+) bytes spill stores", told)[1],
    )
    how = ",".join(f"{option}={value}" for option, value in options.items())
    print(
        f"{name:17} {tile:14} {how:38} {registers:>4} {spilled:>5} {made.metadata.shared:7} {made.asm['ptx'].count('wgmma.mma_async'):4}",
        flush=True,
    )


def main(B=96, T=384, H=12, KV=12, D=64, tiles="{}"):
    B, T, H, KV, D = map(int, (B, T, H, KV, D))
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype)  # noqa: E731
    packed, table, gain = (
        empty(B, T, (H + 2 * KV) * D),
        empty(T, D // 2, dtype=torch.float32),
        empty(D, dtype=torch.float32),
    )
    first = attention_forward.split(packed, H, KV)[2]
    parts = (
        H,
        KV,
        table,
        table,
        gain,
        gain,
        1e-6,
        first,
        gain[:2],
        empty(B, T, H),
        attention.flat_tiles(D, packed.dtype, ast.literal_eval(tiles)),
    )
    kept = attention_forward.forward(packed, *parts)
    attention_backward.backward(kept[0], packed, *kept, *parts)
    gram = newton_schulz.symmetric(empty(16, 768, 2048))
    newton_schulz.symmetric(gram, 1.5, 0.5, gram, 2.0)
    optimizer(*(torch.empty(2, 768, 2048) for _ in range(4)))
    packed = empty(16, 4096).requires_grad_()
    swiglu.swiglu(packed).sum().backward()
    for form in cross_entropy.CAPS:
        cross_entropy.cross_entropy_(
            empty(16, 32_000),
            torch.zeros(16, dtype=torch.int64),
            cap=15.0,
            cap_form=form,
            z_weight=1e-4,
            padded=True,
        )


def optimizer(weight, grad, mean, square):
    one, rows = torch.ones(()), torch.empty(2, 768, 1)
    optimizer_step.adam_step(
        weight, grad, mean, square, one, one, one, 0.9, 0.95, 1e-8, "cautious", one
    )
    u, _ = optimizer_step.momentum_step(grad, mean, one, one, True, 1.0, torch.bfloat16)
    scales = optimizer_step.row_scales(u, rows, 1.0, 0.95, 1e-8)
    optimizer_step.apply_rows(weight, u, scales, 1.0, one, "cautious", one)


if __name__ == "__main__":
    JITFunction.run = instead_of_launching
    main(*sys.argv[1:])
