"""Which convolutions have their samples innermost, where samples are brought there, and that values stay the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.lowering.loading import load_lowered
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.passes.arrange_samples import ArrangeSamples
from srigl_fx.passes.condensed_nodes import ARRANGE, CONCAT, CONV
from srigl_fx.passes.program import arguments
from srigl_fx.runtime.arranged import block_samples
from srigl_fx.runtime.ort import abi


class Chain(nn.Module):
    """Convolutions a to d, 16 -> 16 channels each and three wide, e, one wide, and others, composed by ``forward``."""

    def __init__(self, compose: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.e, self.grouped = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.up = nn.ConvTranspose2d(16, 16, 3, padding=1)
        self.of_two, self.of_three = (nn.Conv2d(16 * count, 16, 3, padding=1) for count in (2, 3))
        self.norm = nn.BatchNorm2d(16)
        self.compose = compose

    def forward(self, x: Tensor) -> Any:
        return self.compose(self, x)


def lowered_by(compose: Callable[[Any, Tensor], Any], batch: int = 16, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = mask_by_hand(randomise(Chain(compose)), 0.2).eval()
    x = torch.randn(batch, 16, 5, 6)
    return model, sx.lower(model, (x,), **{"min_speedup": 0, "verify": "each pass", **options})


def found(lowered: LoweredModule) -> tuple[list[bool], int, int]:
    """Which convolutions are arranged, in order, and how often samples are brought innermost, and back."""
    flags = [arguments(node)["arranged"] for node in lowered.graph.find_nodes(op="call_function", target=CONV)]
    backs = [arguments(node)["back"] for node in lowered.graph.find_nodes(op="call_function", target=ARRANGE)]
    return flags, backs.count(False), backs.count(True)


YES, NO = True, False

CASES: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[list[bool], int, int]]] = {
    "one": (lambda m, x: m.a(x), ([YES], 1, 1)),
    "one wide": (lambda m, x: m.e(x), ([NO], 0, 0)),
    "one wide, between": (lambda m, x: m.b(m.e(m.a(x))), ([YES, YES, YES], 1, 1)),
    "any pointwise operator": (lambda m, x: m.b(torch.erf(m.a(x)).atan() * 2), ([YES, YES], 1, 1)),
    "behind the last": (lambda m, x: torch.erf(m.a(x)).sum((2, 3)), ([YES], 1, 1)),
    "a residual": (lambda m, x: (lambda y: m.c(F.relu(m.b(y) + y)))(m.a(x)), ([YES] * 3, 1, 1)),
    "the input as a residual": (lambda m, x: m.b(m.a(x) + x), ([YES] * 2, 1, 1)),
    "a gate": (lambda m, x: m.c(torch.sigmoid(m.a(x)) * m.b(x)), ([YES] * 3, 1, 1)),
    "a gate of other samples": (lambda m, x: m.b(m.a(x) * torch.atan(x)), ([YES] * 2, 2, 2)),
    "broadcast": (lambda m, x: m.b(m.a(x) * m.a.bias[:, None, None]), ([YES] * 2, 2, 2)),
    "pooling": (lambda m, x: m.b(F.max_pool2d(m.a(x), 3, 2, 1)), ([YES] * 2, 1, 1)),
    "pooling by means": (lambda m, x: m.b(F.avg_pool2d(m.a(x), (2, 3), padding=1, stride=1)), ([YES] * 2, 1, 1)),
    "pooling what is not arranged": (lambda m, x: m.a(F.max_pool2d(x, 3, 1, 1)), ([YES], 1, 1)),
    "the mean of an image": (lambda m, x: m.a(x).mean((-1, -2), keepdim=True).flatten(1), ([YES], 1, 1)),
    "the adaptive mean": (lambda m, x: F.adaptive_avg_pool2d(m.a(x), 1), ([YES], 1, 1)),
    "other pooling": (
        lambda m, x: m.c(F.avg_pool2d(m.b(F.max_pool2d(m.a(x), 2, 1, ceil_mode=True)), 3, 1, 1, False, False)),
        ([YES] * 3, 3, 3),
    ),
    "some of a mean": (lambda m, x: m.b(m.a(x) + m.a(x).mean(2, keepdim=True)), ([YES] * 3, 3, 3)),
    "padding": (lambda m, x: m.b(F.pad(m.a(x), (1, 0, 2, 1), value=0.5)), ([YES] * 2, 1, 1)),
    "padding behind the last": (lambda m, x: F.pad(m.a(x), (1, 0)), ([YES], 1, 1)),
    "other padding": (lambda m, x: m.c(F.pad(m.b(F.pad(m.a(x), (1, 1, 0, 0), "reflect")), (-1, 0))), ([YES] * 3, 3, 3)),
    "concatenation": (lambda m, x: (lambda y: m.of_two(torch.cat((y, m.b(y)), -3)))(m.a(x)), ([YES] * 3, 1, 1)),
    "concatenation of others": (lambda m, x: m.of_two(torch.cat((m.a(x), x), 1)), ([YES] * 2, 2, 2)),
    "concatenation of samples": (lambda m, x: m.b(torch.cat((m.a(x), m.a(x * 2)))), ([YES] * 3, 3, 3)),
    "a batch norm": (lambda m, x: m.b(F.relu(m.norm(m.a(x) + x))), ([YES] * 2, 1, 1)),
    "two readers": (lambda m, x: (lambda y: (m.b(y), y.mean((2, 3)), y.amax((2, 3))))(m.a(x)), ([YES] * 2, 1, 2)),
    "depthwise": (lambda m, x: m.b(m.grouped(m.a(x))), ([YES, NO, YES], 2, 2)),
    "transposed": (lambda m, x: m.b(m.up(m.a(x))), ([YES, NO, YES], 2, 2)),
}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_regions_and_their_borders(name: str) -> None:
    compose, expected = CASES[name]
    model, lowered = lowered_by(compose)
    assert found(lowered) == expected
    reasons = [note.reason for note in lowered.report.notes if note.by == "ArrangeSamples"]
    assert sum(reason.startswith("samples innermost") for reason in reasons) == sum(expected[0])
    again = LoweredModule.from_bytes(lowered._bytes())
    assert found(again) == expected
    with torch.no_grad():
        for batch in (1, 15, 16, 17, 33):
            x = torch.randn(batch, 16, 5, 6)
            torch.testing.assert_close(lowered(x), model(x), rtol=0, atol=1e-5)
            torch.testing.assert_close(again(x), lowered(x), rtol=0, atol=0)


def chain(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.b(F.relu(m.a(x)))
    return y


@pytest.mark.long
def test_what_concatenations_begin_with_is_joined_once() -> None:
    def dense(m: Any, x: Tensor) -> Tensor:
        parts = [m.a(x), m.b(x)]
        parts.append(m.of_two(torch.cat(parts, 1)))
        return m.of_three(torch.cat(parts, 1))  # type: ignore[no-any-return]

    model, lowered = lowered_by(dense)
    assert found(lowered) == ([YES] * 4, 1, 1)
    assert len(lowered.graph.find_nodes(op="call_function", target=CONCAT)) == 2
    x = torch.randn(17, 16, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_from_a_block_of_samples_on() -> None:
    block = block_samples()
    for batch, worth in ((1, False), (block - 1, False), (block + 1, True)):
        assert found(lowered_by(chain, batch)[1])[0] == [worth] * 2
    assert found(lowered_by(chain, 2, batch_sizes=[16, 64])[1])[0] == [True] * 2
    assert found(lowered_by(chain, 16, batch_sizes=[1, 64])[1])[0] == [False] * 2
    never = tuple(step for step in sx.passes.pipelines.whole(()) if not isinstance(step, ArrangeSamples))
    assert found(lowered_by(chain, passes=never)[1])[0] == [False] * 2


@pytest.mark.slow
def test_other_values() -> None:
    assert found(lowered_by(chain, value_dtype=torch.int8)[1])[0] == [False] * 2
    assert found(lowered_by(chain, value_dtype=torch.bfloat16)[1])[0] == [True] * 2


@pytest.mark.slow
def test_gradients() -> None:
    model, lowered = lowered_by(chain)
    x = torch.randn(17, 16, 5, 6)
    grads = []
    for one in (model, lowered):
        leaf = x.clone().requires_grad_()
        one(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-3)


def every_form(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = F.relu(m.norm(m.b(y) + y))
    padded = F.pad(m.of_two(torch.cat((y, z), 1)), (1, 0, 0, 1))
    return m.c(F.avg_pool2d(F.max_pool2d(padded, 2, 1), 2))  # type: ignore[no-any-return]


@pytest.mark.long
def test_files_and_onnx(tmp_path: Path) -> None:
    model, lowered = lowered_by(every_form)
    assert found(lowered) == ([YES] * 4, 1, 1)
    path = tmp_path / "model.onnx"
    lowered.save(tmp_path / "model.srigl")
    assert found(load_lowered(tmp_path / "model.srigl")) == found(lowered)
    sx.export_onnx(lowered, path, (torch.randn(16, 16, 5, 6),))
    nodes = [node for node in onnx.load(path).graph.node if node.domain == abi.DOMAIN]
    others = [abi.ARRANGE, abi.AFFINE, abi.CONCAT, abi.PAD, abi.MAX_POOL, abi.MEAN_POOL, abi.ARRANGE]
    assert [node.op_type for node in nodes if node.op_type in abi.NO_LAYERS] == others
    assert sum(item.name == "arranged" and item.i == 1 for node in nodes for item in node.attribute) == 4
    sessions = sx.runtime.load(path), onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 16, 17, 35):
        x = torch.randn(batch, 16, 5, 6)
        with torch.no_grad():
            y = model(x)
        for session in sessions:
            (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(got), y, rtol=0, atol=1e-5)
