"""
A run: output folder, log and progress, checkpoints and resume.

    python STAGE.py --config NAME [--field value ...]

A stage writes to out/RUN/STAGE/: config.json, started.jsonl (when, by which command, commit and versions),
log.jsonl (one object per update), checkpoint.pt, tokenizer.json, results.json, report.txt, pictures. The
checkpoint holds, or vouches for, everything that decides how the run goes on, random states included, so that
(shown on CPUs) a run that was killed at any moment and resumed ends with the same bits as one that was never
interrupted.

What the scripts use of it:

    launch                          parse the command line and run main(cfg)
    self_contained                  main(cfg) leaves the process as it found it, for use from Python
    Run, ensure                     a stage's folder; an earlier stage's, made where it is missing
    learning_rate, Clock, ...       small things for the loop and the report
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import linecache
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import files
import options
from files import stop


# --------------------------------------------------------------------------------------------------
# Starting and ending

def launch(main, Config, doc):
    """What a script does when it is run: parse, go, and end with one message if it cannot go on."""
    try:
        with safe_output():
            cfg = options.parse(Config, doc, sys.argv[1:])
            main(cfg)
    except files.Stopped as error:
        raise SystemExit(str(error))
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; what was saved is intact, "
                         "--resume continues an unfinished stage")
    except BrokenPipeError:                              # by  | head, outside of any training loop
        raise SystemExit("stopped: the output was closed; what was saved is intact")
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise SystemExit(files.visible(f"error: {what_needs_less_memory(error, cfg)}"))
        raise


def self_contained(main):
    """
    Decorator: main(cfg) leaves the process as it found it, so a notebook or a program can call it.

    It puts back the states of the random generators, the deterministic flag, the signal handlers
    and standard output, and releases the lock on the stage's folder, however main ends.
    """
    @functools.wraps(main)
    def wrapped(cfg):
        put_back = process_state()
        OPENED.mains.append(main)
        first = len(OPENED.runs)
        try:
            with safe_output():
                return main(cfg)
        finally:
            for run in OPENED.runs[first:]:
                run.close()
            del OPENED.runs[first:]
            OPENED.mains.pop()
            put_back()
    return wrapped


class Opened(threading.local):
    """The mains that this thread is in, and the runs that they write to"""

    def __init__(self):
        self.mains, self.runs = [], []

    def looping(self):
        """The run whose updates are under way, or None"""
        return next((run for run in self.runs if run.looping), None)


OPENED = Opened()
CPU = torch.device("cpu")
THEN_SAVING = b" this update, then saving; Ctrl-C again leaves at once\n"
# Ctrl-C, a plain kill, a closed terminal
SIGNALS = [kind for kind in signal.Signals if kind.name in ("SIGINT", "SIGTERM", "SIGHUP")]


def process_state():
    """The state of this process that a main changes -> a function that puts it back"""
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


def random_states(device=CPU):
    """States of torch's, Python's and numpy's generators, and of a GPU's if one is given"""
    name, keys, *place = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": random.getstate(),
              "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *place]}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states, device=CPU):
    torch.set_rng_state(states["torch"])
    if "python" in states:                               # earlier versions kept torch's alone
        random.setstate(states["python"])
        name, keys, *place = states["numpy"]
        np.random.set_state((name, keys.numpy(), *place))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


class Output:
    """
    Standard output that cannot end a run.

    Characters that its encoding lacks are escaped. Where nothing can be written any more, on a full
    disk or a closed terminal, the text is dropped: the log has the numbers. When the reader of a
    pipe is gone, a training loop finishes its update, saves and leaves, as after a plain kill.
    """

    def __init__(self, stream):
        self.stream = stream                             # None where standard output is closed

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self):
        return bool(self.stream) and not self.stream.closed and self.stream.isatty()

    def write(self, text):
        if self.stream is not None:
            try:
                self.stream.write(text)
            except UnicodeEncodeError:
                encoding = self.stream.encoding
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:
                self.give_up(error)
        return len(text)

    def flush(self):
        if self.stream is not None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self.give_up(error)

    def give_up(self, error):
        # What is still in the buffer goes nowhere, or Python would try again at its end
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
    """sys.stdout cannot end the run inside this block."""
    stream = sys.stdout
    if isinstance(stream, Output):
        yield
        return
    sys.stdout = Output(stream)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout = stream


def out_of_memory(error):
    """
    Whether the memory of the CPU or of a GPU ran out.

    torch has a class for that on CUDA alone, where an AcceleratorError can mean it as well; the
    CPU's allocator and MPS raise a plain RuntimeError.
    """
    words = ("out of memory", "can't allocate memory", "cudaErrorMemoryAllocation")
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or isinstance(error, RuntimeError) and any(word in str(error) for word in words))


def what_needs_less_memory(error, cfg):
    """The phase of main in which memory ran out, by its banner  # ---- 6. update  above the line, and the flags for it"""
    script, phase = Path(sys.argv[0]).name, "before its first phase"
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "main":               # the innermost, where an earlier stage is being made
            script, code = Path(frame.f_code.co_filename).name, linecache.getlines(frame.f_code.co_filename)[:line]
            banners = re.findall(r"# ---- ([^:\n]+)", "".join(code[frame.f_code.co_firstlineno:]))
            phase, cfg = f"in its phase '{banners[-1]}'" if banners else phase, frame.f_locals.get("cfg", cfg)
    updating = re.search("update|train|climb", phase)
    flags = ["accumulation 4", "checkpointing 1", "lora_rank 8"] if updating else ["max_new_tokens"]
    flags = ", ".join(f"--{flag}" for flag in flags + ["dtype bfloat16", "batch_size"] if hasattr(cfg, flag.split()[0]))
    return (f"out of memory: {script} {phase} ({files.first_line(error)[:200]}). What needs less there: {flags}"
            + f". --accumulation and --checkpointing may be changed when {script} itself is run with --resume; the others "
            "want another --out" * bool(updating))


# --------------------------------------------------------------------------------------------------
# One stage's folder

def ensure(cfg, script):
    """The folder of an earlier stage, of this run or of --base; else its main makes it here."""
    stage = script.__name__
    run = options.run_name(cfg)
    here = options.folder_of(run) / stage
    begun = (here / "config.json").exists()
    there = here if begun else options.folder_of(cfg.base or run) / stage
    if (there / "report.txt").exists():
        made_by = stored_config(there)
        if made_by["config"] != cfg.config:
            stop(f"{there} was made with --config {made_by['config']}, this is --config {cfg.config}; give another "
                 "--out, or a --base of the same config")
        if there == here:
            check_data(cfg, here, made_by)
        print(f"using {there} (seed {made_by['seed']}, data {made_by.get('data', 'reviews')})".replace(", data reviews", ""))
        return there
    if cfg.base and not begun:
        finished = options.folder_of(cfg.base).parent.glob(f"*/{stage}/report.txt")
        hint = options.nearest(cfg.base, [path.parent.parent.name for path in finished])
        stop(f"--base {cfg.base} has no finished {there}{hint}; check the name, or make it: "
             f"python {stage}.py --config {cfg.config} --out {cfg.base} --resume")
    theirs = script.Config(config=cfg.config, seed=cfg.seed,
                           **{name: getattr(cfg, name) for name in options.LATER})
    if begun:                                                    # perhaps with settings of its own
        made_by = stored_config(here)
        check_data(cfg, here, made_by)
        unknown = made_by.keys() - asdict(theirs).keys()
        if unknown:
            stop(f"{here}/config.json has the settings {', '.join(sorted(unknown))}, which {stage}.py does not know: "
                 f"another version began it. {stage}.py with --overwrite begins it again")
        theirs = script.Config(**made_by)
    print(f"{here} is not {'finished' if begun else 'there'} yet: making it first\n")
    script.main(dataclasses.replace(theirs, out=cfg.out, device=cfg.device, export="", resume=True,
                                    overwrite=False))
    print()
    return here


def check_data(cfg, folder, made_by):
    """Stops where an earlier stage of the same run has other data."""
    for name in ("data", "text_prompt"):
        theirs = made_by.get(name, getattr(options.Common, name))
        if theirs != getattr(cfg, name):
            stop(f"{folder} was made with --{name} {theirs}, this is --{name} {getattr(cfg, name)}; give another --out, and "
                 f"--base {folder.parent.name} if this stage is to go on from it all the same")


def stored_config(folder):
    config = files.read_json(folder / "config.json")
    if not isinstance(config, dict) or not {"config", "seed"} <= config.keys():
        stop(f"{folder}/config.json is not what a stage writes; {files.again(folder)}")
    return config


class Run:
    """
    The folder out/RUN/STAGE of one stage, and what is written there.

        run = Run(cfg, "sft", export)           # looks at what is there, writes nothing
        if run.finished:
            return run.show()
        ...                                     # whatever may stop for bad input
        run.begin()                             # from here on there are files and random numbers
        for step in run.steps(run.restore(policy=policy, optimizer=optimizer), cfg.steps):
            ...
            run.must_be_finite(loss=loss)
            ...
            run.log(step, metrics, columns)
            run.checkpoint(step + 1)
        run.finish(report, results)

    export(folder, to) writes a finished stage's model for transformers; one that trains nothing has none.
    run.generator, on the CPU, is the one source of randomness besides the seeded ones of torch, Python and numpy.
    """

    in_users_code = False       # whether a function of the user's is being called right now

    def __init__(self, cfg, stage, export=None):
        options.check_fields(cfg)
        check_export(cfg, export)
        self.cfg, self.stage, self.device = cfg, stage, pick_device(cfg)
        self.export, self.script, self.lock, self.looping = export, script_name(stage), None, False
        self.folder = options.folder_of(options.run_name(cfg)) / stage
        self.old, self.lock_file = (self.folder.with_name(name) for name in (f"{stage}.old", f".{stage}.lock"))
        if self.lock_file.exists() and not self.what_stands()["report.txt"]:
            lock = self.take()                           # nobody else is at it
            if not self.folder.exists() and self.old.exists():
                os.replace(self.old, self.folder)        # killed between the two renamings of make_room
            lock.release()
        self.found = self.what_stands()
        self.finished = self.found["report.txt"]
        self.resuming = self.found["checkpoint.pt"] and not self.finished
        self.interrupted, self.lines = False, 0
        if cfg.overwrite and not (self.resuming and cfg.resume):
            self.finished = self.resuming = False
        if self.finished or self.resuming:
            self.must_be_alike(stored_config(self.folder))
        if self.resuming and not cfg.resume:
            stop(f"{self.folder} holds an unfinished stage; --resume goes on with it, --overwrite begins again")
        print(f"== {stage}   {self.folder}   seed {cfg.seed}   {self.device}   "
              f"{torch.get_num_threads()} threads" + ("   already finished" * self.finished))

    def what_stands(self):
        return {name: (self.folder / name).exists() for name in ("report.txt", "checkpoint.pt")}

    def must_be_alike(self, stored):
        """Stops where stored settings differ from this run's; one that they lack has its default."""
        stored, ours = asdict(type(self.cfg)(config=self.cfg.config)) | stored, asdict(self.cfg)
        differ = [name for name in ours if name not in options.FREE and stored[name] != ours[name]]
        if differ:
            theirs, ours = (", ".join(f"{name} {config[name]}" for name in differ) for config in (stored, ours))
            stop(f"{self.folder} holds a run with {theirs}, this one has {ours}; --out NAME keeps both, --overwrite "
                 "replaces that one")

    def take(self):
        """The lock on the folder; stops where another process has it."""
        def holder():
            start = (self.starts() or [{}])[-1]
            return (f"{self.folder} is being written by process {start.get('process', '?')} on {start.get('host', '?')} "
                    f"({start.get('command', '?')}), started {start.get('time', 'just now')}; wait until it has ended, or "
                    "give another --out")
        return files.one_process(self.lock_file, holder)

    def starts(self):
        """What started.jsonl says: one object for each time that this run was begun or gone on with"""
        return files.read_lines(self.folder / "started.jsonl")

    def begin(self):
        """Make the folder ready to be written to, by this process alone, say so in it, and start the random numbers."""
        start = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "process": os.getpid(),
                 "command": options.command(self.cfg, self.script)}
        now = circumstances(self.device)
        with files.writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.lock = self.take()
        OPENED.runs.append(self)
        if self.what_stands() != self.found:
            stop(f"{self.folder} has changed while this run was starting; see what is there and run the command again")
        if not self.resuming:
            self.make_room()
        starts = self.starts() + [start | now]
        for name, value in now.items():
            if starts[0].get(name) != value:
                print(f"note: begun with {name} {starts[0].get(name)}, resumed with {value}: the bits may not be those of a "
                      "run that was never interrupted")
        files.write_lines(self.folder / "started.jsonl", starts)
        seed_all(self.cfg.seed)
        self.generator = torch.Generator().manual_seed(self.cfg.seed)

    def make_room(self):
        """What stands in the folder goes to STAGE.old, and stays there until the new one is finished."""
        unfinished = self.found["checkpoint.pt"] and not self.found["report.txt"]
        config = files.to_json(asdict(self.cfg), indent=1)
        with files.writing(self.folder):
            if any(self.found.values()) and not (unfinished and self.old.exists()):     # which may hold a finished one
                shutil.rmtree(self.old, ignore_errors=True)
                os.replace(self.folder, self.old)
            for name in ("checkpoint.pt", "started.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
        for stray in self.folder.parent.glob(f"{self.stage}.*.tmp"):          # of a process that was killed right here
            shutil.rmtree(stray, ignore_errors=True)
        if self.folder.exists():
            files.write(self.folder / "config.json", config)
        else:
            with files.new_folder(self.folder) as beside:
                files.write(beside / "config.json", config)

    def close(self):
        """Release the folder. If this run has saved nothing, the earlier one comes back."""
        if self.old.exists() and not any(self.what_stands().values()):
            shutil.rmtree(self.folder, ignore_errors=True)
            os.replace(self.old, self.folder)
        self.lock.release()

    # ---- the loop

    def restore(self, **state):
        """
        Load the last checkpoint, if there is one, into the objects -> the step to go on from

        They are what every later checkpoint holds: objects by their state_dict, anything else as it is.
        """
        log, self.state = self.folder / "log.jsonl", state
        if not self.resuming:
            files.write(log, "")
            return 0
        path = self.folder / "checkpoint.pt"
        saved = files.load_checkpoint(self.folder, "random", *state)
        self.must_be_alike(saved["config"])
        data_first = sorted(state, key=lambda name: (hasattr(state[name], "load_state_dict"), "data" not in name))
        for name in data_first:                          # then what else tells of other stages, then what is filled
            thing = state[name]
            if hasattr(thing, "load_state_dict"):
                files.fill(thing, saved[name], self.folder, name)
            elif without_free(saved[name]) != without_free(thing):
                why = f"the contents of --{name}" if name in ("data", "ptx_data") else "the stages before it"
                stop(f"{self.folder} was begun with another {name}: {why} have changed since. "
                     "--overwrite begins it again, --out NAME beside it")
        self.set_random_states(saved["random"])
        lines = files.read_lines(log)[:saved["step"]]
        if [line.get("step") for line in lines] != list(range(saved["step"])):
            stop(f"{log} has not the updates 0 to {saved['step'] - 1} that {path} comes after: it was changed since. Put it "
                 "back, or begin again with --overwrite")
        files.write_lines(log, lines)                            # those after it come again
        print(f"going on from update {saved['step']}")
        return saved["step"]

    def random_states(self):
        return {"run": self.generator.get_state()} | random_states(self.device)

    def set_random_states(self, states):
        try:
            self.generator.set_state(states["run"])
            set_random_states(states, self.device)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            stop(f"{self.folder}/checkpoint.pt holds random states that cannot be set ({files.first_line(error)}); "
                 + files.again(self.folder))

    def steps(self, first, last):
        """
        The updates. Ctrl-C, a plain kill or a closed terminal lets the one under way finish and be
        saved; a second signal leaves at once. While a function of the user's runs the first one drops
        the update: drop_interrupted_update.
        """
        def interrupt(signum, frame):
            if os.getpid() != process:                   # a fork of a reward function: let it end
                signal.signal(signum, before[signum])
                return os.kill(os.getpid(), signum)
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            what = b"dropping" if Run.in_users_code else b"finishing"
            # print may be busy; and standard output closed, its number another file's
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.write(sys.__stdout__.fileno(), b"\n" + what + THEN_SAVING)
            if Run.in_users_code:
                raise KeyboardInterrupt

        self.first, self.last, self.looping = first, last, True
        process = os.getpid()
        before = {}
        if in_main_thread():
            for kind in SIGNALS:
                nohup = kind.name == "SIGHUP" and signal.getsignal(kind) == signal.SIG_IGN
                if not nohup:
                    before[kind] = signal.signal(kind, interrupt)
        try:
            for self.step in range(first, last):
                self.random_at_start = self.random_states()
                yield self.step
        finally:
            self.looping = False
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def must_be_finite(self, taken=0, hint="try a lower --lr or a smaller --grad_clip, with another --out",
                       **values):
        """
        Stop before a number that is not finite gets into the weights.

        taken counts the gradient steps already made in this update. If it is 0 the weights are
        untouched, so the state is saved before stopping. hint says what to try.
        """
        for name, value in values.items():
            value = torch.as_tensor(value)
            bad = ~torch.isfinite(value)
            if bad.any():
                if taken == 0:
                    self.save(self.step, self.random_at_start)
                first = bad.nonzero()[0].tolist()
                where = f" in {int(bad.sum())} of {bad.numel()} places, first at {first}" if first else ""
                saved = f"{self.folder}/checkpoint.pt is from {'before' if taken else 'the start of'} that update"
                if not (self.folder / "checkpoint.pt").exists():
                    saved = "No checkpoint had been written yet"
                stop(f"{name} in update {self.step}: {value[bad][0].item()}{where}; {hint}. {saved}. README.md, 'When a "
                     "number is not finite', shows how to find the operation")

    def log(self, step, metrics, columns, every=1):
        """One object in log.jsonl; on the terminal an aligned line of the columns, and time left."""
        metrics = {k: v.item() if torch.is_tensor(v) else v for k, v in metrics.items()}
        columns = [name for name in columns if name in metrics]
        files.append(self.folder / "log.jsonl", files.to_json({"step": step} | metrics) + "\n")
        if step == self.first:                           # which is slow: time left is told after it
            self.begun = time.time()
        if step % every and step + 1 < self.last:
            return
        widths = [max(len(name), 6) + 2 for name in columns]
        if self.lines % 20 == 0:
            print("  step" + "".join(map(str.rjust, columns, widths)) + "      left")
        self.lines += 1
        pace = (time.time() - self.begun) / max(1, step - self.first)
        left = f"{pace * (self.last - step - 1):.0f}" if step > self.first else "?"
        values = (short(metrics[name]) for name in columns)
        print(f"{step:6d}" + "".join(map(str.rjust, values, widths)) + f"{left:>8} s", flush=True)

    def checkpoint(self, done):
        """After `done` updates: save when it is time to, or at Ctrl-C, and then leave."""
        if done % self.cfg.save_every == 0 or done == self.last or self.interrupted:
            self.save(done)
        if self.interrupted:
            self.leave(done)

    def leave(self, done):
        """End the run after an interrupt, with what is saved."""
        raise files.Stopped(f"saved after {done} of {self.last} updates in {self.folder}; "
                            "the same command with --resume continues from there")

    @staticmethod
    def drop_interrupted_update():
        """
        Leave the run that is interrupted, if there is one, as it was at the start of this update.

        Before and after each call of a function of the user's: its child processes get Ctrl-C, too,
        so what it returns is not to be trained on. No gradient step has been taken by then.
        """
        run = OPENED.looping()
        if run is not None and run.interrupted:
            run.save(run.step, run.random_at_start)
            run.leave(run.step)

    def save(self, done, random_states=None):
        """Write checkpoint.pt, once the log is on the disk; never with weights that are not finite."""
        for key, thing in self.state.items():
            for name, weight in thing.named_parameters() if isinstance(thing, torch.nn.Module) else ():
                check_finite(weight, f"{name} of the {key} after {done} updates")
        saved = {name: thing.state_dict() if hasattr(thing, "state_dict") else thing
                 for name, thing in self.state.items()}
        with files.writing(self.folder / "log.jsonl"):
            files.flush(self.folder / "log.jsonl")
        with files.replacing(self.folder / "checkpoint.pt", "wb") as file:
            torch.save({"step": done, "config": asdict(self.cfg), "random": random_states or self.random_states(),
                        **saved}, file)

    # ---- the end

    def finish(self, report, results):
        """Write results.json and report.txt and print the report: the stage is now finished."""
        report = files.visible(report + "\n" + self.made_by())
        files.write(self.folder / "results.json", files.to_json(results, indent=1))
        files.write(self.folder / "report.txt", report + "\n")
        shutil.rmtree(self.old, ignore_errors=True)
        print("\n" + report, flush=True)
        self.export_if_asked()
        return results

    def export_if_asked(self):
        if self.cfg.export:
            self.export(self.folder, str(Path(self.cfg.export)))
            print(f"exported    {self.cfg.export}")

    def made_by(self):
        """The command that makes this result again, and what it was made with"""
        last, n = self.starts()[-1], len(self.starts())
        packages = ", ".join(f"{name} {last[name]}" for name in ("python", *PACKAGES))
        return (f"command     {last['command']}\nmade with   commit {last['commit']}, {packages}; {last['device']}, "
                f"{last['threads']} threads" + f"; resumed {n - 1}x" * (n > 1))

    def show(self):
        """Print again what a finished stage printed at its end -> its results"""
        print("This is the result of then, whatever has changed in the code since; --overwrite runs it "
              "again, --out NAME beside it.\n\n" + (self.folder / "report.txt").read_text(encoding="utf-8"))
        self.export_if_asked()
        return files.read_json(self.folder / "results.json")


def script_name(stage):
    """The name of the script whose main is running, perhaps a copy; in a notebook the stage's"""
    file = OPENED.mains[-1].__globals__.get("__file__") if OPENED.mains else None
    return Path(file).stem if file else stage


def check_export(cfg, export):
    """Exit, before any work, where --export cannot be done."""
    if export is None and (cfg.export or cfg.lora_rank or cfg.accumulation > 1):
        stop("--export, --lora_rank and --accumulation are for stages that train; "
             "this one trains nothing")
    if not cfg.export:
        return
    for folder in (Path(cfg.export), Path(f"{Path(cfg.export)}-ema")):
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            stop(f"--export {folder} already exists and is not empty; give a new folder")
    parent = next(parent for parent in Path(cfg.export).absolute().parents if parent.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        stop(f"--export {cfg.export} cannot be made: {parent} is not a folder that you may write to")
    if importlib.util.find_spec("transformers") is None:
        stop("--export takes the transformers package: pip install transformers")


def without_free(value):
    """What a checkpoint says of a model, without what may differ when a run is resumed"""
    if not isinstance(value, dict):
        return value
    fixed = {name: x for name, x in value.items() if name not in options.FREE}
    return {"activation": "gelu_tanh"} | fixed           # which earlier versions did not write down


def seed_all(seed):
    """torch's random numbers, and for a reward function of the user's Python's and numpy's"""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


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
        stop(f"--device {name} cannot be used here ({files.first_line(error)}); --device cpu always can")
    return torch.device(name)


PACKAGES = ("torch", "transformers", "tokenizers", "tiktoken", "numpy")


def circumstances(device):
    """What the bits of a result depend on besides its settings: {host, device, threads, commit, python, torch, ..}"""
    here = Path(__file__).resolve().parent
    # A clone may belong to a different user. Without a .git of its own this folder has no commit:
    # git would go up to the project that it was copied into.
    git = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--exclude=*",
           "--abbrev=12"]
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(here.parent)}
    try:
        commit = subprocess.run(git, text=True, capture_output=True, timeout=10, cwd=here,
                                env=environment).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):         # no git here
        commit = ""
    return {"host": platform.node(), "device": str(device), "threads": torch.get_num_threads(),
            "commit": commit.replace("-dirty", " with changes") or "unknown", "python": platform.python_version(),
            **{name: version_of(name) for name in PACKAGES}}


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:      # copied into place, not installed
        return "unknown"


def check_finite(x, what):
    """Stops where a number is not finite."""
    if not torch.isfinite(x).all():
        stop(f"{what} is {x[~torch.isfinite(x)][0].item()}; it has to be finite to be learned from or measured by. What was "
             "saved before is as it was")


# --------------------------------------------------------------------------------------------------
# Small things for the loop and the report

def learning_rate(step, steps, peak, warmup, floor):
    """Linear warm-up over `warmup` updates, then linear decay from peak to floor * peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (floor + (1 - floor) * (steps - step) / max(1, steps - warmup))


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def add(total, metrics, share):
    """total += share * metrics, for means over a batch that is computed in parts"""
    for name, value in metrics.items():
        total[name] = total.get(name, 0.0) + share * value


class Clock:
    """Seconds per phase: lap("rollout") adds the time since the last lap to rollout_seconds."""

    def __init__(self, device):
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def lap(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.device.type == "mps":
            torch.mps.synchronize()
        now = time.perf_counter()
        name = f"{phase}_seconds"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now


def progress(items, label):
    """Go through a list with a bar on the terminal, and one line at the end."""
    begun, terminal = time.time(), sys.stdout.isatty()
    for i, item in enumerate(items):
        if terminal:
            bar = "#" * (30 * i // len(items))
            print(f"\r{label} [{bar:30}]", end="", flush=True)
        yield item
    print("\r\033[K" * terminal + f"{label}: {time.time() - begun:.1f} s", flush=True)


def short(value):
    """A number in at most seven characters, so that columns of width eight never touch"""
    if value is None or value != value:
        return "nan"
    if value != 0 and abs(value) <= 0.01:
        return f"{value:.0e}"
    for digits in (3, 1, 0):
        text = f"{value:.{digits}f}"
        if len(text) <= 7:
            return text
    return f"{value:.0e}"


def table(rows, markdown=False):
    """Rows of cells, the first row the header -> aligned text, numbers to the right"""
    rows = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    between = " | " if markdown else "  "
    lines = [between.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
             for row in rows]
    rule = "-" * len(lines[0])
    if markdown:
        lines = [f"| {line} |" for line in lines]
        rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def smooth(values):
    """Means over five updates, two to either side, fewer at the ends: a list as long as values"""
    windows = [values[max(0, i - 2):i + 3] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def subplots(*shape, figsize, **options):
    """A figure and its axes, as pyplot's subplots, which would change a notebook's backend"""
    from matplotlib.figure import Figure
    figure = Figure(figsize=figsize)
    return figure, figure.subplots(*shape, **options)


def no_math(text):
    """A text to draw as it is: matplotlib would read $..$ in a run's name as a formula"""
    return text.replace("$", r"\$")


def optional(draw):
    """
    Decorator: a picture comes after hours of training, so one that fails costs nothing but itself.

    Where matplotlib is missing, for example, the function returns the reason instead of a path.
    """
    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        try:
            return draw(*args, **kwargs)
        except files.Stopped:                            # no space on the disk: --resume draws it
            raise
        except Exception as error:
            why = f"not drawn ({type(error).__name__}: {files.first_line(error)})"
            print(f"warning: a picture was {why}")
            return why
    return wrapped


def save_figure(figure, path, dpi=110):
    """Write a picture to the path, all or nothing -> path"""
    with files.replacing(path, "wb") as file:
        figure.savefig(file, dpi=dpi, format=Path(path).suffix[1:])
    return path


@optional
def curves(folder, title, panels):
    """Draw logged metrics over updates, a panel for each (heading, unit, names) -> curves.png"""
    log = files.read_lines(folder / "log.jsonl")
    panels = [panel for panel in panels if any(name in line for line in log for name in panel[2])]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = subplots(rows, columns, squeeze=False, figsize=(4 * columns, 2.8 * rows))
    for axis, (heading, unit, names) in zip(axes.flat, panels):
        for name, style in zip(names, ("-", "--", ":")):
            points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points), style, linewidth=1.4, label=name)
        axis.set(title=heading, xlabel="update", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    figure.suptitle(no_math(title))
    figure.tight_layout()
    return save_figure(figure, folder / "curves.png")
