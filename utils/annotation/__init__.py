"""From the collection to folders, and from reviewed folders to records.

neighbor_dirs.py names, lists and writes the directories; dir_images.py fills them; reviewed.py decides what was kept,
deleted or is a sidecar; loads.py, records.py and history.py keep decisions.
"""
