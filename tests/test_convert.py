"""Small checkpoints of every family in their published layouts, converted: they agree with PyTorch's reference."""

import functools
import shutil

import checkpoints
import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from jaxspec import Sampling, autoregressive, generate, sampling, verify
from jaxspec.checkpoint import descriptions, pretrained
from jaxspec.convert import cosyvoice
from jaxspec.convert.pipeline import Options, convert
from jaxspec.models import card
from jaxspec.models.cosyvoice import V2, V3
from jaxspec.models.transformer import Transformer
from jaxspec.types import History

GREEDY = {"max_new_tokens": 64, "sampling": Sampling(temperature=0)}
LENGTHS = np.array([21, 9, 1], np.int32)
ONE_VOCABULARY = ["llasa", "llasa untied", "neutts-air", "orpheus"]
TEXT = "The rain has stopped."


def merged(folder, version):
    """CosyVoice in one vocabulary; returns the state dict of ``llm.pt``."""
    (folder / "llm").mkdir()
    state = checkpoints.cosyvoice(folder / "llm", version)
    checkpoints.merged_cosyvoice(folder, version, state, cosyvoice.tokenizer(folder / "llm", version))
    return state


FAMILIES = checkpoints.MAKERS | {
    "llasa untied": functools.partial(checkpoints.llasa, tie_word_embeddings=False),
    "cosyvoice2 merged": functools.partial(merged, version=V2),
    "cosyvoice3 merged": functools.partial(merged, version=V3),
}


def reference(made):
    """PyTorch's logits float32 [T V] of our ids [T], from a model of transformers or the state dict of ``llm.pt``."""
    if isinstance(made, torch.nn.Module):
        return torch.no_grad()(lambda ids: made(torch.tensor(ids)[None]).logits[0].numpy())
    model = checkpoints.qwen2(700, tie_word_embeddings=True).model
    model.load_state_dict({name[16:]: value for name, value in made.items() if name.startswith("llm.model.model.")})
    names = ("speech_embedding.weight", "llm_embedding.weight", "llm.model.model.embed_tokens.weight")
    rows = torch.cat([made[name] for name in names if name in made])
    head = (made["llm_decoder.weight"], made.get("llm_decoder.bias"))

    def logits(ids):
        hidden = model(inputs_embeds=rows[torch.tensor(ids)][None]).last_hidden_state[0]
        return torch.nn.functional.linear(hidden, *head).numpy()

    return torch.no_grad()(logits)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a family's checkpoint and what its maker returned."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        return folder, FAMILIES[name](folder)

    return make


@pytest.fixture(scope="module")
def load(made, tmp_path_factory):
    """Converts a family's checkpoint and loads it."""

    @functools.cache
    def convert_and_load(name, **options):
        dest = tmp_path_factory.mktemp("converted") / "model"
        convert(str(made(name)[0]), dest, Options(**options))
        return pretrained.load(dest)

    return convert_and_load


def prompts(target):
    """Ragged prompts of all ids, [3 21]; what lies beyond their lengths is garbage."""
    return np.random.default_rng(0).integers(sum(target.model.shape.input_tables), size=(3, 21)).astype(np.int32)


def logits(loaded, tokens):
    """Of tokens [B T], without a cache."""
    apply = jax.jit(Transformer(loaded.model.shape).apply)
    return np.asarray(apply({"params": loaded.params}, np.asarray(tokens, np.int32))[0])


@pytest.mark.parametrize("name", [*ONE_VOCABULARY, "cosyvoice2", "cosyvoice3", "cosyvoice2 merged", "cosyvoice3 merged"])
def test_the_logits_are_those_of_pytorch(made, load, name):
    target, theirs = load(name), reference(made(name)[1])
    assert target.model.family == name.split()[0]
    lm, ids = pretrained.language_model(target), prompts(target)
    apply, more = jax.jit(lm.apply), ids[:, ::-1]
    first, _, cache = apply(target.params, ids, lm.init_cache(3, 42), np.zeros(3, np.int32))
    then, _, _ = apply(target.params, more, cache, LENGTHS)
    for row, length in enumerate(LENGTHS):
        wanted = theirs([*ids[row, :length], *more[row]])
        assert wanted.std() > 0.3
        np.testing.assert_allclose(np.concatenate([first[row, :length], then[row]]), wanted, atol=1e-4)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("neutts-air", "cosyvoice2")]  # as llasa and cosyvoice3


@pytest.mark.parametrize("name", ["llasa", "orpheus", "cosyvoice3", *SLOW])
def test_both_loops_emit_the_tokens_of_pytorch(made, load, tmp_path, name):
    target, theirs = load(name), reference(made(name)[1])
    convert(str(made(name)[0]), tmp_path / "draft", Options(layers=(1,)))
    small = pretrained.load_draft(tmp_path / "draft", target)
    lm, ids = pretrained.language_model(target), prompts(target)
    plain = autoregressive(jax.random.key(0), lm, target.params, ids, LENGTHS, **GREEDY).tokens.tolist()
    for tokens, prompt, length in zip(plain, ids.tolist(), LENGTHS, strict=True):
        spoken = theirs([*prompt[:length], *tokens])[length - 1 : -1]
        assert spoken.argmax(-1).tolist() == tokens
    models = (lm, target.params, small.drafter(3), small.params)
    fast = generate(jax.random.key(0), *models, verify.exact(), ids, LENGTHS, **GREEDY)
    assert fast.tokens.tolist() == plain
    assert (fast.info.drafted > 0).all()


@pytest.mark.parametrize("name", ["cosyvoice2", "cosyvoice3"])
def test_both_layouts_of_cosyvoice_are_one_model(load, name):
    plain, other = load(name), load(f"{name} merged")
    text = f"table_{len(plain.model.shape.input_tables) - 1}"
    rows = other.params[text].shape[0]
    params = plain.params | {text: plain.params[text][:rows]}
    jax.tree.map(np.testing.assert_array_equal, params, other.params)
    for asked in ({}, {"reference": "Hello", "codes": [0, 6560]}):
        ids = [card.prompt_ids(one.model, one.tokenizer, TEXT, **asked) for one in (plain, other)]
        np.testing.assert_array_equal(*ids)


def test_a_merged_cosyvoice_that_lost_its_bias_is_noted(made, tmp_path):
    state, notes = made("cosyvoice2")[1], {}
    for bias in (True, False):
        folder = tmp_path / f"{bias}"
        folder.mkdir()
        text = cosyvoice.tokenizer(made("cosyvoice2")[0], V2)
        checkpoints.merged_cosyvoice(folder, V2, state, text, bias=bias)
        notes[bias] = convert(str(folder), tmp_path / f"converted {bias}").notes
    assert notes[True] == []
    (note,) = notes[False]
    assert "lm_head.bias is missing" in note
    assert not pretrained.load(tmp_path / "converted False").model.shape.head_bias


@pytest.mark.parametrize("name", ONE_VOCABULARY)
def test_a_head_of_speech_gives_the_same_logits_of_fewer_ids(made, load, name):
    whole, speech = load(name), load(name, head="speech")
    first, codes, stop = whole.model.codes_first, whole.model.slots * whole.model.num_codes, whole.model.stop_ids[0]
    assert (speech.model.codes_first, speech.model.stop_ids, speech.model.text_first) == (0, (codes,), codes + 1)
    assert (speech.model.head, speech.model.shape.vocab, whole.model.text_first) == ("speech", codes + 1, 0)
    ids = prompts(whole)
    moved = np.where(ids == stop, codes, speech.model.text_first + ids)
    moved = np.where((ids >= first) & (ids < first + codes), ids - first, moved)
    assert {0, 1} <= set((moved < codes).ravel().tolist())
    all_logits = np.stack([reference(made(name)[1])(row) for row in ids])
    np.testing.assert_allclose(logits(speech, moved), all_logits[:, :, [*range(first, first + codes), stop]], atol=1e-4)
    one, other = (card.prompt_ids(loaded.model, loaded.tokenizer, TEXT) for loaded in (whole, speech))
    np.testing.assert_array_equal(one + speech.model.text_first, other)


@pytest.mark.parametrize("name", ["llasa", "llasa untied", "cosyvoice2", "cosyvoice3"])
def test_padding_does_not_change_the_probs(made, load, name):
    plain, padded = load(name), load(name, pad_to=128)
    shape, vocab = padded.model.shape, plain.model.shape.vocab
    assert all(rows % 128 == 0 for rows in (*shape.input_tables, shape.vocab))
    assert shape.vocab - shape.padding == vocab < shape.vocab
    assert padded.model.stop_ids == plain.model.stop_ids
    ids, moved = (card.prompt_ids(loaded.model, loaded.tokenizer, TEXT) for loaded in (plain, padded))
    same, more = np.split(logits(padded, moved[None])[0], [vocab], axis=1)
    np.testing.assert_allclose(same, reference(made(name)[1])(ids), atol=1e-4)
    assert np.isneginf(more).all()


def test_padding_and_a_head_of_speech_go_together(load):
    padded, plain = load("llasa", pad_to=128, head="speech"), load("llasa", head="speech")
    assert (padded.model.shape.vocab, padded.model.text_first, padded.model.shape.padding) == (128, 128, 31)
    for path, rows in (("table_0", 97), ("table_1", 409)):
        np.testing.assert_array_equal(padded.params[path][:rows], plain.params[path])
        assert not padded.params[path][rows:].any()
    ids = [card.prompt_ids(loaded.model, loaded.tokenizer, TEXT) - loaded.model.text_first for loaded in (plain, padded)]
    np.testing.assert_array_equal(*ids)


def test_padding_is_never_drawn(load):
    loaded = load("llasa", pad_to=128)
    shape, ids = loaded.model.shape, prompts(loaded)[:1]
    settings = sampling.rows(Sampling(temperature=1e6, top_k=shape.vocab, min_p=1e-6, repetition_penalty=1.1), 1)
    history = History(ids, LENGTHS[:1], LENGTHS[:1, None])
    probs = jax.jit(sampling.probabilities)(logits(loaded, ids)[:, -1:], settings, history)[0, 0]
    assert (probs[: shape.vocab - shape.padding] > 0).all()
    assert (probs[shape.vocab - shape.padding :] == 0).all()
    drawn = jax.vmap(sampling.sample, (0, None))(jax.random.split(jax.random.key(0), 5000), probs)
    assert drawn.max() < shape.vocab - shape.padding


@pytest.mark.parametrize("name", ["llasa", "llasa untied", "cosyvoice2"])
def test_a_draft_of_some_layers_shares_the_tables(made, load, tmp_path, name):
    target = load(name)
    found = convert(str(made(name)[0]), tmp_path / "draft", Options(layers=(2, 0)))
    small = pretrained.load_draft(tmp_path / "draft", target)
    layers = {path: value for path, value in target.params.items() if not path.startswith("layer_")}
    layers |= {"layer_0": target.params["layer_2"], "layer_1": target.params["layer_0"]}
    jax.tree.map(np.testing.assert_array_equal, small.params, layers)
    assert descriptions.read(tmp_path / "draft").shape.layers == 2
    assert sum("layers.1." in path for path in found.dropped) == sum("layers.1." in path for path in names_in(made(name)[1]))
    tables = [path for path in target.params if path.startswith(("table_", "head"))]
    assert all(small.params[path] is target.params[path] for path in tables)
    both, alone = (pretrained.memory_bytes(*params) for params in ([target.params, small.params], [target.params]))
    assert both - alone == sum(
        leaf.nbytes for path in ("layer_0", "layer_1", "norm") for leaf in jax.tree.leaves(small.params[path])
    )


def names_in(made):
    return made.state_dict() if isinstance(made, torch.nn.Module) else made


def test_other_tables_are_not_shared(made, load, tmp_path):
    shutil.copytree(made("llasa")[0], tmp_path / "other")
    state = safetensors.torch.load_file(tmp_path / "other" / "model.safetensors")
    state["model.embed_tokens.weight"][5, 5] += 1
    safetensors.torch.save_file(state, tmp_path / "other" / "model.safetensors")
    convert(str(tmp_path / "other"), tmp_path / "draft")
    small = pretrained.load_draft(tmp_path / "draft", load("llasa"))
    np.testing.assert_array_equal(small.params["table_0"], state["model.embed_tokens.weight"])


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("asked", [None, "bfloat16", "float16", "float32"])
def test_parameters_have_the_type_that_is_asked_for(tmp_path, stored, asked):
    model = checkpoints.llasa(tmp_path, dtype=stored)
    convert(str(tmp_path), tmp_path / "converted", Options(dtype=asked))
    loaded = pretrained.load(tmp_path / "converted", dtype=None)
    wanted = asked or {torch.bfloat16: "bfloat16"}.get(stored, "float32")
    assert loaded.model.shape.dtype == wanted
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.params)} == {wanted}
    for path, theirs in (
        (("table_0",), model.model.embed_tokens),
        (("layer_1", "mlp", "up", "kernel"), model.model.layers[1].mlp.up_proj),
    ):
        ours = functools.reduce(dict.__getitem__, path, loaded.params)
        theirs = theirs.weight.detach().to(getattr(torch, wanted)).float().numpy()
        np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs if path == ("table_0",) else theirs.T)
