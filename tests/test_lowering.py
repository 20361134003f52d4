"""``lower`` end to end: whole models against their masked selves, saved, copied, compiled, exported again."""

import contextlib
import copy
import importlib.util
import json
import math
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn
from torch.nn import functional

import srigl_fx as sx
from srigl_fx.errors import CaptureError, ExportError, FormatError, InvariantError, LoweringError
from srigl_fx.lowering.loading import load_lowered
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.lowering.pipeline import lower
from srigl_fx.masks.records import sparse_weights

ours = torch.ops.srigl_fx


class ResidualCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding="same", groups=2)
        self.norm2 = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1, padding_mode="circular")
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm1(self.stem(x)))
        x = x + functional.relu_(self.norm2(self.conv(x)))
        y: Tensor = self.head(self.down(x).relu().mean((2, 3)))
        return y


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.zeros(1, 4, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        y: Tensor = self.head(self.blocks(x).mean(1))
        return y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 12, bias=False), nn.Tanh(), nn.Linear(12, 7))


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
CASES: dict[str, Case] = {
    "mlp": (mlp, (20,)),
    "cnn": (ResidualCnn, (3, 8, 8)),
    "vit": (VisionTransformer, (3, 8, 8)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, LoweredModule, tuple[int, ...]]:
    make, shape = CASES[request.param]
    model = mask_by_hand(randomise(make()), 0.3, ablated=2).eval()
    lowered = lower(model, (torch.randn(1, *shape),), min_speedup=0)
    assert isinstance(lowered, LoweredModule)
    return model, lowered, shape


def assert_same(model: nn.Module, lowered: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), model(x), rtol=1e-4, atol=1e-5)


Lowered = tuple[nn.Module, LoweredModule, tuple[int, ...]]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 24, 67])
def test_same_outputs_at_any_batch(case: Lowered, batch: int) -> None:
    model, lowered, shape = case
    assert_same(model, lowered, torch.randn(batch, *shape))


def test_everything_is_condensed_and_smaller(case: Lowered) -> None:
    model, lowered, _ = case
    report = lowered.report
    assert {layer.decision for layer in report.layers} == {"condensed"}
    assert [layer.fqn for layer in report.layers] == [weight.fqn for weight in sparse_weights(model)]
    assert report.bytes_after < 0.7 * report.bytes_before
    assert report.dynamic_batch
    assert report.max_error is not None
    names = {*dict(lowered.named_parameters()), *dict(lowered.named_buffers())}
    assert not names & {layer.fqn for layer in report.layers}
    for layer in report.layers:
        ours = {name.rpartition("_")[2] for name in names if name.startswith(f"{layer.fqn}_")}
        assert ours >= {"values", "indices", "active"}


def test_the_model_is_unchanged_and_shares_its_dense_parameters(case: Lowered) -> None:
    model, lowered, _ = case
    theirs = dict(model.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in lowered.named_parameters())
    assert all(parameter.requires_grad for parameter in theirs.values())
    assert not any("_values" in name for name in model.state_dict())


@pytest.mark.slow
def test_what_nothing_changes_is_shared() -> None:
    model = mask_by_hand(randomise(nn.Sequential(nn.Embedding(9, 20), nn.LayerNorm(20), mlp())), 0.3).eval()
    lowered = lower(model, (torch.randint(0, 9, (2, 3)),), min_speedup=0)
    theirs = dict(model.named_parameters())
    shared = dict(lowered.named_parameters())
    assert {"0.weight", "1.weight", "1.bias", "2.0.bias"} <= set(shared)
    assert all(parameter is theirs[name] for name, parameter in shared.items())


def test_copies_keep_class_report_and_outputs(case: Lowered) -> None:
    model, lowered, shape = case
    for copied in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
        assert isinstance(copied, LoweredModule)
        assert copied.report == lowered.report
        assert_same(model, copied, torch.randn(3, *shape))
        with pytest.raises(LoweringError, match="captured for"):
            copied(torch.randn(2, 1, 1))
        with pytest.raises(LoweringError, match=r"captured for float32 .*: give it as float32"):
            copied(torch.randn(3, *shape).double())


def test_save_and_load(case: Lowered, tmp_path: Path) -> None:
    _, lowered, shape = case
    lowered.save(tmp_path / "model.srigl")
    again = load_lowered(tmp_path / "model.srigl")
    assert [path.name for path in tmp_path.iterdir()] == ["model.srigl"]
    assert again.report == lowered.report
    x = torch.randn(5, *shape)
    with torch.no_grad():
        assert torch.equal(again(x), lowered(x))
    assert dict(again.named_parameters()).keys() == dict(lowered.named_parameters()).keys()
    again.save(tmp_path / "model.srigl")
    with torch.no_grad():
        assert torch.equal(load_lowered(tmp_path / "model.srigl")(x), lowered(x))


class ByKeys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"0": self.layer(x["0"]), "it's {x}": x["a b"] + 1}


def test_keys_of_inputs_and_outputs_may_be_any_words(tmp_path: Path) -> None:
    model = mask_by_hand(randomise(ByKeys()), 0.4).eval()
    x = {"0": torch.randn(3, 16), "a b": torch.randn(3, 2)}
    lower(model, (x,), min_speedup=0).save(tmp_path / "model.srigl")
    again = load_lowered(tmp_path / "model.srigl")(x)
    assert list(again) == ["0", "it's {x}"]
    for key, expected in model(x).items():
        torch.testing.assert_close(again[key], expected)


@pytest.mark.long
def test_export_again_and_compile(case: Lowered) -> None:
    model, lowered, shape = case
    x = torch.randn(4, *shape)
    program = torch.export.export(lowered, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert any(
        node.target in (ours.condensed_linear.default, ours.condensed_conv.default) for node in program.graph.nodes
    )
    assert_same(model, program.module(), torch.randn(7, *shape))
    compiled = torch.compile(lowered, fullgraph=True, backend="aot_eager")
    assert_same(model, compiled, x)


def test_report_is_a_table_and_a_dict(case: Lowered) -> None:
    report = case[1].report
    text = str(report)
    assert all(layer.fqn in text for layer in report.layers)
    assert type(report).from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_eight_threads(case: Lowered) -> None:
    model, lowered, shape = case
    inputs = [torch.randn(1 + 5 * i, *shape) for i in range(8)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    worst = [float("inf")] * 8

    def work(i: int) -> None:
        with torch.no_grad():
            worst[i] = max(float((lowered(inputs[i]) - expected[i]).abs().max()) for _ in range(5))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(worst) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("density", "ablated"), [(1.0, 0), (0.05, 0), (0.3, 32), (0.3, 33)], ids=["full", "one", "one row", "none"]
)
def test_extreme_masks(density: float, ablated: int) -> None:
    model = mask_by_hand(randomise(mlp()), density, ablated={"0.weight": ablated}).eval()
    lowered = lower(model, (torch.randn(2, 20),), min_speedup=0)
    assert lowered.report.layers[0].active == 33 - ablated
    assert_same(model, lowered, torch.randn(4, 20))


@pytest.mark.long
def test_measured_selection_is_consistent() -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 6))
    mask_by_hand(randomise(model), 0.02, ablated={"0.weight": 200}).eval()
    lowered = lower(model, (torch.randn(1, 512),), batch_sizes=[1, 3], min_speedup=1.001)  # at 1, it may estimate
    for layer in lowered.report.layers:
        assert set(layer.seconds) == {1, 3}
        assert all({"dense", "condensed"} <= set(times) for times in layer.seconds.values())
        if layer.decision != "dense":
            assert all(times["dense"] >= times[layer.decision] for times in layer.seconds.values())
    assert_same(model, lowered, torch.randn(4, 512))
    slow = lower(model, (torch.randn(1, 512),), min_speedup=1e6)
    assert {layer.decision for layer in slow.report.layers} == {"dense"}
    assert all("times as fast as dense at batch 1" in layer.reason for layer in slow.report.layers)


@pytest.mark.slow
def test_a_larger_speedup_than_any_leaves_the_weights() -> None:
    model = mask_by_hand(randomise(mlp()), 0.3).eval()
    report = lower(model, (torch.randn(2, 20),), min_speedup=float("inf")).report
    assert report.bytes_after == report.bytes_before


@pytest.mark.slow
def test_static_batch_is_reported() -> None:
    class Static(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x.view(1, -1))
            return y

    model = mask_by_hand(randomise(Static()), 0.3).eval()
    lowered = lower(model, (torch.randn(1, 12),), min_speedup=0)
    assert not lowered.report.dynamic_batch
    assert_same(model, lowered, torch.randn(1, 12))
    with pytest.raises(LoweringError, match=r"captured for .*lower the model again"):
        lowered(torch.randn(2, 12))
    with pytest.raises(LoweringError, match="batch_sizes"):
        lower(model, (torch.randn(1, 12),), batch_sizes=[1, 8])


def test_constants_of_the_graph_are_checked() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)

        def forward(self, x: Tensor, times: int, *, rest: dict[str, Tensor]) -> dict[str, Any]:
            return {"y": self.fc(x) * times, "z": (rest["a"], None)}

    model = mask_by_hand(randomise(Scaled()), 0.5).eval()
    x, rest = torch.randn(2, 6), {"a": torch.randn(2)}
    lowered = lower(model, ((x, 3), {"rest": rest}), min_speedup=0)
    assert_close = torch.testing.assert_close
    for module in (lowered, pickle.loads(pickle.dumps(lowered))):
        got = module(x, 3, rest=rest)
        assert_close(got["y"], model(x, 3, rest=rest)["y"])
        assert_close(got["z"][0], rest["a"])
        assert got["z"][1] is None
        with pytest.raises(LoweringError, match="the constant 3"):
            module(x, 4, rest=rest)


@pytest.mark.slow
def test_gradients_reach_the_inputs_and_the_shared_parameters() -> None:
    model = mask_by_hand(randomise(mlp()), 0.3, ablated=2).eval()
    lowered = lower(model, (torch.randn(2, 20),), min_speedup=0)
    x = torch.randn(3, 20, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (got,) = torch.autograd.grad(lowered(x).square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def broken(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return change(mask_by_hand(randomise(mlp()), 0.3).eval())


def off_mask(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.get_parameter("2.weight").add_(1e-3)
    return model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (off_mask, InvariantError, r"2\.weight.*masks\.apply"),
        (lambda model: model.train(), CaptureError, r"model\.eval"),
        (lambda model: model.half(), LoweringError, r"0\.weight is torch\.float16.*deepcopy"),
        (lambda model: model.to("meta"), LoweringError, "only float32 on the CPU"),
        (lambda model: mlp().eval(), LoweringError, "sparsify"),
    ],
)
def test_unfit_models(change: Callable[[nn.Module], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lower(broken(change), (torch.randn(2, 20),), min_speedup=0)


@pytest.mark.parametrize(
    "options", [{"target": "cuda"}, {"min_speedup": -1}, {"min_speedup": float("nan")}, {"batch_sizes": [0]}]
)
def test_unfit_options(options: dict[str, Any]) -> None:
    with pytest.raises(LoweringError, match=next(iter(options))):
        lower(broken(lambda model: model), (torch.randn(2, 20),), **options)


@pytest.mark.slow
def test_verification_catches_a_model_that_differs() -> None:
    class Drifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 4)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y: Tensor = self.fc(x) * self.calls
            return y

    model = mask_by_hand(randomise(Drifts()), 0.5).eval()
    with pytest.raises(LoweringError, match=r"off by .*keeps state in calls"):
        lower(model, (torch.randn(2, 6),), min_speedup=0)
    lower(model, (torch.randn(2, 6),), min_speedup=0, verify=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "model.srigl"
    lower(broken(lambda model: model), (torch.randn(2, 20),), min_speedup=0).save(path)
    return path.read_bytes()


def edited(data: bytes, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["srigl_fx.graph"])
    tensors = safetensors.torch.load(data)
    edit(header, tensors)
    return safetensors.torch.save(tensors, metadata={"srigl_fx.graph": json.dumps(header)})


def functions(header: dict[str, Any]) -> list[dict[str, Any]]:
    return [node for node in header["nodes"] if node["op"] == "call_function"]


@pytest.mark.slow
def test_editing_as_such_is_harmless(saved: bytes, tmp_path: Path) -> None:
    (tmp_path / "same").write_bytes(edited(saved, lambda header, tensors: None))
    assert load_lowered(tmp_path / "same")(torch.randn(3, 20)).shape == (3, 7)


INJECTION = "x):\n    import os; os.abort()\n    return (0"


def rename_input(header: dict[str, Any], _: dict[str, Tensor]) -> None:
    node = next(node for node in header["nodes"] if node["op"] == "placeholder")
    node["target"] = INJECTION


def rename_attribute(header: dict[str, Any], _: dict[str, Tensor]) -> None:
    node = next(node for node in header["nodes"] if node["op"] == "get_attr")
    header["attributes"]['a"); import os #'] = header["attributes"].pop(node["target"])
    node["target"] = 'a"); import os #'


def call(name: str, args: list[Any]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def edit(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        functions(header)[0].update(target=name, args=args, kwargs={})

    return edit


def set_tensor(suffix: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def edit(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if name.endswith(suffix))
        tensors[name] = make(tensors[name])

    return edit


def forget_kinds(header: dict[str, Any], _: dict[str, Tensor]) -> None:
    """Make it the header of a file from before types and sizes were kept."""
    for entry in header["attributes"].values():
        del entry["dtype"], entry["shape"]


@pytest.mark.parametrize("edit", [forget_kinds, lambda header, tensors: None])
def test_files_with_and_without_the_kinds_of_tensors_load(
    saved: bytes, edit: Callable[[dict[str, Any], dict[str, Tensor]], None], tmp_path: Path
) -> None:
    (tmp_path / "old").write_bytes(edited(saved, edit))
    (tmp_path / "new").write_bytes(saved)
    x = torch.randn(3, 20)
    assert torch.equal(load_lowered(tmp_path / "old")(x), load_lowered(tmp_path / "new")(x))


@pytest.mark.parametrize("with_kinds", [True, False])
@pytest.mark.parametrize(
    "edit",
    [
        call("os.system", ["true"]),
        call("builtins.eval", ["1"]),
        call("_operator.methodcaller", ["x"]),
        call("aten.from_file.default", ["/etc/hostname"]),
        call("aten.add_.Tensor", [1, 1]),
        call("aten.__class__.default", []),
        call("srigl_fx.other.default", []),
        call("prims.add.default", []),
        rename_input,
        rename_attribute,
        lambda header, _: header.update(arguments=[INJECTION]),
        lambda header, _: header.update({"in": {"tuple": [{"tuple": [0]}, {"dict": {"a': 1}) #": 0}}]}}),
        lambda header, _: header.update(out={"tuple": [0, 0]}),
        lambda header, _: header.update({"in": {"tuple": [{"tuple": [0, 0]}, {"dict": {}}]}}),
        lambda header, _: functions(header)[0].update(kwargs={"a=1, b": 2}),
        lambda header, _: functions(header)[0].update(name="import os"),
        lambda header, _: functions(header)[0].update(args=[{"node": "nowhere"}]),
        lambda header, _: functions(header)[0].update(op="call_method", target="backward"),
        lambda header, _: functions(header)[0].update(args=[{"dtype": "load"}]),
        lambda header, _: header["nodes"].pop(),
        lambda header, _: header["nodes"].append(header["nodes"][0]),
        lambda header, _: header.update(version=2),
        lambda header, _: header["extra"].update(inputs=[]),
        lambda header, _: header["extra"].pop("report"),
        lambda header, tensors: tensors.pop(next(iter(tensors))),
        set_tensor("_indices", lambda t: (t.int() + 19).to(torch.uint16)),
        set_tensor("_indices", lambda t: t.int() - 1000),
        set_tensor("_indices", lambda t: t.int()[:-1]),
        set_tensor("_active", lambda t: t + 1),
        set_tensor("_values", lambda t: t.double()),
        set_tensor("_values", lambda t: t[:, :0]),
    ],
)
def test_a_malicious_file_is_refused(
    saved: bytes, edit: Callable[[dict[str, Any], dict[str, Tensor]], None], with_kinds: bool, tmp_path: Path
) -> None:
    path = tmp_path / "bad.srigl"
    path.write_bytes(edited(saved if with_kinds else edited(saved, forget_kinds), edit))
    with pytest.raises(FormatError):
        load_lowered(path)


def test_a_malformed_weight_is_named(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.srigl"
    path.write_bytes(edited(saved, set_tensor("_active", lambda t: t.flip(0))))
    with pytest.raises(
        FormatError, match=r"bad\.srigl: the condensed weight \w+\.weight is malformed: active rows are not"
    ):
        load_lowered(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2.weight", "2.bias"])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t.int(), r"int32 \[4"),
        (lambda t: t.reshape(1, *t.shape), r"float32 \[1, 4"),
        (lambda t: t.reshape(*reversed(t.shape), 1), r"float32 \[\d"),
    ],
)
def test_a_dense_tensor_of_another_kind_is_named(
    name: str, change: Callable[[Tensor], Tensor], found: str, tmp_path: Path
) -> None:
    model = mask_by_hand(nn.Linear(16, 8), 0.5)
    path = tmp_path / "bad.srigl"
    lower(nn.Sequential(model, nn.ReLU(), nn.Linear(8, 4)).eval(), (torch.randn(2, 16),), min_speedup=0).save(path)
    path.write_bytes(edited(path.read_bytes(), set_tensor(name, change)))
    wanted = r"\[4, 8\]" if name == "2.weight" else r"\[4\]"
    with pytest.raises(
        FormatError, match=rf"bad\.srigl: the tensor {name} is {found}.*the graph was saved with float32 {wanted}"
    ):
        load_lowered(path)


def test_a_damaged_file_is_refused(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.srigl"
    for length in (0, 4, 8, 200, len(saved) // 2, len(saved) - 1):
        path.write_bytes(saved[:length])
        with pytest.raises(FormatError, match=r"cut\.srigl is not a lowered model, or is damaged"):
            load_lowered(path)
    path.write_bytes(safetensors.torch.save({"a": torch.ones(2)}))
    with pytest.raises(FormatError):
        load_lowered(path)
    with pytest.raises(FormatError, match=r"there is no file .*missing"):
        load_lowered(tmp_path / "missing")
    with pytest.raises(FormatError, match=r"cannot be read: Is a directory"):
        load_lowered(tmp_path)


def break_attribute(header: dict[str, Any], _: dict[str, Tensor]) -> None:
    entry = next(entry for name, entry in header["attributes"].items() if name.endswith("weight_values"))
    entry["tensor"] = "lost"


def break_condensed(header: dict[str, Any], _: dict[str, Tensor]) -> None:
    node = next(node for node in functions(header) if node["target"].startswith("srigl_fx."))
    node["args"] = node["args"][:5]


@pytest.mark.parametrize(
    ("edit", "layer"),
    [
        (call("os.system", ["true"]), r"the node '\w+' is malformed .*os\.system"),
        (call("aten.relu.default", [{"node": "nowhere"}]), r"the node '\w+' is malformed .*nowhere"),
        (break_attribute, r"the tensor lost of \w+\.weight_values is missing"),
        (break_condensed, r"the condensed layer condensed_linear\w* is malformed"),
    ],
)
def test_what_is_malformed_is_named_with_its_file(
    saved: bytes, edit: Callable[[dict[str, Any], dict[str, Tensor]], None], layer: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.srigl"
    path.write_bytes(edited(saved, edit))
    with pytest.raises(FormatError, match=rf"bad\.srigl: {layer}"):
        load_lowered(path)


def test_any_change_of_the_header_is_a_format_error_or_harmless(saved: bytes, tmp_path: Path) -> None:
    path, draw = tmp_path / "changed.srigl", random.Random(0)
    size = 8 + int.from_bytes(saved[:8], "little")
    for _ in range(300):
        changed = bytearray(saved)
        for _ in range(draw.choice((1, 1, 2, 8))):
            changed[draw.randrange(size)] = draw.choice(b'0123456789[]{}",:abn -') if draw.random() < 0.8 else 255
        path.write_bytes(changed)
        with contextlib.suppress(FormatError):
            load_lowered(path)


def test_a_failed_save_leaves_the_old_file(saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.srigl"
    path.write_bytes(saved)
    lowered = load_lowered(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        lowered.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.srigl"]
    assert path.read_bytes() == saved


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_hugging_face(architecture: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    small: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    if architecture == "bert":
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
        model: nn.Module = transformers.BertModel(transformers.BertConfig(**small, **sizes))
    else:
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, **sizes, use_cache=False))
    mask_by_hand(randomise(model), 0.25).eval()
    inputs = {"input_ids": torch.randint(0, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    lowered = lower(model, ((), inputs), min_speedup=0)
    layers = {layer.fqn: layer for layer in lowered.report.layers}
    dense = {"gpt2": {"transformer.wte.weight", "transformer.wpe.weight"}, "bert": set()}[architecture]
    assert {layer.decision for name, layer in layers.items() if name not in dense} == {"condensed"}
    with torch.no_grad():
        expected, got = model(**inputs), lowered(**inputs)
        assert type(got) is type(expected)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
        lowered.save(tmp_path / "model.srigl")
        again = load_lowered(tmp_path / "model.srigl")(**inputs)
    torch.testing.assert_close(next(iter(again.values())), got[0])


@pytest.mark.long
def test_models_are_lowered_from_several_threads() -> None:
    def model() -> nn.Module:
        return sx.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), sparsity=0.75).eval()

    shared, x = model(), torch.randn(2, 64)
    models = [model(), model(), shared, shared]
    with ThreadPoolExecutor(4) as pool:
        lowered = list(pool.map(lambda one: sx.lower(one, (x,), min_speedup=0), models * 2))
    for one, other in zip(models * 2, lowered, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(other(x), one(x))


@pytest.mark.parametrize(
    "arguments", [{"min_speedup": "a"}, {"min_speedup": -1}, {"batch_sizes": 5}, {"batch_sizes": [0]}]
)
def test_arguments_are_checked(arguments: dict[str, Any]) -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(64, 64)), sparsity=0.75).eval()
    with pytest.raises(LoweringError, match=next(iter(arguments))):
        sx.lower(model, (torch.ones(2, 64),), **arguments)
    with pytest.raises(LoweringError, match=r"torch\.nn\.Module"):
        sx.lower(5, (torch.ones(2, 64),))  # type: ignore[arg-type]


@pytest.mark.slow
def test_measuring_leaves_the_buffers_that_a_model_writes() -> None:
    class Counting(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            y: Tensor = self.fc(x) * 2
            return y

    model = mask_by_hand(randomise(Counting()), 0.1).eval()
    before = model.calls.clone()  # type: ignore[operator]
    lowered = lower(model, (torch.randn(2, 64),), min_speedup=1.0)
    assert torch.equal(model.calls, before)  # type: ignore[arg-type]
    lowered(torch.randn(2, 64))
    assert torch.equal(lowered.calls, before + 1)  # type: ignore[arg-type]


def test_inference_mode_is_refused(tmp_path: Path) -> None:
    model = mask_by_hand(randomise(mlp()), 0.3).eval()
    x = torch.randn(2, 20)
    with torch.inference_mode():
        with pytest.raises(LoweringError, match="under torch"):
            lower(model, (x,))
        with pytest.raises(ExportError, match="under torch"):
            sx.export_onnx(model, tmp_path / "model.onnx", (x,), min_speedup=0)
    assert not list(tmp_path.iterdir())


def padded_by_ablation() -> tuple[nn.Module, Tensor]:
    """A channel that leaves the graph makes rows of the next layer shorter; what that layer keeps."""
    torch.manual_seed(0)
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    model = nn.Sequential(first, nn.ReLU(), second)
    sx.sparsify(model, sparsity=0.75, distribution="uniform", mask_init="random")
    with torch.no_grad():
        first.get_buffer("weight_mask")[2] = False
        first.weight[2] = 0
    kept = second.get_buffer("weight_mask").clone()
    kept[:, 2] = False
    return model.eval(), kept


def test_padding_stays_zero_in_fine_tuning() -> None:
    model, _ = padded_by_ablation()
    lowered = lower(model, (torch.randn(8, 64),), min_speedup=0)
    owner = lowered.get_submodule("2")
    before = owner.get_buffer("weight_values").clone()
    del owner.weight_values
    values = nn.Parameter(before.clone())
    owner.register_parameter("weight_values", values)
    optimizer = torch.optim.AdamW([values], lr=0.01)
    for batch in (8, 100):
        for _ in range(2):
            lowered(torch.randn(batch, 64)).square().mean().backward()
            optimizer.step()
    zeros = before == 0
    assert zeros.any()
    assert not values[zeros].any()
    assert bool((values[~zeros] != before[~zeros]).all())


@pytest.mark.slow
def test_padding_that_was_written_to_is_saved_and_exported_as_zeros(tmp_path: Path) -> None:
    """Torch and the operators ignore it; the fallback would not."""
    model, _ = padded_by_ablation()
    x = torch.randn(8, 64)
    lowered = lower(model, (x,), min_speedup=0)
    values = lowered.get_submodule("2").get_buffer("weight_values")
    before, expected = values.clone(), lowered(x)
    values[before == 0] = 7.0
    assert torch.equal(lowered(x), expected)
    lowered.save(tmp_path / "model.srigl")
    again = load_lowered(tmp_path / "model.srigl")
    assert torch.equal(again.get_submodule("2").get_buffer("weight_values"), before)
    assert (values[before == 0] == 7).all()  # the module itself is left alone
    sx.export_onnx(lowered, tmp_path / "model.onnx", (x,), min_speedup=0)  # which compares both ways of running it


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_padding_reads_nothing(bad: float, batch: int) -> None:
    """What is not finite reaches the outputs whose kept weights read it, as infinity where that is what it gives."""
    model, kept = padded_by_ablation()
    lowered = lower(model, (torch.randn(batch, 64),), min_speedup=0)
    bias = next(buffer for name, buffer in lowered.named_buffers() if name.startswith("0.bias"))
    assert lowered.get_submodule("2").get_buffer("weight_values").shape[1] > kept.sum(1).min()
    for channel in range(3, 64, 20):
        place = channel - 1  # channel 2 is gone
        before = bias[place].item()
        bias[place] = bad
        y = lowered(torch.randn(batch, 64))
        bias[place] = before
        expected = kept[:, channel].expand(batch, 64)
        assert torch.equal(y.isnan() if math.isnan(bad) else y.isinf(), expected)
