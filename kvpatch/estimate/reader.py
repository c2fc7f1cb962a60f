"""Opening GGUF files: metadata, tensors, all parts of a split model. Reads no tensor data."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

from kvpatch.errors import guard
from kvpatch.estimate.errors import EstimateError

_MAGIC = b"GGUF"
_PART = re.compile(r"^(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")
_NO_MODEL = {
    "adapter": "a LoRA adapter, which is loaded beside a model",
    "mmproj": "a multimodal projector, which is loaded beside a model",
    "imatrix": "an importance matrix for quantising",
}
# What numpy, struct and the reader itself raise for a file that ends early or holds nonsense.
_BROKEN = (
    ValueError,
    IndexError,
    KeyError,
    OverflowError,
    TypeError,
    AttributeError,
    struct.error,
    MemoryError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A tensor of the file. `shape` is ggml's: the row's elements first. `part` counts from 0; `nbytes` without
    padding; `offset` from the start of its file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    nbytes: int
    part: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufModel:
    """Metadata of the first part and the tensors of all. Keys of `metadata` whose values are long (the tokenizer's) are
    left out."""

    paths: tuple[Path, ...]
    arch: str
    tensors: tuple[Tensor, ...]
    metadata: dict[str, Any] = field(repr=False)

    @property
    def file_bytes(self) -> int:
        """Bytes of all parts on disk."""
        return sum(path.stat().st_size for path in self.paths)

    def has_tensor(self, name: str) -> bool:
        return any(tensor.name == name for tensor in self.tensors)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key of this architecture, "attention.head_count"; None if it is not there."""
        return self.metadata.get(f"{self.arch}.{key}", default)

    def need(self, key: str) -> Any:
        """As `get`; an EstimateError if it is not there, since llama.cpp would not load the file either."""
        value = self.get(key)
        if value is None:
            raise EstimateError(
                f"{self.paths[0]} has no key {self.arch}.{key}, which this architecture needs"
            )
        return value


class _Reader(GGUFReader):
    """The package's reader without an object for each of a vocabulary's words: seconds less for 262,144 of them."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
        element = None
        if raw_type == GGUFValueType.ARRAY and self.byte_order == "I":
            element = GGUFValueType(self._get(orig_offs, np.uint32)[0])
        scalar = None if element is None else self.gguf_scalar_to_np.get(element)
        if scalar is None and element != GGUFValueType.STRING:
            whole: tuple[int, list[Any], list[int], list[Any]] = super()._get_field_parts(orig_offs, raw_type)
            return whole
        begin = orig_offs + 12
        count = int(self._get(orig_offs + 4, np.uint64)[0])
        if scalar is not None:
            values = self._get(begin, scalar, count)
            if len(values) != count:
                raise ValueError(f"an array of {count} ends with the file")
            return 12 + int(values.nbytes), [values], [0], [GGUFValueType.ARRAY, element]
        at, end, view = begin, len(self.data), self.data.data
        for _ in range(count):
            if at + 8 > end:
                raise ValueError(f"an array of {count} texts ends with the file")
            at += 8 + int.from_bytes(view[at : at + 8], "little")
        return at - orig_offs, [], [], [GGUFValueType.ARRAY, element]


def read(path: Path | str) -> GgufModel:
    """Open a model; for a split one name its first part. EstimateError, or SourceError if it cannot be read."""
    first = Path(path)
    reader = _open(first)
    metadata = _metadata(reader)
    arch = _check_kind(first, metadata)
    paths = _parts(first, metadata)
    tensors: list[Tensor] = []
    for number, part in enumerate(paths):
        at = reader if number == 0 else _open(part)
        if number:
            _check_part(part, number, len(paths), _metadata(at))
        tensors += _tensors(at, number)
    _check_tensors(first, tensors, metadata)
    return GgufModel(paths=paths, arch=arch, tensors=tuple(tensors), metadata=metadata)


def _open(path: Path) -> _Reader:
    if path.is_dir():
        raise EstimateError(f"{path} is a folder", hint="name the .gguf file in it")
    with guard("open the model", path), path.open("rb") as file:
        magic = file.read(4)
    if magic != _MAGIC:
        raise EstimateError(f"{path} is no GGUF file: it starts with {magic!r}")
    try:
        return _Reader(path)
    except OSError:
        with guard("read the model", path):
            raise
    except _BROKEN as error:
        if "GGMLQuantizationType" in str(error):
            number = re.search(r"\d+(?=\D* is not)", str(error).replace("uint32", ""))
            raise EstimateError(
                f"{path} has a tensor of a type that is not known here: {number[0] if number else error}",
                hint="pip install --upgrade gguf",
            ) from error
        raise EstimateError(
            f"{path} is cut off or damaged: {error}", hint="download it again and compare its size"
        ) from error


def _metadata(reader: _Reader) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in reader.fields.items():
        if not value.types or key.startswith("GGUF."):
            continue
        if value.types[0] == GGUFValueType.ARRAY:
            if key.startswith("tokenizer.") or GGUFValueType.STRING in value.types:
                continue
            values[key] = tuple(v for i in value.data for v in value.parts[i].tolist())
        elif value.types[0] == GGUFValueType.STRING:
            values[key] = bytes(value.parts[value.data[0]]).decode("utf-8", errors="replace")
        else:
            values[key] = value.parts[value.data[0]][0].item()
    return values


def _check_kind(path: Path, metadata: dict[str, Any]) -> str:
    kind = metadata.get("general.type", "model")
    arch = metadata.get("general.architecture")
    if kind in _NO_MODEL:
        raise EstimateError(f"{path} is {_NO_MODEL[kind]}, no model")
    if arch == "clip":
        raise EstimateError(f"{path} is {_NO_MODEL['mmproj']}, no model")
    if not isinstance(arch, str) or not arch:
        raise EstimateError(f"{path} does not say of which architecture it is (general.architecture)")
    return arch


def _parts(first: Path, metadata: dict[str, Any]) -> tuple[Path, ...]:
    count, number = metadata.get("split.count", 0), metadata.get("split.no", 0)
    if count <= 1:
        return (first,)
    named = _PART.match(first.name)
    if number != 0:
        begin = f"{named['stem']}-00001-of-{count:05d}.gguf" if named else "the first part"
        raise EstimateError(f"{first} is part {number + 1} of {count}", hint=f"name the first part: {begin}")
    if not named or int(named["count"]) != count or int(named["no"]) != 1:
        raise EstimateError(
            f"{first} is the first of {count} parts but is not called so",
            hint=f"llama.cpp finds the others by names like MODEL-00001-of-{count:05d}.gguf",
        )
    paths = tuple(first.with_name(f"{named['stem']}-{n + 1:05d}-of-{count:05d}.gguf") for n in range(count))
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise EstimateError(
            f"{first} is the first of {count} parts, and of the others are missing: {', '.join(missing)}",
            hint=f"put all {count} parts into {first.parent}",
        )
    return paths


def _check_part(path: Path, number: int, count: int, metadata: dict[str, Any]) -> None:
    says = (metadata.get("split.no"), metadata.get("split.count"))
    if says != (number, count):
        raise EstimateError(
            f"{path} is no part {number + 1} of {count}: it says split.no, split.count = {says}"
        )


def _tensors(reader: _Reader, part: int) -> Iterable[Tensor]:
    for tensor in reader.tensors:
        yield Tensor(
            name=tensor.name,
            kind=tensor.tensor_type,
            shape=tuple(int(n) for n in tensor.shape),
            nbytes=int(tensor.n_bytes),
            part=part,
            offset=int(tensor.data_offset),
        )


def _check_tensors(path: Path, tensors: list[Tensor], metadata: dict[str, Any]) -> None:
    if not tensors:
        raise EstimateError(f"{path} has no tensors: it holds a vocabulary only")
    expected = metadata.get("split.tensors.count")
    if metadata.get("split.count", 0) > 1 and expected is not None and expected != len(tensors):
        raise EstimateError(f"the parts of {path} hold {len(tensors)} tensors of {expected}")
    names = [tensor.name for tensor in tensors]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) != len(names) else []
    if twice:
        raise EstimateError(f"{path} holds {twice[0]} more than once")
