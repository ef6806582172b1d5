"""Draw the figures of the documentation into `docs/figures`, each once on light and once on dark paper.

``python docs/draw.py`` writes them all. They are SVG written by hand: no package is needed, and the same code gives the
same bytes, so that a test can tell a figure that is out of date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1f2328", "faint": "#818b98", "rule": "#d1d9e0", "hold": "#eff2f5"},
    "dark": {"paper": "#0d1117", "ink": "#e6edf3", "faint": "#7d8590", "rule": "#3d444d", "hold": "#151b23"},
}
POLICY, REFERENCE, KL, LABEL = "#2f81f7", "#d98a1f", "#9a6fd0", "#3f9d6b"  # mid-tones, legible on either paper
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'DejaVu Sans', sans-serif"


class Paper:
    """Hold the elements of one drawing, and the colours of the paper they are on."""

    def __init__(self, width: int, height: int, theme: str) -> None:
        self.size, self.colours, self.elements = (width, height), THEMES[theme], []
        self.box(0, 0, width, height, "paper", radius=10)

    def box(self, x: float, y: float, w: float, h: float, fill: str, line: str = "none", radius: int = 3,
            dashed: bool = False, faded: float = 1.0) -> None:  # fmt: skip
        """Add a rectangle. Colours are names of the theme, or their own."""
        fill, line = self.colours.get(fill, fill), self.colours.get(line, line)
        more = ' stroke-dasharray="5 4"' if dashed else ""
        more += f' fill-opacity="{faded:g}"' if faded != 1 else ""
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}"'
            f' fill="{fill}" stroke="{line}"{more}/>'
        )

    def text(self, x: float, y: float, words: str, size: int = 20, colour: str = "ink", at: str = "middle",
             bold: bool = False) -> None:  # fmt: skip
        """Add a line of text, whose baseline is y."""
        more = ' font-weight="600"' if bold else ""
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{at}"'
            f' fill="{self.colours.get(colour, colour)}"{more}>{words}</text>'
        )

    def arrow(self, *points: tuple[float, float], colour: str = "faint") -> None:
        """Add a line through the points, with a head at the last one."""
        (x0, y0), (x1, y1) = points[-2:]
        right, down = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        tip = [(x1, y1), (x1 - 9 * right - 6 * down, y1 - 9 * down - 6 * right),
               (x1 - 9 * right + 6 * down, y1 - 9 * down + 6 * right)]  # fmt: skip
        colour = self.colours.get(colour, colour)
        ends = [*points[:-1], (x1 - 8 * right, y1 - 8 * down)]
        self.elements.append(f'<polyline points="{_pairs(ends)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        self.elements.append(f'<polygon points="{_pairs(tip)}" fill="{colour}"/>')

    def __str__(self) -> str:
        width, height = self.size
        about = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="{FONT}"'
        return "\n".join([f'<svg {about} width="{width}" height="{height}">', *self.elements, "</svg>", ""])


def _pairs(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def overview(theme: str) -> Paper:
    """Draw hidden states, tiles, three numbers a token and the loss."""
    p = Paper(760, 470, theme)
    for x, colour in ((40, POLICY), (86, REFERENCE)):
        p.box(x, 120, 34, 200, colour)
    p.text(80, 352, "hidden states")
    p.text(80, 376, "[tokens, D]", 17, "faint")
    p.text(24, 52, "LM heads", at="start")
    p.text(24, 76, "[vocabulary, D]", 17, "faint", "start")
    p.box(190, 34, 320, 20, POLICY)
    p.box(190, 60, 320, 20, REFERENCE)
    p.text(522, 50, "policy", 17, POLICY, "start")
    p.text(522, 76, "reference", 17, REFERENCE, "start")
    p.arrow((132, 220), (178, 220))
    _grid(p, 190, 120, 320, 200, 8, 5)
    p.box(270, 200, 40, 40, POLICY)
    p.elements.append(f'<polygon points="270,240 310,240 310,200" fill="{REFERENCE}"/>')
    p.text(350, 352, "a tile of logits at a time;")
    p.text(350, 376, "[tokens, vocabulary] is never held", 17, "faint")
    p.arrow((520, 220), (566, 220))
    for x, colour, name in ((580, POLICY, "log p"), (636, REFERENCE, "log q"), (692, KL, "KL")):
        p.box(x, 120, 34, 200, colour)
        p.text(x + 17, 106, name, 17)
    p.text(653, 352, "three numbers")
    p.text(653, 376, "a token", 17, "faint")
    p.arrow((653, 386), (653, 430), (556, 430))
    p.box(180, 406, 370, 48, "hold", "rule", 8)
    p.text(365, 437, "TDPO loss of each pair", bold=True)
    p.arrow((180, 430), (80, 430), (80, 388), colour=POLICY)
    p.text(92, 418, "gradients", 15, "faint", "start")
    return p


def parts(theme: str) -> Paper:
    """Draw how a row of the vocabulary is reduced: tiles, then a tree of merges, and the label beside them."""
    p = Paper(760, 470, theme)
    p.text(24, 40, "one token's logits, both models: a vocabulary made of parts", at="start")
    starts = [24, 198, 372, 546]
    for x in starts:
        p.box(x, 60, 166, 40, POLICY, faded=0.8)
        p.box(x, 104, 166, 40, REFERENCE, faded=0.8)
    p.box(430, 54, 18, 96, "paper", LABEL, 2)
    p.text(439, 84, "y", 16, LABEL, bold=True)
    p.text(736, 84, "z", 17, "faint")
    p.text(736, 130, "r", 17, "faint")
    for x in starts:
        p.arrow((x + 83, 150), (x + 83, 188))
        p.box(x + 20, 192, 126, 40, "hold", "rule", 6)
        p.text(x + 83, 218, "6 numbers", 17)
    for x in starts:
        p.arrow((x + 83, 232), (x + 83, 266), (x + 83, 280))
    p.box(44, 284, 648, 44, "hold", "rule", 6)
    p.text(368, 312, "merge, at most 32 at a time, in a tree", 18)
    p.arrow((240, 328), (240, 366))
    p.box(120, 370, 240, 48, "hold", "rule", 6)
    p.text(240, 400, "all columns but the label", 18)
    p.box(470, 370, 222, 48, "paper", LABEL, 6)
    p.text(581, 400, "the label alone", 18, LABEL)
    p.arrow((364, 394), (402, 394))
    p.arrow((466, 394), (428, 394))
    p.box(404, 382, 22, 24, KL, radius=4)
    p.text(415, 446, "log p, log q, KL of the whole row", 18)
    p.arrow((415, 406), (415, 428))
    return p


def kept(theme: str) -> Paper:
    """Draw which tiles a budget keeps from forward to backward, and which are made again."""
    p = Paper(760, 330, theme)
    for x, share, name in ((24, 0, "budget 0"), (276, 18, "a budget for some"), (528, 40, "a budget for all")):
        _grid(p, x, 60, 208, 165, 8, 5)
        for n in range(share):
            p.box(x + 26 * (n % 8) + 1, 60 + 33 * (n // 8) + 1, 24, 31, POLICY, faded=0.85)
        p.text(x + 104, 42, name, bold=True)
    p.text(128, 254, "tiles are made again", 17)
    p.text(380, 254, "the others are made again", 17)
    p.text(632, 254, "nothing is made again", 17)
    p.text(128, 280, "least memory", 16, "faint")
    p.text(632, 280, "8 bytes an entry", 16, "faint")
    p.text(380, 314, "The same bits of token_stats, whatever is kept", 17, "faint")
    return p


def pairs(theme: str) -> Paper:
    """Draw when gradients are made: after all of forward, a block of rows at a time, a group of pairs at a time."""
    p = Paper(760, 470, theme)
    logits, gradients = "logits and loss", "gradients"
    p.box(24, 20, 18, 18, POLICY)
    p.text(50, 35, logits, 16, at="start")
    p.box(200, 20, 18, 18, LABEL)
    p.text(226, 35, gradients, 16, at="start")
    p.box(340, 20, 18, 18, KL)
    p.text(366, 35, "a product with the upstream gradient", 16, at="start")
    for y, name, what in (
        (70, "token_stats, or everything kept", "logits of all rows are kept, or made again"),
        (205, "frozen head: a block of rows at a time", "one block's logits in memory, and dh"),
        (340, "trained head: a group of pairs at a time", "one group's logits in memory, dh and dW"),
    ):
        p.text(24, y + 14, name, 19, at="start", bold=True)
        p.text(24, y + 108, what, 16, "faint", "start")
    p.box(24, 96, 340, 48, POLICY)
    p.box(376, 96, 340, 48, LABEL)
    for y, blocks in ((231, 4), (366, 3)):
        width = 568 / blocks
        for n in range(blocks):
            x = 24 + n * (width + 4)
            p.box(x, y, width / 2 - 2, 48, POLICY)
            p.box(x + width / 2, y, width / 2 - 2, 48, LABEL)
        p.box(640, y, 28, 48, KL)
    for y in (96, 231, 366):
        middle = 370 if y == 96 else 626
        p.box(middle - 1, y - 8, 2, 64, "ink")
    p.text(716, 166, "backward", 15, "faint", "end")
    p.text(640, 301, "backward", 15, "faint", "start")
    p.text(640, 436, "backward", 15, "faint", "start")
    return p


def _grid(p: Paper, x: float, y: float, w: float, h: float, columns: int, rows: int) -> None:
    """Add an empty grid, dashed as what is not held is."""
    for n in range(columns * rows):
        p.box(x + w / columns * (n % columns), y + h / rows * (n // columns), w / columns, h / rows, "none", "rule",
              radius=0, dashed=True)  # fmt: skip


FIGURES: tuple[Callable[[str], Paper], ...] = (overview, parts, kept, pairs)


def drawn() -> dict[str, str]:
    """Return the text of each file of `docs/figures` by its name."""
    return {f"{draw.__name__}-{theme}.svg": str(draw(theme)) for draw in FIGURES for theme in THEMES}


if __name__ == "__main__":
    for name, text in drawn().items():
        (Path(__file__).parent / "figures" / name).write_text(text, encoding="utf-8")
