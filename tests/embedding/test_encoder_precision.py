"""The precision of a model: the accuracy it must reach, how it is chosen, and that the choice is stored."""

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


class Planted:
    """A model whose forward pass does something with its (B, 3, H, W) images first: raises, or takes time."""

    def __init__(self, module, before) -> None:
        self._module, self._before = module, before

    def __getattr__(self, name: str):
        return getattr(self._module, name)

    def encode_image(self, images):
        self._before(images)
        return self._module.encode_image(images)


def plant(model: encoder.Encoder, before) -> None:
    model._modules = {name: Planted(module, before) for name, module in model._modules.items()}


def failing(condition):
    def before(images) -> None:
        if condition(images):
            raise RuntimeError("CUDA error: planted\nwith more lines")

    return before


class Clock:
    """A clock that only forward passes advance: `costs` seconds per image in each precision."""

    def __init__(self, **costs: float) -> None:
        self.now, self.costs, self.n_images = 0.0, costs, dict.fromkeys(costs, 0)

    def __call__(self) -> float:
        return self.now

    def pace(self, model: encoder.Encoder) -> encoder.Encoder:
        def before(name: str):
            def pass_time(images) -> None:
                self.now += self.costs[name] * len(images)
                self.n_images[name] += len(images)

            return pass_time

        model._modules = {name: Planted(module, before(name)) for name, module in model._modules.items()}
        return model


@pytest.fixture
def has_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "native_precisions", lambda device: ("bf16", "fp32"))


@pytest.fixture
def vit(small_vit_name: str, has_bf16: None):
    """vit(clock, precision, known): the small ViT with this clock."""

    def load(clock: Clock, precision: str = "auto", known: dict | None = None) -> encoder.Encoder:
        return clock.pace(encoder.load(small_vit_name, "", "cpu", precision, known, clock))

    return load


# --- what is accurate, and what is fast -------------------------------------------------------------------------------
def test_a_model_that_bf16_distorts_runs_in_fp32_and_says_so(offline_model_name, pixels, log, has_bf16):
    model = encoder.load(offline_model_name, "", "cpu", "auto")
    exact = encoder.load(offline_model_name, "", "cpu", "fp32").encode(pixels)
    assert model.has_choice and model.choose_precision(pixels, is_last=True)
    assert model.precision == "fp32" and not model.has_choice
    assert "using fp32: bf16 is not accurate enough for this model (cosine 0.99" in log.text
    np.testing.assert_allclose(model.encode(pixels), exact, atol=1e-6)


def test_a_precision_that_was_asked_for_and_distorts_is_an_error(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "bf16")
    with pytest.raises(
        UserError, match=r"\(cosine 0\.99\d+ to fp32, 0\.999 is required\); use --precision fp32 or auto"
    ):
        model.choose_precision(pixels, is_last=False)


def test_no_numbers_at_all_are_not_accurate(offline_model_name, pixels, has_bf16):
    model = encoder.load(offline_model_name, "", "cpu", "auto")
    model._modules["bf16"].visual.trunk.conv_stem.weight.fill_(float("nan"))
    assert model.choose_precision(pixels, is_last=True)
    assert model.precision == "fp32"
    assert np.isfinite(model.encode(pixels)).all()


@pytest.mark.parametrize(("costs", "fastest"), [((0.01, 0.02), "bf16"), ((0.02, 0.01), "fp32")])
def test_of_accurate_precisions_the_faster_one_is_used_and_the_reason_said(vit, pixels, log, costs, fastest):
    clock = Clock(bf16=costs[0], fp32=costs[1])
    model = vit(clock)
    assert model.choose_precision(pixels, is_last=True)
    assert model.precision == fastest and model.cosines["bf16"] > 0.9999
    assert f"using {fastest}: " in log.text and "takes 2.00 x as long on " in log.text
    vectors = model.encode(pixels)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("cost_s", [0.001, 0.1, 0.3, 5])
def test_timing_takes_two_seconds_at_most(vit, pixels, cost_s):
    clock = Clock(bf16=cost_s, fp32=cost_s)
    model = vit(clock)
    assert model.choose_precision(pixels, is_last=True)
    n_timed = sum(clock.n_images.values()) - 2 * len(pixels)
    assert n_timed * cost_s <= 2
    assert n_timed == min(16, 4 * int(2 / 2 / (2 * cost_s)))


def test_a_first_pass_that_is_clearly_faster_is_not_repeated(vit, pixels):
    clock = Clock(bf16=0.01, fp32=0.03)
    assert vit(clock).choose_precision(pixels, is_last=True)
    assert clock.n_images == {"bf16": len(pixels), "fp32": len(pixels)}


def test_images_whose_errors_vary_ask_for_more_of_them(vit, pixels, monkeypatch):
    """Of four errors, one is ten times the others: the interval reaches beyond what is allowed."""
    model = vit(Clock(bf16=0.01, fp32=0.02))
    exact = model.encode(pixels, "fp32")
    across = np.roll(exact, 1, axis=1) - exact * (np.roll(exact, 1, axis=1) * exact).sum(axis=1, keepdims=True)
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    cosines = 1 - np.array([[5e-5], [5e-5], [5e-5], [5e-4]], np.float32)
    planted = exact * cosines + across * np.sqrt(1 - cosines**2)
    real = model.encode

    def encode(some, name=""):
        vectors = real(some, name)  # takes its time
        return planted if name == "bf16" and len(some) == 4 else vectors

    monkeypatch.setattr(model, "encode", encode)
    assert not model.choose_precision(pixels, is_last=False) and model.has_choice
    assert model.choose_precision(pixels, is_last=True) and model.precision == "bf16"


def test_a_remembered_precision_is_not_chosen_again_on_the_same_processor(vit, pixels):
    clock = Clock(bf16=0.02, fp32=0.01)
    first = vit(clock)
    first.choose_precision(pixels, is_last=True)
    facts = first.facts()
    assert facts["precision"] == "fp32" and facts["dimension"] == 64
    again = vit(clock, known=facts)
    assert not again.has_choice and again.precision == "fp32"
    assert vit(clock, "bf16", known=facts).has_choice  # requested by the user: compared with fp32
    elsewhere = vit(Clock(bf16=0.01, fp32=0.02), known={**facts, "processor": "another"})
    assert elsewhere.has_choice and elsewhere.choose_precision(pixels, is_last=True)
    assert elsewhere.precision == "bf16"


def test_another_processor_does_not_try_what_was_not_accurate(offline_model_name, pixels, has_bf16):
    model = encoder.load(offline_model_name, "", "cpu", "auto")
    model.choose_precision(pixels, is_last=True)
    elsewhere = encoder.load(offline_model_name, "", "cpu", "auto", {**model.facts(), "processor": "another"})
    assert not elsewhere.has_choice and elsewhere.precision == "fp32"


# --- the forward pass -------------------------------------------------------------------------------------------------
def test_convolutional_models_run_channels_last_and_give_the_same(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    assert model._prepare(pixels).is_contiguous(memory_format=torch.channels_last)
    module = model._modules["fp32"]
    assert module.visual.trunk.conv_head.weight.is_contiguous(memory_format=torch.channels_last)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        plain = module.to(memory_format=torch.contiguous_format).encode_image(images)
    plain = torch.nn.functional.normalize(plain, dim=-1).numpy()
    np.testing.assert_allclose(model.encode(pixels), plain, atol=1e-5)


def test_out_of_memory_halves_the_batch_and_says_so(offline_model_name, pixels, log):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    whole, sizes = model.encode(pixels), []

    def before(images) -> None:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    plant(model, before)
    np.testing.assert_allclose(model.encode(pixels), whole, atol=1e-5)
    assert sizes == [4, 2, 2]
    assert "out of GPU memory with 4 images at once; lower BATCH_SIZE" in log.text


def test_memory_too_small_for_one_image_is_one_line_and_no_image_s_fault(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")

    def before(images) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plant(model, before)
    with pytest.raises(UserError, match="no longer works on cpu: CUDA out of memory; check the device"):
        model.encode_each(pixels[:3])


def test_an_image_that_the_model_fails_on_alone_costs_itself_only(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    first = model._prepare(pixels[:1])
    plant(model, failing(lambda images: (images == first).all(dim=(1, 2, 3)).any()))
    vectors = model.encode_each(pixels)
    assert vectors.shape == (4, 1280)
    assert np.isnan(vectors[0]).all() and np.isfinite(vectors[1:]).all()
    assert np.isnan(model.encode_each(pixels[:1])).all()  # a last batch of one, on a device that works


def test_an_image_that_the_model_fails_on_first_does_not_decide_the_precision(offline_model_name, pixels, has_bf16):
    model = encoder.load(offline_model_name, "", "cpu", "auto")
    first = model._prepare(pixels[:1])
    plant(model, failing(lambda images: (images.float() - first).abs().amax(dim=(1, 2, 3)).lt(0.02).any()))
    assert not model.choose_precision(pixels[:1], is_last=False)
    assert model.choose_precision(pixels, is_last=True) and model.precision == "fp32"


def test_a_batch_that_fails_for_another_reason_than_its_images_loses_none(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    whole = model.encode(pixels)
    plant(model, failing(lambda images: len(images) > 1))
    np.testing.assert_allclose(model.encode_each(pixels), whole, atol=1e-5)


@pytest.mark.parametrize("n", [1, 4])
def test_a_device_that_fails_on_every_image_is_one_line_and_no_image_s_fault(offline_model_name, pixels, n):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    plant(model, failing(lambda images: True))
    with pytest.raises(UserError, match=r"no longer works on cpu: CUDA error: planted; check the device.* is safe$"):
        model.encode_each(pixels[:n])


def test_a_model_whose_vectors_hold_no_numbers_is_one_line(offline_model_name, pixels):
    model = encoder.load(offline_model_name, "", "cpu", "fp32")
    model._modules["fp32"].visual.trunk.conv_stem.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="its vectors are not finite numbers"):
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
    assert len(Journal(tmp_path / "data/chroma/journal/images.sqlite3").ids) == 0


def test_the_choice_is_stored_and_holds_for_the_next_run(
    run_here, tmp_path, photos, photo_server: PhotoServer, offline_model_name
):
    urls = [f"{photo_server.url}/{photo.name}" for photo in photos[::16]]
    assert embed(run_here, tmp_path, urls[:2], offline_model_name).returncode == 0
    remembered = Journal(tmp_path / "data/chroma/journal/images.sqlite3").model
    assert remembered["dimension"] == 1280 and len(remembered["weights_sha256"]) == 64
    assert remembered["precision"] == "fp32"
    asked = embed(run_here, tmp_path, urls[:3], offline_model_name, "--precision", "bf16")
    assert asked.returncode == 2 and "0.999 is required); use --precision fp32 or auto" in asked.stderr
    assert len(Journal(tmp_path / "data/chroma/journal/images.sqlite3").ids) == 2
    assert embed(run_here, tmp_path, urls, offline_model_name).returncode == 0
    assert Journal(tmp_path / "data/chroma/journal/images.sqlite3").model == remembered


def test_a_device_lost_on_the_way_ends_the_run_and_keeps_what_is_stored(
    run_here, tmp_path, photos, photo_server: PhotoServer, offline_model_name, monkeypatch
):
    """The device is gone at the second batch: no failure is noted, and the next run embeds the rest."""
    urls = [f"{photo_server.url}/{photo.name}" for photo in photos[::6]]
    flags = ("--precision", "fp32", "--batch-size", "4")

    class Lost(encoder.Encoder):
        n_batches = 0

        def encode_each(self, pixels, precision=""):
            Lost.n_batches += 1
            if Lost.n_batches == 3:  # the first shows the dimension
                plant(self, failing(lambda images: True))
            return super().encode_each(pixels, precision)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "Encoder", Lost)
        lost = embed(run_here, tmp_path, urls, offline_model_name, *flags)
    assert lost.returncode == 2 and "no longer works on cpu" in lost.stderr and "Traceback" not in lost.stderr
    n_stored = len(Journal(tmp_path / "data/chroma/journal/images.sqlite3").ids)
    assert n_stored >= 4
    assert json.loads((tmp_path / "data/failed.json").read_text()) == []
    again = embed(run_here, tmp_path, urls, offline_model_name, *flags)
    assert f"{len(urls) - n_stored} stored + {n_stored} already there" in again.stdout
