"""Files that appear whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpatch import paths


def test_text_and_bytes_with_their_folder(tmp_path: Path) -> None:
    paths.write_whole(tmp_path / "a" / "b" / "text", "é\udcff\r\n")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "é".encode() + b"\xff\r\n"
    paths.write_whole(tmp_path / "a" / "b" / "text", b"\0\xff")
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["text"]
    assert (tmp_path / "a" / "b" / "text").read_bytes() == b"\0\xff"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths.write_whole(tmp_path / "file", "old")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[:1])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        paths.write_whole(tmp_path / "file", "new")
    assert {p.name: p.read_text(encoding="utf-8") for p in tmp_path.iterdir()} == {"file": "old"}
