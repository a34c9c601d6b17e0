"""
A run: output folder, log, checkpoints and resume.

    python STAGE.py --config NAME [--field value ...]

A stage writes to out/RUN/STAGE/: config.json, started.jsonl (when, by which command, commit and
versions), log.jsonl (one object per update), checkpoint.pt, tokenizer.json, results.json,
report.txt, pictures. The checkpoint holds everything that decides how the run continues, random
states included. So a run that was killed at any moment and resumed ends with the same bits as one
that was never interrupted (shown on CPUs).

What the scripts use:

    launch                      parse the command line and run main(cfg)
    self_contained              main(cfg) leaves the process as it found it, for use from Python
    Run                         one stage's folder, from begin to finish
    ensure                      the folder of an earlier stage, which is run first if it is missing
    learning_rate               the schedule; set_learning_rate applies it
    stop, Stopped               from lab/files.py: an error with one clear message
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from lab import config, files, process, report
from lab.corpus import source_id
from lab.files import Stopped, stop
from lab.process import OPENED
from lab.tokenizer import save_tokenizer, tokenizer_id

LOWER_LR = "try a lower --lr or a smaller --grad_clip, with a different --out"


# --------------------------------------------------------------------------------------------------
# Starting and ending

def launch(main, Config, doc):
    """Parse the command line, run main, and exit with one message if it cannot continue."""
    try:
        with process.safe_output():
            main(config.parse(Config, doc, sys.argv[1:]))
    except Stopped as error:
        raise SystemExit(str(error))
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; what was saved is intact, "
                         "and --resume continues an unfinished stage")
    except BrokenPipeError:                              # by  | head, outside of any training loop
        raise SystemExit("stopped: the output was closed; what was saved is intact")
    except (RuntimeError, MemoryError) as error:
        if not files.out_of_memory(error):
            raise
        raise SystemExit(f"error: out of memory ({files.first_line(error)[:200]}). Try "
                         "--accumulation 4, --checkpointing 1, --dtype bfloat16, a smaller "
                         "--batch_size or --max_new_tokens")


def self_contained(main):
    """
    Decorator: main(cfg) leaves the process as it found it, so a notebook or a program can call it.

    However main ends, process.process_state and standard output are put back, and the lock on the
    stage's folder is released.
    """
    @functools.wraps(main)
    def wrapped(cfg):
        put_back = process.process_state()
        OPENED.mains.append(main)
        first = len(OPENED.runs)
        try:
            with process.safe_output():
                return main(cfg)
        finally:
            for run in OPENED.runs[first:]:
                run.lock.release()
            del OPENED.runs[first:]
            OPENED.mains.pop()
            put_back()
    return wrapped


def learning_rate(step, steps, peak, warmup, floor):
    """Linear warm-up over `warmup` updates, then linear decay from peak to floor * peak"""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (floor + (1 - floor) * (steps - step) / max(1, steps - warmup))


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


# --------------------------------------------------------------------------------------------------
# An earlier stage

def ensure(cfg, script, **given):
    """
    The folder of a finished earlier stage, in this run or in --base

    If it is missing or unfinished in this run, its script's main makes it first. given are settings
    that it must have; empty ones are ignored.
    """
    given = {name: value for name, value in given.items() if value}
    stage = script.__name__
    run = config.run_name(cfg)
    here = config.folder_of(run) / stage
    started = (here / "config.json").exists()
    folder = here if started else config.folder_of(cfg.base or run) / stage
    if (folder / "report.txt").exists():
        made_by = stored_config(folder)
        if made_by["config"] != cfg.config:
            stop(f"{folder} was made with --config {made_by['config']}, but this is --config "
                 f"{cfg.config}; give a different --out, or a --base of the same config")
        check_data(cfg, folder, made_by, given, same_run=folder == here)
        source = made_by.get("data", "reviews")
        told = "" if source == "reviews" else f", data {source}"
        print(f"using {folder} (seed {made_by['seed']}{told})")
        return folder
    if cfg.base and not started:
        finished = config.folder_of(cfg.base).parent.glob(f"*/{stage}/report.txt")
        hint = config.nearest(cfg.base, [path.parent.parent.name for path in finished])
        stop(f"--base {cfg.base} has no finished {folder}{hint}; check the name, or make it: "
             f"python {stage}.py --config {cfg.config} --out {cfg.base} --resume")
    if started:                                          # perhaps with settings of its own
        made_by = stored_config(here)
        check_data(cfg, here, made_by, given)
        unknown = made_by.keys() - {field.name for field in dataclasses.fields(script.Config)}
        if unknown:
            stop(f"{here}/config.json has the settings {', '.join(sorted(unknown))}, which "
                 f"{stage}.py does not have: a different version started it. {stage}.py "
                 "--overwrite starts it again")
        theirs = script.Config(**made_by)
        print(f"{here} is unfinished; running {stage}.py first\n")
    else:
        shared = {name: getattr(cfg, name) for name in config.Common.inherited}
        theirs = script.Config(config=cfg.config, seed=cfg.seed, **shared, **given)
        print(f"{here} does not exist; running {stage}.py first\n")
    script.main(dataclasses.replace(theirs, out=cfg.out, device=cfg.device, export="", resume=True,
                                    overwrite=False))
    print()
    return here


def check_data(cfg, folder, made_by, given, same_run=True):
    """Exit if an earlier stage has different given settings, or in the same run different data."""
    wanted = dict(given)
    if same_run and made_by.get("steps") != 0:           # with 0 it has trained on no data
        wanted |= {"data": cfg.data, "text_prompt": cfg.text_prompt}
    for name, ours in wanted.items():
        theirs = made_by.get(name, getattr(config.Common, name, None))
        paths = [value for value in (theirs, ours) if os.path.exists(str(value))]
        same_path = len(paths) == 2 and os.path.samefile(*paths)
        if theirs != ours and not same_path:
            stop(f"{folder} was made with --{name} {theirs}, but this is --{name} {ours}; give "
                 f"a different --out, and --base {folder.parent.name} to use that stage anyway")


def stored_config(folder):
    stored = files.read_json(folder / "config.json")
    if not isinstance(stored, dict) or not {"config", "seed"} <= stored.keys():
        stop(f"{folder}/config.json is not what a stage writes; {files.recovery_hint(folder)}")
    return stored


# --------------------------------------------------------------------------------------------------
# One stage's folder

class Run:
    """
    The folder out/RUN/STAGE of one stage, and everything that is written to it

        run = Run(cfg, "sft", export)           # looks at the folder, writes nothing
        if run.finished:
            return run.show()
        ...                                     # anything that may stop on bad input
        run.begin()                             # from here on there are files and random numbers
        sources = run.sources(tokenizer, data=train)
        first = run.restore(policy=policy, optimizer=optimizer, **sources)
        for step in run.steps(first, cfg.steps):
            loss.backward()
            metrics = run.step(cfg.grad_clip, grad_norm=optimizer)
            run.log(step, metrics, columns)
            run.checkpoint(step + 1)
        return run.finish(text, results, curves, then="reward_model")

    export(folder, to) writes a finished stage's model for transformers; a stage that trains nothing
    passes none. run.generator, on the CPU, is the one source of random numbers besides the seeded
    generators of torch, Python and numpy.
    """

    in_users_code = False       # whether a function of the user's is being called right now

    def __init__(self, cfg, stage, export=None):
        config.check_fields(cfg)
        check_export(cfg, export)
        self.cfg = cfg
        self.stage = stage
        self.export = export
        self.device = process.pick_device(cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.dtype == "float16")
        self.script = script_name(stage)                 # for the commands in its messages
        self.folder = config.folder_of(config.run_name(cfg)) / stage
        self.old = self.folder.with_name(f"{stage}.old")
        self.looping = False
        self.interrupted = False
        self.lines = 0                                   # printed by log
        self.found = self.existing_files()
        unfinished = self.found["checkpoint.pt"] and not self.found["report.txt"]
        keep = not cfg.overwrite or (cfg.resume and unfinished)
        self.finished = keep and self.found["report.txt"]
        self.resuming = keep and unfinished
        if self.finished or self.resuming:
            self.require_same_settings(stored_config(self.folder))
        if self.resuming and not cfg.resume:
            stop(f"{self.folder} holds an unfinished stage; --resume continues it, --overwrite "
                 "starts again")
        told = "   already finished" if self.finished else ""
        print(f"== {stage}   {self.folder}   seed {cfg.seed}   {self.device}   "
              f"{torch.get_num_threads()} threads{told}")

    def existing_files(self):
        return {name: (self.folder / name).exists() for name in ("report.txt", "checkpoint.pt")}

    def require_same_settings(self, stored):
        """Exit if stored settings differ from this run's. A field they lack has its default."""
        stored = asdict(type(self.cfg)(config=self.cfg.config)) | stored
        ours = asdict(self.cfg)
        differ = [name for name in ours
                  if name not in config.MAY_CHANGE_ON_RESUME and stored[name] != ours[name]]
        if differ:
            theirs = ", ".join(f"{name} {stored[name]}" for name in differ)
            wanted = ", ".join(f"{name} {ours[name]}" for name in differ)
            stop(f"{self.folder} holds a run with {theirs}, but this one has {wanted}; --out NAME "
                 "keeps both, --overwrite replaces that one")

    def holder(self):
        """Who has the lock on this folder, for the message"""
        start = {"process": "?", "host": "?", "command": "?", "time": "just now"}
        for later in self.starts():
            start |= later
        return (f"process {start['process']} on {start['host']} ({start['command']}), started "
                f"{start['time']}, is writing to {self.folder}; wait until it has ended, or give "
                "a different --out")

    def starts(self):
        """The objects in started.jsonl, one for each time this run was started or resumed"""
        return files.read_lines(self.folder / "started.jsonl")

    def begin(self):
        """Take the folder for this process, note the start in it, seed the random numbers."""
        start = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "process": os.getpid(),
                 "command": config.command(self.cfg, self.script)}
        now = process.environment(self.device)
        with files.writing(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.lock = files.one_process(self.folder.with_name(f".{self.stage}.lock"), self.holder)
        OPENED.runs.append(self)
        if self.existing_files() != self.found:
            stop(f"{self.folder} has changed while this run was starting; look at it and run the "
                 "command again")
        if not self.resuming:
            self.set_aside_old_run()
            files.write(self.folder / "config.json", files.to_json(asdict(self.cfg), indent=1))
        starts = self.starts() + [start | now]
        for name, value in now.items():
            if starts[0].get(name) != value:
                print(f"note: started with {name} {starts[0].get(name)}, resumed with {value}: the "
                      "bits may differ from those of an uninterrupted run")
        files.write_lines(self.folder / "started.jsonl", starts)
        process.seed_all(self.cfg.seed)
        self.generator = torch.Generator().manual_seed(self.cfg.seed)

    def set_aside_old_run(self):
        """Move an earlier run to STAGE.old. It is deleted once the new one has finished."""
        with files.writing(self.folder):
            if self.old.exists() and not self.found["report.txt"]:
                shutil.rmtree(self.folder, ignore_errors=True)       # STAGE.old may be finished
            elif any(self.found.values()):
                shutil.rmtree(self.old, ignore_errors=True)
                os.replace(self.folder, self.old)
            self.folder.mkdir(exist_ok=True)
            for name in ("checkpoint.pt", "started.jsonl"):
                (self.folder / name).unlink(missing_ok=True)

    def sources(self, tokenizer, sft_policy=None, **data):
        """
        What this stage is made from, as ids for its checkpoint; also writes tokenizer.json

        A run that resumes must have the same ids. data are sequences of rows, by name.
        """
        if not self.resuming:
            save_tokenizer(tokenizer, self.folder)
        ids = {name: source_id(rows) for name, rows in data.items()}
        ids["tokenizer"] = tokenizer_id(tokenizer)
        if sft_policy is not None:
            ids["sft"] = files.fingerprint(sft_policy)
        return ids

    # ---- the loop

    def restore(self, **state):
        """
        Load the last checkpoint, if there is one, into these objects -> the step to start from

        Every later checkpoint holds them: objects by their state_dict, anything else as it is.
        """
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler
        self.state = state
        log = self.folder / "log.jsonl"
        if not self.resuming:
            files.write(log, "")
            return 0
        saved = files.load_checkpoint(self.folder, "random", *state)
        self.require_same_settings(saved["config"])
        plain = [name for name in state if not hasattr(state[name], "load_state_dict")]
        plain.sort(key=lambda name: "data" not in name)          # the likeliest reason comes first
        for name in plain:
            if not is_same(saved[name], state[name]):
                changed = f"the contents of --{name}" if "data" in name else "the earlier stages"
                stop(f"{self.folder} was started with a different {name}: {changed} have changed "
                     "since. --overwrite starts again, --out NAME keeps both")
        for name, thing in state.items():
            if name not in plain:
                files.load_state(thing, saved[name], self.folder, name)
        try:
            self.generator.set_state(saved["random"]["run"])
            process.set_random_states(saved["random"], self.device)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            stop(f"{self.folder}/checkpoint.pt holds random states that cannot be set "
                 f"({files.first_line(error)}); {files.recovery_hint(self.folder)}")
        lines = files.read_lines(log)[:saved["step"]]
        if [line.get("step") for line in lines] != list(range(saved["step"])):
            stop(f"{log} does not have the updates 0 to {saved['step'] - 1} that come before the "
                 "checkpoint: it has been changed. Restore it, or start again with --overwrite")
        files.write_lines(log, lines)                    # later lines will be written again
        print(f"resuming at update {saved['step']}")
        return saved["step"]

    def random_states(self):
        return {"run": self.generator.get_state()} | process.random_states(self.device)

    def steps(self, first, last):
        """
        The updates, as numbers

        Ctrl-C, a plain kill or a closed terminal lets the current update finish and be saved; a
        second signal leaves at once. While a function of the user's runs, the first signal drops
        the update: see drop_interrupted_update.
        """
        self.first = first
        self.last = last
        with self.signals_caught():
            for self.step_number in range(first, last):
                self.taken = 0                           # gradient steps in this update
                self.random_at_start = self.random_states()
                self.clock = report.Clock(self.device)
                yield self.step_number

    @contextlib.contextmanager
    def signals_caught(self):
        pid = os.getpid()
        before = {}

        def interrupt(signum, frame):
            if os.getpid() != pid:                       # a fork of a reward function: let it end
                signal.signal(signum, before[signum])
                return os.kill(os.getpid(), signum)
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            what = b"dropping" if Run.in_users_code else b"finishing"
            # print may be busy; if standard output is closed, its number is a different file's
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.write(sys.__stdout__.fileno(), b"\n" + what
                         + b" this update, then saving; Ctrl-C again leaves at once\n")
            if Run.in_users_code:
                raise KeyboardInterrupt

        if process.in_main_thread():
            for kind in process.SIGNALS:
                nohup = kind.name == "SIGHUP" and signal.getsignal(kind) == signal.SIG_IGN
                if not nohup:
                    before[kind] = signal.signal(kind, interrupt)
        self.looping = True
        try:
            yield
        finally:
            self.looping = False
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def lap(self, phase):
        """Log the time since the last lap as this phase's seconds."""
        self.clock.lap(phase)

    def backward(self, loss):
        """loss.backward(); in float16 the loss is scaled, or small gradients would round to 0"""
        self.scaler.scale(loss).backward()

    def step(self, grad_clip, hint=LOWER_LR, **optimizers):
        """
        Clip the gradients, take a step with each optimizer, zero -> {name: gradient norm}

        No optimizer takes its step unless every norm is finite. hint says what to try then. Where
        float16 has overflowed the step is skipped, and later losses are scaled less.
        """
        norms = {}
        for name, optimizer in optimizers.items():
            self.scaler.unscale_(optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norms[name] = torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
        can_scale_less = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        # In float32 the norms are looked at once, by must_be_finite
        if can_scale_less and not all(torch.isfinite(norm) for norm in norms.values()):
            norms = {"steps_skipped": 1.0}
        else:
            self.must_be_finite(hint, **norms)
            for optimizer in optimizers.values():
                optimizer.step()
            self.taken += 1
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        self.scaler.update()
        return norms

    def must_be_finite(self, hint=LOWER_LR, **values):
        """
        Stop before a number that is not finite reaches the weights. hint says what to try.

        As long as this update has taken no gradient step the weights are untouched, so the state is
        saved before stopping.
        """
        for name, value in values.items():
            value = torch.as_tensor(value)
            bad = ~torch.isfinite(value)
            if not bad.any():
                continue
            if self.taken == 0:
                self.save(self.step_number, self.random_at_start)
            first = bad.nonzero()[0].tolist()
            place = ""
            if first:
                place = f" in {int(bad.sum())} of {bad.numel()} places, first at {first}"
            when = "before" if self.taken else "the start of"
            saved = f"{self.folder}/checkpoint.pt is from {when} that update"
            if not (self.folder / "checkpoint.pt").exists():
                saved = "No checkpoint had been written yet"
            stop(f"{name} in update {self.step_number} is {value[bad][0].item()}{place}; {hint}. "
                 f"{saved}. docs/running.md, 'When a number is not finite', shows how to find the "
                 "operation")

    def log(self, step, metrics, columns, every=1):
        """Append one object to log.jsonl; print one aligned line of the columns and time left."""
        metrics = metrics | self.clock.seconds
        metrics = {name: x.item() if torch.is_tensor(x) else x for name, x in metrics.items()}
        columns = [name for name in columns if name in metrics]
        files.append(self.folder / "log.jsonl", files.to_json({"step": step} | metrics) + "\n")
        if step == self.first:                           # the slowest: time left counts from here
            self.started = time.time()
        if step % every and step + 1 < self.last:
            return
        widths = [max(len(name), 6) + 2 for name in columns]
        if self.lines % 20 == 0:
            header = [name.rjust(width) for name, width in zip(columns, widths)]
            print("  step" + "".join(header) + "      left")
        self.lines += 1
        pace = (time.time() - self.started) / max(1, step - self.first)
        left = f"{pace * (self.last - step - 1):.0f}" if step > self.first else "?"
        cells = [report.short(metrics[name]).rjust(width) for name, width in zip(columns, widths)]
        print(f"{step:6d}" + "".join(cells) + f"{left:>8} s", flush=True)

    def checkpoint(self, done):
        """After `done` updates: save if it is time to; after Ctrl-C save and leave."""
        if done % self.cfg.save_every == 0 or done == self.last or self.interrupted:
            self.save(done)
        if self.interrupted:
            self.leave(done)

    def leave(self, done):
        """End the run after an interrupt; everything is saved."""
        raise Stopped(f"saved after {done} of {self.last} updates in {self.folder}; the same "
                      "command with --resume continues from there")

    @staticmethod
    def drop_interrupted_update():
        """
        Leave the interrupted run, if there is one, as it was at the start of this update.

        Called before and after each call of a function of the user's. Its child processes get
        Ctrl-C too, so its result must not be trained on. No gradient step has been taken by then.
        """
        run = OPENED.looping()
        if run is not None and run.interrupted:
            run.save(run.step_number, run.random_at_start)
            run.leave(run.step_number)

    def save(self, done, random_states=None):
        """Write checkpoint.pt, after the log is on the disk, unless a weight is not finite."""
        for key, thing in self.state.items():
            if isinstance(thing, torch.nn.Module):
                for name, weight in thing.named_parameters():
                    check_finite(weight, f"{name} of the {key} after {done} updates")
        saved = {name: thing.state_dict() if hasattr(thing, "state_dict") else thing
                 for name, thing in self.state.items()}
        saved |= {"step": done, "config": asdict(self.cfg),
                  "random": random_states or self.random_states()}
        with files.writing(self.folder / "log.jsonl"):
            files.flush(self.folder / "log.jsonl")
        with files.replacing(self.folder / "checkpoint.pt", "wb") as file:
            torch.save(saved, file)

    # ---- the end

    def finish(self, text, results, curves=(), then=""):
        """
        Write results.json and report.txt and print the report: the stage is now finished -> results

        curves are the panels of curves.png; then is the stage to run next, perhaps with options.
        """
        lines = [text, ""]
        if curves:
            lines.append(f"curves      {report.curves(self.folder, curves)}")
        for what, name in (("log", "log.jsonl"), ("checkpoint", "checkpoint.pt")):
            if (self.folder / name).exists():
                lines.append(f"{what:11} {self.folder}/{name}")
        if then:
            stage, _, more = then.partition(" ")
            lines.append(f"next        {config.next_command(self.cfg, stage)} {more}".rstrip())
        text = files.visible("\n".join([*lines, self.made_by()]))
        files.write(self.folder / "results.json", files.to_json(results, indent=1))
        files.write(self.folder / "report.txt", text + "\n")
        shutil.rmtree(self.old, ignore_errors=True)
        print("\n" + text, flush=True)
        self.export_if_asked()
        return results

    def export_if_asked(self):
        if self.cfg.export:
            self.export(self.folder, str(Path(self.cfg.export)))
            print(f"exported    {self.cfg.export}")

    def made_by(self):
        """The command that reproduces this result, and the versions it was made with"""
        starts = self.starts()
        last = starts[-1]
        packages = ", ".join(f"{name} {last[name]}" for name in ("python", *process.PACKAGES))
        resumed = f"; resumed {len(starts) - 1}x" if len(starts) > 1 else ""
        return (f"command     {last['command']}\n"
                f"made with   commit {last['commit']}, {packages}; {last['device']}, "
                f"{last['threads']} threads{resumed}")

    def show(self):
        """Print again what a finished stage printed at its end -> its results"""
        print("This stage finished earlier; later edits to the code do not affect it. --overwrite "
              "runs it again, --out NAME keeps this result and makes a new run.\n")
        print((self.folder / "report.txt").read_text(encoding="utf-8"))
        self.export_if_asked()
        return files.read_json(self.folder / "results.json")


def script_name(stage):
    """The name of the script whose main is running, perhaps a copy; in a notebook the stage's"""
    file = OPENED.mains[-1].__globals__.get("__file__") if OPENED.mains else None
    return Path(file).stem if file else stage


def check_export(cfg, export):
    """Exit, before any work, if --export cannot be done."""
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
        stop(f"cannot make --export {cfg.export}: {parent} is not a folder that you may write to")
    if importlib.util.find_spec("transformers") is None:
        stop("--export needs the transformers package: pip install transformers")


def is_same(saved, ours):
    """Whether a plain value of a checkpoint equals ours; of a dict, in the fields that it has"""
    if not (isinstance(saved, dict) and isinstance(ours, dict)):
        return saved == ours
    return all(ours.get(name) == value for name, value in saved.items()
               if name not in config.MAY_CHANGE_ON_RESUME)


def check_finite(x, what):
    """Exit if a number is not finite."""
    if not torch.isfinite(x).all():
        stop(f"{what} is {x[~torch.isfinite(x)][0].item()}; only finite numbers can be learned "
             "from or measured. What was saved before is intact")
