"""The list that embed.py reads: items, their ids, the metadata that survives Chroma, and each item's outcome."""
