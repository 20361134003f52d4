"""Measured times on disk: kept, shared by processes, and never in the way."""

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from srigl_fx.runtime.cache import CACHE_VARIABLE
from srigl_fx.runtime.costs import timings
from srigl_fx.runtime.costs.timings import FILE, Timings, environment
from srigl_fx.runtime.cpu.threads import torch_threads

WHAT = {"operator": "linear", "weight": [8, 16], "kept": 12, "stride": None}
SECONDS = {"dense": 3e-6, "condensed": 1e-6}

# Appends lines as fast as it can; says when it has begun.
_WRITER = """
import sys
from pathlib import Path
from srigl_fx.runtime.costs.timings import Timings
timings = Timings(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    timings.put({"writer": sys.argv[2], "number": number}, {"dense": 1.5})
    if number == 10:
        print("begun", flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE


def writer(path: Path, name: str, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_is_put_is_there_for_the_next(path: Path) -> None:
    first = Timings(path)
    assert first.get(WHAT) is None
    first.put(WHAT, SECONDS)
    assert first.get(WHAT) == SECONDS
    assert Timings(path).get(WHAT) == SECONDS
    assert Timings(path).get({**WHAT, "kept": 13}) is None
    assert len(Timings(path)) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_newest_time_counts(path: Path) -> None:
    Timings(path).put(WHAT, SECONDS)
    Timings(path).put(WHAT, {"dense": 1.0})
    assert Timings(path).get(WHAT) == {"dense": 1.0}


def test_what_is_dropped_is_forgotten_by_all(path: Path) -> None:
    kept = Timings(path)
    kept.put(WHAT, SECONDS)
    kept.put(WHAT, {"dense": 1.0})
    kept.put({**WHAT, "kept": 13}, SECONDS)
    kept.drop(WHAT)
    kept.drop({"never": "measured"})
    for one in (kept, Timings(path)):
        assert one.get(WHAT) is None
        assert one.get({**WHAT, "kept": 13}) == SECONDS
    assert len(path.read_text().splitlines()) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    in_memory = Timings(None)
    in_memory.put(WHAT, SECONDS)
    in_memory.drop(WHAT)
    assert in_memory.get(WHAT) is None


def test_clearing_leaves_the_times_of_other_processors(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**environment(), "cpu": "another"}
    with monkeypatch.context() as patch:
        patch.setattr(timings, "environment", lambda: other)
        Timings(path).put(WHAT, SECONDS)
    with monkeypatch.context() as patch:
        patch.setattr(timings, "environment", lambda: {**environment(), "threads": 64, "torch": "1.0"})
        Timings(path).put(WHAT, SECONDS)
    kept = Timings(path)
    kept.put(WHAT, SECONDS)
    kept.clear()
    assert kept.get(WHAT) is None
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["where"] == other


def test_processors_that_have_numbers_alone_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So Linux describes those of Arm, each under the same name."""
    names = set()
    for part in ("0xd08", "0xd40"):
        (tmp_path / part).write_text(
            f"processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: 0x1\nCPU part\t: {part}\n"
        )
        with monkeypatch.context() as patch:
            patch.setattr(timings, "Path", lambda _, part=part: tmp_path / part)
            names.add(timings._cpu.__wrapped__())
    assert len(names) == 2


def test_times_by_threads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, torch_version in ((64, torch.__version__), (2, torch.__version__), (8, "1.0")):
        where = {**environment(), "threads": threads, "torch": torch_version}
        with monkeypatch.context() as patch:
            patch.setattr(timings, "environment", lambda where=where: where)
            Timings(path).put(WHAT, {"dense": float(threads)})
    assert list(Timings(path).by_threads(WHAT).items()) == [(2, {"dense": 2.0}), (64, {"dense": 64.0})]
    assert Timings(path).by_threads({**WHAT, "kept": 13}) == {}


def test_a_line_says_what_where_and_how_long(path: Path) -> None:
    Timings(path).put(WHAT, SECONDS)
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {"what": WHAT, "where": environment(), "seconds": SECONDS}


def test_another_environment_has_times_of_its_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Timings(path).put(WHAT, SECONDS)
    for name, value in {"cpu": "another", "torch": "1.0", "runtime": "0"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(timings, "environment", lambda name=name, value=value: {**environment(), name: value})
            assert Timings(path).get(WHAT) is None
            assert len(Timings(path)) == 0
    monkeypatch.setenv("SRIGL_FX_ISA", "x86-64")
    assert Timings(path).get(WHAT) is None
    monkeypatch.delenv("SRIGL_FX_ISA")
    with torch_threads(torch.get_num_threads() + 1):
        assert Timings(path).get(WHAT) is None
    assert Timings(path).get(WHAT) == SECONDS


@pytest.mark.parametrize(
    "damage",
    [
        b"\x00\xff\xfe not text",
        b'{"what": {}, "where": {}, "seconds": {"dense"',
        b"[" * 100_000,
        b"[1, 2]",
        b'{"what": 1, "where": {}, "seconds": {"dense": 1.0}}',
        b'{"what": {}, "where": {}, "seconds": {"dense": -1.0}}',
        b'{"what": {}, "where": {}, "seconds": {"dense": NaN}}',
        b'{"what": {}, "where": {}, "seconds": {}}',
    ],
)
def test_damage_costs_its_line_only(path: Path, caplog: pytest.LogCaptureFixture, damage: bytes) -> None:
    Timings(path).put(WHAT, SECONDS)
    intact = path.read_bytes()
    path.write_bytes(damage + b"\n" + intact + damage)  # the last line as a process that was killed leaves it
    with caplog.at_level(logging.WARNING):
        mended = Timings(path)
    assert mended.get(WHAT) == SECONDS
    assert path.read_bytes() == intact
    assert [record.getMessage() for record in caplog.records] == [
        f"2 lines of {path} could not be read and are dropped; they will be measured anew"
    ]
    caplog.clear()
    assert Timings(path).get(WHAT) == SECONDS
    assert not caplog.records


def test_a_torn_line_does_not_take_the_next_with_it(path: Path) -> None:
    late = Timings(path)
    path.write_bytes(b'{"what": {"operator"')
    late.put(WHAT, SECONDS)
    assert Timings(path).get(WHAT) == SECONDS


def test_the_file_does_not_grow_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "_LARGEST", 2000)
    kept = Timings(path)
    for number in range(40):
        kept.put({"number": number}, SECONDS)
    assert path.stat().st_size > 2000
    Timings(path)
    assert len(path.read_text().splitlines()) == 20
    assert Timings(path).get({"number": 39}) == SECONDS


@pytest.mark.long
def test_processes_write_at_once(path: Path) -> None:
    writers = [writer(path, name, 200) for name in ("one", "two", "three")]
    assert [process.wait(timeout=60) for process in writers if process.communicate()] == [0, 0, 0]
    read = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(read) == 600
    assert sorted(os.listdir(path.parent)) == [FILE, "timings.lock"]


@pytest.mark.long
def test_killing_a_writer_leaves_a_file_that_can_be_read(path: Path) -> None:
    process = writer(path, "killed", 10**6)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    Timings(path).put(WHAT, SECONDS)
    after = Timings(path)
    assert after.get(WHAT) == SECONDS
    numbers = [json.loads(line)["what"].get("number") for line in path.read_text().splitlines()]
    assert numbers == [*range(len(numbers) - 1), None]


def test_the_file_is_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    assert timings.timings_path() == tmp_path / "cache" / FILE
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    Timings.open().put(WHAT, SECONDS)
    assert Timings.open().get(WHAT) == SECONDS


def test_an_empty_variable_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert timings.timings_path() is None
    kept = Timings.open()
    kept.put(WHAT, SECONDS)
    assert kept.get(WHAT) == SECONDS
    assert Timings.open().get(WHAT) is None


def test_a_folder_that_others_may_write_to_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Timings(tmp_path / FILE).put(WHAT, SECONDS)
    tmp_path.chmod(0o777)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert Timings.open().get(WHAT) is None
        Timings.open()
    (record,) = caplog.records
    assert "may be changed by, another user" in record.getMessage()
    assert CACHE_VARIABLE in record.getMessage()


def test_a_path_that_is_no_file_is_no_error(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.mkdir()
    with caplog.at_level(logging.WARNING):
        kept = Timings(path)
        kept.put(WHAT, SECONDS)
    assert kept.get(WHAT) == SECONDS
    (record,) = caplog.records
    assert f"measured times cannot be kept in {path}" in record.getMessage()
