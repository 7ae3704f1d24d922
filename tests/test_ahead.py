"""What is launched before the decision is known, and what is not made again: pictures stay bit for bit as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import flux, hastened, model_inputs, paint, prompt, recipe, transformer
from test_laws import ALWAYS, EAGER
from torch import Tensor

import hasten
from hasten import call
from hasten.session import Session
from hasten.signal import largest, relative_l1, residual_l1


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU goes ahead too, as a GPU does."""
    monkeypatch.setattr(call, "AHEAD", {"cpu"})


def counted(module: Any) -> list[int]:
    """How often the module's own forward runs, as one number that rises. By a class: one on the instance is heeded."""
    calls, like = [0], type(module)

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return like.forward(self, *args, **kwargs)

    module.__class__ = type(like.__name__, (like,), {"forward": counting})
    return calls


@pytest.mark.parametrize("given", [{}, {"batch": 3}, {"negative": 2}])
@pytest.mark.parametrize("name", EAGER)
def test_a_stand_in_made_ahead_is_the_one_made_in_its_turn(
    name: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, report = hastened(flux(), EAGER[name], **prompt(**given))
    monkeypatch.setattr(call, "AHEAD", {"cpu"})
    found, ahead = hastened(flux(), EAGER[name], **prompt(**given))
    assert torch.equal(found, wanted) and ahead.strip == report.strip and ahead.notes == report.notes


@pytest.mark.parametrize("name", ["fbcache", "fbcache-output", "mbcache", "teacache"])
def test_what_was_made_ahead_is_dropped_where_the_blocks_run(name: str, early: None) -> None:
    pipe = flux()
    stock = paint(pipe)
    latents, report = hastened(pipe, ALWAYS[name])
    assert torch.equal(latents, stock) and report.strip == "C" * 8


def test_the_last_layer_runs_once_for_each_reused_call(early: None) -> None:
    pipe = flux()
    norms, projections = counted(pipe.transformer.norm_out), counted(pipe.transformer.proj_out)
    with hasten.accelerate(pipe, EAGER["fbcache"]) as run:
        paint(pipe)
    assert run.report is not None and run.report.strip == "C" + "." * 7
    assert norms == projections == [8]


def test_a_residual_added_behind_the_last_block_is_not_lost(early: None) -> None:
    """A ControlNet adds to what the last block gave out: another tensor than the one that was made ahead."""

    def run() -> Tensor:
        torch.manual_seed(0)
        model, given = transformer(), model_inputs()
        residual = torch.full((1, 1, model.inner_dim), 0.5)
        handle = hasten.apply(model, EAGER["fbcache"])
        with torch.no_grad(), handle.run([1.0, 0.75, 0.5, 0.25, 0.0]):
            for sigma in (1.0, 0.75, 0.5, 0.25):
                out = model(**{**given, "timestep": torch.tensor([sigma])}, controlnet_single_block_samples=[residual])[
                    0
                ]
        assert handle.report is not None and handle.report.strip == "C..."
        handle.remove()
        return out

    found = run()
    call.AHEAD.clear()
    assert torch.equal(run(), found)


def test_modules_that_are_listened_to_are_called_in_their_turn_alone(early: None) -> None:
    pipe, heard = flux(), []
    hook = pipe.transformer.proj_out.register_forward_hook(lambda *call: heard.append(call[2].clone()))
    wanted, _ = hastened(flux(), EAGER["fbcache"])
    found, _ = hastened(pipe, EAGER["fbcache"])
    hook.remove()
    assert torch.equal(found, wanted) and len(heard) == 8


PARTS = ["pos_embed", "time_text_embed.time_proj", "norm_out", "proj_out"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("when", [-1, 1])
def test_a_forward_of_the_users_own_is_called_each_time(early: None, name: str, when: int) -> None:
    wanted, _ = hastened(flux(), EAGER["fbcache"])
    pipe, called = flux(), []
    part = pipe.transformer.get_submodule(name)
    forward = part.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return forward(*args, **kwargs)

    def put(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == when:
            part.forward = own
        return tensors

    put(pipe, -1, None, {})
    found, _ = hastened(pipe, EAGER["fbcache"], callback_on_step_end=put)
    del part.forward
    assert torch.equal(found, wanted)
    assert len(called) == (8 - 1 - when) * (2 if name == PARTS[1] else 1)


def test_a_listener_at_the_rotation_hears_every_step() -> None:
    pipe, heard = flux(), []
    pipe.transformer.pos_embed.register_forward_hook(lambda *call: heard.append(1))
    with hasten.accelerate(pipe, recipe("fbcache", threshold=0.0)):
        paint(pipe, steps=4)
    assert len(heard) == 4


def test_positions_are_turned_into_angles_once_a_run() -> None:
    pipe = flux()
    made = counted(pipe.transformer.pos_embed)
    with hasten.accelerate(pipe, recipe("fbcache", threshold=0.0)):
        for runs in (1, 2):
            paint(pipe, steps=4)
            assert made == [runs]
        paint(pipe, steps=4, **prompt(negative=2))
        assert made == [4]  # two prompts, two sets of positions
    paint(pipe, steps=4)
    assert made == [8]


def test_positions_that_are_written_or_replaced_are_turned_anew() -> None:
    model, given = transformer(), model_inputs()
    stock = transformer()
    handle = hasten.apply(model, recipe("fbcache", threshold=0.0))
    with torch.no_grad(), handle.run([1.0, 0.75, 0.5, 0.25, 0.0]):
        for sigma in (1.0, 0.75, 0.5, 0.25):
            if sigma == 0.75:
                given["img_ids"][:, 1] += 3
            if sigma == 0.25:
                given["img_ids"] = given["img_ids"] * 2
            now = {**given, "timestep": torch.tensor([sigma])}
            assert torch.equal(model(**now)[0], stock(**now)[0])
    handle.remove()


def test_the_guidances_sines_are_made_once_a_run() -> None:
    pipe = flux()
    made = counted(pipe.transformer.time_text_embed.time_proj)
    with hasten.accelerate(pipe, recipe("fbcache", threshold=0.0)):
        for runs in (1, 2):
            paint(pipe, steps=4)
            assert made == [runs * (4 + 1)]
        pipe.transformer.time_text_embed._compiled_call_impl = pipe.transformer.time_text_embed._call_impl
        paint(pipe, steps=4)
        assert made == [10 + 8]  # somebody's recording or graph must not take what is kept for its own
        del pipe.transformer.time_text_embed.__dict__["_compiled_call_impl"]
    paint(pipe, steps=4)
    assert made == [18 + 8]


def test_a_guidance_that_is_written_or_replaced_is_heard() -> None:
    model, given = transformer(), model_inputs()
    stock = transformer()
    handle = hasten.apply(model, recipe("fbcache", threshold=0.0))
    with torch.no_grad(), handle.run([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]):
        for sigma in (1.0, 0.8, 0.6, 0.4, 0.2):
            if sigma == 0.6:
                given["guidance"].mul_(2.0)
            if sigma == 0.4:
                given["guidance"] = given["guidance"] + 1.0
            now = {**given, "timestep": torch.tensor([sigma])}
            assert torch.equal(model(**now)[0], stock(**now)[0])
    handle.remove()


def test_a_run_in_inference_mode_is_as_ever(early: None) -> None:
    pipe = flux()
    wanted = paint(pipe)
    with torch.inference_mode():
        found, _ = hastened(pipe, ALWAYS["fbcache"])
    assert torch.equal(found, wanted)


def test_the_largest_change_is_read_behind_what_is_launched_meanwhile() -> None:
    order: list[str] = []
    assert largest([torch.tensor(1.0), torch.tensor(3.0)], lambda: order.append("work")) == 3.0
    assert order == ["work"]


EMBEDDERS = ["x_embedder", "time_text_embed", "context_embedder"]


@pytest.mark.parametrize(
    ("given", "behind"),
    [
        (recipe("fbcache", threshold=1.0), ["block", "enter"]),
        (recipe("teacache", threshold=1.0), ["enter", "block"]),
        (recipe("fbcache", threshold=1.0) | {"attention": {"backend": "sdpa"}}, ["enter", "block"]),
        (recipe("easycache", threshold=1.0), None),
    ],
)
def test_a_call_takes_its_place_behind_what_runs_whatever_is_decided(
    given: dict[str, Any], behind: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a GPU has work while the host waits for the call's time and looks its lanes up."""
    order: list[str] = []
    enter = Session.enter

    def entering(*args: Any, **kwargs: Any) -> Any:
        order.append("enter")
        return enter(*args, **kwargs)

    monkeypatch.setattr(Session, "enter", entering)
    model = transformer()
    for name in EMBEDDERS:
        getattr(model, name).register_forward_pre_hook(lambda *call, name=name: order.append(name))
    model.transformer_blocks[0].register_forward_pre_hook(lambda *call: order.append("block"))
    handle = hasten.apply(model, given)
    with torch.no_grad(), handle.run([1.0, 0.5, 0.0]):
        model(**{**model_inputs(), "timestep": torch.tensor([1.0])})
    handle.remove()
    assert order == (["enter", *EMBEDDERS, "block"] if behind is None else [*EMBEDDERS, *behind])


def test_a_call_that_fails_before_its_first_block_takes_no_place() -> None:
    def run(*, fails: bool) -> tuple[list[Tensor], str]:
        model, given = transformer(), model_inputs()
        handle, out = hasten.apply(model, EAGER["fbcache"]), []
        with torch.no_grad(), handle.run([1.0, 0.75, 0.5, 0.0]):
            for sigma in (1.0, 0.75, 0.5):
                now = {**given, "timestep": torch.tensor([sigma])}
                if fails:
                    with pytest.raises(RuntimeError):
                        model(**{**now, "encoder_hidden_states": given["encoder_hidden_states"][..., :-1]})
                out.append(model(**now)[0])
        assert handle.report is not None
        handle.remove()
        return out, handle.report.strip

    assert all(map(torch.equal, run(fails=True)[0], run(fails=False)[0]))
    assert run(fails=True)[1] == run(fails=False)[1] == "C.."


def test_a_run_that_is_ended_within_a_call_lets_the_call_come_to_its_end() -> None:
    model, given = transformer(), {**model_inputs(), "timestep": torch.tensor([1.0])}
    wanted = transformer()(**given)[0]
    handle = hasten.apply(model, EAGER["fbcache"])
    hook = model.context_embedder.register_forward_hook(lambda *call: handle.end())
    with torch.no_grad(), handle.run([1.0, 0.5, 0.0]):
        assert torch.equal(model(**given)[0], wanted)
    hook.remove()
    handle.remove()
    assert handle.reports == []


@pytest.mark.parametrize("relative_to", ["previous", "current"])
def test_the_residuals_change_is_that_of_the_difference(relative_to: str) -> None:
    image, entry, before = (torch.randn(2, 5, 7, dtype=torch.bfloat16) for _ in range(3))
    wanted = relative_l1(image - entry, before, relative_to=relative_to)
    assert torch.equal(residual_l1(image, entry, before, relative_to=relative_to), wanted)
