"""The precision that a model runs in: what it must reach, who decides, and that the decision is kept."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.photos import Variation
from tests.support.servers import PhotoServer
from utils.embedding import encoder
from utils.errors import UserError
from utils.files import write_json
from utils.images.decode import decode
from utils.images.preprocess import to_pixels
from utils.store.vectors import Journal

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def pixels(photos: list[Variation], offline_model_name: str) -> np.ndarray:
    """(4, 224, 224, 3) uint8 of real photos; torch takes long for bf16 where the CPU has none."""
    preprocess = encoder.load(offline_model_name, "", "cpu", "fp32").preprocess
    return np.stack([to_pixels(decode(io.BytesIO(photo.data), 10**8), preprocess) for photo in photos[::16]])


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, "retrieval_ann"):
        yield caplog


def test_a_model_that_bf16_distorts_falls_back_to_fp32_and_says_so(offline_model_name, pixels, log):
    model = encoder.load(offline_model_name, "", "cpu", "bf16")
    exact = encoder.load(offline_model_name, "", "cpu", "fp32").encode(pixels)
    model.settle_precision(pixels, may_fall_back=True)
    assert model.precision == "fp32"
    assert "cosine" in log.text
    assert "fp32 is used" in log.text
    np.testing.assert_allclose(model.encode(pixels), exact, atol=1e-6)


def test_a_precision_that_was_asked_for_and_distorts_is_an_error(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "bf16")
    with pytest.raises(UserError, match=r"cosine 0\.99\d+ of fp32's, below 0\.999; use --precision fp32 or auto"):
        model.settle_precision(pixels, may_fall_back=False)


def test_bf16_is_kept_for_a_model_that_bears_it(seeded_vit, pixels):
    model = encoder.load("ViT-B-32", str(seeded_vit), "cpu", "bf16")
    model.settle_precision(pixels, may_fall_back=False)
    vectors = model.encode(pixels)
    assert model.precision == "bf16"
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_no_numbers_at_all_are_not_true_to_fp32(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "bf16")
    model._model.visual.trunk.conv_stem.weight.fill_(float("nan"))
    model.settle_precision(pixels, may_fall_back=True)
    assert model.precision == "fp32"
    assert np.isfinite(model.encode(pixels)).all()


def test_a_settled_precision_is_not_tried_again(offline_model_name, pixels, monkeypatch):
    monkeypatch.setattr(encoder, "fastest_precision", lambda device: "bf16")
    assert encoder.load(offline_model_name, "", "cpu", "auto").precision == "bf16"
    assert encoder.load(offline_model_name, "", "cpu", "auto", settled="fp32").precision == "fp32"
    settled = encoder.load(offline_model_name, "", "cpu", "auto", settled="bf16")
    settled.settle_precision(pixels, may_fall_back=False)  # would raise if it were compared
    assert settled.precision == "bf16"


def test_convolutional_models_run_channels_last_and_give_the_same(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    assert model._prepare(pixels).is_contiguous(memory_format=torch.channels_last)
    assert model._model.visual.trunk.conv_head.weight.is_contiguous(memory_format=torch.channels_last)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        plain = model._model.to(memory_format=torch.contiguous_format).encode_image(images)
    plain = torch.nn.functional.normalize(plain, dim=-1).numpy()
    np.testing.assert_allclose(model.encode(pixels), plain, atol=1e-5)


def test_out_of_memory_halves_the_batch_and_says_so(offline_model_name, pixels, log, monkeypatch):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    whole, sizes = model.encode(pixels), []

    def encode_image(images, normalize=False):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(images)

    real = model._model.encode_image
    monkeypatch.setattr(model._model, "encode_image", encode_image)
    np.testing.assert_allclose(model.encode(pixels), whole, atol=1e-5)
    assert sizes == [4, 2, 2]
    assert "out of GPU memory with 4 images at once; lower BATCH_SIZE" in log.text


def test_out_of_memory_with_one_image_is_an_error(offline_model_name, pixels, monkeypatch):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")

    def encode_image(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model._model, "encode_image", encode_image)
    with pytest.raises(torch.OutOfMemoryError):
        model.encode(pixels[:3])


def test_an_image_that_the_model_fails_on_first_costs_itself_only(offline_model_name, pixels, monkeypatch):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")

    def encode_image(images):
        if (images == first).all(dim=(1, 2, 3)).any():
            raise RuntimeError("planted")
        return real(images)

    first, real = model._prepare(pixels[:1]), model._model.encode_image
    monkeypatch.setattr(model._model, "encode_image", encode_image)
    vectors = model.encode_each(pixels)
    assert vectors.shape == (4, 1280)
    assert np.isnan(vectors[0]).all() and np.isfinite(vectors[1:]).all()


# --- through embed.py -------------------------------------------------------------------------------------------------
def embed(run_here, folder: Path, urls: list[str], model: str, *more: str):
    write_json(folder / "data/formatted.json", [{"url": url} for url in urls])
    return run_here("embed.py", "--clip-model-name", model, "--download-allow-local", *more)


def test_bf16_asked_for_in_vain_is_one_line_and_stores_nothing(
    run_here, tmp_path, photos, photo_server: PhotoServer, offline_model_name
):
    urls = [f"{photo_server.url}/{photo.name}" for photo in photos[::16]]
    done = embed(run_here, tmp_path, urls, offline_model_name, "--precision", "bf16")
    assert done.returncode == 2
    assert "below 0.999; use --precision fp32 or auto" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(Journal(tmp_path / "data/chroma/journal/images").ids) == 0


def test_the_verdict_is_stored_and_holds_for_the_next_run(
    run_here, tmp_path, photos, photo_server: PhotoServer, offline_model_name
):
    urls = [f"{photo_server.url}/{photo.name}" for photo in photos[::16]]
    assert embed(run_here, tmp_path, urls[:2], offline_model_name).returncode == 0
    remembered = Journal(tmp_path / "data/chroma/journal/images").model
    assert remembered["dimension"] == 1280
    verdict = remembered["precision"]
    assert verdict in encoder.PRECISIONS[1:]
    asked = embed(run_here, tmp_path, urls[:3], offline_model_name, "--precision", "bf16")
    assert asked.returncode == 2 and "below 0.999; use --precision fp32 or auto" in asked.stderr
    assert len(Journal(tmp_path / "data/chroma/journal/images").ids) == 2
    assert embed(run_here, tmp_path, urls, offline_model_name).returncode == 0
    assert Journal(tmp_path / "data/chroma/journal/images").model["precision"] == verdict
