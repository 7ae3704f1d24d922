"""Trains the checker on drawn scenes and measures it on held-out ones.

    python train_checker.py --data DATA --steps 1500         # writes checker.safetensors beside this file
    python train_checker.py --measure                        # only the figures

Pictures are blurred, noised, tinted and brightened at random, so that a slightly soft picture is not misread. One in
ten is half one thing and half another: what is no known thing must be called OTHER.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from checker import GROUND, OTHER, OWN_COLOUR, WEIGHTS, Checker, CheckerNet, own_tint
from dataset import DrawnSet, draw_set
from muon import Muon
from PIL import ImageFilter
from safetensors.torch import save_file
from scenes import COLOUR_INDEX, COLOURS, EMOJI_NAMES, OBJECT_INDEX, SHAPES, Scene, draw, scenes
from torch import Tensor

IGNORE = -100
BATCH = 32
FAMILIES = [[name for name in OBJECT_INDEX if name.split()[0] == kind] for kind in ("letter", "number")]
FAMILIES += [list(SHAPES), list(EMOJI_NAMES)]
RATE = 4e-3


def targets(cells: Tensor, batch: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Object class, colour class and RGB of each cell. cells (B, H, W) in 0..2."""
    names, colours = torch.full((len(batch), 3), GROUND), torch.full((len(batch), 3), IGNORE)
    tints = torch.zeros(len(batch), 3, 3)
    for row, scene in enumerate(batch):
        for slot, thing in enumerate((scene.first, scene.second), 1):
            if thing is None:
                continue
            names[row, slot] = 1 + OBJECT_INDEX[thing.name]
            colours[row, slot] = OWN_COLOUR if thing.colour is None else COLOUR_INDEX[thing.colour]
            tints[row, slot] = torch.tensor(own_tint(thing.name) if thing.colour is None else COLOURS[thing.colour]) / (
                1 if thing.colour is None else 255
            )
    flat = cells.flatten(1).long()
    pick = lambda table: table.gather(1, flat).view(cells.shape)  # noqa: E731
    tint = tints.gather(1, flat[..., None].expand(-1, -1, 3)).view(*cells.shape, 3)
    return pick(names), pick(colours), tint


def spoil(pictures: Tensor, names: Tensor, colours: Tensor, tint: Tensor, cells: Tensor) -> Tensor:
    """Augments a batch; labels are changed in place where the picture's meaning changes."""
    size = len(pictures)
    other = torch.roll(torch.arange(size), 1)
    middles = [(c == 1).float().mul(torch.arange(c.shape[1]) + 0.5).sum() / (c == 1).sum().clamp(min=1) for c in cells]
    single = [(c == 2).sum() == 0 and (c == 1).sum() >= 8 for c in cells]
    original, old_names, old_cells = pictures.clone(), names.clone(), cells.clone()
    for row, mate in enumerate(other.tolist()):
        alike = (
            single[row]
            and single[mate]
            and abs(middles[row] - middles[mate]) < 2.5
            and old_names[row].max() != old_names[mate].max()
        )
        if not alike or torch.rand(()) < 0.35:
            continue
        cut = int((middles[row] + middles[mate]) / 2)
        pictures[row, :, :, 8 * cut :] = original[mate, :, :, 8 * cut :]
        cells[row, :, cut:] = old_cells[mate, :, cut:]
        names[row] = torch.where(cells[row] > 0, OTHER, GROUND)
        colours[row] = IGNORE
        tint[row, :, cut:] = tint[mate, :, cut:]
    for row in range(size):
        if torch.rand(()) < 0.1:
            order = torch.randperm(3)
            pictures[row], tint[row], colours[row] = pictures[row][order], tint[row][..., order], IGNORE
    if torch.rand(()) < 0.4:
        soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pictures = torch.lerp(pictures, soft, torch.rand(size, 1, 1, 1))
    gain, lift = 1 + 0.1 * torch.randn(size, 1, 1, 1), 0.03 * torch.randn(size, 3, 1, 1)
    return (pictures * gain + lift + 0.03 * torch.rand(size, 1, 1, 1) * torch.randn_like(pictures)).clamp(0, 1)


def train(drawn: DrawnSet, steps: int, resume: bool) -> CheckerNet:
    """A network trained for so many steps."""
    torch.manual_seed(0)
    net = CheckerNet().to(memory_format=torch.channels_last).train()
    if resume:
        net.load_state_dict(Checker().net.state_dict())
    kernels = [p for p in net.parameters() if p.ndim == 4 and p.shape[-1] == 3]
    others = [p for p in net.parameters() if not any(p is kernel for kernel in kernels)]
    optimisers = [Muon(kernels, lr=RATE, weight_decay=0.02), torch.optim.AdamW(others, lr=RATE, weight_decay=0.02)]
    ground_weight = torch.ones(OTHER + 1)
    ground_weight[GROUND] = 0.3  # four cells in five are ground
    rng, began = np.random.default_rng(0), time.monotonic()
    for step in range(steps):
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 30, 1.4 * (1 - step / steps))
        rows = np.sort(rng.choice(len(drawn.pixels), BATCH, replace=False))
        cells = torch.from_numpy(np.stack([drawn.cells[row] for row in rows]))
        names, colours, tint = targets(cells, [drawn.scene(row) for row in rows])
        pictures = torch.from_numpy(np.stack([drawn.pixels[row] for row in rows])).permute(0, 3, 1, 2).float() / 255
        pictures = spoil(pictures, names, colours, tint, cells).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            made_names, made_colours, made_tint = net(pictures)
        shown = (cells > 0).float()
        loss = F.cross_entropy(made_names.float(), names, ground_weight)
        loss = loss + 0.5 * F.cross_entropy(made_colours.float(), colours, ignore_index=IGNORE)
        loss = loss + 3 * ((made_tint.float().permute(0, 2, 3, 1) - tint).abs().mean(-1) * shown).sum() / shown.sum()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if step % 50 == 0:
            guess = made_names.argmax(1)
            right = (guess == names)[cells > 0].float().mean()
            print(f"{step} {time.monotonic() - began:.0f}s loss {loss:.3f} cells right {right:.3f}", flush=True)
        if step % 300 == 299 or step == steps - 1:
            save_file(
                {
                    name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
                    for name, tensor in net.state_dict().items()
                },
                WEIGHTS,
            )
    return net


def measure(count: int = 600) -> dict[str, float]:
    """Shares of held-out drawn scenes accepted as they are (also softened) and rejected under a wrong scene."""
    checker = Checker()
    truth = list(itertools.islice(scenes(700_000_000, held_out=True), count))
    kept, soft, refused, refused_by = 0, 0, 0, {"object": [0, 0], "colour": [0, 0], "place": [0, 0]}
    for index, scene in enumerate(truth):
        image = draw(scene, *((128, 128), (192, 128), (256, 256))[index % 3], jitter=index % 2 == 0).image
        kept += checker.check(image, scene).ok
        soft += checker.check(image.filter(ImageFilter.GaussianBlur(0.6 * min(image.size) / 128)), scene).ok
        for kind, wrong in wrong_scenes(scene).items():
            no = not checker.check(image, wrong).ok
            refused_by[kind][0] += no
            refused_by[kind][1] += 1
            refused += no
    total = sum(pair[1] for pair in refused_by.values())
    figures = {"accepted": kept / count, "accepted softened": soft / count, "refused": refused / total}
    return figures | {f"refused, wrong {kind}": pair[0] / pair[1] for kind, pair in refused_by.items()}


def wrong_scenes(scene: Scene) -> dict[str, Scene]:
    """The scene with one thing changed each: another object of its family, colour, place."""
    first, second = scene.first, scene.second
    taken = {first.name, second.name if second else None}
    family = next(names for names in FAMILIES if first.name in names)
    names = [name for name in family if name not in taken]
    change = lambda **parts: Scene(**{**scene.__dict__, **parts})  # noqa: E731
    thing = lambda **parts: type(first)(**{**first.__dict__, **parts})  # noqa: E731
    wrong = {"object": change(first=thing(name=names[scene.seed % len(names)]))}
    if first.colour is not None:
        colours = [colour for colour in COLOURS if colour != first.colour]
        wrong["colour"] = change(first=thing(colour=colours[scene.seed % len(colours)]))
    if scene.second is not None:
        wrong["place"] = change(first=scene.second, second=scene.first)
    elif scene.place is not None:
        opposite = {"left": "right", "right": "centre", "centre": "left"} if scene.ground.kind == "table" else {
            "left": "centre", "right": "top right", "top": "top left", "bottom": "centre", "centre": "right",
            "top left": "top", "top right": "right", "bottom left": "left", "bottom right": "bottom",
        }  # fmt: skip
        wrong["place"] = change(place=opposite[scene.place])
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--count", type=int, default=20_000, help="drawn scenes to train on")
    parser.add_argument("--resume", action="store_true", help="go on from checker.safetensors")
    parser.add_argument("--measure", action="store_true")
    args = parser.parse_args()
    if not args.measure:
        train(
            draw_set(args.data, 128, 128, start=40_000_000, count=args.count, workers=2, jitter=True),
            args.steps,
            args.resume,
        )
    for name, share in measure().items():
        print(f"{name}: {100 * share:.2f} %")


if __name__ == "__main__":
    main()
