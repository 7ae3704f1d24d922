"""Sana checkpoints of every layout become diffusers' names and arguments; what is no Sana is one sentence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_tiny_files, tiny_pipeline
from tiny_sana import authors_layout, tiny_sana_transformer

from hasten.sana_autoencoder import read_autoencoder
from hasten.sana_weights import model_words, read_sana

KINDS: dict[str, dict[str, Any]] = {
    "sana": {},
    "1.5": {"qk_norm": True},
    "sprint": {"sprint": True},
    "2K": {"scale": 1.0, "side": 64},
    "4K": {"scale": 2.0, "side": 128},
    "512": {"side": 16},
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_authors_layout_is_read_from_its_tensors(tmp_path: Path, kind: str, suffix: str) -> None:
    from diffusers import SanaTransformer2DModel
    from safetensors.torch import save_file

    model, path = tiny_sana_transformer(**KINDS[kind]), tmp_path / f"sana{suffix}"
    state = authors_layout(model)
    if suffix == ".pth":
        torch.save({"state_dict": state, "epoch": 3, "state_dict_ema": {}}, path)
    else:
        save_file(state, path)
    found, config = read_sana(path)
    rebuilt = SanaTransformer2DModel(**config)
    rebuilt.load_state_dict(found, strict=True)
    for name in ("sample_size", "interpolation_scale", "guidance_embeds", "qk_norm", "num_layers", "mlp_ratio"):
        assert rebuilt.config[name] == model.config[name], name
    assert all(torch.equal(rebuilt.state_dict()[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("inner", ["transformer", "."])
def test_a_diffusers_folder_is_read(tmp_path: Path, inner: str) -> None:
    model = tiny_sana_transformer()
    model.save_pretrained(tmp_path / inner)
    found, config = read_sana(tmp_path)
    assert found.keys() == model.state_dict().keys()
    assert config["num_layers"] == 4


@pytest.mark.parametrize(
    ("blocks", "heads", "kind", "words"),
    [(28, 36, {}, "Sana 600M"), (20, 70, {}, "Sana 1600M"), (20, 70, {"qk_norm": "x"}, "Sana 1.5 1600M"),
     (60, 70, {"qk_norm": "x"}, "Sana 1.5 4800M"), (28, 36, {"guidance_embeds": True}, "Sana Sprint 600M")],
)  # fmt: skip
def test_models_have_their_usual_names(blocks: int, heads: int, kind: dict[str, Any], words: str) -> None:
    config = {"num_layers": blocks, "num_attention_heads": heads, "attention_head_dim": 32}
    assert model_words({**config, "guidance_embeds": False, "qk_norm": None, **kind}) == words


class Runs:
    """What a .pth must not be: reading it would run a command."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_a_pth_with_code_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "other": Runs()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth would run code when it is read \((posix|nt)\.system\)"):
        read_sana(tmp_path / "bad.pth")


def test_a_flux_file_is_refused(tmp_path: Path) -> None:
    path = make_tiny_files(tmp_path, tiny_pipeline())["transformer"]
    with pytest.raises(ValueError, match="is a FLUX transformer: a Sana transformer is expected here"):
        read_sana(path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [("a.safetensors", b"nonsense", "cannot be read as safetensors"), ("a.pth", b"nonsense", "download it again"),
     ("a.pth", b"", "download it again"), ("missing.pth", None, "there is no file")],
)  # fmt: skip
def test_broken_files_are_one_sentence(tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=sentence) as found:
        read_sana(tmp_path / name)
    assert "\n" not in str(found.value)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(ValueError, match="holds a FluxTransformer2DModel"):
        read_sana(tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("blocks.0.cross_attn.q_linear.weight", "lacks patch_embed.proj.weight"),
        ("transformer_blocks.0.attn2.to_q.weight", "lacks patch_embed.proj.weight"),
        ("decoder.up_blocks.0.1.conv_depth.weight", "no whole DC-AE"),
    ],
)
def test_files_that_lack_most_of_a_model_are_one_sentence(tmp_path: Path, name: str, sentence: str) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "part.safetensors"
    save_file({name: torch.zeros(4, 4)}, file)
    with pytest.raises(ValueError, match=sentence):
        read_autoencoder(file) if "decoder" in name else read_sana(file)


def test_a_folder_whose_configuration_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json is no configuration"):
        read_sana(tmp_path)
