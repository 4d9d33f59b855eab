"""Datasets, tokenizers and batches: a batch is a pure function of the data, a key and the step.

A dataset of TFDS, or of text files, is tokenized once per split (`corpus`), packed into rows if the
config says so, and then gathered on the devices or streamed by worker processes. Imports `parallel`
and the base files of the package.
"""
