#!/usr/bin/env bash
# torch.nn.utils.remove_spectral_norm: the layer can no longer load its own state dict.
#
# Expected: a layer whose spectral norm was removed is an ordinary layer, as one whose weight norm was removed is.
# Seen: the hook that spectral_norm registered for loading stays, so `layer.load_state_dict(layer.state_dict())` fails with
# missing keys "weight_orig" and "weight_u".
#
# Versions: torch 2.13.0, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     after remove_weight_norm: loads
#     after remove_spectral_norm: RuntimeError ... Missing key(s) in state_dict: "weight_orig", "weight_u".
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

from torch import nn
from torch.nn import utils


def loads(layer):
    try:
        layer.load_state_dict(layer.state_dict())
    except RuntimeError as error:
        return f"{type(error).__name__} {' '.join(str(error).split())}"
    return "loads"


weight_norm = loads(utils.remove_weight_norm(utils.weight_norm(nn.Linear(3, 3))))
spectral_norm = loads(utils.remove_spectral_norm(utils.spectral_norm(nn.Linear(3, 3))))
print("after remove_weight_norm:", weight_norm)
print("after remove_spectral_norm:", spectral_norm)
as_described = weight_norm == "loads" and '"weight_orig", "weight_u"' in spectral_norm
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
