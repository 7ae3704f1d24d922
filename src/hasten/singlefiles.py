"""ComfyUI-style single files -> a FluxPipeline: which are needed, which tokenizers go with them.

The parts themselves are built in checkpoints.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hasten.machine import reason_of
from hasten.weights import PREFIXES, bare_name, check_kind, read_header

# Open on the hub, and the very tokenizers that FLUX.1 ships.
HUB_TOKENIZERS = ("openai/clip-vit-large-patch14", "google/t5-v1_1-xxl")
# Where a FLUX folder and a ComfyUI folder keep CLIP's and T5's.
ROOMS = (("tokenizer", "comfy/sd1_tokenizer"), ("tokenizer_2", "comfy/text_encoders/t5_tokenizer"))


def check_files(files: dict[str, Path]) -> dict[str, Path]:
    """A file for each part of FLUX; an all-in-one checkpoint stands in for what it holds and is not given.

    files: by part ("transformer", "vae", "clip_l", "t5xxl"). Raises ValueError or FileNotFoundError when a part
    is missing, or a file is truncated or holds something else.
    """
    if "transformer" not in files:
        raise ValueError("the transformer is missing: give it as --transformer FILE, or as --model FILE.")
    headers = {kind: read_header(path) for kind, path in files.items()}
    for kind, header in headers.items():
        check_kind(header, kind)
    whole = headers["transformer"]
    parts = dict(files)
    for kind in PREFIXES:
        if kind in parts:
            continue
        if not any(bare_name(name, kind) not in (None, name) for name in whole.shapes):
            option = "--" + kind.replace("_", "-")
            raise ValueError(f"{whole.path.name} alone cannot draw: give {option} FILE.safetensors too.")
        parts[kind] = whole.path
    return parts


def load_files(files: dict[str, Path], tokenizers: str | None, dtype: Any) -> Any:
    """A FluxPipeline of those files on the CPU. tokenizers: see find_tokenizers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    from hasten import checkpoints

    parts = check_files(files)
    clip_tokens, t5_tokens = find_tokenizers(tokenizers)
    transformer = checkpoints.load_transformer(parts["transformer"], dtype)
    # FLUX.1-schnell is the one without embedded guidance, and it was distilled without a shift.
    dev = bool(transformer.config.guidance_embeds)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=checkpoints.load_vae(parts["vae"], dtype),
        text_encoder=checkpoints.load_clip(parts["clip_l"], dtype, clip_tokens),
        tokenizer=clip_tokens,
        text_encoder_2=checkpoints.load_t5(parts["t5xxl"], dtype),
        tokenizer_2=t5_tokens,
        transformer=transformer,
    )


def find_tokenizers(source: str | None) -> tuple[Any, Any]:
    """CLIP's and T5's tokenizer. source: a FLUX folder, a ComfyUI folder, a FLUX hub name, or None for the hub's.

    Raises ValueError in one sentence when they cannot be had, offline for one.
    """
    from transformers import CLIPTokenizer, T5TokenizerFast

    found = []
    for kind, rooms, home in zip((CLIPTokenizer, T5TokenizerFast), ROOMS, HUB_TOKENIZERS, strict=True):
        if source is None:
            place, room = home, ""
        elif Path(source).is_dir():
            place = str(next((Path(source) / room for room in rooms if (Path(source) / room).is_dir()), ""))
            room = ""
        else:
            place, room = source, rooms[0]
        if not place:
            raise ValueError(
                f"there are no tokenizers in {source}: give --tokenizers a FLUX folder (it has tokenizer and "
                "tokenizer_2) or a ComfyUI folder."
            )
        try:
            found.append(kind.from_pretrained(place, subfolder=room))
        except (OSError, ValueError, TypeError, LookupError, ImportError) as error:
            raise ValueError(
                f"no tokenizer could be had from {place} ({reason_of(error)}): single files carry none, "
                "so give --tokenizers a FLUX folder, a ComfyUI folder or a hub name."
            ) from None
    return found[0], found[1]
