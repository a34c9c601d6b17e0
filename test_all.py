"""
Every formula against an independent oracle, every script end to end. Offline, on a CPU.

    python -m pytest -q                 all of it, and lab/test_lab.py
    python -m pytest -q test_all.py     all of it
    python -m pytest -q --slow          also the runs at full size
    python -m pytest -q -k gae          one subject
    python test_all.py                  rewrite the line numbers below and in the documentation
    python test_all.py flips            draw docs/flips.png as well

A test's name is the claim it checks.

    line   section
     152   reviews.py
     311   data.py
     347   model.py
     952   model.py: Llama, Qwen2 and Qwen3, against transformers
    1349   sft.py
    1367   reward_model.py
    1425   ppo.py
    1754   dpo.py
    1948   grpo.py
    2363   policy_gradient.py
    2435   frontier.py, compare.py
    2678   evaluate.py
    2708   What people copy
    2877   The proof: a problem so small that every response can be listed
    3847   The scripts, end to end at --config tiny
    5645   The house: what holds for every file
    5785   README.md and docs/
"""

import ast
import contextlib
import copy
import dataclasses
import doctest
import functools
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import compare
import data
import dpo
import evaluate
import frontier
import grpo
import model
import policy_gradient
import ppo
import presets
import reviews
import reward as reward_py
import reward_model
import rollout
import sample
import sampler
import sft
from conftest import (AWKWARD, assert_same_bits, comparison, held_out_prompts, load_own, log_of,
                      Malicious, review_texts, seeded, small_gpt,
                      small_scalar, tiny_config, user_config, write_rows)
from lab import config as settings
from lab import chat, corpus, files, forms, guest, process
from lab import report as reports
from lab import run as runs
from lab import tokenizer as tokenizers
from lab.files import Stopped
from lab.tokenizer import encode_prompt
from model import (GPT, GPTConfig, ScalarGPT, add_lora, masked_mean, merged, sequence_scores,
                   token_logprobs)
from sampler import generate

HERE = Path(__file__).parent
SCRIPTS = (sft, reward_model, ppo, dpo, grpo, policy_gradient, evaluate)
MODULES = (reviews, presets, data, model, sampler, reward_py, frontier, compare, rollout,
           *SCRIPTS, sample)

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 1]]
RESPONSES = [[4, 5, 10], [2, 3, 4, 5, 10], [10], [7, 7, 7, 7, 7, 7]]   # EOS is 10; the last: none


def reward_of(scalar, cfg, **changes):
    """The reward that a reward model of ours gives"""
    cfg = dataclasses.replace(cfg, **changes)
    return reward_py.Reward(functools.partial(sequence_scores, scalar), "", cfg)


def ragged():
    """Random (B, T) tensors and a mask of contiguous responses of different places and lengths."""
    spans = [(0, 9), (2, 3), (4, 9), (8, 9), (1, 5)]     # lengths 9, 1, 5, 1, 4
    mask = torch.tensor([[float(start <= t < end) for t in range(9)] for start, end in spans])
    values = torch.randn(4, 5, 9, generator=seeded(), dtype=torch.float64) * mask
    return (*values, mask.double())


def columns_of(mask):
    """-> [(row, the columns of its response)]"""
    return [(b, row.nonzero()[:, 0].tolist()) for b, row in enumerate(mask)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# Any shapes, any values: what hypothesis finds by trying
strategies = hypothesis.strategies
any_lengths = strategies.lists(                          # (prompt, response) of each row
    strategies.tuples(strategies.integers(1, 6), strategies.integers(1, 7)),
    min_size=1, max_size=6)
any_seed = strategies.integers(0, 2 ** 32 - 1)
any_share = strategies.floats(0, 1)
any_size = strategies.sampled_from([0.0, 1e-12, 1e-3, 1.0, 30.0, 1e6])      # how large numbers are
tried = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)


def random_rows(lengths, seed):
    """Prompts and responses of these lengths, as token lists"""
    chance = random.Random(seed)
    prompts = [chance.choices(range(11), k=n) for n, _ in lengths]
    responses = [chance.choices(range(11), k=n) for _, n in lengths]
    return prompts, responses


def random_tensors(lengths, seed, size):
    """Three tensors (B, T) in float64 of numbers of a size, also off the mask, and the mask"""
    _, _, mask = data.collate(*random_rows(lengths, seed))
    tensors = [size * torch.randn(mask.shape, dtype=torch.float64, generator=seeded(seed + i))
               for i in range(3)]
    return (*tensors, mask.double())


# --------------------------------------------------------------------------------------------------
# reviews.py

CUT_DOWN = {                             # together they use every rule of the grammar
    "one sentence": reviews.Lexicon(
        aspects=("acting", "plot"), verbs=("loved", "hated"), intensifiers=("truly", "quite"),
        adjectives=("superb", "good", "ordinary", "dull", "unbearable"), endings=(0.0, 1.0),
        verdicts=("See it twice.", "Worth a look.", "Skip it."),
        occasions=("on a train", "at a festival")),
    "two sentences": reviews.Lexicon(
        aspects=("acting", "plot"), verbs=("loved", "liked"), intensifiers=(),
        adjectives=("superb", "good", "ordinary", "awful"), endings=(0.0, 0.5, 1.0),
        verdicts=("See it twice.", "Skip it."), occasions=("on a train",))}
TINY_PROMPT = "A western about a lighthouse. On the acting:"


def every_review(lexicon):
    """All texts of a grammar, by walking its choices in every mood -> {text: probability}"""
    texts = {}

    def walk(taken, mood, p):
        grammar = reviews.choices("western", "acting", mood, lexicon)
        try:
            options = next(grammar)
            for phrase in taken:
                options = grammar.send(phrase)
        except StopIteration:
            text = "".join(taken)
            texts[text] = texts.get(text, 0.0) + p
            return
        assert math.isclose(sum(options.values()), 1.0)
        for phrase, probability in options.items():
            walk([*taken, phrase], mood, p * probability)

    for mood, p in reviews.MOODS.items():
        walk([], mood, p)
    return texts


@pytest.fixture(scope="module", params=CUT_DOWN)
def cut_down_grammar(request):
    """-> its lexicon, {text: probability}"""
    lexicon = CUT_DOWN[request.param]
    return lexicon, every_review(lexicon)


def test_grammar_log_probs_sum_to_one_over_every_text_of_a_cut_down_grammar(cut_down_grammar):
    """And each of them is the sum over the derivations of its text"""
    lexicon, texts = cut_down_grammar
    assert len(texts) > 1000
    scored = {text: math.exp(reviews.log_prob(TINY_PROMPT, text, lexicon)) for text in texts}
    assert math.isclose(sum(scored.values()), 1.0, rel_tol=1e-9)
    assert all(math.isclose(scored[text], p, rel_tol=1e-9) for text, p in texts.items())


def test_grammar_samples_texts_with_the_probabilities_it_scores(cut_down_grammar):
    lexicon, texts = cut_down_grammar
    rng = random.Random(0)
    n = 20000
    written = [reviews.write("western", "acting", rng, lexicon) for _ in range(n)]
    assert set(written) <= set(texts)
    for text in sorted(texts, key=texts.get)[-20:]:
        p = texts[text]
        deviation = math.sqrt(p * (1 - p) / n)
        assert abs(written.count(text) / n - p) < 4.5 * deviation      # fails by chance in 1e-4


def test_the_mood_shows_most_in_the_aspect_that_was_asked_for():
    def mean_grade(mood, aspect):
        grammar = reviews.choices("western", "acting", mood)
        next(grammar)
        for phrase in (" The", aspect, " is", "", ""):   # neither "not" nor an intensifier
            options = grammar.send(phrase)
        return sum(p * reviews.GRADES[word[1:]] for word, p in options.items())

    for mood in (-2, -1, 1, 2):
        asked, other = mean_grade(mood, " acting"), mean_grade(mood, " plot")
        assert asked * mood > other * mood > 0
        assert 0.5 < asked / (reviews.LEAN * mood) < 1.3


def test_every_review_of_the_grammar_has_no_fault_and_parses_back():
    for prompt, response in zip(*reviews.sample(300, seed=5)):
        assert reviews.log_prob(prompt, response) > -60
        assert not any(reviews.read(prompt, response)[1].values()), response
        assert reviews.grammatical(prompt, response)


@pytest.mark.parametrize("text, sentiment", [
    (" The acting is good. Skip it.", 1 - 2),
    (" The plot is good. Skip it.", 0.5 - 2),
    (" The acting is not superb. See it twice.", -0.6 * 3 + 3),
    (" The acting is truly dull and rather good. Worth a look.", -2 * 1.3 + 0.7 + 1),
    (" The acting is superb, but the plot is quite dull. Skip it.", 3 - 0.5 * 0.7 * 2 - 2),
    (" I adored the acting. It is an awful western. Skip it.", 3 - 0.5 * 3 - 2),
    (" I saw it on a train. The acting is plain. Fine for a rainy day.", 0.0)])
def test_gold_of_hand_worked_reviews(text, sentiment):
    no_faults = dict.fromkeys(reviews.PENALTIES, 0)
    assert reviews.read(TINY_PROMPT, text) == (pytest.approx(sentiment), no_faults)
    assert reviews.gold(TINY_PROMPT, text) == pytest.approx(sentiment / 3)
    assert reviews.log_prob(TINY_PROMPT, text) > -30


@pytest.mark.parametrize("text, finished, fault, times", [
    (" The acting good. Skip it.", True, "broken", 1),
    (" It is a awful western. Skip it.", True, "broken", 1),
    (" It is a good comedy. Skip it.", True, "broken", 1),
    (" The acting is good. Skip it.", False, "unfinished", 1),
    (" The acting is good. The plot is dull.", True, "unfinished", 1),
    (" Skip it.", True, "length", 1),
    (" I saw it on a train. I saw it at a festival. The acting is good. The plot is dull. "
     "The plot is plain. Skip it.", True, "length", 2),
    (" The acting is good. The plot is good. Skip it.", True, "repeated", 1),
    (" The acting is good. The acting is good. Skip it.", True, "repeated", 2),
    (" The acting is superb and stunning. I loved the acting. Skip it.", True, "gushing", 1)])
def test_gold_takes_off_for_each_fault_and_only_for_that(text, finished, fault, times):
    """No such text is in the grammar, unless its one fault is that it was cut short."""
    sentiment, faults = reviews.read(TINY_PROMPT, text, finished)
    assert faults == {**dict.fromkeys(reviews.PENALTIES, 0), fault: times}
    expected = sentiment / 3 - times * reviews.PENALTIES[fault]
    assert reviews.gold(TINY_PROMPT, text, finished) == pytest.approx(expected)
    assert (reviews.log_prob(TINY_PROMPT, text) == -math.inf) == finished


@pytest.mark.parametrize("text", [
    "", ".", "...", "Skip it", "\n\n", "the acting", "é漢 \x00", " " * 500,
    " The acting is good.",
    " The acting is good. Skip it. Skip it.",
    "The acting is good. Skip it.",
    " The acting is purple. Skip it."])
def test_gold_is_finite_and_low_for_any_text_outside_the_grammar(text):
    assert -1000 < reviews.gold(TINY_PROMPT, text) < -1
    assert reviews.log_prob(TINY_PROMPT, text) == -math.inf


def test_annotators_rank_pairs_by_bradley_terry():
    gold = torch.tensor([[0.3, -0.5, 1.1]], dtype=torch.float64)
    rankings = reviews.rank(gold.expand(40000, 3), seeded(), temperature=0.6)
    places = rankings.argsort(dim=1)
    for i, j in itertools.combinations(range(3), 2):
        share = (places[:, i] < places[:, j]).double().mean().item()
        assert share == pytest.approx(sigmoid((gold[0, i] - gold[0, j]).item() / 0.6), abs=0.011)
    best = torch.bincount(rankings[:, 0]) / 40000              # as in Plackett-Luce
    assert best.tolist() == pytest.approx((gold[0] / 0.6).softmax(0).tolist(), abs=0.011)


def test_agreement_is_the_expected_accuracy_and_gold_reaches_the_bayes_accuracy():
    gold, scores = torch.randn(2, 40, 4, generator=seeded(), dtype=torch.float64)
    scores[0] = 0.0                                      # ties
    accuracies, best = [], []
    for row, i, j in ((row, i, j) for row in range(40) for i in range(4) for j in range(i)):
        p = sigmoid((gold[row, i] - gold[row, j]).item() / 0.6)
        best.append(max(p, 1 - p))
        ahead = torch.sign(scores[row, i] - scores[row, j]).item()         # 1, -1 or a tie: 0
        accuracies.append(0.5 + ahead * (p - 0.5))
    assert reviews.agreement(scores, gold).item() == pytest.approx(np.mean(accuracies))
    assert reviews.agreement(gold, gold).item() == pytest.approx(np.mean(best))


# --------------------------------------------------------------------------------------------------
# data.py

@tried
@hypothesis.given(any_lengths, any_seed)
def test_any_rows_are_collated_and_come_back(lengths, seed):
    prompts, responses = random_rows(lengths, seed)
    inputs, targets, mask = data.collate(prompts, responses)
    T = max(map(sum, lengths)) - 1
    assert inputs.shape == targets.shape == mask.shape == (len(lengths), T)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        padding = [0] * (T + 1 - len(prompt + response))
        tokens = prompt + response + padding
        assert inputs[row].tolist() == tokens[:-1] and targets[row].tolist() == tokens[1:]
        supervised = [0.0] * (len(prompt) - 1) + [1.0] * len(response) + [0.0] * len(padding)
        assert mask[row].tolist() == supervised
        assert targets[row][mask[row] > 0].tolist() == response
    tokens = torch.cat([inputs[:, :1], targets], dim=1)
    assert data.responses_of(tokens, mask) == responses


def test_batches_are_a_fresh_permutation_each_epoch_and_a_function_of_the_step():
    steps = [data.batch_rows(10, 3, step, seed=1) for step in range(9)]
    epochs = [steps[0:3], steps[3:6], steps[6:9]]
    for epoch in epochs:
        assert len(set(sum(epoch, []))) == 9
    assert epochs[0] != epochs[1] != epochs[2]
    assert data.batch_rows(10, 3, 4, seed=1) == steps[4] != data.batch_rows(10, 3, 4, seed=2)


def test_no_prompt_is_both_trained_on_and_held_out():
    train, held_out = data.built_in_prompts()
    assert len(train) + len(held_out) == 1536 and not set(train) & set(held_out)
    assert 0.08 < len(held_out) / 1536 < 0.17


# --------------------------------------------------------------------------------------------------
# model.py

def random_gpt2(std, **sizes):
    """A GPT2LMHeadModel with random weights, biases and norms, so each of them matters"""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    last = sizes["vocab_size"] - 1
    gpt = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=last, eos_token_id=last)).eval()
    for p in gpt.parameters():
        p.data.normal_(std=std)
    return gpt


def load_in_transformers(folder, **options):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def assert_refused(source, message, **changes):
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(source, **changes)


@pytest.mark.parametrize("gelu", ["gelu_new", "gelu"])
def test_logits_equal_transformers_gpt2_in_both_directions(gelu, tmp_path):
    theirs = random_gpt2(0.2, vocab_size=97, n_positions=24, n_layer=3, n_head=4, n_embd=32,
                         activation_function=gelu)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs").eval()
    ids = torch.randint(97, (3, 24), generator=seeded())
    wanted = theirs.double()(ids).logits
    torch.testing.assert_close(ours.double()(ids), wanted, atol=1e-9, rtol=1e-9)
    for p in ours.float().parameters():
        p.data.add_(0.01)
    ours.save_pretrained(tmp_path / "ours", eos_id=96)
    back = load_in_transformers(tmp_path / "ours", dtype=torch.float64)
    torch.testing.assert_close(ours.double()(ids), back(ids).logits, atol=1e-9, rtol=1e-9)
    assert back.config.activation_function == gelu
    assert GPTConfig(vocab_size=5).activation == "gelu_tanh"         # in checkpoints without it


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A folder whose whole/ is a GPT-2 saved by transformers; some ids; its logits on them"""
    home = tmp_path_factory.mktemp("gpt2")
    theirs = random_gpt2(0.3, vocab_size=30, n_positions=12, n_layer=2, n_head=2, n_embd=8)
    theirs.save_pretrained(home / "whole")
    ids = torch.randint(30, (2, 12), generator=seeded())
    return home, ids, theirs(ids).logits.detach()


def gpt2_variant(gpt2_folder, weights=dict, save=save_file, name="model.safetensors",
                 edit=lambda folder: None, **config):
    """A copy of that GPT-2 with changes to its {name: tensor}, its settings, and last its folder"""
    whole, folder = gpt2_folder[0] / "whole", gpt2_folder[0] / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save(weights(load_file(whole / "model.safetensors")), folder / name)
    settings = json.loads((whole / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    edit(folder)
    return folder


def prefixed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def deleted(name):
    return lambda folder: (folder / name).unlink()


def in_parts(save, stem, suffix):
    """A way to save weights in two files and an index"""
    def save_parts(tensors, path):
        where = {name: f"{stem}-0000{1 + i % 2}-of-00002{suffix}" for i, name in enumerate(tensors)}
        for part in set(where.values()):
            save({name: tensors[name] for name in where if where[name] == part}, path.parent / part)
        index = json.dumps({"weight_map": where})
        (path.parent / f"{stem}{suffix}.index.json").write_text(index)
    return save_parts


WTE = "transformer.wte.weight"
MLP = "transformer.h.1.mlp.c_fc.weight"
BIN = dict(save=torch.save, name="pytorch_model.bin")
OLD_BIN = BIN | dict(save=functools.partial(torch.save, _use_new_zipfile_serialization=False))
SAFETENSORS_IN_PARTS = dict(save=in_parts(save_file, "model", ".safetensors"))
OLD_CONFIG = dict(vocab_size=30, n_positions=12, n_ctx=12, n_layer=2, n_head=2, n_embd=8)
OTHER_NAMES = dict(model_type="gpt2", vocab_size=30, max_position_embeddings=12, hidden_size=8,
                   num_hidden_layers=2, num_attention_heads=2)
MASKS = {"transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12, dtype=torch.bool),
         "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}
LOADED = {
    "compiled": dict(weights=prefixed("_orig_mod.")),
    "parallel": dict(weights=prefixed("module.")),
    "compiled, parallel": dict(weights=prefixed("module._orig_mod.")),
    "parallel, compiled": dict(weights=prefixed("_orig_mod.module.")),
    "peft": dict(weights=prefixed("base_model.model.")),
    "checkpointed": dict(weights=renamed("h.0.", "h.0._checkpoint_wrapped_module.")),
    "a trunk by itself": dict(weights=renamed("transformer.", "")),
    "a head alone": dict(weights=renamed(WTE, "lm_head.weight")),
    "a tied head": dict(weights=lambda x: x | {"lm_head.weight": x[WTE].clone()}),
    "causal masks": dict(weights=lambda x: x | MASKS),
    "bin": BIN,
    "old bin": OLD_BIN,
    "bin in parts": dict(save=in_parts(torch.save, "pytorch_model", ".bin")),
    "safetensors in parts": SAFETENSORS_IN_PARTS,
    "a gelu by a different name": dict(activation_function="gelu_pytorch_tanh"),
    "a gelu by a third name": dict(activation_function="gelu_fast"),
    "an old config": dict(edit=written("config.json", json.dumps(OLD_CONFIG))),
    "a config with other names": dict(edit=written("config.json", json.dumps(OTHER_NAMES)))}


@pytest.mark.parametrize("change", LOADED.values(), ids=LOADED)
def test_a_gpt2_loads_in_every_form_that_wrappers_and_old_versions_wrote(change, gpt2_folder):
    _, ids, logits = gpt2_folder
    ours = GPT.from_pretrained(gpt2_variant(gpt2_folder, **change)).eval()
    torch.testing.assert_close(ours(ids), logits)


def test_where_two_files_of_weights_exist_safetensors_come_first(gpt2_folder, capsys):
    GPT.from_pretrained(gpt2_variant(gpt2_folder, edit=written("pytorch_model.bin", "")))
    assert "model.safetensors is used, as in transformers" in capsys.readouterr().out


def cut_to(share):
    """The first part of the weights is on the disk, the rest is not."""
    def cut(folder):
        path = folder / "model.safetensors"
        os.truncate(path, int(share * path.stat().st_size))
    return cut


INDEX = "model.safetensors.index.json"
QUANTIZED = {"quant_method": "gptq"}
SAFETENSORS_CUT = "changed/model.safetensors cannot be read as weights"


@pytest.mark.parametrize("change, message", [
    # its weights: one is missing, unknown or of a different shape
    (dict(weights=prefixed("foo.")),
     "missing: h.0.attn.c_attn.bias, .* unknown: foo.transformer.h.0"),
    (dict(weights=renamed("c_fc.b", "c_fc.x")), "missing: h.0.mlp.c_fc.bias, h.1"),
    (dict(weights=lambda x: x | {"v_head.weight": torch.zeros(2)}),
     "missing: none; unknown: v_head.weight"),
    (dict(weights=lambda x: x | {MLP: torch.zeros(8, 31)}),
     r"h.1.mlp.c_fc.weight: got \(31, 8\) .*, wanted \(32, 8\)"),
    (dict(weights=lambda x: x | {WTE: torch.zeros(31, 8)}),
     r"wte.weight: got \(31, 8\) .*, wanted \(30, 8\)"),
    (dict(weights=lambda x: x | {MLP: torch.zeros(8, 32, dtype=torch.int8)}),
     "h.1.mlp.c_fc.weight is of torch.int8"),
    (dict(weights=lambda x: x | {"lm_head.weight": x[WTE] + 1e-3}),
     "lm_head.weight differs from wte.weight"),
    (dict(weights=lambda x: x | {"module." + WTE: x[WTE].clone()}), "transformer.wte.weight twice"),
    # its settings: a variant that is not computed
    (dict(activation_function="relu"), "activation_function 'relu', wanted 'gelu_new' or"),
    (dict(n_inner=20), "n_inner 20, wanted 32"),
    (dict(scale_attn_weights=False), "scale_attn_weights False"),
    (dict(scale_attn_by_inverse_layer_idx=True), "by_inverse_layer_idx True"),
    (dict(model_type="bloom"), "model_type is bloom, which model.py does not compute"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings"),
    (dict(layer_norm_epsilon=1e-6), "epsilon 1e-06"),
    (dict(add_cross_attention=True), "add_cross_attention"),
    (dict(quantization_config=QUANTIZED), "quantized weights .*gptq"),
    (dict(n_layer=1), "unknown: h.1.attn"),
    (dict(n_layer=3), "missing: h.2.attn"),
    (dict(n_head=3), "n_embd 8 must be a multiple of n_head 3"),
    (dict(n_head=0), "n_head 0, wanted a whole number above 0"),
    (dict(n_embd="8"), ""),
    (dict(n_embd=-8), "n_embd -8, wanted a whole number above 0"),
    # its files
    (dict(edit=written("config.json", "{}")), "GPT-2 of 12 layers"),     # the sizes of GPT-2 itself
    (dict(edit=written("config.json", "{")), "config.json cannot be read"),
    (dict(edit=written("config.json", "[]")), "config.json holds a list"),
    (dict(edit=deleted("config.json")), "has no config.json, which describes the weights"),
    (dict(edit=written("adapter_config.json", "{}")),
     "holds an adapter .LoRA.*; merge it into them first"),
    (dict(name="tf_model.h5"),
     "has no weights: wanted model.safetensors or .*; found config.json, tf_model.h5"),
    (dict(edit=cut_to(0)), SAFETENSORS_CUT),
    (dict(edit=cut_to(0.01)), SAFETENSORS_CUT),
    (dict(edit=cut_to(0.5)), SAFETENSORS_CUT),
    (dict(edit=cut_to(0.999)), SAFETENSORS_CUT),
    (SAFETENSORS_IN_PARTS | dict(edit=deleted("model-00002-of-00002.safetensors")),
     "model-00002-of-00002.safetensors cannot be read as weights .FileNotFoundError"),
    (SAFETENSORS_IN_PARTS | dict(edit=written(INDEX, "{}")), "has no weight_map"),
    (BIN | dict(weights=lambda x: {"state_dict": {}}), "holds a dict by the name state_dict"),
    (BIN | dict(weights=lambda x: [3]), "cannot be read"),
    (BIN | dict(weights=lambda x: {"x": Malicious("owned")}), "holds more than tensors")])
def test_a_folder_that_is_not_one_whole_gpt2_is_refused_by_what_it_holds(
        change, message, gpt2_folder, empty_folder):
    folder = gpt2_variant(gpt2_folder, **change)
    with pytest.raises(Stopped, match=f"^error: --init .*: .*{message}"):
        sft.pretrained_gpt(str(folder), types.SimpleNamespace(n_vocab=20), block_size=5)
    assert not (empty_folder / "owned").exists()


def gelu_gpt2(bias, V=40, T=12, C=8):
    """A GPT-2 by transformers with the exact GELU, as nanoGPT has it, and maybe without biases"""
    gpt = random_gpt2(0.4, vocab_size=V, n_positions=T, n_layer=2, n_head=2, n_embd=C,
                      activation_function="gelu")
    for name, p in gpt.named_parameters():
        if name.endswith("bias") and not bias:
            p.data.zero_()
    return gpt


def nanogpt_weights(bias, **sizes):
    """Its weights by nanoGPT's names, without the leading transformer."""
    weights = {}
    for name, weight in gelu_gpt2(bias, **sizes).transformer.state_dict().items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.T.contiguous()               # transformers has a Conv1D there
        if bias or not name.endswith("bias"):
            weights[name] = weight
    return weights


def save_nanogpt(path, weights, prefix="_orig_mod.", **changes):
    """A checkpoint as nanoGPT's train.py writes it, with its optimizer"""
    named = {f"{prefix}transformer.{name}": weight for name, weight in weights.items()}
    named[f"{prefix}lm_head.weight"] = weights["wte.weight"]
    args = dict(n_layer=2, n_head=2, n_embd=8, block_size=12, vocab_size=len(weights["wte.weight"]),
                dropout=0.1, bias="ln_f.bias" in weights)
    torch.save({"model": named, "model_args": args | changes,
                "optimizer": {"state": {0: torch.zeros(9)}}, "iter_num": 7,
                "best_val_loss": torch.tensor(1.0), "config": {"dataset": "openwebtext"}}, path)
    return path


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_has_nanogpts_log_probabilities(bias, tmp_path):
    """Compiled or not, without biases, with rows that pad the vocabulary; exported as well"""
    weights = nanogpt_weights(bias)
    ids = torch.randint(30, (3, 12), generator=seeded())
    wanted = gelu_gpt2(bias)(ids).logits
    path = save_nanogpt(tmp_path / "ckpt.pt", weights)
    uncompiled = save_nanogpt(tmp_path / "other.pt", weights, prefix="")
    for source in (path, tmp_path, uncompiled):
        ours = GPT.from_pretrained(source).eval()
        torch.testing.assert_close(ours(ids), wanted, atol=1e-5, rtol=1e-5)
    assert ours.config == GPTConfig(40, 12, n_layer=2, n_head=2, n_embd=8, activation="gelu")
    cut = GPT.from_pretrained(path, vocab_size=33, block_size=12).eval()
    torch.testing.assert_close(cut(ids), wanted[..., :33], atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "exported", eos_id=0)
    back = load_in_transformers(tmp_path / "exported")
    torch.testing.assert_close(back(ids).logits, wanted, atol=1e-5, rtol=1e-5)


def test_checkpoints_that_are_not_nanogpts_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    weights = nanogpt_weights(True)
    incomplete = {name: w for name, w in weights.items() if name != "h.1.ln_2.bias"}
    assert_refused(save_nanogpt(path, incomplete), "missing: h.1.ln_2.bias")
    assert_refused(save_nanogpt(path, weights, n_kv_head=1), "variant of nanoGPT .*n_kv_head")
    assert_refused(save_nanogpt(path, weights, vocab_size=65),
                   r"wte.weight: got \(40, 8\) .*, wanted \(65, 8\)")
    os.truncate(path, 999)
    assert_refused(path, "x.pt cannot be read as weights")
    for saved, message in (
            ({"policy": {}, "step": 3}, "is not a checkpoint of nanoGPT, .* holds policy, step"),
            ({"model": Malicious(tmp_path / "owned")}, "holds more than tensors"),
            (3, "cannot be read")):
        torch.save(saved, path)
        assert_refused(path, message)
    assert not (tmp_path / "owned").exists()


def test_weights_may_be_cut_to_fewer_positions_and_ids_but_not_stretched(tmp_path):
    gpt = small_gpt(vocab_size=20, block_size=16)
    gpt.save_pretrained(tmp_path, eos_id=19)
    cut = GPT.from_pretrained(tmp_path, block_size=9, vocab_size=12).eval()
    ids = torch.randint(12, (2, 9), generator=seeded())
    assert (cut.config.block_size, cut.config.vocab_size) == (9, 12)
    torch.testing.assert_close(cut(ids), gpt(ids)[:, :, :12])
    too_long = "block_size 17 .* is longer than the 16 positions that .* has weights for"
    assert_refused(tmp_path, too_long, block_size=17)
    assert_refused(tmp_path, "the tokenizer has 21 token ids, .* has weights for 20", vocab_size=21)
    assert_refused(tmp_path / "nowhere", "nowhere is not a folder here")


def test_an_exported_reward_model_gives_the_same_scores_in_transformers(tmp_path, tokenizer):
    """Also in a batch with padding, by the exported tokenizer, from text"""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    gpt = small_gpt(tokenizer.n_vocab, block_size=40)
    ours = ScalarGPT(gpt.config, init_from=gpt).eval()
    ours.head.bias.data.fill_(0.4)
    ours.normalise(gain=0.7, bias=-1.9)
    ours.save_pretrained(tmp_path, tokenizer.eot_token)
    tokenizers.export_tokenizer(tokenizer, tmp_path, pad=True)
    prompts = ["A fable about an old map. On the plot:", "x"]
    responses = [" Skip it.", " The plot is wonderful. See it twice."]
    rows = data.collate(*tokenizers.encode_texts(tokenizer, prompts, responses))

    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [p + r + tokenizers.EOS for p, r in zip(prompts, responses)]
    batch = their_tokenizer(texts, padding=True, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    assert theirs.config.num_labels == 1 and their_tokenizer.pad_token_id == tokenizer.n_vocab
    scores = theirs(**batch).logits[:, 0].float()
    torch.testing.assert_close(scores, sequence_scores(ours, *rows), atol=1e-4, rtol=0)


def test_an_exported_tokenizer_is_the_same_in_transformers_and_comes_back(tmp_path, tokenizer):
    from transformers import AutoTokenizer
    tokenizers.export_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.eot_token and len(theirs) == tokenizer.n_vocab
    for text in AWKWARD + review_texts(100, seed=8):
        ids = tokenizer.encode_ordinary(text)
        assert theirs(text, split_special_tokens=True)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    read = tokenizers.pretrained_tokenizer(tmp_path)
    assert tokenizers.tokenizer_id(read) == tokenizers.tokenizer_id(tokenizer)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_entropy_equal_a_loop_in_float64(temperature):
    """Over rows alone, which the padding of the batch leaves as they are"""
    gpt = small_gpt()
    batch = data.collate(PROMPTS, RESPONSES)
    logprobs, entropy = token_logprobs(gpt, *batch, temperature, return_entropy=True)
    for b, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        logits = gpt(torch.tensor([prompt + response]))[0].double() / temperature
        for t, token in enumerate(response, len(prompt) - 1):
            p = (logits[t].exp() / logits[t].exp().sum()).tolist()
            assert logprobs[b, t].item() == pytest.approx(math.log(p[token]), abs=1e-5)
            wanted = -sum(x * math.log(x) for x in p)
            assert entropy[b, t].item() == pytest.approx(wanted, abs=1e-5)
    assert not logprobs[batch[2] == 0].any() and not entropy[batch[2] == 0].any()


def test_token_logprobs_has_the_gradient_of_the_plain_formula():
    inputs, targets, mask = data.collate(PROMPTS, RESPONSES)
    weights = torch.randn(mask.shape, generator=seeded()) * mask
    ours, plain = small_gpt(), small_gpt()
    logprobs, entropy = token_logprobs(ours, inputs, targets, mask, 0.7, return_entropy=True)
    ((logprobs + entropy) * weights).sum().backward()
    log_pi = (plain(inputs) / 0.7).log_softmax(-1)
    logprobs = log_pi.gather(2, targets[:, :, None])[:, :, 0]
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    ((logprobs + entropy) * weights).sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_sampled_token_is_the_inverse_cdf_of_the_scored_distribution(temperature):
    gpt = small_gpt()
    tokens, mask = generate(gpt, PROMPTS * 6, 8, 10, temperature, seeded())
    uniforms = torch.rand(len(tokens), 8, generator=seeded())
    inputs, targets = data.shift(tokens)
    cumulative = (gpt(inputs).double() / temperature).softmax(-1).cumsum(-1)   # without a cache
    for b, columns in columns_of(mask):
        for k, t in enumerate(columns):
            token = targets[b, t].item()
            below = cumulative[b, t, token - 1].item() if token else 0.0
            above = cumulative[b, t, token].item()
            assert below - 1e-5 <= uniforms[b, k].item() <= above + 1e-5


@tried
@hypothesis.given(any_lengths, any_seed, strategies.integers(1, 6),
                  strategies.sampled_from([0.0, 0.3, 1.0, 5.0]),
                  strategies.sampled_from([0.01, 0.3, 3.0]))
def test_any_prompts_are_answered_up_to_eos_with_tokens_that_the_policy_scores(
        lengths, seed, n_new, temperature, std):
    gpt = small_gpt(seed=seed % 7, std=std)
    prompts, _ = random_rows(lengths, seed)
    tokens, mask = generate(gpt, prompts, n_new, 10, temperature, seeded(seed))
    assert tokens.shape[1] == mask.shape[1] + 1
    for row, (prompt, response) in enumerate(zip(prompts, data.responses_of(tokens, mask))):
        assert 1 <= len(response) <= n_new and 10 not in response[:-1]
        assert response[-1] == 10 or len(response) == n_new
        end = len(prompt) + len(response)
        assert tokens[row, :end].tolist() == prompt + response and not tokens[row, end:].any()
        wanted = [float(len(prompt) <= t + 1 < end) for t in range(mask.shape[1])]
        assert mask[row].tolist() == wanted
    if temperature:
        logprobs = token_logprobs(gpt, *data.shift(tokens), mask, temperature)
        assert torch.isfinite(logprobs).all() and (logprobs <= 1e-5).all()


def test_greedy_sampling_takes_the_likeliest_token_of_an_uncached_forward():
    gpt = small_gpt()
    tokens, mask = generate(gpt, PROMPTS, 6, 10, temperature=0)
    inputs, targets = data.shift(tokens)
    assert torch.equal(gpt(inputs).argmax(-1)[mask > 0], targets[mask > 0])


def test_sampling_stops_when_all_rows_have_met_eos():
    gpt = small_gpt()
    eos_id = data.responses_of(*generate(gpt, [[4]], 3, 10, temperature=0))[0][-1]
    calls = []
    gpt.transformer.register_forward_hook(lambda *_: calls.append(1))
    tokens, mask = generate(gpt, [[4], [4, 4]], 8, eos_id, temperature=0)
    longest = int(mask.sum(1).max())
    assert len(calls) == longest < 8 and tokens.shape[1] <= 2 + longest


def test_empty_prompts_become_eos_and_a_prompt_may_fill_the_room_there_is():
    tokens, mask = generate(small_gpt(), [[]], 3, 10)
    assert tokens[0, 0] == 10 and mask[0, 0] == 1
    assert generate(small_gpt(), [[1] * 12], 4, 10)[0].shape[1] <= 16


def test_pick_never_takes_a_token_without_probability():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).expand(4, 5)
    uniforms = torch.tensor([0.0, 0.4999, 0.5, 1 - 2 ** -24])
    assert sampler.pick(logits, 1.0, uniforms).tolist() == [1, 1, 3, 3]


def test_the_score_is_read_after_the_last_token_of_every_row_the_longest_too():
    scalar = small_scalar()
    scores = sequence_scores(scalar, *data.collate(PROMPTS, RESPONSES))
    for prompt, response, score in zip(PROMPTS, RESPONSES, scores):
        whole_row = torch.tensor([prompt + response])
        torch.testing.assert_close(scalar(whole_row)[0, -1], score, atol=1e-5, rtol=1e-5)


def test_scalar_models_take_over_a_trunk_and_start_with_the_right_head():
    """A critic's head is zero, a reward model's has deviation 1 / sqrt(width + 1)."""
    ids = torch.randint(11, (2, 7), generator=seeded())
    gpt = small_gpt()
    scalar = ScalarGPT(gpt.config, init_from=gpt).eval()
    assert torch.equal(scalar.transformer(ids), gpt.transformer(ids))
    assert not ScalarGPT(gpt.config, init_from=gpt, zero_head=True)(ids).any()
    heads = torch.cat([ScalarGPT(GPTConfig(5, 4, 1, 1, 255)).head.weight for _ in range(20)])
    assert heads.std().item() == pytest.approx(1 / 16, rel=0.05)
    before = scalar(ids)
    scalar.normalise(gain=2.0, bias=-0.5)
    torch.testing.assert_close(scalar(ids), 2.0 * before - 0.5)


def test_masked_mean_takes_fractional_weights_and_refuses_an_empty_mask():
    x, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.0, 0.25]])
    assert masked_mean(x, mask).item() == pytest.approx((0.5 * 1 + 0.25 * 4) / 0.75)
    with pytest.raises(ValueError, match="mask of zeros"):
        masked_mean(x, 0 * mask)


def test_dropout_acts_in_train_mode_only():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(11, 16, 2, 2, 16, dropout=0.5))
    ids = torch.arange(8)[None]
    assert not torch.equal(gpt.train()(ids), gpt(ids))
    assert torch.equal(gpt.eval()(ids), gpt(ids))


# ---- LoRA

def lora_gpt():
    """small_gpt with a low-rank change that is not zero"""
    gpt = small_gpt()
    torch.manual_seed(1)
    model.add_lora(gpt, 3)
    for name, p in gpt.named_parameters():
        if "lora_b" in name:
            p.data.normal_(std=0.2)
    return gpt


def test_lora_changes_nothing_at_first_and_is_then_the_weights_plus_a_scaled_product():
    plain = small_gpt()
    ids = torch.randint(11, (3, 12), generator=seeded())
    assert torch.equal(model.add_lora(small_gpt(), 3)(ids), plain(ids))
    assert model.add_lora(small_gpt(), 0).state_dict().keys() == plain.state_dict().keys()

    gpt = lora_gpt()
    layer, x = gpt.transformer.h[1].mlp.c_fc, torch.randn(5, 16, generator=seeded())
    a, b = layer.lora_a[0], layer.lora_b[0]
    assert (a.shape, b.shape) == ((3, 16), (64, 3))
    change = model.LORA_SCALE * torch.stack([b @ (a @ row) for row in x])
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias + change)

    adapted = {name.rsplit(".", 2)[0] for name, _ in gpt.named_parameters() if "lora" in name}
    layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert adapted == {f"transformer.h.{i}.{name}" for i in range(2) for name in layers}
    fresh = [model.add_lora(small_gpt(seed=i), 8) for i in range(20)]
    deviation = torch.cat([gpt.transformer.h[0].mlp.c_proj.lora_a[0] for gpt in fresh]).std()
    assert deviation.item() == pytest.approx(1 / 64 ** 0.5, rel=0.05)


def test_merged_weights_compute_what_the_change_beside_them_did_and_only_the_change_is_trained():
    gpt = lora_gpt()
    ids = torch.randint(11, (3, 12), generator=seeded())
    plain = small_gpt(seed=9)
    plain.load_state_dict(model.merged(gpt.state_dict()))
    torch.testing.assert_close(plain(ids), gpt(ids), atol=1e-5, rtol=1e-5)
    assert "lora" in "".join(gpt.state_dict())           # the model itself has not changed
    critic = ScalarGPT(gpt.config, init_from=gpt)
    torch.testing.assert_close(critic.transformer(ids), gpt.transformer(ids), atol=1e-5, rtol=1e-5)

    assert all("lora" in name for name, p in gpt.named_parameters() if p.requires_grad)
    assert len(model.trained(gpt)) == 2 * 6 * 2          # q, k, v, o and both of the MLP
    scalar = model.add_lora(small_scalar(), 2)
    trained = {name for name, p in scalar.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora" not in name} == {"head.weight", "head.bias"}


def test_a_reference_is_frozen_and_with_lora_made_of_the_very_same_tensors():
    gpt = small_gpt()
    reference = model.reference_of(gpt)
    ids = torch.randint(11, (3, 12), generator=seeded())
    before = gpt(ids).clone()
    for p in gpt.parameters():
        p.data.add_(0.1)
    assert torch.equal(reference(ids), before)
    assert not any(p.requires_grad for p in reference.parameters())

    gpt = lora_gpt()
    state = torch.get_rng_state()
    reference = model.reference_of(gpt)
    assert torch.equal(torch.get_rng_state(), state)     # it draws no random numbers
    assert torch.equal(reference(ids), small_gpt()(ids))
    assert not torch.equal(reference(ids), gpt(ids))
    places = {p.data_ptr() for p in gpt.parameters()}
    assert all(p.data_ptr() in places for p in reference.parameters())         # no extra memory


# ---- memory and precision

@contextlib.contextmanager
def saved_sizes():
    """-> a list that fills with the sizes of the tensors kept for the backward pass"""
    sizes = []

    def pack(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield sizes


def test_logits_in_parts_give_equal_results_and_are_never_in_memory_whole(monkeypatch):
    gpt = small_gpt(vocab_size=301)
    inputs, targets, mask = data.collate(PROMPTS * 4, RESPONSES * 4)
    n = int(mask.sum())

    def compute():
        gpt.zero_grad()
        logprobs, entropy = token_logprobs(gpt, inputs, targets, mask, 0.7, return_entropy=True)
        with saved_sizes() as sizes:
            alone = token_logprobs(gpt, inputs, targets, mask, 0.7)
        (logprobs.sum() + 0.3 * entropy.sum() + alone.sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in gpt.parameters()])
        return (logprobs, entropy, gradient), sizes

    whole, sizes = compute()
    assert max(sizes) >= n * 301
    monkeypatch.setattr(model, "LOGITS_AT_ONCE", 4 * 301)                      # four positions
    parts, sizes_in_parts = compute()
    for ours, theirs in zip(parts, whole):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert max(sizes_in_parts) < n * 301 / 2                                   # now in the MLP
    assert sum(sizes_in_parts) <= sum(sizes) - n * 301


def test_checkpointing_gives_the_same_gradients_and_keeps_less():
    inputs, targets, mask = data.collate(PROMPTS, RESPONSES)
    gradients, kept = [], []
    for checkpointing in (False, True):
        gpt = small_gpt()
        gpt.config.checkpointing = checkpointing
        with saved_sizes() as sizes:
            logprobs = token_logprobs(gpt, inputs, targets, mask)
        logprobs.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gpt.parameters()]))
        kept.append(sum(sizes))
    assert torch.equal(*gradients)
    assert kept[1] < 0.5 * kept[0]


def test_bfloat16_rounds_products_but_not_weights_or_log_probabilities():
    inputs, targets, mask = data.collate(PROMPTS, RESPONSES)
    gpt = small_gpt()
    exact = token_logprobs(gpt, inputs, targets, mask)
    gpt.config.dtype = "bfloat16"
    kinds = []
    layer = gpt.transformer.h[0].mlp.c_fc
    layer.register_forward_hook(lambda module, given, x: kinds.append(x.dtype))
    rounded, entropy = token_logprobs(gpt, inputs, targets, mask, return_entropy=True)
    assert kinds == [torch.bfloat16] and rounded.dtype == entropy.dtype == torch.float32
    assert 1e-5 < (rounded - exact).abs().max() < 0.2
    rounded.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in gpt.parameters())
    hidden = gpt.transformer(inputs)             # logits of -100 in bfloat16 are off by 0.25
    assert hidden.dtype == torch.float32
    assert torch.equal(gpt(inputs), hidden @ gpt.transformer.wte.weight.T)
    tokens, sampled_mask = generate(gpt, PROMPTS, 6, 10, generator=seeded())
    assert tokens.max() <= 10 and sampled_mask.any()


# --------------------------------------------------------------------------------------------------
# model.py: Llama, Qwen2 and Qwen3, against transformers

LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
FAMILIES = {                                             # n_kv_head < n_head in all
    "llama": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(rms_norm_eps=1e-5, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(rms_norm_eps=1e-6)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True))}         # not C / n_head = 8


def random_family(name, seed=0):
    """One of transformers' models with random weights, norms far from 1 and biases far from 0"""
    import transformers
    family, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=96, **settings)
    made = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    torch.manual_seed(seed)
    for key, p in made.named_parameters():
        p.data.normal_(mean=float("norm" in key), std=0.15 if p.dim() == 2 else 0.3)
    return made


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """{name: a folder with one of transformers' models, rows of ids, its log-probs on them}"""
    found = {}
    ids = torch.randint(97, (3, 200), generator=seeded())        # beyond 64 / 8, where llama3 bends
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        theirs = random_family(name)
        theirs.save_pretrained(folder)
        with torch.no_grad():
            found[name] = folder, ids, theirs(ids).logits.log_softmax(dim=-1)
    return found


def difference(gpt, ids, wanted):
    with torch.no_grad():
        return (gpt.eval()(ids).log_softmax(dim=-1) - wanted).abs().max().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_equal_transformers_and_files_come_back_to_the_bit(name, families, tmp_path):
    from transformers import AutoModelForCausalLM
    folder, ids, wanted = families[name]
    ours = GPT.from_pretrained(folder)
    assert difference(ours, ids, wanted) <= 1e-5
    ours.save_pretrained(tmp_path, eos_id=[96, 0])
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.generation_config.eos_token_id == [96, 0]
    stored = load_file(tmp_path / "model.safetensors")
    originals = load_file(folder / "model.safetensors")
    assert stored.keys() == originals.keys()
    assert all(torch.equal(stored[name], originals[name]) for name in originals)
    with torch.no_grad():
        assert (back(ids).logits.log_softmax(dim=-1) - wanted).abs().max() <= 1e-5


def swapped_gate(gpt, monkeypatch):
    for block in gpt.transformer.h:
        gate, up = block.mlp.c_fc.weight.data.chunk(2)
        block.mlp.c_fc.weight.data = torch.cat([up, gate])


def interleaved(x, cos, sin):
    first, second = x[..., ::2], x[..., 1::2]
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return x * cos + turned * sin


def tiled(gpt, monkeypatch):
    """Query head h reads key head h mod n_kv_head, not h // (n_head / n_kv_head)."""
    for block in gpt.transformer.h:
        q = block.attn.widths[0]
        d = block.attn.d
        order = torch.arange(q).view(2, 2, d).transpose(0, 1).flatten()
        block.attn.c_attn.weight.data[:q] = block.attn.c_attn.weight.data[:q][order]
        block.attn.c_proj.weight.data = block.attn.c_proj.weight.data[:, order]


def wrong_eps(gpt, monkeypatch):
    for layer in gpt.modules():
        if isinstance(layer, model.RMSNorm):
            layer.eps *= 10


def gelu_for_silu(gpt, monkeypatch):
    monkeypatch.setattr(model.F, "silu", torch.nn.functional.gelu)


def interleaved_rope(gpt, monkeypatch):
    monkeypatch.setattr(model, "rotate", interleaved)


def without(setting, value):
    def change(gpt, monkeypatch):
        setattr(gpt.config, setting, value)
    return change


def no_qk_norm(gpt, monkeypatch):
    for block in gpt.transformer.h:
        block.attn.q_norm = block.attn.k_norm = torch.nn.Identity()


def no_qkv_bias(gpt, monkeypatch):
    for block in gpt.transformer.h:
        block.attn.c_attn.bias.data.zero_()


MISTAKES = [(mistake, name) for mistake in (
    wrong_eps, gelu_for_silu, swapped_gate, tiled, interleaved_rope, without("rope_theta", 2e4))
    for name in FAMILIES]
MISTAKES += [(without("rope_scaling", None), "llama3"), (no_qk_norm, "qwen3"),
             (no_qkv_bias, "qwen2")]


@pytest.mark.parametrize("mistake, name", MISTAKES, ids=lambda x: getattr(x, "__name__", x))
def test_every_mistake_that_ports_have_made_is_seen(mistake, name, families, monkeypatch):
    """Each costs at least 5e-5 nats somewhere, five times what equality allows."""
    folder, ids, wanted = families[name]
    wrong = GPT.from_pretrained(folder)
    mistake(wrong, monkeypatch)
    assert difference(wrong, ids, wanted) > 5e-5


def test_an_unseen_difference_in_rotary_positions_would_show_beyond_the_original_context(families):
    """Llama 3's scaling changes nothing at the first position: short rows would hide it."""
    folder, ids, wanted = families["llama3"]
    wrong = GPT.from_pretrained(folder)
    wrong.config.rope_scaling = None
    assert difference(wrong, ids[:, :1], wanted[:, :1]) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_samplers_cached_steps_equal_the_full_forward(name, families):
    """Prompts of different length, one of one token; greedy tokens and log-probabilities"""
    folder, ids, _ = families[name]
    gpt = GPT.from_pretrained(folder, block_size=64).eval()
    prompts = [ids[0, :5].tolist(), ids[1, :17].tolist(), ids[2, :1].tolist(), []]
    tokens, mask = generate(gpt, prompts, 30, [96, 95], temperature=0)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        likeliest = gpt(inputs).argmax(dim=-1)
    assert mask.sum() >= 60 and torch.equal(likeliest[mask > 0], targets[mask > 0])
    assert tokens[3, 0] == 96                            # an empty prompt is the first of the ends
    with torch.no_grad():
        whole = token_logprobs(gpt, inputs, targets, mask)
        for row, prompt in enumerate(prompts):           # the row alone, without padding
            n = int(mask[row].nonzero().max()) + 1
            alone = token_logprobs(gpt, *(x[row:row + 1, :n] for x in (inputs, targets, mask)))
            torch.testing.assert_close(alone[0], whole[row, :n], atol=1e-5, rtol=0)


def test_a_response_ends_with_any_of_several_end_tokens(families):
    folder, ids, _ = families["qwen2"]
    gpt = GPT.from_pretrained(folder, block_size=64).eval()
    prompts = [row[:9].tolist() for row in ids.repeat(8, 1)]
    ends = list(range(0, 97, 6))
    tokens, mask = generate(gpt, prompts, 20, ends, generator=seeded())
    responses = [row[m > 0].tolist() for row, m in zip(tokens[:, 1:], mask)]
    assert any(response[-1] != ends[0] for response in responses)
    for response in responses:
        assert not set(response[:-1]) & set(ends)
        assert response[-1] in ends or len(response) == 20


def test_embeddings_without_a_token_are_never_sampled_and_go_back_into_the_file(families, tmp_path):
    folder, ids, wanted = families["qwen3"]
    cut = GPT.from_pretrained(folder, vocab_size=90, block_size=220).eval()
    shown = ids.clamp(max=89)
    whole = GPT.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = cut(shown)
        torch.testing.assert_close(logits, whole(shown)[:, :, :90])
    assert logits.shape[-1] == 90
    cut.save_pretrained(tmp_path, eos_id=5)
    stored, originals = (load_file(x / "model.safetensors") for x in (tmp_path, folder))
    assert all(torch.equal(stored[name], originals[name]) for name in originals)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 256


@pytest.mark.parametrize("name", [*FAMILIES, "gpt2"])
def test_an_exported_reward_model_ranks_as_ours_in_transformers(name, families, tmp_path):
    """Equal to the constant for RMSNorm's families, whose class has no bias to hold it"""
    from transformers import AutoModelForSequenceClassification
    torch.manual_seed(0)
    if name == "gpt2":
        trunk = GPT(GPTConfig(97, 64, n_layer=2, n_head=2, n_embd=16))
    else:
        trunk = GPT.from_pretrained(families[name][0], vocab_size=95, block_size=64)
    ours = ScalarGPT(trunk.config, init_from=trunk).eval()
    ours.normalise(gain=3.0, bias=-0.7)
    ours.head.bias.data.fill_(0.4)
    ours.save_pretrained(tmp_path, eos_id=3)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    constant = theirs.config.to_dict().get("scores_lack_constant", 0.0)
    assert (name == "gpt2") == (constant == 0.0) == (not (tmp_path / "README.md").exists())
    ids = torch.randint(90, (4, 12), generator=seeded())
    ids[0, 7:] = trunk.config.vocab_size                 # the pad token of the export
    with torch.no_grad():
        scores = theirs(ids).logits[:, 0] + constant
        rows = [ours(row[row < trunk.config.vocab_size][None])[0, -1] for row in ids]
    torch.testing.assert_close(scores, torch.stack(rows), atol=1e-5, rtol=1e-5)
    stored = load_file(tmp_path / "model.safetensors")
    assert len(next(w for key, w in stored.items() if "embed" in key or "wte" in key)) >= 96


def test_lora_changes_every_stacked_matrix_apart_and_is_merged_at_the_export(families, tmp_path):
    from transformers import AutoModelForCausalLM
    folder, ids, _ = families["qwen2"]
    gpt = add_lora(GPT.from_pretrained(folder).eval(), 2)
    attn, mlp = gpt.transformer.h[0].attn, gpt.transformer.h[0].mlp
    assert [tuple(b.shape) for b in attn.c_attn.lora_b] == [(32, 2), (16, 2), (16, 2)]
    assert [tuple(b.shape) for b in mlp.c_fc.lora_b] == [(56, 2), (56, 2)]
    torch.manual_seed(1)
    for name, p in gpt.named_parameters():
        if "lora_b" in name:
            p.data.normal_(std=0.3)
    weights = merged(gpt.state_dict())
    change = weights["transformer.h.0.attn.c_attn.weight"] - attn.c_attn.weight
    for part in change.split([32, 16, 16]):
        assert torch.linalg.matrix_rank(part, tol=1e-4) == 2
    gpt.save_pretrained(tmp_path, eos_id=0)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, gpt(ids), atol=1e-4, rtol=1e-4)


def test_low_rank_changes_of_earlier_versions_are_merged_too():
    """They had one change for q, k and v together, under other names."""
    weight, a, b = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    old = {"h.weight": weight, "h.lora_a": a, "h.lora_b": b}
    torch.testing.assert_close(merged(old), {"h.weight": weight + model.LORA_SCALE * b @ a})


# ---- files of these families

def edited(families, name, tmp_path, weights=None, config=None, removed=()):
    """A copy of a family's folder with changed weights (a function of the dict) and settings"""
    folder = tmp_path / "edited"
    shutil.copytree(families[name][0], folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(weights(tensors) if weights else tensors, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    settings = {key: x for key, x in settings.items() if key not in removed}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


OLD_ROPE = dict(LLAMA3, type="llama3")
del OLD_ROPE["rope_theta"]
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("name, weights, config, removed", [
    pytest.param("qwen2", None, dict(rope_theta=10000.0), ["rope_parameters"], id="old rope"),
    pytest.param("llama3", None, dict(rope_theta=10000.0, rope_scaling=OLD_ROPE),
                 ["rope_parameters"], id="old rope scaling"),
    pytest.param("llama3", None, dict(rope_scaling=dict(LLAMA3, factor=4.0)), [],
                 id="both names of rope, of which the older counts"),
    pytest.param("llama3", lambda x: x | {"lm_head.weight": x[EMBEDDING].clone()}, None, [],
                 id="a head that repeats the embedding"),
    pytest.param("qwen3", lambda x: {key.removeprefix("model."): w for key, w in x.items()}, None,
                 [], id="a trunk by itself"),
    pytest.param("llama", lambda x: x | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, None, [],
        id="an old table of frequencies"),
    pytest.param("qwen2", None, dict(sliding_window=16, use_sliding_window=False), [],
                 id="a sliding window that is off")])
def test_other_ways_to_write_the_same_model_are_read(name, weights, config, removed, families,
                                                     tmp_path):
    from transformers import AutoModelForCausalLM
    folder = edited(families, name, tmp_path, weights, config, removed)
    ids = families[name][1]
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = theirs(ids).logits.log_softmax(dim=-1)
    assert difference(GPT.from_pretrained(folder), ids, wanted) <= 1e-5


def test_sharded_and_bin_files_are_read(families, tmp_path):
    folder, ids, wanted = families["llama"]
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert difference(GPT.from_pretrained(tmp_path), ids, wanted) <= 1e-5
    sharded = tmp_path / "sharded"
    random_family("llama").save_pretrained(sharded, max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert difference(GPT.from_pretrained(sharded), ids, wanted) <= 1e-5


@pytest.mark.parametrize("name, config, message", [
    ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "RoPE of the type yarn"),
    ("llama", dict(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}),
     "RoPE of the type dynamic"),
    ("llama", dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
     "RoPE of the type linear"),
    ("llama", dict(attention_bias=True), "attention_bias True, wanted False"),
    ("llama", dict(mlp_bias=True), "mlp_bias True"),
    ("llama", dict(hidden_act="gelu"), "hidden_act 'gelu', wanted 'silu'"),
    ("llama", dict(intermediate_size=None), "has intermediate_size None, wanted a whole number"),
    ("llama", dict(vocab_size=-4), "has vocab_size -4, wanted a whole number above 0"),
    ("llama", dict(head_dim=[4]), r"has head_dim \[4\], wanted a whole number above 0"),
    ("llama", dict(hidden_size=True), "has hidden_size True, wanted"),
    ("llama", dict(rms_norm_eps="1e-06"), "has rms_norm_eps '1e-06', wanted a number above 0"),
    ("llama", dict(rope_parameters="x"), "has rope_parameters 'x', wanted an object"),
    ("llama", dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "RoPE of the type yarn"),
    ("llama", dict(model_type=[]), "its model_type is ..,"),
    ("llama3", dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "llama3 RoPE has"),
    ("qwen2", dict(use_sliding_window=True), "use_sliding_window True"),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]),
     "'sliding_attention'.; model.py"),
    ("qwen3", dict(layer_types=4), "it has layer_types 4"),
    ("llama", dict(model_type="smollm3"), "every fourth layer has no positions"),
    ("llama", dict(model_type="gemma2"), "gemma2 .scaled embeddings"),
    ("llama", dict(model_type="mistral"), "mistral .sliding windows"),
    ("qwen3", dict(model_type="qwen3_moe"), "qwen3_moe .a mixture of experts"),
    ("llama", dict(model_type="deepseek_v3"), "deepseek_v3, which model.py does not compute"),
    ("llama", dict(quantization_config={"quant_method": "gptq"}), "quantized weights"),
    ("qwen3", dict(tie_word_embeddings=False), "missing: lm_head.weight"),
    ("llama", dict(tie_word_embeddings=True), "lm_head.weight differs from embed_tokens.weight"),
    ("llama", dict(num_key_value_heads=4), r"k_proj.weight: got \(16, 32\), wanted 32 rows"),
    ("llama", dict(hidden_size=40, head_dim=8), "wte.weight: got .97, 32. of .*, wanted .97, 40."),
    ("llama", dict(num_hidden_layers=3), "do not fit a Llama of 3 layers: missing: layers.2")])
def test_what_is_not_computed_is_refused_by_name(name, config, message, families, tmp_path):
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(edited(families, name, tmp_path, config=config))


@pytest.mark.parametrize("change, message", [
    (lambda x: x | {"norm.weight": torch.ones(32)}, "it has the weight norm.weight twice, once as"),
    (lambda x: x | {"model.norm.weight": torch.full((32,), math.inf)}, "not finite; copy the weig"),
    (lambda x: x | {"model.norm.weight": torch.ones(32, dtype=torch.int32)}, "of torch.int32, wan"),
    (lambda x: x | {"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}, "of torch.float8")
], ids=["twice", "inf", "int", "float8"])
def test_weights_that_cannot_be_right_are_refused(change, message, families, tmp_path):
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(edited(families, "llama", tmp_path, change))


def test_a_weight_too_many_and_a_file_cut_short_are_refused(families, tmp_path):
    folder = edited(families, "llama", tmp_path,
                    lambda x: x | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    with pytest.raises(ValueError, match="unknown: layers.0.self_attn.q_norm.weight"):
        GPT.from_pretrained(folder)
    whole = (families["llama"][0] / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("dtype, limit", [("bfloat16", 0.3), ("float16", 0.04)])
def test_half_precision_rounds_a_little_and_samples(dtype, limit, families):
    folder, ids, wanted = families["qwen3"]
    gpt = GPT.from_pretrained(folder, dtype=dtype).eval()
    assert limit / 20 < difference(gpt, ids[:, :64], wanted[:, :64]) < limit
    tokens, mask = generate(gpt, [ids[0, :5].tolist()], 4, 96, generator=seeded())
    assert mask.sum() >= 1 and gpt(tokens).dtype == torch.float32


# ---- a real pretrained model: SMOLLM2=FOLDER python -m pytest -q -k smollm2

SMOLLM2 = os.environ.get("SMOLLM2", "")
needs_smollm2 = pytest.mark.skipif(not SMOLLM2, reason="the environment variable SMOLLM2 does not "
                                   "name a folder with SmolLM2-135M-Instruct")
QUESTIONS = ["What is 17 + 25?", "Name three colours.", "Who wrote Hamlet?", "Say hello in French.",
             "What is the capital of Italy?", "Write a haiku about rain.", "Is the sky green?",
             "List two fruits.", "What do bees make?", "Count from one to five."]


@needs_smollm2
def test_smollm2_answers_greedily_as_in_transformers_and_comes_back(tmp_path):
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    tokenizer = sft.tokenizer_of(SMOLLM2, "auto")
    ours = GPT.from_pretrained(SMOLLM2, vocab_size=tokenizer.n_vocab, block_size=128).eval()
    prompts = [encode_prompt(tokenizer, chat.written([("user", question)], tokenizer.chat))
               for question in QUESTIONS]
    tokens, mask = generate(ours, prompts, 40, tokenizer.end_tokens, temperature=0)
    for i, prompt in enumerate(prompts):
        answer = tokens[i, 1:][mask[i] > 0].tolist()
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False,
                                 eos_token_id=list(tokenizer.end_tokens), pad_token_id=0)[0]
        assert prompt + answer == wanted.tolist(), tokenizer.decode(answer)
    ours.save_pretrained(tmp_path, tokenizer.end_tokens)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits.log_softmax(-1),
                                   ours(tokens).log_softmax(-1), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------
# sft.py

def test_nats_per_response_is_minus_the_mean_log_probability_of_whole_responses():
    gpt = small_gpt()
    logprobs = token_logprobs(gpt, *data.collate(PROMPTS, RESPONSES))
    nats = sft.nats_per_response(gpt, PROMPTS, RESPONSES, torch.device("cpu"), batch_size=3)
    assert nats == pytest.approx(-logprobs.sum().item() / 4, rel=1e-5)


def test_sft_loss_has_no_gradient_through_prompt_columns_and_one_through_eos():
    inputs, targets, mask = data.collate(PROMPTS, RESPONSES)
    logprobs = torch.randn(mask.shape, generator=seeded(), requires_grad=True)
    sft.sft_loss(logprobs, mask).backward()
    assert torch.equal(logprobs.grad, -mask / mask.sum())
    assert (logprobs.grad[targets == 10] < 0).all()


# --------------------------------------------------------------------------------------------------
# reward_model.py

def test_preference_losses_equal_their_formulas_and_metrics_count_ties_half():
    chosen = torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    rejected = torch.tensor([0.0, 1.0, 0.5, -3.0]).double()
    p = [sigmoid(difference) for difference in (1, -3, 0, 6)]

    loss, metrics = reward_model.preference_loss(chosen, rejected)
    assert loss.item() == pytest.approx(-sum(map(math.log, p)) / 4)
    assert metrics["accuracy"].item() == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert metrics["margin"].item() == pytest.approx((1 - 3 + 0 + 6) / 4)
    assert metrics["loss"] == loss

    fidelity, _ = reward_model.preference_loss(chosen, rejected, "fidelity")
    assert fidelity.item() == pytest.approx(sum(1 - math.sqrt(x) for x in p) / 4)


def test_preference_loss_subtracts_a_margin_and_takes_a_weighted_mean():
    zero = torch.zeros(3)
    loss, _ = reward_model.preference_loss(zero + 1.0, zero, margin=1.0)
    assert loss.item() == pytest.approx(math.log(2))           # ahead by exactly the margin
    chosen, weights = torch.tensor([1.0, 3.0, 99.0]), torch.tensor([0.5, 0.5, 0.0])
    loss, _ = reward_model.preference_loss(chosen, zero, weights=weights)
    assert loss.item() == pytest.approx(-(math.log(sigmoid(1)) + math.log(sigmoid(3))) / 2)


def test_token_wise_scores_equal_a_loop_over_pairs_and_columns():
    prompts = [[1, 2], [1, 2], [3], [4, 5, 6]]
    chosen = [[7, 8, 10], [7, 10], [7, 10], [1, 10]]
    rejected = [[7, 9, 9, 10], [8, 8, 8, 10], [7, 10], [2]]
    _, targets, mask = data.collate(prompts * 2, chosen + rejected)
    values = torch.randn(mask.shape, generator=seeded())                    # (8, T)
    c, r, w = reward_model.token_wise_scores(*values.split(4), *targets.split(4), *mask.split(4))
    for n, (prompt, a, b) in enumerate(zip(prompts, chosen, rejected)):
        start = len(prompt) - 1                                # column of the first response token
        longest = max(len(a), len(b))
        differing = [k for k in range(longest) if a[k:k + 1] != b[k:k + 1]]
        first = differing[0] if differing else longest - 1     # equal responses: the last column
        columns = range(start + first, start + longest)
        assert w[n].nonzero()[:, 0].tolist() == list(columns)
        assert w[n].sum().item() == pytest.approx(1.0)
        for t in columns:
            assert c[n, t] == values[n, min(t, start + len(a) - 1)]
            assert r[n, t] == values[n + 4, min(t, start + len(b) - 1)]


def test_calibration_of_scores_that_are_gold_over_temperature_is_perfect():
    gold = torch.randn(300, 4, generator=seeded())
    i, j = torch.triu_indices(4, 4, offset=1)
    truth = reviews.preference(gold[:, i], gold[:, j], 0.6)
    rows = reward_model.calibration(gold / 0.6, truth)[1:]
    flipped = reward_model.calibration(-gold / 0.6, truth)[1:]
    assert sum(n for *_, n in rows) == 300 * 6
    assert all(true == pytest.approx(predicted, abs=1e-5) for _, predicted, true, _ in rows)
    assert all(true == pytest.approx(1 - predicted, abs=1e-5) for _, predicted, true, _ in flipped)


# --------------------------------------------------------------------------------------------------
# ppo.py

def test_whiten_gives_masked_mean_zero_and_population_variance_one_or_keeps_the_mean():
    x, *_, mask = ragged()
    x = x * 3 + 1
    inside = x[mask > 0]
    plain = (inside - inside.mean()) / inside.var(correction=0).sqrt()
    torch.testing.assert_close(ppo.whiten(x, mask)[mask > 0], plain, atol=1e-6, rtol=1e-6)
    kept = ppo.whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept[mask > 0], plain + inside.mean(), atol=1e-6, rtol=1e-6)
    assert not kept[mask == 0].any()
    assert not ppo.whiten(x[:1, :1], torch.ones(1, 1)).any()   # one token: no spread, no nan


@pytest.mark.parametrize("vocab_size", [2, 3, 7])
def test_kl_estimates_against_exact_enumeration(vocab_size):
    logits = torch.randn(2, vocab_size, generator=seeded(vocab_size), dtype=torch.float64)
    log_pi, log_ref = logits.log_softmax(-1)
    pi = log_pi.exp()
    exact = (pi * (log_pi - log_ref)).sum()
    k1, k2, k3 = (ppo.kl_estimate(log_pi, log_ref, kind) for kind in ("k1", "k2", "k3"))
    torch.testing.assert_close((pi * k1).sum(), exact)
    torch.testing.assert_close((pi * k3).sum(), exact)
    assert (k3 >= 0).all() and (k2 >= 0).all() and (k1 < 0).any()
    torch.testing.assert_close((pi * k2).sum(), (pi * (log_pi - log_ref) ** 2).sum() / 2)


def test_shaped_rewards_sum_to_score_minus_beta_kl_and_carry_the_score_at_the_last_token_only():
    logprobs, ref_logprobs, _, _, mask = ragged()
    scores = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0], dtype=torch.float64)
    logprobs.requires_grad_()
    rewards = ppo.shape_rewards(scores, logprobs, ref_logprobs, mask, beta=0.3)
    assert not rewards.requires_grad
    for b, columns in columns_of(mask):
        expected = [0.0] * 9
        for t in columns:
            expected[t] = -0.3 * (logprobs[b, t] - ref_logprobs[b, t]).item()
        expected[columns[-1]] += scores[b].item()
        assert rewards[b].tolist() == pytest.approx(expected, abs=1e-12)


@tried
@hypothesis.given(any_lengths, any_seed, any_size, any_share, any_share)
def test_gae_equals_the_double_sum_of_discounted_residuals_over_finite_episodes(
        lengths, seed, size, gamma, lam):
    rewards, values, _, mask = random_tensors(lengths, seed, size)
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    rounding = 1e-9 * max(1.0, size)
    for row, columns in columns_of(mask):
        n = len(columns)
        R = rewards[row, columns].tolist()
        V = values[row, columns].tolist() + [0.0]
        delta = [R[t] + gamma * V[t + 1] - V[t] for t in range(n)]
        for t, got in enumerate(advantages[row, columns].tolist()):
            expected = sum((gamma * lam) ** l * delta[t + l] for l in range(n - t))
            assert got == pytest.approx(expected, rel=1e-9, abs=rounding)
    assert not advantages[mask == 0].any()
    torch.testing.assert_close(returns, (advantages + values) * mask)


def test_critic_targets_of_every_kind():
    rewards, values, _, _, mask = ragged()
    scores = torch.arange(5).double()
    targets = {kind: ppo.critic_targets(rewards, values, scores, mask, kind, gamma=0.9, lam=0.8)
               for kind in ("gae", "td", "mc", "score")}
    torch.testing.assert_close(targets["gae"], ppo.gae(rewards, values, mask, 0.9, 0.8)[1])
    for b, columns in columns_of(mask):
        for t in columns:
            next_value = values[b, t + 1].item() if t + 1 in columns else 0.0
            one_step = rewards[b, t].item() + 0.9 * next_value
            assert targets["td"][b, t].item() == pytest.approx(one_step)
            to_go = sum(0.9 ** (i - t) * rewards[b, i].item() for i in columns if i >= t)
            assert targets["mc"][b, t].item() == pytest.approx(to_go)
            assert targets["score"][b, t].item() == b
    assert not any(target[mask == 0].any() for target in targets.values())


@pytest.mark.parametrize("ratio, advantage, loss, gradient, clipped", [
    (1.1, 2.0, -2.2, -2.2, 0),       # inside, good: the policy gradient
    (1.1, -2.0, 2.2, 2.2, 0),        # inside, bad
    (1.5, 2.0, -2.4, 0.0, 1),        # above, good: far enough, no gradient
    (1.5, -2.0, 3.0, 3.0, 0),        # above, bad: all the way back
    (0.5, 2.0, -1.0, -1.0, 0),       # below, good: all the way back
    (0.5, -2.0, 1.6, 0.0, 1)])       # below, bad: far enough
def test_clipped_policy_loss_in_all_six_cases_with_gradients(
        ratio, advantage, loss, gradient, clipped):
    logprobs = torch.tensor([[-1.0 + math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1).double()
    got, metrics = ppo.policy_loss(logprobs, -one, advantage * one, one, clip_eps=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert metrics["clip_fraction"].item() == clipped and metrics["policy_loss"] == got
    assert metrics["ratio"].item() == pytest.approx(ratio)


def test_kl_penalty_loss_and_its_gradient_equal_the_formula():
    new, old, advantages, _, mask = ragged()
    new.requires_grad_()
    loss, metrics = ppo.kl_penalty_loss(new, old, advantages, mask, coef=0.7)
    assert metrics["clip_fraction"] == 0 and metrics["policy_loss"] == loss
    (gradient,) = torch.autograd.grad(loss, new)
    ratio = (new - old).exp()
    expected = -(ratio * advantages - 0.7 * (ratio - 1 - (new - old)))[mask > 0].mean()
    assert loss.item() == pytest.approx(expected.item())
    expected = (-(ratio * advantages) + 0.7 * (ratio - 1)) * mask / mask.sum()
    torch.testing.assert_close(gradient, expected)


def test_the_kl_penalty_does_not_cancel_near_zero():
    """Computed as ratio - 1 - log ratio in float32, it would be off by 30 % here."""
    log_ratio = torch.tensor([[1e-4, -3e-4, 2e-5]])
    zero = torch.zeros(1, 3)
    loss, _ = ppo.kl_penalty_loss(log_ratio, zero, zero, torch.ones(1, 3), coef=1.0)
    exact = (torch.expm1(log_ratio.double()) - log_ratio.double()).mean().item()
    assert loss.item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("log_ratio", [21.0, 89.0, 1000.0, -1000.0])
def test_where_the_ratio_overflows_the_clipped_side_has_no_gradient(log_ratio):
    """In float32 exp overflows above 88, and inf * 0 is nan."""
    mask = torch.ones(2, 2)
    advantages = torch.tensor([1.0, 0.0])
    old = torch.tensor([[-1.0, -1 - log_ratio], [-1.0, -1 - log_ratio]])
    far = 1.2 if log_ratio > 0 else 0.0
    for loss in (lambda x: ppo.policy_loss(x, old, advantages[:, None].expand(2, 2), mask)[0],
                 lambda x: grpo.grpo_loss(x, old, advantages, grpo.token_weights(mask))[0]):
        logprobs = torch.full((2, 2), -1.0, requires_grad=True)
        value = loss(logprobs)
        value.backward()
        assert value.item() == pytest.approx(-(1 + far) / 4, abs=1e-6)
        torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.25, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("value, old, target, loss, gradient, clipped", [
    (1.1, 1.0, 2.0, 0.5 * 0.9 ** 2, -0.9, 0),      # inside the clip
    (1.9, 1.0, 2.0, 0.5 * 0.8 ** 2, 0.0, 1),       # moved far towards the target: no more gradient
    (0.1, 1.0, 2.0, 0.5 * 1.9 ** 2, -1.9, 0),      # moved far the wrong way: back
    (3.5, 1.0, 2.0, 0.5 * 1.5 ** 2, 1.5, 0)])      # past the target by more than the clipped error
def test_clipped_value_loss_in_each_case_with_gradients(
        value, old, target, loss, gradient, clipped):
    one = torch.ones(1, 1).double()
    v = (value * one).requires_grad_()
    got, metrics = ppo.value_loss(v, old * one, target * one, one, clip_eps=0.2)
    got.backward()
    assert got.item() == pytest.approx(loss) and v.grad.item() == pytest.approx(gradient)
    assert metrics["value_clip_fraction"].item() == clipped and metrics["value_loss"] == got
    plain, metrics = ppo.value_loss(v, old * one, target * one, one, clip_eps=0)
    assert plain.item() == pytest.approx(0.5 * (value - target) ** 2)
    assert metrics["value_clip_fraction"] == 0


@tried
@hypothesis.given(any_lengths, any_seed, any_size, strategies.floats(0.01, 0.9))
def test_clipped_losses_of_any_rows_are_means_over_their_tokens(lengths, seed, size, eps):
    drift, old, targets, mask = random_tensors(lengths, seed, size)
    drift = drift.clamp(-20, 20).requires_grad_()              # ratios up to e^20
    policy_losses, value_losses = [], []
    for row, columns in columns_of(mask):
        for t in columns:
            x, v_old, target = drift[row, t].item(), old[row, t].item(), targets[row, t].item()
            ratio = math.exp(x)
            clipped = max(min(ratio, 1 + eps), 1 - eps)
            policy_losses.append(-min(ratio * target, clipped * target))
            v_clipped = v_old + max(min(x, eps), -eps)
            value_losses.append(0.5 * max((v_old + x - target) ** 2, (v_clipped - target) ** 2))
    loss, _ = ppo.value_loss(old + drift, old, targets, mask, eps)
    assert loss.item() == pytest.approx(np.mean(value_losses), rel=1e-6, abs=1e-12)
    loss, metrics = ppo.policy_loss(drift - 1, 0 * old - 1, targets, mask, eps)
    assert loss.item() == pytest.approx(np.mean(policy_losses), rel=1e-6, abs=1e-12)
    assert 0 <= metrics["clip_fraction"] <= 1
    loss.backward()
    assert torch.isfinite(drift.grad).all() and not drift.grad[mask == 0].any()


def test_numbers_outside_the_mask_change_nothing_in_any_function_of_ppo():
    logprobs, old, advantages, values, mask = ragged()
    noise = torch.randn(mask.shape, dtype=torch.float64, generator=seeded(9)) * (mask == 0)

    def everything(x):
        """Every loss, metric and tensor that ppo.py computes, with x added to its inputs"""
        rewards = ppo.shape_rewards(torch.ones(5).double(), logprobs + x, old, mask, 0.1)
        tensors = [ppo.whiten(advantages + x, mask), rewards]
        tensors += ppo.gae(rewards + x, values + x, mask)
        tensors.append(ppo.explained_variance(values + x, old - x, mask))
        for kind in ("gae", "td", "mc", "score"):
            tensors.append(ppo.critic_targets(rewards + x, values + x, torch.ones(5), mask, kind))
        for loss, metrics in (
                ppo.policy_loss(logprobs + x, old - x, advantages + x, mask),
                ppo.kl_penalty_loss(logprobs + x, old - x, advantages + x, mask, 0.5),
                ppo.value_loss(values + x, old, old + x, mask)):
            tensors += [loss, *metrics.values()]
        return tensors

    for clean, junk in zip(everything(0 * noise), everything(noise)):
        torch.testing.assert_close(clean, junk, atol=0, rtol=1e-12)


@tried
@hypothesis.given(any_lengths, any_seed, any_size)
def test_whitened_and_group_advantages_of_any_rows_are_finite(lengths, seed, size):
    advantages, _, _, mask = random_tensors(lengths, seed, size)
    whitened = ppo.whiten(advantages, mask)
    assert torch.isfinite(whitened).all() and not whitened[mask == 0].any()
    assert abs(masked_mean(whitened, mask).item()) < 1e-6
    rewards = torch.cat([advantages[:, 0], advantages[:, 0]])
    assert torch.isfinite(grpo.group_advantages(rewards, 2, "grpo")).all()


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant():
    returns, values, _, _, mask = ragged()
    assert ppo.explained_variance(returns, returns, mask).item() == pytest.approx(1.0)
    assert ppo.explained_variance(0 * returns + 5, returns, mask).item() == pytest.approx(0.0)
    errors = (returns - values)[mask > 0]
    expected = 1 - errors.var(correction=0) / returns[mask > 0].var(correction=0)
    got = ppo.explained_variance(values, returns, mask)
    assert got.item() == pytest.approx(expected.item())


def test_proportional_kl_takes_the_papers_steps_and_settles_on_its_target():
    control = ppo.ProportionalKL(0.2, target=6.0, horizon=10000)
    control.update(6.6, n=256)
    once = 0.2 * (1 + 0.1 * 256 / 10000)
    assert control.beta == pytest.approx(once)
    control.update(600.0, n=256)                               # clipped at 0.2
    assert control.beta == pytest.approx(once * (1 + 0.2 * 256 / 10000))
    control.update(0.0, n=256)
    assert control.beta < once

    control = ppo.ProportionalKL(0.05, target=6.0, horizon=500)
    kl = 0.0
    for _ in range(300):                                       # the KL slowly follows 2 / beta
        kl += 0.2 * (2 / control.beta - kl)
        control.update(kl, n=100)
    assert kl == pytest.approx(6.0, rel=0.02)


def test_threshold_kl_doubles_above_and_halves_below_and_else_stays():
    penalty = ppo.ThresholdKL(1.0, target=0.01)
    for kl_old, coef in ((0.0151, 2.0), (0.0149, 2.0), (0.0068, 2.0), (0.0066, 1.0), (0.0, 0.5)):
        penalty.update(kl_old)
        assert penalty.coef == coef


def test_kl_coefficients_stay_within_reach_of_their_start():
    penalty = ppo.ThresholdKL(1.0, target=0.002)
    for kl_old, updates, coef in ((0.0, 2000, 1 / 1024), (1.0, 10, 1.0), (1.0, 2000, 1024)):
        for _ in range(updates):
            penalty.update(kl_old)
        assert penalty.coef == coef
    control = ppo.ProportionalKL(0.4, target=6.0, horizon=30.0)
    for kl, beta in ((0.0, 4e-5), (100.0, 4e3)):
        for _ in range(2000):
            control.update(kl, 128)
        assert control.beta == pytest.approx(beta)


def test_old_logprobs_in_bfloat16_come_from_batches_of_the_updates_shape(monkeypatch):
    gpt = small_gpt()
    rows = data.collate([[1, 2]] * 12, [[3] * (1 + i % 4) + [10] for i in range(12)])
    batch_sizes = []

    def counted(policy, inputs, *args, **kwargs):
        batch_sizes.append(len(inputs))
        return token_logprobs(policy, inputs, *args, **kwargs)

    monkeypatch.setattr(rollout, "token_logprobs", counted)
    cfg = tiny_config(ppo, minibatch_size=8, accumulation=2)
    whole = ppo.score_rollout(gpt, *rows, cfg)
    parts = ppo.score_rollout(gpt, *rows, dataclasses.replace(cfg, dtype="bfloat16"))
    assert batch_sizes == [12, 4, 4, 4]
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)
    assert torch.equal(whole[0], token_logprobs(gpt, *rows))


def test_the_first_minibatch_must_have_ratio_one(capsys):
    ones = torch.ones(4, 50)
    half = (torch.arange(50) < 25) * ones
    noise = torch.zeros(4, 50)
    noise[0, :3] = torch.tensor([0.3, -0.3, 0.15])

    def check(log_ratio, clip_eps=0.2, high=None, mask=ones, dtype="bfloat16"):
        cfg = dataclasses.replace(ppo.Config(), clip_eps=clip_eps, dtype=dtype)
        return ppo.check_first_ratio(log_ratio - 1, -ones, mask, cfg, high)

    assert check(0 * ones, dtype="float32") == 0.0
    assert check(noise) == pytest.approx(2 / 200)              # in bfloat16 a few tokens may be off
    assert capsys.readouterr().out == ""
    assert check(noise, 0.1) == pytest.approx(3 / 200)
    warning = "1.5% of the tokens have a ratio outside the clip range"
    assert warning in capsys.readouterr().out
    assert check(noise, 0.1, high=0.4) == pytest.approx(1 / 200)
    assert check(noise, mask=half) == pytest.approx(2 / 100)   # tokens off the mask do not count
    for log_ratio, dtype, off in ((1e-3 * ones, "float32", "1.0e-03"), (noise, "float32", "3"),
                                  (-0.03 * ones, "bfloat16", "3.0e-02")):
        with pytest.raises(Stopped, match=f"log ratio should be 0, but it is off by {off}"):
            check(log_ratio, dtype=dtype)


def test_an_impossible_or_large_kl_ref_is_noticed(capsys):
    cfg = ppo.Config()                                         # --kl_bound 25
    fine = torch.tensor([0.5, -0.2, 0.3])
    ppo.check_kl_ref(fine, cfg, first=False)
    ppo.check_kl_ref(torch.zeros(3), cfg, first=True)
    ppo.check_kl_ref(torch.tensor([-1.0]), cfg, first=False)   # one response proves nothing
    assert capsys.readouterr().out == ""
    ppo.check_kl_ref(torch.tensor([-1.0, -1.1, -0.9] * 6), cfg, first=False)
    assert "never negative" in capsys.readouterr().out
    ppo.check_kl_ref(fine + 30, cfg, first=False)
    assert "above --kl_bound 25.0" in capsys.readouterr().out
    with pytest.raises(Stopped, match="at the first update kl_ref should be 0"):
        ppo.check_kl_ref(fine, cfg, first=True)
    ppo.check_kl_ref(fine, dataclasses.replace(cfg, dtype="bfloat16"), first=True)   # rounding


def test_responses_without_eos_get_the_fixed_score_and_scores_can_be_clipped():
    scalar = small_scalar()
    batch = data.collate(PROMPTS, RESPONSES)
    finished = torch.tensor([True, True, True, False])
    raw = sequence_scores(scalar, *batch)
    cfg = dataclasses.replace(ppo.Config(), missing_eos_score=-3.0)
    scores = reward_of(scalar, cfg)(*batch, finished)
    assert torch.equal(scores[:3], raw[:3]) and scores[3] == -3.0
    assert torch.equal(reward_of(scalar, cfg, missing_eos_score=None)(*batch, finished), raw)
    clipped = reward_of(scalar, cfg, score_clip=0.1)(*batch, finished)
    assert clipped.abs().max() <= 0.1 + 1e-6 and clipped[3].item() == pytest.approx(-0.1)


# --------------------------------------------------------------------------------------------------
# dpo.py

def dpo_loss_by_hand(kind, h, beta, margin, target, e):
    """The loss of one pair, in plain Python: h is how far its log ratios differ."""
    z = beta * h - margin
    p, q = sigmoid(z), sigmoid(-z)
    wins, loses = target, 1 - target                           # probabilities
    if kind == "sigmoid":
        return (-((1 - e) * wins + e * loses) * math.log(p)
                - (e * wins + (1 - e) * loses) * math.log(q))
    if kind == "robust":
        return (-((1 - e) * wins - e * loses) * math.log(p)
                - ((1 - e) * loses - e * wins) * math.log(q)) / (1 - 2 * e)
    if kind == "ipo":
        return wins * (h - 1 / (2 * beta)) ** 2 + loses * (-h - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return wins * max(0, 1 - z) + loses * max(0, 1 + z)
    if kind == "fidelity":
        return 1 - math.sqrt(wins * p) - math.sqrt(loses * q)


@pytest.mark.parametrize("kind, margin, smoothing", [
    ("sigmoid", 0.2, 0.1),
    ("robust", 0.2, 0.1),
    ("ipo", 0.0, 0.0),
    ("hinge", 0.2, 0.0),
    ("fidelity", 0.2, 0.0)])
def test_dpo_losses_equal_their_formulas(kind, margin, smoothing):
    beta = 0.7
    c, r, rc, rr = logprobs = torch.randn(4, 6, generator=seeded(), dtype=torch.float64)
    target = torch.rand(6, generator=seeded(1), dtype=torch.float64)
    weights = torch.arange(1.0, 7.0).double()

    def weighted_mean(values):
        return pytest.approx(np.average(values, weights=weights))

    differences = ((c - rc) - (r - rr)).tolist()
    losses = [dpo_loss_by_hand(kind, h, beta, margin, t, smoothing)
              for h, t in zip(differences, target.tolist())]
    loss, metrics = dpo.dpo_loss(*logprobs, beta, kind, smoothing, margin, target, weights)
    assert loss.item() == weighted_mean(losses) and metrics["loss"] == loss
    assert metrics["margin"].item() == weighted_mean([beta * h for h in differences])
    assert metrics["accuracy"].item() == weighted_mean([h > 0 for h in differences])

    plain, _ = dpo.dpo_loss(*logprobs, beta, kind)
    hard, _ = dpo.dpo_loss(*logprobs, beta, kind, target=torch.ones(6, dtype=torch.float64))
    assert plain.item() == pytest.approx(hard.item())


def test_dpo_starts_at_ln_2_without_margin_half_right():
    c, r = torch.tensor([[-3.0, -5.0], [-4.0, -2.0]])
    loss, metrics = dpo.dpo_loss(c, r, c, r, beta=0.3)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["margin"] == 0 and metrics["accuracy"] == 0.5
    _, metrics = dpo.dpo_loss(c + 1e-6, r, c, r, beta=0.3)
    assert metrics["accuracy"] == 0.5                          # a difference by rounding is a tie


def loss_of_margin(z, **options):
    """The DPO loss of pairs with the margins z, at beta 1."""
    zero = torch.zeros_like(z)
    return dpo.dpo_loss(z, zero, zero, zero, beta=1.0, **options)[0]


@pytest.mark.parametrize("kind, smoothing, z, gradient", [
    ("sigmoid", 0.0, 0.0, -0.5),
    ("sigmoid", 0.1, math.log(0.9 / 0.1), 0.0),      # cDPO has a finite best margin
    ("sigmoid", 0.2, math.log(0.8 / 0.2), 0.0),
    ("ipo", 0.0, 0.5, 0.0),                          # so has IPO: 1 / (2 beta)
    ("ipo", 0.0, 1.5, 2.0),
    ("hinge", 0.0, 1.01, 0.0),
    ("hinge", 0.0, 0.99, -1.0),
    ("fidelity", 0.0, -math.log(2), -0.19245),       # steepest where p = 1/3: 1 / (3 sqrt(3))
    ("fidelity", 0.0, -40.0, 0.0)])
def test_each_dpo_loss_has_its_known_slope_and_is_flat_at_its_best_margin(
        kind, smoothing, z, gradient):
    x = torch.tensor([z], requires_grad=True)
    loss_of_margin(x, kind=kind, label_smoothing=smoothing).backward()
    assert x.grad.item() == pytest.approx(gradient, abs=1e-4)


def test_robust_is_unbiased_under_flips_and_unbounded_below():
    z = torch.tensor([0.7])
    robust = loss_of_margin(z, kind="robust", label_smoothing=0.2)
    flipped = loss_of_margin(-z, kind="robust", label_smoothing=0.2)
    mean = 0.8 * robust + 0.2 * flipped
    assert mean.item() == pytest.approx(loss_of_margin(z).item())
    far = loss_of_margin(torch.tensor([20.0]), kind="robust", label_smoothing=0.1)
    assert far.item() == pytest.approx(-2.5, abs=1e-3)


@tried
@hypothesis.given(any_seed, strategies.integers(1, 5), any_size,
                  strategies.sampled_from(["sigmoid", "robust", "ipo", "hinge", "fidelity"]),
                  strategies.sampled_from([0.01, 0.25, 5.0]))
def test_preference_losses_of_any_margins_are_finite_with_finite_gradients(
        seed, n, size, kind, beta):
    chosen, rejected, ref_chosen, ref_rejected = -size * torch.rand(4, n, generator=seeded(seed))
    chosen.requires_grad_()
    loss, metrics = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta, kind)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(chosen.grad).all()
    assert 0 <= metrics["accuracy"] <= 1
    assert kind != "fidelity" or -1e-6 <= loss <= 1
    if size <= 30 and kind != "ipo":                           # beyond, the slope is 0 in fp32
        assert (chosen.grad <= 0).all()                        # a likelier chosen one never costs
    for rm_kind in ("bradley_terry", "fidelity"):
        loss, _ = reward_model.preference_loss(chosen, rejected, rm_kind)
        (gradient,) = torch.autograd.grad(loss, chosen)
        assert torch.isfinite(loss) and loss >= 0 and torch.isfinite(gradient).all()


def test_sequence_logprobs_are_sums_or_means_over_response_tokens():
    logprobs, _, _, _, mask = ragged()
    sums = dpo.sequence_logprobs(logprobs, mask)
    torch.testing.assert_close(sums, logprobs.sum(1))
    means = dpo.sequence_logprobs(logprobs, mask, True)
    torch.testing.assert_close(means * mask.sum(1), logprobs.sum(1))


def test_masking_the_shared_prefix_changes_means_and_not_differences_of_sums():
    gpt = small_gpt()
    prompts = [[1, 2], [3]]
    chosen, rejected = [[4, 5, 6, 10], [7, 9, 10]], [[4, 5, 10], [8, 9, 10]]
    inputs, targets, mask = data.collate(prompts * 2, chosen + rejected)
    full_masks = mask.chunk(2)
    cut_masks = dpo.after_shared_prefix(*targets.chunk(2), *full_masks)
    assert [m.sum(1).tolist() for m in cut_masks] == [[2, 3], [1, 3]]
    logprobs = token_logprobs(gpt, inputs, targets, mask).chunk(2)

    def difference(masks, length_normalise):
        chosen, rejected = (dpo.sequence_logprobs(lp, m, length_normalise)
                            for lp, m in zip(logprobs, masks))
        return chosen - rejected

    torch.testing.assert_close(difference(full_masks, False), difference(cut_masks, False))
    assert not torch.allclose(difference(full_masks, True), difference(cut_masks, True))


def test_pair_logprobs_equal_those_of_each_response():
    gpt = small_gpt()
    both = RESPONSES, RESPONSES[::-1]
    pairs = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r}
             for p, c, r in zip(PROMPTS, *both)]
    logprobs, lengths, nll = dpo.pair_logprobs(gpt, pairs, tiny_config(dpo))
    for k, responses in enumerate(both):
        wanted = token_logprobs(gpt, *data.collate(PROMPTS, responses)).sum(1)
        torch.testing.assert_close(logprobs[k], wanted, atol=1e-4, rtol=0)
        assert lengths[k].tolist() == [len(response) for response in responses]
    assert nll.item() == pytest.approx(-logprobs[0].sum().item() / lengths[0].sum().item())


def test_all_pairs_of_rankings_are_made_better_first():
    comparisons = [{"prompt_ids": [1], "response_ids": [[2], [3], [4]]},
                   {"prompt_ids": [5], "response_ids": [[6], [7]]}]
    pairs = dpo.pairs_of_rankings(comparisons, seeded())
    made = sorted((*p["prompt_ids"], *p["chosen_ids"], *p["rejected_ids"]) for p in pairs)
    assert made == [(1, 2, 3), (1, 2, 4), (1, 3, 4), (5, 6, 7)]


@pytest.mark.parametrize("labels", ["annotators", "reward_model", "soft"])
def test_sampled_pairs_are_labelled_with_the_probability_of_a_win(labels, tokenizer):
    """The reward counts tokens and EOS, so each pair's label can be computed from the pair."""
    gpt = small_gpt(vocab_size=tokenizer.n_vocab, block_size=40, std=0.02)
    eos_weight = gpt.transformer.wte.weight[tokenizer.eot_token]
    gpt.transformer.ln_f.bias.data.copy_(eos_weight * 300)     # EOS is likely

    def reward(inputs, targets, mask, finished):
        return mask.sum(1) / 2 + finished

    def score(response):
        if labels == "annotators":
            text = tokenizers.decode_response(tokenizer, response)
            return reviews.gold(TINY_PROMPT, *text) / 0.1
        return len(response) / 2 + (response[-1] == tokenizer.eot_token)

    cfg = tiny_config(dpo, labels=labels, max_new_tokens=6)
    prompts = [tokenizers.encode_prompt(tokenizer, TINY_PROMPT)] * 1500
    pairs = dpo.sample_pairs(gpt, reward, tokenizer, prompts, cfg, 0.1, seeded())
    assert len(pairs) == 1500
    ahead = [score(pair["chosen_ids"]) - score(pair["rejected_ids"]) for pair in pairs]
    targets = [pair["target"] for pair in pairs]
    if labels == "soft":
        assert targets == pytest.approx([sigmoid(x) for x in ahead], abs=1e-5)
        assert min(targets) >= 0.5
        return
    assert set(targets) == {1}
    better = [sigmoid(abs(x)) for x in ahead if x]             # P(the better one wins)
    variance = sum(p * (1 - p) for p in better)
    wins = sum(x > 0 for x in ahead)
    assert sum(better) > 50 and abs(wins - sum(better)) < 4 * variance ** 0.5


# --------------------------------------------------------------------------------------------------
# grpo.py

def group_advantages_by_loop(rewards, G, kind):
    result = []
    for start in range(0, len(rewards), G):
        group = rewards[start:start + G]
        mean = sum(group) / G
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (G - 1))
        for i, r in enumerate(group):
            others = group[:i] + group[i + 1:]
            advantages = {"grpo": (r - mean) / (std + 1e-4), "dr_grpo": r - mean,
                          "rloo": r - sum(others) / (G - 1), "reinforce": r}
            result.append(advantages[kind])
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce"])
def test_group_advantages_equal_a_loop_over_groups(kind):
    rewards = torch.randn(24, generator=seeded(), dtype=torch.float64)
    for G in (2, 3, 4, 24):
        ours = grpo.group_advantages(rewards, G, kind)
        by_loop = group_advantages_by_loop(rewards.tolist(), G, kind)
        torch.testing.assert_close(ours, by_loop, atol=1e-9, rtol=0)


@pytest.mark.parametrize("G", [2, 3, 4, 7, 64])
def test_groups_of_equal_rewards_have_exactly_zero_advantage(G):
    for level in (0.1, -3.0, 1e-3, 1234.567):                  # a mean of equal floats may be off
        for kind in ("grpo", "dr_grpo", "rloo"):
            advantages = grpo.group_advantages(torch.full((G,), level), G, kind)
            assert torch.equal(advantages, torch.zeros(G))


def test_token_weights_say_what_a_token_of_a_short_and_of_a_long_response_counts():
    mask = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    token = grpo.token_weights(mask, "token", max_length=5)
    assert token[mask > 0].tolist() == [0.25] * 4              # every token counts the same
    sequence = grpo.token_weights(mask, "sequence", max_length=5)
    torch.testing.assert_close(sequence.sum(1), torch.tensor([1 / 3, 1 / 3, 0]))  # every response
    torch.testing.assert_close(sequence[1, 1:], torch.full((3,), 1 / 9))
    fixed = grpo.token_weights(mask, "fixed", max_length=5)    # whatever else was sampled
    torch.testing.assert_close(fixed[mask > 0], torch.full((4,), 1 / 15))
    for weights in (token, sequence, fixed):
        assert torch.equal(weights == 0, mask == 0)


@pytest.mark.parametrize("ratio, advantage, loss, gradient, clipped", [
    (1.1, 2.0, -2.2, -2.2, 0),
    (1.25, 2.0, -2.5, -2.5, 0),
    (1.4, 2.0, -2.6, 0.0, 1),
    (0.5, 2.0, -1.0, -1.0, 0),
    (0.9, -2.0, 1.8, 1.8, 0),
    (0.5, -2.0, 1.6, 0.0, 1),
    (1.4, -2.0, 2.8, 2.8, 0)])
def test_asymmetric_clipping_in_every_case_with_gradients(
        ratio, advantage, loss, gradient, clipped):
    """clip_eps 0.2, clip_eps_high 0.3: a probability may rise further than it may fall."""
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, weights = torch.zeros(1, 1), torch.ones(1, 1)
    ours, metrics = grpo.grpo_loss(logprobs, old, torch.tensor([advantage]), weights, 0.2, 0.3)
    ours.backward()
    assert ours.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert metrics["clip_fraction"].item() == clipped
    assert metrics["ratio"].item() == pytest.approx(ratio)


def test_grpo_loss_by_tokens_is_ppos_and_by_every_weight_a_plain_sum():
    logprobs, old, values, _, mask = ragged()
    logprobs = 0.3 * logprobs
    old = 0.3 * old
    advantages = values[:, 0] + torch.arange(5)
    ours, metrics = grpo.grpo_loss(logprobs, old, advantages, grpo.token_weights(mask))
    theirs, expected = ppo.policy_loss(logprobs, old, advantages[:, None].expand_as(mask), mask)
    torch.testing.assert_close(ours, theirs)
    assert expected["clip_fraction"] > 0
    for name, x in expected.items():
        assert metrics[name].item() == pytest.approx(x.item(), abs=1e-6)
    for kind in ("sequence", "fixed"):
        total = 0.0
        for b, columns in columns_of(mask):
            length = len(columns) if kind == "sequence" else 20
            for t in columns:
                ratio = math.exp(logprobs[b, t] - old[b, t])
                clipped = min(max(ratio, 0.8), 1.28)
                advantage = advantages[b].item()
                total -= min(ratio * advantage, clipped * advantage) / length / 5
        weights = grpo.token_weights(mask, kind, max_length=20)
        loss, _ = grpo.grpo_loss(logprobs, old, advantages, weights, 0.2, 0.28)
        assert loss.item() == pytest.approx(total)


@pytest.mark.parametrize("response, kept", [
    (" The plot is good. The plot is not dull. See it twice.", 1),
    (" The plot is good. I liked the plot. Skip it.", 1),
    (" The plot is good. See it twice.", 0),
    (" The plot is good. The plot is solid. I saw it on a train. See it twice.", 0),
    (" The plot is good. The music is solid. See it twice.", 0),
    (" The plot is good, but the music is dull. The plot is thin. Skip it.", 0),
    (" The plot is good. It is a solid fable. See it twice.", 0),
    (" The plot is good. The plot is solid.", 0),
    (" The plot plot is good. The plot is solid. Skip it.", 0),
    ("", 0),
    (" See it twice.", 0)])
def test_the_request_is_three_sentences_about_the_aspect_alone(response, kept):
    prompt = reviews.make_prompt("fable", "a lost letter", "plot")
    good = " The plot is good. The plot is solid. Skip it."
    assert reviews.request_kept([prompt, prompt], [response, good]) == [kept, 1]


def test_rows_give_back_the_texts_they_were_made_of(tokenizer):
    prompts = ["A fable about an old map. On the plot:", "", "x"]
    responses = [" Skip it.", " Worth a look.", " The"]
    ids = tokenizers.encode_texts(tokenizer, prompts, responses)
    ids[1][2].pop()                                            # the last one has no EOS
    assert data.texts_of(tokenizer, *data.collate(*ids)) == (prompts, responses)


# ---- a reward of the user's

def three_rows(tokenizer):
    """The inputs, targets and mask of three responses of 4, 9 and 2 characters"""
    ids = tokenizers.encode_texts(tokenizer, ["a", "b", "c"], [" The", " Skip it.", " A"])
    return data.collate(*ids)


@pytest.fixture
def three_rewards(tokenizer, tmp_path):
    """The rewards for three_rows of a function, given as an expression or as a file's text"""
    def rewards(code, name="f", file="mine.py"):
        if "\n" not in code:
            code = f"import numpy as np, torch\ndef f(prompts, completions):\n    return {code}\n"
        (tmp_path / file).write_text(code)
        reward = load_own(tokenizer, f"{tmp_path / file}:{name}", missing_eos_score=None)
        return reward(*three_rows(tokenizer), torch.tensor([True] * 3)).tolist()
    return rewards


def test_a_users_reward_is_loaded_from_its_file_and_anew_once_it_is_repaired(tokenizer, tmp_path):
    path = tmp_path / "mine.py"
    for broken, message in (
            ("import neighbor\nthis is no python",
             "mine.py cannot be read .SyntaxError: invalid syntax .*line 2"),
            ("import sys\nsys.exit(0)\ndef f(): pass",
             "importing .*mine.py ended in the SystemExit above")):
        path.write_text(broken)
        with pytest.raises(Stopped, match=message):
            load_own(tokenizer, f"{path}:f")
    path.write_text("def f(prompts, responses): return [-len(r) for r in responses]")
    reward = load_own(tokenizer, f"{path}:f", score_clip=6.0)
    scores = reward(*three_rows(tokenizer), torch.tensor([True, True, False]))
    assert scores.tolist() == [-4, -6, -3]                     # the second clipped, the last no EOS
    assert reward.made_for.startswith("mine.py:f ") and reward.model is None
    assert load_own(tokenizer, os.path.relpath(path) + ":f").made_for == reward.made_for


CALLABLES = """
import functools

def lengths(prompts, responses):
    assert prompts == ["a", "b", "c"]
    return [len(r) for r in responses]

def passed_on(wrapper):
    return functools.wraps(turned)(wrapper)

def turned(completions, prompts): return lengths(prompts, completions)
def trl(prompts, completions, **kwargs): return lengths(prompts, completions) + list(kwargs)
def open_ended(completions, **kwargs): return lengths(**kwargs, responses=completions)
def stars(**kwargs): return lengths(kwargs["prompts"], kwargs["completions"])
def star(*args): return lengths(*args)
def alone(responses): return [len(r) for r in responses]
def keywords(*, completions, prompts): return lengths(prompts, completions)
def slash(completions, prompts, /): return lengths(prompts, completions)
def unnamed(p, r, weight=1): return lengths(p, r)
def optional(weight=1, responses=(), prompts=None): return lengths(prompts, responses)
def given(answers, responses, prompts): return lengths(prompts, responses)
def nothing_more(prompts, responses, **kwargs): return lengths(prompts, responses) + list(kwargs)
by_lambda = lambda p, r: lengths(p, r)
anything = lambda *args, **kwargs: by_lambda(*args, **kwargs)
first_given = functools.partial(given, {})
named_given = functools.partial(given, answers={})
passes_both = passed_on(lambda *args, **kwargs: turned(*args, **kwargs))
passes_args = passed_on(lambda *args: turned(*args))
passes_named = passed_on(lambda **kwargs: turned(**kwargs))
passes_less = passed_on(lambda p, r: lengths(p, r))

class Judge:
    def __call__(self, responses, prompts): return lengths(prompts, responses)
    def method(self, responses, prompts): return lengths(prompts, responses)

judge = Judge()
method = judge.method

number = 3
def answers(prompts, completions, answer): pass
def answer_first(answer, completions=None): pass
def answer_last(prompts, completions, *, answer): pass
def three(p, r, answer): pass
def outputs(prompts, outputs): pass
def one(texts): pass
def none(): pass
wrapped = functools.wraps(answers)(lambda *args, **kwargs: None)
class Needs(Judge):
    def __init__(self, path): pass
class NoCall: pass
"""


@pytest.mark.parametrize("name", (
    "turned trl open_ended stars star alone keywords slash unnamed optional nothing_more "
    "by_lambda anything first_given named_given passes_both passes_args passes_named passes_less "
    "Judge judge method").split())
def test_a_reward_is_given_what_its_parameters_are_named(name, three_rewards):
    assert three_rewards(CALLABLES, name) == [4, 9, 2]


@pytest.mark.parametrize("spec, message", [
    ("mine.py:answers",
     "answers.prompts, completions, answer. asks for answer; a reward is given prompts"),
    ("mine.py:answer_first", "asks for answer;"),
    ("mine.py:answer_last", "asks for answer;"),
    ("mine.py:three", "asks for p, r, answer;"),
    ("mine.py:outputs", "asks for outputs;"),
    ("mine.py:one", "asks for texts;"),
    ("mine.py:none", "asks for nothing;"),
    ("mine.py:wrapped", "asks for answer;"),
    ("mine.py:Needs", "importing .* ended in the TypeError above"),
    ("mine.py:NoCall", "has no function NoCall"),
    ("mine.py:number", "has no function number"),
    ("mine.py", "it takes reward_model, path/to/file.py:"),
    ("none.py:short", "none.py does not exist"),
    ("rm", "it takes reward_model, path/to/")])
def test_a_spec_that_names_no_reward_or_one_that_asks_for_more_is_refused(
        spec, message, tokenizer, empty_folder):
    (empty_folder / "mine.py").write_text(CALLABLES)
    with pytest.raises(Stopped, match="^error: .*" + message):
        load_own(tokenizer, spec)


@pytest.mark.parametrize("answer", [
    "np.arange(3.0)",
    "np.arange(3)[:, None]",
    "torch.arange(3.0, requires_grad=True)",
    "torch.arange(3)[:, None].bfloat16()",
    "(x for x in range(3))",
    "map(float, range(3))",
    "(0.0, True, np.float32(2))",
    "[torch.tensor([0.0]), np.array(1.0), np.longdouble(2)]",
    "[__import__('decimal').Decimal(0), __import__('fractions').Fraction(1), 2]",
    "{i: float(i) for i in range(3)}.values()",
    "np.arange(3).astype(object)",
    "[i for i in range(3) if completions.pop()]"])
def test_a_reward_gives_its_numbers_in_any_common_form(answer, three_rewards):
    assert three_rewards(answer) == [0, 1, 2]


def test_a_reward_gives_true_and_false_and_one_number_for_one_response():
    assert guest.numbers(np.array([True, False]), "f") == [1, 0]
    assert guest.numbers(np.array(2.5), "f") == guest.numbers(torch.tensor([[2.5]]), "f") == [2.5]


@pytest.mark.parametrize("answer, why", [
    ("None", "a NoneType .*generator is wanted"),
    ("3.0", "a float .*generator is wanted"),
    ("{0: 1.0, 1: 2.0, 2: 3.0}", "a dict .*is wanted"),
    ("{1.0, 2.0, 3.0}", "a set .*is wanted"),
    ("'123'", "a str .*is wanted"),
    ("b'123'", "a bytes .*is wanted"),
    ("[1.0, None, 2.0]", r"item .1. is None, of type NoneType"),
    ("['high'] * 3", "is 'high'"),
    ("['1.2'] * 3", "item .0. is '1.2', of type str"),
    ("np.array(['1.2'] * 3)", "of type str"),
    ("iter(['1.2'] * 3)", "of type str"),
    ("[np.str_('1.2')] * 3", "of type str_"),
    ("[b'1'] * 3", "of type bytes"),
    ("[1j] * 3", "complex"),
    ("[[1.0], [2.0], [3.0]]", r"item .0. is .1.0., of type list"),
    ("[10 ** 400] * 3", "type int"),
    ("torch.zeros(3, 2)", r"its shape is .3, 2."),
    ("np.array([1.0, None, 2.0])", "item .1. is None"),
    ("np.array(2.0)", "was given 3 prompts and responses and returned 1 numbers"),
    ("async_one()", "a coroutine .*asyncio.run"),
    ("async_many()", "an? async_generator ")])
@pytest.mark.filterwarnings("error")
def test_what_is_not_a_list_of_numbers_is_refused_and_named(answer, why, three_rewards):
    code = ("import numpy as np, torch\n"
            "async def async_one(): pass\n"
            "async def async_many(): yield\n"
            f"f = lambda p, r: {answer}\n")
    with pytest.raises(Stopped, match=f"^error: the reward function f .*{why}.*should return one"):
        three_rewards(code)


@pytest.mark.parametrize("answer", ["[1 / 0 for r in completions]", "(1 / 0 for r in completions)"])
def test_a_failing_reward_is_named_and_its_line_shown(answer, three_rewards, capsys):
    with pytest.raises(Stopped, match="the reward function f ended in the ZeroDivisionError above"):
        three_rewards(answer)
    assert f"return {answer}" in capsys.readouterr().err


def test_a_reward_written_for_one_response_is_told_what_it_gets(three_rewards):
    with pytest.raises(Stopped, match="AttributeError above.*gets a list of prompts and a list of "
                                      "responses, and returns one number for each"):
        three_rewards("-len(completions.split())")


WORKERS = """
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

def check(response):
    return len(json.loads(json.dumps(response)))

def pooled(prompts, responses, start="spawn"):
    with ProcessPoolExecutor(1, multiprocessing.get_context(start)) as pool:
        return list(pool.map(check, responses))

def forked(prompts, responses):
    return pooled(prompts, responses, "fork")
"""


@pytest.mark.parametrize("name", ["judge", "data", "ppo", "tiktoken", "my-judge", "judge.v2"])
def test_worker_processes_find_the_functions_of_a_reward(name, three_rewards):
    """Even if its file has the name of ours, of an installed one, or of no possible module."""
    module = sys.modules.get(name)
    assert three_rewards(WORKERS, "pooled", f"{name}.py") == [4, 9, 2]
    assert three_rewards(WORKERS, "forked", f"{name}.py") == [4, 9, 2]
    assert sys.modules.get(name) is module


def test_a_reward_may_be_named_like_a_module_of_python(three_rewards):
    code = "def f(prompts, responses):\n    import json\n    return map(len, responses)\n"
    for name in ("json", "random", "model", "test"):
        assert three_rewards(code, file=f"{name}.py") == [4, 9, 2]
    assert json is sys.modules["json"] and model is sys.modules["model"]


def test_a_reward_imports_its_neighbors_and_we_import_ours(three_rewards, tmp_path, monkeypatch):
    """Its neighbors have the names of our modules: data, and the package lab"""
    main = types.ModuleType("__main__")
    main.__file__ = str(HERE / "ppo.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    write_rows(tmp_path / "data.py", ["def length(text): return len(text)"])
    write_rows(tmp_path / "lab" / "__init__.py", ["from . import inner"])
    write_rows(tmp_path / "lab" / "inner.py", ["from data import length"])
    before = dict(sys.modules)
    early = WORKERS + "import data\nimport reviews\ncheck = data.length\n"
    assert three_rewards(early, "pooled") == [4, 9, 2]
    late = ("def f(prompts, responses):\n    from lab import inner\n"
            "    return map(inner.length, responses)\n")
    assert three_rewards(late) == [4, 9, 2]
    for name, module in before.items():
        assert sys.modules[name] is module
    assert not {"mine", "lab.inner"} & sys.modules.keys()
    assert sys.path[-1] == str(tmp_path) != sys.path[0]        # for workers that start after a call


SETS_EVERYTHING = """
import os, random, sys, torch
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.bfloat16)
torch.set_default_device("meta")
torch.use_deterministic_algorithms(True)
os.mkdir("work")
os.chdir("work")
sys.path.insert(0, "/nowhere")

def f(prompts, responses):
    assert torch.zeros(1).is_meta and torch.zeros(1).dtype == torch.bfloat16
    assert os.path.basename(os.getcwd()) == "work" and sys.path[0] == "/nowhere"
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    os.rmdir(os.getcwd())
    return [random.random() for _ in responses]

def broken(prompts, responses):
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(True)
    os.chdir("/")
    1 / 0
"""


def test_what_a_reward_sets_for_the_whole_program_is_set_back(three_rewards, empty_folder):
    """What its file sets holds again when its function is called; neither reaches the program."""
    def state():
        return (torch.is_grad_enabled(), torch.get_default_dtype(), torch.zeros(1).device,
                torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
                torch.get_float32_matmul_precision(), os.getcwd(), sys.path[0],
                torch._C._len_torch_function_stack(), sys.modules["__main__"])

    before = state()
    random.seed(3)
    twin = random.Random(3)
    drawn = [twin.random() for _ in range(3)]
    assert three_rewards(SETS_EVERYTHING) == pytest.approx(drawn)
    assert random.random() == twin.random()                    # generators are not set back
    assert state() == before
    with torch.no_grad(), pytest.raises(Stopped, match="ended in the ZeroDivisionError"):
        three_rewards(SETS_EVERYTHING, "broken")
    assert state() == before


def test_a_keyboard_interrupt_passes_through_a_reward(three_rewards):
    for code in ("def f(p, r):\n    raise KeyboardInterrupt\n",
                 "raise KeyboardInterrupt\nf = len\n"):
        with pytest.raises(KeyboardInterrupt):
            three_rewards(code)
    assert not runs.Run.in_users_code


# --------------------------------------------------------------------------------------------------
# policy_gradient.py

@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_every_rungs_psi_equals_its_sum_over_a_response(gamma):
    rewards, values, _, _, mask = ragged()
    psi = {rung: f(rewards, values, mask, gamma, 0.7) for rung, f in policy_gradient.PSI.items()}
    for b, columns in columns_of(mask):
        n = len(columns)
        R = rewards[b, columns].tolist()
        V = values[b, columns].tolist() + [0.0]
        to_go = [sum(gamma ** (l - t) * R[l] for l in range(t, n)) for t in range(n)]
        delta = [R[t] + gamma * V[t + 1] - V[t] for t in range(n)]
        discount = gamma * 0.7
        expected = {
            "plain_value": [R[t] + gamma * V[t + 1] for t in range(n)],
            "total_return": [sum(gamma ** l * R[l] for l in range(n))] * n,
            "reward_to_go": to_go,
            "baseline": [G - v for G, v in zip(to_go, V)],
            "a2c": delta,
            "gae": [sum(discount ** (l - t) * delta[l] for l in range(t, n)) for t in range(n)]}
        for rung, numbers in expected.items():
            assert psi[rung][b, columns].tolist() == pytest.approx(numbers), rung
            assert not psi[rung][b][mask[b] == 0].any(), rung


def test_conjugate_gradient_solves_what_a_direct_solver_solves():
    root = torch.randn(12, 12, generator=seeded(), dtype=torch.float64)
    A = root @ root.T + 0.1 * torch.eye(12)
    b = torch.randn(12, generator=seeded(1), dtype=torch.float64)
    exact = torch.linalg.solve(A, b)

    def solution(b, steps):
        return policy_gradient.conjugate_gradient(lambda v: A @ v, b, steps)

    torch.testing.assert_close(solution(b, 20), exact, atol=1e-6, rtol=1e-6)
    errors = [solution(b, steps) - exact for steps in range(13)]
    norms = [e @ A @ e for e in errors]                        # in the norm of A they always fall
    assert all(after < before for before, after in zip(norms, norms[1:]))
    assert torch.equal(solution(0 * b, 10), 0 * b)


def test_mean_kl_is_the_mean_over_response_tokens_of_the_whole_distributions():
    old, new = small_gpt(seed=0), small_gpt(seed=1)
    inputs, targets, mask = data.collate(PROMPTS, RESPONSES)
    p, q = (policy_gradient.token_distributions(gpt, inputs, mask, 0.7) for gpt in (old, new))
    log_p, log_q = ((gpt(inputs).double() / 0.7).log_softmax(-1) for gpt in (old, new))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)               # (B, T)
    wanted = sum(kl[b, t].item() for b, t in mask.nonzero()) / mask.sum().item()
    assert policy_gradient.mean_kl(p, q).item() == pytest.approx(wanted, rel=1e-4)
    chosen = p.gather(1, targets[mask > 0][:, None]).squeeze(1)
    logprobs = token_logprobs(old, inputs, targets, mask, 0.7)
    torch.testing.assert_close(chosen, logprobs[mask > 0])


def test_gradient_noise_is_the_trace_of_the_covariance_and_the_square_of_the_mean():
    generator = seeded()
    mean = torch.linspace(-1, 1, 50)
    std = torch.linspace(0.1, 2, 50)
    gradients = (mean + std * torch.randn(50, generator=generator) for _ in range(4000))
    variances, signal = policy_gradient.gradient_noise(gradients)
    trace = (std ** 2).sum().item()
    error = variances.std().item() / 2000 ** 0.5
    assert len(variances) == 2000
    assert abs(variances.mean().item() - trace) < 4 * error < 0.05 * trace
    assert signal == pytest.approx((mean ** 2).sum().item(), rel=0.05)

    pairs = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    variances, signal = policy_gradient.gradient_noise(iter(pairs))
    assert variances.tolist() == [10, 1] and signal == pytest.approx(1.5)


# --------------------------------------------------------------------------------------------------
# frontier.py, compare.py

def test_the_mixture_is_the_average_density_by_number_of_samples():
    logprobs = torch.randn(2, 3, 4, generator=seeded(), dtype=torch.float64)
    density = 0.25 * logprobs[0].exp() + 0.75 * logprobs[1].exp()
    torch.testing.assert_close(frontier.mixture_logprobs(logprobs, [1, 3]), density.log())


def exactly(listing):
    """Rewards and log weights of the listing as uniform samples, whose means are exact"""
    return listing.scores.double(), listing.ref + math.log(len(listing.responses))


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 5.0])
def test_the_optimum_equals_enumeration(listing, beta):
    scores = listing.scores.double()
    best = (listing.ref + scores / beta).softmax(1)
    kl = (best * (best.log() - listing.ref)).sum(1).mean().item()
    reward = (best * scores).sum(1).mean().item()
    point = frontier.optimum(*exactly(listing), beta, values=scores ** 2)
    assert point["reward"].item() == pytest.approx(reward)
    assert point["kl"].item() == pytest.approx(kl, abs=1e-5)
    assert point["objective"].item() == pytest.approx(reward - beta * kl, abs=1e-5)
    assert point["value"].item() == pytest.approx((best * scores ** 2).sum(1).mean().item())
    torch.testing.assert_close(point["ess"], 1 / (best ** 2).sum(1))


def test_the_frontier_is_reached_by_pi_star_and_by_nobody_passed(listing):
    scores = listing.scores.double()
    for beta in (0.3, 1.0, 3.0):
        point = frontier.optimum(*exactly(listing), beta)
        best, at = frontier.best_reward(*exactly(listing), point["kl"])
        assert best.item() == pytest.approx(point["reward"].item(), abs=1e-3)
        assert at["beta"] == pytest.approx(beta, rel=0.04)
    for seed in range(30):                                     # various policies, some near pi*
        noise = torch.randn(2, 40, generator=seeded(seed)) * (seed % 5) / 4
        p = (listing.ref + (seed % 3) * scores + noise).softmax(1)
        kl = (p * (p.log() - listing.ref)).sum(1).mean()
        best, _ = frontier.best_reward(*exactly(listing), kl)
        assert (p * scores).sum(1).mean() <= best + 1e-6


def drawn_samples(listing, policies, counts):
    """Samples of SFT, A, B, .., given as tables of probabilities, as collect would make them"""
    draws = [torch.multinomial(p, n, replacement=True, generator=seeded(k))
             for k, (p, n) in enumerate(zip(policies, counts))]
    drawn = torch.cat(draws, dim=1)                            # (P, N)
    scores = listing.scores.double().gather(1, drawn)
    one = torch.ones(drawn.shape)
    texts = [[" Skip it."] * drawn.shape[1]] * 2
    return compare.Samples(
        ["SFT", "A", "B"][:len(counts)], counts, [TINY_PROMPT] * 2, texts, scores,
        logprobs=torch.stack([p.log().double().gather(1, drawn) for p in policies]),
        entropy=one, lengths=one, finished=one, gold=scores, grammatical=one)


def test_z_is_estimated_without_bias_and_its_log_from_below(listing):
    beta = 0.5
    z = (listing.ref + listing.scores / beta).logsumexp(1).exp()            # (P,)
    samples = drawn_samples(listing, [listing.ref.exp(), listing.best], [6000, 2000])
    rows = torch.cat([torch.arange(6000).view(2000, 3), torch.arange(6000, 8000).view(2000, 1)], 1)
    rewards = samples.scores / beta
    # 2000 estimates, each from three samples of the reference and one of pi*: (P, 2000)
    each = torch.exp(samples.log_weights() + rewards)[:, rows].mean(-1)
    assert ((each.mean(1) - z).abs() < 4 * each.std(1) / 2000 ** 0.5).all()
    assert (each.log().mean(1) < z.log()).all()
    unweighted = torch.exp(rewards)[:, rows].mean(-1)
    error = unweighted.std(1) / 2000 ** 0.5
    assert ((unweighted.mean(1) - z).abs() > 10 * error).any()


def test_pi_star_has_the_whole_share_and_the_reference_none(listing):
    scores = listing.scores.double()
    noise = 1.5 * torch.randn(2, 40, generator=seeded())
    worse = (listing.ref + 0.5 * scores / BETA + noise).softmax(1)
    policies = [listing.ref.exp(), listing.best, worse]        # SFT, A, B
    samples = drawn_samples(listing, policies, [3000, 3000, 3000])
    limit = compare.share_of_frontier(samples, "A")
    assert limit["share"] == pytest.approx(1, abs=0.03) and limit["trusted"]
    assert compare.share_of_frontier(samples, "SFT")["share"] is None

    reached = compare.fraction_of_optimum(samples, "A", BETA)
    assert reached["fraction"] == pytest.approx(1, abs=0.03)
    assert reached["objective"] == pytest.approx(listing.objective(listing.best), abs=0.02)
    exact = listing.fraction(worse)
    reached = compare.fraction_of_optimum(samples, "B", BETA)
    assert abs(reached["fraction"] - exact) < 5 * reached["standard_error"] + 0.02 and exact < 0.9

    misfit = compare.misfit(samples, "A", "SFT", BETA)        # pi* fits everywhere
    assert misfit == pytest.approx(0, abs=1e-5)
    deviation = scores - BETA * (worse.log() - listing.ref)
    centred = deviation - (worse * deviation).sum(1, keepdim=True)
    spread = (worse * centred ** 2).sum(1).mean().sqrt().item()
    assert compare.misfit(samples, "B", "B", BETA) == pytest.approx(spread, rel=0.05)
    assert spread > 0.2

    quarter, weights = samples.every_fourth()
    assert len(quarter) == 2250 and weights.shape == (2, 2250) and quarter[750] == 3000
    objective = frontier.optimum(samples.scores[:, quarter], weights, BETA)["objective"].item()
    assert objective == pytest.approx(reached["objective"], rel=0.05)


def test_nothing_to_gain_and_too_much_kl_have_an_answer_too(listing):
    samples = drawn_samples(listing, [listing.ref.exp(), listing.best], [200, 200])
    best, _ = frontier.best_reward(samples.scores, samples.log_weights(), 500.0)
    assert best == samples.scores.amax(1).mean()
    flat = dataclasses.replace(samples, scores=torch.full_like(samples.scores, 0.7))
    assert compare.fraction_of_optimum(flat, "A", 0.3)["fraction"] is None


OWN = None                           # an objective of its own, which evaluate does not measure


@pytest.mark.parametrize("script, changes, expected", [        # rewards, beta, aims at the optimum
    (ppo, dict(kl_control="fixed", beta=0.3), ("score", 0.3, True)),
    (ppo, dict(), OWN),
    (ppo, dict(kl_control="fixed", gamma=0.9), OWN),
    (ppo, dict(kl_control="fixed", beta=0.0), OWN),
    (ppo, dict(kl_control="fixed", entropy_coef=0.1), OWN),
    (ppo, dict(kl_control="fixed", score_clip=1.0), OWN),
    (dpo, dict(labels="annotators", beta=0.2, score_clip=1.0), ("gold", 0.2, True)),
    (dpo, dict(labels="soft", rounds=3), ("score", 0.25, True)),
    (dpo, dict(loss="ipo"), OWN),
    (dpo, dict(labels="soft", missing_eos_score=None), OWN),
    (dpo, dict(label_smoothing=0.1), OWN),
    (dpo, dict(length_normalise=True), OWN),
    (dpo, dict(nll_coef=1.0), OWN),
    (grpo, dict(beta=0.1), ("score", 0.1, True)),
    (grpo, dict(beta=0.1, kl_in="loss"), ("score", 0.1, False)),
    (grpo, dict(beta=0.1, advantage="reinforce"), ("score", 0.1, False)),
    (grpo, dict(beta=0.1, advantage="reinforce", normalise="fixed"), ("score", 0.1, True)),
    (grpo, dict(beta=0.1, normalise="sequence"), ("score", 0.1, True)),
    (grpo, dict(temperature=0.7), OWN),
    (grpo, dict(beta=0.0), OWN),
    (policy_gradient, dict(rung="gae"), ("score", 0.25, True)),
    (policy_gradient, dict(gamma=0.9), OWN)])
def test_only_runs_without_an_objective_of_their_own_get_a_fraction(
        script, changes, expected, listing):
    samples = drawn_samples(listing, [listing.ref.exp(), listing.best], [20, 20])
    config = dataclasses.asdict(script.Config(**changes))
    found = evaluate.own_objective(config, samples, 0.6, evaluate.Config())
    if expected is OWN:
        assert found is None
    else:
        rewards = {"score": samples.scores, "gold": samples.gold / 0.6}[expected[0]]
        assert torch.equal(found[0], rewards) and found[1:] == expected[1:]


def random_samples(n=(4, 3), P=5, T=6):
    """Samples of two policies with random numbers in every field"""
    generator = seeded(3)
    N = sum(n)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, T, (P, N), generator=generator).double()
    return compare.Samples(
        names=["SFT", "PPO"], counts=list(n), asked=["x"] * P,
        texts=[["y"] * N] * P, scores=numbers(P, N), logprobs=numbers(2, P, N) - 3,
        entropy=numbers(P, N).abs() * lengths, lengths=lengths,
        finished=(numbers(P, N) > 0).double(), gold=numbers(P, N),
        grammatical=(numbers(P, N) > 0).double())


@pytest.mark.parametrize("name, columns", [("SFT", range(4)), ("PPO", range(4, 7))])
def test_measures_are_means_over_a_policys_own_responses(name, columns):
    samples = random_samples()
    means, errors = compare.measure(samples, name)
    k = samples.names.index(name)
    quantities = {
        "score": samples.scores, "gold": samples.gold, "eos_rate": samples.finished,
        "kl_ref": samples.logprobs[k] - samples.logprobs[0], "response_length": samples.lengths,
        "grammatical": samples.grammatical}
    assert means.keys() == {*quantities, "entropy"}
    for metric, values in quantities.items():
        by_prompt = [sum(row[i] for i in columns) / len(columns) for row in values.tolist()]
        assert means[metric] == pytest.approx(np.mean(by_prompt)), metric
        assert errors[metric] == pytest.approx(np.std(by_prompt, ddof=1) / 5 ** 0.5), metric
    entropy, tokens = samples.entropy[:, columns].sum(), samples.lengths[:, columns].sum()
    assert means["entropy"] == pytest.approx((entropy / tokens).item())      # a mean over tokens


def test_the_error_of_the_fraction_is_the_standard_error_of_j():
    """Over fresh responses to the same prompts J scatters as the formula says"""
    samples = random_samples(n=(200, 40))
    samples.logprobs[1] = samples.logprobs[0]                # KL 0, so J is the mean score
    beta = 0.5
    found = compare.fraction_of_optimum(samples, "PPO", beta)
    start = samples.scores[:, :200].mean().item()
    scores = samples.scores[:, 200:].tolist()
    variance = sum(np.var(row, ddof=1) / 40 for row in scores) / 5 ** 2      # of the mean of means
    gain = found["objective"] - start
    assert found["standard_error"] == pytest.approx(variance ** 0.5 / gain)
    assert found["fraction"] == pytest.approx((np.mean(scores) - start) / gain)


def test_the_gain_in_gold_is_in_standard_deviations_of_sfts_gold(monkeypatch):
    samples = random_samples()
    monkeypatch.setattr(compare, "collect", lambda *args: samples)
    text, results = compare.compare({"SFT": None, "PPO": None}, None, None, [[1]] * 5,
                                    ppo.Config(n_samples=4))
    sft_gold = samples.gold[:, :4].flatten().tolist()
    gain = samples.gold[:, 4:].mean().item() - np.mean(sft_gold)
    assert results["gold_gain"] == pytest.approx(gain / np.std(sft_gold))
    assert f"{results['gold_gain']:+.2f} standard" in text


def test_the_limit_table_marks_points_with_too_few_samples(listing):
    def rows(n):
        samples = drawn_samples(listing, [listing.ref.exp(), listing.best], [n, n])
        return evaluate.limit_table(samples, samples.scores, "score", [1.0, 0.1])[1:]

    few, many = rows(40), rows(100_000)
    assert few[1][0] == "0.1*"                                 # too few effective samples
    assert any("!" in by_a_quarter for _, _, by_a_quarter, *_ in few)
    assert many[0][0] == "1" and "!" not in many[0][2]
    assert many[0][1] == pytest.approx(listing.objective(listing.best), rel=0.02)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    rewards, values = torch.randn(2, 3, 7, generator=seeded(), dtype=torch.float64)
    best_rewards, their_values = [], []
    for row, other in zip(rewards.tolist(), values.tolist()):
        for subset in itertools.combinations(range(7), n):
            winner = max(subset, key=row.__getitem__)
            best_rewards.append(row[winner])
            their_values.append(other[winner])
    assert frontier.best_of_n(rewards, n).item() == pytest.approx(np.mean(best_rewards))
    assert frontier.best_of_n(rewards, n, values).item() == pytest.approx(np.mean(their_values))


def test_the_kl_of_best_of_n_is_below_its_bound(listing):
    order = listing.scores[0].argsort()
    p = listing.ref.exp()[0, order]
    for n in (2, 4, 16):
        best = torch.diff(p.cumsum(0) ** n, prepend=torch.zeros(1))         # P(it is the best)
        kl = (best * (best / p).log()).sum().item()
        assert 0 < kl < frontier.best_of_n_kl(n)


# --------------------------------------------------------------------------------------------------
# evaluate.py

def test_win_rates_count_all_pairs_of_a_prompt_and_ties_half():
    ours = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    theirs = torch.tensor([[1.0, 0.0, 3.0], [0.0, 5.0, -1.0]])
    rate, error = evaluate.win_rate(ours, theirs)
    first = (0.5 + 1 + 0 + 1 + 1 + 0) / 6                      # one prompt, six pairs
    second = (0.5 + 0 + 1) * 2 / 6
    assert rate == pytest.approx((first + second) / 2)
    assert error == pytest.approx(abs(first - second) / 2)
    assert evaluate.win_rate(theirs, ours)[0] == pytest.approx(1 - rate)


def test_elo_recovers_the_ratings_that_made_the_wins_and_keeps_an_unbeaten_player_finite():
    ratings = torch.tensor([1000.0, 1150.0, 820.0])
    p = 1 / (1 + 10 ** ((ratings[None] - ratings[:, None]) / 400))
    fitted = evaluate.elo_fit(1e6 * p.double())
    assert fitted.tolist() == pytest.approx(ratings.tolist(), abs=0.1)
    unbeaten = evaluate.elo_fit(torch.tensor([[0.0, 0.0], [20.0, 0.0]]))
    assert unbeaten.tolist() == pytest.approx([1000, 1000 + 400 * math.log10(20.5 / 0.5)])
    assert evaluate.elo_fit(torch.zeros(3, 3)).tolist() == pytest.approx([1000] * 3)
    assert evaluate.elo_fit(torch.zeros(1, 1)).tolist() == [1000]


def test_distinct_is_the_share_of_different_word_pairs():
    assert evaluate.distinct([" a b a b", "a b"]) == pytest.approx(2 / 4)
    assert evaluate.distinct([]) == 0 and evaluate.distinct(["one"]) == 0


# --------------------------------------------------------------------------------------------------
# What people copy

def move_average_example(f, x):
    """The parameters of an average, after one step towards a model"""
    mean = torch.nn.Linear(3, 2)
    model = torch.nn.Linear(3, 2)
    for p, q in zip(mean.parameters(), model.parameters()):
        p.data.fill_(x[0, 0])
        q.data.fill_(x[0, 1])
    f(mean, model, 0.9)
    return tuple(p.detach() for p in mean.parameters())


def fisher_example(f, x):
    w = x.clone().requires_grad_()
    return f((w ** 4).sum(), [w], 0.1)(x.flatten())


def trpo_example(f, x):
    """A policy over nine actions with the advantages x[0]"""
    w = torch.zeros(9, dtype=x.dtype, requires_grad=True)
    start = torch.zeros(9, dtype=x.dtype).log_softmax(0)

    def kl():
        return (start.exp() * (start - w.log_softmax(0))).sum()

    return tuple(f([w], lambda: (w.softmax(0) @ x[0], kl()), kl).values())


COPIED = {                           # a call of each function f with numbers x and their mask m
    "masked_mean": lambda f, x, m: f(x, m),
    "sequence_scores": lambda f, x, m: f(lambda tokens: tokens.double(), x, x, m),
    "sft_loss": lambda f, x, m: f(x, m),
    "preference_loss": lambda f, x, m: f(x, 2 * x),
    "token_wise_scores": lambda f, x, m: f(x, x, m, m, m, m),
    "whiten": lambda f, x, m: f(x, m),
    "kl_estimate": lambda f, x, m: f(x, 2 * x),
    "shape_rewards": lambda f, x, m: f(x[:, 0], x, 2 * x, m, 0.1),
    "gae": lambda f, x, m: f(x, x, m),
    "critic_targets": lambda f, x, m: f(x, x, x[:, 0], m),
    "policy_loss": lambda f, x, m: f(x, 2 * x, x, m),
    "kl_penalty_loss": lambda f, x, m: f(x, 2 * x, x, m, 0.1),
    "value_loss": lambda f, x, m: f(x, 2 * x, x, m),
    "explained_variance": lambda f, x, m: f(x, 2 * x, m),
    "ProportionalKL": lambda f, x, m: f(0.1, 6.0, 1e4).update(5.0, 8),
    "ThresholdKL": lambda f, x, m: f(1, 1).update(5),
    "move_average": lambda f, x, m: move_average_example(f, x),
    "sequence_logprobs": lambda f, x, m: f(x, m, True),
    "after_shared_prefix": lambda f, x, m: f(x, 2 * x, m, m),
    "dpo_loss": lambda f, x, m: f(*x.T[:4], 0.1),
    "group_advantages": lambda f, x, m: f(x[:4, 0], 2, "grpo"),
    "token_weights": lambda f, x, m: f(m, "fixed", 20),
    "grpo_loss": lambda f, x, m: f(x, 2 * x, x[:, 0], m, 0.2, 0.28),
    "policy_gradient_loss": lambda f, x, m: f(x, 2 * x, m),
    "importance_loss": lambda f, x, m: f(x, 2 * x, x, m),
    "next_values": lambda f, x, m: f(x, m),
    "plain_value": lambda f, x, m: f(x, x, m),
    "total_return": lambda f, x, m: f(x, x, m, 0.9),
    "reward_to_go": lambda f, x, m: f(x, x, m, 0.9),
    "baseline": lambda f, x, m: f(x, x, m, 0.9),
    "a2c": lambda f, x, m: f(x, x, m, 0.9),
    "conjugate_gradient": lambda f, x, m: f(lambda v: x @ (x.T @ v), x[:, 0]),
    "fisher_product": lambda f, x, m: fisher_example(f, x),
    "trpo_step": lambda f, x, m: trpo_example(f, x),
    "mean_kl": lambda f, x, m: f(x.log_softmax(1), (2 * x).log_softmax(1)),
    "gradient_noise": lambda f, x, m: f(iter(x[:4])),
    "mixture_logprobs": lambda f, x, m: f(x[None].expand(2, -1, -1), [3, 6]),
    "optimum": lambda f, x, m: tuple(f(x, m, 0.1).values()),
    "best_reward": lambda f, x, m: f(x, m, 0.5)[0],
    "best_of_n": lambda f, x, m: f(x, 3),
    "win_rate": lambda f, x, m: f(x, 2 * x),
    "elo_fit": lambda f, x, m: f((x[:, :5] ** 2).round()),
    "preference": lambda f, x, m: f(x, 2 * x),
    "agreement": lambda f, x, m: f(x, 2 * x)}
TAKES_ALONG = {                      # names that a function needs besides masked_mean
    "plain_value": ["next_values"],
    "reward_to_go": ["gae"],
    "baseline": ["reward_to_go", "gae"],
    "a2c": ["plain_value", "next_values"],
    "trpo_step": ["conjugate_gradient", "fisher_product"],
    "best_reward": ["optimum", "BETAS"],
    "preference": ["ANNOTATOR_TEMPERATURE"],
    "agreement": ["preference", "ANNOTATOR_TEMPERATURE"]}
PARTS_OF_SCRIPTS = ("token_logprobs", "generate", "add_lora", "merged", "normalisation", "main",
                    "log_prob", "share_of_frontier")


ZERO = torch.zeros(1, 3)
REFUSED = [                          # a call, and what its error says
    (lambda: reviews.gold("Tell me a joke", " no"), "Tell me a joke"),
    (lambda: data.collate([[]], [[1]]), "row 0 has an empty prompt"),
    (lambda: data.collate([[1], [1]], [[2], []]), "row 1 has an empty response"),
    (lambda: data.collate([[1]], [[1], [2]]), "1 prompts and 2 responses"),
    (lambda: data.collate([], []), "at least one"),
    (lambda: data.batch_rows(10, 11, 0, seed=1), "batch size 11 for 10 rows"),
    (lambda: small_gpt()(torch.zeros(1, 17, dtype=torch.long)), "rows of 17 tokens"),
    (lambda: generate(small_gpt(), [[1] * 13], 4, 10),
     "prompt of 13 tokens and 4 new ones exceed block_size 16"),
    (lambda: token_logprobs(small_gpt(), ZERO, ZERO, ZERO, temperature=0), "temperature 0"),
    (lambda: sequence_scores(None, ZERO, ZERO, ZERO), "row 0 has no response token"),
    (lambda: reward_model.preference_loss(ZERO, ZERO, "ipo"), "got kind 'ipo'"),
    (lambda: ppo.kl_estimate(ZERO, ZERO, "k4"), "got kind 'k4'"),
    (lambda: ppo.critic_targets(ZERO, ZERO, ZERO, ZERO, "x"), "got kind 'x'"),
    (lambda: dpo.dpo_loss(ZERO, ZERO, ZERO, ZERO, 0.1, kind="kto"), "it is sigmoid, robust"),
    (lambda: dpo.dpo_loss(ZERO, ZERO, ZERO, ZERO, 0.1, "ipo", 0.1), "it belongs to sigmoid"),
    (lambda: grpo.group_advantages(torch.zeros(7), 3),
     "got 7 scores, which is not a multiple of group_size 3"),
    (lambda: grpo.group_advantages(torch.zeros(6), 3, "mean"),
     "got kind 'mean'; it is grpo, dr_grpo, rloo or reinforce"),
    (lambda: grpo.group_advantages(torch.zeros(6), 1, "rloo"),
     "got group_size 1 with kind rloo; a group takes 2 responses or more"),
    (lambda: grpo.token_weights(ZERO, "row"), "got normalise 'row'; it is token,"),
    (lambda: frontier.best_of_n(torch.zeros(2, 7), 8), "n = 8 with 7 samples")]


@pytest.mark.parametrize("call, message", REFUSED)
def test_arguments_that_make_no_sense_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def find_original(name):
    """-> the function or constant of that name, the module that has it"""
    for module in (model, ppo, *SCRIPTS, frontier, reviews):
        if hasattr(module, name):
            return getattr(module, name), module


def pasted_source(name):
    """A function's source, or the line that sets a constant"""
    value, module = find_original(name)
    if callable(value):
        return inspect.getsource(value)
    return re.search(rf"^{name} = .*$", inspect.getsource(module), re.M).group()


def test_every_formula_of_the_table_is_pasted_or_named_as_part_of_a_script():
    names = {name for _, name, _, _ in ROW.findall(README)}
    assert names == {*COPIED, *PARTS_OF_SCRIPTS}
    quote = re.search(r"\n## Quote it\n(.*?)\n## ", README, re.S)[1]
    for name in (*PARTS_OF_SCRIPTS, *TAKES_ALONG, *itertools.chain(*TAKES_ALONG.values())):
        assert f"{name}`" in quote, name


@pytest.mark.parametrize("name", COPIED)
def test_maths_works_when_pasted_into_an_empty_file_with_masked_mean(name):
    pasted = {"torch": torch, "math": math}
    if name == "trpo_step":                                    # needs one more import
        exec("from torch.nn.attention import SDPBackend, sdpa_kernel", pasted)
    along = TAKES_ALONG.get(name, [])
    for source in ("masked_mean", *reversed(along), name):
        exec(pasted_source(source), pasted)
    if "gae" in along:
        pasted["ppo"] = types.SimpleNamespace(gae=pasted["gae"])
    x, *_, mask = ragged()
    ours = COPIED[name](pasted[name], x, mask)
    theirs = COPIED[name](find_original(name)[0], x, mask)
    if not isinstance(ours, tuple):
        ours, theirs = (ours,), (theirs,)
    for a, b in zip(ours, theirs):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_examples_in_docstrings_are_true(module):
    assert doctest.testmod(module).failed == 0


# --------------------------------------------------------------------------------------------------
# The proof: a problem so small that every response can be listed
#
# The vocabulary is 0, 1, 2 and EOS = 3. A response ends with its first EOS or after three tokens,
# which makes 1 + 3 + 36 = 40 responses. There are two prompts x, and each (x, y) has a fixed random
# score r(x, y). The policy is a GPT of one layer, pi_ref one with random weights, and beta is 1:
#
#     J(pi) = E_x E_{y ~ pi(.|x)} [r(x, y) - beta log(pi(y|x) / pi_ref(y|x))]
#     pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x),     J(pi) = J(pi*) - beta KL(pi || pi*)
#
# Each method trains the GPT with its own functions, on the whole list, every response weighted by
# its probability. There is no sampling noise, so a method that maximises J must end at pi*. Every
# other one must end at the optimum of its own objective, computed a second time on float64 tables.
# Tables are (P, N) = (2, 40), and tensors of tokens are (P N, T) = (80, 4).

BETA = 1.0


class Listing:
    """Two prompts, all their responses of up to `longest` tokens, the scores, pi_ref and pi*"""

    def __init__(self, longest=3, scale=1.0, shift=0.0):
        self.eos = 3
        self.prompts = [[0], [1, 2]]
        self.responses = []
        for n in range(1, longest + 1):
            for y in itertools.product(range(4), repeat=n):
                is_whole = y[-1] == self.eos or n == longest
                if is_whole and self.eos not in y[:-1]:
                    self.responses.append(list(y))
        P, N = len(self.prompts), len(self.responses)
        prompts = [x for x in self.prompts for _ in self.responses]
        batch = data.collate(prompts, P * self.responses)
        self.inputs, self.targets, self.mask = batch                                  # (P N, T)
        self.lengths = self.mask.sum(1).view(P, N)
        self.scores = scale * torch.randn(P, N, generator=seeded()) + shift
        self.reference = self.policy()
        self.ref_logprobs = self.token_logprobs(self.reference).detach()              # (P N, T)
        self.ref = self.ref_logprobs.sum(1).view(P, N).double()                       # log pi_ref

    @property
    def best(self):
        """pi*, a table of probabilities"""
        return (self.ref + self.scores.double() / BETA).softmax(1)

    def policy(self, seed=0, std=0.25):
        torch.manual_seed(seed)
        policy = GPT(GPTConfig(self.eos + 1, 8, n_layer=1, n_head=2, n_embd=32)).eval()
        for p in policy.parameters():
            p.data.normal_(std=std)
        return policy

    def token_logprobs(self, policy):
        return token_logprobs(policy, self.inputs, self.targets, self.mask)           # (P N, T)

    def logprobs(self, policy):
        return self.token_logprobs(policy).sum(1).view(self.scores.shape)             # (P, N)

    @torch.no_grad()
    def probabilities(self, policy):
        return self.logprobs(policy).double().exp()

    @torch.no_grad()
    def rollout(self, policy):
        """
        The list as a rollout of policy, with exact values of KL-shaped rewards -> dict of (P N, T)

        Its mask holds the response's probability in place of 1, so a mean is an expectation.
        """
        old = self.token_logprobs(policy)
        p = old.sum(1).exp()
        scores = self.scores.flatten()
        rewards = ppo.shape_rewards(scores, old, self.ref_logprobs, self.mask, BETA)
        to_go = rewards.double().flip(1).cumsum(1).flip(1)
        values = self.state_values(p.double(), to_go).float()
        return {"old_logprobs": old, "rewards": rewards, "values": values,
                "mask": self.mask * p[:, None]}

    def state_values(self, p, to_go):
        """
        V(s) = E[what is still earned | the tokens so far], by summing over the list

        p are the probabilities of the responses, to_go (P N, T) is what they earn from a column on.
        -> (P N, T), float64: the value before each response token
        """
        values = torch.zeros(self.mask.shape, dtype=torch.float64)
        for t in range(values.shape[1]):
            prefix = self.inputs[:, :t + 1]
            real = self.mask[:, t] > 0
            same = (prefix[:, None] == prefix[None]).all(2)            # (P N, P N): share a state
            weights = (same & real[:, None] & real) * p.flatten()
            values[:, t] = weights @ to_go[:, t] / weights.sum(1).clamp_min(1e-300)
        return values

    def objective(self, p):
        """J of a table of probabilities"""
        log_ratio = p.clamp_min(1e-300).log() - self.ref
        return (p * (self.scores - BETA * log_ratio)).sum(1).mean().item()

    def fraction(self, p):
        """The share of J(pi*) - J(pi_ref) that a table of probabilities reaches"""
        start = self.objective(self.ref.exp())
        return (self.objective(p) - start) / (self.objective(self.best) - start)

    def distance(self, p, q):
        """Total variation, the mean over prompts"""
        return 0.5 * (p - q).abs().sum(1).mean().item()


@pytest.fixture(scope="module")
def listing():
    return Listing()


def test_every_policy_falls_short_of_the_optimum_by_beta_kl(listing):
    """J(pi) = J(pi*) - beta KL(pi || pi*), and J(pi*) = beta E_x log Z(x)"""
    optimum = BETA * (listing.ref + listing.scores / BETA).logsumexp(1).mean().item()
    assert listing.objective(listing.best) == pytest.approx(optimum)
    for seed in range(5):
        p = listing.probabilities(listing.policy(seed, std=0.4))
        assert p.shape == (2, 40) and p.sum(1).tolist() == pytest.approx([1, 1], abs=1e-6)
        kl = (p * (p.log() - listing.best.log())).sum(1).mean().item()
        assert kl > 0.01
        assert listing.objective(p) == pytest.approx(optimum - BETA * kl, abs=1e-5)


def take_step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def descents(n, parameters, lr=4e-3, warmup=5, floor=0.005):
    """Yields, n times, a function that takes a step of Adam down a loss; the rate falls to floor"""
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    for step in range(n):
        runs.set_learning_rate(optimizer, runs.learning_rate(step, n, lr, warmup, floor))
        yield functools.partial(take_step, optimizer)


# ---- PPO, and the ladder of policy_gradient.py

def train_on_policy(listing, loss_of, updates=150, epochs=4, lr=4e-3):
    """Train by loss_of(logprobs, rollout, coef), on the whole list -> probabilities"""
    policy = listing.policy()
    penalty = ppo.ThresholdKL(1.0, 0.002)
    for descend in descents(updates, policy.parameters(), lr):
        rows = listing.rollout(policy)
        for _ in range(epochs):
            descend(loss_of(listing.token_logprobs(policy), rows, penalty.coef))
        logprobs = listing.token_logprobs(policy).detach()
        kl_old = ppo.kl_estimate(rows["old_logprobs"], logprobs, "k3")
        penalty.update(masked_mean(kl_old, rows["mask"]).item())
    return listing.probabilities(policy)


@pytest.mark.parametrize("surrogate", ["clip", "kl_penalty"])
def test_ppo_ends_at_pi_star(listing, surrogate):
    """Either surrogate of the paper, at lambda 1 and without a critic"""
    def loss_of(logprobs, rows, coef):
        old, rewards, weights = rows["old_logprobs"], rows["rewards"], rows["mask"]
        advantages, _ = ppo.gae(rewards, torch.zeros_like(rewards), weights, lam=1.0)
        advantages = ppo.whiten(advantages, weights)
        if surrogate == "clip":
            return ppo.policy_loss(logprobs, old, advantages, weights)[0]
        return ppo.kl_penalty_loss(logprobs, old, advantages, weights, coef)[0]

    p = train_on_policy(listing, loss_of)
    assert listing.distance(listing.ref.exp(), listing.best) > 0.3     # it has a long way to go
    assert listing.distance(p, listing.best) < 0.03
    assert listing.fraction(p) > 0.99


def test_ppo_on_sampled_responses_with_a_critic_ends_near_pi_star(listing):
    """The steps of ppo.main: rollout, shaped rewards, GAE by a critic, whitening, minibatches"""
    generator = seeded()
    actor = listing.policy()
    critic = ScalarGPT(actor.config, init_from=actor, zero_head=True).eval()
    cfg = dataclasses.replace(ppo.Config(), max_new_tokens=3)
    prompts = listing.prompts * 128
    score_of = {}
    for x, row in zip(listing.prompts, listing.scores.tolist()):
        score_of |= {(*x, *y): score for y, score in zip(listing.responses, row)}

    parameters = [*actor.parameters(), *critic.parameters()]
    for descend in descents(120, parameters, lr=3e-3, floor=0.01):
        inputs, targets, mask, _ = ppo.roll_out(actor, prompts, cfg, listing.eos, generator)
        responses = data.responses_of(torch.cat([inputs, targets[:, -1:]], 1), mask)
        scores = torch.tensor([score_of[*x, *y] for x, y in zip(prompts, responses)])
        with torch.no_grad():
            old = token_logprobs(actor, inputs, targets, mask)
            ref = token_logprobs(listing.reference, inputs, targets, mask)
            values = critic(inputs) * mask
        rewards = ppo.shape_rewards(scores, old, ref, mask, BETA)
        advantages, returns = ppo.gae(rewards, values, mask, lam=0.95)
        advantages = ppo.whiten(advantages, mask)
        for rows in torch.randperm(256, generator=generator).split(64):
            logprobs = token_logprobs(actor, inputs[rows], targets[rows], mask[rows])
            loss, _ = ppo.policy_loss(logprobs, old[rows], advantages[rows], mask[rows])
            critic_loss, _ = ppo.value_loss(critic(inputs[rows]), values[rows], returns[rows],
                                            mask[rows])
            descend(loss + critic_loss)

    p = listing.probabilities(actor)
    assert listing.distance(p, listing.best) < 0.08
    assert listing.fraction(p) > 0.96


def train_by_trpo(listing, updates=40):
    """Trust-region steps on the whole list, none of which leaves its region -> probabilities"""
    policy = listing.policy()
    real = listing.mask > 0
    for update in range(updates):
        rows = listing.rollout(policy)
        p = rows["mask"][real] / rows["mask"].sum()
        psi = policy_gradient.gae(rows["rewards"], rows["values"], listing.mask, 1.0, 0.9)[real]
        old = policy_gradient.token_distributions(policy, listing.inputs, listing.mask).detach()

        def measure():
            log_pi = policy_gradient.token_distributions(policy, listing.inputs, listing.mask)
            kl = ((old.exp() * (old - log_pi)).sum(-1) * p).sum()
            log_ratio = (listing.token_logprobs(policy) - rows["old_logprobs"])[real]
            return (log_ratio.exp() * psi * p).sum(), kl

        max_kl = 0.02 * runs.learning_rate(update, updates, 1.0, 5, 0.005) ** 2
        taken = policy_gradient.trpo_step(policy.parameters(), measure, lambda: measure()[1],
                                          max_kl, cg_steps=10, damping=1e-3)
        assert measure()[1].item() == pytest.approx(taken["kl"], abs=1e-7)
        assert taken["kl"] <= max_kl
    return listing.probabilities(policy)


@pytest.mark.parametrize("rung, options", [
    ("gae", dict(updates=200, epochs=1, lr=8e-3)),
    ("importance", dict(updates=140)),
    ("trpo", dict(updates=40))], ids=["gae", "importance", "trpo"])
def test_the_rungs_end_at_pi_star(listing, rung, options):
    """
    With the exact critic. gae speaks for the first six rungs, whose gradients are then equal (see
    below); clip and kl_penalty are PPO's, above.
    """
    cfg = dataclasses.replace(policy_gradient.Config(), lam=0.9)

    def loss_of(logprobs, rows, coef):
        return policy_gradient.rung_loss(rung, logprobs, rows, cfg, coef)

    if rung == "trpo":
        p = train_by_trpo(listing, **options)
    else:
        p = train_on_policy(listing, loss_of, **options)
    assert listing.distance(p, listing.best) < 0.03
    assert listing.fraction(p) > 0.98


# ---- DPO and its relatives: every ordered pair of responses, weighted by how often it is labelled

FORMULAS = {                             # each loss as a function of z, written down a second time
    "sigmoid": lambda z: torch.log1p(torch.exp(-z)),
    "robust": lambda z: torch.log1p(torch.exp(-z)),
    "ipo": lambda z: (z / BETA - 1 / (2 * BETA)) ** 2,
    "hinge": lambda z: (1 - z) * (z < 1),
    "fidelity": lambda z: 1 - (1 + torch.exp(-z)) ** -0.5,
}


def labelled_pairs(listing, flips=0.0):
    """All pairs i != j (M,), and how often an annotator who errs at a rate prefers i to j (P, M)"""
    i, j = (~torch.eye(len(listing.responses), dtype=torch.bool)).nonzero().T
    p = torch.sigmoid(listing.scores[:, i] - listing.scores[:, j]).double()
    return i, j, (1 - flips) * p + flips * (1 - p)


def train_by_dpo(listing, flips=0.0, soft=False, normalise=False, reference_free=False, counts=None,
                 steps=250, **options):
    """dpo.dpo_loss over all pairs, by Adam on the GPT -> probabilities, last loss"""
    i, j, wins = labelled_pairs(listing, flips)
    if counts is not None:
        wins = counts
    wins = wins.float().flatten()
    labelled = {"target": wins} if soft else {"weights": wins}
    lengths = listing.lengths if normalise else 1.0
    ref = listing.ref.float() / lengths
    if reference_free:
        ref = torch.zeros_like(ref)
    policy = listing.policy()
    for descend in descents(steps, policy.parameters(), warmup=10, floor=0.01):
        logprobs = listing.logprobs(policy) / lengths
        pairs = [x.flatten() for x in (logprobs[:, i], logprobs[:, j], ref[:, i], ref[:, j])]
        loss, _ = dpo.dpo_loss(*pairs, beta=BETA, **labelled, **options)
        descend(loss)
    return listing.probabilities(policy), loss.item()


def dpo_optimum(listing, flips=0.0, normalise=False, reference_free=False, kind="sigmoid",
                label_smoothing=0.0, margin=0.0):
    """The same objective in float64 tables, from FORMULAS, by L-BFGS -> probabilities, loss"""
    i, j, wins = labelled_pairs(listing, flips)
    formula = FORMULAS[kind]
    lengths = listing.lengths.double() if normalise else 1.0
    ref = 0.0 if reference_free else listing.ref / lengths
    table = listing.ref.clone().requires_grad_()

    def objective():
        implied = BETA * (table.log_softmax(1) / lengths - ref)        # the implied reward
        z = implied[:, i] - implied[:, j] - margin
        e = label_smoothing
        if kind == "robust":
            losses = ((1 - e) * formula(z) - e * formula(-z)) / (1 - 2 * e)
        else:
            losses = (1 - e) * formula(z) + e * formula(-z)
        return (wins * losses).sum() / wins.sum()

    def closure():
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    if kind == "hinge":                  # it has corners: many small steps instead
        for descend in descents(3000, [table], lr=0.05, warmup=0, floor=0):
            descend(objective())
    else:
        optimizer = torch.optim.LBFGS(
            [table], max_iter=300, history_size=50, tolerance_grad=1e-10, tolerance_change=1e-14,
            line_search_fn="strong_wolfe")
        optimizer.step(closure)
    return table.detach().softmax(1), objective().item()


@pytest.mark.parametrize("options", [
    pytest.param(dict(), id="sigmoid"),
    pytest.param(dict(kind="robust", label_smoothing=0.2, flips=0.2), id="robust"),
    pytest.param(dict(kind="fidelity", soft=True), id="fidelity soft"),
    pytest.param(dict(kind="sigmoid", soft=True), id="sigmoid soft")])
def test_dpo_ends_at_pi_star(listing, options):
    p, _ = train_by_dpo(listing, **options)
    assert listing.distance(p, listing.best) < 0.02
    assert listing.fraction(p) > 0.998
    if "soft" not in options:
        optimum, _ = dpo_optimum(listing, **options)
        assert listing.distance(optimum, listing.best) < 1e-3


@pytest.mark.parametrize("options", [
    pytest.param(dict(kind="sigmoid", margin=0.5), id="margin"),
    pytest.param(dict(kind="ipo"), id="ipo"),
    pytest.param(dict(kind="fidelity"), id="fidelity"),
    pytest.param(dict(flips=0.2), id="flipped"),
    pytest.param(dict(normalise=True), id="normalised"),
    pytest.param(dict(label_smoothing=0.2), id="cDPO"),
    pytest.param(dict(label_smoothing=0.1, flips=0.1), id="cDPO flipped"),
    pytest.param(dict(kind="robust", label_smoothing=0.1, flips=0.2), id="robust, wrong rate")])
def test_every_other_loss_ends_at_the_optimum_of_its_own_objective(listing, options):
    p, loss = train_by_dpo(listing, **options, steps=500)
    optimum, least = dpo_optimum(listing, **options)
    assert least - 1e-5 < loss < least + 5e-4
    assert listing.distance(p, optimum) < 0.02
    assert listing.distance(optimum, listing.best) > 0.03      # its own objective is not J


@pytest.mark.parametrize("options", [
    pytest.param(dict(kind="hinge"), id="hinge"),
    pytest.param(dict(normalise=True, reference_free=True, margin=0.3), id="simpo")])
def test_hinge_and_simpo_reach_the_least_value_of_their_own_objectives(listing, options):
    _, loss = train_by_dpo(listing, **options, steps=600)
    _, least = dpo_optimum(listing, **options)
    assert abs(loss - least) < 3e-3


def test_hard_labels_halve_the_beta_of_the_fidelity_loss(listing):
    optimum, _ = dpo_optimum(listing, kind="fidelity")
    at_half_beta = (listing.ref + listing.scores.double() / (BETA / 2)).softmax(1)
    assert listing.distance(optimum, at_half_beta) < 1e-3


FLIPPED = {                              # a loss, told the rate of flipped labels if it can use it
    "sigmoid": lambda rate: dict(),
    "cDPO": lambda rate: dict(label_smoothing=rate),
    "robust": lambda rate: dict(kind="robust", label_smoothing=rate),
    "fidelity": lambda rate: dict(kind="fidelity"),
}


def test_only_robust_keeps_its_optimum_when_labels_are_flipped(listing):
    fractions = {}
    for name, options_at in FLIPPED.items():
        optimum, _ = dpo_optimum(listing, flips=0.2, **options_at(0.2))
        fractions[name] = listing.fraction(optimum)
    assert fractions["robust"] > 0.999
    assert fractions["robust"] > fractions["sigmoid"] + 0.05 > fractions["cDPO"] + 0.1
    clean, _ = dpo_optimum(listing, kind="fidelity")           # overshoots, and flips temper it
    assert listing.fraction(clean) < fractions["fidelity"] - 0.05


def train_on_drawn_labels(listing, rate, options, n, seed):
    """DPO on n drawn labels, of which a share is flipped -> probabilities"""
    _, _, wins = labelled_pairs(listing, rate)
    drawn = torch.multinomial(wins.flatten(), n, replacement=True, generator=seeded(seed))
    counts = torch.bincount(drawn, minlength=wins.numel()).view_as(wins).double()
    return train_by_dpo(listing, counts=counts, **options)[0]


def draw_flips(path, n=20000, seeds=3):
    """DPO on n drawn labels, some of them flipped -> a picture, and its numbers as a table"""
    listing = Listing()
    rates = [0.0, 0.1, 0.2, 0.3]
    rows = [["loss", "flipped", "fraction of the optimum", "its own optimum's",
             "distance to that, TV"]]
    figure, axes = reports.subplots(1, 2, figsize=(9.5, 3.8))
    for (name, options_at), style in zip(FLIPPED.items(), ("o-", "s--", "^-.", "D:")):
        fractions, distances = [], []                          # a rate's (seeds,)
        for rate in rates:
            optimum, _ = dpo_optimum(listing, flips=rate, **options_at(rate))
            reached = [train_on_drawn_labels(listing, rate, options_at(rate), n, seed)
                       for seed in range(seeds)]
            fractions.append(torch.tensor([listing.fraction(p) for p in reached]))
            distances.append(torch.tensor([listing.distance(p, optimum) for p in reached]))
            rows.append([name, f"{rate:.0%}", fractions[-1].mean().item(),
                         listing.fraction(optimum), distances[-1].mean().item()])
        for axis, values in zip(axes, (fractions, distances)):
            axis.errorbar([100 * rate for rate in rates], [v.mean() for v in values],
                          [v.std() for v in values], fmt=style, color="0.15",
                          markerfacecolor="0.75", capsize=2, linewidth=1.1, label=name)
    axes[0].set(ylabel="fraction of the optimum reached")
    axes[1].set(ylabel="total variation to the loss's own optimum")
    for axis in axes:
        axis.set(xlabel="flipped labels (%)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return reports.table(rows, markdown=True)


# ---- GRPO and its relatives: every group of two, weighted by how often it is sampled

def expected_advantages(rewards, p, kind):
    """A response's mean advantage over its partner in a group of two: (P, N), (P, N) -> (P, N)"""
    P, N = rewards.shape
    ours = rewards[:, :, None].expand(P, N, N)
    partner = rewards[:, None, :].expand(P, N, N)
    groups = torch.stack([ours, partner], dim=-1)                               # (P, N, N, 2)
    advantages = grpo.group_advantages(groups.flatten(), 2, kind).view(P, N, N, 2)[..., 0]
    return (advantages * p[:, None, :]).sum(2)


def train_by_grpo(listing, advantage, normalise, kl_in="reward", updates=150, epochs=4):
    """GRPO with all groups of two as its batch -> probabilities"""
    P, N = listing.scores.shape
    policy = listing.policy()
    for descend in descents(updates, policy.parameters()):
        old = listing.token_logprobs(policy).detach()
        p = old.sum(1).exp().view(P, N)
        rewards = listing.scores
        if kl_in == "reward":
            kl_ref = ppo.kl_estimate(old, listing.ref_logprobs).sum(1).view(P, N)
            rewards = rewards - BETA * kl_ref
        advantages = expected_advantages(rewards, p, advantage).flatten()
        weights = grpo.token_weights(listing.mask, normalise, 3)               # a row counts 1 / N
        weights = N * p.view(-1, 1) * weights                                  # and now p
        for _ in range(epochs):
            logprobs = listing.token_logprobs(policy)
            loss, _ = grpo.grpo_loss(logprobs, old, advantages, weights)
            if kl_in == "loss":
                kl_ref = ppo.kl_estimate(logprobs, listing.ref_logprobs, "k3")
                loss = loss + BETA * (weights * kl_ref).sum()
            descend(loss)
    return listing.probabilities(policy)


@pytest.mark.parametrize("advantage, normalise", [
    ("grpo", "token"),
    ("grpo", "sequence"),
    ("dr_grpo", "fixed"),
    ("rloo", "token")])
def test_every_group_advantage_ends_at_pi_star_with_the_kl_in_the_reward(
        listing, advantage, normalise):
    p = train_by_grpo(listing, advantage, normalise)
    assert listing.distance(p, listing.best) < 0.03
    assert listing.fraction(p) > 0.97


def test_a_constant_reward_misleads_reinforce_only_under_sequence_weights(listing):
    """
    A constant added to every score does not change pi*, but the advantages of reinforce at pi* are
    then beta log Z(x) and not 0. That is harmless because E[grad log pi] = 0. Weights of 1 / length
    break it: E[grad log pi / length] is not 0. A baseline removes the constant.
    """
    shifted = Listing(shift=4)
    assert shifted.distance(shifted.best, listing.best) < 1e-6

    def error(advantage, normalise):
        return shifted.distance(train_by_grpo(shifted, advantage, normalise), shifted.best)

    assert error("reinforce", "fixed") < 0.06
    assert error("reinforce", "sequence") > 0.3
    assert error("rloo", "sequence") < 0.03


def test_at_pi_star_every_advantage_with_a_baseline_is_zero(listing):
    """r - beta log(pi* / pi_ref) = beta log Z(x) for every y, so there is no noise either."""
    rewards = listing.scores.double() - BETA * (listing.best.log() - listing.ref)
    assert rewards.std(1).max() < 1e-9
    for kind in ("dr_grpo", "rloo"):
        assert grpo.group_advantages(rewards.flatten(), 40, kind).abs().max() < 1e-9


def at_rest(ref, Q, beta):
    """
    Where GRPO comes to rest in a state, with the KL in the loss: (.., V) x 2 -> pi (.., V), E Q

    The loss pulls by Q(s, a), the mean advantage of the responses that continue with a, and by the
    gradient of KL(pi_ref || pi). At rest
        pi (Q - E Q) + beta (pi_ref - pi) = 0,  so  pi(a|s) = beta pi_ref(a|s) / (lambda - Q(s, a)),
    where lambda makes pi sum to 1. It is found by bisection. ref may be any multiple of pi_ref.
    """
    ref = beta * ref / ref.sum(-1, keepdim=True)
    low = Q.max(-1, keepdim=True).values
    high = low + beta
    for _ in range(60):
        middle = (low + high) / 2
        too_low = (ref / (middle - Q)).sum(-1, keepdim=True) > 1
        low = torch.where(too_low, middle, low)
        high = torch.where(too_low, high, middle)
    pi = ref / (high - Q)
    return pi, (pi * Q).sum(-1)


def rest_of_tree(listing, advantages, beta):
    """The same for whole responses, from the last token back: (P, N) -> probabilities"""
    def levels(table):
        """A table's responses of one, two and three tokens -> (P, 1), (P, 3, 1), (P, 3, 3, 4)"""
        one, two, three = table.split([1, 3, 36], dim=1)
        return one, two[..., None], three.view(-1, 3, 3, 4)

    def with_eos(others, eos):
        return torch.cat([others, eos], -1)                                    # EOS is token 3

    ref_1, ref_2, ref_3 = levels(listing.ref.exp())
    Q_1, Q_2, Q_3 = levels(advantages)
    third, value_3 = at_rest(ref_3, Q_3, beta)
    ref_2 = with_eos(ref_3.sum(-1), ref_2)
    second, value_2 = at_rest(ref_2, with_eos(value_3, Q_2), beta)
    first, _ = at_rest(with_eos(ref_2.sum(-1), ref_1), with_eos(value_2, Q_1), beta)
    two = first[:, :3, None] * second                                          # (P, 3, 4)
    three = two[..., :3, None] * third                                         # (P, 3, 3, 4)
    return torch.cat([first[:, 3:], two[..., 3], three.flatten(1)], dim=1)


def grpo_fixed_point(listing, kind, beta=BETA):
    """Where a policy rests under an advantage; grpo's depends on the policy, so it is iterated."""
    scores = listing.scores.double()
    if kind == "rloo":
        return rest_of_tree(listing, scores, beta)
    if kind == "dr_grpo":                                      # (r - r') / 2, up to a constant
        return rest_of_tree(listing, scores / 2, beta)
    signs = (scores[:, :, None] - scores[:, None]).sign() / math.sqrt(2)       # (r - mean) / std
    p = listing.ref.exp()
    for _ in range(40):
        pi = rest_of_tree(listing, (signs * p[:, None]).sum(2), beta)
        p = (p + pi) / 2
    return pi


@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo", "rloo"])
def test_with_the_kl_in_the_loss_each_advantage_ends_at_its_own_fixed_point(listing, advantage):
    rest = grpo_fixed_point(listing, advantage)
    assert rest.sum(1).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert listing.distance(rest, listing.best) > 0.05                         # it is not pi*
    p = train_by_grpo(listing, advantage, "fixed", kl_in="loss")
    assert listing.distance(p, rest) < 0.03 < listing.distance(p, listing.best)


def test_dr_grpo_doubles_beta_and_grpo_ignores_the_scale_of_the_reward(listing):
    """In groups of two, with the KL in the loss. grpo divides by the standard deviation."""
    doubled = grpo_fixed_point(listing, "rloo", 2 * BETA)
    assert listing.distance(grpo_fixed_point(listing, "dr_grpo"), doubled) < 1e-6
    louder = Listing(scale=10)

    def shift(kind):
        return listing.distance(grpo_fixed_point(louder, kind), grpo_fixed_point(listing, kind))

    assert shift("grpo") < 1e-6
    assert shift("rloo") > 0.1


# ---- Gradients, each against the exact gradient of J

def flat_gradient(loss, policy):
    gradients = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in gradients]).double()


def exact_gradient(listing, policy):
    """grad J, differentiated through the probabilities of all responses"""
    logprobs = listing.logprobs(policy)
    rewards = listing.scores - BETA * (logprobs - listing.ref.float())
    return flat_gradient((logprobs.exp() * rewards).sum(1).mean(), policy)


def is_close(ours, exact, within=1e-4):
    """Whether two gradients differ by less than a share of the second one's norm"""
    return (ours - exact).norm() < within * exact.norm()


EARNED = ["total_return", "reward_to_go", "baseline"]          # rungs that add up earned rewards


@pytest.mark.parametrize("critic, lam, unbiased", [
    ("exact", 0.6, policy_gradient.LADDER),
    ("wrong", 0.6, EARNED),
    ("wrong", 1.0, [*EARNED, "gae", "importance", "clip", "kl_penalty", "trpo"])])
def test_the_expected_gradients_of_the_rungs_are_one_where_theory_says_so(
        listing, critic, lam, unbiased):
    """
    With the exact critic every rung has the gradient - grad J / E[length]. With a wrong critic only
    those keep it that add up rewards that were earned, as gae and what builds on it do at lambda 1.
    """
    policy = listing.policy(seed=3)
    rows = listing.rollout(policy)
    if critic == "wrong":
        rows["values"] = small_scalar()(listing.inputs).detach() * listing.mask
    exact = exact_gradient(listing, policy) / (rows["mask"].sum().item() / 2)
    logprobs = listing.token_logprobs(policy)
    cfg = dataclasses.replace(policy_gradient.Config(), lam=lam)
    for rung in policy_gradient.LADDER:
        loss = policy_gradient.rung_loss(rung, logprobs, rows, cfg, coef=1.0)
        gradient = flat_gradient(loss, policy)
        if rung in unbiased:
            assert is_close(gradient, -exact), rung
        else:
            assert not is_close(gradient, -exact, within=0.05), rung
    too_early = policy_gradient.policy_gradient_loss(logprobs, rows["values"], rows["mask"])
    assert flat_gradient(too_early, policy).norm() < 1e-4 * exact.norm()       # V_t, not V_{t+1}


def test_what_each_rung_does_to_the_variance_of_one_response(listing):
    """
    Exact, with the exact critic. The policy is not the reference, so the KL already paid makes the
    total return smaller than what is still to come.
    """
    policy = listing.policy(seed=3)
    rows = listing.rollout(policy)
    p = rows["old_logprobs"].double().sum(1).exp() / 2                         # (P N,)
    variance = {}
    for rung, psi_of in policy_gradient.PSI.items():
        psi = psi_of(rows["rewards"], rows["values"], listing.mask, 1.0, 0.6)
        losses = (listing.token_logprobs(policy) * psi).sum(1)
        gradients = torch.stack([flat_gradient(loss, policy) for loss in losses])       # (P N, D)
        variance[rung] = ((p @ gradients ** 2).sum() - ((p @ gradients) ** 2).sum()).item()
    assert variance["a2c"] < variance["gae"] < variance["baseline"] < variance["reward_to_go"]
    assert variance["baseline"] < variance["total_return"]
    assert variance["a2c"] < variance["plain_value"]


def test_the_bias_of_the_token_mean_falls_as_one_over_the_batch_size(listing):
    """
    The bias is E[sum f / sum length] - E[f] / E[length], where f is a row's part of the gradient.
    It is exact at every batch size B: given the total length L of the other rows, which is
    independent of row 1, the first term is B E[f_1 / (length_1 + L)].
    """
    policy = listing.policy(seed=3)
    rows = listing.rollout(policy)
    rewards = rows["rewards"]
    advantages, _ = ppo.gae(rewards, torch.zeros_like(rewards), listing.mask, lam=1.0)
    direction = exact_gradient(listing, policy)
    row_losses = (listing.token_logprobs(policy) * advantages).sum(1)
    f = torch.stack([flat_gradient(loss, policy) @ direction for loss in row_losses])   # (P N,)
    p = rows["old_logprobs"].double().sum(1).exp() / 2
    lengths = listing.lengths.flatten().long()
    limit = (p @ f) / (p @ lengths.double())

    one = torch.zeros(4, dtype=torch.float64).index_add(0, lengths, p)         # P(length of a row)
    others = torch.ones(1, dtype=torch.float64)                                # P(L), of B - 1 rows
    bias = {}
    for B in range(1, 129):
        total = lengths[:, None] + torch.arange(len(others))
        bias[B] = (B * ((f * p)[:, None] * others / total).sum() - limit).item()
        shifts = [torch.nn.functional.pad(others * q, (n, 3 - n)) for n, q in enumerate(one)]
        others = sum(shifts)

    pairs = (f[:, None] + f) / (lengths[:, None] + lengths)      # by plain enumeration, as a check
    assert bias[2] == pytest.approx((p @ pairs @ p - limit).item())
    assert abs(bias[1]) > 0.01 * abs(limit)
    assert 128 * bias[128] == pytest.approx(64 * bias[64], rel=0.02)
    assert abs(bias[128]) < abs(bias[1]) / 50


def test_the_expected_gradient_of_log_pi_is_zero(listing):
    policy = listing.policy(seed=3)
    logprobs = listing.logprobs(policy)
    expected = logprobs.detach().exp() * logprobs
    assert flat_gradient(expected.sum(), policy).norm() < 1e-5
    assert flat_gradient(expected[:, :20].sum(), policy).norm() > 1e-2         # half of the list


def test_performance_difference_lemma(listing):
    """J(pi') - J(pi) = E_{y ~ pi'} sum_t A_pi(s_t, a_t), A by ppo.gae at lambda 0 with exact V"""
    tables = [listing.probabilities(listing.policy(seed, std=0.4)) for seed in (1, 2)]
    old, new = [p / p.sum(1, keepdim=True) for p in tables]
    zeros = torch.zeros(80, 4, dtype=torch.float64)
    scores = listing.scores.flatten().double()
    rewards = ppo.shape_rewards(scores, zeros, zeros, listing.mask, beta=0.0)
    values = listing.state_values(old, scores[:, None].expand_as(zeros))
    advantages, _ = ppo.gae(rewards, values, listing.mask, lam=0.0)
    gains = advantages.sum(1)                                                  # (P N,)
    difference = ((new - old) * listing.scores).sum().item()
    assert abs(difference) > 0.1
    assert (new.flatten() @ gains).item() == pytest.approx(difference, abs=1e-9)
    assert (old.flatten() @ gains).item() == pytest.approx(0, abs=1e-9)


def test_importance_sampling_is_unbiased_and_noisier_the_wider_its_ratios(listing):
    p = listing.probabilities(listing.policy(seed=1))
    p = p / p.sum(1, keepdim=True)
    rewards = listing.scores.double()
    spreads, variances = [], []
    for step in (0.0, 0.25, 0.5, 0.75, 1.0):                                   # from pi to pi*
        q = (p.log() * (1 - step) + listing.best.log() * step).softmax(1)
        columns = [x.view(-1, 1) for x in (q.log(), p.log(), rewards, p)]
        loss, _ = ppo.policy_loss(*columns, clip_eps=1e9)                      # - E_p[q / p r]
        mean = (q * rewards).sum().item() / 2
        assert -loss.item() == pytest.approx(mean, abs=1e-9)
        spreads.append((q / p).std().item())
        variances.append((p * (q / p * rewards) ** 2).sum().item() / 2 - mean ** 2)
    assert spreads == sorted(spreads) and spreads[-1] > 1
    assert variances == sorted(variances) and variances[-1] > 3 * variances[0]


@pytest.mark.parametrize("longest", [1, 2])
def test_values_and_gradients_of_the_kl_estimates_k1_k2_and_k3(longest):
    """
              mean over sampled responses     gradient as a loss, with the samples held fixed
        k1    KL(pi, ref)                     zero
        k2    E[d^2] / 2, biased              of KL(pi, ref), summed over the visited states
        k3    KL(pi, ref)                     of KL(ref, pi), summed over the visited states
    """
    listing = Listing(longest)
    policy = listing.policy(seed=3)
    logprobs = listing.token_logprobs(policy)
    p = logprobs.detach().double().sum(1, keepdim=True).exp()                  # (P N, 1)
    d = (logprobs - listing.ref_logprobs).detach().double() * listing.mask
    true_kl = (p * d).sum().item()
    means = {kind: (p * ppo.kl_estimate(logprobs, listing.ref_logprobs, kind)).sum()
             for kind in ("k1", "k2", "k3")}
    assert true_kl > 0.1
    assert means["k1"].item() == pytest.approx(true_kl, rel=1e-4)
    assert means["k3"].item() == pytest.approx(true_kl, rel=1e-4)
    assert means["k2"].item() == pytest.approx((p * d ** 2).sum().item() / 2, rel=1e-4)
    assert means["k2"].item() != pytest.approx(true_kl, rel=0.02)

    # The KLs of the token distributions, each state weighted by how often pi visits it
    log_pi = policy(listing.inputs).log_softmax(-1)                            # (P N, T, V)
    log_ref = listing.reference(listing.inputs).log_softmax(-1).detach()
    visits = (p * listing.mask).float()                                        # rows share states
    pi_to_ref = (log_pi.exp() * (log_pi - log_ref)).sum(-1)                    # (P N, T)
    ref_to_pi = (log_ref.exp() * (log_ref - log_pi)).sum(-1)
    forward = flat_gradient((visits * pi_to_ref).sum(), policy)
    backward = flat_gradient((visits * ref_to_pi).sum(), policy)
    assert flat_gradient(means["k1"], policy).norm() < 1e-4 * forward.norm()
    assert is_close(flat_gradient(means["k2"], policy), forward, within=1e-3)
    assert is_close(flat_gradient(means["k3"], policy), backward, within=1e-3)
    assert not is_close(backward, forward, within=0.1)                         # they do differ

    # The gradient of the KL of whole responses also counts how pi changes the visits themselves
    whole = (logprobs.sum(1).exp() * (logprobs - listing.ref_logprobs).sum(1)).sum()
    gap = (flat_gradient(whole, policy) - forward).norm() / forward.norm()
    if longest == 1:
        assert gap < 1e-3
    else:
        assert gap > 0.05


def test_group_advantages_have_the_exact_gradient_a_share_of_it_or_tilt_it(listing):
    """
    Over all groups of G = 2, on policy. rloo and reinforce have exactly - grad J. dr_grpo subtracts
    a mean that includes the response itself, which leaves (G - 1) / G of the gradient. grpo turns
    it: rare gains count as much as large ones.
    """
    policy = listing.policy(seed=3)
    exact = exact_gradient(listing, policy)
    logprobs = listing.token_logprobs(policy)
    old = logprobs.detach()
    p = old.sum(1).exp().view(2, -1)
    kl_ref = ppo.kl_estimate(old, listing.ref_logprobs).sum(1).view(2, -1)
    weights = listing.mask * p.view(-1, 1) / 2
    gradients = {}
    for kind in ("grpo", "dr_grpo", "rloo", "reinforce"):
        advantages = expected_advantages(listing.scores - BETA * kl_ref, p, kind).flatten()
        loss, _ = grpo.grpo_loss(logprobs, old, advantages, weights)
        gradients[kind] = flat_gradient(loss, policy)
    assert is_close(gradients["rloo"], -exact)
    assert is_close(gradients["reinforce"], -exact)
    assert is_close(gradients["dr_grpo"], -0.5 * exact)
    assert 0.5 < torch.cosine_similarity(gradients["grpo"], -exact, dim=0) < 0.995


def test_the_fisher_product_is_the_mean_outer_product_of_the_gradients_of_log_pi():
    gpt = small_gpt()
    inputs, _, mask = data.collate(PROMPTS[:2], RESPONSES[:2])
    parameters = [gpt.transformer.h[1].attn.c_attn.weight, gpt.transformer.ln_f.weight]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        log_pi = policy_gradient.token_distributions(gpt, inputs, mask)        # (N, V)
        kl = policy_gradient.mean_kl(log_pi.detach(), log_pi)
        product = policy_gradient.fisher_product(kl, parameters, damping=0.3)
    v = torch.randn(sum(p.numel() for p in parameters), generator=seeded())
    wanted = 0.3 * v
    for log_p in log_pi.flatten():
        gradients = torch.autograd.grad(log_p, parameters, retain_graph=True)
        g = torch.cat([x.flatten() for x in gradients])
        wanted = wanted + log_p.exp().item() * (g @ v) * g / len(log_pi)
    torch.testing.assert_close(product(v), wanted, atol=1e-4 * wanted.norm().item(), rtol=0)


@pytest.mark.parametrize("max_kl", [1e-4, 1e-2, 0.3])
def test_a_trpo_step_gains_within_its_bound_and_is_not_taken_where_nothing_is_gained(max_kl):
    gpt = small_gpt()
    inputs, targets, mask = data.collate(PROMPTS, RESPONSES)
    psi = torch.randn(mask.shape, generator=seeded())
    old = token_logprobs(gpt, inputs, targets, mask).detach()
    old_log_pi = policy_gradient.token_distributions(gpt, inputs, mask).detach()
    start = copy.deepcopy(gpt.state_dict())

    def measure():
        logprobs = token_logprobs(gpt, inputs, targets, mask)
        log_pi = policy_gradient.token_distributions(gpt, inputs, mask)
        objective = -policy_gradient.importance_loss(logprobs, old, psi, mask)
        return objective, policy_gradient.mean_kl(old_log_pi, log_pi)

    def fisher_kl():
        return measure()[1]

    before = measure()[0].item()
    taken = policy_gradient.trpo_step(gpt.parameters(), measure, fisher_kl, max_kl, damping=1e-3)
    objective, kl = (x.item() for x in measure())
    assert kl == pytest.approx(taken["kl"], rel=1e-3)
    assert max_kl / 20 < kl <= max_kl
    assert objective == pytest.approx(before + taken["gain"], abs=1e-6)
    assert objective > before
    if max_kl == 1e-4:                           # second order is exact enough for a short step
        assert kl > 2e-5
        assert taken["halvings"] == (kl < 5e-5)

    gpt.load_state_dict(start)
    calls = []

    def measure_worse():                         # after the first call, everything looks worse
        objective, kl = measure()
        calls.append(objective)
        return objective - float(len(calls) > 1), kl

    taken = policy_gradient.trpo_step(gpt.parameters(), measure_worse, fisher_kl, max_kl)
    assert taken.pop("grad_norm") > 0
    assert taken == {"kl": 0.0, "gain": 0.0, "halvings": 10}
    assert_same_bits(dict(gpt.state_dict()), dict(start))


# ---- A decision process without language: two states, two actions, discount 0.9

GAMMA = 0.9
NEXT_STATE = torch.tensor([[[1.0, 0.0], [0.2, 0.8]],
                           [[0.8, 0.2], [0.1, 0.9]]], dtype=torch.float64)     # P(s' | s, a)
REWARD = torch.tensor([[1.0, 0.0], [1.5, 2.0]], dtype=torch.float64)           # R(s, a)
START = torch.tensor([0.5, 0.5], dtype=torch.float64)


def bellman_matrix(policy):
    """I - gamma P_pi"""
    return torch.eye(2) - GAMMA * torch.einsum("sa,sat->st", policy, NEXT_STATE)


def exact_values(policy):
    """V (S,) and Q (S, A) of a policy, from the Bellman equations as a linear system"""
    V = torch.linalg.solve(bellman_matrix(policy), (policy * REWARD).sum(1))
    return V, REWARD + GAMMA * NEXT_STATE @ V


def greedy(Q):
    return torch.nn.functional.one_hot(Q.argmax(1), 2).double()


def test_ppo_drives_a_two_state_decision_process_to_its_optimal_policy():
    logits = torch.zeros(2, 2, requires_grad=True)
    values = torch.zeros(2, requires_grad=True)
    generator = seeded()
    optimizer = torch.optim.Adam([logits, values], lr=0.1)
    B, T = 32, 80                                # 0.9^80 is 2e-4: the cut end hardly counts
    mask = torch.ones(B, T)

    def draw(p):
        return torch.multinomial(p, 1, generator=generator).squeeze(1)

    for update in range(80):
        states = torch.zeros(B, T, dtype=torch.long)
        actions = torch.zeros(B, T, dtype=torch.long)
        with torch.no_grad():
            states[:, 0] = torch.randint(2, (B,), generator=generator)
            for t in range(T):
                actions[:, t] = draw(logits[states[:, t]].softmax(-1))
                if t + 1 < T:
                    states[:, t + 1] = draw(NEXT_STATE[states[:, t], actions[:, t]])
            rewards = REWARD[states, actions].float()
            old_logprobs = logits.log_softmax(-1)[states, actions]
            old_values = values[states]
            advantages, returns = ppo.gae(rewards, old_values, mask, GAMMA, 0.95)
            advantages = ppo.whiten(advantages, mask)
        for _ in range(4):
            logprobs = logits.log_softmax(-1)[states, actions]
            loss, _ = ppo.policy_loss(logprobs, old_logprobs, advantages, mask)
            critic_loss, _ = ppo.value_loss(values[states], old_values, returns, mask, clip_eps=0)
            take_step(optimizer, loss + critic_loss)
    policy = logits.detach().double().softmax(1)
    best = torch.zeros(2, dtype=torch.float64)   # V*, by value iteration
    for _ in range(1000):
        best = (REWARD + GAMMA * NEXT_STATE @ best).max(1).values
    assert exact_values(greedy(REWARD))[0][0] < 0.75 * best[0]                 # gamma matters
    assert (exact_values(policy)[0] > 0.98 * best).all()
    assert policy.argmax(1).tolist() == (REWARD + GAMMA * NEXT_STATE @ best).argmax(1).tolist()


def test_bellman_identities_of_gae_and_of_the_critics_targets():
    """Every (s, a, s') is a row of two columns. The second column is there for V(s')."""
    policy = torch.tensor([[0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
    V, Q = exact_values(policy)
    s, a, t = torch.cartesian_prod(*[torch.arange(2)] * 3).T                   # (8,)
    p = policy[s, a] * NEXT_STATE[s, a, t]                                     # given s
    mask = torch.ones(8, 2, dtype=torch.float64)
    rewards = torch.stack([REWARD[s, a], torch.zeros(8)], 1)
    values = torch.stack([V[s], V[t]], 1)
    advantages = ppo.gae(rewards, values, mask, GAMMA, 0.0)[0][:, 0]
    targets = ppo.critic_targets(rewards, values, values[:, 0], mask, "td", GAMMA)[:, 0]

    def mean(x, rows):
        return ((p * x)[rows].sum() / p[rows].sum()).item()

    for state in (0, 1):
        assert mean(advantages, s == state) == pytest.approx(0, abs=1e-12)     # E_a A = 0
        assert mean(targets, s == state) == pytest.approx(V[state].item())     # V = T V
        for action in (0, 1):
            rows = (s == state) & (a == action)
            q = Q[state, action].item()
            assert mean(advantages, rows) == pytest.approx(q - V[state].item())
            assert mean(targets, rows) == pytest.approx(q)


def test_conservative_policy_iteration_bound():
    """
    eta(mixture) >= L(mixture) - 2 eps gamma alpha^2 / (1 - gamma)^2    (Kakade and Langford 2002,
    as in TRPO)
    """
    overestimates = []                           # by the surrogate L without the bound's last term
    for seed in range(20):
        draws = torch.rand(2, 2, 2, generator=seeded(seed), dtype=torch.float64)
        old, towards = draws.softmax(-1)
        V, Q = exact_values(old)
        A = Q - V[:, None]
        visits = torch.linalg.solve(bellman_matrix(old).T, START)              # sum gamma^t P(s_t)
        if seed % 2:
            towards = greedy(Q)
        eps = (towards * A).sum(1).abs().max()                                 # max_s |E_a A|
        for alpha in (0.0, 0.05, 0.2, 0.5, 1.0):
            mixture = (1 - alpha) * old + alpha * towards
            surrogate = START @ V + visits @ (mixture * A).sum(1)
            bound = surrogate - 2 * eps * GAMMA * alpha ** 2 / (1 - GAMMA) ** 2
            reached = START @ exact_values(mixture)[0]
            assert reached >= bound - 1e-9
            overestimates.append((surrogate - reached).item())
    assert max(overestimates) > 1e-3             # so the surrogate alone is not a bound


# --------------------------------------------------------------------------------------------------
# The scripts, end to end at --config tiny

FEW = dict(n_eval=4, n_samples=4)                # prompts and responses of the final comparison
SMALL_EVALUATION = dict(n_eval=2, n_reference=8, n_samples=4)


def stage_log(out, run, script):
    return log_of(out / run / script.__name__)


def option_id(value):
    """dict(lam=0.9, beta=1) -> lam-beta, a script -> its name; for the ids of cases"""
    if isinstance(value, dict):
        return "-".join(value)
    return getattr(value, "__name__", "")


def option_folder(changes):
    """dict(lam=0.9, beta=1) -> lam-0.9_beta-1"""
    return "_".join(f"{name}-{value}" for name, value in changes.items())


class Tiny:
    """The run tiny in the folder out, and runs of single scripts on its stages"""

    def __init__(self, out):
        self.out = out

    def run(self, script, name, **changes):
        """Run a script with some settings -> its log, its results"""
        few = {} if script is reward_model else FEW
        results = script.main(tiny_config(script, out=name, base="tiny", **(few | changes)))
        return self.log(name, script), results

    def evaluate(self, runs, **changes):
        small = SMALL_EVALUATION | changes
        return evaluate.main(tiny_config(evaluate, out="tiny", runs=runs, **small))

    def log(self, name, script):
        return stage_log(self.out, name, script)

    def checkpoint(self, name, script):
        return files.load_checkpoint(self.out / name / script.__name__)

    def policy(self, script):
        return sft.load_policy(self.out / "tiny" / script.__name__, "cpu")[0]

    def models(self):
        """The SFT policy, its tokenizer and the reward model"""
        policy, tokenizer = sft.load_policy(self.out / "tiny" / "sft", "cpu")
        scorer = reward_model.load_reward_model(self.out / "tiny" / "reward_model", policy,
                                                tokenizer, "cpu")
        return policy, tokenizer, scorer


@pytest.fixture
def tiny(finished_run, no_pictures):
    return Tiny(finished_run)


def record(monkeypatch, owner, name):
    """Keep the calls of a function from now on -> list of objects with args, kwargs and result"""
    calls = []
    original = getattr(owner, name)

    def recorded(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(types.SimpleNamespace(args=args, kwargs=kwargs, result=result))
        return result
    monkeypatch.setattr(owner, name, recorded)
    return calls


def sampled_batch(policy, tokenizer, prompts, seed=0, temperature=1.0, longest=24):
    """What a policy samples -> (inputs, targets, mask, finished), responses as token lists"""
    tokens, mask = generate(policy, prompts, longest, tokenizer.eot_token, temperature,
                            seeded(seed))
    inputs, targets = data.shift(tokens)
    finished = data.met_eos(targets, mask, tokenizer.eot_token)
    return (inputs, targets, mask, finished), data.responses_of(tokens, mask)


def places(rows, whole):
    """Where the rows of a shuffled minibatch are in the whole batch"""
    return [next(b for b, row_of_whole in enumerate(whole) if torch.equal(row_of_whole, row))
            for row in rows]


# ---- sft.py, reward_model.py and ppo.py

def test_one_command_makes_every_stage_with_all_its_files(whole_run):
    folder, _ = whole_run
    for stage in ("sft", "reward_model", "ppo", "dpo", "grpo", "../ladder/policy_gradient"):
        for name in ("checkpoint.pt", "log.jsonl", "config.json", "report.txt", "results.json",
                     "tokenizer.json"):
            assert (folder / stage / name).stat().st_size > 0
        pictures = ("ladder.png", "variance.png") if "ladder" in stage else ("curves.png",)
        for picture in pictures:
            assert (folder / stage / picture).read_bytes()[:4] == b"\x89PNG"
        steps = [line["step"] for line in log_of(folder / stage)]
        assert steps == list(range(len(steps))) and len(steps) >= 8
        assert not list((folder / stage).glob("*.tmp"))


def test_sft_learns(whole_run):
    log = log_of(whole_run[0] / "sft")
    results = files.read_json(whole_run[0] / "sft" / "results.json")
    assert log[0]["held_out"] > 100 and results["held_out"] < 40
    above_entropy = results["held_out"] - results["entropy"]
    assert results["above_entropy"] == pytest.approx(above_entropy)
    assert 14 < results["entropy"] < 18


def test_the_reward_model_agrees_with_annotators_and_is_normalised(whole_run, tiny):
    folder = whole_run[0] / "reward_model"
    results = files.read_json(folder / "results.json")
    assert 0.6 < results["accuracy"] < results["bayes_accuracy"] < 1
    _, _, scorer = tiny.models()
    held_out = files.read_json(folder / "comparisons.json")[1]
    scores = reward_model.score_all(scorer, held_out, "cpu")
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std().item() == pytest.approx(1, abs=1e-4)


def test_comparisons_hold_the_ids_that_were_sampled_best_first(whole_run):
    tokenizer = tokenizers.load_tokenizer(whole_run[0] / "sft")
    comparisons, held_out = files.read_json(whole_run[0] / "reward_model" / "comparisons.json")
    assert len(comparisons) == 160 and len(held_out) == 40
    firsts, lasts = [], []
    for c in comparisons + held_out:
        assert tokenizer.encode_ordinary(c["prompt"]) == c["prompt_ids"]
        for text, ids, gold in zip(c["responses"], c["response_ids"], c["gold"]):
            decoded = tokenizers.decode_response(tokenizer, ids)
            assert decoded[0] == text
            assert gold == pytest.approx(reviews.gold(c["prompt"], *decoded), abs=1e-5)
        firsts.append(c["gold"][0])
        lasts.append(c["gold"][-1])
    assert sum(firsts) > sum(lasts) + 100
    assert all(corpus.held_out(c["prompt"].encode()) for c in held_out)
    assert not any(corpus.held_out(c["prompt"].encode()) for c in comparisons)


@pytest.mark.parametrize("changes", [
    dict(loss="fidelity"),
    dict(token_wise=True),
    dict(n_responses=2, margin=0.5),
    dict(batch_size=1, epochs=2)], ids=option_id)
def test_every_option_of_the_reward_model_runs(changes, tiny):
    name = "rm_" + option_id(changes)
    _, results = tiny.run(reward_model, name, n_prompts=40, **changes)
    assert 0.4 < results["accuracy"] < results["bayes_accuracy"]
    pairs = 40 if "n_responses" in changes else 240
    report = (tiny.out / name / "reward_model" / "report.txt").read_text()
    assert f"on {pairs} held-out comparisons" in report


def test_ppo_raises_the_score_and_starts_where_it_should(whole_run):
    folder, results = whole_run
    log = log_of(folder / "ppo")
    assert results["score"] > results["sft"]["score"] + 0.4 and results["kl_ref"] > 0.1
    assert results["sft"]["kl_ref"] == 0 == log[0]["kl_ref"] == log[0]["kl_ref_k3"]
    assert log[0]["explained_variance"] == pytest.approx(0, abs=1e-5)          # the critic says 0
    assert all(line["kl_ref_k3"] >= 0 and line["kl_old"] >= 0 for line in log)
    assert log[1]["beta"] == pytest.approx(log[0]["beta"] * (1 - 0.2 * 32 / 640))


def test_the_reported_comparison_can_be_made_again_from_the_checkpoints(tiny):
    """So the reference did not move in any of these runs."""
    reference, tokenizer, scorer = tiny.models()
    for script, name in ((ppo, "PPO"), (dpo, "DPO"), (grpo, "GRPO")):
        cfg = tiny_config(script)
        policies = {"SFT": reference, name: tiny.policy(script)}
        prompts = held_out_prompts(tokenizer, cfg.n_eval, 1337)
        _, again = compare.compare(policies, reward_of(scorer, cfg), tokenizer, prompts, cfg)
        assert again == files.read_json(tiny.out / "tiny" / script.__name__ / "results.json")


def test_an_update_wires_rollout_rewards_advantages_and_losses_together(tiny, monkeypatch):
    """One run of two updates, every call of the maths recorded and compared with the definitions"""
    calls = {name: record(monkeypatch, ppo, name)
             for name in ("roll_out", "shape_rewards", "gae", "policy_loss", "value_loss")}
    scored = record(monkeypatch, reward_py.Reward, "__call__")
    tiny.run(ppo, "wired", steps=2, batch_size=16, minibatch_size=16, lam=0.9, gamma=0.98,
                beta=0.3, kl_control="fixed")
    reference, _, _ = tiny.models()
    for update in range(2):
        call = {name: made[update] for name, made in calls.items()}
        inputs, targets, mask, _ = call["roll_out"].result
        scores, old_logprobs, ref_logprobs, rewards_mask, beta = call["shape_rewards"].args
        assert torch.equal(scores, scored[update].result) and torch.equal(rewards_mask, mask)
        expected = token_logprobs(reference, inputs, targets, mask).detach()
        torch.testing.assert_close(ref_logprobs, expected)
        rewards, values, _, gamma, lam = call["gae"].args
        advantages, returns = call["gae"].result
        assert torch.equal(rewards, call["shape_rewards"].result)
        assert (beta, gamma, lam) == (0.3, 0.98, 0.9)
        assert values.any() == (update > 0)

        logprobs, loss_old, whitened, loss_mask, clip_eps = call["policy_loss"].args
        rows = places(loss_old, old_logprobs)
        assert rows != sorted(rows)
        torch.testing.assert_close(whitened, ppo.whiten(advantages, mask)[rows])
        torch.testing.assert_close(logprobs.detach(), loss_old, atol=1e-5, rtol=0)
        assert torch.equal(loss_mask, mask[rows])
        new_values, old_values, critic_returns, _, value_clip_eps = call["value_loss"].args
        torch.testing.assert_close(critic_returns, returns[rows])
        assert torch.equal(old_values, values[rows]) and new_values.requires_grad
        torch.testing.assert_close(new_values.detach() * mask[rows], old_values)   # of the critic
        assert clip_eps == value_clip_eps == 0.2


OPTIONS = [                              # and the metric of the update in which they first show
    (ppo, dict(surrogate="kl_penalty"), 1, "policy_loss"),
    (ppo, dict(kl_control="fixed"), 1, "beta"),
    (ppo, dict(whiten_rewards=True), 0, "value_loss"),
    (ppo, dict(score_clip=0.5), 0, "score"),
    (ppo, dict(entropy_coef=1.0), 0, "grad_norm"),
    (ppo, dict(critic_init="sft"), 1, "value_loss"),
    (ppo, dict(critic_target="td"), 0, "value_loss"),
    (ppo, dict(critic_target="score"), 1, "value_loss"),
    (ppo, dict(critic_target="mc", lam=0.9), 1, "explained_variance"),
    (ppo, dict(lam=0.9), 0, "value_loss"),
    (ppo, dict(gamma=0.9), 0, "value_loss"),
    (ppo, dict(value_clip_eps=0.001), 0, "value_clip_fraction"),
    (ppo, dict(epochs=2), 0, "kl_old"),
    (ppo, dict(temperature=0.7), 0, "entropy"),
    (ppo, dict(missing_eos_score=None), 0, "score"),
    (ppo, dict(beta=1.0), 1, "value_loss"),
    (ppo, dict(clip_eps=0.01), 0, "clip_fraction"),
    (ppo, dict(grad_clip=0.01), 1, "score"),
    (ppo, dict(critic_lr=1e-2), 1, "value_loss"),
    (ppo, dict(batch_size=1, minibatch_size=1), 0, "score"),
    (ppo, dict(batch_size=6, minibatch_size=3, max_new_tokens=1), 0, "score"),
    (grpo, dict(advantage="dr_grpo"), 0, "grad_norm"),
    (grpo, dict(advantage="rloo"), 0, "grad_norm"),
    (grpo, dict(advantage="reinforce"), 0, "grad_norm"),
    (grpo, dict(kl_in="loss"), 1, "group_std"),
    (grpo, dict(normalise="sequence"), 0, "grad_norm"),
    (grpo, dict(normalise="fixed"), 0, "grad_norm"),
    (grpo, dict(clip_eps=0.01), 0, "clip_fraction"),
    (grpo, dict(clip_eps=0.01, clip_eps_high=0.5), 0, "clip_fraction"),
    (grpo, dict(group_size=2), 0, "group_std"),
    (grpo, dict(beta=2.0), 1, "group_std"),
    (grpo, dict(epochs=2), 0, "kl_old"),
    (grpo, dict(temperature=0.7), 0, "entropy"),
    (grpo, dict(missing_eos_score=None), 0, "score"),
    (grpo, dict(score_clip=0.5), 0, "score"),
    (grpo, dict(grad_clip=0.01), 1, "score"),
    (grpo, dict(batch_size=1, minibatch_size=1, group_size=1, advantage="reinforce"), 0, "score"),
    (grpo, dict(batch_size=6, minibatch_size=2, group_size=3, max_new_tokens=1), 0, "score"),
    (dpo, dict(loss="robust", label_smoothing=0.1), 1, "loss"),
    (dpo, dict(label_smoothing=0.1), 1, "loss"),
    (dpo, dict(loss="ipo"), 0, "loss"),
    (dpo, dict(loss="hinge"), 0, "loss"),
    (dpo, dict(loss="fidelity"), 0, "loss"),
    (dpo, dict(length_normalise=True), 0, "chosen_logprobs"),
    (dpo, dict(length_normalise=True, mask_shared_prefix=True), 0, "chosen_logprobs"),
    (dpo, dict(reference_free=True), 0, "loss"),
    (dpo, dict(margin=0.5), 0, "loss"),
    (dpo, dict(nll_coef=1.0), 0, "grad_norm"),
    (dpo, dict(beta=1.0), 0, "grad_norm"),
    (dpo, dict(grad_clip=0.01), 1, "margin"),
    (dpo, dict(labels="soft"), 0, "chosen_logprobs"),
    (dpo, dict(labels="reward_model"), 0, "chosen_logprobs"),
    (dpo, dict(batch_size=1, n_pairs=3), 0, "chosen_logprobs"),
    (dpo, dict(length_normalise=True, reference_free=True, margin=0.5, beta=2.0), 0, "loss")]
SHORT = {ppo: dict(steps=2), grpo: dict(steps=2), dpo: dict(n_pairs=48)}


@pytest.fixture(scope="module")
def default_logs(whole_run):
    """Logs of short runs with the default settings, {script: log}, to compare options with"""
    out = whole_run[0].parent
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        for script, short in SHORT.items():
            script.main(tiny_config(script, out="default", base="tiny", **short, **FEW))
    return {script: stage_log(out, "default", script) for script in SHORT}


@pytest.mark.parametrize("script, changes, update, metric", OPTIONS, ids=option_id)
def test_every_option_acts_on_the_quantity_it_names(
        script, changes, update, metric, tiny, default_logs):
    log, results = tiny.run(script, option_folder(changes), **(SHORT[script] | changes))
    assert math.isfinite(results["score"]) and math.isfinite(results["kl_ref"])
    assert log[0]["kl_ref"] == 0
    default = default_logs[script][update][metric]
    assert log[update][metric] != pytest.approx(default, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("script, given, option, less, more, metric, factor", [
    (ppo, dict(kl_control="fixed"), "beta", 2.0, 0.02, "kl_ref", 2),
    (grpo, dict(kl_in="loss", advantage="rloo"), "beta", 5.0, 0.02, "kl_ref", 2),
    (ppo, dict(), "entropy_coef", 0.0, 3.0, "entropy", 1.05),
    (dpo, dict(), "nll_coef", 3.0, 0.0, "nll", 1)], ids=option_id)
def test_a_coefficient_has_the_effect_that_it_is_there_for(
        script, given, option, less, more, metric, factor, tiny):
    metrics = []
    for value in (less, more):
        changes = {**given, option: value}
        log, _ = tiny.run(script, "effect_" + option_folder(changes), **changes)
        metrics.append(log[-1][metric])
    assert metrics[1] > factor * metrics[0]


def test_coefficients_follow_the_kls_of_each_update(tiny):
    log, _ = tiny.run(ppo, "followed", surrogate="kl_penalty", kl_old_target=0.01, kl_target=0.5,
                         kl_horizon=100.0)
    for before, after in zip(log, log[1:]):
        error = min(max(before["kl_ref"] / 0.5 - 1, -0.2), 0.2)
        assert after["beta"] == pytest.approx(before["beta"] * (1 + error * 32 / 100))
        factor = 1
        if before["kl_old"] > 0.015:
            factor = 2
        elif before["kl_old"] < 0.01 / 1.5:
            factor = 0.5
        assert after["kl_penalty_coef"] == before["kl_penalty_coef"] * factor
    assert any(after["beta"] > before["beta"] for before, after in zip(log, log[1:]))
    assert len({line["kl_penalty_coef"] for line in log}) > 1


def test_with_a_learning_rate_of_zero_nothing_moves_over_all_epochs(tiny):
    log, _ = tiny.run(ppo, "still", steps=2, epochs=3, lr=0.0)
    for line in log:
        assert line["ratio"] == pytest.approx(1, abs=1e-6) and line["clip_fraction"] == 0
        assert line["kl_ref"] == line["kl_old"] == 0


def test_an_eos_in_the_prompt_does_not_finish_the_response():
    cfg = dataclasses.replace(ppo.Config(), max_new_tokens=2)
    prompts = [[1, 10, 2] for _ in range(60)]
    _, targets, mask, finished = ppo.roll_out(small_gpt(std=0.4), prompts, cfg, 10, seeded())
    assert finished.tolist() == [10 in t[m > 0].tolist() for t, m in zip(targets, mask)]
    assert finished.any() and not finished.all()


def test_one_sample_has_no_standard_deviation(tiny, capsys):
    _, results = tiny.run(ppo, "single", steps=1, n_eval=1, n_samples=1)
    assert "standard deviations" not in capsys.readouterr().out and "gold_gain" not in results
    written = (tiny.out / "single" / "ppo" / "results.json").read_text()
    json.loads(written, parse_constant=pytest.fail)      # which is called for NaN and Infinity


def test_without_a_bonus_the_update_builds_no_graph_for_the_entropy(tiny, monkeypatch):
    calls = record(monkeypatch, ppo, "token_logprobs")
    for coef in (0.0, 0.1):
        log, _ = tiny.run(ppo, f"bonus_{coef}", steps=1, entropy_coef=coef)
        assert log[0]["entropy"] > 0
    in_updates = [call.kwargs.get("return_entropy") for call in calls
                  if call.result[0].requires_grad]
    assert in_updates == [False, False, True, True]


# ---- what PPO can do besides

def test_the_average_follows_its_formula_and_is_evaluated_beside_the_actor(tiny, monkeypatch):
    average, policy = small_gpt(seed=1), small_gpt(seed=2)
    before = copy.deepcopy(average.state_dict())
    ppo.move_average(average, policy, 0.9)
    for name, weight in average.state_dict().items():
        torch.testing.assert_close(weight, 0.9 * before[name] + 0.1 * policy.state_dict()[name])
    actors = []                                          # the actor's weights at each call
    original = ppo.move_average

    def recorded(mean, actor, share):
        actors.append(copy.deepcopy(actor.state_dict()))
        original(mean, actor, share)
    monkeypatch.setattr(ppo, "move_average", recorded)
    _, results = tiny.run(ppo, "averaged", steps=3, ema=0.6)
    assert len(actors) == 3                              # once an update
    saved = tiny.checkpoint("averaged", ppo)
    for name, expected in tiny.checkpoint("tiny", sft)["policy"].items():
        for weights in actors:
            expected = 0.6 * expected + 0.4 * weights[name]
        torch.testing.assert_close(saved["policy_ema"][name], expected)
    assert results["PPO, averaged"]["kl_ref"] != results["kl_ref"]
    assert list(tiny.evaluate("averaged")) == ["SFT", "averaged/ppo", "averaged/ppo/ema"]


def test_the_gradient_with_ptx_is_the_sum_of_the_two(tiny, monkeypatch):
    """The actor's first gradient, unclipped: of the policy loss, plus coef times of the texts"""
    original_clip = torch.nn.utils.clip_grad_norm_
    original_texts = data.built_in_texts

    def few_texts(n, n_held_out, seed):                  # 20,000 take seconds to write
        return original_texts(min(n, 500), n_held_out, seed)

    def recorded_clip(parameters, limit):
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return original_clip(parameters, limit)
    monkeypatch.setattr(data, "built_in_texts", few_texts)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded_clip)
    drawn = record(monkeypatch, data, "draw")
    first_gradients = []
    for coef in (0.0, 0.7):
        gradients = []
        log, _ = tiny.run(ppo, f"ptx_{coef}", steps=1, ptx_coef=coef, minibatch_size=32)
        first_gradients.append(gradients[0])
    texts = next(call.result for call in drawn if isinstance(call.result[0], tuple))
    policy, _, _ = tiny.models()
    inputs, targets, mask = data.collate(*zip(*texts))
    loss = -masked_mean(token_logprobs(policy, inputs, targets, mask), mask)
    loss.backward()
    text_gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    plain, with_ptx = first_gradients
    torch.testing.assert_close(with_ptx, plain + 0.7 * text_gradient, atol=1e-6, rtol=1e-4)
    assert len(texts) == 32 and log[0]["ptx_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_during_warm_up_the_critic_alone_learns(tiny):
    log, _ = tiny.run(ppo, "warmed", steps=3, critic_warmup=3)
    saved = tiny.checkpoint("warmed", ppo)
    start = tiny.checkpoint("tiny", sft)
    assert_same_bits(dict(saved["policy"]), dict(start["policy"]))
    assert saved["critic"]["head.weight"].any()
    for line in log:
        assert line["kl_ref"] == line["grad_norm"] == 0 < line["critic_grad_norm"]
    log, _ = tiny.run(ppo, "warmed-2", steps=3, critic_warmup=1)
    assert log[1]["kl_ref"] == 0 != log[2]["kl_ref"]
    assert log[0]["kl_old"] == 0 < log[1]["kl_old"]


# ---- dpo.py

def test_dpo_starts_at_the_reference_and_raises_gold_from_comparisons_alone(whole_run):
    folder = whole_run[0] / "dpo"
    log = log_of(folder)
    first, last = log[0], log[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert first["accuracy"] == 0.5 and first["kl_ref"] == 0
    assert last["kl_ref"] > 0.05 and last["gold"] > first["gold"] and last["margin"] > 0.05
    for line in log:
        assert ("kl_ref" in line) == (line["step"] % 5 == 0 or line is last)
    reference, _ = sft.load_policy(whole_run[0] / "sft", "cpu")
    for pair in files.read_json(folder / "pairs_0.json")[:20]:
        for name, stored in zip(("chosen_ids", "rejected_ids"), pair["ref_logprobs"], strict=True):
            batch = data.collate([pair["prompt_ids"]], [pair[name]])
            assert stored == pytest.approx(token_logprobs(reference, *batch).sum().item(), abs=1e-4)


@pytest.mark.parametrize("changes, updates", [
    (dict(labels="annotators"), 6),
    (dict(labels="soft", epochs=2), 12)], ids=["annotators", "soft, two epochs"])
def test_each_round_of_dpo_has_pairs_of_its_own(changes, updates, tiny):
    """Only the first round can take the annotators' comparisons; the others sample the policy."""
    name = f"rounds_{updates}"
    log, _ = tiny.run(dpo, name, n_pairs=96, rounds=2, **changes)
    assert len(log) == updates and log[0]["kl_ref"] == 0
    comparisons, _ = files.read_json(tiny.out / "tiny" / "reward_model" / "comparisons.json")
    collected = [ids for c in comparisons for ids in c["response_ids"]]
    known = []                                           # pairs from the comparisons, by round
    for path in sorted((tiny.out / name / "dpo").glob("pairs_*.json")):
        pairs = files.read_json(path)
        assert len(pairs) == 48
        known.append(sum(pair["chosen_ids"] in collected for pair in pairs))
    assert len(known) == 2 and known[1] < 24
    assert (known[0] > 24) == (changes["labels"] == "annotators")


def test_soft_labels_are_made_of_the_scores_that_the_options_ask_for(tiny):
    norms = []
    for changes in ({}, dict(score_clip=0.1), dict(missing_eos_score=None)):
        log, _ = tiny.run(dpo, "soft_" + option_folder(changes), n_pairs=48, labels="soft",
                          **changes)
        norms.append(log[0]["grad_norm"])
    plain, clipped, unfinished = norms
    assert plain > 2 * clipped and plain != pytest.approx(unfinished, rel=1e-3)


def test_masking_the_shared_prefix_alone_changes_nothing_and_says_so(tiny, capsys):
    margins = []
    for masked in (False, True):
        assert "--mask_shared_prefix changes nothing" not in capsys.readouterr().out
        log, _ = tiny.run(dpo, f"prefix_{masked}", n_pairs=48, mask_shared_prefix=masked)
        margins.append([line["margin"] for line in log])
    said = capsys.readouterr().out
    assert "--mask_shared_prefix changes nothing without --length_normalise" in said
    assert margins[0] == pytest.approx(margins[1], abs=1e-4)


def test_pairs_of_identical_responses_are_left_out_and_counted(tiny, monkeypatch, capsys):
    original = dpo.pairs_of_rankings

    def with_identical(*args):
        pairs = original(*args)
        for pair in pairs[::3]:
            pair["rejected_ids"] = pair["chosen_ids"]
        return pairs
    monkeypatch.setattr(dpo, "pairs_of_rankings", with_identical)
    tiny.run(dpo, "identical", n_pairs=48)
    said = capsys.readouterr().out
    assert "round 0: 32 pairs; 16 with identical responses are left out" in said
    assert len(files.read_json(tiny.out / "identical" / "dpo" / "pairs_0.json")) == 32


# ---- grpo.py

def test_grpo_raises_the_score_and_starts_where_it_should(whole_run):
    log = log_of(whole_run[0] / "grpo")
    results = files.read_json(whole_run[0] / "grpo" / "results.json")
    assert results["score"] > results["sft"]["score"] + 0.3 and results["kl_ref"] > 0.1
    assert log[0]["kl_ref"] == log[0]["kl_ref_k3"] == 0
    for line in log:
        assert line["beta"] == 0.25
        assert line["kl_old"] >= 0 and 0 <= line["equal_groups"] < 1 and line["group_std"] > 0


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_a_grpo_update_wires_groups_rewards_and_weights_together(kl_in, tiny, monkeypatch):
    """One run, the calls of the maths in two updates compared with the definitions"""
    calls = {name: record(monkeypatch, grpo, name)
             for name in ("roll_out", "score_rollout", "group_advantages", "grpo_loss")}
    scored = record(monkeypatch, reward_py.Reward, "__call__")
    backward = record(monkeypatch, torch.Tensor, "backward")
    logprobs_calls = record(monkeypatch, grpo, "token_logprobs")
    kl_calls = record(monkeypatch, grpo, "kl_estimate")
    log, _ = tiny.run(grpo, f"wired_{kl_in}", steps=4, batch_size=12, minibatch_size=12,
                         group_size=3, kl_in=kl_in, beta=0.4, advantage="rloo", normalise="fixed",
                         clip_eps=0.1, clip_eps_high=0.3)
    reference, tokenizer, _ = tiny.models()
    k3_calls = [call.args for call in kl_calls if len(call.args) == 3]
    for update in range(2):
        call = {name: made[update] for name, made in calls.items()}
        inputs, targets, mask, _ = call["roll_out"].result
        prompts, _ = data.texts_of(tokenizer, inputs, targets, mask)
        assert prompts == [prompt for prompt in prompts[::3] for _ in range(3)]      # groups
        assert len(set(prompts)) > 1
        old_logprobs, _ = call["score_rollout"].result
        ref_logprobs = logprobs_calls[3 * update].result       # then the update's, then kl_old's
        expected = token_logprobs(reference, inputs, targets, mask).detach()
        torch.testing.assert_close(ref_logprobs, expected)

        rewards, group_size, kind = call["group_advantages"].args
        assert (group_size, kind) == (3, "rloo")
        kl = (old_logprobs - ref_logprobs).sum(1)
        assert (kl.abs().max() > 0) == (update > 0)
        scores = scored[update].result
        expected = scores - 0.4 * kl if kl_in == "reward" else scores
        torch.testing.assert_close(rewards, expected)

        logprobs, loss_old, loss_advantages, weights, *clip = call["grpo_loss"].args
        loss, _ = call["grpo_loss"].result
        assert log[update]["policy_loss"] == loss.item() and clip == [0.1, 0.3]
        rows = places(loss_old, old_logprobs)
        assert rows != sorted(rows)                              # shuffled
        assert torch.equal(loss_advantages, call["group_advantages"].result[rows])
        torch.testing.assert_close(logprobs.detach(), loss_old, atol=1e-5, rtol=0)
        torch.testing.assert_close(weights, mask[rows] / (12 * 24))

        if kl_in == "loss":
            ratio = torch.exp(ref_logprobs[rows] - logprobs)
            loss = loss + 0.4 * (weights * (ratio - 1 - ratio.log())).sum()
        torch.testing.assert_close(backward[update].args[0].detach(), loss.detach())
        kl_old = [new for old, new, _ in k3_calls
                  if torch.equal(old, old_logprobs[rows]) and old is not logprobs]
        assert len(kl_old) == 1                                  # KL(old, new), not the reverse
        assert not torch.equal(kl_old[0], old_logprobs[rows])

        group_std = rewards.view(-1, 3).std(dim=1).mean().item()
        assert log[update]["group_std"] == pytest.approx(group_std, rel=1e-5)
        equal = sum(len(set(group.tolist())) == 1 for group in scores.view(-1, 3))
        assert log[update]["equal_groups"] == equal / 4
    saved = tiny.checkpoint(f"wired_{kl_in}", grpo)
    lr = saved["optimizer"]["param_groups"][0]["lr"]
    assert lr == pytest.approx(log[-1]["lr"]) and lr < 1.5e-3


def test_a_verifiable_reward_is_learned_and_equal_groups_are_counted(tiny, capsys):
    """
    A simple rule is learned at once. The request of the built-in task is too hard for the tiny
    policy: few of its reviews keep it, so most groups are equal.
    """
    (tiny.out.parent / "rule.py").write_text(
        "def short(prompts, responses):\n"
        "    return [float(len(r.split()) < 12) for r in responses]\n")
    given = dict(missing_eos_score=0.0, normalise_reward=False)
    log, results = tiny.run(grpo, "rule", reward="rule.py:short", n_eval=16, n_samples=16,
                               **given)
    assert results["score"] > results["sft"]["score"] + 0.15
    for line in log:                                     # eight groups, 32 responses
        assert (line["equal_groups"] * 8) % 1 == 0 and (line["score"] * 32) % 1 == 0
    assert 0 < log[0]["equal_groups"] < 1
    # Groups are equal if their scores are, although their KLs differ
    assert any(line["equal_groups"] > 0 < line["kl_ref"] for line in log[1:])
    _, results = tiny.run(grpo, "request", reward=f"{HERE}/reviews.py:request_kept", steps=2,
                             **given)
    assert 0 <= results["score"] < 0.3
    tiny.evaluate("tiny,rule")
    said = capsys.readouterr().out
    assert "leaving out rule/grpo: it was trained for a different reward" in said


# ---- policy_gradient.py

LADDER = policy_gradient.LADDER


def test_the_ladder_starts_every_rung_from_the_same_place(whole_run):
    folder = whole_run[0].parent / "ladder" / "policy_gradient"
    log = log_of(folder)
    assert [line["rung"] for line in log] == [rung for rung in LADDER for _ in range(4)]
    for line in log[::4]:                                # the same models, prompts and samples
        for metric in ("score", "gold", "kl_ref", "entropy", "response_length",
                       "explained_variance"):
            assert line[metric] == log[0][metric], (line["rung"], metric)
        assert line["kl_ref"] == 0
        assert line["objective"] == pytest.approx(line["score"], abs=1e-5)
    for line in log:
        objective = line["score"] - 0.25 * line["kl_ref"]
        assert line["objective"] == pytest.approx(objective, abs=1e-4)
        assert ("kl_step" in line) == (line["rung"] == "trpo") and "grad_norm" in line
        if line["rung"] == "trpo":
            max_kl = 0.01 * (line["lr"] / 2e-3) ** 2
            assert 0 <= line["kl_step"] <= max_kl + 1e-9 and line["gain"] >= 0
    for first, last in zip(log[::4], log[3::4]):         # the critic learns on every rung
        assert first["explained_variance"] == 0 != last["explained_variance"]
    saved = files.load_checkpoint(folder)
    embeddings = {saved[f"policy_{rung}"]["transformer.wte.weight"].sum().item()
                  for rung in LADDER}
    assert len(embeddings) == 10                         # each rung ends at a policy of its own
    assert_same_bits(dict(saved["policy_trpo"]), dict(saved["actor"]))


def test_the_ladder_reports_every_rung_and_its_noise(whole_run):
    results = files.read_json(whole_run[0].parent / "ladder" / "policy_gradient" / "results.json")
    assert set(results) == {"SFT", "noise", *LADDER}
    for name in ("SFT", *LADDER):
        objective = results[name]["score"] - 0.25 * results[name]["kl_ref"]
        assert results[name]["objective"] == pytest.approx(objective)
    noise = results["noise"]
    variance = {name: x["variance"] for name, x in noise.items()}
    assert len(noise) == 13 and min(variance.values()) > 0
    for rung in ("importance", "clip", "kl_penalty", "trpo"):    # with a ratio of 1 they are gae
        assert variance[rung] == pytest.approx(variance["gae"], rel=1e-3)
    for rung in ("importance", "clip", "kl_penalty"):            # an update later they are not
        assert variance[f"{rung}, later"] != pytest.approx(variance["gae"], rel=1e-3)
    for before, rung in [*zip(LADDER, LADDER[1:]), ("clip", "clip, later")]:
        change = variance[rung] - variance[before]
        assert noise[rung]["change"] == pytest.approx(change, abs=1e-9)
    assert variance["baseline"] != pytest.approx(variance["reward_to_go"], rel=1e-6)     # a critic


def test_a_rung_alone_is_the_rung_in_the_ladder(tiny):
    """
    So no rung leaves anything behind for the next: weights, critic, optimizers, coefficient,
    random numbers.
    """
    alone, _ = tiny.run(policy_gradient, "alone", rung="kl_penalty")
    ladder = [line for line in tiny.log("ladder", policy_gradient)
              if line["rung"] == "kl_penalty"]
    assert len(alone) == len(ladder) == 4
    for line in alone + ladder:
        for name in [name for name in line if re.search("_seconds$|_per_second$|^step$", name)]:
            del line[name]
    assert alone == ladder


@pytest.mark.parametrize("rung", LADDER)
def test_every_rung_climbs_on_the_samples_it_is_given(rung, tiny):
    """The loss falls by so many gradient steps, or by one within its KL; at temperature 0.7"""
    reference, tokenizer, scorer = tiny.models()
    cfg = tiny_config(policy_gradient, temperature=0.7, batch_size=32, minibatch_size=8)
    critic = ScalarGPT(scorer.config, init_from=scorer).eval()       # one whose values are not 0
    actor = tiny.policy(sft)
    rollout = policy_gradient.sample_rollout(
        actor, critic, reference, reward_of(scorer, cfg), tokenizer,
        held_out_prompts(tokenizer, 32, 1), cfg, seeded())
    logprobs = policy_gradient.logprobs_of(actor, rollout, cfg).detach()
    torch.testing.assert_close(logprobs, rollout["old_logprobs"])

    def loss_now():
        logprobs = policy_gradient.logprobs_of(actor, rollout, cfg)
        return policy_gradient.rung_loss(rung, logprobs, rollout, cfg, 0.1).item()

    def distributions(policy):
        return policy_gradient.token_distributions(policy, rollout["inputs"], rollout["mask"], 0.7)

    class Run:                                           # the two methods that a climb calls
        taken = 0

        def step(self, grad_clip, grad_norm):
            grad_norm.step()
            grad_norm.zero_grad()
            self.taken += 1
            return {}

        def must_be_finite(self, **values):
            pass

    run = Run()
    order = torch.arange(32)
    before = loss_now()
    start = copy.deepcopy(actor)
    if rung == "trpo":
        taken = policy_gradient.climb_by_trpo(actor, rollout, order, cfg, 1e-3, run)
        assert before - loss_now() == pytest.approx(taken["gain"], abs=1e-5)
        kl = policy_gradient.mean_kl(distributions(start), distributions(actor)).item()
        assert kl == pytest.approx(taken["kl_step"], rel=1e-3) and 1e-4 < kl <= 1e-3
    else:
        optimizer = torch.optim.SGD(actor.parameters(), lr=1e-3)
        policy_gradient.climb(rung, actor, optimizer, rollout, order, cfg, 0.1, run)
    assert run.taken == (1 if rung in (*policy_gradient.PSI, "trpo") else 4)
    assert loss_now() < before - 1e-4


@pytest.mark.parametrize("changes", [
    dict(rung="clip", clip_eps=0.01),
    dict(rung="kl_penalty", kl_old_target=10.0),
    dict(rung="trpo", max_kl=1e-4),
    dict(rung="gae", lam=0.0, batch_size=1, minibatch_size=1, fisher_rows=1),
    dict(rung="gae", beta=0.0)], ids=option_id)
def test_one_rung_runs_by_itself_and_its_options_act(changes, tiny, monkeypatch):
    steps = record(monkeypatch, policy_gradient, "trpo_step")
    rung = changes["rung"]
    log, results = tiny.run(policy_gradient, option_folder(changes), **changes)
    default_log = [line for line in tiny.log("ladder", policy_gradient)
                   if line["rung"] == rung]
    assert list(results) == ["SFT", rung] and math.isfinite(results[rung]["score"])
    assert (log[2]["score"] != default_log[2]["score"]
            or log[2]["objective"] != default_log[2]["objective"])
    if rung == "trpo":
        assert all(line["kl_step"] <= 1e-4 for line in log)
        bounds = [call.args[3] for call in steps]        # max_kl
        expected = [1e-4 * (line["lr"] / 2e-3) ** 2 for line in log]
        assert bounds == pytest.approx(expected) and min(bounds) < 5e-5
    if rung == "kl_penalty":
        assert [line["kl_penalty_coef"] for line in log] == [1, 0.5, 0.25, 0.125]


def test_every_rung_of_a_ladder_is_evaluated(tiny):
    assert list(tiny.evaluate("ladder,tiny/dpo")) == ["SFT", "tiny/dpo"]
    results = tiny.evaluate("ladder/policy_gradient")
    assert list(results) == ["SFT", *(f"ladder/policy_gradient/{rung}" for rung in LADDER)]
    folder = tiny.out / "ladder" / "policy_gradient"
    weights = files.load_checkpoint(folder)["policy_kl_penalty"]
    policy, _ = sft.load_policy(folder, "cpu", "policy_kl_penalty")
    assert torch.equal(policy.transformer.wte.weight, weights["transformer.wte.weight"])
    with pytest.raises(Stopped, match="checkpoint.pt has no policy, so a different stage"):
        sft.load_policy(folder, "cpu")


# ---- evaluate.py and compare.py

@pytest.fixture(scope="module")
def evaluated(whole_run):
    """-> results, folder of an evaluation of the runs tiny and fixed"""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(whole_run[0].parent.parent)
        ppo.main(tiny_config(ppo, out="fixed", base="tiny", kl_control="fixed", beta=0.5, **FEW))
        results = evaluate.main(tiny_config(evaluate, runs="tiny,fixed", overoptimise=True))
    return results, whole_run[0] / "evaluate"


def test_evaluate_finds_every_policy_and_reports_where_it_landed(evaluated):
    results, folder = evaluated
    policies = ["fixed/ppo", "tiny/dpo", "tiny/grpo", "tiny/ppo"]
    assert list(results) == ["SFT", *policies, "overoptimisation"]
    report = (folder / "report.md").read_text()
    for heading in ("The limit", "Best of n", "Win rates", "Samples", "Over-optimisation"):
        assert f"## {heading}" in report
    for text in (report, (folder / "report.txt").read_text()):
        assert "\ncommand     python evaluate.py --config tiny" in text
        assert "\nmade with   commit " in text
    for picture in ("frontier.png", "overoptimisation.png"):
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG" and f"({picture})" in report
    assert results["SFT"]["kl_ref"] == 0 and results["SFT"]["elo_by_gold"] == 1000
    assert "fraction" in results["fixed/ppo"] and "fraction" in results["tiny/dpo"]
    assert "fraction" not in results["tiny/ppo"]
    assert results["tiny/grpo"]["aims_at_optimum"] and results["tiny/grpo"]["fraction"] > 0.3
    for name in policies:
        assert -1 < results[name]["share"] < 1.3 and results[name]["kl_ref"] > 0.05
    assert results["tiny/ppo"]["share"] > 0.3 and results["tiny/ppo"]["elo_by_score"] > 1000
    log = stage_log(folder.parent.parent, "tiny-weak", ppo)
    last = [line["score"] for line in log[-3:]]          # means over five updates, two on each side
    assert results["overoptimisation"]["end_score"] == pytest.approx(sum(last) / 3)
    assert results["overoptimisation"]["fall"] >= 0
    json.dumps(results, allow_nan=False)


def test_samples_carry_the_densities_scores_and_texts_of_their_policies(tiny):
    """Each policy is sampled again by itself, and measured under every policy."""
    reference, tokenizer, scorer = tiny.models()
    policies = {"SFT": reference, "PPO": tiny.policy(ppo)}
    reward = reward_of(scorer, tiny_config(ppo))
    prompts = held_out_prompts(tokenizer, 3)
    samples = compare.collect(policies, reward, tokenizer, prompts, [4, 2],
                              tiny_config(ppo, temperature=0.8, seed=9))
    assert samples.columns("SFT") == slice(0, 4) and samples.columns("PPO") == slice(4, 6)
    for (name, policy), n in zip(policies.items(), samples.counts, strict=True):
        columns = samples.columns(name)

        def check(ours, theirs):
            torch.testing.assert_close(ours[:, columns].float(), theirs.view(3, n).float(),
                                       atol=2e-4, rtol=1e-4)

        repeated = [prompt for prompt in prompts for _ in range(n)]
        (*batch, finished), responses = sampled_batch(policy, tokenizer, repeated, 9, 0.8)
        for logprobs, other in zip(samples.logprobs, policies.values(), strict=True):
            check(logprobs, token_logprobs(other, *batch, 0.8).sum(1).detach())
        _, entropy = token_logprobs(policy, *batch, 0.8, return_entropy=True)
        check(samples.entropy, entropy.sum(1).detach())
        check(samples.scores, reward(*batch, finished))
        check(samples.lengths, batch[2].sum(1))
        check(samples.finished, finished)
        asked = [tokenizer.decode(prompt) for prompt in repeated]
        texts = [tokenizers.decode_response(tokenizer, ids) for ids in responses]
        gold = [reviews.gold(prompt, *text) for prompt, text in zip(asked, texts)]
        grammatical = [reviews.grammatical(prompt, *text) for prompt, text in zip(asked, texts)]
        check(samples.gold, torch.tensor(gold))
        check(samples.grammatical, torch.tensor(grammatical))
        assert [t for row in samples.texts for t in row[columns]] == [t for t, _ in texts]
        assert samples.asked == asked[::n]


def test_no_batch_of_samples_repeats_an_earlier_one(tiny):
    reference, tokenizer, _ = tiny.models()

    def length(inputs, targets, mask, finished):
        return mask.sum(1)
    samples = compare.collect({"SFT": reference}, length, tokenizer, held_out_prompts(tokenizer, 1),
                              [1100], tiny_config(ppo, max_new_tokens=4, seed=9))
    assert samples.texts[0][1024:] != samples.texts[0][:76]      # they are sampled 1024 at a time


def test_evaluate_leaves_out_runs_from_a_different_sft_policy(tiny, capsys):
    sft.main(tiny_config(sft, out="elsewhere", steps=5))
    tiny.run(ppo, "elsewhere", steps=1)
    found = ["SFT", "tiny/dpo", "tiny/grpo", "tiny/ppo"]
    assert list(tiny.evaluate("tiny,elsewhere")) == found
    said = capsys.readouterr().out
    assert "leaving out elsewhere/ppo: it started from a different SFT policy" in said
    for stage in ("ppo", "sft"):                         # as an interrupted --overwrite leaves them
        shutil.copytree(tiny.out / "tiny" / stage, tiny.out / "tiny" / f"{stage}.old")
    assert list(tiny.evaluate("tiny")) == found


def test_evaluate_without_any_policy_shows_the_limit_alone(tiny, tmp_path, monkeypatch):
    for stage in ("sft", "reward_model"):
        shutil.copytree(tiny.out / "tiny" / stage, tmp_path / "out" / "tiny" / stage)
    monkeypatch.chdir(tmp_path)
    assert list(evaluate.main(tiny_config(evaluate, n_eval=2, n_reference=8))) == ["SFT"]


def test_one_bad_stage_among_many_is_left_out_by_name(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for stage in ("sft", "reward_model", "ppo"):
        shutil.copytree(tiny.out / "tiny" / stage, out / "tiny" / stage)
    for run in ("damaged", "foreign", "older", "unfinished"):
        shutil.copytree(tiny.out / "tiny" / "ppo", out / run / "ppo")
    monkeypatch.chdir(tmp_path)
    damaged = out / "damaged" / "ppo" / "checkpoint.pt"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    torch.save({"weights": torch.zeros(3)}, out / "foreign" / "ppo" / "checkpoint.pt")
    older = out / "older" / "ppo" / "config.json"
    config = files.read_json(older)
    for name in ("score_clip", "ptx_coef", "ema", "text_prompt", "whiten_rewards"):
        del config[name]
    files.write(older, json.dumps(config))
    (out / "unfinished" / "ppo" / "report.txt").unlink()
    small = dict(out="among_bad", base="tiny", n_eval=2, n_reference=4, n_samples=2)
    found = evaluate.main(tiny_config(evaluate, **small))
    said = capsys.readouterr().out
    assert set(found) == {"SFT", "tiny/ppo", "older/ppo"}
    assert "leaving out damaged/ppo: error: cannot read out/damaged/ppo/checkpoint.pt as a" in said
    assert "leaving out foreign/ppo: error: " in said
    assert "leaving out unfinished/ppo: it is not finished" in said
    with pytest.raises(Stopped, match="cannot read out/damaged/ppo/checkpoint.pt"):   # asked for
        evaluate.main(tiny_config(evaluate, runs="tiny, damaged/ppo", **small))


# ---- what is refused before any work

NO_ROOM = "--max_new_tokens 70 exceed the model's block_size 72; lower --max_new_tokens to 5"
REFUSED = [
    (sft, dict(block_size=60, max_new_tokens=60),
     "--max_new_tokens 60 exceed the model's block_size 60; lower --max_new_tokens to"),
    (sft, dict(block_size=40, max_new_tokens=1), "exceed --block_size 40; raise it"),
    (reward_model, dict(max_new_tokens=70), NO_ROOM),
    (ppo, dict(max_new_tokens=70), NO_ROOM),
    (dpo, dict(beta=0.0), "--beta got 0"),
    (dpo, dict(label_smoothing=0.5), "--label_smoothing got 0.5"),
    (dpo, dict(loss="ipo", label_smoothing=0.1),
     "works only with --loss sigmoid or robust, this is --loss ipo"),
    (dpo, dict(n_pairs=20, rounds=2), "less than one batch of 16 pairs"),
    (dpo, dict(n_pairs=5000),
     "asks for 5000 of the annotators' comparisons, .*reward_model has 960"),
    (dpo, dict(n_eval=500), "--n_eval 500 .* asks for more held-out prompts than the 197 that"),
    (grpo, dict(batch_size=10, minibatch_size=2),
     "--batch_size 10 is not a multiple of --group_size 4; every group must be whole"),
    (grpo, dict(minibatch_size=64),
     "--minibatch_size 64 does not divide --batch_size 32, .*; try 32"),
    (grpo, dict(group_size=1),
     "--group_size 1 leaves nothing to compare a response with, and --advantage grpo compares"),
    (grpo, dict(reward="nowhere.py:f"), "but nowhere.py does not exist"),
    (grpo, dict(max_new_tokens=70), NO_ROOM),
    (policy_gradient, dict(minibatch_size=12),
     "--minibatch_size 12 does not divide --batch_size 16, .*; try 8"),
    (policy_gradient, dict(fisher_rows=17), "--fisher_rows 17 is more than --batch_size 16"),
    (policy_gradient, dict(variance_rows=8),
     "--batch_size 16 is not a multiple of 4 times --variance_rows 8"),
    (policy_gradient, dict(lora_rank=2), "the ladder compares gradients of all weights"),
    (evaluate, dict(n_reference=1), "--n_reference got 1"),
    (evaluate, dict(max_new_tokens=70), NO_ROOM),
    (evaluate, dict(runs="nowhere"),
     "--runs names nowhere, but out/nowhere has no finished stage"),
    (sample, dict(stage="sft,pppo"),
     "--stage names pppo, but neither out/tiny/pppo nor out/pppo has a checkpoint; there are: "
     ".*tiny/ppo"),
    (sample, dict(stage="ppo/emma"), "has no such policy; its policies: ppo"),
    (sample, dict(stage="ppo", prompt="a long prompt " * 30),
     "shorten the prompts, or make the SFT stage again")]


@pytest.mark.parametrize("script, changes, message", REFUSED, ids=option_id)
def test_settings_that_cannot_work_are_refused_before_any_work(script, changes, message, tiny):
    given = {"out": "refused", "base": "tiny"}
    if script is sft:
        del given["base"]
    if script is evaluate:
        given |= {"runs": "tiny", **SMALL_EVALUATION}
    if script is sample:
        given = {}
    with pytest.raises(Stopped, match=message):
        script.main(tiny_config(script, **(given | changes)))
    assert not (tiny.out / "refused").exists()


# ---- parts of a batch, and precision

@pytest.mark.parametrize("script, changes", [
    (sft, dict(steps=2, weight_decay=0.0)),
    (reward_model, dict(n_prompts=8, n_held_out=8, batch_size=4)),
    (reward_model, dict(n_prompts=8, n_held_out=8, batch_size=4, token_wise=True)),
    (ppo, dict(steps=2, entropy_coef=0.1, **FEW)),
    (ppo, dict(steps=2, surrogate="kl_penalty", batch_size=30, minibatch_size=15, **FEW)),
    (dpo, dict(n_pairs=32, nll_coef=3.0, **FEW)),
    (grpo, dict(steps=2, kl_in="loss", normalise="sequence", **FEW)),
    (policy_gradient, dict(steps=2, rung="clip")),
    (policy_gradient, dict(steps=2, rung="gae"))], ids=option_id)
def test_a_batch_in_parts_has_the_gradient_and_the_metrics_of_the_whole(
        script, changes, tiny, monkeypatch):
    """
    Rows are ragged, so the mean of the parts' means would be wrong. Trained by SGD, since AdamW
    makes much of small differences.
    """
    def sgd(parameters, lr, **others):
        return torch.optim.SGD(parameters, lr=lr)
    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    base = {} if script is sft else {"base": "tiny"}
    key = {reward_model: "reward_model", policy_gradient: "actor"}.get(script, "policy")
    logs, weights = [], []
    for parts in (1, 4):
        name = f"{script.__name__}_in_{parts}"
        shutil.rmtree(tiny.out / name, ignore_errors=True)
        script.main(tiny_config(script, out=name, accumulation=parts, **base, **changes))
        logs.append(tiny.log(name, script))
        weights.append(tiny.checkpoint(name, script)[key])
    for whole, parts in zip(*logs, strict=True):
        for metric in whole:
            if metric.endswith(("_seconds", "_per_second", "rung")):
                continue
            # In the first minibatch the values are at the edge of the clip range, up to rounding
            atol = 1e-2 if metric == "value_clip_fraction" else 1e-5
            assert parts[metric] == pytest.approx(whole[metric], rel=2e-4, abs=atol), metric
    whole, parts = weights
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=2e-6, rtol=1e-4)
    if script is not sft:                                # the others started from the SFT policy
        start = tiny.checkpoint("tiny", sft)["policy"]
        moved = sum((whole[name] - weight).abs().sum().item() for name, weight in start.items()
                    if name in whole)
        assert moved > 1e-3


def test_parts_have_about_one_size_and_hold_every_row_once():
    for n, parts in ((8, 1), (8, 3), (5, 4), (2, 7)):
        rows = list(range(n))
        split = [part for part, _ in data.microbatches(rows, parts)]
        assert sum(split, []) == rows and len(split) <= parts
        assert max(map(len, split)) == -(-n // parts)
        tensors = [part for part, _ in data.microbatches(torch.arange(n), parts)]
        assert torch.equal(torch.cat(tensors), torch.arange(n))


def test_shares_of_parts_sum_to_one_and_follow_the_weights():
    shares = [share.item() for _, share in data.microbatches([0, 1, 2, 3, 4], 3)]
    assert shares == pytest.approx([0.4, 0.4, 0.2])
    shares = [share.item() for _, share in data.microbatches([0, 1, 2], 2, [5, 1, 2])]
    assert shares == pytest.approx([0.75, 0.25])


def test_means_weigh_values_by_their_shares():
    means = data.Means()
    means.add({"loss": torch.tensor(1.0)}, torch.tensor(0.75))
    means.add({"loss": 5.0}, 0.25)                       # a minibatch in two parts
    means.add({"loss": 4.0, "lr": 0.1})                  # a second minibatch in one
    assert means.result() == pytest.approx({"loss": 3.0, "lr": 0.1})


@pytest.mark.parametrize("script, changes", [
    (sft, dict(init="gpt2", steps=2, n_texts=None, n_eval=10, batch_size=8, lora_rank=0)),
    (reward_model, dict(base="own", n_prompts=16, n_held_out=8)),
    (ppo, dict(base="own", steps=2, **FEW)),
    (dpo, dict(base="own", n_pairs=32, **FEW)),
    (grpo, dict(base="own", steps=2, **FEW))], ids=option_id)
def test_every_stage_runs_in_bfloat16_with_checkpointing(script, changes, user_folder):
    name = f"half_{script.__name__}"
    script.main(user_config(script, out=name, dtype="bfloat16", checkpointing=True, **changes))
    saved = files.load_checkpoint(user_folder / name / script.__name__)
    weights = saved.get("policy") or saved["reward_model"]
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert saved["gpt"]["dtype"] == "bfloat16"
    if script in (ppo, grpo):                            # also in bfloat16: the same products
        assert stage_log(user_folder, name, script)[0]["kl_ref"] == 0


# ---- weights, tokenizers and data of the user's

def test_every_stage_runs_on_weights_and_data_of_the_users_with_lora(user_run):
    home, results = user_run
    out = home / "out"
    log = stage_log(out, "own", ppo)
    assert log[0]["kl_ref"] == log[0]["kl_ref_k3"] == 0          # exactly: the weights are shared
    assert log[-1]["kl_ref"] != 0
    for script in (ppo, dpo, grpo):
        assert all("gold" not in line for line in stage_log(out, "own", script))
    assert "gold" not in results and "grammatical" not in results and "PPO, averaged" in results
    assert stage_log(out, "own", dpo)[0]["loss"] == pytest.approx(math.log(2))
    agreed = files.read_json(out / "own" / "reward_model" / "results.json")
    assert agreed["accuracy"] > 0.9 and "bayes_accuracy" not in agreed
    learned = files.read_json(out / "own" / "sft" / "results.json")
    assert learned["held_out_per_token"] < 0.8 * math.log(400)   # 400 tokens, all equally likely


def test_lora_trains_the_change_alone_and_the_next_stage_gets_it_merged(user_folder):
    own = user_folder / "own"
    saved = files.load_checkpoint(own / "ppo")
    start = files.load_checkpoint(own / "sft")
    for name, weight in start["policy"].items():                 # the base weights have not moved
        assert "lora" not in name and torch.equal(saved["policy"][name], weight), name
    for name, weight in saved["policy"].items():
        assert weight.any() or not name.endswith("lora_b"), name
    assert saved["critic"]["head.weight"].any()

    merged, tokenizer = sft.load_policy(own / "ppo", "cpu")
    unmerged = model.add_lora(GPT(merged.config), 2).eval()
    unmerged.load_state_dict(saved["policy"])
    sft_policy, _ = sft.load_policy(own / "sft", "cpu")
    ids = torch.randint(300, (4, 50), generator=seeded())
    torch.testing.assert_close(merged(ids), unmerged(ids), atol=1e-5, rtol=1e-5)
    assert (merged(ids) - sft_policy(ids)).abs().max() > 1e-4
    scorer = reward_model.load_reward_model(own / "reward_model", sft_policy, tokenizer, "cpu")
    stored = files.load_checkpoint(own / "reward_model")["reward_model"]
    assert any("lora" in name for name in stored)
    assert not any("lora" in name for name in scorer.state_dict())


def test_a_policy_that_lora_made_can_be_the_sft_policy_of_a_run(user_folder):
    """It is merged then, and also the reference."""
    shutil.copytree(user_folder / "own" / "ppo", user_folder / "again" / "sft")
    config = files.read_json(user_folder / "own" / "sft" / "config.json")
    config["out"] = "again"
    (user_folder / "again" / "sft" / "config.json").write_text(json.dumps(config))
    (user_folder.parent / "word.py").write_text(
        "def exclaims(prompts, responses):\n"
        "    return [r.count('!') + len(r) / 9 for r in responses]\n")
    ppo.main(user_config(ppo, out="again", reward="word.py:exclaims", steps=1, **FEW))
    assert stage_log(user_folder, "again", ppo)[0]["kl_ref"] == 0


@pytest.mark.parametrize("stage", ["sft", "ppo", "dpo", "grpo", "reward_model"])
def test_every_stage_is_exported_for_transformers_with_its_tokenizer(stage, user_folder, tmp_path):
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                              AutoTokenizer)
    own = user_folder / "own"
    exported = tmp_path / "exported"
    prompt = forms.read_record(comparison(7))[0]
    response = " Number 7 is good!"
    tokenizer = tokenizers.load_tokenizer(own / stage)
    eos = [tokenizer.eot_token]
    policy, _ = sft.load_policy(own / ("sft" if stage == "reward_model" else stage), "cpu")

    def logits_of(folder, kind=AutoModelForCausalLM):
        text = prompt + response + tokenizers.EOS
        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == tokenizer.encode_ordinary(prompt + response) + eos
        return ids, kind.from_pretrained(folder).eval()(ids).logits

    if stage == "reward_model":
        reward_model.export(own / stage, str(exported))
        _, theirs = logits_of(exported, AutoModelForSequenceClassification)
        ours = reward_model.load_reward_model(own / stage, policy, tokenizer, "cpu")
        batch = data.collate([tokenizer.encode_ordinary(prompt)],
                             [tokenizer.encode_ordinary(response) + eos])
        torch.testing.assert_close(theirs[0], sequence_scores(ours, *batch), atol=1e-4, rtol=0)
        return
    sft.export(own / stage, str(exported))
    ids, theirs = logits_of(exported)
    torch.testing.assert_close(theirs, policy(ids), atol=1e-4, rtol=1e-4)
    assert GPT.from_pretrained(exported).config.vocab_size == tokenizer.n_vocab
    if stage == "ppo":
        averaged, _ = sft.load_policy(own / stage, "cpu", "policy_ema")
        _, theirs = logits_of(tmp_path / "exported-ema")
        torch.testing.assert_close(theirs, averaged(ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("script, changes, message", [
    (sft, dict(init="gpt2", block_size=97),
     "block_size 97 .* longer than the 96 positions that gpt2 has weights for; lower it to that"),
    (sft, dict(init="nowhere"),
     "no tokenizer in nowhere: nowhere is not a folder here and could not be fetched from the hub "
     ".OSError.; check the spelling and the network"),
    (sft, dict(tokenizer="nowhere"), "no tokenizer in nowhere"),
    (sft, dict(n_texts=None, data="reviews"), "--n_texts none takes all"),
    (sft, dict(init="gpt2", tokenizer="other"),
     "the tokenizer has .* token ids, but gpt2 has weights for .*; they do not belong together"),
    (sft, dict(batch_size=500, n_texts=None),
     "there are .* texts to train on, less than one batch; lower --batch_size 500"),
    (sft, dict(block_size=45),
     "prompts of up to 40 tokens and --max_new_tokens 12 exceed the model's block_size 45"),
    (sft, dict(init="gpt2", max_prompt_tokens=90),
     "block_size 102 .* longer than the 96 positions"),
    (sft, dict(lora_rank=2), "fresh weights must all be trained. Give --init"),
    (reward_model, dict(base="own", n_prompts=None, batch_size=400),
     "there are 1.. comparisons to train on, less than one batch; lower --batch_size"),
    (dpo, dict(base="own", batch_size=300, n_pairs=400),
     "there are 1.. pairs to train on, less than one batch; lower --batch_size")], ids=option_id)
def test_weights_and_data_that_do_not_fit_are_refused(script, changes, message, user_folder,
                                                      monkeypatch):
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    if changes.get("tokenizer") == "other":
        other = tokenizers.train_tokenizer(review_texts(200, 0), 600)
        tokenizers.export_tokenizer(other, user_folder.parent / "other")
    given = {"lora_rank": 0} if script is sft else {}
    with pytest.raises(Stopped, match=message):
        script.main(user_config(script, out="refused", **(given | changes)))
    assert not (user_folder / "refused").exists()


def test_weights_and_tokenizers_come_from_the_hub_by_name(user_folder, monkeypatch):
    import huggingface_hub
    fetched = []
    copy_of_hub = "gpt2"

    def fetch(name, allow_patterns):
        fetched.append((name, allow_patterns))
        return copy_of_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    theirs = tokenizers.pretrained_tokenizer("someone/gpt")
    ours = tokenizers.load_tokenizer(user_folder / "own" / "sft")
    assert tokenizers.tokenizer_id(theirs) == tokenizers.tokenizer_id(ours)
    GPT.from_pretrained("someone/gpt")
    assert fetched == [("someone/gpt", ["*.json", "*.jinja", "merges.txt"]),
                       ("someone/gpt", ["*.json", "model*.safetensors"])]
    shutil.copytree("gpt2", "as_bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(load_file("gpt2/model.safetensors"), "as_bin/pytorch_model.bin")
    copy_of_hub = "as_bin"                               # older: it has no safetensors
    GPT.from_pretrained("someone/older")
    assert fetched[-1] == ("someone/older", ["*.json", "pytorch_model*.bin"])


def test_stages_start_from_a_checkpoint_of_nanogpt(user_folder, tmp_path):
    weights = nanogpt_weights(True, V=410, T=96, C=32)
    save_nanogpt(tmp_path / "ckpt.pt", weights, n_embd=32, block_size=96)
    small = dict(out="nano", init=str(tmp_path / "ckpt.pt"), lora_rank=0, batch_size=8)
    sft.main(user_config(sft, tokenizer="gpt2", steps=1, lr=1e-9, n_texts=None, n_eval=6, **small))
    policy, tokenizer = sft.load_policy(user_folder / "nano" / "sft", "cpu")
    assert policy.config.activation == "gelu"
    assert policy.config.vocab_size == tokenizer.n_vocab == 400          # those of the folder gpt2
    ours = policy.transformer
    torch.testing.assert_close(ours.h[1].mlp.c_fc.weight, weights["h.1.mlp.c_fc.weight"])
    torch.testing.assert_close(ours.wte.weight, weights["wte.weight"])   # 10 more, for no token
    reward_model.main(user_config(reward_model, n_prompts=40, n_held_out=10, **small))
    saved = files.load_checkpoint(user_folder / "nano" / "reward_model")
    assert saved["gpt"]["activation"] == "gelu"


def test_a_checkpoint_of_nanogpt_has_gpt2s_tokenizer_or_the_one_beside_it(user_folder, tmp_path,
                                                                          monkeypatch):
    path = tmp_path / "ckpt.pt"
    weights = nanogpt_weights(True, V=410, T=96, C=32)
    save_nanogpt(path, weights, n_embd=32, block_size=96)
    gpt2s = tokenizers.train_tokenizer(review_texts(200, 0), 500)        # for tiktoken's
    arguments = ("gpt2", gpt2s._pat_str, gpt2s._mergeable_ranks, gpt2s._special_tokens,
                 gpt2s.end_tokens)
    monkeypatch.setattr(tokenizers, "tiktoken_gpt2", lambda: arguments)
    with pytest.raises(Stopped, match="ckpt.pt has 410 token ids, fewer than GPT-2's 50257"):
        sft.tokenizer_of(str(path))
    save_nanogpt(path, weights, n_embd=32, block_size=96, vocab_size=50304)
    for source in (path, tmp_path):
        found = sft.tokenizer_of(str(source))
        assert tokenizers.tokenizer_id(found) == tokenizers.tokenizer_id(gpt2s)
    tokenizer = tokenizers.load_tokenizer(user_folder / "own" / "sft")
    tokenizers.export_tokenizer(tokenizer, tmp_path)
    beside = sft.tokenizer_of(str(path))
    assert tokenizers.tokenizer_id(beside) == tokenizers.tokenizer_id(tokenizer)

    pickled = tmp_path / "characters" / "meta.pkl"       # nanoGPT's list of characters
    pickled.parent.mkdir()
    pickled.write_bytes(pickle.dumps(Malicious(tmp_path / "owned")))
    for source in (pickled.parent, pickled):
        with pytest.raises(Stopped, match="meta.pkl, which lists characters for nanoGPT, is not "
                                          "read, since a pickle can run code"):
            sft.main(user_config(sft, out="refused", init="gpt2", tokenizer=str(source),
                                 lora_rank=0))
    assert not (tmp_path / "owned").exists() and not (user_folder / "refused").exists()


def test_a_reward_model_of_a_different_size_gives_the_critic_its_size(user_folder):
    wider = user_folder.parent / "wider"
    tokenizer = tokenizers.load_tokenizer(user_folder / "own" / "sft")
    sizes = dict(vocab_size=tokenizer.n_vocab + 3, n_positions=96, n_layer=2, n_head=2, n_embd=16)
    random_gpt2(0.02, **sizes).save_pretrained(wider)
    tokenizers.export_tokenizer(tokenizer, wider)
    small = dict(out="sized", base="own", lora_rank=0)
    reward_model.main(user_config(reward_model, init="wider", n_prompts=40, n_held_out=10, **small))
    ppo.main(user_config(ppo, steps=1, **FEW, **small))
    saved = files.load_checkpoint(user_folder / "sized" / "ppo")
    assert (saved["critic_gpt"]["n_layer"], saved["critic_gpt"]["n_embd"]) == (2, 16)
    assert saved["gpt"]["n_embd"] == 32
    assert saved["critic"]["transformer.wte.weight"].shape == (tokenizer.n_vocab + 3, 16)
    sample.main(tiny_config(sample, out="sized", stage="sft,ppo", n=1))
    foreign = tokenizers.train_tokenizer(review_texts(300, 0), tokenizer.n_vocab)
    tokenizers.export_tokenizer(foreign, wider)
    with pytest.raises(Stopped, match="wider uses a different tokenizer from the SFT policy"):
        reward_model.main(user_config(reward_model, out="sized-too", base="own", init="wider",
                                      n_prompts=40))


def test_everything_trained_for_the_reward_is_evaluated(user_folder, capsys):
    (user_folder / "tokens").mkdir(exist_ok=True)        # a folder in out/ that is not a run
    small = dict(lora_rank=0, n_eval=2, n_reference=4, n_samples=2)
    found = evaluate.main(user_config(evaluate, **small))
    assert {"SFT", "own/ppo", "own/ppo/ema", "own/dpo", "own/grpo"} <= set(found)
    assert "fraction" not in found["own/dpo"]
    assert "gold" not in (user_folder / "own" / "evaluate" / "report.md").read_text()
    shutil.copytree(user_folder / "own" / "grpo", user_folder / "old" / "grpo")
    saved = files.load_checkpoint(user_folder / "old" / "grpo")
    saved["reward"] = "0123456789abcdef"                         # as earlier versions stored it
    torch.save(saved, user_folder / "old" / "grpo" / "checkpoint.pt")
    evaluate.main(user_config(evaluate, runs="own,old", **small))
    said = capsys.readouterr().out
    assert "leaving out old/grpo: it was trained for a different reward" in said


def test_rl_takes_prompts_alone_from_a_base_and_sft_refuses_them_at_once(user_folder):
    rows = [{"prompt": f"Is {i} good?", "id": i} for i in range(90)]
    write_rows(user_folder.parent / "prompts.jsonl", rows)
    (user_folder.parent / "judge.py").write_text(
        "def score(prompts, responses): return [len(x) for x in responses]")
    given = dict(out="asked", data="prompts.jsonl")
    with pytest.raises(Stopped, match="SFT has nothing to learn from"):
        sft.main(user_config(sft, init="gpt2", lora_rank=0, **given))
    for script, changes in ((reward_model, {}), (ppo, {}), (dpo, dict(reward="judge.py:score"))):
        with pytest.raises(Stopped, match="no comparisons, only rows with one response or none"):
            script.main(user_config(script, **given, **changes))
    assert not (user_folder / "asked").exists()          # so no SFT policy was made first, either
    given |= dict(base="own", reward="judge.py:score", n_eval=2, n_samples=2)
    ppo.main(user_config(ppo, steps=1, **given))
    found = evaluate.main(user_config(evaluate, lora_rank=0, n_reference=4, **given))
    assert "asked/ppo" in found


# ---- rewards from classifiers and functions

def classifier_batch(tokenizer, prompts, responses):
    """-> inputs, targets, mask, finished: texts as a reward gets them, each with its EOS"""
    batch = data.collate(*tokenizers.encode_texts(tokenizer, prompts, responses))
    return *batch, torch.ones(len(prompts), dtype=torch.bool)


def classifier_logits(folder, texts):
    """By transformers, one text at a time; a long text keeps its last 12 tokens -> (B, labels)"""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    its_tokenizer = AutoTokenizer.from_pretrained(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = [its_tokenizer(text)["input_ids"][-12:] for text in texts]
    return torch.cat([theirs(torch.tensor([x])).logits for x in ids]).detach()


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
@pytest.mark.parametrize("labels", [1, 2, 3])
def test_a_classifier_rewards_the_label_that_is_named(labels, problem, classifiers, tokenizer,
                                                      tmp_path, capsys):
    """
    log p / (1 - p) of the label: p by softmax, or by sigmoid if labels may hold together. Without a
    name, the one logit or the second of two less the first.
    """
    folder = tmp_path / "c:d"                            # a colon that parts no label
    shutil.copytree(classifiers / str(labels), folder)
    names = ["mild", "not mild", "5 stars"][:labels]
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {}, "problem_type": problem}
    (folder / "config.json").write_text(json.dumps(config))
    prompts = ["the plot", "a good acting . the plot is not good", "", "see it . " * 9]
    responses = [" is good .", " is superb !", " superb", " the end is not good and far away ."]
    batch = classifier_batch(tokenizer, prompts, responses)
    logits = classifier_logits(folder, [x + y for x, y in zip(prompts, responses)]).double()
    p = logits.sigmoid() if problem or labels == 1 else logits.softmax(dim=1)
    made_for = set()
    for i, name in enumerate(names):
        capsys.readouterr()
        reward = load_own(tokenizer, f"{folder}:{name}", missing_eos_score=None)
        against = "all other labels" if labels == 3 else names[i - 1]
        told = f"log-odds of {name} against {against}"
        if problem or labels == 1:
            told = f"the logit of {name}"
        assert f"reward: {told}\n" in capsys.readouterr().out
        torch.testing.assert_close(reward(*batch).double(), p[:, i].logit(), atol=1e-4, rtol=1e-4)
        made_for.add(reward.made_for)
    assert len(made_for) == labels
    with pytest.raises(Stopped, match="c:d:mold, but that classifier has no label mold .did "
                                      "you mean mild.*; it has mild"):
        load_own(tokenizer, f"{folder}:mold")
    if labels < 3 and not problem:
        plain = load_own(tokenizer, str(folder), missing_eos_score=None)
        assert torch.equal(plain(*batch), reward(*batch))
        assert (plain.made_for == reward.made_for) == (labels == 2)
        assert re.fullmatch(re.escape(str(folder)) + " [0-9a-f]{16}", plain.made_for)
        empty = data.collate([[tokenizer.eot_token]], [[tokenizer.eot_token]])
        assert torch.isfinite(plain(*empty, torch.tensor([True]))).all()


def test_only_a_colon_before_a_label_or_a_function_parts_a_reward(empty_folder):
    for whole in (r"C:\models\c2", "owner/c2", "judge.py", r"C:\judge.py"):
        assert reward_py.split(whole) == (whole, "")
        assert reward_py.split(whole + ":a b") == (whole, "a b")
    (empty_folder / "run:2").mkdir()
    assert reward_py.split("run:2") == ("run:2", "")
    assert reward_py.split("run:2:x") == ("run:2", "x")


def test_a_roberta_reads_two_positions_less_than_it_has(tokenizer, classifiers, tmp_path):
    from transformers import AutoTokenizer, RobertaConfig, RobertaForSequenceClassification
    torch.manual_seed(0)
    RobertaForSequenceClassification(RobertaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, num_labels=1,
        pad_token_id=0)).save_pretrained(tmp_path)
    its_tokenizer = AutoTokenizer.from_pretrained(classifiers / "1")
    its_tokenizer.model_max_length = int(1e30)           # as transformers has it if none was given
    its_tokenizer.save_pretrained(tmp_path)
    batch = classifier_batch(tokenizer, ["see it . " * 9], [" is good ."])
    assert torch.isfinite(load_own(tokenizer, str(tmp_path))(*batch)).all()


def test_a_classifier_without_one_trained_number_to_give_is_refused(classifiers, tokenizer,
                                                                    tmp_path):
    with pytest.raises(Stopped, match="has 3 labels and a reward is one number; name the label to "
                                      "reward: .*/3:LABEL, with one of LABEL_0, "):
        load_own(tokenizer, str(classifiers / "3"))
    GPT(GPTConfig(20, 16, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path, eos_id=0)
    tokenizers.export_tokenizer(tokenizer, tmp_path)
    with pytest.raises(Stopped, match="has no weights for score.weight: it was not trained to "
                                      "classify"):
        load_own(tokenizer, str(tmp_path))


def with_weight(name, tensor):
    return lambda tensors: tensors | {name: tensor}


def without_queries(tensors):
    return {name: tensor for name, tensor in tensors.items() if "query.weight" not in name}


@pytest.mark.parametrize("weights, message", [
    pytest.param(prefixed("_orig_mod."), "", id="compiled"),
    pytest.param(prefixed("module._orig_mod."), "", id="compiled, parallel"),
    pytest.param(prefixed("base_model.model."), "", id="peft"),
    pytest.param(with_weight("bert.embeddings.position_ids", torch.arange(12)[None]), "",
                 id="positions"),
    pytest.param(prefixed("foo."), "has no weights for bert.embeddings", id="foreign"),
    pytest.param(with_weight("cls.predictions.bias", torch.zeros(3)),
                 "does not use: cls.predictions.bias", id="unknown"),
    pytest.param(with_weight("classifier.weight", torch.zeros(5, 16)),
                 r"has classifier.weight of shape \(5, 16\), and its config.json wants \(1, 16\)",
                 id="shape"),
    pytest.param(without_queries, "has no weights for .*query", id="missing"),
    pytest.param("adapter_config.json", "holds an adapter .LoRA.*; merge it into them first",
                 id="adapter")])
def test_a_classifiers_weights_all_load_or_are_refused_by_name(weights, message, classifiers,
                                                               tokenizer, tmp_path):
    batch = classifier_batch(tokenizer, ["the plot"], [" is good"])
    expected = load_own(tokenizer, str(classifiers / "1"))
    folder = tmp_path / "x"
    shutil.copytree(classifiers / "1", folder)
    if isinstance(weights, str):
        (folder / weights).write_text("{}")
    else:
        tensors = load_file(folder / "model.safetensors")
        save_file(weights(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    if message:
        with pytest.raises(Stopped, match=f"^error: --reward .*{message}"):
            load_own(tokenizer, str(folder))
    else:
        reward = load_own(tokenizer, str(folder))
        assert torch.equal(reward(*batch), expected(*batch))
        changed = {"classifier.bias": tensors["classifier.bias"] + 1}
        save_file(tensors | changed, folder / "model.safetensors", metadata={"format": "pt"})
        assert load_own(tokenizer, str(folder)).made_for != reward.made_for     # other weights


def test_an_exported_reward_model_is_the_same_reward_as_before(tiny, tmp_path):
    policy, tokenizer, scorer = tiny.models()
    exported = str(tmp_path / "exported")
    reward_model.export(tiny.out / "tiny" / "reward_model", exported)
    batch, responses = sampled_batch(policy, tokenizer, held_out_prompts(tokenizer, 20))
    theirs = load_own(tokenizer, exported, missing_eos_score=-3.0)(*batch)
    ours = reward_of(scorer, tiny_config(ppo))(*batch)
    texts = [ids[:-1] for ids in responses]
    same = torch.tensor([tokenizer.encode_ordinary(tokenizer.decode(ids)) == ids for ids in texts])
    same = same & batch[3]                               # finished, the text gives the ids again
    assert same.sum() > 4
    torch.testing.assert_close(theirs[same], ours[same], atol=1e-4, rtol=0)


LENGTH = "def length(prompts, responses):\n    return [1000 + 7 * len(r) for r in responses]\n"


def test_any_reward_is_normalised_on_samples_of_the_sft_policy(tiny, capsys):
    (tiny.out.parent / "length.py").write_text(LENGTH)
    policy, tokenizer, _ = tiny.models()
    train, _ = data.prompts(tiny_config(ppo), tokenizer, 72)

    def load(**changes):
        cfg = tiny_config(ppo, reward="length.py:length", **changes)
        return reward_py.load_reward(cfg, policy, tokenizer, train, "cpu")

    reward = load(missing_eos_score=None)
    prompts = data.draw(train, 2000, seeded(5))
    (inputs, targets, mask, finished), _ = sampled_batch(policy, tokenizer, prompts, 6)
    scores = reward(inputs, targets, mask, finished)
    assert abs(scores.mean()) < 4 * (1 / 512 + 1 / 2000) ** 0.5
    assert scores.std().item() == pytest.approx(1, abs=0.1)
    _, responses = data.texts_of(tokenizer, inputs, targets, mask)
    raw = torch.tensor([1000.0 + 7 * len(response) for response in responses])
    torch.testing.assert_close(scores, reward.gain * raw + reward.bias, atol=1e-3, rtol=1e-4)

    tiny.run(ppo, "length", reward="length.py:length", steps=2)
    said = capsys.readouterr().out
    assert "length.py:length has mean 1" in said
    assert "the critic starts from the SFT policy" in said       # although --critic_init is rm
    saved = tiny.checkpoint("length", ppo)["reward"]
    assert (saved["gain"], saved["bias"]) == (reward.gain, reward.bias)
    assert load(seed=3).state_dict() == saved            # the same for each seed, as evaluate needs
    assert list(tiny.evaluate("length", reward="length.py:length")) == ["SFT", "length/ppo"]
    plain = load(normalise_reward=False)
    assert (plain.gain, plain.bias) == (1.0, 0.0)
    assert reward.matches(saved) and not plain.matches(saved)
    assert reward.matches(saved | {"gain": 1.05 * saved["gain"]})


@pytest.mark.parametrize("script, changes", [
    (ppo, dict(steps=2)),
    (grpo, dict(steps=2)),
    (policy_gradient, dict(steps=2, rung="clip")),
    (dpo, dict(n_pairs=32, labels="soft"))], ids=option_id)
def test_every_stage_follows_a_reward_of_the_users(script, changes, tiny):
    (tiny.out.parent / "length.py").write_text(LENGTH)
    given = dict(reward="length.py:length", **changes)
    log, _ = tiny.run(script, "by_length", **given)
    folder = tiny.out / "by_length" / script.__name__
    made_for = files.load_checkpoint(folder)["reward"]["made_for"]
    assert made_for.startswith("length.py:length ")
    assert abs(log[0]["score"]) < 3                      # normalised: raw ones are above 1000
    (tiny.out.parent / "length.py").write_text(LENGTH.replace("1000 + 7 *", "-"))
    (folder / "report.txt").unlink()                     # as if it had been interrupted
    with pytest.raises(Stopped, match="started with a different reward .length.py:length"):
        tiny.run(script, "by_length", resume=True, **given)


# ---- sample.py

def test_samples_are_shown_side_by_side_with_scores(tiny, capsys):
    sample.main(tiny_config(sample, stage="sft,ppo,ladder/policy_gradient/clip", score=True, n=8,
                            max_new_tokens=12))
    said = capsys.readouterr().out
    _, tokenizer, scorer = tiny.models()
    prompts = held_out_prompts(tokenizer, 8, 1337)
    batch, responses = sampled_batch(tiny.policy(ppo), tokenizer, prompts, 1337, longest=12)
    scores = reward_of(scorer, tiny_config(ppo))(*batch)
    for prompt, ids, score, ended in zip(prompts, responses, scores, batch[3], strict=True):
        text, _ = tokenizers.decode_response(tokenizer, ids)
        shown = text if ended else f"{text} .."          # cut at --max_new_tokens
        assert f"    ppo  score {score:.2f} {shown}\n" in said
        assert tokenizer.decode(prompt) in said
    assert batch[3].any() and not batch[3].all()
    assert said.count("\n    sft  score") == said.count("ladder/policy_gradient/clip  score") == 8


def test_a_prompt_of_the_users_is_answered_greedily_the_same_way_each_time(tiny, capsys):
    shutil.copytree(tiny.out / "tiny", tiny.out / "half_damaged")
    (tiny.out / "half_damaged" / "dpo" / "config.json").write_text("{")    # is not asked
    sample.main(tiny_config(sample, out="half_damaged", stage="ppo", prompt=TINY_PROMPT,
                            temperature=0.0, n=2))
    shutil.rmtree(tiny.out / "half_damaged")
    prompt, *answers = capsys.readouterr().out.strip("\n").split("\n")
    assert prompt == TINY_PROMPT and len(answers) == 2 and answers[0] == answers[1]
    policy, tokenizer = sft.load_policy(tiny.out / "tiny" / "ppo", "cpu")
    ids = tokenizers.encode_prompt(tokenizer, TINY_PROMPT)
    _, responses = sampled_batch(policy, tokenizer, [ids], temperature=0)
    text, _ = tokenizers.decode_response(tokenizer, responses[0])
    assert answers[0].startswith("    ppo ") and text in answers[0]


def test_only_sampling_takes_a_temperature_of_zero():
    assert settings.parse(sample.Config, "", ["--temperature", "0"]).temperature == 0
    with pytest.raises(Stopped, match="--temperature got 0.0; it takes a number above 0"):
        settings.parse(ppo.Config, "", ["--temperature", "0"])


@pytest.mark.parametrize("quantity", ["kl", "value", "advantage"])
def test_tokens_are_shown_with_what_ppo_computes_of_them(quantity, tiny, capsys):
    sample.main(tiny_config(sample, stage="sft,ppo", tokens=quantity, n=2))
    said = capsys.readouterr().out
    reference, tokenizer, scorer = tiny.models()
    policy = tiny.policy(ppo)
    saved = tiny.checkpoint("tiny", ppo)
    critic = ScalarGPT(GPTConfig(**saved["critic_gpt"])).eval()
    critic.load_state_dict(saved["critic"])
    prompts = held_out_prompts(tokenizer, 2, 1337)
    (*batch, finished), responses = sampled_batch(policy, tokenizer, prompts, 1337)
    inputs, _, mask = batch
    logprobs, ref_logprobs = (token_logprobs(p, *batch).detach() for p in (policy, reference))
    values = critic(inputs).detach() * mask
    scores = reward_of(scorer, tiny_config(ppo))(*batch, finished)
    beta = saved["control"]["beta"]
    rewards = ppo.shape_rewards(scores, logprobs, ref_logprobs, mask, beta)
    shown = {"kl": logprobs - ref_logprobs, "value": values,
             "advantage": ppo.gae(rewards, values, mask, 1.0, 1.0)[0]}[quantity]
    for row, m, ids in zip(shown, mask, responses):
        words = [tokenizer.decode_single_token_bytes(i).decode(errors="replace") for i in ids]
        expected = "".join(f"{word}[{x:+.2f}]" for word, x in zip(words, row[m > 0], strict=True))
        assert f"    ppo {expected}\n" in said
    assert ("(it has no critic)" in said) == (quantity != "kl") and "\033" not in said


def test_colours_tell_size_and_sign_and_are_for_terminals_that_have_them(monkeypatch):
    text = sample.paint(["a", "b", "c", "d"], [2.0, 0.1, -2.0, -0.9], 2.0, colour=True)
    shades = [int(x) for x in re.findall(r"48;5;(\d+)m", text)]
    assert shades == [sample.BLUES[4], sample.BLUES[0], sample.ORANGES[4], sample.ORANGES[2]]
    assert re.sub(r"\033\[[\d;]*m", "", text) == "abcd"
    assert sample.paint(["a", " b"], [2.0, -0.125], 2.0, colour=False) == "a[+2.00] b[-0.12]"
    terminal = types.SimpleNamespace(isatty=lambda: True)
    file = types.SimpleNamespace(isatty=lambda: False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert sample.in_colour(terminal) and not sample.in_colour(file)
    monkeypatch.setenv("NO_COLOR", "")
    assert not sample.in_colour(terminal)


def test_a_stage_is_sampled_with_the_data_and_the_reward_it_was_made_with(user_folder, capsys):
    for names, run in (("sft,ppo,ppo/ema", "own"), ("own/sft,own/ppo,own/ppo/ema", "")):
        sample.main(tiny_config(sample, out=run, stage=names, score=True, tokens="value", n=2))
        said = capsys.readouterr().out
        assert said.count("Tell me about number") == said.count("ppo/ema  score") == 2
        assert "using out/own/sft" in said
    sft.main(user_config(sft, out="alone", init="gpt2", steps=2, n_texts=None, n_eval=10,
                         batch_size=8, lora_rank=0))
    with pytest.raises(Stopped, match="own/ppo started from a different SFT policy than this"):
        sample.main(tiny_config(sample, stage="alone/sft,own/ppo", tokens="kl"))


# ---- presets

SMALL_STAGES = {
    sft: dict(init="gpt2", block_size=60, steps=2, batch_size=4, n_eval=6),
    reward_model: dict(batch_size=8, n_held_out=8),
    ppo: dict(steps=1, batch_size=8, minibatch_size=4, n_eval=2, n_samples=2),
    dpo: dict(n_pairs=24, batch_size=8, n_eval=2, n_samples=2),
    grpo: dict(steps=1, batch_size=16, minibatch_size=8, n_eval=2, n_samples=2),
    evaluate: dict(n_eval=2, n_reference=4, n_samples=2),
    sample: dict(stage="sft,ppo", n=1)}


@pytest.mark.parametrize("name", sorted(set(presets.PRESETS) - {"small", "tiny"}))
def test_every_preset_runs_on_a_small_model_and_a_small_file(name, user_folder, classifiers,
                                                             monkeypatch):
    """All its stages. Only sizes and sources are changed; the rest is the preset's."""
    source = "pairs.jsonl"
    if name == "imdb":
        rows = [{"text": f"{i} is a good film of many" + "!" * (i % 5), "label": 1}
                for i in range(160)]
        source = write_rows(user_folder.parent / "imdb.jsonl", rows)
    scripts = [script for script in SMALL_STAGES if name in script.Config.presets]
    for script in scripts:                               # some stages are made by later ones
        changed = script.Config.presets[name] | SMALL_STAGES[script]
        monkeypatch.setitem(script.Config.presets, name, changed)
    for script in scripts:
        preset = script.Config(config=name)
        small = dict(out=f"preset_{name}", data=source, device="cpu", max_new_tokens=12,
                     max_prompt_tokens=min(preset.max_prompt_tokens, 40))
        if getattr(preset, "reward", "reward_model") != "reward_model":
            small["reward"] = str(classifiers / "2")
        if script is evaluate:
            small["runs"] = f"preset_{name}"
        script.main(dataclasses.replace(preset, **small))
    assert {"all", *(script.__name__ for script in scripts)} == set(presets.PRESETS[name])


# ---- an instruct model, as it is

@pytest.fixture(scope="module")
def instruct(tmp_path_factory):
    """A folder with a small Qwen3, its tokenizer and template; files of prompts, pairs, a reward"""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    home = tmp_path_factory.mktemp("instruct")
    texts = [f"What is {a} + {b}? It is {a + b}." for a in range(10, 40) for b in range(10, 30)]
    trained = tokenizers.train_tokenizer(texts, 300)
    special = trained._special_tokens | {"<|im_start|>": trained.n_vocab,
                                         "<|im_end|>": trained.n_vocab + 1}
    tokenizer = tokenizers.encoding("trained", trained._pat_str, trained._mergeable_ranks, special,
                                    trained.end_tokens)
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=tokenizer.n_vocab + 5, hidden_size=16, intermediate_size=24, head_dim=8,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=200))
    made.save_pretrained(home / "model")
    chatty = chat.set_chat(tokenizer, "chatml", "", None)
    tokenizers.export_tokenizer(chatty, home / "model", chat_template=chat.jinja_of(chatty))
    rows = [{"prompt": f"What is {a} + {b}?"} for a in range(10, 22) for b in range(10, 20)]
    write_rows(home / "prompts.jsonl", rows)
    write_rows(home / "pairs.jsonl", [row | {"chosen": "It is 9.", "rejected": "No."}
                                      for row in rows])
    (home / "short.py").write_text(
        "def short(prompts, responses):\n"
        "    assert all('<|im_start|>user' in prompt for prompt in prompts)\n"
        "    return [-float(len(response)) for response in responses]\n")
    return home


CHATTY = dict(config="smollm2", init="model", device="cpu", dtype="float32", max_prompt_tokens=60,
              max_new_tokens=10, n_eval=4, n_samples=2, batch_size=8)


def test_rl_starts_at_once_on_an_instruct_model_and_gives_one_back(instruct, monkeypatch, capsys,
                                                                   no_pictures):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    monkeypatch.chdir(instruct)
    grpo.main(grpo.Config(**CHATTY, data="prompts.jsonl", reward="short.py:short", steps=2,
                          minibatch_size=8, group_size=4, lr=1e-3, missing_eos_score=None,
                          export="trained"))
    said = capsys.readouterr().out
    assert "imported      model as it is: 0.0M parameters" in said and "chatml" in said
    policy, tokenizer = sft.load_policy(Path("out/smollm2/sft"), "cpu")
    original = GPT.from_pretrained("model").state_dict()
    assert all(torch.equal(x, original[name]) for name, x in policy.state_dict().items())
    log = log_of(Path("out/smollm2/grpo"))
    assert len(log) == 2 and log[0]["kl_ref"] == 0 and log[1]["kl_ref"] != 0
    assert tokenizer.decode([tokenizer.eot_token]) == "<|im_end|>" and tokenizer.chat == "chatml"

    trained, _ = sft.load_policy(Path("out/smollm2/grpo"), "cpu")
    back = AutoModelForCausalLM.from_pretrained("trained").eval()
    its_tokenizer = AutoTokenizer.from_pretrained("trained")
    assert back.generation_config.eos_token_id == list(tokenizer.end_tokens)
    ids = its_tokenizer.apply_chat_template([{"role": "user", "content": "What is 10 + 11?"}],
                                            add_generation_prompt=True)["input_ids"]
    prompt = encode_prompt(tokenizer, chat.written([("user", "What is 10 + 11?")], "chatml"))
    assert ids == prompt
    with torch.no_grad():
        logits = back(torch.tensor([ids])).logits[..., :tokenizer.n_vocab]
        torch.testing.assert_close(logits, trained(torch.tensor([ids])), atol=1e-5, rtol=1e-5)

    with pytest.raises(Stopped, match="made with --init model, but this is --init other; give"):
        ppo.main(ppo.Config(**CHATTY | dict(init="other"), data="prompts.jsonl",
                            reward="short.py:short", minibatch_size=8))
    other_data = ppo.Config(**CHATTY, data="pairs.jsonl", minibatch_size=8)
    assert runs.ensure(other_data, sft, init="./model").name == "sft"    # it has trained on no data
    typed = iter(["What is 10 + 11?", "And 12?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    sample.main(sample.Config(config="smollm2", device="cpu", dtype="float32", stage="grpo",
                              talk=True, max_new_tokens=90))
    said = capsys.readouterr().out
    assert said.count("grpo: ") == 2 and "the first two turns are forgotten" in said


@pytest.mark.parametrize("script, changes", [
    (sft, dict(steps=2, n_texts=None)), (reward_model, dict(init="", n_held_out=8)),
    (dpo, dict(n_pairs=16)), (ppo, dict(steps=1, minibatch_size=8))], ids=option_id)
def test_every_stage_trains_on_dialogues(script, changes, instruct, monkeypatch, no_pictures):
    """The responses of the data end with the token that ends a turn."""
    monkeypatch.chdir(instruct)
    fields = {field.name for field in dataclasses.fields(script.Config)}
    settings_of = {name: x for name, x in (CHATTY | changes).items() if name in fields}
    out = "trained" if script is sft else "dialogues"
    if script is reward_model:
        chatty = {name: x for name, x in CHATTY.items() if name not in ("n_eval", "n_samples")}
        sft.main(sft.Config(**chatty, data="pairs.jsonl", out=out))
    script.main(script.Config(**settings_of, data="pairs.jsonl", out=out, accumulation=2))
    tokenizer = tokenizers.load_tokenizer(Path("out") / out / script.__name__)
    cfg = sft.Config(config="smollm2", data="pairs.jsonl", max_prompt_tokens=60, max_new_tokens=10)
    train, _ = data.demonstrations(cfg, tokenizer, 70, None, 1)
    prompt, response = train[0]
    assert tokenizer.decode(prompt).startswith("<|im_start|>user\nWhat is")
    assert tokenizer.decode(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(response) == "It is 9.<|im_end|>"


def test_reviews_are_no_dialogues_whatever_the_models_template(instruct, monkeypatch):
    monkeypatch.chdir(instruct)
    assert sft.choose_tokenizer(tiny_config(sft, init="model")).chat == "plain"
    assert sft.choose_tokenizer(tiny_config(sft, init="model", data="hh")).chat == "chatml"


def test_a_dialogue_that_is_too_long_is_left_out_and_said(instruct, monkeypatch, capsys):
    monkeypatch.chdir(instruct)
    rows = []
    for i in range(40):
        repeats = 21 if i % 5 == 0 else 1
        rows.append({"prompt": f"What is {i} + 1? " * repeats, "completion": "It is 2."})
    write_rows(instruct / "long.jsonl", rows)
    tokenizer = sft.tokenizer_of("model", "auto")
    cfg = sft.Config(config="smollm2", data="long.jsonl", max_prompt_tokens=60, max_new_tokens=10)
    data.demonstrations(cfg, tokenizer, 70, None, 1)
    assert "8 more left out, a dialogue longer than --max_prompt_tokens" in capsys.readouterr().out


@pytest.mark.parametrize("changes, message", [
    (dict(steps=0), "--steps 0 uses weights as they are, so it needs --init FOLDER"),
    (dict(chat="chatml"), "--chat chatml writes special tokens, which a tokenizer trained here"),
    (dict(init="nobody/nothing"), "nobody/nothing is not a folder here and could not be fetched"),
    (dict(init="empty"), "--init empty: empty has no weights"),
    (dict(init="model", steps=0, block_size=300), "block_size 300 .* is longer than the 200 posit"),
    (dict(init="model", tokenizer="other"), "has 610 token ids, but model has weights for 30")])
def test_instruct_models_that_do_not_fit_are_refused(changes, message, instruct, monkeypatch):
    monkeypatch.chdir(instruct)
    (instruct / "empty").mkdir(exist_ok=True)
    shutil.copy("model/config.json", "empty")
    if "tokenizer" in changes:
        texts = review_texts(200, 0)
        tokenizers.export_tokenizer(tokenizers.train_tokenizer(texts, 610), "other")
    with pytest.raises(Stopped, match=message):
        sft.main(tiny_config(sft, out="refused", **({"data": "pairs.jsonl"} | changes)))
    assert not Path("out/refused").exists()


@needs_smollm2
def test_smollm2_lowers_its_loss_in_sft_dpo_and_grpo(tmp_path, monkeypatch, no_pictures):
    """On eight rows, which are every batch, so the loss of update 1 is after one step on them"""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {i} + {i}?", "chosen": f"{2 * i}", "rejected": "I do not know."}
            for i in range(10, 22)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "short.py").write_text("def short(p, r):\n    return [-float(len(x)) for x in r]\n")
    small = dict(config="smollm2", init=SMOLLM2, data="pairs.jsonl", device="cpu", dtype="float32",
                 max_prompt_tokens=40, max_new_tokens=8, n_eval=1, batch_size=8)
    sft.main(sft.Config(**small, steps=2, warmup=0, n_texts=8, out="sft"))
    log = log_of(tmp_path / "out" / "sft" / "sft")
    assert log[1]["loss"] < log[0]["loss"]
    few = small | dict(n_samples=1, reward="short.py:short", missing_eos_score=None)
    dpo.main(dpo.Config(**few, n_pairs=8, epochs=2, lr=1e-5, warmup=0, accumulation=2, out="dpo"))
    log = log_of(tmp_path / "out" / "dpo" / "dpo")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert log[1]["loss"] < log[0]["loss"]
    means = []                                           # of the loss, over the epochs
    for epochs in (1, 2):
        grpo.main(grpo.Config(**few, steps=1, minibatch_size=8, epochs=epochs, group_size=8,
                              warmup=0, accumulation=2, out=f"grpo{epochs}"))
        means.append(log_of(tmp_path / "out" / f"grpo{epochs}" / "grpo")[0]["policy_loss"])
    assert 2 * means[1] - means[0] < means[0]            # the second epoch's below the first's


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_fresh_model_of_another_family_learns_the_reviews(architecture, empty_folder,
                                                            no_pictures):
    results = sft.main(tiny_config(sft, architecture=architecture, out=architecture))
    log = log_of(Path("out") / architecture / "sft")
    assert log[0]["held_out"] > 100 and results["held_out"] < 60


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1337, 1, 2])
def test_the_small_run_reaches_its_figures(seed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())                # as the command has; other tests take one
    started = time.time()
    try:
        results = ppo.main(ppo.Config(config="small", seed=seed))
    finally:
        torch.set_num_threads(threads)
    taken = time.time() - started
    learned = files.read_json(tmp_path / "out/small/sft/results.json")
    assert learned["above_entropy"] < 0.8 and learned["grammatical"] > 0.95
    assert files.read_json(tmp_path / "out/small/reward_model/results.json")["ratio"] > 0.90
    assert results["gold_gain"] > 1.3 and results["kl_ref"] < 5
    assert taken < 240


# --------------------------------------------------------------------------------------------------
# The house: what holds for every file

ORDER = ("presets", "model", "sampler", "reviews", "data", "sft", "reward_model", "reward",
         "frontier", "compare", "rollout", "ppo", "dpo", "grpo", "policy_gradient", "evaluate",
         "sample")
ROOT = [HERE / f"{name}.py" for name in ORDER]
LAB = sorted(path for path in (HERE / "lab").glob("*.py") if path.name != "test_lab.py")
TESTS = [HERE / "test_all.py", HERE / "conftest.py", HERE / "lab" / "test_lab.py"]
PAGES = {path: path.read_text(encoding="utf-8")
         for path in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md")))}
README = "\n".join(PAGES.values())                       # and docs/


def nodes_of(path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imports_of(path):
    """The packages and modules that a file imports, also within functions -> set of names"""
    names = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module.split(".")[0])
    return names


def test_imports_point_one_way():
    """Each file imports only from those before it; the workshop, lab, is before all."""
    assert sorted(ORDER) == sorted(module.__name__ for module in MODULES)
    later_files = {path: ORDER for path in LAB}
    later_files |= {path: ORDER[i:] for i, path in enumerate(ROOT)}
    for path, later in later_files.items():
        wrong = imports_of(path) & {*later, "conftest", "test_all"}
        assert not wrong, f"{path.name} imports {wrong}"


def long_lines(path, limit=100):
    """
    Lines longer than 100 columns -> list of FILE:LINE

    In Markdown not those that cannot be broken: tables, lines with a URL, pictures, formulas, and
    what a program printed, in ```text blocks.
    """
    block = ""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.startswith("```"):
            block = "" if block else line
        unbroken = block == "```text" or re.match(r"\s*(\||!\[|\$\$)|.*://", line)
        if len(line) > limit and not (path.suffix == ".md" and unbroken):
            found.append(f"{path.relative_to(HERE)}:{number}")
    return found


def test_no_line_is_longer_than_100_columns():
    found = [line for path in (*ROOT, *LAB, *TESTS, *PAGES) for line in long_lines(path)]
    assert not found, f"{len(found)} lines: {' '.join(found)}"


def test_presets_name_stages_and_fields_that_exist_with_values_they_take():
    stages = {script.__name__: script for script in (*SCRIPTS, sample)}
    for name, preset in presets.PRESETS.items():
        assert set(preset) <= {"all", *stages}
        for stage in set(preset) - {"all"}:
            cfg = stages[stage].Config(config=name)      # TypeError, if a field does not exist
            settings.check_fields(cfg)
            for field, value in (preset["all"] | preset[stage]).items():
                assert getattr(cfg, field) == value, (name, stage, field)


@pytest.mark.parametrize("path", [*ROOT, *LAB], ids=lambda path: path.name)
def test_no_file_of_the_project_can_run_what_it_reads(path):
    """
    No exec, eval or pickle; torch.load with weights_only, numpy.load without pickles; the user's
    own code in guest alone
    """
    for node in nodes_of(path):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "marshal", "shelve", "dill", "joblib", "runpy"} & set(names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "__import__", "compile")
            assert called.split(".")[-1] != "exec_module" or path.name == "guest.py"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called != "torch.load" or keywords["weights_only"] == "True"
            assert called != "np.load" or "allow_pickle" not in keywords


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_every_config_field_is_read_and_has_a_comment_that_help_prints(script, capsys):
    sources = "".join(map(inspect.getsource, (script, runs, process, settings)))
    for part in (reward_py.load_reward, reward_py.Reward, compare.compare, ppo.roll_out,
                 ppo.score_rollout, ppo.check_kl_ref, ppo.check_first_ratio):
        if part.__name__ in sources:                     # these are given the whole cfg
            sources += inspect.getsource(part)
    sources += inspect.getsource(data) + inspect.getsource(corpus)
    read = set(re.findall(r"\bcfg\.(\w+)", sources))
    if "cfg.compute_options()" in sources:
        read |= {"dtype", "checkpointing"}
    fields = {field.name for field in dataclasses.fields(script.Config)}
    assert fields <= read, f"never read: {fields - read}"
    with pytest.raises(SystemExit):
        settings.parse(script.Config, script.__doc__, ["--help"])
    printed = capsys.readouterr().out
    for name in fields:
        assert re.search(rf"^  --{name} .*\S.*", printed, re.M), name
    assert len(script.Config.__annotations__) <= 36


def test_the_sampler_uses_no_attention_that_plans_for_each_length(monkeypatch):
    enabled = []                                         # whether cuDNN may be used, at each call
    attention = torch.nn.functional.scaled_dot_product_attention

    def recorded(*args, **kwargs):
        enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **kwargs)
    monkeypatch.setattr(model.F, "scaled_dot_product_attention", recorded)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for _ in range(2):
        generate(small_gpt(), [[1, 2]], 3, 10)
    assert len(enabled) > 4 and not any(enabled)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_importing_any_file_does_nothing(tmp_path):
    names = [*ORDER, *(f"lab.{path.stem}" for path in LAB if path.stem != "__init__")]
    code = ("import socket; socket.socket.connect = None\n"
            f"import {', '.join(names)}, sys\n"
            "print('transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "False", "")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# README.md and docs/

# A row of the table of formulas: `ppo.gae` | [ppo.py:147](ppo.py#L147) | `test_gae_..`
ROW = re.compile(
    r"\| `(\w+)\.(\w+)` \| \[\w+\.py:(\d+)\]\((?:\.\./)?\w+\.py#L\d+\) \| `(\w+)` \|")
# A row of the reading table: [`ppo.py`](ppo.py) | 572
READING = re.compile(r"^\| (\[`\w+\.py`\][^|]*) \| (\d+) \|", re.M)
# The sections and their lines in the docstring of this file, and a section's banner
CONTENTS = re.compile(r"(?<=\n    line   section\n)(    *\d+  .*\n)+")
BANNER = re.compile(r"# -{98}\n# (.*)")


def line_of(module_name, name):
    return inspect.getsourcelines(getattr(sys.modules[module_name], name))[1]


def formula_row(match):
    module, name, _, test = match.groups()
    up = "../" if "](../" in match[0] else ""
    line = line_of(module, name)
    return f"| `{module}.{name}` | [{module}.py:{line}]({up}{module}.py#L{line}) | `{test}` |"


def reading_row(match):
    files_of_row = re.findall(r"`(\w+\.py)`", match[1])
    n_lines = sum((HERE / name).read_text(encoding="utf-8").count("\n") for name in files_of_row)
    return f"| {match[1]} | {n_lines} |"


def with_contents(source):
    """A test file's source with the lines of its sections as they are now in its docstring"""
    lines = []
    for match in BANNER.finditer(source):
        number = source.count("\n", 0, match.start(1)) + 1
        lines.append(f"    {number:4}   {match[1]}\n")
    return CONTENTS.sub(lambda match: "".join(lines), source)


def up_to_date(path):
    """A file's text with its generated numbers as they are now"""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return with_contents(with_contents(text))        # a new section moves all others
    return READING.sub(reading_row, ROW.sub(formula_row, text))


GENERATED = (HERE / "test_all.py", HERE / "README.md", HERE / "docs" / "maths.md")


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_line_numbers_are_up_to_date(path):
    current = up_to_date(path).split("\n")
    written = path.read_text(encoding="utf-8").split("\n")
    assert written == current, "run python test_all.py, which rewrites the line numbers"


def test_the_tables_name_every_formula_file_and_section():
    rows = ROW.findall(PAGES[HERE / "docs" / "maths.md"])
    assert len(rows) > 40 and len(ROW.findall(PAGES[HERE / "README.md"])) == 5
    for module_name, name, line, test in ROW.findall(README):
        assert int(line) == line_of(module_name, name)
        assert test in globals(), test
    assert set(COPIED) <= {name for _, name, _, _ in rows}
    in_table = re.findall(r"`(\w+)\.py`", " ".join(cell for cell, _ in READING.findall(README)))
    assert {*in_table, "presets"} == {*ORDER, "test_all"}
    assert CONTENTS.search(__doc__)[0].count("\n") == len(BANNER.findall(inspect.getsource(
        sys.modules[__name__]))) > 10


# ---- what the pages say about the code

SCRIPT_FILES = {f"{script.__name__}.py": script for script in (*SCRIPTS, sample)}


def script_of(command):
    """-> the script that a command runs or None, its arguments"""
    for i, word in enumerate(command[:3]):               # python first_nan.py ppo.py
        if word in SCRIPT_FILES:
            return SCRIPT_FILES[word], command[i + 1:]
    return None, []


def commands_in_blocks(text):
    """The commands of a page's bash blocks -> list of lists of words"""
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for is_break, command in itertools.groupby(words, ("&&", "|", ";").__contains__):
                if not is_break:
                    commands.append(list(command))
    return commands


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def code_in_lines(text):
    """The `code` within a page's paragraphs and tables -> list of texts"""
    return re.findall(r"`([^`]+)`", without_blocks(text))


def commands_in_lines(text):
    """
    The scripts with options in a page's `code` -> list of lists of words

    A single capital letter, as in  sft.py D --out hh,  stands for other options. An option at the
    end, as in  sft.py --init,  is only named.
    """
    commands = []
    for code in code_in_lines(text):
        words = [word for word in code.split() if not re.fullmatch("[A-Z]", word)]
        if "--" in code and script_of(words)[0]:
            if words[-1].startswith("--"):
                words.pop()
            commands.append(words)
    return commands


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_parses(page):
    text = PAGES[page]
    for command in commands_in_blocks(text) + commands_in_lines(text):
        script, arguments = script_of(command)
        if script and "--help" not in arguments:
            settings.parse(script.Config, "", arguments)
    options = {"help"}
    for script in SCRIPT_FILES.values():
        options |= {field.name for field in dataclasses.fields(script.Config)}
    for code in code_in_lines(text):
        if code.startswith("--") or script_of(code.split())[0]:
            assert set(re.findall(r"--([\w-]+)", code)) <= options, code


def test_commands_are_found_on_the_pages():
    """So the test above has something to check."""
    commands = [command for text in PAGES.values() for command in commands_in_blocks(text)]
    assert sum(script_of(command)[0] is not None for command in commands) >= 30
    inline = [command for text in PAGES.values() for command in commands_in_lines(text)]
    assert len(inline) >= 10
    assert commands_in_blocks("```bash\na && python ppo.py \\\n    --lr 1  # fast\n\nb | c\n```") \
        == [["a"], ["python", "ppo.py", "--lr", "1"], ["b"], ["c"]]


def snippet(name):
    """The Python block of the pages that begins with  # NAME"""
    return re.search(rf"```python\n(# {name}\n.*?)```", README, re.S)[1]


def test_the_first_reward_of_the_pages_can_be_used(finished_run, tokenizer):
    (finished_run.parent / "short.py").write_text(snippet("short.py"))
    reward = load_own(tokenizer, f"{finished_run.parent}/short.py:short", missing_eos_score=None)
    batch = data.collate(*tokenizers.encode_texts(tokenizer, ["a", "b"], [" c d e.", " f."]))
    scores = reward(*batch, torch.tensor([True, True]))
    assert scores.tolist() == pytest.approx([-0.6, -0.2])


def test_the_way_to_the_first_nan_finds_it_and_else_nothing(finished_run):
    folder = finished_run.parent
    (folder / "first_nan.py").write_text(snippet("first_nan.py"))
    (folder / "score.py").write_text(
        "import torch\n"
        "def f(prompts, responses):\n"
        "    x = torch.tensor([float(len(r)) for r in responses])\n"
        "    return (x - 20).log().tolist() if len(x) == 32 else x.tolist()\n")
    command = [sys.executable, "first_nan.py", HERE / "ppo.py",
               *"--config tiny --base tiny --steps 1 --n_eval 2 --n_samples 2 --out".split()]
    reward = "--reward score.py:f --normalise_reward 0".split()
    processes = []
    for options in (["no_nan"], ["first_nan", *reward]):
        processes.append(subprocess.Popen(
            command + options, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONPATH": str(HERE)}))
    without, with_nan = (process.communicate()[1] for process in processes)
    assert processes[0].returncode == 0, without
    assert "(x - 20).log().tolist()" in with_nan
    message = "ArithmeticError: aten.log.default made a nan of [torch.Size([32])]"
    assert message in with_nan


def test_the_notebook_of_the_pages_runs(finished_run, capsys):
    code = snippet("notebook.py")
    assert 'out="notebook"' in code
    exec(code.replace('out="notebook"', 'out="notebook", base="tiny"'), {})
    results = files.read_json(finished_run / "notebook" / "ppo" / "results.json")
    assert capsys.readouterr().out.endswith(f"{results['score']} {results['kl_ref']}\n")
    exec(code.replace('out="notebook"', 'out="notebook", base="tiny", beta=0.7'), {})
    assert "holds a run with" in capsys.readouterr().out


def test_every_metric_that_is_logged_is_on_a_page(whole_run):
    for stage in ("sft", "reward_model", "ppo", "dpo", "grpo", "../ladder/policy_gradient"):
        for line in log_of(whole_run[0] / stage):
            for name in set(line) - {"step"}:
                assert f"`{name}`" in README, name


# ---- links

def anchors_of(text):
    """The anchors that GitHub gives to the headings of a page"""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_anchors_and_pictures_of_a_page_exist(page):
    text = re.sub(r"`[^`]*`", "`code`", without_blocks(PAGES[page]))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = Path(os.path.normpath(page.parent / path)) if path else page
        assert file.exists(), target
        if re.fullmatch(r"L\d+", anchor):
            assert int(anchor[1:]) <= file.read_text(encoding="utf-8").count("\n"), target
        elif anchor:
            assert anchor in anchors_of(PAGES[file]), target


def test_every_page_is_linked_from_the_front_page_and_every_picture_is_shown():
    front = PAGES[HERE / "README.md"]
    for path in (HERE / "docs").iterdir():
        if path.suffix == ".md":
            assert f"](docs/{path.name})" in front, path.name
        else:
            assert f"{path.name})" in README, path.name


if __name__ == "__main__":
    if "flips" in sys.argv:
        print(draw_flips(HERE / "docs" / "flips.png"))
    for path in GENERATED:
        path.write_text(up_to_date(path), encoding="utf-8")
