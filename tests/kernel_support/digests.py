"""Prints the digests of a fixed set of results, so that processes can be compared.

``python digests.py`` has the code of the operator library, ``python digests.py compiled`` compiles its own, and
``python digests.py compiled float32`` does so for layers of this dtype alone.
"""

import hashlib
import json
import sys
from collections.abc import Sequence

import torch

from kernel_support import DTYPES, Convolution, bits, check_conv, check_linear, condensed
from srigl_fx.runtime.cpu import entries
from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.value_types import ValueDtype


def digests(threads: int, dtypes: Sequence[ValueDtype] = DTYPES) -> dict[str, str]:
    """A digest of every result at that number of threads."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    with torch_threads(threads):
        for dtype in dtypes:
            weight = condensed(300, 500, 50, n_active=280, dtype=dtype)
            for batch in (1, 3, 16, 33, 130):
                x, residual = (torch.randn(batch, size, generator=generator) for size in (500, 300))
                y = check_linear(weight, x, residual=residual, activation="gelu")
                found[f"linear {dtype} {batch}"] = hashlib.sha256(bits(y)).hexdigest()
            for kernel, transposed in (((3, 3), False), ((1, 1), False), ((4, 4), True)):
                shape = Convolution(n=40, channels=20, kernel=kernel, size=(13, 14), transposed=transposed)
                conv_weight = shape.condensed(9, n_active=38, dtype=dtype)
                for batch in (1, 5):
                    x = torch.randn(batch, 20, 13, 14, generator=generator)
                    y = check_conv(shape, conv_weight, x, activation="silu")
                    found[f"conv {shape} {dtype} {batch}"] = hashlib.sha256(bits(y)).hexdigest()
    return found


if __name__ == "__main__":
    if "compiled" in sys.argv:
        vars(entries)["_in_library"] = dict
    asked = [dtype for dtype in DTYPES if dtype in sys.argv[2:]] or DTYPES
    print(json.dumps({threads: digests(threads, asked) for threads in (1, 2)}))
