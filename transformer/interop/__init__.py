"""Conversion of trained models to the formats of other libraries.

Imports `inference`, `data`, `modules` and the base files of the package; only programs import it.
"""
