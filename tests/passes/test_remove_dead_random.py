"""Random networks with random dead channels compute the same without them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lowering_support import mask_by_hand, randomise
from passes_support import relative_error, removed
from torch import Tensor, nn

from srigl_fx.masks.records import sparse_weights


@dataclass(frozen=True)
class Step:
    """One operation on the values computed so far; ``sources`` picks two of them."""

    kind: str
    sources: tuple[int, int]
    width: int
    bias: bool


IMAGE_KINDS = [
    "conv",
    "padded",
    "depthwise",
    "grouped",
    "add",
    "mul",
    "cat",
    "split",
    "pool",
    "norm",
    "shuffle",
    "squeeze",
    "uneven",
    "causal",
    "reflected",
    "transposed",
    "group norm",
    "one group norm",
    "instance norm",
    "channels last norm",
]
TOKEN_KINDS = ["linear", "add", "mul", "cat", "split", "layer norm", "attention", "glu", "heads", "first", "zero norm"]


class Random(nn.Module):
    """A network grown step by step; every value keeps four, eight or twelve channels."""

    def __init__(self, steps: list[Step], *, image: bool) -> None:
        super().__init__()
        self.steps, self.image = steps, image
        self.layers = nn.ModuleList()
        widths = [4]
        for step in steps:
            one = widths[step.sources[0] % len(widths)]
            layer, width = self._layer(step, one)
            self.layers.append(layer)
            widths.append(width)
        self.head = nn.Conv2d(widths[-1], 3, 1) if image else nn.Linear(widths[-1], 3)

    def _layer(self, step: Step, one: int) -> tuple[nn.Module, int]:
        out, bias = step.width, step.bias
        make: dict[str, Callable[[], tuple[nn.Module, int]]] = {
            "conv": lambda: (nn.Conv2d(one, out, 1, bias=bias), out),
            "padded": lambda: (nn.Conv2d(one, out, 3, padding=1, bias=bias), out),
            "depthwise": lambda: (nn.Conv2d(one, one, 3, padding=1, groups=one, bias=bias), one),
            "grouped": lambda: (nn.Conv2d(one, out, 1, groups=2, bias=bias), out),
            "norm": lambda: (nn.BatchNorm2d(one), one),
            "squeeze": lambda: (nn.Conv2d(one, one, 1, bias=bias), one),
            "uneven": lambda: (nn.Conv2d(one, out, 2, bias=bias), out),
            "causal": lambda: (nn.Conv2d(one, out, (1, 2), dilation=2, bias=bias), out),
            "reflected": lambda: (nn.Conv2d(one, out, 3, padding=1, padding_mode="reflect", bias=bias), out),
            "transposed": lambda: (nn.ConvTranspose2d(one, out, 3, padding=1, bias=bias), out),
            "group norm": lambda: (nn.GroupNorm(2, one), one),
            "one group norm": lambda: (nn.GroupNorm(1, one), one),
            "instance norm": lambda: (nn.InstanceNorm2d(one, affine=bias), one),
            "channels last norm": lambda: (nn.LayerNorm(one), one),
            "linear": lambda: (nn.Linear(one, out, bias=bias), out),
            "layer norm": lambda: (nn.LayerNorm(one), one),
            "attention": lambda: (nn.Linear(one, 3 * one, bias=bias), one),
            "glu": lambda: (nn.Linear(one, 2 * out, bias=bias), out),
            "heads": lambda: (nn.LayerNorm(one // 2), one),
            "cat": lambda: (nn.Identity(), 4),
            "split": lambda: (nn.Identity(), one),
        }
        return make.get(step.kind, lambda: (nn.Identity(), one))()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        axis = 1 if self.image else -1
        for step, layer in zip(self.steps, self.layers, strict=True):
            one = values[step.sources[0] % len(values)]
            same = [value for value in values if value.shape == one.shape]
            other = same[step.sources[1] % len(same)]
            values.append(self._step(step, layer, one, other, axis))
        out: Tensor = self.head(F.silu(values[-1]))
        return out

    def _step(self, step: Step, layer: nn.Module, x: Tensor, other: Tensor, axis: int) -> Tensor:
        width = x.shape[axis]
        if step.kind == "add":
            return x + other
        if step.kind == "mul":
            return x * torch.sigmoid(other)
        if step.kind == "cat":
            return torch.cat([x.narrow(axis, 0, 2), other.narrow(axis, width - 2, 2)], axis)
        if step.kind == "split":
            a, b = torch.split(x, [1, width - 1], axis)
            return torch.cat([F.relu(b), a], axis)
        if step.kind == "pool":
            return F.avg_pool2d(x, 3, 1, 1)
        if step.kind == "shuffle":
            return F.channel_shuffle(x, 2)
        if step.kind == "squeeze":
            return x * torch.sigmoid(layer(x.mean((2, 3), keepdim=True)))
        if step.kind in ("uneven", "causal"):
            x = F.pad(x, (0, 1, 0, 1) if step.kind == "uneven" else (2, 0, 0, 0), value=float(step.sources[1] % 2))
        if step.kind == "channels last norm":
            return layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]
        if step.kind == "attention":
            q, k, v = layer(x).reshape(*x.shape[:2], 3, 2, width // 2).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if step.kind == "heads":
            return layer(x.reshape(*x.shape[:2], 2, width // 2)).flatten(-2)  # type: ignore[no-any-return]
        if step.kind == "glu":
            return F.glu(layer(x))
        if step.kind == "first":
            return x + x[:, :1]
        if step.kind == "zero norm":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)
        return F.relu(layer(x)) if step.width == 8 else layer(x)


def steps(kinds: list[str]) -> st.SearchStrategy[list[Step]]:
    sources = st.tuples(st.integers(0, 9), st.integers(0, 9))
    step = st.builds(Step, st.sampled_from(kinds), sources, st.sampled_from([4, 8, 12]), st.booleans())
    return st.lists(step, min_size=3, max_size=9)


def check(plan: list[Step], seed: int, *, image: bool) -> None:
    model = mask_by_hand(randomise(Random(plan, image=image), seed), 1.0, structure="unstructured")
    generator = torch.Generator().manual_seed(seed)
    for handle in sparse_weights(model)[:-1]:
        site = handle.record.site
        matrix = site.to_matrix(handle.mask).clone()
        dead = torch.rand(matrix.shape[0], generator=generator) < 0.4
        matrix[dead] = False
        matrix &= torch.rand(matrix.shape, generator=generator) < 0.7
        with torch.no_grad():
            handle.mask.copy_(site.from_matrix(matrix))
            handle.weight.mul_(handle.mask)
    x = torch.randn(2, 4, 4, 4, generator=generator) if image else torch.randn(2, 3, 4, generator=generator)
    result = removed(model, (x,))
    assert not any(note.undone for note in result.notes)
    program = result.subject
    for batch in (None, 1, 3):
        assert relative_error(model, program, batch) < 1e-5


BUDGET = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.long
@BUDGET
@given(steps(IMAGE_KINDS), st.integers(0, 1000))
def test_random_convolutional_networks(plan: list[Step], seed: int) -> None:
    check(plan, seed, image=True)


@pytest.mark.long
@BUDGET
@given(steps(TOKEN_KINDS), st.integers(0, 1000))
def test_random_networks_of_tokens(plan: list[Step], seed: int) -> None:
    check(plan, seed, image=False)
