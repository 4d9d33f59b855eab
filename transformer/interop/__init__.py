"""Conversion of models from and to the formats of other libraries; only programs import it.

Imports `inference`, `training`, `data`, `modules`, `parallel` and the base files of the package.
"""
