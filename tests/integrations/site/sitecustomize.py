"""torchvision's wheel under a CPU build of torch, for programs that run as processes of their own.

Unlike ``shim.py`` it imports nothing before the program does: it waits for torchvision's import.
"""

import importlib.machinery
import sys
from typing import Any


class _BeforeTorchvision:
    """Declare the two operators that torchvision's import looks up, right before it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is None:
            return
        import torch

        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", schema)


sys.meta_path.insert(0, _BeforeTorchvision())
