"""comfy_nodes.py is what ComfyUI's page offers: the pack's own nodes, and the list of all.

It is imported by the pack's door, inside ComfyUI only. The other nodes lie in comfy_*_nodes.py, each a schema and a few
lines; what they do lies in the other comfy_*.py.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from hasten.hosts import comfy, comfy_inputs, comfy_report, comfy_sana_nodes
from hasten.hosts.comfy_attention_nodes import ApplyFastCuDNNKernels, ApplySageAttention, LightningAttention
from hasten.hosts.comfy_cache_nodes import (
    ApplyFBCacheAndSkipBlocks,
    ApplyMBCacheAndSkipBlocks,
    ApplyTeaCacheAndSkipBlocks,
    ApplyToCa,
)
from hasten.hosts.comfy_compile_nodes import CompileAndQuantizeModel, LightningCompile, LoadDiffusionModel8Bit
from hasten.hosts.comfy_node import HITS_TIP, SINGLE_TIP, SKIP_TIP, Lightning, model_input
from hasten.hosts.comfy_sparge_nodes import ApplySpargeAttn, SaveSpargeAttnHyperparams
from hasten.recipe import Recipe, recipe_names

RecipeType = io.Custom("LIGHTNING_RECIPE")

# What Lightning Recipe has inputs for (web/lightning.js shows them); lists and tables come from files.
BUILT = ("none", "fbcache", "mbcache", "teacache", "easycache", "interval")


class LightningNode(Lightning):
    @classmethod
    def define_schema(cls) -> Any:
        names = recipe_names()
        return io.Schema(
            node_id="Lightning",
            display_name=cls.TITLE,
            category="Lightning",
            description="Makes FLUX.1 and Sana sampling faster by a named recipe, and says what was reused.",
            inputs=[
                model_input(),
                io.Combo.Input(
                    "recipe", options=[*names, "none"], default="balanced" if "balanced" in names else None,
                    tooltip="Mildest first; each is a file in the pack's recipes folder.",
                ),
                io.Float.Input(
                    "threshold", default=-1.0, min=-1.0, max=10.0, step=0.01,
                    tooltip="Only for a custom recipe that has one (fbcache, mbcache, teacache, easycache, magcache): "
                    "takes its place, higher reuses more; -1 keeps it. The named recipes follow fixed steps.",
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
                model_input("The model as it goes into the sampler."),
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
            report.note("no caching node of this pack is before this model's sampler, or it was not sampled yet")
        text = comfy_report.as_text(report)
        cls.say("\n".join(text.splitlines()[:2]))
        return io.NodeOutput(text, comfy_report.as_picture(report), ui={"text": (text,)})


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
    LoadDiffusionModel8Bit,
    *comfy_sana_nodes.NODES,
]


class Pack(ComfyExtension):  # type: ignore[misc]
    """Every node of the pack."""

    async def get_node_list(self) -> list[Any]:
        return list(NODES)


def extension() -> Any:
    """What ComfyUI's loader asks the pack's door for."""
    return Pack()
