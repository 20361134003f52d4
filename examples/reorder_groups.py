"""What does it save to put similar neurons next to each other, before they share their inputs?

Trains the dense networks of ``reproduce_claims.py`` on digits, prunes them once by magnitude with groups of 4 and 8, in
the order in which training left their neurons and after ``reorder_neurons``, and tests them without training on. Run
it with ``.venv/bin/python examples/reorder_groups.py``; it takes some five minutes of one core, needs scikit-learn, and
can be stopped and started again at will: each row of a CSV file is a pruned network, and ``docs/methods.md`` shows the
table. ``--table-only`` makes it from the rows there are.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from claims import analysis, report, rows, runs
from torch import nn
from tqdm import tqdm

import srigl_fx as sx
from srigl_fx.reordering import reorder_neurons

OUT = Path("docs/claims/reordering.csv")
PAGE = Path("docs/methods.md")
COLUMNS = ("task", "seed", "sparsity", "group_size", "order", "kept", "score")
TASKS = ("cnn", "vit")
SPARSITIES = (0.5, 0.7, 0.8)
GROUP_SIZES = (1, 4, 8)
ORDERS = ("as trained", "similar")


@dataclass(frozen=True)
class Key:
    """What tells one pruned network from another."""

    task: str
    seed: int
    sparsity: float
    group_size: int
    order: str


def plan(tasks: Sequence[str], seeds: int | None) -> list[Key]:
    """The networks to prune, seed by seed; neurons by themselves need no order."""
    return [
        Key(task, seed, sparsity, size, order)
        for seed in range(5 if seeds is None else seeds)
        for task in tasks
        for sparsity in SPARSITIES
        for size in GROUP_SIZES
        for order in (ORDERS if size > 1 else ORDERS[:1])
    ]


def prune(model: nn.Module, key: Key) -> dict[str, object]:
    """Prune a copy of a trained network and test it; the other columns of its row."""
    task = runs.TASKS[key.task]
    split, pruned = task.split(), copy.deepcopy(model)
    if key.order == "similar":
        reorder_neurons(pruned, (split.test_x[:8],), group_size=key.group_size, sparsity=key.sparsity)
    whole = sum(float(p.detach().abs().sum()) for p in _sparse(pruned, task.dense))
    sx.sparsify(
        pruned,
        sparsity=key.sparsity,
        distribution="uniform",
        rules=dict.fromkeys((*task.dense, "head"), None),
        group_size=key.group_size,
    )
    kept = sum(float(p.detach().abs().sum()) for p in _sparse(pruned, task.dense))
    measure_again(pruned, split.train_x)
    return {"kept": round(kept / whole, 4), "score": round(runs.evaluate(pruned, split, task), 4)}


@torch.no_grad()
def measure_again(model: nn.Module, images: torch.Tensor) -> None:
    """Give batch normalisations the statistics of the pruned network; those of the whole one hide what is left."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    if norms:
        for part in torch.split(images, runs.TEST_BATCH):
            model(part)


def _sparse(model: nn.Module, dense: Sequence[str]) -> list[nn.Parameter]:
    """The weights that are pruned."""
    names = (*dense, "head", "position")
    return [p for name, p in model.named_parameters() if p.dim() > 1 and not name.startswith(names)]


def read(path: Path) -> dict[Key, tuple[float, float]]:
    """The kept share and the score of the networks in ``path``, without a last line that was cut off.

    Raises:
        ValueError: The file is damaged; the message names the line.
    """
    return rows.read(path, COLUMNS, _parsed)


def _parsed(row: dict[str, str]) -> tuple[Key, tuple[float, float]]:
    if row["task"] not in TASKS:
        raise ValueError(f"no task is called {row['task']!r}")
    if row["order"] not in ORDERS:
        raise ValueError(f"no order is called {row['order']!r}")
    key = Key(row["task"], int(row["seed"]), float(row["sparsity"]), int(row["group_size"]), row["order"])
    return key, (float(row["kept"]), float(row["score"]))


def table(found: dict[Key, tuple[float, float]]) -> str:
    """A Markdown table: what is kept, and the score without any training after pruning, by size and order."""
    lines = []
    for task in TASKS:
        for sparsity in SPARSITIES:
            for size in GROUP_SIZES:
                for order in ORDERS:
                    values = [
                        value
                        for key, value in found.items()
                        if (key.task, key.sparsity, key.group_size, key.order) == (task, sparsity, size, order)
                    ]
                    if values:
                        kept, score = (analysis.estimate(column) for column in zip(*values, strict=True))
                        lines.append(
                            [
                                runs.TASKS[task].title,
                                f"{sparsity:.0%}",
                                str(size),
                                order if size > 1 else "",
                                report.shown(kept, 100, 1),
                                report.shown(score, 1, 1),
                            ]
                        )
    return report.table(["network", "sparsity", "group size", "order", "kept magnitude, %", "accuracy, %"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and prune what is missing, then make the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, help="at most this many")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="train this much longer or, below 1, shorter")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the CSV file (default: {OUT})")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    done = read(options.out)
    missing = [key for key in plan(options.tasks, options.seeds) if key not in done]
    trained: tuple[tuple[str, int], nn.Module] | None = None
    for key in tqdm([] if options.table_only else missing, disable=options.table_only):
        if trained is None or trained[0] != (key.task, key.seed):
            steps = max(4, round(runs.TASKS[key.task].steps * options.steps_scale))
            trained = (key.task, key.seed), runs.train(runs.Key(key.seed, key.task, "dense", 0.0, steps)).model
        rows.append(options.out, COLUMNS, {**asdict(key), **prune(trained[1], key)})
    made = table(read(options.out))
    if options.out == OUT and PAGE.exists():
        PAGE.write_text(report.fill(PAGE.read_text(encoding="utf-8"), {"reordering": made}), encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
