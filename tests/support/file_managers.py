"""A directory as a file manager shows it, in a virtual screen (Debian: xvfb, imagemagick, dbus, and the managers)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WIDTH, HEIGHT = 1_200, 760  # pixels of the screen
# Manager -> files of the user's configuration: large icons, all of the screen
SETTINGS = {
    "pcmanfm": {
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
    },
    "thunar": {
        "xfce4/xfconf/xfce-perchannel-xml/thunar.xml": f"""<?xml version="1.0" encoding="UTF-8"?>
<channel name="thunar" version="1.0">
  <property name="default-view" type="string" value="ThunarIconView"/>
  <property name="last-icon-view-zoom-level" type="string" value="THUNAR_ZOOM_LEVEL_200_PERCENT"/>
  <property name="last-side-pane" type="string" value=""/>
  <property name="last-window-width" type="int" value="{WIDTH}"/>
  <property name="last-window-height" type="int" value="{HEIGHT}"/>
</channel>
"""
    },
    "nautilus": {
        "glib-2.0/settings/keyfile": f"""[org/gnome/nautilus/icon-view]
default-zoom-level='medium'
[org/gnome/nautilus/window-state]
initial-size=({WIDTH}, {HEIGHT})
"""
    },
    "dolphin": {
        "dolphinrc": """[PreviewSettings]
Plugins=imagethumbnail,jpegthumbnail
[IconsMode]
PreviewSize=128
"""
    },
}
ARGUMENTS = {"dolphin": ["-qwindowgeometry", f"{WIDTH}x{HEIGHT}"]}
# Settings from files, no network places, no accelerated drawing, file names sorted by their numbers.
ENVIRONMENT = {
    "GSETTINGS_BACKEND": "keyfile",
    "GIO_USE_VFS": "local",
    "GDK_BACKEND": "x11",
    "GSK_RENDERER": "cairo",
    "QT_QPA_PLATFORM": "xcb",
    "LC_ALL": "en_US.UTF-8",
}


def photograph(manager: str, directory: Path) -> bytes:
    """PNG of the screen once `manager`, one of SETTINGS, has shown `directory` and its thumbnails."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home, _screen() as display:
        for name, text in SETTINGS[manager].items():
            path = Path(home, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        folders = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR"), home)
        environment = {**os.environ, **ENVIRONMENT, **folders, "DISPLAY": display}
        environment.pop("DBUS_SESSION_BUS_ADDRESS", None)
        shown = shutil.copytree(directory, Path(home, "dirrify", directory.name))  # its path is in the picture
        session = subprocess.Popen(
            ["dbus-run-session", "--", manager, *ARGUMENTS.get(manager, []), str(shown)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            _wait_until_still(environment)
            return _grab(environment, "png")
        finally:
            os.killpg(session.pid, signal.SIGTERM)
            session.wait()


@contextlib.contextmanager
def _screen() -> Iterator[str]:
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


def _grab(environment: dict[str, str], kind: str) -> bytes:
    command = ["import", "-window", "root", "-depth", "8", f"{kind}:-"]
    return subprocess.run(command, env=environment, capture_output=True, check=True).stdout


def _wait_until_still(environment: dict[str, str], still_s: float = 3, most_s: float = 60) -> None:
    """Wait until the screen shows something that does not change for a while: thumbnails appear one by one."""
    last, since, begun = b"", time.monotonic(), time.monotonic()
    while time.monotonic() - begun < most_s:
        now = _grab(environment, "rgb")
        if now != last or len(set(now[:3_000_000:997])) < 8:
            last, since = now, time.monotonic()
        elif time.monotonic() - since > still_s:
            return
        time.sleep(0.3)
