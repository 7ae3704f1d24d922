"""comfy_sana_text.py makes a ComfyUI CLIP of a Gemma-2 folder, and Sana's conditioning of a text.

The model is transformers' own. Its states are taken as SanaPipeline takes them: the prompt behind the authors'
instruction, padded on the right, the first token's state and the last 299. Imported when a node runs.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.sd
import torch
from comfy.supported_models_base import ClipTarget
from torch import Tensor, nn

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def resolved(folder: Path) -> Path:
    """The folder with the model in it: itself, a pipeline's text_encoder, or a hub cache's latest snapshot.

    Raises ValueError or FileNotFoundError with one sentence when there is no Gemma-2 or it has no tokenizer.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: put a Gemma-2-2b folder into models/text_encoders.")
    snapshots = sorted(folder.glob("snapshots/*/config.json"), key=lambda file: file.stat().st_mtime)
    if snapshots:
        folder = snapshots[-1].parent
    model = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    try:
        kind = json.loads((model / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"{folder} is no model folder: it has no config.json that can be read.") from None
    if kind != "gemma2":
        raise ValueError(f"{folder} holds a {kind} model: Sana reads its prompts with Gemma-2-2b (model_type gemma2).")
    if tokenizer_folder(model) is None:
        raise ValueError(
            f"{folder} has no tokenizer (tokenizer.json or tokenizer.model): download the whole folder of the model."
        )
    return model


def tokenizer_folder(model: Path) -> Path | None:
    """Where the model's tokenizer lies: with it, or beside it as in a pipeline's folder."""
    for place in (model, model.parent / "tokenizer"):
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return place
    return None


def load_clip(folder: Path, *, max_length: int = 300, device: str = "cuda", dtype: str = "auto") -> tuple[Any, str]:
    """ComfyUI's CLIP with the folder's Gemma-2 behind it, and what to say on the node.

    device: "cpu" keeps it off the GPU. dtype: a key of DTYPES; Gemma-2 overflows float16, so bfloat16 is taken for it.
    Raises ValueError or OSError with one sentence.
    """
    model, said = resolved(folder), []
    kind = DTYPES[dtype]
    if kind is torch.float16:
        kind = torch.bfloat16
        said.append("Gemma-2 overflows float16: it works in bfloat16")

    def tokenizer(embedding_directory: Any = None, tokenizer_data: Any = None, **_: Any) -> Tokens:
        return Tokens(model, max_length)

    def encoder(dtype: Any = None, device: Any = None, model_options: Any = None, **_: Any) -> Gemma:
        # ComfyUI's own choice for text encoders may be float16.
        chosen = kind or (torch.bfloat16 if dtype is torch.float16 else dtype) or torch.float32
        return Gemma(model, chosen, max_length).to(device)

    options: dict[str, Any] = {}
    if device == "cpu":
        options = {name: torch.device("cpu") for name in ("load_device", "offload_device", "initial_device")}
    clip = comfy.sd.CLIP(ClipTarget(tokenizer=tokenizer, clip=encoder), model_options=options)
    return clip, " · ".join(said)


def instruction() -> str:
    """The authors' complex human instruction, which stands before a positive prompt, as SanaPipeline has it."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


def encode(clip: Any, text: str, *, instructed: bool) -> list[Any]:
    """A CONDITIONING of the text: its states (1, L, C) and, beside them, their mask (1, L)."""
    tokens = clip.tokenize(text, sana_instruction=instruction() if instructed else "")
    conditioning: list[Any] = clip.encode_from_tokens_scheduled(tokens)
    return conditioning


class Tokens:
    """Gemma's tokenizer, in the form that ComfyUI's CLIP asks for. A pair's second number is 1.0 for every token."""

    def __init__(self, folder: Path, max_length: int) -> None:
        from transformers import AutoTokenizer

        self.max_length = max_length
        place = tokenizer_folder(folder)
        try:
            self.words: Any = AutoTokenizer.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, TypeError, LookupError, ImportError) as error:
            raise ValueError(f"the tokenizer in {place} cannot be read ({str(error).splitlines()[0]}).") from None
        self.words.padding_side = "right"

    def tokenize_with_weights(
        self, text: str, return_word_ids: bool = False, sana_instruction: str = "", **_: Any
    ) -> dict[str, Any]:
        """{"gemma": one list of (token, weight)}, padded; weights in a prompt are plain text."""
        length = self.max_length
        if sana_instruction:
            length += len(self.words.encode(sana_instruction)) - 2
        # As SanaPipeline prepares a caption: in lower case, without blanks around it.
        given = sana_instruction + text.lower().strip()
        ids = self.words(given, padding="max_length", max_length=length, truncation=True).input_ids
        return {"gemma": [[(i, 1.0) for i in ids]]}

    def clone(self) -> Tokens:
        """Itself: nothing in it changes."""
        return self

    def untokenize(self, tokens: Sequence[Any]) -> list[tuple[Any, str]]:
        """Each token with its text."""
        return [(token, str(self.words.decode([token[0]]))) for token in tokens]

    def state_dict(self) -> dict[str, Any]:
        """Nothing of it is saved into checkpoints."""
        return {}


class Gemma(nn.Module):
    """Gemma-2's decoder, in the form that ComfyUI's CLIP asks for."""

    def __init__(self, folder: Path, dtype: torch.dtype, max_length: int) -> None:
        super().__init__()
        from hasten.hosts.comfy_sana_gemma import load_gemma

        model = load_gemma(folder, dtype)
        self.gemma, self.max_length = model, max_length
        self.pad = model.config.pad_token_id or 0
        self.dtypes = {dtype}

    def set_clip_options(self, options: Mapping[str, Any]) -> None:
        """ComfyUI's CLIP skip: Sana reads the last layer alone."""

    def reset_clip_options(self) -> None:
        """See set_clip_options."""

    @torch.no_grad()
    def encode_token_weights(self, tokens: Mapping[str, Any]) -> tuple[Tensor, None, dict[str, Tensor]]:
        """States (1, L, C) of the first token and the last L - 1, none pooled, and their mask (1, L)."""
        device = next(self.gemma.parameters()).device
        ids = torch.tensor([[pair[0] for pair in row] for row in tokens["gemma"]], device=device)
        mask = (ids != self.pad).long()
        states = self.gemma(ids, attention_mask=mask).last_hidden_state
        chosen = [0, *range(ids.shape[1] - self.max_length + 1, ids.shape[1])]
        return states[:, chosen].float().cpu(), None, {"attention_mask": mask[:, chosen].cpu()}

    def load_sd(self, state: Mapping[str, Tensor]) -> Any:
        """Loads weights by their names here."""
        return self.load_state_dict(dict(state), strict=False)
