"""The parts of the benchmark at toy size. No time is asserted."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from benchmarks import bench_merge, measure, model_files
from benchmarks.exactness import check, compare, reference
from benchmarks.floor import read_and_write
from benchmarks.jobs import ADD_FULL, Job, Outcome, Run, RunError, execute
from benchmarks.measure import Measurement
from benchmarks.report import Comparison, Result
from benchmarks.shapes import SD15, SDXL, Family, TextEncoder, UNet, Vae
from sdformats.tensor import DType

needs_preadv = pytest.mark.skipif(not hasattr(os, "preadv"), reason="the floor needs preadv")
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")


def toy_family() -> Family:
    parts = {
        "model.diffusion_model": UNet(8, (1, 2, 4, 4), (1, 1, 1, 0), 1, 24),
        "first_stage_model": Vae(4),
        "cond_stage_model": TextEncoder(24, 2, vocabulary=50),
    }
    counted = []
    for prefix, part in parts.items():
        shapes = {name: shape for name, shape in part.shapes() if not name.endswith("position_ids")}
        counted.append((prefix, part, sum(int(np.prod(shape)) for shape in shapes.values())))
    return Family("toy", "Toy", tuple(counted))


@pytest.fixture(scope="module")
def toy_files(tmp_path_factory):
    return model_files.model_files(toy_family(), tmp_path_factory.mktemp("toy"))


def parameters(specs, prefix):
    return sum(s.numel for name, s in specs.items() if name.startswith(prefix) and s.dtype is DType.F16)


def test_sd15_has_the_published_tensors():
    specs = SD15.specs()
    assert len(specs) == 1131
    assert len([name for name in specs if name.startswith("model.diffusion_model.")]) == 686
    assert len([name for name in specs if name.startswith("first_stage_model.")]) == 248
    assert parameters(specs, "model.diffusion_model.") == 859_520_964
    assert parameters(specs, "first_stage_model.") == 83_653_863
    assert parameters(specs, "cond_stage_model.") == 123_060_480
    shape_of = {name: spec.shape for name, spec in specs.items()}
    unet = "model.diffusion_model"
    assert shape_of[f"{unet}.output_blocks.2.1.conv.weight"] == (1280, 1280, 3, 3)
    assert shape_of[f"{unet}.output_blocks.8.2.conv.weight"] == (640, 640, 3, 3)
    assert shape_of[f"{unet}.input_blocks.1.1.proj_in.weight"] == (320, 320, 1, 1)
    assert shape_of[f"{unet}.output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight"] == (320, 768)
    ids = specs["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert (ids.shape, ids.dtype) == ((1, 77), DType.I64)
    assert next(iter(specs.values())) is ids  # the widest type lies first


def test_sdxl_has_the_published_tensors():
    specs = SDXL.specs()
    assert len(specs) == 2515
    assert parameters(specs, "model.diffusion_model.") == 2_567_463_684
    assert parameters(specs, "conditioner.embedders.1.") == 694_659_841
    shape_of = {name: spec.shape for name, spec in specs.items()}
    assert shape_of["model.diffusion_model.label_emb.0.0.weight"] == (1280, 2816)
    assert shape_of["model.diffusion_model.middle_block.1.proj_in.weight"] == (1280, 1280)
    assert "model.diffusion_model.middle_block.1.transformer_blocks.9.norm3.bias" in specs
    assert shape_of["conditioner.embedders.1.model.logit_scale"] == ()
    assert "model.diffusion_model.input_blocks.1.1.norm.weight" not in specs


def test_wrong_parameter_count_is_refused():
    prefix, part, count = SD15.parts[1]
    with pytest.raises(AssertionError, match="first_stage_model has 83,653,863 parameters, not 83,653,864"):
        replace(SD15, parts=((prefix, part, count + 1),)).specs()


def test_model_files_are_fine_tunes_of_one_base(toy_files):
    a, b, c = (load_file(path) for path in toy_files)
    assert {name: value.shape for name, value in a.items()} == {n: s.shape for n, s in toy_family().specs().items()}
    for name, value in a.items():
        assert np.isfinite(value).all()
        if name.startswith("first_stage_model.") or value.dtype != np.float16:
            assert np.array_equal(value, b[name])
            assert np.array_equal(value, c[name])
        elif value.size > 100:
            change = value.astype(np.float64) - b[name]
            assert 0.0005 < change.std() < 0.003
            assert not np.array_equal(b[name], c[name])
    weight = a["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    assert 0.018 < weight.std() < 0.022
    assert 0.9 < a["model.diffusion_model.out.0.weight"].mean() < 1.1


def test_model_files_are_written_once_and_mended(tmp_path):
    noise = model_files.Noise(1 << 20)
    paths = model_files.model_files(toy_family(), tmp_path, noise=noise)
    before = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    os.truncate(paths[1], 1000)
    told: list[str] = []
    model_files.model_files(toy_family(), tmp_path, noise=noise, report=told.append)
    assert len(told) == 1
    assert paths[1].name in told[0]
    assert [path.read_bytes() for path in paths] == before
    assert [path.stat().st_mtime_ns for path in (paths[0], paths[2])] == [times[0], times[2]]


@needs_preadv
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("size", [1, 4096, 100_003])
def test_floor_reads_everything_and_writes_whole_output(tmp_path, overlap, size):
    rng = np.random.default_rng(size)
    inputs = [tmp_path / name for name in "abc"]
    for path in inputs:
        path.write_bytes(rng.bytes(size))
    output = tmp_path / "out"
    read_and_write(inputs, output, threads=3, overlap=overlap, block=4096, flush_every=8192)
    assert output.read_bytes() == inputs[-1].read_bytes()  # the buffer's last content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "out"]


@needs_preadv
def test_floor_leaves_nothing_behind_when_it_fails(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        read_and_write([tmp_path / "a", tmp_path / "b"], tmp_path / "out", threads=1, overlap=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@needs_proc
def test_measure_sees_memory_that_was_freed_again():
    size = 64 << 20
    found = measure.measure(lambda: len(b"x" * size), interval=0.001)
    assert found.resident is not None
    assert 0.9 * size < found.resident < 2 * size
    assert found.anonymous is not None
    assert found.anonymous <= 2 * size
    idle = measure.measure(lambda: None)
    assert idle.resident is not None
    assert idle.resident < size / 4


def test_measure_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "missing")
    found = measure.measure(lambda: None)
    assert found.anonymous is None
    assert found.resident is None if sys.platform == "win32" else found.resident >= 0
    assert found.seconds >= 0


def test_measure_lets_errors_through():
    with pytest.raises(ZeroDivisionError):
        measure.measure(lambda: 1 / 0)


def test_touching_free_memory_leaves_nothing_behind(tmp_path, monkeypatch):
    written: list[int] = []
    monkeypatch.setattr(measure, "_free_memory", lambda: 3 << 20)
    real = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: (written.append(path.stat().st_size), real(path)))
    measure.touch_free_memory(tmp_path, 5 << 20)
    measure.touch_free_memory(tmp_path, 2 << 20)
    assert written == [3 << 20, 2 << 20]
    assert list(tmp_path.iterdir()) == []


def test_free_memory_is_read_or_unknown(monkeypatch, tmp_path):
    listing = tmp_path / "meminfo"
    monkeypatch.setattr(measure, "_MEMORY", listing)
    assert measure._free_memory() == 0
    listing.write_text("MemTotal:       1000 kB\nMemFree:         12 kB\n")
    assert measure._free_memory() == 12 << 10


def half(*values):
    return np.array(values, dtype=np.float16)


def test_compare_accepts_exact_results():
    inputs = [half(1, 0.1, -3), half(2, 0.2, 5), half(0.5, 0.3, 7)]
    for job in (ADD_FULL, Job.add_difference(0.7), Job.weighted(0.5, 0.3, 0.2)):
        assert compare(job, inputs, reference(job, inputs).astype(np.float16)) == (0, 0)


def test_compare_follows_the_formulas():
    inputs = [half(2), half(3), half(5)]
    assert reference(Job.add_difference(0.5), inputs) == [1.0]
    assert reference(Job.weighted_pair(0.25), inputs[:2]) == [2.25]
    assert reference(Job.weighted(1, 2, 3), inputs) == [23.0]


def test_compare_allows_either_neighbour_at_a_middle_only():
    low, high = half(1), np.nextafter(half(1), half(2))
    job = Job.weighted_pair(0.5)
    rounded = reference(job, [low, high]).astype(np.float16)
    other = high if rounded == low else low
    assert compare(job, [low, high], other) == (1, 0)
    assert compare(job, [low, low], high) == (1, 1)
    assert compare(job, [low, high], np.nextafter(high, half(2))) == (1, 1)
    assert compare(job, [low, high], half(np.nan)) == (1, 1)


def exact_merge(job, paths):
    models = [load_file(path) for path in paths[: job.models]]
    return {
        name: reference(job, [model[name] for model in models]).astype(np.float16)
        if value.dtype == np.float16
        else value
        for name, value in models[0].items()
    }


def test_check_finds_what_is_wrong_and_what_is_missing(toy_files, tmp_path):
    job, output = Job.weighted(0.5, 0.3, 0.2), tmp_path / "merged.safetensors"
    merged = exact_merge(job, toy_files)
    save_file(merged, output)
    found = check(job, toy_files, [output], sample=20)
    assert found.ok
    assert found.tensors == 20
    assert found.differing == 0
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    merged[ids] = merged[ids] + 1
    save_file(merged, output)
    assert check(job, toy_files, [output]).wrong == 77
    del merged[ids]
    merged["first_stage_model.quant_conv.bias"] = merged["first_stage_model.quant_conv.bias"].astype(np.float32)
    save_file(merged, output)
    found = check(job, toy_files, [output])
    assert found.missing == 2
    assert not found.ok


def test_check_reads_shards(toy_files, tmp_path):
    merged = list(exact_merge(ADD_FULL, toy_files).items())
    shards = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    save_file(dict(merged[:100]), shards[0])
    save_file(dict(merged[100:]), shards[1])
    assert check(ADD_FULL, toy_files, shards, sample=8).ok


def test_planned_runs_put_each_floor_once_before_its_merges():
    runs = bench_merge.planned_runs(bench_merge.TOOLS)
    floors = [(run.job.models, run.overlap) for run in runs if run.tool == "floor"]
    assert floors == [(3, False), (3, True), (2, False), (2, True)]
    assert [run.tool for run in runs[2:]].count("sdmerge") == 4
    assert len([run for run in runs if run.tool == "mergekit"]) == 2
    assert len(set(runs)) == len(runs)


@needs_preadv
def test_failed_run_is_told(tmp_path):
    missing = tuple(tmp_path / name for name in "abc")
    with pytest.raises(RunError, match="floor, read 3, write 1: FileNotFoundError"):
        execute(Run("floor", ADD_FULL), missing, tmp_path / "out", threads=1)


def result(tool, job, *seconds, overlap=False):
    outcomes = [Outcome(Measurement(value, 1_000_000, 2_000_000), "1") for value in seconds]
    return Result(Run(tool, job, overlap), outcomes)


def test_comparison_takes_the_better_floor_with_as_many_inputs():
    pair = Job.weighted_pair(0.3)
    results = [
        result("floor", ADD_FULL, 4.0, 2.0, 3.0),
        result("floor", ADD_FULL, 2.0, overlap=True),
        result("floor", pair, 0.1),
        result("sdmerge", ADD_FULL, 3.0),
        result("mergekit", ADD_FULL, 30.0),
        Result(Run("sd-mecha", ADD_FULL), failure="sd-mecha: no"),
    ]
    comparison = Comparison("toy", "Toy", 1, "warm", results)
    rows = comparison.to_json()["results"]
    assert [row["times_floor"] for row in rows] == [1.5, 1.0, 1.0, 1.5, 15.0, None]
    assert [row["best_times_floor"] for row in rows] == [1.0, 1.0, 1.0, 1.5, 15.0, None]
    assert [row["times_sdmerge"] for row in rows[3:]] == [1.0, 10.0, None]
    assert rows[5]["failure"] == "sd-mecha: no"
    assert comparison.table().row_count == 6


@needs_preadv
def test_command_measures_and_writes_json(monkeypatch, tmp_path, toy_files):
    monkeypatch.setattr(bench_merge, "FAMILIES", {"toy": toy_family()})
    numbers = tmp_path / "numbers.json"
    options = ["--tool", "floor", "--rounds", "2", "--threads", "2", "--page-cache", "warm"]
    paths = ["--cache", str(toy_files[0].parent), "--json", str(numbers)]
    outcome = CliRunner().invoke(bench_merge.main, [*options, *paths])
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(numbers.read_text())
    assert document["threads"] == 2
    rows = document["families"][0]["results"]
    assert [len(row["seconds"]) for row in rows] == [2, 2, 2, 2]
    assert min(row["times_floor"] for row in rows[:2]) == 1.0
    assert str(tmp_path) not in numbers.read_text()
    assert not (toy_files[0].parent / "output").exists()


@needs_preadv
def test_command_measures_sdmerge_and_finds_it_exact(monkeypatch, tmp_path, toy_files):
    monkeypatch.setattr(bench_merge, "FAMILIES", {"toy": toy_family()})
    monkeypatch.setattr(bench_merge, "JOBS", (Job.add_difference(0.7),))
    numbers = tmp_path / "numbers.json"
    options = ["--tool", "sdmerge", "--rounds", "1", "--check", "--threads", "2"]
    paths = ["--cache", str(toy_files[0].parent), "--json", str(numbers)]
    outcome = CliRunner().invoke(bench_merge.main, [*options, *paths])
    assert outcome.exit_code == 0, outcome.output
    (row,) = json.loads(numbers.read_text())["families"][0]["results"]
    assert len(row["seconds"]) == 1
    assert row["exactness"]["elements"] > 1000
    assert row["exactness"]["wrong"] == row["exactness"]["missing"] == 0


@pytest.mark.parametrize("state", ["warm", "as-is", "cold"])
def test_page_cache_states_leave_files_alone(tmp_path, state):
    if state == "cold" and not hasattr(os, "posix_fadvise"):
        pytest.skip("no posix_fadvise here")
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    bench_merge.prepare_page_cache([path], state)
    assert path.read_bytes() == b"abc"
