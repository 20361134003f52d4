"""Do the optimizers of pytorch-optimizer and timm train under a trainer as with masks applied by hand?

Run ``python benchmarks/optimizers.py``; it writes results/optimizers.md. Each optimizer trains a network with a square
sparse layer twice: under RigL, and with gradients and weights masked after each step by hand, the masks of the first
run, and grown weights' state begun anew. The weights must be equal in the end. Where they are not, it is done once more
with all state off the masks begun anew after each step by hand: some optimizers use it there.
"""

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import srigl_fx as sx
from srigl_fx.masks.optimizer_state import OptimizerState

RESULTS = Path(__file__).parent / "results"
STEPS, EVERY = 24, 5
Make = Callable[[nn.Module], Optimizer]


def makers() -> Iterator[tuple[str, Make]]:
    """Every optimizer of the libraries that are installed, by name."""
    pytorch_optimizer: Any = importlib.import_module("pytorch_optimizer")
    timm: Any = importlib.import_module("timm.optim")
    extra: dict[str, dict[str, Any]] = {"bsam": {"num_data": 16}, "ranger21": {"num_iterations": STEPS}}

    def of_pytorch_optimizer(name: str) -> Make:
        def make(model: nn.Module) -> Optimizer:
            kind = pytorch_optimizer.load_optimizer(name)
            options = {"lr": 1e-3, **extra.get(name, {})}
            if name in ("adalomo", "adammini", "lomo"):
                return kind(model, **options)  # type: ignore[no-any-return]
            try:
                return kind(list(model.parameters()), **options)  # type: ignore[no-any-return]
            except Exception:
                matrices = [p for p in model.parameters() if p.ndim == 2]
                others = [p for p in model.parameters() if p.ndim != 2]
                groups = [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]
                return kind(groups, **options)  # type: ignore[no-any-return]

        return make

    def of_timm(name: str) -> Make:
        return lambda model: timm.create_optimizer_v2(list(model.parameters()), opt=name, lr=1e-3)

    for name in pytorch_optimizer.get_supported_optimizers():
        yield f"pytorch-optimizer {name}", of_pytorch_optimizer(name)
    for name in timm.list_optimizers():
        if not name.startswith(("bnb", "fused")):  # need a GPU
            yield f"timm {name}", of_timm(name)


def build() -> nn.Module:
    """A network whose sparse layer is square."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    return sx.sparsify(layers, sparsity=0.75, rules={"0": None, "4": None}, structure="unstructured")


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The data of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 16, generator=generator), torch.randint(4, (16,), generator=generator)


def one_step(model: nn.Module, optimizer: Any, step: int, mask: Tensor | None) -> None:
    """An ordinary step; where a mask is given, the gradient of the sparse layer is masked by hand."""

    def closure(again: bool = True) -> Tensor:
        with torch.enable_grad():
            optimizer.zero_grad()
            x, y = batch(step)
            loss = functional.cross_entropy(model(x), y)
            loss.backward(create_graph=second_order)
            if mask is not None:
                weight = model.get_parameter("2.weight")
                assert weight.grad is not None
                weight.grad = weight.grad * mask
        return loss

    second_order = any(word in type(optimizer).__name__.lower() for word in ("hessian", "sophia"))
    closure()
    torch.manual_seed(step)
    if type(optimizer).__name__ in ("AliG", "BSAM"):
        optimizer.step(closure)
    else:
        optimizer.step()
    if second_order:
        optimizer.zero_grad(set_to_none=True)


def compare(make: Make) -> tuple[str, str]:
    """What is kept for single weights, and how the two runs compare."""
    named, outcome = train(make, always_anew=False)
    if outcome.startswith("apart") and train(make, always_anew=True)[1] == "equal":
        outcome = f"equal if state off the masks begins anew after each step by hand, too; else {outcome}"
    return named, outcome


def train(make: Make, *, always_anew: bool) -> tuple[str, str]:
    """The same; state off the masks begins anew by hand after each step, or where a mask changes alone."""
    model = build()
    twin = copy.deepcopy(model)
    try:
        optimizer, plain = make(model), make(twin)
    except Exception as error:
        return "", f"not made: {type(error).__name__}"
    try:
        sx.RigL(model, optimizer, total_steps=10 * STEPS, update_every=EVERY, drop_fraction=0.5)
    except sx.SriglError as error:
        reason = str(error).partition(": ")[2].partition(". ")[0]
        return "", f"refused: {reason}"
    weight, mask = twin.get_parameter("2.weight"), twin.get_buffer("2.weight_mask").clone()
    live = model.get_buffer("2.weight_mask")
    for step in range(STEPS):
        try:
            one_step(twin, plain, step, mask)
        except Exception as error:
            return "", f"does not step by itself: {type(error).__name__}"
        one_step(model, optimizer, step, None)
        with torch.no_grad():
            staying = mask & live
            weight.copy_(torch.where(staying, weight, 0.0))
            if always_anew or not torch.equal(mask, live):
                for state in OptimizerState.of(plain).elementwise(weight):
                    state.tensor[~staying] = state.fresh
        mask = live.clone()
    kept = OptimizerState.of(optimizer).elementwise(model.get_parameter("2.weight"))
    named = ", ".join(state.name + (f" ({state.fresh:g})" if state.fresh else "") for state in kept)
    try:
        sx.verify(model, optimizer)
    except sx.SriglError as error:
        return named, f"verify: {error}"
    apart = max(float((a - b).abs().max()) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    return named, "equal" if apart < 1e-5 else f"apart by {apart:.2g}"


def main() -> None:
    """Compare all and write the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [
        f"pytorch-optimizer {version('pytorch-optimizer')}, timm {version('timm')}, torch {torch.__version__}.",
        "",
        "| optimizer | state of single weights (and what it begins with, where not 0) | against masks by hand |",
        "| --- | --- | --- |",
    ]
    for name, make in makers():
        named, outcome = compare(make)
        lines.append(f"| {name} | {named} | {outcome} |")
        print(lines[-1], flush=True)
    (RESULTS / "optimizers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
