"""comfy_sana.py makes a ComfyUI MODEL of a Sana checkpoint: its family for samplers, memory and LoRAs.

Imported when a node runs, inside ComfyUI only.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management as management
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from hasten.hosts.comfy_sana_network import SanaNetwork, build_network, put_weights, saved_name
from hasten.sana_weights import model_words, read_sana

# DC-AE f32c32's factor, as the authors' and diffusers' configurations have it.
SCALE = 0.41407
# The authors' time shifts: 3, and 6 for 4K models. Sprint's makes two steps lie at its own angles, pi / 2 and 1.3.
SHIFT, SHIFT_4K, SHIFT_SPRINT = 3.0, 6.0, math.tan(1.3)

DTYPES = {
    "default": None,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class SanaLatent(comfy.latent_formats.LatentFormat):  # type: ignore[misc]
    """32 channels, one latent for 32 x 32 pixels."""

    latent_channels = 32
    scale_factor = SCALE
    spacial_downscale_ratio = 32
    # A preview in false colours: shapes show, true colours need the decoder. Three waves over the channels.
    latent_rgb_factors = [  # noqa: RUF012 (ComfyUI's own name and form)
        [round(math.cos(channel + 2 * math.pi * colour / 3) / 8, 4) for colour in range(3)] for channel in range(32)
    ]


# The family of core's whose LoRA keys are diffusers' own names, as Sana's are; nothing else is taken of it.
_WithDiffusersLoras: Any = getattr(comfy.model_base, "QwenImage", comfy.model_base.BaseModel)


class SanaModel(_WithDiffusersLoras):  # type: ignore[misc]
    """Sana as a model of ComfyUI's: a flow, conditioned on words with a mask."""

    def __init__(self, model_config: Any, device: Any = None) -> None:
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=build_network
        )
        self.memory_usage_factor_conds = ()

    def extra_conds(self, **given: Any) -> dict[str, Any]:
        """Words, their mask (all of them where a node made none) and Sprint's guidance."""
        conds: dict[str, Any] = {}
        words = given.get("cross_attn")
        if words is not None:
            mask = given.get("attention_mask")
            mask = torch.ones(words.shape[:2]) if mask is None else mask.reshape(-1, mask.shape[-1]).float()
            conds["c_crossattn"] = comfy.conds.CONDRegular(words)
            conds["attention_mask"] = comfy.conds.CONDRegular(mask)
        guidance = given.get("guidance")
        if guidance is not None and self.diffusion_model.config.guidance_embeds:
            conds["guidance"] = comfy.conds.CONDRegular(torch.tensor([float(guidance)]))
        return conds

    def extra_conds_shapes(self, **given: Any) -> dict[str, Any]:
        """Nothing that grows with a condition."""
        return {}


class SanaConfig(comfy.supported_models_base.BASE):  # type: ignore[misc]
    """What ComfyUI asks of a family."""

    unet_config: dict[str, Any] = {}  # noqa: RUF012
    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012
    latent_format = SanaLatent
    # bfloat16 first: the later checkpoints are trained in it; a file in float16 stays so where it can.
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]  # noqa: RUF012

    def __init__(self, sana: dict[str, Any]) -> None:
        super().__init__({"image_model": "sana", "in_channels": sana["in_channels"], "sana": sana})
        sprint, large = sana["guidance_embeds"], sana.get("sample_size", 32) >= 128
        self.sampling_settings = {
            "shift": SHIFT_SPRINT if sprint else SHIFT_4K if large else SHIFT,
            "multiplier": 1.0 if sprint else 1000.0 * sana.get("timestep_scale", 1.0),
        }
        # What a token's feed-forward (four tensors in 16 bits) and linear attention (six in 32) hold at once, bytes.
        width = sana["num_attention_heads"] * sana["attention_head_dim"]
        held = 4 * 2 * (2 * sana["mlp_ratio"] * width) + 6 * 4 * width
        self.memory_usage_factor = held / (0.02 * 2**20)  # ComfyUI's unit: a hundredth of a MiB for each latent byte

    def set_inference_dtype(self, dtype: Any, manual_cast_dtype: Any) -> None:
        """See BASE; the network also asks what it computes in."""
        super().set_inference_dtype(dtype, manual_cast_dtype)
        self.unet_config["compute_dtype"] = manual_cast_dtype

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Under diffusers' names, so that what core's saving nodes write can be loaded again."""
        return {f"model.diffusion_model.{saved_name(name)}": tensor for name, tensor in state_dict.items()}


def load_model(path: Path, *, weight_dtype: str = "default", convert: bool = True) -> tuple[Any, str]:
    """A ModelPatcher around the Sana at `path`, and what it is in words.

    weight_dtype: a key of DTYPES. convert: whether "default" may choose another dtype than the file's, the one that
    suits the device; off, the file's is kept and cast as it is used. Raises ValueError or OSError with one sentence.
    """
    state, sana = read_sana(path)
    if sana["in_channels"] != SanaLatent.latent_channels:
        raise ValueError(f"{path.name} takes {sana['in_channels']} channels: Sana's decoder gives 32.")
    config = SanaConfig(sana)
    parameters = sum(tensor.numel() for tensor in state.values())
    device, offload = management.get_torch_device(), management.unet_offload_device()
    supported, kept = list(config.supported_inference_dtypes), state["transformer_blocks.0.attn1.to_q.weight"].dtype
    dtype = DTYPES[weight_dtype]
    if dtype is None:
        suits = management.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=kept)
        dtype = suits if convert else kept
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    config.optimizations["fp8"] = weight_dtype == "fp8_e4m3fn_fast"
    base = SanaModel(config)
    network: SanaNetwork = base.diffusion_model
    put_weights(network, state)
    return ModelPatcher(
        base.eval(), device, offload
    ), f"{model_words(sana)}, kept in {str(dtype).removeprefix('torch.')}"
