"""Every instruction set passes the oracle tests, and results do not change from run to run.

The oracle tests run in a process for each instruction set, beyond this one's, that SRIGL_FX_ISA can force on this CPU;
those of eight bits for each target, as what extends an instruction set changes the kernels of bytes alone. There they
have a quarter of their parameters each: the source of the kernels is the same, and this process's run has all of them.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_support import digests
from kernel_support.sampled import sampled

from srigl_fx.errors import LibraryError
from srigl_fx.runtime.cpu.kernels.isa import AVX2, ISA_VARIABLE, TARGETS, host_isa, host_target, isa_of

TESTS = Path(__file__).parent
ORACLE_TESTS = (
    *("test_oracle_linear.py", "test_oracle_conv.py", "test_oracle_special.py", "test_oracle_onnx.py"),
    *("test_oracle_shared.py", "test_oracle_arranged.py", "test_oracle_arranged_moves.py"),
)
INT8_TESTS = tuple(f"test_oracle_int8{what}.py" for what in ("", "_special", "_given", "_bytes"))
OTHERS = [target for target in TARGETS if target != host_target()]  # this process's oracle tests run on the host's
COMPILED = sorted({TARGETS[0], AVX2, host_target()} & set(TARGETS))  # what newer targets add takes no other path
best = pytest.mark.skipif(ISA_VARIABLE in os.environ, reason="another process compares the instruction sets")


def run_oracle_tests(isa: str) -> None:
    files = [str(TESTS / name) for name in (*ORACLE_TESTS, *INT8_TESTS)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "kernel_support.sampled"]
    command += files
    if isa != isa_of(isa) or isa == host_isa():  # its other kernels are those of another process, or of this one
        command += ["-k", "int8"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    plugins = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command,
        env=environment | {ISA_VARIABLE: isa, "PYTHONPATH": plugins},
        cwd=TESTS.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{isa}: status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def digests_on(isa: str, *how: str) -> dict[str, dict[str, str]]:
    """The digests of every number of threads, from a new process; ``how`` is as digests.py has it."""
    paths = os.pathsep.join([str(TESTS.parent), *(entry or os.getcwd() for entry in sys.path)])
    done = subprocess.run(
        [sys.executable, str(TESTS.parent / "kernel_support" / "digests.py"), *how],
        env={**os.environ, ISA_VARIABLE: isa, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{isa}: status {done.returncode}\n{done.stderr[-4000:]}"
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


once = functools.cache(digests_on)


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The parameter, a target; tests are skipped whose CPU lacks it."""
    wanted = str(request.param)
    with monkeypatch.context() as patch:
        patch.setenv(ISA_VARIABLE, wanted)
        try:
            host_isa()
        except LibraryError:
            pytest.skip(f"this CPU has no {wanted}")
    return wanted


def test_a_sample_has_cases_of_every_test() -> None:
    names = [f"test_linear[{batch}-{fan_in}]" for batch in range(10) for fan_in in range(4)]
    assert len(sampled(names)) == 10
    assert set(sampled(names)) < set(names)
    assert sampled(names[::-1]) == sampled(names)
    assert sampled(["test_conv"]) == ["test_conv"]


@best
@pytest.mark.long
@pytest.mark.parametrize("isa", OTHERS, indirect=True)
def test_oracle_tests_on(isa: str) -> None:
    run_oracle_tests(isa)


@pytest.mark.long
@best
@pytest.mark.parametrize("isa", OTHERS, indirect=True)
def test_a_process_for_each(isa: str) -> None:
    """A few dozen cases, compared with the oracle there."""
    assert once(isa)


@best
@pytest.mark.long
@pytest.mark.parametrize("isa", TARGETS, indirect=True)
def test_the_same_bits_in_every_process(isa: str) -> None:
    assert digests_on(isa) == once(isa)


@best
@pytest.mark.long
@pytest.mark.parametrize("isa", COMPILED, indirect=True)
def test_code_that_a_process_compiles_gives_the_same_bits(isa: str) -> None:
    """Without the operator library, whose code torch's operators take elsewhere in the tests.

    What makes one dtype's kernels another's is the same for all targets, so that the host's alone has all of them.
    """
    dtypes = [] if isa == host_target() else ["float32"]
    for threads, found in digests_on(isa, "compiled", *dtypes).items():
        assert found
        assert found.items() <= once(isa)[threads].items()


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_in_every_run(threads: int) -> None:
    first = digests.digests(threads)
    assert all(digests.digests(threads) == first for _ in range(3))
