"""The commands convert and info: valid inputs in all their forms, and the errors for wrong ones."""

import errno
import json
import shutil

import checkpoints
import commands
import jax
import numpy as np
import pytest
import reference_xcodec2
import safetensors.torch
import snac
import torch

from jaxspec.checkpoint import pretrained
from jaxspec.codec.padding import encode_rows
from jaxspec.convert import llama, pipeline
from jaxspec.convert.pipeline import convert

EMBED, HEAD = llama.EMBED, llama.HEAD
pytestmark = pytest.mark.usefixtures("own_cache")
own_cache, command = commands.own_cache, commands.run


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with the checkpoint of each family in its own, made once."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("llasa", "cosyvoice2", "xcodec2", "neucodec", "snac"):
        (folder / name).mkdir()
        checkpoints.MAKERS[name](folder / name)
    return folder


@pytest.fixture
def source(sources, tmp_path):
    """A copy of LLaSA's checkpoint to change."""
    return shutil.copytree(sources / "llasa", tmp_path / "source")


def edit_json(path, **changes):
    """Changes the values of a JSON file; None takes one out."""
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def edit_weights(folder, change):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    change(state)
    safetensors.torch.save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")


def digest(folder):
    return json.loads((folder / "jaxspec.json").read_text())["digest"]


TIES = {
    "tied without a head": (True, lambda state: None, True, ""),
    "tied with the same head": (True, lambda state: state.update({HEAD: state[EMBED]}), True, "stored once"),
    "tied with another head": (True, lambda state: state.update({HEAD: 2 * state[EMBED]}), False, "used as it is"),
    "tied with a head alone": (True, lambda state: state.update({HEAD: state.pop(EMBED)}), True, ""),
    "untied": (False, lambda state: state.update({HEAD: 2 * state[EMBED]}), False, ""),
    "untied with the same head": (False, lambda state: state.update({HEAD: state[EMBED]}), False, ""),
    "untied without a head": (False, lambda state: None, None, f"{HEAD}, as config"),
    "untied with a head alone": (False, lambda state: state.update({HEAD: state.pop(EMBED)}), None, f"{EMBED}, as config"),
    "neither": (True, lambda state: state.pop(EMBED), None, "got neither"),
}


@pytest.mark.parametrize("case", TIES)
def test_embedding_and_head_are_compared_and_not_guessed(source, tmp_path, case):
    tied_in_config, change, tied, note = TIES[case]
    rows = safetensors.torch.load_file(source / "model.safetensors")[EMBED].numpy()
    edit_weights(source, change)
    edit_json(source / "config.json", tie_word_embeddings=tied_in_config)
    if tied is None:
        with pytest.raises(ValueError, match=note):
            convert(str(source), tmp_path / "made")
        return
    notes = convert(str(source), tmp_path / "made").notes
    assert note in "".join(notes)
    assert len(notes) == bool(note)
    loaded = pretrained.load(tmp_path / "made")
    assert loaded.model.shape.tied == tied == ("head" not in loaded.params)
    np.testing.assert_array_equal(loaded.params["table_0"], rows)
    if not tied:
        np.testing.assert_array_equal(loaded.params["head"], rows if "same" in case else 2 * rows)


LLAMA3 = {name: value for name, value in checkpoints.LLAMA3.items() if name != "rope_theta"}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 500_000, "rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}},
        {"rope_parameters": LLAMA3, "rope_theta": 500_000.0},
        {"rope_parameters": checkpoints.LLAMA3, "head_dim": None, "torch_dtype": "float32"},
    ],
)
def test_older_settings_mean_the_same(source, changes):
    settings = json.loads((source / "config.json").read_text())
    vocabulary = {"input_tables": (409,), "vocab": 409}
    wanted = llama.architecture(settings, **vocabulary)
    assert (wanted.rope_theta, wanted.rope_scaling.factor, wanted.rope_scaling.original_max_position) == (5e5, 32.0, 64)
    older = {name: value for name, value in settings.items() if name != "rope_parameters"} | changes
    assert llama.architecture(older, **vocabulary) == wanted
    plain = llama.architecture(older | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, **vocabulary)
    assert (plain.rope_theta, plain.rope_scaling) == (1e4, None)


def test_shards_and_a_bin_give_the_same_parameters(source, tmp_path):
    convert(str(source), tmp_path / "one")
    shards, pickled = tmp_path / "shards", tmp_path / "pickled"
    for folder in (shards, pickled):
        folder.mkdir()
    model = checkpoints.llasa(shards, shard="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    convert(str(shards), tmp_path / "sharded")
    for path in ("config.json", "tokenizer.json"):
        shutil.copy(source / path, pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (note,) = convert(str(pickled), tmp_path / "unpickled").notes
    assert "stored once" in note
    convert(str(pickled / "pytorch_model.bin"), tmp_path / "file")
    assert len({digest(tmp_path / name) for name in ("one", "sharded", "unpickled", "file")}) == 1


def test_a_checkpoint_of_several_types_loses_nothing(source, tmp_path):
    state = safetensors.torch.load_file(source / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"
    (source / "model.safetensors").unlink()
    torch.save({name: value if name == norm else value.bfloat16() for name, value in state.items()}, source / "pytorch_model.bin")
    convert(str(source), tmp_path / "made")
    params = pretrained.load(tmp_path / "made").params
    np.testing.assert_array_equal(params["layer_1"]["attention_norm"]["scale"], state[norm])


def test_a_folder_that_is_made_anew_is_read_anew(sources, tmp_path):
    for name, tokens in (("llasa", 409), ("cosyvoice2", 320)):
        convert(str(sources / name), tmp_path / "made")
        assert pretrained.load(tmp_path / "made").tokenizer.get_vocab_size() == tokens
        shutil.rmtree(tmp_path / "made")


@pytest.mark.parametrize("name", ["xcodec2", "neucodec"])
def test_a_converted_codec_sounds_like_the_reference(sources, tmp_path, name):
    code, printed, err = command("convert", sources / name, tmp_path / "made")
    assert (code, err) == (0, "")
    assert printed.startswith(f"{name}: 0.")
    made = pretrained.load_codec(tmp_path / "made")
    assert (made.family, made.codec.sample_rate_hz) == (name, {"xcodec2": 16_000, "neucodec": 24_000}[name])
    codes = np.random.default_rng(0).integers(65_536, size=(2, 9, 1), dtype=np.int32)
    model = checkpoints.xcodec2_model({"xcodec2": "X-codec2", "neucodec": "NeuCodec"}[name])
    with torch.no_grad():
        wave = model.decode(torch.from_numpy(codes).mT.long()).audio_values[:, 0]
    np.testing.assert_allclose(
        made.codec.decode(made.params, codes, np.full(2, codes.shape[1], np.int32), None, None), wave, atol=1e-5
    )


@pytest.mark.parametrize("name", ["xcodec2", "neucodec"])
def test_a_converted_codec_encodes_as_the_reference_unless_its_encoder_is_left_out(sources, tmp_path, name):
    kind = {"xcodec2": "X-codec2", "neucodec": "NeuCodec"}[name]
    wave = (0.1 * np.random.default_rng(0).normal(size=3000)).astype(np.float32)
    assert command("convert", sources / name, tmp_path / "made")[::2] == (0, "")
    made = pretrained.load_codec(tmp_path / "made")
    (codes,) = encode_rows(made.codec, made.params, [wave])
    reference_xcodec2.assert_codes_agree(
        codes[:, 0], reference_xcodec2.encoded(kind, checkpoints.xcodec2_model(kind), wave), share=0.1
    )
    code, printed, _ = command("convert", sources / name, tmp_path / "small", "--without-encoder", "--json")
    assert code == 0
    assert any("acoustic_encoder." in tensor for tensor in json.loads(printed)["dropped"])
    without = pretrained.load_codec(tmp_path / "small")
    decoder = pretrained.load_codec(tmp_path / "made", encoder=False)
    assert decoder.codec.encode is without.codec.encode is None
    jax.tree.map(np.testing.assert_array_equal, decoder.params, without.params)
    _, printed, _ = command("info", tmp_path / "made")
    assert "encoder (semantic (width 64, layers 1, heads 4, mlp_width 64, taps 3), channels 4, strides (2, 2, 4, 4, 5)" in printed


def test_a_language_model_has_no_encoder(sources, tmp_path):
    code, _, err = command("convert", sources / "llasa", tmp_path / "made", "--without-encoder")
    assert code == 2
    assert "expected --without-encoder for a codec, got it for llasa, which has none" in err


def test_a_converted_snac_sounds_like_the_reference(sources, tmp_path, monkeypatch):
    code, printed, err = command("convert", sources / "snac", tmp_path / "made")
    assert (code, err) == (0, "")
    assert printed.startswith("snac: 0.0 M parameters")
    assert "tensors left out: " in printed
    made = pretrained.load_codec(tmp_path / "made")
    assert (made.family, made.codec.sample_rate_hz) == ("snac", 24_000)
    codes = np.random.default_rng(0).integers(16, size=(2, 5, 7), dtype=np.int32)
    monkeypatch.setattr(snac.layers.NoiseBlock, "forward", lambda block, x: x)
    with torch.no_grad():
        levels = [torch.tensor(codes[:, :, at].reshape(2, -1)) for at in ([0], [1, 4], [2, 3, 5, 6])]
        wave = checkpoints.snac_model().decode(levels)[:, 0]
    np.testing.assert_allclose(
        made.codec.decode(made.params, codes, np.full(2, codes.shape[1], np.int32), None, None), wave, atol=1e-5
    )


def test_convert_and_info_say_what_was_made(sources, tmp_path, caplog):
    made = tmp_path / "made"
    code, printed, err = command(
        "convert", sources / "llasa", made, "--layers", "0,1-2", "--dtype", "bfloat16", "--head", "speech"
    )
    assert (code, err) == (0, "")
    assert caplog.messages == []
    assert printed.splitlines() == [f"llasa: 0.1 M parameters, 0.00 GB in {made}", "tensors left out: 0"]
    code, printed, err = command("info", made, "--json")
    assert (code, err) == (0, "")
    printed_json = json.loads(printed)
    assert printed_json.items() >= {"kind": "model", "family": "llasa", "codec": "xcodec2", "licence": "CC-BY-NC-4.0"}.items()
    assert printed_json.items() >= {"head": "speech", "source": str(sources / "llasa"), "files": ["model.safetensors"]}.items()
    assert tuple(printed_json["shape"][name] for name in ("layers", "dtype", "input_tables")) == (3, "bfloat16", [97, 409])
    code, printed, err = command("info", made)
    assert (code, err) == (0, "")
    lines = dict(line.split("  ", maxsplit=1) for line in printed.splitlines())
    lines = {name: value.strip() for name, value in lines.items()}
    assert lines.items() >= {"language model": "llasa", "stop ids": "96", "codes": "96, from id 0"}.items()
    assert lines.items() >= {"head": "codes and stop ids only", "sampling": "temperature 0.8", "codec": "xcodec2"}.items()
    assert lines.items() >= {"source": f"{sources / 'llasa'} (model.safetensors)", "licence": "CC-BY-NC-4.0"}.items()
    assert "input_tables (97, 409), vocab 97, width 48, layers 3" in lines["transformer"]
    assert "rope_scaling (factor 32.0" in lines["transformer"]
    assert lines["digest"] == printed_json["digest"]
    assert int(lines["parameters"].replace(",", "")) == printed_json["parameters"]
    code, _, err = command("info", sources / "llasa")
    assert code == 2
    assert "jaxspec convert" in err


def tangle(state):
    state["model.layers.0.self_attn.extra.weight"] = torch.ones(2)
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.2.mlp.down_proj.weight"] = state["model.layers.2.mlp.down_proj.weight"].T


def spoil(state):
    state["model.norm.weight"][3] = torch.nan
    state["model.layers.1.self_attn.q_proj.weight"][7, 7] = -torch.inf


def settings(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def fewer_rows(folder):
    edit_weights(folder, lambda state: state.update({EMBED: state[EMBED][:400]}))
    edit_json(folder / "config.json", vocab_size=400)


def another_tokenizer(*tokens):
    return lambda folder: checkpoints.tokenizer(folder, *tokens)


WRONG = {
    "tensors": (
        lambda folder: edit_weights(folder, tangle),
        [],
        ["layers.0.self_attn.extra.weight: expected one matching", "layer_1/mlp/up/kernel: expected a tensor", "got (48, 80)"],
    ),
    "numbers": (
        lambda folder: edit_weights(folder, spoil),
        [],
        ["model.norm.weight: expected finite", "q_proj.weight: expected finite"],
    ),
    "numbers in bfloat16": (
        lambda folder: edit_weights(
            folder, lambda state: (spoil(state), state.update({k: v.bfloat16() for k, v in state.items()}))
        ),
        [],
        ["model.norm.weight: expected finite", "q_proj.weight: expected finite"],
    ),
    "architecture": (settings(architectures=["MistralForCausalLM"]), [], ["LlamaForCausalLM", "got MistralForCausalLM"]),
    "architectures": (settings(architectures=5), [], ["architectures", "got 5"]),
    "sliding window": (settings(use_sliding_window=True), [], ["sliding window"]),
    "rotary positions": (settings(rope_parameters=checkpoints.LLAMA3 | {"rope_type": "yarn"}), [], ["got yarn"]),
    "half a scaling": (settings(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), [], ["'factor' missing"]),
    "rope": (settings(rope_parameters="x"), [], ["rope_parameters", "got 'x'"]),
    "no theta": (settings(rope_parameters=None), [], ["rope_theta"]),
    "no width": (settings(hidden_size=None), [], ["hidden_size"]),
    "width": (settings(hidden_size="48"), [], ["hidden_size", "got '48'"]),
    "heads": (settings(num_attention_heads=0), [], ["num_attention_heads", "got 0"]),
    "layers": (settings(num_hidden_layers=2.5), [], ["num_hidden_layers", "got 2.5"]),
    "vocabulary": (settings(vocab_size=[1]), [], ["vocab_size", "got [1]"]),
    "other sizes": (settings(intermediate_size=81), [], ["expected shape (48, 81) of layer_0/mlp/up/kernel"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), [], ["config.json"]),
    "family": (another_tokenizer("<|x|>"), [], ["expected a checkpoint of llasa", "the tokenizer of another family", "--family"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), [], ["no tokenizer.json"]),
    "damaged tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), [], ["expected a tokenizer at"]),
    "half a tokenizer": (another_tokenizer("<|SPEECH_UNDERSTANDING_START|>"), [], ["with the token <|s_0|>"]),
    "fewer rows than tokens": (fewer_rows, [], [f"expected a row of {EMBED} for each id up to 408, got 400"]),
    "unknown family": (lambda folder: None, ["--family", "x"], ["--family"]),
    "other family": (lambda folder: None, ["--family", "orpheus"], ["<custom_token_0>"]),
    "other kind": (lambda folder: None, ["--family", "snac"], ["expected the decoder of a SNAC"]),
    "layers of words": (lambda folder: None, ["--layers", "x"], ["expected layers such as 0,1,18-23, got 'x'"]),
    "no layers": (lambda folder: None, ["--layers", "2-1"], ["one layer or more"]),
    "a layer twice": (lambda folder: None, ["--layers", "0,0-1"], ["different layers of 0 to 2, got [0, 0, 1]"]),
    "a layer too many": (lambda folder: None, ["--layers", "2-3"], ["different layers of 0 to 2, got [2, 3]"]),
    "pad to nothing": (lambda folder: None, ["--pad-to", "0"], ["pad_to of 1 to"]),
    "pad to too much": (lambda folder: None, ["--pad-to", "1000000000000"], ["pad_to of 1 to"]),
    "a revision": (lambda folder: None, ["--revision", "main"], ["leave the revision out"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_is_reported_and_nothing_is_written(source, tmp_path, case):
    change, arguments, reported = WRONG[case]
    change(source)
    code, printed, err = command("convert", source, tmp_path / "made", *arguments)
    assert (code, printed) == (2, "")
    assert "Traceback" not in err
    assert all(part in err for part in reported), err
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("name", ["xcodec2", "snac"])
@pytest.mark.parametrize("arguments", [["--head", "speech"], ["--layers", "0"], ["--pad-to", "8"]])
def test_a_codec_has_no_head_and_no_layers(sources, tmp_path, name, arguments):
    code, _, err = command("convert", sources / name, tmp_path / "made", *arguments)
    assert code == 2
    assert f"for the codec {name}" in err
    assert list(tmp_path.iterdir()) == []


def test_a_text_table_without_a_row_for_each_token_is_refused(sources, tmp_path):
    folder = shutil.copytree(sources / "cosyvoice2", tmp_path / "source")
    state = torch.load(folder / "llm.pt")
    state["llm.model.model.embed_tokens.weight"] = state["llm.model.model.embed_tokens.weight"][:319]
    torch.save(state, folder / "llm.pt")
    code, _, err = command("convert", folder, tmp_path / "made")
    assert code == 2
    assert "320" in err
    (folder / "CosyVoice-BlankEN" / "merges.txt").unlink()
    code, _, err = command("convert", folder, tmp_path / "made")
    assert code == 2
    assert "merges.txt" in err
    assert list(tmp_path.iterdir()) == [folder]


def test_a_place_that_is_taken_or_not_there_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("kept")
    for dest, why in ((source, "exists"), (tmp_path / "file", "exists"), (tmp_path / "none" / "made", "none first")):
        code, _, err = command("convert", source, dest)
        assert code == 2
        assert why in err
    assert (tmp_path / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source"]
    code, _, err = command("convert", tmp_path / "none", tmp_path / "made")
    assert code == 2
    assert "none" in err


@pytest.mark.parametrize("when", ["before", "half-way"])
def test_a_full_disk_leaves_nothing(source, tmp_path, monkeypatch, when):
    def full(start, stop):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    else:
        cast = pipeline.cast
        monkeypatch.setattr(
            pipeline,
            "cast",
            lambda tensor, dtype: cast(tensor, dtype)._replace(**{"read": full} if "layers.2" in tensor.name else {}),
        )
    code, printed, err = command("convert", source, tmp_path / "made")
    assert (code, printed) == (2, "")
    assert {"before": "free some space", "half-way": "No space left"}[when] in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [source]
