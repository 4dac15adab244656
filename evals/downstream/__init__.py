"""Downstream tasks as text to text: examples, metrics, baselines and the table."""
