"""
Look at what a policy writes.

    python sample.py --config small --stage sft,ppo                     side by side, on held-out prompts
    python sample.py --config small --stage ppo --prompt "A fable about a lighthouse. On the plot:"
    python sample.py --config small --stage ppo --temperature 0         the likeliest token each time
    python sample.py --config small --stage ppo,dpo --score             with the reward of each response
    python sample.py --config small --stage ppo --tokens advantage      and of each token, in colour
    python sample.py --config gpt2 --stage ppo --prompt $'\\n\\nHuman: Hi\\n\\nAssistant:'           newlines, in bash

All policies get the same prompts and the same uniforms, so that they differ by what they have learned. A stage
of another run is RUN/STAGE, one of several policies of a stage STAGE/NAME, as in policy_gradient/clip or ppo/ema.
Data, lengths, temperature and reward are those that the first of the stages was made with, unless you say otherwise.
--tokens shows, of each response token,

    kl          log pi - log pi_ref, its part of the KL to the reference, in nats
    value       V, what the critic expected before the token was chosen
    advantage   A, how much better the token was than that; by the beta, gamma and lambda of the stage's last update,
                before it is whitened

in blue where it is positive and in orange where it is negative, the stronger the larger; where the terminal has
no colour the number stands behind the token.
"""

import contextlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import corpus
import data
import experiment
import files
import options
import ppo
import scoring
import sft
from model import ScalarGPT, generate, token_logprobs


@dataclass
class Config(scoring.Rewarded):
    stage: str = "sft,ppo"          # stages of this run, RUN/STAGE, or STAGE/NAME
    prompt: str = ""                # a prompt of your own; else held-out ones
    n: int = 4                      # prompts, or responses to the one of your own
    temperature: float = 1.0        # 0 takes the likeliest token
    score: bool = False             # show the reward of each response
    tokens: Literal["", "kl", "value", "advantage"] = ""        # show this of each response token
    may_be_zero = ("temperature",)


PRESETS = {"small": {}, "tiny": {}, "gpt2": {}, "imdb": {}, "tldr": {}}
Config.presets = PRESETS
BLUES, ORANGES = (255, 153, 117, 75, 33), (255, 223, 215, 209, 202)          # of the 256 colours, from pale to strong
OF_A_STAGE = ("out", "base", "data", "max_prompt_tokens", "text_prompt", "max_new_tokens", "temperature", "reward",
              "normalise_reward", "missing_eos_score", "score_clip")


def find(name, run):
    """A name as in the docstring -> the stage's folder, in this run or in what it is based on, the key of its policy"""
    here = options.folder_of(run)
    runs_in = here.parent
    parts = name.split("/")
    candidates = [(here / parts[0], parts[1:])]
    for path in sorted(here.glob("*/checkpoint.pt")):
        with contextlib.suppress(files.Stopped):         # a damaged stage that was not asked for
            base = experiment.stored_config(path.parent).get("base")
            if base:
                candidates.append((options.folder_of(base) / parts[0], parts[1:]))
    candidates.append((runs_in.joinpath(*parts[:2]), parts[2:]))
    for folder, rest in candidates:
        if (folder / "checkpoint.pt").is_file():
            return folder, "_".join(["policy", *rest])
    stages = [path.parent for path in runs_in.glob("*/*/checkpoint.pt")]
    known = sorted(str(stage.relative_to(runs_in)) for stage in stages)
    files.stop(f"--stage names {name}, but neither {here / parts[0]} nor {runs_in / name} has a "
               f"checkpoint; there are: {', '.join(known) or 'none'}")


def run_of(folder):
    """The run of a stage's folder, as --out takes it"""
    run = folder.parent
    return run.name if run.parent == Path("out") else str(run)


def check_has_policy(name, folder, key, saved):
    """Exit unless the stage's checkpoint holds that policy."""
    names = [sft.policy_name(folder.name, policy) for policy in sft.policies_in(saved)]
    if key not in saved:
        files.stop(f"--stage names {name}, but {folder} has no such policy to sample from; its "
                   f"policies: {', '.join(names) or 'none'}")


def settle(cfg, folders):
    """What was not said otherwise is as it was when the first of the stages that know it was made -> cfg"""
    usual = Config(config=cfg.config)
    configs = [experiment.stored_config(folder) | {"out": run_of(folder)} for folder in folders]
    for name in OF_A_STAGE:
        known = [config[name] for config in configs if name in config]
        if known and getattr(cfg, name) == getattr(usual, name):
            cfg = replace(cfg, **{name: known[0]})
    return cfg


def in_colour(stream=sys.stdout):
    """Whether the terminal shows colours; NO_COLOR asks for none (no-color.org)"""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(pieces, values, largest, colour):
    """Tokens' texts with a number each: on a ground that shows it, or with the number behind -> text"""
    if not colour:
        return "".join(f"{piece}[{value:+.2f}]" for piece, value in zip(pieces, values))
    painted = []
    for piece, value in zip(pieces, values):
        strength = round(4 * min(1.0, abs(value) / max(largest, 1e-9)))
        painted.append(f"\033[30;48;5;{(BLUES if value > 0 else ORANGES)[strength]}m{piece}\033[0m")
    return "".join(painted)


@torch.no_grad()
def token_values(what, saved, folder, policy, reference, reward, inputs, targets, mask, finished, cfg):
    """What --tokens shows of each token -> (B, T), or None where the stage has no critic"""
    temperature = cfg.temperature or 1.0
    logprobs, ref_logprobs = (token_logprobs(p, inputs, targets, mask, temperature) for p in (policy, reference))
    if what == "kl":
        return ppo.kl_estimate(logprobs, ref_logprobs)
    if "critic_gpt" not in saved:
        return None
    critic = sft.rebuild(ScalarGPT, saved, folder, "critic", "critic_gpt", **cfg.how()).to(inputs.device)
    values = critic(inputs) * mask
    if what == "value":
        return values
    scores = reward(inputs, targets, mask, finished)
    rewards = ppo.shape_rewards(scores, logprobs, ref_logprobs, mask, saved["control"]["beta"])
    config = saved["config"]
    return ppo.gae(rewards, values, mask, config["gamma"], config["lam"])[0]


@experiment.self_contained
def main(cfg):
    experiment.check_export(cfg, None)
    names = [name.strip() for name in cfg.stage.split(",") if name.strip()]
    if not names:
        files.stop(f"--stage got {cfg.stage!r}; it takes names of stages, as in sft,ppo")
    folders = [find(name, options.run_name(cfg)) for name in names]
    cfg, device = settle(cfg, [folder for folder, _ in folders]), experiment.pick_device(cfg)
    policies, saved = [], []
    for name, (folder, key) in zip(names, folders):
        saved.append(files.load_checkpoint(folder))
        check_has_policy(name, folder, key, saved[-1])
        policy, tokenizer = sft.load_policy(folder, device, key, saved[-1], **cfg.how())
        policies.append(policy)
        data.check_vocabulary(saved[0]["tokenizer"], tokenizer, folder)
    block_size, eos_id = policies[0].config.block_size, tokenizer.eot_token

    reference = reward = None
    if cfg.score or cfg.tokens:
        reference, _ = sft.load_policy(experiment.ensure(cfg, sft), device, **cfg.how())
        made = files.fingerprint(reference)
        for name, checkpoint in zip(names, saved):
            if checkpoint.get("sft", made) != made:
                files.stop(f"{name} started from a different SFT policy than this run's, so it has no "
                           "score and no KL here; leave out --score and --tokens to see its samples")
    if cfg.score or cfg.tokens == "advantage":
        reward = scoring.load_reward(cfg, reference, tokenizer, corpus.prompts(cfg, tokenizer, block_size)[0], device)
        for checkpoint in saved:                                             # normalised as in training
            if reward.is_that_of(checkpoint.get("reward")):
                reward.load_state_dict(checkpoint["reward"])
    if cfg.prompt:
        prompts = [data.encode_prompt(tokenizer, cfg.prompt)] * cfg.n
        corpus.check_room(cfg, len(prompts[0]), block_size)
    else:
        prompts = corpus.prompts(cfg, tokenizer, block_size, cfg.n)[1]

    written = []                             # by each policy: token lists of responses, scores, values of tokens
    for policy, checkpoint, (folder, _) in zip(policies, saved, folders):
        tokens, mask = generate(policy, prompts, cfg.max_new_tokens, eos_id, cfg.temperature,
                                torch.Generator().manual_seed(cfg.seed))
        inputs, targets = data.shift(tokens)                                 # (n, T) each
        finished = data.met_eos(targets, mask, eos_id)                       # (n,)
        values = None
        if cfg.tokens:
            values = token_values(cfg.tokens, checkpoint, folder, policy, reference, reward, inputs, targets, mask,
                                  finished, cfg)                                            # (n, T)
        if values is not None:
            values = [row[m > 0].tolist() for row, m in zip(values, mask)]
        scores = reward(inputs, targets, mask, finished).tolist() if cfg.score else None
        written.append((data.responses_of(tokens, mask), scores, values))

    largest = max((abs(x) for _, _, values in written for row in values or [] for x in row), default=0.0)
    if cfg.tokens:
        print(f"{cfg.tokens} of each token" + f", blue positive, orange negative, {largest:.2f} at most" * in_colour())
    for i, prompt in enumerate(prompts):
        if not (i and cfg.prompt):
            print("\n" + (files.visible(tokenizer.decode(prompt)) if prompt != [eos_id] else "(no prompt)"))
        for name, (responses, scores, values) in zip(names, written):
            label = name if scores is None else f"{name}  score {scores[i]:.2f}"
            if values is not None:
                pieces = [files.visible(tokenizer.decode_single_token_bytes(token).decode(errors="replace"))
                          for token in responses[i]]
                text = paint(pieces, values[i], largest, in_colour())
            else:
                text, ended = data.decode_response(tokenizer, responses[i])
                text = files.visible(text) + " .." * (not ended)        # cut at --max_new_tokens
            print(f"    {label}" + "  (it has no critic)" * (cfg.tokens != "" and values is None) + f" {text}")


if __name__ == "__main__":
    experiment.launch(main, Config, __doc__)
