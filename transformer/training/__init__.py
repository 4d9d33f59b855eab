"""Training: the train step, the loop around it, optimizers, checkpoints.

`step` is the pure function (state, batch) → (state, sums); `loop` calls it in dispatches of many
steps, and logs, validates and saves between them. Imports `inference`, `data`, `modules`,
`parallel` and the base files of the package.
"""
