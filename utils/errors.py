"""The two kinds of errors that are not bugs: a fault that the user can fix, and an image that cannot be used."""

from __future__ import annotations

# Why an image could not be embedded, as in failed.json. README.md explains each and says what to do.
REASONS = frozenset((
    "bad_record", "bad_url", "blocked_address", "connection", "tls", "timeout", "http_status", "rate_limited",
    "bad_redirect", "opted_out", "too_large", "too_many_pixels", "not_an_image", "truncated", "bad_image", "model",
))  # fmt: skip
_TEMPORARY = frozenset({"connection", "timeout", "rate_limited"})


class UserError(Exception):
    """A fault that the user can fix, in one line: the thing, the fault, the remedy. The script ends with code 2."""


class ImageError(Exception):
    """An image that cannot be used: `reason` is one of REASONS, `detail` is for people. The run goes on."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)  # both as args, or pickling between processes would fail
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def can_heal(reason: str, detail: str) -> bool:
    """Whether a later try may succeed. The detail of http_status begins with the status: 5xx may heal, 4xx lasts."""
    return reason in _TEMPORARY or (reason == "http_status" and detail.startswith("5"))
