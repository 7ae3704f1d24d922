"""Apply ToCa in the real ComfyUI: the laws, its way into the blocks, and bad input as one line."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from hasten import attention
from hasten.attention_backends import BACKENDS, SPARSE, Backend
from hasten.hosts import comfy, comfy_sparge
from hasten.hosts.comfy_fitting import anatomy_of
from hasten.hosts.comfy_parts import mlp_half
from hasten.plan import make_plan
from hasten.recipe import Recipe

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("default")]

# 16 image tokens: the original's 6 % of them would be none.
MANY = {"ratio": 0.4, "double": 1.0, "single": 1.0}
ALL = {"ratio": 1.0, "double": 100.0, "single": 100.0}
INSIDE = {
    "toca": ("toca", MANY),
    "toca-value": ("toca", {**MANY, "score": "value", "spatial": 0.4, "memory": "fp8"}),
    "duca": ("duca", {**MANY, "memory": "host"}),
    "modules": ("modules", {}),
}


def recipe(method: str = "toca", tokens: dict[str, Any] | None = None, **cache: Any) -> Recipe:
    if method == "modules":
        cache.setdefault("predictor", "taylor")
    return Recipe.from_dict({"schema": 1, "cache": {"method": method, **cache}, "tokens": tokens or {}})


def run(rig: Any, model: Any, wanted: Recipe, **how: Any) -> tuple[torch.Tensor, Any]:
    patched = comfy.put_recipe(model, wanted)
    out = rig.sample(patched, **how)
    return out, comfy.reports_of(patched)[-1]


@pytest.fixture
def toca(rig: Any) -> Any:
    from hasten.hosts import comfy_nodes

    listed = asyncio.run(comfy_nodes.extension().get_node_list())
    return next(node for node in listed if node.GET_SCHEMA().node_id == "ApplyToCa")


def test_the_node_is_the_originals_with_its_constants_as_optional_inputs(toca: Any, rig: Any, model: Any) -> None:
    schema = toca.GET_SCHEMA()
    assert (schema.category, schema.inputs[0].id) == ("Lightning/ToCa", "model")
    assert not schema.inputs[0].optional and all(i.optional for i in schema.inputs[1:])
    patched = toca.execute(model)[0]
    kept = Recipe.from_dict(patched.model_options["transformer_options"][comfy.KEY]["recipe"])
    assert (kept.cache.method, kept.cache.every, kept.tokens.full_first) == ("toca", 4, 3)
    assert (kept.tokens.ratio, kept.tokens.staleness, kept.tokens.double, kept.tokens.single) == (0.1, 0.25, 0.4, 1.6)
    rig.sample(patched, steps=12)
    # The original's: steps 0, 1, 2, then each fourth; the last one is no exception.
    assert comfy.reports_of(patched)[-1].strip == "CCCPPPCPPPCP"
    assert "5 in part" not in comfy.reports_of(patched)[-1].line()
    assert ", 7 in part" in comfy.reports_of(patched)[-1].line()


@pytest.mark.parametrize("method", ["toca", "duca", "modules"])
def test_always_full_is_bit_identical(rig: Any, model: Any, method: str) -> None:
    stock = rig.sample(model, cfg=2.0)
    out, report = run(rig, model, recipe(method, every=1), cfg=2.0)
    assert torch.equal(out, stock)
    assert report.strip == "C" * 8


@pytest.mark.parametrize("name", INSIDE)
def test_run_bypass_run_and_interrupt(rig: Any, model: Any, name: str) -> None:
    stock = rig.sample(model)
    before = {n: (sorted(vars(m)), list(m._forward_hooks)) for n, m in model.model.diffusion_model.named_modules()}
    patched = comfy.put_recipe(model, recipe(*INSIDE[name]))
    first = rig.sample(patched)
    report = comfy.reports_of(patched)[-1]
    assert report.strip == {"duca": "CCCP.PCC"}.get(name, "CCCPPPCC")
    assert report.cache_mib_planned == pytest.approx(report.cache_mib, rel=0.35)
    assert not torch.equal(first, stock) and (first - stock).abs().mean() < stock.abs().mean()
    assert torch.equal(rig.sample(model), stock)

    def stop(step: int, *_: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rig.sample(patched, callback=stop)
    assert torch.equal(rig.sample(patched), first)
    assert before == {
        n: (sorted(vars(m)), list(m._forward_hooks)) for n, m in model.model.diffusion_model.named_modules()
    }


@pytest.mark.parametrize("how", [{"cfg": 2.5}, {"batch": 3}, {"denoise": 0.4}, {"sampler": "heun"}])
def test_every_way_of_sampling_begins_in_full_and_goes_on_in_part(rig: Any, model: Any, how: dict[str, Any]) -> None:
    stock = rig.sample(model, **how)
    out, report = run(rig, model, recipe(tokens=MANY), **how)
    assert report.strip.startswith("CCC") and "P" in report.strip
    assert report.notes == [] or all("sigma" in note for note in report.notes)
    assert bool(out.isfinite().all()) and (out - stock).abs().mean() < stock.abs().mean()


def test_cond_and_uncond_in_calls_of_their_own_have_their_own_lanes(rig: Any, model: Any) -> None:
    """Prompts of unequal lengths cannot share a call."""
    how = {"cfg": 2.5, "negative": rig.condition(tokens=7, seed=2)}
    out, report = run(rig, model, recipe(tokens=MANY), **how)
    assert report.strip == "CCCPPPCC"
    assert {e.lanes for e in report.evaluations} == {2}
    # At cfg 1 the same prompt alone: its own lane saw nothing of the other's.
    plain, _ = run(rig, model, recipe(tokens=MANY))
    mixed, _ = run(rig, model, recipe(tokens=MANY), cfg=1.0, negative=how["negative"])
    assert torch.equal(plain, mixed) and not torch.equal(out, plain)


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("how", [{"cfg": 2.5}, {"sampler": "heun"}])
def test_all_blocks_at_once_give_what_they_give_one_by_one(
    rig: Any, model: Any, name: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, report = run(rig, model, recipe(*INSIDE[name]), **how)
    monkeypatch.setattr("hasten.hosts.comfy_run.Run.walk", lambda *_: None)
    one_by_one, other = run(rig, model, recipe(*INSIDE[name]), **how)
    assert torch.equal(at_once, one_by_one)
    assert report.strip == other.strip


def test_what_lies_between_the_blocks_is_added_in_part_too(rig: Any, model: Any) -> None:
    """A ControlNet of constant residuals, and a forward of another pack's that adds to the image between blocks."""
    from comfyui.test_comfy_composition import controlled

    settings = recipe(tokens={**ALL, "full_first": 0}, last=False)
    positive = rig.condition(control=controlled(0.3), control_apply_to_uncond=True)
    plain, _ = run(rig, model, settings, sigmas=torch.tensor([1.0, 0.8, 0.6]))
    out, report = run(rig, model, settings, positive=positive, sigmas=torch.tensor([1.0, 0.8, 0.6]))
    stock = rig.sample(model, positive=positive, sigmas=torch.tensor([1.0, 0.8, 0.6]))
    assert report.strip == "CP"
    assert (out - stock).abs().mean() < 0.5 * (out - plain).abs().mean()

    network = model.model.diffusion_model
    network.forward_orig = network.forward_orig  # as PuLID puts its own in place, on the instance
    walks: list[int] = []
    try:
        from hasten.hosts.comfy_parts import FluxWalk

        seen = FluxWalk.__init__
        FluxWalk.__init__ = lambda *given: walks.append(1) or seen(*given)
        try:
            _, report = run(rig, model, settings, sigmas=torch.tensor([1.0, 0.8, 0.6]))
        finally:
            FluxWalk.__init__ = seen
    finally:
        del network.forward_orig
    assert (report.strip, walks) == ("CP", [])


def test_a_loras_change_of_the_mlps_shows_in_part(rig: Any, model: Any) -> None:
    keys = [f"diffusion_model.{name}.weight" for name in ("double_blocks.0.img_mlp.0", "single_blocks.1.linear1")]
    weights = model.model.state_dict()
    noise = torch.Generator().manual_seed(8)
    changes = {key: ("diff", (torch.randn(weights[key].shape, generator=noise) * 0.1,)) for key in keys}
    adapted = model.clone()
    assert sorted(adapted.add_patches(changes)) == keys
    settings, sigmas = recipe(tokens={**ALL, "full_first": 0}, last=False), torch.tensor([1.0, 0.8, 0.6])
    stock = rig.sample(adapted, sigmas=sigmas)
    out, report = run(rig, adapted, settings, sigmas=sigmas)
    without, _ = run(rig, model, settings, sigmas=sigmas)
    assert report.strip == "CP"
    assert (out - stock).abs().mean() < 0.5 * (out - without).abs().mean()


def test_split_sigmas_begin_afresh_in_the_middle(rig: Any, model: Any) -> None:
    sigmas = torch.linspace(1.0, 0.0, 13)
    _, report = run(rig, model, recipe(tokens=MANY), sigmas=sigmas[6:])
    assert report.strip == "CCCPPC"


def test_fresh_ratio_1_recomputes_the_mlps_with_the_attention_of_before(rig: Any, model: Any) -> None:
    """Against stock blocks whose attention gives out what it gave at the full evaluation before."""
    sigmas = torch.tensor([1.0, 0.8, 0.6])
    out, report = run(rig, model, recipe(tokens={**ALL, "full_first": 0}, last=False), sigmas=sigmas)
    assert report.strip == "CP"
    held: list[torch.Tensor] = []
    calls = [0]

    def override(func: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] <= 6:  # 2 double and 4 single blocks
            held.append(func(*args, **kwargs))
            return held[-1]
        return held[calls[0] - 7]

    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    expected = rig.sample(clone, sigmas=sigmas)
    if calls[0] != 12:
        pytest.skip("this ComfyUI has no optimized_attention_override")
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_the_mlps_half_is_the_hosts_own_layer_on_a_view(model: Any) -> None:
    linear, hidden = model.model.diffusion_model.single_blocks[0].linear1, 3 * 64
    rows = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlp_half(linear, rows, hidden), linear(rows)[..., hidden:])
    seen: list[int] = []
    linear.forward = lambda x, inner=linear.forward: (seen.append(x.shape[0]), inner(x))[1]
    linear.weight_function = [lambda weight: weight * 2.0]
    try:  # a patch that is worked in as the weight is cast takes the whole weight
        assert mlp_half(linear, rows, hidden).shape == (2, 5, 256)
    finally:
        linear.weight_function = []
        del linear.forward
    assert seen == [2]


def test_a_block_that_another_pack_replaces_is_computed_in_full(rig: Any, model: Any) -> None:
    clone = model.clone()
    clone.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 1)
    stock = rig.sample(clone)
    out, report = run(rig, clone, recipe(tokens=MANY))
    assert torch.equal(out, stock)
    assert report.strip == "C" * 8
    assert any("another patch is in a block's place" in note for note in report.notes)


def test_sparse_attention_leaves_steps_in_part_as_they_are(
    rig: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rig.overrides_attention():
        pytest.skip("this ComfyUI takes no other attention")

    def attend(keep: float, text_rows: int, **others: Any) -> Any:
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v) * keep

    monkeypatch.setitem(BACKENDS, "sparse", Backend("sparse", "the test's", SPARSE, lambda ask: None, attend(0.5, 0)))
    monkeypatch.setattr(attention, "sparse", attend)
    names = comfy_sparge.block_names(model.model.diffusion_model)
    wanted = recipe(tokens=MANY)
    _, alone = run(rig, model, wanted)
    before, report = run(rig, comfy_sparge.put_sparge(model, names), wanted)
    assert report.strip == alone.strip and "P" in report.strip and report.notes == alone.notes
    after = comfy_sparge.put_sparge(comfy.put_recipe(model, wanted), names)
    assert torch.equal(rig.sample(after), before) and comfy.reports_of(after)[-1].strip == alone.strip
    assert not torch.equal(before, run(rig, model, wanted)[0])


def test_bad_input_is_one_line_and_the_model_unchanged(toca: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(comfy, "tell", lambda node, text: said.append(text))
    assert toca.execute(model, ratio=1.5)[0] is model
    assert said.pop() == "left as it is: tokens.ratio is 1.5: a number from 0.0 to 1.0 is allowed."
    assert toca.execute(model, interval=0)[0] is model
    assert said.pop().startswith("left as it is: cache.every is 0")


def test_blocks_without_an_mlp_to_split_are_left_as_they_are(rig: Any, model: Any) -> None:
    stock = rig.sample(model)
    block = model.model.diffusion_model.single_blocks[0]
    block.yak_mlp, before = True, getattr(block, "yak_mlp", None)
    try:
        with pytest.raises(ValueError, match="sends tokens through each block's MLP"):
            make_plan(recipe(), anatomy_of(model.model.diffusion_model))
    finally:
        block.yak_mlp = bool(before)
    assert torch.equal(rig.sample(model), stock)
