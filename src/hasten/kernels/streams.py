"""Queries, keys and values as a model's layers leave them: image and text apart, not yet normed, not yet rotated.

Our kernels take them so, and norm and rotate while they turn them into 8 bits; for any other attention `joined` does
the same in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.kernels.eight import Eight, Norm, Rope, prepare


@dataclass(frozen=True)
class Streams:
    """q, k, v: the image's, (B, H, N, D) with any strides but a dense last one; text: the same of the text, before it.

    norm: RMS norm's weights; rope: the rotation of the whole sequence, text first.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    text: tuple[Tensor, Tensor, Tensor] | None
    norm: Norm
    rope: Rope | None

    @property
    def rows(self) -> int:
        """Tokens of text and image."""
        return self.q.shape[2] + (0 if self.text is None else self.text[0].shape[2])

    def values(self) -> Tensor:
        """v of the whole sequence, (B, H, N, D)."""
        return self.v if self.text is None else torch.cat((self.text[2], self.v), 2)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of the whole sequence, normed and rotated by torch, step by step as diffusers does."""
        norm, width = self.norm, (self.q.shape[-1],)
        q, k = (
            torch.nn.functional.rms_norm(x, width, weight.to(x.dtype), norm.eps)
            for x, weight in ((self.q, norm.q), (self.k, norm.k))
        )
        if self.text is not None:
            gains = (norm.q if norm.text_q is None else norm.text_q, norm.k if norm.text_k is None else norm.text_k)
            of_text = (
                torch.nn.functional.rms_norm(x, width, weight.to(x.dtype), norm.eps)
                for x, weight in zip(self.text, gains, strict=False)
            )
            q, k = (torch.cat((text, image), 2) for text, image in zip(of_text, (q, k), strict=True))
        if self.rope is not None:
            q, k = _rotated(q, self.rope), _rotated(k, self.rope)
        return q, k, self.values()

    def eight(self, *, fp8: bool, means: bool = False, alike: bool = True, order: Tensor | None = None) -> Eight:
        """The same in 8 bits, in one pass."""
        return prepare(
            self.q, self.k, self.v, text=self.text, norm=self.norm, rope=self.rope, fp8=fp8, means=means, alike=alike,
            order=order,
        )  # fmt: skip


# To (B, N, H, D) of the given dtype.
Fused = Callable[[Streams, torch.dtype], Tensor]


def _rotated(x: Tensor, rope: Rope) -> Tensor:
    cos, sin = (t if t.shape[-1] == x.shape[-1] else t.repeat_interleave(2, -1) for t in (rope.cos, rope.sin))
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-imaginary, real), -1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)
