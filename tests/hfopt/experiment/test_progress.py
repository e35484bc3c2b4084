"""What shows on a terminal while work goes on, and that pipes do not see it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfopt.experiment import progress
from hfopt.experiment.progress import Bar, shown
from hfopt.linalg.watching import product_made, watching

ROOT = Path(__file__).parents[3]


def test_words(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    bar = Bar(limited=True)
    bar.at(0, 200)
    assert bar.words() == "step 0 of 200"
    for done in range(1, 41):
        now[0] += 2.0 if done <= 30 else 3.0  # the last ten tell
        bar.at(done, 200)
    assert bar.words() == "step 40 of 200, at most 8 min 0 s left"
    for _ in range(17):
        bar.product()
    now[0] += 1.0
    assert bar.words() == "step 40 of 200, 17 products, at most 7 min 59 s left"
    bar.at(41, 200)
    assert bar.words().startswith("step 41 of 200, at most")
    frames = Bar("frame")
    frames.at(0, 3)
    now[0] += 1.0
    frames.at(1, 3)
    assert frames.words() == "frame 1 of 3, 2.0 s left"


def test_a_narrow_terminal_has_the_words_alone() -> None:
    from rich.console import Console

    bar = Bar()
    bar.at(1, 4)
    for width, drawn in ((30, False), (80, True)):
        console = Console(width=width, force_terminal=False)
        with console.capture() as found:
            console.print(bar.line(width))
        text = found.get()
        assert "step 1 of 4" in text
        assert ("━" in text) is drawn
        assert len(text.rstrip("\n")) <= width


def test_nothing_is_shown_or_watched_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    with shown(bar):
        product_made()
        print("a line")
    assert bar.products == 0
    assert capsys.readouterr().out == "a line\n"


def test_products_are_watched() -> None:
    seen: list[int] = []
    with watching(lambda: seen.append(1)):
        product_made()
        product_made()
    product_made()
    assert len(seen) == 2


@pytest.mark.slow
def test_a_run_in_a_terminal_and_in_a_pipe(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    program = (
        "import pathlib, hfopt, tests.hfopt.tiny as tiny; "
        "tiny.OPTIMIZERS['hf'] = lambda p: hfopt.HessianFree(p, cg=hfopt.CG(max_iterations=200, tolerance=0.0)); "
        f"hf = tiny.experiment(pathlib.Path({str(tmp_path)!r}) / 'run', optimizer='hf', max_steps=30, quiet=False); "
        "print(hf.optimize())"
    )
    environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-W", "error", "-c", program]
    upper, lower = pty.openpty()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=lower, stderr=lower)
    os.close(lower)
    printed = b""
    while True:
        try:
            part = os.read(upper, 1 << 16)
        except OSError:
            break
        if not part:
            break
        printed += part
    os.close(upper)
    assert process.wait(timeout=60) == 0
    text = printed.decode()
    assert "of 30" in text
    assert "products" in text
    assert text.rstrip().endswith("max_steps")
    assert "\x1b[?25h" in text  # the cursor is back
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout
    assert " of 30" not in done.stdout
    assert done.stderr == ""
