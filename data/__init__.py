"""Text to tokens to batches: prepare once, read as a pure function of (fingerprint, seed, step).

`sources` -> `tokenizer` -> `shards` are joined by `prepare`; `order` says which tokens a step sees;
`loader` hands them out as `pretrain.batch.Batch`. Importing this package imports nothing heavy.
"""
