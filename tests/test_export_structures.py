"""``export_onnx`` on models whose inputs, outputs or operators are no matter of course."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from lowering_support import randomise
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import srigl_fx as sx
from srigl_fx.comparison import relative_error
from srigl_fx.errors import ExportError
from srigl_fx.onnx_export.report import ExportReport
from srigl_fx.onnx_export.rewrites import rewrite


class Net(nn.Module):
    """Two layers, and a function of ``self`` and the inputs for a forward."""

    def __init__(self, function: Callable[..., Any] = lambda net, x: net.fc(x)) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.back = nn.Linear(8, 16)
        self.table = nn.Buffer(torch.randn(3, 4))
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def sparse(function: Callable[..., Any]) -> nn.Module:
    return sx.sparsify(randomise(Net(function)), sparsity=0.5, distribution="uniform").eval()


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def check(function: Callable[..., Any], example: Any, other: Any, folder: Path) -> ExportReport:
    """Export with the inputs ``example``; with ``other``, both kinds of session must give what the model gives."""
    model = sparse(function)
    report = sx.export_onnx(model, folder / "model.onnx", example, min_speedup=0)
    assert report.library_error is not None
    assert report.condensed_layers > 0
    import onnxruntime

    args, kwargs = other if len(other) == 2 and isinstance(other[1], dict) else (other, {})
    with torch.no_grad():
        expected = tensors(model(*args, **kwargs))
    stock = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    for session in (sx.runtime.load(report.path), stock):
        names = [item.name for item in session.get_inputs()]
        given = dict(zip(names, (leaf.numpy() for leaf in tensors((args, kwargs))), strict=True))
        got = [torch.from_numpy(array) for array in session.run(None, given)]
        assert max(relative_error(*both) for both in zip(expected, got, strict=True)) < 1e-5
    return report


def x(batch: int) -> Tensor:
    return torch.randn(batch, 16, generator=torch.Generator().manual_seed(batch))


def structures(net: Net, x: Tensor) -> Any:
    y = net.fc(x)
    return {"none": None, "classes": y.argmax(-1), "positive": y > 0, "y": [y, None, y], "mean": y.mean(), "x": x}


def numbers(net: Net, x: Tensor) -> Any:
    return net.fc(x), 3, 0.5, "text", None, x.shape[0], net.table


def named(net: Net, x: Tensor) -> Any:
    return Pair(net.fc(x), net.fc(x).relu())


@pytest.mark.slow
@pytest.mark.parametrize("function", [structures, numbers, named])
def test_outputs(function: Callable[..., Any], tmp_path: Path) -> None:
    assert check(function, (x(2),), (x(5),), tmp_path).dynamic_batch


def nested(net: Net, given: dict[str, Any], unused: Tensor, *, times: int, mask: Tensor | None = None) -> Any:
    y = given["a"] + given["b"][0].masked_fill(given["b"][1], 0.5)
    for _ in range(times):
        y = net.back(net.fc(y))
    return y if mask is None else y * mask


@pytest.mark.long
def test_inputs(tmp_path: Path) -> None:
    def inputs(batch: int) -> Any:
        given = {"a": x(batch), "b": (x(batch) + 1, x(batch) > 0)}
        return (given, torch.ones(batch, 3)), {"times": 2, "mask": None}

    assert check(nested, inputs(2), inputs(3), tmp_path).dynamic_batch


def attention(net: Net, x: Tensor) -> Any:
    b, t, _ = x.shape
    heads = x.view(b, t, 4, 4).transpose(1, 2)
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=causal)
    return net.fc(mixed.transpose(1, 2).reshape(b, t, 16))


@pytest.mark.long
def test_attention_with_a_mask(tmp_path: Path) -> None:
    assert check(attention, (torch.randn(2, 5, 16),), (torch.randn(3, 5, 16),), tmp_path).dynamic_batch


def split(net: Net, x: Tensor) -> Any:
    y = net.fc(torch.cat([x, x + 1]))
    first, second = torch.split(y, x.shape[0])
    return first, second, torch.unsafe_chunk(y, 2)[1], y[:, :3].amax(), torch.amin(y)


@pytest.mark.long
def test_rules_1_and_2_splits_by_the_batch_and_whole_reductions(tmp_path: Path) -> None:
    assert check(split, (x(2),), (x(5),), tmp_path).dynamic_batch


class Normalised(nn.Module):
    """An ablated channel in front of an instance normalisation has no variance: rounding would be magnified."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.head = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.conv(x))
        return y, self.head(y.relu())


@pytest.mark.long
def test_rule_3_no_bias_before_an_instance_normalisation(tmp_path: Path) -> None:
    model = sx.sparsify(randomise(Normalised()), sparsity=0.5, distribution="uniform").eval()
    with torch.no_grad():
        dict(sx.masks.named_masks(model))["conv.weight"][::2] = False
    sx.masks.apply(model)
    pictures = torch.randn(2, 3, 9, 9)
    lowered = sx.lower(model, (pictures,), min_speedup=0)
    assert isinstance(lowered, fx.GraphModule)
    with torch.no_grad():
        got = tensors(rewrite(lowered)(pictures))
        exact = tensors(copy.deepcopy(model).double()(pictures.double()))
    for one, other in zip(exact, got, strict=True):
        assert relative_error(one.float(), other) < 1e-6
    report = sx.export_onnx(lowered, tmp_path / "model.onnx", (pictures,), min_speedup=0)
    assert report.library_error is not None
    assert report.library_error < 1e-5


def test_rule_4_what_is_no_tensor_is_left_out() -> None:
    lowered = sx.lower(sparse(numbers), (x(2),), min_speedup=0)
    assert isinstance(lowered, fx.GraphModule)
    (returned,) = next(node for node in rewrite(lowered).graph.nodes if node.op == "output").args
    assert [leaf is None for leaf in returned] == [False, True, True, True, True, True, False]


class Repeated(nn.Module):
    """Elements along some dimension, each as many times as the second input is long."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        return x.repeat_interleave(times.shape[0], self.dim)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1, -1, None])
def test_rule_10_a_free_number_of_repetitions(dim: int | None) -> None:
    model, free = Repeated(dim), {"x": {0: Dim("rows")}, "times": {0: Dim("times")}}
    given = torch.randn(2, 3, 4), torch.zeros(3)
    rewritten = rewrite(torch.export.export(model, given, dynamic_shapes=free).module())
    assert "repeat_interleave" not in str(rewritten.graph)
    for rows, times in ((1, 1), (2, 5), (4, 2)):
        given = torch.randn(rows, 3, 4), torch.zeros(times)
        assert torch.equal(rewritten(*given), model(*given))


def pooled(net: Net, x: Tensor) -> Tensor:
    y = net.fc(x).unsqueeze(1) - 9  # negative numbers, of which zeros beside them are the largest
    return F.max_pool1d(F.pad(y, (2, 1)), 3, 1).sum(1)


@pytest.mark.long
def test_rule_11_zeros_beside_what_is_pooled_count(tmp_path: Path) -> None:
    check(pooled, (x(4),), (x(7),), tmp_path)


@pytest.mark.slow
def test_rewriting_leaves_the_lowered_graph_alone() -> None:
    lowered = sx.lower(sparse(split), (x(2),), min_speedup=0)
    assert isinstance(lowered, fx.GraphModule)
    before = str(lowered.graph)
    rewrite(lowered)
    assert str(lowered.graph) == before


def membership(net: Net, x: Tensor) -> Any:
    y = net.fc(x)
    return y, torch.isin(y.argmax(-1), torch.tensor([1, 2]))


@pytest.mark.long
def test_a_static_file_where_onnx_cannot_leave_the_batch_free(tmp_path: Path) -> None:
    report = check(membership, (x(4),), (x(4) + 1,), tmp_path)
    assert not report.dynamic_batch
    assert "batch of the example inputs only" in str(report)
    assert "searchsorted" in str(report)


class Outer(nn.Module):
    """Has a sub-module with an operator that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net(lambda net, x: net.fc(x).median(0).values)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


@pytest.mark.slow
def test_an_operator_without_translation_is_placed(tmp_path: Path) -> None:
    model = sx.sparsify(Outer(), sparsity=0.5).eval()
    with pytest.raises(ExportError, match=r"\(in inner\).*aten\.median"):
        sx.export_onnx(model, tmp_path / "model.onnx", (x(2),), min_speedup=0)
    assert not list(tmp_path.iterdir())


class Singular(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.svd(x)[1]
        return values


@pytest.mark.slow
def test_an_operator_that_the_exporter_takes_apart_first_is_placed_too(tmp_path: Path) -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(16, 16), nn.Sequential(Singular())), sparsity=0.5).eval()
    with pytest.raises(ExportError, match=r"\(in 1\.0\).*_linalg_svd"):
        sx.export_onnx(model, tmp_path / "model.onnx", (x(2),), min_speedup=0)


@pytest.mark.parametrize("returned", [None, 3])
def test_a_model_that_returns_no_tensor_is_refused(returned: Any, tmp_path: Path) -> None:
    model = sx.sparsify(Net(lambda net, x: (net.fc(x), returned)[1]), sparsity=0.5).eval()
    with pytest.raises(ExportError, match="returns no tensor"):
        sx.export_onnx(model, tmp_path / "model.onnx", (x(2),), min_speedup=0)


class Branching(nn.Module):
    """One block branches on values, the others are graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
        self.gate = Net(lambda net, x: net.back(net.fc(x)) if x.sum() > 0 else x)
        self.after = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Any:
        return self.after(self.gate(self.before(x)))


@pytest.mark.long
def test_a_model_that_is_not_one_graph_says_what_broke_and_its_parts_are_exported(tmp_path: Path) -> None:
    model = sx.sparsify(randomise(Branching()), sparsity=0.5, distribution="uniform").eval()
    path = tmp_path / "model.onnx"
    with pytest.raises(ExportError, match=r"not one graph.*gate \(Net\): .*data-dependent") as caught:
        sx.export_onnx(model, path, (x(2),), min_speedup=0)
    assert not path.exists()

    code = str(caught.value).partition("\n")[2].replace('f"{name}', 'f"{folder}/{name}')
    lines = "\n".join(line.removeprefix("    ") for line in code.splitlines())
    names: dict[str, Any] = {"srigl_fx": sx, "model": model, "example_inputs": (x(2),), "folder": tmp_path}
    exec(lines, names)
    lowered = names["lowered"]
    assert {"before", "gate.fc", "gate.back", "after"} == set(lowered.regions)
    assert {file.stem for file in tmp_path.iterdir()} == set(lowered.regions)
    part, (args, kwargs) = lowered.regions["after"], lowered.region_inputs["after"]
    session = sx.runtime.load(tmp_path / "after.onnx")
    with torch.no_grad():
        expected = part(*args, **kwargs)
    (got,) = session.run(None, {session.get_inputs()[0].name: args[0].detach().numpy()})
    assert relative_error(expected, torch.from_numpy(got)) < 1e-5

    with pytest.raises(ExportError, match="not one graph"):
        sx.export_onnx(lowered, path, (x(2),), min_speedup=0)
