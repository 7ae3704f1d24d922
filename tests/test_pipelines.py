"""Every FLUX pipeline of diffusers, every scheduler that a FLUX may have: position from sigmas, equal bits, reuse."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runs import (
    POOLED,
    WORD,
    Cancelled,
    call,
    cancel_after,
    counted,
    flux,
    hastened,
    model_inputs,
    noise,
    paint,
    prompt,
    recipe,
    transformer,
)
from tiny import tiny_pipeline
from torch import Tensor

import hasten
from hasten.report import Report

ALWAYS = {
    "interval": recipe("interval", every=1),
    "fbcache": recipe("fbcache", threshold=0.0),
    "easycache": recipe("easycache", threshold=0.0),
    "teacache": recipe("teacache", threshold=0.0),
}
CACHES = {
    "fbcache": recipe("fbcache", threshold=10.0, max_consecutive_hits=2),
    "easycache": recipe("easycache", threshold=10.0, max_consecutive_hits=2),
    "taylor": recipe("interval", every=3, predictor="taylor"),
}


@functools.cache
def _vae() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_pipeline().vae


@functools.cache
def _transformer(in_channels: int) -> Any:
    from diffusers import FluxTransformer2DModel

    if in_channels == 64:
        return transformer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(in_channels)
        config = {key: value for key, value in transformer().config.items() if not key.startswith("_")}
        return FluxTransformer2DModel(**{**config, "in_channels": in_channels, "out_channels": 64}).eval()


@functools.cache
def _controlnet() -> Any:
    from diffusers import FluxControlNetModel

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, about the parts of its ControlNet
        torch.manual_seed(3)
        net = FluxControlNetModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WORD,
            pooled_projection_dim=POOLED,
            guidance_embeds=True,
            axes_dims_rope=[4, 6, 6],
        )
        # Its last layers start from zero; a trained one's do not.
        for block in (*net.controlnet_blocks, *net.controlnet_single_blocks, net.controlnet_x_embedder):
            torch.nn.init.normal_(block.weight, std=0.2)
        return net.eval()


def picture(seed: int) -> Tensor:
    """A 64x64 picture in [0, 1]."""
    return noise(1, 3, 64, 64, seed=seed).sigmoid()


MASK = torch.zeros(1, 1, 64, 64)
MASK[..., 16:48, 16:48] = 1.0

# The pipeline's class, its transformer's input channels, and what it takes beside a prompt.
PIPELINES: dict[str, tuple[str, int, Callable[[], dict[str, Any]]]] = {
    "text": ("FluxPipeline", 64, dict),
    "text-cfg": ("FluxPipeline", 64, lambda: prompt(1, negative=2)),
    "img2img": ("FluxImg2ImgPipeline", 64, lambda: {"image": picture(1), "strength": 0.8}),
    "inpaint": ("FluxInpaintPipeline", 64, lambda: {"image": picture(1), "mask_image": MASK, "strength": 0.9}),
    "fill": ("FluxFillPipeline", 384, lambda: {"image": picture(1), "mask_image": MASK}),
    "kontext": ("FluxKontextPipeline", 64, lambda: {"image": picture(1), "max_area": 64 * 64, "_auto_resize": False}),
    "kontext-inpaint": (
        "FluxKontextInpaintPipeline",
        64,
        lambda: {"image": picture(1), "mask_image": MASK, "max_area": 64 * 64, "_auto_resize": False, "strength": 1.0},
    ),
    "control": ("FluxControlPipeline", 128, lambda: {"control_image": picture(2)}),
    "control-img2img": (
        "FluxControlImg2ImgPipeline",
        128,
        lambda: {"image": picture(1), "control_image": picture(2), "strength": 0.8},
    ),
    "control-inpaint": (
        "FluxControlInpaintPipeline",
        128,
        lambda: {"image": picture(1), "mask_image": MASK, "control_image": picture(2), "strength": 0.9},
    ),
    "controlnet": ("FluxControlNetPipeline", 64, lambda: {"control_image": picture(2)}),
    "controlnet-cfg": ("FluxControlNetPipeline", 64, lambda: {"control_image": picture(2), **prompt(1, negative=2)}),
    "controlnet-img2img": (
        "FluxControlNetImg2ImgPipeline",
        64,
        lambda: {"image": picture(1), "control_image": picture(2), "strength": 0.8},
    ),
    "controlnet-inpaint": (
        "FluxControlNetInpaintPipeline",
        64,
        lambda: {"image": picture(1), "mask_image": MASK, "control_image": picture(2), "strength": 0.9},
    ),
}


@functools.cache
def pipeline(name: str) -> tuple[Any, Tensor, int]:
    """A pipeline, the latents that it ends with by itself at 8 steps, and how often it called its transformer."""
    import diffusers

    kind, channels, _ = PIPELINES[name]
    parts: dict[str, Any] = {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": _vae(),
        "transformer": _transformer(channels),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    }
    if "ControlNet" in kind:
        parts["controlnet"] = _controlnet()
    pipe = getattr(diffusers, kind)(**parts)
    pipe.set_progress_bar_config(disable=True)
    with counted(pipe.transformer) as counts:
        stock = paint(pipe, **given(name))
    return pipe, stock, counts[0]


def given(name: str) -> dict[str, Any]:
    return PIPELINES[name][2]()


@pytest.mark.parametrize("settings", ALWAYS)
@pytest.mark.parametrize("name", PIPELINES)
def test_always_compute_is_bit_identical_in_every_pipeline(name: str, settings: str) -> None:
    pipe, stock, calls = pipeline(name)
    latents, report = hastened(pipe, ALWAYS[settings], **given(name))
    assert torch.equal(latents, stock) and bool(stock.isfinite().all())
    assert set(report.strip) == {"C"}
    assert sum(e.lanes for e in report.evaluations) == calls


@pytest.mark.parametrize("settings", CACHES)
@pytest.mark.parametrize("name", PIPELINES)
def test_every_cache_reuses_in_every_pipeline(name: str, settings: str) -> None:
    pipe, stock, calls = pipeline(name)
    latents, report = hastened(pipe, CACHES[settings], **given(name))
    assert report.reused > 0
    assert bool(latents.isfinite().all())
    # Something was reused, and it is still the same picture: nearer than another noise's.
    assert not torch.equal(latents, stock)
    other = paint(pipe, seed=1, **given(name))
    assert (latents - stock).abs().mean() < (other - stock).abs().mean()
    lanes = 2 if name.endswith("cfg") else 1
    assert len(report.evaluations) * lanes == calls
    assert [e.interval for e in report.evaluations] == list(range(calls // lanes))
    assert report.notes == []


@pytest.mark.parametrize("settings", CACHES)
def test_easycache_looks_at_the_noise_alone(settings: str) -> None:
    for name, tokens in (("fill", 16), ("control", 16), ("kontext", 32 if settings != "easycache" else 16)):
        pipe, _, _ = pipeline(name)
        _, report = hastened(pipe, CACHES[settings], **given(name))
        numbers = {"fbcache": 2 * 32, "taylor": 2 * 32, "easycache": 4 * 64}[settings]
        assert report.cache_mib * 2**20 == pytest.approx(tokens * numbers * 4)


def test_a_late_run_reads_its_schedule_where_it_stands_in_the_whole() -> None:
    pipe, _, _ = pipeline("img2img")
    # Strength 0.5 of 8 steps runs the last four: steps 4 to 7 of the list.
    settings = recipe("schedule", steps=[0, 5, 7], of=8, first=False, last=False)
    _, report = hastened(pipe, settings, image=picture(1), strength=0.5, steps=8)
    assert report.strip == "CC.C"  # a fresh lane, then 5 and 7
    ratios = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 1.0]
    settings = recipe("magcache", ratios=ratios, threshold=0.5, first=False, last=False)
    _, report = hastened(pipe, settings, image=picture(1), strength=0.5, steps=8)
    assert report.strip == "C.C."


def test_a_schedule_that_rises_is_computed_in_full_and_the_report_says_why() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Restarting(FlowMatchEulerDiscreteScheduler):
        """Goes back up once, as restart samplers do."""

        def set_timesteps(self, *args: Any, sigmas: Any = None, **kwargs: Any) -> None:
            super().set_timesteps(*args, sigmas=sigmas, **kwargs)
            again = [0, 1, 2, 1, 2, 3]
            self.timesteps = self.timesteps[again]
            self.sigmas = torch.cat([self.sigmas[again], self.sigmas[-1:]])
            self.num_inference_steps = len(again)

    stock = paint(flux(scheduler=Restarting(shift=3.0, use_dynamic_shifting=True)), steps=4)
    for settings in (*CACHES.values(), recipe("schedule", steps=[0], predictor="weights", weights=[[1.0]])):
        pipe = flux(scheduler=Restarting(shift=3.0, use_dynamic_shifting=True))
        latents, report = hastened(pipe, settings, steps=4)
        assert torch.equal(latents, stock)
        assert report.strip == "CCCCCC" and len(report.notes) == 1
        assert "computed in full" in report.line() and "rise from" in report.line()
    skipping = {**CACHES["fbcache"], "skip": {"single": [1]}}
    pipe = flux(scheduler=Restarting(shift=3.0, use_dynamic_shifting=True))
    assert not torch.equal(hastened(pipe, skipping, steps=4)[0], stock)  # what is skipped still is


def test_a_bare_models_rising_sigmas_are_refused() -> None:
    handle = hasten.apply(transformer(), CACHES["fbcache"])
    with pytest.raises(ValueError, match="rise from"), handle.run([0.5, 1.0, 0.0]):
        pass
    handle.remove()


def test_a_scheduler_that_is_put_into_the_pipeline_later_is_noticed() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = flux()
    other = FlowMatchEulerDiscreteScheduler(shift=2.0)
    expected = hastened(flux(scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0)), CACHES["taylor"])[0]
    with hasten.accelerate(pipe, CACHES["taylor"]) as run:
        paint(pipe)
        before, pipe.scheduler = pipe.scheduler, other
        assert torch.equal(paint(pipe), expected)
        assert torch.equal(paint(pipe), expected)
    assert len(run.reports) == 3 and all(report.reused > 0 for report in run.reports)
    for scheduler in (before, other):
        assert not {"set_timesteps", "step"} & set(vars(scheduler))


def test_the_modulated_input_behind_an_offload_hook_is_not_peeked_at() -> None:
    model, inputs = transformer(), model_inputs()
    block = model.transformer_blocks[0]
    here, forward = block.norm1.linear.weight, block.forward

    def brought(*args: Any, **kwargs: Any) -> Any:  # as block-level group offloading brings weights
        block.norm1.linear.weight = here
        try:
            return forward(*args, **kwargs)
        finally:
            block.norm1.linear.weight = away

    away = torch.nn.Parameter(here.to("meta"), requires_grad=False)
    block.forward, block.norm1.linear.weight = brought, away
    handle = hasten.apply(model, CACHES["teacache"] if "teacache" in CACHES else recipe("teacache", threshold=9.0))
    with handle.run([1.0, 0.8, 0.5, 0.2, 0.0]):
        outs = [call(model, inputs, sigma) for sigma in (1.0, 0.8, 0.5, 0.2)]
    report = handle.reports[-1]
    assert report.strip == "CCCC" and [note for note in report.notes if "weights are offloaded" in note] == report.notes
    assert torch.equal(outs[1], call(transformer(), inputs, 0.8))


def test_a_long_lived_pipeline_keeps_its_latest_reports_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.hosts.diffusers_handle import REPORTS

    handle = hasten.apply(transformer(double=1, single=1), recipe())
    inputs = model_inputs()
    for _ in range(REPORTS + 3):
        with handle.run([1.0, 0.0]):
            call(handle.transformer, inputs, 1.0)
    assert len(handle.reports) == REPORTS == 64
    handle.remove()


def residuals(count: int, seed: int) -> list[Tensor]:
    return [noise(1, 16, 32, seed=seed + i) for i in range(count)]


@pytest.mark.parametrize(
    "settings",
    [
        recipe("schedule", steps=[0], last=False),
        recipe("schedule", steps=[0], last=False, skip={"double": [1], "single": [3]}),
        recipe("fbcache", threshold=10.0, last=False),
        recipe("fbcache", threshold=10.0, signal="output", last=False),
        recipe("mbcache", thresholds=[0.0, 10.0], last=False),
        recipe("teacache", threshold=10.0, last=False),
    ],
    ids=str,
)
def test_controlnet_residuals_are_counted_once(settings: dict[str, Any]) -> None:
    # The same call twice, at two places of a run: whatever is reused, it must give the computed output back. There are
    # residuals after every block, the last one included, where they are added outside of what is remembered.
    model = transformer()
    inputs = {
        **model_inputs(),
        "controlnet_block_samples": residuals(2, 50),
        "controlnet_single_block_samples": residuals(4, 60),
    }
    plain = call(transformer(), model_inputs(), 0.7)
    place = [1.0]
    handle = hasten.apply(model, settings)
    handle.await_run(lambda: [1.0, 0.5, 0.2, 0.0], lambda: place[0])
    computed = call(model, inputs, 0.7)
    handle.move_on()
    place[0] = 0.5
    reused = call(model, inputs, 0.7)
    handle.end()
    assert handle.reports[-1].strip in ("C.", "C.") and handle.reports[-1].reused == 1
    torch.testing.assert_close(reused, computed, rtol=1e-4, atol=1e-5)
    assert (computed - plain).abs().mean() > 0.05  # the residuals matter


def test_a_skipped_block_is_not_run_and_keeps_its_controlnet_residual() -> None:
    model, reference = transformer(), transformer()
    doubles, singles = residuals(2, 50), residuals(4, 60)
    inputs = {**model_inputs(), "controlnet_block_samples": doubles, "controlnet_single_block_samples": singles}
    # Skipping by hand: the block gives its inputs back.
    skipped = [reference.transformer_blocks[1], reference.single_transformer_blocks[0]]
    for block in skipped:
        block.forward = lambda hidden_states, encoder_hidden_states, **_: (encoder_hidden_states, hidden_states)
    expected = call(reference, inputs, 0.7)
    handle = hasten.apply(model, recipe(skip={"double": [1], "single": [0]}))
    with counted(*model.transformer_blocks, *model.single_transformer_blocks) as counts, handle.run([1.0, 0.7, 0.0]):
        assert torch.equal(call(model, inputs, 0.7), expected)
    assert counts == [1, 0, 0, 1, 1, 1]
    without = {**inputs, "controlnet_block_samples": [doubles[0], torch.zeros_like(doubles[1])]}
    assert not torch.equal(call(reference, without, 0.7), expected)


@pytest.mark.parametrize(
    "cache", [{}, CACHES["taylor"]["cache"], CACHES["fbcache"]["cache"], CACHES["easycache"]["cache"]]
)
def test_skipped_blocks_are_skipped_in_a_run_and_back_after_it(cache: dict[str, Any]) -> None:
    pipe = flux()
    stock = paint(pipe)
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    settings = {"schema": 1, "cache": cache, "skip": {"double": [1], "single": [1, 3]}}
    with counted(*blocks) as counts:
        _, report = hastened(pipe, settings)
    assert [counts[i] for i in (1, 3, 5)] == [0, 0, 0]
    assert counts[2] == counts[4] == report.computed
    assert torch.equal(paint(pipe), stock)


@pytest.mark.parametrize("skip", [{"double": [2]}, {"single": [0, 4]}, {"double": [0, 1], "single": [0, 1, 2, 3]}])
def test_blocks_that_are_not_there_are_one_sentence_and_change_nothing(skip: dict[str, Any]) -> None:
    pipe = flux()
    with pytest.raises(ValueError) as refusal:
        hasten.accelerate(pipe, recipe(skip=skip))
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError):
        hasten.apply(pipe.transformer, recipe(skip=skip))
    assert torch.equal(paint(pipe, steps=2), paint(flux(), steps=2))


# Where a run stands is read off the scheduler's sigmas.


def intervals(report: Report) -> list[int]:
    return [e.interval for e in report.evaluations]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fifty_steps_are_fifty_intervals_in_bf16_too(dtype: torch.dtype) -> None:
    pipe = flux(double=1, single=1)
    pipe.transformer.to(dtype)
    words = {key: value.to(dtype) for key, value in prompt().items()}
    _, report = hastened(pipe, recipe("interval", every=7), steps=50, **words)
    assert intervals(report) == list(range(50))
    sigmas = [float(s) for s in pipe.scheduler.sigmas[:50]]
    assert [e.sigma for e in report.evaluations] == sigmas
    assert [i for i, letter in enumerate(report.strip) if letter == "C"] == [0, 7, 14, 21, 28, 35, 42, 49]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_bare_model_finds_its_place_from_a_rounded_timestep(dtype: torch.dtype) -> None:
    model, inputs = transformer(double=1, single=1), model_inputs()
    handle = hasten.apply(model, recipe("interval", every=7))
    sigmas = [3.0 * s / (1 + 2.0 * s) for s in (1 - i / 50 for i in range(51))]
    with handle.run(sigmas):
        for sigma in sigmas[:-1]:
            timestep = torch.full((1,), sigma * 1000.0).to(dtype) / 1000
            with torch.no_grad():
                model(timestep=timestep, **inputs)
    assert intervals(handle.reports[-1]) == list(range(50))


def heun() -> Any:
    from diffusers import FlowMatchHeunDiscreteScheduler

    class Heun(FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
        """FluxPipeline hands its sigmas over; this scheduler makes its own."""

        def set_timesteps(
            self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = None
        ) -> None:
            super().set_timesteps(num_inference_steps or len(sigmas), device)

    return Heun(shift=3.0)


def test_heuns_two_evaluations_share_an_interval_and_each_has_its_own_history() -> None:
    pipe = flux(scheduler=heun())
    stock = paint(pipe, steps=5)
    latents, report = hastened(pipe, recipe("interval", every=1), steps=5)
    assert torch.equal(latents, stock)
    assert intervals(report) == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [e.sigma for e in report.evaluations] == pytest.approx([float(s) for s in pipe.scheduler.sigmas[:9]])
    # The second evaluation at a sigma has a history of its own, fresh at its first visit.
    _, report = hastened(pipe, recipe("schedule", steps=[0], last=False), steps=5)
    assert report.strip == "C.C......"
    assert report.evaluations[2].reason == "fresh lane"
    _, report = hastened(pipe, recipe("schedule", steps=[0, 2]), steps=5)
    assert report.strip == "C.CCC..CC"


FLOW = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
SCHEDULERS = {
    "dpm++": ("DPMSolverMultistepScheduler", FLOW),
    "unipc": ("UniPCMultistepScheduler", FLOW),
    "plain": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}),
    "karras": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}),
    "terminal": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift_terminal": 0.02}),
}


# numpy 2 about diffusers' DPM++; neither is ours.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("settings", CACHES)
def test_other_schedulers_work(name: str, settings: str) -> None:
    import diffusers

    kind, options = SCHEDULERS[name]
    pipe = flux(scheduler=getattr(diffusers, kind)(**options))
    stock = paint(pipe)
    assert torch.equal(hastened(pipe, recipe("fbcache", threshold=0.0))[0], stock)
    latents, report = hastened(pipe, CACHES[settings])
    assert intervals(report) == list(range(8))
    assert [e.sigma for e in report.evaluations] == pytest.approx([float(s) for s in pipe.scheduler.sigmas[:8]])
    assert report.reused > 0 and bool(latents.isfinite().all())


def test_img2img_counts_the_intervals_of_the_part_that_is_run() -> None:
    pipe, _, _ = pipeline("img2img")
    given = {"image": picture(1), "strength": 0.4, "steps": 20}
    stock = paint(pipe, **given)
    latents, report = hastened(pipe, recipe("schedule", steps=[14, 17]), **given)
    # 8 of 20 steps are run: interval 0 is the first of them, the last is the run's last, and the list is of all 20.
    assert intervals(report) == list(range(8))
    assert report.strip == "C.C..C.C"
    assert report.evaluations[0].sigma == pytest.approx(float(pipe.scheduler.sigmas[12]))
    assert report.evaluations[0].reason == "first" and report.evaluations[-1].reason == "last"
    assert torch.equal(hastened(pipe, ALWAYS["interval"], **given)[0], stock)
    assert bool(latents.isfinite().all())


def test_a_cancelled_run_then_another_from_a_lower_sigma_computes_first() -> None:
    from diffusers import FluxImg2ImgPipeline

    pipe = flux()
    pipe.vae = _vae()
    image = FluxImg2ImgPipeline(**{**pipe.components, "vae": _vae()})
    image.set_progress_bar_config(disable=True)
    settings = recipe("fbcache", threshold=10.0, first=False, last=False)
    given = {"image": picture(1), "strength": 0.4, "steps": 20}
    expected, alone = hastened(image, settings, **given)
    with hasten.accelerate(pipe, settings) as run:
        with pytest.raises(Cancelled):
            paint(pipe, steps=20, **cancel_after(6))
        # Another pipeline on the same transformer and scheduler is seen as well.
        assert torch.equal(paint(image, **given), expected)
    assert [report.strip for report in run.reports] == ["C......", alone.strip]
    assert alone.strip == "C......."


def test_a_second_call_has_its_own_report_and_the_last_is_the_report() -> None:
    pipe = flux()
    with hasten.accelerate(pipe, CACHES["taylor"]) as run:
        assert run.report is None and run.reports == []
        for steps in (4, 6):
            paint(pipe, steps=steps)
            assert run.report is run.reports[-1]
            assert len(run.report.evaluations) == steps
    assert [len(report.evaluations) for report in run.reports] == [4, 6]


def test_outside_a_run_a_bare_model_computes_and_the_report_says_why() -> None:
    model, inputs = transformer(), model_inputs()
    expected = [call(transformer(), inputs, sigma) for sigma in (1.0, 0.5)]
    handle = hasten.apply(model, CACHES["fbcache"])
    assert handle.report is None and handle.reports == []
    for sigma, out in zip((1.0, 0.5), expected, strict=True):
        assert torch.equal(call(model, inputs, sigma), out)
        assert torch.equal(call(model, inputs, sigma), out)
    assert handle.reports == []
    assert handle.report is not None and "handle.run(sigmas)" in handle.report.line()
    with handle.run([1.0, 0.5, 0.0]):
        call(model, inputs, 1.0)
        assert handle.report.strip == "C"
    assert handle.report is handle.reports[-1]
    call(model, inputs, 0.5)  # outside again, and again the latest thing that happened
    assert "handle.run(sigmas)" in handle.report.line()
    assert [report.strip for report in handle.reports] == ["C"]


def test_a_bare_run_that_does_not_end_at_zero_says_so() -> None:
    model, inputs = transformer(), model_inputs()
    handle = hasten.apply(model, CACHES["fbcache"])
    for sigmas, said in (([1.0, 0.5, 0.0], False), ([1.0, 0.5], True)):
        with handle.run(sigmas):
            call(model, inputs, 1.0)
        assert handle.report is not None
        assert any("give the last 0 too" in note for note in handle.report.notes) is said


def test_a_removed_handle_begins_no_run() -> None:
    handle = hasten.apply(transformer(), CACHES["fbcache"])
    handle.remove()
    with pytest.raises(ValueError, match="was removed"), handle.run([1.0, 0.5, 0.0]):
        raise AssertionError("the run began")


def test_a_handle_may_be_removed_twice_and_ends_its_run() -> None:
    model, inputs = transformer(), model_inputs()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = call(transformer(), inputs, 0.5)
    handle = hasten.apply(model, recipe("schedule", steps=[0], last=False))
    with handle.run([1.0, 0.5, 0.25, 0.0]):
        call(model, inputs, 1.0)
        assert not torch.equal(call(model, inputs, 0.5), expected)
    handle.remove()
    handle.remove()
    assert torch.equal(call(model, inputs, 0.5), expected)
    assert {name: vars(module) for name, module in model.named_modules()} == before
    assert handle.reports[-1].strip == "C."
    again = hasten.apply(model, CACHES["fbcache"])  # and it is free for another
    again.remove()


@pytest.mark.parametrize("sigmas", [[0.0, 0.5, 1.0], [1.0], []])
def test_a_bare_runs_sigmas_must_fall(sigmas: list[float]) -> None:
    model = transformer()
    handle = hasten.apply(model, CACHES["fbcache"])
    with pytest.raises(ValueError, match="the run's sigmas"), handle.run(sigmas):
        raise AssertionError("the run began")
    handle.remove()


def test_a_run_may_be_given_its_scheduler_tensor() -> None:
    model, inputs = transformer(), model_inputs()
    handle = hasten.apply(model, recipe("interval", every=2))
    with handle.run(torch.tensor([1.0, 0.5, 0.25, 0.0])) as run:
        for sigma in (1.0, 0.5, 0.25):
            call(model, inputs, sigma)
    assert run.report is not None and run.report.strip == "C.C"


@pytest.mark.parametrize("wrong", ["no transformer", "another model"])
def test_what_is_no_flux_is_refused_in_a_sentence(wrong: str) -> None:
    pipe = flux()
    pipe.transformer = None if wrong == "no transformer" else torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="is expected") as refusal:
        hasten.accelerate(pipe, recipe())
    assert "\n" not in str(refusal.value)


def test_a_bare_transformer_is_sent_to_apply() -> None:
    with pytest.raises(ValueError, match=r"for a bare transformer use hasten\.apply"):
        hasten.accelerate(transformer(), recipe())


def test_schnell_has_no_guidance_and_works() -> None:
    pipe = flux(guidance=False)
    stock = paint(pipe, steps=4)
    assert torch.equal(hastened(pipe, ALWAYS["fbcache"], steps=4)[0], stock)
    assert hastened(pipe, CACHES["fbcache"], steps=4)[1].strip == "C..C"


@pytest.mark.slow
def test_a_whole_picture_from_a_folder_from_words_to_pixels(tmp_path: Any) -> None:
    import numpy as np
    from diffusers import FluxPipeline
    from tiny import make_tiny_flux

    pipe = FluxPipeline.from_pretrained(make_tiny_flux(tmp_path / "tiny"))
    pipe.set_progress_bar_config(disable=True)

    def draw() -> Any:
        out = pipe(
            ["a red apple", "a blue cube"],
            negative_prompt=["", ""],
            true_cfg_scale=2.0,
            num_inference_steps=6,
            height=64,
            width=96,
            max_sequence_length=16,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        )
        return out.images

    stock = draw()
    with hasten.accelerate(pipe, ALWAYS["fbcache"]) as run:
        assert np.array_equal(draw(), stock)
    with hasten.accelerate(pipe, CACHES["taylor"]) as run:
        images = draw()
    assert images.shape == (2, 64, 96, 3) and np.isfinite(images).all()
    assert run.report is not None and run.report.strip == "C..C.C"
    assert {e.lanes for e in run.report.evaluations} == {2}
    assert np.array_equal(draw(), stock)


def test_accelerate_without_with_is_noticed() -> None:
    run = hasten.accelerate(flux(), recipe())
    with pytest.raises(RuntimeError, match=r"there is no report yet: .*entered, `with hasten.accelerate"):
        _ = run.report
    with pytest.warns(UserWarning, match=r"nothing was accelerated: .*`with hasten.accelerate"):
        del run
        gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hasten.accelerate(flux(), recipe()) as run:
            assert run.report is None
        del run
        gc.collect()
