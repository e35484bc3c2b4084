"""Step hooks, and hooks around saved states, as for every optimizer of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

import hfopt
from tests.hfopt.tools import mlp, randn, theta

X, Y = randn(20, 3, seed=1), randn(20, 2, seed=2)


def test_step_hooks_run_once_a_step_and_change_nothing() -> None:
    model, twin = mlp(3, 4, 2, seed=3), mlp(3, 4, 2, seed=3)
    ours, plain = hfopt.HessianFree(model.parameters()), hfopt.HessianFree(twin.parameters())
    seen: list[Any] = []
    ours.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append(("before", theta(model))))
    ours.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(("after", theta(model))))
    for _ in range(3):
        start = theta(model)
        ours.step(lambda: F.mse_loss(model(X), Y))
        plain.step(lambda: F.mse_loss(twin(X), Y))
        assert [name for name, _ in seen] == ["before", "after"]
        assert torch.equal(seen[0][1], start)
        assert torch.equal(seen[1][1], theta(model))
        assert torch.equal(theta(model), theta(twin))
        seen.clear()


def test_a_pre_hook_may_exchange_the_closure() -> None:
    model, twin = mlp(3, 4, 2, seed=4), mlp(3, 4, 2, seed=4)
    ours, plain = hfopt.HessianFree(model.parameters()), hfopt.HessianFree(twin.parameters())
    ours.register_step_pre_hook(lambda o, args, kwargs: ((args[0], lambda: F.huber_loss(model(X), Y)), kwargs))
    ours.step(lambda: F.mse_loss(model(X), Y))
    plain.step(lambda: F.huber_loss(twin(X), Y))
    assert torch.equal(theta(model), theta(twin))


def test_hooks_around_states() -> None:
    model = mlp(3, 4, 2, seed=5)
    optimizer = hfopt.HessianFree(model.parameters())
    optimizer.step(lambda: F.mse_loss(model(X), Y))
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saving", "loaded"]
