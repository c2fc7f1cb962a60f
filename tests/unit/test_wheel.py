"""An installed kvpatch has everything that a checkout has: patches, templates, Go and C sources."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def test_the_wheel_carries_the_data(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=REPO,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for top in ("patches", "templates", "go_shim", "vmm"):
        tracked = subprocess.run(
            ["git", "ls-files", "-z", "--", top], cwd=REPO, check=True, capture_output=True, text=True
        ).stdout.split("\0")
        wanted = {f"kvpatch/data/{name}" for name in tracked if name}
        assert wanted
        assert wanted <= names
    assert "kvpatch/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
