"""A user's model: from MODULE:FUNCTION to what the function returns.

Owns how the module is found, what the function may return, and the words for whatever is wrong with either: this is the
user's own code, so that its errors are named by its file and line. It must not know what becomes of the model.
"""

import difflib
import importlib
import importlib.util
import inspect
import itertools
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from srigl_fx.errors import SriglError

SHAPE = "(model, example_inputs), or (model, example_inputs, arguments of export_onnx as a dict)"


@dataclass(frozen=True)
class Source:
    """What a function returned.

    Attributes:
        model: The model.
        example_inputs: As for :func:`srigl_fx.export_onnx`.
        arguments: More arguments of that function.
    """

    model: nn.Module
    example_inputs: Any
    arguments: dict[str, Any]


@contextmanager
def importable(text: str) -> Iterator[None]:
    """What a module imports is found, also when its function or its model does so later.

    As with ``python -m`` that is in the working folder, and for a file first in its own, as where Python runs it.

    Args:
        text: ``MODULE:FUNCTION``.
    """
    name = text.rpartition(":")[0]
    folders = [*([str(Path(name).resolve().parent)] if name.endswith(".py") else ()), str(Path.cwd())]
    sys.path[:0] = folders
    try:
        yield
    finally:
        for folder in folders:
            if folder in sys.path:
                sys.path.remove(folder)


def load_source(text: str, allowed: frozenset[str]) -> Source:
    """Import a module, call its function, and check what it returns; within :func:`importable`.

    Args:
        text: ``MODULE:FUNCTION``; the module is one that Python finds from the working folder, or a file ``*.py``.
        allowed: The names that the third thing returned may have.

    Raises:
        SriglError: There is no such module or function, either fails, or it returns something else.
    """
    module_name, _, name = text.rpartition(":")
    module = _import(module_name)
    function = _function(module, module_name, name)
    with _blamed(f"{text} failed"):
        returned = function()
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        raise SriglError(f"{text} must return {SHAPE}, not {_described(returned)}")
    model, example_inputs, *rest = returned
    if not isinstance(model, nn.Module):
        raise SriglError(f"{text} must return {SHAPE}; the first is a {type(model).__name__}, no torch.nn.Module")
    arguments = rest[0] if rest else {}
    if not isinstance(arguments, Mapping) or (odd := [one for one in arguments if one not in allowed]):
        raise SriglError(
            f"{text} must return {SHAPE}; the third is {_described(arguments)}"
            if not isinstance(arguments, Mapping)
            else f"{text} returns the argument {odd[0]!r}, which is none of export_onnx: {', '.join(sorted(allowed))}"
        )
    return Source(model, example_inputs, dict(arguments))


def _described(value: object) -> str:
    size = f" of {len(value)}" if isinstance(value, tuple) else ""
    return f"a {type(value).__name__}{size}"


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Whatever user code raises is one line with its place; errors of this library say enough already."""
    try:
        yield
    except SriglError:
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = next(
            (f" ({frame.filename}:{frame.lineno})" for frame in reversed(frames) if _is_users(frame.filename)), ""
        )
        if isinstance(error, SyntaxError) and error.filename:
            place = f" ({error.filename}:{error.lineno})"
        raise SriglError(f"{what}: {type(error).__name__}: {error}{place}") from error


def _is_users(filename: str) -> bool:
    """Whether a line of code is neither Python's own, nor an installed package's, nor of this module."""
    foreign = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<", __file__)
    return not filename.startswith(foreign)


def _import(name: str) -> ModuleType:
    if name.endswith(".py"):
        return _import_file(Path(name))
    parents = set(itertools.accumulate(name.split("."), lambda package, part: f"{package}.{part}"))
    try:
        with _blamed(f"importing {name} failed"):
            return importlib.import_module(name)
    except SriglError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and cause.name in parents:
            raise SriglError(
                f"there is no module {cause.name}: it was looked for in {Path.cwd()} and where Python looks; a file is "
                "given with its ending, such as models/net.py:build"
            ) from error
        raise


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SriglError(f"there is no file {path}")
    # Under the name of a module that is there, or may come, it would take the place of that.
    is_taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    name = f"{path.stem}_of_the_command_line" if is_taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    try:
        with _blamed(f"importing {path} failed"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _function(module: ModuleType, module_name: str, name: str) -> Callable[[], Any]:
    function = getattr(module, name, None)
    if function is None:
        known = [one for one, value in vars(module).items() if inspect.isfunction(value) and not one.startswith("_")]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:8]
        raise SriglError(f"{module_name} has no function {name!r}" + (f"; it has {', '.join(near)}" if near else ""))
    if not callable(function):
        raise SriglError(f"{module_name}:{name} is {_described(function)}, no function")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise SriglError(f"{module_name}:{name} is called without arguments, but {error}") from error
    except ValueError:  # a function that is not Python has no signature
        pass
    typed: Callable[[], Any] = function
    return typed
