"""The page docs/findings.md, made from the scripts of findings/; run as a script (``make tables``), it writes the page.

Owns how a script's head is read. It must not run the scripts: they install packages.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- findings -->\n\n", "\n\n<!-- end findings -->"
# The head of a script: a title, paragraphs, then versions and what the script printed.
HEAD = re.compile(
    r"#!/usr/bin/env bash\n# (?P<title>.+)\n#\n(?P<text>(?:#.*\n)+?)#\n"
    r"# Versions: (?P<versions>.+) Seen on (?P<day>\d{4}-\d\d-\d\d).*\.\n"
    r"# Output seen:\n(?:#     .+\n)+"
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The head of one script."""

    file: str
    title: str
    paragraphs: tuple[str, ...]
    versions: str
    day: str

    @property
    def tool(self) -> str:
        """The package that it is about: the first that its versions name."""
        return self.versions.partition(" ")[0]


def read(path: Path) -> Finding:
    """Read a script's head.

    Raises:
        ValueError: If it is not written as the others are.
    """
    found = HEAD.match(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(
            f"{path.name} does not begin as the scripts in findings/ do: the title, what is expected and seen, "
            "'# Versions: PACKAGE VERSION, ... Seen on YEAR-MONTH-DAY.', '# Output seen:' and lines of it"
        )
    lines = [line.removeprefix("#").strip() for line in found["text"].splitlines()]
    return Finding(
        file=path.name,
        title=found["title"],
        paragraphs=tuple(_paragraphs(lines)),
        versions=found["versions"].removesuffix("."),
        day=found["day"],
    )


def _paragraphs(lines: list[str]) -> Iterator[str]:
    """Lines joined to paragraphs, which end at empty lines and begin with the words that heads have in common."""
    kept: list[str] = []
    for line in lines:
        if kept and (not line or line.startswith(("Expected:", "Seen:"))):
            yield " ".join(kept)
            kept = []
        if line:
            kept.append(line)
    if kept:
        yield " ".join(kept)


def plain(text: str) -> str:
    """Text in which Markdown sees nothing but code: other marks are escaped.

    Example:
        >>> plain("__a and b**c, but `__d`")
        '\\\\_\\\\_a and b\\\\*\\\\*c, but `__d`'
    """
    parts = text.split("`")
    return "`".join(part if index % 2 else re.sub(r"([_*<\[])", r"\\\1", part) for index, part in enumerate(parts))


def as_markdown(folder: Path) -> str:
    """All scripts of a folder, by tool."""
    findings = sorted((read(path) for path in folder.glob("*.sh")), key=lambda one: (one.tool, one.file))
    parts: list[str] = []
    for index, one in enumerate(findings):
        if not index or findings[index - 1].tool != one.tool:
            parts.append(f"## {one.tool}")
        parts.append(f"### {plain(one.title.removesuffix('.'))}")
        parts += [plain(paragraph) for paragraph in one.paragraphs]
        parts.append(f"`findings/{one.file}`: {plain(one.versions)}, seen on {one.day}.")
    return "\n\n".join(parts)


def with_findings(page: str, folder: Path) -> str:
    """The page with the findings as they are now; what stands outside of the marks stays."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the page has no place for the findings")
    return before + begin + as_markdown(folder) + end + after


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    file = root / "docs" / "findings.md"
    file.write_text(with_findings(file.read_text(encoding="utf-8"), root / "findings"), encoding="utf-8")
