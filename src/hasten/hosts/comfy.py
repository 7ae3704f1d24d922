"""comfy.py ties the engine to ComfyUI: a node's recipe travels with the MODEL, each sampling run gets gates of its own.

Only two things of ours stay on a model: a plain dict in `transformer_options` (it is deep-copied with every clone) and
one OUTER_SAMPLE wrapper. All else (session, gates, the other wrappers) lives in the run's own copy of the options and
goes with it, also on an error or an interrupt. ComfyUI is never imported here: what is needed comes with each call.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

from hasten.hosts.comfy_options import KEY, OUTER_SAMPLE
from hasten.hosts.comfy_run import Run
from hasten.recipe import Recipe
from hasten.report import Report

_log = logging.getLogger("hasten.comfy")


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
        self.compiled: dict[tuple[int, str], Any] = {}

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
