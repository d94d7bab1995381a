"""Converted checkpoints by name, for the tests of commands."""

import dataclasses

import checkpoints
import pytest

from jaxspec.checkpoint import pretrained
from jaxspec.checkpoint.descriptions import DraftDescription
from jaxspec.common import records
from jaxspec.models import builtin as voices
from jaxspec.synthesis.builtin import builtin
from jaxspec.synthesis.load import builtin_target

FOLDERS = {
    "llasa": ("llasa", {}),
    "target": ("llasa", {"head": "speech"}),  # which says codes and nothing else
    "draft": ("llasa", {"head": "speech", "layers": (1, 2)}),
    "padded": ("llasa", {"head": "speech", "pad_to": 16}),
    "neutts-air": ("neutts-air", {}),
    "orpheus": ("orpheus-in-frames", {}),
    "cosyvoice2": ("cosyvoice2", {}),
    "cosyvoice3": ("cosyvoice3", {}),
    "xcodec2": ("xcodec2", {}),
    "neucodec": ("neucodec", {}),
    "snac": ("snac", {}),
    "bare": ("snac", {"encoder": False}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The path of a converted checkpoint by its name, made once."""
    made, root = {}, tmp_path_factory.mktemp("checkpoints")

    def get(name):
        if name not in made:
            made[name] = checkpoints.converted(root, FOLDERS[name][0], **FOLDERS[name][1])
        return made[name]

    return get


def voice_draft(folder):
    """Saves the built-in voice's own draft as one that was trained for it; returns its folder."""
    voice = builtin()
    target = builtin_target(voice.target_params)
    description = dataclasses.replace(records.from_json(DraftDescription, voices.load().draft), target=target.model.digest)
    pretrained.save(folder, description, voice.drafter.params)
    return folder
