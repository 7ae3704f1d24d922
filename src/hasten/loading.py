"""A model's name, folder or files -> a painter, with everything that can be wrong said before the long part.

It knows where models lie and what a FLUX or a Sana folder must hold; single files are put together in singlefiles.py.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.machine import first_line, reason_of
from hasten.painter import FluxPainter, quiet_logs
from hasten.painter_sana import GEMMA_WIDTH, MULTIPLE, SanaPainter
from hasten.singlefiles import check_files, load_files
from hasten.weights import read_header

if TYPE_CHECKING:
    from hasten.recipe import Recipe

SHIPPED = ("flux-nano", "sana-nano")
SHIPPED_MODEL = SHIPPED[0]
# Those that draw from words alone with the weights of a FluxPipeline.
TEXT_TO_IMAGE = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline")
SANA = ("SanaPipeline", "SanaSprintPipeline")
SANA_COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
# What diffusers, transformers and torch raise for files that are broken, foreign or half there, and for packages that
# are missing. (A broken .bin ends in the last two.)
UNLOADABLE = (
    *(OSError, ValueError, LookupError, RuntimeError, ImportError, AttributeError, TypeError),
    *(pickle.UnpicklingError, EOFError),
)
FLUX_TEXT_WIDTH = 4096  # of T5-xxl, which every FLUX.1 reads; a narrower one is a small FLUX such as flux-nano
SANA_TOKENS = 300  # of Gemma, behind the instruction


@dataclass(frozen=True)
class Model:
    """Where the weights come from: a folder or hub name, or ComfyUI-style single files."""

    name: str | None = None
    transformer: Path | None = None
    vae: Path | None = None
    clip_l: Path | None = None
    t5xxl: Path | None = None
    tokenizers: str | None = None

    @property
    def files(self) -> dict[str, Path]:
        """The single files by the part of FLUX that they hold; empty for a folder or a hub name."""
        given = {kind: getattr(self, kind) for kind in ("transformer", "vae", "clip_l", "t5xxl")}
        if self.name and Path(self.name).suffix.lower() == ".safetensors":
            given["transformer"] = given["transformer"] or Path(self.name)
        return {kind: path for kind, path in given.items() if path is not None}


@dataclass(frozen=True)
class Habits:
    """What is drawn when nothing else is asked for: pixels a side, text tokens, steps, guidance."""

    side: int
    text_tokens: int
    steps: int = 28
    guidance: float = 3.5


SMALL, LARGE = Habits(256, 64), Habits(1024, 512)


def check_model(model: Model) -> None:
    """Returns when the weights are there and look whole; only headers and small JSON files are read.

    Raises ValueError or FileNotFoundError with one sentence. A hub name is not asked for here.
    """
    files = model.files
    if files:
        check_files(files)
        return
    folder = _folder_of(model.name)
    if folder is not None:
        _check_folder(folder)


def load_painter(model: Model, *, device: Any, dtype: Any, recipe: Recipe | None = None) -> FluxPainter:
    """A painter with the model on the device, ready to draw. Raises ValueError or OSError with one sentence.

    recipe: what it asks to be done to the model itself is done for good, before the model moves: weights go to the
    device already in 8 bits, one layer after the other.
    """
    import torch

    check_model(model)
    folder = None if model.files else _local_folder(model.name)
    with quiet_logs():
        pipe = _from_files(model, dtype) if folder is None else _from_folder(folder, dtype)
    _check_text_to_image(pipe, model)
    if _is_sana(pipe) and dtype == torch.float16:
        # Gemma-2 and DC-AE overflow float16: pictures would be black. The transformer does not.
        pipe.text_encoder.to(torch.bfloat16)
        pipe.vae.to(torch.bfloat16)
    if recipe is not None and recipe.changes_model:
        import hasten

        hasten.prepare(pipe, replace(recipe, quantize=replace(recipe.quantize, keep=False)), device=device)
    _place(pipe, device)
    # Our own bars are drawn by the command line.
    pipe.set_progress_bar_config(disable=True)
    kind = SanaPainter if _is_sana(pipe) else FluxPainter
    return kind(pipe, model=model_label(model), text_tokens=_habits(pipe).text_tokens)


def habits(painter: FluxPainter) -> Habits:
    """The painter's model's: 256 pixels for a small FLUX, else 1024; Sana's own."""
    return _habits(painter.pipe)


def model_label(model: Model) -> str:
    """The model as reports name it: a shipped or hub name as it is, a folder or file by its last part."""
    files = model.files
    if files:
        return files["transformer"].name
    name = model.name or SHIPPED_MODEL
    return Path(name).resolve().name if Path(name).is_dir() else name


def _is_sana(pipe: Any) -> bool:
    return type(pipe).__name__ in SANA


def _habits(pipe: Any) -> Habits:
    config = pipe.transformer.config
    if not _is_sana(pipe):
        return SMALL if config.joint_attention_dim < FLUX_TEXT_WIDTH else LARGE
    tokens = SANA_TOKENS if config.caption_channels >= GEMMA_WIDTH else SMALL.text_tokens
    return Habits(config.sample_size * MULTIPLE, tokens, steps=2 if config.guidance_embeds else 20, guidance=4.5)


def _folder_of(name: str | None) -> Path | None:
    """The folder that `name` means, or None when it can only be a hub name."""
    from hasten.data import models_folder

    if name is None:
        return models_folder() / SHIPPED_MODEL
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"the model {name} is a file but no .safetensors file: give a folder or safetensors files.")
    shipped = sorted(child.name for child in models_folder().iterdir() if child.is_dir())
    if name in shipped:
        return models_folder() / name
    if name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not path.parent.exists():
        return None
    raise ValueError(
        f"there is no model {name!r}: give a diffusers folder, a hub name such as black-forest-labs/FLUX.1-dev, "
        f"safetensors files, or {' or '.join(shipped) or 'a shipped name'}."
    )


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} is no diffusers model: it has no model_index.json.")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))
        kind = listed.get("_class_name")
    except (ValueError, AttributeError):
        raise ValueError(f"{index} is not valid JSON: download the model again.") from None
    _check_class(kind, str(folder))
    components, family = (SANA_COMPONENTS, "Sana") if kind in SANA else (COMPONENTS, "FLUX")
    for name in components:
        entry = listed.get(name)
        if not isinstance(entry, list) or len(entry) < 2 or entry[1] is None or not (folder / name).is_dir():
            raise ValueError(f"{folder} has no {name}: a {family} model needs it; download the model again.")
    for component in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        if component not in components:
            continue
        _check_weights(folder / component)


def _check_weights(folder: Path) -> None:
    """Each shard that the component's index names, or the weights that lie there, whole by its header."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [folder / shard for shard in shards]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} is no index of weights: download the model again.") from None
        for path in paths:
            read_header(path)
        return
    found = sorted(folder.glob("*.safetensors"))
    if not found and not list(folder.glob("*.bin")):
        raise ValueError(f"{folder} has no weights: download the model again.")
    for path in found:
        read_header(path)


def _check_class(kind: object, where: str) -> None:
    if kind not in TEXT_TO_IMAGE + SANA:
        raise ValueError(
            f"{where} is a {kind or 'model of unknown class'}, no FLUX and no Sana that draws from text: give a "
            "FluxPipeline or a SanaPipeline."
        )


def _local_folder(name: str | None) -> Path:
    """The model's folder on this machine; a hub name is downloaded first, in sight."""
    folder = _folder_of(name)
    if folder is not None:
        return folder
    assert name is not None, "the shipped model is a folder"
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    away = _why_unreachable(name)
    if away is not None:
        try:
            return Path(DiffusionPipeline.download(name, local_files_only=True))
        except (OSError, HfHubHTTPError, ValueError):
            raise OSError(
                f"the hub cannot be reached ({away}), and {name} was not downloaded before: check the network, or give "
                "a folder."
            ) from None
    try:
        _check_class(DiffusionPipeline.load_config(name).get("_class_name"), name)
        return Path(DiffusionPipeline.download(name))
    except (OSError, HfHubHTTPError) as error:
        raise OSError(
            f"{name} cannot be had from the hub ({first_line(error)}): check the name, the network, and for a gated "
            "model `hf auth login`; or give a folder."
        ) from None


def _why_unreachable(name: str) -> str | None:
    """None when the hub answers and has the model, else why it does not answer; one request, without retries.

    Raises OSError when it answers that there is no such model.
    """
    from huggingface_hub import model_info
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        model_info(name, timeout=10.0)
    except RepositoryNotFoundError:
        raise OSError(
            f"the hub has no model {name}, or it is private: check the name, or log in with `hf auth login`."
        ) from None
    # The base is httpx's HTTPError, before hub 1.0 requests': that one's connection errors are OSErrors.
    except (HfHubHTTPError.__bases__[0], OSError) as error:
        return first_line(error)
    return None


def is_on_hub(model: Model) -> bool:
    """Whether the model has to be asked of the hub: its name is no folder and no file here."""
    return not model.files and _folder_of(model.name) is None


def _from_folder(folder: Path, dtype: Any) -> Any:
    import diffusers

    # Since 0.42 `dtype`, and a warning about `torch_dtype`; before, only the latter.
    word = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
    listed = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    sana = listed in SANA
    try:
        pipeline: Any = getattr(diffusers, listed) if sana else diffusers.FluxPipeline
        return pipeline.from_pretrained(folder, local_files_only=True, **{word: dtype})
    except UNLOADABLE as error:
        family = "Sana" if sana else "FLUX"
        raise ValueError(f"{folder} cannot be loaded as a {family} model: {reason_of(error)}.") from error


def _from_files(model: Model, dtype: Any) -> Any:
    import torch

    try:
        return load_files(model.files, model.tokenizers, dtype)
    except (ValueError, OSError, torch.OutOfMemoryError):
        raise  # sentences of our own
    except UNLOADABLE as error:
        raise ValueError(f"{model_label(model)} cannot be loaded as FLUX: {reason_of(error)}.") from error


def _check_text_to_image(pipe: Any, model: Model) -> None:
    if _is_sana(pipe):
        if pipe.vae.config.latent_channels != pipe.transformer.config.in_channels:
            raise ValueError(
                f"{model_label(model)}'s autoencoder has {pipe.vae.config.latent_channels} channels where its "
                f"transformer takes {pipe.transformer.config.in_channels}: they do not belong together."
            )
        return
    channels, latents = pipe.transformer.config.in_channels, pipe.vae.config.latent_channels
    if channels != 4 * latents:
        raise ValueError(
            f"{model_label(model)} takes {channels} channels where text-to-image has {4 * latents}: "
            "it is a fill or control model, which needs a picture; use it from Python."
        )


def _place(pipe: Any, device: Any) -> None:
    """Moves the model to the device; on a GPU that is too small, part after part as each is needed."""
    import torch

    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    needed = sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())
    # A fifth for activations and the cache.
    if device.type == "cuda" and needed > 0.8 * torch.cuda.mem_get_info(device)[0]:
        pipe.enable_model_cpu_offload(device=device)
        return
    try:
        pipe.to(device)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"the model takes {needed / 2**30:.1f} GiB, more than {device} has free: try --device cpu."
        ) from None
