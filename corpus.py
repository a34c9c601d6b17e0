"""
Where the texts come from: the built-in task, files, the Hugging Face hub.

    --data reviews          the built-in task, reviews.py
    --data PATH             a file of JSON, .jsonl or .json, or a folder of them; or a plain .txt,
                            as pieces of about 1,000 characters; each may be gzipped
    --data hh               HH-RLHF, helpful-base and harmless-base (Bai et al. 2022), from the hub
    --data tldr             comparisons of summaries (Stiennon et al. 2020), from OpenAI
    --data hf:OWNER/NAME    the train split of a data set of the hub, by the datasets package; or
                            hf:OWNER/NAME/CONFIGURATION:SPLIT, or with either of these alone

A file of JSON has an object a line, or is one array of objects. Each is a row, in the first of
these forms whose fields it has; a field that is null counts as missing:

    {"chosen", "rejected"}              HH-RLHF's dialogues. The prompt is what they share, up to
                                        and with the last "\\n\\nAssistant:"
    {"prompt", "chosen", "rejected"}    comparisons as TRL has them
    {"prompt", "completion"}            the same with one response
    {"messages"}                        [{"role", "content"}, ..]; the response is the last message,
                                        if it is an assistant's
    {"conversations"}                   the same as ShareGPT has it, [{"from", "value"}, ..]
    {"instruction", "input", "output"}  Alpaca's, as a user's message and the answer to it
    {"text"}                            a response to no prompt; with --text_prompt n its first n
                                        tokens are the prompt
    {"info", "summaries", "choice"}     OpenAI's comparisons of summaries
    {"prompt"}                          a prompt without a response, for RL and evaluation

In place of a text there may be a list of messages, which is written as HH-RLHF writes dialogues.
The messages of a response follow those of the prompt, which they may repeat; if the prompt's last
one is an assistant's, they continue it. Messages that a user ends are the prompt of a chosen and a
rejected beside them. A "system" text comes first. Where a "label" (or "kto_tag") says false, 0 or
undesirable, the response is left out, and the prompt still serves RL; beside a text alone a label
is a class, and is not used.

What cannot be read is left out, counted and named by its line. It all becomes rows of token lists:
a prompt, a response, and in a comparison a worse response. A prompt that is longer than
--max_prompt_tokens keeps its end. Which prompts are held out is fixed by a hash of their text
before it is cut, so no prompt is both trained on and measured on. If that leaves one side empty,
rows are held out by a hash of the whole row. The rows are stored in out/tokens and mapped into
memory from there.
"""

import array
import codecs
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import data
import files
import options
import reviews

LONGEST = 100_000       # characters of a text that are read; tiktoken overflows on a million spaces
TURN = "\n\nAssistant:"
SPEAKER = {"user": "\n\nHuman:", "assistant": TURN, "system": "\n\nSystem:"}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "model": "assistant", "bot": "assistant", "system": "system", "developer": "system"}
GOOD = ("true", "1", "1.0", "desirable", "chosen", "good", "positive", "yes")
BAD = ("false", "0", "0.0", "-1", "-1.0", "undesirable", "rejected", "bad", "negative", "no")
SPECIAL = re.compile(r"<[|｜][a-zA-Z_▁]+[|｜]>|</s>|<eos>|<end_of_turn>")
# By byte order mark; UTF-32's begins with UTF-16's, and so comes first
ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig",
             codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# Kinds of remarks on rows
LEFT_OUT, CHANGED, KEPT = "more left out,", "of them", "of them kept as they stand,"
UNUSED = "fields not used:"
HH = [f"{part}/train.jsonl.gz" for part in ("harmless-base", "helpful-base")]
TLDR = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons/"
TLDR_FILES = [f"batch{n}.json" for n in range(3, 11)]   # those that their README names for training


# --------------------------------------------------------------------------------------------------
# One record -> prompt, responses

def read_record(record, remarks=None):
    """
    A row of a form above -> prompt, [better, worse] or [response] or [], as texts; or a ValueError

    What else there is to say about the row is added to remarks, as (kind, what).
    """
    remarks = [] if remarks is None else remarks
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    fields = {name: value for name, value in record.items() if value is not None}
    (system, prompt), responses, rated = take_form(fields)
    bad = rated and take_label(fields) in BAD
    prompt, responses = texts_of(system, prompt, responses)
    if not all(text.strip() for text in responses):
        raise ValueError("an empty response")
    if not (prompt.strip() or responses):
        raise ValueError("an empty prompt and no response")
    try:
        "".join((prompt, *responses)).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate, which is no text") from error
    if bad and not prompt:
        raise ValueError("labelled undesirable")
    if bad:
        responses = []
        remarks.append((LEFT_OUT, "labelled undesirable"))
    repeating = [text for text in responses if repeats(prompt, text)]
    if repeating and len(repeating) == len(responses):
        responses = [text.removeprefix(prompt) for text in responses]
        remarks.append((CHANGED, "began each response with the prompt, which was taken off"))
    elif repeating:
        remarks.append((KEPT, "with one response that repeats the prompt"))
    for token in sorted(set(SPECIAL.findall("\n".join(responses)))):
        remarks.append((KEPT, f"with {token} written out in a response, where it is plain text"))
    if any(map(files.CONTROL.search, (prompt, *responses))):
        remarks.append((KEPT, "with control characters"))
    remarks += [(UNUSED, name) for name in fields]
    return prompt, responses


def take_form(fields):
    """Takes a form from a row's fields -> (system, prompt), responses, if a label rates them"""
    def take(*names):
        return [fields.pop(name, None) for name in names]

    keys = ", ".join(sorted(fields))[:60]
    if "instruction" in fields and "prompt" not in fields:       # Alpaca's, whatever answers it
        instruction, given = take("instruction", "input")
        content = [instruction, "\n\n", given] if given else [instruction]
        fields["prompt"] = [{"role": "user", "content": content}]
    if "chosen" in fields and "rejected" in fields:
        chosen = fields["chosen"]
        is_dialogue = isinstance(chosen, str) and TURN in chosen             # which holds its prompt
        for name in ("conversations", "messages"):
            if name in fields and not (is_dialogue or "prompt" in fields):
                if turns_of(fields[name], "user")[-1][0] == "user":          # to be answered
                    fields["prompt"] = fields.pop(name)
        return take("system", "prompt"), take("chosen", "rejected"), False
    if "completion" in fields:
        return take("system", "prompt"), take("completion"), True
    if "messages" in fields:
        return take("system", "prompt"), take("messages"), True
    if "conversations" in fields:
        return take("system", "prompt"), take("conversations"), True
    if "output" in fields and "prompt" in fields:
        return take("system", "prompt"), take("output"), True
    if "text" in fields and "prompt" in fields:
        return take("system", "prompt"), take("text"), True
    if "text" in fields:
        return (None, ""), take("text"), False
    if "summaries" in fields and "choice" in fields:
        prompt, responses = read_summaries(*take("info", "summaries", "choice"))
        return (None, prompt), responses, False
    if "chosen" in fields or "rejected" in fields:
        raise ValueError("only one of chosen and rejected")
    if "prompt" in fields:
        return take("system", "prompt"), [], False
    raise ValueError(f"none of the known forms: keys {keys}")


def take_label(fields):
    """Takes a row's label if it is one of GOOD or BAD -> that, or None"""
    for name in ("label", "kto_tag"):
        label = str(fields.get(name)).strip().lower()
        if label in GOOD or label in BAD:
            del fields[name]
            return label
    return None


def repeats(prompt, response):
    """Whether a response begins with its prompt, up to the end of a word, and goes on"""
    rest = response[len(prompt):]
    mid_word = prompt[-1:].isalnum() and rest[:1].isalnum()
    return bool(prompt.strip() and rest.strip()) and response.startswith(prompt) and not mid_word


def texts_of(system, prompt, responses):
    """System, prompt, responses, each a text or messages or None -> prompt, responses, as texts"""
    if any(isinstance(part, (list, dict)) for part in (prompt, *responses)):
        before = turns_of(prompt, "user") if prompt else []
        if system:
            before = follow(turns_of(system, "system"), before)
        return dialogue_of(before, [turns_of(response, "assistant") for response in responses])
    if not all(isinstance(text, str) for text in (system or "", prompt or "", *responses)):
        raise ValueError("a text is not a string")
    if prompt is None:
        prompt, responses = split_dialogues(responses)
    if system and prompt.startswith(SPEAKER["user"]):
        prompt = f"{SPEAKER['system']} {system}{prompt}"
    elif system:
        prompt = f"{system}\n\n{prompt}"
    return prompt, responses


def turns_of(messages, role):
    """Messages, one of them, or a text that a role speaks -> [(role, text), ..]"""
    if isinstance(messages, str):
        return [(role, messages)]
    messages = [messages] if isinstance(messages, dict) else messages
    if not isinstance(messages, list):
        raise ValueError("a text is not a string")
    if not messages:
        raise ValueError("messages want at least one turn")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("messages want a role and content")
        names = ("from", "value") if message.get("role") is None else ("role", "content")
        role, content = map(message.get, names)
        role = str(role).lower()
        if role not in ROLES:
            raise ValueError("messages want a role, which is user, assistant or system, not "
                             f"{role:.20}")
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"messages want content, a text; one by {role} has none: a tool call?")
        turns.append((ROLES[role], "".join(texts)))
    return turns


def dialogue_of(before, answers):
    """Turns of a prompt, and of each response -> prompt, responses, as texts"""
    if before[-1:] == [("assistant", "")]:           # a cue to answer, nothing to continue
        before = before[:-1]
    if not (before or answers):
        raise ValueError("an empty prompt and no response")
    prompts, responses = zip(*(split(before, turns) for turns in answers or [[]]))
    if len(set(prompts)) > 1:
        raise ValueError("the dialogues part before their last turn")
    if len(answers) > 1 and None in responses:
        raise ValueError("a comparison that does not end in an assistant turn")
    return prompts[0], [] if None in responses else list(responses)


def split(before, turns):
    """Turns of a prompt, turns after them -> prompt, response or None if no assistant's is last"""
    if before and before[-1][0] == "assistant":                  # to be continued
        *earlier, (_, begun) = before
        if not turns:
            return written(before), None
        role, said = turns[-1]
        again = turns[:-1] == earlier and said.startswith(begun)
        if role == "assistant" and (again or turns[:-1] in ([], before)):
            return written(before), said.removeprefix(begun)
    turns = follow(before, turns)
    if turns[-1][0] == "assistant":
        return written(turns[:-1]) + TURN, spoken(turns[-1][1])
    return written(turns) + TURN, None


def follow(before, turns):
    """Turns after those before them, which they may hold already or begin with the last of"""
    ours, theirs = ([(role, text.strip()) for role, text in part] for part in (before, turns))
    n = len(before)
    if any(theirs[i:i + n] == ours for i in range(len(turns))):
        return turns
    shared = max(k for k in range(n + 1) if ours[n - k:] == theirs[:k])
    return before + turns[shared:]


def written(turns):
    """Turns as HH-RLHF writes them"""
    return "".join(SPEAKER[role] + spoken(text) for role, text in turns)


def spoken(text):
    """A turn's text after its speaker's name: with a space before it, unless it begins with one"""
    return f" {text}" if text[:1].strip() else text


def split_dialogues(dialogues):
    """HH-RLHF's dialogues, which differ in their last turn -> prompt up to TURN, responses"""
    at = os.path.commonprefix(dialogues).rfind(TURN)
    if at < 0:
        raise ValueError("no prompt, and the texts share no assistant turn")
    end = at + len(TURN)
    turns = [text[end:] for text in dialogues]
    if any(SPEAKER["user"] in turn or TURN in turn for turn in turns):
        raise ValueError("the dialogues part before their last turn")
    return dialogues[0][:end], turns


def read_summaries(info, summaries, choice):
    """OpenAI's comparisons of summaries -> prompt, [better, worse]. CNN/DailyMail has no titles."""
    try:
        texts = [summary["text"] for summary in summaries]
        responses = [texts[choice], texts[1 - choice]]
        if "article" in info:
            return "Article:\n\n" + info["article"] + "\n\nTL;DR:", responses
        return ("SUBREDDIT: r/" + info["subreddit"] + "\n\nTITLE: " + info["title"] + "\n\nPOST: "
                + info["post"] + "\n\nTL;DR:", responses)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"a comparison of summaries without its texts ({error})") from error


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
        hint = options.nearest(source, (*known, *beside))
        files.stop(f"{flag} got {source}{hint}; it takes reviews, hh, tldr, hf:OWNER/NAME, or a "
                   "file or folder that is there")
    if path.is_file() and conversion(path):
        files.stop(f"{flag} got {source}; it takes JSON. {conversion(path)}")
    if path.is_dir() and not json_files(path):
        others = [other for other in sorted(path.rglob("*")) if conversion(other)]
        hint = f", but with {others[0]}. {conversion(others[0])}" if others else ""
        files.stop(f"{flag} {source} is a folder without any .jsonl, .jsonl.gz or .json file{hint}")


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
            files.stop(f"--data hh could not be fetched from the hub ({type(error).__name__}); "
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
            files.stop(f"{url} could not be fetched ({error}); with OpenAI's comparisons in a folder, "
                       "--data FOLDER reads them")
    return path


@functools.lru_cache(maxsize=2)
def hub_data_set(name):
    """OWNER/NAME, perhaps with /CONFIGURATION and :SPLIT -> that data set of the hub"""
    try:
        import datasets
    except ImportError:
        files.stop(f"--data hf:{name} takes the datasets package: pip install datasets; or write "
                   "the data set to a .jsonl file and give its path")
    path, _, split = name.partition(":")
    parts = path.split("/", 2)
    which = ["/".join(parts[:2]), *parts[2:]]
    if os.path.isdir(path):                              # load_dataset takes a folder as well
        which = [path]
    try:
        return datasets.load_dataset(*which, split=split or "train")
    except Exception as error:
        files.stop(f"--data hf:{name} could not be loaded ({type(error).__name__}: "
                   f"{files.first_line(error)}); {choices(datasets, *which)}")


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
            files.stop(f"{path} cannot be read past {place} ({type(error).__name__}: {error}); "
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
                not_json = f"not JSON, nor is the file as one array ({files.first_line(error)})"
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
# Records -> rows of token lists, stored once and mapped into memory

def mapped(path):
    """An array of a file, mapped into memory, or read where the file system cannot map files"""
    try:
        return np.load(path, mmap_mode="r")
    except OSError:
        return np.load(path)


class Rows:
    """Rows of a tokenised data set: rows[i] -> prompt, response, worse response ([] if missing)"""

    def __init__(self, folder):
        self.folder = folder
        self.tokens = mapped(folder / "tokens.npy")
        self.bounds = mapped(folder / "bounds.npy")                          # (N, 4), in tokens
        self.held_out = np.load(folder / "held_out.npy")                     # (N,)
        self.first = np.load(folder / "first.npy")   # (N,) whether the prompt is new on its side
        self.report = (folder / "rows.txt").read_text(encoding="utf-8")

    def __len__(self):
        return len(self.bounds)

    def __getitem__(self, i):
        bounds = self.bounds[i].tolist()
        return tuple(self.tokens[a:b].tolist() for a, b in zip(bounds, bounds[1:]))


class Part(Sequence):
    """Some of the rows, each as `read` makes it of prompt, response, worse response"""

    def __init__(self, rows, at, read):
        self.rows, self.at, self.read = rows, at, read

    def __len__(self):
        return len(self.at)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return self.read(*self.rows[self.at[i]])


def rows_of(cfg, tokenizer, block_size):
    """The rows of cfg.data, tokenised now or, if nothing has changed, at an earlier start -> Rows"""
    if cfg.max_prompt_tokens >= block_size:
        files.stop(f"--max_prompt_tokens {cfg.max_prompt_tokens} leaves no room for a response in the model's "
                   f"block_size {block_size}; lower it, or train a model that reads more (sft.py --block_size)")
    if cfg.data.startswith("hf:"):
        version = (cfg.data, hub_data_set(cfg.data[3:])._fingerprint)
    else:
        paths = files_of(cfg.data)
        stats = [path.stat() for path in paths]
        version = [(name, digest(path, stat.st_size, stat.st_mtime_ns))
                   for name, path, stat in zip(names_of(paths), paths, stats)]
    key = repr((5, version, data.fingerprint(tokenizer), block_size, cfg.max_prompt_tokens,
                cfg.text_prompt))
    folder = Path("out/tokens") / hashlib.sha256(key.encode()).hexdigest()[:16]
    if folder.exists():
        try:
            return opened(folder)
        except (OSError, ValueError, EOFError) as error:
            print(f"{folder}, where these tokens were stored, is damaged ({error}): making them again")
            shutil.rmtree(folder, ignore_errors=True)
    tokenise(cfg, tokenizer, block_size, folder)
    return opened(folder)


@functools.lru_cache(maxsize=64)
def digest(path, size, mtime_ns):
    """Of a file's contents, read once however many stages and kinds of rows ask for it"""
    try:
        return files.digest(path)
    except OSError as error:
        files.stop(f"{path} cannot be read ({type(error).__name__}: {error})")


@functools.lru_cache(maxsize=4)
def opened(folder):
    """The rows in a folder, and what was done to them on the terminal: once, whoever asks -> Rows"""
    rows = Rows(folder)
    print(files.visible(rows.report))
    return rows


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


def tokenise(cfg, tokenizer, block_size, folder):
    """Write the rows of cfg.data to the folder, beside it first"""
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
        files.stop(f"--data {cfg.data} has no row that could be read{details}. The first lines of "
                   "corpus.py show the forms")
    held, n_shared = sides(prompts, held, held_by_row)
    seen, first = set(), []
    for prompt_and_side in zip(prompts, held):
        first.append(prompt_and_side not in seen)
        seen.add(prompt_and_side)
    bounds = np.frombuffer(bounds, np.int64).reshape(-1, 4)
    report = report_of(cfg, block_size, bounds, sum(held), n_shared, cut, notes)
    with files.new_folder(folder, unless_there=True) as beside:              # another run may be faster
        np.save(beside / "tokens.npy", np.frombuffer(tokens, dtype))
        np.save(beside / "bounds.npy", bounds)
        np.save(beside / "held_out.npy", np.array(held))
        np.save(beside / "first.npy", np.array(first))
        (beside / "rows.txt").write_text(files.visible(report), encoding="utf-8")


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


# --------------------------------------------------------------------------------------------------
# What the stages take: sequences of token lists, train and held out

def built_in_prompts():
    """The built-in task's prompts, as texts -> training prompts, held-out prompts"""
    prompts = reviews.all_prompts()
    return [p for p in prompts if not held_out(p.encode())], [p for p in prompts if held_out(p.encode())]


@functools.lru_cache(maxsize=1)
def built_in_texts(n_texts, n_held_out, seed):
    """Reviews by the grammar -> (prompts, responses) to train on, the same held out"""
    train, held = built_in_prompts()
    return reviews.sample(n_texts, seed, train), reviews.sample(n_held_out, seed + 1, held)


def some_texts(cfg, n, n_held_out):
    """Texts to train on, from which a tokenizer may be learned"""
    if cfg.data == "reviews":
        return [prompt + response for prompt, response in zip(*built_in_texts(n, n_held_out, cfg.seed)[0])]
    found = itertools.islice(examples(cfg.data, {}), n)
    return ["".join((prompt, *responses[:1]))[:LONGEST] for _, prompt, responses in found]


def demonstrations(cfg, tokenizer, block_size, n, n_held_out):
    """-> train, held out, at most n and n_held_out: sequences of (prompt, better response)"""
    if cfg.data == "reviews":
        return [list(zip(*data.encode_texts(tokenizer, *texts)))
                for texts in built_in_texts(n, n_held_out, cfg.seed)]
    rows = rows_of(cfg, tokenizer, block_size)
    answered = rows.bounds[:, 2] > rows.bounds[:, 1]
    if not answered.any():
        files.stop(f"--data {cfg.data} has prompts but no responses: there is nothing for SFT to "
                   "learn from. Run sft.py on data with responses, --out NAME; then RL or "
                   "evaluation on these prompts, --base NAME")
    return [Part(rows, at[:size], lambda prompt, response, worse: (prompt, response))
            for at, size in zip(both_parts(cfg, rows, answered), (n, n_held_out))]


def compared(rows):
    """Which rows have a worse response, too -> (N,)"""
    return rows.bounds[:, 3] > rows.bounds[:, 2]


def check_comparisons(cfg):
    """Stops, before any work, on files without a comparison."""
    if cfg.data == "reviews" or not os.path.exists(cfg.data):
        return
    if not any(len(responses) == 2 for _, _, responses in examples(cfg.data, {})):
        stop_without_comparisons(cfg)


def stop_without_comparisons(cfg):
    files.stop(f"--data {cfg.data} has no comparisons, but rows of one response or none: there is "
               "nothing for a reward model or DPO to learn from. They take a better and a worse "
               "response to a prompt (chosen, rejected); without one there is --reward "
               "path/to/file.py:function")


def comparisons(cfg, tokenizer, block_size, n, n_held_out):
    """-> train, held out, at most so many: sequences of {prompt_ids, response_ids: [better, worse]}"""
    rows = rows_of(cfg, tokenizer, block_size)
    if not compared(rows).any():
        stop_without_comparisons(cfg)
    return [Part(rows, at[:size], lambda *ids: {"prompt_ids": ids[0], "response_ids": list(ids[1:])})
            for at, size in zip(both_parts(cfg, rows, compared(rows)), (n, n_held_out))]


def prompts(cfg, tokenizer, block_size, n_eval=None):
    """-> training prompts, held-out prompts, n_eval different ones or all: sequences of token lists"""
    if cfg.data == "reviews":
        train, held = [[data.encode_prompt(tokenizer, prompt) for prompt in part] for part in built_in_prompts()]
        longest = max(map(len, train + held))
    else:
        rows = rows_of(cfg, tokenizer, block_size)
        train, held = (Part(rows, at, lambda prompt, *responses: prompt) for at in both_parts(cfg, rows, rows.first))
        longest = cfg.max_prompt_tokens
    check_room(cfg, longest, block_size)
    if n_eval is None:
        return train, held
    check_n_eval(n_eval, len(held))
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(cfg.seed))
    return train, [held[i] for i in order[:n_eval].tolist()]


def check_n_eval(n_eval, n_held):
    if n_eval > n_held:
        files.stop(f"{n_eval} held-out prompts are asked for (--n_eval, in sample.py --n), there are {n_held}; lower it to "
                   "that or less")


def check_room(cfg, longest, block_size):
    """Stops where the longest prompt leaves no room for a response in what the model can read."""
    if longest + cfg.max_new_tokens > block_size:
        lower = f"lower --max_new_tokens to {block_size - longest}" if longest < block_size else "shorten the prompts"
        files.stop(f"prompts of up to {longest} tokens and --max_new_tokens {cfg.max_new_tokens} exceed the model's "
                   f"block_size {block_size}; {lower}, or train a model that reads more (sft.py --block_size)")


def source_of(items):
    """What tells the rows that a stage takes from others: for its checkpoint"""
    return items.rows.folder.name if isinstance(items, Part) else "reviews"


def both_parts(cfg, rows, wanted=True):
    """Indices of the wanted rows to train on, and of those held out, in an order that is not that of the files"""
    order = np.random.default_rng(0).permutation(len(rows))      # the same whatever the seed
    parts = []
    for side in (False, True):
        keep = wanted & (rows.held_out == side)
        parts.append(order[keep[order]])
    if not all(map(len, parts)):
        files.stop(f"{cfg.data} has {len(parts[0])} rows to train on and {len(parts[1])} held out; there "
                   "must be some of both, and the eighth of the prompts that is held out needs more rows")
    return parts
