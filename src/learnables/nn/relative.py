"""Learned numbers for how far apart two tokens are, added to their attention logit.

Shapes: B batch, H heads, N tokens, d head dim, h × w window.
"""

from typing import final

import torch
from torch import Tensor

from learnables.declare import parameter
from learnables.errors import ShapeError
from learnables.init.base import Init
from learnables.init.fixed import zeros
from learnables.init.random import trunc_normal
from learnables.init.scaled import xavier_uniform
from learnables.nn.component import Component
from learnables.nn.resample import Grid, ResampleLine, ResampleOffsets


@final
class RelativeBias(Component):
    """One learned number for each head and each offset between two places of a window.

    Rows are ordered as in Swin and BEiT (row offset first, query minus key, then the three of
    BEiT), so their checkpoints load. A checkpoint of another window is resampled on load: bicubic,
    anti-aliased, in fp32, for each head. There is no index buffer: the table is read through
    strided views.

    Parameters:
        table ((2h − 1)(2w − 1) [+ 3], H): ``trunc_normal(0.02)``. No decay, as in Swin; the rule of
            the transformers Trainer decays it unless its name contains "bias".

    Args:
        window: (h, w), or one number for a square.
        num_heads: H.
        prefix: Number of tokens in front of the window. They share three numbers: prefix to place,
            place to prefix, prefix to prefix.
        init: Another initialiser.

    Source:
        Liu et al., *Swin Transformer*, arXiv:2103.14030; Bao et al., *BEiT*, arXiv:2106.08254.

    Example:
        >>> import learnables as ln
        >>> relative = ln.nn.RelativeBias((2, 3), num_heads=4, prefix=1)
        >>> relative(torch.zeros(2, 4, 7, 7)).shape
        torch.Size([2, 4, 7, 7])
    """

    def __init__(
        self, window: int | Grid, num_heads: int, prefix: int = 0, *, init: Init | None = None
    ) -> None:
        super().__init__()
        self.window, self.prefix = _pair(window), prefix
        height, width = self.window
        extra = 3 if prefix else 0
        self.table = parameter(
            (2 * height - 1) * (2 * width - 1) + extra,
            num_heads,
            init=init or trunc_normal(0.02),
            weight_decay=False,
            resize=ResampleOffsets(self.window, extra),
            tags=("position",),
        )

    def bias(self) -> Tensor:
        """(H, N, N), for ``scaled_dot_product_attention(attn_mask=)``."""
        height, width = self.window
        offsets = (2 * height - 1, 2 * width - 1)
        places = offsets[0] * offsets[1]
        table = self.table[:places].reshape(*offsets, -1).movedim(2, 0)  # (H, offsets)
        bias = by_pair(table)
        if not self.prefix:
            return bias
        out, back, among = self.table[places:]  # each (H)
        heads, n, p = bias.shape[0], bias.shape[1], self.prefix
        top = [among.view(-1, 1, 1).expand(heads, p, p), out.view(-1, 1, 1).expand(heads, p, n)]
        return torch.cat(
            [
                torch.cat(top, dim=2),
                torch.cat([back.view(-1, 1, 1).expand(heads, n, p), bias], dim=2),
            ],
            dim=1,
        )

    def forward(self, logits: Tensor) -> Tensor:
        """(B, H, N, N) → the same with the bias added, in the dtype of ``logits``.

        Raises:
            ShapeError: ``logits`` has another number of heads or tokens.
        """
        return _add(logits, self.bias())


@final
class AttentionBias(Component):
    """One learned number for each head and each *distance* along rows and columns of a window.

    As `RelativeBias`, but 3 to the left and 3 to the right are one: h · w numbers for each head.
    A checkpoint of another window is resampled on load: bicubic, anti-aliased, for each head.

    Parameters:
        table (H, h · w): zeros. No decay.

    Args:
        window: (h, w), or one number for a square.
        num_heads: H.
        init: Another initialiser.

    Source:
        Graham et al., *LeViT*, arXiv:2104.01136.

    Example:
        >>> import learnables as ln
        >>> ln.nn.AttentionBias((2, 3), num_heads=4)(torch.zeros(2, 4, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(self, window: int | Grid, num_heads: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.window = _pair(window)
        self.table = parameter(
            num_heads,
            self.window[0] * self.window[1],
            init=init or zeros(),
            weight_decay=False,
            resize=ResampleOffsets(self.window, signed=False, by_column=True),
            tags=("position",),
        )

    def bias(self) -> Tensor:
        """(H, N, N), for ``scaled_dot_product_attention(attn_mask=)``."""
        table = self.table.reshape(-1, *self.window)
        for dim in (1, 2):  # mirror distances to signed offsets
            table = torch.cat([table.narrow(dim, 1, table.shape[dim] - 1).flip(dim), table], dim)
        return by_pair(table)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, H, N, N) → the same with the bias added, in the dtype of ``logits``.

        Raises:
            ShapeError: ``logits`` has another number of heads or tokens.
        """
        return _add(logits, self.bias())


@final
class DecomposedRelativeBias(Component):
    """Learned vectors for row and for column offsets; the query decides what they are worth.

    A checkpoint of another window is resampled on load along each axis: linear, as in MViT and SAM.

    Parameters:
        rows (2h − 1, d): zeros. No decay, as in timm's MViTv2; its SAM decays the same thing.
        columns (2w − 1, d): likewise.

    Args:
        window: (h, w), or one number for a square.
        head_dim: d.
        init: Another initialiser, for both.

    Source:
        Li et al., *MViTv2*, arXiv:2112.01526; Kirillov et al., *Segment Anything*,
        arXiv:2304.02643.

    Example:
        >>> import learnables as ln
        >>> relative = ln.nn.DecomposedRelativeBias((2, 3), head_dim=8)
        >>> relative(torch.zeros(2, 4, 6, 6), q=torch.zeros(2, 4, 6, 8)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(self, window: int | Grid, head_dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        self.window = _pair(window)
        self.rows = parameter(
            2 * self.window[0] - 1,
            head_dim,
            init=init or zeros(),
            weight_decay=False,
            resize=ResampleLine(0, "linear"),
            tags=("position",),
        )
        self.columns = parameter(
            2 * self.window[1] - 1,
            head_dim,
            init=init or zeros(),
            weight_decay=False,
            resize=ResampleLine(0, "linear"),
            tags=("position",),
        )

    def forward(self, logits: Tensor, q: Tensor) -> Tensor:
        """(B, H, N, N) and the queries (B, H, N, d) → the logits with the bias added.

        Args:
            logits: Already scaled by 1/√d.
            q: Not scaled, as in MViTv2.

        Raises:
            ShapeError: The tokens do not fill the window.
        """
        height, width = self.window
        if q.shape[-2] != height * width or logits.shape[-2:] != (q.shape[-2], q.shape[-2]):
            raise ShapeError(
                "the tokens do not fill the window",
                found=f"logits {tuple(logits.shape)}, q {tuple(q.shape)}",
                wanted=f"{height * width} tokens, a window {self.window}",
            )
        places = q.reshape(*q.shape[:-2], height, width, q.shape[-1])  # (B, H, h, w, d)
        rows = self.rows.to(q.dtype).unfold(0, height, 1).flip(-1)  # (h, d, h): [i, :, k] = i − k
        columns = self.columns.to(q.dtype).unfold(0, width, 1).flip(-1)
        by_row = torch.einsum("...ijd,idk->...ijk", places, rows)
        by_column = torch.einsum("...ijd,jdl->...ijl", places, columns)
        bias = by_row[..., :, None] + by_column[..., None, :]  # (B, H, h, w, h, w)
        return logits + bias.flatten(-2).flatten(-3, -2).to(logits.dtype)


@final
class ContentPositionBias(Component):
    """The u and v of Transformer-XL: queries shifted for content and for position.

    Parameters:
        content (H, d): Xavier-uniform. No decay.
        position (H, d): likewise.

    Args:
        num_heads: H.
        head_dim: d.
        init: Another initialiser, for both.

    Source:
        Dai et al., *Transformer-XL*, arXiv:1901.02860.

    Example:
        >>> import learnables as ln
        >>> q_u, q_v = ln.nn.ContentPositionBias(4, 8)(torch.zeros(2, 4, 6, 8))
        >>> q_u.shape
        torch.Size([2, 4, 6, 8])
    """

    def __init__(self, num_heads: int, head_dim: int, *, init: Init | None = None) -> None:
        super().__init__()
        init = init or xavier_uniform()
        self.content = parameter(
            num_heads, head_dim, init=init, weight_decay=False, tags=("position",)
        )
        self.position = parameter(
            num_heads, head_dim, init=init, weight_decay=False, tags=("position",)
        )

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, d) → q + u, which meets the keys, and q + v, which meets the positions."""
        return (
            q + self.content[:, None].to(q.dtype),
            q + self.position[:, None].to(q.dtype),
        )


def by_pair(table: Tensor) -> Tensor:
    """(H, 2h − 1, 2w − 1), one number for each offset → (H, h · w, h · w), one for each pair.

    ``unfold`` shows every window of consecutive offsets as a view, u[a, b] = t[a + b]; read
    backwards in b it is t[i − j + h − 1]. So no index is built, stored or gathered.
    """
    height, width = (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2
    pairs = table.unfold(1, height, 1).unfold(2, width, 1).flip(-2, -1)  # (H, h, w, h, w)
    return pairs.flatten(3).flatten(1, 2)


def _add(logits: Tensor, bias: Tensor) -> Tensor:
    if logits.shape[-3:] != bias.shape:
        raise ShapeError(
            "the logits have another number of heads or tokens than the bias",
            found=f"logits of shape {tuple(logits.shape)}",
            wanted=f"(…, {', '.join(map(str, bias.shape))})",
        )
    return logits + bias.to(logits.dtype)


def _pair(window: int | Grid) -> Grid:
    return (window, window) if isinstance(window, int) else (int(window[0]), int(window[1]))
