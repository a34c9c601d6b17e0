"""
Where the texts come from: the built-in task, files, the Hugging Face hub.

    --data reviews          the built-in task, reviews.py
    --data PATH             a .jsonl or .jsonl.gz file, or a folder of them; or a plain .txt, as pieces of some
                            1,000 characters
    --data hh               HH-RLHF, helpful-base and harmless-base (Bai et al. 2022), from the hub
    --data tldr             comparisons of summaries (Stiennon et al. 2020), from where OpenAI published them
    --data hf:OWNER/NAME    the train split of a data set of the hub, by the datasets package

A line of a file is one JSON object, a row of a data set one record, in one of these forms:

    {"chosen", "rejected"}              HH-RLHF's dialogues. The prompt is what they share, up to and with the last
                                        "\\n\\nAssistant:"
    {"prompt", "chosen", "rejected"}    comparisons as TRL has them
    {"prompt", "completion"}            the same with one response
    {"messages"}                        [{"role", "content"}, ..]; the last assistant turn is the response
    {"text"}                            a response to no prompt; with --text_prompt n its first n tokens are the prompt
    {"info", "summaries", "choice"}     OpenAI's comparisons of summaries

What cannot be read is left out, counted and named by its line. Where a text stands there may also be a list of
messages, which is written as HH-RLHF writes dialogues. It all becomes rows of token lists: a prompt, a response,
and in a comparison a worse response. A prompt that is longer than --max_prompt_tokens keeps its end. Which prompts
are held out is fixed by a hash of their text before it is cut, so that none is both trained on and measured on. The
rows are stored in out/tokens and mapped into memory from there.
"""

import array
import functools
import gzip
import hashlib
import itertools
import json
import os
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

LONGEST = 100_000               # characters of a text that go to a tokenizer; tiktoken overflows on a million spaces
TURN = "\n\nAssistant:"
SPEAKER = {"user": "\n\nHuman:", "assistant": TURN, "system": "\n\nSystem:"}
HH = [f"{part}/train.jsonl.gz" for part in ("harmless-base", "helpful-base")]
TLDR = "https://openaipublic.blob.core.windows.net/summarize-from-feedback/dataset/comparisons/"
TLDR_FILES = [f"batch{n}.json" for n in range(3, 11)]            # those that their README names for training


# --------------------------------------------------------------------------------------------------
# One record -> prompt, responses

def read_record(record):
    """A JSON object of a form above -> prompt, [response] or [better, worse], as texts; or a ValueError"""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if "summaries" in record and "choice" in record:
        prompt, responses = read_summaries(record)
    else:
        names = next((names for names in (("chosen", "rejected"), ("completion",), ("messages",), ("text",))
                      if all(name in record for name in names)), None)
        if names is None:
            raise ValueError(f"none of the known forms: keys {', '.join(sorted(map(str, record)))[:60]}")
        responses, prompt = [record[name] for name in names], "" if names == ("text",) else record.get("prompt")
        if any(isinstance(text, list) for text in responses):    # of messages
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            prompt, responses = split_dialogues([dialogue(text, prompt or []) for text in responses])
        elif prompt is None:
            prompt, responses = split_dialogues(responses)
        elif isinstance(prompt, list):
            prompt = dialogue(prompt) + TURN
            responses = [f" {text}" if isinstance(text, str) and text[:1].strip() else text for text in responses]
    if not all(isinstance(text, str) for text in (prompt, *responses)):
        raise ValueError("a text is not a string")
    if not all(text.strip() for text in responses):
        raise ValueError("an empty response")
    try:
        "".join((prompt, *responses)).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate, which is no text") from error
    return prompt, responses


def dialogue(messages, before=()):
    """Messages, after those before them where they do not begin with these themselves -> text"""
    if not isinstance(messages, list) or not isinstance(before, (list, tuple)):
        raise ValueError("a text is not a string")
    messages, before = list(messages), list(before)
    if messages[:len(before)] != before and not any(isinstance(m, dict) and m.get("role") == "user" for m in messages):
        messages = before + messages
    try:
        return "".join(f"{SPEAKER[m['role']]} " + m["content"] for m in messages)
    except (TypeError, KeyError) as error:
        raise ValueError("messages want a role, which is user, assistant or system, and content, a text") from error


def split_dialogues(dialogues):
    """Dialogues that differ in their last turn alone -> what they share, up to and with TURN; the turns"""
    if not all(isinstance(text, str) for text in dialogues):
        raise ValueError("a text is not a string")
    at = os.path.commonprefix(dialogues).rfind(TURN)
    if at < 0:
        raise ValueError("no prompt, and the texts share no assistant turn")
    end = at + len(TURN)
    turns = [text[end:] for text in dialogues]
    if any(SPEAKER["user"] in turn or TURN in turn for turn in turns):
        raise ValueError("the dialogues part before their last turn")
    return dialogues[0][:end], turns


def read_summaries(record):
    """OpenAI's comparisons of summaries -> prompt, [better, worse]. CNN/DailyMail articles have no title."""
    try:
        info, choice, texts = record["info"], record["choice"], [s["text"] for s in record["summaries"]]
        better, worse = texts[choice], texts[1 - choice]
        if "article" in info:
            return "Article:\n\n" + info["article"] + "\n\nTL;DR:", [better, worse]
        return ("SUBREDDIT: r/" + info["subreddit"] + "\n\nTITLE: " + info["title"] + "\n\nPOST: " + info["post"]
                + "\n\nTL;DR:", [better, worse])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"a comparison of summaries without its texts ({error})") from error


# --------------------------------------------------------------------------------------------------
# A source -> records

def files_of(source):
    """The files of a source that is a path, or that has to be downloaded first"""
    if source == "hh":
        from huggingface_hub import hf_hub_download
        try:
            return [Path(hf_hub_download("Anthropic/hh-rlhf", name, repo_type="dataset")) for name in HH]
        except Exception as error:
            files.stop(f"--data hh could not be fetched from the hub ({type(error).__name__}); with HH-RLHF's "
                       "files in a folder, --data FOLDER reads them")
    if source == "tldr":
        return [download(TLDR + name, Path("out/downloads/tldr") / name) for name in TLDR_FILES]
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.name.endswith((".jsonl", ".jsonl.gz", ".json")) and p.is_file())
        if not found:
            files.stop(f"--data {source} is a folder without any .jsonl or .jsonl.gz file")
        return found
    check_source(source)
    return [path]


def check_source(source, flag="--data"):
    """Stops on the name of a source that is none; whether the hub has it shows later."""
    known, there = ("reviews", "hh", "tldr"), os.path.isfile(source) or os.path.isdir(source)
    if source not in known and not source.startswith("hf:") and not there:
        beside = [] if os.path.exists(source) else map(str, Path(source).parent.glob("*"))
        hint = options.nearest(source, (*known, *beside))
        files.stop(f"{flag} got {source}{hint}; it takes reviews, hh, tldr, hf:OWNER/NAME, or a file or folder that "
                   "is there")


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
    try:
        import datasets
    except ImportError:
        files.stop(f"--data hf:{name} takes the datasets package: pip install datasets; or write the data set "
                   "to a .jsonl file and give its path")
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:
        files.stop(f"--data hf:{name} could not be loaded ({type(error).__name__}: {files.first_line(error)}); check the "
                   "name and the network, or write it to a .jsonl file and give its path")


def records(source):
    """-> (where it stands, record or None, what is wrong with it), of every line or row that is not empty"""
    if source.startswith("hf:"):
        for n, row in enumerate(hub_data_set(source[3:])):
            yield f"row {n}", row, None
        return
    paths = files_of(source)
    for path in paths:
        n = 0
        try:
            if path.suffix == ".txt":
                for n, piece in enumerate(pieces(path), 1):
                    yield f"piece {n}", {"text": piece}, None
                continue
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
                for n, line in enumerate(lines, 1):
                    where = f"{path.name} line {n}" if len(paths) > 1 else f"line {n}"
                    if line.strip():
                        try:
                            yield where, json.loads(line), None
                        except (ValueError, RecursionError):
                            yield where, None, "not JSON"
        except (OSError, EOFError, zlib.error) as error:
            files.stop(f"{path} cannot be read past {'piece' if path.suffix == '.txt' else 'line'} {n} "
                       f"({type(error).__name__}: {error}); give the whole file, with the right to read it")


def pieces(path, size=1000):
    """A plain text in pieces of about so many characters, cut at line ends"""
    piece = ""
    with open(path, encoding="utf-8", errors="replace") as lines:
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


def examples(source, left_out):
    """Prompt, responses of every record that has some; left_out {what is wrong: [where]} is filled on the way"""
    for where, record, wrong in records(source):
        if wrong is None:
            try:
                yield where, *read_record(record)
                continue
            except ValueError as error:
                wrong = str(error)
        left_out.setdefault(wrong, []).append(where)


# --------------------------------------------------------------------------------------------------
# Records -> rows of token lists, stored once and mapped into memory

class Rows:
    """Rows of a tokenised data set: rows[i] -> prompt, response, worse response ([] if there is none)"""

    def __init__(self, folder):
        self.folder = folder
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        self.bounds = np.load(folder / "bounds.npy", mmap_mode="r")          # (N, 4), in tokens
        self.held_out = np.load(folder / "held_out.npy")                     # (N,) whether the prompt is
        self.first = np.load(folder / "first.npy")                           # (N,) whether the prompt is new
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
        version = hub_data_set(cfg.data[3:])._fingerprint
    else:
        version = [(path.name, digest(path, path.stat().st_size, path.stat().st_mtime_ns)) for path in files_of(cfg.data)]
    key = repr((4, version, data.fingerprint(tokenizer), block_size, cfg.max_prompt_tokens, cfg.text_prompt))
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


def encoded(cfg, tokenizer, block_size, left_out, kept, cut):
    """-> what a row is known by, prompt, [response, ..] of every example, token lists that fit; what does not is counted"""
    found, eos_id = examples(cfg.data, left_out), tokenizer.eot_token
    while chunk := list(itertools.islice(found, 1000)):
        texts = [text for _, prompt, responses in chunk
                 for text in (prompt[-LONGEST:], *(response[:LONGEST] for response in responses))]
        ids = iter(tokenizer.encode_ordinary_batch(texts))
        for where, text, responses in chunk:
            if any(map(files.CONTROL.search, (text, *responses))):
                kept.setdefault("with control characters", []).append(where)
            if cfg.data.endswith(".txt") and "\ufffd" in responses[0]:
                kept.setdefault("with bytes that are no UTF-8, read as \ufffd", []).append(where)
            known_by = (text or responses[0]).encode()
            prompt, responses = next(ids), [next(ids) + [eos_id] for _ in responses]
            if not prompt and cfg.text_prompt:
                prompt, responses = responses[0][:cfg.text_prompt], [responses[0][cfg.text_prompt:]]
                known_by = tokenizer.decode_bytes(prompt)
            prompt = prompt or [eos_id]
            cut["prompts"] += len(prompt) > cfg.max_prompt_tokens
            prompt = prompt[-cfg.max_prompt_tokens:]
            room = block_size - len(prompt)
            cut["responses"] += any(len(response) > room for response in responses)
            responses = [response[:room] for response in responses]
            if responses[0] in ([], [eos_id]):
                left_out.setdefault("no response left", []).append(where)
                continue
            cut["alike"] += responses[0] == responses[-1] and len(responses) == 2
            yield known_by, prompt, responses[:1] if responses[0] == responses[-1] else responses


def tokenise(cfg, tokenizer, block_size, folder):
    """Write the rows of cfg.data to the folder, beside it first"""
    kind, code = (np.uint16, "H") if tokenizer.n_vocab <= 2 ** 16 else (np.uint32, "I")
    tokens, bounds, held, prompts = array.array(code), array.array("q"), [], []
    left_out, kept, cut = {}, {}, {"prompts": 0, "responses": 0, "alike": 0}
    for known_by, prompt, responses in encoded(cfg, tokenizer, block_size, left_out, kept, cut):
        for part in (prompt, *responses):
            bounds.append(len(tokens))
            tokens.extend(part)
        bounds.extend([len(tokens)] * (3 - len(responses)))
        held.append(held_out(known_by))
        shown = array.array(code, prompt).tobytes() if prompt != [tokenizer.eot_token] else known_by
        prompts.append(hashlib.blake2b(shown, digest_size=12).digest())
    # Long prompts that have become equal by the cut: the one that is trained on is held out no more
    trained = {prompt for prompt, out in zip(prompts, held) if not out}
    held = [out and prompt not in trained for prompt, out in zip(prompts, held)]
    seen = set()
    first = [not (prompt in seen or seen.add(prompt)) for prompt in prompts]
    if not held:
        wrong = "; ".join(f"{reason} ({places[0]})" for reason, places in left_out.items())
        files.stop(f"--data {cfg.data} has no row that could be read{': ' * bool(wrong)}{wrong}. The first lines "
                   "of corpus.py show the forms")
    report = [f"{cfg.data}: {len(held)} rows, {sum(held)} of them held out; {cut['prompts']} prompts cut to their last "
              f"{cfg.max_prompt_tokens} tokens, {cut['responses']} rows with a response cut to fit into {block_size}"
              + f", {cut['alike']} with two responses alike, which compare nothing" * (cut["alike"] > 0)]
    for what, reasons in (("more left out,", left_out), ("of them kept as they stand,", kept)):
        for reason, places in reasons.items():
            report.append(f"{len(places)} {what} {reason}: {', '.join(places[:5])}" + ", .." * (len(places) > 5))
    with files.new_folder(folder, unless_there=True) as beside:              # another run may be faster
        np.save(beside / "tokens.npy", np.frombuffer(tokens, kind))
        np.save(beside / "bounds.npy", np.frombuffer(bounds, np.int64).reshape(-1, 4))
        np.save(beside / "held_out.npy", np.array(held))
        np.save(beside / "first.npy", np.array(first))
        (beside / "rows.txt").write_text(files.visible("\n".join(report)), encoding="utf-8")


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
    return [(prompt + responses[0])[:LONGEST] for _, prompt, responses in found]


def demonstrations(cfg, tokenizer, block_size, n, n_held_out):
    """-> train, held out, at most so many: sequences of (prompt, response); of comparisons the better response"""
    if cfg.data == "reviews":
        return [list(zip(*data.encode_texts(tokenizer, *texts)))
                for texts in built_in_texts(n, n_held_out, cfg.seed)]
    rows = rows_of(cfg, tokenizer, block_size)
    return [Part(rows, at[:size], lambda prompt, response, worse: (prompt, response))
            for at, size in zip(both_parts(cfg, rows), (n, n_held_out))]


def compared(rows):
    """Which rows have a worse response, too -> (N,)"""
    return rows.bounds[:, 3] > rows.bounds[:, 2]


def stop_without_comparisons(cfg):
    files.stop(f"--data {cfg.data} has no comparisons, but rows of one response. A reward model is trained on "
               "a better and a worse response to a prompt (chosen, rejected); without one there is --reward "
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
    parts = [order[(wanted & (rows.held_out == held))[order]] for held in (False, True)]
    if not all(map(len, parts)):
        files.stop(f"{cfg.data} has {len(parts[0])} rows to train on and {len(parts[1])} held out; there "
                   "must be some of both, and the eighth of the prompts that is held out needs more rows")
    return parts
