"""Perplexity against context: losses of a model by how much it may read, with error bars."""
