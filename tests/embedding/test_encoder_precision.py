"""The precision that a model runs in: what it must reach, who decides, and that the decision is kept."""

from __future__ import annotations

import io
import json
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
    model.check_precision(pixels, may_fall_back=True)
    assert model.precision == "fp32"
    assert "using fp32: bf16 is not accurate enough for this model (cosine 0.99" in log.text
    np.testing.assert_allclose(model.encode(pixels), exact, atol=1e-6)


def test_a_precision_that_was_asked_for_and_distorts_is_an_error(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "bf16")
    with pytest.raises(
        UserError, match=r"\(cosine 0\.99\d+ to fp32, 0\.999 is required\); use --precision fp32 or auto"
    ):
        model.check_precision(pixels, may_fall_back=False)


def test_bf16_is_kept_for_a_model_that_it_is_accurate_for(seeded_vit, pixels):
    model = encoder.load("ViT-B-32", str(seeded_vit), "cpu", "bf16")
    model.check_precision(pixels, may_fall_back=False)
    vectors = model.encode(pixels)
    assert model.precision == "bf16"
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_no_numbers_at_all_are_not_accurate(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "bf16")
    model._model.visual.trunk.conv_stem.weight.fill_(float("nan"))
    model.check_precision(pixels, may_fall_back=True)
    assert model.precision == "fp32"
    assert np.isfinite(model.encode(pixels)).all()


def test_a_checked_precision_is_not_checked_again(offline_model_name, pixels, monkeypatch):
    monkeypatch.setattr(encoder, "fastest_precision", lambda device: "bf16")
    assert encoder.load(offline_model_name, "", "cpu", "auto").precision == "bf16"
    assert encoder.load(offline_model_name, "", "cpu", "auto", checked="fp32").precision == "fp32"
    checked = encoder.load(offline_model_name, "", "cpu", "auto", checked="bf16")
    checked.check_precision(pixels, may_fall_back=False)  # would raise if it were compared
    assert checked.precision == "bf16"


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


class Planted:
    """Stands between an encoder and its model: raises where `fails` says so of (B, 3, H, W) images."""

    def __init__(self, model, fails) -> None:
        self._model, self._fails = model, fails

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def encode_image(self, images):
        if self._fails(images):
            raise RuntimeError("CUDA error: planted\nwith more lines")
        return self._model.encode_image(images)


def test_an_image_that_the_model_fails_on_alone_costs_itself_only(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    first = model._prepare(pixels[:1])
    model._model = Planted(model._model, lambda images: (images == first).all(dim=(1, 2, 3)).any())
    vectors = model.encode_each(pixels)
    assert vectors.shape == (4, 1280)
    assert np.isnan(vectors[0]).all() and np.isfinite(vectors[1:]).all()
    assert np.isnan(model.encode_each(pixels[:1])).all()  # a last batch of one, on a device that works


def test_a_batch_that_fails_for_another_reason_than_its_images_loses_none(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    whole = model.encode(pixels)
    model._model = Planted(model._model, lambda images: len(images) > 1)
    np.testing.assert_allclose(model.encode_each(pixels), whole, atol=1e-5)


@pytest.mark.parametrize("n", [1, 4])
def test_a_device_that_fails_on_every_image_is_one_line_and_no_image_s_fault(offline_model_name, pixels, n):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    model._model = Planted(model._model, lambda images: True)
    with pytest.raises(UserError, match=r"no longer works on cpu: CUDA error: planted; check the device.* is safe$"):
        model.encode_each(pixels[:n])


def test_a_model_whose_vectors_hold_no_numbers_is_one_line(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    model._model.visual.trunk.conv_stem.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="its vectors hold no numbers"):
        model.encode_each(pixels)


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
    assert "0.999 is required); use --precision fp32 or auto" in done.stderr
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
    assert asked.returncode == 2 and "0.999 is required); use --precision fp32 or auto" in asked.stderr
    assert len(Journal(tmp_path / "data/chroma/journal/images").ids) == 2
    assert embed(run_here, tmp_path, urls, offline_model_name).returncode == 0
    assert Journal(tmp_path / "data/chroma/journal/images").model["precision"] == verdict


def test_a_device_lost_on_the_way_ends_the_run_and_keeps_what_is_stored(
    run_here, tmp_path, photos, photo_server: PhotoServer, offline_model_name, monkeypatch
):
    """The second batch meets a device that is gone: no failure is noted, and the next run embeds the rest."""
    urls = [f"{photo_server.url}/{photo.name}" for photo in photos[::6]]
    flags = ("--precision", "fp32", "--batch-size", "4")

    class Lost(encoder.Encoder):
        n_batches = 0

        def encode_each(self, pixels):
            Lost.n_batches += 1
            if Lost.n_batches == 2:
                self._model = Planted(self._model, lambda images: True)
            return super().encode_each(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "Encoder", Lost)
        lost = embed(run_here, tmp_path, urls, offline_model_name, *flags)
    assert lost.returncode == 2 and "no longer works on cpu" in lost.stderr and "Traceback" not in lost.stderr
    n_stored = len(Journal(tmp_path / "data/chroma/journal/images").ids)
    assert n_stored >= 4
    assert json.loads((tmp_path / "data/failed.json").read_text()) == []
    again = embed(run_here, tmp_path, urls, offline_model_name, *flags)
    assert f"{len(urls) - n_stored} stored + {n_stored} already there" in again.stdout
