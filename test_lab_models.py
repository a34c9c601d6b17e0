"""Tokenizers of Llama 3, Qwen and SmolLM2, chat templates: to become a section of lab/test_lab.py"""
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest

from lab import chat, forms, tokenizer as tokenizers

# --------------------------------------------------------------------------------------------------
# tokenizer.py: Llama 3, Qwen and SmolLM2; chat.py

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHAT_TOKENS = {
    "gpt2": [], "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}
KINDS = list(CHAT_TOKENS)
NO_TOKEN = (4, 6, 19, 192, 193, 241, 245, 255)           # bytes that this smollm2 has no token for


def trained_kind(kind):
    """A tokenizer.json of one of these kinds, trained on the spot"""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    made = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    patterns = {"qwen": QWEN, "llama3": LLAMA}
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in patterns)
    made.pre_tokenizer = last
    if kind in patterns:
        cut = pre_tokenizers.Split(Regex(patterns[kind]), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([cut, last])
    if kind == "smollm2":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), last])
    if kind == "qwen":
        made.normalizer = normalizers.NFC()
    absent = {tokenizers.printable()[byte] for byte in NO_TOKEN if kind == "smollm2"}
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - absent)
    first = CHAT_TOKENS[kind] if kind == "smollm2" else []
    texts = ["The years 1999 and 2024, don't WE'LL go?  \n\n naïve café in Việt Nam; 日本語 текст",
             "def f(x):\n    return x + 17\n\n\nShe said: it isn't so ... 3,141.59"] * 20
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=520, initial_alphabet=alphabet, special_tokens=first, show_progress=False))
    content = json.loads(made.to_str())
    vocab = content["model"]["vocab"]
    if kind == "llama3":                                 # each way to make a token, by its id
        vocab["Ġzqxj"] = len(vocab)                      # reached by no merge: whole words only
        content["model"]["merges"] = [
            pair for token, _ in sorted(vocab.items(), key=lambda item: item[1])
            for pair in sorted(([token[:i], token[i:]] for i in range(1, len(token))
                                if token[:i] in vocab and token[i:] in vocab),
                               key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    if kind in patterns:
        n = max(vocab.values()) + 1
        content["added_tokens"] = [added(n + i, x) for i, x in enumerate(CHAT_TOKENS[kind])]
        if kind == "qwen":
            content["added_tokens"].append(added(n + 3, "<think>", special=False))
    if kind == "llama3":
        template = {"type": "TemplateProcessing", "pair": [], "single": [
            {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [n],
                                  "tokens": ["<|begin_of_text|>"]}}}
        byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
                      "use_regex": True}
        content["post_processor"] = {"type": "Sequence", "processors": [byte_level, template]}
    return content


def added(i, text, special=True):
    return dict(id=i, content=text, special=special, single_word=False, lstrip=False, rstrip=False,
                normalized=False)


CHATML = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'"
          " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
          "{% endif %}")
LLAMA3 = ("{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
          "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
          "{% endif %}")
TEMPLATES = {"gpt2": None, "qwen": CHATML, "llama3": LLAMA3, "smollm2": CHATML}
EOS = {"gpt2": "<|endoftext|>", "qwen": "<|endoftext|>", "llama3": "<|eot_id|>",
       "smollm2": "<|im_end|>"}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """{kind: a folder with its tokenizer files}"""
    folders = {}
    for kind in KINDS:
        folders[kind] = folder = tmp_path_factory.mktemp(kind)
        (folder / "tokenizer.json").write_text(json.dumps(trained_kind(kind)))
        config = {"eos_token": EOS[kind]}
        if TEMPLATES[kind]:
            config["chat_template"] = TEMPLATES[kind]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folders


RANGES = [(0, 32), (32, 127), (32, 127), (32, 127), (160, 0x250), (0x300, 0x370), (0x370, 0x530),
          (0x900, 0x980), (0x1100, 0x1200), (0x2000, 0x2070), (0x3000, 0xd7a4),
          (0x1f300, 0x1f600), (0x40000, 0x40010)]
PIECES = [" ", "\n", "\t", "\r\n", "  ", "   ", "'s", "'LL", "1999", " the", " 42", "\u00a0",
          "e\u0301", "ﬁ", "don't", " Việt", "½", "²", " zqxj", "zqxj", "<|im_end|>", "<|eot_id|>"]


def random_text(rng):
    return "".join(chr(rng.randrange(*rng.choice(RANGES))) if rng.random() < 0.55
                   else rng.choice(PIECES) for _ in range(rng.randrange(14)))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_those_of_the_tokenizers_library(kind, kinds, tmp_path):
    """On 20,000 random texts; what is exported and read again has the same ids"""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    ours = tokenizers.pretrained_tokenizer(kinds[kind])
    theirs = Tokenizer.from_file(str(kinds[kind] / "tokenizer.json"))
    theirs.encode_special_tokens = True                  # as text
    tokenizers.export_tokenizer(ours, tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    absent = bytes(NO_TOKEN) if kind == "smollm2" else b""
    rng = random.Random(0)
    for i in range(20_000):
        text = random_text(rng)
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        wanted = unicodedata.normalize("NFC", text) if kind == "qwen" else text
        assert ours.decode_bytes(ids) == wanted.encode().translate(None, absent)
        if i < 500:
            again = exported(text, add_special_tokens=False, split_special_tokens=True)
            assert again["input_ids"] == ids
    ours.decode(list(range(ours.n_vocab)))               # gaps too
    again = tokenizers.pretrained_tokenizer(tmp_path)
    tokenizers.save_tokenizer(ours, tmp_path)
    stored = tokenizers.load_tokenizer(tmp_path)
    assert stored.options() == ours.options()
    assert (tokenizers.tokenizer_id(ours) == tokenizers.tokenizer_id(again)
            == tokenizers.tokenizer_id(stored))


def test_a_byte_without_a_token_is_said_and_left_out(kinds, capsys):
    ours = tokenizers.pretrained_tokenizer(kinds["smollm2"])
    assert "no token for 8 of the 256 bytes (4, 6, 19, 192, 193, ..)" in capsys.readouterr().out
    assert ours.decode(ours.encode_ordinary("a\x04b\x06")) == "ab"
    assert ours.encode_ordinary("\x04") == [] and tokenizers.encode_prompt(ours, "\x04") == [2]


def test_added_tokens_that_are_not_special_are_read_in_text(kinds):
    ours = tokenizers.pretrained_tokenizer(kinds["qwen"])
    think = ours._special_tokens["<think>"]
    ids = ours.encode_ordinary("so <think>\n17")
    assert ids.count(think) == 1 and ours.decode(ids) == "so <think>\n17"
    assert ours._special_tokens["<|im_end|>"] not in ours.encode_ordinary("<|im_end|>")


def test_a_prompt_starts_with_exactly_one_bos_where_the_model_uses_one(kinds):
    ours = tokenizers.pretrained_tokenizer(kinds["llama3"])
    bos = ours._special_tokens["<|begin_of_text|>"]
    assert tokenizers.encode_prompt(ours, "") == [bos]
    ids = tokenizers.encode_prompt(ours, "some words in a row")
    assert ids[0] == bos and ids.count(bos) == 1
    cut = tokenizers.cut_start(ours, ids, 3)
    assert cut == [bos, *ids[-2:]] and tokenizers.cut_start(ours, ids, 1) == ids[-1:]
    ours = chat.set_chat(ours, "auto", "", kinds["llama3"])
    ids = tokenizers.encode_prompt(ours, chat.written([("user", "Hi")], ours.chat))
    assert ids[0] == bos and ids.count(bos) == 1
    plain = tokenizers.pretrained_tokenizer(kinds["gpt2"])
    assert tokenizers.cut_start(plain, [5, 6, 7], 2) == [6, 7]


def test_the_sampler_stops_at_every_end_that_generation_config_names(kinds, tmp_path):
    for path in kinds["qwen"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    n = tokenizers.pretrained_tokenizer(tmp_path).eot_token
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [n + 2, n]}))
    ours = tokenizers.pretrained_tokenizer(tmp_path)
    assert ours.end_tokens == (n, n + 2)
    ours = chat.set_chat(ours, "auto", "", tmp_path)     # now the EOS is what ends a turn
    assert ours.eot_token == n + 2 and ours.end_tokens == (n + 2, n)
    text = ours.encode_ordinary("yes")
    assert tokenizers.decode_response(ours, text + [n]) == ("yes", True)
    assert tokenizers.decode_response(ours, text + [n + 2]) == ("yes", True)
    assert tokenizers.decode_response(ours, text) == ("yes", False)


# ---- chat templates

DIALOGUES = [[("user", "Hi")], [("system", "Be brief."), ("user", " 2 + 2?\n")],
             [("user", "a"), ("assistant", "b"), ("user", "c")],
             [("system", "S"), ("user", "a"), ("assistant", "b\n\nc"), ("user", "<|im_end|> 1999")]]


@pytest.mark.parametrize("kind", ["qwen", "llama3", "smollm2"])
def test_dialogues_are_the_ids_that_the_models_own_template_gives(kind, kinds, capsys):
    from tokenizers import Tokenizer
    ours = chat.set_chat(tokenizers.pretrained_tokenizer(kinds[kind]), "auto", "", kinds[kind])
    assert "note: the model's" not in capsys.readouterr().out
    theirs = Tokenizer.from_file(str(kinds[kind] / "tokenizer.json"))
    for turns in DIALOGUES:
        if "<|im_end|>" in turns[-1][1]:                 # there theirs takes it for the token
            turns = [*turns[:-1], ("user", "1999")]
        text = chat.rendered(TEMPLATES[kind], turns, ours)
        ids = ours.encode_ordinary(chat.written(turns, ours.chat))
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text


@pytest.mark.parametrize("kind", ["qwen", "llama3", "smollm2"])
def test_text_never_ends_a_turn_or_starts_one(kind, kinds):
    ours = chat.set_chat(tokenizers.pretrained_tokenizer(kinds[kind]), "auto", "", kinds[kind])
    special = set(ours._special_tokens.values())
    clean = ours.encode_ordinary(chat.written([("user", "hi")], ours.chat))
    for token in ours._special_tokens:
        forged = f"hi{token}{tokenizers.MARK}{token}"
        ids = ours.encode_ordinary(chat.written([("user", forged)], ours.chat))
        assert sum(i in special for i in ids) == sum(i in special for i in clean) or token == "<think>"


def test_a_note_says_where_the_models_template_differs(kinds, tmp_path, capsys):
    for path in kinds["qwen"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own = ("{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe nice.<|im_end|>\n' }}"
           "{% endif %}" + CHATML)
    (tmp_path / "chat_template.jinja").write_text(own)   # wins over tokenizer_config.json
    ours = tokenizers.pretrained_tokenizer(tmp_path)
    chat.set_chat(ours, "auto", "", tmp_path)
    note = capsys.readouterr().out
    assert "own chat template writes '<|im_start|>system\\nBe nice.<|im_end|>" in note
    chat.set_chat(ours, "auto", "Be nice.", tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / "chat_template.jinja").write_text("{{ broken")
    chat.set_chat(ours, "chatml", "", tmp_path)
    assert "could not be compared" in capsys.readouterr().out


def test_templates_and_tokens_that_are_not_known_are_refused(kinds, tmp_path):
    for path in kinds["gpt2"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    ours = tokenizers.pretrained_tokenizer(tmp_path)
    assert chat.set_chat(ours, "auto", "", tmp_path).chat == "plain"
    with pytest.raises(ValueError, match="writes <.im_start.>, <.im_end.>, which this tokenizer"):
        chat.set_chat(ours, "chatml", "", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("[INST] {{ messages[0].content }} [/INST]")
    with pytest.raises(ValueError, match="neither chatml nor llama3; give --chat plain"):
        chat.set_chat(ours, "auto", "", tmp_path)
    assert chat.set_chat(ours, "plain", "", tmp_path).chat == "plain"


SHOWN = {"\ufdd0<|im_start|>": "[", "\ufdd0<|im_end|>\n": "]"}


def chatml_record(record, system=""):
    prompt, responses = forms.read_record(record, [], "chatml", system)
    for token, short in SHOWN.items():
        prompt = prompt.replace(token, short)
    return prompt, responses


HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Hello. "}]
MARKED = "a\ufdd0<|im_end|>"


@pytest.mark.parametrize("record, prompt, responses", [
    ({"prompt": "Hi", "completion": " Hello."}, "[user\nHi][assistant\n", ["Hello."]),
    ({"prompt": "Hi"}, "[user\nHi][assistant\n", []),
    ({"system": "S", "prompt": "Hi"}, "[system\nS][user\nHi][assistant\n", []),
    ({"messages": HELLO}, "[user\nHi][assistant\n", [" Hello. "]),
    ({"system": "S", "messages": HELLO}, "[system\nS][user\nHi][assistant\n", [" Hello. "]),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
     "[user\nHi][assistant\n", ["Yes", "No"]),
    ({"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "completion": " d"},
     "[user\na][assistant\nb][user\nc][assistant\n", ["d"]),
    ({"prompt": "Hi", "completion": "Hi there"}, "[user\nHi][assistant\n", ["there"]),
    ({"prompt": HELLO[:1] + [{"role": "assistant", "content": "Hel"}], "completion": "lo"},
     "[user\nHi][assistant\nHel", ["lo"]),
    ({"text": "as it is"}, "", ["as it is"]),
    ({"text": MARKED}, "", ["a\ufffd<|im_end|>"]),
    ({"prompt": MARKED, "completion": MARKED}, "[user\na\ufffd<|im_end|>][assistant\n",
     ["a\ufffd<|im_end|>"]),
    ({"messages": [{"role": "user", "content": MARKED}, {"role": "assistant", "content": MARKED}]},
     "[user\na\ufffd<|im_end|>][assistant\n", ["a\ufffd<|im_end|>"])])
def test_records_are_written_by_the_template(record, prompt, responses):
    assert chatml_record(record) == (prompt, responses)


def test_a_system_turn_is_added_only_where_there_is_none():
    assert chatml_record({"prompt": "Hi"}, "S")[0] == "[system\nS][user\nHi][assistant\n"
    assert (chatml_record({"system": "T", "prompt": "Hi"}, "S")[0]
            == "[system\nT][user\nHi][assistant\n")
    assert chatml_record({"text": "x"}, "S")[0] == ""
