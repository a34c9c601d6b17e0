"""
Stage 2: a reward model from comparisons.

    1. sample       K responses y_1 .. y_K to each prompt x from the SFT policy
    2. annotate     the annotators rank them: P(i before j) = sigmoid((gold_i - gold_j) / temperature)
                    (Bradley and Terry 1952). A ranking gives K (K - 1) / 2 comparisons for K forwards
    3. train        the SFT weights with a scalar head r(x, y), read after the last response token:
                    - mean over comparisons of log sigmoid(r(x, y_w) - r(x, y_l))
                    (Ouyang et al. 2022, equation 1)
    4. held out     expected accuracy beside the Bayes accuracy, which nobody can beat; calibration
    5. normalise    gain and bias, so that scores have mean 0 and standard deviation 1 on the SFT
                    policy's samples (Ziegler et al. 2019): then a KL strength beta means the same
                    for every reward model

With --data the comparisons are those of the data set: 1 and 2 are left out, and 4 counts how often its labels
are met.

Departures from Ouyang et al.: K = 4 where they have 4 to 9; simulated annotators, known exactly.

    python reward_model.py --config small
        -> out/small/reward_model: checkpoint.pt, comparisons.json
"""

import functools
import json
from dataclasses import asdict, dataclass
from typing import Literal

import torch

import corpus
import data
import experiment
import files
import options
import pretrained
import reviews
import sft
from model import GPTConfig, ScalarGPT, add_lora, generate, masked_mean, sequence_scores, trained


@dataclass
class Config(options.Common):
    init: str = ""                  # weights to start from in place of SFT's; see sft.py --init
    n_prompts: int | None = 2400    # rankings, or comparisons of --data, to train on; none: all that there are
    n_held_out: int = 1000          # rankings, or comparisons, to measure on
    n_responses: int = 4            # K, responses to a ranking; 2 is the plain case
    annotator_temperature: float = 0.6      # of the annotators; the lower, the more they follow gold
    loss: Literal["bradley_terry", "fidelity"] = "bradley_terry"    # of a comparison
    margin: float = 0.0             # by which the chosen score should lead
    token_wise: bool = False        # compare at every column where two rows differ (DeepSpeed-Chat)
    epochs: int = 1                 # passes over the rankings; reward models overfit soon
    batch_size: int = 8             # rankings per update
    lr: float = 7e-4                # AdamW's learning rate at its peak
    warmup: int = 20                # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # to this share of the peak
    weight_decay: float = 0.0       # of AdamW
    grad_clip: float = 1.0          # largest gradient norm


PRESETS = {
    "small": {},
    "tiny": dict(lr=3e-3, n_prompts=160, n_held_out=40, batch_size=4, save_every=10),
    "gpt2": dict(n_prompts=None, batch_size=64, accumulation=4, lr=1e-5, warmup=50, lr_floor=0.0, save_every=200),
    "tldr": dict(n_prompts=None, batch_size=64, accumulation=4, lr=1.5e-5, warmup=50, lr_floor=0.0, save_every=200),
}
Config.presets = PRESETS


# --------------------------------------------------------------------------------------------------
# The maths

def preference_loss(chosen_scores, rejected_scores, kind="bradley_terry", margin=None, weights=None):
    """
    Mean loss of comparisons with p = sigmoid(chosen_scores - rejected_scores - margin).

    bradley_terry   - log p         negative log-likelihood     (Ouyang et al. 2022, equation 1)
    fidelity        1 - sqrt(p)     bounded: a wrong label costs at most 1  (Tsai et al. 2007)

    Scores, margin and weights have one shape; with weights, the mean is weighted.
    -> loss, {loss, accuracy, margin}; a tie counts one half

    >>> preference_loss(torch.tensor([0.3]), torch.tensor([0.3]))[0]
    tensor(0.6931)
    """
    difference = chosen_scores - rejected_scores
    shifted = difference if margin is None else difference - margin
    if kind == "bradley_terry":
        losses = -torch.nn.functional.logsigmoid(shifted)
    elif kind == "fidelity":
        losses = 1 - torch.exp(0.5 * torch.nn.functional.logsigmoid(shifted))
    else:
        raise ValueError(f"got kind {kind!r}; it is bradley_terry or fidelity")
    weights = torch.ones_like(difference) if weights is None else weights
    loss = masked_mean(losses, weights)
    with torch.no_grad():
        metrics = {"loss": loss.detach(), "margin": masked_mean(difference, weights),
                   "accuracy": masked_mean(0.5 + 0.5 * difference.sign(), weights)}
    return loss, metrics


def token_wise_scores(chosen_values, rejected_values, chosen_targets, rejected_targets,
                      chosen_mask, rejected_mask):
    """
    What to compare, column by column, in DeepSpeed-Chat's variant: all (N, T).

    Values stand in the state after each target. A pair is compared from the first column where its
    targets differ to the end of the longer row, two equal rows at their last column; a row that has
    ended keeps its last score, where DeepSpeed-Chat scores its padding. -> chosen scores, rejected scores, weights that sum to 1 a pair
    """
    columns = torch.arange(chosen_mask.shape[1], device=chosen_mask.device)                 # (T,)
    chosen_end = (columns * (chosen_mask > 0)).amax(1, keepdim=True)                        # (N, 1)
    rejected_end = (columns * (rejected_mask > 0)).amax(1, keepdim=True)
    differ = (chosen_targets != rejected_targets) | (chosen_mask != rejected_mask)
    differ &= (chosen_mask > 0) | (rejected_mask > 0)
    end = torch.maximum(chosen_end, rejected_end)
    compared = ((differ.cumsum(1) > 0) & (columns <= end)) | (columns == end)
    weights = compared / compared.sum(1, keepdim=True)                                      # (N, T)
    return (chosen_values.gather(1, torch.minimum(columns, chosen_end)),
            rejected_values.gather(1, torch.minimum(columns, rejected_end)), weights)


def calibration(scores, truth):
    """
    How often the higher score is preferred, by what sigmoid(difference) says -> table rows

    scores (N, K); truth (N, pairs): how often the first of each pair is preferred, pairs as in triu_indices
    """
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    difference = (scores[:, i] - scores[:, j]).flatten()                     # (pairs,)
    truth = torch.where(difference >= 0, truth.flatten(), 1 - truth.flatten())
    predicted = torch.sigmoid(difference.abs())
    rows = [["P(higher score preferred)", "predicted", "true", "pairs"]]
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        at = (predicted >= low) & (predicted < (low + 0.1 if low < 0.9 else 1.1))
        if at.any():
            rows.append([f"{low:.1f} to {low + 0.1:.1f}", predicted[at].mean().item(),
                         truth[at].mean().item(), int(at.sum())])
    return rows


# --------------------------------------------------------------------------------------------------
# Comparisons

def make_comparisons(policy, tokenizer, prompts, cfg, generator):
    """
    Rankings of sampled responses: dicts of prompt, prompt_ids, responses, response_ids, gold, the
    last three best first. Ids are kept as they were sampled: encoding the text may give others.
    """
    K, comparisons = cfg.n_responses, []
    chunks = [prompts[i:i + 128] for i in range(0, len(prompts), 128)]
    for prompt_ids in experiment.progress(chunks, f"sampling {K} responses to {len(prompts)} prompts"):
        chunk = [tokenizer.decode(ids) for ids in prompt_ids]
        tokens, mask = generate(policy, [ids for ids in prompt_ids for _ in range(K)],
                                cfg.max_new_tokens, tokenizer.eot_token, generator=generator)
        response_ids = data.responses_of(tokens, mask)
        texts = [data.decode_response(tokenizer, ids) for ids in response_ids]
        gold = torch.tensor([reviews.gold(chunk[i // K], *text) for i, text in enumerate(texts)])
        order = reviews.rank(gold.view(-1, K), generator, cfg.annotator_temperature)
        for n, prompt in enumerate(chunk):
            best_first = [n * K + k for k in order[n].tolist()]
            comparisons.append({"prompt": prompt, "prompt_ids": prompt_ids[n],
                                "responses": [texts[i][0] for i in best_first],
                                "response_ids": [response_ids[i] for i in best_first],
                                "gold": [gold[i].item() for i in best_first]})
    return comparisons


def read_comparisons(folder):
    """What a stage on the built-in task has stored -> comparisons to train on, held out"""
    stored = files.read_json(folder / "comparisons.json")
    if not (isinstance(stored, list) and len(stored) == 2 and all(isinstance(part, list) for part in stored)):
        files.stop(f"{folder}/comparisons.json is not what reward_model.py writes; {files.again(folder)}")
    return stored


def rows_of(comparisons, device):
    """Rankings -> inputs, targets, mask, with the K responses of a prompt in K rows, best first"""
    prompts = [c["prompt_ids"] for c in comparisons for _ in c["response_ids"]]
    responses = [ids for c in comparisons for ids in c["response_ids"]]
    return [t.to(device) for t in data.collate(prompts, responses)]


@torch.no_grad()
def score_all(reward_model, comparisons, device, batch_size=64):
    """Scores of all responses of rankings -> (N, K)"""
    batches = [rows_of(comparisons[i:i + batch_size], device)
               for i in range(0, len(comparisons), batch_size)]
    scores = torch.cat([sequence_scores(reward_model, *batch) for batch in batches])
    return scores.view(len(comparisons), -1).cpu()


@torch.no_grad()
def normalisation(raw, policy, tokenizer, prompts, cfg, n=512):
    """The gain and bias by which n of the policy's responses have mean 0 and standard deviation 1"""
    generator, scores = torch.Generator().manual_seed(0), []     # whatever the seed: one reward, one normalisation
    for chunk in data.parts(data.draw(prompts, n, generator), n // 64):
        tokens, mask = generate(policy, chunk, cfg.max_new_tokens, tokenizer.eot_token, getattr(cfg, "temperature", 1.0) or 1.0,
                                generator)
        scores.append(raw(*data.shift(tokens), mask))
    scores = torch.cat(scores)                                               # (n,)
    experiment.check_finite(scores, "the reward of a response of the SFT policy")
    mean, std = scores.mean().item(), scores.std().item()
    check_spread(mean, std, f"{n} responses of the SFT policy")
    return 1 / std, -mean / std


def check_spread(mean, std, whom):
    """Stops where all scores are one: nothing can be learned from them."""
    if not std >= 1e-6 * max(1.0, abs(mean)):
        files.stop(f"the reward gave {mean:g} to each of {whom}: there is nothing to learn from it as it stands, nor to "
                   "normalise by (--normalise_reward 0 leaves a reward that is no reward model as it is)")


# --------------------------------------------------------------------------------------------------
# A finished stage's reward model

def load_reward_model(folder, sft_policy, tokenizer, device, **how):
    """The reward model of a finished stage, in eval mode. It must share the policy's vocabulary."""
    saved = files.load_checkpoint(folder, "reward_model", "gpt", "tokenizer", "sft")
    data.check_vocabulary(saved["tokenizer"], tokenizer, folder)
    if saved["sft"] != files.fingerprint(sft_policy):
        print(f"warning: {folder} was made from another SFT policy than the one here: its scores "
              "are not normalised for this one")
    return sft.rebuild(ScalarGPT, saved, folder, "reward_model", **how).to(device)


def export(folder, to):
    """A finished stage's reward model for transformers' AutoModelForSequenceClassification, and its tokenizer"""
    saved, tokenizer = files.load_checkpoint(folder, "reward_model", "gpt"), data.load_tokenizer(folder)
    reward_model = sft.rebuild(ScalarGPT, saved, folder, "reward_model")
    with files.new_folder(to) as beside:
        reward_model.save_pretrained(beside, tokenizer.eot_token)
        data.export_tokenizer(tokenizer, beside, pad=True)


def check(cfg):
    """Stops on settings that cannot be, before any work."""
    corpus.check_source(cfg.data)
    if cfg.init:
        sft.check_init(cfg.init)
    corpus.check_comparisons(cfg)
    if cfg.n_responses < 2:
        files.stop(f"--n_responses got {cfg.n_responses}; a comparison takes at least 2")
    if cfg.data == "reviews":
        if cfg.n_prompts is None:
            files.stop("--n_prompts none takes all that a data set has; the built-in task has no end: give a number")
        options.check_enough(cfg.n_prompts, cfg.batch_size, "rankings")


@experiment.self_contained
def main(cfg):
    run = experiment.Run(cfg, "reward_model", export)
    if run.finished:
        return run.show()
    check(cfg)
    device, built_in = run.device, cfg.data == "reviews"
    sft_policy, tokenizer = sft.load_policy(experiment.ensure(cfg, sft), device, **cfg.how())
    train_prompts, held_out_prompts = corpus.prompts(cfg, tokenizer, sft_policy.config.block_size)
    trunk = sft_policy
    if cfg.init:
        if pretrained.nanogpt(cfg.init):
            print(f"note: {cfg.init} does not name its tokenizer, which is taken to be the SFT "
                  "policy's")
        elif data.fingerprint(sft.tokenizer_of(cfg.init)) != data.fingerprint(tokenizer):
            files.stop(f"--init {cfg.init} has another tokenizer than the SFT policy, whose ids it has to read; give "
                       "weights with the same one, as GPT-2's of all sizes have")
        trunk = sft.pretrained(cfg.init, tokenizer, block_size=sft_policy.config.block_size)
    if not built_in:
        comparisons, held_out = corpus.comparisons(cfg, tokenizer, sft_policy.config.block_size,
                                                   cfg.n_prompts, cfg.n_held_out)
        options.check_enough(len(comparisons), cfg.batch_size, "comparisons")
    run.begin()
    if not run.resuming:
        data.save_tokenizer(tokenizer, run.folder)

    # ---- 1. sample, 2. annotate
    stored, companions = run.folder / "comparisons.json", files.Companions()
    if built_in and run.resuming:
        comparisons, held_out = read_comparisons(run.folder)
    elif built_in:
        comparisons, held_out = (
            make_comparisons(sft_policy, tokenizer, data.draw(prompts, n, run.generator), cfg,
                             run.generator)
            for prompts, n in ((train_prompts, cfg.n_prompts), (held_out_prompts, cfg.n_held_out)))
        files.write(stored, json.dumps([comparisons, held_out]))
        companions.add(stored)
    K = len(comparisons[0]["response_ids"])

    # ---- 3. train
    shape = GPTConfig(**asdict(trunk.config) | {"dropout": 0.0} | cfg.how())
    reward_model = ScalarGPT(shape, init_from=trunk).to(device)
    add_lora(reward_model, cfg.lora_rank)
    optimizer = torch.optim.AdamW(trained(reward_model), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    state = dict(reward_model=reward_model, optimizer=optimizer, gpt=asdict(reward_model.config),
                 tokenizer=data.fingerprint(tokenizer), sft=files.fingerprint(sft_policy),
                 data=corpus.source_of(train_prompts), companions=companions)
    steps = cfg.epochs * (len(comparisons) // cfg.batch_size)
    better, worse = torch.triu_indices(K, K, offset=1)                       # all pairs of a ranking
    first = run.restore(**state)                                 # 0, or where the checkpoint stands
    if built_in:
        companions.check(stored)
    for step in run.steps(first, steps):
        lr = experiment.learning_rate(step, steps, cfg.lr, cfg.warmup, cfg.lr_floor)
        experiment.set_learning_rate(optimizer, lr)
        metrics, batch = {}, data.batch_rows(len(comparisons), cfg.batch_size, step, cfg.seed)
        for rows in data.parts(batch, cfg.accumulation):
            inputs, targets, mask = rows_of([comparisons[i] for i in rows], device)         # (B K, T)
            if cfg.token_wise:
                tokens = torch.cat([inputs, targets[:, -1:]], dim=1)                        # (B K, T+1)
                by_rank = [x.view(len(rows), K, -1) for x in
                           (reward_model(tokens)[:, 1:], targets, mask)]                    # (B, K, T)
                pairs = [x[:, k].flatten(0, 1) for x in by_rank for k in (better, worse)]   # (pairs, T)
                chosen, rejected, weights = token_wise_scores(*pairs)
            else:
                scores = sequence_scores(reward_model, inputs, targets, mask).view(-1, K)   # (B, K)
                chosen, rejected, weights = scores[:, better], scores[:, worse], None
            loss, part = preference_loss(chosen, rejected, cfg.loss, cfg.margin, weights)
            share = len(rows) / len(batch)
            (share * loss).backward()
            experiment.add(metrics, part, share)
        grad_norm = torch.nn.utils.clip_grad_norm_(reward_model.parameters(), cfg.grad_clip)
        run.must_be_finite(loss=metrics["loss"], grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        metrics.update(lr=lr, grad_norm=grad_norm)
        run.log(step, metrics, ["loss", "accuracy", "margin", "lr", "grad_norm"], every=20)
        run.checkpoint(step + 1)

    # ---- 4. held out
    reward_model.eval()
    reward_model.normalise(gain=1.0, bias=0.0)
    scores = score_all(reward_model, held_out, device)                       # (N, K), as trained
    experiment.check_finite(scores, "the score of a held-out response")
    if built_in:
        gold = torch.tensor([c["gold"] for c in held_out])                   # (N, K)
        accuracy = reviews.agreement(scores, gold, cfg.annotator_temperature).item()
        bayes = reviews.agreement(gold, gold, cfg.annotator_temperature).item()
        truth = reviews.preference(gold[:, better], gold[:, worse], cfg.annotator_temperature)      # (N, pairs)
        lines = [f"expected accuracy   {accuracy:.3f} on {len(held_out) * len(better)} held-out comparisons",
                 f"Bayes accuracy      {bayes:.3f}, the most anybody can agree with these annotators",
                 f"ratio               {accuracy / bayes:.3f}"]
        results = {"accuracy": accuracy, "bayes_accuracy": bayes, "ratio": accuracy / bayes}
    else:
        right = 0.5 + 0.5 * (scores[:, 0] - scores[:, 1]).sign()             # (N,)
        accuracy, error = right.mean().item(), right.std().item() / len(right) ** 0.5
        truth = torch.ones(len(scores), 1)                                   # what the labels say
        lines = [f"accuracy            {accuracy:.3f} ± {error:.3f} on {len(held_out)} held-out comparisons"]
        results = {"accuracy": accuracy, "standard_error": error}

    # ---- 5. normalise
    if built_in:                                                             # these are the policy's samples
        check_spread(scores.mean().item(), scores.std().item(), "responses of the SFT policy")
        gain, bias = 1 / scores.std().item(), -(scores.mean() / scores.std()).item()
    else:
        gain, bias = normalisation(functools.partial(sequence_scores, reward_model), sft_policy, tokenizer,
                                   train_prompts, cfg)
    reward_model.normalise(gain, bias)
    run.save(steps)

    picture = experiment.curves(run.folder, "Reward model", [
        ("loss", "nats per comparison", ["loss"]), ("accuracy on noisy labels", "", ["accuracy"])])
    return run.finish("\n".join([
        *lines, "", experiment.table(calibration(scores, truth)), "",
        f"normalised by       gain {gain:.3f}, bias {bias:.3f}",
        f"curves      {picture}", f"checkpoint  {run.folder}/checkpoint.pt",
        f"next        {options.next_command(cfg, 'ppo')}"]), results | {"gain": gain, "bias": bias})


if __name__ == "__main__":
    experiment.launch(main, Config, __doc__)
