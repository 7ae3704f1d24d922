"""diffusers.py ties the engine to diffusers: a pipeline's calls become runs, its transformer's blocks get gates.

A run is seen by wrapping the scheduler *instance* while the `with` lasts; gates are diffusers_handle.py's. All of it is
put back in the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from hasten.hosts.diffusers_beside import modules_beside
from hasten.hosts.diffusers_families import family_of
from hasten.hosts.diffusers_handle import Handle, unwrapped
from hasten.hosts.diffusers_runs import Runs
from hasten.hosts.diffusers_stack import Stack, stack_for
from hasten.lane import Watch
from hasten.plan import make_plan
from hasten.recipe import Recipe
from hasten.report import Report

RecipeLike = Recipe | str | Path | Mapping[str, Any]


ENTER = "what hasten.accelerate gives is entered, `with hasten.accelerate(pipe, recipe) as run:`."


class Accelerated:
    """A pipeline whose calls are runs, while the `with` lasts."""

    def __init__(self, pipe: Any, recipe: Recipe) -> None:
        for name in ("transformer", "scheduler"):
            if getattr(pipe, name, None) is None:
                raise ValueError(
                    f"{type(pipe).__name__} has no {name}: a FLUX or Sana pipeline of diffusers is expected; for a "
                    "bare transformer use hasten.apply."
                )
        # Says now what is wrong with the recipe, not in the middle of a picture.
        make_plan(recipe, family_of(unwrapped(pipe.transformer)).anatomy)
        self.pipe, self.recipe = pipe, recipe
        self.watch: Watch | None = None
        self._handle: Handle | None = None
        self._runs: list[Runs] = []
        self._waiting = True

    def __del__(self) -> None:
        if getattr(self, "_waiting", False):
            warnings.warn(f"nothing was accelerated: {ENTER}", UserWarning, stacklevel=2)

    @property
    def reports(self) -> list[Report]:
        """One report for each of the latest pipeline calls (at most REPORTS), the one under way included."""
        return [] if self._handle is None else self._handle.reports

    @property
    def report(self) -> Report | None:
        """The last call's report; None before the first. RuntimeError before the `with`."""
        if self._handle is None:
            raise RuntimeError(f"there is no report yet: {ENTER}")
        return self._handle.report

    def __enter__(self) -> Accelerated:
        self._waiting = False
        beside = modules_beside(self.pipe, self.recipe.compile)
        self._handle = Handle(self.pipe.transformer, self.recipe, beside=beside)
        self._handle.watch = self.watch
        try:
            self._runs = [Runs.of(self.pipe.scheduler)]
        except BaseException:
            self._handle.remove()
            raise
        self._runs[0].tell(self._handle)
        self._handle.about_to_call = self._follow_scheduler
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._handle is not None
        for runs in self._runs:
            runs.leave(self._handle)
        self._runs = []
        self._handle.remove()

    def _follow_scheduler(self) -> None:
        """Before each model call: a scheduler that was put into the pipeline since is listened to as well."""
        handle, scheduler = self._handle, self.pipe.scheduler
        assert handle is not None
        if any(runs.scheduler is scheduler for runs in self._runs):
            return
        runs = Runs.of(scheduler)
        runs.tell(handle)
        self._runs.append(runs)
        runs.begin(handle)  # its timesteps were set unseen


def accelerate(pipe: Any, recipe: RecipeLike = "balanced") -> Accelerated:
    """A context in which `pipe`'s calls follow `recipe`; its `.report` and `.reports` say what happened.

    pipe: any FLUX pipeline of diffusers (text-to-image, img2img, inpaint, fill, Kontext, control, ControlNet) or Sana
    pipeline (Sana, Sprint, image-to-image, ControlNet). recipe: a shipped name, a file, a dict, a Recipe, or "none".
    Raises ValueError in one sentence when the pipeline is neither or the recipe does not fit it.
    """
    return Accelerated(pipe, Recipe.load(recipe))


def apply(transformer: nn.Module, recipe: RecipeLike = "balanced") -> Handle:
    """Applies `recipe` to a bare transformer; reuse happens only inside `with handle.run(sigmas)`.

    Raises ValueError when the model is no FLUX and no Sana, is accelerated already, or lacks blocks that the recipe
    names.
    """
    return Handle(transformer, Recipe.load(recipe))


def prepare(model: Any, recipe: RecipeLike, *, device: torch.device | str | None = None) -> Stack:
    """Does once what the recipe's [compile] and [quantize] ask for, to a pipeline or a bare transformer; for good.

    Runs that follow, under this recipe or under one without those sections, stand on it; the stack's `undo` takes it
    back. device: where quantised weights are made, one layer at a time, before the rest of the model is moved there.
    Raises ValueError in one sentence for what this machine cannot do, or when it was done otherwise already.
    """
    wanted = Recipe.load(recipe)
    if device is not None:
        device = _reached(device)
    transformer = unwrapped(getattr(model, "transformer", model))
    family_of(transformer)
    if not wanted.changes_model:
        raise ValueError("the recipe asks for nothing to be done to the model: give it a [compile] or [quantize].")
    beside = modules_beside(model, wanted.compile)
    stack, _ = stack_for(transformer, wanted, beside=beside, device=device)
    assert stack is not None
    return stack


def _reached(device: torch.device | str) -> torch.device:
    """The device, which was tried. Raises ValueError for one that is not here."""
    try:
        at = torch.device(device)
        torch.empty(0, device=at)
    except (RuntimeError, AssertionError):  # the latter is torch's word for a build without CUDA
        here = "cuda or cpu" if torch.cuda.is_available() else "cpu"
        raise ValueError(f"there is no device {str(device)!r} here: choose {here}, or leave it out.") from None
    return at
