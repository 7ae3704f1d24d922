"""The original pack's Sana example over HTTP, on a tiny random Sana under the names that it asks for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sana import authors_layout, make_tiny_sana

pytestmark = [pytest.mark.comfy, pytest.mark.filterwarnings("default")]

MODEL, DECODER = "Sana_1600M_1024px_MultiLing.pth", "dc-ae-f32c32-sana-1.0.safetensors"
GEMMA = "models--unsloth--gemma-2-2b-it-bnb-4bit"


@pytest.fixture
def files(rig: Any, server: Any, tmp_path: Path) -> None:
    """The example's files in the server's own folders."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from safetensors.torch import save_file

    folder, models = make_tiny_sana(tmp_path / "sana"), server.log.parent / "models"
    for kind in ("diffusion_models", "vae", "text_encoders"):
        (models / kind).mkdir(exist_ok=True, parents=True)
    weights = authors_layout(SanaTransformer2DModel.from_pretrained(folder / "transformer"))
    torch.save({"state_dict": weights}, models / "diffusion_models" / MODEL)
    save_file(AutoencoderDC.from_pretrained(folder / "vae").state_dict(), models / "vae" / DECODER)
    shutil.copytree(folder / "text_encoder", models / "text_encoders" / GEMMA)
    shutil.copytree(folder / "tokenizer", models / "text_encoders" / GEMMA, dirs_exist_ok=True)


def test_the_originals_sana_example_runs(server: Any, files: None) -> None:
    """Its nodes, links and values, but for 4 steps at 128x64, a seed that stays, and no compiler."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    graph = {
        "196": node("SanaDiffusionLoader", model_name=MODEL, model_type="SanaMS_1600M_P1_D20", weight_dtype="default",
                    convert_model_dtype=True),
        "195": node("SanaCLIPLoader", model_name=GEMMA, max_length=300, device="cuda", dtype="auto"),
        "199": node("SanaVAELoader", model_name=DECODER, dtype="auto"),
        "203": node("ApplyMBCacheAndSkipBlocksForSana", model=["196", 0], skip_blocks="14,17",
                    default_cache_threshold=0.0002, block_cache_thresholds="", start=0, end=1,
                    max_consecutive_cache_hits=-1),
        "201": node("CompileAndQuantizeModel", model=["203", 0], vae=["199", 0], do_compile=False, dynamic=False,
                    fullgraph=False, backend="inductor"),
        "197": node("SanaTextEncode", text="A knight is holding a sword.", GEMMA=["195", 0]),
        "198": node("SanaTextEncode", text="", GEMMA=["195", 0]),
        "193": node("EmptySanaLatentImage", width=128, height=64, batch_size=1),
        "207": node("KSamplerAdvanced", model=["201", 0], positive=["197", 0], negative=["198", 0],
                    latent_image=["193", 0], add_noise="enable", noise_seed=491285486386065, steps=4, cfg=3,
                    sampler_name="ddim", scheduler="beta", start_at_step=0, end_at_step=10000,
                    return_with_leftover_noise="disable"),
        "65": node("VAEDecode", samples=["207", 0], vae=["201", 1]),
        "177": node("PreviewImage", images=["65", 0]),
    }  # fmt: skip
    outputs, lines = server.run(graph)
    assert len(outputs["177"]["images"]) == 1
    assert lines["203"][-1].startswith("computed ")
    assert "14, 17 on the skip list not found" in lines["203"][-1]
    assert "Sana of 4 blocks" in lines["196"][-1]
