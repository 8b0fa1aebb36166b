"""The identity of the model that made a collection's vectors: comparison, and a description for messages."""

from __future__ import annotations

from typing import Any


def same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities name the same model: compared by hashes if either has any, else by name and tag."""
    hashes = ("config_sha256", "weights_sha256")
    keys: tuple[str, ...]
    if any(key in identity for identity in (one, other) for key in hashes):
        is_local = "config_sha256" in one  # a local-dir's config has the architecture; for a checkpoint it is the name
        keys = hashes if is_local else (*hashes, "model_name")
    else:
        keys = ("model_name", "pretrained")
        if "" in (one.get("pretrained"), other.get("pretrained")):  # timm's choice of weights
            keys = ("model_name",)
    return all(one.get(key) == other.get(key) for key in keys)


def describe(identity: dict[str, Any]) -> str:
    """A model's identity as text for a message."""
    sha = identity.get("weights_sha256", "")
    parts = [identity.get("model_name"), identity.get("pretrained"), sha and f"weights {sha[:12]}"]
    return " ".join(str(part) for part in parts if part) or "an unknown model"
