"""Datasets, tokenizers and batches: a batch is a pure function of the data, a key and the step.

`corpus` tokenizes each split once; the rows are gathered into batches on the devices or streamed by
worker processes. Imports `parallel` and the base files of the package.
"""
