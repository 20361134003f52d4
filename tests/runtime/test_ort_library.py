"""Where the library is found, how it is built, what is said where it cannot be."""

import hashlib
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ort_support import objects

from srigl_fx.errors import LibraryError
from srigl_fx.runtime.cache import CACHE_VARIABLE, cache_folders, is_own_file, is_private, locked
from srigl_fx.runtime.cpu.kernels.tasks import FASTMATH
from srigl_fx.runtime.ort import elf, library, link
from srigl_fx.runtime.ort.compile import compile_all

_OBJECTS = f"import sys; sys.path.append({str(Path(objects.__file__).parents[1])!r}); from ort_support import objects; "
# Builds into the folder that the environment names, and says where; compiles once for both.
_BUILD = f"{_OBJECTS} objects.use(); import srigl_fx; print(srigl_fx.runtime.library_path())"
# Builds without an end.
_KEEP_BUILDING = (
    "import time, srigl_fx; from srigl_fx.runtime.ort import library; "
    "library.compile_all = lambda *_: time.sleep(600); srigl_fx.runtime.library_path()"
)
# Runs a model with the library of the folder that the environment names.
_RUN = f"{_OBJECTS} objects.use(); from srigl_fx.cli.doctor import run_tiny_model; print(run_tiny_model() < 1e-5)"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


def put_in(cache: Path, content: bytes) -> Path:
    """A file in the cache under the library's name, with its hash beside it."""
    cache.mkdir(mode=0o700, exist_ok=True)
    path = cache / library._cached_name(library._host())
    path.write_bytes(content)
    hash_of(path).write_text(hashlib.sha256(content).hexdigest())
    return path


def hash_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


@pytest.fixture
def content(library: Path) -> bytes:
    """The library that was built for all tests."""
    return library.read_bytes()


@pytest.fixture
def quick_build(content: bytes, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Compiling and linking take no time, and give what they gave before; the list has what was linked."""
    linked: list[Path] = []

    def copy(_: object, output: Path) -> str:
        output.write_bytes(content)
        linked.append(output)
        return "cc"

    monkeypatch.setattr(library, "compile_all", lambda *_: [])
    monkeypatch.setattr(link, "link", copy)
    return linked


@pytest.mark.long
@pytest.mark.usefixtures("library")
def test_two_processes_build_at_once(cache: Path) -> None:
    builders = [
        subprocess.Popen([sys.executable, "-c", _BUILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [builder.communicate(timeout=300) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], results
    paths = {Path(out.strip()) for out, _ in results}
    assert len(paths) == 1
    name = paths.pop().name
    assert sorted(path.name for path in cache.iterdir()) == sorted([name, f"{name}.sha256", "lock"])


def test_a_cached_library_is_not_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = put_in(cache, b"a library")
    monkeypatch.setattr(library, "compile_all", lambda *_: pytest.fail("built again"))
    if not library.library_status().supported:
        pytest.skip("no library on this platform")
    assert library.library_path() == cached
    assert library.library_status().path == cached


def test_the_cache_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert next(cache_folders()) == tmp_path / "srigl_fx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert next(cache_folders()) == tmp_path / ".cache" / "srigl_fx"


def test_a_folder_that_others_may_write_to_is_refused(cache: Path) -> None:
    if not library.library_status().supported:
        pytest.skip("no library on this platform")
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(LibraryError, match=rf"{CACHE_VARIABLE}.*fallback inside the file"):
        library.library_path()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_made_is_an_error(cache: Path) -> None:
    if not library.library_status().supported:
        pytest.skip("no library on this platform")
    cache.write_bytes(b"a file, not a folder")
    with pytest.raises(LibraryError, match="cannot be stored") as caught:
        library.library_path()
    assert isinstance(caught.value.__cause__, OSError)


def test_without_a_chosen_cache_a_temporary_folder_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not library.library_status().supported:
        pytest.skip("no library on this platform")
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(library, "build", lambda path, *_, **__: path.write_bytes(b"built"))
    assert library.library_path().parent == tmp_path / f"srigl_fx-{os.getuid()}"


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "riscv64"), ("Windows", "AMD64")])
def test_other_platforms_are_told_of_the_fallback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, machine: str
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for function in (library.library_path, lambda: library.build(tmp_path / "library.so")):
        with pytest.raises(LibraryError, match=f"this is {system} {machine}; models still run through the fallback"):
            function()
    status = library.library_status()
    assert not status.supported
    assert status.path is None
    assert "fallback" in status.reason


def test_the_library_of_another_platform(cache: Path, quick_build: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is built for what it is for, and has a name of its own beside this platform's."""
    asked: list[str] = []

    def note(folder: Path, progress: object, architecture: str) -> list[Path]:
        asked.append(architecture)
        return []

    monkeypatch.setattr(library, "compile_all", note)
    paths = {name: library.library_path(name) for name in library.PLATFORMS}
    assert len(set(paths.values())) == len(quick_build) == 2
    assert asked == ["x86_64", "aarch64"]
    assert library.library_path() == paths[library._host()]
    assert library.library_path("linux-aarch64") == paths["linux-aarch64"]
    assert len(quick_build) == 2, "each once"
    for function in (library.library_path, lambda name: library.build(cache / "library.so", platform=name)):
        with pytest.raises(
            LibraryError, match=r"no operator library for 'plan9'; the platforms are linux-x86_64, linux"
        ):
            function("plan9")


@pytest.mark.slow
def test_a_compiler_that_fails_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    monkeypatch.setattr(library, "compile_all", compile_all)  # not what was compiled before
    with pytest.raises(LibraryError, match="part of the operator library could not be compiled"):
        library.build(Path(cache.parent, "library.so"))
    assert not list(cache.parent.glob("library.so*"))


def test_kernels_keep_the_meaning_of_not_a_number() -> None:
    assert not {"fast", "nnan", "ninf"} & FASTMATH


def test_linking_nothing_useful_names_the_fault(tmp_path: Path) -> None:
    broken = tmp_path / "broken.o"
    broken.write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(LibraryError, match="not an x86-64 or Arm ELF object file"):
        link.link([broken], tmp_path / "library.so")
    with pytest.raises(LibraryError, match="no object defines RegisterCustomOps"):
        elf.link_shared([], exports=("RegisterCustomOps",), soname="library.so")


def test_a_library_that_others_could_have_put_there_is_not_used(cache: Path) -> None:
    put_in(cache, b"not ours")
    cache.chmod(0o777)
    assert library._existing(library._host()) is None
    with pytest.raises(LibraryError, match="may be changed by, another user"):
        library.library_path()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def link_elsewhere(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        change_a_byte,
        link_elsewhere,
        lambda path: path.write_bytes(b""),
        lambda path: path.chmod(0o775),
        lambda path: path.chmod(0o757),
        lambda path: hash_of(path).unlink(),
        lambda path: hash_of(path).write_bytes(b"\xff"),
        lambda path: cut(hash_of(path)),
        lambda path: link_elsewhere(hash_of(path)),
        lambda path: hash_of(path).chmod(0o664),
    ],
)
def test_what_is_damaged_or_may_be_foreign_is_built_anew(
    cache: Path,
    content: bytes,
    quick_build: list[Path],
    damage: Callable[[Path], object],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = put_in(cache, content)
    damage(path)
    status = library.library_status()
    assert status.path is None
    assert path.name in status.reason
    with caplog.at_level(logging.WARNING):
        assert library.library_path() == path
    assert "it is built anew" in caplog.records[0].getMessage()
    assert path.read_bytes() == content
    assert not path.is_symlink()
    assert len(quick_build) == 1
    assert library.library_path() == path
    assert len(quick_build) == 1, "built once"


def test_what_is_built_is_taken_whatever_the_umask(cache: Path, quick_build: list[Path]) -> None:
    before = os.umask(0o002)
    try:
        path = library.library_path()
    finally:
        os.umask(before)
    assert library.library_path() == path
    assert len(quick_build) == 1


def test_what_a_killed_builder_left_is_removed(cache: Path, quick_build: list[Path]) -> None:
    def leave() -> None:
        (cache / "build-abandoned").mkdir(parents=True, mode=0o700)
        (cache / "build-abandoned" / "part.o").write_bytes(b"half")

    cache.mkdir(mode=0o700)
    leave()
    path = library.library_path()
    whole = sorted([path.name, hash_of(path).name, "lock"])
    assert sorted(os.listdir(cache)) == whole
    leave()
    with locked(cache):  # as one that is at work holds it
        library.library_path()
        assert (cache / "build-abandoned").exists()
    library.library_path()
    assert sorted(os.listdir(cache)) == whole
    assert len(quick_build) == 1


@pytest.mark.long
def test_after_a_power_cut_the_library_works(cache: Path, content: bytes) -> None:
    builder = subprocess.Popen([sys.executable, "-c", _KEEP_BUILDING], stdout=subprocess.DEVNULL)
    while not list(cache.glob("build-*")):
        assert builder.poll() is None
        time.sleep(0.05)
    builder.send_signal(signal.SIGKILL)
    builder.wait(timeout=60)
    assert list(cache.glob("build-*"))
    path = put_in(cache, content)
    cut(path)
    done = subprocess.run([sys.executable, "-c", _RUN], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
    assert sorted(os.listdir(cache)) == sorted([path.name, hash_of(path).name, "lock"])


def test_a_link_to_the_cache_folder_must_be_the_users_own(cache: Path, tmp_path: Path) -> None:
    cache.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(cache)
    assert is_private(tmp_path / "link")
    if os.getuid() == 0:
        os.chown(tmp_path / "link", 12345, 12345, follow_symlinks=False)
        assert not is_private(tmp_path / "link")
        path = put_in(cache, b"a library")
        os.chown(path, 12345, 12345)
        assert not is_own_file(path)


def test_who_waits_is_told_why(cache: Path, quick_build: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    library.library_path()
    assert len(quick_build) == 1
    assert "compiling the operator library, which takes some minutes and is kept in" in caplog.text
    assert str(cache) in caplog.text
    caplog.clear()
    library.library_path()
    assert caplog.text == ""


def test_parts_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from srigl_fx.runtime.ort import compile as compiling

    monkeypatch.setattr(compiling, "_spawn", lambda name, path, _: path.write_text(name))
    seen: list[tuple[int, int]] = []
    paths = compiling.compile_all(tmp_path, lambda *done: seen.append(done))
    assert [path.read_text() for path in paths] == list(compiling.OBJECTS)
    assert seen == [(i + 1, len(paths)) for i in range(len(paths))]


def test_after_a_failure_no_part_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from srigl_fx.runtime.ort import compile as compiling

    begun: list[str] = []

    def spawn(name: str, path: Path, architecture: str) -> None:
        begun.append(name)
        if len(begun) > 1:
            time.sleep(0.3)
        raise LibraryError("broken")

    monkeypatch.setattr(compiling, "_spawn", spawn)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(LibraryError, match="broken"):
        compiling.compile_all(tmp_path)
    assert len(begun) < len(compiling.OBJECTS)
