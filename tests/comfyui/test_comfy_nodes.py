"""The nodes in the real ComfyUI: their schema, bad input, flux-nano, and parity with diffusers."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import hasten
from hasten import attention
from hasten.attention_backends import BACKENDS, SPARSE, Backend
from hasten.hosts import comfy as host
from hasten.hosts import comfy_compile, comfy_lines, comfy_sparge
from hasten.recipe import Recipe
from hasten.sparse import Heads, load_settings, save_settings

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).resolve().parents[2]
FLUX_NANO = Path(os.environ.get("FLUX_NANO") or ROOT / "models" / "flux-nano")

# The original pack's nodes: inputs in order with their defaults (original ComfyUI-Lightning 1.3.3).
SKIPS: dict[str, Any] = {"skip_DoubleStreamBlocks": "3,6,8,12", "skip_SingleStreamBlocks": ""}
LIMITS: dict[str, Any] = {"start": 0.0, "end": 1.0, "max_consecutive_cache_hits": -1}
ORIGINAL: dict[str, dict[str, Any]] = {
    "ApplyTeaCacheAndSkipBlocks": {"model": None, **SKIPS, "do_teacache": True, "rel_l1_threshold": 0.4},
    "ApplyFBCacheAndSkipBlocks": {"model": None, **SKIPS, "fbcache_threshold": 0.25, **LIMITS},
    "ApplyMBCacheAndSkipBlocks": {
        "model": None, **SKIPS, "default_cache_threshold": 0.25, "dsb_cache_thresholds": "", **LIMITS,
    },
    "ApplySageAttention": {"model": None, "use_SageAttention": True},
    "ApplyFastCuDNNKernels": {"model": None, "switch": True, "float32_matmul_precision": None},
    "ApplySpargeAttn": {
        "model": None, "l1": 0.06, "pv_l1": 0.065, "enable_tuning_mode": False, "parallel_tuning": False,
        "tuned_hyperparams": None, **SKIPS,
    },
    "SaveSpargeAttnHyperparams": {"model": None, "filename_prefix": "spargeattn_hyperparams"},
    "CompileAndQuantizeModel": {
        "model": None, "vae": None, "do_compile": True, "dynamic": False, "fullgraph": False, "backend": "inductor",
        "quantize_model": False,  # ours, at the end: saved widgets keep their order
    },
}  # fmt: skip


@pytest.fixture
def nodes(rig: Any) -> dict[str, Any]:
    from hasten.hosts import comfy_nodes

    listed = asyncio.run(comfy_nodes.extension().get_node_list())
    return {node.GET_SCHEMA().node_id: node for node in listed}


def test_every_original_node_keeps_its_inputs(nodes: dict[str, Any]) -> None:
    for name, inputs in ORIGINAL.items():
        schema = nodes[name].GET_SCHEMA()
        assert schema.category == "Lightning"
        assert {i.id: getattr(i, "default", None) for i in schema.inputs} == inputs
        assert [i.id for i in schema.inputs] == list(inputs)


def test_every_node_has_help_tooltips_and_both_languages(nodes: dict[str, Any]) -> None:
    for language in ("en", "zh"):
        file = ROOT / "locales" / language / "nodeDefs.json"
        texts = json.loads(file.read_text(encoding="utf-8"))
        assert set(texts) == set(nodes)
        for name, node in nodes.items():
            inputs = {i.id for i in node.GET_SCHEMA().inputs}
            assert set(texts[name].get("inputs", {})) == inputs, (language, name)
    for name, node in nodes.items():
        assert (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8").startswith("# ")
        assert node.GET_SCHEMA().description
        assert all(i.tooltip for i in node.GET_SCHEMA().inputs)


def test_bad_input_is_one_line_on_the_node_and_the_model_unchanged(
    nodes: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(host, "tell", lambda node, text: said.append(text))
    for name in ("ApplyTeaCacheAndSkipBlocks", "ApplyFBCacheAndSkipBlocks", "ApplyMBCacheAndSkipBlocks"):
        given = {**ORIGINAL[name], "model": model, "skip_DoubleStreamBlocks": "3,,x"}
        assert nodes[name].execute(**given)[0] is model
        assert said.pop().startswith("left as it is: skip_DoubleStreamBlocks is '3,,x' and holds an empty entry")
    assert nodes["ApplySageAttention"].execute(model, True)[0] is model
    assert said.pop() == "left as it is: 8-bit attention needs an NVIDIA GPU"
    assert nodes["Lightning"].execute(model, "balanced", -1.0, {"schema": 1, "cach": {}})[0] is model
    assert "unknown key 'cach'" in said.pop()


@pytest.mark.parametrize("name", ["junk.safetensors", "junk.pth"])
def test_a_damaged_file_is_named(nodes: dict[str, Any], rig: Any, name: str, tmp_path: Path) -> None:
    from hasten.hosts.comfy_sana_nodes import _folders

    _folders().add_model_folder_path("diffusion_models", str(tmp_path))
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=rf"^{name} cannot be read \(.*\): download it again\.$"):
        nodes["LoadDiffusionModel8Bit"].execute(name)


def test_original_nodes_run_and_report(nodes: dict[str, Any], rig: Any, model: Any) -> None:
    for name, more in (
        ("ApplyTeaCacheAndSkipBlocks", {"rel_l1_threshold": 0.6}),
        ("ApplyFBCacheAndSkipBlocks", {"fbcache_threshold": 0.5}),
        ("ApplyMBCacheAndSkipBlocks", {"default_cache_threshold": 0.5}),
    ):
        patched = nodes[name].execute(**{**ORIGINAL[name], "model": model, **more})[0]
        samples = rig.sample(patched)
        assert host.reports_of(patched)[-1].reused >= 2, name
        text, strip = nodes["LightningReport"].execute(patched, {"samples": samples}).args
        assert text.startswith("computed ")
        assert strip.shape[-1] == 3


def test_attention_and_compile_say_what_they_did(
    nodes: dict[str, Any], rig: Any, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(host, "tell", lambda node, text: said.append(text))
    monkeypatch.setattr(comfy_lines, "tell", lambda node, text: said.append(text))
    attended = nodes["LightningAttention"].execute(model, "sdpa")[0]
    if not rig.overrides_attention():
        assert attended is model
        assert said == ["left as it is: this ComfyUI takes no other attention (0.3.60 and newer do)"]
        return
    rig.sample(attended)
    assert said[-1].startswith("attention sdpa · took 48 of 48 calls by sdpa · sampling took ")
    compiled = nodes["LightningCompile"].execute(model, True, "eager")[0]
    rig.sample(compiled)
    assert said[-1].startswith("6 blocks are compiled as they first run (eager) · sampling took ")
    fast = nodes["ApplyFastCuDNNKernels"].execute(model, True, "high")[0]
    rig.sample(fast)
    assert said[-1].startswith("float32 products at 'high', cuDNN looks for its fastest kernels")
    # The cache's line names the attention in charge, whichever node comes first.
    for order in ((("LightningAttention", ("sdpa",)), ("Lightning", ("balanced",))),
                  (("Lightning", ("balanced",)), ("LightningAttention", ("sdpa",)))):  # fmt: skip
        said.clear()
        both = model
        for name, values in order:
            both = nodes[name].execute(both, *values)[0]
        rig.sample(both)
        assert any(text.startswith("computed ") and text.endswith("attention sdpa") for text in said)


def test_spargeattn_tunes_saves_and_loads_in_one_workflow(
    nodes: dict[str, Any], rig: Any, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not rig.overrides_attention():
        pytest.skip("this ComfyUI takes no other attention")
    from hasten.hosts.comfy_sana_nodes import _folders

    folder_paths = _folders()
    said: list[str] = []
    monkeypatch.setattr(host, "tell", lambda node, text: said.append(text))
    monkeypatch.setattr(comfy_lines, "tell", lambda node, text: said.append(text))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path / "temp"))
    given = {**ORIGINAL["ApplySpargeAttn"], "model": model, "tuned_hyperparams": "None"}
    given["skip_DoubleStreamBlocks"] = "1"
    stock = rig.sample(model)
    assert nodes["ApplySpargeAttn"].execute(**given)[0] is model
    assert said.pop() == "left as it is: sparse attention needs an NVIDIA GPU"
    assert nodes["ApplySpargeAttn"].execute(**{**given, "enable_tuning_mode": True, "pv_l1": 0.01})[0] is model
    assert "pv_l1 must be above l1" in said.pop()
    tuned = nodes["ApplySpargeAttn"].execute(**{**given, "enable_tuning_mode": True})[0]
    nodes["SaveSpargeAttnHyperparams"].execute(tuned, "mine")
    assert said[-1].startswith("nothing was tuned yet")
    assert torch.equal(rig.sample(tuned), stock)
    files = list(tmp_path.glob("mine_*.safetensors"))
    assert len(files) == 1
    settings = load_settings(files[0])
    assert "double_blocks.0" in settings and "double_blocks.1" not in settings and "single_blocks.3" in settings
    nodes["SaveSpargeAttnHyperparams"].execute(tuned, "mine")
    assert "dense is faster here" in said[-1] and "calls are left: queue it again" in said[-1]
    nodes["SaveSpargeAttnHyperparams"].execute(model, "mine")
    assert said[-1].startswith("nothing to save")
    assert torch.equal(rig.sample(model), stock)


@pytest.fixture
def sparse(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A back-end `sparse` for the CPU, whose results are a little smaller than they should be."""
    if not rig.overrides_attention():
        pytest.skip("this ComfyUI takes no other attention")

    def attend(keep: float, text_rows: int, heads: Any = None, **others: Any) -> Any:
        share = keep if heads is None else heads[0].reshape(1, -1, 1, 1)
        return lambda q, k, v: scaled_dot_product_attention(q, k, v) * share

    monkeypatch.setitem(BACKENDS, "sparse", Backend("sparse", "the test's", SPARSE, lambda ask: None, attend(0.5, 0)))
    monkeypatch.setattr(attention, "sparse", attend)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What nodes said."""
    said: list[str] = []
    for module in (host, comfy_lines, comfy_sparge):
        monkeypatch.setattr(module, "tell", lambda node, text: said.append(text))
    return said


def tuned(names: list[str], heads: int) -> dict[str, Heads]:
    return {name: Heads(*(torch.full((heads,), n) for n in (True, 0.9, 0.0, 20.0))) for name in names}


def test_tuned_files_of_other_models_are_refused_in_a_sentence(
    nodes: dict[str, Any], rig: Any, model: Any, sparse: None, said: list[str], tmp_path: Path
) -> None:
    from hasten.hosts.comfy_sana_nodes import _folders

    _folders().add_model_folder_path("checkpoints", str(tmp_path))
    network = model.model.diffusion_model
    names, heads = comfy_sparge.block_names(network), network.params.num_heads
    files = {
        "mine": (tuned(names, heads), None),
        "fewer": (tuned(names[:2], heads), None),
        "heads": (tuned(names, heads + 1), "double_blocks.0 has 3 heads, 2 heads are expected"),
        "bigger": (tuned([*names, "single_blocks.9"], heads), "keys do not match, such as single_blocks.9"),
    }
    for name, (settings, _) in files.items():
        save_settings(settings, tmp_path / f"{name}.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"nothing of the kind")
    refusals = {name: words for name, (_, words) in files.items() if words} | {"junk": "cannot be read"}
    given = {**ORIGINAL["ApplySpargeAttn"], "model": model, "tuned_hyperparams": "None"}
    given["skip_DoubleStreamBlocks"] = "9"  # a block that is not there
    stock = rig.sample(model)
    for name, words in (*refusals.items(), ("gone", "not found")):
        assert nodes["ApplySpargeAttn"].execute(**{**given, "tuned_hyperparams": f"{name}.safetensors"})[0] is model
        assert said[-1].startswith("left as it is: ") and words in said[-1] and "\n" not in said[-1]
    drawn = {}
    for name, calls in (("mine", 48), ("fewer", 16)):
        own = nodes["ApplySpargeAttn"].execute(**{**given, "tuned_hyperparams": f"{name}.safetensors"})[0]
        drawn[name] = rig.sample(own)
        assert said[-1].startswith(
            f"attention sparse in {calls // 8} of 6 blocks, {name}.safetensors · took {calls} of 48"
        )
    assert not torch.equal(drawn["mine"], drawn["fewer"]) and not torch.equal(drawn["mine"], stock)
    # A second node in the first one's place has its own blocks alone; without either the picture is stock's.
    both = nodes["ApplySpargeAttn"].execute(**{**given, "model": own, "skip_DoubleStreamBlocks": "0"})[0]
    only = nodes["ApplySpargeAttn"].execute(**{**given, "skip_DoubleStreamBlocks": "0"})[0]
    assert torch.equal(rig.sample(both), rig.sample(only))
    unchanged = nodes["LightningAttention"].execute(both, "unchanged")[0]
    assert unchanged.model_options["transformer_options"].get("patches_replace", {}).get("dit", {}) == {}
    assert torch.equal(rig.sample(unchanged), stock) and torch.equal(rig.sample(model), stock)


def test_with_another_packs_patch_between_two_nodes_the_later_one_counts(rig: Any, model: Any, sparse: None) -> None:
    names, heads = comfy_sparge.block_names(model.model.diffusion_model), model.model.diffusion_model.params.num_heads

    def between(put: Any) -> Any:
        """Another pack's patch, chained onto what is there."""
        clone = put.clone()
        dit = clone.model_options["transformer_options"].get("patches_replace", {}).get("dit", {})
        for name in names:
            kind, _, index = name.partition("_blocks.")
            before = dit.get((f"{kind}_block", int(index)))

            def patch(args: dict[str, Any], extra: dict[str, Any], before: Any = before) -> Any:
                return extra["original_block"](args) if before is None else before(args, extra)

            clone.set_model_patch_replace(patch, "dit", f"{kind}_block", int(index))
        return clone

    first = comfy_sparge.put_sparge(model, names, settings=tuned(names, heads))
    later = comfy_sparge.put_sparge(between(first), names)
    alone = comfy_sparge.put_sparge(between(model), names)
    drawn = rig.sample(later)
    assert torch.equal(drawn, rig.sample(alone))
    assert not torch.equal(drawn, rig.sample(first)) and not torch.equal(drawn, rig.sample(model))


def test_sparse_blocks_are_compiled_once_for_each_kind(rig: Any, sparse: None) -> None:
    made: list[int] = []

    def counting(graph: Any, inputs: Any, **options: Any) -> Any:
        made.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(counting, name="hasten_counting")
    model = rig.tiny_model(double=4, single=6)
    names = comfy_sparge.block_names(model.model.diffusion_model)
    for _ in range(2):  # queued again with another node: nothing is compiled
        put = comfy_sparge.put_sparge(model, names[1:])
        compiled = comfy_compile.compile_blocks(put, backend="hasten_counting")[0]
        for size in (8, 12, 16):
            assert torch.allclose(
                rig.sample(compiled, size=size, steps=2), rig.sample(put, size=size, steps=2), atol=1e-5
            )
        # Sparse blocks of two kinds, one left dense (in the pieces of ComfyUI's own), and the second size.
        assert len(made) <= 12
    torch._dynamo.reset()


def test_a_place_that_cannot_be_written_costs_no_picture(
    nodes: dict[str, Any], rig: Any, model: Any, said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not rig.overrides_attention():
        pytest.skip("this ComfyUI takes no other attention")
    from hasten.hosts.comfy_sana_nodes import _folders

    folders = _folders()
    monkeypatch.setattr(folders, "get_output_directory", lambda: str(tmp_path / "out"))
    monkeypatch.setattr(folders, "output_directory", str(tmp_path / "out"))
    monkeypatch.setattr(folders, "get_temp_directory", lambda: str(tmp_path / "temp"))
    given = {**ORIGINAL["ApplySpargeAttn"], "model": model, "tuned_hyperparams": "None", "enable_tuning_mode": True}
    searching, stock = nodes["ApplySpargeAttn"].execute(**given)[0], rig.sample(model)
    for prefix in ("../elsewhere", "/elsewhere"):
        nodes["SaveSpargeAttnHyperparams"].execute(searching, prefix)
        assert said[-1].startswith(f"not saved: filename_prefix is {prefix!r} (ERROR: Saving image outside")
    nodes["SaveSpargeAttnHyperparams"].execute(searching, "mine")
    real = comfy_sparge.save_settings

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comfy_sparge, "save_settings", full)
    assert torch.equal(rig.sample(searching), stock)
    assert any("cannot be written ([Errno 28] No space left on device): what was found stays in" in s for s in said)
    monkeypatch.setattr(comfy_sparge, "save_settings", real)
    assert torch.equal(rig.sample(searching), stock)
    assert len(list((tmp_path / "out").glob("mine_*.safetensors"))) == 1
    assert any(s.startswith("mine_00001_.safetensors: ") for s in said)  # said when it is written, not before


def test_recipes_are_built_and_read_from_files(nodes: dict[str, Any], tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "threshold": 0.2, "thresholds": "", "every": 4, "growth": 0.0, "predictor": "taylor", "order": 2, "start": 0.1,
        "end": 1.0, "max_consecutive_hits": -1, "skip_double": "3", "skip_single": "",
    }  # fmt: skip
    made, toml = nodes["LightningRecipe"].execute("fbcache", "", **values).args
    file = tmp_path / "mine.toml"
    file.write_text(toml, encoding="utf-8")
    read = nodes["LightningRecipe"].execute("file", str(file), **values).args[0]
    assert Recipe.load(made) == Recipe.load(read)
    assert Recipe.load(made).skip.double == (3,)


needs_nano = pytest.mark.skipif(not (FLUX_NANO / "model_index.json").is_file(), reason="flux-nano is not here yet")


@pytest.fixture(scope="module")
def nano(rig: Any) -> Any:
    from hasten.hosts.comfy_flux_nano import load

    return load(FLUX_NANO)


@needs_nano
def test_flux_nano_gives_diffusers_text_and_pictures(nano: Any) -> None:
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(FLUX_NANO, torch_dtype=torch.float32)
    _, clip, vae = nano
    cond, more = clip.encode_from_tokens_scheduled(clip.tokenize("a red circle"))[0]
    wanted, pooled, _ = pipe.encode_prompt("a red circle", None, max_sequence_length=64)
    assert torch.allclose(cond, wanted, atol=1e-4)
    assert torch.allclose(more["pooled_output"], pooled, atol=1e-4)
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        picture = pipe.vae.decode(latent).sample.permute(0, 2, 3, 1)
    assert torch.allclose(vae.decode(latent), (picture.clamp(-1, 1) + 1) / 2, atol=1e-3)


@needs_nano
@pytest.mark.parametrize(
    "cache",
    [
        {"method": "none"},
        {"method": "fbcache", "threshold": 0.1},
        {"method": "fbcache", "threshold": 0.2, "signal": "output", "predictor": "taylor"},
        {"method": "mbcache", "threshold": 0.1, "signal": "output"},
        {"method": "teacache", "threshold": 0.3},
        {"method": "easycache", "threshold": 0.05},
        {"method": "interval", "every": 3, "predictor": "taylor", "order": 2},
        {"method": "toca"},
        {"method": "modules", "every": 3, "predictor": "taylor"},
    ],
    ids=lambda cache: f"{cache['method']}-{cache.get('predictor', 'hold')}",
)
def test_the_same_latents_and_decisions_as_in_diffusers(rig: Any, nano: Any, cache: dict[str, Any]) -> None:
    from diffusers import FluxPipeline

    steps, size = 10, 128
    wanted = Recipe.from_dict({"schema": 1, "cache": cache})
    pipe = FluxPipeline.from_pretrained(FLUX_NANO, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    model, clip, _ = nano
    noise = torch.randn(1, 16, size // 8, size // 8, generator=torch.Generator().manual_seed(11))
    packed = pipe._pack_latents(noise, 1, 16, size // 8, size // 8)
    text = "a red circle above a blue square"
    with hasten.accelerate(pipe, wanted) as run:
        theirs = pipe(
            text, height=size, width=size, num_inference_steps=steps, guidance_scale=3.5, latents=packed,
            max_sequence_length=64, output_type="latent",
        ).images  # fmt: skip
    theirs = pipe._unpack_latents(theirs, size, size, pipe.vae_scale_factor)
    sigmas = pipe.scheduler.sigmas.clone()
    import comfy.sample
    import comfy.samplers

    positive = [
        [cond, {**more, "guidance": 3.5}] for cond, more in clip.encode_from_tokens_scheduled(clip.tokenize(text))
    ]
    patched = host.put_recipe(model, wanted)
    ours = comfy.sample.sample_custom(
        patched, noise, 1.0, comfy.samplers.sampler_object("euler"), sigmas, positive, positive,
        torch.zeros_like(noise), disable_pbar=True,
    )  # fmt: skip
    # ComfyUI hands latents over before its scale and shift, diffusers after them.
    ours = model.model.latent_format.process_in(ours)
    assert host.reports_of(patched)[-1].strip == run.report.strip
    assert (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max()
