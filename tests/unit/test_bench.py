"""The parts of the server benchmarks that need no server: figures, bounds, models, what counts as a step that maps."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from kvpatch import smoke
from kvpatch.bench import cells, device, models, overhead, plot, servers
from kvpatch.bench.figures import Report, Summary, number, percentile
from kvpatch.errors import UsageError, VerifyError
from kvpatch.smoke.models import vocabulary, word_ids


def test_summary_and_percentiles() -> None:
    found = Summary.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.low, found.high, found.n) == (3.0, 2.0, 4.0, 5)
    assert Summary.of([7.0, 1.0]).low == 1.0
    with pytest.raises(ValueError, match="nothing"):
        Summary.of([])
    ranked = list(range(1, 1001))
    assert [percentile(ranked, p) for p in (50, 99, 99.9, 100)] == [500, 990, 999, 1000]
    assert percentile([3.0], 99.9) == 3.0


def test_ratio_is_of_stock_and_bounds_say_which_way(tmp_path: Path) -> None:
    report = Report(kind="overhead", facts={"device": "x"})
    row = report.row("decode", "batch 1", "tokens/s", {"stock": [100.0], "off": [101.0], "on": [98.0]})
    assert row is not None
    assert row.ratio == {"off": 1.01, "on": 0.98}
    assert report.row("decode", "nothing", "ms", {"stock": []}) is None
    with pytest.raises(VerifyError, match="measured nothing"):
        report.require()
    report.at_least("decode", row.ratio["on"], 0.97, "ratio")
    report.require()
    report.at_most("late", 2.0, 1.0, "ms")
    with pytest.raises(VerifyError, match="late: 2 ms, at most 1 ms") as caught:
        report.require()
    assert caught.value.exit_code == 9
    report.write(tmp_path)
    saved = json.loads((tmp_path / "overhead.json").read_text(encoding="utf-8"))
    assert saved["bounds_missed"] == 1
    assert [bound["holds"] for bound in saved["bounds"]] == [True, False]


def test_numbers_are_readable() -> None:
    assert number(5 << 20, "bytes") == "5.0 MiB"
    assert number(0.98765, "ratio") == "0.9877"
    assert number(10632.4, "tokens/s") == "10,632 tokens/s"
    assert number(3.0441, "ms") == "3.044 ms"


def test_steps_are_told_apart_by_where_their_cell_is() -> None:
    steps = overhead._Steps()
    steps.add(1000, [float(n) for n in range(400)], lambda cell: cell % 1024 == 0)
    assert steps.maps == [24.0]  # cell 1024
    assert steps.reads_more == [280.0]  # cell 1280
    assert len(steps.all) == 400


def test_sides_take_turns_in_every_order() -> None:
    orders = [tuple(overhead.in_turn("abc", number)) for number in range(6)]
    assert len(set(orders)) == 6
    assert overhead.in_turn("abc", 6) == list("abc")


def _setup(path: Path, device_: Any) -> servers.Setup:
    install = smoke.Install(root=path, kind="llama.cpp", llama_server=path / "llama-server", ollama=None)
    return servers.Setup(
        stock=install, patched=install, model=models.Model(path=path), device=device_, work=path.parent
    )


def test_which_cells_map_is_what_estimate_says(tmp_path: Path) -> None:
    made = models.ensure(tmp_path, models.TINY)
    setup = _setup(made.path, device.Cpu())
    # A row of K or V has 2 x 64 half floats, so a page of 128 KiB holds 512 cells: 8 tensors.
    growth = cells.growth(setup, context=4096, page=128 << 10)
    assert list(growth.boundaries()) == [512, 1024, 1536, 2048, 2560, 3072, 3584]
    assert growth.maps(512)
    assert not growth.maps(256)
    assert not growth.maps(513)
    assert growth.mapped(300).mapped == 8 * 128 << 10
    assert growth.mapped(300).ahead == 8 * 128 << 10
    assert growth.mapped(200).ahead == 0


def test_of_a_model_that_estimate_refuses_no_cell_is_said_to_map(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    writer: Any = gguf.GGUFWriter(path, "unheard-of")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    setup = _setup(path, device.Cpu())
    report = Report(kind="overhead", facts={})
    plan = overhead.SHORT
    pages: Any = _Pages()
    maps, places = overhead._places(report, setup, plan, [pages])
    assert not any(maps(place) for place in places)
    assert places[0] == 256
    assert [cells.UNJUDGED in note for note in report.notes] == [True]


class _Pages:
    """A client as far as it is asked for its pages."""

    def page_bytes(self) -> int:
        return 4096


def test_a_model_is_the_same_for_its_seed_alone_and_its_weights_have_no_mean(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.gguf", "b.gguf", "c.gguf")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        models.write(path, models.TINY, seed)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes() != paths[2].read_bytes()
    reader: Any = gguf.GGUFReader(paths[0])
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    values = {
        name: gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        for name in ("blk.0.ffn_up.weight", "blk.1.ffn_up.weight", "output.weight")
    }
    up = values["blk.0.ffn_up.weight"]
    assert up.shape == (models.TINY.ff, models.TINY.embd)
    # 2 / sqrt(columns), as the model is scaled; the mean of so many values is nearly zero.
    assert float(np.std(up)) == pytest.approx(2.0 / np.sqrt(models.TINY.embd), rel=0.02)
    assert abs(float(np.mean(up))) < 0.02 * float(np.std(up))
    assert len({row.tobytes() for row in up}) == models.TINY.ff
    assert not np.array_equal(up, values["blk.1.ffn_up.weight"])
    words = word_ids()
    spoken = np.any(values["output.weight"] != 0, axis=1)
    assert list(np.flatnonzero(spoken)) == list(words)
    assert models.TINY.vocab > len(vocabulary()[0])


def test_models_are_kept_and_shapes_are_named(tmp_path: Path) -> None:
    made = models.ensure(tmp_path, models.TINY)
    before = made.path.stat().st_mtime_ns
    assert models.ensure(tmp_path, models.TINY).path.stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == [made.path.name]
    with pytest.raises(UsageError, match="9b"):
        models.shape_named("9b")


def _build(folder: Path, *, patched: bool, commit: str = "a" * 40) -> Path:
    binaries = folder / "bin"
    binaries.mkdir(parents=True)
    (binaries / "llama-server").touch(mode=0o755)
    if patched:
        (binaries / "libkvcached.so").touch()
    facts = {
        "schema": 1,
        "label": "llama.cpp-x",
        "series": "s",
        "stock": not patched,
        "upstream_commits": {"llama.cpp": commit},
        "artifacts": [],
    }
    (folder / "kvpatch.json").write_text(json.dumps(facts), encoding="utf-8")
    return folder


def test_only_builds_of_one_llama_cpp_are_compared(tmp_path: Path) -> None:
    stock = _build(tmp_path / "stock", patched=False)
    patched = _build(tmp_path / "patched", patched=True)
    other = _build(tmp_path / "other", patched=True, commit="b" * 40)
    _, _, facts = servers.installs(stock, patched)
    assert facts["stock"]["llama.cpp"] == "a" * 40
    assert "same_commit" not in facts
    with pytest.raises(UsageError, match=r"two llama\.cpp"):
        servers.installs(stock, other)
    with pytest.raises(UsageError, match="is a patched build"):
        servers.installs(patched, patched)
    with pytest.raises(UsageError, match="is a stock build"):
        servers.installs(stock, stock)
    (patched / "kvpatch.json").unlink()
    assert "not known" in servers.installs(stock, patched)[2]["same_commit"]


def test_without_matplotlib_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(kind="idle", facts={})
    assert plot.draw(report, tmp_path) is None
    assert report.notes == []
    report.row("time", "wake", "ms", {"on": [1.0, 2.0]}, draw=True)
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert plot.draw(report, tmp_path) is None
    assert report.notes == ["no plot: matplotlib is not installed (pip install 'kvpatch[bench]')"]


def test_a_plot_has_every_figure_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = Report(kind="idle", facts={"device": "a card"})
    report.row("time", "wake", "ms", {"stock": [3.0], "on": [1.0, 2.0, 1.5]}, draw=True)
    report.row("memory", "asleep", "bytes", {"on": [1 << 20]}, draw=True)
    path = plot.draw(report, tmp_path)
    assert path is not None
    assert path.read_text(encoding="utf-8").lstrip().startswith("<?xml")
