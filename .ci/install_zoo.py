"""Install torchvision into the environment that runs this script, so that it works whatever build of PyTorch is there.

pip's own index has torchvision for CUDA only. It is taken without its dependencies, which would have pip replace a CPU
build of PyTorch, and every interpreter of the environment imports ``cpu_torchvision`` when it starts: a repair that
waits until somebody imports torchvision, and steps aside where torchvision works by itself.
"""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPAIR = ROOT / "tests" / "zoo" / "cpu_torchvision.py"
CONSTRAINTS = ROOT / "constraints.txt"


def main() -> int:
    """Install both; return pip's exit status."""
    packages = Path(sysconfig.get_path("purelib"))
    shutil.copyfile(REPAIR, packages / REPAIR.name)
    (packages / "cpu_torchvision.pth").write_text("import cpu_torchvision\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
    return subprocess.call([*command, "--no-deps", "torchvision"])


if __name__ == "__main__":
    raise SystemExit(main())
