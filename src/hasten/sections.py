"""sections.py: what a recipe may want done to the model itself, once, before any run: compiled and quantised.

It knows settings and their ranges; compile.py and quantize.py do the work, hosts say what they can reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.values import at_least, one_of

FORMATS = ("none", "auto", "fp8", "int8")


@dataclass(frozen=True)
class Compile:
    """What is compiled, and how. Nothing unless asked for.

    blocks: the transformer's blocks, one graph for each class. decoder: the autoencoder's decoder; DC-AE's in fused
    passes, uncompiled. text: the text encoders. limit: graphs after which what would need another one runs uncompiled;
    -1 for any number.
    fuse: "auto" runs the blocks as fused passes wherever they are compiled or quantised, "always" without either
    too, "never" as the host wrote them.
    cuda_graph: "always" records what each fused block launches as a CUDA graph, once for each size, and replays it;
    "auto" does so for blocks that are compiled; "never" leaves every launch to Python. So it is with encoders' layers.
    """

    blocks: bool = False
    decoder: bool = False
    text: bool = False
    backend: str = "inductor"
    dynamic: bool = True
    limit: int = 32
    fuse: str = "auto"
    cuda_graph: str = "auto"

    def __post_init__(self) -> None:
        one_of("compile.fuse", self.fuse, ("auto", "always", "never"))
        one_of("compile.cuda_graph", self.cuda_graph, ("auto", "always", "never"))
        at_least("compile.limit", self.limit, -1, "-1 means unlimited")
        if not self.backend:
            raise ValueError("compile.backend is empty: leave it out for inductor, torch.compile's usual one.")


@dataclass(frozen=True)
class Quantize:
    """The linear layers of the transformer's blocks in 8 bits.

    format: "fp8" (compute capability 8.9 and newer), "int8", or "auto", which takes the first of them that the device
    has. keep: the original weights stay in the computer's memory, so that they can be put back in the end.
    """

    format: str = "none"
    keep: bool = True

    def __post_init__(self) -> None:
        one_of("quantize.format", self.format, FORMATS)
