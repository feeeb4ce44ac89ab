"""The benchmarks: they refuse wrong kernels, agree with quadratic formulas, and write what they measured."""

from __future__ import annotations

import dataclasses
import importlib
import json
import platform
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("timm")

import families
from typer.testing import CliRunner

from flatten_ext import reference
from flatten_ext.output import write_json
from flatten_ext.tools.bench import (
    ablation,
    alternatives,
    charts,
    end_to_end,
    mixers,
    quality,
    report,
    stages,
    tables,
    timing,
    trainings,
)
from flatten_ext.tools.bench import eager as bench_eager
from flatten_ext.tools.bench.check import CheckFailed, check_focused, relative_error
from flatten_ext.tools.bench.families import FAMILIES, FamilyMixer
from flatten_ext.tools.bench.formulas import eager_attention, make_inputs
from flatten_ext.tools.bench.results import Results
from flatten_ext.tools.bench.shapes import QUICK_STAGES, STAGES, Shape, token_ladder
from flatten_ext.tools.cli import build_app
from flatten_ext.tools.micro.images import load_mnist
from flatten_ext.tools.micro.training import Budget

CPU = torch.device("cpu")
SMALL = Shape("small", 2, (4, 6), 32, 2, window=2)


@pytest.fixture
def compare(monkeypatch):
    """benchmarks/compare.py: a script beside the package."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("compare")


@pytest.fixture
def evidence(monkeypatch):
    """benchmarks/evidence.py, likewise."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("evidence")


def test_the_eager_baseline_is_the_formula():
    inputs = make_inputs(SMALL, CPU).to(torch.float64)
    arguments = (*inputs.qkv, SMALL.heads, *inputs.tensors[3:], SMALL.size)
    torch.testing.assert_close(eager_attention(*arguments), reference.attention(*arguments))


def test_a_wrong_kernel_is_not_timed():
    inputs = make_inputs(SMALL, CPU)

    def off_by_little(*arguments):
        return reference.attention(*arguments) * 1.001

    def wrong_gradient(q, *arguments):
        return reference.attention(q.detach() + (q - q.detach()) * 1.001, *arguments)

    check_focused("reference", reference.attention, inputs, SMALL)
    with pytest.raises(CheckFailed, match=r"bad: output has relative error 1.0e-03"):
        check_focused("bad", off_by_little, inputs, SMALL)
    with pytest.raises(CheckFailed, match=r"bad: gradient of q"):
        check_focused("bad", wrong_gradient, inputs, SMALL)
    with pytest.raises(CheckFailed, match="flatten: output"):
        list(stages.run_stages([SMALL], CPU, compiled=False, seconds=0, op=off_by_little))


def test_nan_is_an_infinite_error():
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


@pytest.mark.parametrize("name", [n for n in alternatives.ALTERNATIVES if n not in alternatives.GPU_ONLY])
def test_every_alternative_agrees_with_its_quadratic_formula(name):
    mixer = alternatives.ALTERNATIVES[name]
    if mixer is mixers.Performer:
        pytest.importorskip("performer_pytorch")
    if mixer is mixers.Linformer:
        pytest.importorskip("linformer")
    alternatives.check(name, SMALL, CPU)


def test_what_cannot_run_is_named_and_stops_nothing(monkeypatch):
    class Wrong(mixers.Softmax):
        def forward(self, q, k, v):
            return super().forward(q, k, v) + 1

    monkeypatch.setitem(alternatives.ALTERNATIVES, "softmax", Wrong)
    good, reasons = alternatives.runnable(CPU, ["flatten", "softmax", "Hydra", "NATTEN"])
    assert good == ["flatten", "Hydra"]
    assert "failed its check" in reasons["softmax"]
    assert reasons["NATTEN"] == "has GPU kernels only"
    monkeypatch.setitem(alternatives.ALTERNATIVES, "flatten", Wrong)
    with pytest.raises(CheckFailed):
        alternatives.runnable(CPU, ["flatten"])


def test_shapes_are_those_of_the_published_models():
    assert [(s.tokens, s.channels, s.heads) for s in STAGES if s.name.startswith("Swin-T")] == [
        (3136, 96, 3),
        (784, 192, 6),
        (196, 384, 12),
        (49, 768, 24),
    ]
    assert STAGES[0].flops == 8 * 3136 * (4 * 96 * 32 + 2 * 25 * 96)
    assert [shape.tokens for shape in token_ladder(6, 9)] == [64, 128, 256, 512]


def results_of(*rows) -> Results:
    """A record of (tokens, contender, milliseconds) rows."""
    found = [
        stages.Measurement("tokens", str(n), n, name, mode, 1, timing.Timing(ms, ms, ms, 5), n * 1024)
        for n, name, ms in rows
        for mode in stages.MODES
    ]
    return Results(stages.record(found, {1: 100.0}, CPU, "wall"))


def test_crossover_lies_where_the_lines_meet():
    line = [(n, "flatten", n * 1.0) for n in (64, 256, 1024)]
    quadratic = [(n, "softmax", n * n / 256) for n in (64, 256, 1024)]
    results = results_of(*line, *quadratic, *((n, "Hydra", n * 2.0) for n in (64, 256)))
    where = charts.crossover(results, "tokens", "softmax", stages.MODES[0], 1)
    assert where == pytest.approx(256)
    assert charts.crossover(results, "tokens", "Hydra", stages.MODES[0], 1) is None
    assert results.interpolate("tokens", "flatten", stages.MODES[0], 1, 128) == pytest.approx(128)
    table = tables.tokens_table(results, 1, {"flatten": "ours", "softmax": "softmax", "Hydra": "Hydra"})
    assert [row[-2] for row in table.rows] == ["", "256 tokens", "every size"]
    assert table.rows[2][3] == "-"


def test_compare_flags_slow_downs_beyond_noise(tmp_path, capsys, compare):
    def write(name, **times):
        record = results_of().record
        for contender, (low, median, high) in times.items():
            ms = {"median": median, "low": low, "high": high, "rounds": 9}
            identity = {
                "suite": "stages",
                "shape": contender,
                "contender": "flatten",
                "mode": "forward",
                "threads": 1,
            }
            record["measurements"].append({**identity, "ms": ms})
        (tmp_path / name).write_text(json.dumps(record))
        return str(tmp_path / name)

    before = write("a.json", same=(9, 10, 11), noisy=(5, 10, 20), slow=(9, 10, 11), fast=(9, 10, 11))
    after = write("b.json", same=(9, 10.5, 11), noisy=(15, 18, 30), slow=(12, 13, 14), fast=(4, 5, 6))
    assert compare.main([before, after]) == 1
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if "flatten" in line}
    assert [line.split()[-1] for line in lines.values()] == ["1.05", "1.80", "slower", "faster"]
    assert compare.main([before, before]) == 0
    assert compare.main([before, after, "--threshold", "0.5"]) == 0

    other = json.loads(Path(after).read_text())
    other["machine"]["cpu"] = "an abacus"
    Path(after).write_text(json.dumps(other))
    assert compare.main([before, after]) == 2
    assert "abacus" in capsys.readouterr().err
    assert compare.main([before, after, "--force"]) == 1
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(SystemExit):
        compare.main([before, str(tmp_path / "c.json")])


def test_goals_are_measured_and_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    goals = importlib.import_module("cpu_goals")
    least, most = (goals.Goal(1, "x", 2.0, sense, 2.0) for sense in (">=", "<="))
    assert (least.met, dataclasses.replace(least, figure=1.9).met) == (True, False)
    assert (most.met, dataclasses.replace(most, figure=2.1).met) == (True, False)
    assert dataclasses.replace(least, figure=None).met is None
    almost = dataclasses.replace(least, figure=1.9996)
    assert (least.row()[1], almost.row()[1], almost.row()[3]) == ("2", "1.9996", "NOT MET")

    output = tmp_path / "goals.json"
    assert goals.main(["--quick", "--output", str(output)]) == 0
    assert "of torch.mm's rate" in capsys.readouterr().out
    record = json.loads(output.read_text())
    assert {goal["number"] for goal in record["goals"]} == set(range(1, 9))
    for goal in record["goals"]:
        assert goal["figure"] is None or goal["figure"] >= 0, goal
    timed = Results.read(output)
    assert set(timed.contenders("stages")) >= {"mm", "flatten", "flatten bf16", "eager", "softmax"}
    assert timed.thread_counts("threads") == [1, 2]
    for suite in ("long maps", "long maps, memory kept"):
        assert timed.shapes(suite) == ["2^6", "2^7", "2^8"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_memory_is_kept_where_long_maps_ask_for_it(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    time_ladder = importlib.import_module("long_maps").time_ladder
    own_process = importlib.import_module("own_process")

    def measured(environment):
        return own_process.in_process(time_ladder, 17, 17, 1, 0.01, "wall", environment=environment)

    kept, fresh = measured(own_process.KEPT), measured({})
    for mode in stages.MODES:
        assert kept[mode]["faults"] < 8 <= fresh[mode]["faults"]  # one or more for every 2 of 32 MiB
        assert list(kept[mode]["times"]) == ["2^17"]
        assert 0 < fresh[mode]["zeroing"] < 1000


def test_saved_bytes_are_those_of_what_is_kept(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    goals = importlib.import_module("cpu_goals")
    inputs = make_inputs(SMALL, CPU)

    def keeps_two(q, k, *others):
        return (q * 2).exp() + k.relu()  # the outputs of exp and relu; q * 2 needs nothing

    assert goals.saved_bytes(keeps_two, inputs, SMALL) == 2 * inputs.q.nbytes


def test_analysis_sees_rank_and_entropy():
    torch.manual_seed(0)
    images = torch.randn(2, 1, 28, 28)

    def facts(variant):
        def attention(*arguments):
            return ablation.MixerAttention(*arguments, mixer=ablation.VARIANTS[variant])

        return ablation.analyse(ablation.MODELS["DeiT-like"](attention), images)[0]

    assert facts("Hydra")["attention_rank"] == pytest.approx(1)  # an outer product by construction
    linear = facts("ReLU linear + DWC")
    assert (
        linear["attention_rank"] <= 16 < linear["rank"] <= 49
    )  # head_dim bounds the one, the DWC lifts the other
    assert facts("DWC alone")["entropy"] is None
    assert (
        facts("focused p=8")["entropy"]
        < facts("focused p=2")["entropy"]
        < facts("ReLU linear (p=1)")["entropy"]
    )


@pytest.mark.parametrize("model", ablation.MODELS)
def test_an_ablation_run_is_written_and_resumed(tmp_path, model):
    budget = Budget(epochs=1, train_images=64, test_images=50, evaluations=1)
    todo = [trainings.Task(model, "focused p=3 + DWC", seed) for seed in range(2)]
    assert trainings.pending(todo, tmp_path, budget) == todo
    result = ablation.run(model, "focused p=3 + DWC", 0, load_mnist(), budget)
    write_json(todo[0].path(tmp_path), result)
    assert trainings.pending(todo, tmp_path, budget) == todo[1:]
    assert trainings.pending(todo, tmp_path, dataclasses.replace(budget, epochs=2)) == todo
    todo[1].path(tmp_path).write_text("{")
    with pytest.raises(ValueError, match=f"{todo[1].path(tmp_path).name} is not the result of a training"):
        trainings.pending(todo, tmp_path, budget)
    todo[1].path(tmp_path).unlink()
    summary = quality.summarise(trainings.collect(todo, tmp_path, budget), budget)
    assert summary["variants"][0]["accuracy_mean"] == result["accuracy"]
    assert summary["variants"][0]["accuracy_deviation"] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_without_its_local_term_is_attention_alone(family):
    torch.manual_seed(0)
    mixer = FamilyMixer(16, 2, (4, 4), family).double()
    q, k, v = torch.randn(3, 1, 16, 16, dtype=torch.float64)
    more = {"source": torch.randn(1, 16, 16, dtype=torch.float64)} if mixer.reads_input else {}
    assert not torch.allclose(mixer.alone()(q, k, v, **more), mixer(q, k, v, **more))
    # Weights that sum to 1 give values back that are the same for all tokens, at the map's edges too.
    same = v[:, :1].expand_as(v)
    out = mixer.alone()(q, k, same, **more)
    if family in ("InLine", "PolaFormer"):
        torch.testing.assert_close(out, same, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixer.alone()(q, k, 2 * v, **more), 2 * mixer.alone()(q, k, v, **more))


def test_quick_bench_writes_json_markdown_and_svg(tmp_path, compare):
    arguments = ["bench", "--quick", "--threads", "1", "--output", str(tmp_path)]
    result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 0, result.output
    assert "geometric mean" in result.output
    results = Results.read(tmp_path / "stages.json")
    assert results.shapes("stages") == [shape.name for shape in QUICK_STAGES]
    assert results.contenders("stages") == ["flatten", "eager", "softmax"]
    assert [results.tokens("tokens", shape) for shape in results.shapes("tokens")] == [64, 128, 256]
    for name in ("headline", "stages", "stages-tokens"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
    assert "| geometric mean |" in (tmp_path / "stages.md").read_text()
    assert compare.main([str(tmp_path / "stages.json")] * 2) == 0


def test_alternatives_and_tokens_are_written(tmp_path):
    for suite in ("alternatives", "tokens"):
        arguments = ["bench", "--quick", "--suite", suite, "--threads", "1", "--output", str(tmp_path)]
        result = CliRunner().invoke(build_app(), arguments)
        assert result.exit_code == 0, result.output
    text = (tmp_path / "alternatives.md").read_text()
    assert "Milliseconds, forward," in text
    assert "Milliseconds, forward+backward," in text
    rows = [line for line in text.splitlines() if line.startswith("| neighborhood attention")]
    assert [row.count("not measured") for row in rows] == [3, 3]  # two shapes and the GPU
    text = (tmp_path / "tokens.md").read_text()
    assert "| 64 | 128 | 256 | flatten faster from | GPU, 256 |" in text
    assert "MiB at the peak" in text
    for name in ("tokens", "memory"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")


def test_a_gpu_record_fills_the_gpu_column():
    rows = [(n, name, 4.0) for n in (64, 256) for name in ("flatten", "softmax")]
    results, labels = results_of(*rows), {"flatten": "ours", "softmax": "softmax"}
    assert [row[-1] for row in tables.tokens_table(results, 1, labels).rows] == ["not measured"] * 2
    with_gpu = tables.tokens_table(results, 1, labels, results_of((256, "flatten", 0.25)))
    assert [row[-1] for row in with_gpu.rows] == ["0.25", "-"]


def test_the_pages_show_the_records(evidence, capsys):
    assert evidence.main(["--check"]) == 0, capsys.readouterr().out
    page = "<!-- quality -->\nold\n<!-- end -->\n<!-- nothing -->\n<!-- end -->"
    shown = evidence.rendered(page)
    assert "old" not in shown
    assert shown.count("| focused p=3 + DWC |") == 2
    assert "(images/quality.svg)" in shown
    assert "*Not measured.*" in shown
    assert evidence.rendered(shown) == shown


def test_models_are_timed_end_to_end(tmp_path):
    arguments = ["bench", "--suite", "end-to-end", "--quick", "--cpu-time", "--output", str(tmp_path)]
    with timing.threads(2):  # by processor time one thread is timed
        result = CliRunner().invoke(build_app(), arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "end-to-end.json").read_text())
    assert (record["machine"]["threads"], record["clock"]) == (1, "cpu")
    assert "processor time" in (tmp_path / "end-to-end.md").read_text()
    (table,) = report.tables_of("end-to-end", record)
    assert [row[0] for row in table.rows] == ["flatten_pvt_v2_b0"]
    assert all(float(cell) > 0 for cell in table.rows[0][1:])


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("flatten_swin_tiny", {"window_size": (8, 4, 2, 2), "img_size": 64}),  # windows and shifts
        ("flatten_cswin_tiny", {"la_split_sizes": (4, 2, None, None), "img_size": 64}),  # LePE, stripes
        ("flatten_pvt_tiny", {"la_sr_ratios": (8, 4, 2, 1), "img_size": 64}),  # reduced keys
    ],
)
def test_the_eager_models_are_the_models(monkeypatch, model, options):
    timm = importlib.import_module("timm")
    torch.manual_seed(0)
    ours = timm.create_model(model, **options).eval()
    for name, parameter in ours.named_parameters():
        if name.endswith((".scale", ".positional_encoding")):
            torch.nn.init.normal_(parameter, std=0.5)
    eager = end_to_end.attending(ours, bench_eager.EAGER)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(eager(x), ours(x), rtol=1e-4, atol=1e-5)
        called = []
        monkeypatch.setattr(bench_eager, "eager_formula", lambda *a: called.append(1) or a[0])
        eager(x)
    assert called


@pytest.mark.parametrize("family", [name for name in families.ALL if name not in families.SMALL])
def test_the_eager_form_of_every_family_is_the_model(family):
    torch.manual_seed(0)
    ours = families.small(family, img_size=64).eval()
    for name, parameter in ours.named_parameters():
        if name.endswith((".scale", ".positional_encoding", ".power")):
            torch.nn.init.normal_(parameter, std=0.5)
    eager = end_to_end.attending(ours, bench_eager.EAGER)
    assert any("attend" in vars(module) for module in eager.modules())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(eager(x), ours(x), rtol=1e-4, atol=1e-5)


def test_the_roofline_and_the_models_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "mm_rate", lambda device: 100.0)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 10.0)
    for suite in ("roofline", "models"):
        arguments = ["bench", "--quick", "--suite", suite, "--threads", "1", "--output", str(tmp_path)]
        result = CliRunner().invoke(build_app(), arguments)
        assert result.exit_code == 0, result.output
        assert (tmp_path / f"{suite}.svg").read_text().startswith("<?xml")
    points = json.loads((tmp_path / "roofline.json").read_text())["roofline"]
    assert points[0]["intensity"] == pytest.approx(
        (4 * 32 + 2 * 25) / 16
    )  # per channel: 4D + 2k^2 over 16 bytes
    rows = json.loads((tmp_path / "models.json").read_text())["models"]
    assert [row["model"] for row in rows] == ["flatten_deit_tiny", "deit_tiny_patch16_224"]
    # 12 blocks exchange N^2 products for N D and the taps; the rest of the two models is the same.
    assert 1 < rows[0]["flops"] / rows[1]["flops"] < 1.1
