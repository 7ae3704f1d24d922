"""What is measured on a model before it is used: MagCache's ratios, and weights fitted to a fixed schedule.

Both come from prompts that are not held out, so that no row of the table has seen what it is judged on. Every least
squares fit needs only inner products between deltas, so one small matrix serves every schedule and every window.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measuring import TRAIN_SIDE, Studio
from torch import Tensor

import hasten
from hasten.calibrate import calibrate
from hasten.moment import Moment
from hasten.predict import newton_weights


@dataclass(frozen=True)
class Calibration:
    """ratios: MagCache's, one for each step. gram: (S, S) inner products of the deltas of S steps; sigmas: (S,)."""

    ratios: tuple[float, ...]
    gram: np.ndarray
    sigmas: tuple[float, ...]


def calibration(studio: Studio, folder: Path, *, prompts: int) -> Calibration:
    """The studio's calibration at its size and steps, from `folder` when it was measured before."""
    file = folder / f"calibration-{studio.settings.key(prompts)}.json"
    if file.is_file():
        data = json.loads(file.read_text(encoding="utf-8"))
        return Calibration(tuple(data["ratios"]), np.array(data["gram"]), tuple(data["sigmas"]))
    from scenes import scenes

    source = scenes(TRAIN_SIDE)
    captions = [next(source).caption for _ in range(prompts)]
    settings = studio.settings
    ratios = calibrate(
        studio.pipe,
        captions[:4],
        num_inference_steps=settings.steps,
        width=settings.width,
        height=settings.height,
        max_sequence_length=settings.text_tokens,
    )
    sigmas, gram = deltas_gram(studio, captions)
    folder.mkdir(parents=True, exist_ok=True)
    data = {"ratios": ratios, "gram": gram.tolist(), "sigmas": sigmas}
    file.write_text(json.dumps(data), encoding="utf-8")
    return Calibration(tuple(ratios), gram, tuple(sigmas))


def deltas_gram(studio: Studio, captions: Sequence[str]) -> tuple[list[float], np.ndarray]:
    """The run's sigmas and the inner products of its deltas, summed over prompts, tokens and channels."""
    steps = studio.settings.steps
    gram = np.zeros((steps, steps))
    run = hasten.accelerate(studio.pipe, {"schema": 1, "cache": {"method": "interval", "every": 1}})
    seen: dict[int, Tensor] = {}
    sigmas: dict[int, float] = {}

    def watch(moment: Moment, history: object, delta: Tensor) -> None:
        seen[moment.interval] = delta.detach().flatten().to(torch.float32).clone()
        sigmas[moment.interval] = moment.sigma

    run.watch = watch
    batch = studio.settings.batch
    with run:
        for first in range(0, len(captions), batch):
            words, pooled = studio.encode(captions[first : first + batch])
            studio.paint(words, pooled, range(first, first + len(words)), kind="latent")
            rows = torch.stack([seen[i] for i in range(steps)])
            gram += (rows @ rows.T).double().cpu().numpy()
    return [sigmas[i] for i in range(steps)], gram


def fitted_weights(measured: Calibration, computed: Sequence[int], *, window: int, pull: float) -> list[list[float]]:
    """A row of weights for each step that is not in `computed`, oldest delta first, fitted by least squares.

    pull: strength of a ridge towards the Taylor weights of order up to 2 (never towards zero, which would shrink the
    delta itself), relative to the mean square of a delta.
    """
    steps = len(measured.sigmas)
    rows = []
    for step in range(steps):
        if step in computed:
            continue
        past = [i for i in computed if i < step][-window:]
        if not past:
            raise ValueError(f"step {step} is reused and no step before it is computed: compute step 0.")
        here = measured.gram[np.ix_(past, past)]
        target = measured.gram[past, step]
        prior = np.array(newton_weights([measured.sigmas[i] for i in past], measured.sigmas[step], 2))
        strength = pull * np.trace(here) / len(past)
        # Around the prior: the correction alone is penalised.
        correction = np.linalg.solve(here + strength * np.eye(len(past)), target - here @ prior)
        rows.append([round(float(w), 6) for w in prior + correction])
    return rows
