#!/usr/bin/env bash
# torch.export: a buffer that a sub-module assigns in its forward loses the write, without an error.
#
# Expected: `self.h = 0.5 * self.h + x` in a sub-module's forward is captured as a write of the buffer, as it is where the
# exported module itself does it, or export refuses.
# Seen: export succeeds; the program of the module with the sub-module keeps the buffer's first value for ever, so every
# call after the first returns something else than the model does.
#
# Versions: torch 2.13.0, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     eager: [2.0, 3.0, 3.5]
#     exported, the module itself assigns: [2.0, 3.0, 3.5]
#     exported, its sub-module assigns: [2.0, 2.0, 2.0]
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torch import nn


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("h", torch.zeros(3))

    def forward(self, x):
        self.h = 0.5 * self.h + x
        return self.h * 2


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = Cell()

    def forward(self, x):
        return self.cell(x)


def three_calls(model):
    return [model(torch.ones(3))[0].item() for _ in range(3)]


eager = three_calls(Holder())
itself, inside = (three_calls(torch.export.export(make(), (torch.ones(3),)).module()) for make in (Cell, Holder))
print("eager:", eager)
print("exported, the module itself assigns:", itself)
print("exported, its sub-module assigns:", inside)
as_described = eager == itself == [2.0, 3.0, 3.5] and inside == [2.0, 2.0, 2.0]
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
