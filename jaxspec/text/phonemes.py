"""Text to phonemes by espeak, for models that read them."""

import functools
from typing import Protocol


class _Backend(Protocol):
    def phonemize(self, text: list[str]) -> list[str]: ...


@functools.lru_cache
def _backend(language: str) -> _Backend:
    try:
        import espeakng_loader
        from phonemizer.backend import EspeakBackend
        from phonemizer.backend.espeak.wrapper import EspeakWrapper
    except ImportError as error:
        package = (error.name or "phonemizer").split(".")[0]
        raise ImportError(
            f"expected {package}, as this model reads phonemes, got none: pip install 'jaxspec[phonemes]'"
        ) from error
    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    return EspeakBackend(language, preserve_punctuation=True, with_stress=True)


def of(text: str, language: str) -> str:
    """The phonemes of a text, with stress and punctuation, words one space apart.

    Args:
        text: any text in the language.
        language: as espeak names it, such as ``en-us``.

    Returns:
        IPA characters.

    Raises:
        ImportError: the packages of the extra ``phonemes`` are missing.
    """
    return " ".join(_backend(language).phonemize([text])[0].split())
