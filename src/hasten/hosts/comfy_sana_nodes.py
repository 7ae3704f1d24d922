"""comfy_sana_nodes.py offers Sana on ComfyUI's page: the original pack's nodes, and one for the authors' sizes.

Files that cannot be used end in one sentence. What the nodes do lies in the other comfy_sana_*.py.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from hasten.data import models_folder
from hasten.hosts import comfy, comfy_inputs

CATEGORY = "Lightning/Sana"
# The original's own choice; what a checkpoint is, its tensors tell.
MODEL_TYPES = ("auto", "SanaMS_1600M_P1_D20", "SanaMS_600M_P1_D28")
DTYPES = ("default", "fp32", "fp16", "bf16", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")
PARTS = ("auto", "fp32", "fp16", "bf16")
MULTIPLE = 32
NANO_TOKENS = 64  # of text, as sana-nano was trained
RATIOS = ("1:1", "4:3", "3:2", "16:9", "2:1", "3:4", "2:3", "9:16", "1:2")


def _folders() -> Any:
    """ComfyUI's folder_paths, which its packaged form keeps elsewhere."""
    try:
        return importlib.import_module("folder_paths")
    except ModuleNotFoundError:
        return importlib.import_module("comfy.cmd.folder_paths")


def diffusers_folders() -> dict[str, Path]:
    """Sana pipelines in diffusers' layout by the name that a widget shows: core's diffusers folder, and ours."""
    found = {}
    for root in [*map(Path, _folders().get_folder_paths("diffusers")), models_folder()]:
        for index in sorted(root.glob("*/model_index.json")) if root.is_dir() else []:
            if '"Sana' in index.read_text(encoding="utf-8", errors="replace"):
                found[f"{index.parent.name} (folder)"] = index.parent
    return found


def text_encoder_folders() -> dict[str, Path]:
    """Folders of models/text_encoders, and of Sana pipelines, by name."""
    roots = [Path(root) for root in _folders().get_folder_paths("text_encoders")]
    found = {child.name: child for root in roots if root.is_dir() for child in sorted(root.iterdir()) if child.is_dir()}
    return {**found, **diffusers_folders()}


def file_or_folder(kind: str, name: str) -> Path:
    """Where a file of one of ComfyUI's folders lies, or a diffusers folder. Raises FileNotFoundError."""
    path = _folders().get_full_path(kind, name)
    found = Path(path) if path else diffusers_folders().get(name)
    if found is None:
        raise FileNotFoundError(f"there is no {name} in models/{kind}: put it there, then reload the page.")
    return found


def _names(kind: str) -> list[str]:
    return [*_folders().get_filename_list(kind), *diffusers_folders()]


def _needs(*packages: str) -> None:
    """Raises ImportError with one sentence where a package that Sana needs is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"Sana needs the Python package {missing[0]}: run pip install -r requirements.txt in the pack's folder "
            "with ComfyUI's Python, then restart."
        )


class Sana(io.ComfyNode):  # type: ignore[misc]
    """What the nodes here share."""

    TITLE = ""

    @classmethod
    def say(cls, text: str) -> None:
        """One line on this node, where there is something to say."""
        if text:
            comfy.tell(getattr(cls.hidden, "unique_id", None), text)


class SanaDiffusionLoader(Sana):
    TITLE = "Load Sana Diffusion Model"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="SanaDiffusionLoader",
            display_name=cls.TITLE,
            category=CATEGORY,
            description="Loads Sana, Sana 1.5 or Sana Sprint: the authors' .pth or safetensors, or a diffusers folder.",
            inputs=[
                io.Combo.Input("model_name", options=_names("diffusion_models"),
                               tooltip="From models/diffusion_models, or a folder of models/diffusers."),
                io.Combo.Input("model_type", options=list(MODEL_TYPES), default="auto",
                               tooltip="Told from the file itself; kept for saved workflows."),
                io.Combo.Input("weight_dtype", options=list(DTYPES),
                               tooltip="What the weights are kept in; fp8 halves the memory of 16 bits."),
                io.Boolean.Input("convert_model_dtype", default=True,
                                 tooltip="default: choose what suits the device; off keeps the file's own."),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model_name: str, model_type: str, weight_dtype: str, convert_model_dtype: bool) -> Any:
        _needs("diffusers", "accelerate")
        from hasten.hosts.comfy_sana import load_model

        path = file_or_folder("diffusion_models", model_name)
        model, said = load_model(path, weight_dtype=weight_dtype, convert=convert_model_dtype)
        cls.say(said)
        return io.NodeOutput(model)


class SanaCLIPLoader(Sana):
    TITLE = "Load Sana CLIP"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="SanaCLIPLoader",
            display_name=cls.TITLE,
            category=CATEGORY,
            description="Loads Gemma-2-2b, which reads Sana's prompts: Google's folder, Efficient-Large-Model's, or a "
            "bitsandbytes 4-bit one.",
            inputs=[
                io.Combo.Input("model_name", options=list(text_encoder_folders()),
                               tooltip="A folder of models/text_encoders, with its tokenizer."),
                io.Int.Input("max_length", default=300, min=1, max=9999,
                             tooltip="Tokens that Sana is given; it was trained with 300."),
                io.Combo.Input("device", options=["cuda", "cpu"], default="cuda",
                               tooltip="cuda: where ComfyUI puts text encoders; cpu keeps it off the GPU."),
                io.Combo.Input("dtype", options=list(PARTS), default="auto",
                               tooltip="fp16 overflows in Gemma-2: bf16 is taken for it."),
            ],
            outputs=[io.Clip.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model_name: str, max_length: int, device: str, dtype: str) -> Any:
        _needs("transformers", "diffusers", "accelerate")
        from hasten.hosts.comfy_sana_text import load_clip

        folders = text_encoder_folders()
        if model_name not in folders:
            raise FileNotFoundError(f"there is no folder {model_name} in models/text_encoders: put it there.")
        clip, said = load_clip(folders[model_name], max_length=max_length, device=device, dtype=dtype)
        cls.say(said)
        return io.NodeOutput(clip)


class SanaTextEncode(Sana):
    TITLE = "Sana Text Encode"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="SanaTextEncode",
            display_name=cls.TITLE,
            category=CATEGORY,
            description="A prompt as Sana reads it. A positive one goes behind the authors' instruction, an empty or "
            "negative one must not.",
            inputs=[
                io.String.Input("text", multiline=True, tooltip="What to draw; empty for no negative prompt."),
                io.Clip.Input("GEMMA", tooltip="From Load Sana CLIP."),
                io.Combo.Input("instruction", options=["auto", "on", "off"], default="auto", optional=True,
                               tooltip="auto: for every text that is not empty. Choose off for a negative prompt."),
            ],
            outputs=[io.Conditioning.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, text: str, GEMMA: Any, instruction: str = "auto") -> Any:
        from hasten.hosts.comfy_sana_text import encode

        instructed = bool(text.strip()) if instruction == "auto" else instruction == "on"
        return io.NodeOutput(encode(GEMMA, text, instructed=instructed))


class SanaVAELoader(Sana):
    TITLE = "Load Sana VAE"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="SanaVAELoader",
            display_name=cls.TITLE,
            category=CATEGORY,
            description="Loads DC-AE f32c32, Sana's autoencoder: the authors' or diffusers' file, or a folder.",
            inputs=[
                io.Combo.Input("model_name", options=_names("vae"), tooltip="From models/vae, or a diffusers folder."),
                io.Combo.Input("dtype", options=list(PARTS), default="auto",
                               tooltip="fp16 overflows in DC-AE: bf16 is taken for it."),
            ],
            outputs=[io.Vae.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model_name: str, dtype: str) -> Any:
        _needs("diffusers", "accelerate")
        from hasten.hosts.comfy_sana_vae import load_vae

        vae, said = load_vae(file_or_folder("vae", model_name), dtype=dtype)
        cls.say(said)
        return io.NodeOutput(vae)


class LoadSanaNano(Sana):
    TITLE = "Load sana-nano"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="LoadSanaNano",
            display_name=cls.TITLE,
            category=CATEGORY,
            description="The small Sana that comes along: MODEL, CLIP and VAE without any download. 256 x 256, "
            "20 steps, euler, simple, cfg 4.5.",
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls) -> Any:
        _needs("diffusers", "accelerate", "transformers")
        from hasten.hosts.comfy_sana import load_model
        from hasten.hosts.comfy_sana_text import load_clip
        from hasten.hosts.comfy_sana_vae import load_vae

        folder = models_folder() / "sana-nano"
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(
                f"there is no sana-nano at {folder}: install the pack again, with its models folder."
            )
        # So small a model gains nothing from 16 bits, and a CPU is slow at them.
        model, _ = load_model(folder, weight_dtype="fp32")
        clip, _ = load_clip(folder, max_length=NANO_TOKENS, dtype="fp32")
        vae, _ = load_vae(folder, dtype="fp32")
        return io.NodeOutput(model, clip, vae)


def empty_latent(width: int, height: int, batch_size: int) -> dict[str, Any]:
    """A LATENT of zeros. Raises ValueError with one sentence for a size that is no multiple of 32."""
    import comfy.model_management
    import torch

    for name, value in (("width", width), ("height", height)):
        if value % MULTIPLE:
            near = max(MULTIPLE, round(value / MULTIPLE) * MULTIPLE)
            raise ValueError(f"the {name} is {value}: Sana's must be divisible by {MULTIPLE}; try {near}.")
    shape = (batch_size, 32, height // MULTIPLE, width // MULTIPLE)
    device = comfy.model_management.intermediate_device()
    return {"samples": torch.zeros(shape, device=device), "downscale_ratio_spacial": MULTIPLE}


class SanaEmptyLatentImage(Sana):
    TITLE = "Sana Empty Latent Image"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id=cls.__name__,
            display_name=cls.TITLE,
            category=CATEGORY,
            description="An empty latent of 32 channels, one for 32 x 32 pixels.",
            inputs=[
                io.Int.Input("width", default=1024, min=32, max=16384, step=32, tooltip="In pixels, divisible by 32."),
                io.Int.Input("height", default=1024, min=32, max=16384, step=32, tooltip="In pixels, divisible by 32."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="Pictures drawn at once."),
            ],
            outputs=[io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> Any:
        return io.NodeOutput(empty_latent(width, height, batch_size))


class EmptySanaLatentImage(SanaEmptyLatentImage):
    """The name that the original pack's own example workflow asks for, and ComfyUI_ExtraModels has."""

    TITLE = "Empty Sana Latent Image"


class SanaResolution(Sana):
    TITLE = "Sana Resolution"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="SanaResolution",
            display_name=cls.TITLE,
            category=CATEGORY,
            description="The size that Sana was trained on next to a ratio, for its 512, 1024, 2K and 4K models.",
            inputs=[
                io.Combo.Input("model", options=["512", "1024", "2K", "4K"], default="1024",
                               tooltip="What the checkpoint was trained for."),
                io.Combo.Input("ratio", options=list(RATIOS), tooltip="Width to height."),
            ],
            outputs=[io.Int.Output("width"), io.Int.Output("height")],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: str, ratio: str) -> Any:
        return io.NodeOutput(*trained_size(model, ratio))


def trained_size(model: str, ratio: str) -> tuple[int, int]:
    """Width and height of the authors' table next to the ratio, as diffusers has it."""
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as alpha
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as sigma
    from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

    tables = {
        "512": alpha.ASPECT_RATIO_512_BIN,
        "1024": alpha.ASPECT_RATIO_1024_BIN,
        "2K": sigma.ASPECT_RATIO_2048_BIN,
        "4K": ASPECT_RATIO_4096_BIN,
    }
    wide, _, high = ratio.partition(":")
    wanted = int(high) / int(wide)  # the tables count height by width
    height, width = min(tables[model].items(), key=lambda entry: abs(float(entry[0]) - wanted))[1]
    return int(width), int(height)


class ApplyMBCacheAndSkipBlocksForSana(Sana):
    TITLE = "Apply MBCache and Skip Blocks for Sana"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="ApplyMBCacheAndSkipBlocksForSana",
            display_name=cls.TITLE,
            category=CATEGORY,
            description="Multi-block cache for Sana: compares directions after every block, and the first block whose "
            "output turned little ends the walk.",
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled; a clone leaves the node."),
                io.String.Input("skip_blocks", default="14,17",
                                tooltip="Blocks that are not run, counted from 0, with commas."),
                io.Float.Input("default_cache_threshold", default=0.0002, min=0.0, max=1.0, step=0.00001,
                               tooltip="Half of one minus the cosine, for every block without one of its own."),
                io.String.Input("block_cache_thresholds", default="",
                                tooltip="Thresholds of the blocks in order, with commas; empty: the default."),
                io.Float.Input("start", default=0.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Reuse begins here: 0 is noise, 1 the finished picture, in the model's time."),
                io.Float.Input("end", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="Reuse ends here, in the model's own time."),
                io.Int.Input("max_consecutive_cache_hits", default=-1, min=-1,
                             tooltip="At most so many steps in a row are reused; -1 is unlimited."),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, skip_blocks: str, default_cache_threshold: float, block_cache_thresholds: str, start: float,
        end: float, max_consecutive_cache_hits: int,
    ) -> Any:  # fmt: skip
        node = getattr(cls.hidden, "unique_id", None)
        try:
            recipe = comfy_inputs.sana_mbcache(
                default_cache_threshold, block_cache_thresholds, max_consecutive_cache_hits, skip_blocks
            )
        except ValueError as reason:
            cls.say(f"left as it is: {reason}")
            return io.NodeOutput(model)
        return io.NodeOutput(comfy.put_recipe(model, recipe, node=node, title=cls.TITLE, percents=(start, end)))


NODES = [
    LoadSanaNano,
    SanaDiffusionLoader,
    SanaCLIPLoader,
    SanaTextEncode,
    SanaVAELoader,
    SanaEmptyLatentImage,
    EmptySanaLatentImage,
    SanaResolution,
    ApplyMBCacheAndSkipBlocksForSana,
]
