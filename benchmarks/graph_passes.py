"""How long discovery, capture and every graph pass take, and how that grows with the depth of the model.

Run ``python benchmarks/graph_passes.py``; it prints Markdown tables and writes them to results/graph_passes.md. The
models of the last table come from transformers; it is left out where that is not installed.
"""

import importlib.util
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.base import run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.condense import Condense
from srigl_fx.passes.discover import Discover
from srigl_fx.passes.draft import Draft
from srigl_fx.passes.match import MatchWeights
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.select import Select

os.environ.setdefault("HF_HUB_OFFLINE", "1")

DEPTHS = (8, 16, 32, 64)


class Residual(nn.Module):
    """Two convolutions with batch norm around a skip."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.conv2, self.bn2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Functional(nn.Module):
    """A layer that discovery must trace."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(nn.functional.linear(x, self.weight, self.bias))


def transformer(depth: int) -> nn.Module:
    return nn.Sequential(*(nn.TransformerEncoderLayer(16, 4, 64, batch_first=True, dropout=0.0) for _ in range(depth)))


FAMILIES: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "residual CNN": (lambda depth: nn.Sequential(*(Residual() for _ in range(depth))), (2, 16, 8, 8)),
    "transformer": (transformer, (2, 6, 16)),
}


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def ablate(model: nn.Module, fraction: float = 0.3) -> None:
    """Empty a random fraction of the rows of every masked weight whose rows may be ablated."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for handle in sparse_weights(model):
            site = handle.record.site
            dead = torch.zeros(site.matrix_shape[0], dtype=torch.bool)
            for block in site.blocks:
                if block.ablatable:
                    rows = torch.randperm(block.rows, generator=generator)[: int(fraction * block.rows)]
                    dead[block.start + rows] = True
            handle.mask.copy_(site.from_matrix(site.to_matrix(handle.mask) & ~dead[:, None]))
            handle.weight.mul_(handle.mask)


def discovery() -> list[str]:
    lines = ["| 1,000 layers of | seconds |", "|---|---:|"]
    models = {
        "nn.Linear": nn.Sequential(*(nn.Linear(16, 16) for _ in range(1000))),
        "a module of its own with F.linear": nn.Sequential(*(Functional() for _ in range(1000))),
        "500 residual blocks of two convolutions": FAMILIES["residual CNN"][0](500),
        "167 transformer layers of six weights": transformer(167),
    }
    for name, model in models.items():
        start = time.perf_counter()
        run((Discover(),), Draft(model))
        lines.append(f"| {name} | {time.perf_counter() - start:.2f} |")
    return lines


def stages(model: nn.Module, inputs: object) -> dict[str, float]:
    """Seconds of capture and of every pass, rewriting included."""
    seconds = {}
    start = time.perf_counter()
    program = capture(model, inputs)
    seconds["capture"] = time.perf_counter() - start
    for step in (*LOWERING, MatchWeights(), Select(), Condense()):
        start = time.perf_counter()
        program = run((step,), program).subject
        seconds[step.name] = time.perf_counter() - start
    return seconds


def growth() -> list[str]:
    lines = []
    for family, (build, shape) in FAMILIES.items():
        found = {}
        for depth in (4, *DEPTHS):  # the first to warm up
            model = sx.sparsify(build(depth), sparsity=0.5).eval()
            ablate(model)
            found[depth] = stages(model, (torch.randn(shape),))
        names = list(found[DEPTHS[0]])
        lines += [
            f"\nSeconds by depth, {family}:\n",
            "| | " + " | ".join(f"{depth} blocks" for depth in DEPTHS) + " | last doubling |",
        ]
        lines.append("|---|" + "---:|" * (len(DEPTHS) + 1))
        for name in names:
            times = [found[depth][name] for depth in DEPTHS]
            lines.append(f"| {name} | " + " | ".join(f"{t:.3f}" for t in times) + f" | {times[-1] / times[-2]:.1f}x |")
    return lines


def whole_models() -> list[str]:
    if importlib.util.find_spec("transformers") is None:
        return ["\ntransformers is not installed: no times of whole models."]
    import transformers

    cases = {
        "ResNet-50, 224 px": (
            transformers.ResNetForImageClassification(transformers.ResNetConfig()),
            ((), {"pixel_values": torch.randn(1, 3, 224, 224)}),
        ),
        "BERT-base, 128 tokens": (
            transformers.BertForSequenceClassification(transformers.BertConfig()),
            (
                (),
                {
                    "input_ids": torch.randint(0, 30000, (1, 128)),
                    "attention_mask": torch.ones(1, 128, dtype=torch.long),
                },
            ),
        ),
    }
    lines = [
        "\nSeconds of `lower`, verification included:\n",
        "| | capture and all passes | `min_speedup=0` | `min_speedup=1` (measures every layer) |",
    ]
    lines.append("|---|---:|---:|---:|")
    for name, (model, inputs) in cases.items():
        sx.sparsify(model, sparsity=0.9)
        ablate(model.eval())
        cells = [sum(stages(model, inputs).values())]
        for min_speedup in (0.0, 1.0):
            start = time.perf_counter()
            sx.lower(model, inputs, min_speedup=min_speedup)
            cells.append(time.perf_counter() - start)
        lines.append(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    return lines


def main() -> None:
    head = [
        "# Discovery, capture and graph passes: seconds",
        "",
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        "",
    ]
    text = "\n".join([*head, *discovery(), *growth(), *whole_models()]) + "\n"
    print(text)
    target = Path(__file__).parent / "results" / "graph_passes.md"
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
