"""Prompts of every family against ids that are built as the models' own code builds them."""

import sys

import checkpoints
import numpy as np
import pytest
import torch
import transformers

from jaxspec.checkpoint import pretrained
from jaxspec.synthesis import converted
from jaxspec.synthesis.contract import Reference, Settings
from jaxspec.text import TextWarning, phonemes

TEXT, REFERENCE, CODES = "The rain has stopped, so we can go.", "Hello, world 12!", (5, 0, 95, 7)
ASKED = {
    "text": {},
    "text and codes": {"reference_codes": CODES},
    "text, reference and codes": {"reference": REFERENCE, "reference_codes": CODES},
}

# The part of the template of Llama 3.2 that messages without tools go through.
LLAMA_TEMPLATE = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a family's small checkpoint, converted once."""
    folder, loaded = tmp_path_factory.mktemp("checkpoints"), {}

    def get(name):
        if name not in loaded:
            loaded[name] = pretrained.load(checkpoints.converted(folder, name))
        return loaded[name]

    return get


def prompt(target, text, **settings):
    """The prompt that a synthesizer of the model makes."""
    text_of, codes = settings.pop("reference", ""), settings.pop("reference_codes", None)
    reference = None if codes is None else Reference(text_of, np.array(codes))
    requests = converted.synthesizer(target).requests([text], Settings(**settings, reference=reference))
    row, length = requests.prompt[0], requests.prompt_length[0]
    assert not row[length:].any()
    return row[:length].tolist()


def encode(target, text):
    return target.tokenizer.encode(text, add_special_tokens=False).ids


def llasa(target, text, reference="", reference_codes=()):
    """The sample on the model's page, with the date at which the template was written."""
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(target.folder / "tokenizer.json"), bos_token="<|begin_of_text|>"
    )
    spoken = f"<|TEXT_UNDERSTANDING_START|>{f'{reference} {text}' if reference else text}<|TEXT_UNDERSTANDING_END|>"
    codes = "".join(f"<|s_{code}|>" for code in reference_codes)
    messages = [
        {"role": "user", "content": "Convert the text to speech:" + spoken},
        {"role": "assistant", "content": "<|SPEECH_GENERATION_START|>" + codes},
    ]
    settings = {"chat_template": LLAMA_TEMPLATE, "date_string": "26 Jul 2024", "continue_final_message": True}
    return theirs.apply_chat_template(messages, **settings)["input_ids"]


def neutts(target, text, reference="", reference_codes=()):
    """The ids of the phonemes and of the codes take the places of two tokens."""
    spoken = " ".join(phonemes.of(part, "en-us") for part in (reference, text) if part)
    ids = encode(target, "user: Convert the text to speech:<|TEXT_REPLACE|>\nassistant:<|SPEECH_REPLACE|>")
    start, end, place, place_of_codes, begin = (
        target.tokenizer.token_to_id(f"<|{name}|>")
        for name in ("TEXT_PROMPT_START", "TEXT_PROMPT_END", "TEXT_REPLACE", "SPEECH_REPLACE", "SPEECH_GENERATION_START")
    )
    at = ids.index(place)
    ids = [*ids[:at], start, *encode(target, spoken), end, *ids[at + 1 :]]
    codes = encode(target, "".join(f"<|speech_{code}|>" for code in reference_codes))
    return [*ids[: ids.index(place_of_codes)], begin, *codes]


def orpheus(target, text, voice="tara"):
    custom = [target.tokenizer.token_to_id(f"<custom_token_{i}>") for i in range(6)]
    begin, turn = (target.tokenizer.token_to_id(token) for token in ("<|begin_of_text|>", "<|eot_id|>"))
    return [custom[3], begin, *encode(target, f"{voice}: {text}"), turn, custom[4], custom[5], custom[1]]


def orpheus_clone(target, text, reference, frames):
    """The pretrained model's conversation: a turn that says the reference's text, its frames, and a turn with the text."""
    custom = [target.tokenizer.token_to_id(f"<custom_token_{i}>") for i in range(10 + 7 * 16)]
    begin, turn = (target.tokenizer.token_to_id(token) for token in ("<|begin_of_text|>", "<|eot_id|>"))
    said = [[custom[3], begin, *encode(target, part), turn, custom[4], custom[5], custom[1]] for part in (reference, text)]
    codes = [custom[10 + 16 * slot + code] for frame in frames for slot, code in enumerate(frame)]
    return [*said[0], *codes, custom[2], custom[6], *said[1]]


def cosyvoice2(target, text, reference="", reference_codes=()):
    """Codes and stops, then the two markers, then the tokens of text."""
    ids = [6566 + i for i in encode(target, reference) + encode(target, text)]
    return [6564, *ids, 6565, *reference_codes]


def cosyvoice3(target, text, reference="", reference_codes=()):
    """Codes, stops and markers in one table, then the tokens of text."""
    ids = encode(target, "You are a helpful assistant.<|endofprompt|>" + reference) + encode(target, text)
    return [6561, *(6761 + i for i in ids), 6563, *reference_codes]


BUILD = {"llasa": llasa, "neutts-air": neutts, "cosyvoice2": cosyvoice2, "cosyvoice3": cosyvoice3}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("name", BUILD)
def test_a_prompt_is_built_as_the_models_own_code_builds_it(load, name, asked):
    assert prompt(load(name), TEXT, **ASKED[asked]) == BUILD[name](load(name), TEXT, **ASKED[asked])


@pytest.mark.parametrize("voice", [None, "tara", "zoe"])
def test_a_prompt_of_orpheus_names_the_voice(load, voice):
    assert prompt(load("orpheus"), TEXT, voice=voice) == orpheus(load("orpheus"), TEXT, voice or "tara")


def test_a_reference_is_an_earlier_turn_of_orpheus(load):
    frames = np.random.default_rng(0).integers(0, 16, (3, 7)).tolist()
    given = {"reference": REFERENCE, "reference_codes": frames}
    assert prompt(load("orpheus"), TEXT, **given) == orpheus_clone(load("orpheus"), TEXT, REFERENCE, frames)


CONDITION = {"speaker": np.zeros((1, 192), np.float32)}  # stands for what the decoder is given


@pytest.mark.parametrize("name", ["cosyvoice2", "cosyvoice3"])
def test_cosyvoice_continues_a_reference_only_with_its_text(load, name):
    """Zero-shot, cross-lingual, instruct and sft, as its own front-end builds them."""
    target, build = load(name), BUILD[name]
    requests = converted.synthesizer(target).requests

    def ids(text="Yes.", instruct="", codes=CODES):
        reference = Reference(text, np.array(codes, np.int32), CONDITION)
        made = requests([TEXT], Settings(reference=reference, instruct=instruct))
        return made.prompt[0, : made.prompt_length[0]].tolist()

    assert ids() == build(target, TEXT, "Yes.", CODES)
    assert ids(text="") == ids(text="", codes=()) == build(target, TEXT)
    system = "You are a helpful assistant. " if name == "cosyvoice3" else ""
    rows = 6761 if name == "cosyvoice3" else 6566
    said = [rows + i for i in encode(target, f"{system}Speak softly.<|endofprompt|>") + encode(target, TEXT)]
    assert (
        ids(instruct="Speak softly.")
        == ids(instruct="Speak softly.<|endofprompt|>")
        == [{"cosyvoice2": 6564, "cosyvoice3": 6561}[name], *said, {"cosyvoice2": 6565, "cosyvoice3": 6563}[name]]
    )


GOLDEN = {
    "llasa": (
        "300 302 82 285 271 303 198 198 34 84 83 83 72 77 70 220 42 77 78 86 75 68 67 70 68 220 35 64 83 68 25 220 35 "
        "68 66 271 65 260 220 17 15 17 18 198 51 78 67 64 88 220 35 64 83 68 25 220 17 21 220 41 84 75 220 17 15 17 19 "
        "198 198 304 302 283 303 198 198 266 277 260 83 257 261 257 272 83 257 78 256 262 273 25 307 56 68 82 13 220 38 "
        "78 297 0 308 304 302 259 281 258 83 303 198 198 309 318 408"
    ),
    "neutts-air": (
        "283 25 220 266 277 260 83 257 261 257 272 83 257 78 256 262 273 25 301 73 135 230 133 249 82 13 220 133 94 135 "
        "234 78 134 232 257 86 135 230 133 249 75 85 0 302 198 259 281 258 83 25 304 311 401"
    ),
    "orpheus": "308 300 83 64 81 64 25 220 38 78 297 0 304 309 310 306",
    "cosyvoice2": "6564 6622 6634 6648 6579 6604 6644 6786 6582 6583 6566 6565 5 95",
    "cosyvoice3": (
        "6561 6817 6839 6845 6981 6825 6842 6829 6981 6825 6981 7022 6836 6840 6830 6845 6836 7057 7042 7019 6844 6774 "
        "7064 6817 6829 6843 6774 6799 6839 6981 6777 6778 6761 6563 5 95"
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_prompts(load, name):
    """A change to these ids is a decision, and is said in the commit that makes it."""
    settings = {} if name == "orpheus" else {"reference": "Yes.", "reference_codes": (5, 95)}
    assert prompt(load(name), "Go 12!", **settings) == [int(i) for i in GOLDEN[name].split()]


@pytest.mark.parametrize("pad_to", [1, 16])
@pytest.mark.parametrize("name", ["cosyvoice2", "cosyvoice3"])
def test_a_prompt_of_cosyvoice_reads_the_rows_that_its_own_code_concatenates(tmp_path, name, pad_to):
    (tmp_path / name).mkdir()
    state = checkpoints.MAKERS[name](tmp_path / name)
    target = pretrained.load(checkpoints.converted(tmp_path, name, pad_to=pad_to))
    text, codes = state["llm.model.model.embed_tokens.weight"], state["speech_embedding.weight"]
    markers = state["llm_embedding.weight"] if name == "cosyvoice2" else codes[[6561, 6563]]
    system = "" if name == "cosyvoice2" else "You are a helpful assistant.<|endofprompt|>"
    ids = encode(target, system + REFERENCE) + encode(target, TEXT)
    expected = torch.cat([markers[:1], text[ids], markers[1:], codes[list(CODES)]])
    tables = np.concatenate([target.params[f"table_{i}"] for i in range(len(target.model.shape.input_tables))])
    np.testing.assert_array_equal(tables[prompt(target, TEXT, reference=REFERENCE, reference_codes=CODES)], expected)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llasa", {"reference_codes": (0, 96)}, r"codes int \[T\] of 0 to 95, got \(2,\) of 0 to 96"),
        ("cosyvoice2", {"reference_codes": (-1, 3)}, "of 0 to 6560, got .* of -1 to 3"),
        ("llasa", {"voice": "tara"}, "tara"),
        ("orpheus", {"voice": "nobody"}, "tara, .*, zoe, got 'nobody'"),
        ("orpheus", {"reference_codes": (1,) * 7}, r"codes int \[T 7\] of 0 to 15, got \(7,\)"),
        ("llasa", {"instruct": "Softly."}, "no instruction for llasa, which takes none, got 'Softly.': leave it out"),
    ],
)
def test_what_a_family_cannot_take_is_refused(load, name, settings, message):
    with pytest.raises(ValueError, match=message):
        prompt(load(name), TEXT, **settings)


# --- pieces of a text ---------------------------------------------------------------------------------------------------


def test_sentences_are_joined_as_long_as_they_fit(load):
    size = lambda text: len(encode(load("llasa"), text))  # noqa: E731
    sentence = "The rain has stopped, so we can go."
    fit = converted.PIECE_TOKENS // size(f"{sentence} ")
    pieces = converted.pieces(load("llasa"), " ".join([sentence] * (2 * fit + 1)))
    assert fit > 1
    assert pieces == [" ".join([sentence] * fit)] * 2 + [sentence]
    assert size(f"{pieces[0]} {sentence}") > converted.PIECE_TOKENS >= size(pieces[0])


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("  One.  Two!\nThree?\tFour;  five\n\nsix  ", "One. Two! Three? Four; five six"),
        ("C'est l'été. Oui.", "C'est l'été. Oui."),
        ("Voilà\nOui", "Voilà Oui"),
        ("你好。世界！ 很好", "你好。世界！很好"),
        ("你好。Yes. 你好", "你好。Yes. 你好"),
    ],
)
def test_joined_sentences_have_the_space_of_their_language(load, text, piece):
    assert converted.pieces(load("llasa"), text) == [piece]


@pytest.mark.parametrize(
    ("text", "space", "ends"),
    [
        ("The rain has stopped so we can go " * 12, " ", ""),
        ("1,000,000 at 12:30 " * 11, " ", ("at", "0")),
        ("one,two:three," * 12, "", (",", ":")),
        ("你好，世界" * 30, "", "，"),
        ("你好世界、" * 30, "", "、"),
    ],
)
def test_a_long_sentence_is_halved_between_its_parts(load, text, space, ends):
    pieces = converted.pieces(load("llasa"), text)
    sizes = [len(encode(load("llasa"), piece)) for piece in pieces]
    assert converted.PIECE_TOKENS / 4 < min(sizes) <= max(sizes) <= converted.PIECE_TOKENS
    assert space.join(pieces) == text.strip()
    assert all(piece.endswith(ends) for piece in pieces[:-1])


@pytest.mark.parametrize("text", ["", "  \n", "?! ...", "。"])
def test_a_text_without_a_word_is_refused(load, text):
    with pytest.raises(ValueError, match="something to speak"):
        converted.pieces(load("llasa"), text)


@pytest.mark.parametrize("word", ["zyxw" * 75, "你好世界" * 50])
def test_an_endless_word_is_broken_up(load, word):
    with pytest.warns(TextWarning) as caught:
        pieces = converted.pieces(load("llasa"), f"A fine word is {word}.")
    assert [str(one.message) for one in caught] == [f'broke up "{word[:20]}...", a word of {len(word)} characters']
    assert max(len(encode(load("llasa"), piece)) for piece in pieces) <= converted.PIECE_TOKENS
    assert "".join(pieces).replace(" ", "") == f"Afinewordis{word}."


# --- phonemes -----------------------------------------------------------------------------------------------------------


def test_phonemes_have_stress_and_punctuation():
    assert phonemes.of("Hello,  the rain\nhas stopped!", "en-us") == "həlˈoʊ, ðə ɹˈeɪn hɐz stˈɑːpt!"


@pytest.mark.parametrize("package", ["phonemizer", "espeakng_loader"])
def test_a_missing_package_is_named_with_its_cure(monkeypatch, package):
    phonemes._backend.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"expected {package}, .*got none: pip install 'jaxspec\[phonemes\]'"):
        phonemes.of("Hello.", "en-us")
