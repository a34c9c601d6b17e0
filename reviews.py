"""
The built-in task: short film reviews, written by a grammar that is known exactly.

    prompt      "A western about a lighthouse. On the acting:"
    response    " The acting is superb and truly charming. I admired the music. See it twice."

Every reviewer has a mood s in {-2, .., 2}, drawn first and never shown. It sets the words, most of
all those about the aspect that was asked for. Because the grammar is known, so is the rest:

    sample                  prompts and reviews                             what SFT trains on
    log_prob                exact log p(review | prompt), over all moods    the least SFT loss
    gold                    the true utility of any text at all             never shown to training
    preference, rank        annotators: Bradley-Terry on gold               what reward models see
    agreement               expected accuracy against them; with scores = gold, the Bayes accuracy

gold = sentiment / 3 - penalties. The penalties cover repetition, gushing, run-ons, broken grammar
and a missing end: texts that the grammar never produces. The reward model has hardly seen any, so
it cannot learn them, and a policy that over-optimises it runs straight into them.
"""

import functools
import math
import random
import re
from dataclasses import dataclass

import torch

# --------------------------------------------------------------------------------------------------
# Words, each with its grade from -3 to 3

GENRES = ("western", "comedy", "thriller", "musical", "romance", "fable", "documentary", "mystery",
          "war film", "heist film", "ghost story", "road movie")
SUBJECTS = ("a lighthouse", "two sisters", "a stolen violin", "the last train", "a chess master",
            "an empty hotel", "a lost letter", "three brothers", "a village doctor", "an old map",
            "a night market", "a retired spy", "a long winter", "a broken promise", "a young pilot",
            "a travelling circus")
ASPECTS = ("acting", "plot", "music", "dialogue", "pacing", "ending", "camera work", "casting")
ADJECTIVES = {
    "superb": 3, "brilliant": 3, "magnificent": 3, "wonderful": 3, "stunning": 3,
    "lovely": 2, "charming": 2, "graceful": 2, "inspired": 2, "gripping": 2,
    "good": 1, "decent": 1, "solid": 1, "pleasant": 1, "likeable": 1,
    "plain": 0, "ordinary": 0, "familiar": 0,
    "uneven": -1, "bland": -1, "clumsy": -1, "thin": -1, "predictable": -1,
    "dull": -2, "weak": -2, "tedious": -2, "hollow": -2, "lifeless": -2,
    "dreadful": -3, "awful": -3, "terrible": -3, "atrocious": -3, "unbearable": -3}
VERBS = {
    "adored": 3, "loved": 3, "enjoyed": 2, "admired": 2, "liked": 1, "noticed": 0,
    "endured": -1, "disliked": -1, "regretted": -2, "resented": -2, "hated": -3, "loathed": -3}
VERDICTS = {
    "See it twice.": 3, "Run to see it.": 3, "Go and see it.": 2, "Well worth the ticket.": 2,
    "Worth a look.": 1, "Worth an evening.": 1, "Fine for a rainy day.": 0,
    "Neither here nor there.": 0, "Wait for television.": -1, "Only for the patient.": -1,
    "Skip it.": -2, "Save your money.": -2, "Run away from it.": -3, "Ask for your money back.": -3}
GRADES = ADJECTIVES | VERBS | VERDICTS
INTENSIFIERS = {"truly": 1.3, "really": 1.3, "simply": 1.3, "quite": 0.7, "rather": 0.7}  # factors
OCCASIONS = ("on a train", "at a festival", "with my brother", "on a quiet night",
             "in an old theatre")

MOODS = {-2: 0.20, -1: 0.27, 0: 0.23, 1: 0.18, 2: 0.12}    # their probabilities: hard to please
LEAN = 1.25               # in mood s, words about the aspect asked for have grades around LEAN * s
SPREAD = 0.8              # with this standard deviation
OTHER = 0.5               # other aspects and the whole film follow the mood and count half as much
NEGATION = -0.6           # "not good" is worth -0.6 times "good"
MAX_SUPERLATIVES = 2      # words of grade +-3 in a review; more is gushing
ANNOTATOR_TEMPERATURE = 0.6


@dataclass(frozen=True)
class Lexicon:
    """The words of a grammar. Tests take a few, so that every review can be listed."""
    aspects: tuple = ASPECTS
    adjectives: tuple = tuple(ADJECTIVES)
    verbs: tuple = tuple(VERBS)
    verdicts: tuple = tuple(VERDICTS)
    intensifiers: tuple = tuple(INTENSIFIERS)
    occasions: tuple = OCCASIONS
    endings: tuple = (0.0, 0.35, 0.6, 1.0)     # P(the verdict comes next) after 0, 1, .. sentences


LEXICON = Lexicon()


# --------------------------------------------------------------------------------------------------
# Prompts

def make_prompt(genre, subject, aspect):
    return f"{an(genre).capitalize()} {genre} about {subject}. On the {aspect}:"


def all_prompts():
    """Every prompt of the task in a fixed order: 12 genres x 16 subjects x 8 aspects = 1536."""
    return [make_prompt(g, s, a) for g in GENRES for s in SUBJECTS for a in ASPECTS]


def read_prompt(prompt):
    """-> genre, aspect; ValueError for a prompt that is not of this task"""
    match = re.fullmatch(r"An? (.+) about .+\. On the (.+):", prompt)
    if not match or match[1] not in GENRES or match[2] not in ASPECTS:
        raise ValueError(f"got the prompt {prompt!r}; film reviews are about prompts like "
                         f"{all_prompts()[0]!r}, which reviews.all_prompts() lists")
    return match[1], match[2]


# --------------------------------------------------------------------------------------------------
# The grammar. `choices` is its one definition: a generator that yields {phrase: probability} and is
# sent the phrase taken. Sampling sends a random phrase, scoring sends the phrase that comes next in
# the text, so the two cannot disagree.

def choices(genre, aspect, mood, lexicon=LEXICON):
    """
    Yield the choices that lead to one review in the given mood: the phrases taken, joined.

    If the rest of a text begins with several phrases of a choice, the longest is the one taken. So,
    given the mood, no text can be written in two ways.
    """
    used = set()                                # no graded word comes twice in a review,
    openings = {" I": 0.24, " It is": 0.12}     # and these openings of a sentence once at most

    def lean(about):
        return LEAN * mood * (1.0 if about == aspect else OTHER)

    def unused(words, signs=(-1, 0, 1)):
        full = sum(abs(GRADES[w]) == 3 for w in used) >= MAX_SUPERLATIVES
        return [w for w in words if w not in used and sign(GRADES[w]) in signs
                and not (full and abs(GRADES[w]) == 3)]

    def graded(words, centre, factor=1.0, signs=(-1, 0, 1), form=" {}".format):
        """An unused word whose effect, grade * factor, lies around centre; -> its grade"""
        weights = effects(words, centre, factor)
        phrase = yield normalised({form(w): weights[w] for w in unused(words, signs)})
        word = phrase.split()[-1]
        used.add(word)
        return GRADES[word]

    def topic(exclude=None):
        """An aspect: the one asked for with probability 0.7, the others equally likely"""
        phrase = yield normalised({
            f" {a}": 0.7 if a == aspect else 0.3 / (len(lexicon.aspects) - 1)
            for a in lexicon.aspects if a != exclude})
        return phrase[1:]

    intensifier = normalised({"": 0.7} | {f" {w}": 0.3 / len(lexicon.intensifiers)
                                          for w in lexicon.intensifiers})
    for p_verdict in lexicon.endings:
        body = normalised({" The": 0.64} | openings)
        weights = effects(lexicon.verdicts, lean(aspect))
        verdicts = normalised({f" {w}": p for w, p in weights.items()})
        opening = yield mixture(p_verdict, verdicts, body)
        openings.pop(opening, None)

        if opening in verdicts:
            return

        if opening == " I":
            if (yield {"": 0.75, " saw it": 0.25}):
                yield {f" {o}.": 1 / len(lexicon.occasions) for o in lexicon.occasions}
                continue
            yield from graded(lexicon.verbs, lean(aspect))
            yield {f" the {aspect}.": 1.0}

        elif opening == " It is":
            yield from graded(lexicon.adjectives, lean("film"), form=lambda w: f" {an(w)} {w}")
            yield {f" {genre}.": 1.0}

        else:
            about = yield from topic()
            yield {" is": 1.0}
            if (yield {"": 0.85, " not": 0.15}):
                yield from graded(lexicon.adjectives, lean(about), NEGATION)
                yield {".": 1.0}
                continue
            yield intensifier
            grade = yield from graded(lexicon.adjectives, lean(about))
            opposite = unused(lexicon.adjectives, (-sign(grade),)) if grade else []
            tail = yield normalised({".": 0.66} | ({", but the": 0.17} if opposite else {})
                                    | ({" and": 0.17} if unused(lexicon.adjectives) else {}))
            if tail == " and":
                yield intensifier
                yield from graded(lexicon.adjectives, lean(about))
            if tail == ", but the":             # a contrast has the other sign, in any mood
                yield from topic(exclude=about)
                yield {" is": 1.0}
                yield intensifier
                yield from graded(lexicon.adjectives, 0.0, signs=(-sign(grade),))
            if tail != ".":
                yield {".": 1.0}


@functools.lru_cache(maxsize=None)
def effects(words, centre, factor=1.0):
    """{word: weight}, a normal around centre with standard deviation SPREAD in grade * factor"""
    return {w: math.exp(-0.5 * ((GRADES[w] * factor - centre) / SPREAD) ** 2) for w in words}


def normalised(weights):
    total = sum(weights.values())
    return {phrase: weight / total for phrase, weight in weights.items()}


def mixture(p, first, second):
    """{phrase: probability}, of `first` with probability p, else of `second`"""
    both = {w: p * x for w, x in first.items()} | {w: (1 - p) * x for w, x in second.items()}
    return {w: x for w, x in both.items() if x > 0}


def sign(x):
    return (x > 0) - (x < 0)


def an(word):
    return "an" if word[0] in "aeiou" else "a"


def write(genre, aspect, rng, lexicon=LEXICON):
    """One review, by a random.Random -> text"""
    mood = rng.choices(list(MOODS), list(MOODS.values()))[0]
    grammar, text = choices(genre, aspect, mood, lexicon), ""
    options = next(grammar)
    while True:
        phrase = rng.choices(list(options), list(options.values()))[0]
        text += phrase
        try:
            options = grammar.send(phrase)
        except StopIteration:
            return text


def sample(n, seed=0, prompts=None):
    """n random prompts, from the given ones or all, and a review of each -> prompts, responses"""
    rng = random.Random(seed)
    drawn = rng.choices(prompts or all_prompts(), k=n)
    return drawn, [write(*read_prompt(prompt), rng) for prompt in drawn]


def log_prob(prompt, response, lexicon=LEXICON):
    """Exact log p(response and its end | prompt) = log sum_s p(s) p(response | prompt, s), nats"""
    genre, aspect = read_prompt(prompt)
    p = sum(p_mood * probability(choices(genre, aspect, mood, lexicon), response)
            for mood, p_mood in MOODS.items())
    return math.log(p) if p > 0 else -math.inf


def probability(grammar, text):
    """Probability of the whole text under one mood's grammar; 0 if the text strays from it"""
    p, options = 1.0, next(grammar)
    while True:
        phrase = max((w for w in options if text.startswith(w)), key=len, default=None)
        if phrase is None:
            return 0.0
        p, text = p * options[phrase], text[len(phrase):]
        try:
            options = grammar.send(phrase)
        except StopIteration:
            return 0.0 if text else p


# --------------------------------------------------------------------------------------------------
# The true utility of any text

PENALTIES = {
    "broken": 2.0,        # each malformed sentence
    "unfinished": 2.0,    # no verdict at the end, or no EOS
    "length": 2.0,        # each sentence under two or over four
    "repeated": 1.5,      # each graded word, and each whole sentence, that was there before
    "gushing": 2.0}       # each superlative over two


@functools.lru_cache(maxsize=None)
def sentence_pattern(genre):
    """A pattern of the sentences about a film of this genre, except for verdicts"""
    aspect, adjective, verb, occasion, intensifier = (
        f"(?:{'|'.join(words)})" for words in (ASPECTS, ADJECTIVES, VERBS, OCCASIONS, INTENSIFIERS))
    words = f"(?:{intensifier} )?{adjective}"
    return re.compile(
        rf" The {aspect} is (?:not {adjective}"
        rf"|{words}(?: and {words}|, but the {aspect} is {words})?)\."
        rf"| I (?:{verb} the {aspect}|saw it {occasion})\."
        rf"| It is (?:a (?![aeiou])|an (?=[aeiou])){adjective} {genre}\.")


TERMS = re.compile(rf"\b(?:not|{'|'.join((*ASPECTS, *ADJECTIVES, *VERBS, *INTENSIFIERS))})\b")


def read(prompt, response, finished=True):
    """-> the text's sentiment, {penalty: how often}; finished says whether it ended with EOS"""
    genre, aspect = read_prompt(prompt)
    sentences = re.findall(r"[^.]*\.|[^.]+$", response)
    last = sentences[-1] if sentences else ""
    verdict = VERDICTS.get(last[1:]) if last.startswith(" ") else None
    sentiment = float(verdict or 0)
    broken = 0
    used = []
    for sentence in sentences if verdict is None else sentences[:-1]:
        broken += not sentence_pattern(genre).fullmatch(sentence)
        terms = TERMS.findall(sentence)
        about, factor = next((t for t in terms if t in ASPECTS), "film"), 1.0
        for term in terms:
            if term in ASPECTS:
                about = term
            elif term in GRADES:
                sentiment += (1.0 if about == aspect else OTHER) * factor * GRADES[term]
                used.append(term)
                factor = 1.0
            else:
                factor = NEGATION if term == "not" else INTENSIFIERS[term]
    return sentiment, {
        "broken": broken,
        "unfinished": int(not finished or verdict is None),
        "length": max(0, 2 - len(sentences)) + max(0, len(sentences) - 4),
        "repeated": len(used) - len(set(used)) + len(sentences) - len(set(sentences)),
        "gushing": max(0, sum(abs(GRADES[term]) == 3 for term in used) - MAX_SUPERLATIVES)}


def gold(prompt, response, finished=True):
    """
    The true utility: sentiment / 3 - penalties.

    sentiment sums weight * factor * grade over the graded words. The weight is 1 about the aspect
    asked for and in the verdict, 0.5 elsewhere; the factor 0.7 or 1.3 by intensifier, -0.6 by
    negation.
    """
    sentiment, faults = read(prompt, response, finished)
    return sentiment / 3.0 - sum(PENALTIES[fault] * n for fault, n in faults.items())


def grammatical(prompt, response, finished=True):
    """Two to four sentences, the last a verdict, then EOS. Repeating and gushing is style."""
    _, faults = read(prompt, response, finished)
    return not (faults["broken"] or faults["unfinished"] or faults["length"])


def request_kept(prompts, responses):
    """
    A reward that can be checked: 1.0 if a review keeps to a request, else 0.0: lists -> list

    The request is three sentences, only about the aspect that the prompt asks for, the last one a
    verdict. One review of the grammar in eight does so by chance.
    """
    kept = []
    for prompt, response in zip(prompts, responses):
        _, aspect = read_prompt(prompt)
        sentences = re.findall(r"[^.]*\.", response)
        named = [[a for a in ASPECTS if f" {a}" in sentence] for sentence in sentences[:-1]]
        kept.append(float(grammatical(prompt, response) and named == [[aspect]] * 2))
    return kept


# --------------------------------------------------------------------------------------------------
# The annotators

def preference(gold_a, gold_b, temperature=ANNOTATOR_TEMPERATURE):
    """P(an annotator prefers a to b) = sigmoid((gold_a - gold_b) / temperature)"""
    return torch.sigmoid((gold_a - gold_b) / temperature)


def rank(gold_scores, generator, temperature=ANNOTATOR_TEMPERATURE):
    """
    An annotator's ranking of each row's K responses: (N, K) gold -> (N, K) indices, best first

    Sorting gold / temperature + Gumbel noise draws from Plackett-Luce, in which each pair, taken
    alone, follows `preference`.
    """
    uniforms = torch.rand(gold_scores.shape, generator=generator, dtype=torch.float64)
    noise = -torch.log(-torch.log(uniforms.clamp(1e-12, 1 - 1e-12)))
    return (gold_scores / temperature + noise).argsort(dim=1, descending=True)


def agreement(scores, gold_scores, temperature=ANNOTATOR_TEMPERATURE):
    """
    Expected accuracy of scores against a fresh annotator, over all pairs of each row: (N, K) -> 0-d

    The mean of p or 1 - p, p the annotator's probability for the response with the higher score; a
    tie counts one half. agreement(gold, gold) is the Bayes accuracy, an upper bound.
    """
    i, j = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    p = preference(gold_scores[:, i], gold_scores[:, j], temperature)
    return (0.5 + (scores[:, i] - scores[:, j]).sign() * (p - 0.5)).mean()
