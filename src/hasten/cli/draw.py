"""Commands that draw pictures: generate, compare, demo."""

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
    Threads,
    TokenizersPlace,
    TransformerFile,
    VaeFile,
)
from hasten.cli.request import load, request_maker
from hasten.cli.sentence import in_one_sentence
from hasten.screen import Screen


@in_one_sentence
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw, in quotes.")],
    model: ModelName = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="A shipped name, a .toml or .json file, or none.")
    ] = "balanced",
    steps: Steps = None,
    size: Size = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    batch: Annotated[int, typer.Option("--batch", help="Pictures to draw at once; seeds count up.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    out: Annotated[
        Path, typer.Option("--out", help="The picture, FILE-2.png ... for a batch; its folder is made.")
    ] = Path("hasten.png"),
    report: Annotated[Path | None, typer.Option("--report", help="A JSON file for every evaluation's story.")] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also draw it plainly and in fewer plain steps, and say how near they are.",
        ),
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="With --compare: keep these two as FILE-uncached.png and FILE-fewer.png.")
    ] = False,
    transformer: TransformerFile = None,
    vae: VaeFile = None,
    clip_l: ClipFile = None,
    t5xxl: T5File = None,
    tokenizers: TokenizersPlace = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Draw a picture, faster; with --compare also say what that cost."""
    from hasten import generate as work
    from hasten.loading import Model
    from hasten.recipe import Recipe

    screen = Screen(quiet=quiet, as_json=as_json)
    wanted = Recipe.load(recipe)
    if keep and not compare:
        raise ValueError("--keep keeps the pictures that --compare draws beside: give both.")
    work.check_outputs(out, report, batch, keep=keep)
    where = Model(model, transformer, vae, clip_l, t5xxl, tokenizers)
    options = {"steps": steps, "seed": seed, "guidance": guidance, "batch": batch}
    check = request_maker(prompt, size, options)
    painter = load(screen, where, device, dtype, lambda: check(None), recipe=wanted, threads=threads)
    request = check(painter)
    with screen.progress() as progress:
        outcome = work.generate(painter, request, wanted, compare=compare, progress=progress)
    written = work.write_outcome(outcome, painter, request, wanted, out=out, report=report, keep=keep)
    for note in outcome.drawing.notes:
        screen.remark(note)
    if as_json:
        print(json.dumps({"files": [str(path) for path in written], **outcome.report}, indent=2))
        return
    # Measured beside the plain run, the estimate from this run's own times has nothing to say.
    screen.say(f"{outcome.drawing.report.line(estimate=not compare)} · {outcome.drawing.wall_s:.2f} s")
    if outcome.row is not None and outcome.row.fewer is not None:
        row, fewer = outcome.row, outcome.row.fewer
        baseline = row.speedup * row.drawing.wall_s
        screen.say(
            f"uncached {baseline:.2f} s, so {row.speedup:.2f}x; {row.likeness.psnr_words}, SSIM {row.likeness.ssim:.3f}"
        )
        screen.say(
            f"instead {fewer.steps} plain steps: {fewer.drawing.wall_s:.2f} s; "
            f"{fewer.likeness.psnr_words}, SSIM {fewer.likeness.ssim:.3f}"
        )
        if not keep:
            screen.say("only the accelerated picture is kept: --keep keeps all three")
        if outcome.doubt:
            screen.remark(outcome.doubt)
    for path in written:
        screen.say(str(path))


@in_one_sentence
def compare(
    what: Annotated[list[str], typer.Argument(help="One prompt in quotes, or two picture files.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="A recipe to show; may be given again. All shipped if left out."),
    ] = None,
    model: ModelName = None,
    steps: Steps = None,
    size: Size = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option("--out", help="A contact sheet of all pictures, .png.")] = None,
    transformer: TransformerFile = None,
    vae: VaeFile = None,
    clip_l: ClipFile = None,
    t5xxl: T5File = None,
    tokenizers: TokenizersPlace = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Draw one prompt plainly and under each recipe; or hold two picture files against each other."""
    screen = Screen(quiet=quiet, as_json=as_json)
    if len(what) == 2:
        _compare_files(screen, Path(what[0]), Path(what[1]))
        return
    if len(what) != 1:
        raise ValueError(f"compare takes one prompt in quotes or two picture files, not {len(what)} words.")
    from hasten.demo import sheet_of, show
    from hasten.generate import png
    from hasten.loading import Model
    from hasten.output import check_writable, write_files
    from hasten.recipe import Recipe, recipe_names

    names = recipe or recipe_names()
    for name in names:
        Recipe.load(name)
    if out is not None:
        check_writable(out, suffix=".png")
    where = Model(model, transformer, vae, clip_l, t5xxl, tokenizers)
    check = request_maker(what[0], size, {"steps": steps, "seed": seed, "guidance": guidance})
    painter = load(screen, where, device, dtype, lambda: check(None), threads=threads)
    with screen.progress() as progress:
        shown = show(painter, [check(painter)], names, progress=progress)
    if out is not None:
        write_files({out: png(sheet_of(shown))})
    for note in shown.showings[0].rows[0].drawing.notes:
        screen.remark(note)
    if as_json:
        print(json.dumps({"sheet": str(out) if out else None, **shown.to_dict()}, indent=2))
        return
    screen.table(shown.averages, shown.circumstances, shown.doubt)
    if out is not None:
        screen.say(str(out))


@in_one_sentence
def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder of the page and the contact sheet.")] = Path(
        "out/demo"
    ),
    full: Annotated[bool, typer.Option("--full", help="Every prompt at full size and steps; takes minutes.")] = False,
    model: ModelName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show every shipped recipe on the small models that come along: a page and a sheet of pictures."""
    from hasten import demo as work
    from hasten.loading import Model

    screen = Screen(quiet=quiet, as_json=as_json)
    work.check_demo_folder(out)
    painter = load(screen, Model(model), device, dtype, threads=threads)
    other = load(screen, Model(work.OTHER_MODEL), device, dtype) if model is None else None
    with screen.progress() as progress:
        shown = work.run_demo(painter, full=full, other=other, progress=progress)
    page, sheet = work.write_demo(shown, out)
    if as_json:
        print(json.dumps({"page": str(page), "sheet": str(sheet), **shown.to_dict()}, indent=2))
        return
    for part in shown.parts:
        screen.table(part.averages, part.circumstances, part.doubt)
    screen.say(f"the page:  {page.resolve().as_uri()}")
    screen.say(f"the sheet: {sheet}")


def _compare_files(screen: Screen, first: Path, second: Path) -> None:
    from hasten.compare import Likeness, read_picture

    likeness = Likeness.of_pictures(read_picture(first), read_picture(second))
    if screen.silent and not screen.quiet:
        print(json.dumps({"files": [str(first), str(second)], **likeness.to_dict()}, indent=2))
        return
    screen.say(f"PSNR {likeness.psnr_words}, SSIM {likeness.ssim:.4f}")
