"""What ablation buys: channels, parameters, FLOPs and latency of real networks before and after dead channels go.

ResNet-50, ViT-B/16 and BERT-base with random weights, 90 % sparse, and 30 % of the neurons of every hidden layer
ablated at random. Run ``python benchmarks/ablation.py`` (needs transformers); it prints Markdown tables and writes them
to results/ablation.md.
"""

import os
import platform
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import srigl_fx as sx
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.pipelines import LOWERING
from srigl_fx.passes.removal import Removals
from srigl_fx.passes.remove_dead import RemoveDead
from srigl_fx.runtime.costs.autotune import measure

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SPARSITY, ABLATED = 0.9, 0.3


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cases() -> dict[str, tuple[nn.Module, Callable[[], Any], str]]:
    """The models, their inputs, and the layer that feeds the outputs."""
    import transformers as hf

    return {
        "ResNet-50, 224 px": (
            hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000)),
            lambda: ((), {"pixel_values": torch.randn(1, 3, 224, 224)}),
            "classifier.1",
        ),
        "ViT-B/16, 224 px": (
            hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000)),
            lambda: ((), {"pixel_values": torch.randn(1, 3, 224, 224)}),
            "classifier",
        ),
        "BERT-base, 128 tokens": (
            hf.BertForSequenceClassification(hf.BertConfig()),
            lambda: (
                (),
                {
                    "input_ids": torch.randint(0, 30000, (1, 128)),
                    "attention_mask": torch.ones(1, 128, dtype=torch.long),
                },
            ),
            "classifier",
        ),
    }


def randomise(model: nn.Module, inputs: Any) -> None:
    """Biases, scales and running statistics as training leaves them: not zero, not one, fit for the activations."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = None  # a plain average over the batches seen
        if norms:
            model.train()
            args, kwargs = inputs
            model(*args, **{name: value.repeat(4, 1, 1, 1) for name, value in kwargs.items()})
    model.eval()


def ablate(model: nn.Module, head: str) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for handle in sparse_weights(model):
            site = handle.record.site
            if handle.fqn.startswith(head):
                continue
            dead = torch.zeros(site.matrix_shape[0], dtype=torch.bool)
            for block in site.blocks:
                rows = torch.randperm(block.rows, generator=generator)[: int(ABLATED * block.rows)]
                dead[block.start + rows] = True
            handle.mask.copy_(site.from_matrix(site.to_matrix(handle.mask) & ~dead[:, None]))
            handle.weight.mul_(handle.mask)


def row(name: str, model: nn.Module, inputs: Any) -> tuple[str, str, list[str]]:
    kept_out = tuple(step for step in LOWERING if not isinstance(step, RemoveDead))
    forms = {
        "dense": sx.lower(model, inputs, min_speedup=float("inf"), passes=kept_out),
        "dense, removed": sx.lower(model, inputs, min_speedup=float("inf")),
        "condensed": sx.lower(model, inputs, min_speedup=0, passes=kept_out),
        "condensed, removed": sx.lower(model, inputs, min_speedup=0),
    }
    removals: Removals = forms["condensed, removed"].report.removals[0]
    args, kwargs = inputs
    with torch.no_grad():
        calls = {form: (lambda module=module: module(*args, **kwargs)) for form, module in forms.items()}
        times = measure(calls, rounds=9, seconds=8)
        expected = model(*args, **kwargs)[0].double()
        error = (forms["dense, removed"](*args, **kwargs)[0] - expected).abs().max() / expected.abs().max()
    weights = removals.weights
    ablated = sum(weight.ablated for weight in weights)
    removed = sum(weight.rows_removed for weight in weights)
    columns = sum(weight.columns_removed for weight in weights)
    before, after = (
        sum(one.bytes_after for one in forms[form].report.layers) for form in ("condensed", "condensed, removed")
    )
    counts = (
        f"| {name} | {removals.channels[0]:,} | {ablated:,} | {removed:,} | {columns:,} of "
        f"{sum(weight.columns for weight in weights):,} | {removals.parameters[0] / 1e6:.1f} M -> "
        f"{removals.parameters[1] / 1e6:.1f} M | {removals.flops[0] / 1e9:.2f} G -> {removals.flops[1] / 1e9:.2f} G | "
        f"{before / 2**20:.1f} -> {after / 2**20:.1f} MiB | {float(error):.1e} |"
    )
    speed = f"| {name} | " + " | ".join(f"{times[form] * 1e3:.1f}" for form in forms)
    speed += f" | {times['dense'] / times['dense, removed']:.2f}x"
    speed += f" | {times['condensed'] / times['condensed, removed']:.2f}x |"
    reasons: Counter[str] = Counter()
    for weight in weights:
        for why, count in weight.kept.items():
            reasons[re.sub(r",? (before|that|in|of) \S+( reads.*)?$", "", why)] += count
    return (
        counts,
        speed,
        [f"- {name}: {count:,} ablated channels stay because {why}" for why, count in reasons.most_common()],
    )


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, (model, inputs, head) in cases().items():
        example = inputs()
        randomise(model, example)
        sx.sparsify(model, sparsity=SPARSITY, rules={head: None})
        ablate(model, head)
        rows.append(row(name, model, example))
    lines = [
        "# What ablation buys",
        "",
        f"{SPARSITY:.0%} sparse, {ABLATED:.0%} of the neurons of every hidden layer ablated at random; {cpu_name()}, "
        f"one thread, torch {torch.__version__}. `python benchmarks/ablation.py`",
        "",
        "| model | channels | ablated | removed from producers | removed from consumers | numbers stored densely | "
        "FLOPs of dense compute | condensed weights | largest difference |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(counts for counts, _, _ in rows),
        "",
        "Milliseconds a call, batch 1, median of nine interleaved rounds:",
        "",
        "| model | dense | dense, removed | condensed | condensed, removed | dense gains | condensed gains |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(speed for _, speed, _ in rows),
        "",
        "Why ablated channels stay in the graph (the operators skip their rows all the same):",
        "",
        *(line for _, _, reasons in rows for line in reasons),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    (Path(__file__).parent / "results" / "ablation.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
