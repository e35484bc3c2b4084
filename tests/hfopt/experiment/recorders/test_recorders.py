"""Recorders: what they keep is what other routes give, and a run does not notice them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hfopt
import models
import pathological
from hfopt.experiment.driver import HF
from hfopt.experiment.recorders import (
    CurvatureDensity,
    GradientByLag,
    HiddenStates,
    Recorder,
    Samples,
    Spectrum,
    text_of,
)
from hfopt.experiment.recorders.base import taken
from hfopt.experiment.store.reader import read_run
from tests.hfopt.tiny import Running, Sums, bits, experiment


class Drawing(Recorder):
    """A recorder that draws from torch's generator, as users' models may."""

    name = "drawing"

    def record(self, hf: Any) -> dict[str, Any]:
        return {"x": torch.rand(3)}


def everything(every: int = 2) -> list[Recorder]:
    return [
        HiddenStates(every),
        GradientByLag(every),
        Spectrum(every, matrix="recurrence.weight_hh_l0"),
        Samples(every),
        CurvatureDensity(every, iterations=5),
        Drawing(every),
    ]


def frames(folder: Path) -> dict[str, dict[int, dict[str, bytes]]]:
    return {
        name: {step: {key: array.tobytes() for key, array in found.items()} for step, found in recorded.frames()}
        for name, recorded in read_run(folder).recorded.items()
    }


@pytest.mark.parametrize("optimizer", ["adam", "hf"])
def test_a_run_does_not_notice_them(tmp_path: Path, optimizer: str) -> None:
    from tests.hfopt.tiny import OPTIMIZERS

    OPTIMIZERS["hf"] = lambda parameters: hfopt.HessianFree(parameters, cg=hfopt.CG(max_iterations=6))
    plain = experiment(tmp_path / "plain", optimizer=optimizer, max_steps=5)
    plain.optimize()
    recording = experiment(tmp_path / "recording", optimizer=optimizer, max_steps=5, record=everything())
    recording.optimize()
    assert bits(plain) == bits(recording)
    one, other = read_run(tmp_path / "plain"), read_run(tmp_path / "recording")
    for column in ("train_loss", "test_loss", "error_rate", "damping", "rho"):
        assert one.steps[column].tobytes() == other.steps[column].tobytes(), column
    assert one.checkpoint()["generators"]["torch"].tolist() == other.checkpoint()["generators"]["torch"].tolist()
    assert dict(one.recorded) == {}
    kept = other.recorded
    assert set(kept) == {"hidden_states", "gradient_by_lag", "spectrum", "samples", "curvature_density", "drawing"}
    assert all(found.steps.tolist() == [0, 2, 4, 5] for found in kept.values())


def test_a_resumed_run_has_the_frames_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = experiment(tmp_path / "whole", max_steps=9, save_freq=4, record=everything())
    whole.optimize()
    first = experiment(tmp_path / "resumed", max_steps=7, save_freq=4, record=everything())
    first.optimize()  # its last state, of step 7, is recorded
    assert read_run(tmp_path / "resumed").recorded["samples"].steps.tolist() == [0, 2, 4, 6, 7]
    again = experiment(tmp_path / "resumed", max_steps=9, save_freq=4, record=everything())
    again.load(4)
    again.optimize()
    assert frames(tmp_path / "resumed") == frames(tmp_path / "whole")
    # In one process, too.
    twice = experiment(tmp_path / "twice", max_steps=7, record=everything())
    twice.optimize()
    twice.optimize(9)
    assert frames(tmp_path / "twice") == frames(tmp_path / "whole")


def test_frames_of_steps_that_another_run_takes_are_dropped(tmp_path: Path) -> None:
    experiment(tmp_path / "run", max_steps=8, save_freq=4, record=[Samples(2)]).optimize()
    again = experiment(tmp_path / "run", max_steps=6, save_freq=4)  # without recorders
    again.load(4)
    again.optimize()
    assert read_run(tmp_path / "run").recorded["samples"].steps.tolist() == [0, 2]
    new = experiment(tmp_path / "run", max_steps=1, overwrite=True)
    new.optimize()
    assert dict(read_run(tmp_path / "run").recorded) == {}
    assert not (tmp_path / "run" / "recorded").exists()


def adding(batch_size: int = 6) -> Any:
    return pathological.addition(
        10, batch_size=batch_size, train_batches=1, test_batches=1, seed=3, dtype=torch.float64
    )


def built(tmp_path: Path, model: nn.Module, problem: Any, **options: Any) -> HF:
    options = {"optimizer": torch.optim.Adam, "max_steps": 1, "quiet": True, **options}
    return HF(tmp_path / "run", model, problem, **options)


def test_hidden_states(tmp_path: Path) -> None:
    problem = adding()
    model = models.RNN(2, 5, 1, dtype=torch.float64).sparse_init(0, connections=3)
    frame, about = taken(HiddenStates(1, sequences=4), built(tmp_path, model, problem))
    batch = problem(-1)
    assert frame["hidden"].shape == (len(batch.inputs), 5, 4)
    h, states = model.h_init.expand(6, -1), []
    for x in batch.inputs:
        assert model.b_h is not None
        h = torch.tanh(h @ model.W_hh + x @ model.W_vh + model.b_h)
        states.append(h)
    expected = torch.stack(states)[:, :4].transpose(1, 2).detach().numpy()
    np.testing.assert_allclose(frame["hidden"], expected, rtol=1e-6, atol=1e-7)
    outputs = model(batch.inputs)[:, :4].transpose(1, 2).detach().numpy()
    np.testing.assert_allclose(frame["outputs"], outputs, rtol=1e-6, atol=1e-7)
    assert np.array_equal(frame["inputs"], batch.inputs[:, :4].transpose(1, 2).numpy().astype(np.float32))
    assert np.array_equal(frame["scored"], batch.mask[:, :4].numpy())
    assert frame["lengths"].tolist() == batch.lengths[:4].tolist()
    assert about["arrays"]["hidden"]["axes"] == ["step", "unit", "sequence"]


def test_hidden_states_of_a_layer_of_torch_and_of_a_function(tmp_path: Path) -> None:
    model, problem = Running(), Sums()
    hf = built(tmp_path, model, problem)
    frame, _ = taken(HiddenStates(1, sequences=3), hf)
    expected = model.recurrence(problem(-1).inputs)[0][:, :3].transpose(1, 2).detach().numpy()
    np.testing.assert_allclose(frame["hidden"], expected, rtol=1e-6)
    doubled = HiddenStates(1, sequences=3, states=lambda m, batch: 2 * m.recurrence(batch.inputs)[0])
    np.testing.assert_allclose(taken(doubled, hf)[0]["hidden"], 2 * expected, rtol=1e-6)
    plain = nn.Linear(2, 2)
    for recorder, said in (
        (HiddenStates(1), "HiddenStates: Linear has neither a method hidden_states.*give states="),
        (GradientByLag(1), "GradientByLag: Linear has neither a method unrolled"),
        (Spectrum(1, matrix="bias"), "no square matrix 'bias'; give matrix=, one of its square ones: weight"),
        (Spectrum(1), "no recurrent matrix that is square"),
    ):
        with pytest.raises(ValueError, match=said):
            built(tmp_path, plain, problem, record=[recorder])


def by_loop(hidden: list[Tensor], loss: Tensor, last: Tensor) -> Any:
    """Norms by lag from the gradients of all hidden states."""
    squares = torch.stack([g.square().sum(-1) for g in torch.autograd.grad(loss, hidden)])  # (T, B)
    T, B = squares.shape
    return np.array(
        [
            math.sqrt(np.mean([float(squares[last[b] - k, b]) for b in range(B) if last[b] >= k]))
            if bool((last >= k).any())
            else math.nan
            for k in range(T)
        ]
    )


def test_gradients_by_lag_against_a_loop_over_time(tmp_path: Path) -> None:
    problem = adding()
    model = models.RNN(2, 5, 1, dtype=torch.float64).sparse_init(0, connections=3)
    frame, _ = taken(GradientByLag(1), built(tmp_path, model, problem))
    batch = problem(-1)
    assert model.b_h is not None
    assert model.W_ho is not None
    assert model.b_o is not None
    h, states = model.h_init.expand(6, -1), []
    for x in batch.inputs:
        h = torch.tanh(h @ model.W_hh + x @ model.W_vh + model.b_h)
        states.append(h)
    outputs = torch.stack(states) @ model.W_ho + model.b_o
    expected = by_loop(states, problem.loss(outputs, batch) * problem.size(batch), batch.lengths - 1)
    assert frame["lag"].tolist() == list(range(len(states)))
    np.testing.assert_allclose(frame["norm"], expected, rtol=1e-10)


class Reader(nn.Module):
    """A recurrent layer of torch and a readout."""

    def __init__(self, kind: Any, batch_first: bool) -> None:
        super().__init__()
        self.recurrence = kind(2, 4, batch_first=batch_first, dtype=torch.float64)
        self.readout = nn.Linear(4, 1, dtype=torch.float64)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.recurrence.batch_first:
            return self.readout(self.recurrence(inputs.transpose(0, 1))[0]).transpose(0, 1)
        outputs: Tensor = self.readout(self.recurrence(inputs)[0])
        return outputs


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_gradients_by_lag_of_layers_of_torch(tmp_path: Path, kind: Any) -> None:
    torch.manual_seed(0)
    problem, model = adding(), Reader(kind, batch_first=False)
    frame, _ = taken(GradientByLag(1), built(tmp_path, model, problem))
    assert "forward" not in vars(model.recurrence)
    batch = problem(-1)
    cells = {nn.RNN: nn.RNNCell, nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell}
    cell = cells[kind](2, 4, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in model.recurrence.state_dict().items()})
    state: Any = None
    nodes, hidden = [], []
    for x in batch.inputs:
        found = cell(x, state)
        node = torch.cat(found if isinstance(found, tuple) else (found,), 1)
        nodes.append(node)
        state = node.split(4, 1) if isinstance(found, tuple) else node
        hidden.append(node[:, :4])
    loss = problem.loss(model.readout(torch.stack(hidden)), batch) * problem.size(batch)
    np.testing.assert_allclose(frame["norm"], by_loop(nodes, loss, batch.lengths - 1), rtol=1e-10)


def test_the_spectrum(tmp_path: Path) -> None:
    model = models.RNN(2, 3, 1, dtype=torch.float64)
    turn = torch.tensor([[0.0, -2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    model.W_hh.data.copy_(turn)
    hf = built(tmp_path, model, adding(), record=[Spectrum(1)])
    frame, about = taken(hf.recorders.named["spectrum"], hf)
    assert about["matrix"] == "W_hh"
    np.testing.assert_allclose(frame["real"], [0, 0, 0.5], atol=1e-15)
    np.testing.assert_allclose(frame["imag"], [-2, 2, 0], atol=1e-15)


def test_the_density_of_the_curvature(tmp_path: Path) -> None:
    problem = adding(20)
    model = models.RNN(2, 2, 1, dtype=torch.float64).sparse_init(0, connections=2)
    hf = built(tmp_path, model, problem)
    batch = problem(-1)
    G = hfopt.GaussNewton(lambda: problem.loss(model(batch.inputs), batch), model.parameters()).to_dense()
    P = len(G)
    frame, _ = taken(CurvatureDensity(1, iterations=P), hf)
    t = torch.linalg.eigvalsh(G)
    assert frame["values"][0] == pytest.approx(float(t[-1]), rel=1e-9)
    assert float(frame["weights"].sum()) == pytest.approx(1.0, rel=1e-9)
    # The quadrature of f(t) = t^2 is exact, with the vector of signs that it starts from.
    signs = 2.0 * torch.randint(2, (P,), generator=torch.Generator().manual_seed(0)).double() - 1
    exact = float((G @ signs).square().sum()) / P
    assert float((frame["weights"] * frame["values"] ** 2).sum()) == pytest.approx(exact, rel=1e-9)
    # What is above and below the grid and on it are all eigenvalues.
    decades = np.gradient(np.log10(frame["grid"]))
    assert float((frame["density"] * decades).sum() + frame["below"]) == pytest.approx(1.0, abs=0.03)


def test_samples(tmp_path: Path) -> None:
    problem = adding()
    model = models.RNN(2, 4, 1, dtype=torch.float64).sparse_init(0)
    hf = built(tmp_path, model, problem)
    batch = problem(-1)
    lines = text_of(taken(Samples(1, count=3), hf)[0]).splitlines()
    said = batch.select(model(batch.inputs)).flatten().tolist()
    wanted = batch.select(batch.targets).flatten().tolist()
    expected = {f"{w:.3f} -> {s:.3f}" for w, s in zip(wanted, said, strict=True)}
    assert len(lines) == 3
    assert set(lines) <= expected
    drawn = Samples(1, draw=lambda hf, generator: f"{torch.rand(1, generator=generator).item():.6f}", longest=5)
    frame = taken(drawn, hf)[0]
    assert frame["text"].shape == (5,)
    assert text_of(frame) == text_of(taken(drawn, hf)[0])  # a function of the step
    accents = Samples(1, draw=lambda hf, generator: "ééé", longest=5)  # of two bytes each
    assert text_of(taken(accents, hf)[0]) == "éé"
    classes = built(tmp_path, Running(), Sums())
    assert text_of(taken(Samples(1, count=1), classes)[0]) in ("1 -> 0", "1 -> 1", "0 -> 0", "0 -> 1")


def test_names_and_settings(tmp_path: Path) -> None:
    experiment(tmp_path / "run", max_steps=1, record=[Samples(1), Samples(1), Samples(1, name="more")]).optimize()
    assert set(read_run(tmp_path / "run").recorded) == {"samples", "samples_2", "more"}
    for make, said in (
        (lambda: Samples(0), "Samples: every=0 must be an integer"),
        (lambda: HiddenStates(1, sequences=0), "sequences=0"),
        (lambda: Spectrum(1, name="A b"), "name='A b' must be of a-z"),
        (lambda: CurvatureDensity(1, iterations=0), "iterations=0"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    with pytest.raises(TypeError, match="record: Samples is no recorder; give one such as"):
        experiment(tmp_path / "other", record=[Samples])


def test_damaged_frames_are_told_before_a_step_is_taken(tmp_path: Path) -> None:
    experiment(tmp_path / "run", max_steps=4, save_freq=2, record=[Samples(1)]).optimize()
    (path,) = (tmp_path / "run" / "recorded").glob("*.h5")
    path.write_bytes(path.read_bytes().replace(b'"first":0', b'"first":9', 1))
    again = experiment(tmp_path / "run", max_steps=6, save_freq=2, record=[Samples(1)])
    again.load()
    with pytest.raises(hfopt.RunError, match=r"samples-000001\.h5 has no frames of samples.*remove it, and with it"):
        again.optimize()
    assert len(read_run(tmp_path / "run").steps) == 5
    path.unlink()
    assert again.optimize() == "max_steps"
    assert read_run(tmp_path / "run").recorded["samples"].steps.tolist() == [4, 5, 6]
