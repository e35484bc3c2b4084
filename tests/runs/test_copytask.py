"""The copy problem, typed: options, presets, two rates, refusals, and what the released program does wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import runs.copytask as c
from hfopt.experiment.store.reader import read_run
from models import long_memory
from models.parametrisations import parts_of
from pathological import copying
from runs.long_memory import experiment, groups, optimizer
from runs.long_memory_presets import COPY, PSMNIST, PTB, CopyTask, PTBCharacters

RUN = "copytask"
SMALL = (
    "--T",
    "5",
    "--c-length",
    "2",
    "--nhid",
    "8",
    "--updates",
    "4",
    "--log-interval",
    "2",
    "--test-sequences",
    "20",
)


def net(kind: str = "nnRNN", nhid: int = 8) -> Any:
    return long_memory(kind, 1, nhid, 9, seed=1)


def test_published_defaults() -> None:
    """Of the released program, by name."""
    found = CopyTask()
    assert (found.net_type, found.nhid, found.T, found.labels, found.c_length) == ("nnRNN", 128, 200, 8, 10)
    assert (found.lr, found.lr_orth, found.optimizer, found.alpha, found.betas) == (
        2e-4, 2e-5, "RMSprop", 0.99, (0.9, 0.999),
    )  # fmt: skip
    assert (found.rinit, found.iinit, found.nonlin, found.alam, found.Tdecay) == (
        "henaff", "xavier", "modrelu", 1e-4, 1e-5,
    )  # fmt: skip
    assert (found.batch, found.updates, found.random_seed, found.onehot, found.cuda) == (10, 1500, 400, False, False)
    assert c.settings == found
    characters = PTBCharacters()
    assert (characters.nhid, characters.lr, characters.lr_orth, characters.alpha) == (1024, 8e-4, 8e-5, 0.9)
    assert (characters.betas, characters.rinit, characters.iinit) == ((0.0, 0.9), "cayley", "kaiming")
    assert (characters.alam, characters.Tdecay, characters.batch, characters.emsize) == (1.0, 1e-4, 128, 200)
    assert (characters.epochs, characters.bptt, str(characters.save)) == (100, 150, "model.pt")


def test_published_settings() -> None:
    row = COPY["nnrnn-copy"]
    assert (row.alpha, row.lr, row.lr_orth, row.alam, row.Tdecay, row.rinit) == (0.99, 5e-4, 1e-6, 1e-4, 1e-6, "cayley")
    assert COPY["nnrnn-copy-paper"] == replace(row, rinit="henaff")
    assert (COPY["eurnn-copy-256"].nhid, COPY["eurnn-copy-256"].alpha) == (256, 0.5)
    assert (COPY["rnn-adding"].c_length, COPY["rnn-adding"].nonlin, COPY["rnn-adding"].batch) == (100, "tanh", 1)
    assert (PSMNIST["exprnn-psmnist-722"].nhid, PSMNIST["nnrnn-psmnist-paper"].alam) == (722, 0.15)
    assert all(row.permute for row in PSMNIST.values())
    assert (PTB["nnrnn-ptb-150"].optimizer, PTB["nnrnn-ptb-150"].clip, PTB["nnrnn-ptb-300"].clip) == ("Adam", 10, 5)
    assert PTB["nnrnn-ptb-300-paper"].lr_orth == 6e-5
    assert (PTB["lstm-ptb-150-475"].alpha, PTB["lstm-ptb-300-475"].lr) == (0.99, 3e-3)
    assert all(row.bptt == int(name.split("-ptb-")[1][:3]) for name, row in PTB.items())
    assert (len(COPY), len(PSMNIST), len(PTB)) == (14, 11, 26)


@pytest.mark.parametrize("kind", ["nnRNN", "expRNN", "EURNN", "LSTM"])
@pytest.mark.parametrize("name", ["RMSprop", "Adam"])
def test_each_part_has_its_rate_and_decay(kind: str, name: Any) -> None:
    """One update beside torch's optimizers on each part alone, the gamma penalty written out."""
    settings = CopyTask(optimizer=name, lr=1e-2, lr_orth=1e-3, alam=0.3, Tdecay=0.2, alpha=0.9, betas=(0.8, 0.9))
    model, twin = net(kind), net(kind)
    x = torch.randn(6, 4, 1, generator=torch.Generator().manual_seed(1))
    for some in (model, twin):
        with torch.no_grad():
            for p in (*parts_of(some)["gamma"], *parts_of(some)["triangular"]):
                p.copy_(torch.linspace(-0.3, 0.4, p.numel()))
    made = optimizer(model, settings)
    assert {id(p) for g in made.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    model(x).square().mean().backward()
    made.step()
    parts = parts_of(twin)
    loss = twin(x).square().mean()
    loss = loss + sum(0.3 * ((1 + p) - 1).square().sum() for p in parts["gamma"])
    loss = loss + sum(0.1 * p.square().sum() for p in parts["triangular"])
    loss.backward()
    for kind_of, found in parts.items():
        lr = 1e-3 if kind_of == "orthogonal" else 1e-2
        if found and name == "RMSprop":
            torch.optim.RMSprop(found, lr=lr, alpha=0.9).step()
        elif found:
            torch.optim.Adam(found, lr=lr, betas=(0.8, 0.9)).step()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(p, q, rtol=1e-5, atol=1e-6, msg=key)


def test_hessian_free_has_the_penalties_and_one_rate() -> None:
    found = groups(net(), CopyTask(optimizer="hf", alam=0.3, Tdecay=0.2, weight_decay=0.1))
    assert [(g["weight_decay"], "lr" in g) for g in found] == [(0.1, False), (0.6, False), (0.2, False), (0.0, False)]


def test_the_penalty_leaves_the_logged_loss_alone(tmp_path: Path) -> None:
    """In the released program the penalty is added in place to the very tensor that is logged."""
    losses = []
    for alam in (0.0, 1e3):
        settings = CopyTask(
            T=5, c_length=2, nhid=8, updates=1, alam=alam, log_interval=1, name=str(tmp_path / f"{alam}")
        )
        problem = copying(5, c_length=2, batch_size=10, train_batches=1, test_batches=1, seed=1)
        model = net()
        with torch.no_grad():
            parts_of(model)["gamma"][0].fill_(0.5)
        hf = experiment("copytask", settings, CopyTask(), model, problem, quiet=True)
        hf.optimize()
        losses.append(read_run(tmp_path / f"{alam}").steps["train_loss"][0])
        moved = float(parts_of(model)["gamma"][0].detach().mean())
        assert moved < 0.5 or alam == 0
    assert losses[0] == losses[1]
    assert losses[0] < 100  # the penalty is 1000


@pytest.mark.parametrize("clip", [None, 1e-6])
def test_gradients_are_clipped(tmp_path: Path, clip: float | None) -> None:
    """There is no clipping in the released program, whose README has a column for it."""
    settings = CopyTask(T=5, c_length=2, nhid=8, updates=1, clip=clip, optimizer="Adam", name=str(tmp_path / "run"))
    problem = copying(5, c_length=2, batch_size=10, train_batches=1, test_batches=1, seed=1)
    model = net("RNN-orth")
    hf = experiment("copytask", settings, CopyTask(), model, problem, quiet=True)
    hf.optimize()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (float(norm) < 1.01e-6) == (clip is not None)


@pytest.mark.parametrize("words", [("--optimizer", "Adam", "--betas", "0.5", "0.9"), ("--optimizer", "hf"), ()])
def test_a_run_goes_on_to_the_same_bits(tmp_path: Path, typed: Any, words: tuple[str, ...]) -> None:
    """`--betas` cannot be typed in the released program at all."""
    small = (*SMALL, *words, "--hf-batch", "10", "--gradient-batches", "2", "--lr_orth", "1e-3")
    assert typed(*small, "--name", str(tmp_path / "whole")) == 0
    assert typed(*small, "--name", str(tmp_path / "parts"), "--updates", "2") == 0
    assert typed(*small, "--name", str(tmp_path / "parts"), "--resume") == 0
    whole, parts = (read_run(tmp_path / name) for name in ("whole", "parts"))
    for name, tensor in whole.parameters().items():
        assert torch.equal(tensor, parts.parameters()[name]), name
    assert np.array_equal(whole.steps["train_loss"], parts.steps["train_loss"])
    assert "betas" not in str(words) or whole.configuration["settings"]["betas"] == [0.5, 0.9]


@pytest.mark.parametrize("kind", ["RNN", "RNN-orth", "expRNN", "EURNN", "LSTM"])
def test_every_net_runs_and_is_drawn_and_saved(tmp_path: Path, typed: Any, kind: str) -> None:
    words = (*SMALL, "--net-type", kind, "--onehot", "--vari", "--labels", "3", "--name", str(tmp_path / "run"))
    assert typed(*words, "--save", "best.pt") == 0
    saved = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert len(saved) >= 4
    if kind != "LSTM":
        assert typed(*words, "--picture", str(tmp_path / "a.png")) == 0
        assert (tmp_path / "a.png").stat().st_size > 5_000


def test_the_adding_problem(tmp_path: Path, typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--preset", "rnn-adding", "--c-length", "6", "--nhid", "8", "--updates", "3", "--test-sequences", "5")
    assert typed(*words, "--name", str(tmp_path / "run")) == 0
    assert "the loss without memory is 0.1667" in capsys.readouterr().out


def test_refusals(typed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no preset 'x'; choose from rnn-copy" in typed("--preset", "x")
    assert "n is 12; rotations in the style of the FFT need a power of 2" in typed(
        "--net-type", "EURNN", "--style", "fft", "--nhid", "12"
    )
    assert "n is 7; rotations in the tunable style need an even number" in typed("--net-type", "EURNN", "--nhid", "7")
    assert "n has to be even" in typed("--nhid", "7")
    assert "rinit is 'xavier', which is not orthogonal" in typed("--rinit", "xavier")
    assert "T is 0; copy" in typed("--T", "0")
    assert "labels is 1" in typed("--labels", "1")
    for words, said in {
        ("--lr", "0"): "--lr is 0.0; it is above 0",
        ("--lr_orth", "nan"): "--lr_orth is nan",
        ("--alam", "-1"): "--alam is -1.0; it is at least 0",
        ("--alpha", "1"): "--alpha has 1.0",
        ("--betas", "0.9", "1"): "--betas has 1.0",
        ("--batch", "0"): "--batch is 0",
        ("--updates", "0"): "--updates is 0",
    }.items():
        assert said in typed(*words), words
    if not torch.cuda.is_available():
        assert "there is no CUDA device here" in typed("--cuda")
