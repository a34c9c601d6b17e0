"""
A user's Python file, imported and called as if it were a program of its own.

    guest = Guest("judge.py")
    with guest.running():
        judge = guest.load().judge
    call(judge, "judge", guest, prompts, responses) -> a number for each response

While it runs, its folder comes first in sys.path, its imports never meet our modules of the same
names, and its program-wide settings (SETTINGS) hold. Afterwards everything is as if it had never
run, except for the random generators: checkpoints hold their states. Worker processes import it by
its module's name; those that start between two calls find our modules first.

During the updates of a run, Ctrl-C ends a call at once and the update is dropped. The call's child
processes get Ctrl-C too, so its result must not be trained on.
"""

import contextlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
import types
from collections.abc import Iterator, Mapping, Set
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import torch

from lab.config import Presets
from lab.files import first_line, stop
from lab.run import Run

HERE = Path(__file__).resolve().parent.parent
OURS = [path.stem for path in HERE.glob("*.py")] + ["lab"]


# --------------------------------------------------------------------------------------------------
# Running a file

def set_path(entries):
    sys.path = entries


def set_device(device):
    torch.set_default_device(None if device.type == "cpu" else device)


SETTINGS = {                                             # {function that sets it: that reads it}
    set_path: lambda: sys.path,
    set_device: torch.get_default_device,
    os.chdir: os.getcwd,
    torch.set_grad_enabled: torch.is_grad_enabled,
    torch.set_default_dtype: torch.get_default_dtype,
    torch.set_num_threads: torch.get_num_threads,
    torch.set_float32_matmul_precision: torch.get_float32_matmul_precision,
    torch.set_deterministic_debug_mode: torch.get_deterministic_debug_mode,
}


def read_settings():
    """All but the path of a deleted folder and a precision that was set through torch.backends"""
    found = {}
    for put, get in SETTINGS.items():
        with contextlib.suppress(FileNotFoundError, RuntimeError):
            found[put] = get()
    return found


class Guest:
    def __init__(self, path):
        self.path = Path(path).resolve()
        self.folder = self.path.parent
        self.name = self.path.stem
        if self.name in sys.modules or "." in self.name:
            self.name = "__mp_main__"                    # workers call the main program so
        sys.path.append(str(self.folder))                # for workers that start between two calls
        self.settings = {set_path: [str(self.folder), *sys.path]}
        self.modules = {}                                # the modules from its folder
        self.hidden = set()                              # our modules that have a namesake there
        if self.folder != HERE:
            self.hide_ours()

    def hide_ours(self):
        """If its folder has a module named like one of ours, that is the one it imports."""
        for name in OURS:
            spec = PathFinder.find_spec(name, [str(self.folder)])
            if spec and spec.origin:
                self.hidden.add(name)
        if "lab" not in self.hidden and any((self.folder / "lab").glob("*.py")):
            # A package without __init__.py. Python prefers ours, wherever it comes in sys.path
            self.hidden.add("lab")
            path = self.settings[set_path]
            self.settings[set_path] = [entry for entry in path if Path(entry).resolve() != HERE]

    def load(self):
        spec = importlib.util.spec_from_file_location(self.name, self.path)
        module = sys.modules[self.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @contextlib.contextmanager
    def running(self):
        Run.drop_interrupted_update()
        settings = read_settings()
        modules = dict(sys.modules)
        for name in modules:
            if name.partition(".")[0] in self.hidden:    # lab, and lab.files etc. with it
                del sys.modules[name]
        sys.modules.update(self.modules)
        main = sys.modules["__main__"] = types.ModuleType("__main__")    # workers start with this
        if self.name == "__mp_main__":
            main.__file__ = str(self.path)
        for put, value in self.settings.items():
            put(value)
        Run.in_users_code = True
        try:
            yield
        finally:
            Run.in_users_code = False                    # first: Ctrl-C must not cut this short
            theirs = read_settings()
            self.settings = {put: x for put, x in theirs.items() if x != settings.get(put)}
            for put, value in settings.items():
                if theirs.get(put) != value:
                    put(value)
            for name, module in list(sys.modules.items()):
                if module is not modules.get(name) and self.owns(module):
                    self.modules[name] = sys.modules.pop(name)
            sys.modules.update(modules)
            Run.drop_interrupted_update()

    def owns(self, module):
        """Whether a module is one of the user's: from its folder, not installed and not ours"""
        path = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "")
        path = Path(path)
        if not path.is_relative_to(self.folder) or path.is_relative_to(HERE / "lab"):
            return False
        if path.is_relative_to(sysconfig.get_path("stdlib")):
            return False
        if {"site-packages", "dist-packages"} & set(path.relative_to(self.folder).parts):
            return False
        if path.parent == HERE:                          # beside our scripts, which are not its own
            return self.folder == HERE and not isinstance(getattr(module, "Config", None), Presets)
        return True

    def imported(self):
        """The files from its folder that it has imported, without the file itself"""
        found = {Path(getattr(x, "__file__", None) or self.path) for x in self.modules.values()}
        return sorted(found - {self.path})


# --------------------------------------------------------------------------------------------------
# Calling a function

def call(function, name, guest, prompts, responses):
    """The numbers that a function gives to responses -> list of floats; exits with the reason"""
    args, kwargs = arguments(function, name, prompts, responses)
    n = len(responses)                                   # the function may change the list
    with guest.running():
        try:
            given = function(*args, **kwargs)
            if isinstance(given, Iterator):
                given = list(given)                      # a generator runs here
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            stop(f"the reward function {name} ended in the {type(error).__name__} above; what was "
                 "saved before is intact")
    scores = numbers(given, name)
    if len(scores) != n:
        stop(f"the reward function {name} was given {n} prompts and responses and returned "
             f"{len(scores)} numbers; it should return one for each")
    return scores


def arguments(function, name, prompts, responses):
    """
    What to call a function with -> args, kwargs. Exit if it asks for more than there is.

    Parameters named prompts, completions or responses get these. If there are none, the first two
    get prompts and responses. **kwargs gets whatever has no parameter.
    """
    texts = {"prompts": prompts, "completions": responses, "responses": responses}
    try:
        own = told = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):                      # some builtins have none
        return [prompts, responses], {}
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if all(p.kind in stars for p in own.parameters.values()):
        told = inspect.signature(function)               # of the function that a decorator wraps
    fixed = [p for p in told.parameters.values() if p.kind not in stars]
    by_name = {p.name: texts[p.name] for p in fixed if p.name in texts}
    in_order = list(by_name.values()) or [prompts, responses]
    ways = [([], by_name), (in_order, {})]
    if not by_name:
        ways.reverse()
    elif list(by_name) != [p.name for p in fixed[:len(by_name)]]:
        ways.pop()                                       # a different parameter comes before them
    if any(p.kind is p.VAR_KEYWORD for p in told.parameters.values()):
        by_name.setdefault("prompts", prompts)
        if "responses" not in by_name:
            by_name.setdefault("completions", responses)
    for args, kwargs in ways:
        with contextlib.suppress(TypeError):
            told.bind(*args, **kwargs)
            own.bind(*args, **kwargs)
            if args or kwargs:
                return args, kwargs
    wanted = [p.name for p in fixed if p.default is p.empty and p.name not in texts]
    stop(f"the reward function {name}({', '.join(told.parameters)}) asks for "
         f"{', '.join(wanted) or 'nothing'}; a reward is given prompts and completions (or "
         "responses): use these names, and give every other parameter a default")


def numbers(given, name):
    """What a function returned -> list of floats. Text is refused, though float() would take it."""
    why = "a list, tuple, array, tensor or generator is wanted"
    at = None
    try:
        if isinstance(given, (str, bytes, bytearray, Mapping, Set)):
            raise TypeError
        items = given
        if isinstance(given, (np.ndarray, torch.Tensor)):
            if given.squeeze().ndim > 1:
                why = f"its shape is {tuple(given.shape)}"
                raise TypeError
            items = given.flatten().tolist()
        scores = []
        for at, item in enumerate(items):
            number = item.item() if hasattr(item, "item") else item      # numpy's and torch's
            scores.append(number.__float__())
        return scores
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError):
        if at is not None:
            why = f"item [{at}] is {first_line(repr(item))[:50]}, of type {type(item).__name__}"
        if inspect.iscoroutine(given):
            given.close()                                # or Python warns about it as well
            why = "call it by asyncio.run in a function that is not async"
        stop(f"the reward function {name} returned a {type(given).__name__} that is not a list of "
             f"numbers ({why}); it should return one number for each response")
