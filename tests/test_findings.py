"""The page of findings in other tools lists every script, with what its head says."""

import os
from pathlib import Path

import pytest
from findings_support import END, plain, read, with_findings


def test_the_page_is_that_of_the_scripts(checkout: Path) -> None:
    page = (checkout / "docs" / "findings.md").read_text(encoding="utf-8")
    made = with_findings(page, checkout / "findings")
    assert page == made, "make tables writes it anew"
    assert all(f"`findings/{path.name}`" in made for path in (checkout / "findings").iterdir())


def test_every_script_can_be_run_and_stops_where_something_fails(checkout: Path) -> None:
    for path in (checkout / "findings").iterdir():
        assert os.access(path, os.X_OK), path.name
        assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8"), path.name
        assert "srigl_fx" not in path.read_text(encoding="utf-8"), path.name


HEAD = """#!/usr/bin/env bash
# tool: a title.
#
# Expected: a thing
# on two lines.
# Seen: another.
#
# Versions: tool 1.0, Python 3.11. Seen on 2026-01-31{where}.
# Output seen:
#     words
set -euo pipefail
"""


@pytest.mark.parametrize("where", ["", ", on a processor"])
def test_a_head_is_read(tmp_path: Path, where: str) -> None:
    script = tmp_path / "one.sh"
    script.write_text(HEAD.format(where=where), encoding="utf-8")
    found = read(script)
    assert (found.tool, found.title, found.day) == ("tool", "tool: a title.", "2026-01-31")
    assert found.paragraphs == ("Expected: a thing on two lines.", "Seen: another.")
    assert found.versions == "tool 1.0, Python 3.11"


@pytest.mark.parametrize("left_out", ["# Versions", "# Output seen", "# tool: "])
def test_a_head_that_lacks_something_is_an_error(tmp_path: Path, left_out: str) -> None:
    script = tmp_path / "one.sh"
    lines = HEAD.format(where="").splitlines(keepends=True)
    script.write_text("".join(line for line in lines if not line.startswith(left_out)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"one\.sh does not begin as the scripts in findings/ do"):
        read(script)


def test_a_page_without_its_marks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no place for the findings"):
        with_findings(f"# Findings{END}", tmp_path)


def test_marks_in_a_head_are_text_on_the_page() -> None:
    assert plain("__a *b* <c> [d] `e_f*`") == r"\_\_a \*b\* \<c> \[d] `e_f*`"
