"""Published drafters in their layouts, converted: they score as PyTorch's reference, written here from their descriptions."""

import functools
import json
import types
from unittest import mock

import checkpoints
import commands
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from jaxspec import Sampling, autoregressive, generate, verify
from jaxspec.checkpoint import descriptions, pretrained
from jaxspec.convert import cosyvoice, drafters
from jaxspec.convert.pipeline import convert
from jaxspec.draft import families
from jaxspec.draft.family import Packed
from jaxspec.models.cosyvoice import V2
from jaxspec.models.transformer import Transformer

IDS = np.random.default_rng(1).integers(0, 96, (1, 12)).astype(np.int32)
ANCHORS = np.array([[1, 4, 8]], np.int32)
WIDTH, THETA, SIZE = 48, 5_000.0, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drafters")


@pytest.fixture(scope="module")
def target_of(folder):
    """The folder of a converted target, and what the maker of its checkpoint returned."""

    @functools.cache
    def make(name, **sizes):
        source = folder / f"source {name}"
        source.mkdir()
        with mock.patch.dict(checkpoints.SIZES, sizes):
            made = checkpoints.MAKERS[name](source)
        convert(str(source), folder / name)
        return folder / name, made

    return make


def scores(target_folder, draft_folder, ids, length):
    """The draft's logits [A K V] after ``ANCHORS`` of ids [1 T]."""
    loaded = pretrained.load(target_folder)
    draft = pretrained.load_draft(draft_folder, loaded)
    target = pretrained.with_features(loaded, draft.feature_layers)
    description = descriptions.read_as(draft_folder, descriptions.DraftDescription)
    config = families.from_json(description.family, description.settings, "float32")

    @jax.jit
    def run(params, draft_params, ids, segment, anchors):
        features = Transformer(target.model.shape).apply({"params": params}, ids, segment=segment)[1]
        batch = Packed(ids, segment, segment > 0)
        return families.FAMILIES[description.family].logits(config, draft_params, batch, features, anchors, length)

    return np.asarray(run(target.params, draft.params, ids, np.ones_like(ids), ANCHORS))[0]


def close(ours, wanted):
    assert wanted[np.isfinite(wanted)].std() > 0.3
    np.testing.assert_allclose(ours, wanted, atol=1e-4)


def randomised(module, seed):
    """Every parameter of a module far from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.normal_(float("norm" in name.lower() and value.ndim == 1), 0.2, generator=generator)
    return module.eval()


class LlasaPlus(nn.Module):
    """LLaSA+: the blocks on top of a model of transformers, under the names of its file."""

    def __init__(self, llm, blocks=2):
        super().__init__()
        self.llm, config, width = llm, llm.config, llm.config.hidden_size
        for i in range(1, blocks + 1):
            setattr(self, f"mtp_{i}_block", LlamaDecoderLayer(config, layer_idx=i))
            setattr(self, f"mtp_{i}_proj", nn.Linear(width, width))
            setattr(self, f"mtp_{i}_local_RMSNorm", LlamaRMSNorm(width))

    @torch.no_grad()
    def forward(self, ids):
        """The logits of each block [T V], from all positions' hidden states."""
        x, count = self.llm.model(ids).last_hidden_state, ids.shape[1]
        angles = self.llm.model.rotary_emb(x, torch.arange(count)[None])
        mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
        for i in (1, 2):
            norm, project, block = (getattr(self, f"mtp_{i}_{part}") for part in ("local_RMSNorm", "proj", "block"))
            x = block(project(norm(x)), attention_mask=mask, position_embeddings=angles)
            yield self.llm.lm_head(x)[0].numpy()


@pytest.fixture(scope="module")
def llasa_plus(folder, target_of):
    """The model, the folder of its file, and its target's."""
    target, llm = target_of("llasa")
    model = LlasaPlus(llm)
    for i, name in enumerate(name for name, _ in model.named_children() if name.startswith("mtp")):
        randomised(getattr(model, name), i)
    (folder / "llasa-plus").mkdir()
    safetensors.torch.save_file(
        {name: value.clone() for name, value in model.state_dict().items() if name != "llm.lm_head.weight"},
        folder / "llasa-plus" / "model.safetensors",
    )
    return model, folder / "llasa-plus", target


def test_the_blocks_of_llasa_plus_score_as_in_pytorch(llasa_plus, tmp_path):
    model, source, target = llasa_plus
    found = drafters.convert(str(source), tmp_path / "draft", target)
    assert found.notes == []
    assert {name.split(".")[0] for name in found.dropped} == {"llm"}
    wanted = np.stack(list(model(torch.tensor(IDS))), axis=1)[ANCHORS[0] - 1]
    close(scores(target, tmp_path / "draft", IDS, 2), wanted)
    assert pretrained.load_draft(tmp_path / "draft", pretrained.load(target)).max_length == 2


def test_a_copy_of_another_target_is_noted(llasa_plus, target_of, tmp_path):
    _, source, target = llasa_plus
    state = safetensors.torch.load_file(source / "model.safetensors")
    state["llm.model.norm.weight"] = state["llm.model.norm.weight"] + 0.1
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    (note,) = drafters.convert(str(tmp_path / "other.safetensors"), tmp_path / "draft", target).notes
    assert note.startswith("llm.model.norm.weight differs from the target's")


def test_the_command_converts_a_drafter_for_its_target(llasa_plus, tmp_path):
    _, source, target = llasa_plus
    code, out, err = commands.run("convert", source, tmp_path / "draft", "--target", target)
    assert (code, out.split(":")[0]) == (0, "llasa-plus"), err
    assert descriptions.read(tmp_path / "draft").target == descriptions.read(target).digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected the target of the drafter llasa-plus, got none"),
        (["--target", "TARGET", "--layers", "0"], "expected no other option than --dtype and --revision with --target"),
        (["--target", "SOURCE"], "jaxspec.json"),
    ],
)
def test_a_wrong_command_writes_nothing(llasa_plus, tmp_path, options, message):
    _, source, target = llasa_plus
    places = {"TARGET": target, "SOURCE": source}
    code, _, err = commands.run("convert", source, tmp_path / "draft", *(places.get(option, option) for option in options))
    assert code == 2
    assert message in err
    assert not (tmp_path / "draft").exists()


def test_other_models_are_no_drafters(target_of, folder, tmp_path):
    target, _ = target_of("llasa")
    with pytest.raises(ValueError, match="expected a drafter of llasa-plus"):
        drafters.convert(str(folder / "source llasa"), tmp_path / "draft", target)


def attend(module, x, seen, position, seen_position, mask, theta):
    """Attention of x [T D] at positions [T] over what is seen [S D], as the mask [T S] allows."""

    def heads(project, norm, x):
        return (norm or nn.Identity())(project(x).unflatten(-1, (-1, 12))).transpose(0, 1)

    def rotated(x, position):
        angle = position[:, None] * theta ** -(torch.arange(0, 12, 2) / 12)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    q = rotated(heads(module.q_proj, getattr(module, "q_norm", None), x), position)
    k = rotated(heads(module.k_proj, getattr(module, "k_norm", None), seen), seen_position)
    v = heads(module.v_proj, None, seen)
    k, v = (part.repeat_interleave(len(q) // len(part), dim=0) for part in (k, v))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return module.o_proj(out.transpose(0, 1).flatten(1))


def target_states(state, ids, layers):
    """The embeddings [T D] of our ids in CosyVoice's ``llm.pt``, and its hidden states after some numbers of layers [T F]."""
    with mock.patch.dict(checkpoints.SIZES, num_hidden_layers=sum("input_layernorm" in name for name in state)):
        model = checkpoints.qwen2(700, tie_word_embeddings=True).model
    model.load_state_dict({name[16:]: value for name, value in state.items() if name.startswith("llm.model.model.")})
    names = ("speech_embedding.weight", "llm_embedding.weight", "llm.model.model.embed_tokens.weight")
    embedded = torch.cat([state[name] for name in names if name in state])[torch.tensor(ids)]
    hidden = model(inputs_embeds=embedded[None], output_hidden_states=True).hidden_states
    return embedded, torch.cat([hidden[i][0] for i in layers], dim=-1)


class Speculator(nn.Module):
    """DFlash or DSpark under the names that speculators gives them; ids are of the merged vocabulary."""

    def __init__(self, vocab, draft_ids, rank):
        super().__init__()
        sizes = {name: value for name, value in checkpoints.SIZES.items() if "layers" not in name}
        config = Qwen3Config(**sizes, head_dim=12, vocab_size=vocab, num_hidden_layers=2, rope_parameters=None)
        self.fc, self.hidden_norm, self.norm = nn.Linear(2 * WIDTH, WIDTH, bias=False), LlamaRMSNorm(WIDTH), LlamaRMSNorm(WIDTH)
        self.layers = nn.ModuleList(Qwen3DecoderLayer(config, i) for i in range(2))
        self.embed_tokens, self.lm_head = nn.Embedding(vocab, WIDTH), nn.Linear(WIDTH, len(draft_ids), bias=False)
        self.register_buffer("d2t", draft_ids - torch.arange(len(draft_ids)))
        self.register_buffer("t2d", torch.isin(torch.arange(vocab), draft_ids))
        if rank:
            self.markov_head = nn.ModuleDict(
                {"markov_w1": nn.Embedding(vocab, rank), "markov_w2": nn.Linear(rank, len(draft_ids), bias=False)}
            )
            self.confidence_head = nn.ModuleDict({"proj": nn.Linear(WIDTH + rank, 1)})

    def forward(self, features, ids, anchor, mask_id, window):
        """The logits [block, draft ids] at an anchor before the Markov head; with a window the block is causal."""
        first = max(0, anchor - window) if window else 0
        context = self.hidden_norm(self.fc(features[first:anchor]))
        x = self.embed_tokens(torch.tensor([ids[anchor]] + [mask_id] * (SIZE - 1)))
        place, all_places = anchor + torch.arange(SIZE), torch.arange(first, anchor + SIZE)
        mask = torch.ones(SIZE, len(all_places), dtype=bool)
        mask[:, len(context) :] = torch.ones(SIZE, SIZE).tril().bool() if window else True
        for layer in self.layers:
            y = layer.input_layernorm(x)
            x = x + attend(layer.self_attn, y, torch.cat([context, y]), place, all_places, mask, THETA)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.lm_head(self.norm(x))


# The kind, the rank of the Markov head, the draft's ids from that of code 0, and the attention.
KINDS = {
    "dspark": (5, range(-40, 6000, 2), {"layer_types": ["full_attention"] * 2, "sliding_window": None}),
    "dflash": (0, range(-3, 6564), {"layer_types": ["sliding_attention"] * 2, "sliding_window": 3}),
}


@pytest.fixture(scope="module")
def speechspec(folder, target_of):
    """A kind's model, the ids that it drafts and that of its mask, and the folder of its files."""

    @functools.cache
    @torch.no_grad()
    def make(kind):
        target, state = target_of("cosyvoice2")
        first, (rank, ids, attention) = cosyvoice.first_merged_code(target), KINDS[kind]
        vocab, draft_ids, source = first + 6700, first + torch.tensor(ids), folder / f"source {kind}"
        model = randomised(Speculator(vocab, draft_ids, rank), 0)
        model.embed_tokens.weight[first : first + 6564] = state["speech_embedding.weight"]
        settings = {
            "speculators_model_type": kind,
            "block_size": SIZE,
            "mask_token_id": vocab - 1,
            "aux_hidden_state_layer_ids": [1, 2],
            "transformer_layer_config": {"rms_norm_eps": 1e-6, "rope_theta": THETA, **attention},
        }
        source.mkdir()
        (source / "config.json").write_text(json.dumps(settings))
        safetensors.torch.save_file(model.state_dict(), source / "model.safetensors")
        return model, draft_ids, vocab - 1, source

    return make


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_drafters_of_speechspec_score_as_in_pytorch(speechspec, target_of, tmp_path, kind):
    model, draft_ids, mask_id, source = speechspec(kind)
    (target, state), (rank, _, attention) = target_of("cosyvoice2"), KINDS[kind]
    found = drafters.convert(str(source), tmp_path / "draft", target)
    assert found.notes == []
    assert {name.split(".")[0] for name in found.dropped} == {"d2t", "t2d", "embed_tokens", *["confidence_head"] * bool(rank)}

    _, features = target_states(state, IDS[0], (1, 2))
    first, length = cosyvoice.first_merged_code(target), SIZE if rank else SIZE - 1
    inside, wanted = torch.isin(draft_ids - first, torch.arange(6564)), np.full((3, SIZE, 6564), -np.inf, np.float32)
    for row, anchor in zip(wanted, ANCHORS[0], strict=True):
        block = model(features, IDS[0] + first, anchor, mask_id, attention["sliding_window"])
        if rank:
            previous = model.markov_head["markov_w1"](torch.tensor(IDS[0, anchor : anchor + SIZE] + first))
            block = block + model.markov_head["markov_w2"](previous)
        row[:, (draft_ids - first)[inside]] = block[:, inside].numpy()
    wanted = wanted[:, SIZE - length :]
    assert np.isneginf(wanted).any() == (kind == "dspark")
    close(scores(target, tmp_path / "draft", IDS, length), wanted)


def test_a_converted_drafter_changes_no_token(speechspec, target_of, tmp_path):
    """Greedy decoding, with a draft vocabulary that lacks every other code, at a K below that of the block."""
    target, _ = target_of("cosyvoice2")
    drafters.convert(str(speechspec("dspark")[-1]), tmp_path / "draft", target)
    loaded = pretrained.load(target)
    draft = pretrained.load_draft(tmp_path / "draft", loaded)
    settings = {"max_new_tokens": 12, "sampling": Sampling(temperature=0)}
    run = (pretrained.language_model(pretrained.with_features(loaded, draft.feature_layers)), loaded.params)
    request = (IDS.repeat(2, axis=0), np.array([12, 3], np.int32))
    plain = autoregressive(jax.random.key(0), *run, *request, **settings)
    fast = generate(jax.random.key(0), *run, draft.drafter(2), draft.params, verify.exact(), *request, **settings)
    np.testing.assert_array_equal(fast.tokens, plain.tokens)
    assert (fast.info.drafted > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": None}, "expected block_size of 2 or more in config.json, got 0"),
        ({"mask_token_id": 10**6}, "expected mask_token_id below"),
        ({"aux_hidden_state_layer_ids": [1, 3]}, "expected aux_hidden_state_layer_ids from 1 to 2"),
        ({"transformer_layer_config": None}, "expected transformer_layer_config in config.json, got None"),
        ({"transformer_layer_config": {"layer_types": ["sliding_attention"]}}, "expected a sliding_window"),
        ({"markov_head_type": "gated"}, "expected markov_head_type vanilla"),
        ({"transformer_layer_config": {"layer_types": ["full_attention", "sliding_attention"]}}, "expected layer_types of one"),
        ({"transformer_layer_config": {"rms_norm_eps": 1e-5}}, "expected rms_norm_eps 1e-06"),
        ({"transformer_layer_config": {"rope_scaling": {"rope_type": "yarn"}}}, "type default or llama3, got yarn"),
    ],
)
def test_other_drafters_of_speculators_are_refused(speechspec, target_of, tmp_path, changes, message):
    _, _, _, source = speechspec("dspark")
    settings = json.loads((source / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        drafters.convert(str(tmp_path), tmp_path / "draft", target_of("cosyvoice2")[0])
    assert not (tmp_path / "draft").exists()


def test_a_target_of_another_family_is_refused(speechspec, target_of, tmp_path):
    with pytest.raises(ValueError, match="expected a target of cosyvoice2, cosyvoice3 for SpeechSpec's drafters, got llasa"):
        drafters.convert(str(speechspec("dspark")[-1]), tmp_path / "draft", target_of("llasa")[0])


class Eagle(nn.Module):
    """AngelSlim's EAGLE-3 under the names of its file."""

    def __init__(self, vocab):
        super().__init__()
        sizes = {"q_proj": (96, 48), "k_proj": (96, 24), "v_proj": (96, 24), "o_proj": (48, 48)}
        config = Qwen3Config(hidden_size=WIDTH, intermediate_size=80)
        config.mlp_bias = False
        self.midlayer = nn.ModuleDict(
            {
                "self_attn": nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in sizes.items()}),
                "mlp": LlamaMLP(config),
                **{name: LlamaRMSNorm(WIDTH) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
            }
        )
        self.norm, self.fc = LlamaRMSNorm(WIDTH), nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, vocab, bias=False)
        self.register_buffer("d2t", torch.zeros(vocab, dtype=torch.long))
        self.register_buffer("t2d", torch.ones(vocab, dtype=torch.bool))

    def forward(self, hidden, following):
        """The outputs [T D] for hidden states [T D] and the embeddings of the tokens after them."""
        layer, place, count = self.midlayer, torch.arange(len(hidden)), len(hidden)
        x = torch.cat([layer["input_layernorm"](following), layer["hidden_norm"](hidden)], dim=-1)
        causal, attention = torch.ones(count, count).tril().bool(), types.SimpleNamespace(**layer["self_attn"])
        x = hidden + attend(attention, x, x, place, place, causal, 1e6)
        return x + layer["mlp"](layer["post_attention_layernorm"](x))


@torch.no_grad()
def test_the_eagle_of_angelslim_scores_as_in_pytorch(target_of, tmp_path):
    target, state = target_of("cosyvoice3", num_hidden_layers=7)
    model, length = randomised(Eagle(6761), 0), 3
    (tmp_path / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-6, "rope_theta": 1e6, "model_type": "llama"}))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert drafters.convert(str(tmp_path), tmp_path / "draft", target).notes == []
    embedded, features = target_states(state, IDS[0], (2, 3, 4))
    wanted = []
    for anchor in ANCHORS[0]:
        hidden = model.fc(features[:anchor])
        for k in range(length):
            outputs = model(hidden, embedded[1 : anchor + k + 1])
            wanted.append(model.lm_head(model.norm(outputs[-1])).numpy())
            hidden = torch.cat([hidden, outputs[-1:]])
    wanted = np.reshape(wanted, (3, length, -1))
    close(scores(target, tmp_path / "draft", IDS, length), wanted)


def test_both_layouts_of_a_target_give_the_same_first_code(target_of, folder, tmp_path):
    made = cosyvoice.tokenizer(folder / "source cosyvoice2", V2)
    made.save(str(tmp_path / "tokenizer.json"))
    separate = cosyvoice.first_merged_code(tmp_path)
    made.add_tokens([f"<|s_{i}|>" for i in range(9)])
    made.save(str(tmp_path / "tokenizer.json"))
    assert cosyvoice.first_merged_code(tmp_path) == separate == made.token_to_id("<|s_0|>")
