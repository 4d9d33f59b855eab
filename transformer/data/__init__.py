"""Datasets: TFDS builders, tokenizers, and batches as pure functions of the step."""
