"""Sana in the real ComfyUI: the same numbers as diffusers' own pipeline, and what a MODEL, a CLIP and a VAE must do."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import recipe
from tiny_sana import authors_layout, make_tiny_sana, noise, paint, sana, tiny_autoencoder, words
from torch import Tensor

from hasten.hosts import comfy as host
from hasten.recipe import Recipe

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("default")]

SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.0])
SCALE = 0.41407


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny SanaPipeline."""
    return make_tiny_sana(tmp_path_factory.mktemp("sana") / "tiny-sana")


@pytest.fixture
def load(rig: Any, tmp_path: Path) -> Any:
    """Loads a diffusers transformer's weights, in the authors' layout, as ComfyUI's MODEL."""
    from hasten.hosts.comfy_sana import load_model

    def loaded(transformer: Any, dtype: str = "fp32") -> Any:
        torch.save({"state_dict": authors_layout(transformer)}, tmp_path / "sana.pth")
        return load_model(tmp_path / "sana.pth", weight_dtype=dtype)[0]

    return loaded


def conditioning(given: dict[str, Any], *, negative: bool = False, row: int = 0) -> list[Any]:
    prefix = "negative_" if negative else ""
    mask = given[f"{prefix}prompt_attention_mask"][row : row + 1]
    return [[given[f"{prefix}prompt_embeds"][row : row + 1], {"attention_mask": mask}]]


def sample(model: Any, given: dict[str, Any], latent: Tensor, *, cfg: float = 4.5, sampler: str = "euler") -> Tensor:
    """The latents that the model's own pipeline would end with."""
    import comfy.sample
    import comfy.samplers

    positive, negative = conditioning(given), conditioning(given, negative=True)
    out = comfy.sample.sample_custom(
        model, latent, cfg, comfy.samplers.sampler_object(sampler), SIGMAS, positive, negative,
        torch.zeros_like(latent), disable_pbar=True, seed=1,
    )  # fmt: skip
    return out * SCALE


def stock(pipe: Any, given: dict[str, Any], latent: Tensor, *, cfg: float = 4.5) -> Tensor:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    rows = {name: value.repeat(latent.shape[0], *[1] * (value.ndim - 1)) for name, value in given.items()}
    return paint(pipe, sigmas=SIGMAS[:-1].tolist(), latents=latent.clone(), guidance_scale=cfg, **rows)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("kind", [{}, {"qk_norm": True}, {"scale": 1.0, "side": 64}])
@pytest.mark.parametrize(("cfg", "batch"), [(4.5, 1), (1.0, 1), (4.5, 4)])
def test_latents_equal_the_pipelines(load: Any, kind: dict[str, Any], cfg: float, batch: int) -> None:
    pipe, latent = sana(**kind), noise(batch, 32, 4, 6, seed=7)
    model, given = load(pipe.transformer), words(6)
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    out = sample(model, given, latent, cfg=cfg)
    rows = {name: value.repeat(batch, *[1] * (value.ndim - 1)) for name, value in given.items()}
    # Not square, so that height and width cannot have changed places.
    expected = pipe(
        prompt=None, negative_prompt=None, height=128, width=192, sigmas=SIGMAS[:-1].tolist(), latents=latent.clone(),
        guidance_scale=cfg, output_type="latent", use_resolution_binning=False, num_inference_steps=5, **rows,
    ).images  # fmt: skip
    assert apart(out, expected) < 1e-5


def test_prompts_of_different_lengths_keep_their_masks(load: Any) -> None:
    """Two positive conditions at once and a negative one: each as if it were alone."""
    import comfy.sample
    import comfy.samplers

    pipe, latent, both = sana(), noise(1, 32, 4, 4, seed=7), words(3, 9)
    model = load(pipe.transformer)
    combined = [*conditioning(both, row=0), *conditioning(both, row=1)]
    euler = comfy.samplers.sampler_object("euler")
    latents = []
    for positive in (combined, conditioning(both, row=0), conditioning(both, row=1)):
        latents.append(
            comfy.sample.sample_custom(
                model, latent, 1.0, euler, torch.tensor([1.0, 0.9]), positive, positive, torch.zeros_like(latent),
                disable_pbar=True, seed=1,
            )
        )  # fmt: skip
    # One step from the same noise is linear in the velocities, which core averages.
    assert apart(latents[0], (latents[1] + latents[2]) / 2) < 1e-5
    assert apart(latents[1], latents[2]) > 1e-3


def test_sprint_draws_what_its_pipeline_draws(load: Any) -> None:
    """One step of a consistency model from pure noise: the data that it foretells."""
    import comfy.sample
    import comfy.samplers

    pipe, latent, given = sana(sprint=True), noise(1, 32, 4, 4, seed=7), words(6, negative=False)
    model = load(pipe.transformer)
    positive = [[given["prompt_embeds"], {"attention_mask": given["prompt_attention_mask"], "guidance": 4.5}]]
    out = comfy.sample.sample_custom(
        model, latent, 1.0, comfy.samplers.sampler_object("lcm"), torch.tensor([1.0, 0.0]), positive, positive,
        torch.zeros_like(latent), disable_pbar=True, seed=1,
    )  # fmt: skip
    expected = paint(pipe, steps=1, latents=latent.clone(), guidance_scale=4.5, **given)
    assert apart(out * SCALE, expected) < 1e-4  # its angle ends a hair above pi / 2
    sampling = model.get_model_object("model_sampling")
    assert float(sampling.sigmas[499]) == pytest.approx(0.7827, abs=1e-3), "two simple steps lie at its own angles"


ALWAYS = {
    "interval": recipe("interval", every=1),
    "fbcache": recipe("fbcache", threshold=0.0),
    "mbcache-cosine": recipe("mbcache", threshold=0.0, signal="output", distance="cosine"),
    "teacache": recipe("teacache", threshold=0.0),
    "easycache": recipe("easycache", threshold=0.0),
}
EAGER = {
    "interval": recipe("interval", every=100, last=False),
    "mbcache-cosine": recipe("mbcache", threshold=1.0, signal="output", distance="cosine", first=False, last=False),
    "teacache": recipe("teacache", threshold=10.0, first=False, last=False),
    "easycache": recipe("easycache", threshold=10.0, first=False, last=False),
}


def test_the_laws_hold(load: Any) -> None:
    """Bit for bit without reuse, and after a run with it; reuse where it may be."""
    latent, given = noise(2, 32, 4, 4, seed=7), words(6)
    model = load(sana().transformer)
    plain = sample(model, given, latent)
    for name, settings in ALWAYS.items():
        patched = host.put_recipe(model, Recipe.from_dict(settings))
        assert torch.equal(sample(patched, given, latent), plain), name
        assert host.reports_of(patched)[-1].strip == "CCCCC", name
    for name, settings in EAGER.items():
        patched = host.put_recipe(model, Recipe.from_dict(settings))
        first = sample(patched, given, latent)
        assert host.reports_of(patched)[-1].reused >= 3, name
        assert torch.equal(sample(patched, given, latent), first), f"{name}: a run sees nothing of the one before"
        assert torch.equal(sample(model, given, latent), plain), name


def test_heun_and_another_size_are_followed(load: Any) -> None:
    model = host.put_recipe(load(sana().transformer), Recipe.from_dict(EAGER["interval"]))
    for side in (4, 6):
        assert sample(model, words(6), noise(1, 32, side, side, seed=7), sampler="heun").isfinite().all()


def test_blocks_can_be_skipped(load: Any) -> None:
    latent, given, pipe = noise(1, 32, 4, 4, seed=7), words(6), sana()
    model = load(pipe.transformer)
    skipping = host.put_recipe(model, Recipe.from_dict(recipe(skip={"double": [1, 3]})))
    del pipe.transformer.transformer_blocks[3], pipe.transformer.transformer_blocks[1]
    assert apart(sample(skipping, given, latent), stock(pipe, given, latent)) < 1e-5


@pytest.mark.parametrize(("dtype", "near"), [("bf16", 0.02), ("fp16", 0.01), ("fp8_e4m3fn", 0.1), ("fp8_e5m2", 0.2)])
def test_weights_may_be_kept_in_fewer_bits(load: Any, dtype: str, near: float) -> None:
    """Bounds: a few rounding steps of each format's mantissa, on random weights."""
    pipe, latent, given = sana(), noise(1, 32, 4, 4, seed=7), words(6)
    out = sample(load(pipe.transformer, dtype), given, latent)
    assert apart(out, stock(pipe, given, latent)) < near


def test_large_activations_are_not_black_in_float16(load: Any) -> None:
    """Linear attention sums over all tokens: in float16 it would overflow, so it does that in float32."""
    from comfy.model_patcher import ModelPatcher

    model = load(sana().transformer, "fp16")
    assert isinstance(model, ModelPatcher)
    network = model.model.diffusion_model.to(torch.float16)
    network.kept_dtype, model.model.manual_cast_dtype = torch.float16, None
    with torch.no_grad():
        for block in network.transformer_blocks:
            for name in ("to_q", "to_k", "to_v"):
                getattr(block.attn1, name).weight.mul_(40)
        x = torch.randn(1, 32, 32, 32).half()
        out = network(x, torch.tensor([500.0]), torch.randn(1, 10, 24).half())
    assert out.dtype is torch.float16 and out.isfinite().all()


def test_a_lora_is_added_and_taken_off(load: Any) -> None:
    """Under diffusers' names, as PEFT writes them."""
    import comfy.sd

    latent, given = noise(1, 32, 4, 4, seed=7), words(6)
    model = load(sana().transformer)
    plain = sample(model, given, latent)
    stem = "transformer.transformer_blocks.0.attn2.to_q"
    lora = {f"{stem}.lora_A.weight": noise(4, 64, seed=1), f"{stem}.lora_B.weight": noise(64, 4, seed=2)}
    changed, _ = comfy.sd.load_lora_for_models(model, None, lora, 0.5, 0.0)
    assert apart(sample(changed, given, latent), plain) > 1e-3
    import comfy.model_management

    comfy.model_management.unload_all_models()
    assert apart(sample(model, given, latent), plain) < 1e-6


def test_layers_are_kept_in_8_bits_for_one_clone(load: Any) -> None:
    from hasten.hosts import comfy_quantize

    latent, given = noise(1, 32, 4, 4, seed=7), words(6)
    model = load(sana().transformer)
    plain = sample(model, given, latent)
    quantised, said = comfy_quantize.quantise_model(model)
    assert said == f"{4 * 8} layers of the model are kept in int8"  # both attentions': q, k, v and out
    found = sample(quantised, given, latent)
    assert 0 < apart(found, plain) < 0.05
    assert torch.equal(sample(model, given, latent), plain)
    assert torch.equal(sample(host.put_recipe(quantised, Recipe.from_dict(ALWAYS["fbcache"])), given, latent), found)
    import comfy.sd

    stem = "transformer.transformer_blocks.0.attn2.to_q"
    # Of a LoRA's usual size: a row's scale stays, so one that outgrows the weights themselves would be cut off.
    lora = {f"{stem}.lora_A.weight": noise(4, 64, seed=1), f"{stem}.lora_B.weight": 0.05 * noise(64, 4, seed=2)}
    changed = [comfy.sd.load_lora_for_models(each, None, lora, 0.5, 0.0)[0] for each in (model, quantised)]
    exact, eight = (sample(each, given, latent) for each in changed)
    assert apart(eight, exact) < 0.05 and apart(eight, exact) < 0.5 * apart(exact, plain)


def test_what_core_saves_can_be_loaded_again(load: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from hasten.hosts.comfy_sana import load_model

    latent, given = noise(1, 32, 4, 4, seed=7), words(6)
    model = load(sana().transformer)
    base = model.model
    newer = "unet_state_dict" in inspect.signature(base.state_dict_for_saving).parameters
    saved = base.state_dict_for_saving(*([base.diffusion_model.state_dict()] if newer else []))
    save_file({k: v.contiguous() for k, v in saved.items()}, tmp_path / "a.safetensors")
    again = load_model(tmp_path / "a.safetensors", weight_dtype="fp32")[0]
    assert torch.equal(sample(again, given, latent), sample(model, given, latent))


def test_another_attention_takes_the_cross_attention(load: Any) -> None:
    latent, given, seen = noise(1, 32, 4, 4, seed=7), words(6), []
    model = load(sana().transformer)
    plain = sample(model, given, latent)

    def override(func: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((args[0].shape[0], args[1].shape[2]))
        assert kwargs.get("mask") is None
        return func(*args, **kwargs)

    other = model.clone()
    other.model_options["transformer_options"]["optimized_attention_override"] = override
    assert apart(sample(other, given, latent), plain) < 1e-5
    # Each picture's words alone, without those that fill its prompt up: 6 and the empty prompt's 1.
    assert len(seen) == 2 * 4 * 5 and set(seen) == {(1, 6), (1, 1)}
    assert torch.equal(sample(model, given, latent), plain)


def test_the_pieces_lie_where_core_puts_them(load: Any) -> None:
    """Everything with weights is a leaf that core can offload and cast, and the preview has its factors."""
    model = load(sana(scale=1.0, side=64).transformer)
    network = model.model.diffusion_model
    for name, module in network.named_modules():
        if list(module.named_parameters(recurse=False)):
            assert hasattr(module, "comfy_cast_weights"), name
            assert not list(module.children()), name
    assert not any(p.is_meta for p in network.parameters())
    assert len(model.model.latent_format.latent_rgb_factors) == 32
    assert model.model.memory_required([1, 32, 32, 32]) > 0


# The text encoder.


@pytest.mark.parametrize("text", ["A red ball on a table.", "x " * 400, ""])
@pytest.mark.parametrize("instructed", [True, False])
def test_embeddings_equal_the_pipelines(rig: Any, folder: Path, text: str, instructed: bool) -> None:
    from diffusers import SanaPipeline

    from hasten.hosts.comfy_sana_text import encode, load_clip

    clip, _ = load_clip(folder, dtype="fp32")
    states, beside = encode(clip, text, instructed=instructed)[0]
    pipe = SanaPipeline.from_pretrained(folder, transformer=None, vae=None)
    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    with torch.no_grad():
        expected, mask, _, _ = pipe.encode_prompt(
            text, False, device="cpu", complex_human_instruction=lines if instructed else None
        )
    assert states.shape == (1, 300, 24)
    assert torch.equal(beside["attention_mask"], mask)
    assert apart(states, expected) < 1e-5


def test_core_nodes_encode_too(rig: Any, folder: Path) -> None:
    """CLIPTextEncode knows no instruction: it is a negative prompt's way."""
    from hasten.hosts.comfy_sana_text import encode, load_clip

    clip, _ = load_clip(folder, dtype="fp32", device="cpu")
    assert torch.equal(
        core_nodes().CLIPTextEncode().encode(clip, "a ball")[0][0][0], encode(clip, "a ball", instructed=False)[0][0]
    )


@pytest.mark.parametrize("nested", [False, True])
def test_four_bit_folders_are_unpacked(rig: Any, folder: Path, tmp_path: Path, nested: bool) -> None:
    """What bitsandbytes writes: two indices a byte, a scale for every 64, the scales perhaps indices themselves."""
    from safetensors.torch import load_file, save_file

    from hasten.hosts.comfy_sana_gemma import load_gemma

    own = Path(shutil.copytree(folder / "text_encoder", tmp_path / "gemma"))
    state = load_file(own / "model.safetensors")
    name = "layers.0.mlp.up_proj.weight"
    packed, expected = four_bits(state.pop(name), nested=nested)
    save_file({**state, **{f"{name}{ending}": tensor for ending, tensor in packed.items()}}, own / "model.safetensors")
    model = load_gemma(own, torch.float32)
    assert torch.allclose(model.layers[0].mlp.up_proj.weight, expected, atol=1e-6)


def four_bits(weight: Tensor, *, nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    """A matrix as bitsandbytes keeps it, and the matrix that it stands for."""
    levels = torch.linspace(-1, 1, 16)
    blocks = weight.flatten().reshape(-1, 64)
    scales = blocks.abs().amax(dim=1)
    told: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "shape": list(weight.shape), "dtype": "float32"}
    kept: dict[str, Tensor] = {".absmax": scales}
    if nested:
        table, offset = torch.linspace(-1, 1, 256), float(scales.mean())
        centred = scales - offset
        largest = centred.abs().max().reshape(1)
        indices = ((centred / largest)[:, None] - table).abs().argmin(dim=1)
        scales = table[indices] * largest + offset
        told |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        kept = {".absmax": indices.to(torch.uint8), ".nested_absmax": largest, ".nested_quant_map": table}
    indices = ((blocks / scales[:, None])[..., None] - levels).abs().argmin(dim=-1)
    plain = (levels[indices] * scales[:, None]).reshape(weight.shape)
    flat = indices.flatten()
    kept |= {
        "": ((flat[::2] << 4) | flat[1::2]).to(torch.uint8)[:, None],
        ".quant_map": levels,
        ".quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8),
    }
    return kept, plain


def test_gemma_does_not_work_in_float16(rig: Any, folder: Path) -> None:
    from hasten.hosts.comfy_sana_text import load_clip

    clip, said = load_clip(folder, dtype="fp16")
    assert clip.cond_stage_model.dtypes == {torch.bfloat16}
    assert "overflows float16" in said


def test_a_gemma_folder_without_tokenizer_is_refused(rig: Any, folder: Path, tmp_path: Path) -> None:
    from hasten.hosts.comfy_sana_text import load_clip

    alone = Path(shutil.copytree(folder / "text_encoder", tmp_path / "gemma"))
    with pytest.raises(ValueError, match="has no tokenizer"):
        load_clip(alone)
    (alone / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds a llama model"):
        load_clip(alone)


# The decoder.


def test_the_decoder_is_diffusers_own(rig: Any, folder: Path) -> None:
    from diffusers import AutoencoderDC

    from hasten.hosts.comfy_sana_vae import load_vae

    vae, _ = load_vae(folder, dtype="fp32")
    model, latent = AutoencoderDC.from_pretrained(folder / "vae"), noise(2, 32, 3, 4, seed=5)
    with torch.no_grad():
        expected = ((model.decode(latent).sample + 1) / 2).clamp(0, 1).movedim(1, -1)
        picture = vae.decode(latent)
        assert picture.shape == (2, 96, 128, 3)
        assert float((picture - expected).abs().max()) < 1 / 255
        back = model.encode(picture.movedim(-1, 1) * 2 - 1).latent
        assert apart(vae.encode(picture), back) < 1e-5
    tiled = vae.decode_tiled(noise(1, 32, 20, 20, seed=5), tile_x=16, tile_y=16, overlap=2)
    assert tiled.shape == (1, 640, 640, 3) and tiled.isfinite().all()
    assert (vae.latent_channels, vae.spacial_compression_decode()) == (32, 32)
    vae.throw_exception_if_invalid()


def test_what_does_not_fit_is_decoded_in_tiles(rig: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.hosts.comfy_sana_vae import load_vae

    vae, _ = load_vae(folder, dtype="fp32")
    decoder = vae.first_stage_model.model.decoder
    whole = decoder.forward

    def small_only(z: Tensor) -> Tensor:
        if z.shape[-1] > 16:
            raise torch.OutOfMemoryError
        return whole(z)

    monkeypatch.setattr(decoder, "forward", small_only)
    assert vae.decode(noise(1, 32, 20, 20, seed=5)).shape == (1, 640, 640, 3)


def test_a_decoder_file_is_told_from_its_tensors(rig: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from hasten.hosts.comfy_sana_vae import load_vae

    model = tiny_autoencoder()
    save_file(model.state_dict(), tmp_path / "dc-ae.safetensors")
    vae, _ = load_vae(tmp_path / "dc-ae.safetensors", dtype="fp32")
    latent = noise(1, 32, 2, 2, seed=5)
    with torch.no_grad():
        assert apart(vae.first_stage_model.decode(latent), model.decode(latent).sample) < 1e-5


def test_other_decoders_are_refused(rig: Any, tmp_path: Path) -> None:
    from diffusers import AutoencoderDC
    from safetensors.torch import save_file

    from hasten.hosts.comfy_sana_vae import load_vae

    shallow: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("block_types", ("ResBlock", "ResBlock", "EfficientViTBlock")),
                            ("block_out_channels", (8, 16, 32)), ("layers_per_block", (1, 1, 1)),
                            ("qkv_multiscales", ((), (), (5,))))
    }  # fmt: skip
    save_file(AutoencoderDC(attention_head_dim=8, **shallow).state_dict(), tmp_path / "f4.safetensors")
    with pytest.raises(ValueError, match=r"is a DC-AE f4c32: Sana's is f32c32"):
        load_vae(tmp_path / "f4.safetensors")
    save_file({"decoder.conv_in.weight": torch.zeros(4, 16, 3, 3)}, tmp_path / "kl.safetensors")
    with pytest.raises(ValueError, match="is no DC-AE"):
        load_vae(tmp_path / "kl.safetensors")


# The nodes.


@pytest.fixture
def sana_nodes(rig: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The nodes, and a models folder with the files that the original's example asks for."""
    from safetensors.torch import save_file

    from hasten.hosts import comfy_sana_nodes

    for kind in ("diffusion_models", "vae", "text_encoders"):
        (tmp_path / kind).mkdir()
    folders = SimpleNamespace(
        get_folder_paths=lambda kind: [str(tmp_path / kind)],
        get_filename_list=lambda kind: [file.name for file in (tmp_path / kind).iterdir()],
        get_full_path=lambda kind, name: str(tmp_path / kind / name) if (tmp_path / kind / name).is_file() else None,
    )
    monkeypatch.setattr(comfy_sana_nodes, "_folders", lambda: folders)
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    weights = authors_layout(SanaTransformer2DModel.from_pretrained(folder / "transformer"))
    torch.save({"state_dict": weights}, tmp_path / "diffusion_models" / "Sana_1600M_1024px_MultiLing.pth")
    decoder = AutoencoderDC.from_pretrained(folder / "vae").state_dict()
    save_file(decoder, tmp_path / "vae" / "dc-ae-f32c32-sana-1.0.safetensors")
    gemma = tmp_path / "text_encoders" / "models--unsloth--gemma-2-2b-it-bnb-4bit"
    shutil.copytree(folder / "text_encoder", gemma)
    shutil.copytree(folder / "tokenizer", gemma, dirs_exist_ok=True)
    return comfy_sana_nodes


def core_nodes() -> Any:
    """ComfyUI's own nodes, which its packaged form keeps elsewhere."""
    try:
        return importlib.import_module("nodes")
    except ModuleNotFoundError:
        return importlib.import_module("comfy.nodes.base_nodes")


def made(node: Any, **given: Any) -> Any:
    """The node's first output."""
    return node.execute(**given).args[0]


def test_the_originals_example_runs(sana_nodes: Any, folder: Path) -> None:
    """Its nodes with its own values, but for 4 steps and 128x64; the pipeline's picture within a level of 255."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    n = sana_nodes
    model = made(
        n.SanaDiffusionLoader, model_name="Sana_1600M_1024px_MultiLing.pth", model_type="SanaMS_1600M_P1_D20",
        weight_dtype="fp32", convert_model_dtype=True,
    )  # fmt: skip
    clip = made(
        n.SanaCLIPLoader, model_name="models--unsloth--gemma-2-2b-it-bnb-4bit", max_length=300, device="cuda",
        dtype="fp32",
    )  # fmt: skip
    vae = made(n.SanaVAELoader, model_name="dc-ae-f32c32-sana-1.0.safetensors", dtype="fp32")
    patched = made(
        n.ApplyMBCacheAndSkipBlocksForSana, model=model, skip_blocks="14,17", default_cache_threshold=0.0002,
        block_cache_thresholds="", start=0.0, end=1.0, max_consecutive_cache_hits=-1,
    )  # fmt: skip
    positive = made(n.SanaTextEncode, text="A knight is holding a sword.", GEMMA=clip)
    negative = made(n.SanaTextEncode, text="", GEMMA=clip)
    latent = made(n.EmptySanaLatentImage, width=128, height=64, batch_size=1)
    assert latent["samples"].shape == (1, 32, 2, 4)
    sampled = (
        core_nodes()
        .KSamplerAdvanced()
        .sample(patched, "enable", 3, 4, 3.0, "euler", "simple", positive, negative, latent, 0, 10000, "disable")[0]
    )
    picture = core_nodes().VAEDecode().decode(vae, sampled)[0]
    assert host.reports_of(patched)[-1].line().startswith("computed 4 of 4")
    pipe = SanaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    drawn = torch.zeros(1, 32, 2, 4)
    import comfy.sample

    drawn = comfy.sample.prepare_noise(drawn, 3)
    expected = pipe(
        "A knight is holding a sword.", height=64, width=128, num_inference_steps=4, sigmas=sigmas[:-1].tolist(),
        guidance_scale=3.0, latents=drawn, output_type="np", use_resolution_binning=False,
    ).images  # fmt: skip
    assert float((picture - torch.from_numpy(expected)).abs().max()) <= 1 / 255


def test_sizes_that_are_no_multiple_of_32_are_refused(sana_nodes: Any) -> None:
    with pytest.raises(ValueError, match="the width is 100: Sana's must be divisible by 32; try 96"):
        sana_nodes.SanaEmptyLatentImage.execute(width=100, height=64, batch_size=1)


@pytest.mark.parametrize(("model", "size"), [("512", (672, 384)), ("1024", (1344, 768)), ("4K", (5376, 3072))])
def test_the_authors_sizes(sana_nodes: Any, model: str, size: tuple[int, int]) -> None:
    assert sana_nodes.trained_size(model, "16:9") == size


def test_bad_lists_pass_the_model_through(sana_nodes: Any, load: Any) -> None:
    model = SimpleNamespace()
    node = sana_nodes.ApplyMBCacheAndSkipBlocksForSana
    out = made(
        node, model=model, skip_blocks="a", default_cache_threshold=0.1, block_cache_thresholds="", start=0.0,
        end=1.0, max_consecutive_cache_hits=-1,
    )  # fmt: skip
    assert out is model


def test_most_of_it_may_stay_offloaded(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Core's low-VRAM load: layers and tables are cast as they are used, and reuse goes on as before."""
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher

    latent, given = noise(1, 32, 4, 4, seed=7), words(6)
    model = load(sana().transformer)
    plain = sample(model, given, latent)
    management.unload_all_models()
    whole = ModelPatcher.load

    def partly(self: Any, device_to: Any = None, lowvram_model_memory: float = 0, **how: Any) -> Any:
        return whole(self, device_to, lowvram_model_memory=self.model_size() // 2, **{**how, "full_load": False})

    monkeypatch.setattr(type(model), "load", partly)
    patched = host.put_recipe(model, Recipe.from_dict(EAGER["interval"]))
    assert apart(sample(model, given, latent), plain) < 1e-6
    assert model.model.model_lowvram
    sample(patched, given, latent)
    assert host.reports_of(patched)[-1].strip == "C...."
    monkeypatch.undo()
    management.unload_all_models()


def test_blocks_are_compiled_one_by_one(load: Any) -> None:
    from hasten.hosts import comfy_compile

    latent, given = noise(1, 32, 4, 4, seed=7), words(6)
    model = load(sana().transformer)
    plain = sample(model, given, latent)
    compiled, said = comfy_compile.compile_blocks(model, backend="eager")[:2]
    assert "4 blocks" in str(said)
    assert apart(sample(compiled, given, latent), plain) < 1e-6
    patched = host.put_recipe(compiled, Recipe.from_dict(EAGER["interval"]))
    sample(patched, given, latent)
    assert host.reports_of(patched)[-1].strip == "C...."
