"""Turning declarations into modules.  Nothing here knows which stage it runs."""

from collections.abc import ValuesView
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ablab.core.language.declare import Linear, Param, Stage, Table


def parameter(declared: Param) -> nn.Parameter:
    """An unset fp32 parameter that carries its declaration; core/model/init.py fills it."""
    made: Any = nn.Parameter(torch.empty(declared.shape))
    made.declared = declared
    return made


def declaration(value: Any) -> Param:
    """What a parameter was declared as."""
    return value.declared


class LinearMap(nn.Module):
    """y = x W^T in the dtype of x, by the declared product; the weight [fan_out, fan_in] itself stays fp32."""

    def __init__(self, declared: Linear):
        super().__init__()
        self.weight = parameter(declared.weight)
        self.product = declared.product or plain_product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


class StageModule(nn.Module):
    """A stage's function with its parameters, maps, tables and numbers bound by name.

    Written into torch's own tables, not registered: registration refuses the names of a module's attributes, such as
    `half` or `type`, and a user's names are not torch's business.
    """

    def __init__(self, stage: Stage):
        super().__init__()
        self.function = stage.function
        self.numbers: dict[str, Any] = {}
        for name, value in stage.bound.items():
            match value:
                case Param():
                    self._parameters[name] = parameter(value)
                case Linear():
                    self._modules[name] = LinearMap(value)
                case Table():
                    self._buffers[name] = value.make().float()
                    self._non_persistent_buffers_set.add(name)
                case _:
                    self.numbers[name] = value

    def forward(self, *inputs: Any) -> Any:
        return self.function(
            *inputs, **self._parameters, **self._modules, **self._buffers, **self.numbers
        )


class StageModules(nn.Module):
    """Named stages in their order, whatever their names; nn.ModuleDict refuses `half`, `pop` and `type`."""

    def __init__(self, declared: dict[str, Stage]):
        super().__init__()
        for name, stage in declared.items():
            self._modules[name] = StageModule(stage)

    def values(self) -> ValuesView[Any]:
        return self._modules.values()

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]
