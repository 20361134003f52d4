"""Install the pinned PyTorch into the environment that runs this script, as a CPU build where one is offered.

pip prefers ``2.13.0+cpu`` over ``2.13.0`` when it sees both, so all that is needed is to let it look at PyTorch's own
CPU index. An index that cannot be reached would make pip retry for minutes: it is asked once, briefly, and left out
if it does not answer. pip's usual indexes then decide alone.
"""

import os
import ssl
import subprocess
import sys
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SECONDS = 10
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def pinned() -> str:
    """The torch version that constraints.txt pins."""
    for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
        if line.startswith("torch=="):
            return line.removeprefix("torch==").strip()
    raise SystemExit(f"{CONSTRAINTS} pins no torch version")


def installed() -> str | None:
    """The installed torch version without its local part, or None."""
    try:
        return version("torch").partition("+")[0]
    except PackageNotFoundError:
        return None


def cpu_index_answers() -> bool:
    """Whether PyTorch's CPU index answers within a few seconds."""
    certificates = os.environ.get("PIP_CERT")
    try:
        context = ssl.create_default_context(cafile=certificates)
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=SECONDS, context=context) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def main() -> int:
    """Install torch unless the pinned version is there; return pip's exit status."""
    wanted = pinned()
    if installed() == wanted:
        return 0
    command = [sys.executable, "-m", "pip", "install", "--constraint", str(CONSTRAINTS), f"torch=={wanted}"]
    if cpu_index_answers():
        command += ["--extra-index-url", CPU_INDEX]
    else:
        print("PyTorch's CPU index does not answer from here: taking PyTorch from pip's own index.", flush=True)
    return subprocess.call(command)


if __name__ == "__main__":
    raise SystemExit(main())
