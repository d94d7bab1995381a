"""Wrong requests are refused with a sentence, and right ones are completed."""

import jax
import numpy as np
import pytest

from jaxspec import request
from jaxspec.sampling import Sampling

PROMPT = np.arange(12, dtype=np.int32).reshape(3, 4)
RIGHT = {
    "key": jax.random.key(0),
    "prompt": PROMPT,
    "prompt_length": [1, 4, 2],
    "max_new_tokens": 8,
    "limit": None,
    "stop_ids": (2,),
    "sampling": Sampling(),
}


def test_a_request_is_completed():
    checked = request.complete(request.check(**RIGHT | {"limit": 5}))
    assert checked.keys.shape == (3,)
    assert checked.prompt.tolist() == [[0, 0, 0, 0], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert checked.prompt_length.tolist() == [1, 4, 2]
    assert checked.limit.tolist() == [5, 5, 5]
    assert checked.stop_ids.tolist() == [[2], [2], [2]]
    assert checked.sampling.temperature.tolist() == [1, 1, 1]


def test_stop_ids_may_differ_by_row():
    assert request.check(**RIGHT | {"stop_ids": [(2,), (), [3, 1]]}).stop_ids.tolist() == [[2, -1], [-1, -1], [3, 1]]
    assert request.check(**RIGHT | {"stop_ids": ()}).stop_ids.shape == (3, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": PROMPT[0]}, r"prompt \[B P\]"),
        ({"prompt": PROMPT[:, :0]}, r"prompt \[B P\]"),
        ({"prompt": PROMPT * 0.5}, "prompt to hold integers"),
        ({"prompt": PROMPT - 9}, "prompt ids from 0 up"),
        ({"prompt_length": [1, 2]}, "prompt_length of shape"),
        ({"prompt_length": [0, 1, 2]}, "prompt_length from 1 to 4"),
        ({"prompt_length": [1, 2, 5]}, "prompt_length from 1 to 4"),
        ({"limit": 9}, "limit from 0 to 8"),
        ({"limit": [1, 2, -1]}, "limit from 0 to 8"),
        ({"limit": [1, 2]}, "limit of shape"),
        ({"limit": 1.5}, "limit to be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens of at least 1"),
        ({"max_new_tokens": 2.0}, "max_new_tokens to be a whole number"),
        ({"stop_ids": (-1,)}, "stop ids from 0 up"),
        ({"stop_ids": [(1,), (2,)]}, "each of the 3 rows"),
        ({"stop_ids": (7,), "vocab": 7}, "within the head's vocabulary, 0 to 6, got"),
        ({"stop_ids": (True,)}, "a stop id to be a whole number"),
        ({"prompt": PROMPT, "num_ids": 9}, "prompt ids below 9, got 9"),
        ({"prompt": PROMPT.astype(np.int64) + 2**32}, "prompt ids below 2147483648"),
        ({"stop_ids": ("a",)}, "a stop id to be a whole number"),
        ({"sampling": [Sampling()] * 2}, "each of the 3 rows"),
        ({"key": 0}, "expected a key"),
        ({"key": jax.numpy.zeros(3)}, "expected a key"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, "one key or 3 keys"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        request.check(**RIGHT | wrong)
