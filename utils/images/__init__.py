"""Image files: formats, decoding as browsers do, preprocessing, the cache of originals, and copies for people."""
