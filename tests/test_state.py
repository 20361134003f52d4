"""Models that keep state in buffers: lowered, as ONNX files with inputs and outputs, and untouched by every verb."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx import onnx_tools
from srigl_fx.errors import CaptureError, ExportError, FormatError, LoweringError
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.passes.capture import capture
from srigl_fx.runtime.ort.stream import KEY
from srigl_fx.train.flops import layer_costs

Forward = Callable[[Any, Tensor], Any]


class Streaming(nn.Module):
    """Layers around a forward that is given, with buffers for it."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 4)
        self.inner = nn.Module()
        self.inner.register_buffer("h", torch.randn(1, 8))
        self.register_buffer("context", torch.randn(1, 8))
        self.register_buffer("n", torch.zeros((), dtype=torch.long))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool), persistent=False)
        self.calls = 0
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self._forward(self, torch.relu(self.fc(x))))
        return y


def copied(m: Any, y: Tensor) -> Any:
    before = m.inner.h + y
    m.inner.h.copy_(y[:1])
    return before


def assigned(m: Any, y: Tensor) -> Any:
    m.context = torch.tanh(y[:1] + m.context)
    return y * m.context


def sliced(m: Any, y: Tensor) -> Any:
    m.inner.h[:, 2:5] = y[:1, 2:5]
    return y + m.inner.h


def averaged(m: Any, y: Tensor) -> Any:
    m.inner.h.lerp_(y.mean(0, keepdim=True), 0.1)
    return y - m.inner.h


def indexed(m: Any, y: Tensor) -> Any:
    m.inner.h.index_put_((torch.tensor([0]), torch.tensor([2])), y[0, 0])
    return y - m.inner.h


def counted(m: Any, y: Tensor) -> Any:
    m.n += 1
    return y / m.n


def begun(m: Any, y: Tensor) -> Any:
    y = torch.where(m.started, y, -y)
    m.started.fill_(True)
    return y


def silent(m: Any, y: Tensor) -> Any:
    m.n = m.n + 1
    return y


def in_part(m: Any, y: Tensor) -> Any:
    m.inner.h = torch.tanh(y[:1] + m.inner.h)
    return y * m.inner.h


def in_an_entry(m: Any, y: Tensor) -> Any:
    m._buffers["n"] = m.n + 1
    return y / m.n


def delayed(m: Any, y: Tensor) -> Any:
    before = m.inner.h
    m.inner.h = y[:1]
    return y + before


def twice(m: Any, y: Tensor) -> Any:
    m.inner.h.mul_(0.5)
    m.inner.h = m.inner.h + y[:1]
    m.inner.h[:, 2:5] = y[1:, 2:5]
    return y * m.inner.h


def in_a_ring(m: Any, y: Tensor) -> Any:
    place = y[0].argmax()
    m.inner.h[0, (place + 3) % 8] = y[0, 1]
    m.inner.h[..., place] += 2.0
    m.inner.h[:, place - 8] = y[:1, 1] + m.inner.h[:, place]
    m.inner.h[None, 0, (place + 1) % 8] = -1
    return y - m.inner.h


WRITES: dict[Forward, str] = {
    copied: "inner.h",
    assigned: "context",
    sliced: "inner.h",
    averaged: "inner.h",
    indexed: "inner.h",
    counted: "n",
    begun: "started",
    silent: "n",
    in_part: "inner.h",
    in_an_entry: "n",
    delayed: "inner.h",
    twice: "inner.h",
    in_a_ring: "inner.h",
}
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
CHUNKS = [X, X.flip(0) * 2, -X]


def streaming(forward: Forward) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = sx.sparsify(Streaming(forward), sparsity=0.5).eval()
    return model


def called(model: nn.Module) -> list[Tensor]:
    """What a copy of the model returns, call after call."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        return [fresh(chunk) for chunk in CHUNKS]


def snapshot(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (id(buffer), buffer.clone()) for name, buffer in model.named_buffers()}


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    now = dict(model.named_buffers())
    assert now.keys() == before.keys()
    assert getattr(model, "calls", 0) == 0
    assert all(id(now[name]) == number and torch.equal(now[name], value) for name, (number, value) in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("forward", WRITES, ids=lambda forward: forward.__name__)
def test_a_lowered_model_keeps_state_of_its_own(forward: Forward, tmp_path: Path) -> None:
    model = streaming(forward)
    before, expected = snapshot(model), called(model)
    lowered = sx.lower(model, (X,), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    assert lowered.report.max_error is not None
    lowered.save(tmp_path / "model.srigl")
    for one in (copy.deepcopy(lowered), sx.load_lowered(tmp_path / "model.srigl"), lowered):
        with torch.no_grad():
            for wanted, chunk in zip(expected, CHUNKS, strict=True):
                torch.testing.assert_close(one(chunk), wanted, rtol=1e-4, atol=1e-5)
    assert_untouched(model, before)


@pytest.mark.long
@pytest.mark.parametrize("forward", WRITES, ids=lambda forward: forward.__name__)
def test_a_file_takes_and_returns_the_state(forward: Forward, tmp_path: Path) -> None:
    model = streaming(forward)
    before, expected, name = snapshot(model), called(model), WRITES[forward]
    report = sx.export_onnx(model, tmp_path / "model.onnx", (X,), min_speedup=0)
    assert_untouched(model, before)
    assert report.state == (name,)
    assert report.fallback_error is not None
    assert report.fallback_error < 1e-4
    session = sx.runtime.load(tmp_path / "model.onnx")
    assert [value.name for value in session.get_inputs()] == ["x", f"state.{name}"]
    assert [value.name for value in session.get_outputs()] == ["output", f"next_state.{name}"]
    streams = [sx.runtime.Stream(session) for _ in range(2)]
    np.testing.assert_array_equal(streams[0].state[name], before[name][1].numpy())
    for wanted, chunk in zip(expected, CHUNKS, strict=True):
        for stream in streams:  # each with a state of its own
            np.testing.assert_allclose(stream.run(None, {"x": chunk.numpy()})[0], wanted, rtol=1e-4, atol=1e-5)
    streams[0].reset()
    np.testing.assert_allclose(streams[0].run(["output"], {"x": X.numpy()})[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_file_may_be_refused_for_its_state(tmp_path: Path) -> None:
    model = streaming(copied)
    with pytest.raises(ExportError, match=r"the buffer 'h' of inner \(Module\)"):
        sx.export_onnx(model, tmp_path / "model.onnx", (X,), state="error", min_speedup=0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ExportError, match="state must be"):
        sx.export_onnx(model, tmp_path / "model.onnx", (X,), state="initial", min_speedup=0)  # type: ignore[arg-type]


@pytest.mark.long
def test_a_malformed_state_in_a_file_is_an_error(tmp_path: Path) -> None:
    sx.export_onnx(streaming(counted), tmp_path / "model.onnx", (X,), verify=False, min_speedup=0)
    proto = onnx.load(tmp_path / "model.onnx")
    (entry,) = [one for one in proto.metadata_props if one.key == KEY]
    for text in ("[1]", entry.value.replace('"shape": []', '"shape": [9]'), entry.value.replace('"n"', '"m"')):
        entry.value = text
        onnx.save(proto, tmp_path / "other.onnx")
        with pytest.raises(FormatError, match="export the model anew"):
            sx.runtime.Stream(sx.runtime.load(tmp_path / "other.onnx"))


@pytest.mark.slow
def test_a_stream_of_a_file_without_state_is_the_session(tmp_path: Path) -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), sparsity=0.5).eval()
    sx.export_onnx(model, tmp_path / "model.onnx", (X,), verify=False, min_speedup=0)
    stream = sx.runtime.Stream(sx.runtime.load(tmp_path / "model.onnx"))
    with torch.no_grad():
        np.testing.assert_allclose(stream.run(None, {"input": X.numpy()})[0], model(X), rtol=1e-4, atol=1e-5)
    assert stream.state == {}


class Cell(nn.Module):
    """A recurrent layer that keeps what it was in two buffers, and gives what it was two calls ago, too."""

    one: Tensor
    two: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("one", torch.zeros(1, 8))
        self.register_buffer("two", torch.ones(1, 8))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        before = self.two
        self.one, self.two = self.two, self.one
        self.one = torch.tanh(self.fc(y)[:1] + self.one)
        return y * self.one, before


class Cells(nn.Module):
    """Sub-modules whose own forward assigns their buffers, called with keywords; one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 4)
        self.cells = nn.ModuleList([Cell(), nn.ModuleDict({"inside": Cell()})])

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        y, before = self.cells[0](torch.relu(self.fc(x)) * scale)
        for _ in range(2):
            y, latest = self.cells[1]["inside"](y)  # type: ignore[index]
        return {"y": self.out(y), "before": before, "latest": latest}


@pytest.mark.long
def test_what_sub_modules_assign_is_state_of_the_graph_and_of_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sx.sparsify(Cells(), sparsity=0.5).eval()
    before, fresh, scale = snapshot(model), copy.deepcopy(model), torch.tensor(0.5)
    with torch.no_grad():
        expected = [fresh(chunk, scale=scale) for chunk in CHUNKS]
    lowered = sx.lower(model, ((X,), {"scale": scale}), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    report = sx.export_onnx(model, tmp_path / "model.onnx", ((X,), {"scale": scale}), min_speedup=0)
    names = ["cells.0.one", "cells.0.two", "cells.1.inside.one", "cells.1.inside.two"]
    assert sorted(report.state) == names
    stream = sx.runtime.Stream(sx.runtime.load(tmp_path / "model.onnx"))
    with torch.no_grad():
        for wanted, chunk in zip(expected, CHUNKS, strict=True):
            torch.testing.assert_close(lowered(chunk, scale=scale), wanted, rtol=1e-4, atol=1e-5)
            served = stream.run(["y", "before", "latest"], {"x": chunk.numpy(), "scale": scale.numpy()})
            for got, value in zip(served, (wanted["y"], wanted["before"], wanted["latest"]), strict=True):
                np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-5)
    assert_untouched(model, before)
    with pytest.raises(ExportError, match=r"the buffer 'one' of cells\.0 \(Cell\)"):
        sx.export_onnx(model, tmp_path / "other.onnx", ((X,), {"scale": scale}), state="error", min_speedup=0)


@pytest.mark.slow
def test_a_forward_of_the_very_object_may_assign_state() -> None:
    model = streaming(in_part)
    plain = model.forward
    model.forward = lambda x: plain(x) * 2
    with torch.no_grad():
        program = capture(model, (X,))
        before = dict(model.named_buffers())["inner.h"].clone()
        expected = [model(chunk) for chunk in CHUNKS]
        model.get_buffer("inner.h").copy_(before)
        for wanted, chunk in zip(expected, CHUNKS, strict=True):
            torch.testing.assert_close(program.module(chunk), wanted)


@pytest.mark.long
@pytest.mark.parametrize("shared_first", [True, False])
def test_a_shared_buffer_that_one_of_its_modules_assigns_is_no_part_of_a_graph(shared_first: bool) -> None:
    model = Streaming(in_part if shared_first else assigned)
    model.inner.h = model.context
    sx.sparsify(model.eval(), sparsity=0.5)
    before, expected = snapshot(model), called(model)
    lowered = sx.lower(model, (X,), min_speedup=0)
    assert "a buffer that two modules share" in lowered.report.capture_failures[0].error
    with torch.no_grad():
        for wanted, chunk in zip(expected, CHUNKS, strict=True):
            torch.testing.assert_close(lowered(chunk), wanted, rtol=1e-4, atol=1e-5)
    assert_untouched(model, before)


def in_place(m: Any, y: Tensor) -> Any:
    m.inner.h.copy_(y[:1] + m.inner.h * 0.5)
    return y * m.context


@pytest.mark.long
def test_a_buffer_in_two_modules_that_is_written_in_place_is_named_with_both(tmp_path: Path) -> None:
    model = Streaming(in_place)
    model.inner.h = model.context
    sx.sparsify(model.eval(), sparsity=0.5)
    before = snapshot(model)
    with pytest.raises(ExportError, match=r"registered in 2 places \(context, inner\.h\)"):
        sx.export_onnx(model, tmp_path / "model.onnx", (X,))
    assert_untouched(model, before)


def unseen_data(m: Any, y: Tensor) -> Any:
    m.inner.h.data = y[:1] + m.inner.h
    return y * m.inner.h


def retyped(m: Any, y: Tensor) -> Any:
    m.n = m.n + 1.5
    return y / m.n


def grown(m: Any, y: Tensor) -> Any:
    m.inner.h = y + m.inner.h
    return m.inner.h * 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (unseen_data, r"'h' of inner .* in a way that torch.export does not see"),
        (retyped, r"changes the buffer 'n' .* from int64 \(\) to float32 \(\)"),
        (grown, r"changes the buffer 'h' of inner .* from float32 \(1, 8\) to float32 \(2, 8\)"),
    ],
)
def test_writes_that_no_graph_has_are_left_to_the_models_own_code(
    forward: Forward, message: str, tmp_path: Path
) -> None:
    model = streaming(forward)
    before, expected = snapshot(model), called(model)
    lowered = sx.lower(model, (X,), min_speedup=0)
    assert not isinstance(lowered, LoweredModule)
    with torch.no_grad():
        for wanted, chunk in zip(expected, CHUNKS, strict=True):
            torch.testing.assert_close(lowered(chunk), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ExportError, match=message):
        sx.export_onnx(model, tmp_path / "model.onnx", (X,), min_speedup=0)
    assert_untouched(model, before)


@pytest.mark.slow
def test_state_outside_buffers_is_found_by_the_verification() -> None:
    def attribute(m: Any, y: Tensor) -> Any:
        m.calls += 1
        return y * m.calls

    model = streaming(attribute)
    before = snapshot(model)
    with pytest.raises(LoweringError, match=r"in call 2 .* keeps state in calls, .*register_buffer"):
        sx.lower(model, (X,), min_speedup=0)
    assert_untouched(model, before)


@pytest.mark.parametrize("forward", [*WRITES, unseen_data, retyped, grown])
def test_no_verb_touches_the_state(forward: Forward) -> None:
    model = Streaming(forward)
    before = snapshot(model)
    sx.sparsify(model, sparsity=0.5, example_inputs=(X,))
    masked = {name for name, _ in model.named_buffers()} - before.keys()
    before |= {name: entry for name, entry in snapshot(model).items() if name in masked}
    assert_untouched(model, before)
    sx.summary(model)
    sx.verify(model)
    layer_costs(model, (X,))
    assert_untouched(model, before)


class WritesInputs(nn.Module):
    """Writes into what it is given, and decides by values where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, more: dict[str, Tensor], decide: bool = False) -> Tensor:
        x.mul_(2)
        more["shift"].add_(1)
        h = torch.relu(self.fc(x)) + more["shift"]
        y: Tensor = self.out(h * 2 if decide and h.sum() > 0 else h)
        return y


@pytest.mark.long
@pytest.mark.parametrize("decide", [False, True])
def test_no_verb_touches_the_inputs(decide: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sx.sparsify(WritesInputs(), sparsity=0.5).eval()
    inputs = (X.clone(), {"shift": torch.ones(2, 1)}, decide)
    expected = model(X.clone(), {"shift": torch.ones(2, 1)}, decide)

    def export() -> None:
        sx.export_onnx(model, tmp_path / "model.onnx", inputs, min_speedup=0)

    calls: list[Callable[[], Any]] = [
        lambda: sx.sparsify(WritesInputs(), sparsity=0.5, example_inputs=inputs),
        lambda: sx.lower(model, inputs),
        lambda: sx.lower(model, inputs, min_speedup=0, verify="each pass"),
        lambda: layer_costs(model, inputs),
    ]
    for call in calls:
        call()
        assert torch.equal(inputs[0], X)
        assert torch.equal(inputs[1]["shift"], torch.ones(2, 1))
    if decide:
        with pytest.raises(ExportError, match="not one graph"):
            export()
    else:
        export()
    assert torch.equal(inputs[0], X)
    assert torch.equal(inputs[1]["shift"], torch.ones(2, 1))
    lowered = sx.lower(model, inputs, min_speedup=0)
    torch.testing.assert_close(lowered(X.clone(), {"shift": torch.ones(2, 1)}, decide), expected, rtol=1e-4, atol=1e-5)


class TrainsItsNorm(nn.Module):
    def __init__(self, norm: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()
        y: Tensor = self.norm(self.layer(x))
        return y


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "layer", "sizes"),
    [
        (nn.BatchNorm1d(6), nn.Linear(16, 6), (16,)),
        (nn.BatchNorm2d(6, affine=False, momentum=0.3), nn.Conv2d(4, 6, 3), (4, 8, 7)),
        (nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(16, 6), (16,)),
    ],
    ids=["linear", "convolution", "no statistics"],
)
def test_batch_norm_that_is_training_is_exported_so(
    norm: nn.Module, layer: nn.Module, sizes: tuple[int, ...], tmp_path: Path
) -> None:
    model = sx.sparsify(TrainsItsNorm(copy.deepcopy(norm), copy.deepcopy(layer)), sparsity=0.5).eval()
    sx.export_onnx(model, tmp_path / "model.onnx", (torch.randn(4, *sizes),), min_speedup=0)
    stream = sx.runtime.Stream(sx.runtime.load(tmp_path / "model.onnx"))
    for batch in (4, 7, 3):
        x = torch.randn(batch, *sizes)
        with torch.no_grad():
            expected = model(x)
        np.testing.assert_allclose(stream.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4, atol=1e-5)
    for name, buffer in dict(model.named_buffers()).items():
        if name in stream.state:
            np.testing.assert_allclose(stream.state[name], buffer, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_merged_files_keep_the_state_of_both(tmp_path: Path) -> None:
    models: list[Any] = [Streaming(forward) for forward in (averaged, counted)]
    models[0].out = nn.Linear(8, 6)  # what the second takes
    models = [sx.sparsify(model, sparsity=0.5).eval() for model in models]
    for name, model in zip("ab", models, strict=True):
        sx.export_onnx(model, tmp_path / f"{name}.onnx", (X,), min_speedup=0)
    both = tmp_path / "both.onnx"
    onnx_tools.merge(tmp_path / "a.onnx", tmp_path / "b.onnx", both, {"output": "x"}, prefixes=("a_", "b_"))
    stream = sx.runtime.Stream(sx.runtime.load(both))
    assert list(stream.state) == ["a_inner.h", "b_n"]
    for _ in range(3):
        with torch.no_grad():
            expected = models[1](models[0](X))
        np.testing.assert_allclose(stream.run(None, {"a_x": X.numpy()})[0], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stream.state["a_inner.h"], models[0].inner.h, rtol=1e-5, atol=1e-6)


def in_a_list(m: Any, y: Tensor) -> Any:
    y = y + m.kept[-1]
    m.kept.append(y[:1])
    return y


def in_a_dict(m: Any, y: Tensor) -> Any:
    y = y + m.cache.get("last", 0)
    m.cache["last"] = y[:1]
    return y


@pytest.mark.long
@pytest.mark.parametrize(("forward", "name"), [(in_a_list, "kept"), (in_a_dict, "cache")])
def test_lists_and_dicts_are_given_back_as_they_were(forward: Forward, name: str, tmp_path: Path) -> None:
    model: Any = sx.sparsify(Streaming(forward), sparsity=0.5).eval()
    first = torch.randn(1, 8)
    model.kept, model.cache = [first], {"first": [first]}
    with pytest.raises(LoweringError, match=f"keeps state in {name}"):
        sx.lower(model, (X,), min_speedup=0)
    calls: list[Callable[[], Any]] = [
        lambda: sx.lower(model, (X,), min_speedup=0),
        lambda: sx.export_onnx(model, tmp_path / "model.onnx", (X,), min_speedup=0),
        lambda: layer_costs(model, (X,)),
    ]
    for call in calls:
        with contextlib.suppress(LoweringError):
            call()
        assert len(model.kept) == 1
        assert model.kept[0] is first
        assert list(model.cache) == ["first"]
        assert model.cache["first"][0] is first


def at_a_number(m: Any, y: Tensor) -> Any:
    m.context[0, int(m.n % 8)] = y[0, 0]
    return y + m.context


def in_a_range(m: Any, y: Tensor) -> Any:
    m.context[:, m.n : m.n + 1] = y[:1, :1]
    return y + m.context


@pytest.mark.parametrize("forward", [at_a_number, in_a_range])
def test_a_place_that_no_graph_knows_is_refused_with_the_remedy(forward: Forward, tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = streaming(forward)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.memory(x)
            return y

    remedy = r"m\.context\[.*a position in memory is known only when the graph runs: index with the tensor itself"
    with pytest.raises(ExportError, match=remedy):
        sx.export_onnx(Outer().eval(), tmp_path / "model.onnx", (torch.randn(2, 6),), min_speedup=0)


class Count(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(1), requires_grad=False)


class WritesParameter(nn.Module):
    """Counts in a parameter that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.inner = Count()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.inner.count.add_(1)
        y: Tensor = self.fc(x) * self.inner.count
        return y


def test_a_parameter_that_is_written_is_named(tmp_path: Path) -> None:
    model = sx.sparsify(WritesParameter(), sparsity=0.5).eval()
    for verb in (
        lambda: sx.lower(model, (torch.randn(2, 16),)),
        lambda: sx.export_onnx(model, tmp_path / "model.onnx", (torch.randn(2, 16),)),
    ):
        with pytest.raises(CaptureError, match=r"inner \(Count\) writes to its parameter 'count'.*register_buffer"):
            verb()
    assert not list(tmp_path.iterdir())
