"""What a file's graph may call: by name, and nothing that wrong arguments end the process with."""

import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from operator_support.calls import overload
from torch import Tensor, nn

from srigl_fx.errors import FormatError, LoweringError
from srigl_fx.lowering import file_operators as graph_ops
from srigl_fx.lowering.file import guarded
from srigl_fx.lowering.file_guards import guard
from srigl_fx.lowering.loading import load_lowered
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.lowering.pipeline import lower

NAMES = sorted(graph_ops._ATEN)
# Of the guarded ones, those whose arguments are only checked; the others have tests of their own below.
CHECKED = sorted(name.removeprefix("aten.") for name in graph_ops.GUARDED)
CHECKED = [name for name in CHECKED if not name.startswith(("_native", "native_group", "lstm", "gru", "rnn"))]
CALLS = 150
PARTS = 4


def test_each_is_listed_by_its_overload_and_writes_nothing() -> None:
    for name in NAMES:
        found = overload(name)
        assert graph_ops.function_named(f"aten.{name}") == found, name
        assert not found._schema.is_mutable


def test_nothing_of_torchs_own_and_no_backward_is_listed() -> None:
    names = {name for name in NAMES if not name.startswith("__")}
    assert {name for name in names if name.startswith("_")} == {"_to_copy.default"}
    assert not [name for name in names if "backward" in name]


@pytest.mark.parametrize(
    "name",
    [
        "aten.as_strided.default",
        "aten.max_pool2d_with_indices_backward.default",
        "aten._embedding_bag.default",
        "aten._softmax.default",
        "aten.add.out",
        "aten.add_.Tensor",
        "aten.relu",
        "aten.relu.nothing",
        "srigl_fx.condensed_linear.out",
        "srigl_fx.condensed_linear_gradients.default",
    ],
)
def test_what_is_not_listed_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not an operator that a saved graph may call"):
        graph_ops.function_named(name)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_no_arguments_end_the_process(part: int, checkout: Path) -> None:
    """Random shapes, types and values, in a process of their own; other ones in each run where a seed is given."""
    seed = os.environ.get("SRIGL_FX_TEST_SEED", "0")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "operator_support.calls",
        seed,
        str(CALLS),
        *(NAMES + CHECKED)[part::PARTS],
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "tests")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False, env=environment)
    last = done.stdout.split("\n")[-2:][0]
    assert done.returncode == 0, f"{last} ended the process: {done.stderr[-500:]}"


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **settings: bool | int | str) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.layer = kind(5, 4, **settings)  # type: ignore[arg-type]
        self.last = nn.Linear(8 if settings.get("bidirectional") else 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.layer(self.first(x))[0])
        return result


class Normalised(nn.Module):
    def __init__(self, *, statistics: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5, track_running_stats=statistics)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.first(x).relu())
        return result


MODELS = [
    pytest.param(lambda: Recurrent(nn.LSTM, batch_first=True), (2, 7, 6), id="lstm"),
    pytest.param(lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (7, 2, 6), id="lstm both ways"),
    pytest.param(lambda: Recurrent(nn.LSTM, bias=False), (7, 2, 6), id="lstm without bias"),
    pytest.param(lambda: Recurrent(nn.GRU, num_layers=2, batch_first=True), (2, 7, 6), id="gru"),
    pytest.param(lambda: Recurrent(nn.RNN, batch_first=True), (2, 7, 6), id="rnn"),
    pytest.param(lambda: Recurrent(nn.RNN, nonlinearity="relu"), (7, 2, 6), id="rnn relu"),
    pytest.param(lambda: Normalised(statistics=True), (4, 6), id="batch norm"),
    pytest.param(lambda: Normalised(statistics=False), (4, 6), id="batch norm of the batch"),
]


@pytest.mark.long
@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_guarded_operators_compute_the_same(make: "type[nn.Module]", shape: tuple[int, ...], tmp_path: Path) -> None:
    model = mask_by_hand(randomise(make()), 0.4).eval()
    x = torch.randn(shape)
    lowered = lower(model, (x,), min_speedup=0)
    lowered.save(tmp_path / "model.srigl")
    again = load_lowered(tmp_path / "model.srigl")
    with torch.no_grad():
        assert torch.equal(again(x), lowered(x))
    again.save(tmp_path / "again.srigl")
    with torch.no_grad():
        assert torch.equal(load_lowered(tmp_path / "again.srigl")(x), lowered(x))


class Bags(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bags, self.layer = nn.EmbeddingBag(20, 16, mode=mode), nn.Linear(16, 8)

    def forward(self, rows: Tensor, starts: Tensor) -> Tensor:
        result: Tensor = self.layer(self.bags(rows, starts))
        return result


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags_are_saved_and_look_at_their_rows(mode: str, tmp_path: Path) -> None:
    model = mask_by_hand(randomise(Bags(mode)), 0.4).eval()
    rows, starts = torch.randint(0, 20, (9,)), torch.tensor([0, 3, 3, 7])
    lowered = lower(model, (rows, starts), min_speedup=0)
    lowered.save(tmp_path / "model.srigl")
    load_lowered(tmp_path / "model.srigl").save(tmp_path / "again.srigl")
    again = load_lowered(tmp_path / "again.srigl")
    with torch.no_grad():
        assert torch.equal(again(rows, starts), lowered(rows, starts))
        for wrong in ((rows + 20, starts), (rows, starts + 8), (rows, starts.flip(0)), (rows, starts - 1)):
            with pytest.raises((IndexError, RuntimeError)):
                again(*wrong)


class Grouped(nn.Module):
    """Two heads of queries for each of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.keys = nn.Linear(6, 16), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, keys = (one.unflatten(-1, (-1, 4)).transpose(1, 2) for one in (self.query(x), self.keys(x)))
        mixed: Tensor = nn.functional.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)
        return mixed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        pytest.param(lambda: Bags("mean"), (torch.arange(9), torch.tensor([0, 3, 3, 7])), id="bags"),
        pytest.param(Grouped, (torch.ones(2, 5, 6),), id="heads in groups"),
        pytest.param(lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (torch.ones(7, 2, 6),), id="lstm"),
        pytest.param(lambda: Recurrent(nn.GRU, batch_first=True), (torch.ones(2, 7, 6),), id="gru"),
        pytest.param(lambda: Normalised(statistics=True), (torch.ones(4, 6),), id="batch norm"),
    ],
)
def test_a_graph_that_is_loaded_and_saved_again_does_not_grow(
    make: "type[nn.Module]", inputs: tuple[Tensor, ...]
) -> None:
    once = lower(mask_by_hand(randomise(make()), 0.4).eval(), inputs, min_speedup=0)
    assert isinstance(once, LoweredModule)
    loaded, sizes, counts = once, [], []
    for _ in range(4):
        data = loaded._bytes()
        loaded = LoweredModule.from_bytes(data)
        sizes.append(len(data))
        counts.append(len(loaded.graph.nodes))
        with torch.no_grad():
            assert torch.equal(loaded(*inputs), once(*inputs))
    assert len(set(counts)) == 1
    assert len(set(sizes[1:])) == 1


@pytest.mark.parametrize(
    "settings",
    [(1, 0, False), (False, 3, False), (False, True, False), (False, 0, True), (False, 0, False, None, False, 1.0)],
)
def test_settings_that_no_embedding_bag_has_are_refused(settings: Any) -> None:
    settings = (*settings, *(None, False, None)[len(settings) - 3 :])
    graph = called(torch.ops.aten.embedding_bag.padding_idx, ..., ..., ..., *settings)
    with pytest.raises(ValueError, match="embedding bag"):
        guard(graph, no_tensor)


def recurrent_graph(shapes: list[tuple[int, ...]], **changes: object) -> tuple[torch.fx.Graph, dict[str, Tensor]]:
    """A graph with one LSTM of these weights."""
    graph, tensors = torch.fx.Graph(), {f"w{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    x, h, c = (graph.placeholder(name) for name in "xhc")
    weights = [graph.get_attr(name) for name in tensors]
    settings = {"has_biases": True, "num_layers": 1, "dropout": 0.0, "train": False, "bidirectional": False}
    settings |= {"batch_first": True, **changes}  # type: ignore[dict-item]
    node = graph.call_function(torch.ops.aten.lstm.input, (x, [h, c], weights, *settings.values()))
    graph.output(node)
    return graph, tensors


FIT = [(16, 3), (16, 4), (16,), (16,)]


@pytest.mark.parametrize(
    ("shapes", "changes"),
    [
        (FIT[:3], {}),
        ([*FIT, *FIT], {}),
        ([(16, 3), (16, 5), (16,), (16,)], {}),
        ([(16, 3), (16, 4), (15,), (16,)], {}),
        ([(16,), (16, 4), (16,), (16,)], {}),
        (FIT, {"has_biases": False}),
        (FIT, {"num_layers": 2}),
        (FIT, {"num_layers": 0}),
        (FIT, {"bidirectional": True}),
        (FIT, {"train": True}),
    ],
)
def test_weights_that_do_not_fit_a_recurrent_layer_are_refused(
    shapes: list[tuple[int, ...]], changes: dict[str, object]
) -> None:
    graph, tensors = recurrent_graph(shapes, **changes)
    with pytest.raises(FormatError, match=r"file: .*node lstm"):
        guarded("file", lambda: _raise_format(graph, tensors))


def _raise_format(graph: torch.fx.Graph, tensors: dict[str, Tensor]) -> None:
    try:
        guard(graph, tensors.__getitem__)
    except ValueError as error:
        raise FormatError(str(error)) from error


@pytest.mark.parametrize("wrong", ["x", "h", "c", "x rank", "h rank", "x type"])
def test_inputs_that_do_not_fit_a_recurrent_layer_are_an_error(wrong: str) -> None:
    graph, tensors = recurrent_graph(FIT)
    guard(graph, tensors.__getitem__)
    run = torch.fx.GraphModule(tensors, graph)
    given = {"x": torch.randn(2, 5, 3), "h": torch.randn(1, 2, 4), "c": torch.randn(1, 2, 4)}
    run(*given.values())
    changed = {
        **given,
        **{"x": {"x": torch.randn(2, 5, 2)}, "h": {"h": torch.randn(1, 2, 3)}, "c": {"c": torch.randn(1, 3, 4)}}.get(
            wrong, {}
        ),
        **({"x": torch.randn(2, 5, 3, 3)} if wrong == "x rank" else {}),
        **({"h": torch.randn(1, 1, 2, 4)} if wrong == "h rank" else {}),
        **({"x": torch.randn(2, 5, 3).double()} if wrong == "x type" else {}),
    }
    with pytest.raises(RuntimeError):
        run(*changed.values())


def no_tensor(name: str) -> Tensor:
    raise KeyError(name)


def called(function: Any, *args: Any, **kwargs: Any) -> torch.fx.Graph:
    """A graph that calls the function, with its input wherever an argument is ``...``."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(function, tuple(x if arg is ... else arg for arg in args), kwargs))
    return graph


@pytest.mark.parametrize(
    ("step", "dtype"), [(0, None), (0.0, None), (0.5, torch.int64), (1, torch.int8), (2**40, None), (True, None)]
)
def test_steps_that_a_range_cannot_take_are_refused(step: float, dtype: torch.dtype | None) -> None:
    graph = called(torch.ops.aten.arange.start_step, 0, ..., step, dtype=dtype)
    with pytest.raises(ValueError, match=r"node arange\w*: a range "):
        guard(graph, no_tensor)


@pytest.mark.parametrize(("step", "dtype"), [(2, None), (-3, torch.int64), (0.5, None), (1, torch.float32)])
def test_other_steps_stay(step: float, dtype: torch.dtype | None) -> None:
    graph = called(torch.ops.aten.arange.start_step, 0, ..., step, dtype=dtype)
    guard(graph, no_tensor)
    end = -7 if step < 0 else 7
    assert torch.equal(torch.fx.GraphModule({}, graph)(end), torch.arange(0, end, step, dtype=dtype))


@pytest.mark.parametrize("divisor", [..., 0, -1, True, float("nan")])
@pytest.mark.parametrize("packet", ["remainder", "fmod", "floor_divide"])
def test_whole_division_is_by_a_number_that_can_be_checked(packet: str, divisor: Any) -> None:
    function = getattr(torch.ops.aten, packet)
    with pytest.raises(ValueError, match="whole division by"):
        guard(called(function.Scalar, ..., divisor), no_tensor)
    graph = called(function.Scalar, ..., 3)
    guard(graph, no_tensor)
    x = torch.arange(-7, 8)
    assert torch.equal(torch.fx.GraphModule({}, graph)(x), function(x, 3))


@pytest.mark.parametrize("sizes", [[2**20, 2**20], [2**40, 1], [-1, 3], [True, 3], [2.0, 3]])
def test_adaptive_pooling_to_more_places_than_any_module_has_is_refused(sizes: Any) -> None:
    pool = torch.ops.aten.adaptive_max_pool2d.default
    with pytest.raises(ValueError, match="pooling to"):
        guard(called(pool, ..., sizes), no_tensor)
    graph = called(pool, ..., [2, 3])
    guard(graph, no_tensor)
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(torch.fx.GraphModule({}, graph)(x)[0], nn.functional.adaptive_max_pool2d(x, (2, 3)))


@pytest.mark.parametrize("settings", [([0, 1],), ([2, 2], [0, 1]), ([2, 2], [1, 1], [-1, 0]), ([2**40, 1],)])
def test_pooling_that_no_module_does_is_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match="pooling with a"):
        guard(called(torch.ops.aten.max_pool2d.default, ..., *settings), no_tensor)


PATCHES = (torch.ops.aten.col2im.default, [6, 6], [2, 2], [1, 1], [0, 0], [2, 2])
BORDERS = {
    torch.ops.aten.replication_pad1d.default: [1, 2],
    torch.ops.aten.replication_pad2d.default: [1, 2, 0, 3],
    torch.ops.aten.replication_pad3d.default: [1, 2, 0, 3, 1, 1],
}


@pytest.mark.parametrize("wrong", [2**24 + 1, 2**32, -(2**40), 2**63 - 1, True, 1.0])
def test_borders_and_steps_that_overflow_are_refused(wrong: Any) -> None:
    function, *settings = PATCHES
    calls = [called(function, ..., *settings[:i], [1, wrong], *settings[i + 1 :]) for i in range(len(settings))]
    calls += [called(function, ..., [*sizes[:-1], wrong]) for function, sizes in BORDERS.items()]
    calls.append(called(torch.ops.aten.pad.default, ..., [1, wrong], "replicate"))
    for graph in calls:
        with pytest.raises(ValueError, match=r"with a (output_size|kernel_size|dilation|padding|pad|stride) of"):
            guard(graph, no_tensor)


def test_borders_and_patches_of_a_usual_size_stay() -> None:
    x = torch.randn(2, 12, 9)
    function, *settings = PATCHES
    graph = called(function, ..., *settings)
    guard(graph, no_tensor)
    assert torch.equal(torch.fx.GraphModule({}, graph)(x), nn.functional.fold(x, 6, 2, stride=2))
    for rank, (border, sizes) in enumerate(BORDERS.items(), 1):
        given = torch.randn(2, 3, *[4] * rank)
        for graph in (called(border, ..., sizes), called(torch.ops.aten.pad.default, ..., sizes, "replicate")):
            guard(graph, no_tensor)
            wanted = nn.functional.pad(given, sizes, "replicate")
            assert torch.equal(torch.fx.GraphModule({}, graph)(given), wanted)


@pytest.mark.parametrize("told", [(2, 4, 15), (1, 1, 1), (2**62, 4, 2**62)])
def test_group_norms_take_their_sizes_from_their_input(told: tuple[int, ...]) -> None:
    graph, tensors = torch.fx.Graph(), {"w": torch.randn(4), "b": torch.randn(4)}
    nodes = [graph.placeholder("x"), *(graph.get_attr(name) for name in tensors)]
    results = graph.call_function(torch.ops.aten.native_group_norm.default, (*nodes, *told, 2, 1e-5))
    graph.output(graph.call_function(operator.getitem, (results, 0)))
    guard(graph, tensors.__getitem__)
    x = torch.randn(2, 4, 3, 5)
    wanted = nn.functional.group_norm(x, 2, tensors["w"], tensors["b"])
    assert torch.equal(torch.fx.GraphModule(tensors, graph)(x), wanted)


def test_only_the_normalised_result_of_a_group_norm_is_read() -> None:
    graph = torch.fx.Graph()
    results = graph.call_function(
        torch.ops.aten.native_group_norm.default, (graph.placeholder("x"), None, None, 2, 4, 15, 2, 1e-5)
    )
    graph.output(graph.call_function(operator.getitem, (results, 1)))
    with pytest.raises(ValueError, match="only the normalised result of a group normalisation"):
        guard(graph, no_tensor)


class Divides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        result: Tensor = self.layer(x) // by
        return result


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = mask_by_hand(randomise(Divides()), 0.4).eval()
    lowered = lower(model, (torch.randn(2, 6), torch.full((1,), 2.0)), min_speedup=0)
    with pytest.raises(LoweringError, match=r"cannot be saved: node \w+: .*whole division by"):
        lowered.save(tmp_path / "model.srigl")
    assert not list(tmp_path.iterdir())


def test_devices_and_layouts_of_a_file_are_those_of_a_lowered_graph() -> None:
    from srigl_fx.lowering.file import _decode

    for value in ({"device": "meta"}, {"device": "cuda"}, {"layout": "sparse_coo"}):
        with pytest.raises(ValueError, match="dense tensors on the CPU only"):
            _decode(value, {})
    assert _decode({"device": "cpu"}, {}) == torch.device("cpu")
