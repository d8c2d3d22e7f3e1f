"""Reading GGUF files: the metadata and the tensors of one file, or of all parts of a split one.

Every count, length and offset is held against the size of the file before it is followed, and the tensors must lie as llama.cpp
lays them: one after the other. So a file that was cut or damaged is refused here. Tensors are mapped, not read.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape

from lrserve.errors import InputError, reading, shown

_VERSIONS: Final = (2, 3)
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING: Final = 8
_ARRAY: Final = 9
_PART: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_DOWNLOAD: Final = "download it again"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file stores it: its type, its shape in torch's order, and the mapped bytes (rows, bytes of a row)."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray[Any, np.dtype[np.uint8]]

    def values(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the tensor in float32, dequantized.

        Raises:
            NotImplementedError: the package gguf cannot dequantize its type.
        """
        return dequantize(self.data, self.type)


@dataclass(frozen=True)
class GgufFile:
    """All that a GGUF file holds: its parts in order (one, if it is not split), the first part's metadata, all tensors."""

    parts: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def path(self) -> Path:
        """The file, or the first of its parts."""
        return self.parts[0]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and of the other parts if it is one of several.

    Raises:
        InputError: not GGUF, cut, damaged, or not all parts are there.
    """
    file = _read(path)
    count = file.metadata.get("split.count", 1)
    if type(count) is not int or count < 0:
        raise InputError(f"{path}: split.count is {shown(count)}; {_DOWNLOAD}")
    return file if count < 2 else _joined(path, count)


def part_stem(path: Path) -> str:
    """Return a file's name without the ending, of a part of a split file also without its number."""
    match = _PART.fullmatch(path.name)
    return match[1] if match else path.stem


def _joined(path: Path, count: int) -> GgufFile:
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise InputError(
            f"{path} is one of {count} parts, but its name is not NAME-00001-of-{count:05d}.gguf, so the others cannot be found; "
            "give the parts the names that they had"
        )
    names = [f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}" for number in range(1, count + 1)]
    if absent := [name for name in names if not path.with_name(name).is_file()]:
        raise InputError(
            f"{path} is one of {count} parts, of which {len(absent)} are missing, first {absent[0]}; download them too"
        )
    files = [_read(path.with_name(name)) for name in names]
    tensors: dict[str, GgufTensor] = {}
    for number, file in enumerate(files):
        own = file.metadata.get("split.no"), file.metadata.get("split.count")
        if own != (number, count):
            raise InputError(f"{file.path} is not part {number + 1} of {count}: it says split.no {own[0]} of {own[1]}; {_DOWNLOAD}")
        if twice := tensors.keys() & file.tensors.keys():
            raise InputError(f"{file.path} repeats {min(twice)}, which an earlier part has; {_DOWNLOAD}")
        tensors |= file.tensors
    metadata = files[0].metadata
    promised = metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise InputError(
            f"{files[0].path} promises {promised} tensors, its {count} parts hold {len(tensors)}; download all parts again"
        )
    return GgufFile(tuple(file.path for file in files), metadata, tensors)


def _read(path: Path) -> GgufFile:
    with reading(path, _DOWNLOAD):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        header = _Header(path, data)
        return GgufFile((path,), *header.read())


class _Header:
    """A position in a file's header; all reads check that the file has the bytes."""

    def __init__(self, path: Path, data: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Return the metadata and the tensors."""
        if self._take(4) != b"GGUF":
            self._refuse("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            self._refuse("it is for big-endian machines" if version & 0xFFFF == 0 else f"its version is {version}, not 2 or 3")
        tensor_count, key_count = self._number("Q"), self._number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key, kind = self._text(), self._number("I")
            if key in metadata:
                self._refuse(f"it holds {shown(key)} twice")
            metadata[key] = self._value(kind)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._refuse(f"general.alignment is {shown(alignment)}, not a power of two")
        table: dict[str, tuple[GGMLQuantizationType, tuple[int, ...], int]] = {}
        for _ in range(tensor_count):
            name = self._text()
            if name in table:
                self._refuse(f"it holds the tensor {shown(name)} twice")
            table[name] = self._entry(name)
        return metadata, self._tensors(table, alignment)

    def _entry(self, name: str) -> tuple[GGMLQuantizationType, tuple[int, ...], int]:
        dimensions = self._number("I")
        if not 1 <= dimensions <= 4:
            self._refuse(f"the tensor {shown(name)} has {dimensions} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(dimensions)]))
        if 0 in shape:
            self._refuse(f"the tensor {shown(name)} has shape {shape}")
        kind, offset = self._number("I"), self._number("Q")
        try:
            return GGMLQuantizationType(kind), shape, offset
        except ValueError:
            self._refuse(f"the tensor {shown(name)} is of type {kind}, which the package gguf does not know")

    def _tensors(
        self, table: Mapping[str, tuple[GGMLQuantizationType, tuple[int, ...], int]], alignment: int
    ) -> dict[str, GgufTensor]:
        tensors, start, expected = {}, _aligned(self._at, alignment), 0
        for name, (kind, shape, offset) in table.items():
            if offset != expected:
                self._refuse(f"the tensor {shown(name)} is said to lie at {offset}, where {expected} is its place")
            stored = quant_shape_to_byte_shape(shape, kind)
            size = math.prod(stored)
            if start + offset + size > len(self._data):
                raise InputError(
                    f"{self._path} is cut short: it has {len(self._data):,} bytes, and the tensor {shown(name)} ends at "
                    f"{start + offset + size:,}; {_DOWNLOAD}"
                )
            tensors[name] = GgufTensor(kind, shape, self._data[start + offset : start + offset + size].reshape(stored))
            expected = _aligned(offset + size, alignment)
        return tensors

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(self._code(kind))
        item, count = self._number("I"), self._number("Q")
        if item == _STRING:
            if 8 * count > self._left:
                self._refuse("it ends inside its header")
            return [self._text() for _ in range(count)]
        code = self._code(item)
        return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(code))))

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            self._refuse(f"its header holds a value of type {kind}")
        return _SCALARS[kind]

    def _text(self) -> str:
        return str(self._take(self._number("Q")), "utf-8")

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    @property
    def _left(self) -> int:
        return len(self._data) - self._at

    def _take(self, size: int) -> bytes:
        if size > self._left:
            self._refuse("it ends inside its header")
        self._at += size
        return self._data[self._at - size : self._at].tobytes()

    def _refuse(self, reason: str) -> NoReturn:
        raise InputError(f"{self._path} cannot be read as GGUF: {reason}; {_DOWNLOAD}")


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
