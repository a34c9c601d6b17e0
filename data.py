"""
Batches: the one shift, the one collate, and the rows that a stage trains on.

    tokens   (B, T+1)   p0 p1 p2 r0 r1 EOS pad pad
    inputs   (B, T)     p0 p1 p2 r0 r1 EOS pad          tokens[:, :-1]
    targets  (B, T)     p1 p2 r0 r1 EOS pad pad         tokens[:, 1:]
    mask     (B, T)     0  0  1  1  1   0   0           1 where the target is a response token

    shift, collate              token lists to tensors
    minibatches, microbatches   rows of a gradient step; its parts, if it does not fit into memory
    Means                       means of metrics over such parts
    prompts, demonstrations, comparisons    of the built-in task or --data, to train on and held out
"""

import functools

import torch

import reviews
from lab import corpus
from lab.files import stop
from lab.tokenizer import decode_response, encode_prompt, encode_texts, start_of

# --------------------------------------------------------------------------------------------------
# Tensors

def shift(tokens):
    """(B, T+1) tokens -> inputs, targets, (B, T) each. The only place where anything is shifted."""
    return tokens[:, :-1], tokens[:, 1:]


def collate(prompts, responses):
    """
    Lists of token lists -> inputs, targets, mask, each (B, T), padded on the right with 0

    A response carries its own EOS, if it has one. The mask is 1 for all tokens of the responses and
    0 for those of the prompts.

    >>> inputs, targets, mask = collate([[5, 6], [7]], [[8, 9], [9]])
    >>> inputs.tolist(), targets.tolist(), mask.tolist()
    ([[5, 6, 8], [7, 9, 0]], [[6, 8, 9], [9, 0, 0]], [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    """
    if not prompts or len(prompts) != len(responses):
        raise ValueError(f"got {len(prompts)} prompts and {len(responses)} responses; they come in "
                         "pairs, at least one")
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        if not prompt:
            raise ValueError(f"row {i} has an empty prompt; an empty prompt becomes [eos_id]")
        if not response:
            raise ValueError(f"row {i} has an empty response; a response has at least its EOS")
    rows = [prompt + response for prompt, response in zip(prompts, responses)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # (B, T+1)
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]      # (B, 1)
    ends = torch.tensor([len(row) for row in rows])[:, None]                 # (B, 1)
    columns = torch.arange(1, width)                                         # of targets, in tokens
    mask = ((columns >= starts) & (columns < ends)).float()                  # (B, T)
    return *shift(tokens), mask


def responses_of(tokens, mask):
    """The inverse of collate for a rollout: tokens (B, T+1), mask (B, T) -> response token lists"""
    targets = shift(tokens)[1]
    return [row[m > 0].tolist() for row, m in zip(targets.cpu(), mask.cpu())]


def texts_of(tokenizer, inputs, targets, mask):
    """The rows of a batch -> prompts, responses, as texts without any EOS"""
    prompts, responses = [], []
    for row, chosen, m in zip(inputs.tolist(), targets.tolist(), (mask > 0).tolist()):
        prompt = row[:m.index(True) + 1]
        if prompt == [start_of(tokenizer)]:              # an empty prompt
            prompt = []
        response = [token for token, in_response in zip(chosen, m) if in_response]
        prompts.append(tokenizer.decode(prompt))
        responses.append(decode_response(tokenizer, response)[0])
    return prompts, responses


def met_eos(targets, mask, eos_id):
    """Whether each row's response has an EOS; one in the prompt does not count -> (B,) bool"""
    ends = torch.as_tensor(eos_id, device=targets.device)                    # one id or several
    return (torch.isin(targets, ends) & (mask > 0)).any(dim=1)


# --------------------------------------------------------------------------------------------------
# Batches of rows

def batch_rows(n, batch_size, step, seed):
    """
    The rows of batch number `step` out of n, in a fresh order each epoch -> list of indices

    It depends on the step alone, so a resumed run has no cursor to lose. What is left over at the
    end of an epoch is dropped.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(f"got batch size {batch_size} for {n} rows; it must be from 1 to {n}")
    epoch, batch = divmod(step, n // batch_size)
    return epoch_order(n, seed, epoch)[batch * batch_size:(batch + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def epoch_order(n, seed, epoch):
    """The order of n rows in an epoch -> list of indices; drawn once, not for each batch"""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def draw(items, n, generator):
    """n of the items, drawn uniformly with replacement"""
    return [items[i] for i in torch.randint(len(items), (n,), generator=generator).tolist()]


def minibatches(n, size, epochs, generator):
    """Rows 0 to n - 1 in random minibatches, a fresh order each epoch -> (size,) indices of each"""
    for _ in range(epochs):
        yield from torch.randperm(n, generator=generator).split(size)


def microbatches(rows, n, weights=None):
    """
    Rows, a list or a tensor, in n parts of about one size -> (part, its share) of each

    A loss that is a mean over the rows is the sum of share * loss over the parts, so the gradients
    of these add up to that of the whole. If it is a mean over tokens, weights are the tokens of
    each row: a list, or a tensor (R,).
    """
    size = -(-len(rows) // n)
    weights = torch.ones(len(rows)) if weights is None else torch.as_tensor(weights)
    for i in range(0, len(rows), size):
        yield rows[i:i + size], weights[i:i + size].sum() / weights.sum()


class Means:
    """
    Means of metrics over the parts of a minibatch and over the minibatches of an update

        means.add(metrics, share)       # for every part; the shares of a minibatch sum to 1
        means.add({"lr": lr})           # once a minibatch
        means.result() -> {name: mean}
    """

    def __init__(self):
        self.values = {}                                 # {name: [(value, share)]}

    def add(self, metrics, share=1.0):
        for name, value in metrics.items():
            self.values.setdefault(name, []).append((value, share))      # .item() only at the end

    def result(self):
        means = {}
        for name, values in self.values.items():
            total = sum(float(share) for _, share in values)
            means[name] = sum(float(share) * float(value) for value, share in values) / total
        return means


# --------------------------------------------------------------------------------------------------
# What the stages train on: sequences of token lists, train and held out

def built_in_prompts():
    """The built-in task's prompts, as texts -> training prompts, held-out prompts"""
    prompts = reviews.all_prompts()
    held_out = [corpus.held_out(prompt.encode()) for prompt in prompts]
    return ([prompt for prompt, held in zip(prompts, held_out) if not held],
            [prompt for prompt, held in zip(prompts, held_out) if held])


@functools.lru_cache(maxsize=1)
def built_in_texts(n_texts, n_held_out, seed):
    """Reviews by the grammar -> (prompts, responses) to train on, the same held out"""
    train, held_out = built_in_prompts()
    return reviews.sample(n_texts, seed, train), reviews.sample(n_held_out, seed + 1, held_out)


def grammar_entropy(cfg):
    """The least nats per response that a model can have on the built-in task's held-out texts"""
    held_out = built_in_texts(cfg.n_texts, cfg.n_eval, cfg.seed)[1]
    return -sum(map(reviews.log_prob, *held_out)) / cfg.n_eval


def share_grammatical(cfg, samples):
    """The share of grammatical samples, (text, whether it ended) for each held-out prompt"""
    prompts, _ = built_in_texts(cfg.n_texts, cfg.n_eval, cfg.seed)[1]
    return sum(map(reviews.grammatical, prompts, *zip(*samples))) / cfg.n_eval


def some_texts(cfg, n, n_held_out):
    """Texts to train on, from which a tokenizer may be learned"""
    if cfg.data == "reviews":
        train, _ = built_in_texts(n, n_held_out, cfg.seed)
        return [prompt + response for prompt, response in zip(*train)]
    return corpus.some_texts(cfg.data, n)


def demonstrations(cfg, tokenizer, block_size, n, n_held_out):
    """-> train, held out, at most n and n_held_out: sequences of (prompt, better response)"""
    if cfg.data == "reviews":
        return [list(zip(*encode_texts(tokenizer, *texts)))
                for texts in built_in_texts(n, n_held_out, cfg.seed)]
    rows = corpus.rows_of(cfg, tokenizer, block_size)
    if not rows.answered.any():
        stop(f"--data {cfg.data} has prompts but no responses, so SFT has nothing to learn from. "
             "Run sft.py with --out NAME on data with responses. Then use --base NAME for RL or "
             "evaluation on these prompts")
    train, held_out = rows.split(rows.answered)
    read = lambda prompt, response, worse: (prompt, response)
    return corpus.Part(rows, train[:n], read), corpus.Part(rows, held_out[:n_held_out], read)


def comparisons(cfg, tokenizer, block_size, n, n_held_out):
    """-> train, held out, at most so many of {prompt_ids, response_ids: [better, worse]}"""
    rows = corpus.rows_of(cfg, tokenizer, block_size)
    if not rows.compared.any():
        stop_without_comparisons(cfg)
    train, held_out = rows.split(rows.compared)
    read = lambda prompt, *responses: {"prompt_ids": prompt, "response_ids": list(responses)}
    return corpus.Part(rows, train[:n], read), corpus.Part(rows, held_out[:n_held_out], read)


def prompts(cfg, tokenizer, block_size, n_eval=None):
    """-> training prompts, held-out prompts (n_eval different ones, or all): token lists"""
    if cfg.data == "reviews":
        train, held_out = ([encode_prompt(tokenizer, prompt) for prompt in part]
                           for part in built_in_prompts())
        longest = max(map(len, train + held_out))
    else:
        rows = corpus.rows_of(cfg, tokenizer, block_size)
        train, held_out = (corpus.Part(rows, part, lambda prompt, *responses: prompt)
                           for part in rows.split(rows.first))
        longest = cfg.max_prompt_tokens
    check_room(cfg, longest, block_size)
    if n_eval is None:
        return train, held_out
    check_n_eval(n_eval, len(held_out))
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(cfg.seed))
    return train, [held_out[i] for i in order[:n_eval].tolist()]


def check_source(source, flag="--data"):
    """Exit, before any work, unless this is the built-in task or can be a data set."""
    if source != "reviews":
        corpus.check_source(source, flag)


def check_comparisons(cfg):
    """Exit, before any work, if the files of --data have no comparison."""
    if cfg.data != "reviews" and not corpus.may_have_comparisons(cfg.data):
        stop_without_comparisons(cfg)


def stop_without_comparisons(cfg):
    stop(f"--data {cfg.data} has no comparisons, only rows with one response or none. A reward "
         "model and DPO learn from a better and a worse response to a prompt (chosen, rejected); "
         "without any, RL takes --reward path/to/file.py:function")


def check_n_eval(n_eval, n_held_out):
    if n_eval > n_held_out:
        stop(f"--n_eval {n_eval} (in sample.py --n) asks for more held-out prompts than the "
             f"{n_held_out} that there are; lower it, or take more data")


def check_room(cfg, longest, block_size):
    """Exit if the longest prompt and a response do not fit into what the model can read."""
    if longest + cfg.max_new_tokens > block_size:
        room = block_size - longest
        lower = f"lower --max_new_tokens to {room}" if room > 0 else "shorten the prompts"
        stop(f"prompts of up to {longest} tokens and --max_new_tokens {cfg.max_new_tokens} exceed "
             f"the model's block_size {block_size}; {lower}, or make the SFT stage "
             "again with a larger --block_size")


def check_minibatch(cfg):
    """Exit unless the minibatch size divides the batch size."""
    if cfg.batch_size % cfg.minibatch_size:
        fits = max(n for n in range(1, min(cfg.minibatch_size, cfg.batch_size) + 1)
                   if cfg.batch_size % n == 0)
        stop(f"--minibatch_size {cfg.minibatch_size} does not divide --batch_size "
             f"{cfg.batch_size}, so minibatches would differ in size; try {fits}")


def check_enough(n, batch_size, what):
    """Exit if there is less than one batch to train on."""
    if n < batch_size:
        stop(f"there are {n} {what} to train on, less than one batch; lower --batch_size "
             f"{batch_size} to that or less")
