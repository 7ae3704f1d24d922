"""comfy_sana_vae.py makes a ComfyUI VAE of a DC-AE: diffusers' AutoencoderDC behind core's own VAE class.

Imported when a node runs, inside ComfyUI only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.sd
import comfy.taesd.taesd
import torch
from torch import Tensor, nn

from hasten.sana_autoencoder import CHANNELS, COMPRESSION, read_autoencoder

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Bytes that a pixel's widest level holds at once, for each byte of a number: about eleven tensors of 128 channels.
# Counted, not measured; ComfyUI decides by it when to make room.
HELD = 1400


class Autoencoder(nn.Module):
    """An AutoencoderDC as ComfyUI calls it. What does not fit on the device is decoded in overlapping tiles."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents (B, 32, H / 32, W / 32) of pictures (B, 3, H, W), -1 to 1."""
        latents: Tensor = self._fitting(self.model.encoder, self.model.tiled_encode, pixels)
        return latents

    def decode(self, latents: Tensor, **_: Any) -> Tensor:
        """Pictures (B, 3, H, W), -1 to 1, of latents (B, 32, H / 32, W / 32)."""
        return self._fitting(self.model.decoder, self.model.tiled_decode, latents)

    def _fitting(self, whole: Callable[[Tensor], Tensor], tiled: Callable[..., Any], x: Tensor) -> Tensor:
        try:
            return whole(x)
        except torch.OutOfMemoryError:
            pass  # it holds the tensors that did not fit: they are let go of behind it
        management.soft_empty_cache()
        out: Tensor = tiled(x, return_dict=False)[0]
        return out


def load_vae(path: Path, *, dtype: str = "auto") -> tuple[Any, str]:
    """ComfyUI's VAE with the DC-AE at `path` in it, and what to say on the node.

    dtype: a key of DTYPES; DC-AE overflows float16, so bfloat16 is taken for it. Raises ValueError or OSError with
    one sentence.
    """
    from accelerate import init_empty_weights
    from diffusers import AutoencoderDC

    state, config = read_autoencoder(path)
    with init_empty_weights():
        model = AutoencoderDC(**config)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path.name} does not fit diffusers' DC-AE ({str(error).splitlines()[-1].strip()})."
        ) from None
    kind, said = DTYPES[dtype], ""
    if kind is torch.float16:
        kind, said = torch.bfloat16, "DC-AE overflows float16: it works in bfloat16"
    # All that core's VAE has beside a model is set by its own constructor, here around the smallest one it knows.
    small = comfy.taesd.taesd.TAESD(latent_channels=CHANNELS)
    vae = comfy.sd.VAE(sd=small.state_dict(), dtype=torch.float32)
    vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = CHANNELS, COMPRESSION, COMPRESSION
    vae.working_dtypes = [torch.bfloat16, torch.float32]
    vae.vae_dtype = kind or management.vae_dtype(vae.device, vae.working_dtypes)
    vae.memory_used_encode = lambda shape, to: HELD * shape[2] * shape[3] * management.dtype_size(to)
    vae.memory_used_decode = lambda shape, to: HELD * shape[2] * shape[3] * COMPRESSION**2 * management.dtype_size(to)
    vae.process_input = lambda picture: picture * 2.0 - 1.0
    # In place: newer cores take no notice of what this gives back, older ones take nothing else.
    vae.process_output = lambda picture: picture.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
    vae.first_stage_model = Autoencoder(model.requires_grad_(False).eval()).to(vae.vae_dtype)
    patcher = vae.patcher
    vae.patcher = type(patcher)(
        vae.first_stage_model, load_device=patcher.load_device, offload_device=patcher.offload_device
    )
    return vae, said
