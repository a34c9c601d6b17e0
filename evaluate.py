"""
Where did each policy land, and how good could it have been?

    1. policies     every finished PPO, DPO, GRPO, .. stage in out/ that started from the same SFT
                    policy and was trained for the same reward model; or those of --runs A,B/ppo.
                    The rungs of a whole ladder only if named, as in --runs A/policy_gradient: every
                    policy weighs every sample, so twice as many take four times as long
    2. samples      of all of them to the same held-out prompts, with rewards and log-probabilities
    3. the limit    J*(beta) = beta E_x log E_{y ~ pi_ref} exp(r / beta) and the frontier of E[r]
                    against KL, which no policy can pass, for the reward model and for the true
                    utility (frontier.py has the formulas)
    4. best of n    from the reference's samples, at log n - (n - 1) / n nats or less
    5. landed       each policy's score, gold, KL, its share of the frontier, and at a fixed beta
                    the fraction of the optimum: (J - J_ref) / (J* - J_ref)
    6. win rates    of every policy against every other, by gold and by score, and Elo ratings
    7. samples      side by side
    8. over-optimisation, with --overoptimise: a policy trained with next to no KL penalty for a
                    weak reward model. Score and gold against the root of KL (Gao et al. 2022)

    python evaluate.py --config small
        -> out/small/evaluate: report.md, frontier.png, results.json; a second time it replaces them
"""

import functools
import math
from dataclasses import asdict, dataclass, replace

import torch

import data
import frontier
import ppo
import reward_model as rm
import sft
from compare import collect, fraction_of_optimum, measure, misfit, share_of_frontier
from lab import files, report
from lab.config import folder_of, nearest, run_name
from lab.run import Run, Stopped, ensure, launch, self_contained, stop, stored_config
from presets import presets_of
from reward import Rewarded, check_reward, load_reward


@dataclass
class Config(Rewarded):              # Rewarded adds --reward, to measure by
    runs: str = ""                  # runs or stages to evaluate, as in A,B/ppo; default: all
    n_eval: int = 32                # held-out prompts
    n_reference: int = 256          # the reference's responses to each; best of n goes up to it
    n_samples: int = 128            # responses of every other policy to each
    temperature: float = 1.0        # sampling temperature of every policy
    n_shown: int = 4                # prompts to show samples of
    overoptimise: bool = False      # also train an over-optimised policy and draw how it goes wrong
    weak_rankings: int = 64         # over-optimisation: training rankings of the weak reward model
    weak_beta: float = 0.005        # over-optimisation: KL strength
    weak_steps: int = 60            # over-optimisation: updates of PPO
    presets = presets_of("evaluate")


# --------------------------------------------------------------------------------------------------
# The maths

def win_rate(ours, theirs):
    """
    P(ours > theirs) + P(tie) / 2 for responses to one prompt: (P, n), (P, m) -> rate, its error

    All n m pairs of each prompt count. The error is a standard error over prompts.
    """
    better = (ours[:, :, None] > theirs[:, None, :]).double()                # (P, n, m)
    equal = (ours[:, :, None] == theirs[:, None, :]).double()
    by_prompt = (better + 0.5 * equal).mean(dim=(1, 2))                      # (P,)
    error = by_prompt.std(correction=0).item() / max(1, len(by_prompt) - 1) ** 0.5
    return by_prompt.mean().item(), error


def elo_fit(wins, anchor=1000.0, rounds=100_000):
    """
    Elo ratings of maximum likelihood: P(i beats j) = 1 / (1 + 10^((R_j - R_i) / 400)), R_0 = anchor

    wins (K, K) counts i's wins over j, a draw as half to both. Bradley-Terry by minorisation
    (Hunter 2004): s_i <- sum_j w_ij / sum_j n_ij / (s_i + s_j), R = 400 log10 s. Each pair also
    gets one virtual draw; without it a player who never lost would be rated infinite.

    >>> [round(r) for r in elo_fit(torch.tensor([[0.0, 1.0], [3.0, 0.0]])).tolist()]    # 1.5 to 3.5
    [1000, 1147]
    """
    K = len(wins)
    one = torch.eye(K, dtype=torch.float64, device=wins.device)
    wins = wins.double() + 0.5 * (1 - one)
    wins = wins - torch.diag(wins.diag())
    games = wins + wins.T
    strength = torch.ones(K, dtype=torch.float64, device=wins.device)
    for _ in range(rounds):
        if K == 1:                                       # there are no games
            break
        before = strength
        strength = wins.sum(1) / (games / (before[:, None] + before[None])).sum(1)
        strength = strength / strength[0]
        if (strength / before).log().abs().max() < 1e-12:
            break
    return anchor + 400 * torch.log10(strength)


def distinct(texts, n=2):
    """Share of distinct n-grams among all word n-grams of the texts"""
    grams = []
    for text in texts:
        words = text.split()
        grams += [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


# --------------------------------------------------------------------------------------------------
# What to evaluate

def runs_folder(cfg):
    """The folder that this run and those it is compared with are in, out/ by default"""
    return folder_of(run_name(cfg)).parent


def finished_stages(cfg):
    """Folders of finished stages beside this run, and the names in --runs, all of them known"""
    runs_in = runs_folder(cfg)
    folders = sorted(path.parent for path in runs_in.glob("*/*/report.txt")
                     if (path.parent / "checkpoint.pt").exists())
    wanted = [name.strip() for name in cfg.runs.split(",") if name.strip()]
    runs = {folder.parent.name for folder in folders}
    known = runs | {f"{folder.parent.name}/{folder.name}" for folder in folders}
    for run in wanted:
        if run not in known:
            stop(f"--runs names {run}, but {runs_in}/{run} has no finished stage"
                 f"{nearest(run, known)}; there are: {', '.join(sorted(runs))}")
    return folders, wanted


def find_policies(cfg, reference, reward, device):
    """
    {run/stage: (GPT, its config)} of finished stages with policies, trained from this SFT policy

    One that cannot be used is left out by name, unless --runs asks for it.
    """
    found = {}
    folders, wanted = finished_stages(cfg)
    runs_in = runs_folder(cfg)
    for path in sorted(runs_in.glob("*/*/checkpoint.pt")):
        if path.parent not in folders:
            print(f"leaving out {path.parent.relative_to(runs_in)}: it is not finished")
    sft_id = files.fingerprint(reference)
    for folder in folders:
        name = f"{folder.parent.name}/{folder.name}"
        earlier = folder.name in ("sft", "reward_model", "evaluate") or folder.suffix == ".old"
        named = folder.parent.name in wanted or name in wanted
        if earlier or (wanted and not named):
            continue
        try:
            policies, why_not = policies_of(folder, sft_id, reward, name in wanted, device, cfg)
        except Stopped as error:                         # damaged, or from a different version
            if named:
                raise
            policies, why_not = {}, error
        if why_not:
            print(f"leaving out {name}: {why_not}")
        found |= policies
    return found


def policies_of(folder, sft_id, reward, whole_ladder, device, cfg):
    """-> {run/stage: (GPT, its config)} of a finished stage; {} and the reason if it is left out"""
    saved = files.load_checkpoint(folder)
    keys = sft.policies_in(saved)
    if not keys or not {"sft", "reward"} <= saved.keys():
        return {}, "its checkpoint is not that of a stage trained for a reward"
    if saved["sft"] != sft_id:
        return {}, "it started from a different SFT policy"
    if not reward.matches(saved["reward"]):
        return {}, "it was trained for a different reward"
    name = f"{folder.parent.name}/{folder.name}"
    if folder.name == "policy_gradient" and len(keys) > 1 and not whole_ladder:
        return {}, f"it has {len(keys)} policies; to include them, name it: --runs {name}"
    config = asdict(Rewarded()) | stored_config(folder)  # an older version may have lacked a field
    policies = {}
    for key in keys:
        policy, _ = sft.load_policy(folder, device, key, saved, **cfg.compute_options())
        policies[sft.policy_name(name, key)] = policy, config
    return policies, None


def own_objective(config, samples, annotator_temperature, cfg):
    """
    What a run maximised -> its reward (P, N), its beta, and whether E[r] - beta KL is its objective

    None if its reward, or the distribution it was trained on, is not what is measured here.
    """
    same = ("missing_eos_score", "score_clip", "max_new_tokens", "data", "max_prompt_tokens",
            "text_prompt")
    if config.get("labels") != "annotators" and any(config[k] != getattr(cfg, k) for k in same):
        return None
    rewards = samples.scores
    aims_at_optimum = True
    plain = {"temperature": cfg.temperature}             # without any of a method's variants
    if "kl_control" in config:                           # ppo.py
        plain |= dict(kl_control="fixed", gamma=1.0, entropy_coef=0.0, whiten_rewards=False,
                      ptx_coef=0.0)
    elif "rung" in config:                               # policy_gradient.py
        plain |= dict(gamma=1.0)
    elif "kl_in" in config:                              # grpo.py
        baseline = config.get("advantage") != "reinforce" or config.get("normalise") == "fixed"
        aims_at_optimum = config["kl_in"] == "reward" and baseline
    else:                                                # dpo.py, which has no temperature
        plain = dict(loss="sigmoid", label_smoothing=0.0, margin=0.0, length_normalise=False,
                     reference_free=False, nll_coef=0.0)
        if config.get("labels") == "annotators":         # they follow gold, if it is known
            rewards = None if samples.gold is None else samples.gold / annotator_temperature
    # An option that did not exist yet when the run was made was not in use
    variant = any(config.get(k, value) != value for k, value in plain.items())
    if rewards is None or variant or not config.get("beta"):
        return None
    return rewards, config["beta"], aims_at_optimum


# --------------------------------------------------------------------------------------------------
# The tables

def plus_minus(mean, error):
    return f"{mean:.3f} ±{error:.3f}"


def limit_table(samples, rewards, what, betas):
    """The optimum for a reward (P, N) at each beta, with the gold it would earn if that is known"""
    log_weights = samples.log_weights()
    columns, quarter_weights = samples.every_fourth()
    header = [f"beta, for r = {what}", "J*", "by a quarter", "E*[r]", "KL*"]
    if samples.gold is not None:
        header.append("gold there")
    rows = [header + ["effective samples: median", "least"]]
    for beta in betas:
        point = frontier.optimum(rewards, log_weights, beta, samples.gold)
        quarter = frontier.optimum(rewards[:, columns], quarter_weights, beta)["objective"]
        doubt = "" if frontier.trusted(point) else "*"
        moved = "!" if (quarter / point["objective"] - 1).abs() > 0.01 else ""
        row = [f"{beta:g}{doubt}", point["objective"].item(), f"{quarter:.3f}{moved}",
               point["reward"].item(), point["kl"].item()]
        if samples.gold is not None:
            row.append(point["value"].item())
        rows.append(row + [f"{point['ess'].median():.0f}", f"{point['ess'].min():.0f}"])
    return rows


def best_of_sizes(samples):
    """2, 4, 8, .. up to the number of the reference's responses to a prompt"""
    return [2 ** i for i in range(1, samples.counts[0].bit_length())]


def best_of_n_table(samples):
    at = samples.columns(samples.names[0])
    values = {"score": samples.scores[:, at]}
    if samples.gold is not None:
        values["gold"] = samples.gold[:, at]
    rows = [["best of n", *values, "KL at most"]]
    for n in best_of_sizes(samples):
        best = [frontier.best_of_n(values["score"], n, x).item() for x in values.values()]
        rows.append([str(n), *best, frontier.best_of_n_kl(n)])
    return rows


def landed_table(samples, configs, annotator_temperature, cfg):
    """-> table, {policy: results}"""
    plus = ["score", "gold", "kl_ref"]
    plain = ["entropy", "response_length", "eos_rate", "grammatical", "distinct_2"]
    if samples.gold is None:
        plus.remove("gold")
        plain.remove("grammatical")
    rows = [["policy", *plus, *plain, "share of frontier", "beta", "fraction of optimum",
             "misfit on SFT's", "on its own"]]
    results = {}
    n = min(samples.counts)                              # distinct-2 falls with the number of texts
    for name in samples.names:
        means, errors = measure(samples, name)
        at = samples.columns(name).start
        by_prompt = [distinct(texts[at:at + n]) for texts in samples.texts]
        means["distinct_2"] = sum(by_prompt) / len(by_prompt)
        limit = share_of_frontier(samples, name)
        results[name] = means | limit | {"standard_errors": errors}
        share = ""
        if limit["share"] is not None:
            doubt = "" if limit["trusted"] else "*"
            share = f"{limit['share']:.3f}{doubt}"
        row = [name, *(plus_minus(means[k], errors[k]) for k in plus), *(means[k] for k in plain),
               share]
        aim = None
        if name in configs:
            aim = own_objective(configs[name], samples, annotator_temperature, cfg)
        cells, more = optimum_cells(samples, name, aim)
        rows.append(row + cells)
        results[name] |= more
    return rows, results


def optimum_cells(samples, name, aim):
    """How near a policy is to the optimum of what it maximised -> its last cells, results"""
    if aim is None:
        return ["", "", "", ""], {}
    rewards, beta, aims_at_optimum = aim
    reached = fraction_of_optimum(samples, name, beta, rewards)
    if reached["fraction"] is None:
        return ["", "", "", ""], {}
    on_reference = misfit(samples, name, samples.names[0], beta, rewards)
    on_own = misfit(samples, name, name, beta, rewards)
    of_gold = "" if rewards is samples.scores else " (gold)"
    marks = "" if reached["optimum_trusted"] else "*"
    if not aims_at_optimum:
        marks += "~"
    fraction = plus_minus(reached["fraction"], reached["standard_error"])
    more = {"aims_at_optimum": aims_at_optimum, "misfit_on_reference": on_reference,
            "misfit_on_own": on_own}
    return [f"{beta:g}{of_gold}", fraction + marks, on_reference, on_own], reached | more


def win_table(samples, values, what):
    """Win rates of the row's policy over the column's with 95 % intervals, and Elo -> table, Elo"""
    columns = [values[:, samples.columns(name)] for name in samples.names]
    rates = [[win_rate(ours, theirs) for theirs in columns] for ours in columns]
    games = samples.scores.shape[0] * min(samples.counts)
    elo = elo_fit(torch.tensor([[games * rate for rate, _ in row] for row in rates])).tolist()
    rows = [[f"wins by {what}, over", *samples.names, "Elo"]]
    for i, name in enumerate(samples.names):
        cells = [f"{rate:.3f} ±{1.96 * error:.3f}" for rate, error in rates[i]]
        cells[i] = ""                                    # against itself
        rows.append([name, *cells, f"{elo[i]:.0f}"])
    return rows, dict(zip(samples.names, elo))


def side_by_side(samples, n):
    lines = []
    for p, prompt in enumerate(samples.asked[:n]):
        lines += ["", f"**{prompt}**", ""]
        for name in samples.names:
            i = samples.columns(name).start
            gold = "" if samples.gold is None else f", gold {samples.gold[p, i]:.2f}"
            lines.append(f"- `{name}` score {samples.scores[p, i]:.2f}{gold}:{samples.texts[p][i]}")
    return lines


# --------------------------------------------------------------------------------------------------
# The pictures

MARKERS = "osD^vP*X"


@report.optional
def draw_frontier(samples, path):
    """Reward against KL: the frontier, best of n, and where each policy landed -> path"""
    units = {"score": "score (standard deviations of SFT's)", "gold": "true utility, gold"}
    titles = {"score": "what was trained for", "gold": "what was wanted"}
    rewards = {"score": samples.scores}
    if samples.gold is not None:
        rewards["gold"] = samples.gold
    points = {}                                          # {reward: trusted points of its frontier}
    for what, values in rewards.items():
        everything = [frontier.optimum(values, samples.log_weights(), beta, samples.gold)
                      for beta in frontier.BETAS[::4]]
        points[what] = [point for point in reversed(everything) if frontier.trusted(point)]
    best_of = best_of_sizes(samples)
    best_kl = [frontier.best_of_n_kl(n) for n in best_of]
    kls = [point["kl"].item() for curve in points.values() for point in curve]
    widest = 1.1 * max(kls + best_kl)
    at = samples.columns(samples.names[0])
    size = 5.5 * len(rewards), 5.0
    figure, axes = report.subplots(1, len(rewards), figsize=size, squeeze=False)
    for axis, (what, values) in zip(axes[0], rewards.items()):
        start = values[:, at].mean().item()
        lines = [("the best possible", "-", "black", points[what], "reward")]
        if what == "gold":
            lines.append(("gold on the score's frontier", "--", "0.5", points["score"], "value"))
        for label, style, colour, curve, key in lines:
            x = [0.0] + [point["kl"].item() for point in curve]
            y = [start] + [point[key].item() for point in curve]
            axis.plot(x, y, style, color=colour, linewidth=2.0, label=label)
        best = [frontier.best_of_n(samples.scores[:, at], n, values[:, at]).item() for n in best_of]
        axis.plot(best_kl, best, ":", color="0.5", marker=".", linewidth=1.5,
                  label=f"best of n, 2 to {best_of[-1]}")
        labels, beyond = [], []
        for i, name in enumerate(samples.names):
            means, errors = measure(samples, name)
            if means["kl_ref"] > widest:
                beyond.append(f"{name} ({means['kl_ref']:.0f} nats)")
                continue
            colour = report.COLOURS[i % len(report.COLOURS)]
            axis.errorbar(means["kl_ref"], means[what], xerr=1.96 * errors["kl_ref"],
                          yerr=1.96 * errors[what], fmt=MARKERS[i % len(MARKERS)], color=colour,
                          markersize=8, capsize=2, linewidth=1.0)
            labels.append((means[what], means["kl_ref"], name, colour))
        axis.set_title(titles[what], fontsize=13)
        axis.set_xlabel("KL to the reference (nats per response)", fontsize=11)
        axis.set_ylabel(units[what], fontsize=11)
        axis.set_xlim(-0.1, widest)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=10, loc="upper left", frameon=False)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.25 * (high - low))   # room for the legend
        label_points(axis, labels)
        if beyond:
            axis.annotate("\n".join(map(report.no_math, ["off the right edge:", *beyond])),
                          (0.98, 0.62), xycoords="axes fraction", ha="right", fontsize=8)
    figure.tight_layout()
    return report.save_figure(figure, path, dpi=120)


def label_points(axis, labels):
    """Name points (y, x, name, colour) in a column at the lower right, with a thin line to each"""
    gap = min(0.07, 0.5 / len(labels))
    for place, (y, x, name, colour) in enumerate(sorted(labels)):
        line = dict(arrowstyle="-", color=colour, linewidth=0.8, relpos=(0, 0.5), shrinkA=0,
                    shrinkB=5)
        axis.annotate(report.no_math(name), (x, y), xytext=(0.68, 0.05 + gap * place),
                      textcoords="axes fraction", color=colour, fontsize=11, va="center",
                      arrowprops=line)


def overoptimisation(log, gold_mean, gold_std):
    """
    Score and gold against sqrt(KL), in standard deviations of SFT's -> {peak, end, fall}, curves

    The curves are means over five updates: the peak of single ones would be the luckiest.
    """
    root = report.smooth([math.sqrt(max(0.0, line["kl_ref"])) for line in log])
    score = report.smooth([line["score"] for line in log])
    gold = report.smooth([(line["gold"] - gold_mean) / gold_std for line in log])
    peak = gold.index(max(gold))
    found = {"peak_gold": gold[peak], "peak_kl": root[peak] ** 2, "peak_score": score[peak],
             "end_gold": gold[-1], "end_kl": root[-1] ** 2, "end_score": score[-1],
             "fall": gold[peak] - gold[-1]}
    return found, (root, score, gold)


@report.optional
def draw_overoptimisation(root, score, gold, path):
    figure, axis = report.subplots(figsize=(6.4, 4.2))
    axis.plot(root, score, "--", color=report.COLOURS[0], marker="o", markersize=3, linewidth=1.2,
              label="score of the weak reward model")
    axis.plot(root, gold, "-", color=report.COLOURS[1], marker="s", markersize=3, linewidth=1.2,
              label="gold, the true utility")
    peak = gold.index(max(gold))
    axis.annotate("peak", (root[peak], gold[peak]), xytext=(0, 9), textcoords="offset points",
                  ha="center", fontsize=9)
    axis.set(xlabel="square root of the KL to the reference (nats per response)",
             ylabel="standard deviations of SFT's samples above SFT\n(means over five updates)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.tight_layout()
    return report.save_figure(figure, path, dpi=120)


def overoptimise(cfg, sft_run, held_out):
    """Train a weak reward model, and a policy for it with little KL -> log, gold's mean and std"""
    name = f"{run_name(cfg)}-weak"
    shared = dict(config=cfg.config, out=name, base=sft_run, seed=cfg.seed, device=cfg.device,
                  resume=True, overwrite=cfg.overwrite)
    rm.main(rm.Config(n_prompts=cfg.weak_rankings, warmup=2, **shared))
    print()
    ppo.main(ppo.Config(kl_control="fixed", beta=cfg.weak_beta, steps=cfg.weak_steps, kl_bound=1e9,
                        **shared))
    print()
    gold = torch.tensor([ranking["gold"] for ranking in held_out])           # of SFT's samples
    log = files.read_lines(folder_of(name) / "ppo" / "log.jsonl")
    return log, gold.mean().item(), gold.std().item()


# --------------------------------------------------------------------------------------------------
# The report

REPORT = """\
# Where each policy landed: {run}, seed {seed}

{landed}

{n_eval} held-out prompts; {n_reference} responses of SFT and {n_samples} of each other policy to
every prompt; ± is one standard error. Share of frontier: gain in score over the greatest gain
possible at that KL. Fraction of optimum: (J - J_ref) / (J* - J_ref), J = E[r] - beta KL, for runs
with a fixed beta. {about_gold}Misfit: standard deviation within a prompt of
r - beta log pi / pi_ref, which is 0 at the optimum, on SFT's samples and on the policy's own.
*: fewer than {median_ess} effective samples at the median prompt or {least_ess} at the least.
~: the run itself maximises something else (GRPO with the KL in the loss).

![frontier](frontier.png)

## The limit

{limits}

J* is an upper bound on E[r] - beta KL for every policy. Its estimate is too low on average, by
about a third of what it drops if only a quarter of the samples is used. !: with a quarter it
changes by more than 1 %. Then raise --n_samples, or evaluate a policy nearer to that optimum too.

## Best of n

{best_of_n}

Samples of SFT, the best by score; the KL is an upper bound.

## Win rates

{wins}

All pairs of responses to one prompt; ± is a 95 % interval over prompts. Elo: SFT is 1000.

## Samples
{samples}"""

OVEROPTIMISATION = """

## Over-optimisation

![over-optimisation](overoptimisation.png)

PPO at beta {beta:g} for a reward model of {rankings} rankings. Gold peaks {peak_gold:+.2f} standard
deviations above SFT at {peak_kl:.1f} nats and ends at {end_gold:+.2f} at {end_kl:.1f} nats: a fall
of {fall:.2f}, while the score goes from {peak_score:.2f} to {end_score:.2f}."""


def check(cfg):
    """Exit, before any work, on settings that cannot work."""
    check_reward(cfg)
    if cfg.n_reference < 2:
        stop(f"--n_reference got {cfg.n_reference}; best of n takes at least 2 responses")
    if cfg.overoptimise:
        if cfg.data != "reviews" or cfg.reward != "reward_model":
            stop("--overoptimise shows what a weak reward model does to the true utility, which "
                 "only the built-in task knows; it takes --data reviews and --reward reward_model")
        batch = rm.Config(config=cfg.config).batch_size
        if cfg.weak_rankings < batch:
            stop(f"--weak_rankings {cfg.weak_rankings} is less than one batch of {batch} rankings; "
                 "raise it")
    finished_stages(cfg)                                 # those of --runs must be among them


@self_contained
def main(cfg):
    run = Run(replace(cfg, overwrite=True), "evaluate")          # always anew
    device = run.device
    check(cfg)
    sft_folder = ensure(cfg, sft)
    reference, tokenizer = sft.load_policy(sft_folder, device, **cfg.compute_options())
    block_size = reference.config.block_size
    train_prompts, prompts = data.prompts(cfg, tokenizer, block_size, cfg.n_eval)
    reward = load_reward(cfg, reference, tokenizer, train_prompts, device)
    known = cfg.data == "reviews"                                # the true utility
    temperature = rm.Config.annotator_temperature
    if known and cfg.reward == "reward_model":
        rm_folder = ensure(cfg, rm)
        temperature = stored_config(rm_folder)["annotator_temperature"]

    # ---- 1. policies
    found = find_policies(cfg, reference, reward, device)
    policies = {"SFT": reference} | {name: policy for name, (policy, _) in found.items()}
    configs = {name: config for name, (_, config) in found.items()}
    if found:
        print(f"evaluating {', '.join(policies)}")
    else:
        print("found no policy to evaluate: this is the limit only, from the SFT policy's samples")
    if cfg.overoptimise:
        _, held_out = rm.read_comparisons(rm_folder)
        fall, curves = overoptimisation(*overoptimise(cfg, sft_folder.parent.name, held_out))
    run.begin()

    # ---- 2. samples
    counts = [cfg.n_reference] + [cfg.n_samples for _ in found]
    samples = collect(policies, reward, tokenizer, prompts, counts, cfg)

    # ---- 3. the limit
    betas = {1.0, 0.5, 0.25, 0.1}
    for config in configs.values():
        if config.get("kl_control", "fixed") == "fixed" and config.get("beta"):
            betas.add(config["beta"])
    betas = sorted(betas, reverse=True)
    limits = [limit_table(samples, samples.scores, "score", betas)]
    if known:
        what = f"gold / {temperature:g}"
        limits.append(limit_table(samples, samples.gold / temperature, what, betas))

    # ---- 4. best of n, 5. landed, 6. win rates
    best_of_n = best_of_n_table(samples)
    landed, results = landed_table(samples, configs, temperature, cfg)
    wins = {}
    if known:
        wins["gold"] = win_table(samples, samples.gold, "gold")
    wins["score"] = win_table(samples, samples.scores, "score")
    for what, (_, elo) in wins.items():
        for name in samples.names:
            results[name][f"elo_by_{what}"] = elo[name]

    # ---- 7. samples, and the report
    draw_frontier(samples, run.folder / "frontier.png")
    table = functools.partial(report.table, markdown=True)
    about_gold = ""
    if known:
        about_gold = f"(gold): r = gold / {temperature:g}, which the annotators' labels follow. "
    text = REPORT.format(
        run=run.folder.parent.name, seed=cfg.seed, n_eval=cfg.n_eval, n_reference=cfg.n_reference,
        n_samples=cfg.n_samples, about_gold=about_gold, median_ess=frontier.MEDIAN_ESS,
        least_ess=frontier.LEAST_ESS, landed=table(landed), limits="\n\n".join(map(table, limits)),
        best_of_n=table(best_of_n), wins="\n\n".join(table(rows) for rows, _ in wins.values()),
        samples="\n".join(side_by_side(samples, cfg.n_shown)))

    # ---- 8. over-optimisation
    if cfg.overoptimise:
        draw_overoptimisation(*curves, run.folder / "overoptimisation.png")
        results["overoptimisation"] = fall
        text += OVEROPTIMISATION.format(beta=cfg.weak_beta, rankings=cfg.weak_rankings, **fall)
    files.write(run.folder / "report.md", f"{text}\n\n```text\n{run.made_by()}\n```\n")
    return run.finish(f"{text}\n\nreport      {run.folder}/report.md", results)


if __name__ == "__main__":
    launch(main, Config, __doc__)
