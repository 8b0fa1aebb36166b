"""What the stage scripts are made of: one noun per module."""
