"""The registry: verdicts, self-tests, what gives way to what, and that measuring happens once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hasten.attention
from hasten.attention import CHAINS, CHOICES, Attention, cache_file, fastest, judge, self_test, shape_class
from hasten.attention_backends import BACKENDS, DENSE, SPARSE, Ask, Backend, lacks, misfit
from hasten.marks import Numbers
from hasten.recipe import ATTENTIONS

CPU = torch.device("cpu")


def qkv(rows: int = 40, dim: int = 64, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, 2, rows, dim, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]


def backend(name: str, attend: object, *, error: float = 0.01) -> Backend:
    return Backend(name, "of the test", error, lambda ask: None, attend)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def ask(rows: int = 40, **changed: object) -> Ask:
    return dataclasses.replace(Ask(CPU, torch.float32, 2, 64, rows, rows), **changed)  # type: ignore[arg-type]


def test_recipes_know_every_back_end() -> None:
    assert set(ATTENTIONS) == {"unchanged", *CHOICES}


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "sdpa"])
def test_what_needs_a_gpu_says_so_on_a_cpu(name: str) -> None:
    verdict = BACKENDS[name].supports(ask())
    assert not verdict.ok
    assert "needs" in verdict.reason or "not installed" in verdict.reason


@pytest.mark.parametrize("name", ["auto", "int8_fp8", "sage8", "sparse", "cudnn"])
def test_what_cannot_be_used_gives_way_to_torchs_own_with_a_reason(name: str) -> None:
    said: list[str] = []
    attention = Attention(name, say=said.append)
    q, k, v = qkv()
    torch.testing.assert_close(attention(q, k, v), scaled_dot_product_attention(q, k, v))
    assert attention.line == "attention sdpa"
    assert len(said) == (0 if name == "auto" else 1)
    attention(q, k, v)
    assert len(said) <= 1  # said once


def test_masks_head_sizes_and_dtypes_that_do_not_fit_are_refused_in_words() -> None:
    half = ask(dtype=torch.float16)
    limits = {"dims": (64, 128), "largest": 0, "square": True, "least_rows": 32}
    assert misfit(half, **limits) is None  # type: ignore[arg-type]
    for changed, word in (
        ({"masked": True}, "mask"),
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 256}, "256"),
        ({"keys": 7}, "as many keys"),
        ({"rows": 5, "keys": 5}, "5"),
    ):
        assert word in (misfit(dataclasses.replace(half, **changed), **limits) or "")  # type: ignore[arg-type]


def test_the_self_test_catches_a_kernel_made_wrong_on_purpose() -> None:
    right = backend("right", scaled_dot_product_attention)
    scaled = backend("scaled", lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=0.2))
    broken = backend("broken", lambda q, k, v: scaled_dot_product_attention(q, k, v) / 0.0)
    shaped = backend("shaped", lambda q, k, v: scaled_dot_product_attention(q, k, v).transpose(1, 2))

    def refuses(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this\nand a long trail")

    assert judge(right, ask()).ok
    for wrong in (scaled, broken, shaped):
        assert "self-test" in judge(wrong, ask()).reason
    assert judge(backend("refuses", refuses), ask()).reason == "no kernel for this"
    assert self_test(right, CPU, torch.float32, 64, 130) < 1e-5


def test_the_self_test_catches_what_overflows_float16() -> None:
    def sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weight = torch.softmax(q.float() @ k.float().mT * q.shape[-1] ** -0.5, -1)
        return (weight / weight.amax(-1, keepdim=True) @ v.float()).half() / (
            1.0 / weight.amax(-1, keepdim=True)
        ).half()

    def scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((q.float() @ k.float().mT).half() * q.shape[-1] ** -0.5, -1) @ v

    half = ask(dtype=torch.float16, rows=1000, keys=1000)
    for narrow in (sums, scores):
        assert judge(backend("narrow", narrow), half).reason == "its self-test gives numbers that are not finite"
    assert judge(backend("right", scaled_dot_product_attention), half).ok


def test_a_kernel_that_fails_in_the_run_gives_way_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def tires(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return scaled_dot_product_attention(q, k, v)

    monkeypatch.setitem(BACKENDS, "int8", backend("int8", tires))
    said: list[str] = []
    attention = Attention("int8", say=said.append)
    q, k, v = qkv()
    for _ in range(2):
        torch.testing.assert_close(attention(q, k, v), scaled_dot_product_attention(q, k, v))
    assert said == ["attention int8 gave way to torch's own: out of memory"]
    assert len(calls) == 2


def test_exact_takes_torchs_own_and_the_line_counts() -> None:
    attention = Attention("sdpa")
    attention.exact = True
    q, k, v = qkv()
    attention(q, k, v)
    assert attention.used == {"sdpa": 1}


def test_auto_never_takes_more_error_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def rough(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v) * 1.02

    monkeypatch.setitem(BACKENDS, "int8", backend("int8", rough, error=0.03))
    monkeypatch.setattr(hasten.attention, "fastest", lambda fit, _: min(fit, key=lambda b: b.name != "int8"))
    q, k, v = qkv()
    for error, name in ((0.06, "int8"), (0.01, "sdpa")):
        attention = Attention("auto", error=error)
        attention(q, k, v)
        assert list(attention.used) == [name]
    assert all(BACKENDS[name].error < SPARSE for name in (*DENSE, *CHAINS["sage8"]))


def test_the_fastest_is_measured_once_for_a_class_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"sdpa": 2.0, "cudnn": 1.0}
    measured = []

    def milliseconds(found: Backend, _: Ask) -> float:
        measured.append(found.name)
        return times[found.name]

    monkeypatch.setattr(hasten.attention, "_milliseconds", milliseconds)
    candidates = [BACKENDS["sdpa"], BACKENDS["cudnn"]]
    for rows in (40, 64):
        assert fastest(candidates, ask(rows)).name == "cudnn"
    assert sorted(measured) == ["cudnn", "sdpa"]
    assert fastest(candidates, ask(65)).name == "cudnn" and len(measured) == 4
    assert shape_class(ask(64)) == shape_class(ask(33)) != shape_class(ask(65))
    cache_file().write_text("not json")
    assert fastest(candidates, ask(40)).name == "cudnn"


def test_it_really_measures() -> None:
    assert fastest([BACKENDS["sdpa"]], ask()).name == "sdpa"
    assert cache_file().is_file()


def test_an_unknown_name_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^attention 'fast' is not known: known are auto, sdpa"):
        Attention("fast")
    assert lacks("a_package_that_nobody_has") == "the package a_package_that_nobody_has is not installed"


def test_it_is_one_step_of_a_graph() -> None:
    attention = Attention("auto")
    counted = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda q, k, v: attention(q, k, v) * 2.0, backend=counted, fullgraph=True)
    q, k, v = qkv()
    torch.testing.assert_close(compiled(q, k, v), scaled_dot_product_attention(q, k, v) * 2.0)
    attention.exact = True
    compiled(q, k, v)
    assert counted.frame_count == 1


def test_no_state_is_taken_for_one_whose_keys_are_gone() -> None:
    seen = set()
    one, asked = Attention("sdpa"), ask()
    for _ in range(8):  # each where the one before lay, as far as Python goes
        one.kept = (torch.tensor([0, 2]),)
        state = one.state(asked)
        assert state not in seen
        seen.add(state)
    assert one.state(asked) == one.state(asked) and hash(one.state(asked)) == hash(one.state(asked))
    one.kept = (3, 3)
    before = one.state(asked)
    one.kept = (3, 3)
    assert one.state(asked) == before


def test_equal_states_are_of_whatever_would_launch_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "sparse", dataclasses.replace(BACKENDS["sdpa"], name="sparse"))
    one, other = ask(), ask(48)

    def state(wanted: str, *, of: Ask = one, **settings: Any) -> Any:
        attention = Attention(wanted, keep=settings.pop("keep", 0.5))
        for name, value in settings.items():
            setattr(attention, name, value)
        return attention.state(of)

    assert state("sdpa") == state("sdpa") == state("sparse", exact=True) != state("sparse")
    assert state("sparse") != state("sparse", keep=0.4) != state("sparse", text_rows=3)
    grid = {"grid": (4, one.rows // 4)}
    assert state("sparse", **grid) == state("sparse", **grid) != state("sparse")
    made = [Numbers(torch.tensor([0.5, share]), torch.ones(2)) for share in (0.9, 0.9, 0.8)]
    assert state("sparse", heads=made[0]) == state("sparse", heads=made[1]) != state("sparse", heads=made[2])
    failed = Attention("sparse")
    before = failed.state(one)
    failed._give_way(BACKENDS["sparse"], one, RuntimeError("no kernel"))
    assert failed.state(one) != before and failed.state(other) == state("sparse", of=other)


def test_in_comfyui_a_call_with_a_scale_of_its_own_is_left_to_the_host() -> None:
    from hasten.hosts.comfy_attention import override

    def host(*args: object, **kwargs: object) -> str:
        return "the host's"

    q = torch.randn(1, 2, 8, 16)
    attending, given = override("sdpa", None), {"skip_reshape": True}
    assert attending(host, q, q, q, 2, scale=1.0, **given) == "the host's"
    assert isinstance(attending(host, q, q, q, 2, scale=None, **given), torch.Tensor)
