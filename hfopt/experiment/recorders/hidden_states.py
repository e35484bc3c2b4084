"""Hidden states of fixed test sequences over training."""

from __future__ import annotations

from typing import Any

from hfopt.experiment.hooks import Experiment
from hfopt.experiment.recorders.base import Recorder
from hfopt.experiment.recorders.sequences import (
    States,
    as_array,
    batch_dim,
    first_sequences,
    has_states,
    predictions,
    states_and_outputs,
)
from hfopt.experiment.store.recorded import Frame


class HiddenStates(Recorder):
    """Hidden states, inputs, predictions and targets of the first test sequences.

    Arrays of a frame, with S sequences last: `hidden` (T, units, S), `inputs` (T, V, S), `outputs` (T, O, S) after the
    output nonlinearity, `targets` as the problem has them, `scored` (T, S) which predictions count, `lengths` (S,).
    The last two are there if the batches have `mask` and `lengths`.

    Args:
        every: a frame is taken before every so many updates.
        sequences: how many there are; their states take ``4 T units S`` bytes a frame.
        states: hidden states (T, B, units) of (model, batch); by default the model's `hidden_states(inputs)`, or the
            output of its last recurrent layer of torch.
        name: of the frames in `run.recorded`.

    Raises:
        ValueError: when the experiment is built: there is nothing that gives hidden states.
    """

    name = "hidden_states"

    def __init__(
        self, every: int = 10, sequences: int = 8, states: States | None = None, name: str | None = None
    ) -> None:
        super().__init__(every, name)
        if sequences < 1:
            raise ValueError(f"HiddenStates: sequences={sequences} must be at least 1")
        self.sequences, self._states = sequences, states

    def attach(self, hf: Experiment) -> None:
        """Refuse a model whose hidden states cannot be found."""
        if self._states is None and not has_states(hf.model):
            raise ValueError(
                f"HiddenStates: {type(hf.model).__name__} has neither a method hidden_states(inputs) nor a recurrent "
                "layer of torch; give states=, a function of (model, batch) that returns them (T, B, units)"
            )

    def _batch(self, hf: Experiment) -> Any:
        return first_sequences(hf.problem(hf.problem.test_batches[0]), self.sequences, batch_dim(hf.model))

    def record(self, hf: Experiment) -> Frame:
        """The states and the predictions."""
        hidden, outputs = states_and_outputs(hf, self._batch(hf), self._states)
        dim = batch_dim(hf.model) if outputs.dim() > 2 else 0
        found = {"hidden": as_array(hidden, 1), "outputs": as_array(predictions(hf, outputs), dim)}
        return {key: array[..., : self.sequences] for key, array in found.items()}

    def constant(self, hf: Experiment) -> Frame:
        """What the model is given and what it should say."""
        batch, dim = self._batch(hf), batch_dim(hf.model)
        fields = {"inputs": "inputs", "targets": "targets", "scored": "mask", "lengths": "lengths"}
        found = {key: getattr(batch, name) for key, name in fields.items() if hasattr(batch, name)}
        return {key: as_array(value, dim)[..., : self.sequences] for key, value in found.items()}

    def about(self, hf: Experiment) -> dict[str, Any]:
        """Axes and units."""
        arrays = {
            "hidden": ("hidden unit", ["step", "unit", "sequence"]),
            "inputs": ("input", ["step", "input", "sequence"]),
            "outputs": ("prediction", ["step", "output", "sequence"]),
            "targets": ("target", ["step", "output", "sequence"]),
            "scored": ("whether the prediction counts", ["step", "sequence"]),
            "lengths": ("steps of the sequence", ["sequence"]),
        }
        described = {key: {"label": label, "unit": "", "axes": axes} for key, (label, axes) in arrays.items()}
        problem = hf.problem
        return {
            "title": "hidden states",
            "problem": str(getattr(problem, "name", type(problem).__name__)),
            "batch": int(problem.test_batches[0]),
            "arrays": described,
        }
