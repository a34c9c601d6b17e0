"""
The workshop: files, settings, tokenizers, data sets, runs. The root's stages serve as examples.

    python -m pytest -q lab         all of it

A test's name is the claim it checks.
"""

import codecs
import contextlib
import copy
import dataclasses
import errno
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import tracemalloc
import types
import typing
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import dpo
import evaluate
import grpo
import policy_gradient
import ppo
import reward_model
import rollout
import sample
import sft
from conftest import (AWKWARD, HUMAN, Malicious, TURN, assert_same_run, comparison, crash_at,
                      in_a_child, killed_at, load_own, log_of, preset_of, review_texts,
                      short_config, small_gpt, texts_cfg, tiny_config, user_config, write_rows)
from lab import config as settings
from lab import chat, corpus, files, forms, guest, process
from lab import report as reports
from lab import run as runs
from lab import tokenizer as tokenizers
from lab.files import Stopped

HERE = Path(__file__).parent.parent
STAGES = [sft, reward_model, ppo, dpo, grpo, policy_gradient]


def name_of(x):
    """The id of a test's parameter: the name of a script"""
    return getattr(x, "__name__", None)


def failing(error):
    """A function that raises the error"""
    def fails(*args, **kwargs):
        raise error
    return fails


# --------------------------------------------------------------------------------------------------
# files.py

def refused(message):
    """Inside this block an error whose message begins so is expected."""
    return pytest.raises(Stopped, match=f"^error: {message}")


@pytest.mark.parametrize("content", [b"x", {"w": torch.ones(100_000)}], ids=["a byte", "a tensor"])
def test_a_full_disk_leaves_the_old_file_and_says_so(content, tmp_path):
    """/dev/full is a disk without any space, as far as a program can tell."""
    path = tmp_path / "checkpoint.pt"
    files.write(path, "old")
    (tmp_path / "checkpoint.pt.tmp").symlink_to("/dev/full")
    with refused("could not write .*checkpoint.pt: No space left on device. The previous version "
                 "is intact. Free some space .* --resume if a checkpoint exists"):
        with files.replacing(path, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                torch.save(content, file)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with refused("could not write .*log.jsonl: No space left on device"):
        files.append(tmp_path / "log.jsonl", "{}\n")
    try:
        raise KeyboardInterrupt                          # a disk that fails while this is handled
    except KeyboardInterrupt:
        with refused("could not write .*log.jsonl: No such file or directory"):
            files.append(tmp_path / "gone" / "log.jsonl", "{}\n")


def calls_of(monkeypatch, *names):
    """From now on these functions of os note their name when called -> the list of notes"""
    calls = []
    for name in names:
        def noted(*args, name=name, original=getattr(os, name)):
            calls.append(name)
            return original(*args)
        monkeypatch.setattr(os, name, noted)
    return calls


def test_content_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    calls = calls_of(monkeypatch, "fsync", "replace")
    files.write(tmp_path / "a", "text")
    assert calls == ["fsync", "replace"]
    with files.new_folder(tmp_path / "b") as folder:
        (folder / "one").write_text("1")
        (folder / "deeper").mkdir()
        (folder / "deeper" / "two").write_text("2")
    assert calls[2:] == ["fsync", "fsync", "replace"]    # two files, then the folder's name
    names = sorted(path.name for path in tmp_path.rglob("*"))
    assert names == ["a", "b", "deeper", "one", "two"]


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(ZeroDivisionError):
        with files.new_folder(path) as folder:
            (folder / "half").write_text("1")
            1 / 0
    assert not list(tmp_path.iterdir())
    path.mkdir()                                         # an empty one may be replaced
    with files.new_folder(path) as folder:
        (folder / "file").write_text("first")
    with refused("could not write .*x: Directory not empty"):
        with files.new_folder(path) as folder:
            (folder / "file").write_text("second")
    assert (path / "file").read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", files.UNSUPPORTED)
def test_a_file_system_without_fsync_can_be_written_to(code, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(OSError(code, "unsupported")))
    files.write(tmp_path / "a", "text")
    with files.new_folder(tmp_path / "b") as folder:
        (folder / "one").write_text("1")
    assert (tmp_path / "a").read_text() == "text"
    assert (tmp_path / "b" / "one").read_text() == "1"


def test_a_digest_covers_the_whole_file_and_reads_it_in_blocks(tmp_path):
    content = bytes(range(256)) * 2 ** 16                # 16 MB
    (tmp_path / "large").write_bytes(content)
    tracemalloc.start()
    try:
        digest = files.digest(tmp_path / "large")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert digest == hashlib.sha256(content).hexdigest() and peak < 2 ** 21


def test_one_process_at_a_time_has_a_lock_and_a_killed_one_gives_it_back(tmp_path):
    readable, writable = os.pipe()

    def hold():
        with files.one_process(tmp_path / "lock", lambda: "taken"):
            os.write(writable, b"held")
            time.sleep(60)
    child = torch.multiprocessing.get_context("fork").Process(target=hold)
    child.start()
    assert os.read(readable, 4) == b"held"
    with refused("taken by another"):
        files.one_process(tmp_path / "lock", lambda: "taken by another")
    child.kill()
    child.join()
    lock = files.one_process(tmp_path / "lock", lambda: "taken by another")
    assert files.one_process(tmp_path / "lock", lambda: "taken") is lock       # this process has it
    lock.release(force=True)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_still_keeps_a_second_process_out(code, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", failing(OSError(code, "unsupported")))
    lock = files.one_process(tmp_path / ".lock", lambda: "taken")
    other = in_a_child(lambda: files.one_process(tmp_path / ".lock", lambda: os._exit(7)))
    assert other == 7
    lock.release()
    files.one_process(tmp_path / ".lock", lambda: "taken").release()


def test_damaged_and_malicious_checkpoints_are_refused_and_run_nothing(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    owned = tmp_path / "owned"
    unreadable = "cannot read .*/checkpoint.pt as a checkpoint .{}"
    has_no = ".*/checkpoint.pt has no {}, so a different stage or program wrote it"
    not_ours = ".*/checkpoint.pt is not a checkpoint of this project: its step is {}"

    def load(message):
        with refused(message):
            files.load_checkpoint(tmp_path, "policy", "gpt")

    for saved, message in (
            ({"model": {}}, has_no.format("step")),
            ([1, 2], has_no.format("step")),
            (torch.zeros(3), has_no.format("step")),
            ({"step": 1, "config": {}, "policy": 1}, has_no.format("gpt")),
            ({"step": "x", "config": {}, "policy": 1, "gpt": 1}, not_ours.format("'x'")),
            ({"step": 1, "config": [], "policy": 1, "gpt": 1}, not_ours.format("1, its config a")),
            ({"step": 1, "config": {}, "policy": Malicious(owned), "gpt": 1},
             unreadable.format("UnpicklingError"))):
        torch.save(saved, path)
        load(message)
    torch.save({"step": Malicious(owned)}, path, _use_new_zipfile_serialization=False)
    load(unreadable.format("UnpicklingError"))
    path.write_bytes(pickle.dumps(Malicious(owned), protocol=2))
    load(unreadable.format("UnpicklingError"))
    assert not owned.exists()

    saved = {"step": 3, "config": {}, "policy": torch.randn(2000), "gpt": 1}
    torch.save(saved, path)
    assert files.load_checkpoint(tmp_path, "policy", "gpt")["step"] == 3
    with monkeypatch.context() as patch, pytest.raises(MemoryError):           # it is not damaged
        patch.setattr(torch, "load", failing(MemoryError()))
        files.load_checkpoint(tmp_path)
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        load(unreadable.format(""))
    path.unlink()
    load(unreadable.format("FileNotFoundError"))


LINEAR = torch.nn.Linear(3, 2)
ADAMW = torch.optim.AdamW(LINEAR.parameters())
CONTROL = ppo.ProportionalKL(1, 2, 3)


@pytest.mark.parametrize("thing, state, message", [
    (LINEAR, {}, "Missing key.s. in state_dict: .weight., .bias."),
    (LINEAR, {"weight": torch.zeros(3, 2), "bias": torch.zeros(2)},
     r"size mismatch for weight: .*\[3, 2\].*\[2, 3\]"),
    (LINEAR, LINEAR.state_dict() | {"more": torch.zeros(1)}, "Unexpected key.s. in .*: .more"),
    (LINEAR, {"weight": 1.0, "bias": 2.0}, "weight"),
    (LINEAR, None, "Expected state_dict to be dict-like"),
    (ADAMW, {"state": {}, "param_groups": []}, "different number of parameter groups"),
    (ADAMW, {}, "param_groups"),
    (CONTROL, {"coef": 1.0}, ""),
    (CONTROL, 7, "")])
def test_a_state_that_does_not_fit_is_refused_with_the_difference(thing, state, message):
    with refused(f"out/here/sft/checkpoint.pt: the y in it does not fit this {type(thing).__name__}"
                 f": .*{message}.*; restore it from a copy, run sft.py with --overwrite for the "
                 "run here, or"):
        files.load_state(thing, state, "out/here/sft", "y")


def test_unreadable_json_is_refused_and_a_log_is_read_up_to_a_torn_line(tmp_path):
    path = tmp_path / "config.json"
    for content, error in ((b"", "JSONDecodeError"), (b"{", "JSONDecodeError"),
                           (b"[" * 100_000, "RecursionError"), (b"\xff\xfe", "UnicodeDecodeError")):
        path.write_bytes(content)
        with refused(f"cannot read .*config.json .{error}"):
            files.read_json(path)
    for torn in ('{"ste', '{"ste\n{"step": 3}\n', "5\n{}\n", "[" * 100_000):
        path.write_text('{"step": 0}\n{"step": 1}\n' + torn)
        assert files.read_lines(path) == [{"step": 0}, {"step": 1}]
    assert files.read_lines(tmp_path / "none") == []


# --------------------------------------------------------------------------------------------------
# config.py, process.py, report.py

@pytest.mark.parametrize("argv, message", [
    ("--stesp 5", "unknown option --stesp (did you mean --steps?)"),
    ("--steps five", "--steps got 'five'; it takes a whole number"),
    ("--steps 1.5", "--steps got '1.5'; it takes a whole number"),
    ("--steps", "--steps needs a value; --help lists all options"),
    ("--steps --resume", "--steps needs a value"),
    ("--lr nan", "--lr got nan; it takes a number"),
    ("--lr fast", "--lr got 'fast'; it takes a number"),
    ("--surrogate clap",
     "--surrogate got 'clap' (did you mean clip?); it takes one of: clip, kl_penalty"),
    ("--config smal", "unknown --config smal (did you mean small?); it takes one of: small, tiny"),
    ("--resume maybe", "--resume got 'maybe'; it takes 1 or 0"),
    ("steps 5", "unknown option steps"),
    ("--missing_eos_score low", "--missing_eos_score got 'low'; it takes a number or none"),
    ("--batch_size 0", "--batch_size got 0; it takes a whole number, 1 or more"),
    ("--ema 1.0", "--ema got 1.0; it takes a number, 0 or more but below 1"),
    ("--beta -0.1", "--beta got -0.1; it takes a number, 0 or more"),
    ("--temperature 0", "--temperature got 0.0; it takes a number above 0")])
def test_bad_command_lines_are_refused_with_the_value_and_a_valid_range(argv, message):
    with refused(re.escape(message)):
        settings.parse(ppo.Config, "", argv.split())


WRONG = {bool: [1, "yes", None], int: [2.0, True, "3", -1, 2 ** 32],
         float: ["0.1", True, math.nan, math.inf, -math.inf], str: [3, None, True]}
OUT_OF_RANGE = {                                         # by what the message says is wanted
    "a whole number, 1 or more": [0],
    "a whole number, 0 or more": [-1],
    "a number, 0 or more": [-0.5],
    "a number above 0": [-0.5, 0.0],
    "a number from 0 to 1": [-0.5, 1.5],
    "a number, 0 or more but below 1": [-0.5, 1.0, 1.5],
    "a finite number": [],
}
WRONG_NAMES = ["..", "a/..", "/", "a\\b", "tokens", "out/tokens", "x\0y", "x" * 101, "\udcff"]


@pytest.mark.parametrize("script", [*STAGES, evaluate, sample], ids=name_of)
def test_every_field_is_typed_and_range_checked_before_any_work(script, empty_folder):
    """A Config made in Python and an edited preset are checked too."""
    kinds = typing.get_type_hints(script.Config)
    ranges = settings.RANGES | script.Config.ranges
    checked = set()
    for name, kind in kinds.items():
        optional = type(None) in typing.get_args(kind)
        base = typing.get_args(kind)[0] if optional else kind
        wrong = list(WRONG.get(base, ["no such option", None, 0]))
        if base in (int, float):
            usual = settings.COUNT if base is int else settings.FROM_0
            wrong += OUT_OF_RANGE[ranges.get(name, usual)[0]]
        if name in ("out", "base"):
            wrong += WRONG_NAMES
        for value in wrong:
            if value is None and optional:
                continue
            with refused(f"--{name} got {re.escape(repr(value))}.*; it takes ."):
                settings.check_fields(dataclasses.replace(tiny_config(script), **{name: value}))
            checked.add(name)
        if base is float and ranges.get(name) != settings.BELOW_1:
            settings.check_fields(dataclasses.replace(tiny_config(script), **{name: 1}))
    assert checked == kinds.keys() and script.main.__wrapped__                 # self-contained
    if script is not sample:                             # which has no folder of its own
        with refused("--seed got -1; it takes a whole number, 0 or more"):
            script.main(tiny_config(script, seed=-1))
    for preset in script.Config.presets:
        settings.check_fields(script.Config(config=preset))
    assert not list(empty_folder.iterdir())


def id_of_case(part):
    """A script's name, the changed fields, and nothing for a message"""
    return " ".join(part) if isinstance(part, dict) else getattr(part, "__name__", "")


@pytest.mark.parametrize("script, changes, message", [
    (ppo, dict(minibatch_size=24), "--minibatch_size 24 does not divide --batch_size 32.*; try 16"),
    (ppo, dict(n_eval=100_000), r"--n_eval 100000 .* more held-out prompts than the \d+ that"),
    (ppo, dict(reward="nowhere.py:f"), "--reward got nowhere.py:f, but nowhere.py does not exist"),
    (ppo, dict(reward="broken.py:f"), ".*but broken.py cannot be read .SyntaxError"),
    (ppo, dict(reward="fine.py:g"), ".*but fine.py has no function g"),
    (ppo, dict(reward="fine.py:"), ".*nothing after the colon; give"),
    (ppo, dict(reward="nowhere/c2:toxic"), "--reward got nowhere/c2; it takes reward_model, path"),
    (ppo, dict(data="review"), r"--data got review .did you mean reviews\?.; it takes reviews, hh"),
    (ppo, dict(data="fine.jsnl"), r"--data got fine.jsnl .did you mean fine.jsonl\?.; it takes"),
    (ppo, dict(ptx_coef=1.0, ptx_data="none.txt"), "--ptx_data got none.txt.*; it takes"),
    (ppo, dict(base="tinny"), r"--base tinny has no finished out/tinny/sft .did you mean tiny\?."),
    (grpo, dict(minibatch_size=12), ".* does not divide"),
    (policy_gradient, dict(minibatch_size=5), ".* does not divide"),
    (ppo, dict(reward="reward_modle"), r"--reward got reward_modle .did you mean reward_model\?."),
    (ppo, dict(reward="fine.py"), "--reward got fine.py; name the function .* fine.py:FUNCTION"),
    (ppo, dict(data="stories.txt"),
     "--data stories.txt has no comparisons, only rows with one response or none"),
    (ppo, dict(config="imdb", reward="reward_model"), "--config imdb has no reward model; give a"),
    (ppo, dict(kl_horizon=5.0),
     "--kl_horizon 5.0 is so short that one update could take beta below 0"),
    (ppo, dict(device="meta"), ".*these scripts know cpu, cuda and mps"),
    (ppo, dict(device="cuda:99"), "cannot use --device cuda:99 here .*--device cpu always works"),
    (evaluate, dict(runs="tinny"), "--runs names tinny, but out/tinny has no finished stage"),
    (evaluate, dict(overoptimise=True, weak_rankings=2),
     "--weak_rankings 2 is less than one batch of 4"),
    (evaluate, dict(lora_rank=2), "--export, --lora_rank .*; this one trains nothing"),
    (reward_model, dict(n_prompts=2), "there are 2 rankings to train on, less than one batch"),
    (reward_model, dict(n_responses=1), ".*a comparison takes at least 2"),
    (dpo, dict(data="nowhere"), "--data got nowhere"),
    (sft, dict(n_head=3), "--n_embd 32 is not a multiple of --n_head 3"),
    (sft, dict(vocab_size=256), "--vocab_size got 256; it takes 257 or more"),
    (sft, dict(export="fine.jsonl/there"), "cannot make --export .*/there: .*fine.jsonl is not a "),
    (evaluate, dict(data="nowhere"), "--data got nowhere"),
    (evaluate, dict(n_eval=100_000), ".* asks for more held-out prompts")], ids=id_of_case)
def test_impossible_settings_are_refused_before_any_work(script, changes, message, empty_folder):
    (empty_folder / "broken.py").write_text("def f(:")
    (empty_folder / "fine.py").write_text(
        "def f(prompts, responses):\n    return [0.0] * len(prompts)\n")
    (empty_folder / "fine.jsonl").write_text("{}")
    (empty_folder / "stories.txt").write_text("a story")
    (empty_folder / "out" / "tiny" / "sft").mkdir(parents=True)
    (empty_folder / "out" / "tiny" / "sft" / "report.txt").write_text("")
    with refused(message):
        script.main(tiny_config(script, out="new", **changes))
    assert not (empty_folder / "out" / "new").exists()


def test_command_lines_set_typed_fields_over_a_preset_and_are_given_back():
    argv = ("--config tiny --lr=1e-5 --missing_eos_score none --kl-control fixed --whiten_rewards "
            "--seed 3 --score_clip 2 --warmup 0 --normalise_reward no --reward x")
    cfg = settings.parse(ppo.Config, "", argv.split())
    assert cfg == ppo.Config(config="tiny", lr=1e-5, missing_eos_score=None, kl_control="fixed",
                             whiten_rewards=True, seed=3, score_clip=2.0, warmup=0, reward="x",
                             normalise_reward=False)
    assert isinstance(cfg.score_clip, float)
    cfg = dataclasses.replace(cfg, out="a", reward="some where/my file.py:f")
    words = shlex.split(settings.command(cfg, "ppo"))
    assert words[:2] == ["python", "ppo.py"] and settings.parse(ppo.Config, "", words[2:]) == cfg


def test_a_config_takes_its_presets_values_and_then_those_given():
    cfg = ppo.Config(config="tiny", steps=3)
    assert (cfg.steps, cfg.batch_size, cfg.max_new_tokens) == (3, 32, 24)
    assert ppo.Config() == ppo.Config(config="small") and ppo.Config().save_every == 20
    assert dataclasses.replace(cfg, lr=1.0).batch_size == 32
    with refused(r"unknown --config tine .did you mean tiny\?.; it takes one of: small, tiny"):
        ppo.Config(config="tine")

    class Mine(ppo.Config):                              # as in a notebook
        pass
    mine = Mine(config="tiny", steps=3)
    assert dataclasses.asdict(mine) == dataclasses.asdict(cfg)
    assert settings.command(mine, "ppo") == "python ppo.py --config tiny --steps 3"


@pytest.mark.parametrize("words, value", [
    (["--prompt", "-- list all"], "-- list all"),
    (["--prompt=--n"], "--n"),
    (["--prompt=--seed=3"], "--seed=3"),
    (["--prompt="], ""),
    (["--prompt", "a=b"], "a=b"),
    (["--prompt", "-1"], "-1"),
    (["--prompt=--two\n\nlines"], "--two\n\nlines")])
def test_any_value_can_be_given_with_an_equals_sign(words, value):
    """Without one, a value may begin with - if it is a negative number or contains a space."""
    cfg = settings.parse(sample.Config, "", ["--config", "tiny", *words, "--n", "2"])
    assert (cfg.prompt, cfg.n) == (value, 2)
    again = shlex.split(settings.command(cfg, "sample"))[2:]
    assert settings.parse(sample.Config, "", again) == cfg
    with refused("--prompt needs a value; .* as --flag=VALUE"):
        settings.parse(sample.Config, "", ["--prompt", "--n", "2"])


def test_columns_of_the_log_never_touch():
    for value in (0, 0.5, -0.5, 12.3456, 99.9996, -99.9996, 123.456, -999.99, 2993.75, 9999.96,
                  -99999.9, 1e6, -1e6, 1e100, -1e-100, 3e-3):
        text = reports.short(value)
        assert len(text) <= 7 and float(text) == pytest.approx(value, rel=0.05, abs=1e-3), value
    values = [0.1234, -1.5, 0.0, 4e-4, math.nan, None]
    assert [reports.short(x) for x in values] == ["0.123", "-1.500", "0.000", "4e-04", "nan", "nan"]


def test_json_files_hold_no_nan(tmp_path):
    line = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf, "e": "NaN"}}
    files.write_lines(tmp_path / "log", [line])
    found = json.loads((tmp_path / "log").read_text(), parse_constant=pytest.fail)
    assert found == {"a": None, "b": [None, 1.5], "c": {"d": None, "e": "NaN"}}


@pytest.mark.parametrize("encoding, shown", [
    ("cp1252", "± \\U0001f98a"),
    ("ascii", "\\xb1 \\U0001f98a"),
    ("utf-8", "± 🦊")])
def test_characters_that_the_output_cannot_encode_are_escaped(encoding, shown, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    runs.self_contained(lambda cfg: print("± 🦊"))(None)
    assert stream.buffer.getvalue().decode(encoding) == shown + "\n" and sys.stdout is stream


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "full"),
    OSError(errno.EIO, "gone"),
    ValueError("I/O operation on closed file"),
    None])
def test_output_that_cannot_be_written_is_dropped(error, monkeypatch):
    """None: there is no standard output at all."""
    def main(cfg):
        print("a line", flush=True)
        list(reports.progress([1], "working"))
        return "done"

    stream = None
    if error:
        fails = failing(error)
        stream = types.SimpleNamespace(write=fails, flush=fails, isatty=lambda: True, closed=False)
    monkeypatch.setattr(sys, "stdout", stream)
    assert runs.self_contained(main)(None) == "done" and sys.stdout is stream


def test_a_bar_goes_over_a_terminal_and_only_its_last_line_into_a_file(monkeypatch):
    for terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stdout", stream)
        assert list(reports.progress([1, 2, 3], "working")) == [1, 2, 3]
        *bars, last = re.split(r"\r(?:\033\[K)?", stream.getvalue())
        assert [bar.count("#") for bar in bars[1:]] == ([0, 10, 20] if terminal else [])
        assert re.fullmatch(r"working: 0\.\d s\n", last)


def test_a_main_leaves_the_process_as_it_found_it(monkeypatch):
    def numbers():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def main(stops):
        process.seed_all(0)
        process.pick_device(tiny_config(sft, deterministic=True))
        signal.signal(signal.SIGTERM, lambda *args: None)
        numbers()
        if stops:
            files.stop("as asked")

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    process.seed_all(5)
    expected = numbers(), numbers()
    process.seed_all(5)
    first = numbers()
    runs.self_contained(main)(False)
    with refused("as asked"):
        runs.self_contained(main)(True)
    assert (first, numbers()) == expected
    assert not torch.are_deterministic_algorithms_enabled()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ and not process.OPENED.mains


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    MemoryError(),
    getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")],
    ids=["cuda", "python", "accelerator", "mps", "cpu"])
def test_out_of_memory_is_recognised_on_every_device(error):
    assert files.out_of_memory(error)
    assert not files.out_of_memory(RuntimeError("shapes differ"))
    assert not files.out_of_memory(ValueError("out of memory"))


def test_the_random_state_of_mps_is_kept_and_its_clock_waits(monkeypatch):
    kept = []
    waited = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.mps, "set_rng_state", kept.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append(1))
    mps = torch.device("mps")
    process.set_random_states(process.random_states(mps), mps)
    reports.Clock(mps).lap("rollout")
    assert kept == [torch.tensor([7])] and waited == [1]


def test_the_commit_is_this_folders_with_a_note_of_edited_and_new_scripts(monkeypatch, tmp_path):
    """A folder without a .git of its own has none, even in a repository."""
    def commit(folder):
        monkeypatch.setattr(process, "__file__", str(tmp_path / folder / "lab" / "process.py"))
        return process.environment("cpu")["commit"]

    (tmp_path / "ppo.py").write_text("")
    subprocess.run("git init -q . && mkdir -p lab vendored/lab && git add . && "
                   "git -c user.name=a -c user.email=a@b commit -qm one",
                   shell=True, cwd=tmp_path, check=True)
    assert re.fullmatch("[0-9a-f]{12}", commit("")) and commit("vendored") == "unknown"
    (tmp_path / "my_ppo.py").write_text("")
    assert commit("").endswith(" with changes")
    (tmp_path / "my_ppo.py").unlink()
    (tmp_path / "ppo.py").write_text("edited = True\n")
    assert commit("").endswith(" with changes")
    monkeypatch.setattr(subprocess, "run", failing(FileNotFoundError("git")))
    assert commit("") == "unknown"
    monkeypatch.setattr(process, "PACKAGES", ("torch", "no-such-package"))
    assert process.environment("cpu")["no-such-package"] == "unknown"


def test_learning_rate_warms_up_and_decays_linearly_to_its_floor():
    rates = [runs.learning_rate(step, 100, 2.0, 10, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[100] == pytest.approx(0.2) and rates[55] == pytest.approx((2.0 + 0.2) / 2)


# --------------------------------------------------------------------------------------------------
# tokenizer.py

def huggingface_bpe(texts, vocab_size, special_tokens=()):
    """A byte-level BPE that the tokenizers library has trained"""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special_tokens), initial_alphabet=alphabet,
        show_progress=False))
    return bpe


def test_a_tokenizer_gives_the_ids_of_the_bpe_it_was_made_from():
    texts = review_texts(400, seed=3)
    theirs = huggingface_bpe(texts, 699)
    ours = tokenizers.train_tokenizer(texts, 700)        # with EOS
    for text in texts[:50] + AWKWARD:
        assert ours.encode_ordinary(text) == theirs.encode(text).ids, text


def test_any_text_survives_the_tokenizer_and_never_becomes_a_special_token(tokenizer):
    for text in AWKWARD:
        ids = tokenizer.encode_ordinary(text)
        assert tokenizer.eot_token not in ids and tokenizer.decode(ids) == text
    assert tokenizer.eot_token == tokenizer.n_vocab - 1
    assert tokenizers.encode_prompt(tokenizer, "") == [tokenizer.eot_token]
    _, responses = tokenizers.encode_texts(tokenizer, ["On the plot:"], [" Skip it."])
    ids = responses[0]
    assert ids[-1] == tokenizer.eot_token and ids.count(tokenizer.eot_token) == 1
    assert tokenizers.decode_response(tokenizer, ids) == (" Skip it.", True)
    assert tokenizers.decode_response(tokenizer, ids[:-1]) == (" Skip it.", False)
    assert tokenizers.decode_response(tokenizer, []) == ("", False)


def test_a_tokenizer_is_stored_whole_and_its_id_differs_from_others(tokenizer, tmp_path):
    tokenizers.save_tokenizer(tokenizer, tmp_path)
    loaded = tokenizers.load_tokenizer(tmp_path)
    assert tokenizers.tokenizer_id(loaded) == tokenizers.tokenizer_id(tokenizer)
    for text in AWKWARD:
        assert loaded.encode_ordinary(text) == tokenizer.encode_ordinary(text)
    other = tokenizers.train_tokenizer(review_texts(400, seed=3), 500)
    with refused(".* trained with a different vocabulary"):
        tokenizers.check_vocabulary(tokenizers.tokenizer_id(other), tokenizer, "out/x")
    (tmp_path / "tokenizer.json").write_text("{")
    with refused(".* cannot be read as a tokenizer"):
        tokenizers.load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def bpe():
    """A tokenizer.json: three special tokens first, as trainers number them; a gap in the ids"""
    texts = review_texts(300, seed=3) + AWKWARD
    trained = huggingface_bpe(texts, 600, [tokenizers.EOS, "<|start|>", "<|end|>"])
    content = json.loads(trained.to_str())
    for token, i in content["model"]["vocab"].items():
        if i >= 100:
            content["model"]["vocab"][token] = i + 7
    return content


def bpe_folder(folder, content, **extra_files):
    """A folder with tokenizer.json and other files, given by their names without .json"""
    folder.mkdir(exist_ok=True)
    for name, x in ({"tokenizer": content} | extra_files).items():
        (folder / f"{name}.json").write_text(json.dumps(x))
    return folder


def changed(content, *path, to):
    """A copy of nested dicts and lists with one value changed; -1 appends to a list"""
    copied = inner = copy.deepcopy(content)
    for key in path[:-1]:
        inner = inner[key]
    if path[-1] == -1:
        inner.append(to)
    else:
        inner[path[-1]] = to
    return copied


CHARACTERS = [(32, 127), (32, 127), (160, 0x2000), (0x2000, 0x2070), (0x3000, 0xd7ff),
              (0x1f300, 0x1faff)]
PIECES = [" ", "\n", "\t", "\r\n", "  ", "'s", "'LL", "1999", " the", *AWKWARD,
          "<|start|>", "<|end|>"]


def random_text(rng):
    """Characters of all kinds, special tokens, and pieces that GPT-2's pattern looks for"""
    text = ""
    for _ in range(rng.randrange(12)):
        if rng.random() < 0.7:
            text += chr(rng.randrange(*rng.choice(CHARACTERS)))
        else:
            text += rng.choice(PIECES)
    return text


def test_ids_are_as_in_the_files_and_text_never_becomes_a_special_token(bpe, tmp_path):
    """Special tokens first, a gap in the ids, one more special token after a second gap"""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    late = dict(bpe["added_tokens"][0], id=620, content="<|pad|>")
    content = changed(bpe, "added_tokens", -1, to=late)
    content["model"]["vocab"]["<|pad|>"] = 620
    ours = tokenizers.pretrained_tokenizer(bpe_folder(tmp_path / "x", content))
    theirs = Tokenizer.from_file(str(tmp_path / "x" / "tokenizer.json"))
    theirs.encode_special_tokens = True                  # as text
    rng = random.Random(0)
    for text in AWKWARD + [random_text(rng) for _ in range(3000)]:
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode(text).ids and ours.decode(ids) == text, text
        assert not {0, 1, 2, 620} & set(ids)
    assert ours.eot_token == 0 and ours.n_vocab == 621
    assert ours.decode([0, 1, 2, 620]) == tokenizers.EOS + "<|start|><|end|><|pad|>"
    ours.decode(list(range(ours.n_vocab)))               # gaps too: a model may sample such an id

    tokenizers.export_tokenizer(ours, tmp_path / "exported", pad=True)
    back = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert back.convert_tokens_to_ids([tokenizers.EOS, "<|end|>", "<|pad|>"]) == [0, 2, 620]
    assert back.pad_token_id == 621                      # a new token, by a name that was free
    assert back("good", add_special_tokens=True)["input_ids"] == ours.encode_ordinary("good")


END = {"eos_token": "<|end|>"}
END_AS_DICT = {"eos_token": {"content": "<|end|>"}}


@pytest.mark.parametrize("eos, said, extra_files", [
    (0, "", {}),
    (2, "", dict(tokenizer_config=END)),
    (2, "", dict(special_tokens_map=END_AS_DICT, config={"eos_token_id": [1, 2]})),
    (2, "", dict(tokenizer_config=END_AS_DICT, special_tokens_map={"eos_token": "<|start|>"})),
    (2, "", dict(config={"eos_token_id": 2})),
    (1, "", dict(config={"eos_token_id": [599, 1]})),
    (0, "config.json has eos_token_id [50256]", dict(config={"eos_token_id": 50256})),
    (2, "ends a text with <|end|> (id 2), config.json has eos_token_id [0] and "
        "generation_config.json has",
     dict(tokenizer_config=END, config={"eos_token_id": 0},
          generation_config={"eos_token_id": [0, 1]}))])
def test_the_eos_is_the_one_that_the_files_name(eos, said, extra_files, bpe, tmp_path, capsys):
    """The tokenizer's files win over the model's, and a note says where they differ."""
    from transformers import AutoTokenizer
    ours = tokenizers.pretrained_tokenizer(bpe_folder(tmp_path / "x", bpe, **extra_files))
    assert ours.eot_token == eos and tokenizers.encode_prompt(ours, "") == [eos]
    note = capsys.readouterr().out
    if said:
        assert note.startswith("note: ") and said in note and note.count("\n") == 1
    else:
        assert note == ""

    tokenizers.save_tokenizer(ours, tmp_path)
    tokenizers.export_tokenizer(ours, tmp_path / "exported")
    ours_id = tokenizers.tokenizer_id(ours)
    for again in (tokenizers.load_tokenizer(tmp_path),
                  tokenizers.pretrained_tokenizer(tmp_path / "exported")):
        assert again.eot_token == eos and tokenizers.tokenizer_id(again) == ours_id
        assert again.decode(list(range(607))) == ours.decode(list(range(607)))
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").eos_token_id == eos
    renamed_token = json.loads(json.dumps(bpe).replace("<|start|>", "<|begin|>"))
    other = tokenizers.pretrained_tokenizer(bpe_folder(tmp_path / "y", renamed_token))
    assert tokenizers.tokenizer_id(other) != ours_id


ADDED = dict(id=600, content="<x>", single_word=False, lstrip=False, rstrip=False,
             normalized=False, special=True)
ENDING = dict(type="TemplateProcessing", single=[
    {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}])
BOS_X = dict(type="TemplateProcessing", single=[
    {"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}])
LOWER = {"type": "Lowercase"}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}


@pytest.mark.parametrize("path, to, message", [
    (["normalizer"], LOWER, "normalizer Lowercase"),
    (["normalizer"], {"type": "Sequence", "normalizers": [{"type": "NFC"}, LOWER]},
     "normalizer Lowercase"),
    (["pre_tokenizer", "add_prefix_space"], True, "add_prefix_space"),
    (["pre_tokenizer", "use_regex"], False, "pre-tokenizer ByteLevel, with these"),
    (["pre_tokenizer"], None, "pre-tokenizer null"),
    (["pre_tokenizer"], {"type": "Whitespace"}, "pre-tokenizer Whitespace"),
    (["pre_tokenizer"], DIGITS, r"pre-tokenizer Digits \+ ByteLevel"),
    (["post_processor"], ENDING, "TemplateProcessing, which adds tokens"),
    (["post_processor"], {"type": "Sequence", "processors": [ENDING]},
     "TemplateProcessing, which adds tokens"),
    (["post_processor"], BOS_X, "puts <x> before every text, but has no such token"),
    (["post_processor"], {"type": "RobertaProcessing"}, "RobertaProcessing"),
    (["model", "unk_token"], "<|end|>", r"unk_token '<\|end\|>'"),
    (["model", "byte_fallback"], True, "byte_fallback True"),
    (["model", "dropout"], 0.1, "dropout 0.1"),
    (["model", "end_of_word_suffix"], "</w>", "end_of_word_suffix"),
    (["model", "type"], "Unigram", "byte-level BPE"),
    (["added_tokens", -1], ADDED | {"lstrip": True, "single_word": True},
     "'<x>' .lstrip, single_word"),
    (["added_tokens", -1], ADDED | {"rstrip": True}, "'<x>' .rstrip"),
    (["added_tokens", -1], ADDED | {"content": "!", "id": 3},
     "special token '!' .* piece of ordinary text"),
    (["added_tokens", -1], ADDED | {"id": 50}, "two tokens with one id"),
    (["added_tokens", 1, "id"], 50, r"special token '<\|start\|>' has a second id"),
    (["added_tokens", -1], ADDED | {"id": 10 ** 9},
     "token with the id 1000000000; wanted ids below"),
    (["model", "merges"], [["t", "h"]], "number the merges in their order"),
    (["model", "vocab", "a▁"], 610, "number the merges in their order"),
    ("tokenizer_config", {"add_prefix_space": True}, "add_prefix_space"),
    ("tokenizer_config", {"add_bos_token": True}, "puts None before every text"),
    ("tokenizer_config", {"add_eos_token": True}, "add_eos_token"),
    ("tokenizer_config", {"eos_token": "</s>"}, "special tokens ends a text.* got </s>"),
    ("tokenizer_config", {"eos_token": "a"}, "which of its special tokens ends a text.* got a"),
    ("tokenizer", [1], "holds a list"),
    ("config", [1], "config.json holds a list")])
def test_tokenizer_features_beyond_gpt2s_are_refused_by_name(path, to, message, bpe, tmp_path):
    """A change of tokenizer.json at a path, or the content of a file beside it or in its place"""
    if isinstance(path, str):
        folder = bpe_folder(tmp_path / "x", bpe, **{path: to})
    else:
        folder = bpe_folder(tmp_path / "x", changed(bpe, *path, to=to))
    with refused(f"no tokenizer in .*{message}"):
        sft.tokenizer_of(str(folder))


@pytest.mark.parametrize("merges", [
    pytest.param([("~^", "`")], id="a part that is not a token"),
    pytest.param([("^", "`"), ("~", "^"), ("~^", "`")], id="parts that first merge otherwise")])
def test_merges_that_tiktoken_would_make_in_a_different_way_are_refused(merges, bpe, tmp_path):
    content = copy.deepcopy(bpe)
    for i, (left, right) in enumerate(merges):
        content["model"]["vocab"][left + right] = 700 + i
        content["model"]["merges"].append([left, right])
    with pytest.raises(ValueError, match="number the merges in their order"):
        tokenizers.pretrained_tokenizer(bpe_folder(tmp_path / "x", content))


def test_harmless_settings_in_a_tokenizer_json_change_nothing(bpe, tmp_path):
    folder = bpe_folder(tmp_path / "x", bpe)
    wanted = tokenizers.tokenizer_id(tokenizers.pretrained_tokenizer(folder))
    plain = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
    merges = [" ".join(pair) for pair in bpe["model"]["merges"]]
    untyped = {key: x for key, x in bpe["model"].items() if key != "type"}
    for path, to in (
            (["post_processor"], {"type": "ByteLevel"}),
            (["post_processor"], plain),
            (["normalizer"], {"type": "Sequence", "normalizers": []}),
            (["pre_tokenizer"], {"type": "Sequence", "pretokenizers": [bpe["pre_tokenizer"]]}),
            (["model", "merges"], merges),
            (["model", "end_of_word_suffix"], ""),
            (["model", "dropout"], 0.0),
            (["model"], untyped)):
        folder = bpe_folder(tmp_path / "x", changed(bpe, *path, to=to))
        ours = tokenizers.pretrained_tokenizer(folder / "tokenizer.json")
        assert tokenizers.tokenizer_id(ours) == wanted, path


def test_vocab_and_merges_files_know_their_special_tokens_too(bpe, tmp_path):
    """They come first in the vocabulary, or slow tokenizers of transformers list them."""
    folder = bpe_folder(tmp_path / "x", bpe)
    wanted = tokenizers.tokenizer_id(tokenizers.pretrained_tokenizer(folder))
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(bpe["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in bpe["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges + "\n")
    assert tokenizers.tokenizer_id(tokenizers.pretrained_tokenizer(folder)) == wanted
    (folder / "merges.txt").rename(folder / "merges")
    with pytest.raises(ValueError, match="merges.txt does not exist"):
        tokenizers.pretrained_tokenizer(folder)
    (folder / "merges").rename(folder / "merges.txt")
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 607}))
    assert tokenizers.pretrained_tokenizer(folder).decode([607, 2]) == "<pad><|end|>"

    def with_added_token(**flags):
        decoder = {"added_tokens_decoder": {"608": ADDED | flags}, "eos_token": "<x>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(decoder))
        return tokenizers.pretrained_tokenizer(folder)

    assert with_added_token(special=True).eot_token == 608
    ours = with_added_token(special=False)               # an EOS is special whatever its file says
    assert ours.eot_token == 608 and 608 not in ours.encode_ordinary("a <x>")
    (folder / "tokenizer_config.json").unlink()
    vocab = bpe["model"]["vocab"]
    nameless = {token.replace(tokenizers.EOS, "<s>"): i for token, i in vocab.items()}
    (folder / "vocab.json").write_text(json.dumps(nameless))
    with pytest.raises(ValueError, match=r"wanted one of .*<s>, .*<\|end\|> as eos_token"):
        tokenizers.pretrained_tokenizer(folder)


def test_a_tokenizer_that_an_earlier_version_wrote_is_the_same_tokenizer(tokenizer, tmp_path):
    """Its id too, which is stored in the checkpoints of that time."""
    tokenizers.save_tokenizer(tokenizer, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
    described = repr((tokenizers.PATTERN, ranks, tokenizer.eot_token))
    before = hashlib.sha256(described.encode()).hexdigest()[:16]
    assert tokenizers.tokenizer_id(tokenizer) == before
    del content["special"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = tokenizers.load_tokenizer(tmp_path)
    assert tokenizers.tokenizer_id(loaded) == before and loaded.eot_token == tokenizer.eot_token
    byte, other = list(content["ranks"])[7:9]
    special = content | {"special": {"<x>": 900}}
    for broken in (special | {"eos": 3}, special | {"eos": None},              # ordinary, nothing
                   content | {"ranks": content["ranks"] | {byte: content["ranks"][other]}},
                   content | {"ranks": {}}, {"ranks": 3}, []):
        (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
        with refused(".*tokenizer.json.* as a tokenizer"):
            tokenizers.load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------
# tokenizer.py: Llama 3, Qwen and SmolLM2; chat.py

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHAT_TOKENS = {
    "gpt2": [], "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}
KINDS = list(CHAT_TOKENS)
NO_TOKEN = (4, 6, 19, 192, 193, 241, 245, 255)           # bytes that this smollm2 has no token for


def trained_kind(kind):
    """A tokenizer.json of one of these kinds, trained on the spot"""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    made = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    patterns = {"qwen": QWEN, "llama3": LLAMA}
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in patterns)
    made.pre_tokenizer = last
    if kind in patterns:
        cut = pre_tokenizers.Split(Regex(patterns[kind]), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([cut, last])
    if kind == "smollm2":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), last])
    if kind == "qwen":
        made.normalizer = normalizers.NFC()
    absent = {tokenizers.printable()[byte] for byte in NO_TOKEN if kind == "smollm2"}
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - absent)
    first = CHAT_TOKENS[kind] if kind == "smollm2" else []
    texts = ["The years 1999 and 2024, don't WE'LL go?  \n\n naïve café in Việt Nam; 日本語 текст",
             "def f(x):\n    return x + 17\n\n\nShe said: it isn't so ... 3,141.59"] * 20
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=520, initial_alphabet=alphabet, special_tokens=first, show_progress=False))
    content = json.loads(made.to_str())
    vocab = content["model"]["vocab"]
    if kind == "llama3":                                 # each way to make a token, by its id
        vocab["Ġzqxj"] = len(vocab)                      # reached by no merge: whole words only
        content["model"]["merges"] = [
            pair for token, _ in sorted(vocab.items(), key=lambda item: item[1])
            for pair in sorted(([token[:i], token[i:]] for i in range(1, len(token))
                                if token[:i] in vocab and token[i:] in vocab),
                               key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    if kind in patterns:
        n = max(vocab.values()) + 1
        content["added_tokens"] = [added(n + i, x) for i, x in enumerate(CHAT_TOKENS[kind])]
        if kind == "qwen":
            content["added_tokens"].append(added(n + 3, "<think>", special=False))
    if kind == "llama3":
        template = {"type": "TemplateProcessing", "pair": [], "single": [
            {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [n],
                                  "tokens": ["<|begin_of_text|>"]}}}
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                      "use_regex": True}
        content["post_processor"] = {"type": "Sequence", "processors": [byte_level, template]}
    return content


def added(i, text, special=True):
    return dict(id=i, content=text, special=special, single_word=False, lstrip=False, rstrip=False,
                normalized=False)


CHATML = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'"
          " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
          "{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
          "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
          "{% endif %}")
TEMPLATES = {"gpt2": None, "qwen": CHATML, "llama3": LLAMA3, "smollm2": CHATML}
END_OF = {"gpt2": "<|endoftext|>", "qwen": "<|endoftext|>", "llama3": "<|eot_id|>",
       "smollm2": "<|im_end|>"}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """{kind: a folder with its tokenizer files}"""
    folders = {}
    for kind in KINDS:
        folders[kind] = folder = tmp_path_factory.mktemp(kind)
        (folder / "tokenizer.json").write_text(json.dumps(trained_kind(kind)))
        config = {"eos_token": END_OF[kind]}
        if TEMPLATES[kind]:
            config["chat_template"] = TEMPLATES[kind]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folders


UNICODE = [(0, 32), (32, 127), (32, 127), (32, 127), (160, 0x250), (0x300, 0x370), (0x370, 0x530),
          (0x900, 0x980), (0x1100, 0x1200), (0x2000, 0x2070), (0x3000, 0xd7a4),
          (0x1f300, 0x1f600), (0x40000, 0x40010)]
FRAGMENTS = [" ", "\n", "\t", "\r\n", "  ", "   ", "'s", "'LL", "1999", " the", " 42", "\u00a0",
          "e\u0301", "ﬁ", "don't", " Việt", "½", "²", " zqxj", "zqxj", "<|im_end|>", "<|eot_id|>"]


def unicode_text(rng):
    return "".join(chr(rng.randrange(*rng.choice(UNICODE))) if rng.random() < 0.55
                   else rng.choice(FRAGMENTS) for _ in range(rng.randrange(14)))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_those_of_the_tokenizers_library(kind, kinds, tmp_path):
    """On 20,000 random texts; what is exported and read again has the same ids"""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    ours = tokenizers.pretrained_tokenizer(kinds[kind])
    theirs = Tokenizer.from_file(str(kinds[kind] / "tokenizer.json"))
    theirs.encode_special_tokens = True                  # as text
    tokenizers.export_tokenizer(ours, tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    absent = bytes(NO_TOKEN) if kind == "smollm2" else b""
    rng = random.Random(0)
    for i in range(20_000):
        text = unicode_text(rng)
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        wanted = unicodedata.normalize("NFC", text) if kind == "qwen" else text
        assert ours.decode_bytes(ids) == wanted.encode().translate(None, absent)
        if i < 500:
            again = exported(text, add_special_tokens=False, split_special_tokens=True)
            assert again["input_ids"] == ids
    ours.decode(list(range(ours.n_vocab)))               # gaps too
    again = tokenizers.pretrained_tokenizer(tmp_path)
    tokenizers.save_tokenizer(ours, tmp_path)
    stored = tokenizers.load_tokenizer(tmp_path)
    assert stored.options() == ours.options()
    assert (tokenizers.tokenizer_id(ours) == tokenizers.tokenizer_id(again)
            == tokenizers.tokenizer_id(stored))


def test_a_byte_without_a_token_is_said_and_left_out(kinds, capsys):
    ours = tokenizers.pretrained_tokenizer(kinds["smollm2"])
    assert "no token for 8 of the 256 bytes (4, 6, 19, 192, 193, ..)" in capsys.readouterr().out
    assert ours.decode(ours.encode_ordinary("a\x04b\x06")) == "ab"
    assert ours.encode_ordinary("\x04") == [] and tokenizers.encode_prompt(ours, "\x04") == [2]


def test_the_longest_added_token_is_read_first(kinds, tmp_path):
    from tokenizers import Tokenizer
    content = json.loads((kinds["qwen"] / "tokenizer.json").read_text())
    n = content["added_tokens"][-1]["id"]
    content["added_tokens"] += [added(n + 1, "<a>", False), added(n + 2, "<a><b>", False)]
    folder = bpe_folder(tmp_path / "x", content, tokenizer_config={"eos_token": "<|im_end|>"})
    ours = tokenizers.pretrained_tokenizer(folder)
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("<a><b>", "<a><a><b> so", "<a> <b>"):
        assert ours.encode_ordinary(text) == theirs.encode(text).ids


@pytest.mark.parametrize("kind, change, message", [
    ("qwen", dict(pattern={"Regex": r"\p{N}"}), "regex leaves text out or matches nothing"),
    ("qwen", dict(pattern={"Regex": r"\p{L}*|\s*|."}), "regex leaves text out or matches nothing"),
    ("qwen", dict(pattern={"String": " "}), r"pre-tokenizer Split \+ ByteLevel"),
    ("qwen", dict(behavior="Removed"), r"pre-tokenizer Split \+ ByteLevel")])
def test_a_split_that_tiktoken_would_do_differently_is_refused(kind, change, message, kinds,
                                                               tmp_path):
    content = json.loads((kinds[kind] / "tokenizer.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0] |= change
    with refused(f"no tokenizer in .*{message}"):
        sft.tokenizer_of(str(bpe_folder(tmp_path / "x", content)))


def test_a_lone_surrogate_is_replaced(kinds):
    for kind in KINDS:
        ours = tokenizers.pretrained_tokenizer(kinds[kind])
        assert ours.decode(ours.encode_ordinary("a\udcff\x1c")) == "a?\x1c"


def test_added_tokens_that_are_not_special_are_read_in_text(kinds):
    ours = tokenizers.pretrained_tokenizer(kinds["qwen"])
    think = ours._special_tokens["<think>"]
    ids = ours.encode_ordinary("so <think>\n17")
    assert ids.count(think) == 1 and ours.decode(ids) == "so <think>\n17"
    assert ours._special_tokens["<|im_end|>"] not in ours.encode_ordinary("<|im_end|>")


def test_a_prompt_starts_with_exactly_one_bos_where_the_model_uses_one(kinds):
    ours = tokenizers.pretrained_tokenizer(kinds["llama3"])
    bos = ours._special_tokens["<|begin_of_text|>"]
    assert tokenizers.encode_prompt(ours, "") == [bos]
    ids = tokenizers.encode_prompt(ours, "some words in a row")
    assert ids[0] == bos and ids.count(bos) == 1
    cut = tokenizers.cut_start(ours, ids, 3)
    assert cut == [bos, *ids[-2:]] and tokenizers.cut_start(ours, ids, 1) == ids[-1:]
    ours = chat.set_chat(ours, "auto", "", kinds["llama3"])
    ids = tokenizers.encode_prompt(ours, chat.written([("user", "Hi")], ours.chat))
    assert ids[0] == bos and ids.count(bos) == 1
    plain = tokenizers.pretrained_tokenizer(kinds["gpt2"])
    assert tokenizers.cut_start(plain, [5, 6, 7], 2) == [6, 7]


def test_the_sampler_stops_at_every_end_that_generation_config_names(kinds, tmp_path, capsys):
    for path in kinds["qwen"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    n = tokenizers.pretrained_tokenizer(tmp_path).eot_token
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [n + 2, n]}))
    ours = tokenizers.pretrained_tokenizer(tmp_path)
    assert ours.end_tokens == (n, n + 2)
    capsys.readouterr()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [n, 9999, 40]}))
    assert tokenizers.pretrained_tokenizer(tmp_path).end_tokens == (n, 40)      # ordinary ones too
    assert "has eos_token_id [9999], which the tokenizer does not have" in capsys.readouterr().out
    ours = chat.set_chat(ours, "auto", "", tmp_path)     # now the END_OF is what ends a turn
    assert ours.eot_token == n + 2 and ours.end_tokens == (n + 2, n)
    text = ours.encode_ordinary("yes")
    assert tokenizers.decode_response(ours, text + [n]) == ("yes", True)
    assert tokenizers.decode_response(ours, text + [n + 2]) == ("yes", True)
    assert tokenizers.decode_response(ours, text) == ("yes", False)


# ---- chat templates

DIALOGUES = [[("user", "Hi")], [("system", "Be brief."), ("user", " 2 + 2?\n")],
             [("user", "a"), ("assistant", "b"), ("user", "c")],
             [("system", "S"), ("user", "a"), ("assistant", "b\n\nc"), ("user", "<|im_end|> 1999")]]


@pytest.mark.parametrize("kind", ["qwen", "llama3", "smollm2"])
def test_dialogues_are_the_ids_that_the_models_own_template_gives(kind, kinds, capsys):
    from tokenizers import Tokenizer
    ours = chat.set_chat(tokenizers.pretrained_tokenizer(kinds[kind]), "auto", "", kinds[kind])
    assert "note: the model's" not in capsys.readouterr().out
    theirs = Tokenizer.from_file(str(kinds[kind] / "tokenizer.json"))
    for turns in DIALOGUES:
        if "<|im_end|>" in turns[-1][1]:                 # there theirs takes it for the token
            turns = [*turns[:-1], ("user", "1999")]
        text = chat.rendered(TEMPLATES[kind], turns, ours)
        ids = ours.encode_ordinary(chat.written(turns, ours.chat))
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text == chat.rendered(chat.jinja_of(ours), turns, ours)


@pytest.mark.parametrize("kind", ["qwen", "llama3", "smollm2"])
def test_text_never_ends_a_turn_or_starts_one(kind, kinds):
    ours = chat.set_chat(tokenizers.pretrained_tokenizer(kinds[kind]), "auto", "", kinds[kind])
    special = set(ours._special_tokens.values())
    clean = ours.encode_ordinary(chat.written([("user", "hi")], ours.chat))
    for token in ours._special_tokens:
        forged = f"hi{token}{tokenizers.MARK}{token}"
        ids = ours.encode_ordinary(chat.written([("user", forged)], ours.chat))
        n_special = sum(i in special for i in ids)
        assert n_special == sum(i in special for i in clean) or token == "<think>"


def test_an_exported_tokenizer_writes_dialogues_as_ours_does(kinds, tmp_path, capsys):
    """With the default system turn, whose quotes and line ends are kept"""
    from transformers import AutoTokenizer
    ours = tokenizers.pretrained_tokenizer(kinds["qwen"])
    ours = chat.set_chat(ours, "chatml", 'Say "so" \U0001f600.\n', kinds["qwen"])
    tokenizers.export_tokenizer(ours, tmp_path, chat_template=chat.jinja_of(ours))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for turns in DIALOGUES[:3]:
        messages = [{"role": role, "content": text} for role, text in turns]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == ours.encode_ordinary(chat.written(turns, ours.chat, ours.system))
    capsys.readouterr()
    again = tokenizers.pretrained_tokenizer(tmp_path)
    again = chat.set_chat(again, "auto", ours.system, tmp_path)
    assert again.chat == "chatml" and again.eot_token == ours.eot_token
    assert capsys.readouterr().out == ""
    assert chat.jinja_of(tokenizers.pretrained_tokenizer(kinds["gpt2"])) is None


def test_a_note_says_where_the_models_template_differs(kinds, tmp_path, capsys):
    for path in kinds["qwen"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = ("{% if messages[0]['role'] != 'system' %}"
           "{{ '<|im_start|>system\nBe nice.<|im_end|>\n' }}{% endif %}" + CHATML)
    (tmp_path / "chat_template.jinja").write_text(own)   # wins over tokenizer_config.json
    ours = tokenizers.pretrained_tokenizer(tmp_path)
    chat.set_chat(ours, "auto", "", tmp_path)
    note = capsys.readouterr().out
    assert "own chat template writes '<|im_start|>system\\nBe nice.<|im_end|>" in note
    chat.set_chat(ours, "auto", "Be nice.", tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / "chat_template.jinja").write_text("{{ broken")
    chat.set_chat(ours, "chatml", "", tmp_path)
    assert "could not be compared" in capsys.readouterr().out


def test_templates_and_tokens_that_are_not_known_are_refused(kinds, tmp_path):
    for path in kinds["gpt2"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    ours = tokenizers.pretrained_tokenizer(tmp_path)
    assert chat.set_chat(ours, "auto", "", tmp_path).chat == "plain"
    with pytest.raises(ValueError, match="writes <.im_start.>, <.im_end.>, which this tokenizer"):
        chat.set_chat(ours, "chatml", "", tmp_path)
    qwen = tokenizers.pretrained_tokenizer(kinds["qwen"])
    for foreign in ("[INST] {{ messages[0].content }} [/INST]", "{# no <|im_start|> #} {{ 1 }}",
                    CHATML.replace("\n'", "<|endoftext|>'")):
        (tmp_path / "chat_template.jinja").write_text(foreign)
        with pytest.raises(ValueError, match="neither chatml nor llama3; give --chat plain"):
            chat.set_chat(qwen, "auto", "", tmp_path)
    assert chat.set_chat(ours, "plain", "", tmp_path).chat == "plain"


SHOWN = {"\ufdd0<|im_start|>": "[", "\ufdd0<|im_end|>\n": "]"}


def chatml_record(record, system=""):
    prompt, responses = forms.read_record(record, [], "chatml", system)
    for token, short in SHOWN.items():
        prompt = prompt.replace(token, short)
    return prompt, responses


HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello. "}]
MARKED = "a\ufdd0<|im_end|>"


@pytest.mark.parametrize("record, prompt, responses", [
    ({"prompt": "Hi", "completion": " Hello."}, "[user\nHi][assistant\n", ["Hello."]),
    ({"prompt": "Hi"}, "[user\nHi][assistant\n", []),
    ({"system": "S", "prompt": "Hi"}, "[system\nS][user\nHi][assistant\n", []),
    ({"messages": HELLO}, "[user\nHi][assistant\n", [" Hello. "]),
    ({"system": "S", "messages": HELLO}, "[system\nS][user\nHi][assistant\n", [" Hello. "]),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
     "[user\nHi][assistant\n", ["Yes", "No"]),
    ({"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "completion": " d"},
     "[user\na][assistant\nb][user\nc][assistant\n", ["d"]),
    ({"prompt": "Hi", "completion": "Hi there"}, "[user\nHi][assistant\n", ["there"]),
    ({"prompt": HELLO[:1] + [{"role": "assistant", "content": "Hel"}], "completion": "lo"},
     "[user\nHi][assistant\nHel", ["lo"]),
    ({"prompt": "Human: hi\n\nAssistant:", "completion": " d"}, "[user\nhi][assistant\n", ["d"]),
    ({"prompt": "\n\nHuman: hi\n\nAssistant: I think", "completion": " so"},
     "[user\nhi][assistant\nI think", [" so"]),
    ({"prompt": "Write a play.\n\nHuman: hello"},
     "[user\nWrite a play.\n\nHuman: hello][assistant\n", []),
    ({"text": "as it is"}, "", ["as it is"]),
    ({"text": MARKED}, "", ["a\ufffd<|im_end|>"]),
    ({"prompt": MARKED, "completion": MARKED}, "[user\na\ufffd<|im_end|>][assistant\n",
     ["a\ufffd<|im_end|>"]),
    ({"messages": [{"role": "user", "content": MARKED}, {"role": "assistant", "content": MARKED}]},
     "[user\na\ufffd<|im_end|>][assistant\n", ["a\ufffd<|im_end|>"])])
def test_records_are_written_by_the_template(record, prompt, responses):
    assert chatml_record(record) == (prompt, responses)


def test_a_system_turn_is_added_only_where_there_is_none():
    assert chatml_record({"prompt": "Hi"}, "S")[0] == "[system\nS][user\nHi][assistant\n"
    assert (chatml_record({"system": "T", "prompt": "Hi"}, "S")[0]
            == "[system\nT][user\nHi][assistant\n")
    assert chatml_record({"text": "x"}, "S")[0] == ""


# --------------------------------------------------------------------------------------------------
# forms.py, corpus.py

def by(role):
    """A function that makes a message by a role from a text"""
    return lambda text: {"role": role, "content": text}


USER, ASSISTANT, SYSTEM = map(by, ("user", "assistant", "system"))
HI = f"{HUMAN}hi{TURN}"
KIND_HI = f"\n\nSystem: Be kind.{HI}"
YES = [USER("hi"), ASSISTANT("yes")]
NO = [USER("hi"), ASSISTANT("no")]
SURE = [USER("hi"), ASSISTANT("Sure,")]
SYSTEM_FROM, HUMAN_FROM, GPT_FROM = (
    {"from": "system", "value": "Be kind."}, {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "yes"})


@pytest.mark.parametrize("record, prompt, responses", [
    ({"chosen": f"{HI} hello", "rejected": f"{HI} go away"}, HI, [" hello", " go away"]),
    ({"chosen": f"{HUMAN}a{TURN} b{HI} d", "rejected": f"{HUMAN}a{TURN} b{HI} e"},
     f"{HUMAN}a{TURN} b{HI}", [" d", " e"]),
    ({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "2 + 2 =", [" 4", " 5"]),
    ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 =", [" 4"]),
    ({"text": "Once upon a time", "label": 1}, "", ["Once upon a time"]),
    ({"text": "2 + 2 = 4", "prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 =", [" 4"]),
    ({"messages": [SYSTEM("Be kind."), *YES]}, KIND_HI, [" yes"]),
    ({"prompt": [USER("hi")], "chosen": [ASSISTANT("yes")], "rejected": [ASSISTANT("no")]},
     HI, [" yes", " no"]),
    ({"prompt": "hi", "chosen": YES, "rejected": NO}, HI, [" yes", " no"]),
    ({"chosen": YES, "rejected": NO}, HI, [" yes", " no"]),
    ({"prompt": [USER("hi")], "completion": " as text"}, HI, [" as text"]),
    ({"info": {"id": "t3", "post": "I did it.", "title": "TIFU", "subreddit": "tifu"},
      "summaries": [{"text": " worse", "policy": "a"}, {"text": " better", "policy": "b"}],
      "choice": 1, "worker": "w", "split": "train"},
     "SUBREDDIT: r/tifu\n\nTITLE: TIFU\n\nPOST: I did it.\n\nTL;DR:", [" better", " worse"]),
    ({"info": {"article": "News."}, "summaries": [{"text": " a"}, {"text": " b"}], "choice": 0},
     "Article:\n\nNews.\n\nTL;DR:", [" a", " b"]),
    ({"conversations": [SYSTEM_FROM, HUMAN_FROM, GPT_FROM]}, KIND_HI, [" yes"]),
    ({"conversations": [HUMAN_FROM], "chosen": GPT_FROM, "rejected": GPT_FROM | {"value": "no"}},
     HI, [" yes", " no"]),
    ({"messages": [USER("hi")], "chosen": ASSISTANT("yes"), "rejected": "no"}, HI, [" yes", " no"]),
    ({"prompt": "hi", "messages": [USER("x")], "chosen": ASSISTANT("yes"), "rejected": "no"},
     HI, [" yes", " no"]),
    ({"messages": YES, "chosen": YES, "rejected": NO}, HI, [" yes", " no"]),
    ({"instruction": "Add.", "input": "2, 2", "output": "4"}, f"{HUMAN}Add.\n\n2, 2{TURN}", [" 4"]),
    ({"instruction": "hi", "input": "", "chosen": "yes", "rejected": "no"}, HI, [" yes", " no"]),
    ({"prompt": "2 + 2 =", "answer": "4"}, "2 + 2 =", []),
    ({"prompt": [USER("hi")]}, HI, []),
    ({"messages": [USER("hi")]}, HI, []),
    ({"prompt": "p", "chosen": None, "rejected": None, "completion": " c"}, "p", [" c"]),
    ({"messages": [by("developer")("Be kind."), by("User")("hi"),
                   by("model")([{"type": "text", "text": "hel"}, "lo"])]}, KIND_HI, [" hello"]),
    # messages keep their turns, and nothing of a prompt is dropped
    ({"messages": [USER(f"a{TURN} b"), ASSISTANT(f"c{HUMAN}d{TURN} e")]},
     f"{HUMAN}a{TURN} b{TURN}", [f" c{HUMAN}d{TURN} e"]),
    ({"messages": [USER("a"), ASSISTANT("b"), ASSISTANT("c")]}, f"{HUMAN}a{TURN} b{TURN}", [" c"]),
    ({"messages": [USER("a"), ASSISTANT("b"), USER("c")]}, f"{HUMAN}a{TURN} b{HUMAN}c{TURN}", []),
    ({"prompt": [SYSTEM("Be kind.")], "chosen": YES, "rejected": NO}, KIND_HI, [" yes", " no"]),
    ({"prompt": [USER("a"), ASSISTANT("b")], "completion": [USER("c"), ASSISTANT("d")]},
     f"{HUMAN}a{TURN} b{HUMAN}c{TURN}", [" d"]),
    ({"prompt": [USER("a"), ASSISTANT("b"), USER("a")], "completion": [USER("a"), ASSISTANT("d")]},
     f"{HUMAN}a{TURN} b{HUMAN}a{TURN}", [" d"]),
    ({"prompt": "hi ", "messages": [SYSTEM("Be kind."), *YES]}, KIND_HI, [" yes"]),
    ({"prompt": "Be kind.", "messages": YES}, f"{HUMAN}Be kind.{HI}", [" yes"]),
    ({"prompt": SURE, "chosen": " yes", "rejected": "no"}, f"{HI} Sure,", [" yes", "no"]),
    ({"prompt": SURE, "completion": [ASSISTANT(" yes")]}, f"{HI} Sure,", [" yes"]),
    ({"prompt": SURE, "completion": [*SURE, ASSISTANT(" yes")]}, f"{HI} Sure,", [" yes"]),
    ({"prompt": SURE, "completion": [USER("hi"), ASSISTANT("Sure, yes")]}, f"{HI} Sure,", [" yes"]),
    ({"prompt": SURE}, f"{HI} Sure,", []),
    ({"prompt": [USER("hi"), ASSISTANT("")], "completion": "yes"}, HI, [" yes"]),
    ({"system": "S", "prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
     "S\n\n2 + 2 =", [" 4", " 5"]),
    ({"system": "Be kind.", "chosen": f"{HI} b", "rejected": f"{HI} c"}, KIND_HI, [" b", " c"]),
    ({"system": "Be kind.", "prompt": [USER("hi")], "chosen": YES, "rejected": "c"},
     KIND_HI, [" yes", " c"]),
    ({"system": "Be kind.", "messages": [SYSTEM("Be kind."), *YES]}, KIND_HI, [" yes"]),
    ({"system": "", "prompt": "p", "completion": " c"}, "p", [" c"])])
def test_every_form_becomes_a_prompt_and_responses(record, prompt, responses):
    """The better response comes first."""
    assert forms.read_record(record) == (prompt, responses)


UNREADABLE = [                                           # lines and records, and why
    ('{"prompt": "p", "completion": " c"', "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("\x00\x01", "not JSON"),
    ('{"prompt": "p", "completion": " \x01"}', "not JSON"),
    ("1" * 5000, "not JSON"),
    ("null", "not a JSON object"),
    ([1, 2], "not a JSON object"),
    ({}, "none of the known forms: keys "),
    ({"question": "?", "answer": "!"}, "none of the known forms: keys answer, question"),
    ({"prompt": "p", "completion": 3}, "a text is not a string"),
    ({"prompt": 0, "completion": " c"}, "a text is not a string"),
    ({"messages": [USER("a")], "prompt": 5}, "a text is not a string"),
    ({"prompt": "p", "chosen": " a", "rejected": None}, "only one of chosen and rejected"),
    ({"prompt": "p", "completion": " \n\t"}, "an empty response"),
    ({"prompt": "", "completion": " bad", "label": False}, "labelled undesirable"),
    ({"prompt": "p", "chosen": " a", "rejected": ""}, "an empty response"),
    ({"prompt": "", "answer": "4"}, "an empty prompt and no response"),
    ({"prompt": []}, "an empty prompt and no response"),
    ('{"prompt": "p \\ud800", "completion": " c"}', "a lone surrogate, which is not valid text"),
    ({"messages": [ASSISTANT(None)]}, "a message by assistant whose content is not a text"),
    ({"messages": [USER([{"type": "image_url"}])]}, "a message by user whose content is not a"),
    ({"messages": "hello"}, "no prompt, and the texts share no assistant turn"),
    ({"messages": [by("tool")("x"), ASSISTANT("y")]},
     "a message by tool; the role must be user, assistant or system"),
    ({"messages": [by(["user"])("x")]}, "a message by ['user']; the role"),
    ({"messages": ["hi"]}, "a message without a role and content"),
    ({"messages": []}, "messages without a turn; there must be at least one"),
    ({"chosen": [USER("a")], "rejected": [USER("a")]},
     "a comparison that does not end in an assistant turn"),
    ({"info": {"post": None, "title": "t", "subreddit": "s"},
      "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
     "a comparison of summaries without its texts"),
    ({"info": [], "summaries": [], "choice": "x"}, "a comparison of summaries without its texts"),
    ({"chosen": "a", "rejected": "b"}, "no prompt, and the texts share no assistant turn"),
    ({"chosen": f"{HUMAN}a{TURN} b{HUMAN}c{TURN} d", "rejected": f"{HUMAN}a{TURN} x"},
     "the dialogues differ before their last turn"),
    ({"chosen": [USER("a"), ASSISTANT("b")], "rejected": [USER("x"), ASSISTANT("b")]},
     "the dialogues differ before their last turn"),
    ({"chosen": [SYSTEM("S"), USER("a"), ASSISTANT("b")], "rejected": [USER("a"), ASSISTANT("c")]},
     "the dialogues differ before their last turn")]


def test_a_line_that_cannot_be_used_is_left_out_and_named_with_the_reason(empty_folder):
    good = [json.dumps(comparison(i)) for i in range(3)]
    lines = [line if isinstance(line, str) else json.dumps(line) for line, _ in UNREADABLE]
    content = "\n".join([*good, *lines, *good, lines[0]])                      # without a last \n
    (empty_folder / "rows.jsonl").write_bytes(content.encode())
    notes = {}
    assert len(list(corpus.examples("rows.jsonl", notes))) == 6
    said = {place: note for note, places in notes.items() for place in places}
    assert len(said) == len(UNREADABLE) + 1
    for n, (line, reason) in enumerate(UNREADABLE, 4):
        kind, text = said[f"line {n}"]
        assert kind == forms.LEFT_OUT and text.startswith(reason), line
    assert said[f"line {len(UNREADABLE) + 7}"] == said["line 4"]


KEPT, CHANGED, UNUSED = forms.KEPT, forms.CHANGED, forms.UNUSED
REPEATED = (CHANGED, "began each response with the prompt, which was removed")


def written_out(token):
    return KEPT, f"with {token} written out in a response, where it is plain text"


@pytest.mark.parametrize("record, responses, remarks", [
    ({"prompt": "p", "completion": " c", "score": 1, "id": None}, [" c"], [(UNUSED, "score")]),
    ({"messages": [USER("a")], "chosen": "b", "rejected": "c"}, [" b", " c"], []),
    ({**comparison(0), "messages": [USER("a")]}, [" Number 0 is good", " I do not like 0."],
     [(UNUSED, "messages")]),
    ({"text": "a film", "label": 1}, ["a film"], [(UNUSED, "label")]),
    ({"prompt": "p", "chosen": " a", "rejected": " b", "label": 0}, [" a", " b"],
     [(UNUSED, "label")]),
    ({"prompt": "p", "label": 0}, [], [(UNUSED, "label")]),
    ({"prompt": "a\x00b", "completion": " c"}, [" c"], [(KEPT, "with control characters")]),
    ({"prompt": "p", "completion": "\x9b"}, ["\x9b"], [(KEPT, "with control characters")]),
    ({"prompt": "tab\t", "completion": " line\r\n"}, [" line\r\n"], []),
    ({"prompt": "<|im_start|>", "chosen": " <b>a</b>", "rejected": " b</s></s>"},
     [" <b>a</b>", " b</s></s>"], [written_out("</s>")]),
    ({"prompt": "p", "completion": " <|im_end|><｜end▁of▁sentence｜><|eot_id|>"},
     [" <|im_end|><｜end▁of▁sentence｜><|eot_id|>"],
     list(map(written_out, ["<|eot_id|>", "<|im_end|>", "<｜end▁of▁sentence｜>"]))),
    ({"prompt": "Is it?", "chosen": "Is it? Yes.", "rejected": "Is it? No."}, [" Yes.", " No."],
     [REPEATED]),
    ({"prompt": "1 + 1", "text": "1 + 1 = 2"}, [" = 2"], [REPEATED]),
    ({"prompt": "Is it?", "chosen": "Is it? Yes.", "rejected": " No."}, ["Is it? Yes.", " No."],
     [(KEPT, "with one response that repeats the prompt")]),
    ({"prompt": "He", "completion": "Hello"}, ["Hello"], []),
    ({"prompt": "copy me", "completion": "copy me"}, ["copy me"], []),
    ({"prompt": " ", "completion": " a"}, [" a"], [])])
def test_what_is_odd_about_a_record_that_is_read_is_remarked(record, responses, remarks):
    found = []
    assert forms.read_record(record, found)[1] == responses and found == remarks


@pytest.mark.parametrize("labels, kept, remarks", [
    ((True, 1, 1.0, "true", "desirable"), True, []),
    ((False, 0, 0.0, -1, "False", " Undesirable ", "0"), False,
     [(forms.LEFT_OUT, "labelled undesirable")]),
    (("math", 7, [0]), True, [(UNUSED, "label")])], ids=["good", "bad", "unknown"])
def test_a_label_leaves_an_undesirable_response_out_in_every_form(labels, kept, remarks):
    for form in ({"prompt": "hi", "completion": " yes"},
                 {"prompt": [USER("hi")], "completion": "yes"},
                 {"prompt": "hi", "text": " yes"},
                 {"messages": YES},
                 {"conversations": [HUMAN_FROM, GPT_FROM]},
                 {"instruction": "hi", "output": "yes"}):
        for label in labels:
            found = []
            prompt, responses = forms.read_record({**form, "label": label}, found)
            assert prompt in ("hi", HI) and responses == ([" yes"] if kept else [])
            assert found == remarks
    assert forms.read_record({"prompt": "hi", "completion": " yes", "kto_tag": 0}) == ("hi", [])


def cfg_for(folder, rows, **changes):
    """Settings whose --data is a file of these rows"""
    return texts_cfg(write_rows(folder / "rows.jsonl", rows), **changes)


def rows_for(folder, tokenizer, rows, **changes):
    """These rows, written to a file, read back and tokenised"""
    return corpus.rows_of(cfg_for(folder, rows, **changes), tokenizer, 90)


def total(parts):
    """The number of rows to train on and held out, together"""
    return sum(map(len, parts))


def mixed_rows():
    """130 comparisons, thirty prompts twice; from line 5 on three bad rows and a long one"""
    rows = [comparison(i % 100, words=12) for i in range(130)]
    rows[4:4] = ["{broken", "", {"prompt": "p", "completion": "\n"}, {"other": 1},
                 {"prompt": "x", "completion": " " + "long " * 200}]
    return rows


def test_rows_are_cut_to_fit_and_what_is_left_out_is_counted(empty_folder, tokenizer, capsys):
    rows = mixed_rows()
    ours = rows_for(empty_folder, tokenizer, rows)
    said = capsys.readouterr().out
    assert len(ours) == 131
    for prompt, better, worse in ours:
        assert 1 <= len(prompt) <= 60 and len(prompt) + max(len(better), len(worse)) <= 90
    comparisons = [row for row in rows if isinstance(row, dict) and "chosen" in row]
    whole = [tokenizers.encode_prompt(tokenizer, forms.read_record(row)[0]) for row in comparisons]
    kept = [prompt for prompt, _, worse in ours if worse]
    assert kept == [prompt[-60:] for prompt in whole]    # the end is kept
    cut = sum(len(prompt) > 60 for prompt in whole)
    assert cut > 20
    for part in (
            f"131 rows, {sum(ours.held_out)} of them held out; {cut} prompts cut to their last 60",
            "1 rows with a response cut to fit into 90",
            "1 more left out, not JSON: line 5",
            "1 more left out, an empty response: line 7",
            "1 more left out, none of the known forms: keys other: line 8"):
        assert part in said, part


def test_remarks_are_counted_and_named_by_their_first_lines(empty_folder, tokenizer):
    rows = [{**comparison(i), "score": i, "id": None if i % 2 else "x"} for i in range(60)]
    rows += [{"prompt": "p", "completion": " \x1b[2J"}]
    rows += [{"prompt": f"x {i}", "chosen": " same", "rejected": " same"} for i in range(40)]
    rows += [{"prompt": "Is it?", "completion": "Is it? Yes."}] * 6
    rows += ['{"\\ud800": 1, "\\u001b[2J": 2}']
    cfg = cfg_for(empty_folder, rows)
    read = corpus.rows_of(cfg, tokenizer, 90)
    first, *others = read.report.splitlines()
    assert first.endswith(", 40 with two equal responses, which compare nothing")
    assert total(data.comparisons(cfg, tokenizer, 90, None, None)) == 60
    assert total(data.demonstrations(cfg, tokenizer, 90, None, None)) == 107
    assert others == [
        "1 more left out, none of the known forms: keys \\x1b[2J, \\ud800: line 108",
        "6 of them began each response with the prompt, which was removed: line 102, line 103, "
        "line 104, line 105, line 106, ..",
        "1 of them kept as they are, with control characters: line 61",
        "fields not used: id (30 rows), score (60 rows)"]
    assert tokenizer.decode(read[60][1]) == " \x1b[2J<|endoftext|>"
    many = {"prompt": "p", "completion": " c"} | {f"field{n}": 1 for n in range(30)}
    report = rows_for(empty_folder, tokenizer, [many, many, *rows]).report
    assert "\nfields not used: field0 (2 rows), field1 (2 rows), " in report
    assert report.endswith(", ..")
    harmless = "a\tb\r\nc \u00e9\u6f22"
    assert files.visible(harmless) == harmless


def test_a_held_out_prompt_is_never_trained_on_and_stays_held_out(empty_folder, tokenizer):
    cfg = cfg_for(empty_folder, mixed_rows())
    ours = corpus.rows_of(cfg, tokenizer, 90)
    prompts = [prompt for prompt, _, _ in ours]
    train, held = data.prompts(cfg, tokenizer, 90)
    assert len(train) + len(held) == len(set(map(tuple, prompts))) == sum(ours.first)
    assert len(held) > 4 and len(train) > 3 * len(held)
    assert not set(map(tuple, train)) & set(map(tuple, held))
    for i, prompt in enumerate(prompts):                 # the second time as the first
        assert ours.held_out[i] == ours.held_out[prompts.index(prompt)]
    better, worse = data.comparisons(cfg, tokenizer, 90, None, 1000)[0][0]["response_ids"]
    assert better[-1] == worse[-1] == tokenizer.eot_token
    assert tokenizer.decode(better).startswith(" Number")
    assert len(data.comparisons(cfg, tokenizer, 90, 7, 2)[0]) == 7
    assert data.demonstrations(cfg, tokenizer, 90, None, 5)[1][0][1][-1] == tokenizer.eot_token


def test_a_prompt_is_held_out_by_its_whole_text_wherever_it_is_cut(empty_folder, tokenizer):
    prompts = ["and so on " * 20 + f"number {i}" for i in range(90)]
    rows = [{"prompt": prompt, "completion": " yes"} for prompt in prompts]
    wanted = [corpus.held_out(prompt.encode()) for prompt in prompts]
    assert any(wanted)
    for n in (12, 30, 60):
        read = rows_for(empty_folder, tokenizer, rows, max_prompt_tokens=n)
        assert read.held_out.tolist() == wanted
    # The first byte of the hash is 31, and 32: as in runs of earlier versions
    assert corpus.held_out(b"number 26") and not corpus.held_out(b"number 202")


def test_prompts_that_a_cut_makes_equal_are_on_one_side(empty_folder, tokenizer):
    rows = [{"prompt": f"number {i} " + "and so on " * 20, "completion": " yes"} for i in range(60)]
    rows += [{"prompt": f"number {i}", "completion": " yes"} for i in range(60)]
    ours = rows_for(empty_folder, tokenizer, rows, max_prompt_tokens=10)
    assert len({tuple(ours[i][0]) for i in range(60)}) == 1 and not ours.held_out[:60].any()
    assert ours.first.sum() == 61 and ours.held_out[60:].any()


def test_rows_that_share_one_prompt_are_held_out_by_the_whole_row(empty_folder, tokenizer):
    rows = [{"prompt": "Praise it:", "chosen": f" good {i}", "rejected": f" bad {i}"}
            for i in range(80)]
    cfg = cfg_for(empty_folder, rows + rows)
    read = corpus.rows_of(cfg, tokenizer, 90)
    assert "\ntoo few prompts to hold some of them out: rows are held out by a hash " in read.report
    assert f" {read.held_out.sum()} of these share their prompt with training rows" in read.report
    wanted = [corpus.held_out(f"Praise it:\0 good {i}\0 bad {i}".encode()) for i in range(80)]
    assert read.held_out.tolist() == wanted + wanted     # equal rows are on one side
    train, held = data.comparisons(cfg, tokenizer, 90, None, None)
    assert len(train) > 100 and len(held) > 5 and len(train) + len(held) == 160
    assert [len(part) for part in data.prompts(cfg, tokenizer, 90)] == [1, 1]
    others = [{"prompt": f"Praise {i}:", "completion": f" good {i}"} for i in range(40)]
    read = rows_for(empty_folder, tokenizer, rows + others)
    assert "too few" not in read.report and len(set(read.held_out[:80])) == 1
    alone = rows_for(empty_folder, tokenizer, rows[:1])
    assert "too few" not in alone.report                 # a hash of the row would not help either


def test_rows_come_in_a_shuffled_order_that_is_the_same_for_every_seed(empty_folder, tokenizer):
    rows = [{"prompt": f"{i} is", "completion": " good" if i < 100 else " bad"} for i in range(200)]
    taken = []
    for seed in (1, 2):
        train, _ = data.demonstrations(
            cfg_for(empty_folder, rows, seed=seed), tokenizer, 90, 40, 10)
        taken.append([response for _, response in train])
    assert taken[0] == taken[1]
    assert len(set(map(tuple, taken[0][:20]))) == 2      # both kinds are among the first


def test_stored_rows_are_used_until_something_changes(empty_folder, tokenizer, capsys, monkeypatch):
    cfg = cfg_for(empty_folder, mixed_rows())
    ours = list(corpus.rows_of(cfg, tokenizer, 90))
    said = capsys.readouterr().out
    corpus.load_rows.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "tokenise", None)          # a second start tokenises nothing
        assert list(corpus.rows_of(cfg, tokenizer, 90)) == ours
    assert said == capsys.readouterr().out and said
    cut_more = dataclasses.replace(cfg, max_prompt_tokens=40)
    assert list(corpus.rows_of(cut_more, tokenizer, 90)) != ours
    assert len(rows_for(empty_folder, tokenizer, mixed_rows()[:100])) == 96
    assert len(list((empty_folder / "out" / "tokens").iterdir())) == 3


def test_stored_rows_that_were_damaged_are_made_again(empty_folder, tokenizer, capsys):
    cfg = cfg_for(empty_folder, [comparison(i) for i in range(60)])
    rows = list(corpus.rows_of(cfg, tokenizer, 90))
    stored, = (empty_folder / "out" / "tokens").iterdir()
    whole = stored.read_bytes()
    at = whole.index(np.load(stored)["tokens"].tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
    np.savez(stored, tokens=np.zeros(3))                 # whole, but nothing of ours
    for content in (b"", b"\xff" * 100, whole[:-9], flipped, stored.read_bytes()):
        corpus.load_rows.cache_clear()
        capsys.readouterr()
        stored.write_bytes(content)
        assert list(corpus.rows_of(cfg, tokenizer, 90)) == rows
        assert f"{stored.name}, which stores these rows, is damaged" in capsys.readouterr().out
    assert list((empty_folder / "out" / "tokens").iterdir()) == [stored]


def test_files_of_a_folder_are_named_and_repeated_rows_counted(empty_folder, tokenizer):
    rows = [json.dumps(comparison(i)) for i in range(60)]
    write_rows(empty_folder / "a" / "x.jsonl", [*rows, rows[0]])               # twice in one file
    for name in (".x.jsonl", ".cache/x.jsonl", "b/._x.json", "notes.txt"):     # not read
        write_rows(empty_folder / "a" / name, rows)
    (empty_folder / "a" / "folder.jsonl").mkdir()
    with gzip.open(empty_folder / "a" / "x.jsonl.gz", "wt") as file:
        file.write("\n".join(rows[30:]))
    write_rows(empty_folder / "a" / "b" / "x.jsonl", [json.dumps(comparison(60)), "{"])
    report = corpus.rows_of(texts_cfg(empty_folder / "a"), tokenizer, 90).report.splitlines()
    assert "a: 92 rows, " in report[0]
    assert report[1:] == [
        "files read: b/x.jsonl, x.jsonl, x.jsonl.gz",
        "1 more left out, not JSON: b/x.jsonl line 2",
        "30 of them kept as they are, repeating a row of an earlier file: x.jsonl.gz line 1, "
        "x.jsonl.gz line 2, x.jsonl.gz line 3, x.jsonl.gz line 4, x.jsonl.gz line 5, .."]


def test_a_plain_text_is_read_in_pieces_cut_at_line_ends(empty_folder, tokenizer):
    story = "".join(f"line {i} of a long story\n" for i in range(2000))
    (empty_folder / "plain.txt").write_text(story)
    pieces = list(corpus.pieces(empty_folder / "plain.txt"))
    assert "".join(pieces) == story
    assert max(map(len, pieces)) <= 1000 and len(pieces) > 40
    assert all(piece.endswith("\n") for piece in pieces)
    (empty_folder / "one-line.txt").write_text("word " * 1000 + "\nend")
    lengths = [len(piece) for piece in corpus.pieces(empty_folder / "one-line.txt")]
    assert lengths == [1000, 1000, 1000, 1000, 1000, 4]
    cfg = texts_cfg("plain.txt")
    prompt, response, worse = corpus.rows_of(cfg, tokenizer, 90)[0]
    assert prompt == [tokenizer.eot_token] and worse == []
    assert tokenizer.decode(response).startswith("line 0 of a long story\n")
    with refused(".* has no comparisons, only rows with one response"):
        data.comparisons(cfg, tokenizer, 90, None, 10)
    whole = tokenizer.encode_ordinary(pieces[0])
    with_prompts = corpus.rows_of(texts_cfg("plain.txt", text_prompt=5), tokenizer, 90)
    assert with_prompts[0] == (whole[:5], whole[5:90], [])
    rows = [{"text": "abc"}] + [{"text": f"number {i} and more words"} for i in range(40)]
    short = rows_for(empty_folder, tokenizer, rows, text_prompt=4)
    assert "no response left: line 1" in short.report
    (empty_folder / "latin.txt").write_bytes(b"caf\xe9 and so on, a longer line\n" * 2000)
    read = corpus.rows_of(texts_cfg(empty_folder / "latin.txt"), tokenizer, 90)
    assert (f"\n{len(read)} of them kept as they are, with bytes that are not UTF-8, read as "
            "\ufffd: piece 1, piece 2") in read.report


def test_prompts_alone_serve_rl_and_sft_takes_the_rows_with_a_response(empty_folder, tokenizer):
    """A response that is labelled undesirable is left out, too."""
    prompts = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(70)]
    prompts += [{"prompt": f"What is {i}?", "text": " this", "label": 0} for i in range(70, 80)]
    cfg = cfg_for(empty_folder, prompts)
    read = corpus.rows_of(cfg, tokenizer, 90)
    assert "rows.jsonl: 80 prompts without a response, " in read.report
    assert read[3][1:] == ([], []) and total(data.prompts(cfg, tokenizer, 90)) == 80
    with refused(".* prompts but no responses, so SFT has nothing to learn from"):
        data.demonstrations(cfg, tokenizer, 90, None, None)
    with refused(".* no comparisons, .* A reward model and DPO learn from"):
        data.comparisons(cfg, tokenizer, 90, None, None)
    with refused(".* has no comparisons, only rows with one response or none"):
        data.check_comparisons(cfg)
    cfg = cfg_for(empty_folder, prompts + [comparison(i) for i in range(60)])
    assert "rows.jsonl: 60 rows and 80 prompts" in corpus.rows_of(cfg, tokenizer, 90).report
    assert total(data.prompts(cfg, tokenizer, 90)) == 140
    for taken in (data.demonstrations, data.comparisons):
        assert total(taken(cfg, tokenizer, 90, None, None)) == 60
    data.check_comparisons(cfg)                          # the first comparison is far down
    texts = data.some_texts(cfg, 81, 1)
    assert texts[79:] == ["What is 79?", comparison(0)["chosen"]]


ROWS = [{"prompt": f"Größe {i}: 漢", "completion": f" 🦊 {i}"} for i in range(3)]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
TEXT = "\n".join([*LINES, ""])


@pytest.mark.parametrize("content", [
    pytest.param(TEXT.encode("utf-8-sig"), id="bom"),
    pytest.param(TEXT.replace("\n", "\r\n").encode("utf-8-sig"), id="crlf"),
    pytest.param(TEXT.encode("utf-16"), id="utf16"),
    pytest.param(codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), id="utf16be"),
    pytest.param(TEXT.encode("utf-32"), id="utf32"),
    pytest.param(codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"), id="utf32be"),
    pytest.param(json.dumps(ROWS).encode(), id="array"),
    pytest.param(json.dumps(ROWS, indent=2).encode("utf-8-sig"), id="pretty"),
    pytest.param(("\n [" + ",\n".join(LINES) + "]").encode(), id="rows"),
    pytest.param(json.dumps(ROWS, ensure_ascii=False).encode("utf-16"), id="utf16array"),
    pytest.param("\n".join([*LINES[:2], ""]).encode("utf-8-sig") + LINES[2].encode("utf-8-sig"),
                 id="two files joined")])
def test_json_is_read_as_lines_or_array_in_every_encoding_gzipped_or_not(content, empty_folder):
    wanted = [(row["prompt"], [row["completion"]]) for row in ROWS]
    compressed = gzip.compress(content)
    for name, written in (("a.jsonl", content), ("a.json", content), ("a.json.gz", compressed)):
        (empty_folder / name).write_bytes(written)
        notes = {}
        found = list(corpus.examples(name, notes))
        assert [tuple(row[1:]) for row in found] == wanted and not notes
        assert found[2][0] in ("line 3", "item 3")
    (empty_folder / "cut.jsonl.gz").write_bytes(compressed[:-9])
    with refused(r"cut.jsonl.gz cannot be read past (its start|line \d) \(EOFError"):
        list(corpus.examples("cut.jsonl.gz", {}))


def test_texts_lose_their_byte_order_mark_and_bad_bytes_are_named(empty_folder):
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (empty_folder / "a.txt").write_text("Once upon a time\n", encoding=encoding)
        compressed = gzip.compress((empty_folder / "a.txt").read_bytes())
        (empty_folder / "b.txt.gz").write_bytes(compressed)
        for name in ("a.txt", "b.txt.gz"):
            assert [row[2] for row in corpus.examples(name, {})] == [["Once upon a time\n"]]
    for content, reason in ((b'{"prompt": "p", "completion": " caf\xe9"}\n', "not JSON"),
                            (b"[1, 2]\n", "not a JSON object"),
                            (b'[{"prompt": "p"},\n', "not JSON, nor is the file as one array")):
        (empty_folder / "c.json").write_bytes(content)
        notes = {}
        assert not list(corpus.examples("c.json", notes))
        assert [found.startswith(reason) for _, found in notes] == [True]
    (empty_folder / "c.json").write_text("[1, 2]\n" + TEXT)                    # lines, not an array
    assert len(list(corpus.examples("c.json", {}))) == 3


def test_csv_and_parquet_are_named_with_a_command_that_converts_them(empty_folder):
    (empty_folder / "a b.csv").write_text('prompt,completion\n"2, 3","it\'s ""5"""\n',
                                          encoding="utf-8-sig")
    with refused("--data got a b.csv; it takes JSON. To convert") as stopped:
        corpus.check_source("a b.csv")
    command = str(stopped.value).split("To convert it: python", 1)[1]
    subprocess.run(sys.executable + command, shell=True, check=True)
    assert [row[1:] for row in corpus.examples("a b.csv.jsonl", {})] == [("2, 3", ['it\'s "5"'])]
    (empty_folder / "folder").mkdir()
    (empty_folder / "folder" / "x.parquet").touch()
    with refused(".*without any .jsonl.*x.parquet. .*pandas.read_parquet.*x.parquet.jsonl"):
        corpus.check_source("folder")
    with refused("--ptx_data got folder/x.parquet; it takes JSON"):
        corpus.check_source("folder/x.parquet", "--ptx_data")


@pytest.mark.parametrize("content, changes, message", [
    (None, {}, "--data got .*rows.jsonl; it takes reviews, hh, tldr, hf:OWNER/NAME, or an existing "
               "file or folder"),
    (os.mkfifo, {}, "--data got .*rows.jsonl; it takes reviews, hh"),
    (os.mkdir, {}, ".* is a folder without any .jsonl"),
    ([], {}, ".* has no row that could be read: it is empty. The first lines of lab/forms.py"),
    (["{"], {}, r".* has no row that could be read: not JSON \(line 1\)"),
    ([comparison(0)], {}, ".* 1 rows to train on and 0 held out; there must be some of both"),
    (80, dict(max_prompt_tokens=90), "--max_prompt_tokens 90 leaves no room for a response in the "
                                     "model's block_size 90"),
    (80, dict(max_new_tokens=31), "prompts of up to 60 tokens and --max_new_tokens 31 exceed .* "
                                  "90; lower --max_new_tokens to 30")],
    ids=["nowhere", "pipe", "void", "empty", "broken", "one", "prompts", "responses"])
def test_data_that_cannot_be_used_are_refused(content, changes, message, empty_folder, tokenizer):
    path = empty_folder / "rows.jsonl"
    if callable(content):
        content(path)
    elif content is not None:
        write_rows(path, [comparison(i) for i in range(80)] if content == 80 else content)
    with refused(message):
        data.prompts(texts_cfg(path, **changes), tokenizer, 90)


def test_files_that_cannot_be_opened_are_refused_by_name(empty_folder, tokenizer, monkeypatch):
    """Tests may run as root, who may read everything, so the refusal is simulated."""
    denied = failing(PermissionError(errno.EACCES, "Permission denied"))
    cfg = cfg_for(empty_folder, [comparison(0)])
    (empty_folder / "plain.txt").write_text("a line\n")
    corpus.digest.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", denied, raising=False)
        with refused("cannot read .*rows.jsonl .PermissionError"):
            data.prompts(cfg, tokenizer, 90)
    monkeypatch.setattr(corpus, "open", denied, raising=False)
    for name in ("rows.jsonl", "plain.txt"):
        with refused(f"{name} cannot be read past its start .PermissionError"):
            list(corpus.examples(name, {}))


@pytest.mark.parametrize("text", [
    pytest.param("word " * 2_000_000, id="words"),
    pytest.param(" " * 10_000_000, id="spaces"),
    pytest.param("a" * 10_000_000, id="a"),
    pytest.param("\\n" * 5_000_000, id="newlines"),
    pytest.param("\\u0000" * 1_700_000, id="zeros")])
def test_a_line_of_ten_megabytes_is_cut_like_any_other_row(text, empty_folder, tokenizer):
    rows = [comparison(i) for i in range(60)]
    rows += [f'{{"prompt": "p", "completion": " x{text}"}}',
             f'{{"prompt": "{text} end", "completion": " x"}}']
    cfg = cfg_for(empty_folder, rows)
    start = time.time()
    read = corpus.rows_of(cfg, tokenizer, 90)
    assert len(read) == 62 and time.time() - start < 20
    prompt, response, _ = read[60]
    assert len(prompt) + len(response) <= 90 and tokenizer.decode(response).startswith(" x")
    long_prompt, _, _ = read[61]
    assert len(long_prompt) <= 60 and tokenizer.decode(long_prompt).endswith(" end")
    assert "1 prompts cut" in read.report
    if text.startswith("w"):                             # a word of 100,000 letters takes seconds
        texts = data.some_texts(cfg, 100, 10)
        assert tokenizers.train_tokenizer(texts, 300).n_vocab <= 300


no_network = failing(OSError("no route to host"))


def test_the_hub_is_asked_for_hh_rlhfs_published_files(empty_folder, monkeypatch):
    import huggingface_hub
    path = write_rows(empty_folder / "stored.jsonl", [comparison(i) for i in range(40)])
    requests = []

    def fetch(repository, name, repo_type):
        requests.append((repository, name, repo_type))
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert len(list(corpus.examples("hh", {}))) == 80
    assert requests == [("Anthropic/hh-rlhf", "harmless-base/train.jsonl.gz", "dataset"),
                        ("Anthropic/hh-rlhf", "helpful-base/train.jsonl.gz", "dataset")]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    with refused("--data hh could not be fetched from the hub .OSError.*--data FOLDER"):
        list(corpus.examples("hh", {}))


def test_comparisons_of_summaries_are_downloaded_once(empty_folder, monkeypatch):
    record = {"info": {"post": "p", "title": "t", "subreddit": "s"},
              "summaries": [{"text": " a"}, {"text": " b"}], "choice": 0}
    request = corpus.urllib.request
    monkeypatch.setattr(request, "urlretrieve", lambda url, to: write_rows(to, [record]))
    assert [row[2] for row in corpus.examples("tldr", {})] == [[" a", " b"]] * 8
    monkeypatch.setattr(request, "urlretrieve", no_network)
    assert len(list(corpus.examples("tldr", {}))) == 8   # from the disk
    shutil.rmtree(empty_folder / "out" / "downloads")
    with refused(".*batch3.json could not be fetched .no route to host"):
        list(corpus.examples("tldr", {}))


class Loaded(list):
    """A data set as the datasets package gives it"""
    _fingerprint = "0123"


@pytest.fixture
def hub(empty_folder, monkeypatch):
    """A replacement for the datasets package with two data sets; maths/sums has configurations"""
    splits = {"main": ["train", "test"], "extra": ["train"]}

    def load_dataset(path, name="main", split=None):
        if path == "stanfordnlp/imdb":
            return Loaded({"text": f"{i} is a film of many", "label": i % 2} for i in range(100))
        if path != "maths/sums" or split not in splits[name]:
            raise ValueError("not\nthere")
        return Loaded({"prompt": name, "completion": f" {split} {i}"} for i in range(3))

    fake = types.SimpleNamespace(
        load_dataset=load_dataset,
        get_dataset_config_names=lambda path: list(splits) if path == "maths/sums" else ["main"],
        get_dataset_split_names=lambda path, name="main": splits[name])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    corpus.hub_data_set.cache_clear()
    return fake


def test_a_data_set_of_the_hub_needs_the_datasets_package(hub, tokenizer, monkeypatch):
    cfg = preset_of("imdb", sft, max_prompt_tokens=8)
    assert cfg.data == "hf:stanfordnlp/imdb"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)     # as if not installed
        with refused("--data hf:stanfordnlp/imdb needs the datasets package: pip install datasets"):
            list(corpus.examples(cfg.data, {}))
    assert "imdb: 100 rows, " in corpus.rows_of(cfg, tokenizer, 60).report
    assert total(data.demonstrations(cfg, tokenizer, 60, None, None)) == 100


def test_configurations_and_splits_of_the_hub_are_chosen_and_named(hub, tokenizer, monkeypatch):
    for source, prompt, found in (("hf:maths/sums/main:test", "main", " test 2"),
                                  ("hf:maths/sums/extra", "extra", " train 2")):
        assert list(corpus.examples(source, {}))[2] == ("row 2", prompt, [found])
        response = corpus.rows_of(texts_cfg(source), tokenizer, 90)[2][1]      # stored apart
        assert tokenizer.decode(response[:-1]) == found
    for source, choices in (
            ("maths/sums:dev", "give hf:maths/sums/CONFIGURATION, one of: main, extra"),
            ("maths/sums/extra:test", "give hf:maths/sums/extra:SPLIT, one of: train"),
            ("maths/one:dev", "give hf:maths/one:SPLIT, one of: train, test")):
        with refused(f"--data hf:{source} could not .*ValueError: not.; {re.escape(choices)}$"):
            list(corpus.examples(f"hf:{source}", {}))
    with refused("--data hf:maths/sums/man could .*/CONFIGURATION, one of: main, extra$"):
        list(corpus.examples("hf:maths/sums/man", {}))
    monkeypatch.setattr(hub, "get_dataset_config_names", no_network)
    with refused(".*ValueError: not.; check the name and the network"):
        list(corpus.examples("hf:maths/sums/main:dev", {}))


# --------------------------------------------------------------------------------------------------
# run.py: stages end to end

def base_of(script):
    """The run whose earlier stages a stage of a different run uses"""
    return "" if script is sft else "tiny"


def uninterrupted(out, script):
    """The folder of the same stage in the whole run"""
    return out / ("ladder" if script is policy_gradient else "tiny") / script.__name__


def log_lines(folder):
    log = folder / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@contextlib.contextmanager
def forked(script, *options):
    """
    The command SCRIPT.py --config tiny .. in a fork of this process, which saves it the imports

    -> the process, which does not outlive the test, and what it prints, errors included. It has a
    session of its own, as on a terminal of its own.
    """
    reading, writing = os.pipe()

    def work():
        os.setsid()
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        sys.argv = [f"{script.__name__}.py", "--config", "tiny", *options]
        runs.launch(script.main, script.Config, script.__doc__)
    process = torch.multiprocessing.get_context("fork").Process(target=work)
    process.start()
    os.close(writing)
    with open(reading) as output:
        try:
            yield process, output
        finally:
            process.kill()
            process.join()


def launched(monkeypatch, script, *options):
    """The command SCRIPT.py --config tiny .. in this process -> the message it ends with"""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--config", "tiny", *options])
    try:
        runs.launch(script.main, script.Config, script.__doc__)
    except SystemExit as end:
        return str(end)


@dataclasses.dataclass
class ToyConfig(settings.Common):
    lr: float = 0.1
    presets = {"tiny": {"save_every": 2}}


@runs.self_contained
def toy(cfg):
    """A stage that writes all that the real ones write, with a model of two weights"""
    run = runs.Run(cfg, "toy")
    if run.finished:
        return run.show()
    run.begin()
    sources = run.sources(tokenizers.train_tokenizer(["toy"], 257), data=[])
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr)
    first = run.restore(model=model, optimizer=optimizer, **sources)
    for step in run.steps(first, 5):
        theirs = random.random() + random.gauss(0, 1) + np.random.randn()      # as a reward may
        x = torch.randn(4, 1, generator=run.generator) + torch.randn(4, 1) + theirs
        loss = ((model(x) - 2 * x) ** 2).mean()
        run.backward(loss)
        run.log(step, {"loss": loss} | run.step(1.0, grad_norm=optimizer), ["loss"])
        run.checkpoint(step + 1)
    return run.finish("it learned to double", {"weight": model.weight.item()})


def toy_config(**changes):
    return ToyConfig(config="tiny", **changes)


def after_each_update(monkeypatch, act):
    """From now on act(step) is called when an update has been logged."""
    original = runs.Run.log

    def logged(run, step, *args, **kwargs):
        original(run, step, *args, **kwargs)
        act(step)
    monkeypatch.setattr(runs.Run, "log", logged)


@pytest.fixture
def toy_folder(empty_folder):
    """The folder that toy(toy_config()) writes to"""
    return empty_folder / "out" / "tiny" / "toy"


# ---- which stage is run, and in which folder

def test_a_finished_stage_is_shown_again_and_not_run_again(whole_run, finished_run, capsys):
    checkpoint = finished_run / "tiny" / "ppo" / "checkpoint.pt"
    before = checkpoint.stat().st_mtime_ns
    assert ppo.main(tiny_config(ppo)) == whole_run[1]
    assert "already finished" in capsys.readouterr().out
    assert checkpoint.stat().st_mtime_ns == before


@pytest.mark.parametrize("script, changes, message", [
    (ppo, dict(lr=0.001), "out/tiny/ppo holds a run with lr 0.002, but this one has lr 0.001"),
    (ppo, dict(lr=0.001, seed=2),
     ".*/ppo holds a run with seed 1337, lr 0.002, but this one has seed 2, lr 0.001; --out NAME"),
    (reward_model, dict(config="small", out="other", base="tiny"),
     ".* made with --config tiny, but this is --config small"),
    (ppo, dict(out="other", base="nowhere"), "--base nowhere has no finished"),
    (sft, dict(block_size=20, overwrite=True), ".*exceed --block_size 20")],
    ids=["one field", "two fields", "a different preset", "no such base", "overwriting"])
def test_settings_that_do_not_fit_change_nothing(script, changes, message, finished_run):
    before = sorted(finished_run.rglob("*"))
    with refused(message):
        script.main(tiny_config(script, **changes))
    assert sorted(finished_run.rglob("*")) == before


def test_an_overwritten_run_is_kept_until_the_new_one_is_complete(toy_folder, monkeypatch, capsys):
    old = toy_folder.with_name("toy.old")

    def crash_overwriting(lr):
        with crash_at(3, monkeypatch):
            toy(toy_config(overwrite=True, lr=lr))

    toy_folder.mkdir(parents=True)
    (toy_folder / "notes.txt").write_text("precious")    # a user's file, from before the run
    first = toy(toy_config())
    assert (toy_folder / "notes.txt").exists()
    crash_overwriting(lr=0.2)
    (toy_folder / "picture.png").write_text("")
    crash_overwriting(lr=0.3)                            # over an unfinished one: still the same
    assert files.read_json(old / "results.json") == first
    assert not (toy_folder / "picture.png").exists()
    assert toy(toy_config(overwrite=True, resume=True, lr=0.3)) != first       # resume wins
    assert "resuming at update 2" in capsys.readouterr().out and not old.exists()
    shutil.rmtree(toy_folder)
    crash_overwriting(lr=0.2)
    crash_overwriting(lr=0.3)                            # nothing was finished: the last is kept
    assert files.load_checkpoint(old)["config"]["lr"] == 0.2


def test_a_run_that_looked_before_a_different_one_finished_is_refused(toy_folder):
    run = runs.Run(toy_config(), "toy")
    toy(toy_config())
    with refused("out/tiny/toy has changed while this run was starting; look at"):
        run.begin()


def test_a_second_run_in_a_folder_is_refused_and_told_of_the_first(toy_folder, monkeypatch):
    told = (rf"process {os.getpid()} on .* .python \S*.py --config tiny --seed 3., started 20\d\d-"
            ".*, is writing to out/tiny/toy; wait until it has ended, or give a different --out")

    def second():
        for changes in (dict(resume=True), dict(overwrite=True)):
            with refused(told):
                toy(toy_config(seed=3, **changes))

    def at_update_3(step):
        if step == 3:
            assert in_a_child(second) == 0
            files.stop("enough")
    with monkeypatch.context() as patch, refused("enough") as stopped:
        after_each_update(patch, at_update_3)
        toy(toy_config(seed=3))
    # Now the folder is free, although the traceback keeps the run alive
    assert in_a_child(lambda: toy(toy_config(seed=3, resume=True))) == 0 and stopped.value
    assert log_lines(toy_folder) == 5


def test_stages_that_do_not_belong_together_are_noticed(finished_run, capsys, no_pictures):
    """An SFT policy of its own with tiny's reward model, then a run whose SFT policy has changed"""
    cfg = tiny_config(ppo, out="mixed", base="tiny", steps=1, n_eval=4, n_samples=2)
    sft.main(tiny_config(sft, out="mixed", steps=2))
    ppo.main(cfg)
    assert "reward_model was made from a different SFT policy" in capsys.readouterr().out
    (finished_run / "mixed" / "ppo" / "report.txt").unlink()     # as if it had not finished
    sft.main(tiny_config(sft, out="mixed", steps=3, overwrite=True))
    with refused(".* was started with a different sft: the earlier stages have "):
        ppo.main(dataclasses.replace(cfg, resume=True))
    other = tokenizers.train_tokenizer(["a different vocabulary"], 300)
    tokenizers.save_tokenizer(other, finished_run / "mixed" / "sft")
    with refused("out/mixed/sft/checkpoint.pt was trained with .* vocabulary"):
        ppo.main(dataclasses.replace(cfg, overwrite=True))


def test_an_unfinished_stage_keeps_its_settings(finished_run, monkeypatch, no_pictures):
    """Even if it was killed before its first checkpoint"""
    folder = finished_run / "early" / "sft"
    with crash_at(1, monkeypatch):
        sft.main(short_config(sft, out="early", lr=0.005))
    assert not (folder / "checkpoint.pt").exists()
    config = files.read_json(folder / "config.json")
    later = tiny_config(reward_model, out="early", n_prompts=8, n_held_out=4)
    (folder / "config.json").write_text(json.dumps(config | {"old_option": 1}))
    with refused("out/early/sft/config.json has the settings old_option, which sft.py does not"):
        reward_model.main(later)
    (folder / "config.json").write_text(json.dumps(config))
    reward_model.main(later)
    assert files.read_json(folder / "config.json")["lr"] == 0.005 and log_lines(folder) == 5


def test_data_of_a_different_kind_than_the_earlier_stages_is_noticed(user_folder):
    with refused(".* was made with --data pairs.jsonl, but this is --data reviews; give a "
                 "different --out, and --base own"):
        policy_gradient.main(tiny_config(policy_gradient, out="own"))
    shutil.copytree(user_folder / "own" / "sft", user_folder / "half" / "sft")
    (user_folder / "half" / "sft" / "report.txt").unlink()      # unfinished, and on other data
    with refused("out/half/sft was made with --data pairs.jsonl, but this is --data reviews"):
        ppo.main(tiny_config(ppo, out="half"))
    with refused(".*--data has no annotators for them"):
        dpo.main(user_config(dpo, out="rounds", base="own", rounds=2))


def test_stages_that_run_first_inherit_data_lengths_and_dtype(user_folder):
    shared = dict(data="pairs.jsonl", max_prompt_tokens=40, max_new_tokens=12, dtype="bfloat16",
                  checkpointing=True)
    ppo.main(tiny_config(ppo, out="handed", steps=1, n_eval=2, n_samples=2, **shared))
    for stage in ("sft", "reward_model", "ppo"):
        config = files.read_json(user_folder / "handed" / stage / "config.json")
        assert {name: config[name] for name in shared} == shared, stage


def test_a_run_may_be_a_path(finished_run, tmp_path, capsys, no_pictures):
    few = dict(n_eval=2, n_samples=2)
    disk = tmp_path / "disk"
    run = str(disk / "cost$_$")                          # and its name is not a formula
    ppo.main(tiny_config(ppo, out=f"{run}/", base="tiny", steps=1, **few))
    assert (Path(run) / "ppo" / "report.txt").exists()
    assert f"next        python evaluate.py --config tiny --base tiny --out '{run}/'" in (
        capsys.readouterr().out)
    found = evaluate.main(tiny_config(evaluate, out=run, base="tiny", n_reference=4, **few))
    assert "cost$_$/ppo" in found and (Path(run) / "evaluate" / "frontier.png").exists()
    sample.main(tiny_config(sample, out=run, stage="ppo", n=1))
    ppo.main(tiny_config(ppo, out=str(disk / "next"), base=str(finished_run / "tiny"), steps=1,
                         **few))
    with refused(".* has no finished .*/disk/tin/sft"):
        ppo.main(tiny_config(ppo, out="from_disk", base=str(disk / "tin")))


def test_copies_and_exports_in_out_do_not_confuse_the_readers(finished_run, capsys, no_pictures):
    run = finished_run / "tiny"
    shutil.copytree(run / "sft", run / "sft-backup")
    (run / "exported").mkdir()
    (run / "exported" / "config.json").write_text('{"model_type": "gpt2"}')
    try:
        evaluate.main(tiny_config(evaluate, runs="tiny", n_eval=2, n_reference=4, n_samples=2,
                                  out="copies", base="tiny"))
        sample.main(tiny_config(sample, out="tiny", stage="sft", n=1))
    finally:
        shutil.rmtree(run / "sft-backup")
        shutil.rmtree(run / "exported")
    assert "evaluating SFT, tiny/dpo, tiny/grpo, tiny/ppo" in capsys.readouterr().out
    with refused("--stage got ','; it takes names of stages"):
        sample.main(tiny_config(sample, out="tiny", stage=","))


# ---- killed and resumed

@pytest.mark.parametrize("script, at, changes", [
    pytest.param(sft, 23, dict(init="gpt2", steps=30, n_texts=None, n_eval=10, batch_size=8,
                               lora_rank=0, dropout=0.3), id="sft"),
    pytest.param(reward_model, 14, dict(n_prompts=None, n_held_out=15), id="reward_model"),
    pytest.param(dpo, 4, dict(n_pairs=100, n_eval=4, n_samples=4), id="dpo"),
    pytest.param(ppo, 2, dict(ptx_coef=0.5, ptx_data="story.txt", ema=0.8, n_eval=4, n_samples=4,
                              steps=4), id="ppo, texts and an average"),
    pytest.param(ppo, 2, dict(reward="luck.py:luck", accumulation=2, dtype="bfloat16", n_eval=4,
                              n_samples=4, steps=4), id="ppo, a function as reward")])
def test_a_stage_on_data_of_the_users_resumes_to_the_same_bits(script, at, changes, user_folder,
                                                               monkeypatch):
    """With LoRA; as a crash between two checkpoints leaves it. The reward draws random numbers."""
    (user_folder.parent / "luck.py").write_text(
        "import random, numpy, torch\ndef luck(prompts, responses):\n"
        "    return [random.random() + numpy.random.randn() + torch.rand(()).item() + len(r) % 7\n"
        "            for r in responses]\n")
    stage = script.__name__
    whole, again = f"whole_{stage}", f"again_{stage}"
    for run in (whole, again):
        shutil.rmtree(user_folder / run, ignore_errors=True)
    base = "" if script is sft else "own"
    cfg = user_config(script, out=whole, base=base, save_every=2, **changes)
    script.main(cfg)
    random.random()                                      # numbers drawn before do not matter
    with crash_at(at, monkeypatch):
        script.main(dataclasses.replace(cfg, out=again))
    torch.rand(1)
    script.main(dataclasses.replace(cfg, out=again, resume=True))
    assert_same_run(user_folder / again / stage, user_folder / whole / stage)


def test_killed_at_any_write_a_run_resumes_to_the_same_bits(empty_folder, monkeypatch):
    """SIGKILL before and after each flush and each renaming, each in a process of its own"""
    whole, folder = empty_folder / "out" / "whole" / "toy", empty_folder / "out" / "killed" / "toy"
    with monkeypatch.context() as patch:
        calls = calls_of(patch, "fsync", "replace")
        toy(toy_config(out="whole"))
    n_fsync, n_replace = calls.count("fsync"), calls.count("replace")
    assert n_replace >= 7 and n_fsync > n_replace
    moments = [("fsync", call, False) for call in range(1, n_fsync + 1)]
    for call in range(1, n_replace + 1):
        moments += [("replace", call, False), ("replace", call, True)]
    for name, call, after in moments:
        def work():
            sys.stdout = open(os.devnull, "w")
            killed_at(monkeypatch, os, name, call, after)
            toy(toy_config(out="killed"))
        shutil.rmtree(folder, ignore_errors=True)
        assert in_a_child(work) == -signal.SIGKILL, (name, call)
        toy(toy_config(out="killed", resume=True))
        assert_same_run(folder, whole)
        assert not list(folder.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("script", STAGES, ids=name_of)
def test_fifty_kills_of_a_stage_leave_the_same_bits(script, finished_run):
    """Each start resumes where the last was killed; a run that gets through is compared"""
    folder = finished_run / "fifty" / script.__name__
    options = ["--out", "fifty", f"--base={base_of(script)}", "--resume"]
    chance = random.Random(time.time_ns())

    def compare():
        assert_same_run(folder, uninterrupted(finished_run, script))
        shutil.rmtree(folder)

    start = time.time()
    with forked(script, *options) as (process, _):
        process.join()
    compare()
    longest = time.time() - start                        # seconds before a kill
    kills = 0
    while kills < 50:
        with forked(script, *options) as (process, _):
            process.join(chance.uniform(0, longest))
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            longest *= 1.03                              # the machine may be busier by now
        else:
            compare()
            longest *= 0.85
    with forked(script, *options) as (process, _):
        process.join()
    compare()


def test_the_log_is_on_the_disk_before_the_checkpoint_after_it(empty_folder, monkeypatch):
    original = os.fsync
    flushed = []

    def noted(handle):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        return original(handle)
    monkeypatch.setattr(os, "fsync", noted)
    toy(toy_config())
    checkpoints = [i for i, name in enumerate(flushed) if name == "checkpoint.pt.tmp"]
    assert len(checkpoints) == 3 and all(flushed[i - 1] == "log.jsonl" for i in checkpoints)


def test_hashes_and_threads_do_not_change_the_bits(empty_folder, no_pictures):
    """In this process, and in one with a different PYTHONHASHSEED and more threads that tokenise"""
    write_rows(empty_folder / "pairs.jsonl", [comparison(i) for i in range(150)])
    cfg = tiny_config(sft, out="here", data="pairs.jsonl", max_prompt_tokens=40, steps=4, n_eval=5,
                      eval_every=2)
    sft.main(cfg)
    [cached] = (empty_folder / "out" / "tokens").iterdir()
    before = cached.read_bytes()
    cached.unlink()
    changes = {"PYTHONHASHSEED": "2", "RAYON_NUM_THREADS": str(os.cpu_count() + 1),
               "TOKENIZERS_PARALLELISM": "true"}
    command = settings.command(dataclasses.replace(cfg, out="there"), HERE / "sft")
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True,
                   env=os.environ | changes, stdout=subprocess.DEVNULL)
    assert_same_run(*(empty_folder / "out" / name / "sft" for name in ("here", "there")))
    assert cached.read_bytes() == before


def test_accumulation_and_checkpointing_may_change(finished_run, monkeypatch, no_pictures):
    """A run that was out of memory can continue with them."""
    cfg = tiny_config(ppo, out="changed", base="tiny", steps=4, save_every=2, n_eval=2, n_samples=2)
    with crash_at(2, monkeypatch):
        ppo.main(cfg)
    ppo.main(dataclasses.replace(cfg, resume=True, checkpointing=True, accumulation=2))
    assert log_lines(finished_run / "changed" / "ppo") == 4


def test_a_run_of_an_earlier_version_is_known(user_folder, capsys):
    """Its files lack some of today's fields; the same rows in a newer file are the same data"""
    cfg = user_config(ppo, out="earlier", base="own", steps=3, n_eval=2, n_samples=2, save_every=2)
    folder = user_folder / "earlier" / "ppo"
    ppo.main(cfg)
    config = files.read_json(folder / "config.json")
    for name in ("ema", "text_prompt", "dtype"):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    ppo.main(cfg)
    assert "already finished" in capsys.readouterr().out
    saved = files.load_checkpoint(folder)
    del saved["gpt"]["activation"], saved["critic_gpt"]["activation"]
    for name in ("python", "numpy"):
        del saved["random"][name]
    torch.save(saved, folder / "checkpoint.pt")
    (folder / "report.txt").unlink()
    os.utime(user_folder.parent / "pairs.jsonl")
    ppo.main(dataclasses.replace(cfg, resume=True))
    assert "resuming at update 3" in capsys.readouterr().out


def test_changed_data_are_refused_and_the_tokenizer_is_kept(empty_folder, monkeypatch, no_pictures):
    path = empty_folder / "rows.jsonl"
    folder = empty_folder / "out" / "changing" / "sft"
    rows = [comparison(i) for i in range(120)]
    cfg = tiny_config(sft, data=write_rows(path, rows), max_prompt_tokens=40, steps=6, save_every=2,
                      n_eval=5, out="changing")
    with crash_at(3, monkeypatch):
        sft.main(cfg)
    kept = (folder / "tokenizer.json").read_bytes()
    write_rows(path, [{"prompt": f"an entirely different file {i}", "completion": f" of words {i}"}
                      for i in range(120)])
    with refused("out/changing/sft was started with a different data: the contents of --data have"):
        sft.main(dataclasses.replace(cfg, resume=True))
    assert (folder / "tokenizer.json").read_bytes() == kept
    write_rows(path, rows)
    sft.main(dataclasses.replace(cfg, resume=True))
    assert log_lines(folder) == 6


def test_files_of_a_different_run_are_refused_on_resume(toy_folder, monkeypatch):
    with crash_at(4, monkeypatch):
        toy(toy_config())
    kept = {path.name: path.read_bytes() for path in toy_folder.iterdir()}
    saved = files.load_checkpoint(toy_folder)
    random_states = saved["random"]

    def checkpoint(**changes):
        file = io.BytesIO()
        torch.save({name: x for name, x in (saved | changes).items() if x is not None}, file)
        return file.getvalue()

    wrong_log = ("out/tiny/toy/log.jsonl does not have the updates 0 to 3 that come before the "
                 "checkpoint: it has been changed")
    random_wrong = "out/tiny/toy/checkpoint.pt holds random states that cannot be set "
    with refused("out/tiny/toy holds an unfinished stage; --resume continues it, --overwrite"):
        toy(toy_config())
    for name, content, message in (
            ("checkpoint.pt", checkpoint(config=saved["config"] | {"lr": 0.5}),
             "out/tiny/toy holds a run with lr 0.5, but this one has lr 0.1"),
            ("checkpoint.pt", checkpoint(optimizer=None),
             "out/tiny/toy/checkpoint.pt has no optimizer, so a different stage or program wrote"),
            ("checkpoint.pt", checkpoint(model={}),
             "out/tiny/toy/checkpoint.pt: the model in it does not fit this Linear: .*Missing key"),
            ("checkpoint.pt", checkpoint(tokenizer="0123"),
             "out/tiny/toy was started with a different tokenizer: the earlier stages have"),
            ("checkpoint.pt", checkpoint(data="rows", tokenizer="0123"),
             "out/tiny/toy was started with a different data: the contents of --data have"),
            ("checkpoint.pt", checkpoint(random={}), f"{random_wrong}.'run'"),
            ("checkpoint.pt", checkpoint(random=random_states | {"torch": torch.zeros(3)}),
             random_wrong),
            ("log.jsonl", b'{"step": 0}\n{"step": 2}\n', wrong_log),
            ("log.jsonl", b"", wrong_log),
            ("config.json", b"{", "cannot read out/tiny/toy/config.json .JSONDecodeError: .*; "
                                  "restore it from a copy"),
            ("config.json", b"[]", "out/tiny/toy/config.json is not what a stage writes")):
        (toy_folder / name).write_bytes(content)
        with refused(message):
            toy(toy_config(resume=True))
        (toy_folder / name).write_bytes(kept[name])
    (toy_folder / "started.jsonl").write_bytes(b"\xff\n")                      # says nothing
    toy(toy_config(resume=True))
    assert log_lines(toy_folder) == 5


def test_a_checkpoint_with_a_model_of_a_different_version_is_refused(finished_run, tmp_path):
    folder = tmp_path / "sft"
    shutil.copytree(finished_run / "tiny" / "sft", folder)
    saved = files.load_checkpoint(folder)
    gpt = saved["gpt"]
    for change in ({"gpt": gpt | {"rotary": True}}, {"gpt": gpt | {"n_head": 0}},
                   {"gpt": gpt | {"n_embd": "x"}}, {"gpt": gpt | {"n_embd": -8}}, {"gpt": 5},
                   {"policy": 5}, {"policy": {"a.lora_a": torch.zeros(1, 1)}}):
        torch.save(saved | change, folder / "checkpoint.pt")
        with refused(".*/sft/checkpoint.pt( describes a model that model.py does not know|: the "
                     "policy in it does not fit)"):
            sft.load_policy(folder, "cpu")


# ---- numbers that are not finite

def break_at(monkeypatch, owner, name, call):
    """At some call a function gives nan: alone, first in a tuple or as the gradient norm."""
    original = getattr(owner, name)
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        result = original(*args, **kwargs)
        if len(calls) != call:
            return result
        if isinstance(result, tuple):
            return result[0] * math.nan, *result[1:]
        if isinstance(result, dict):
            return result | {"grad_norm": torch.tensor(math.nan)}
        return result * math.nan
    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize("script, broken, call, told, step, taken", [
    (sft, "sft_loss", 26, "grad_norm", 25, 0),
    (reward_model, "preference_loss", 13, "grad_norm", 12, 0),
    (dpo, "dpo_loss", 11, "grad_norm", 10, 0),
    (ppo, "value_loss", 11, "critic_grad_norm", 5, 0),
    (ppo, "policy_loss", 12, "grad_norm", 5, 1),
    (ppo, "kl_estimate", 16, "kl_ref", 5, 0),
    (ppo, "kl_estimate", 17, "kl_old", 5, 2),
    (grpo, "grpo_loss", 7, "grad_norm", 3, 0),
    (grpo, "grpo_loss", 12, "grad_norm", 5, 1),
    (policy_gradient, "rung_loss", 10, "grad_norm", 9, 0)], ids=name_of)
def test_a_nan_stops_the_run_before_it_spoils_anything(script, broken, call, told, step, taken,
                                                       finished_run, monkeypatch):
    """It is saved as it was, unless that update had taken steps, and resumes to the same bits."""
    stage = script.__name__
    folder = finished_run / "nan" / stage
    shutil.rmtree(folder, ignore_errors=True)
    cfg = tiny_config(script, out="nan", base=base_of(script), save_every=4)
    when = "before" if taken else "the start of"
    with monkeypatch.context() as patch:
        break_at(patch, script, broken, call)
        with refused(f"{told} in update {step} is nan.*from {when} that update. docs/running.md, "
                     "'When a number is not finite'"):
            script.main(cfg)
    saved = files.load_checkpoint(folder)
    assert saved["step"] == (step // 4 * 4 if taken else step)
    for key in {"policy", "actor", "critic", "reward_model"} & saved.keys():
        assert all(torch.isfinite(weight).all() for weight in saved[key].values())
    script.main(dataclasses.replace(cfg, resume=True))
    assert_same_run(folder, uninterrupted(finished_run, script))


@pytest.mark.parametrize("owner, broken, call, rung, told", [
    (ppo, "value_loss", 5, "gae", "critic_grad_norm"),
    (policy_gradient, "trpo_step", 3, "trpo", "grad_norm")], ids=["critic", "trpo"])
def test_the_ladders_critic_and_trpo_stop_at_a_nan_too(owner, broken, call, rung, told,
                                                       finished_run, monkeypatch, no_pictures):
    break_at(monkeypatch, owner, broken, call)
    out = f"nan_{rung}"
    with refused(f"{told} in update 2 is nan"):
        policy_gradient.main(tiny_config(policy_gradient, out=out, base="tiny", rung=rung))
    assert files.load_checkpoint(finished_run / out / "policy_gradient")["step"] == 2


RUINED = dict(lr=1e30, warmup=0)
ADVICE = " is (nan|inf); try a lower --lr, --critic_lr or --beta, with a different --out"


@pytest.mark.parametrize("script, changes, message", [
    (ppo, dict(beta=1e38, kl_control="fixed"), "grad_norm in update 1" + ADVICE),
    (ppo, dict(critic_lr=1e30), "critic_grad_norm in update 0" + ADVICE),
    (ppo, dict(lr=1e30), "grad_norm in update 0" + ADVICE),
    (sft, dict(steps=1, **RUINED), "the held-out loss is nan"),
    (reward_model, dict(n_prompts=4, lora_rank=0, **RUINED), "the score of a held-out response is"),
    (dpo, dict(n_pairs=16, **RUINED), "a log-probability of DPO is nan"),
    (grpo, dict(steps=1, minibatch_size=32, epochs=1, **RUINED), "kl_old in update 0 is")],
    ids=id_of_case)
def test_settings_that_ruin_weights_are_blamed(script, changes, message, finished_run, no_pictures):
    """Even in the last update: before the report"""
    with refused(message):
        script.main(tiny_config(script, out=f"ruined_{script.__name__}", base=base_of(script),
                                overwrite=True, **changes))
    folder = finished_run / f"ruined_{script.__name__}" / script.__name__
    assert folder.exists() and not (folder / "report.txt").exists()


SCORES = r"scores in update 3 is inf in \d+ of \d+ places, first at \[\d+\]; the reward returned it"


@pytest.mark.parametrize("script, calls, step, message", [
    (dpo, 0, None, "the reward of a response of the SFT policy is inf"),
    (dpo, 8, None, "the reward of a sampled response is inf; only finite numbers can be learned"),
    (dpo, 9, 0, "score in update 0 is inf; the reward returned it"),
    (dpo, 10, 5, "score in update 5 is inf; the reward returned it"),
    (dpo, 12, 10, "the reward of a sampled response is inf; only finite numbers can be learned"),
    (ppo, 11, 3, SCORES),
    (grpo, 11, 3, SCORES),
    (policy_gradient, 11, 3, SCORES)])
def test_a_reward_that_is_not_finite_is_noticed_wherever_it_comes(script, calls, step, message,
                                                                  finished_run, no_pictures):
    """
    All call it 8 times to normalise, then once an update; dpo for labels, then in updates 0, 5 and
    9, and to compare.
    """
    folder = finished_run / "infinite" / script.__name__
    shutil.rmtree(folder, ignore_errors=True)
    (finished_run.parent / f"after_{calls}.py").write_text(
        "calls = []\ndef score(prompts, responses):\n    calls.append(1)\n"
        f"    bad = len(calls) > {calls}\n"
        "    return [float('inf') if bad else float(len(r)) for r in responses]\n")
    changes = {}
    if script is dpo:
        changes = dict(labels="reward_model", eval_every=5, n_pairs=160, n_eval=4, n_samples=4)
    with refused(message):
        script.main(tiny_config(script, out="infinite", base="tiny", missing_eos_score=None,
                                reward=f"after_{calls}.py:score", **changes))
    if step is not None:
        assert files.load_checkpoint(folder)["step"] == step


def test_a_weight_that_is_not_finite_is_never_saved(toy_folder):
    run = runs.Run(toy_config(), "toy")
    run.begin()
    gpt = small_gpt()
    run.restore(policy=gpt)
    gpt.transformer.wte.weight.data[1, 1] = math.inf
    with refused(".*weight of the policy after 3 updates is inf"):
        run.save(3)
    for _ in run.steps(0, 1):
        run.taken = 1                                    # so this update cannot be saved either
        with refused("loss in update 0 is nan; a hint. No checkpoint had been written yet. docs/"):
            run.must_be_finite("a hint", loss=math.nan)
    assert not (toy_folder / "checkpoint.pt").exists()


def test_where_float16_overflows_the_step_is_left_out_and_losses_are_scaled_less(toy_folder):
    run = runs.Run(toy_config(dtype="float16"), "toy")
    run.begin()
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    run.restore(model=model, optimizer=optimizer)
    for step in run.steps(0, 1):
        before = model.weight.item()
        scale = run.scaler.get_scale()
        run.backward(model.weight.sum() * 1e36)          # times the scale it is beyond float32
        assert run.step(1.0, grad_norm=optimizer) == {"steps_skipped": 1.0}
        assert model.weight.item() == before and model.weight.grad is None and run.taken == 0
        assert run.scaler.get_scale() == scale / 2
        run.backward(model.weight.sum() * 3)             # the norm is that of the loss itself
        assert run.step(9.0, grad_norm=optimizer)["grad_norm"].item() == pytest.approx(3)
        assert model.weight.item() != before and run.taken == 1
        run.scaler.update(1.0)                           # nothing left to scale less
        run.backward(model.weight.sum() * math.nan)
        with refused("grad_norm in update 0 is nan"):
            run.step(1.0, grad_norm=optimizer)


def test_a_float16_run_resumes_to_the_same_bits(toy_folder, monkeypatch):
    whole = toy(toy_config(dtype="float16", out="whole"))
    after_each_update(monkeypatch, lambda step: crash() if step == 3 else None)
    with pytest.raises(RuntimeError, match="crash"):
        toy(toy_config(dtype="float16"))
    assert files.load_checkpoint(toy_folder)["scaler"]["scale"] == 2.0 ** 16
    monkeypatch.undo()
    monkeypatch.chdir(toy_folder.parents[2])
    assert toy(toy_config(dtype="float16", resume=True)) == whole


def crash(*args, **kwargs):
    raise RuntimeError("crash")


@pytest.mark.parametrize("script, function, error, told", [
    (rollout, "generate", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
     "CUDA out of memory. Tried to allocate 20 GiB"),
    (sft, "sft_loss", MemoryError(), "MemoryError")], ids=["CUDA", "Python"])
def test_out_of_memory_is_one_message_that_names_what_needs_less(script, function, error, told,
                                                                 finished_run, monkeypatch):
    """Also in a stage that is made on the way. A bug keeps its traceback."""
    options = ["--out", f"memory_{function}", f"--base={base_of(script)}"]
    monkeypatch.setattr(script, function, failing(error))
    assert launched(monkeypatch, ppo, *options) == (
        f"error: out of memory ({told}). Try --accumulation 4, --checkpointing 1, --dtype "
        "bfloat16, a smaller --batch_size or --max_new_tokens")
    monkeypatch.setattr(script, function, crash)
    with pytest.raises(RuntimeError, match="crash"):
        launched(monkeypatch, ppo, *options)


# ---- signals

@pytest.mark.parametrize("first, second, told", [
    (signal.SIGINT, None,
     r"saved after \d+ of 400 updates in out/signals/ppo; the same command with --resume"),
    (signal.SIGTERM, None, r"saved after \d+ of 400 updates"),
    (signal.SIGHUP, None, r"saved after \d+ of 400 updates"),
    (signal.SIGINT, signal.SIGINT,
     "stopped; what was saved is intact, and --resume continues an unfinished stage")],
    ids=["Ctrl-C", "a plain kill", "a closed terminal", "Ctrl-C twice"])
def test_a_signal_saves_a_second_one_leaves_at_once(first, second, told, finished_run, monkeypatch):
    original = ppo.roll_out

    def slow(*args):
        time.sleep(0.5)                                  # updates long enough for two signals
        return original(*args)
    monkeypatch.setattr(ppo, "roll_out", slow)
    folder = finished_run / "signals" / "ppo"
    shutil.rmtree(folder, ignore_errors=True)
    lines = []
    options = ["--out", "signals", "--base", "tiny", "--steps", "400", "--save_every", "2"]
    with forked(ppo, *options) as (process, output):
        for line in output:
            lines.append(line)
            if re.match(" +2 ", line):                   # update 2 is done
                time.sleep(0.1)                          # until the next has started
                os.kill(process.pid, first)
            if line.startswith("finishing this update") and second:
                os.kill(process.pid, second)
        process.join()
    text = "".join(lines)
    assert process.exitcode == 1 and re.search(told, text) and "Traceback" not in text
    done = files.load_checkpoint(folder)["step"]
    assert done == 2 if second else 3 <= done == log_lines(folder)
    assert not list(folder.glob("*.tmp"))
    with forked(ppo, *options, "--resume") as (_, output):
        assert any(line == f"resuming at update {done}\n" for line in output)


def test_ctrl_c_in_the_last_update_leaves_before_the_report(toy_folder, monkeypatch):
    """It comes with --resume. After a run, and in a thread, signals are the caller's."""
    before = signal.getsignal(signal.SIGINT)             # a shell ignores it in the background
    with monkeypatch.context() as patch:
        after_each_update(
            patch, lambda step: step == 4 and os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped, match="^saved after 5 of 5 updates in out/tiny/toy; the same "
                                          "command with --resume"):
            toy(toy_config())
    assert not (toy_folder / "report.txt").exists()
    assert signal.getsignal(signal.SIGINT) is before
    thread = threading.Thread(target=toy, args=[toy_config(resume=True)])
    thread.start()
    thread.join()
    assert (toy_folder / "report.txt").exists()


def test_a_hangup_that_nohup_ignores_stays_ignored(empty_folder, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    seen = []
    after_each_update(monkeypatch, lambda step: seen.append(signal.getsignal(signal.SIGHUP)))
    try:
        toy(toy_config())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(seen) == 5 and set(seen) == {signal.SIG_IGN}


ROUNDS = dict(n_pairs=32, rounds=2, labels="soft", eval_every=1)


@pytest.mark.parametrize("script, call, changes", [
    (ppo, 2, dict(steps=2)),
    (grpo, 2, dict(steps=2)),
    (policy_gradient, 2, dict(steps=2, rung="clip")),
    pytest.param(dpo, 2, ROUNDS, id="dpo, samples"),
    pytest.param(dpo, 3, ROUNDS, id="dpo, pairs of a later round")], ids=name_of)
def test_ctrl_c_in_a_reward_drops_the_update_which_resume_repeats(script, call, changes,
                                                                  finished_run, no_pictures):
    """Also where the function answers it with scores; dpo's calls are pairs, samples, pairs, .."""
    home = finished_run.parent
    (home / "stopped.py").write_text(
        "import os, pathlib, random, signal\ncalls = []\n"
        "def f(prompts, responses):\n    calls.append(1)\n"
        "    scores = [random.random() + len(r) for r in responses]\n    try:\n"
        f"        if len(calls) == {call} and pathlib.Path('stop').exists():\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n    except KeyboardInterrupt:\n"
        "        return [0.0] * len(responses)\n    return scores\n")
    cfg = tiny_config(script, base="tiny", reward="stopped.py:f", normalise_reward=False, n_eval=2,
                      n_samples=2, **changes)
    for out in ("unstopped", "stopped"):
        shutil.rmtree(finished_run / out / script.__name__, ignore_errors=True)
    script.main(dataclasses.replace(cfg, out="unstopped"))
    (home / "stop").touch()
    try:
        with pytest.raises(Stopped, match="^saved after [01] of 2 updates in out/stopped/.*; the "
                                          "same command with --resume"):
            script.main(dataclasses.replace(cfg, out="stopped"))
    finally:
        (home / "stop").unlink()
    script.main(dataclasses.replace(cfg, out="stopped", resume=True))
    assert_same_run(*(finished_run / out / script.__name__ for out in ("stopped", "unstopped")))


def test_after_ctrl_c_a_reward_is_not_called_any_more(finished_run, monkeypatch, no_pictures):
    """It may have workers, and they have got Ctrl-C as well."""
    (finished_run.parent / "counted.py").write_text(
        "calls = open('calls', 'w', buffering=1)\n"
        "def f(prompts, responses):\n    print(len(responses), file=calls)\n"
        "    return [len(r) for r in responses]\n")
    cfg = tiny_config(ppo, base="tiny", steps=2, reward="counted.py:f", n_eval=2, n_samples=2)
    roll_out = ppo.roll_out

    def run_interrupted(presses, **changes):
        """Ctrl-C so many times in the second update"""
        updates = []

        def interrupted(*args):
            updates.append(1)
            for _ in range(presses if len(updates) == 2 else 0):
                os.kill(os.getpid(), signal.SIGINT)
            return roll_out(*args)
        monkeypatch.setattr(ppo, "roll_out", interrupted)
        return ppo.main(dataclasses.replace(cfg, **changes))

    with pytest.raises(Stopped, match="saved after 1 of 2 updates in out/counted/ppo; the same"):
        run_interrupted(1, out="counted", normalise_reward=False)
    assert (finished_run.parent / "calls").read_text() == "32\n"
    with pytest.raises(KeyboardInterrupt):                       # leaves at once
        run_interrupted(2, out="twice_pressed", normalise_reward=False)
    assert run_interrupted(0, out="counted_again")               # a later run can call it again


def test_ctrl_c_that_reaches_a_rewards_child_processes_spoils_nothing(finished_run, no_pictures):
    """From a terminal all get it: workers, forked while the run catches it, and their children."""
    (finished_run.parent / "tested.py").write_text("""
import multiprocessing, pathlib, subprocess
calls = []

def returncode(seconds):
    return subprocess.run(["sleep", seconds]).returncode

def f(prompts, responses):
    calls.append(1)
    seconds = "0"
    if len(calls) == 2 and pathlib.Path("slow").exists():
        seconds = "30"
        pathlib.Path("slow").unlink()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        failed = any(pool.map(returncode, [seconds] * 2))
    return [0.0 if failed else len(response) for response in responses]
""")
    changes = dict(steps=2, reward="tested.py:f", normalise_reward=False, n_eval=2, n_samples=2)
    ppo.main(tiny_config(ppo, out="untouched", base="tiny", **changes))
    slow = finished_run.parent / "slow"
    slow.touch()
    options = ["--out", "touched", "--base", "tiny"]
    for name, value in changes.items():
        options += [f"--{name}", str(value)]
    with forked(ppo, *options) as (process, output):
        deadline = time.time() + 60
        while slow.exists() and process.is_alive() and time.time() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)                                          # until the workers have started
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.join(timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        text = output.read()
    assert process.exitcode == 1
    assert "saved after 1 of 2 updates in out/touched/ppo; the " in text
    assert text.count("this update, then saving") == 1           # said by the run, not by workers
    ppo.main(tiny_config(ppo, out="touched", base="tiny", resume=True, **changes))
    assert_same_run(finished_run / "touched" / "ppo", finished_run / "untouched" / "ppo")


# ---- output, pictures, disk

BUFFERED = os.environ | {"PYTHONUNBUFFERED": ""}         # as usual, whatever these tests run under


def sft_command(**changes):
    cfg = short_config(sft, **changes)
    return settings.command(cfg, HERE / "sft").replace("python", sys.executable, 1)


def test_a_reader_that_goes_away_makes_a_run_save_and_leave(finished_run):
    """As with  | head  or a killed tee"""
    done = subprocess.run(f"{sys.executable} {HERE}/sft.py --help | head -1", shell=True, text=True,
                          capture_output=True)
    assert done.stdout == "Stage 1: supervised fine-tuning.\n"
    assert done.stderr in ("", "stopped: the output was closed; what was saved is intact\n")
    command = sft_command(out="reader", steps=100_000, save_every=100_000)
    done = subprocess.run(f"{command} | grep -m 1 '^ *[0-9]'", shell=True, env=BUFFERED,
                          capture_output=True, text=True)
    assert re.search("saved after .*--resume continues from there", done.stderr)
    folder = finished_run / "reader" / "sft"
    assert 0 < files.load_checkpoint(folder)["step"] == log_lines(folder)


def test_a_reader_that_goes_away_before_the_report_ends_the_command(toy_folder, monkeypatch):
    def write(text):
        if "learned" in text:
            raise BrokenPipeError
    reader = types.SimpleNamespace(write=write, flush=lambda: None)
    monkeypatch.setattr(sys, "stdout", reader)
    with pytest.raises(BrokenPipeError):
        toy(toy_config())


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", ">&- 2>&-"])
def test_an_output_that_is_full_or_closed_changes_nothing(redirection, finished_run):
    """Python writes what is left in the buffer when it exits; a closed output's number is reused"""
    command = f"{sft_command(out='shut', steps=3, overwrite=True)} --overwrite {redirection}"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    assert (done.stderr, done.returncode) == ("", 0)
    folder = finished_run / "shut" / "sft"
    assert (folder / "report.txt").exists()
    assert [line["step"] for line in log_of(folder)] == [0, 1, 2]


def test_a_log_is_drawn_whatever_the_runs_name_and_the_gaps_in_it(tmp_path, capsys):
    folder = tmp_path / "cost$_$"                        # not a formula
    folder.mkdir()
    files.write_lines(folder / "log.jsonl", [{"step": 0, "loss": 1.0}, {"step": 1, "loss": None}])
    assert reports.curves(folder, [("loss", "", ["loss"])]) == folder / "curves.png"
    assert capsys.readouterr().out == "" and "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_a_stage_finishes_without_pictures(finished_run, monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith("matplotlib"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sft.main(short_config(sft, out="undrawn"))
    out = capsys.readouterr().out
    assert "warning: a picture was not drawn (ModuleNotFoundError" in out
    assert "curves      not drawn (ModuleNotFoundError" in out
    assert (finished_run / "undrawn" / "sft" / "report.txt").exists()


full_disk = failing(OSError(errno.ENOSPC, "No space left on device"))


def test_a_full_disk_keeps_the_last_checkpoint(finished_run, monkeypatch, no_pictures):
    """By the kernel's limit on the size of a file, then by an error of fsync"""
    cfg = short_config(sft, out="no_room")
    stage = finished_run / "no_room" / "sft"
    sft.main(dataclasses.replace(cfg, out="room"))
    size = (finished_run / "room" / "sft" / "checkpoint.pt").stat().st_size
    for room in (size - 1000, size // 2):                # at its end; in the middle, where torch
        def work():                                      # fails to write its own end too
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            with refused("could not write out/no_room/sft/checkpoint.pt: File too large. The "
                         "previous version is intact"):
                sft.main(cfg)
        assert in_a_child(work) == 0
        assert not (stage / "checkpoint.pt").exists() and not list(stage.glob("*.tmp"))
        assert log_lines(stage) == 2

    original = os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: (
            full_disk() if (stage / "checkpoint.pt").exists() else original(file)))
        with refused("could not write .*: No space left on device"):
            sft.main(cfg)
    assert files.load_checkpoint(stage)["step"] == 2
    sft.main(dataclasses.replace(cfg, resume=True))
    assert_same_run(stage, finished_run / "room" / "sft")


# ---- reports, commands and use from Python

def test_a_report_says_by_what_it_was_made(finished_run):
    for stage in ("sft", "reward_model", "ppo", "dpo", "grpo"):
        report = (finished_run / "tiny" / stage / "report.txt").read_text()
        start = files.read_lines(finished_run / "tiny" / stage / "started.jsonl")[0]
        assert (f"\ncommand     python {stage}.py --config tiny\nmade with   commit "
                f"{start['commit']}, python 3.") in report
        for name in ("torch", "transformers", "tokenizers", "tiktoken", "numpy"):
            version = start[name]
            if name in sys.modules:
                version = sys.modules[name].__version__
            assert f"{name} {version}" in report
    assert "python policy_gradient.py --config tiny --out ladder --base tiny" in (
        finished_run / "ladder" / "policy_gradient" / "report.txt").read_text()


def test_each_line_on_the_terminal_tells_the_seconds_left(toy_folder, monkeypatch, capsys):
    monkeypatch.setattr(time, "time", lambda: 10.0 * log_lines(toy_folder))    # 10 s an update
    toy(toy_config())
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("  step    loss      left") + 1
    assert [line.split()[-2] for line in lines[start:start + 5]] == ["?", "30", "20", "10", "0"]
    assert lines[start].startswith("     0 ") and lines[start].endswith(" s")


def test_the_next_command_says_all_that_the_next_stage_must_know(user_folder):
    cfg = user_config(ppo, reward="word.py:exclaims", missing_eos_score=None, base="other", seed=3)
    command = settings.next_command(cfg, "evaluate")
    assert command == (
        "python evaluate.py --config tiny --base other --out own --seed 3 --data pairs.jsonl "
        "--max_prompt_tokens 40 --max_new_tokens 12 --reward word.py:exclaims --missing_eos_score "
        "None")
    again = settings.parse(evaluate.Config, "", command.split()[2:])
    assert (again.reward, again.missing_eos_score) == ("word.py:exclaims", None)
    assert settings.next_command(tiny_config(ppo), "evaluate") == "python evaluate.py --config tiny"
    assert ("next        python evaluate.py --config tiny --out own --data pairs.jsonl "
            "--max_prompt_tokens 40 ") in (user_folder / "own" / "ppo" / "report.txt").read_text()


def test_copies_links_and_profilers_run_under_their_own_name(finished_run, tmp_path):
    """And export. A copy of the whole project is a process of its own, the others are forked."""
    import cProfile
    import runpy
    clone = tmp_path / "clone"
    shutil.copytree(HERE, clone,
                    ignore=shutil.ignore_patterns("out", ".*", "*.md", "docs", "__pycache__"))
    shutil.copy(HERE / "ppo.py", clone / "my_ppo.py")
    (clone / "linked.py").symlink_to("ppo.py")

    def options(name):
        return ["--config", "tiny", "--base", "tiny", "--steps", "1", "--n_eval", "2",
                "--n_samples", "2", "--out", name, "--export", str(tmp_path / name)]

    def linked():
        sys.argv = [str(clone / "linked.py"), *options("linked")]
        runpy.run_path(sys.argv[0], run_name="__main__")

    def profiled():
        sys.argv = ["cProfile", "-o", str(tmp_path / "profile"), str(HERE / "ppo.py"),
                    *options("profiled")]
        cProfile.main()

    done = subprocess.run([sys.executable, clone / "my_ppo.py", *options("my_ppo")],
                          cwd=finished_run.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert in_a_child(linked) == 0 and in_a_child(profiled) == 0
    for name, script in (("my_ppo", "my_ppo"), ("linked", "linked"), ("profiled", "ppo")):
        report = (finished_run / name / "ppo" / "report.txt").read_text()
        assert f"\ncommand     python {script}.py --config tiny --out {name}" in report
        assert (tmp_path / name / "model.safetensors").exists()


# ---- exports, and weights of the user's

def test_export_works_on_a_finished_stage_and_never_overwrites(user_folder, monkeypatch, capsys):
    cfg = user_config(sft, init="gpt2", steps=30, n_texts=None, n_eval=10, batch_size=8,
                      lora_rank=0, export="there")
    with monkeypatch.context() as patch, refused(".*pip install transformers"):
        patch.setattr("importlib.util.find_spec", lambda name: None)
        sft.main(cfg)
    sft.main(cfg)
    out = capsys.readouterr().out
    assert "already finished" in out and "exported    there" in out
    assert (user_folder.parent / "there" / "model.safetensors").is_file()
    with refused("--export there already exists and is not empty; give a new folder"):
        sft.main(cfg)


@pytest.mark.parametrize("name, message", [
    ("model.safetensors", "--init .* cannot be read as weights"),
    ("tokenizer.json", "no tokenizer in .* cannot be read"),
    ("config.json", "--init .*/config.json cannot be read")])
def test_truncated_files_of_the_users_are_refused(name, message, user_run, user_folder, tmp_path):
    folder = tmp_path / "gpt2"
    shutil.copytree(user_run[0] / "gpt2", folder)
    content = (folder / name).read_bytes()
    for cut in (0, len(content) // 2, len(content) - 10):
        (folder / name).write_bytes(content[:cut])
        with refused(message):
            sft.main(user_config(sft, out="cut", init=str(folder), lora_rank=0))


@pytest.mark.parametrize("script", [sft, reward_model], ids=name_of)
def test_an_init_that_is_not_whole_weights_is_refused(script, user_run, user_folder, tmp_path):
    (tmp_path / "adapter").mkdir()                       # without a tokenizer, as peft saves it
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "bare").mkdir()
    shutil.copy(user_run[0] / "gpt2" / "model.safetensors", tmp_path / "bare")
    stage = user_folder / "own" / "sft"
    for init, message in ((tmp_path / "adapter", "merge it into them first"),
                          (tmp_path / "bare", "bare has no config.json"),
                          (stage, "A stage of this project writes them with --export"),
                          (stage / "checkpoint.pt", "is not a checkpoint of nanoGPT")):
        with refused(f"--init .*{message}"):
            script.main(user_config(script, out="cut", base="own", init=str(init), lora_rank=0))


# ---- guest.py: a reward file of the user's

def test_an_edit_of_a_file_that_the_reward_imports_is_noticed(empty_folder, tokenizer, monkeypatch):
    """Modules, a package, a folder without __init__, one in sys.path; what is installed is not"""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(empty_folder / "python"))
    for path in ("bonus", "pack/__init__", "pack/inner", "folder/leaf", "lib/deep", "unused",
                 "env/site-packages/theirs", "python/of_python"):
        (empty_folder / path).parent.mkdir(parents=True, exist_ok=True)
        (empty_folder / f"{path}.py").write_text("BONUS = 1\n")
    (empty_folder / "judge.py").write_text(
        "import os, sys\n"
        "sys.path += map(os.path.abspath, ['lib', 'env/site-packages', 'python'])\n"
        "import bonus, deep, of_python, pack.inner, reviews, sample, theirs\n"
        "from folder import leaf\n"
        "def f(prompts, responses):\n    return [leaf.BONUS] * len(responses)\n")
    digest = files.digest(empty_folder / "judge.py")[:16]
    first = load_own(tokenizer, "judge.py:f").made_for
    assert first.startswith(f"judge.py:f {digest} bonus.py ")
    assert first.split()[2::2] == ["bonus.py", "folder/leaf.py", "lib/deep.py", "pack/__init__.py",
                                   "pack/inner.py"]
    for path in ("bonus", "pack/inner", "folder/leaf", "lib/deep"):
        before = load_own(tokenizer, "judge.py:f").made_for
        (empty_folder / f"{path}.py").write_text("BONUS = 12345\n")
        assert load_own(tokenizer, "judge.py:f").made_for != before
    last = load_own(tokenizer, "judge.py:f")
    assert last.raw.args[0]([], [1]) == [12345]          # the new one is what runs
    with refused(".*started with a different reward .judge.py:f .* bonus.py"):
        last.load_state_dict({"made_for": first, "gain": 1.0, "bias": 0.0})


def test_a_reward_beside_our_scripts_may_import_them(empty_folder, tokenizer, monkeypatch):
    """They are not its files, or it would be a different reward for each script that uses it."""
    monkeypatch.setattr(guest, "HERE", empty_folder)
    (empty_folder / "train.py").write_text(
        "from lab.config import Common\nclass Config(Common):\n    pass\n")
    (empty_folder / "bonus.py").write_text("class Config:\n    bonus = 1\n")
    (empty_folder / "judge.py").write_text("import bonus, train\ndef f(p, r):\n    return [1.0]\n")
    assert load_own(tokenizer, "judge.py:f").made_for.split()[2::2] == ["bonus.py"]


@pytest.mark.parametrize("name, body, message", [
    ("flat", "return [2.0] * len(responses)",
     "the reward gave 2 to each of 512 responses of the SFT policy"),
    ("nan", "return [float('nan')] * len(responses)",
     "the reward of a response of the SFT policy is nan; only finite numbers can be learned from"),
    ("few", "return [1.0]", ".* returned 1 numbers; it should return one for each"),
    ("broken", "raise ValueError('no judge today')",
     "the reward function broken ended in the ValueError above")])
def test_a_reward_that_cannot_be_used_stops_first(name, body, message, finished_run, tmp_path):
    (tmp_path / "judge.py").write_text(f"def {name}(prompts, responses):\n    {body}\n")
    with refused(message):
        ppo.main(tiny_config(ppo, out="unrewarded", base="tiny",
                             reward=f"{tmp_path}/judge.py:{name}"))
    assert not (finished_run / "unrewarded").exists()


def test_the_seconds_that_a_reward_takes_are_logged(finished_run, no_pictures):
    (finished_run.parent / "slow.py").write_text(
        "import time\ndef slow(prompts, responses):\n    time.sleep(0.2)\n"
        "    return [float(len(r)) for r in responses]\n")
    ppo.main(tiny_config(ppo, out="slow", base="tiny", reward="slow.py:slow", steps=1, n_eval=2,
                         n_samples=2, normalise_reward=False))
    assert log_of(finished_run / "slow" / "ppo")[0]["score_seconds"] > 0.2
