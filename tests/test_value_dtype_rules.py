"""A dtype of the values for each layer: rules as those of ``sparsify``, and functions."""

from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.comparison import signal_to_noise
from srigl_fx.errors import LoweringError, RuleError
from srigl_fx.lowering.lowered import LoweringReport
from srigl_fx.lowering.pipeline import lower


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.blocks = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).mean(dim=(2, 3))
        y: Tensor = self.head(x + self.blocks(x))
        return y


NAMES = ("stem.weight", "blocks.0.weight", "blocks.2.weight", "head.weight")
X = torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    return mask_by_hand(randomise(Network()), 0.4).eval()


def dtypes(asked: Any, model: nn.Module | None = None, **options: Any) -> tuple[str, ...]:
    report = lower(network() if model is None else model, (X,), min_speedup=0, value_dtype=asked, **options).report
    assert tuple(layer.fqn for layer in report.layers) == NAMES
    return tuple(layer.value_dtype for layer in report.layers)


@pytest.mark.long
@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"": torch.int8}, ("int8", "int8", "int8", "int8")),
        ({"blocks": torch.int8}, ("float32", "int8", "int8", "float32")),
        ({"blocks.*": torch.int8, "blocks.2": torch.float32}, ("float32", "int8", "float32", "float32")),
        ({nn.Linear: torch.int8, "head": torch.bfloat16}, ("float32", "int8", "int8", "bfloat16")),
        ({"head.weight": torch.float16, "*": torch.int8}, ("int8", "int8", "int8", "float16")),
        ({}, ("float32", "float32", "float32", "float32")),
    ],
)
def test_rules(asked: Any, found: tuple[str, ...]) -> None:
    assert dtypes(asked) == found
    assert dtypes(asked, verify="each pass") == found


@pytest.mark.slow
def test_rules_read_as_those_of_sparsify() -> None:
    keys: tuple[Any, ...] = ("blocks.*", "head", nn.Linear, "blocks.2", "*.weight")
    model = sx.sparsify(randomise(Network()), rules={key: 0.1 * (i + 5) for i, key in enumerate(keys)}, strict=True)
    sparsities = {row.name: round(10 * row.sparsity) / 10 for row in sx.summary(model).rows if row.status != "dense"}
    asked = {0.5: torch.int8, 0.6: torch.bfloat16, 0.7: torch.float32, 0.8: torch.float16, 0.9: torch.int8}
    found = dtypes({key: asked[round(0.1 * (i + 5), 1)] for i, key in enumerate(keys)}, model.eval())
    expected = tuple(str(asked[min(asked, key=lambda one: abs(one - sparsities[name]))])[6:] for name in NAMES)
    assert found == expected


@pytest.mark.slow
def test_a_function_is_asked_with_each_modules_name_and_the_module() -> None:
    seen: dict[str, str] = {}

    def choose(name: str, module: nn.Module) -> torch.dtype:
        seen[name] = type(module).__bases__[0].__name__ if "Sparse" in type(module).__name__ else type(module).__name__
        return torch.int8 if isinstance(module, nn.Linear) and module.in_features > 16 else torch.float32

    assert dtypes(choose) == ("float32", "float32", "int8", "float32")
    assert seen == {"stem": "Conv2d", "blocks.0": "Linear", "blocks.2": "Linear", "head": "Linear"}


@pytest.mark.slow
def test_mixed_layers_are_reported_and_verified_together() -> None:
    model = network()
    lowered: Any = lower(model, (X,), min_speedup=0, value_dtype={"": torch.int8, "head": torch.bfloat16})
    report = lowered.report
    assert report.value_dtype == "mixed"
    assert [layer.snr is None for layer in report.layers] == [False, False, False, True]
    assert report.min_snr is not None
    lines = str(report).splitlines()
    for name, dtype in zip(NAMES, ("int8", "int8", "int8", "bfloat16"), strict=True):
        assert dtype in next(line for line in lines if line.startswith(name))
    held = {name: t.dtype for name, t in lowered.named_buffers() if name.endswith("_values")}
    assert held["head.weight_values"] is torch.bfloat16
    assert held["stem.weight_values"] is torch.int8
    with torch.no_grad():
        assert signal_to_noise(model(X), lowered(X)) > 30


@pytest.mark.slow
def test_halves_alone_are_verified_by_their_errors() -> None:
    report = lower(network(), (X,), min_speedup=0, value_dtype={"head": torch.bfloat16}).report
    assert report.min_snr is None
    assert report.tolerance == torch.finfo(torch.bfloat16).eps


@pytest.mark.long
def test_rules_may_name_weights_without_masks() -> None:
    model = mask_by_hand(randomise(Network()), 0.4, skip=("head",)).eval()
    with pytest.raises(RuleError, match="matches no weight of"):
        lower(model, (X,), min_speedup=0, value_dtype={"": torch.int8, "head": torch.float32})
    model = sx.sparsify(randomise(Network()), rules={"head": None}).eval()
    report = lower(model, (X,), min_speedup=0, value_dtype={"": torch.int8, "head": torch.float32}).report
    assert {layer.value_dtype for layer in report.layers} == {"int8"}


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        (
            {"haed": torch.int8},
            RuleError,
            "the rule 'haed' matches no weight of the model; names that come close: head",
        ),
        ({"head": None}, RuleError, r"rule 'head': a value_dtype is torch\.float32, .* or torch\.int8, not None"),
        ({"head": torch.uint8}, RuleError, r"not torch\.uint8"),
        ({3: torch.int8}, RuleError, "rule 3: a key is a module or parameter name, a glob, or a module type"),
        (lambda name, module: None, LoweringError, r"value_dtype gives None for stem \(Conv2d\)"),
        (lambda name: torch.int8, LoweringError, r"value_dtype failed for 'stem' \(TypeError.*a module's name and the"),
        ("int8", LoweringError, "value_dtype must be"),
    ],
)
def test_what_is_refused(asked: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        lower(network(), (X,), value_dtype=asked)


@pytest.mark.slow
def test_prefixes_of_wrappers_do_not_matter() -> None:
    model: Any = network()
    compiled = torch.compile(model, backend="eager")
    report = lower(compiled, (X,), min_speedup=0, value_dtype={"_orig_mod.head": torch.int8}).report  # type: ignore[arg-type]
    assert [layer.value_dtype for layer in report.layers] == ["float32", "float32", "float32", "int8"]


@pytest.mark.long
def test_float16_refuses_a_large_weight_of_its_layer_alone() -> None:
    model = network()
    with torch.no_grad():
        position = model.get_buffer("head.weight_mask").nonzero()[0]
        model.get_parameter("head.weight")[tuple(position)] = 1e5
    assert dtypes({"blocks": torch.float16}, model) == ("float32", "float16", "float16", "float32")
    with pytest.raises(LoweringError, match=r"head\.weight \(5, 16\) holds 1e\+05"):
        dtypes({"head": torch.float16}, model)


@pytest.mark.slow
def test_reports_from_before_layers_had_dtypes_have_one_for_all() -> None:
    report = lower(network(), (X,), min_speedup=0, value_dtype=torch.bfloat16).report
    plain = report.as_dict()
    del plain["min_snr"]
    for layer in (*plain["layers"], *plain["others"]):
        del layer["value_dtype"], layer["snr"]
    again = LoweringReport.from_dict(plain)
    assert again.layers == report.layers
    assert again.tolerance == report.tolerance == 2 * torch.finfo(torch.bfloat16).eps
