"""Short runs of a tiny random FLUX, for the tests of the engine: no encoders, no decoder, latents in the end.

A picture of 64x64 is 16 image tokens. Weights, noise and embeddings depend on seeds alone, so two runs that are
set up alike must agree bit for bit.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tiny import tiny_transformer
from torch import Tensor

import hasten
from hasten.report import Report

# Widths of tiny.py's text encoders, T5's and CLIP's.
WORD, POOLED = 32, 64


@functools.cache
def _weights(seed: int, options: tuple[tuple[str, Any], ...]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tiny_transformer(**dict(options))


def transformer(*, seed: int = 0, **options: Any) -> Any:
    """A transformer of its own with the weights of that seed."""
    return copy.deepcopy(_weights(seed, tuple(sorted(options.items()))))


def flux(*, seed: int = 0, scheduler: Any = None, **options: Any) -> Any:
    """A FluxPipeline of its own, without encoders and decoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    pipe = FluxPipeline(
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer(seed=seed, **options),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int) -> Tensor:
    """Normal noise of that shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt(seed: int = 1, *, batch: int = 1, negative: int | None = None, words: int = 6) -> dict[str, Any]:
    """The embeddings of a prompt, and of a negative one for true classifier-free guidance."""
    given = {
        "prompt_embeds": noise(1, words, WORD, seed=seed).repeat(batch, 1, 1),
        "pooled_prompt_embeds": noise(1, POOLED, seed=seed + 100).repeat(batch, 1),
    }
    if negative is not None:
        given |= {f"negative_{key}": value for key, value in prompt(negative, batch=batch, words=words).items()}
        given["true_cfg_scale"] = 3.0
    return given


def paint(pipe: Any, *, steps: int = 8, seed: int = 0, size: int = 64, **given: Any) -> Tensor:
    """The latents that the pipeline ends with."""
    if "prompt_embeds" not in given:
        given = {**prompt(), **given}
    given.setdefault("generator", torch.Generator().manual_seed(seed))
    out = pipe(height=size, width=size, num_inference_steps=steps, output_type="latent", **given)
    return out.images  # type: ignore[no-any-return]


def recipe(method: str = "none", *, skip: dict[str, Any] | None = None, **cache: Any) -> dict[str, Any]:
    """A recipe's dict."""
    return {"schema": 1, "cache": {"method": method, **cache}, "skip": skip or {}}


def hastened(pipe: Any, settings: dict[str, Any], **given: Any) -> tuple[Tensor, Report]:
    """The latents of one accelerated call, and its report."""
    with hasten.accelerate(pipe, settings) as run:
        latents = paint(pipe, **given)
    report = run.report
    assert report is not None
    return latents, report


class Cancelled(Exception):
    """What a user's callback raises to stop a run."""


def cancel_after(step: int) -> dict[str, Any]:
    """Keywords of a pipeline call that is cancelled after that step."""

    def stop(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == step:
            raise Cancelled
        return tensors

    return {"callback_on_step_end": stop}


def model_inputs(*, size: int = 4, batch: int = 1, seed: int = 0, prompt_seed: int = 1) -> dict[str, Any]:
    """What a bare transformer's call takes beside its timestep: size x size image tokens."""
    ids = torch.zeros(size * size, 3)
    ids[:, 1] = torch.arange(size).repeat_interleave(size)
    ids[:, 2] = torch.arange(size).repeat(size)
    embeds = prompt(prompt_seed, batch=batch)
    return {
        "hidden_states": noise(1, size * size, 64, seed=seed).repeat(batch, 1, 1),
        "encoder_hidden_states": embeds["prompt_embeds"],
        "pooled_projections": embeds["pooled_prompt_embeds"],
        "guidance": torch.full((batch,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(embeds["prompt_embeds"].shape[1], 3),
        "return_dict": False,
    }


def call(model: Any, inputs: dict[str, Any], sigma: float, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """A bare transformer's output at a sigma, which is handed over in `dtype` as pipelines do."""
    batch = inputs["hidden_states"].shape[0]
    timestep = torch.full((batch,), sigma * 1000.0).to(dtype) / 1000
    with torch.no_grad():
        return model(timestep=timestep, **inputs)[0]  # type: ignore[no-any-return]


@contextmanager
def counted(*modules: Any) -> Iterator[list[int]]:
    """How often each module's forward was run, by real hooks on a real module."""
    counts = [0] * len(modules)

    def count(index: int) -> Any:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    hooks = [module.register_forward_hook(count(i)) for i, module in enumerate(modules)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
