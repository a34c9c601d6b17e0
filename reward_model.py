"""
Stage 2: a reward model from comparisons.

    1. sample       K responses y_1 .. y_K to each prompt x from the SFT policy
    2. annotate     the annotators rank them, each pair with
                    P(i before j) = sigmoid((gold_i - gold_j) / temperature)
                    (Bradley and Terry 1952). K forwards give K (K - 1) / 2 comparisons
    3. train        the SFT weights with a scalar head r(x, y), read after the last response token:
                    - mean over comparisons of log sigmoid(r(x, y_w) - r(x, y_l))
                    (Ouyang et al. 2022, equation 1)
    4. held out     expected accuracy beside the Bayes accuracy, an upper bound; calibration
    5. normalise    gain and bias, so that scores have mean 0 and standard deviation 1 on the SFT
                    policy's samples (Ziegler et al. 2019): then a KL strength beta means the same
                    for every reward model

With --data the comparisons come from the data set: 1 and 2 are left out, and 4 counts how often the
score agrees with the labels.

Departures from Ouyang et al.: K = 4, and theirs is 4 to 9; the annotators are simulated, so they
are known exactly.

    python reward_model.py --config small
        -> out/small/reward_model: checkpoint.pt, comparisons.json
"""

import functools
import json
from dataclasses import asdict, dataclass
from typing import Literal

import torch

import data
import reviews
import sft
from lab import files, pretrained
from lab.chat import jinja_of
from lab.config import Common
from lab.report import progress, table
from lab.run import (Run, check_finite, ensure, launch, learning_rate, self_contained,
                     set_learning_rate, stop)
from lab.tokenizer import (check_vocabulary, decode_response, export_tokenizer, load_tokenizer,
                           tokenizer_id)
from model import GPTConfig, ScalarGPT, add_lora, masked_mean, sequence_scores, trained
from presets import presets_of
from sampler import generate


@dataclass
class Config(Common):
    init: str = ""                  # weights to start from, if not SFT's; see sft.py --init
    n_prompts: int | None = 2400    # rankings to train on, or comparisons of --data; none: all
    n_held_out: int = 1000          # held-out rankings or comparisons
    n_responses: int = 4            # K, responses in a ranking; 2 is the plain case
    annotator_temperature: float = 0.6      # annotators' noise; at 0 they would follow gold
    loss: Literal["bradley_terry", "fidelity"] = "bradley_terry"    # loss of a comparison
    margin: float = 0.0             # by how much the chosen score should lead
    token_wise: bool = False        # compare at every column where two rows differ (DeepSpeed-Chat)
    epochs: int = 1                 # passes over the rankings; reward models overfit soon
    batch_size: int = 8             # rankings per update
    lr: float = 7e-4                # AdamW's learning rate at its peak
    warmup: int = 20                # updates of linear warm-up, then linear decay
    lr_floor: float = 0.02          # final learning rate, as a share of the peak
    weight_decay: float = 0.0       # AdamW's weight decay
    grad_clip: float = 1.0          # largest gradient norm
    presets = presets_of("reward_model")


# --------------------------------------------------------------------------------------------------
# The maths

def preference_loss(chosen_scores, rejected_scores, kind="bradley_terry", margin=None,
                    weights=None):
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
    The scores to compare at every column, in DeepSpeed-Chat's variant: all (N, T)

    A value belongs to the state after its target. A pair is compared from the first column where
    its targets differ to the end of the longer row, two equal rows at their last column. A row that
    has ended keeps its last score; DeepSpeed-Chat scores its padding.
    -> chosen scores, rejected scores, weights that sum to 1 over a pair
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
    How often the higher score is preferred, in bins of its predicted probability -> table rows

    The prediction is sigmoid(difference). scores (N, K); truth (N, pairs): how often the first of
    each pair is preferred, pairs as in triu_indices.
    """
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    difference = (scores[:, i] - scores[:, j]).flatten()                     # (pairs,)
    truth = torch.where(difference >= 0, truth.flatten(), 1 - truth.flatten())
    predicted = torch.sigmoid(difference.abs())
    rows = [["P(higher score preferred)", "predicted", "true", "pairs"]]
    for low in (0.5, 0.6, 0.7, 0.8, 0.9):
        high = low + 0.1 if low < 0.9 else 1.1           # the last bin includes 1
        at = (predicted >= low) & (predicted < high)
        if at.any():
            rows.append([f"{low:.1f} to {low + 0.1:.1f}", predicted[at].mean().item(),
                         truth[at].mean().item(), int(at.sum())])
    return rows


# --------------------------------------------------------------------------------------------------
# Comparisons

def make_comparisons(policy, tokenizer, prompts, cfg, generator):
    """
    Rankings of sampled responses: dicts of prompt, prompt_ids, responses, response_ids, gold

    The last three are lists, best first. Ids are kept as they were sampled: encoding the text again
    may give different ones.
    """
    K = cfg.n_responses
    comparisons = []
    chunks = [prompts[i:i + 128] for i in range(0, len(prompts), 128)]
    for chunk in progress(chunks, f"sampling {K} responses to {len(prompts)} prompts"):
        texts = [tokenizer.decode(ids) for ids in chunk]
        tokens, mask = generate(policy, [ids for ids in chunk for _ in range(K)],
                                cfg.max_new_tokens, tokenizer.end_tokens, generator=generator)
        response_ids = data.responses_of(tokens, mask)
        responses = [decode_response(tokenizer, ids) for ids in response_ids]    # text, finished
        gold = torch.tensor([reviews.gold(texts[i // K], *response)
                             for i, response in enumerate(responses)])
        order = reviews.rank(gold.view(-1, K), generator, cfg.annotator_temperature)
        for n, prompt in enumerate(texts):
            best_first = [n * K + k for k in order[n].tolist()]
            comparisons.append({"prompt": prompt, "prompt_ids": chunk[n],
                                "responses": [responses[i][0] for i in best_first],
                                "response_ids": [response_ids[i] for i in best_first],
                                "gold": [gold[i].item() for i in best_first]})
    return comparisons


def read_comparisons(folder):
    """The comparisons that a stage on the built-in task has stored -> to train on, held out"""
    stored = files.read_json(folder / "comparisons.json")
    is_pair = isinstance(stored, list) and len(stored) == 2
    if not (is_pair and all(isinstance(part, list) for part in stored)):
        stop(f"{folder}/comparisons.json is not what reward_model.py writes; "
             f"{files.recovery_hint(folder)}")
    return stored


def batch_of(comparisons, device):
    """Rankings -> inputs, targets, mask (N K, T): a prompt's K responses in K rows, best first"""
    prompts = [c["prompt_ids"] for c in comparisons for _ in c["response_ids"]]
    responses = [ids for c in comparisons for ids in c["response_ids"]]
    return [t.to(device) for t in data.collate(prompts, responses)]


@torch.no_grad()
def score_all(reward_model, comparisons, device, batch_size=64):
    """Scores of all responses of rankings -> (N, K)"""
    scores = []
    for i in range(0, len(comparisons), batch_size):
        batch = batch_of(comparisons[i:i + batch_size], device)
        scores.append(sequence_scores(reward_model, *batch))
    return torch.cat(scores).view(len(comparisons), -1).cpu()


@torch.no_grad()
def normalisation(raw, policy, tokenizer, prompts, cfg, n=512):
    """The gain and bias that give n of the policy's responses mean 0 and standard deviation 1"""
    generator = torch.Generator().manual_seed(0)         # the same normalisation at every seed
    temperature = getattr(cfg, "temperature", 1.0) or 1.0
    drawn = data.draw(prompts, n, generator)
    scores = []
    for i in range(0, n, 64):
        tokens, mask = generate(policy, drawn[i:i + 64], cfg.max_new_tokens, tokenizer.end_tokens,
                                temperature, generator)
        scores.append(raw(*data.shift(tokens), mask))
    scores = torch.cat(scores)                                               # (n,)
    check_finite(scores, "the reward of a response of the SFT policy")
    mean, std = scores.mean().item(), scores.std().item()
    check_spread(mean, std, f"{n} responses of the SFT policy")
    return 1 / std, -mean / std


def check_spread(mean, std, what):
    """Exit if all scores are equal: there is nothing to learn from them."""
    if not std >= 1e-6 * max(1.0, abs(mean)):
        stop(f"the reward gave {mean:g} to each of {what}: there is nothing to learn from, and "
             "nothing to normalise by (--normalise_reward 0 leaves a function's or a classifier's "
             "reward as it is)")


# --------------------------------------------------------------------------------------------------
# A finished stage's reward model

def load_reward_model(folder, sft_policy, tokenizer, device, **compute_options):
    """The reward model of a finished stage, in eval mode. It must share the policy's vocabulary."""
    saved = files.load_checkpoint(folder, "reward_model", "gpt", "tokenizer", "sft")
    check_vocabulary(saved["tokenizer"], tokenizer, folder)
    if saved["sft"] != files.fingerprint(sft_policy):
        print(f"warning: {folder} was made from a different SFT policy: its scores are not "
              "normalised for this one")
    return sft.rebuild(ScalarGPT, saved, folder, "reward_model", **compute_options).to(device)


def export(folder, to):
    """Write a finished reward model, for AutoModelForSequenceClassification, and its tokenizer."""
    saved = files.load_checkpoint(folder, "reward_model", "gpt")
    tokenizer = load_tokenizer(folder)
    reward_model = sft.rebuild(ScalarGPT, saved, folder, "reward_model")
    with files.new_folder(to) as temporary:
        reward_model.save_pretrained(temporary, tokenizer.end_tokens)
        export_tokenizer(tokenizer, temporary, pad=True, chat_template=jinja_of(tokenizer))


def load_trunk(cfg, sft_policy, tokenizer):
    """The model whose weights the reward model starts from: the SFT policy, or what --init names"""
    if not cfg.init:
        return sft_policy
    if pretrained.nanogpt(cfg.init):
        print(f"note: {cfg.init} does not name its tokenizer; it is taken to be the SFT policy's")
    elif tokenizer_id(sft.tokenizer_of(cfg.init, tokenizer.chat, tokenizer.system)) \
            != tokenizer_id(tokenizer):
        stop(f"--init {cfg.init} uses a different tokenizer from the SFT policy, whose ids it must "
             "read; give weights with the same one. GPT-2's of all sizes share theirs")
    return sft.pretrained_gpt(cfg.init, tokenizer, block_size=sft_policy.config.block_size)


def check(cfg):
    """Exit, before any work, on settings that cannot work."""
    data.check_source(cfg.data)
    if cfg.init:
        sft.check_init(cfg.init)
    data.check_comparisons(cfg)
    if cfg.n_responses < 2:
        stop(f"--n_responses got {cfg.n_responses}; a comparison takes at least 2")
    if cfg.data == "reviews":
        if cfg.n_prompts is None:
            stop("--n_prompts none takes all of a data set, but the built-in task can generate "
                 "prompts forever: give a number")
        data.check_enough(cfg.n_prompts, cfg.batch_size, "rankings")


@self_contained
def main(cfg):
    run = Run(cfg, "reward_model", export)
    if run.finished:
        return run.show()
    check(cfg)
    device = run.device
    built_in = cfg.data == "reviews"
    sft_folder = ensure(cfg, sft)
    sft_policy, tokenizer = sft.load_policy(sft_folder, device, **cfg.compute_options())
    block_size = sft_policy.config.block_size
    train_prompts, held_out_prompts = data.prompts(cfg, tokenizer, block_size)
    trunk = load_trunk(cfg, sft_policy, tokenizer)
    if not built_in:
        comparisons, held_out = data.comparisons(cfg, tokenizer, block_size, cfg.n_prompts,
                                                 cfg.n_held_out)
        data.check_enough(len(comparisons), cfg.batch_size, "comparisons")
    run.begin()
    sources = run.sources(tokenizer, sft_policy, data=train_prompts)

    # ---- 1. sample, 2. annotate
    if built_in and run.resuming:
        comparisons, held_out = read_comparisons(run.folder)
    elif built_in:
        drawn = data.draw(train_prompts, cfg.n_prompts, run.generator)
        comparisons = make_comparisons(sft_policy, tokenizer, drawn, cfg, run.generator)
        drawn = data.draw(held_out_prompts, cfg.n_held_out, run.generator)
        held_out = make_comparisons(sft_policy, tokenizer, drawn, cfg, run.generator)
        files.write(run.folder / "comparisons.json", json.dumps([comparisons, held_out]))
    K = len(comparisons[0]["response_ids"])
    better, worse = torch.triu_indices(K, K, offset=1)                       # all pairs of ranks

    # ---- 3. train
    shape = asdict(trunk.config) | {"dropout": 0.0} | cfg.compute_options()
    reward_model = ScalarGPT(GPTConfig(**shape), init_from=trunk).to(device)
    add_lora(reward_model, cfg.lora_rank)
    optimizer = torch.optim.AdamW(trained(reward_model), lr=cfg.lr, betas=(0.9, 0.98),
                                  weight_decay=cfg.weight_decay, fused=True)
    first = run.restore(reward_model=reward_model, optimizer=optimizer,
                        gpt=asdict(reward_model.config), **sources)
    steps = cfg.epochs * (len(comparisons) // cfg.batch_size)
    for step in run.steps(first, steps):
        lr = learning_rate(step, steps, cfg.lr, cfg.warmup, cfg.lr_floor)
        set_learning_rate(optimizer, lr)
        means = data.Means()
        batch = data.batch_rows(len(comparisons), cfg.batch_size, step, cfg.seed)
        for rows, share in data.microbatches(batch, cfg.accumulation):
            inputs, targets, mask = batch_of([comparisons[i] for i in rows], device)    # (B K, T)
            if cfg.token_wise:
                tokens = torch.cat([inputs, targets[:, -1:]], dim=1)         # (B K, T+1)
                values = reward_model(tokens)[:, 1:]                         # after each target
                by_rank = [x.view(len(rows), K, -1) for x in (values, targets, mask)]  # (B, K, T)
                pairs = [x[:, k].flatten(0, 1)
                         for x in by_rank for k in (better, worse)]          # (pairs, T) each
                chosen, rejected, weights = token_wise_scores(*pairs)
            else:
                scores = sequence_scores(reward_model, inputs, targets, mask).view(-1, K)   # (B, K)
                chosen = scores[:, better]                                   # (B, pairs)
                rejected = scores[:, worse]
                weights = None
            loss, metrics = preference_loss(chosen, rejected, cfg.loss, cfg.margin, weights)
            run.backward(share * loss)
            means.add(metrics, share)
        means.add(run.step(cfg.grad_clip, grad_norm=optimizer))              # clips, steps, zeroes
        metrics = means.result() | {"lr": lr}
        run.log(step, metrics, ["loss", "accuracy", "margin", "lr", "grad_norm"], every=20)
        run.checkpoint(step + 1)

    # ---- 4. held out
    reward_model.eval()
    reward_model.normalise(gain=1.0, bias=0.0)
    scores = score_all(reward_model, held_out, device)                       # (N, K), as trained
    check_finite(scores, "the score of a held-out response")
    if built_in:
        gold = torch.tensor([c["gold"] for c in held_out])                   # (N, K)
        temperature = cfg.annotator_temperature
        accuracy = reviews.agreement(scores, gold, temperature).item()
        bayes = reviews.agreement(gold, gold, temperature).item()
        truth = reviews.preference(gold[:, better], gold[:, worse], temperature)     # (N, pairs)
        lines = [f"expected accuracy   {accuracy:.3f} on {len(held_out) * len(better)} held-out "
                 "comparisons",
                 f"Bayes accuracy      {bayes:.3f}, the highest that any model can reach with "
                 "these annotators",
                 f"ratio               {accuracy / bayes:.3f}"]
        results = {"accuracy": accuracy, "bayes_accuracy": bayes, "ratio": accuracy / bayes}
    else:
        right = 0.5 + 0.5 * (scores[:, 0] - scores[:, 1]).sign()             # (N,)
        accuracy = right.mean().item()
        error = right.std().item() / len(right) ** 0.5
        truth = torch.ones(len(scores), 1)                                   # what the labels say
        lines = [f"accuracy            {accuracy:.3f} ± {error:.3f} on {len(held_out)} held-out "
                 "comparisons"]
        results = {"accuracy": accuracy, "standard_error": error}

    # ---- 5. normalise
    if built_in:                                         # the held-out responses are SFT's samples
        check_spread(scores.mean().item(), scores.std().item(), "responses of the SFT policy")
        gain, bias = 1 / scores.std().item(), -(scores.mean() / scores.std()).item()
    else:
        raw = functools.partial(sequence_scores, reward_model)
        gain, bias = normalisation(raw, sft_policy, tokenizer, train_prompts, cfg)
    reward_model.normalise(gain, bias)
    run.save(steps)
    text = "\n".join([*lines, "", table(calibration(scores, truth)), "",
                      f"normalised by       gain {gain:.3f}, bias {bias:.3f}"])
    return run.finish(text, results | {"gain": gain, "bias": bias}, then="ppo", curves=[
        ("loss", "nats per comparison", ["loss"]),
        ("accuracy on noisy labels", "", ["accuracy"])])


if __name__ == "__main__":
    launch(main, Config, __doc__)
