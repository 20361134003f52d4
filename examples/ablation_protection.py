"""Which neurons should ablation leave alone? A high threshold on four networks, with and without remedies.

A neuron that writes into a residual stream is no width of its own layer: all later layers read that channel. A factor
of attention (query, key, value) is one of a pair. This script trains a vision transformer written as timm's are, with
plain linear layers, for 60 steps, and the three networks of ``reproduce_claims.py``, all at 90 % sparsity and an
ablation threshold of 0.95, and compares remedies. Run it with ``.venv/bin/python examples/ablation_protection.py``; it
takes some 40 minutes of one core, needs scikit-learn, and can be stopped and started again at will: each finished
run is a row of a CSV file, and ``docs/methods.md`` shows the tables. ``--table-only`` makes them from the rows there
are.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from claims import analysis, report, rows, runs
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import srigl_fx as sx
from srigl_fx.train.dynamic import Layer

OUT = Path("docs/claims/protection.csv")
PAGE = Path("docs/methods.md")
COLUMNS = ("task", "variant", "seed", "score", "active_share", "narrowest", "narrowest_share", "cpu_seconds")
SPARSITY = 0.9


class Attention(nn.Module):
    """Self-attention as timm writes it: one linear layer gives queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to the same."""
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        out: Tensor = self.proj(mixed)
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform each token."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return out


class PlainViT(nn.Module):
    """A vision transformer of two blocks, 192 wide, for 8x8 images that are shown four times as large."""

    def __init__(self, width: int = 192, heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, width, 8, stride=8)
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 8, 8) images to (N, 10) logits."""
        patches = self.patch_embed(functional.interpolate(images, scale_factor=4)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network with the names of the layers in question.

    Attributes:
        recipe: How it is trained, as in ``reproduce_claims.py``.
        writers: Layers that write into a residual stream.
        attention: Layers that give queries, keys or values and that ablation would touch.
        one_cycle: Whether the learning rate follows one cycle and gradients are clipped; else neither.
    """

    recipe: runs.Task
    writers: tuple[str, ...]
    attention: tuple[str, ...] = ()
    one_cycle: bool = True


CASES = {
    "plain vit": Case(
        recipe=runs.Task(
            title="digits, plain vision transformer, 60 steps",
            build=PlainViT,
            split=runs.TASKS["vit"].split,
            draw=runs.draw_images,
            steps=60,
            batch=64,
            learning_rate=1e-3,
            update_every=10,
            gamma=0.95,
            other_gamma=0.3,
            positions={},
        ),
        writers=("patch_embed", "blocks.*.attn.proj", "blocks.*.fc2"),
        attention=("blocks.*.attn.qkv",),
        one_cycle=False,
    ),
    "vit": Case(recipe=runs.TASKS["vit"], writers=("blocks.*.attention.out_proj", "blocks.*.mlp.2")),
    "cnn": Case(recipe=runs.TASKS["cnn"], writers=("blocks.*.conv2", "blocks.*.shortcut.0")),
    "gpt": Case(recipe=runs.TASKS["gpt"], writers=("blocks.*.attention.out_proj", "blocks.*.mlp.2")),
}


class Gradual(sx.SRigL):
    """A remedy that we tried: no update ablates more than a tenth of a layer's neurons."""

    def new_mask(self, layer: Layer) -> Tensor:
        """The mask with a floor under the number of neurons."""
        self.min_neurons = math.ceil(0.9 * int(layer.mask.any(dim=1).sum()))
        return super().new_mask(layer)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One treatment.

    Attributes:
        title: What people read.
        ablation: The threshold of all layers but those below.
        method: The trainer.
        writers: A threshold of their own for the layers that write into a residual stream; 0 protects them.
        attention: The same for queries, keys and values.
        sparse: Whether the network is sparse at all.
    """

    title: str
    ablation: float | None = 0.95
    method: type[sx.SRigL] = sx.SRigL
    writers: float | None = None
    attention: float | None = None
    sparse: bool = True


VARIANTS = {
    "dense": Variant(title="dense", sparse=False),
    "outputs": Variant(title="0.95, outputs protected"),
    "streams": Variant(title="0.95, outputs and residual streams protected", writers=0.0),
    "streams and attention": Variant(
        title="0.95, outputs, residual streams and attention protected", writers=0.0, attention=0.0
    ),
    "gradual": Variant(title="0.95, at most a tenth of a layer an update", method=Gradual),
    "low": Variant(title="0.3, outputs protected", ablation=0.3),
    "none": Variant(title="no ablation", ablation=None),
}


def execute(task: str, variant: str, seed: int) -> dict[str, object]:
    """Train and test one network; the columns of a row by name."""
    case, treatment = CASES[task], VARIANTS[variant]
    recipe = case.recipe
    split = recipe.split()
    torch.manual_seed(seed)
    model = recipe.build()
    decay = 0.05 if case.one_cycle else 0.01
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=decay, fused=True)
    if treatment.sparse:
        _attach(model, optimizer, case, treatment, seed)
    schedule = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1)
        if case.one_cycle
        else None
    )
    generator = torch.Generator().manual_seed(seed)
    started = time.process_time()
    for _ in range(recipe.steps):
        inputs, targets = recipe.draw(split, recipe.batch, generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        if schedule is not None:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    seconds = time.process_time() - started
    sparse = [row for row in sx.summary(model).rows if row.status != "dense"] if treatment.sparse else []
    narrowest = min(sparse, key=lambda row: row.active_neurons / row.neurons, default=None)
    neurons = sum(row.neurons for row in sparse)
    return {
        "score": round(runs.evaluate(model, split, recipe), 4),
        "active_share": round(sum(row.active_neurons for row in sparse) / neurons, 4) if sparse else 1,
        "narrowest": narrowest.name if narrowest else "",
        "narrowest_share": round(narrowest.active_neurons / narrowest.neurons, 4) if narrowest else 1,
        "cpu_seconds": round(seconds, 1),
    }


def _attach(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case, treatment: Variant, seed: int) -> None:
    own: dict[str | type[nn.Module], float | sx.LayerSpec | None] = dict.fromkeys(case.recipe.dense, None)
    for names, threshold in ((case.writers, treatment.writers), (case.attention, treatment.attention)):
        if threshold is not None:
            own |= {name: sx.LayerSpec(ablation=threshold) for name in names}
    sx.sparsify(
        model,
        sparsity=SPARSITY,
        rules=own,
        mask_init="random" if case.one_cycle else "magnitude",
        weight_init="torch" if case.one_cycle else "keep",
        seed=seed,
    )
    treatment.method(
        model,
        optimizer,
        total_steps=case.recipe.steps,
        update_every=case.recipe.update_every,
        ablation=treatment.ablation,
        protect="output",  # what else is protected is named above, whatever the default is
    )


def plan(seeds: int | None) -> list[tuple[str, str, int]]:
    """(task, variant, seed) of every run, seed by seed."""
    found = [
        (seed, task, variant)
        for task, case in CASES.items()
        for seed in range(case.recipe.seeds if seeds is None else min(seeds, case.recipe.seeds))
        for variant, treatment in VARIANTS.items()
        if case.attention or treatment.attention is None or treatment.writers != 0.0
    ]
    order = [*CASES]
    return [
        (task, variant, seed) for seed, task, variant in sorted(found, key=lambda key: (key[0], order.index(key[1])))
    ]


def read(path: Path) -> dict[tuple[str, str, int], dict[str, str]]:
    """The finished runs in ``path``, without a last line that was cut off; none where there is no such file.

    Raises:
        ValueError: The file is damaged; the message names the line.
    """
    return rows.read(path, COLUMNS, _parsed)


def _parsed(row: dict[str, str]) -> tuple[tuple[str, str, int], dict[str, str]]:
    for name, known in (("task", CASES), ("variant", VARIANTS)):
        if row[name] not in known:
            raise ValueError(f"no {name} is called {row[name]!r}")
    for name in ("score", "active_share", "narrowest_share"):
        float(row[name])
    return (row["task"], row["variant"], int(row["seed"])), row


def append(path: Path, row: dict[str, object]) -> None:
    """Write the row of a finished run in one piece, and see it on the disk; a line cut off before is removed."""
    rows.append(path, COLUMNS, row)


def table(path: Path) -> str:
    """One Markdown table a task: score, what is gained over protecting outputs alone, and the neurons that are left."""
    done = read(path)
    return "\n\n".join(
        "\n".join(_lines(task, {(variant, seed): row for (one, variant, seed), row in done.items() if one == task}))
        for task in CASES
    )


def _lines(task: str, done: dict[tuple[str, int], dict[str, str]]) -> Iterator[str]:
    recipe = CASES[task].recipe
    sign, digits = (-1, 3) if recipe.bits else (1, 1)
    unit = "bits per character, less is better" if recipe.bits else "accuracy, %"
    yield f"**{recipe.title}** ({unit})\n"
    yield "| treatment | score | gain over protected outputs alone | active neurons % | narrowest layer | seeds |"
    yield "|---|---|---|---|---|---|"
    for variant, treatment in VARIANTS.items():
        found = {seed: row for (one, seed), row in done.items() if one == variant}
        if not found:
            continue
        gains = [
            sign * (float(row["score"]) - float(done["outputs", seed]["score"]))
            for seed, row in found.items()
            if ("outputs", seed) in done
        ]
        narrow = min(found.values(), key=lambda row: float(row["narrowest_share"]))
        cells = [
            treatment.title,
            _shown(analysis.estimate([float(row["score"]) for row in found.values()]), digits),
            _shown(analysis.estimate(gains), digits) if variant != "outputs" else "",
            f"{100 * statistics.fmean(float(row['active_share']) for row in found.values()):.0f}",
            f"{narrow['narrowest']}: {100 * float(narrow['narrowest_share']):.0f} %" if narrow["narrowest"] else "",
            str(len(found)),
        ]
        yield "| " + " | ".join(cells) + " |"


def _shown(value: analysis.Estimate | None, digits: int) -> str:
    if value is None:
        return "-"
    mean = round(value.mean, digits) + 0.0  # no minus before zero
    return f"{mean:.{digits}f}" + ("" if math.isnan(value.half_width) else f" ± {value.half_width:.{digits}f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, help="at most this many")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the CSV file (default: {OUT})")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    wanted = [key for key in plan(options.seeds) if key[0] in options.tasks and key[1] in options.variants]
    done = read(options.out)
    missing = [] if options.table_only else [key for key in wanted if key not in done]
    for task, variant, seed in tqdm(missing, disable=not missing):
        append(options.out, {"task": task, "variant": variant, "seed": seed, **execute(task, variant, seed)})
    tables = table(options.out)
    if options.out == OUT and PAGE.exists():
        PAGE.write_text(report.fill(PAGE.read_text(encoding="utf-8"), {"protection": tables}), encoding="utf-8")
    print(tables)


if __name__ == "__main__":
    main()
