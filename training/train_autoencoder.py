"""Trains the autoencoder on crops of drawn scenes.

    python train_autoencoder.py --data DATA --out vae --minutes 20

The loss is L1, plus L1 of finite differences on three scales (sharp edges), plus a small KL. The schedule runs on
the clock, so that the same command fits a laptop or a GPU. The moving average of the weights is what is kept.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import build_autoencoder, normalise_latents, to_signed
from dataset import DrawnSet, draw_set
from diffusers import AutoencoderKL
from muon import Muon
from torch import Tensor

POOLS = (
    (128, 128, 10_000_000, 2500),
    (192, 192, 20_000_000, 500),
    (256, 256, 30_000_000, 250),
)  # width, height, start, count
CHECKED = 48  # last rows of the first pool: never trained on
KL_WEIGHT = 5e-4
EDGE_WEIGHT = 1.0
PEAK_RATE = 3e-3
FOLD_AT = 0.7  # the latents are normalised after this share; the rest trains with the fold


def edge_loss(made: Tensor, true: Tensor) -> Tensor:
    """L1 between finite differences, over scales 1, 1/2 and 1/4."""
    total = made.new_zeros(())
    for _ in range(3):
        difference = made - true
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        made, true = F.avg_pool2d(made, 2), F.avg_pool2d(true, 2)
    return total / 3


def crops(pools: list[DrawnSet], rng: np.random.Generator, device: str) -> Tensor:
    """One batch: eight 64-pixel crops, or (one in four) two of 128 pixels, so that norms see wide pictures too."""
    count, side = (2, 128) if rng.random() < 0.25 else (8, 64)
    batch = []
    for _ in range(count):
        pool = pools[rng.choice(len(pools), p=(0.6, 0.25, 0.15))]
        usable = len(pool.pixels) - CHECKED
        height, width = pool.pixels.shape[1:3]
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        crop = pool.pixels[rng.integers(usable), top : top + side, left : left + side]
        batch.append(crop[:, ::-1] if rng.random() < 0.3 else crop)
    return to_signed(torch.from_numpy(np.stack(batch).copy())).to(device)


@torch.no_grad()
def psnr(autoencoder: AutoencoderKL, pool: DrawnSet, device: str) -> float:
    """Mean PSNR in dB over the checked pictures, decoded from the mean."""
    values = []
    for rows in np.split(np.arange(len(pool.pixels) - CHECKED, len(pool.pixels)), 6):
        pictures = to_signed(torch.from_numpy(np.asarray(pool.pixels[rows]))).to(device)
        made = autoencoder.decode(autoencoder.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        error = ((made - pictures) / 2).square().mean((1, 2, 3))
        values += (-10 * error.log10()).tolist()
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pools = [draw_set(args.data, w, h, start=start, count=count, workers=2) for w, h, start, count in POOLS]
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = build_autoencoder().to(args.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    optimisers = [
        Muon([p for p in model.parameters() if p.ndim >= 2], lr=PEAK_RATE),
        torch.optim.AdamW(
            [p for p in model.parameters() if p.ndim < 2], lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]
    began, folded = time.monotonic(), False
    for step in itertools.count():
        share = (time.monotonic() - began) / (60 * args.minutes)
        if share >= 1:
            break
        rate = PEAK_RATE * min(1, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * share)) + 1e-6
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = rate
        if share > FOLD_AT and not folded:
            fold(model, average, optimisers, pools, args.device)
            folded = True
        pictures = crops(pools, rng, args.device)
        with torch.autocast(args.device, torch.bfloat16):
            posterior = model.encode(pictures).latent_dist
            made = model.decode(posterior.sample()).sample.float()
        kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        pixel, edge = (made - pictures).abs().mean(), edge_loss(made, pictures)
        # After the fold the latents have their own scale: hold the posterior's width then, by dropping the KL.
        loss = pixel + EDGE_WEIGHT * edge + (0 if folded else KL_WEIGHT) * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        decay = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        if step % 50 == 0:
            print(f"{step} {time.monotonic() - began:.0f}s l1 {pixel:.4f} edge {edge:.4f} kl {kl:.2f}", flush=True)
        if step % 400 == 399:
            print(f"{step} psnr {psnr(average, pools[0], args.device):.2f} dB", flush=True)
            average.save_pretrained(args.out)
    normalise(average, pools, args.device)
    average.save_pretrained(args.out)
    print(f"{step} steps, psnr {psnr(average, pools[0], args.device):.2f} dB")


def normalise(model: AutoencoderKL, pools: list[DrawnSet], device: str) -> None:
    """Normalises the latents of one model on whole pictures of every pool."""
    normalise_latents(model, [to_signed(torch.from_numpy(np.array(pool.pixels[:64]))).to(device) for pool in pools])


def fold(
    model: AutoencoderKL,
    average: AutoencoderKL,
    optimisers: list[torch.optim.Optimizer],
    pools: list[DrawnSet],
    device: str,
) -> None:
    """Normalises both copies alike: the running weights take the average's affine map."""
    model.load_state_dict(average.state_dict())
    normalise(model, pools, device)
    average.load_state_dict(model.state_dict())
    for parameter in (
        model.encoder.conv_out.weight,
        model.encoder.conv_out.bias,
        model.decoder.conv_in.weight,
        model.decoder.conv_in.bias,
    ):
        for optimiser in optimisers:
            optimiser.state.pop(parameter, None)  # their moments belong to the old scale


if __name__ == "__main__":
    main()
