"""Flags, JAX configuration and one-line error messages, shared by the programs."""

import gc
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import jax
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from ml_collections.config_flags import config_path

from transformer.config import RunConfig, flat_knobs, load_config, load_plugins
from transformer.console import console, tolerate_closed_output
from transformer.errors import UserError, nearest, out_of_memory, reason
from transformer.inference.decoding import DecodingConfig
from transformer.parallel import hosts
from transformer.parallel.mesh import cpu_cores, find_devices
from transformer.training.interruption import RESUME, Interrupted, end_with_parent

GRACE = 5  # seconds that other processes have to stop after an error
OUT_OF_MEMORY = "lower batch_size or model.d_model, raise accumulation_steps, or set model.remat"
# JAX options that are set whatever the environment variables say.
REQUIRED: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_disable_jit": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_transfer_guard": None,
}
FEW_TOKENS = 1_024  # in a device's rows, below which the devices wait more than they save
SMALL_WIDTH = 256  # up to which operations are too small for several cores: one device per core

flags.disclaim_key_flags()  # --help lists the flags that are defined here with the program's own


def run(
    main: Callable[..., None], *, outlives_readers: bool = True, positional: bool = False
) -> None:
    """Parses the flags and calls `main`, which may outlive the readers of its output (`| head`).

    `positional`: other words than flags are the arguments of `main`, not an error.
    """
    if not gc.isenabled():  # a program, which has just imported its modules: they stay
        gc.freeze()
        gc.enable()
    if outlives_readers:
        tolerate_closed_output()
    if os.path.expanduser("~") == "~":  # a user without a home folder, as in some containers
        os.environ["HOME"] = home = f"{tempfile.gettempdir()}/home-{os.getuid()}"
        if "data_dir" in flags.FLAGS and "TFDS_DATA_DIR" not in os.environ:
            # TFDS has chosen its default when it was imported.
            flags.FLAGS.set_default("data_dir", f"{home}/tensorflow_datasets")
    end_with_parent()
    # Orbax's threads report a failed save, which raises a UserError anyway.
    show = sys.unraisablehook
    sys.unraisablehook = lambda raised: "loop is closed" in str(raised.exc_value) or show(raised)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize.* was never awaited")

    programs = Counter()
    jax.monitoring.register_event_listener(lambda event, **_: programs.update([event]))

    def program(words: Sequence[str]) -> None:
        main(*words)
        hits, misses = (programs[f"/jax/compilation_cache/cache_{x}"] for x in ("hits", "misses"))
        logging.debug("programs: %d from the compilation cache, %d compiled", hits, misses)
        if hosts.several():  # no process exits before all have finished
            multihost_utils.sync_global_devices("end")
            jax.distributed.shutdown()

    app.run(
        lambda argv: explained(program, argv[1:]),
        flags_parser=lambda argv: explained(parse, argv, positional),
    )


def explained(function: Callable, *args) -> Any:
    """Calls `function`; errors of the user end in a line and status 2, requests to stop in 75."""
    try:
        return function(*args)
    except UserError as error:
        message = str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}; fix this, or choose another path"
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if out_of_memory(error):
            message = f"out of memory ({reason(error)}); {OUT_OF_MEMORY}"
        elif hosts.several():
            message = f"stopped together with another process, which may say why: {reason(error)}"
        else:
            raise
    except Interrupted as stop:
        print(stop, file=sys.stderr, flush=True)
        if hosts.several():
            jax.distributed.shutdown()
        sys.exit(RESUME)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    print(f"error: {message}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        # Processes with the same error shut down together; JAX ends the others.
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(GRACE)
        os._exit(2)
    sys.exit(2)


def set_up_jax(config: RunConfig | None = None) -> None:
    """Sets the compilation cache and, on a CPU, the number of devices.

    A population, or a model up to `SMALL_WIDTH`, gets one per core, or the largest smaller number
    that divides its replicas or batch; a wider model one device, which uses all cores. The packed
    rows of a device have `FEW_TOKENS` at least.
    """
    for name, value in REQUIRED.items():
        if (asked := getattr(jax.config, name)) != value:
            print(f"{name.upper()}={asked} is not used: it is {value} here", file=sys.stderr)
            jax.config.update(name, value)
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if config is not None and not chosen and "JAX_NUM_CPU_DEVICES" not in os.environ:
        shards, most = config.replicas, cpu_cores()
        if shards == 1 and config.model.d_model <= SMALL_WIDTH:
            shards = config.batch_size // config.accumulation_steps
            if tokens := shards * config.data.pack_length:
                most = min(most, max(tokens // FEW_TOKENS, 1))
        number = max(n for n in range(1, most + 1) if shards % n == 0)
        jax.config.update("jax_num_cpu_devices", number)
    cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{cache}/transformer-jax/xla")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def define_plugins_flag() -> None:
    """Defines the flag of a program that loads runs; `parse` imports the plugins."""
    flags.DEFINE_list("plugins", [], "The modules that the run names as its plugins.")


def define_host_flags() -> None:
    """Defines the flags of a program that may run as several processes; see `hosts.join`."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; auto: JAX detects all.")
    flags.DEFINE_integer("processes", None, "Number of processes.", lower_bound=1)
    flags.DEFINE_integer("process", None, "Index of this process, from 0.", lower_bound=0)


def define_decoding_flags() -> None:
    """Defines a flag for each setting of `DecodingConfig`, by default the run's; see `decoding`."""
    meanings = {
        "beam_size": "Beam size; 1: greedy decoding.",
        "length_penalty": "Of beam search; 0: none, larger values favour longer outputs.",
        "temperature": "Of sampling; 0: no sampling.",
        "top_k": "Samples among the k most likely tokens; 0: all.",
        "top_p": "Samples among the likeliest of total probability p; 1: all.",
        "seed": "Of sampling.",
        "decode_margin": "Tokens by which an output may exceed its source.",
        "length_ratio": "Multiplies the source's length in this limit.",
        "max_length": "Tokens in an output at most, EOS included.",
        "min_length": "Tokens before EOS at least.",
        "prefix": "The text that every output starts with.",
        "distinct": "Leaves out hypotheses whose text a better one has.",
        "no_repeat_ngram_size": "n: no n tokens occur twice in an output; 0: any may.",
        "repetition_penalty": "Above 1: makes tokens that the output has less likely; 1: none.",
        "penalty": "Of beam search, raised to length_penalty: gnmt, (5 + length) / 6; length.",
        "early_stopping": "Of beam search: never, false, true, as in Hugging Face's generate.",
        "renormalize": "Of beam search: probabilities of tokens that are not banned sum to 1.",
        "unfinished": "How hypotheses at the length limit rank: last; equal to finished ones.",
    }
    kinds = {float: flags.DEFINE_float, bool: flags.DEFINE_bool, str: flags.DEFINE_string}
    for each in fields(DecodingConfig):
        define: Any = kinds.get(type(each.default), flags.DEFINE_integer)
        define(each.name, None, f"{meanings[each.name]} Default: config.decoding of the run.")


def decoding(defaults: DecodingConfig) -> DecodingConfig:
    """Returns the settings given by the flags of `define_decoding_flags`, else the run's."""
    given: Any = {each.name: flags.FLAGS[each.name].value for each in fields(DecodingConfig)}
    return replace(defaults, **{name: x for name, x in given.items() if x is not None})


def host_command(text: str) -> list[str]:
    """Returns the words of a `--command` that is to run on several hosts."""
    words = shlex.split(text)
    if words[:1] not in (["train.py"], ["eval.py"]):
        raise UserError(f"--command={text!r}: it begins with train.py or eval.py, then their flags")
    return words


def join_hosts(*, interruptible: bool = False) -> None:
    """Joins the other processes, if there are any; only the first prints. See `hosts.join`."""
    given = flags.FLAGS
    hosts.join(given.coordinator, given.processes, given.process, interruptible=interruptible)
    if jax.distributed.is_initialized():
        find_devices()
        # Just after the start: with Gloo (CPUs) the first collective times out after 30 s.
        multihost_utils.sync_global_devices("start")
        console.quiet = not hosts.first()


def parse(argv: Sequence[str], positional: bool = False) -> list[str]:
    """Parses `argv` into absl's flags; a UserError says which flag or override is wrong."""
    # Expand `~` as the shell does at the start of a word.
    argv = [re.sub(r"(?<==)~[^,]*", lambda path: os.path.expanduser(path[0]), w) for w in argv]
    words = re.sub(r"(?m)^--?config\n", "--config=", "\n".join(argv)).split("\n")
    paths = [match[1] for word in words if (match := re.match(r"--?config=(.+)", word))]
    config = load_config(paths[-1]) if paths else None  # its errors name the fault
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:  # absl exits with status 1 after --help
        sys.exit(0)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(explain_flag(argv, config, " ".join(str(error).split()))) from error
    if "plugins" in flags.FLAGS:
        load_plugins(flags.FLAGS["plugins"].value or ())
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.FATAL)  # libraries log what they then raise
    if len(rest) > 1 and not positional:
        raise UserError(f"{rest[1]!r} is not a flag; flags are written --name=value")
    return rest


def explain_flag(argv: Sequence[str], config: ConfigDict | None, message: str) -> str:
    """Returns one line that says why the flags did not parse, from absl's message."""
    if missing := re.search(r"--(\w+) must have a value other than None", message):
        name = missing[1]
        return f"--{name} is missing; set --{name}=…: {flags.FLAGS[name].help}"
    if config is None:
        return message
    knobs = flat_knobs(config)
    pattern = r"--?config\.([\w.]+)(?:=(.*))?$"
    overrides = [match.groups() for each in argv if (match := re.match(pattern, each))]
    for name, _ in overrides:
        if inside := [knob for knob in knobs if knob.startswith(f"{name}.")]:
            return f"--config.{name} is a section; set one of its knobs, such as {inside[0]}"
        if name not in knobs:
            return f"--config.{name}: unknown option{nearest(name, knobs)}"
    kinds = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        tuple: "a tuple, such as (1,) or ('a','b')",
    }
    for name, value in overrides:
        if f"--config.{name}=" in message or value is None:
            given = f"--config.{name}" + ("" if value is None else f"={value}")
            takes = kinds.get(config_path.get_type(name, config), "a word")
            return f"{given}: it takes {takes}; without this flag it is {knobs[name]}"
    return message


def cluster_parameter(text: str) -> tuple[str, int | str]:
    """`timeout_min=60` → ("timeout_min", 60)"""
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--cluster_parameters: {text!r} is not of the form name=value")
    return name, int(value) if value.isdigit() else value
