"""The description of a language model: from and to JSON, prompts, and the errors for what it does not take."""

import dataclasses

import numpy as np
import pytest
import tokenizers

from jaxspec import Sampling
from jaxspec.checkpoint import descriptions, store
from jaxspec.checkpoint.descriptions import CodecDescription, DraftDescription
from jaxspec.commands import info
from jaxspec.models import card
from jaxspec.models.transformer import Config, RopeScaling

SHAPE = Config((20, 12), 20, 8, 1, 2, 1, 4, 16, rope_scaling=RopeScaling(2.0, 1.0, 4.0, 64))
PLAIN = card.Model("toy", SHAPE, 2, 16, (18,), 20, (19, "{text}"), Sampling(temperature=0.5), "", "MIT")
NAMED = dataclasses.replace(PLAIN, voices=("ann", "bob"), clones=False, prompt=(19, "{voice} {text}"))
WORDS = ["ann", "bob", "one", "two", "three"]


@pytest.fixture(scope="module")
def tokenizer():
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="one")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made


def test_a_prompt_has_text_ids_after_the_codes(tokenizer):
    assert card.prompt_ids(PLAIN, tokenizer, "two three").tolist() == [19, 23, 24]
    assert card.prompt_ids(PLAIN, tokenizer, "two", reference="three", codes=[0, 15]).tolist() == [19, 24, 23, 2, 17]
    assert card.prompt_ids(NAMED, tokenizer, "two").tolist() == [19, 20, 23]
    assert card.prompt_ids(NAMED, tokenizer, "two", voice="bob").tolist() == [19, 21, 23]


def test_the_last_row_of_the_tables_is_a_prompt_id_and_the_next_is_none(tokenizer):
    last = dataclasses.replace(PLAIN, text_first=27)
    assert card.prompt_ids(last, tokenizer, "three").tolist() == [19, 31]
    beyond = dataclasses.replace(PLAIN, text_first=28)
    with pytest.raises(ValueError, match="expected prompt ids below 32, the rows of the input tables of toy, got 32: use"):
        card.prompt_ids(beyond, tokenizer, "three")
    with pytest.raises(ValueError, match=r"expected prompt ids below 32, .*, got 32: use"):
        card.prompt_ids(dataclasses.replace(PLAIN, prompt=(32, "{text}")), tokenizer, "one")


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            PLAIN,
            {"voice": "ann"},
            "expected no voice for toy, which has no named voices, got 'ann': give a reference",
        ),
        (dataclasses.replace(PLAIN, clones=False), {"voice": "ann"}, "got 'ann': leave the voice out"),
        (NAMED, {"voice": "cid"}, "expected a voice among ann, bob, got 'cid': choose one of these"),
        (NAMED, {"codes": [1]}, "expected no reference codes for toy, which takes none, got 1: choose a voice instead"),
        (PLAIN, {"codes": [16]}, r"expected reference codes int \[T\] of 0 to 15, got \(1,\) of 16 to 16: encode"),
        (PLAIN, {"codes": [-1, 3]}, "got .* of -1 to 3: encode"),
        (PLAIN, {"codes": [[1]]}, r"got \(1, 1\)"),
    ],
)
def test_what_a_model_does_not_take_is_one_sentence(tokenizer, model, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        card.prompt_ids(model, tokenizer, "one", **arguments)
    assert len(str(error.value).splitlines()) == 1


DESCRIPTIONS = [
    PLAIN,
    dataclasses.replace(
        NAMED, tables={"table_0": "blake3:0"}, files=("a", "b"), shape=dataclasses.replace(SHAPE, rope_scaling=None)
    ),
    DraftDescription("model", {"shape": {"layers": 1}}, "blake3:1", {"embed": "table_0"}, "MIT", "here", ("a",), "blake3:2", 7),
    CodecDescription("snac", {"strides": [4, 2, 1]}, "MIT", "here", ("a",), "blake3:2", 7),
]


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=["model", "other model", "draft", "codec"])
def test_a_description_is_read_as_it_was_written(tmp_path, description):
    store.write_description(tmp_path, descriptions.to_json(description))
    assert descriptions.read(tmp_path) == description
    assert descriptions.read_as(tmp_path, type(description)) == description


def test_the_text_of_a_description_has_what_is_set():
    model, named, draft, codec = map(info.card, DESCRIPTIONS)
    assert "sampling        temperature 0.5" in model
    assert "reference       a recording" in model
    assert "voices          ann, bob" in named
    assert "reference" not in named
    assert "rope_scaling" not in named
    greedy = info.card(dataclasses.replace(PLAIN, sampling=Sampling(temperature=0)))
    assert "sampling        temperature 0" in greedy
    assert "temperature 0.5" not in greedy
    assert draft.splitlines() == [
        "draft       model",
        "settings    shape (layers 1)",
        "target      blake3:1",
        "shared      embed (the target's table_0)",
        "parameters  7",
        "source      here (a)",
        "licence     MIT",
        "digest      blake3:2",
    ]
    assert codec.splitlines()[:2] == ["codec       snac", "shape       strides (4, 2, 1)"]


def test_codes_are_those_of_their_slots():
    model = dataclasses.replace(PLAIN, slots=2, num_codes=8)
    codes, at = card.codes_of(model, np.array([2, 17, 18, 3, 4, 19, 9, 10, 5]))
    assert codes.tolist() == [[0, 7], [7, 0]]  # of the other frame the second id is of the first slot
    assert at.tolist() == [[0, 1], [6, 7]]
    assert codes.dtype == at.dtype == np.int32
