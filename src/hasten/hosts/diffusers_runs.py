"""diffusers_runs.py sees runs begin and steps end on a scheduler *instance*; its class is left alone.

A scheduler is wrapped once, however many accelerated pipelines share it, and is put back when the last of them
leaves, in whatever order they do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol


class Listener(Protocol):
    """Who is told of a scheduler's runs."""

    def end(self) -> None:
        """The run under way, if any, is over."""

    def await_run(
        self,
        sigmas: Callable[[], list[float]],
        sigma: Callable[[], float | None],
        before: Callable[[], int | None],
    ) -> None:
        """A run begins with the next model call."""

    def move_on(self) -> None:
        """A step was made: the next call is a new evaluation."""


class Runs:
    """One scheduler's runs, and who listens to them."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._listeners: list[Listener] = []
        self._schedule: list[float] = []
        self._before = {name: scheduler.__dict__.get(name) for name in ("set_timesteps", "step")}
        self._ours = {"set_timesteps": self._begins(scheduler.set_timesteps), "step": self._steps(scheduler.step)}
        for name, wrapper in self._ours.items():
            wrapper.hasten_runs = self
            setattr(scheduler, name, wrapper)

    @classmethod
    def of(cls, scheduler: Any) -> Runs:
        """The scheduler's runs, whether someone listens to them already or not."""
        runs = getattr(scheduler.__dict__.get("step"), "hasten_runs", None)
        return runs if isinstance(runs, cls) and runs.scheduler is scheduler else cls(scheduler)

    def tell(self, listener: Listener) -> None:
        """Tells `listener` from now on."""
        self._listeners.append(listener)

    def leave(self, listener: Listener) -> None:
        """Tells it no more; without listeners the scheduler is as it was before."""
        if listener in self._listeners:
            self._listeners.remove(listener)
        if self._listeners:
            return
        for name, before in self._before.items():
            if self.scheduler.__dict__.get(name) is not self._ours[name]:
                continue  # wrapped by someone else since: left in place, where it only passes on
            if before is None:
                del self.scheduler.__dict__[name]
            else:
                setattr(self.scheduler, name, before)

    def begin(self, listener: Listener) -> None:
        """Tells one listener that a run begins, one whose timesteps are set already."""
        listener.await_run(self._sigmas, self._sigma, self._steps_before)

    def _sigmas(self) -> list[float]:
        # Read when the first call comes: img2img says where it begins only after it set its timesteps.
        self._schedule = scheduler_sigmas(self.scheduler)
        return self._schedule[position(self.scheduler) or 0 :]

    def _sigma(self) -> float | None:
        here = position(self.scheduler)
        return None if here is None or here >= len(self._schedule) else self._schedule[here]

    def _steps_before(self) -> int:
        here = position(self.scheduler) or 0
        return len({*self._schedule[:here]} - {*self._schedule[here : here + 1]})

    def _begins(self, inner: Callable[..., Any]) -> Any:
        @functools.wraps(inner)
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            for listener in list(self._listeners):
                listener.end()
            out = inner(*args, **kwargs)
            for listener in list(self._listeners):
                self.begin(listener)
            return out

        return set_timesteps

    def _steps(self, inner: Callable[..., Any]) -> Any:
        @functools.wraps(inner)
        def step(*args: Any, **kwargs: Any) -> Any:
            out = inner(*args, **kwargs)
            over = (position(self.scheduler) or 0) >= steps_of(self.scheduler)
            for listener in list(self._listeners):
                listener.move_on()
                if over:
                    listener.end()  # what was remembered makes room for the decoder
            return out

        return step


def scheduler_sigmas(scheduler: Any) -> list[float]:
    """The schedule of a run, the final sigma included; one read of the device at the run's beginning."""
    sigmas = getattr(scheduler, "sigmas", None)
    if _counts_angles(scheduler):
        angles = [min(t, math.pi / 2) for t in scheduler.timesteps.tolist()]  # float32 ends a hair above
        return [math.sin(t) / (math.sin(t) + math.cos(t)) for t in angles]
    if sigmas is None:
        train_steps = scheduler.config.num_train_timesteps
        return [*(t / train_steps for t in scheduler.timesteps.tolist()), 0.0]
    return [float(s) for s in sigmas.tolist()]


def steps_of(scheduler: Any) -> int:
    """How many steps a whole run along the scheduler's timesteps makes."""
    return len(scheduler.timesteps) - _counts_angles(scheduler)


def _counts_angles(scheduler: Any) -> bool:
    """Whether its timesteps are TrigFlow's angles, the final one among them (SCM, Sana Sprint).

    x = cos(t) data + sin(t) noise is, but for its length, a flow's point at sigma = sin(t) / (sin(t) + cos(t)).
    """
    return dict(getattr(scheduler, "config", {})).get("prediction_type") == "trigflow"


def position(scheduler: Any) -> int | None:
    """Where in its sigmas the scheduler stands, or None while it cannot be known."""
    here = getattr(scheduler, "step_index", None)
    if here is None:
        here = getattr(scheduler, "begin_index", None)
    return None if here is None else int(here)
