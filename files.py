"""
Files that survive: written beside and renamed, read without running anything in them.

    replacing, write, append    a file takes its place when all of it is on the disk: whatever happens before, a
                                crash, a full disk, a second Ctrl-C, what stood there stands there still
    new_folder                  the same for a folder
    one_process                 a folder that is written by one process at a time
    read_json, load_checkpoint, fill    what is damaged, foreign or does not fit is refused by name
    read_lines                  a log, whose last line may have been cut off
    stop                        ends the program with one clear message
"""

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import filelock
import torch


def stop(message):
    """End the program with one clear message: what was got, what was wanted, what to do."""
    raise SystemExit(f"error: {message}")


# --------------------------------------------------------------------------------------------------
# Writing

@contextlib.contextmanager
def writing(path):
    """Ends the program with one message where the path cannot be written: no space, no permission."""
    try:
        yield
    except OSError as error:
        stop(f"{path} could not be written ({error.strerror or error}). What was saved before is as it was; with room "
             "on the disk and the right to write there, the same command with --resume goes on from it")


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
                os.fsync(file.fileno())
            os.replace(beside, path)
            flush_folder(path.parent)                    # the new name, too
        finally:
            beside.unlink(missing_ok=True)


def write(path, text):
    with replacing(path) as file:
        file.write(text)


def append(path, text):
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


@contextlib.contextmanager
def new_folder(path, unless_there=False):
    """A folder to fill: beside the path, flushed, and at the end renamed to it; or given up, if it is there by then."""
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
            if not (unless_there and path.exists()):
                os.replace(beside, path)
                flush_folder(path.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def flush(path):
    """To the disk, what has been written to a file so far"""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(path):
    """To the disk, the names in a folder; Windows has no such thing"""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def one_process(path, name_the_first):
    """
    A lock, held as long as it is kept and not released; stops where another process has it

    The operating system gives it back when a process dies, however it dies. name_the_first() -> who has it
    """
    lock = filelock.FileLock(Path(path).resolve(), is_singleton=True)
    with writing(path):
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            stop(name_the_first())
    return lock


# --------------------------------------------------------------------------------------------------
# Reading

def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        stop(f"{path} cannot be read ({type(error).__name__}); put the right one there, make the stage again with "
             "--overwrite, or give another --out")


def read_lines(path):
    """The objects of a file with one a line, up to the first line that was not written whole; [] if it is not there"""
    found = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
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
    except Exception as error:
        stop(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {str(error).splitlines()[0][:100]}); make the "
             "stage again with --overwrite, or give another --out")
    must_hold(saved, folder, "step", "config", *wanted)
    return saved


def must_hold(saved, folder, *wanted):
    """Stops where what was read from a folder's checkpoint is not a dict with these keys."""
    for key in wanted:
        if not isinstance(saved, dict) or key not in saved:
            there = ", ".join(map(str, saved)) if isinstance(saved, dict) else f"a {type(saved).__name__}"
            stop(f"{folder}/checkpoint.pt holds no {key} but {there[:200]}: it belongs to another stage or program; make the "
                 "stage again with --overwrite, or give another --out")


def fill(thing, state, where):
    """thing.load_state_dict(state); what does not fit is refused by the name of the file, with what differs"""
    try:
        thing.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        differs = (str(error).splitlines() or [type(error).__name__])[:2][-1].strip()
        stop(f"{where} does not fit the {type(thing).__name__} it is read for: {differs[:200]}")


def fingerprint(module):
    """A digest of a module's weights, by which later stages know what they were made from."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
