"""Reports as HTML: complete, self-contained, and safe whatever the names are."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import srigl_fx as sx
from srigl_fx.lowering.lowered import LayerReport, LoweringReport
from srigl_fx.passes.base import Note
from srigl_fx.passes.removal import Link, Removal, Removals
from srigl_fx.reports.html_figures import landscape, latency, removal
from srigl_fx.reports.html_page import lowering_page, save_page
from srigl_fx.reports.removal import format_removals
from srigl_fx.summaries import Summary, WeightSummary

NASTY = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</style></title><b>",
    "{{ 7 * 7 }}{% raw %}",
    "' onmouseover='alert(3)",
    "--><iframe>",
)
VOID = {"meta", "input", "wbr"}


class Page(HTMLParser):
    """A page's elements as (tag, attributes), its text, and whether every element is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.elements)


def layer(fqn: str, decision: str = "condensed", **changes: object) -> LayerReport:
    fields: dict[str, object] = {
        "fqn": fqn,
        "shape": (512, 256),
        "neurons": 512,
        "active": 400,
        "fan_in": 25,
        "kept": 10_000,
        "decision": decision,
        "reason": "" if decision == "condensed" else "condensed is 0.91 times as fast as dense at batch 1",
        "bytes_before": 524_288,
        "bytes_after": 62_048,
        "seconds": {batch: {"dense": 3e-4, "condensed": 1e-4, "shrunk": 2e-4} for batch in (1, 64)},
    }
    return LayerReport(**{**fields, **changes})  # type: ignore[arg-type]


def removals_of(names: list[str], readers: int = 1) -> Removals:
    """Each weight loses rows that ``readers`` further weights read."""
    weights: list[Removal] = []
    links: list[Link] = []
    for position, name in enumerate(names):
        gone = 112 + position % 300
        stays = {"its channels reach a layer norm": 3} if position % 5 == 4 else {}
        links += [Link(producer=len(weights), reader=len(weights) + 1 + r, through=("relu",)) for r in range(readers)]
        weights.append(
            Removal(fqn=name, rows=512, ablated=gone, rows_removed=gone, columns=9, columns_removed=0, kept=stays)
        )
        weights += [
            Removal(
                fqn=f"{name}.{reader}",
                rows=4,
                ablated=0,
                rows_removed=0,
                columns=512,
                columns_removed=gone,
                folded={"bias": gone - 12, "zero": 12},
            )
            for reader in range(readers)
        ]
    left = sum(weight.rows - weight.rows_removed for weight in weights)
    return Removals(
        weights=tuple(weights),
        channels=(sum(weight.rows for weight in weights), left),
        parameters=(9000, 6000),
        flops=(20_000, 15_000),
        links=tuple(links),
    )


def lowering_report(names: list[str], readers: int = 1) -> LoweringReport:
    decisions = ("condensed", "shrunk", "dense")
    return LoweringReport(
        layers=tuple(layer(name, decisions[position % 3]) for position, name in enumerate(names)),
        others=(layer("head.weight", "dense", reason="the rule 'head' leaves it dense", seconds={}),),
        capture="torch.export, dynamic batch",
        dynamic_batch=True,
        max_error=2.1e-7,
        removals=(removals_of(names, readers),),
        notes=tuple(
            Note(where=name, reason="read twice", by=("Select", "RemoveDead")[len(name) % 2]) for name in names
        ),
    )


def nasty_summary() -> Summary:
    rows = tuple(
        WeightSummary(
            name=name,
            shape=(4, 8),
            fan_in=2,
            dense_fan_in=8,
            active_neurons=3,
            neurons=4,
            kept=6,
            sparsity=0.8125,
            status="dense",
            reason=name,
            bytes=128,
            nodes=(name,),
        )
        for name in NASTY
    )
    return Summary(rows)


def nasty_lowering() -> LoweringReport:
    report = lowering_report([f"{name}.weight" for name in NASTY])
    worse = report.as_dict()
    (removals,) = worse["removals"]
    for weight, name in zip(removals["weights"], [name for name in NASTY for _ in range(2)], strict=True):
        weight["kept"], weight["folded"] = {name: 2}, {name: 1}
    for link, name in zip(removals["links"], NASTY, strict=True):
        link["through"] = [name]
    for plain, name in zip(worse["layers"], NASTY, strict=True):
        plain["reason"], plain["decision"] = name, "condensed"
    for note, name in zip(worse["notes"], NASTY, strict=True):
        note["reason"], note["by"] = name, name
    return LoweringReport.from_dict({**worse, "capture": NASTY[0]})


@pytest.mark.parametrize("report", [nasty_summary(), nasty_lowering()], ids=["summary", "lowering"])
def test_names_and_reasons_are_text_and_nothing_else(report: Summary | LoweringReport) -> None:
    page = Page(report.to_html(title=NASTY[1]))
    assert len(page.scripts) == page.count("script") == 1
    assert not {"img", "iframe", "b", "link", "object"} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for name in NASTY:
        assert name in page.text
    assert page.count("style") == page.count("h1") == 1


@pytest.mark.parametrize("report", [nasty_summary(), nasty_lowering()], ids=["summary", "lowering"])
def test_nothing_comes_from_elsewhere(report: Summary | LoweringReport) -> None:
    html = report.to_html()
    page = Page(html)
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert all(link is not None and link.startswith("#") for link in links)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in style
    assert set(re.findall(r"url\([^)]*\)", style)) <= {"url(#hatch)"}
    policy = next(attributes for tag, attributes in page.elements if "http-equiv" in attributes)["content"]
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _tables(html: str) -> Iterator[ElementTree.Element]:
    for table in re.findall(r"<table.*?</table>", html, re.DOTALL):
        yield ElementTree.fromstring(table.replace("<wbr>", ""))


@pytest.mark.parametrize("report", [nasty_summary(), lowering_report(["a.weight", "b.weight"])], ids=["summary", "low"])
def test_every_table_has_headers_for_its_rows_and_columns(report: Summary | LoweringReport) -> None:
    tables = list(_tables(report.to_html()))
    assert tables
    for table in tables:
        heads = table.findall("thead/tr/th")
        assert all(head.get("scope") == "col" for head in heads)
        for row in table.findall("tbody/tr"):
            assert len(row) == len(heads)
            assert row[0].tag == "th"
            assert row[0].get("scope") == "row"


def test_bars_share_the_width_of_their_table() -> None:
    html = lowering_report(["a.weight"], readers=0).to_html()
    (table,) = re.findall(r'aria-labelledby="latency" tabindex="0">(<table>.*?</table>)', html, re.DOTALL)
    assert re.findall(r"--w:(\d+)", table)
    assert "viewBox" not in table  # or its text would grow with the bars
    assert "calc((100% - 145px) * var(--w) / 100)" in html


def test_figures_are_well_formed_and_named() -> None:
    html = lowering_report(["a.weight", "b.weight"], readers=3).to_html()
    figures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]
    assert len(figures) == 1 + 2 + 4 + 2  # landscape, definitions, latency a layer and batch size, removals
    assert all(figure.get("aria-label") or figure.get("aria-hidden") for figure in figures)
    ids = {element.get("id") for figure in figures for element in figure.iter() if element.get("id")}
    used = {element.get("href") for figure in figures for element in figure.iter("use")}
    assert used <= {f"#{name}" for name in ids}


def test_the_summary_says_what_the_model_says(tmp_path: Path) -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 4)), sparsity=0.9, rules={"1": None})
    report = sx.summary(model)
    report.save_html(tmp_path / "report.html", title="Two layers")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    (table,) = _tables(html)
    rows = [["".join(cell.itertext()) for cell in row] for row in table.findall("tbody/tr")]
    assert rows == [
        [
            "0.weight",
            "32\N{MULTIPLICATION SIGN}64",
            "6 of 64",
            "32 of 32",
            "90.6 %",
            "masked (dense compute)",
            "10.00 KiB",
            "",
        ],
        [
            "1.weight",
            "4\N{MULTIPLICATION SIGN}32",
            "32",
            "4 of 4",
            "0.0 %",
            "dense",
            "512 B",
            "the rule '1' leaves it dense",
        ],
    ]
    text = Page(html).text
    assert "Two layers" in text
    assert f"{report.kept:,}" in text
    assert f"of {report.total:,}" in text


def test_a_graph_module_names_its_nodes() -> None:
    rows = nasty_summary().rows
    assert Page(Summary(rows).to_html()).text.count("node") > 0
    plain = sx.summary(sx.sparsify(nn.Linear(64, 32)))
    assert ">node<" not in plain.to_html()


@pytest.mark.long
def test_a_lowered_model_reports_decisions_and_times(tmp_path: Path) -> None:
    model = sx.sparsify(nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 8)), rules={"2": None}).eval()
    report = sx.lower(model, (torch.randn(2, 256),), batch_sizes=(1, 4)).report
    report.save_html(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "0.weight" in page.text
    assert report.capture in page.text
    for batch, seconds in report.layers[0].seconds.items():
        assert f"batch {batch}" in page.text
        assert set(seconds) <= {"dense", "condensed", "shrunk"}
    again = LoweringReport.from_dict(json.loads(json.dumps(report.as_dict())))
    assert again.to_html() == report.to_html()
    assert "Layers" in sx.summary(sx.lower(model, (torch.randn(2, 256),), min_speedup=0)).to_html()


def test_removals_and_notes_survive_json_and_show() -> None:
    report = lowering_report(["a.weight", "b.weight", "c.weight", "d.weight", "e.weight"])
    assert LoweringReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    page = Page(report.to_html())
    assert "512 → 396 channels" in page.text
    assert "512 → 396 inputs: 104 folded into the bias, 12 contributed nothing" in page.text
    assert "its channels reach a layer norm" in page.text
    assert "25.0 %" in page.text  # of the FLOPs
    assert "and 3,000 of 9,000 parameters" in page.text
    assert "Select (" in page.text or "RemoveDead (" in page.text


def test_a_note_that_a_layer_gives_as_its_reason_is_told_once() -> None:
    report = lowering_report(["a.weight", "b.weight"])
    reason = report.layers[1].reason
    notes = (Note(where="b.weight", reason=reason, by="Select"), Note(where="b.weight", reason="tied", by="Match"))
    page = Page(LoweringReport(layers=report.layers, capture="", dynamic_batch=True, notes=notes).to_html())
    assert page.text.count(reason) == 1
    assert "Select" not in page.text
    assert "Match (1)" in page.text


def test_the_text_has_a_removal_section_only_where_channels_went_or_stayed() -> None:
    with_removals = lowering_report(["a.weight"])
    assert "channels 516 -> 404, parameters 9,000 -> 6,000, FLOPs a sample 20,000 -> 15,000" in str(with_removals)
    assert "512 -> 400" in str(with_removals)
    bare = LoweringReport(layers=with_removals.layers, capture="torch.export", dynamic_batch=True)
    assert "channels" not in str(bare)
    assert "channels" not in Page(bare.to_html()).text
    weight = Removal(fqn="a", rows=8, ablated=2, rows_removed=0, columns=4, columns_removed=0)
    nothing = Removals(weights=(weight,), channels=(8, 8), parameters=(9, 9), flops=(64, 64))
    assert format_removals([nothing]) == ""
    stays = format_removals([replace(nothing, weights=(replace(weight, kept={"a layer norm": 2}),))])
    assert stays.splitlines()[0] == "2 ablated rows stay"
    assert "->" not in stays


def test_what_is_told_of_rows_that_stay() -> None:
    weight = Removal(
        fqn="a.weight", rows=8, ablated=2, rows_removed=0, columns=4, columns_removed=0,
        kept={"it is an output of the model": 2},
    )  # fmt: skip
    removals = Removals(weights=(weight,), channels=(8, 8), parameters=(9, 9), flops=(64, 64))
    note = Note(where="a.weight", reason="2 of 2 ablated rows stay in the graph: 2 because ...", by="RemoveDead")
    for region, why in (("", "it is an output of the model"), ("a", "code outside this graph reads it")):
        report = LoweringReport(
            layers=(layer("a.weight", region=region),),
            capture="",
            dynamic_batch=True,
            removals=(removals, removals),
            notes=(note,),
        )
        text, page = str(report), Page(report.to_html()).text
        assert text.count("4 ablated rows stay") == 1
        assert why in text
        assert why in page
        assert "Channels removed" in page  # as 0
        assert "Removed channels" not in page
        assert "Notes by pass" not in page
        assert len(repr(report)) < 200


def test_a_masked_weight_that_runs_densely_is_drawn_as_it_is_stored() -> None:
    row = {"name": "a", "neurons": 6, "active_neurons": 3, "dense_fan_in": 100, "kept": 60}
    dense, shrunk, condensed = landscape([{**row, "status": status} for status in ("dense", "shrunk", "condensed")])
    assert (dense["height"], shrunk["height"], condensed["height"]) == (100, 50, 10)
    assert dense["label"] == "a: 60 of 600 weights kept, 600 stored"


def test_the_area_of_the_landscape_is_what_is_left() -> None:
    rows = [
        {"name": "a", "neurons": 6, "dense_fan_in": 100, "kept": 60, "status": "condensed"},
        {"name": "b", "neurons": 4, "dense_fan_in": 100, "kept": 400, "status": "dense"},
    ]
    columns = landscape(rows)
    assert sum(column["width"] * column["height"] for column in columns) == pytest.approx(1000 * 100 * 460 / 1000)
    assert [column["x"] for column in columns] == [0.0, 600.0]
    assert all(column["y"] + column["height"] == 100 for column in columns)
    assert landscape([]) == []


def test_bars_are_as_long_as_the_times_they_stand_for() -> None:
    figure = latency(layer("a.weight", "shrunk").__dict__)[64]  # type: ignore[index]
    assert [bar["share"] for bar in figure["bars"]] == [100, 33, 67]
    assert [bar["chosen"] for bar in figure["bars"]] == [False, False, True]
    assert figure["speedup"] == 1.5


def test_ribbons_leave_and_arrive_at_the_bars() -> None:
    weight = {"fqn": "fc1.weight", "rows": 100, "rows_removed": 25}
    reader = {"fqn": "fc2.weight", "columns": 4900, "columns_removed": 1225, "folded": {"bias": 1225}}
    figure = removal(weight, [(reader, ["relu", "max_pool2d"])] * 8)
    producer, first = figure["producer"], figure["readers"][0]
    assert producer["kept"] == first["kept"] == 36  # of 48
    assert first["stays"].startswith(f"M{producer['x'] + 10} {producer['y']}C")
    assert f"{first['x']} {first['y']}V{first['y'] + 36}" in first["stays"]
    assert f"{first['x']} {first['y'] + 36}V{first['y'] + 48}" in first["gone"]
    assert first["through"] == "relu → max_pool2d"
    assert len(figure["readers"]) + figure["more"] == 8
    assert figure["height"] > figure["readers"][-1]["y"] + 48
    assert removal(weight, [])["readers"] == []


@pytest.mark.long
def test_a_page_of_a_thousand_layers_stays_small() -> None:
    names = [f"model.encoder.layers.{index}.mlp.fc1.weight" for index in range(1000)]
    html = lowering_report(names).to_html()
    page = Page(html)
    assert len(html.encode()) < 2_000_000
    assert all(name in page.text for name in names)
    summary = Summary(tuple(nasty_summary().rows[0] for _ in range(1000)))
    assert len(summary.to_html().encode()) < 1_000_000


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    save_page(tmp_path / "report.html", "before")
    with pytest.raises(OSError, match="missing"):
        save_page(tmp_path / "missing" / "report.html", "after")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_an_empty_report_is_a_page() -> None:
    report = LoweringReport(layers=(), capture="torch.export", dynamic_batch=False)
    assert "one batch size; not verified" in Page(report.to_html()).text
    assert "0 of 0" in Page(Summary(()).to_html()).text


def test_several_regions_are_named_and_failed_captures_told() -> None:
    plain = lowering_report(["a.weight", "b.weight"]).as_dict()
    for entry, region in zip(plain["layers"], ("backbone", "head.0"), strict=True):
        entry["region"] = region
    failure = {"name": "", "type": "Net", "attempt": "torch.export, dynamic batch", "error": "a branch on <data>"}
    html = lowering_page({**plain, "capture_failures": [failure, {**failure, "name": "neck.1"}]})
    page = Page(html)
    for text in (
        "region",
        "backbone",
        "head.0",
        "the model",
        "neck.1",
        "torch.export, dynamic batch",
        "a branch on <data>",
    ):
        assert text in page.text
    assert len(list(_tables(html))) == len(list(_tables(lowering_page(plain)))) + 1


@pytest.mark.long
def test_the_example_writes_both_pages(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the extra [demo] is not installed")
    monkeypatch.syspath_prepend(str(checkout / "examples"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests of this process keep theirs
    written = import_module("report").main(tmp_path, steps=20)
    assert all("fc1.weight" in Page(path.read_text(encoding="utf-8")).text for path in written)
    assert "summary.html" in capsys.readouterr().out
