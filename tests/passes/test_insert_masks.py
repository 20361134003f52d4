"""Insertion and its undoing, on plain modules and on graphs of whole models."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import srigl_fx as sx
from srigl_fx.errors import SparsifyError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.nn.contraction import MaskedContraction
from srigl_fx.nn.sparse_module import SparseModule


class Shared(nn.Module):
    """Uses one parameter by function twice, beside an ordinary layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(20, 40))
        self.bias = nn.Parameter(torch.randn(20))
        self.body = nn.Linear(40, 40)
        self.head = nn.Linear(20, 30)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.linear(self.body(x), self.w, self.bias).relu() + F.linear(x, self.w))
        return y


def masked_reference(model: nn.Module) -> nn.Module:
    """A dense copy with the masks multiplied in by hand."""
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("_mask")}
    plain = Shared()
    plain.load_state_dict(state)
    return plain


def test_names_identity_and_behaviour_stay() -> None:
    model = Shared()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    names = set(model.state_dict())
    assert sx.sparsify(model, sparsity=0.5) is model
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert set(model.state_dict()) - names == {"w_mask", "body.weight_mask", "head.weight_mask"}
    assert isinstance(model.body, nn.Linear)
    assert isinstance(model.body, SparseModule)
    assert type(model.body).__module__ == nn.Linear.__module__
    x = torch.randn(3, 40)
    assert torch.equal(model(x), masked_reference(model)(x))
    for handle in sparse_weights(model):
        assert handle.mask.dtype == torch.bool
        assert not handle.weight[~handle.mask].any()
        assert handle.weight[handle.mask].all()


def test_functional_uses_become_mask_managed_nodes_without_parameters() -> None:
    model = Shared()
    x = torch.randn(3, 40)
    graph = sx.sparsify(fx.symbolic_trace(model), sparsity=0.5)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert targets.count("masked_w") == 2
    contraction = graph.get_submodule("masked_w")
    assert isinstance(contraction, MaskedContraction)
    assert not list(contraction.parameters()) + list(contraction.buffers())
    weights = [n.args[1].target for n in graph.graph.nodes if n.op == "call_module" and n.target == "masked_w"]
    assert weights == ["w", "w"]
    assert not [node for node in graph.graph.nodes if node.op == "call_function" and node.target is F.linear]
    assert torch.equal(graph(x), masked_reference(graph)(x))
    nodes = {row.name: row.nodes for row in sx.summary(graph).rows}
    assert nodes == {"w": ("masked_w", "masked_w_1"), "body.weight": ("body",), "head.weight": ("head",)}
    assert "masked_w_1" in str(sx.summary(graph))


def test_one_weight_through_two_functions_keeps_one_mask() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(40, 40))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w) + x @ self.w.t()

    model = Both()
    x = torch.randn(2, 40)
    graph = sx.sparsify(fx.symbolic_trace(model), sparsity=0.5)
    children = [child for child in graph.children() if isinstance(child, MaskedContraction)]
    assert len(children) == 2
    assert [name for name, _ in graph.named_buffers()] == ["w_mask"]
    expected = 2 * (x.double() @ graph.get_parameter("w").detach().double().t())
    torch.testing.assert_close(graph(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own, from copying an exported graph
def test_an_exported_graph_with_weights_in_bare_containers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    x = torch.randn(2, 3, 8, 8)
    graph = sx.sparsify(torch.export.export(model, (x,)).module(), sparsity=0.5, rules={"3": 0.9})
    assert {name for name, _ in graph.named_buffers()} == {"0.weight_mask", "3.weight_mask"}
    assert {row.name: row.nodes for row in sx.summary(graph).rows} == {
        "0.weight": ("masked_0_weight",),
        "3.weight": ("masked_3_weight",),
    }
    twin = copy.deepcopy(graph)
    assert sx.summary(twin).kept == sx.summary(graph).kept
    assert torch.equal(twin(x), graph(x))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("traced", [False, True])
def test_copies_carry_masks_and_records(copier: object, traced: bool) -> None:
    model = sx.sparsify(fx.symbolic_trace(Shared()) if traced else Shared(), sparsity=0.5)
    twin = copier(model)  # type: ignore[operator]
    x = torch.randn(3, 40)
    assert torch.equal(twin(x), model(x))
    assert sx.summary(twin).as_dict() == sx.summary(model).as_dict()
    assert [handle.fqn for handle in sparse_weights(twin)] == [handle.fqn for handle in sparse_weights(model)]
    first, second = sparse_weights(model)[0], sparse_weights(twin)[0]
    assert first.mask.data_ptr() != second.mask.data_ptr()


def test_records_follow_a_wrapper_and_a_child() -> None:
    model = sx.sparsify(Shared(), sparsity=0.5)
    wrapper = nn.ModuleDict({"inner": model})
    assert next(row.name for row in sx.summary(wrapper).rows) == "inner.w"
    assert [row.name for row in sx.summary(model.body).rows] == ["weight"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_a_dense_checkpoint_keeps_the_masks_and_is_projected(assign: bool, traced: bool) -> None:
    model = sx.sparsify(fx.symbolic_trace(Shared()) if traced else Shared(), sparsity=0.5)
    masks = {handle.fqn: handle.mask.clone() for handle in sparse_weights(model)}
    dense = Shared().state_dict()
    untouched = {name: value.clone() for name, value in dense.items()}
    model.load_state_dict(dense, assign=assign)
    for handle in sparse_weights(model):
        assert torch.equal(handle.mask, masks[handle.fqn])
        assert torch.equal(handle.weight, dense[handle.fqn] * handle.mask)
        assert isinstance(handle.weight, nn.Parameter)
    assert all(torch.equal(dense[name], untouched[name]) for name in dense)


def test_a_sparse_checkpoint_brings_its_masks() -> None:
    source = sx.sparsify(Shared(), sparsity=0.5, mask_init="random", seed=1)
    target = sx.sparsify(Shared(), sparsity=0.5, mask_init="random", seed=2)
    assert not torch.equal(source.get_buffer("body.weight_mask"), target.get_buffer("body.weight_mask"))
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 40)
    assert torch.equal(source(x), target(x))
    sx.verify(target)


@pytest.mark.parametrize("traced", [False, True])
def test_finalize_gives_the_plain_model_back(traced: bool) -> None:
    model: nn.Module = fx.symbolic_trace(Shared()) if traced else Shared()
    names = set(model.state_dict())
    parameters = [id(parameter) for parameter in model.parameters()]
    sx.sparsify(model, sparsity=0.5)
    x = torch.randn(3, 40)
    expected = model(x)
    assert sx.finalize(model) is model
    assert torch.equal(model(x), expected)
    assert set(model.state_dict()) == names
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert not any(isinstance(module, SparseModule | MaskedContraction) for module in model.modules())
    assert not any("srigl" in name for module in model.modules() for name in vars(module))
    with pytest.raises(SparsifyError, match="was not sparsified"):
        sx.finalize(model)
    sx.sparsify(model, sparsity=0.5)


def test_a_taken_name_is_refused_before_anything_is_written() -> None:
    model = Shared()
    model.body.weight_mask = "mine"  # type: ignore[assignment]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparsifyError, match=r"'weight_mask'.*'body.weight'"):
        sx.sparsify(model, sparsity=0.5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(model.head) is nn.Linear


def test_a_sparse_layer_condenses_itself() -> None:
    model = sx.sparsify(Shared(), sparsity=0.5)
    for module, attr in ((model, "w"), (model.body, "weight")):
        assert isinstance(module, SparseModule)
        weight, mask = module.condense()[attr].to_dense()
        assert torch.equal(torch.from_numpy(weight), module.get_parameter(attr).detach())
        assert torch.equal(torch.from_numpy(mask), module.get_buffer(attr + "_mask"))


class NoSubclass(nn.Linear):
    """Refuses to be subclassed, and so to be swapped."""

    def __init_subclass__(cls) -> None:
        raise TypeError("final")


class NoBuffer(nn.Linear):
    def register_buffer(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("no buffers here")


def expanded() -> nn.Linear:
    layer = nn.Linear(40, 40)
    layer.weight.data = torch.randn(1, 40).expand(40, 40)
    return layer


@pytest.mark.parametrize("layer", [lambda: NoSubclass(40, 40), lambda: NoBuffer(40, 40), expanded])
def test_what_fails_on_the_way_is_undone(layer: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(40, 40), layer(), nn.Linear(40, 40))
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model]
    with pytest.raises(SparsifyError, match=r"could not be inserted .*The model is as it was"):
        sx.sparsify(model, sparsity=0.5)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [type(module) for module in model] == classes
    assert not any("srigl" in name for module in model.modules() for name in vars(module))
    sx.sparsify(model, sparsity=0.5, rules={"1": None})


class Standardised(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_effective_masks_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(40, 40))
    model = nn.Sequential(Standardised(40, 40), normed, nn.utils.weight_norm(nn.Linear(40, 40)))
    x, before = torch.randn(3, 40), copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    expected = model(x)

    def refuse(_: nn.Module) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr("srigl_fx.passes.insert_masks.invariants.verify", refuse)
        with pytest.raises(SparsifyError, match="The model is as it was"):
            sx.sparsify(model, sparsity=0.5)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("srigl" in name for module in model.modules() for name in vars(module))
    assert (
        type(next(iter(model[2]._forward_pre_hooks.values()))) is torch.nn.utils.weight_norm.__globals__["WeightNorm"]
    )
    assert torch.equal(model(x), expected)
    sx.sparsify(model, sparsity=0.5)
    assert len(sparse_weights(model)) == 3


def test_what_fails_in_a_graph_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.symbolic_trace(Shared())
    x, before = torch.randn(3, 40), copy.deepcopy(graph.state_dict())
    functions, expected = sorted(str(node.target) for node in graph.graph.nodes), graph(x)

    def refuse(_: nn.Module) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("srigl_fx.passes.insert_masks.invariants.verify", refuse)
    with pytest.raises(SparsifyError, match="The model is as it was"):
        sx.sparsify(graph, sparsity=0.5)
    assert sorted(str(node.target) for node in graph.graph.nodes) == functions
    assert torch.equal(graph(x), expected)
    assert graph.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in graph.state_dict().items())
    assert not graph.meta
    assert not any("srigl" in name for module in graph.modules() for name in vars(module))


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(40, 40))
    with pytest.raises(SparsifyError, match=r"'0.weight' is on the meta device"):
        sx.sparsify(model)
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(40, 40))
    with pytest.raises(SparsifyError, match="inference_mode"):
        sx.sparsify(model)
