"""
Files that survive a crash, and errors that say what to do.

    stop                        raise Stopped with one clear message
    replacing, write            write to a temporary file, flush it to the disk, rename it
    append, read_lines          a log of one JSON object a line
    new_folder                  fill a folder under a temporary name, then rename it
    one_process                 a lock on whatever only one process at a time may write
    load_checkpoint, load_state a checkpoint, read without running any code in it
    digest, fingerprint         SHA-256 of a file; of a module's weights
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# What a file system answers if it lacks a call: network mounts, VirtualBox, WSL
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class Stopped(Exception):
    """
    A stage cannot start or continue. The message says what was found, what was wanted, what to do.

    A script prints the message and exits with status 1. A caller of main(cfg) can catch it.
    """


def stop(message):
    raise Stopped(visible(f"error: {message}"))


def visible(text):
    """Text that is safe to print: control characters and lone surrogates become their codes."""
    text = CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
    return text.encode("utf-8", "backslashreplace").decode()


def first_line(error):
    """The first line of an exception's message, or its class name if the message is empty"""
    return (str(error).splitlines() or [type(error).__name__])[0]


def first_few(names, n):
    """The first n names, for a message"""
    return ", ".join(names[:n]) + (", .." if len(names) > n else "")


def out_of_memory(error):
    """Whether memory ran out. torch has an exception for it on CUDA only, so the words must do."""
    words = ("out of memory", "can't allocate memory", "cudaErrorMemoryAllocation")
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or isinstance(error, RuntimeError) and any(word in str(error) for word in words))


# --------------------------------------------------------------------------------------------------
# Writing

@contextlib.contextmanager
def writing(path):
    """Inside this block a disk error becomes one clear message."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error.__context__
        if isinstance(error, RuntimeError) and isinstance(cause, (OSError, KeyboardInterrupt)):
            error = cause                                # torch.save wraps what went wrong
        if not isinstance(error, (OSError, SafetensorError)):
            raise error
        why = getattr(error, "strerror", None) or first_line(error)
        stop(f"could not write {path}: {why}. The previous version is intact. Free some space or "
             "fix the permissions, then run the command again (with --resume if a checkpoint "
             "exists)")


@contextlib.contextmanager
def replacing(path, mode="w"):
    """A file to write to. It replaces `path` once all of it is on the disk, or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                sync(file)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write(path, text):
    with replacing(path) as file:
        file.write(text)


def to_json(value, indent=None):
    """JSON text. JSON has no NaN or Infinity, so a number that is not finite becomes null."""
    def finite(x):
        if isinstance(x, dict):
            return {key: finite(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(finite(value), indent=indent)


def write_lines(path, objects):
    """One JSON object a line, for read_lines"""
    write(path, "".join(to_json(x) + "\n" for x in objects))


def append(path, text):
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def new_folder(path):
    """A folder to fill. It appears at `path` once all of it is on the disk, or not at all."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    flush(file)
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sync(file):
    """Flush an open file to the disk, if the file system can do that on demand."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def flush(path):
    with open(path, "rb+") as file:
        sync(file)


def one_process(path, holder):
    """
    Lock a file until the lock is released or the process ends; stop with holder() if it is taken.

    The operating system frees the lock when a process dies. A file system without locks gets a
    marker file instead; filelock removes one whose process has died on the same machine.
    """
    path = Path(path).resolve()
    lock = filelock.FileLock(path, is_singleton=True)
    with writing(path):
        try:
            # One second: a process that is just starting takes the lock for a moment to look
            try:
                lock.acquire(timeout=1)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                lock = filelock.SoftFileLock(f"{path}.marker", is_singleton=True)
                lock.acquire(timeout=1)
        except filelock.Timeout:
            stop(holder())
    return lock


# --------------------------------------------------------------------------------------------------
# Reading

def recovery_hint(folder):
    """What to do about a damaged stage"""
    folder = Path(folder)
    return (f"restore it from a copy, run {folder.name}.py with --overwrite for the run "
            f"{folder.parent.name}, or choose a different --out")


def unreadable(path, error, kind=""):
    stop(f"cannot read {path}{kind} ({type(error).__name__}: {first_line(error)[:100]}); "
         + recovery_hint(path.parent))


def read_json(path):
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        unreadable(path, error)


def read_lines(path):
    """The objects of a log, up to the first incomplete line; [] if there is no file"""
    found = []
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, RecursionError):
        for line in Path(path).read_bytes().splitlines():
            found.append(dict(json.loads(line)))
    return found


def load_checkpoint(folder, *wanted):
    """A stage's checkpoint, on the CPU. It must have the wanted keys. Reading it runs no code."""
    path = Path(folder) / "checkpoint.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        unreadable(path, error, " as a checkpoint")
    must_hold(saved, folder, "step", "config", *wanted)
    if type(saved["step"]) is not int or not isinstance(saved["config"], dict):
        stop(f"{path} is not a checkpoint of this project: its step is {saved['step']!r:.50}, its "
             f"config a {type(saved['config']).__name__}; {recovery_hint(folder)}")
    return saved


def must_hold(saved, folder, *wanted):
    """Exit unless a checkpoint is a dict with these keys."""
    for key in wanted:
        if not isinstance(saved, dict) or key not in saved:
            stop(f"{folder}/checkpoint.pt has no {key}, so a different stage or program wrote it; "
                 + recovery_hint(folder))


def load_state(thing, state, folder, key):
    """thing.load_state_dict(state); exit with the key and the reason if the state does not fit."""
    try:
        thing.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        stop(f"{folder}/checkpoint.pt: the {key} in it does not fit this {type(thing).__name__}: "
             f"{reason[:200]}; {recovery_hint(folder)}")


def digest(path):
    """SHA-256 of a file, read in blocks"""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(module):
    """A digest of a module's weights. Later stages store it to know what they were made from."""
    weights = hashlib.sha256()
    for name, weight in module.state_dict().items():
        weights.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return weights.hexdigest()[:16]
