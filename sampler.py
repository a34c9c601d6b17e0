"""
The sampler: a KV cache, prompts of any lengths, stops at EOS.

    generate    responses to prompts, and the mask of their tokens

It keeps to model.py's one layout. The prompts are prefilled, padded on the right. Each row's last
real position is read, and every new token, with its keys and values, goes to the row's own next
position. Finished rows are dropped from the batch.
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# The keys grow by a token each step. cuDNN's attention, which torch may prefer on new GPUs, would
# build a plan for every length, at some 30 ms each.
NO_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.no_grad()
@sdpa_kernel(NO_PLANS)
def generate(policy, prompts, max_new_tokens, eos_id, temperature=1.0, generator=None):
    """
    Sample a response to each prompt -> tokens (B, T+1), mask (B, T), aligned as in model.py

    prompts are lists of token ids of any lengths; an empty one becomes [eos_id]. If eos_id is a
    list, that is its first id, and a response ends with any of them. After max_new_tokens it ends
    without one. Only the temperature shapes the distribution, so it is the one that
    `token_logprobs` scores. Temperature 0 takes the likeliest token.

    Uniforms (B, max_new_tokens) are drawn once from `generator`, and tokens come by inverse CDF. So
    a row's sample depends neither on the other rows nor on when finished rows are dropped.
    """
    device = policy.transformer.wte.weight.device
    eos_ids = torch.as_tensor(eos_id, device=device).reshape(-1)
    if len(prompts) == 0 or len(eos_ids) == 0:
        raise ValueError(f"got {len(prompts)} prompts and {len(eos_ids)} EOS ids; wanted at least "
                         "one of each")
    prompts = [list(prompt) or [eos_ids[0].item()] for prompt in prompts]
    B = len(prompts)
    order = sorted(range(B), key=lambda i: len(prompts[i]))      # so groups have little padding
    prompts = [prompts[i] for i in order]
    longest = len(prompts[-1])
    width = longest + max_new_tokens
    if width > policy.config.block_size:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed "
                         f"block_size {policy.config.block_size}; cut the prompt or lower "
                         "max_new_tokens")
    uniforms = torch.rand(B, max_new_tokens, generator=generator)[order].to(device)
    tokens = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)         # (B,)
    ends = lengths + max_new_tokens                                          # (B,) past the last

    # Prefill: prompts of similar length at once, padded on the right. Nothing reads what padding
    # leaves in the caches: a row sees columns up to its own position, where its new tokens go.
    # Zeros, not uninitialised memory: a masked key still enters the product, and 0 * nan is nan.
    c = policy.config
    dtype = policy.transformer.wte.weight.dtype
    if c.dtype != "float32":
        dtype = getattr(torch, c.dtype)
    caches = [torch.zeros(2, B, c.n_kv_head, width, c.head_dim, device=device, dtype=dtype)
              for _ in range(c.n_layer)]
    rows = torch.arange(B, device=device)                                    # those not dropped yet
    hidden = []                                                              # of the last tokens
    for group in rows.split(max(8, -(-B // 4))):
        part = slice(int(group[0]), int(group[-1]) + 1)  # a view of the caches, not a copy
        x = policy.transformer(tokens[part, :int(lengths[group[-1]])],
                               [cache[:, part] for cache in caches])         # (b, t, C)
        hidden.append(x[rows[:len(x)], lengths[part] - 1])
    hidden = torch.cat(hidden)                                               # (B, C)

    done = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        positions = lengths[rows] + t                                        # of the new tokens
        new = pick(policy.lm_head(hidden), temperature, uniforms[rows, t])   # (rows,)
        tokens[rows, positions] = torch.where(done, 0, new)
        ended = torch.isin(new, eos_ids)
        ends[rows] = torch.where(~done & ended, positions + 1, ends[rows])
        done |= ended
        running = int((~done).sum())
        if running == 0 or t + 1 == max_new_tokens:
            break
        if running <= 0.75 * len(rows):                  # drop finished rows a quarter at a time
            caches = [cache[:, ~done] for cache in caches]
            rows, positions, new, done = [x[~done] for x in (rows, positions, new, done)]
        hidden = policy.transformer(new[:, None], caches, positions)[:, 0]

    back = torch.tensor(order, device=device).argsort()
    tokens, lengths, ends = tokens[back, :max(int(ends.max()), 2)], lengths[back], ends[back]
    columns = torch.arange(1, tokens.shape[1], device=device)                # of targets, in tokens
    return tokens, ((columns >= lengths[:, None]) & (columns < ends[:, None])).float()


def pick(logits, temperature, uniforms):
    """The token where the cumulative distribution passes the uniform: (B, V), (B,) -> (B,)"""
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = (logits.float() / temperature).softmax(dim=-1).cumsum(dim=-1)              # (B, V)
    level = uniforms[:, None] * cumulative[:, -1:]       # the sum may miss 1 by rounding
    new = torch.searchsorted(cumulative, level, right=True).squeeze(1)       # (B,)
    return new.clamp_max(logits.shape[-1] - 1)
