"""Our kernels against all peers and against the machine's ceilings, side by side in one run.

Run ``python benchmarks/peers.py``; it prints every cell, losses included, and writes CSV, Markdown and plots to
results/peers_*. DeepSparse is measured where ``--setup-deepsparse`` has made its environment. ``--only`` runs one part
alone; each part has files of its own, and the table of bars is made from all that are there.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

SECTIONS = ("ceilings", "linear", "small", "conv", "bf16", "int8", "int8_conv", "threads", "train", "models")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=SECTIONS, nargs="+", help="the parts to run; all but models by default")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contender (default 1)")
    parser.add_argument("--shapes", nargs="+", metavar="INxOUT", help="linear layers, such as 3072x768")
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes")
    parser.add_argument("--sparsities", nargs="+", type=float, help="fractions removed, such as 0.9")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="these alone; a wrong name lists them")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each contender and cell (default 0.3)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender in a cell (default 7)")
    parser.add_argument("--quick", action="store_true", help="short turns and small cases, to see that all runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the files")
    parser.add_argument("--peers", type=Path, help="folder of DeepSparse's environment (default: the cache)")
    parser.add_argument("--setup-deepsparse", action="store_true", help="make DeepSparse's environment, and stop")
    options = parser.parse_args(arguments)
    options.command = " ".join(["python benchmarks/peers.py", *_without_folders(arguments)])
    return options


def _without_folders(arguments: Sequence[str]) -> list[str]:
    """The command line as it is printed in the results: folders of one machine say nothing to readers."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, given, _ = argument.partition("=")
        if skip or name in ("--out", "--peers"):
            skip = not skip and not given
        else:
            kept.append(shlex.quote(argument))
    return kept


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    # Read once, when the libraries are loaded.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, str(options.threads))
    from harness.run import run, setup

    if options.setup_deepsparse:
        setup(options)
    else:
        run(options)


if __name__ == "__main__":
    main()
