"""Turning declarations into modules.  Nothing here knows which stage it runs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ablab.core.language.declare import Linear, Param, Stage, Table


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
    """A stage's function with its parameters, maps, tables and numbers bound by name."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.function = stage.function
        self.numbers = {}
        for name, value in stage.bound.items():
            match value:
                case Param():
                    self.register_parameter(name, parameter(value))
                case Linear():
                    self.add_module(name, LinearMap(value))
                case Table():
                    self.register_buffer(name, value.make().float(), persistent=False)
                case _:
                    self.numbers[name] = value

    def forward(self, *inputs):
        return self.function(
            *inputs, **self._parameters, **self._modules, **self._buffers, **self.numbers
        )


def parameter(declared: Param) -> nn.Parameter:
    """An unset fp32 parameter that carries its declaration; core/model/init.py fills it."""
    made = nn.Parameter(torch.empty(declared.shape))
    made.declared = declared
    return made


def stages(declared: dict[str, Stage]) -> nn.ModuleDict:
    return nn.ModuleDict({name: StageModule(stage) for name, stage in declared.items()})
