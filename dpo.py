"""
Stage 3 without RL: direct preference optimisation, DPO, and its relatives.

Maximises  E_{x, y ~ pi_theta}[ r(x, y) ] - beta KL(pi_theta, pi_ref),  as PPO does, but from
comparisons alone: training needs no samples and no critic. Rafailov et al. 2023, section 4, in four
lines:

    the optimum     pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)
    solved for r    r(x, y) = beta log pi*(y|x) / pi_ref(y|x)  +  beta log Z(x)
    Bradley-Terry   P(y_w before y_l) = sigmoid(r(x, y_w) - r(x, y_l)), in which Z(x) cancels
    so maximise the likelihood of the labels directly in the policy: with
        z = beta (log pi_theta(y_w|x) / pi_ref(y_w|x) - log pi_theta(y_l|x) / pi_ref(y_l|x))
        loss = - mean log sigmoid(z)

A policy is a reward model in disguise: beta log pi_theta / pi_ref is its implied reward, z the
margin.

    1. pairs        two responses to a prompt and which is better: the annotators' comparisons, on
                    which the reward model was trained, or those of --data; or fresh samples,
                    labelled by the reward model: a drawn label or the probability itself (soft)
    2. reference    log pi_ref of both responses, sums over tokens in fp32, computed once and stored
    3. logprobs     the same of pi_theta, by the training forward pass
    4. update       the loss of the margins; one gradient step
    5. log          one line; now and then samples of the policy, because only they show its KL
    With --rounds, 1 and 2 are repeated during training, with pairs that the policy itself wrote.

Departures from Rafailov et al.: AdamW instead of RMSprop, a learning rate that suits a model of
half a million weights, and pairs without a difference are left out.

    python dpo.py --config small
        -> out/small/dpo: checkpoint.pt, log.jsonl, curves.png, report.txt
"""

import itertools
import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch

import data
import reward_model as rm
import sft
from compare import annotators_preference, compare, true_utility
from lab import files
from lab.config import ABOVE_0
from lab.report import progress
from lab.run import (Run, check_finite, ensure, launch, learning_rate, self_contained,
                     set_learning_rate, stop, stored_config)
from model import add_lora, masked_mean, reference_of, token_logprobs, trained
from presets import presets_of
from reward import REWARD_HINT, Rewarded, check_reward, load_reward
from sampler import generate


@dataclass
class Config(Rewarded):              # Rewarded adds --reward and the options for its scores
    labels: Literal["annotators", "reward_model", "soft"] = "annotators"    # who labels the pairs
    n_pairs: int = 8000             # comparisons to train on, in all rounds together
    rounds: int = 1                 # from the second on, the policy itself writes the pairs
    epochs: int = 1                 # passes over the pairs of a round
    batch_size: int = 32            # pairs per update
    loss: Literal["sigmoid", "robust", "ipo", "hinge", "fidelity"] = "sigmoid"      # pairwise loss
    beta: float = 0.25              # strength of the KL to the reference
    label_smoothing: float = 0.0    # with sigmoid: cDPO; with robust: the share of flipped labels
    margin: float = 0.0             # how far the chosen response should lead, in units of z
    length_normalise: bool = False  # use logprobs per token, not their sums
    reference_free: bool = False    # leave pi_ref out; with length_normalise and margin: SimPO
    mask_shared_prefix: bool = False        # leave out the tokens before a pair's first difference
    nll_coef: float = 0.0           # weight of the chosen response's - log pi per token in the loss
    lr: float = 4e-4                # AdamW's learning rate at its peak
    warmup: int = 10                # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # final learning rate, as a share of the peak
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 25            # updates between samples of the policy
    n_eval: int = 64                # held-out prompts for these samples and the final comparison
    n_samples: int = 32             # responses to each in the final comparison, per policy
    presets = presets_of("dpo")
    ranges = {"beta": ABOVE_0}      # the optimum is at r / beta


# --------------------------------------------------------------------------------------------------
# The maths

def sequence_logprobs(logprobs, mask, length_normalise=False):
    """log pi(y | x), the sum over response tokens, or their mean: (B, T) -> (B,)"""
    total = (logprobs * mask).sum(dim=1)
    return total / mask.sum(dim=1).clamp_min(1) if length_normalise else total


def after_shared_prefix(chosen_targets, rejected_targets, chosen_mask, rejected_mask):
    """
    Both masks without the columns before a pair's first difference (DeepSpeed-Chat): (B, T) each

    In a difference of sums the shared tokens cancel. In a difference of means they do not.
    """
    different = (chosen_targets != rejected_targets) | (chosen_mask != rejected_mask)       # (B, T)
    from_there = different.cumsum(dim=1) > 0
    return chosen_mask * from_there, rejected_mask * from_there


def dpo_loss(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta,
             kind="sigmoid", label_smoothing=0.0, margin=0.0, target=None, weights=None):
    """
    Mean loss of pairs. All are (B,), the logprobs those of whole responses.

    h = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)
    z = beta h - margin, and t the probability that the chosen one wins: target, or 1

    sigmoid     - t log sigma(z) - (1 - t) log sigma(-z)    (Rafailov et al. 2023, equation 7). With
                label_smoothing e < 1/2 it is cDPO, t becomes (1 - e) t + e (1 - t)  (Mitchell 2023)
    robust      the same with t replaced by (t - e) / (1 - 2 e): unbiased if a share e of the labels
                is flipped, but without a lower bound    (Chowdhury et al. 2024)
    ipo         t (h - 1 / (2 beta))^2 + (1 - t) (h + 1 / (2 beta))^2, for margin 0  (Azar et al.
                2023). h is of sums, as in the paper; TRL and LLaMA-Factory divide by the lengths
                (--length_normalise 1)
    hinge       t max(0, 1 - z) + (1 - t) max(0, 1 + z)     (RSO's hinge-norm, Liu et al. 2023;
                SLiC-HF, Zhao et al. 2023, has it without the reference)
    fidelity    1 - sqrt(t sigma(z)) - sqrt((1 - t) sigma(-z)), from 0 to 1  (Tsai et al. 2007).
                With labels of 0 and 1 it has the optimum of sigmoid at half the beta

    -> loss, {loss, margin: mean beta h, accuracy: share of pairs with h > 0, a tie counts one half}

    >>> x = torch.tensor([-7.0])
    >>> dpo_loss(x, x - 1, x, x - 1, beta=0.1)[0]        # policy = reference: ln 2
    tensor(0.6931)
    """
    logsigmoid = torch.nn.functional.logsigmoid
    h = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)
    z = beta * h - margin
    t = torch.ones_like(h) if target is None else target
    if kind == "sigmoid":
        t = (1 - label_smoothing) * t + label_smoothing * (1 - t)
    elif kind == "robust":
        t = (t - label_smoothing) / (1 - 2 * label_smoothing)
    elif label_smoothing:
        raise ValueError(f"got label_smoothing {label_smoothing} with kind {kind}; it belongs to "
                         "sigmoid and robust")
    if kind in ("sigmoid", "robust"):
        losses = -t * logsigmoid(z) - (1 - t) * logsigmoid(-z)
    elif kind == "ipo":
        losses = t * (z / beta - 0.5 / beta) ** 2 + (1 - t) * (z / beta + 0.5 / beta) ** 2
    elif kind == "hinge":
        losses = t * torch.relu(1 - z) + (1 - t) * torch.relu(1 + z)
    elif kind == "fidelity":
        losses = (1 - t.sqrt() * torch.exp(0.5 * logsigmoid(z))
                  - (1 - t).sqrt() * torch.exp(0.5 * logsigmoid(-z)))
    else:
        raise ValueError(f"got kind {kind!r}; it is sigmoid, robust, ipo, hinge or fidelity")
    weights = torch.ones_like(h) if weights is None else weights
    loss = masked_mean(losses, weights)
    with torch.no_grad():
        sign = h.sign() * (h.abs() > 1e-4)                                   # rounding is a tie
        metrics = {"loss": loss.detach(), "margin": beta * masked_mean(h, weights),
                   "accuracy": masked_mean(0.5 + 0.5 * sign, weights)}
    return loss, metrics


# --------------------------------------------------------------------------------------------------
# Pairs: dicts of prompt_ids, chosen_ids, rejected_ids, target; later also ref_logprobs of the two

def pairs_of_rankings(comparisons, generator):
    """All pairs of the annotators' rankings, which are best first, in a random order"""
    pairs = [{"prompt_ids": c["prompt_ids"], "chosen_ids": chosen, "rejected_ids": rejected,
              "target": 1.0}
             for c in comparisons
             for chosen, rejected in itertools.combinations(c["response_ids"], 2)]
    return [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]


@torch.no_grad()
def sample_pairs(policy, reward, tokenizer, prompts, cfg, annotator_temperature, generator):
    """Two responses of the policy to each prompt, labelled as --labels says"""
    eos_id = tokenizer.end_tokens
    pairs = []
    batches = [prompts[i:i + 256] for i in range(0, len(prompts), 256)]
    for batch in progress(batches, f"sampling and labelling {len(prompts)} pairs"):
        twice = [prompt for prompt in batch for _ in range(2)]
        tokens, mask = generate(policy, twice, cfg.max_new_tokens, eos_id, generator=generator)
        inputs, targets = data.shift(tokens)                                 # (2 b, T) each
        if cfg.labels == "annotators":
            p_first = annotators_preference(tokenizer, inputs, targets, mask,
                                            annotator_temperature)          # (b,)
        else:
            scores = reward(inputs, targets, mask, data.met_eos(targets, mask, eos_id)).cpu()
            check_finite(scores, "the reward of a sampled response")
            p_first = torch.sigmoid(scores[::2] - scores[1::2])              # (b,)
        if cfg.labels == "soft":
            first_wins = p_first >= 0.5
            target = torch.maximum(p_first, 1 - p_first)
        else:
            first_wins = torch.rand(len(batch), generator=generator) < p_first
            target = torch.ones(len(batch))
        responses = data.responses_of(tokens, mask)
        for i, prompt in enumerate(batch):
            first, second = responses[2 * i:2 * i + 2]
            chosen, rejected = (first, second) if first_wins[i] else (second, first)
            pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected,
                          "target": target[i].item()})
    return pairs


@torch.no_grad()
def add_reference(pairs, reference, cfg):
    """Store log pi_ref of both responses in every pair: ref_logprobs"""
    for i in range(0, len(pairs), 256):
        chunk = pairs[i:i + 256]
        logprobs, _, _ = pair_logprobs(reference, chunk, cfg)                # (2, b)
        for pair, both in zip(chunk, logprobs.T.tolist()):
            pair["ref_logprobs"] = both


def pair_logprobs(policy, pairs, cfg):
    """
    log pi of the chosen (row 0) and the rejected (row 1) responses -> (2, b); their lengths (2, b);
    - log pi per token of the chosen ones, 0-d
    """
    device = next(policy.parameters()).device
    prompts = [pair["prompt_ids"] for pair in pairs] * 2
    responses = [pair[key] for key in ("chosen_ids", "rejected_ids") for pair in pairs]
    inputs, targets, mask = (t.to(device) for t in data.collate(prompts, responses))    # (2 b, T)
    logprobs = token_logprobs(policy, inputs, targets, mask)                 # (2 b, T)
    nll = -masked_mean(logprobs[:len(pairs)], mask[:len(pairs)])
    lengths = mask.sum(dim=1).view(2, -1)
    if cfg.mask_shared_prefix:
        mask = torch.cat(after_shared_prefix(*targets.chunk(2), *mask.chunk(2)))
    return sequence_logprobs(logprobs, mask, cfg.length_normalise).view(2, -1), lengths, nll


@torch.no_grad()
def sample_policy(policy, reference, reward, tokenizer, prompts, cfg):
    """Metrics that only samples show: {metric: mean} over one response to each prompt"""
    tokens, mask = generate(policy, prompts, cfg.max_new_tokens, tokenizer.end_tokens,
                            generator=torch.Generator().manual_seed(cfg.seed))
    inputs, targets = data.shift(tokens)
    finished = data.met_eos(targets, mask, tokenizer.end_tokens)
    logprobs, entropy = token_logprobs(policy, inputs, targets, mask, return_entropy=True)
    ref_logprobs = token_logprobs(reference, inputs, targets, mask)
    metrics = {"kl_ref": (logprobs - ref_logprobs).sum(dim=1).mean(),
               "entropy": masked_mean(entropy, mask),
               "score": reward(inputs, targets, mask, finished).mean(),
               "response_length": mask.sum(dim=1).mean(), "eos_rate": finished.float().mean()}
    return metrics | true_utility(cfg, tokenizer, inputs, targets, mask)


CURVES = [                                               # heading, unit, logged metrics
    ("loss", "", ["loss"]),
    ("implied reward: chosen less rejected", "margin", ["margin"]),
    ("share of pairs with a margin above 0", "", ["accuracy"]),
    ("log-probability of responses", "nats", ["chosen_logprobs", "rejected_logprobs"]),
    ("KL to the reference", "nats per response", ["kl_ref"]),
    ("reward and true utility", "score, gold", ["score", "gold"]),
    ("entropy of the policy", "nats per token", ["entropy"]),
    ("length", "tokens", ["response_length", "chosen_length", "rejected_length"]),
    ("gradient norm", "", ["grad_norm"])]
TRY = "try a lower --lr or a less extreme --beta, with a different --out"    # if not finite


def check(cfg):
    """Exit, before any work, on settings that mean nothing together; note those without effect."""
    check_reward(cfg)
    if cfg.labels == "annotators":
        data.check_comparisons(cfg)
    if cfg.label_smoothing >= 0.5:
        stop(f"--label_smoothing got {cfg.label_smoothing}; at 0.5 labels say nothing, above it "
             "the opposite: it takes a number below 0.5")
    if cfg.label_smoothing and cfg.loss not in ("sigmoid", "robust"):
        stop(f"--label_smoothing {cfg.label_smoothing} works only with --loss sigmoid or robust, "
             f"this is --loss {cfg.loss}; change the loss or leave the smoothing out")
    if cfg.labels == "annotators" and cfg.rounds > 1 and cfg.data != "reviews":
        stop(f"--rounds {cfg.rounds} compares samples of the policy, and --data has no annotators "
             "for them; use --labels reward_model or soft")
    if cfg.n_pairs < cfg.rounds * cfg.batch_size:
        stop(f"--n_pairs {cfg.n_pairs} in {cfg.rounds} rounds is less than one batch of "
             f"{cfg.batch_size} pairs a round; raise --n_pairs or lower --batch_size")
    if cfg.mask_shared_prefix and not cfg.length_normalise:
        print("note: --mask_shared_prefix changes nothing without --length_normalise: in a "
              "difference of sums the shared tokens cancel")


def load_comparisons(cfg, reward, tokenizer, block_size, n):
    """-> the annotators' comparisons, or None; the built-in annotators' temperature, or None"""
    if cfg.labels != "annotators":
        return None, None
    if cfg.data != "reviews":
        comparisons, _ = data.comparisons(cfg, tokenizer, block_size, n, 1)
        return comparisons, None
    folder = reward.folder or ensure(cfg, rm)
    comparisons, _ = rm.read_comparisons(folder)
    available = sum(math.comb(len(c["response_ids"]), 2) for c in comparisons)
    if n > available:
        stop(f"--n_pairs asks for {n} of the annotators' comparisons, {folder} has {available}; "
             "lower it, or let reward_model.py collect more (--n_prompts)")
    return comparisons, stored_config(folder)["annotator_temperature"]


@self_contained
def main(cfg):
    run = Run(cfg, "dpo", sft.export)
    if run.finished:
        return run.show()
    check(cfg)
    device = run.device
    sft_folder = ensure(cfg, sft, init=cfg.init)
    policy, tokenizer = sft.load_policy(sft_folder, device, **cfg.compute_options())
    block_size = policy.config.block_size
    train_prompts, eval_prompts = data.prompts(cfg, tokenizer, block_size, cfg.n_eval)
    reward = load_reward(cfg, policy, tokenizer, train_prompts, device)
    n = cfg.n_pairs // cfg.rounds                                            # pairs in a round
    comparisons, temperature = load_comparisons(cfg, reward, tokenizer, block_size, n)
    if cfg.labels == "annotators" and cfg.data != "reviews":
        n = len(comparisons)
    data.check_enough(n, cfg.batch_size, "pairs")
    run.begin()
    sources = run.sources(tokenizer, policy, data=train_prompts)
    add_lora(policy, cfg.lora_rank)
    reference = reference_of(policy)
    optimizer = torch.optim.AdamW(trained(policy), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    first = run.restore(policy=policy, optimizer=optimizer, reward=reward,
                        gpt=asdict(policy.config), **sources)

    steps_per_round = cfg.epochs * (n // cfg.batch_size)
    steps = cfg.rounds * steps_per_round
    pairs = None
    for step in run.steps(first, steps):
        round_number, step_in_round = divmod(step, steps_per_round)
        stored = run.folder / f"pairs_{round_number}.json"
        if pairs is None and step_in_round:                      # resumed in the middle of a round
            pairs = files.read_json(stored)

        if step_in_round == 0:
            # ---- 1. pairs
            if round_number == 0 and cfg.labels == "annotators":
                pairs = pairs_of_rankings(comparisons, run.generator)[:n]
            else:
                prompts = data.draw(train_prompts, n, run.generator)
                pairs = sample_pairs(policy, reward, tokenizer, prompts, cfg, temperature,
                                     run.generator)
            total = len(pairs)
            pairs = [pair for pair in pairs if pair["chosen_ids"] != pair["rejected_ids"]]
            print(f"round {round_number}: {len(pairs)} pairs; {total - len(pairs)} with identical "
                  "responses are left out")
            if len(pairs) < cfg.batch_size:
                stop(f"only {len(pairs)} pairs have two different responses, but a batch takes "
                     f"{cfg.batch_size}: the policy repeats itself; try a higher --n_pairs")

            # ---- 2. reference
            add_reference(pairs, reference, cfg)
            files.write(stored, json.dumps(pairs))

        # ---- 3. logprobs, 4. update
        metrics = {}
        if step % cfg.eval_every == 0 or step + 1 == steps:      # before the update: KL 0 at first
            metrics = sample_policy(policy, reference, reward, tokenizer, eval_prompts, cfg)
            run.must_be_finite(REWARD_HINT, score=metrics["score"])
            run.must_be_finite(TRY, **metrics)
        rows = data.batch_rows(len(pairs), cfg.batch_size, step_in_round, cfg.seed + round_number)
        batch = [pairs[i] for i in rows]
        n_tokens = sum(len(pair["chosen_ids"]) for pair in batch)
        means = data.Means()
        for part, share in data.microbatches(batch, cfg.accumulation):
            (chosen, rejected), lengths, nll = pair_logprobs(policy, part, cfg)      # (b,), (b,)
            ref_logprobs = torch.tensor([pair["ref_logprobs"] for pair in part], device=device)
            ref_chosen, ref_rejected = ref_logprobs.T                        # (b,) each
            if cfg.reference_free:
                ref_chosen = ref_rejected = torch.zeros_like(chosen)
            target = torch.tensor([pair["target"] for pair in part], device=device)         # (b,)
            loss, loss_metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta,
                                          cfg.loss, cfg.label_smoothing, cfg.margin, target)
            token_share = lengths[0].sum() / n_tokens            # nll is a mean over tokens
            run.backward(share * loss + token_share * cfg.nll_coef * nll)
            means.add(loss_metrics | {"chosen_logprobs": chosen.detach().mean(),
                                      "rejected_logprobs": rejected.detach().mean(),
                                      "chosen_length": lengths[0].mean(),
                                      "rejected_length": lengths[1].mean()}, share)
            means.add({"nll": nll.detach()}, token_share)
        lr = learning_rate(step, steps, cfg.lr, cfg.warmup, cfg.lr_floor)
        set_learning_rate(optimizer, lr)
        means.add(run.step(cfg.grad_clip, TRY, grad_norm=optimizer))         # clips, steps, zeroes

        # ---- 5. log
        metrics |= means.result() | {"lr": lr}
        run.log(step, metrics, ["loss", "margin", "accuracy", "chosen_logprobs",
                                "rejected_logprobs", "kl_ref", "score", "gold"],
                every=cfg.eval_every)
        run.checkpoint(step + 1)

    # ---- the result
    text, results = compare({"SFT": reference, "DPO": policy}, reward, tokenizer, eval_prompts, cfg)
    return run.finish(text, results, CURVES, then="evaluate")


if __name__ == "__main__":
    launch(main, Config, __doc__)
