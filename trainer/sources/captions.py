"""Captions from an object's name, category and tags, and colours put into them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Names as their makers wrote them -> what the thing is: brands and models become nouns, slips of the pen are mended.
_RENAMED = {
    "air conditioning - external unit": "air conditioning outdoor unit",
    "air conditioning - internal unit": "air conditioning indoor unit",
    "apple ibook": "laptop computer",
    "apple imac 1998": "old desktop computer",
    "apple imac 2004": "desktop computer",
    "apple iphone": "smartphone",
    "barnum": "party tent",
    "bath": "bathtub",
    "bended coconut tree": "bent coconut tree",
    "bill 10€": "10 euro banknote",
    "bill 20€": "20 euro banknote",
    "bill 50€": "50 euro banknote",
    "cctv": "surveillance camera",
    "chevrolet": "car",
    "children chair": "children's chair",
    "children game": "children's slide",
    "children table": "children's table",
    "class seat": "classroom seat",
    "concept sedan 01": "sedan car",
    "concept sedan 02": "sedan car",
    "concept sedan 02 sport": "sports car",
    "convertible sofa bz": "sofa bed",
    "double french window small panes": "double french window with small panes",
    "drawers cabinet": "cabinet with drawers",
    "female": "woman",
    "flacon": "perfume bottle",
    "flipper": "pinball machine",
    "ford focus": "hatchback car",
    "fork lift": "forklift",
    "frame chambord": "picture frame",
    "frame hôi an": "picture frame",
    "gaz water heater": "gas water heater",
    "hashtray": "ashtray",
    "holding female": "woman holding something",
    "holding male": "man holding something",
    "hood": "range hood",
    "island": "kitchen island",
    "letters box": "letter box",
    "lip stick": "lipstick",
    "little bank": "little bench",
    "lying down boy": "boy lying down",
    "lying down female": "woman lying down",
    "lying down male": "man lying down",
    "male": "man",
    "mannequin female": "female mannequin",
    "mannequin male": "male mannequin",
    "mocassin": "moccasin",
    "mower": "lawn mower",
    "mp3 base": "music player dock",
    "mp3 station": "music player dock",
    "opened convertible sofa bz": "opened sofa bed",
    "peugeot 308 cc": "convertible car",
    "plate, glass and cutlery": "plate with glass and cutlery",
    "plate, glasses and cutlery": "plate with glasses and cutlery",
    "playstation": "game console",
    "puff": "pouf",
    "punching ball": "punching bag",
    "quadruple french window small panes": "quadruple french window with small panes",
    "rail crossing": "railway crossing",
    "renault scenic": "family car",
    "rigged fan": "fan",
    "rubik's cube": "puzzle cube",
    "screen": "folding screen",
    "seat leon": "hatchback car",
    "short": "shorts",
    "sitting female": "sitting woman",
    "sitting male": "sitting man",
    "smart car": "small city car",
    "sofa 2 seats": "two-seat sofa",
    "sofa 3 seats": "three-seat sofa",
    "table tennis": "table tennis table",
    "teck chair": "teak chair",
    "toilets unit": "toilet",
    "trunck": "trunk",
    "tv": "television",
    "tv 16:9": "television",
    "upper shelves cabinet": "upper cabinet with shelves",
    "utensils pot": "utensil pot",
    "vw new beetle": "small car",
    "winchester armchair": "leather armchair",
    "winchester sofa": "leather sofa",
    "woman shoes": "women's shoes",
    "wood bank": "wooden bench",
    "yamaha yzr r6": "racing motorcycle",
}
# Brand words that may turn up inside a name: dropped; a name that holds nothing else becomes its category's noun.
_BRANDS = frozenset(
    "apple audi bmw braun canon chevrolet citroen dyson fiat ford heineken honda ibm ikea imac iphone ipad jeep kawasaki kitchenaid "
    "kuka lego lenovo lg logitech mercedes microsoft nikon nintendo nitendo nokia opel peterbilt peugeot philips playstation "
    "porsche renault rubik's rubik samsung siemens sony suzuki thonet toyota velux volkswagen volvo vw winchester xbox yamaha".split()
)
_CATEGORY_NOUNS = {
    "bathroom": "bathroom fixture",
    "bedroom": "piece of bedroom furniture",
    "characters": "person",
    "doors and windows": "door",
    "exterior": "outdoor object",
    "kitchen": "kitchen item",
    "lights": "lamp",
    "living room": "piece of living room furniture",
    "miscellaneous": "object",
    "office": "piece of office furniture",
    "staircases": "staircase",
    "vehicles": "vehicle",
}
_PLACES = {
    "bathroom": "for the bathroom",
    "bedroom": "for the bedroom",
    "exterior": "for outdoors",
    "kitchen": "for the kitchen",
    "living room": "for the living room",
    "office": "for the office",
}
# What stands in places: "a table for the kitchen", but not "a steak for the kitchen".
_FURNITURE = frozenset(
    "armchair basin bath bathtub bed bench bidet bookcase cabinet chair couch crib cupboard desk dresser faucet fireplace futon island "
    "lamp mirror ottoman pouf shelf shelves sink sofa stool table toilet towel tub vanity wardrobe washbasin".split()
)
# Other words for the same thing, and the plainer word for a special one; by the end of the name.
_SYNONYMS = {
    "acacia": "tree",
    "bedside table": "nightstand",
    "bicycle": "bike",
    "bike": "bicycle",
    "biplane": "plane",
    "bookcase": "bookshelf",
    "boy": "child",
    "bulldog": "dog",
    "bus": "vehicle",
    "cactus": "plant",
    "car": "automobile",
    "chandelier lamp": "chandelier",
    "couch": "sofa",
    "crib": "baby bed",
    "deck chair": "lounger",
    "ficus": "plant",
    "fridge": "refrigerator",
    "girl": "child",
    "hanging light": "pendant lamp",
    "little lamp": "lamp",
    "man": "person",
    "mobile phone": "smartphone",
    "motorbike": "motorcycle",
    "motorcycle": "motorbike",
    "refrigerator": "fridge",
    "siamese cat": "cat",
    "sofa": "couch",
    "spathiphyllum": "plant",
    "stroller": "pram",
    "suv": "car",
    "television": "tv",
    "van": "vehicle",
    "washbasin": "sink",
    "woman": "person",
    "yucca": "plant",
}
_NUMBERS = {"2": "two", "3": "three", "4": "four", "5": "five", "6": "six"}
# Colours of the plain vocabulary: a caption that already holds one is left alone.
COLOUR_WORDS = frozenset("red orange yellow green blue purple violet pink brown beige black grey gray white silver golden gold".split())
_MASS = frozenset("bamboo bread butter cutlery furniture grass luggage milk salt soap sugar tape water".split())
_SINGULAR_IN_S = frozenset(
    "aquarius basis bus cactus canvas chess christmas compass cypress dress gas glass grass iris lens mattress press tennis trellis "
    "spathiphyllum ficus hibiscus".split()
)
_AN = re.compile(r"(?:[aeio]|u(?!ni(?!n)|ri|se|te|su|ku)|hour|honest|suv\b|mp3\b|lcd\b|led\b|l-shaped|x-)")
_PREFIX = re.compile(r"^((?:an? )?(?:[\w-]+ )*?(?:model|rendering|render|picture|photo|image|asset) of )(.*)$")


def clean_name(name: str, category: str = "") -> str:
    """The noun phrase that a name stands for: lower case, without brands, model numbers and signs.

    >>> clean_name("Concept Sedan 02"), clean_name("Sofa 2 seats"), clean_name("Yamaha R6", "Vehicles")
    ('sedan car', 'two-seat sofa', 'vehicle')
    """
    text = " ".join(name.lower().split())
    if text in _RENAMED:
        return _RENAMED[text]
    text = re.sub(r" ([2-6]) (panes|zones|seats|doors|drawers)$", lambda m: f" with {_NUMBERS[m[1]]} {m[2]}", text)
    words = re.sub(r"[^\w\s'&€-]|_", " ", text).split()
    branded = any(word in _BRANDS for word in words)
    words = [word for word in words if word not in _BRANDS]
    if branded:
        # What follows a brand in capitals and digits is its model.
        words = [word for word in words if not re.search(r"\d", word)]
    # Running numbers at the end ("chair 03") say nothing.
    while len(words) > 1 and re.fullmatch(r"0*\d+", words[-1]):
        words.pop()
    words = [word for word in words if word != "-"]
    if not words or all(re.fullmatch(r"\W*\d*\W*", word) for word in words):
        return _CATEGORY_NOUNS.get(category.strip().lower(), "object")
    return " ".join(words)


def _before(noun: str) -> str:
    """The part of a noun phrase that ends in its head: "bowl" of "bowl with fruits"."""
    return re.split(r" (?:with|of|for|on|in|and|under|holding|lying|without|from|to)\b|,", noun)[0]


def head_noun(phrase: str) -> str:
    """The word that says what a noun phrase is: "bowl" of "a red bowl with fruits"; "" where there is no word."""
    words = _before(phrase).split() or phrase.split()
    return words[-1] if words else ""


def with_article(noun: str) -> str:
    """A noun phrase with "a" or "an"; plurals and substances stay bare.

    >>> with_article("armchair"), with_article("urinal"), with_article("scissors"), with_article("bowl with fruits")
    ('an armchair', 'a urinal', 'scissors', 'a bowl with fruits')
    """
    head = head_noun(noun)
    plural = head.endswith("s") and not head.endswith(("ss", "us", "'s")) and head not in _SINGULAR_IN_S
    if plural or head in _MASS or head in ("clothes", "people"):
        return noun
    return f"{'an' if _AN.match(noun) else 'a'} {noun}"


def captions(name: str, category: str = "", tags: Iterable[str] = ()) -> list[str]:
    """Captions of one object, the plainest first: noun, with article, as a 3D model, with its place, by its kind.

    >>> captions("Armchair", "Office", ["Seat"])
    ['armchair', 'an armchair', 'a 3d model of an armchair', 'an armchair for the office']
    """
    noun = clean_name(name, category)
    full = with_article(noun)
    found = [noun, full, f"a 3d model of {full}"]
    words = noun.split()
    kinds = {tag.strip().lower() for tag in tags}
    place = _PLACES.get(category.strip().lower())
    if place and head_noun(noun) in _FURNITURE and " for " not in noun:
        found.append(f"{full} {place}")
    for ending, other in _SYNONYMS.items():
        if (noun == ending or noun.endswith(f" {ending}")) and other not in words:
            found.append(with_article(noun.removesuffix(ending) + other if other in _SYNONYMS else other))
    if "tree" in kinds and "tree" not in words and head_noun(noun) not in ("bush", "hedge"):
        found.append(with_article(f"{_before(noun)} tree{noun.removeprefix(_before(noun))}"))
    if "toy" in kinds and "toy" not in words:
        found.append(f"a toy {noun}")
    return list(dict.fromkeys(found))


def colours_in(caption: str) -> frozenset[str]:
    """The colour words of a caption."""
    return COLOUR_WORDS & set(re.findall(r"[a-z]+", caption.lower()))


def with_colour(caption: str, colour: str) -> str:
    """A caption with a colour before its noun and the article to match; one that names a colour already stays as it is.

    >>> with_colour("an armchair", "red"), with_colour("a 3d model of a lamp", "orange"), with_colour("black table", "red")
    ('a red armchair', 'a 3d model of an orange lamp', 'black table')
    """
    if not colour or colours_in(caption):
        return caption
    prefix, rest = "", caption
    if match := _PREFIX.match(caption):
        prefix, rest = match[1], match[2]
    found = re.match(r"(an? |the )?(.*)$", rest, re.DOTALL)
    assert found is not None  # both parts may be empty
    article, noun = found.groups()
    phrase = f"{colour} {noun}"
    if article in ("a ", "an "):
        phrase = f"{'an' if _AN.match(phrase) else 'a'} {phrase}"
    elif article:
        phrase = article + phrase
    return prefix + phrase


@dataclass(frozen=True)
class Part:
    """A named part of an object and how it looks; the object itself where `word` is empty."""

    word: str  # "legs"
    colour: str = ""  # "black"
    material: str = ""  # "metal"

    @property
    def look(self) -> str:
        """Colour and material as they stand before a noun: "black wooden"."""
        return " ".join(filter(None, (self.colour, _ADJECTIVES.get(self.material, self.material))))


_ADJECTIVES = {"wood": "wooden", "knitted fabric": "knitted"}


def describe(nouns: Sequence[str], whole: Part, parts: Sequence[Part] = (), details: Sequence[str] = ()) -> list[str]:
    """Captions of one object at several lengths, the plainest first.

    Args:
        nouns: what it is, the plainest first, then paraphrases.
        whole: its colour and material, each where it has one.
        parts: what looks otherwise, the largest first; two are named.
        details: "armrests", "a round seat".

    >>> describe(["chair", "seat"], Part("", "red", "wood"), [Part("legs", "black", "metal")])[4:8]
    ['a wooden chair', 'a chair made of wood', 'a red wooden chair', 'a chair with metal legs']
    """
    noun, full = nouns[0], with_article(nouns[0])
    found = [noun, full, f"a 3d model of {full}", *(with_article(other) for other in nouns[1:])]
    if whole.material and not {whole.material, _ADJECTIVES.get(whole.material)} & set(noun.split()):
        found += [_before_noun(Part("", "", whole.material), noun), f"{full} made of {whole.material}"]
    if whole.material and whole.colour:
        found.append(_before_noun(whole, noun))
    parts = [part for part in parts if part.look and (part.colour, part.material) != (whole.colour, whole.material)][:2]
    for part in parts:
        if part.material and part.material != whole.material:
            found.append(f"{full} with {_before_noun(Part('', '', part.material), part.word)}")
        if part.colour:
            found.append(f"{_before_noun(Part('', whole.colour), noun)} with {_before_noun(Part('', part.colour), part.word)}")
    found += [f"{full} with {detail}" for detail in details]
    more = [*(_before_noun(part, part.word) for part in parts), *details]
    if more:
        rest = f"{', '.join(more[:-1])} and {more[-1]}" if len(more) > 1 else more[0]
        found += [f"{_before_noun(whole, other)} with {rest}" for other in nouns[:2]]
        found.append(", ".join(filter(None, (noun, whole.look, *(f"{part.look} {part.word}" for part in parts), *details))))
    return list(dict.fromkeys(found))


def _before_noun(part: Part, noun: str) -> str:
    """A noun phrase with how it looks before it: "a black wooden table"; what the noun says itself is not said twice."""
    return with_article(" ".join([*(word for word in part.look.split() if word not in noun.split()), noun]))


def recoloured(caption: str, colour: str, target: str) -> str | None:
    """The caption of an object whose parts of one colour were painted in another; None where that cannot be said of it.

    >>> recoloured("a red chair with black legs", "red", "orange"), recoloured("a chair", "red", "blue")
    ('an orange chair with black legs', 'a blue chair')
    >>> recoloured("a chair with black legs", "red", "blue") is None
    True
    """
    named = colours_in(caption)
    if not named:
        return with_colour(caption, target)
    if colour not in named:
        return None
    return re.sub(rf"\b(?:(an?) )?{colour}\b", lambda m: f"{with_article(target).split()[0]} {target}" if m[1] else target, caption)
