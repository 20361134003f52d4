#!/usr/bin/env bash
# torch.compile of Adam's step: the bias of float64 moments is corrected in float32.
#
# Expected: with parameters, gradients and moments in float64, a compiled step agrees with the same step uncompiled up to
# float64's rounding, as that of SGD with momentum and of Adagrad does: about 1e-16.
# Seen: the steps of Adam and NAdam differ by 7e-6 of their length, those of RAdam by 2e-4 at the tenth. The count of steps
# is a float32 tensor; uncompiled, it becomes a number of Python before 1 - beta2**count is taken of it, while the compiler
# keeps the tensor, and in float32 1 - 0.999 is off by 1.3e-5 of itself. The backend does not matter (it is "eager" here).
# With float64 as the default dtype the count is a float64 tensor, and the difference is gone.
#
# Versions: torch 2.13.0, Python 3.11. Seen on 2026-11-29.
# Output seen:
#     SGD: after 1 step 0e+00, after 10 steps 0e+00
#     Adagrad: after 1 step 0e+00, after 10 steps 0e+00
#     Adam: after 1 step 7e-06, after 10 steps 7e-06
#     NAdam: after 1 step 6e-06, after 10 steps 7e-06
#     RAdam: after 1 step 2e-07, after 10 steps 2e-04
#     Adam, torch.set_default_dtype(torch.float64): after 1 step 1e-16, after 10 steps 0e+00
# Exit status 0 while this is so, 1 once it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - 2> errors <<'PYTHON' || { cat errors; exit 1; }
import sys

import torch


def moved(kind, options, steps, compiled):
    torch._dynamo.reset()
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = kind([parameter], lr=1.0, **options)
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for _ in range(steps):
        parameter.grad = torch.ones(1, dtype=torch.float64)
        step()
    return parameter.item()


def differences(name, kind, **options):
    found = []
    for steps in (1, 10):
        expected, got = (moved(kind, options, steps, compiled) for compiled in (False, True))
        found.append(abs(got / expected - 1))
    print(f"{name}: after 1 step {found[0]:.0e}, after 10 steps {found[1]:.0e}")
    return max(found)


optim = torch.optim
exact = [differences("SGD", optim.SGD, momentum=0.9), differences("Adagrad", optim.Adagrad)]
rough = [differences(kind.__name__, kind) for kind in (optim.Adam, optim.NAdam, optim.RAdam)]
torch.set_default_dtype(torch.float64)
exact.append(differences("Adam, torch.set_default_dtype(torch.float64)", optim.Adam))
as_described = max(exact) < 1e-14 and min(rough) > 1e-6
print("as described" if as_described else "this has changed")
sys.exit(not as_described)
PYTHON
