"""The Wyoming protocol of Home Assistant, over the same engine: describe, synthesize, and text that comes in parts."""

import asyncio
import contextlib
import socket
from typing import Any

from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.error import Error
from wyoming.event import Event as Message
from wyoming.event import async_read_event, async_write_event
from wyoming.info import Attribution, Describe, Info, TtsProgram, TtsVoice
from wyoming.tts import (
    Synthesize,
    SynthesizeChunk,
    SynthesizeStart,
    SynthesizeStop,
    SynthesizeStopped,
    SynthesizeVoice,
)

import jaxspec
from jaxspec.audio.pcm import pcm16
from jaxspec.serve.answer import Events
from jaxspec.serve.engine import Engine
from jaxspec.serve.job import Failed, Refused, Sound
from jaxspec.synthesis.contract import Settings

_IDLE_S = 600.0  # after which a connection that says nothing is closed


async def start(engine: Engine, at: socket.socket, model: str) -> asyncio.Server:
    """Serves at a socket."""
    limit = 4 * engine.limits.max_text + 2**16  # bytes of a line

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError, ValueError, KeyError, AttributeError, TypeError):
            await _Connection(engine, model, reader, writer).run()  # a message that is none ends the connection
        writer.close()

    return await asyncio.start_server(connected, sock=at, limit=limit)


class _Connection:
    def __init__(self, engine: Engine, model: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.engine, self.model, self.reader, self.writer = engine, model, reader, writer
        self.parts: list[str] | None = None  # of a text that comes in parts
        self.voice: SynthesizeVoice | None = None

    async def run(self) -> None:
        """Answers messages until the client leaves."""
        while message := await asyncio.wait_for(async_read_event(self.reader), _IDLE_S):
            await self._answer(message)

    async def _answer(self, message: Message) -> None:
        if Describe.is_type(message.type):
            await self._send(self._info())
        elif SynthesizeStart.is_type(message.type):
            self.parts, self.voice = [], SynthesizeStart.from_event(message).voice
        elif SynthesizeChunk.is_type(message.type) and self.parts is not None:
            self.parts.append(SynthesizeChunk.from_event(message).text)
            if sum(map(len, self.parts)) > self.engine.limits.max_text:
                raise ValueError
        elif SynthesizeStop.is_type(message.type) and self.parts is not None:
            text, self.parts = "".join(self.parts), None
            await self._speak(text, self.voice)
            await self._send(SynthesizeStopped())
        elif Synthesize.is_type(message.type) and self.parts is None:  # within parts it repeats the text for older servers
            asked = Synthesize.from_event(message)
            await self._speak(asked.text, asked.voice)

    def _info(self) -> Info:
        by = Attribution(name="jaxspec", url="")
        names = self.engine.synthesizer.voices or ("default",)
        common: dict[str, Any] = {"attribution": by, "installed": True, "version": jaxspec.__version__}
        voices = [TtsVoice(name=name, description=name, languages=["en"], **common) for name in names]
        program = TtsProgram(
            name="jaxspec", description=f"speech of {self.model}", voices=voices, supports_synthesize_streaming=True, **common
        )
        return Info(tts=[program])

    async def _speak(self, text: str, voice: SynthesizeVoice | None) -> None:
        name = voice.name if voice and voice.name in self.engine.synthesizer.voices else None
        events = Events(_never)
        job = None
        try:
            job = await asyncio.to_thread(self.engine.submit, text, Settings(voice=name), None, events.listen)
            await self._send_sound(events)
        except Refused as error:
            await self._send(Error(text=error.message, code=str(error.status)))
        finally:
            events.close()
            if job is not None:
                self.engine.cancel(job)

    async def _send_sound(self, events: Events) -> None:
        """The chunks; a client that has hung up is found when one is sent."""
        form: dict[str, Any] = {"rate": self.engine.synthesizer.sample_rate_hz, "width": 2, "channels": 1}
        await self._send(AudioStart(**form))
        while isinstance(event := await events.next(), Sound):
            await self._send(AudioChunk(audio=pcm16(event.wave), **form))
        if isinstance(event, Failed):
            raise event.error
        await self._send(AudioStop())

    async def _send(self, message: Any) -> None:
        await async_write_event(message.event(), self.writer)


async def _never() -> None:
    await asyncio.Event().wait()
