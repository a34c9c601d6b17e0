"""
How good a policy could be: the optimum, the frontier and best of n. Formulas only.

Given a reference pi_ref, a reward r and a KL strength beta > 0, no policy has a higher objective
J(pi) = E[r] - beta KL(pi, pi_ref)  than

    pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x)    Z(x) = E_{y ~ pi_ref} exp(r(x, y) / beta)
    J*(beta) = beta E_x log Z(x)

(Rafailov et al. 2023, appendix A.1), because J(pi) = J* - beta KL(pi, pi*) for every pi. As beta
falls, pi* runs along the frontier: the greatest E[r] at each KL. Z is a mean over samples, so the
limit can be measured without ever training to it:

    1. collect      responses of the reference and of trained policies, each with its reward and its
                    exact log-probability under all of them (compare.py)
    2. weigh        each against the mixture q of the policies that wrote them:  w = pi_ref / q
                    (the balance heuristic, Veach and Guibas 1995). The reference is always in q, so
                    w is bounded; a good policy is near pi*, so w exp(r / beta) varies little
    3. limit        Z(x) = mean w exp(r / beta), which is unbiased. Its log is biased low, so J* is
                    a lower bound on average. Effective sample sizes say how far to trust it
    4. frontier     the greatest E[r] at a KL of k is  min over beta of J*(beta) + beta k
"""

import math

import torch

BETAS = [0.02 * 1.03 ** i for i in range(201)]                   # 0.02 to 7.6
MEDIAN_ESS = 50                 # effective samples that the median prompt needs,
LEAST_ESS = 10                  # and that every prompt needs, before an estimate is trusted


# --------------------------------------------------------------------------------------------------
# The maths. (P, N): P prompts, N samples each, from whatever mixture of policies wrote them.

def mixture_logprobs(logprobs, counts):
    """
    log q = log sum_k (n_k / N) pi_k, for samples of which pi_k wrote n_k: (K, P, N) -> (P, N)

    The balance heuristic of Veach and Guibas 1995: each sample is weighed against the mixture, not
    against the one policy that happened to write it.
    """
    counts = torch.tensor(counts, dtype=logprobs.dtype, device=logprobs.device)
    shares = counts / counts.sum()                                           # (K,)
    return (logprobs + shares.log()[:, None, None]).logsumexp(dim=0)


def optimum(rewards, log_weights, beta, values=None):
    """
    The optimum of E[r] - beta KL(pi, pi_ref), from samples of q; log_weights = log pi_ref - log q.

    Z(x) = mean_i w_i exp(r_i / beta),   J* = beta mean_x log Z(x)
    E*[r] = mean_x sum_i p_i r_i  with  p_i = w_i exp(r_i / beta) / sum,   KL* = (E*[r] - J*) / beta

    rewards, log_weights (P, N) -> {objective: J*, reward: E*[r], kl: KL* in nats,
    ess (P,): 1 / sum p^2}. With values (P, N) also {value: E*[values]}: whatever else pi* earns.

    >>> point = optimum(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), beta=1.0)
    >>> round(point["objective"].item(), 4)              # log((1 + e) / 2)
    0.6201
    """
    log_terms = log_weights + rewards / beta                                 # (P, N)
    log_z = log_terms.logsumexp(dim=1) - math.log(rewards.shape[1])          # (P,)
    p = log_terms.softmax(dim=1)                                             # (P, N), pi* on them
    objective = beta * log_z.mean()
    reward = (p * rewards).sum(dim=1).mean()
    point = {"objective": objective, "reward": reward, "kl": (reward - objective) / beta,
             "ess": 1 / (p ** 2).sum(dim=1)}
    if values is not None:
        point["value"] = (p * values).sum(dim=1).mean()
    return point


def best_reward(rewards, log_weights, kl, betas=BETAS):
    """
    The greatest E[r] of any policy with KL(pi, pi_ref) <= kl:  min over beta of J*(beta) + beta kl

    The dual of that problem, which needs only J*. It is at most the best sample of every prompt,
    the limit of beta -> 0. -> reward, and the point of `optimum` that reaches it, with its beta
    """
    points = [{"beta": beta} | optimum(rewards, log_weights, beta) for beta in betas]
    bounds = torch.stack([point["objective"] + point["beta"] * kl for point in points])
    return torch.minimum(bounds.min(), rewards.amax(dim=1).mean()), points[int(bounds.argmin())]


def best_of_n(rewards, n, values=None):
    """
    Expected value of the best of n samples, given N >= n of them: (P, N) -> 0-d

    sum_i C(i - 1, n - 1) / C(N, n) values_(i), over the samples in rising order of reward: the mean
    over all subsets of n, so it is unbiased. values (P, N) are read off the winner; by default the
    reward.

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
    """Whether a point of `optimum` is backed by enough samples"""
    return point["ess"].median() >= MEDIAN_ESS and point["ess"].min() >= LEAST_ESS
