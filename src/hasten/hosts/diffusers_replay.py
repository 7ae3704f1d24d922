"""diffusers_replay.py has fused blocks' launches replayed: what a recording stands on, and when there may be one."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from hasten.attention import Attention
from hasten.attention_backends import Ask
from hasten.hosts import diffusers_sana_block
from hasten.hosts.diffusers_attention import OF_RUN
from hasten.hosts.diffusers_blocks import backend_of, layers_at_a_look, still_plain
from hasten.hosts.diffusers_hooks import hooked, parts_of
from hasten.replay import Replays

# The attention to the words: any other processor may do more than launch kernels, which a replay would leave out.
ATTENTIONS = ("SanaAttnProcessor2_0", "HastenSanaAttnProcessor")


def replayed(block: nn.Module, call: Callable[..., Any], replays: Replays) -> Callable[..., Any]:
    """`call`, which runs a FLUX block, by its recording where there can be one."""

    def run(
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Sequence[Tensor]:
        def called(image: Tensor, text: Tensor, emb: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
            out: Sequence[Tensor] = call(
                hidden_states=image,
                encoder_hidden_states=text,
                temb=emb,
                image_rotary_emb=(cos, sin),
                joint_attention_kwargs=joint_attention_kwargs,
            )
            return out

        given = hidden_states, encoder_hidden_states, temb, *image_rotary_emb
        layers = layers_at_a_look(block)
        if not replays.works or not still_plain(block, joint_attention_kwargs, layers):
            return called(*given)
        attention = getattr(block.attn.processor, "hasten_attention", None)  # type: ignore[union-attr]
        rows = hidden_states.shape[1] + encoder_hidden_states.shape[1]
        step, state = _attended(block, attention, block.attn, hidden_states, rows, rows)
        attended = (backend_of(block.attn),) if attention is None else state
        which, marks = (block, attended[0], step), (attended, *_lie(block, layers))
        return replays.run(which, marks, given, called, None if attention is None else attention.used)

    return run


def _attended(
    block: nn.Module, attention: Attention | None, attn: Any, tokens: Tensor, rows: int, keys: int
) -> tuple[Hashable, tuple[Hashable, ...]]:
    """Which kind of step the run is at, by the attention that its blocks take; and what this block's stands on.

    Each kind has recordings of its own, beside the others' and not in their place, of the blocks too that attend alike
    at all of them: results stay lent as long as each lies where the next block's recording reads.
    """
    run: Attention | None = block.__dict__.get(OF_RUN)
    if run is None and attention is None:
        return None, ()
    ask = Ask(tokens.device, tokens.dtype, attn.heads, attn.inner_dim // attn.heads, rows, keys)
    state = () if attention is None else attention.state(ask)
    if run is None or run is attention:
        return state[0], state
    return run.names(ask), state


def _lie(block: Any, layers: Sequence[nn.Module]) -> list[int]:
    """Where the block's weights lie."""
    attn = block.attn.__dict__["_modules"]
    norms = [attn.get(name) for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    return _addresses([*layers, *(norm for norm in norms if norm is not None)])


def _addresses(parts: Sequence[nn.Module]) -> list[int]:
    """Where the parts' own tensors lie. Asked before each replay: by look-ups, not by attributes."""
    found = [part.__dict__ for part in parts]
    lie = (tensor for own in found for kind in ("_parameters", "_buffers") for tensor in own[kind].values())
    return [tensor.data_ptr() for tensor in lie if tensor is not None]


def replayed_sana(block: nn.Module, call: Callable[..., Any], replays: Replays) -> Callable[..., Any]:
    """`call`, which runs a Sana block, by its recording where there can be one."""

    def run(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        tensors = tuple(value for value in given if isinstance(value, Tensor))
        rest = tuple(None if isinstance(value, Tensor) else (type(value), value) for value in given)
        parts = parts_of(block) if replays.works else []
        if (
            not parts
            or not all(value is None or isinstance(value[1], int | None) for value in rest)
            or not diffusers_sana_block.still_plain(block)
            or type(block.attn2.processor).__name__ not in ATTENTIONS  # type: ignore[union-attr]
            or any(type(part).__module__.startswith("peft.") for part in parts)  # a LoRA's strength is a plain number
        ):
            return call(*args, **kwargs)

        positional, names = len(args), tuple(kwargs)  # a recording may keep `called`, which must keep no tensors

        def called(*found: Tensor) -> Sequence[Tensor]:
            left = iter(found)
            values = [next(left) if value is None else value[1] for value in rest]
            return (call(*values[:positional], **dict(zip(names, values[positional:], strict=True))),)

        attention = getattr(block.attn2.processor, "hasten_attention", None)  # type: ignore[union-attr]
        image, words = tensors[0], kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        keys = (image if words is None else words).shape[1]
        step, state = _attended(block, attention, block.attn2, image, image.shape[1], keys)
        marks = state, *parts, *_addresses(parts)
        used = None if attention is None else attention.used
        which = block, state[:1], step, positional, names, rest
        return replays.run(which, marks, tensors, called, used)[0]

    return run


def replayed_end(module: nn.Module, call: Callable[..., Any], replays: Replays) -> Callable[..., Any]:
    """`call`, which makes tensors of a few small ones (a rotation's tables, the modulation's vector), by its recording.

    Dozens of launches of a few microseconds each, with the GPU waiting: nothing of a step is before them.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        parts = parts_of(module) if replays.works and not kwargs else []
        plain = parts and args and all(type(value) is Tensor for value in args)
        if not plain or any(type(part).__module__.startswith("peft.") or hooked(part) for part in parts):
            return call(*args, **kwargs)

        def called(*given: Tensor) -> Sequence[Tensor]:
            out = call(*given)
            return (out,) if isinstance(out, Tensor) else tuple(out)

        out = replays.run(module, tuple(_addresses(parts)), args, called)
        return out[0] if len(out) == 1 else tuple(out)

    return run
