"""
Where did each policy land, and how good could it have been?

    1. policies     every finished PPO, DPO, GRPO, .. stage in out/ that started from the same SFT policy and
                    was trained for the same reward model; or those of --runs A,B/ppo. The rungs of a
                    whole ladder only if named, as in --runs A/policy_gradient: every policy weighs every
                    sample, so that twice as many take four times as long
    2. samples      of all of them to the same held-out prompts, each scored, each weighed by all
    3. the limit    J*(beta) = beta E_x log E_{y ~ pi_ref} exp(r / beta) and the frontier of E[r] against
                    KL, which no policy can pass, for the reward model and for the true utility
                    (frontier.py has the formulas)
    4. best of n    from the reference's samples, at log n - (n - 1) / n nats or less
    5. landed       each policy's score, gold, KL, its share of the frontier, and where beta was fixed
                    the fraction of the optimum: (J - J_ref) / (J* - J_ref)
    6. win rates    of all against all, by gold and by reward model, and Elo ratings
    7. samples      side by side
    8. over-optimisation, with --overoptimise: a policy trained with next to no KL penalty for a weak
                    reward model. Score and gold against the square root of KL (Gao et al. 2022)

    python evaluate.py --config small
        -> out/small/evaluate: report.md, frontier.png, results.json; a second time it replaces them
"""

import functools
import math
import textwrap
from dataclasses import asdict, dataclass, replace

import torch

import corpus
import experiment
import files
import frontier
import options
import ppo
import reward_model as rm
import scoring
import sft


@dataclass
class Config(scoring.Rewarded):          # which adds --reward, to measure by, and what is done to its scores
    runs: str = ""                  # runs or stages to look at, as in A,B/ppo; by default all in out/
    n_eval: int = 32                # held-out prompts
    n_reference: int = 256          # responses of the reference to each; best of n goes up to that
    n_samples: int = 128            # responses of every other policy to each
    temperature: float = 1.0        # of all of them
    n_shown: int = 4                # prompts to show samples of
    overoptimise: bool = False      # also train the over-optimised policy and draw how it goes wrong
    weak_rankings: int = 64         # for it: rankings that the weak reward model is trained on
    weak_beta: float = 0.005        # for it: KL strength
    weak_steps: int = 60            # for it: updates of PPO


PRESETS = {
    "small": {},
    "tiny": dict(n_eval=6, n_reference=32, n_samples=16, weak_rankings=40, weak_steps=4),
    "gpt2": dict(n_reference=64, n_samples=32),
    "imdb": dict(n_reference=64, n_samples=32, missing_eos_score=None, reward="lvwerra/distilbert-imdb"),
    "tldr": dict(n_reference=64, n_samples=32, missing_eos_score=-1.0, temperature=0.7),
}
Config.presets = PRESETS


# --------------------------------------------------------------------------------------------------
# The maths

def win_rate(ours, theirs):
    """
    P(ours > theirs) + P(tie) / 2 for responses to one prompt: (P, n), (P, m) -> rate, standard error

    All n m pairs of each prompt count; the standard error is that of the mean over prompts.
    """
    wins = (ours[:, :, None] > theirs[:, None, :]).double() + 0.5 * (ours[:, :, None] == theirs[:, None, :])
    by_prompt = wins.mean(dim=(1, 2))                                        # (P,)
    return by_prompt.mean().item(), by_prompt.std(correction=0).item() / max(1, len(wins) - 1) ** 0.5


def elo_fit(wins, anchor=1000.0, rounds=100_000):
    """
    Elo ratings of maximum likelihood: P(i beats j) = 1 / (1 + 10^((R_j - R_i) / 400)), R_0 = anchor

    wins (K, K) counts i's wins over j, a draw as half to both. Bradley-Terry by minorisation (Hunter
    2004): s_i <- sum_j w_ij / sum_j n_ij / (s_i + s_j), R = 400 log10 s. Each pair is given one virtual
    draw besides, without which a player who never lost would be rated infinite.

    >>> [round(r) for r in elo_fit(torch.tensor([[0.0, 1.0], [3.0, 0.0]])).tolist()]     # 1.5 to 3.5
    [1000, 1147]
    """
    K = len(wins)
    wins = wins.double() + 0.5 * (1 - torch.eye(K, dtype=torch.float64, device=wins.device))
    wins = wins - torch.diag(wins.diag())
    games, strength = wins + wins.T, torch.ones(K, dtype=torch.float64, device=wins.device)
    for _ in range(rounds if K > 1 else 0):
        before, strength = strength, wins.sum(1) / (games / (strength[:, None] + strength[None])).sum(1)
        strength = strength / strength[0]
        if (strength / before).log().abs().max() < 1e-12:
            break
    return anchor + 400 * torch.log10(strength)


def distinct(texts, n=2):
    """Share of different ones among the n-grams of words of some texts"""
    grams = [tuple(words[i:i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


# --------------------------------------------------------------------------------------------------
# What to evaluate

def folder_of_runs(cfg):
    """The folder that this run and those it is compared with are in, out/ by default"""
    return options.folder_of(options.run_name(cfg)).parent


def finished_stages(cfg):
    """Folders of finished stages beside this run, and the names in --runs, which must be among them"""
    runs_in = folder_of_runs(cfg)
    folders = sorted(path.parent for path in runs_in.glob("*/*/report.txt")
                     if (path.parent / "checkpoint.pt").exists())
    wanted = [name.strip() for name in cfg.runs.split(",") if name.strip()]
    runs = {folder.parent.name for folder in folders}
    known = runs | {f"{folder.parent.name}/{folder.name}" for folder in folders}
    for run in wanted:
        if run not in known:
            files.stop(f"--runs names {run}, but {runs_in}/{run} has no finished stage"
                       f"{options.nearest(run, known)}; there are: {', '.join(sorted(runs))}")
    return folders, wanted


def find_policies(cfg, reference, reward, device):
    """
    {run/stage: (GPT, its config)} of finished stages with policies, trained from this SFT policy

    One that cannot be used is left out by name, unless --runs asks for it.
    """
    found = {}
    folders, wanted = finished_stages(cfg)
    runs_in = folder_of_runs(cfg)
    for path in sorted(runs_in.glob("*/*/checkpoint.pt")):
        if path.parent not in folders:
            print(f"leaving out {path.parent.relative_to(runs_in)}: it is not finished")
    sft_made = files.fingerprint(reference)
    for folder in folders:
        name = f"{folder.parent.name}/{folder.name}"
        earlier = folder.name in ("sft", "reward_model", "evaluate") or folder.suffix == ".old"
        named = folder.parent.name in wanted or name in wanted
        if earlier or (wanted and not named):
            continue
        try:
            policies, why_not = policies_of(folder, sft_made, reward, name in wanted, device, cfg)
        except files.Stopped as error:                   # damaged, or of a different version
            if named:
                raise
            policies, why_not = {}, error
        if why_not:
            print(f"leaving out {name}: {why_not}")
        found |= policies
    return found


def policies_of(folder, sft_made, reward, whole_ladder, device, cfg):
    """-> {run/stage: (GPT, its config)} of a finished stage; {} and the reason if it is left out"""
    saved = files.load_checkpoint(folder)
    keys = sft.policies_in(saved)
    if not keys or not {"sft", "reward"} <= saved.keys():
        return {}, "its checkpoint is not that of a stage trained for a reward"
    if saved["sft"] != sft_made:
        return {}, "it started from a different SFT policy"
    if not reward.is_that_of(saved["reward"]):
        return {}, "it was trained for a different reward"
    name = f"{folder.parent.name}/{folder.name}"
    if folder.name == "policy_gradient" and len(keys) > 1 and not whole_ladder:
        return {}, f"it has {len(keys)} policies; --runs {name} takes them in"
    # A field that an older version lacked has its default
    config = asdict(scoring.Rewarded()) | experiment.stored_config(folder)
    policies = {}
    for key in keys:
        policy, _ = sft.load_policy(folder, device, key, saved, **cfg.how())
        policies[sft.policy_name(name, key)] = policy, config
    return policies, None


def own_objective(config, samples, annotator_temperature, cfg):
    """
    The (P, N) reward and the beta that a run was given, and whether E[r] - beta KL is what it maximises

    None if that reward or the distribution it was trained on is not what is measured here.
    """
    if config.get("labels") != "annotators" and any(config[k] != getattr(cfg, k) for k in (
            "missing_eos_score", "score_clip", "max_new_tokens", "data", "max_prompt_tokens", "text_prompt")):
        return None                                              # another reward than the one measured, or prompts
    rewards, plain, aims = samples.scores, dict(temperature=cfg.temperature), True
    if "kl_control" in config:                                   # ppo.py
        plain |= dict(kl_control="fixed", gamma=1.0, entropy_coef=0.0, whiten_rewards=False, ptx_coef=0.0)
    elif "rung" in config:                                       # policy_gradient.py
        plain |= dict(gamma=1.0)
    elif "kl_in" in config:                                      # grpo.py
        baseline = config.get("advantage") != "reinforce" or config.get("normalise") == "fixed"
        aims = config["kl_in"] == "reward" and baseline
    else:                                                        # dpo.py
        plain = dict(loss="sigmoid", label_smoothing=0.0, margin=0.0, length_normalise=False,
                     reference_free=False, nll_coef=0.0)
        if config.get("labels") == "annotators":                     # what real ones follow nobody knows
            rewards = None if samples.gold is None else samples.gold / annotator_temperature
    # An option that was unknown when the run was made was not in use
    variant = any(config.get(k, value) != value for k, value in plain.items())
    if rewards is None or variant or not config.get("beta"):
        return None
    return rewards, config["beta"], aims


# --------------------------------------------------------------------------------------------------
# The tables

def plus_minus(mean, error):
    return f"{mean:.3f} ±{error:.3f}"


def limit_table(samples, rewards, what, betas):
    """The optimum for a reward (P, N) at each beta, with the gold that it earns where that is known"""
    log_weights, (columns, quarter_weights) = samples.log_weights(), samples.every_fourth()
    known = samples.gold is not None
    rows = [[f"beta, for r = {what}", "J*", "by a quarter", "E*[r]", "KL*", *["gold there"] * known,
             "effective samples: median", "least"]]
    for beta in betas:
        point = frontier.optimum(rewards, log_weights, beta, samples.gold)
        quarter = frontier.optimum(rewards[:, columns], quarter_weights, beta)["objective"]
        moved = (quarter / point["objective"] - 1).abs() > 0.01
        rows.append([f"{beta:g}" + "*" * (not frontier.trusted(point)), point["objective"].item(),
                     f"{quarter:.3f}" + "!" * bool(moved), point["reward"].item(), point["kl"].item(),
                     *([point["value"].item()] if known else []), f"{point['ess'].median():.0f}",
                     f"{point['ess'].min():.0f}"])
    return rows


def best_of_sizes(samples):
    """2, 4, 8, .. up to the number of the reference's responses to a prompt"""
    return [2 ** i for i in range(1, samples.counts[0].bit_length())]


def best_of_n_table(samples):
    at = samples.columns(samples.names[0])
    values = [samples.scores[:, at]] + ([] if samples.gold is None else [samples.gold[:, at]])
    rows = [["best of n", *["score", "gold"][:len(values)], "KL at most"]]
    for n in best_of_sizes(samples):
        rows.append([str(n), *(frontier.best_of_n(values[0], n, x).item() for x in values), frontier.best_of_n_kl(n)])
    return rows


def landed_table(samples, configs, annotator_temperature, cfg):
    """-> table, {policy: results}"""
    plus, plain = ["score", "gold", "kl_ref"], ["entropy", "response_length", "eos_rate", "grammatical", "distinct_2"]
    if samples.gold is None:
        plus.remove("gold")
        plain.remove("grammatical")
    rows = [["policy", *plus, *plain, "share of frontier", "beta", "fraction of optimum", "misfit on SFT's",
             "on its own"]]
    results = {}
    n = min(samples.counts)                                      # distinct-2 falls with the number
    for name in samples.names:
        means, errors = frontier.measure(samples, name)
        at = samples.columns(name).start
        means["distinct_2"] = sum(distinct(texts[at:at + n]) for texts in samples.texts) / len(samples.texts)
        row = [name, *(plus_minus(means[k], errors[k]) for k in plus), *(means[k] for k in plain)]
        limit, aim = frontier.share_of_frontier(samples, name), None
        if name in configs:
            aim = own_objective(configs[name], samples, annotator_temperature, cfg)
        share = "" if limit["share"] is None else f"{limit['share']:.3f}{'' if limit['trusted'] else '*'}"
        results[name] = means | limit | {"standard_errors": errors}
        reached = aim and frontier.fraction_of_optimum(samples, name, aim[1], aim[0])
        if reached and reached["fraction"] is not None:
            fit = [frontier.misfit(samples, name, on, aim[1], aim[0]) for on in (samples.names[0], name)]
            results[name] |= reached | {"aims_at_optimum": aim[2], "misfit_on_reference": fit[0], "misfit_on_own": fit[1]}
            row += [share, f"{aim[1]:g}" + " (gold)" * (aim[0] is not samples.scores),
                    plus_minus(reached["fraction"], reached["standard_error"])
                    + "*" * (not reached["optimum_trusted"]) + "~" * (not aim[2]), *fit]
        else:
            row += [share, "", "", "", ""]
        rows.append(row)
    return rows, results


def win_table(samples, values, what):
    """Win rates of the row's policy over the column's, with 95 % intervals, and Elo -> table, ratings"""
    columns = [values[:, samples.columns(name)] for name in samples.names]
    K, games = len(columns), samples.scores.shape[0] * min(samples.counts)
    rates = [[win_rate(ours, theirs) for theirs in columns] for ours in columns]
    wins = torch.tensor([[games * rate for rate, _ in row] for row in rates])
    elo = elo_fit(wins).tolist()
    rows = [[f"wins by {what}, over", *samples.names, "Elo"]]
    for i, name in enumerate(samples.names):
        cells = ["" if i == j else f"{rates[i][j][0]:.3f} ±{1.96 * rates[i][j][1]:.3f}" for j in range(K)]
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
# The pictures: black, white and grey are enough to read them

MARKERS = "os^DvP*Xd<>ph8"


@experiment.optional
def draw_frontier(samples, path):
    log_weights, at = samples.log_weights(), samples.columns(samples.names[0])
    rows = -(-(3 + len(samples.names)) // 3)                     # of the legend
    height = 4.2 + 0.2 * rows                                    # inches
    rewards = {"scores": "score (standard deviations of SFT's)", "gold": "true utility, gold"}
    if samples.gold is None:
        rewards.pop("gold")
    size = 5.5 * len(rewards), height
    figure, axes = experiment.subplots(1, len(rewards), figsize=size, squeeze=False)
    axes = axes[0]
    best_of = best_of_sizes(samples)
    best_kl = [frontier.best_of_n_kl(n) for n in best_of]
    points = {}                                                  # reward: trusted points of its frontier
    for reward in rewards:
        all_points = [frontier.optimum(getattr(samples, reward), log_weights, beta, samples.gold)
                      for beta in frontier.BETAS[::4]]
        points[reward] = [p for p in all_points if frontier.trusted(p)]
    widest = 1.1 * max([p["kl"].item() for reward in points.values() for p in reward] + best_kl)
    for axis, (reward, unit) in zip(axes, rewards.items()):
        start = getattr(samples, reward)[:, at].mean().item()
        curve = [(0.0, start)] + [(p["kl"].item(), p["reward"].item()) for p in reversed(points[reward])]
        axis.plot(*zip(*curve), "k-", linewidth=1.6, label="frontier: the best possible (estimated)")
        if reward == "gold":
            along = [(0.0, start)] + [(p["kl"].item(), p["value"].item()) for p in reversed(points["scores"])]
            axis.plot(*zip(*along), "k--", linewidth=1.0, label="gold of the policies on the score's frontier")
        best = [frontier.best_of_n(samples.scores[:, at], n, getattr(samples, reward)[:, at]).item() for n in best_of]
        axis.plot(best_kl, best, ":", color="0.35", marker=".", label=f"best of n, 2 to {best_of[-1]}, by score")
        left_out = []
        for name, marker in zip(samples.names, MARKERS * 9):
            means, errors = frontier.measure(samples, name)
            if means["kl_ref"] > widest:
                left_out.append(f"{name} ({means['kl_ref']:.0f} nats)")
                continue
            key = "score" if reward == "scores" else "gold"
            axis.errorbar(means["kl_ref"], means[key], xerr=1.96 * errors["kl_ref"], yerr=1.96 * errors[key],
                          fmt=marker, color="0.1", markerfacecolor="0.75", markersize=7, capsize=2, linewidth=0.8,
                          label=experiment.no_math(name))
        axis.set(xlabel="KL to the reference (nats per response)", ylabel=unit, xlim=(-0.1, widest))
        if left_out:
            beyond = textwrap.fill("beyond the right edge: " + ", ".join(left_out), 60)
            axis.text(0.98, 0.02, experiment.no_math(beyond), transform=axis.transAxes, ha="right",
                      fontsize=7)
        axis.grid(alpha=0.3)
    for axis, title in zip(axes, ("What was trained for", "What was wanted")):
        axis.set_title(title)
    handles, labels = axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=1 + len(rewards), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, (0.1 + 0.2 * rows) / height, 1, 1))
    return experiment.save_figure(figure, path, dpi=120)


def overoptimisation(log, gold_mean, gold_std):
    """
    Score and gold against sqrt(KL), in standard deviations of SFT's, as means over five updates: the peak
    of single ones would be the luckiest. -> {peak, end, fall}, the three curves
    """
    root = experiment.smooth([math.sqrt(max(0.0, line["kl_ref"])) for line in log])
    score = experiment.smooth([line["score"] for line in log])
    gold = experiment.smooth([(line["gold"] - gold_mean) / gold_std for line in log])
    peak = gold.index(max(gold))
    found = {"peak_gold": gold[peak], "peak_kl": root[peak] ** 2, "peak_score": score[peak],
             "end_gold": gold[-1], "end_kl": root[-1] ** 2, "end_score": score[-1],
             "fall": gold[peak] - gold[-1]}
    return found, (root, score, gold)


@experiment.optional
def draw_overoptimisation(root, score, gold, path):
    figure, axis = experiment.subplots(figsize=(6.4, 4.2))
    axis.plot(root, score, "k--", marker="o", markersize=3, linewidth=1.0, label="score of the weak reward model")
    axis.plot(root, gold, "-", color="0.35", marker="s", markersize=3, linewidth=1.0, label="gold, the true utility")
    peak = gold.index(max(gold))
    axis.annotate("peak", (root[peak], gold[peak]), textcoords="offset points", xytext=(0, 9), ha="center", fontsize=9)
    axis.set(xlabel="square root of the KL to the reference (nats per response)",
             ylabel="standard deviations of SFT's samples above SFT\n(means over five updates)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.tight_layout()
    return experiment.save_figure(figure, path, dpi=120)


def overoptimise(cfg, sft_run, held_out):
    """Train a weak reward model, and a policy that follows it with little KL -> log, gold's mean and std"""
    name = f"{options.run_name(cfg)}-weak"
    common = dict(out=name, base=sft_run, seed=cfg.seed, device=cfg.device, resume=True, overwrite=cfg.overwrite)
    rm.main(rm.Config(config=cfg.config, n_prompts=cfg.weak_rankings, warmup=2, **common))
    print()
    ppo.main(ppo.Config(config=cfg.config, kl_control="fixed", beta=cfg.weak_beta,
                        steps=cfg.weak_steps, kl_bound=1e9, **common))
    print()
    gold = torch.tensor([ranking["gold"] for ranking in held_out])           # of SFT's samples
    log = files.read_lines(options.folder_of(name) / "ppo" / "log.jsonl")
    return log, gold.mean().item(), gold.std().item()


def check(cfg):
    """Stops on settings that cannot be, before any work."""
    scoring.check(cfg)
    if cfg.n_reference < 2:
        files.stop(f"--n_reference got {cfg.n_reference}; best of n takes at least 2 responses")
    if cfg.overoptimise and (cfg.data != "reviews" or cfg.reward != "reward_model"):
        files.stop("--overoptimise compares with the true utility, which only the built-in task knows, what a weak "
                   "reward model of ours does to it")
    if cfg.overoptimise:
        batch = rm.Config(config=cfg.config).batch_size
        if cfg.weak_rankings < batch:
            files.stop(f"--weak_rankings {cfg.weak_rankings} is less than one batch of {batch} rankings; raise it")
    finished_stages(cfg)                                         # those of --runs must be among them


@experiment.self_contained
def main(cfg):
    run = experiment.Run(replace(cfg, overwrite=True), "evaluate")           # once more, whatever stands there
    device = run.device
    check(cfg)
    sft_folder = experiment.ensure(cfg, sft)
    reference, tokenizer = sft.load_policy(sft_folder, device, **cfg.how())
    train_prompts, prompts = corpus.prompts(cfg, tokenizer, reference.config.block_size, cfg.n_eval)
    reward = scoring.load_reward(cfg, reference, tokenizer, train_prompts, device)
    known = cfg.data == "reviews"                                            # the true utility
    temperature = rm.Config.annotator_temperature
    if known and cfg.reward == "reward_model":
        rm_folder = experiment.ensure(cfg, rm)
        temperature = experiment.stored_config(rm_folder)["annotator_temperature"]

    # ---- 1. policies
    found = find_policies(cfg, reference, reward, device)
    policies = {"SFT": reference} | {name: policy for name, (policy, _) in found.items()}
    configs = {name: config for name, (_, config) in found.items()}
    print(f"evaluating {', '.join(policies)}" if found else
          "found no policy to evaluate: this is the limit alone, from the SFT policy's samples")
    if cfg.overoptimise:
        weak = overoptimise(cfg, sft_folder.parent.name, rm.read_comparisons(rm_folder)[1])
    run.begin()

    # ---- 2. samples
    counts = [cfg.n_reference] + [cfg.n_samples] * len(found)
    samples = frontier.collect(policies, reward, tokenizer, prompts, counts, cfg)

    # ---- 3. the limit
    fixed = {c.get("beta") for c in configs.values() if c.get("kl_control", "fixed") == "fixed"}
    betas = sorted({1.0, 0.5, 0.25, 0.1} | (fixed - {0, None}), reverse=True)
    limits = [limit_table(samples, samples.scores, "score", betas)]
    if known:
        limits.append(limit_table(samples, samples.gold / temperature, f"gold / {temperature:g}", betas))

    # ---- 4. best of n, 5. landed, 6. win rates
    best_of = best_of_n_table(samples)
    landed, results = landed_table(samples, configs, temperature, cfg)
    wins = {"score": win_table(samples, samples.scores, "score")}
    if known:
        wins = {"gold": win_table(samples, samples.gold, "gold")} | wins

    # ---- 7. samples, and the report
    draw_frontier(samples, run.folder / "frontier.png")
    table = functools.partial(experiment.table, markdown=True)
    report = [
        f"# Where each policy landed: {run.folder.parent.name}, seed {cfg.seed}", "",
        table(landed), "",
        f"{cfg.n_eval} held-out prompts; {cfg.n_reference} responses of SFT and {cfg.n_samples} of each other "
        "policy to every prompt; ± is one standard error.",
        "Share of frontier: gain in score over the greatest gain possible at that KL. Fraction of optimum: "
        "(J - J_ref) / (J* - J_ref), J = E[r] - beta KL, where beta was fixed;",
        f"(gold): r = gold / {temperature:g}, which is what the annotators' labels follow. " * known + "Misfit: standard "
        "deviation within a prompt of r - beta log pi / pi_ref, which is 0 at the optimum, on SFT's samples and "
        "on the policy's own. *: fewer than "
        f"{frontier.MEDIAN_ESS} effective samples at the median prompt or {frontier.LEAST_ESS} at the least. "
        "~: the run's own objective is another (GRPO with the KL in the loss).", "",
        "![frontier](frontier.png)", "",
        "## The limit", "", "\n\n".join(map(table, limits)), "",
        "J* is the most that any policy reaches of E[r] - beta KL. Its estimate is biased low: a lower bound "
        "on average, by about a third of what it loses with a quarter of the samples. !: that moves it by more "
        "than 1 %; take more --n_samples, or a policy nearer to that optimum beside.", "",
        "## Best of n", "", table(best_of), "",
        "Samples of SFT, the best by score; the KL is an upper bound.", "",
        "## Win rates", "", "\n\n".join(table(rows) for rows, _ in wins.values()), "",
        "All pairs of responses to one prompt; ± is a 95 % interval over prompts. Elo: SFT is 1000.", "",
        "## Samples", *side_by_side(samples, cfg.n_shown)]

    # ---- 8. over-optimisation
    if cfg.overoptimise:
        fall, curves = overoptimisation(*weak)
        draw_overoptimisation(*curves, run.folder / "overoptimisation.png")
        results["overoptimisation"] = fall
        report += ["", "## Over-optimisation", "", "![over-optimisation](overoptimisation.png)", "",
                   f"PPO at beta {cfg.weak_beta:g} for a reward model of {cfg.weak_rankings} rankings. Gold peaks "
                   f"{fall['peak_gold']:+.2f} standard deviations above SFT at {fall['peak_kl']:.1f} nats and ends "
                   f"at {fall['end_gold']:+.2f} at {fall['end_kl']:.1f} nats: a fall of {fall['fall']:.2f}, while "
                   f"the score goes from {fall['peak_score']:.2f} to {fall['end_score']:.2f}."]
    report = "\n".join(report)
    files.write(run.folder / "report.md", f"{report}\n\n```text\n{run.made_by()}\n```\n")
    for what, (_, elo) in wins.items():
        for name in samples.names:
            results[name][f"elo_by_{what}"] = elo[name]
    return run.finish(report + f"\n\nreport      {run.folder}/report.md", results)


if __name__ == "__main__":
    experiment.launch(main, Config, __doc__)
