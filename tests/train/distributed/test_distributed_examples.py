"""The examples for several processes run under torchrun and say that they learned something."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")


@pytest.mark.long
@pytest.mark.parametrize(
    ("script", "options", "least"),
    [("train_ddp.py", ["--epochs", "3"], 85.0), ("train_fsdp.py", ["--steps", "100"], 60.0)],
)
def test_runs_on_two_processes(checkout: Path, script: str, options: list[str], least: float) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(checkout / "examples" / script),
            *options,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    # What was printed counts, not the return code: Gloo's threads sometimes abort a process as it ends.
    assert 'Traceback (most recent call last):\n  File "/' not in done.stderr, done.stderr
    accuracies = [float(found) for found in re.findall(r"([\d.]+)% right", done.stdout)]
    assert accuracies, done.stdout + done.stderr
    assert accuracies[-1] > least
