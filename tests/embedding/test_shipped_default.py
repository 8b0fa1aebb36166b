"""The shipped default of config.py: ViT-B-32 from the hub, which a loopback server plays."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from tests.conftest import ROOT
from tests.support.offline_model import WEIGHTS_NAME
from tests.support.servers import closed_port
from utils.store.collection import open_collection, read_ids, read_vectors

# What comes before torch is loaded, without it.
FETCH = f"weights.fetch('laion/CLIP-ViT-B-32-laion2B-s34B-b79K', ['{WEIGHTS_NAME}'])"
FETCH_NONE = "weights.fetch('ORG/NAME', weights.HUB_NAMES)"
QUICK_LOOKUPS = {"RES_OPTIONS": "timeout:1 attempts:1"}  # for a name server that is slow to say that a name is unknown
# The hub's client rests a second between its tries, and takes no less than a second as its variable for the limit.
IMPATIENT = "setattr(__import__('time'), 'sleep', lambda s: None)"
IMPATIENT += ", setattr(__import__('huggingface_hub.constants').constants, 'HF_HUB_DOWNLOAD_TIMEOUT', 0.2)"


def in_process_of_its_own(call, environment):
    code = f"from utils import cli; from utils.embedding import encoder, weights; cli.run(lambda: {call} and 0)"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=60,
        capture_output=True,
        text=True,
    )


def write_list(folder, urls):
    """data/formatted.json in `folder`, as a user puts it there."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "data" / "formatted.json").write_text(json.dumps([{"url": url} for url in urls]))


def assert_one_line(result):
    line = assert_one_line_of(result)
    assert "local-dir:PATH" in line  # the way out, where the hub is out of reach
    return line


def assert_one_line_of(result):
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.rstrip().endswith(lines[0])
    assert "Traceback" not in result.stderr
    return lines[0]


def test_embeds_with_the_constants_as_shipped(run_script, photo_server, photos, fake_hub, seeded_vit, tmp_path):
    write_list(tmp_path, [f"{photo_server.url}/{photo.name}" for photo in photos[:3]])
    hub = fake_hub(seeded_vit, "cut")
    environment = hub.environment(tmp_path / "hf")
    assert_one_line(in_process_of_its_own(FETCH, environment))

    hub.mode = "normal"
    first = run_script("embed.py", "--download-allow-local", env=environment)
    assert first.returncode == 0, first.stderr
    assert json.loads((tmp_path / "data/failed.json").read_text()) == []
    assert any("CLIP-ViT-B-32-laion2B-s34B-b79K" in request for request in hub.requests)
    collection = open_collection(tmp_path / "data/chroma", "images")
    assert read_vectors(collection, read_ids(collection)).shape == (3, 512)

    hub.requests.clear()
    second = run_script("embed.py", "--download-allow-local", env=environment)
    assert second.returncode == 0, second.stderr
    assert not hub.requests

    hub.mode = "refuse"  # the weights are in the hub's cache by now
    assert in_process_of_its_own(FETCH, environment).returncode == 0
    assert not hub.requests


def test_hub_out_of_reach_is_one_line_within_reasonable_time(fake_hub, tmp_path):
    home = tmp_path / "hf"
    never_served = tmp_path / "weights"
    never_served.touch()
    troubles = [
        fake_hub(never_served, "refuse").environment(home),
        # The hub client's own variable, so that the test need not wait its 10 seconds.
        {**fake_hub(never_served, "hang").environment(home), "HF_HUB_ETAG_TIMEOUT": "1"},
        {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"},
        {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        {"HF_ENDPOINT": "http://no-such-name.invalid", "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", **QUICK_LOOKUPS},
    ]
    faults = ["503", "stopped answering", "refuses connections", "HF_HUB_OFFLINE is set", "does not resolve"]
    with ThreadPoolExecutor() as pool:
        for result, fault in zip(pool.map(in_process_of_its_own, [FETCH_NONE] * 5, troubles), faults, strict=True):
            line = assert_one_line(result)
            assert "weights of ORG/NAME cannot be fetched" in line and fault in line


def test_a_download_that_stalls_ends_though_another_model_s_goes_on(fake_hub, offline_model_path, tmp_path):
    other = tmp_path / "hf/hub/models--OTHER--NAME/blobs/0.incomplete"
    other.parent.mkdir(parents=True)
    ended = threading.Event()

    def download_another():
        while not ended.wait(0.05):
            with other.open("ab") as file:
                file.write(b"more")

    thread = threading.Thread(target=download_another)
    thread.start()
    try:
        hub = fake_hub(offline_model_path / WEIGHTS_NAME, "stall")
        call = f"({IMPATIENT}, {FETCH})"
        line = assert_one_line(in_process_of_its_own(call, hub.environment(tmp_path / "hf")))
    finally:
        ended.set()
        thread.join()
    assert "stopped answering" in line


def test_weights_come_over_plain_http_whose_time_is_limited(offline_model_name, tmp_path):
    load = f"encoder.load({offline_model_name!r}, '', 'cpu', 'fp32')"
    state = "print(__import__('huggingface_hub').constants.HF_HUB_DISABLE_XET)"
    done = in_process_of_its_own(f"({load}, {state})[1]", {"HF_HOME": str(tmp_path)})
    assert done.stdout == "True\n", done.stderr


def test_a_model_that_cannot_be_had_ends_the_run_though_downloads_and_the_index_wait(
    run_script, photo_server, tmp_path
):
    write_list(tmp_path, [f"{photo_server.url}/{name}" for name in photo_server.files])
    result = run_script("embed.py", "--clip-model-name", "ViT-B-33", "--download-allow-local", timeout=60)
    assert "ViT-B-33' is unknown to open_clip" in assert_one_line_of(result)
    assert not (tmp_path / "data/chroma/chroma.sqlite3").exists()
