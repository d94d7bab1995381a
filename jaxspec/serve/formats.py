"""Sound in the format that a client asks for, while it comes: PCM and WAV by ourselves, the others by PyAV."""

import importlib.util
import io
import itertools
from typing import Any

import numpy as np

from jaxspec.audio.pcm import pcm16, wav_header
from jaxspec.audio.resample import Resampler

PCM_HZ = 24_000  # what clients take headerless samples for
MEDIA_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/opus",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
_CONTAINERS = {"mp3": ("mp3", "libmp3lame"), "opus": ("ogg", "libopus"), "aac": ("adts", "aac"), "flac": ("flac", "flac")}
_OPUS_HZ = 48_000
SPEEDS = 0.25, 4.0


def check(response_format: str, speed: float) -> None:
    """Refuses what cannot be made here.

    Raises:
        ValueError: with what to do.
    """
    if response_format not in MEDIA_TYPES:
        raise ValueError(f"expected response_format among {', '.join(MEDIA_TYPES)}, got {response_format!r}: choose one of them")
    if not SPEEDS[0] <= speed <= SPEEDS[1]:
        raise ValueError(f"expected a speed from {SPEEDS[0]} to {SPEEDS[1]:g}, got {speed}: 1 is as the voice speaks")
    if (response_format in _CONTAINERS or speed != 1) and importlib.util.find_spec("av") is None:
        raise ValueError("expected PyAV on the server for this format or speed, got none: ask for wav or pcm at speed 1")


class Encoder:
    """One stream of bytes: ``add`` waves, then ``end``.

    Args:
        response_format: one of ``MEDIA_TYPES``.
        sample_rate_hz: of the waves.
        speed: how much faster to speak, at the same pitch.
    """

    def __init__(self, response_format: str, sample_rate_hz: int, speed: float = 1.0):
        self._tempo = _Tempo(sample_rate_hz, speed) if speed != 1 else None
        if response_format in _CONTAINERS:
            self._sink: Any = _Container(*_CONTAINERS[response_format], sample_rate_hz)
        elif response_format == "pcm":
            self._sink = _Pcm(sample_rate_hz)
        else:
            self._sink = _Wav(sample_rate_hz)

    def add(self, wave: np.ndarray) -> bytes:
        """The bytes that are ready after one more part of the wave, float32 [N]; maybe none."""
        return self._sink.add(self._tempo.add(wave) if self._tempo else wave)

    def end(self) -> bytes:
        """The rest."""
        rest = self._sink.add(self._tempo.end()) if self._tempo else b""
        return rest + self._sink.end()


class _Wav:
    def __init__(self, rate: int):
        self._header = wav_header(rate)

    def add(self, wave: np.ndarray) -> bytes:
        header, self._header = self._header, b""
        return header + pcm16(wave)

    def end(self) -> bytes:
        return self._header


class _Pcm:
    def __init__(self, rate: int):
        self._resampler = Resampler(rate, PCM_HZ)

    def add(self, wave: np.ndarray) -> bytes:
        return pcm16(self._resampler.add(wave))

    def end(self) -> bytes:
        return pcm16(self._resampler.end())


class _Written(io.RawIOBase):
    """What a muxer writes; it cannot seek."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.content += content
        return len(content)

    def take(self) -> bytes:
        content, self.content = bytes(self.content), bytearray()
        return content


class _Container:
    def __init__(self, container: str, codec: str, rate: int):
        import av

        self._written, self._rate = _Written(), rate
        options = {"page_duration": "100000"} if container == "ogg" else {}  # in us: a page is what a client can play
        self._container = av.open(self._written, "w", format=container, options=options)
        made_hz = _OPUS_HZ if codec == "libopus" else rate
        self._stream: Any = self._container.add_stream(codec, rate=made_hz, layout="mono")
        self._stream.codec_context.open()
        context = self._stream.codec_context
        self._resampler = av.AudioResampler(context.format, "mono", made_hz, context.frame_size or None)
        self._place = 0

    def add(self, wave: np.ndarray) -> bytes:
        if len(wave):
            self._encode(self._resampler.resample(_frame(wave, self._rate, self._place)))
            self._place += len(wave)
        return self._written.take()

    def end(self) -> bytes:
        self._encode([*(self._resampler.resample(None) if self._place else ()), None])
        self._container.close()
        return self._written.take()

    def _encode(self, frames: Any) -> None:
        for frame in frames:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)


class _Tempo:
    """FFmpeg's atempo, two of them where one does not reach far enough."""

    def __init__(self, rate: int, speed: float):
        from av.filter import Graph

        self._rate, self._place, graph = rate, 0, Graph()
        factors = (0.5, speed / 0.5) if speed < 0.5 else (speed,)
        nodes: list[Any] = [graph.add_abuffer(format="s16", sample_rate=rate, layout="mono")]
        nodes += [graph.add("atempo", f"{factor:.6f}") for factor in factors]
        nodes += [graph.add("aformat", "sample_fmts=s16:channel_layouts=mono"), graph.add("abuffersink")]
        for one, following in itertools.pairwise(nodes):
            one.link_to(following)
        graph.configure()
        self._graph, self._source, self._sink = graph, nodes[0], nodes[-1]

    def add(self, wave: np.ndarray) -> np.ndarray:
        if len(wave):
            self._source.push(_frame(wave, self._rate, self._place))
            self._place += len(wave)
        return self._pulled()

    def end(self) -> np.ndarray:
        if self._place:
            self._source.push(None)
        return self._pulled()

    def _pulled(self) -> np.ndarray:
        import av.error

        parts = [np.zeros(0, np.float32)]
        while self._place:
            try:
                parts.append(self._sink.pull().to_ndarray()[0].astype(np.float32) / 32767)
            except (av.error.BlockingIOError, av.error.EOFError):
                break
        return np.concatenate(parts)


def _frame(wave: np.ndarray, rate: int, place: int) -> Any:
    import av

    samples = np.frombuffer(pcm16(wave), "<i2")[None]
    frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
    frame.sample_rate, frame.pts = rate, place
    return frame
