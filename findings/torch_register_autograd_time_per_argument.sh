#!/usr/bin/env bash
# torch.library.register_autograd: with a setup_context, a call takes time that grows with the square of the arguments.
#
# Expected: what recording a gradient adds to a call of a custom operator grows with the number of its arguments at most;
# arguments that are left at their defaults cost next to nothing.
# Seen: twice as many optional arguments take about four times as long, 0.1 ms at 15 and 1.1 ms at 60. For setup_context the
# arguments are filled up from the schema, and `schema.arguments`, which makes all of them anew as objects of Python, is
# asked again for each one. Without a setup_context, the same operator takes the same time whatever its arguments are.
#
# Versions: torch 2.13.0, Python 3.11. Seen on 2026-11-30.
# Output seen:
#     15 arguments: 78 us more than none, 30: 268, 60: 1052
#     without setup_context, 60: 12 us more than none
# Exit status 0 while four times as many take more than seven times as long, 1 once that has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys
import time

import torch

library = torch.library.Library("probe", "DEF")


def made(count, with_context=True):
    """An operator with so many optional integers."""
    name = f"op{count}{'' if with_context else 'bare'}"
    library.define(f"{name}(Tensor x{''.join(f', int a{i}=0' for i in range(count))}) -> Tensor")
    library.impl(name, lambda x, *given: x + 1, "CPU")
    context = {"setup_context": lambda ctx, inputs, output: None} if with_context else {}
    backward = lambda ctx, grad: (grad, *[None] * count)
    torch.library.register_autograd(f"probe::{name}", backward, lib=library, **context)
    return getattr(torch.ops.probe, name).default


operators = {(count, with_context): made(count, with_context) for count in (0, 15, 30, 60) for with_context in (True, False)}
seconds, x = dict.fromkeys(operators, 1.0), torch.ones(4, requires_grad=True)
for _ in range(60):  # in turns, the fastest of each: none of the integers is given
    for key, operator in operators.items():
        start = time.perf_counter()
        for _ in range(30):
            operator(x)
        seconds[key] = min(seconds[key], (time.perf_counter() - start) / 30)
more = {count: 1e6 * (seconds[count, True] - seconds[0, True]) for count in (15, 30, 60)}
bare = 1e6 * (seconds[60, False] - seconds[0, False])
print(f"15 arguments: {more[15]:.0f} us more than none, 30: {more[30]:.0f}, 60: {more[60]:.0f}")
print(f"without setup_context, 60: {bare:.0f} us more than none")
as_described = more[60] > 7 * more[15] and bare < more[60] / 5
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
