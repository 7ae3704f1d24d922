"""comfy_sana_gemma.py loads a Gemma-2 folder through transformers; 4-bit folders are unpacked, without bitsandbytes.

bitsandbytes' NF4 and FP4 files hold two weights a byte, each an index into 16 levels, with one scale for every 64; the
scales may be 8-bit indices themselves. That is undone here once, on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_gemma(folder: Path, dtype: torch.dtype) -> Any:
    """The folder's Gemma2Model in that dtype, on the CPU. Raises ValueError with one sentence when it is broken."""
    from accelerate import init_empty_weights
    from transformers import Gemma2Config, Gemma2Model

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    state = {_bare(name): t for name, t in read_folder(folder).items() if not name.startswith("lm_head.")}
    if config.pop("quantization_config", None) is not None or any(".quant_state." in name for name in state):
        state = unpacked(state)
    with init_empty_weights():
        model = Gemma2Model(Gemma2Config(**{k: v for k, v in config.items() if k not in ("architectures", "dtype")}))
    lacking, stray = model.load_state_dict({k: v.to(dtype) for k, v in state.items()}, strict=False, assign=True)
    if lacking or stray:
        raise ValueError(f"{folder} is no whole Gemma-2 ({[*lacking, *stray][0]}): download it again.")
    return model.requires_grad_(False).eval()


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's safetensors files. Raises ValueError or FileNotFoundError with one sentence."""
    from hasten.sana_weights import read_tensors

    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            files = sorted({folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{index} is no index of weights: download the whole folder of the model.") from None
    if not files:
        raise FileNotFoundError(f"{folder} has no weights (*.safetensors): download the whole folder of the model.")
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a bitsandbytes 4-bit file as plain ones; those that are plain already pass through."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        packed = [k for k in state if k.startswith(f"{name}.quant_state.")]
        if packed:
            told = json.loads(bytes(state[packed[0]].tolist()).decode())
            out[name] = _unpacked(tensor, state, name, told)
        elif not any(part in name for part in (".absmax", ".quant_map", ".nested_", ".quant_state.")):
            out[name] = tensor
    return out


def _unpacked(packed: Tensor, state: Mapping[str, Tensor], name: str, told: Mapping[str, Any]) -> Tensor:
    """One matrix in float32. told: bitsandbytes' own account of it."""
    scales = state[f"{name}.absmax"]
    if scales.dtype == torch.uint8:
        levels, larger = state[f"{name}.nested_quant_map"], state[f"{name}.nested_absmax"].float()
        whole = levels.float()[scales.long()]
        blocks = larger.repeat_interleave(int(told["nested_blocksize"]))[: whole.numel()]
        scales = whole * blocks + float(told.get("nested_offset", 0.0))
    flat = packed.flatten()
    indices = torch.stack([flat >> 4, flat & 15], dim=1).flatten().long()  # the upper half comes first
    values = state[f"{name}.quant_map"].float()[indices]
    count = 1
    for size in told["shape"]:
        count *= int(size)
    values = values[:count] * scales.float().repeat_interleave(int(told["blocksize"]))[:count]
    return values.reshape([int(size) for size in told["shape"]])


def _bare(name: str) -> str:
    return name.removeprefix("model.")
