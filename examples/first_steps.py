"""Should a weight that grows count its own optimizer steps? With and without, on the three networks of the claims page.

Trains RigL and SRigL at 90 % sparsity with AdamW, and the two small networks with RMSprop and NAdam too, whose first
steps of grown weights are the largest. There a third treatment also divides AdamW's learning rate of each masked weight
by the square root of its density. Run it with ``.venv/bin/python examples/first_steps.py``; it takes some 40 minutes of
one core, needs scikit-learn, and can be stopped and started again at will: each finished run is a row of a CSV file,
and ``docs/methods.md`` shows the table. ``--table-only`` makes it from the rows there are.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from claims import report, rows, runs
from torch import nn
from torch.nn import functional
from tqdm import tqdm

import srigl_fx as sx
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train.step_counts import StepCount

OUT = Path("docs/claims/first_steps.csv")
PAGE = Path("docs/methods.md")
COLUMNS = ("task", "method", "optimizer", "treatment", "seed", "score", "cpu_seconds")
SPARSITY = 0.9

OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "AdamW": lambda groups, rate: torch.optim.AdamW(groups, lr=rate, weight_decay=0.05, fused=True),
    "RMSprop": lambda groups, rate: torch.optim.RMSprop(groups, lr=rate),
    "NAdam": lambda groups, rate: torch.optim.NAdam(groups, lr=rate, weight_decay=0.05, decoupled_weight_decay=True),
}
METHODS = ("RigL", "SRigL")


@dataclass(frozen=True)
class Treatment:
    """What is compared.

    Attributes:
        title: What people read.
        step_count: Whose steps a grown weight counts.
        scaled: Whether the learning rate of masked weights is divided by the square root of their density.
    """

    title: str
    step_count: StepCount
    scaled: bool = False


TREATMENTS = {
    "tensor": Treatment('step_count="tensor"', "tensor"),
    "weight": Treatment('step_count="weight"', "weight"),
    "weight, scaled": Treatment('step_count="weight", scaled learning rate', "weight", scaled=True),
}


@dataclass(frozen=True)
class Key:
    """What tells one run from another."""

    task: str
    method: str
    optimizer: str
    treatment: str
    seed: int


def plan(tasks: Iterable[str], optimizers: Iterable[str], seeds: int | None) -> list[Key]:
    """The runs to do: those with AdamW first, seed by seed; the GPT, whose runs are long, has no others."""
    tasks = tuple(tasks)
    return [
        Key(task, method, optimizer, treatment, seed)
        for optimizer in optimizers
        for seed in range(max(runs.TASKS[task].seeds for task in tasks) if seeds is None else seeds)
        for task in tasks
        for method in METHODS
        for treatment in TREATMENTS
        if seed < runs.TASKS[task].seeds
        if optimizer == "AdamW" or task != "gpt"
        if not TREATMENTS[treatment].scaled or (optimizer == "AdamW" and task != "gpt")
    ]


def execute(key: Key) -> dict[str, object]:
    """Train and test one network; the other columns of a row by name."""
    recipe, treatment = runs.TASKS[key.task], TREATMENTS[key.treatment]
    split = recipe.split()
    torch.manual_seed(key.seed)
    model = recipe.build()
    sx.sparsify(
        model,
        sparsity=SPARSITY,
        structure="constant_fan_in" if key.method == "SRigL" else "unstructured",
        rules=dict.fromkeys(recipe.dense, None),
        mask_init="random",
        weight_init="torch",
        seed=key.seed,
    )
    groups = density_scaled(model, recipe.learning_rate) if treatment.scaled else list(model.parameters())
    optimizer = OPTIMIZERS[key.optimizer](groups, recipe.learning_rate)
    method: Any = getattr(sx, key.method)
    method(
        model, optimizer, total_steps=recipe.steps, update_every=recipe.update_every, step_count=treatment.step_count
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=recipe.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(key.seed)
    started = time.process_time()
    for _ in range(recipe.steps):
        inputs, targets = recipe.draw(split, recipe.batch, generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - started
    return {"score": round(runs.evaluate(model, split, recipe), 4), "cpu_seconds": round(seconds, 1)}


def density_scaled(model: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Groups of parameters in which a masked weight of density d has the learning rate ``rate / sqrt(d)``."""
    masked = {id(handle.weight): handle for handle in sparse_weights(model)}
    groups: list[dict[str, Any]] = [
        {"params": [one for one in model.parameters() if id(one) not in masked], "lr": rate}
    ]
    for handle in masked.values():
        density = sum(handle.record.budgets) / handle.weight.numel()
        groups.append({"params": [handle.weight], "lr": rate / math.sqrt(density)})
    return groups


def read(path: Path) -> dict[Key, float]:
    """The scores of the finished runs in ``path``, without a last line that was cut off; none where it is missing.

    Raises:
        ValueError: The file is damaged; the message names the line.
    """
    return rows.read(path, COLUMNS, _parsed)


def _parsed(row: dict[str, str]) -> tuple[Key, float]:
    key = Key(row["task"], row["method"], row["optimizer"], row["treatment"], int(row["seed"]))
    known: dict[str, Collection[str]] = {
        "task": runs.TASKS,
        "method": METHODS,
        "optimizer": OPTIMIZERS,
        "treatment": TREATMENTS,
    }
    for name, choices in known.items():
        if row[name] not in choices:
            raise ValueError(f"no {name} is called {row[name]!r}")
    return key, float(row["score"])


def append(path: Path, key: Key, values: dict[str, object]) -> None:
    """Write the row of a finished run in one piece, and see it on the disk; a line cut off before is removed."""
    rows.append(path, COLUMNS, {**asdict(key), **values})


def table(scores: dict[Key, float]) -> str:
    """A Markdown table: scores, and what each treatment gains over ``step_count="tensor"`` within each seed."""
    header = "| task | optimizer | method | treatment | score | gain | seeds | |\n|---|---|---|---|---|---|---|---|"
    lines = [
        _row(scores, optimizer, task, method, treatment)
        for optimizer in OPTIMIZERS
        for task in runs.TASKS
        for method in METHODS
        for treatment in TREATMENTS
    ]
    return "\n".join([header, *(line for line in lines if line)])


def _row(scores: dict[Key, float], optimizer: str, task: str, method: str, treatment: str) -> str:
    """A line of the table; empty where nothing was run."""

    def by_seed(treatment: str) -> dict[int, float]:
        wanted = (task, method, optimizer, treatment)
        return {key.seed: score for key, score in scores.items() if astuple(key)[:-1] == wanted}

    found, base, recipe = by_seed(treatment), by_seed("tensor"), runs.TASKS[task]
    if not found:
        return ""
    sign, digits = (-1, 3) if recipe.bits else (1, 2)
    gains = [sign * (found[seed] - base[seed]) for seed in found.keys() & base] if treatment != "tensor" else []
    cells = [
        recipe.title + (", bits" if recipe.bits else ", %"),
        optimizer,
        method,
        TREATMENTS[treatment].title,
        _shown(list(found.values()), digits),
        _shown(gains, digits) if gains else "",
        str(len(found)),
        _verdict(gains),
    ]
    return "| " + " | ".join(cells) + " |"


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _verdict(gains: Sequence[float]) -> str:
    """Whether the mean gain is more than two standard errors from nothing."""
    if not gains or abs(mean := statistics.fmean(gains)) <= 2 * _error(gains):
        return ""
    return "better" if mean > 0 else "worse"


def _shown(values: Sequence[float], digits: int) -> str:
    mean = round(statistics.fmean(values), digits) + 0.0  # no minus before zero
    return f"{mean:.{digits}f}" + (f" ± {_error(values):.{digits}f}" if len(values) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=runs.TASKS, default=list(runs.TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, help="at most this many")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the CSV file (default: {OUT})")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    done = read(options.out)
    missing = [key for key in plan(options.tasks, options.optimizers, options.seeds) if key not in done]
    for key in tqdm([] if options.table_only else missing, disable=options.table_only):
        append(options.out, key, execute(key))
    made = table(read(options.out))
    if options.out == OUT and PAGE.exists():
        PAGE.write_text(report.fill(PAGE.read_text(encoding="utf-8"), {"first_steps": made}), encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
