"""Checkpoints in the layouts of the published files: PyTorch's reference classes with random weights."""

import functools
import json

import jax.numpy as jnp
import safetensors.torch
import snac as snac_package
import tokenizers
import torch
import transformers
from flax import traverse_util

from jaxspec.checkpoint.tensors import of_array
from jaxspec.convert import core, pipeline
from jaxspec.models.cosyvoice import V2, V3

CODES = 96  # of the families whose tokenizer determines the number
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_theta": 500_000.0,
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
XCODEC2_KINDS = {
    "X-codec2": (transformers.Xcodec2Config, transformers.Xcodec2Model),
    "NeuCodec": (transformers.NeuCodecConfig, transformers.NeuCodecModel),
}
XCODEC2 = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "quantization_dim": 128,
    "encoder_hidden_size": 4,
}
SEMANTIC = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
SNAC = {
    "sampling_rate": 24_000,
    "encoder_dim": 4,
    "encoder_rates": [2, 3, 4],
    "latent_dim": None,
    "decoder_dim": 32,
    "decoder_rates": [4, 3, 2],
    "attn_window_size": None,
    "codebook_size": 16,
    "codebook_dim": 5,
    "vq_strides": [4, 2, 1],
    "noise": True,
    "depthwise": True,
}
TEXTS = ["Convert the text to speech:", "The rain has stopped, so we can go.", "user assistant system 12 30", "你好，世界。"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLASA_TOKENS = [
    f"<|{what}_{how}_{end}|>"
    for what, how in (("TEXT", "GENERATION"), ("TEXT", "UNDERSTANDING"), ("SPEECH", "GENERATION"), ("SPEECH", "UNDERSTANDING"))
    for end in ("START", "END")
]
NEUTTS_TOKENS = (
    "<|TEXT_REPLACE|> <|TEXT_PROMPT_START|> <|TEXT_PROMPT_END|> <|SPEECH_REPLACE|> <|SPEECH_GENERATION_START|> "
    "<|SPEECH_GENERATION_END|>"
).split()


@functools.cache
def _trained():
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS, vocab_size=300, min_frequency=1, show_progress=False)
    return made


def tokenizer(folder, *added):
    """Writes a small tokenizer with these tokens after its own."""
    made = tokenizers.Tokenizer.from_str(_trained().to_str())
    made.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])
    made.save(str(folder / "tokenizer.json"))
    return made


def random_model(kind, config, seed=0):
    """A model of transformers whose every weight matters."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                value += 0.1 * torch.randn_like(value)
    return model


def llama(vocab, **changes):
    settings = {**SIZES, "vocab_size": vocab, "rope_parameters": LLAMA3, "tie_word_embeddings": True, **changes}
    return random_model(transformers.LlamaForCausalLM, transformers.LlamaConfig(**settings))


def qwen2(vocab, **changes):
    settings = {**SIZES, "vocab_size": vocab, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, **changes}
    return random_model(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**settings))


def llasa(folder, dtype=torch.float32, shard="10GB", **changes):
    """LLaSA as transformers writes it; returns the model."""
    made = tokenizer(folder, *LLAMA_TOKENS, *LLASA_TOKENS, *(f"<|s_{i}|>" for i in range(CODES)))
    model = llama(made.get_vocab_size(), **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def neutts(folder):
    """NeuTTS-Air; returns the model."""
    made = tokenizer(folder, *NEUTTS_TOKENS, *(f"<|speech_{i}|>" for i in range(CODES)))
    model = qwen2(made.get_vocab_size(), tie_word_embeddings=True)
    model.save_pretrained(folder)
    return model


def orpheus(folder):
    """Orpheus; returns the model."""
    made = tokenizer(folder, *LLAMA_TOKENS, *(f"<custom_token_{i}>" for i in range(10 + 7 * 16)))
    model = llama(made.get_vocab_size())
    model.save_pretrained(folder)
    return model


def orpheus_in_frames(folder):
    """An Orpheus that emits frame after frame: its layers add nothing, and each slot's codes point to those of the next."""
    made = tokenizer(folder, *LLAMA_TOKENS, *(f"<custom_token_{i}>" for i in range(10 + 7 * 16)))
    model = llama(made.get_vocab_size(), tie_word_embeddings=False)
    first, start = made.token_to_id("<custom_token_10>"), made.token_to_id("<custom_token_1>")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embed, head = model.model.embed_tokens.weight, model.lm_head.weight
        embed[:, :7] = head[:, :7] = 0
        embed[start, 6] = 5
        for slot in range(7):
            embed[first + slot * 16 : first + (slot + 1) * 16, slot] = 5
            head[first + slot * 16 : first + (slot + 1) * 16, slot - 1 if slot else 6] = 5
    model.save_pretrained(folder)
    return model


def cosyvoice(folder, version, vocab=700, **sizes):
    """``llm.pt`` and its backbone's folder; returns the state dict."""
    backbone = folder / "CosyVoice-BlankEN"
    backbone.mkdir()
    _trained().save_model(str(backbone))
    model, width = qwen2(vocab, tie_word_embeddings=True, **sizes), (SIZES | sizes)["hidden_size"]
    (backbone / "config.json").write_text(json.dumps(model.config.to_dict() | {"architectures": ["Qwen2ForCausalLM"]}))
    torch.manual_seed(1)
    state = {f"llm.model.{name}": value for name, value in model.state_dict().items()}
    state["speech_embedding.weight"] = 0.1 * torch.randn(version.rows, width)
    state["llm_decoder.weight"] = 0.2 * torch.randn(version.rows, width)
    if sizes:  # of the true size: it never stops, so that speech is as long as asked
        state["llm_decoder.weight"][6561:] = 0
    if version is V2:
        state["llm_embedding.weight"] = 0.1 * torch.randn(2, width)
        state["llm_decoder.bias"] = 0.5 * torch.randn(version.rows)
    torch.save(state, folder / "llm.pt")
    return state


def merged_cosyvoice(folder, version, state, text, bias=True):
    """The same weights in one vocabulary, ``text`` being the tokenizer's own tokens; returns that of the first code."""
    codes = [f"<|s_{i}|>" for i in range(6561)]
    if version is V2:
        codes += ["<|eos1|>", "<|eos2|>", "<|eos3|>", "<|sos|>", "<|task_id|>"]
    else:
        codes += ["<|sos|>", "<|eos1|>", "<|task_id|>", "<|fill|>", *(f"<|s_{i}|>" for i in range(6565, V3.rows))]
    text.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in codes])
    text.save(str(folder / "tokenizer.json"))
    first = text.token_to_id("<|s_0|>")
    vocab = -(-text.get_vocab_size() // 128) * 128
    model = qwen2(vocab, tie_word_embeddings=False)
    merged = {name: state[f"llm.model.{name}"] for name in model.state_dict() if name.startswith("model.layers")}
    merged["model.norm.weight"] = state["llm.model.model.norm.weight"]
    embed, head = torch.zeros(vocab, SIZES["hidden_size"]), torch.zeros(vocab, SIZES["hidden_size"])
    embed[:first] = state["llm.model.model.embed_tokens.weight"][:first]
    embed[first : first + version.rows] = state["speech_embedding.weight"]
    head[first : first + version.rows] = state["llm_decoder.weight"]
    if version is V2:
        embed[first + version.rows : first + version.rows + 2] = state["llm_embedding.weight"]
    model.load_state_dict(merged | {"model.embed_tokens.weight": embed, "lm_head.weight": head})
    merged_state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    if version is V2 and bias:
        merged_state["lm_head.bias"] = torch.full((vocab,), -torch.inf)
        merged_state["lm_head.bias"][first : first + version.rows] = state["llm_decoder.bias"]
    model.config.architectures = ["Qwen2ForCausalLM"]
    model.config.save_pretrained(folder)
    safetensors.torch.save_file(merged_state, folder / "model.safetensors")
    return first


@functools.cache
def xcodec2_model(kind):
    """A small X-codec2 or NeuCodec of transformers, see ``randomised_xcodec2``."""
    settings, model = XCODEC2_KINDS[kind]
    semantic = transformers.Wav2Vec2BertConfig(**SEMANTIC, conv_depthwise_kernel_size=3)
    return randomised_xcodec2(model(settings(**XCODEC2, semantic_model_config=semantic)))


def randomised_xcodec2(model):
    """The codec, every parameter far from what it starts as, its wave loud enough to compare, its codes diverse."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(0, value[0].numel() ** -0.5, generator=generator)
            else:
                value.normal_(float("norm" in name and name.endswith("weight")), 0.3, generator=generator)
            if ".res_unit" in name and "conv2" in name:
                value.mul_(0.3)  # or each residual unit would double the power
        _centre(model, generator)
        model.acoustic_decoder.head.linear.bias[: model.config.n_fft // 2 + 1] += 2  # logarithms of magnitudes
    return model


def _centre(model, generator):
    """Makes the coordinates that are rounded differ from frame to frame by more than from 0."""
    wave, features = (torch.randn(shape, generator=generator) for shape in ((1, 1, 50 * 320), (1, 50, 160)))
    semantic = model.semantic_adapter(model.semantic_encoder(features).last_hidden_state.mT)
    last = model.quantizer.project_in
    last.weight.mul_(3)
    last.bias.sub_(last(model.fc_encoder(torch.cat([semantic, model.acoustic_encoder(wave)], 1).mT)).mean((0, 1)))


def xcodec2(folder, kind="X-codec2"):
    """X-codec2 or NeuCodec as transformers writes it; returns the model."""
    xcodec2_model(kind).save_pretrained(folder)
    return xcodec2_model(kind)


def snac_model():
    """A SNAC in which every parameter matters and the wave is not clipped."""
    torch.manual_seed(0)
    model = snac_package.SNAC(**SNAC).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("alpha"):
                value.uniform_(0.3, 3)
            elif name.endswith("bias"):
                value.normal_(0, 0.3)
            elif name.endswith("original0"):
                value.mul_(torch.empty_like(value).uniform_(0.5, 1.5))
    return model


def snac(folder):
    """SNAC as it is published; returns the model."""
    model = snac_model()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(SNAC))
    return model


MAKERS = {
    "llasa": llasa,
    "neutts-air": neutts,
    "orpheus": orpheus,
    "orpheus-in-frames": orpheus_in_frames,
    "cosyvoice2": functools.partial(cosyvoice, version=V2),
    "cosyvoice3": functools.partial(cosyvoice, version=V3),
    "xcodec2": xcodec2,
    "neucodec": functools.partial(xcodec2, kind="NeuCodec"),
    "snac": snac,
}


def converted(folder, name, **options):
    """Makes the checkpoint of a family within a folder, unless it is there, and converts it anew; returns the path."""
    source = folder / name
    if not source.exists():
        source.mkdir()
        MAKERS[name](source)
    dest = folder / "-".join(["converted", name, *map(str, options.values())])
    pipeline.convert(str(source), dest, pipeline.Options(**options))
    return dest


def folded(state):
    """Tensors of the arrays of a state dict, weight norm folded."""
    return core.fold_weight_norm({name: of_array(name, array) for name, array in state.items()})


def planned(tensors, rules, abstract):
    """The parameters, in the shape of ``abstract``, that a table of rules makes of tensors."""
    expected = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items()}
    filled, _ = core.plan(tensors, rules, expected)
    return traverse_util.unflatten_dict({path: jnp.asarray(part.all()) for path, part in filled.items()}, sep="/")
