"""From the collection to folders, and from reviewed folders to records: neighbors, directories, decisions, history."""
