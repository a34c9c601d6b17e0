"""
Stage 1: supervised fine-tuning.

    1. texts        (prompt, response) token lists, of the built-in film reviews or of --data, and
                    their tokenizer
    2. model        a GPT with fresh weights, or with --init those of GPT-2, Llama, Qwen, SmolLM2
    3. train        minimise  - mean over response tokens of log pi(y_t | x, y_<t)
                    prompt tokens carry no loss, EOS does
    4. held out     nats per response on texts of prompts never trained on, and samples. On the
                    built-in task no model can get below the grammar's entropy E[- log p(y | x)]

Departures from InstructGPT (Ouyang et al. 2022, section 3.5), whose SFT starts from GPT-3 and runs
16 epochs: on the built-in task nothing is pretrained, and two to three epochs are enough. With
--steps 0 the weights of --init are used as they are: an instruct model needs no SFT.

    python sft.py --config small
        -> out/small/sft/checkpoint.pt, the policy that every later stage starts from
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import data
from lab import files, pretrained
from lab.chat import jinja_of, set_chat
from lab.config import COUNT_FROM_0, Common
from lab.run import (Run, check_finite, launch, learning_rate, self_contained, set_learning_rate,
                     stop)
from lab.tokenizer import (check_vocabulary, decode_response, export_tokenizer, load_tokenizer,
                           pretrained_tokenizer, train_tokenizer)
from model import (ARCHITECTURES, GPT, GPTConfig, add_lora, masked_mean, merged, token_logprobs,
                   trained)
from presets import presets_of
from sampler import generate


@dataclass
class Config(Common):
    init: str = ""                  # folder, hub name or nanoGPT ckpt.pt to start from; else fresh
    architecture: Literal["gpt2", "llama", "qwen3"] = "gpt2"        # family of fresh weights
    n_layer: int = 2                # transformer blocks, if the weights are fresh
    n_head: int = 4                 # attention heads, if the weights are fresh
    n_embd: int = 128               # width of the hidden states, if the weights are fresh
    block_size: int | None = None   # longest row; none: 72, or max_prompt_tokens + max_new_tokens
    dropout: float = 0.0            # in this stage only; later stages run without
    tokenizer: str = "trained"      # trained on the texts, gpt2, or a folder; --init brings its own
    vocab_size: int = 1024          # largest vocabulary of a trained tokenizer
    chat: Literal["auto", "plain", "chatml", "llama3"] = "auto"     # template; auto: the model's
    system: str = ""                # system turn for dialogues without one, with a template
    n_texts: int | None = 20000     # texts to train on; none: all of --data
    steps: int = 2500               # updates; 0 uses the weights of --init as they are
    batch_size: int = 16            # texts per update
    lr: float = 3e-3                # AdamW's learning rate at its peak
    warmup: int = 100               # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # final learning rate, as a share of the peak
    weight_decay: float = 0.0       # AdamW's weight decay
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 500           # updates between held-out losses
    n_eval: int = 1000              # held-out texts, and samples for the report
    presets = presets_of("sft")
    ranges = {"steps": COUNT_FROM_0}


def sft_loss(logprobs, mask):
    """
    - mean over response tokens of log pi(y_t | x, y_<t), nats per token: (B, T), (B, T) -> 0-d

    >>> sft_loss(torch.tensor([[0.0, -1.0, -3.0]]), torch.tensor([[0.0, 1.0, 1.0]]))
    tensor(2.)
    """
    return -masked_mean(logprobs, mask)


@torch.no_grad()
def nats_per_response(policy, prompts, responses, device, batch_size=256):
    """Mean over rows (token lists) of - log pi(response | prompt), EOS included"""
    training = policy.training
    policy.eval()
    total = 0.0
    for i in range(0, len(prompts), batch_size):
        rows = slice(i, i + batch_size)
        inputs, targets, mask = (t.to(device) for t in data.collate(prompts[rows], responses[rows]))
        total -= token_logprobs(policy, inputs, targets, mask).sum().item()
    policy.train(training)
    return total / len(prompts)


# --------------------------------------------------------------------------------------------------
# A finished stage's policy

# Raised by building a model or a tokenizer from a file that describes it wrongly
MISFITS = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, AssertionError,
           RuntimeError)


def load_policy(folder, device, key="policy", saved=None, **compute_options):
    """
    The policy of a finished stage, in eval mode, and its tokenizer

    The ladder's stage has several policies, by key. saved is its checkpoint, if it has been read.
    """
    saved = saved or files.load_checkpoint(folder)
    files.must_hold(saved, folder, key, "gpt", "tokenizer")
    tokenizer = load_tokenizer(folder)
    check_vocabulary(saved["tokenizer"], tokenizer, folder)
    return rebuild(GPT, saved, folder, key, **compute_options).to(device), tokenizer


def rebuild(kind, saved, folder, key, shape="gpt", **compute_options):
    """A checkpoint's GPT or ScalarGPT in eval mode, with LoRA merged; shape: the config's key"""
    try:
        model = kind(GPTConfig(**(saved[shape] | compute_options)))
        weights = merged(saved[key])
    except MISFITS as error:
        if files.out_of_memory(error):
            raise
        stop(f"{folder}/checkpoint.pt describes a model that model.py does not know ({error}): a "
             f"different version wrote it; {files.recovery_hint(folder)}")
    files.load_state(model, weights, folder, key)
    return model.eval()


def policies_in(saved):
    """The keys of a checkpoint's policies: policy, policy_ema, and on the ladder one per rung"""
    return [key for key in saved if key == "policy" or key.startswith("policy_")]


def policy_name(stage, key):
    """The name of a stage's policy: ppo for the key policy, ppo/ema for policy_ema"""
    return stage + key.removeprefix("policy").replace("_", "/", 1)


def export(folder, to):
    """
    Write a finished stage's policy and tokenizer for transformers' AutoModelForCausalLM.

    Further policies, of --ema or of the ladder, go into folders beside it: to-ema, to-clip, ..
    """
    saved = files.load_checkpoint(folder)
    for key in policies_in(saved):
        policy, tokenizer = load_policy(folder, "cpu", key, saved)
        target = to + key.removeprefix("policy").replace("_", "-")
        with files.new_folder(target) as temporary:
            policy.save_pretrained(temporary, tokenizer.end_tokens)
            export_tokenizer(tokenizer, temporary, chat_template=jinja_of(tokenizer))


# --------------------------------------------------------------------------------------------------
# The policy and the tokenizer to start from

def pretrained_gpt(init, tokenizer, **changes):
    """The weights that --init names, with changes to fields of GPTConfig"""
    try:
        return GPT.from_pretrained(init, vocab_size=tokenizer.n_vocab, **changes)
    except MISFITS as error:
        if files.out_of_memory(error):
            raise
        stop(f"--init {init}: {error}")


def tokenizer_of(source, chat="plain", system=""):
    """GPT-2's tokenizer, or the one in a folder or on the hub, with a chat template"""
    built_in = source == "gpt2" and not Path(source).is_dir()
    source = None if built_in else source
    try:
        return set_chat(pretrained_tokenizer(source), chat, system, source)
    except (*MISFITS, OSError) as error:
        stop(f"no tokenizer in {source or 'gpt2'}: {error}")


def choose_tokenizer(cfg):
    """The tokenizer that --tokenizer names; weights come with the one they were trained with"""
    chat = "plain" if cfg.data == "reviews" else cfg.chat        # reviews are not dialogues
    if cfg.tokenizer != "trained":
        return tokenizer_of(cfg.tokenizer, chat, cfg.system)
    if cfg.init:
        return tokenizer_of(cfg.init, chat, cfg.system)
    texts = data.some_texts(cfg, cfg.n_texts or 20000, cfg.n_eval)
    return train_tokenizer(texts, cfg.vocab_size)


def check_init(init):
    """Exit, before any work, unless --init names complete weights."""
    try:
        pretrained.check(init)
    except ValueError as error:
        stop(f"--init {init}: {error}")


def check(cfg):
    """Exit, before any work, on settings that cannot work."""
    data.check_source(cfg.data)
    if cfg.init:
        check_init(cfg.init)
    if cfg.steps == 0 and not cfg.init:
        stop("--steps 0 uses weights as they are, so it needs --init FOLDER")
    if cfg.chat in ("chatml", "llama3") and cfg.tokenizer == "trained" and not cfg.init:
        stop(f"--chat {cfg.chat} writes special tokens, which a tokenizer trained here lacks; give "
             "--init or --tokenizer FOLDER")
    if cfg.n_embd % cfg.n_head:
        stop(f"--n_embd {cfg.n_embd} is not a multiple of --n_head {cfg.n_head}: every head has "
             "the same number of dimensions")
    if cfg.vocab_size < 257:
        stop(f"--vocab_size got {cfg.vocab_size}; it takes 257 or more: one id for each byte, and "
             "the EOS")
    if cfg.data == "reviews" and cfg.n_texts is None:
        stop("--n_texts none takes all of a data set, but the built-in task can generate texts "
             "forever: give a number")
    if cfg.lora_rank and not cfg.init:
        stop(f"--lora_rank {cfg.lora_rank} trains a small change of good weights, but fresh "
             "weights must all be trained. Give --init, or use LoRA in the later stages only")


def check_rows(cfg, train, held_out, block_size):
    """Exit if rows, or prompts with a response, are longer than the model can read."""
    longest_prompt = cfg.max_prompt_tokens               # rows of --data were cut to fit
    if cfg.data == "reviews":
        rows = train + held_out
        longest = max(len(prompt) + len(response) for prompt, response in rows)
        longest_prompt = max(len(prompt) for prompt, _ in rows)
        if longest > block_size:
            stop(f"rows of up to {longest} tokens exceed --block_size {block_size}; raise it")
    data.check_room(cfg, longest_prompt, block_size)
    data.check_enough(len(train), cfg.batch_size, "texts")


def import_weights(run, cfg, policy, tokenizer):
    """The whole stage with --steps 0: store the weights and the tokenizer of --init."""
    run.begin()
    run.restore(policy=policy, gpt=asdict(policy.config), **run.sources(tokenizer))
    run.save(0)
    n = sum(p.numel() for p in policy.parameters())
    text = (f"imported      {cfg.init} as it is: {n / 1e6:.1f}M parameters, {tokenizer.n_vocab} "
            f"token ids\ndialogues     {tokenizer.chat}, a turn ends with "
            f"{tokenizer.decode([tokenizer.eot_token])}")
    return run.finish(text, {"parameters": n}, then="ppo --reward path/to/file.py:FUNCTION")


@self_contained
def main(cfg):
    run = Run(cfg, "sft", export)
    if run.finished:
        return run.show()
    check(cfg)
    device = run.device
    built_in = cfg.data == "reviews"

    # ---- 1. texts
    tokenizer = choose_tokenizer(cfg)
    usual = 72 if built_in else cfg.max_prompt_tokens + cfg.max_new_tokens
    block_size = cfg.block_size or usual
    shape = dict(block_size=block_size, dropout=cfg.dropout, **cfg.compute_options())
    # Before the texts, which may take long to read
    weights = pretrained_gpt(cfg.init, tokenizer, **shape) if cfg.init else None
    if cfg.steps == 0:
        return import_weights(run, cfg, weights, tokenizer)
    train, held_out = data.demonstrations(cfg, tokenizer, block_size, cfg.n_texts, cfg.n_eval)
    check_rows(cfg, train, held_out, block_size)
    held_prompts, held_responses = map(list, zip(*held_out))                 # lists of token lists
    if built_in:
        entropy = data.grammar_entropy(cfg)                                  # nats per response
        length = sum(len(response) for _, response in train) / len(train)
        print(f"{len(train)} reviews, {length:.1f} tokens a response, {tokenizer.n_vocab} token "
              f"ids; the grammar's entropy is {entropy:.2f} nats a response")
    else:
        length = sum(map(len, held_responses)) / len(held_out)
        print(f"{len(train)} texts, {length:.1f} tokens a response, {tokenizer.n_vocab} token ids")

    # ---- 2. model
    run.begin()
    sources = run.sources(tokenizer, data=train)
    if cfg.init:
        policy = weights
    else:
        policy = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, n_layer=cfg.n_layer, n_head=cfg.n_head,
                               n_embd=cfg.n_embd, **ARCHITECTURES[cfg.architecture], **shape))
    policy = add_lora(policy.to(device), cfg.lora_rank)
    optimizer = torch.optim.AdamW(trained(policy), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    first = run.restore(policy=policy, optimizer=optimizer, gpt=asdict(policy.config), **sources)

    # ---- 3. train
    for step in run.steps(first, cfg.steps):
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.lr_floor)
        set_learning_rate(optimizer, lr)
        rows = [train[i] for i in data.batch_rows(len(train), cfg.batch_size, step, cfg.seed)]
        lengths = [len(response) for _, response in rows]
        means = data.Means()
        for part, share in data.microbatches(rows, cfg.accumulation, lengths):
            inputs, targets, mask = (t.to(device) for t in data.collate(*zip(*part)))       # (b, T)
            loss = sft_loss(token_logprobs(policy, inputs, targets, mask), mask)
            run.backward(share * loss)
            means.add({"loss": loss.detach()}, share)
        means.add(run.step(cfg.grad_clip, grad_norm=optimizer))              # clips, steps, zeroes
        metrics = means.result() | {"lr": lr}
        if step % cfg.eval_every == 0:
            metrics["held_out"] = nats_per_response(policy, held_prompts, held_responses, device)
            policy.eval()
            tokens, _ = generate(policy, held_prompts[:1], cfg.max_new_tokens, tokenizer.end_tokens,
                                 generator=run.generator)
            policy.train()
            sample = files.visible(tokenizer.decode(tokens[0].tolist()))
            print(f"held out: {metrics['held_out']:.2f} nats a response. {sample}")
        run.log(step, metrics, ["loss", "lr", "grad_norm"], every=100)
        run.checkpoint(step + 1)

    # ---- 4. held out
    policy.eval()
    nats = nats_per_response(policy, held_prompts, held_responses, device)
    check_finite(torch.tensor(nats), "the held-out loss")
    per_token = nats * len(held_out) / sum(map(len, held_responses))
    shown = held_prompts if built_in else held_prompts[:5]   # all, to count the grammatical ones
    tokens, mask = generate(policy, shown, cfg.max_new_tokens, tokenizer.end_tokens,
                            generator=run.generator)
    samples = [decode_response(tokenizer, ids) for ids in data.responses_of(tokens, mask)]
    lines = [f"held-out loss          {nats:6.2f} nats per response"]
    results = {"held_out": nats, "held_out_per_token": per_token}
    then = "reward_model"
    if built_in:
        good = data.share_grammatical(cfg, samples)
        lines += [f"the grammar's entropy  {entropy:6.2f} nats: {nats - entropy:.2f} above the "
                  "least possible",
                  f"grammatical samples    {good:6.1%}"]
        results |= {"entropy": entropy, "above_entropy": nats - entropy, "grammatical": good}
    else:
        lines += [f"                       {per_token:6.3f} nats per token"]
        if not train.rows.compared.any():
            then = "ppo --reward path/to/file.py:FUNCTION"
    examples = [tokenizer.decode(prompt) + text
                for prompt, (text, _) in zip(held_prompts[:5], samples)]
    text = "\n".join([*lines, "", *examples])
    return run.finish(text, results, then=then, curves=[
        ("training loss", "nats per token", ["loss"]),
        ("held-out loss", "nats per response", ["held_out"])])


if __name__ == "__main__":
    launch(main, Config, __doc__)
