"""
The reward of RL: what a response is worth, before any KL.

    --reward reward_model           this run's reward model
    --reward path/to/file.py:name   a function of yours: prompts, completions -> list of numbers
    --reward FOLDER or NAME         a sequence classifier of transformers, with one label or two
    --reward FOLDER:LABEL           one with two labels or more: the log-odds of this label

In every case the scripts call  reward(inputs, targets, mask, finished) -> (B,). Functions and
classifiers are normalised to mean 0 and standard deviation 1 on responses of the SFT policy, as
reward_model.py does with its own. So a KL strength beta, a score for a missing EOS and the critic's
errors mean the same everywhere.
"""

import ast
import functools
import inspect
import os
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import reward_model as rm
from lab import files, pretrained
from lab.config import Common, nearest
from lab.guest import Guest, arguments, call
from lab.process import seed_all
from lab.run import Stopped, ensure, stop
from model import sequence_scores


@dataclass
class Rewarded(Common):
    """Options of every stage that is driven by a reward"""
    init: str = ""                  # weights for the SFT stage, if this run has none yet
    reward: str = "reward_model"    # or FILE.py:NAME, or a classifier: FOLDER, NAME or FOLDER:LABEL
    normalise_reward: bool = True   # bring other rewards to mean 0, deviation 1 on SFT's samples
    missing_eos_score: float | None = -3.0      # score of a response without EOS; none: its own
    score_clip: float | None = None             # clip scores to plus and minus this

    inherited = (*Common.inherited, "reward", "normalise_reward", "missing_eos_score", "score_clip")


# What to do about a score that is not finite
REWARD_HINT = "the reward returned it; print its inputs to find out why"


class Reward:
    """
    reward(inputs, targets, mask, finished) -> (B,), the score of whole responses before any KL

    gain * raw + bias, then a fixed low score if there is no EOS, then the clip. raw is a function
    of inputs, targets, mask. made_for identifies the reward.
    """

    def __init__(self, raw, made_for, cfg, model=None, folder=None):
        self.raw = raw
        self.made_for = made_for
        self.cfg = cfg
        self.model = model                               # our own reward model: the ScalarGPT,
        self.folder = folder                             # and its stage's folder
        self.gain = 1.0
        self.bias = 0.0

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

    def matches(self, state):
        """Whether a stage was trained for this reward, up to sampling noise in its normalisation"""
        if not isinstance(state, dict) or state.get("made_for") != self.made_for:
            return False
        return abs(state.get("gain", 0.0) / self.gain - 1) < 0.1

    def load_state_dict(self, state):
        if state["made_for"] != self.made_for:
            stop(f"the run was started with a different reward ({state['made_for']}) from this one "
                 f"({self.made_for}). --overwrite starts again, --out NAME keeps both")
        self.gain = state["gain"]
        self.bias = state["bias"]


def load_reward(cfg, sft_policy, tokenizer, prompts, device):
    """
    The reward that --reward names -> Reward

    All but our own reward model are normalised here, on the SFT policy's responses to prompts.
    """
    if cfg.reward == "reward_model":
        folder = ensure(cfg, rm)
        model = rm.load_reward_model(folder, sft_policy, tokenizer, device, **cfg.compute_options())
        raw = functools.partial(sequence_scores, model)
        return Reward(raw, files.fingerprint(model), cfg, model, folder)
    path, name = split(cfg.reward)
    if path.endswith(".py") and name:
        raw, made_for = load_function(path, name, tokenizer)
    else:
        raw, made_for = load_classifier(path, name, tokenizer, device)
    reward = Reward(raw, made_for, cfg)
    if cfg.normalise_reward:
        seed_all(cfg.seed)                               # for a function that draws random numbers
        reward.gain, reward.bias = rm.normalisation(raw, sft_policy, tokenizer, prompts, cfg)
        mean, std = -reward.bias / reward.gain, 1 / reward.gain
        print(f"{cfg.reward} has mean {mean:.3f} and standard deviation {std:.3f} on the SFT "
              "policy's samples; scores are normalised by them")
    return reward


def check_reward(cfg):
    """Exit, before any work, if the data, the held-out prompts or the reward cannot be used."""
    data.check_source(cfg.data)
    if cfg.data == "reviews":
        data.check_n_eval(cfg.n_eval, len(data.built_in_prompts()[1]))
    if cfg.reward == "reward_model":
        if cfg.config not in rm.Config.presets:
            stop(f"--config {cfg.config} has no reward model; give a --reward: a function of yours "
                 "or a classifier")
        data.check_comparisons(cfg)
        return
    path, name = split(cfg.reward)
    meant = ""
    if os.path.isfile(f"{path}.py"):
        meant = f" (did you mean {path}.py:{name or 'FUNCTION'}?)"
    elif "/" not in path:
        meant = nearest(cfg.reward, ["reward_model"])
    if meant and not os.path.exists(path):
        stop(f"--reward got {cfg.reward}{meant}")
    if cfg.reward.endswith(".py"):
        stop(f"--reward got {cfg.reward}; name the function in it too: {cfg.reward}:FUNCTION")
    if path.endswith(".py"):
        check_function(path, name)
    else:
        which_label(path, name)


def split(reward):
    """file.py:function or FOLDER:LABEL -> its two parts. The colon of C:\\FOLDER is not one."""
    path, _, name = reward.rpartition(":")
    whole = len(path) < 2 or os.path.exists(reward)
    return (reward, "") if whole else (path, name)


# --------------------------------------------------------------------------------------------------
# A function of the user's

def check_function(path, name):
    """Exit, without running it, unless the file exists, is valid Python and mentions the name."""
    if not os.path.isfile(path):
        stop(f"--reward got {path}:{name}, but {path} does not exist")
    try:
        source = Path(path).read_bytes()
        ast.parse(source, path)
    except (OSError, ValueError, SyntaxError) as error:
        stop(f"--reward got {path}:{name}, but {path} cannot be read ({type(error).__name__}: "
             f"{error})")
    if not name:
        stop(f"--reward got {path}: with nothing after the colon; give {path}:FUNCTION")
    if name.encode() not in source:
        stop(f"--reward got {path}:{name}, but {path} has no function {name}")


def load_function(path, name, tokenizer):
    """A user's function -> raw, made_for: digests of its file and of what it imports"""
    check_function(path, name)
    guest = Guest(path)
    with guest.running():
        try:
            function = getattr(guest.load(), name, None)
            if inspect.isclass(function):                # its objects are called
                function = function()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            stop(f"--reward got {path}:{name}, but importing {path} ended in the "
                 f"{type(error).__name__} above")
    if not callable(function):
        stop(f"--reward got {path}:{name}, but {path} has no function {name}")
    arguments(function, name, [], [])                    # exits if it asks for more than there is
    made_for = f"{Path(path).name}:{name} {files.digest(path)[:16]}"
    for file in guest.imported():
        made_for += f" {file.relative_to(guest.folder).as_posix()} {files.digest(file)[:16]}"
    return functools.partial(score_texts, function, name, guest, tokenizer), made_for


def score_texts(function, name, guest, tokenizer, inputs, targets, mask):
    """The numbers that a user's function gives to the texts of prompts and responses -> (B,)"""
    prompts, responses = data.texts_of(tokenizer, inputs, targets, mask)
    try:
        scores = call(function, name, guest, prompts, responses)
    except Stopped as error:
        if not isinstance(error.__context__, (AttributeError, TypeError)):
            raise
        # The likeliest cause: it was written for one response
        raise Stopped(f"{error}. A reward function gets a list of prompts and a list of responses, "
                      "and returns one number for each response")
    return torch.tensor(scores, dtype=torch.float32, device=mask.device)


# --------------------------------------------------------------------------------------------------
# A classifier of transformers

def from_pretrained(auto, name, **options):
    """auto.from_pretrained(name) of a classifier; exits with the reason if that fails"""
    from safetensors import SafetensorError
    try:
        if os.path.isdir(name):
            pretrained.read_config(Path(name))
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        stop(f"--reward got {name}; it takes reward_model, path/to/file.py:function, or a folder "
             f"or hub name of a transformers sequence classifier ({files.first_line(error)})")


def which_label(name, label):
    """
    The labels of a classifier -> labels, the index of the rewarded one, those of its alternatives

    By default the second of two is rewarded. Labels that can hold together have no alternatives.
    """
    from transformers import AutoConfig
    config = from_pretrained(AutoConfig, name)
    labels = [str(config.id2label[i]) for i in sorted(config.id2label)]
    if label and label not in labels:
        stop(f"--reward got {name}:{label}, but that classifier has no label {label}"
             f"{nearest(label, labels)}; it has {', '.join(labels)}")
    if not label and len(labels) > 2:
        stop(f"--reward {name} has {len(labels)} labels and a reward is one number; name the label "
             f"to reward: {name}:LABEL, with one of {', '.join(labels)}")
    rewarded = labels.index(label) if label else len(labels) - 1
    if label and config.problem_type == "multi_label_classification":
        return labels, rewarded, []
    return labels, rewarded, [i for i in range(len(labels)) if i != rewarded]


def check_loading(name, loading):
    """Exit unless every weight of a classifier was in the files, and all in the files are used."""
    missing = sorted(loading["missing_keys"])
    if missing:
        stop(f"--reward {name} has no weights for {', '.join(missing[:3])}: it was not trained to "
             "classify, and its scores would be random")
    for weight, stored, wanted in loading["mismatched_keys"]:
        stop(f"--reward {name} has {weight} of shape {tuple(stored)}, and its config.json wants "
             f"{tuple(wanted)}")
    # Causal masks and positions in old files are not weights. RoBERTa's classifier has no pooler.
    unknown = sorted(key for key in loading["unexpected_keys"]
                     if not re.search(r"attn\.(masked_)?bias$|position_ids$|\.pooler\.", key))
    if unknown:
        stop(f"--reward {name} holds weights that its classifier does not use: "
             f"{', '.join(unknown[:3])}; wanted the weights of a classifier only")


def load_classifier(name, label, tokenizer, device):
    """A sequence classifier, with its own tokenizer -> raw, made_for"""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    labels, rewarded, others = which_label(name, label)
    wrapped = rf"^(?:{pretrained.WRAPPERS.pattern})+"
    classifier, loading = from_pretrained(
        AutoModelForSequenceClassification, name, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True, key_mapping={wrapped: ""})
    check_loading(name, loading)
    its_tokenizer = from_pretrained(AutoTokenizer, name, truncation_side="left")
    told = f"the logit of {labels[rewarded]}"
    if others:
        against = "all other labels" if len(others) > 1 else labels[others[0]]
        told = f"log-odds of {labels[rewarded]} against {against}"
    print(f"reward: {told}")
    classifier = classifier.eval().requires_grad_(False).to(device)
    named = f"{name}:{label}" if label and others != [0] else name   # [0] is what no label means
    raw = functools.partial(score_by_classifier, classifier, its_tokenizer, rewarded, others,
                            tokenizer)
    return raw, f"{named} {files.fingerprint(classifier)}"


def score_by_classifier(classifier, its_tokenizer, rewarded, others, tokenizer,
                        inputs, targets, mask):
    """
    The rewarded label's logit, or its log-odds against the others, for prompt + response -> (B,)

    A text that is too long for the classifier keeps its end. A classifier that --export wrote is
    shown the EOS too.
    """
    config = classifier.config
    longest = getattr(config, "max_position_embeddings", None) or 10 ** 9
    if "roberta" in config.model_type:                   # counts from pad_token_id + 1
        longest -= config.pad_token_id + 1
    longest = min(longest, its_tokenizer.model_max_length)
    prompts, responses = data.texts_of(tokenizer, inputs, targets, mask)
    texts = [prompt + response for prompt, response in zip(prompts, responses)]
    rows = its_tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
    rows = [row or [its_tokenizer.unk_token_id or 0] for row in rows]        # an empty text
    bos = its_tokenizer.bos_token_id
    if bos is not None:                                  # a chat template has written one already
        rows = [row[1:] if row[:2] == [bos, bos] else row for row in rows]
    if getattr(config, "reads_eos", False):
        finished = data.met_eos(targets, mask, tokenizer.end_tokens).tolist()
        ends = [[its_tokenizer.eos_token_id] if end else [] for end in finished]
        rows = [(row + end)[-longest:] for row, end in zip(rows, ends)]
    at_once = 64 if its_tokenizer.pad_token else 1
    scores = []
    for i in range(0, len(rows), at_once):
        batch = its_tokenizer.pad({"input_ids": rows[i:i + at_once]}, padding=at_once > 1,
                                  return_tensors="pt")
        logits = classifier(**batch.to(mask.device)).logits.float()          # (b, number of labels)
        score = logits[:, rewarded]
        if others:
            score = score - logits[:, others].logsumexp(dim=1)               # log-odds
        scores.append(score)
    return torch.cat(scores)
