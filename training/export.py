"""Writes a FluxPipeline folder that diffusers loads by itself.

python export.py --transformer run/ema --vae vae --text text --out ../models/flux-nano
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from flow import SCHEDULE
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

SHARD = "12MB"


def export(transformer: FluxTransformer2DModel, autoencoder: AutoencoderKL, text: Path, out: Path) -> None:
    """Writes the pipeline beside `out`, then puts it in place; a README.md already there is kept.

    Transformer and autoencoder are bf16. The text encoders stay float32: transformers 5 loads the stored type by
    default, diffusers loads float32, and a plain from_pretrained must not mix the two.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, **SCHEDULE
    )
    pipe = FluxPipeline(
        scheduler=scheduler,
        vae=copy.deepcopy(autoencoder).to(torch.bfloat16),
        text_encoder=CLIPTextModel.from_pretrained(text / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(text / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(text / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(text / "tokenizer_2"),
        transformer=copy.deepcopy(transformer).to(torch.bfloat16),
    )
    beside = out.with_name(out.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    pipe.save_pretrained(beside, max_shard_size=SHARD)
    # transformers 5 has one T5 tokenizer, 4 needs to be told to take the one that reads tokenizer.json.
    for path in (beside / "model_index.json", beside / "tokenizer_2" / "tokenizer_config.json"):
        path.write_text(path.read_text().replace('"T5Tokenizer"', '"T5TokenizerFast"'))
    for path in beside.glob("*/config.json"):  # diffusers notes where the parts were loaded from
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(kept, indent=2) + "\n")
    for name in ("vocab.json", "merges.txt"):  # transformers 5 writes tokenizer.json alone; 4 asks for these
        shutil.copy(text / "tokenizer" / name, beside / "tokenizer")
    if (out / "README.md").exists():
        shutil.copy(out / "README.md", beside)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    transformer = FluxTransformer2DModel.from_pretrained(args.transformer)
    export(transformer, AutoencoderKL.from_pretrained(args.vae), args.text, args.out)
    total = 0
    for path in sorted(p for p in args.out.rglob("*") if p.is_file()):
        total += path.stat().st_size
        print(f"{path.stat().st_size / 2**20:7.2f} MiB  {path.relative_to(args.out)}")
    print(f"{total / 2**20:7.2f} MiB in all")


if __name__ == "__main__":
    main()
