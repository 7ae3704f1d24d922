"""The figures of sana-nano: recipes and methods beside as many plain steps, in one command.

    python benchmarks/sana_nano.py                 # 64 held-out prompts, 256x256, 20 steps, guidance 4.5, float32
    python benchmarks/sana_nano.py --prompts 4     # minutes on two CPU cores; written into .cache, proves little
    python benchmarks/sana_nano.py --only recipe/  # those rows anew, where the checker has its fonts; the others stay

rewrites results/sana_nano.csv and the README's table. PSNR and SSIM against the uncached picture of the same seed,
medians over the prompts, on the decoder's output before it is rounded; psnr_plain_db: as many plain Euler steps as were
computed; checked: the share that the checker of training/ accepts, for the recipes. Each row names its device.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tables
import torch
from measuring import FIRST_SEED, checked, psnr, ssim
from torch import Tensor

import hasten

HERE = Path(__file__).resolve().parent
STEPS, SIDE, GUIDANCE, TOKENS = 20, 256, 4.5, 64
BATCH = 64  # prompts in one call, and so in one decision
DECODED = 8  # at once: the decoder takes far more memory than the steps
RECIPES = ("lossless", "balanced", "fast", "turbo")


def ways() -> dict[str, Mapping[str, Any] | str]:
    """Each row's recipe."""
    found: dict[str, Mapping[str, Any] | str] = {f"recipe/{name}": name for name in RECIPES}
    for method in ("fbcache", "teacache", "easycache"):
        for threshold in (0.05, 0.1, 0.2):
            found[f"{method}/{threshold}"] = {"schema": 1, "cache": {"method": method, "threshold": threshold}}
    # The original pack's signal for Sana, and its node's own threshold among them.
    for threshold in (0.0002, 0.001, 0.005):
        cache = {"method": "mbcache", "threshold": threshold, "signal": "output", "distance": "cosine"}
        found[f"mbcache cosine/{threshold}"] = {"schema": 1, "cache": cache}
    for every in (2, 3):
        for name, stand_in in (("hold", {}), ("line", {"predictor": "taylor"}), ("damped", {"predictor": "damped"})):
            cache = {"method": "interval", "every": every, **stand_in}
            found[f"every {every}/{name}"] = {"schema": 1, "cache": cache}
    return found


class Studio:
    """sana-nano with its prompts encoded."""

    def __init__(self, prompts: int, device: str) -> None:
        from diffusers import SanaPipeline
        from scenes import held_out_prompts

        self.pipe = SanaPipeline.from_pretrained(hasten.models_folder() / "sana-nano").to(device)
        self.pipe.set_progress_bar_config(disable=True)
        torch.backends.cudnn.allow_tf32 = False  # this process is the benchmark's own
        self.scenes = held_out_prompts(prompts)
        captions = [scene.caption for scene in self.scenes]
        options = {"max_sequence_length": TOKENS, "complex_human_instruction": None}
        with torch.no_grad():
            _, _, self.empty, self.empty_mask = self.pipe.encode_prompt(captions[:1], True, **options)
            self.words, self.mask, _, _ = self.pipe.encode_prompt(captions, False, **options)

    @torch.no_grad()
    def draw(self, steps: int = STEPS) -> Tensor:
        """All pictures, (N, 3, H, W) in 0..1, float32."""
        found = []
        for first in range(0, len(self.scenes), BATCH):
            words, mask = self.words[first : first + BATCH], self.mask[first : first + BATCH]
            count = len(words)
            seeds = range(FIRST_SEED + first, FIRST_SEED + first + count)
            latents = self.pipe(
                prompt=None, negative_prompt=None, prompt_embeds=words, prompt_attention_mask=mask,
                negative_prompt_embeds=self.empty.expand(count, -1, -1),
                negative_prompt_attention_mask=self.empty_mask.expand(count, -1), height=SIDE, width=SIDE,
                num_inference_steps=steps, guidance_scale=GUIDANCE, use_resolution_binning=False, output_type="latent",
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            ).images  # fmt: skip
            for few in (latents / self.pipe.vae.config.scaling_factor).split(DECODED):
                picture = self.pipe.vae.decode(few).sample
                found.append(self.pipe.image_processor.postprocess(picture, output_type="pt").float())
        return torch.cat(found)


def main() -> None:
    """Measures, writes the table, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="the CSV; results/sana_nano.csv for all prompts, else in .cache")
    parser.add_argument("--only", help="only rows whose names begin so, beside the file's others")
    parser.add_argument("--table", type=Path, help="only rewrite the README's table, from this CSV")
    given = parser.parse_args()
    if given.table:
        write_table(given.table)
        return
    whole = given.prompts >= 64
    out = given.out or HERE / ("results" if whole else ".cache") / "sana_nano.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = {row["name"]: row for row in kept(out)} if given.only else {}
    for row in measure(Studio(given.prompts, given.device), tables.device_name(given.device), given.only or ""):
        rows[row["name"]] = row
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(rows.values())
        print(f"{row['name']:22} {row['evaluations']:>5} {row['psnr_db']:>7} plain {row['psnr_plain_db']:>7} "
                  f"ssim {row['ssim']} checked {row['checked']}", flush=True)  # fmt: skip
    if whole and given.out is None:
        write_table(out)


def kept(file: Path) -> list[dict[str, Any]]:
    """The file's rows, if there is one."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def measure(studio: Studio, device: str, only: str) -> Iterator[dict[str, Any]]:
    """A row for each way of drawing."""
    uncached = studio.draw()
    plain: dict[int, float] = {STEPS: float("inf")}
    yield line("uncached", STEPS, uncached, uncached, float("inf"), studio, device)
    for name, recipe in ways().items():
        if not name.startswith(only):
            continue
        with hasten.accelerate(studio.pipe, recipe) as run:
            pictures = studio.draw()
        computed = sum(report.computed for report in run.reports) / len(run.reports)
        steps = max(1, round(computed))
        if steps not in plain:
            plain[steps] = float(psnr(studio.draw(steps), uncached).median())
        yield line(name, computed, pictures, uncached, plain[steps], studio, device)


def line(
    name: str, computed: float, pictures: Tensor, uncached: Tensor, plain: float, studio: Studio, device: str
) -> dict[str, Any]:
    """One row."""
    judged = name == "uncached" or name.startswith("recipe/")  # the checker takes its time
    accepted = checked(pictures.cpu(), studio.scenes) if judged else None
    return {
        "name": name, "evaluations": round(computed, 2), "steps": STEPS, "prompts": len(pictures),
        "psnr_db": round(float(psnr(pictures, uncached).median()), 2), "psnr_plain_db": round(plain, 2),
        "ssim": round(float(ssim(pictures.double(), uncached.double()).median()), 5),
        "checked": "" if accepted is None else round(accepted, 4), "device": device, "torch": torch.__version__,
    }  # fmt: skip


def write_table(file: Path) -> None:
    """The recipes' part of the README."""
    found = {row["name"]: row for row in kept(file)}
    judged = any(row["checked"] for row in found.values())
    head = ["recipe", "computed, of 20", "PSNR, dB", "as many plain steps, dB", "SSIM"]
    head += ["right by the checker"] if judged else []
    body = []
    for name in (*(("uncached",) if judged else ()), *(f"recipe/{name}" for name in RECIPES)):
        row = found[name]
        right = [f"{100 * float(row['checked']):.0f} %" if row["checked"] else "-"] if judged else []
        near = ("", "", "") if name == "uncached" else (row["psnr_db"], row["psnr_plain_db"], row["ssim"])
        body.append([name.removeprefix("recipe/"), f"{float(row['evaluations']):g}", *near, *right])
    tables.rewrite("sana_nano", head, body)


if __name__ == "__main__":
    main()
