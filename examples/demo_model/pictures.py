"""Pictures with Pillow, and questions about them: shapes on a 3 × 3 grid, numbers in square pixels."""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

from examples.demo_model.questions import Cells, Conversation, Draw, Task

TILE = 84  # pixels per side, as the vision tower has it
CELL = TILE // 3
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
PAINTS = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (40, 70, 220), "yellow": (240, 200, 20),
    "black": (20, 20, 20), "purple": (140, 40, 160), "orange": (240, 130, 20),
}  # fmt: skip
PLACES = (
    "top left", "top middle", "top right", "middle left", "centre", "middle right", "bottom left", "bottom middle",
    "bottom right",
)  # fmt: skip
# Digits in 5 × 7 pixels, a row a number of five bits.
DIGITS = (
    (14, 17, 19, 21, 25, 17, 14), (4, 12, 4, 4, 4, 4, 14), (14, 17, 1, 2, 4, 8, 31), (31, 2, 4, 2, 1, 17, 14),
    (2, 6, 10, 18, 31, 2, 2), (31, 16, 30, 1, 1, 17, 14), (6, 8, 16, 30, 17, 17, 14), (31, 1, 2, 4, 8, 8, 8),
    (14, 17, 17, 14, 17, 17, 14), (14, 17, 17, 15, 1, 2, 12),
)  # fmt: skip

Scene = dict[int, tuple[str, str]]  # cell 0 … 8 → shape and colour


def _paper(rng: random.Random, width: int = TILE, height: int = TILE) -> Image.Image:
    return Image.new("RGB", (width, height), tuple(rng.randint(225, 255) for _ in range(3)))


def draw_scene(rng: random.Random, scene: Scene) -> Image.Image:
    """One tile: each shape somewhere in its cell, in a size and a shade of its own."""
    image = _paper(rng)
    pen = ImageDraw.Draw(image)
    for cell, (shape, colour) in scene.items():
        r = rng.randint(8, 12)
        x = cell % 3 * CELL + CELL // 2 + rng.randint(r - 13, 13 - r)
        y = cell // 3 * CELL + CELL // 2 + rng.randint(r - 13, 13 - r)
        fill = tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in PAINTS[colour])
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill)
        elif shape == "square":
            pen.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill)
        elif shape == "triangle":
            pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill)
        elif shape == "diamond":
            pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill)
        else:
            pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
            pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill)
    return image


def cells_of(scene: Scene) -> Cells:
    """Shape and colour in each cell."""
    return tuple(scene.get(cell, ("", "")) for cell in range(9))


NOTHING: Cells = (("", ""),) * 9  # of a whole picture's own tile, in which nothing can be made out


def draw_digit(image: Image.Image, digit: str, left: int, top: int, scale: int, fill: tuple[int, ...]) -> None:
    """5 · scale × 7 · scale pixels."""
    pen = ImageDraw.Draw(image)
    for row, bits in enumerate(DIGITS[int(digit)]):
        for column in range(5):
            if bits >> (4 - column) & 1:
                x, y = left + column * scale, top + row * scale
                pen.rectangle((x, y, x + scale - 1, y + scale - 1), fill)


def _draw_number(rng: random.Random, image: Image.Image, number: str, left: int, top: int, scale: int) -> Cells:
    """A number of up to three digits somewhere in the tile at (left, top), each digit in a cell of its own."""
    first = 3 * rng.randint(0, 2) + rng.randint(0, 3 - len(number))
    x, y = left + rng.randint(1, CELL - 5 * scale), top + rng.randint(0, CELL - 7 * scale)
    fill = PAINTS[rng.choice(list(PAINTS))]
    for cell, digit in enumerate(number, first):
        draw_digit(image, digit, x + cell % 3 * CELL, y + cell // 3 * CELL, scale, fill)
    seen = dict(enumerate(number, first))
    return tuple((seen.get(cell, ""), "") for cell in range(9))


def _scene(draw: Draw, least: int, most: int) -> Scene:
    rng = draw.rng
    while True:
        cells = sorted(rng.sample(range(9), draw.length(least, most)))
        scene = {cell: (rng.choice(SHAPES), rng.choice(list(PAINTS))) for cell in cells}
        if draw.wants(f"scene {scene}"):
            return scene


def _questions(scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """Task → the questions that have one answer in this scene."""
    shapes, colours = [s for s, _ in scene.values()], [c for _, c in scene.values()]
    found: dict[str, list[tuple[str, str]]] = {"colour": [], "shape": [], "position": [], "count": []}
    for cell, (shape, colour) in scene.items():
        if shapes.count(shape) == 1:
            found["colour"].append((f"What colour is the {shape}?", colour))
            found["position"].append((f"Where is the {shape}?", PLACES[cell]))
        if colours.count(colour) == 1:
            found["shape"].append((f"Which shape is {colour}?", shape))
        found["shape"].append((f"Which shape is at the {PLACES[cell]}?", shape))
        found["colour"].append((f"Which colour is at the {PLACES[cell]}?", colour))
    found["count"].append(("How many shapes are there?", str(len(scene))))
    found["count"] += [(f"How many {shape}s are there?".replace("crosss", "crosses"), str(shapes.count(shape)))
                       for shape in sorted(set(shapes))]  # fmt: skip
    return found


def _about_scene(task: str, draw: Draw) -> Conversation:
    while True:
        scene = _scene(draw, 1, 5)
        found = _questions(scene)
        if found[task]:
            break
    turns = [draw.rng.choice(found[task])]
    others = [turn for about in found.values() for turn in about if turn != turns[0]]
    turns = draw.rng.sample(others, min(len(others), draw.turns(9) - 1)) + turns
    return Conversation(task, tuple(turns), pictures=(draw_scene(draw.rng, scene),), seen=(cells_of(scene),))


def colour(draw: Draw) -> Conversation:
    return _about_scene("colour", draw)


def shape(draw: Draw) -> Conversation:
    return _about_scene("shape", draw)


def position(draw: Draw) -> Conversation:
    return _about_scene("position", draw)


def count(draw: Draw) -> Conversation:
    return _about_scene("count", draw)


def comparison(draw: Draw) -> Conversation:
    """Two pictures: which has more shapes, and whether one shape or colour is in both."""
    rng = draw.rng
    first, second = _scene(draw, 1, 4), _scene(draw, 1, 4)
    more = "both the same" if len(first) == len(second) else "the first" if len(first) > len(second) else "the second"
    turns = [("Which picture has more shapes?", more)]
    some_shape, some_colour = rng.choice(SHAPES), rng.choice(list(PAINTS))
    for kind, wanted in ((0, some_shape), (1, some_colour)):
        has = [any(item[kind] == wanted for item in scene.values()) for scene in (first, second)]
        answer = {(True, True): "both", (True, False): "the first", (False, True): "the second"}.get(tuple(has), "none")
        noun = f"a {wanted}" if kind == 0 else f"something {wanted}"
        turns.append((f"Which picture has {noun}?", answer))
    chosen = rng.sample(turns, draw.turns(3))
    drawn = (draw_scene(rng, first), draw_scene(rng, second))
    return Conversation("comparison", tuple(chosen), pictures=drawn, seen=(cells_of(first), cells_of(second)))


def reading(draw: Draw) -> Conversation:
    """A number of one to three digits, large."""
    rng = draw.rng
    while True:
        number = str(rng.randint(0, 999))
        if draw.wants(f"number {number}"):
            break
    image = _paper(rng)
    seen = _draw_number(rng, image, number, 0, 0, 3)
    return Conversation("reading", (("Which number is this?", number),), pictures=(image,), seen=(seen,))


def tiles(draw: Draw) -> Conversation:
    """A picture of several tiles with a small number in each: too small to be read in the whole picture's own tile."""
    rng = draw.rng
    names = rng.choice(
        (
            [["left", "right"]], [["left", "middle", "right"]], [["top"], ["bottom"]],
            [["top left", "top right"], ["bottom left", "bottom right"]],
        )
    )  # fmt: skip
    rows, columns = len(names), len(names[0])
    while True:
        numbers = [[str(rng.randint(10, 99)) for _ in range(columns)] for _ in range(rows)]
        if draw.wants(f"tiles {numbers}"):
            break
    image = _paper(rng, columns * TILE, rows * TILE)
    seen = [_draw_number(rng, image, numbers[row][column], column * TILE, row * TILE, 2)
            for row in range(rows) for column in range(columns)]  # fmt: skip
    turns = [(f"Which number is at the {names[row][column]}?", numbers[row][column])
             for row in range(rows) for column in range(columns)]  # fmt: skip
    rng.shuffle(turns)
    return Conversation("tiles", tuple(turns[: draw.turns(4)]), pictures=(image,), seen=(*seen, NOTHING))


PICTURE_TASKS: tuple[Task, ...] = (colour, shape, position, count, comparison, reading, tiles)
