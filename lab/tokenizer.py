"""
Text to tokens and back: tokenizers as tiktoken encodings.

    train_tokenizer             a byte-level BPE learned from texts
    gpt2_tokenizer              GPT-2's, or one like it from a folder or the hub
    save_tokenizer, load_tokenizer      tokenizer.json, beside every checkpoint
    export_tokenizer            for transformers' AutoTokenizer
    encode_prompt, encode_texts, decode_response

A tokenizer has its EOS's id as eot_token. Text never becomes the EOS or another special token.
"""

import base64
import hashlib
import json
from pathlib import Path

import tiktoken

from lab import files, pretrained

EOS = "<|endoftext|>"
# How GPT-2 cuts text into words before it merges bytes within them
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_tokenizer(texts, vocab_size=1024):
    """Byte-level BPE learned from texts -> tiktoken.Encoding; smaller if no more merges are left."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    every_byte = sorted(pre_tokenizers.ByteLevel.alphabet())     # so that any text can be encoded
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=every_byte, show_progress=False))
    vocab = bpe.get_vocab()
    return make_encoding("trained", vocab, {EOS: len(vocab)}, EOS)


def gpt2_tokenizer(source=None):
    """
    GPT-2's encoding, or a byte-level BPE made like it: of a folder, or of a name on the hub

    read from tokenizer.json, else vocab.json and merges.txt; by default tiktoken's own copy of
    GPT-2's. A checkpoint of nanoGPT has GPT-2's, unless these files are beside it. Special tokens
    have the ids that the files give them, and the files say which one is the EOS.
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
        rows = pretrained.read(source)[0].get("vocab_size", 0)
        if rows < 50257:
            raise ValueError(f"{source} has {rows} token ids, fewer than GPT-2's 50257, so it has "
                             "a tokenizer of its own; name it with --tokenizer FOLDER. Characters "
                             "in nanoGPT's meta.pkl are not read, since a pickle can run code")
        return gpt2_tokenizer()
    if not has_files and (folder / "meta.pkl").is_file():
        raise ValueError(f"{folder}/meta.pkl lists characters for nanoGPT and is not read, since a "
                         "pickle can run code; wanted tokenizer.json, or vocab.json and merges.txt")
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
    tokenizer.json, else vocab.json and merges.txt -> {token: id}, merges as pairs, added tokens

    What they ask for that is not computed here is refused by name.
    """
    settings = read_if_there(folder / "tokenizer_config.json")
    refused = [name for name in ("add_prefix_space", "add_bos_token") if settings.get(name)]
    path = folder / "tokenizer.json"
    if path.is_file():
        content = pretrained.read_json(path)
        model = content.get("model", {})
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise ValueError(f"{path} does not hold a byte-level BPE, which is what GPT-2 has")
        refused += not_computed(content)
        vocab, merges, added = model["vocab"], model["merges"], content.get("added_tokens") or []
    else:
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is not there; a GPT-2 tokenizer folder has "
                                 "vocab.json and merges.txt, or tokenizer.json")
        vocab = pretrained.read_json(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        listed = settings.get("added_tokens_decoder", {})
        added = [token | {"id": int(i)} for i, token in listed.items()]
        if not added:                                    # older folders have this file instead
            listed = read_if_there(folder / "added_tokens.json")
            added = [{"id": i, "content": token, "special": True} for token, i in listed.items()]
    for token in added:
        unlike = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if not token.get("special"):
            unlike.append("not special")
        if unlike:
            refused.append(f"the added token {token['content']!r} ({', '.join(unlike)})")
    if refused:
        raise ValueError(f"{folder} asks for what GPT-2's tokenizer does not do: "
                         f"{', '.join(refused[:5])}; wanted plain byte-level BPE")
    return vocab, [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges], added


def read_if_there(path):
    return pretrained.read_json(path) if path.is_file() else {}


def not_computed(content):
    """What a tokenizer.json asks for that GPT-2's byte-level BPE does not do -> list of names"""
    model, found = content["model"], []
    for name in ("dropout", "unk_token", "byte_fallback", "ignore_merges",
                 "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            found.append(f"{name} {model[name]!r}")
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
    The tokens that no text becomes -> {token: id}, and which of them is the EOS

    They are the added ones, the EOS, and those with ids before the bytes', where nothing can be
    merged yet. The tokenizer's files name the EOS; where they do not, the model's config does.
    """
    named = None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_if_there(folder / name).get("eos_token")
        named = named or (token.get("content") if isinstance(token, dict) else token)
    end_ids = {}
    for name in ("config.json", "generation_config.json"):
        ids = read_if_there(folder / name).get("eos_token_id")
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
            raise ValueError(f"{folder}: the special token {token!r} has a second id, or is a "
                             "piece of ordinary text as well")

    at = {i: token for token, i in special.items()}
    eos = named or next((at[i] for i in end_ids["config.json"] if i in at), EOS)
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


def printable():
    """{byte: the character that byte-level BPE writes for it}"""
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in themselves]         # as chr(256 + i)
    return {b: chr(b) for b in themselves} | {b: chr(256 + i) for i, b in enumerate(others)}


def make_encoding(name, vocab, special, eos):
    """
    {token in byte-level BPE's printable characters: id}, ids in merge order -> Encoding

    special: {token: id}, of which eos is one. Ids that no token has become special tokens, since a
    model may sample them.
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


class Encoding(tiktoken.Encoding):
    eot_token = None                         # the EOS's id; tiktoken's is always <|endoftext|>'s


def encoding(name, pattern, ranks, special, eos_id):
    """{token bytes: id} -> Encoding, which would end the program at two tokens with one id"""
    if len({*ranks.values(), *special.values()}) < len(ranks) + len(special):
        raise ValueError("the vocabulary has two tokens with one id")
    made = Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    made.eot_token = eos_id
    return made


def merges_of(ranks):
    """{token: rank} -> [(left, right)], in order: what each token of several bytes is made of"""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:                            # as BPE would, with the merges of lower rank
            pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def export_tokenizer(tokenizer, folder, pad=False):
    """Write it for transformers' AutoTokenizer; with pad there is one more special token, the next id"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    characters, ranks = printable(), tokenizer._mergeable_ranks
    write = lambda token: "".join(characters[byte] for byte in token)
    special = dict(tokenizer._special_tokens)
    eos = next(token for token, i in special.items() if i == tokenizer.eot_token)
    roles = {"bos_token": eos, "eos_token": eos}
    if pad:
        name = "<|pad|>" if "<|pad|>" not in special else f"<|pad {tokenizer.n_vocab}|>"
        special[name] = tokenizer.n_vocab
        roles["pad_token"] = name
    vocab = {write(token): i for token, i in ranks.items()}
    vocab |= special                                     # else they would get other ids
    bpe = Tokenizer(models.BPE(vocab, [(write(a), write(b)) for a, b in merges_of(ranks)]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(special))
    PreTrainedTokenizerFast(tokenizer_object=bpe, **roles).save_pretrained(folder)


def tokenizer_id(tokenizer):
    """A digest of all that decides how text becomes ids, and ids text."""
    ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
    content = (tokenizer._pat_str, ranks, tokenizer.eot_token)
    if tokenizer._special_tokens != {EOS: tokenizer.eot_token}:  # else as in earlier checkpoints
        content += (sorted(tokenizer._special_tokens.items()),)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


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
        files.stop(f"{path} cannot be read as a tokenizer ({type(error).__name__}); it stands beside every "
                   f"checkpoint; {files.recovery_hint(folder)}")


def check_vocabulary(wanted, tokenizer, folder):
    """Stops where a checkpoint's fingerprint is not that of the tokenizer it is used with."""
    if wanted != tokenizer_id(tokenizer):
        files.stop(f"{folder}/checkpoint.pt was trained with another vocabulary than the one it meets here; use "
                   "stages of one run, or make this one again")


def encode_prompt(tokenizer, text):
    """Ids of a prompt; an empty one is [eos_id]. What looks like a special token is plain text."""
    return tokenizer.encode_ordinary(text) or [tokenizer.eot_token]


def encode_texts(tokenizer, prompts, responses):
    """Texts -> prompts, responses as lists of token lists, the responses with their EOS"""
    return ([encode_prompt(tokenizer, prompt) for prompt in prompts],
            [tokenizer.encode_ordinary(text) + [tokenizer.eot_token] for text in responses])


def decode_response(tokenizer, ids):
    """Ids -> text without the EOS, whether there was one"""
    finished = bool(ids) and ids[-1] == tokenizer.eot_token
    return tokenizer.decode(ids[:-1] if finished else ids), finished
