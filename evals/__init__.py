"""Evaluation: score once per token, then derive every number, plot and verdict from that."""
