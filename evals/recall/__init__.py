"""Recall: small models trained from scratch on tasks of memory, and probes of trained runs."""
