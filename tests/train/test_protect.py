import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from srigl_fx import sparsify
from srigl_fx.errors import TrainerError
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
    assert protected_weights(model, "output") == {"left.weight", "right.weight", "extra"}


def test_from_a_graph_inside_a_wrapper() -> None:
    model = sparsify(fx.symbolic_trace(TwoHeads()), sparsity=0.5, distribution="uniform")
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    expected = {"_orig_mod.left.weight", "_orig_mod.right.weight", "_orig_mod.extra"}
    assert protected_weights(compiled, "output") == expected


def test_a_dense_layer_before_the_output_protects_nothing() -> None:
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)))
    sparsify(model, sparsity=0.5, rules={"2": None})
    assert protected_weights(model, "output") == {"2.weight"}  # which has no mask


def test_from_example_inputs() -> None:
    model = sparsify(TwoHeads(), sparsity=0.5, distribution="uniform", example_inputs=(torch.randn(2, 12),))
    assert protected_weights(model, "output") == {"left.weight", "right.weight", "extra"}


def test_the_last_in_registration_order_otherwise() -> None:
    model = sparsify(TwoHeads(), sparsity=0.5, distribution="uniform")
    assert protected_weights(model, "output") == {"body.weight"}


def test_a_tied_weight_stands_where_it_is_used_last() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 16), nn.Linear(16, 16))
    model[3].weight = model[0].weight
    sparsify(model, sparsity=0.5, distribution="uniform")
    assert protected_weights(model, "output") == {"0.weight"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["left"], {"left.weight"}),
        (["left.weight", "body"], {"left.weight", "body.weight"}),
        (["*t"], {"left.weight", "right.weight", "body.weight"}),
        (["[lr]*"], {"left.weight", "right.weight"}),
        ([], set()),
    ],
)
def test_by_name(patterns: list[str], expected: set[str]) -> None:
    assert protected_weights(sparsify(TwoHeads(), sparsity=0.5), patterns) == expected


def test_names_survive_wrappers() -> None:
    wrapped = nn.ModuleDict({"module": sparsify(TwoHeads(), sparsity=0.5)})
    assert protected_weights(wrapped, ["left"]) == protected_weights(wrapped, ["module.left"]) == {"module.left.weight"}


def test_a_name_that_matches_nothing() -> None:
    with pytest.raises(TrainerError, match="'lef' matches no weight"):
        protected_weights(sparsify(TwoHeads(), sparsity=0.5), ["left", "lef"])
