"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A diffusers folder, a hub name, sana-nano or a .safetensors transformer; flux-nano if left out.",
    ),
]
TransformerFile = Annotated[Path | None, typer.Option("--transformer", help="ComfyUI-style transformer .safetensors.")]
VaeFile = Annotated[Path | None, typer.Option("--vae", help="Autoencoder .safetensors (ae.safetensors).")]
ClipFile = Annotated[Path | None, typer.Option("--clip-l", help="CLIP-L text encoder .safetensors.")]
T5File = Annotated[Path | None, typer.Option("--t5xxl", help="T5-XXL text encoder .safetensors; fp8 is fine.")]
TokenizersPlace = Annotated[
    str | None,
    typer.Option("--tokenizers", help="For single files: a FLUX or ComfyUI folder or a hub name that has tokenizers."),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps; 28 if left out, 20 for Sana, 2 for Sprint.")
]
Size = Annotated[
    str | None,
    typer.Option("--size", help="WxH, divisible by 16 (Sana: 32); 256x256 for the nano models, else 1024x1024."),
]
Seed = Annotated[int, typer.Option("--seed", help="The noise that the picture begins with.")]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", help="FLUX.1-dev's embedded one, 3.5 if left out; Sana's own, 4.5 if left out."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cuda, cuda:N, mps or cpu.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; torch's choice if left out.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No bars and no remarks; errors still come.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout and nothing else.")]
