"""The report: tables and verdicts as Markdown, filled into the marked parts of a page, and the figures.

Owns the page's generated parts; the words around them are the page's own.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from claims import figures
from claims.analysis import ALL, CLAIMS, Claim, Estimate, Results, Verdict
from claims.results import Row, plan
from claims.runs import METHODS, TASKS

COLUMNS = {
    "active_share": ("Neurons that have weights (% of the sparse layers')", 100, 1),
    "sparsity_all": ("Sparsity reached, over all weights (%)", 100, 2),
    "itop": ("Weights that were part of the network at some time (% of the sparse layers')", 100, 1),
    "train_flops": ("Multiplications of training, relative to dense", 1, 3),
}

OUTCOMES = (
    "Holds throughout",
    "Holds more often than not",
    "Holds in places",
    "Holds nowhere",
    "The seeds do not tell",
    "Not all runs are in",
)


def write(rows: Sequence[Row], folder: Path) -> None:
    """Draw the figures into ``folder`` and fill the page beside it, ``<folder>.md``; it is made if there is none."""
    results = Results(rows)
    figures.draw(results, folder)
    parts = parts_of_page(rows)
    page = folder.with_suffix(".md")
    text = page.read_text(encoding="utf-8") if page.exists() else "\n\n".join(map(marked, parts.items())) + "\n"
    page.write_text(fill(text, parts), encoding="utf-8")


def parts_of_page(rows: Sequence[Row]) -> dict[str, str]:
    """The generated parts by name."""
    results = Results(rows)
    return {
        "progress": _progress(rows),
        "verdicts": _verdicts(results),
        "plain": _plain(results),
        "scores": "\n\n".join(_scores(results, task) for task in TASKS),
        "differences": _differences(results),
        "details": "\n\n".join(_details(results, column) for column in COLUMNS),
    }


def fill(text: str, parts: dict[str, str]) -> str:
    """Replace what stands between the markers of each part.

    Example:
        >>> print(fill("<!-- a -->old<!-- /a -->", {"a": "new"}))
        <!-- a -->
        <BLANKLINE>
        new
        <BLANKLINE>
        <!-- /a -->
    """
    return re.sub(
        r"<!-- (\w+) -->.*?<!-- /\1 -->",
        lambda match: marked((match[1], parts[match[1]])) if match[1] in parts else match[0],
        text,
        flags=re.DOTALL,
    )


def marked(part: tuple[str, str]) -> str:
    """A part, by name and content, between its markers."""
    name, content = part
    return f"<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->"


def _progress(rows: Sequence[Row]) -> str:
    planned = plan()
    done = len({row.key for row in rows} & set(planned))
    hours = sum(row.number("train_cpu_seconds") for row in rows) / 3600
    return f"{done} of {len(planned)} runs are in, {hours:.1f} hours of one core."


def _verdicts(results: Results) -> str:
    lines = [[claim.text, *(_summary(results, claim, task) for task in TASKS)] for claim in CLAIMS]
    return table(["claim", *(task.title for task in TASKS.values())], lines)


def _plain(results: Results) -> str:
    """The claims by what became of them over all tasks and sparsities."""
    groups: dict[str, list[str]] = {}
    for claim in CLAIMS:
        found = [comparison.judge(results, task)[0] for task in TASKS for comparison in claim.on(task)]
        counts = {verdict: found.count(verdict) for verdict in ("holds", "does not hold", "undecided", "no data")}
        holds, fails = counts["holds"], counts["does not hold"]
        if counts["no data"]:
            group, detail = "Not all runs are in", ""
        elif len(found) in (holds, fails):
            group, detail = ("Holds throughout" if holds else "Holds nowhere"), ""
        else:
            if holds == 0:
                group = "Holds nowhere" if fails else "The seeds do not tell"
            else:
                group = "Holds more often than not" if 2 * holds > len(found) else "Holds in places"
            detail = f" (of {len(found)} comparisons {holds} hold, {fails} do not, {counts['undecided']} are undecided)"
        groups.setdefault(group, []).append(claim.text + detail)
    return "\n\n".join(
        f"{group}:\n\n" + "\n".join(f"- {text}" for text in groups[group]) for group in OUTCOMES if group in groups
    )


def _summary(results: Results, claim: Claim, task: str) -> str:
    """The verdicts of one claim on one task: one word where they agree, else by sparsity."""
    by_verdict: dict[Verdict, list[str]] = {}
    for comparison in claim.on(task):
        verdict, _ = comparison.judge(results, task)
        where = f"{comparison.first[1]:.0%}"
        if METHODS[comparison.second[0]].trainer and comparison.second[1] != comparison.first[1]:
            where += f" to {comparison.second[1]:.0%}"
        by_verdict.setdefault(verdict, []).append(where)
    if not by_verdict:
        return "not tested"
    if len(by_verdict) == 1:
        return f"**{next(iter(by_verdict))}**"
    return "; ".join(f"**{verdict}** at {', '.join(where)}" for verdict, where in by_verdict.items())


def _scores(results: Results, name: str) -> str:
    task = TASKS[name]
    dense = results.estimate(name, ("dense", 0.0))
    lines = [
        [
            _title(name, method),
            *(shown(results.estimate(name, (method, s)), 1, _digits(name)) for s in task.sparsities),
        ]
        for method in METHODS
        if METHODS[method].trainer
    ]
    heading = f"**{task.title}**: {task.unit}; dense {shown(dense, 1, _digits(name))}"
    return heading + "\n\n" + table(["", *(f"{sparsity:.0%}" for sparsity in task.sparsities)], lines)


def _differences(results: Results) -> str:
    lines = []
    for claim in CLAIMS:
        for name, task in TASKS.items():
            for comparison in claim.on(name):
                verdict, found = comparison.judge(results, name)
                if found is None:
                    continue
                share = comparison.column == "active_share"
                unit = "points" if share or not task.bits else "bits"
                lines.append(
                    [
                        claim.text,
                        name,
                        f"{_setting(name, comparison.first)} - {_setting(name, comparison.second)}",
                        f"{shown(found, 100 if share else 1, 3 if unit == 'bits' else 2)} {unit}",
                        verdict,
                    ]
                )
    return table(["claim", "task", "what", "difference", "verdict"], lines)


def _details(results: Results, column: str) -> str:
    title, scale, digits = COLUMNS[column]
    lines = [
        [
            name,
            _title(name, method),
            *(shown(results.estimate(name, (method, s), column), scale, digits, False) for s in ALL),
        ]
        for name in TASKS
        for method in METHODS
        if METHODS[method].trainer
    ]
    return f"**{title}**\n\n" + table(["task", "", *(f"{sparsity:.0%}" for sparsity in ALL)], lines)


def _title(task: str, method: str) -> str:
    ablation = METHODS[method].ablation
    return f"SRigL, threshold {ablation(TASKS[task])}" if ablation else METHODS[method].title


def _setting(task: str, setting: tuple[str, float]) -> str:
    method, sparsity = setting
    return f"{_title(task, method)} {sparsity:.0%}" if METHODS[method].trainer else METHODS[method].title


def _digits(task: str) -> int:
    return 3 if TASKS[task].bits else 1


def shown(estimate: Estimate | None, scale: float, digits: int, interval: bool = True) -> str:
    """A mean, scaled, with its interval if there is one."""
    if estimate is None:
        return "-"
    mean = f"{scale * estimate.mean:.{digits}f}"
    return f"{mean} ± {scale * estimate.half_width:.{digits}f}" if interval and estimate.count > 1 else mean


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
