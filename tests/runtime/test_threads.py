"""The kernels' threads: PyTorch's own, none before they are wanted, none lost in a fork."""

import subprocess
import sys

import pytest

_SETUP = """
import os, threading, torch
import srigl_fx.runtime.ops

def count():
    return sum(1 for _ in os.scandir("/proc/self/task"))

torch.manual_seed(0)
indices = torch.rand(200, 300).argsort(1)[:, :30].sort(1).values.to(torch.uint16)
values, active, bias = torch.randn(200, 30), torch.arange(200, dtype=torch.int32), torch.randn(200)
weight = torch.zeros(200, 300).scatter_(1, indices.long(), values)
scales = values.abs().amax(1) / 127
rounded = (values / scales[:, None]).round().to(torch.int8)

def check(batch):
    x = torch.randn(batch, 300)
    y = torch.ops.srigl_fx.condensed_linear(x, values, indices, active, bias, 300)
    torch.testing.assert_close(y, x @ weight.T + bias, rtol=1e-5, atol=1e-4)
    noisy = torch.ops.srigl_fx.condensed_linear(x, rounded, indices, active, bias, 300, scales=scales)
    torch.testing.assert_close(noisy, y, rtol=0, atol=0.7)
"""
_PROGRAMS = {
    "none is started at import": """
threads = count()
import srigl_fx.runtime.cpu.kernels.tasks, srigl_fx.runtime.cpu.execute
assert count() == threads, (count(), threads)
torch.set_num_threads(1)
check(1), check(200)
assert "numba.np.ufunc.parallel" not in sys.modules or not numba.np.ufunc.parallel._is_initialized
""",
    "a fork after a call": """
torch.set_num_threads(2)
check(1), check(200)
x = torch.randn(64, 300)
expected = x @ weight.T + bias  # not in the child, where PyTorch itself hangs on its lost threads
child = os.fork()
if child == 0:
    signal.alarm(60)
    y = torch.ops.srigl_fx.condensed_linear(x, values, indices, active, bias, 300)
    os._exit(0 if (y - expected).abs().max() < 1e-3 else 1)  # too small for threads of PyTorch
assert os.waitpid(child, 0)[1] == 0
check(200)
""",
    "workers of a DataLoader": """
torch.set_num_threads(2)
check(200)

class Lowered(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        check(40 + i)
        return i

found = list(torch.utils.data.DataLoader(Lowered(), num_workers=2, multiprocessing_context="fork", timeout=60))
assert torch.cat(found).tolist() == list(range(6))
check(200)
""",
    "several threads that start at once": """
torch.set_num_threads(2)
failures = []

def work(batch):
    try:
        for _ in range(10):
            check(batch)
    except BaseException as error:
        failures.append(error)

workers = [threading.Thread(target=work, args=(batch,)) for batch in (1, 3, 16, 17, 64, 100, 130, 300)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
assert not failures, failures
""",
}


@pytest.mark.long
@pytest.mark.parametrize("name", _PROGRAMS)
def test_in_a_process_of_its_own(name: str) -> None:
    _run("import numba" + _PROGRAMS[name])


@pytest.mark.long
@pytest.mark.usefixtures("library")
def test_numba_is_not_imported_where_the_library_is_built() -> None:
    _run("""
torch.set_num_threads(2)
check(1), check(2), check(200)
from srigl_fx.runtime.cpu.training_products import Pattern, pack
Pattern.of_mask(weight != 0).multiply(weight[weight != 0], pack(torch.randn(70, 300)))
assert "numba" not in sys.modules
""")


def _run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import signal, sys{_SETUP}{program}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
