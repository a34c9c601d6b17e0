"""
The models: one small GPT, shared by every stage.

    GPT                 a transformer with its language-model head: actor and reference
    ScalarGPT           the same trunk with one number per position: reward model and critic
    add_lora            train a low-rank change of the weights, not the weights themselves
    reference_of        a frozen copy of a policy

    masked_mean         the mean that every loss and metric goes through
    token_logprobs      log pi(targets | inputs), computed only where the mask asks for it
    sequence_scores     the scalar in the state after the last response token

There is one alignment, padded on the right only:

    tokens   (B, T+1)   p0 p1 p2 r0 r1 EOS pad pad
    inputs   (B, T)     p0 p1 p2 r0 r1 EOS pad          tokens[:, :-1]
    targets  (B, T)     p1 p2 r0 r1 EOS pad pad         tokens[:, 1:]
    mask     (B, T)     0  0  1  1  1   0   0           1 where the target is a response token

Column t means: having read inputs[:, :t+1], the policy chose targets[:, t]. Cells after a row's end
hold 0, a valid id that nothing reads: causal attention never looks right, so no forward needs an
attention mask or position ids, and the mask keeps these cells out of every mean.

If you know GPT-2, this is what Llama, Qwen2 and Qwen3 change, each by a field of GPTConfig:
RMSNorm subtracts no mean and has no bias. There are no learned positions: RoPE turns each query and
key by an angle that grows with its position, so their product depends on their distance. Several
query heads share one head of keys and values. The MLP multiplies two projections, silu(gate) * up.
Matrices have no biases, except Qwen2's q, k and v. Qwen3 also normalises each head's q and k.
"""

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lab import families

LORA_SCALE = 2.0                # alpha / r, which multiplies the low-rank change
LOGITS_AT_ONCE = 2 ** 26        # 256 MiB in fp32; more are computed one part at a time


@dataclass
class GPTConfig:
    vocab_size: int = 50257    # token ids
    block_size: int = 1024     # longest row of tokens that the model can read
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0       # in SFT only: every later stage runs in eval mode
    dtype: str = "float32"     # matrix products of the blocks; bfloat16 and float16 by autocast
    checkpointing: bool = False         # recompute blocks in the backward pass: less memory
    activation: Literal["gelu_tanh", "gelu", "swiglu"] = "gelu_tanh"    # gelu is nanoGPT's
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    positions: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10000.0         # RoPE's base: nearly its longest wavelength / 2 pi
    rope_scaling: list | None = None    # Llama 3's factor, low, high, original context; none: off
    n_kv_head: int | None = None        # heads of keys and values; none: n_head
    head_dim: int | None = None         # width of a head; none: n_embd / n_head
    n_inner: int | None = None          # width inside the MLP; none: 4 n_embd, or 8/3 in swiglu
    bias: bool = True                   # whether matrices have biases
    qkv_bias: bool = False              # whether q, k and v have biases anyway
    qk_norm: bool = False               # RMSNorm of every head's queries and keys
    tied_head: bool = True              # logits by the token embedding
    vocab_rows: int | None = None       # rows of a file's embedding, some without a token
    n_positions: int | None = None      # positions that a file's weights can read

    def __post_init__(self):
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_kv_head = self.n_kv_head or self.n_head
        usual = -(-self.n_embd // 3) * 8 if self.activation == "swiglu" else 4 * self.n_embd
        self.n_inner = self.n_inner or usual             # either way 8 n_embd^2 weights in the MLP
        self.vocab_rows = self.vocab_rows or self.vocab_size
        self.n_positions = self.n_positions or self.block_size
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must be a multiple of n_kv_head "
                             f"{self.n_kv_head}")


# Dialects that fresh weights can have: sft.py --architecture
LLAMA = dict(norm="rmsnorm", activation="swiglu", positions="rope", bias=False)
ARCHITECTURES = {"gpt2": {}, "llama": LLAMA, "qwen3": LLAMA | dict(qk_norm=True, norm_eps=1e-6)}


# --------------------------------------------------------------------------------------------------
# The architecture; modules are named as in transformers' GPT-2

class Linear(nn.Linear):
    """
    x W^T + b, and once it has LoRA also LORA_SCALE x A^T B^T  (Hu et al. 2021, section 4.1)

    n_out may be several widths, for matrices stacked into one; each has its own change.
    """

    def __init__(self, n_in, *n_out, bias=True):
        super().__init__(n_in, sum(n_out), bias)
        self.n_out = n_out
        self.lora_a = self.lora_b = None                 # per matrix: (r, n_in), (n_out, r)

    def forward(self, x):
        y = super().forward(x)
        if self.lora_a is None:
            return y
        changes = [x @ a.T @ b.T for a, b in zip(self.lora_a, self.lora_b)]
        return y + LORA_SCALE * torch.cat(changes, dim=-1)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps), times a weight, in float32  (Zhang and Sennrich 2019)"""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


def norm(config, n):
    kind = nn.LayerNorm if config.norm == "layernorm" else RMSNorm
    return kind(n, eps=config.norm_eps)


def rope(config, positions):
    """
    cos, sin (.., head_dim) of the angle by which RoPE turns a query or key at a position

    angle = position * theta^(-2 i / head_dim) for the pair of dimensions i and i + head_dim / 2
    (Su et al. 2021, equation 15). Llama 3 divides by `factor` the frequencies that turn less than
    `low` times in the original context, keeps those above `high`, and interpolates between.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequencies = 1.0 / config.rope_theta ** (pairs / config.head_dim)       # (head_dim/2,)
    if config.rope_scaling:
        factor, low, high, context = config.rope_scaling
        turns = context * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)                             # (.., head_dim)
    if angles.dim() == 3:                                # one position a row: the same in all heads
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """(B, heads, T, head_dim), each pair of dimensions turned by its angle"""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, n_kv = config.head_dim, config.n_kv_head
        self.n_kv, self.d = n_kv, d
        self.dropout = config.dropout
        self.widths = (config.n_head * d, n_kv * d, n_kv * d)
        self.c_attn = Linear(config.n_embd, *self.widths, bias=config.bias or config.qkv_bias)
        self.c_proj = Linear(config.n_head * d, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(d, eps=config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, turn=None, cache=None, positions=None, visible=None):
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, -1, self.d).transpose(1, 2)                  # (B, heads, T, d)
                   for y in self.c_attn(x).split(self.widths, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if positions is None:                            # whole rows, from column 0
            if cache is not None:
                cache[0, :, :, :T] = k
                cache[1, :, :, :T] = v
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0,
                enable_gqa=q.shape[1] > self.n_kv)
            y = y.transpose(1, 2)                                            # (B, T, heads, d)
        else:                                            # one token a row, each at its own position
            rows = torch.arange(B, device=x.device)
            cache[0, rows, :, positions] = k[:, :, 0]
            cache[1, rows, :, positions] = v[:, :, 0]
            keys, values = cache[:, :, :, :visible.shape[-1]]                # (B, n_kv, columns, d)
            q = q.reshape(B, self.n_kv, -1, self.d)      # grouped by the key head they share
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gated = config.activation == "swiglu"       # then c_fc is gate and up
        widths = [config.n_inner, config.n_inner] if self.gated else [config.n_inner]
        self.c_fc = Linear(config.n_embd, *widths, bias=config.bias)
        self.c_proj = Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.approximate = "none" if config.activation == "gelu" else "tanh"

    def forward(self, x):
        if self.gated:
            gate, up = self.c_fc(x).chunk(2, dim=-1)
            return self.c_proj(F.silu(gate) * up)
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config, config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, *context):
        x = x + self.drop(self.attn(self.ln_1(x), *context))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_rows, config.n_embd)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config, config.n_embd)
        for name, p in self.named_parameters():          # GPT-2's initialisation
            if p.dim() == 2:
                std = 0.02
                if name.endswith("c_proj.weight"):     # adds to the residual stream
                    std = 0.02 / math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids, caches=None, positions=None):
        """
        caches, one (2, B, n_kv_head, width, head_dim) per layer, are filled with keys and values.
        With positions (B,) too, ids is one token per row, which reads them up to its own position.
        """
        T = ids.shape[1]
        if T > self.config.block_size:
            raise ValueError(f"got rows of {T} tokens; the model reads at most block_size = "
                             f"{self.config.block_size}")
        turn = visible = None
        x = self.wte(ids)                                                    # (B, T, C)
        at = torch.arange(T, device=ids.device)          # whole rows, from column 0
        if positions is not None:                        # T is 1
            at = positions[:, None]                      # (B, 1)
            columns = torch.arange(int(positions.max()) + 1, device=ids.device)
            visible = (columns <= at)[:, None, None]     # (B, 1, 1, columns)
        if self.config.positions == "rope":
            turn = rope(self.config, at)                 # cos, sin (T, d) or (B, 1, 1, d)
        else:
            x = x + self.wpe(at)
        x = self.drop(x)
        with autocast(self.config, ids.device):
            for block, cache in zip(self.h, caches or [None] * len(self.h)):
                if self.config.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, turn, use_reentrant=False)
                else:
                    x = block(x, turn, cache, positions, visible)
        return self.ln_f(x)


def autocast(config, device):
    """Matrix products in config.dtype; the residual stream and the norms stay in float32"""
    half = config.dtype != "float32"
    return torch.autocast(device.type, getattr(torch, config.dtype) if half else None, enabled=half)


class GPT(nn.Module):
    """`transformer` gives hidden states; `lm_head`, often the token embedding, their logits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        if not config.tied_head:
            self.output = nn.Linear(config.n_embd, config.vocab_rows, bias=False)

    def lm_head(self, hidden):
        """Always in float32: at logits of -100, bfloat16 is off by half a nat."""
        table = self.transformer.wte if self.config.tied_head else self.output
        return hidden @ table.weight[:self.config.vocab_size].T

    def forward(self, ids):
        """(B, T) ids -> (B, T, V) logits of the token after ids[:, t]"""
        return self.lm_head(self.transformer(ids))

    @classmethod
    def from_pretrained(cls, source, **changes):
        """
        GPT-2, Llama, Qwen2 or Qwen3: a folder of transformers, a name on the hub, or nanoGPT's
        ckpt.pt. changes are fields of GPTConfig; block_size and vocab_size keep the first positions
        or ids. A weight that is missing, unknown or of a different shape is an error.
        """
        fields, weights = families.load(source, changes)
        with torch.device("meta"):                       # no memory, no random numbers
            model = cls(GPTConfig(**fields))
        families.assign(model, weights)
        return model

    def save_pretrained(self, folder, eos_id=None):
        """Write config.json and model.safetensors for transformers' AutoModelForCausalLM."""
        families.save(folder, asdict(self.config), merged(self.state_dict()), eos_id)


class ScalarGPT(nn.Module):
    """
    The trunk with one number per position, gain * head(hidden) + bias: (B, T) ids -> (B, T)

    As a reward model its head starts at random with standard deviation 1 / sqrt(n_embd + 1), and
    gain and bias normalise its scores (Ziegler et al. 2019). As a critic its head starts at zero,
    so V = 0 at first.
    """

    def __init__(self, config, init_from=None, zero_head=False):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.head = nn.Linear(config.n_embd, 1)
        std = 0.0 if zero_head else 1 / math.sqrt(config.n_embd + 1)
        nn.init.normal_(self.head.weight, std=std)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("gain", torch.tensor(1.0))
        self.register_buffer("bias", torch.tensor(0.0))
        if init_from is not None:                        # a GPT or another ScalarGPT
            self.transformer.load_state_dict(merged(init_from.transformer.state_dict()))

    def normalise(self, gain, bias):
        self.gain.fill_(gain)
        self.bias.fill_(bias)

    def forward(self, ids):
        return self.gain * self.head(self.transformer(ids)).squeeze(-1).float() + self.bias

    def save_pretrained(self, folder, eos_id=None):
        """
        Write config.json and model.safetensors for AutoModelForSequenceClassification, one label.

        Its head is w.h, without gain or bias; h = g n + d is the output of the last layer norm.
        With w = gain head.weight and d moved by (gain head.bias + bias) w / |w|^2 it gives the same
        number. An RMSNorm has no d: there the scores lack the constant, and config.json says so.
        """
        w = self.gain * self.head.weight                                     # (1, C)
        constant = self.gain * self.head.bias + self.bias                    # (1,)
        weights = merged(self.state_dict())
        if self.config.norm == "layernorm":
            shift = constant * w[0] / w.square().sum().clamp_min(1e-30)      # (C,)
            weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"] + shift
            constant = torch.zeros(1)
        families.save(folder, asdict(self.config), weights, eos_id, w, constant.item())


# --------------------------------------------------------------------------------------------------
# LoRA: the weights stay frozen, and a low-rank change of them is trained

def add_lora(model, rank):
    """
    Freeze the trunk; give each matrix of attention and MLP a trainable change B A of this rank

    W x + LORA_SCALE B A x, with A (r, n_in) Gaussian and B (n_out, r) zero, so nothing changes at
    first (Hu et al. 2021, section 4.1). A head on the trunk stays trainable. Rank 0 does nothing.
    -> the same model
    """
    if rank == 0:
        return model
    model.transformer.requires_grad_(False)
    for layer in model.transformer.modules():
        if isinstance(layer, Linear):
            n_in = layer.in_features
            a = [torch.randn(rank, n_in) / math.sqrt(n_in) for _ in layer.n_out]
            layer.lora_a = nn.ParameterList(x.to(layer.weight) for x in a)
            layer.lora_b = nn.ParameterList(layer.weight.new_zeros(n, rank) for n in layer.n_out)
    return model


def merged(weights):
    """A state_dict with every low-rank change added to its weight"""
    changes = {}                                         # {name of the weight: its parts' changes}
    for name, a in weights.items():
        stem, _, part = name.partition("lora_a")
        if "lora_a" in name:
            change = LORA_SCALE * weights[f"{stem}lora_b{part}"] @ a
            changes.setdefault(stem + "weight", []).append(change)
    weights = {name: x for name, x in weights.items() if "lora_" not in name}
    for name, parts in changes.items():
        weights[name] = weights[name] + torch.cat(parts)
    return weights


def reference_of(policy):
    """A frozen copy of a policy; with LoRA it shares the base weights, which never change"""
    weights = policy.state_dict()
    frozen = any("lora_a" in name for name in weights)
    with torch.device("meta"):                           # no memory, no random numbers
        reference = type(policy)(policy.config)
    reference.load_state_dict({name: w if frozen else w.clone() for name, w in weights.items()
                               if "lora" not in name}, assign=True)
    return reference.requires_grad_(False).eval()


def trained(model):
    """The parameters to optimise: all, or with LoRA only the changes and a head"""
    return [p for p in model.parameters() if p.requires_grad]


# --------------------------------------------------------------------------------------------------
# What every stage uses

def masked_mean(x, mask):
    """
    sum(x mask) / sum(mask) -> 0-d; the mask may hold fractional weights, but not only zeros

    >>> masked_mean(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    tensor(1.5000)
    """
    total = mask.sum()
    if total == 0:
        raise ValueError("masked_mean got a mask of zeros: there is nothing to take the mean of")
    return (x * mask).sum() / total


def token_logprobs(policy, inputs, targets, mask, temperature=1.0, return_entropy=False):
    """
    log pi(targets[:, t] | inputs[:, :t+1]) -> (B, T), 0 where the mask is 0

    pi is the softmax of logits / temperature over the whole vocabulary, the distribution that the
    sampler draws from, in fp32. Only masked columns go through the output head. If they make more
    than LOGITS_AT_ONCE logits they go in parts, which the backward pass recomputes. With
    return_entropy also the entropy of pi in nats -> (B, T). Both carry gradients.
    """
    if temperature <= 0:
        raise ValueError(f"got temperature {temperature}; log-probabilities need one above 0")
    in_response = mask > 0                                                   # (B, T)
    hidden = policy.transformer(inputs)[in_response]                         # (N, C)
    chosen = targets[in_response]                                            # (N,)

    def of_part(hidden, chosen):
        logits = policy.lm_head(hidden).float() / temperature                # (n, V)
        logprobs = -F.cross_entropy(logits, chosen, reduction="none")        # (n,)
        if not return_entropy:
            return [logprobs]
        log_pi = logits.log_softmax(dim=-1)                                  # (n, V)
        return [logprobs, -(log_pi.exp() * log_pi).sum(dim=-1)]

    rows = max(1, LOGITS_AT_ONCE // policy.config.vocab_size)
    parts = list(zip(hidden.split(rows), chosen.split(rows)))
    if len(parts) > 1 and torch.is_grad_enabled():
        computed = [checkpoint(of_part, *part, use_reentrant=False) for part in parts]
    else:
        computed = [of_part(*part) for part in parts]
    results = []
    for x in zip(*computed):
        result = torch.zeros(mask.shape, device=mask.device)                 # (B, T)
        result[in_response] = torch.cat(x)
        results.append(result)
    return tuple(results) if return_entropy else results[0]


def sequence_scores(reward_model, inputs, targets, mask):
    """
    The reward model's number in the state after each row's last response token -> (B,)

    That state has read the last masked target, so it is one column further on, in unshifted tokens.
    """
    tokens = torch.cat([inputs, targets[:, -1:]], dim=1)                     # (B, T+1)
    columns = torch.arange(1, tokens.shape[1], device=mask.device)           # of targets, in tokens
    last = (columns * (mask > 0)).amax(dim=1)                                # (B,)
    if (last == 0).any():
        raise ValueError(f"row {int((last == 0).nonzero()[0])} has no response token to read the "
                         "score after")
    return reward_model(tokens).gather(1, last[:, None]).squeeze(1)
