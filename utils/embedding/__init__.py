"""From URLs to vectors: the model and its weights, the worker processes that fetch, and the run, here or on Ray."""
