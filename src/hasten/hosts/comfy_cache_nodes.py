"""comfy_cache_nodes.py offers the original pack's caches on ComfyUI's page: TeaCache, FBCache, MBCache, ToCa."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from hasten.hosts import comfy_inputs
from hasten.hosts.comfy_node import Lightning, limits, model_input, skips


class ApplyTeaCacheAndSkipBlocks(Lightning):
    TITLE = "Apply TeaCache and Skip Blocks"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="ApplyTeaCacheAndSkipBlocks",
            display_name=cls.TITLE,
            category="Lightning",
            description="TeaCache for FLUX.1: reuses the blocks' work while their modulated input changes little.",
            inputs=[
                model_input(),
                *skips(),
                io.Boolean.Input("do_teacache", default=True, tooltip="Off: blocks are skipped and nothing is reused."),
                io.Float.Input(
                    "rel_l1_threshold", default=0.4, min=0.0, max=10.0, step=0.01,
                    tooltip="How much change may add up before a step is computed. At 0.18 or below nothing is ever "
                    "reused; 0.25 to 0.8 are usual.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, do_teacache: bool, rel_l1_threshold: float, skip_DoubleStreamBlocks: str,
        skip_SingleStreamBlocks: str,
    ) -> Any:  # fmt: skip
        try:
            skip = comfy_inputs.skip_lists(skip_DoubleStreamBlocks, skip_SingleStreamBlocks)
            recipe, remarks = comfy_inputs.teacache(rel_l1_threshold, skip, on=do_teacache)
        except ValueError as reason:
            return cls.passed_through(reason, model)
        return io.NodeOutput(cls.put(model, recipe, remarks))


class ApplyFBCacheAndSkipBlocks(Lightning):
    TITLE = "Apply FBCache and Skip Blocks"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="ApplyFBCacheAndSkipBlocks",
            display_name=cls.TITLE,
            category="Lightning",
            description="First-Block cache for FLUX.1: runs the first block, and reuses the others' work when its "
            "output changed little since the step before.",
            inputs=[
                model_input(),
                *skips(),
                io.Float.Input(
                    "fbcache_threshold", default=0.25, min=0.0, max=1.0, step=0.001,
                    tooltip="How much the first block's output may have changed, relative to itself, for a step to be "
                    "reused. Higher is faster and further from the full picture.",
                ),
                *limits(),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, fbcache_threshold: float, skip_DoubleStreamBlocks: str, skip_SingleStreamBlocks: str,
        start: float, end: float, max_consecutive_cache_hits: int,
    ) -> Any:  # fmt: skip
        try:
            skip = comfy_inputs.skip_lists(skip_DoubleStreamBlocks, skip_SingleStreamBlocks)
            recipe = comfy_inputs.fbcache(fbcache_threshold, max_consecutive_cache_hits, skip)
        except ValueError as reason:
            return cls.passed_through(reason, model)
        return io.NodeOutput(cls.put(model, recipe, [], (start, end)))


class ApplyMBCacheAndSkipBlocks(Lightning):
    TITLE = "Apply MBCache and Skip Blocks"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="ApplyMBCacheAndSkipBlocks",
            display_name=cls.TITLE,
            category="Lightning",
            description="Multi-block cache for FLUX.1: compares after every double block, and the first block that "
            "changed little ends the walk.",
            inputs=[
                model_input(),
                *skips(),
                io.Float.Input(
                    "default_cache_threshold", default=0.25, min=0.0, max=1.0, step=0.001,
                    tooltip="The threshold of every double block that has none of its own.",
                ),
                io.String.Input(
                    "dsb_cache_thresholds", default="",
                    tooltip="Thresholds of the double blocks in order, with commas; an empty entry is the default.",
                ),
                *limits(),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, default_cache_threshold: float, dsb_cache_thresholds: str, skip_DoubleStreamBlocks: str,
        skip_SingleStreamBlocks: str, start: float, end: float, max_consecutive_cache_hits: int,
    ) -> Any:  # fmt: skip
        try:
            skip = comfy_inputs.skip_lists(skip_DoubleStreamBlocks, skip_SingleStreamBlocks)
            hits = max_consecutive_cache_hits
            recipe = comfy_inputs.mbcache(default_cache_threshold, dsb_cache_thresholds, hits, skip)
        except ValueError as reason:
            return cls.passed_through(reason, model)
        return io.NodeOutput(cls.put(model, recipe, [], (start, end)))


class ApplyToCa(Lightning):
    TITLE = "Apply ToCa"

    @classmethod
    def define_schema(cls) -> Any:
        optional: dict[str, Any] = {"optional": True}
        return io.Schema(
            node_id="ApplyToCa",
            display_name=cls.TITLE,
            category="Lightning/ToCa",
            description="ToCa for FLUX.1: between full steps attention is reused, and only some tokens go through the "
            "MLPs.",
            inputs=[
                model_input(),
                io.Int.Input(
                    "interval",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="So many steps from one full evaluation to the next; 1 computes all.",
                    **optional,
                ),
                io.Float.Input(
                    "ratio",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "The share of the tokens that go through the MLPs in the steps between, before the terms below."
                    ),
                    **optional,
                ),
                io.Combo.Input(
                    "score",
                    options=["attention", "value", "random", "age"],
                    default="attention",
                    tooltip=(
                        "Which tokens come first: those that receive most attention, those with large "
                        "values, any, or the oldest."
                    ),
                    **optional,
                ),
                io.Float.Input(
                    "staleness",
                    default=0.25,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    tooltip=(
                        "What a token gains that was left out for a whole interval; beside 0.25 the score"
                        " counts little."
                    ),
                    **optional,
                ),
                io.Int.Input(
                    "full_first",
                    default=3,
                    min=0,
                    max=100,
                    tooltip="So many steps at the beginning are computed in full.",
                    **optional,
                ),
                io.Float.Input(
                    "double_share",
                    default=0.4,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="What the ratio is multiplied by in double blocks.",
                    **optional,
                ),
                io.Float.Input(
                    "single_share",
                    default=1.6,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="What the ratio is multiplied by in single blocks.",
                    **optional,
                ),
                io.Combo.Input(
                    "layers",
                    options=["model", "original"],
                    default="model",
                    tooltip=(
                        "The ratio falls from layer to layer: over the model's own number of them, or "
                        "over 27 as in the original."
                    ),
                    **optional,
                ),
                io.Float.Input(
                    "spatial",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip=(
                        "What the best token of each cell of 4 x 4 gains, a share of its own score; the "
                        "paper has 0.4, the original 0."
                    ),
                    **optional,
                ),
                io.Combo.Input(
                    "memory",
                    options=["model", "bf16", "fp8", "host"],
                    default="model",
                    tooltip=(
                        "How it is kept: in the model's dtype, in 16 or 8 bits, or in the computer's memory (slower)."
                    ),
                    **optional,
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, interval: int = 4, ratio: float = 0.1, score: str = "attention", staleness: float = 0.25,
        full_first: int = 3, double_share: float = 0.4, single_share: float = 1.6, layers: str = "model",
        spatial: float = 0.0, memory: str = "model",
    ) -> Any:  # fmt: skip
        values = {key: value for key, value in locals().items() if key not in ("cls", "model")}
        try:
            recipe = comfy_inputs.toca(values)
        except ValueError as reason:
            return cls.passed_through(reason, model)
        return io.NodeOutput(cls.put(model, recipe, []))
