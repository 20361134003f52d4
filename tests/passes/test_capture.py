"""Capture: dynamic where possible, static where not, and clear about why not at all."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from lowering_support import randomise
from torch import Tensor, nn

from srigl_fx.errors import CaptureError
from srigl_fx.passes.capture import capture, capture_whole
from srigl_fx.passes.capture_checks import fit_batches
from srigl_fx.passes.example_inputs import foreign_types, normalise_inputs
from srigl_fx.passes.model_runs import run_model


def outputs(program: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return program.module(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_leading_dimension_is_free(batch: int) -> None:
    model = randomise(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))).eval()
    program = capture(model, (torch.randn(batch, 6),))
    assert program.dynamic
    assert program.batch_size == batch
    for size in (0, 1, 3, 67):
        x = torch.randn(size, 6)
        torch.testing.assert_close(outputs(program, x), model(x))


def test_parameters_are_shared_under_their_names() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    program = capture(model, (torch.randn(2, 6),))
    assert dict(program.module.named_parameters())["0.weight"] is model[0].weight


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.view(1, -1))
        return y


def test_a_fixed_leading_dimension_is_captured_static() -> None:
    model = randomise(FixedBatch()).eval()
    x = torch.randn(1, 3, 4)
    program = capture(model, (x,))
    assert not program.dynamic
    assert "static" in program.how
    torch.testing.assert_close(outputs(program, x), model(x))
    assert program.inputs(5)[0][0].shape == (1, 3, 4)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *, scale: Tensor, flip: bool = False) -> dict[str, Any]:
        y = self.fc(x + pair[0]) * scale
        return {"y": -y if flip else y, "rest": [pair[1]]}


def test_nested_inputs_keywords_and_broadcast_operands() -> None:
    model = randomise(Keywords()).eval()
    scale = torch.tensor([[2.0]])
    program = capture(model, ((torch.randn(3, 4), (torch.randn(3, 4), torch.randn(3))), {"scale": scale, "flip": True}))
    assert program.batched == (True, True, True, False, False)
    args, kwargs = program.inputs(5)
    assert kwargs["scale"] is scale
    expected, got = model(*args, **kwargs), outputs(program, *args, **kwargs)
    torch.testing.assert_close(got["y"], expected["y"])
    assert got["rest"][0].shape == (5,)


class UsesNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(torch.from_numpy(x.detach().numpy() * 2))
        return y


@pytest.mark.slow
def test_strict_export_is_the_second_rung() -> None:
    model = randomise(UsesNumpy()).eval()
    x = torch.randn(2, 4)
    program = capture(model, (x,))
    assert "strict" in program.how
    torch.testing.assert_close(outputs(program, x), model(x))


@pytest.mark.long
def test_attention_is_not_captured_as_its_fused_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False).eval()
    enabled = torch.backends.mha.get_fastpath_enabled()
    program = capture(layer, (torch.randn(2, 3, 8),))
    assert torch.backends.mha.get_fastpath_enabled() == enabled
    called = {str(node.target) for node in program.module.graph.nodes}
    assert "aten.linear.default" in called
    assert not any("native_multi_head" in name or "_transformer_encoder" in name for name in called)


class Counts(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.fc(x) + self.calls
        return y


def test_the_model_is_left_as_it_was() -> None:
    model = Counts().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(1, 4)
    random_state = torch.get_rng_state()
    capture(model, (x,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.calls.item() == 0
    assert torch.equal(torch.get_rng_state(), random_state)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_what_cannot_be_captured_says_what_to_do() -> None:
    with pytest.raises(CaptureError, match=r"Branches whole.*data-dependent.*torch\.where") as caught:
        capture(Branches().eval(), (torch.randn(2, 4),))
    assert caught.value.__cause__ is not None


def test_inputs_that_do_not_fit_are_told_from_a_failed_export() -> None:
    with pytest.raises(CaptureError, match=r"Linear does not run on the example inputs \(float32 \(2, 5\)\)") as caught:
        capture(nn.Linear(4, 3).eval(), (torch.randn(2, 5),))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(CaptureError, match="forward"):
        capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4), 7))


def test_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout()).eval()
    model[1].train()
    with pytest.raises(CaptureError, match=r"'1' is in training mode.*model\.eval\(\)"):
        capture(model, (torch.randn(2, 4),))


@pytest.mark.parametrize("inputs", [torch.ones(2), [torch.ones(2)], {"x": 1}, None])
def test_inputs_must_be_a_tuple(inputs: Any) -> None:
    with pytest.raises(CaptureError, match="tuple"):
        normalise_inputs(inputs)


class BranchesOnValues(nn.Module):
    """Cannot be exported: its path depends on what the tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y.relu() if y.sum() > 0 else y


def test_a_failed_capture_says_why_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match=r"cannot capture BranchesOnValues whole.*torch\.cond"):
        capture(BranchesOnValues().eval(), (torch.randn(2, 8),))
    assert capfd.readouterr() == ("", "")


class Varargs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        y: Tensor = self.fc(torch.stack(args).sum(0)) * kwargs["scale"]
        return y


@pytest.mark.slow
def test_a_variable_number_of_arguments_has_a_free_batch() -> None:
    model = randomise(Varargs()).eval()
    program = capture(model, ((torch.randn(2, 4), torch.randn(2, 4)), {"scale": torch.rand(2, 1)}))
    assert program.batched == (True, True, True)
    x, scale = torch.randn(5, 4), torch.rand(5, 1)
    torch.testing.assert_close(outputs(program, x, -2 * x, scale=scale), model(x, -2 * x, scale=scale))
    assert type(model) is Varargs
    assert "forward" not in vars(model)


class FixedSecond(nn.Module):
    """Its second input has the batch size by chance, and must keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        y: Tensor = self.fc(x) + table.view(3, 1).sum()
        return y


@pytest.mark.slow
def test_what_can_be_free_is_free_where_not_everything_can() -> None:
    model = randomise(FixedSecond()).eval()
    table = torch.randn(3)
    done = capture_whole(model, (torch.randn(3, 4), table), {})
    assert [failure.attempt for failure in done.failures] == ["torch.export, dynamic batch"]
    assert done.program is not None
    assert done.program.batched == (True, False)
    x = torch.randn(6, 4)
    torch.testing.assert_close(outputs(done.program, x, table), model(x, table))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_that_cannot_be_free_is_captured_as_it_was_given(batch: int) -> None:
    class Splits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([row * (i + 1) for i, row in enumerate(x.unbind(0))])

    x = torch.randn(batch, 4)
    program = capture(Splits().eval(), (x,))
    assert program.how == "torch.export, static batch"
    torch.testing.assert_close(outputs(program, x), Splits()(x))


@pytest.mark.slow
def test_only_attempts_that_can_cure_the_error_are_made() -> None:
    assert len(capture_whole(Branches().eval(), (torch.randn(2, 4),), {}).failures) == 1
    numpy = capture_whole(UsesNumpy().eval(), (torch.randn(2, 4),), {})
    # The static attempt fails in the same words, which are not said again.
    assert [failure.attempt for failure in numpy.failures] == ["torch.export, dynamic batch"]


def test_a_failure_names_the_line_of_the_model() -> None:
    (failure,) = capture_whole(Branches().eval(), (torch.randn(2, 4),), {}).failures
    assert "return x + 1 if x.sum() > 0 else x - 1`: Could not guard on data-dependent expression" in str(failure)
    assert failure.error.startswith("test_capture.py, line ")


_CAPTURED_WITH: list[str | None] = []


class Experts(nn.Module):
    """A mixture of experts as Hugging Face has them: an implementation that can be set."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.implementation: dict[str, str | None] = {"": "grouped_mm"}

    def get_experts_implementation(self) -> dict[str, str | None]:
        return dict(self.implementation)

    def set_experts_implementation(self, implementation: str | dict[str, str | None]) -> None:
        self.implementation = implementation if isinstance(implementation, dict) else {"": implementation}

    def forward(self, x: Tensor) -> Tensor:
        _CAPTURED_WITH.append(self.implementation[""])
        y: Tensor = self.fc(x)
        return y


def test_experts_are_captured_as_batched_products_and_restored() -> None:
    model = nn.Sequential(Experts()).eval()
    _CAPTURED_WITH.clear()
    capture(model, (torch.randn(2, 4),))
    assert isinstance(model[0], Experts)
    # Run on the examples as it is, then captured, and run at another batch, as it was captured.
    assert _CAPTURED_WITH == ["grouped_mm", "batched_mm", "batched_mm"]
    assert model[0].implementation == {"": "grouped_mm"}


class KeyValueCache:
    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class ReturnsCache(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, KeyValueCache]:
        return x + 1, KeyValueCache(x)


def test_a_cache_among_the_outputs_is_told_without_an_attempt() -> None:
    done = capture_whole(ReturnsCache().eval(), (torch.randn(2, 4),), {})
    assert [(failure.attempt, failure.error) for failure in done.failures] == [
        (
            "not tried",
            "it returns a value of type KeyValueCache: set model.config.use_cache = False, "
            "or give use_cache=False in the example inputs",
        )
    ]
    with pytest.raises(
        CaptureError, match=r"ReturnsCache whole: it returns .*KeyValueCache: set model.config.use_cache"
    ):
        capture(ReturnsCache().eval(), (torch.randn(2, 4),))


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, inputs: dict[str, Any], scale: float, mode: str, nothing: None) -> Tensor:
        y: Tensor = self.fc(inputs["x"][0]) * scale + inputs["offset"]
        return y if mode == "plus" else -y


def test_constants_scalars_and_tensors_without_a_batch() -> None:
    model = randomise(Odd()).eval()
    inputs = {"x": [torch.randn(2, 4)], "offset": torch.tensor(0.5)}
    program = capture(model, (inputs, 2.0, "plus", None))
    assert program.batched == (True, False, False, False, False)
    inputs = {"x": [torch.randn(5, 4)], "offset": torch.tensor(-1.5)}
    torch.testing.assert_close(outputs(program, inputs, 2.0, "plus", None), model(inputs, 2.0, "plus", None))


@pytest.mark.long
def test_padded_attention_is_compared_with_what_is_captured() -> None:
    """The fused path gives zeros where there is padding, and passes nested tensors between layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).requires_grad_(False)
    model = randomise(nn.TransformerEncoder(layer, 1)).eval()
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    program = capture(model, ((x,), {"src_key_padding_mask": padding}))
    torch.testing.assert_close(
        outputs(program, x, src_key_padding_mask=padding), run_model(model, (x,), {"src_key_padding_mask": padding})
    )


def test_only_ordinary_tensors_and_constants_are_taken() -> None:
    assert foreign_types(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), None) != ""
    assert foreign_types(torch.ones(2, 2).to_sparse(), None) != ""
    assert foreign_types((torch.ones(2), None, 3, "x"), {"y": [torch.ones(2)]}) == ""


def test_settings_of_pytorch_survive_threads() -> None:
    def run(seed: int) -> None:
        for _ in range(20):
            run_model(nn.Linear(3, 4), (torch.randn(2, 3),), {})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch._dynamo.eval_frame._stance.stance == "default"


class Merged(nn.Module):
    """Rows of the second input take the places that the mask marks: as many as there are marks."""

    def forward(self, x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        return (x * 1).masked_scatter(mask[..., None].expand_as(x), rows)


MARKED = torch.tensor([[True, True, False, False, False, False]] * 2)


class Pairs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 2, x.shape[1]).sum(1)


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] > 4 else x + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (
            Merged(),
            (torch.randn(2, 6, 4), torch.tensor([[True] * 2 + [False] * 4] * 2), torch.randn(4, 4)),
            "at batch 3",
        ),
        (Pairs(), (torch.randn(2, 4),), "at batch 3|speciali"),
        (Decides(), (torch.randn(2, 4),), "decides by the size .* from 2 to 4"),
    ],
)
def test_a_batch_that_is_not_free_says_why(model: nn.Module, inputs: tuple[Any, ...], reason: str) -> None:
    done = capture_whole(model.eval(), inputs, {})
    assert done.program is not None
    assert not done.program.dynamic
    assert re.search(reason, done.failures[0].error)
    torch.testing.assert_close(outputs(done.program, *inputs), model(*inputs))


class Towers(nn.Module):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return x @ y.T, x + z


def test_inputs_that_the_graph_does_not_tie_get_sizes_of_their_own() -> None:
    program = capture(Towers().eval(), (torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4)))
    assert program.batched == (True, True, True)
    assert [leaf.shape[0] for leaf in program.inputs(3, apart=True)[0]] == [3, 5, 3]
    assert [leaf.shape[0] for leaf in program.inputs(3)[0]] == [3, 3, 3]


def test_other_batches_are_not_tried_twice_where_they_are_tied() -> None:
    class Fails(nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            seen.append([len(one) for one in inputs])
            raise ValueError("of the one size")

    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    class Apart(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, y * 3

    inputs = (torch.ones(2, 3), torch.ones(2, 3))
    for model, tried in ((Adds(), [[3, 3]]), (Apart(), [[3, 5], [3, 3]])):
        program = capture(model.eval(), inputs)
        seen: list[list[int]] = []
        with pytest.raises(CaptureError, match="does not run at batch 3"):
            fit_batches(replace(program, model=Fails().eval()))
        assert seen == tried


@pytest.mark.slow
def test_wrappers_are_taken_off() -> None:
    model = nn.Linear(3, 2).eval()
    compiled: Any = torch.compile(model, backend="eager")
    for wrapper in (compiled, nn.DataParallel(model)):
        program = capture(wrapper, (torch.ones(2, 3),))
        assert program.model is model
        assert program.dynamic
        assert not program.how.startswith("torch.export strict")


class Appends:
    """An object that is no tensor, and grows when it is used."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []


class Grows(nn.Module):
    def forward(self, x: Tensor, store: Appends) -> Tensor:
        store.values.append(x)
        return x + len(store.values)


def test_objects_among_the_inputs_stay_as_they_are() -> None:
    store = Appends()
    assert torch.equal(run_model(Grows(), (torch.ones(2), store), {}), torch.full((2,), 2.0))
    assert store.values == []


class Kept(nn.Module):
    def forward(self, x: Tensor, cache: KeyValueCache, use_cache: bool = True) -> tuple[Tensor, KeyValueCache]:
        return x + cache.keys, cache


def test_no_advice_that_was_followed() -> None:
    inputs = ((torch.randn(2, 4), KeyValueCache(torch.randn(2, 4))), {"use_cache": False})
    done = capture_whole(Kept().eval(), *inputs)
    assert "use_cache" not in done.failures[0].error
    assert "register_pytree_node" in done.failures[0].error
    with pytest.raises(CaptureError) as caught:
        capture(Kept().eval(), inputs)
    assert "use_cache" not in str(caught.value)
