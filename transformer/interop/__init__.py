"""Conversion of models from and to the formats of other libraries; only programs import it."""
