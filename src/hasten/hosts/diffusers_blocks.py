"""diffusers_blocks.py: what of a diffusers FLUX block blocks.py needs, and when the fused block may stand for it."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from hasten import blocks
from hasten.attention_streams import attend_rows
from hasten.blocks import Part
from hasten.kernels.linear import lay_together
from hasten.kernels.plain_attention import plain_attention
from hasten.quantize import Linear8


class FusedDouble(nn.Module):
    """Stands for a FluxTransformerBlock: the same arguments, the same results but for rounding."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text and image after the block."""
        block: Any = self.block
        attn = block.attn
        if not still_plain(block, joint_attention_kwargs):
            return block._call_impl(  # type: ignore[no-any-return]
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        parts = blocks.Double(
            text=blocks.Stream(
                block.norm1_context.linear,
                [Part(attn.add_q_proj), Part(attn.add_k_proj), Part(attn.add_v_proj)],
                attn.norm_added_q.weight,
                attn.norm_added_k.weight,
                [Part(attn.to_add_out)],
                [Part(block.ff_context.net[0].proj)],
                [Part(block.ff_context.net[2])],
            ),
            image=blocks.Stream(
                block.norm1.linear,
                [Part(attn.to_q), Part(attn.to_k), Part(attn.to_v)],
                attn.norm_q.weight,
                attn.norm_k.weight,
                [Part(attn.to_out[0])],
                [Part(block.ff.net[0].proj)],
                [Part(block.ff.net[2])],
            ),
            heads=attn.heads,
        )
        return blocks.double(
            parts,
            encoder_hidden_states,
            hidden_states,
            temb,
            _pairs(image_rotary_emb),
            lambda q, k, v: _attend(attn, q, k, v),
            _attend_rows(attn),
        )


class FusedSingle(nn.Module):
    """Stands for a FluxSingleTransformerBlock: the same arguments, the same results but for rounding."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text and image after the block."""
        block: Any = self.block
        attn = block.attn
        if not still_plain(block, joint_attention_kwargs):
            return block._call_impl(  # type: ignore[no-any-return]
                hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs
            )
        parts = blocks.Single(
            mods=block.norm.linear,
            qkv=[Part(attn.to_q), Part(attn.to_k), Part(attn.to_v)],
            q_norm=attn.norm_q.weight,
            k_norm=attn.norm_k.weight,
            up=[Part(block.proj_mlp)],
            down=[Part(block.proj_out)],
            heads=attn.heads,
        )
        return blocks.single(
            parts,
            encoder_hidden_states,
            hidden_states,
            temb,
            _pairs(image_rotary_emb),
            lambda q, k, v: _attend(attn, q, k, v),
            _attend_rows(attn),
        )


FUSED: dict[str, type[nn.Module]] = {
    "FluxTransformerBlock": FusedDouble,
    "FluxSingleTransformerBlock": FusedSingle,
}


def fused(block: nn.Module) -> nn.Module | None:
    """The fused block over the same layers, or None for a block that is none of FLUX's own, or was altered."""
    kind = FUSED.get(type(block).__name__)
    if kind is None or not _plain(block):
        return None
    return kind(block)


def lay_layers_together(block: nn.Module) -> None:
    """Gives layers with one input weights that lie one behind the other; the values stay as they are."""
    for layers in _side_by_side(block):
        eight = all(isinstance(layer, Linear8) for layer in layers)
        for name in ("weight8", "scale8", "bias") if eight else ("weight", "bias"):
            for layer, tensor in zip(
                layers, lay_together([getattr(layer, name).data for layer in layers]), strict=True
            ):
                getattr(layer, name).data = tensor


def lay_layers_apart(block: nn.Module) -> None:
    """Gives each layer memory of its own again; those that have are left alone."""
    for layer in (layer for layers in _side_by_side(block) for layer in layers):
        for tensor in (*layer.parameters(), *layer.buffers()):  # an adapter may have come around it
            if tensor.untyped_storage().nbytes() > tensor.nbytes:
                tensor.data = tensor.data.clone()


def _side_by_side(block: Any) -> list[list[Any]]:
    attn = block.attn
    groups = [[attn.to_q, attn.to_k, attn.to_v]]
    if hasattr(attn, "add_q_proj"):
        groups.append([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj])
    elif isinstance(block.proj_mlp, Linear8):  # in 16 bits gelu is the wide layer's last step, so it goes alone
        groups[0].append(block.proj_mlp)
    return groups


def _plain(block: nn.Module) -> bool:
    """Whether the block is FLUX's own: its attention, plain layers with plain weights, no hook (offloading, casting)
    on any part, for a hook would never be called."""
    attn: Any = block.attn
    norms = [module for module in block.modules() if hasattr(module, "eps")]
    if not still_plain(block, None) or getattr(attn, "fused_projections", False):
        return False
    if any(norm.eps != blocks.EPS for norm in norms):
        return False
    for layer in layers_of(block):
        if layer.bias is None or (type(layer) is nn.Linear and type(layer.weight) is not nn.Parameter):
            return False
    return not any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in block.modules())


def still_plain(
    block: nn.Module, joint_attention_kwargs: dict[str, Any] | None, layers: list[Any] | None = None
) -> bool:
    """Whether this call may go through the fused block: adapters may have come since (LoRA), or an attention that
    takes more than queries, keys and values. layers: the block's, where they are known."""
    processor: Any = block.attn.processor  # type: ignore[union-attr]
    if type(processor).__name__ not in ("FluxAttnProcessor", "HastenFluxAttnProcessor"):
        return False
    if getattr(processor, "_parallel_config", None) is not None:
        return False
    if joint_attention_kwargs and any(name != "scale" for name in joint_attention_kwargs):
        return False
    found = layers_of(block) if layers is None else layers
    return all(type(layer) is nn.Linear or type(layer) is Linear8 for layer in found)


def layers_of(block: Any) -> list[Any]:
    """Every linear layer of a block."""
    attn = block.attn
    shared = [attn.to_q, attn.to_k, attn.to_v]
    if not hasattr(attn, "add_q_proj"):
        return [*shared, block.norm.linear, block.proj_mlp, block.proj_out]
    return [
        *shared,
        *(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.to_out[0], attn.to_add_out),
        *(block.norm1.linear, block.norm1_context.linear),
        *(block.ff.net[0].proj, block.ff.net[2], block.ff_context.net[0].proj, block.ff_context.net[2]),
    ]


def layers_at_a_look(block: nn.Module) -> list[Any]:
    """layers_of by torch's own dictionaries, before each replay: a tenth of its time. The compiler reads layers_of."""
    own = block.__dict__["_modules"]
    attn = own["attn"].__dict__["_modules"]
    found = [attn["to_q"], attn["to_k"], attn["to_v"]]
    if "add_q_proj" not in attn:
        return [*found, own["norm"].__dict__["_modules"]["linear"], own["proj_mlp"], own["proj_out"]]
    found += [attn["add_q_proj"], attn["add_k_proj"], attn["add_v_proj"]]
    found += [attn["to_out"].__dict__["_modules"]["0"], attn["to_add_out"]]
    found += [own[name].__dict__["_modules"]["linear"] for name in ("norm1", "norm1_context")]
    for name in ("ff", "ff_context"):
        net = own[name].__dict__["_modules"]["net"].__dict__["_modules"]
        found += [net["0"].__dict__["_modules"]["proj"], net["2"]]
    return found


def _pairs(rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """diffusers repeats each angle for both numbers of a pair: (S, D) to (S, D / 2)."""
    cos, sin = rope
    return cos[:, ::2], sin[:, ::2]


def backend_of(attn: Any) -> str:
    """The name of diffusers' back-end that computes this attention, where no recipe's does."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    chosen = attn.processor._attention_backend
    if chosen is None:
        chosen = _AttentionBackendRegistry.get_active_backend()[0]
    name: str = getattr(chosen, "value", chosen)
    return name


def _attend_rows(attn: Any) -> blocks.AttendRows | None:
    """A recipe's attention, which may take rows as they are; None for diffusers' own."""
    ours = getattr(attn.processor, "hasten_attention", None)
    return None if ours is None else functools.partial(attend_rows, ours)


def _attend(attn: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    ours = getattr(attn.processor, "hasten_attention", None)
    if ours is not None:
        attended: Tensor = ours(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        return attended
    name = backend_of(attn)
    if name in ("native", "_native_cudnn"):
        return plain_attention(q, k, v, cudnn=name == "_native_cudnn")
    out: Tensor = dispatch_attention_fn(
        q, k, v, dropout_p=0.0, is_causal=False, backend=attn.processor._attention_backend
    )
    return out
