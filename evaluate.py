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


def elo_fit(wins):
    """
    Elo ratings of maximum likelihood: P(i beats j) = 1 / (1 + 10^((R_j - R_i) / 400)), R_0 = 1000

    wins (K, K) counts i's wins over j, a draw as half to both. Bradley-Terry by minorisation
    (Hunter 2004): s_i <- sum_j w_ij / sum_j n_ij / (s_i + s_j), R = 400 log10 s. Each pair also
    gets one virtual draw; without it a player who never lost would be rated infinite.

    >>> [round(r) for r in elo_fit(torch.tensor([[0.0, 1.0], [3.0, 0.0]])).tolist()]    # 1.5 to 3.5
    [1000, 1147]
    """
    K = len(wins)
    others = 1 - torch.eye(K, dtype=torch.float64, device=wins.device)
    wins = (wins.double() + 0.5) * others                # no games against oneself
    games = wins + wins.T
    strength = torch.ones_like(wins[0])
    for _ in range(100_000):
        if K == 1:                                       # there are no games
            break
        before = strength
        strength = wins.sum(1) / (games / (before[:, None] + before[None])).sum(1)
        strength = strength / strength[0]
        if (strength / before).log().abs().max() < 1e-12:
            break
    return 1000 + 400 * torch.log10(strength)


def distinct(texts):
    """Distinct-2: the share of different word pairs among all word pairs of the texts"""
    pairs = []
    for text in texts:
        words = text.split()
        pairs += zip(words, words[1:])
    return len(set(pairs)) / max(1, len(pairs))


# --------------------------------------------------------------------------------------------------
# What to evaluate

def stages_beside(cfg):
    """
    -> {run/stage: folder} of the stages in out/ that --runs names, or of all; the names in --runs

    Exit if --runs names something that has no finished stage.
    """
    runs_in = folder_of(run_name(cfg)).parent
    folders = [path.parent for path in sorted(runs_in.glob("*/*/checkpoint.pt"))]
    stages = {f"{folder.parent.name}/{folder.name}": folder for folder in folders}
    finished = {name for name, folder in stages.items() if (folder / "report.txt").exists()}
    runs = {stages[name].parent.name for name in finished}
    wanted = [name.strip() for name in cfg.runs.split(",") if name.strip()]
    for name in wanted:
        if name not in runs | finished:
            stop(f"--runs names {name}, but {runs_in}/{name} has no finished stage"
                 f"{nearest(name, runs | finished)}; there are: {', '.join(sorted(runs))}")
    if wanted:
        stages = {name: folder for name, folder in stages.items()
                  if name in wanted or folder.parent.name in wanted}
    return stages, wanted


def find_policies(cfg, reference, reward, device):
    """
    {run/stage: (GPT, its config)} of finished stages with policies, trained from this SFT policy

    One that cannot be used is left out by name. A damaged one that --runs names is an error.
    """
    sft_id = files.fingerprint(reference)
    stages, wanted = stages_beside(cfg)
    found = {}
    for name, folder in stages.items():
        if folder.name in ("sft", "reward_model") or folder.suffix == ".old":
            continue
        try:
            policies, why_not = policies_of(name, folder, sft_id, reward, wanted, device, cfg)
        except Stopped as error:                         # damaged, or from a different version
            if wanted:
                raise
            policies, why_not = {}, error
        if why_not:
            print(f"leaving out {name}: {why_not}")
        found |= policies
    return found


def policies_of(name, folder, sft_id, reward, wanted, device, cfg):
    """-> {run/stage: (GPT, its config)} of one stage; {} and the reason if it is left out"""
    if not (folder / "report.txt").exists():
        return {}, "it is not finished"
    saved = files.load_checkpoint(folder)
    keys = sft.policies_in(saved)
    if not keys or not {"sft", "reward"} <= saved.keys():
        return {}, "its checkpoint is not that of a stage trained for a reward"
    if saved["sft"] != sft_id:
        return {}, "it started from a different SFT policy"
    if not reward.matches(saved["reward"]):
        return {}, "it was trained for a different reward"
    if folder.name == "policy_gradient" and len(keys) > 1 and name not in wanted:
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


def doubt(trusted):
    """The mark of an estimate from too few effective samples"""
    return "" if trusted else "*"


def rows_of(records):
    """Dicts {heading: cell} -> rows for report.table; a cell that a dict lacks stays empty"""
    headings = list(dict.fromkeys(heading for record in records for heading in record))
    return [headings] + [[record.get(heading, "") for heading in headings] for record in records]


def limit_table(samples, rewards, what, betas):
    """The optimum for a reward (P, N) at each beta, with the gold it would earn if that is known"""
    log_weights = samples.log_weights()
    columns, quarter_weights = samples.every_fourth()
    records = []
    for beta in betas:
        point = frontier.optimum(rewards, log_weights, beta, samples.gold)
        quarter = frontier.optimum(rewards[:, columns], quarter_weights, beta)["objective"]
        moved = "!" if (quarter / point["objective"] - 1).abs() > 0.01 else ""
        record = {f"beta, for r = {what}": f"{beta:g}{doubt(frontier.trusted(point))}",
                  "J*": point["objective"].item(), "by a quarter": f"{quarter:.3f}{moved}",
                  "E*[r]": point["reward"].item(), "KL*": point["kl"].item()}
        if samples.gold is not None:
            record["gold there"] = point["value"].item()
        record["effective samples: median"] = f"{point['ess'].median():.0f}"
        record["least"] = f"{point['ess'].min():.0f}"
        records.append(record)
    return rows_of(records)


def best_of_n_records(samples):
    """The best by score of n = 2, 4, 8, .. responses of the reference -> dicts {heading: cell}"""
    at = samples.columns(samples.names[0])
    records = []
    for n in [2 ** i for i in range(1, samples.counts[0].bit_length())]:
        record = {"best of n": str(n)}
        for what, values in samples.rewards().items():
            record[what] = frontier.best_of_n(samples.scores[:, at], n, values[:, at]).item()
        records.append(record | {"KL at most": frontier.best_of_n_kl(n)})
    return records


def landed_table(samples, aims):
    """-> table, {policy: results}. aims are what own_objective says of each trained policy."""
    n = min(samples.counts)                              # distinct-2 falls with the number of texts
    records, results = [], {}
    for name in samples.names:
        means, errors = measure(samples, name)
        at = samples.columns(name).start
        by_prompt = [distinct(texts[at:at + n]) for texts in samples.texts]
        means["distinct_2"] = sum(by_prompt) / len(by_prompt)
        limit = share_of_frontier(samples, name)
        cells, reached = optimum_cells(samples, name, aims.get(name))
        results[name] = means | limit | {"standard_errors": errors} | reached

        record = {"policy": name} | means
        for metric in ("kl_ref", *samples.rewards()):
            record[metric] = plus_minus(means[metric], errors[metric])
        record["share of frontier"] = ""
        if limit["share"] is not None:
            record["share of frontier"] = f"{limit['share']:.3f}{doubt(limit['trusted'])}"
        records.append(record | cells)
    return rows_of(records), results


def optimum_cells(samples, name, aim):
    """How near a policy is to the optimum of what it maximised -> {heading: cell}, results"""
    if aim is None:
        return {}, {}
    rewards, beta, aims_at_optimum = aim
    reached = fraction_of_optimum(samples, name, beta, rewards)
    if reached["fraction"] is None:
        return {}, {}
    of_gold = "" if rewards is samples.scores else " (gold)"
    marks = doubt(reached["optimum_trusted"]) + ("" if aims_at_optimum else "~")
    fraction = plus_minus(reached["fraction"], reached["standard_error"])
    on_reference = misfit(samples, name, samples.names[0], beta, rewards)
    on_own = misfit(samples, name, name, beta, rewards)
    cells = {"beta": f"{beta:g}{of_gold}", "fraction of optimum": fraction + marks,
             "misfit on SFT's": on_reference, "on its own": on_own}
    return cells, reached | {"aims_at_optimum": aims_at_optimum,
                             "misfit_on_reference": on_reference, "misfit_on_own": on_own}


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
TITLES = {"score": "what was trained for", "gold": "what was wanted"}
UNITS = {"score": "score (standard deviations of SFT's)", "gold": "true utility, gold"}


@report.optional
def draw_frontier(samples, results, best_of, path):
    """Reward against KL: the frontier, best of n, and where each policy landed -> path"""
    rewards = samples.rewards()
    log_weights = samples.log_weights()
    curves = {}                                          # {reward: trusted points of its frontier}
    for what, values in rewards.items():
        points = [frontier.optimum(values, log_weights, beta, samples.gold)
                  for beta in reversed(frontier.BETAS[::4])]
        curves[what] = [point for point in points if frontier.trusted(point)]
    best_kl = [record["KL at most"] for record in best_of]
    kls = [point["kl"].item() for curve in curves.values() for point in curve]
    widest = 1.1 * max(kls + best_kl)
    figure, axes = report.subplots(1, len(rewards), figsize=(5.5 * len(rewards), 5.0),
                                   squeeze=False)
    for axis, what in zip(axes[0], rewards):
        start = results[samples.names[0]][what]
        lines = [("the best possible", "-", "black", curves[what], "reward")]
        if what == "gold":
            lines.append(("gold on the score's frontier", "--", "0.5", curves["score"], "value"))
        for label, style, colour, curve, key in lines:
            x = [0.0] + [point["kl"].item() for point in curve]
            y = [start] + [point[key].item() for point in curve]
            axis.plot(x, y, style, color=colour, linewidth=2.0, label=label)
        axis.plot(best_kl, [record[what] for record in best_of], ":", color="0.5", marker=".",
                  linewidth=1.5, label=f"best of n, 2 to {best_of[-1]['best of n']}")
        draw_policies(axis, results, what, widest)
        axis.set_title(TITLES[what], fontsize=13)
        axis.set(xlabel="KL to the reference (nats per response)", ylabel=UNITS[what])
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", frameon=False)
    figure.tight_layout()
    return report.save_figure(figure, path, dpi=120)


def draw_policies(axis, results, what, widest):
    """Each policy as a point with 95 % intervals; its name at the lower right, with a thin line"""
    named, beyond = [], ["off the right edge:"]
    for i, (name, found) in enumerate(results.items()):
        x, y = found["kl_ref"], found[what]
        if x > widest:
            beyond.append(f"{name} ({x:.0f} nats)")
            continue
        colour = report.COLOURS[i % len(report.COLOURS)]
        errors = found["standard_errors"]
        axis.errorbar(x, y, xerr=1.96 * errors["kl_ref"], yerr=1.96 * errors[what],
                      fmt=MARKERS[i % len(MARKERS)], color=colour, markersize=8, capsize=2,
                      linewidth=1.0)
        named.append((y, x, name, colour))
    axis.set_xlim(-0.1, widest)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.25 * (high - low))       # room for the legend
    gap = min(0.07, 0.5 / len(named))
    for place, (y, x, name, colour) in enumerate(sorted(named)):
        line = dict(arrowstyle="-", color=colour, linewidth=0.8, relpos=(0, 0.5), shrinkA=0,
                    shrinkB=5)
        axis.annotate(report.no_math(name), (x, y), xytext=(0.68, 0.05 + gap * place),
                      textcoords="axes fraction", color=colour, fontsize=11, va="center",
                      arrowprops=line)
    if len(beyond) > 1:
        axis.annotate(report.no_math("\n".join(beyond)), (0.98, 0.62), xycoords="axes fraction",
                      ha="right", fontsize=8)


@report.optional
def draw_overoptimisation(root, score, gold, path):
    """Score and gold, in standard deviations of SFT's, against the root of KL -> path"""
    figure, axis = report.subplots(figsize=(6.4, 4.2))
    style = dict(markersize=3, linewidth=1.2)
    axis.plot(root, score, "o--", color=report.COLOURS[0], label="score of the weak reward model",
              **style)
    axis.plot(root, gold, "s-", color=report.COLOURS[1], label="gold, the true utility", **style)
    peak = gold.index(max(gold))
    axis.annotate("peak", (root[peak], gold[peak]), xytext=(0, 9), textcoords="offset points",
                  ha="center", fontsize=9)
    axis.set(xlabel="square root of the KL to the reference (nats per response)",
             ylabel="standard deviations of SFT's samples above SFT\n(means over five updates)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.tight_layout()
    return report.save_figure(figure, path, dpi=120)


def overoptimise(cfg, sft_folder, rm_folder):
    """
    Train a policy with little KL for a weak reward model -> {peak, end, fall}, curves

    The curves are sqrt(KL), score and gold in standard deviations of SFT's samples, as means over
    five updates: the peak of single updates would be the luckiest.
    """
    name = f"{run_name(cfg)}-weak"
    shared = dict(config=cfg.config, out=name, base=sft_folder.parent.name, seed=cfg.seed,
                  device=cfg.device, resume=True, overwrite=cfg.overwrite)
    rm.main(rm.Config(n_prompts=cfg.weak_rankings, warmup=2, **shared))
    print()
    ppo.main(ppo.Config(kl_control="fixed", beta=cfg.weak_beta, steps=cfg.weak_steps, kl_bound=1e9,
                        **shared))
    print()
    log = files.read_lines(folder_of(name) / "ppo" / "log.jsonl")
    _, held_out = rm.read_comparisons(rm_folder)
    sft_gold = torch.tensor([ranking["gold"] for ranking in held_out])
    mean, std = sft_gold.mean().item(), sft_gold.std().item()
    root = report.smooth([math.sqrt(max(0.0, line["kl_ref"])) for line in log])
    score = report.smooth([line["score"] for line in log])
    gold = report.smooth([(line["gold"] - mean) / std for line in log])
    peak = gold.index(max(gold))
    found = {}
    for when, at in (("peak", peak), ("end", -1)):
        found |= {f"{when}_gold": gold[at], f"{when}_kl": root[at] ** 2, f"{when}_score": score[at]}
    return found | {"fall": gold[peak] - gold[-1]}, (root, score, gold)


# --------------------------------------------------------------------------------------------------
# The report

REPORT = """\
# Where each policy landed: {run}, seed {seed}

{landed}

{n_eval} held-out prompts; {n_reference} responses of SFT and {n_samples} of each other policy to
every prompt; ± is one standard error. Share of frontier: gain in score over the greatest gain
possible at that KL. Fraction of optimum: (J - J_ref) / (J* - J_ref), J = E[r] - beta KL, for runs
with a fixed beta.{about_gold}
Misfit: standard deviation within a prompt of r - beta log pi / pi_ref, which is 0 at the optimum,
on SFT's samples and on the policy's own.
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
    stages_beside(cfg)                                   # those of --runs must be among them


@self_contained
def main(cfg):
    run = Run(replace(cfg, overwrite=True), "evaluate")          # always anew
    device = run.device
    check(cfg)
    sft_folder = ensure(cfg, sft, init=cfg.init)
    reference, tokenizer = sft.load_policy(sft_folder, device, **cfg.compute_options())
    block_size = reference.config.block_size
    train_prompts, prompts = data.prompts(cfg, tokenizer, block_size, cfg.n_eval)
    reward = load_reward(cfg, reference, tokenizer, train_prompts, device)
    temperature = rm.Config.annotator_temperature
    if cfg.data == "reviews" and reward.folder:
        temperature = stored_config(reward.folder)["annotator_temperature"]

    # ---- 1. policies
    found = find_policies(cfg, reference, reward, device)
    policies = {"SFT": reference} | {name: policy for name, (policy, _) in found.items()}
    configs = {name: config for name, (_, config) in found.items()}
    if found:
        print(f"evaluating {', '.join(policies)}")
    else:
        print("found no policy to evaluate: this is the limit only, from the SFT policy's samples")
    if cfg.overoptimise:
        fall, curves = overoptimise(cfg, sft_folder, reward.folder)
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
    about_gold = ""
    if samples.gold is not None:
        what = f"gold / {temperature:g}"
        limits.append(limit_table(samples, samples.gold / temperature, what, betas))
        about_gold = f"\n(gold): r = {what}, which the annotators' labels follow."

    # ---- 4. best of n, 5. landed, 6. win rates
    best_of = best_of_n_records(samples)
    aims = {name: own_objective(config, samples, temperature, cfg)
            for name, config in configs.items()}
    landed, results = landed_table(samples, aims)
    draw_frontier(samples, results, best_of, run.folder / "frontier.png")
    wins = []
    for what, values in samples.rewards().items():
        rows, elo = win_table(samples, values, what)
        wins.append(rows)
        for name in samples.names:
            results[name][f"elo_by_{what}"] = elo[name]

    # ---- 7. samples, and the report
    table = functools.partial(report.table, markdown=True)
    text = REPORT.format(
        run=run.folder.parent.name, seed=cfg.seed, n_eval=cfg.n_eval, n_reference=cfg.n_reference,
        n_samples=cfg.n_samples, about_gold=about_gold, median_ess=frontier.MEDIAN_ESS,
        least_ess=frontier.LEAST_ESS, landed=table(landed), limits="\n\n".join(map(table, limits)),
        best_of_n=table(rows_of(best_of)), wins="\n\n".join(map(table, wins)),
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
