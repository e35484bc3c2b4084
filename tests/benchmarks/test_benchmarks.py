"""Each benchmark runs at toy size, and what it reports is right; no time is judged."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cases, claims, clock, gpu, machine, memory, products, recurrent, report, scaling, squares, steps
from benchmarks.__main__ import main
from benchmarks.case import Work
from benchmarks.methods import closure
from hfopt import GaussNewton

CPU = torch.device("cpu")


NAMES = ["autoencoder", "mrnn", "lstm", "gru", "cnn", "transformer"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_method_that_is_possible_agrees_with_float64(name: str) -> None:
    torch.manual_seed(0)
    case = cases.all_cases(toy=True)[name]()
    rows = {row.method: row for row in products.measure(case, rounds=1, budget=1.0, memory=name == "autoencoder")}
    assert [row.method for row in rows.values() if row.skipped == products.WRONG] == []
    for method in ("gradient", "hfopt, auto", "hfopt, double-backward", "hfopt, recompute", "double backward, re-run"):
        row = rows[method]
        assert row.skipped is None
        assert row.difference is not None
        assert row.difference < 1e-5
        assert row.gradients is not None
        assert row.gradients.median > 0
        assert (row.of_floor is None) == (method == "gradient")
    assert ("hfopt, checkpoint" in rows) == (name in ("mrnn", "lstm", "gru"))
    assert ("hfopt, on torch's layer" in rows) == (name in ("lstm", "gru"))
    cached, again = rows["hfopt, double-backward"], rows["hfopt, recompute"]
    assert cached.set_up
    if name == "autoencoder":
        assert cached.kept
        assert again.kept == 0
    text = report.product_table(case.about, list(rows.values()))
    for method, row in rows.items():
        assert row.method in text, method


def test_a_wrong_product_is_found() -> None:
    torch.manual_seed(0)
    case = cases.all_cases(toy=True)["rnn-T4-B5"]()
    assert case.ours is not None
    with torch.no_grad():
        next(case.ours.model.parameters()).add_(1.0)
    rows = {row.method: row for row in products.measure(case, rounds=1, budget=1.0, memory=False)}
    assert rows["hfopt, double-backward"].skipped == products.WRONG
    assert rows["double backward, re-run"].skipped is None


@pytest.mark.slow
def test_what_a_model_does_not_allow_is_listed_with_the_reason() -> None:
    torch.manual_seed(0)
    case = cases.all_cases(toy=True)["lstm"]()
    rows = {row.method: row for row in products.measure(case, rounds=1, budget=1.0, memory=False)}
    peer = importlib.util.find_spec("curvlinops") is not None
    for method in ("func.jvp + vjp, re-run", *(["curvlinops"] if peer else [])):
        skipped = rows[method].skipped
        assert skipped is not None
        assert "forward AD" in skipped
        assert f"- {method}: {skipped}" in report.product_table("LSTM", list(rows.values()))
    if peer:
        assert rows["curvlinops on a Python loop"].skipped is None
    else:
        assert rows["curvlinops"].skipped == "not installed: curvlinops"


def test_the_work_of_a_product_is_that_of_its_matrices() -> None:
    # One layer on data: h dW and x'w are all a product does; a second one adds four of its size.
    case = cases.autoencoder_case((5, 3), 7)
    assert case.work == Work(both=2.0 * 7 * 5 * 3, data=2.0 * 7 * 5 * 3)
    assert case.work.product == 6 * 2.0 * 7 * 5 * 3
    assert case.work.floor == case.work.product


def test_the_floor_of_a_recurrence_has_its_inputs_and_its_readout() -> None:
    T, B, h, V, O, F = 3, 5, 4, 2, 7, 6
    rnn = recurrent.rnn_case(T, B, h, V, O).work
    assert rnn.product == 8 * T * B * h**2
    assert rnn.gradient == 6 * T * B * h**2
    assert rnn.floor == T * B * (8 * h**2 + 8 * h * O + 4 * V * h)
    assert recurrent.lstm_case(T, B, h, V).work.floor == T * B * (8 * 4 * h**2 + 8 * h * V + 4 * V * 4 * h)
    assert recurrent.gru_case(T, B, h, V).work.floor == T * B * (8 * 3 * h**2 + 8 * h * V + 4 * V * 3 * h)
    assert recurrent.mrnn_case(T, B, h, F, V).work.floor == T * B * (8 * 2 * h * F + 8 * h * V + 4 * V * (F + h))


@pytest.mark.parametrize("name", ["rnn-T4-B5", "mrnn", "lstm", "gru"])
def test_the_floor_counts_the_operations_that_a_product_makes(name: str) -> None:
    """Twice a forward and once a backward pass without its forward: J v as one pass more, of the same matrices."""
    torch.manual_seed(0)
    case = cases.all_cases(toy=True)[name]()
    loop = case.others.get(recurrent.LOOP)
    model = case.plain if loop is None else loop.model
    with FlopCounterMode(display=False) as forward:
        z = model(case.inputs)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(z.sum(), list(model.parameters()))
    # Matrices' derivatives: forward F + F_data, backward 2 F + F_data less what reaches the first state's projection.
    assert forward.get_total_flops() == case.work.both + case.work.data
    assert case.work.floor == 2 * (2 * case.work.both + case.work.data)
    assert backward.get_total_flops() == 2 * case.work.both + case.work.data


@pytest.mark.parametrize("name", ["rnn-T4-B5", "mrnn", "lstm", "gru"])
def test_forms_are_the_same_network_and_turn_vectors_there_and_back(name: str) -> None:
    torch.manual_seed(0)
    case = cases.all_cases(toy=True)[name]()
    expected = case.plain(case.inputs)
    for form in (*([case.ours] if case.ours else []), *case.others.values()):
        torch.testing.assert_close(form.model(case.inputs), expected)
        v = [torch.randn_like(p) for p in case.plain.parameters()]
        w = [torch.randn_like(p) for p in form.model.parameters()]
        own, back = form.from_plain(v), form.to_plain(w)
        assert [t.shape for t in own] == [p.shape for p in form.model.parameters()]
        assert [t.shape for t in back] == [p.shape for p in case.plain.parameters()]
        left = sum(float((a * b).sum()) for a, b in zip(own, w, strict=True))
        assert left == pytest.approx(sum(float((a * b).sum()) for a, b in zip(v, back, strict=True)), rel=1e-4)


def test_memory_counts_what_is_kept_and_what_was_there_at_most() -> None:
    def work() -> torch.Tensor:
        a = torch.zeros(1000)
        b = a.exp()
        return b.exp()

    peak, kept = memory.allocated(work, CPU)
    assert kept == 4000
    assert peak == 12000


def test_interleaved_times_come_in_rounds() -> None:
    seen: list[str] = []
    times = clock.interleaved({n: lambda n=n: seen.append(n) for n in "abc"}, 4, CPU)
    assert {n: len(t) for n, t in times.items()} == dict.fromkeys("abc", 4)
    rounds = [sorted(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert rounds == [["a", "b", "c"]] * 5
    assert clock.ratios([2.0, 6.0], [1.0, 2.0]) == clock.Quartiles(2.25, 2.5, 2.75)


def test_a_step_is_taken_again_from_the_same_state() -> None:
    torch.manual_seed(0)
    case = cases.all_cases(toy=True)["autoencoder"]()
    row = steps.measure(case, rounds=2, iterations=7)
    assert row.gradients == 1
    assert row.products in range(1, 9)  # a warm start takes one more than there are iterations
    assert row.evaluations >= 1
    assert row.ratio.median > 0


def test_scaling_reports_every_size() -> None:
    rows = scaling.measure("T", 1, 1.0, CPU, toy=True)
    assert [row.T for row in rows] == list(scaling.TOY["T"])
    assert all(row.kept > 0 for row in rows)


@pytest.mark.parametrize("sizes", [(40, 30, 40, 2, 1), (20, 60, 24, 5, 3)])
def test_the_memory_kept_is_that_of_the_formula(sizes: tuple[int, ...]) -> None:
    T, B, h, V, O = sizes
    case = recurrent.rnn_case(T, B, h, V, O)
    assert case.ours is not None
    model = case.ours.model

    def build() -> object:
        return GaussNewton(closure(model, case), model.parameters(), linearisation="double-backward")

    build()
    assert memory.allocated(build, CPU)[1] == pytest.approx(scaling.kept_bytes(T, B, h, V, O), rel=0.03)


def test_limits_are_held_against_the_rows() -> None:
    quick = products.Row(claims.OURS, ms=10.0, gradients=clock.Quartiles(0.5, 0.55, 0.6), of_mm=0.65, of_floor=1.4)
    theirs = [products.Row("curvlinops", skipped="no"), products.Row("curvlinops on a Python loop", ms=24.0)]
    rnn = list(claims.of_products("rnn-T100-B1000", [quick, *theirs]))
    assert [c.holds for c in rnn] == [True, False]
    lstm = list(claims.of_products("lstm", [quick, *theirs]))
    assert [(c.measured, c.holds) for c in lstm] == [(1.4, True), (2.4, False)]
    assert list(claims.of_products("cnn", [quick, *theirs])) == []
    assert list(claims.of_products("lstm", theirs)) == []
    table = report.claim_table([*rnn, *lstm])
    assert table.count(" NO |") == 2
    assert table.count(" yes |") == 2
    assert report.claim_table([]) == ""


def scaled(T: int, relative: float, kept: int) -> scaling.Row:
    ms = clock.Quartiles(1.0, 1.0, 1.0)
    return scaling.Row("T", T=T, B=1, h=1, ms=ms, ps_per_tbh2=1.0, relative=relative, kept=kept, formula=100, peak=0)


def test_proportional_growth_is_a_limit() -> None:
    linear, memory_ = claims.of_scaling("T", [scaled(50, 1.0, 100), scaled(400, 1.08, 105)])
    assert linear.measured == pytest.approx(8.0)
    assert linear.holds
    assert memory_.measured == pytest.approx(5.0)
    linear, memory_ = claims.of_scaling("T", [scaled(50, 1.0, 100), scaled(400, 1.2, 150)])
    assert not linear.holds
    assert not memory_.holds
    assert len(list(claims.of_scaling("h", [scaled(50, 1.0, 100), scaled(400, 1.2, 100)]))) == 1


def test_the_gpu_benchmark_measures_products_and_solves() -> None:
    found = gpu.measure(CPU, rounds=1, budget=1.0, toy=True)
    assert found.iterations == 3
    assert found.difference < 1e-5
    assert found.product_ms.median > 0
    assert found.idle is None
    made = gpu.claims(found)
    assert len(made) == 4
    assert len(gpu.claims(replace(found, idle=0.5))) == 5


def test_idle_time_is_what_no_kernel_fills() -> None:
    def event(category: str, start: float, duration: float) -> dict[str, object]:
        return {"cat": category, "ts": start, "dur": duration}

    kernels = [event("kernel", 10, 5), event("gpu_memcpy", 12, 5), event("kernel", 20, 10), event("kernel", 22, 1)]
    others = [event("cpu_op", 0, 100), event("gpu_user_annotation", 0, 100), {"ph": "M"}]
    assert gpu.idle_share([*others, *kernels]) == pytest.approx(3 / 20)
    assert gpu.idle_share(others) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_gpu_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--toy", "--no-save"]) == 0
    assert "needs a CUDA device" in capsys.readouterr().out


@pytest.mark.slow
def test_the_command_writes_tables_plots_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["products", "--toy", "--cases", "rnn-*", "--rounds", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "products.json").read_text())
    assert saved["about"]["torch"] == torch.__version__
    assert "load average" in saved["about"]
    (rows,) = saved["rows"].values()
    assert {row["method"] for row in rows} >= {"gradient", "hfopt, double-backward"}
    assert "load average" in (tmp_path / "products.md").read_text()
    assert "hfopt, double-backward" in printed
    assert (tmp_path / "products.png").read_bytes().startswith(b"\x89PNG")


def test_cases_are_chosen_by_pattern() -> None:
    assert list(cases.chosen(("rnn-T100-*",))) == ["rnn-T100-B100", "rnn-T100-B1000"]
    with pytest.raises(ValueError, match="no case is called 'rnm'; there are autoencoder"):
        cases.chosen(("rnm",))


def test_a_folder_is_named_after_the_machine_and_the_day() -> None:
    about = {**machine.describe(CPU), "processor": "Make (R) 7 @ 2 GHz", "date": "2026-01-02 03:04 UTC"}
    assert machine.folder_name(about) == "make-r-7-2-ghz-2026-01-02"


def test_a_closure_is_an_ordinary_one() -> None:
    torch.manual_seed(0)
    case = replace(cases.autoencoder_case((4, 3), 5), criterion=nn.MSELoss())
    loss = closure(case.plain, case)()
    assert loss.requires_grad
    assert all(p.grad is not None for p in case.plain.parameters())
    with torch.no_grad():
        assert not closure(case.plain, case)().requires_grad


@pytest.mark.slow
def test_exact_squares_are_measured_beside_their_estimate(tmp_path: Path) -> None:
    squares.main(["--toy", "--rounds", "1", "--seconds", "0", "--out", str(tmp_path / "squares.md")])
    rows = [line for line in (tmp_path / "squares.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(squares.CASES)
    assert all(line.count("(") == 2 for line in rows[1:])
