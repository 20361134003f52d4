"""Do the claims of SRigL's paper hold on small networks and real data? Trains, compares and draws.

``.venv/bin/python examples/reproduce_claims.py`` runs everything, about two and a half hours of one core, and can be
stopped and started again at will: each finished run is a row of a CSV file. ``--figure-only`` makes the figures and
tables from the rows there are. It has two parts: the methods of the paper (``--only claims``), and what it costs that
neighbouring neurons share their inputs (``--only groups``).
"""

import argparse
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TypeVar

import torch
from claims import group_report, groups, report, results, runs
from tqdm import tqdm

OUT = Path("docs/claims")
PARTS = ("claims", "groups")
K = TypeVar("K")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; default: both")
    parser.add_argument("--tasks", nargs="+", choices=runs.TASKS, default=list(runs.TASKS))
    parser.add_argument("--methods", nargs="+", choices=runs.METHODS, default=list(runs.METHODS), help="of the claims")
    parser.add_argument(
        "--group-sizes", nargs="+", type=int, choices=groups.GROUP_SIZES, default=list(groups.GROUP_SIZES)
    )
    parser.add_argument("--sparsities", nargs="+", type=float, help="of those each task has")
    parser.add_argument("--seeds", type=int, help="at most this many")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="train this much longer or, below 1, shorter")
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        help=f"folder of the results and figures; the pages are <folder>.md and {group_report.PAGE} beside it "
        f"(default: {OUT})",
    )
    parser.add_argument("--figure-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    if "claims" in options.only:
        _claims(options)
    if "groups" in options.only:
        _groups(options)


def _claims(options: argparse.Namespace) -> None:
    table = options.out / "results.csv"
    keys = results.plan(options.tasks, options.methods, options.sparsities, options.seeds, options.steps_scale)
    for key, bar in _missing(keys, {row.key for row in results.read(table)}, options):
        bar.set_description(f"seed {key.seed} {key.task} {key.method} {key.sparsity:.0%}")
        row = runs.execute(key)
        results.append(table, key, row)
        bar.set_postfix(score=row["score"])
    report.write(results.read(table), options.out)


def _groups(options: argparse.Namespace) -> None:
    table = options.out / "groups.csv"
    keys = groups.plan(options.tasks, options.sparsities, options.group_sizes, options.seeds, options.steps_scale)
    for key, bar in _missing(keys, {row.key for row in groups.read(table)}, options):
        bar.set_description(f"seed {key.seed} {key.task} {key.sparsity:.0%} groups of {key.group_size}")
        row = groups.execute(key)
        groups.append(table, key, row)
        bar.set_postfix(score=row["score"])
    group_report.write(groups.read(table), options.out)


def _missing(keys: Sequence[K], done: AbstractSet[K], options: argparse.Namespace) -> Iterator[tuple[K, "tqdm[K]"]]:
    """The runs to do, each with the bar that shows how far it is."""
    missing = [] if options.figure_only else [key for key in keys if key not in done]
    bar = tqdm(missing, unit="run", initial=len(keys) - len(missing), total=len(keys), disable=not missing)
    for key in bar:
        yield key, bar


if __name__ == "__main__":
    main()
