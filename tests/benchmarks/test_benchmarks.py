"""Each benchmark runs at toy size, and what it reports is right; no time is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import cases, clock, machine, memory, products, report, scaling, steps
from benchmarks.__main__ import main
from benchmarks.methods import closure

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["autoencoder", "cnn", "transformer"])
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


def test_what_a_model_does_not_allow_is_listed_with_the_reason() -> None:
    torch.manual_seed(0)
    case = cases.all_cases(toy=True)["lstm"]()
    rows = {row.method: row for row in products.measure(case, rounds=1, budget=1.0, memory=False)}
    skipped = rows["func.jvp + vjp, re-run"].skipped
    assert skipped is not None
    assert "forward AD" in skipped
    assert f"- func.jvp + vjp, re-run: {skipped}" in report.product_table("LSTM", list(rows.values()))


def test_the_work_of_a_product_is_that_of_its_matrices() -> None:
    # One layer on data: h dW and x'w are all a product does; a second one adds four of its size.
    case = cases.autoencoder_case((5, 3), 7)
    assert case.work == cases.Work(both=2.0 * 7 * 5 * 3, data=2.0 * 7 * 5 * 3)
    assert case.work.product == 6 * 2.0 * 7 * 5 * 3
    assert cases.rnn_case(3, 5, 4).work.product == 8 * 3 * 5 * 4**2


def test_forms_turn_vectors_there_and_back() -> None:
    torch.manual_seed(0)
    case = cases.rnn_case(3, 4, 5)
    assert case.ours is not None
    for form in (case.ours, *case.others.values()):
        v = [torch.randn_like(p) for p in case.plain.parameters()]
        own = form.from_plain(v)
        assert [t.shape for t in own] == [p.shape for p in form.model.parameters()]
        for a, b in zip(form.to_plain(own), v, strict=True):
            assert torch.equal(a, b)


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
