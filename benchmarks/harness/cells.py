"""What was measured: one record for each contender and cell, and how records are written to CSV and read back.

Owns the names of the contenders, the records and the sums done on them. It must not know how they were measured or how
they are shown.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

TORCH_DENSE, ORT_DENSE = "torch dense", "ORT dense"
OPENVINO_DENSE = "OpenVINO dense"
ORT_INT8, OPENVINO_INT8 = "ORT dense int8", "OpenVINO dense int8"
OURS_TORCH, OURS_ORT = "ours in torch", "ours in ORT"
OURS_TORCH_INT8, OURS_ORT_INT8 = "ours in torch, int8", "ours in ORT, int8"
OURS_TORCH_BF16, OURS_ORT_BF16 = "ours in torch, bf16", "ours in ORT, bf16"
DEEPSPARSE, DEEPSPARSE_ORT = "DeepSparse", "ORT dense beside DeepSparse"
CSR_TORCH, CSR_SCIPY = "torch CSR", "SciPy CSR"
GATHER, GATHER_EAGER = "gather, torch.compile", "gather, eager"
DENSE_STEP, SPARSE_STEP = "dense step", "sparse step"

DENSE = (TORCH_DENSE, ORT_DENSE, OPENVINO_DENSE)
DENSE_INT8 = (ORT_INT8, OPENVINO_INT8)
OURS = (OURS_TORCH, OURS_ORT)
OURS_BF16 = (OURS_TORCH_BF16, OURS_ORT_BF16)
OURS_INT8 = (OURS_TORCH_INT8, OURS_ORT_INT8)
LINEAR = (*DENSE, *DENSE_INT8, *OURS, *OURS_INT8, DEEPSPARSE, DEEPSPARSE_ORT, CSR_TORCH, CSR_SCIPY, GATHER)
CONV = (*DENSE, *DENSE_INT8, *OURS, *OURS_INT8, DEEPSPARSE, DEEPSPARSE_ORT)

Cell = tuple[str, str, float, int, int]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One contender in one cell.

    Attributes:
        section: The part of the benchmark it belongs to.
        layer: The layer or the model.
        sparsity: Fraction of weights removed.
        batch: Samples.
        threads: Of the contender.
        contender: Its name.
        microseconds: The median of one call; NaN where it did not run.
        note: Why it did not run.
        bytes: What a call cannot avoid to move: six bytes for each kept weight (four with bf16, three with int8), the
            input and the output.
        fmas: Multiply-adds with the kept weights alone.
    """

    section: str
    layer: str
    sparsity: float
    batch: int
    threads: int
    contender: str
    microseconds: float = math.nan
    note: str = ""
    bytes: int = 0
    fmas: int = 0

    @property
    def cell(self) -> Cell:
        return self.section, self.layer, self.sparsity, self.batch, self.threads


def group(records: Iterable[Record]) -> dict[Cell, dict[str, Record]]:
    """The records of each cell by contender, cells in the order of their first record."""
    cells: dict[Cell, dict[str, Record]] = {}
    for record in records:
        cells.setdefault(record.cell, {})[record.contender] = record
    return cells


def best(cell: Mapping[str, Record], names: Sequence[str]) -> float:
    """The microseconds of the fastest of these contenders; NaN where none ran."""
    times = [cell[name].microseconds for name in names if name in cell]
    return min((time for time in times if not math.isnan(time)), default=math.nan)


def geometric_mean(values: Iterable[float]) -> float:
    """NaN where there is nothing.

    Example:
        >>> geometric_mean([1.0, 4.0])
        2.0
    """
    logarithms = [math.log(value) for value in values if not math.isnan(value)]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


def write_csv(path: Path, records: Iterable[Record]) -> None:
    """Write all records, in a moment: a run that is stopped leaves the cells it finished."""
    written = path.with_suffix(".part")
    with written.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)], lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow({**asdict(record), "microseconds": f"{record.microseconds:.3f}"})
    written.replace(path)


def read_csv(path: Path) -> list[Record]:
    """The records of a file that :func:`write_csv` wrote."""
    types = {field.name: field.type for field in fields(Record)}
    with path.open(newline="", encoding="utf-8") as file:
        return [Record(**{name: types[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]  # type: ignore[operator]
