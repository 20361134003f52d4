"""What the runner does with passes: their order, their errors and what they return."""

from dataclasses import dataclass
from typing import Any, cast

import pytest

from srigl_fx.errors import PassError, SparsifyError
from srigl_fx.passes.base import Note, Pass, PassResult, run


@dataclass
class Append(Pass[list[str]]):
    """Appends its letter and keeps a diary of the order in which it is asked."""

    letter: str
    fail_in: str = ""
    error: Exception | None = None

    def _visit(self, step: str, subject: list[str]) -> None:
        subject.append(f"{step}:{self.letter}")
        if step == self.fail_in:
            raise self.error or ValueError("bad")

    def requires(self, subject: list[str]) -> None:
        self._visit("requires", subject)

    def run(self, subject: list[str]) -> PassResult[list[str]]:
        self._visit("run", subject)
        return PassResult(subject=subject, changed=self.letter == "b", notes=(Note(where=self.letter, reason="done"),))

    def ensures(self, subject: list[str]) -> None:
        self._visit("ensures", subject)


def test_passes_run_in_order_and_their_notes_are_signed() -> None:
    result = run((Append("a"), Append("b")), [])
    assert result.subject == ["requires:a", "run:a", "ensures:a", "requires:b", "run:b", "ensures:b"]
    assert result.changed
    assert [(note.where, note.by) for note in result.notes] == [("a", "Append"), ("b", "Append")]


@pytest.mark.parametrize("step", ["requires", "run", "ensures"])
def test_a_foreign_error_names_the_pass_and_chains_its_cause(step: str) -> None:
    with pytest.raises(PassError, match=r"Append failed \(ValueError: bad\)") as caught:
        run((Append("a"), Append("b", fail_in=step), Append("c")), [])
    assert isinstance(caught.value.__cause__, ValueError)


def test_our_own_errors_pass_through() -> None:
    with pytest.raises(SparsifyError, match="named"):
        run((Append("a", fail_in="run", error=SparsifyError("named")),), [])


def test_no_pass_changes_nothing() -> None:
    assert not run((), ["x"]).changed


def test_the_check_runs_after_each_pass() -> None:
    checked: list[str] = []

    def check(name: str, subject: list[str]) -> None:
        checked.append(subject[-1])
        if "ensures:b" in subject:
            raise PassError(f"{name} broke it")

    run((Append("a"), Append("c")), [], check=check)
    assert checked == ["ensures:a", "ensures:c"]
    checked.clear()
    with pytest.raises(PassError, match="Append broke it"):
        run((Append("a"), Append("b"), Append("c")), [], check=check)
    assert checked == ["ensures:a", "ensures:b"]


def test_what_requires_refuses_is_raised_whatever_the_pass_is_for() -> None:
    class Improves(Append):
        only_improves = True

    for error in (SparsifyError("not fit"), PassError("not fit")):
        with pytest.raises(type(error), match=r"^not fit$"):
            run((Improves("a", fail_in="requires", error=error),), [])
    for step in ("requires", "run", "ensures"):  # no refusal, but a failure
        result = run((Improves("a", fail_in=step), Append("b")), [])
        assert [(note.by, note.undone) for note in result.notes] == [("Improves", True), ("Append", False)]
        assert "Improves failed (ValueError: bad)" in result.notes[0].reason
    for step in ("run", "ensures"):
        (note,) = run((Improves("a", fail_in=step, error=SparsifyError("own words")),), []).notes
        assert "Improves failed (SparsifyError: own words)" in note.reason


@dataclass
class Returns(Pass[list[str]]):
    """Returns what it was made with."""

    result: Any

    def run(self, subject: list[str]) -> PassResult[list[str]]:
        return cast("PassResult[list[str]]", self.result)


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (None, "its run returned NoneType, not a PassResult"),
        (PassResult(subject=None, changed=True), "of the type NoneType, not the list that run was given"),
        (PassResult(subject="graph", changed=True), "of the type str, not the list that run was given"),
        (PassResult(subject=[], changed="yes"), "changed='yes', which is neither True nor False"),  # type: ignore[arg-type]
        (PassResult(subject=[], changed=True, notes=("hello",)), "but .'hello',."),  # type: ignore[arg-type]
        (PassResult(subject=[], changed=True, notes=[Note(where="a", reason="b")]), "but .Note.*."),  # type: ignore[arg-type]
        (PassResult(subject=[], changed=True, notes="hello"), "but 'hello'"),  # type: ignore[arg-type]
        (PassResult(subject=[], changed=True, notes=None), "but None"),  # type: ignore[arg-type]
        *(
            (
                PassResult(subject=[], changed=True, notes=(Note(where="a", reason="b"), note)),
                "must be texts, as node.name is one, not Note.*",
            )
            for note in (Note(where=3, reason="b"), Note(where="a", reason=None))  # type: ignore[arg-type]
        ),
    ],
)
def test_a_pass_that_returns_something_else_is_named(result: Any, problem: str) -> None:
    with pytest.raises(
        PassError, match=rf"the pass Returns failed \(TypeError: .*{problem}\); the pass is yours"
    ) as caught:
        run((Append("a"), Returns(result), Append("b")), [])
    assert isinstance(caught.value.__cause__, TypeError)


def test_an_observer_hears_of_the_error_that_ends_the_run() -> None:
    heard: list[Any] = []
    steps = (Append("a"), Append("b", fail_in="run"), Append("c"))
    with pytest.raises(PassError, match="Append failed") as caught:
        run(steps, [], observe=lambda name, before, result, seconds: heard.append((list(before), result)))
    (_, first), (before, last) = heard
    assert isinstance(first, PassResult)
    assert before[:3] == ["requires:a", "run:a", "ensures:a"]
    assert last is caught.value
