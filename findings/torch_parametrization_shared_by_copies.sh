#!/usr/bin/env bash
# torch.nn.utils.parametrize: removing a parametrisation from a module breaks its deep copies.
#
# Expected: `copy.deepcopy` of a parametrised layer is independent of it.
# Seen: original and copy share the class that `register_parametrization` made, and `remove_parametrizations` deletes the
# property from that class: the copy has a parametrisation and no attribute `weight`. Averaged copies of a model, which
# are deep copies, are broken so when the model's own parametrisation is removed.
#
# Versions: torch 2.13.0, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     one class: True
#     the copy, before the original's is removed: runs
#     the copy, afterwards: AttributeError 'ParametrizedLinear' object has no attribute 'weight'
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import copy
import sys

import torch
from torch import nn
from torch.nn.utils import parametrize


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def runs(layer):
    try:
        layer(torch.ones(1, 3))
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return "runs"


original = nn.Linear(3, 3)
parametrize.register_parametrization(original, "weight", Doubled())
copied = copy.deepcopy(original)
shared, before = type(original) is type(copied), runs(copied)
parametrize.remove_parametrizations(original, "weight")
after = runs(copied)
print("one class:", shared)
print("the copy, before the original's is removed:", before)
print("the copy, afterwards:", after)
as_described = shared and before == "runs" and after.startswith("AttributeError")
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
