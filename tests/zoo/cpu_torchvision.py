"""Lets a torchvision that was built for CUDA be imported beside a PyTorch that was built for the CPU.

The operators of such a torchvision do not load, and its import ends in an error that takes timm and half of
transformers with it. Importing this module changes what ``import torchvision`` does in this process: where they do not
load, their schemas are declared first, and ``nms`` and ``roi_align`` run in Python. Owns that repair only; where
torchvision is absent, or loads by itself, nothing happens. ``.ci/install_zoo.py`` lets every interpreter of the test
environment import it at its start, so it imports nothing that costs time before torchvision is asked for.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

_LIBRARIES: list[Any] = []


class _Finder:
    """Finds torchvision as Python does, and gives it the loader that repairs it."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Declares the operators before the package runs, where their library does not load."""

    def exec_module(self, module: ModuleType) -> None:
        import torch

        if hasattr(torch.ops.torchvision, "nms") or _library_loads(Path(self.path).parent):
            super().exec_module(module)
            return
        make: Any = torch.library.Library
        library = make("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", _nms, "CPU")
        _LIBRARIES.append(library)
        super().exec_module(module)
        sys.modules["torchvision.ops.boxes"]._assert_has_ops = lambda: None  # type: ignore[attr-defined]
        align: Any = sys.modules["torchvision.ops.roi_align"]
        align._roi_align = align._roi_align.__wrapped__  # without torch.compile, which needs a C++ compiler


def _library_loads(folder: Path) -> bool:
    import torch

    load: Any = torch.ops.load_library
    for library in folder.glob("_C*.so"):
        try:
            load(str(library))
        except OSError:
            continue
        return True
    return False


def _nms(dets: Any, scores: Any, iou_threshold: float) -> Any:
    """Greedy suppression of boxes (x1, y1, x2, y2) that overlap a better one by more than ``iou_threshold``."""
    import torch

    order = scores.argsort(descending=True)
    x1, y1, x2, y2 = dets.unbind(1)
    areas = (x2 - x1) * (y2 - y1)
    keep = []
    while order.numel():
        best, rest = order[0], order[1:]
        keep.append(best)
        width = (torch.minimum(x2[best], x2[rest]) - torch.maximum(x1[best], x1[rest])).clamp(min=0)
        height = (torch.minimum(y2[best], y2[rest]) - torch.maximum(y1[best], y1[rest])).clamp(min=0)
        overlap = width * height
        order = rest[overlap / (areas[best] + areas[rest] - overlap) <= iou_threshold]
    return torch.stack(keep) if keep else torch.empty(0, dtype=torch.long)


if not any(getattr(finder, "__module__", "").endswith("cpu_torchvision") for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder)
