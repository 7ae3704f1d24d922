"""Recordings replayed give what calls give, bit for bit, whatever comes between: here by a recorder without a GPU.

The recorder is careless.py's, which spoils what a CUDA graph may spoil; the last test has CUDA's own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from careless import Careless, pools
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten import replay
from hasten.place import Place
from hasten.replay import LOOKS_EVERY, Replays


class Model:
    """Blocks of two streams with a weight each; `settings` is what a host would mark beside the weights."""

    def __init__(self, replays: Replays | None, blocks: int = 5, device: str = "cpu") -> None:
        noise = torch.Generator().manual_seed(0)
        self.weights = [(torch.randn(8, 8, generator=noise) / 3).to(device) for _ in range(blocks)]
        self.replays = replays
        self.calls = 0
        self.counts: dict[str, int] = {}

    def block(self, i: int, image: Tensor, text: Tensor, emb: Tensor) -> Sequence[Tensor]:
        def call(image: Tensor, text: Tensor, emb: Tensor) -> Sequence[Tensor]:
            if not Careless.at_work:
                self.calls += 1
                self.counts["calls"] = self.counts.get("calls", 0) + 1
            return image + torch.tanh(image @ self.weights[i]) * emb, text - torch.tanh(text @ self.weights[i])

        if self.replays is None:
            return call(image, text, emb)
        return self.replays.run(i, self.weights[i].data_ptr(), (image, text, emb), call, self.counts)

    def __call__(self, image: Tensor, text: Tensor, emb: Tensor, *, between: Any = None, skip: Any = ()) -> Tensor:
        for i in range(len(self.weights)):
            if i not in skip:
                image, text = self.block(i, image, text, emb)
            if between is not None:
                image = between(i, image)
        return torch.cat([image, text], 1)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def pair(**settings: Any) -> tuple[Model, Model, list[Careless], list[str]]:
    """A model replayed, the same as it is, the recordings and what was said."""
    everyone: list[Careless] = []
    said: list[str] = []
    replays = Replays(say=said.append, make=pools(everyone), **settings)
    return Model(replays), Model(None), everyone, said


def inputs(seed: int, tokens: int = 6, batch: int = 1, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    noise = torch.Generator().manual_seed(seed)
    image, text, emb = (torch.randn(batch, n, 8, generator=noise).to(device) for n in (tokens, 3, 1))
    return image, text, emb


def test_a_size_is_run_then_recorded_then_replayed() -> None:
    ours, stock, everyone, said = pair()
    for seed in range(5):
        assert torch.equal(ours(*inputs(seed)), stock(*inputs(seed)))
    # Once as it is, twice to record; from then on nothing is called.
    assert ours.calls == 5 * 3 and len(everyone) == 5 and said == []
    assert all(recording.replays == 4 for recording in everyone)
    assert ours.counts == stock.counts


@pytest.mark.parametrize("when", [0, 1, 3])
def test_what_comes_between_blocks_is_heard(when: int) -> None:
    def residual(i: int, image: Tensor) -> Tensor:
        return image + 0.5 if i == 2 else image

    def in_place(i: int, image: Tensor) -> Tensor:
        return image.mul_(1.5) if i == 2 else image

    for between in (residual, in_place):
        ours, stock, _, _ = pair()
        for seed in range(6):
            now = between if seed >= when else None
            assert torch.equal(ours(*inputs(seed), between=now), stock(*inputs(seed), between=now))


def test_blocks_left_out_and_taken_again_do_not_disturb_the_others() -> None:
    ours, stock, _, _ = pair()
    for seed, skip in enumerate([(), (1, 2), (1, 2), (), (0,), (4,), (2,), (), (3, 4), (1,), ()]):
        assert torch.equal(ours(*inputs(seed), skip=skip), stock(*inputs(seed), skip=skip))


def test_what_a_caller_keeps_is_its_own() -> None:
    ours, stock, _, _ = pair()
    kept: list[Tensor] = []
    wanted: list[Tensor] = []
    for seed in range(4):
        ours(*inputs(seed), between=lambda i, image: kept.append(image) or image)
        stock(*inputs(seed), between=lambda i, image: wanted.append(image) or image)
    assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))


def replays(everyone: list[Careless]) -> int:
    return sum(recording.replays for recording in everyone)


def test_results_are_lent_until_somebody_keeps_one() -> None:
    ours, stock, everyone, _ = pair()
    for seed in range(3):
        assert torch.equal(ours(*inputs(seed)), stock(*inputs(seed)))
    assert ours.replays is not None
    assert next(iter(ours.replays._places.values())).lends and replays(everyone) == 10
    kept: list[Tensor] = []

    def keep_a_part(i: int, image: Tensor) -> Tensor:
        if i == 1:
            kept.append(image[:, :2])  # a view is as good as the whole
        return image

    assert torch.equal(ours(*inputs(4), between=keep_a_part), stock(*inputs(4)))
    # Blocks behind the third are recorded anew, in memory of their own, and those before it at the next call.
    assert not next(iter(ours.replays._places.values())).lends and len(everyone) == 5 + 1 + 1
    part = kept[0].clone()
    for seed in range(5, 9):
        found = ours(*inputs(seed), between=lambda i, image: kept.append(image) or image)
        assert torch.equal(found, stock(*inputs(seed)))
    assert torch.equal(kept[0], part) and len(everyone) == 10 and ours.replays.works


def test_what_was_lent_outlives_its_recordings() -> None:
    ours, stock, _, _ = pair()
    for seed in range(3):
        ours(*inputs(seed))
    given = inputs(3)
    lent, wanted = ours.block(0, *given), stock.block(0, *given)
    assert ours.replays is not None
    ours.replays.drop()
    assert torch.equal(ours(*inputs(4)), stock(*inputs(4)))
    assert all(torch.equal(a, b) for a, b in zip(lent, wanted, strict=True))


def test_weights_written_into_are_heard_and_weights_replaced_recorded_anew() -> None:
    ours, stock, everyone, _ = pair()
    for seed in range(4):
        ours(*inputs(seed)), stock(*inputs(seed))
    for model in (ours, stock):
        model.weights[2].add_(0.1)  # a LoRA merged in place
    assert torch.equal(ours(*inputs(9)), stock(*inputs(9)))
    assert len(everyone) == 5
    for model in (ours, stock):
        model.weights[2] = model.weights[2] * 2  # moved, quantised
    for seed in range(10, 16):
        assert torch.equal(ours(*inputs(seed)), stock(*inputs(seed)))
    # One block alone gives its results out elsewhere: all are recorded once more, with copies.
    assert len(everyone) == 5 + 1 + 5


def test_sizes_and_batches_have_recordings_of_their_own_up_to_a_limit() -> None:
    ours, stock, everyone, _ = pair(sizes=2)
    for seed in range(12):
        tokens, batch = ((6, 1), (10, 1), (6, 2))[seed // 2 % 2 if seed < 8 else 2]
        given = inputs(seed, tokens, batch)
        assert torch.equal(ours(*given), stock(*given))
    assert len(everyone) == 3 * 5
    assert ours.replays is not None and len(ours.replays._places) == 2


def test_what_cannot_be_recorded_runs_as_it_is_and_is_said_once() -> None:
    class Refusing(Careless):
        def record(self, call: Any, inputs: Any) -> list[Tensor]:
            call(*inputs)
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    said: list[str] = []
    ours = Model(Replays(say=said.append, make=lambda device: lambda: Refusing([])))
    stock = Model(None)
    for seed in range(4):
        assert torch.equal(ours(*inputs(seed)), stock(*inputs(seed)))
    assert len(said) == 1 and "operation not permitted" in said[0] and "more" not in said[0]
    assert ours.counts["calls"] == stock.counts["calls"]


def test_without_room_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replays, "_has_room", lambda self, place, device: False)
    ours, stock, everyone, _ = pair()
    for seed in range(4):
        assert torch.equal(ours(*inputs(seed)), stock(*inputs(seed)))
    assert everyone == [] and ours.counts == stock.counts


def test_room_is_asked_for_until_it_is_there_and_its_want_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    ours, device = Replays(say=said.append), torch.device("cuda")
    shares = iter([0.1, 0.1, 0.05, 0.5])
    monkeypatch.setattr(replay, "unused_share", lambda device: next(shares))
    one, other = (Place(lambda: Careless([])) for _ in range(2))
    assert not any(ours._has_room(one, device) for _ in range(LOOKS_EVERY))
    assert not ours._has_room(other, device) and len(said) == 1
    assert not any(ours._has_room(one, device) for _ in range(LOOKS_EVERY))
    assert ours._has_room(one, device) and len(said) == 1
    assert ours._has_room(one, device) and next(shares, None) is None  # recordings fill it up: it is not asked again


SWITCHES: dict[str, Any] = {
    "attention's kinds": lambda: sdpa_kernel([SDPBackend.MATH]),
    "tf32": lambda: tf32("high"),
    "determinism": lambda: deterministic(),
    "sums in 16 bits": lambda: switched(torch.backends.cuda.matmul, "allow_fp16_accumulation"),
    "cudnn": lambda: switched(torch.backends.cudnn, "enabled"),
}


@contextmanager
def switched(where: Any, name: str) -> Iterator[None]:
    if not hasattr(where, name):
        pytest.skip("this torch has no such switch")
    before = getattr(where, name)
    setattr(where, name, not before)
    yield
    setattr(where, name, before)


@contextmanager
def tf32(word: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(word)
    yield
    torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", SWITCHES)
def test_torchs_own_switches_are_heard_and_recordings_from_before_kept(name: str) -> None:
    torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())  # never set and set are two words
    ours, stock, everyone, _ = pair()
    for seed in range(3):
        ours(*inputs(seed))
    assert len(everyone) == 5 and replays(everyone) == 10
    with SWITCHES[name]():
        for seed in range(3, 6):
            assert torch.equal(ours(*inputs(seed)), stock(*inputs(seed)))
        assert len(everyone) == 10 and replays(everyone[:5]) == 10 and replays(everyone[5:]) == 10
    ours(*inputs(6))
    assert len(everyone) == 10 and replays(everyone[:5]) == 15


def test_recordings_are_dropped_when_no_other_thread_replays_them() -> None:
    ours, _, _, _ = pair()
    for seed in range(3):
        ours(*inputs(seed))
    assert ours.replays is not None
    with ours.replays._lock:
        dropping = threading.Thread(target=ours.replays.drop)
        dropping.start()
        dropping.join(0.05)
        assert dropping.is_alive() and ours.replays._places
    dropping.join()
    assert not ours.replays._places


def test_with_gradients_and_on_a_cpu_everything_is_called_as_it_is() -> None:
    ours, _, everyone, _ = pair()
    with torch.enable_grad():
        for seed in range(3):
            ours(*inputs(seed))
    plain = Model(Replays(say=lambda text: None))
    for seed in range(3):
        plain(*inputs(seed))
    assert everyone == [] and plain.calls == ours.calls == 15


def test_in_inference_mode_writes_are_not_counted_and_everything_is_copied() -> None:
    ours, stock, _, _ = pair()
    with torch.inference_mode():
        for seed in range(5):

            def in_place(i: int, image: Tensor) -> Tensor:
                return image.mul_(1.5) if i == 2 else image

            assert torch.equal(ours(*inputs(seed), between=in_place), stock(*inputs(seed), between=in_place))


@pytest.mark.gpu
def test_cuda_graphs_give_what_launches_give() -> None:
    said: list[str] = []
    ours = Model(Replays(say=said.append, sizes=2), device="cuda")
    stock = Model(None, device="cuda")
    kept: list[Tensor] = []
    wanted: list[Tensor] = []
    for seed in range(24):
        given = inputs(seed, (6, 10, 6)[seed // 8], (1, 1, 2)[seed // 8], device="cuda")
        skip = (1, 2) if seed % 4 == 3 else ()
        if seed == 12:
            for model in (ours, stock):
                model.weights[2].add_(0.1)
        if seed == 20:
            for model in (ours, stock):
                model.weights[3] = model.weights[3] * 2
        assert torch.equal(ours(*given, skip=skip), stock(*given, skip=skip))
        ours(*given, between=lambda i, image: kept.append(image) or image)
        stock(*given, between=lambda i, image: wanted.append(image) or image)
    assert said == [] and ours.replays is not None and ours.replays.works and ours.replays.bytes > 0
    assert all(torch.equal(a, b) for a, b in zip(kept, wanted, strict=True))
    assert ours.calls < stock.calls / 2
