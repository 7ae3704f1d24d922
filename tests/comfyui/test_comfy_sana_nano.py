"""sana-nano in the real ComfyUI: text, latents, decisions and pictures as diffusers' own pipeline has them."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
from comfyui.serving import ROOT

import hasten
from hasten.hosts import comfy as host
from hasten.recipe import Recipe

SANA_NANO = ROOT / "models" / "sana-nano"
PROMPT, SIDE, STEPS = "a red apple on a blue table", 256, 8

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not (SANA_NANO / "model_index.json").is_file(), reason="sana-nano is not here"),
]


@pytest.fixture(scope="module")
def nano(rig: Any) -> Any:
    """MODEL, CLIP and VAE as the node gives them."""
    nodes = importlib.import_module("hasten.hosts.comfy_sana_nodes")
    return nodes.LoadSanaNano.execute().args


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import SanaPipeline

    loaded = SanaPipeline.from_pretrained(SANA_NANO)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def conditions(clip: Any) -> list[Any]:
    """The positive and the negative one, as CLIPTextEncode makes them."""
    return [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "")]


def test_text_is_diffusers(nano: Any, pipe: Any) -> None:
    wanted = pipe.encode_prompt(PROMPT, True, max_sequence_length=64, complex_human_instruction=None)
    for (cond, more), states, mask in zip((c[0] for c in conditions(nano[1])), wanted[::2], wanted[1::2], strict=True):
        assert torch.equal(more["attention_mask"], mask)
        assert (cond - states)[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("settings", ["none", "balanced"])
def test_latents_decisions_and_pictures_are_diffusers(nano: Any, pipe: Any, settings: str) -> None:
    """KSampler's euler and simple at cfg 4.5; diffusers along the same sigmas."""
    import comfy.sample
    import comfy.samplers
    from diffusers import FlowMatchEulerDiscreteScheduler

    model, clip, vae = nano
    steps = 12 if settings != "none" else STEPS
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)
    noise = torch.randn(1, 32, SIDE // 32, SIDE // 32, generator=torch.Generator().manual_seed(3))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    with hasten.accelerate(pipe, settings) as run:
        theirs = pipe(
            PROMPT, height=SIDE, width=SIDE, num_inference_steps=steps, sigmas=sigmas[:-1].tolist(), latents=noise,
            guidance_scale=4.5, max_sequence_length=64, complex_human_instruction=None, use_resolution_binning=False,
            output_type="latent",
        ).images  # fmt: skip
    patched = host.put_recipe(model, Recipe.load(settings))
    ours = comfy.sample.sample(
        patched, noise, steps, 4.5, "euler", "simple", *conditions(clip), torch.zeros_like(noise),
        disable_pbar=True, seed=3,
    )  # fmt: skip
    ours = model.model.latent_format.process_in(ours)
    assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
    if settings != "none":
        assert host.reports_of(patched)[-1].strip == run.report.strip
        return
    with torch.no_grad():
        picture = pipe.image_processor.postprocess(pipe.vae.decode(theirs / 0.41407).sample, output_type="pt")
    shown = vae.decode(model.model.latent_format.process_out(ours)).permute(0, 3, 1, 2)
    assert (shown - picture).abs().max() <= 1 / 255
    assert picture.std() > 0.05, "a picture, not a plain one"


def run_node(kind: Any, **given: Any) -> Any:
    """A node of core's, of whichever of its two styles: its outputs."""
    new = hasattr(kind, "execute")
    found = kind.execute(**given) if new else getattr(kind(), kind.FUNCTION)(**given)
    return found.args if new else found


def test_custom_samplers_and_tiles_are_the_plain_nodes(nano: Any) -> None:
    """SamplerCustomAdvanced ends where KSampler does, decisions too; VAE Decode (Tiled) near what is decoded whole."""
    import comfy_extras.nodes_custom_sampler as custom
    import nodes

    model, clip, vae = nano
    patched = host.put_recipe(model, Recipe.load("balanced"))
    positive, negative = conditions(clip)
    empty = {"samples": torch.zeros(1, 32, 12, 12)}
    plain = nodes.common_ksampler(patched, 3, 12, 4.5, "euler", "simple", positive, negative, empty)[0]["samples"]
    strip = host.reports_of(patched)[-1].strip
    guider = run_node(custom.CFGGuider, model=patched, positive=positive, negative=negative, cfg=4.5)[0]
    sampled = run_node(
        custom.SamplerCustomAdvanced,
        noise=run_node(custom.RandomNoise, noise_seed=3)[0],
        guider=guider,
        sampler=run_node(custom.KSamplerSelect, sampler_name="euler")[0],
        sigmas=run_node(custom.BasicScheduler, model=patched, scheduler="simple", steps=12, denoise=1.0)[0],
        latent_image=empty,
    )[0]
    assert torch.equal(sampled["samples"], plain)
    assert host.reports_of(patched)[-1].strip == strip and "." in strip
    whole = run_node(nodes.VAEDecode, vae=vae, samples=sampled)[0]
    tiled = run_node(
        nodes.VAEDecodeTiled, vae=vae, samples=sampled, tile_size=256, overlap=64, temporal_size=64, temporal_overlap=8
    )[0]
    assert whole.shape == tiled.shape == (1, 384, 384, 3)
    # DC-AE's attention looks at a whole tile: shades shift a little from tile to tile.
    assert (whole - tiled).abs().mean() < 0.2 * whole.std()


def test_a_live_preview_can_be_made(nano: Any) -> None:
    import comfy.latent_formats
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod

    form = nano[0].model.latent_format
    assert isinstance(form, comfy.latent_formats.LatentFormat)
    previewer = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors, form.latent_rgb_factors_bias)
    assert previewer.decode_latent_to_preview(torch.randn(1, 32, 8, 8)).size == (8, 8)
    assert LatentPreviewMethod.Latent2RGB


@pytest.mark.slow
def test_the_template_runs_over_http(server: Any) -> None:
    """The template as the page sends it, on core's KSampler."""
    from comfyui.test_comfy_server import as_prompt

    file = ROOT / "example_workflows" / "sana-nano try-out.json"
    graph = as_prompt(server, json.loads(file.read_text(encoding="utf-8")))
    kinds = {node["class_type"]: key for key, node in graph.items()}
    outputs, lines = server.run(graph)
    assert outputs[kinds["SaveImage"]]["images"]
    assert lines[kinds["Lightning"]][-1].startswith("computed ")
