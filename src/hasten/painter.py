"""What is asked of a host, and what it gives back: a Request goes in, a Drawing comes out.

compare, demo and bench know a host by the Painter protocol only; FluxPainter is diffusers' side of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from hasten.recipe import Recipe
    from hasten.report import Report

LARGEST_SEED = 2**63 - 1  # what torch.Generator.manual_seed takes
MULTIPLE = 16  # eight pixels to a latent, two latents to a token

StepDone = Callable[[], None]

# Of steps (the training's own) and of pictures at once: beyond it lists alone would fill the memory.
MOST = 1000


def check_count(name: str, value: int) -> None:
    """Returns when that many steps, or pictures at once, can be drawn. Raises ValueError."""
    if not 1 <= value <= MOST:
        least = "at least 1 is allowed" if value < 1 else f"at most {MOST} are allowed"
        raise ValueError(f"{name} is {value}: {least}.")


@dataclass(frozen=True)
class Request:
    """What to draw: everything that a picture depends on beside the model and the recipe."""

    prompt: str
    steps: int = 28
    width: int = 256
    height: int = 256
    seed: int = 0
    guidance: float = 3.5
    batch: int = 1

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: say what to draw, in quotes.")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < MULTIPLE:
                raise ValueError(f"the {name} is {value}: at least {MULTIPLE} is allowed.")
            if value % MULTIPLE:
                near = max(MULTIPLE, round(value / MULTIPLE) * MULTIPLE)
                raise ValueError(f"the {name} is {value}: it must be divisible by {MULTIPLE}; try {near}.")
        check_count("steps", self.steps)
        check_count("batch", self.batch)
        if not 0 <= self.guidance <= 100:
            raise ValueError(f"guidance is {self.guidance}: a number from 0 to 100 is allowed; FLUX likes 3.5.")
        if not 0 <= self.seed <= LARGEST_SEED - self.batch:
            raise ValueError(f"the seed is {self.seed}: a whole number from 0 to 2^63 is allowed.")

    @property
    def size(self) -> str:
        """The size as it is written everywhere: "256x192", width first."""
        return f"{self.width}x{self.height}"

    @property
    def seeds(self) -> list[int]:
        """One seed for each picture of the batch, so that any one of them can be drawn again alone."""
        return [self.seed + i for i in range(self.batch)]

    def with_steps(self, steps: int) -> Request:
        """The same request in another number of steps."""
        return replace(self, steps=steps)


@dataclass(frozen=True)
class Drawing:
    """The pictures, the seconds of denoising and decoding, and the engine's report of the call.

    exact: the pictures before they were rounded to 8 bits, (B, H, W, 3) in float32 from 0 to 1, where the host gives
    them; likeness is measured on these, for rounding would hide the smallest distances.
    """

    images: list[Image]
    wall_s: float
    report: Report
    notes: list[str] = field(default_factory=list)
    exact: np.ndarray[Any, Any] | None = None


class Painter(Protocol):
    """Whoever can draw a request under a recipe: all that compare, demo and bench know of a host."""

    model: str
    device: str
    dtype: str

    def paint(self, request: Request, recipe: Recipe, *, on_step: StepDone | None = None) -> Drawing:
        """The drawing; on_step is called after each denoising step. The model is afterwards as it was."""
        ...


class FluxPainter:
    """Draws with a diffusers FluxPipeline.

    The prompt is encoded outside the clock: a recipe never touches the text encoders, and a run and its rival
    share the very same embeddings. What is timed is the pipeline's call: denoising and decoding.
    """

    def __init__(self, pipe: Any, *, model: str, text_tokens: int) -> None:
        import torch

        self.pipe = pipe
        self.model = model
        self.text_tokens = text_tokens
        # What every call of the pipeline is given beside the request.
        self.call_options: dict[str, Any] = {}
        self._device = torch.device(pipe._execution_device)
        self.device = device_words(self._device)
        self.dtype = str(pipe.transformer.dtype).removeprefix("torch.")

    def paint(self, request: Request, recipe: Recipe, *, on_step: StepDone | None = None) -> Drawing:
        """The drawing; the first picture of a batch has the request's seed, the next ones count up."""
        import torch

        import hasten

        cut = self._what_is_cut(request.prompt)
        # On the CPU, so that a seed means the same noise on every device.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
        with torch.no_grad(), quiet_logs():
            words = self._words(request)
        with hasten.accelerate(self.pipe, recipe) as run:
            self._wait()
            begin = time.perf_counter()
            exact = self.pipe(
                **words,
                width=request.width,
                height=request.height,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                generator=generators,
                max_sequence_length=self.text_tokens,
                output_type="np",
                callback_on_step_end=each_step(on_step) if on_step else None,
                **self.call_options,
            ).images
            self._wait()
            wall_s = time.perf_counter() - begin
        assert run.report is not None, "a pipeline call always leaves a report"
        return Drawing(self.pipe.image_processor.numpy_to_pil(exact), wall_s, run.report, cut, exact)

    def _words(self, request: Request) -> dict[str, Any]:
        """The encoded prompt as the pipeline's call takes it."""
        embeddings, pooled, _ = self.pipe.encode_prompt(
            prompt=request.prompt,
            prompt_2=None,
            num_images_per_prompt=request.batch,
            max_sequence_length=self.text_tokens,
        )
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def _wait(self) -> None:
        """Waits until the device has done all that it was given."""
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()

    def _what_is_cut(self, prompt: str) -> list[str]:
        """One sentence for each text encoder that does not read the whole prompt."""
        notes = []
        limits = (
            ("T5, which reads the words", self.pipe.tokenizer_2, self.text_tokens),
            ("CLIP, which sums the prompt up", self.pipe.tokenizer, self.pipe.tokenizer_max_length),
        )
        with quiet_logs():  # the tokenizers warn of what is said here in plain words
            for name, tokenizer, limit in limits:
                tokens = tokenizer(prompt, truncation=False).input_ids
                if len(tokens) > limit:
                    lost = tokenizer.decode(tokens[limit - 1 : -1], skip_special_tokens=True).strip()
                    notes.append(
                        f"the prompt was cut: {name}, takes {limit} tokens of its {len(tokens)}, "
                        f"and this was left out: {lost!r}"
                    )
        return notes


def device_words(device: Any) -> str:
    """The device as a report names it: "cpu", or "cuda (NVIDIA H200)"."""
    if device.type != "cuda":
        return str(device.type)
    import torch

    return f"cuda ({torch.cuda.get_device_name(device)})"


def each_step(on_step: StepDone) -> Callable[..., dict[str, Any]]:
    """`callback_on_step_end` of a diffusers pipeline, which changes nothing and tells of each step."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return {}

    return callback


@contextmanager
def quiet_logs() -> Iterator[None]:
    """No warnings and no bars of diffusers and transformers while the `with` lasts; then as before."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    rooms: tuple[Any, ...] = (of_diffusers, of_transformers)
    before = [(room, room.get_verbosity(), room.is_progress_bar_enabled()) for room in rooms]
    for room in rooms:
        room.set_verbosity_error()
        room.disable_progress_bar()
    try:
        yield
    finally:
        for room, verbosity, bars in before:
            room.set_verbosity(verbosity)
            if bars:
                room.enable_progress_bar()
