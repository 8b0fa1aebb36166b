"""Files for trainers and evaluators: formats, and splits that do not leak."""
