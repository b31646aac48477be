"""Compile the Triton kernels for sm_90 on a machine without a GPU, as they would be launched, and say what they take.

    python tests/kernels/compile_sm90.py [B T H KV D [replacements of TILES, as Python]]
    python tests/kernels/compile_sm90.py 48 768 18 6 64 '{"keys": (128, 32, 8, 3, 0)}'

A line a kernel: name, tile, launch options, registers a thread, bytes spilled, bytes of shared memory, and how many
asynchronous matrix instructions (wgmma) stand in its code.  bf16, every optional part of attention on; the shapes of
the 70M model, a row of 32,000 logits without and with a cap.
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
from triton.tools.tensor_descriptor import TensorDescriptor

from ablab.kernels import (
    attention,
    attention_backward,
    attention_forward,
    cross_entropy,
    newton_schulz,
    optimizer_step,
    swiglu,
)

OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of a launch
SIDES = ("ROWS", "M", "N", "D", "BLOCK", "DEPTH", "FORM")  # what a tile is called by
SHAPE = (96, 384, 12, 12, 64)  # B T H KV D
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


def instead_of_launching(kernel, *values, grid, warmup, **named):
    """Specialise on the arguments as a launch does (1 and None constant, multiples of 16 known), compile, report."""
    options = {name: named.pop(name) for name in OPTIONS if name in named}
    rest = [named[parameter.name] for parameter in kernel.params[len(values) :]]
    given = zip(kernel.params, [*values, *rest], strict=True)
    signature = {}
    constants = {}
    aligned = {}
    for i, (parameter, value) in enumerate(given):
        if parameter.is_constexpr or is_constant(value):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[parameter.name] = type_of(value)
            if is_aligned(value):
                aligned[(i,)] = [["tt.divisibility", 16]]
    made = compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    tile = "x".join(str(named[name]) for name in SIDES if name in named)
    report(kernel.__name__, tile, options, made)


def is_constant(value):
    return value is None or isinstance(value, int) and value == 1


def is_aligned(value):
    return isinstance(value, torch.Tensor) or isinstance(value, int) and value % 16 == 0


def type_of(value):
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype].removeprefix('*')}{value.block_shape}>"
    return "fp32" if isinstance(value, float) else "i32"


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
    registers = re.search(r"Used (\d+) registers", told)[1]
    spilled = re.search(r"(\d+) bytes spill stores", told)[1]
    products = made.asm["ptx"].count("wgmma.mma_async")
    how = ",".join(f"{option}={value}" for option, value in options.items())
    taken = f"{registers:>4} {spilled:>5} {made.metadata.shared:7} {products:4}"
    print(f"{name:17} {tile:14} {how:38} {taken}", flush=True)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)


def main(*asked):
    """asked: B T H KV D and replacements of TILES, as text; what is left out is the 70M model's."""
    numbers = [*map(int, asked[:5]), *SHAPE[len(asked) :]]
    B, T, H, KV, D = numbers
    replaced = ast.literal_eval(asked[5]) if len(asked) > 5 else {}
    tiles = {kernel: attention_forward.Tile(*numbers) for kernel, numbers in replaced.items()}
    packed = empty(B, T, (H + 2 * KV) * D)
    table = empty(T, D // 2, dtype=torch.float32)
    gain = empty(D, dtype=torch.float32)
    first = attention_forward.split(packed, H, KV)[2]
    given = attention_forward.Inputs(
        qkv=packed,
        heads=H,
        kv_heads=KV,
        cos=table,
        sin=table,
        q_gain=gain,
        k_gain=gain,
        eps=1e-6,
        first=first,
        weights=gain[:2],
        gate=empty(B, T, H),
        tiles=attention.flat_tiles(D, packed.dtype, T, tiles),
    )
    kept = attention_forward.forward(given)
    attention_backward.backward(kept[0], *kept, given)
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
    one = torch.ones(())
    rows = torch.empty(2, 768, 1)
    optimizer_step.adam_step(
        weight, grad, mean, square, one, one, one, 0.9, 0.95, 1e-8, "cautious", one
    )
    u, _ = optimizer_step.momentum_step(grad, mean, one, one, True, 1.0, torch.bfloat16)
    scales = optimizer_step.row_scales(u, rows, 1.0, 0.95, 1e-8)
    optimizer_step.apply_rows(weight, u, scales, 1.0, one, "cautious", one)


if __name__ == "__main__":
    JITFunction.run = instead_of_launching
    main(*sys.argv[1:])
