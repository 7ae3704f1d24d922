"""Sana's side of a painter: what differs from FLUX is how words are encoded and which sizes there are."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hasten.painter import Drawing, FluxPainter, Request, StepDone, quiet_logs
from hasten.recipe import Recipe

MULTIPLE = 32  # pixels to a latent, one latent to a token
# Above it pictures are decoded in overlapping tiles: a 4096x4096 one whole would need some 45 GB in 16 bits, by count.
LARGEST_WHOLE = 2048
TILE, STRIDE = 1024, 896
GEMMA_WIDTH = 2304  # of Gemma-2-2b, which every Sana reads; a narrower one is a small Sana


@contextmanager
def decoded_in_tiles(vae: Any, wanted: bool) -> Iterator[None]:
    """DC-AE works in tiles while the `with` lasts, if that is wanted; then as before."""
    before = {name: value for name, value in vars(vae).items() if name.startswith(("tile_", "use_tiling"))}
    if wanted:
        vae.enable_tiling(TILE, TILE, STRIDE, STRIDE)
    try:
        yield
    finally:
        vars(vae).update(before)


class SanaPainter(FluxPainter):
    """Draws with a diffusers SanaPipeline or SanaSprintPipeline; see FluxPainter.

    The prompt goes behind the authors' instruction, as in SanaPipeline itself; the empty negative prompt does not.
    """

    def __init__(self, pipe: Any, *, model: str, text_tokens: int) -> None:
        super().__init__(pipe, model=model, text_tokens=text_tokens)
        small = pipe.transformer.config.caption_channels < GEMMA_WIDTH
        given = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        self.instruction: list[str] | None = None if small else given
        self.sprint = bool(pipe.transformer.config.guidance_embeds)
        # Sizes are drawn as they are asked for, never rounded to a table's.
        self.call_options = {"use_resolution_binning": False, "complex_human_instruction": self.instruction}

    def paint(self, request: Request, recipe: Recipe, *, on_step: StepDone | None = None) -> Drawing:
        """See FluxPainter. Raises ValueError in one sentence for a size that is no multiple of 32."""
        for name in ("width", "height"):
            value = getattr(request, name)
            if value % MULTIPLE:
                near = max(MULTIPLE, round(value / MULTIPLE) * MULTIPLE)
                raise ValueError(f"the {name} is {value}: Sana's must be divisible by {MULTIPLE}; try {near}.")
        if self.sprint:
            # The authors' middle angle is for two steps alone.
            self.call_options["intermediate_timesteps"] = 1.3 if request.steps == 2 else None
        with decoded_in_tiles(self.pipe.vae, max(request.width, request.height) > LARGEST_WHOLE):
            return super().paint(request, recipe, on_step=on_step)

    def _words(self, request: Request) -> dict[str, Any]:
        common = {
            "num_images_per_prompt": request.batch,
            "max_sequence_length": self.text_tokens,
            "complex_human_instruction": self.instruction,
        }
        if self.sprint:
            embeddings, mask = self.pipe.encode_prompt(request.prompt, **common)
            return {"prompt_embeds": embeddings, "prompt_attention_mask": mask}
        guided = request.guidance > 1.0
        embeddings, mask, empty, empty_mask = self.pipe.encode_prompt(request.prompt, guided, **common)
        words = {"prompt_embeds": embeddings, "prompt_attention_mask": mask, "negative_prompt": None}
        if guided:
            words |= {"negative_prompt_embeds": empty, "negative_prompt_attention_mask": empty_mask}
        return words

    def _what_is_cut(self, prompt: str) -> list[str]:
        """A sentence when Gemma does not read the whole prompt."""
        tokenizer = self.pipe.tokenizer
        with quiet_logs():
            # As SanaPipeline reads it: lower case, and the instruction's tokens do not count.
            text = prompt.lower().strip()
            tokens = tokenizer(text, truncation=False).input_ids
            limit = self.text_tokens - (1 if self.instruction else 0)
            if len(tokens) <= limit:
                return []
            lost = tokenizer.decode(tokens[limit:], skip_special_tokens=True).strip()
        return [
            f"the prompt was cut: Gemma, which reads the words, takes {limit} tokens of its {len(tokens)}, "
            f"and this was left out: {lost!r}"
        ]
