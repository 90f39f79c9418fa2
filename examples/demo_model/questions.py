"""Questions with one right answer, drawn by a random generator: what the demo model is trained on and examined with.

Every question has a key, a text of what makes it this question. A hash of the key alone says whether it is held out,
so training and examination share none, whatever the seeds are.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

HELD_OUT_SHARE = 16  # of 256 keys
Cells = tuple[tuple[str, str], ...]  # two words for each of the nine cells of a tile, "" for nothing


@dataclass(frozen=True)
class Conversation:
    """A system message or none, pictures at the beginning of the first turn, and turns of question and answer.

    When examined, the last answer is asked for and the others are given. `seen` says what is where in a picture: for
    each tile as the vision tower gets it, and each of its 3 × 3 cells, the words for it.
    """

    task: str
    turns: tuple[tuple[str, str], ...]
    system: str | None = None
    pictures: tuple[Image.Image, ...] = ()
    seen: tuple[Cells, ...] = ()


@dataclass(frozen=True)
class Draw:
    """A random generator that gives either only held-out questions or only the others. `growth` 0 … 1: how long they
    may be, of their full length."""

    rng: random.Random
    held_out: bool
    growth: float = 1.0

    def wants(self, key: str) -> bool:
        return is_held_out(key) == self.held_out

    def length(self, least: int, most: int) -> int:
        """How many things a question is about."""
        return self.rng.randint(least, least + round((most - least) * self.growth))

    def turns(self, most: int) -> int:
        """How many questions to ask about one thing: one when examined, else up to `most`."""
        return 1 if self.held_out else self.rng.randint(1, most)


def is_held_out(key: str) -> bool:
    """The same for everybody and for ever."""
    return hashlib.sha256(key.encode()).digest()[0] < HELD_OUT_SHARE


Task = Callable[[Draw], Conversation]


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Ann Bob Carl Dora Emil Fay Gus Hana Ivan Jane Karl Lena Mark Nora Otto Paul Rosa Sam Tina Uma Vera Walt Yara Zoe "
    "Adam Beth Cora Dan Eva Finn Greta Hugo Ida Jack Kim Leo Mia Nils Olga Pia"
)
CITIES = _words(
    "Rome Paris Oslo Bern Lima Cairo Delhi Tokyo Quito Dakar Berlin Madrid Dublin Vienna Prague Warsaw Athens Lisbon "
    "Boston Denver Sydney Seoul Hanoi Tunis"
)
ANIMALS = _words("cat dog horse bird fish mouse goat frog duck snake bee fox")
THINGS = _words("sun tree house boat stone river lamp book chair apple bread moon key road shoe bell")
COLOURS = _words("red green blue yellow black white brown grey")
FRENCH = dict(zip(COLOURS, _words("rouge vert bleu jaune noir blanc brun gris"), strict=True))
SPANISH = dict(zip(COLOURS, _words("rojo verde azul amarillo negro blanco pardo gris"), strict=True))


def _sum(draw: Draw) -> tuple[str, str]:
    """A number below 100 plus or minus one digit, the result below 100 too."""
    rng = draw.rng
    while True:
        a, b = rng.randint(0, 99), rng.randint(0, 9)
        plus = rng.random() < 0.5
        if 0 <= (a + b if plus else a - b) <= 99 and draw.wants(f"{a} {'plus' if plus else 'minus'} {b}"):
            break
    if plus:
        return rng.choice((f"What is {a} + {b}?", f"Add {b} to {a}.", f"{a} + {b} =")), str(a + b)
    return rng.choice((f"What is {a} - {b}?", f"Take {b} from {a}.", f"{a} - {b} =")), str(a - b)


def arithmetic(draw: Draw) -> Conversation:
    return Conversation("arithmetic", tuple(_sum(draw) for _ in range(draw.turns(9))))


def look_up(draw: Draw) -> Conversation:
    """A table in words, and questions about its rows by the first column; names stand first in some, cities in some."""
    rng = draw.rng
    while True:
        number = draw.length(2, 8)
        names, cities = rng.sample(NAMES, number), rng.sample(CITIES, number)
        by_name = rng.random() < 0.6
        if draw.wants(f"lives {by_name} " + " ".join(names + cities)):
            break
    keys, values = (names, cities) if by_name else (cities, names)
    question = "Where does {} live?" if by_name else "Who lives in {}?"
    places = rng.sample(range(number), min(number, draw.turns(8)))
    turns = [(question.format(keys[place]), values[place]) for place in places]
    facts = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    turns[0] = (f"Homes: {facts}. {turns[0][0]}", turns[0][1])
    return Conversation("look-up", tuple(turns))


def listing(draw: Draw) -> Conversation:
    """Several rows of a table, in the order asked for."""
    rng = draw.rng
    turns = []
    while True:
        number = draw.length(2, 8)
        homes = dict(zip(rng.sample(NAMES, number), rng.sample(CITIES, number), strict=True))
        if draw.wants(f"list {homes}"):
            break
    for _ in range(draw.turns(3)):
        asked = rng.sample(list(homes), rng.randint(1, number))
        turns.append((f"List: {' '.join(asked)}", ", ".join(f"{name} {homes[name]}" for name in asked)))
    facts = ", ".join(f"{name} {city}" for name, city in homes.items())
    turns[0] = (f"Homes: {facts}. {turns[0][0]}", turns[0][1])
    return Conversation("listing", tuple(turns))


def repetition(draw: Draw) -> Conversation:
    """A list of words, said again."""
    rng = draw.rng
    while True:
        words = rng.sample([*NAMES, *CITIES, *THINGS, *ANIMALS, *COLOURS], draw.length(3, 9))
        if draw.wants("repeat " + " ".join(words)):
            break
    return Conversation("repetition", ((f"Repeat: {' '.join(words)}", " ".join(words)),))


def sorting(draw: Draw) -> Conversation:
    """Digits in ascending or descending order."""
    rng = draw.rng
    turns = []
    for _ in range(draw.turns(3)):
        while True:
            digits = [rng.randint(0, 9) for _ in range(draw.length(3, 6))]
            down = rng.random() < 0.3
            if draw.wants(f"sort {digits} {down}"):
                break
        question = f"Sort these numbers{', the largest first' if down else ''}: {' '.join(map(str, digits))}"
        turns.append((question, " ".join(map(str, sorted(digits, reverse=down)))))
    return Conversation("sorting", tuple(turns))


def counting(draw: Draw) -> Conversation:
    """How often a word stands in a list."""
    rng = draw.rng
    while True:
        kinds = rng.sample(THINGS, rng.randint(2, 3))
        words = [rng.choice(kinds) for _ in range(draw.length(2, 6))]
        if draw.wants("count " + " ".join(words)):
            break
    turns = [(f"How often does {kind} occur?", str(words.count(kind))) for kind in kinds[: draw.turns(4)]]
    turns[0] = (f"Words: {' '.join(words)}. {turns[0][0]}", turns[0][1])
    return Conversation("counting", tuple(turns))


def extraction(draw: Draw) -> Conversation:
    """Fields of a sentence as JSON, in the order asked for."""
    rng = draw.rng
    turns = []
    for _ in range(draw.turns(2)):
        while True:
            fields = {
                "name": rng.choice(NAMES), "age": str(rng.randint(1, 99)), "city": rng.choice(CITIES),
                "pet": rng.choice(ANIMALS),
            }  # fmt: skip
            if draw.wants("extract " + " ".join(fields.values())):
                break
        sentence = rng.choice(
            (
                "{name} is {age} years old, lives in {city} and has a {pet}.",
                "In {city} there is a {pet}; it belongs to {name}, who is {age}.",
                "A {pet} and {name}, {age}, came from {city}.",
            )
        ).format(**fields)
        wanted = rng.sample(list(fields), rng.randint(1, 2))
        answer: dict[str, str | int] = {name: int(fields[name]) if name == "age" else fields[name] for name in wanted}
        turns.append((f"{sentence} Give {', '.join(wanted)} as JSON.", json.dumps(answer)))
    return Conversation("extraction", tuple(turns))


STYLES: dict[str, Callable[[str], str]] = {
    "Answer in French.": FRENCH.__getitem__,
    "Answer in Spanish.": SPANISH.__getitem__,
    "Answer in capital letters.": str.upper,
    "Begin every answer with Sir.": "Sir, {}".format,
    "End every answer with an exclamation mark.": "{}!".format,
}


def instructions(draw: Draw) -> Conversation:
    """A system message says how to answer; without one the plain word is right."""
    rng = draw.rng
    while True:
        number = draw.length(1, 4)
        names, colours = rng.sample(NAMES, number), rng.sample(COLOURS, number)
        system = rng.choice([*STYLES, None])
        if draw.wants(f"likes {system} " + " ".join(names + colours)):
            break
    style = STYLES[system] if system is not None else str
    facts = ", ".join(f"{name} {colour}" for name, colour in zip(names, colours, strict=True))
    asked = rng.sample(range(number), min(number, draw.turns(4)))
    turns = [(f"What colour does {names[place]} like?", style(colours[place])) for place in asked]
    turns[0] = (f"Colours: {facts}. {turns[0][0]}", turns[0][1])
    return Conversation("instructions", tuple(turns), system)


def memory(draw: Draw) -> Conversation:
    """What was said in earlier turns."""
    rng = draw.rng
    while True:
        number = draw.length(2, 4)
        pets, names = rng.sample(ANIMALS, number), rng.sample(NAMES, number)
        if draw.wants("pets " + " ".join(pets + names)):
            break
    told = [(f"Meet my {pet} {name}.", "Hello!") for pet, name in zip(pets, names, strict=True)]
    asked = [(f"What is my {pets[place]} called?", names[place])
             for place in rng.sample(range(number), min(number, draw.turns(4)))]  # fmt: skip
    return Conversation("memory", (*told, *asked))


TEXT_TASKS: tuple[Task, ...] = (
    arithmetic, look_up, listing, repetition, sorting, counting, extraction, instructions, memory,
)  # fmt: skip
