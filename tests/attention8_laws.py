"""What must hold of the 8-bit kernels, on any device; test_attention8.py runs these interpreted and compiled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hasten.attention_backends import BACKENDS, sparse_fused
from hasten.kernels.attention8 import attend_plain, attention8, attention8_sparse
from hasten.kernels.chosen import choose
from hasten.kernels.curve import token_order
from hasten.kernels.eight import BLOCK, Norm, Rope, prepare
from hasten.kernels.rows import streams_of
from hasten.kernels.streams import Streams


def near_enough(device: str, fp8: bool) -> float:
    """The mean error over the mean size that is allowed. Triton's interpreter cuts e4m3 off where a GPU rounds."""
    return 0.03 if not fp8 else 0.06 if device == "cuda" else 0.12


def noise(device: str, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half().to(device)


def qkv(device: str, rows: int, dim: int = 64, heads: int = 2, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, with outlying channels in K as trained models have them."""
    q, k, v = (noise(device, batch, heads, rows, dim, seed=i) for i in range(3))
    k[..., 3] += 9.0
    k[..., 40] -= 5.0
    return q, k, v


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape and bool(torch.isfinite(found).all())
    return float((found.float() - exact.float()).abs().sum() / exact.float().abs().sum())


def exactly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask)


def int8_scores_are_their_exact_emulation(device: str) -> None:
    q, k, v = qkv(device, 200)
    eight = prepare(q, k, v, fp8=False)
    q8, k8 = (t[:, :200].double() for t in (eight.q, eight.k))
    step = eight.k_scale.view(2, -1).repeat_interleave(BLOCK, 1)[:, None, :200].double()
    score = q8 @ k8.mT * step * eight.q_scale.view(2, -1)[:, :200, None].double()
    weight = torch.softmax(score * math.log(2), -1)
    found = attend_plain(eight, v, torch.float16).transpose(1, 2)
    # What is left is P's and the result's rounding to float16.
    assert error(found[0], weight @ v[0].double()) < 2e-3


def a_constant_on_every_key_changes_nothing(device: str) -> None:
    q, k, v = qkv(device, 130)
    shift = 4.0 * noise(device, 64, seed=9)
    plain, shifted = (attention8(q, keys, v, fp8=False) for keys in (k, k + shift))
    assert error(shifted, exactly(q, k, v)) < 1.5 * error(plain, exactly(q, k, v)) + 1e-3


def any_length_and_head_size_comes_near_float32(device: str) -> None:
    for rows, dim in ((1, 64), (77, 128), (128, 64), (257, 128)):
        for fp8 in (True, False):
            q, k, v = qkv(device, rows, dim, batch=2)
            assert error(attention8(q, k, v, fp8=fp8), exactly(q, k, v)) < near_enough(device, fp8), (rows, dim, fp8)


def scores_and_sums_beyond_float16_stay_finite(device: str) -> None:
    q, k, v = qkv(device, 200)
    for wide in ((q * 40.0, k * 40.0, v), (q * 0.01, k, v + 200.0)):
        for fp8 in (True, False):
            assert error(attention8(*wide, fp8=fp8), exactly(*wide)) < near_enough(device, fp8)


def rows_and_values_may_be_of_any_size_from_block_to_block(device: str) -> None:
    q, k, v = qkv(device, 600, 128)
    size = torch.tensor([1.0, 300.0, 0.002, 40.0, 7.0], device=device).repeat_interleave(BLOCK)[:600, None]
    long = torch.where(torch.arange(600, device=device) % 3 == 0, 12.0, 1.0)[:, None]
    for queries, values in ((q, v * size), (q * long, v), (q * long, v * size)):
        given = queries.to(q.dtype), k, values.to(v.dtype)
        assert error(attention8(*given), exactly(*given)) < near_enough(device, True)


def one_key_may_outweigh_all_blocks_behind_it(device: str) -> None:
    q, k, v = (noise(device, 1, 2, 900, 128, seed=i) for i in range(3))
    along = noise(device, 128, seed=7)
    q = q + along  # every query answers to the one key, which no mean of the keys has in it
    for size in (2.0, 6.0, 10.0, 20.0):
        keys = k.clone()
        keys[:, :, 5] = along * size
        assert error(attention8(q, keys, v), exactly(q, keys, v)) < near_enough(device, True), size


def scores_that_are_not_lifted_weigh_something(device: str) -> None:
    """The Hopper kernel's rule, by its constants and the prepared lengths; the same data as above and plain noise."""
    hopper = pytest.importorskip("hasten.kernels.softmax_hopper")
    q, k, v = (noise(device, 1, 2, 900, 128, seed=i) for i in range(3))
    along = noise(device, 128, seed=7)
    for size in (0.0, 2.0, 6.0, 10.0, 20.0):
        keys = k.clone()
        keys[:, :, 5] += along * size
        eight = prepare(q + along * (size > 0.0), keys, v)
        scores = torch.einsum("hnd,hmd->hnm", eight.q.float(), eight.k.float())
        powers = scores * eight.q_scale.view(2, -1, 1)
        powers *= eight.k_scale.view(2, -1).repeat_interleave(BLOCK, 1)[:, None]
        largest = powers.unflatten(2, (-1, BLOCK)).amax(3).cummax(2).values  # (H, N, blocks), of all blocks so far
        least = powers.unflatten(2, (-1, BLOCK)).amin(3)
        assert eight.q_length is not None and eight.k_length is not None
        queries, long = eight.q_length.view(2, -1, 1), eight.k_length.view(2, 1, -1)
        lifted = queries * (long + long.cummax(2).values) > hopper.FAR.value
        # Eighths above which bits are no negative number: the largest's weight, less what V's steps may take of it.
        room = (hopper.TOP.value + hopper.LOW.value) / hopper.EIGHTH.value - 2
        assert bool(((largest - least) * 8.0 < room)[~lifted].all()), size
        assert size in (2.0, 6.0) or bool(lifted.any()) == (size > 0.0)


def strides_are_read_in_place(device: str) -> None:
    packed = noise(device, 1, 130, 3, 2, 64)
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    apart = attention8(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(attention8(q, k, v), apart)
    odd = noise(device, 1, 2, 130, 65)[..., :64]  # rows that begin between two 16-byte words
    assert torch.equal(attention8(odd, odd, odd), attention8(*[odd.contiguous()] * 3))


def norm_rotation_and_two_streams_are_taken_on_the_way(device: str) -> None:
    q, k, v = qkv(device, 200)
    gains = [noise(device, 64, seed=i) * 0.1 + 1.0 for i in range(4)]
    turn = noise(device, 200, 32, seed=5).float()
    cos, sin = turn.cos(), turn.sin()
    twice = Rope(cos.repeat_interleave(2, 1), sin.repeat_interleave(2, 1))
    for length, rope in ((50, Rope(cos, sin)), (BLOCK, twice)):  # a block with text and image, and one of text alone

        def normed(x: Tensor, image: Tensor, text: Tensor, length: int = length) -> Tensor:
            x = x.float()
            x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)
            x = torch.cat((x[:, :, :length] * text.float(), x[:, :, length:] * image.float()), 2)
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

        exact = exactly(normed(q, gains[0], gains[2]), normed(k, gains[1], gains[3]), v)
        text, image = ([t[:, :, part].clone() for t in (q, k, v)] for part in (slice(0, length), slice(length, None)))
        eight = prepare(
            *image, text=(text[0], text[1], text[2]), norm=Norm(gains[0], gains[1], 1e-6, gains[2], gains[3]), rope=rope
        )
        found = attend_plain(eight, v, torch.float16).transpose(1, 2)
        assert error(found, exact) < near_enough(device, True)


def rows_of_a_product_are_read_as_they_lie(device: str) -> None:
    gains = [noise(device, 64, seed=i) * 0.1 + 1.0 for i in range(4)]
    turn = noise(device, 150, 32, seed=5).float()
    for joint in (True, False):
        given = noise(device, 2 * 150, 3 * 2 * 64 + 128)  # wider than its queries, keys and values
        text, image = streams_of(given, 2 * 64, 2, 40, joint)
        of_text, of_image = (
            [t.unflatten(-1, (3, 2, 64))[:, :, i].transpose(1, 2) for i in range(3)] for t in (text, image)
        )
        norm = Norm(gains[0], gains[1], 1e-6, gains[2], gains[3])
        streams = Streams(
            of_image[0], of_image[1], of_image[2], (of_text[0], of_text[1], of_text[2]), norm,
            Rope(turn.cos().repeat_interleave(2, 1)[:, ::2], turn.sin().repeat_interleave(2, 1)[:, ::2]),
        )  # fmt: skip
        q, k, v = streams.joined()
        for name in ("int8", "int8_fp8", "sparse"):
            fused = BACKENDS[name].fused
            assert fused is not None
            found = sparse_fused(1.0, 40)(streams, q.dtype) if name == "sparse" else fused(streams, q.dtype)
            assert error(found.transpose(1, 2), exactly(q, k, v)) < near_enough(device, name != "int8")


def clustered(device: str, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks whose rows resemble each other, as an image's do."""
    q, k, v = (noise(device, 1, 2, rows, 64, seed=i) for i in range(3))
    for first in range(0, rows, BLOCK):
        q[:, :, first : first + BLOCK] += noise(device, 1, 2, 1, 64, seed=100 + first)
        k[:, :, first : first + BLOCK] += noise(device, 1, 2, 1, 64, seed=200 + first)
    return q, k, v


def whole(device: str, value: float) -> Tensor:
    return torch.full((2,), value, device=device)


def keeping_every_block_is_dense(device: str) -> None:
    q, k, v = clustered(device, 300)
    sparse = attention8_sparse(q, k, v, keep=whole(device, 1.0), alike=whole(device, -1.0))
    assert torch.equal(sparse, attend_plain(prepare(q, k, v), v, q.dtype).transpose(1, 2)) or error(
        sparse, exactly(q, k, v)
    ) < near_enough(device, True)


def taken(device: str, rows: int, *, keep: float, alike: float, topk: bool, text_rows: int) -> Tensor:
    """The mask of blocks, (H, blocks, blocks)."""
    q, k, v = clustered(device, rows)
    eight = prepare(q, k, v, means=True)
    chosen = choose(eight, keep=whole(device, keep), alike=whole(device, alike), topk=topk, text_rows=text_rows)
    blocks = chosen.count.shape[1]
    mask = torch.zeros(2, blocks, blocks, dtype=torch.bool, device=device)
    for head in range(2):
        for block in range(blocks):
            mask[head, block, chosen.listed[head, block, : chosen.count[head, block]].long()] = True
    return mask


def chosen_blocks_are_sdpa_with_the_expanded_mask(device: str) -> None:
    for rows, topk, keep in ((640, True, 0.4), (600, False, 0.5)):
        q, k, v = clustered(device, rows)
        mask = taken(device, rows, keep=keep, alike=-1.0, topk=topk, text_rows=100)
        assert 0.2 < mask.float().mean() < 0.9
        expanded = mask.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[None, :, :rows, :rows]
        found = attention8_sparse(
            q, k, v, keep=whole(device, keep), alike=whole(device, -1.0), topk=topk, text_rows=100
        )
        assert error(found, exactly(q, k, v, expanded)) < near_enough(device, True)


def rows_that_are_no_numbers_attend_to_every_block(device: str) -> None:
    q, k, v = clustered(device, 640)
    q[:, :, 200] = float("nan")
    blocks = choose(prepare(q, k, v, means=True, alike=False), keep=whole(device, 0.4), alike=None)
    assert blocks.count.tolist() == [[2, 5, 2, 2, 2]] * 2


def the_order_of_the_rows_changes_blocks_alone(device: str) -> None:
    q, k, v = qkv(device, 300)
    order = token_order(44, 16, 16, torch.device(device))
    given = {"alike": whole(device, -1.0), "text_rows": 44}
    every = attention8_sparse(q, k, v, keep=whole(device, 1.0), order=order, **given)
    assert error(every, exactly(q, k, v)) < near_enough(device, True)
    moved, back = order.long(), order.long().argsort()
    half = attention8_sparse(q, k, v, keep=whole(device, 0.7), order=order, **given)
    by_hand = attention8_sparse(*(t[:, :, moved] for t in (q, k, v)), keep=whole(device, 0.7), **given)
    # The constants that are taken off come from other rows: both round, and elsewhere.
    assert error(half, by_hand[:, :, back]) < 1.5 * near_enough(device, True)


def a_mean_that_speaks_for_any_block_needs_no_likeness(device: str) -> None:
    q, k, v = clustered(device, 640)
    keep = whole(device, 0.4)
    lists = [
        choose(prepare(q, k, v, means=True, alike=alike is not None), keep=keep, alike=alike, topk=topk, text_rows=100)
        for topk in (True, False)
        for alike in (None, whole(device, -1.0))
    ]
    for without, given in (lists[:2], lists[2:]):
        assert torch.equal(without.count, given.count)
        assert all(
            torch.equal(a[:n], b[:n])
            for a, b, n in zip(
                without.listed.flatten(0, 1), given.listed.flatten(0, 1), without.count.flatten().tolist(), strict=True
            )
        )


def text_is_always_on_and_blocks_unlike_themselves_too(device: str) -> None:
    mask = taken(device, 640, keep=0.2, alike=-1.0, topk=True, text_rows=130)
    assert bool(mask[:, :2].all()) and bool(mask[:, :, :2].all())
    assert mask[:, 2:].sum(-1).max() <= 3  # the text's two blocks and the one that was asked for
    assert bool(taken(device, 640, keep=0.2, alike=0.999, topk=True, text_rows=0).all())


def the_weight_to_keep_is_kept_to(device: str) -> None:
    q, k, v = clustered(device, 640)
    means = prepare(q, k, v, means=True).means
    assert means is not None
    share = torch.softmax(means.q @ means.k.mT / 8.0, -1)
    for keep in (0.3, 0.9):
        mask = taken(device, 640, keep=keep, alike=-1.0, topk=False, text_rows=0)
        kept = (share * mask).sum(-1)
        alone = mask.sum(-1) == 1
        assert bool((alone | (kept <= keep + 1e-3)).all())
        heaviest_left = torch.where(mask, 0.0, share).amax(-1)
        assert bool((kept + heaviest_left >= keep - 1e-3).all())


def skipping_what_weighs_nothing_changes_nothing(device: str) -> None:
    q, k, v = clustered(device, 384)
    given = {"keep": whole(device, 1.0), "alike": whole(device, -1.0)}
    # One that skips nothing is by the same kernel; without skip_below a GPU may take another.
    all_of_it = attention8_sparse(q, k, v, skip_below=whole(device, 1e6), **given)
    careful = attention8_sparse(q, k, v, skip_below=whole(device, 50.0), **given)
    assert error(careful, all_of_it) < 1e-3
    # Here every block's best score lies below the row's best so far by less than 2^1, or it is left.
    assert error(attention8_sparse(q, k, v, skip_below=whole(device, 1.0), **given), exactly(q, k, v)) < 0.2
