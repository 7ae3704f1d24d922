"""Muon for matrices and convolutions: momentum whose update is made orthogonal (Keller Jordan, 2024).

torch.optim.Muon takes 2D parameters only; the autoencoder's are 4D (flattened here to out x rest).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz, steepest at zero (Jordan's post)


def orthogonal(matrix: Tensor, steps: int = 4) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly (singular values within 0.7..1.2). (..., M, N), any float dtype."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal; the step's root mean square is that of Adam at the same rate.

    Scale: 0.2 * sqrt(max(rows, columns)), from Moonlight (2025), so that Adam's rates and decay carry over.
    """

    def __init__(
        self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                moments = [self.state[p].setdefault("moment", torch.zeros_like(p)) for p in parameters]
                grads = [p.grad for p in parameters]
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, moments, group["momentum"])
                rows, columns = shape[0], shape.numel() // shape[0]
                update = orthogonal(torch.stack([g.reshape(rows, columns) for g in ahead]))
                scale = 0.2 * max(rows, columns) ** 0.5 * group["lr"]
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                for parameter, step in zip(parameters, update, strict=True):
                    parameter.add_(step.reshape(shape), alpha=-scale)
