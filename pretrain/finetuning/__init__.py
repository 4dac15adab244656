"""Fine-tuning on pairs of input and target, whatever model reads and writes them."""
