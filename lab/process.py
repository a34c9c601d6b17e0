"""
The process around a run: random states, output, device, versions.

    random_states, set_random_states    of torch, Python, numpy and the GPU
    safe_output                         nothing that is printed can end a run
    process_state                       remember everything that a main changes, to put it back
    pick_device, environment            where and with which versions a run computes
"""

import contextlib
import importlib.metadata
import os
import platform
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import torch

from lab.files import first_line, stop

CPU = torch.device("cpu")
PACKAGES = ("torch", "transformers", "tokenizers", "tiktoken", "numpy")
# Ctrl-C, a plain kill, a closed terminal
SIGNALS = [kind for kind in signal.Signals if kind.name in ("SIGINT", "SIGTERM", "SIGHUP")]


class Opened(threading.local):
    """The mains that this thread is in, and the runs that they write to"""

    def __init__(self):
        self.mains = []
        self.runs = []

    def looping(self):
        """The run whose updates are under way, or None"""
        return next((run for run in self.runs if run.looping), None)


OPENED = Opened()


# --------------------------------------------------------------------------------------------------
# Random states

def seed_all(seed):
    """Seed torch and, for a user's reward function, Python and numpy as well."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def random_states(device=CPU):
    """The states of torch's, Python's and numpy's generators, and of a GPU's if one is given"""
    name, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": random.getstate(),
              "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest]}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states, device=CPU):
    torch.set_rng_state(states["torch"])
    if "python" in states:                               # earlier versions saved torch's only
        random.setstate(states["python"])
        name, keys, *rest = states["numpy"]
        np.random.set_state((name, keys.numpy(), *rest))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def process_state():
    """Remember everything in this process that a main changes -> a function that puts it back"""
    states = random_states()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    handlers = {kind: signal.getsignal(kind) for kind in SIGNALS}

    def put_back():
        set_random_states(states)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        if in_main_thread():
            for kind, handler in handlers.items():
                if signal.getsignal(kind) != handler:
                    signal.signal(kind, handler)
    return put_back


def in_main_thread():
    """Whether this is the thread that signals arrive in"""
    return threading.current_thread() is threading.main_thread()


# --------------------------------------------------------------------------------------------------
# Output

class Output:
    """
    Standard output that cannot end a run.

    Characters that its encoding lacks are escaped. If nothing can be written any more, because the
    disk is full or the terminal closed, the text is dropped: the log has the numbers. If the reader
    of a pipe is gone, a training loop finishes its update, saves and leaves, as after a plain kill.
    """

    def __init__(self, stream):
        self.stream = stream                             # None if standard output is closed

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self):
        return bool(self.stream) and not self.stream.closed and self.stream.isatty()

    def write(self, text):
        try:
            if self.stream is not None:
                self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self.give_up(error)
        return len(text)

    def flush(self):
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError) as error:
            self.give_up(error)

    def give_up(self, error):
        # Python would try to write what is still in the buffer when it exits: send it nowhere
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        self.stream = None
        if isinstance(error, BrokenPipeError):
            run = OPENED.looping()
            if run is None:
                raise error
            run.interrupted = True


@contextlib.contextmanager
def safe_output():
    """Inside this block sys.stdout cannot end the run."""
    stream = sys.stdout
    if not isinstance(stream, Output):
        sys.stdout = Output(stream)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = stream


# --------------------------------------------------------------------------------------------------
# Device and environment

def pick_device(cfg):
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")          # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        torch.zeros(1, device=name)
        if name.split(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError("these scripts know cpu, cuda and mps")
    except (RuntimeError, AssertionError) as error:
        stop(f"cannot use --device {name} here ({first_line(error)}); --device cpu always works")
    return torch.device(name)


def environment(device):
    """What the bits of a result depend on besides its settings, as a dict of plain values"""
    root = Path(__file__).resolve().parent.parent
    commit = ask_git(root, "rev-parse", "--short=12", "HEAD")
    if commit and ask_git(root, "status", "--porcelain", "--", "*.py"):      # new scripts too
        commit += " with changes"
    found = {"host": platform.node(), "device": str(device), "threads": torch.get_num_threads(),
             "commit": commit or "unknown", "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # copied into place, not installed
            found[name] = "unknown"
    return found


def ask_git(folder, *command):
    """What git says about a folder, or nothing"""
    # Not about a project that it was copied into. A clone may belong to a different user
    ceiling = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    try:
        return subprocess.run(["git", "-c", "safe.directory=*", *command], cwd=folder, env=ceiling,
                              text=True, capture_output=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):         # git is not installed
        return ""
