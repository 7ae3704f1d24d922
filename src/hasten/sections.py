"""sections.py: what a recipe may want beside its cache: tokens, blocks that are skipped, attention, and what is done to
the model itself, once, before any run (compiled and quantised).

It knows settings and their ranges; compile.py and quantize.py do the work, hosts say what they can reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.values import at_least, between, one_of

FORMATS = ("none", "auto", "fp8", "int8")

# attention.py's back-ends, "auto" for the fastest that is near enough, "unchanged" for the host's own.
ATTENTIONS = (
    *("unchanged", "auto", "sdpa", "cudnn", "flash2", "flash3", "flex", "sage", "kitchen", "int8", "int8_fp8"),
    *("sparge", "sol", "sparse"),
)


@dataclass(frozen=True)
class Tokens:
    """Which tokens toca and duca refresh between full evaluations, and how what they reuse is kept.

    ratio: the share of tokens, before the layer's and the stage's term. depth: the layer term falls from 1.5 to 0.5
    over the "model"'s own blocks of a stage, or over 27 as in the "original". score: "attention" received, "value"
    norm, "random", or "age" alone. queries: so many of them, evenly spread, tell the attention received; 0 takes all.
    staleness: what a token gains that was left out for a whole period. spatial: what the best token of each cell of
    `cell` x `cell` gains, a share of its own score. full_first: steps at the beginning that are computed in full.
    memory: what is kept is in the "model"'s dtype, in "bf16", in "fp8", or in the model's dtype on the "host".
    record: on a GPU a partial evaluation's launches are recorded once a run and played from then on, where the model's
    weights stay in place.
    The defaults are those of FLUX in ToCa's code (arXiv 2410.05317), which the original ComfyUI-Lightning took over;
    but for `depth` and `queries`, there 27 and 0.
    """

    ratio: float = 0.1
    depth: str = "model"
    double: float = 0.4
    single: float = 1.6
    score: str = "attention"
    queries: int = 256
    staleness: float = 0.25
    spatial: float = 0.0
    cell: int = 4
    seed: int = 0
    full_first: int = 3
    memory: str = "model"
    record: bool = True

    def __post_init__(self) -> None:
        between("tokens.ratio", self.ratio, 0.0, 1.0)
        one_of("tokens.depth", self.depth, ("model", "original"))
        between("tokens.double", self.double, 0.0, 100.0)
        between("tokens.single", self.single, 0.0, 100.0)
        one_of("tokens.score", self.score, ("attention", "value", "random", "age"))
        at_least("tokens.queries", self.queries, 0, "0 takes all of them")
        between("tokens.staleness", self.staleness, 0.0, 100.0)
        between("tokens.spatial", self.spatial, 0.0, 100.0)
        at_least("tokens.cell", self.cell, 1, "1 gives every token the same")
        at_least("tokens.seed", self.seed, 0, "it seeds the random score")
        at_least("tokens.full_first", self.full_first, 0, "0 leaves it to the first evaluation")
        one_of("tokens.memory", self.memory, ("model", "bf16", "fp8", "host"))


@dataclass(frozen=True)
class Skip:
    """Blocks that are never run: their input passes on unchanged. Indices count from 0."""

    double: tuple[int, ...] = ()
    single: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("double", "single"):
            for index in getattr(self, name):
                at_least(f"skip.{name}", index, 0, "blocks count from 0")


@dataclass(frozen=True)
class Attention:
    """Which attention the model's blocks use; the host's own in the steps and blocks that stay exact.

    error: the largest relative L1 error that "auto" may choose. keep: the share of blocks of keys that "sparse" and
    "sol" keep. tuned: a file of `hasten tune-attention` with "sparse"'s settings for each head, instead of keep.
    exact_first, exact_last: of the run's intervals; exact_blocks: counted from 0 over all blocks.
    """

    backend: str = "unchanged"
    error: float = 0.06
    keep: float = 0.5
    tuned: str = ""
    exact_first: int = 0
    exact_last: int = 0
    exact_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        one_of("attention.backend", self.backend, ATTENTIONS)
        between("attention.error", self.error, 0.0, 1.0)
        between("attention.keep", self.keep, 0.01, 1.0)
        if self.tuned and self.backend != "sparse":
            raise ValueError(f'attention.tuned is given but attention.backend is {self.backend}: set it to "sparse".')
        at_least("attention.exact_first", self.exact_first, 0, "0 keeps no step exact")
        at_least("attention.exact_last", self.exact_last, 0, "0 keeps no step exact")
        for block in self.exact_blocks:
            at_least("attention.exact_blocks", block, 0, "blocks count from 0")


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
