"""The two errors that are told apart: what the user can fix, and what is wrong with one image."""

from __future__ import annotations

# What became of an image that could not be embedded. The README says what to do about each.
REASONS: dict[str, str] = {
    "bad_record": "not an object with a url and an id field",
    "bad_url": "not a URL that can be requested",
    "blocked_address": "the address is local, private or reserved",
    "connection": "the name does not resolve, or the connection was refused or reset",
    "timeout": "not complete within the deadline",
    "http_status": "the server answered with an error status",
    "rate_limited": "the server asked to come back later",
    "bad_redirect": "redirects that loop, lead nowhere or are too many",
    "opted_out": "served with X-Robots-Tag noai or noimageai",
    "too_large": "more bytes than DOWNLOAD_MAX_BYTES",
    "too_many_pixels": "more pixels than MAX_IMAGE_PIXELS",
    "not_an_image": "HTML, SVG, PDF, or a format that is not on the list",
    "truncated": "the file ends before the image does",
    "bad_image": "the decoder cannot read it",
    "model": "the forward pass failed on it",
}
_HEALING = frozenset({"connection", "timeout", "rate_limited"})


class UserError(Exception):
    """What the user can fix, in one line that names the thing, the fault and the remedy. Ends the script with 2."""


class ImageError(Exception):
    """One image that cannot be used: `reason` is a key of REASONS, `detail` is for people. The run goes on."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)  # both as args, so that it survives pickling between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def can_heal(reason: str, detail: str) -> bool:
    """Whether a later try may succeed. An http_status detail begins with the status: 5xx heals, 4xx lasts."""
    return reason in _HEALING or (reason == "http_status" and detail.startswith("5"))
