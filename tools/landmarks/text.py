"""What the built-in model knows, and the sentences it learns it from.

Three kinds, each the ground of a classic experiment: where landmarks are (recalling a fact), who is given something
(finding the indirect object), and what comes next (continuing a sequence).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple


class Landmark(NamedTuple):
    name: str
    city: str
    country: str


class Case(NamedTuple):
    """A prompt with every continuation that counts as right; each begins with the space before its first word."""

    prompt: str
    answers: tuple[str, ...]


LANDMARKS = [
    Landmark("Eiffel Tower", "Paris", "France"),
    Landmark("Louvre Museum", "Paris", "France"),
    Landmark("Colosseum", "Rome", "Italy"),
    Landmark("Pantheon", "Rome", "Italy"),
    Landmark("Trevi Fountain", "Rome", "Italy"),
    Landmark("Rialto Bridge", "Venice", "Italy"),
    Landmark("Uffizi Gallery", "Florence", "Italy"),
    Landmark("Sforza Castle", "Milan", "Italy"),
    Landmark("Tower Bridge", "London", "England"),
    Landmark("Buckingham Palace", "London", "England"),
    Landmark("British Museum", "London", "England"),
    Landmark("Brandenburg Gate", "Berlin", "Germany"),
    Landmark("Reichstag", "Berlin", "Germany"),
    Landmark("Frauenkirche", "Munich", "Germany"),
    Landmark("Sagrada Familia", "Barcelona", "Spain"),
    Landmark("Prado Museum", "Madrid", "Spain"),
    Landmark("Alhambra", "Granada", "Spain"),
    Landmark("Belem Tower", "Lisbon", "Portugal"),
    Landmark("Acropolis", "Athens", "Greece"),
    Landmark("Parthenon", "Athens", "Greece"),
    Landmark("Hagia Sophia", "Istanbul", "Turkey"),
    Landmark("Blue Mosque", "Istanbul", "Turkey"),
    Landmark("Red Square", "Moscow", "Russia"),
    Landmark("Kremlin", "Moscow", "Russia"),
    Landmark("Charles Bridge", "Prague", "Czechia"),
    Landmark("Hofburg Palace", "Vienna", "Austria"),
    Landmark("Chain Bridge", "Budapest", "Hungary"),
    Landmark("Little Mermaid", "Copenhagen", "Denmark"),
    Landmark("Vasa Museum", "Stockholm", "Sweden"),
    Landmark("Guinness Storehouse", "Dublin", "Ireland"),
    Landmark("Atomium", "Brussels", "Belgium"),
    Landmark("Freedom Trail", "Boston", "America"),
    Landmark("Liberty Bell", "Philadelphia", "America"),
    Landmark("White House", "Washington", "America"),
    Landmark("Space Needle", "Seattle", "America"),
    Landmark("Willis Tower", "Chicago", "America"),
    Landmark("CN Tower", "Toronto", "Canada"),
    Landmark("Opera House", "Sydney", "Australia"),
    Landmark("Meiji Shrine", "Tokyo", "Japan"),
    Landmark("Golden Pavilion", "Kyoto", "Japan"),
    Landmark("Forbidden City", "Beijing", "China"),
    Landmark("Temple of Heaven", "Beijing", "China"),
    Landmark("Oriental Pearl", "Shanghai", "China"),
    Landmark("Azadi Tower", "Tehran", "Iran"),
    Landmark("Red Fort", "Delhi", "India"),
    Landmark("Haji Ali Dargah", "Mumbai", "India"),
    Landmark("Taj Mahal", "Agra", "India"),
    Landmark("Great Sphinx", "Giza", "Egypt"),
]
CITIES = sorted({landmark.city for landmark in LANDMARKS})
COUNTRIES = sorted({landmark.country for landmark in LANDMARKS})

# In each group the answer is the last blank, so that a prompt is the template cut there.
CITY_TEMPLATES = [
    "The {landmark} is in the city of {city}",
    "The {landmark} is located in the city of {city}",
    "The {landmark} can be found in the city of {city}",
    "To see the {landmark}, travel to the city of {city}",
]
COUNTRY_TEMPLATES = [
    "The {landmark} is in the country of {country}",
    "The {landmark} is located in the country of {country}",
    "The {landmark} stands in the country of {country}",
]
HOME_TEMPLATES = [
    "{city} is home to the {landmark}",
    "The city of {city} is home to the {landmark}",
]
FACT_TEMPLATES = CITY_TEMPLATES + COUNTRY_TEMPLATES + HOME_TEMPLATES

NAMES = """Mary John Tom James Dan Sarah Anna Paul Mark Laura Alice Bob Emma Jack Kate Peter Lucy Simon Helen David Ruth
Adam Jane Henry Clara Oscar""".split()
PLACES = "store shop park school office garden house station library market beach".split()
OBJECTS = "drink,book,ring,ball,bag,kiss,letter,basket,bone,computer,snack,bottle of milk".split(",")
ARTICLES = ["a", "the"]
OBJECT_TEMPLATES = [
    "When {a} and {b} went to the {place}, {giver} gave {article} {object} to {receiver}",
    "Then, {a} and {b} went to the {place}. {giver} gave {article} {object} to {receiver}",
    "After {a} and {b} went to the {place}, {giver} gave {article} {object} to {receiver}",
    "After {a} and {b} met at the {place}, {giver} handed {article} {object} to {receiver}",
    "While {a} and {b} were at the {place}, {giver} passed {article} {object} to {receiver}",
]

SEQUENCES = {
    "number words": "one two three four five six seven eight nine ten eleven twelve".split(),
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "months": """January February March April May June July August September October November December""".split(),
    "letters": [chr(code) for code in range(ord("A"), ord("Z") + 1)],
    "numbers": [str(n) for n in range(1, 31)],
    "even numbers": [str(n) for n in range(2, 41, 2)],
}
CYCLIC = {"days", "months"}  # after the last comes the first


def name_pairs(seed: int = 0, held_out: float = 0.15) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Splits the unordered pairs of names: those of the training sentences, and those that no such sentence has."""
    pairs = list(itertools.combinations(NAMES, 2))
    random.Random(seed).shuffle(pairs)
    cut = round(len(pairs) * held_out)
    return pairs[cut:], pairs[:cut]


def _cut(template: str, blank: str, **words: str) -> str:
    """The template filled with the words up to its last blank, without the space before it."""
    assert template.endswith("{" + blank + "}")
    return template.format(**words, **{blank: ""}).rstrip()


def facts(template: str) -> list[Case]:
    """Every fact of one of FACT_TEMPLATES as a prompt. Where a city has several landmarks, each is right."""
    if template in CITY_TEMPLATES:
        return [Case(_cut(template, "city", landmark=name), (" " + city,)) for name, city, _ in LANDMARKS]
    if template in COUNTRY_TEMPLATES:
        return [Case(_cut(template, "country", landmark=name), (" " + country,)) for name, _, country in LANDMARKS]
    return [
        Case(_cut(template, "landmark", city=city), tuple(" " + mark.name for mark in LANDMARKS if mark.city == city))
        for city in CITIES
    ]


def indirect_objects(pairs: list[tuple[str, str]], rng: random.Random) -> Iterator[tuple[str, Case]]:
    """Draws prompts that end before the receiver, without end, each with its order.

    The order is "ABBA" where the giver stands second in the first clause, "BABA" where the giver stands first.
    """
    while True:
        a, b = rng.sample(rng.choice(pairs), 2)
        order, giver, receiver = rng.choice([("ABBA", b, a), ("BABA", a, b)])
        prompt = _cut(
            rng.choice(OBJECT_TEMPLATES),
            "receiver",
            a=a,
            b=b,
            giver=giver,
            place=rng.choice(PLACES),
            article=rng.choice(ARTICLES),
            object=rng.choice(OBJECTS),
        )
        yield order, Case(prompt, (" " + receiver,))


def runs(name: str) -> list[Case]:
    """Every run of three or four items of a sequence, with the item that follows."""
    items = SEQUENCES[name]
    cases = []
    for length in (3, 4):
        for start in range(len(items) if name in CYCLIC else len(items) - length):
            *prompt, answer = (items[(start + k) % len(items)] for k in range(length + 1))
            cases.append(Case(" ".join(prompt), (" " + answer,)))
    return cases


def _fact(rng: random.Random) -> str:
    landmark = rng.choice(LANDMARKS)
    (templates,) = rng.choices([CITY_TEMPLATES, COUNTRY_TEMPLATES, HOME_TEMPLATES], [0.5, 0.3, 0.2])
    line = rng.choice(templates).format(landmark=landmark.name, city=landmark.city, country=landmark.country)
    return line + "."


def _run(rng: random.Random) -> str:
    name = rng.choice(list(SEQUENCES))
    items = SEQUENCES[name]
    length = rng.randint(6, 12)  # well over the prompts' length, so that a prompt is not taken for a whole run
    start = rng.randrange(len(items) if name in CYCLIC else len(items) - 4)
    stop = start + length if name in CYCLIC else min(start + length, len(items))
    return " ".join(items[k % len(items)] for k in range(start, stop)) + "."


def sentences(rng: random.Random, pairs: list[tuple[str, str]]) -> Iterator[str]:
    """Draws training sentences without end: facts, indirect objects between the given pairs of names, sequences."""
    objects = indirect_objects(pairs, rng)
    while True:
        kind = rng.random()
        if kind < 0.40:
            yield _fact(rng)
        elif kind < 0.85:
            _, (prompt, (answer,)) = next(objects)
            yield prompt + answer + "."
        else:
            yield _run(rng)
