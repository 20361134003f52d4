"""The tables of docs/kernels.md, made from those of the code; run as a script (``make tables``), it writes them."""

from pathlib import Path

from srigl_fx.runtime import activations, value_types
from srigl_fx.runtime.cpu.kernels import table
from srigl_fx.runtime.cuda import table as cuda_table

MADE = {"kernels": table.as_markdown, "activations": activations.as_markdown, "values": value_types.as_markdown}
MADE["cuda kernels"] = cuda_table.as_markdown


def with_tables(page: str) -> str:
    """The page with each table as the code has it now; what stands outside of their marks stays."""
    for name, made in MADE.items():
        before, begin, rest = page.partition(f"<!-- {name} -->\n\n")
        _, end, after = rest.partition(f"\n\n<!-- end {name} -->")
        assert begin, f"the page has no place for the table of {name}"
        assert end, f"the table of {name} has no end on the page"
        page = before + begin + made() + end + after
    return page


if __name__ == "__main__":
    file = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
    file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
