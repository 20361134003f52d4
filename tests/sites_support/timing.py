"""Print the processor seconds in which the layers of 500, and of 1000 blocks are found; by a run if asked."""

import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sites_support import discover


class Block(nn.Module):
    """A bare weight, behind a branch that tracing does not need to take."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = F.linear(self.norm(x), self.w)
        return x + (y if scale is None else y * scale)


def seconds(layers: int, *, by_run: bool) -> float:
    """The processor time of one discovery, after which all layers are found."""
    model = nn.Sequential(*(Block() for _ in range(layers)))
    start = time.process_time()
    found = discover(model, (torch.randn(2, 8),) if by_run else None)
    assert sum(not finding.reason for finding in found.values()) == layers
    return time.process_time() - start


if __name__ == "__main__":
    by_run = sys.argv[1:] == ["run"]
    seconds(10, by_run=by_run)
    print(*(seconds(layers, by_run=by_run) for layers in (500, 1000)))
