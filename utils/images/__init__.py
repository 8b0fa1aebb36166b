"""Image files: formats told by their bytes, decoding to RGB, preprocessing, the cache of originals, thumbnails."""
