"""
The transformers models that model.py computes: their settings and the names of their weights.

    load            a folder, a name on the hub or nanoGPT's ckpt.pt -> fields of model.py's
                    GPTConfig, weights by model.py's names
    assign          give a model that was made on "meta" its weights
    save            fields, weights -> a folder that transformers reads
    fields_of, config_of        a config.json -> the fields, and back
    to_ours, to_theirs          the names of weights

The families: GPT-2 (and nanoGPT, which has its names), Llama (and SmolLM2), Qwen2 (and Qwen2.5),
Qwen3. model.py stacks the query, key and value matrices into one, and the gate and up matrices.
Whatever model.py would compute differently raises a ValueError that names the setting.
"""

import re

import torch
import torch.nn.functional as F

from lab import pretrained

GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
         "gelu": "gelu", "gelu_python": "gelu"}          # transformers' names, and ours
GPT2 = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "norm": "layernorm",
        "tied_head": True}                               # what a config.json may leave out
GPT2_SIZES = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer",
              "n_head": "n_head", "n_embd": "n_embd", "max_position_embeddings": "block_size",
              "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
              "hidden_size": "n_embd"}
LLAMA_SIZES = {"vocab_size": "vocab_size", "max_position_embeddings": "block_size",
               "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
               "hidden_size": "n_embd", "intermediate_size": "n_inner"}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
CLASSES = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
WHY_NOT = {"smollm3": "every fourth layer has no positions", "mistral": "sliding windows",
           "gemma": "scaled embeddings and other norms", "gemma2": "scaled embeddings, soft caps",
           "gemma3_text": "scaled embeddings, sliding windows", "phi3": "fused weights",
           "qwen2_moe": "a mixture of experts", "qwen3_moe": "a mixture of experts",
           "mixtral": "a mixture of experts", "gpt_oss": "a mixture of experts",
           "qwen3_next": "linear attention"}


def load(source, changes):
    """-> fields of GPTConfig with the changes, {our name: tensor} of the whole model"""
    config, weights = pretrained.read(source)
    stored = fields_of(config)
    fields = stored | changes
    longest, n_ids = stored["block_size"], stored["vocab_size"]
    if fields["block_size"] > longest:
        raise ValueError(f"block_size {fields['block_size']} (if not given, --max_prompt_tokens "
                         f"and --max_new_tokens together) is longer than the {longest} "
                         f"positions that {source} has weights for; lower it to that or less")
    if fields["vocab_size"] > n_ids:
        raise ValueError(f"the tokenizer has {fields['vocab_size']} token ids, but {source} "
                         f"has weights for {n_ids}; they do not belong together")
    nanogpt = config.get("model_type") == "nanogpt"
    if nanogpt and not config.get("bias", True):         # biases of zero do the same
        zeros = {name.replace(".weight", ".bias"): x.new_zeros(len(x))
                 for name, x in weights.items() if re.search(r"ln_|attn|mlp", name)}
        weights = zeros | weights
    weights = to_ours(weights, stored, nanogpt)
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][:fields["block_size"]]
    names = {name: name if name == "output.weight" else f"transformer.{name}" for name in weights}
    fields |= {"vocab_rows": n_ids, "n_positions": longest}
    return fields, {names[name]: x for name, x in weights.items()}


def assign(model, weights):
    """Give a model these weights, in float32. Every shape must match."""
    for name, wanted in model.state_dict().items():
        found = weights[name]
        if found.shape != wanted.shape:
            raise ValueError(f"{name}: got {tuple(found.shape)} of {found.dtype}, wanted "
                             f"{tuple(wanted.shape)} of floats")
        if not torch.isfinite(found).all():
            raise ValueError(f"{name} holds numbers that are not finite; copy the weights again "
                             "from where they came from")
    weights = {name: x.to(torch.float32, copy=True).contiguous() for name, x in weights.items()}
    model.load_state_dict(weights, assign=True)


def save(folder, fields, weights, eos_id=None, score=None, constant=0.0):
    """
    Write config.json and model.safetensors of a language model, or with `score` of a classifier.

    score is the (1, C) head of one label. The classifier reads it just before the first pad token,
    whose id is the first beyond the vocabulary. constant is what its scores lack, for config.json.
    """
    trunk = {name.removeprefix("transformer."): x for name, x in weights.items()
             if name.startswith("transformer.")}
    config = config_of(fields, "CausalLM" if score is None else "SequenceClassification")
    if score is not None:
        pad = fields["vocab_size"]
        more_rows = max(0, pad + 1 - len(trunk["wte.weight"]))
        trunk["wte.weight"] = F.pad(trunk["wte.weight"], (0, 0, 0, more_rows))
        config |= {"vocab_size": len(trunk["wte.weight"]), "pad_token_id": pad, "reads_eos": True,
                   "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    theirs = to_theirs(trunk, fields)
    if score is not None:
        theirs["score.weight"] = score
    elif not fields["tied_head"]:
        theirs["lm_head.weight"] = weights["output.weight"]
    note = ""
    if constant:
        config["scores_lack_constant"] = constant
        note = (f"The scores lack the constant {constant:g}, which no weight of this class can "
                "hold: add it for the normalised reward. The ranking is the same without it.\n")
    pretrained.write(folder, config, theirs, eos_id, note)


# --------------------------------------------------------------------------------------------------
# Settings

def fields_of(config):
    """A config.json, or nanoGPT's model_args -> fields of GPTConfig, as a dict"""
    kind = str(config.get("model_type", "gpt2"))
    if kind == "nanogpt":
        return nanogpt_fields(config)
    if kind not in CLASSES:
        reason = f" ({WHY_NOT[kind]})" if kind in WHY_NOT else ""
        raise ValueError(f"its model_type is {kind}{reason}, which model.py does not compute; it "
                         f"computes {', '.join(CLASSES)}")
    return gpt2_fields(config) if kind == "gpt2" else llama_fields(config, kind)


def number(config, key, usual=None, whole=False):
    """A number above 0 of a config.json; usual if it has none"""
    value = config.get(key)
    value = usual if value is None else value
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"its config.json has {key} {value!r}, wanted {kind} above 0; copy it "
                         "again from where the weights came from")
    return value


def part_of(config, key):
    """A part of a config.json, {} if it has none"""
    part = config.get(key) or {}
    if not isinstance(part, dict):
        raise ValueError(f"its config.json has {key} {part!r}, wanted an object")
    return part


def check_computed(config, computed):
    """Raise unless model.py computes every setting; the first value of each list is the default."""
    for key, values in computed.items():
        value = config.get(key)
        if (values[0] if value is None else value) not in values:
            kind = config.get("model_type", "gpt2")
            raise ValueError(f"this is a variant of {kind} that model.py does not compute: its "
                             f"config has {key} {value!r}, wanted {' or '.join(map(repr, values))}")


def gpt2_fields(config):
    """Keys that old files lack have GPT-2's values."""
    sizes = {GPT2_SIZES[key]: number(config, key, whole=True)
             for key in config if key in GPT2_SIZES}
    check_computed(config, {
        "activation_function": ["gelu_new", *GELUS], "n_inner": [4 * sizes.get("n_embd", 768)],
        "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
        "add_cross_attention": [False], "tie_word_embeddings": [True],
        "layer_norm_epsilon": [1e-5]})
    activation = GELUS[config.get("activation_function") or "gelu_new"]
    return GPT2 | sizes | {"activation": activation}


def nanogpt_fields(config):
    sizes = {key: x for key, x in config.items() if key not in ("model_type", "bias", "dropout")}
    unknown = sizes.keys() - GPT2_SIZES.values()
    if unknown:
        raise ValueError("this is a variant of nanoGPT that model.py does not compute: it has "
                         f"{', '.join(sorted(map(str, unknown)))} in its model_args")
    return GPT2 | sizes | {"activation": "gelu"}


def llama_fields(config, kind):
    fields = {ours: number(config, theirs, whole=True) for theirs, ours in LLAMA_SIZES.items()}
    check_computed(config, {
        "hidden_act": ["silu"], "attention_bias": [False], "mlp_bias": [False],
        "use_sliding_window": [False], "partial_rotary_factor": [1.0]})
    layers = config.get("layer_types") or []
    if not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}:
        raise ValueError(f"it has layer_types {str(layers)[:80]}; model.py computes full_attention "
                         "only")
    theta, scaling = rope_of(config)
    usual_dim = 128 if kind == "qwen3" else max(1, fields["n_embd"] // fields["n_head"])
    return fields | {
        "norm": "rmsnorm", "norm_eps": number(config, "rms_norm_eps", 1e-6),
        "activation": "swiglu", "positions": "rope", "rope_theta": theta, "rope_scaling": scaling,
        "n_kv_head": number(config, "num_key_value_heads", fields["n_head"], whole=True),
        "head_dim": number(config, "head_dim", usual_dim, whole=True), "bias": False,
        "qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3",
        "tied_head": bool(config.get("tie_word_embeddings", False))}


def rope_of(config):
    """theta and, with Llama 3's scaling, its four numbers"""
    parameters = part_of(config, "rope_parameters")      # the name since transformers 5
    scaling = part_of(config, "rope_scaling")            # if there are both, transformers takes it
    kinds = [part.get(key) for part in (scaling, parameters) for key in ("rope_type", "type")]
    kind = next((kind for kind in kinds if kind), "default")
    if kind not in ("default", "llama3"):
        raise ValueError(f"it has RoPE of the type {kind}; model.py computes default and llama3")
    rope = {key: config[key] for key in ("rope_theta", LLAMA3[-1]) if key in config}
    rope |= parameters | scaling
    theta = float(number(rope, "rope_theta", 10000.0))
    if kind == "default":
        return theta, None
    if not all(key in rope for key in LLAMA3):
        raise ValueError(f"its llama3 RoPE has {', '.join(sorted(rope))}; wanted "
                         f"{', '.join(LLAMA3)}")
    return theta, [float(number(rope, key)) for key in LLAMA3]


def family_of(fields):
    """The model_type that computes what these fields say"""
    if fields["norm"] == "layernorm":
        return "gpt2"
    if fields["qk_norm"]:
        return "qwen3"
    return "qwen2" if fields["qkv_bias"] else "llama"


def config_of(fields, task="CausalLM"):
    """Fields of GPTConfig, all of them -> a config.json"""
    kind = family_of(fields)
    name = "LMHeadModel" if (kind, task) == ("gpt2", "CausalLM") else f"For{task}"
    config = {"model_type": kind, "architectures": [CLASSES[kind] + name], "dtype": "float32"}
    if kind == "gpt2":
        gelu = "gelu" if fields["activation"] == "gelu" else "gelu_new"
        dropout = {f"{part}_pdrop": fields["dropout"] for part in ("resid", "embd", "attn")}
        sizes = {key: fields[key] for key in ("n_layer", "n_head", "n_embd")}
        return config | sizes | dropout | {"vocab_size": fields["vocab_rows"], "n_positions":
                                           fields["block_size"], "activation_function": gelu}
    for theirs, ours in LLAMA_SIZES.items():
        config[theirs] = fields[ours]
    scaling = fields["rope_scaling"]
    if scaling:
        scaling = {"rope_type": "llama3"} | dict(zip(LLAMA3, scaling))
        scaling["original_max_position_embeddings"] = int(scaling[LLAMA3[-1]])
    return config | {
        "vocab_size": fields["vocab_rows"], "max_position_embeddings": fields["n_positions"],
        "num_key_value_heads": fields["n_kv_head"],
        "head_dim": fields["head_dim"], "rms_norm_eps": fields["norm_eps"], "hidden_act": "silu",
        "rope_theta": fields["rope_theta"], "rope_scaling": scaling,
        "tie_word_embeddings": fields["tied_head"], "attention_bias": False}


# --------------------------------------------------------------------------------------------------
# Names of weights

def layout(fields):
    """{our name: [(their name, its rows)]} without prefixes; several are stacked, None: all rows"""
    gpt2 = fields["norm"] == "layernorm"
    names = {"wte.weight": [("wte.weight" if gpt2 else "embed_tokens.weight", None)]}
    if gpt2:
        names["wpe.weight"] = [("wpe.weight", None)]
    for i in range(fields["n_layer"]):
        for ours, theirs in (gpt2_block() if gpt2 else llama_block(fields)).items():
            block = f"h.{i}." if gpt2 else f"layers.{i}."
            names[f"h.{i}.{ours}"] = [(block + name, rows) for name, rows in theirs]
    final = ("ln_f.weight", "ln_f.bias") if gpt2 else ("norm.weight",)
    for theirs in final:
        names[theirs.replace("norm", "ln_f")] = [(theirs, None)]
    return names


def gpt2_block():
    layers = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return {name: [(name, None)] for name in names}


def llama_block(fields):
    head_dim, inner = fields["head_dim"], fields["n_inner"]
    rows = {"q": fields["n_head"] * head_dim, "k": fields["n_kv_head"] * head_dim,
            "v": fields["n_kv_head"] * head_dim}
    names = {"ln_1.weight": [("input_layernorm.weight", None)],
             "attn.c_proj.weight": [("self_attn.o_proj.weight", None)],
             "ln_2.weight": [("post_attention_layernorm.weight", None)],
             "mlp.c_fc.weight": [("mlp.gate_proj.weight", inner), ("mlp.up_proj.weight", inner)],
             "mlp.c_proj.weight": [("mlp.down_proj.weight", None)]}
    for kind in ("weight", "bias") if fields["qkv_bias"] else ("weight",):
        names[f"attn.c_attn.{kind}"] = [(f"self_attn.{x}_proj.{kind}", n) for x, n in rows.items()]
    if fields["qk_norm"]:
        for x in ("q_norm", "k_norm"):
            names[f"attn.{x}.weight"] = [(f"self_attn.{x}.weight", None)]
    return names


# Tables that old files store with the weights: causal masks, rotary frequencies
TABLES = re.compile(r"h\.\d+\.attn\.(masked_)?bias|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def to_ours(weights, fields, nanogpt=False):
    """
    {their name: tensor} -> {our name: tensor}, of a whole language model or of its trunk alone

    Its head is lm_head.weight, unless it is the token embedding. A weight that is missing or
    unknown is an error.
    """
    found = {}
    for name, x in weights.items():
        short = re.sub(r"^(transformer|model)\.", "", name)
        if short in found:
            raise ValueError(f"it has the weight {short} twice, once as {name}; wanted one of them")
        is_number = x.is_floating_point() and x.element_size() >= 2      # float8 is quantized
        if not (is_number or TABLES.fullmatch(short)):
            raise ValueError(f"{name} is of {x.dtype}, wanted float32, bfloat16 or float16; give "
                             "the folder with the original weights")
        found[short] = x
    found = {name: x for name, x in found.items() if not TABLES.fullmatch(name)}
    head = found.pop("lm_head.weight", None)
    names = layout(fields)
    known = [theirs for parts in names.values() for theirs, _ in parts]
    embedding = names["wte.weight"][0][0]
    if head is not None and fields["tied_head"]:
        if not torch.equal(found.setdefault(embedding, head), head):
            raise ValueError(f"lm_head.weight differs from {embedding}, though its config says "
                             "that both are one table (tie_word_embeddings)")
    missing = sorted(set(known) - found.keys())
    unknown = sorted(found.keys() - set(known))
    if head is None and not fields["tied_head"]:
        missing.append("lm_head.weight")
    if missing or unknown:
        family = CLASSES[family_of(fields)].replace("GPT2", "GPT-2")
        raise ValueError(f"the weights do not fit a {family} of {fields['n_layer']} layers: "
                         f"missing: {', '.join(missing[:5]) or 'none'}; unknown: "
                         f"{', '.join(unknown[:5]) or 'none'}")
    ours = {}
    for name, parts in names.items():
        tensors = [found[theirs] for theirs, _ in parts]
        for (theirs, rows), x in zip(parts, tensors):
            if rows is not None and x.shape[:1] != (rows,):
                raise ValueError(f"{theirs}: got {tuple(x.shape)}, wanted {rows} rows")
        ours[name] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if fields["norm"] == "layernorm" and not nanogpt:
        ours = transposed(ours)
    if not fields["tied_head"]:
        ours["output.weight"] = head
    return ours


def to_theirs(weights, fields):
    """{our name: tensor} of a trunk -> {their name: tensor}, as in a language model's file"""
    gpt2 = fields["norm"] == "layernorm"
    if gpt2:
        weights = transposed(weights)
    prefix = "transformer." if gpt2 else "model."
    theirs = {}
    for name, parts in layout(fields).items():
        tensors = [weights[name]]
        if len(parts) > 1:
            tensors = weights[name].split([rows for _, rows in parts])
        for (their_name, _), x in zip(parts, tensors):
            theirs[prefix + their_name] = x
    return theirs


def transposed(weights):
    """Our matrices to transformers' GPT-2's (Conv1D), which are stored transposed, and back"""
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: x.T if name.endswith(conv1d) and x.dim() == 2 else x
            for name, x in weights.items()}
