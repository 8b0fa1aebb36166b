"""The README's pictures, made from the demo: a folder under review in a file manager, and the report in a browser.

    python -m tests.support.pictures [FOLDER]

Needs Xvfb, PCManFM, ImageMagick and Chromium (Debian: xvfb pcmanfm imagemagick chromium). Writes .github/pictures/. All
photos in them are those of scikit-image that are in the public domain or CC0.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests import demo
from tests.support import browser
from utils.cli import run

PICTURES = demo.ROOT / ".github" / "pictures"
# Source: the docstrings of skimage.data, which give each photo's license.
FREE_PHOTOS = ["astronaut.png", "camera.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "rocket.jpg"]
WIDTH, HEIGHT = 1_200, 760  # pixels of a picture
N_COLORS = 128  # of a picture's palette: two pictures stay under 300 KB each
SETTINGS = {
    "pcmanfm/default/pcmanfm.conf": f"""[ui]
always_show_tabs=0
hide_close_btn=1
win_width={WIDTH}
win_height={HEIGHT}
splitter_pos=0
side_pane_mode=hidden;places
view_mode=icon
toolbar=navigation;
show_statusbar=1
""",
    "libfm/libfm.conf": """[ui]
big_icon_size=128
thumbnail_size=128
show_thumbnail=1
""",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/pictures"), help="default: data/pictures")
    folder: Path = parser.parse_args(argv).folder
    demo.PHOTOS[:] = FREE_PHOTOS
    PICTURES.mkdir(parents=True, exist_ok=True)
    demo.main([str(folder), "--review"])
    directory = min((folder / "dirrify").glob("*_*/"), key=lambda path: demo.rank_and_id(path)[0])
    photograph_directory(directory, PICTURES / "review.png")
    demo.main([str(folder)])
    photograph_report(folder / "report" / "report.html", PICTURES / "report.png")
    for path in sorted(PICTURES.glob("*.png")):
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def photograph_directory(directory: Path, picture: Path) -> None:
    with tempfile.TemporaryDirectory() as home, screen() as display:
        for name, text in SETTINGS.items():
            path = Path(home, name)
            path.parent.mkdir(parents=True)
            path.write_text(text)
        environment = {**os.environ, "DISPLAY": display, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home, "HOME": home}
        environment.pop("DBUS_SESSION_BUS_ADDRESS", None)
        shown = shutil.copytree(directory, Path(home, "dirrify", directory.name))  # its path is in the picture
        manager = subprocess.Popen(["pcmanfm", "--no-desktop", str(shown)], env=environment)
        try:
            wait_until_still(environment)
            shrink(grab(environment, "png"), picture)
        finally:
            manager.terminate()
            manager.wait()


@contextlib.contextmanager
def screen() -> Iterator[str]:
    reading, writing = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-screen", "0", f"{WIDTH}x{HEIGHT}x24", "-nolisten", "tcp"],
        pass_fds=[writing],
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    try:
        with open(reading) as file:
            yield f":{file.readline().strip()}"
    finally:
        server.terminate()
        server.wait()


def grab(environment: dict[str, str], kind: str) -> bytes:
    command = ["import", "-window", "root", "-depth", "8", f"{kind}:-"]
    return subprocess.run(command, env=environment, capture_output=True, check=True).stdout


def wait_until_still(environment: dict[str, str], still_s: float = 3, most_s: float = 60) -> None:
    """Until the screen has shown something, and the same, for a while: thumbnails come one by one."""
    last, since, begun = b"", time.monotonic(), time.monotonic()
    while time.monotonic() - begun < most_s:
        now = grab(environment, "rgb")
        if now != last or len(set(now[:3_000_000:997])) < 8:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > still_s:
            return
        time.sleep(0.3)


def photograph_report(page: Path, picture: Path) -> None:
    program = browser.find()
    assert program, "no Chromium"
    with tempfile.TemporaryDirectory() as profile, browser.opened(program, Path(profile)) as tab:
        tab.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False)
        tab.open(page.absolute().as_uri())
        tab.run("document.querySelector('#group0').scrollIntoView()")  # the first round: whole photos
        tab.run("new Promise(done => setTimeout(done, 1500))")
        shrink(base64.b64decode(tab.call("Page.captureScreenshot", format="png")["data"]), picture)


def shrink(png: bytes, picture: Path) -> None:
    command = ["convert", "png:-", "-dither", "None", "-colors", str(N_COLORS), "-define", "png:compression-level=9"]
    subprocess.run([*command, f"png8:{picture}"], input=png, check=True)


if __name__ == "__main__":
    run(main)
