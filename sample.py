"""
Look at what a policy writes.

    python sample.py --config small --stage sft,ppo         side by side, on held-out prompts
    python sample.py --config small --stage ppo --prompt "A fable about a lighthouse. On the plot:"
    python sample.py --config small --stage ppo --temperature 0     the likeliest token each time
    python sample.py --config small --stage ppo,dpo --score         with each response's reward
    python sample.py --config small --stage ppo --tokens advantage  each token's advantage
    python sample.py --config gpt2 --stage ppo --prompt $'\\n\\nHuman: Hi\\n\\nAssistant:'
    python sample.py --config smollm2 --stage grpo --prompt "What is 17 + 25?"
    python sample.py --config smollm2 --stage grpo --talk   a dialogue: you type, it answers

The line for gpt2 writes newlines as bash reads them. If the run has a chat template, --prompt is a
user's turn. All policies get the same prompts and the same uniforms, so they differ only in what
they have learned. Write a stage of a different run as RUN/STAGE, and one of a stage's several
policies as STAGE/NAME: policy_gradient/clip, ppo/ema. Data, lengths, temperature and reward come
from the first of the stages, unless you say otherwise. --tokens shows, for each response token,

    kl          log pi - log pi_ref, its part of the KL to the reference, in nats
    value       V, what the critic expected before the token was chosen
    advantage   A, how much better the token was than that, before whitening, with the beta of the
                stage's last update and its gamma and lambda

Positive numbers are blue, negative ones orange; larger ones are stronger. Without colours the
number follows the token.
"""

import contextlib
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import data
import ppo
import sft
from lab import chat, files
from lab.config import FROM_0, folder_of, run_name
from lab.process import pick_device
from lab.run import (Stopped, check_export, ensure, launch, self_contained, stop,
                     stored_config)
from lab.tokenizer import check_vocabulary, decode_response, encode_prompt, start_of
from model import ScalarGPT, token_logprobs
from presets import presets_of
from reward import Rewarded, load_reward
from sampler import generate


@dataclass
class Config(Rewarded):
    stage: str = "sft,ppo"          # stages of this run, RUN/STAGE, or STAGE/NAME
    prompt: str = ""                # your own prompt; default: held-out ones
    talk: bool = False              # talk with the first of the stages; an empty line ends it
    n: int = 4                      # number of prompts, or of responses to your own prompt
    temperature: float = 1.0        # sampling temperature; 0 takes the likeliest token
    score: bool = False             # show each response's reward
    tokens: Literal["", "kl", "value", "advantage"] = ""        # show this of each response token
    presets = presets_of("sample")
    ranges = {"temperature": FROM_0}


# Of the 256 colours of a terminal, from pale to strong
BLUES = (255, 153, 117, 75, 33)
ORANGES = (255, 223, 215, 209, 202)
INHERITED = ("out", "base", "data", "max_prompt_tokens", "text_prompt", "max_new_tokens",
             "temperature", "reward", "normalise_reward", "missing_eos_score", "score_clip")


def find(name, run):
    """A name as in the docstring -> the stage's folder, here or in --base, the policy's key"""
    here = folder_of(run)
    stage, *rest = name.split("/")
    candidates = [(here / stage, rest)]
    for path in sorted(here.glob("*/checkpoint.pt")):
        with contextlib.suppress(Stopped):               # a damaged stage that was not asked for
            base = stored_config(path.parent).get("base")
            if base:
                candidates.append((folder_of(base) / stage, rest))
    candidates.append((here.parent.joinpath(stage, *rest[:1]), rest[1:]))    # RUN/STAGE
    for folder, rest in candidates:
        if (folder / "checkpoint.pt").is_file():
            return folder, "_".join(["policy", *rest])
    stages = [path.parent for path in here.parent.glob("*/*/checkpoint.pt")]
    known = sorted(str(stage.relative_to(here.parent)) for stage in stages)
    stop(f"--stage names {name}, but neither {here / stage} nor {here.parent / name} has a "
         f"checkpoint; there are: {', '.join(known) or 'none'}")


def run_of(folder):
    """The run of a stage's folder, as --out takes it"""
    run = folder.parent
    return run.name if run.parent == Path("out") else str(run)


def check_has_policy(name, folder, key, saved):
    """Exit unless the stage's checkpoint holds this policy."""
    if key not in saved:
        known = [sft.policy_name(folder.name, policy) for policy in sft.policies_in(saved)]
        stop(f"--stage names {name}, but {folder} has no such policy; its policies: "
             f"{', '.join(known) or 'none'}")


def inherit_settings(cfg, folders):
    """Take settings left at their defaults from the first stage that has them -> cfg"""
    default = Config(config=cfg.config)
    configs = [stored_config(folder) | {"out": run_of(folder)} for folder in folders]
    for name in INHERITED:
        known = [config[name] for config in configs if name in config]
        if known and getattr(cfg, name) == getattr(default, name):
            cfg = replace(cfg, **{name: known[0]})
    return cfg


def in_colour(stream=sys.stdout):
    """Whether the terminal shows colours; NO_COLOR turns them off (no-color.org)"""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(pieces, values, largest, colour):
    """Tokens' texts, each on a background that shows its number or followed by it -> text"""
    if not colour:
        return "".join(f"{piece}[{value:+.2f}]" for piece, value in zip(pieces, values))
    painted = []
    for piece, value in zip(pieces, values):
        strength = round(4 * min(1.0, abs(value) / max(largest, 1e-9)))
        shades = BLUES if value > 0 else ORANGES
        painted.append(f"\033[30;48;5;{shades[strength]}m{piece}\033[0m")
    return "".join(painted)


@torch.no_grad()
def token_values(cfg, saved, folder, policy, reference, reward, inputs, targets, mask, finished):
    """The number that --tokens shows of each token -> (B, T), or None if the stage has no critic"""
    temperature = cfg.temperature or 1.0
    logprobs = token_logprobs(policy, inputs, targets, mask, temperature)
    ref_logprobs = token_logprobs(reference, inputs, targets, mask, temperature)
    if cfg.tokens == "kl":
        return ppo.kl_estimate(logprobs, ref_logprobs)
    if "critic_gpt" not in saved:
        return None
    critic = sft.rebuild(ScalarGPT, saved, folder, "critic", "critic_gpt", **cfg.compute_options())
    values = critic.to(inputs.device)(inputs) * mask
    if cfg.tokens == "value":
        return values
    scores = reward(inputs, targets, mask, finished)
    rewards = ppo.shape_rewards(scores, logprobs, ref_logprobs, mask, saved["control"]["beta"])
    config = saved["config"]
    return ppo.gae(rewards, values, mask, config["gamma"], config["lam"])[0]


def show(cfg, tokenizer, prompts, names, written):
    """Print every prompt with the response of each policy."""
    colour = in_colour()
    numbers = [abs(x) for _, _, values in written for row in values or [] for x in row]
    largest = max(numbers, default=0.0)
    if cfg.tokens:
        legend = f", blue positive, orange negative, {largest:.2f} at most" if colour else ""
        print(f"{cfg.tokens} of each token{legend}")
    for i, prompt in enumerate(prompts):
        if i == 0 or not cfg.prompt:
            empty = prompt == [start_of(tokenizer)]
            print("\n" + ("(no prompt)" if empty else files.visible(tokenizer.decode(prompt))))
        for name, (responses, scores, values) in zip(names, written):
            label = name if scores is None else f"{name}  score {scores[i]:.2f}"
            if cfg.tokens and values is None:
                label += "  (it has no critic)"
            if values is not None:
                pieces = [tokenizer.decode_single_token_bytes(token).decode(errors="replace")
                          for token in responses[i]]
                text = paint(map(files.visible, pieces), values[i], largest, colour)
            else:
                text, finished = decode_response(tokenizer, responses[i])
                text = files.visible(text)
                if not finished:                         # cut at --max_new_tokens
                    text += " .."
            print(f"    {label} {text}")


def talk(cfg, name, policy, tokenizer):
    """Answer what is typed, turn by turn, until an empty line or the end of the input."""
    config = policy.config
    if config.positions == "rope":                       # all that the weights can read
        config.block_size = config.n_positions
    generator = torch.Generator().manual_seed(cfg.seed)
    turns = []
    print("type a message and Enter; an empty line ends the dialogue")
    while True:
        try:
            message = input("you: ")
        except EOFError:
            return
        if not message.strip():
            return
        turns.append(("user", message))
        prompt = dialogue(turns, tokenizer)
        while len(prompt) + cfg.max_new_tokens > config.block_size and len(turns) > 2:
            print("    (too long: the first two turns are forgotten)")
            turns = turns[2:]
            prompt = dialogue(turns, tokenizer)
        if len(prompt) + cfg.max_new_tokens > config.block_size:
            print(f"    (this message has no room: {len(prompt)} tokens and --max_new_tokens "
                  f"{cfg.max_new_tokens} exceed {config.block_size}; try a shorter one)")
            turns.pop()
            continue
        tokens, mask = generate(policy, [prompt], cfg.max_new_tokens, tokenizer.end_tokens,
                                cfg.temperature, generator)
        text, finished = decode_response(tokenizer, data.responses_of(tokens, mask)[0])
        print(f"{name}: {files.visible(text.strip())}{'' if finished else ' ..'}", flush=True)
        turns.append(("assistant", text.strip()))


def dialogue(turns, tokenizer):
    """A dialogue by the run's template, as ids"""
    return encode_prompt(tokenizer, chat.written(turns, tokenizer.chat, tokenizer.system))


@self_contained
def main(cfg):
    check_export(cfg, None)
    names = [name.strip() for name in cfg.stage.split(",") if name.strip()]
    if not names:
        stop(f"--stage got {cfg.stage!r}; it takes names of stages, as in sft,ppo")
    found = [find(name, run_name(cfg)) for name in names]
    cfg = inherit_settings(cfg, [folder for folder, _ in found])
    device = pick_device(cfg)

    # ---- the policies
    checkpoints, policies = [], []
    for name, (folder, key) in zip(names, found):
        saved = files.load_checkpoint(folder)
        check_has_policy(name, folder, key, saved)
        policy, tokenizer = sft.load_policy(folder, device, key, saved, **cfg.compute_options())
        checkpoints.append(saved)
        policies.append(policy)
        check_vocabulary(checkpoints[0]["tokenizer"], tokenizer, folder)
    if cfg.talk:
        return talk(cfg, names[0], policies[0], tokenizer)
    block_size = policies[0].config.block_size
    eos_id = tokenizer.end_tokens

    # ---- what they are measured by
    reference = reward = None
    if cfg.score or cfg.tokens:
        sft_folder = ensure(cfg, sft, init=cfg.init)
        reference, _ = sft.load_policy(sft_folder, device, **cfg.compute_options())
        sft_id = files.fingerprint(reference)
        for name, saved in zip(names, checkpoints):
            if saved.get("sft", sft_id) != sft_id:
                stop(f"{name} started from a different SFT policy than this run's, so it has no "
                     "score and no KL here; leave out --score and --tokens to see its samples")
    if cfg.score or cfg.tokens == "advantage":
        train_prompts, _ = data.prompts(cfg, tokenizer, block_size)
        reward = load_reward(cfg, reference, tokenizer, train_prompts, device)
        for saved in checkpoints:                        # normalised as it was in training
            if reward.matches(saved.get("reward")):
                reward.load_state_dict(saved["reward"])

    # ---- their samples
    if cfg.prompt:
        prompt = encode_prompt(tokenizer, cfg.prompt)
        if tokenizer.chat != "plain":
            prompt = dialogue([("user", cfg.prompt)], tokenizer)
        prompts = [prompt] * cfg.n
        data.check_room(cfg, len(prompts[0]), block_size)
    else:
        _, prompts = data.prompts(cfg, tokenizer, block_size, cfg.n)
    written = []                     # by policy: token lists, scores or None, values or None
    for policy, saved, (folder, _) in zip(policies, checkpoints, found):
        tokens, mask = generate(policy, prompts, cfg.max_new_tokens, eos_id, cfg.temperature,
                                torch.Generator().manual_seed(cfg.seed))
        inputs, targets = data.shift(tokens)                                 # (n, T) each
        finished = data.met_eos(targets, mask, eos_id)                       # (n,)
        values = scores = None
        if cfg.tokens:
            values = token_values(cfg, saved, folder, policy, reference, reward, inputs, targets,
                                  mask, finished)                            # (n, T)
        if values is not None:
            values = [row[m > 0].tolist() for row, m in zip(values, mask)]
        if cfg.score:
            scores = reward(inputs, targets, mask, finished).tolist()
        written.append((data.responses_of(tokens, mask), scores, values))
    show(cfg, tokenizer, prompts, names, written)


if __name__ == "__main__":
    launch(main, Config, __doc__)
