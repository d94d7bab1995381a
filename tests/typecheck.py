"""The run-time type checker of the tests, as the import hook of jaxtyping takes it."""

from beartype import BeartypeConf, beartype

# These take anything and refuse what is wrong in a sentence of their own, which has its tests.
BORDERS = {"Sampling.__init__", "Sampling._check_real", "Sampling._check_whole", "rows", "tolerance", "check_beta"}
BORDERS |= {"acoustic_similarity_groups", "_directions", "_singletons", "block_tolerance"}
BORDERS |= {"generate", "autoregressive", "check_request"}

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as PEP 484 says


def checked(function):
    """The function with its annotations checked at each call, unless it is a border."""
    return function if function.__qualname__ in BORDERS else _checked(function)
