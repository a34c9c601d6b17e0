"""
The settings of each --config, stage by stage.

    small       film reviews, a built-in task: a model trained from scratch, on a CPU, in minutes
    tiny        the same in seconds, to try an edit and for the tests; it learns next to nothing
    gpt2        GPT-2 124M on HH-RLHF, helpful and harmless (Bai et al. 2022), on one GPU
    imdb        GPT-2 continues film reviews, rewarded by a sentiment classifier, in the manner of
                Ziegler et al. 2019 and of the DPO paper
    tldr        GPT-2 summarises posts, from OpenAI's comparisons (Stiennon et al. 2020)
    smollm2     SmolLM2-135M-Instruct, or with --init the 360M, on your --data and --reward, or on
                HH-RLHF; no SFT: the policy starts as it is
    qwen        the same with Qwen2.5-0.5B-Instruct, or with --init Qwen3-0.6B

A script's own defaults are those of small, so a preset lists only what differs. The values of "all"
apply to every stage. A stage that a preset does not list cannot be run with it.
"""

SMALL = {
    "all": dict(),
    "sft": dict(),
    "reward_model": dict(),
    "ppo": dict(),
    "dpo": dict(),
    "grpo": dict(),
    "policy_gradient": dict(),
    "evaluate": dict(),
    "sample": dict(),
}

TINY = {
    "all": dict(max_new_tokens=24),
    "sft": dict(n_layer=1, n_head=2, n_embd=32, n_texts=800, steps=80, warmup=10, lr=1e-2,
                eval_every=40, n_eval=64, save_every=20),
    "reward_model": dict(n_prompts=160, n_held_out=40, batch_size=4, lr=3e-3, save_every=10),
    "ppo": dict(steps=8, batch_size=32, minibatch_size=16, lr=2e-3, n_eval=16, n_samples=16,
                save_every=3),
    "dpo": dict(n_pairs=320, batch_size=16, lr=1e-3, warmup=2, eval_every=5, n_eval=16,
                n_samples=16, save_every=7),
    "grpo": dict(steps=8, batch_size=32, minibatch_size=16, lr=2e-3, n_eval=16, n_samples=16,
                 save_every=3),
    "policy_gradient": dict(steps=4, batch_size=16, minibatch_size=8, lr=2e-3, fisher_rows=8,
                            cg_steps=3, variance_rollouts=1, variance_rows=4, n_eval=4, n_samples=4,
                            save_every=2),
    "evaluate": dict(n_eval=6, n_reference=32, n_samples=16, weak_rankings=40, weak_steps=4),
    "sample": dict(),
}

GPT2 = {
    "all": dict(data="hh", max_prompt_tokens=256, max_new_tokens=128, dtype="bfloat16"),
    "sft": dict(init="gpt2", block_size=512, n_texts=None, steps=1200, batch_size=64,
                accumulation=2, lr=1e-5, warmup=150, eval_every=200, n_eval=256, save_every=200),
    "reward_model": dict(n_prompts=None, batch_size=64, accumulation=4, lr=1e-5, warmup=50,
                         lr_floor=0.0, save_every=200),
    "ppo": dict(steps=400, batch_size=128, minibatch_size=32, lr=3e-6, critic_lr=1e-5, warmup=10,
                lam=0.95, beta=0.05, kl_target=6.0, kl_horizon=10000.0, n_samples=4),
    "dpo": dict(n_pairs=70000, batch_size=64, accumulation=4, beta=0.1, lr=1e-6, warmup=150,
                lr_floor=1.0, grad_clip=10.0, eval_every=100, n_samples=4, save_every=200),
    "grpo": dict(steps=400, minibatch_size=64, group_size=8, beta=0.05, lr=3e-6, warmup=10,
                 n_samples=4),
    "evaluate": dict(n_reference=64, n_samples=32),
    "sample": dict(),
}

IMDB = {
    "all": dict(data="hf:stanfordnlp/imdb", text_prompt=8, max_prompt_tokens=8, max_new_tokens=24,
                dtype="bfloat16"),
    "sft": dict(init="gpt2", block_size=64, n_texts=None, steps=350, batch_size=64, lr=1e-5,
                warmup=50, eval_every=100, n_eval=256),
    "ppo": dict(steps=400, batch_size=256, minibatch_size=64, epochs=4, lr=1.4e-5, critic_lr=1.4e-5,
                warmup=5, lam=0.95, beta=0.2, kl_target=6.0, kl_horizon=10000.0, critic_init="sft",
                reward="lvwerra/distilbert-imdb", missing_eos_score=None, n_samples=8),
    "grpo": dict(steps=400, batch_size=256, minibatch_size=64, group_size=8, beta=0.1, lr=1e-5,
                 warmup=5, reward="lvwerra/distilbert-imdb", missing_eos_score=None, n_samples=8),
    "evaluate": dict(reward="lvwerra/distilbert-imdb", missing_eos_score=None, n_reference=64,
                     n_samples=32),
    "sample": dict(),
}

TLDR = {
    "all": dict(data="tldr", max_prompt_tokens=448, max_new_tokens=64, dtype="bfloat16"),
    "sft": dict(init="gpt2", block_size=640, n_texts=None, steps=900, batch_size=64,
                accumulation=2, lr=1e-5, warmup=150, eval_every=200, n_eval=256, save_every=200),
    "reward_model": dict(n_prompts=None, batch_size=64, accumulation=4, lr=1.5e-5, warmup=50,
                         lr_floor=0.0, save_every=200),
    "ppo": dict(steps=400, batch_size=128, minibatch_size=32, epochs=4, lr=3e-6, critic_lr=3e-6,
                lam=0.95, beta=0.05, kl_control="fixed", temperature=0.7, missing_eos_score=-1.0,
                n_samples=4),
    "dpo": dict(n_pairs=50000, batch_size=64, accumulation=4, beta=0.5, lr=1e-6, warmup=150,
                lr_floor=1.0, grad_clip=10.0, eval_every=100, n_samples=4, save_every=200),
    "evaluate": dict(n_reference=64, n_samples=32, missing_eos_score=-1.0, temperature=0.7),
    "sample": dict(),
}

SMOLLM2 = {
    "all": dict(data="hh", max_prompt_tokens=256, max_new_tokens=128, dtype="bfloat16"),
    "sft": dict(init="HuggingFaceTB/SmolLM2-135M-Instruct", steps=0, n_texts=None, batch_size=32,
                accumulation=2, lr=2e-5, warmup=50, eval_every=200, n_eval=256),
    "reward_model": dict(n_prompts=None, batch_size=64, accumulation=8, lr=1e-5, warmup=50,
                         lr_floor=0.0, save_every=200),
    "ppo": dict(steps=200, batch_size=64, minibatch_size=32, accumulation=4, lr=5e-6,
                critic_lr=1e-5, warmup=10, lam=0.95, beta=0.05, kl_control="fixed", n_samples=4),
    "dpo": dict(n_pairs=20000, batch_size=32, accumulation=8, beta=0.1, lr=1e-6, warmup=50,
                lr_floor=0.0, eval_every=100, n_samples=4, save_every=200),
    "grpo": dict(steps=200, batch_size=64, minibatch_size=32, accumulation=4, group_size=8,
                 beta=0.02, lr=1e-5, warmup=10, n_samples=4),
    "evaluate": dict(n_reference=64, n_samples=32),
    "sample": dict(),
}

QWEN = {
    "all": SMOLLM2["all"],
    "sft": SMOLLM2["sft"] | dict(init="Qwen/Qwen2.5-0.5B-Instruct", accumulation=8, lr=1e-5),
    "reward_model": SMOLLM2["reward_model"] | dict(accumulation=16, lr=5e-6),
    # Actor and critic, trained in full, would take 18 GB before the first activation
    "ppo": SMOLLM2["ppo"] | dict(accumulation=8, lora_rank=16, lr=3e-5, critic_lr=1e-4),
    "dpo": SMOLLM2["dpo"] | dict(accumulation=16, lr=5e-7),
    "grpo": SMOLLM2["grpo"] | dict(accumulation=8, lr=2e-6),
    "evaluate": SMOLLM2["evaluate"],
    "sample": dict(),
}

PRESETS = {"small": SMALL, "tiny": TINY, "gpt2": GPT2, "imdb": IMDB, "tldr": TLDR,
           "smollm2": SMOLLM2, "qwen": QWEN}


def presets_of(stage):
    """{name of --config: {field: value}} of the presets that have this stage"""
    return {name: preset["all"] | preset[stage]
            for name, preset in PRESETS.items() if stage in preset}
