"""One model, its held-out prompts, and the yardsticks: evaluations, seconds, PSNR, SSIM, what the checker accepts.

It draws and measures; which methods there are is said in grid.py, how another library is switched on in peers.py.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))

FIRST_SEED = 7_000  # of the noise; each prompt has its own, the same for every method
TRAIN_SIDE = 40_000_000  # first scene of the prompts that weights and ratios are measured on: never held out
CONVERGED_STEPS = 300


@dataclass(frozen=True)
class Settings:
    """What every row of a table shares. text_tokens: what prompts are padded to, as hasten does for small FLUXes."""

    model: str
    prompts: int = 64
    timing_prompts: int = 4
    width: int = 128
    height: int = 128
    steps: int = 28
    batch: int = 8
    device: str = "cpu"
    dtype: str = "float32"
    guidance: float = 3.5
    text_tokens: int = 64
    converged_steps: int = CONVERGED_STEPS

    def key(self, *also: object) -> str:
        """A short name for everything that pictures depend on: settings and the weights' own hash."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("model", "timing_prompts")}
        return hashlib.sha256(repr((plain, weights_hash(self.model), also)).encode()).hexdigest()[:12]


class Method(Protocol):
    """Something that draws with a pipeline in its own way while its context lasts."""

    @property
    def steps(self) -> int | None:
        """How many steps it takes; None for as many as the uncached run."""

    def on(self, pipe: Any) -> AbstractContextManager[Any]:
        """The context; what it gives may carry the engine's `report`."""


@dataclass(frozen=True)
class Quality:
    """Medians over the prompts; evaluations: the mean over the calls."""

    evaluations: float
    psnr_db: float
    ssim: float
    psnr_converged_db: float | None
    checked: float | None


@dataclass(frozen=True)
class Timing:
    """Medians over the timing prompts, one picture at a time; cache_mib as the engine reports it."""

    wall_s: float
    baseline_wall_s: float
    cache_mib: float | None


class Studio:
    """A pipeline with its prompts encoded; draws any of them under any method."""

    def __init__(self, settings: Settings) -> None:
        from scenes import held_out_prompts

        self.settings = settings
        self.pipe = _pipeline(settings)
        self.scenes = held_out_prompts(settings.prompts)
        self._embeddings, self._pooled = self.encode([scene.caption for scene in self.scenes])
        self.counter = Counter(self.pipe.transformer)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(N, L, C) and (N, C): the text encoders stand outside everything that is measured."""
        tokens = self.settings.text_tokens
        words, pooled, _ = self.pipe.encode_prompt(prompt=list(prompts), prompt_2=None, max_sequence_length=tokens)
        return words, pooled

    def draw(self, first: int, last: int, *, steps: int | None = None) -> Tensor:
        """Pictures first to last - 1, (N, 3, H, W) in 0..1, float32 on the CPU, not rounded to 8 bits."""
        seeds = range(FIRST_SEED + first, FIRST_SEED + last)
        # Slices are new tensors: each call is a lane of its own.
        return self.paint(self._embeddings[first:last], self._pooled[first:last], seeds, steps=steps)

    @torch.no_grad()
    def paint(
        self, words: Tensor, pooled: Tensor, seeds: Sequence[int], *, steps: int | None = None, kind: str = "pt"
    ) -> Tensor:
        """One call of the pipeline on encoded prompts; kind "latent" leaves the decoder out."""
        settings = self.settings
        pictures = self.pipe(
            prompt_embeds=words,
            pooled_prompt_embeds=pooled,
            width=settings.width,
            height=settings.height,
            num_inference_steps=steps or settings.steps,
            guidance_scale=settings.guidance,
            # On the CPU, so that a seed means the same noise on every device.
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            max_sequence_length=settings.text_tokens,
            output_type=kind,
        ).images
        return pictures.to("cpu", torch.float32)

    def batches(self) -> list[tuple[int, int]]:
        """The prompts in the same groups for every method: one call and one decision for each group."""
        step = self.settings.batch
        return [(i, min(i + step, self.settings.prompts)) for i in range(0, self.settings.prompts, step)]

    def draw_all(self, *, steps: int | None = None) -> Tensor:
        """All prompts' pictures, (N, 3, H, W)."""
        return torch.cat([self.draw(*group, steps=steps) for group in self.batches()])

    def wait(self) -> None:
        """Waits until the device has done all that it was given."""
        if self.settings.device.startswith("cuda"):
            torch.cuda.synchronize()


class Counter:
    """Counts how often the model's middle blocks really run, whoever decides about it.

    It listens below the blocks, at the attention and the MLP in the middle of each stage, so it needs nobody's own
    count. An MLP has two thirds of a block's products: a cache that forecasts attention alone (diffusers' TaylorSeer
    as it comes) is charged for the MLPs that it still computes, and one that sends some of the tokens through them
    (ToCa) for those. First blocks that gates run anyway are not counted.
    """

    def __init__(self, transformer: Any) -> None:
        self.runs = 0.0
        self._tokens: dict[Any, int] = {}
        for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
            block = blocks[len(blocks) // 2]
            mlp = block.ff.net[0].proj if hasattr(block, "ff") else block.proj_mlp
            block.attn.to_q.register_forward_pre_hook(partial(self._count, 1 / 6))
            mlp.register_forward_pre_hook(partial(self._count, 2 / 6))

    def _count(self, share: float, module: Any, given: Any) -> None:
        tokens = given[0].shape[1]
        whole = self._tokens[module] = max(tokens, self._tokens.get(module, 0))
        self.runs += share * tokens / whole

    def take(self) -> float:
        """Evaluations since the last take."""
        runs, self.runs = self.runs, 0.0
        return runs


def _pipeline(settings: Settings) -> Any:
    """The folder's FluxPipeline in the settings' dtype, on their device, without its bars."""
    import warnings

    from diffusers import FluxPipeline

    from hasten.painter import quiet_logs

    with quiet_logs(), warnings.catch_warnings():
        # diffusers renames torch_dtype; the old name works from 0.35 on.
        warnings.simplefilter("ignore", FutureWarning)
        pipe = FluxPipeline.from_pretrained(settings.model, torch_dtype=getattr(torch, settings.dtype))
    pipe.set_progress_bar_config(disable=True)
    torch.backends.cudnn.allow_tf32 = False  # this process is the benchmark's own; float32 means float32 in the decoder
    return pipe.to(settings.device)


def psnr(pictures: Tensor, against: Tensor) -> Tensor:
    """Decibels for each picture, (N,); pictures are (N, 3, H, W) in 0..1; inf where they are equal."""
    return -10.0 * (pictures - against).square().flatten(1).mean(1).log10()


def ssim(pictures: Tensor, against: Tensor) -> Tensor:
    """Structural similarity for each picture, (N,), Gaussian window of 11 pixels."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(pictures, against, data_range=1.0, reduction="none")
    return values.reshape(-1)


def checked(pictures: Tensor, scenes: Sequence[Any]) -> float | None:
    """The share of pictures that the checker of training/ accepts; None where it is not there yet."""
    try:
        from checker import check
        from PIL import Image

        levels = pictures.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        verdicts = [check(Image.fromarray(a), scene).ok for a, scene in zip(levels, scenes, strict=True)]
    except (ImportError, OSError):  # no checker, no weights of it, or no fonts to know the emoji by
        return None
    return sum(verdicts) / len(verdicts)


def measure_quality(studio: Studio, method: Method, uncached: Tensor, converged: Tensor | None) -> Quality:
    """Draws every prompt under `method` and compares: uncached and converged are (N, 3, H, W)."""
    studio.counter.take()
    with method.on(studio.pipe):
        pictures = studio.draw_all(steps=method.steps)
    evaluations = studio.counter.take() / len(studio.batches())
    return Quality(
        evaluations=evaluations,
        psnr_db=float(psnr(pictures, uncached).median()),
        ssim=float(ssim(pictures, uncached).median()),
        psnr_converged_db=None if converged is None else float(psnr(pictures, converged).median()),
        checked=checked(pictures, studio.scenes),
    )


def measure_time(studio: Studio, methods: Sequence[Method], *, prompts: int) -> list[Timing]:
    """Prompt by prompt, one picture at a time: the uncached run, then each method, so that all meet the same load."""
    baseline: list[float] = []
    walls: list[list[float]] = [[] for _ in methods]
    caches: list[float | None] = [None] * len(methods)
    studio.draw(0, 1, steps=2)  # the first call pays for warming up
    for prompt in range(prompts):
        baseline.append(_seconds(studio, prompt, None))
        for i, method in enumerate(methods):
            with method.on(studio.pipe) as run:
                walls[i].append(_seconds(studio, prompt, method.steps))
                report = getattr(run, "report", None)
            caches[i] = caches[i] if report is None or not (report.reused or report.partial) else report.cache_mib
    return [
        Timing(statistics.median(wall), statistics.median(baseline), cache)
        for wall, cache in zip(walls, caches, strict=True)
    ]


def _seconds(studio: Studio, prompt: int, steps: int | None) -> float:
    studio.wait()
    begin = time.perf_counter()
    studio.draw(prompt, prompt + 1, steps=steps)
    studio.wait()
    return time.perf_counter() - begin


def weights_hash(folder: str) -> str:
    """A short hash over every weight file of a diffusers folder, in order of name."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*.safetensors")):
        digest.update(file.relative_to(folder).as_posix().encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
