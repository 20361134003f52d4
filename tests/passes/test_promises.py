"""What a pass of one's own promises of the graph: values at new nodes, and the model's tensors as they were."""

from collections.abc import Callable

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, fx, nn

import srigl_fx as sx
from srigl_fx.errors import PassError
from srigl_fx.passes import Pass, PassResult
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.program import Program, tensor_at
from srigl_fx.passes.promises import kept

aten = torch.ops.aten
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    layers = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    return mask_by_hand(randomise(layers), 0.4, ablated=3).eval()


class Bare(Pass[Program]):
    """Makes a node, and gives it no value."""

    def run(self, subject: Program) -> PassResult[Program]:
        graph = subject.module.graph
        relu = graph.find_nodes(op="call_function", target=aten.relu.default)[0]
        with graph.inserting_before(relu):
            relu.update_arg(0, graph.call_function(aten.mul.Scalar, (relu.args[0], 1.0)))
        subject.module.recompile()
        return PassResult(subject=subject, changed=True)


class BareButImproves(Bare):
    only_improves = True


@pytest.mark.slow
def test_a_new_node_without_a_value_is_told_of_the_pass_that_made_it() -> None:
    with pytest.raises(
        PassError, match=r"the pass Bare failed \(ValueError: it made mul_scalar \(aten.mul.Scalar\) without"
    ):
        sx.lower(network(), (X,), min_speedup=0, passes=(*LOWERING[:-1], Bare(), *LOWERING[-1:]))
    model = network()
    lowered = sx.lower(model, (X,), min_speedup=0, passes=(*LOWERING[:-1], BareButImproves(), *LOWERING[-1:]))
    assert [note.by for note in lowered.report.undone] == ["BareButImproves"]
    torch.testing.assert_close(lowered(X), model(X))


def multiply(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(2)


def multiply_data(tensor: Tensor) -> None:
    tensor.data.mul_(2)


def multiply_memory(tensor: Tensor) -> None:
    memory = tensor.detach().numpy()
    memory *= 2


def not_a_number(tensor: Tensor) -> None:
    tensor.data.view(-1)[0] = float("nan")


class Writes(Pass[Program]):
    """Writes to a tensor of the model, and then raises or not."""

    def __init__(self, write: Callable[[Tensor], None], target: str = "0.weight", *, raises: bool = False) -> None:
        self.write, self.target, self.raises = write, target, raises

    def run(self, subject: Program) -> PassResult[Program]:
        self.write(tensor_at(subject.module, self.target))
        if self.raises:
            raise ZeroDivisionError("half-way")
        return PassResult(subject=subject, changed=True)


class WritesMasks(Pass[Program]):
    def run(self, subject: Program) -> PassResult[Program]:
        for masked in subject.masked.values():
            masked.mask.logical_not_()
        return PassResult(subject=subject, changed=True)


def refused(step: Pass[Program], why: str, *before_it: Pass[Program]) -> None:
    """``lower`` names the pass, and the model is as it was."""
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PassError, match=rf"the pass {step.name} failed \({why}"):
        sx.lower(model, (X,), min_speedup=0, passes=(*before_it, step, *LOWERING))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.long
@pytest.mark.parametrize("write", [multiply, multiply_data, multiply_memory, not_a_number])
def test_what_a_pass_writes_to_the_model_is_taken_back(write: Callable[[Tensor], None]) -> None:
    refused(Writes(write), r"ValueError: it wrote to 0\.weight, which is the model's own")
    refused(Writes(write, "1.running_mean"), r"ValueError: it wrote to 1\.running_mean, ")
    refused(Writes(write, raises=True), "ZeroDivisionError: half-way")


def one_row(tensor: Tensor) -> None:
    """Writes to the old memory, too."""
    tensor.data = tensor.data[:1]
    tensor.data.fill_(7.0)


def in_float64(tensor: Tensor) -> None:
    tensor.data = tensor.data.double()


def moved(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def transposed(tensor: Tensor) -> None:
    tensor.data = tensor.data.t()


def not_trained(tensor: Tensor) -> None:
    tensor.requires_grad_(not tensor.requires_grad)


def without_grad(tensor: Tensor) -> None:
    tensor.grad = None


def with_grad(tensor: Tensor) -> None:
    tensor.grad = torch.zeros_like(tensor)


def grad_of_zeros(tensor: Tensor) -> None:
    assert tensor.grad is not None
    tensor.grad.zero_()


def computed(tensor: Tensor) -> None:
    """In place, from what requires a gradient; itself it does not."""
    tensor.mul_(torch.tensor(2.0, requires_grad=True))


class Shared(nn.Linear):
    """Parameters that share memory, one with a sparse gradient, and a bias of ones, which equals parts of itself."""

    buffer: Tensor

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.rows = nn.Embedding(4, 3, sparse=True)
        self.part = nn.Parameter(self.weight.detach()[1:])
        self.register_buffer("buffer", torch.ones(2, 3))
        nn.init.ones_(self.bias)

    def forward(self, x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x) + self.rows(which), self.part * self.buffer


@pytest.mark.parametrize(
    ("change", "name", "written"),
    [
        (multiply, "part", "weight, part"),
        (one_row, "weight", "weight"),
        (one_row, "part", "weight, part"),
        (one_row, "bias", "bias"),
        (in_float64, "weight", "weight"),
        (moved, "part", "part"),
        (transposed, "weight", "weight"),
        (computed, "buffer", "buffer, buffer.requires_grad"),
        (not_trained, "weight", "weight.requires_grad"),
        (not_trained, "buffer", "buffer.requires_grad"),
        (with_grad, "bias", "bias.grad"),
        (without_grad, "weight", "weight.grad"),
        (grad_of_zeros, "weight", "weight.grad"),
        (grad_of_zeros, "rows.weight", "rows.weight.grad"),
    ],
)
def test_all_that_a_pass_can_change_of_a_tensor_is_taken_back(
    change: Callable[[Tensor], None], name: str, written: str
) -> None:
    model = Shared()
    (model.weight.sum() + model.rows(torch.tensor([1, 1, 2])).sum()).backward()
    module = fx.symbolic_trace(model)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def state() -> dict[str, tuple[object, ...]]:
        return {
            key: (
                *(one.data_ptr(), one.dtype, one.shape, one.stride(), one.tolist(), one.is_leaf, one.requires_grad),
                *(id(one.grad), None if one.grad is None else one.grad.to_dense().tolist()),
            )
            for key, one in tensors.items()
        }

    def changed(*, raises: bool) -> None:
        with kept(module):
            change(tensors[name])
            if raises:
                raise ZeroDivisionError("half-way")

    before = state()
    with pytest.raises(ValueError, match=r"^it wrote to ") as caught:
        changed(raises=False)
    named = str(caught.value).removeprefix("it wrote to ").partition(", which is the model's own")[0]
    assert sorted(named.split(", ")) == sorted(written.split(", "))
    assert state() == before
    with pytest.raises(ZeroDivisionError, match="half-way"):
        changed(raises=True)
    assert state() == before


class CutsParameters(Pass[Program]):
    def run(self, subject: Program) -> PassResult[Program]:
        for parameter in subject.module.parameters():
            parameter.data = parameter.data[:1]
        return PassResult(subject=subject, changed=True)


@pytest.mark.slow
def test_parameters_that_a_pass_cuts_are_whole_again() -> None:
    refused(CutsParameters(), r"ValueError: it wrote to (\d\.(weight|bias), ){6}which is the model's own")


@pytest.mark.long
def test_what_a_pass_writes_to_masks_is_taken_back() -> None:
    refused(WritesMasks(), r"ValueError: it wrote to 3\.weight_mask, 0\.weight_mask, which is the model's own")
    for before_it in (LOWERING[:1], LOWERING):
        why = r"ValueError: it wrote to the mask of 3\.weight, the mask of 0\.weight, which is the model's own"
        refused(WritesMasks(), why, *before_it)


@pytest.mark.slow
def test_a_pass_that_only_improves_is_undone_with_what_it_wrote() -> None:
    class Improves(Writes):
        only_improves = True

    model = network()
    expected = model(X)
    lowered = sx.lower(model, (X,), min_speedup=0, passes=(Improves(multiply), *LOWERING))
    assert [note.by for note in lowered.report.undone] == ["Improves"]
    assert torch.equal(model(X), expected)
    torch.testing.assert_close(lowered(X), expected)


@pytest.mark.slow
def test_not_a_number_may_stay_in_a_model() -> None:
    class Nothing(Pass[Program]):
        def run(self, subject: Program) -> PassResult[Program]:
            return PassResult(subject=subject, changed=False)

    model = network()
    with torch.no_grad():
        model.get_parameter("3.bias")[0] = float("nan")
    lowered = sx.lower(model, (X,), min_speedup=0, passes=(Nothing(), *LOWERING))
    torch.testing.assert_close(lowered(X), model(X), equal_nan=True)
