"""The recurrent cases: one network as torch's own layer (the unit), as a Python loop and on hfopt's recurrence."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.case import Case, Form, Named, Work
from benchmarks.networks import LoopGRU, LoopLSTM, LoopMRNN, LoopRNN, PerStep, TorchRecurrent
from models import GRU, LSTM, MRNN, RNN

LOOP = "a Python loop"


def rnn_case(steps: int, batch: int, hidden: int, inputs: int = 2, outputs: int = 1) -> Case:
    """Work counts as 8 T B h^2; the floor has the inputs and the readout too."""
    plain = TorchRecurrent(nn.RNN(inputs, hidden), outputs)

    def weights(theirs: Named) -> Named:
        return {
            **_shared(theirs),
            **_matrices(theirs),
            "b_h": theirs["recurrent.bias_ih_l0"] + theirs["recurrent.bias_hh_l0"],
        }

    recurrent = 2.0 * steps * batch * hidden**2
    return Case(
        f"rnn-T{steps}-B{batch}",
        f"tanh RNN, h = {hidden}, T = {steps}, B = {batch}; the unit is torch.nn.RNN",
        plain,
        torch.randn(steps, batch, inputs),
        torch.randn(steps, batch, outputs),
        nn.MSELoss(),
        Work(
            recurrent + 2.0 * steps * batch * hidden * outputs,
            2.0 * steps * batch * inputs * hidden,
            counted=recurrent,
        ),
        (batch, hidden, hidden),
        ours=Form.of(RNN(inputs, hidden, outputs), plain, weights),
        others={LOOP: Form.of(LoopRNN(inputs, hidden, outputs), plain, weights)},
    )


def lstm_case(steps: int, batch: int, hidden: int, symbols: int) -> Case:
    plain = TorchRecurrent(nn.LSTM(symbols, hidden), symbols)

    def weights(theirs: Named) -> Named:
        return {
            **_shared(theirs),
            **_matrices(theirs),
            "c_init": theirs["cell"].flatten(),
            "b_h": theirs["recurrent.bias_ih_l0"] + theirs["recurrent.bias_hh_l0"],
        }

    sizes = symbols, hidden, symbols
    forms = Form.of(LSTM(*sizes), plain, weights), Form.of(LoopLSTM(*sizes), plain, weights)
    return _gated("LSTM", plain, 4, steps, batch, hidden, symbols, *forms)


def gru_case(steps: int, batch: int, hidden: int, symbols: int) -> Case:
    plain = TorchRecurrent(nn.GRU(symbols, hidden), symbols)

    def weights(theirs: Named) -> Named:
        b_r, b_z, b_n = theirs["recurrent.bias_hh_l0"].chunk(3)
        return {
            **_shared(theirs),
            **_matrices(theirs),
            "b_h": theirs["recurrent.bias_ih_l0"] + torch.cat((b_r, b_z, torch.zeros_like(b_n))),
            "b_n": b_n,
        }

    sizes = symbols, hidden, symbols
    forms = Form.of(GRU(*sizes), plain, weights), Form.of(LoopGRU(*sizes), plain, weights)
    return _gated("GRU", plain, 3, steps, batch, hidden, symbols, *forms)


def _gated(
    kind: str,
    plain: TorchRecurrent,
    gates: int,
    steps: int,
    batch: int,
    hidden: int,
    symbols: int,
    ours: Form,
    loop: Form,
) -> Case:
    """Inputs, recurrence and readout all count: per sequence and step V g h, h g h and h V multiplications."""
    at_once = 2.0 * steps * batch
    return Case(
        kind.lower(),
        f"{kind} 1 x {hidden}, T = {steps}, B = {batch}, {symbols} inputs and outputs; the unit is torch.nn.{kind}",
        plain,
        torch.randn(steps, batch, symbols),
        torch.randint(symbols, (steps, batch)),
        PerStep(),
        Work(at_once * (gates * hidden**2 + hidden * symbols), at_once * gates * symbols * hidden),
        (batch, hidden, gates * hidden),
        ours=ours,
        others={LOOP: loop},
    )


def mrnn_case(steps: int, batch: int, hidden: int, factors: int, symbols: int) -> Case:
    """Two recurrent products, h by F and F by h; the yardstick is the first. The plain model is the Python loop."""
    plain = LoopMRNN(symbols, hidden, factors, symbols)
    at_once = 2.0 * steps * batch
    return Case(
        "mrnn",
        f"multiplicative tanh RNN, h = {hidden}, F = {factors}, T = {steps}, B = {batch}, {symbols} inputs and "
        f"outputs; the unit is {LOOP}",
        plain,
        torch.randn(steps, batch, symbols),
        torch.randint(symbols, (steps, batch)),
        PerStep(),
        Work(
            at_once * (2 * hidden * factors + hidden * symbols),
            at_once * symbols * (factors + hidden),
        ),
        (batch, hidden, factors),
        ours=Form.of(MRNN(symbols, hidden, factors, symbols), plain, dict),
    )


def _matrices(theirs: Named) -> Named:
    """The weights of a layer, as matrices that rows are multiplied with from the left."""
    return {"W_vh": theirs["recurrent.weight_ih_l0"].t(), "W_hh": theirs["recurrent.weight_hh_l0"].t()}


def _shared(theirs: Named) -> Named:
    """Initial state and readout."""
    return {
        "h_init": theirs["initial"].flatten(),
        "W_ho": theirs["readout.weight"].t(),
        "b_o": theirs["readout.bias"],
    }
