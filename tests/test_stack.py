"""[compile] and [quantize] in the diffusers host: done once, undone to the bit, in step with caches and LoRAs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from runs import flux, hastened, recipe, transformer
from runs import paint as paint_in_full
from torch import Tensor

import hasten
from hasten.hosts import diffusers_stack
from hasten.hosts.diffusers_stack import Stack
from hasten.kernels.linear import FP8
from hasten.quantize import Linear8, Quantised, format_for
from hasten.sections import Compile, Quantize

EAGER = {"blocks": True, "backend": "eager"}
INT8 = {"format": "int8"}
FBCACHE = {"threshold": 10.0, "max_consecutive_hits": 2}


def paint(pipe: Any) -> Tensor:
    return paint_in_full(pipe, steps=4)


def small() -> Any:
    """One double block and two single ones: what is compiled is compiled for each class, however many there are."""
    return flux(double=1, single=2)


def wanted(*, compile: Any = None, quantize: Any = None, **cache: Any) -> dict[str, Any]:
    """A recipe's dict with the two sections."""
    method = cache.pop("method", "none")
    return recipe(method, **cache) | {"compile": compile or {}, "quantize": quantize or {}}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative L2 distance."""
    return float((found - exact).norm() / exact.norm())


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "sections",
    [{"compile": EAGER}, {"quantize": INT8}, {"compile": EAGER, "quantize": INT8}, {"compile": {"fuse": "always"}}],
    ids=["compiled", "quantised", "both", "fused"],
)
def test_leaving_gives_back_weights_calls_and_pictures(sections: dict[str, Any]) -> None:
    pipe = small()
    before, stock, names = state(pipe.transformer), paint(pipe), list(pipe.transformer.state_dict())
    latents, report = hastened(pipe, wanted(**sections), steps=4)
    assert 0.0 < distance(latents, stock) < 0.05
    assert report.model in report.line()
    assert list(pipe.transformer.state_dict()) == names
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    assert not any("_compiled_call_impl" in module.__dict__ for module in pipe.transformer.modules())
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in pipe.transformer.parameters())
    assert torch.equal(paint(pipe), stock)


@pytest.mark.parametrize("sections", [{"compile": EAGER}, {"quantize": INT8}, {"compile": EAGER, "quantize": INT8}])
@pytest.mark.parametrize("always", [{"method": "interval", "every": 1}, {"method": "fbcache", "threshold": 0.0}])
def test_always_compute_is_bit_identical_to_the_same_stack(sections: dict[str, Any], always: dict[str, Any]) -> None:
    pipe = small()
    stack = hasten.prepare(pipe, wanted(**sections))
    stock = paint(pipe)
    assert torch.equal(hastened(pipe, wanted(**sections, **always), steps=4)[0], stock)
    assert torch.equal(
        hastened(pipe, recipe(**always), steps=4)[0], stock
    )  # a recipe without sections takes it as it is
    assert torch.equal(paint(pipe), stock)
    stack.undo()
    assert torch.equal(paint(pipe), paint(small()))


def test_a_cache_on_a_quantised_and_compiled_model_reuses_and_reports() -> None:
    settings = wanted(compile=EAGER, quantize=INT8, method="fbcache", **FBCACHE)
    latents, report = hastened(small(), settings, steps=4)
    plain, plain_report = hastened(small(), recipe("fbcache", **FBCACHE), steps=4)
    assert report.strip == plain_report.strip and report.reused > 0
    assert distance(latents, plain) < 0.05
    assert report.model == "blocks in int8, fused passes, compiled" and report.graphs == 2
    assert "2 graphs compiled" in report.line()
    assert {"model", "graphs", "compile_s"} <= set(report.to_dict())


def test_what_cannot_be_undone_is_said_before_it_is_begun() -> None:
    pipe = small()
    before = state(pipe.transformer)
    for_good = wanted(quantize={**INT8, "keep": False})
    with pytest.raises(ValueError, match=r"hasten\.prepare"), hasten.accelerate(pipe, for_good):
        pass
    assert all(torch.equal(before[name], tensor) for name, tensor in pipe.transformer.state_dict().items())
    stack = hasten.prepare(pipe, for_good)
    prepared = paint(pipe)
    with pytest.raises(ValueError, match="were not kept"):
        stack.undo()
    assert torch.equal(paint(pipe), prepared)
    assert torch.equal(hastened(pipe, for_good, steps=4)[0], prepared)


def test_another_stack_on_top_is_refused_in_one_sentence() -> None:
    pipe = small()
    hasten.prepare(pipe, wanted(quantize=INT8))
    with pytest.raises(ValueError, match="otherwise"), hasten.accelerate(pipe, wanted(compile=EAGER)):
        pass
    with pytest.raises(ValueError, match="asks for nothing"):
        hasten.prepare(pipe, recipe())


def test_prepare_refuses_a_device_that_is_not_here() -> None:
    for name in ("cuda:63", "nonsense"):
        with pytest.raises(ValueError, match=f"there is no device '{name}' here"):
            hasten.prepare(small(), wanted(quantize=INT8), device=name)


def test_fp8_on_a_device_that_lacks_it_is_refused_and_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = small()
    with pytest.raises(ValueError, match=r"8\.9 or newer"), hasten.accelerate(pipe, wanted(quantize={"format": "fp8"})):
        pass
    assert torch.equal(paint(pipe), paint(small()))
    assert format_for("auto", torch.device("cpu")) == "int8"
    with pytest.raises(ValueError, match="leave"):
        format_for("auto", torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    for capability, auto in (((8, 0), "int8"), ((8, 9), "fp8"), ((9, 0), "fp8")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert format_for("auto", torch.device("cuda")) == auto
        assert format_for("int8", torch.device("cuda")) == "int8"
        if auto == "int8":
            with pytest.raises(ValueError, match=r"A GPU, 8\.0"):
                format_for("fp8", torch.device("cuda"))


def test_a_missing_compiler_is_one_sentence_and_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    latents, report = hastened(small(), wanted(compile={"blocks": True, "fuse": "never"}), steps=4)
    assert torch.equal(latents, paint(small()))
    assert report.graphs == 0 and "needs a C++ compiler" in report.line()


def test_an_unknown_back_end_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="inductor"),
        hasten.accelerate(small(), wanted(compile={"blocks": True, "backend": "x"})),
    ):
        pass


@pytest.mark.parametrize("dtype", [FP8, torch.int8], ids=["fp8", "int8"])
def test_quantised_layers_are_near_and_modulation_is_left_alone(dtype: torch.dtype) -> None:
    model = transformer()
    stack = Stack(model, Compile(), Quantize("int8"))
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    left = {name for name, kind in kinds.items() if kind is torch.nn.Linear}
    assert all("norm" in name or "embedder" in name or name == "proj_out" for name in left)
    assert sum(kind is Linear8 for kind in kinds.values()) == 2 * 12 + 4 * 5
    stack.undo()
    layer = torch.nn.Linear(256, 96)
    module = torch.nn.ModuleList([layer])
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    exact = layer(x).detach()
    Quantised([module], dtype, wanted=lambda name: True, keep=False)
    # 3 bits of fraction, or 7 bits of the row's largest, on both sides.
    assert distance(module[0](x).detach(), exact) < {FP8: 0.05, torch.int8: 0.02}[dtype]


def test_casting_a_quantised_model_leaves_its_eight_bits_alone() -> None:
    layer = Linear8.of(torch.nn.Linear(32, 16), FP8)
    weight, scale = layer.weight8.clone(), layer.scale8.clone()
    layer.to(torch.bfloat16)
    assert layer.weight8.dtype == FP8 and layer.scale8.dtype == torch.float32 and layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight8.float(), weight.float()) and torch.equal(layer.scale8, scale)
    assert layer.weight.dtype == torch.bfloat16


def test_hooked_blocks_and_calls_with_more_are_run_as_they_are() -> None:
    pipe = small()
    pipe.transformer.transformer_blocks[0].attn.to_q._hf_hook = object()
    stack = Stack(pipe.transformer, Compile(fuse="always"))
    assert len(stack._laid) == 2
    stock = paint(small())
    assert distance(paint(pipe), stock) < 1e-4


@pytest.mark.parametrize("sections", [{"compile": {"fuse": "always"}}, {"quantize": INT8}], ids=["fused", "int8"])
def test_hooks_that_come_later_are_called_and_the_report_says_so(sections: dict[str, Any]) -> None:
    settings = wanted(**sections)
    heard: list[int] = []
    pipe = flux()
    with hasten.accelerate(pipe, settings) as run:
        fused = paint(pipe)
        single = pipe.transformer.single_transformer_blocks[0]
        for part in (pipe.transformer.transformer_blocks[0], single.proj_out):
            hook = part.register_forward_hook(lambda *given: heard.append(1))
            near = paint(pipe)
            assert run.report is not None and "hooks" in run.report.line()
            hook.remove()
            assert len(heard) == 4 and distance(near, fused) < 1e-2
            heard.clear()
        assert torch.equal(paint(pipe), fused)
        assert "hooks" not in run.report.line()


def test_casting_that_is_enabled_later_runs_blocks_as_they_are() -> None:
    pipe, stock = flux(), flux()
    hasten.prepare(pipe, wanted(compile={"fuse": "always"}))
    for each in (pipe, stock):
        each.transformer.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    assert torch.equal(paint(pipe), paint(stock))


@pytest.mark.parametrize("sections", [{"compile": EAGER}, {"quantize": INT8}, {"compile": EAGER, "quantize": INT8}])
def test_a_lora_is_heard_on_top_of_the_stack(sections: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    from test_lora import load

    plain, loaded = paint(flux()), flux()
    load(loaded)
    effect = paint(loaded) - plain
    settings = wanted(**sections, method="fbcache", **FBCACHE)
    cached = hastened(flux(), settings, steps=4)[0]
    pipe = flux()
    with hasten.accelerate(pipe, settings) as run:
        paint(pipe)
        load(pipe)
        with_lora = paint(pipe)
        assert run.report is not None and (run.report.graphs > 0) == ("compile" in sections)
        share = ((with_lora - cached) * effect).sum() / effect.square().sum()
        assert 0.5 < share < 1.5
        pipe.unload_lora_weights()
        assert torch.equal(paint(pipe), cached)
    assert torch.equal(paint(pipe), plain)


@pytest.mark.parametrize("sections", [{"quantize": INT8}, {"compile": {"fuse": "always"}}], ids=["int8", "fused"])
@pytest.mark.parametrize("when", ["stays", "goes"])
def test_leaving_finds_the_layers_wherever_a_lora_has_moved_them(sections: dict[str, Any], when: str) -> None:
    pytest.importorskip("peft")
    from test_lora import load

    pipe, expected = flux(), flux()
    if when == "goes":
        load(pipe)
    else:
        load(expected)
    with hasten.accelerate(pipe, wanted(**sections)):
        paint(pipe)
        if when == "goes":
            pipe.unload_lora_weights()
        else:
            load(pipe)
        paint(pipe)
    assert torch.equal(paint(pipe), paint(expected))
    assert not any(isinstance(module, Linear8) for module in pipe.transformer.modules())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in pipe.transformer.parameters())


def test_a_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, quantise, lay = flux(), Linear8.of, diffusers_stack.lay_layers_together
    before, met = state(pipe.transformer), 0

    def failing(inner: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal met
            met += 1
            if met == 4:
                raise torch.OutOfMemoryError("no memory")
            return inner(*args)

        return call

    for where, name, inner in ((Linear8, "of", quantise), (diffusers_stack, "lay_layers_together", lay)):
        met = 0
        with monkeypatch.context() as patch:
            patch.setattr(where, name, failing(inner))
            with pytest.raises(torch.OutOfMemoryError):
                hasten.prepare(pipe, wanted(quantize=INT8))
        now = pipe.transformer.state_dict()
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in pipe.transformer.parameters())
    assert torch.equal(paint(pipe), paint(flux()))


def test_a_lora_merged_into_weights_adds_no_graph_and_is_heard() -> None:
    pytest.importorskip("peft")
    from test_lora import load

    merged = flux()
    load(merged)
    merged.fuse_lora()
    merged.unload_lora_weights()
    pipe = flux()
    with hasten.accelerate(pipe, wanted(compile=EAGER)) as run:
        stock = paint(pipe)
        for name, parameter in merged.transformer.named_parameters():
            pipe.transformer.get_parameter(name).data.copy_(parameter.data)
        found = paint(pipe)
        assert run.report is not None and run.report.graphs == 0
    assert not torch.equal(found, stock)
    assert distance(found, paint(merged)) < 1e-4


def test_a_lora_cannot_be_merged_into_eight_bits_unseen() -> None:
    pytest.importorskip("peft")
    from test_lora import load

    pipe = flux()
    hasten.prepare(pipe, wanted(quantize=INT8))
    load(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="merge a LoRA before"):
            pipe.fuse_lora()
