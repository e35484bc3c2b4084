"""Hugging Face: models that return their own loss, in a plain loop and in Trainer, whose step() has no closure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hfopt
from tests.hfopt.tools import generator, theta

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # their own advice on loaders and hardware

STEPS, WORDS = 3, 12
TOKENS = torch.randint(0, WORDS, (16, 6), generator=generator(1))
LABELS = torch.arange(16) % 3


def model(kind: str) -> Any:
    """Tiny, drawn from a seed, nothing downloaded."""
    torch.manual_seed(0)
    size = {"vocab_size": WORDS, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "classifier":
        config = transformers.BertConfig(**size, intermediate_size=16, max_position_embeddings=8, num_labels=3)
        return transformers.BertForSequenceClassification(config)
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def data(kind: str) -> list[dict[str, Tensor]]:
    labels = LABELS if kind == "classifier" else TOKENS
    return [{"input_ids": x, "labels": y} for x, y in zip(TOKENS, labels, strict=True)]


def batch(kind: str, rows: slice = slice(None)) -> dict[str, Tensor]:
    return {"input_ids": TOKENS[rows], "labels": (LABELS if kind == "classifier" else TOKENS)[rows]}


def optimizer_of(net: nn.Module) -> hfopt.HessianFree:
    """Trainer shuffles, and K-FAC's draws belong to a case's place in the batch."""
    return hfopt.HessianFree(net.parameters(), cg=hfopt.CG(max_iterations=10), preconditioner=None)


def documented() -> Any:
    """The class that docs/training_loops.md shows."""
    page = Path(__file__).resolve().parents[2] / "docs" / "training_loops.md"
    (block,) = re.findall(
        r"```python\n(class HessianFreeTrainer.*?)\n\n\nsettings = ", page.read_text("utf-8"), re.DOTALL
    )
    scope: dict[str, Any] = {"torch": torch, "transformers": transformers}
    exec(compile(block, str(page), "exec"), scope)
    return scope["HessianFreeTrainer"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and what the libraries set for the whole process is put back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    yield
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()


def trainer(net: Any, kind: str, directory: Path, **options: Any) -> Any:
    settings = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 16,
        "max_steps": STEPS,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 7,
        **options,
    }
    arguments = transformers.TrainingArguments(**settings)
    return documented()(net, arguments, train_dataset=data(kind), optimizers=(optimizer_of(net), None))


@pytest.mark.parametrize("kind", ["classifier", "language"])
def test_the_loss_that_a_model_returns_is_understood(kind: str) -> None:
    net = model(kind).eval()
    optimizer = optimizer_of(net)
    optimizer.step(lambda: net(**batch(kind)).loss)
    first = optimizer.stats[0].loss
    for _ in range(4):
        optimizer.step(lambda: net(**batch(kind)).loss)
    losses = [s.loss for s in optimizer.stats]
    assert losses[0] == first
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.97 * losses[0]


def without_dropout(net: Any) -> Any:
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


@pytest.mark.parametrize("kind", ["classifier", "language"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_trainer_takes_the_steps_of_a_plain_loop(kind: str, accumulated: int, tmp_path: Path) -> None:
    """The whole data in every step, in another order: alike up to rounding."""
    net, twin = without_dropout(model(kind)), without_dropout(model(kind))
    size = len(TOKENS) // accumulated
    run = trainer(net, kind, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
    run.train()
    plain = optimizer_of(twin)
    for _ in range(STEPS):
        plain.step(lambda: twin.train()(**batch(kind)).loss)
    found = [s.loss for s in run.hessian_free.stats]
    assert found == pytest.approx([s.loss for s in plain.stats], rel=1e-3)
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.99 * found[0]
    assert [row["loss"] for row in run.state.log_history if "loss" in row] == pytest.approx(found, rel=1e-3)
    assert torch.allclose(theta(net), theta(twin), rtol=1e-2, atol=1e-3)


def test_trainer_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    """The state of the optimizer is saved with the model's: lambda and CG's start come back."""
    kind = "classifier"
    whole = trainer(model(kind), kind, tmp_path / "whole", max_steps=4)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 2}
    first = trainer(model(kind), kind, tmp_path / "parts", max_steps=2, **options)
    first.train()
    again = trainer(model(kind), kind, tmp_path / "parts", max_steps=4, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert again.hessian_free.steps == 4
    expected = [(s.loss, s.damping, s.cg_iterations) for s in whole.hessian_free.stats]
    assert [(s.loss, s.damping, s.cg_iterations) for s in again.hessian_free.stats] == expected[2:]
    assert torch.equal(theta(again.model), theta(whole.model))


def test_trainer_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    net = model("classifier")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True
    )
    run = transformers.Trainer(net, arguments, train_dataset=data("classifier"), optimizers=(optimizer_of(net), None))
    with pytest.raises(ValueError, match="step\\(\\) needs a closure"):
        run.train()
