"""Checks that ComfyUI's own Flux and autoencoder, as Load flux-nano fills them, give diffusers' results.

python comfy_check.py --comfy PATH_OF_A_COMFYUI_CHECKOUT --model ../models/flux-nano
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-3


def start(folder: Path) -> None:
    """Makes a ComfyUI checkout importable, also on a machine without a GPU."""
    stand_ins = ROOT / "tests" / "comfyui" / "customize" / "sitecustomize.py"
    spec = importlib.util.spec_from_file_location("stand_ins", stand_ins)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["stand_ins"] = module  # what it keeps has to live on
    spec.loader.exec_module(module)
    sys.path[:0] = [str(folder), str(ROOT / "src")]
    from comfy.cli_args import args

    args.cpu = True


@torch.no_grad()
def check_flux(folder: Path) -> float:
    """Largest difference between ComfyUI's Flux and diffusers' transformer on one batch, over its largest value."""
    from diffusers import FluxTransformer2DModel
    from flow import pack, unpack, velocity

    from hasten.hosts import comfy_flux_nano

    ours = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()
    theirs = comfy_flux_nano.load_model(folder).model.diffusion_model
    generator = torch.Generator().manual_seed(0)
    rows, columns, length = 10, 8, 64
    latent = torch.randn(2, 16, 2 * rows, 2 * columns, generator=generator)
    text = torch.randn(2, length, ours.config["joint_attention_dim"], generator=generator)
    pooled = torch.randn(2, ours.config["pooled_projection_dim"], generator=generator)
    sigma, guidance = torch.tensor([0.9, 0.3]), torch.tensor([3.5, 2.0])
    made = theirs(latent, sigma, text, y=pooled, guidance=guidance)
    wanted = unpack(velocity(ours, pack(latent), sigma, guidance, (text, pooled), (rows, columns)), rows, columns)
    return float((made - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def check_autoencoder(folder: Path) -> float:
    """Largest difference of encoding and decoding, as ComfyUI's VAE and diffusers do it, relative to the range."""
    from diffusers import AutoencoderKL

    from hasten.hosts import comfy_flux_nano

    ours = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    theirs = comfy_flux_nano.load_vae(folder)
    picture = torch.rand(1, 96, 128, 3, generator=torch.Generator().manual_seed(0))
    z = ours.encode(picture.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean
    encoded = theirs.encode(picture)
    wanted = (ours.decode(z).sample.permute(0, 2, 3, 1).clamp(-1, 1) + 1) / 2
    decoded = theirs.decode(z)
    return max(float((encoded - z).abs().max() / z.abs().max()), float((decoded - wanted).abs().max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "flux-nano")
    args = parser.parse_args()
    start(args.comfy.resolve())
    differences = {"flux": check_flux(args.model), "autoencoder": check_autoencoder(args.model)}
    for name, difference in differences.items():
        print(f"{name}: largest relative difference {difference:.2e}")
    if max(differences.values()) > TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
