"""llama.cpp out of a source distribution: from a file, and through pip without a network."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from pathlib import Path

import pytest

from kvpatch.sources import LLAMA_CPP, OLLAMA, Pin, Store, sdist
from kvpatch.sources.errors import (
    CorruptArchiveError,
    NetworkError,
    PinMismatchError,
    SpecError,
    UnknownRefError,
    UnsafeArchiveError,
)

from .conftest import git, times

COMMIT = "4df29be4f4c3673f428170fda944a5b19f743bb8"
BACKEND = """
import pathlib
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    pathlib.Path({witness!r}).write_text("code of the distribution ran")
    name = "llama_cpp_python-{version}.dist-info"
    made = pathlib.Path(directory) / name
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {version}\\n")
    return name
def build_wheel(*args, **kwargs):
    raise SystemExit("never built")
"""


def distribution(
    folder: Path, version: str = "0.3.35", witness: Path = Path("/dev/null"), **more: bytes
) -> Path:
    """A source distribution with its own build backend, so that pip needs nothing else."""
    top = f"llama_cpp_python-{version}"
    files = {
        "PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n".encode(),
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n',
        "own.py": BACKEND.format(witness=str(witness), version=version).encode(),
        "llama_cpp/__init__.py": b"",
        "vendor/llama.cpp/CMakeLists.txt": b"project(x)\r\n",
        "vendor/llama.cpp/.gitignore": b"*.gguf\n",
        "vendor/llama.cpp/models/vocab.gguf": b"GGUF",
        "vendor/llama.cpp/vendor/llama.cpp/odd.txt": b"a folder of the same name inside",
        "vendor/llama.cpp/.git": b"gitdir: ../../.git/modules/vendor/llama.cpp",
        "vendor/llama.cpp.txt": b"no part",
        ".git/modules/vendor/llama.cpp/HEAD": b"ref: x",
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{top}.tar.gz"
    with tarfile.open(path, "w:gz") as made:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return path


def pin(path: Path, ref: str = "0.3.35") -> Pin:
    return Pin(
        ref=ref, commit=COMMIT, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), date="2026-08-16"
    )


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds packages in this folder and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT", "PIP_REQUIRE_HASHES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_from_a_file(store: Store, tmp_path: Path) -> None:
    path = distribution(tmp_path)
    resolved = store.resolve(LLAMA_CPP, f"sdist:{path}", pin(path))
    assert (resolved.kind, resolved.ref, resolved.commit, resolved.date) == (
        "sdist",
        "0.3.35",
        COMMIT,
        "2026-08-16",
    )
    assert resolved.verified
    tree = store.materialize(resolved, tmp_path / "tree")
    assert set(times(tree.path)) == {
        "CMakeLists.txt",
        ".gitignore",
        "models/vocab.gguf",
        "vendor/llama.cpp/odd.txt",
    }
    assert (tree.path / "CMakeLists.txt").read_bytes() == b"project(x)\r\n"
    assert (tree.upstream_commit, tree.missing) == (COMMIT, ())
    assert git(tree.path, "status", "--porcelain", "--ignored") == ""
    assert git(tree.path, "log", "-1", "--format=%ct") == "1786838400"  # 2026-08-16
    assert store.tags(LLAMA_CPP, f"sdist:{path}") == ()
    assert store.fetch_commit(tree, tree.base_commit)
    assert not store.fetch_commit(tree, COMMIT)


def test_through_pip(pip: Path, store: Store, tmp_path: Path) -> None:
    path = distribution(pip)
    distribution(pip, "0.3.34")
    said: list[str] = []
    resolved = store.resolve(LLAMA_CPP, "sdist", pin(path), progress=said.append)
    assert resolved.location.startswith(str(store.root))
    assert any("with pip" in line for line in said)
    assert "CMakeLists.txt" in times(store.materialize(resolved, tmp_path / "tree").path)
    assert not list((store.root / "incoming").iterdir())
    path.unlink()
    assert (
        store.resolve(LLAMA_CPP, "sdist:0.3.35", pin(Path(resolved.location))) == resolved
    )  # out of the cache
    # a damaged file in the cache is noticed and fetched again
    Path(resolved.location).write_bytes(b"damaged")
    good = distribution(pip)
    assert store.resolve(LLAMA_CPP, "sdist", pin(good)).verified


def test_unpinned_version(pip: Path, store: Store) -> None:
    distribution(pip, "0.3.34")
    resolved = store.resolve(LLAMA_CPP, "sdist:0.3.34", Pin(ref="0.3.34"))
    assert (resolved.ref, resolved.commit, resolved.verified) == ("0.3.34", "", False)


def test_other_file_than_the_pin_runs_nothing(pip: Path, store: Store, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = distribution(pip, witness=witness)
    wrong = Pin(ref="0.3.35", commit=COMMIT, sha256="a" * 64)
    with pytest.raises(PinMismatchError) as caught:
        store.resolve(LLAMA_CPP, "sdist", wrong)
    assert "a" * 64 in str(caught.value)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in str(caught.value)
    assert not witness.exists()  # pip compared before it asked the distribution for anything
    assert not list((store.root / "sdists").glob("*")) if (store.root / "sdists").exists() else True
    with pytest.raises(PinMismatchError, match="aaaa"):
        store.resolve(LLAMA_CPP, f"sdist:{path}", wrong)


def test_unknown_version(pip: Path, store: Store) -> None:
    distribution(pip, "0.3.34")
    distribution(pip, "0.3.33")
    with pytest.raises(
        UnknownRefError, match=r"no llama\.cpp 0\.3\.99: it has 2 versions; nearest: 0\.3\.34, 0\.3\.33"
    ):
        store.resolve(LLAMA_CPP, "sdist:0.3.99", Pin(ref="0.3.99"))


def test_nothing_at_all(pip: Path, store: Store) -> None:
    with pytest.raises(UnknownRefError, match="no versions at all"):
        store.resolve(LLAMA_CPP, "sdist", Pin(ref="0.3.35"))


def test_no_network(pip: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(NetworkError) as caught:
        store.resolve(LLAMA_CPP, "sdist", Pin(ref="0.3.35"))
    assert "--llama-cpp-source" in (caught.value.hint or "")


def test_python_without_pip(pip: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(SpecError, match="has no pip") as caught:
        store.resolve(LLAMA_CPP, "sdist", Pin(ref="0.3.35"))
    assert "ensurepip" in (caught.value.hint or "")


def test_version_other_than_pinned(pip: Path, store: Store) -> None:
    with pytest.raises(PinMismatchError, match=r"0\.3\.30 was asked for, but the pin is 0\.3\.35"):
        store.resolve(LLAMA_CPP, "sdist:0.3.30", Pin(ref="0.3.35", sha256="a" * 64))


@pytest.mark.parametrize("spec", ["sdist:", "sdist:latest please", "sdist:b10488"])
def test_no_version(spec: str, store: Store) -> None:
    with pytest.raises(SpecError):
        store.resolve(LLAMA_CPP, spec, Pin(ref="b10488"))


def test_wrong_project_or_file(store: Store, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="not of ollama"):
        store.resolve(OLLAMA, "sdist", Pin(ref="v1"))
    with pytest.raises(SpecError, match="no file"):
        store.resolve(LLAMA_CPP, f"sdist:{tmp_path}/none.tar.gz", Pin(ref="0.3.35"))
    path = tmp_path / "llama_cpp_python-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as made:
        made.addfile(tarfile.TarInfo("llama_cpp_python-0.1.0/setup.py"))
    with pytest.raises(CorruptArchiveError, match="no files of the wanted source"):
        store.materialize(store.resolve(LLAMA_CPP, f"sdist:{path}", Pin(ref="0.1.0")), tmp_path / "tree")


def test_hostile_distribution(store: Store, tmp_path: Path) -> None:
    path = distribution(tmp_path, **{"vendor/llama.cpp/../../../../evil": b"x"})
    with pytest.raises(UnsafeArchiveError, match="climbs out"):
        store.materialize(store.resolve(LLAMA_CPP, f"sdist:{path}", pin(path)), tmp_path / "room/tree")
    assert not (tmp_path / "evil").exists()


def test_whole_file_is_the_default_for_the_real_project() -> None:
    assert (sdist.PROJECT, sdist.FOLDER) == ("llama-cpp-python", "vendor/llama.cpp")
