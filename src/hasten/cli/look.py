"""Commands that load no model: recipes, doctor."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hasten.cli.options import Json
from hasten.cli.sentence import in_one_sentence


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
