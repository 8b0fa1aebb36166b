"""What the stage scripts share: the hall here, and a room per concern. errors.py says which failures can heal."""
