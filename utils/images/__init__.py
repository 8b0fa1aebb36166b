"""Image files: formats by content, decoding as browsers show, preprocessing, the cache of originals, copies to show."""
