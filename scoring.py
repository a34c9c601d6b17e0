"""
The reward of RL: what a response is worth, before any KL.

    --reward reward_model           this run's reward model
    --reward path/to/file.py:name   a function of yours: prompts, completions -> list of numbers
    --reward FOLDER or NAME         a sequence classifier of transformers, with one label or two
    --reward FOLDER:LABEL           one with two labels or more: the log-odds of this one

Whatever it comes from, the scripts call  reward(inputs, targets, mask, finished) -> (B,). Functions and classifiers
are normalised to mean 0 and standard deviation 1 on responses of the SFT policy, as reward_model.py does with its own,
so that a KL strength beta, a score for a missing EOS and the critic's errors mean the same everywhere.
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

import corpus
import data
import experiment
import files
import options
import pretrained
import reward_model as rm
from guest import Guest, arguments, call
from model import sequence_scores


@dataclass
class Rewarded(options.Common):
    """What every stage has that follows a reward."""
    reward: str = "reward_model"    # or FILE.py:NAME, or a classifier: FOLDER, NAME or FOLDER:LABEL
    normalise_reward: bool = True   # all but reward_model: to mean 0, standard deviation 1 on SFT's samples
    missing_eos_score: float | None = -3.0      # score of a response without EOS; none: as it is
    score_clip: float | None = None             # scores are clipped to plus and minus this


HINT = "the reward returned it: print its inputs to find out why"        # of scores that are not finite


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
        """Whether a stage was trained for this reward, up to sampling noise in its normalisation"""
        if not isinstance(state, dict) or state.get("made_for") != self.made_for:
            return False
        return abs(state.get("gain", 0.0) / self.gain - 1) < 0.1

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
    path, name = split(cfg.reward)
    if path.endswith(".py") and name:
        raw, made_for = load_function(path, name, tokenizer)
    else:
        raw, made_for = load_classifier(path, name, tokenizer, device)
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
    path, name = split(cfg.reward)
    if cfg.reward == "reward_model" and cfg.config not in rm.PRESETS:
        files.stop(f"--config {cfg.config} has no reward model; give a --reward, a function of yours or a classifier")
    if cfg.reward == "reward_model":
        corpus.check_comparisons(cfg)
    if cfg.reward != "reward_model" and not os.path.exists(path) and "/" not in path:
        hint = options.nearest(cfg.reward, ["reward_model"])
        if hint:
            files.stop(f"--reward got {cfg.reward}{hint}")
    if cfg.reward.endswith(".py"):
        files.stop(f"--reward got {cfg.reward}; name the function in it, too: {cfg.reward}:FUNCTION")
    if path.endswith(".py"):
        check_function(path, name)
    elif cfg.reward != "reward_model":
        which_label(path, name)


def split(reward):
    """file.py:function or FOLDER:LABEL -> its two parts. The colon of C:\\FOLDER parts nothing."""
    path, _, name = reward.rpartition(":")
    whole = len(path) < 2 or os.path.exists(reward)
    return (reward, "") if whole else (path, name)


# --------------------------------------------------------------------------------------------------
# A function of the user's

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
    """A user's function -> raw, what tells it from others: digests of its file and its imports"""
    check_function(path, name)
    guest = Guest(path)
    with guest.running():
        try:
            function = getattr(guest.load(), name, None)
            if inspect.isclass(function):                # its objects are called
                function = function()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            files.stop(f"--reward got {path}:{name}, but {path} cannot be imported: it ended in "
                       f"the {type(error).__name__} above")
    if not callable(function):
        files.stop(f"--reward got {path}:{name}, but {path} has no function {name}")
    arguments(function, name, [], [])                    # stops if it asks for more than there is
    made_for = f"{Path(path).name}:{name} {files.digest(path)[:16]}"
    for file in guest.imported():
        made_for += f" {file.relative_to(guest.folder).as_posix()} {files.digest(file)[:16]}"
    return functools.partial(score_texts, function, name, guest, tokenizer), made_for


def score_texts(function, name, guest, tokenizer, inputs, targets, mask):
    """The numbers that a user's function gives to the texts of prompts and responses -> (B,)"""
    prompts, responses = data.texts_of(tokenizer, inputs, targets, mask)
    scores = call(function, name, guest, prompts, responses)
    return torch.tensor(scores, dtype=torch.float32, device=mask.device)


# --------------------------------------------------------------------------------------------------
# A classifier of transformers

def from_pretrained(auto, name, **how):
    """auto.from_pretrained(name) of a classifier; stops where that fails"""
    from safetensors import SafetensorError
    try:
        if os.path.isdir(name):
            pretrained.read_config(Path(name))
        return auto.from_pretrained(name, **how)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        files.stop(f"--reward got {name}; it takes reward_model, path/to/file.py:function, or a "
                   "folder or hub name of a transformers sequence classifier "
                   f"({files.first_line(error)})")


def which_label(name, label):
    """
    The labels of a classifier -> labels, the index of the rewarded one, those of its alternatives

    By default the second of two is rewarded. Labels that may hold together have no alternatives.
    """
    from transformers import AutoConfig
    config = from_pretrained(AutoConfig, name)
    labels = [str(config.id2label[i]) for i in sorted(config.id2label)]
    if label and label not in labels:
        files.stop(f"--reward got {name}:{label}, but that classifier has no label {label}"
                   f"{options.nearest(label, labels)}; it has {', '.join(labels)}")
    if not label and len(labels) > 2:
        files.stop(f"--reward {name} tells {len(labels)} classes apart; a reward is one number, so "
                   f"name the label to reward: {name}:LABEL, with one of {', '.join(labels)}")
    rewarded = labels.index(label) if label else len(labels) - 1
    if label and config.problem_type == "multi_label_classification":
        return labels, rewarded, []
    return labels, rewarded, [i for i in range(len(labels)) if i != rewarded]


def check_loading(name, loading):
    """Exit unless all weights of a classifier were loaded and all that the file holds are used."""
    if loading["missing_keys"]:
        files.stop(f"--reward {name} has no weights for "
                   f"{', '.join(sorted(loading['missing_keys'])[:3])}: it was not trained to classify, "
                   "and its scores would be random")
    for weight, stored, wanted in loading["mismatched_keys"]:
        files.stop(f"--reward {name} has {weight} of shape {tuple(stored)}, and its config.json wants "
                   f"{tuple(wanted)}")
    # Not weights: causal masks and positions in old files. RoBERTa's classifier has no use for a pooler.
    unknown = sorted(key for key in loading["unexpected_keys"]
                     if not re.search(r"attn\.(masked_)?bias$|position_ids$|\.pooler\.", key))
    if unknown:
        files.stop(f"--reward {name} holds weights that its classifier does not use: "
                   f"{', '.join(unknown[:3])}; wanted those of a classifier alone")


def load_classifier(name, label, tokenizer, device):
    """A sequence classifier, with its own tokenizer -> raw, what tells it from others"""
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
    made_for = f"{name} {files.fingerprint(classifier)}"
    if label and others != [0]:                          # others == [0]: as without a label
        made_for = f"{name}:{label} {files.fingerprint(classifier)}"
    raw = functools.partial(score_by_classifier, classifier, its_tokenizer, rewarded, others,
                            tokenizer)
    return raw, made_for


def score_by_classifier(classifier, its_tokenizer, rewarded, others, tokenizer,
                        inputs, targets, mask, batch_size=64):
    """
    Of prompt + response, the logit of the rewarded label, less that of its alternatives -> (B,)

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
        logits = classifier(**batch).logits.float()                          # (b, number of labels)
        score = logits[:, rewarded]
        if others:
            score = score - logits[:, others].logsumexp(dim=1)               # log-odds
        scores.append(score)
    return torch.cat(scores)
