"""Scoring: any model, any protocol, once per token, checked by gates and kept."""
