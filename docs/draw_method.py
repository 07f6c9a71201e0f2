"""Draw the picture of the method in README and on the site's front page, for light and dark pages.

    python docs/draw_method.py

Writes `method-light.svg` and `method-dark.svg` to `docs/source/images`.
"""

from pathlib import Path


IMAGES = Path(__file__).parent / "source" / "images"
WIDTH, HEIGHT = 444, 312  # about the width of a phone, so that text of size 13 is legible
CELL = 12
ROWS, RANK, SIDE = 8, 4, 80
PRUNED = 2  # the triplet whose singular value is 0
LENGTHS = (38, 52, 29, 60, 44, 24, 48, 35)  # the learned magnitudes
STARTS = (46, 46, 36, 49, 44, 33, 42, 40)  # the magnitudes at the start
COLORS = {
    "light": {"ink": "#1f2328", "faint": "#59636e", "frozen": "#c3cad2", "update": "#2563c9", "length": "#c55a00"},
    "dark": {"ink": "#f0f3f6", "faint": "#a0a9b3", "frozen": "#59626d", "update": "#6cb0ff", "length": "#ff9b4a"},
}


class Picture:
    """An SVG, drawn part by part in the named colors of a theme."""

    def __init__(self, colors: dict[str, str]):
        self.colors, self.parts = colors, []

    def text(self, x: float, y: float, text: str, color: str = "ink", anchor: str = "middle", size: int = 13) -> None:
        self.parts.append(f'<text x="{x}" y="{y}" fill="{self.colors[color]}" {_text(anchor, size)}>{text}</text>')

    def cell(self, x: float, y: float, width: float, height: float, color: str, is_pruned: bool = False) -> None:
        """Draw a filled box, or a dashed outline if it is pruned."""
        look = f'fill="{self.colors[color]}"'
        if is_pruned:
            look = f'fill="none" stroke="{self.colors["faint"]}" stroke-dasharray="2 2"'
        box = f'x="{x + 0.5}" y="{y + 0.5}" width="{width - 1}" height="{height - 1}"'
        self.parts.append(f"<rect {box} {look}/>")

    def line(self, points: list[tuple[float, float]], color: str, look: str = "") -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{self.colors[color]}" {look}/>')

    def arrow(self, start: complex, end: complex, color: str, width: float = 2.5) -> None:
        """Draw an arrow between two points, given as complex numbers."""
        along = (end - start) / abs(end - start)
        neck = end - 9 * along
        head = [end, neck + 4.5j * along, neck - 4.5j * along]
        self.line([_point(start), _point(neck)], color, f'stroke-width="{width}"')
        corners = " ".join("{:g},{:g}".format(*_point(corner)) for corner in head)
        self.parts.append(f'<polygon points="{corners}" fill="{self.colors[color]}"/>')

    def __str__(self) -> str:
        size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">'
        return "\n".join([head, *self.parts, "</svg>\n"])


def _text(anchor: str, size: int) -> str:
    return f'text-anchor="{anchor}" font-size="{size}"'


def _point(number: complex) -> tuple[float, float]:
    return round(number.real, 1), round(number.imag, 1)


def draw_matrices(picture: Picture, top: float) -> None:
    """Draw (m / n) ⊙ (W + B E A) with the shapes of the parts."""
    height = ROWS * CELL
    middle = top + height / 2 + 5
    for row, (length, start) in enumerate(zip(LENGTHS, STARTS)):
        y = top + row * CELL
        picture.cell(6, y, length, CELL, "length")
        picture.line([(6 + start, y + 1), (6 + start, y + CELL - 1)], "ink", 'stroke-width="1.5"')
    picture.text(79, middle, "⊙", size=18)
    for row in range(ROWS):
        picture.cell(98, top + row * CELL, SIDE, CELL, "frozen")
    picture.text(191, middle, "+", size=18)
    for index in range(RANK):
        is_pruned = index == PRUNED
        along = index * CELL
        picture.cell(206 + along, top, CELL, height, "update", is_pruned)
        picture.cell(262 + along, top + along, CELL, CELL, "update", is_pruned)
        picture.cell(318, top + along, SIDE, CELL, "update", is_pruned)
    picture.text(262 + (PRUNED + 0.5) * CELL, top + (PRUNED + 0.5) * CELL + 4, "0", "faint", size=11)
    for x, side in ((94, 4), (406, -4)):
        picture.line([(x + side, top - 3), (x, top - 3), (x, top + height + 3), (x + side, top + height + 3)], "ink")
    picture.text(424, middle, "/ n", size=15)
    for x, name, color in ((36, "m", "length"), (140, "W", "ink"), (230, "B", "update"), (286, "E", "update")):
        picture.text(x, top - 11, name, color, size=15)
    picture.text(360, top - 11, "A", "update", size=15)
    picture.text(336, top + RANK * CELL + 20, "pruned: E = 0", "faint")
    below = top + height + 20
    picture.text(6, below, "row lengths", "length", "start")
    picture.text(6, below + 18, "| at the start", "faint", "start", size=12)
    picture.text(140, below, "frozen weight")
    picture.text(305, below, "prunable update ΔW", "update")


def draw_row(picture: Picture, origin: complex) -> None:
    """Draw one row: the update turns it, and the magnitude sets its length."""
    row, turned = origin + (158 - 18j), origin + (118 - 70j)
    direction = (turned - origin) / abs(turned - origin)
    learned = origin + 172 * direction
    picture.arrow(origin, learned, "length", width=5)
    picture.arrow(origin, row, "frozen", width=4)
    picture.arrow(row, turned, "update")
    picture.line([_point(turned - 7j * direction), _point(turned + 7j * direction)], "ink", 'stroke-width="1.5"')
    picture.text(origin.real + 88, origin.imag + 8, "row of W")
    picture.text(row.real + 2, row.imag - 28, "+ ΔW", "update", "start")
    picture.text(turned.real - 6, turned.imag - 12, "n", "ink", "end")
    picture.text(learned.real + 6, learned.imag + 2, "m", "length", "start", size=15)


def draw(theme: str) -> str:
    """Return the picture for a theme, `"light"` or `"dark"`."""
    picture = Picture(COLORS[theme])
    draw_matrices(picture, top=28)
    draw_row(picture, origin=12 + 290j)
    x, y = 226, 216
    picture.text(x, y, "The update turns each row,", "update", "start")
    picture.text(x, y + 22, "a learned m sets its length:", "length", "start")
    picture.text(x, y + 52, "(m / n) ⊙ (W + ΔW)", anchor="start", size=16)
    picture.text(x, y + 76, "n: length of the turned row", "faint", "start")
    return str(picture)


if __name__ == "__main__":
    for theme in COLORS:
        (IMAGES / f"method-{theme}.svg").write_text(draw(theme), encoding="utf-8")
