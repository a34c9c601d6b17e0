"""
Stage 1: supervised fine-tuning, here from scratch on the built-in film reviews.

    1. texts        reviews by the grammar as (prompt, response) token lists, and their tokenizer
    2. model        a GPT with fresh weights
    3. train        minimise  - mean over response tokens of log pi(y_t | x, y_<t)
                    prompt tokens carry no loss, EOS does
    4. held out     nats per response on reviews of prompts never trained on, beside the grammar's
                    own E[- log p(y | x)], its entropy, which no model can beat; and samples

Departures from InstructGPT (Ouyang et al. 2022, section 3.5), whose SFT starts from GPT-3 and runs
16 epochs: nothing is pretrained here, and two to three epochs are enough.

    python sft.py --config small
        -> out/small/sft/checkpoint.pt, the policy that every later stage starts from
"""

from dataclasses import asdict, dataclass

import torch

import data
import experiment
import reviews
from model import GPT, GPTConfig, generate, masked_mean, token_logprobs


@dataclass
class Config(experiment.Common):
    n_layer: int = 2                # transformer blocks
    n_head: int = 4                 # attention heads
    n_embd: int = 128               # width of the hidden states
    block_size: int = 72            # longest prompt + response, tokens
    dropout: float = 0.0            # here only: all later stages run with it off
    vocab_size: int = 1024          # asked of the tokenizer, which may need fewer
    n_texts: int = 20000            # reviews to train on
    steps: int = 2500               # updates
    batch_size: int = 16            # reviews per update
    lr: float = 3e-3                # AdamW's learning rate at its peak
    warmup: int = 100               # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # to this share of the peak
    weight_decay: float = 0.0       # of AdamW
    grad_clip: float = 1.0          # largest gradient norm
    eval_every: int = 500           # updates between held-out losses
    n_eval: int = 1000              # held-out reviews, and samples for the report
    max_new_tokens: int = 48        # longest response sampled


PRESETS = {
    "small": {},
    "tiny": dict(n_layer=1, n_head=2, n_embd=32, n_texts=800, steps=80, warmup=10, lr=1e-2,
                 eval_every=40, n_eval=64, save_every=20),
}


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


def load_policy(folder, device, key="policy", saved=None):
    """
    A policy of a finished stage, in eval mode, and its tokenizer. The ladder's stage has several keys.

    saved is its checkpoint, where that has been read already.
    """
    saved, tokenizer = saved or experiment.load_checkpoint(folder), data.load_tokenizer(folder)
    if key not in saved:
        experiment.stop(f"{folder}/checkpoint.pt holds no {key} but {', '.join(saved)}; "
                        "give the folder of an sft or ppo stage")
    data.check_vocabulary(saved["tokenizer"], tokenizer, folder)
    policy = GPT(GPTConfig(**saved["gpt"]))
    policy.load_state_dict(saved[key])
    return policy.eval().to(device), tokenizer


def main(cfg):
    run = experiment.Run(cfg, "sft")
    if run.finished:
        return run.show()
    device = run.device

    # ---- 1. texts
    train_prompts, held_out_prompts = data.review_prompts()
    train_texts = reviews.sample(cfg.n_texts, cfg.seed, train_prompts)       # prompts, responses
    held_out_texts = reviews.sample(cfg.n_eval, cfg.seed + 1, held_out_prompts)
    tokenizer = data.train_tokenizer([p + r for p, r in zip(*train_texts)], cfg.vocab_size)
    prompts, responses = data.encode_texts(tokenizer, *train_texts)          # lists of token lists
    held_out = data.encode_texts(tokenizer, *held_out_texts)
    longest_prompt = max(map(len, prompts + held_out[0]))
    longest = max(longest_prompt + cfg.max_new_tokens,
                  *(len(p) + len(r) for p, r in zip(prompts + held_out[0], responses + held_out[1])))
    if longest > cfg.block_size:
        experiment.stop(f"rows of up to {longest} tokens (prompts to {longest_prompt}, responses to "
                        f"--max_new_tokens {cfg.max_new_tokens}) exceed --block_size "
                        f"{cfg.block_size}; raise that or lower --max_new_tokens")
    entropy = -sum(map(reviews.log_prob, *held_out_texts)) / cfg.n_eval      # nats per response
    print(f"{cfg.n_texts} reviews, {sum(map(len, responses)) / cfg.n_texts:.1f} tokens a response, "
          f"{tokenizer.n_vocab} token ids; the grammar needs {entropy:.2f} nats a response")

    # ---- 2. model
    run.begin()
    data.save_tokenizer(tokenizer, run.folder)
    policy = GPT(GPTConfig(tokenizer.n_vocab, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd,
                           cfg.dropout)).to(device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=(0.9, 0.99),
                                  weight_decay=cfg.weight_decay, fused=True)
    state = dict(policy=policy, optimizer=optimizer, gpt=asdict(policy.config),
                 tokenizer=data.fingerprint(tokenizer))

    # ---- 3. train
    for step in run.steps(run.restore(**state), cfg.steps):
        lr = experiment.learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.lr_floor)
        experiment.set_learning_rate(optimizer, lr)
        rows = data.batch_rows(cfg.n_texts, cfg.batch_size, step, cfg.seed)
        batch = data.collate([prompts[i] for i in rows], [responses[i] for i in rows])
        inputs, targets, mask = (t.to(device) for t in batch)                # (B, T) each
        loss = sft_loss(token_logprobs(policy, inputs, targets, mask), mask)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.grad_clip)
        experiment.must_be_finite(step, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        metrics = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
        if step % cfg.eval_every == 0:
            policy.eval()
            metrics["held_out"] = nats_per_response(policy, *held_out, device)
            tokens, mask = generate(policy, held_out[0][:1], cfg.max_new_tokens,
                                    tokenizer.eot_token, generator=run.generator)
            print(f"held out: {metrics['held_out']:.2f} nats a response. {held_out_texts[0][0]}"
                  f"{tokenizer.decode(data.responses_of(tokens, mask)[0])}")
            policy.train()
        run.log(step, metrics, ["loss", "lr", "grad_norm"], every=100)
        run.checkpoint(step + 1, **state)

    # ---- 4. held out
    policy.eval()
    nats = nats_per_response(policy, *held_out, device)
    tokens, mask = generate(policy, held_out[0], cfg.max_new_tokens, tokenizer.eot_token,
                            generator=run.generator)
    samples = [data.decode_response(tokenizer, ids) for ids in data.responses_of(tokens, mask)]
    good = sum(map(reviews.grammatical, held_out_texts[0], *zip(*samples))) / cfg.n_eval
    picture = experiment.curves(run.folder, "SFT", [
        ("training loss", "nats per token", ["loss"]),
        ("held-out loss", "nats per response", ["held_out"])])
    examples = [prompt + text for prompt, (text, _) in zip(held_out_texts[0][:5], samples)]
    return run.finish("\n".join([
        f"held-out loss          {nats:6.2f} nats per response",
        f"the grammar's entropy  {entropy:6.2f} nats: {nats - entropy:.2f} above the least possible",
        f"grammatical samples    {good:6.1%}",
        "", *examples, "",
        f"curves      {picture}", f"checkpoint  {run.folder}/checkpoint.pt",
        f"next        {experiment.command(cfg, 'reward_model')}"]),
        {"held_out": nats, "entropy": entropy, "above_entropy": nats - entropy,
         "grammatical": good})


if __name__ == "__main__":
    experiment.launch(main, Config, PRESETS, __doc__)
