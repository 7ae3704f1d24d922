"""comfy_sana_network.py lets diffusers' Sana run as a network of ComfyUI's: its leaves cast, its blocks can be patched.

The forward is diffusers' own. For each call it gets a view of the model whose blocks go through ComfyUI's block
patches, under the names that FLUX's double blocks have. Imported when a node runs, inside ComfyUI only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management as management
import torch
from diffusers import SanaTransformer2DModel
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from hasten.attention_keys import Kept, attend_kept, kept_keys

# Embedded guidance of Sprint where no FluxGuidance node is before it: its own pipeline's.
SPRINT_GUIDANCE = 4.5


class SanaNetwork(SanaTransformer2DModel):  # type: ignore[misc]
    """diffusers' Sana with the face that ComfyUI knows: forward(x, timestep, context, ...), dtype, block patches."""

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are kept in."""
        kept: torch.dtype = self.kept_dtype
        return kept

    # Under FLUX's names, for hasten's gates; ComfyUI's compile nodes find transformer_blocks by themselves.
    @property
    def double_blocks(self) -> nn.ModuleList:
        """All blocks."""
        blocks: nn.ModuleList = self.transformer_blocks
        return blocks

    @property
    def single_blocks(self) -> nn.ModuleList:
        """None: text and image are never joined."""
        return nn.ModuleList()

    def modulated(self, image: Tensor, vec: Tensor) -> Tensor:
        """The first block's image tokens after norm, scale and shift, (B, N, C). vec: the time's (B, 6 C)."""
        block = _plain(self.transformer_blocks[0])
        shift, scale = (block.scale_shift_table[None, :2] + vec.reshape(image.shape[0], 6, -1)[:, :2]).chunk(2, dim=1)
        normed: Tensor = block.norm1(image) * (1 + scale) + shift
        return normed

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        guidance: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Tensor:
        """The velocity, (B, C, H, W). context: Gemma's states (B, L, W); attention_mask: (B, L), 1 for a word."""
        to = dict(transformer_options or {})
        if self.config.guidance_embeds:
            given = torch.full((1,), SPRINT_GUIDANCE) if guidance is None else guidance
            guidance = given.to(x).expand(x.shape[0]) * self.config.guidance_embeds_scale
        else:
            guidance = None
        override = to.get("optimized_attention_override")
        kept = None if override is None else kept_keys(attention_mask)
        for block in self.transformer_blocks:
            plain = _plain(block)
            plain.scale_shift_table = plain.table(x)
            plain.attn2.processor.options = to if override is not None else None
            plain.attn2.processor.kept = kept
        out: Tensor = SanaTransformer2DModel.forward(
            self._view(x, to),
            x,
            encoder_hidden_states=context,
            timestep=timestep,
            guidance=guidance,
            encoder_attention_mask=attention_mask,
            return_dict=False,
        )[0]
        return out[:, : x.shape[1]]

    def _view(self, x: Tensor, to: dict[str, Any]) -> Any:
        """This model for one call: its blocks behind their patches, its final table cast. It shares all weights."""
        replaced = to.get("patches_replace", {}).get("dit", {})
        to["total_blocks"], to["block_type"] = len(self.transformer_blocks), "double"
        view = object.__new__(SanaTransformer2DModel)
        view.__dict__.update(self.__dict__)
        view.__dict__["_modules"] = {k: v for k, v in self._modules.items() if k != "transformer_blocks"}
        view.__dict__["transformer_blocks"] = [
            _patched(block, replaced.get(("double_block", i)), {**to, "block_index": i})
            for i, block in enumerate(self.transformer_blocks)
        ]
        view.__dict__["scale_shift_table"] = self.table(x)
        positions = getattr(self.patch_embed, "pos_embed", None)
        if positions is not None and positions.device != x.device:
            self.patch_embed.pos_embed = positions.to(x.device)
        return view


def _patched(block: Any, patch: Any, to: dict[str, Any]) -> Callable[..., Tensor]:
    """The block as diffusers' forward calls it; `patch` in its place where one is hung, as on FLUX's double blocks."""
    if patch is None:
        return block  # type: ignore[no-any-return]

    def call(image: Tensor, unused: None, text: Tensor, mask: Tensor | None, vec: Tensor, *size: int) -> Tensor:
        def original(args: dict[str, Any]) -> dict[str, Any]:
            out = block(args["img"], unused, args["txt"], args["attn_mask"], args["vec"], *size)
            return {"img": out, "txt": args["txt"]}

        args = {"img": image, "txt": text, "vec": vec, "pe": None, "attn_mask": mask, "transformer_options": to}
        out: Tensor = patch(args, {"original_block": original})["img"]
        return out

    return call


class Table(nn.Module):
    """A modulation table as a leaf, so that ComfyUI offloads and casts it like a layer's weight."""

    comfy_cast_weights = True
    bias = None

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []

    def forward(self, like: Tensor) -> Tensor:
        """The table on `like`'s device in its dtype."""
        weight: Tensor = management.cast_to(self.weight, like.dtype, like.device, copy=bool(self.weight_function))
        for function in self.weight_function:
            weight = function(weight)
        return weight


class CrossAttention:
    """diffusers' processor of the cross attention; ComfyUI's where a node of its graph chose another attention.

    Such attentions seldom take a mask: words that it masks are left out instead, each sample with its own.
    """

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.options: dict[str, Any] | None = None
        self.kept: Kept | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The attention's output, (B, N, C)."""
        if self.options is None:
            out: Tensor = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask)
            return out
        from comfy.ldm.modules.attention import optimized_attention

        q, k, v = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            found: Tensor = optimized_attention(
                q, k, v, attn.heads, mask=mask, skip_reshape=True, transformer_options=self.options
            )
            return found

        if attention_mask is not None and torch.compiler.is_compiling():
            # A prompt's length is none of a graph's business.
            out = attend(q, k, v, attention_mask[:, None].expand(-1, attn.heads, -1, -1))
        else:
            out = attend(q, k, v) if self.kept is None else attend_kept(attend, q, k, v, self.kept)
        return attn.to_out[0](out)  # type: ignore[no-any-return]


def build_network(
    *, sana: Mapping[str, Any], dtype: torch.dtype, operations: Any, compute_dtype: torch.dtype | None = None, **_: Any
) -> SanaNetwork:
    """The network without weights (its parameters are on meta), its leaves of ComfyUI's classes.

    sana: SanaTransformer2DModel's arguments. dtype: what weights are kept in; where that is an 8-bit one, only the
    blocks' matrices are, and all else in compute_dtype.
    """
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = SanaNetwork(**sana)
    network.requires_grad_(False).eval()
    network.kept_dtype = dtype
    exact = (compute_dtype or torch.bfloat16) if dtype.itemsize == 1 else dtype
    for name, module in list(network.named_modules()):
        inside = dtype if name.startswith("transformer_blocks.") else exact
        for child, leaf in list(module.named_children()):
            hosted = _hosted(leaf, operations, inside, exact)
            if hosted is not None:
                setattr(module, child, hosted)
        if "scale_shift_table" in module._parameters:
            module.table = Table(module._parameters.pop("scale_shift_table").shape, exact)
    for block in network.transformer_blocks:
        block.attn2.processor = CrossAttention(block.attn2.processor)
    return network


def _hosted(leaf: nn.Module, operations: Any, dtype: torch.dtype, exact: torch.dtype) -> nn.Module | None:
    """The leaf as ComfyUI's class, without weights; None for what has no weights or is no leaf."""
    if type(leaf) is nn.Linear:
        made = operations.Linear(
            leaf.in_features, leaf.out_features, bias=leaf.bias is not None, device="meta", dtype=dtype
        )
    elif type(leaf) is nn.Conv2d:
        made = operations.Conv2d(
            leaf.in_channels, leaf.out_channels, leaf.kernel_size, stride=leaf.stride, padding=leaf.padding,
            dilation=leaf.dilation, groups=leaf.groups, bias=leaf.bias is not None, device="meta", dtype=dtype,
        )  # fmt: skip
    elif type(leaf) is nn.LayerNorm and leaf.elementwise_affine:
        made = operations.LayerNorm(leaf.normalized_shape, eps=leaf.eps, device="meta", dtype=exact)
    elif type(leaf) is RMSNorm and leaf.weight is not None and leaf.bias is None:
        made = operations.RMSNorm(
            tuple(leaf.weight.shape), eps=leaf.eps, elementwise_affine=True, device="meta", dtype=exact
        )
    else:
        return None
    hosted: nn.Module = made.requires_grad_(False)
    return hosted


def put_weights(network: SanaNetwork, state: Mapping[str, Tensor]) -> None:
    """Gives the network the weights, each in the dtype that its place has. `state` is under diffusers' names.

    Raises ValueError in one sentence when one is missing or has no place.
    """
    places = network.state_dict()
    named = {hosted_name(name): tensor for name, tensor in state.items() if name != "patch_embed.pos_embed"}
    astray = sorted(places.keys() ^ named.keys())
    if astray:
        raise ValueError(
            f"this checkpoint does not fit diffusers' Sana ({astray[0]} and {len(astray) - 1} more): download it again."
        )
    for name, place in places.items():
        if named[name].shape != place.shape:
            raise ValueError(f"{name} has shape {tuple(named[name].shape)} where {tuple(place.shape)} is expected.")
    network.load_state_dict({name: named[name].to(place.dtype) for name, place in places.items()}, assign=True)
    network.requires_grad_(False)


def hosted_name(name: str) -> str:
    """A weight's name here, from its name in diffusers: tables are leaves."""
    return name.removesuffix("scale_shift_table") + "table.weight" if name.endswith("scale_shift_table") else name


def saved_name(name: str) -> str:
    """A weight's name in diffusers, from its name here."""
    return name.removesuffix("table.weight") + "scale_shift_table" if name.endswith("table.weight") else name


def _plain(block: Any) -> Any:
    """The block inside torch.compile's wrapper."""
    return getattr(block, "_orig_mod", block)
