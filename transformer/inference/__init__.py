"""Inference: decoding, generation of texts, evaluation, metrics of texts, plots.

Imports `data`, `modules`, `parallel` and the base files of the package; training imports it.
"""
