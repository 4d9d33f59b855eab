"""Weights of other ecosystems: their files and the names of their tensors. Imports `errors`."""
