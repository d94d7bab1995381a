"""English text to what the built-in voice reads: words, pieces, phones, symbols."""


class TextWarning(UserWarning):
    """A part of a text cannot be spoken as it is written: it was skipped, or a word too long for the model was broken up.

    The message is one line that names the part, ``skipped "😀", which has no spoken form``. To silence it:
    ``warnings.filterwarnings("ignore", category=jaxspec.TextWarning)``.
    """
