"""Masked models made by hand, without ``sparsify`` or a trainer: what the tests of lowering start from."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from srigl_fx.masks.records import MASK_SUFFIX, Block, Kind, Structure, WeightRecord, WeightSite, set_records
from srigl_fx.runtime.format import CondensedWeight


def fan_in_mask(rows: int, columns: int, k: int, ablated: int = 0, seed: int = 0) -> NDArray[np.bool_]:
    """A random (rows, columns) mask, ``k`` in every row but ``ablated`` of them, which keep nothing."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((rows, columns), np.bool_)
    for row in rng.permutation(rows)[ablated:]:
        mask[row, rng.choice(columns, k, replace=False)] = True
    return mask


def random_condensed(rows: int, columns: int, k: int, ablated: int = 0, seed: int = 0) -> CondensedWeight:
    """A condensed weight with random values and bias."""
    rng = np.random.default_rng(seed + 1)
    mask = fan_in_mask(rows, columns, k, ablated, seed)
    weight = rng.standard_normal((rows, columns)) * mask
    return CondensedWeight.from_dense(weight, mask, rng.standard_normal(rows))


def operands(condensed: CondensedWeight) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, indices, active, bias) as torch tensors that share the arrays' memory."""
    return tuple(  # type: ignore[return-value]
        torch.from_numpy(array) for array in (condensed.values, condensed.indices, condensed.active, condensed.bias)
    )


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and float buffer values a comparison can see: no zero biases, no unit norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                if name.endswith("running_var"):
                    tensor.copy_(0.5 + noise.abs())
                elif tensor.dim() > 1:
                    tensor.copy_(noise / tensor[0].numel() ** 0.5)
                else:
                    tensor.add_(0.3 * noise)
    return model


def kind_of(module: nn.Module, attr: str) -> Kind:
    """The kind of weight ``attr`` is on ``module``."""
    if attr == "in_proj_weight":
        return "attention_in"
    if type(module).__name__ == "Conv1D":
        return "linear_in_out"
    name = type(module).__name__.lower()
    if name.startswith("convtranspose"):
        return f"conv_transpose{name[-2:]}"  # type: ignore[return-value]
    return name if name.startswith("conv") else "linear"  # type: ignore[return-value]


def mask_by_hand(
    model: nn.Module,
    density: float = 0.25,
    *,
    ablated: Mapping[str, int] | int = 0,
    structure: Structure = "constant_fan_in",
    skip: tuple[str, ...] = (),
    seed: int = 0,
) -> nn.Module:
    """Mask every matrix-like weight of ``model`` in place, as a finished training would leave it.

    ``ablated`` is a number of rows for every weight, or a mapping from weight FQN to that; packed attention
    projections are masked block by block and never ablated.
    """
    for prefix, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding | nn.LayerNorm) or prefix in skip:
            continue
        records = {}
        for attr, weight in list(module.named_parameters(recurse=False)):
            fqn = f"{prefix}.{attr}" if prefix else attr
            if weight.dim() < 2 or not attr.endswith("weight") or fqn in skip:
                continue
            kind = kind_of(module, attr)
            n = weight.shape[0] // 3
            blocks = tuple(Block(name=b, start=i * n, stop=(i + 1) * n, ablatable=False) for i, b in enumerate("qkv"))
            site = WeightSite(
                owner=prefix,
                attr=attr,
                kind=kind,
                shape=tuple(weight.shape),
                groups=getattr(module, "groups", 1),
                blocks=blocks if kind == "attention_in" else (),
            )
            columns = site.matrix_shape[1]
            dead = 0 if kind == "attention_in" else ablated if isinstance(ablated, int) else ablated.get(fqn, 0)
            if structure == "unstructured":
                matrix = np.random.default_rng(seed).random(site.matrix_shape) < density
            else:
                matrix = np.concatenate(
                    [
                        fan_in_mask(block.rows, columns, max(1, round(density * columns)), dead, seed + i)
                        for i, block in enumerate(site.blocks)
                    ]
                )
            mask = site.from_matrix(torch.from_numpy(matrix))
            module.register_buffer(attr + MASK_SUFFIX, mask)
            with torch.no_grad():
                weight.mul_(mask)
            records[attr] = WeightRecord(site=site, structure=structure)
        set_records(module, records)
    return model


class Total(nn.Module):
    """Keeps a running sum of what its layer gives."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(17, 9)
        self.register_buffer("total", torch.zeros(9))

    def forward(self, x: Tensor) -> Tensor:
        self.total += self.fc(x).sum(0)
        return self.total.clone()


class Branches(nn.Module):
    """Is not one graph: what it computes depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        self.second = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = self.first(x)
        y: Tensor = self.second(x)
        return y
