"""Draw the pictures of the recipe shapes: six figures, turned, at any place, in any colours, some behind a line.

    python recipes/data/make_shapes.py    # rewrites shapes-train.parquet and shapes-eval.parquet beside it

A row is a picture as data sets of the hub hold one, and its label:

    {"image": {"bytes": PNG, "path": "train/star-004.png"}, "label": "star"}

Pentagons and hexagons differ in one corner, so that not all is easy. Which picture is drawn follows from the name of
its file; another version of Pillow may draw a few pixels differently.
"""

import io
import math
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw

EDGE, LARGER = 70, 4  # drawn at four times the size and shrunk, for smooth edges
CORNERS = {"triangle": 3, "square": 4, "pentagon": 5, "hexagon": 6, "star": 10, "circle": 48}
PARTS = {"train": 20, "eval": 25}  # pictures of each figure


def drawn(name: str, figure: str) -> Image.Image:
    """Return the picture of a name."""
    chance, size = random.Random(name), EDGE * LARGER
    ground, colour, line = ([chance.randrange(256) for _ in range(3)] for _ in range(3))
    while sum(abs(a - b) for a, b in zip(ground, colour, strict=True)) < 200:  # which could not be told apart
        colour = [chance.randrange(256) for _ in range(3)]
    image = Image.new("RGB", (size, size), tuple(ground))
    draw = ImageDraw.Draw(image)
    radius = chance.uniform(0.2, 0.38) * size
    x, y = (chance.uniform(radius, size - radius) for _ in range(2))
    turn, corners = chance.uniform(0, 2 * math.pi), CORNERS[figure]
    points = []
    for corner in range(corners):
        angle, reach = turn + 2 * math.pi * corner / corners, radius
        if figure == "star" and corner % 2:
            reach *= 0.45
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    draw.polygon(points, fill=tuple(colour))
    if chance.random() < 0.5:
        ends = [(chance.uniform(0, size), chance.uniform(0, size)) for _ in range(2)]
        draw.line(ends, fill=tuple(line), width=3 * LARGER)
    return image.resize((EDGE, EDGE), Image.Resampling.LANCZOS).quantize(32)  # a third of the bytes


def main() -> None:
    """Write both parts."""
    for part, count in PARTS.items():
        rows = []
        for figure in CORNERS:
            for number in range(count):
                name, buffer = f"{part}/{figure}-{number:03}.png", io.BytesIO()
                drawn(name, figure).save(buffer, "png", optimize=True)
                rows.append({"image": {"bytes": buffer.getvalue(), "path": name}, "label": figure})
        path = Path(__file__).with_name(f"shapes-{part}.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


if __name__ == "__main__":
    main()
