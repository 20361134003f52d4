import copy
import pickle
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from srigl_fx import SRigL, sparsify, verify
from srigl_fx.errors import TrainerError
from srigl_fx.masks import named_masks
from srigl_fx.masks.records import records_on, set_records
from srigl_fx.train.protect import protected_weights


class TwoHeads(nn.Module):
    """Registers its body last, and has two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 4), nn.Linear(16, 4)
        self.extra = nn.Parameter(torch.randn(4, 16))
        self.body = nn.Linear(12, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.relu(self.body(x))
        return self.left(x).softmax(-1), {"right": self.right(x), "extra": 2 * functional.linear(x, self.extra)}


def test_from_a_graph() -> None:
    model = sparsify(fx.symbolic_trace(TwoHeads()), sparsity=0.5, distribution="uniform")
    assert set(protected_weights(model, "output")) == {"left.weight", "right.weight", "extra"}


def test_from_a_graph_inside_a_wrapper() -> None:
    model = sparsify(fx.symbolic_trace(TwoHeads()), sparsity=0.5, distribution="uniform")
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    expected = {"_orig_mod.left.weight", "_orig_mod.right.weight", "_orig_mod.extra"}
    assert set(protected_weights(compiled, "output")) == expected


def test_a_dense_layer_before_the_output_protects_nothing() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)))
    sparsify(model, sparsity=0.5, rules={"2": None})
    assert set(protected_weights(model, "output")) == {"2.weight"}  # which has no mask


def test_from_example_inputs() -> None:
    model = sparsify(TwoHeads(), sparsity=0.5, distribution="uniform", example_inputs=(torch.randn(2, 12),))
    assert set(protected_weights(model, "output")) == {"left.weight", "right.weight", "extra"}


def test_the_last_in_registration_order_otherwise() -> None:
    model = sparsify(TwoHeads(), sparsity=0.5, distribution="uniform")
    assert set(protected_weights(model, "output")) == {"body.weight"}


def test_a_tied_weight_stands_where_it_is_used_last() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 16))
    model[3].weight = model[0].weight
    sparsify(model, sparsity=0.5, distribution="uniform")
    assert set(protected_weights(model, "output")) == {"0.weight"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["left"], {"left.weight"}),
        (["left.weight", "body"], {"left.weight"}),
        (["*t"], {"left.weight", "right.weight"}),
        (["[lr]*"], {"left.weight", "right.weight"}),
        ([], set()),
        (iter(["left"]), {"left.weight"}),
    ],
)
def test_names_add_to_the_default(patterns: Iterable[str], expected: set[str]) -> None:
    found = protected_weights(sparsify(TwoHeads(), sparsity=0.5), patterns)
    assert found.keys() == expected | {"body.weight"}  # the last in registration order
    assert found["body.weight"] == "it feeds the model's outputs"


def test_names_survive_wrappers() -> None:
    wrapped = nn.ModuleDict({"module": sparsify(TwoHeads(), sparsity=0.5)})
    expected = {"module.left.weight", "module.body.weight"}
    assert set(protected_weights(wrapped, ["left"])) == set(protected_weights(wrapped, ["module.left"])) == expected


def test_a_name_that_matches_nothing() -> None:
    with pytest.raises(TrainerError, match="'lef' matches no weight"):
        protected_weights(sparsify(TwoHeads(), sparsity=0.5), ["left", "lef"])


@pytest.mark.parametrize("protect", ["left", 3, [3], None])
def test_what_is_no_protection(protect: Any) -> None:
    with pytest.raises(TrainerError, match=r'"auto", "output", "none",? or a list of names'):
        protected_weights(sparsify(TwoHeads(), sparsity=0.5), protect)


class Transformer(nn.Module):
    """One block, with queries, keys and values from one layer, and a normalised condition."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.condition = nn.Linear(12, 16), nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.norm(self.condition(x)).mean(dim=1, keepdim=True)
        x = self.embed(x)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.proj(functional.scaled_dot_product_attention(q, k, v))
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        logits: Tensor = self.head((x * scale).mean(dim=1))
        return logits


WHY = {
    "embed.weight": "it writes into a residual stream",
    "condition.weight": "only a normalisation over its neurons reads it",
    "qkv.weight": "it gives queries, keys or values of attention",
    "proj.weight": "it writes into a residual stream",
    "down.weight": "it writes into a residual stream",
    "head.weight": "it feeds the model's outputs",
}


def test_neurons_that_others_count_on_are_protected_by_default() -> None:
    model = sparsify(Transformer(), sparsity=0.5, distribution="uniform")
    assert protected_weights(model) == protected_weights(model, "auto") == WHY
    assert protected_weights(model, "output").keys() == {"head.weight"}
    assert protected_weights(model, "none") == {}
    assert protected_weights(model, ["up"]) == {**WHY, "up.weight": "protect names it: 'up'"}


def _train(model: nn.Module, **options: Any) -> SRigL:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = SRigL(
        model, optimizer, total_steps=40, update_every=4, ablation=1.0, drop_fraction=0.5, warn_ablated=1.0, **options
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 5, 12, generator=generator)).square().sum().backward()
        optimizer.step()
    verify(model, optimizer)
    return trainer


def test_the_default_ablates_the_width_of_a_block_alone() -> None:
    torch.manual_seed(0)
    model = sparsify(Transformer(), sparsity=0.5, distribution="uniform")
    whole = {name: mask.any(dim=1).sum().item() for name, mask in named_masks(model)}
    _train(model)
    left = {name: mask.any(dim=1).sum().item() for name, mask in named_masks(model)}
    assert left.pop("up.weight") < whole.pop("up.weight")
    assert left == whole


def test_outputs_alone_can_be_protected() -> None:
    torch.manual_seed(0)
    model = sparsify(Transformer(), sparsity=0.5, distribution="uniform")
    _train(model, protect="output")
    left = {name: int(mask.any(dim=1).sum()) for name, mask in named_masks(model)}
    assert left["head.weight"] == 4
    assert left["qkv.weight"] < 48
    assert left["proj.weight"] < 16


def test_wrapped_and_pickled_models_know_it_still() -> None:
    model = sparsify(Transformer(), sparsity=0.5, distribution="uniform")
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert protected_weights(again) == WHY
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    assert protected_weights(compiled) == {f"_orig_mod.{name}": why for name, why in WHY.items()}


def _forget_roles(model: nn.Module) -> None:
    """Make the records those of an earlier release, which had no roles."""
    for module in model.modules():
        if records := records_on(module):
            old = {}
            for name, record in records.items():
                site = copy.copy(record.site)
                vars(site).pop("role")
                old[name] = replace(record, site=site)
            set_records(module, old)


def test_records_of_an_earlier_release_load_and_train(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = sparsify(Transformer(), sparsity=0.5, distribution="uniform")
    reference = copy.deepcopy(model)
    before = _train(reference).state_dict()
    _forget_roles(model)
    model = pickle.loads(pickle.dumps(model))
    assert protected_weights(model).keys() == {"head.weight"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with caplog.at_level("WARNING"):
        trainer = SRigL(model, optimizer, total_steps=40, update_every=4)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("it is not known what the neurons of embed.weight, condition.weight, qkv.weight")
    model.load_state_dict(reference.state_dict())
    trainer.load_state_dict(before)  # a checkpoint does not hold roles
    assert trainer.steps == 12


@pytest.mark.parametrize("options", [{"protect": "output"}, {"protect": "none"}, {"ablation": None}])
def test_what_is_not_known_is_no_matter_where_nothing_is_asked(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = sparsify(Transformer(), sparsity=0.5, distribution="uniform")
    _forget_roles(model)
    with caplog.at_level("WARNING"):
        SRigL(model, torch.optim.AdamW(model.parameters()), total_steps=40, **options)
    assert not caplog.text
