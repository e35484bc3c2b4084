"""The page in a browser: slider, pictures, comparisons, a live run, a phone, the keyboard."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hfopt
from hfopt.experiment.pages.document import write_report
from hfopt.experiment.pages.server import Server
from hfopt.experiment.store.reader import read_run

pytestmark = pytest.mark.slow
Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens pages, each alone; scripts that fail and requests that go elsewhere fail the test."""
    said: list[str] = []
    pages: list[Any] = []

    def opened(address: str, **options: Any) -> Any:
        page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **options})
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        own = address.rpartition("/")[0]
        page.on("request", lambda request: None if request.url.startswith((own, "data:")) else said.append(request.url))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(address)
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert said == []


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def until(page: Any, holds: str) -> None:
    """Wait; the page's content security policy forbids playwright's own way."""
    deadline = time.monotonic() + 20
    while not page.evaluate(holds):
        assert time.monotonic() < deadline, holds
        page.wait_for_timeout(20)


def value(page: Any, column: str) -> str:
    return str(page.locator(f'#step-row [data-column="{column}"] dd').inner_text())


def pixels(page: Any, place: int) -> str:
    """One of the hidden states' images, as text."""
    canvas = page.locator('[data-recorder="hidden_states"] .image > canvas').nth(place)
    return str(canvas.evaluate("canvas => canvas.toDataURL()"))


def move(page: Any, place: int) -> None:
    page.locator("#slider").evaluate(
        "(slider, place) => { slider.value = place; slider.dispatchEvent(new Event('input')); }", place
    )
    until(page, f"document.getElementById('step-number').textContent.startsWith('step {place} ')")


def test_the_slider_moves_through_a_report(runs: dict[str, Path], tmp_path: Path, open_page: Open) -> None:
    run = read_run(runs["hf"])
    write_report([run], tmp_path / "report.html")
    page = open_page(f"file://{tmp_path}/report.html")
    assert page.locator("#panels h3").all_inner_texts() == [
        "loss",
        "wrong %",
        "λ (damping)",
        "ρ (change of the loss over the predicted change)",
        "CG iterations",
    ]
    seen = []
    for step in (2, 6):
        move(page, step)
        row, frame = run.steps[step], run.recorded["hidden_states"].frame(step)
        assert float(value(page, "train_loss")) == pytest.approx(row["train_loss"], rel=1e-4)
        assert float(value(page, "damping")) == pytest.approx(row["damping"], rel=1e-4)
        assert value(page, "cg_iterations") == str(row["cg_iterations"])
        said = page.locator('[data-recorder="hidden_states"] .readout').nth(1).inner_text()
        mean = np.abs(frame["hidden"][..., 0]).mean()
        assert said.startswith("hidden units, mean size ")
        assert float(said.split()[-1]) == pytest.approx(mean, rel=1e-3)
        checks = run.checks[run.checks["step"] == step]
        iterations = page.locator("#checks tbody tr td:first-child").all_inner_texts()
        assert list(map(int, iterations)) == checks["iteration"].tolist()
        spectrum = run.recorded["spectrum"].frame(step)
        modulus = np.hypot(spectrum["real"], spectrum["imag"]).max()
        said = page.locator('[data-recorder="spectrum"] .readout').inner_text()
        assert float(said.split(";")[0].split()[-1]) == pytest.approx(modulus, rel=1e-3)
        assert page.locator('[data-recorder="spectrum"] circle.dot').count() == spectrum["real"].size
        seen.append((pixels(page, 0), pixels(page, 1), value(page, "train_loss")))
    (inputs, hidden, loss), (same, other, later) = seen
    assert inputs == same  # the same sequence
    assert hidden != other
    assert loss != later
    page.select_option("#sequence", "2")
    assert pixels(page, 1) != other
    assert page.evaluate("document.activeElement.id") == "sequence"


def test_the_image_shows_the_states(runs: dict[str, Path], tmp_path: Path, open_page: Open) -> None:
    """Each state's sign by its colour: orange is positive, blue negative."""
    run = read_run(runs["adam"])
    write_report([run], tmp_path / "report.html")
    page = open_page(f"file://{tmp_path}/report.html")
    move(page, 4)
    hidden = run.recorded["hidden_states"].frame(4)["hidden"][..., 0]
    canvas = page.locator('[data-recorder="hidden_states"] .image > canvas').nth(1)
    T, units = hidden.shape
    drawn = canvas.evaluate("c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)")
    colours = np.array(drawn).reshape(units, T, 4).transpose(1, 0, 2)
    clear = np.abs(hidden) > 0.1 * np.abs(hidden).max()
    assert clear.sum() > 5
    assert np.array_equal((colours[..., 0] > colours[..., 2])[clear], (hidden > 0)[clear])


def test_two_runs_are_compared(runs: dict[str, Path], tmp_path: Path, open_page: Open) -> None:
    write_report([read_run(path) for path in runs.values()], tmp_path / "report.html")
    page = open_page(f"file://{tmp_path}/report.html")
    assert page.locator("#runs tbody tr").count() == 2
    cells = page.locator('#differences [data-setting="optimizer.class"] td').all_inner_texts()
    assert cells == ["HessianFree", "Adam"]
    assert page.locator('#differences [data-setting="problem.T"]').count() == 0

    def labels() -> list[str]:
        return [
            " ".join(s.split()[:-1]) for s in page.locator("#panels .panel").first.locator("span").all_inner_texts()
        ]

    assert labels() == ["hf training", "hf test", "adam training", "adam test"]
    for axis, column in (("seconds", "total_seconds"), ("products", "products")):
        page.select_option("#axis", axis)
        data = page.evaluate("hfopt.curves.charts[3].plot.data[0]")  # of rho, which one run has
        rows = read_run(runs["hf"]).steps
        begun = rows["total_seconds"] - rows["seconds"] if axis == "seconds" else np.cumsum(rows[column]) - rows[column]
        assert data == pytest.approx(begun[np.isfinite(rows["rho"])].tolist(), rel=1e-12)
    page.select_option("#which", "adam")
    assert value(page, "train_loss") != ""
    assert page.locator('#step-row [data-column="damping"]').count() == 0
    page.uncheck('[data-run="adam"]')
    assert labels() == ["training", "test"]
    assert page.locator("#which option").all_inner_texts() == ["hf"]


def test_a_live_run_grows_without_reloading(served: Server, open_page: Open) -> None:
    with hfopt.Run(served.root / "growing", {"model": "none"}) as run:
        for step in range(3):
            run.log(step, loss=1.0 / (step + 1))
        page = open_page(served.address)
        until(page, "hfopt.runs.size === 1")
        page.evaluate("window.kept = 1")
        state = page.locator('[data-row="growing"] td').first
        assert state.inner_text() == "running"
        assert page.locator("#step-number").inner_text() == "step 2 of 2"
        for step in range(3, 6):
            run.log(step, loss=1.0 / (step + 1), accuracy=0.5)
        until(page, "document.getElementById('step-number').textContent === 'step 5 of 5'")
        assert page.evaluate("hfopt.curves.charts[0].plot.data[1].length") == 6
        assert float(value(page, "train_loss")) == pytest.approx(1 / 6, rel=1e-4)
        move(page, 1)  # who looks at an earlier step stays there
        run.log(6, loss=0.125)
        until(page, "hfopt.curves.charts[0].plot.data[1].length === 7")
        assert page.locator("#step-number").inner_text().startswith("step 1 ")
    until(page, "document.querySelector('[data-row=\"growing\"] td').textContent === 'finished (finished)'")
    with hfopt.Run(served.root / "second", {"model": "none"}) as other:
        other.log(0, loss=0.25)
    page.wait_for_selector('[data-row="second"]')
    page.check('[data-run="second"]')
    until(page, "hfopt.shown.length === 2")
    assert page.evaluate("window.kept") == 1


def test_rows_that_are_computed_again_replace_the_others(served: Server, open_page: Open) -> None:
    for value_ in (1.0, 2.0):
        with hfopt.Run(served.root / "again", resume=True) as run:
            for step in range(3):
                run.log(step, loss=value_)
            if value_ == 1.0:
                page = open_page(served.address)
                until(page, "hfopt.runs.size === 1")
    until(page, "hfopt.runs.get('again').columns.train_loss.every((loss) => loss === 2)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(runs: dict[str, Path], tmp_path: Path, open_page: Open, scheme: str) -> None:
    write_report([read_run(path) for path in runs.values()], tmp_path / "report.html")
    size = {"width": 390, "height": 844}
    page = open_page(f"file://{tmp_path}/report.html", viewport=size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    widths = page.evaluate("Array.from(document.querySelectorAll('.panel'), (p) => p.getBoundingClientRect().right)")
    assert len(widths) >= 7
    assert max(widths) <= 390
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(brightness) < 200) == (scheme == "dark")


def test_the_keyboard_alone(runs: dict[str, Path], tmp_path: Path, open_page: Open) -> None:
    write_report([read_run(runs["hf"])], tmp_path / "report.html")
    page = open_page(f"file://{tmp_path}/report.html")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('role') || ''"))
        if reached[-1] == "slider":
            break
    assert reached[-1] == "slider"
    assert "axis" in reached
    assert reached.count("img") == 5  # the curves
    before = page.locator("#step-number").inner_text()
    page.keyboard.press("ArrowLeft")
    until(page, f"document.getElementById('step-number').textContent !== {before!r}")
    chart = page.locator("#panels [role=img]").first
    chart.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    first = read_run(runs["hf"]).steps["train_loss"][1]
    assert float(page.locator("#panels .readout span").first.inner_text().split()[-1]) == pytest.approx(first, rel=1e-3)
    page.keyboard.press("Enter")
    assert page.locator("#step-number").inner_text().startswith("step 1 ")


def test_what_files_say_is_text(tmp_path: Path, open_page: Open) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    with hfopt.Run(tmp_path / "run", {hostile: hostile, "model": hostile}) as run:
        run.log(0, loss=1.0, cg_reason="<b>x</b>")
    write_report([read_run(tmp_path / "run")], tmp_path / "report.html")
    page = open_page(f"file://{tmp_path}/report.html")
    assert page.locator("#settings td").filter(has_text=hostile).count() >= 2
    assert page.locator("img").count() == 0
