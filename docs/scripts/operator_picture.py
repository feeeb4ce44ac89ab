"""Draws docs/images/operator.svg, what the operator computes for one head of one window:

python docs/scripts/operator_picture.py > docs/images/operator.svg
"""

from __future__ import annotations

INK, QUIET, BACK = "#1f2328", "#59636e", "#ffffff"
BLUE, ORANGE, GREEN, GREY = "#4c78a8", "#e0873c", "#4f9d69", "#e7ebef"
FONT = "font-family='Inter, Helvetica, Arial, sans-serif'"


def text(x: float, y: float, words: str, size: int = 14, fill: str = INK, anchor: str = "middle") -> str:
    return (
        f"<text x='{x}' y='{y}' font-size='{size}' fill='{fill}' text-anchor='{anchor}' {FONT}>{words}</text>"
    )


def matrix(x: float, y: float, rows: int, columns: int, color: str, cell: int = 12, levels=None) -> str:
    """A matrix as cells; `levels(row, column)` in 0..1 shades them."""
    cells = []
    for r in range(rows):
        for c in range(columns):
            level = 0.55 if levels is None else levels(r, c)
            cells.append(
                f"<rect x='{x + c * cell}' y='{y + r * cell}' width='{cell - 1.5}' height='{cell - 1.5}' "
                f"rx='1.5' fill='{color}' fill-opacity='{level:.2f}'/>"
            )
    return "".join(cells)


def box(x: float, y: float, width: float, height: float, words: str, *below: str) -> str:
    out = f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='8' fill='{GREY}' stroke='{QUIET}'/>"
    middle = y + height / 2 + 5 - 8 * len(below)
    out += text(x + width / 2, middle, words, 15)
    return out + "".join(
        text(x + width / 2, middle + 3 + 14 * i, line, 11, QUIET) for i, line in enumerate(below, 1)
    )


def arrow(*points: tuple[float, float]) -> str:
    path = " ".join(f"{'M' if i == 0 else 'L'}{x} {y}" for i, (x, y) in enumerate(points))
    return f"<path d='{path}' fill='none' stroke='{QUIET}' stroke-width='1.6' marker-end='url(#tip)'/>"


def uneven(row: int, column: int) -> float:
    return 0.2 + 0.15 * ((row * 7 + column * 3 + row * column) % 5)


def sharp(row: int, column: int) -> float:
    """The same numbers after phi: the large ones larger."""
    return 0.08 + 0.9 * ((uneven(row, column) - 0.2) / 0.6) ** 3


def picture() -> str:
    width, height = 940, 430
    tip = (
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
        f"orient='auto'><path d='M0 0L8 4L0 8z' fill='{QUIET}'/></marker></defs>"
    )
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img'>",
        "<title>Focused linear attention of one head</title>",
        tip,
        f"<rect width='{width}' height='{height}' fill='{BACK}'/>",
    ]
    rows = 8
    for i, (name, color, y) in enumerate((("q", BLUE, 36), ("k", ORANGE, 166), ("v", GREEN, 296))):
        parts += [matrix(40, y, rows, 5, color, levels=uneven), text(70, y - 8, name, 16)]
        parts.append(text(26, y + 52, "N" if i == 0 else "M", 12, QUIET))
    parts.append(text(20, 416, "tokens x D channels of a head", 12, QUIET, "start"))

    # phi, sharper features
    for y, color, name in ((36, BLUE, "Q"), (166, ORANGE, "K")):
        parts += [
            arrow((108, y + 48), (146, y + 48)),
            box(150, y + 14, 120, 68, "&#966;", "sharpens a token,", "keeps its norm"),
        ]
        parts += [arrow((274, y + 48), (310, y + 48)), matrix(316, y, rows, 5, color, levels=sharp)]
        parts.append(text(346, y - 8, name, 16))

    # S and m from K and V
    parts += [arrow((384, 214), (456, 252)), arrow((108, 344), (456, 276))]
    parts += [box(460, 236, 128, 56, "S = K&#7488;V / M", "D x D, whatever N is")]
    parts += [arrow((384, 206), (456, 190)), box(460, 166, 128, 48, "m = mean of K")]

    # the result
    parts += [arrow((384, 84), (640, 84)), box(644, 58, 150, 52, "Q S / (Q m + &#949;)", "linear in N and M")]
    parts += [arrow((592, 190), (690, 190), (690, 114)), arrow((592, 264), (740, 264), (740, 114))]
    parts += [arrow((108, 368), (640, 368)), box(644, 342, 150, 52, "depthwise conv", "on the map H x W")]
    parts += [arrow((798, 84), (838, 84), (838, 196)), arrow((798, 368), (838, 368), (838, 240))]
    parts += [f"<circle cx='838' cy='218' r='17' fill='{GREY}' stroke='{QUIET}'/>", text(838, 224, "+", 20)]
    parts += [arrow((858, 218), (884, 218)), text(908, 223, "out", 16)]
    parts.append(text(719, 412, "restores the rank that linear attention loses", 11, QUIET))
    return "".join(part + "\n" for part in parts) + "</svg>\n"


if __name__ == "__main__":
    print(picture(), end="")
