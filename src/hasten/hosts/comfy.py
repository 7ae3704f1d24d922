"""comfy.py ties the engine to ComfyUI: a node's recipe travels with the MODEL, each sampling run gets gates of its own.

Only two things of ours stay on a model: a plain dict in `transformer_options` (it is deep-copied with every clone) and
one OUTER_SAMPLE wrapper. All else (session, gates, the other wrappers) lives in the run's own copy of the options and
goes with it, also on an error or an interrupt. ComfyUI is never imported here: what is needed comes with each call.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hasten.anatomy import Anatomy, flux, sana
from hasten.call import Call
from hasten.gate import Gate, gate_model
from hasten.hosts.comfy_parts import FluxParts, has_mlp, tapped
from hasten.plan import fitted_to, make_plan
from hasten.recipe import Attention, Recipe
from hasten.report import Report
from hasten.sections import Compile, Quantize
from hasten.session import Session
from hasten.taps import Taps, empty

# Our place in `transformer_options`, and the key of our wrappers.
KEY = "hasten"
# In one call's own options only: the call under way.
CALL = "hasten_call"
# What attention node is in charge, for the line on the node.
ATTENTION = "hasten_attention"

# comfy.patcher_extension.WrappersMP, the same in every version seen.
OUTER_SAMPLE, PREDICT_NOISE, APPLY_MODEL = "outer_sample", "predict_noise", "apply_model"

_log = logging.getLogger("hasten.comfy")

Patch = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


def put_recipe(
    model: Any,
    recipe: Recipe,
    *,
    node: str | None = None,
    title: str = "Lightning",
    remarks: Sequence[str] = (),
    percents: tuple[float, float] | None = None,
) -> Any:
    """A clone of `model` (a ModelPatcher) whose sampling runs follow `recipe`; one that it had before is replaced.

    node: the id of the node that shows each run's line. percents: start and end as ComfyUI counts them, in the
    model's own time, where they are not fractions of the steps.
    """
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    earlier = options.get(KEY)
    stood_down = [*earlier["stood_down"], earlier["node"]] if earlier else []
    options[KEY] = {
        "recipe": recipe.to_dict(),
        "node": node,
        "title": title,
        "remarks": list(remarks),
        "percents": list(percents) if percents else None,
        "stood_down": [other for other in stood_down if other not in (None, node)],
    }
    clone.remove_wrappers_with_key(OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(OUTER_SAMPLE, KEY, Sampling())
    return clone


def reports_of(model: Any) -> list[Report]:
    """The reports of the latest runs of `model`, oldest first; empty when no node of ours is before it."""
    wrappers = model.wrappers.get(OUTER_SAMPLE, {}).get(KEY, [])
    return [report for wrapper in wrappers for report in getattr(wrapper, "reports", ())]


def tell(node: str | None, text: str) -> None:
    """Shows one line on a node of the page, and in the log; in the log alone where there is no page."""
    _log.info("%s", text)
    for name in ("server", "comfy.cmd.server"):
        instance = getattr(getattr(sys.modules.get(name), "PromptServer", None), "instance", None)
        send = getattr(instance, "send_progress_text", None)
        if node is not None and send is not None:
            send(text, node)
            return


class Sampling:
    """The OUTER_SAMPLE wrapper of one node. What it keeps from run to run: reports, and blocks that were compiled."""

    def __init__(self) -> None:
        self.reports: deque[Report] = deque(maxlen=16)
        self.compiled: dict[int, Any] = {}

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Runs the sampling with gates, or without them and with the reason on the node."""
        guider = executor.class_obj
        options = guider.model_options
        settings = options.get("transformer_options", {}).get(KEY)
        if settings is None:
            return executor(*args, **kwargs)
        # noise, latent_image, sampler, sigmas: the order has been the same since OUTER_SAMPLE exists.
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        try:
            run = Run(guider.model_patcher, options, settings, sigmas, self.compiled)
        except ValueError as reason:
            return self._without(executor, args, kwargs, settings, str(reason))
        interrupted = True
        guider.model_options = run.hang(options)
        try:
            samples = executor(*args, **kwargs)
            interrupted = False
            return samples
        finally:
            guider.model_options = options
            report = run.close()
            if interrupted:
                report.note("did not come to its end")
            self._show(settings, report, run.attention)

    def _without(self, executor: Any, args: Any, kwargs: Any, settings: dict[str, Any], reason: str) -> Any:
        samples = executor(*args, **kwargs)
        report = Report(recipe=settings["recipe"], intervals=0)
        report.note(f"left as it is: {reason}")
        self._show(settings, report, None)
        return samples

    def _show(self, settings: dict[str, Any], report: Report, attention: str | None) -> None:
        for remark in settings["remarks"]:
            report.note(remark)
        self.reports.append(report)
        line = report.line() if report.evaluations else " · ".join(report.notes)
        if attention is not None:
            line += f" · attention {attention}"
        tell(settings["node"], line)
        for other in settings["stood_down"]:
            tell(other, f"not in charge: {settings['title']}, later in the graph, replaced it")


class Run:
    """One sampling run: its session and its gates, hung into this run's own options."""

    def __init__(
        self,
        patcher: Any,
        options: dict[str, Any],
        settings: dict[str, Any],
        sigmas: Any,
        compiled: dict[int, Any] | None = None,
    ) -> None:
        """Raises ValueError with the reason when the run has to be left as it is.

        compiled: blocks that were compiled for earlier runs, by identity.
        """
        to = options["transformer_options"]
        if "easycache" in to:
            name = getattr(to["easycache"], "name", "EasyCache")
            raise ValueError(f"ComfyUI's own {name} node is in charge of this model; bypass one of the two")
        anatomy = anatomy_of(patcher.model.diffusion_model)
        recipe, self.remarks = fitted(Recipe.load(settings["recipe"]), anatomy)
        recipe, remarks = fitted_to(recipe, anatomy)
        self.remarks += remarks
        if settings.get("percents"):
            recipe = _with_percents(recipe, settings["percents"], patcher.get_model_object("model_sampling"))
        self.attention: str | None = to.get(ATTENTION)
        # What ComfyUI's own compile node was asked for; it is kept beside its wrapper.
        self.how_compiled: dict[str, Any] = options.get("torch_compile_kwargs") or {}
        self.compiled = {} if compiled is None else compiled
        self.plan = make_plan(recipe, anatomy)
        schedule = sigmas.detach().float().cpu().tolist()
        before = _steps_before(schedule, patcher.get_model_object("model_sampling"))
        self.session = Session(recipe, self.plan, schedule, before=before)
        self.doubles = anatomy.stage("double").blocks
        self.blocks = anatomy.blocks
        self.sigma: float | None = None
        self.latest: Held | None = None
        self.gates: dict[tuple[str, int], Patch] = {}
        self.taps, self.foreign, self.grid = Taps(), False, (0, 0)
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
                self.foreign = self.foreign or dit.get(name) is not None
                hang = _hung_on_single if single else _hung_on_double
                dit[name] = self.gates[name] = hang(self, Gate(block), dit.get(name))
        return own

    def close(self) -> Report:
        """Drops every tensor and every gate; gives the report."""
        self.gates.clear()
        self.taps.take_off()
        self.latest = None
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
        try:
            base.diffusion_model = network
            for stack in stacks:
                for i, block in enumerate(stack):
                    if id(block) not in self.compiled:
                        self.compiled[id(block)] = torch.compile(block, **self.how_compiled)
                    stack[i] = self.compiled[id(block)]
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


class Held:
    """One call under way, the network that runs it (a device's own, where conditions are split over several), and
    how many text tokens lead its joint stream (known once a double block was met).
    """

    __slots__ = ("call", "network", "text_tokens")

    def __init__(self, call: Call, network: Any) -> None:
        self.call, self.network = call, network
        self.text_tokens = 0


@dataclass(slots=True)
class DoubleStreams:
    """A double block's streams: text (B, L, C) and image (B, N, C) apart. out: what the host takes back."""

    image: Tensor
    out: dict[str, Any]
    vec: Any
    network: Any

    def modulated(self) -> Tensor:
        """The image tokens after the first double block's norm, scale and shift, (B, N, C)."""
        if hasattr(self.network, "modulated"):  # a network of ours knows itself
            own: Tensor = self.network.modulated(self.image, self.vec)
            return own
        block = self.network.double_blocks[0]
        scale_and_shift = block.img_mod(self.vec)[0]
        normed: Tensor = block.img_norm1(self.image)
        modulated: Tensor = normed * (1 + scale_and_shift.scale) + scale_and_shift.shift
        return modulated


@dataclass(slots=True)
class JointStream:
    """A single block's stream: text and image tokens joined, (B, L + N, C), text first."""

    joint: Tensor
    text_tokens: int

    @property
    def image(self) -> Tensor:
        """The image tokens, (B, N, C): a view."""
        return self.joint[:, self.text_tokens :]

    def modulated(self) -> Tensor:
        """Only the first double block has a modulated input that is looked at."""
        raise AssertionError("TeaCache looks at the first double block")


def _hung_on_double(run: Run, gate: Gate, found: Patch | None) -> Patch:
    """The patch for a double block; `found` is the entry that another pack put there before, run as the block."""

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        held = run.held(args)
        if held is None:
            return _run(found, args, extra)
        held.text_tokens = args["txt"].shape[1]

        def through() -> DoubleStreams:
            out = _run(found, args, extra)
            return DoubleStreams(out["img"], out, None, None)

        def with_image(image: Tensor) -> DoubleStreams:
            return DoubleStreams(image, {"img": image, "txt": args["txt"]}, None, None)

        entering = DoubleStreams(args["img"], args, args["vec"], held.network)
        parts = run.parts(held, gate.block, args)
        after = gate(held.call, entering, through, with_image, parts)
        if parts is not None:
            empty(run.tapped(parts.block))
        return {"img": args["img"], "txt": args["txt"]} if after is entering else after.out

    return patch


def _hung_on_single(run: Run, gate: Gate, found: Patch | None) -> Patch:
    """The patch for a single block; as _hung_on_double."""

    def patch(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        held = run.held(args)
        if held is None:
            return _run(found, args, extra)
        joint, text_tokens = args["img"], held.text_tokens

        def through() -> JointStream:
            return JointStream(_run(found, args, extra)["img"], text_tokens)

        def with_image(image: Tensor) -> JointStream:
            # Text is dropped after the last block: what it holds by then is of no consequence.
            whole = joint.clone()
            whole[:, text_tokens:] = image
            return JointStream(whole, text_tokens)

        parts = run.parts(held, gate.block, args)
        after = gate(held.call, JointStream(joint, text_tokens), through, with_image, parts)
        if parts is not None:
            empty(run.tapped(parts.block))
        return {"img": after.joint}

    return patch


def _run(found: Patch | None, args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    if found is not None:
        return found(args, extra)
    out: dict[str, Any] = extra["original_block"](args)
    return out


def anatomy_of(model: Any) -> Anatomy:
    """The anatomy of ComfyUI's Flux network or of our Sana, told by its class's name: no module is imported for that.

    Sana's network lies in comfy_sana_network.py. Raises ValueError for any other network, and for Flux variants whose
    blocks share one modulation (FLUX.2).
    """
    model = getattr(model, "_orig_mod", model)
    if any(c.__name__ == "SanaNetwork" for c in type(model).__mro__):
        return sana(len(model.double_blocks))
    if not any(c.__name__ == "Flux" and c.__module__.endswith("ldm.flux.model") for c in type(model).__mro__):
        raise ValueError(f"{type(model).__name__} is a family that is not known here (FLUX.1 and Sana are)")
    if getattr(getattr(model, "params", None), "global_modulation", False):
        raise ValueError("FLUX.2 is a family that is not known here (FLUX.1 is)")
    found = flux(len(model.double_blocks), len(model.single_blocks))
    if all(hasattr(block, "img_mlp") for block in model.double_blocks) and has_mlp(model):
        return found
    closed = tuple(replace(s, parts=tuple(p for p in s.parts if p != "mlp")) for s in found.stages)
    return replace(found, stages=closed)


def beside(recipe: Recipe) -> list[str]:
    """Remarks on what a recipe wants that other nodes do in ComfyUI."""
    return [
        f"the recipe's [{part}] is not used here: {title} does that"
        for part, wanted, title in (
            ("attention", recipe.attention != Attention(), "Lightning Attention"),
            ("compile", recipe.compile != Compile(), "Lightning Compile"),
            ("quantize", recipe.quantize != Quantize(), "the model's loader"),
        )
        if wanted
    ]


def fitted(recipe: Recipe, anatomy: Anatomy) -> tuple[Recipe, list[str]]:
    """The recipe without the blocks, in its skip lists and thresholds, that this model lacks, and remarks on those."""
    remarks = []
    kept = {}
    for name in ("double", "single"):
        count, listed = anatomy.stage(name).blocks, getattr(recipe.skip, name)
        kept[name] = tuple(i for i in listed if i < count)
        lacking = ", ".join(str(i) for i in listed if i >= count)
        if lacking:
            remarks.append(f"this model has {count} {name} blocks: {lacking} on the skip list not found")
    cache, doubles = recipe.cache, anatomy.stage("double").blocks
    if len(cache.thresholds) > doubles:
        remarks.append(
            f"this model has {doubles} double blocks: the other {len(cache.thresholds) - doubles} thresholds are unused"
        )
        cache = replace(cache, thresholds=cache.thresholds[:doubles])
    return replace(recipe, cache=cache, skip=replace(recipe.skip, **kept)), remarks


def copied(options: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts and lists anew, everything else as it is."""
    new: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, dict):
            new[key] = copied(value)
        else:
            new[key] = list(value) if isinstance(value, list) else value
    return new


def _with_percents(recipe: Recipe, percents: Sequence[float], sampling: Any) -> Recipe:
    """Start and end where ComfyUI's percents lie in this model's sigmas, as the original nodes have it."""
    start, end = percents
    bounds: dict[str, Any] = {}
    if start > 0.0:
        bounds["sigma_start"] = float(sampling.percent_to_sigma(start))
    if end < 1.0:
        bounds["sigma_end"] = float(sampling.percent_to_sigma(end))
    return replace(recipe, cache=replace(recipe.cache, **bounds)) if bounds else recipe


def _steps_before(sigmas: Sequence[float], sampling: Any) -> int | None:
    """How many equal steps of the whole schedule lie before a run that begins late (denoise below 1).

    ComfyUI hands over the rest of a schedule only. Where in the model's own time its first sigma lies tells how long
    the whole one is, exactly so for schedulers with equal steps in time ("simple", "normal"). None where that is not
    to be known.
    """
    low, high = 0.0, 1.0
    if not sigmas or float(sampling.percent_to_sigma(low)) <= sigmas[0]:
        return 0
    for _ in range(40):  # percent falls to a float's precision
        middle = (low + high) / 2
        low, high = (middle, high) if float(sampling.percent_to_sigma(middle)) > sigmas[0] else (low, middle)
    steps = len(set(sigmas)) - 1
    return round(steps * low / (1.0 - low)) if low < 1.0 - 1e-6 else None
