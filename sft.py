"""
Stage 1: supervised fine-tuning.

    1. texts        (prompt, response) token lists, of the built-in film reviews or of --data, and their tokenizer
    2. model        a GPT with fresh weights, or with --init GPT-2's
    3. train        minimise  - mean over response tokens of log pi(y_t | x, y_<t)
                    prompt tokens carry no loss, EOS does
    4. held out     nats per response on texts of prompts never trained on; on the built-in task beside the
                    grammar's own E[- log p(y | x)], its entropy, which no model can beat; and samples

Departures from InstructGPT (Ouyang et al. 2022, section 3.5), whose SFT starts from GPT-3 and runs
16 epochs: on the built-in task nothing is pretrained, and two to three epochs are enough.

    python sft.py --config small
        -> out/small/sft/checkpoint.pt, the policy that every later stage starts from
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import corpus
import data
import experiment
import files
import options
import reviews
from model import GPT, GPTConfig, add_lora, generate, masked_mean, merged, token_logprobs, trained
from pretrained import check as check_pretrained


@dataclass
class Config(options.Common):
    init: str = ""                  # folder, hub name or nanoGPT ckpt.pt to start from; else fresh
    n_layer: int = 2                # transformer blocks of fresh weights
    n_head: int = 4                 # attention heads of fresh weights
    n_embd: int = 128               # width of the hidden states of fresh weights
    block_size: int | None = None   # longest row; none: 72, with --data max_prompt_tokens + max_new_tokens
    dropout: float = 0.0            # here only: all later stages run with it off
    tokenizer: str = "trained"      # on the texts; or gpt2, or a folder with its vocab.json; --init has its own
    vocab_size: int = 1024          # asked of a tokenizer that is trained, which may need fewer
    n_texts: int | None = 20000     # texts to train on; none: all that --data has
    steps: int = 2500               # updates
    batch_size: int = 16            # texts per update
    lr: float = 3e-3                # AdamW's learning rate at its peak
    warmup: int = 100               # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # to this share of the peak
    weight_decay: float = 0.0       # of AdamW
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 500           # updates between held-out losses
    n_eval: int = 1000              # held-out texts, and samples for the report


PRESETS = {
    "small": {},
    "tiny": dict(n_layer=1, n_head=2, n_embd=32, n_texts=800, steps=80, warmup=10, lr=1e-2,
                 eval_every=40, n_eval=64, save_every=20),
    "gpt2": dict(init="gpt2", block_size=512, n_texts=None, steps=1200, batch_size=64, accumulation=2, lr=1e-5, warmup=150,
                 eval_every=200, n_eval=256, save_every=200),
    "imdb": dict(init="gpt2", block_size=64, n_texts=None, steps=350, batch_size=64, lr=1e-5, warmup=50,
                 eval_every=100, n_eval=256),
    "tldr": dict(init="gpt2", block_size=640, n_texts=None, steps=900, batch_size=64, accumulation=2, lr=1e-5, warmup=150,
                 eval_every=200, n_eval=256, save_every=200),
}
Config.presets = PRESETS


# What comes up where a model or a tokenizer is built from what a file says and the file is wrong
UNFIT = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, AssertionError,
         RuntimeError)


def sft_loss(logprobs, mask):
    """
    - mean over response tokens of log pi(y_t | x, y_<t), nats per token: (B, T), (B, T) -> 0-d

    >>> sft_loss(torch.tensor([[0.0, -1.0, -3.0]]), torch.tensor([[0.0, 1.0, 1.0]]))
    tensor(2.)
    """
    return -masked_mean(logprobs, mask)


@torch.no_grad()
def nats_per_response(policy, prompts, responses, device, batch_size=256):
    """Mean over rows of - log pi(response | prompt), EOS included, of token lists."""
    training, total = policy.training, 0.0
    policy.eval()
    for i in range(0, len(prompts), batch_size):
        rows = slice(i, i + batch_size)
        inputs, targets, mask = (t.to(device) for t in data.collate(prompts[rows], responses[rows]))
        total -= token_logprobs(policy, inputs, targets, mask).sum().item()
    policy.train(training)
    return total / len(prompts)


def pretrained(init, tokenizer, **changes):
    """GPT-2 weights as --init names them, with other values for fields of GPTConfig"""
    try:
        return GPT.from_pretrained(init, vocab_size=tokenizer.n_vocab, **changes)
    except UNFIT as error:
        if experiment.out_of_memory(error):
            raise
        files.stop(f"--init {init}: {error}")


def check_init(init):
    """Stops, before any work, where --init does not name whole weights."""
    try:
        check_pretrained(init)
    except ValueError as error:
        files.stop(f"--init {init}: {error}")


def tokenizer_of(source):
    """GPT-2's tokenizer, or that of a folder or of a name on the hub"""
    try:
        return data.gpt2_tokenizer(None if source == "gpt2" and not Path(source).is_dir() else source)
    except (*UNFIT, OSError) as error:
        files.stop(f"no tokenizer in {source}: {error}")


def choose_tokenizer(cfg):
    """What cfg.tokenizer names; weights that were trained with a tokenizer bring it along"""
    if cfg.tokenizer != "trained" or cfg.init:
        return tokenizer_of(cfg.init if cfg.tokenizer == "trained" else cfg.tokenizer)
    return data.train_tokenizer(corpus.some_texts(cfg, cfg.n_texts or 20000, cfg.n_eval), cfg.vocab_size)


def rebuild(kind, saved, folder, key, shape="gpt", **how):
    """
    A model, GPT or ScalarGPT, of a checkpoint, in eval mode; a low-rank change of its weights is added to them

    shape: the key of its GPTConfig; how the models of this run compute: cfg.how()
    """
    try:
        model, weights = kind(GPTConfig(**saved[shape] | how)), merged(saved[key])
    except UNFIT as error:
        if experiment.out_of_memory(error):
            raise
        files.stop(f"{folder}/checkpoint.pt describes a model that model.py does not know ({error}): another version wrote "
                   f"it; {files.again(folder)}")
    files.fill(model, weights, folder, key)
    return model.eval()


def load_policy(folder, device, key="policy", saved=None, **how):
    """
    A policy of a finished stage, in eval mode, and its tokenizer. The ladder's stage has several keys.

    saved is its checkpoint, where that has been read already; how the models of this run compute: cfg.how().
    """
    saved = saved or files.load_checkpoint(folder)
    files.must_hold(saved, folder, key, "gpt", "tokenizer")
    tokenizer = data.load_tokenizer(folder)
    data.check_vocabulary(saved["tokenizer"], tokenizer, folder)
    return rebuild(GPT, saved, folder, key, **how).to(device), tokenizer


def policies_in(saved):
    """The keys of a checkpoint's policies: policy, policy_ema, on the ladder one a rung"""
    return [key for key in saved if key == "policy" or key.startswith("policy_")]


def policy_name(stage, key):
    """How a policy of a stage is called: ppo for the key policy, ppo/ema for policy_ema"""
    return stage + key.removeprefix("policy").replace("_", "/", 1)


def export(folder, to):
    """
    A finished stage's policy for transformers' AutoModelForCausalLM, and its tokenizer. Where there are more, as
    with --ema or on the ladder, they go beside it, into folders with a longer name.
    """
    saved = files.load_checkpoint(folder)
    for key in policies_in(saved):
        policy, tokenizer = load_policy(folder, "cpu", key, saved)
        target = to + key.removeprefix("policy").replace("_", "-")
        with files.new_folder(target) as beside:
            policy.save_pretrained(beside, tokenizer.eot_token)
            data.export_tokenizer(tokenizer, beside)


def check(cfg):
    """Stops on settings that cannot be, before any work."""
    corpus.check_source(cfg.data)
    if cfg.init:
        check_init(cfg.init)
    if cfg.n_embd % cfg.n_head:
        files.stop(f"--n_embd {cfg.n_embd} is no multiple of --n_head {cfg.n_head}: every head takes as many dimensions")
    if cfg.vocab_size < 257:
        files.stop(f"--vocab_size got {cfg.vocab_size}; it takes 257 or more: one id for each byte, and the EOS")
    if cfg.data == "reviews" and cfg.n_texts is None:
        files.stop("--n_texts none takes all that a data set has; the built-in task has no end: give a number")
    if cfg.lora_rank and not cfg.init:
        files.stop(f"--lora_rank {cfg.lora_rank} trains a small change of weights that are good already; fresh ones "
                   "need all of themselves. Give --init, or LoRA to the later stages only")


def check_rows(cfg, train, held_out, block_size):
    """Stops where rows, or prompts with a response, are longer than the model reads; those of --data were cut to fit."""
    longest_prompt = cfg.max_prompt_tokens
    if cfg.data == "reviews":
        longest = max(len(prompt) + len(response) for prompt, response in train + held_out)
        longest_prompt = max(len(prompt) for prompt, _ in train + held_out)
        if longest > block_size:
            files.stop(f"rows of up to {longest} tokens exceed --block_size {block_size}; raise that")
    corpus.check_room(cfg, longest_prompt, block_size)
    options.check_enough(len(train), cfg.batch_size, "texts")


@experiment.self_contained
def main(cfg):
    run = experiment.Run(cfg, "sft", export)
    if run.finished:
        return run.show()
    check(cfg)
    device, built_in = run.device, cfg.data == "reviews"

    # ---- 1. texts
    tokenizer = choose_tokenizer(cfg)
    block_size = cfg.block_size or (72 if built_in else cfg.max_prompt_tokens + cfg.max_new_tokens)
    common = dict(block_size=block_size, dropout=cfg.dropout, **cfg.how())
    # Before the texts, which can take long to read
    weights = pretrained(cfg.init, tokenizer, **common) if cfg.init else None
    train, held_out = corpus.demonstrations(cfg, tokenizer, block_size, cfg.n_texts, cfg.n_eval)
    check_rows(cfg, train, held_out, block_size)
    held_prompts, held_responses = map(list, zip(*held_out))                 # lists of token lists
    said = f"tokens a response, {tokenizer.n_vocab} token ids"
    if built_in:
        held_out_texts = corpus.built_in_texts(cfg.n_texts, cfg.n_eval, cfg.seed)[1]         # prompts, responses
        entropy = -sum(map(reviews.log_prob, *held_out_texts)) / cfg.n_eval  # nats per response
        length = sum(len(response) for _, response in train) / len(train)
        print(f"{len(train)} reviews, {length:.1f} {said}; the grammar needs {entropy:.2f} nats a response")
    else:
        print(f"{len(train)} texts, {sum(map(len, held_responses)) / len(held_out):.1f} {said}")

    # ---- 2. model
    run.begin()
    if not run.resuming:
        data.save_tokenizer(tokenizer, run.folder)
    policy = weights or GPT(GPTConfig(vocab_size=tokenizer.n_vocab, n_layer=cfg.n_layer, n_head=cfg.n_head,
                                      n_embd=cfg.n_embd, **common))
    policy = add_lora(policy.to(device), cfg.lora_rank)
    optimizer = torch.optim.AdamW(trained(policy), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    state = dict(policy=policy, optimizer=optimizer, gpt=asdict(policy.config),
                 tokenizer=data.fingerprint(tokenizer), data=corpus.source_of(train))

    # ---- 3. train
    for step in run.steps(run.restore(**state), cfg.steps):
        lr = experiment.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.lr_floor)
        experiment.set_learning_rate(optimizer, lr)
        batch = [train[i] for i in data.batch_rows(len(train), cfg.batch_size, step, cfg.seed)]
        n_tokens, metrics = sum(len(response) for _, response in batch), {}
        for rows in data.parts(batch, cfg.accumulation):
            inputs, targets, mask = (t.to(device) for t in data.collate(*zip(*rows)))       # (B, T) each
            loss = sft_loss(token_logprobs(policy, inputs, targets, mask), mask)
            share = mask.sum() / n_tokens                                    # of the batch's tokens
            (share * loss).backward()
            experiment.add(metrics, {"loss": loss.detach()}, share)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        run.must_be_finite(loss=metrics["loss"], grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"lr": lr, "grad_norm": grad_norm}
        if step % cfg.eval_every == 0:
            policy.eval()
            metrics["held_out"] = nats_per_response(policy, held_prompts, held_responses, device)
            tokens, _ = generate(policy, held_prompts[:1], cfg.max_new_tokens, tokenizer.eot_token,
                                 generator=run.generator)
            print(f"held out: {metrics['held_out']:.2f} nats a response. "
                  + files.visible(tokenizer.decode(tokens[0].tolist())))
            policy.train()
        run.log(step, metrics, ["loss", "lr", "grad_norm"], every=100)
        run.checkpoint(step + 1)

    # ---- 4. held out
    policy.eval()
    nats = nats_per_response(policy, held_prompts, held_responses, device)
    experiment.check_finite(torch.tensor(nats), "the held-out loss")
    per_token = nats * len(held_out) / sum(map(len, held_responses))
    shown = held_prompts if built_in else held_prompts[:5]                   # all, to count the grammatical ones
    tokens, mask = generate(policy, shown, cfg.max_new_tokens, tokenizer.eot_token, generator=run.generator)
    samples = [data.decode_response(tokenizer, ids) for ids in data.responses_of(tokens, mask)]
    lines = [f"held-out loss          {nats:6.2f} nats per response"]
    results = {"held_out": nats, "held_out_per_token": per_token}
    if not built_in:
        lines += [f"                       {per_token:6.3f} nats per token"]
    else:
        good = sum(map(reviews.grammatical, held_out_texts[0], *zip(*samples))) / cfg.n_eval
        lines += [f"the grammar's entropy  {entropy:6.2f} nats: {nats - entropy:.2f} above the least possible",
                  f"grammatical samples    {good:6.1%}"]
        results |= {"entropy": entropy, "above_entropy": nats - entropy, "grammatical": good}
    picture = experiment.curves(run.folder, "SFT", [
        ("training loss", "nats per token", ["loss"]),
        ("held-out loss", "nats per response", ["held_out"])])
    next_stage = options.next_command(cfg, "reward_model")
    if not (built_in or corpus.compared(train.rows).any()):
        next_stage = options.next_command(cfg, "ppo") + "   (with a --reward, where the preset has none)"
    examples = [tokenizer.decode(prompt) + text for prompt, (text, _) in zip(held_prompts[:5], samples)]
    return run.finish("\n".join([
        *lines, "", *examples, "",
        f"curves      {picture}", f"checkpoint  {run.folder}/checkpoint.pt",
        f"next        {next_stage}"]), results)


if __name__ == "__main__":
    experiment.launch(main, Config, __doc__)
