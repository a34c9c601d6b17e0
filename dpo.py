"""
Stage 3 without RL: direct preference optimisation, DPO, and its relatives.

Maximises  E_{x, y ~ pi_theta}[ r(x, y) ] - beta KL(pi_theta, pi_ref),  as PPO does, but from
comparisons alone: nothing need be sampled while it trains, and there is no critic.
Rafailov et al. 2023, section 4, in four lines:

    the optimum     pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)
    solved for r    r(x, y) = beta log pi*(y|x) / pi_ref(y|x)  +  beta log Z(x)
    Bradley-Terry   P(y_w before y_l) = sigmoid(r(x, y_w) - r(x, y_l)), in which Z(x) cancels
    so maximise the likelihood of the labels directly in the policy: with
                    z = beta (log pi_theta(y_w|x) / pi_ref(y_w|x) - log pi_theta(y_l|x) / pi_ref(y_l|x))
                    loss = - mean log sigmoid(z)

A policy is a reward model in disguise: beta log pi_theta / pi_ref is its implied reward, z the margin.

    1. pairs        two responses to a prompt and which of them is better: by the annotators, whose
                    comparisons the reward model was trained on, or which --data holds; or of fresh samples,
                    by the reward model, as a drawn label or as the probability itself (soft)
    2. reference    log pi_ref of both responses, sums over tokens in fp32, computed once and stored
    3. logprobs     the same of pi_theta, by the training forward
    4. update       the loss of the margins; one gradient step
    5. log          one line; now and then the policy is sampled, since only its own samples show its KL
    With --rounds, 1 and 2 come again during training, with pairs that the policy itself wrote.

Departures from Rafailov et al.: AdamW for RMSprop, a learning rate that suits a model of half a
million weights, and pairs without a difference are left out.

    python dpo.py --config small
        -> out/small/dpo: checkpoint.pt, log.jsonl, curves.png, report.txt
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal

import torch

import corpus
import data
import experiment
import files
import frontier
import options
import reviews
import reward_model as rm
import scoring
import sft
from model import add_lora, generate, masked_mean, reference_of, token_logprobs, trained


@dataclass
class Config(scoring.Rewarded):          # which adds --reward and what is done to its scores
    labels: Literal["annotators", "reward_model", "soft"] = "annotators"    # of the data; drawn by --reward; its P
    n_pairs: int = 8000             # comparisons to train on, of all rounds together
    rounds: int = 1                 # pairs are made afresh, by the policy itself, from the second on
    epochs: int = 1                 # passes over the pairs of a round
    batch_size: int = 32            # pairs per update
    loss: Literal["sigmoid", "robust", "ipo", "hinge", "fidelity"] = "sigmoid"      # of a margin
    beta: float = 0.25              # strength of the KL to the reference
    label_smoothing: float = 0.0    # sigmoid: cDPO; robust: the share of labels that are flipped
    margin: float = 0.0             # by which the chosen response should lead, in units of z
    length_normalise: bool = False  # logprobs per token instead of their sums
    reference_free: bool = False    # leave pi_ref out; with length_normalise and margin: SimPO
    mask_shared_prefix: bool = False        # leave out the tokens before a pair's first difference
    nll_coef: float = 0.0           # adds the chosen response's - log pi per token
    lr: float = 4e-4                # AdamW's learning rate at its peak
    warmup: int = 10                # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # to this share of the peak
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 25            # updates between samples of the policy
    n_eval: int = 64                # held-out prompts for those, and for the final comparison
    n_samples: int = 32             # in which there are so many responses to each


PRESETS = {
    "small": {},
    "tiny": dict(n_pairs=320, batch_size=16, lr=1e-3, warmup=2, eval_every=5, n_eval=16, n_samples=16, save_every=7),
    "gpt2": dict(n_pairs=70000, batch_size=64, accumulation=4, beta=0.1, lr=1e-6, warmup=150, lr_floor=1.0, grad_clip=10.0,
                 eval_every=100, n_samples=4, save_every=200),
    "tldr": dict(n_pairs=50000, batch_size=64, accumulation=4, beta=0.5, lr=1e-6, warmup=150, lr_floor=1.0, grad_clip=10.0,
                 eval_every=100, n_samples=4, save_every=200),
}
Config.presets = PRESETS


# --------------------------------------------------------------------------------------------------
# The maths

def sequence_logprobs(logprobs, mask, length_normalise=False):
    """log pi(y | x), the sum over response tokens, or that divided by their number: (B, T) -> (B,)"""
    total = (logprobs * mask).sum(dim=1)
    return total / mask.sum(dim=1).clamp_min(1) if length_normalise else total


def after_shared_prefix(chosen_targets, rejected_targets, chosen_mask, rejected_mask):
    """
    Both masks without the columns before a pair's first difference (DeepSpeed-Chat): (B, T) each

    The shared tokens cancel in a difference of sums; they do not where logprobs are divided by lengths.
    """
    differ = ((chosen_targets != rejected_targets) | (chosen_mask != rejected_mask)).cumsum(dim=1) > 0
    return chosen_mask * differ, rejected_mask * differ


def dpo_loss(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta,
             kind="sigmoid", label_smoothing=0.0, margin=0.0, target=None, weights=None):
    """
    Mean loss of pairs; all (B,), logprobs of whole responses.

    h = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)
    z = beta h - margin, and t the probability that the chosen one wins: target, or 1

    sigmoid     - t log sigma(z) - (1 - t) log sigma(-z)    (Rafailov et al. 2023, equation 7). With
                label_smoothing e < 1/2 it is cDPO, t becomes (1 - e) t + e (1 - t)  (Mitchell 2023)
    robust      the same with t replaced by (t - e) / (1 - 2 e): without bias where a share e of the
                labels is flipped, but without a lower bound    (Chowdhury et al. 2024)
    ipo         t (h - 1 / (2 beta))^2 + (1 - t) (h + 1 / (2 beta))^2, for margin 0  (Azar et al. 2023).
                h is of sums, as in the paper; TRL and LLaMA-Factory divide each by its length
                (--length_normalise 1)
    hinge       t max(0, 1 - z) + (1 - t) max(0, 1 + z)     (RSO's hinge-norm, Liu et al. 2023; SLiC-HF,
                Zhao et al. 2023, has it without the reference)
    fidelity    1 - sqrt(t sigma(z)) - sqrt((1 - t) sigma(-z)), from 0 to 1  (Tsai et al. 2007). With
                labels of 0 and 1 its optimum is that of sigmoid at half the beta

    -> loss, {loss, margin: mean beta h, accuracy: share of pairs with h > 0, a tie counts one half}

    >>> x = torch.tensor([-7.0])
    >>> dpo_loss(x, x - 1, x, x - 1, beta=0.1)[0]                            # policy = reference: ln 2
    tensor(0.6931)
    """
    logsigmoid = torch.nn.functional.logsigmoid
    h = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)    # (B,)
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
# Pairs: dicts of prompt_ids, chosen_ids, rejected_ids, target; then also ref_logprobs of the two

def pairs_of_rankings(comparisons, generator):
    """All pairs of the annotators' rankings, which are best first, in a random order"""
    pairs = [{"prompt_ids": c["prompt_ids"], "chosen_ids": c["response_ids"][i],
              "rejected_ids": c["response_ids"][j], "target": 1.0}
             for c in comparisons
             for i in range(len(c["response_ids"])) for j in range(i + 1, len(c["response_ids"]))]
    return [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]


@torch.no_grad()
def sample_pairs(policy, reward, tokenizer, prompts, cfg, annotator_temperature, generator):
    """Two responses of the policy to each prompt, labelled as cfg.labels says"""
    eos_id, pairs = tokenizer.eot_token, []
    batches = [prompts[i:i + 256] for i in range(0, len(prompts), 256)]
    for batch in experiment.progress(batches, f"sampling and labelling {len(prompts)} pairs"):
        ids = [prompt for prompt in batch for _ in range(2)]
        tokens, mask = generate(policy, ids, cfg.max_new_tokens, eos_id, generator=generator)
        inputs, targets = data.shift(tokens)
        if cfg.labels == "annotators":
            gold, _ = frontier.read_gold(tokenizer, inputs, targets, mask)
            first_wins = reviews.preference(*gold.view(-1, 2).T, annotator_temperature)     # (b,)
        else:
            scores = reward(inputs, targets, mask, data.met_eos(targets, mask, eos_id)).cpu()
            experiment.check_finite(scores, "the reward of a sampled response")
            first_wins = torch.sigmoid(scores[::2] - scores[1::2])           # (b,)
        if cfg.labels == "soft":
            swap, target = first_wins < 0.5, torch.maximum(first_wins, 1 - first_wins)
        else:
            swap = torch.rand(len(batch), generator=generator) >= first_wins
            target = torch.ones(len(batch))
        responses = data.responses_of(tokens, mask)
        for i, second in enumerate(swap.tolist()):
            pairs.append({"prompt_ids": ids[2 * i], "chosen_ids": responses[2 * i + second],
                          "rejected_ids": responses[2 * i + 1 - second], "target": target[i].item()})
    return pairs


def pair_logprobs(policy, pairs, cfg):
    """log pi of the chosen (row 0) and the rejected (row 1) responses -> (2, b); lengths; NLL per token"""
    device = policy.transformer.wte.weight.device
    prompts = [pair["prompt_ids"] for pair in pairs] * 2
    responses = [pair[key] for key in ("chosen_ids", "rejected_ids") for pair in pairs]
    inputs, targets, mask = (t.to(device) for t in data.collate(prompts, responses))        # (2 b, T)
    logprobs = token_logprobs(policy, inputs, targets, mask)                 # (2 b, T)
    nll = -masked_mean(logprobs[:len(pairs)], mask[:len(pairs)])
    lengths = mask.sum(dim=1).view(2, -1)                                    # (2, b)
    if cfg.mask_shared_prefix:
        mask = torch.cat(after_shared_prefix(*targets.chunk(2), *mask.chunk(2)))
    return sequence_logprobs(logprobs, mask, cfg.length_normalise).view(2, -1), lengths, nll


@torch.no_grad()
def sample_policy(policy, reference, reward, tokenizer, prompts, cfg):
    """What only samples show: {metric: mean} over one response to each prompt"""
    tokens, mask = generate(policy, prompts, cfg.max_new_tokens, tokenizer.eot_token,
                            generator=torch.Generator().manual_seed(cfg.seed))
    inputs, targets = data.shift(tokens)
    finished = data.met_eos(targets, mask, tokenizer.eot_token)
    logprobs, entropy = token_logprobs(policy, inputs, targets, mask, return_entropy=True)
    ref_logprobs = token_logprobs(reference, inputs, targets, mask)
    return {"kl_ref": (logprobs - ref_logprobs).sum(1).mean(), "entropy": masked_mean(entropy, mask),
            "score": reward(inputs, targets, mask, finished).mean(),
            "response_length": mask.sum(1).mean(), "eos_rate": finished.float().mean(),
            **frontier.true_utility(cfg, tokenizer, inputs, targets, mask)}


CURVES = [                                                       # heading, unit, logged metrics
    ("loss", "", ["loss"]),
    ("implied reward: chosen less rejected", "margin", ["margin"]),
    ("share of pairs with a margin above 0", "", ["accuracy"]),
    ("log-probability of responses", "nats", ["chosen_logprobs", "rejected_logprobs"]),
    ("KL to the reference", "nats per response", ["kl_ref"]),
    ("reward and true utility", "score, gold", ["score", "gold"]),
    ("entropy of the policy", "nats per token", ["entropy"]),
    ("length", "tokens", ["response_length", "chosen_length", "rejected_length"]),
    ("gradient norm", "", ["grad_norm"])]


def check(cfg):
    """Stops on settings that mean nothing together, and says which settings change nothing."""
    scoring.check(cfg)
    if cfg.labels == "annotators":
        corpus.check_comparisons(cfg)
    if cfg.beta == 0:
        files.stop("--beta got 0; DPO divides by it: it takes a number above 0")
    if cfg.label_smoothing >= 0.5:
        files.stop(f"--label_smoothing got {cfg.label_smoothing}; from one half on, labels mean "
                   "the opposite: it takes a number below 0.5")
    if cfg.label_smoothing and cfg.loss not in ("sigmoid", "robust"):
        files.stop(f"--label_smoothing {cfg.label_smoothing} belongs to --loss sigmoid (cDPO) and "
                   f"robust, this is --loss {cfg.loss}")
    if cfg.labels == "annotators" and cfg.rounds > 1 and cfg.data != "reviews":
        files.stop(f"--rounds {cfg.rounds} has the policy's own samples compared; nobody is there to annotate them: "
                   "--labels reward_model or soft")
    if cfg.n_pairs < cfg.rounds * cfg.batch_size:
        files.stop(f"--n_pairs {cfg.n_pairs} in {cfg.rounds} rounds leave less than one batch of "
                   f"{cfg.batch_size} pairs to a round; raise --n_pairs or lower --batch_size")
    if cfg.mask_shared_prefix and not cfg.length_normalise:
        print("note: --mask_shared_prefix changes nothing without --length_normalise: in a difference "
              "of sums the shared tokens cancel")


@experiment.self_contained
def main(cfg):
    run = experiment.Run(cfg, "dpo", sft.export)
    if run.finished:
        return run.show()
    check(cfg)
    device = run.device
    built_in, n = cfg.data == "reviews", cfg.n_pairs // cfg.rounds           # pairs to a round
    policy, tokenizer = sft.load_policy(experiment.ensure(cfg, sft), device, **cfg.how())
    block_size, sft_made = policy.config.block_size, files.fingerprint(policy)
    train_prompts, eval_prompts = corpus.prompts(cfg, tokenizer, block_size, cfg.n_eval)
    reward = scoring.load_reward(cfg, policy, tokenizer, train_prompts, device)
    annotator_temperature = comparisons = None
    if built_in and (cfg.labels == "annotators" or cfg.reward == "reward_model"):
        rm_folder = experiment.ensure(cfg, rm)
        comparisons, _ = rm.read_comparisons(rm_folder)
        annotator_temperature = experiment.stored_config(rm_folder)["annotator_temperature"]
    elif cfg.labels == "annotators":
        comparisons, _ = corpus.comparisons(cfg, tokenizer, block_size, n, 1)
        n = len(comparisons)
    options.check_enough(n, cfg.batch_size, "pairs")
    available = sum(len(c["response_ids"]) * (len(c["response_ids"]) - 1) // 2 for c in comparisons or [])
    if cfg.labels == "annotators" and n > available:
        files.stop(f"--n_pairs asks for {n} of the annotators' comparisons, {rm_folder} has "
                   f"{available}; lower it, or let reward_model.py collect more (--n_prompts)")
    run.begin()
    add_lora(policy, cfg.lora_rank)
    reference = reference_of(policy)
    optimizer = torch.optim.AdamW(trained(policy), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    companions = files.Companions()                              # of the checkpoint: the pairs of each round
    state = dict(policy=policy, optimizer=optimizer, gpt=asdict(policy.config),
                 tokenizer=data.fingerprint(tokenizer), sft=sft_made, reward=reward,
                 data=corpus.source_of(train_prompts), companions=companions)
    if not run.resuming:
        data.save_tokenizer(tokenizer, run.folder)

    steps_a_round = cfg.epochs * (n // cfg.batch_size)
    steps, pairs = cfg.rounds * steps_a_round, None
    for step in run.steps(run.restore(**state), steps):
        round, step_of_round = divmod(step, steps_a_round)
        stored = run.folder / f"pairs_{round}.json"
        if pairs is None and step_of_round:                      # resumed in the middle of a round
            companions.check(stored)
            pairs = files.read_json(stored)

        if not step_of_round:
            # ---- 1. pairs
            if round == 0 and cfg.labels == "annotators":
                pairs = pairs_of_rankings(comparisons, run.generator)[:n]
            else:
                prompts = data.draw(train_prompts, n, run.generator)
                pairs = sample_pairs(policy, reward, tokenizer, prompts, cfg, annotator_temperature,
                                     run.generator)
            different = [pair for pair in pairs if pair["chosen_ids"] != pair["rejected_ids"]]
            print(f"round {round}: {len(different)} pairs, {len(pairs) - len(different)} more were of "
                  "identical responses and are left out")
            pairs = different
            if len(pairs) < cfg.batch_size:
                files.stop(f"only {len(pairs)} pairs differ, a batch takes {cfg.batch_size}: the "
                           "policy writes the same response again and again")

            # ---- 2. reference
            for i in range(0, len(pairs), 256):
                with torch.no_grad():
                    ref_logprobs, _, _ = pair_logprobs(reference, pairs[i:i + 256], cfg)    # (2, 256)
                for pair, (chosen, rejected) in zip(pairs[i:i + 256], ref_logprobs.T.tolist()):
                    pair["ref_logprobs"] = [chosen, rejected]
            files.write(stored, json.dumps(pairs))
            companions.add(stored)

        # ---- 3. logprobs, 4. update: in parts, each of which counts as many pairs as it has
        metrics, loss_metrics = {}, {}
        if step % cfg.eval_every == 0 or step + 1 == steps:      # before the update: 0 at first
            metrics = sample_policy(policy, reference, reward, tokenizer, eval_prompts, cfg)
            run.must_be_finite(hint=scoring.HINT, score=metrics["score"])
            run.must_be_finite(**metrics)
        rows = data.batch_rows(len(pairs), cfg.batch_size, step_of_round, cfg.seed + round)
        n_tokens = sum(len(pairs[i]["chosen_ids"]) for i in rows)
        for part in data.parts([pairs[i] for i in rows], cfg.accumulation):
            (chosen, rejected), lengths, nll = pair_logprobs(policy, part, cfg)             # (b,), (b,)
            ref_chosen, ref_rejected = torch.tensor(
                [pair["ref_logprobs"] for pair in part], device=device).T * (not cfg.reference_free)
            target = torch.tensor([pair["target"] for pair in part], device=device)         # (b,)
            loss, part_metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta, cfg.loss,
                                          cfg.label_smoothing, cfg.margin, target)
            share, token_share = len(part) / len(rows), lengths[0].sum() / n_tokens
            (share * loss + token_share * cfg.nll_coef * nll).backward()
            experiment.add(loss_metrics, part_metrics | {
                "chosen_logprobs": chosen.detach().mean(), "rejected_logprobs": rejected.detach().mean(),
                "chosen_length": lengths[0].mean(), "rejected_length": lengths[1].mean()}, share)
            experiment.add(loss_metrics, {"nll": nll.detach()}, token_share)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        run.must_be_finite(hint="try a lower --lr or a less extreme --beta, with another --out",
                           loss=loss_metrics["loss"], nll=loss_metrics["nll"], grad_norm=grad_norm)
        lr = experiment.learning_rate(step, steps, cfg.lr, cfg.warmup, cfg.lr_floor)
        experiment.set_learning_rate(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()

        # ---- 5. log
        metrics |= loss_metrics | {"grad_norm": grad_norm, "lr": lr}
        run.log(step, metrics, ["loss", "margin", "accuracy", "chosen_logprobs", "rejected_logprobs",
                                "kl_ref", "score", "gold"], every=cfg.eval_every)
        run.checkpoint(step + 1)

    # ---- the result
    text, results = frontier.compare({"SFT": reference, "DPO": policy}, reward, tokenizer, eval_prompts,
                                     cfg)
    picture = experiment.curves(run.folder, f"DPO, {run.folder}", CURVES)
    return run.finish("\n".join([
        text, "",
        f"curves      {picture}", f"log         {run.folder}/log.jsonl",
        f"checkpoint  {run.folder}/checkpoint.pt",
        f"next        {options.next_command(cfg, 'evaluate')}"]), results)


if __name__ == "__main__":
    experiment.launch(main, Config, __doc__)
