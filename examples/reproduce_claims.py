"""Do the claims of SRigL's paper hold on small networks and real data? Trains, compares and draws.

``.venv/bin/python examples/reproduce_claims.py`` runs everything, about an hour and a half of one core, and can be
stopped and started again at will: each finished run is a row of a CSV file. ``--figure-only`` makes the figures and
tables from the rows there are.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from claims import report, results, runs
from tqdm import tqdm

OUT = Path("docs/claims")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=runs.TASKS, default=list(runs.TASKS))
    parser.add_argument("--methods", nargs="+", choices=runs.METHODS, default=list(runs.METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, help="of those each task has")
    parser.add_argument("--seeds", type=int, help="at most this many")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="train this much longer or, below 1, shorter")
    parser.add_argument(
        "--out",
        type=Path,
        default=OUT,
        help=f"folder of results.csv and figures; the page of tables is <folder>.md (default: {OUT})",
    )
    parser.add_argument("--figure-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    table = options.out / "results.csv"
    keys = results.plan(options.tasks, options.methods, options.sparsities, options.seeds, options.steps_scale)
    done = {row.key for row in results.read(table)}
    missing = [] if options.figure_only else [key for key in keys if key not in done]
    bar = tqdm(missing, unit="run", initial=len(keys) - len(missing), total=len(keys), disable=not missing)
    for key in bar:
        bar.set_description(f"seed {key.seed} {key.task} {key.method} {key.sparsity:.0%}")
        row = runs.execute(key)
        results.append(table, key, row)
        bar.set_postfix(score=row["score"])

    report.write(results.read(table), options.out)


if __name__ == "__main__":
    main()
