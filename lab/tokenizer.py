"""
Text to tokens and back: tokenizers as tiktoken encodings.

    train_tokenizer             a byte-level BPE learned from texts
    pretrained_tokenizer        GPT-2's, Llama 3's, Qwen's, SmolLM2's, .., from a folder or the hub
    save_tokenizer, load_tokenizer      tokenizer.json, beside every checkpoint
    export_tokenizer            for transformers' AutoTokenizer
    encode_prompt, encode_texts, decode_response

A tokenizer's eot_token is the id of its EOS; end_tokens are all ids that end a response, the EOS
first. Text never becomes the EOS or a different special token.
"""

import base64
import hashlib
import json
import re
import unicodedata
from pathlib import Path

import regex
import tiktoken

from lab import files, pretrained

EOS = "<|endoftext|>"
# How GPT-2 cuts text into words. Bytes are merged within a word only
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after every digit was split off, as SmolLM2 and StarCoder do: spaces before a digit then
# end a piece
DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
USUAL = {"bos": None, "nfc": False, "in_text": [], "chat": "plain", "system": ""}
MARK = "\ufdd0"        # before a special token that a chat template writes; it is not a character


def train_tokenizer(texts, vocab_size=1024):
    """Byte-level BPE learned from texts -> Encoding; smaller if the texts offer too few merges"""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    every_byte = sorted(pre_tokenizers.ByteLevel.alphabet())     # so any text can be encoded
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=every_byte, show_progress=False))
    vocab = bpe.get_vocab()
    return make_encoding("trained", vocab, {EOS: len(vocab)}, (len(vocab),))


# --------------------------------------------------------------------------------------------------
# From files of other projects

def pretrained_tokenizer(source=None):
    """
    GPT-2's encoding, or a byte-level BPE from a folder or a name on the hub

    By default it is tiktoken's own copy. A folder has tokenizer.json, or else vocab.json and
    merges.txt. A nanoGPT checkpoint has GPT-2's, unless these files are beside it. The files give
    the ids of the special tokens and say which one is the EOS.
    """
    if source is None:
        try:
            return encoding(*tiktoken_gpt2())
        except Exception as error:
            raise ValueError("tiktoken could not fetch GPT-2's vocabulary, which needs the network "
                             "once; give a folder that holds GPT-2's vocab.json and merges.txt "
                             f"instead ({type(error).__name__}: {error})") from error
    folder = tokenizer_folder(source)
    has_files = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if not has_files and pretrained.nanogpt(source):
        n_ids = pretrained.read(source)[0].get("vocab_size", 0)
        if n_ids < 50257:
            raise ValueError(f"{source} has {n_ids} token ids, fewer than GPT-2's 50257, so it has "
                             "a tokenizer of its own; name it with --tokenizer FOLDER. nanoGPT's "
                             "meta.pkl is not read, since a pickle can run code")
        return pretrained_tokenizer()
    if not has_files and (folder / "meta.pkl").is_file():
        raise ValueError(f"{folder}/meta.pkl, which lists characters for nanoGPT, is not read, "
                         "since a pickle can run code; wanted tokenizer.json, or vocab.json and "
                         "merges.txt")
    vocab, merges, added, options = read_bpe(folder)
    special, ends = special_tokens(folder, vocab, merges, added)
    ordinary = {token: i for token, i in vocab.items() if token not in special}
    check_merges(folder, ordinary, merges, options.pop("ignore_merges"))
    bos = options.pop("bos")
    if bos != "" and bos not in special:
        raise ValueError(f"{folder} puts {bos} before every text, but has no such token")
    options["bos"] = special.get(bos)
    options["in_text"] = [token["content"] for token in added
                          if not token.get("special") and token["id"] not in ends]
    if options["nfc"] and not "".join(options["in_text"]).isascii():
        raise ValueError(f"{folder} has NFC and added tokens that are not ASCII, "
                         f"{', '.join(options['in_text'])[:100]}: which comes first is not "
                         "implemented here")
    made = make_encoding("gpt2", ordinary, special, ends, **options)
    if made.absent:
        print(f"note: the tokenizer in {folder} has no token for {len(made.absent)} of the 256 "
              f"bytes ({files.first_few(list(map(str, made.absent)), 5)}); they are dropped from "
              "texts")
    return made


def tokenizer_folder(source):
    """The folder with a tokenizer's files: of a file, a folder, or a name on the hub"""
    folder = Path(source)
    if folder.is_file():                                 # tokenizer.json itself, or ckpt.pt
        folder = folder.parent
    if not folder.is_dir():
        folder = pretrained.from_hub(source, ["*.json", "*.jinja", "merges.txt"])
    return folder


def tiktoken_gpt2():
    """The arguments of `encoding` for tiktoken's copy of GPT-2's"""
    made = tiktoken.get_encoding("gpt2")
    return "gpt2", made._pat_str, made._mergeable_ranks, made._special_tokens, (made.eot_token,)


def check_merges(folder, ordinary, merges, ignore_merges):
    """
    Raise unless the ids alone give the order of merging, which is how tiktoken merges.

    They do if they grow in the order of the merges, and each token's last merge, by the ids, is one
    of them. A token that no merges reach is allowed only if whole words are looked up first.
    """
    reached = merges_of(ordinary)
    n_long = sum(len(token) > 1 for token in ordinary)
    ids = [ordinary.get(left + right, -1) for left, right in merges]
    parts = {part for merge in merges for part in merge}
    complete = len(reached) == n_long or ignore_merges
    if -1 in ids or ids != sorted(ids) or not set(reached) <= set(merges) or not complete \
            or not parts <= ordinary.keys():
        raise ValueError(f"{folder}: the vocabulary does not number the merges in their order, as "
                         "GPT-2's does")


def read_bpe(folder):
    """
    tokenizer.json, or else vocab.json and merges.txt -> {token: id}, merges as pairs, added tokens,
    options of make_encoding

    Raises a ValueError that names the settings that are not implemented here.
    """
    settings = read_optional(folder / "tokenizer_config.json")
    refused = [name for name in ("add_prefix_space", "add_eos_token") if settings.get(name)]
    options = {"pattern": PATTERN, "nfc": False, "bos": "", "ignore_merges": False}
    path = folder / "tokenizer.json"
    if path.is_file():
        content = pretrained.read_json(path)
        model = content.get("model", {})
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise ValueError(f"{path} does not hold a byte-level BPE like GPT-2's")
        refused += read_options(content, options)
        vocab, merges, added = model["vocab"], model["merges"], content.get("added_tokens") or []
    else:
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} does not exist; a GPT-2 tokenizer folder has "
                                 "vocab.json and merges.txt, or tokenizer.json")
        vocab = pretrained.read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        listed = settings.get("added_tokens_decoder", {})
        added = [token | {"id": int(i)} for i, token in listed.items()]
        if not added:                                    # older folders have this file instead
            listed = read_optional(folder / "added_tokens.json")
            added = [{"id": i, "content": token, "special": True} for token, i in listed.items()]
    if settings.get("add_bos_token"):
        options["bos"] = text_of(settings.get("bos_token"))
    for token in added:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if flags:
            refused.append(f"the added token {token['content']!r} ({', '.join(flags)})")
    if refused:
        raise ValueError(f"{folder} asks for things that are not implemented here: "
                         f"{', '.join(refused[:5])}; wanted byte-level BPE as in GPT-2, Llama 3 or "
                         "Qwen")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return vocab, [tuple(pair) for pair in pairs], added, options


def text_of(token):
    """A token in a config, as its text or as an object with its content"""
    return token.get("content") if isinstance(token, dict) else token


def read_optional(path):
    return pretrained.read_json(path) if path.is_file() else {}


def read_options(content, options):
    """Fill in what a tokenizer.json asks for -> names of what is not implemented"""
    found = []
    options["ignore_merges"] = bool(content["model"].get("ignore_merges"))
    for name in ("dropout", "unk_token", "byte_fallback", "continuing_subword_prefix",
                 "end_of_word_suffix"):
        if content["model"].get(name):
            found.append(f"{name} {content['model'][name]!r}")
    for step in steps(content.get("normalizer")):
        if step["type"] != "NFC":
            found.append(f"the normalizer {step['type']}")
        options["nfc"] = True
    for step in steps(content.get("post_processor")):
        parts = step.get("single", [])
        if len(parts) == 2 and "SpecialToken" in parts[0] and "Sequence" in parts[1]:
            options["bos"] = parts[0]["SpecialToken"]["id"]
        elif (any("SpecialToken" in part for part in parts)
              or step["type"] not in ("ByteLevel", "TemplateProcessing")):
            found.append(f"the post-processor {step['type']}, which adds tokens")
    cuts = steps(content.get("pre_tokenizer"))
    kinds = [step["type"] for step in cuts]
    last = cuts[-1] if cuts else {}
    if last.get("add_prefix_space"):
        found.append("add_prefix_space, a space before each text")
    elif kinds == ["ByteLevel"] and last.get("use_regex", True):
        options["pattern"] = PATTERN
    elif (kinds == ["Digits", "ByteLevel"] and cuts[0].get("individual_digits")
          and last.get("use_regex", True)):
        options["pattern"] = DIGITS
    elif kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and is_cut(cuts[0]):
        options["pattern"] = cuts[0]["pattern"]["Regex"]
        if not covers_all_text(options["pattern"]):
            found.append("a Split whose regex leaves text out or matches nothing")
    else:
        found.append(f"the pre-tokenizer {' + '.join(kinds) or 'null'}, with these settings")
    return found


def covers_all_text(pattern):
    """Whether a regex matches any character alone and never nothing, as tiktoken needs"""
    try:
        compiled = regex.compile(pattern)
    except regex.error:
        return False
    probes = [chr(i) for i in (*range(0x3000), 0x4e00, 0xac00, 0xe000, 0xfffd, 0x1f600, 0x10ffff)]
    return not compiled.match("") and all(compiled.fullmatch(probe) for probe in probes)


def is_cut(split):
    """Whether a Split cuts text into the matches of its regex"""
    how = (split.get("behavior"), bool(split.get("invert")))
    return "Regex" in split.get("pattern", {}) and how in (("Isolated", False), ("Removed", True))


def steps(part):
    """A part of a tokenizer.json, which is null, one step or a sequence -> list of steps"""
    if not part:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("normalizers") or part.get("pretokenizers") or part.get("processors") or []
    return [step for x in inner for step in steps(x)]


def special_tokens(folder, vocab, merges, added):
    """
    The tokens that text never becomes -> {token: id}, and which of them end a response, EOS first

    They are the added tokens, the EOS, and any token with a lower id than every byte, since nothing
    can have been merged by then. The tokenizer's files name the EOS, or else the model's config.
    """
    named = None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        named = named or text_of(read_optional(folder / name).get("eos_token"))
    end_ids = {}
    for name in ("config.json", "generation_config.json"):
        ids = read_optional(folder / name).get("eos_token_id")
        end_ids[name] = ids if isinstance(ids, list) else [ids]

    special = {token["content"]: token["id"] for token in added}
    alphabet = set(printable().values())
    ordinary = alphabet | {left + right for left, right in merges}
    first = min((i for token, i in vocab.items() if token in alphabet), default=0)
    for token, i in vocab.items():
        is_end = token in (named, EOS) or i in end_ids["config.json"]
        if token not in ordinary and (i < first or is_end):
            special.setdefault(token, i)
    for token, i in special.items():
        if token in ordinary or vocab.get(token, i) != i:
            raise ValueError(f"{folder}: the special token {token!r} has a second id, or is also a "
                             "piece of ordinary text")

    token_of = {i: token for token, i in special.items()}
    eos = named or next((token_of[i] for i in end_ids["config.json"] if i in token_of), EOS)
    if eos not in special:
        if eos != EOS or (special and not named):
            raise ValueError(f"{folder} does not say which of its special tokens ends a text: "
                             f"wanted one of {', '.join(special)[:200] or 'none'} as eos_token in "
                             f"tokenizer_config.json, got {named}")
        special[EOS] = 1 + max(*vocab.values(), *special.values())
    others = [f"{name} has eos_token_id {ids}" for name, ids in end_ids.items()
              if ids != [None] and special[eos] not in ids]
    if others:
        print(f"note: the tokenizer in {folder} ends a text with {eos} (id {special[eos]}), "
              f"{' and '.join(others)}; the tokenizer's is used")
    known = {*vocab.values(), *special.values()}
    more = [i for i in end_ids["generation_config.json"] if i is not None]
    if not all(isinstance(i, int) for i in more):
        raise ValueError(f"{folder}/generation_config.json has eos_token_id {more}, wanted ids of "
                         "tokens; correct it")
    nameless = [i for i in more if i not in known]
    if nameless:
        print(f"note: {folder}/generation_config.json has eos_token_id {nameless}, which the "
              "tokenizer does not have; not used")
    ends = [special[eos], *(i for i in more if i in known)]
    return special, tuple(dict.fromkeys(ends))


# --------------------------------------------------------------------------------------------------
# Vocabularies -> encodings

class Encoding(tiktoken.Encoding):
    """
    A tiktoken encoding that also knows

    eot_token   the id of the EOS, which training data end with; tiktoken's is <|endoftext|>'s
    end_tokens  the ids that end a sampled response, the EOS first
    bos         the id that every prompt starts with, or None
    nfc         whether text is normalised first (Unicode's NFC)
    in_text     added tokens that text may become, such as <think>
    absent      the bytes that have no token; text is read without them
    chat, system    the template of dialogues, and the system turn for those that have none
    """

    eot_token = None                                     # a property in tiktoken

    def set_up(self, ends, bos=None, nfc=False, in_text=(), chat="plain", system=""):
        self.eot_token = ends[0]
        self.end_tokens = ends
        self.bos = bos
        self.nfc = nfc
        self.in_text = list(in_text)
        self.chat = chat
        self.system = system
        self.absent = [x for x in range(256) if bytes([x]) not in self._mergeable_ranks]
        marked = [MARK + token for token in self._special_tokens] if chat != "plain" else []
        longest_first = sorted(marked + self.in_text, key=len, reverse=True)
        tokens = "|".join(map(re.escape, longest_first))
        self.tokens_in_text = re.compile(f"({tokens})") if tokens else None
        return self

    def options(self):
        return {"ends": self.end_tokens, "bos": self.bos, "nfc": self.nfc, "in_text": self.in_text,
                "chat": self.chat, "system": self.system}

    def encode_ordinary(self, text):
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        if self.tokens_in_text is None:
            return self.encode_words(text)
        ids = []
        for i, part in enumerate(self.tokens_in_text.split(text)):
            if i % 2:
                ids.append(self._special_tokens[part.removeprefix(MARK)])
            else:
                ids += self.encode_words(part)
        return ids

    def encode_words(self, text):
        text = text.encode(errors="replace").decode()      # a lone surrogate is no text
        if not (self.absent and set(self.absent) & set(text.encode())):
            return super().encode_ordinary(text)
        ids = []
        for word in regex.finditer(self._pat_str, text):
            piece = word.group().encode().translate(None, bytes(self.absent))
            if piece:                                    # tiktoken crashes on an empty one
                ids += self._encode_single_piece(piece)
        return ids


def encoding(name, pattern, ranks, special, ends, **options):
    """{token bytes: id} -> Encoding. If two tokens had one id, tiktoken would crash."""
    if len({*ranks.values(), *special.values()}) < len(ranks) + len(special):
        raise ValueError("the vocabulary has two tokens with one id")
    made = Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return made.set_up(tuple(ends), **options)


def make_encoding(name, vocab, special, ends, pattern=PATTERN, **options):
    """
    {token in byte-level BPE's printable characters: id}, ids in merge order -> Encoding

    special: {token: id}. Ids without a token become special tokens, since a model may sample them.
    """
    to_byte = {character: byte for byte, character in printable().items()}
    for token in vocab:
        if not token or not set(token) <= to_byte.keys():
            raise ValueError(f"the token {token!r} is not written in byte-level BPE's characters")
    ranks = {bytes(to_byte[c] for c in token): i for token, i in vocab.items()}
    used = {*ranks.values(), *special.values()}
    if max(used) >= 2 ** 20:
        raise ValueError(f"the vocabulary has a token with the id {max(used)}; wanted ids below "
                         f"{2 ** 20}")
    unused = {f"<|unused {i}|>": i for i in range(max(used)) if i not in used}
    return encoding(name, pattern, ranks, unused | special, ends, **options)


def printable():
    """{byte: the character that byte-level BPE writes for it}"""
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in themselves]         # as chr(256 + i)
    return {b: chr(b) for b in themselves} | {b: chr(256 + i) for i, b in enumerate(others)}


def merges_of(ranks):
    """
    {token: rank} -> [(left, right)], in order: the two parts of each token of several bytes

    A token that merging never reaches has none.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:                            # as BPE would, with the merges so far
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            if min(pairs) >= rank:
                break
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


# --------------------------------------------------------------------------------------------------
# Storing and comparing

def tokenizer_id(tokenizer):
    """A digest of everything that decides how text becomes ids and ids become text"""
    ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
    content = (tokenizer._pat_str, ranks, tokenizer.eot_token)
    if tokenizer._special_tokens != {EOS: tokenizer.eot_token}:  # otherwise as in earlier versions
        content += (sorted(tokenizer._special_tokens.items()),)
    options = tokenizer.options()
    content += tuple((name, options[name]) for name, usual in USUAL.items()
                     if options[name] != usual)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def check_vocabulary(wanted, tokenizer, folder):
    """Exit unless this tokenizer's id is the one that a checkpoint stores."""
    if wanted != tokenizer_id(tokenizer):
        files.stop(f"{folder}/checkpoint.pt was trained with a different vocabulary; use stages of "
                   "one run, or run this one again")


def save_tokenizer(tokenizer, folder):
    ranks = {base64.b64encode(token).decode(): i for token, i in tokenizer._mergeable_ranks.items()}
    content = {"name": tokenizer.name, "pattern": tokenizer._pat_str, "eos": tokenizer.eot_token,
               "special": tokenizer._special_tokens, "options": tokenizer.options(), "ranks": ranks}
    files.write(Path(folder) / "tokenizer.json", json.dumps(content))


def load_tokenizer(folder):
    path = Path(folder) / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ranks = {base64.b64decode(token): i for token, i in content["ranks"].items()}
        special = content.get("special", {EOS: content["eos"]})  # earlier versions had only this
        options = content.get("options", {"ends": [content["eos"]]})
        if options["ends"][0] not in special.values():
            raise ValueError("the EOS is not a special token")
        return encoding(content["name"], content["pattern"], ranks, special, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        files.stop(f"{path} cannot be read as a tokenizer ({type(error).__name__}). Every "
                   f"checkpoint has one beside it; {files.recovery_hint(folder)}")


def export_tokenizer(tokenizer, folder, pad=False, chat_template=None):
    """Write it for transformers' AutoTokenizer; pad adds a special token with the next id."""
    from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                            pre_tokenizers, processors)
    from transformers import PreTrainedTokenizerFast
    characters = printable()
    write = lambda token: "".join(characters[byte] for byte in token)
    special = dict(tokenizer._special_tokens)
    names = {i: token for token, i in special.items()}
    eos = names[tokenizer.eot_token]
    roles = {"bos_token": names.get(tokenizer.bos, eos), "eos_token": eos}
    if pad:
        name = "<|pad|>" if "<|pad|>" not in special else f"<|pad {tokenizer.n_vocab}|>"
        special[name] = tokenizer.n_vocab
        roles["pad_token"] = name
    ranks = tokenizer._mergeable_ranks
    vocab = {write(token): i for token, i in ranks.items()}
    vocab |= special                                     # or they would get different ids
    merges = merges_of(ranks)
    whole_words = len(merges) < sum(len(token) > 1 for token in ranks)       # Llama 3
    bpe = Tokenizer(models.BPE(vocab, [(write(a), write(b)) for a, b in merges],
                               ignore_merges=whole_words))
    if tokenizer.nfc:
        bpe.normalizer = normalizers.NFC()
    cut = []
    if tokenizer._pat_str == DIGITS:
        cut = [pre_tokenizers.Digits(individual_digits=True)]
    elif tokenizer._pat_str != PATTERN:
        cut = [pre_tokenizers.Split(Regex(tokenizer._pat_str), "isolated")]
    own_pattern = tokenizer._pat_str in (PATTERN, DIGITS)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_pattern)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*cut, byte_level]) if cut else byte_level
    bpe.decoder = decoders.ByteLevel()
    if tokenizer.bos is not None:
        bos = names[tokenizer.bos]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos)])
    bpe.add_special_tokens([token for token in special if token not in tokenizer.in_text])
    bpe.add_tokens([AddedToken(token, normalized=False) for token in tokenizer.in_text])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)
    made.chat_template = chat_template
    made.save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# Texts <-> ids

def start_of(tokenizer):
    """The id before a text without a prompt: the BOS if the model uses one, or else the EOS"""
    return tokenizer.eot_token if tokenizer.bos is None else tokenizer.bos


def with_start(tokenizer, ids):
    """The ids of a prompt after the BOS if the model uses one; an empty one becomes one token"""
    if tokenizer.bos is not None and ids[:1] != [tokenizer.bos]:
        return [tokenizer.bos, *ids]
    return ids or [start_of(tokenizer)]


def cut_start(tokenizer, ids, n):
    """The last n ids of a prompt; a BOS stays the first"""
    if tokenizer.bos is None:
        return ids[-n:]
    return [tokenizer.bos, *ids[-(n - 1):]] if n > 1 else ids[-1:]


def encode_prompt(tokenizer, text):
    """Ids of a prompt"""
    return with_start(tokenizer, tokenizer.encode_ordinary(text))


def encode_texts(tokenizer, prompts, responses):
    """Texts -> prompts and responses, as lists of token lists; each response ends in the EOS"""
    return ([encode_prompt(tokenizer, prompt) for prompt in prompts],
            [tokenizer.encode_ordinary(text) + [tokenizer.eot_token] for text in responses])


def decode_response(tokenizer, ids):
    """Ids -> text without the token that ends it, whether there was one"""
    finished = bool(ids) and ids[-1] in tokenizer.end_tokens
    if finished:
        ids = ids[:-1]
    return tokenizer.decode(ids), finished
