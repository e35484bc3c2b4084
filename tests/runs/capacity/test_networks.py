"""Networks and their training by published hyperparameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import hfopt
from hfopt.experiment.store.reader import read_run
from models.sizes import parameter_count, units_for
from runs.capacity.cells import ARCHITECTURES, cell_of
from runs.capacity.hyperparameters import HF, Range, checked, space
from runs.capacity.network import network
from runs.capacity.tasks import TASKS, forward, make_task, output_of, score
from runs.capacity.training import optimizer, train

# The best LSTM on text8 of the published data set (jazcollins/cap-n-train-hps, README).
PUBLISHED: dict[str, Any] = {
    "recurrent_matrix_init_type": "orthogonal",
    "recurrent_matrix_scale_g": 0.035970274359,
    "recurrent_matrix_scale_i": 0.520125091076,
    "recurrent_matrix_scale_c": 0.619497835636,
    "recurrent_matrix_scale_o": 0.0714097246528,
    "input_scale_g": 0.222167253494,
    "input_scale_i": 1.20329034328,
    "input_scale_c": 0.209308668971,
    "input_scale_o": 0.407466441393,
    "recurrent_bias_init_type": "delta",
    "recurrent_bias_scale_g": 0.631270706654,
    "recurrent_bias_scale_i": -0.250855892897,
    "recurrent_bias_scale_c": -1.62440180779,
    "recurrent_bias_scale_o": 1.2967042923,
    "forget_gate_bias_hack": 4.88674783707,
    "optimizer": "RMSProp",
    "lr_init": 0.00398490205407,
    "lr_decay_rate": 0.108852244914,
    "optimizer_logit_momentum": 5.89666414261,
    "gradient_clip_val": 27.6603736877,
    "l2_decay": 1.79227910735e-07,
    "train_steps": 1176212,
}
SIZES: dict[str, dict[str, Any]] = {
    "per_cap": {"samples": 60, "batch_size": 20},
    "rcf": {"samples": 500, "steps": 6},
    "parens_counting": {"steps": 8},
    "mem_thru": {"inputs": 4, "steps": 3},
    "arithmetic": {"largest": 9, "steps": None},
}


def middle(name: str, optimizers: tuple[str, ...] = ("Adam",), steps: int = 3) -> dict[str, Any]:
    """Hyperparameters in the middle of their ranges."""
    found: dict[str, Any] = {}
    for key, what in space(name, optimizers, steps).items():
        if isinstance(what, Range):
            found[key] = math.sqrt(what.low * what.high) if what.log else (what.low + what.high) / 2
            found[key] = round(found[key]) if what.whole else found[key]
        else:
            found[key] = what[0]
    return found


def small(name: str, **options: Any) -> Any:
    return make_task(name, **{"batch_size": 10, **SIZES[name], **options})


def test_the_published_network_has_the_published_size() -> None:
    assert len(PUBLISHED) == 22
    cell = cell_of("lstm")
    assert units_for(1_280_000, cell, 4, 27, 27) == 210
    model = network("lstm", 4, 27, 27, PUBLISHED, max_params=1_280_000)
    assert model.hidden == 210
    assert sum(p.numel() for p in model.parameters()) == 1_268_217
    assert parameter_count(cell, 4, 27, 211, 27) == 1_280_164


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_budgets_are_kept_and_filled(name: str, depth: int) -> None:
    model = network(name, depth, 5, 3, middle(name), max_params=5000)
    count = sum(p.numel() for p in model.parameters())
    cell, n = cell_of(name), model.hidden
    assert count == parameter_count(cell, depth, 5, n, 3) <= 5000 < parameter_count(cell, depth, 5, n + 1, 3)
    # The rule by hand: g (n^2 + n n_l + n) + k n in each layer, and a readout.
    g = {"rnn": 1, "irnn": 1, "ugrnn": 2, "gru": 3, "lstm": 4, "+rnn": 4}[name]
    k = 2 if name == "lstm" else 1
    first = n if name == "+rnn" else 5
    rule = sum(g * (n * n + n * below + n) + k * n for below in (first, *[n] * (depth - 1))) + 3 * n + 3
    assert count == rule + (6 * n if name == "+rnn" else 0)  # with the projection of its inputs


def test_published_hyperparameters_initialise_each_gate() -> None:
    model = network("lstm", 2, 27, 27, PUBLISHED, units=40, dtype=torch.float64)
    letters = ["i", "g", "c", "o"]  # of the cell's columns i, f, g, o
    for end, below in (("", 27), ("_l1", 40)):
        parts = dict(model.named_parameters())
        for k, letter in enumerate(letters):
            block = parts[f"W_hh{end}"][:, 40 * k : 40 * (k + 1)].detach()
            scale = PUBLISHED[f"recurrent_matrix_scale_{letter}"]
            torch.testing.assert_close(block.T @ block, scale**2 * torch.eye(40, dtype=torch.float64))
            rectangular = parts[f"W_vh{end}"][:, 40 * k : 40 * (k + 1)].detach()
            deviation = PUBLISHED[f"input_scale_{letter}"] / math.sqrt(below)
            assert rectangular.std().item() == pytest.approx(deviation, rel=5 / math.sqrt(2 * 40 * below))
            bias = PUBLISHED[f"recurrent_bias_scale_{letter}"] + (letter == "g") * PUBLISHED["forget_gate_bias_hack"]
            torch.testing.assert_close(parts[f"b_h{end}"][40 * k : 40 * (k + 1)], torch.full((40,), bias).double())
        assert not parts[f"h_init{end}"].any()
        assert not parts[f"c_init{end}"].any()
    assert not model.b_o.any()  # type: ignore[union-attr]


def test_kinds_of_initialisation() -> None:
    hparams = middle("gru") | {"recurrent_matrix_init_type": "identity", "recurrent_bias_init_type": "normal"}
    model = network("gru", 1, 4, 2, hparams, units=300, dtype=torch.float64)
    eye = torch.eye(300, dtype=torch.float64)
    torch.testing.assert_close(model.W_hh_1.data, torch.cat([eye, eye], 1))
    torch.testing.assert_close(model.W_hh_2.data, eye)
    assert model.b_h.data[300:600].mean().item() == pytest.approx(3, abs=0.01)  # scale 0, and the forget bias
    irnn = network("irnn", 1, 4, 2, middle("irnn"), units=10)
    assert torch.equal(irnn.W_hh.data, torch.eye(10))
    assert not irnn.b_h.any()
    normal = network("rnn", 1, 4, 2, middle("rnn") | {"recurrent_matrix_init_type": "normal"}, units=200)
    scale = middle("rnn")["recurrent_matrix_scale_h"] / math.sqrt(200)
    assert normal.W_hh.std().item() == pytest.approx(scale, rel=0.03)
    again = network("rnn", 1, 4, 2, middle("rnn") | {"recurrent_matrix_init_type": "normal"}, units=200, seed=1)
    assert not torch.equal(normal.W_hh, again.W_hh)


@pytest.mark.parametrize("name", ["ugrnn", "gru", "lstm"])
def test_rectified_candidates(name: str) -> None:
    """One step by hand."""
    hparams = middle(name) | {"nonlinearity": "relu"}
    model = network(name, 1, 3, 2, hparams, units=4, dtype=torch.float64)
    x = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.h_init.normal_()
        h = model.h_init.expand(5, 4)
        a = x[0] @ model.W_vh + model.b_h
        if name == "ugrnn":
            g, c = (a + h @ model.W_hh).chunk(2, 1)
            expected = g.sigmoid() * h + (1 - g.sigmoid()) * c.relu()
        elif name == "gru":
            r, u = (a[:, :8] + h @ model.W_hh_1).sigmoid().chunk(2, 1)
            expected = u * h + (1 - u) * (a[:, 8:] + (r * h) @ model.W_hh_2).relu()
        else:
            i, f, g, o = (a + h @ model.W_hh).chunk(4, 1)
            c = f.sigmoid() * model.c_init.normal_() + i.sigmoid() * g.relu()
            expected = o.sigmoid() * c.tanh()
        torch.testing.assert_close(model.hidden_states(x)[0], expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"lr_init": None}, "lr_init is None"),
        ({"hidden": 3}, "have hidden"),
        ({"optimizer": "Adadelta"}, "no optimizer 'Adadelta'"),
        ({"l2_decay": -1.0}, "l2_decay is -1.0"),
        ({"recurrent_matrix_init_type": "sparse"}, "recurrent_matrix_init_type is 'sparse'"),
    ],
)
def test_hyperparameters_that_do_not_fit_are_named(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        checked("lstm", PUBLISHED | change)


def test_missing_hyperparameters_are_named() -> None:
    with pytest.raises(ValueError, match="lack input_scale_g, lr_init"):
        checked("lstm", {k: v for k, v in PUBLISHED.items() if k not in ("input_scale_g", "lr_init")})
    with pytest.raises(ValueError, match="no architecture 'elman'"):
        checked("elman", PUBLISHED)


def test_optimizers_have_their_hyperparameters() -> None:
    model = network("lstm", 1, 4, 2, PUBLISHED, units=5)
    made = optimizer(checked("lstm", PUBLISHED), model.parameters())
    assert isinstance(made, torch.optim.RMSprop)
    assert made.param_groups[0]["alpha"] == pytest.approx(0.9973, abs=5e-5)
    assert made.param_groups[0]["weight_decay"] == PUBLISHED["l2_decay"]
    assert made.param_groups[1]["weight_decay"] == 0
    assert {p.dim() for p in made.param_groups[1]["params"]} == {1}
    kinds = {"sgd": torch.optim.SGD, "momentum": torch.optim.SGD, "ADAM": torch.optim.Adam}
    for name, kind in kinds.items():
        assert isinstance(optimizer(checked("lstm", PUBLISHED | {"optimizer": name}), model.parameters()), kind)
    second = optimizer(
        checked("rnn", middle("rnn", (HF,))), network("rnn", 1, 4, 2, middle("rnn"), units=5).parameters()
    )
    assert isinstance(second, hfopt.HessianFree)
    assert second.structural_damping == pytest.approx(math.sqrt(1e-3))


@pytest.mark.quick(where=lambda task, name: (task, name) in (("per_cap", HF), ("mem_thru", "Adam")))
@pytest.mark.parametrize("name", ["Adam", HF])
@pytest.mark.parametrize("task", sorted(SIZES))
def test_every_task_is_trained(tmp_path: Path, task: str, name: str) -> None:
    hparams = middle("ugrnn", (name,), 3) | ({"hf_cg_iterations": 3} if name == HF else {})
    made = small(task)
    found = train(tmp_path / "run", made, "ugrnn", 2, 600 if task != "parens_counting" else 4000, hparams)
    assert (found.ended, found.steps, found.feasible) == ("max_steps", 3, True)
    run = read_run(tmp_path / "run")
    assert run.configuration["settings"]["l2_decay"] == hparams["l2_decay"]
    assert len(run.steps) == 4
    if task == "per_cap":
        assert found.train_loss == found.valid_loss == found.eval_loss == -run.steps["mutual information"][-1]
    else:
        assert found.valid_loss == pytest.approx(float(run.steps["test_loss"][-1]))
        assert found.eval_loss != found.valid_loss


def test_the_learning_rate_decays_by_its_total_factor(tmp_path: Path) -> None:
    from runs.capacity.training import decay

    hparams = checked("lstm", PUBLISHED | {"train_steps": 10})
    model = network("lstm", 1, 4, 2, hparams, units=3)
    made = optimizer(hparams, model.parameters())
    schedule = decay(hparams)

    class Known:
        optimizer = made

    schedule.attach(Known())  # type: ignore[arg-type]
    for _ in range(10):
        made.step()
        schedule.after_update(Known(), {"accepted": True, "train_loss": 1.0})  # type: ignore[arg-type]
    assert made.param_groups[0]["lr"] == pytest.approx(PUBLISHED["lr_init"] * PUBLISHED["lr_decay_rate"])


def test_divergence_is_infeasible(tmp_path: Path) -> None:
    hparams = middle("rnn", ("SGD",), 60) | {"lr_init": 1e30, "gradient_clip_val": 1e30, "nonlinearity": "relu"}
    found = train(tmp_path / "run", small("mem_thru"), "rnn", 1, 300, hparams)
    assert not found.feasible
    assert found.valid_loss == found.eval_loss == math.inf


def test_a_training_ends_by_the_clock(tmp_path: Path) -> None:
    found = train(tmp_path / "run", small("mem_thru"), "rnn", 1, 300, middle("rnn", steps=10**6), seconds=0.01)
    assert found.ended == "stopped"
    assert 0 < found.steps < 10**6
    assert found.feasible


def test_text8_is_shown_one_hot(tmp_path: Path) -> None:
    (tmp_path / "text8").write_text("the quick brown fox jumps over the lazy dog " * 100, encoding="ascii")
    task = make_task("text8", data=tmp_path, batch_size=4)
    assert (task.V, task.window, task.warm_up) == (27, 50, 13)
    model = network("lstm", 1, 27, 27, PUBLISHED, units=6, output=output_of(task))
    batch = task(0)
    one_hot = torch.nn.functional.one_hot(batch.inputs, 27).float()
    torch.testing.assert_close(forward(model, batch), model(one_hot))
    nats = score(model, task, task.test_batches) * math.log(2)
    log_p = [
        torch.nn.functional.cross_entropy(
            forward(model, b)[b.warm_up :].flatten(0, 1), b.targets.flatten(), reduction="sum"
        ).item()
        for b in map(task, task.test_batches)
    ]
    assert nats == pytest.approx(sum(log_p) / task.scored_symbols, rel=1e-5)


def test_tasks_are_known_by_their_names() -> None:
    assert sorted(TASKS) == sorted([*SIZES, "text8"])
    with pytest.raises(ValueError, match="no task 'copy'"):
        make_task("copy")
