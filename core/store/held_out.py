"""The losses of a run's last evaluation, token by token: how much of a difference between two runs is the text's.

    held_out.npz    nats      float16 [rows, context]  of each token to predict, by the weights that `val/` names
                    bytes     int32   [rows, context]  of UTF-8 that it stands for; 0: not counted in bits per byte
                    document  int32   [rows, context]  its document, counted over the validation text

Deflated, 2.4 bytes a token: 39 KB of 16,384 tokens, 2.4 MB of a million.  float16 keeps a loss to 2^-11 of itself, far
below what one token says; the metrics of a run are sums of the losses in fp64, not of these.  The same losses give the
same bytes.
"""

import zlib
from dataclasses import dataclass, fields
from io import BytesIO
from typing import TYPE_CHECKING
from zipfile import BadZipFile

if TYPE_CHECKING:
    from numpy import ndarray

# What numpy and zipfile raise of a damaged archive.
FLAWS = (
    BadZipFile,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zlib.error,
)
TYPES = {"nats": "float16", "bytes": "int32", "document": "int32"}


@dataclass(frozen=True, eq=False)
class HeldOut:
    """[rows, context] each."""

    nats: "ndarray"
    bytes: "ndarray"
    document: "ndarray"


def encoded(held_out: HeldOut) -> bytes:
    import numpy

    content = BytesIO()
    arrays = {name: getattr(held_out, name).astype(kind) for name, kind in TYPES.items()}
    numpy.savez_compressed(content, **arrays)
    return content.getvalue()


def decoded(content: bytes) -> HeldOut:
    """Raises ValueError for anything but what `encoded` gives."""
    import numpy

    try:
        with numpy.load(BytesIO(content), allow_pickle=False) as archive:
            arrays = {one.name: archive[one.name] for one in fields(HeldOut)}
    except FLAWS as flaw:
        raise ValueError(f"it is no archive of losses: {flaw}") from None
    shapes = {array.shape for array in arrays.values()}
    kinds = {name: str(array.dtype) for name, array in arrays.items()}
    if kinds != TYPES or len(shapes) != 1:
        raise ValueError(f"its arrays are {kinds} of shapes {sorted(shapes)}")
    return HeldOut(**arrays)
