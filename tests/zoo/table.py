"""Makes the coverage table anew: ``python -m zoo.table``, in the folder ``tests``; names of models take only those.

Owns nothing but the loop. The table in the documentation is replaced as well.
"""

import argparse
import re
import tempfile
from pathlib import Path

import torch

from zoo import ZOO, coverage, journey

DOCS = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
TABLE = re.compile(r"(?<=<!-- coverage table -->\n).*?(?=<!-- end -->)", re.DOTALL)


def main() -> None:
    """Take models all the way and write down what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[[], *ZOO], help="all, if none is named")
    named = parser.parse_args().models or list(ZOO)
    torch.set_num_threads(1)
    rows = coverage.read() if coverage.FILE.exists() else {}
    for name in named:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = journey.travel(ZOO[name], Path(folder))
        coverage.write([rows[other] for other in ZOO if other in rows])
        print(rows[name], flush=True)
    print(coverage.text(list(rows.values())))
    page = DOCS.read_text(encoding="utf-8")
    table = coverage.markdown([rows[name] for name in ZOO if name in rows])
    DOCS.write_text(TABLE.sub(lambda _: f"\n{table}\n\n", page), encoding="utf-8")


if __name__ == "__main__":
    main()
