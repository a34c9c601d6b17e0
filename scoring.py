"""
The reward of RL: what a response is worth, before any KL.

    --reward reward_model           this run's reward model
    --reward path/to/file.py:name   a function of yours: lists of prompts and responses -> list of numbers
    --reward FOLDER or NAME         a sequence classifier of transformers, with one label or two

Whatever it comes from, the scripts call  reward(inputs, targets, mask, finished) -> (B,). Functions and classifiers
are normalised to mean 0 and standard deviation 1 on responses of the SFT policy, as reward_model.py does with its own,
so that a KL strength beta, a score for a missing EOS and the critic's errors mean the same everywhere.
"""

import ast
import functools
import importlib.util
import inspect
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

import corpus
import data
import experiment
import files
import options
import reward_model as rm
from model import sequence_scores


@dataclass
class Rewarded(options.Common):
    """What every stage has that follows a reward."""
    reward: str = "reward_model"    # or path/to/file.py:function, or a transformers classifier: folder or hub name
    normalise_reward: bool = True   # all but reward_model: to mean 0, standard deviation 1 on SFT's samples
    missing_eos_score: float | None = -3.0      # score of a response without EOS; none: as it is
    score_clip: float | None = None             # scores are clipped to plus and minus this


class Reward:
    """
    reward(inputs, targets, mask, finished) -> (B,), the score of whole responses before any KL

    gain * raw + bias, then a fixed low score where there is no EOS, and no score beyond the clip. raw is a
    function of inputs, targets, mask; made_for tells this reward from others.
    """

    def __init__(self, raw, made_for, cfg, model=None):
        self.raw, self.made_for, self.cfg = raw, made_for, cfg
        self.model = model                               # a ScalarGPT, if that is what it comes from
        self.gain, self.bias = 1.0, 0.0

    @torch.no_grad()
    def __call__(self, inputs, targets, mask, finished):
        scores = self.gain * self.raw(inputs, targets, mask) + self.bias     # (B,)
        if self.cfg.missing_eos_score is not None:
            scores = torch.where(finished, scores, self.cfg.missing_eos_score)
        if self.cfg.score_clip is not None:
            scores = scores.clamp(-self.cfg.score_clip, self.cfg.score_clip)
        return scores

    def state_dict(self):
        return {"made_for": self.made_for, "gain": self.gain, "bias": self.bias}

    def is_that_of(self, state):
        """Whether a stage's checkpoint was made for this reward, normalised alike but for the luck of the samples"""
        return isinstance(state, dict) and state["made_for"] == self.made_for and abs(state["gain"] / self.gain - 1) < 0.1

    def load_state_dict(self, state):
        if state["made_for"] != self.made_for:
            files.stop(f"the run was begun with a different reward ({state['made_for']}) from this one "
                       f"({self.made_for}). --overwrite starts it again, --out NAME beside it")
        self.gain, self.bias = state["gain"], state["bias"]


def load_reward(cfg, sft_policy, tokenizer, prompts, device):
    """What cfg.reward names -> Reward. All but our own reward model are normalised here, on responses to prompts"""
    if cfg.reward == "reward_model":
        folder = experiment.ensure(cfg, rm)
        model = rm.load_reward_model(folder, sft_policy, tokenizer, device, **cfg.how())
        return Reward(functools.partial(sequence_scores, model), files.fingerprint(model), cfg, model)
    path, _, name = cfg.reward.rpartition(":")
    if path.endswith(".py"):
        raw, made_for = load_function(path, name, tokenizer)
    else:
        raw, made_for = load_classifier(cfg.reward, tokenizer, device)
    reward = Reward(raw, made_for, cfg)
    if cfg.normalise_reward:
        experiment.seed_all(cfg.seed)                    # for a function that draws random numbers
        reward.gain, reward.bias = rm.normalisation(raw, sft_policy, tokenizer, prompts, cfg)
        print(f"{cfg.reward} has mean {-reward.bias / reward.gain:.3f} and standard deviation {1 / reward.gain:.3f} on "
              "the SFT policy's samples; scores are normalised by them")
    return reward


def check(cfg):
    """Stops, before any work, on data, held-out prompts and rewards that are not there."""
    corpus.check_source(cfg.data)
    if cfg.data == "reviews" and hasattr(cfg, "n_eval"):
        corpus.check_n_eval(cfg.n_eval, len(corpus.built_in_prompts()[1]))
    path, _, name = cfg.reward.rpartition(":")
    if cfg.reward == "reward_model" and cfg.config not in rm.PRESETS:
        files.stop(f"--config {cfg.config} has no reward model; give a --reward, a function of yours or a classifier")
    if cfg.reward == "reward_model":
        corpus.check_comparisons(cfg)
    if cfg.reward != "reward_model" and not os.path.exists(cfg.reward) and "/" not in cfg.reward:
        hint = options.nearest(cfg.reward, ["reward_model"])
        if hint:
            files.stop(f"--reward got {cfg.reward}{hint}")
    if cfg.reward.endswith(".py"):
        files.stop(f"--reward got {cfg.reward}; name the function in it, too: {cfg.reward}:FUNCTION")
    if path.endswith(".py"):
        check_function(path, name)


def check_function(path, name):
    """Stops, without running it, on a file that is not there, is no Python or does not mention the name."""
    if not os.path.isfile(path):
        files.stop(f"--reward got {path}:{name}, but {path} is not there")
    try:
        source = Path(path).read_text(encoding="utf-8")
        ast.parse(source)
    except (OSError, ValueError, SyntaxError) as error:
        files.stop(f"--reward got {path}:{name}, but {path} cannot be read ({type(error).__name__}: {error})")
    if not name or name not in source:
        files.stop(f"--reward got {path}:{name}, but {path} has no function {name or 'after a colon'}")


def load_function(path, name, tokenizer):
    """A user's function of a list of prompts and a list of responses -> raw, what tells it from others"""
    check_function(path, name)
    spec = importlib.util.spec_from_file_location(f"reward_of_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(path).resolve().parent))         # it may import what stands beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        files.stop(f"--reward got {path}:{name}, but {path} cannot be imported: it ended in the "
                   f"{type(error).__name__} above")
    if not callable(getattr(module, name, None)):
        files.stop(f"--reward got {path}:{name}, but {path} has no function {name or 'after a colon'}")
    made_for = f"{Path(path).name}:{name} {files.digest(path)[:16]}"
    return functools.partial(score_texts, getattr(module, name), tokenizer), made_for


def score_texts(function, tokenizer, inputs, targets, mask):
    """The numbers that a function gives to the texts of prompts and responses -> (B,)"""
    prompts, responses = data.texts_of(tokenizer, inputs, targets, mask)
    name = getattr(function, "__name__", repr(function))
    try:
        given = function(prompts, responses)
        if inspect.isgenerator(given):
            given = list(given)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        files.stop(f"the reward function {name} ended in the {type(error).__name__} above; what was saved before "
                   "is as it was")
    try:
        scores = torch.tensor([float(score) for score in given])             # (B,)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        files.stop(f"the reward function {name} gave back a {type(given).__name__} that is not a list of numbers "
                   f"({error}); it should give one number for each response")
    if len(scores) != len(prompts):
        files.stop(f"the reward function {name} was given {len(prompts)} prompts and responses and "
                   f"gave back {len(scores)} numbers; it should give one for each")
    return scores.to(mask.device)


def load_classifier(name, tokenizer, device):
    """A sequence classifier of transformers, with its own tokenizer -> raw, what tells it from others"""
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    try:
        classifier, loading = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True)
        its_tokenizer = AutoTokenizer.from_pretrained(name, truncation_side="left")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        files.stop(f"--reward got {name}; it takes reward_model, path/to/file.py:function, or a folder or hub name of "
                   f"a transformers sequence classifier ({files.first_line(error)})")
    if loading["missing_keys"]:
        files.stop(f"--reward {name} has no weights for {', '.join(sorted(loading['missing_keys'])[:3])}: it was not "
                   "trained to classify, and its scores would be random")
    if classifier.config.num_labels > 2:
        files.stop(f"--reward {name} tells {classifier.config.num_labels} classes apart; a reward is one number, so it "
                   "takes a classifier with one label or with two")
    classifier = classifier.eval().requires_grad_(False).to(device)
    return (functools.partial(score_by_classifier, classifier, its_tokenizer, tokenizer),
            f"{name} {files.fingerprint(classifier)}")


def score_by_classifier(classifier, its_tokenizer, tokenizer, inputs, targets, mask, batch_size=64):
    """
    The one logit of prompt + response, or of two logits the second less the first: log-odds -> (B,)

    A text that is too long for the classifier keeps its end. One made by --export is shown the EOS, too.
    """
    config, scores = classifier.config, []
    positions = getattr(config, "max_position_embeddings", None) or 10 ** 9
    if "roberta" in config.model_type:                                       # it counts them from pad_token_id + 1
        positions -= config.pad_token_id + 1
    longest = min(its_tokenizer.model_max_length, positions)
    finished = data.met_eos(targets, mask, tokenizer.eot_token).tolist()
    texts = [prompt + response for prompt, response in zip(*data.texts_of(tokenizer, inputs, targets, mask))]
    step = batch_size if its_tokenizer.pad_token else 1
    for i in range(0, len(texts), step):
        ids = its_tokenizer(texts[i:i + step], truncation=True, max_length=longest)["input_ids"]
        ids = [row or [its_tokenizer.unk_token_id or 0] for row in ids]      # of an empty text
        if getattr(config, "reads_eos", False):
            ids = [(row + [its_tokenizer.eos_token_id] * end)[-longest:] for row, end in zip(ids, finished[i:i + step])]
        batch = its_tokenizer.pad({"input_ids": ids}, padding=step > 1, return_tensors="pt").to(mask.device)
        logits = classifier(**batch).logits.float()                          # (b, 1) or (b, 2)
        scores.append(logits[:, -1] - logits[:, 0] if logits.shape[1] == 2 else logits[:, 0])
    return torch.cat(scores)
