"""diffusers_handle.py: a recipe applied to one transformer of diffusers, run by run.

Gates take the place of `Module.__call__` on the instances (torch's own slot for a compiled call), so they stand
outside everything that hangs on `forward`: regional compile, offload hooks, layer-wise casting. All of it is put back
in the end.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hasten.call import Call
from hasten.gate import Gate, Streams, gate_model
from hasten.hosts.diffusers_ahead import Ahead, ahead_for
from hasten.hosts.diffusers_attention import HungAttention
from hasten.hosts.diffusers_beside import Beside
from hasten.hosts.diffusers_entrance import Entrance
from hasten.hosts.diffusers_families import family_of
from hasten.hosts.diffusers_parts import Insides
from hasten.hosts.diffusers_slot import Slot
from hasten.hosts.diffusers_stack import STACK, stack_for
from hasten.lane import Watch
from hasten.plan import fitted_to, make_plan
from hasten.recipe import Recipe
from hasten.report import Report
from hasten.session import Session

# Finished runs' reports that are kept, the latest: a pipeline that lives for months must not gather them all.
REPORTS = 64


class Handle:
    """A recipe applied to one transformer. Reuse happens only inside a run; `remove` puts everything back."""

    def __init__(self, transformer: nn.Module, recipe: Recipe, *, beside: Beside | None = None) -> None:
        self.transformer: Any = unwrapped(transformer)  # Any: torch knows a module's own attributes as its kinds only
        self._door = transformer  # what is called: torch.compile's wrapper where there is one
        self.family = family_of(self.transformer)
        recipe, self.remarks = fitted_to(recipe, self.family.anatomy)
        self.recipe = recipe
        self.plan = make_plan(recipe, self.family.anatomy)
        self.insides = Insides(self.transformer, self.plan) if self.plan.ratios else None
        self.watch: Watch | None = None
        self._finished: deque[Report] = deque(maxlen=REPORTS)
        self._session: Session | None = None
        self._awaited: Callable[[], Session] | None = None
        self._sigma: Callable[[], float | None] = lambda: None
        self.about_to_call: Callable[[], None] = lambda: None
        self._call: Call | None = None
        self._entrance: Entrance | None = None  # of a call under way that has not entered the session
        self._outside: Report | None = None  # while a call outside any run is the latest thing that happened
        self._removed = False
        self._slots: list[Slot] = []
        self._ahead: Ahead | None = None
        if self.plan.ratios and getattr(self.transformer, "is_cache_enabled", False):
            raise ValueError(
                f"diffusers' own cache is enabled on this transformer, and {recipe.cache.method} reaches into the same "
                "blocks: call transformer.disable_cache() first."
            )
        if any(hasattr(m._compiled_call_impl, "hasten_handle") for m in (self.transformer, self._door)):
            raise ValueError(
                "this transformer is accelerated already: leave the first `with hasten.accelerate(...)`, "
                "or remove the first handle, before applying another recipe."
            )
        if not recipe.quantize.keep and recipe.changes_model and STACK not in self.transformer.__dict__:
            raise ValueError(
                "quantize.keep is false, so the original weights could not be put back in the end: quantise for good "
                "with hasten.prepare(pipe, recipe) before, or set keep = true."
            )
        self.stack, self._owns_stack = stack_for(self.transformer, recipe, beside=beside)
        self.attention: HungAttention | None = None
        try:
            if recipe.attention.backend != "unchanged":
                self.attention = HungAttention(self.family.blocks, recipe.attention)
            self._hang()
        except BaseException:
            self.remove()
            raise

    @property
    def reports(self) -> list[Report]:
        """One report for each of the latest runs (at most REPORTS), the one under way once it evaluated something."""
        if self._session is not None and self._session.report.evaluations:
            return [*self._finished, self._session.report.read_times()][-REPORTS:]
        return list(self._finished)

    @property
    def report(self) -> Report | None:
        """The last run's report; after a call outside any run, the one that says why nothing was reused."""
        if self._outside is not None:
            return self._outside
        reports = self.reports
        return reports[-1] if reports else None

    @contextmanager
    def run(self, sigmas: Sequence[float] | Tensor) -> Iterator[Handle]:
        """Calls of the transformer inside belong to one sampling run along `sigmas`, the final one included.

        Position is read from the model's timestep argument; where that lies on a GPU it is waited for at the block
        where the call's decision falls, or at the first one under a recipe's attention.
        Raises ValueError when the sigmas do not fall, or when the handle was removed.
        """
        if self._removed:
            raise ValueError(
                "this handle was removed, so nothing would be reused: apply the recipe again with "
                "hasten.apply(transformer, recipe)."
            )
        self.end()
        schedule = [float(s) for s in sigmas]
        remarks = list(self.remarks)
        if schedule and schedule[-1] > 0.0:
            remarks.append(
                f"the run's sigmas end at {schedule[-1]:.4g}: where the loop goes on to 0, give the last 0 too, "
                "or its last two steps are taken for one"
            )
        self._session = Session(self.recipe, self.plan, schedule, watch=self.watch, remarks=remarks)
        self._begun()
        try:
            yield self
        finally:
            self.end()

    def remove(self) -> None:
        """Ends a run that is under way and leaves the transformer as it was. Calling it again does nothing."""
        self._removed = True
        self.end()
        for slot in reversed(self._slots):
            slot.give_back()
        self._slots.clear()
        if self.attention is not None:
            self.attention.remove()
        if self.insides is not None:
            self.insides.leave()
        if self._owns_stack and self.stack is not None:
            self.stack.undo()
            self._owns_stack = False

    def await_run(
        self,
        sigmas: Callable[[], list[float]],
        sigma: Callable[[], float | None],
        before: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Ends the run under way; the next call begins one along `sigmas()`, at `sigma()` where that is known.

        before: how many steps of the whole schedule are left out before it, where that is known; asked after `sigmas`.
        A schedule that rises is no error here: such a run is computed in full, and its report says why.
        """
        self.end()
        self._begun()

        def awaited() -> Session:
            schedule = sigmas()
            return Session(
                self.recipe,
                self.plan,
                schedule,
                before=before(),
                watch=self.watch,
                forgiving=True,
                remarks=self.remarks,
            )

        self._awaited, self._sigma = awaited, sigma

    def move_on(self) -> None:
        """The sampler made a step: the next call is a new evaluation."""
        if self._session is not None:
            self._session.move_on()

    def end(self) -> None:
        """Ends the run under way, if any, drops its tensors and keeps its report."""
        session, self._session, self._awaited = self._session, None, None
        self._call = self._entrance = None
        self.family.end()
        if self._ahead is not None:
            self._ahead.end()
        if self.insides is not None:
            self.insides.end()
        self._sigma = lambda: None
        if session is not None:
            report = session.close()
            if self.attention is not None:
                self.attention.tell(report)
            if self.stack is not None:
                self.stack.tell(report)
            if report.evaluations:
                self._finished.append(report)

    def _hang(self) -> None:
        slot = Slot(self._door)
        self._slots.append(slot)
        gated = self._gated_model(slot)
        gated.hasten_handle = self
        slot.take(gated)
        if self._compiled_whole() or not self.plan.gated:
            return
        if self.insides is not None:
            self.insides.listen()
        self._ahead = ahead_for(self.transformer)
        if self._ahead is not None:
            self._slots += self._ahead.slots
        for index, block in enumerate(self.family.blocks):
            slot = Slot(block)
            self._slots.append(slot)
            gate = Gate(index)
            if self.insides is None:
                slot.take(self._gated_block(slot, gate))
            else:
                slot.take(self.insides.gated_block(slot, gate, lambda: self._call))

    def _begun(self) -> None:
        self._outside = None
        if self.stack is not None:
            self.stack.begin()
        for slot in self._slots:
            slot.retake()
        if self._compiled_whole():
            for slot in self._slots[1:]:
                slot.give_back()
            del self._slots[1:]
        if self.insides is not None:
            self.insides.leave() if self._compiled_whole() else self.insides.listen()

    def _compiled_whole(self) -> bool:
        """Whether the model is one compiled graph, which gates around its blocks would be pulled into."""
        return self._door is not self.transformer or any(slot.compiled for slot in self._slots[:1])

    def _gated_model(self, slot: Slot) -> Any:
        names = list(inspect.signature(self.transformer.forward).parameters)

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.about_to_call()
            if self._awaited is not None:
                awaited, self._awaited = self._awaited, None
                self._session = awaited()
                self._begun()
            session = self._session
            given = kwargs if not args else {**dict(zip(names, args, strict=False)), **kwargs}
            if self.attention is not None:
                self.attention.leave_out(given.get("encoder_attention_mask"))
            if session is None:
                self._note_outside()
                return slot.inner(*args, **kwargs)
            try:
                self._entrance = Entrance(session, self.family, given, self._sigma())
                if not self._gates_enter():
                    self._entered()
                if self._ahead is not None:
                    self._ahead.begin(given)
                if self._call is not None and session.plan.whole_model:
                    out = self._whole(self._call, given, lambda: slot.inner(*args, **kwargs))
                else:
                    out = slot.inner(*args, **kwargs)
                call = self._entered()
            finally:
                self._call = self._entrance = None
                if self._ahead is not None:
                    self._ahead.forget()
            if call is not None:  # else the run was ended in the middle of it
                session.leave(call)
            return out

        return forward

    def _gates_enter(self) -> bool:
        """Whether a gate may enter the session, when what comes before it is launched already."""
        return self.plan.gated and self.insides is None and not self._compiled_whole()

    def _entered(self) -> Call | None:
        """The call under way within its session, which it enters now if it has not; None where none is under way."""
        entrance, self._entrance = self._entrance, None
        if entrance is None:
            return self._call
        self._call = call = entrance.enter()
        if self.insides is not None:
            self.insides.begin(call, entrance.given)
        if self.attention is not None:
            text, moment = entrance.given.get("encoder_hidden_states"), call.ongoing.moment
            self.attention.before_call(
                interval=moment.interval,
                intervals=moment.intervals,
                text_rows=0 if text is None else text.shape[1],
                places=entrance.given.get("img_ids"),
            )
        if self._compiled_whole() and self.plan.gated:
            call.excuse = "compiled as a whole"
            call.terms.report.note(
                "the transformer is compiled as a whole and its blocks cannot be reached: "
                "compile the blocks instead, with transformer.compile_repeated_blocks()"
            )
        return call

    def _whole(self, call: Call, given: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """The model as one span: what it gives out for the noise."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        noise = self.family.noise(given)
        computed: list[Any] = []

        def noise_of_run() -> Tensor:
            computed.append(run())
            return self.family.cut(_sample(computed[0]), noise)

        sample = gate_model(call, noise, noise_of_run)
        if computed:
            return computed[0]
        sample = self.family.whole(sample, given)
        return Transformer2DModelOutput(sample=sample) if given.get("return_dict", True) else (sample,)

    def _gated_block(self, slot: Slot, gate: Gate) -> Callable[..., Any]:
        block, family = slot.module, self.family
        names = list(inspect.signature(unwrapped(block).forward).parameters)
        runs_or_passes, passes = gate.block not in self.plan.acted_at, gate.block != self.plan.end
        # Before the moment is known: a GPU has their work to do while the host enters the session.
        early, entry = gate.block in self.plan.run_anyway, gate.block in self.plan.entries_from

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._call
            if call is None:
                if self._entrance is not None and early and self.attention is None:  # whose settings go by the moment
                    if entry:
                        given = kwargs if not args else {**dict(zip(names, args, strict=False)), **kwargs}
                        self._entrance.come_by(gate.block, family.streams(block, given).image)
                    return slot.inner(*args, **kwargs)
                call = self._entered()
            if call is None:
                return slot.inner(*args, **kwargs)
            if runs_or_passes and not call.standing_in:
                return slot.inner(*args, **kwargs)  # as the gate would have it: most blocks of a computed call
            given = kwargs if not args else {**dict(zip(names, args, strict=False)), **kwargs}
            if passes and call.standing_in:
                return family.untouched(given)  # and of a reused one, at a tenth of its time
            streams = family.streams(block, given)
            if self._ahead is not None and gate.block in call.plan.seams:
                call.onward = functools.partial(self._ahead.last_layer, vector=given["temb"])

            def run() -> Streams:
                return family.after(streams, slot.inner(*args, **kwargs))

            return family.returned(gate(call, streams, run, lambda image: family.with_image(streams, image)))

        return forward

    def _note_outside(self) -> None:
        if self._outside is None:
            self._outside = Report(recipe=self.recipe.to_dict(), intervals=0)
            self._outside.note("called outside a run, everything was computed: use `with handle.run(sigmas):`")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


def _sample(out: Any) -> Tensor:
    sample: Tensor = out[0] if isinstance(out, tuple) else out.sample
    return sample
