"""The input of embed.py: items, their ids, metadata that Chroma returns unchanged, and the outcome of each item."""
