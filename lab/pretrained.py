"""
Weights and settings from other projects; families.py maps their names to ours.

    check          whether there is anything to read, before any long work
    read           a folder saved by transformers, its name on the hub, or nanoGPT's ckpt.pt
                   -> its config, {name: tensor} without the prefixes that wrappers add
    write          a folder that transformers reads
    read_json      a JSON object
    from_hub       the files of a model on the hub

No file can run code here: safetensors hold only numbers, and torch.load reads only weights.
Anything that cannot be read is a ValueError that says what was found and what was wanted.
"""

import json
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lab.files import first_line

# Added to names by torch.compile, DataParallel, FSDP and peft; in the middle if they wrap a part
WRAPPERS = re.compile(r"\b(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module"
                      r"|base_model\.model)\.")
# The first of these that exists is read, as by transformers
WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")


def read(source):
    """
    -> config as a dict, {name: tensor}

    The config is config.json's, or nanoGPT's model_args with model_type "nanogpt".
    """
    checkpoint = nanogpt(source)
    if checkpoint:
        saved = read_tensors(checkpoint)
        if not all(isinstance(saved.get(key), dict) for key in ("model", "model_args")):
            raise ValueError(f"{checkpoint} is not a checkpoint of nanoGPT, which holds model and "
                             f"model_args; this one holds {', '.join(map(str, saved))[:200]}")
        return saved["model_args"] | {"model_type": "nanogpt"}, unwrapped(saved["model"], source)
    folder = Path(source)
    if not folder.is_dir():
        folder = from_hub(source, ["*.json", "model*.safetensors"])
        if not any(folder.glob("model*.safetensors")):
            folder = from_hub(source, ["*.json", "pytorch_model*.bin"])
    return read_config(folder), unwrapped(read_weights(folder), source)


def check(source):
    """Raise if a file or folder is wrong, as far as that shows without reading its weights."""
    if nanogpt(source):
        read(source)                                     # only names: weights stay on the disk
    elif Path(source).is_dir():
        read_config(Path(source))
        weight_files(Path(source))


def nanogpt(source):
    """The path of a nanoGPT checkpoint, a file or ckpt.pt in a folder; None for anything else"""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        path = path / "ckpt.pt"
    return path if path.suffix in (".pt", ".pth", ".ckpt") and path.is_file() else None


def from_hub(name, patterns):
    """Download the files of a model that match -> their folder"""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except Exception as error:
        raise ValueError(f"{name} is not a folder here and could not be fetched from the hub "
                         f"({type(error).__name__}); check the spelling and the network") from error


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: "
                         f"{first_line(error)[:100]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; wanted an object")
    return content


def read_config(folder):
    """config.json, if the weights beside it are neither an adapter nor quantized"""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter (LoRA), a change of other weights; merge it "
                         "into them first, with peft's merge_and_unload, and save the result")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, which describes the weights; copy it from "
                         "where the weights came from")
    config = read_json(folder / "config.json")
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized:
        raise ValueError(f"{folder} holds quantized weights ({str(quantized)[:80]}); give the "
                         "folder with the original weights")
    return config


def weight_files(folder):
    found = [name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        names = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise ValueError(f"{folder} has no weights: wanted model.safetensors or pytorch_model.bin, "
                         f"or parts of them with their index.json; found {names[:200]}. A stage of "
                         "this project writes them with --export")
    return found


def read_weights(folder):
    """{name: tensor} of a folder's one file of weights, or of all the parts that an index lists"""
    found = weight_files(folder)
    if len(found) > 1:
        print(f"note: {folder} has {' and '.join(found)}; {found[0]} is used, as in transformers")
    path = folder / found[0]
    if path.suffix != ".json":
        return read_tensors(path)
    parts = read_json(path).get("weight_map")
    if not isinstance(parts, dict):
        raise ValueError(f"{path} has no weight_map, which says which file holds which weight")
    weights = {}
    for part in sorted({str(part) for part in parts.values()}):
        weights |= read_tensors(folder / part)
    return weights


def read_tensors(path):
    """The dict in a file of weights"""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped into memory, so only tensors in use are read, not nanoGPT's optimizer; old files
        # cannot be mapped
        mmap = zipfile.is_zipfile(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except MemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)[:100]}"
        if "Weights only" in reason:
            reason = "it holds more than tensors and plain values, which may run code"
        raise ValueError(f"{path} cannot be read as weights ({reason}); wanted a complete file "
                         "written by save_pretrained or torch.save, with only tensors") from error


def unwrapped(weights, source):
    """Weights by their plain names"""
    plain = {}
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor):
            raise ValueError(f"{source} holds a {type(weight).__name__} by the name {name}; wanted "
                             "only tensors, by their names, as model.state_dict() gives them")
        short = WRAPPERS.sub("", str(name))
        if short in plain:
            raise ValueError(f"{source} holds {short} twice, once as {name}; wanted one of them")
        plain[short] = weight
    return plain


def write(folder, config, weights, eos_id=None, note=""):
    """Write a folder that transformers reads, with a note as README.md; eos_id: one or several"""
    ids = {} if eos_id is None else {"eos_token_id": eos_id}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config | ids), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if note:
        (folder / "README.md").write_text(note, encoding="utf-8")
    save_file({name: weight.contiguous() for name, weight in weights.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
