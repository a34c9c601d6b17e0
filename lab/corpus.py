"""
Data sets on disk: from files, folders or the Hugging Face hub to rows of token lists.

    --data PATH             a file of JSON, .jsonl or .json, or a folder of them; or a plain .txt,
                            as pieces of about 1,000 characters; each may be gzipped
    --data hh               HH-RLHF, helpful-base and harmless-base (Bai et al. 2022), from the hub
    --data tldr             comparisons of summaries (Stiennon et al. 2020), from OpenAI
    --data hf:OWNER/NAME    the train split of a data set of the hub, by the datasets package; or
                            hf:OWNER/NAME/CONFIGURATION:SPLIT, or with either of these alone

A file of JSON has an object a line, or is one array of objects. forms.py reads each object. What
cannot be read is left out, counted and named by its line. It all becomes rows of token lists: a
prompt, a response, and in a comparison a worse response. A prompt that is longer than
--max_prompt_tokens keeps its end. Which prompts are held out is fixed by a hash of their text
before it is cut, so no prompt is both trained on and measured on. If that leaves one side empty,
rows are held out by a hash of the whole row. The rows are stored in out/tokens.
"""

import array
import codecs
import functools
import gzip
import hashlib
import itertools
import json
import os
import shlex
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lab import files
from lab.config import nearest
from lab.files import first_line, stop
from lab.forms import CHANGED, KEPT, LEFT_OUT, UNUSED, read_record
from lab.tokenizer import tokenizer_id

LONGEST = 100_000       # characters of a text that are read; tiktoken overflows on a million spaces
# By byte order mark; UTF-32's begins with UTF-16's, and so comes first
ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig",
             codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
HH = [f"{part}/train.jsonl.gz" for part in ("harmless-base", "helpful-base")]
TLDR = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons/"
TLDR_FILES = [f"batch{n}.json" for n in range(3, 11)]   # those that their README names for training


# --------------------------------------------------------------------------------------------------
# A source -> records

def check_source(source, flag="--data"):
    """Stops unless this can be a source; whether the hub has it shows later."""
    known = ("reviews", "hh", "tldr")
    if source in known or source.startswith("hf:"):
        return
    path = Path(source)
    if not (path.is_file() or path.is_dir()):
        beside = [] if path.exists() else map(str, path.parent.glob("*"))
        hint = nearest(source, (*known, *beside))
        stop(f"{flag} got {source}{hint}; it takes reviews, hh, tldr, hf:OWNER/NAME, or a "
                   "file or folder that is there")
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
    """The files in a folder that may hold rows, at any depth, without hidden ones"""
    return [path for path in sorted(folder.rglob("*"))
            if path.is_file() and suffix_of(path) in (".jsonl", ".json")
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def suffix_of(path):
    """The end of a file's name, without .gz"""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def files_of(source):
    """The files of a source that is a path, or that has to be downloaded first"""
    if source == "hh":
        from huggingface_hub import hf_hub_download
        try:
            return [Path(hf_hub_download("Anthropic/hh-rlhf", name, repo_type="dataset"))
                    for name in HH]
        except Exception as error:
            stop(f"--data hh could not be fetched from the hub ({type(error).__name__}); "
                       "with HH-RLHF's files in a folder, --data FOLDER reads them")
    if source == "tldr":
        return [download(TLDR + name, Path("out/downloads/tldr") / name) for name in TLDR_FILES]
    check_source(source)
    path = Path(source)
    return json_files(path) if path.is_dir() else [path]


def names_of(paths):
    """Files as seen from the folder that they share"""
    shared = os.path.commonpath([path.parent for path in paths])
    return [os.path.relpath(path, shared) for path in paths]


def download(url, path):
    if not path.exists():
        beside = path.with_suffix(f".{os.getpid()}.tmp")
        print(f"downloading {url}", flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(url, beside)
            files.flush(beside)
            os.replace(beside, path)
        except OSError as error:
            stop(f"{url} could not be fetched ({error}); with OpenAI's comparisons in a folder, "
                       "--data FOLDER reads them")
    return path


@functools.lru_cache(maxsize=2)
def hub_data_set(name):
    """OWNER/NAME, perhaps with /CONFIGURATION and :SPLIT -> that data set of the hub"""
    try:
        import datasets
    except ImportError:
        stop(f"--data hf:{name} takes the datasets package: pip install datasets; or write "
                   "the data set to a .jsonl file and give its path")
    path, _, split = name.partition(":")
    parts = path.split("/", 2)
    which = ["/".join(parts[:2]), *parts[2:]]
    if os.path.isdir(path):                              # load_dataset takes a folder as well
        which = [path]
    try:
        return datasets.load_dataset(*which, split=split or "train")
    except Exception as error:
        stop(f"--data hf:{name} could not be loaded ({type(error).__name__}: "
                   f"{first_line(error)}); {choices(datasets, *which)}")


def choices(datasets, path, configuration=None):
    """What there is to choose from in a data set of the hub, or what to do if nothing is known"""
    try:
        configurations = datasets.get_dataset_config_names(path)
        if configuration is None and len(configurations) == 1:
            splits = datasets.get_dataset_split_names(path)
        elif configuration in configurations:
            splits = datasets.get_dataset_split_names(path, configuration)
            path = f"{path}/{configuration}"
        else:
            return f"give hf:{path}/CONFIGURATION, which is one of {some(configurations, 20)}"
        return f"give hf:{path}:SPLIT, which is one of {some(splits, 20)}"
    except Exception:
        return "check the name and the network, or write it to a .jsonl file and give its path"


def records(source):
    """-> (file if there are several, place, row or None, what is wrong with it) of every row"""
    if source.startswith("hf:"):
        for n, row in enumerate(hub_data_set(source[3:])):
            yield "", f"row {n}", row, None
        return
    paths = files_of(source)
    for name, path in zip(names_of(paths), paths):
        is_text = suffix_of(path) == ".txt"
        place = "piece 0" if is_text else "line 0"
        try:
            for place, row, wrong in text_rows(path) if is_text else json_rows(path):
                yield name if len(paths) > 1 else "", place, row, wrong
        except (OSError, EOFError, zlib.error) as error:
            stop(f"{path} cannot be read past {place} ({type(error).__name__}: {error}); "
                       "give the whole file, with the right to read it")


def opened_text(path, errors):
    """A file, gzipped or not, as text: decoded as its byte order mark says, else as UTF-8"""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(path, "rb") as file:
        start = file.read(4)
    encoding = next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), "utf-8")
    return opener(path, "rt", encoding=encoding, errors=errors)


def json_rows(path):
    """-> (place, row or None, what is wrong with it), of each line or of each item of an array"""
    not_json = "not JSON"
    with opened_text(path, "backslashreplace") as lines:         # with \x for a bad byte: not JSON
        start = lines.read(1)
        while start.isspace():
            start = lines.read(1)
        lines.seek(0)
        if start == "[":
            try:
                rows = json.load(lines)
                yield from ((f"item {n}", row, None) for n, row in enumerate(rows, 1))
                return
            except (ValueError, RecursionError) as error:        # then its lines may be JSON
                not_json = f"not JSON, nor is the file as one array ({first_line(error)})"
            lines.seek(0)
        for n, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {n}", json.loads(line.lstrip("\ufeff")), None
                except (ValueError, RecursionError):
                    yield f"line {n}", None, not_json


def text_rows(path):
    """-> (place, row, None), of each piece"""
    for n, piece in enumerate(pieces(path), 1):
        yield f"piece {n}", {"text": piece}, None


def pieces(path, size=1000):
    """A plain text in pieces of roughly `size` characters, cut at line ends"""
    piece = ""
    with opened_text(path, "replace") as lines:
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


def examples(source, notes):
    """-> where, prompt, responses of every readable row; fills notes, {(kind, what): [where]}"""
    first_in = {}                                        # {hash of a row: its file}, if several
    for name, place, record, wrong in records(source):
        where, remarks = f"{name} {place}".lstrip(), []
        try:
            if wrong:
                raise ValueError(wrong)
            prompt, responses = read_record(record, remarks)
        except ValueError as error:
            notes.setdefault((LEFT_OUT, str(error)), []).append(where)
            continue
        if place.startswith("piece") and "\ufffd" in responses[0]:
            remarks.append((KEPT, "with bytes that are no UTF-8, read as \ufffd"))
        if name and first_in.setdefault(hash((prompt, *responses)), name) != name:
            remarks.append((KEPT, "repeating a row of an earlier file"))
        for remark in remarks:
            notes.setdefault(remark, []).append(where)
        yield where, prompt, responses


# --------------------------------------------------------------------------------------------------
# Records -> rows of token lists, stored once

class Rows:
    """Rows of a tokenised data set: rows[i] -> prompt, response, worse response ([] if missing)"""

    def __init__(self, source, path):
        with np.load(path) as arrays:
            self.tokens = arrays["tokens"]               # of all rows, one after another
            self.bounds = arrays["bounds"]               # (N, 4) where a row's parts start and end
            self.held_out = arrays["held_out"]           # (N,)
            self.first = arrays["first"]                 # (N,) whether its prompt is new on its side
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
        parts = []
        for side in (False, True):
            keep = wanted & (self.held_out == side)
            parts.append(order[keep[order]])
        if not all(map(len, parts)):
            stop(f"{self.source} has {len(parts[0])} rows to train on and {len(parts[1])} held out; "
                 "it takes some of both. An eighth of the prompts is held out: add more rows")
        return parts


class Part(Sequence):
    """Some of the rows, each as `read` makes it of prompt, response, worse response"""

    def __init__(self, rows, at, read):
        self.rows = rows
        self.at = at
        self.read = read

    def __len__(self):
        return len(self.at)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self.read(*self.rows[self.at[i]])


def source_id(rows):
    """Identifies the data of a stage in its checkpoint"""
    return rows.rows.id if isinstance(rows, Part) else "reviews"


def rows_of(cfg, tokenizer, block_size):
    """The rows of --data, tokenised now or, if nothing has changed, at an earlier start -> Rows"""
    if cfg.max_prompt_tokens >= block_size:
        stop(f"--max_prompt_tokens {cfg.max_prompt_tokens} leaves no room for a response in the "
             f"model's block_size {block_size}; lower it, or train a model that reads more "
             "(sft.py --block_size)")
    if cfg.data.startswith("hf:"):
        version = (cfg.data, hub_data_set(cfg.data[3:])._fingerprint)
    else:
        paths = files_of(cfg.data)
        stats = [path.stat() for path in paths]
        version = [(name, digest(path, stat.st_size, stat.st_mtime_ns))
                   for name, path, stat in zip(names_of(paths), paths, stats)]
    key = repr((6, version, tokenizer_id(tokenizer), block_size, cfg.max_prompt_tokens,
                cfg.text_prompt))
    path = Path("out/tokens") / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if path.exists():
        try:
            return opened(cfg.data, path)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            print(f"{path}, which stores these tokens, is damaged ({first_line(error)}); making it "
                  "again")
    tokenise(cfg, tokenizer, block_size, path)
    return opened(cfg.data, path)


@functools.lru_cache(maxsize=64)
def digest(path, size, mtime_ns):
    """SHA-256 of a file, read once however many stages ask for it"""
    try:
        return files.digest(path)
    except OSError as error:
        stop(f"cannot read {path} ({type(error).__name__}: {error})")


@functools.lru_cache(maxsize=4)
def opened(source, path):
    """The stored rows; prints, once, what was done to them -> Rows"""
    rows = Rows(source, path)
    print(files.visible(rows.report))
    return rows


def some_texts(source, n):
    """The first n texts of a source: prompt and better response"""
    found = itertools.islice(examples(source, {}), n)
    return ["".join((prompt, *responses[:1]))[:LONGEST] for _, prompt, responses in found]


def may_have_comparisons(source):
    """Whether a source has a comparison; of one that is not here yet, it may"""
    if not os.path.exists(source):
        return True
    return any(len(responses) == 2 for _, _, responses in examples(source, {}))


def encoded(cfg, tokenizer, block_size, notes, cut):
    """
    Every example as token lists that fit -> what its prompt is known by, what all
    of it is known by, prompt, responses. What does not fit is counted.
    """
    found, eos_id = examples(cfg.data, notes), tokenizer.eot_token
    while chunk := list(itertools.islice(found, 1000)):
        texts = [text for _, prompt, responses in chunk
                 for text in (prompt[-LONGEST:], *(response[:LONGEST] for response in responses))]
        ids = iter(tokenizer.encode_ordinary_batch(texts))
        for where, text, answers in chunk:
            known_by = (text or answers[0]).encode()
            all_known_by = "\0".join((text, *answers)).encode()
            prompt = next(ids)
            responses = [next(ids) + [eos_id] for _ in answers]
            if not prompt and cfg.text_prompt:
                prompt, responses = responses[0][:cfg.text_prompt], [responses[0][cfg.text_prompt:]]
                known_by = tokenizer.decode_bytes(prompt)
            prompt = prompt or [eos_id]
            cut["prompts"] += len(prompt) > cfg.max_prompt_tokens
            prompt = prompt[-cfg.max_prompt_tokens:]
            room = block_size - len(prompt)
            cut["responses"] += any(len(response) > room for response in responses)
            responses = [response[:room] for response in responses]
            if responses and responses[0] in ([], [eos_id]):
                notes.setdefault((LEFT_OUT, "no response left"), []).append(where)
                continue
            if len(responses) == 2 and responses[0] == responses[1]:
                cut["alike"] += 1
                responses.pop()
            yield known_by, all_known_by, prompt, responses


def tokenise(cfg, tokenizer, block_size, path):
    """Write the rows of --data to the path."""
    dtype, code = (np.uint16, "H") if tokenizer.n_vocab <= 2 ** 16 else (np.uint32, "I")
    tokens, bounds = array.array(code), array.array("q")
    prompts, held, held_by_row = [], [], []
    notes, cut = {}, {"prompts": 0, "responses": 0, "alike": 0}
    found = encoded(cfg, tokenizer, block_size, notes, cut)
    for known_by, all_known_by, prompt, responses in found:
        for part in (prompt, *responses):
            bounds.append(len(tokens))
            tokens.extend(part)
        bounds.extend([len(tokens)] * (3 - len(responses)))
        held.append(held_out(known_by))
        held_by_row.append(held_out(all_known_by))
        shown = array.array(code, prompt).tobytes() if prompt != [tokenizer.eot_token] else known_by
        prompts.append(hashlib.blake2b(shown, digest_size=12).digest())
    if not held:
        wrong = "; ".join(f"{reason} ({places[0]})" for (kind, reason), places in notes.items()
                          if kind == LEFT_OUT)
        details = f": {wrong}" if wrong else ""
        stop(f"--data {cfg.data} has no row that could be read{details}. The first lines of "
                   "corpus.py show the forms")
    held, n_shared = sides(prompts, held, held_by_row)
    seen, first = set(), []
    for prompt_and_side in zip(prompts, held):
        first.append(prompt_and_side not in seen)
        seen.add(prompt_and_side)
    bounds = np.frombuffer(bounds, np.int64).reshape(-1, 4)
    report = report_of(cfg, block_size, bounds, sum(held), n_shared, cut, notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path, "wb") as file:
        np.savez(file, tokens=np.frombuffer(tokens, dtype), bounds=bounds, held_out=np.array(held),
                 first=np.array(first), report=report)


def sides(prompts, by_prompt, by_row):
    """
    Held out by a hash of the prompt or, where that leaves one side empty, by one of the whole row

    -> whether each row is; None, or how many of them share their prompt with training rows
    """
    def trained_on(held):
        return {prompt for prompt, out in zip(prompts, held) if not out}

    # Long prompts that have become equal by the cut: the one that is trained on is held out no more
    trained = trained_on(by_prompt)
    held = [out and prompt not in trained for prompt, out in zip(prompts, by_prompt)]
    if len(set(held)) == 2 or len(set(by_row)) == 1:
        return held, None
    trained = trained_on(by_row)
    return by_row, sum(out and prompt in trained for prompt, out in zip(prompts, by_row))


def report_of(cfg, block_size, bounds, n_held_out, n_shared, cut, notes):
    """What was read and what was done to it -> lines for the terminal"""
    n_answered = int((bounds[:, 2] > bounds[:, 1]).sum())
    counts = [(n_answered, "rows"), (len(bounds) - n_answered, "prompts without a response")]
    there = " and ".join(f"{n} {what}" for n, what in counts if n)
    lines = [f"{cfg.data}: {there}, {n_held_out} of them held out; {cut['prompts']} prompts cut to "
             f"their last {cfg.max_prompt_tokens} tokens, {cut['responses']} rows with a response "
             f"cut to fit into {block_size}"]
    if cut["alike"]:
        lines[0] += f", {cut['alike']} with two responses alike, which compare nothing"
    if n_shared is not None:
        lines.append("too few prompts to hold some of them out: rows are held out by a hash of the "
                     f"whole row, and {n_shared} of these share their prompt with training rows")
    paths = [] if cfg.data.startswith("hf:") else files_of(cfg.data)
    if paths and paths != [Path(cfg.data)]:
        lines.append(f"files read: {some(names_of(paths), 20)}")
    for wanted in (LEFT_OUT, CHANGED, KEPT):
        for (kind, what), places in notes.items():
            if kind == wanted:
                lines.append(f"{len(places)} {kind} {what}: {some(places, 5)}")
    unused = {name: len(places) for (kind, name), places in notes.items() if kind == UNUSED}
    if unused:
        (first, n), *others = sorted(unused.items())
        counts = [f"{first} ({n} rows)"] + [f"{name} ({n})" for name, n in others]
        lines.append(f"{UNUSED} {some(counts, 20)}")
    return "\n".join(lines)


def some(names, n):
    """The first n names, for a message"""
    return ", ".join(names[:n]) + (", .." if len(names) > n else "")


def held_out(prompt):
    """Whether a prompt, as bytes, belongs to the held-out eighth, which a hash of it fixes for ever."""
    return hashlib.sha256(prompt).digest()[0] < 32
