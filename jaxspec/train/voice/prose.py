"""Running prose for the corpus: clauses, commas, lists, numbers, names and quotations, filled with words of a dictionary.

A grammar gives the rhythm and a dictionary the words, so that no text is learnt by heart.
"""

import random
import re
from collections.abc import Iterator

from jaxspec.text import symbols
from jaxspec.train.voice.sentences import SLOT_WORDS, dictionary

_RULES = """
text: {sentence} | {sentence} | {sentence} | {sentence} {sentence}
sentence: {clause}. | {clause}, {and} {clause}. | {when} {clause}, {clause}. | {opening}, {clause}. | {clause}, {doing}.
sentence: {clause}, {doing}, {and} {clause}. | {np}, {aside}, {did}. | {name}, who {did}, {did} {where}.
sentence: {clause} {when} {clause}.
sentence: {np}, {np}, and {np} {past} {np} {where}. | {we} {past} {list}. | {we} {past} {list}, {and} {clause}.
sentence: {doing}, {clause}.
sentence: {clause}, {clause}, and {clause}. | "{clause}," said {who}, "{and} {clause}." | "{question}" asked {who}. | {question}
sentence: {reply}, {clause}. | {opening}, {when} {clause}, {clause}. | {clause}, {and} then, {opening}, {did}.
sentence: {np}, which {did}, {did}.
sentence: {clause}; {clause}. | {np} of {place}, {place}, and {place} {did}. | it was {time}, {and} {clause}.
sentence: {clause}: {list}.
sentence: {name} was {age} years old, {and} {pronoun} {did}. | {np} {past} {amount} {plural} in {year}. | at {hour}, {clause}.
sentence: not {np}, but {np}, {did}. | {clause}, as {who} had {ed} {time}. | the {adj} {noun}, the {adj} {noun}, {and} {clause}!
question: did {np} {verb} {np}, or {verb} {np}? | where {be} {np}, and why? | {who}, {can} you {verb} {np}?
question: what {can} {who} {verb} {time}?
clause: {np} {past} {np} | {np} {past} {np} {where} | {np} {did} | {pronoun} {did} | there were {number} {plural} {where}
clause: {we} {did}
clause: {np} {be} {adj} | {np} {be} {adj} and {adj} | {pronoun} {can} {verb} {np} | {np} of {np} {did} | {name} and {name} {did}
did: {past} {np} | {past} {np} {where} | {went} {adv} {where} | {past} it {adv} | {adv} {past} {np} | {ed} and {ed}
did: {past} {np} {time}
did: {went} from {place} to {place} | had {ed} {np} | {past} {number} {plural} | {can} not {verb} {np} | {past} {list}
doing: {ing} {np} | {ing} {adv} {where} | {ing} {list} | still {ing} {np} | {adv} {ing} and {ing} | without {ing} {np}
np: the {noun} | the {noun} | a {adj} {noun} | the {adj} {noun} | {poss} {noun} | {who} | the {noun} {prep} {place}
np: {number} {plural}
np: the {adj}, {adj} {noun} | {poss} {adj} {plural} | the {noun} of {who} | some {plural} | every {noun} | the {ing} {noun}
np: that {word} {noun}
list: {np}, {np}, and {np} | {noun}, {noun}, {noun}, and {noun} | {np} and {np} | a {noun}, a {noun}, and {np}
list: {plural}, {plural}, and {plural}
where: {prep} {place} | {prep} the {noun} | in {place} | with {np} | to {place} | under the {adj} {noun} | from {np}
where: by the {noun}
place: the {place_} | the {adj} {place_} | {name}'s {place_} | {poss} {place_} | the {word}
who: {name} | the {person} | {poss} {person} | the {adj} {person} | mr. {name} | mrs. {name} | captain {name} | old {name}
who: dr. {name}
aside: the {adj} {noun} | {ing} {np} | like {np} | {adv} {ed} | however | of course | {age} years old | a {person} from {place}
aside: {time}
opening: {time} | in {place} | {adv} | for {amount} years | by the way | after all | in the end | at last | for example
opening: on the other hand
opening: in {year} | with {np} | {prep} {place} | to {verb} {np} | on {month} {day} | one morning | sooner or later | far away
opening: in fact | as usual
reply: yes | no | well | oh | indeed | perhaps | of course | now | so | look | {name} | my dear {name} | thank you
and: and | but | or | so | yet | and so | for | though | while | because
when: when | while | because | although | before | after | if | until | since | as | whenever | as soon as | even though | where
pronoun: he | she | it | they | we | i | you | nobody | everyone | somebody | this | that | one of them
we: we | they | i | you | {who} | the {plural}
poss: my | your | his | her | our | their | {name}'s | its
noun: {thing} | {animal} | {food} | {person} | {word} | {word} | {word} | {word}
plural: {plural_} | {plural_} | {plural_} | chairs | years | people | children | flowers | stairs | windows | letters | miles
plural: pieces
past: {verbed} | {ed} | {ed} | {had}
had: had | took | gave | made | saw | heard | knew | left | brought | sent | held | kept | wrote | read | wore | built | taught
had: sang
adj: {adj_} | {adjective} | {adjective}
adv: {adv_} | {ly} | {ly}
name: {name_} | {name_} | {word}
amount: {number} | {age} | {hundreds}
month: january | february | march | april | may | june | july | august | september | october | november | december
hour: {number} o'clock | half past {number} | seven thirty | quarter to {number} | noon
"""
_LEXICON = {"place": "place_", "adj": "adj_", "adv": "adv_", "name": "name_"}  # plain words of the templates, wrapped by a rule
_ENDINGS = {"ed": "ed", "ing": "ing", "ly": "ly", "plural_": "s", "adjective": "y|al|ous|ful|ive|able|ic|less|ish|ant|ent"}
_NUMBERS = {"year": (1100, 2050), "age": (2, 99), "hundreds": (100, 9999), "day": (1, 28)}


def prose(seed: int, max_symbols: int) -> Iterator[str]:
    """Pieces of prose as ``text.symbols.sentences`` cuts them, without end; the same for the same seed.

    Args:
        seed: of the random choices.
        max_symbols: the largest number of symbols in a piece.

    Raises:
        FileNotFoundError: the word list is not installed.
    """
    rng = random.Random(seed)
    words, weights = dictionary()
    choices = {_LEXICON.get(slot, slot): list(texts) for slot, texts in SLOT_WORDS.items()}
    for rule in _RULES.strip().splitlines():
        slot, alternatives = rule.split(": ", 1)
        choices.setdefault(slot, []).extend(one.strip() for one in alternatives.split(" | "))
    for slot, endings in _ENDINGS.items():
        choices[slot] = [w for w in words if len(w) > 4 and re.fullmatch(f"[a-z]+({endings})", w)]

    def fill(match: re.Match[str]) -> str:
        slot = match[1]
        if slot == "word":
            return rng.choices(words, cum_weights=weights)[0]
        if slot in _NUMBERS:
            return str(rng.randint(*_NUMBERS[slot]))
        return re.sub(r"\{(\w+)\}", fill, rng.choice(choices[slot]))

    while True:
        yield from symbols.sentences(re.sub(r"\{(\w+)\}", fill, "{text}"), max_symbols)
