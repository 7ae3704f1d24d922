"""Which tokens are refreshed: the original's rule on recorded maps, scores, ages, ratios, and what is kept how."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.anatomy import flux
from hasten.inside import Inside, Remembered
from hasten.kept import Kept
from hasten.kernels.chosen_rows import chosen_rows
from hasten.kernels.gated_sum import gated_sum
from hasten.kernels.rotation import rotated
from hasten.moment import Moment
from hasten.plan import fresh_ratio, make_plan
from hasten.predict import Hold, Taylor
from hasten.recipe import Recipe, Tokens
from hasten.tokens import (
    attention_received,
    attention_score,
    choose,
    fresh_count,
    normalised,
    value_norm,
    with_spatial_bonus,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps(q: Tensor, k: Tensor) -> Tensor:
    """The explicit softmax maps, (B, H, N, N)."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


class OriginalToCa:
    """The original's choice for one layer and stream, step by step, from the explicit maps (ToCa's code for FLUX)."""

    def __init__(self, recorded: Tensor, layer: int, *, double: bool) -> None:
        """recorded: (B, H, queries, keys) of the last full step, cut to this stream's keys."""
        received = recorded.mean(dim=1).mean(dim=1)
        self.score = received / received.norm(dim=-1, keepdim=True)
        self.count = int(min(max(0.1 * (1.5 - layer / 27) * (0.4 if double else 1.6), 0.0), 1.0) * received.shape[1])
        self.age = torch.zeros(received.shape)

    def step(self) -> Tensor:
        """The tokens that are fresh in the next step, (B, k)."""
        fresh = (self.score + 0.25 * self.age / 4).argsort(dim=-1, descending=True)[:, : self.count]
        self.age += 1
        self.age.scatter_(1, fresh, 0.0)
        return fresh


@pytest.mark.parametrize("double", [True, False])
def test_chosen_tokens_equal_the_originals_on_recorded_maps(double: bool) -> None:
    wanted, words, everything = Tokens(depth="original", queries=0), 12, 60
    layers, stage = 4, 19 if double else 38
    inside = Inside()
    originals = {}
    ratios = [fresh_ratio(wanted, layer, stage, double=double) for layer in range(layers)]
    for layer in range(layers):
        q, k = noise(2, 3, everything, 16, seed=layer), noise(2, 3, everything, 16, seed=50 + layer)
        raw = attention_score(q, k, None, None, queries=0)
        spans = {"image": slice(words, None), "text": slice(0, words)} if double else {"joint": slice(None)}
        for stream, span in spans.items():
            inside.score(layer, stream, raw[:, span])
            originals[layer, stream] = OriginalToCa(maps(q, k)[..., span], layer, double=double)
    for step in range(1, 4):
        inside.choose(Moment(step, step, 8, 0.5), ratios, staleness=0.25, every=4)
        for (layer, stream), original in originals.items():
            fresh = original.step()
            rows = inside.chosen.get((layer, stream))
            tokens = original.score.shape[1]
            expected = (fresh + torch.arange(2)[:, None] * tokens).reshape(-1)
            assert ([] if rows is None else rows.tolist()) == expected.tolist()


def test_ratios_are_the_originals_under_its_depth() -> None:
    original = Tokens(depth="original")
    expected = {("double", 0): 0.06, ("double", 9): 0.0467, ("double", 18): 0.0333}
    expected |= {("single", 0): 0.24, ("single", 18): 0.1333, ("single", 37): 0.0207}
    for (stage, layer), ratio in expected.items():
        double = stage == "double"
        assert fresh_ratio(original, layer, 19 if double else 38, double=double) == pytest.approx(ratio, abs=1e-4)


def test_ratios_fall_over_the_models_own_depth_and_stay_within_0_and_1() -> None:
    for layers in (1, 4, 38):
        found = [fresh_ratio(Tokens(), layer, layers, double=False) for layer in range(layers)]
        assert found[0] == pytest.approx(0.24)
        assert layers == 1 or found[-1] == pytest.approx(0.08)
    assert fresh_ratio(Tokens(ratio=1.0, single=100.0), 0, 4, double=False) == 1.0
    assert fresh_ratio(Tokens(depth="original"), 60, 61, double=False) == 0.0
    assert (fresh_count(0.5, 7), fresh_count(1.0, 7), fresh_count(0.0, 7)) == (3, 7, 0)


def test_attention_received_is_the_mean_of_the_maps_columns() -> None:
    q, k = noise(2, 3, 300, 16), noise(2, 3, 300, 16, seed=1)
    received = attention_received(q, k)
    torch.testing.assert_close(received, maps(q, k).mean((1, 2)))
    torch.testing.assert_close(received.sum(1), torch.ones(2))
    some = attention_score(q, k, None, None, queries=100)
    torch.testing.assert_close(some, maps(q, k)[:, :, 1::3].mean((1, 2)))


def test_scores_are_read_after_the_rotation() -> None:
    q, k = noise(1, 2, 9, 8), noise(1, 2, 9, 8, seed=1)
    angle = noise(9, 4, seed=2)
    turned = [rotated(x, angle.cos(), angle.sin()) for x in (q, k)]
    pairs = torch.view_as_complex(k.unflatten(-1, (4, 2)).contiguous()) * torch.polar(torch.ones(9, 4), angle)
    torch.testing.assert_close(turned[1], torch.view_as_real(pairs).flatten(-2))
    torch.testing.assert_close(attention_score(q, k, angle.cos(), angle.sin(), queries=0), maps(*turned).mean((1, 2)))


def test_value_norm_and_normalisation() -> None:
    values = noise(2, 5, 3, 4)
    torch.testing.assert_close(value_norm(values), values.norm(dim=-1).mean(-1))
    torch.testing.assert_close(normalised(values[:, :, 0, 0]).norm(dim=-1), torch.ones(2))


def test_the_best_token_of_each_cell_gains_a_share_of_its_score() -> None:
    score = torch.arange(1.0, 16.0).view(1, 15)
    found = with_spatial_bonus(torch.cat([torch.full((1, 2), 9.0), score], 1), (3, 5), bonus=0.4, cell=2, first=2)
    best = {7, 9, 10, 12, 14, 15}  # of cells of 2 x 2 on a grid of 3 x 5, the last row and column cut
    expected = [9.0, 9.0, *(v * 1.4 if v in best else v for v in range(1, 16))]
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_by_age_alone_every_token_has_its_turn() -> None:
    scores, ages = torch.zeros(1, 1, 6), torch.zeros(1, 1, 6, dtype=torch.int32)
    turns = []
    for _ in range(3):
        (rows,), ages = choose(scores, ages, [2], staleness=0.25, every=4)
        turns += rows.tolist()
    assert sorted(turns) == list(range(6))


@pytest.mark.parametrize(("memory", "reach"), [("model", 0.0), ("host", 0.0), ("bf16", 2.0**-8), ("fp8", 2.0**-4)])
def test_what_is_kept_comes_back_and_rows_are_replaced(memory: str, reach: float) -> None:
    whole, rows, index = noise(2, 5, 8) * 100, noise(2, 8, seed=1), torch.tensor([3, 7])
    kept = Kept.of(whole, memory)
    before = whole.clone()
    whole.zero_()  # a host adds in place: what is kept is a copy
    torch.testing.assert_close(kept.read(), before, rtol=reach, atol=reach)
    torch.testing.assert_close(kept.rows(index), before.view(-1, 8)[index], rtol=reach, atol=reach)
    after = before.clone()
    after.view(-1, 8)[index] = rows
    torch.testing.assert_close(kept.refreshed(index, rows), after, rtol=reach, atol=reach)
    torch.testing.assert_close(kept.read(), after, rtol=reach, atol=reach)


def test_fp8_takes_half_of_bf16() -> None:
    whole = noise(1, 64, 512).bfloat16()
    sizes = [sum(t.numel() * t.element_size() for t in Kept.of(whole, m).tensors()) for m in ("model", "fp8")]
    assert sizes[1] < 0.51 * sizes[0]


def test_a_forecast_is_exact_for_what_moves_in_a_parabola() -> None:
    track, start, speed, bend = Remembered(), noise(1, 3, 4), noise(1, 3, 4, seed=1), noise(1, 3, 4, seed=2)

    def at(sigma: float) -> Tensor:
        return start + speed * sigma + bend * sigma**2

    for sigma in (1.0, 0.9, 0.6, 0.5):
        track.remember(sigma, at(sigma) * 2, at(sigma), window=3, memory="model", forecast=True)
    here = Moment(4, 4, 8, 0.3)
    torch.testing.assert_close(track.forecast(track.output, Taylor(2), here), at(0.3))
    torch.testing.assert_close(track.forecast(track.attention, Taylor(2), here), at(0.3) * 2)
    torch.testing.assert_close(track.forecast(track.output, Hold(), here), at(0.5))
    assert len(track.output) == 3


def test_gated_sums_and_chosen_rows_are_what_the_block_computes() -> None:
    x, a, b = (noise(2, 6, 8, seed=i) for i in range(3))
    gate, gate_b, scale, shift = (noise(2, 1, 8, seed=10 + i) for i in range(4))
    between = x + gate * a
    assert torch.equal(gated_sum(x, gate, a), between)
    assert torch.equal(gated_sum(x, gate, a, gate_b, b), between + gate_b * b)
    index = torch.tensor([5, 0, 6 + 2, 6 + 2])
    normed = torch.nn.functional.layer_norm(between, (8,), eps=1e-6) * (1 + scale) + shift
    rows = chosen_rows(x, index, scale, shift, eps=1e-6, gate=gate, a=a)
    torch.testing.assert_close(rows, normed.view(-1, 8)[index].view(2, 2, 8))
    huge = torch.full((1, 1, 2), 6e4).half()
    assert gated_sum(huge, torch.ones(1, 1, 2).half(), huge).tolist() == [[[65504.0, 65504.0]]]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"cache": {"method": "toca"}, "tokens": {"ratio": 1.2}}, "tokens.ratio is 1.2: a number from 0.0 to 1.0"),
        ({"cache": {"method": "toca", "every": 0}}, "cache.every is 0: at least 1"),
        ({"cache": {"method": "toca"}, "tokens": {"score": "entropy"}}, "tokens.score is 'entropy'"),
        ({"cache": {"method": "toca"}, "tokens": {"memory": "disk"}}, "tokens.memory is 'disk'"),
        ({"cache": {"method": "fbcache"}, "tokens": {"ratio": 0.2}}, "[tokens] is given but cache.method is fbcache"),
    ],
)
def test_bad_settings_are_one_sentence(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        Recipe.from_dict({"schema": 1, **given})
    assert str(refusal.value).startswith(sentence) and "\n" not in str(refusal.value)


def test_a_family_without_an_mlp_to_split_is_refused_in_a_sentence() -> None:
    from dataclasses import replace

    anatomy = flux(2, 2)
    closed = replace(anatomy, stages=tuple(replace(stage, parts=("attention",)) for stage in anatomy.stages))
    with pytest.raises(ValueError, match="toca sends tokens through each block's MLP, and the double blocks"):
        make_plan(Recipe.from_dict({"schema": 1, "cache": {"method": "toca"}}), closed)


def test_recipes_with_tokens_travel_as_toml() -> None:
    wanted = Recipe.from_dict({"schema": 1, "cache": {"method": "duca"}, "tokens": {"memory": "fp8", "ratio": 0.2}})
    assert "[tokens]" in wanted.to_toml()
    assert Recipe.from_dict(wanted.to_dict()) == wanted
