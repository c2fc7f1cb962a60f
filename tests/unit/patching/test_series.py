from __future__ import annotations

import pytest
from patched_upstream import Upstream, insert_after

from kvpatch.errors import PatchError
from kvpatch.patching import PatchFormatError, check_matches, load_series


def add(upstream: Upstream, name: str, function: str = "alpha", range_: str = ">=0.1") -> None:
    line = f"hook_{function}_{name.partition('@')[0][:4]}();"
    edit = insert_after(f"    {function}_lock(s);", f"    {line}")
    upstream.make_patch(name, {"src/store.c": edit}, [("src/store.c", line)], range_=range_)


def names(upstream: Upstream, target: str) -> list[str]:
    return [patch.name for patch in load_series(upstream.series).select(target)]


def test_selection(c_upstream: Upstream) -> None:
    add(c_upstream, "0001-a", range_=">=0.30")
    add(c_upstream, "0001-a@0.20", range_=">=0.20,<0.30")
    add(c_upstream, "0001-a@0.32.15", range_="==0.32.15")
    add(c_upstream, "0002-b", "beta", ">=0.25")
    assert names(c_upstream, "v0.31.0") == ["0001-a.patch", "0002-b.patch"]
    assert names(c_upstream, "0.32.15") == ["0001-a@0.32.15.patch", "0002-b.patch"]
    assert names(c_upstream, "0.22.0") == ["0001-a@0.20.patch"]
    assert names(c_upstream, "0.1.0") == []


def test_selection_by_day(c_upstream: Upstream) -> None:
    add(c_upstream, "0001-a@2026-04", range_=">=2026-04-01,<2026-08-01")
    add(c_upstream, "0001-a", range_=">=2026-08-01")
    assert names(c_upstream, "2026-08-13") == ["0001-a.patch"]
    assert names(c_upstream, "2026-07-31") == ["0001-a@2026-04.patch"]
    with pytest.raises(PatchFormatError, match="on a date"):
        names(c_upstream, "0.32.15")
    with pytest.raises(PatchFormatError, match="neither a version nor a day"):
        names(c_upstream, "b10488")


def test_every_finding_of_a_directory(c_upstream: Upstream) -> None:
    add(c_upstream, "0001-a", range_=">=0.30")
    add(c_upstream, "0001-a@0.20", range_=">=0.20,<=0.30")
    add(c_upstream, "0002-b", "beta", ">=2026-01-01")
    c_upstream.list("0003-gone.patch")
    (c_upstream.series / "0004-unlisted.patch").write_bytes(b"")
    with (c_upstream.series / "series").open("a", encoding="utf-8") as series:
        series.write("0001-a.patch  # again\n")
    with pytest.raises(PatchFormatError) as caught:
        load_series(c_upstream.series)
    assert isinstance(caught.value, PatchError)
    assert caught.value.exit_code == 5
    found = {(finding.file, finding.code) for finding in caught.value.findings}
    assert found == {
        ("series", "missing"),
        ("series", "series"),
        ("0004-unlisted.patch", "unlisted"),
        ("0001-a@0.20.patch", "overlap"),
        ("0002-b.patch", "range-kind"),
    }
    assert len(caught.value.data["findings"]) == 5
    assert "0003-gone.patch is not in" in caught.value.message


def test_no_series(c_upstream: Upstream) -> None:
    with pytest.raises(PatchFormatError, match="no usable series"):
        load_series(c_upstream.series)
    (c_upstream.series / "series").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(PatchFormatError, match="lists no patch"):
        load_series(c_upstream.series)


def test_patch_that_matches_no_release(c_upstream: Upstream) -> None:
    add(c_upstream, "0001-a", range_=">=0.30")
    add(c_upstream, "0002-b", "beta", ">=0.40")
    add(c_upstream, "0003-c", "gamma", "==0.30.0")
    series = load_series(c_upstream.series)
    check_matches(series, ["v0.30.0", "v0.41.0"])
    with pytest.raises(PatchFormatError) as caught:
        check_matches(series, ["v0.31.0", "v0.32.0"])
    assert [finding.file for finding in caught.value.findings] == ["0002-b.patch", "0003-c.patch"]


def test_identity_depends_on_content_and_order(c_upstream: Upstream) -> None:
    add(c_upstream, "0001-a")
    add(c_upstream, "0002-b", "beta")
    first = load_series(c_upstream.series).sha256
    assert load_series(c_upstream.series).sha256 == first
    (c_upstream.series / "series").write_text("0002-b.patch\n0001-a.patch\n", encoding="utf-8")
    assert load_series(c_upstream.series).sha256 != first
