"""Commands that measure a model and write what they found: calibrate, tune-attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.options import (
    ClipFile,
    Device,
    Dtype,
    Guidance,
    Json,
    ModelName,
    Quiet,
    Seed,
    Size,
    Steps,
    T5File,
    TokenizersPlace,
    TransformerFile,
    VaeFile,
)
from hasten.cli.request import load, request_maker
from hasten.cli.sentence import in_one_sentence
from hasten.screen import Screen


@in_one_sentence
def calibrate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts in quotes, three to ten; the demo's six if left out.")
    ] = None,
    model: ModelName = None,
    steps: Steps = None,
    size: Size = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option("--out", help="The recipe file, .toml; printed if left out.")] = None,
    transformer: TransformerFile = None,
    vae: VaeFile = None,
    clip_l: ClipFile = None,
    t5xxl: T5File = None,
    tokenizers: TokenizersPlace = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure MagCache's ratios on a model and make a recipe of them."""
    from hasten.calibrate import calibrated_recipe, check_calibration, write_recipe
    from hasten.demo import PROMPTS
    from hasten.loading import Model

    screen = Screen(quiet=quiet, as_json=as_json)
    options = {"steps": steps, "seed": seed, "guidance": guidance}
    makers = [request_maker(prompt, size, options) for prompt in prompts or PROMPTS]
    where = Model(model, transformer, vae, clip_l, t5xxl, tokenizers)

    def check() -> None:
        check_calibration([make(None) for make in makers], out)

    painter = load(screen, where, device, dtype, check)
    with screen.progress() as progress:
        recipe = calibrated_recipe(painter, [make(painter) for make in makers], progress=progress)
    if out is not None:
        write_recipe(recipe, out)
    if as_json:
        print(json.dumps({"file": str(out) if out else None, "recipe": recipe.to_dict()}, indent=2))
        return
    if out is None:
        print(recipe.to_toml().rstrip())  # the result itself: --quiet does not swallow it
    else:
        screen.say(str(out))


@in_one_sentence
def tune_attention(
    out: Annotated[Path, typer.Option("--out", help="The settings' file, .safetensors; an unfinished one goes on.")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts in quotes, two to four; the demo's first two if left out.")
    ] = None,
    model: ModelName = None,
    l1: Annotated[float, typer.Option("--l1", help="How far a head may be off, relative.")] = 0.06,
    pv_l1: Annotated[float, typer.Option("--pv-l1", help="The same with small weights skipped; above l1.")] = 0.065,
    steps: Steps = None,
    size: Size = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    transformer: TransformerFile = None,
    vae: VaeFile = None,
    clip_l: ClipFile = None,
    t5xxl: T5File = None,
    tokenizers: TokenizersPlace = None,
    quiet: Quiet = False,
) -> None:
    """Search block-sparse attention's settings on a model; several processes under torchrun share the search."""
    from hasten.demo import PROMPTS
    from hasten.loading import Model
    from hasten.machine import sharing
    from hasten.output import check_writable
    from hasten.sparse import check_limits
    from hasten.tune_attention import tune_attention as tune

    screen = Screen(quiet=quiet, as_json=False)
    options = {"steps": steps, "seed": seed, "guidance": guidance}
    makers = [request_maker(prompt, size, options) for prompt in prompts or PROMPTS[:2]]
    where = Model(model, transformer, vae, clip_l, t5xxl, tokenizers)

    def check() -> None:
        check_limits(l1, pv_l1)
        check_writable(out, suffix=".safetensors")
        for make in makers:
            make(None)

    with sharing(device) as (rank, world, own_device):
        painter = load(screen, where, own_device, dtype, check)
        with screen.progress() as progress:
            said = tune(
                painter, [make(painter) for make in makers], out,
                l1=l1, pv_l1=pv_l1, rank=rank, world=world, progress=progress if rank == 0 else None,
            )  # fmt: skip
        if rank == 0:
            screen.say(f"{out}: {said}")
