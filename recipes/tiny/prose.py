"""A small grammar with a closed vocabulary: the prose the tiny base learns to speak.

Owns the words and how they join into documents of one to three sentences about the people of a harbour town. Knows
nothing of tokens, models or skills. A document depends on nothing but the generator of random numbers it is given.
"""

import random
import re


def _words(text: str) -> list[str]:
    return text.split()


WEATHER = _words("rain snow wind storm fog frost hail mist")
TIMES = _words("morning evening winter summer autumn spring")
DAYS = _words("Sunday Monday Tuesday Friday")
PEOPLE = _words(
    "baker fisher sailor weaver tailor miller farmer painter teacher doctor hunter singer dancer porter smith clerk "
    "cook nurse pilot potter barber banker captain child guest stranger neighbor tinker juggler"
)
WOMEN = _words("Anna Clara Ella Greta Ida Julia Maria Nora Olga Rosa Sofia Vera")
MEN = _words("Adam Boris Carl David Emil Felix Hugo Jakob Karl Oskar Peter Tomas")
ANIMALS = _words("dog cat horse goat sheep goose duck hen crow owl fox hare mouse otter heron donkey raven sparrow")
THINGS = _words(
    "kettle lamp ladder basket blanket bottle bucket candle carpet chair table clock coat hat glove boot ring "
    "rope net oar boat wagon wheel hammer needle drum fiddle flute mirror window door letter book map "
    "coin purse stone brick apple pear plum lemon onion carrot turnip cabbage cake "
    "pie barrel anchor lantern pillow shovel saddle whistle mask ribbon button puppet"
)
STUFFS = _words("bread cheese butter honey pepper sugar soup thread cloth salt flour wool")
PLACES = _words(
    "harbor market bridge garden kitchen tower mill forest river meadow village church school cellar barn stable "
    "orchard valley island beach tavern station library theater workshop"
)
COLORS = _words("red blue green white black yellow brown gray purple golden silver")
LOOKS = _words(
    "old small big round heavy light broken clean dirty simple strange warm cold empty narrow rusty wooden "
    "pretty plain bright tiny soft hard dry wet"
)
MOODS = _words("happy sad angry proud shy clever brave lazy gentle quiet tired honest hungry lonely jolly stubborn")
HANDLES = _words(
    "paints mends carries finds hides sells buys borrows steals drops lifts washes wraps breaks forgets keeps brings "
    "takes counts draws holds hangs cleans moves opens throws weighs polishes"
)
MEETS = _words("greets follows helps feeds calls hears watches loves scolds thanks trusts visits wakes teases")
ACTS = _words("sings dances sleeps waits laughs works rests walks runs dreams smiles whistles reads swims hums weeps")
BLOWS = _words("comes falls passes begins stops returns lifts grows")
MANNERS = _words("slowly quickly gladly loudly softly again alone early late calmly")
HOW_OFTEN = _words("often never always rarely")
NEARBY = _words("near behind beside inside outside in at")
KIN = _words("brother sister mother father uncle aunt cousin friend")
GLUE = _words(
    "the a an and but when because is has in on he she her his every this that says knows thinks before after for "
    "no one"
)


def _vocabulary() -> frozenset[str]:
    groups = (
        WEATHER, TIMES, DAYS, PEOPLE, WOMEN, MEN, ANIMALS, THINGS, STUFFS, PLACES, COLORS, LOOKS, MOODS, HANDLES, MEETS,
        ACTS, BLOWS, MANNERS, HOW_OFTEN, NEARBY, KIN, GLUE,
    )  # fmt: skip
    return frozenset(word.lower() for group in groups for word in group)


VOCABULARY = _vocabulary()


def words_of(text: str) -> list[str]:
    """List the words of `text` in lower case, punctuation and spaces dropped; anything else stays in its word."""
    return [word for word in re.split(r"[\s.,]+", text.lower()) if word]


def document(rng: random.Random) -> str:
    """Draw one to three sentences about one person."""
    name, (subject, possessive) = _person(rng)
    sentences = [_sentence(rng, name, possessive)]
    for _ in range(rng.choice((0, 1, 1, 2))):
        sentences.append(_sentence(rng, subject, possessive))
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _person(rng: random.Random) -> tuple[str, tuple[str, str]]:
    pronouns = rng.choice((("she", "her"), ("he", "his")))
    roll = rng.random()
    if roll < 0.35:
        return rng.choice(WOMEN if pronouns[0] == "she" else MEN), pronouns
    if roll < 0.7:
        return f"the {rng.choice(MOODS)} {rng.choice(PEOPLE)}", pronouns
    return f"the {rng.choice(PEOPLE)}", pronouns


def _sentence(rng: random.Random, subject: str, possessive: str) -> str:
    clause = _clause(rng, subject, possessive)
    shape = rng.randrange(8)
    if shape == 0:
        return f"in the {rng.choice(TIMES)}, {clause}"
    if shape == 1:
        return f"when the {rng.choice(WEATHER)} {rng.choice(BLOWS)}, {clause}"
    if shape == 2:
        return f"{rng.choice(('on', 'every'))} {rng.choice(DAYS)} {clause}"
    if shape == 3:
        return f"{clause}, and the {rng.choice(ANIMALS)} {rng.choice(ACTS)}"
    if shape == 4:
        return f"{clause} because the {rng.choice(THINGS)} is {rng.choice(LOOKS)}"
    if shape == 5:
        return f"{clause} {rng.choice(('before', 'after'))} the {rng.choice(WEATHER)}"
    return clause


def _clause(rng: random.Random, subject: str, possessive: str) -> str:
    shape = rng.randrange(9)
    if shape < 3:
        return f"{subject} {rng.choice(HANDLES)} {_thing(rng, possessive)}{_where(rng)}"
    if shape == 3:
        return f"{subject} {rng.choice(MEETS)} {_other(rng, possessive)}{_where(rng)}"
    if shape == 4:
        if rng.random() < 0.3:
            return f"{subject} {rng.choice(HOW_OFTEN)} {rng.choice(ACTS)}{_where(rng)}"
        return f"{subject} {rng.choice(ACTS)} {rng.choice(MANNERS)}{_where(rng)}"
    if shape == 5:
        return f"{subject} is {rng.choice(MOODS)} but {rng.choice(MOODS)}"
    if shape == 6:
        return f"{subject} has {rng.choice(('one', 'no'))} {rng.choice(COLORS)} {rng.choice(THINGS)}"
    if shape == 7:
        return f"{subject} {rng.choice(('says', 'knows', 'thinks'))} that the {rng.choice(PEOPLE)} {rng.choice(ACTS)}"
    return f"{subject} {rng.choice(HANDLES)} {_thing(rng, possessive)} for {_other(rng, possessive)}"


def _thing(rng: random.Random, possessive: str) -> str:
    stuff = rng.random() < 0.15
    noun = rng.choice(STUFFS if stuff else THINGS)
    if rng.random() < 0.6:
        noun = f"{rng.choice(COLORS if rng.random() < 0.4 else LOOKS)} {noun}"
    determiner = rng.choice(("the", "the" if stuff else "a", "this", possessive))
    if determiner == "a" and noun[0] in "aeiou":
        determiner = "an"
    return f"{determiner} {noun}"


def _other(rng: random.Random, possessive: str) -> str:
    if rng.random() < 0.4:
        return f"{possessive} {rng.choice(KIN)}"
    return f"the {rng.choice(PEOPLE if rng.random() < 0.5 else ANIMALS)}"


def _where(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return ""
    return f" {rng.choice(NEARBY)} the {rng.choice(PLACES)}"
