#!/usr/bin/env bash
# torch.export: two inputs that share a named batch, joined and halved again, are said to need batch 2.
#
# Expected: with the same `Dim("batch")` for both inputs, `torch.chunk(torch.cat([a, b]), 2)` has a free batch: the halves
# are a and b at every size. It is how optical flow networks encode two images at once.
# Seen: export fails: the guard `(3*batch - 1) // batch == 2`, true of every batch, is not understood, and the suggested fix
# is `batch = 2`, the example's size. Slicing at half the size exports, and so does `Dim.DYNAMIC` for each input, whose
# program then treats the two batches as unrelated.
#
# Versions: torch 2.13.0, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     chunk, one Dim: UserError ... batch = 2
#     slices, one Dim: runs at batch 5
#     chunk, Dim.DYNAMIC: runs at batch 5
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
from torch.export import Dim


class Chunk(nn.Module):
    def forward(self, a, b):
        first, second = torch.chunk(torch.cat([a, b]), 2)
        return first * second


class Slices(nn.Module):
    def forward(self, a, b):
        both = torch.cat([a, b])
        half = both.shape[0] // 2
        return both[:half] * both[half:]


def tried(make, size):
    example = (torch.ones(2, 4), torch.ones(2, 4))
    try:
        exported = torch.export.export(make(), example, dynamic_shapes=({0: size}, {0: size}))
        return f"runs at batch {len(exported.module()(torch.ones(5, 4), torch.ones(5, 4)))}"
    except Exception as error:
        fixes = str(error).partition("Suggested fixes:")[2].strip().splitlines()
        return f"{type(error).__name__} ... {fixes[0].strip() if fixes else error}"


seen = [tried(Chunk, Dim("batch")), tried(Slices, Dim("batch")), tried(Chunk, Dim.DYNAMIC)]
for what, result in zip(("chunk, one Dim", "slices, one Dim", "chunk, Dim.DYNAMIC"), seen):
    print(f"{what}: {result}")
as_described = seen == ["UserError ... batch = 2", "runs at batch 5", "runs at batch 5"]
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
