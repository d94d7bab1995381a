"""The flows of CosyVoice 2 (package cosyvoice2-eu) and 3 (composed of blocks of f5-tts) in PyTorch, with random weights."""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import itertools
import logging
import sys
import types
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers  # noqa: F401  # which would find the stubs, so before them
from torch import nn
from torch.nn import functional

STUBS = "hydra hydra.core hydra.core.hydra_config omegaconf torchaudio lightning lightning.pytorch lightning.pytorch.loggers "
STUBS += "lightning.pytorch.utilities gdown wget rich loguru einx rjieba pypinyin"


class _Stub(types.ModuleType):
    """A module in which every name is anything."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock()


def _need(*specs):
    """Skips the test where a package is not installed."""
    for module, spec in specs:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install --no-deps {spec}")


def _folder(name):
    """The package of this name without its __init__."""
    found = importlib.machinery.PathFinder.find_spec(name.split(".")[0])
    made = types.ModuleType(name)
    made.__path__ = [str(Path(place, *name.split(".")[1:])) for place in found.submodule_search_locations]
    return made


@contextlib.contextmanager
def _imports(*bare):
    """For the time of an import: stubs of what is not installed, and packages whose __init__ is not run."""
    before, log = set(sys.modules), logging.getLogger()
    level, handlers = log.level, log.handlers[:]
    folders = {name: _folder(name) for name in bare}
    sys.modules |= {name: _Stub(name) for name in STUBS.split() if importlib.util.find_spec(name.split(".")[0]) is None}
    sys.modules |= folders
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.level, log.handlers[:] = level, handlers  # matcha sets its own
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _Stub) or name.split(".")[0] in {name.split(".")[0] for name in bare}:
                del sys.modules[name]


def _randomised(model, seed):
    """The model, of which every parameter matters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * (value[0].numel() ** -0.5 if value.ndim > 1 else 0.1))
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                module.weight += 1
        model.input_embedding.weight.normal_()
    return model.eval()


def version2(width=64, heads=2, stages=2, blocks=2, encoder=128, encoder_layers=(2, 1), codes=40):
    """CosyVoice 2's flow."""
    _need(("cosyvoice", "cosyvoice2-eu==0.2.8"), ("diffusers", "diffusers==0.29.0"), ("conformer", "conformer==0.3.2"))
    with _imports("matcha", "matcha.utils"):
        names = "flow.flow", "flow.flow_matching", "flow.decoder", "transformer.upsample_encoder"
        flow, matching, decoder, upsample = (importlib.import_module(f"cosyvoice.{name}") for name in names)
    first, second = encoder_layers
    conformer = upsample.UpsampleConformerEncoder(
        input_size=encoder,
        output_size=encoder,
        attention_heads=encoder // 64,
        linear_units=4 * encoder,
        num_blocks=first,
        input_layer="linear",
        pos_enc_layer_type="rel_pos_espnet",
        macaron_style=False,
        use_cnn_module=False,
        static_chunk_size=25,
    )
    conformer.pre_lookahead_layer = upsample.PreLookaheadLayer(channels=encoder, pre_lookahead_len=3)
    conformer.up_layer = upsample.Upsample1D(encoder, encoder)
    conformer.up_encoders = conformer.up_encoders[:second]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator = decoder.CausalConditionalDecoder(
            320, 80, [width], dropout=0.0, n_blocks=blocks, num_mid_blocks=stages, num_heads=heads, act_fn="gelu"
        )
    cosine = types.SimpleNamespace(
        sigma_min=1e-6, solver="euler", t_scheduler="cosine", training_cfg_rate=0.2, inference_cfg_rate=0.7
    )
    made = flow.CausalMaskedDiffWithXvec(
        input_size=encoder,
        vocab_size=codes,
        encoder=conformer,
        decoder=matching.CausalConditionalCFM(240, cosine, 1, 80, estimator),
        decoder_conf={},
        input_frame_rate=25,
    )
    made = _randomised(made, 2)
    with torch.no_grad():  # small numbers, for which the epsilon of the conformer's norms matters
        made.encoder.embed.out[1].weight *= 0.01
        made.encoder.embed.out[1].bias *= 0.01
    return made


class _Convs(nn.Module):
    """The grouped convolutions before the blocks of version 3."""

    def __init__(self, width):
        super().__init__()
        for name in ("conv1", "conv2"):
            setattr(self, name, nn.Sequential(nn.Conv1d(width, width, 31, groups=16), nn.Mish()))

    def forward(self, x):
        for layer in (self.conv1, self.conv2):
            x = layer(functional.pad(x, (30, 0)))
        return x


class _Estimator(nn.Module):
    """The diffusion transformer, of f5-tts' blocks."""

    def __init__(self, width, layers):
        super().__init__()
        with _imports("f5_tts", "f5_tts.model"):
            kinds = importlib.import_module("f5_tts.model.modules")
            rotary = importlib.import_module("x_transformers.x_transformers").RotaryEmbedding
        self.time_embed = kinds.TimestepEmbedding(width)
        self.input_embed = nn.Module()
        self.input_embed.proj = nn.Linear(320, width)
        self.input_embed.conv_pos_embed = _Convs(width)
        self.rotary_embed = rotary(64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            blocks = [kinds.DiTBlock(width, width // 64, 64, ff_mult=2, dropout=0, pe_attn_head=1) for _ in range(layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = kinds.AdaLayerNorm_Final(width)
        self.proj_out = nn.Linear(width, 80)

    def forward(self, x, mu, t, speaker, cond, chunk):
        frames = x.shape[1]
        t = self.time_embed(t.expand(len(x)))
        x = self.input_embed.proj(torch.cat([x, cond, mu, speaker[:, None].expand(-1, frames, -1)], -1))
        x = self.input_embed.conv_pos_embed(x.mT).mT + x
        steps = torch.arange(frames) // chunk if chunk else torch.zeros(frames)
        visible = (steps[None] <= steps[:, None])[None, None]
        rope = self.rotary_embed.forward_from_seq_len(frames)
        attend = functional.scaled_dot_product_attention
        with pytest.MonkeyPatch.context() as patch:  # the blocks know no mask of chunks
            masked = lambda q, k, v, **_: attend(q, k, v, visible if chunk else None)  # noqa: E731
            patch.setattr(functional, "scaled_dot_product_attention", masked)
            for block in self.transformer_blocks:
                x = block(x, t, rope=rope)
        return self.proj_out(self.norm_out(x, t))


class _Version3(nn.Module):
    def __init__(self, width, layers, hidden, codes):
        super().__init__()
        self.input_embedding = nn.Embedding(codes, 80)
        self.spk_embed_affine_layer = nn.Linear(192, 80)
        self.pre_lookahead_layer = nn.Module()
        self.pre_lookahead_layer.conv1 = nn.Conv1d(80, hidden, 4)
        self.pre_lookahead_layer.conv2 = nn.Conv1d(hidden, 80, 3)
        self.decoder = nn.Module()
        self.decoder.estimator = _Estimator(width, layers)
        torch.manual_seed(0)
        self.noise = torch.randn(1, 80, 15_000).mT

    @torch.inference_mode()
    def inference(self, codes, prompt_mel, speaker, streaming, finalize):
        x = self.input_embedding(codes.clamp(min=0))
        x, seen = (x, functional.pad(x, (0, 0, 0, 3))) if finalize else (x[:, :-3], x)
        y = functional.leaky_relu(self.pre_lookahead_layer.conv1(seen.mT))
        mu = (x + self.pre_lookahead_layer.conv2(functional.pad(y, (2, 0))).mT).repeat_interleave(2, dim=1)
        cond = functional.pad(prompt_mel, (0, 0, 0, mu.shape[1] - prompt_mel.shape[1]))
        speaker = self.spk_embed_affine_layer(functional.normalize(speaker))
        x, times = self.noise[:, : mu.shape[1]], 1 - torch.cos(torch.linspace(0, 1, 11) * 0.5 * torch.pi)
        given = [torch.cat([value, torch.zeros_like(value)]) for value in (mu, speaker, cond)]
        for now, after in itertools.pairwise(times):
            velocity = self.decoder.estimator(
                torch.cat([x, x]), given[0], now[None], given[1], given[2], 50 if streaming else None
            )
            x = x + (after - now) * (1.7 * velocity[:1] - 0.7 * velocity[1:])
        return x


def version3(width=128, layers=2, hidden=48, codes=40):
    """CosyVoice 3's flow."""
    _need(("f5_tts", "f5-tts==1.1.22"), ("x_transformers", "x-transformers==2.11.24"))
    return _randomised(_Version3(width, layers, hidden, codes), 3)


def mel(model, codes, prompt_length, prompt_mel, speaker, streaming, finalize):
    """The reference's mel spectrogram [2N' 80] of one row, after the prompt; codes [N], prompt_mel [2P 80], speaker [192]."""
    codes, prompt_mel, speaker = (torch.tensor(x)[None] for x in (codes, prompt_mel, speaker))
    if isinstance(model, _Version3):
        return model.inference(codes, prompt_mel, speaker, streaming, finalize)[0, prompt_mel.shape[1] :].numpy()
    prompt, new = codes[:, :prompt_length], codes[:, prompt_length:]
    counts = [torch.tensor([x.shape[1]]) for x in (new, prompt, prompt_mel)]
    out, _ = model.inference(new, counts[0], prompt, counts[1], prompt_mel, counts[2], speaker, streaming, finalize)
    return out[0].mT.numpy()
