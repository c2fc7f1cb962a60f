"""The loaded library: ABI first, then calls whose failures become exceptions."""

from __future__ import annotations

import ctypes
import dataclasses
import operator
import os
import sys
from abc import ABC, abstractmethod
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

from kvpatch import library
from kvpatch.errors import KvpatchError, LibraryError, UsageError
from kvpatch.runtime.structures import ABI, PROTOTYPES, UINT64_MAX

C = TypeVar("C", bound="Closing")
T = TypeVar("T")
E = TypeVar("E", bound=IntEnum)

INT_MAX = 2**31 - 1
UINT32_MAX = 2**32 - 1

_HINTS = {
    "KVCACHED_E_LIMIT": "raise the limit, or let others trim or sleep",
    "KVCACHED_E_FULL": "end processes that have a slot, or use another ledger",
    "KVCACHED_E_BUSY": "try again when the process is idle",
    "KVCACHED_E_TIMEOUT": "the process may be stopped or hang: try again, or look at it",
    "KVCACHED_E_HOST_LIMIT": "raise the host limit, or free memory of sleeping processes",
}


class CallError(LibraryError):
    """A call of the library failed. `name` is the error's (KVCACHED_E_LIMIT), `sentence` what it means, `detail` what
    this call ran into; a function that tells no error number leaves the first two empty."""

    def __init__(self, action: str, name: str, sentence: str, detail: str) -> None:
        known = f"{name}: {sentence}" if name else "failed"
        super().__init__(
            f"cannot {action}: {known}" + (f" ({detail})" if detail else ""),
            hint=_HINTS.get(name),
            data={"error": name, "sentence": sentence, "detail": detail},
        )
        self.name = name
        self.sentence = sentence
        self.detail = detail
        _note_hint(self)


class Closing(ABC):
    """What is closed at the end of a `with` block."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()


class Library:
    """libkvcached in this process. One file is loaded once, however many objects there are; it stays loaded."""

    def __init__(self, path: Path) -> None:
        """Load the file. Raises LibraryError when the system refuses it or its ABI is not the one of this module."""
        self.path = path
        try:
            dll = ctypes.CDLL(str(path.absolute()), mode=os.RTLD_NOW | os.RTLD_LOCAL)
            abi_version = dll.kvcached_abi_version
        except (OSError, AttributeError) as error:
            raise library.load_failure(path, str(error)) from error
        abi_version.restype, abi_version.argtypes = PROTOTYPES["abi_version"]
        # Before anything else is even looked up: a library of another ABI need not have the rest.
        if abi_version() != ABI:
            raise library.load_failure(path, f"its ABI is {abi_version()}, this kvpatch needs {ABI}")
        self._functions: dict[str, Any] = {}
        for name, (result, arguments) in PROTOTYPES.items():
            try:
                function = dll[f"kvcached_{name}"]
            except AttributeError as error:
                raise library.load_failure(path, str(error)) from error
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        version: bytes = self.raw("version")
        self.version = version.decode()

    def raw(self, function: str, *arguments: Any) -> Any:
        """Call kvcached_<function>; its result as it is."""
        return self._functions[function](*arguments)

    def call(self, action: str, function: str, *arguments: Any) -> None:
        """Call a function that returns an error number. Raises CallError, saying that `action` cannot be done."""
        error: int = self.raw(function, *arguments)
        if error != 0:
            raise self.failure(action, error)

    def failure(self, action: str, error: int | None) -> CallError:
        """What the call before, on this thread, ran into; `error` is None where it told no number."""
        # The detail is the thread's own, and nothing of ours runs in between: ctypes changes no thread.
        detail = _text(self.raw("last_error"))
        if error is None:
            return CallError(action, "", "", detail)
        return CallError(
            action, _text(self.raw("err_name", error)), _text(self.raw("strerror", error)), detail
        )


def load(
    build: str | os.PathLike[str] | None = None, *, cache: str | os.PathLike[str] | None = None
) -> Library:
    """The library of a build, else the one in the cache, compiled on first use. Errors as `library.find`, and
    LibraryError when it cannot be loaded."""
    try:
        return Library(
            library.find(None if build is None else Path(build), cache=None if cache is None else Path(cache))
        )
    except KvpatchError as error:
        _note_hint(error)
        raise


def number(what: str, value: int, most: int = UINT64_MAX, *, least: int = 0) -> int:
    """A number as the library takes it. Raises UsageError for what is no integer, or does not fit and would be cut."""
    try:
        exact = operator.index(value)
    except TypeError:
        raise UsageError(f"{what} {value!r} is not an integer") from None
    if not least <= exact <= most:
        raise UsageError(f"{what} {exact} is not between {least} and {most}")
    return exact


def limit_number(what: str, value: int | None) -> int:
    """A limit as the library takes it: None is no limit. Errors as `number`."""
    return UINT64_MAX if value is None else number(what, value)


def member(what: str, enum: type[E], value: E | int | str) -> E:
    """A member of `enum`, given as itself, its number or its name in any case. Raises UsageError for anything else."""
    try:
        return enum[value.upper()] if isinstance(value, str) else enum(value)
    except (KeyError, ValueError):
        names = ", ".join(f"{known.name.lower()} ({known.value})" for known in enum)
        raise UsageError(f"{what} {value!r} is none of {names}") from None


def text(what: str, value: str | os.PathLike[str] | None) -> bytes | None:
    """A string as C takes it. Raises UsageError for what is none, or has a zero byte, where C would cut it."""
    if value is None:
        return None
    try:
        raw = os.fsencode(value)
    except TypeError:
        raise UsageError(f"{what} {value!r} is not a string") from None
    if b"\0" in raw:
        raise UsageError(f"{what} {value!r} has a zero byte")
    return raw


def frozen(cls: type[T], struct: ctypes.Structure, **convert: Any) -> T:
    """A dataclass from the fields of a structure that have the same names.

    Arrays become tuples, text is decoded. `convert` maps a field to the function its value goes through.
    """
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = getattr(struct, field.name)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, ctypes.Array):
            value = tuple(value)
        values[field.name] = convert[field.name](value) if field.name in convert else value
    return cls(**values)


def limit_or_none(value: int) -> int | None:
    """UINT64_MAX in a field of limits means that there is none."""
    return None if value == UINT64_MAX else value


def _note_hint(error: KvpatchError) -> None:
    """Have a traceback show the hint too, where Python can."""
    if error.hint and sys.version_info >= (3, 11):
        error.add_note(f"hint: {error.hint}")


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")
