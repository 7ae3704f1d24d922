"""The autoencoder of flux-nano: FLUX's layout (16 channels, f8, four levels, no quant convs), made narrow.

Width 96 on every level: FLUX's 32 norm groups then hold three channels each. With one or two a group normalisation
erases the absolute colour of a plain ground, which the last norm must let through. `layers_per_block=0` gives the
decoder one residual block a level and the encoder strided convolutions only: the cheapest that both diffusers and
ComfyUI (`num_res_blocks=0`) build.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor

WIDTH = 96
LEVELS = 4
LATENT_CHANNELS = 16
SCALE = 0.3611
SHIFT = 0.1159


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder."""
    model = AutoencoderKL(
        block_out_channels=(WIDTH,) * LEVELS,
        layers_per_block=0,
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=32,
        sample_size=256,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        force_upcast=True,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=True,
    )
    _start_well(model)
    return model


@torch.no_grad()
def _start_well(model: AutoencoderKL) -> None:
    """Sets a start from which few steps suffice: references for the norms, upsamplers that copy, little noise."""
    reference = torch.tensor([0.0, 1.0, -1.0]).repeat(WIDTH // 3)  # each norm group: one signal beside +1 and -1
    model.decoder.conv_in.bias += reference
    model.encoder.down_blocks[-2].downsamplers[0].conv.bias += reference
    for block in model.decoder.up_blocks[:-1]:
        weight = block.upsamplers[0].conv.weight
        copying = torch.nn.init.dirac_(torch.empty_like(weight))
        weight.mul_(0.5).add_(copying)
    model.encoder.conv_out.bias[LATENT_CHANNELS:] = -4.0
    model.encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.1


def to_signed(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in -1..1, channels last."""
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def normalise_latents(autoencoder: AutoencoderKL, pictures: list[Tensor]) -> None:
    """Folds an affine map into the autoencoder's two ends, in place.

    Afterwards (z - SHIFT) * SCALE has mean 0 and deviation 1 in every channel on these pictures (B, 3, H, W each),
    and decoding gives what it gave before.
    """
    latents = torch.cat(
        [autoencoder.encode(batch).latent_dist.mean.permute(1, 0, 2, 3).flatten(1) for batch in pictures], 1
    )
    mean, deviation = latents.mean(1), latents.std(1)
    gain = 1 / (deviation * SCALE)  # new z = gain * z + offset
    offset = SHIFT - mean * gain
    out, into = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
    out.weight[:LATENT_CHANNELS] *= gain[:, None, None, None]
    out.bias[:LATENT_CHANNELS] = out.bias[:LATENT_CHANNELS] * gain + offset
    out.bias[LATENT_CHANNELS:] += 2 * gain.log()  # the log variance scales along
    # The zero padding of conv_in meant z = 0; it now means z = -offset/gain. Only the outermost ring of latents sees
    # that, so a few steps of training after this fold repair it (train_autoencoder does them).
    into.bias -= (into.weight.sum((2, 3)) * (offset / gain)).sum(1)
    into.weight /= gain[None, :, None, None]
