"""diffusers' own caches on the same weights as oracles: equal decisions, and pictures that agree closely."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from runs import call, flux, hastened, model_inputs, noise, paint, prompt, recipe, transformer
from test_policy import FLUX_RATIOS
from torch import Tensor

from hasten.signal import magnitude_ratio


def cached_by_diffusers(config: Any, **given: Any) -> tuple[Tensor, str]:
    """The latents of a run under diffusers' cache, and its strip, read off which calls ran the second block."""
    # A pipeline of its own: its hooks keep state between runs.
    pipe = flux()
    ran: list[bool] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(False))

    def mark(*_: Any) -> None:
        ran[-1] = True

    # Its attention: the block itself is called, and passes through, on a reuse as well.
    pipe.transformer.transformer_blocks[1].attn.register_forward_hook(mark)
    pipe.transformer.enable_cache(config)
    latents = paint(pipe, **given)
    return latents, "".join("C" if computed else "." for computed in ran)


def agree(first: Tensor, second: Tensor) -> None:
    assert first.shape == second.shape and first.dtype == second.dtype
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [12, 28])
@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5])
def test_first_block_cache_decides_as_diffusers_does(threshold: float, steps: int) -> None:
    from diffusers import FirstBlockCacheConfig

    theirs, strip = cached_by_diffusers(FirstBlockCacheConfig(threshold=threshold), steps=steps)
    ours, report = hastened(flux(), recipe("fbcache", threshold=threshold, first=False, last=False), steps=steps)
    assert len(strip) == len(report.strip) == steps
    for evaluation, decision, expected in zip(report.evaluations, report.strip, strip, strict=True):
        if evaluation.change is not None and abs(evaluation.change - threshold) <= 1e-3:
            return  # too close to call: from here on the two may be different runs
        assert decision == expected, f"step {evaluation.index}: {report.strip} and {strip}"
    agree(ours, theirs)


def test_the_thresholds_compared_reuse_nothing_something_and_nearly_all() -> None:
    # Were this untrue, the oracle above would prove little.
    shares = [
        hastened(flux(), recipe("fbcache", threshold=threshold, first=False, last=False), steps=28)[1].reused
        for threshold in (0.03, 0.1, 0.2, 0.5)
    ]
    assert shares == sorted(shares)
    assert any(0 < share < 20 for share in shares) and shares[-1] >= 20


@pytest.mark.parametrize("given", [{"batch": 2}, {"words": 12}])
def test_first_block_cache_agrees_on_other_inputs(given: dict[str, Any]) -> None:
    from diffusers import FirstBlockCacheConfig

    words = prompt(3, **given)
    theirs, strip = cached_by_diffusers(FirstBlockCacheConfig(threshold=0.5), **words, size=96)
    ours, report = hastened(flux(), recipe("fbcache", threshold=0.5, first=False, last=False), **words, size=96)
    assert report.strip == strip
    agree(ours, theirs)


@pytest.mark.parametrize("steps", [12, 28])
@pytest.mark.parametrize(
    ("threshold", "most", "retention"), [(0.06, 3, 0.25), (0.24, 5, 0.25), (0.02, 1, 0.0), (9.0, 4, 0.5)]
)
def test_magcache_decides_as_diffusers_does(steps: int, threshold: float, most: int, retention: float) -> None:
    from diffusers import MagCacheConfig

    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=most,
        retention_ratio=retention,
        num_inference_steps=steps,
        mag_ratios=torch.tensor(FLUX_RATIOS),
    )
    theirs, strip = cached_by_diffusers(config, steps=steps)
    settings = recipe(
        "magcache",
        threshold=threshold,
        max_consecutive_hits=most,
        start=retention,
        ratios=FLUX_RATIOS,
        first=False,
        last=False,
    )
    ours, report = hastened(flux(), settings, steps=steps)
    assert report.strip == strip
    assert "." in strip
    agree(ours, theirs)


def test_a_magnitude_ratio_is_what_diffusers_calibration_measures() -> None:
    from diffusers import MagCacheConfig

    model = transformer()
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    entries: list[Tensor] = []
    deltas: list[Tensor] = []
    blocks[0].register_forward_pre_hook(lambda _, args, given: entries.append(given["hidden_states"]), with_kwargs=True)
    blocks[-1].register_forward_hook(lambda _, args, out: deltas.append(out[1] - entries[-1]))
    # Two steps more than it is run for: having seen them all it would print its ratios and drop them.
    model.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=8))
    inputs = model_inputs()
    for step in range(6):
        inputs["hidden_states"] = noise(1, 16, 64, seed=step)
        with model.cache_context("cond"):
            call(model, inputs, 1.0 - step / 8)
            state = blocks[0]._diffusers_hook.get_hook("mag_cache_leader_block_hook").state_manager.get_state()
    ours = [float(magnitude_ratio(now, before)) for before, now in pairwise(deltas)]
    assert state.calibration_ratios == pytest.approx([1.0, *ours], rel=1e-4)
