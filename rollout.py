"""
A fresh batch of responses, for every method that samples from the policy it trains.

    roll_out            responses to prompts, by the current policy
    score_rollout       log pi and entropy of every token, by the training forward pass
    check_first_ratio   exits if the policy, before any step, is not the one that sampled
    check_kl_ref        exits or warns if the KL to the reference cannot be right, or is large
"""

import torch

import data
from lab.run import stop
from model import masked_mean, token_logprobs
from sampler import generate


@torch.no_grad()
def roll_out(actor, prompts, cfg, eos_id, generator):
    """Responses to prompts (token lists) -> inputs, targets, mask (B, T), finished (B,): met EOS"""
    tokens, mask = generate(actor, prompts, cfg.max_new_tokens, eos_id, cfg.temperature, generator)
    inputs, targets = data.shift(tokens)
    return inputs, targets, mask, data.met_eos(targets, mask, eos_id)


@torch.no_grad()
def score_rollout(policy, inputs, targets, mask, cfg):
    """
    log pi and the entropy of pi at every response token -> (B, T) x 2

    Half precision rounds differently for different batch shapes, which alone can put several
    percent of the ratios outside the clip range. So its batches have the update's size.
    """
    size = len(mask)
    if cfg.dtype != "float32":
        size = -(-cfg.minibatch_size // cfg.accumulation)
    parts = [token_logprobs(policy, *rows, cfg.temperature, return_entropy=True)
             for rows in zip(inputs.split(size), targets.split(size), mask.split(size))]
    logprobs, entropy = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropy)


@torch.no_grad()
def check_first_ratio(logprobs, old_logprobs, mask, cfg, clip_eps_high=None):
    """
    Before the first gradient step every ratio is 1: exit if not.

    -> the share of tokens with a ratio outside the clip range, 0 up to half precision's rounding
    """
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    high = 1 + (cfg.clip_eps if clip_eps_high is None else clip_eps_high)
    outside = masked_mean(((ratio < 1 - cfg.clip_eps) | (ratio > high)).float(), mask).item()
    drift = log_ratio.abs().max().item()
    limit = 1e-4 if mask.device.type == "cpu" else 1e-3  # GPU kernels round by the batch's shape
    if cfg.dtype != "float32":
        drift = masked_mean(log_ratio.abs(), mask).item()
        limit = 0.02
    if drift > limit:
        stop(f"at the first minibatch the log ratio should be 0, but it is off by {drift:.1e}: "
             "old_logprobs and logprobs were computed differently. Look for dropout, a different "
             "temperature or mask, or a gradient step in between")
    if outside > 0.01:
        print(f"warning: before any step, {outside:.1%} of the tokens have a ratio outside the "
              f"clip range, because {cfg.dtype} rounds coarsely; try --dtype float32")
    return outside


def check_kl_ref(kl_ref, cfg, first):
    """Exit or warn if kl_ref (B,) cannot be right. At the first update it is 0, up to rounding."""
    limit = 1e-4 if cfg.dtype == "float32" else 1.0
    if first and kl_ref.abs().max() > limit:
        stop(f"at the first update kl_ref should be 0, but reaches {kl_ref.abs().max():.1e} nats: "
             "actor and reference do not start from the same weights")
    mean = kl_ref.mean()
    standard_error = kl_ref.std(correction=0) / len(kl_ref) ** 0.5
    if mean < -3 * standard_error - 1e-4 and len(kl_ref) >= 16:
        print(f"warning: kl_ref is {mean:.2f} +- {standard_error:.2f} nats, but a KL is never "
              "negative: the policy scored is not the one that sampled")
    if mean > cfg.kl_bound:
        print(f"warning: kl_ref is {mean:.1f} nats a response, above --kl_bound {cfg.kl_bound}: "
              "the policy is leaving what the reward model knows; raise --beta or lower --lr")
