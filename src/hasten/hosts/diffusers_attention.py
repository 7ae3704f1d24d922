"""diffusers_attention.py gives a transformer's blocks the attention that a recipe names, and takes it away again.

Processors of the instances are changed, nothing of diffusers itself; blocks that stay exact keep theirs. Whether a
step stays exact is set from outside, before each call of the model: compiled blocks never see it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hasten import recipe
from hasten.attention import FUSED, Attention
from hasten.attention_keys import Kept, kept_keys
from hasten.attention_streams import asked, attend_streams
from hasten.hosts.diffusers_sana_attention import sana_processor
from hasten.marks import Numbers
from hasten.report import Report
from hasten.sparse import load_settings

# Where every block, those too that keep their own attention, has the attention of the run that it is part of.
OF_RUN = "hasten_attention_of_run"


class HungAttention:
    """A recipe's attention in one transformer's blocks, in the order of `blocks`. apart: one for each block.

    Raises ValueError when the recipe names a block that is not there.
    """

    def __init__(self, blocks: list[nn.Module], wanted: recipe.Attention, *, apart: bool = False) -> None:
        beyond = [index for index in wanted.exact_blocks if index >= len(blocks)]
        if beyond:
            raise ValueError(
                f"attention.exact_blocks names block {beyond[0]}: the model has {len(blocks)} blocks, counted from 0."
            )
        self.wanted = wanted
        self._said: list[str] = []
        self.attention = self._made()
        self.attentions = [self.attention] * len(blocks)
        if apart:
            self.attentions = [self._made() for _ in blocks]
        if wanted.tuned:
            names = block_names(blocks)
            heads = getattr(getattr(blocks[0], "attn", None), "heads", None)
            settings = load_settings(Path(wanted.tuned), names, heads)
            self.attentions = [self._made() for _ in blocks]
            for name, attention in zip(names, self.attentions, strict=True):
                if name in settings:
                    found = settings[name]
                    attention.heads = Numbers(found.keep, found.alike, found.skip_below)
                else:
                    attention.exact = attention.always_exact = True
        self._mask: tuple[Tensor, int] | None = None
        self._kept: Kept | None = None
        self._places: Tensor | None = None
        self._grid: tuple[int, int] | None = None
        self._undo: list[Callable[[], None]] = []
        others: set[str] = set()
        for index, block in enumerate(blocks):
            block.__dict__[OF_RUN] = self.attention
            self._undo.append(functools.partial(block.__dict__.pop, OF_RUN, None))
            # Sana's self-attention is linear: only the one to the words has a softmax.
            attn: Any = getattr(block, "attn2" if type(block).__name__ == "SanaTransformerBlock" else "attn", None)
            processor: Any = getattr(attn, "processor", None)
            ours = _in_place_of(processor)
            if ours is None:
                others.add(type(processor or block).__name__)
            elif index not in wanted.exact_blocks:
                ours.hasten_attention = self.attentions[index]
                attn.processor = ours
                self._undo.append(functools.partial(setattr, attn, "processor", processor))
        if others:
            self._said.append(f"attention of {', '.join(sorted(others))} was left as it is")

    def before_call(self, *, interval: int, intervals: int, text_rows: int, places: Tensor | None = None) -> None:
        """Where in the run the call lies, how many tokens lead as text, and where each of the picture's lies in it.

        places: diffusers' img_ids, (N, 3) or (1, N, 3).
        """
        if self.wanted.backend == "sparse" and places is not self._places:
            self._places, self._grid = places, _grid(places)
        last = interval >= intervals - self.wanted.exact_last
        for attention in {id(a): a for a in (self.attention, *self.attentions)}.values():
            attention.exact = attention.always_exact or last or interval < self.wanted.exact_first
            attention.text_rows, attention.grid = text_rows, self._grid

    def leave_out(self, mask: Tensor | None) -> None:
        """Before each call of a Sana: the words that it masks, see kept_keys. Asks the device once for each mask."""
        # Writes into an inference tensor are not counted: one of those is looked at each time.
        now = None if mask is None or mask.is_inference() else (mask, mask._version)
        if now is None or self._mask is None or self._mask[0] is not mask or self._mask[1] != now[1]:
            self._mask, self._kept = now, kept_keys(mask)
        for attention in (self.attention, *self.attentions):
            attention.kept = self._kept

    def tell(self, report: Report) -> None:
        """What was used since the last time, for a run's report."""
        for attention in self.attentions[1:]:
            if attention is not self.attention:
                for name, count in attention.used.items():
                    self.attention.used[name] = self.attention.used.get(name, 0) + count
                attention.used.clear()
        if self.attention.used:
            report.note(self.attention.line)
        for sentence in self._said:
            report.note(sentence)
        self.attention.used.clear()

    def remove(self) -> None:
        """Gives every block its processor back, and leaves nothing on it."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _made(self) -> Attention:
        wanted = self.wanted
        return Attention(wanted.backend, error=wanted.error, keep=wanted.keep, say=self._said.append)


def _grid(places: Tensor | None) -> tuple[int, int] | None:
    """Rows and columns of a picture whose tokens lie row by row, or None; asks the device once for each run."""
    if places is None or places.shape[-1] != 3:
        return None
    last = places.reshape(-1, 3)[-1].tolist()
    rows, columns = int(last[1]) + 1, int(last[2]) + 1
    return (rows, columns) if rows * columns == places.shape[-2] and last[0] == 0 else None


def block_names(blocks: list[nn.Module]) -> list[str]:
    """The names of a FLUX's blocks in settings' files: `double_blocks.0`, ..., `single_blocks.0`, ..."""
    doubles = sum(type(block).__name__ == "FluxTransformerBlock" for block in blocks)
    return [f"double_blocks.{i}" if i < doubles else f"single_blocks.{i - doubles}" for i in range(len(blocks))]


def _in_place_of(processor: Any) -> Any:
    """Our processor for one of diffusers' own, or None for any other."""
    if type(processor).__name__ == "SanaAttnProcessor2_0":
        return sana_processor()()
    if type(processor).__name__ != "FluxAttnProcessor" or processor._parallel_config is not None:
        return None
    ours = _processor()()
    ours._attention_backend = processor._attention_backend
    return ours


def _norms(attn: Any) -> list[Any]:
    added = [attn.norm_added_q, attn.norm_added_k] if attn.added_kv_proj_dim is not None else []
    return [attn.norm_q, attn.norm_k, *added]


@functools.cache
def _processor() -> type[Any]:
    from diffusers.models.transformers import transformer_flux as flux

    class HastenFluxAttnProcessor(flux.FluxAttnProcessor):  # type: ignore[misc]
        """FluxAttnProcessor with another softmax(q k^T) v; a masked call is its own."""

        hasten_attention: Attention

        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            image_rotary_emb: Any = None,
        ) -> Any:
            """What the processor it stands for gives out."""
            if attention_mask is not None:
                return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            streams: list[Any] = [
                None if t is None else t.unflatten(-1, (-1, attn.head_dim))
                for t in flux._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
            ]
            q, k, v, *of_text = streams
            text = tuple(of_text) if attn.added_kv_proj_dim is not None else None
            if self.fuses(q, None if text is None else text[0], attn):
                norms = [attn.norm_q.weight, attn.norm_k.weight, None, None]
                if text is not None:
                    norms[2:] = attn.norm_added_q.weight, attn.norm_added_k.weight
                out = attend_streams(
                    self.hasten_attention, (q, k, v), text, tuple(norms), attn.norm_q.eps, image_rotary_emb
                )
                return self.given_out(attn, out.flatten(2), encoder_hidden_states)
            q, k = attn.norm_q(q), attn.norm_k(k)
            if attn.added_kv_proj_dim is not None:
                text_q, text_k, text_v = of_text
                text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
                pairs = ((text_q, q), (text_k, k), (text_v, v))
                q, k, v = (torch.cat(pair, dim=1) for pair in pairs)
            if image_rotary_emb is not None:
                q, k = (flux.apply_rotary_emb(t, image_rotary_emb, sequence_dim=1) for t in (q, k))
            out = self.hasten_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
            return self.given_out(attn, out, encoder_hidden_states)

        def fuses(self, q: Tensor, text: Tensor | None, attn: Any) -> bool:
            """Whether norm and rotation are left to the attention. A graph asks by name: it cannot wait for a test."""
            plain = all(type(norm) is torch.nn.RMSNorm and norm.weight is not None for norm in _norms(attn))
            if not plain or torch.compiler.is_compiling():
                return plain and self.hasten_attention.wanted in FUSED
            return self.hasten_attention.fuses(asked(q, text))

        def given_out(self, attn: Any, out: Tensor, encoder_hidden_states: Tensor | None) -> Any:
            """Through the layers behind attention, where the block leaves them to it."""
            if encoder_hidden_states is None:
                return out
            rows = encoder_hidden_states.shape[1]
            image = attn.to_out[1](attn.to_out[0](out[:, rows:].contiguous()))
            return image, attn.to_add_out(out[:, :rows].contiguous())

    return HastenFluxAttnProcessor
