"""
One record of a data set, in any common form -> its prompt and responses, as texts.

A record is in the first of these forms whose fields it has. A field that is null counts as missing:

    {"chosen", "rejected"}              HH-RLHF's dialogues. The prompt is what they share, up to
                                        and with the last "\\n\\nAssistant:"
    {"prompt", "chosen", "rejected"}    comparisons as TRL has them
    {"prompt", "completion"}            the same with one response
    {"messages"}                        [{"role", "content"}, ..]; the response is the last message,
                                        if it is an assistant's
    {"conversations"}                   the same as ShareGPT has it, [{"from", "value"}, ..]
    {"instruction", "input", "output"}  Alpaca's, as a user's message and the answer to it
    {"text"}                            a response to no prompt; with --text_prompt n its first n
                                        tokens are the prompt
    {"info", "summaries", "choice"}     OpenAI's comparisons of summaries
    {"prompt"}                          a prompt without a response, for RL and evaluation

In place of a text there may be a list of messages, which is written as HH-RLHF writes dialogues.
The messages of a response follow those of the prompt, which they may repeat; if the prompt's last
one is an assistant's, they continue it. Messages that a user ends are the prompt of a chosen and a
rejected beside them. A "system" text comes first. If a "label" (or "kto_tag") says false, 0 or
undesirable, the response is left out, and the prompt still serves RL; beside a text alone a label
is a class, and is not used.
"""

import os
import re

from lab.files import CONTROL

TURN = "\n\nAssistant:"
SPEAKER = {"user": "\n\nHuman:", "assistant": TURN, "system": "\n\nSystem:"}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "model": "assistant", "bot": "assistant", "system": "system", "developer": "system"}
GOOD = ("true", "1", "1.0", "desirable", "chosen", "good", "positive", "yes")
BAD = ("false", "0", "0.0", "-1", "-1.0", "undesirable", "rejected", "bad", "negative", "no")
SPECIAL = re.compile(r"<[|｜][a-zA-Z_▁]+[|｜]>|</s>|<eos>|<end_of_turn>")
# Kinds of remarks on rows
LEFT_OUT, CHANGED, KEPT = "more left out,", "of them", "of them kept as they stand,"
UNUSED = "fields not used:"



# --------------------------------------------------------------------------------------------------
# One record -> prompt, responses

def read_record(record, remarks=None):
    """
    A row of a form above -> prompt, [better, worse] or [response] or [], as texts; or a ValueError

    What else there is to say about the row is added to remarks, as (kind, what).
    """
    remarks = [] if remarks is None else remarks
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    fields = {name: value for name, value in record.items() if value is not None}
    (system, prompt), responses, rated = take_form(fields)
    bad = rated and take_label(fields) in BAD
    prompt, responses = texts_of(system, prompt, responses)
    if not all(text.strip() for text in responses):
        raise ValueError("an empty response")
    if not (prompt.strip() or responses):
        raise ValueError("an empty prompt and no response")
    try:
        "".join((prompt, *responses)).encode()
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate, which is no text") from error
    if bad and not prompt:
        raise ValueError("labelled undesirable")
    if bad:
        responses = []
        remarks.append((LEFT_OUT, "labelled undesirable"))
    repeating = [text for text in responses if repeats(prompt, text)]
    if repeating and len(repeating) == len(responses):
        responses = [text.removeprefix(prompt) for text in responses]
        remarks.append((CHANGED, "began each response with the prompt, which was taken off"))
    elif repeating:
        remarks.append((KEPT, "with one response that repeats the prompt"))
    for token in sorted(set(SPECIAL.findall("\n".join(responses)))):
        remarks.append((KEPT, f"with {token} written out in a response, where it is plain text"))
    if any(map(CONTROL.search, (prompt, *responses))):
        remarks.append((KEPT, "with control characters"))
    remarks += [(UNUSED, name) for name in fields]
    return prompt, responses


def take_form(fields):
    """Takes a form from a row's fields -> (system, prompt), responses, if a label rates them"""
    def take(*names):
        return [fields.pop(name, None) for name in names]

    keys = ", ".join(sorted(fields))[:60]
    if "instruction" in fields and "prompt" not in fields:       # Alpaca's, whatever answers it
        instruction, given = take("instruction", "input")
        content = [instruction, "\n\n", given] if given else [instruction]
        fields["prompt"] = [{"role": "user", "content": content}]
    if "chosen" in fields and "rejected" in fields:
        chosen = fields["chosen"]
        is_dialogue = isinstance(chosen, str) and TURN in chosen             # which holds its prompt
        for name in ("conversations", "messages"):
            if name in fields and not (is_dialogue or "prompt" in fields):
                if turns_of(fields[name], "user")[-1][0] == "user":          # to be answered
                    fields["prompt"] = fields.pop(name)
        return take("system", "prompt"), take("chosen", "rejected"), False
    if "completion" in fields:
        return take("system", "prompt"), take("completion"), True
    if "messages" in fields:
        return take("system", "prompt"), take("messages"), True
    if "conversations" in fields:
        return take("system", "prompt"), take("conversations"), True
    if "output" in fields and "prompt" in fields:
        return take("system", "prompt"), take("output"), True
    if "text" in fields and "prompt" in fields:
        return take("system", "prompt"), take("text"), True
    if "text" in fields:
        return (None, ""), take("text"), False
    if "summaries" in fields and "choice" in fields:
        prompt, responses = read_summaries(*take("info", "summaries", "choice"))
        return (None, prompt), responses, False
    if "chosen" in fields or "rejected" in fields:
        raise ValueError("only one of chosen and rejected")
    if "prompt" in fields:
        return take("system", "prompt"), [], False
    raise ValueError(f"none of the known forms: keys {keys}")


def take_label(fields):
    """Takes a row's label if it is one of GOOD or BAD -> that, or None"""
    for name in ("label", "kto_tag"):
        label = str(fields.get(name)).strip().lower()
        if label in GOOD or label in BAD:
            del fields[name]
            return label
    return None


def repeats(prompt, response):
    """Whether a response begins with its prompt, up to the end of a word, and goes on"""
    rest = response[len(prompt):]
    mid_word = prompt[-1:].isalnum() and rest[:1].isalnum()
    return bool(prompt.strip() and rest.strip()) and response.startswith(prompt) and not mid_word


def texts_of(system, prompt, responses):
    """System, prompt, responses, each a text or messages or None -> prompt, responses, as texts"""
    if any(isinstance(part, (list, dict)) for part in (prompt, *responses)):
        before = turns_of(prompt, "user") if prompt else []
        if system:
            before = follow(turns_of(system, "system"), before)
        return dialogue_of(before, [turns_of(response, "assistant") for response in responses])
    if not all(isinstance(text, str) for text in (system or "", prompt or "", *responses)):
        raise ValueError("a text is not a string")
    if prompt is None:
        prompt, responses = split_dialogues(responses)
    if system and prompt.startswith(SPEAKER["user"]):
        prompt = f"{SPEAKER['system']} {system}{prompt}"
    elif system:
        prompt = f"{system}\n\n{prompt}"
    return prompt, responses


def turns_of(messages, role):
    """Messages, one of them, or a text that a role speaks -> [(role, text), ..]"""
    if isinstance(messages, str):
        return [(role, messages)]
    messages = [messages] if isinstance(messages, dict) else messages
    if not isinstance(messages, list):
        raise ValueError("a text is not a string")
    if not messages:
        raise ValueError("messages want at least one turn")
    turns = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("messages want a role and content")
        names = ("from", "value") if message.get("role") is None else ("role", "content")
        role, content = map(message.get, names)
        role = str(role).lower()
        if role not in ROLES:
            raise ValueError("messages want a role, which is user, assistant or system, not "
                             f"{role:.20}")
        parts = content if isinstance(content, list) else [content]
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"messages want content, a text; one by {role} has none: a tool call?")
        turns.append((ROLES[role], "".join(texts)))
    return turns


def dialogue_of(before, answers):
    """Turns of a prompt, and of each response -> prompt, responses, as texts"""
    if before[-1:] == [("assistant", "")]:           # a cue to answer, nothing to continue
        before = before[:-1]
    if not (before or answers):
        raise ValueError("an empty prompt and no response")
    prompts, responses = zip(*(split(before, turns) for turns in answers or [[]]))
    if len(set(prompts)) > 1:
        raise ValueError("the dialogues part before their last turn")
    if len(answers) > 1 and None in responses:
        raise ValueError("a comparison that does not end in an assistant turn")
    return prompts[0], [] if None in responses else list(responses)


def split(before, turns):
    """Turns of a prompt, turns after them -> prompt, response or None if no assistant's is last"""
    if before and before[-1][0] == "assistant":                  # to be continued
        *earlier, (_, begun) = before
        if not turns:
            return written(before), None
        role, said = turns[-1]
        again = turns[:-1] == earlier and said.startswith(begun)
        if role == "assistant" and (again or turns[:-1] in ([], before)):
            return written(before), said.removeprefix(begun)
    turns = follow(before, turns)
    if turns[-1][0] == "assistant":
        return written(turns[:-1]) + TURN, spoken(turns[-1][1])
    return written(turns) + TURN, None


def follow(before, turns):
    """Turns after those before them, which they may hold already or begin with the last of"""
    ours, theirs = ([(role, text.strip()) for role, text in part] for part in (before, turns))
    n = len(before)
    if any(theirs[i:i + n] == ours for i in range(len(turns))):
        return turns
    shared = max(k for k in range(n + 1) if ours[n - k:] == theirs[:k])
    return before + turns[shared:]


def written(turns):
    """Turns as HH-RLHF writes them"""
    return "".join(SPEAKER[role] + spoken(text) for role, text in turns)


def spoken(text):
    """A turn's text after its speaker's name: with a space before it, unless it begins with one"""
    return f" {text}" if text[:1].strip() else text


def split_dialogues(dialogues):
    """HH-RLHF's dialogues, which differ in their last turn -> prompt up to TURN, responses"""
    at = os.path.commonprefix(dialogues).rfind(TURN)
    if at < 0:
        raise ValueError("no prompt, and the texts share no assistant turn")
    end = at + len(TURN)
    turns = [text[end:] for text in dialogues]
    if any(SPEAKER["user"] in turn or TURN in turn for turn in turns):
        raise ValueError("the dialogues part before their last turn")
    return dialogues[0][:end], turns


def read_summaries(info, summaries, choice):
    """OpenAI's comparisons of summaries -> prompt, [better, worse]. CNN/DailyMail has no titles."""
    try:
        texts = [summary["text"] for summary in summaries]
        responses = [texts[choice], texts[1 - choice]]
        if "article" in info:
            return "Article:\n\n" + info["article"] + "\n\nTL;DR:", responses
        return ("SUBREDDIT: r/" + info["subreddit"] + "\n\nTITLE: " + info["title"] + "\n\nPOST: "
                + info["post"] + "\n\nTL;DR:", responses)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"a comparison of summaries without its texts ({error})") from error
