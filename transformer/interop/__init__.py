"""Weights of other libraries, in and out: formats, names of tensors, run folders, exported folders.

Imports `data`, `inference`, `modules`, `parallel`, `training`, and the runs and base files of the
package.
"""
