"""What a part may ask for: parameters, linear maps, tables, and a pure function over them.  No torch here.

A part's `build(where)` returns a `Stage`.  core/model/plan.py gathers the stages of a whole model, from which
parameters are counted, initialised and given learning rates; core/model/layers.py turns each stage into a module.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from ablab.core.language.offers import Offer


@dataclass(frozen=True)
class Where:
    """The place a stage is built for.  `layer` counts from 0; outside the blocks it is 0.

    Sizes in channels, heads, tokens.
    branch: the parametrization's factor on each residual branch; it is in what the branches return, and a block that
    normalises this must apply it again.
    """

    layer: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    vocab: int
    eps: float
    branch: float = 1.0


@dataclass(frozen=True)
class Param:
    """A parameter, described where it is born: every other rule (init, LR, bank, FLOPs) reads this.

    role: embedding, hidden, readout, vector (gains and scalars) or gate.
    fill: constant start; None draws from a normal whose std the parametrization chooses.
    blocks: row counts of separate matrices fused into one, e.g. (q, k, v); empty: one matrix.
    head: rows of one attention head, 0 where the rows are not heads.
    """

    shape: tuple[int, ...]
    role: str
    fill: float | None = None
    blocks: tuple[int, ...] = ()
    head: int = 0

    @property
    def size(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Linear:
    """y = x W^T, W [fan_out, fan_in], no bias.  product: (x, W) -> y where it is not the plain one."""

    weight: Param
    product: Callable[[Any, Any], Any] | None = None

    @property
    def fan_in(self) -> int:
        return self.weight.shape[1]


def linear(fan_in: int, fan_out: int, role: str = "hidden", **more: Any) -> Linear:
    return Linear(Param((fan_out, fan_in), role, **more))


@dataclass(frozen=True)
class Table:
    """A constant tensor, made once on the CPU by `make()`; not a parameter, not saved."""

    make: Callable[[], Any]


class Stage:
    """`function(*inputs, **bound)`, where bound values are Params, Linears, Tables or plain numbers.

    offer: what a kernel may compute in its place (core/language/offers.py); None: it is run as it is written.
    A carry that the function gets is returned with its entries, never changed in place.  What later tokens look back
    at is an entry named `past/...`: decoding hands it in with them; where there is nothing before, there is no entry.
    """

    def __init__(
        self, function: Callable[..., Any], /, *, offer: Offer | None = None, **bound: Any
    ):
        self.function = function
        self.offer = offer
        self.bound = bound


def params(tree: Any, path: str = "") -> Iterator[tuple[str, Param]]:
    """Every declared parameter below `tree` with its dotted name; the same name the built module gives it."""
    match tree:
        case Param():
            yield path, tree
        case Stage():
            yield from params(tree.bound, path)
        case dict():
            for key, value in tree.items():
                yield from params(value, f"{path}.{key}" if path else str(key))
        case tuple():
            yield from params(dict(enumerate(tree)), path)
        case _ if is_dataclass(tree):
            yield from params(_named(tree), path)


def stages(tree: Any, path: str = "") -> Iterator[tuple[str, Stage]]:
    """Every stage below `tree` with its dotted name; the same name the built module has."""
    match tree:
        case Stage():
            yield path, tree
        case dict():
            for key, value in tree.items():
                yield from stages(value, f"{path}.{key}" if path else str(key))
        case tuple():
            yield from stages(dict(enumerate(tree)), path)
        case _ if is_dataclass(tree):
            yield from stages(_named(tree), path)


def multiplied(
    tree: Any, choose: Callable[[str, Linear], Callable | None], path: str = ""
) -> Any:
    """The same tree with the product that `choose(name, map)` has for each linear map; names as `params` gives them."""

    def below(named: dict) -> dict:
        return {
            key: multiplied(value, choose, f"{path}.{key}" if path else str(key))
            for key, value in named.items()
        }

    match tree:
        case Linear():
            return replace(tree, product=choose(path, tree))
        case Stage():
            return Stage(tree.function, offer=tree.offer, **below(tree.bound))
        case dict():
            return below(tree)
        case tuple():
            return tuple(below(dict(enumerate(tree))).values())
        case Param() | Table():
            return tree
        case _ if is_dataclass(tree) and not isinstance(tree, type):
            return replace(tree, **below(_named(tree)))
    return tree


def _named(tree: Any) -> dict[str, Any]:
    return {field.name: getattr(tree, field.name) for field in fields(tree)}
