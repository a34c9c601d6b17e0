"""
Samples of several policies under one reward, and where each policy landed.

    1. collect      responses to held-out prompts from the reference and from trained policies, each
                    with its reward and its exact log-probability under all of them
    2. measure      a policy's own responses: score, gold, KL to the reference, length
    3. landed       against what frontier.py says was possible: its share of the frontier and, at a
                    fixed beta, the fraction of the optimum

compare does all three and writes the end of a stage's report. evaluate.py takes more samples.
"""

from dataclasses import dataclass

import torch

import data
import frontier
import reviews
from lab.report import progress, table
from lab.run import check_finite
from lab.tokenizer import decode_response, start_of
from model import token_logprobs
from sampler import generate

# --------------------------------------------------------------------------------------------------
# The built-in task's true utility

def read_gold(tokenizer, inputs, targets, mask):
    """The true utility of reviews, and whether each is grammatical -> (B,), (B,)"""
    finished = data.met_eos(targets, mask, tokenizer.end_tokens).tolist()
    rows = list(zip(*data.texts_of(tokenizer, inputs, targets, mask), finished))
    return (torch.tensor([reviews.gold(*row) for row in rows]),
            torch.tensor([reviews.grammatical(*row) for row in rows]))


def annotators_preference(tokenizer, inputs, targets, mask, temperature):
    """P(the annotators prefer the first of each two rows) -> (B / 2,)"""
    gold, _ = read_gold(tokenizer, inputs, targets, mask)                    # (B,)
    return reviews.preference(gold[::2], gold[1::2], temperature)


def true_utility(cfg, tokenizer, inputs, targets, mask):
    """{gold: mean}, for the log only; {} if the data is not the built-in task"""
    if cfg.data != "reviews":
        return {}
    return {"gold": read_gold(tokenizer, inputs, targets, mask)[0].mean()}


# --------------------------------------------------------------------------------------------------
# Samples

@dataclass
class Samples:
    """Responses to P prompts, N to each: the reference's first, then each other policy's in turn"""
    names: list                 # K policies, the reference first
    counts: list                # responses of each policy to a prompt; they sum to N
    asked: list                 # P texts, the prompts
    texts: list                 # P lists of N texts
    scores: torch.Tensor        # (P, N) reward
    logprobs: torch.Tensor      # (K, P, N) log pi_k(y | x), nats
    entropy: torch.Tensor       # (P, N) sum over tokens, under the policy that wrote the response
    lengths: torch.Tensor       # (P, N) tokens, EOS included
    finished: torch.Tensor      # (P, N) 1.0 if the response ended with EOS
    gold: torch.Tensor | None = None            # (P, N) true utility, on the built-in task only
    grammatical: torch.Tensor | None = None     # (P, N) 1.0 if the grammar allows the response

    def columns(self, name):
        """The columns with one policy's responses -> slice"""
        k = self.names.index(name)
        return slice(sum(self.counts[:k]), sum(self.counts[:k + 1]))

    def rewards(self):
        """{score: (P, N)}, with the gold if it is known"""
        known = {"score": self.scores, "gold": self.gold}
        return {what: values for what, values in known.items() if values is not None}

    def log_ratios(self, name):
        """log pi / pi_ref of all responses -> (P, N)"""
        return self.logprobs[self.names.index(name)] - self.logprobs[0]

    def log_weights(self):
        """log pi_ref - log q -> (P, N)"""
        return self.logprobs[0] - frontier.mixture_logprobs(self.logprobs, self.counts)

    def every_fourth(self):
        """A quarter of each policy's responses -> columns, log pi_ref - log q of them (P, N / 4)"""
        everything = torch.arange(self.scores.shape[1])
        columns = torch.cat([everything[self.columns(name)][::4] for name in self.names])
        logprobs = self.logprobs[:, :, columns]
        counts = [-(-n // 4) for n in self.counts]
        return columns, logprobs[0] - frontier.mixture_logprobs(logprobs, counts)


@torch.no_grad()
def collect(policies, reward, tokenizer, prompts, counts, cfg):
    """
    counts[k] responses of the k-th policy to each prompt, under every policy -> Samples (float64)

    policies is {name: GPT}, the reference first; reward(inputs, targets, mask, finished) -> (B,);
    prompts are token lists. The samples are on the CPU.
    """
    names = list(policies)
    eos_id = tokenizer.end_tokens
    temperature = getattr(cfg, "temperature", 1.0)
    device = next(policies[names[0]].parameters()).device
    P = len(prompts)

    # Rows in the order policy, prompt, response
    c = policies[names[0]].config
    longest = max(map(len, prompts)) + cfg.max_new_tokens
    cache = 8 * longest * c.n_layer * c.n_embd           # bytes a row; 1 GiB of them at once
    at_once = max(16, min(1024, 2 ** 30 // cache))
    batches = [(k, i) for k, n in enumerate(counts) for i in range(0, n * P, at_once)]
    rows = []                                                                # response token lists
    told = f"sampling {sum(counts)} responses, of all policies, to each of {P} held-out prompts"
    for k, i in progress(batches, told):
        if i == 0:                           # every policy's uniforms start from the same seed
            generator = torch.Generator().manual_seed(cfg.seed)
            repeated = [prompt for prompt in prompts for _ in range(counts[k])]
        tokens, mask = generate(policies[names[k]], repeated[i:i + at_once], cfg.max_new_tokens,
                                eos_id, temperature, generator)
        rows += data.responses_of(tokens, mask)

    # Every row under every policy. Rows of about one length share a batch: there is little padding
    asked_by_row = [prompt for n in counts for prompt in prompts for _ in range(n)]
    author = torch.tensor([k for k, n in enumerate(counts) for _ in range(n * P)])
    flat = {}                                                                # {quantity: (rows,)}
    logprobs = torch.zeros(len(policies), len(rows), dtype=torch.float64)
    lengths = torch.tensor([len(prompt) + len(row) for prompt, row in zip(asked_by_row, rows)])
    for at in progress(lengths.argsort(stable=True).split(128), "scoring them under every policy"):
        batch = data.collate([asked_by_row[i] for i in at], [rows[i] for i in at])
        inputs, targets, mask = (t.to(device) for t in batch)                # (b, T) each
        finished = data.met_eos(targets, mask, eos_id)
        own_entropy = torch.zeros(len(at), dtype=torch.float64)
        for k, policy in enumerate(policies.values()):
            by_token, entropy = token_logprobs(policy, inputs, targets, mask, temperature,
                                               return_entropy=True)
            logprobs[k, at] = by_token.cpu().double().sum(dim=1)
            check_finite(logprobs[k, at], f"a log-probability of {names[k]}")
            own_entropy += entropy.cpu().double().sum(dim=1) * (author[at] == k)
        scores = reward(inputs, targets, mask, finished)
        check_finite(scores, "the reward of a sampled response")
        measured = {"scores": scores, "entropy": own_entropy, "lengths": mask.sum(dim=1),
                    "finished": finished}
        if cfg.data == "reviews":
            measured["gold"], measured["grammatical"] = read_gold(tokenizer, inputs, targets, mask)
        for key, x in measured.items():
            flat.setdefault(key, torch.zeros(len(rows), dtype=torch.float64))[at] = x.cpu().double()

    blocks = torch.arange(len(rows)).split([n * P for n in counts])
    place = torch.cat([block.view(P, -1) for block in blocks], dim=1)        # (P, N), row numbers
    start = [start_of(tokenizer)]                        # what an empty prompt became
    asked = [tokenizer.decode([] if prompt == start else prompt) for prompt in prompts]
    texts = [[decode_response(tokenizer, rows[i])[0] for i in of_prompt]
             for of_prompt in place.tolist()]
    return Samples(names, list(counts), asked, texts, logprobs=logprobs[:, place],
                   **{key: x[place] for key, x in flat.items()})


# --------------------------------------------------------------------------------------------------
# Where a policy landed

def measure(samples, name):
    """A policy's own responses -> {metric: mean}, {metric: standard error, over prompts}"""
    at = samples.columns(name)
    quantities = {
        "score": samples.scores, "gold": samples.gold, "kl_ref": samples.log_ratios(name),
        "entropy": samples.entropy, "response_length": samples.lengths,
        "eos_rate": samples.finished, "grammatical": samples.grammatical}
    by_prompt = {metric: x[:, at].mean(1) for metric, x in quantities.items() if x is not None}
    entropy = samples.entropy[:, at]                                         # (P, n)
    tokens = samples.lengths[:, at]
    by_prompt["entropy"] = entropy.sum(1) / tokens.sum(1)                    # a mean over tokens
    means = {metric: x.mean().item() for metric, x in by_prompt.items()}
    means["entropy"] = (entropy.sum() / tokens.sum()).item()
    errors = {metric: x.std(correction=0).item() / max(1, len(x) - 1) ** 0.5
              for metric, x in by_prompt.items()}
    return means, errors


def share_of_frontier(samples, name):
    """
    A policy's gain in E[r] over the greatest gain of any policy with its KL. It needs no beta.

    -> {share, best_score, trusted}. The frontier is biased low, so the share is biased high, the
    more so if it is not trusted. The share is None if the policy has not moved or nothing can be
    gained.
    """
    reference = measure(samples, samples.names[0])[0]
    policy = measure(samples, name)[0]
    best, point = frontier.best_reward(samples.scores, samples.log_weights(),
                                       max(policy["kl_ref"], 0.0))
    gain = policy["score"] - reference["score"]
    best_gain = best.item() - reference["score"]
    moved = policy["kl_ref"] > 0.02 and best_gain > 1e-6
    return {"share": gain / best_gain if moved else None, "best_score": best.item(),
            "trusted": bool(frontier.trusted(point))}


def fraction_of_optimum(samples, name, beta, rewards=None):
    """
    (J - J_ref) / (J* - J_ref) at a fixed beta, with J = E[r] - beta KL

    -> {fraction, standard_error, objective: J*, optimum_trusted}. The standard error covers J only,
    from the policy's samples to these prompts. J* is biased low, so the fraction is biased high. It
    is None if no possible gain would show in the samples.
    """
    rewards = samples.scores if rewards is None else rewards
    by_policy = (rewards - beta * samples.log_ratios(name))[:, samples.columns(name)]       # (P, n)
    by_reference = rewards[:, samples.columns(samples.names[0])]             # (P, n_ref), at KL 0
    best = frontier.optimum(rewards, samples.log_weights(), beta)
    start = by_reference.mean(1).mean()
    greatest_gain = best["objective"] - start
    found = {"fraction": None, "standard_error": None, "objective": best["objective"].item(),
             "optimum_trusted": False}
    if greatest_gain > 3 * response_error(by_reference):
        fraction = (by_policy.mean(1).mean() - start) / greatest_gain
        found |= {"fraction": fraction.item(),
                  "standard_error": (response_error(by_policy) / greatest_gain).item(),
                  "optimum_trusted": bool(frontier.trusted(best))}
    return found


def response_error(x):
    """Standard error of the mean over responses to these prompts: (P, n) -> 0-d"""
    return (x.var(dim=1).sum() / x.shape[1]).sqrt() / len(x)


def misfit(samples, name, on, beta, rewards=None):
    """
    Standard deviation within prompts of r - beta log pi / pi_ref, on the responses of policy `on`

    At pi* that is beta log Z(x), the same for every response to a prompt. So 0 means that, on these
    responses, the policy's implied reward is the reward up to a constant.
    """
    rewards = samples.scores if rewards is None else rewards
    rest = (rewards - beta * samples.log_ratios(name))[:, samples.columns(on)]              # (P, n)
    return rest.var(dim=1).mean().sqrt().item()


def compare(policies, reward, tokenizer, prompts, cfg):
    """
    The reference and policies trained from it, on the same prompts -> text, results

    policies is {name: GPT}, the reference first. The results are those of the second, with the
    others' under their names.
    """
    samples = collect(policies, reward, tokenizer, prompts, [cfg.n_samples] * len(policies), cfg)
    before, after, *others = samples.names
    means = {name: measure(samples, name)[0] for name in samples.names}
    limit = share_of_frontier(samples, after)
    results = means[after] | limit | {before.lower(): means[before]}
    for name in others:
        results[name] = means[name]
    rows = [[f"{len(prompts)} held-out prompts x {cfg.n_samples}", *samples.names]]
    rows += [[metric, *(means[name][metric] for name in samples.names)] for metric in means[after]]
    lines = [table(rows), ""]
    if samples.gold is not None:
        spread = samples.gold[:, samples.columns(before)].std(correction=0).item()
        if spread > 1e-6:                                # more than one sample
            gain = (means[after]["gold"] - means[before]["gold"]) / spread
            results["gold_gain"] = gain
            lines += [
                f"The true utility, gold, which training never saw, is {gain:+.2f} standard",
                f"deviations above the {before} policy's, at a KL of {means[after]['kl_ref']:.2f} "
                "nats per response."]
    if limit["share"] is not None:
        lines += [
            f"The best possible score at that KL is about {limit['best_score']:.2f}: {after} made "
            f"{limit['share']:.1%} of the greatest",
            "possible gain, its share of the frontier (estimated from these samples, if anything",
            "too high; evaluate.py takes more)."]
    lines.append("")
    for p, prompt in enumerate(samples.asked[:4]):
        lines.append(prompt)
        for name in samples.names:
            i = samples.columns(name).start
            gold = "" if samples.gold is None else f"  gold {samples.gold[p, i]:5.2f}"
            lines.append(f"    {name}  score {samples.scores[p, i]:5.2f}{gold} "
                         f"{samples.texts[p][i]}")
    return "\n".join(lines), results
