"""
Settings: the fields of a script's Config, from a preset and the command line.

    Common                      the fields that every stage has
    Presets                     Config(config="tiny", steps=3): a preset's values, then those given
    parse                       --config NAME [--field value ...] -> Config
    check_fields                exit on a value of the wrong type or out of range
    command, next_command       the command line that gives a Config
    run_name, folder_of         where a run is stored
"""

import argparse
import contextlib
import difflib
import functools
import inspect
import math
import os
import re
import shlex
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lab.files import stop


class Presets(type):
    """Metaclass: Config(config="tiny", steps=3) takes the preset's values, then those given."""

    def __call__(cls, **given):
        name = given.get("config", cls.config)
        if cls.presets and isinstance(name, str) and name not in cls.presets:
            known = ", ".join(cls.presets)
            stop(f"unknown --config {name}{nearest(name, cls.presets)}; it takes one of: {known}")
        values = cls.presets.get(name, {}) if isinstance(name, str) else {}
        return super().__call__(**(values | given))


@dataclass
class Common(metaclass=Presets):
    config: str = "small"       # preset to start from
    out: str = ""               # run name, for out/RUN/STAGE, or a path; default: the preset's name
    base: str = ""              # run whose finished SFT and reward-model stages to reuse
    data: str = "reviews"       # built-in task; or a file or folder, hh, tldr, hf:OWNER/NAME
    max_prompt_tokens: int = 128        # with --data: a longer prompt keeps its end
    text_prompt: int = 0        # with plain texts as --data: use the first N tokens as the prompt
    max_new_tokens: int = 48    # longest response sampled
    seed: int = 1337            # random seed
    device: str = "auto"        # auto (cuda if there is a GPU, else cpu), cpu, cuda, cuda:1, mps
    deterministic: bool = False         # on a GPU: kernels that give the same bits every time
    dtype: typing.Literal["float32", "bfloat16", "float16"] = "float32"     # matrix products
    lora_rank: int = 0          # LoRA: train a change of this rank, weights frozen; 0 trains all
    accumulation: int = 1       # compute a gradient step in this many parts: less memory
    checkpointing: bool = False         # recompute blocks in the backward pass: less memory
    export: str = ""            # new folder for the finished model, in the format of transformers
    save_every: int = 100       # updates between checkpoints; Ctrl-C saves at any time
    resume: bool = False        # continue an unfinished run; wins over --overwrite
    overwrite: bool = False     # replace what an earlier run left in the folder

    presets = {}                # {name of --config: values of fields}; each script sets its own
    ranges = {}                 # {field: range} where a script differs from RANGES below
    # Later stages must be given the same values, so the command for the next stage repeats them
    inherited = ("data", "max_prompt_tokens", "text_prompt", "max_new_tokens", "device", "dtype",
                 "checkpointing")

    def compute_options(self):
        """How this run's models compute, whatever the stages they come from used"""
        return {"dtype": self.dtype, "checkpointing": self.checkpointing}


MAY_CHANGE_ON_RESUME = ("out", "device", "deterministic", "accumulation", "checkpointing",
                        "export", "save_every", "resume", "overwrite")


# --------------------------------------------------------------------------------------------------
# Command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        message = message.removeprefix("argument ")
        message = message.replace(": expected one argument", " needs a value")
        stop(f"{message}; --help lists all options. Write a value that starts with - as "
             "--flag=VALUE")


def parse(Config, doc, argv):
    """--config NAME picks a preset, every other --field value changes one field -> Config"""
    formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34,
                                  width=120)
    parser = Parser(description=doc.strip(), epilog=preset_help(Config), allow_abbrev=False,
                    usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,
                    formatter_class=formatter)
    types = typing.get_type_hints(Config)
    comments = comments_of(Config)
    for field in fields(Config):
        kind = types[field.name]
        text = comments.get(field.name, "")
        if typing.get_origin(kind) is typing.Literal:
            text = f"[{'|'.join(typing.get_args(kind))}] {text}"
        options = {"metavar": str(field.default), "help": text.replace("%", "%%"),
                   "type": functools.partial(read_value, kind)}
        if kind is bool:                                 # a bare --resume
            options |= {"nargs": "?", "const": True}
        parser.add_argument(f"--{field.name}", **options)
    given, unknown = parser.parse_known_args([with_underscores(word) for word in argv])
    if unknown:
        flags = [f"--{name}" for name in types]
        stop(f"unknown option {unknown[0]}{nearest(unknown[0], flags)}; --help lists all")
    cfg = Config(**vars(given))
    check_fields(cfg)
    return cfg


BOOLS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def with_underscores(word):
    """--batch-size=8 -> --batch_size=8; anything else stays as it is"""
    flag, equals, value = word.partition("=")
    if re.fullmatch(r"--\w[\w-]*", flag):
        flag = "--" + flag[2:].replace("-", "_")
    return flag + equals + value


def read_value(kind, text):
    """Text of the command line -> a value of a field's type; check_fields refuses any other"""
    choices = typing.get_args(kind)
    if type(None) in choices:
        if text.lower() == "none":
            return None
        kind = choices[0]
    if kind is bool:
        return BOOLS.get(text.lower(), text)
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def nearest(word, known):
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def comments_of(Config):
    """{field: the comment after it in the source}, which is its help text"""
    comments = {}
    for cls in reversed(Config.__mro__[:-1]):
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):                     # python -m cProfile hides the script
            continue
        comments |= dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", source, re.M))
    return comments


def preset_help(Config):
    lines = []
    for name, values in Config.presets.items():
        changed = ", ".join(f"{field} {value}" for field, value in values.items())
        lines.append(f"--config {name}: {changed or 'these defaults'}")
    return "\n\n".join(lines)


def command(cfg, script, names=None):
    """
    The command that runs a script with these settings

    It holds every setting that differs from the preset; with names, only those.
    """
    preset = type(cfg)(config=cfg.config)
    left_out = ("config", "export", "resume", "overwrite")
    names = names or [name for name in asdict(cfg) if name not in left_out]
    words = [f"python {shlex.quote(f'{script}.py')} --config {cfg.config}"]
    for name in names:
        value = getattr(cfg, name, None)
        if value != getattr(preset, name, None):
            between = "=" if str(value).startswith("-") else " "
            words.append(f"--{name}{between}{shlex.quote(str(value))}")
    return " ".join(words)


def next_command(cfg, stage):
    """The command that runs a later stage of the same run"""
    return command(cfg, stage, ("base", "out", "seed", *cfg.inherited))


# --------------------------------------------------------------------------------------------------
# Where a run is stored

RESERVED_NAMES = ("tokens", "downloads")                 # our own folders in out/


def run_name(cfg):
    """The name of a run, by default its preset's, or the path of its folder"""
    return cfg.out.rstrip("/" + os.sep) or cfg.config


def folder_of(name):
    """The folder of a run: out/NAME, or the path itself if it has a slash"""
    path = Path(name)
    return Path("out") / name if len(path.parts) == 1 else path


# --------------------------------------------------------------------------------------------------
# Types and ranges

NAMES = {bool: "1 or 0", int: "a whole number", float: "a number", str: "a text"}
COUNT = ("a whole number, 1 or more", lambda x: x >= 1)      # ints, unless RANGES says otherwise
COUNT_FROM_0 = ("a whole number, 0 or more", lambda x: x >= 0)
FROM_0 = ("a number, 0 or more", lambda x: x >= 0)           # floats, unless RANGES says otherwise
ABOVE_0 = ("a number above 0", lambda x: x > 0)
SHARE = ("a number from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_1 = ("a number, 0 or more but below 1", lambda x: 0 <= x < 1)
ANY = ("a finite number", lambda x: True)

RANGES = {
    "seed": COUNT_FROM_0, "warmup": COUNT_FROM_0, "critic_warmup": COUNT_FROM_0,
    "text_prompt": COUNT_FROM_0, "lora_rank": COUNT_FROM_0,
    "temperature": ABOVE_0, "annotator_temperature": ABOVE_0, "grad_clip": ABOVE_0,
    "kl_target": ABOVE_0, "kl_horizon": ABOVE_0, "kl_old_target": ABOVE_0,
    "kl_penalty_coef": ABOVE_0, "max_kl": ABOVE_0, "score_clip": ABOVE_0,
    "clip_eps": ABOVE_0, "clip_eps_high": ABOVE_0,
    "gamma": SHARE, "lam": SHARE, "lr_floor": SHARE,
    "ema": BELOW_1, "dropout": BELOW_1,
    "missing_eos_score": ANY, "margin": ANY,
}


def check_fields(cfg):
    """Exit on the first field whose value has the wrong type or is out of its range."""
    for name, kind in typing.get_type_hints(type(cfg)).items():
        value = getattr(cfg, name)
        choices = typing.get_args(kind)
        if typing.get_origin(kind) is typing.Literal:
            if value not in choices:
                stop(f"--{name} got {value!r}{nearest(str(value), choices)}; it takes one of: "
                     f"{', '.join(choices) or 'none'}")
            continue
        wanted = ""
        if type(None) in choices:
            if value is None:
                continue
            kind = choices[0]
            wanted = " or none"
        if type(value) is not kind and not (kind is float and type(value) is int):
            stop(f"--{name} got {value!r}; it takes {NAMES[kind]}{wanted}")
        if kind in (int, float):
            check_range(cfg, name, value, kind)
        if name in ("out", "base"):
            check_run_name(f"--{name}", value)


def check_range(cfg, name, value, kind):
    wanted, fits = (RANGES | cfg.ranges).get(name, COUNT if kind is int else FROM_0)
    if kind is int and value >= 2 ** 32:
        stop(f"--{name} got {value}; it takes a whole number below 2 ** 32")
    if not math.isfinite(value) or not fits(value):
        stop(f"--{name} got {value}; it takes {wanted}")


def check_run_name(flag, value):
    """Exit unless a value can be the name of a run in out/ or the path of a folder."""
    name = Path(value).name
    reserved = name in RESERVED_NAMES and folder_of(value).parent == Path("out")
    foreign = "\\" in value and os.sep != "\\"
    fits = name not in ("", "..") and len(name) <= 100 and value.isprintable()
    if value and (reserved or foreign or not fits):
        stop(f"{flag} got {value!r}; it takes the name of a run, which becomes a folder in out/, "
             f"or the path of a folder. Not {' or '.join(RESERVED_NAMES)}, no backslash, at most "
             "100 characters in the last part, all printable")
