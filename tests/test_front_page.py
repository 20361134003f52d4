"""The picture and the tables of the first page are those of the committed results."""

import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest


@pytest.fixture
def front(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(checkout / "benchmarks"))
    return import_module("front_page")


def _record(
    front: Any, contender: str, microseconds: float, *, layer: str = "8 -> 4", batch: int = 1, threads: int = 1
) -> Any:
    return front.Record(
        section="linear",
        layer=layer,
        sparsity=0.9,
        batch=batch,
        threads=threads,
        contender=contender,
        microseconds=microseconds,
    )


def test_the_worst_layer_against_the_fastest_dense_counts(front: Any) -> None:
    records = [
        _record(front, "torch dense", 40.0),
        _record(front, "ORT dense", 30.0),
        _record(front, "ours in torch", 20.0),
        _record(front, "ours in ORT", 10.0),
        _record(front, "ORT dense", 20.0, layer="4 -> 8"),
        _record(front, "ours in ORT", 10.0, layer="4 -> 8"),
        _record(front, "ORT dense", 10.0, layer="4 -> 8", threads=2),
        _record(front, "ours in ORT", 10.0, layer="4 -> 8", threads=2),
        _record(front, "ORT dense", 10.0, batch=4),
        _record(front, "ours in ORT", math.nan, batch=4),
    ]
    assert front.worst(records, front.DENSE, front.OURS) == {(1, 0.9): 2.0}


def test_the_table_has_every_cell_and_marks_what_loses(front: Any) -> None:
    figures = [{(1, 0.8): 3.456, (4, 0.8): 0.894, (1, 0.99): 19.26}, {(1, 0.9): 1.0}]
    assert front.table("samples", ["float32", "int8"], figures).splitlines() == [
        "| samples | float32, 80% | float32, 99% | int8, 90% |",
        "| --- | --- | --- | --- |",
        "| 1 | 3.46 | 19.3 | 1.00 |",
        "| 4 | **0.89** |  |  |",
    ]


def test_the_tables_on_the_pages_are_those_of_the_results(front: Any) -> None:
    chosen = front.panels()
    made = front.text(chosen, [front.worst(one.records, one.dense, one.ours) for one in chosen])
    assert "**0.89**" in made  # what loses is not left out
    for page in front.PAGES:
        text = page.read_text(encoding="utf-8")
        assert text == front.with_table(text, made), f"make picture writes {page.name} anew"
    with pytest.raises(ValueError, match="no place for the table"):
        front.with_table("a page", made)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_the_picture_is_that_of_the_results(front: Any, name: str) -> None:
    figures = [front.worst(one.records, one.dense, one.ours) for one in front.panels()]
    picture = front.PICTURES[name].read_text(encoding="utf-8")
    ElementTree.fromstring(picture)
    assert front.digest(figures) in picture, "make picture draws it anew"
    changed = [{**figures[0], (1, 0.9): 0.5}, *figures[1:]]
    assert front.digest(changed) not in picture
    assert ("#0d1117" in picture) == (name == "dark")  # a ground of its own
