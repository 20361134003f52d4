"""How long ``import srigl_fx`` takes in a process that has imported torch.

Run ``python benchmarks/import_time.py``. Each figure is that of a fresh process, the best of several: processor time,
which other processes do not change much, and time on the clock. "First use" is the import and what
``srigl_fx.sparsify`` loads when it is looked up.
"""

import argparse
import subprocess
import sys

CODE = """
import time
import torch
clock, processor = time.perf_counter(), time.process_time()
import srigl_fx
print(1e3 * (time.process_time() - processor), 1e3 * (time.perf_counter() - clock))
srigl_fx.sparsify
print(1e3 * (time.process_time() - processor), 1e3 * (time.perf_counter() - clock))
"""


def measure(processes: int) -> list[tuple[float, float]]:
    """Milliseconds of processor and clock, for the import and for the first use: the least of some processes."""
    runs = []
    for _ in range(processes):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        runs.append([tuple(map(float, line.split())) for line in done.stdout.splitlines()])
    return [tuple(min(values) for values in zip(*lines, strict=True)) for lines in zip(*runs, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=5)
    imported, used = measure(parser.parse_args().processes)
    print(f"import srigl_fx, beyond torch: {imported[0]:.1f} ms of processor time, {imported[1]:.1f} ms on the clock")
    print(f"and first use: {used[0]:.1f} ms of processor time, {used[1]:.1f} ms on the clock")


if __name__ == "__main__":
    main()
