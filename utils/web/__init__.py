"""Download what a URL names, only from allowed addresses, in fair turns among hosts."""
