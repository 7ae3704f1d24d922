"""Judges whether a picture shows what its scene asks for: the right things, in their colours, at their places.

A small convolutional network (weights in checker.safetensors, trained by train_checker.py on drawn scenes) names what
each 8x8 pixels of the picture show. The verdict is arithmetic on those names; nothing here knows of flux-nano.

    verdict = Checker().check(image, scene)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from scenes import COLOUR_INDEX, OBJECT_INDEX, PLACES, Scene, Thing, held_out_prompts, sprite
from torch import Tensor, nn

__all__ = ["Checker", "Verdict", "check", "held_out_prompts"]

WEIGHTS = Path(__file__).with_name("checker.safetensors")
SHORT_SIDE = 128  # every picture is judged at this size
GROUND, OTHER = 0, 1 + len(OBJECT_INDEX)  # classes; OTHER is a thing that is none of the known ones
OWN_COLOUR = len(COLOUR_INDEX)
PURITY = 0.6  # share of the thing's cells that must carry its name
LEAST_CELLS = 4
DEAD_ZONE = 0.08  # share of the picture's side within which a thing counts as central
SIDE_GAP = 0.15  # least distance between the centres of a pair along its relation
COLOUR_TOLERANCE = 0.2  # of an emoji's mean colour, per channel in 0..1


@dataclass(frozen=True)
class Verdict:
    """What is right about a picture."""

    object_ok: bool
    colour_ok: bool
    place_ok: bool

    @property
    def ok(self) -> bool:
        """True when all is right."""
        return self.object_ok and self.colour_ok and self.place_ok


class CheckerNet(nn.Module):
    """(B, 3, H, W) in 0..1 -> object (B, C, H/8, W/8), colour (B, 11, ...) and mean RGB (B, 3, ...) of each cell."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 112)
        self.stem = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(widths))
        )
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(112, 112, 3, 1, d, dilation=d), nn.BatchNorm2d(112), nn.ReLU())
            for d in (1, 2, 4, 1)
        )
        self.objects = nn.Conv2d(112, OTHER + 1, 1)
        self.colours = nn.Conv2d(112, OWN_COLOUR + 1, 1)
        self.tint = nn.Conv2d(112, 3, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.stem(pictures * 2 - 1)
        for layer in self.body:
            x = x + layer(x)
        return self.objects(x), self.colours(x), self.tint(x)


@cache
def own_tint(name: str) -> tuple[float, float, float]:
    """An emoji's mean colour, 0..1, weighted by its alpha."""
    pixels = np.asarray(sprite(name, None), np.float32) / 255
    alpha = pixels[..., 3:]
    red, green, blue = (pixels[..., :3] * alpha).sum((0, 1)) / alpha.sum()
    return float(red), float(green), float(blue)


@dataclass(frozen=True)
class Reading:
    """What the network saw. names, colours: (rows, columns, classes) probabilities; tint: (rows, columns, 3)."""

    names: np.ndarray
    colours: np.ndarray
    tint: np.ndarray


class Checker:
    """The trained checker; loads once, judges any picture."""

    def __init__(self, weights: Path = WEIGHTS) -> None:
        self.net = CheckerNet().eval()
        self.net.load_state_dict(
            {
                name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in load_file(weights).items()
            }
        )

    @torch.no_grad()
    def read(self, image: Image.Image) -> Reading:
        """Names what each cell of the picture shows."""
        scale = SHORT_SIDE / min(image.size)
        size = [max(8, round(side * scale / 8) * 8) for side in image.size]
        if tuple(size) != image.size:
            image = image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255).permute(2, 0, 1)[None]
        names, colours, tint = (part[0].permute(1, 2, 0) for part in self.net(pixels))
        return Reading(names.softmax(-1).numpy(), colours.softmax(-1).numpy(), tint.numpy())

    def check(self, image: Image.Image, scene: Scene) -> Verdict:
        """The verdict on one picture."""
        reading = self.read(image)
        shown = 1 - reading.names[..., GROUND]
        if (shown > 0.5).sum() < LEAST_CELLS:
            return Verdict(False, False, False)
        if scene.second is None:
            here = shown > 0.5
            name = reading.names[here].sum(0)
            object_ok = bool(
                name[1:].argmax() == OBJECT_INDEX[scene.first.name] and name[1:].max() / name[1:].sum() > PURITY
            )
            return Verdict(object_ok, _colour_ok(reading, here, scene.first), _place_ok(*_centre(shown * here), scene))
        return self._check_pair(reading, shown, scene)

    def _check_pair(self, reading: Reading, shown: np.ndarray, scene: Scene) -> Verdict:
        assert scene.second is not None
        shares = [reading.names[..., 1 + OBJECT_INDEX[thing.name]] for thing in (scene.first, scene.second)]
        where = [(shown > 0.5) & (share > 0.4) for share in shares]
        if min(spot.sum() for spot in where) < LEAST_CELLS:
            return Verdict(False, False, False)
        object_ok = bool(sum(share[shown > 0.5].sum() for share in shares) / shown[shown > 0.5].sum() > PURITY)
        colour_ok = all(
            _colour_ok(reading, spot, thing) for spot, thing in zip(where, (scene.first, scene.second), strict=True)
        )
        (ax, ay), (bx, by) = (_centre(spot.astype(np.float32)) for spot in where)
        along, across = (bx - ax, by - ay) if scene.relation == "left" else (by - ay, bx - ax)
        return Verdict(object_ok, colour_ok, bool(along > SIDE_GAP and abs(across) < along))


def _centre(weight: np.ndarray) -> tuple[float, float]:
    """Centre of mass (x, y) in shares of the sides."""
    rows, columns = weight.shape
    total = weight.sum()
    x = (weight.sum(0) * (np.arange(columns) + 0.5)).sum() / total / columns
    y = (weight.sum(1) * (np.arange(rows) + 0.5)).sum() / total / rows
    return float(x), float(y)


def _place_ok(x: float, y: float, scene: Scene) -> bool:
    if scene.place is None:
        return True
    found = [0 if abs(v - 0.5) < DEAD_ZONE else int(np.sign(v - 0.5)) for v in (x, y)]
    wanted = PLACES[scene.place]
    if scene.ground.kind == "table":  # the table says how high it stands
        return found[0] == wanted[0]
    return tuple(found) == wanted


def _colour_ok(reading: Reading, here: np.ndarray, thing: Thing) -> bool:
    if thing.colour is None:
        tint = reading.tint[here].mean(0)
        return bool(np.abs(tint - own_tint(thing.name)).max() < COLOUR_TOLERANCE)
    return bool(reading.colours[here].sum(0)[:OWN_COLOUR].argmax() == COLOUR_INDEX[thing.colour])


@cache
def _default() -> Checker:
    return Checker()


def check(image: Image.Image, spec: Scene) -> Verdict:
    """The verdict of the shipped checker on one picture."""
    return _default().check(image, spec)
