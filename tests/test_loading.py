"""Folders and single files load to the same picture, and what is wrong with them is said before the long part."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_files, make_tiny_flux, tiny_pipeline

from hasten.loading import Habits, Model, check_model, habits, is_on_hub, load_painter, model_label
from hasten.machine import dtype_works, pick_device, pick_dtype
from hasten.painter import FluxPainter, Request
from hasten.recipe import Recipe
from hasten.weights import read_header, read_weights

CPU = torch.device("cpu")
NONE = Recipe.load("none")
SMALL = Request("a red apple", steps=2, width=32, height=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_flux(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """A folder and the same weights as single files; heads of 128 channels, as FLUX.1's."""
    home = tmp_path_factory.mktemp("single")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = tiny_pipeline(head_dim=128, double=1, single=2)
    pipe.save_pretrained(home / "folder")
    return home / "folder", make_tiny_files(home, pipe)


def from_files(folder: Path, files: dict[str, Path], **changes: Any) -> Model:
    given = {"tokenizers": str(folder), **files, **changes}
    return Model(**{key: value for key, value in given.items() if value is not None})


def painted(model: Model, dtype: torch.dtype = torch.float32) -> np.ndarray:
    return np.asarray(load_painter(model, device=CPU, dtype=dtype).paint(SMALL, NONE).images[0])


def test_a_folder_draws(folder: Path) -> None:
    painter = load_painter(Model(str(folder)), device=CPU, dtype=torch.float32)
    assert (painter.model, painter.device, painter.dtype) == ("tiny", "cpu", "float32")
    assert habits(painter) == Habits(256, 64, steps=28, guidance=3.5) and painter.text_tokens == 64
    assert painter.paint(SMALL, NONE).images[0].size == (32, 32)


def test_single_files_draw_what_their_folder_draws(single: tuple[Path, dict[str, Path]]) -> None:
    folder, files = single
    assert (painted(from_files(folder, files)) == painted(Model(str(folder)))).all()


def test_an_all_in_one_checkpoint_draws_the_same(single: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, files = single
    prefixes = {
        "transformer": "model.diffusion_model.",
        "vae": "vae.",
        "clip_l": "text_encoders.clip_l.transformer.",
        "t5xxl": "text_encoders.t5xxl.transformer.",
    }
    joined = {prefixes[kind] + k: v for kind, path in files.items() for k, v in load_file(path).items()}
    save_file(joined, tmp_path / "all.safetensors")
    model = Model(str(tmp_path / "all.safetensors"), tokenizers=str(folder))
    assert (painted(model) == painted(Model(str(folder)))).all()
    assert model_label(model) == "all.safetensors"


def test_fp8_files_are_brought_to_the_dtype_and_scales_multiplied_out(tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    path = tmp_path / "w.safetensors"
    scaled = {
        "model.diffusion_model.a.weight": (weight / 2).to(torch.float8_e4m3fn),
        "model.diffusion_model.a.scale_weight": torch.tensor(2.0),
        "model.diffusion_model.b.weight": weight.to(torch.float8_e4m3fn),
        "model.diffusion_model.scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        "vae.c.weight": weight,
    }
    save_file(scaled, path)
    state = read_weights(path, "transformer", torch.bfloat16)
    assert sorted(state) == ["a.weight", "b.weight"]
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())
    # Three mantissa bits: half a step is a sixteenth.
    torch.testing.assert_close(state["a.weight"].float(), weight, rtol=1 / 16, atol=2**-8)


def test_weights_packed_into_integers_are_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4, dtype=torch.uint8)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="uint8: this packing is not read"):
        read_weights(tmp_path / "w.safetensors", "transformer", torch.float32)


def test_a_truncated_file_is_found_by_its_header(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated: 100 of its"):
        check_model(Model(str(broken)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a safetensors file"),
        (b"hello, this is no model at all", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git-lfs pointer"),
        ((500).to_bytes(8, "little") + b'{"a": {"dtype"', "truncated"),
        ((10).to_bytes(8, "little") + b'{"a": 1}  ', "not a safetensors file"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_header(path)


def test_a_file_in_the_wrong_place_is_told_what_it_is(single: tuple[Path, dict[str, Path]]) -> None:
    folder, files = single
    swapped = from_files(folder, files, vae=files["clip_l"])
    with pytest.raises(ValueError, match=r"is not a FLUX autoencoder: it looks like a CLIP-L .* --clip-l"):
        check_model(swapped)


@pytest.mark.parametrize(("kind", "option"), [("vae", "--vae"), ("clip_l", "--clip-l"), ("t5xxl", "--t5xxl")])
def test_a_missing_part_is_named(single: tuple[Path, dict[str, Path]], kind: str, option: str) -> None:
    folder, files = single
    with pytest.raises(ValueError, match=f"alone cannot draw: give {option}"):
        check_model(from_files(folder, files, **{kind: None}))


def test_a_missing_transformer_and_a_missing_file_are_named(single: tuple[Path, dict[str, Path]]) -> None:
    folder, files = single
    with pytest.raises(ValueError, match="transformer is missing"):
        check_model(from_files(folder, files, transformer=None))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        check_model(from_files(folder, files, vae=folder / "none.safetensors"))


def test_missing_tokenizers_are_said_in_one_sentence(single: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, files = single
    with pytest.raises(ValueError, match=r"no tokenizers in .*--tokenizers"):
        load_painter(from_files(folder, files, tokenizers=str(tmp_path)), device=CPU, dtype=torch.float32)


def test_a_file_with_a_weight_missing_is_refused(single: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    folder, files = single
    state = load_file(files["transformer"])
    del state["single_blocks.0.linear2.bias"]
    save_file(state, tmp_path / "lacking.safetensors")
    model = from_files(folder, files, transformer=tmp_path / "lacking.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 weights, single_transformer_blocks\.0\.proj_out\.bias"):
        load_painter(model, device=CPU, dtype=torch.float32)


def test_single_files_of_another_head_size_are_refused(folder: Path, tmp_path: Path) -> None:
    files = make_tiny_files(tmp_path, load_painter(Model(str(folder)), device=CPU, dtype=torch.float32).pipe)
    with pytest.raises(ValueError, match="heads of 16 channels"):
        load_painter(from_files(folder, files), device=CPU, dtype=torch.float32)


def test_a_folder_that_is_no_flux_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        check_model(Model(str(tmp_path)))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match="StableDiffusionPipeline, no FLUX"):
        check_model(Model(str(tmp_path)))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        check_model(Model(str(tmp_path)))


@pytest.mark.parametrize("component", ["text_encoder_2", "tokenizer", "vae"])
def test_a_folder_without_a_component_is_refused(folder: Path, tmp_path: Path, component: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / component)
    with pytest.raises(ValueError, match=f"has no {component}"):
        check_model(Model(str(broken)))


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="text_encoder has no weights"):
        check_model(Model(str(broken)))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\xff"])
def test_a_broken_index_of_weights_is_one_sentence(folder: Path, tmp_path: Path, content: str) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    index = broken / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="is no index of weights: download the model again") as refusal:
        check_model(Model(str(broken)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("entry", [{}, 3, "vae", ["diffusers"], [None, None]])
def test_a_component_that_is_listed_oddly_is_missing(folder: Path, tmp_path: Path, entry: object) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "vae": entry}))
    with pytest.raises(ValueError, match="has no vae"):
        check_model(Model(str(broken)))


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut"])
def test_a_broken_bin_is_one_sentence(folder: Path, tmp_path: Path, component: str, content: bytes) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    for path in (broken / component).glob("*.safetensors"):
        path.unlink()
    name = "diffusion_pytorch_model.bin" if component == "transformer" else "pytorch_model.bin"
    (broken / component / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be loaded as a FLUX model") as refusal:
        load_painter(Model(str(broken)), device=CPU, dtype=torch.float32)
    assert "\n" not in str(refusal.value)


def test_a_folder_of_bin_files_draws(folder: Path, tmp_path: Path) -> None:
    old = shutil.copytree(folder, tmp_path / "tiny")
    (path,) = (old / "transformer").glob("*.safetensors")
    torch.save(load_file(path), old / "transformer" / "diffusion_pytorch_model.bin")
    path.unlink()
    assert (painted(Model(str(old))) == painted(Model(str(folder)))).all()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ImportError("No module named 'sentencepiece'"), "a package is missing or does not fit"),
        (KeyError("norm1"), "it lacks 'norm1'"),
        (AttributeError("module has no attribute 'X'"), "no attribute 'X'"),
    ],
)
def test_what_loading_stumbles_over_is_one_sentence(
    folder: Path, single: tuple[Path, dict[str, Path]], monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def stumble(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("diffusers.FluxPipeline.from_pretrained", stumble)
    monkeypatch.setattr("hasten.checkpoints.load_vae", stumble)
    for model in (Model(str(folder)), from_files(*single)):
        with pytest.raises(ValueError, match=words) as refusal:
            load_painter(model, device=CPU, dtype=torch.float32)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("transformer", "double_blocks.0.img_attn.norm.query_norm.scale"),
        ("transformer", "txt_in.weight"),
        ("vae", "encoder.down.1.block.0.conv1.weight"),
        ("clip_l", "text_model.embeddings.token_embedding.weight"),
        ("t5xxl", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ],
)
def test_a_file_that_lacks_what_tells_its_shape_is_one_sentence(
    single: tuple[Path, dict[str, Path]], tmp_path: Path, kind: str, name: str
) -> None:
    folder, files = single
    state = load_file(files[kind])
    del state[name]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"cut\.safetensors lacks the weight .*: it is not a whole FLUX\.1 file"):
        load_painter(from_files(folder, {**files, kind: tmp_path / "cut.safetensors"}), device=CPU, dtype=torch.float32)


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no model 'nonsense'"):
        check_model(Model("nonsense"))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        check_model(Model(str(tmp_path / "none.safetensors")))
    check_model(Model("someone/some-flux"))  # may be a hub name: nothing is asked of the network here


def test_no_network_and_no_such_model_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def raising(error: Exception) -> Callable[..., None]:
        def model_info(*args: object, **kwargs: object) -> None:
            raise error

        return model_info

    model = Model("nosuch/repo")
    assert is_on_hub(model) and not is_on_hub(Model())
    monkeypatch.setattr(huggingface_hub, "model_info", raising(ConnectionError("no route to host")))
    with pytest.raises(OSError, match=r"the hub cannot be reached \(no route to host\), and nosuch/repo was not"):
        load_painter(model, device=CPU, dtype=torch.float32)
    missing = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    monkeypatch.setattr(huggingface_hub, "model_info", raising(missing))
    with pytest.raises(OSError, match="the hub has no model nosuch/repo"):
        load_painter(model, device=CPU, dtype=torch.float32)


def test_devices_and_dtypes_are_tried() -> None:
    assert pick_device("cpu") == CPU
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("bf16", CPU) == torch.bfloat16
    assert dtype_works(torch.float32, CPU) is None
    with pytest.raises(ValueError, match="no device 'cuda:99' here: choose auto or"):
        pick_device("cuda:99")
    with pytest.raises(ValueError, match="no dtype 'int4': choose auto, float32"):
        pick_dtype("int4", CPU)


def test_a_prompt_that_is_too_long_is_said_to_be_cut(folder: Path) -> None:
    painter = load_painter(Model(str(folder)), device=CPU, dtype=torch.float32)
    notes = painter.paint(Request("red apple " * 40, steps=1, width=32, height=32), NONE).notes
    assert len(notes) == 2 and all("was cut" in note for note in notes)
    assert painter.paint(SMALL, NONE).notes == []


def test_each_picture_of_a_batch_can_be_drawn_again_alone(folder: Path) -> None:
    painter = load_painter(Model(str(folder)), device=CPU, dtype=torch.float32)
    batch = painter.paint(Request("a red apple", steps=2, width=32, height=32, seed=5, batch=2), NONE).images
    alone = painter.paint(Request("a red apple", steps=2, width=32, height=32, seed=6), NONE).images[0]
    # Across batch sizes kernels may round differently: one step of 8 bits.
    assert np.abs(np.asarray(batch[1], int) - np.asarray(alone, int)).max() <= 1


def test_a_painter_leaves_the_model_as_it_was(folder: Path) -> None:
    painter = load_painter(Model(str(folder)), device=CPU, dtype=torch.float32)

    def state() -> tuple[list[str], list[str]]:
        modules = painter.pipe.transformer.named_modules()
        return (
            sorted(painter.pipe.scheduler.__dict__),
            [name for name, m in modules if m.__dict__.get("_compiled_call_impl") or m._forward_hooks],
        )

    painter.paint(SMALL, NONE)  # what the pipeline itself leaves on its scheduler is there from now on
    before = state()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        painter.paint(SMALL, Recipe.load({"schema": 1, "cache": {"method": "fbcache"}}), on_step=stop)
    assert state() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 250}, "the width is 250: it must be divisible by 16; try 256"),
        ({"height": 0}, "the height is 0"),
        ({"steps": 0}, "steps is 0: at least 1"),
        ({"batch": 0}, "batch is 0"),
        ({"seed": -1}, "the seed is -1"),
        ({"guidance": -1.0}, "guidance is -1.0"),
        ({"prompt": "  "}, "the prompt is empty"),
    ],
)
def test_requests_are_judged(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Request(**{"prompt": "a red apple", **change})


def test_the_painter_is_one(folder: Path) -> None:
    from hasten.painter import Painter

    painter: Painter = load_painter(Model(str(folder)), device=CPU, dtype=torch.float32)
    assert isinstance(painter, FluxPainter)
