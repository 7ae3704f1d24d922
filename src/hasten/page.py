"""The demo's page: one HTML file that needs nothing else, works without JavaScript and says every figure's meaning.

It turns a Demo into text; the look lies in page.css.
"""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from hasten.compare import Row
from hasten.generate import png
from hasten.showing import Average, Demo, Showing

COLUMNS = {
    "computed": (
        "How many of the model's evaluations were really computed. A picture is drawn in steps, and each step "
        "asks the large model once; the others were stood in for by what the model had said before."
    ),
    "time": "Seconds for denoising and decoding one picture on this machine. Loading, reading the prompt and a "
    "short warm-up are not counted, for any of the runs.",
    "speed-up": "The uncached picture's time divided by this one's, measured in this run.",
    "PSNR": "How near the picture is to the uncached one, in decibels, before both are rounded to 8 bits: about 20 is "
    "a different picture of the same thing, 30 is hard to tell apart, 40 very hard; “identical” means every pixel is "
    "equal. It measures nearness, not beauty: a picture may drift away and be just as good.",
    "SSIM": "The same question asked about structure instead of pixels: 1 is equal, 0 is unrelated.",
    "plain steps": "The alternative that anyone has without this library: nothing reused, only fewer steps, as many "
    "as the recipe computed. A recipe is worth something only where it comes nearer than that.",
    "cache": "The most memory that the remembered results took, in MiB.",
}


LEGEND = """<div class="legend">
<p><i class="c"></i>computed</p>
<p><i class="r"></i>reused</p>
<p><i class="f"></i>plain, fewer steps</p>
</div>"""


def page(demo: Demo) -> str:
    """The whole page as HTML text."""
    steps = demo.showings[0].request.steps
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    sections = "\n".join(_section(demo, showing) for showing in demo.showings)
    other = "" if demo.other is None else _other(demo.other)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>hasten: the same seed, computed less</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>The same seed, computed less</h1>
<p class="lead">A diffusion model draws a picture in many small steps, and neighbouring steps compute nearly the same
thing. hasten remembers what the model said and computes only some of the {steps} steps. Below: what that saved,
and what it cost.</p>
<p class="circumstances">{escape(demo.circumstances)}</p>
{_doubt(demo)}
</header>
<main>
<section>
<h2>In short</h2>
{_table(demo)}
{_chart(demo.averages)}
</section>
{sections}
{other}
<section>
<h2>What the figures mean</h2>
<dl>
{_meanings()}
</dl>
</section>
</main>
<footer>Written by <code>hasten demo</code> {escape(_version())}. The figures are of this run on this machine,
in the quick demo the quicker of two takes; they change a little from run to run, the pictures do not.</footer>
</body>
</html>
"""


def _doubt(demo: Demo) -> str:
    return f'<p class="down">{escape(demo.doubt.capitalize())}</p>' if demo.doubt else ""


def _other(demo: Demo) -> str:
    """Another model's part of the page."""
    sections = "\n".join(_section(demo, showing) for showing in demo.showings)
    return f"""<section>
<h2>The same on {escape(demo.painter.model)}</h2>
<p class="circumstances">{escape(demo.circumstances)}</p>
{_doubt(demo)}
{_table(demo)}
{_chart(demo.averages)}
</section>
{sections}"""


def _table(demo: Demo) -> str:
    """The averages over the prompts, one line for each way of drawing."""
    count = len(demo.showings)
    over = f"Mean of {count} prompts" if count > 1 else "One prompt"
    lines = "\n".join(_table_line(average, demo.descriptions.get(average.name, "")) for average in demo.averages)
    return f"""<div class="scroll">
<table>
<thead>
<tr><th rowspan="2">recipe</th><th rowspan="2">computed</th><th rowspan="2">time</th><th rowspan="2">speed-up</th>
<th colspan="2">nearness to the uncached picture</th><th colspan="2" class="rival">the same number of plain steps</th>
<th rowspan="2">cache</th></tr>
<tr><th>PSNR</th><th>SSIM</th><th class="rival">PSNR</th><th class="rival">SSIM</th></tr>
</thead>
<tbody>
{lines}
</tbody>
</table>
</div>
<p class="under">{over}; “plain steps” is the alternative without hasten: only as many steps as were computed.
▲ nearer than that, ▼ not.</p>"""


def _table_line(average: Average, description: str) -> str:
    first = f'<th scope="row" title="{escape(description)}">{escape(average.name)}</th>'
    cost = f"<td>{average.computed:.3g} of {average.steps:.3g}</td><td>{average.wall_s:.2f} s</td>"
    if average.fewer is None:
        return (
            f'<tr>{first}{cost}<td>1.00x</td><td colspan="4" class="none">the measure of the others</td><td></td></tr>'
        )
    fewer = average.fewer
    return (
        f"<tr>{first}{cost}<td>{average.speedup:.2f}x</td>"
        f"<td>{_mark(average, fewer)}{average.psnr_words}</td><td>{average.ssim:.3f}</td>"
        f'<td class="rival">{fewer.psnr_words}</td><td class="rival">{fewer.ssim:.3f}</td>'
        f"<td>{average.cache_mib:.2f} MiB</td></tr>"
    )


def _mark(ours: Average, rival: Average) -> str:
    """A small triangle: up where the recipe came nearer than plain steps, down where it did not."""
    difference = _difference(ours.psnr_db, rival.psnr_db)
    if difference is None or abs(difference) < 0.05:
        return ""
    if difference > 0:
        return '<span class="up" title="nearer than plain steps">▲</span> '
    return '<span class="down" title="plain steps came nearer">▼</span> '


def _difference(ours: float | None, rival: float | None) -> float | None:
    return None if ours is None or rival is None else ours - rival


def _section(demo: Demo, showing: Showing) -> str:
    baseline = showing.rows[0]
    cards = "\n".join(_card(row, demo.descriptions.get(row.name, "")) for row in showing.rows[1:])
    return f"""<section>
<h2><q>{escape(showing.request.prompt)}</q></h2>
<div class="cards">
<article class="card">
<h3>uncached</h3>
<p class="about">Every step computed.</p>
<div class="pair">
{_figure(baseline, f"all {baseline.steps} computed")}
{LEGEND}
</div>
<p class="verdict">The picture that the others are held against.</p>
</article>
{cards}
</div>
</section>"""


def _card(row: Row, description: str) -> str:
    assert row.fewer is not None, "every recipe is shown beside its rival"
    return f"""<article class="card">
<h3>{escape(row.name)}</h3>
<p class="about">{escape(description)}</p>
<div class="pair">
{_figure(row, f"{row.computed} of {len(row.strip)} computed")}
{_figure(row.fewer, row.fewer.name)}
</div>
<p class="verdict">{_verdict(row, row.fewer)}</p>
</article>"""


def _figure(row: Row, words: str) -> str:
    image = row.drawing.images[0]
    data = base64.b64encode(png(image)).decode()
    figures = [f"{row.drawing.wall_s:.2f} s"]
    if row.kind != "baseline":
        figures += [f"{row.speedup:.2f}x", row.likeness.psnr_words, f"SSIM {row.likeness.ssim:.3f}"]
    spans = "".join(f"<span>{escape(figure)}</span>" for figure in figures)
    return f"""<figure class="{row.kind}">
<img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" alt="{escape(row.name)}">
{_strip(row)}
<figcaption><b>{escape(words)}</b> {spans}</figcaption>
</figure>"""


def _strip(row: Row) -> str:
    """One cell for each evaluation, filled where it was computed."""
    kinds = {"C": "c", "P": "p", ".": "r"}
    cells = "".join(f'<i class="{kinds[letter]}"></i>' for letter in row.strip)
    computed = [str(i + 1) for i, letter in enumerate(row.strip) if letter != "."]
    label = f"computed in steps {', '.join(computed)} of {len(row.strip)}"
    return f'<div class="strip" role="img" aria-label="{label}" title="{label}">{cells}</div>'


def _verdict(row: Row, rival: Row) -> str:
    difference = _difference(row.likeness.psnr_db, rival.likeness.psnr_db)
    if row.likeness.psnr_db is None:
        return "Identical to the uncached picture, pixel for pixel."
    if difference is None:
        return "Plain steps drew the uncached picture itself here: nothing was saved."
    if abs(difference) < 0.05:
        return "As near as the same number of plain steps."
    if difference > 0:
        return f"{difference:.1f} dB nearer than the same number of plain steps."
    return f"{-difference:.1f} dB further off than the same number of plain steps: not worth it here."


def _meanings() -> str:
    return "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(words)}</dd>" for name, words in COLUMNS.items())


def _version() -> str:
    import hasten

    return hasten.__version__


def _chart(lines: list[Average]) -> str:
    """PSNR over evaluations: the recipes as dots, plain steps as the line they have to stand above."""
    dots = [(line.computed, line.psnr_db, line.name) for line in lines if line.fewer and line.psnr_db is not None]
    rivals = {
        line.fewer.computed: line.fewer.psnr_db for line in lines if line.fewer and line.fewer.psnr_db is not None
    }
    heights = [y for _, y, _ in dots] + list(rivals.values())
    if len(dots) < 2 or len(rivals) < 2:
        return ""
    low, high = 5 * (min(heights) // 5), 5 * (max(heights) // 5 + 1)
    most = max(line.steps for line in lines)

    def at(x: float, y: float) -> tuple[float, float]:
        return 48 + 560 * x / most, 250 - 220 * (y - low) / (high - low)

    marks = []
    value = low
    while value <= high:
        y = at(0, value)[1]
        marks.append(
            f'<path class="grid" d="M48 {y:.1f}H608"/><text x="40" y="{y + 4:.1f}" class="end">{value:g}</text>'
        )
        value += 5 if high - low <= 30 else 10
    for step in range(0, int(most) + 1, 4):
        marks.append(f'<text x="{at(step, low)[0]:.1f}" y="270" class="mid">{step}</text>')
    points = [at(x, y) for x, y in sorted(rivals.items())]
    marks.append('<path class="rival" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + '"/>')
    marks += [f'<circle class="rival" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points]
    taken: list[tuple[float, float]] = []
    for computed, psnr, name in sorted(dots):
        x, y = at(computed, psnr)
        # A name goes under its dot where another's stands above already.
        crowded = any(abs(x - u) < 60 and abs(y - v) < 18 for u, v in taken)
        taken.append((x, y))
        marks.append(f'<circle class="ours" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        marks.append(f'<text x="{x:.1f}" y="{y + (22 if crowded else -12):.1f}" class="mid name">{escape(name)}</text>')
    return f"""<figure class="chart">
<svg viewBox="0 0 640 300" role="img" aria-label="PSNR over computed evaluations, recipes and plain steps">
{"".join(marks)}
<text x="328" y="292" class="mid">evaluations computed</text>
<text x="48" y="16">PSNR against the uncached picture, dB</text>
</svg>
<figcaption><b class="ours">●</b> recipes <b class="rival">—</b> plain steps. A recipe earns its place where its dot
stands above the line.</figcaption>
</figure>"""
