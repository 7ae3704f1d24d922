"""comfy_compile_nodes.py offers compiling and 8-bit weights on ComfyUI's page."""

from __future__ import annotations

from pickle import UnpicklingError
from typing import Any

from comfy_api.latest import io
from safetensors import SafetensorError

from hasten.hosts import comfy_compile, comfy_quantize, comfy_sana_nodes
from hasten.hosts.comfy_node import Lightning, model_input


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
                model_input(),
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


class CompileAndQuantizeModel(Lightning):
    TITLE = "Compile and Quantize Model"

    @classmethod
    def define_schema(cls) -> Any:
        return io.Schema(
            node_id="CompileAndQuantizeModel",
            display_name=cls.TITLE,
            category="Lightning",
            description="Compiles the model's blocks and keeps a copy of the VAE with its linear layers in 8 bits; the "
            "model's own too, where asked.",
            inputs=[
                model_input(),
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
                # At the end and optional, so that the original pack's workflows and saved prompts, which lack it, run.
                io.Boolean.Input(
                    "quantize_model",
                    default=False,
                    optional=True,
                    tooltip="Keep the model's layers in 8 bits too: fp8 on GPUs that have it, else int8.",
                ),
            ],
            outputs=[io.Model.Output(), io.Vae.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, vae: Any, do_compile: bool, dynamic: bool, fullgraph: bool, backend: str,
        quantize_model: bool = False,
    ) -> Any:  # fmt: skip
        quantised, said = comfy_compile.quantise_vae(vae)
        if quantize_model:
            model, first = comfy_quantize.quantise_model(model)
            said = f"{first} · {said}"
        if not do_compile:
            cls.say(said)
            return io.NodeOutput(model, quantised)
        compiled, first = comfy_compile.compile_blocks(model, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
        return io.NodeOutput(cls.told(compiled, "compile", f"{first} · {said}"), quantised)


class LoadDiffusionModel8Bit(Lightning):
    TITLE = "Load Diffusion Model in 8 Bits"

    @classmethod
    def define_schema(cls) -> Any:
        folder_paths = comfy_sana_nodes._folders()

        return io.Schema(
            node_id="LoadDiffusionModel8Bit",
            display_name=cls.TITLE,
            category="Lightning",
            description="Loads a FLUX and keeps its blocks' layers in 8 bits: a third less memory, faster on new GPUs.",
            inputs=[
                io.Combo.Input(
                    "unet_name",
                    options=folder_paths.get_filename_list("diffusion_models"),
                    tooltip="A file in 16 bits from models/diffusion_models. One in fp8 is loaded as it is.",
                ),
                io.Combo.Input(
                    "format",
                    options=["auto", "fp8", "int8"],
                    default="auto",
                    tooltip="auto: fp8 on GPUs that multiply in it (compute capability 8.9 and newer), else int8.",
                ),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, unet_name: str, format: str = "auto") -> Any:
        import comfy.sd

        folder_paths = comfy_sana_nodes._folders()
        path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
        try:
            model = comfy.sd.load_diffusion_model(path)
        except (SafetensorError, UnpicklingError) as error:  # neither names the file
            pickled = isinstance(error, UnpicklingError)
            reason = "no PyTorch file of weights alone" if pickled else str(error).splitlines()[0]
            raise ValueError(f"{unet_name} cannot be read ({reason}): download it again.") from None
        try:
            said = comfy_quantize.quantise_for_good(model, format)
        except ValueError as reason:
            said = f"left as it is: {reason}"
        cls.say(said)
        return io.NodeOutput(model)
