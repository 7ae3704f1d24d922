"""Captioned scenes that the project draws itself: the whole world flux-nano knows.

A `Scene` says what a picture shows (one or two things, their colours, size, place and ground), together with one
caption. `draw` paints it at any size: scenes are scale-free, one spec serves every aspect ratio. Nothing here knows
of models; the flow training, the checker and the benchmarks all draw from this file. The same seed gives the same
scene and, at the same size, the same pixels.

Letters and digits: DejaVu Sans Bold (Bitstream Vera licence). Emoji: Noto Color Emoji (SIL OFL 1.1), under their
Unicode names; Debian packages fonts-dejavu-core and fonts-noto-color-emoji.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_FOLDER = Path(os.environ.get("NANO_FONTS", "/usr/share/fonts/truetype"))
LETTER_FONT = FONT_FOLDER / "dejavu" / "DejaVuSans-Bold.ttf"
EMOJI_FONT = FONT_FOLDER / "noto" / "NotoColorEmoji.ttf"
EMOJI_POINTS = 109  # the font holds bitmaps of this one size

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "diamond",
    "hexagon", "cross", "ring", "crescent", "arrow", "drop",
)  # fmt: skip
# Without I and O, which are a bar and a ring in this typeface; without 0 for the same reason.
LETTERS = tuple("ABCDEFGHJKLMNPQRSTUVWXYZ")
DIGITS = tuple("123456789")
EMOJI = tuple("🍎🍋🍌🍓🍉🍒🥕🍄🍔🍕🍩🐱🐶🐼🐸🐷🦊🐠🐙🐞🌻🌵🌲🚀🚗⚽☕🎈🐧🏠🎃🦋")
EMOJI_NAMES = {unicodedata.name(glyph).lower(): glyph for glyph in EMOJI}

COLOURS = {
    "red": (218, 32, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 212, 20),
    "green": (32, 152, 60),
    "blue": (30, 80, 214),
    "purple": (130, 50, 180),
    "pink": (250, 120, 180),
    "brown": (124, 74, 36),
    "black": (24, 24, 28),
    "white": (252, 252, 252),
}
GROUND_COLOURS = {
    "white": (248, 248, 246),
    "grey": (190, 194, 200),
    "yellow": (250, 232, 150),
    "pink": (250, 205, 220),
    "blue": (160, 200, 240),
    "green": (170, 220, 170),
    "orange": (250, 200, 150),
    "purple": (205, 185, 235),
}
GROUND_KINDS = ("plain", "gradient", "stripes", "dots", "checks", "table")
UNSAID_GROUND = (240, 240, 238)
WALL = (238, 234, 226)
PALE = {"white", "grey"}

# What flux-nano is taught. All of the above can be drawn, and the text encoders and the checker know it all; the hour
# of CPU that the first weights were given was too short for it, and a smaller world drawn right is the better model.
TAUGHT_SHAPES = {"circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "crescent", "arrow"}
TAUGHT_SIGNS = {*(f"letter {x}" for x in "ACEHKLMSTXYZ"), *(f"number {x}" for x in "3478")}
TAUGHT_EMOJI = {unicodedata.name(glyph).lower() for glyph in "🍎🍋🍌🍓🥕🍄🍔🍩🐱🐼🐸🐷🐞🌻🌲🚗⚽🎈"}
TAUGHT = TAUGHT_SHAPES | TAUGHT_SIGNS | TAUGHT_EMOJI
TAUGHT_GROUNDS = {"plain", "gradient", "stripes", "table"}

PLACES = {
    "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0),
    "top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1),
}  # fmt: skip
TABLE_PLACES = (None, "left", "right", "centre")
UNITS = 8  # of the layout's grid along the short side: one token of a 128-pixel picture
SIZE_UNITS = {"small": 3, None: 4, "large": 5}
PAIR_UNITS = 3
FILL = 0.92  # share of its box that a thing fills
HELD_OUT_SHARE = 0.06

BUCKETS = ((128, 128), (128, 192), (192, 128), (192, 192), (192, 256), (256, 192), (256, 256))


@dataclass(frozen=True)
class Thing:
    """One drawn object; colour is None for emoji, which have their own."""

    name: str
    kind: str  # shape | letter | digit | emoji
    colour: str | None


@dataclass(frozen=True)
class Ground:
    """What lies behind; colour is None when the caption says nothing of it."""

    kind: str
    colour: str | None


@dataclass(frozen=True)
class Scene:
    """All that a picture must show, and one way to ask for it.

    relation: "left" or "above": first to the left of, or above, second; None with one thing.
    seed: which scene this is; `draw_scene(seed)` gives it again.
    """

    first: Thing
    second: Thing | None
    relation: str | None
    place: str | None
    size: str | None
    ground: Ground
    caption: str
    seed: int


@dataclass(frozen=True)
class Drawing:
    """A painted scene. cells: (H/8, W/8) uint8, 0 ground, 1 first thing, 2 second."""

    image: Image.Image
    cells: np.ndarray
    boxes: tuple[tuple[float, float, float, float], ...]


def _names() -> tuple[str, ...]:
    return (*SHAPES, *(f"letter {x}" for x in LETTERS), *(f"number {x}" for x in DIGITS), *EMOJI_NAMES)


OBJECT_NAMES = _names()
OBJECT_INDEX = {name: index for index, name in enumerate(OBJECT_NAMES)}
COLOUR_INDEX = {name: index for index, name in enumerate(COLOURS)}


# What a scene may be


def is_held_out(scene: Scene) -> bool:
    """True when this combination is kept from all training.

    One thing: (object, colour, place), on whatever ground. Two: (object, colour, relation, object, colour).
    """
    parts: list[str | None] = [scene.first.name, scene.first.colour]
    if scene.second is None:
        parts.append(scene.place)
    else:
        parts += [scene.relation, scene.second.name, scene.second.colour]
    digest = hashlib.sha256("|".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _pick_thing(rng: random.Random, ground: Ground) -> Thing:
    kind = rng.choices(("emoji", "shape", "letter", "digit"), (36, 28, 26, 10))[0]
    if kind == "emoji":
        return Thing(rng.choice(tuple(EMOJI_NAMES)), kind, None)
    colours = [c for c in COLOURS if c != ground.colour and not (c == "white" and (ground.colour or "white") in PALE)]
    if ground.kind != "plain":  # the pattern's second tone is white
        colours = [c for c in colours if c != "white"]
    colour = rng.choice(colours)
    if kind == "shape":
        return Thing(rng.choice(SHAPES), kind, colour)
    if kind == "letter":
        return Thing(f"letter {rng.choice(LETTERS)}", kind, colour)
    return Thing(f"number {rng.choice(DIGITS)}", kind, colour)


def draw_scene(seed: int) -> Scene:
    """The scene of this seed, held out or not."""
    rng = random.Random(seed)
    if rng.random() < 0.25:
        ground = Ground("plain", None)
    else:
        kind = rng.choices(GROUND_KINDS, (34, 12, 12, 10, 10, 22))[0]
        ground = Ground(kind, rng.choice(tuple(GROUND_COLOURS)))
        if kind in ("stripes", "dots", "checks", "gradient") and ground.colour == "white":
            ground = Ground(kind, "blue")
    first = _pick_thing(rng, ground)
    if rng.random() < 0.16:
        second = _pick_thing(rng, ground)
        while second.name == first.name:
            second = _pick_thing(rng, ground)
        relation = "left" if ground.kind == "table" or rng.random() < 0.5 else "above"
        return _said(rng, Scene(first, second, relation, None, None, ground, "", seed))
    places = TABLE_PLACES if ground.kind == "table" else (None, None, *PLACES)
    place = rng.choice(places)
    size = rng.choices((None, "small", "large"), (5, 2, 3))[0]
    return _said(rng, Scene(first, None, None, place, size, ground, "", seed))


def is_taught(scene: Scene) -> bool:
    """True when everything in the scene belongs to what flux-nano is taught."""
    known = scene.first.name in TAUGHT and (scene.second is None or scene.second.name in TAUGHT)
    return known and scene.ground.kind in TAUGHT_GROUNDS


def scenes(start: int, *, held_out: bool = False, taught: bool = True) -> Iterator[Scene]:
    """Scenes from seed `start` on, of one side of the split only; taught=False gives the whole drawable world."""
    seed = start
    while True:
        scene = draw_scene(seed)
        if is_held_out(scene) == held_out and (is_taught(scene) or not taught):
            yield scene
        seed += 1


def held_out_prompts(n: int = 200) -> list[Scene]:
    """The n scenes that flux-nano is measured on; `.caption` is the prompt."""
    source = scenes(900_000_000, held_out=True)
    return [next(source) for _ in range(n)]


# What it is called


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _thing_phrase(rng: random.Random, thing: Thing, size: str | None) -> str:
    adjective = (
        f"{rng.choice({'large': ('large', 'large', 'big'), 'small': ('small', 'small', 'little')}[size])} "
        if size
        else ""
    )
    if thing.kind == "emoji":
        return _article(adjective + thing.name)
    noun = thing.name
    if thing.kind == "digit" and rng.random() < 0.3:
        noun = noun.replace("number", "digit")
    if thing.kind != "shape" and not size and rng.random() < 0.25:
        return f"the {noun} in {thing.colour}"
    return _article(f"{adjective}{thing.colour} {noun}")


def _place_phrase(rng: random.Random, place: str) -> str:
    if place == "centre":
        return rng.choice(("in the centre", "in the center", "in the middle"))
    if " " in place:
        return rng.choice((f"at the {place}", f"in the {place} corner", f"in the {place}"))
    if place in ("left", "right"):
        return rng.choice((f"on the {place}", f"on the {place} side", f"at the {place}"))
    return rng.choice((f"at the {place}", f"near the {place}"))


def _ground_phrase(rng: random.Random, ground: Ground) -> str:
    colour = ground.colour
    if ground.kind == "table":
        return f"on {_article(f'{colour} table')}"
    if colour is None:
        return ""
    phrases = {
        "plain": (
            f"on {_article(f'{colour} background')}",
            f"against {_article(f'{colour} background')}",
            f"on a plain {colour} background",
        ),
        "gradient": (f"on {_article(f'{colour} gradient')}", f"on {_article(f'{colour} gradient background')}"),
        "stripes": (
            f"on a striped {colour} background",
            f"on {colour} stripes",
            f"on a background with {colour} stripes",
        ),
        "dots": (f"on a dotted {colour} background", f"on {colour} dots", f"on a background with {colour} dots"),
        "checks": (
            f"on a checkered {colour} background",
            f"on {colour} checks",
            f"on a background with {colour} checks",
        ),
    }
    return rng.choice(phrases[ground.kind])


def _said(rng: random.Random, scene: Scene) -> Scene:
    """The scene with its caption."""
    first = _thing_phrase(rng, scene.first, scene.size)
    ground = _ground_phrase(rng, scene.ground)
    if scene.second is not None:
        second = _thing_phrase(rng, scene.second, None)
        middle = {
            "left": (
                f"{first} to the left of {second}",
                f"{first} left of {second}",
                f"{second} to the right of {first}",
            ),
            "above": (f"{first} above {second}", f"{first} above {second}", f"{second} below {first}"),
        }
        words = f"{rng.choice(middle[str(scene.relation)])} {ground}"
    else:
        place = _place_phrase(rng, scene.place) if scene.place else ""
        if place and ground and rng.random() < 0.3 and scene.ground.kind != "table":
            words = f"{first} {ground}, {place}"
        elif place and ground and scene.ground.kind == "table":
            words = f"{first} {place}, {ground}"
        else:
            words = f"{first} {place} {ground}"
    caption = " ".join(words.split())
    return Scene(**{**scene.__dict__, "caption": caption})


# How it is painted

SPRITE = 256  # side of the masters that every thing is scaled down from


def _polygon(points: list[tuple[float, float]]) -> Image.Image:
    mask = Image.new("L", (4 * SPRITE, 4 * SPRITE))
    ImageDraw.Draw(mask).polygon([((x + 1) * 2 * SPRITE, (y + 1) * 2 * SPRITE) for x, y in points], fill=255)
    return mask


def _ngon(n: int, turn: float, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
    angles = [2 * math.pi * k / n + turn for k in range(n)]
    return [(radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a)) for k, a in enumerate(angles)]


def _disc(radius: float, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    axis = (np.arange(4 * SPRITE) + 0.5) / (2 * SPRITE) - 1
    return (axis[None, :] - centre[0]) ** 2 + (axis[:, None] - centre[1]) ** 2 <= radius**2


def _from_bool(inside: np.ndarray) -> Image.Image:
    return Image.fromarray((inside * 255).astype(np.uint8))


def _shape_mask(name: str) -> Image.Image:
    if name == "circle":
        return _from_bool(_disc(1.0))
    if name == "ring":
        return _from_bool(_disc(1.0) & ~_disc(0.58))
    if name == "crescent":
        return _from_bool(_disc(1.0) & ~_disc(0.82, (0.45, -0.1)))
    if name == "heart":
        t = np.linspace(0, 2 * math.pi, 400)
        x, y = 16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return _polygon([(float(a) / 17, float(b + 2.5) / 17) for a, b in zip(x, y, strict=True)])
    if name == "drop":
        body = _from_bool(_disc(0.64, (0.0, 0.36)))
        tip = _polygon([(0.0, -1.0), (0.573, 0.075), (-0.573, 0.075)])
        return Image.fromarray(np.maximum(np.asarray(body), np.asarray(tip)))
    points = {
        "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
        "triangle": [(0, -0.9), (1.0, 0.83), (-1.0, 0.83)],
        "star": _ngon(10, -math.pi / 2, (1.0, 0.42)),
        "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
        "hexagon": _ngon(6, 0.0),
        "cross": [(-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
                  (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32)],
        "arrow": [(1, 0), (0.1, -0.85), (0.1, -0.34), (-1, -0.34), (-1, 0.34), (0.1, 0.34), (0.1, 0.85)],
    }  # fmt: skip
    return _polygon(points[name])


def _tight(sprite: Image.Image) -> Image.Image:
    """The sprite cropped to what is painted and centred in a SPRITE square."""
    sprite = sprite.crop(sprite.getchannel("A").getbbox())
    scale = SPRITE / max(sprite.size)
    sprite = sprite.resize(
        (max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale))), Image.Resampling.LANCZOS
    )
    square = Image.new("RGBA", (SPRITE, SPRITE))
    square.paste(sprite, ((SPRITE - sprite.width) // 2, (SPRITE - sprite.height) // 2))
    return square


@cache
def sprite(name: str, colour: str | None) -> Image.Image:
    """The RGBA master of a thing, SPRITE pixels square, tight in its longer side."""
    if name in EMOJI_NAMES:
        font = ImageFont.truetype(str(EMOJI_FONT), EMOJI_POINTS)
        canvas = Image.new("RGBA", (180, 180))
        ImageDraw.Draw(canvas).text((20, 20), EMOJI_NAMES[name], font=font, embedded_color=True)
        return _tight(canvas)
    if name in SHAPES:
        mask = _shape_mask(name)
    else:
        font = ImageFont.truetype(str(LETTER_FONT), 800)
        mask = Image.new("L", (1200, 1200))
        ImageDraw.Draw(mask).text((600, 600), name.split()[1], font=font, fill=255, anchor="mm")
    canvas = Image.new("RGBA", mask.size, COLOURS[str(colour)])
    canvas.putalpha(mask)
    return _tight(canvas)


def _ground_pixels(ground: Ground, width: int, height: int) -> np.ndarray:
    """(H, W, 3) float32 in 0..255. Edges of patterns are smoothed over one pixel."""
    short = min(width, height)
    base = np.array(GROUND_COLOURS[ground.colour] if ground.colour else UNSAID_GROUND, np.float32)
    light = base + (255 - base) * 0.62
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    if ground.kind == "plain":
        return np.broadcast_to(base, (height, width, 3)).copy()
    if ground.kind == "gradient":
        share = (y / height)[..., None]
        return (base * 0.82) * share + (base + (255 - base) * 0.7) * (1 - share)
    if ground.kind == "table":
        horizon = height * 0.6
        share = np.clip(y - horizon + 0.5, 0, 1)[..., None]
        shade = 0.8 + 0.14 * ((y - horizon) / (height - horizon)).clip(0, 1)[..., None]
        return np.array(WALL, np.float32) * (1 - share) + base * shade * share
    if ground.kind == "stripes":
        period = short / 6
        wave = np.abs((x + y) / math.sqrt(2) / period % 1.0 - 0.5) - 0.25
        share = np.clip(wave * period + 0.5, 0, 1)[..., None]
    elif ground.kind == "checks":
        period = short / 4
        a, b = (np.clip((np.abs(v / period % 1.0 - 0.5) - 0.25) * period + 0.5, 0, 1) for v in (x, y))
        share = (a * (1 - b) + b * (1 - a))[..., None]
    else:
        period = short / 5.3
        distance = np.hypot((x / period + 0.5) % 1.0 - 0.5, (y / period + 0.5) % 1.0 - 0.5) * period
        share = np.clip(period * 0.24 - distance + 0.5, 0, 1)[..., None]
    return base * share + light * (1 - share)


def _layout(scene: Scene, width: int, height: int) -> list[tuple[float, float, float]]:
    """(left, top, side) in pixels of each thing's box, on a grid of an eighth of the short side.

    Nothing is jittered: what a prompt asks for has one layout. A model that was given an hour of CPU learns that;
    with free positions and sizes it did not get as far as recognisable things.
    """
    unit = min(width, height) / UNITS
    columns, rows = width / unit, height / unit
    if scene.second is not None:
        n = PAIR_UNITS
        floor = rows - 1 - n if scene.ground.kind == "table" else (rows - n) / 2
        if scene.relation == "left":
            spots = [((columns - n) / 2 + sign * 2, floor) for sign in (-1, 1)]
        else:
            spots = [((columns - n) / 2, (rows - n) / 2 + sign * 2) for sign in (-1, 1)]
    else:
        n = SIZE_UNITS[scene.size]
        dx, dy = PLACES.get(scene.place or "", (0, 0))
        top = rows - 1 - n if scene.ground.kind == "table" else (rows - n) / 2 * (1 + dy)
        spots = [((columns - n) / 2 * (1 + dx), top)]
    return [(x * unit, y * unit, n * unit) for x, y in spots]


def _jittered(scene: Scene, spots: list[tuple[float, float, float]], unit: float) -> list[tuple[float, float, float]]:
    """The boxes moved by up to a third of a unit or so and made smaller by up to a tenth, fixed by the seed."""
    rng = random.Random(scene.seed * 1_000_003 + 7)
    moved = []
    for x, y, side in spots:
        smaller = side * rng.uniform(0.9, 1.0)
        reach = (side - smaller) / 2 + unit / 3
        moved.append(
            (
                x + (side - smaller) / 2 + rng.uniform(-reach, reach),
                y + (side - smaller) / 2 + rng.uniform(-reach, reach),
                smaller,
            )
        )
    return moved


def draw(scene: Scene, width: int, height: int, *, jitter: bool = False) -> Drawing:
    """The painted scene, width and height in pixels, multiples of 16.

    jitter: move and resize the things a little, for training a checker that must not depend on the grid.
    """
    pixels = _ground_pixels(scene.ground, width, height)
    cells = np.zeros((height // 8, width // 8), np.uint8)
    boxes = []
    things = [thing for thing in (scene.first, scene.second) if thing is not None]
    spots = _layout(scene, width, height)
    if jitter:
        spots = _jittered(scene, spots, min(width, height) / UNITS)
    for index, (thing, (x, y, side)) in enumerate(zip(things, spots, strict=True), 1):
        master = sprite(thing.name, thing.colour)
        size = round(side * FILL)
        painted = np.asarray(master.resize((size, size), Image.Resampling.BOX), np.float32)
        left = min(max(round(x + (side - size) / 2), 0), width - size)
        top = min(max(round(y + (side - size) / 2), 0), height - size)
        if scene.ground.kind == "table":
            top = min(top + _empty_rows(painted), height - size)
            _shade(pixels, left + size / 2, top + size - _empty_rows(painted), size)
        alpha = painted[..., 3:] / 255
        window = pixels[top : top + size, left : left + size]
        window *= 1 - alpha
        window += painted[..., :3] * alpha
        covered = np.zeros((height, width), np.float32)
        covered[top : top + size, left : left + size] = alpha[..., 0]
        share = covered.reshape(height // 8, 8, width // 8, 8).mean((1, 3))
        cells[share > 0.3] = index
        boxes.append((left / width, top / height, (left + size) / width, (top + size) / height))
    image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
    return Drawing(image, cells, tuple(boxes))


def _empty_rows(painted: np.ndarray) -> int:
    """Rows below the lowest painted one: a wide thing must stand on the table, not float."""
    rows = np.flatnonzero(painted[..., 3].max(1) > 40)
    return painted.shape[0] - 1 - int(rows[-1])


def _shade(pixels: np.ndarray, x: float, foot: float, size: int) -> None:
    """Darkens an ellipse under a thing on a table, in place."""
    height, width = pixels.shape[:2]
    yy, xx = np.mgrid[0:height, 0:width]
    distance = np.hypot((xx - x) / (0.42 * size), (yy - foot + 0.02 * size) / (0.07 * size))
    pixels *= (1 - 0.28 * np.clip((1.15 - distance) / 0.3, 0, 1))[..., None].astype(np.float32)
