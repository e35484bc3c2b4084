"""When CG is recorded into a CUDA graph, when not, and what is left behind; with stand-ins where there is no device."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hfopt
from hfopt.experiment.identity import describe
from hfopt.linalg import cuda_graphs
from hfopt.linalg.cg import CG
from hfopt.linalg.cuda_graphs import Attempts, Origin, Recording, nodes_of, obstacle, recording, side_stream
from hfopt.linalg.solution import Solution
from tests.hfopt.linalg.test_cg import Matrix
from tests.hfopt.tools import mlp, randn, spd

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
KIND = (Matrix, 3)


class Device:
    """Stands in for torch.cuda's recording; ``breaks`` is raised at the end of one."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.breaks: RuntimeError | None = None
        self.sync_mode = 0
        self.work: list[str] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class CUDAGraph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                assert pool == (0, 7)
                assert not gc.isenabled()
                device.events.append(f"begin {capture_error_mode}")

            def capture_end(self) -> None:
                device.events.append("end")
                if device.breaks is not None:
                    raise device.breaks

            def replay(self) -> None:
                device.events.append("replay")

            def reset(self) -> None:
                device.events.append("reset")

        generator = SimpleNamespace(clone_state=lambda: "copy", graphsafe_set_state=self.note("generator {}"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
        monkeypatch.setattr(torch.cuda, "MemPool", lambda: SimpleNamespace(id=(0, 7)))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.note("pool {} {}"), raising=False)
        monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: self.sync_mode)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)

    def note(self, text: str) -> Callable[..., None]:
        return lambda *args: self.events.append(text.format(*args))

    def set_mode(self, mode: int | str) -> None:
        if mode == "warn":
            warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=2)
        self.sync_mode = {"warn": 1}.get(str(mode), mode)  # type: ignore[assignment]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    device.install(monkeypatch)
    yield device
    assert gc.isenabled()
    assert device.sync_mode == 0


def test_a_recording_is_made_repeated_and_released(fake: Device) -> None:
    recorder = Recording(Attempts(), KIND, required=False)
    again = recorder.record(lambda: fake.events.append("work"))
    assert again is not None
    again()
    again()
    recorder.close()
    recorder.close()
    assert fake.events == ["begin thread_local", "work", "end", "replay", "replay", "reset"]


def test_work_that_raises_ends_the_recording(fake: Device, caplog: pytest.LogCaptureFixture) -> None:
    def work() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    attempts = Attempts()
    assert Recording(attempts, KIND, required=False).record(work) is None
    assert fake.events == ["begin thread_local", "end", "reset"]
    assert attempts.refused == "RuntimeError: operation not permitted when stream is capturing"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert caplog.messages == [f"CG runs without a CUDA graph: {attempts.refused}"]
    with pytest.raises(RuntimeError, match=r"cuda_graphs is True.*not permitted"):
        Recording(Attempts(), KIND, required=True).record(work)
    with pytest.raises(KeyError):  # no failure of recording, but of the work
        Recording(Attempts(), KIND, required=False).record(lambda: {}["missing"])


def test_a_recording_that_has_become_invalid_is_tidied_up(fake: Device) -> None:
    fake.breaks = RuntimeError("operation failed due to a previous error during capture")
    attempts = Attempts()
    assert Recording(attempts, KIND, required=False).record(lambda: None) is None
    assert fake.events == ["begin thread_local", "end", "generator copy", "pool 0 (0, 7)", "reset"]
    assert attempts.refused is not None
    assert "previous error" in attempts.refused


def test_work_that_waits_is_not_recorded(fake: Device, caplog: pytest.LogCaptureFixture) -> None:
    done = []

    def work() -> None:
        done.append(fake.sync_mode)
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    attempts = Attempts()
    recorder = Recording(attempts, KIND, required=False)
    with pytest.warns(UserWarning, match="something else") as seen:
        recorder.watch(work)
    assert len(seen) == 1
    assert done == [1]
    assert recorder.record(work) is None
    assert done == [1]
    assert fake.events == []
    assert attempts.refused is not None
    assert "waits for the device" in attempts.refused
    assert "test_cuda_graphs.py" in attempts.refused
    assert len(caplog.records) == 1
    proven = Recording(Attempts(proven={KIND}), KIND, required=False)
    proven.watch(lambda: done.append(fake.sync_mode))
    assert done == [1, 0]  # watched once is enough


def test_reasons_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    attempts = Attempts(refused="because")
    b = torch.zeros(3)
    for _ in range(3):
        with recording(Matrix(torch.eye(3)), b, "auto", attempts) as recorder:
            assert recorder is None
    assert len(caplog.records) == 1
    with pytest.raises(RuntimeError, match="because"), recording(Matrix(torch.eye(3)), b, True, attempts):
        raise AssertionError("not reached")
    caplog.clear()
    with recording(Matrix(torch.eye(3)), b, False, attempts) as recorder:
        assert recorder is None
    assert not caplog.records


def test_recorders_are_closed_whatever_happens(fake: Device) -> None:
    def fails() -> None:
        with recording(Matrix(torch.eye(3)), torch.zeros(3), "auto", Attempts()) as recorder:
            assert recorder is not None
            recorder.record(lambda: None)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert fake.events[-1] == "reset"


def loss_of(model: nn.Module) -> Tensor:
    return F.mse_loss(model(randn(8, 3, seed=1)), randn(8, 2, seed=2))


@pytest.mark.parametrize("policy", ["linearize", "recompute"])
def test_policies_that_run_the_model_again_are_not_recorded(policy: str) -> None:
    model = mlp(3, 4, 2, seed=3)
    op = hfopt.GaussNewton(lambda: loss_of(model), model.parameters(), linearisation=policy)
    assert policy in str(obstacle(op.damped(0.1).damped(0.2)))


def test_operators_of_another_stream_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp(3, 4, 2, seed=3)
    op = hfopt.GaussNewton(lambda: loss_of(model), model.parameters())
    assert op.origin is None  # nothing is noted on a CPU
    assert obstacle(op.damped(0.1)) is None
    assert obstacle(Matrix(torch.eye(3))) is None
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    for origin, words in (
        (Origin(5, False, ()), None),
        (Origin(0, False, ()), "side_stream"),
        (Origin(5, True, ()), "another graph"),
    ):
        op.origin = origin
        found = obstacle(op.damped(0.1))
        assert found is None if words is None else words in str(found)


def test_graphs_that_are_alive_are_noticed() -> None:
    model = mlp(3, 4, 2, seed=3)
    params = list(model.parameters())
    first = nodes_of(params, 5)
    assert not first.shared
    assert len(first.nodes) == len(params)
    loss = loss_of(model)  # on the stream for which the nodes were marked
    del first
    assert not nodes_of(params, 5).shared
    assert nodes_of(params, 6).shared
    del loss
    assert not nodes_of(params, 6).shared
    other = loss_of(model)
    for _ in range(2):
        assert nodes_of(params, 6).shared  # its nodes were made on an unknown stream
    del other
    gc.collect()
    assert not nodes_of(params, 6).shared
    # What is no leaf has no such node, and what is frozen no node at all.
    assert nodes_of([params[0] * 2, torch.zeros(3)], 5).nodes == ()


def test_streams_are_a_matter_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: pytest.fail("a CPU has no streams"))
    with side_stream(torch.device("cpu")):
        pass
    assert cuda_graphs.origin([torch.zeros(3)]) is None


def test_settings() -> None:
    a, b = spd([1.0, 2.0], seed=1), randn(2, seed=2)
    for option in ("auto", False):
        assert CG(cuda_graphs=option).solve(Matrix(a), b).reason == "residual"
    with pytest.raises(ValueError, match="cuda_graphs is True, but the right-hand side b is on cpu"):
        CG(cuda_graphs=True).solve(Matrix(a), b)
    with pytest.raises(ValueError, match="cuda_graphs is 'always'"):
        CG(cuda_graphs="always")
    # No setting of the mathematics: a run may be continued with another.
    assert CG(cuda_graphs=False) == CG()
    assert "cuda_graphs" not in describe(CG())
    assert describe(CG())["max_iterations"] == 250


# -- on a device -------------------------------------------------------------------------------------------------------


def on_cuda(
    options: dict[str, Any], n: int = 200, dtype: torch.dtype = torch.float64, kind: type[Matrix] = Matrix
) -> tuple[Solution, CG]:
    a = spd(torch.logspace(0, -3, n, dtype=torch.float64), seed=16).to(dtype)
    b = randn(n, seed=17).to(dtype)
    cg = CG(**options)
    return cg.solve(kind(a.cuda()), b.cuda(), None, lambda r: 0.5 * r), cg


@needs_cuda
@pytest.mark.parametrize("option", [False, True])
def test_cuda_equals_cpu(option: bool) -> None:
    a, b = spd(torch.logspace(0, -3, 200, dtype=torch.float64), seed=16), randn(200, seed=17)
    limits = {"max_iterations": 25, "tolerance": 0.0}  # beyond, rounding takes any two runs of CG apart
    expected = CG(**limits).solve(Matrix(a), b, None, lambda r: 0.5 * r)
    ours, cg = on_cuda({**limits, "cuda_graphs": option})
    assert (ours.reason, ours.iterations) == (expected.reason, expected.iterations)
    assert float((ours.x.cpu() - expected.x).norm()) < 1e-10 * float(expected.x.norm())
    assert [i.iteration for i in ours.iterates] == [i.iteration for i in expected.iterates]
    for mine, other in zip(ours.iterates, expected.iterates, strict=True):
        assert mine.phi == pytest.approx(other.phi, rel=1e-10)
    assert bool(cg._attempts.proven) == option


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recorded_equals_launched(dtype: torch.dtype) -> None:
    recorded, cg = on_cuda({"tolerance": 1e-5, "cuda_graphs": True}, dtype=dtype)
    launched, _ = on_cuda({"tolerance": 1e-5, "cuda_graphs": False}, dtype=dtype)
    assert cg._attempts.proven
    assert (recorded.reason, recorded.iterations) == (launched.reason, launched.iterations)
    assert torch.equal(recorded.x, launched.x)
    assert recorded.checks == launched.checks


class Waits(Matrix):
    """A product that looks at its result."""

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        product = super().multiply(v, out)
        assert float(product[0]) < 1e300
        return product


class WaitsUnseen(Matrix):
    """One that waits in a way that only shows while it is recorded, and makes the recording invalid."""

    def multiply(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        product = super().multiply(v, out)
        torch.cuda.synchronize()
        return product


@needs_cuda
@pytest.mark.parametrize("kind", [Waits, WaitsUnseen])
def test_products_that_wait_are_launched(kind: type[Matrix], caplog: pytest.LogCaptureFixture) -> None:
    expected, _ = on_cuda({"cuda_graphs": False})
    state = torch.cuda.get_rng_state()
    ours, cg = on_cuda({}, kind=kind)
    assert torch.equal(ours.x, expected.x)
    assert len(caplog.records) == 1
    assert "CG runs without a CUDA graph" in caplog.messages[0]
    assert cg._attempts.refused is not None
    # Nothing is left of the attempt: the generator draws as before, and another solve is recorded.
    torch.cuda.set_rng_state(state)
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    assert torch.equal(on_cuda({"cuda_graphs": True})[0].x, expected.x)
    with pytest.raises(RuntimeError, match="cuda_graphs is True"):
        on_cuda({"cuda_graphs": True}, kind=kind)


@needs_cuda
@pytest.mark.parametrize("option", [False, True])
def test_cuda_never_waits_between_checks(option: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfopt.linalg.cg_device import DeviceCG

    def silent(name: str) -> Callable[..., Any]:
        method = getattr(DeviceCG, name)

        def called(self: DeviceCG, *args: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(self, *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return called

    x, y = randn(30, 6, seed=1).cuda(), randn(30, 4, seed=2).cuda()
    model = mlp(6, 8, 4, seed=3).cuda()
    with side_stream(x.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        op = hfopt.GaussNewton(lambda: F.mse_loss(model(x), y), model.parameters())
        cg = CG(tolerance=0.0, residual=0.0, max_iterations=50, cuda_graphs=option)
        cg.solve(op.damped(0.1), -op.gradient)  # proves the recording, with looks at the device
        for name in ("advance", "settle"):
            monkeypatch.setattr(DeviceCG, name, silent(name))
        assert cg.solve(op.damped(0.1), -op.gradient).iterations == 50


@needs_cuda
@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_steps_are_recorded(curvature: str) -> None:
    """A whole step on a device: recorded, the same as launched, and close to the CPU's."""
    losses = []
    for device, option in (("cpu", "auto"), ("cuda", False), ("cuda", True)):
        model = mlp(6, 8, 4, seed=3).to(device)
        x, y = randn(30, 6, seed=1).to(device), randn(30, 4, seed=2).to(device)
        cg = CG(max_iterations=30, cuda_graphs=option)
        optimizer = hfopt.HessianFree(model.parameters(), curvature=curvature, damping=5.0, cg=cg)
        for _ in range(3):
            optimizer.step(lambda model=model, x=x, y=y: F.mse_loss(model(x), y))
        losses.append([s.new_loss for s in optimizer.stats])
        assert bool(cg._attempts.proven) == (option is True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert losses[2] == pytest.approx(losses[1], rel=1e-12)


@needs_cuda
def test_a_graph_from_elsewhere_stands_in_the_way() -> None:
    model = mlp(6, 8, 4, seed=3).cuda()
    x, y = randn(30, 6, seed=1).cuda(), randn(30, 4, seed=2).cuda()
    optimizer = hfopt.HessianFree(model.parameters(), cg=CG(cuda_graphs=True))
    loss = F.mse_loss(model(x), y)
    with pytest.raises(RuntimeError, match="another graph"):
        optimizer.step(lambda: F.mse_loss(model(x), y))
    del loss
    gc.collect()  # what the error's traceback holds
    optimizer.step(lambda: F.mse_loss(model(x), y))
    op = hfopt.GaussNewton(lambda: F.mse_loss(model(x), y), model.parameters())
    with pytest.raises(RuntimeError, match="side_stream"):
        CG(cuda_graphs=True).solve(op.damped(0.1), -op.gradient)


@needs_cuda
def test_a_recording_gives_its_memory_back() -> None:
    def solve() -> None:
        model, x = mlp(500, 500, 10, seed=3).cuda(), randn(2000, 500, seed=1).cuda()
        optimizer = hfopt.HessianFree(model.parameters(), cg=CG(cuda_graphs=True, max_iterations=12))
        optimizer.step(lambda: F.mse_loss(model(x), x[:, :10]))

    solve()
    taken = []
    for _ in range(4):
        gc.collect()
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved())
        solve()
    assert taken[-1] <= taken[0]
