"""Makes the built-in voice from nothing: python scripts/build_voice.py STAGE [--config FILE] [--work DIR]. Every stage resumes.

Stages, in order: corpus (flite speaks), codec, encode (recordings to codes), target, draft, sample (the target speaks), distil
(the draft learns from it), pack (writes jaxspec/voice/builtin.safetensors).
"""

import argparse
import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import jax

from jaxspec.codec import voice as codecs
from jaxspec.models import transformer, voice
from jaxspec.train import codec, corpus, language_model
from jaxspec.train.loop import Schedule, averaged, fit

CODEC = codecs.Config(len(voice.VOICES), voice.LEVELS)
FRAME_S = CODEC.samples_per_code / CODEC.sample_rate_hz


def schedule(settings: dict[str, Any]) -> Schedule:
    """The part of a stage's settings that says how long and how fast to learn."""
    names = {field.name for field in dataclasses.fields(Schedule)}
    return Schedule(**{name: value for name, value in settings.items() if name in names})


def shape(settings: dict[str, Any]) -> transformer.Config:
    """The part of a stage's settings that says what the model looks like."""
    names = ("width", "layers", "heads", "kv_heads", "head_dim", "mlp_width")
    tables = (voice.VOCAB, voice.PROMPT_ROWS)
    return transformer.Config(tables, voice.VOCAB, **{name: settings[name] for name in names}, qk_norm=True)


def learn_codes(name: str, config: dict[str, Any], work: Path) -> None:
    """Trains the target or the draft on the encoded recordings."""
    settings = config[name]
    start = language_model.init_params(jax.random.key(0), shape(settings))
    loss = language_model.loss(shape(settings), tuple(settings["guided_layers"]))
    reading = language_model.Reading()
    fit(work / name, start, loss, lambda step: language_model.batches(work / "codes", reading, FRAME_S, step), schedule(settings))


def composed(name: str, config: dict[str, Any], work: Path) -> Any:
    """The trained weights of the target or the draft as the transformer's own."""
    start = language_model.init_params(jax.random.key(0), shape(config[name]))
    return language_model.compose(averaged(work / name, start), language_model.digit_features())


def run(stage: str, config: dict[str, Any], work: Path) -> None:
    """Runs one stage."""
    if stage == "corpus":
        settings = config["corpus"]
        for hours in corpus.build(work / "corpus", settings["voices"], settings["hours"], settings["seed"]):
            print(f"{hours:.2f} of {settings['hours']} h", flush=True)
    elif stage == "codec":
        settings, start = config["codec"], codec.init_params(jax.random.key(0), CODEC)

        def crops(step: int) -> Any:
            return codec.batches(work / "corpus", list(voice.VOICES), CODEC, settings["batch"], settings["crop"], 1000 + step)

        fit(work / "codec", start, codec.loss(CODEC), crops, schedule(settings))
    elif stage == "encode":
        params = averaged(work / "codec", codec.init_params(jax.random.key(0), CODEC))["codec"]
        for line in codec.encode_shards(work / "corpus", work / "codes", params, CODEC):
            print(line, flush=True)
    elif stage in ("target", "draft"):
        learn_codes(stage, config, work)


def main() -> None:
    """Reads the arguments and runs one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("corpus", "codec", "encode", "target", "draft", "sample", "distil", "pack"))
    parser.add_argument("--config", type=Path, default=Path(__file__).parent.parent / "configs" / "voice.toml")
    parser.add_argument("--work", type=Path, default=Path("build/voice"))
    arguments = parser.parse_args()
    run(arguments.stage, tomllib.loads(arguments.config.read_text()), arguments.work)


if __name__ == "__main__":
    main()
