"""
Stage 3 without a critic: GRPO, Dr. GRPO, RLOO and REINFORCE.

Maximises  E_{x, y ~ pi_theta}[ r(x, y) ] - beta KL(pi_theta, pi_ref),  as PPO does. PPO learns what a prompt
is worth; here G responses to one prompt are a group, the group says what the prompt is worth, and how much
better than that a response did is its advantage, one number for all its tokens. Every update does this:

    1. roll out     y_1 .. y_G ~ pi_old to each of a batch of prompts x
    2. score        r(x, y_i), by the reward model or by any function of prompts and responses
    3. logprobs     log pi_old and log pi_ref of every token, by the training forward
    4. rewards      R_i = r(x, y_i) - beta sum_t (log pi_old - log pi_ref)(a_t | s_t), with --kl_in reward;
                    or R_i = r(x, y_i) alone, with --kl_in loss
    5. advantages   of each group, by --advantage:
                    grpo        (R_i - mean) / standard deviation          (Shao et al. 2024)
                    dr_grpo     R_i - mean                                 (Liu et al. 2025)
                    rloo        R_i - mean of the others                   (Kool et al. 2019)
                    reinforce   R_i, no baseline                           (Williams 1992)
    6. update       - sum_i,t w_it min(rho A_i, clip(rho, 1 - eps, 1 + eps_high) A_i), rho = pi_theta / pi_old
                    (a_t | s_t); w by --normalise. With --kl_in loss, plus
                    beta sum_i,t w_it (pi_ref / pi_theta - log (pi_ref / pi_theta) - 1)(a_t | s_t), which is k3
                    (Shao et al. 2024, equations 3 and 4)
    7. log          one line

Where each ends. With the KL in the reward, at the pi* of PPO and DPO: there R_i = beta log Z(x) for every
response, no response is better than its group, and whatever the advantages are divided or weighed by, there is
nothing left to follow. Only reinforce, which has no baseline, needs --normalise fixed for that. With the
KL in the loss, elsewhere: on policy the gradient of k3 is that of KL(pi_ref, pi_theta) in the states visited,
the other direction, and dividing r by the standard deviation s of a prompt's rewards multiplies that
prompt's beta by s.

Departures from Shao et al. (DeepSeekMath), whose form is --kl_in loss --normalise sequence: the KL is in
the reward, as Ahmadian et al. 2024 have it for RLOO; the loss is a mean over the tokens of a minibatch, close
to DAPO's (Yu et al. 2025); four gradient steps to an update for their one; groups of 4 for their 64.

    python grpo.py --config small
        -> out/small/grpo: checkpoint.pt, log.jsonl, curves.png, report.txt
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch

import corpus
import data
import experiment
import files
import frontier
import options
import ppo
import scoring
import sft
from model import add_lora, masked_mean, reference_of, token_logprobs, trained


@dataclass
class Config(scoring.Rewarded):          # which adds --reward and what is done to its scores
    steps: int = 80                 # updates, each on fresh responses
    batch_size: int = 128           # responses per update
    group_size: int = 4             # G, of them to one prompt
    minibatch_size: int = 32        # responses per gradient step
    epochs: int = 1                 # passes over the responses of an update
    temperature: float = 1.0        # of the policy, where it samples and where it is scored
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce"] = "grpo"     # of the rewards of a group
    kl_in: Literal["reward", "loss"] = "reward" # k1 as part of the reward, or k3 as part of the loss
    beta: float = 0.25              # strength of the KL to the reference
    kl_bound: float = 25.0          # nats per response above which to warn
    normalise: Literal["token", "sequence", "fixed"] = "token"  # what the loss is a mean over
    clip_eps: float = 0.2           # of the ratio, downwards
    clip_eps_high: float | None = None          # and upwards; none: the same. DAPO has 0.28
    lr: float = 7e-4                # AdamW's learning rate at its peak
    warmup: int = 2                 # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # to this share of the peak
    grad_clip: float = 1.0          # largest gradient norm
    n_eval: int = 64                # held-out prompts for the final comparison
    n_samples: int = 32             # responses to each of them, from SFT and from the policy


PRESETS = {
    "small": dict(save_every=20),
    "tiny": dict(steps=8, batch_size=32, minibatch_size=16, lr=2e-3, n_eval=16, n_samples=16, save_every=3),
    "gpt2": dict(steps=400, minibatch_size=64, group_size=8, beta=0.05, lr=3e-6, warmup=10, n_samples=4, save_every=20),
    "imdb": dict(steps=400, batch_size=256, minibatch_size=64, group_size=8, beta=0.1, lr=1e-5, warmup=5,
                 missing_eos_score=None, reward="lvwerra/distilbert-imdb", n_samples=8, save_every=20),
}
Config.presets = PRESETS


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
    of the others does not depend on y_i, so as a baseline it adds no bias; the group's mean contains
    r_i itself and shrinks the expected gradient to (G - 1) / G of it. Advantages of kind grpo are of
    size 1 however little the rewards of a group differ, unless they are equal: then they are 0.

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
    groups = groups - groups[:, :1]          # so that equal rewards give 0 exactly, free of rounding
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

    token       1 / (tokens of the batch): every token counts alike        (as Yu et al. 2025, DAPO)
    sequence    1 / (B * tokens of the row): every response counts alike, so that a token of a long response
                counts less; long bad responses are held back less         (Shao et al. 2024)
    fixed       1 / (B * max_length): no length of a sample enters         (Liu et al. 2025, Dr. GRPO)

    With fixed, advantages of rloo and a ratio of 1, the loss has the gradient of - E[r] / max_length, without
    bias. token comes as close as 1 / B: it divides by the mean length that happened to be drawn.
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

    Shao et al. 2024, equation 3, without its KL. advantages (B,), the same for all tokens of a response;
    weights (B, T) from token_weights. With eps_high > eps tokens may rise further than fall, which lets
    unlikely ones grow (Yu et al. 2025, DAPO). Each token's ratio is clipped, whatever the kind of
    advantage; TRL's RLOO clips the ratio of the whole response. log rho is capped as in
    ppo.policy_loss.
    -> loss, {policy_loss, clip_fraction: share of tokens where the clip decides, ratio: mean rho}
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(max=20.0))             # (B, T)
    high = clip_eps if clip_eps_high is None else clip_eps_high
    unclipped = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - clip_eps, 1 + high) * advantages[:, None]
    loss = -(weights * torch.minimum(unclipped, clipped)).sum()
    at = (weights > 0).float()
    return loss, {"policy_loss": loss.detach(), "ratio": masked_mean(ratio.detach(), at),
                  "clip_fraction": masked_mean((clipped < unclipped).float(), at)}


CURVES = [                                                       # heading, unit, logged metrics
    ("reward and true utility", "score, gold", ["score", "gold"]),
    ("KL to the reference", "nats per response", ["kl_ref"]),
    ("groups of equal scores", "share", ["equal_groups"]),
    ("entropy of the policy", "nats per token", ["entropy"]),
    ("KL to the policy that sampled", "nats per token", ["kl_old"]),
    ("share of tokens clipped", "", ["clip_fraction"]),
    ("response length", "tokens", ["response_length"]),
    ("spread of rewards within a group", "", ["group_std"]),
    ("gradient norm", "", ["grad_norm"])]


def check(cfg):
    """Stops on settings that cannot go together."""
    options.check_minibatch(cfg)
    scoring.check(cfg)
    if cfg.batch_size % cfg.group_size:
        files.stop(f"--batch_size {cfg.batch_size} is not a multiple of --group_size "
                   f"{cfg.group_size}; every group must be whole")
    if cfg.group_size == 1 and cfg.advantage != "reinforce":
        files.stop(f"--group_size 1 has nobody to compare a response with, as --advantage "
                   f"{cfg.advantage} does; it takes 2 or more, or --advantage reinforce")


@experiment.self_contained
def main(cfg):
    run = experiment.Run(cfg, "grpo", sft.export)
    if run.finished:
        return run.show()
    check(cfg)
    device, G = run.device, cfg.group_size

    # ---- two models and a reward, all in eval mode for good: with dropout the first ratio would not be 1
    actor, tokenizer = sft.load_policy(experiment.ensure(cfg, sft), device, **cfg.how())
    sft_made = files.fingerprint(actor)
    train_prompts, eval_prompts = corpus.prompts(cfg, tokenizer, actor.config.block_size, cfg.n_eval)
    reward = scoring.load_reward(cfg, actor, tokenizer, train_prompts, device)
    run.begin()
    add_lora(actor, cfg.lora_rank)
    reference = reference_of(actor)
    optimizer = torch.optim.AdamW(trained(actor), lr=cfg.lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0,
                                  fused=True)
    state = dict(policy=actor, optimizer=optimizer, gpt=asdict(actor.config),
                 tokenizer=data.fingerprint(tokenizer), sft=sft_made, reward=reward,
                 data=corpus.source_of(train_prompts))
    if not run.resuming:
        data.save_tokenizer(tokenizer, run.folder)

    for step in run.steps(run.restore(**state), cfg.steps):
        clock = experiment.Clock(device)

        # ---- 1. roll out
        drawn = data.draw(train_prompts, cfg.batch_size // G, run.generator)
        prompts = [prompt for prompt in drawn for _ in range(G)]             # groups are contiguous
        inputs, targets, mask, finished = ppo.roll_out(actor, prompts, cfg, tokenizer.eot_token, run.generator)
        clock.lap("rollout")

        # ---- 2. score
        scores = reward(inputs, targets, mask, finished)                                    # (B,)

        # ---- 3. logprobs
        old_logprobs, entropy = ppo.score_rollout(actor, inputs, targets, mask, cfg)    # (B, T) x 2
        with torch.no_grad():
            ref_logprobs = token_logprobs(reference, inputs, targets, mask, cfg.temperature)
        kl_ref = ppo.kl_estimate(old_logprobs, ref_logprobs).sum(dim=1)      # (B,) both 0 off the mask
        run.must_be_finite(hint=scoring.HINT, scores=scores)
        run.must_be_finite(kl_ref=kl_ref)
        ppo.check_rollout(kl_ref, cfg.kl_bound)
        clock.lap("score")

        # ---- 4. rewards
        rewards = scores - cfg.beta * kl_ref if cfg.kl_in == "reward" else scores           # (B,)

        # ---- 5. advantages
        advantages = group_advantages(rewards, G, cfg.advantage)                            # (B,)
        run.must_be_finite(hint="try a smaller --beta or --score_clip, with another --out",
                           advantages=advantages)
        group_std = rewards.view(-1, G).std(dim=1, correction=min(1, G - 1))            # (B / G,)
        equal = (scores.view(-1, G) == scores.view(-1, G)[:, :1]).all(dim=1)                # (B / G,)

        # ---- 6. update
        lr = experiment.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.lr_floor)
        experiment.set_learning_rate(optimizer, lr)
        history = []
        for _ in range(cfg.epochs):
            order = torch.randperm(cfg.batch_size, generator=run.generator)
            for minibatch in order.split(cfg.minibatch_size):
                weights = token_weights(mask[minibatch], cfg.normalise, cfg.max_new_tokens)  # (b, T), of them all
                metrics, whole_loss = {}, 0.0
                for rows, w in zip(data.parts(minibatch, cfg.accumulation), data.parts(weights, cfg.accumulation)):
                    logprobs = token_logprobs(actor, inputs[rows], targets[rows], mask[rows], cfg.temperature)
                    loss, part = grpo_loss(logprobs, old_logprobs[rows], advantages[rows], w, cfg.clip_eps,
                                           cfg.clip_eps_high)
                    if step == 0 and not history:
                        outside = ppo.check_first_minibatch(
                            logprobs, old_logprobs[rows], mask[rows], kl_ref, cfg.clip_eps,
                            cfg.clip_eps_high, cfg.dtype)
                    if cfg.kl_in == "loss":
                        k3 = ppo.kl_estimate(logprobs, ref_logprobs[rows], "k3")            # (b, T)
                        loss = loss + cfg.beta * (w * k3).sum()
                    loss.backward()
                    whole_loss = whole_loss + loss.detach()      # it is a sum over tokens
                    experiment.add(metrics, {"policy_loss": part.pop("policy_loss")}, 1.0)
                    experiment.add(metrics, part, mask[rows].sum() / mask[minibatch].sum())
                metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(actor.parameters(), cfg.grad_clip)
                run.must_be_finite(
                    len(history), "try a lower --lr or a smaller --beta, with another --out",
                    loss=whole_loss, **metrics)
                optimizer.step()
                optimizer.zero_grad()
                history.append(metrics)
        clock.lap("update")
        rows = order[:cfg.minibatch_size]                        # on one minibatch, which is enough to see
        with torch.no_grad():
            logprobs = token_logprobs(actor, inputs[rows], targets[rows], mask[rows], cfg.temperature)
            kl_old = masked_mean(ppo.kl_estimate(old_logprobs[rows], logprobs, "k3"), mask[rows])   # 0-d
        run.must_be_finite(taken=len(history), kl_old=kl_old)
        clock.lap("control")

        # ---- 7. log
        metrics = {name: sum(m[name].item() for m in history) / len(history) for name in history[0]}
        metrics |= {"score": scores.mean(), "kl_ref": kl_ref.mean(),
                    "kl_ref_k3": ppo.kl_estimate(old_logprobs, ref_logprobs, "k3").sum(1).mean(),
                    "kl_old": kl_old, "beta": cfg.beta, "entropy": masked_mean(entropy, mask),
                    "equal_groups": equal.float().mean(), "group_std": group_std.mean(),
                    "response_length": mask.sum(1).mean(), "eos_rate": finished.float().mean(),
                    "lr": lr, **frontier.true_utility(cfg, tokenizer, inputs, targets, mask), **clock.seconds}
        metrics["tokens_per_second"] = mask.sum().item() / sum(clock.seconds.values())
        if step == 0:
            metrics["ratio_outside_clip"] = outside
        run.log(step, metrics, ["score", "gold", "kl_ref", "kl_old", "entropy", "clip_fraction",
                                "equal_groups", "group_std", "response_length"])
        run.checkpoint(step + 1)

    # ---- the result
    name = {"grpo": "GRPO", "dr_grpo": "Dr. GRPO", "rloo": "RLOO", "reinforce": "REINFORCE"}[cfg.advantage]
    text, results = frontier.compare({"SFT": reference, name: actor}, reward, tokenizer, eval_prompts, cfg)
    picture = experiment.curves(run.folder, f"{name}, {run.folder}", CURVES)
    return run.finish("\n".join([
        text, "",
        f"curves      {picture}", f"log         {run.folder}/log.jsonl",
        f"checkpoint  {run.folder}/checkpoint.pt",
        f"next        {options.next_command(cfg, 'evaluate')}"]), results)


if __name__ == "__main__":
    experiment.launch(main, Config, __doc__)
