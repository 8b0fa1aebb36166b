"""From the collection to folders, and from reviewed folders to records.

neighbor_dirs.py names, lists and writes the directories, and dir_images.py fills them. reviewed.py finds out which
images a reviewer kept or deleted. loads.py, records.py and history.py store the decisions.
"""
