"""
What both test files use: runs to look at, settings for them, small models.

python -m pytest --slow also runs the tests that take minutes each.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")    # for small models a second thread only waits
os.environ.setdefault("HF_HUB_OFFLINE", "1")     # no test asks the network for anything
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")         # its threads do not survive a fork

import pytest
import torch

import data
import dpo
import grpo
import policy_gradient
import ppo
import reviews
import reward as reward_py
import reward_model
import sft
from lab import config as settings
from lab import corpus, files, forms
from lab import report as reports
from lab import run as runs
from lab import tokenizer as tokenizers
from model import GPT, GPTConfig, ScalarGPT


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; --slow runs it"))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes, run with --slow")


def seeded(n=0):
    return torch.Generator().manual_seed(n)


def small_gpt(vocab_size=11, block_size=16, seed=0, std=0.3):
    """A GPT whose random weights are large enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(vocab_size, block_size, n_layer=2, n_head=2, n_embd=16)).eval()
    for p in gpt.parameters():
        p.data.normal_(std=std)
    return gpt


def small_scalar(seed=0):
    torch.manual_seed(seed)
    scalar = ScalarGPT(GPTConfig(11, 16, n_layer=2, n_head=2, n_embd=16)).eval()
    for p in scalar.parameters():
        p.data.normal_(std=0.3)
    return scalar


def held_out_prompts(tokenizer, n, seed=5):
    """Held-out prompts of the built-in task, as token lists"""
    return data.prompts(tiny_config(ppo, seed=seed), tokenizer, 72, n)[1]


AWKWARD = [
    "", " ", "  two  spaces ", "\n\n \n\t  run   of\r\n whitespace   ", "tabs\tand\nlines\n\n",
    "family 👨‍👩‍👧 🏳️‍🌈", "emoji 🎬🙂", "naïve café", "漢字", "\x00\x7f", "12345 67", "a" * 50,
    "don't we'll", "a<|endoftext|>b <|pad|>", "<|endoftext|>",
    "The acting is good.<|endoftext|> More."]


def review_texts(n, seed):
    return [prompt + response for prompt, response in zip(*reviews.sample(n, seed=seed))]


@pytest.fixture(scope="session")
def tokenizer():
    return tokenizers.train_tokenizer(review_texts(400, seed=3))


HUMAN = "\n\nHuman: "
TURN = forms.TURN


def comparison(i, words=3):
    """A row in HH-RLHF's form; prompts and responses have different lengths in different rows"""
    longer = " and so on" * (i % words)
    prompt = f"{HUMAN}Tell me about number {i}{longer}.{TURN}"
    marks = "!" * (i % 4)
    return {"chosen": f"{prompt} Number {i} is good{marks}",
            "rejected": f"{prompt} I do not like {i}."}


def write_rows(path, rows):
    """Write rows, objects or lines of text, to a file -> its path as text"""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """Work in an empty folder -> its path"""
    monkeypatch.chdir(tmp_path)
    corpus.load_rows.cache_clear()
    return tmp_path


def texts_cfg(path, **changes):
    """Settings for rows from a file"""
    lengths = {"max_prompt_tokens": 60, "max_new_tokens": 20}
    return dataclasses.replace(ppo.Config(), data=str(path), **(lengths | changes))


def in_a_child(work):
    """Do some work in a forked process -> minus the signal that ended it, or its exit code"""
    child = os.fork()
    if child == 0:
        code = 1
        faulthandler.dump_traceback_later(120, exit=True)        # a child that hangs would hang all
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def killed_at(monkeypatch, owner, name, call, after=False):
    """From now on the call-th call of a function kills this process, before it or after it."""
    original = getattr(owner, name)
    calls = []

    def deadly(*args, **kwargs):
        calls.append(1)
        if len(calls) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    monkeypatch.setattr(owner, name, deadly)


class Malicious:
    """An object whose unpickling makes a folder"""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return (os.mkdir, (self.folder,))


def load_own(tokenizer, spec, **changes):
    """The reward that --reward names, not normalised"""
    cfg = dataclasses.replace(grpo.Config(), reward=spec, normalise_reward=False, **changes)
    return reward_py.load_reward(cfg, None, tokenizer, [], "cpu")


def tiny_config(script, **changes):
    return script.Config(**({"config": "tiny"} | changes))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """python ppo.py --config tiny, which makes all stages; then the others -> folder, results"""
    home = tmp_path_factory.mktemp("whole_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        results = ppo.main(tiny_config(ppo))
        dpo.main(tiny_config(dpo))
        grpo.main(tiny_config(grpo))
        policy_gradient.main(tiny_config(policy_gradient, out="ladder", base="tiny"))
    return home / "out" / "tiny", results


@pytest.fixture
def finished_run(whole_run, monkeypatch):
    """Work in the folder of the whole run, where --base tiny finds its stages -> out/"""
    monkeypatch.chdir(whole_run[0].parent.parent)
    return whole_run[0].parent


@contextlib.contextmanager
def crash_at(step, monkeypatch):
    """The power fails right after an update was logged."""
    original = runs.Run.log

    def crash(run, now, *args, **kwargs):
        original(run, now, *args, **kwargs)
        if now == step:
            raise RuntimeError("the power went")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the power went"):
        patch.setattr(runs.Run, "log", crash)
        yield


def assert_same_run(folder, other):
    """Checkpoints, results and logs are equal bit for bit, except for times; no update is lost"""
    free = (*settings.MAY_CHANGE_ON_RESUME, "base")
    checkpoints, logs = [], []
    for run in (folder, other):
        saved = files.load_checkpoint(run)
        saved["config"] = {k: v for k, v in saved["config"].items() if k not in free}
        checkpoints.append(saved)
        logs.append([{k: v for k, v in line.items() if not re.search("_seconds$|_per_second$", k)}
                     for line in log_of(run)])
    assert_same_bits(*checkpoints)
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == list(range(len(logs[0])))
    assert (folder / "results.json").read_text() == (other / "results.json").read_text()


def assert_same_bits(a, b):
    assert type(a) is type(b)
    if torch.is_tensor(a):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same_bits(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_bits(x, y)
    else:
        assert a == b


def short_config(script, **changes):
    """A run of SFT in a second, with several checkpoints"""
    short = dict(steps=5, save_every=2, n_texts=100, n_eval=8, batch_size=4, eval_every=3)
    return tiny_config(script, **(short | changes))


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes longer than the rest of a run of two updates."""
    monkeypatch.setattr(reports, "curves", lambda folder, panels: folder / "curves.png")


@pytest.fixture(scope="session")
def user_run(tmp_path_factory):
    """
    A user's folder -> its path, results of ppo

    It has gpt2, a model and its tokenizer as transformers saves them, pairs.jsonl, story.txt, and a
    run `own` of every stage on them, with LoRA of rank 2.
    """
    from transformers import GPT2Config, GPT2LMHeadModel
    home = tmp_path_factory.mktemp("own")
    rows = [comparison(i) for i in range(160)]
    tokenizer = tokenizers.train_tokenizer([row["chosen"] for row in rows], 400)
    torch.manual_seed(0)
    eos_id = tokenizer.eot_token
    config = GPT2Config(vocab_size=tokenizer.n_vocab, n_positions=96, n_layer=1, n_head=2,
                        n_embd=32, bos_token_id=eos_id, eos_token_id=eos_id)
    GPT2LMHeadModel(config).save_pretrained(home / "gpt2")
    tokenizers.export_tokenizer(tokenizer, home / "gpt2")
    write_rows(home / "pairs.jsonl", rows)
    story = [f"Number {i} is good, says the story.\n" for i in range(400)]
    (home / "story.txt").write_text("".join(story))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(reports, "curves", lambda folder, panels: folder / "curves.png")
        few = dict(n_eval=4, n_samples=4)
        sft.main(user_config(sft, init="gpt2", steps=30, n_texts=None, n_eval=10, batch_size=8,
                             lora_rank=0))
        reward_model.main(user_config(reward_model, n_prompts=None, n_held_out=15))
        results = ppo.main(user_config(ppo, steps=4, ptx_coef=0.5, ptx_data="story.txt", ema=0.8,
                                       **few))
        dpo.main(user_config(dpo, n_pairs=100, **few))
        grpo.main(user_config(grpo, steps=3, **few))
    return home, results


def user_config(script, **changes):
    """Settings for a stage on the user's files"""
    user = dict(out="own", data="pairs.jsonl", max_prompt_tokens=40, max_new_tokens=12, lora_rank=2)
    return tiny_config(script, **(user | changes))


@pytest.fixture
def user_folder(user_run, monkeypatch, no_pictures):
    """Work in the user's folder -> out/"""
    monkeypatch.chdir(user_run[0])
    return user_run[0] / "out"


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory):
    """Folders with small classifiers of one, two and three labels, with tokenizers of their own"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
    home = tmp_path_factory.mktemp("classifiers")
    words = ["[PAD]", "[UNK]", *"the a is not good superb plot acting . ! see it".split()]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="[PAD]", unk_token="[UNK]",
                                   model_max_length=12)
    for labels in (1, 2, 3):
        torch.manual_seed(labels)
        bert = BertForSequenceClassification(BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=12, num_labels=labels, pad_token_id=0))
        for p in bert.parameters():
            p.data.normal_(std=0.3)
        bert.save_pretrained(home / str(labels))
        fast.save_pretrained(home / str(labels))
    return home


def preset_of(name, script, **changes):
    return script.Config(config=name, **changes)
