"""Training: from pairs of label maps and photographs to a generator."""
