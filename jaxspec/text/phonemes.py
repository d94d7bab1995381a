"""Text to phonemes by espeak, for models that read them."""

import functools
from typing import Any


@functools.lru_cache
def _backend(language: str) -> Any:
    try:
        import espeakng_loader
        from phonemizer.backend import EspeakBackend
        from phonemizer.backend.espeak.wrapper import EspeakWrapper
    except ImportError as error:
        raise ImportError(
            f"expected {error.name}, which this model needs to read phonemes, got none: pip install 'jaxspec[phonemes]'"
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
