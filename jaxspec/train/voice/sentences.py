"""Sentences of the corpus: everyday templates, and random dictionary words between function words.

Templates have the rhythm of plain English. Random words make the model learn how any word sounds, and not a few hundred by heart.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

WORD_LIST = Path("/usr/share/dict/american-english-small")  # Debian: wamerican-small

_SLOTS: dict[str, str] = {
    "person": "man woman boy girl teacher doctor farmer sailor painter driver waiter singer neighbor student child "
    "nurse baker hunter guest king queen judge lawyer soldier pilot stranger friend uncle aunt cousin grandmother",
    "name": "john mary peter susan robert linda george helen thomas sarah david laura frank alice henry rose paul jane",
    "animal": "dog cat horse bird cow sheep fox mouse rabbit goat duck fish bear wolf snake spider donkey chicken",
    "thing": "book letter table chair door window lamp knife bottle box basket coat hat key clock picture mirror ring "
    "bell rope hammer ladder bucket candle drum flag map pencil pillow plate shoe spoon stone towel wheel bag",
    "food": "bread cheese soup rice cake fish meat butter fruit salad pie toast jam honey corn beans eggs tea milk",
    "place": "house garden kitchen street river forest market school church station harbor bridge village city park "
    "library hospital office farm field beach island valley mountain castle museum theater hotel shop",
    "adj": "old young small large blue green red white black quiet loud happy sad strange heavy light warm cold long "
    "short broken clean dirty empty full gentle hungry lazy proud quick slow soft strong sweet tired wise wooden",
    "verbed": "found lost carried cleaned painted opened closed dropped followed forgot watched wanted broke bought "
    "sold pulled pushed touched lifted held caught saved moved noticed remembered described ignored kept",
    "verb": "find lose carry clean paint open close drop follow forget watch want break buy sell pull push touch lift "
    "hold catch save move notice remember describe ignore keep see bring send show leave choose",
    "went": "walked ran drove came returned moved hurried traveled climbed went sailed marched crawled wandered",
    "time": "yesterday|today|last night|this morning|every evening|on sunday|in the summer|before dinner|after lunch|at noon|"
    "next week|in april|two days ago|all day|once a year|on monday afternoon|for three hours|at midnight",
    "adv": "slowly quickly quietly carefully suddenly gently never always often nearly hardly finally soon again",
    "number": "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty five|a hundred|a thousand",
    "prep": "near|behind|under|beside|inside|outside|above|across|in front of|next to|far from",
    "said": "said told asked answered whispered shouted promised explained believed thought knew",
    "be": "is|was|will be|has been|seems|looked|became|felt",
    "weather": "rain snow wind fog sun storm ice thunder frost",
    "can": "can|could|should|must|would|will|may|might|did not|does not|cannot|never could",
}
SLOT_WORDS = {slot: text.split("|") if "|" in text else text.split() for slot, text in _SLOTS.items()}

TEMPLATES = """
the {adj} {person} {verbed} the {thing} {prep} the {place}.
{name} {verbed} a {adj} {thing} {time}.
the {animal} {went} {adv} across the {place}.
did you {verb} the {thing} that {name} {verbed}?
{time}, the {person} and the {animal} {went} to the {place}.
i {can} {verb} the {adj} {thing} {time}.
there are {number} {adj} chairs in the {place}.
we had {food} and {food} for dinner with the {person}.
the {weather} {be} {adj} {time}, so we stayed in the {place}.
{name} {said} that the {thing} {be} {adj}.
please {verb} the {thing} {prep} the {place}.
why {can} the {person} {verb} my {adj} {thing}?
if you {verb} the {animal}, {name} {can} {verb} the {thing}.
she {went} to the {place} to {verb} some {food}.
he {can} {verb} it, but they {verbed} it {adv}.
my {person} {can} {verb} {number} of them {time}.
nobody {verbed} the {adj} {thing} because of the {weather}.
when the {weather} came, the {person} {verbed} the {thing} and {went} home.
what a {adj} {animal}!
where {be} the {thing} of the {person}?
they {be} {adj} and {adj}, {said} the {person}.
our {place} {be} {number} miles from the {place}.
is it true that {name} {verbed} the {animal}?
you {can} {adv} {verb} this {thing} without the {person}.
it took {number} hours to {verb} the {thing} in the {place}.
""".split("\n")[1:-1]

FUNCTION_WORDS = (
    "the the the the a a a and and of of to to in in is it you that he was for on are with as i his they be at one "
    "have this from or had by not but what all were when we there can an your which their if will each about how up "
    "out them then she many some so these would into has more her two him see could no than been who its now did my "
    "down only may very after just where most our me too any same also around must before much through back"
).split()


def _fill(rng: random.Random, template: str) -> str:
    words = template.split("{")
    text = words[0]
    for part in words[1:]:
        slot, rest = part.split("}", 1)
        text += rng.choice(SLOT_WORDS[slot]) + rest
    return text


def _random_words(rng: random.Random, words: Sequence[str], weights: Sequence[float]) -> str:
    """Dictionary words with function words between them, punctuated like a sentence."""
    out: list[str] = []
    length = rng.randint(2, 11)
    while len(out) < length:
        if rng.random() < 0.45:
            out.append(rng.choice(FUNCTION_WORDS))
        else:
            out.append(rng.choices(words, cum_weights=weights)[0])
        if 1 < len(out) < length - 1 and rng.random() < 0.06:
            out[-1] += ","
    return " ".join(out) + rng.choices(".?!", weights=(8, 1.5, 0.5))[0]


def dictionary(path: Path = WORD_LIST) -> tuple[list[str], list[float]]:
    """The lower-case words of a word list and their cumulative weights. Short words, the common ones, weigh more.

    Args:
        path: one word a line.

    Raises:
        FileNotFoundError: the word list is not installed.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected a word list at {path}, got no file: apt-get install wamerican-small")
    lines = path.read_text(encoding="utf-8").split()
    words = sorted({w.lower() for w in lines if w.isascii() and w.replace("'", "").isalpha() and len(w) > 1})
    cumulative, total = [], 0.0
    for word in words:
        total += (0.4 if "'" in word else 1.0) / len(word) ** 1.5
        cumulative.append(total)
    return words, cumulative


def sentences(seed: int, template_share: float = 0.35) -> Iterator[str]:
    """Sentences in lower case with final punctuation, without end; the same for the same seed.

    Args:
        seed: of the random choices.
        template_share: the fraction of sentences made from templates.

    Raises:
        FileNotFoundError: the word list is not installed.
    """
    rng = random.Random(seed)
    words, weights = dictionary()
    while True:
        yield _fill(rng, rng.choice(TEMPLATES)) if rng.random() < template_share else _random_words(rng, words, weights)
