"""
Text to tokens to tensors: the one shift, the one collate, tokenizers. Where texts come from: corpus.py.

    tokens   (B, T+1)   p0 p1 p2 r0 r1 EOS pad pad
    inputs   (B, T)     p0 p1 p2 r0 r1 EOS pad          tokens[:, :-1]
    targets  (B, T)     p1 p2 r0 r1 EOS pad pad         tokens[:, 1:]
    mask     (B, T)     0  0  1  1  1   0   0           1 where the target is a response token

Tokenizers are tiktoken encodings whose one special token is the EOS. The one that a run uses is
written as tokenizer.json beside its checkpoints, and its fingerprint stands in each of them.
"""

import base64
import functools
import hashlib
import json
from pathlib import Path

import tiktoken
import torch

import files

EOS = "<|endoftext|>"
# How GPT-2 cuts text into words before it merges bytes within them
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# --------------------------------------------------------------------------------------------------
# Tensors

def shift(tokens):
    """(B, T+1) tokens -> inputs (B, T), targets (B, T). The only place where anything is shifted."""
    return tokens[:, :-1], tokens[:, 1:]


def collate(prompts, responses):
    """
    Lists of token lists -> inputs, targets, mask, each (B, T), padded on the right with 0.

    A response carries its own EOS, where it has one; all its tokens are in the mask, no prompt's is.

    >>> inputs, targets, mask = collate([[5, 6], [7]], [[8, 9], [9]])
    >>> inputs.tolist(), targets.tolist(), mask.tolist()
    ([[5, 6, 8], [7, 9, 0]], [[6, 8, 9], [9, 0, 0]], [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(f"got {len(prompts)} prompts and {len(responses)} responses; they come in "
                         "pairs, at least one")
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        if not prompt or not response:
            raise ValueError(f"row {i} has an empty {'response' if prompt else 'prompt'}; an empty "
                             "prompt becomes [eos_id], a response has at least its EOS")
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # (B, T+1)
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]      # (B, 1)
    ends = torch.tensor([len(row) for row in rows])[:, None]                 # (B, 1)
    columns = torch.arange(1, width)                                         # of targets, in tokens
    mask = ((columns >= starts) & (columns < ends)).float()                  # (B, T)
    return *shift(tokens), mask


def responses_of(tokens, mask):
    """Collate's inverse for a rollout: tokens (B, T+1), mask (B, T) -> list of response token lists"""
    targets = shift(tokens)[1]
    return [row[m > 0].tolist() for row, m in zip(targets.cpu(), mask.cpu())]


def met_eos(targets, mask, eos_id):
    """Which rows' responses hold an EOS; one in the prompt does not count -> (B,) bool"""
    return ((targets == eos_id) & (mask > 0)).any(dim=1)


def batch_rows(n, batch_size, step, seed):
    """
    Which of n rows make up batch number `step`, in a fresh order each epoch -> list of indices

    A function of the step alone, so that a resumed run has no cursor to lose. What is left over at
    the end of an epoch is dropped.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(f"got batch size {batch_size} for {n} rows; it must be from 1 to {n}")
    epoch, batch = divmod(step, n // batch_size)
    return epoch_order(n, seed, epoch)[batch * batch_size:(batch + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def epoch_order(n, seed, epoch):
    """The order of n rows in an epoch -> list of indices; drawn once, not at each of its batches"""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def parts(rows, n):
    """Rows, a list or a tensor, in n parts of about one size; fewer where there are not as many rows"""
    size = -(-len(rows) // n)
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def draw(items, n, generator):
    """n of the items, drawn alike with replacement."""
    return [items[i] for i in torch.randint(len(items), (n,), generator=generator).tolist()]


# --------------------------------------------------------------------------------------------------
# Tokenizers

def train_tokenizer(texts, vocab_size=1024):
    """Byte-level BPE learned from texts -> tiktoken.Encoding; smaller if no more merges are left."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    every_byte = sorted(pre_tokenizers.ByteLevel.alphabet())     # so that any text can be encoded
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=every_byte, show_progress=False))
    return make_encoding("trained", bpe.get_vocab())


def gpt2_tokenizer(source=None):
    """
    GPT-2's encoding, or another byte-level BPE made like it: of a folder, or of a name on the hub

    read from tokenizer.json, else vocab.json and merges.txt; by default tiktoken's own copy of GPT-2's.
    """
    if source is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:
            raise ValueError("tiktoken could not fetch GPT-2's vocabulary, which needs the network "
                             "once; give a folder that holds GPT-2's vocab.json and merges.txt "
                             f"instead ({type(error).__name__}: {error})") from error
    folder = Path(source)
    if not folder.is_dir():
        folder = from_hub(source, ["tokenizer.json", "vocab.json", "merges.txt"])
    if (folder / "tokenizer.json").is_file():
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("model", {})
        if model.get("type") != "BPE" or "merges" not in model:
            raise ValueError(f"{folder}/tokenizer.json is no byte-level BPE, which is what GPT-2 has")
        vocab = model["vocab"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    else:
        vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
        for path in (vocab_file, merges_file):
            if not path.is_file():
                raise ValueError(f"{path} is not there; a GPT-2 tokenizer folder has vocab.json and "
                                 "merges.txt, or tokenizer.json")
        vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
        merges = [line for line in merges_file.read_text(encoding="utf-8").split("\n")
                  if line and not line.startswith("#version")]
    vocab = {token: i for token, i in vocab.items() if token != EOS}
    if sorted(vocab, key=vocab.get)[256:] != [merge.replace(" ", "") for merge in merges]:
        raise ValueError(f"{folder}: the vocabulary does not number the merges in their order, as GPT-2's does")
    return make_encoding("gpt2", vocab)


def from_hub(name, patterns):
    """Download the files of a model that match -> their folder"""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise ValueError(f"{name} is no folder here, and as a name it could not be fetched from the hub "
                         f"({type(error).__name__}); check the spelling and the network") from error


def printable():
    """{byte: the character that byte-level BPE writes for it}"""
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in themselves]         # as chr(256 + i)
    return {b: chr(b) for b in themselves} | {b: chr(256 + i) for i, b in enumerate(others)}


def make_encoding(name, vocab):
    """{token in byte-level BPE's printable characters: id}, ids in merge order -> tiktoken.Encoding"""
    to_byte = {character: byte for byte, character in printable().items()}
    ranks = {bytes(to_byte[c] for c in token): i for token, i in vocab.items()}
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the vocabulary has no token for the byte {missing[0]}, so that not every text could be encoded")
    return encoding(name, PATTERN, ranks, len(ranks))


def encoding(name, pattern, ranks, eos_id):
    """{token bytes: id} -> tiktoken.Encoding, which would end the program at two tokens with one id"""
    if len(set(ranks.values())) < len(ranks):
        raise ValueError("the vocabulary has two tokens with one id")
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOS: eos_id})


def merges_of(ranks):
    """{token bytes: rank} -> [(left, right)], in order: what each token that is no byte was merged from"""
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
    bpe = Tokenizer(models.BPE({write(token): i for token, i in ranks.items()},
                               [(write(a), write(b)) for a, b in merges_of(ranks)]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([EOS] + ["<|pad|>"] * pad)
    special = {"bos_token": EOS, "eos_token": EOS} | ({"pad_token": "<|pad|>"} if pad else {})
    PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(folder)


def fingerprint(tokenizer):
    """A digest of all that decides how text becomes ids."""
    ranks = sorted(tokenizer._mergeable_ranks.items(), key=lambda item: item[1])
    content = repr((tokenizer._pat_str, ranks, tokenizer.eot_token))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def save_tokenizer(tokenizer, folder):
    ranks = {base64.b64encode(token).decode(): i for token, i in tokenizer._mergeable_ranks.items()}
    content = {"name": tokenizer.name, "pattern": tokenizer._pat_str, "eos": tokenizer.eot_token,
               "ranks": ranks}
    files.write(Path(folder) / "tokenizer.json", json.dumps(content))


def load_tokenizer(folder):
    path = Path(folder) / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ranks = {base64.b64decode(token): i for token, i in content["ranks"].items()}
        return encoding(content["name"], content["pattern"], ranks, content["eos"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        files.stop(f"{path} cannot be read as a tokenizer ({type(error).__name__}); it stands beside every "
                   f"checkpoint; {files.again(folder)}")


def check_vocabulary(wanted, tokenizer, folder):
    """Stops where a checkpoint's fingerprint is not that of the tokenizer it is used with."""
    if wanted != fingerprint(tokenizer):
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


def texts_of(tokenizer, inputs, targets, mask):
    """A batch's rows -> prompts, responses as texts, without any EOS"""
    prompts, responses = [], []
    for row, chosen, m in zip(inputs.tolist(), targets.tolist(), (mask > 0).tolist()):
        prompt, first = row[:m.index(True) + 1], [tokenizer.eot_token]       # an empty one is [eos_id]
        prompts.append(tokenizer.decode([] if prompt == first else prompt))
        responses.append(decode_response(tokenizer, [token for token, at in zip(chosen, m) if at])[0])
    return prompts, responses
