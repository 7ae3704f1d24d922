"""Safetensors files: judged by their header first, then read in the dtype that is computed in.

It knows what each of FLUX's files looks like from outside, and how ComfyUI stores fp8; it builds no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER_LIMIT = 100_000_000  # bytes; what the safetensors library itself accepts
# What ComfyUI and others put before the names; by these the parts of an all-in-one checkpoint are told apart.
PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae."),
    "clip_l": (
        "text_encoders.clip_l.transformer.text_model.",
        "clip_l.transformer.text_model.",
        "text_model.",
    ),
    "t5xxl": ("text_encoders.t5xxl.transformer.", "t5xxl.transformer."),
}


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes by name. Asked for one that is not there it raises ValueError with one sentence."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(shapes)
        self.path = path

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise ValueError(f"{self.path} lacks the weight {name}: it is not a whole FLUX.1 file; download it again.")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: tensor name -> shape."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def part(self, kind: str) -> dict[str, tuple[int, ...]]:
        """The shapes of one part of FLUX under the model's own names."""
        named = ((bare_name(name, kind), shape) for name, shape in self.shapes.items())
        return Shapes(self.path, {name: shape for name, shape in named if name is not None})

    def has(self, *endings: str) -> bool:
        """Whether for each ending there is a tensor whose name ends so."""
        return all(any(name.endswith(ending) for name in self.shapes) for ending in endings)


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises ValueError when it is none, or is shorter than it says."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: check the path.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise ValueError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` beside it.")
        if size < 10 or not 2 <= length <= HEADER_LIMIT:
            raise ValueError(f"{path} is not a safetensors file: download it again, or convert it to safetensors.")
        text = file.read(length)
    try:
        entries = json.loads(text)
        tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        cut = len(text) < length
        what = "is truncated" if cut else "is not a safetensors file"
        raise ValueError(f"{path} {what}: download it again.") from None
    if size < 8 + length + end:
        whole = 8 + length + end
        raise ValueError(
            f"{path} is truncated: {whole - size:,} of its {whole:,} bytes are missing; download it again."
        )
    return Header(path, shapes)


KINDS: dict[str, tuple[str, Callable[[Header], bool]]] = {
    "transformer": (
        "a FLUX transformer",
        lambda h: h.has("double_blocks.0.img_attn.qkv.weight", "img_in.weight"),
    ),
    "vae": ("a FLUX autoencoder", lambda h: h.has("decoder.conv_in.weight", "encoder.conv_in.weight")),
    "clip_l": (
        "a CLIP-L text encoder",
        lambda h: h.has("embeddings.position_embedding.weight", "final_layer_norm.bias"),
    ),
    "t5xxl": ("a T5 encoder", lambda h: h.has("block.0.layer.1.DenseReluDense.wi_0.weight", "shared.weight")),
}


def check_kind(header: Header, kind: str) -> None:
    """Returns when the file holds that part of FLUX. Raises ValueError that says what it holds instead."""
    wanted, test = KINDS[kind]
    if test(header):
        return
    seems = [
        f"{words} (give it as --{name.replace('_', '-')})" for name, (words, other) in KINDS.items() if other(header)
    ]
    instead = f"it looks like {seems[0]}" if seems else f"its first tensor is {next(iter(header.shapes), 'missing')!r}"
    raise ValueError(f"{header.path} is not {wanted}: {instead}.")


def read_weights(path: Path, kind: str, dtype: Any) -> dict[str, Any]:
    """Every tensor of that part of FLUX in `dtype`; scaled fp8 weights are multiplied out.

    Raises ValueError for weights packed into integers (nvfp4 and its kin): nothing here computes with them.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    state: dict[str, Any] = {}
    scales: dict[str, Any] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                bare = bare_name(name, kind)
                if bare is None:
                    continue
                owner, _, last = bare.rpartition(".")
                if last in ("scale_weight", "weight_scale"):
                    scales[owner] = file.get_tensor(name).float()
                elif last in ("scale_input", "input_scale", "comfy_quant") or bare == "scaled_fp8":
                    continue
                else:
                    state[bare] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}): download it again.") from None
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            if tensor.ndim < 2:
                continue  # position ids and the like
            raise ValueError(
                f"{path} holds {name} as {str(tensor.dtype).removeprefix('torch.')}: this packing "
                "is not read; give the bf16, fp16 or fp8 file."
            )
        scale = scales.get(name.removesuffix(".weight"))
        # float32 in between: an fp8 value times its scale would be rounded twice in bfloat16.
        state[name] = tensor.to(dtype) if scale is None else (tensor.to(torch.float32) * scale).to(dtype)
    return state


def bare_name(name: str, kind: str) -> str | None:
    """The tensor's name as the model itself has it; None when it belongs to another part of the file."""
    for owner, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                return name[len(prefix) :] if owner == kind else None
    return name
