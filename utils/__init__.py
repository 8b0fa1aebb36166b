"""Code shared by the stage scripts: the hall (modules directly in this folder) and one package, a room, per concern."""
