"""What a request for speech holds: OpenAI's fields, and those that are ours."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxspec.serve.formats import SPEEDS

# OpenAI's names for voices; each stands for one of the voices that are served, in turn.
ALIASES = (
    "alloy ash coral echo nova fable sage onyx shimmer verse marin ballad cedar".split()  # women and men by turns, roughly
)


class Voice(BaseModel):
    """A voice by its id, as OpenAI's newer clients name it."""

    id: str


class Recording(BaseModel):
    """A recording to speak in the voice of, for models that can."""

    audio: str = Field(description="The bytes of a sound file (wav, flac, mp3, ogg), in base64.")
    text: str = Field("", description="What the recording says.")


class SpeechRequest(BaseModel):
    """The body of POST /v1/audio/speech."""

    model_config = ConfigDict(allow_inf_nan=False)

    input: str = Field(description="What to say.")
    model: str = Field("jaxspec", description="Any name: one model is served.")
    voice: str | Voice | None = Field(None, description="See /v1/audio/voices; OpenAI's names stand for these.")
    instructions: str = Field("", description="How to speak, for a model that takes an instruction; others ignore it.")
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] = Field(
        "mp3", description="pcm is 24 kHz, 16 bits, little-endian, one channel."
    )
    speed: float = Field(1.0, ge=SPEEDS[0], le=SPEEDS[1], description="Times as fast, at the same pitch.")
    stream_format: Literal["audio", "sse"] = Field("audio", description="The sound itself, or server-sent events.")
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**64)] = Field(0, description="The same seed gives the same speech.")
    verify: str | None = Field(None, description="How drafted codes are accepted: one of the rules that are served, or auto.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; by default the model's own.")
    reference: Recording | None = None
