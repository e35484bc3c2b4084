"""The driver: what it draws, evaluates, logs and saves, and when it stops."""

from __future__ import annotations

import math
import os
import platform
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hfopt.experiment.driver import HF
from hfopt.experiment.identity import commit
from hfopt.experiment.roles import Growth
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import read_run
from tests.hfopt.tiny import OPTIMIZERS, Running, Sums, bits, experiment

ROOT = Path(__file__).resolve().parents[3]


def test_the_rows(tmp_path: Path) -> None:
    hf = experiment(tmp_path / "run", optimizer="sgd", max_steps=3)
    model, problem = Running(), Sums()
    model.load_state_dict(hf.model.state_dict())
    model.eval()
    with torch.no_grad():
        expected = [(model(problem(i).inputs), problem(i)) for i in (-1, -2)]
    hf.optimize()
    run = read_run(tmp_path / "run")
    assert run.steps["step"].tolist() == [0, 1, 2, 3]
    assert run.steps["updated"].tolist() == [True, True, True, False]
    first = run.steps[0]
    assert first["test_loss"] == pytest.approx(np.mean([float(problem.loss(z, b)) for z, b in expected]))
    wrong = sum(int(problem.zero_one_loss(z, b)) for z, b in expected)
    assert first["error_rate"] == wrong / 16
    assert (run.steps["gradient_norm"][:3] > 0).all()
    assert np.isfinite(run.steps["train_loss"]).all()
    assert (run.steps["cpu_seconds"] > 0).all()
    assert run.steps["total_seconds"].tolist() == pytest.approx(np.cumsum(run.steps["seconds"]).tolist())
    assert run.steps["parameter_norm"][2] == pytest.approx(
        math.sqrt(sum(float(p.detach().square().sum()) for p in hf.model.parameters()))
    )


class Recorder(torch.optim.SGD):
    """An optimizer that takes the roles by name, evaluates the closures it gets, and leaves the parameters alone."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.0)
        self.calls: list[dict[str, Any]] = []

    def step(self, closure: Any = None, *, curvature: Any = None, evaluation: Any = None) -> Any:  # type: ignore[override]
        closures = {"gradient": closure, "curvature": curvature, "evaluation": evaluation}
        with torch.enable_grad():
            call = {name: None if f is None else f() for name, f in closures.items()}
        self.calls.append(call)
        return call["gradient"]


def test_the_roles_of_the_data(tmp_path: Path) -> None:
    """Each closure is the mean over the scored outputs of its batches; gradients add up over batches."""
    problem, model = Sums(), nn.Sequential(nn.Linear(2, 2))
    sizes = {0: 1, 1: 3, 2: 4}

    def size(batch: Any) -> int:  # batches that differ in size weigh accordingly
        return next((sizes[i] for i, b in problem.train_mem.items() if b is batch), 1)

    problem.size = size  # type: ignore[method-assign]
    hf = HF(
        tmp_path / "run",
        model,
        problem,
        optimizer=Recorder,
        curvature_batches=[1],
        evaluation_batches=[2, 0],
        threshold=0.0,
        max_steps=1,
        quiet=True,
    )
    hf.optimize()
    assert isinstance(hf.optimizer, Recorder)
    (call,) = hf.optimizer.calls
    assert problem.epoch == 1
    losses = {i: problem.loss(model(problem(i).inputs), problem(i)) for i in range(3)}
    mean = (losses[0] + 3 * losses[1] + 4 * losses[2]) / 8
    torch.testing.assert_close(call["gradient"], mean.detach())
    assert not call["gradient"].requires_grad
    torch.testing.assert_close(call["curvature"], losses[1])
    torch.testing.assert_close(call["evaluation"], (4 * losses[2] + losses[0]) / 5)
    assert call["evaluation"].requires_grad
    gradients = torch.autograd.grad(mean, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_equal_roles_share_one_closure(tmp_path: Path) -> None:
    hf = experiment(tmp_path / "run", max_steps=2)
    hf = HF(
        tmp_path / "run", hf.model, hf.problem, optimizer=Recorder, gradient_batches=[2, 1], max_steps=1, quiet=True
    )
    hf.optimize()
    assert isinstance(hf.optimizer, Recorder)
    assert [name for name, value in hf.optimizer.calls[0].items() if value is not None] == ["gradient", "curvature"]
    hf = HF(
        tmp_path / "run", hf.model, hf.problem, optimizer=Recorder, curvature_batches=range(3), max_steps=1, quiet=True
    )
    hf.optimize()
    assert isinstance(hf.optimizer, Recorder)
    assert hf.optimizer.calls[0]["curvature"] is None


def test_stochastic_steps_take_the_batches_in_turn(tmp_path: Path) -> None:
    problem, seen = Sums(), []
    draw = problem.__call__

    class Watched(Sums):
        def __call__(self, index: int) -> Any:
            seen.append((self.epoch, index))
            return draw(index)

    hf = HF(
        tmp_path / "run",
        Running(),
        Watched(),
        optimizer=torch.optim.SGD(Running().parameters(), lr=0.1),
        batches_per_step=2,
        test_freq=2,
        max_steps=3,
        threshold=0.0,
        quiet=True,
    )
    hf.optimize()
    training = [(epoch, index) for epoch, index in seen if index >= 0]  # each is asked for once
    assert training == [(1, 0), (1, 1), (2, 2), (2, 0), (3, 1), (3, 2), (4, 0), (4, 1)]
    tested = read_run(tmp_path / "run").steps
    assert np.isfinite(tested["test_loss"]).tolist() == [True, False, True, True]
    assert (tmp_path / "run" / "results").read_text().count("step ") == 3


def test_growing_steps_take_more_and_more_batches_in_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One batch, two, three, three: the products use the first of them, and all of them judge."""
    asked: list[int] = []

    class Asked(Sums):
        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            asked.extend(i for i, kept in self.train_mem.items() if kept is batch)
            return super().loss(outputs, batch)

    problem, model = Asked(), nn.Sequential(nn.Linear(2, 2))
    taken: list[list[int]] = []
    curved: list[list[int]] = []

    class Watching(Recorder):
        def step(self, closure: Any = None, *, curvature: Any = None, evaluation: Any = None) -> Any:  # type: ignore[override]
            for f, seen in ((closure, taken), (curvature or closure, curved)):
                asked.clear()
                f()
                seen.append(list(asked))
            assert evaluation is None  # the gradient's own
            return super().step(closure)

    options: dict[str, Any] = {"batches_per_step": Growth(1, 3, 2), "max_steps": 4, "threshold": 0.0}
    hf = HF(tmp_path / "run", model, problem, optimizer=Watching, **options)
    hf.optimize()
    assert taken == [[0], [1, 2], [0, 1, 2], [0, 1, 2]]
    assert curved == [[0], [1], [0], [0]]
    assert "batches: 1 to 3 gradient, 1 curvature, 1 to 3 evaluation, 2 test" in capsys.readouterr().out


@pytest.mark.parametrize("growth", [Growth(1, 40, 100), Growth(5, 5, 1), Growth(7, 2, 3)], ids=str)
def test_growth_is_geometric_and_counts_what_it_took(growth: Growth) -> None:
    counts = [growth.at(k) for k in range(growth.steps + 5)]
    assert counts[0] == growth.first
    assert set(counts[growth.steps :]) == {growth.last}
    assert counts == sorted(counts, reverse=growth.last < growth.first)
    assert [growth.before(k) for k in range(len(counts) + 1)] == [sum(counts[:k]) for k in range(len(counts) + 1)]
    half = growth.steps // 2
    ideal = growth.first * (growth.last / growth.first) ** (half / growth.steps)
    assert abs(growth.at(half) - ideal) <= 0.5
    with pytest.raises(ValueError, match="at least 1"):
        Growth(growth.first, 0, growth.steps)


def test_running_average_is_what_is_tested(tmp_path: Path) -> None:
    """Shares of what was before are 0, 1/2, 2/3 and 0.7; buffers are the model's own."""
    hf = experiment(tmp_path / "run", average=0.7, save_freq=1, keep_checkpoints=None, max_steps=4)
    hf.optimize()
    plain = experiment(tmp_path / "plain", max_steps=4)
    plain.optimize()
    assert bits(hf) == bits(plain)  # training does not see the average
    assert plain.tested is plain.model
    run = read_run(tmp_path / "run")
    thetas = [run.parameters(step) for step in range(1, 5)]
    expected = dict(thetas[0])
    for share, theta in zip((1 / 2, 2 / 3, 0.7), thetas[1:], strict=True):
        expected = {k: share * v + (1 - share) * theta[k] if v.is_floating_point() else v for k, v in expected.items()}
    found, names = run.parameters(averaged=True), dict(hf.model.named_parameters())
    assert found.keys() == thetas[0].keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name] if name in names else thetas[-1][name])
        assert torch.equal(value, hf.tested.state_dict()[name])
    model = Running()
    model.load_state_dict(found)
    with torch.no_grad():
        losses = [hf.problem.loss(model.eval()(hf.problem(i).inputs), hf.problem(i)) for i in hf.problem.test_batches]
    assert run.steps["test_loss"][-1] == pytest.approx(float(sum(losses)) / len(losses))
    with pytest.raises(RunError, match="average"):
        read_run(tmp_path / "plain").parameters(averaged=True)
    with pytest.raises(RunError, match=r"average was 0\.7"):
        experiment(tmp_path / "run", max_steps=4).load()


def test_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = experiment(tmp_path / "run", optimizer="sgd", threshold=0.45, max_steps=100, quiet=False, save_freq=1000)
    before = {name: value.clone() for name, value in hf.model.state_dict().items()}
    assert hf.optimize() == "success"
    run = read_run(tmp_path / "run")
    assert (run.steps["error_rate"][:-1] >= 0.45).all()
    assert run.steps["error_rate"][-1] < 0.45
    assert run.find().step == hf.step == run.steps["step"][-1] > 0
    for name, value in run.parameters().items():
        assert torch.equal(value, hf.model.state_dict()[name])
    assert any(not torch.equal(before[name], value) for name, value in run.parameters().items())
    printed = capsys.readouterr().out
    assert f"success after {hf.step} steps" in printed
    assert f"hfopt show {tmp_path / 'run'}" in printed
    assert "hf.load()" in printed
    assert f"success after {hf.step} steps" in (tmp_path / "run" / "results").read_text()
    assert hf.optimize() == "success"  # at once, and nothing has changed
    assert read_run(tmp_path / "run").find().step == run.find().step


def test_threshold_may_be_a_function(tmp_path: Path) -> None:
    seen = []

    def enough(test_loss: float, error_rate: float) -> bool:
        seen.append((test_loss, error_rate))
        return len(seen) == 4

    assert experiment(tmp_path / "run", threshold=enough).optimize() == "success"
    steps = read_run(tmp_path / "run").steps
    assert seen == list(zip(steps["test_loss"].tolist(), steps["error_rate"].tolist(), strict=True))


def test_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = experiment(tmp_path / "run", quiet=False, max_steps=25)
    hf.optimize()
    lines = capsys.readouterr().out.splitlines()
    headings = [i for i, line in enumerate(lines) if line.split()[:3] == ["step", "train", "loss"]]
    assert len(headings) == 2
    table = [line for line in lines if line.strip()[:1].isdigit()]
    assert [int(line.split()[0]) for line in table] == list(range(26))
    assert {len(line) for line in table} == {len(lines[headings[0]])}
    assert all(len(line) <= 100 for line in lines if str(tmp_path) not in line)
    experiment(tmp_path / "quiet", quiet=True).optimize()
    assert capsys.readouterr().out == ""


def test_acknowledged_rows_survive_an_error(tmp_path: Path) -> None:
    hf = experiment(tmp_path / "run", save_freq=4)
    loss, calls = hf.problem.loss, []

    def failing(outputs: Tensor, batch: Any) -> Tensor:
        calls.append(0)
        if len(calls) > 30:
            raise ZeroDivisionError("made up")
        return loss(outputs, batch)

    hf.problem.loss = failing  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        hf.optimize()
    run = read_run(tmp_path / "run")
    assert run.steps["step"].tolist() == list(range(6))
    assert run.find().step == 4
    text = (tmp_path / "run" / "results").read_text()
    assert "step 6 ended in the middle (ZeroDivisionError)" in text
    assert "made up" in text
    for action in (hf.optimize, hf.save):
        with pytest.raises(RunError, match=r"call load\(\)"):
            action()
    hf.problem.loss = loss  # type: ignore[method-assign]
    hf.load()
    assert hf.optimize() == "max_steps"
    whole = experiment(tmp_path / "whole")
    whole.optimize()
    assert bits(hf) == bits(whole)
    assert "resumed at step 4" in (tmp_path / "run" / "results").read_text()


def test_a_training_loss_of_nan_ends_the_run(tmp_path: Path) -> None:
    hf = experiment(tmp_path / "run", save_freq=2, keep_checkpoints=1)
    hf.optimize(4)
    hf.model.get_parameter("readout.bias").data.fill_(math.nan)
    assert hf.optimize() == "diverged"
    run = read_run(tmp_path / "run")
    assert math.isnan(run.steps["train_loss"][-1])
    assert all(bool(value.isfinite().all()) for value in run.parameters().values())
    hf.load()
    assert hf.step == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_for_the_step(tmp_path: Path, number: signal.Signals, capfd: Any) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    hf = experiment(tmp_path / "run")
    received = []
    forget = hf.problem.forget

    def forget_and_signal() -> None:
        forget()
        if hf.step == 3 and not received:
            signal.raise_signal(number)

    hf.problem.forget = forget_and_signal  # type: ignore[method-assign]
    try:
        signal.signal(signal.SIGTERM, lambda *_: received.append(True))
        assert hf.optimize() == "interrupted"
    finally:
        signal.signal(signal.SIGTERM, before[1])
    assert bool(received) == (number == signal.SIGTERM)  # handed on after all is saved
    run = read_run(tmp_path / "run")
    assert run.steps["step"].tolist() == [0, 1, 2, 3]
    assert run.find().step == 4
    assert "stopping after this step" in capfd.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    received.append(True)
    hf.optimize()
    whole = experiment(tmp_path / "whole")
    whole.optimize()
    assert bits(hf) == bits(whole)


def test_the_second_ctrl_c_is_immediate(tmp_path: Path, capfd: Any) -> None:
    hf = experiment(tmp_path / "run", save_freq=2)
    forget = hf.problem.forget

    def forget_and_signal() -> None:
        if hf.step == 3:
            # Raised, not sent to the process: two that arrive before Python looks would count as one.
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        forget()

    hf.problem.forget = forget_and_signal  # type: ignore[method-assign]
    # What is started in the background, by a shell or by pytest's workers, ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            hf.optimize()
    finally:
        signal.signal(signal.SIGINT, before)
    run = read_run(tmp_path / "run")
    assert run.steps["step"].tolist() == [0, 1, 2]
    assert run.find().step == 2
    assert "KeyboardInterrupt" in (tmp_path / "run" / "results").read_text()


def test_a_second_run_moves_the_first_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment(tmp_path / "run").optimize(2)
    experiment(tmp_path / "run", quiet=False).optimize(3)
    assert len(read_run(tmp_path / "run.1").steps) == 3
    assert len(read_run(tmp_path / "run").steps) == 4
    assert "is now" in capsys.readouterr().out
    experiment(tmp_path / "run", overwrite=True).optimize(4)
    assert len(read_run(tmp_path / "run").steps) == 5
    assert not (tmp_path / "run.2").exists()


def test_names_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, problem = Running(), Sums()
    make = OPTIMIZERS["sgd"]
    assert HF("one", model, problem, optimizer=make).path == Path("runs/logs/one")
    assert HF("./one", model, problem, optimizer=make).path == Path("one")
    assert HF(Path("one"), model, problem, optimizer=make).path == Path("one")
    for name in ("", ".", "..", "a/..", "/", " ", "a\nb", "\0", Path()):
        with pytest.raises(ValueError, match="names no folder for a run"):
            HF(name, model, problem, optimizer=make)
    assert list(tmp_path.iterdir()) == []  # building an experiment writes nothing


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_batches": [0, 7]},
        {"curvature_batches": [-1]},
        {"evaluation_batches": []},
        {"batches_per_step": 4},
        {"batches_per_step": 0},
        {"batches_per_step": Growth(1, 4, 5)},
        {"average": 1.0},
        {"save_freq": 0},
        {"test_freq": 0},
        {"keep_checkpoints": 0},
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        experiment(tmp_path / "run", **options)


def test_modes_of_the_modules_stay(tmp_path: Path) -> None:
    hf = experiment(tmp_path / "run", max_steps=2)
    assert isinstance(hf.model, Running)
    hf.model.norm.eval()  # a user's frozen normalisation
    hf.optimize()
    assert hf.model.training
    assert hf.model.drop.training
    assert not hf.model.norm.training
    assert int(hf.model.norm.num_batches_tracked) == 0


def test_the_record_of_the_run(tmp_path: Path) -> None:
    hf = experiment(tmp_path / "run", settings={"why": "to see", "rate": 0.5}, max_steps=1)
    hf.optimize()
    run = read_run(tmp_path / "run")
    assert run.seed == 0
    assert run.versions["torch"] == str(torch.__version__)
    assert run.versions["threads"] == torch.get_num_threads()
    assert run.versions["device"] == "cpu"
    (session,) = run.sessions
    assert session["process"] == os.getpid()
    assert session["command"]
    assert session["versions"] == run.versions
    assert run.versions["host"] == platform.node()
    assert run.versions["commit"] == commit(ROOT)
    assert run.configuration["settings"] == {"why": "to see", "rate": 0.5}
    assert run.configuration["problem"]["T"] == 3
    assert run.configuration["optimizer"]["groups"][0]["lr"] == 0.01
    checkpoint = run.checkpoint()
    assert set(checkpoint) >= {"step", "parameters", "optimizer", "problem", "generators", "totals"}
    assert torch.equal(checkpoint["generators"]["torch"], torch.get_rng_state())


def test_outside_the_main_thread(tmp_path: Path) -> None:
    hf, outcomes = experiment(tmp_path / "run", max_steps=2), []
    thread = threading.Thread(target=lambda: outcomes.append(hf.optimize()))
    thread.start()
    thread.join()
    assert outcomes == ["max_steps"]


def test_the_forward_function_sees_the_batch(tmp_path: Path) -> None:
    seen = []

    def forward(model: nn.Module, batch: Any) -> Tensor:
        seen.append(int(batch.mask.sum()))
        outputs: Tensor = model(batch.inputs)
        return outputs

    plain, given = experiment(tmp_path / "a", max_steps=3), experiment(tmp_path / "b", max_steps=3, forward=forward)
    torch.manual_seed(1)
    given.optimize()
    torch.manual_seed(1)
    plain.optimize()
    assert bits(plain) == bits(given)
    assert len(seen) == 3 * (2 + 3) + 2 + 3


def test_a_continuation_by_something_else_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = "hfopt.recurrences.native.build.identity"
    monkeypatch.setattr(build, lambda: {"compiler": "gcc 12", "flags": "-O3", "library": None}, raising=False)
    experiment(tmp_path / "run", quiet=False).optimize(2)
    assert "may differ" not in capsys.readouterr().out
    monkeypatch.setattr(
        build, lambda: {"compiler": "gcc 13", "flags": "-O3", "new": 1, "library": "a1b2"}, raising=False
    )
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    hf = experiment(tmp_path / "run", quiet=False)
    hf.load()
    hf.optimize(4)
    printed = capsys.readouterr().out
    assert "native.compiler was 'gcc 12' and is 'gcc 13'; the bits may differ" in printed
    assert "and is 'elsewhere'; the bits may differ" in printed
    assert printed.count("may differ") == 2
    run = read_run(tmp_path / "run")
    assert [session["step"] for session in run.sessions] == [0, 2]
    assert run.versions["native"]["compiler"] == "gcc 12"
    assert "gcc 13" in (tmp_path / "run" / "results").read_text()
    # A compiler that cannot be asked is no reason not to start.
    monkeypatch.setattr(build, lambda: 1 / 0, raising=False)
    experiment(tmp_path / "other").optimize(1)
    assert read_run(tmp_path / "other").versions["native"] == {}
