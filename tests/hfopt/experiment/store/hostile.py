"""Reads damaged and crafted runs, one after the other, in a process of its own, and says what came of each.

    python -m tests.hfopt.experiment.store.hostile FOLDER_OF_A_GOOD_RUN WORK_FOLDER

The result is JSON: per case its name, the seconds it took and what happened ("refused", "same", "other", or the name
of an exception that is none of hfopt's), and by how many bytes the process grew.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hfopt.experiment.pages import contents as pages
from hfopt.experiment.store.format import RunError
from hfopt.experiment.store.reader import read_run
from tests.hfopt.experiment.store import test_damage as damage

Change = Callable[[Path], None]
CHANGED_BYTES, TRUNCATIONS = 300, 200


def everything(folder: Path) -> Any:
    """All that a run's files say, recorded frames and the page's data among it."""
    run = read_run(folder)
    frames = {
        name: [(step, {key: array.tobytes() for key, array in frame.items()}) for step, frame in recorded.frames()]
        for name, recorded in run.recorded.items()
    }
    pages.contents(run, "run")
    return damage.contents(folder), frames


def files(folder: Path) -> list[Path]:
    """The files whose contents count; the two text logs are for people."""
    kinds = ("run.h5", "journal-*.jsonl", "checkpoints/*.h5", "recorded/*.h5")
    return [path.relative_to(folder) for kind in kinds for path in sorted(folder.glob(kind))]


def changed_bytes(good: Path) -> Iterator[tuple[str, Change]]:
    """Single bytes at random places of all files."""
    chance, names = np.random.default_rng(0), files(good)
    for number in range(CHANGED_BYTES):
        name = names[number % len(names)]
        place, bit = int(chance.integers((good / name).stat().st_size)), int(chance.integers(8))

        def change(folder: Path, name: Path = name, place: int = place, bit: int = bit) -> None:
            data = bytearray((folder / name).read_bytes())
            data[place] ^= 1 << bit
            (folder / name).write_bytes(data)

        yield f"byte {place} of {name}", change


def truncations(good: Path) -> Iterator[tuple[str, Change]]:
    """All files cut at random lengths."""
    chance, names = np.random.default_rng(1), files(good)
    for number in range(TRUNCATIONS):
        name = names[number % len(names)]
        length = int(chance.integers((good / name).stat().st_size))

        def change(folder: Path, name: Path = name, length: int = length) -> None:
            (folder / name).write_bytes((folder / name).read_bytes()[:length])

        yield f"{name} cut to {length}", change


def crafted(good: Path) -> Iterator[tuple[str, Change]]:
    """Files whose checksums are right and whose contents are not."""
    checkpoint = f"checkpoints/{read_run(good).find().key}.h5"
    frames = next(name for name in files(good) if name.parts[0] == "recorded")
    of_frames: dict[str, Callable[[Any], None]] = {
        **{f"{name} is huge": damage.huge(name) for name in ("hidden", "step", "about", "constant")},
        **{f"{name} is gone": damage.replace(name, None) for name in ("step", "about", "constant")},
        **{f"{name} is elsewhere": damage.external(name) for name in ("hidden", "step", "about")},
        **{
            f"{name} is a link": damage.link(name, h5py.ExternalLink("/etc/passwd", "/")) for name in ("hidden", "step")
        },
        **{f"{name} is text": damage.replace(name, "text") for name in ("hidden", "step", "about", "constant")},
        "about is a list": damage.text("about", []),
        "about is deep": damage.replace("about", np.frombuffer(b"[" * 50_000, np.uint8)),
        "other steps": damage.replace("step", np.array([9, 3])),
        "a bomb": damage.replace("hidden", np.zeros((10**4, 10**4), np.uint8), compression="gzip", chunks=True),
    }
    for name, changes in (("run.h5", damage.CHANGES), (checkpoint, damage.STATES), (str(frames), of_frames)):
        for what, change in changes.items():
            yield f"{name}: {what}", lambda folder, name=name, change=change: damage.crafted(folder / name, change)
    yield "a text file", lambda folder: (folder / "run.h5").write_text("{}")  # type: ignore[misc]
    yield "a picture", lambda folder: (folder / "run.h5").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(999))  # type: ignore[misc]
    yield "newer", lambda folder: newer(folder / "run.h5")  # type: ignore[misc]


def newer(path: Path) -> None:
    """A run of the next format version."""
    data = path.read_bytes()
    damage.sealed.write_sealed(path, {"kind": "run", "version": 3}, [data[damage.sealed.BLOCK :]])


def main(good: Path, work: Path) -> dict[str, Any]:
    """Read all, and say what came of it."""
    expected = everything(good)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, list[tuple[str, float, str, str]]] = {}
    for kind in (changed_bytes, truncations, crafted):
        found[kind.__name__] = []
        for what, change in kind(good):
            folder = work / "run"
            shutil.copytree(good, folder)
            change(folder)
            began, said = time.process_time(), ""
            try:
                outcome = "same" if everything(folder) == expected else "other"
            except RunError as error:
                outcome, said = "refused", str(error)
            except Exception as error:
                outcome, said = type(error).__name__, str(error)
            found[kind.__name__].append((what, time.process_time() - began, outcome, said))
            shutil.rmtree(folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"cases": found, "grown": 1024 * grown}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
