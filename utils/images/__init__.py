"""Image files: formats by content, decoding to RGB, a model's preprocessing, the cache of originals, copies to show."""
