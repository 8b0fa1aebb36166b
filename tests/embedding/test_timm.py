"""CLIP_MODEL_NAME timm:NAME: timm's own vectors, its own weights or a checkpoint, and one line for all else."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import offline_model
from tests.support.photos import PHOTOS, encode, load
from tests.support.servers import PhotoServer
from utils.embedding import encoder, networks, weights
from utils.errors import UserError
from utils.files import write_json
from utils.images.decode import decode
from utils.images.preprocess import to_pixels
from utils.store.model import same_model
from utils.store.vectors import Journal

timm = pytest.importorskip("timm")
torch = pytest.importorskip("torch")
LITE, DINO = "tf_efficientnet_lite0", "vit_small_patch14_dinov2"
# Sides that no resize divides evenly, upright and across, thin and square.
SIZES = [(333, 217), (217, 333), (801, 230), (226, 225), (640, 480), (97, 61), (513, 511), (225, 900), (75, 75)]


@pytest.fixture(scope="module")
def odd_photos() -> list[Image.Image]:
    """Twenty photos of odd sizes, without color profiles, which timm ignores."""
    names = [PHOTOS[number % len(PHOTOS)] for number in range(20)]
    photos = [load(name).resize(SIZES[number % len(SIZES)]) for number, name in enumerate(names)]
    for photo in photos:
        photo.info.clear()
    return photos


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-Lite0's real weights as a timm checkpoint, classifier included."""
    return offline_model.build_timm(tmp_path_factory.mktemp("timm") / "lite0.safetensors")


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded DINOv2-S, whose layers count as they do in a trained one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(DINO, num_classes=0)
        state = {name: 0.5 * torch.ones_like(v) if "gamma" in name else v for name, v in model.state_dict().items()}
    path = tmp_path_factory.mktemp("timm") / "dino.pt"
    torch.save(state, path)
    return path


def of_timm(name: str, checkpoint: Path, photos: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """(images (n, 3, H, W) of timm's evaluation transform, its vectors (n, D) of length 1)."""
    model = timm.create_model(name, num_classes=0).eval()
    state = timm.models.load_state_dict(str(checkpoint))
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("classifier")})
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    images = torch.stack([transform(photo) for photo in photos])
    with torch.inference_mode():
        vectors = torch.nn.functional.normalize(model(images), dim=-1)
    return images.numpy(), vectors.numpy()


@pytest.mark.parametrize(("name", "n"), [(LITE, 20), (DINO, 1)])  # 20 take DINOv2-S a minute
def test_vectors_are_those_of_timm_s_own_evaluation(name, n, lite, dino, odd_photos):
    checkpoint = lite if name == LITE else dino
    images, vectors = of_timm(name, checkpoint, odd_photos[:n])
    model = encoder.load(f"timm:{name}", str(checkpoint), "cpu", "fp32")
    files = [io.BytesIO(encode(photo, "PNG")) for photo in odd_photos[:n]]
    pixels = [to_pixels(decode(file, 10**8, model.preprocess.min_side), model.preprocess) for file in files]
    np.testing.assert_allclose(model._prepare(np.stack(pixels)).numpy(), images, atol=1e-5)
    assert (model.encode(np.stack(pixels)) * vectors).sum(axis=1).min() > 0.9999


@pytest.mark.parametrize("mode", ["squash", "center"])
def test_every_size_and_mode_of_timm_s_transform_is_met_pixel_for_pixel(mode, lite, odd_photos, monkeypatch):
    real = timm.data.resolve_model_data_config
    changed = {"crop_mode": mode, "input_size": (3, 96, 96), "crop_pct": 0.9, "interpolation": "bilinear"}
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda module: {**real(module), **changed})
    images, _ = of_timm(LITE, lite, odd_photos)
    network = networks.load(weights.find(f"timm:{LITE}", str(lite)))
    for photo, image in zip(odd_photos, images):
        pixels = np.round((image.transpose(1, 2, 0) * network.std + network.mean) * 255).astype(np.uint8)
        assert (to_pixels(photo, network.preprocess) == pixels).all()


def test_a_transform_that_cannot_be_met_exactly_is_one_line(lite, monkeypatch):
    real = timm.data.resolve_model_data_config
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda module: {**real(module), "crop_mode": "border"})
    with pytest.raises(UserError, match=r"needs a preprocessing of images that is not supported .*; use another model"):
        networks.load(weights.find(f"timm:{LITE}", str(lite)))


@pytest.mark.parametrize("change", ["without classifier", "another classifier"])
def test_a_checkpoint_may_have_any_classifier_or_none(change, lite, tmp_path, odd_photos):
    state = timm.models.load_state_dict(str(lite))
    if change == "without classifier":
        state = {name: value for name, value in state.items() if not name.startswith("classifier")}
    else:
        state |= {"classifier.weight": torch.zeros(7, 1280), "classifier.bias": torch.zeros(7)}
    torch.save(state, tmp_path / "changed.pth")
    pixels = np.stack([np.asarray(photo.resize((224, 224))) for photo in odd_photos[:2]])
    whole = encoder.load(f"timm:{LITE}", str(lite), "cpu", "fp32").encode(pixels)
    changed = encoder.load(f"timm:{LITE}", str(tmp_path / "changed.pth"), "cpu", "fp32").encode(pixels)
    np.testing.assert_array_equal(whole, changed)


def test_a_checkpoint_that_lacks_weights_is_one_line_and_never_random(lite, tmp_path):
    state = timm.models.load_state_dict(str(lite))
    del state["conv_stem.weight"]
    torch.save(state, tmp_path / "torn.pth")
    with pytest.raises(
        UserError, match=r"timm:.* cannot be loaded: .*; repair or download its weights again"
    ) as raised:
        networks.load(weights.find(f"timm:{LITE}", str(tmp_path / "torn.pth")))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "tag", "words"),
    [
        (LITE, "laion2b_s34b_b79k", r"is not a tag of timm:.* \(known: in1k\) or a file; add --clip-pretrained \"\""),
        ("no_such_model", "", "is unknown to timm"),
        ("vit_giant_patch14_224", "", "has no weights on the hub, and random weights are never used"),
        (LITE, "", "cannot be fetched: they are not in the hub's cache, and HF_HUB_OFFLINE is set"),
        (f"{LITE}.in1k", "", "cannot be fetched"),
    ],
)
def test_names_and_tags_without_weights_are_one_line(name, tag, words):
    with pytest.raises(UserError, match=words) as raised:
        networks.load(weights.find(f"timm:{name}", tag))
    assert "\n" not in str(raised.value)


def test_a_tag_may_stand_in_the_name_and_timm_s_own_is_any_of_them():
    tagged, own = weights.find(f"timm:{LITE}.in1k", ""), weights.find(f"timm:{LITE}", "")
    assert tagged == weights.find(f"timm:{LITE}", "in1k")
    assert same_model(tagged.identity, own.identity)
    assert not same_model(tagged.identity, weights.find(f"timm:{LITE}", "other").identity)
    assert not same_model(own.identity, weights.find(f"timm:{DINO}", "").identity)


# --- through the scripts ----------------------------------------------------------------------------------------------
def test_embed_resumes_with_it_refuses_another_model_and_text_says_that_it_cannot(
    run_here, tmp_path, photos, photo_server: PhotoServer, lite, small_vit_name
):
    def embed(n: int, model_name: str, pretrained: Path | str):
        write_json(tmp_path / "data/formatted.json", [{"url": f"{photo_server.url}/{p.name}"} for p in photos[:n]])
        flags = ["--clip-model-name", model_name, "--clip-pretrained", pretrained, "--download-allow-local"]
        return run_here("embed.py", *flags)

    name = f"timm:{LITE}"
    assert "3 items = 3 stored" in embed(3, name, lite).stdout
    assert "5 items = 2 stored + 3 already there" in embed(5, name, lite).stdout
    remembered = Journal(tmp_path / "data/chroma/journal/images.sqlite3").model
    assert remembered["model_name"] == name and len(remembered["weights_sha256"]) == 64
    assert json.loads(remembered["preprocess"])["resize"] == [256, 256]
    refused = embed(5, small_vit_name, "")
    assert refused.returncode == 2 and f"--clip-model-name {name}" in refused.stderr
    text = run_here("ann_dirrify.py", "--ann-sampler-name", "text", "--ann-sampler-cfg", '{"prompt": "a cat"}')
    assert text.returncode == 2 and "is image-only: it cannot embed text; use another sampler" in text.stderr
