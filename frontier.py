"""
How good a policy is, and how good it could be.

No policy reaches more than this. Given a reference pi_ref, a reward r and a KL strength beta > 0, the
objective  J(pi) = E[r] - beta KL(pi, pi_ref)  is greatest at

    pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)        Z(x) = E_{y ~ pi_ref} exp(r(x, y) / beta)
    J*(beta) = beta E_x log Z(x)

(Rafailov et al. 2023, appendix A.1), because J(pi) = J* - beta KL(pi, pi*) for every pi. As
beta falls, pi* runs along the frontier: the greatest E[r] at each KL. Z is a mean over samples, so the
limit can be measured without ever training to it:

    1. collect      responses to held-out prompts from the reference and from trained policies, each
                    with its reward and its exact log-probability under all of them
    2. weigh        against the mixture q of those who wrote them:  w = pi_ref / q  (the balance
                    heuristic, Veach and Guibas 1995). The reference is always in q, so w is bounded;
                    a good policy is near pi*, so that w exp(r / beta) varies little
    3. limit        Z(x) = mean w exp(r / beta), plain, without bias. The log of it is biased low:
                    J* is a lower bound on average. Effective sample sizes say how far to trust it
    4. frontier     the greatest E[r] at a KL of k is  min over beta of J*(beta) + beta k
    5. share        of the frontier: a policy's gain in E[r] over the greatest gain at the KL it spent
"""

import math
from dataclasses import dataclass

import torch

import data
import experiment
import reviews
from model import generate, token_logprobs

BETAS = [0.02 * 1.03 ** i for i in range(201)]                   # 0.02 to 7.6
MEDIAN_ESS, LEAST_ESS = 50, 10        # of the effective sample sizes of prompts, to be trusted


# --------------------------------------------------------------------------------------------------
# The maths. (P, N): P prompts, N samples each, from whatever mixture of policies wrote them.

def mixture_logprobs(logprobs, counts):
    """
    log q = log sum_k (n_k / N) pi_k, of samples of which n_k came from pi_k: (K, P, N) -> (P, N)

    The balance heuristic of Veach and Guibas 1995: each sample is weighed against the mixture, not
    against the one policy that happened to write it.
    """
    shares = torch.tensor(counts, dtype=logprobs.dtype, device=logprobs.device) / sum(counts)   # (K,)
    return (logprobs + shares.log()[:, None, None]).logsumexp(dim=0)


def optimum(rewards, log_weights, beta, values=None):
    """
    The optimum of E[r] - beta KL(pi, pi_ref), from samples of q; log_weights = log pi_ref - log q.

    Z(x) = mean_i w_i exp(r_i / beta),   J* = beta mean_x log Z(x)
    E*[r] = mean_x sum_i p_i r_i  with  p_i = w_i exp(r_i / beta) / sum,   KL* = (E*[r] - J*) / beta

    rewards, log_weights (P, N) -> {objective: J*, reward: E*[r], kl: KL* in nats, ess (P,): 1 / sum p^2};
    with values (P, N) also {value: E*[values]}, of anything else that pi* would earn

    >>> point = optimum(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), beta=1.0)
    >>> round(point["objective"].item(), 4)              # log((1 + e) / 2)
    0.6201
    """
    log_terms = log_weights + rewards / beta                                 # (P, N)
    log_z = log_terms.logsumexp(dim=1) - math.log(rewards.shape[1])          # (P,)
    p = log_terms.softmax(dim=1)                                             # (P, N), that of pi*
    objective, reward = beta * log_z.mean(), (p * rewards).sum(dim=1).mean()
    point = {"objective": objective, "reward": reward, "kl": (reward - objective) / beta,
             "ess": 1 / (p ** 2).sum(dim=1)}
    return point if values is None else point | {"value": (p * values).sum(dim=1).mean()}


def best_reward(rewards, log_weights, kl, betas=BETAS):
    """
    The greatest E[r] of any policy with KL(pi, pi_ref) <= kl:  min over beta of J*(beta) + beta kl

    The dual of that problem; it needs J* alone. At most the best sample of every prompt, which is beta
    -> 0. -> reward, the point of `optimum` with its beta there
    """
    points = [{"beta": beta} | optimum(rewards, log_weights, beta) for beta in betas]
    bounds = torch.stack([point["objective"] + point["beta"] * kl for point in points])
    return torch.minimum(bounds.min(), rewards.amax(dim=1).mean()), points[int(bounds.argmin())]


def best_of_n(rewards, n, values=None):
    """
    Expected value of the best of n samples, given N >= n of them: (P, N) -> 0-d

    sum_i C(i - 1, n - 1) / C(N, n) values_(i), over the samples in rising order of reward: the mean over
    all subsets of n, without bias. values are what is read off the winner, by default the reward.

    >>> best_of_n(torch.tensor([[1.0, 2.0, 3.0]]), 2)    # of {1, 2}, {1, 3}, {2, 3}: 2, 3, 3
    tensor(2.6667)
    """
    N = rewards.shape[1]
    if not 1 <= n <= N:
        raise ValueError(f"got n = {n} with {N} samples a prompt; n is from 1 to {N}")
    i = torch.arange(n, N + 1, dtype=torch.float64, device=rewards.device)   # only these can win
    log_share = (torch.lgamma(i) - torch.lgamma(i - n + 1) - math.lgamma(n)
                 - math.lgamma(N + 1) + math.lgamma(n + 1) + math.lgamma(N - n + 1))
    order = rewards.argsort(dim=1)[:, n - 1:]                                # (P, N - n + 1)
    winners = (rewards if values is None else values).gather(1, order)
    return (winners * log_share.exp().to(winners.dtype)).sum(dim=1).mean()


def best_of_n_kl(n):
    """log n - (n - 1) / n, which KL(best-of-n, pi_ref) never exceeds, in nats"""
    return math.log(n) - (n - 1) / n


def trusted(point):
    """Whether enough samples stand behind a point of `optimum`."""
    return point["ess"].median() >= MEDIAN_ESS and point["ess"].min() >= LEAST_ESS


# --------------------------------------------------------------------------------------------------
# Samples

@dataclass
class Samples:
    """Responses to P prompts, N to each: first those of the reference, then each policy's in turn."""
    prompts: list               # P token lists
    names: list                 # K policies, the reference first
    counts: list                # responses to a prompt by each of them; they sum to N
    asked: list                 # P texts, of the prompts
    texts: list                 # P lists of N texts
    scores: torch.Tensor        # (P, N) reward
    logprobs: torch.Tensor      # (K, P, N) log pi_k(y | x), nats
    entropy: torch.Tensor       # (P, N) sum over tokens, of the policy that wrote the response
    lengths: torch.Tensor       # (P, N) tokens, EOS included
    finished: torch.Tensor      # (P, N) 1.0 where the response ended with EOS
    gold: torch.Tensor | None = None            # (P, N) true utility, which only the built-in task knows
    grammatical: torch.Tensor | None = None     # (P, N) 1.0 where it is a review as the grammar writes them

    def columns(self, name):
        """Where the responses of one policy stand -> slice"""
        k = self.names.index(name)
        return slice(sum(self.counts[:k]), sum(self.counts[:k + 1]))

    def log_weights(self):
        """log pi_ref - log q -> (P, N)"""
        return self.logprobs[0] - mixture_logprobs(self.logprobs, self.counts)

    def every_fourth(self):
        """A quarter of each policy's responses -> columns, log pi_ref - log q of them (P, N / 4)"""
        columns = torch.cat([torch.arange(self.scores.shape[1])[self.columns(name)][::4]
                             for name in self.names])
        logprobs, counts = self.logprobs[:, :, columns], [-(-n // 4) for n in self.counts]
        return columns, logprobs[0] - mixture_logprobs(logprobs, counts)


def read_gold(tokenizer, inputs, targets, mask):
    """The true utility of reviews, never shown to training, and whether they are grammatical -> (B,), (B,)"""
    finished = data.met_eos(targets, mask, tokenizer.eot_token).tolist()
    reviewed = list(zip(*data.texts_of(tokenizer, inputs, targets, mask), finished))
    return (torch.tensor([reviews.gold(*review) for review in reviewed]),
            torch.tensor([reviews.grammatical(*review) for review in reviewed]))


def true_utility(cfg, tokenizer, inputs, targets, mask):
    """{gold: mean}, to be logged; of other data than the built-in task nobody knows it: {}"""
    return {"gold": read_gold(tokenizer, inputs, targets, mask)[0].mean()} if cfg.data == "reviews" else {}


@torch.no_grad()
def collect(policies, reward, tokenizer, ids, counts, cfg):
    """
    counts[k] responses of the k-th policy to each prompt, weighed by all -> Samples, in float64, on the CPU

    policies is {name: GPT}, the reference first; reward(inputs, targets, mask, finished) -> (B,); ids are prompts.
    """
    names, eos_id = list(policies), tokenizer.eot_token
    device, temperature = policies[names[0]].transformer.wte.weight.device, getattr(cfg, "temperature", 1.0)
    prompts = [tokenizer.decode([] if prompt == [eos_id] else prompt) for prompt in ids]
    what = f"{sum(counts)} responses to each of {len(prompts)} held-out prompts"

    # Rows in the order policy, prompt, response; every policy's uniforms start from the same seed
    asked = [p for n in counts for p in range(len(prompts)) for _ in range(n)]              # a row's prompt,
    author = [k for k, n in enumerate(counts) for _ in range(n * len(prompts))]             # policy,
    rows = []                                                                               # response
    c, longest = policies[names[0]].config, max(map(len, ids)) + cfg.max_new_tokens
    at_once = max(16, min(1024, 2 ** 30 // (8 * longest * c.n_layer * c.n_embd)))           # 1 GiB of caches
    batches = [(k, i) for k, n in enumerate(counts) for i in range(0, n * len(prompts), at_once)]
    for k, i in experiment.progress(batches, f"sampling {what}"):
        if i == 0:
            generator = torch.Generator().manual_seed(cfg.seed)
        batch = [ids[p] for p in asked[len(rows):len(rows) + min(at_once, counts[k] * len(prompts) - i)]]
        rows += data.responses_of(*generate(policies[names[k]], batch, cfg.max_new_tokens, eos_id,
                                            temperature, generator))

    # Each row under every policy, in batches of rows of about one length: little padding
    lengths = torch.tensor([len(ids[p]) + len(row) for p, row in zip(asked, rows)])
    known = ("gold", "grammatical") if cfg.data == "reviews" else ()
    flat = {key: torch.zeros(len(rows), dtype=torch.float64) for key in (
        "scores", "entropy", "lengths", "finished", *known)}
    logprobs = torch.zeros(len(policies), len(rows), dtype=torch.float64)
    texts, author = [""] * len(rows), torch.tensor(author)
    for at in experiment.progress(lengths.argsort(stable=True).split(128), "weighing them"):
        batch = data.collate([ids[asked[i]] for i in at], [rows[i] for i in at])
        inputs, targets, mask = (t.to(device) for t in batch)
        finished = data.met_eos(targets, mask, eos_id)
        for k, policy in enumerate(policies.values()):
            by_token, entropy = token_logprobs(policy, inputs, targets, mask, temperature,
                                               return_entropy=True)
            logprobs[k, at] = by_token.cpu().double().sum(dim=1)
            experiment.check_finite(logprobs[k, at], f"a log-probability of {names[k]}")
            flat["entropy"][at] += (entropy.cpu().double().sum(dim=1) * (author[at] == k))
        measured = {"scores": reward(inputs, targets, mask, finished), "lengths": mask.sum(dim=1), "finished": finished}
        experiment.check_finite(measured["scores"], "the reward of a sampled response")
        if known:
            measured |= zip(known, read_gold(tokenizer, inputs, targets, mask))
        for key, x in measured.items():
            flat[key][at] = x.cpu().double()
        for i in at.tolist():
            texts[i] = data.decode_response(tokenizer, rows[i])[0]

    def by_prompt(x):
        """(.., rows) -> (.., P, N)"""
        blocks = x.split([n * len(prompts) for n in counts], dim=-1)
        return torch.cat([block.unflatten(-1, (len(prompts), -1)) for block in blocks], dim=-1)

    place = by_prompt(torch.arange(len(rows))).tolist()
    return Samples(ids, names, list(counts), prompts, [[texts[i] for i in row] for row in place],
                   logprobs=by_prompt(logprobs), **{key: by_prompt(x) for key, x in flat.items()})


# --------------------------------------------------------------------------------------------------
# Where a policy landed

def measure(samples, name):
    """A policy's own responses -> {metric: mean}, {metric: standard error, over prompts}"""
    at, k = samples.columns(name), samples.names.index(name)
    per_prompt = {
        "score": samples.scores[:, at].mean(1),
        **({} if samples.gold is None else {"gold": samples.gold[:, at].mean(1)}),
        "kl_ref": (samples.logprobs[k] - samples.logprobs[0])[:, at].mean(1),
        "entropy": samples.entropy[:, at].sum(1) / samples.lengths[:, at].sum(1),
        "response_length": samples.lengths[:, at].mean(1),
        "eos_rate": samples.finished[:, at].mean(1),
        **({} if samples.gold is None else {"grammatical": samples.grammatical[:, at].mean(1)})}
    means = {metric: x.mean().item() for metric, x in per_prompt.items()}
    means["entropy"] = (samples.entropy[:, at].sum() / samples.lengths[:, at].sum()).item()
    return means, {metric: x.std(correction=0).item() / max(1, len(x) - 1) ** 0.5
                   for metric, x in per_prompt.items()}


def share_of_frontier(samples, name):
    """
    A policy's gain in E[r] over the greatest gain of any policy with its KL. Needs no beta.

    -> {share, best_score, trusted}; the frontier is biased low, so that the share is biased high,
    the more so where it is not trusted. None for a policy that has not moved, or if nothing can be gained.
    """
    reference, policy = (measure(samples, n)[0] for n in (samples.names[0], name))
    best, point = best_reward(samples.scores, samples.log_weights(), max(policy["kl_ref"], 0.0))
    gain, best_gain = policy["score"] - reference["score"], best.item() - reference["score"]
    moved = policy["kl_ref"] > 0.02 and best_gain > 1e-6
    return {"share": gain / best_gain if moved else None, "best_score": best.item(), "trusted": bool(trusted(point))}


def fraction_of_optimum(samples, name, beta, rewards=None):
    """
    (J - J_ref) / (J* - J_ref) at a fixed beta, with J = E[r] - beta KL

    -> {fraction, standard_error, objective: J*, optimum_trusted}. The error is that of J, from the
    policy's samples to these prompts; J* is biased low, and so the fraction high. None if no gain is
    possible that would show in the samples.
    """
    rewards = samples.scores if rewards is None else rewards
    k, at, by_ref = samples.names.index(name), samples.columns(name), samples.columns(samples.names[0])
    kl = (samples.logprobs[k] - samples.logprobs[0])[:, at].mean(1)          # (P,)
    reached = rewards[:, at].mean(1) - beta * kl                             # (P,)
    start = rewards[:, by_ref].mean(1)                                       # (P,)
    best = optimum(rewards, samples.log_weights(), beta)
    greatest_gain = best["objective"] - start.mean()
    noise = (rewards[:, by_ref].var(dim=1).sum() / rewards[:, by_ref].shape[1]).sqrt() / len(rewards)
    if not greatest_gain > 3 * noise:
        return {"fraction": None, "standard_error": None, "objective": best["objective"].item(),
                "optimum_trusted": False}
    fraction = (reached.mean() - start.mean()) / greatest_gain
    spread = rewards[:, at] - beta * (samples.logprobs[k] - samples.logprobs[0])[:, at]      # (P, n)
    error = (spread.var(dim=1).sum() / spread.shape[1]).sqrt() / len(spread) / greatest_gain
    return {"fraction": fraction.item(), "standard_error": error.item(),
            "objective": best["objective"].item(), "optimum_trusted": bool(trusted(best))}


def misfit(samples, name, on, beta, rewards=None):
    """
    Standard deviation within prompts of r - beta log pi / pi_ref, over the responses of the policy `on`

    It is beta log Z(x), the same for every response, where pi = pi*: so 0 says that the policy's implied
    reward is the reward, up to a constant, on those responses.
    """
    k, at = samples.names.index(name), samples.columns(on)
    rewards = samples.scores if rewards is None else rewards
    left = (rewards - beta * (samples.logprobs[k] - samples.logprobs[0]))[:, at]             # (P, n)
    return left.var(dim=1).mean().sqrt().item()


def compare(policies, reward, tokenizer, prompts, cfg):
    """The reference and policies trained from it, {name: GPT}, on the same prompts -> text, results of the first"""
    samples = collect(policies, reward, tokenizer, prompts, [cfg.n_samples] * len(policies), cfg)
    before, after = samples.names[:2]
    means = {name: measure(samples, name)[0] for name in samples.names}
    theirs, ours = means[before], means[after]
    limit = share_of_frontier(samples, after)
    lines = [experiment.table([
        [f"{len(prompts)} held-out prompts x {cfg.n_samples}", *samples.names],
        *([metric, *(means[name][metric] for name in samples.names)] for metric in ours)]), ""]
    results = {**ours, **limit, before.lower(): theirs, **{name: means[name] for name in samples.names[2:]}}
    if samples.gold is not None:
        spread = samples.gold[:, samples.columns(before)].std(correction=0).item()
        if spread > 1e-6:                                # more than one sample
            results["gold_gain"] = gain = (ours["gold"] - theirs["gold"]) / spread
            lines += [
                f"The true utility, gold, which training never saw, is {gain:+.2f} standard deviations of",
                f"the {before} policy's gold above that policy's, at {ours['kl_ref']:.2f} nats of KL per "
                "response."]
    if limit["share"] is not None:
        lines += [
            f"The best possible score at that KL is about {limit['best_score']:.2f}: {after} made "
            f"{limit['share']:.1%} of the greatest gain",
            "possible, its share of the frontier (an estimate from these samples, if anything too high;",
            "evaluate.py takes more)."]
    lines.append("")
    for p, prompt in enumerate(samples.asked[:4]):
        lines.append(prompt)
        for name in samples.names:
            i = samples.columns(name).start
            gold = "" if samples.gold is None else f"  gold {samples.gold[p, i]:5.2f}"
            lines.append(f"    {name}  score {samples.scores[p, i]:5.2f}{gold} {samples.texts[p][i]}")
    return "\n".join(lines), results
