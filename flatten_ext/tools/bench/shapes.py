"""The shapes that are timed: the attention calls of the published models at 224 px."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["QUICK_STAGES", "STAGES", "Shape", "token_ladder"]


@dataclass(frozen=True)
class Shape:
    """One attention call on `batch` maps of size (H, W).

    `window` is what a window attention uses on this map; ours attends globally, as in the published models.
    """

    name: str
    batch: int
    size: tuple[int, int]
    channels: int
    heads: int
    window: int = 7
    kernel_size: int = 5

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1]

    @property
    def head_dim(self) -> int:
        return self.channels // self.heads

    @property
    def label(self) -> str:
        return f"{self.name}  N={self.tokens} C={self.channels} h={self.heads}"

    @property
    def flops(self) -> int:
        """Of focused linear attention + DWC, forward: 4NCD for the two products, 2k^2NC for the taps."""
        per_token = 4 * self.channels * self.head_dim + 2 * self.kernel_size**2 * self.channels
        return self.batch * self.tokens * per_token

    @property
    def compulsory_bytes(self) -> int:
        """What a float32 forward must move: q, k and v in, the output out."""
        return 4 * 4 * self.batch * self.tokens * self.channels


def _stages(
    model: str, sides: tuple[int, ...], channels: tuple[int, ...], heads: tuple[int, ...]
) -> list[Shape]:
    rows = enumerate(zip(sides, channels, heads, strict=True), 1)
    return [Shape(f"{model} {i}", 8, (side, side), c, h) for i, (side, c, h) in rows]


STAGES = (
    *_stages("Swin-T", (56, 28, 14, 7), (96, 192, 384, 768), (3, 6, 12, 24)),
    *_stages("PVT-T", (56, 28, 14, 7), (64, 128, 320, 512), (1, 2, 5, 8)),
    Shape("DeiT-T", 8, (14, 14), 192, 3),
)

QUICK_STAGES = (Shape("quick 1", 2, (14, 14), 96, 3), Shape("quick 2", 2, (7, 7), 128, 2))


def token_ladder(first: int, last: int, step: int = 1) -> list[Shape]:
    """Maps of 2^first .. 2^last tokens, 64 channels, 2 heads, one image; as square as a power of two gets."""
    return [
        Shape(f"2^{e}", 1, (2 ** (e // 2), 2 ** ((e + 1) // 2)), 64, 2, window=8)
        for e in range(first, last + 1, step)
    ]
