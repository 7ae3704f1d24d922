"""The laws of caches that reach inside the blocks, on a tiny random FLUX and diffusers' own pipelines."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from runs import Cancelled, call, cancel_after, flux, hastened, model_inputs, paint, prompt, transformer
from test_pipelines import picture, pipeline
from torch import Tensor

import hasten


def recipe(method: str = "toca", tokens: dict[str, Any] | None = None, **cache: Any) -> dict[str, Any]:
    return {"schema": 1, "cache": {"method": method, **cache}, "tokens": tokens or {}}


ALL = {"ratio": 1.0, "double": 100.0, "single": 100.0}  # every ratio is clamped to 1
# 16 image tokens: the original's 6 % of them would be none.
MANY = {"ratio": 0.4, "double": 1.0, "single": 1.0}
INSIDE = {
    "toca": recipe(tokens=MANY),
    "toca-value": recipe(tokens={**MANY, "score": "value", "memory": "fp8"}),
    "toca-random": recipe(tokens={**MANY, "score": "random", "spatial": 0.4, "memory": "host"}),
    "toca-age": recipe(tokens={**MANY, "score": "age", "memory": "bf16"}),
    "duca": recipe("duca", tokens=MANY),
    "modules": recipe("modules", predictor="taylor", order=1),
}


def same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first, second) and bool(first.isfinite().all())


@pytest.mark.parametrize("settings", [recipe(every=1), recipe("duca", every=1), recipe("modules", every=1)])
@pytest.mark.parametrize("given", [{}, {"batch": 3}, {"negative": 2}, {"dtype": torch.bfloat16}])
def test_always_full_is_bit_identical(settings: dict[str, Any], given: dict[str, Any]) -> None:
    given = dict(given)
    dtype = given.pop("dtype", torch.float32)
    pipe = flux()
    pipe.transformer.to(dtype)
    words = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in prompt(**given).items()}
    stock = paint(pipe, **words)
    latents, report = hastened(pipe, settings, **words)
    assert same(latents, stock)
    assert report.strip == "C" * 8


@pytest.mark.parametrize(("name", "strip"), [("toca", "CCCPPPCPPC"), ("duca", "CCCP.PCP.C"), ("modules", "CCCPPPCPPC")])
def test_the_schedule_is_the_originals_and_the_last_step_is_full(name: str, strip: str) -> None:
    _, report = hastened(flux(), INSIDE[name], steps=10)
    assert report.strip == strip
    assert report.line().startswith(f"computed {strip.count('C')} of 10, {strip.count('P')} in part")
    assert all(e.ms > 0.0 for e in report.evaluations)


@pytest.mark.parametrize("negative", [None, 2])
def test_fresh_ratio_1_equals_recomputing_the_mlps(negative: int | None) -> None:
    """Against a stock model whose attention gives out what it gave at the full evaluation before."""
    sigmas, inputs = [1.0, 0.75, 0.5, 0.25, 0.0], model_inputs(batch=2)
    handle = hasten.apply(transformer(), recipe(tokens={**ALL, "full_first": 0}))
    with handle.run(sigmas):
        call(handle.transformer, inputs, 1.0)
        found = [call(handle.transformer, inputs, sigma) for sigma in (0.75, 0.5)]
    assert handle.reports[-1].strip == "CPP"
    stock = transformer()
    blocks = [*stock.transformer_blocks, *stock.single_transformer_blocks]
    held: dict[int, Any] = {}
    hooks = [
        b.attn.register_forward_hook(lambda _, __, out, i=i: held.setdefault(i, out)) for i, b in enumerate(blocks)
    ]
    call(stock, inputs, 1.0)
    expected = [call(stock, inputs, sigma) for sigma in (0.75, 0.5)]
    for hook in hooks:
        hook.remove()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)  # products of other row counts round otherwise


def test_in_part_nothing_runs_but_modulation_and_the_chosen_tokens_mlp() -> None:
    model, inputs = transformer(), model_inputs()
    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    rows: dict[str, list[int]] = {}
    watched = {
        "attention": double.attn, "joint attention": single.attn, "image": double.ff, "text": double.ff_context,
        "joint": single.proj_mlp, "last": single.proj_out,
    }  # fmt: skip
    for name, module in watched.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: rows.setdefault(name, []).append(args[0].shape[1] if args else 0)
        )
    handle = hasten.apply(model, recipe(tokens={**MANY, "full_first": 0}))
    with handle.run([1.0, 0.75, 0.5, 0.25, 0.0]):
        for sigma in (1.0, 0.75):
            call(model, inputs, sigma)
    # 16 image and 6 text tokens; 0.4 x 1.5 of them in the first layer of a stage.
    assert rows == {
        "attention": [0], "joint attention": [0], "image": [16, 9], "text": [6, 3], "joint": [22, 13], "last": [22, 13],
    }  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_what_modules_gave_out_in_part_outlives_no_block(name: str) -> None:
    handle = hasten.apply(transformer(), {**INSIDE[name], "tokens": {**INSIDE[name]["tokens"], "full_first": 0}})
    inputs = model_inputs()
    with handle.run([1.0, 0.75, 0.5, 0.25, 0.0]):
        for sigma in (1.0, 0.75):
            call(handle.transformer, inputs, sigma)
            taps = [vars(module).get("hasten_tap") for module in handle.transformer.modules()]
            assert any(taps) and all(tap.given is None and tap.out is None for tap in taps if tap is not None)
    assert handle.reports[-1].strip == "CP"


@pytest.mark.parametrize("name", INSIDE)
def test_run_cancel_run_equals_a_first_run_and_stock_after_it(name: str) -> None:
    first, report = hastened(flux(), INSIDE[name])
    pipe = flux()
    stock = paint(pipe)
    assert not torch.equal(first, stock)
    with hasten.accelerate(pipe, INSIDE[name]) as run:
        with pytest.raises(Cancelled):
            paint(pipe, seed=7, **cancel_after(4))
        again = paint(pipe)
    assert same(again, first)
    assert [r.strip for r in run.reports] == [report.strip[:5], report.strip]
    assert same(paint(pipe), stock)


@pytest.mark.parametrize("name", INSIDE)
def test_nothing_is_left_on_the_models_modules(name: str) -> None:
    pipe = flux()
    paint(pipe, steps=2)
    before = {n: {k: id(v) for k, v in vars(m).items()} for n, m in pipe.transformer.named_modules()}
    hooks = {n: list(m._forward_hooks) for n, m in pipe.transformer.named_modules()}
    hastened(pipe, INSIDE[name], steps=5)
    assert before == {n: {k: id(v) for k, v in vars(m).items()} for n, m in pipe.transformer.named_modules()}
    assert hooks == {n: list(m._forward_hooks) for n, m in pipe.transformer.named_modules()}


def test_a_copied_model_is_listened_to_by_nobody() -> None:
    pipe, other = flux(), flux()
    stock = paint(pipe, steps=4)
    with hasten.accelerate(pipe, INSIDE["toca"]):
        other.transformer = copy.deepcopy(pipe.transformer)
    assert same(paint(other, steps=4), stock)
    assert not any(vars(module).get("hasten_tap") for module in other.transformer.modules())


@pytest.mark.parametrize("name", INSIDE)
def test_cond_and_uncond_have_their_own_lanes(name: str) -> None:
    plain, report = hastened(flux(), INSIDE[name])
    guided, guided_report = hastened(flux(), INSIDE[name], **prompt(1, negative=1))
    torch.testing.assert_close(guided, plain, rtol=1e-4, atol=1e-5)
    assert guided_report.strip == report.strip
    assert {e.lanes for e in guided_report.evaluations} == {2}
    # Other prompts' lanes stay apart and agree in what they do.
    _, other = hastened(flux(), INSIDE[name], **prompt(1, negative=2))
    assert other.strip == report.strip and other.notes == []


@pytest.mark.parametrize("name", ["toca", "toca-age", "duca", "modules"])
def test_a_batch_gives_what_each_gives_alone(name: str) -> None:
    start = torch.cat([paint(flux(), steps=1, seed=seed) for seed in range(3)])
    together, _ = hastened(flux(), INSIDE[name], latents=start, **prompt(1, batch=3))
    for i in range(3):
        alone, _ = hastened(flux(), INSIDE[name], latents=start[i : i + 1])
        assert (together[i : i + 1] - alone).abs().max() / alone.abs().max() < 1e-4


@pytest.mark.parametrize("name", INSIDE)
def test_a_new_shape_in_a_run_is_a_fresh_lane(name: str) -> None:
    model = transformer()
    small, large = model_inputs(size=4), model_inputs(size=6)
    large["encoder_hidden_states"] = small["encoder_hidden_states"]
    handle = hasten.apply(model, {**INSIDE[name], "tokens": {**INSIDE[name]["tokens"], "full_first": 0}})
    stock = call(transformer(), large, 0.25)
    with handle.run([1.0, 0.75, 0.5, 0.25, 0.125, 0.0]):
        for sigma in (1.0, 0.75, 0.5):
            call(model, small, sigma)
        assert same(call(model, large, 0.25), stock)
    assert handle.reports[-1].strip.startswith("CP") and handle.reports[-1].strip[3:] == "C"


@pytest.mark.parametrize("name", ["toca", "duca", "modules"])
def test_img2img_begins_anywhere(name: str) -> None:
    pipe, _, _ = pipeline("img2img")
    given = {"image": picture(1), "strength": 0.4, "steps": 20}
    stock = paint(pipe, **given)
    assert same(hastened(pipe, recipe(every=1), **given)[0], stock)
    with hasten.accelerate(pipe, INSIDE[name]) as run:
        paint(pipe, **given)
    assert run.report is not None
    assert run.report.strip == {"toca": "CCCPPPCC", "duca": "CCCP.PCC", "modules": "CCCPPPCC"}[name]


def test_second_calls_in_an_interval_have_their_own_memory() -> None:
    """As Heun makes them: two evaluations a step at sigmas of their own."""
    model, inputs = transformer(), model_inputs()
    handle = hasten.apply(model, recipe(tokens={**MANY, "full_first": 1}))
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    with handle.run(sigmas):
        for now, then in itertools.pairwise(sigmas[:-1]):
            call(model, inputs, now)
            call(model, inputs, (now + then) / 2)
    assert handle.reports[-1].strip == "CCPPPPPP"


def test_lora_takes_part() -> None:
    """The chosen tokens go through the host's own layers: an adapter that is on changes what they give out."""
    from peft import LoraConfig

    sigmas, inputs = [1.0, 0.75, 0.5, 0.25, 0.0], model_inputs()

    def outputs(settings: dict[str, Any], *, adapter: bool) -> list[Tensor]:
        model = transformer()
        if adapter:
            torch.manual_seed(0)
            targets = ["proj_mlp", "proj_out", "ff.net.2", "to_q"]
            config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            model.add_adapter(config)
        handle = hasten.apply(model, settings)
        with handle.run(sigmas):
            out = [call(model, inputs, sigma) for sigma in (1.0, 0.75)]
        assert handle.reports[-1].strip[1] == ("P" if settings["tokens"] else "C")
        return out

    everything = recipe(tokens={**ALL, "full_first": 0})
    plain, adapted = outputs(everything, adapter=False), outputs(everything, adapter=True)
    assert not torch.allclose(plain[1], adapted[1], atol=1e-3)
    in_full = outputs(recipe(every=1), adapter=True)
    assert same(adapted[0], in_full[0])
    assert (adapted[1] - in_full[1]).abs().mean() < 0.5 * (adapted[1] - plain[1]).abs().mean()


def test_a_recording_knows_its_adapters_strengths() -> None:
    from peft import LoraConfig

    from hasten.hosts.diffusers_parts import strengths

    model = transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["proj_mlp"], init_lora_weights=False), adapter_name="one")
    adapted = [module for module in model.modules() if hasattr(module, "scaling")]
    assert adapted
    seen = [strengths(adapted)]
    model.set_adapters(["one"], [0.5])
    seen.append(strengths(adapted))
    model.disable_adapters()
    seen.append(strengths(adapted))
    assert len(set(seen)) == 3


def test_a_recording_knows_adapters_that_come_and_go_within_a_run() -> None:
    from peft import LoraConfig

    from hasten.hosts.diffusers_families import FluxStreams

    model, tokens = transformer(), torch.zeros(1, 16, 32)
    insides = hasten.apply(model, recipe(tokens=ALL)).insides
    assert insides is not None
    streams = FluxStreams(tokens, tokens, model.transformer_blocks[0], torch.zeros(1, 32))

    def read() -> set[int]:
        walk = insides.walk(streams)
        assert walk is not None and walk.weights is not None
        return {id(tensor) for tensor in walk.weights}

    before = read()
    model.add_adapter(LoraConfig(r=2, target_modules=["proj_mlp"]), adapter_name="one")
    assert read() > before
    model.unload_lora()
    assert read() == before


def test_controlnet_residuals_are_added_once_and_afresh() -> None:
    sigmas, inputs = [1.0, 0.75, 0.5, 0.25, 0.0], model_inputs()
    handle = hasten.apply(transformer(), recipe(tokens={**ALL, "full_first": 0}))
    stock = transformer()

    def controlled(strength: float) -> dict[str, Any]:
        some = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(9)) * strength
        return {**inputs, "controlnet_block_samples": [some] * 2, "controlnet_single_block_samples": [some] * 4}

    held: dict[int, Any] = {}
    for i, b in enumerate([*stock.transformer_blocks, *stock.single_transformer_blocks]):
        b.attn.register_forward_hook(lambda _, __, out, i=i: held.setdefault(i, out))
    with handle.run(sigmas):
        for sigma, strength in ((1.0, 0.5), (0.75, 1.0), (0.5, 0.0)):
            found = call(handle.transformer, controlled(strength), sigma)
            torch.testing.assert_close(found, call(stock, controlled(strength), sigma), rtol=1e-5, atol=1e-5)
    assert handle.reports[-1].strip == "CPP"


@pytest.mark.parametrize("name", INSIDE)
def test_memory_is_stated_before_it_is_taken(name: str) -> None:
    stated: list[float] = []
    pipe = flux()
    pipe.transformer.transformer_blocks[0].attn.register_forward_hook(
        lambda *_: stated.append(run.report.cache_mib_planned if run.report else -1.0)
    )
    with hasten.accelerate(pipe, INSIDE[name]) as run:
        paint(pipe)
    report = run.report
    assert report is not None and report.cache_mib > 0.0
    # Scores, ages and fp8's scales are a few bytes a token, which at 32 channels still show.
    assert report.cache_mib_planned == pytest.approx(report.cache_mib, rel=0.35)


def test_blocks_that_were_compiled_before_take_part_uncompiled_and_later_ones_compiled() -> None:
    pipe = flux()
    expected = hastened(pipe, INSIDE["toca"], steps=5)[0]
    try:
        for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
            block.compile(backend="eager")
        latents, report = hastened(pipe, INSIDE["toca"], steps=5)
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
        assert report.strip == "CCCPC"
    finally:
        torch._dynamo.reset()


def test_diffusers_own_cache_on_the_same_blocks_is_refused_in_a_sentence() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"own cache is enabled .*disable_cache\(\) first"):
        hasten.accelerate(pipe, INSIDE["toca"]).__enter__()
    pipe.transformer.disable_cache()
    hastened(pipe, INSIDE["toca"], steps=4)


@pytest.mark.parametrize("name", INSIDE)
def test_all_blocks_at_once_give_what_they_give_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, report = hastened(flux(), INSIDE[name])
    monkeypatch.setattr("hasten.hosts.diffusers_parts.Insides.walk", lambda *_: None)
    one_by_one, other = hastened(flux(), INSIDE[name])
    assert same(at_once, one_by_one)
    assert (report.strip, report.cache_mib) == (other.strip, other.cache_mib)


@pytest.mark.gpu
@pytest.mark.parametrize("name", INSIDE)
def test_a_recorded_evaluation_gives_what_a_launched_one_gives(name: str) -> None:
    model = transformer().to("cuda")
    inputs = {k: v.to("cuda") if isinstance(v, Tensor) else v for k, v in model_inputs(batch=2).items()}
    sigmas = [1.0 - i / 14 for i in range(15)]
    outputs = []
    for record in (True, False):
        settings = {**INSIDE[name], "tokens": {**INSIDE[name]["tokens"], "record": record}}
        handle = hasten.apply(model, settings)
        with handle.run(sigmas):
            outputs.append([call(model, inputs, sigma).clone() for sigma in sigmas[:-1]])
        handle.remove()
    for played, launched in zip(*outputs, strict=True):
        torch.testing.assert_close(played, launched, rtol=1e-5, atol=1e-6)
