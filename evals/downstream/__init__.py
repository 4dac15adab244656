"""Downstream tasks, answered in text: examples, metrics, baselines and the table."""
