"""
Stage 3 without a critic: GRPO, Dr. GRPO, RLOO and REINFORCE.

Maximises  E_{x, y ~ pi_theta}[ r(x, y) ] - beta KL(pi_theta, pi_ref),  as PPO does. PPO learns what
a prompt is worth. Here G responses to one prompt are a group, and the group says what the prompt is
worth: how much better a response did is its advantage, one number for all its tokens. Every update
does this:

    1. roll out     y_1 .. y_G ~ pi_old to each of a batch of prompts x
    2. score        r(x, y_i), by the reward model or by any function of prompts and responses
    3. logprobs     log pi_old and log pi_ref of every token, by the training forward pass
    4. rewards      R_i = r(x, y_i) - beta sum_t (log pi_old - log pi_ref)(a_t | s_t), with
                    --kl_in reward; or R_i = r(x, y_i), with --kl_in loss
    5. advantages   of each group, by --advantage:
                    grpo        (R_i - mean) / standard deviation          (Shao et al. 2024)
                    dr_grpo     R_i - mean                                 (Liu et al. 2025)
                    rloo        R_i - mean of the others                   (Kool et al. 2019)
                    reinforce   R_i, no baseline                           (Williams 1992)
    6. update       - sum_i,t w_it min(rho A_i, clip(rho, 1 - eps, 1 + eps_high) A_i),
                    rho = pi_theta / pi_old (a_t | s_t); w by --normalise. With --kl_in loss, plus
                    beta sum_i,t w_it (pi_ref / pi_theta - log (pi_ref / pi_theta) - 1)(a_t | s_t),
                    which is k3 (Shao et al. 2024, equations 3 and 4)
    7. log          one line

Where training ends. With the KL in the reward it ends at the pi* of PPO and DPO. There every
response has R_i = beta log Z(x), so none is better than its group and there is nothing left to
learn, whatever the advantages are divided or weighted by. Only reinforce, which has no baseline,
needs --normalise fixed for that. With the KL in the loss it ends elsewhere: on policy, the gradient
of k3 is that of KL(pi_ref, pi_theta), the other direction, in the states visited. Dividing r by the
standard deviation s of a prompt's rewards multiplies that prompt's beta by s.

Departures from Shao et al. (DeepSeekMath), whose form is --kl_in loss --normalise sequence: the KL
is in the reward, as Ahmadian et al. 2024 have it for RLOO; the loss is a mean over the tokens of a
minibatch, close to DAPO's (Yu et al. 2025); four gradient steps an update instead of one; groups of
4 instead of 64.

    python grpo.py --config small
        -> out/small/grpo: checkpoint.pt, log.jsonl, curves.png, report.txt
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch

import data
import sft
from compare import compare, true_utility
from lab.run import Run, ensure, launch, learning_rate, self_contained, set_learning_rate, stop
from model import add_lora, masked_mean, reference_of, token_logprobs, trained
from ppo import kl_estimate
from presets import presets_of
from reward import REWARD_HINT, Rewarded, check_reward, load_reward
from rollout import check_first_ratio, check_kl_ref, roll_out, score_rollout


@dataclass
class Config(Rewarded):              # Rewarded adds --reward and the options for its scores
    steps: int = 80                 # updates, each on fresh responses
    batch_size: int = 128           # responses per update
    group_size: int = 4             # G, responses to one prompt
    minibatch_size: int = 32        # responses per gradient step
    epochs: int = 1                 # passes over the responses of an update
    temperature: float = 1.0        # sampling temperature, also applied when scoring
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce"] = "grpo"     # advantage in a group
    kl_in: Literal["reward", "loss"] = "reward"     # k1 as part of the reward, or k3 of the loss
    beta: float = 0.25              # strength of the KL to the reference
    kl_bound: float = 25.0          # nats per response above which to warn
    normalise: Literal["token", "sequence", "fixed"] = "token"  # what the loss is a mean over
    clip_eps: float = 0.2           # clip range of the ratio, downwards
    clip_eps_high: float | None = None          # clip range upwards; none: the same. DAPO has 0.28
    lr: float = 7e-4                # AdamW's learning rate at its peak
    warmup: int = 2                 # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # final learning rate, as a share of the peak
    grad_clip: float = 1.0          # largest gradient norm
    n_eval: int = 64                # held-out prompts in the final comparison
    n_samples: int = 32             # responses to each of them, per policy
    save_every: int = 20            # updates between checkpoints; Ctrl-C saves at any time
    presets = presets_of("grpo")


# --------------------------------------------------------------------------------------------------
# The maths

def group_advantages(scores, group_size, kind="grpo"):
    """
    How much better each response did than its group: (B,) -> (B,), groups contiguous

    grpo        (r_i - mean) / (std + 1e-4)            (Shao et al. 2024, DeepSeekMath, 4.1.2)
    dr_grpo     r_i - mean                             (Liu et al. 2025)
    rloo        r_i - mean of the others = G / (G - 1) (r_i - mean)        (Kool et al. 2019)
    reinforce   r_i                                    (Williams 1992)

    std is the sample's, over G - 1, as in TRL, verl and OpenRLHF; the paper does not say. The mean
    of the others does not depend on y_i, so as a baseline it adds no bias. The group's mean has r_i
    in it, which shrinks the expected gradient to (G - 1) / G. Advantages of kind grpo have size 1
    however little the rewards of a group differ, unless they are equal: then 0.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.7, 0.7, 0.7, 0.7]), 4, "rloo")
    tensor([ 1.0000, -0.3333, -0.3333, -0.3333,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    if len(scores) % group_size:
        raise ValueError(f"got {len(scores)} scores, which is not a multiple of "
                         f"group_size {group_size}")
    if kind == "reinforce":
        return scores
    if group_size < 2:
        raise ValueError(f"got group_size {group_size} with kind {kind}; a group takes 2 responses "
                         "or more")
    groups = scores.view(-1, group_size)                                     # (B / G, G)
    groups = groups - groups[:, :1]          # equal rewards give exactly 0, free of rounding
    centred = groups - groups.mean(dim=1, keepdim=True)
    if kind == "grpo":
        centred = centred / (groups.std(dim=1, keepdim=True) + 1e-4)
    elif kind == "rloo":
        centred = centred * group_size / (group_size - 1)
    elif kind != "dr_grpo":
        raise ValueError(f"got kind {kind!r}; it is grpo, dr_grpo, rloo or reinforce")
    return centred.view(-1)


def token_weights(mask, normalise="token", max_length=None):
    """
    What each token counts in the loss, a sum over tokens of weight * loss: (B, T) -> (B, T)

    token       1 / (tokens of the batch): every token counts the same     (as Yu et al. 2025, DAPO)
    sequence    1 / (B * tokens of the row): every response counts the same, so a token of a long
                response counts less; long bad responses are held back less    (Shao et al. 2024)
    fixed       1 / (B * max_length): no sampled length enters      (Liu et al. 2025, Dr. GRPO)

    With fixed, advantages of rloo and a ratio of 1, the gradient is that of - E[r] / max_length,
    without bias. token has a bias of order 1 / B: it divides by the mean length that was drawn.
    """
    if normalise == "token":
        return mask / mask.sum()
    if normalise == "sequence":
        return mask / mask.sum(dim=1, keepdim=True).clamp_min(1) / len(mask)
    if normalise == "fixed":
        return mask / (len(mask) * max_length)
    raise ValueError(f"got normalise {normalise!r}; it is token, sequence or fixed")


def grpo_loss(logprobs, old_logprobs, advantages, weights, clip_eps=0.2, clip_eps_high=None):
    """
    - sum of w min(rho A, clip(rho, 1 - eps, 1 + eps_high) A),   rho = exp(logprobs - old_logprobs)

    Shao et al. 2024, equation 3, without its KL. advantages (B,), the same for all tokens of a
    response; weights (B, T) from token_weights. With eps_high > eps a token may rise further than
    fall, which lets unlikely ones grow (Yu et al. 2025, DAPO). The ratio of each token is clipped;
    TRL's RLOO clips the ratio of the whole response. log rho is capped as in ppo.policy_loss.
    -> loss, {policy_loss, clip_fraction: share of tokens where the clip decides, ratio: mean rho}
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(max=20.0))             # (B, T)
    high = clip_eps if clip_eps_high is None else clip_eps_high
    unclipped = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - clip_eps, 1 + high) * advantages[:, None]
    loss = -(weights * torch.minimum(unclipped, clipped)).sum()
    mask = (weights > 0).float()
    return loss, {"policy_loss": loss.detach(), "ratio": masked_mean(ratio.detach(), mask),
                  "clip_fraction": masked_mean((clipped < unclipped).float(), mask)}


CURVES = [                                               # heading, unit, logged metrics
    ("reward and true utility", "score, gold", ["score", "gold"]),
    ("KL to the reference", "nats per response", ["kl_ref"]),
    ("groups of equal scores", "share", ["equal_groups"]),
    ("entropy of the policy", "nats per token", ["entropy"]),
    ("KL to the policy that sampled", "nats per token", ["kl_old"]),
    ("share of tokens clipped", "", ["clip_fraction"]),
    ("response length", "tokens", ["response_length"]),
    ("spread of rewards within a group", "", ["group_std"]),
    ("gradient norm", "", ["grad_norm"])]
NAMES = {"grpo": "GRPO", "dr_grpo": "Dr. GRPO", "rloo": "RLOO", "reinforce": "REINFORCE"}
TRY = "try a lower --lr, --beta or --score_clip, with a different --out"     # if not finite


def check(cfg):
    """Exit, before any work, on settings that cannot work."""
    data.check_minibatch(cfg)
    check_reward(cfg)
    if cfg.batch_size % cfg.group_size:
        stop(f"--batch_size {cfg.batch_size} is not a multiple of --group_size {cfg.group_size}; "
             "every group must be whole")
    if cfg.group_size == 1 and cfg.advantage != "reinforce":
        stop("--group_size 1 leaves nothing to compare a response with, and --advantage "
             f"{cfg.advantage} compares; it takes 2 or more, or --advantage reinforce")


@self_contained
def main(cfg):
    run = Run(cfg, "grpo", sft.export)
    if run.finished:
        return run.show()
    check(cfg)
    G = cfg.group_size

    # ---- two models and a reward, always in eval mode: with dropout the first ratio would not be 1
    sft_folder = ensure(cfg, sft, init=cfg.init)
    actor, tokenizer = sft.load_policy(sft_folder, run.device, **cfg.compute_options())
    train_prompts, eval_prompts = data.prompts(cfg, tokenizer, actor.config.block_size, cfg.n_eval)
    reward = load_reward(cfg, actor, tokenizer, train_prompts, run.device)
    run.begin()
    sources = run.sources(tokenizer, actor, data=train_prompts)
    add_lora(actor, cfg.lora_rank)
    reference = reference_of(actor)
    optimizer = torch.optim.AdamW(trained(actor), lr=cfg.lr, betas=(0.9, 0.95), eps=1e-5,
                                  weight_decay=0.0, fused=True)
    first = run.restore(policy=actor, optimizer=optimizer, reward=reward, gpt=asdict(actor.config),
                        **sources)

    for step in run.steps(first, cfg.steps):
        # ---- 1. roll out
        drawn = data.draw(train_prompts, cfg.batch_size // G, run.generator)
        prompts = [prompt for prompt in drawn for _ in range(G)]             # groups are contiguous
        inputs, targets, mask, finished = roll_out(
            actor, prompts, cfg, tokenizer.end_tokens, run.generator)         # (B, T) x 3, (B,)
        run.lap("rollout")

        # ---- 2. score
        scores = reward(inputs, targets, mask, finished)                     # (B,)
        run.must_be_finite(REWARD_HINT, scores=scores)

        # ---- 3. logprobs
        old_logprobs, entropy = score_rollout(actor, inputs, targets, mask, cfg)        # (B, T) x 2
        with torch.no_grad():
            ref_logprobs = token_logprobs(reference, inputs, targets, mask, cfg.temperature)
        kl_ref = kl_estimate(old_logprobs, ref_logprobs).sum(dim=1)          # (B,)
        run.must_be_finite(TRY, kl_ref=kl_ref)
        check_kl_ref(kl_ref, cfg, first=step == 0)
        run.lap("score")

        # ---- 4. rewards
        rewards = scores                                                     # (B,)
        if cfg.kl_in == "reward":
            rewards = scores - cfg.beta * kl_ref

        # ---- 5. advantages
        advantages = group_advantages(rewards, G, cfg.advantage)             # (B,)
        run.must_be_finite(TRY, advantages=advantages)

        # ---- 6. update
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.lr_floor)
        set_learning_rate(optimizer, lr)
        means = data.Means()
        lengths = mask.sum(dim=1)                                            # (B,)
        minibatches = list(data.minibatches(cfg.batch_size, cfg.minibatch_size, cfg.epochs,
                                            run.generator))
        for minibatch in minibatches:
            weights = torch.zeros_like(mask)                                 # (B, T)
            weights[minibatch] = token_weights(mask[minibatch], cfg.normalise, cfg.max_new_tokens)
            policy_loss = 0.0
            for rows, share in data.microbatches(minibatch, cfg.accumulation, lengths[minibatch]):
                logprobs = token_logprobs(actor, inputs[rows], targets[rows], mask[rows],
                                          cfg.temperature)                   # (b, T)
                if step == 0 and run.taken == 0:
                    outside = check_first_ratio(logprobs, old_logprobs[rows], mask[rows], cfg,
                                                cfg.clip_eps_high)
                    means.add({"ratio_outside_clip": outside}, share)
                loss, metrics = grpo_loss(logprobs, old_logprobs[rows], advantages[rows],
                                          weights[rows], cfg.clip_eps, cfg.clip_eps_high)
                policy_loss = policy_loss + metrics.pop("policy_loss")       # a sum over tokens
                if cfg.kl_in == "loss":
                    k3 = kl_estimate(logprobs, ref_logprobs[rows], "k3")     # (b, T)
                    loss = loss + cfg.beta * (weights[rows] * k3).sum()
                run.backward(loss)                               # no share: the weights have it
                means.add(metrics, share)
            means.add({"policy_loss": policy_loss})
            means.add(run.step(cfg.grad_clip, TRY, grad_norm=optimizer))     # clips, steps, zeroes
        run.lap("update")
        rows = minibatches[0]                                    # one is enough to see kl_old
        with torch.no_grad():
            logprobs = token_logprobs(actor, inputs[rows], targets[rows], mask[rows],
                                      cfg.temperature)
            kl_old = masked_mean(kl_estimate(old_logprobs[rows], logprobs, "k3"), mask[rows])
        run.must_be_finite(TRY, kl_old=kl_old)
        run.lap("control")

        # ---- 7. log
        groups = scores.view(-1, G)                                          # (B / G, G)
        group_std = rewards.view(-1, G).std(dim=1, correction=min(1, G - 1))            # (B / G,)
        metrics = means.result() | {
            "score": scores.mean(), "kl_ref": kl_ref.mean(),
            "kl_ref_k3": kl_estimate(old_logprobs, ref_logprobs, "k3").sum(dim=1).mean(),
            "kl_old": kl_old, "beta": cfg.beta, "entropy": masked_mean(entropy, mask),
            "equal_groups": (groups == groups[:, :1]).all(dim=1).float().mean(),
            "group_std": group_std.mean(), "response_length": lengths.mean(),
            "eos_rate": finished.float().mean(), "lr": lr,
            "tokens_per_second": lengths.sum().item() / run.clock.total()}
        metrics |= true_utility(cfg, tokenizer, inputs, targets, mask)
        run.log(step, metrics, ["score", "gold", "kl_ref", "kl_old", "entropy", "clip_fraction",
                                "equal_groups", "group_std", "response_length"])
        run.checkpoint(step + 1)

    # ---- the result
    policies = {"SFT": reference, NAMES[cfg.advantage]: actor}
    text, results = compare(policies, reward, tokenizer, eval_prompts, cfg)
    return run.finish(text, results, CURVES, then="evaluate")


if __name__ == "__main__":
    launch(main, Config, __doc__)
