"""Speed of a training step, beside public implementations, and of single operators."""
