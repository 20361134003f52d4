from dataclasses import dataclass

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
