"""From decisions to better neighbors: a projection learned from groups, its held-out gain, and its collection."""
