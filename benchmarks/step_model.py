"""A transformer of FLUX.1-dev's size with random weights, and what one call of it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TEXT = 512
TINY = {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 64}


def make_model(device: str, *, tiny: bool, **settings: Any) -> Any:
    """A FluxTransformer2DModel in bfloat16 whose weights are drawn on the device itself."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True, **(TINY if tiny else {}) | settings)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            is_norm = ".norm_" in name and name.endswith("weight")
            parameter.fill_(1.0) if is_norm else parameter.normal_(0.0, 0.02, generator=generator)
        else:  # activations keep their size from layer to layer
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
    return model


def make_inputs(model: Any, width: int, height: int) -> dict[str, Any]:
    """What one call takes for a picture of that size and a prompt of 512 tokens."""
    device, dtype = model.device, model.dtype
    rows, columns = height // 16, width // 16
    generator = torch.Generator(device).manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    ids = torch.zeros(rows, columns, 3, device=device, dtype=dtype)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(columns, device=device)[None, :]
    # A timestep and a guidance that bfloat16 holds exactly, thousandfold too: else float32 would see other ones.
    return {
        "hidden_states": noise(1, rows * columns, model.config.in_channels),
        "encoder_hidden_states": noise(1, TEXT, model.config.joint_attention_dim),
        "pooled_projections": noise(1, model.config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((1,), 4.0, device=device, dtype=torch.float32),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(TEXT, 3, device=device, dtype=dtype),
        "return_dict": False,
    }
