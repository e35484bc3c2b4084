"""Lightning: automatic optimization hands its closure to step(), which runs the training step again as it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hfopt
from tests.hfopt.tools import mlp, randn, theta

pytestmark = pytest.mark.slow

X, Y = randn(32, 3, seed=1, dtype=torch.float32), randn(32, 2, seed=2, dtype=torch.float32)
STEPS = 6


@pytest.mark.filterwarnings("ignore")  # Lightning's own advice on loaders, loggers and hardware
def test_the_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")  # takes seconds to import, which not every run of the tests should pay

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(mlp(3, 6, seed=3, dtype=torch.float32), nn.Tanh(), nn.Linear(6, 2))
            nn.init.constant_(self.net[2].weight, 0.1)
            nn.init.zeros_(self.net[2].bias)

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return F.mse_loss(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return hfopt.HessianFree(self.net.parameters())

    module, twin = Module(), Module()
    trainer = lightning.Trainer(
        max_epochs=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size=32))
    optimizer = hfopt.HessianFree(twin.net.parameters())
    for _ in range(STEPS):
        optimizer.step(lambda: F.mse_loss(twin.net(X), Y))
    assert len(trainer.optimizers[0].stats) == STEPS
    assert torch.allclose(theta(module.net), theta(twin.net), rtol=1e-4, atol=1e-5)
    assert optimizer.stats[-1].new_loss < 0.8 * optimizer.stats[0].loss
