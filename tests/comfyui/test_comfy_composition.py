"""What people combine, in the real ComfyUI: samplers, ControlNet, LoRA, masks, other packs, core's own nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.attention_backends import BACKENDS, Backend
from hasten.hosts import comfy as host
from hasten.hosts import comfy_attention, comfy_compile, comfy_lines, comfy_quantize
from hasten.recipe import Recipe

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("default")]


def recipe(method: str, skip: Any = None, **cache: Any) -> Recipe:
    return Recipe.from_dict({"schema": 1, "cache": {"method": method, **cache}, "skip": skip or {}})


NEVER = recipe("fbcache", threshold=0.0)
OFTEN = recipe("interval", every=2)
WHOLE = recipe("easycache", threshold=0.3)


def run(rig: Any, model: Any, wanted: Recipe, **how: Any) -> tuple[torch.Tensor, Any]:
    patched = host.put_recipe(model, wanted)
    out = rig.sample(patched, **how)
    return out, host.reports_of(patched)[-1]


def agrees(rig: Any, model: Any, **how: Any) -> None:
    """Always-compute equals stock bit for bit, and with reuse the result stays near."""
    stock = rig.sample(model, **how)
    exact, report = run(rig, model, NEVER, **how)
    assert report.reused == 0
    assert torch.equal(exact, stock)
    for wanted in (OFTEN, WHOLE):
        near, report = run(rig, model, wanted, **how)
        assert report.reused >= 1, report
        assert (near - stock).abs().mean() < 0.5 * stock.abs().mean()


EVALUATIONS = {
    "euler": 8, "heun": 15, "dpm_2": 15, "dpmpp_2m": 8, "dpmpp_sde": 15, "uni_pc": 8, "res_multistep": 8,
}  # fmt: skip


@pytest.mark.parametrize("sampler", EVALUATIONS)
def test_every_sampler(rig: Any, model: Any, sampler: str) -> None:
    stock = rig.sample(model, sampler=sampler)
    exact, report = run(rig, model, NEVER, sampler=sampler)
    assert torch.equal(exact, stock)
    assert len(report.evaluations) == EVALUATIONS[sampler]
    near, report = run(rig, model, OFTEN, sampler=sampler)
    assert len(report.evaluations) == EVALUATIONS[sampler]
    assert report.reused >= 2
    assert torch.isfinite(near).all()
    assert not any("afresh" in note for note in report.notes)


def test_split_sigmas_are_two_runs(rig: Any, model: Any) -> None:
    sigmas = torch.linspace(1.0, 0.0, 9)
    patched = host.put_recipe(model, NEVER)
    for part in (sigmas[:5], sigmas[4:]):
        assert torch.equal(rig.sample(patched, sigmas=part), rig.sample(model, sigmas=part))
    assert [len(report.evaluations) for report in host.reports_of(patched)] == [4, 4]


def test_image_to_image_begins_late(rig: Any, model: Any) -> None:
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    agrees(rig, model, latent=latent, denoise=0.6)


def test_inpainting_with_a_mask(rig: Any, model: Any) -> None:
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1.0
    agrees(rig, model, latent=latent, mask=mask)


def test_a_fill_models_concatenated_channels(rig: Any) -> None:
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    more = {"concat_latent_image": latent, "concat_mask": torch.ones(1, 1, 64, 64)}
    agrees(rig, rig.tiny_model(in_channels=96), positive=rig.condition(**more))


def test_reference_latents(rig: Any, model: Any) -> None:
    reference = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4))
    agrees(rig, model, positive=rig.condition(reference_latents=[reference]))


def test_batch_of_four_with_guidance(rig: Any, model: Any) -> None:
    agrees(rig, model, batch=4, cfg=2.5)


def test_another_patch_that_changes_the_number_of_image_tokens(rig: Any, model: Any) -> None:
    """Some packs append reference tokens, and drop them later in the run: what was kept of the others is forgotten."""
    calls = []

    def references(given: dict[str, Any]) -> dict[str, Any]:
        calls.append(1)
        if len(calls) % 8 not in (1, 2, 3):
            return given
        return {**given, "img": torch.cat([given["img"], given["img"][:, :4]], dim=1),
                "img_ids": torch.cat([given["img_ids"], given["img_ids"][:, :4]], dim=1)}  # fmt: skip

    patched = model.clone()
    if not hasattr(patched, "set_model_post_input_patch"):
        pytest.skip("this ComfyUI has no post_input patches")
    patched.set_model_post_input_patch(references)
    stock = rig.sample(patched)
    for method in ("fbcache", "mbcache", "teacache", "interval"):
        more = {"every": 2} if method == "interval" else {"threshold": 0.5}
        exact, _ = run(rig, patched, recipe(method, every=1) if method == "interval" else recipe(method, threshold=0.0))
        assert torch.equal(exact, stock), method
        near, report = run(rig, patched, recipe(method, **more))
        assert "the number of image tokens changed: computed afresh from there" in report.notes
        assert report.reused >= 1
        assert torch.isfinite(near).all()


def controlled(strength: float) -> Any:
    """A ControlNet that adds to double and single blocks, as FLUX's union ControlNets do."""
    from comfy.controlnet import ControlBase

    class Control(ControlBase):  # type: ignore[misc]
        def get_control(self, x_noisy: Any, *rest: Any) -> Any:
            tokens = x_noisy.shape[-1] * x_noisy.shape[-2] // 4
            add = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(9)) * strength
            add = add.expand(x_noisy.shape[0], -1, -1)
            return {"input": [add, add], "output": [add, None, add, add]}

        def copy(self) -> Any:
            return self

        def get_models(self) -> list[Any]:
            return []

    return Control()


def test_a_controlnets_residuals(rig: Any, model: Any) -> None:
    agrees(rig, model, positive=rig.condition(control=controlled(0.3), control_apply_to_uncond=True))


def test_a_controlnets_residuals_count_once(rig: Any, model: Any) -> None:
    """At one and the same input a held step gives what the computed one gave, to the small change of sigma."""
    import comfy.samplers

    seen: list[torch.Tensor] = []

    def still(net: Any, x: torch.Tensor, sigmas: Any, extra_args: Any = None, **_: Any) -> torch.Tensor:
        ones = x.new_ones([x.shape[0]])
        seen.extend(net(x, sigma * ones, **(extra_args or {})) for sigma in sigmas[:-1])
        return x

    for wanted in (recipe("interval", every=3, last=False), recipe("fbcache", threshold=0.5, last=False)):
        seen.clear()
        patched = host.put_recipe(model, wanted)
        guider = comfy.samplers.CFGGuider(patched)
        positive = rig.condition(control=controlled(2.0), control_apply_to_uncond=True)
        guider.set_conds(positive, positive)
        guider.set_cfg(1.0)
        noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
        sigmas = torch.tensor([0.5, 0.4998, 0.4996, 0.0])
        guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(still), sigmas, disable_pbar=True)
        assert host.reports_of(patched)[-1].strip == "C.."
        assert (seen[1] - seen[0]).abs().max() < 0.01 * seen[0].abs().max()


KEY = "diffusion_model.double_blocks.0.img_attn.qkv.weight"


def with_lora(model: Any) -> Any:
    """A clone with one matrix changed, as LoraLoader does it."""
    change = torch.randn(192, 64, generator=torch.Generator().manual_seed(8)) * 0.05
    new = model.clone()
    assert new.add_patches({KEY: ("diff", (change,))}) == [KEY]
    return new


@pytest.mark.parametrize("first", ["lora", "ours"])
def test_a_lora_before_or_after(rig: Any, model: Any, first: str) -> None:
    without = rig.sample(model)
    alone = rig.sample(with_lora(model))
    assert not torch.equal(alone, without)
    for wanted in (NEVER, OFTEN):
        patched = host.put_recipe(with_lora(model), wanted) if first == "lora" else with_lora(
            host.put_recipe(model, wanted)
        )  # fmt: skip
        out = rig.sample(patched)
        if wanted is NEVER:
            assert torch.equal(out, alone)
        else:
            assert host.reports_of(patched)[-1].reused >= 1
            assert (out - alone).abs().mean() < 0.5 * alone.abs().mean()


def test_low_vram_offload(rig: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most layers stay on the offload device and are cast as they are used, a LoRA among them."""
    import comfy.model_management as management

    load = type(model).load

    def partly(self: Any, device_to: Any = None, lowvram_model_memory: float = 0, **how: Any) -> Any:
        half = self.model_size() // 2
        return load(self, device_to, lowvram_model_memory=half, **{**how, "full_load": False})

    monkeypatch.setattr(type(model), "load", partly)
    agrees(rig, model)
    assert model.model.model_lowvram
    agrees(rig, with_lora(model))
    monkeypatch.undo()
    management.unload_all_models()


def test_another_packs_block_patch_and_attention_are_kept(rig: Any, model: Any) -> None:
    blocks, attended = [], []

    def theirs(args: Any, extra: Any) -> Any:
        blocks.append(1)
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 0.97}

    def attention(func: Any, *args: Any, **kwargs: Any) -> Any:
        attended.append(1)
        return func(*args, **kwargs)

    foreign = model.clone()
    foreign.set_model_patch_replace(theirs, "dit", "double_block", 1)
    foreign.model_options["transformer_options"]["optimized_attention_override"] = attention
    alone = rig.sample(foreign)
    computed = (len(blocks), len(attended))
    exact, _ = run(rig, foreign, NEVER)
    assert torch.equal(exact, alone)
    assert (len(blocks), len(attended)) == (2 * computed[0], 2 * computed[1])
    _, report = run(rig, foreign, OFTEN)
    assert len(blocks) - 2 * computed[0] == report.computed


def test_another_packs_patch_that_comes_after_ours_in_the_graph(rig: Any, model: Any) -> None:
    def theirs(args: Any, extra: Any) -> Any:
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 0.97}

    alone = model.clone()
    alone.set_model_patch_replace(theirs, "dit", "single_block", 2)
    after = host.put_recipe(model, NEVER)
    after.set_model_patch_replace(theirs, "dit", "single_block", 2)
    assert torch.equal(rig.sample(after), rig.sample(alone))


def test_our_attention_is_chained_onto_another_packs(rig: Any, model: Any) -> None:
    attended = []

    def theirs(func: Any, *args: Any, **kwargs: Any) -> Any:
        attended.append(1)
        return func(*args, **kwargs)

    foreign = model.clone()
    foreign.model_options["transformer_options"]["optimized_attention_override"] = theirs
    both = comfy_attention.put_attention(foreign, "sdpa")
    assert torch.allclose(rig.sample(both), rig.sample(model), atol=1e-4)
    taken = len(attended)
    rig.sample(comfy_attention.drop_attention(both))
    assert taken == 0 and (len(attended) > 0) == rig.overrides_attention()


def test_our_attention_is_near_cores(rig: Any, model: Any) -> None:
    stock = rig.sample(model)
    ours = rig.sample(comfy_attention.put_attention(model, "sdpa"))
    assert torch.allclose(ours, stock, atol=1e-4)
    both = host.put_recipe(comfy_attention.put_attention(model, "sdpa"), NEVER)
    assert torch.equal(rig.sample(both), ours)


def test_a_back_end_that_cannot_be_used_leaves_the_picture_and_says_why(
    rig: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not rig.overrides_attention():
        pytest.skip("this ComfyUI takes no other attention")
    stock = rig.sample(model)
    said: list[str] = []
    monkeypatch.setattr(comfy_lines, "tell", lambda node, text: said.append(text))
    for backend in ("sageattention", "int8_fp8", "sparse"):
        put = comfy_attention.put_attention(model, backend)
        told = comfy_lines.put_line(put, "attention", f"attention {backend}", node="1", title="t", counts=True)
        assert torch.equal(rig.sample(told), stock)
        assert "took 0 of 48 calls" in said[-1] and "needs an NVIDIA GPU" in said[-1]


def test_a_back_end_takes_one_models_calls_and_no_others(rig: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not rig.overrides_attention():
        pytest.skip("this ComfyUI takes no other attention")
    calls: list[tuple[int, ...]] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(q.shape))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v) * 1.01

    monkeypatch.setitem(BACKENDS, "int8", Backend("int8", "of the test", 0.03, lambda ask: None, attend))
    stock = rig.sample(model)
    eight = comfy_attention.put_attention(model, "int8")
    assert not torch.equal(rig.sample(eight), stock)
    assert calls and all(shape[0] >= 1 and len(shape) == 4 for shape in calls)
    calls.clear()
    assert torch.equal(rig.sample(model), stock)
    assert torch.equal(rig.sample(comfy_attention.drop_attention(eight)), stock)
    assert not calls


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_cores_own_cache_stays_in_charge(rig: Any, model: Any, name: str) -> None:
    node = getattr(rig.extra_node("nodes_easycache"), f"{name}Node")
    core = node.execute(model, 0.2, 0.15, 0.95, False)[0]
    alone = rig.sample(core)
    patched = host.put_recipe(core, OFTEN)
    assert torch.equal(rig.sample(patched), alone)
    assert f"{name} node is in charge" in host.reports_of(patched)[-1].notes[0]
    # The other way round, too: core's wrappers come after ours.
    other = node.execute(host.put_recipe(model, OFTEN), 0.2, 0.15, 0.95, False)[0]
    assert torch.equal(rig.sample(other), alone)


def test_weights_of_another_kind_are_never_touched(rig: Any) -> None:
    import comfy.ops

    class Ops(comfy.ops.manual_cast):  # type: ignore[misc]
        """8-bit weights, as GGUF-like packs have them: cast when they are used."""

        class Linear(comfy.ops.manual_cast.Linear):  # type: ignore[misc]
            def forward_comfy_cast_weights(self, x: Any) -> Any:
                scale = self.weight.abs().amax() / 127
                return torch.nn.functional.linear(x, (self.weight / scale).round() * scale, self.bias)

    agrees(rig, rig.tiny_model(ops=Ops))


def test_weights_in_fp8(rig: Any) -> None:
    model = rig.tiny_model(dtype=torch.float8_e4m3fn)
    before = {name: weight.clone() for name, weight in model.model.diffusion_model.named_parameters()}
    assert before["single_blocks.0.linear1.weight"].dtype == torch.float8_e4m3fn
    agrees(rig, model)
    for name, weight in model.model.diffusion_model.named_parameters():
        assert torch.equal(weight.view(torch.uint8), before[name].view(torch.uint8)), name


def test_several_models_in_one_graph(rig: Any) -> None:
    one, other = rig.tiny_model(), rig.tiny_model(seed=5, double=3, single=2)
    stock = [rig.sample(one), rig.sample(other)]
    patched = [host.put_recipe(one, NEVER), host.put_recipe(other, NEVER)]
    for model, out in zip(patched * 2, stock * 2, strict=True):
        assert torch.equal(rig.sample(model), out)


def test_an_unknown_family_passes_through(rig: Any) -> None:
    model = rig.tiny_model()
    network = model.model.diffusion_model
    kept = {k: v for k, v in vars(type(network)).items() if k not in ("__dict__", "__weakref__", "__init__")}
    stock = rig.sample(model)
    network.__class__ = type("Lumina", (torch.nn.Module,), kept)
    patched = host.put_recipe(model, OFTEN)
    assert torch.equal(rig.sample(patched), stock)
    assert (
        host.reports_of(patched)[-1].line().endswith("Lumina is a family that is not known here (FLUX.1 and Sana are)")
    )


def test_skipped_blocks_that_are_not_there(rig: Any, model: Any) -> None:
    out, report = run(rig, model, recipe("none", {"double": [1, 3, 6, 8, 12]}))
    assert report.notes == ["this model has 2 double blocks: 3, 6, 8, 12 on the skip list not found"]
    assert not torch.equal(out, rig.sample(model))


def test_bypass_undoes_everything_at_once(rig: Any, model: Any) -> None:
    """The stack that people build; the same model without it is stock again, run after run."""
    stock = rig.sample(model)
    stack = host.put_recipe(comfy_attention.put_attention(with_lora(model), "sdpa"), OFTEN)
    first = rig.sample(stack)
    assert torch.equal(rig.sample(model), stock)
    assert torch.equal(rig.sample(stack), first)
    assert torch.equal(rig.sample(model), stock)


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["core before", "core after", "ours before", "ours after"])
def test_compiled_before_or_after(rig: Any, model: Any, whose: str) -> None:
    def compiled(m: Any) -> Any:
        if whose.startswith("ours"):
            return comfy_compile.compile_blocks(m, backend="eager")[0]
        # Not inductor, which takes minutes here: what matters is who compiles what, and around what.
        return rig.extra_node("nodes_torch_compile").TorchCompileModel.execute(m, "eager")[0]

    torch._dynamo.reset()
    for wanted in (NEVER, OFTEN):
        plain, first = run(rig, model, wanted)
        both = compiled(host.put_recipe(model, wanted)) if whose.endswith("after") else host.put_recipe(
            compiled(model), wanted
        )  # fmt: skip
        assert torch.allclose(rig.sample(both), plain, atol=1e-5)
        report = host.reports_of(both)[-1]
        assert report.strip == first.strip
        assert ("compiled block by block instead of as a whole" in report.notes) == whose.startswith("core")
    network = model.model.diffusion_model
    assert not hasattr(network, "_orig_mod")
    assert not any(hasattr(block, "_orig_mod") for block in [*network.double_blocks, *network.single_blocks])


def test_two_compile_nodes_behind_one_recipe_get_what_each_asks_for(rig: Any, model: Any) -> None:
    torch._dynamo.reset()
    ours, compile_whole = host.put_recipe(model, NEVER), rig.extra_node("nodes_torch_compile").TorchCompileModel.execute
    made: list[str] = []

    def backend(name: str) -> str:
        def compiled(graph: Any, inputs: Any, **options: Any) -> Any:
            made.append(name)
            return graph.forward

        torch._dynamo.register_backend(compiled, name=name)
        return name

    for name in (backend("hasten_one"), backend("hasten_two")):
        rig.sample(compile_whole(ours, name)[0])
        assert name in made
    torch._dynamo.reset()


def test_recipes_are_not_seen_by_a_model_beside(rig: Any, model: Any) -> None:
    stock = rig.sample(model)
    beside = model.clone()
    rig.sample(host.put_recipe(model, OFTEN))
    assert torch.equal(rig.sample(beside), stock)


def test_a_quantised_clone_is_near_and_leaves_the_model_alone(rig: Any) -> None:
    model = rig.tiny_model()
    stock = rig.sample(model)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    with_a_lora = rig.sample(with_lora(model))
    quantised, words = comfy_quantize.quantise_model(model)
    assert words == "24 layers of the model are kept in int8"
    found = rig.sample(quantised)
    assert 0.0 < float((found - stock).norm() / stock.norm()) < 0.02
    # A LoRA is heard before the node and after it; turns are taken in every order, and nothing is left behind.
    behind, merged = with_lora(quantised), comfy_quantize.quantise_model(with_lora(model))[0]
    for turn in (merged, behind, with_lora(model), merged, model, behind, quantised, with_lora(model), model):
        out = rig.sample(turn)
        if turn is model:
            assert torch.equal(out, stock)
        elif turn is quantised:
            assert torch.equal(out, found)
        else:
            assert float((out - with_a_lora).norm() / with_a_lora.norm()) < 0.02
    assert all(torch.equal(before[name], tensor) for name, tensor in model.model.state_dict().items())
    # While a LoRA's weights are in the model, the ones without are quantised.
    rig.sample(with_lora(model))
    assert torch.equal(rig.sample(comfy_quantize.quantise_model(model)[0]), found)
    assert torch.equal(rig.sample(host.put_recipe(quantised, NEVER)), found)
    assert comfy_quantize.quantise_model(quantised)[1].startswith("this model has no layers to quantise")
    assert torch.equal(rig.sample(model), stock)


def test_a_lora_of_single_conditions_is_the_same_each_time_it_is_put_into_8_bits(rig: Any) -> None:
    import comfy.hooks
    import comfy.model_management

    model = comfy_quantize.quantise_model(rig.tiny_model())[0].clone()
    comfy.model_management.load_models_gpu([model])
    hooks = comfy.hooks.create_hook_lora({}, 1.0, 0.0)
    change = torch.randn(192, 64, generator=torch.Generator().manual_seed(8)) * 0.05
    model.add_hook_patches(hooks.hooks[0], {KEY: ("diff", (change,))})
    layer = model.get_model_object(KEY.removesuffix(".weight"))
    seen = []
    for wanted in (hooks, None, hooks, None):
        model.patch_hooks(wanted)
        seen.append(layer.weight.clone())
    model.clean_hooks()
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])


def test_a_quantised_clone_is_compiled_block_by_block(rig: Any) -> None:
    model = rig.tiny_model()
    quantised, _ = comfy_quantize.quantise_model(model)
    plain = rig.sample(quantised)
    compiled, said = comfy_compile.compile_blocks(quantised, backend="eager")
    assert "blocks are compiled" in said
    assert float((rig.sample(compiled) - plain).norm() / plain.norm()) < 1e-3


def test_a_model_quantised_as_it_is_loaded(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.sd

    from hasten.hosts import comfy_sana_nodes
    from hasten.hosts.comfy_compile_nodes import LoadDiffusionModel8Bit as Node

    plain, said = rig.tiny_model(), []
    stock, with_a_lora = rig.sample(plain), rig.sample(with_lora(plain))
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", lambda path: rig.tiny_model())
    monkeypatch.setattr(comfy_sana_nodes._folders(), "get_full_path_or_raise", lambda kind, name: name)
    monkeypatch.setattr(host, "tell", lambda node, text: said.append(text))
    model = Node.execute("flux.safetensors")[0]
    assert said.pop() == "24 layers of the model are kept in int8"
    found = rig.sample(model)
    assert 0.0 < float((found - stock).norm() / stock.norm()) < 0.02
    assert model.model_size() < 0.6 * plain.model_size()
    lora = rig.sample(with_lora(model))
    assert float((lora - with_a_lora).norm() / with_a_lora.norm()) < 0.02
    assert torch.equal(rig.sample(model), found)
    left = Node.execute("flux.safetensors", "fp8")[0]
    assert said.pop().startswith("left as it is: quantize.format is fp8")
    assert torch.equal(rig.sample(left), stock)
