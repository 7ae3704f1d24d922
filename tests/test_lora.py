"""LoRAs are inside what is computed and inside what is remembered: the cache neither loses nor doubles them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from runs import flux, hastened, noise, paint, recipe

import hasten

pytest.importorskip("peft")

CACHES = {
    "fbcache": recipe("fbcache", threshold=10.0, max_consecutive_hits=2),
    "taylor": recipe("interval", every=3, predictor="taylor"),
    "teacache": recipe("teacache", threshold=10.0, max_consecutive_hits=2),
    "easycache": recipe("easycache", threshold=10.0, max_consecutive_hits=2),
}


PARTS = {  # and how many numbers each gives out
    "transformer_blocks.0.attn.to_q": 32,
    "transformer_blocks.1.attn.to_v": 32,
    "single_transformer_blocks.2.attn.to_k": 32,
    "single_transformer_blocks.3.proj_mlp": 128,
}


def lora(strength: float = 0.3) -> dict[str, Any]:
    """The weights of a LoRA of rank 2 on double and single blocks, as its file would hold them."""
    weights = {}
    for i, (part, out) in enumerate(PARTS.items()):
        weights[f"transformer.{part}.lora_A.weight"] = strength * noise(2, 32, seed=10 + i)
        weights[f"transformer.{part}.lora_B.weight"] = strength * noise(out, 2, seed=20 + i)
    return weights


def load(pipe: Any, *, scale: float = 1.0) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's and diffusers' own
        pipe.load_lora_weights(lora(), adapter_name="some")
        pipe.set_adapters("some", scale)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_always_compute_with_a_lora_is_bit_identical(scale: float) -> None:
    pipe = flux()
    plain = paint(pipe)
    load(pipe, scale=scale)
    stock = paint(pipe)
    assert not torch.equal(stock, plain)
    for always in (recipe("interval", every=1), recipe("fbcache", threshold=0.0), recipe("easycache", threshold=0.0)):
        assert torch.equal(hastened(pipe, always)[0], stock)


@pytest.mark.parametrize("name", CACHES)
def test_a_cached_picture_follows_the_lora_and_its_scale(name: str) -> None:
    plain, (cached_plain, report) = paint(flux()), hastened(flux(), CACHES[name])
    found = []
    for scale in (1.0, 0.4):
        pipe = flux()
        load(pipe, scale=scale)
        effect = paint(pipe) - plain
        cached, report = hastened(pipe, CACHES[name])
        assert report.reused > 0
        # Its effect on cached pictures is its effect on computed ones: not lost, and not counted twice.
        share = ((cached - cached_plain) * effect).sum() / effect.square().sum()
        assert 0.5 < share < 1.5
        found.append(cached)
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", CACHES)
def test_a_lora_loaded_and_taken_off_between_runs_leaves_nothing_behind(name: str) -> None:
    pipe = flux()
    without = hastened(flux(), CACHES[name])[0]
    loaded = flux()
    load(loaded)
    expected = hastened(loaded, CACHES[name])[0]
    with hasten.accelerate(pipe, CACHES[name]):
        assert torch.equal(paint(pipe), without)
        load(pipe)
        assert torch.equal(paint(pipe), expected)
        pipe.unload_lora_weights()
        assert torch.equal(paint(pipe), without)
    assert torch.equal(paint(pipe), paint(flux()))


def test_the_scale_of_a_call_is_heard() -> None:
    pipe = flux()
    load(pipe)
    settings = CACHES["fbcache"]
    half = hastened(pipe, settings, joint_attention_kwargs={"scale": 0.5})[0]
    full = hastened(pipe, settings, joint_attention_kwargs={"scale": 1.0})[0]
    assert torch.equal(full, hastened(pipe, settings)[0])
    assert not torch.equal(half, full)
    always = recipe("interval", every=1)
    stock = paint(pipe, joint_attention_kwargs={"scale": 0.5})
    assert torch.equal(hastened(pipe, always, joint_attention_kwargs={"scale": 0.5})[0], stock)
