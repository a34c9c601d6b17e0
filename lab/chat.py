"""
Dialogues as text: HH-RLHF's, and the templates of instruct models.

    written         [(role, text), ..] -> text, with the cue for the assistant's turn
    answer          the text of the assistant's turn after it
    set_chat        make a tokenizer write dialogues by a template and end a turn as it does
    template_of     the template in a folder's files, for --chat auto
    jinja_of        a tokenizer's template as Jinja, for an export

A special token that a template writes has a MARK before it. Text from users has none, so it never
becomes a special token.
"""

import json
import re

from lab.tokenizer import MARK, read_optional, tokenizer_folder

TURN = "\n\nAssistant:"
SPEAKER = {"user": "\n\nHuman:", "assistant": TURN, "system": "\n\nSystem:"}
# The special tokens that a template writes: what starts a turn first, what ends it last
TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>"),
          "llama3": ("<|start_header_id|>", "<|begin_of_text|>", "<|end_header_id|>", "<|eot_id|>")}


def plain(turns):
    """HH-RLHF's: Human, Assistant and System, no special tokens -> text, the cue for an answer"""
    return "".join(SPEAKER[role] + spoken(text) for role, text in turns), TURN


def spoken(text):
    """A turn's text, with a space between it and the speaker's name unless it starts with one"""
    return f" {text}" if text[:1].strip() else text


def chatml(turns):
    """<|im_start|>user\\nHi<|im_end|>\\n, turn after turn -> text, the cue for an answer"""
    head = MARK + "<|im_start|>{}\n"
    end = MARK + "<|im_end|>\n"
    return "".join(head.format(role) + text + end for role, text in turns), head.format("assistant")


def llama3(turns):
    """<|start_header_id|>user<|end_header_id|>\\n\\nHi<|eot_id|> -> text, the cue for an answer"""
    head = f"{MARK}<|start_header_id|>{{}}{MARK}<|end_header_id|>\n\n"
    end = MARK + "<|eot_id|>"
    text = "".join(head.format(role) + text.strip() + end for role, text in turns)
    return f"{MARK}<|begin_of_text|>{text}", head.format("assistant")


def written(turns, chat="plain", system="", unfinished=False):
    """
    A dialogue as the prompt for an answer -> text; system: a first turn for those that have none

    unfinished: its last turn is the assistant's, and the answer continues it.
    """
    turns = [(role, clean(text)) for role, text in turns]
    if system and (not turns or turns[0][0] != "system"):
        turns = [("system", system), *turns]
    text, cue = {"plain": plain, "chatml": chatml, "llama3": llama3}[chat](turns)
    if not unfinished:
        return text + cue
    return text if chat == "plain" else text.rpartition(MARK + TOKENS[chat][-1])[0]


def answer(text, chat="plain"):
    """The text of the assistant's turn after what `written` returns"""
    if chat == "plain":
        return spoken(text)
    return text.strip() if chat == "llama3" else text


def clean(text):
    """Text without MARK, which Unicode reserves for uses such as ours"""
    return text.replace(MARK, "\ufffd")


def set_chat(tokenizer, chat, system, source):
    """
    The tokenizer with the template that --chat names; auto: the one in the source's files, if any

    The EOS becomes the token that ends a turn. Raises a ValueError if a token is missing.
    """
    if chat == "plain":
        return tokenizer
    template = template_of(source) if source else None
    if chat == "auto":
        if not template:
            return tokenizer
        known = [name for name, tokens in TOKENS.items() if tokens[0] in template]
        if not known or not same_tokens(template, tokenizer, known[0]):
            raise ValueError(f"{source} has a chat template that is neither chatml nor llama3; "
                             "give --chat plain, or whichever of the two fits")
        chat = known[0]
    special = tokenizer._special_tokens
    written_by_it = TOKENS[chat]
    missing = [token for token in written_by_it if token not in special]
    if missing:
        raise ValueError(f"--chat {chat} writes {', '.join(missing)}, which this tokenizer lacks; "
                         "give --chat plain")
    options = tokenizer.options() | {"chat": chat, "system": system}
    options["in_text"] = [token for token in tokenizer.in_text if token not in written_by_it]
    options["ends"] = tuple(dict.fromkeys((special[written_by_it[-1]], *tokenizer.end_tokens)))
    tokenizer.set_up(**options)
    if template:
        compare_with(template, tokenizer)
    return tokenizer


def template_of(source):
    """The chat template in the files of a folder, or None"""
    folder = tokenizer_folder(source)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = read_optional(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):                       # several, by name
        template = {one.get("name"): one.get("template") for one in template
                    if isinstance(one, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


JINJA = """\
{%- if messages[0]['role'] != 'system' and SYSTEM %}\
{%- set messages = [{'role': 'system', 'content': SYSTEM}] + messages %}{%- endif %}\
{{- START }}{%- for message in messages %}\
{{- BEFORE + message['role'] + AFTER + message['content']TRIM + END }}{%- endfor %}\
{%- if add_generation_prompt %}{{- BEFORE + 'assistant' + AFTER }}{%- endif %}"""


def jinja_of(tokenizer):
    """The Jinja template that writes dialogues as `written` does; None for plain ones"""
    if tokenizer.chat == "plain":
        return None
    parts = {"START": "", "BEFORE": "<|im_start|>", "AFTER": "\n", "END": "<|im_end|>\n"}
    if tokenizer.chat == "llama3":
        parts = {"START": "<|begin_of_text|>", "BEFORE": "<|start_header_id|>",
                 "AFTER": "<|end_header_id|>\n\n", "END": "<|eot_id|>"}
    template = JINJA.replace("TRIM", " | trim" if tokenizer.chat == "llama3" else "")
    for name, text in (parts | {"SYSTEM": tokenizer.system}).items():
        template = template.replace(name, json.dumps(text, ensure_ascii=False))
    return template


# One to four turns, with a system turn and without, as transformers writes messages
DIALOGUES = [[("user", "Hi")], [("system", "Be brief."), ("user", "Hi")],
             [("user", "Hi"), ("assistant", "Hello."), ("user", "2 + 2?")],
             [("system", "S"), ("user", " a\n"), ("assistant", "b"), ("user", "c")]]


def rendered(template, turns, tokenizer):
    """A dialogue written by a Jinja template, as transformers renders it"""
    from transformers.utils.chat_template_utils import render_jinja_template
    names = {i: token for token, i in tokenizer._special_tokens.items()}
    eos = names[tokenizer.eot_token]
    messages = [{"role": role, "content": text} for role, text in turns]
    texts, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, eos_token=eos,
        bos_token=names.get(tokenizer.bos, "<|begin_of_text|>"))
    return texts[0]


def same_tokens(template, tokenizer, chat):
    """Whether the model's template writes the special tokens that ours does, in the same order"""
    names = "|".join(map(re.escape, tokenizer._special_tokens))
    turns = DIALOGUES[1]
    try:
        theirs = rendered(template, turns, tokenizer)
    except Exception:                                    # no jinja2, or a template that fails
        return True
    return re.findall(names, theirs) == re.findall(names, written(turns, chat).replace(MARK, ""))


def compare_with(template, tokenizer):
    """Say where the model's own template writes a dialogue differently."""
    try:
        for turns in DIALOGUES:
            theirs = rendered(template, turns, tokenizer)
            ours = written(turns, tokenizer.chat, tokenizer.system).replace(MARK, "")
            if theirs != ours:
                print(f"note: the model's own chat template writes {theirs!r} where --chat "
                      f"{tokenizer.chat} writes {ours!r}; --system TEXT adds a system turn")
                return
    except Exception as error:                           # no jinja2, or a strange template
        print(f"note: the model's chat template could not be compared with --chat "
              f"{tokenizer.chat} ({type(error).__name__})")
