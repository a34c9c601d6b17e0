"""
The ladder that leads to PPO: ten ways to climb one gradient, each a step from the one before.

All maximise  J = E_{x, y ~ pi_theta}[ sum_t R_t ],  with the KL-shaped rewards R_t of ppo.py. Its
gradient is  E[ sum_t psi_t grad log pi(a_t | s_t) ],  and the first six rungs differ only in psi_t
(Schulman et al. 2016, equation 1): in how much noise it lets through, and in how far it trusts the
critic V:

    plain_value     R_t + gamma V_{t+1}                     the critic's view of where a_t led
    total_return    sum_l gamma^l R_l                       all that was earned: REINFORCE
    reward_to_go    sum_{l >= 0} gamma^l R_{t+l}            only what came after a_t
    baseline        reward_to_go - V_t                      less what was expected before it
    a2c             delta_t = R_t + gamma V_{t+1} - V_t     one step, then the critic
    gae             sum_l (gamma lambda)^l delta_{t+l}      in between, by lambda

After one gradient step the samples are spent, because the policy that wrote them is gone. The next
rungs take several steps on the same samples, with gae's A_t and the ratio
rho_t = pi_theta / pi_old (a_t | s_t):

    importance      rho_t A_t                               a_t is reweighted, s_t is not
    clip            min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)       until rho_t has gone too
                                                            far: PPO
    kl_penalty      rho_t A_t - coef KL(pi_old, pi_theta)   held back by a penalty: PPO's other form
    trpo            max E[rho_t A_t] subject to KL(pi_old, pi_theta) <= max_kl: one natural-gradient
                    step, by conjugate gradient on Fisher-vector products, and a line search

    1. roll out     responses of the rung's policy, scored, with KL-shaped rewards
    2. climb        the rung's step or steps; the critic's, the same on every rung
    3. log          one line
    When every rung is done:
    4. variance     of each rung's gradient on the same samples, at the policy that gae has after a
                    quarter of its updates; for the rungs with a ratio also at its policy an update
                    later
    5. compare      every rung's policy on held-out prompts, and how far from the optimum it is

Departures: no advantage is whitened, because subtracting a batch's mean is a baseline by itself.
With gamma below 1 every rung but total_return leaves out a factor gamma^t, as is usual. The max_kl
of trpo shrinks during training, with the square of the other rungs' learning rate.

    python policy_gradient.py --config small --rung all
        -> out/small/policy_gradient: ladder.png, variance.png, checkpoint.pt, log.jsonl, report.txt
"""

import copy
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import ppo
import sft
from compare import collect, fraction_of_optimum, measure, true_utility
from lab import report
from lab.files import read_lines
from lab.run import Run, ensure, launch, learning_rate, self_contained, set_learning_rate, stop
from model import ScalarGPT, masked_mean, token_logprobs
from presets import presets_of
from reward import REWARD_HINT, Rewarded, check_reward, load_reward
from rollout import check_kl_ref, roll_out, score_rollout

LADDER = ("plain_value", "total_return", "reward_to_go", "baseline", "a2c", "gae", "importance",
          "clip", "kl_penalty", "trpo")


@dataclass
class Config(Rewarded):              # Rewarded adds --reward and the options for its scores
    rung: Literal[("all", *LADDER)] = "all"     # one rung of the ladder, or all of them
    steps: int = 40                 # updates of each rung, each on fresh responses
    batch_size: int = 128           # responses per update
    minibatch_size: int = 32        # responses per gradient step: importance to kl_penalty, critic
    temperature: float = 1.0        # sampling temperature, also applied when scoring
    beta: float = 0.25              # strength of the KL to the reference
    kl_bound: float = 25.0          # nats per response above which to warn
    gamma: float = 1.0              # discount
    lam: float = 0.95               # lambda of GAE
    clip_eps: float = 0.2           # clip: clip range of the ratio
    kl_penalty_coef: float = 1.0    # kl_penalty: initial coefficient
    kl_old_target: float = 0.02     # kl_penalty: nats per token; updates are longer than in ppo.py
    max_kl: float = 0.01            # trpo: nats per token that a step may move the policy
    cg_steps: int = 10              # trpo: steps of conjugate gradient
    damping: float = 0.1            # trpo: added to the Fisher matrix
    fisher_rows: int = 32           # trpo: responses for the Fisher-vector products
    lr: float = 1e-3                # actor's AdamW learning rate at its peak
    critic_lr: float = 1e-3         # critic's AdamW learning rate at its peak
    warmup: int = 2                 # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # final learning rates, as a share of the peak
    grad_clip: float = 1.0          # largest gradient norm
    variance_rollouts: int = 16     # rollouts for the variance of the gradients
    variance_rows: int = 16         # responses per gradient in that measurement
    n_eval: int = 32                # held-out prompts in the final comparison
    n_samples: int = 32             # responses to each of them, per policy
    save_every: int = 20            # updates between checkpoints; Ctrl-C saves at any time
    presets = presets_of("policy_gradient")


# --------------------------------------------------------------------------------------------------
# The first six rungs: psi_t, (B, T), 0 off the mask. Their loss is - mean psi_t log pi(a_t | s_t).

def next_values(values, mask):
    """V_{t+1}, and 0 after a response's last token: the episode is over -> (B, T)"""
    inside = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)  # the next column too
    return values.roll(-1, dims=1) * (inside > 0) * (mask > 0)


def plain_value(rewards, values, mask, gamma=1.0, lam=0.95):
    """
    psi_t = R_t + gamma V_{t+1}: the critic's value of where the token led. As good as the critic.

    The value before the token, V_t, would not work: it does not depend on a_t, so
    E[V_t grad log pi] = 0.
    """
    return rewards + gamma * next_values(values, mask)


def total_return(rewards, values, mask, gamma=1.0, lam=0.95):
    """
    psi_t = sum_l gamma^l R_l: a token gets credit for all that its response earned (REINFORCE)

    No critic, no bias, and all the noise, even from rewards earned before the token was chosen.
    """
    place = ((mask > 0).cumsum(dim=1) - 1).clamp_min(0)                      # (B, T) l of a column
    return (rewards * gamma ** place * (mask > 0)).sum(dim=1, keepdim=True) * (mask > 0)


def reward_to_go(rewards, values, mask, gamma=1.0, lam=0.95):
    """psi_t = sum_{l >= 0} gamma^l R_{t+l}: no credit for what was earned before the token"""
    return ppo.gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)[0]


def baseline(rewards, values, mask, gamma=1.0, lam=0.95):
    """psi_t = reward_to_go - V_t: V_t depends only on s_t, so subtracting it adds no bias"""
    return reward_to_go(rewards, values, mask, gamma) - values * (mask > 0)


def a2c(rewards, values, mask, gamma=1.0, lam=0.95):
    """psi_t = delta_t = R_t + gamma V_{t+1} - V_t: least noise, and all of the critic's error"""
    return plain_value(rewards, values, mask, gamma) - values * (mask > 0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """psi_t = sum_l (gamma lam)^l delta_{t+l}: a2c at lam 0, baseline at 1 (Schulman 2016)"""
    return ppo.gae(rewards, values, mask, gamma, lam)[0]


PSI = {"plain_value": plain_value, "total_return": total_return, "reward_to_go": reward_to_go,
       "baseline": baseline, "a2c": a2c, "gae": gae}


def policy_gradient_loss(logprobs, psi, mask):
    """- mean of psi_t log pi(a_t | s_t): its gradient estimates - grad J / the mean length"""
    return -masked_mean(logprobs * psi, mask)


# --------------------------------------------------------------------------------------------------
# The next three: losses of logprobs that have moved away from old_logprobs; ppo.py has two of them

def importance_loss(logprobs, old_logprobs, advantages, mask):
    """
    - mean of rho_t A_t, rho_t = exp(logprobs - old_logprobs): importance sampling

    The choice of a_t is reweighted. The states s_t, and A_t, remain those of the old policy.
    """
    return -masked_mean(torch.exp(logprobs - old_logprobs) * advantages, mask)


# --------------------------------------------------------------------------------------------------
# The last: a step of a given size, measured in KL

def conjugate_gradient(product, b, steps=10):
    """
    x with A x = b for a symmetric positive definite A, known by product(v) = A v: (D,) -> (D,)

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradient(lambda v: A @ v, torch.tensor([3.0, 4.0]), steps=2).round(decimals=3)
    tensor([1., 1.])
    """
    x = torch.zeros_like(b)
    residual = b.clone()
    direction = b.clone()
    norm = b @ b
    for _ in range(steps):
        if norm < 1e-20:                                                     # solved
            break
        step = product(direction)
        alpha = norm / (direction @ step)
        x = x + alpha * direction
        residual = residual - alpha * step
        before, norm = norm, residual @ residual
        direction = residual + norm / before * direction
    return x


def token_distributions(policy, inputs, mask, temperature=1.0):
    """log pi(. | s_t) at all N response tokens, over the whole vocabulary -> (N, V)"""
    hidden = policy.transformer(inputs)[mask > 0]
    return (policy.lm_head(hidden).float() / temperature).log_softmax(dim=-1)


def mean_kl(old_log_pi, log_pi):
    """Mean over tokens of KL(old, new) over the whole vocabulary: (N, V), (N, V) -> 0-d, nats"""
    return (old_log_pi.exp() * (old_log_pi - log_pi)).sum(dim=-1).mean()


def fisher_product(kl, parameters, damping=0.0):
    """
    v -> (F + damping) v, with F the Hessian of kl (0-d) at the policy that kl is measured from

    There it is the Fisher matrix, E[grad log pi grad log pi^T]. F v = grad (grad kl . v), so F is
    never formed.
    """
    def flat(tensors):
        return torch.cat([t.reshape(-1) for t in tensors])

    kl_gradient = flat(torch.autograd.grad(kl, parameters, create_graph=True))              # (D,)

    def product(v):
        hessian_v = torch.autograd.grad(kl_gradient @ v, parameters, retain_graph=True)
        return flat(hessian_v) + damping * v
    return product


def trpo_step(parameters, measure, fisher_kl, max_kl=0.01, cg_steps=10, damping=0.1, halvings=10):
    """
    max objective subject to kl <= max_kl, one step    (Schulman et al. 2015, TRPO, appendix C)

    measure() -> objective, kl at the current parameters, 0-d tensors; kl is from the policy before
    the step. fisher_kl() -> the same kl, perhaps on fewer samples.
        x = (F + damping)^-1 grad objective,   step = sqrt(2 max_kl / x.(F + damping) x) x,
    which, to second order, takes kl to max_kl at most. The step is halved until kl is within max_kl
    and the objective has grown. If that never happens, no step is taken.
    -> {kl: after the step, gain: of the objective, halvings, grad_norm: of the objective}
    """
    parameters = list(parameters)
    before = measure()[0]
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(before, parameters)])  # (D,)
    with sdpa_kernel(SDPBackend.MATH):       # attention's fast kernels have no second derivative
        product = fisher_product(fisher_kl(), parameters, damping)
    x = conjugate_gradient(product, gradient, cg_steps)
    step = (2 * max_kl / (x @ product(x)).clamp_min(1e-20)).sqrt() * x
    start = torch.nn.utils.parameters_to_vector(parameters).detach()
    for n in range(halvings + 1):
        torch.nn.utils.vector_to_parameters(start + step * 0.5 ** n, parameters)
        with torch.no_grad():
            objective, kl = measure()
        if kl <= max_kl and objective > before:
            return {"kl": kl.item(), "gain": (objective - before).item(), "halvings": n,
                    "grad_norm": gradient.norm()}
    torch.nn.utils.vector_to_parameters(start, parameters)
    return {"kl": 0.0, "gain": 0.0, "halvings": n, "grad_norm": gradient.norm()}


def rung_loss(rung, logprobs, rows, cfg, coef):
    """A rung's loss on some rows of a rollout, a dict; for trpo, minus the objective"""
    mask = rows["mask"]
    psi = PSI.get(rung, gae)(rows["rewards"], rows["values"], mask, cfg.gamma, cfg.lam)     # (B, T)
    if rung in PSI:
        return policy_gradient_loss(logprobs, psi, mask)
    if rung == "clip":
        return ppo.policy_loss(logprobs, rows["old_logprobs"], psi, mask, cfg.clip_eps)[0]
    if rung == "kl_penalty":
        return ppo.kl_penalty_loss(logprobs, rows["old_logprobs"], psi, mask, coef)[0]
    return importance_loss(logprobs, rows["old_logprobs"], psi, mask)


# --------------------------------------------------------------------------------------------------
# One update

@torch.no_grad()
def sample_rollout(actor, critic, reference, reward, tokenizer, prompts, cfg, generator):
    """Steps 1 to 5 of ppo.py: responses, scores, logprobs, rewards, returns -> dict of tensors"""
    inputs, targets, mask, finished = roll_out(
        actor, prompts, cfg, tokenizer.end_tokens, generator)                 # (B, T) x 3, (B,)
    scores = reward(inputs, targets, mask, finished)                         # (B,)
    old_logprobs, entropy = score_rollout(actor, inputs, targets, mask, cfg)            # (B, T) x 2
    ref_logprobs = token_logprobs(reference, inputs, targets, mask, cfg.temperature)
    values = critic(inputs) * mask                                           # (B, T)
    rewards = ppo.shape_rewards(scores, old_logprobs, ref_logprobs, mask, cfg.beta)         # (B, T)
    return {"inputs": inputs, "targets": targets, "mask": mask, "finished": finished,
            "scores": scores, "old_logprobs": old_logprobs, "entropy": entropy, "values": values,
            "rewards": rewards, "kl_ref": ppo.kl_estimate(old_logprobs, ref_logprobs).sum(dim=1),
            "returns": ppo.gae(rewards, values, mask, cfg.gamma, cfg.lam)[1]}               # (B, T)


def select(rollout, rows):
    return {name: x[rows] for name, x in rollout.items()}


def logprobs_of(policy, rows, cfg):
    return token_logprobs(policy, rows["inputs"], rows["targets"], rows["mask"], cfg.temperature)


def climb(rung, actor, optimizer, rollout, order, cfg, coef, run):
    """One gradient step on all rows or, from importance on, one per minibatch -> metrics"""
    means = data.Means()
    lengths = rollout["mask"].sum(dim=1)                                     # (B,)
    minibatches = [order] if rung in PSI else order.split(cfg.minibatch_size)
    for minibatch in minibatches:
        for part, share in data.microbatches(minibatch, cfg.accumulation, lengths[minibatch]):
            rows = select(rollout, part)
            loss = rung_loss(rung, logprobs_of(actor, rows, cfg), rows, cfg, coef)
            (share * loss).backward()
        means.add(run.step(cfg.grad_clip, grad_norm=optimizer))
    return means.result()


def climb_by_trpo(actor, rollout, order, cfg, max_kl, run):
    """One step of trpo on all rows -> metrics"""
    inputs, mask = rollout["inputs"], rollout["mask"]
    few = select(rollout, order[:cfg.fisher_rows])
    psi = gae(rollout["rewards"], rollout["values"], mask, cfg.gamma, cfg.lam)[mask > 0]    # (N,)
    chosen = rollout["targets"][mask > 0][:, None]                           # (N, 1)
    old_logprobs = rollout["old_logprobs"][mask > 0]                         # (N,)
    with torch.no_grad():
        old_log_pi = token_distributions(actor, inputs, mask, cfg.temperature)              # (N, V)

    def objective_and_kl():
        log_pi = token_distributions(actor, inputs, mask, cfg.temperature)   # (N, V)
        ratio = torch.exp(log_pi.gather(1, chosen).squeeze(1) - old_logprobs)               # (N,)
        return (ratio * psi).mean(), mean_kl(old_log_pi, log_pi)

    def fisher_kl():                         # before the step, when old and new policy are the same
        log_pi = token_distributions(actor, few["inputs"], few["mask"], cfg.temperature)
        return mean_kl(log_pi.detach(), log_pi)

    taken = trpo_step(actor.parameters(), objective_and_kl, fisher_kl, max_kl, cfg.cg_steps,
                      cfg.damping)
    run.must_be_finite(grad_norm=taken["grad_norm"])             # if it is not, no step was taken
    run.taken += 1
    taken["kl_step"] = taken.pop("kl")
    return taken


def train_critic(critic, optimizer, rollout, order, cfg, run):
    """One epoch on the rollout, a step per minibatch, without the value clip"""
    lengths = rollout["mask"].sum(dim=1)                                     # (B,)
    for minibatch in order.split(cfg.minibatch_size):
        for part, share in data.microbatches(minibatch, cfg.accumulation, lengths[minibatch]):
            rows = select(rollout, part)
            loss, _ = ppo.value_loss(critic(rows["inputs"]), rows["values"], rows["returns"],
                                     rows["mask"], clip_eps=0)
            (share * loss).backward()
        run.step(cfg.grad_clip, TRY, critic_grad_norm=optimizer)


# --------------------------------------------------------------------------------------------------
# How noisy is each rung?

def gradient_noise(gradients):
    """
    Variance and signal of independent gradients (D,), an even number, one after another

    variance    E |g - E g|^2, the trace of their covariance. The mean of |g - g'|^2 / 2 over pairs
                is an unbiased estimate of it
    signal      |E g|^2: the mean of g . g' over the same pairs
    -> variances of the pairs (M / 2,), signal
    """
    gradients = iter(gradients)
    variances, products = [], []
    for g, other in zip(gradients, gradients):           # one iterator twice: consecutive pairs
        variances.append(((g - other) ** 2).sum().item() / 2)
        products.append((g @ other).item())
    return torch.tensor(variances, dtype=torch.float64), sum(products) / len(products)


def measure_variance(actor, moved, rollouts, cfg):
    """
    Every rung's gradient on the same batches of variance_rows responses, from rollouts by actor

    The rungs with a ratio are measured twice: at actor, where it is 1, and at `moved`, the policy
    an update later. -> {name: {variance; change: from the rung before, or from where the ratio was
    1; their standard errors; enough: responses with which a gradient's noise equals its signal}}
    """
    batches = [select(rollout, slice(i, i + cfg.variance_rows))
               for rollout in rollouts for i in range(0, cfg.batch_size, cfg.variance_rows)]

    def gradients(rung, policy):
        for rows in batches:
            loss = rung_loss(rung, logprobs_of(policy, rows, cfg), rows, cfg, cfg.kl_penalty_coef)
            gradient = torch.autograd.grad(loss, list(policy.parameters()))
            yield torch.cat([g.flatten() for g in gradient])

    def standard_error(x):
        return x.std().item() / len(x) ** 0.5

    # name, rung, policy, name of what the change is measured from
    measured = [(rung, rung, actor, LADDER[max(0, i - 1)]) for i, rung in enumerate(LADDER)]
    for rung in ("importance", "clip", "kl_penalty"):
        measured.append((f"{rung}, later", rung, moved, rung))
    noise, variances = {}, {}
    for name, rung, policy, before in report.progress(
            measured, "measuring the variance of every rung's gradient"):
        variances[name], signal = gradient_noise(gradients(rung, policy))
        change = variances[name] - variances[before]     # on the same pairs, so their luck cancels
        variance = variances[name].mean().item()
        noise[name] = {"variance": variance, "variance_error": standard_error(variances[name]),
                       "change": change.mean().item(), "change_error": standard_error(change),
                       "enough": cfg.variance_rows * variance / signal if signal > 0 else None}
    return noise


def noise_table(noise, cfg):
    rows = [[f"gradient of {cfg.variance_rows} responses", "variance",
             "change from the rung before", "responses for noise = signal"]]
    for name, x in noise.items():
        rows.append([name, f"{x['variance']:.3f} ±{x['variance_error']:.3f}",
                     f"{x['change']:+.3f} ±{x['change_error']:.3f}",
                     f"{x['enough']:.0f}" if x["enough"] else "-"])
    return report.table(rows)


PANELS = [("how to weigh a token", ("plain_value", "total_return", "reward_to_go", "baseline")),
          ("how far to trust the critic", ("baseline", "a2c", "gae")),
          ("several steps on the same samples, or a long one",
           ("gae", "importance", "clip", "kl_penalty", "trpo"))]
STYLES = ("-", "--", "-.", ":", (0, (1, 3)))


@report.optional
def draw_ladder(log, cfg, best, path):
    """What every rung earned, rewards summed over a response, against the responses sampled"""
    panels = PANELS if cfg.rung == "all" else [(cfg.rung, (cfg.rung,))]
    colours = dict(zip(LADDER, report.COLOURS + report.COLOURS))         # a rung's, in every panel
    figure, axes = report.subplots(1, len(panels), figsize=(4.4 * len(panels), 4.0), sharey=True,
                                   squeeze=False)
    for axis, (heading, names) in zip(axes.flat, panels):
        for rung, style in zip(names, STYLES):
            earned = report.smooth([line["objective"] for line in log if line["rung"] == rung])
            responses = [cfg.batch_size * i for i in range(len(earned))]
            axis.plot(responses, earned, linestyle=style, color=colours[rung], linewidth=1.6,
                      label=rung)
        if best is not None:
            axis.axhline(best, color="0.4", linewidth=0.8)
            axis.annotate("J*, the most possible (estimate)", (1, best), ha="right", fontsize=8,
                          xycoords=("axes fraction", "data"), xytext=(-3, 3),
                          textcoords="offset points")
            axis.set_ylim(top=best + 0.1 * abs(best))
        axis.set(title=heading, xlabel="responses sampled")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right")
    axes[0, 0].set_ylabel(f"score - {cfg.beta:g} KL (mean over five updates)")
    figure.tight_layout()
    return report.save_figure(figure, path)


@report.optional
def draw_variance(noise, cfg, path):
    """The variance of every rung's gradient, and what the rung changed, with 95 % intervals"""
    figure, axes = report.subplots(1, 2, figsize=(11, 4.2))
    kinds = [("", 0.0, "o", "at the policy that sampled"),
             (", later", 0.2, "s", "an update later, on the same samples")]
    for axis, quantity in zip(axes, ("variance", "change")):
        for (suffix, shift, marker, label), colour in zip(kinds, report.COLOURS):
            rungs = [rung for rung in LADDER if rung + suffix in noise]
            places = [LADDER.index(rung) + shift for rung in rungs]
            values = [noise[rung + suffix][quantity] for rung in rungs]
            errors = [1.96 * noise[rung + suffix][f"{quantity}_error"] for rung in rungs]
            axis.errorbar(places, values, yerr=errors, fmt=marker, color=colour, capsize=3,
                          markersize=5, linewidth=1.2, label=label)
        axis.set_xticks(range(len(LADDER)), LADDER, rotation=30, ha="right", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=f"variance of the gradient of {cfg.variance_rows} responses", ylim=(0, None))
    axes[1].set(ylabel="change from the rung before, same samples")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    return report.save_figure(figure, path)


TRY = "try a lower --critic_lr, --beta or --score_clip, with a different --out"      # if not finite


def check(cfg):
    """Exit, before any work, on settings that cannot work."""
    data.check_minibatch(cfg)
    check_reward(cfg)
    if cfg.fisher_rows > cfg.batch_size:
        stop(f"--fisher_rows {cfg.fisher_rows} is more than --batch_size {cfg.batch_size}; lower "
             "it to that or less")
    if cfg.dtype == "float16":
        stop("--dtype float16 needs scaled losses, but TRPO's steps here are not; use bfloat16")
    if cfg.lora_rank:
        stop(f"--lora_rank {cfg.lora_rank} has no use here: the ladder compares gradients of all "
             "weights; leave it out, or use LoRA with ppo.py, grpo.py or dpo.py")
    if cfg.rung == "all" and cfg.batch_size % (4 * cfg.variance_rows):
        stop(f"--batch_size {cfg.batch_size} is not a multiple of 4 times --variance_rows "
             f"{cfg.variance_rows}: the variance is taken over pairs of such batches")


def compare_rungs(policies, reward, tokenizer, prompts, cfg):
    """Every rung's policy on the same prompts, the SFT policy first -> text, results"""
    samples = collect(policies, reward, tokenizer, prompts, [cfg.n_samples] * len(policies), cfg)
    known = [] if samples.gold is None else ["gold"]
    shown = ["score", *known, "kl_ref", "objective"]
    rows = [[f"{cfg.n_eval} held-out prompts x {cfg.n_samples}", *shown, "fraction of optimum"]]
    results = {}
    for name in samples.names:
        means, _ = measure(samples, name)
        means["objective"] = means["score"] - cfg.beta * means["kl_ref"]
        limit = {"fraction": None}
        if cfg.beta:
            limit = fraction_of_optimum(samples, name, cfg.beta)
            limit["best_objective"] = limit.pop("objective")
        results[name] = means | limit
        fraction = ""
        if limit["fraction"] is not None:
            doubt = "" if limit["optimum_trusted"] else "*"
            fraction = f"{limit['fraction']:.3f} ±{limit['standard_error']:.3f}{doubt}"
        rows.append([name, *(means[metric] for metric in shown), fraction])
    note = ("*: too few effective samples to know the optimum well. The objective is score - "
            f"{cfg.beta:g} KL; its optimum is an estimate, if anything too low.")
    return f"{report.table(rows)}\n\n{note}", results


@self_contained
def main(cfg):
    run = Run(cfg, "policy_gradient", sft.export)
    if run.finished:
        return run.show()
    check(cfg)
    sft_folder = ensure(cfg, sft, init=cfg.init)
    actor, tokenizer = sft.load_policy(sft_folder, run.device, **cfg.compute_options())
    train_prompts, eval_prompts = data.prompts(cfg, tokenizer, actor.config.block_size, cfg.n_eval)
    reward = load_reward(cfg, actor, tokenizer, train_prompts, run.device)
    run.begin()
    sources = run.sources(tokenizer, actor, data=train_prompts)
    reference = copy.deepcopy(actor).requires_grad_(False)
    trunk = reward.model or actor
    critic = ScalarGPT(trunk.config, init_from=trunk, zero_head=True).to(run.device).eval()
    first_critic = copy.deepcopy(critic).requires_grad_(False)
    rungs = LADDER if cfg.rung == "all" else (cfg.rung,)
    policies = {rung: copy.deepcopy(actor).cpu() for rung in rungs}          # where each rung ended
    probe = torch.nn.ModuleDict({"actor": copy.deepcopy(actor), "critic": copy.deepcopy(critic),
                                 "moved": copy.deepcopy(actor)})             # an update later
    adam = dict(betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=cfg.lr, **adam)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=cfg.critic_lr, **adam)
    penalty = ppo.ThresholdKL(cfg.kl_penalty_coef, cfg.kl_old_target)
    state = dict(actor=actor, critic=critic, optimizer=optimizer, critic_optimizer=critic_optimizer,
                 penalty=penalty, probe=probe, reward=reward, gpt=asdict(actor.config), **sources)
    for rung, policy in policies.items():
        state[f"policy_{rung}"] = policy

    def new_rollout(actor, critic):
        prompts = data.draw(train_prompts, cfg.batch_size, run.generator)
        return sample_rollout(actor, critic, reference, reward, tokenizer, prompts, cfg,
                              run.generator)

    for step in run.steps(run.restore(**state), len(rungs) * cfg.steps):
        rung = rungs[step // cfg.steps]
        update = step % cfg.steps
        if update == 0:              # every rung starts from the same models and random numbers
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

        # ---- 1. roll out
        rollout = new_rollout(actor, critic)
        mask = rollout["mask"]                                               # (B, T)
        run.must_be_finite(REWARD_HINT, scores=rollout["scores"])
        run.must_be_finite(TRY, kl_ref=rollout["kl_ref"], values=rollout["values"],
                           rewards=rollout["rewards"])
        check_kl_ref(rollout["kl_ref"], cfg, first=update == 0)
        run.lap("rollout")

        # ---- 2. climb
        lr_factor = learning_rate(update, cfg.steps, 1.0, cfg.warmup, cfg.lr_floor)
        set_learning_rate(optimizer, lr_factor * cfg.lr)
        set_learning_rate(critic_optimizer, lr_factor * cfg.critic_lr)
        order = torch.randperm(cfg.batch_size, generator=run.generator)
        if rung == "trpo":                   # a step's KL grows with the square of its length
            metrics = climb_by_trpo(actor, rollout, order, cfg, lr_factor ** 2 * cfg.max_kl, run)
        else:
            metrics = climb(rung, actor, optimizer, rollout, order, cfg, penalty.coef, run)
        train_critic(critic, critic_optimizer, rollout, order, cfg, run)
        rows = select(rollout, order[:cfg.minibatch_size])
        with torch.no_grad():
            k3 = ppo.kl_estimate(rows["old_logprobs"], logprobs_of(actor, rows, cfg), "k3")
            kl_old = masked_mean(k3, rows["mask"])                           # 0-d
        run.must_be_finite(kl_old=kl_old)
        if rung == "kl_penalty":
            metrics["kl_penalty_coef"] = penalty.coef            # the value that this update used
            penalty.update(kl_old.item())
        run.lap("update")

        # ---- 3. log
        metrics |= {
            "rung": rung, "score": rollout["scores"].mean(), "kl_ref": rollout["kl_ref"].mean(),
            "objective": rollout["rewards"].sum(dim=1).mean(), "kl_old": kl_old,
            "entropy": masked_mean(rollout["entropy"], mask),
            "explained_variance": ppo.explained_variance(
                rollout["values"], rollout["returns"], mask),
            "response_length": mask.sum(dim=1).mean(),
            "eos_rate": rollout["finished"].float().mean(), "lr": lr_factor * cfg.lr}
        metrics |= true_utility(cfg, tokenizer, rollout["inputs"], rollout["targets"], mask)
        run.log(step, metrics, ["score", "gold", "kl_ref", "objective", "kl_old", "entropy",
                                "explained_variance", "response_length"])
        if update + 1 == cfg.steps:
            policies[rung].load_state_dict(actor.state_dict())
        run.checkpoint(step + 1)

    # ---- 4. variance
    noise = {}
    if cfg.rung == "all":
        rollouts = [new_rollout(probe["actor"], probe["critic"])
                    for _ in range(cfg.variance_rollouts)]
        noise = measure_variance(probe["actor"], probe["moved"], rollouts, cfg)

    # ---- 5. compare
    policies = {rung: policy.to(run.device) for rung, policy in policies.items()}
    policies = {"SFT": reference} | policies
    text, results = compare_rungs(policies, reward, tokenizer, eval_prompts, cfg)
    log = read_lines(run.folder / "log.jsonl")
    best = results["SFT"].get("best_objective")
    pictures = [draw_ladder(log, cfg, best, run.folder / "ladder.png")]
    if noise:
        text = f"{noise_table(noise, cfg)}\n\n{text}"
        results["noise"] = noise
        pictures.append(draw_variance(noise, cfg, run.folder / "variance.png"))
    text += f"\n\npictures    {', '.join(map(str, pictures))}"
    return run.finish(text, results,
                      then=f"evaluate --runs {run.folder.parent.name}/policy_gradient")


if __name__ == "__main__":
    launch(main, Config, __doc__)
