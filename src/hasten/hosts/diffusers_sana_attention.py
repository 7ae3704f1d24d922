"""diffusers_sana_attention.py: the cross attention of Sana's blocks, by whatever a recipe's [attention] names.

Back-ends take no mask. Sana masks the tokens that only fill a prompt up, so those are left out instead: each sample
attends to its own tokens alone, which is what the mask means. Sana's linear attention has no softmax to take over.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from hasten.attention import Attention


@functools.cache
def sana_processor() -> type[Any]:
    """The class that stands for diffusers' own."""
    from diffusers.models.transformers import sana_transformer as sana

    class HastenSanaAttnProcessor(sana.SanaAttnProcessor2_0):  # type: ignore[misc]
        """SanaAttnProcessor2_0 with another softmax(q k^T) v; what its mask masks is in hasten_attention's `keys`."""

        hasten_attention: Attention

        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
        ) -> Any:
            """What the processor it stands for gives out, (B, N, C)."""
            words = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = attn.to_q(hidden_states), attn.to_k(words), attn.to_v(words)
            if attn.norm_q is not None:
                q = attn.norm_q(q)
            if attn.norm_k is not None:
                k = attn.norm_k(k)
            q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
            out: Tensor = self.hasten_attention(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
            out = attn.to_out[1](attn.to_out[0](out))
            return out / attn.rescale_output_factor

    return HastenSanaAttnProcessor
