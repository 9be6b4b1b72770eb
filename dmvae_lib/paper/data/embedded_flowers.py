"""Flowers that need no download: drawn ones, with captions that describe what is drawn.

They stand in for Oxford-102 in the profile `quick`; results on them are never the paper's.
"""

from __future__ import annotations

import math
import random
import re
from collections import namedtuple
from collections.abc import Callable
from functools import cache
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# --- classes -----------------------------------------------------------------------------------------------------

COLOURS = {  # of petals, centres and patterns, RGB in [0, 1]
    "pink": (0.98, 0.52, 0.70),
    "purple": (0.50, 0.18, 0.68),
    "white": (0.97, 0.96, 0.94),
    "yellow": (0.98, 0.86, 0.12),
    "blue": (0.22, 0.38, 0.92),
    "orange": (0.98, 0.52, 0.06),
    "red": (0.84, 0.06, 0.10),
    "brown": (0.36, 0.20, 0.09),
    "green": (0.45, 0.68, 0.20),
}
ATTRIBUTES = {
    "petals": ("pink", "purple", "white", "yellow", "blue", "orange", "red"),
    "count": ("five", "eight", "many"),
    "length": ("long", "short"),
    "tip": ("pointed", "round"),
    "centre": ("yellow", "brown", "white", "green"),
    "size": ("large", "small"),  # of the centre
    "pattern": ("plain", "spots", "stripes", "edges"),
    "stamen": ("hidden", "visible"),
}
Flower = namedtuple("Flower", "petals count length tip centre size pattern stamen")  # a class: what it looks like

PETALS = {"five": 5, "eight": 8, "many": 13}
PATTERN_COLOUR = {"plain": "white", "spots": "red", "stripes": "purple", "edges": "white"}
UNSEEN = {  # colours of petals on which a pattern hardly shows
    "plain": (),
    "spots": ("red", "orange", "purple"),
    "stripes": ("purple", "blue", "red"),
    "edges": ("white", "yellow", "pink"),
}
SPLITS = {"train": 40, "validation": 12, "test": 12}  # classes
IMAGES = {"train": 28, "validation": 50, "test": 50}  # of a class; AP@50 can reach 1 only where there are 50


@cache
def flower_classes() -> tuple[tuple[Flower, ...], dict[str, tuple[int, ...]]]:
    """The classes, and {split: their numbers}; the same every time, whatever the seed of the images.

    Any two classes differ in at least three attributes. Every value of every attribute occurs in at least four
    training classes, so that validation and test classes are new combinations of what training shows.
    """
    draw = random.Random(0)
    while True:
        chosen: list[Flower] = []
        while len(chosen) < sum(SPLITS.values()):
            new = Flower(*(draw.choice(values) for values in ATTRIBUTES.values()))
            visible = new.centre != new.petals and new.petals not in UNSEEN[new.pattern]
            if visible and all(sum(a != b for a, b in zip(new, old)) >= 3 for old in chosen):
                chosen.append(new)
        shown = list(zip(*chosen[: SPLITS["train"]]))
        if all(shown[i].count(value) >= 4 for i, values in enumerate(ATTRIBUTES.values()) for value in values):
            numbers = iter(range(len(chosen)))
            return tuple(chosen), {name: tuple(islice(numbers, n)) for name, n in SPLITS.items()}


# --- images ------------------------------------------------------------------------------------------------------

SIDE = 64  # pixels of an image


def drawn_flowers(seed: int = 0) -> tuple[Tensor, Tensor, list[list[str]]]:
    """Images (N, 3, 64, 64) uint8, classes (N,) int64 and ten captions per image, N = 2,320, class by class.

    A class has IMAGES of its split. What the captions describe is the class's; background, stem, position, rotation,
    tilt, size and light are each image's own. The same seed gives the same flowers.
    """
    kinds, splits = flower_classes()
    labels = torch.cat([torch.tensor(members).repeat_interleave(IMAGES[name]) for name, members in splits.items()])
    flowers = [kinds[label] for label in labels.tolist()]
    words = random.Random(f"captions {seed}")
    return draw_flowers(flowers, seed), labels, [[describe(flower, words) for _ in range(10)] for flower in flowers]


def draw_flowers(flowers: list[Flower], seed: int = 0) -> Tensor:
    """One image of each flower, (N, 3, 64, 64) uint8."""
    generator = torch.Generator().manual_seed(seed)
    # 64 at a time: the working set stays within the caches.
    return torch.cat([_draw(flowers[i : i + 64], generator) for i in range(0, len(flowers), 64)])


def _draw(flowers: list[Flower], generator: torch.Generator) -> Tensor:
    n = len(flowers)
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    down, right = torch.meshgrid(axis, axis, indexing="ij")  # in half image sides

    def each(value: Callable[[Flower], float]) -> Tensor:
        return torch.tensor([float(value(flower)) for flower in flowers]).view(n, 1, 1)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=generator)

    def colour(name: Callable[[Flower], str], spread: float) -> Tensor:
        base = torch.tensor([COLOURS[name(flower)] for flower in flowers])
        return (base + spread * torch.randn(n, 3, generator=generator)).clamp(0, 1).view(n, 3, 1, 1)

    # Pose: where the flower is, how large, which way it is turned and tilted.
    middle_x, middle_y = uniform(-0.12, 0.12), uniform(-0.12, 0.12)
    radius, turn = uniform(0.70, 0.94), uniform(0, 2 * math.pi)
    tilt, towards = uniform(0.76, 1.0), uniform(0, math.pi)
    x, y = (right - middle_x) / radius, (down - middle_y) / radius
    along, across = x * towards.cos() + y * towards.sin(), (y * towards.cos() - x * towards.sin()) / tilt
    r, angle = (along.square() + across.square()).sqrt(), torch.atan2(across, along) + turn
    soft = SIDE / 2 * radius  # pixels per unit: edges fade over one pixel

    # Petals: a ring of them in front, and behind it a second ring where there are many.
    count, many = each(lambda flower: PETALS[flower.count]), each(lambda flower: flower.count == "many")
    length = each(lambda flower: 1.0 if flower.length == "long" else 0.70)
    pointed = each(lambda flower: flower.tip == "pointed")
    # Many petals are narrower, or their ring closes to a disc.
    thick = each(lambda flower: 0.40 if flower.length == "short" else 0.27) * (5 / count).sqrt().clamp(max=0.95)

    def ring(angle: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each pixel in its nearest petal: its place along it (1 at the tip) and across it, and the half width there."""
        turns = angle * count / (2 * math.pi)
        petal = torch.remainder(turns.round(), count).long()
        off = (turns - turns.round()) * 2 * math.pi / count  # angle to the petal's axis
        jitter = 1 + 0.045 * torch.randn(n, max(PETALS.values()), generator=generator).clamp(-2, 2)
        own = length * jitter.gather(1, petal.flatten(1)).view_as(r)  # petals of one flower are not quite alike
        u, v = r * off.cos() / own, r * off.sin()
        t = u.clamp(0, 1)
        lance = (math.pi * t.pow(0.80)).sin().clamp(min=0).pow(1.15) * (1 - 0.25 * t)  # widest below the middle
        spoon = (0.35 + 0.65 * t) * (1 - t.pow(5)).sqrt()  # widest near the blunt end
        return u, v, thick * length.sqrt() * (pointed * lance * 1.15 + (1 - pointed) * spoon)

    shade = uniform(0, 2 * math.pi)
    front, back = ring(angle, length), ring(angle + math.pi / count, length * 0.93)
    petal_colour = colour(lambda flower: flower.petals, 0.02)
    pattern_colour = colour(lambda flower: PATTERN_COLOUR[flower.pattern], 0.02)
    image = _background(n, generator)
    stem = colour(lambda flower: "green", 0.05) * 0.75
    bend = uniform(-0.25, 0.25)
    on_stem = ((0.045 - (x - bend * y.clamp(min=0).square()).abs()) * soft).clamp(0, 1) * (y > 0)
    image = _over(image, stem, on_stem)
    pattern = each(lambda flower: ATTRIBUTES["pattern"].index(flower.pattern))
    for (u, v, width), present, dim in ((back, many, 0.82), (front, 1.0, 1.0)):
        cover = ((width - v.abs()) * soft).clamp(0, 1) * present
        # A fold along the middle, darker towards the centre and the rim: petals stand out from each other.
        relative = (v / width.clamp(min=1e-3)).clamp(-1, 1)
        light = dim * (1.04 - 0.30 * relative.square()) * (0.80 + 0.20 * u.clamp(0, 1))
        edges = ((v.abs() - width + 0.10) * 18).clamp(0, 1)
        veins = torch.stack([v.abs(), (v.abs() - 0.105 * (0.4 + u)).abs()]).amin(0)  # three, along a petal
        stripes = ((0.042 - veins) * 30).clamp(0, 1) * (u < 0.9)
        row, column = u * length / 0.155, v / 0.155  # of round spots in a staggered grid
        column = column + 0.5 * torch.remainder(row.round(), 2)
        spot = ((row - row.round()).square() + (column - column.round()).square()).sqrt() * 0.155
        spots = ((0.062 - spot) * 30).clamp(0, 1)
        mark = ((pattern == 1) * spots + (pattern == 2) * stripes + (pattern == 3) * edges)[:, None]
        image = _over(image, (petal_colour * (1 - mark) + pattern_colour * mark) * light[:, None], cover)

    # Stamen: bright filaments with anthers, standing off the centre.
    size = each(lambda flower: 0.33 if flower.size == "large" else 0.17)
    visible = each(lambda flower: flower.stamen == "visible")
    reach, filaments = size + 0.30, 9
    off = torch.remainder(angle * filaments / (2 * math.pi) + 0.5, 1) - 0.5  # -1/2 to 1/2 between two filaments
    aside = off * 2 * math.pi / filaments * r
    thread = ((0.030 - aside.abs()) * soft).clamp(0, 1) * (r < reach)
    anther = ((0.060 - (aside.square() + (r - reach).square()).sqrt()) * soft).clamp(0, 1)
    image = _over(image, torch.full((n, 3, 1, 1), 0.96), visible * thread)
    image = _over(image, torch.tensor([0.25, 0.12, 0.05]).view(3, 1, 1), visible * anther)

    # The centre: a dome of seeds along a spiral.
    seeds = (0.5 + 0.5 * (r / size * 16).cos() * (angle * 12 + r / size * 9).cos()) * 0.22
    dome = (1.08 - 0.45 * (r / size).square() - seeds).clamp(min=0.3)
    image = _over(image, image * 0.62, ((size * 1.12 - r) * soft).clamp(0, 1))
    image = _over(image, colour(lambda flower: flower.centre, 0.03) * dome[:, None], ((size - r) * soft).clamp(0, 1))

    # Light from one side, exposure, and the sensor's noise.
    light = uniform(0.86, 1.08) * (1 + uniform(0, 0.22) * (right * shade.cos() + down * shade.sin()))
    image = image * light[:, None] + 0.012 * torch.randn(image.shape, generator=generator)
    return image.mul(255).round().clamp(0, 255).to(torch.uint8)


def _background(n: int, generator: torch.Generator) -> Tensor:
    """(n, 3, SIDE, SIDE): blurred foliage, soil or sky, lighter and darker in places."""
    tones = torch.tensor(
        [[0.16, 0.30, 0.12], [0.26, 0.40, 0.18], [0.10, 0.16, 0.08], [0.30, 0.26, 0.20], [0.50, 0.56, 0.60]]
    )
    kind = torch.multinomial(torch.tensor([3.0, 3.0, 2.0, 1.0, 1.0]), n, replacement=True, generator=generator)
    coarse = torch.randn(n, 1, 5, 5, generator=generator) * 0.30 + torch.randn(n, 3, 5, 5, generator=generator) * 0.08
    fine = torch.randn(n, 1, 14, 14, generator=generator) * 0.16
    texture = sum(F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", align_corners=False) for x in (coarse, fine))
    return (tones[kind].view(n, 3, 1, 1) * (1 + texture)).clamp(0.02, 0.98)


def _over(image: Tensor, colour: Tensor, cover: Tensor) -> Tensor:
    """`colour` laid over the image where `cover`, (n, H, W) in [0, 1], says so."""
    return image + (colour - image) * cover[:, None]


# --- captions ----------------------------------------------------------------------------------------------------

WORDS: dict[str, Any] = {
    "count": {"five": ("five", "5"), "eight": ("eight", "8"), "many": ("many", "numerous", "lots of", "a lot of")},
    "length": {
        "long": ("long", "long thin", "elongated", "thin"),
        "short": ("short", "short wide", "stubby", "broad short"),
    },
    "tip": {
        "pointed": ("pointed", "pointy", "sharply pointed", "sharp"),
        "round": ("round", "rounded", "smooth rounded", "oval"),
    },
    "size": {"large": ("large", "big", "very large"), "small": ("small", "tiny", "very small")},
    "purple": ("purple", "violet"),
}
CENTRES = ("center", "stigma", "pistil", "middle")
MARKS = {
    "spots": ("{} spots", "{} dots", "many {} spots"),
    "stripes": ("{} stripes", "{} veins", "{} streaks"),
    "edges": ("{} edges", "{} borders", "{} outlines"),
}
STAMEN = (
    *("long white stamen", "long white filaments", "visible white stamen with dark anthers"),
    *("a fussy white stamen", "thin white stamen sticking out"),
)
OPENINGS = (
    *("this flower has", "a flower with", "the flower has", "this is a flower with", "this unique flower has"),
    *("the flower shown has", "flower with", "this pretty flower has"),
)


def describe(flower: Flower, words: random.Random) -> str:
    """One caption: a random most of the flower's attributes, in varied words and order."""

    def mentions(chance: float = 0.78) -> bool:  # an attribute; the petals' colour nearly always
        return words.random() < chance

    def say(attribute: str) -> str:
        return words.choice(WORDS[attribute][getattr(flower, attribute)])

    def tint(name: str) -> str:
        return words.choice(WORDS.get(name, (name,)))

    count = say("count") if mentions() else ""
    form = [say(attribute) for attribute in ("length", "tip") if mentions()]
    colour = words.choice(("", "", "", "bright ")) + tint(flower.petals) if mentions(0.95) else ""
    size = say("size") if mentions() else ""
    middle = tint(flower.centre) if mentions(0.85) else ""
    mark = ""
    if flower.pattern != "plain" and mentions(0.85):
        mark = words.choice(MARKS[flower.pattern]).format(tint(PATTERN_COLOUR[flower.pattern]))
    stamen = words.choice(STAMEN) if flower.stamen == "visible" and mentions(0.85) else ""
    if not (form or colour):
        colour = tint(flower.petals)
    if words.random() < 0.3:
        form.reverse()
    centre = words.choice(CENTRES)
    noun = " ".join(filter(None, (size, middle, centre))) if size or middle else ""
    extras = " and ".join(filter(None, (f"{words.choice(('a', 'a', 'one'))} {noun}" if noun else "", stamen)))
    petals = " ".join(filter(None, (count, *form, colour, "petals")))
    marked = f" with {mark}" if mark else ""
    style = words.randrange(5)
    if style <= 1:  # this flower has five long pointed yellow petals with red spots and a large brown center
        text = f"{words.choice(OPENINGS)} {petals}{marked}" + (f" and {extras}" if extras else "")
    elif style == 2:  # the petals are long, pointed and yellow with red spots, and the center is large and brown
        looks = [*form, colour] if colour else form
        listed = ", ".join(looks[:-1]) + (" and " if len(looks) > 1 else "") + looks[-1]
        text = f"the {count + ' ' if count and ' ' not in count else ''}petals are {listed}{marked}"
        text += f", and the {centre} is " + " and ".join(filter(None, (size, middle))) if noun else ""
        text += f", with {stamen}" if stamen else ""
    elif style == 3:  # five long yellow petals with red spots surround a large brown center
        around = f"{words.choice(('surround', 'around'))} {extras}" if extras else "on this flower"
        text = f"{petals}{marked} {around}"
    else:  # this flower is yellow in color, with long pointed petals that have red spots, and a large brown center
        plain = " ".join(filter(None, (count, *form, "petals")))
        hue = f"this flower is {colour} {words.choice(('', 'in color'))}".strip() + ", with" if colour else ""
        text = f"{hue or 'a flower with'} {plain}"
        text += (f" that have {mark}" if mark else "") + (f", and {extras}" if extras else "")
    return text + words.choice(("", "."))


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word and punctuation mark of the captions, in alphabetical order: those of 200 captions of each class."""
    words = random.Random("vocabulary")
    captions = (describe(flower, words) for flower in flower_classes()[0] for _ in range(200))
    return tuple(sorted({word for text in captions for word in re.findall(r"\w+|[^\w\s]", text)}))
