"""What every command line shares: flags, and errors that end in one line."""

import functools
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from transformer import plugins
from transformer.config import RunConfig, flat_knobs, load_config
from transformer.console import console, outlive_readers
from transformer.errors import UserError, nearest
from transformer.files import home
from transformer.inference.config import DecodingConfig
from transformer.parallel import hosts
from transformer.parallel.devices import cpu_cores, find_devices
from transformer.training.interruption import RESUME, Interrupted, end_with_parent

GRACE = 5  # seconds for the other processes to stop too, after an error
# What to do when memory is full.
SMALLER = (
    "lower batch_size or model.d_model, take the batch in parts by accumulate, or compute anew in "
    "the gradient by model.remat (docs/performance.md)"
)
# What JAX's own variables may ask for, and no program here could do: another value of these.
NEEDED: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_disable_jit": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_transfer_guard": None,
}
SMALL = 256  # the width up to which a CPU's cores work better side by side than together

flags.disclaim_key_flags()  # those that are defined here are the program's own in its --help


def run(main: Callable[[], None], *, outlives_readers: bool = True) -> None:
    """Parses the flags and calls `main`.

    What a person can cause ends with one line on standard error and exit status 2:
    a `UserError`, a flag that does not parse, and what the disk or the system refuses. A run
    that was asked to stop ends with status 75: the same command goes on with it.

    Args:
      main: the program.
      outlives_readers: whether it goes on when nobody reads its output any more (`| head`).
    """
    if outlives_readers:
        outlive_readers()
    elif sys.stdout is None:  # closed from the start
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    end_with_parent()
    one_line_for_a_failed_save()
    app.run(lambda _: explained(together, main), flags_parser=lambda argv: explained(parse, argv))


def one_line_for_a_failed_save() -> None:
    """Holds back what Orbax and TensorStore print of a save that failed, beside the `UserError`.

    Their threads go on reporting to an event loop that has ended, and what was still to be
    written is never begun.
    """
    show = sys.unraisablehook

    def hook(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            show(raised)

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", "coroutine 'async_serialize.* was never awaited")


def explained(function: Callable, *args) -> Any:
    """Calls `function`; an error that a person can cause becomes one line and status 2."""
    try:
        return function(*args)
    except UserError as error:
        message = str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}; mend that, or choose another place"
    except MemoryError as error:
        message = f"this machine's memory is full ({error}); {SMALLER}"
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        if "RESOURCE_EXHAUSTED" in reason:
            message = f"a device's memory is full ({reason}); {SMALLER}"
        elif hosts.several():
            message = f"stopped together with another process, which may say why: {reason}"
        else:
            raise
    except Interrupted as stop:
        print(stop, file=sys.stderr, flush=True)
        if hosts.several():
            jax.distributed.shutdown()
        sys.exit(RESUME)
    except KeyboardInterrupt:
        print(
            "interrupted; training goes on from its last checkpoint, if any",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)
    print(f"error: {message}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        # Those who stop for the same reason part in order. Others would keep this one waiting;
        # they are ended by JAX, which misses it.
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(GRACE)
        os._exit(2)
    sys.exit(2)


def together(main: Callable[[], None]) -> None:
    """Calls `main`; of several processes none ends before all have come to its end."""
    main()
    if hosts.several():
        multihost_utils.sync_global_devices("end")
        jax.distributed.shutdown()


def set_up_jax(config: RunConfig | None = None) -> None:
    """Keeps compiled programs for the next start, and makes each core of a CPU a device.

    As many as divide the replicas or, in a single run, a batch. Side by side, with a part
    of the batch each, they use the cores better than one program over all of them does, for most
    operations of a small model are too small to be shared out one by one. A single run of a
    model wider than `SMALL` has one device: its products keep all cores busy, and several
    would each update all of its parameters.

    Args:
      config: the run's; None: all cores are one device.
    """
    chosen = "JAX_NUM_CPU_DEVICES" in os.environ or (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    )
    for name, wanted in NEEDED.items():
        if getattr(jax.config, name) != wanted:
            asked = f"{name.upper()}={getattr(jax.config, name)}"
            print(f"{asked} is not used: it is {wanted} here", file=sys.stderr)
            jax.config.update(name, wanted)
    if config is not None and not chosen:
        if config.replicas > 1:
            parts = config.replicas
        else:
            parts = (
                config.batch_size // config.accumulation_steps
                if config.model.d_model <= SMALL
                else 1
            )
        number = max(n for n in range(1, cpu_cores() + 1) if parts % n == 0)
        jax.config.update("jax_num_cpu_devices", number)
    cache = Path(os.environ.get("XDG_CACHE_HOME", home() / ".cache"), "transformer-jax", "xla")
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(cache))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    warnings.showwarning = functools.partial(mend_cache, Path(cache), warnings.showwarning)


def mend_cache(
    directory: Path, show: Callable, message: Warning | str, *more: Any, **where: Any
) -> None:
    """Takes a compiled program that cannot be read away, and says so in a line.

    A process that is killed while it writes one, and a full disk, leave half of it, which JAX
    (0.12) finds damaged at each start and never replaces. The warning does not say which of a
    function's it is: all of them go, and are compiled anew when they are needed.

    Args:
      directory: where they are.
      show: shows other warnings.
      message: of a warning, as `warnings.showwarning` takes it, and what follows it there.
    """
    said = re.match(r"Error (reading|writing) persistent .* for '(\w+)': (.*)", str(message), re.S)
    if not said:
        show(message, *more, **where)
        return
    did, name, reason = said.groups()
    if did == "reading":
        for file in directory.glob(f"{name}-*"):
            file.unlink(missing_ok=True)
        what = f"compiled {name} is damaged and was deleted; it is compiled anew"
    else:
        what = f"compiled {name} could not be kept for the next start"
    print(f"{directory}: {what} ({' '.join(reason.split())[:100]})", file=sys.stderr, flush=True)


def define_plugins_flag() -> None:
    """Defines the flag of a program that loads runs: what `parse` imports."""
    flags.DEFINE_list("plugins", [], "The modules that the run names as its plugins.")


def define_host_flags() -> None:
    """Defines the flags by which a program is told of its other processes; see `hosts.join`."""
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, of several; or auto: JAX finds them."
    )
    flags.DEFINE_integer("processes", None, "How many processes there are.", lower_bound=1)
    flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0)


def define_decoding_flags() -> None:
    """Defines the flags that say how outputs are looked for; see `decoding`."""
    flags.DEFINE_integer("beam_size", 1, "Hypotheses; 1: greedy decoding.")
    flags.DEFINE_float(
        "length_penalty", 0.6, "Of beam search; 0: none, more favours longer outputs."
    )
    flags.DEFINE_float("temperature", 0.0, "Draws outputs, the more freely the higher; 0: no.")
    flags.DEFINE_integer("top_k", 0, "Draws among so many of the likeliest tokens; 0: all.")
    flags.DEFINE_float("top_p", 1.0, "Draws among the likeliest with this share of it; 1: all.")
    flags.DEFINE_integer("seed", 0, "Of what is drawn.")
    flags.DEFINE_integer(
        "decode_margin",
        None,
        "Tokens that an output may have more than its source; default the run's.",
    )


def decoding() -> DecodingConfig:
    """What the flags of `define_decoding_flags` say."""
    given = flags.FLAGS
    settings: dict[str, Any] = {
        each.name: given[each.name].value for each in fields(DecodingConfig)
    }
    return DecodingConfig(**settings)


def host_command(text: str) -> list[str]:
    """The words of a `--command` that is to run on several hosts.

    Raises:
      UserError: it is no program that joins other hosts.
    """
    words = shlex.split(text)
    if not words or words[0] not in ("train.py", "eval.py"):
        raise UserError(
            f"--command={text!r}: it begins with train.py or eval.py, and their flags follow"
        )
    return words


def join_hosts(*, interruptible: bool = False) -> None:
    """Joins the other processes, if there are any; only the first of them prints.

    `interruptible` is said by a program that looks for requests to stop (`interruption`).
    """
    given = flags.FLAGS
    hosts.join(given.coordinator, given.processes, given.process, interruptible=interruptible)
    if jax.distributed.is_initialized():
        find_devices()
        # Now, while all have just come: over Gloo (CPUs) a first meeting fails after 30 s.
        multihost_utils.sync_global_devices("start")
        console.quiet = not hosts.first()


def parse(argv: Sequence[str]) -> list[str]:
    """Parses `argv` into absl's flags.

    Raises:
      UserError: a flag or an override is unknown or ill-typed, or the config file fails.
    """
    # As the shell does where `~` begins a word.
    argv = [re.sub(r"(?<==)~[^,]*", lambda path: os.path.expanduser(path[0]), w) for w in argv]
    config = read_config_file(argv)
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:  # --help, with which absl ends in status 1
        sys.exit(0)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(explain_flag(argv, config, error)) from error
    homeless = "TFDS_DATA_DIR" not in os.environ and os.path.expanduser("~") == "~"
    if homeless and "data_dir" in flags.FLAGS and flags.FLAGS["data_dir"].value is None:
        flags.FLAGS["data_dir"].value = str(home() / "tensorflow_datasets")
    if "plugins" in flags.FLAGS:
        plugins.load(flags.FLAGS["plugins"].value or ())
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # libraries log, with tracebacks, what they raise
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; flags are written --name=value")
    return rest


def read_config_file(argv: Sequence[str]) -> ConfigDict | None:
    """The config of the file that `--config=` names, without overrides; None if none is named."""
    words = [re.sub(r"^--?config$", "--config=", word) for word in argv]
    joined = "\n".join(words).replace("--config=\n", "--config=").split("\n")
    paths = [match[1] for word in joined if (match := re.match(r"--?config=(.+)", word))]
    if not paths:
        return None
    try:
        return load_config(paths[-1])
    except UserError as error:
        raise UserError(f"--config={error}") from error


def explain_flag(argv: Sequence[str], config: ConfigDict | None, error: Exception) -> str:
    """One line on why the flags did not parse."""
    if config is None and "config" in flags.FLAGS and "--config must" in str(error):
        return "--config is missing; name a config file, such as --config=configs/toy_reverse.py"
    if missing := re.search(r"--(\w+) must have a value other than None", str(error)):
        name = missing[1]
        return f"--{name} is missing; set --{name}=…: {flags.FLAGS[name].help}"
    if config is None:
        return " ".join(str(error).split())
    knobs = flat_knobs(config)
    pattern = r"--?config\.([\w.]+)(?:=(.*))?$"
    overrides = [match.groups() for each in argv if (match := re.match(pattern, each))]
    for name, _ in overrides:
        if name in config and isinstance(config[name], ConfigDict):
            return f"--config.{name} is a section; set one of its knobs: --config.{name}.NAME=value"
        if name not in knobs:
            return f"--config.{name}: there is no such knob{nearest(name, knobs)}"
    for name, value in overrides:
        if f"--config.{name}=" in str(error) or value is None:
            kinds = {
                bool: "true or false",
                int: "a whole number",
                float: "a number",
                tuple: "a tuple such as (1,2)",
            }
            kind = kinds.get(knob_type(config, name), "a word")
            given = f"--config.{name}" + ("" if value is None else f"={value}")
            return f"{given}: it takes {kind}; without this flag it is {knobs[name]}"
    return " ".join(str(error).split())


def knob_type(config: ConfigDict, name: str) -> type:
    """The type of the knob called `name`, a placeholder's too."""
    *sections, knob = name.split(".")
    return functools.reduce(getattr, sections, config).get_type(knob)
