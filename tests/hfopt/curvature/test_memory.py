"""Memory that is free: the machine's, within the limits of control groups and of the address space."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hfopt
from hfopt.curvature import memory

MIB = 1 << 20
CPU = torch.device("cpu")


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A machine with 1,000 MiB free and no limit: (proc, the root of control groups)."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    write(proc, meminfo=f"MemTotal: 2048000 kB\nMemAvailable:    {1000 * 1024} kB")
    write(proc / "self", status="VmSize:	  500 kB", cgroup="0::/")
    root.mkdir()
    monkeypatch.setattr(memory, "_PROC", proc)
    monkeypatch.setattr(memory, "_CGROUPS", root)
    return proc, root


def test_without_limits_it_is_what_the_machine_has(places: tuple[Path, Path]) -> None:
    proc, root = places
    assert memory.available_bytes(CPU) == 1000 * MIB
    write(root, memory__max="max", memory__current=100 * MIB)
    assert memory.available_bytes(CPU) == 1000 * MIB
    (proc / "meminfo").unlink()  # another system
    assert memory.available_bytes(CPU) == 1 << 62


def test_a_container_of_version_2(places: tuple[Path, Path]) -> None:
    """In its own namespace the group is the root; cached files count as free."""
    _, root = places
    write(root, memory__max=300 * MIB, memory__current=120 * MIB, memory__stat=f"anon 5\ninactive_file {50 * MIB}")
    assert memory.available_bytes(CPU) == (300 - 120 + 50) * MIB
    write(root, memory__current=400 * MIB, memory__stat="anon 5")
    assert memory.available_bytes(CPU) == 0


def test_the_least_of_all_levels_counts(places: tuple[Path, Path]) -> None:
    """As for a batch job: its slice, the job, and a step of it."""
    proc, root = places
    write(proc / "self", cgroup="0::/slurm/job_7/step_0")
    write(root / "slurm", memory__max=900 * MIB, memory__current=500 * MIB)
    write(root / "slurm" / "job_7", memory__max=250 * MIB, memory__current=100 * MIB)
    write(root / "slurm" / "job_7" / "step_0", memory__max="max", memory__current=90 * MIB)
    assert memory.available_bytes(CPU) == 150 * MIB


@pytest.mark.parametrize("inside", [True, False])
def test_a_container_of_version_1(places: tuple[Path, Path], inside: bool) -> None:
    """Inside, the path in /proc is the host's and not there; the controller's own root is the container's group."""
    proc, root = places
    write(proc / "self", cgroup="9:name=systemd:/docker/abc\n4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/x")
    folder = root / "memory" if inside else root / "memory" / "docker" / "abc"
    write(root / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=700 * MIB)
    write(
        folder,
        memory__limit_in_bytes=200 * MIB,
        memory__usage_in_bytes=80 * MIB,
        memory__stat=f"inactive_file 7\ntotal_inactive_file {30 * MIB}",
    )
    assert memory.available_bytes(CPU) == 150 * MIB


def test_a_limit_of_the_address_space(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    proc, _ = places
    write(proc / "self", status=f"Name: python\nVmSize:	{300 * 1024} kB")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (500 * MIB, resource.RLIM_INFINITY))
    assert memory.available_bytes(CPU) == 200 * MIB


def test_the_choice_of_a_linearisation_heeds_it(places: tuple[Path, Path]) -> None:
    """A graph that fits into the machine but not into the container is not kept."""
    _, root = places
    write(root, memory__max=MIB, memory__current=MIB - 10_000)
    model = torch.nn.Linear(200, 40)
    x, y = torch.ones(300, 200), torch.ones(300, 40)
    with pytest.warns(UserWarning, match="over the budget of 7.8 KiB"):
        op = hfopt.GaussNewton(lambda: torch.nn.functional.mse_loss(model(x).tanh(), y), model.parameters())
    assert op.linearisation.name == "recompute"
