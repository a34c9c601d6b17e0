"""
The models: one small GPT, shared by every stage.

    GPT                 GPT-2's architecture with its language-model head: actor and reference
    ScalarGPT           the same trunk with one number per position: reward model and critic
    add_lora            train a low-rank change of the weights, not the weights themselves
    reference_of        a frozen copy of a policy

    masked_mean         the mean that every loss and metric goes through
    token_logprobs      log pi(targets | inputs), computed only where the mask asks for it
    sequence_scores     the scalar in the state after the last response token
    generate            the sampler: KV cache, prompts of any lengths, stops at EOS

There is one alignment, padded on the right only:

    tokens   (B, T+1)   p0 p1 p2 r0 r1 EOS pad pad
    inputs   (B, T)     p0 p1 p2 r0 r1 EOS pad          tokens[:, :-1]
    targets  (B, T)     p1 p2 r0 r1 EOS pad pad         tokens[:, 1:]
    mask     (B, T)     0  0  1  1  1   0   0           1 where the target is a response token

Column t means: having read inputs[:, :t+1], the policy chose targets[:, t]. Cells after a row's end
hold 0, a valid id that nothing reads: causal attention never looks right, so no forward needs an
attention mask or position ids, and the mask keeps these cells out of every mean.
"""

import math
import re
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lab import pretrained

LORA_SCALE = 2.0                # alpha / r, which multiplies the low-rank change
# The sampler's keys grow by a token each step. cuDNN's attention, which torch may prefer on new
# GPUs, would build a plan for every length, at some 30 ms each.
NO_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LOGITS_AT_ONCE = 2 ** 26        # 256 MiB in fp32; more are computed one part at a time


@dataclass
class GPTConfig:
    vocab_size: int = 50257
    block_size: int = 1024     # longest row of tokens that the model can read
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0       # in SFT only: every later stage runs in eval mode
    dtype: str = "float32"     # matrix products of the blocks; bfloat16 by autocast
    checkpointing: bool = False         # recompute blocks in the backward pass: less memory
    activation: str = "gelu_tanh"       # GPT-2's approximation; nanoGPT has the exact gelu


# --------------------------------------------------------------------------------------------------
# The architecture; modules are named as in transformers' GPT-2, so that weights go in and out

class Linear(nn.Linear):
    """x W^T + b, and once it has LoRA also LORA_SCALE x A^T B^T  (Hu et al. 2021, section 4.1)"""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.lora_a = self.lora_b = None                 # (r, n_in), (n_out, r)

    def forward(self, x):
        y = super().forward(x)
        return y if self.lora_a is None else y + LORA_SCALE * (x @ self.lora_a.T @ self.lora_b.T)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "n_embd must be a multiple of n_head"
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, positions=None, visible=None):
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)           # (B, heads, T, C/heads) each
        if positions is None:                            # whole rows, from column 0
            if cache is not None:
                cache[0, :, :, :T] = k
                cache[1, :, :, :T] = v
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        else:                                            # one token a row, each at its own position
            rows = torch.arange(B, device=x.device)
            cache[0, rows, :, positions] = k[:, :, 0]
            cache[1, rows, :, positions] = v[:, :, 0]
            keys, values = cache[:, :, :, :visible.shape[-1]]
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.approximate = {"gelu_tanh": "tanh", "gelu": "none"}[config.activation]

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, *cache):
        x = x + self.drop(self.attn(self.ln_1(x), *cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    """Token ids (B, T) -> hidden states (B, T, C)"""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
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
        caches, one (2, B, heads, width, C/heads) a layer, are filled with keys and values. With
        positions (B,) too, ids is one token a row, which reads them up to its own position.
        """
        T = ids.shape[1]
        visible = None
        if T > self.config.block_size:
            raise ValueError(f"got rows of {T} tokens, the model reads at most block_size = "
                             f"{self.config.block_size}")
        if positions is None:
            x = self.wte(ids) + self.wpe.weight[:T]                          # (B, T, C)
        else:
            x = self.wte(ids) + self.wpe(positions)[:, None]                 # (B, 1, C)
            columns = torch.arange(int(positions.max()) + 1, device=ids.device)
            visible = (columns <= positions[:, None])[:, None, None]         # (B, 1, 1, columns)
        x = self.drop(x)
        with autocast(self.config, ids.device):
            for block, cache in zip(self.h, caches or [None] * len(self.h)):
                if self.config.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x, cache, positions, visible)
        return self.ln_f(x)


def autocast(config, device):
    """bfloat16 matrix products if the config asks for them; residual stream and norms in float32"""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16")


class GPT(nn.Module):
    """`transformer` gives hidden states; `lm_head`, tied to the token embedding, their logits."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)

    def lm_head(self, hidden):
        """Always in float32: at logits of -100, bfloat16 is off by half a nat."""
        return hidden @ self.transformer.wte.weight.T

    def forward(self, ids):
        """(B, T) ids -> (B, T, V) logits of the token after ids[:, t]"""
        return self.lm_head(self.transformer(ids))

    @classmethod
    def from_pretrained(cls, source, **changes):
        """
        GPT-2 weights: a folder that transformers saved, its name on the hub, or nanoGPT's ckpt.pt

        changes are fields of GPTConfig. block_size and vocab_size take the first positions or token
        ids; more than the weights have is an error. So is a weight that is missing, unknown, or of
        a different shape.
        """
        theirs, weights = pretrained.read(source)
        nanogpt = theirs.get("model_type") == "nanogpt"
        stored = nanogpt_config(theirs) if nanogpt else gpt2_like(theirs)
        c = replace(stored, **changes)
        if c.block_size > stored.block_size:
            raise ValueError(f"block_size {c.block_size} is longer than the {stored.block_size} "
                             f"positions that {source} has weights for; lower it to that or less")
        if c.vocab_size > stored.vocab_size:
            raise ValueError(f"the tokenizer has {c.vocab_size} token ids, {source} has weights "
                             f"for {stored.vocab_size}; they do not belong together")
        weights = trunk_of(weights)
        if not nanogpt:
            weights = transposed(weights)
        with torch.device("meta"):
            whole = Transformer(stored)
        if nanogpt and not theirs.get("bias", True):     # biases of zero do the same
            for name, parameter in whole.named_parameters():
                if name.endswith("bias"):
                    weights.setdefault(name, torch.zeros(parameter.shape))
        copy_weights(weights, whole)                     # on "meta" this only compares
        weights["wpe.weight"] = weights["wpe.weight"][:c.block_size]
        weights["wte.weight"] = weights["wte.weight"][:c.vocab_size]
        model = cls(c)
        copy_weights(weights, model.transformer)
        return model

    def save_pretrained(self, folder, eos_id=None):
        """Write config.json and model.safetensors for transformers' AutoModelForCausalLM."""
        from transformers import GPT2LMHeadModel
        theirs = GPT2LMHeadModel(gpt2_config(self.config, eos_id))
        copy_weights(transposed(merged(self.transformer.state_dict())), theirs.transformer)
        theirs.save_pretrained(folder)


GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
         "gelu": "gelu", "gelu_python": "gelu"}          # transformers' names, and ours
SIZES = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer",
         "n_head": "n_head", "n_embd": "n_embd", "max_position_embeddings": "block_size",
         "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd"}


def gpt2_like(theirs):
    """A config.json -> GPTConfig. Keys that old files lack are as in GPT-2."""
    sizes = {SIZES[key]: value for key, value in theirs.items() if key in SIZES}
    computed = {
        "model_type": ["gpt2"], "activation_function": list(GELUS),
        "n_inner": [None, 4 * sizes.get("n_embd", GPTConfig.n_embd)],
        "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
        "add_cross_attention": [False], "tie_word_embeddings": [True], "layer_norm_epsilon": [1e-5]}
    for key, values in computed.items():
        if theirs.get(key, values[0]) not in values:
            raise ValueError("this is a variant of GPT-2 that model.py does not compute: its config"
                             f" has {key} {theirs[key]!r}, wanted {' or '.join(map(repr, values))}")
    return GPTConfig(**sizes, activation=GELUS[theirs.get("activation_function", "gelu_new")])


def nanogpt_config(theirs):
    """The model_args of a checkpoint of nanoGPT -> GPTConfig"""
    sizes = {key: x for key, x in theirs.items() if key not in ("model_type", "bias", "dropout")}
    unknown = sizes.keys() - SIZES.values()
    if unknown:
        raise ValueError("this is a variant of nanoGPT that model.py does not compute: it has "
                         f"{', '.join(sorted(map(str, unknown)))} in its model_args")
    return GPTConfig(**sizes, activation="gelu")


def trunk_of(weights):
    """
    The weights of a language model under the trunk's names; a trunk saved alone has no prefix

    Without the causal masks of old files, and without a head that repeats the token embedding.
    """
    trunk = {name.removeprefix("transformer."): weight for name, weight in weights.items()
             if not re.fullmatch(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", name)}
    head = trunk.pop("lm_head.weight", None)
    if head is not None and not torch.equal(trunk.setdefault("wte.weight", head), head):
        raise ValueError("lm_head.weight differs from wte.weight; model.py computes a GPT-2 that "
                         "uses one table for both")
    return trunk


def transposed(weights):
    """Between our Linear and transformers' Conv1D, which stores its matrix the other way around"""
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: weight.T if name.endswith(conv1d) and weight.dim() == 2 else weight
            for name, weight in weights.items()}


def gpt2_config(c, eos_id, **more):
    """Our GPTConfig -> transformers' GPT2Config"""
    from transformers import GPT2Config
    activation = "gelu" if c.activation == "gelu" else "gelu_new"
    config = GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer,
                        n_head=c.n_head, n_embd=c.n_embd, resid_pdrop=c.dropout,
                        embd_pdrop=c.dropout, attn_pdrop=c.dropout, activation_function=activation,
                        bos_token_id=eos_id, eos_token_id=eos_id)
    config.update(more)
    return config


def copy_weights(weights, trunk):
    """Copy weights into a trunk, ours or transformers'; all names and shapes must match."""
    target = trunk.state_dict()
    missing = sorted(target.keys() - weights.keys())
    unknown = sorted(weights.keys() - target.keys())
    if missing or unknown:
        raise ValueError(f"the weights are not those of a GPT-2 of {len(trunk.h)} layers: missing "
                         f"are {', '.join(missing[:5]) or 'none'}; unknown are "
                         f"{', '.join(unknown[:5]) or 'none'}")
    for name, weight in weights.items():
        if weight.shape != target[name].shape or not weight.is_floating_point():
            raise ValueError(f"{name}: got {tuple(weight.shape)} of {weight.dtype}, wanted "
                             f"{tuple(target[name].shape)} of floats")
        target[name].copy_(weight)


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
        number. It reads the score before the first pad token, so one more token id is the pad.
        """
        from transformers import GPT2ForSequenceClassification
        vocab_size = self.config.vocab_size
        theirs = GPT2ForSequenceClassification(gpt2_config(
            self.config, eos_id, vocab_size=vocab_size + 1, pad_token_id=vocab_size, num_labels=1,
            reads_eos=True))
        w = self.gain * self.head.weight                                     # (1, C)
        constant = self.gain * self.head.bias + self.bias                    # (1,)
        weights = merged(self.transformer.state_dict())
        shift = constant * w[0] / w.square().sum().clamp_min(1e-30)          # (C,)
        weights["ln_f.bias"] = weights["ln_f.bias"] + shift
        weights["wte.weight"] = F.pad(weights["wte.weight"], (0, 0, 0, 1))   # (V+1, C)
        copy_weights(transposed(weights), theirs.transformer)
        theirs.score.weight.data.copy_(w)
        theirs.save_pretrained(folder)


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
            n_out, n_in = layer.weight.shape
            a = torch.randn(rank, n_in) / math.sqrt(n_in)
            layer.lora_a = nn.Parameter(a.to(layer.weight))
            layer.lora_b = nn.Parameter(layer.weight.new_zeros(n_out, rank))
    return model


def merged(weights):
    """A state_dict with every low-rank change added to its weight"""
    weights = dict(weights)
    for name in [name for name in weights if name.endswith("lora_a")]:
        stem = name.removesuffix("lora_a")
        change = LORA_SCALE * weights.pop(stem + "lora_b") @ weights.pop(name)
        weights[stem + "weight"] = weights[stem + "weight"] + change
    return weights


def reference_of(policy):
    """
    A frozen copy of a policy

    With LoRA the base weights never change, so the reference shares them and costs no memory.
    """
    weights = policy.state_dict()
    frozen = any(name.endswith("lora_a") for name in weights)
    with torch.device("meta"):                           # no memory, no random numbers
        reference = type(policy)(policy.config)
    reference.load_state_dict({name: w if frozen else w.clone() for name, w in weights.items()
                               if "lora" not in name}, assign=True)
    return reference.requires_grad_(False).eval()


def trained(model):
    """The parameters to optimise: all, or with LoRA the change and a head"""
    return [p for p in model.parameters() if p.requires_grad]


# --------------------------------------------------------------------------------------------------
# What every stage uses

def masked_mean(x, mask):
    """
    sum(x mask) / sum(mask) -> 0-d; the mask may hold fractional weights, but not zeros only

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

    pi is the softmax of logits / temperature over the whole vocabulary, the distribution that
    `generate` samples from, in fp32. Only masked columns go through the output head. If they make
    more than LOGITS_AT_ONCE logits they go in parts, which the backward pass computes again. With
    return_entropy also the entropy of pi in nats -> (B, T). Both carry gradients.
    """
    if temperature <= 0:
        raise ValueError(f"got temperature {temperature}; log-probabilities take one above 0")
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


@torch.no_grad()
@sdpa_kernel(NO_PLANS)
def generate(policy, prompts, max_new_tokens, eos_id, temperature=1.0, generator=None):
    """
    Sample a response to each prompt -> tokens (B, T+1), mask (B, T), aligned as drawn above

    prompts are lists of token ids of any lengths; an empty one becomes [eos_id]. A response ends
    with EOS, or without it after max_new_tokens. Only the temperature shapes the distribution, so
    it is the one that `token_logprobs` scores. Temperature 0 takes the likeliest token.

    Uniforms (B, max_new_tokens) are drawn once from `generator`, and tokens come by inverse CDF. So
    a row's sample depends neither on the other rows nor on when finished rows are dropped.
    """
    device = policy.transformer.wte.weight.device
    prompts = [list(prompt) or [eos_id] for prompt in prompts]
    B = len(prompts)
    longest = max(map(len, prompts))
    width = longest + max_new_tokens
    if width > policy.config.block_size:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed "
                         f"block_size {policy.config.block_size}; cut the prompt or lower "
                         "max_new_tokens")
    uniforms = torch.rand(B, max_new_tokens, generator=generator).to(device)
    tokens = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)         # (B,)
    ends = lengths + max_new_tokens                                          # (B,) past the last

    # Prefill: all prompts at once, padded on the right. Nothing ever reads what the padding leaves
    # in the caches: a row sees columns up to its own position, and its new tokens overwrite them.
    # Zeros, not uninitialised memory: a masked key still enters the product, and 0 * nan is nan.
    c = policy.config
    dtype = torch.bfloat16 if c.dtype == "bfloat16" else policy.transformer.wte.weight.dtype
    caches = [torch.zeros(2, B, c.n_head, width, c.n_embd // c.n_head, device=device, dtype=dtype)
              for _ in range(c.n_layer)]
    rows = torch.arange(B, device=device)                                    # those not dropped yet
    hidden = policy.transformer(tokens[:, :longest], caches)[rows, lengths - 1]             # (B, C)

    done = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        positions = lengths[rows] + t                                        # of the new tokens
        new = pick(policy.lm_head(hidden), temperature, uniforms[rows, t])   # (rows,)
        tokens[rows, positions] = torch.where(done, 0, new)
        ends[rows] = torch.where(~done & (new == eos_id), positions + 1, ends[rows])
        done |= new == eos_id
        running = int((~done).sum())
        if running == 0 or t + 1 == max_new_tokens:
            break
        if running <= 0.75 * len(rows):                  # drop finished rows a quarter at a time
            caches = [cache[:, ~done] for cache in caches]
            rows, positions, new, done = [x[~done] for x in (rows, positions, new, done)]
        hidden = policy.transformer(new[:, None], caches, positions)[:, 0]

    tokens = tokens[:, :max(int(ends.max()), 2)]
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
