"""
Settings: a script's Config from its presets and the command line, each value of its type and in its range.

    Common, COMMON              the fields that every stage has, and their presets
    Presets                     Config(config="tiny", steps=3): a preset's values, then those given
    parse                       --config NAME [--field value ...] -> Config
    check_fields, ...           what stops a run before any work
    command, next_command       the way back: the command line of a Config
    run_name, folder_of         where a run is stored
"""

import difflib
import inspect
import os
import re
import shlex
import typing
from dataclasses import asdict, dataclass
from pathlib import Path

from files import stop


class Presets(type):
    """
    Makes Config(config="tiny", steps=3) take the values of the preset tiny, then those given.

    A dataclass alone would fill in the defaults, which are those of the preset small.
    """

    def __call__(cls, **given):
        name = given.get("config", cls.config)
        if cls.presets and isinstance(name, str) and name not in cls.presets:
            known = ", ".join(cls.presets)
            stop(f"unknown --config {name}{nearest(name, cls.presets)}; there are: {known}")
        # A name that is not a text is left to check_fields
        return super().__call__(**{**COMMON.get(name, {}), **cls.presets.get(name, {}), **given})


@dataclass
class Common(metaclass=Presets):
    config: str = "small"       # preset to start from
    out: str = ""               # run name, for out/RUN/STAGE, or a path; default: the preset's name
    base: str = ""              # run whose finished SFT and reward model stages to reuse
    data: str = "reviews"       # the built-in task; or a .jsonl file, a folder of them, hh, tldr, hf:OWNER/NAME
    max_prompt_tokens: int = 128        # of --data: longer prompts keep their end
    text_prompt: int = 0        # of --data with texts alone: so many first tokens are the prompt
    max_new_tokens: int = 48    # longest response sampled
    seed: int = 1337            # of everything random
    device: str = "auto"        # auto (cuda where there is one, else cpu), cpu, cuda, cuda:1, mps
    deterministic: bool = False         # on a GPU: kernels that give the same bits each time, where torch has them
    dtype: typing.Literal["float32", "bfloat16"] = "float32"    # of matrix products; weights stay in float32
    lora_rank: int = 0          # LoRA: train a change of this rank beside frozen weights; 0: all weights
    accumulation: int = 1       # parts in which a gradient step is computed: less memory, the same gradient
    checkpointing: bool = False         # of gradients: compute blocks again in the backward pass, for less memory
    export: str = ""            # new folder to write the finished stage to, for transformers
    save_every: int = 100       # updates between checkpoints; Ctrl-C saves at any time
    resume: bool = False        # go on with an unfinished run; wins over --overwrite
    overwrite: bool = False     # start again where a run stands already

    may_be_zero = ()            # options that elsewhere are above 0
    presets = {}                # {name of --config: values of fields}; each script sets its own

    def how(self):
        """How the models of this run compute, whatever those that they were loaded from did"""
        return {"dtype": self.dtype, "checkpointing": self.checkpointing}


COMMON = {                      # a preset's values for the fields above; its others stand in each script
    "tiny": dict(max_new_tokens=24),
    "gpt2": dict(data="hh", max_prompt_tokens=256, max_new_tokens=128, dtype="bfloat16"),
    "imdb": dict(data="hf:stanfordnlp/imdb", text_prompt=8, max_prompt_tokens=8, max_new_tokens=24, dtype="bfloat16"),
    "tldr": dict(data="tldr", max_prompt_tokens=448, max_new_tokens=64, dtype="bfloat16"),
}
LATER = ("data", "max_prompt_tokens", "text_prompt", "max_new_tokens", "device", "dtype", "checkpointing")
FREE = ("out", "device", "deterministic", "accumulation", "checkpointing", "export", "save_every", "resume",
        "overwrite")                                             # may differ when a run goes on


# --------------------------------------------------------------------------------------------------
# Command line

def parse(Config, doc, argv):
    """--config NAME picks a preset, any other --field value changes one field -> Config"""
    if "-h" in argv or "--help" in argv:
        print_help(Config, doc)
        raise SystemExit(0)
    types = typing.get_type_hints(Config)
    given = {}
    words = list(argv)
    while words:
        flag, equals, value = words.pop(0).partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else None
        if name not in types:
            stop(f"unknown option {flag}{nearest(flag, ['--' + t for t in types])}; "
                 "--help lists all")
        if not equals:
            missing = not words or re.fullmatch(r"--[\w-]+(=.*)?", words[0], re.DOTALL)
            if missing and types[name] is bool:
                value = "1"                                                  # a bare --resume
            elif missing:
                stop(f"{flag} needs a value; --help says which. One that starts with -- is "
                     f"given as {flag}=VALUE")
            else:
                value = words.pop(0)
        given[name] = read_value(flag, value, types[name])
    cfg = Config(**given)
    check_fields(cfg)
    return cfg


def read_value(flag, text, kind):
    """Text as the field's type: bool, int, float, str, one of a Literal, or None if it may be. check_fields comes later."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return text
    if type(None) in options:
        if text.lower() == "none":
            return None
        kind = options[0]
    if kind is bool:
        if text.lower() not in ("1", "true", "yes", "0", "false", "no"):
            stop(f"{flag} got {text}; it takes 1 or 0")
        return text.lower() in ("1", "true", "yes")
    try:
        return kind(text)
    except ValueError:
        stop(f"{flag} got {text}; it takes {NAMES[kind]}")


def nearest(word, known):
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def print_help(Config, doc):
    print(doc.strip(), "\n\noptions, with their defaults:")
    for cls in [cls for cls in Config.__mro__ if cls is not object]:
        comments = re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M)
        for name, comment in comments:
            options = typing.get_args(typing.get_type_hints(cls)[name])
            kind = "" if not options or type(None) in options else f"[{'|'.join(options)}] "
            print(f"  --{name} {getattr(cls, name)}".ljust(34), kind + comment)
    for name, fields in Config.presets.items():
        changed = ", ".join(f"{k} {v}" for k, v in {**COMMON.get(name, {}), **fields}.items())
        print(f"\n--config {name}: {changed or 'these defaults'}")


def command(cfg, script, names=None):
    """
    The command that runs a script with these settings: all that differ from the preset's, or, for
    a different stage of the same run, only those in names
    """
    usual = type(cfg)(config=cfg.config)
    names = names or [name for name in asdict(cfg) if name not in ("config", "export", "resume", "overwrite")]
    words = [f"python {shlex.quote(f'{script}.py')} --config {cfg.config}"]
    for name in names:
        value = getattr(cfg, name, None)
        if value != getattr(usual, name, None):
            between = "=" if str(value).startswith("--") else " "
            words.append(f"--{name}{between}{shlex.quote(str(value))}")
    return " ".join(words)


def next_command(cfg, stage):
    """The command that runs another stage of the same run."""
    return command(cfg, stage, ("base", "out", "seed", *LATER, "reward", "normalise_reward", "missing_eos_score",
                                "score_clip"))


# --------------------------------------------------------------------------------------------------
# Where a run is stored

def run_name(cfg):
    """The name of a run, by default its preset's, or the path of its folder"""
    return cfg.out.rstrip("/" + os.sep) or cfg.config


def folder_of(name):
    """The folder of a run: out/NAME, or where it has a slash the path that it is"""
    path = Path(name)
    return Path("out") / name if len(path.parts) == 1 else path


# --------------------------------------------------------------------------------------------------
# Types and ranges

# What numbers may be: whole ones are counts, from 1, and others are from 0, unless it says otherwise here
NAMES = {bool: "1 or 0", int: "a whole number", float: "a number", str: "a text"}
FROM_0 = ("seed", "warmup", "text_prompt", "lora_rank", "critic_warmup")
ABOVE_0 = ("temperature", "annotator_temperature", "kl_target", "kl_horizon", "kl_old_target", "kl_penalty_coef",
           "grad_clip", "score_clip", "clip_eps", "clip_eps_high", "max_kl")
UP_TO_1, BELOW_1 = ("gamma", "lam", "lr_floor"), ("ema", "dropout")
NEGATIVE_TOO = ("missing_eos_score", "margin")
TAKEN = ("tokens", "downloads")          # what else stands in out/


def check_fields(cfg):
    """Stops on the first field whose value is not of its type, or out of its range."""
    for name, kind in typing.get_type_hints(type(cfg)).items():
        flag, value, options = f"--{name}", getattr(cfg, name), typing.get_args(kind)
        if typing.get_origin(kind) is typing.Literal:
            if value not in options:
                stop(f"{flag} got {value!r}{nearest(str(value), options)}; it takes one of: {', '.join(options) or 'none'}")
            continue
        if type(None) in options and value is None:
            continue
        kind = options[0] if options else kind
        if type(value) is not kind and not (kind is float and type(value) is int):
            stop(f"{flag} got {value!r}; it takes {NAMES[kind]}" + " or none" * bool(options))
        if kind is int:
            least = 0 if name in FROM_0 else 1
            if value < least:
                stop(f"{flag} got {value}; it takes a whole number from {least}")
            if value >= 2 ** 32:
                stop(f"{flag} got {value}; it takes a whole number below 2 ** 32")
        if kind is float:
            if value - value != 0:                                           # nan, inf
                stop(f"{flag} got {value}; it takes a number")
            above = name in ABOVE_0 and name not in cfg.may_be_zero
            if name not in NEGATIVE_TOO and (value < 0 or value == 0 and above):
                stop(f"{flag} got {value}; it takes a number {'above' if above else 'from'} 0")
            if name in UP_TO_1 and value > 1 or name in BELOW_1 and value >= 1:
                stop(f"{flag} got {value}; it takes a number from 0 to 1" + ", but not 1" * (name in BELOW_1))
        if name in ("out", "base"):
            check_run_name(flag, value)


def check_run_name(flag, value):
    """Exit unless a value can be the name of a run in out/ or the path of a folder."""
    path = Path(value)
    taken = path.name in TAKEN and folder_of(value).parent == Path("out")
    special = taken or path.name in ("", "..")
    foreign = "\\" in value and os.sep != "\\"
    if value and (special or foreign or not value.isprintable() or len(path.name) > 100):
        stop(f"{flag} got {value!r}; it takes the name of a run, which becomes a folder in out/, or "
             f"the path of a folder. Not {' or '.join(TAKEN)}, no backslash, at most 100 characters "
             "in the last part, all printable")


def check_minibatch(cfg):
    """Stops where a batch cannot be cut into minibatches of one size."""
    if cfg.batch_size % cfg.minibatch_size:
        fits = max(n for n in range(1, min(cfg.minibatch_size, cfg.batch_size) + 1) if cfg.batch_size % n == 0)
        stop(f"--minibatch_size {cfg.minibatch_size} does not divide --batch_size {cfg.batch_size}: gradient steps would "
             f"be of unequal weight; {fits} does")


def check_enough(n, batch_size, what):
    """Stops where there is less than one batch to train on."""
    if n < batch_size:
        stop(f"there are {n} {what} to train on, less than one batch; lower --batch_size {batch_size} to that or less")
