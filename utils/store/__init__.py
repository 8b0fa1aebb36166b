"""Where vectors live: the durable record of every embedding, and the Chroma collection built from it."""
