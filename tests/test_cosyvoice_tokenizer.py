"""The tokenizer of CosyVoice against transformers' and against its own list of tokens."""

import hashlib
import shutil

import pytest
import tokenizers
import transformers

from jaxspec.convert import cosyvoice
from jaxspec.models import card
from jaxspec.models.cosyvoice import V2, V3

PLAIN_TEXTS = [
    "It's here, I'LL say; they've 'd it: we're sure. THE END",
    "你好，世界。今天2024年12月30日。",
    "3.14 1,000 12345 ½ ٣ Ⅷ x2y",
    'Hm... (really?!) -- "quoted" a_b a/b #tag @me $5 50%~',
    "  two  spaces\tand\t\ttabs \n new \r\n\r\n  lines   \n\n",
    "caf\u00e9 cafe\u0301 ﬁ \u1e9b\u0323 naïve Ünïcödé",
    "no\u00a0break\u3000wide\u200bzero \ufeff",
    "👍🏽 emoji 👩‍👩‍👧 🇩🇪 done",
    "नमस्ते ไทย ภาษา 한국어",
    "",
]
SPECIAL_TEXTS = [
    "You are kind.<|endofprompt|>Hi [laughter] there<strong>you</strong> [breath]<|im_start|> <|endoftext|>end",
    "[AA1][b][ǎ] [ià]n [iòng] <|endofsystem|> [nope] <|nope|>",
]
V2_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|endofprompt|> [breath] <strong> </strong> [noise] [laughter] [cough] [clucking] "
    "[accent] [quick_breath] <laughter> </laughter> [hissing] [sigh] [vocalized-noise] [lipsmack] [mn]"
).split()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A folder whose tokenizer merges across words and digits wherever it is let, so that it shows where texts are cut."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.normalizer = tokenizers.normalizers.NFC()
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    parts = [text[first : first + length] for text in PLAIN_TEXTS for length in (2, 3, 4, 6) for first in range(len(text))]
    trained.train_from_iterator(parts, trainer)
    folder = tmp_path_factory.mktemp("backbone")
    (folder / cosyvoice.BACKBONE).mkdir()
    trained.model.save(str(folder / cosyvoice.BACKBONE))
    return folder


@pytest.mark.parametrize("version", [V2, V3])
def test_the_tokenizer_of_cosyvoice_is_that_of_qwen_with_its_tokens(backbone, version):
    ours = cosyvoice.tokenizer(backbone, version)
    theirs = transformers.Qwen2Tokenizer.from_pretrained(backbone / cosyvoice.BACKBONE)
    first = len(theirs.get_vocab()) - 1  # it has <|endoftext|> already
    added = [ours.id_to_token(i) for i in range(first, ours.get_vocab_size())]
    theirs.add_special_tokens({"additional_special_tokens": added[1:]})
    assert [theirs.convert_tokens_to_ids(token) for token in added] == list(range(first, ours.get_vocab_size()))
    for text in PLAIN_TEXTS + SPECIAL_TEXTS:
        assert card.tokenize(ours, text) == theirs(text)["input_ids"]
    assert card.tokenize(ours, "[laughter]") == [first + 8]


def test_the_added_tokens_are_those_of_cosyvoice_in_its_order(backbone):
    """Those of version 3 were compared with cosyvoice/tokenizer/tokenizer.py at ace7c47."""
    added = {}
    for version in (V2, V3):
        made = cosyvoice.tokenizer(backbone, version)
        added[version] = [token.content for _, token in sorted(made.get_added_tokens_decoder().items())]
    assert added[V2] == V2_TOKENS
    assert added[V3][:21] == [*V2_TOKENS, "<|endofsystem|>"]
    assert (len(added[V2]), len(added[V3]), added[V3][-1]) == (20, 281, "[ǜ]")
    digest = hashlib.sha256("\n".join(added[V3]).encode()).hexdigest()
    assert digest == "36d639d3ebbba97bf9b8fae4e5ad007f62ca7264ae2a2f8915e618f8ad8a458b"


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_a_missing_vocabulary_is_named(backbone, tmp_path, missing):
    shutil.copytree(backbone, tmp_path, dirs_exist_ok=True)
    (tmp_path / cosyvoice.BACKBONE / missing).unlink()
    with pytest.raises(ValueError, match=missing.replace(".", r"\.")):
        cosyvoice.tokenizer(tmp_path, V2)
