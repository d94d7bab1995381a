"""Builds the built-in voice from nothing: python scripts/build_voice.py STAGE [--config FILE] [--work DIR].

Stages, in order; each resumes from what it finds in DIR: corpus (recordings by flite), codec, encode (recordings to codes),
decoder (a larger decoder of the same codes), target, pack (writes jaxspec/voice/builtin.safetensors), draft (trained on samples
of that file), and pack again, with the draft. Without the stages codec and decoder, the codec is that of the file.
"""

import argparse
import dataclasses
import itertools
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxspec.checkpoint import descriptions, store
from jaxspec.checkpoint.descriptions import DraftDescription
from jaxspec.codec import builtin as codecs
from jaxspec.common.files import claim
from jaxspec.models import builtin as voice
from jaxspec.models import transformer
from jaxspec.synthesis.contract import Settings
from jaxspec.train import recipe as recipes
from jaxspec.train import speech, trainer
from jaxspec.train.loop import TrainConfig, fit, load_ema
from jaxspec.train.voice import codec, corpus, language_model

CODEC = codecs.Config(len(voice.VOICES), voice.LEVELS)
FREE = ("steps", "decay_fraction", "checkpoint_every", "log_every")  # settings that may change when a stage is resumed
FRAME_S = CODEC.samples_per_code / CODEC.sample_rate_hz


def train_config(settings: dict[str, Any]) -> TrainConfig:
    """The steps and rates among a stage's settings."""
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in settings.items() if name in names})


def model_config(settings: dict[str, Any]) -> transformer.Config:
    """The target's shape among its settings."""
    names = ("width", "layers", "heads", "kv_heads", "head_dim", "mlp_width")
    tables = (voice.VOCAB, voice.PROMPT_ROWS)
    return transformer.Config(tables, voice.VOCAB, **{name: settings[name] for name in names}, qk_norm=True)


def target_params(config: dict[str, Any], work: Path) -> Any:
    """The trained weights of the target, with composed code tables."""
    start = language_model.init_params(jax.random.key(0), model_config(config["target"]))
    return language_model.compose(load_ema(work / "target", start), language_model.digit_features())


def trained_codec(work: Path) -> tuple[codecs.Config, Any]:
    """The trained codec and its weights: those that come with the package where the stage codec was left out."""
    if not (work / "codec").exists():
        packed = voice.load()
        return packed.codec, packed.codec_params
    return CODEC, load_ema(work / "codec", codec.init_params(jax.random.key(0), CODEC))["codec"]


def decoder_config(settings: dict[str, Any]) -> codecs.Config:
    """The codec with the decoder of the stage decoder."""
    names = ("decoder_width", "coarse_blocks", "fine_blocks")
    return dataclasses.replace(CODEC, **{name: settings[name] for name in names})


def decoder_start(config: codecs.Config) -> Any:
    """Random weights of a decoder."""
    return codec.init_params(jax.random.key(1), config)["codec"]["decoder"]


def final_codec(config: dict[str, Any], work: Path) -> tuple[codecs.Config, Any]:
    """The same with the decoder of the stage decoder, unless it was left out."""
    shape, params = trained_codec(work)
    if (work / "decoder").exists():
        shape = decoder_config(config["decoder"])
        params = {**params, "decoder": load_ema(work / "decoder", decoder_start(shape))}
    return shape, params


def run_corpus(config: dict[str, Any], work: Path) -> None:
    """Records the corpus with flite."""
    settings = config["corpus"]
    for hours in corpus.build(work / "corpus", **settings, max_symbols=voice.MAX_SYMBOLS):
        print(f"{hours:.2f} of {settings['hours']} h", flush=True)


def crops(settings: dict[str, Any], work: Path, seed: int) -> Any:
    """Random crops of the recordings."""
    return codec.batches(work / "corpus", list(voice.VOICES), CODEC, settings["batch"], settings["crop"], seed)


def run_codec(config: dict[str, Any], work: Path) -> None:
    """Trains the codec on crops of the recordings."""
    start = codec.init_params(jax.random.key(0), CODEC)
    settings = config["codec"]
    fit(work / "codec", start, codec.loss(CODEC), lambda step: crops(settings, work, 1000 + step), train_config(settings))


def run_decoder(config: dict[str, Any], work: Path) -> None:
    """Trains a larger decoder, with the encoder and so the codes fixed."""
    settings, (_, params) = config["decoder"], trained_codec(work)
    shape = decoder_config(settings)
    fit(
        work / "decoder",
        decoder_start(shape),
        codec.decoder_loss(shape, params["encoder"]),
        lambda step: crops(settings, work, 100_000 + step),
        train_config(settings),
    )


def run_encode(config: dict[str, Any], work: Path) -> None:
    """Encodes the recordings."""
    shape, params = trained_codec(work)
    for line in codec.encode_shards(work / "corpus", work / "codes", params, shape):
        print(line, flush=True)


def run_target(config: dict[str, Any], work: Path) -> None:
    """Trains the target on the encoded recordings."""
    settings = config["target"]
    start = language_model.init_params(jax.random.key(0), model_config(settings))
    loss = language_model.loss(model_config(settings), tuple(settings["guided_layers"]))
    reading = language_model.Reading()
    fit(
        work / "target",
        start,
        loss,
        lambda step: language_model.batches([work / "codes"], reading, FRAME_S, step),
        train_config(settings),
    )


def run_pack(config: dict[str, Any], work: Path) -> None:
    """Writes the file that comes with the package, with the draft if it is trained."""
    trained = np.zeros(voice.VOCAB, np.uint8)
    for path in (work / "codes").glob("*.npz"):
        for recording in corpus.read_shard(path):
            trained[recording.signal] = 1
    voice.BUILTIN.parent.mkdir(exist_ok=True)
    codec_config, codec_params = final_codec(config, work)
    packed = voice.Voice(model_config(config["target"]), codec_config, target_params(config, work), codec_params, trained)
    if (work / "draft").exists():
        described = descriptions.read_as(work / "draft", DraftDescription)
        own = store.read_params(work / "draft", "float32")
        packed = packed._replace(draft=dataclasses.asdict(described), draft_params=own)
    voice.save(voice.BUILTIN, packed)
    print(f"{voice.BUILTIN}: {voice.BUILTIN.stat().st_size / 1e6:.1f} MB, {trained.mean():.1%} of the codes occur in the corpus")


def run_draft(config: dict[str, Any], work: Path) -> None:
    """Samples the packed voice, and trains a draft on the samples."""
    settings, target, out = config["draft"], speech.load_target("builtin"), work / "draft"
    texts = corpus.texts(settings["seed"], settings["prose_share"], voice.MAX_SYMBOLS)
    some = tuple(itertools.islice(texts, settings["texts"]))
    what = speech.Speech(some, Settings(seed=settings["seed"]), voice.VOICES, settings["batch"])
    recipe = recipes.read(settings["recipe"])
    samples = trainer.begin(out, recipe, target) / "samples"
    speech.sample(samples, what, target, lambda done, total: print(f"{done} of {total} texts sampled", flush=True))
    trainer.train(out, recipe, target, speech.read(samples, target), target.sampling, cache_features=settings["cache_features"])


STAGES = {
    "corpus": run_corpus,
    "codec": run_codec,
    "encode": run_encode,
    "decoder": run_decoder,
    "target": run_target,
    "pack": run_pack,
    "draft": run_draft,
}


def main() -> None:
    """Reads the arguments and runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "configs" / "voice.toml")
    parser.add_argument("--work", type=Path, default=Path("build/voice"))
    arguments = parser.parse_args()
    config = tomllib.loads(arguments.config.read_text())
    try:
        arguments.work.mkdir(parents=True, exist_ok=True)
        fixed = {name: value for name, value in config.get(arguments.stage, {}).items() if name not in FREE}
        claim(arguments.work / f"{arguments.stage}.json", fixed, "use the same, or another --work")
        STAGES[arguments.stage](config, arguments.work)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"{arguments.stage}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
