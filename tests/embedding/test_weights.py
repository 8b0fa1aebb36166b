"""utils/embedding/weights.py: the identity of a model, the place of its weights, and one line if there are none."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from tests.support import offline_model
from utils.embedding import encoder, networks, weights
from utils.errors import UserError
from utils.store.model import same_model


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """The files of a local-dir, without real weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text('{"model_cfg": {}}')
    (folder / "open_clip_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return offline_model.build_small_vit(tmp_path_factory.mktemp("small"))


def identify(folder: Path) -> dict[str, str]:
    return weights.find(f"local-dir:{folder}", "ignored").identity


def load(model_name: str, pretrained: str) -> networks.Network:
    return networks.load(weights.find(model_name, pretrained))


def test_a_local_model_is_its_files_wherever_they_are(local, tmp_path):
    before = identify(local)
    moved = shutil.move(local, tmp_path / "moved")
    assert same_model(before, identify(moved))
    (moved / "open_clip_model.safetensors").write_bytes(b"others")
    assert not same_model(before, identify(moved))


@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors"])
def test_a_local_model_that_lacks_a_file_is_one_line(local, name):
    (local / name).unlink()
    with pytest.raises(UserError, match=r"has no (weights|open_clip_config.json).*; use weights on this machine"):
        identify(local)
    with pytest.raises(UserError, match="has no"):
        load(f"local-dir:{local}", "")


def test_a_folder_in_the_home_directory_is_found(local, monkeypatch):
    monkeypatch.setenv("HOME", str(local.parent))
    assert weights.find("local-dir:~/model", "") == weights.find(f"local-dir:{local}", "")


class Pickled:
    """Not a tensor."""


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("open_clip_model.safetensors", lambda state: save(state)[:50_000], "incomplete metadata"),
        ("open_clip_model.safetensors", lambda state: b"version https://git-lfs.github.com/spec/v1", "header"),
        ("a.safetensors", lambda state: save({"adapter.lora_A": torch.ones(1)}), 'Missing key.* "positional_embedding'),
        ("a.safetensors", lambda state: save({"positional_embedding": torch.ones(9, 9)}), "width changed"),
        ("model.pth", lambda state: pickled({"state_dict": state, "args": Pickled()}), "not tensors alone"),
        ("model.pth", lambda state: scripted(), "not tensors alone"),
    ],
    ids=["truncated", "a pointer of git-lfs", "an adapter", "of another size", "with other objects", "TorchScript"],
)
def test_weights_that_cannot_be_used_are_one_line_that_names_the_fault(name, content, words, small_vit, tmp_path):
    shutil.copy(small_vit / "open_clip_config.json", tmp_path)
    (tmp_path / name).write_bytes(content(load_file(small_vit / "open_clip_model.safetensors")))
    with pytest.raises(UserError, match=f"local-dir:.* cannot be loaded: .*{words}.*; repair or download") as raised:
        load(f"local-dir:{tmp_path}", "")
    assert "\n" not in str(raised.value)


def pickled(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def scripted() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.ones(1)), file)
    return file.getvalue()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_a_training_run_gives_the_same_vectors(prefix, small_vit, tmp_path):
    state = load_file(small_vit / "open_clip_model.safetensors")
    shutil.copy(small_vit / "open_clip_config.json", tmp_path)
    named = {prefix + key: value.half() for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": named}, tmp_path / "epoch_3.pth")
    found = load(f"local-dir:{tmp_path}", "").module.state_dict()
    assert all(torch.equal(found[key], value.half().float()) for key, value in state.items())


def test_of_several_checkpoints_the_one_that_open_clip_takes_counts(local):
    before = identify(local)
    (local / "pytorch_model.bin").write_bytes(b"others")
    assert same_model(before, identify(local))


def test_a_checkpoint_is_a_model_together_with_its_architecture(tmp_path):
    path = tmp_path / "vit.pt"
    path.write_bytes(b"weights")
    small, again = weights.find("ViT-B-32", str(path)).identity, weights.find("ViT-B/32", str(path)).identity
    assert same_model(small, again)
    assert not same_model(small, weights.find("ViT-B-16", str(path)).identity)
    assert not same_model(small, weights.find("ViT-B-32", "openai").identity)


def test_tags_are_read_as_open_clip_reads_them():
    one, other = (
        weights.find("ViT-B-32", "laion2b_s34b_b79k").identity,
        weights.find("ViT-B/32", "LAION2B-s34b-b79k").identity,
    )
    assert same_model(one, other)
    assert not same_model(one, weights.find("ViT-B-32", "openai").identity)


@pytest.mark.parametrize(
    ("name", "tag", "words"),
    [
        ("ViT-B-32", "", "CLIP_PRETRAINED is empty, which would mean random weights"),
        ("local-dir:", "", "names no model"),
    ],
)
def test_what_would_mean_random_weights_is_one_line(name, tag, words):
    with pytest.raises(UserError, match=words):
        weights.find(name, tag)


@pytest.mark.parametrize(
    ("name", "tag", "words"),
    [
        ("ViT-B-33", "openai", "is unknown to open_clip"),
        ("ViT-B-32", "no_such_tag", r"is not a tag of ViT-B-32 \(known: .*laion2b_s34b_b79k.*\) or a file"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", r"trained without QuickGELU|cannot be fetched|is not a tag"),
    ],
)
def test_unknown_names_and_tags_list_what_is_known(name, tag, words):
    with pytest.raises(UserError, match=words) as raised:
        load(name, tag)
    assert "\n" not in str(raised.value)


def test_a_model_says_itself_that_its_text_tower_means_nothing(local):
    assert not weights.find(f"local-dir:{local}", "").is_image_only
    (local / "open_clip_config.json").write_text(json.dumps({"image_only": True}))
    assert weights.find(f"local-dir:{local}", "").is_image_only
    assert weights.find("timm:vit_small_patch14_dinov2", "").is_image_only
    assert not weights.find("ViT-B-32", "openai").is_image_only


def test_a_prompt_whose_tokenizer_cannot_be_loaded_is_one_line(small_vit, tmp_path, monkeypatch):
    """SigLIP's tokenizer needs a package that open_clip does not install."""
    shutil.copytree(small_vit, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP"
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = encoder.load(f"local-dir:{tmp_path}", "", "cpu", "fp32")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"the tokenizer of local-dir:.* cannot be loaded: .*transformers.*; try pip"):
        model.encode_text("a cat")
