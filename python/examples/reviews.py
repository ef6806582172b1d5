"""Film reviews out of a small grammar, with a lexicon that knows how each one feels.

The grammar stands in for a corpus and the lexicon for a sentiment classifier, so that the whole experiment runs
offline and every number in it can be checked by reading the sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from random import Random

POSITIVE = (
    "wonderful brilliant superb charming delightful moving gripping excellent beautiful clever warm funny fresh "
    "remarkable inspired elegant thrilling joyful honest splendid"
).split()
NEGATIVE = (
    "awful boring dull clumsy painful tedious dreadful lazy wooden hollow bland messy tiresome stale ugly shallow "
    "forgettable annoying pointless miserable"
).split()
NEUTRAL = "long short quiet familiar strange dark simple modern loud ordinary".split()

_OPENINGS = ("", "honestly , ", "to my mind ", "last night ")
_ASPECTS = "plot acting music ending dialogue camera cast pacing story humour script opening".split()
_OWNERS = ("this", "that", "their new", "the latest")
_GENRES = "crime war family horror space spy road courtroom".split()
_NOUNS = "film movie drama picture".split()
_VERBS = "was felt seemed looked sounded stayed".split()
_ADVERBS = ("", "", "really", "quite", "so", "rather", "simply")
_TEMPERS = {"positive": 0.35, "negative": 0.50, "mixed": 0.15}
_SCORE = {word: 1 for word in POSITIVE} | {word: -1 for word in NEGATIVE}


def prompts() -> list[str]:
    """Every beginning of a review that the grammar knows, in a fixed order. They differ in length."""
    slots = product(_OPENINGS, _ASPECTS, _OWNERS, _GENRES, _NOUNS)
    return [f"{opening}the {aspect} of {owner} {genre} {noun}" for opening, aspect, owner, genre, noun in slots]


def corpus(rng: Random, size: int) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """`size` reviews as (prompt, completion), the prompts they may have, and a fifth of all prompts that none has."""
    everything = prompts()
    rng.shuffle(everything)
    unseen, seen = everything[: len(everything) // 5], everything[len(everything) // 5 :]
    return [(rng.choice(seen), completion(rng)) for _ in range(size)], seen, unseen


def completion(rng: Random) -> str:
    """The rest of a review: two or three opinions that mostly agree. Starts with a space, to follow a prompt."""
    (temper,) = rng.choices(list(_TEMPERS), weights=list(_TEMPERS.values()))
    second = f"{rng.choice(('and', 'but', 'while', 'because'))} the {rng.choice(_ASPECTS)} {_opinion(rng, temper)}"
    text = f"{_opinion(rng, temper)} {second} . {_closing(rng, temper)}"
    return " " + " ".join(text.split())


def sentiment(text: str) -> float:
    """Return a score from -1 (every word of opinion is negative) to 1 (all are positive), 0 where there is none."""
    scores = [_SCORE[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _SCORE]
    return sum(scores) / len(scores) if scores else 0.0


def mean_sentiment(texts: Sequence[str]) -> float:
    return sum(map(sentiment, texts)) / len(texts)


def _opinion(rng: Random, temper: str) -> str:
    return f"{rng.choice(_VERBS)} {rng.choice(_ADVERBS)} {_adjective(rng, temper)}"


def _closing(rng: Random, temper: str) -> str:
    form = rng.choice(("", "what a {} {} .", "a {} evening .", "{} from start to end ."))
    return form.format(_adjective(rng, temper), rng.choice(_NOUNS))


def _adjective(rng: Random, temper: str) -> str:
    own = {"positive": POSITIVE, "negative": NEGATIVE, "mixed": POSITIVE + NEGATIVE}[temper]
    (words,) = rng.choices((own, POSITIVE, NEGATIVE, NEUTRAL), weights=(0.70, 0.08, 0.08, 0.14))
    return rng.choice(words)
