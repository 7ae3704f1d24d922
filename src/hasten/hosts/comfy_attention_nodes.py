"""comfy_attention_nodes.py offers the choice of attention on ComfyUI's page, and torch's fast kernels."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from hasten.hosts import comfy_attention, comfy_lines
from hasten.hosts.comfy_node import Lightning, model_input


def attending(node: type[Lightning], model: Any, backend: str | None) -> Any:
    """The node's output: a clone that attends with `backend`, or None of ours, or the model with the reason why not."""
    if backend is None:
        return io.NodeOutput(comfy_lines.drop_line(comfy_attention.drop_attention(model), "attention"))
    reason = comfy_attention.available(backend)
    if reason is not None:
        return node.passed_through(reason, model)
    clone = comfy_attention.put_attention(model, backend)
    return io.NodeOutput(node.told(clone, "attention", f"attention {backend}", counts=True))


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
                model_input(),
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
                model_input(),
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
                model_input(),
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
            return io.NodeOutput(cls.told(fast, "fast kernels", f"{said} · attention is left as it is: {reason}"))
        fast = comfy_attention.put_attention(fast, "cudnn")
        return io.NodeOutput(cls.told(fast, "attention", f"{said} · attention cudnn", counts=True))
