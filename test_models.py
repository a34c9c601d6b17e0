"""Llama, Qwen2, Qwen3: to become a section of test_all.py"""
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import model
import sft
from conftest import seeded
from lab import chat
from lab.tokenizer import encode_prompt
from model import GPT, GPTConfig, ScalarGPT, add_lora, generate, merged, token_logprobs

# --------------------------------------------------------------------------------------------------
# model.py: Llama, Qwen2 and Qwen3, against transformers

LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0,
              high_freq_factor=4.0, original_max_position_embeddings=64)
FAMILIES = {                                             # n_kv_head < n_head in all
    "llama": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(rms_norm_eps=1e-5, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(rms_norm_eps=1e-6)),
    "qwen3": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True))}         # not C / n_head = 8


def random_family(name, seed=0):
    """One of transformers' models with random weights, norms far from 1 and biases far from 0"""
    import transformers
    family, settings = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=96, **settings)
    made = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    torch.manual_seed(seed)
    for key, p in made.named_parameters():
        p.data.normal_(mean=float("norm" in key), std=0.15 if p.dim() == 2 else 0.3)
    return made


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """{name: a folder with one of transformers' models, rows of ids, its log-probs on them}"""
    found = {}
    ids = torch.randint(97, (3, 200), generator=seeded())        # beyond 64 / 8, where llama3 bends
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        theirs = random_family(name)
        theirs.save_pretrained(folder)
        with torch.no_grad():
            found[name] = folder, ids, theirs(ids).logits.log_softmax(dim=-1)
    return found


def difference(gpt, ids, wanted):
    with torch.no_grad():
        return (gpt.eval()(ids).log_softmax(dim=-1) - wanted).abs().max().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_equal_transformers_and_files_come_back_to_the_bit(name, families, tmp_path):
    from transformers import AutoModelForCausalLM
    folder, ids, wanted = families[name]
    ours = GPT.from_pretrained(folder)
    assert difference(ours, ids, wanted) <= 1e-5
    ours.save_pretrained(tmp_path, eos_id=[96, 0])
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert back.generation_config.eos_token_id == [96, 0]
    stored = load_file(tmp_path / "model.safetensors")
    originals = load_file(folder / "model.safetensors")
    assert stored.keys() == originals.keys()
    assert all(torch.equal(stored[name], originals[name]) for name in originals)
    with torch.no_grad():
        assert (back(ids).logits.log_softmax(dim=-1) - wanted).abs().max() <= 1e-5


def swapped_gate(gpt, monkeypatch):
    for block in gpt.transformer.h:
        gate, up = block.mlp.c_fc.weight.data.chunk(2)
        block.mlp.c_fc.weight.data = torch.cat([up, gate])


def interleaved(x, cos, sin):
    first, second = x[..., ::2], x[..., 1::2]
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return x * cos + turned * sin


def tiled(gpt, monkeypatch):
    """Query head h reads key head h mod n_kv_head, not h // (n_head / n_kv_head)."""
    for block in gpt.transformer.h:
        q = block.attn.widths[0]
        d = block.attn.d
        order = torch.arange(q).view(2, 2, d).transpose(0, 1).flatten()
        block.attn.c_attn.weight.data[:q] = block.attn.c_attn.weight.data[:q][order]
        block.attn.c_proj.weight.data = block.attn.c_proj.weight.data[:, order]


def wrong_eps(gpt, monkeypatch):
    for layer in gpt.modules():
        if isinstance(layer, model.RMSNorm):
            layer.eps *= 10


def gelu_for_silu(gpt, monkeypatch):
    monkeypatch.setattr(model.F, "silu", torch.nn.functional.gelu)


def interleaved_rope(gpt, monkeypatch):
    monkeypatch.setattr(model, "rotate", interleaved)


def without(setting, value):
    def change(gpt, monkeypatch):
        setattr(gpt.config, setting, value)
    return change


def no_qk_norm(gpt, monkeypatch):
    for block in gpt.transformer.h:
        block.attn.q_norm = block.attn.k_norm = torch.nn.Identity()


def no_qkv_bias(gpt, monkeypatch):
    for block in gpt.transformer.h:
        block.attn.c_attn.bias.data.zero_()


MISTAKES = [(mistake, name) for mistake in (
    wrong_eps, gelu_for_silu, swapped_gate, tiled, interleaved_rope, without("rope_theta", 2e4))
    for name in FAMILIES]
MISTAKES += [(without("rope_scaling", None), "llama3"), (no_qk_norm, "qwen3"),
             (no_qkv_bias, "qwen2")]


@pytest.mark.parametrize("mistake, name", MISTAKES, ids=lambda x: getattr(x, "__name__", x))
def test_every_mistake_that_ports_have_made_is_seen(mistake, name, families, monkeypatch):
    """Each costs at least 5e-5 nats somewhere, five times what equality allows."""
    folder, ids, wanted = families[name]
    wrong = GPT.from_pretrained(folder)
    mistake(wrong, monkeypatch)
    assert difference(wrong, ids, wanted) > 5e-5


def test_an_unseen_difference_in_rotary_positions_would_show_beyond_the_original_context(families):
    """Llama 3's scaling changes nothing at the first position: short rows would hide it."""
    folder, ids, wanted = families["llama3"]
    wrong = GPT.from_pretrained(folder)
    wrong.config.rope_scaling = None
    assert difference(wrong, ids[:, :1], wanted[:, :1]) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_samplers_cached_steps_equal_the_full_forward(name, families):
    """Prompts of different length, one of one token; greedy tokens and log-probabilities"""
    folder, ids, _ = families[name]
    gpt = GPT.from_pretrained(folder, block_size=64).eval()
    prompts = [ids[0, :5].tolist(), ids[1, :17].tolist(), ids[2, :1].tolist(), []]
    tokens, mask = generate(gpt, prompts, 30, [96, 95], temperature=0)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        likeliest = gpt(inputs).argmax(dim=-1)
    assert mask.sum() >= 60 and torch.equal(likeliest[mask > 0], targets[mask > 0])
    assert tokens[3, 0] == 96                            # an empty prompt is the first of the ends
    with torch.no_grad():
        whole = token_logprobs(gpt, inputs, targets, mask)
        for row, prompt in enumerate(prompts):           # the row alone, without padding
            n = int(mask[row].nonzero().max()) + 1
            alone = token_logprobs(gpt, *(x[row:row + 1, :n] for x in (inputs, targets, mask)))
            torch.testing.assert_close(alone[0], whole[row, :n], atol=1e-5, rtol=0)


def test_a_response_ends_with_any_of_several_end_tokens(families):
    folder, ids, _ = families["qwen2"]
    gpt = GPT.from_pretrained(folder, block_size=64).eval()
    prompts = [row[:9].tolist() for row in ids.repeat(8, 1)]
    ends = list(range(0, 97, 6))
    tokens, mask = generate(gpt, prompts, 20, ends, generator=seeded())
    responses = [row[m > 0].tolist() for row, m in zip(tokens[:, 1:], mask)]
    assert any(response[-1] != ends[0] for response in responses)
    for response in responses:
        assert not set(response[:-1]) & set(ends)
        assert response[-1] in ends or len(response) == 20


def test_embeddings_without_a_token_are_never_sampled_and_go_back_into_the_file(families, tmp_path):
    folder, ids, wanted = families["qwen3"]
    cut = GPT.from_pretrained(folder, vocab_size=90).eval()
    shown = ids.clamp(max=89)
    whole = GPT.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = cut(shown)
        torch.testing.assert_close(logits, whole(shown)[:, :, :90])
    assert logits.shape[-1] == 90
    cut.save_pretrained(tmp_path, eos_id=5)
    stored, originals = (load_file(x / "model.safetensors") for x in (tmp_path, folder))
    assert all(torch.equal(stored[name], originals[name]) for name in originals)


@pytest.mark.parametrize("name", [*FAMILIES, "gpt2"])
def test_an_exported_reward_model_ranks_as_ours_in_transformers(name, families, tmp_path):
    """Equal to the constant for RMSNorm's families, whose class has no bias to hold it"""
    from transformers import AutoModelForSequenceClassification
    torch.manual_seed(0)
    if name == "gpt2":
        trunk = GPT(GPTConfig(97, 64, n_layer=2, n_head=2, n_embd=16))
    else:
        trunk = GPT.from_pretrained(families[name][0], vocab_size=95, block_size=64)
    ours = ScalarGPT(trunk.config, init_from=trunk).eval()
    ours.normalise(gain=3.0, bias=-0.7)
    ours.head.bias.data.fill_(0.4)
    ours.save_pretrained(tmp_path, eos_id=3)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    constant = theirs.config.to_dict().get("scores_lack_constant", 0.0)
    assert (name == "gpt2") == (constant == 0.0)
    ids = torch.randint(90, (4, 12), generator=seeded())
    ids[0, 7:] = trunk.config.vocab_size                 # the pad token of the export
    with torch.no_grad():
        scores = theirs(ids).logits[:, 0] + constant
        rows = [ours(row[row < trunk.config.vocab_size][None])[0, -1] for row in ids]
    torch.testing.assert_close(scores, torch.stack(rows), atol=1e-5, rtol=1e-5)
    stored = load_file(tmp_path / "model.safetensors")
    assert len(next(w for key, w in stored.items() if "embed" in key or "wte" in key)) >= 96


def test_lora_changes_every_stacked_matrix_apart_and_is_merged_at_the_export(families, tmp_path):
    from transformers import AutoModelForCausalLM
    folder, ids, _ = families["qwen2"]
    gpt = add_lora(GPT.from_pretrained(folder).eval(), 2)
    attn, mlp = gpt.transformer.h[0].attn, gpt.transformer.h[0].mlp
    assert [tuple(b.shape) for b in attn.c_attn.lora_b] == [(32, 2), (16, 2), (16, 2)]
    assert [tuple(b.shape) for b in mlp.c_fc.lora_b] == [(56, 2), (56, 2)]
    torch.manual_seed(1)
    for name, p in gpt.named_parameters():
        if "lora_b" in name:
            p.data.normal_(std=0.3)
    weights = merged(gpt.state_dict())
    change = weights["transformer.h.0.attn.c_attn.weight"] - attn.c_attn.weight
    for part in change.split([32, 16, 16]):
        assert torch.linalg.matrix_rank(part, tol=1e-4) == 2
    gpt.save_pretrained(tmp_path, eos_id=0)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, gpt(ids), atol=1e-4, rtol=1e-4)


def test_low_rank_changes_of_earlier_versions_are_merged_too():
    """They had one change for q, k and v together, under other names."""
    weight, a, b = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    old = {"h.weight": weight, "h.lora_a": a, "h.lora_b": b}
    torch.testing.assert_close(merged(old), {"h.weight": weight + model.LORA_SCALE * b @ a})


# ---- files

def edited(families, name, tmp_path, weights=None, config=None, removed=()):
    """A copy of a family's folder with changed weights (a function of the dict) and settings"""
    folder = tmp_path / "edited"
    shutil.copytree(families[name][0], folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(weights(tensors) if weights else tensors, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text()) | (config or {})
    settings = {key: x for key, x in settings.items() if key not in removed}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


OLD_ROPE = dict(LLAMA3, type="llama3")
del OLD_ROPE["rope_theta"]
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("name, weights, config, removed", [
    pytest.param("qwen2", None, dict(rope_theta=10000.0), ["rope_parameters"], id="old rope"),
    pytest.param("llama3", None, dict(rope_theta=10000.0, rope_scaling=OLD_ROPE),
                 ["rope_parameters"], id="old rope scaling"),
    pytest.param("llama3", lambda x: x | {"lm_head.weight": x[EMBEDDING].clone()}, None, [],
                 id="a head that repeats the embedding"),
    pytest.param("qwen3", lambda x: {key.removeprefix("model."): w for key, w in x.items()}, None,
                 [], id="a trunk by itself"),
    pytest.param("llama", lambda x: x | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, None, [],
        id="an old table of frequencies"),
    pytest.param("qwen2", None, dict(sliding_window=16, use_sliding_window=False), [],
                 id="a sliding window that is off")])
def test_other_ways_to_write_the_same_model_are_read(name, weights, config, removed, families,
                                                     tmp_path):
    from transformers import AutoModelForCausalLM
    folder = edited(families, name, tmp_path, weights, config, removed)
    ids = families[name][1]
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = theirs(ids).logits.log_softmax(dim=-1)
    assert difference(GPT.from_pretrained(folder), ids, wanted) <= 1e-5


def test_sharded_and_bin_files_are_read(families, tmp_path):
    folder, ids, wanted = families["llama"]
    shutil.copy(folder / "config.json", tmp_path)
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    assert difference(GPT.from_pretrained(tmp_path), ids, wanted) <= 1e-5
    sharded = tmp_path / "sharded"
    random_family("llama").save_pretrained(sharded, max_shard_size="10KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert difference(GPT.from_pretrained(sharded), ids, wanted) <= 1e-5


@pytest.mark.parametrize("name, config, message", [
    ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope of the type yarn"),
    ("llama", dict(rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}),
     "rope of the type dynamic"),
    ("llama", dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
     "rope of the type linear"),
    ("llama", dict(attention_bias=True), "attention_bias True, wanted False"),
    ("llama", dict(mlp_bias=True), "mlp_bias True"),
    ("llama", dict(hidden_act="gelu"), "hidden_act 'gelu', wanted 'silu'"),
    ("llama", dict(intermediate_size=None), "no number for intermediate_size"),
    ("llama3", dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "llama3 rope has"),
    ("qwen2", dict(use_sliding_window=True), "use_sliding_window True"),
    ("qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "with sliding_attention"),
    ("llama", dict(model_type="smollm3"), "every fourth layer has no positions"),
    ("llama", dict(model_type="gemma2"), "gemma2 .scaled embeddings"),
    ("llama", dict(model_type="mistral"), "mistral .sliding windows"),
    ("qwen3", dict(model_type="qwen3_moe"), "qwen3_moe .a mixture of experts"),
    ("llama", dict(model_type="deepseek_v3"), "deepseek_v3, which model.py does not compute"),
    ("llama", dict(quantization_config={"quant_method": "gptq"}), "quantized weights"),
    ("qwen3", dict(tie_word_embeddings=False), "missing are lm_head.weight"),
    ("llama", dict(tie_word_embeddings=True), "lm_head.weight differs from embed_tokens.weight"),
    ("llama", dict(num_key_value_heads=4), r"k_proj.weight: got \(16, 32\), wanted 32 rows"),
    ("llama", dict(hidden_size=40, head_dim=8), "wte.weight: got .97, 32. of .*, wanted .97, 40."),
    ("llama", dict(num_hidden_layers=3), "not those of a Llama of 3 layers: missing are layers.2")])
def test_what_is_not_computed_is_refused_by_name(name, config, message, families, tmp_path):
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(edited(families, name, tmp_path, config=config))


def test_a_weight_too_many_and_a_file_cut_short_are_refused(families, tmp_path):
    folder = edited(families, "llama", tmp_path,
                    lambda x: x | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    with pytest.raises(ValueError, match="unknown are layers.0.self_attn.q_norm.weight"):
        GPT.from_pretrained(folder)
    whole = (families["llama"][0] / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("dtype, limit", [("bfloat16", 0.05), ("float16", 0.01)])
def test_half_precision_rounds_and_the_cache_keeps_its_type(dtype, limit, families):
    folder, ids, wanted = families["qwen3"]
    gpt = GPT.from_pretrained(folder, dtype=dtype).eval()
    off = difference(gpt, ids[:, :64], wanted[:, :64])
    assert 1e-5 < off < 20 * limit
    generate(gpt, [ids[0, :5].tolist()], 4, 96, generator=seeded())


# ---- a real pretrained model: SMOLLM2=FOLDER python -m pytest -q -k smollm2

SMOLLM2 = os.environ.get("SMOLLM2", "")
needs_smollm2 = pytest.mark.skipif(not SMOLLM2, reason="needs SmolLM2-135M-Instruct's folder in the "
                                                       "environment variable SMOLLM2")
QUESTIONS = ["What is 17 + 25?", "Name three colours.", "Who wrote Hamlet?", "Say hello in French.",
             "What is the capital of Italy?", "Write a haiku about rain.", "Is the sky green?",
             "List two fruits.", "What do bees make?", "Count from one to five."]


@needs_smollm2
def test_smollm2_answers_greedily_as_in_transformers_and_comes_back(tmp_path):
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    tokenizer = sft.tokenizer_of(SMOLLM2, "auto")
    ours = GPT.from_pretrained(SMOLLM2, vocab_size=tokenizer.n_vocab, block_size=128).eval()
    prompts = [encode_prompt(tokenizer, chat.written([("user", question)], tokenizer.chat))
               for question in QUESTIONS]
    tokens, mask = generate(ours, prompts, 40, tokenizer.end_tokens, temperature=0)
    for i, prompt in enumerate(prompts):
        answer = tokens[i, 1:][mask[i] > 0].tolist()
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False,
                                 eos_token_id=list(tokenizer.end_tokens), pad_token_id=0)[0]
        assert prompt + answer == wanted.tolist(), tokenizer.decode(answer)
    ours.save_pretrained(tmp_path, tokenizer.end_tokens)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits.log_softmax(-1),
                                   ours(tokens).log_softmax(-1), atol=1e-5, rtol=0)
