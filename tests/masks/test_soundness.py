"""The model still is what its masks say: whoever changed it otherwise hears of it from every verb."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, spectral_norm, weight_norm
from torch.nn.utils import prune as torch_prune
from torch.optim import swa_utils

import srigl_fx as sx
from srigl_fx.errors import CheckpointError, InvariantError, SparsifyError, SriglError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train import checkpoint, checkpoint_file

prune: Any = torch_prune  # without types, as is what follows
swa: Any = swa_utils

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


class Round(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return (w * 64).round() / 64


class Shift(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w + 1


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.first(x).relu()))
        return y


def build() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
    layers.append(parametrizations.weight_norm(nn.Linear(16, 4)))
    return sx.sparsify(nn.Sequential(*layers), sparsity=0.5, distribution="uniform").eval()


def tied() -> nn.Module:
    torch.manual_seed(0)
    return sx.sparsify(Tied(), sparsity=0.5, distribution="uniform").eval()


def register(layer: nn.Module, part: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", part, unsafe=True)


def merge_adapter(layer: Any) -> None:
    """What peft's merge_and_unload does for LoRA."""
    with torch.no_grad():
        layer.weight += torch.randn(16, 2) @ torch.randn(2, 16)


def halve(layer: Any) -> None:
    """Pruning of channels by hand, the mask with them."""
    layer.weight = nn.Parameter(layer.weight[:8].detach())
    layer.weight_mask = layer.weight_mask[:8]


def overwrite_mask(layer: nn.Module) -> None:
    layer.register_buffer("weight_mask", torch.ones(16, 16))


def untie(model: Any) -> None:
    model.second.weight = nn.Parameter(model.second.weight.detach().clone())


def replace(model: Any, layer: nn.Module) -> None:
    model[0] = layer


Breakage = Callable[[Any], object]

# what happened -> (to which model, how, what every error says of it)
OUT_OF_PLACE: dict[str, tuple[Callable[[], nn.Module], Breakage, str]] = {
    "a parametrisation": (build, lambda m: register(m[0], Round()), r"0\.weight: the parametrisation Round"),
    "weight norm": (build, lambda m: parametrizations.weight_norm(m[0]), r"0\.weight: the parametrisation WeightNorm"),
    "old weight norm": (build, lambda m: weight_norm(m[0]), r"0\.weight: torch\.nn\.utils\.weight_norm"),
    "spectral norm": (build, lambda m: parametrizations.spectral_norm(m[0]), r"0\.weight: .*SpectralNorm"),
    "old spectral norm": (build, lambda m: spectral_norm(m[0]), r"0\.weight: torch\.nn\.utils\.spectral_norm"),
    "orthogonal": (build, lambda m: parametrizations.orthogonal(m[0]), r"0\.weight: the parametrisation Orthogonal"),
    "a part on top": (build, lambda m: register(m[4], Shift()), r"original1: the parametrisation Shift was .* on top"),
    "deleted weight": (build, lambda m: delattr(m[0], "weight"), r"0\.weight: it was deleted"),
    "no parameter": (build, lambda m: m[0].__dict__.update(weight=m[0]._parameters.pop("weight").data), "plain tensor"),
    "deleted mask": (build, lambda m: delattr(m[0], "weight_mask"), r"0\.weight: its mask was removed"),
    "another mask": (build, lambda m: overwrite_mask(m[0]), r"0\.weight_mask must be a bool tensor"),
    "another shape": (build, lambda m: halve(m[0]), r"0\.weight has shape \(8, 16\), and had \(16, 16\)"),
    "another module": (build, lambda m: replace(m, nn.Linear(16, 16)), r"0\.weight: .* this one has none"),
    "untied": (tied, untie, r"second\.weight: .* tied"),
    "the tied one deleted": (tied, lambda m: delattr(m, "first"), r"second\.weight: .* tied"),
}
BREAKAGES: dict[str, tuple[Callable[[], nn.Module], Breakage, str]] = {
    **OUT_OF_PLACE,
    "merged adapter": (build, lambda m: merge_adapter(m[0]), r"0\.weight: 128 weights off the mask.*release"),
    "dense weights": (build, lambda m: nn.init.ones_(m[2].weight), r"2\.weight: 128 weights off the mask.*apply"),
}


def static(model: nn.Module) -> object:
    return sx.Static(model, torch.optim.SGD(model.parameters(), lr=0.1))


# Every verb that reads masks; the path is for those that write.
VERBS: dict[str, Callable[[nn.Module, Path], object]] = {
    "verify": lambda model, _: sx.verify(model),
    "finalize": lambda model, _: sx.finalize(model),
    "summary": lambda model, _: sx.summary(model),
    "lower": lambda model, _: sx.lower(model, (torch.randn(2, 16),), min_speedup=0),
    "export_onnx": lambda model, path: sx.export_onnx(
        model, str(path / "model.onnx"), (torch.randn(2, 16),), min_speedup=0
    ),
    "save": lambda model, path: checkpoint.save(path / "last.safetensors", model=model),
    "trainer": lambda model, _: static(model),
    "apply": lambda model, _: sx.masks.apply(model),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_every_verb_says_what_happened_and_changes_nothing(breakage: str, verb: str, tmp_path: Path) -> None:
    if verb == "apply" and breakage not in OUT_OF_PLACE:
        return  # it drops values off the mask
    if verb == "apply" and breakage in ("another module", "untied", "the tied one deleted"):
        return  # the masks that are left are applied
    make, break_it, message = BREAKAGES[breakage]
    model = make()
    break_it(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(InvariantError, match=message):
        VERBS[verb](model, tmp_path)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    assert not list(tmp_path.iterdir())


def tie_again(model: Any) -> None:
    model.second.weight = model.first.weight


def fuse(model: Any) -> None:
    norm = nn.BatchNorm1d(16).eval()
    nn.init.uniform_(norm.weight)
    model[0] = fusion.fuse_linear_bn_eval(model[0], norm)


def untie_and_tie(model: Any) -> None:
    untie(model)
    tie_again(model)


def assign_and_tie(model: Any) -> None:
    model.load_state_dict(model.state_dict(), assign=True)
    tie_again(model)


def swap(model: Any) -> None:
    model[0], model[2] = model[2], model[0]


def scale_rows(layer: Any) -> None:
    """What merging IA3 does."""
    with torch.no_grad():
        layer.weight *= torch.rand(16, 1)


SOUND: dict[str, tuple[Callable[[], nn.Module], Breakage]] = {
    "half": (build, lambda m: m.half()),
    "bfloat16": (build, lambda m: m.to(torch.bfloat16)),
    "assign": (build, lambda m: m.load_state_dict(build().state_dict(), assign=True)),
    "fused with a batch norm": (build, fuse),
    "scaled rows": (build, lambda m: scale_rows(m[0])),
    "swapped modules": (build, swap),
    "a pruned bias": (build, lambda m: prune.l1_unstructured(m[0], "bias", 0.5)),
    "a parametrised bias": (build, lambda m: parametrize.register_parametrization(m[0], "bias", Round())),
    "a head of another size": (build, lambda m: replace(m, nn.Linear(8, 16))),
    "a part that is gone": (build, lambda m: m.append(m.pop(0))),
    "tied": (tied, lambda m: m.load_state_dict(tied().state_dict())),
    "untied and tied again": (tied, untie_and_tie),
    "loaded with assign, tied again": (tied, assign_and_tie),
}


@pytest.mark.parametrize("change", SOUND)
def test_what_leaves_the_masks_true_is_no_breakage(change: str) -> None:
    make, apply_it = SOUND[change]
    model = make()
    apply_it(model)
    for each in (model, copy.deepcopy(model)):
        sx.verify(each)
        assert sx.summary(each).kept
        static(each)
        sx.finalize(each)


def test_channels_last_and_pickles_are_sound() -> None:
    model = sx.sparsify(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), sparsity=0.5)
    model = pickle.loads(pickle.dumps(model.to(memory_format=torch.channels_last)))  # type: ignore[call-overload]
    sx.verify(model)
    replace(model, nn.Conv2d(4, 8, 3))
    with pytest.raises(InvariantError, match=r"0\.weight"):
        sx.verify(model)


def test_a_graph_module_and_its_copies_miss_a_mask_too() -> None:
    model: Any = sx.sparsify(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 16), nn.ReLU())), sparsity=0.5)
    for each in (copy.deepcopy(model), model):
        sx.verify(each)
        setattr(each, "0", nn.Linear(16, 16))
        with pytest.raises(InvariantError, match=r"0\.weight"):
            sx.verify(each)


@pytest.mark.slow
def test_merged_weights_are_kept_once_their_mask_is_released() -> None:
    model = build()
    merge_adapter(model[0])
    x = torch.randn(3, 16)
    expected = model(x)
    assert sx.masks.release(model) == ["0.weight"]
    sx.verify(model)
    assert [row.sparsity for row in sx.summary(model).rows if row.name in ("0.weight", "2.weight")] == [0.0, 0.5]
    sx.finalize(copy.deepcopy(model))
    lowered = sx.lower(model, (x,), min_speedup=0)
    torch.testing.assert_close(lowered(x), expected, rtol=1e-5, atol=1e-5)
    sx.finalize(model)
    assert torch.equal(model(x), expected)
    assert type(model[0]) is nn.Linear


def test_a_layer_that_was_replaced_is_released_by_name() -> None:
    model = build()
    replace(model, nn.Linear(16, 16))
    assert sx.masks.release(model) == []
    with pytest.raises(InvariantError, match=r"0\.weight"):
        sx.verify(model)
    assert sx.masks.release(model, ["0.weight"]) == ["0.weight"]
    sx.verify(model)
    sx.finalize(model)
    with pytest.raises(InvariantError, match=r"no masked weight is called nine"):
        sx.masks.release(build(), ["nine"])


def test_a_layer_that_was_replaced_and_sparsified_is_sound() -> None:
    model = build()
    replace(model, sx.sparsify(nn.Linear(16, 16), sparsity=0.5))
    sx.verify(model)
    assert len(list(sx.masks.named_masks(model))) == 3


# torch.nn.utils.prune


def test_a_weight_with_a_mask_is_not_pruned_by_torch() -> None:
    model = build()
    names = list(dict(model.named_parameters()))
    state = copy.deepcopy(model.state_dict())
    calls: list[Callable[[], object]] = [
        lambda: prune.l1_unstructured(model[0], "weight", 0.5),
        lambda: prune.identity(model[0], "weight"),
        lambda: prune.global_unstructured([(model[0], "weight")], prune.L1Unstructured, amount=0.5),
        lambda: prune.l1_unstructured(model.get_submodule("4.parametrizations.weight"), "original1", 0.5),
    ]
    for call in calls:
        with pytest.raises(InvariantError, match=r"torch\.nn\.utils\.prune cannot be applied to '(0|4)\."):
            call()
    assert list(dict(model.named_parameters())) == names
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    sx.verify(model)


def test_what_torch_prunes_stays_dense_until_that_is_permanent() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(SparsifyError, match=r"strict=True.*0\.weight_orig.*prune\.remove\(layer, 'weight'\) first"):
        sx.sparsify(model, sparsity=0.5, strict=True)
    sx.sparsify(model, sparsity=0.5)
    theirs = model.get_buffer("0.weight_mask")
    assert theirs.is_floating_point()
    assert [name for name, _ in sx.masks.named_masks(model)] == ["2.weight"]
    (row,) = [row for row in sx.summary(model).rows if row.name == "0.weight_orig"]
    assert "torch.nn.utils.prune computes 'weight' from it" in row.reason
    assert "0.weight_mask" in sx.masks.strip(model.state_dict())
    prune.remove(model[0], "weight")
    sx.verify(model)
    assert [row.name for row in sx.summary(model).rows] == ["2.weight"]
    sx.sparsify(sx.finalize(model), sparsity=0.5, distribution="uniform")
    assert [name for name, _ in sx.masks.named_masks(model)] == ["0.weight", "2.weight"]


def test_a_model_that_torch_prunes_says_so() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    prune.l1_unstructured(model[0], "weight", 0.5)
    with pytest.raises(SparsifyError, match=r"nothing to sparsify.*prune\.remove"):
        sx.sparsify(model)


# Averaged copies


def averaged(update: Callable[[nn.Module], None], model: nn.Module) -> None:
    """Train for 12 steps with four updates of the masks, averaging after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sx.SRigL(model.train(), optimizer, total_steps=20, update_every=3)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        update(model)
    model.eval()


def lerp_into(average: nn.Module) -> Callable[[nn.Module], None]:
    @torch.no_grad()
    def update(model: nn.Module) -> None:
        for q, p in zip(average.parameters(), model.parameters(), strict=True):
            q.lerp_(p, 0.3)

    return update


def test_a_state_dict_whose_weights_and_masks_disagree_is_refused_whole() -> None:
    model = build()
    average = copy.deepcopy(model)
    averaged(lerp_into(average), model)
    with pytest.raises(InvariantError, match="off the mask"):
        sx.verify(average)
    state = average.state_dict()
    loading = build()
    before = {key: value.clone() for key, value in loading.state_dict().items()}
    for wrapped in (loading, nn.ModuleDict({"inner": loading})):
        prefix = "inner." if wrapped is not loading else ""
        with pytest.raises(InvariantError, match=r"0\.weight: in this state_dict, \d+ weights off its mask"):
            wrapped.load_state_dict({prefix + key: value for key, value in state.items()})
    assert all(torch.equal(value, before[key]) for key, value in loading.state_dict().items())
    with pytest.raises(InvariantError, match=r"0\.weight: in this state_dict"):
        sx.masks.strip(state)
    part: nn.Module = loading[0]
    with pytest.raises(RuntimeError, match=r"weight: in this state_dict, \d+ weights off its mask"):
        part.load_state_dict({"weight": state["0.weight"], "weight_mask": state["0.weight_mask"]}, strict=False)
    assert torch.equal(part.state_dict()["weight"], before["0.weight"])

    sx.masks.apply(average)
    loading.load_state_dict(average.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(loading(x), average(x))
    dense = {key: value for key, value in state.items() if not key.endswith("_mask")}
    model.load_state_dict(dense)
    for handle in sparse_weights(model):
        assert torch.equal(handle.weight, state[handle.fqn] * handle.mask)


def test_a_checkpoint_whose_weights_and_masks_disagree_is_refused(tmp_path: Path) -> None:
    model = build()
    checkpoint.save(tmp_path / "good", model=model)
    contents = checkpoint_file.read(tmp_path / "good")
    contents["model"]["2.weight"] = torch.ones(16, 16)
    checkpoint_file.write(tmp_path / "bad", contents)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"2\.weight there cannot be right.*128 weights off the mask"):
        checkpoint.load(tmp_path / "bad", model=model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def ema_of_buffers(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    average = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.7), use_buffers=True)
    return average.module, average.update_parameters


def timm_v2(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    utils = pytest.importorskip("timm.utils", reason="the zoo extra is not installed")
    average = utils.ModelEmaV2(model, decay=0.7)
    return average.module, average.update


@pytest.mark.parametrize("how", [ema_of_buffers, timm_v2])
def test_averaged_masks_are_a_union_and_not_taken_for_masks(
    how: Callable[[nn.Module], tuple[nn.Module, Callable[[nn.Module], None]]],
) -> None:
    model = build()
    average, update = how(model)
    seen = {name: torch.zeros_like(mask) for name, mask in sx.masks.named_masks(model)}

    def watched(model: nn.Module) -> None:
        update(model)
        for name, mask in sx.masks.named_masks(model):
            seen[name] |= mask

    averaged(watched, model)
    masks = dict(sx.masks.named_masks(average))
    assert all(not (seen[name] & ~mask).any() for name, mask in masks.items())  # what the documentation says of them
    before = copy.deepcopy(average.state_dict())
    for verb in (sx.verify, sx.masks.apply):
        with pytest.raises(InvariantError, match=r"0\.weight: the mask keeps .*averaged like weights"):
            verb(average)
    assert all(torch.equal(value, before[key]) for key, value in average.state_dict().items())

    average.load_state_dict({f"{name}_mask": mask for name, mask in sx.masks.named_masks(model)}, strict=False)
    with pytest.raises(InvariantError, match="off the mask"):
        sx.verify(average)
    sx.masks.apply(average)
    sx.verify(average)
    for name, mask in sx.masks.named_masks(average):
        assert torch.equal(average.get_parameter(name), before[name] * mask)


@pytest.mark.parametrize("verb", [sx.summary, sx.verify, sx.recipe, sx.finalize, sx.masks.apply])
@pytest.mark.parametrize("model", [None, 3])
def test_what_is_no_model_is_told_so(verb: Callable[[Any], object], model: Any) -> None:
    with pytest.raises(SriglError, match=f"^the model must be a torch.nn.Module, got {type(model).__name__}$"):
        verb(model)


def test_a_checkpoint_of_no_model_is_told_so(tmp_path: Path) -> None:
    nothing: Any = None
    with pytest.raises(SriglError, match=r"^the model must be a torch\.nn\.Module, got NoneType$"):
        checkpoint.save(tmp_path / "last", model=nothing)
    assert not list(tmp_path.iterdir())
    checkpoint.save(tmp_path / "last", model=nn.Linear(3, 2))
    with pytest.raises(
        CheckpointError, match=r"last does not fit: the model must be a torch\.nn\.Module, got NoneType"
    ):
        checkpoint.load(tmp_path / "last", model=nothing)
