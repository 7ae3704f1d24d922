"""The `hasten` command: parses words, prints findings. What it prints is computed elsewhere.

Results go to stdout; bars, remarks and errors to stderr. Exit codes: 0 done, 2 bad input (one sentence says what),
130 interrupted. Heavy packages are imported inside the commands, so that `hasten --help` is instant.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.table import Table

from hasten.screen import Screen

if TYPE_CHECKING:
    from hasten.painter import FluxPainter
    from hasten.recipe import Recipe

app = typer.Typer(
    name="hasten",
    help="FLUX image generation, several times faster, with an honest account of what it cost.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

BAD_INPUT, INTERRUPTED = 2, 130
P = ParamSpec("P")

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A diffusers folder, a hub name, sana-nano or a .safetensors transformer; flux-nano if left out.",
    ),
]
TransformerFile = Annotated[Path | None, typer.Option("--transformer", help="ComfyUI-style transformer .safetensors.")]
VaeFile = Annotated[Path | None, typer.Option("--vae", help="Autoencoder .safetensors (ae.safetensors).")]
ClipFile = Annotated[Path | None, typer.Option("--clip-l", help="CLIP-L text encoder .safetensors.")]
T5File = Annotated[Path | None, typer.Option("--t5xxl", help="T5-XXL text encoder .safetensors; fp8 is fine.")]
TokenizersPlace = Annotated[
    str | None,
    typer.Option("--tokenizers", help="For single files: a FLUX or ComfyUI folder or a hub name that has tokenizers."),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps; 28 if left out, 20 for Sana, 2 for Sprint.")
]
Size = Annotated[
    str | None,
    typer.Option("--size", help="WxH, divisible by 16 (Sana: 32); 256x256 for the nano models, else 1024x1024."),
]
Seed = Annotated[int, typer.Option("--seed", help="The noise that the picture begins with.")]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", help="FLUX.1-dev's embedded one, 3.5 if left out; Sana's own, 4.5 if left out."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cuda, cuda:N, mps or cpu.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; torch's choice if left out.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No bars and no remarks; errors still come.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and leaves with its exit code."""
    app(args=argv if argv is None else list(argv), prog_name="hasten")


def in_one_sentence(command: Callable[P, None]) -> Callable[P, None]:
    """The command, with bad input and interruption turned into one sentence on stderr and an exit code."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            _fail("interrupted; nothing was written.", INTERRUPTED)
        except (ValueError, OSError) as error:
            _fail(str(error) or type(error).__name__, BAD_INPUT)
        except ImportError as error:
            from hasten.machine import first_line

            _fail(f"a package is missing or does not fit ({first_line(error)}): see `hasten doctor`.", BAD_INPUT)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            _fail("the device ran out of memory: try a smaller --size or --batch, or --dtype bfloat16.", BAD_INPUT)

    return guarded


@app.callback(invoke_without_command=True)
def front(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    """FLUX image generation, several times faster, with an honest account of what it cost."""
    if version:
        import hasten

        print(hasten.__version__)
        raise typer.Exit


@app.command()
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
            help="Also draw it plainly and in fewer plain steps, and say how near they are; these two are not kept.",
        ),
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
    work.check_outputs(out, report, batch)
    where = Model(model, transformer, vae, clip_l, t5xxl, tokenizers)
    options = {"steps": steps, "seed": seed, "guidance": guidance, "batch": batch}
    check = _request_maker(prompt, size, options)
    painter = _painter(screen, where, device, dtype, lambda: check(None), recipe=wanted, threads=threads)
    request = check(painter)
    with screen.progress() as progress:
        outcome = work.generate(painter, request, wanted, compare=compare, progress=progress)
    written = work.write_outcome(outcome, painter, request, wanted, out=out, report=report)
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
        screen.say("only the accelerated picture is kept: `hasten compare` makes a sheet of all")
        if outcome.doubt:
            screen.remark(outcome.doubt)
    for path in written:
        screen.say(str(path))


@app.command()
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
    check = _request_maker(what[0], size, {"steps": steps, "seed": seed, "guidance": guidance})
    painter = _painter(screen, where, device, dtype, lambda: check(None), threads=threads)
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


@app.command()
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
    painter = _painter(screen, Model(model), device, dtype, threads=threads)
    other = _painter(screen, Model(work.OTHER_MODEL), device, dtype) if model is None else None
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


@app.command()
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
    makers = [_request_maker(prompt, size, options) for prompt in prompts or PROMPTS]
    where = Model(model, transformer, vae, clip_l, t5xxl, tokenizers)

    def check() -> None:
        check_calibration([make(None) for make in makers], out)

    painter = _painter(screen, where, device, dtype, check)
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


@app.command("tune-attention")
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
    from hasten.sparse import check_limits
    from hasten.tune_attention import tune_attention as tune

    screen = Screen(quiet=quiet, as_json=False)
    options = {"steps": steps, "seed": seed, "guidance": guidance}
    makers = [_request_maker(prompt, size, options) for prompt in prompts or PROMPTS[:2]]
    where = Model(model, transformer, vae, clip_l, t5xxl, tokenizers)

    def check() -> None:
        check_limits(l1, pv_l1)
        for make in makers:
            make(None)

    with sharing(device) as (rank, world, own_device):
        painter = _painter(screen, where, own_device, dtype, check)
        with screen.progress() as progress:
            said = tune(
                painter, [make(painter) for make in makers], out,
                l1=l1, pv_l1=pv_l1, rank=rank, world=world, progress=progress if rank == 0 else None,
            )  # fmt: skip
        if rank == 0:
            screen.say(f"{out}: {said}")


@app.command()
@in_one_sentence
def recipes(
    name: Annotated[str | None, typer.Argument(help="One of them, to be printed as TOML.")] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, or print one."""
    from hasten.recipe import Recipe, recipe_names

    if name is not None:
        wanted = Recipe.load(name)
        print(json.dumps(wanted.to_dict(), indent=2) if as_json else wanted.to_toml(), end="\n" if as_json else "")
        return
    found = [(name, Recipe.load(name).description) for name in recipe_names()]
    if as_json:
        print(json.dumps([{"name": name, "description": words} for name, words in found], indent=2))
        return
    table = Table.grid(padding=(0, 2))
    for name, words in found:
        table.add_row(f"[bold]{name}[/bold]", words)
    Console().print(table)


@app.command()
@in_one_sentence
def doctor(as_json: Json = False) -> None:
    """Say what works on this machine, and why the rest does not."""
    from hasten.doctor import can_draw, examine

    findings = examine()
    ready = can_draw(findings)
    if as_json:
        plain = {room: [check.to_dict() for check in checks] for room, checks in findings.items()}
        print(json.dumps({"ready": ready, **plain}, indent=2))
        return
    console = Console()
    for room, checks in findings.items():
        console.print(f"\n[bold]{room}[/bold]")
        table = Table.grid(padding=(0, 2))
        for check in checks:
            mark = "[green]✓[/green]" if check.ok else ("[red]✗[/red]" if check.needed else "[dim]-[/dim]")
            table.add_row(f"  {mark}", check.name, check.words if check.ok else f"[dim]{check.words}[/dim]")
        console.print(table)
    console.print("\nhasten can draw here." if ready else "\nhasten cannot draw here: see ✗ above.")


def _painter(
    screen: Screen,
    where: Any,
    device: str,
    dtype: str,
    check: Callable[[], Any] | None = None,
    *,
    recipe: Recipe | None = None,
    threads: int | None = None,
) -> FluxPainter:
    """The loaded model, changed as a recipe asks; what can be found wrong without it is said before it is loaded."""
    from hasten.loading import check_model, is_on_hub, load_painter
    from hasten.machine import pick_device, pick_dtype, use_threads

    if check is not None:
        check()
    use_threads(threads)
    at = pick_device(device)
    kind = pick_dtype(dtype, at)
    check_model(where)
    if recipe is not None and recipe.quantize.format != "none":
        from hasten.quantize import format_for

        format_for(recipe.quantize.format, at)
    with screen.waiting(f"looking for {where.name} on the hub" if is_on_hub(where) else "loading the model"):
        return load_painter(where, device=at, dtype=kind, recipe=recipe)


def _request_maker(prompt: str, size: str | None, options: dict[str, Any]) -> Callable[[FluxPainter | None], Any]:
    """Makes the request; without a painter only to see whether it is a right one."""
    from hasten.loading import SMALL, habits
    from hasten.painter import Request

    def make(painter: FluxPainter | None) -> Any:
        usual = SMALL if painter is None else habits(painter)
        width, height = (usual.side, usual.side) if size is None else _parsed_size(size)
        given = {name: value for name, value in options.items() if value is not None}
        return Request(
            prompt, width=width, height=height, **{"steps": usual.steps, "guidance": usual.guidance, **given}
        )

    return make


def _parsed_size(size: str) -> tuple[int, int]:
    width, cross, height = size.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise ValueError(f"the size is {size!r}: give width and height in pixels such as 1024x768.")
    return int(width), int(height)


def _compare_files(screen: Screen, first: Path, second: Path) -> None:
    from hasten.compare import Likeness, read_picture

    likeness = Likeness.of_pictures(read_picture(first), read_picture(second))
    if screen.silent and not screen.quiet:
        print(json.dumps({"files": [str(first), str(second)], **likeness.to_dict()}, indent=2))
        return
    screen.say(f"PSNR {likeness.psnr_words}, SSIM {likeness.ssim:.4f}")


def _fail(sentence: str, code: int) -> None:
    """The sentence on stderr, in one line, and out."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"hasten: {' '.join(sentence.split())}", markup=False)
    raise typer.Exit(code)
