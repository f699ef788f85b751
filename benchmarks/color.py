"""A colour matrix on images: one fused product against permuting, and against a 1×1 convolution.

Writes results/color.json. Half a minute on one core.

    python benchmarks/color.py
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from environment import paired, save
from torch import Tensor

import learnables as ln

SHAPES = ((64, 3, 32, 32), (16, 3, 224, 224))
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def rows() -> list[dict[str, object]]:
    color, found = ln.nn.ColorMatrix(3), []

    def permuted(x: Tensor) -> Tensor:
        return (x.permute(0, 2, 3, 1) @ color.matrix + color.bias).permute(0, 3, 1, 2)

    def convolved(x: Tensor) -> Tensor:
        return F.conv2d(x, color.matrix.t()[:, :, None, None], color.bias)

    for shape in SHAPES:
        for name, layout in FORMATS.items():
            x = torch.rand(shape).contiguous(memory_format=layout)
            for backward in (False, True):

                def run(
                    forward: Callable[[Tensor], Tensor],
                    x: Tensor = x,
                    layout: torch.memory_format = layout,
                    backward: bool = backward,
                ) -> Callable[[], object]:
                    def once() -> None:
                        with torch.set_grad_enabled(backward):
                            y = forward(x).contiguous(memory_format=layout)
                        if backward:
                            y.sum().backward()

                    return once

                tasks = {"ln.nn.ColorMatrix": run(color), "1×1 convolution": run(convolved)}
                timed = paired(run(permuted), tasks, rounds=9)
                for task, timing in timed.items():
                    row = {
                        "shape": list(shape),
                        "layout": name,
                        "backward": backward,
                        "task": "permute and @" if task == "baseline" else task,
                        "timing": timing,
                    }
                    found.append(row)
                    print(
                        f"{shape!s:20} {name:13} {'fwd+bwd' if backward else 'forward':8}"
                        f" {row['task']:18} {timing.median * 1e3:8.2f} ms {timing.ratio:6.2f}"
                    )
    return found


def main() -> None:
    torch.set_num_threads(1)
    print(save("color", rows()))


if __name__ == "__main__":
    main()
