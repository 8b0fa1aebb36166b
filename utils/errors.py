"""The two kinds of errors that are not bugs: a fault that the user can fix, and an image that cannot be used."""

from __future__ import annotations

# The values of "reason" in failed.json. README.md explains each reason and its remedy.
REASONS = frozenset((
    "bad_record", "bad_url", "blocked_address", "connection", "tls", "timeout", "http_status", "rate_limited",
    "bad_redirect", "opted_out", "too_large", "too_many_pixels", "not_an_image", "truncated", "bad_image", "model",
))  # fmt: skip
_TEMPORARY = frozenset({"connection", "timeout", "rate_limited"})


class UserError(Exception):
    """A fault that the user can fix. The message is one line: thing, fault, remedy. The script exits with code 2."""


class ImageError(Exception):
    """An image that cannot be used. `reason` is one of REASONS; `detail` is for people. The run goes on."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)  # pickling between processes needs both as args
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def is_temporary(reason: str, detail: str) -> bool:
    """Whether a later attempt may succeed. The detail of http_status starts with the status code; 5xx is temporary."""
    return reason in _TEMPORARY or (reason == "http_status" and detail.startswith("5"))
