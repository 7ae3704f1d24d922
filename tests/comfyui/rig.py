"""The real ComfyUI in this process, on the CPU, with a random Flux of a few hundred thousand weights.

`rig.start(folder)` makes the checkout at `folder` importable, once for a process. Nothing here knows of hasten.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def start(folder: Path) -> None:
    """Makes ComfyUI importable from its checkout, for a machine without a GPU."""
    if "comfy" in sys.modules:
        return
    from comfyui.customize import sitecustomize  # noqa: F401 (its import is its work)

    sys.path.insert(0, str(folder))
    from comfy.cli_args import args

    args.cpu = True
    import comfy.model_management
    import comfy.sample  # noqa: F401


def tiny_model(
    *, seed: int = 0, double: int = 2, single: int = 4, in_channels: int = 16, ops: Any = None,
    dtype: torch.dtype = torch.float32,
) -> Any:  # fmt: skip
    """A ModelPatcher around a random Flux: width 64, two heads, 16 channels, embedded guidance. dtype: its weights'."""
    import comfy.ldm.flux.model
    import comfy.model_management as mm
    import comfy.model_patcher
    import comfy.supported_models

    cfg: dict[str, Any] = dict(
        image_model="flux", in_channels=in_channels, out_channels=16, patch_size=2, vec_in_dim=32, context_in_dim=48,
        hidden_size=64, num_heads=2, mlp_ratio=4.0, depth=double, depth_single_blocks=single,
        axes_dim=[8, 12, 12], theta=10000, qkv_bias=True, guidance_embed=True,
    )  # fmt: skip
    for f in dataclasses.fields(comfy.ldm.flux.model.FluxParams):
        if f.name not in cfg and f.default is dataclasses.MISSING:
            cfg[f.name] = [] if f.name.endswith("_dims") else None
    config = comfy.supported_models.Flux(cfg)
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    if ops is not None:
        config.custom_operations = ops
    net = config.get_model({}, device=mm.unet_offload_device())
    fill(net.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(net.eval(), mm.get_torch_device(), mm.unet_offload_device())


def fill(net: torch.nn.Module, seed: int) -> None:
    """Every weight anew: ComfyUI's layers are made without initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith("scale") or "_norm." in name:
                weight.fill_(1.0)  # the norms' own name for it differs by version
            else:
                weight.copy_((torch.randn(weight.shape, generator=generator) * 0.04).to(weight.dtype))


def condition(*, tokens: int = 12, seed: int = 1, **more: Any) -> list[Any]:
    """A CONDITIONING as CLIPTextEncode and FluxGuidance give it."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            torch.randn(1, tokens, 48, generator=generator),
            {"pooled_output": torch.randn(1, 32, generator=generator), "guidance": 3.5, **more},
        ]
    ]


def sample(
    model: Any,
    *,
    steps: int = 8,
    cfg: float = 1.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    positive: Any = None,
    negative: Any = None,
    seed: int = 7,
    batch: int = 1,
    size: int = 8,
    denoise: float = 1.0,
    latent: torch.Tensor | None = None,
    sigmas: torch.Tensor | None = None,
    callback: Any = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """KSampler's work: the sampled latent, (batch, 16, size, size)."""
    import comfy.sample
    import comfy.samplers

    if latent is None:
        latent = torch.zeros(batch, 16, size, size)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    positive = positive or condition()
    negative = negative or condition(seed=2)
    if sigmas is None:
        return comfy.sample.sample(
            model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise,
            disable_pbar=True, seed=seed, callback=callback, noise_mask=mask,
        )  # fmt: skip
    return comfy.sample.sample_custom(
        model, noise, cfg, comfy.samplers.sampler_object(sampler), sigmas, positive, negative, latent,
        disable_pbar=True, seed=seed, callback=callback, noise_mask=mask,
    )  # fmt: skip


def overrides_attention() -> bool:
    """Whether this ComfyUI asks `optimized_attention_override`, as it does since 0.3.60."""
    import comfy.ldm.modules.attention

    return hasattr(comfy.ldm.modules.attention, "wrap_attn")


def sample_noise(model: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """comfy.sample.sample as it is."""
    import comfy.sample

    return comfy.sample.sample(model, noise, *args, **kwargs)


def extra_node(name: str) -> Any:
    """A module of ComfyUI's own extra nodes, which lie a folder deeper in its packaged form; skips without it."""
    for package in ("comfy_extras", "comfy_extras.nodes"):
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if not f"{package}.{name}".startswith(error.name or "?"):
                raise
    pytest.skip(f"this ComfyUI has no {name}")
