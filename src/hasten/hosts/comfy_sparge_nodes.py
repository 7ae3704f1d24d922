"""comfy_sparge_nodes.py offers block-sparse attention on ComfyUI's page: Apply SpargeAttn, and saving what it tuned."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from hasten.hosts import comfy_attention, comfy_inputs, comfy_sana_nodes, comfy_sparge
from hasten.hosts.comfy_node import Lightning, model_input
from hasten.sparse import Tuning, load_settings

L1_TIP = "In tuning mode: how far a head may be off, relative to its size."
PV_TIP = "In tuning mode: the same with small weights skipped; above l1."
TUNING_TIP = "Search settings while pictures are drawn exactly; save them with the saving node, then switch this off."
PARALLEL_TIP = "On several GPUs the search runs in a terminal: torchrun -m hasten tune-attention."
OWN_TIP = "Blocks that keep their own attention, counted from 0, with commas."


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
                model_input(),
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
                every = len(comfy_sparge.block_names(network))
                names = [name for name in names if name in settings]
                said = f"attention sparse in {len(names)} of {every} blocks, {tuned_hyperparams}"
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
                model_input("The model out of Apply SpargeAttn in tuning mode."),
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
        try:
            folder, name, counter, _, _ = folder_paths.get_save_image_path(
                filename_prefix, folder_paths.get_output_directory()
            )
        except Exception as error:  # ComfyUI's refusal of a place outside its output folder has no class of its own
            cls.say(f"not saved: filename_prefix is {filename_prefix!r} ({str(error).strip('* ').splitlines()[0]})")
            return io.NodeOutput()
        search.to, search.node = Path(folder) / f"{name}_{counter:05}_.safetensors", cls.node_id()
        cls.say(search.save())
        return io.NodeOutput()
