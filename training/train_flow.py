"""Trains flux-nano's transformer by flow matching, and its embedded guidance.

    python train_flow.py --data DATA --vae vae --text text --out run --minutes 70

Phase 1 learns noise - x0 from the autoencoder's latents, encoded once. A head on the tokens after the double blocks
names what each token shows; it ties words to places early and is thrown away. Phase 2 (the last GUIDED_SHARE of the
time) trains the embedded guidance: the target becomes noise - x0 + (g - 1) * (v_cond - v_uncond), with the difference
taken from the moving average at g = 1 and g given as the guidance input. Its mean is classifier-free guidance, so
`guidance_scale` sharpens as it does on FLUX.1-dev, while the data keep teaching (after Model Guidance, Tang 2025).

The schedule runs on the clock. Compute is bf16, the master weights are float32. Every --export-minutes the moving
average is written as a FluxPipeline folder together with a sheet of held-out prompts.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from autoencoder import SCALE, SHIFT, to_signed
from checker import WEIGHTS, Checker
from dataset import DrawnSet, open_set
from diffusers import AutoencoderKL, FluxTransformer2DModel
from export import export
from flow import HEAD_DIM, HEADS, PACKED_CHANNELS, Texts, build_transformer, decode, pack, sample, shifted, velocity
from muon import Muon
from PIL import Image
from scenes import COLOUR_INDEX, OBJECT_INDEX, Scene, held_out_prompts, is_taught
from torch import Tensor, nn
from train_text import varied

SMALL = (128, 128)
SMALL_SHARE = 0.65  # of the batches unless --small-share; the other sizes share the rest
TOKENS_A_BATCH = {"cpu": 2048, "cuda": 24576}  # image tokens; 64 make a picture of 128x128, 256 one of 256x256
TEXT_LENGTHS, TEXT_SHARES = (24, 64, 128, 256, 512), (10, 60, 12, 9, 9)
LATE_TEXT_SHARES = (5, 65, 12, 9, 9)
CAPTION_DROP = 0.08
MUON_RATE, ADAM_RATE = 1.5e-3, 1e-3  # at 2.5e-3 nothing became recognisable before the rate fell
WARM_STEPS = 60
HIGH, HIGH_SHARE = 0.78, 0.5  # share of the samples with sigma above HIGH
DECAY_FROM = 0.35  # share of the time; the rates fall linearly from here to zero
GUIDED_SHARE = 0.16
TEACHER_EVERY = 20  # steps between refreshes of the guidance's teacher
DENSE_WEIGHT = 0.15
DENSE_UNTIL = 1.2
OBJECT_WEIGHT = 1.0  # extra weight of tokens that show a thing; fades out by DENSE_UNTIL
GUIDANCE = (1.0, 5.0)


class LatentSet:
    """Drawn scenes of one size as packed latents, each encoded when it is first asked for and then kept.

    labels: (N, rows * columns) in 0..2, which thing a token shows; grid: token rows and columns.
    """

    def __init__(self, drawn: DrawnSet, autoencoder: AutoencoderKL, limit: int) -> None:
        self.drawn = drawn
        self.autoencoder = autoencoder
        scenes = [drawn.scene(index) for index in range(min(limit, len(drawn.seeds)))]
        self.taught = [index for index, scene in enumerate(scenes) if is_taught(scene)]
        self.scenes = [scenes[index] for index in self.taught]
        cells = torch.from_numpy(np.stack([drawn.cells[index] for index in self.taught]))
        n, rows, columns = cells.shape
        self.grid = (rows // 2, columns // 2)
        self.labels = cells.view(n, rows // 2, 2, columns // 2, 2).amax((2, 4)).flatten(1)
        self.latents = torch.empty(n, self.labels.shape[1], PACKED_CHANNELS, dtype=torch.bfloat16)
        self.known = torch.zeros(n, dtype=torch.bool)

    @torch.no_grad()
    def rows(self, rows: Tensor) -> Tensor:
        """Latents (B, N, 64) of these rows, zero mean and deviation one."""
        new = rows[~self.known[rows]].unique()
        if len(new):
            device = self.autoencoder.device.type
            pictures = to_signed(
                torch.from_numpy(np.stack([self.drawn.pixels[self.taught[row]] for row in new.tolist()]))
            ).to(device)
            with torch.autocast(device, torch.bfloat16):
                z = self.autoencoder.encode(pictures).latent_dist.mean.float()
            self.latents[new] = pack((z - SHIFT) * SCALE).bfloat16().cpu()
            self.known[new] = True
        return self.latents[rows]


class DenseHead(nn.Module):
    """Names object and colour of every image token; class 0 is the ground."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HEADS * HEAD_DIM)
        self.objects = nn.Linear(HEADS * HEAD_DIM, 1 + len(OBJECT_INDEX))
        self.colours = nn.Linear(HEADS * HEAD_DIM, 2 + len(COLOUR_INDEX))  # ground, own, named ...

    def forward(self, features: Tensor, objects: Tensor, colours: Tensor) -> Tensor:
        """Mean cross-entropy; features (B, N, C), objects and colours (B, N)."""
        x = self.norm(features)
        loss = F.cross_entropy(self.objects(x).float().flatten(0, 1), objects.flatten())
        return loss + 0.5 * F.cross_entropy(self.colours(x).float().flatten(0, 1), colours.flatten())


def dense_targets(labels: Tensor, batch: list[Scene]) -> tuple[Tensor, Tensor]:
    """Object and colour class of each token. labels (B, N) says which thing covers it."""
    objects, colours = torch.zeros(len(batch), 3, dtype=torch.long), torch.zeros(len(batch), 3, dtype=torch.long)
    for row, scene in enumerate(batch):
        for slot, thing in enumerate((scene.first, scene.second), 1):
            if thing is not None:
                objects[row, slot] = 1 + OBJECT_INDEX[thing.name]
                colours[row, slot] = 1 if thing.colour is None else 2 + COLOUR_INDEX[thing.colour]
    return objects.gather(1, labels.long()), colours.gather(1, labels.long())


def split_parameters(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names for Muon (matrices inside blocks, but modulations) and for AdamW (all else)."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = "transformer_blocks" in name and parameter.ndim == 2 and "norm" not in name
        (matrices if inside else others).append(name)
    return matrices, others


class Trainer:
    """Master weights, working copy, average and optimisers of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = args.device
        start = args.start and FluxTransformer2DModel.from_pretrained(args.start, torch_dtype=torch.float32)
        self.master = (start or build_transformer()).to(self.device)
        self.average = copy.deepcopy(self.master).requires_grad_(False)
        self.work = copy.deepcopy(self.master).to(torch.bfloat16).train()
        self.head = DenseHead().to(self.device, torch.bfloat16)
        self.features: Tensor | None = None
        self.work.transformer_blocks[-1].register_forward_hook(self._keep_features)
        masters, works = dict(self.master.named_parameters()), dict(self.work.named_parameters())
        self.pairs = [(masters[name], works[name]) for name in masters]
        matrices, others = split_parameters(self.master)
        self.optimisers = [
            Muon([masters[name] for name in matrices], lr=MUON_RATE, weight_decay=0.01),
            torch.optim.AdamW([masters[name] for name in others], lr=ADAM_RATE, betas=(0.9, 0.97), weight_decay=0.0),
            torch.optim.AdamW(self.head.parameters(), lr=ADAM_RATE, betas=(0.9, 0.97)),
        ]
        self.rates = [MUON_RATE, ADAM_RATE, ADAM_RATE]
        self.teacher: FluxTransformer2DModel | None = None
        self.steps = 0

    def _keep_features(self, module: nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        self.features = output[1]

    def update(self, share: float) -> None:
        """One optimiser step from the working copy's gradients, and the average's."""
        fall = 1.0 if share < DECAY_FROM else max(0.0, (1 - share) / (1 - DECAY_FROM))
        factor = min(1.0, (self.steps + 1) / WARM_STEPS) * fall
        for master, work in self.pairs:
            master.grad = None if work.grad is None else work.grad.float()
        torch.nn.utils.clip_grad_norm_(self.master.parameters(), 1.0)
        for optimiser, rate in zip(self.optimisers, self.rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(0.998, (self.steps + 1) / (self.steps + 10))
        with torch.no_grad():
            torch._foreach_copy_([work for _, work in self.pairs], [master for master, _ in self.pairs])
            torch._foreach_lerp_(list(self.average.parameters()), list(self.master.parameters()), 1 - decay)
        for _, work in self.pairs:
            work.grad = None

    def save(self) -> None:
        """Everything needed to go on after a stop."""
        state = {
            "master": self.master.state_dict(), "average": self.average.state_dict(), "head": self.head.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers], "steps": self.steps,
        }  # fmt: skip
        path = self.args.out / "state.pt"
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)

    def load(self, path: Path) -> None:
        """Takes up a saved state."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.master.load_state_dict(state["master"])
        self.average.load_state_dict(state["average"])
        self.head.load_state_dict(state["head"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.steps = state["steps"]
        with torch.no_grad():
            torch._foreach_copy_([work for _, work in self.pairs], [master for master, _ in self.pairs])

    def refresh_teacher(self) -> None:
        """Makes the average, as it is now, the teacher of the guidance."""
        if self.teacher is None:
            print("guidance is trained from here", flush=True)
        if self.teacher is None or self.steps % TEACHER_EVERY == 0:
            self.teacher = copy.deepcopy(self.average).to(torch.bfloat16).eval()


def write_sheet(path: Path, pictures: list[Image.Image], columns: int) -> None:
    """A contact sheet of equally large pictures."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + 4)), "black")
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * (width + 4), index // columns * (height + 4)))
    sheet.save(path)


def report(
    trainer: Trainer,
    texts: Texts,
    autoencoder: AutoencoderKL,
    name: str,
    size: tuple[int, int] = (128, 128),
    count: int = 16,
) -> None:
    """Samples held-out prompts into a sheet and prints the checker's verdicts."""
    model = copy.deepcopy(trainer.average).to(torch.bfloat16)
    chosen = held_out_prompts(count)
    grid = (size[1] // 16, size[0] // 16)
    tokens = sample(model, texts.encode([scene.caption for scene in chosen], 64), grid)
    pictures = [Image.fromarray(picture.numpy()) for picture in decode(autoencoder, tokens, grid)]
    write_sheet(trainer.args.out / f"{name}.png", pictures, 8)
    if not WEIGHTS.exists():
        return
    checker = Checker()
    verdicts = [checker.check(picture, scene) for picture, scene in zip(pictures, chosen, strict=True)]
    right = {part: sum(getattr(v, part) for v in verdicts) for part in ("object_ok", "colour_ok", "place_ok", "ok")}
    print(f"{name}: of {count} right: {right}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--export-minutes", type=float, default=10)
    parser.add_argument("--limit", type=int, default=40_000, help="scenes of 128x128 at most")
    parser.add_argument("--limit-others", type=int, default=4_000, help="scenes of every other size at most")
    parser.add_argument("--small-share", type=float, default=SMALL_SHARE, help="share of the 128x128 batches")
    parser.add_argument("--start", type=Path, help="a transformer folder to go on from, with new optimisers")
    parser.add_argument("--resume", action="store_true", help="take up OUT/state.pt")
    parser.add_argument("--spent", type=float, default=0, help="minutes already trained before --resume")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    # cuDNN's attention backward met an illegal address on these short, odd lengths (torch 2.11, H200).
    torch.backends.cuda.enable_cudnn_sdp(False)
    rng = random.Random(0)
    autoencoder = AutoencoderKL.from_pretrained(args.vae).to(args.device, memory_format=torch.channels_last).eval()
    texts = Texts(args.text, args.device, torch.bfloat16)
    trainer = Trainer(args)
    export(trainer.average, autoencoder, args.text, args.out / "pipeline") if not args.resume else trainer.load(
        args.out / "state.pt"
    )
    folders = [
        folder
        for folder in sorted(args.data.iterdir())
        if (folder / "done").exists() and int(folder.name.split("-")[1]) < 10_000_000
    ]
    sets: dict[tuple[int, int], LatentSet] = {}
    for folder in folders:
        size = tuple(int(side) for side in folder.name.split("-")[0].split("x"))
        sets[size] = LatentSet(open_set(folder), autoencoder, args.limit if size == SMALL else args.limit_others)
        z = sets[size].rows(torch.arange(64)).float()
        print(
            f"{folder.name}: {len(sets[size].scenes)} scenes, latents mean {z.mean():.3f} std {z.std():.3f}", flush=True
        )
    others = [size for size in sets if size != SMALL]
    began, exported, losses = time.monotonic(), time.monotonic(), []
    while True:
        share = ((time.monotonic() - began) / 60 + args.spent) / args.minutes
        if share >= 1:
            break
        if share > 1 - GUIDED_SHARE:
            trainer.refresh_teacher()
        size = SMALL if not others or rng.random() < args.small_share else rng.choice(others)
        length = rng.choices(TEXT_LENGTHS, TEXT_SHARES if share < 0.6 else LATE_TEXT_SHARES)[0]
        flow, dense = train_step(trainer, sets[size], texts, rng, length, share)
        losses.append((flow, dense))
        if trainer.steps % 50 == 0:
            flow_mean, dense_mean = np.mean(losses[-50:], 0)
            print(
                f"{trainer.steps} {time.monotonic() - began:.0f}s flow {flow_mean:.4f} dense {dense_mean:.3f}",
                flush=True,
            )
        if time.monotonic() - exported > 60 * args.export_minutes:
            exported = time.monotonic()
            trainer.save()
            export(trainer.average, autoencoder, args.text, args.out / "pipeline")
            report(trainer, texts, autoencoder, f"sheet-{trainer.steps}")
    trainer.save()
    trainer.average.save_pretrained(args.out / "ema")
    export(trainer.average, autoencoder, args.text, args.out / "pipeline")
    report(trainer, texts, autoencoder, f"sheet-{trainer.steps}", count=32)
    print(f"done: {trainer.steps} steps", flush=True)


def train_step(
    trainer: Trainer, latents: LatentSet, texts: Texts, rng: random.Random, length: int, share: float
) -> tuple[float, float]:
    """One step; returns the flow loss and the dense loss."""
    count = latents.grid[0] * latents.grid[1]
    # Long padding costs much and teaches little more: keep the sum of tokens bounded.
    most = TOKENS_A_BATCH[trainer.device]
    size = max(4, min(most // count, 2 * most // (count + length)))
    rows = torch.tensor([rng.randrange(len(latents.scenes)) for _ in range(size)])
    batch = [latents.scenes[row] for row in rows.tolist()]
    captions = [varied(scene.caption, rng) for scene in batch]
    dropped = [rng.random() < CAPTION_DROP for _ in batch]
    text = texts.encode(["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)], length)
    x0 = latents.rows(rows).to(trainer.device).float()
    labels = latents.labels[rows]
    noise = torch.randn_like(x0)
    # What a picture shows is decided above HIGH: below, the noisy picture itself tells, and that was learned first.
    plain = shifted(torch.rand(size), count)
    high = HIGH + (1 - HIGH) * torch.rand(size)
    sigma = torch.where(torch.rand(size) < HIGH_SHARE, high, plain).to(trainer.device)
    noisy = torch.lerp(x0, noise, sigma[:, None, None]).bfloat16()
    guidance = torch.empty(size, device=trainer.device).uniform_(*GUIDANCE)
    target = noise - x0
    sigma_low, guidance_low = sigma.bfloat16(), guidance.bfloat16()
    if trainer.teacher is not None:
        half = size // 2  # the other half keeps learning g = 1, which the teacher is asked for
        guidance[half:] = 1.0
        guidance_low = guidance.bfloat16()
        with torch.no_grad():
            empty = tuple(part.expand(half, *part.shape[1:]).contiguous() for part in texts.encode([""], length))
            some_text, one = (text[0][:half], text[1][:half]), torch.ones_like(guidance_low[:half])
            with_text = velocity(trainer.teacher, noisy[:half], sigma_low[:half], one, some_text, latents.grid).float()
            without = velocity(trainer.teacher, noisy[:half], sigma_low[:half], one, empty, latents.grid).float()
            target[:half] += (guidance[:half, None, None] - 1) * (with_text - without)
    made = velocity(trainer.work, noisy, sigma_low, guidance_low, text, latents.grid).float()
    fade = max(0.0, 1 - share / DENSE_UNTIL)
    weight = 1 + OBJECT_WEIGHT * fade * (labels > 0).float().to(trainer.device)
    error = (made - target).square().mean(-1)
    loss = (error * weight).sum() / weight.sum()
    dense = loss.new_zeros(())
    if fade > 0:
        kept = torch.tensor([not drop for drop in dropped])
        objects, colours = dense_targets(labels, batch)
        dense = trainer.head(trainer.features[kept], objects[kept].to(trainer.device), colours[kept].to(trainer.device))
        loss = loss + DENSE_WEIGHT * min(1.0, 2 * fade) * dense
    loss.backward()
    trainer.update(share)
    return float(error.detach().mean()), float(dense.detach())


if __name__ == "__main__":
    main()
