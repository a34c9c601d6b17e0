"""
Data sets on disk: from files, folders or the Hugging Face hub to rows of token lists.

    --data PATH             a file of JSON (.jsonl or .json) or a folder of them, or a plain .txt,
                            cut into pieces of about 1,000 characters; each may be gzipped
    --data hh               HH-RLHF, helpful-base and harmless-base (Bai et al. 2022), from the hub
    --data tldr             comparisons of summaries (Stiennon et al. 2020), from OpenAI
    --data hf:OWNER/NAME    the train split of a data set on the hub, by the datasets package; or
                            hf:OWNER/NAME/CONFIGURATION:SPLIT, or with only one of the two

A file of JSON has one object a line, or is one array of objects. forms.py reads each object. What
cannot be read is left out, counted and named by its line. Everything becomes rows of token lists: a
prompt, a response, and in a comparison a worse response. A prompt that is longer than
--max_prompt_tokens keeps its end. A hash of a prompt's text, before it is cut, decides whether it
is held out, so no prompt is both trained on and measured on. If that leaves one side empty, a hash
of the whole row decides. The rows are stored in out/tokens.
"""

import array
import codecs
import collections
import functools
import gzip
import hashlib
import itertools
import json
import os
import shlex
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lab import files
from lab.config import nearest
from lab.files import first_few, first_line, stop
from lab.forms import CHANGED, KEPT, LEFT_OUT, UNUSED, read_record
from lab.tokenizer import cut_start, start_of, tokenizer_id, with_start

TOO_LONG = "a dialogue longer than --max_prompt_tokens"
LONGEST = 100_000       # characters read of a text; tiktoken overflows on a million spaces
# By byte order mark. UTF-32's begins with UTF-16's, so it comes first
ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig",
             codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
HH = ("harmless-base/train.jsonl.gz", "helpful-base/train.jsonl.gz")
TLDR = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons/"
TLDR_FILES = [f"batch{n}.json" for n in range(3, 11)]    # the ones its README names for training


# --------------------------------------------------------------------------------------------------
# A source -> its files

def check_source(source, flag="--data"):
    """Exit unless this can be a source. Whether the hub has it is seen later."""
    if source in ("hh", "tldr") or source.startswith("hf:"):
        return
    path = Path(source)
    if not (path.is_file() or path.is_dir()):
        beside = [] if path.exists() else map(str, path.parent.glob("*"))
        stop(f"{flag} got {source}{nearest(source, ('reviews', 'hh', 'tldr', *beside))}; it takes "
             "reviews, hh, tldr, hf:OWNER/NAME, or an existing file or folder")
    if path.is_file() and conversion(path):
        stop(f"{flag} got {source}; it takes JSON. {conversion(path)}")
    if path.is_dir() and not json_files(path):
        others = [other for other in sorted(path.rglob("*")) if conversion(other)]
        hint = f", but with {others[0]}. {conversion(others[0])}" if others else ""
        stop(f"{flag} {source} is a folder without any .jsonl, .jsonl.gz or .json file{hint}")


def conversion(path):
    """The command that writes a .csv or .parquet file as JSON lines; None for any other file"""
    to = f"{path}.jsonl"
    if path.suffix.lower() == ".csv":
        rows = f"csv.DictReader(open({str(path)!r}, encoding='utf-8-sig', newline=''))"
        code = f"import csv, json; [print(json.dumps(row)) for row in {rows}]"
        return f'To convert it: python -c "{code}" > {shlex.quote(to)}'
    if path.suffix.lower() == ".parquet":
        frame = f"pandas.read_parquet({str(path)!r})"
        code = f"import pandas; {frame}.to_json({to!r}, orient='records', lines=True)"
        return f'To convert it, with pandas and pyarrow installed: python -c "{code}"'
    return None


def json_files(folder):
    """The files in a folder that may hold rows, at any depth, except hidden ones"""
    return [path for path in sorted(folder.rglob("*"))
            if path.is_file() and suffix_of(path) in (".jsonl", ".json")
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def suffix_of(path):
    """The end of a file's name, without .gz"""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def files_of(source):
    """The files of a source, downloaded if need be -> [(name in the folder they share, path)]"""
    if source == "hh":
        from huggingface_hub import hf_hub_download
        try:
            paths = [Path(hf_hub_download("Anthropic/hh-rlhf", name, repo_type="dataset"))
                     for name in HH]
        except Exception as error:
            stop(f"--data hh could not be fetched from the hub ({type(error).__name__}). If you "
                 "have HH-RLHF's files in a folder, use --data FOLDER")
    elif source == "tldr":
        paths = [download(TLDR + name, Path("out/downloads/tldr") / name) for name in TLDR_FILES]
    else:
        check_source(source)
        path = Path(source)
        paths = json_files(path) if path.is_dir() else [path]
    shared = os.path.commonpath([path.parent for path in paths])
    return [(os.path.relpath(path, shared), path) for path in paths]


def download(url, path):
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        print(f"downloading {url}", flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(url, temporary)
            files.flush(temporary)
            os.replace(temporary, path)
        except OSError as error:
            stop(f"{url} could not be fetched ({error}). If you have OpenAI's comparisons in a "
                 "folder, use --data FOLDER")
    return path


@functools.lru_cache(maxsize=2)
def hub_data_set(name):
    """OWNER/NAME, perhaps with /CONFIGURATION and :SPLIT -> that data set of the hub"""
    try:
        import datasets
    except ImportError:
        stop(f"--data hf:{name} needs the datasets package: pip install datasets; or write the "
             "data set to a .jsonl file and give its path")
    path, _, split = name.partition(":")
    which = [path]
    if not os.path.isdir(path):                          # load_dataset takes a folder as well
        parts = path.split("/", 2)
        which = ["/".join(parts[:2]), *parts[2:]]
    try:
        return datasets.load_dataset(*which, split=split or "train")
    except Exception as error:
        stop(f"--data hf:{name} could not be loaded ({type(error).__name__}: "
             f"{first_line(error)}); {hub_choices(datasets, *which)}")


def hub_choices(datasets, path, configuration=None):
    """The configurations or splits of a data set on the hub, as advice; if unknown, other advice"""
    try:
        configurations = datasets.get_dataset_config_names(path)
        if configuration is None and len(configurations) == 1:
            splits = datasets.get_dataset_split_names(path)
        elif configuration in configurations:
            splits = datasets.get_dataset_split_names(path, configuration)
            path = f"{path}/{configuration}"
        else:
            return f"give hf:{path}/CONFIGURATION, one of: {first_few(configurations, 20)}"
        return f"give hf:{path}:SPLIT, one of: {first_few(splits, 20)}"
    except Exception:
        return "check the name and the network, or write it to a .jsonl file and give its path"


# --------------------------------------------------------------------------------------------------
# Its files -> prompts and responses, as texts

def records(source):
    """-> file (if there are several), place, record, None; or None and the reason, if it is bad"""
    if source.startswith("hf:"):
        for n, record in enumerate(hub_data_set(source[3:])):
            yield "", f"row {n}", record, None
        return
    named_paths = files_of(source)
    for name, path in named_paths:
        if len(named_paths) == 1:
            name = ""
        if suffix_of(path) == ".txt":
            found = ((f"piece {n}", {"text": x}, None) for n, x in enumerate(pieces(path), 1))
        else:
            found = json_records(path)
        place = "its start"
        try:
            for place, record, wrong in found:
                yield name, place, record, wrong
        except (OSError, EOFError, zlib.error) as error:
            stop(f"{path} cannot be read past {place} ({type(error).__name__}: {error}); check "
                 "that the file is complete and that you may read it")


def open_text(path, errors):
    """Open a file, gzipped or not, as text: in the encoding of its byte order mark, or UTF-8."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        start = file.read(4)
    encoding = next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), "utf-8")
    return opener(path, "rt", encoding=encoding, errors=errors)


def json_records(path):
    """-> place, record, None for each line or array item; or None and the reason, if it is bad"""
    not_json = "not JSON"
    with open_text(path, "backslashreplace") as lines:   # a bad byte as \x.. is not JSON either
        start = lines.read(1)
        while start.isspace():
            start = lines.read(1)
        lines.seek(0)
        if start == "[":
            try:
                for n, item in enumerate(json.load(lines), 1):
                    yield f"item {n}", item, None
                return
            except (ValueError, RecursionError) as error:        # its lines may still be JSON
                not_json = f"not JSON, nor is the file as one array ({first_line(error)})"
                lines.seek(0)
        for n, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {n}", json.loads(line.lstrip("\ufeff")), None
                except (ValueError, RecursionError):
                    yield f"line {n}", None, not_json


def pieces(path, size=1000):
    """A plain text in pieces of roughly `size` characters, cut at line ends"""
    piece = ""
    with open_text(path, "replace") as lines:
        for line in lines:
            if piece and len(piece) + len(line) > size:
                yield piece
                piece = ""
            piece += line
            if len(piece) > size:                        # a line that is longer than a piece
                whole = (len(piece) - 1) // size * size
                yield from (piece[at:at + size] for at in range(0, whole, size))
                piece = piece[whole:]
    if piece.strip():
        yield piece


def examples(source, notes, **style):
    """
    -> where, prompt, responses of each readable row. Fills notes, {(kind, text): [where]}.

    style: chat and system of read_record
    """
    file_of = {}                                         # {hash of a row: first file with it}
    for file, place, record, wrong in records(source):
        where = f"{file} {place}".lstrip()
        remarks = []
        try:
            if wrong:
                raise ValueError(wrong)
            prompt, responses = read_record(record, remarks, **style)
        except ValueError as error:
            notes.setdefault((LEFT_OUT, str(error)), []).append(where)
            continue
        if place.startswith("piece") and "\ufffd" in responses[0]:
            remarks.append((KEPT, "with bytes that are not UTF-8, read as \ufffd"))
        if file and file_of.setdefault(hash((prompt, *responses)), file) != file:
            remarks.append((KEPT, "repeating a row of an earlier file"))
        for remark in remarks:
            notes.setdefault(remark, []).append(where)
        yield where, prompt, responses


def some_texts(source, n):
    """The first n texts of a source: prompt and better response"""
    found = itertools.islice(examples(source, {}), n)
    return ["".join((prompt, *responses[:1]))[:LONGEST] for _, prompt, responses in found]


def may_have_comparisons(source):
    """Whether a source has a comparison; True if it is not on this machine yet"""
    if not os.path.exists(source):
        return True
    return any(len(responses) == 2 for _, _, responses in examples(source, {}))


# --------------------------------------------------------------------------------------------------
# Rows of token lists, stored once

class Rows:
    """Rows of a tokenised data set: rows[i] -> prompt, response, worse response ([] if missing)"""

    def __init__(self, source, path):
        with np.load(path) as arrays:
            self.tokens = arrays["tokens"]               # of all rows, one after the other
            self.bounds = arrays["bounds"]               # (N, 4) where a row's parts start and end
            self.held_out = arrays["held_out"]           # (N,)
            self.first = arrays["first"]                 # (N,) the first row with its prompt
            self.report = str(arrays["report"])
        self.source = source                             # --data
        self.id = path.stem
        self.answered = self.bounds[:, 2] > self.bounds[:, 1]                # (N,) has a response
        self.compared = self.bounds[:, 3] > self.bounds[:, 2]                # (N,) and a worse one

    def __len__(self):
        return len(self.bounds)

    def __getitem__(self, i):
        bounds = self.bounds[i].tolist()
        return tuple(self.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:]))

    def split(self, wanted):
        """Indices of the wanted rows to train on, and of those held out, in a fixed random order"""
        order = np.random.default_rng(0).permutation(len(self))              # whatever the seed
        keep = wanted[order]
        held_out = self.held_out[order]
        train = order[keep & ~held_out]
        held = order[keep & held_out]
        if len(train) == 0 or len(held) == 0:
            stop(f"{self.source} has {len(train)} rows to train on and {len(held)} held out; there "
                 "must be some of both. An eighth of the prompts is held out: add more rows")
        return train, held


class Part(Sequence):
    """Some of the rows, each as read(prompt, response, worse response) returns it"""

    def __init__(self, rows, indices, read):
        self.rows = rows
        self.indices = indices
        self.read = read

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self.read(*self.rows[self.indices[i]])


def source_id(rows):
    """Identifies a stage's data in its checkpoint"""
    return rows.rows.id if isinstance(rows, Part) else "reviews"         # the built-in task's name


def rows_of(cfg, tokenizer, block_size):
    """The rows of --data: tokenised now, or loaded if nothing has changed since the last time"""
    if cfg.max_prompt_tokens >= block_size:
        stop(f"--max_prompt_tokens {cfg.max_prompt_tokens} leaves no room for a response in the "
             f"model's block_size {block_size}; lower it, or make the SFT stage again "
             "with a larger --block_size")
    if cfg.data.startswith("hf:"):
        version = (cfg.data, hub_data_set(cfg.data[3:])._fingerprint)
    else:
        version = [(name, digest(path, path.stat().st_size, path.stat().st_mtime_ns))
                   for name, path in files_of(cfg.data)]
    key = repr((5, version, tokenizer_id(tokenizer), block_size, cfg.max_prompt_tokens,
                cfg.text_prompt))
    path = Path("out/tokens") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if path.exists():
        try:
            return load_rows(cfg.data, path)
        except MemoryError:
            raise
        except Exception as error:                       # numpy raises many kinds
            print(f"{path}, which stores these rows, is damaged ({first_line(error)}); making "
                  "them again")
    tokenise(cfg, tokenizer, block_size, path)
    return load_rows(cfg.data, path)


@functools.lru_cache(maxsize=64)
def digest(path, size, mtime_ns):
    """SHA-256 of a file. It is read once, however many stages ask for it."""
    try:
        return files.digest(path)
    except OSError as error:
        stop(f"cannot read {path} ({type(error).__name__}: {error})")


@functools.lru_cache(maxsize=4)
def load_rows(source, path):
    """The stored rows. Prints, once, how they were made."""
    rows = Rows(source, path)
    print(rows.report)
    return rows


def tokenise(cfg, tokenizer, block_size, path):
    """Write the rows of --data to the path."""
    code = "H" if tokenizer.n_vocab <= 2 ** 16 else "I"  # uint16 or uint32
    tokens = array.array(code)
    bounds = array.array("q")
    prompts, by_prompt, by_row = [], [], []
    notes = {}
    counts = collections.Counter()
    found = encoded(cfg, tokenizer, block_size, notes, counts)
    for prompt_text, row_text, prompt, responses in found:
        for part in (prompt, *responses):
            bounds.append(len(tokens))
            tokens.extend(part)
        bounds.extend([len(tokens)] * (3 - len(responses)))
        by_prompt.append(held_out(prompt_text))
        by_row.append(held_out(row_text))
        if prompt != [start_of(tokenizer)]:              # otherwise there is no prompt to share
            prompt_text = array.array(code, prompt).tobytes()
        prompts.append(hashlib.blake2b(prompt_text, digest_size=12).digest())
    if not prompts:
        reasons = [f"{reason} ({places[0]})" for (kind, reason), places in notes.items()
                   if kind == LEFT_OUT]
        found = "; ".join(reasons) or "it is empty"
        stop(f"--data {cfg.data} has no row that could be read: {found}. The first lines of "
             "lab/forms.py show the forms")
    held, n_shared = hold_out(prompts, by_prompt, by_row)
    first = []
    seen = set()
    for prompt_and_side in zip(prompts, held):
        first.append(prompt_and_side not in seen)
        seen.add(prompt_and_side)
    bounds = np.frombuffer(bounds, np.int64).reshape(-1, 4)
    report = report_of(cfg, block_size, bounds, sum(held), n_shared, counts, notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path, "wb") as file:
        np.savez(file, tokens=np.frombuffer(tokens, code), bounds=bounds, held_out=np.array(held),
                 first=np.array(first), report=files.visible(report))


def encoded(cfg, tokenizer, block_size, notes, counts):
    """
    Each row -> its prompt and all of its text, as bytes; prompt and responses as token lists

    The token lists are cut to fit and the bytes are not. Counts what was cut.
    """
    eos_id = tokenizer.eot_token
    found = examples(cfg.data, notes, chat=tokenizer.chat, system=tokenizer.system)
    while True:
        chunk = list(itertools.islice(found, 1000))
        if not chunk:
            return
        texts = []
        for _, prompt, responses in chunk:
            texts += [prompt[-LONGEST:], *(response[:LONGEST] for response in responses)]
        ids = iter(tokenizer.encode_ordinary_batch(texts))
        for where, text, answers in chunk:
            prompt_text = (text or answers[0]).encode()
            row_text = "\0".join((text, *answers)).encode()
            prompt = next(ids)
            responses = [next(ids) + [eos_id] for _ in answers]
            if not prompt and cfg.text_prompt:
                whole = responses[0]
                prompt = whole[:cfg.text_prompt]
                responses = [whole[cfg.text_prompt:]]
                prompt_text = tokenizer.decode_bytes(prompt)
            prompt = with_start(tokenizer, prompt)
            if len(prompt) > cfg.max_prompt_tokens:
                if tokenizer.chat != "plain":            # cut, it would not be a dialogue any more
                    notes.setdefault((LEFT_OUT, TOO_LONG), []).append(where)
                    continue
                counts["prompts cut"] += 1
                prompt = cut_start(tokenizer, prompt, cfg.max_prompt_tokens)
            room = block_size - len(prompt)
            counts["responses cut"] += any(len(response) > room for response in responses)
            responses = [response[:room] for response in responses]
            if responses and responses[0] in ([], [eos_id]):
                notes.setdefault((LEFT_OUT, "no response left"), []).append(where)
                continue
            if len(responses) == 2 and responses[0] == responses[1]:
                counts["equal"] += 1
                responses.pop()
            yield prompt_text, row_text, prompt, responses


def held_out(text):
    """Whether a prompt or a row, as bytes, is held out. A hash decides, so it never changes."""
    return hashlib.sha256(text).digest()[0] < 32         # one in eight


def hold_out(prompts, by_prompt, by_row):
    """
    Hold out rows by a hash of the prompt, or of the whole row if that would leave one side empty.

    -> whether each row is held out; None, or how many of those have a prompt that is trained on
    """
    def shared(held):
        trained_on = {prompt for prompt, out in zip(prompts, held) if not out}
        return [out and prompt in trained_on for prompt, out in zip(prompts, held)]

    # Different prompts may be equal once they are cut. If one is trained on, none is held out.
    held = [out and not both for out, both in zip(by_prompt, shared(by_prompt))]
    if len(set(held)) == 2 or len(set(by_row)) == 1:
        return held, None
    return by_row, sum(shared(by_row))


def report_of(cfg, block_size, bounds, n_held_out, n_shared, counts, notes):
    """What was read and how it was changed -> lines for the terminal"""
    n_answered = int((bounds[:, 2] > bounds[:, 1]).sum())
    kinds = [(n_answered, "rows"), (len(bounds) - n_answered, "prompts without a response")]
    read = " and ".join(f"{n} {kind}" for n, kind in kinds if n)
    lines = [f"{cfg.data}: {read}, {n_held_out} of them held out; {counts['prompts cut']} prompts "
             f"cut to their last {cfg.max_prompt_tokens} tokens, {counts['responses cut']} rows "
             f"with a response cut to fit into {block_size}"]
    if counts["equal"]:
        lines[0] += f", {counts['equal']} with two equal responses, which compare nothing"
    if n_shared is not None:
        lines.append("too few prompts to hold some of them out: rows are held out by a hash of the "
                     f"whole row, and {n_shared} of these share their prompt with training rows")
    if not (cfg.data.startswith("hf:") or os.path.isfile(cfg.data)):
        names = [name for name, _ in files_of(cfg.data)]
        lines.append(f"files read: {first_few(names, 20)}")
    for wanted in (LEFT_OUT, CHANGED, KEPT):
        for (kind, text), places in notes.items():
            if kind == wanted:
                lines.append(f"{len(places)} {kind} {text}: {first_few(places, 5)}")
    unused = sorted(f"{name} ({len(places)} rows)" for (kind, name), places in notes.items()
                    if kind == UNUSED)
    if unused:
        lines.append(f"{UNUSED} {first_few(unused, 20)}")
    return "\n".join(lines)
