"""Where the library is found, how it is built, what is said where it cannot be."""

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from srigl_fx.errors import LibraryError
from srigl_fx.runtime.cache import CACHE_VARIABLE, cache_folders
from srigl_fx.runtime.kernels.tasks import FASTMATH
from srigl_fx.runtime.ort import elf, library, link

# Builds into the folder that the environment names, and says where.
_BUILD = "import srigl_fx; print(srigl_fx.runtime.library_path())"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.mark.slow
def test_two_processes_build_at_once(cache: Path) -> None:
    builders = [
        subprocess.Popen([sys.executable, "-c", _BUILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [builder.communicate(timeout=300) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], results
    paths = {Path(out.strip()) for out, _ in results}
    assert len(paths) == 1
    assert sorted(path.name for path in cache.iterdir()) == sorted([paths.pop().name, "lock"])


def test_a_cached_library_is_not_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    cached = cache / library._cached_name()
    cached.write_bytes(b"a library")
    monkeypatch.setattr(library, "compile_all", lambda _: pytest.fail("built again"))
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
    monkeypatch.setattr(library, "build", lambda path: path.write_bytes(b"built"))
    assert library.library_path().parent == tmp_path / f"srigl_fx-{os.getuid()}"


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("Windows", "AMD64")])
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


@pytest.mark.slow
def test_a_compiler_that_fails_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(LibraryError, match="x86-64 part of the operator library could not be compiled"):
        library.build(Path(cache.parent, "library.so"))
    assert not list(cache.parent.glob("library.so*"))


def test_kernels_keep_the_meaning_of_not_a_number() -> None:
    assert not {"fast", "nnan", "ninf"} & FASTMATH


def test_linking_nothing_useful_names_the_fault(tmp_path: Path) -> None:
    broken = tmp_path / "broken.o"
    broken.write_bytes(b"\x7fELF" + bytes(100))
    with pytest.raises(LibraryError, match="not an x86-64 ELF object file"):
        link.link([broken], tmp_path / "library.so")
    with pytest.raises(LibraryError, match="no object defines RegisterCustomOps"):
        elf.link_shared([], exports=("RegisterCustomOps",), soname="library.so")


def test_a_library_that_others_could_have_put_there_is_not_used(cache: Path) -> None:
    cache.mkdir()
    (cache / library._cached_name()).write_bytes(b"not ours")
    cache.chmod(0o777)
    assert library._existing() is None
    with pytest.raises(LibraryError, match="may be changed by, another user"):
        library.library_path()
