"""The input of embed.py: items, their ids, metadata that Chroma returns unchanged, and the outcome of each item.

worklist.py counts the outcomes, and decides which failures of earlier runs are retried.
"""
