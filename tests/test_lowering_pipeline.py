"""One pipeline from a captured graph to condensed operators: passes anywhere in it, and each written down as text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.errors import LoweringError, PassError
from srigl_fx.passes.arrange_samples import ArrangeSamples
from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.calibrate import Calibrate
from srigl_fx.passes.condense import Condense
from srigl_fx.passes.condensed_nodes import condensed_nodes
from srigl_fx.passes.feature_major import FeatureMajor
from srigl_fx.passes.pipelines import CONDENSING, LOWERING
from srigl_fx.passes.program import Program
from srigl_fx.passes.select import Select

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    network = nn.Sequential(nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    return mask_by_hand(randomise(network), 0.4).eval()


class Look(Pass[Program]):
    """Notes how many condensed operators there are by now."""

    def run(self, subject: Program) -> PassResult[Program]:
        count = len(list(condensed_nodes(subject.module.graph)))
        return PassResult(subject=subject, changed=False, notes=(Note(where="here", reason=f"{count} condensed"),))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "seen"),
    [
        ((Look(), *LOWERING), "0"),
        ((*LOWERING, Look()), "0"),
        ((*LOWERING, *CONDENSING[:4], Look(), *CONDENSING[4:]), "0"),
        ((*LOWERING, *CONDENSING[:5], Look(), *CONDENSING[5:]), "2"),
        ((*LOWERING, *CONDENSING, Look()), "2"),
    ],
    ids=["in front", "before layers are matched", "before they are condensed", "behind that", "at the end"],
)
def test_a_pass_goes_anywhere(passes: tuple[Pass[Program], ...], seen: str) -> None:
    network = model()
    lowered = sx.lower(network, (X,), min_speedup=0, passes=passes)
    (note,) = [note for note in lowered.report.notes if note.by == "Look"]
    assert note.reason == f"{seen} condensed"
    assert note.reason in str(lowered.report)
    torch.testing.assert_close(lowered(X), network(X), rtol=0, atol=1e-5)
    assert [layer.decision for layer in lowered.report.layers] == ["condensed", "condensed"]


@pytest.mark.long
def test_each_pass_is_written_down(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "dump"
    sx.lower(model(), (X,), min_speedup=0, dump=folder)
    names = [step.name for step in (*LOWERING, *CONDENSING)]
    files = sorted(path.name for path in folder.glob("[0-9]*"))
    assert files == ["00 captured.txt", *(f"{number:02} {name}.txt" for number, name in enumerate(names, 1))]
    text = {path.name.split()[1].removesuffix(".txt"): path.read_text() for path in folder.glob("[0-9]*")}
    assert "batch_norm" in text["captured"]
    assert "batch_norm" in text["ToLinear"]
    assert "batch_norm" not in text["FoldBatchNorm"].partition("\n\n")[2]
    assert text["Condense"].startswith("# Condense: changed, ")
    assert "+2 srigl_fx.condensed_linear.default, -2 aten.linear.default" in text["Condense"]
    assert "srigl_fx.condensed_linear" not in text["Select"]
    assert "-1 aten.relu.default" in text["FuseEpilogues"]
    table = (folder / "passes.txt").read_text().splitlines()
    assert [line.split()[1] for line in table[2:]] == names


class Fails(Pass[Program]):
    only_improves = True

    def run(self, subject: Program) -> PassResult[Program]:
        subject.module.graph.erase_node(list(subject.module.graph.nodes)[-1])
        raise ArithmeticError("not today")


@pytest.mark.slow
def test_a_pass_that_was_undone_says_so_in_its_file(tmp_path: Path) -> None:
    sx.lower(model(), (X,), min_speedup=0, passes=(*LOWERING, Fails()), dump=tmp_path)
    before, failed = ((tmp_path / f"{name}.txt").read_text() for name in ("06 RemoveDead", "07 Fails"))
    assert failed.startswith("# Fails: undone, ")
    assert "not today" in failed
    assert failed.partition("\n\n")[2] == before.partition("\n\n")[2]


@pytest.mark.slow
def test_a_second_dump_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    sx.lower(model(), (X,), min_speedup=0, passes=(*LOWERING, *CONDENSING, Look()), dump=tmp_path)
    sx.lower(model(), (X,), min_speedup=0, dump=tmp_path)
    assert not list(tmp_path.glob("* Look.txt"))


@pytest.mark.long
def test_a_dump_removes_nothing_but_files_of_a_dump(tmp_path: Path) -> None:
    def texts(*names: str) -> dict[Path, str]:
        return {tmp_path / name: f"mine: {name}" for name in names}

    mine = texts("07 groceries.txt", "01 Look", "notes/passes.txt", "notes/00 captured.txt", "first/01 mine.txt")
    for file, text in mine.items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    (tmp_path / "empty").mkdir()
    sx.lower(Parts().eval(), (X,), min_speedup=0, passes=(Look(), *LOWERING), dump=tmp_path)
    assert (tmp_path / "first" / "01 Look.txt").exists()
    sx.lower(model(), (X,), min_speedup=0, dump=tmp_path)
    assert {file: file.read_text() for file in mine} == mine
    assert [file.name for file in (tmp_path / "first").iterdir()] == ["01 mine.txt"]
    sx.lower(Parts().eval(), (X,), min_speedup=0, dump=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "01 Look",
        "07 groceries.txt",
        "empty",
        "first",
        "notes",
    ]


@pytest.mark.slow
def test_a_table_of_other_columns_is_no_dump(tmp_path: Path) -> None:
    (tmp_path / "passes.txt").write_text("   name\n   ----\n 1  Look  0.1 s  \n")
    for name in ("00 captured.txt", "01 Look.txt"):
        (tmp_path / name).write_text("mine")
    sx.lower(model(), (X,), min_speedup=0, dump=tmp_path)
    assert (tmp_path / "01 Look.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("make", [model, lambda: Parts().eval()], ids=["one graph", "two"])
def test_a_pass_that_raises_is_the_last_line_of_the_table(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    class Raises(Fails):
        only_improves = False

    with pytest.raises(PassError, match="Raises failed"):
        sx.lower(make(), (X,), min_speedup=0, passes=(*LOWERING, Raises()), dump=tmp_path)
    (table,) = tmp_path.rglob("passes.txt")
    number, name, *rest = table.read_text().splitlines()[-1].split()
    assert (number, name, rest[-1]) == ("7", "Raises", "failed")
    text = (table.parent / "07 Raises.txt").read_text()
    assert text.startswith("# Raises: failed, ")
    assert "ArithmeticError: not today" in text
    assert text.partition("\n\n")[2] == (table.parent / "06 RemoveDead.txt").read_text().partition("\n\n")[2]


@pytest.mark.slow
def test_finding_layers_is_a_change(tmp_path: Path) -> None:
    sx.lower(model(), (X,), min_speedup=0, passes=(*LOWERING, Look()), dump=tmp_path)
    lines = [line.split() for line in (tmp_path / "passes.txt").read_text().splitlines()[2:]]
    outcomes = {name: outcome for _, name, _, _, outcome, *_ in lines}
    assert outcomes["Look"] == "unchanged"
    assert [outcomes[name] for name in ("MatchWeights", "Select", "Condense")] == ["changed"] * 3
    assert (tmp_path / "08 MatchWeights.txt").read_text().startswith("# MatchWeights: changed, ")


def _file_in_its_place(folder: Path) -> Path:
    folder.write_text("no folder")
    return folder


def _below_a_file(folder: Path) -> Path:
    return _file_in_its_place(folder) / "dump"


def _folder_in_place_of(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).mkdir(parents=True)
        return folder

    return make


def _full_disk(folder: Path) -> Path:
    """A device that takes no byte stands where the table of the passes is written."""
    folder.mkdir()
    (folder / "passes.txt").symlink_to("/dev/full")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "where", "why"),
    [
        (_file_in_its_place, "dump", "File exists"),
        (_below_a_file, "dump/dump", "Not a directory"),
        (lambda folder: folder / "a\0b", "b", "null"),
        (_folder_in_place_of("00 captured.txt"), "00 captured.txt", "Is a directory"),
        (_folder_in_place_of("passes.txt"), "passes.txt", "Is a directory"),
        (_full_disk, "passes.txt", "No space left on device"),
    ],
    ids=[
        "a file in its place",
        "below a file",
        "no path",
        "a folder for a graph",
        "a folder for the table",
        "full disk",
    ],
)
def test_a_dump_that_cannot_be_written_is_an_error_and_the_model_as_it_was(
    make: Callable[[Path], Path], where: str, why: str, tmp_path: Path
) -> None:
    network = model()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(LoweringError, match=rf"dump: .*{where} cannot be written \(.*({why})"):
        sx.lower(network, (X,), min_speedup=0, dump=make(tmp_path / "dump"))
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    sx.lower(network, (X,), min_speedup=0, dump=tmp_path / "another")


@pytest.mark.slow
def test_a_part_whose_dump_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("no folder")
    with pytest.raises(LoweringError, match=r"dump: .*first cannot be written \(File exists"):
        sx.lower(Parts().eval(), (X,), min_speedup=0, dump=tmp_path)


def test_a_dump_that_is_no_path_is_refused() -> None:
    with pytest.raises(LoweringError, match="dump must be the path of a folder, not 3"):
        sx.lower(model(), (X,), min_speedup=0, dump=3)  # type: ignore[arg-type]
    with pytest.raises(LoweringError, match="dump must be the path of a folder, not ''"):
        sx.lower(model(), (X,), min_speedup=0, dump="")


@pytest.mark.slow
def test_a_pass_may_have_a_name_that_no_file_has(tmp_path: Path) -> None:
    class Named(Look):
        @property
        def name(self) -> str:
            return "../my/pass"

    sx.lower(model(), (X,), min_speedup=0, passes=(Named(), *LOWERING), dump=tmp_path / "dump")
    assert (tmp_path / "dump" / "01 .._my_pass.txt").read_text().startswith("# ../my/pass: ")


class Parts(nn.Module):
    """No graph as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = model(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        return self.last(y) if float(y.sum()) > 0 else y


@pytest.mark.long
def test_each_part_of_a_model_has_a_folder(tmp_path: Path) -> None:
    sx.lower(Parts().eval(), (X,), min_speedup=0, dump=tmp_path)
    assert "condensed_linear" in (tmp_path / "first" / "11 Condense.txt").read_text()


def _instead_of(kind: type[Pass[Program]], step: Pass[Program]) -> tuple[Pass[Program], ...]:
    return tuple(step if type(own) is kind else own for own in (*LOWERING, *CONDENSING))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Calibrate, Select, FeatureMajor, ArrangeSamples])
def test_a_class_made_of_one_of_the_librarys_runs_in_its_place(kind: Any) -> None:
    class Own(kind):  # type: ignore[misc]
        def run(self, subject: Program) -> PassResult[Program]:
            result = super().run(subject)
            return PassResult(subject=result.subject, changed=True, notes=(Note(where="here", reason="mine"),))

    own = Own()
    before = dict(vars(own))
    options: dict[str, Any] = {"min_speedup": 0, "batch_sizes": (2,), "passes": _instead_of(kind, own)}
    if kind is Calibrate:
        options |= {"value_dtype": torch.int8, "calibration": [X]}
    report = sx.lower(model(), (X,), **options).report
    assert [note.by for note in report.notes if note.reason == "mine"] == ["Own"]
    assert vars(own) == before
    assert kind is not Calibrate or all(layer.calibrated for layer in report.layers)


@pytest.mark.slow
@pytest.mark.parametrize(("least", "decision"), [(1e9, "dense"), (0, "condensed")])
def test_a_speedup_of_its_own_counts_before_that_of_the_call(least: float, decision: str) -> None:
    passes = _instead_of(Select, Select(min_speedup=least))
    report = sx.lower(model(), (X,), min_speedup=1e9 - least, passes=passes).report
    assert [layer.decision for layer in report.layers] == [decision] * 2


@pytest.mark.long
def test_a_part_may_have_a_name_that_no_folder_has(tmp_path: Path) -> None:
    class Named(Parts):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a/b": self.first, str(tmp_path / "elsewhere"): self.last})
            del self.first, self.last

        def forward(self, x: Tensor) -> Any:
            first, last = self.parts.values()
            y = first(x)
            return last(y) if float(y.sum()) > 0 else y

    sx.lower(Named().eval(), (X,), min_speedup=0, dump=tmp_path / "dump")
    assert (tmp_path / "dump" / "parts.a_b" / "11 Condense.txt").exists()
    sx.lower(model(), (X,), min_speedup=0, dump=tmp_path / "dump")
    assert not [path.name for path in (tmp_path / "dump").iterdir() if path.is_dir()]
    assert [path.name for path in tmp_path.iterdir()] == ["dump"]


class Masked(Pass[Program]):
    """Notes which tensors it is told are masked."""

    def run(self, subject: Program) -> PassResult[Program]:
        said = ", ".join(sorted(f"{target} of {masked.fqn}" for target, masked in subject.masked.items()))
        return PassResult(subject=subject, changed=False, notes=(Note(where="here", reason=said),))


@pytest.mark.slow
def test_a_pass_in_front_sees_the_masks() -> None:
    report = sx.lower(model(), (X,), min_speedup=0, passes=(Masked(), *LOWERING)).report
    (note,) = [note for note in report.notes if note.by == "Masked"]
    assert note.reason == "0.weight of 0.weight, 3.weight of 3.weight"


@pytest.mark.parametrize(
    "passes",
    [(), *((*LOWERING[:i], *LOWERING[i + 1 :]) for i in range(len(LOWERING)))],
    ids=["none", *(f"without {step.name}" for step in LOWERING)],
)
def test_each_pass_before_layers_are_matched_can_be_left_out(passes: tuple[Pass[Program], ...]) -> None:
    network = model()
    lowered = sx.lower(network, (X,), min_speedup=0, passes=passes)
    assert [layer.decision for layer in lowered.report.layers] == ["condensed", "condensed"]
    assert lowered.report.bytes_after > 0
    torch.testing.assert_close(lowered(X), network(X), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_notes_of_parts_name_the_part() -> None:
    report = sx.lower(Pair().eval(), (X,), min_speedup=0, passes=(*LOWERING, Look())).report
    assert [note.where for note in report.notes if note.by == "Look"] == ["first: here", "last: here"]
    assert "Look: last: here: 0 condensed" in str(report)


class Pair(Parts):
    """Two graphs with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.last = mask_by_hand(randomise(nn.Linear(4, 4)), 0.5)  # type: ignore[assignment]


def test_a_pipeline_without_its_end_is_not_completed_twice() -> None:
    lowered = sx.lower(model(), (X,), min_speedup=0, passes=(*LOWERING, *CONDENSING[:4], Condense()))
    assert [layer.decision for layer in lowered.report.layers] == ["condensed", "condensed"]
    assert "aten.relu" in lowered.code  # type: ignore[operator]


def test_the_page_on_passes_lists_the_pipeline(checkout: Path) -> None:
    page = (checkout / "docs" / "writing-a-pass.md").read_text(encoding="utf-8")
    rows = page.partition("| pass | what it does |")[2].partition("\n\n")[0].splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == [step.name for step in (*LOWERING, *CONDENSING)]
