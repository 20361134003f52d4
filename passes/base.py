"""The pass interface: the whole framework in one file.

Owns what a pass is, what it returns and how a pipeline runs. It must not know any particular pass, nor what
its subject is: discovery and mask insertion work on a :class:`~srigl_fx.passes.draft.Draft` of a model, the
lowering passes on a captured :class:`~srigl_fx.passes.program.Program`.

One pass is one file and one class; its docstring lists the numbered rules it implements. A pipeline is one
explicit tuple of passes: ``run((Discover(), AssignBudgets(...), InsertMasks()), draft)``.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from srigl_fx.errors import PassError, SriglError

Subject = TypeVar("Subject")

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Note:
    """One thing a pass did or, more often, did not do, and why.

    Attributes:
        where: The fully-qualified name of the weight, module or node concerned.
        reason: One sentence for the user's report.
        by: The pass that says so; filled in by the runner.
        undone: Whether the pass failed, and what it did was undone; filled in by the runner.
    """

    where: str
    reason: str
    by: str = ""
    undone: bool = False


@dataclass(frozen=True, kw_only=True)
class PassResult(Generic[Subject]):
    """What a pass returns: its subject, whether anything changed, and notes for the report."""

    subject: Subject
    changed: bool
    notes: tuple[Note, ...] = ()


class Pass(ABC, Generic[Subject]):
    """One transformation of a subject.

    ``requires`` raises a :class:`~srigl_fx.errors.SriglError` where the subject is not fit for the pass, before
    anything is touched; ``run`` transforms; ``ensures`` checks the promise afterwards. Only ``run`` is mandatory.

    Attributes:
        only_improves: Whether the subject is right without the pass: then its failure is no reason to give up.
    """

    only_improves = False

    @property
    def name(self) -> str:
        """The name shown in reports: the class name."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{self.name}()"

    def requires(self, subject: Subject) -> None:
        """Check what the pass needs of ``subject``; raise if it is missing."""

    @abstractmethod
    def run(self, subject: Subject) -> PassResult[Subject]:
        """Transform ``subject`` and say what changed."""

    def ensures(self, subject: Subject) -> None:
        """Check what the pass promises of ``subject``; raise if it does not hold."""


def run(
    passes: Sequence[Pass[Subject]],
    subject: Subject,
    *,
    check: Callable[[str, Subject], None] | None = None,
    observe: Callable[[str, Subject, PassResult[Subject] | Exception, float], None] | None = None,
) -> PassResult[Subject]:
    """Run ``passes`` in order and return the last subject with all notes.

    Each pass works on a copy, where the subject has a method ``copy``, so that ``subject`` stays as it is. A pass that
    only improves is undone where it fails: the next one gets what it got, and a note says so. A SriglError of its
    ``requires`` is no failure: it says that the subject is not fit, and is raised.

    Args:
        passes: In the order to run them.
        subject: What the first one gets.
        check: Called with a pass's name and its subject after each pass, whatever it says it changed; raises where
            the subject is wrong.
        observe: Called after each pass with its name, what it got, what came of it (where it was undone, what it got;
            where it ended the run, the error), and the seconds it took.

    Raises:
        SriglError: As a pass raised it.
        PassError: Any other exception inside a pass, with the pass named and the cause chained.

    In each case ``subject`` is as it was. A pass that did not come with the library runs in the context that the
    subject's method ``promised`` gives, where there is one; what it gives is called with the subject that the pass
    returned, and may refuse it.

    Example:
        >>> class Double(Pass[int]):
        ...     def run(self, subject: int) -> PassResult[int]:
        ...         return PassResult(subject=2 * subject, changed=True, notes=(Note(where="x", reason="doubled"),))
        >>> class Halve(Pass[int]):
        ...     only_improves = True
        ...     def run(self, subject: int) -> PassResult[int]:
        ...         raise ArithmeticError("not today")
        >>> result = run((Double(), Halve(), Double()), 3)
        >>> result.subject, [(note.by, note.undone) for note in result.notes]
        (12, [('Double', False), ('Halve', True), ('Double', False)])
    """
    changed = False
    notes: list[Note] = []
    for step in passes:
        began = time.perf_counter()
        try:
            result = _run_one(step, subject, check)
        except Exception as error:
            if observe is not None:
                observe(step.name, subject, error, time.perf_counter() - began)
            raise
        if observe is not None:
            observe(step.name, subject, result, time.perf_counter() - began)
        subject = result.subject
        changed |= result.changed
        notes += [replace(note, by=note.by or step.name) for note in result.notes]
    return PassResult(subject=subject, changed=changed, notes=tuple(notes))


def _own(subject: Subject) -> Subject:
    copy: Callable[[], Subject] | None = getattr(subject, "copy", None)
    return subject if copy is None else copy()


def _run_one(
    step: Pass[Subject], subject: Subject, check: Callable[[str, Subject], None] | None
) -> PassResult[Subject]:
    """What came of one pass; ``subject`` itself, with a note, where it failed and only improves."""
    started = False
    try:
        own = _own(subject)
        step.requires(own)
        started = True
        with _promised(step, own) as keep:
            result = step.run(own)
            _check_result(result, own)
            keep(result.subject)
            step.ensures(result.subject)
        if check is not None:
            check(step.name, result.subject)
    except Exception as error:
        if isinstance(error, SriglError) and not (started and step.only_improves):
            raise  # what the subject lacks, or the pass's own words for its failure
        failed = error if isinstance(error, PassError) else _failure(step, error)
        if not step.only_improves:
            raise failed from error
        _LOGGER.debug("the pass %s was undone", step.name, exc_info=error)
        undone = Note(where="the graph", reason=f"undone: {failed}", by=step.name, undone=True)
        return PassResult(subject=subject, changed=False, notes=(undone,))
    return result


def _promised(step: Pass[Subject], subject: Subject) -> AbstractContextManager[Callable[[Subject], None]]:
    promised = None if _of_library(step) else getattr(subject, "promised", None)
    return nullcontext(lambda _: None) if promised is None else promised()


def _check_result(result: object, subject: object) -> None:
    """What ``run`` returned must be a result, of a subject like the one it got."""
    if not isinstance(result, PassResult):
        raise TypeError(f"its run returned {type(result).__name__}, not a PassResult")
    if not isinstance(result.subject, type(subject)):
        raise TypeError(
            f"the subject of its PassResult is of the type {type(result.subject).__name__}, not the "
            f"{type(subject).__name__} that run was given"
        )
    if not isinstance(result.changed, bool):
        raise TypeError(f"its PassResult says changed={result.changed!r}, which is neither True nor False")
    if not isinstance(result.notes, tuple) or not all(isinstance(note, Note) for note in result.notes):
        raise TypeError(
            f"the notes of its PassResult are no tuple of Note(where=..., reason=...), but {result.notes!r}"
        )
    for note in result.notes:
        if not isinstance(note.where, str) or not isinstance(note.reason, str):
            raise TypeError(f"where and reason of a Note must be texts, as node.name is one, not {note!r}")


def _of_library(step: Pass[Subject]) -> bool:
    return type(step).__module__.startswith("srigl_fx.")


def _failure(step: Pass[Subject], error: Exception) -> PassError:
    advice = (
        "this is a defect of the pass: please report it with the model"
        if _of_library(step)
        else f"the pass is yours: mend {type(step).__module__}.{type(step).__qualname__}"
    )
    return PassError(f"the pass {step.name} failed ({brief(error)}); {advice}, or leave it out of the pipeline")


def brief(error: BaseException) -> str:
    """The type of an exception and the first line of what it says.

    Example:
        >>> brief(ValueError("too small")), brief(KeyError())
        ('ValueError: too small', 'KeyError')
    """
    return next(iter(f"{type(error).__name__}: {error}".removesuffix(": ").splitlines()))
