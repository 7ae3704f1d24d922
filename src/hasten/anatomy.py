"""anatomy.py says what a family IS: its stages of blocks, their streams, where its signals lie.

Data only. Hosts say how each of these is reached in their own modules; the engine counts blocks
through all stages with one index, so block 19 of FLUX.1 is its first single block.
"""

from __future__ import annotations

from dataclasses import dataclass

# What a block of FLUX.1 is made of; hosts say how each of these is reached.
PARTS = ("modulation", "norm", "qkv", "attention", "proj", "mlp")


@dataclass(frozen=True)
class Stage:
    """A run of equal blocks: `double` works on two streams, `single` on their concatenation.

    parts: what a host can reach inside each block. Token caching needs an "mlp" that rows can be sent through.
    """

    name: str
    streams: tuple[str, ...]
    blocks: int
    parts: tuple[str, ...] = PARTS


@dataclass(frozen=True)
class Anatomy:
    """The host-neutral view of one transformer: a family's name and its stages in the order they run."""

    family: str
    stages: tuple[Stage, ...]

    @property
    def blocks(self) -> int:
        """How many blocks there are through all stages."""
        return sum(stage.blocks for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """The stage of that name. Raises KeyError when the family has none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def stage_of(self, block: int) -> tuple[Stage, int]:
        """The stage that a block lies in, and its place there, for an index counted through all stages."""
        for stage in self.stages:
            if block < stage.blocks:
                return stage, block
            block -= stage.blocks
        raise IndexError(block)

    def first_of(self, name: str) -> int:
        """The index of the stage's first block, counted through all stages."""
        before = 0
        for stage in self.stages:
            if stage.name == name:
                return before
            before += stage.blocks
        raise KeyError(name)


def flux(double: int = 19, single: int = 38) -> Anatomy:
    """FLUX.1's anatomy: double blocks on text and image apart, then single blocks on both joined.

    Source: black-forest-labs/flux, model.py (dev and schnell: 19 and 38 blocks).
    """
    return Anatomy(
        "flux",
        (Stage("double", ("image", "text"), double), Stage("single", ("joint",), single)),
    )


def sana(blocks: int = 20) -> Anatomy:
    """Sana's anatomy: blocks on image tokens that look at text apart, which none of them changes.

    They are named as FLUX's first stage, so that recipes, skip lists and other packs' block patches count them alike;
    no block works on both joined. Source: NVlabs/Sana, sana_multi_scale.py (600M 28, 1600M 20, 4800M 60 blocks).
    """
    # Its feed-forward looks at neighbours through a convolution: no token goes through it alone.
    parts = tuple(part for part in PARTS if part != "mlp")
    return Anatomy("sana", (Stage("double", ("image", "text"), blocks, parts), Stage("single", ("joint",), 0, parts)))
