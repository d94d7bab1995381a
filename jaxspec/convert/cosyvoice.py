"""CosyVoice's language models: ``llm.pt`` with separate tables, or merged into the vocabulary of one Qwen 2."""

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxspec.checkpoint.tensors import Tensor, rows
from jaxspec.convert import llama
from jaxspec.convert.source import read_json
from jaxspec.models import card, cosyvoice
from jaxspec.models.cosyvoice import Version

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MERGED_CODES = "<|s_{}|>"
BACKBONE = "CosyVoice-BlankEN"  # the folder of the tokenizer and of the backbone's config.json
_PREFIX = "llm.model."


def version_of(tensors: dict[str, Tensor], tokenizer: "Tokenizer | None") -> Version | None:
    """The CosyVoice version of a checkpoint; None for any other checkpoint."""
    if "llm_decoder.weight" in tensors:
        return cosyvoice.V2 if "llm_embedding.weight" in tensors else cosyvoice.V3
    if tokenizer is not None and tokenizer.token_to_id("<|task_id|>") is not None:
        return cosyvoice.V2 if tokenizer.token_to_id("<|eos3|>") is not None else cosyvoice.V3
    return None


def separate(tensors: dict[str, Tensor], version: Version) -> tuple[dict[str, Tensor], list[str]]:
    """Renames the tensors of ``llm.pt``.

    Args:
        tensors: by name, as in the file.
        version: which CosyVoice.

    Returns:
        The tensors under the backbone's names, with table_0, table_1 ..., head and head_bias; and the names that are left out.
    """
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_PREFIX)}
    rest = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    dropped = [_PREFIX + llama.HEAD] if rest.pop(llama.HEAD, None) else []  # the backbone's own, which has no codes
    tables = [own.pop("speech_embedding.weight", None), own.pop("llm_embedding.weight", None), rest.pop(llama.EMBED, None)]
    if not version.markers:
        del tables[1]
    head = {"head": own.pop("llm_decoder.weight", None), "head_bias": own.pop("llm_decoder.bias", None)}
    found = {f"table_{i}": table for i, table in enumerate(tables)} | head
    return rest | own | {name: tensor for name, tensor in found.items() if tensor is not None}, dropped


def unmerge(
    tensors: dict[str, Tensor], notes: list[str], version: Version, tokenizer: "Tokenizer"
) -> tuple[dict[str, Tensor], list[str]]:
    """Cuts the tables of codes and the head out of one merged vocabulary.

    Args:
        tensors: by name, as in the file.
        notes: gets a line where the copy has lost the bias of its head.
        version: which CosyVoice.
        tokenizer: of the merged checkpoint.

    Returns:
        The tensors with table_0, table_1 ..., head and head_bias; and what is left out.

    Raises:
        ValueError: the embedding or the head has too few rows.
    """
    first, _ = card.code_ids(tokenizer, MERGED_CODES)
    embed, head = llama.tie(tensors, {"tie_word_embeddings": False}, notes)
    assert head is not None  # as they are not tied
    bias = tensors.pop("lm_head.bias", None)
    last = first + version.rows + version.markers
    if embed.shape[0] < last or head.shape[0] < first + version.rows:
        raise ValueError(
            f"expected {last} rows in {embed.name} and {head.name}, got {embed.shape[0]} and {head.shape[0]}: "
            "use the checkpoint's own tokenizer"
        )
    codes, markers = rows(embed, first, first + version.rows), rows(embed, first + version.rows, last)
    tables = [codes, *([markers] if version.markers else []), rows(embed, 0, first)]
    found = {f"table_{i}": table for i, table in enumerate(tables)} | {"head": rows(head, first, first + version.rows)}
    if bias is not None:
        found["head_bias"] = rows(bias, first, first + version.rows)
    elif version.head_bias:
        notes.append("lm_head.bias is missing, which the original has: this copy samples from other probs than the original")
    return tensors | found, [f"rows from {last} of {embed.name}", f"rows of text and from {last} of {head.name}"]


def first_merged_code(folder: Path) -> int:
    """The merged vocabulary's id of code 0, for a converted folder of either layout.

    Raises:
        ValueError: the tokenizer is missing or damaged.
    """
    made = card.tokenizer_of(folder)
    found = made.token_to_id(MERGED_CODES.format(0))
    return made.get_vocab_size() if found is None else found  # a merged vocabulary adds the codes after the text


def backbone(folder: Path) -> dict[str, Any]:
    """The config.json of the backbone beside ``llm.pt``; that of Qwen2-0.5B where there is none."""
    path = folder / BACKBONE / "config.json"
    return read_json(path) if path.exists() else llama.QWEN2


def tokenizer(folder: Path, version: Version) -> "Tokenizer":
    """The tokenizer of ``llm.pt``: that of Qwen 2 with the tokens that this version adds, in their order.

    Args:
        folder: of ``llm.pt``.
        version: which CosyVoice.

    Raises:
        ValueError: vocab.json or merges.txt is missing or damaged.
    """
    import tokenizers

    vocab, merges = (folder / BACKBONE / name for name in ("vocab.json", "merges.txt"))
    try:
        made = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"expected Qwen 2's tokenizer in {vocab} and {merges}, got {error}: download both") from error
    made.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    made.decoder = tokenizers.decoders.ByteLevel()
    added = resources.files("jaxspec.models").joinpath("cosyvoice_tokens.txt").read_text(encoding="utf-8").split()
    added = added[: added.index("<|endofsystem|>")] if version is cosyvoice.V2 else added
    made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in added])
    return made


# How Qwen 2 splits a text into words before byte pairs are merged.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
