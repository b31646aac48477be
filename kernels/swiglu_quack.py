"""The two products of kernels/swiglu_epilogue.py, on quack-kernels: what the epilogues compute, and their tiles.

Beside it, not in it: quack-kernels takes seconds to import and patches the DSL that it stands on, so it is imported at
the first launch.  A kernel is compiled in 1 to 2 s and kept on the disk by quack (QUACK_CACHE_DIR).
"""

from quack.activation import dswiglu, swiglu
from quack.epilogue import gemm_epilogue, pack, unpack
from quack.gemm_config import GemmConfig
from torch import Tensor


@gemm_epilogue(outputs=("hidden",), mode="acc_pair")
def _gated(acc):
    gate, up = unpack(acc)
    return {"D": pack(gate, up), "hidden": swiglu(gate, up)}


@gemm_epilogue(mode="packed_cd_b16x2")
def _gradient(acc, c):
    gate, up = unpack(c)
    d_gate, d_up, _ = dswiglu(gate, up, acc)
    return {"D": pack(d_gate, d_up)}


def _tiles(rows: int, columns: int, pingpong: bool, together: tuple[int, int]) -> GemmConfig:
    """pingpong: two groups of warps in turn at a tile each, one multiplies while the other stores.

    together: blocks of a cluster, down and across.
    """
    down, across = together
    return GemmConfig(
        tile_m=rows,
        tile_n=columns,
        pingpong=pingpong,
        cluster_m=down,
        cluster_n=across,
        is_dynamic_persistent=False,
        device_capacity=9,
    )


# The fastest of 18 for 36,864 tokens of 1,152 channels, and of 768 for 73,728 within one in a hundred.
GATED = _tiles(128, 192, True, (2, 1))
# The fastest at both.  Wider tiles have no room left to read p ahead: (128, 192) takes .63 ms where this takes .53.
GRADIENT = _tiles(128, 128, True, (1, 2))


def product_then_swiglu(x: Tensor, weight: Tensor, packed: Tensor, hidden: Tensor) -> None:
    """packed, hidden <- x weight^T, and silu(gate) * up of its even and odd columns."""
    _gated(x, weight.t(), out={"D": packed, "hidden": hidden}, config=GATED)


def product_then_gradient(dy: Tensor, weight: Tensor, packed: Tensor, gradient: Tensor) -> None:
    """gradient <- the gradient of packed, where dy weight is that of silu(gate) * up."""
    _gradient(dy, weight, packed, out={"D": gradient}, config=GRADIENT)
