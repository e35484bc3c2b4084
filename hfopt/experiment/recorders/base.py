"""The base of recorders, and what the driver does with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hfopt.experiment.generators import untouched_generators
from hfopt.experiment.hooks import Experiment
from hfopt.experiment.roles import evaluating
from hfopt.experiment.store.recorded import NAME, Frame, FrameWriter


class Recorder:
    """The base of a recorder: override `record`, and what else is needed; `hf` is the experiment.

    A frame is a function of the experiment's state before an update and of nothing else, so that a resumed run has the
    frames of an uninterrupted one. While it is taken, the model is in evaluation mode, and torch's generators are put
    back afterwards. A recorder that needs random numbers takes a generator of its own, seeded by `hf.step`.

    Args:
        every: a frame is taken before every so many updates, and of the last state of a run.
        name: of the frames in `run.recorded`; by default that of the class.

    Raises:
        ValueError: `every` below 1, or a name that is not of the characters a-z, 0-9 and _.
    """

    name = "frames"

    def __init__(self, every: int, name: str | None = None) -> None:
        if every < 1 or every != int(every):
            raise ValueError(f"{type(self).__name__}: every={every} must be an integer of at least 1")
        self.every = every
        self.name = self.name if name is None else name
        if not NAME.fullmatch(self.name):
            raise ValueError(f"{type(self).__name__}: name={self.name!r} must be of a-z, 0-9 and _, and begin with a-z")

    def due(self, step: int) -> bool:
        """Whether there is a frame before update `step`."""
        return step % self.every == 0

    def attach(self, hf: Experiment) -> None:
        """Once, when the experiment has been built; raises ValueError for one that it cannot record."""

    def record(self, hf: Experiment) -> Mapping[str, Any]:
        """The arrays of one frame by name, or what numpy makes arrays of."""
        raise NotImplementedError

    def constant(self, hf: Experiment) -> Mapping[str, Any]:
        """Arrays that are the same in all frames, such as the inputs."""
        return {}

    def about(self, hf: Experiment) -> dict[str, Any]:
        """What the arrays are: a `title`, and under `arrays` the `label`, `unit` and `axes` of each."""
        return {"title": self.name, "arrays": {}}


def taken(recorder: Recorder, hf: Experiment) -> tuple[Frame, dict[str, Any]]:
    """A frame of an experiment as it is now, with what is constant, and what its arrays are; nothing is written."""
    with untouched_generators(), evaluating(hf.model), evaluating(hf.tested):
        return {**recorder.constant(hf), **recorder.record(hf)}, recorder.about(hf)


class Recorders:
    """All recorders of an experiment; a name that occurs again gets a number."""

    def __init__(self, recorders: Iterable[Any]) -> None:
        self.named: dict[str, Recorder] = {}
        self._constant: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
        for recorder in recorders:
            if not isinstance(recorder, Recorder):
                kind = recorder.__name__ if isinstance(recorder, type) else type(recorder).__name__
                raise TypeError(f"record: {kind} is no recorder; give one such as hfopt.HiddenStates(every=10)")
            name, number = recorder.name, 2
            while name in self.named:
                name, number = f"{recorder.name}_{number}", number + 1
            self.named[name] = recorder

    def attach(self, hf: Experiment) -> None:
        """Tell the recorders of the experiment."""
        for recorder in self.named.values():
            recorder.attach(hf)

    def keep(self, hf: Experiment, frames: FrameWriter, *, closing: bool = False) -> None:
        """Take and write the frames that are due before the update that comes next; at the end, those of all others.

        Frames of this step and of later ones, which the run had before it was taken back, are dropped.

        Raises:
            WriteError: there is no room, or no permission; nothing of the experiment has changed.
        """
        if not closing:
            frames.drop_from(hf.step)
        due = {name: r for name, r in self.named.items() if bool(r.due(hf.step)) != closing}
        if not due:
            return
        with untouched_generators(), evaluating(hf.model), evaluating(hf.tested):
            for name, recorder in due.items():
                if name not in self._constant:
                    self._constant[name] = recorder.constant(hf), recorder.about(hf)
                frames.write(name, hf.step, recorder.record(hf), *self._constant[name])
