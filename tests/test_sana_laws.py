"""The laws of the engine, on a tiny random Sana in diffusers' own pipelines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from runs import Cancelled, cancel_after, recipe
from tiny_sana import noise, paint, sana, tiny_autoencoder, tiny_sana_pipeline, words
from torch import Tensor

import hasten
from hasten.report import Report

RATIOS = [1.0, 1.1, 1.05, 1.02, 1.0, 0.99, 0.98, 0.95]
COSINE = {"signal": "output", "distance": "cosine"}

# Never reuses anything, each for its own reason.
ALWAYS = {
    "none": recipe(),
    "interval": recipe("interval", every=1, predictor="taylor", order=2),
    "fbcache": recipe("fbcache", threshold=0.0),
    "mbcache": recipe("mbcache", threshold=0.0),
    "mbcache-cosine": recipe("mbcache", threshold=0.0, **COSINE),
    "teacache": recipe("teacache", threshold=0.0),
    "easycache": recipe("easycache", threshold=0.0),
    "magcache": recipe("magcache", threshold=0.0, ratios=RATIOS),
}

# Reuses whatever it may.
EAGER = {
    "interval": recipe("interval", every=100, last=False),
    "taylor": recipe("interval", every=4, predictor="taylor", order=2, last=False),
    "chebyshev": recipe("interval", every=3, predictor="chebyshev", last=False),
    "schedule": recipe("schedule", steps=[0], first=False, last=False),
    "fbcache": recipe("fbcache", threshold=10.0, first=False, last=False),
    "mbcache": recipe("mbcache", threshold=10.0, first=False, last=False),
    "mbcache-cosine": recipe("mbcache", threshold=1.0, first=False, last=False, **COSINE),
    "teacache": recipe("teacache", threshold=10.0, first=False, last=False),
    "easycache": recipe("easycache", threshold=10.0, first=False, last=False),
    "magcache": recipe("magcache", threshold=10.0, ratios=RATIOS, first=False, last=False),
}


def same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first, second) and bool(first.isfinite().all())


def hastened(pipe: Any, settings: dict[str, Any], **given: Any) -> tuple[Tensor, Report]:
    with hasten.accelerate(pipe, settings) as run:
        latents = paint(pipe, **given)
    assert run.report is not None
    return latents, run.report


GIVEN: dict[str, dict[str, Any]] = {
    "cfg": {},
    "cfg 1": {"guidance_scale": 1.0},
    "batch 4": words(6, 6, 6, 6),
    "two lengths": words(3, 9),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", ALWAYS)
def test_always_compute_is_bit_identical(name: str, given: str) -> None:
    pipe = sana()
    stock = paint(pipe, steps=4, **GIVEN[given])
    latents, report = hastened(pipe, ALWAYS[name], steps=4, **GIVEN[given])
    assert same(latents, stock)
    assert report.strip == "CCCC"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_always_compute_is_bit_identical_in_16_bits(dtype: torch.dtype) -> None:
    pipe = sana()
    pipe.transformer.to(dtype)
    stock = paint(pipe, steps=4)
    assert same(hastened(pipe, ALWAYS["mbcache-cosine"], steps=4)[0], stock)


@pytest.mark.parametrize("name", EAGER)
def test_a_fresh_lane_computes_and_what_follows_is_reused(name: str) -> None:
    _, report = hastened(sana(), EAGER[name], steps=6)
    assert report.strip.startswith("C")
    assert report.reused > 0


@pytest.mark.parametrize("name", EAGER)
def test_run_cancel_run_equals_a_first_run(name: str) -> None:
    first, report = hastened(sana(), EAGER[name])
    pipe = sana()
    with hasten.accelerate(pipe, EAGER[name]) as run:
        with pytest.raises(Cancelled):
            paint(pipe, seed=7, **words(3, seed=5), **cancel_after(3))
        again = paint(pipe)
    assert same(again, first)
    assert [r.strip for r in run.reports] == [report.strip[:4], report.strip]


@pytest.mark.parametrize("name", EAGER)
def test_removed_it_leaves_nothing(name: str) -> None:
    pipe = sana()
    stock, before = paint(pipe), copy.copy(pipe.transformer.transformer_blocks[0].__dict__)
    hastened(pipe, EAGER[name])
    assert pipe.transformer.transformer_blocks[0].__dict__.keys() == before.keys()
    assert same(paint(pipe), stock)


@pytest.mark.parametrize("name", ["taylor", "mbcache-cosine", "easycache"])
def test_two_prompts_of_one_batch_keep_their_own_masks(name: str) -> None:
    """Each picture is as if drawn alone: across batch sizes within 1e-5 of its size."""
    both = words(3, 9)
    latents = noise(2, 32, 4, 4, seed=3)
    together, _ = hastened(sana(), EAGER[name], latents=latents.clone(), **both)
    for i in range(2):
        alone = {key: value[i : i + 1] for key, value in both.items()}
        one, _ = hastened(sana(), EAGER[name], latents=latents[i : i + 1].clone(), **alone)
        assert float((together[i] - one[0]).norm() / one.norm()) < 1e-5


def test_embeddings_that_are_cast_for_every_step_are_one_condition() -> None:
    pipe = sana()
    pipe.transformer.to(torch.bfloat16)  # the words stay in float32: the pipeline casts them at each step
    _, report = hastened(pipe, EAGER["interval"])
    assert report.strip == "C......."


def test_another_mask_is_another_condition() -> None:
    from hasten.hosts.diffusers_families import SanaFamily

    family, given = SanaFamily(sana().transformer), words(3, negative=False)
    call = {"encoder_hidden_states": given["prompt_embeds"], "encoder_attention_mask": given["prompt_attention_mask"]}
    first = family.condition(call)
    assert family.condition({**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()}) is first
    assert family.condition({**call, "encoder_attention_mask": torch.ones(1, 10)}) is not first


@pytest.mark.parametrize("steps", [2, 4])
def test_sprint_runs_along_its_angles(steps: int) -> None:
    pipe = sana(sprint=True)
    stock = paint(pipe, steps=steps)
    latents, report = hastened(pipe, ALWAYS["fbcache"], steps=steps)
    assert same(latents, stock)
    assert [e.interval for e in report.evaluations] == list(range(steps))
    assert report.evaluations[0].sigma == pytest.approx(1.0)
    _, report = hastened(pipe, EAGER["interval"], steps=steps)
    assert report.strip == "C" + "." * (steps - 1)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' with numpy 2
def test_the_authors_scheduler_is_followed() -> None:
    from diffusers import DPMSolverMultistepScheduler

    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    pipe = sana(scheduler=DPMSolverMultistepScheduler(**flow))
    stock = paint(pipe)
    assert same(hastened(pipe, ALWAYS["mbcache"])[0], stock)
    _, report = hastened(pipe, recipe("interval", every=2))
    assert report.strip == "C.C.C.CC"


def test_a_controlnet_is_not_counted_twice() -> None:
    """Residuals that are added between blocks lie inside a remembered delta."""
    from diffusers import SanaControlNetModel, SanaControlNetPipeline

    def pipeline() -> Any:
        plain = sana()
        torch.manual_seed(5)
        names = ("num_attention_heads", "attention_head_dim", "num_cross_attention_heads", "caption_channels")
        names += ("cross_attention_head_dim", "cross_attention_dim", "sample_size", "interpolation_scale")
        net = SanaControlNetModel(num_layers=2, **{name: plain.transformer.config[name] for name in names}).eval()
        for block in net.controlnet_blocks:
            torch.nn.init.normal_(block.weight, std=0.05)
        return SanaControlNetPipeline(None, None, tiny_autoencoder(), plain.transformer, net, plain.scheduler)

    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    given = {"control_image": torch.rand(1, 3, 128, 128), "controlnet_conditioning_scale": 1.0}
    stock = paint(pipe, **given)
    assert same(hastened(pipe, ALWAYS["fbcache"], **given)[0], stock)
    held, report = hastened(pipe, recipe("interval", every=8, last=False), **given)
    assert report.strip == "C......."
    assert float((held - stock).norm() / stock.norm()) < 1.0


def test_memory_is_told_and_let_go() -> None:
    """One delta and one reference of 16 tokens of 64 channels in float32, for both halves of the guided batch."""
    _, report = hastened(sana(), EAGER["fbcache"])
    assert report.cache_mib == pytest.approx(2 * 2 * 16 * 64 * 4 / 2**20)
    assert report.cache_mib <= report.cache_mib_planned


def test_teacache_does_not_take_flux_coefficients_for_sanas() -> None:
    _, report = hastened(sana(), recipe("teacache"))
    assert any("fitted to FLUX.1" in note for note in report.notes)
    assert report.recipe["cache"]["coefficients"] == [1.0, 0.0]


def test_calibration_measures_a_table() -> None:
    from hasten.calibrate import calibrate

    torch.manual_seed(0)
    pipe = tiny_sana_pipeline()
    options = {"num_inference_steps": 3, "height": 128, "width": 128, "use_resolution_binning": False}
    ratios = calibrate(pipe, ["a red ball"], **options)
    assert len(ratios) == 3 and ratios[0] == 1.0


def test_linear_layers_are_kept_in_8_bits_and_put_back() -> None:
    pipe = sana()
    stock = paint(pipe, steps=4)
    eight, report = hastened(pipe, {"schema": 1, "quantize": {"format": "int8"}}, steps=4)
    assert 0 < float((eight - stock).norm() / stock.norm()) < 0.05
    assert "blocks in int8" in report.line()
    assert same(paint(pipe, steps=4), stock)


def test_blocks_are_compiled_under_the_gates() -> None:
    pipe = sana()
    compile_ = {"compile": {"blocks": True, "backend": "eager"}}
    plain, report = hastened(pipe, {"schema": 1, **compile_}, steps=4)
    latents, _ = hastened(pipe, {**ALWAYS["fbcache"], **compile_}, steps=4)
    assert same(latents, plain) and "compiled" in report.line()
    assert hastened(pipe, {**EAGER["interval"], **compile_}, steps=4)[1].strip == "C..."


@pytest.mark.parametrize("kind", [{}, {"sprint": True}, {"scale": 1.0}])
@pytest.mark.parametrize("given", GIVEN)
def test_fused_blocks_differ_by_rounding_alone_and_are_undone(kind: dict[str, Any], given: str) -> None:
    pipe, asked = sana(**kind), GIVEN[given] if not kind else {}
    stock = paint(pipe, steps=3, **asked)
    fused, report = hastened(pipe, {"schema": 1, "compile": {"fuse": "always"}}, steps=3, **asked)
    assert report.line().endswith("fused passes")
    assert float((fused - stock).norm() / stock.norm()) < 1e-5
    assert same(paint(pipe, steps=3, **asked), stock)


def test_a_block_that_was_altered_since_runs_as_it_is() -> None:
    pipe, wanted = sana(), {"schema": 1, "compile": {"fuse": "always"}}
    block = pipe.transformer.transformer_blocks[0]
    with hasten.accelerate(pipe, wanted):
        fused = paint(pipe, steps=2)
        block.attn1.to_q = torch.nn.Sequential(block.attn1.to_q)  # as an adapter would be put around it
        altered = paint(pipe, steps=2)
    assert float((altered - fused).norm() / fused.norm()) < 1e-5
    block.attn1.to_q = block.attn1.to_q[0]


@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 7, 9)])
def test_the_decoder_runs_in_fused_passes_and_is_put_back(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    pipe = tiny_sana_pipeline()
    weight = pipe.vae.decoder.conv_in.weight
    for parameter in pipe.vae.decoder.parameters():  # biases and norms that matter
        parameter.data = 0.3 * torch.randn_like(parameter) + (0.5 if parameter.ndim == 1 else 0.0)
    latent = noise(shape[0], 32, *shape[1:], seed=3)
    with torch.no_grad():
        stock = pipe.vae.decode(latent).sample
        stack = hasten.prepare(pipe, {"schema": 1, "compile": {"decoder": True, "backend": "eager"}})
        assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
        fused = pipe.vae.decode(latent).sample
        assert 0 < float((fused - stock).norm() / stock.norm()) < 1e-5
        assert stack.graphs == 0 and stack.notes == []
        block = pipe.vae.decoder.up_blocks[-1][-1]
        hook = block.attn.to_q.register_forward_hook(lambda module, given, out: out * 0)
        heard = pipe.vae.decode(latent).sample
        hook.remove()
        assert float((heard - stock).norm() / stock.norm()) > 1e-3
    picture = pipe.vae.decode(latent.requires_grad_()).sample  # with gradients, as diffusers has it
    assert torch.autograd.grad(picture.sum(), latent)[0].abs().sum() > 0
    with torch.no_grad():
        stack.undo()
        assert weight.is_contiguous() and same(pipe.vae.decode(latent).sample, stock)


def test_every_fused_block_reads_its_tokens_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one too, which gets them channels first: another layout is another rounding; recordings have one."""
    from hasten.hosts.diffusers_sana_block import FusedSana

    pipe, dense, inner = sana(), [], FusedSana.forward
    monkeypatch.setattr(
        FusedSana, "forward", lambda self, *given: dense.append(given[0].is_contiguous()) or inner(self, *given)
    )
    hastened(pipe, {"schema": 1, "compile": {"fuse": "always"}}, steps=1)
    assert dense == [True] * 4
