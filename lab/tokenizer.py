"""
Text to tokens and back: tokenizers as tiktoken encodings.

    train_tokenizer             a byte-level BPE learned from texts
    gpt2_tokenizer              GPT-2's, or one like it from a folder or the hub
    save_tokenizer, load_tokenizer      tokenizer.json, beside every checkpoint
    export_tokenizer            for transformers' AutoTokenizer
    encode_prompt, encode_texts, decode_response

A tokenizer's eot_token is the id of its EOS. Text never becomes the EOS or a different special
token.
"""

import base64
import hashlib
import json
from pathlib import Path

import tiktoken

from lab import files, pretrained

EOS = "<|endoftext|>"
# How GPT-2 cuts text into words. Bytes are merged within a word only
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts, vocab_size=1024):
    """Byte-level BPE learned from texts -> Encoding; smaller if the texts offer too few merges"""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    every_byte = sorted(pre_tokenizers.ByteLevel.alphabet())     # so any text can be encoded
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=every_byte, show_progress=False))
    vocab = bpe.get_vocab()
    return make_encoding("trained", vocab, {EOS: len(vocab)}, EOS)


# --------------------------------------------------------------------------------------------------
# From files of other projects

def gpt2_tokenizer(source=None):
    """
    GPT-2's encoding, or a byte-level BPE of the same kind from a folder or a name on the hub

    By default it is tiktoken's own copy. A folder has tokenizer.json, or else vocab.json and
    merges.txt. A nanoGPT checkpoint has GPT-2's, unless these files are beside it. The files give
    the ids of the special tokens and say which one is the EOS.
    """
    if source is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:
            raise ValueError("tiktoken could not fetch GPT-2's vocabulary, which needs the network "
                             "once; give a folder that holds GPT-2's vocab.json and merges.txt "
                             f"instead ({type(error).__name__}: {error})") from error
    folder = Path(source)
    if folder.is_file():                                 # tokenizer.json itself, or ckpt.pt
        folder = folder.parent
    if not folder.is_dir():
        folder = pretrained.from_hub(source, ["*.json", "merges.txt"])
    has_files = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    if not has_files and pretrained.nanogpt(source):
        n_ids = pretrained.read(source)[0].get("vocab_size", 0)
        if n_ids < 50257:
            raise ValueError(f"{source} has {n_ids} token ids, fewer than GPT-2's 50257, so it has "
                             "a tokenizer of its own; name it with --tokenizer FOLDER. nanoGPT's "
                             "meta.pkl is not read, since a pickle can run code")
        return gpt2_tokenizer()
    if not has_files and (folder / "meta.pkl").is_file():
        raise ValueError(f"{folder}/meta.pkl, which lists characters for nanoGPT, is not read, "
                         "since a pickle can run code; wanted tokenizer.json, or vocab.json and "
                         "merges.txt")
    vocab, merges, added = read_bpe(folder)
    special, eos = special_tokens(folder, vocab, merges, added)
    ordinary = {token: i for token, i in vocab.items() if token not in special}
    parts = {part for merge in merges for part in merge}
    if merges_of(ordinary) != merges or not parts <= ordinary.keys():
        raise ValueError(f"{folder}: the vocabulary does not number the merges in their order, as "
                         "GPT-2's does")
    return make_encoding("gpt2", ordinary, special, eos)


def read_bpe(folder):
    """
    tokenizer.json, or else vocab.json and merges.txt -> {token: id}, merges as pairs, added tokens

    Raises a ValueError that names the settings that are not implemented here.
    """
    settings = read_optional(folder / "tokenizer_config.json")
    refused = [name for name in ("add_prefix_space", "add_bos_token") if settings.get(name)]
    path = folder / "tokenizer.json"
    if path.is_file():
        content = pretrained.read_json(path)
        model = content.get("model", {})
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise ValueError(f"{path} does not hold a byte-level BPE, as GPT-2 has")
        refused += unsupported(content)
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
    for token in added:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if not token.get("special"):
            flags.append("not special")
        if flags:
            refused.append(f"the added token {token['content']!r} ({', '.join(flags)})")
    if refused:
        raise ValueError(f"{folder} asks for what GPT-2's tokenizer does not do: "
                         f"{', '.join(refused[:5])}; wanted plain byte-level BPE")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return vocab, [tuple(pair) for pair in pairs], added


def read_optional(path):
    return pretrained.read_json(path) if path.is_file() else {}


def unsupported(content):
    """The settings of a tokenizer.json that go beyond GPT-2's byte-level BPE -> list of names"""
    found = []
    for name in ("dropout", "unk_token", "byte_fallback", "ignore_merges",
                 "continuing_subword_prefix", "end_of_word_suffix"):
        if content["model"].get(name):
            found.append(f"{name} {content['model'][name]!r}")
    for step in steps(content.get("normalizer")):
        found.append(f"the normalizer {step['type']}")
    for step in steps(content.get("post_processor")):
        adds = any("SpecialToken" in part for part in step.get("single", []))
        if adds or step["type"] not in ("ByteLevel", "TemplateProcessing"):
            found.append(f"the post-processor {step['type']}, which adds tokens")
    cuts = steps(content.get("pre_tokenizer"))
    kinds = [step["type"] for step in cuts]
    if kinds != ["ByteLevel"]:
        found.append(f"the pre-tokenizer {' + '.join(kinds) or 'null'}")
    elif cuts[0].get("add_prefix_space"):
        found.append("add_prefix_space, a space before each text")
    elif not cuts[0].get("use_regex", True):
        found.append("use_regex false")
    return found


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
    The tokens that text never becomes -> {token: id}, and which of them is the EOS

    They are the added tokens, the EOS, and any token with a lower id than every byte, since nothing
    can have been merged by then. The tokenizer's files name the EOS, or else the model's config.
    """
    named = None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_optional(folder / name).get("eos_token")
        named = named or (token.get("content") if isinstance(token, dict) else token)
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
    return special, eos


# --------------------------------------------------------------------------------------------------
# Vocabularies -> encodings

class Encoding(tiktoken.Encoding):
    eot_token = None                         # the EOS's id; tiktoken's is always <|endoftext|>'s


def encoding(name, pattern, ranks, special, eos_id):
    """{token bytes: id} -> Encoding. If two tokens had one id, tiktoken would end the program."""
    if len({*ranks.values(), *special.values()}) < len(ranks) + len(special):
        raise ValueError("the vocabulary has two tokens with one id")
    made = Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    made.eot_token = eos_id
    return made


def make_encoding(name, vocab, special, eos):
    """
    {token in byte-level BPE's printable characters: id}, ids in merge order -> Encoding

    special: {token: id}, eos among them. Ids without a token become special tokens, since a model
    may sample them.
    """
    to_byte = {character: byte for byte, character in printable().items()}
    for token in vocab:
        if not token or not set(token) <= to_byte.keys():
            raise ValueError(f"the token {token!r} is not written in byte-level BPE's characters")
    ranks = {bytes(to_byte[c] for c in token): i for token, i in vocab.items()}
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the vocabulary has no token for the byte {missing[0]}, so not every "
                         "text could be encoded")
    used = {*ranks.values(), *special.values()}
    if max(used) >= 2 ** 20:
        raise ValueError(f"the vocabulary has a token with the id {max(used)}; wanted ids below "
                         f"{2 ** 20}")
    unused = {f"<|unused {i}|>": i for i in range(max(used)) if i not in used}
    return encoding(name, PATTERN, ranks, unused | special, special[eos])


def printable():
    """{byte: the character that byte-level BPE writes for it}"""
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in themselves]         # as chr(256 + i)
    return {b: chr(b) for b in themselves} | {b: chr(256 + i) for i, b in enumerate(others)}


def merges_of(ranks):
    """{token: rank} -> [(left, right)], in order: the two parts of each token of several bytes"""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:                            # as BPE would, with the merges so far
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
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
    if tokenizer._special_tokens != {EOS: tokenizer.eot_token}:  # otherwise as earlier versions had
        content += (sorted(tokenizer._special_tokens.items()),)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def check_vocabulary(wanted, tokenizer, folder):
    """Exit unless this tokenizer's id is the one that a checkpoint stores."""
    if wanted != tokenizer_id(tokenizer):
        files.stop(f"{folder}/checkpoint.pt was trained with a different vocabulary; use stages of "
                   "one run, or make this one again")


def save_tokenizer(tokenizer, folder):
    ranks = {base64.b64encode(token).decode(): i for token, i in tokenizer._mergeable_ranks.items()}
    content = {"name": tokenizer.name, "pattern": tokenizer._pat_str, "eos": tokenizer.eot_token,
               "special": tokenizer._special_tokens, "ranks": ranks}
    files.write(Path(folder) / "tokenizer.json", json.dumps(content))


def load_tokenizer(folder):
    path = Path(folder) / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ranks = {base64.b64decode(token): i for token, i in content["ranks"].items()}
        special = content.get("special", {EOS: content["eos"]})  # earlier versions had this alone
        if content["eos"] not in special.values():
            raise ValueError("the EOS is not a special token")
        return encoding(content["name"], content["pattern"], ranks, special, content["eos"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        files.stop(f"{path} cannot be read as a tokenizer ({type(error).__name__}). Every "
                   f"checkpoint has one beside it; {files.recovery_hint(folder)}")


def export_tokenizer(tokenizer, folder, pad=False):
    """Write it for transformers' AutoTokenizer; pad adds a special token with the next id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    characters = printable()
    write = lambda token: "".join(characters[byte] for byte in token)
    special = dict(tokenizer._special_tokens)
    eos = next(token for token, i in special.items() if i == tokenizer.eot_token)
    roles = {"bos_token": eos, "eos_token": eos}
    if pad:
        name = "<|pad|>" if "<|pad|>" not in special else f"<|pad {tokenizer.n_vocab}|>"
        special[name] = tokenizer.n_vocab
        roles["pad_token"] = name
    ranks = tokenizer._mergeable_ranks
    vocab = {write(token): i for token, i in ranks.items()}
    vocab |= special                                     # or they would get different ids
    bpe = Tokenizer(models.BPE(vocab, [(write(a), write(b)) for a, b in merges_of(ranks)]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(special))
    PreTrainedTokenizerFast(tokenizer_object=bpe, **roles).save_pretrained(folder)


# --------------------------------------------------------------------------------------------------
# Texts <-> ids

def encode_prompt(tokenizer, text):
    """Ids of a prompt, [eos_id] for an empty one. Special tokens in the text are plain text."""
    return tokenizer.encode_ordinary(text) or [tokenizer.eot_token]


def encode_texts(tokenizer, prompts, responses):
    """Texts -> prompts and responses, as lists of token lists; each response ends in the EOS"""
    return ([encode_prompt(tokenizer, prompt) for prompt in prompts],
            [tokenizer.encode_ordinary(text) + [tokenizer.eot_token] for text in responses])


def decode_response(tokenizer, ids):
    """Ids -> text without the EOS, whether there was one"""
    finished = bool(ids) and ids[-1] == tokenizer.eot_token
    if finished:
        ids = ids[:-1]
    return tokenizer.decode(ids), finished
