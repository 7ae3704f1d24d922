"""The plain alternatives to every cache: the same time spent on fewer steps, of Euler or of a second-order solver.

Both second-order solvers are multistep, one evaluation a step, and run on FLUX's own shifted sigmas: diffusers'
DPM-Solver multistep makes its own sigmas from `use_flow_sigmas` (they begin below 1 and end elsewhere), which would
change the schedule along with the solver, and FlowMatchHeun knows no dynamic shift.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor


class _Multistep(FlowMatchEulerDiscreteScheduler):
    """Euler's step along a velocity that is corrected with the evaluation before."""

    _before: tuple[float, Tensor] | None = None

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, **kwargs: Any
    ) -> None:
        """As Euler's; the pipeline asks for the name `sigmas` in this signature."""
        super().set_timesteps(num_inference_steps, device=device, sigmas=sigmas, **kwargs)
        self._before = None

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """Euler's step along the corrected velocity."""
        if self.step_index is None:
            self._init_step_index(timestep)
        now, then = (float(self.sigmas[self.step_index + i]) for i in (0, 1))
        return super().step(self._velocity(model_output, sample, now, then), timestep, sample, **kwargs)

    def _velocity(self, velocity: Tensor, sample: Tensor, now: float, then: float) -> Tensor:
        raise NotImplementedError


class AdamsBashforth2(_Multistep):
    """Adams-Bashforth of order 2 for uneven steps."""

    def _velocity(self, velocity: Tensor, sample: Tensor, now: float, then: float) -> Tensor:
        before, self._before = self._before, (now, velocity)
        if before is None:
            return velocity
        ratio = (then - now) / (now - before[0])
        return velocity + 0.5 * ratio * (velocity - before[1])


class DpmSolver2M(_Multistep):
    """DPM-Solver++(2M) for rectified flow, alpha = 1 - sigma. Source: arXiv 2211.01095, algorithm 2.

    The first two steps and the last are of first order: log-SNR is infinite at sigma 1 and at 0.
    """

    def _velocity(self, velocity: Tensor, sample: Tensor, now: float, then: float) -> Tensor:
        clean = sample - now * velocity
        before, self._before = self._before, (now, clean)
        if before is None or before[0] >= 1.0 or then <= 0.0:
            return velocity
        ahead, behind = _log_snr(then) - _log_snr(now), _log_snr(now) - _log_snr(before[0])
        corrected = clean + 0.5 * ahead / behind * (clean - before[1])
        return (sample - corrected) / now


def _log_snr(sigma: float) -> float:
    return math.log((1.0 - sigma) / sigma)


SOLVERS = {"euler": None, "adams-bashforth 2": AdamsBashforth2, "dpm++ 2m": DpmSolver2M}


@dataclass(frozen=True)
class FewerSteps:
    """`steps` uncached steps of a solver: as many evaluations."""

    steps: int
    solver: str = "euler"

    @contextmanager
    def on(self, pipe: Any) -> Iterator[None]:
        """The pipeline with that solver's scheduler in place of its own."""
        before = pipe.scheduler
        kind = SOLVERS[self.solver]
        if kind is not None:
            pipe.scheduler = kind.from_config(before.config)
        try:
            yield
        finally:
            pipe.scheduler = before
