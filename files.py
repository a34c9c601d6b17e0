"""
Files that survive: written beside and renamed, read without running anything in them.

    replacing, write            a file takes its place when all of it is on the disk: whatever happens before, a
                                crash, a full disk, a second Ctrl-C, what stood there stands there still
    append                      one more line of a log, in place
    new_folder                  a folder that takes its place in the same way
    one_process                 what is written by one process at a time
    read_json, load_checkpoint, fill    what is damaged, foreign or does not fit is refused by name
    read_lines                  a log, whose last line may have been cut off
    Companions                  files that stand beside a checkpoint and belong to it
    stop                        raises Stopped, with one clear message
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Stopped(Exception):
    """
    A stage cannot start or continue; the message says what was found, what was wanted, what to do.

    A script prints the message and exits with 1. Whoever calls main(cfg) from Python can catch it.
    """


def stop(message):
    """Raise Stopped with one clear message: what was found, what was wanted, what to do."""
    raise Stopped(visible(f"error: {message}"))


def visible(text):
    """A text to be shown: control characters, which a terminal would obey, and lone surrogates as their codes"""
    text = CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
    return text.encode("utf-8", "backslashreplace").decode()


def first_line(error):
    """What an exception says, or where it says nothing its name"""
    return (str(error).splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------------------------------
# Writing

@contextlib.contextmanager
def writing(path):
    """Ends the program with one message where the path cannot be written: no space, no permission."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError):              # torch.save cannot end its file after what went wrong before
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__
            if not isinstance(error.__context__, OSError):
                raise
            error = error.__context__
        why = getattr(error, "strerror", None) or first_line(error)
        stop(f"{path} could not be written ({why}); what stood there before is as it was. Make room, or get the right to "
             "write there, and run the command again, with --resume if an update had been saved")


@contextlib.contextmanager
def replacing(path, mode="w"):
    """A file to write to: beside the path, flushed to the disk, and at the end renamed to it."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                sync(file)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def write(path, text):
    with replacing(path) as file:
        file.write(text)


def to_json(value, indent=None):
    """JSON text. JSON has no NaN or Infinity: a number that is not finite becomes null."""
    def finite(x):
        if isinstance(x, dict):
            return {key: finite(item) for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(finite(value), indent=indent)


def write_lines(path, objects):
    """One JSON object a line, as read_lines reads them"""
    write(path, "".join(to_json(x) + "\n" for x in objects))


def append(path, text):
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def new_folder(path, unless_there=False):
    """A folder to fill, beside the path, flushed and renamed to it; with unless_there dropped if another was faster."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            for file in beside.rglob("*"):
                if file.is_file():
                    flush(file)
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
            try:
                os.replace(beside, path)
            except OSError:
                if not (unless_there and path.exists()):
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)


# What a file system answers where it lacks a call: network mounts, VirtualBox, WSL
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def sync(file):
    """Write an open file's buffers to the disk, where the file system can do that on demand."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def flush(path):
    """Write to the disk what is still in a file's buffers"""
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
    marker = filelock.SoftFileLock(f"{path}.marker", is_singleton=True)
    with writing(path):
        try:
            # One second: a process that is just starting takes the lock for a moment to look.
            try:
                lock.acquire(timeout=1)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                lock = marker
                lock.acquire(timeout=1)
        except filelock.Timeout:
            stop(holder())
    return lock


# --------------------------------------------------------------------------------------------------
# Reading

def read_json(path):
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        stop(f"{path} cannot be read ({type(error).__name__}: {first_line(error)[:100]}); {again(path.parent)}")


def read_lines(path):
    """The objects of a file with one a line, up to the first line that was not written whole; [] if it is not there"""
    found = []
    if Path(path).exists():
        for line in Path(path).read_bytes().splitlines():
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError, RecursionError):
                break
    return found


def load_checkpoint(folder, *wanted):
    """
    A stage's checkpoint, with at least the keys that are wanted, on the CPU

    weights_only: reading it can run no code. The checksums in the file are looked at first, which torch does not.
    """
    path = Path(folder) / "checkpoint.pt"
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        stop(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {first_line(error)[:100]}); {again(folder)}")
    must_hold(saved, folder, "step", "config", *wanted)
    if type(saved["step"]) is not int or not isinstance(saved["config"], dict):
        stop(f"{path} is no checkpoint of this project: its step is {saved['step']!r:.50}; {again(folder)}")
    return saved


def must_hold(saved, folder, *wanted):
    """Stops where what was read from a folder's checkpoint is not a dict with these keys."""
    for key in wanted:
        if not isinstance(saved, dict) or key not in saved:
            there = ", ".join(map(str, saved)) if isinstance(saved, dict) else f"a {type(saved).__name__}"
            stop(f"{folder}/checkpoint.pt holds no {key} but {there[:200]}: it belongs to another stage or program; "
                 + again(folder))


def again(folder):
    """What to do about a damaged stage"""
    folder = Path(folder)
    return (f"bring it back from a copy, run {folder.name}.py with --overwrite for the run {folder.parent.name}, or give "
            "another --out")


def fill(thing, state, folder, key):
    """thing.load_state_dict(state), of a folder's checkpoint; what does not fit is refused by name, with what differs"""
    try:
        thing.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        differs = (str(error).splitlines() or [type(error).__name__])[:2][-1].strip()
        stop(f"{folder}/checkpoint.pt: {key} does not fit the {type(thing).__name__} it is read for: {differs[:200]}; "
             + again(folder))


def digest(path):
    """SHA-256 of a file, which is read in blocks"""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Companions:
    """
    Files that stand beside a checkpoint and belong to it, as the pairs that a run has sampled: it holds their digests

    add(path) after one was written; check(path) before it is read again, by a run that goes on
    """

    def __init__(self):
        self.digests = {}

    def add(self, path):
        self.digests[path.name] = digest(path)

    def check(self, path):
        if not path.exists() or self.digests.get(path.name) != digest(path):
            stop(f"{path} is not the file that {path.with_name('checkpoint.pt')} goes with; {again(path.parent)}")

    def state_dict(self):
        return dict(self.digests)

    def load_state_dict(self, state):
        self.digests = dict(state)


def fingerprint(module):
    """A digest of a module's weights, by which later stages know what they were made from."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
