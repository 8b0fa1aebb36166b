"""Bytes behind a URL: how URLs are read, which addresses are allowed, how hosts share the downloads."""
