"""What the runs on long memory share: their network, two-rate optimizers, roles of batches, and how a run ends."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

import hfopt
from hfopt.experiment import report as words
from hfopt.experiment.driver import HF
from hfopt.experiment.hooks import Callback, ClipGradient, KeepBest
from hfopt.experiment.roles import Forward, on_inputs
from models.parametrisations import parts_of
from runs.long_memory_presets import Published
from runs.settings import described, hints, main, parse, run_name, status
from runs.validated import BEST, report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = TypeVar("P", bound=Published)
LOGS = Path(__file__).parent / "logs"
_NOT_IN_NAMES = ("preset", "net_type", "nhid", "random_seed", "cuda", "save", "save_freq", "log_interval", "updates")


def parsed(default: P, presets: Mapping[str, P], typed: Sequence[str], module: str) -> P:
    """The settings that were typed on top of those of a preset; a wrong preset ends the program with a sentence."""
    name = None
    for word, following in zip(typed, [*typed, ""][1:], strict=True):
        if word == "--preset" or word.startswith("--preset="):
            name = word.partition("=")[2] or following
    if name is not None and name not in presets:
        sys.exit(f"{module}: there is no preset {name!r}; choose from {', '.join(presets)}")
    settings = parse(default if name is None else replace(presets[name], preset=name), typed, module)
    return replace(settings, device="cuda", cuda=False) if settings.cuda and settings.device == "cpu" else settings


def check(settings: Published) -> None:
    """Refuse numbers that make no sense, before anything is built.

    Raises:
        ValueError: a number is out of its range; the message names the option.
    """
    positive = {"lr": settings.lr, "lr_orth": settings.lr_orth, "clip": settings.clip}
    for name, value in positive.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} is {value}; it is above 0")
    for name, value in {"alam": settings.alam, "Tdecay": settings.Tdecay}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"--{name} is {value}; it is at least 0")
    for name, value in {"alpha": settings.alpha, "betas": min(settings.betas), "betas ": max(settings.betas)}.items():
        if not 0 <= value < 1:
            raise ValueError(f"--{name.strip()} has {value}; a decay is from 0 to below 1")
    for name in ("batch", "updates", "epochs", "hf_batch", "gradient_batches", "save_freq", "log_interval", "emsize"):
        count = getattr(settings, name, None)
        if count is not None and count < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {count}; it is at least 1")


def groups(model: nn.Module, settings: Published) -> list[dict[str, Any]]:
    """Parameter groups: the rest and angles; gamma - 1; T; and the orthogonal part with its own learning rate.

    Weight decay 2 delta of gamma - 1 has the gradient of the penalty delta sum (gamma - 1)^2, and leaves the loss that
    is logged alone.
    """
    parts = parts_of(model)
    hf = settings.optimizer == "hf"
    found: list[dict[str, Any]] = [
        {"params": [*parts["rest"], *parts["angle"]], "weight_decay": settings.weight_decay if hf else 0.0},
        {"params": parts["gamma"], "weight_decay": 2 * settings.alam},
        {"params": parts["triangular"], "weight_decay": settings.Tdecay},
        {"params": parts["orthogonal"], "weight_decay": 0.0, **({} if hf else {"lr": settings.lr_orth})},
    ]
    return [group for group in found if group["params"]]


def optimizer(model: nn.Module, settings: Published) -> torch.optim.Optimizer:
    """RMSprop or Adam at two rates, or Hessian-free, which finds its own."""
    found = groups(model, settings)
    if settings.optimizer == "RMSprop":
        return torch.optim.RMSprop(found, lr=settings.lr, alpha=settings.alpha)
    if settings.optimizer == "Adam":
        return torch.optim.Adam(found, lr=settings.lr, betas=settings.betas)
    return hfopt.HessianFree(
        found,
        damping=hfopt.LevenbergMarquardt(initial=settings.damping),
        cg=hfopt.CG(max_iterations=settings.cg_iterations),
        structural_damping=settings.structural,
    )


def batches(settings: Published) -> dict[str, int]:
    """Size and number of the training batches, as the data objects take them."""
    if settings.optimizer == "hf":
        return {"batch_size": settings.hf_batch, "train_batches": settings.gradient_batches}
    return {"batch_size": settings.batch, "train_batches": 1}


def experiment(
    module: str,
    settings: Published,
    preset: Published,
    model: nn.Module,
    problem: Any,
    *,
    pass_length: int | None = None,
    stem: str = "",
    known: Sequence[str] = (),
    forward: Forward = on_inputs,
    callbacks: Iterable[Callback] = (),
    typed: Sequence[str] = (),
    **given: Any,
) -> HF:
    """Build the run.

    Args:
        module: the run file, without `runs.`; every run's name begins with it.
        settings, preset: what was asked for, and what it is compared with for the run's name.
        model, problem: on the device.
        pass_length: minibatches of a pass over the data; None for data without end.
        stem: what else the name begins with.
        known: settings that the stem tells.
        forward, callbacks, given: of the driver.
        typed: the command line.
    """
    hf = settings.optimizer == "hf"
    count = min(settings.gradient_batches, len(problem.train_batches)) if hf else len(problem.train_batches)
    roles: dict[str, Any] = {"gradient_batches": range(count)}
    if hf:
        roles["curvature_batches"] = range(min(settings.curvature_batches, count))
        roles["evaluation_batches"] = range(min(settings.evaluation_batches, count))
    elif count > 1:
        roles["batches_per_step"] = 1
    interval = getattr(settings, "log_interval", None) or (1 if hf else pass_length or 50)
    if hf and pass_length is None:
        interval = max(1, interval // 10)
    updates = settings.updates or getattr(settings, "epochs", 1) * (pass_length or 1)
    clipping = [] if settings.clip is None or hf else [ClipGradient(settings.clip)]
    start = "-".join(filter(None, (module, settings.net_type, str(settings.nhid), stem)))
    return HF(
        LOGS / (settings.name or run_name(start, settings, preset, known=(*_NOT_IN_NAMES, *known))),
        model,
        problem,
        forward=forward,
        optimizer=lambda parameters: optimizer(model, settings),
        callbacks=[KeepBest(name=BEST), *callbacks, *clipping],
        threshold=0,
        max_steps=updates,
        test_freq=interval,
        save_freq=settings.save_freq * (1 if pass_length is None or hf else pass_length),
        keep_checkpoints=1,
        seed=settings.seed,
        settings=described(settings, f"runs.{module}"),
        overwrite=settings.overwrite,
        hints=hints(f"runs.{module}", typed, "spectrum"),
        **roles,
        **given,
    )


def train(module: str, settings: Published, hf: HF, roles: Mapping[str, Any], forward: Forward = on_inputs) -> int:
    """Train or draw, report what the best parameters reach, save them where that was asked for; the exit status."""
    outcome = main(f"runs.{module}", settings, hf, lambda: spectrum(hf.model))
    if outcome not in ("max_steps", "success", "stopped"):
        return status(outcome)
    report(hf, roles, forward)
    if settings.save is not None:
        path = hf.path / settings.save if settings.save.name == str(settings.save) else settings.save
        try:
            with path.open("xb") as file:
                torch.save(hf.model.state_dict(), file)
            print(words.short(path))
        except FileExistsError:
            print(f"runs.{module}: {path} is there already, and was left as it is; --save takes another name")
        except OSError as error:
            print(f"runs.{module}: the parameters could not be saved: {error}", file=sys.stderr)
            return 1
    return 0


def spectrum(model: Any) -> Figure:
    """Draw the eigenvalues of the recurrent matrix in the complex plane, and the entries of its Schur form."""
    from matplotlib import pyplot as plt

    with torch.no_grad():
        W = model.W_hh.double().cpu()
        if W.shape[0] != W.shape[1]:
            raise ValueError("the recurrent matrix is not square, so that it has no spectrum")
        values = torch.linalg.eigvals(W)
        parametrised = getattr(model, "parametrizations", None)
        form = None
        if parametrised is not None and hasattr(parametrised.W_hh[0], "form"):
            free = [getattr(parametrised.W_hh, f"original{k}") for k in range(4)]
            form = parametrised.W_hh[0].form(*free).cpu()
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    circle = torch.linspace(0, 2 * torch.pi, 200)
    axes[0].plot(circle.cos().numpy(), circle.sin().numpy(), color="0.8", linewidth=0.8)
    axes[0].plot(values.real.numpy(), values.imag.numpy(), ".", markersize=4)
    axes[0].set(title="eigenvalues", aspect="equal")
    shown = W if form is None else form
    limit = float(shown.abs().max()) or 1.0
    image = axes[1].imshow(shown.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
    axes[1].set_title("recurrent matrix" if form is None else "Schur form T + Gamma D")
    figure.colorbar(image, ax=axes[1])
    return figure
