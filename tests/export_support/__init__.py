"""Modules that call the condensed operators with every epilogue, and the models that need them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lowering_support import mask_by_hand, operands, random_condensed, randomise
from torch import Tensor, fx, nn

from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.quantisation import quantise_weights

EPILOGUES = [(residual, activation) for residual in (False, True) for activation in abi.SUFFIXES]


class Operands(nn.Module):
    """A random condensed weight (n, columns) as buffers."""

    def __init__(self, n: int, columns: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        weight = random_condensed(n, columns, max(1, columns // 4), 1)
        values, indices, active, bias = operands(weight)
        scales = None
        if dtype is torch.int8:
            values, scales = map(torch.from_numpy, quantise_weights(weight.values))
        self.register_buffer("values", values.to(dtype))
        self.register_buffer("scales", scales)
        self.register_buffer("indices", indices)
        self.register_buffer("active", active)
        self.register_buffer("bias", bias)

    def __call__(self) -> tuple[Tensor, ...]:
        return self.values, self.indices, self.active, self.bias  # type: ignore[return-value]


class Linears(nn.Module):
    """A condensed linear layer with each epilogue; with ``feature_major``, three in a row."""

    def __init__(self, dtype: torch.dtype = torch.float32, feature_major: bool = False) -> None:
        super().__init__()
        self.weight, self.feature_major = Operands(10, 10, dtype), feature_major

    def forward(self, x: Tensor, residual: Tensor) -> list[Tensor]:
        linear = functools.partial(torch.ops.srigl_fx.condensed_linear, scales=self.weight.scales)
        outputs = []
        for add, activation in EPILOGUES:
            y = x
            if self.feature_major:
                first = linear(x, *self.weight(), 10, None, activation, False, True)
                y = linear(first, *self.weight(), 10, first if add else None, activation, True, True)
            last = residual if add else None
            outputs.append(linear(y, *self.weight(), 10, last, activation, self.feature_major, False))
        return outputs


class Convs(nn.Module):
    """A condensed convolution over ``rank`` axes with each epilogue, its settings all different."""

    def __init__(
        self, rank: int, groups: int = 1, transposed: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.shape = [6, 4 // groups, *(3, 2, 2)[:rank]]
        self.weight = Operands(6, int(np.prod(self.shape[1:])), dtype)
        stride, padding, dilation = [2, 1, 2][:rank], [1, 0, 1][:rank], [1, 2, 1][:rank]
        self.settings = (self.shape, stride, padding, dilation, groups)
        extra = {"output_padding": [1, 0, 0][:rank]} if transposed else {}
        self.more: dict[str, Any] = {"transposed": transposed, **extra}

    def forward(self, x: Tensor, residual: Tensor) -> list[Tensor]:
        conv = functools.partial(torch.ops.srigl_fx.condensed_conv, scales=self.weight.scales)
        return [
            conv(
                *(x, *self.weight(), *self.settings),
                residual=residual if add else None,
                activation=activation,
                **self.more,
            )
            for add, activation in EPILOGUES
        ]

    def inputs(self, batch: int) -> tuple[Tensor, Tensor]:
        """x and a residual of the output's shape."""
        x = torch.randn(batch, 4, *(7, 6, 5)[: len(self.shape) - 2])
        scales = self.weight.scales
        y = torch.ops.srigl_fx.condensed_conv(x, *self.weight(), *self.settings, scales=scales, **self.more)
        return x, torch.randn(y.shape)


def captured(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> fx.GraphModule:
    """The graph of a module of :data:`MODULES`, its batch free."""
    free = {0: torch.export.Dim.DYNAMIC}
    graph = torch.export.export(module, inputs, dynamic_shapes=(free, free)).module()
    assert isinstance(graph, fx.GraphModule)
    return graph


class Network(nn.Module):
    """Convolutions with batch norm and a shortcut, then a gated layer and a residual one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish())
        self.conv2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.norm = nn.LayerNorm(8)
        self.gate, self.value, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = F.relu6(self.up(F.relu(self.conv2(x) + x))).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.value(y))
        return x + self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


NETWORK_OPERATORS = [
    *("CondensedConvHardswish", "CondensedConvAddRelu", "CondensedConvTransposeRelu6"),
    *("CondensedLinearSilu", "CondensedLinear", "CondensedLinearAdd", "CondensedLinearGelu", "CondensedLinearAdd"),
]


def network(density: float = 0.3) -> nn.Module:
    """A masked :class:`Network` in eval mode."""
    return mask_by_hand(randomise(Network()), density).eval()


MODULES: dict[str, tuple[Callable[[torch.dtype], nn.Module], Sequence[int]]] = {
    "linear": (Linears, (10,)),
    "linear over sequences": (Linears, (5, 10)),
    "feature-major": (lambda dtype: Linears(dtype, True), (10,)),
    "feature-major sequences": (lambda dtype: Linears(dtype, True), (5, 10)),
    "conv1d": (lambda dtype: Convs(1, dtype=dtype), ()),
    "conv2d": (lambda dtype: Convs(2, groups=2, dtype=dtype), ()),
    "conv3d": (lambda dtype: Convs(3, dtype=dtype), ()),
    "transposed 1d": (lambda dtype: Convs(1, transposed=True, dtype=dtype), ()),
    "transposed 2d": (lambda dtype: Convs(2, groups=2, transposed=True, dtype=dtype), ()),
    "transposed 3d": (lambda dtype: Convs(3, transposed=True, dtype=dtype), ()),
}


# Modules and dtypes that go together: between layers in a row, a number may lie between two steps of eight bits.
CASES = [
    (name, dtype)
    for name in MODULES
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8)
    if dtype is not torch.int8 or "feature-major" not in name
]


def inputs_for(module: nn.Module, shape: Sequence[int], batch: int) -> tuple[Tensor, Tensor]:
    """x and a residual for a module of :data:`MODULES`."""
    generator = torch.Generator().manual_seed(batch)
    if isinstance(module, Convs):
        return module.inputs(batch)
    return torch.randn(batch, *shape, generator=generator), torch.randn(batch, *shape, generator=generator)
