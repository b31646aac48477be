"""A model of whose matrices each rank has a part, by torch's FSDP2: a group of messages for each block, and one more.

A matrix is cut along its rows, or along its columns where the ranks do not divide its rows.  Gains, small tables and
what cannot be cut are whole on every rank.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ablab.core.model.layers import LinearMap, declaration, plain_product
from ablab.core.model.rates import bank_of
from ablab.core.model.transformer import Transformer
from ablab.core.runtime.compilation import OfRows

SMALL = 1 << 16  # numbers below which a parameter stays whole, if it is no linear map's


class Within(nn.Module):
    """The root of what is cut: a function that is called within it finds each weight whole when it comes to it."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, function: OfRows, rows: Tensor) -> Any:
        return function(rows)


@dataclass(frozen=True)
class Called:
    """A function of rows, called within."""

    within: Within
    function: OfRows

    def __call__(self, rows: Tensor) -> Any:
        return self.within(self.function, rows)


class Held(NamedTuple):
    """A parameter by its name in the model, and the module that holds it."""

    name: str
    value: nn.Parameter
    module: nn.Module
    attribute: str  # its name there


def held_by(model: nn.Module) -> Iterator[Held]:
    for path, module in model.named_modules():
        for attribute, value in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            yield Held(name, value, module, attribute)


# -- which, and how ----------------------------------------------------------------------------------------------------
def axes_of(model: nn.Module, ranks: int, small: int = SMALL) -> dict[str, int]:
    """The parameters that are cut, by name, and the axis of each.  Those of one bank are cut alike, or none is."""
    axes: dict[str, int] = {}
    stays = set()
    for one in held_by(model):
        axis = _axis(one, ranks, small)
        if axis is None:
            stays.add(bank_of(declaration(one.value)))
        else:
            axes[one.name] = axis
    banks = {one.name: bank_of(declaration(one.value)) for one in held_by(model)}
    return {name: axis for name, axis in axes.items() if banks[name] not in stays}


def _axis(one: Held, ranks: int, small: int) -> int | None:
    """The first that the ranks divide."""
    # FSDP2 asks for an attribute, which a parameter named `half` or `type` is not (core/model/layers.py).
    is_found = getattr(one.module, one.attribute, None) is one.value
    is_large = isinstance(one.module, LinearMap) or one.value.numel() >= small
    is_matrix = one.value.dim() > 1
    if not (is_found and is_large and is_matrix):
        return None
    return next((axis for axis, size in enumerate(one.value.shape) if size % ranks == 0), None)


def _is_cast_first(one: Held) -> bool:
    """Whether it is cast to the activations' dtype before anything else is done with it."""
    return isinstance(one.module, LinearMap) and one.module.product is plain_product


# -- cutting -----------------------------------------------------------------------------------------------------------
class Cutting:
    """How the matrices of a model are cut over the ranks of a mesh."""

    def __init__(self, model: Transformer, mesh: DeviceMesh, small: int):
        self.model = model
        self.mesh = mesh
        self.held = list(held_by(model))
        self.axes = axes_of(model, mesh.size(), small)
        self.axis_of = {
            one.value: self.axes[one.name] for one in self.held if one.name in self.axes
        }
        self.whole = {one.value for one in self.held if one.name not in self.axes}

    def cut(self) -> Within:
        """The model goes to the mesh's device block by block, and stays there in parts."""
        device = torch.device(self.mesh.device_type)
        declared = {one.name: declaration(one.value) for one in self.held}
        for value in self.whole:
            value.data = value.data.to(device)
        for number, block in enumerate(self.model.blocks):
            self._cut(block, self._dtype(f"blocks.{number}."))
        within = Within(self.model)
        # In fp32: tables are looked up before their rows are cast.
        self._cut(within, torch.float32)
        for name, value in self.model.named_parameters():
            value.declared = declared[name]  # type: ignore[attr-defined]
        return within

    def _dtype(self, path: str) -> torch.dtype:
        """In which the matrices below a path are gathered: the activations', where they are cast to it anyway."""
        cut = [one for one in self.held if one.name in self.axes]
        inside = [one for one in cut if one.name.startswith(path)]
        return self.model.dtype if all(map(_is_cast_first, inside)) else torch.float32

    def _cut(self, module: nn.Module, dtype: torch.dtype) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        made = fully_shard(
            module,
            mesh=self.mesh,
            mp_policy=policy,
            reshard_after_forward=True,  # of the root too: after an evaluation its weights move
            shard_placement_fn=self._placement,
            ignored_params=self.whole,
        )
        # Losses are sums over tokens, and so are gradients.
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)

    def _placement(self, value: nn.Parameter) -> Shard:
        return Shard(self.axis_of[value])


def cut(model: Transformer, mesh: DeviceMesh, small: int = SMALL) -> Within:
    """Cut the model's matrices.  small: numbers below which a parameter stays whole, if it is no linear map's."""
    # A stage may hand on a view; none changes a tensor in place, which alone would lose FSDP2's hook.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    return Cutting(model, mesh, small).cut()


# -- parts -------------------------------------------------------------------------------------------------------------
def axis_of(value: Tensor) -> int | None:
    """The axis along which a parameter is cut; None: it is whole."""
    if not isinstance(value, DTensor):
        return None
    (placement,) = value.placements
    assert isinstance(placement, Shard)
    return placement.dim


def own_of(value: Tensor) -> Tensor:
    """What this rank has of a parameter; its very memory."""
    value = value.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def cut_like(value: Tensor, own: Tensor) -> DTensor:
    """A tensor that is cut as `value` is, of which we have `own`."""
    assert isinstance(value, DTensor)
    return DTensor.from_local(own, value.device_mesh, value.placements, run_check=False)


def parameter_like(value: Tensor, own: Tensor) -> nn.Parameter:
    made: Any = nn.Parameter(cut_like(value, own))
    made.declared = declaration(value)
    return made
