"""Validates the vocabulary files of a tokenizer, without the tokenizer's library.

If vocabulary files are missing, transformers builds a tokenizer that has only special tokens, without an error. It
would encode every prompt as unknown tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckpointError
from common.json_file import is_listed, read_bytes, read_json

TOKENIZER_FILE = "tokenizer.json"

VOCABULARY_FILES: Mapping[str, tuple[str, ...]] = {
    "CLIPTokenizer": ("vocab.json", "merges.txt"),
    "GemmaTokenizer": (),
    "PixtralProcessor": (),
    "Qwen2Tokenizer": ("vocab.json", "merges.txt"),
    "T5Tokenizer": ("spiece.model",),
}
"""Files from which a tokenizer is built without tokenizer.json, by class name without `Fast`.

Classes without such files require tokenizer.json. PixtralProcessor is listed because the fleet uses only its tokenizer.
"""

# Exceeds the total number of base tokens (256 in byte-level BPE, 512 in CLIP's BPE) and special tokens.
_MOST_TOKENS_WITHOUT_MERGE = 1024


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary: its file, and its size, the highest token id plus 1."""

    file: Path
    size: int


def has_vocabulary(class_name: str) -> bool:
    """Return whether read_vocabulary() supports tokenizers of this class."""
    return class_name.removesuffix("Fast") in VOCABULARY_FILES


def read_vocabulary(folder: Path, class_name: str) -> Vocabulary | None:
    """Return the vocabulary in a tokenizer's directory; None for a class not in VOCABULARY_FILES.

    Raises CheckpointError with the file for a missing, empty or incomplete vocabulary.
    """
    if not has_vocabulary(class_name):
        return None
    names = VOCABULARY_FILES[class_name.removesuffix("Fast")]
    if is_listed(folder / TOKENIZER_FILE):
        return _read_tokenizer_json(folder / TOKENIZER_FILE)
    if not names:
        raise CheckpointError(f"{folder} lacks {TOKENIZER_FILE}, which {class_name} is built from; download it again")
    if absent := [name for name in names if not is_listed(folder / name)]:
        raise CheckpointError(
            f"{folder} lacks {' and '.join(absent)}: {class_name} is built from {TOKENIZER_FILE}, "
            f"or from {' and '.join(names)}; download the files again"
        )
    if names == ("spiece.model",):
        return _read_sentencepiece(folder / "spiece.model")
    return _read_vocab_and_merges(folder / "vocab.json", folder / "merges.txt")


def _read_tokenizer_json(path: Path) -> Vocabulary:
    content = read_json(path)
    model, added = content.get("model"), content.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(added, list):
        raise CheckpointError(f"{path} lacks model or added_tokens, so it contains no vocabulary; download it again")
    match model.get("vocab"):
        case dict() as vocab:
            ids = _ids(path, vocab)
        case [*pieces]:
            vocab, ids = _by_piece(path, pieces), set(range(len(pieces)))
        case _:
            raise CheckpointError(f"{path} lacks model.vocab, so it contains no vocabulary; download it again")
    special = _added(path, added)
    _check_pieces(path, vocab.keys() - special.keys())
    if model.get("type") == "BPE":
        merges = model.get("merges")
        _check_merges(path, merges if isinstance(merges, list) else [], vocab)
    return Vocabulary(path, max(ids | set(special.values())) + 1)


def _read_vocab_and_merges(path: Path, merges: Path) -> Vocabulary:
    vocab = read_json(path)
    ids = _ids(path, vocab)
    _check_pieces(path, vocab)
    lines = read_bytes(merges).decode(errors="replace").split("\n")
    _check_merges(merges, [line.rstrip("\r") for line in lines if line and not line.startswith("#version")], vocab)
    return Vocabulary(path, max(ids) + 1)


def _read_sentencepiece(path: Path) -> Vocabulary:
    pieces = sum(1 for number, wire_type in _fields(path, read_bytes(path)) if (number, wire_type) == (1, 2))
    _check_pieces(path, range(pieces))
    return Vocabulary(path, pieces)


def _ids(path: Path, vocab: Mapping[str, Any]) -> set[int]:
    if wrong := [token for token, number in vocab.items() if type(number) is not int or number < 0]:
        raise CheckpointError(f"{path}: token {wrong[0]!r} has the id {vocab[wrong[0]]!r}; ids are whole numbers")
    return set(vocab.values())


def _by_piece(path: Path, pieces: list[Any]) -> dict[str, int]:
    vocab: dict[str, int] = {}
    for number, entry in enumerate(pieces):
        match entry:
            case [str() as piece, int() | float()]:
                vocab[piece] = number
            case _:
                raise CheckpointError(f"{path}: entry {number} of model.vocab: {entry!r} is not [piece, score]")
    return vocab


def _added(path: Path, tokens: list[Any]) -> dict[str, int]:
    added: dict[str, int] = {}
    for entry in tokens:
        match entry:
            case {"content": str() as content, "id": int() as number}:
                added[content] = number
            case _:
                raise CheckpointError(f"{path}: an entry of added_tokens lacks content or id: {entry!r}")
    return added


def _check_pieces(path: Path, pieces: Iterable[object]) -> None:
    if not any(True for _ in pieces):
        raise CheckpointError(f"{path} contains no vocabulary besides special tokens; download it again")


def _check_merges(path: Path, merges: Sequence[Any], vocab: Mapping[str, int]) -> None:
    """Raise CheckpointError unless each BPE merge produces a token and the vocabulary has enough merges."""
    for merge in merges:
        match merge.split(" ") if isinstance(merge, str) else merge:
            case [str() as left, str() as right] if left + right in vocab:
                continue
        raise CheckpointError(f"{path}: merge {merge!r} produces no token of the vocabulary; download it again")
    if not merges or len(vocab) - len(merges) > _MOST_TOKENS_WITHOUT_MERGE:
        raise CheckpointError(
            f"{path} holds {len(merges)} merges, too few for a vocabulary of {len(vocab)} tokens; download it again"
        )


def _fields(path: Path, data: bytes) -> Iterator[tuple[int, int]]:
    """Yield number and wire type of each top-level field of a serialized sentencepiece ModelProto."""
    position = 0
    while position < len(data):
        key, position = _varint(path, data, position)
        yield key >> 3, key & 7
        match key & 7:
            case 0:
                _, position = _varint(path, data, position)
            case 1:
                position += 8
            case 2:
                length, position = _varint(path, data, position)
                position += length
            case 5:
                position += 4
            case _:
                raise _not_sentencepiece(path)
    if position != len(data):
        raise _not_sentencepiece(path)


def _varint(path: Path, data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    raise _not_sentencepiece(path)


def _not_sentencepiece(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is not a complete sentencepiece model; download it again")
