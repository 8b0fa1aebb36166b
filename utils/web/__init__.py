"""Download the file behind a URL, only from allowed addresses and with fair scheduling among hosts."""
