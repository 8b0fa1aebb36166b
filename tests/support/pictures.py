"""The README's pictures, made from the demo: a folder under review in a file manager, and the report in a browser.

    python -m tests.support.pictures [FOLDER] [--formats]

Needs Xvfb, D-Bus, PCManFM, ImageMagick and Chromium (Debian: xvfb dbus pcmanfm imagemagick chromium). Writes
.github/pictures/. All photos in them are those of scikit-image that are in the public domain or CC0.

With --formats it photographs a directory made from files of every format instead, in each of PCManFM, Thunar, Nautilus
and Dolphin that is installed; the README shows PCManFM. Thunar sometimes leaves one thumbnail out, another one each
time: look twice.
"""

from __future__ import annotations

import argparse
import base64
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tests import demo
from tests.support import browser, file_managers, offline_model, photos
from tests.support.image_files import encoded, exif, png_chunks
from utils.cli import run

PICTURES = demo.ROOT / ".github" / "pictures"
# Source: the docstrings of skimage.data, which give each photo's license.
FREE_PHOTOS = ["astronaut.png", "camera.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg"]
WIDTH, HEIGHT = 1_200, 760  # pixels of a picture
SIZE = {"width": file_managers.WIDTH, "height": file_managers.HEIGHT}  # pixels of the report's picture
ICONS = "1060x580+0+57"  # of a picture of PCManFM: fifteen icons
N_COLORS = 128  # of a picture's palette: two pictures stay under 300 KB each


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/pictures"), help="default: data/pictures")
    parser.add_argument("--formats", action="store_true", help="write FOLDER/MANAGER.png, a directory of every format")
    args = parser.parse_args(argv)
    folder: Path = args.folder
    if args.formats:
        show_formats(folder)
        return 0
    demo.PHOTOS[:] = FREE_PHOTOS
    PICTURES.mkdir(parents=True, exist_ok=True)
    demo.main([str(folder), "--review"])
    directory = min((folder / "dirrify").glob("*_*/"), key=lambda path: demo.rank_and_id(path)[0])
    shrink(file_managers.photograph("pcmanfm", directory), PICTURES / "review.png")
    demo.main([str(folder)])
    photograph_report(folder / "report" / "report.html", PICTURES / "report.png")
    for path in sorted(PICTURES.glob("*.png")):
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def show_formats(folder: Path) -> None:
    """Photograph a directory made from files of every format, into `folder`, in each file manager of this machine."""
    model, files = offline_model.build_small_vit(folder / "model"), folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    for name, file in files_of_every_format().items():
        (files / name).write_bytes(file.read())
    for command in (["embed.py", "files", "--clip-model-name", f"local-dir:{model.absolute()}"], ["ann_dirrify.py"]):
        subprocess.run([sys.executable, str(demo.ROOT / command[0]), *command[1:]], cwd=folder, check=True)
    directory = next((folder / "data" / "dirrify").glob("0_*"))
    for manager in filter(shutil.which, file_managers.SETTINGS):
        picture = folder / f"{manager}.png"
        picture.write_bytes(file_managers.photograph(manager, directory))
        print(picture)
    shrink((folder / "pcmanfm.png").read_bytes(), PICTURES / "formats.png", "-crop", ICONS)


def files_of_every_format() -> dict[str, io.BytesIO]:
    """One photo with the name of its format written on it; all that is not its first frame shows another."""

    def labeled(name: str) -> Image.Image:
        image = photos.load("coffee.png")
        font = ImageFont.load_default(70)
        ImageDraw.Draw(image).text((10, 10), name, "white", font, stroke_width=4, stroke_fill="black")
        return image

    more = {"save_all": True, "append_images": [photos.load("rocket.jpg").resize(labeled("").size)]}
    turned = labeled("rotated").transpose(Image.Transpose.ROTATE_90)
    clear = labeled("clear")
    clear.putalpha(ImageOps.invert(Image.radial_gradient("L")).resize(clear.size))
    deep = np.asarray(labeled("PNG 16")).astype(">u2") * 257
    height, width, _ = deep.shape
    return {
        "jpeg.jpg": encoded(labeled("JPEG"), "JPEG"),
        "webp.webp": encoded(labeled("WebP"), "WEBP"),
        "clear.webp": encoded(clear, "WEBP"),
        "animated.webp": encoded(labeled("moving"), "WEBP", **more),
        "avif.avif": encoded(labeled("AVIF"), "AVIF"),
        "tiff.tif": encoded(labeled("TIFF"), "TIFF"),
        "mpo.jpg": encoded(labeled("MPO"), "MPO", **more),
        "jpeg2000.jp2": encoded(labeled("JP2"), "JPEG2000"),
        "cmyk.jpg": encoded(labeled("CMYK").convert("CMYK"), "JPEG"),
        "png16.png": png_chunks(width, height, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep)),
        "rotated.jpg": encoded(turned, "JPEG", exif=b"Exif\0\0" + exif(6)),
        "animated.gif": encoded(labeled("GIF"), "GIF", duration=500, loop=0, **more),
        "bmp.bmp": encoded(labeled("BMP"), "BMP"),
        "heic.heic": encoded(labeled("HEIC"), "HEIF"),
        "large.jpg": encoded(labeled("12 MP").resize((4000, 3000)), "JPEG"),
    }


def photograph_report(page: Path, picture: Path) -> None:
    program = browser.find()
    assert program, "no Chromium"
    with tempfile.TemporaryDirectory() as profile, browser.opened(program, Path(profile)) as tab:
        tab.call("Emulation.setDeviceMetricsOverride", **SIZE, deviceScaleFactor=1, mobile=False)
        tab.open(page.absolute().as_uri())
        tab.run("document.querySelector('#group0').scrollIntoView()")  # the first round: whole photos
        tab.run("new Promise(done => setTimeout(done, 1500))")
        shrink(base64.b64decode(tab.call("Page.captureScreenshot", format="png")["data"]), picture)


def shrink(png: bytes, picture: Path, *options: str) -> None:
    command = ["convert", "png:-", *options, "+repage", "-dither", "None", "-colors", str(N_COLORS)]
    subprocess.run([*command, "-define", "png:compression-level=9", f"png8:{picture}"], input=png, check=True)


if __name__ == "__main__":
    run(main)
