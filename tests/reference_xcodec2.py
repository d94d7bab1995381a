"""X-codec2 and NeuCodec of transformers: the original layout of their checkpoints, and what their encoders make of a wave."""

import re
from typing import NamedTuple

import numpy as np
import torch
import transformers
from checkpoints import XCODEC2, xcodec2_model

# What transformers calls it -> what the original checkpoints call it.
_PLACES = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}
ORIGINAL = (
    (r"quantizer\.", "generator.quantizer."),
    (r"acoustic_decoder\.fc\.", "fc_post_a."),
    (r"acoustic_decoder\.(embed|prior_net|post_net)\.", r"generator.backbone.\1."),
    (r"acoustic_decoder\.norm\.", "generator.backbone.final_layer_norm."),
    (r"acoustic_decoder\.head\.linear\.", "generator.head.out."),
    (r"acoustic_decoder\.layers\.(\d+)\.self_attn\.o_proj\.", r"generator.backbone.transformers.\1.att.c_proj."),
    (r"acoustic_decoder\.layers\.(\d+)\.input_layernorm\.", r"generator.backbone.transformers.\1.att_norm."),
    (r"acoustic_decoder\.layers\.(\d+)\.post_attention_layernorm\.", r"generator.backbone.transformers.\1.ffn_norm."),
    (r"acoustic_decoder\.layers\.(\d+)\.mlp\.", r"generator.backbone.transformers.\1.mlp."),
    (
        r"acoustic_encoder\.block\.(\d)\.res_unit(\d)\.(\w+)\.",
        lambda m: f"CodecEnc.conv_blocks.{int(m[1]) + 1}.block.{int(m[2]) - 1}.block.{_PLACES[m[3]]}.",
    ),
    (
        r"acoustic_encoder\.block\.(\d)\.(snake1|conv1)\.",
        lambda m: f"CodecEnc.conv_blocks.{int(m[1]) + 1}.block.{3 + _PLACES[m[2]]}.",
    ),
    (r"acoustic_encoder\.conv1\.", "CodecEnc.conv_blocks.0."),
    (r"acoustic_encoder\.snake1\.", "CodecEnc.conv_final_block.0."),
    (r"acoustic_encoder\.conv2\.", "CodecEnc.conv_final_block.1."),
    (r"semantic_encoder\.", "semantic_model."),
    (r"semantic_adapter\.conv1\.", "SemanticEncoder_module.initial_conv."),
    (r"semantic_adapter\.conv2\.", "SemanticEncoder_module.residual_blocks.1."),
    (r"semantic_adapter\.conv3\.", "SemanticEncoder_module.residual_blocks.3."),
    (r"semantic_adapter\.conv4\.", "SemanticEncoder_module.final_conv."),
    (r"fc_encoder\.", "fc_prior."),
)
# Name of the magnitude, name of the direction; None: weight norm is folded.
WEIGHT_NORMS = {
    "old": ("weight_g", "weight_v"),
    "new": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    "none": None,
}


def tensors(kind):
    """The checkpoint that transformers writes."""
    return {name: value.numpy() for name, value in xcodec2_model(kind).state_dict().items()}


def original(state, weight_norm=None, snake="beta"):
    """The same checkpoint in the original layout, with what else is in its files."""
    renamed = {"generator.head.istft.window": np.ones(4, np.float32)}
    for name, value in state.items():
        if re.search(r"self_attn\.[qkv]_proj", name) and name.startswith("acoustic_decoder"):
            continue
        (theirs, ours), *_ = [pair for pair in ORIGINAL if re.match(pair[0], name)]
        ours = re.sub(f"^{theirs}", ours, name)
        if ours.endswith("act.alpha"):
            part = ours.removesuffix("act.alpha")
            renamed |= {
                f"{part}{filter}.filter": np.ones((1, 1, 12), np.float32) for filter in ("upsample", "downsample.lowpass")
            }
        if ours.endswith("act.beta"):
            ours = ours.removesuffix("beta") + snake
        if weight_norm and ours.startswith("CodecEnc.") and value.ndim == 3:
            part = ours.removesuffix("weight")
            length = np.sqrt((value**2).sum((1, 2), keepdims=True))
            renamed |= {part + weight_norm[0]: length, part + weight_norm[1]: 2 * value}
        else:
            renamed[ours] = value
    heads, width = XCODEC2["num_attention_heads"], XCODEC2["hidden_size"]
    for i in range(XCODEC2["num_hidden_layers"]):
        q, k, v = (state[f"acoustic_decoder.layers.{i}.self_attn.{part}_proj.weight"] for part in "qkv")
        q, k = (y.reshape(heads, 2, -1, width).swapaxes(1, 2).reshape(y.shape) for y in (q, k))
        renamed[f"generator.backbone.transformers.{i}.att.c_attn.weight"] = np.concatenate([q, k, v])
    for part in ("fc_post_s", "SemanticDecoder_module.initial_conv"):
        renamed |= {f"{part}.weight": np.ones((2, 2), np.float32), f"{part}.bias": np.ones(2, np.float32)}
    return renamed


class Encoded(NamedTuple):
    """What an encoder makes of a wave.

    features: [2k 80], normalised. hidden: of w2v-BERT [k D]. acoustic: [k D]. bounded: what is rounded [k 8]. codes: [k].
    """

    features: np.ndarray
    hidden: np.ndarray
    acoustic: np.ndarray
    bounded: np.ndarray
    codes: np.ndarray


@torch.no_grad()
def encoded(kind, model, wave):
    """A wave float32 [N] at 16 kHz, padded as the feature extractors of transformers do, which need torchaudio."""
    padded = np.pad(wave, (0, 320 - len(wave) % 320))
    heard = np.pad(padded, 160) if kind == "X-codec2" else padded
    extractor = transformers.SeamlessM4TFeatureExtractor()
    features = torch.from_numpy(extractor(heard, sampling_rate=16_000, return_tensors="np").input_features).float()
    values = torch.from_numpy(padded)[None, None]
    kept = []
    handle = model.quantizer.project_in.register_forward_hook(lambda module, inputs, output: kept.append(output))
    codes = model.encode(values, features).audio_codes[0, 0].numpy()
    handle.remove()
    bound = model.quantizer.quantizer.bound
    hidden = model.semantic_encoder(features).last_hidden_state[0].numpy()
    acoustic = model.acoustic_encoder(values)[0].T.numpy()
    return Encoded(features[0].reshape(-1, 80).numpy(), hidden, acoustic, bound(bound(kept[0]))[0].numpy(), codes)


def assert_codes_agree(codes, reference, share=0.02):
    """Codes [k] are the reference's, but for a few whose values lie within 1e-4 of the border between two codes."""
    border = np.abs(np.abs(reference.bounded - np.floor(reference.bounded)) - 0.5).min(-1) < 1e-4
    assert border.sum() <= share * len(border), f"{border.sum()} of {len(border)} at a border"
    np.testing.assert_array_equal(codes[~border], reference.codes[~border])
