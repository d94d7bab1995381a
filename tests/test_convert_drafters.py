"""Published drafters in their layouts, converted: they score as PyTorch's reference, written here from their descriptions."""

import functools

import checkpoints
import commands
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from jaxspec.checkpoint import descriptions, pretrained
from jaxspec.convert import drafters
from jaxspec.convert.pipeline import convert
from jaxspec.draft import families
from jaxspec.draft.family import Packed
from jaxspec.models.transformer import Transformer

IDS = np.random.default_rng(1).integers(0, 96, (1, 12)).astype(np.int32)
ANCHORS = np.array([[1, 4, 8]], np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drafters")


@pytest.fixture(scope="module")
def target_of(folder):
    """The folder of a converted target, and what the maker of its checkpoint returned."""

    @functools.cache
    def make(name):
        source = folder / f"source {name}"
        source.mkdir()
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


def randomised(module, seed):
    """Every parameter of a module far from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.normal_(float("norm" in name.lower() and value.ndim == 1), 0.2, generator=generator)
    return module.eval()


class LlasaPlus(torch.nn.Module):
    """LLaSA+: the blocks on top of a model of transformers, under the names of its file."""

    def __init__(self, llm, blocks=2):
        super().__init__()
        self.llm, config, width = llm, llm.config, llm.config.hidden_size
        for i in range(1, blocks + 1):
            setattr(self, f"mtp_{i}_block", LlamaDecoderLayer(config, layer_idx=i))
            setattr(self, f"mtp_{i}_proj", torch.nn.Linear(width, width))
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
    assert wanted.std() > 0.3
    ours = scores(target, tmp_path / "draft", IDS, 2)
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
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
        (["--target", "TARGET", "--layers", "0"], "expected no --family, --layers, --head or --pad-to with --target"),
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
