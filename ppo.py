"""
Stage 3: PPO with KL-shaped rewards.

Maximises  E_{x, y ~ pi_theta}[ r_phi(x, y) ] - beta KL(pi_theta, pi_ref)  with four models: the
actor pi_theta and the frozen reference pi_ref start as the SFT policy, the reward model r_phi is
frozen, the critic V_psi has its own trunk and a head that starts at zero. A step of the decision
process is one response token: s_t = prompt and y_<t, a_t = y_t. Every update does this:

    1. roll out     responses y ~ pi_old, the actor as it stands, to a batch of prompts x
    2. score        r_phi(x, y) on the sampled ids; a fixed low score where there is no EOS
    3. logprobs     log pi_old, log pi_ref and V_old of every token, by the training forward
    4. rewards      R_t = - beta (log pi_old - log pi_ref)(a_t | s_t), plus r_phi at the last token
                    (Ziegler et al. 2019, equation 2)
    5. advantages   A_t = sum_l (gamma lambda)^l delta_{t+l},  delta_t = R_t + gamma V_{t+1} - V_t
                    (Schulman et al. 2016); the critic's targets G_t = A_t + V_t; then A is whitened
    6. update       some epochs of shuffled minibatches, rho_t = pi_theta / pi_old (a_t | s_t).
                    Actor: - mean min(rho A, clip(rho, 1 - eps, 1 + eps) A)
                    (Schulman et al. 2017, equation 7), or - mean (rho A - coef KL(pi_old,
                    pi_theta)) (equation 8). Critic: 0.5 mean max((V - G)^2, (V_clipped - G)^2)
    7. control      beta follows kl_ref, the KL to the reference; coef kl_old, the KL to pi_old
    8. log          one line

With --ptx_coef the actor's loss has besides  coef times the SFT loss on a stream of texts, which keeps them likely:
PPO-ptx (Ouyang et al. 2022, equation 2). With --ema an average of the actor's weights is kept beside it.

Departures from Ziegler et al. and their code: the critic is a model of its own with its own
learning rate, responses end at EOS, rewards are not whitened (--whiten_rewards 1), one epoch for
their four, lambda 1 for 0.95, and a horizon of the KL controller that suits a run of minutes.

    python ppo.py --config small
        -> out/small/ppo: checkpoint.pt, log.jsonl, curves.png, report.txt
"""

import copy
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

import corpus
import data
import experiment
import files
import frontier
import options
import scoring
import sft
from model import ScalarGPT, add_lora, generate, masked_mean, reference_of, token_logprobs, trained


@dataclass
class Config(scoring.Rewarded):          # which adds --reward and what is done to its scores
    steps: int = 80                 # updates, each on fresh responses
    batch_size: int = 128           # responses per update
    minibatch_size: int = 32        # responses per gradient step
    epochs: int = 1                 # passes over the responses of an update
    temperature: float = 1.0        # of the policy, where it samples and where it is scored
    whiten_rewards: bool = False    # scale rewards to unit variance, mean kept
    kl_control: Literal["proportional", "fixed"] = "proportional"   # whether beta follows kl_ref
    beta: float = 0.4               # strength of the KL to the reference, at first
    kl_target: float = 3.0          # nats per response that beta steers to
    kl_horizon: float = 640.0       # in responses: the smaller, the faster beta moves
    kl_bound: float = 25.0          # nats per response above which to warn
    gamma: float = 1.0              # discount
    lam: float = 1.0                # lambda of GAE
    critic_init: Literal["rm", "sft"] = "rm"                        # trunk of the critic
    critic_warmup: int = 0          # updates at first in which the critic alone learns
    critic_target: Literal["gae", "td", "mc", "score"] = "gae"      # what the critic predicts
    surrogate: Literal["clip", "kl_penalty"] = "clip"               # loss of the actor
    clip_eps: float = 0.2           # of the ratio, for surrogate clip
    kl_penalty_coef: float = 1.0    # at first, for surrogate kl_penalty
    kl_old_target: float = 0.002    # nats per token, for surrogate kl_penalty
    value_clip_eps: float = 0.2     # clips the critic's change in an update; 0 turns it off
    entropy_coef: float = 0.0       # entropy bonus
    ptx_coef: float = 0.0           # of the SFT loss on other texts, added to the actor's: PPO-ptx
    ptx_data: str = ""              # those texts, as --data, often a .txt; by default --data itself
    ema: float = 0.0                # share that an average of the actor's weights keeps at each update; 0: none
    lr: float = 7e-4                # AdamW's learning rate at its peak, actor
    critic_lr: float = 1e-3         # the same for the critic
    warmup: int = 2                 # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # to this share of the peak
    grad_clip: float = 1.0          # largest gradient norm, actor and critic each
    n_eval: int = 64                # held-out prompts for the final comparison
    n_samples: int = 32             # responses to each of them, from SFT and from PPO


PRESETS = {
    "small": dict(save_every=20),
    "tiny": dict(steps=8, batch_size=32, minibatch_size=16, lr=2e-3, n_eval=16, n_samples=16, save_every=3),
    "gpt2": dict(steps=400, batch_size=128, minibatch_size=32, lr=3e-6, critic_lr=1e-5, warmup=10, lam=0.95, beta=0.05,
                 kl_target=6.0, kl_horizon=10000.0, n_samples=4, save_every=20),
    "imdb": dict(steps=400, batch_size=256, minibatch_size=64, epochs=4, lr=1.4e-5, critic_lr=1.4e-5, warmup=5, lam=0.95,
                 beta=0.2, kl_target=6.0, kl_horizon=10000.0, missing_eos_score=None, critic_init="sft",
                 reward="lvwerra/distilbert-imdb", n_samples=8, save_every=20),
    "tldr": dict(steps=400, batch_size=128, minibatch_size=32, epochs=4, lr=3e-6, critic_lr=3e-6, lam=0.95, beta=0.05,
                 kl_control="fixed", temperature=0.7, missing_eos_score=-1.0, n_samples=4, save_every=20),
}
Config.presets = PRESETS


# --------------------------------------------------------------------------------------------------
# The maths. Everything is (B, T) in the one alignment: column t is the choice of targets[:, t].

def whiten(x, mask, shift_mean=True):
    """(x - mean) / std over masked cells, population variance, 0 elsewhere; or with the mean kept"""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * (mask > 0)


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """
    Estimates of KL(pi, pi_ref) at each token that was sampled from pi; d = logprobs - ref_logprobs.

    k1   d                  unbiased, negative at times
    k2   d^2 / 2            biased, small variance
    k3   exp(-d) - 1 + d    unbiased, never negative        (Schulman 2020, joschu.net/blog/kl-approx)
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d ** 2
    if kind == "k3":
        return torch.expm1(-d) + d
    raise ValueError(f"got kind {kind!r}; it is k1, k2 or k3")


def shape_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """
    R_t = - beta (logprobs - ref_logprobs), plus the score at the last response token.

    Ziegler et al. 2019, equation 2. scores is (B,). No gradient passes: a reward is a number.

    >>> zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    >>> shape_rewards(torch.tensor([5.0]), one, zero, torch.tensor([[0.0, 1.0, 1.0]]), beta=0.1)
    tensor([[-0.0000, -0.1000,  4.9000]])
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = (columns * (mask > 0)).amax(dim=1)                                # (B,)
    rewards = -beta * (logprobs - ref_logprobs) * (mask > 0)                 # (B, T)
    rewards[torch.arange(len(rewards), device=mask.device), last] += scores
    return rewards.detach()


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """
    Generalised advantage estimation, backwards over rows of different length -> advantages, returns

    delta_t = R_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   G_t = A_t + V_t
    (Schulman et al. 2016). After a row's last token V and A are 0: the episode is over.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.ones(1, 2), lam=0.5)[0]
    tensor([[0.2500, 0.5000]])
    """
    at = (mask > 0).to(values.dtype)
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])             # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * at[:, t]
        next_value = values[:, t] * at[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * at


def critic_targets(rewards, values, scores, mask, kind="gae", gamma=1.0, lam=0.95):
    """
    What the critic should say at each response token.

    gae     A_t + V_t, the lambda-return  G_t = R_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1})
    td      R_t + gamma V_{t+1}, which is lam = 0
    mc      sum_l gamma^l R_{t+l}, the discounted reward-to-go, which is lam = 1
    score   the score at every token, without any KL
    """
    at = (mask > 0).to(values.dtype)
    if kind == "score":
        return scores[:, None] * at
    if kind not in ("gae", "td", "mc"):
        raise ValueError(f"got kind {kind!r}; it is gae, td, mc or score")
    lam = {"gae": lam, "td": 0.0, "mc": 1.0}[kind]
    targets = torch.zeros_like(values)
    next_target = next_value = torch.zeros_like(values[:, 0])                # (B,)
    for t in reversed(range(values.shape[1])):
        follows = (1 - lam) * next_value + lam * next_target
        next_target = (rewards[:, t] + gamma * follows) * at[:, t]
        next_value = values[:, t] * at[:, t]
        targets[:, t] = next_target
    return targets


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2):
    """
    - mean of min(rho A, clip(rho, 1 - eps, 1 + eps) A),   rho = exp(logprobs - old_logprobs)

    Schulman et al. 2017, equation 7. Where the clip decides, the gradient is 0. log rho is capped
    at 20, as in verl and OpenRLHF: where rho overflows, that 0 would be inf * 0.
    -> loss, {policy_loss, clip_fraction: share of tokens where the clip decides, ratio: mean rho}
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(max=20.0))
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages
    loss = -masked_mean(torch.minimum(unclipped, clipped), mask)
    return loss, {"policy_loss": loss.detach(), "ratio": masked_mean(ratio.detach(), mask),
                  "clip_fraction": masked_mean((clipped < unclipped).float(), mask)}


def kl_penalty_loss(logprobs, old_logprobs, advantages, mask, coef):
    """
    - mean of rho A - coef KL(pi_old, pi_theta),   the KL by k3 on tokens that pi_old sampled

    Schulman et al. 2017, equation 8. -> loss, metrics as policy_loss; nothing is clipped
    """
    log_ratio = logprobs - old_logprobs
    ratio = torch.exp(log_ratio)
    kl_old = torch.expm1(log_ratio) - log_ratio          # ratio - 1 would cancel near 0
    loss = -masked_mean(ratio * advantages - coef * kl_old, mask)
    return loss, {"policy_loss": loss.detach(), "ratio": masked_mean(ratio.detach(), mask),
                  "clip_fraction": torch.zeros(())}


def value_loss(values, old_values, returns, mask, clip_eps=0.2):
    """
    0.5 mean of max((V - G)^2, (V_old + clip(V - V_old, -eps, eps) - G)^2); eps 0 leaves out the clip

    -> loss, {value_loss, value_clip_fraction: share of tokens where the clipped error is the larger}
    """
    errors = (values - returns) ** 2
    change = (values - old_values).clamp(-clip_eps, clip_eps)
    clipped_errors = (old_values + change - returns) ** 2 if clip_eps else errors
    loss = 0.5 * masked_mean(torch.maximum(errors, clipped_errors), mask)
    return loss, {"value_loss": loss.detach(),
                  "value_clip_fraction": masked_mean((clipped_errors > errors).float(), mask)}


def explained_variance(values, returns, mask):
    """1 - Var(G - V) / Var(G): 1 for a perfect critic, 0 for one no better than a constant -> 0-d"""
    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return 1 - variance(returns - values) / variance(returns).clamp_min(1e-8)


class ProportionalKL:
    """
    beta *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon

    Ziegler et al. 2019, section 2.2, with the gain n / horizon of their code for the paper's K_beta.
    update takes nats per response against the reference, not per token, and the number of responses.
    beta stays within a factor BOUND of where it started: from 0 it could never return.
    """
    BOUND = 1e4

    def __init__(self, beta, target, horizon):
        self.beta, self.target, self.horizon = beta, target, horizon
        self.low, self.high = beta / self.BOUND, beta * self.BOUND

    def update(self, kl_per_sequence, n):
        error = min(max(kl_per_sequence / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * n / self.horizon
        self.beta = min(max(self.beta, self.low), self.high)

    def state_dict(self):
        return {"beta": self.beta}

    def load_state_dict(self, state):
        self.beta = state["beta"]


class ThresholdKL:
    """
    coef doubles where KL(pi_old, pi_theta) after an update is above 1.5 target, and halves where it
    is below target / 1.5    (Schulman et al. 2017, section 4). kl_old is in nats per token.
    coef stays within a factor BOUND of where it started: ten doublings end any quiet spell.
    """
    BOUND = 1024

    def __init__(self, coef, target):
        self.coef, self.target = coef, target
        self.low, self.high = coef / self.BOUND, coef * self.BOUND

    def update(self, kl_old):
        if kl_old > 1.5 * self.target:
            self.coef *= 2
        elif kl_old < self.target / 1.5:
            self.coef /= 2
        self.coef = min(max(self.coef, self.low), self.high)

    def state_dict(self):
        return {"coef": self.coef}

    def load_state_dict(self, state):
        self.coef = state["coef"]


@torch.no_grad()
def move_average(average, model, share):
    """average <- share * average + (1 - share) * model, of every weight that is trained; of LoRA's A and B each"""
    for mean, weight in zip(average.parameters(), model.parameters()):
        if weight.requires_grad:
            mean.lerp_(weight, 1 - share)


def add_ptx_gradient(actor, texts, coef, parts):
    """
    Adds the gradient of  - coef mean over response tokens of log pi  on (prompt, response) rows -> the mean, 0-d

    The last term of Ouyang et al. 2022, equation 2; computed in parts, as in the policy loss.
    """
    device, n_tokens = actor.transformer.wte.weight.device, sum(len(response) for _, response in texts)
    total = 0.0
    for rows in data.parts(texts, parts):
        inputs, targets, mask = (t.to(device) for t in data.collate(*zip(*rows)))           # (b, T) each
        loss = -token_logprobs(actor, inputs, targets, mask).sum() / n_tokens
        (coef * loss).backward()
        total = total + loss.detach()
    return total


# --------------------------------------------------------------------------------------------------
# The rollout

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

    bfloat16 rounds a product differently in a batch of a different shape, which alone can put
    several percent of the ratios outside the clip range. So its batches are as large as the update's.
    """
    size = len(mask)
    if cfg.dtype == "bfloat16":
        size = -(-cfg.minibatch_size // cfg.accumulation)
    parts = [token_logprobs(policy, *rows, cfg.temperature, return_entropy=True)
             for rows in zip(inputs.split(size), targets.split(size), mask.split(size))]
    logprobs, entropy = zip(*parts)
    return torch.cat(logprobs), torch.cat(entropy)


@torch.no_grad()
def check_first_minibatch(logprobs, old_logprobs, mask, kl_ref, clip_eps, clip_eps_high=None,
                          dtype="float32"):
    """
    Before the first gradient step actor, pi_old and reference are one policy: exit if they are not.

    -> share of tokens whose ratio is outside the clip range, 0 but for the rounding of bfloat16
    """
    log_ratio = logprobs - old_logprobs
    high = clip_eps if clip_eps_high is None else clip_eps_high
    ratio = log_ratio.exp()
    outside = masked_mean(((ratio < 1 - clip_eps) | (ratio > 1 + high)).float(), mask).item()
    drift = log_ratio.abs().max().item()
    # GPU kernels round differently for batches of different shape
    limit = 1e-4 if logprobs.device.type == "cpu" else 1e-3
    if dtype == "bfloat16":
        drift, limit = masked_mean(log_ratio.abs(), mask).item(), 0.02
    if drift > limit or (outside and dtype != "bfloat16"):
        files.stop(f"at the first minibatch the ratio should be 1, but the log ratio reaches "
                   f"{drift:.1e}: old_logprobs and logprobs were computed differently. Look for "
                   "dropout, a different temperature or mask, or a gradient step in between")
    if outside > 0.01:
        print(f"warning: before any step, {outside:.1%} of the tokens have a ratio outside the clip "
              "range, from the rounding of bfloat16; --dtype float32 has none")
    if kl_ref.abs().max() > 1e-4:
        files.stop(f"at the first update kl_ref should be 0, but reaches {kl_ref.abs().max():.1e}"
                   " nats: actor and reference do not start from the same weights")
    return outside


def check_rollout(kl_ref, bound):
    """Warns of KLs that cannot be or are too large."""
    mean, standard_error = kl_ref.mean(), kl_ref.std(correction=0) / len(kl_ref) ** 0.5
    if mean < -3 * standard_error - 1e-4 and len(kl_ref) >= 16:
        print(f"warning: kl_ref is {mean:.2f} +- {standard_error:.2f} nats, but a KL is never "
              "negative: the policy scored is not the one that sampled")
    if mean > bound:
        print(f"warning: kl_ref is {mean:.1f} nats a response, above --kl_bound {bound}: the policy "
              "is leaving what the reward model knows; raise --beta or lower --lr")


CURVES = [                                                       # heading, unit, logged metrics
    ("reward and true utility", "score, gold", ["score", "gold"]),
    ("KL to the reference", "nats per response", ["kl_ref"]),
    ("KL strength", "beta", ["beta"]),
    ("entropy of the policy", "nats per token", ["entropy"]),
    ("KL to the policy that sampled", "nats per token", ["kl_old"]),
    ("share of tokens clipped", "", ["clip_fraction", "value_clip_fraction"]),
    ("critic: explained variance", "", ["explained_variance"]),
    ("response length", "tokens", ["response_length"]),
    ("gradient norm", "", ["grad_norm", "critic_grad_norm"])]


def check(cfg):
    """Stops on settings that cannot be, before any work."""
    options.check_minibatch(cfg)
    scoring.check(cfg)
    if cfg.kl_control == "proportional" and cfg.kl_horizon <= 0.2 * cfg.batch_size:
        files.stop(f"--kl_horizon {cfg.kl_horizon} is so short that beta could fall below 0 in one update; it takes "
                   f"more than a fifth of --batch_size {cfg.batch_size}")
    if cfg.ptx_coef and cfg.ptx_data:
        corpus.check_source(cfg.ptx_data, "--ptx_data")


@experiment.self_contained
def main(cfg):
    run = experiment.Run(cfg, "ppo", sft.export)
    if run.finished:
        return run.show()
    check(cfg)
    device = run.device

    # ---- the four models, all in eval mode for good: with dropout the first ratio would not be 1
    actor, tokenizer = sft.load_policy(experiment.ensure(cfg, sft), device, **cfg.how())
    block_size, sft_made = actor.config.block_size, files.fingerprint(actor)
    train_prompts, eval_prompts = corpus.prompts(cfg, tokenizer, block_size, cfg.n_eval)
    reward = scoring.load_reward(cfg, actor, tokenizer, train_prompts, device)
    trunk = reward.model if cfg.critic_init == "rm" else actor
    if trunk is None:
        print(f"--critic_init rm: {cfg.reward} is no reward model of ours, so the critic starts from the SFT policy")
        trunk = actor
    if cfg.ptx_coef:
        ptx_cfg = replace(cfg, data=cfg.ptx_data or cfg.data)
        n = 20000 if ptx_cfg.data == "reviews" else None         # of which there is no end
        stream, _ = corpus.demonstrations(ptx_cfg, tokenizer, block_size, n, 1)
    run.begin()
    critic = ScalarGPT(trunk.config, init_from=trunk, zero_head=True).to(device).eval()
    add_lora(actor, cfg.lora_rank)
    add_lora(critic, cfg.lora_rank)
    reference = reference_of(actor)
    average = copy.deepcopy(actor).requires_grad_(False) if cfg.ema else None
    adam = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    actor_optimizer = torch.optim.AdamW(trained(actor), lr=cfg.lr, **adam)
    critic_optimizer = torch.optim.AdamW(trained(critic), lr=cfg.critic_lr, **adam)
    control = ProportionalKL(cfg.beta, cfg.kl_target, cfg.kl_horizon)
    penalty = ThresholdKL(cfg.kl_penalty_coef, cfg.kl_old_target)
    state = dict(policy=actor, critic=critic, actor_optimizer=actor_optimizer,
                 critic_optimizer=critic_optimizer, control=control, penalty=penalty,
                 gpt=asdict(actor.config), critic_gpt=asdict(critic.config), tokenizer=data.fingerprint(tokenizer),
                 sft=sft_made, reward=reward, data=corpus.source_of(train_prompts))
    if cfg.ema:
        state["policy_ema"] = average
    if cfg.ptx_coef:
        state["ptx_data"] = corpus.source_of(stream)
    if not run.resuming:
        data.save_tokenizer(tokenizer, run.folder)

    for step in run.steps(run.restore(**state), cfg.steps):
        clock = experiment.Clock(device)

        # ---- 1. roll out
        prompts = data.draw(train_prompts, cfg.batch_size, run.generator)    # token lists
        inputs, targets, mask, finished = roll_out(actor, prompts, cfg, tokenizer.eot_token, run.generator)
        clock.lap("rollout")

        # ---- 2. score
        scores = reward(inputs, targets, mask, finished)                                    # (B,)

        # ---- 3. logprobs
        old_logprobs, entropy = score_rollout(actor, inputs, targets, mask, cfg)        # (B, T) x 2
        with torch.no_grad():
            ref_logprobs = token_logprobs(reference, inputs, targets, mask, cfg.temperature)
            old_values = critic(inputs) * mask                                              # (B, T)
        kl_ref = kl_estimate(old_logprobs, ref_logprobs).sum(dim=1)     # (B,) both 0 off the mask
        run.must_be_finite(hint=scoring.HINT, scores=scores)
        run.must_be_finite(kl_ref=kl_ref)
        run.must_be_finite(hint="try a lower --critic_lr, with another --out",
                           old_values=old_values)
        check_rollout(kl_ref, cfg.kl_bound)
        clock.lap("score")

        # ---- 4. rewards
        rewards = shape_rewards(scores, old_logprobs, ref_logprobs, mask, control.beta)     # (B, T)
        if cfg.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)

        # ---- 5. advantages
        # The critic's targets may be of another kind than A + V: --critic_target
        advantages, _ = gae(rewards, old_values, mask, cfg.gamma, cfg.lam)                  # (B, T)
        returns = critic_targets(rewards, old_values, scores, mask, cfg.critic_target, cfg.gamma,
                                 cfg.lam)                                                   # (B, T)
        run.must_be_finite(
            hint="try a smaller --beta, --score_clip or --critic_lr, with another --out",
            advantages=advantages, returns=returns)
        advantages = whiten(advantages, mask)

        # ---- 6. update
        lr_factor = experiment.learning_rate(step, cfg.steps, 1.0, cfg.warmup, cfg.lr_floor)
        experiment.set_learning_rate(actor_optimizer, lr_factor * cfg.lr)
        experiment.set_learning_rate(critic_optimizer, lr_factor * cfg.critic_lr)
        optimizers = [critic_optimizer] + [actor_optimizer] * (step >= cfg.critic_warmup)
        history = []
        for _ in range(cfg.epochs):
            order = torch.randperm(cfg.batch_size, generator=run.generator)
            for minibatch in order.split(cfg.minibatch_size):
                metrics = {}
                for rows in data.parts(minibatch, cfg.accumulation):
                    rows_mask = mask[rows]                                                  # (b, T)
                    share = rows_mask.sum() / mask[minibatch].sum()          # of the minibatch's tokens, 1 if whole
                    scored = token_logprobs(actor, inputs[rows], targets[rows], rows_mask,
                                            cfg.temperature, return_entropy=cfg.entropy_coef > 0)
                    # The entropy's graph is as large as that of the logprobs: only for a bonus
                    logprobs, new_entropy = scored if cfg.entropy_coef > 0 else (scored, None)
                    if cfg.surrogate == "clip":
                        loss, part = policy_loss(logprobs, old_logprobs[rows], advantages[rows], rows_mask,
                                                 cfg.clip_eps)
                    else:
                        loss, part = kl_penalty_loss(logprobs, old_logprobs[rows], advantages[rows], rows_mask,
                                                     penalty.coef)
                    if step == 0 and not history:
                        outside = check_first_minibatch(logprobs, old_logprobs[rows], rows_mask,
                                                        kl_ref, cfg.clip_eps, dtype=cfg.dtype)
                    if cfg.entropy_coef > 0:
                        loss = loss - cfg.entropy_coef * masked_mean(new_entropy, rows_mask)
                    (share * loss).backward()
                    critic_loss, critic_part = value_loss(critic(inputs[rows]), old_values[rows], returns[rows],
                                                          rows_mask, cfg.value_clip_eps)
                    (share * critic_loss).backward()
                    experiment.add(metrics, part | critic_part, share)
                if cfg.ptx_coef:
                    texts = data.draw(stream, cfg.minibatch_size, run.generator)
                    metrics["ptx_loss"] = add_ptx_gradient(actor, texts, cfg.ptx_coef, cfg.accumulation)
                metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(actor.parameters(), cfg.grad_clip)
                metrics["critic_grad_norm"] = torch.nn.utils.clip_grad_norm_(critic.parameters(), cfg.grad_clip)
                run.must_be_finite(
                    len(history), "try a lower --critic_lr or a smaller --beta, with another --out",
                    value_loss=metrics["value_loss"], critic_grad_norm=metrics["critic_grad_norm"])
                run.must_be_finite(taken=len(history), **metrics)
                for optimizer in optimizers:
                    optimizer.step()
                actor_optimizer.zero_grad()
                critic_optimizer.zero_grad()
                history.append(metrics)
        if cfg.ema:
            move_average(average, actor, cfg.ema)
        clock.lap("update")

        # ---- 7. control
        beta, coef = control.beta, penalty.coef
        with torch.no_grad():
            logprobs = token_logprobs(actor, inputs, targets, mask, cfg.temperature)
            kl_old = masked_mean(kl_estimate(old_logprobs, logprobs, "k3"), mask)           # 0-d
        run.must_be_finite(taken=len(history), kl_old=kl_old)
        if cfg.kl_control == "proportional":
            control.update(kl_ref.mean().item(), cfg.batch_size)
        if cfg.surrogate == "kl_penalty":
            penalty.update(kl_old.item())
        clock.lap("control")

        # ---- 8. log
        metrics = {name: sum(m[name].item() for m in history) / len(history) for name in history[0]}
        metrics |= {"score": scores.mean(), "kl_ref": kl_ref.mean(),
                    "kl_ref_k3": kl_estimate(old_logprobs, ref_logprobs, "k3").sum(1).mean(),
                    "kl_old": kl_old, "beta": beta, "kl_penalty_coef": coef,
                    "entropy": masked_mean(entropy, mask),
                    "explained_variance": explained_variance(old_values, returns, mask),
                    "response_length": mask.sum(1).mean(), "eos_rate": finished.float().mean(),
                    "lr": lr_factor * cfg.lr, "critic_lr": lr_factor * cfg.critic_lr,
                    **frontier.true_utility(cfg, tokenizer, inputs, targets, mask), **clock.seconds}
        metrics["tokens_per_second"] = mask.sum().item() / sum(clock.seconds.values())
        if step == 0:
            metrics["ratio_outside_clip"] = outside
        run.log(step, metrics, ["score", "gold", "kl_ref", "beta", "kl_old", "entropy",
                                "clip_fraction", "explained_variance", "response_length"])
        run.checkpoint(step + 1)

    # ---- the result
    policies = {"SFT": reference, "PPO": actor} | ({"PPO, averaged": average} if cfg.ema else {})
    text, results = frontier.compare(policies, reward, tokenizer, eval_prompts, cfg)
    picture = experiment.curves(run.folder, f"PPO, {run.folder}", CURVES)
    name = options.run_name(cfg)
    hacked = replace(cfg, base=cfg.base or name, out=f"{name}-hacked")
    return run.finish("\n".join([
        text, "",
        f"curves      {picture}", f"log         {run.folder}/log.jsonl",
        f"checkpoint  {run.folder}/checkpoint.pt",
        f"next        {options.next_command(cfg, 'evaluate')}",
        f"            {options.next_command(hacked, run.script)} --kl_control fixed --beta 0   (no KL penalty)"]), results)


if __name__ == "__main__":
    experiment.launch(main, Config, __doc__)
