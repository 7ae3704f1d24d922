"""comfy_nodes.py is what ComfyUI's page offers: every node in the V3 schema, each a schema and a few lines.

It is imported by the pack's door, inside ComfyUI only. What the nodes do lies in the other comfy_*.py.
"""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import Any

from comfy_api.latest import ComfyExtension, io

from hasten.hosts import (
    comfy,
    comfy_attention,
    comfy_compile,
    comfy_inputs,
    comfy_lines,
    comfy_report,
    comfy_sana_nodes,
    comfy_sparge,
)
from hasten.recipe import Recipe, recipe_names
from hasten.sparse import Tuning, load_settings

_log = logging.getLogger("hasten.comfy")
RecipeType = io.Custom("LIGHTNING_RECIPE")

# What Lightning Recipe has inputs for (web/lightning.js shows them); lists and tables come from files.
BUILT = ("none", "fbcache", "mbcache", "teacache", "easycache", "interval")

SKIP_TIP = "Double blocks that are not run, counted from 0, with commas. A skipped block keeps its ControlNet residual."
SINGLE_TIP = "Single blocks that are not run, counted from 0, with commas."
START_TIP = "Reuse begins here: 0 is pure noise, 1 the finished picture, in the model's own time."
END_TIP = "Reuse ends here, in the model's own time."
HITS_TIP = "At most so many steps in a row are reused; -1 is unlimited."


L1_TIP = "In tuning mode: how far a head may be off, relative to its size."
PV_TIP = "In tuning mode: the same with small weights skipped; above l1."
TUNING_TIP = "Search settings while pictures are drawn exactly; save them with the saving node, then switch this off."
PARALLEL_TIP = "On several GPUs the search runs in a terminal: torchrun -m hasten tune-attention."
OWN_TIP = "Blocks that keep their own attention, counted from 0, with commas."


def _model(tip: str = "The model that will be sampled; it is not changed, a clone leaves the node.") -> Any:
    return io.Model.Input("model", tooltip=tip)


def _skips() -> list[Any]:
    """Right after the model: saved workflows keep widgets by their order, and the original nodes have this one."""
    return [
        io.String.Input("skip_DoubleStreamBlocks", default="3,6,8,12", tooltip=SKIP_TIP),
        io.String.Input("skip_SingleStreamBlocks", default="", tooltip=SINGLE_TIP),
    ]


def _limits() -> list[Any]:
    return [
        io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=START_TIP),
        io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=END_TIP),
        io.Int.Input("max_consecutive_cache_hits", default=-1, min=-1, tooltip=HITS_TIP),
    ]


class Lightning(io.ComfyNode):  # type: ignore[misc]
    """What every node of ours shares: its id for the line, and bad input as one sentence on the node."""

    TITLE = "Lightning"

    @classmethod
    def node_id(cls) -> str | None:
        """This node's id on the page; None where there is no page."""
        return getattr(cls.hidden, "unique_id", None)

    @classmethod
    def put(cls, model: Any, recipe: Recipe, remarks: list[str], percents: Any = None) -> Any:
        """A clone of the model that follows the recipe, its line shown on this node."""
        return comfy.put_recipe(model, recipe, node=cls.node_id(), title=cls.TITLE, remarks=remarks, percents=percents)

    @classmethod
    def passed_through(cls, reason: object, *outputs: Any) -> Any:
        """The inputs as they came, with the reason on the node: never a traceback for a value that can be mended."""
        comfy.tell(cls.node_id(), f"left as it is: {reason}")
        return io.NodeOutput(*outputs)

    @classmethod
    def told(cls, model: Any, kind: str, text: str, *, counts: bool = False) -> Any:
        """A clone of the model whose runs end with this line on this node; it stands there before the first, too."""
        cls.say(text)
        return comfy_lines.put_line(model, kind, text, node=cls.node_id(), title=cls.TITLE, counts=counts)

    @classmethod
    def say(cls, text: str) -> None:
        """One line on this node."""
        comfy.tell(cls.node_id(), text)


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
                _model(),
                *_skips(),
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
                _model(),
                *_skips(),
                io.Float.Input(
                    "fbcache_threshold", default=0.25, min=0.0, max=1.0, step=0.001,
                    tooltip="How much the first block's output may have changed, relative to itself, for a step to be "
                    "reused. Higher is faster and further from the full picture.",
                ),
                *_limits(),
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
                _model(),
                *_skips(),
                io.Float.Input(
                    "default_cache_threshold", default=0.25, min=0.0, max=1.0, step=0.001,
                    tooltip="The threshold of every double block that has none of its own.",
                ),
                io.String.Input(
                    "dsb_cache_thresholds", default="",
                    tooltip="Thresholds of the double blocks in order, with commas; an empty entry is the default.",
                ),
                *_limits(),
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


def attending(node: type[Lightning], model: Any, backend: str | None) -> Any:
    """The node's output: a clone that attends with `backend`, or None of ours, or the model with the reason why not."""
    if backend is None:
        return io.NodeOutput(comfy_lines.drop_line(comfy_attention.drop_attention(model), "attention"))
    reason = comfy_attention.available(backend)
    if reason is not None:
        return node.passed_through(reason, model)
    clone = comfy_attention.put_attention(model, backend)
    return io.NodeOutput(node.told(clone, "attention", f"attention {backend}", counts=True))


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
                _model(),
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


class ApplySageAttention(Lightning):
    TITLE = "Apply SageAttention"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="ApplySageAttention",
            display_name=cls.TITLE,
            category="Lightning",
            description="8-bit attention for this model alone: SageAttention's package or our own kernel.",
            inputs=[
                _model(),
                io.Boolean.Input("use_SageAttention", default=True, tooltip="Off: ComfyUI's own attention."),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, use_SageAttention: bool) -> Any:
        return attending(cls, model, "sageattention" if use_SageAttention else None)


class ApplyFastCuDNNKernels(Lightning):
    TITLE = "Apply Fast CuDNN Kernels"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="ApplyFastCuDNNKernels",
            display_name=cls.TITLE,
            category="Lightning",
            description="TF32 and cuDNN's fastest kernels while this model is sampled; as it was before, after it.",
            inputs=[
                _model(),
                io.Boolean.Input("switch", default=True, tooltip="Off: torch's settings are left alone."),
                io.Combo.Input(
                    "float32_matmul_precision", options=["high", "medium"],
                    tooltip="Of products in float32 alone: high is TF32, medium bfloat16.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, switch: bool, float32_matmul_precision: str) -> Any:
        if not switch:
            plain = comfy_attention.drop_attention(comfy_attention.without_fast_math(model))
            return io.NodeOutput(comfy_lines.drop_line(comfy_lines.drop_line(plain, "attention"), "fast kernels"))
        fast = comfy_attention.put_fast_math(model, float32_matmul_precision)
        reason = comfy_attention.available("cudnn")
        said = f"float32 products at {float32_matmul_precision!r}, cuDNN looks for its fastest kernels"
        if reason is not None:
            return io.NodeOutput(cls.told(fast, "fast kernels", f"{said} · {reason}"))
        fast = comfy_attention.put_attention(fast, "cudnn")
        return io.NodeOutput(cls.told(fast, "attention", f"{said} · attention cudnn", counts=True))


class CompileAndQuantizeModel(Lightning):
    TITLE = "Compile and Quantize Model"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="CompileAndQuantizeModel",
            display_name=cls.TITLE,
            category="Lightning",
            description="Compiles the model's blocks and keeps a copy of the VAE with its linear layers in 8 bits.",
            inputs=[
                _model(),
                io.Vae.Input("vae", tooltip="Not changed: what is quantised is a copy."),
                io.Boolean.Input("do_compile", default=True, tooltip="Compile the blocks as they first run."),
                io.Boolean.Input("dynamic", default=False, tooltip="One compiled block for every picture size."),
                io.Boolean.Input("fullgraph", default=False, tooltip="Raise rather than split a block's graph."),
                io.Combo.Input(
                    "backend",
                    options=comfy_compile.backends(),
                    default=comfy_compile.BACKEND,
                    tooltip="torch.compile's back-end; inductor is the usual one.",
                ),
            ],
            outputs=[io.Model.Output(), io.Vae.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, vae: Any, do_compile: bool, dynamic: bool, fullgraph: bool, backend: str) -> Any:
        quantised, said = comfy_compile.quantise_vae(vae)
        if not do_compile:
            cls.say(said)
            return io.NodeOutput(model, quantised)
        compiled, first = comfy_compile.compile_blocks(model, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
        return io.NodeOutput(cls.told(compiled, "compile", f"{first} · {said}"), quantised)


class LightningNode(Lightning):
    @classmethod
    def define_schema(cls) -> Any:
        names = recipe_names()
        return io.Schema(
            node_id="Lightning",
            display_name=cls.TITLE,
            category="Lightning",
            description="Makes FLUX.1 sampling faster by a named recipe, and says on the node what was reused.",
            inputs=[
                _model(),
                io.Combo.Input(
                    "recipe", options=[*names, "none"], default="balanced" if "balanced" in names else None,
                    tooltip="Mildest first; each is a file in the pack's recipes folder.",
                ),
                io.Float.Input(
                    "threshold", default=-1.0, min=-1.0, max=10.0, step=0.01,
                    tooltip="Takes the recipe's threshold's place; -1 keeps it. Higher reuses more.",
                ),
                RecipeType.Input(
                    "custom_recipe", optional=True, tooltip="From Lightning Recipe: used instead of the named one."
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, recipe: str, threshold: float = -1.0, custom_recipe: Any = None) -> Any:
        try:
            wanted = Recipe.load(recipe if custom_recipe is None else custom_recipe)
            wanted, remarks = comfy_inputs.with_threshold(wanted, threshold)
        except (ValueError, OSError) as reason:
            return cls.passed_through(reason, model)
        return io.NodeOutput(cls.put(model, wanted, remarks))


class LightningRecipe(Lightning):
    TITLE = "Lightning Recipe"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="LightningRecipe",
            display_name=cls.TITLE,
            category="Lightning",
            description="Builds a recipe, or reads one from a file. Inputs that a method lacks are hidden.",
            inputs=[
                io.Combo.Input("method", options=[*BUILT, "file"], default="fbcache",
                               tooltip="What decides when a step is reused; file reads everything from a file."),
                io.String.Input("file", default="", tooltip="A .toml or .json file on the machine that runs ComfyUI."),
                io.Float.Input("threshold", default=-1.0, min=-1.0, max=10.0, step=0.005,
                               tooltip="Higher reuses more; -1 is the method's published one."),
                io.String.Input("thresholds", default="",
                                tooltip="mbcache: one for each double block in order, with commas."),
                io.Int.Input("every", default=4, min=1, max=100,
                             tooltip="interval: every so many steps one is computed."),
                io.Float.Input("growth", default=0.0, min=0.0, max=100.0, step=0.05,
                               tooltip="interval: how much longer it grows each time."),
                io.Combo.Input("predictor", options=["hold", "taylor", "chebyshev", "damped"], default="taylor",
                               tooltip="What stands in: the last work as it is, or carried forward along its course."),
                io.Int.Input("order", default=1, min=0, max=2, tooltip="taylor: 1 follows a line, 2 a parabola."),
                io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Reuse begins after this share of the steps."),
                io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Reuse ends after this share of the steps."),
                io.Int.Input("max_consecutive_hits", default=-1, min=-1, tooltip=HITS_TIP),
                io.String.Input("skip_double", default="", tooltip=SKIP_TIP),
                io.String.Input("skip_single", default="", tooltip=SINGLE_TIP),
            ],
            outputs=[RecipeType.Output("recipe"), io.String.Output("toml")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, method: str, file: str, **values: Any) -> Any:
        try:
            recipe = Recipe.load(file.strip()) if method == "file" else comfy_inputs.built(method, values)
        except (ValueError, OSError) as reason:
            recipe = Recipe.load("none")
            cls.say(f"nothing will be reused: {reason}")
        return io.NodeOutput(recipe.to_dict(), recipe.to_toml())


class LightningAttention(Lightning):
    TITLE = "Lightning Attention"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="LightningAttention",
            display_name=cls.TITLE,
            category="Lightning",
            description="Chooses this model's attention; what it cannot take goes to the one that was there before.",
            inputs=[
                _model(),
                io.Combo.Input(
                    "backend", options=["unchanged", *comfy_attention.choices()], default="sdpa",
                    tooltip="auto: the fastest that is near enough. sdpa: torch's own. cudnn: cuDNN's. int8, int8_fp8: "
                    "our 8-bit kernels. sparse: ours, half of the blocks. Others need their packages.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, backend: str) -> Any:
        return attending(cls, model, None if backend == "unchanged" else backend)


class LightningCompile(Lightning):
    TITLE = "Lightning Compile"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="LightningCompile",
            display_name=cls.TITLE,
            category="Lightning",
            description="Compiles the model's blocks: the first run is slow, later ones are faster.",
            inputs=[
                _model(),
                io.Boolean.Input("dynamic", default=True, tooltip="One compiled block for every picture size."),
                io.Combo.Input(
                    "backend",
                    options=comfy_compile.backends(),
                    default=comfy_compile.BACKEND,
                    tooltip="torch.compile's back-end; inductor is the usual one.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, dynamic: bool, backend: str) -> Any:
        compiled, said = comfy_compile.compile_blocks(model, backend=backend, dynamic=dynamic)
        return io.NodeOutput(cls.told(compiled, "compile", said))


class LoadFluxNano(Lightning):
    TITLE = "Load flux-nano"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="LoadFluxNano",
            display_name=cls.TITLE,
            category="Lightning",
            description="The small FLUX that comes with the pack: small pictures in seconds, nothing to download.",
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls) -> Any:
        from hasten.hosts.comfy_flux_nano import load

        return io.NodeOutput(*load())


class LightningReport(Lightning):
    TITLE = "Lightning Report"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="LightningReport",
            display_name=cls.TITLE,
            category="Lightning",
            description="The last run of a model as a table and a strip: what was computed, what was reused, why.",
            inputs=[
                _model("The model as it goes into the sampler."),
                io.Latent.Input("samples", tooltip="The sampler's result: the report is made after it."),
            ],
            outputs=[io.String.Output("text"), io.Image.Output("strip")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, samples: Any) -> Any:
        from hasten.report import Report

        reports = comfy.reports_of(model)
        if reports:
            report = reports[-1]
        else:
            report = Report(recipe={}, intervals=0)
            report.note("no Lightning node is before this model's sampler, or it was not sampled yet")
        text = comfy_report.as_text(report)
        cls.say("\n".join(text.splitlines()[:2]))
        return io.NodeOutput(text, comfy_report.as_picture(report), ui={"text": (text,)})


class ApplySpargeAttn(Lightning):
    TITLE = "Apply SpargeAttn"

    @classmethod
    def define_schema(cls) -> Any:
        folder_paths = comfy_sana_nodes._folders()

        return io.Schema(
            node_id="ApplySpargeAttn",
            display_name=cls.TITLE,
            category="Lightning",
            description="Block-sparse attention for FLUX.1, by a tuned file or half of the blocks; for large sizes.",
            inputs=[
                _model(),
                io.Float.Input("l1", default=0.06, min=0.0, max=1.0, step=0.0001, tooltip=L1_TIP),
                io.Float.Input("pv_l1", default=0.065, min=0.0, max=1.0, step=0.0001, tooltip=PV_TIP),
                io.Boolean.Input("enable_tuning_mode", default=False, tooltip=TUNING_TIP),
                io.Boolean.Input("parallel_tuning", default=False, tooltip=PARALLEL_TIP),
                io.Combo.Input(
                    "tuned_hyperparams", options=["None", *folder_paths.get_filename_list("checkpoints")],
                    tooltip="A file of Save Finetuned SpargeAttn Hyperparams or of `hasten tune-attention`, moved to "
                    "models/checkpoints. None: half of the blocks, which needs no tuning.",
                ),
                io.String.Input("skip_DoubleStreamBlocks", default="3,6,8,12", tooltip=OWN_TIP),
                io.String.Input("skip_SingleStreamBlocks", default="", tooltip=OWN_TIP),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, l1: float, pv_l1: float, enable_tuning_mode: bool, parallel_tuning: bool,
        tuned_hyperparams: str, skip_DoubleStreamBlocks: str, skip_SingleStreamBlocks: str,
    ) -> Any:  # fmt: skip
        folder_paths = comfy_sana_nodes._folders()

        try:
            skip = comfy_inputs.skip_lists(skip_DoubleStreamBlocks, skip_SingleStreamBlocks)
            network = model.model.diffusion_model
            names = comfy_sparge.block_names(network, skip)
            if enable_tuning_mode:
                folder = Path(folder_paths.get_temp_directory())
                file = folder / f"spargeattn_{uuid.uuid4().hex}.safetensors"
                calls = len(comfy_sparge.LOOKS) * comfy_sparge.PICTURES
                search = comfy_sparge.Search(Tuning(names, file, l1=l1, pv_l1=pv_l1, calls=calls))
                tuned = comfy_sparge.put_sparge(model, names, search=search)
                said = "tuning mode: pictures are exact, some of their steps are searched; see the saving node"
                if parallel_tuning:
                    said += " · on several GPUs: torchrun -m hasten tune-attention"
                return io.NodeOutput(cls.told(tuned, "attention", said))
            reason = comfy_attention.available("sparse")
            if reason is not None:
                return cls.passed_through(reason, model)
            settings, said = None, "attention sparse, half of the blocks"
            if tuned_hyperparams != "None":
                path = Path(folder_paths.get_full_path_or_raise("checkpoints", tuned_hyperparams))
                settings = load_settings(path, comfy_sparge.block_names(network), network.params.num_heads)
                names = [name for name in names if name in settings]
                said = f"attention sparse, {tuned_hyperparams}"
        except (ValueError, OSError) as reason:
            return cls.passed_through(str(reason).rstrip("."), model)
        put = comfy_sparge.put_sparge(model, names, settings=settings)
        return io.NodeOutput(cls.told(put, "attention", said, counts=True))


class SaveSpargeAttnHyperparams(Lightning):
    TITLE = "Save Finetuned SpargeAttn Hyperparams"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="SaveSpargeAttnHyperparams",
            display_name=cls.TITLE,
            category="Lightning",
            description="Saves what Apply SpargeAttn found in tuning mode into ComfyUI's output folder.",
            inputs=[
                _model("The model out of Apply SpargeAttn in tuning mode."),
                io.String.Input("filename_prefix", default="spargeattn_hyperparams", tooltip="How the file is named."),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, filename_prefix: str) -> Any:
        folder_paths = comfy_sana_nodes._folders()

        search = comfy_sparge.search_of(model)
        if search is None:
            cls.say("nothing to save: no Apply SpargeAttn in tuning mode is before this node")
            return io.NodeOutput()
        folder, name, counter, _, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        search.to = Path(folder) / f"{name}_{counter:05}_.safetensors"
        cls.say(search.save())
        return io.NodeOutput()


NODES = [
    LightningNode,
    LightningRecipe,
    LightningAttention,
    LightningCompile,
    LightningReport,
    LoadFluxNano,
    ApplyTeaCacheAndSkipBlocks,
    ApplyFBCacheAndSkipBlocks,
    ApplyMBCacheAndSkipBlocks,
    ApplyToCa,
    ApplySageAttention,
    ApplyFastCuDNNKernels,
    ApplySpargeAttn,
    SaveSpargeAttnHyperparams,
    CompileAndQuantizeModel,
    *comfy_sana_nodes.NODES,
]


class Pack(ComfyExtension):  # type: ignore[misc]
    """Every node of the pack."""

    async def get_node_list(self) -> list[Any]:
        return list(NODES)


def extension() -> Any:
    """What ComfyUI's loader asks the pack's door for."""
    return Pack()
