"""
The ladder that leads to PPO: ten ways to climb one gradient, each a step from the one before.

All maximise  J = E_{x, y ~ pi_theta}[ sum_t R_t ],  with the KL-shaped rewards R_t of ppo.py. Its gradient is
E[ sum_t psi_t grad log pi(a_t | s_t) ], and the first six rungs differ in psi_t alone (Schulman et al. 2016,
equation 1): in how much noise it lets through, and in how far it trusts the critic V:

    plain_value     R_t + gamma V_{t+1}                         what the critic thinks of where a_t led
    total_return    sum_l gamma^l R_l                           all that was earned: REINFORCE
    reward_to_go    sum_{l >= 0} gamma^l R_{t+l}                only what came after a_t
    baseline        reward_to_go - V_t                          less what was expected before it
    a2c             delta_t = R_t + gamma V_{t+1} - V_t         one step, then the critic
    gae             sum_l (gamma lambda)^l delta_{t+l}          in between, by lambda

One gradient step and the samples are spent, as they are the old policy's. The next rungs take several
steps on the same samples, with A_t of gae and rho_t = pi_theta / pi_old (a_t | s_t):

    importance      rho_t A_t                                   the choice of a_t reweighed, that of s_t not
    clip            min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)       until it has gone too far: PPO
    kl_penalty      rho_t A_t - coef KL(pi_old, pi_theta)       or held back by a penalty: PPO's other form
    trpo            max E[rho_t A_t] subject to KL(pi_old, pi_theta) <= max_kl: one natural-gradient step,
                    by conjugate gradient on Fisher-vector products, and a line search

    1. roll out     responses of the rung's policy, scored, with KL-shaped rewards
    2. climb        the rung's step or steps; the critic's, alike on every rung
    3. log          one line
    When every rung is done:
    4. variance     of each rung's gradient on the same samples, by the policy that gae has after a quarter
                    of its updates; and for the rungs with a ratio by the policy that it has an update later
    5. compare      every rung's policy on held-out prompts, and how far from the optimum it is

Departures: no advantage is whitened, since subtracting the mean of a batch is a baseline by itself. With
gamma below 1 every rung but total_return leaves out a factor gamma^t, as is done everywhere. The max_kl of
trpo shrinks during training, with the square of the other rungs' learning rate.

    python policy_gradient.py --config small --rung all
        -> out/small/policy_gradient: ladder.png, variance.png, checkpoint.pt, log.jsonl, report.txt
"""

import copy
import itertools
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import corpus
import data
import experiment
import files
import frontier
import options
import ppo
import scoring
import sft
from model import ScalarGPT, masked_mean, token_logprobs

LADDER = ("plain_value", "total_return", "reward_to_go", "baseline", "a2c", "gae", "importance", "clip",
          "kl_penalty", "trpo")


@dataclass
class Config(scoring.Rewarded):          # which adds --reward and what is done to its scores
    rung: Literal[("all", *LADDER)] = "all"     # one rung of the ladder, or all of them
    steps: int = 40                 # updates of each rung, each on fresh responses
    batch_size: int = 128           # responses per update
    minibatch_size: int = 32        # responses per gradient step, from importance to kl_penalty, and of the critic
    temperature: float = 1.0        # of the policy, where it samples and where it is scored
    beta: float = 0.25              # strength of the KL to the reference
    kl_bound: float = 25.0          # nats per response above which to warn
    gamma: float = 1.0              # discount
    lam: float = 0.95               # lambda of GAE
    clip_eps: float = 0.2           # of the ratio, for clip
    kl_penalty_coef: float = 1.0    # at first, for kl_penalty
    kl_old_target: float = 0.02     # nats per token, for kl_penalty; updates here are longer than in ppo.py
    max_kl: float = 0.01            # nats per token that a step of trpo may move the policy
    cg_steps: int = 10              # of conjugate gradient, for trpo
    damping: float = 0.1            # added to the Fisher matrix, for trpo
    fisher_rows: int = 32           # responses from which its products are taken, for trpo
    lr: float = 1e-3                # AdamW's learning rate at its peak, actor
    critic_lr: float = 1e-3         # the same for the critic
    warmup: int = 2                 # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # to this share of the peak
    grad_clip: float = 1.0          # largest gradient norm
    variance_rollouts: int = 16     # rollouts from which the variance of the gradients is taken,
    variance_rows: int = 16         # and responses to each gradient there
    n_eval: int = 32                # held-out prompts for the final comparison
    n_samples: int = 32             # responses to each of them, from SFT and from every rung


PRESETS = {
    "small": dict(save_every=20),
    "tiny": dict(steps=4, batch_size=16, minibatch_size=8, lr=2e-3, fisher_rows=8, cg_steps=3,
                 variance_rollouts=1, variance_rows=4, n_eval=4, n_samples=4, save_every=2),
}
Config.presets = PRESETS


# --------------------------------------------------------------------------------------------------
# The first six rungs: psi_t, (B, T), 0 off the mask. Their loss is - mean psi_t log pi(a_t | s_t).

def next_values(values, mask):
    """V_{t+1}, and 0 after a response's last token: the episode is over -> (B, T)"""
    inside = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)  # the next column is masked, too
    return values.roll(-1, dims=1) * (inside > 0) * (mask > 0)


def plain_value(rewards, values, mask, gamma=1.0, lam=0.95):
    """
    psi_t = R_t + gamma V_{t+1}: the critic's value of where the token led. As good as the critic is.

    The value before the token, V_t, would not do: it does not depend on a_t, so E[V_t grad log pi] = 0.
    """
    return rewards + gamma * next_values(values, mask)


def total_return(rewards, values, mask, gamma=1.0, lam=0.95):
    """
    psi_t = sum_l gamma^l R_l: a token is praised for all that its response earned (REINFORCE)

    No critic, no bias; and all the noise, even of what was earned before the token was chosen.
    """
    place = ((mask > 0).cumsum(dim=1) - 1).clamp_min(0)                      # l, of a column in its response
    return (rewards * gamma ** place * (mask > 0)).sum(dim=1, keepdim=True) * (mask > 0)


def reward_to_go(rewards, values, mask, gamma=1.0, lam=0.95):
    """psi_t = sum_{l >= 0} gamma^l R_{t+l}: what came before a token is none of its merit"""
    return ppo.gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[0]


def baseline(rewards, values, mask, gamma=1.0, lam=0.95):
    """psi_t = reward_to_go - V_t: V_t depends on the state alone, so that it changes no expectation"""
    return reward_to_go(rewards, values, mask, gamma) - values * (mask > 0)


def a2c(rewards, values, mask, gamma=1.0, lam=0.95):
    """psi_t = delta_t = R_t + gamma V_{t+1} - V_t: least noise, and all of the critic's error"""
    return plain_value(rewards, values, mask, gamma) - values * (mask > 0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """psi_t = sum_l (gamma lam)^l delta_{t+l}: lam 0 is a2c, lam 1 is baseline (Schulman et al. 2016)"""
    return ppo.gae(rewards, values, mask, gamma, lam)[0]


PSI = {"plain_value": plain_value, "total_return": total_return, "reward_to_go": reward_to_go,
       "baseline": baseline, "a2c": a2c, "gae": gae}


def policy_gradient_loss(logprobs, psi, mask):
    """- mean of psi_t log pi(a_t | s_t): its gradient is an estimate of - grad J over the mean length"""
    return -masked_mean(logprobs * psi, mask)


# --------------------------------------------------------------------------------------------------
# The next three: losses of logprobs that have moved away from old_logprobs; two of them stand in ppo.py

def importance_loss(logprobs, old_logprobs, advantages, mask):
    """
    - mean of rho_t A_t, rho_t = exp(logprobs - old_logprobs): importance sampling

    It reweighs the choice of a_t; the states s_t, and A_t, remain those of the policy that sampled.
    """
    return -masked_mean(torch.exp(logprobs - old_logprobs) * advantages, mask)


# --------------------------------------------------------------------------------------------------
# The last: a step of a given size, measured in KL

def conjugate_gradient(product, b, steps=10):
    """
    x with A x = b for a symmetric positive definite A, of which only product(v) = A v is known: (D,) -> (D,)

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradient(lambda v: A @ v, torch.tensor([3.0, 4.0]), steps=2).round(decimals=3)
    tensor([1., 1.])
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, norm = b.clone(), b @ b
    for _ in range(steps):
        if norm < 1e-20:                                                     # solved
            break
        step = product(direction)
        alpha = norm / (direction @ step)
        x, residual = x + alpha * direction, residual - alpha * step
        norm, before = residual @ residual, norm
        direction = residual + norm / before * direction
    return x


def token_distributions(policy, inputs, mask, temperature=1.0):
    """log pi(. | s_t) of all N response tokens, over the whole vocabulary -> (N, V)"""
    hidden = policy.transformer(inputs)[mask > 0]
    return (policy.lm_head(hidden).float() / temperature).log_softmax(dim=-1)


def mean_kl(old_log_pi, log_pi):
    """Mean over response tokens of KL(old, new) over the whole vocabulary: (N, V), (N, V) -> 0-d, nats"""
    return (old_log_pi.exp() * (old_log_pi - log_pi)).sum(dim=-1).mean()


def fisher_product(kl, parameters, damping=0.0):
    """
    v -> (F + damping) v, where F is the Hessian of kl, 0-d, at the policy to which it is measured

    There it is the Fisher matrix, E[grad log pi grad log pi^T]. F v = grad (grad kl . v): F is never formed.
    """
    flat = lambda tensors: torch.cat([t.reshape(-1) for t in tensors])
    kl_gradient = flat(torch.autograd.grad(kl, parameters, create_graph=True))
    return lambda v: flat(torch.autograd.grad(kl_gradient @ v, parameters, retain_graph=True)) + damping * v


def trpo_step(parameters, measure, fisher_kl, max_kl=0.01, cg_steps=10, damping=0.1, halvings=10):
    """
    max objective subject to kl <= max_kl, one step    (Schulman et al. 2015, TRPO, appendix C)

    measure() -> objective, kl of the parameters as they stand, 0-d tensors; kl is that to the policy before
    the step. fisher_kl() -> kl, perhaps on fewer samples.
        x = (F + damping)^-1 grad objective,   step = sqrt(2 max_kl / x.(F + damping) x) x,
    by which kl grows to max_kl at most, in second order; halved until kl is within max_kl and the
    objective has grown, and not taken at all if it never does
    -> {kl: after the step, gain: of the objective, halvings: times the step was halved, grad_norm: of the objective}
    """
    parameters = list(parameters)
    before = measure()[0]
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(before, parameters)])  # (D,)
    with sdpa_kernel(SDPBackend.MATH):       # the fast kernels of attention have no second derivative
        product = fisher_product(fisher_kl(), parameters, damping)
    x = conjugate_gradient(product, gradient, cg_steps)
    step = (2 * max_kl / (x @ product(x)).clamp_min(1e-20)).sqrt() * x
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    for n in range(halvings + 1):
        torch.nn.utils.vector_to_parameters(start + step * 0.5 ** n, parameters)
        with torch.no_grad():
            objective, kl = measure()
        if kl <= max_kl and objective > before:
            return {"kl": kl.item(), "gain": (objective - before).item(), "halvings": n, "grad_norm": gradient.norm()}
    torch.nn.utils.vector_to_parameters(start, parameters)
    return {"kl": 0.0, "gain": 0.0, "halvings": n, "grad_norm": gradient.norm()}


def rung_loss(rung, logprobs, rows, cfg, coef):
    """The loss of a rung on some rows of a rollout, a dict; trpo's is what it maximises, negated"""
    psi = PSI.get(rung, gae)(rows["rewards"], rows["values"], rows["mask"], cfg.gamma, cfg.lam)     # (B, T)
    if rung in PSI:
        return policy_gradient_loss(logprobs, psi, rows["mask"])
    if rung == "clip":
        return ppo.policy_loss(logprobs, rows["old_logprobs"], psi, rows["mask"], cfg.clip_eps)[0]
    if rung == "kl_penalty":
        return ppo.kl_penalty_loss(logprobs, rows["old_logprobs"], psi, rows["mask"], coef)[0]
    return importance_loss(logprobs, rows["old_logprobs"], psi, rows["mask"])


# --------------------------------------------------------------------------------------------------
# One update

@torch.no_grad()
def roll_out(actor, critic, reference, reward, tokenizer, prompts, cfg, generator):
    """The first four steps of ppo.py: responses, scores, logprobs, KL-shaped rewards -> dict of tensors"""
    inputs, targets, mask, finished = ppo.roll_out(actor, prompts, cfg, tokenizer.eot_token, generator)
    scores = reward(inputs, targets, mask, finished)                         # (B,)
    old_logprobs, entropy = ppo.score_rollout(actor, inputs, targets, mask, cfg)            # (B, T) x 2
    ref_logprobs = token_logprobs(reference, inputs, targets, mask, cfg.temperature)
    return {"inputs": inputs, "targets": targets, "mask": mask, "finished": finished, "scores": scores,
            "old_logprobs": old_logprobs, "entropy": entropy, "values": critic(inputs) * mask,
            "rewards": ppo.shape_rewards(scores, old_logprobs, ref_logprobs, mask, cfg.beta),
            "kl_ref": ppo.kl_estimate(old_logprobs, ref_logprobs).sum(dim=1)}               # (B,)


def some(roll, rows):
    return {name: x[rows] for name, x in roll.items()}


def logprobs_of(policy, rows, cfg):
    return token_logprobs(policy, rows["inputs"], rows["targets"], rows["mask"], cfg.temperature)


def climb(rung, actor, optimizer, roll, order, cfg, coef, run):
    """One gradient step on all rows, or from importance on one on each minibatch -> metrics"""
    grad_norms = []
    for rows in [order] if rung in PSI else order.split(cfg.minibatch_size):
        for part in data.parts(rows, cfg.accumulation):
            share = roll["mask"][part].sum() / roll["mask"][rows].sum()      # of the tokens
            part = some(roll, part)
            loss = rung_loss(rung, logprobs_of(actor, part, cfg), part, cfg, coef)
            (share * loss).backward()
        grad_norms.append(torch.nn.utils.clip_grad_norm_(actor.parameters(), cfg.grad_clip))
        run.must_be_finite(len(grad_norms) - 1, loss=loss, grad_norm=grad_norms[-1])
        optimizer.step()
        optimizer.zero_grad()
    return {"grad_norm": sum(grad_norms) / len(grad_norms)}


def climb_by_trpo(actor, roll, order, cfg, max_kl):
    """One step of trpo on all rows -> metrics"""
    at, few = roll["mask"] > 0, some(roll, order[:cfg.fisher_rows])
    psi = gae(roll["rewards"], roll["values"], roll["mask"], cfg.gamma, cfg.lam)[at]        # (N,)
    with torch.no_grad():
        old_log_pi = token_distributions(actor, roll["inputs"], roll["mask"], cfg.temperature)      # (N, V)

    def measure():
        log_pi = token_distributions(actor, roll["inputs"], roll["mask"], cfg.temperature)  # (N, V)
        logprobs = log_pi.gather(1, roll["targets"][at][:, None]).squeeze(1)                # (N,)
        return (torch.exp(logprobs - roll["old_logprobs"][at]) * psi).mean(), mean_kl(old_log_pi, log_pi)

    def fisher_kl():                         # taken before the step, when the two policies are one
        log_pi = token_distributions(actor, few["inputs"], few["mask"], cfg.temperature)
        return mean_kl(log_pi.detach(), log_pi)

    taken = trpo_step(actor.parameters(), measure, fisher_kl, max_kl, cfg.cg_steps, cfg.damping)
    return {"kl_step": taken["kl"], "gain": taken["gain"], "halvings": taken["halvings"], "grad_norm": taken["grad_norm"]}


# --------------------------------------------------------------------------------------------------
# How noisy is each rung?

def gradient_noise(gradients):
    """
    From independent gradients (D,) of one kind, an even number, one after another

    variance    E |g - E g|^2, the trace of their covariance: the mean of |g - g'|^2 / 2 over pairs, which
                is without bias
    signal      |E g|^2: the mean of g . g' over the same pairs
    -> variances of the pairs (M / 2,), signal
    """
    gradients = iter(gradients)
    pairs = [(((g - other) ** 2).sum() / 2, g @ other) for g, other in zip(gradients, gradients)]
    variances, products = torch.tensor(pairs, dtype=torch.float64).T
    return variances, products.mean().item()


def measure_variance(actor, moved, rolls, cfg):
    """
    Every rung's gradient on the same batches of variance_rows responses, of rollouts by actor

    The losses of the ratio are taken twice: where it is 1, and at `moved`, the policy an update later.
    -> {name: {variance, change: from the rung before, or from where the ratio was 1; their standard errors;
    enough: responses with which the noise of the gradient is its signal}}
    """
    def gradients(rung, policy):
        for roll, i in itertools.product(rolls, range(0, cfg.batch_size, cfg.variance_rows)):
            rows = some(roll, slice(i, i + cfg.variance_rows))
            loss = rung_loss(rung, logprobs_of(policy, rows, cfg), rows, cfg, cfg.kl_penalty_coef)
            yield torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])

    where = [(rung, actor) for rung in LADDER] + [(rung, moved) for rung in ("importance", "clip", "kl_penalty")]
    noise, seen = {}, {}
    error = lambda x: x.std().item() / len(x) ** 0.5
    for rung, policy in experiment.progress(where, "measuring the variance of every rung's gradient"):
        name, at = rung + ", later" * (policy is moved), LADDER.index(rung)
        before = rung if policy is moved else LADDER[max(0, at - 1)]
        seen[name], signal = gradient_noise(gradients(rung, policy))
        change = seen[name] - seen[before]           # of the same pairs of batches: their luck cancels
        noise[name] = {"variance": seen[name].mean().item(), "variance_error": error(seen[name]),
                       "change": change.mean().item(), "change_error": error(change),
                       "enough": cfg.variance_rows * seen[name].mean().item() / signal if signal > 0 else None}
    return noise


PANELS = [("what to weigh a token by", ("plain_value", "total_return", "reward_to_go", "baseline")),
          ("how far to trust the critic", ("baseline", "a2c", "gae")),
          ("several steps on the same samples, or a long one", ("gae", "importance", "clip", "kl_penalty", "trpo"))]


@experiment.optional
def draw_ladder(log, cfg, best, path):
    """What was earned, rewards summed over a response, against the number of responses, for every rung"""
    rungs = dict.fromkeys(line["rung"] for line in log)
    panels = PANELS if len(rungs) > 1 else [(cfg.rung, (cfg.rung,))]
    size = 4.4 * len(panels), 4.0
    figure, axes = experiment.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axis, (heading, names) in zip(axes.flat, panels):
        for rung, style in zip(names, ("-", "--", "-.", ":", (0, (1, 3)))):
            earned = experiment.smooth([line["objective"] for line in log if line["rung"] == rung])
            axis.plot([cfg.batch_size * i for i in range(len(earned))], earned, linestyle=style, linewidth=1.6,
                      color="0.6" if axis is not axes[0, 0] and rung == names[0] else "0.0", label=rung)
        if best is not None:
            axis.axhline(best, color="0.4", linewidth=0.8)
            axis.annotate("J*, the most possible (estimate)", (1, best), xycoords=("axes fraction", "data"),
                          ha="right", xytext=(-3, 3), textcoords="offset points", fontsize=8)
            axis.set_ylim(top=best + 0.1 * abs(best))
        axis.set(title=heading, xlabel="responses sampled")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    axes[0, 0].set_ylabel(f"score - {cfg.beta:g} KL (mean over five updates)")
    figure.tight_layout()
    return experiment.save_figure(figure, path)


@experiment.optional
def draw_variance(noise, cfg, path):
    """The variance of every rung's gradient, and what the rung changed, with 95 % intervals"""
    figure, axes = experiment.subplots(1, 2, figsize=(11, 4.2))
    for axis, quantity in zip(axes, ("variance", "change")):
        for later, marker, colour, label in ((False, "o", "0.0", "at the policy that sampled"),
                                             (True, "s", "0.55", "an update later, on the same samples")):
            at = {name: LADDER.index(name.removesuffix(", later")) + 0.2 * later for name in noise
                  if name.endswith(", later") == later}
            axis.errorbar(at.values(), [noise[name][quantity] for name in at],
                          yerr=[1.96 * noise[name][f"{quantity}_error"] for name in at], fmt=marker, color=colour,
                          capsize=3, markersize=5, linewidth=1.2, label=label)
        axis.set_xticks(range(len(LADDER)), LADDER, rotation=30, ha="right", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=f"variance of the gradient of {cfg.variance_rows} responses", ylim=(0, None))
    axes[1].set(ylabel="change from the rung before, same samples")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    return experiment.save_figure(figure, path)


def check(cfg):
    """Stops on settings that cannot go together."""
    options.check_minibatch(cfg)
    scoring.check(cfg)
    if cfg.fisher_rows > cfg.batch_size:
        files.stop(f"--fisher_rows {cfg.fisher_rows} is more than --batch_size {cfg.batch_size}; lower it to that or less")
    if cfg.lora_rank:
        files.stop("--lora_rank: the ladder compares gradients of all weights; ppo.py, grpo.py and dpo.py take LoRA")
    if cfg.rung == "all" and cfg.batch_size % (4 * cfg.variance_rows):
        files.stop(f"--batch_size {cfg.batch_size} is not a multiple of 4 times --variance_rows "
                   f"{cfg.variance_rows}: the variance is taken over pairs of such batches")


@experiment.self_contained
def main(cfg):
    run = experiment.Run(cfg, "policy_gradient", sft.export)
    if run.finished:
        return run.show()
    check(cfg)
    device = run.device
    actor, tokenizer = sft.load_policy(experiment.ensure(cfg, sft), device, **cfg.how())
    train_prompts, eval_prompts = corpus.prompts(cfg, tokenizer, actor.config.block_size, cfg.n_eval)
    reward = scoring.load_reward(cfg, actor, tokenizer, train_prompts, device)
    run.begin()
    reference = copy.deepcopy(actor).requires_grad_(False)
    trunk = reward.model or actor
    critic = ScalarGPT(trunk.config, init_from=trunk, zero_head=True).to(device).eval()
    first_critic = copy.deepcopy(critic).requires_grad_(False)
    rungs = LADDER if cfg.rung == "all" else (cfg.rung,)
    policies = {rung: copy.deepcopy(actor).cpu() for rung in rungs}          # where each of them ended
    probe = torch.nn.ModuleDict({"actor": copy.deepcopy(actor), "critic": copy.deepcopy(critic),
                                 "moved": copy.deepcopy(actor)})             # an update later
    adam = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=cfg.lr, **adam)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=cfg.critic_lr, **adam)
    penalty = ppo.ThresholdKL(cfg.kl_penalty_coef, cfg.kl_old_target)
    state = dict(actor=actor, critic=critic, optimizer=optimizer, critic_optimizer=critic_optimizer, penalty=penalty,
                 probe=probe, gpt=asdict(actor.config), tokenizer=data.fingerprint(tokenizer),
                 sft=files.fingerprint(actor), reward=reward, data=corpus.source_of(train_prompts),
                 **{f"policy_{rung}": policy for rung, policy in policies.items()})
    if not run.resuming:
        data.save_tokenizer(tokenizer, run.folder)

    for step in run.steps(run.restore(**state), len(rungs) * cfg.steps):
        rung, update = rungs[step // cfg.steps], step % cfg.steps
        if update == 0:                      # every rung starts from the same models and random numbers
            print(f"rung {step // cfg.steps + 1} of {len(rungs)}: {rung}")
            actor.load_state_dict(reference.state_dict())
            critic.load_state_dict(first_critic.state_dict())
            optimizer.state.clear()
            critic_optimizer.state.clear()
            run.generator.manual_seed(cfg.seed)
        if rung == "gae" and update == cfg.steps // 4:
            probe["actor"].load_state_dict(actor.state_dict())
            probe["critic"].load_state_dict(critic.state_dict())
        if rung == "gae" and update == cfg.steps // 4 + 1:
            probe["moved"].load_state_dict(actor.state_dict())
        clock = experiment.Clock(device)

        # ---- 1. roll out
        prompts = data.draw(train_prompts, cfg.batch_size, run.generator)
        roll = roll_out(actor, critic, reference, reward, tokenizer, prompts, cfg, run.generator)
        run.must_be_finite(hint=scoring.HINT, scores=roll["scores"])
        run.must_be_finite(kl_ref=roll["kl_ref"])
        run.must_be_finite(hint="try a lower --critic_lr, with another --out", values=roll["values"])
        run.must_be_finite(hint="try a smaller --beta or --score_clip, with another --out", rewards=roll["rewards"])
        ppo.check_rollout(roll["kl_ref"], cfg.kl_bound)
        clock.lap("rollout")

        # ---- 2. climb
        lr_factor = experiment.learning_rate(update, cfg.steps, 1.0, cfg.warmup, cfg.lr_floor)
        experiment.set_learning_rate(optimizer, lr_factor * cfg.lr)
        experiment.set_learning_rate(critic_optimizer, lr_factor * cfg.critic_lr)
        order = torch.randperm(cfg.batch_size, generator=run.generator)
        if rung == "trpo":                   # a step's KL goes with the square of its length
            metrics = climb_by_trpo(actor, roll, order, cfg, lr_factor ** 2 * cfg.max_kl)
            run.must_be_finite(grad_norm=metrics["grad_norm"])   # else no step was taken
        else:
            metrics = climb(rung, actor, optimizer, roll, order, cfg, penalty.coef, run)
        _, returns = ppo.gae(roll["rewards"], roll["values"], roll["mask"], cfg.gamma, cfg.lam)     # (B, T)
        for at in order.split(cfg.minibatch_size):
            for part in data.parts(at, cfg.accumulation):
                rows, share = some(roll, part), roll["mask"][part].sum() / roll["mask"][at].sum()
                loss, _ = ppo.value_loss(critic(rows["inputs"]), rows["values"], returns[part], rows["mask"], clip_eps=0)
                (share * loss).backward()
            critic_grad_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), cfg.grad_clip)
            run.must_be_finite(1, "try a lower --critic_lr, with another --out",
                               critic_grad_norm=critic_grad_norm)            # the actor has moved already
            critic_optimizer.step()
            critic_optimizer.zero_grad()
        rows = some(roll, order[:cfg.minibatch_size])
        with torch.no_grad():
            kl_old = masked_mean(ppo.kl_estimate(rows["old_logprobs"], logprobs_of(actor, rows, cfg), "k3"),
                                 rows["mask"])                               # 0-d
        run.must_be_finite(taken=1, kl_old=kl_old)
        if rung == "kl_penalty":
            metrics["kl_penalty_coef"] = penalty.coef            # as it was in this update
            penalty.update(kl_old.item())
        clock.lap("update")

        # ---- 3. log
        metrics |= {
            "rung": rung, "score": roll["scores"].mean(), "kl_ref": roll["kl_ref"].mean(),
            "objective": roll["rewards"].sum(1).mean(), "kl_old": kl_old,
            "entropy": masked_mean(roll["entropy"], roll["mask"]),
            "explained_variance": ppo.explained_variance(roll["values"], returns, roll["mask"]),
            "response_length": roll["mask"].sum(1).mean(), "eos_rate": roll["finished"].float().mean(),
            "lr": lr_factor * cfg.lr, **clock.seconds,
            **frontier.true_utility(cfg, tokenizer, roll["inputs"], roll["targets"], roll["mask"])}
        run.log(step, metrics, ["score", "gold", "kl_ref", "objective", "kl_old", "entropy", "explained_variance",
                                "response_length"])
        if update + 1 == cfg.steps:
            policies[rung].load_state_dict(actor.state_dict())
        run.checkpoint(step + 1)
    report, results, pictures = [], {}, []

    # ---- 4. variance
    if cfg.rung == "all":
        rolls = [roll_out(probe["actor"], probe["critic"], reference, reward, tokenizer,
                          data.draw(train_prompts, cfg.batch_size, run.generator), cfg, run.generator)
                 for _ in range(cfg.variance_rollouts)]
        noise = results["noise"] = measure_variance(probe["actor"], probe["moved"], rolls, cfg)
        pictures.append(draw_variance(noise, cfg, run.folder / "variance.png"))
        report += [experiment.table([
            [f"gradient of {cfg.variance_rows} responses", "variance", "change from the rung before",
             "responses for noise = signal"],
            *([name, f"{x['variance']:.3f} ±{x['variance_error']:.3f}",
               f"{x['change']:+.3f} ±{x['change_error']:.3f}", f"{x['enough']:.0f}" if x["enough"] else "-"]
              for name, x in noise.items())]), ""]

    # ---- 5. compare
    policies = {"SFT": reference} | {rung: policy.to(device) for rung, policy in policies.items()}
    samples = frontier.collect(policies, reward, tokenizer, eval_prompts,
                               [cfg.n_samples] * (1 + len(rungs)), cfg)
    shown = ["score", "gold", "kl_ref", "objective"] if samples.gold is not None else ["score", "kl_ref", "objective"]
    table = [[f"{cfg.n_eval} held-out prompts x {cfg.n_samples}", *shown, "fraction of optimum"]]
    for name in samples.names:
        means, _ = frontier.measure(samples, name)
        means["objective"] = means["score"] - cfg.beta * means["kl_ref"]
        limit = frontier.fraction_of_optimum(samples, name, cfg.beta) if cfg.beta else {"fraction": None}
        if cfg.beta:
            limit["best_objective"] = limit.pop("objective")
        results[name] = means | limit
        table.append([name, *(means[metric] for metric in shown),
                      "" if limit["fraction"] is None else f"{limit['fraction']:.3f} ±{limit['standard_error']:.3f}"
                      + "*" * (not limit["optimum_trusted"])])
    log = files.read_lines(run.folder / "log.jsonl")
    best = results["SFT"].get("best_objective")
    pictures.insert(0, draw_ladder(log, cfg, best, run.folder / "ladder.png"))
    return run.finish("\n".join([
        *report, experiment.table(table), "", "*: too few effective samples to know the optimum well; objective is "
        f"score - {cfg.beta:g} KL, and its optimum an estimate, if anything too low.", "",
        f"pictures    {', '.join(map(str, pictures))}",
        f"log         {run.folder}/log.jsonl", f"checkpoint  {run.folder}/checkpoint.pt",
        f"next        {options.next_command(cfg, 'evaluate')} --runs {run.folder.parent.name}/policy_gradient"]), results)


if __name__ == "__main__":
    experiment.launch(main, Config, __doc__)
