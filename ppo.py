"""
Stage 3: PPO with KL-shaped rewards.

Maximises  E_{x, y ~ pi_theta}[ r_phi(x, y) ] - beta KL(pi_theta, pi_ref)  with four models: the
actor pi_theta and the frozen reference pi_ref start as the SFT policy, the reward model r_phi is
frozen, the critic V_psi has its own trunk and a head that starts at zero. A step of the decision
process is one response token: s_t = prompt and y_<t, a_t = y_t. Every update does this:

    1. roll out     responses y ~ pi_old, the current actor, to a batch of prompts x
    2. score        r_phi(x, y) on the sampled ids; a fixed low score if there is no EOS
    3. logprobs     log pi_old, log pi_ref and V_old of every token, by the training forward pass
    4. rewards      R_t = - beta (log pi_old - log pi_ref)(a_t | s_t), plus r_phi at the last token
                    (Ziegler et al. 2019, equation 2)
    5. advantages   A_t = sum_l (gamma lambda)^l delta_{t+l},  delta_t = R_t + gamma V_{t+1} - V_t
                    (Schulman et al. 2016); the critic's targets G_t = A_t + V_t; then A is whitened
    6. update       some epochs of shuffled minibatches, rho_t = pi_theta / pi_old (a_t | s_t).
                    Actor: - mean min(rho A, clip(rho, 1 - eps, 1 + eps) A)
                    (Schulman et al. 2017, equation 7), or - mean (rho A - coef KL(pi_old,
                    pi_theta)) (equation 8). Critic: 0.5 mean max((V - G)^2, (V_clipped - G)^2)
    7. control      beta follows kl_ref, the KL to the reference; coef follows kl_old, to pi_old
    8. log          one line

--ptx_coef adds coef times the SFT loss on a stream of texts to the actor's loss, so that the policy
does not forget them: PPO-ptx (Ouyang et al. 2022, equation 2). --ema keeps an average of the
actor's weights.

Departures from Ziegler et al. and their code: the critic is a model of its own with its own
learning rate, responses end at EOS, rewards are not whitened (--whiten_rewards 1), one epoch
instead of four, lambda 1 instead of 0.95, and a shorter KL horizon, because runs take minutes.

    python ppo.py --config small
        -> out/small/ppo: checkpoint.pt, log.jsonl, curves.png, report.txt
"""

import copy
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

import data
import sft
from compare import compare, true_utility
from lab.run import Run, ensure, launch, learning_rate, self_contained, set_learning_rate, stop
from model import ScalarGPT, add_lora, masked_mean, reference_of, token_logprobs, trained
from presets import presets_of
from reward import REWARD_HINT, Rewarded, check_reward, load_reward
from rollout import check_first_ratio, check_kl_ref, roll_out, score_rollout


@dataclass
class Config(Rewarded):              # Rewarded adds --reward and the options for its scores
    steps: int = 80                 # updates, each on fresh responses
    batch_size: int = 128           # responses per update
    minibatch_size: int = 32        # responses per gradient step
    epochs: int = 1                 # passes over the responses of an update
    temperature: float = 1.0        # sampling temperature, also applied when scoring
    whiten_rewards: bool = False    # scale rewards to unit variance, mean kept
    kl_control: Literal["proportional", "fixed"] = "proportional"   # whether beta follows kl_ref
    beta: float = 0.4               # initial strength of the KL to the reference
    kl_target: float = 3.0          # nats per response that beta steers to
    kl_horizon: float = 640.0       # in responses: the smaller, the faster beta moves
    kl_bound: float = 25.0          # nats per response above which to warn
    gamma: float = 1.0              # discount
    lam: float = 1.0                # lambda of GAE
    critic_init: Literal["rm", "sft"] = "rm"                        # trunk of the critic
    critic_warmup: int = 0          # first updates that train only the critic
    critic_target: Literal["gae", "td", "mc", "score"] = "gae"      # what the critic predicts
    surrogate: Literal["clip", "kl_penalty"] = "clip"               # loss of the actor
    clip_eps: float = 0.2           # clip range of the ratio, with surrogate clip
    kl_penalty_coef: float = 1.0    # initial coefficient, with surrogate kl_penalty
    kl_old_target: float = 0.002    # nats per token, with surrogate kl_penalty
    value_clip_eps: float = 0.2     # clips the critic's change in an update; 0 turns it off
    entropy_coef: float = 0.0       # entropy bonus
    ptx_coef: float = 0.0           # PPO-ptx: weight of the SFT loss in the actor's loss
    ptx_data: str = ""              # PPO-ptx: texts, as --data, often a .txt; default: --data
    ema: float = 0.0                # decay of an average of the actor's weights; 0: no average
    lr: float = 7e-4                # actor's AdamW learning rate at its peak
    critic_lr: float = 1e-3         # critic's AdamW learning rate at its peak
    warmup: int = 2                 # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # final learning rates, as a share of the peak
    grad_clip: float = 1.0          # largest gradient norm, actor and critic each
    n_eval: int = 64                # held-out prompts in the final comparison
    n_samples: int = 32             # responses to each of them, per policy
    save_every: int = 20            # updates between checkpoints; Ctrl-C saves at any time
    presets = presets_of("ppo")


# --------------------------------------------------------------------------------------------------
# The maths. Everything is (B, T) in the one alignment: column t is the choice of targets[:, t].

def whiten(x, mask, shift_mean=True):
    """(x - mean) / std over masked cells, population variance, 0 elsewhere; or keep the mean"""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * (mask > 0)


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """
    Estimates of KL(pi, pi_ref) at each token that was sampled from pi; d = logprobs - ref_logprobs

    k1   d                  unbiased, negative at times
    k2   d^2 / 2            biased, small variance
    k3   exp(-d) - 1 + d    unbiased, never negative    (Schulman 2020, joschu.net/blog/kl-approx)
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
    R_t = - beta (logprobs - ref_logprobs), plus the score at the last response token

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
    in_response = (mask > 0).to(values.dtype)
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])             # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * in_response[:, t]
        next_value = values[:, t] * in_response[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * in_response


def critic_targets(rewards, values, scores, mask, kind="gae", gamma=1.0, lam=0.95):
    """
    The critic's target at each response token

    gae     A_t + V_t, the lambda-return  G_t = R_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1})
    td      R_t + gamma V_{t+1}, which is lam = 0
    mc      sum_l gamma^l R_{t+l}, the discounted reward-to-go, which is lam = 1
    score   the score at every token, without any KL
    """
    in_response = (mask > 0).to(values.dtype)
    if kind == "score":
        return scores[:, None] * in_response
    if kind not in ("gae", "td", "mc"):
        raise ValueError(f"got kind {kind!r}; it is gae, td, mc or score")
    lam = {"gae": lam, "td": 0.0, "mc": 1.0}[kind]
    targets = torch.zeros_like(values)
    next_target = next_value = torch.zeros_like(values[:, 0])                # (B,)
    for t in reversed(range(values.shape[1])):
        follows = (1 - lam) * next_value + lam * next_target
        next_target = (rewards[:, t] + gamma * follows) * in_response[:, t]
        next_value = values[:, t] * in_response[:, t]
        targets[:, t] = next_target
    return targets


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_eps=0.2):
    """
    - mean of min(rho A, clip(rho, 1 - eps, 1 + eps) A),   rho = exp(logprobs - old_logprobs)

    Schulman et al. 2017, equation 7. Where the clip decides, the gradient is 0. log rho is capped
    at 20, as in verl and OpenRLHF: if rho overflowed, that 0 would be inf * 0.
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

    Schulman et al. 2017, equation 8. Nothing is clipped. -> loss, the same metrics as policy_loss
    """
    log_ratio = logprobs - old_logprobs
    ratio = torch.exp(log_ratio)
    kl_old = torch.expm1(log_ratio) - log_ratio          # ratio - 1 would cancel near 0
    loss = -masked_mean(ratio * advantages - coef * kl_old, mask)
    return loss, {"policy_loss": loss.detach(), "ratio": masked_mean(ratio.detach(), mask),
                  "clip_fraction": torch.zeros(())}


def value_loss(values, old_values, returns, mask, clip_eps=0.2):
    """
    0.5 mean of max((V - G)^2, (V_old + clip(V - V_old, -eps, eps) - G)^2); eps 0: no clip

    -> loss, {value_loss, value_clip_fraction: share of tokens where the clipped error is larger}
    """
    errors = (values - returns) ** 2
    change = (values - old_values).clamp(-clip_eps, clip_eps)
    clipped_errors = (old_values + change - returns) ** 2 if clip_eps else errors
    loss = 0.5 * masked_mean(torch.maximum(errors, clipped_errors), mask)
    return loss, {"value_loss": loss.detach(),
                  "value_clip_fraction": masked_mean((clipped_errors > errors).float(), mask)}


def actor_loss(logprobs, entropy, old_logprobs, advantages, mask, coef, cfg):
    """The surrogate, minus entropy_coef times the mean entropy if there is one -> loss, metrics"""
    if cfg.surrogate == "clip":
        loss, metrics = policy_loss(logprobs, old_logprobs, advantages, mask, cfg.clip_eps)
    else:
        loss, metrics = kl_penalty_loss(logprobs, old_logprobs, advantages, mask, coef)
    if entropy is not None:
        loss = loss - cfg.entropy_coef * masked_mean(entropy, mask)
    return loss, metrics


def explained_variance(values, returns, mask):
    """1 - Var(G - V) / Var(G): 1 for a perfect critic, 0 for a constant one -> 0-d"""
    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)
    return 1 - variance(returns - values) / variance(returns).clamp_min(1e-8)


class ProportionalKL:
    """
    beta *= 1 + clip(KL / target - 1, -0.2, 0.2) n / horizon

    Ziegler et al. 2019, section 2.2; the gain n / horizon is from their code, K_beta in the paper.
    update takes the KL to the reference in nats per response, not per token, and the number of
    responses. beta stays within a factor BOUND of its start: from 0 it could never return.
    """
    BOUND = 1e4

    def __init__(self, beta, target, horizon):
        self.beta = beta
        self.target = target                             # nats per response
        self.horizon = horizon                           # responses
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
    coef doubles if KL(pi_old, pi_theta) after an update is above 1.5 target, and halves if it is
    below target / 1.5    (Schulman et al. 2017, section 4). kl_old is in nats per token.
    coef stays within a factor BOUND of its start: ten doublings undo the longest quiet spell.
    """
    BOUND = 1024

    def __init__(self, coef, target):
        self.coef = coef
        self.target = target                             # nats per token
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
def move_average(average, model, decay):
    """average <- decay * average + (1 - decay) * model, for every trained weight (LoRA: A and B)"""
    for mean, weight in zip(average.parameters(), model.parameters()):
        if weight.requires_grad:
            mean.lerp_(weight, 1 - decay)


def add_ptx_gradient(actor, texts, cfg, run):
    """
    Add the gradient of  - ptx_coef mean over response tokens of log pi  on a draw of the texts

    The last term of Ouyang et al. 2022, equation 2. -> {ptx_loss: - the mean}
    """
    device = next(actor.parameters()).device
    drawn = data.draw(texts, cfg.minibatch_size, run.generator)
    n_tokens = sum(len(response) for _, response in drawn)
    total = 0.0
    for part, _ in data.microbatches(drawn, cfg.accumulation):
        inputs, targets, mask = (t.to(device) for t in data.collate(*zip(*part)))           # (b, T)
        loss = -token_logprobs(actor, inputs, targets, mask).sum() / n_tokens
        run.backward(cfg.ptx_coef * loss)
        total = total + loss.detach()
    return {"ptx_loss": total}


# --------------------------------------------------------------------------------------------------
# Setting up

CURVES = [                                               # heading, unit, logged metrics
    ("reward and true utility", "score, gold", ["score", "gold"]),
    ("KL to the reference", "nats per response", ["kl_ref"]),
    ("KL strength", "beta", ["beta"]),
    ("entropy of the policy", "nats per token", ["entropy"]),
    ("KL to the policy that sampled", "nats per token", ["kl_old"]),
    ("share of tokens clipped", "", ["clip_fraction", "value_clip_fraction"]),
    ("critic: explained variance", "", ["explained_variance"]),
    ("response length", "tokens", ["response_length"]),
    ("gradient norm", "", ["grad_norm", "critic_grad_norm"])]
# What to do about a number that is not finite
TRY = "try a lower --lr, --critic_lr or --beta, with a different --out"


def check(cfg):
    """Exit, before any work, on settings that cannot work."""
    data.check_minibatch(cfg)
    check_reward(cfg)
    if cfg.kl_control == "proportional" and cfg.kl_horizon <= 0.2 * cfg.batch_size:
        stop(f"--kl_horizon {cfg.kl_horizon} is so short that one update could take beta below 0; "
             f"raise it above a fifth of --batch_size {cfg.batch_size}")
    if cfg.ptx_coef and cfg.ptx_data:
        data.check_source(cfg.ptx_data, "--ptx_data")


def new_critic(cfg, actor, reward, device):
    """V_psi: the trunk of the reward model or of the SFT policy, and a head that starts at zero"""
    trunk = actor
    if cfg.critic_init == "rm" and reward.model:
        trunk = reward.model
    elif cfg.critic_init == "rm":
        print(f"--critic_init rm: {cfg.reward} is not one of this project's reward models, so the "
              "critic starts from the SFT policy")
    return ScalarGPT(trunk.config, init_from=trunk, zero_head=True).to(device).eval()


def load_ptx_texts(cfg, tokenizer, block_size):
    """The texts of PPO-ptx, as (prompt, response) token lists"""
    cfg = replace(cfg, data=cfg.ptx_data or cfg.data)
    n = 20000 if cfg.data == "reviews" else None         # the grammar can write texts forever
    return data.demonstrations(cfg, tokenizer, block_size, n, 1)[0]


@self_contained
def main(cfg):
    run = Run(cfg, "ppo", sft.export)
    if run.finished:
        return run.show()
    check(cfg)

    # ---- the four models, always in eval mode: with dropout the first ratio would not be 1
    sft_folder = ensure(cfg, sft, init=cfg.init)
    actor, tokenizer = sft.load_policy(sft_folder, run.device, **cfg.compute_options())
    train_prompts, eval_prompts = data.prompts(cfg, tokenizer, actor.config.block_size, cfg.n_eval)
    reward = load_reward(cfg, actor, tokenizer, train_prompts, run.device)
    texts = {"data": train_prompts}
    if cfg.ptx_coef:
        texts["ptx_data"] = load_ptx_texts(cfg, tokenizer, actor.config.block_size)
    run.begin()                                          # nothing is written before this line
    sources = run.sources(tokenizer, actor, **texts)     # what the run is made from, for resume
    critic = new_critic(cfg, actor, reward, run.device)
    add_lora(actor, cfg.lora_rank)
    add_lora(critic, cfg.lora_rank)
    reference = reference_of(actor)
    adam = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    actor_optimizer = torch.optim.AdamW(trained(actor), lr=cfg.lr, **adam)
    critic_optimizer = torch.optim.AdamW(trained(critic), lr=cfg.critic_lr, **adam)
    control = ProportionalKL(cfg.beta, cfg.kl_target, cfg.kl_horizon)
    penalty = ThresholdKL(cfg.kl_penalty_coef, cfg.kl_old_target)
    state = dict(policy=actor, critic=critic, actor_optimizer=actor_optimizer,
                 critic_optimizer=critic_optimizer, control=control, penalty=penalty, reward=reward,
                 gpt=asdict(actor.config), critic_gpt=asdict(critic.config), **sources)
    if cfg.ema:
        state["policy_ema"] = copy.deepcopy(actor).requires_grad_(False)

    for step in run.steps(run.restore(**state), cfg.steps):
        # ---- 1. roll out
        prompts = data.draw(train_prompts, cfg.batch_size, run.generator)    # token lists
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
            old_values = critic(inputs) * mask                               # (B, T)
        kl_ref = kl_estimate(old_logprobs, ref_logprobs).sum(dim=1)          # (B,)
        run.must_be_finite(TRY, kl_ref=kl_ref, old_values=old_values)
        check_kl_ref(kl_ref, cfg, first=step == 0)
        run.lap("score")

        # ---- 4. rewards
        rewards = shape_rewards(scores, old_logprobs, ref_logprobs, mask, control.beta)     # (B, T)
        if cfg.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)

        # ---- 5. advantages
        advantages, _ = gae(rewards, old_values, mask, cfg.gamma, cfg.lam)   # (B, T)
        # The same as gae's second result, A + V, unless --critic_target asks for a different target
        returns = critic_targets(rewards, old_values, scores, mask, cfg.critic_target,
                                 cfg.gamma, cfg.lam)                         # (B, T)
        run.must_be_finite(TRY, advantages=advantages, returns=returns)
        advantages = whiten(advantages, mask)

        # ---- 6. update
        lr_factor = learning_rate(step, cfg.steps, 1.0, cfg.warmup, cfg.lr_floor)
        set_learning_rate(actor_optimizer, lr_factor * cfg.lr)
        set_learning_rate(critic_optimizer, lr_factor * cfg.critic_lr)
        means = data.Means()
        lengths = mask.sum(dim=1)                                            # (B,)
        for minibatch in data.minibatches(cfg.batch_size, cfg.minibatch_size, cfg.epochs,
                                          run.generator):
            # share: this part's fraction of the minibatch's tokens; 1 without --accumulation
            for rows, share in data.microbatches(minibatch, cfg.accumulation, lengths[minibatch]):
                # A gradient through the entropy doubles the memory: only if there is a bonus
                bonus = cfg.entropy_coef > 0
                scored = token_logprobs(actor, inputs[rows], targets[rows], mask[rows],
                                        cfg.temperature, return_entropy=bonus)
                logprobs, new_entropy = scored if bonus else (scored, None)  # (b, T) each
                if step == 0 and run.taken == 0:
                    outside = check_first_ratio(logprobs, old_logprobs[rows], mask[rows], cfg)
                    means.add({"ratio_outside_clip": outside}, share)
                loss, metrics = actor_loss(logprobs, new_entropy, old_logprobs[rows],
                                           advantages[rows], mask[rows], penalty.coef, cfg)
                run.backward(share * loss)
                means.add(metrics, share)
                loss, metrics = value_loss(critic(inputs[rows]), old_values[rows], returns[rows],
                                           mask[rows], cfg.value_clip_eps)
                run.backward(share * loss)
                means.add(metrics, share)
            if cfg.ptx_coef:
                means.add(add_ptx_gradient(actor, texts["ptx_data"], cfg, run))
            if step < cfg.critic_warmup:                         # the critic learns alone at first:
                actor_optimizer.zero_grad()                      # no gradient, so no step
            means.add(run.step(cfg.grad_clip, TRY, grad_norm=actor_optimizer,
                               critic_grad_norm=critic_optimizer))       # clips, steps, zeroes
        if cfg.ema:
            move_average(state["policy_ema"], actor, cfg.ema)
        run.lap("update")

        # ---- 7. control
        beta, coef = control.beta, penalty.coef                  # the values that this update used
        with torch.no_grad():
            logprobs = token_logprobs(actor, inputs, targets, mask, cfg.temperature)
            kl_old = masked_mean(kl_estimate(old_logprobs, logprobs, "k3"), mask)           # 0-d
        run.must_be_finite(TRY, kl_old=kl_old)
        if cfg.kl_control == "proportional":
            control.update(kl_ref.mean().item(), cfg.batch_size)
        if cfg.surrogate == "kl_penalty":
            penalty.update(kl_old.item())
        run.lap("control")

        # ---- 8. log
        metrics = means.result() | {
            "score": scores.mean(), "kl_ref": kl_ref.mean(),
            "kl_ref_k3": kl_estimate(old_logprobs, ref_logprobs, "k3").sum(dim=1).mean(),
            "kl_old": kl_old, "beta": beta, "kl_penalty_coef": coef,
            "entropy": masked_mean(entropy, mask),
            "explained_variance": explained_variance(old_values, returns, mask),
            "response_length": lengths.mean(), "eos_rate": finished.float().mean(),
            "lr": lr_factor * cfg.lr, "critic_lr": lr_factor * cfg.critic_lr,
            "tokens_per_second": lengths.sum().item() / run.clock.total()}
        metrics |= true_utility(cfg, tokenizer, inputs, targets, mask)
        run.log(step, metrics, ["score", "gold", "kl_ref", "beta", "kl_old", "entropy",
                                "clip_fraction", "explained_variance", "response_length"])
        run.checkpoint(step + 1)

    # ---- the result
    policies = {"SFT": reference, "PPO": actor}
    if cfg.ema:
        policies["PPO, averaged"] = state["policy_ema"]
    text, results = compare(policies, reward, tokenizer, eval_prompts, cfg)
    return run.finish(text, results, CURVES, then="evaluate")


if __name__ == "__main__":
    launch(main, Config, __doc__)
