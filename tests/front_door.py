"""Command lines through the entry point of `train.py`, in this process, up to where it compiles."""

import contextlib
import io
import sys
import warnings

import jax
import jaxtyping
import pytest
from absl import flags

import train
from transformer import cli
from transformer.config import RunConfig
from transformer.run import Run


def begin(data_dir):
    """What `Run.train` does before it compiles, but for its folder."""
    run = Run(RunConfig.from_config_dict(train.CONFIG.value), data_dir=data_dir)
    run.check()
    with jax.set_mesh(run.mesh), jax.numpy_dtype_promotion("standard"):
        run.trace()


def answer(words, data_dir):
    """The exit status of `train.py` with these words, 0 if training would begin, and its stderr."""
    for name in list(flags.FLAGS):
        if name.startswith("config."):  # of the command line before
            delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    said, status = io.StringIO(), 0
    # The tests' own type checks would refuse ill-typed values first.
    jaxtyping.config.update("jaxtyping_disable", True)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", ["train.py", *words])  # where config flags look for overrides
        try:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                cli.explained(cli.parse, sys.argv)  # the warnings are ml_collections' own
            cli.explained(begin, data_dir)
        except SystemExit as end:
            status = end.code
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)
    return status, said.getvalue()
