"""comfy_run.py is one sampling run in ComfyUI: its session and its gates, in this run's own copy of the options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hasten.call import Call
from hasten.gate import Gate, gate_model
from hasten.hosts.comfy_fitting import anatomy_of, beside, fitted, steps_before, with_percents
from hasten.hosts.comfy_gates import Held, Patch, hung_on_double, hung_on_single
from hasten.hosts.comfy_options import APPLY_MODEL, ATTENTION, CALL, KEY, PREDICT_NOISE, copied
from hasten.hosts.comfy_parts import FluxParts, FluxWalk, staying, tapped
from hasten.plan import fitted_to, make_plan
from hasten.recipe import Recipe
from hasten.report import Report
from hasten.session import Session
from hasten.taps import Taps


class Run:
    """One sampling run: its session and its gates, hung into this run's own options."""

    def __init__(
        self,
        patcher: Any,
        options: dict[str, Any],
        settings: dict[str, Any],
        sigmas: Any,
        compiled: dict[tuple[int, str], Any] | None = None,
    ) -> None:
        """Raises ValueError with the reason when the run has to be left as it is.

        compiled: blocks that were compiled for earlier runs, by identity and by what was asked for.
        """
        to = options["transformer_options"]
        if "easycache" in to:
            name = getattr(to["easycache"], "name", "EasyCache")
            raise ValueError(f"ComfyUI's own {name} node is in charge of this model; bypass one of the two")
        anatomy = anatomy_of(patcher.model.diffusion_model)
        recipe, self.remarks = fitted_to(Recipe.load(settings["recipe"]), anatomy)
        recipe, remarks = fitted(recipe, anatomy)
        self.remarks += remarks
        if settings.get("percents"):
            recipe = with_percents(recipe, settings["percents"], patcher.get_model_object("model_sampling"))
        self.attention: str | None = to.get(ATTENTION)
        # What ComfyUI's own compile node was asked for; it is kept beside its wrapper.
        self.how_compiled: dict[str, Any] = options.get("torch_compile_kwargs") or {}
        self.compiled = {} if compiled is None else compiled
        self.plan = make_plan(recipe, anatomy)
        schedule = sigmas.detach().float().cpu().tolist()
        before = steps_before(schedule, patcher.get_model_object("model_sampling"))
        self.session = Session(recipe, self.plan, schedule, before=before)
        self.doubles = anatomy.stage("double").blocks
        self.blocks = anatomy.blocks
        self.sigma: float | None = None
        self.latest: Held | None = None
        self.gates: dict[tuple[str, int], Patch] = {}
        self.taps, self.foreign, self.grid = Taps(), False, (0, 0)
        self.staying: tuple[Any, list[Tensor] | None] | None = None
        for remark in (*self.remarks, *beside(recipe)):
            self.session.report.note(remark)

    def hang(self, options: dict[str, Any]) -> dict[str, Any]:
        """This run's own copy of the options, with our wrappers and gates chained onto what is there."""
        own = copied(options)
        to = own["transformer_options"]
        wrappers = to.setdefault("wrappers", {})
        wrappers.setdefault(PREDICT_NOISE, {})[KEY] = [self.predict_noise]
        wrappers.setdefault(APPLY_MODEL, {})[KEY] = [self.apply_model]
        if self.plan.gated:
            dit = to.setdefault("patches_replace", {}).setdefault("dit", {})
            for block in range(self.blocks):
                single = block >= self.doubles
                name = ("single_block", block - self.doubles) if single else ("double_block", block)
                # A patch that only names the block (comfy_sparge.py) is no other block in its place.
                self.foreign = self.foreign or getattr(dit.get(name), "hasten_before", dit.get(name)) is not None
                hang = hung_on_single if single else hung_on_double
                dit[name] = self.gates[name] = hang(self, Gate(block), dit.get(name))
        return own

    def close(self) -> Report:
        """Drops every tensor and every gate; gives the report."""
        self.gates.clear()
        self.taps.take_off()
        self.latest = self.staying = None
        return self.session.close()

    def held(self, args: Mapping[str, Any]) -> Held | None:
        """The call that a block's arguments belong to; None outside of any, where the block simply runs."""
        to = args.get("transformer_options")
        # Before 0.3.60 ComfyUI's blocks were not handed the options; it ran one call at a time then.
        return self.latest if to is None else to.get(CALL)

    def predict_noise(self, executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        """PREDICT_NOISE: once for each evaluation of the sampler, before its conditions are split into calls."""
        self.session.move_on()
        # The only synchronisation where none is measured; samplers read their sigmas themselves just as often.
        self.sigma = float(timestep.flatten()[0])
        try:
            return executor(x, timestep, *args, **kwargs)
        finally:
            self.sigma = None

    def apply_model(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """APPLY_MODEL: one call for some of an evaluation's conditions, x (B, C, H, W) with the noise alone."""
        given = list(args)
        # c_concat, c_crossattn, control, transformer_options
        to = kwargs.get("transformer_options") if len(given) < 4 else given[3]
        conditions = self._conditions(to, x)
        if to is None or conditions is None:
            self.session.report.note("a call without known conditions was computed in full")
            return executor(x, t, *args, **kwargs)
        sigma = float(t.flatten()[0]) if self.sigma is None else self.sigma
        call = self.session.enter(conditions, x, sigma=sigma)
        if self._intact(to):
            # The call is found through its own options: calls may run side by side, each in its thread.
            self.latest = Held(call, executor.class_obj.diffusion_model)
            control = given[2] if len(given) > 2 else kwargs.get("control")
            self.latest.between = control is not None
            own = {**to, CALL: self.latest}
            if len(given) < 4:
                kwargs["transformer_options"] = own
            else:
                given[3] = own
        else:
            call.excuse = "another patch took over a block"
        if self.plan.ratios:
            self._listen(call, executor.class_obj.diffusion_model, x)
        try:
            with self._compiled_by_block(executor.class_obj):
                if self.plan.whole_model:
                    out = self._whole(call, x, t, lambda: executor(x, t, *given, **kwargs))
                else:
                    out = executor(x, t, *given, **kwargs)
        finally:
            self.latest = None
            self.taps.empty()
        self.session.leave(call)
        return out

    def _listen(self, call: Call, network: Any, x: Tensor) -> None:
        """Taps what caches inside blocks look at; blocks that another pack replaces cannot be run in part."""
        network = getattr(network, "_orig_mod", network)
        for block in (*network.double_blocks, *network.single_blocks):
            self.taps.put_on(self.tapped(block))
        self.grid = ((x.shape[-2] + 1) // 2, (x.shape[-1] + 1) // 2)  # patches of 2 x 2
        if self.foreign:
            call.excuse = "another patch is in a block's place, and in part it cannot be run"
            self.session.report.note(call.excuse)

    def tapped(self, block: Any) -> list[Any]:
        """The modules of a block that are listened to."""
        block = getattr(block, "_orig_mod", block)
        return list(tapped(block, self.plan.refreshes and self.plan.tokens.score in ("attention", "value")))

    def parts(self, held: Held, block: int, args: dict[str, Any]) -> FluxParts | None:
        """The way into a block of this call, where the recipe reaches inside."""
        if not self.plan.ratios:
            return None
        network = getattr(held.network, "_orig_mod", held.network)
        blocks = network.double_blocks if block < self.doubles else network.single_blocks
        inner = blocks[block if block < self.doubles else block - self.doubles]
        rows, columns = self.grid
        image = args["img"].shape[1] - (0 if block < self.doubles else held.text_tokens)
        grid = (rows, columns) if rows * columns == image else None
        return FluxParts(getattr(inner, "_orig_mod", inner), args, held.text_tokens, grid)

    def walk(self, held: Held, args: dict[str, Any]) -> FluxWalk | None:
        """All blocks at once from the first one's arguments, where nothing is known to lie between them."""
        network = getattr(held.network, "_orig_mod", held.network)
        # Other packs (PuLID) put a forward of their own in place, which adds to the image between blocks.
        if held.between or "forward_orig" in vars(network) or not isinstance(args["vec"], Tensor):
            return None
        if self.staying is None or self.staying[0] is not network:
            self.staying = network, staying(network, args["img"].device)
        return FluxWalk(network, args, self.staying[1])

    def _whole(self, call: Call, x: Tensor, t: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """The model as one span, in velocities: what the host hands over here is x - sigma * velocity.

        Weighed here rather than around the network's forward: concatenated channels are not in x yet, and a
        torch.compile of the whole network never sees it.
        """
        sigma = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        computed: list[Tensor] = []

        def velocity() -> Tensor:
            computed.append(run())
            return (x - computed[0]) / sigma

        predicted = gate_model(call, x, velocity)
        return computed[0] if computed else x - predicted * sigma

    @contextmanager
    def _compiled_by_block(self, base: Any) -> Iterator[None]:
        """Where a graph was compiled as a whole, its blocks compiled one by one while this call lasts.

        Gates decide outside compiled code: inside one large graph each would be a break, and its block run as it is.
        """
        whole = base.diffusion_model
        if not self.gates or not hasattr(whole, "_orig_mod"):
            yield
            return
        self.session.report.note("compiled block by block instead of as a whole")
        network = whole._orig_mod
        stacks = (network.double_blocks, network.single_blocks)
        plain = [list(stack) for stack in stacks]
        how = repr(sorted(self.how_compiled.items()))
        try:
            base.diffusion_model = network
            for stack in stacks:
                for i, block in enumerate(stack):
                    key = id(block), how
                    if key not in self.compiled:
                        self.compiled[key] = torch.compile(block, **self.how_compiled)
                    stack[i] = self.compiled[key]
            yield
        finally:
            for stack, blocks in zip(stacks, plain, strict=True):
                for i, block in enumerate(blocks):
                    stack[i] = block
            base.diffusion_model = whole

    def _conditions(self, to: Mapping[str, Any] | None, x: Tensor) -> list[Any] | None:
        """One key for each equal share of the batch: ComfyUI's uuid of each condition, rows grouped."""
        uuids = (to or {}).get("uuids")
        return list(uuids) if uuids and x.shape[0] % len(uuids) == 0 else None

    def _intact(self, to: Mapping[str, Any]) -> bool:
        """Whether every gate hangs where it was hung: one that is gone could leave a stand-in half done."""
        if not self.gates:
            return True
        dit = to.get("patches_replace", {}).get("dit", {})
        return all(dit.get(name) is gate for name, gate in self.gates.items())
