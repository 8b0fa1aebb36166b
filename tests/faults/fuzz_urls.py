"""Random URLs and redirects, read by utils/web/urls.py and by headless Chromium's URL(): the two must agree.

    python -m tests.faults.fuzz_urls [--count 5000] [--seed 0]

Hosts that only one of the two refuses are counted apart: Chromium asks name servers also for hosts with spaces, with
empty labels and with wildcards, which no name server knows.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from tests.support import browser
from utils.errors import ImageError
from utils.web import urls

STARTS = ["http://", "https://", "HTTP://", "http:/", "http:\\\\", "http:", "https:///"]
HOSTS = [
    *("h.example", "EXAMPLE.com", "h.example.", "a_b.example", "-a.example", "a-.example", "ab--c.example", "a%2eb"),
    *(
        "bücher.example",
        "例え.テスト",
        "i❤.ws",
        "☃.net",
        "💩.la",
        "faß.de",
        "ß.ⓒⓞⓜ",
        "ＷＷＷ.example",
        "a。b",
        "fi\u00adx.de",
    ),
    *("xn--bcher-kva.example", "👩\u200d💻.ws", "1.2.3.4", "1.2.3.4.", "0x7f.1", "127.1", "1.2.3.4.5", "256.1.1.1"),
    *("099.1", "[::1]", "[2001:DB8::0:1]", "u@h", "u:p@h", "a@b@h"),
]
PORTS = ["", "", "", "", ":80", ":443", ":8080", ":", ":0080", ":65535", ":65536"]
PIECES = [*"abcAZ019-._~!$&()*+,;=:@[]{}|\\^`\"<>% #?/'", "%41", "%7E", "%c3%a9", "%C3%A9", "é", "猫", "💩", "%z", "//"]
PIECES += ["/.", "/..", "/./", "/../", "%2e", "/%2e%2E/", "\t", "\n", "\x01", "\x7f", "\u00ad", "&x="]
BASES = [
    "http://h.example//key/a/b?q#f",
    "https://u:p@h.example:8080/x/y;z",
    "http://h.example",
    "http://h.example/a/?",
]
REFERENCES = ["", "/", "//h2.example/", "\\", "?", "#", "../", "./", "http://x.example", "HTTPS:/y", "..//", "a:", "a/"]
PROGRAM = """(cases => cases.map(([url, base]) => {
    try { const found = new URL(url, base || undefined); found.hash = ""; return found.href.replace(/#$/, "") }
    catch { return "" }
}))"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    differing, n_refused = compare(args.count, args.seed)
    print(*differing, sep="\n")
    print(f"{args.count} URLs: {len(differing)} differ, {n_refused} hosts are refused by one of the two")


def compare(count: int, seed: int) -> tuple[list[str], int]:
    """URLs that both take and read differently, in words, and how many only one of the two takes."""
    rng, differing, n_refused = random.Random(seed), [], 0
    cases = [random_case(rng) for _ in range(count)]
    program = browser.find()
    assert program, "no Chromium is installed"
    with tempfile.TemporaryDirectory() as profile, browser.opened(program, Path(profile)) as page:
        expected = page.run(f"{PROGRAM}({json.dumps(cases)})")
    for (url, base), wanted in zip(cases, expected):
        found, wanted = without_credentials(read(url, base)), without_credentials(wanted)
        if found and wanted and found != wanted:
            differing.append(f"{url!r} from {base!r}: Chromium {wanted}, here {found}")
        n_refused += bool(found) != bool(wanted)
    return differing, n_refused


def random_case(rng: random.Random) -> tuple[str, str]:
    """A URL and "", or a redirect's Location and the URL that it came from."""
    tail = "".join(rng.choices(PIECES, k=rng.randrange(14)))
    if rng.random() < 0.5:
        return rng.choice(REFERENCES) + tail, rng.choice(BASES)
    return rng.choice(STARTS) + rng.choice(HOSTS) + rng.choice(PORTS) + "/" * (rng.random() < 0.9) + tail, ""


def read(url: str, base: str) -> str:
    """The URL to request, "" if there is none. Other schemes stay as they are."""
    target = urls.resolve(urls.http_url(base), url) if base else url
    try:
        return urls.http_url(target) if urls.scheme_of(target) in ("http", "https") else ""
    except ImageError:
        return ""


def without_credentials(url: str) -> str:
    """They are never part of a request's target. Of other schemes, nothing is compared."""
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}" if scheme in ("http", "https") else ""


if __name__ == "__main__":
    main()
