"""
One record of a data set, in any common form -> its prompt and responses, as texts.

A record has the first of these forms whose fields it has. A field that is null counts as missing:

    {"chosen", "rejected"}              HH-RLHF's dialogues. The prompt is what they share, up to
                                        and including the last "\\n\\nAssistant:"
    {"prompt", "chosen", "rejected"}    TRL's comparisons
    {"prompt", "completion"}            one response
    {"messages"}                        [{"role", "content"}, ..]; the last message is the response,
                                        if it is an assistant's
    {"conversations"}                   ShareGPT's way to write the same, [{"from", "value"}, ..]
    {"instruction", "input", "output"}  Alpaca's: a user's message and the answer to it
    {"prompt", "text"}                  one response
    {"text"}                            a response to no prompt; with --text_prompt N its first N
                                        tokens are the prompt
    {"info", "summaries", "choice"}     OpenAI's comparisons of summaries
    {"prompt"}                          a prompt without a response, for RL and evaluation

Any text may also be a list of messages, which is written out as HH-RLHF writes dialogues, or by
the model's chat template. With a template, a prompt that is a text is a user's turn, or HH-RLHF's
turns if it has them; a text without a prompt stays as it is. The messages of a response continue
those of the prompt, which they may repeat. If the prompt ends with an assistant's message, the
response continues that message. In a comparison, messages that end with a user's message are the
prompt. A "system" text comes first. If a "label" (or "kto_tag") is false, 0 or undesirable, the
response is left out, and the prompt still serves RL. In a record with a text and no prompt, a label
is a class and is not used.
"""

import os
import re

from lab.chat import SPEAKER, TURN, answer, clean, written
from lab.files import CONTROL
from lab.tokenizer import MARK

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "model": "assistant", "bot": "assistant", "system": "system", "developer": "system"}
GOOD = ("true", "1", "1.0", "desirable", "chosen", "good", "positive", "yes")
BAD = ("false", "0", "0.0", "-1", "-1.0", "undesirable", "rejected", "bad", "negative", "no")
SPECIAL = re.compile(r"<[|｜][a-zA-Z_▁]+[|｜]>|</s>|<eos>|<end_of_turn>")
# Kinds of remarks on records
LEFT_OUT, CHANGED, KEPT = "more left out,", "of them", "of them kept as they are,"
UNUSED = "fields not used:"


def read_record(record, remarks=None, chat="plain", system=""):
    """
    A record -> prompt, responses ([better, worse], [response] or []), as texts

    chat names the template of dialogues; system is the system turn for those that have none.
    Anything worth reporting is added to remarks, as (kind, text). Raises a ValueError with the
    reason if the record cannot be read.
    """
    remarks = [] if remarks is None else remarks
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    fields = {name: value for name, value in record.items() if value is not None}
    style = {"chat": chat, "system": system}
    given_system, prompt, responses, is_rated = take_form(fields)
    is_bad = is_rated and take_label(fields) in BAD
    prompt, responses = texts_of(given_system, prompt, responses, style)
    if not all(text.strip() for text in responses):
        raise ValueError("an empty response")
    if not (prompt.strip() or responses):
        raise ValueError("an empty prompt and no response")
    try:
        "".join((prompt, *responses)).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate, which is not valid text") from error
    if is_bad:
        if not prompt:
            raise ValueError("labelled undesirable")
        responses = []
        remarks.append((LEFT_OUT, "labelled undesirable"))
    repeating = [text for text in responses if repeats(prompt, text)]
    if repeating and len(repeating) == len(responses):
        responses = [text.removeprefix(prompt) for text in responses]
        remarks.append((CHANGED, "began each response with the prompt, which was removed"))
    elif repeating:
        remarks.append((KEPT, "with one response that repeats the prompt"))
    for token in sorted(set(SPECIAL.findall("\n".join(responses)))):
        remarks.append((KEPT, f"with {token} written out in a response, where it is plain text"))
    if any(CONTROL.search(text) for text in (prompt, *responses)):
        remarks.append((KEPT, "with control characters"))
    remarks += [(UNUSED, name) for name in fields]
    if chat != "plain" and prompt and MARK not in prompt:        # a text, not messages
        turns = dialogue_in(prompt)
        unfinished = turns[-1][0] == "assistant"         # the response continues this turn
        prompt = written(turns, **style, unfinished=unfinished)
        if not unfinished:
            responses = [answer(text.strip(), chat) for text in responses]
    return prompt, responses


# --------------------------------------------------------------------------------------------------
# Which fields

def take_form(fields):
    """Remove a form's fields -> system, prompt, responses, whether a label may rate the response"""
    def has(*names):
        return all(name in fields for name in names)

    def take(*names):
        return [fields.pop(name, None) for name in names]

    names = ", ".join(sorted(fields))[:60]
    if has("instruction") and not has("prompt"):         # an output or a comparison answers it
        instruction, given = take("instruction", "input")
        content = [instruction, "\n\n", given] if given else [instruction]
        fields["prompt"] = {"role": "user", "content": content}
    if has("chosen", "rejected"):
        move_dialogue_to_prompt(fields)
        return *take("system", "prompt"), take("chosen", "rejected"), False
    for name in ("completion", "messages", "conversations"):
        if has(name):
            return *take("system", "prompt"), take(name), True
    for name in ("output", "text"):
        if has("prompt", name):
            return *take("system", "prompt"), take(name), True
    if has("text"):
        return None, "", take("text"), False
    if has("summaries", "choice"):
        return None, *read_summaries(*take("info", "summaries", "choice")), False
    if has("chosen") or has("rejected"):
        raise ValueError("only one of chosen and rejected")
    if has("prompt"):
        return *take("system", "prompt"), [], False
    raise ValueError(f"none of the known forms: keys {names}")


def move_dialogue_to_prompt(fields):
    """In a comparison without a prompt, messages that end with a user's become the prompt."""
    chosen = fields["chosen"]
    holds_prompt = isinstance(chosen, str) and TURN in chosen
    for name in ("conversations", "messages"):
        if name in fields and not holds_prompt and "prompt" not in fields:
            if turns_of(fields[name], "user")[-1][0] == "user":
                fields["prompt"] = fields.pop(name)


def take_label(fields):
    """Remove a label that is one of GOOD or BAD -> the label, or None"""
    for name in ("label", "kto_tag"):
        label = str(fields.get(name)).strip().lower()
        if label in GOOD or label in BAD:
            del fields[name]
            return label
    return None


def read_summaries(info, summaries, choice):
    """OpenAI's comparisons of summaries -> prompt, [better, worse]. CNN/DailyMail has no titles."""
    try:
        texts = [summary["text"] for summary in summaries]
        responses = [texts[choice], texts[1 - choice]]
        if "article" in info:
            prompt = "Article:\n\n" + info["article"]
        else:
            prompt = ("SUBREDDIT: r/" + info["subreddit"] + "\n\nTITLE: " + info["title"]
                      + "\n\nPOST: " + info["post"])
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"a comparison of summaries without its texts ({error})") from error
    return prompt + "\n\nTL;DR:", responses


# --------------------------------------------------------------------------------------------------
# Texts and messages -> texts

def texts_of(system, prompt, responses, style):
    """System, prompt and responses, each a text, messages or None -> prompt, responses, as texts"""
    if any(isinstance(part, (list, dict)) for part in (prompt, *responses)):
        before = turns_of(prompt, "user") if prompt else []
        if system:
            before = join(turns_of(system, "system"), before)
        answers = [turns_of(response, "assistant") for response in responses]
        return dialogue_of(before, answers, style)
    texts = [system or "", prompt if prompt is not None else "", *responses]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is not a string")
    if prompt is None:
        prompt, responses = split_dialogues(responses)
    if system and prompt.startswith(SPEAKER["user"]):
        prompt = f"{SPEAKER['system']} {system}{prompt}"
    elif system and style["chat"] != "plain":            # as turns, which dialogue_in reads
        prompt = f"{SPEAKER['system']} {system}{SPEAKER['user']} {prompt}"
    elif system:
        prompt = f"{system}\n\n{prompt}"
    if style["chat"] != "plain":
        return clean(prompt), [clean(text) for text in responses]
    return prompt, responses


def dialogue_in(text):
    """A prompt as a text -> its turns: HH-RLHF's if it has them, or else one of the user"""
    start, *rest = re.split(r"(?:^|\n\n)(Human|Assistant|System):", text)
    if start.strip() or "Human" not in rest[::2]:
        return [("user", text)]
    turns = [(ROLES[name.lower()], said.strip()) for name, said in zip(rest[::2], rest[1::2])]
    return turns[:-1] if turns[-1] == ("assistant", "") else turns


def repeats(prompt, response):
    """Whether a response is the prompt, not cut within a word, with more text after it"""
    rest = response[len(prompt):]
    mid_word = prompt[-1:].isalnum() and rest[:1].isalnum()
    return bool(prompt.strip() and rest.strip()) and response.startswith(prompt) and not mid_word


def split_dialogues(dialogues):
    """HH-RLHF's dialogues, which differ in their last turn -> prompt up to TURN, responses"""
    at = os.path.commonprefix(dialogues).rfind(TURN)
    if at < 0:
        raise ValueError("no prompt, and the texts share no assistant turn")
    end = at + len(TURN)
    turns = [text[end:] for text in dialogues]
    if any(SPEAKER["user"] in turn or TURN in turn for turn in turns):
        raise ValueError("the dialogues differ before their last turn")
    return dialogues[0][:end], turns


def turns_of(messages, role):
    """Messages, one message, or a text spoken in a role -> [(role, text), ..]"""
    if isinstance(messages, str):
        return [(role, messages)]
    if isinstance(messages, dict):
        messages = [messages]
    if not isinstance(messages, list):
        raise ValueError("a text is not a string")
    if not messages:
        raise ValueError("messages without a turn; there must be at least one")
    return [turn_of(message) for message in messages]


def turn_of(message):
    """{"role", "content"} or {"from", "value"} -> (role, text)"""
    if not isinstance(message, dict):
        raise ValueError("a message without a role and content")
    names = ("role", "content") if message.get("role") is not None else ("from", "value")
    role, content = [message.get(name) for name in names]
    role = str(role).lower()
    if role not in ROLES:
        raise ValueError(f"a message by {role:.20}; the role must be user, assistant or system")
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a message by {role} whose content is not a text (a tool call?)")
    return ROLES[role], "".join(texts)


def dialogue_of(before, answers, style):
    """The prompt's turns and each response's turns -> prompt, responses, as texts"""
    if before[-1:] == [("assistant", "")]:               # a cue to answer, with nothing to continue
        before = before[:-1]
    if not (before or answers):
        raise ValueError("an empty prompt and no response")
    prompts, responses = zip(*(split_turns(before, turns, style) for turns in answers or [[]]))
    if len(set(prompts)) > 1:
        raise ValueError("the dialogues differ before their last turn")
    if len(answers) > 1 and None in responses:
        raise ValueError("a comparison that does not end in an assistant turn")
    if None in responses:
        return prompts[0], []
    return prompts[0], list(responses)


def split_turns(before, turns, style):
    """The prompt's turns, the turns after them -> prompt, response (None unless an assistant's)"""
    if before and before[-1][0] == "assistant":          # the response continues this turn
        *earlier, (_, start) = before
        if not turns:
            return written(before, **style, unfinished=True), None
        role, text = turns[-1]
        repeated = turns[:-1] == earlier and text.startswith(start)
        if role == "assistant" and (repeated or turns[:-1] in ([], before)):
            return written(before, **style, unfinished=True), text.removeprefix(start)
    turns = join(before, turns)
    if turns[-1][0] == "assistant":
        return written(turns[:-1], **style), clean(answer(turns[-1][1], style["chat"]))
    return written(turns, **style), None


def join(before, turns):
    """Turns before, and turns after them that may repeat all or the last of them -> all, once"""
    ours, theirs = ([(role, text.strip()) for role, text in part] for part in (before, turns))
    n = len(before)
    if any(theirs[i:i + n] == ours for i in range(len(turns))):
        return turns
    shared = max(k for k in range(n + 1) if ours[n - k:] == theirs[:k])
    return before + turns[shared:]
