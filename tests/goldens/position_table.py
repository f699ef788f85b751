"""Make position_table.safetensors: what timm 1.0.31 makes of known tables of positions.

Run once with torch 2.13.0, torchvision 0.28.0 and timm 1.0.31 installed:

    python tests/goldens/position_table.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

CASES = {  # name: source grid, target grid, prefix
    "37x37_16x24_1": ((37, 37), (16, 24), 1),
    "14x14_24x16_5": ((14, 14), (24, 16), 5),
    "7x12_12x7_0": ((7, 12), (12, 7), 0),
    "8x8_3x5_0": ((8, 8), (3, 5), 0),
    "5x9_10x18_2": ((5, 9), (10, 18), 2),
}

BIASES = {"relative_3x4_0": ((3, 4), 0), "relative_2x5_1": ((2, 5), 1)}  # name: window, prefix


def table(source: tuple[int, int], prefix: int, dim: int = 4) -> torch.Tensor:
    """A rough but reproducible table: no random numbers, so that the source need not be stored."""
    rows = prefix + source[0] * source[1]
    phase = torch.arange(rows * dim, dtype=torch.float64)
    return torch.sin(phase * 12.9898).mul(43.758).frac().float().view(1, rows, dim)


def main() -> None:
    import timm
    from timm.layers import RelPosBias, resample_abs_pos_embed

    made = {
        name: resample_abs_pos_embed(
            table(source, prefix), list(target), list(source), num_prefix_tokens=prefix
        ).contiguous()
        for name, (source, target, prefix) in CASES.items()
    }
    for name, (window, prefix) in BIASES.items():
        relative = RelPosBias(window, num_heads=4, prefix_tokens=prefix)
        rows = relative.relative_position_bias_table
        rows.data.copy_(table((1, len(rows)), 0)[0])
        made[name] = relative.get_bias()[0].detach().contiguous()
    about = {"timm": timm.__version__, "torch": torch.__version__}
    save_file(made, Path(__file__).with_suffix(".safetensors"), metadata=about)


if __name__ == "__main__":
    main()
