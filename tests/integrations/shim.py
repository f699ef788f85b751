"""torchvision's wheel on a CPU build of torch: declare the two operators its import looks up."""

import sys

import torch


def ensure_torchvision() -> str:
    """Import torchvision and say how: ``"native"``, ``"shim"`` (all but nms works), ``"missing"``.

    Raises:
        RuntimeError: Its import fails for another reason than the two operators.
    """
    try:
        import torchvision
    except ModuleNotFoundError:
        return "missing"
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return "native"
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", schema)
    import torchvision  # noqa: F401

    return "shim"
