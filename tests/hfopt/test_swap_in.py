"""A script written for LBFGS trains with only the line of the optimizer changed."""

from __future__ import annotations

from typing import Any

import pytest

# What a user has: the model's line and the optimizer's line vary, everything else is the same text.
SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
{data}
{model}
criterion = {criterion}
{optimizer}

losses = []
for step in range({steps}):
    def closure():
        optimizer.zero_grad()
        output = model(x)
        loss = criterion(output, y)
        loss.backward()
        return loss
    losses.append(float(optimizer.step(closure).detach()))
"""
LBFGS = "optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn='strong_wolfe')"
OURS = "import hfopt; optimizer = hfopt.HessianFree(model.parameters())"

LAST = """
class Last(nn.Module):
    def __init__(self, recurrence):
        super().__init__()
        self.recurrence, self.readout = recurrence, nn.Linear(12, 2)

    def forward(self, x):
        states, _ = self.recurrence(x)
        return self.readout(states[:, -1])
"""
SEQUENCES = "x = torch.randn(40, 8, 3); y = (x[:, 0, 0] * x[:, -1, 1] > 0).long()" + LAST
IMAGES = "x = torch.randn(40, 1, 8, 8); y = (x[:, 0, :4].mean((1, 2)) > x[:, 0, 4:].mean((1, 2))).long()"
TOKENS = "x = torch.randn(24, 6, 8); y = x.roll(1, dims=1) * x[:, :1]"
ENCODER = "nn.TransformerEncoderLayer(8, 2, 16, dropout={}, batch_first=True{})"
MODELS: dict[str, tuple[str, str, str]] = {
    "mlp": (
        "x = torch.randn(60, 4); y = torch.sin(2 * x[:, :2]) * x[:, 2:]",
        "nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 2))",
        "nn.MSELoss()",
    ),
    "relu-mlp": (
        "x = torch.randn(60, 4); y = (x[:, 0] * x[:, 1] > 0).float().unsqueeze(1)",
        "nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 1))",
        "nn.BCEWithLogitsLoss()",
    ),
    "cnn": (
        IMAGES,
        "nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(16, 2))",
        "nn.CrossEntropyLoss()",
    ),
    "cnn-batchnorm": (
        IMAGES,
        "nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Flatten(), nn.Linear(216, 2))",
        "nn.CrossEntropyLoss()",
    ),
    "transformer": (TOKENS, ENCODER.format(0.0, ""), "nn.MSELoss()"),
    "transformer-gelu-prenorm": (TOKENS, ENCODER.format(0.0, ", activation='gelu', norm_first=True"), "nn.HuberLoss()"),
    "rnn": (SEQUENCES, "Last(nn.RNN(3, 12, batch_first=True))", "nn.CrossEntropyLoss()"),
    "lstm": (SEQUENCES, "Last(nn.LSTM(3, 12, batch_first=True))", "nn.CrossEntropyLoss()"),
    "gru": (SEQUENCES, "Last(nn.GRU(3, 12, batch_first=True))", "nn.CrossEntropyLoss()"),
    "embedding": (
        "x = torch.randint(0, 10, (50, 3)); y = x.sum(1) % 3",
        "nn.Sequential(nn.Embedding(10, 6), nn.Flatten(), nn.Tanh(), nn.Linear(18, 3), nn.LogSoftmax(1))",
        "nn.NLLLoss()",
    ),
}


def run(name: str, optimizer: str, steps: int) -> dict[str, Any]:
    data, model, criterion = MODELS[name]
    text = SCRIPT.format(data=data, model=f"model = {model}", criterion=criterion, optimizer=optimizer, steps=steps)
    scope: dict[str, Any] = {}
    exec(compile(text, name, "exec"), scope)
    return scope


@pytest.mark.parametrize("name", MODELS)
def test_the_script_trains(name: str) -> None:
    script = run(name, OURS, 15)
    losses = script["losses"]
    assert losses[-1] < 0.5 * losses[0]
    optimizer = script["optimizer"]
    assert [s.loss for s in optimizer.stats] == pytest.approx(losses)
    assert all(s.linearisation == "double-backward" for s in optimizer.stats)


@pytest.mark.parametrize("name", ["mlp", "gru"])
def test_the_script_is_one_that_lbfgs_runs(name: str) -> None:
    """The same text with its own line: it starts from the same loss and trains too."""
    theirs, ours = run(name, LBFGS, 10)["losses"], run(name, OURS, 1)["losses"]
    assert theirs[0] == pytest.approx(ours[0], rel=1e-6)
    assert theirs[-1] < theirs[0]
