"""Training: the train step, the loop around it, optimizers, checkpoints.

Imports `inference`, `data`, `modules`, `parallel` and the base files of the package.
"""
