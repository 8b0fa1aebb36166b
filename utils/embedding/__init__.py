"""From URLs to vectors: the model and its weights, the processes that fetch images, and the run, local or on Ray."""
