"""The options of the runs on long memory with their published defaults, and a preset for each published setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from runs.settings import Action


@dataclass(frozen=True)
class Published(Action):
    """Options that the three published programs share, and those that are only here."""

    preset: str | None = None
    """A published setting, such as nnrnn-copy, whose values stand in place of the defaults."""
    net_type: Literal["RNN", "RNN-orth", "expRNN", "nnRNN", "EURNN", "LSTM"] = "nnRNN"
    """Kind of network."""
    nhid: int = 128
    """Hidden units."""
    lr: float = 2e-4
    """Learning rate."""
    lr_orth: float = 2e-5
    """Learning rate of the skew-symmetric matrix behind an orthogonal one, in expRNN and nnRNN."""
    optimizer: Literal["RMSprop", "Adam", "hf"] = "RMSprop"
    """RMSprop, Adam, or Hessian-free."""
    alpha: float = 0.99
    """Decay of RMSprop's squared gradients."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays of Adam's averages, two numbers."""
    rinit: Literal["random", "cayley", "henaff", "xavier"] = "henaff"
    """Start of the recurrent matrix."""
    iinit: Literal["xavier", "kaiming"] = "xavier"
    """Start of the input matrix."""
    nonlin: Literal["none", "modrelu", "tanh", "relu", "sigmoid"] = "modrelu"
    """Nonlinearity; an LSTM has its own."""
    alam: float = 1e-4
    """Delta, the weight of nnRNN's penalty on (gamma - 1)^2, summed."""
    Tdecay: float = 1e-5
    """Weight decay of nnRNN's T."""
    batch: int = 10
    """Sequences in a batch of RMSprop and Adam."""
    random_seed: Annotated[int, tyro.conf.arg(aliases=["--seed"])] = 400
    """Seed of the initial parameters and of all data."""
    save_freq: int = 50
    """Updates (in epochs: of copytask, updates) after which a run is saved; what Ctrl-C ends is saved as well."""
    save: Path | None = None
    """File for the final parameters, or the best ones where there is validation; a bare name is in the run's folder."""
    cuda: bool = False
    """Compute on the GPU."""

    style: Literal["tunable", "fft"] = "tunable"
    """Layers of rotations of EURNN: capacity of them, or those of a fast Fourier transform."""
    capacity: int = 2
    """Layers of rotations of EURNN in the tunable style."""
    clip: float | None = None
    """Largest norm of the gradient; None: no limit."""
    updates: int | None = None
    """Updates in all, in place of epochs."""
    hf_batch: int = 100
    """Sequences in a batch of hf."""
    gradient_batches: int = 8
    """Batches of hf's gradient."""
    curvature_batches: int = 1
    """How many of them the curvature products use."""
    evaluation_batches: int = 4
    """How many of them judge the step."""
    cg_iterations: int = 50
    """Iterations of conjugate gradients at most, for hf."""
    damping: float | None = None
    """Lambda of hf at the start; by default found at the first step."""
    structural: float = 1 / 30
    """Mu, the weight of structural damping relative to lambda, for hf."""
    weight_decay: float = 0.0
    """Coefficient c of the penalty c/2 |theta|^2 on all but T and gamma, for hf."""
    threads: int | None = 1
    """Threads of torch on the CPU; None: as torch chooses."""
    device: str = "cpu"
    """Where to compute, where --cuda does not say: cpu, cuda:1, ..."""
    name: str | None = None
    """Name of the run, or an absolute path for its folder; by default made of the main settings."""

    @property
    def seed(self) -> int:
        """The seed under the name that all runs have."""
        return self.random_seed


@dataclass(frozen=True)
class CopyTask(Published):
    """The copy problem, or the adding problem, with a network of long memory."""

    task: Literal["copy", "adding"] = "copy"
    """Problem."""
    T: int = 200
    """Steps of the wait."""
    labels: int = 8
    """Data symbols."""
    c_length: int = 10
    """Symbols to copy; of the adding problem, the steps of a sequence."""
    onehot: bool = False
    """Inputs are one-hot vectors, not the number of the symbol."""
    vari: bool = False
    """The wait is drawn for each sequence, from 1 to T."""
    form: Literal["nnrnn", "tcn", "exprnn"] = "nnrnn"
    """Where the marker stands; see pathological.copying."""
    values: Literal["uniform", "normal"] = "uniform"
    """Values of the adding problem: from [0, 1], or of mean 0 and standard deviation 1."""
    updates: int | None = 1500
    """Updates in all."""
    log_interval: int = 50
    """Updates from one test to the next; of hf, each tenth of it."""
    test_sequences: int = 500
    """Sequences of the test, the same throughout."""


@dataclass(frozen=True)
class SMNIST(Published):
    """MNIST pixel by pixel, to be classified at the end, with a network of long memory."""

    nhid: int = 512
    """Hidden units."""
    Tdecay: float = 0.0
    """Weight decay of nnRNN's T."""
    batch: int = 100
    """Images in a batch of RMSprop and Adam."""
    epochs: int = 100
    """Passes over the training images."""
    permute: bool = False
    """Give the pixels in the published random order."""
    shuffle: bool = False
    """Give the images in a new order in each pass; the published program keeps the order."""
    data: Literal["mnist", "digits"] = "mnist"
    """MNIST, or scikit-learn's digits of 8 x 8 pixels, which need no files."""
    folder: Path | None = None
    """Folder of MNIST's files; by default mnist in the folder that HFOPT_DATA names."""
    log_interval: int | None = None
    """Updates from one validation to the next; by default a pass over the data, of hf 1."""


@dataclass(frozen=True)
class PTBCharacters(Published):
    """The Penn Treebank's characters, with a network of long memory."""

    nhid: int = 1024
    """Hidden units."""
    lr: float = 8e-4
    """Learning rate."""
    lr_orth: float = 8e-5
    """Learning rate of the skew-symmetric matrix behind an orthogonal one, in expRNN and nnRNN."""
    alpha: float = 0.9
    """Decay of RMSprop's squared gradients."""
    betas: tuple[float, float] = (0.0, 0.9)
    """Decays of Adam's averages, two numbers."""
    rinit: Literal["random", "cayley", "henaff", "xavier"] = "cayley"
    """Start of the recurrent matrix."""
    iinit: Literal["xavier", "kaiming"] = "kaiming"
    """Start of the input matrix."""
    alam: float = 1.0
    """Delta, the weight of nnRNN's penalty on (gamma - 1)^2, summed."""
    Tdecay: float = 1e-4
    """Weight decay of nnRNN's T."""
    batch: int = 128
    """Columns of the text that RMSprop and Adam go through at the same time."""
    save: Path | None = Path("model.pt")
    """File for the best parameters by validation; a bare name is in the run's folder."""
    emsize: int = 200
    """Columns of the embedding."""
    epochs: int = 100
    """Passes over the training text."""
    bptt: int = 150
    """Steps of a window, over which gradients are propagated."""
    tied: bool = False
    """Let the readout's matrix be the embedding's."""
    text: str = "ptb"
    """Name of the text, or the path of a file of one's own; see corpora.text.characters."""
    data: Path | None = None
    """Folder of the text's files; by default ptb in the folder that HFOPT_DATA names."""
    log_interval: int | None = None
    """Updates from one validation to the next; by default a pass over the text, of hf 1."""


P = TypeVar("P", bound=Published)


def _row(base: P, net: str, nhid: int, alpha: float, lr: float, init: str, **more: object) -> P:
    """A row of the tables; the learning rate of the orthogonal part is a tenth of the other where none is given."""
    inits = {"G": "xavier", "R": "random", "C": "cayley", "H": "henaff", "-": base.rinit}
    given = {"lr_orth": lr / 10, "rinit": inits[init], **more}
    return replace(base, net_type=net, nhid=nhid, alpha=alpha, lr=lr, **given)  # type: ignore[arg-type]


# The sizes published for equal parameters, 18.9 thousand, are those of one-hot inputs, and so are the curves.
_COPY, _ADDING = CopyTask(onehot=True), CopyTask(task="adding", c_length=100, batch=1, updates=20_000, rinit="cayley")
_SMNIST, _PTB = SMNIST(permute=True), PTBCharacters()
_ADAM: Mapping[str, object] = {"optimizer": "Adam", "betas": (0.0, 0.9)}

# Kerg, Goyette et al. (NeurIPS 2019): the tables in the README of the released program, and as "-paper" those of the
# supplement where they differ. EURNN's capacities are not published.
COPY: dict[str, CopyTask] = {
    "rnn-copy": _row(_COPY, "RNN", 128, 0.9, 1e-3, "G"),
    "rnn-orth-copy": _row(_COPY, "RNN-orth", 128, 0.99, 2e-4, "R"),
    "eurnn-copy": _row(_COPY, "EURNN", 128, 0.5, 1e-3, "-"),
    "eurnn-copy-256": _row(_COPY, "EURNN", 256, 0.5, 1e-3, "-"),
    "exprnn-copy": _row(_COPY, "expRNN", 128, 0.99, 1e-3, "H"),
    "exprnn-copy-176": _row(_COPY, "expRNN", 176, 0.99, 1e-3, "H"),
    "nnrnn-copy": _row(_COPY, "nnRNN", 128, 0.99, 5e-4, "C", lr_orth=1e-6, alam=1e-4, Tdecay=1e-6),
    "nnrnn-copy-paper": _row(_COPY, "nnRNN", 128, 0.99, 5e-4, "H", lr_orth=1e-6, alam=1e-4, Tdecay=1e-6),
    "lstm-copy": _row(_COPY, "LSTM", 128, 0.99, 5e-4, "G"),
    "lstm-copy-63": _row(_COPY, "LSTM", 63, 0.99, 1e-3, "G"),
    "rnn-adding": _row(_ADDING, "RNN", 128, 0.9, 1e-3, "G", nonlin="tanh"),
    "exprnn-adding": _row(_ADDING, "expRNN", 512, 0.99, 1e-3, "H"),
    "lstm-adding": _row(_ADDING, "LSTM", 128, 0.99, 5e-4, "G"),
    "nnrnn-adding": _row(_ADDING, "nnRNN", 512, 0.99, 5e-4, "C", lr_orth=1e-6, alam=1e-4, Tdecay=1e-6),
}
PSMNIST: dict[str, SMNIST] = {
    "rnn-psmnist": _row(_SMNIST, "RNN", 512, 0.9, 1e-4, "G"),
    "rnn-orth-psmnist": _row(_SMNIST, "RNN-orth", 512, 0.99, 5e-5, "R"),
    "eurnn-psmnist": _row(_SMNIST, "EURNN", 512, 0.9, 1e-4, "-"),
    "eurnn-psmnist-1024": _row(_SMNIST, "EURNN", 1024, 0.9, 1e-4, "-"),
    "exprnn-psmnist": _row(_SMNIST, "expRNN", 512, 0.99, 5e-4, "C"),
    # The README has 5e-5 alone for this one, which the supplement has for the orthogonal part.
    "exprnn-psmnist-722": _row(_SMNIST, "expRNN", 722, 0.99, 5e-4, "C"),
    "nnrnn-psmnist": _row(_SMNIST, "nnRNN", 512, 0.99, 2e-4, "C", alam=0.1, Tdecay=1e-4),
    "nnrnn-psmnist-paper": _row(_SMNIST, "nnRNN", 512, 0.99, 1.5e-4, "C", alam=0.15, Tdecay=1e-4),
    "lstm-psmnist": _row(_SMNIST, "LSTM", 512, 0.99, 5e-4, "G"),
    "lstm-psmnist-paper": _row(_SMNIST, "LSTM", 512, 0.9, 5e-4, "G"),
    "lstm-psmnist-257": _row(_SMNIST, "LSTM", 257, 0.9, 5e-4, "G"),
}
PTB: dict[str, PTBCharacters] = {}
for _bptt in (150, 300):
    _base = replace(_PTB, bptt=_bptt)
    _README: Mapping[str, object] = {150: {"Tdecay": 1e-5, "clip": 10.0}, 300: {"Tdecay": 1e-6, "clip": 5.0}}[_bptt]
    _PAPER: Mapping[str, object] = {150: {"lr_orth": 8e-5, "alam": 1.0}, 300: {"lr_orth": 6e-5, "alam": 1e-4}}[_bptt]
    PTB |= {
        f"rnn-ptb-{_bptt}": _row(_base, "RNN", 1024, 0.9, 1e-5, "G"),
        f"rnn-orth-ptb-{_bptt}": _row(_base, "RNN-orth", 1024, 0.9, 1e-4, "C"),
        f"rnn-orth-ptb-{_bptt}-paper": _row(_base, "RNN-orth", 1024, 0.9, 1e-4, "R" if _bptt == 150 else "C"),
        f"eurnn-ptb-{_bptt}": _row(_base, "EURNN", 1024, 0.9, 1e-3, "-"),
        f"eurnn-ptb-{_bptt}-2048": _row(_base, "EURNN", 2048, 0.9, 1e-3, "-"),
        f"exprnn-ptb-{_bptt}": _row(_base, "expRNN", 1024, 0.9, 1e-3, "C"),
        f"exprnn-ptb-{_bptt}-1386": _row(_base, "expRNN", 1386, 0.9, 8e-3 if _bptt == 150 else 1e-3, "C"),
        f"exprnn-ptb-{_bptt}-paper": _row(_base, "expRNN", 1024, 0.9, 5e-3, "C", lr_orth=1e-4),
        f"exprnn-ptb-{_bptt}-1386-paper": _row(_base, "expRNN", 1386, 0.9, 5e-3, "C", lr_orth=1e-4),
        f"nnrnn-ptb-{_bptt}": _row(_base, "nnRNN", 1024, 0.9, 2e-3, "C", alam=1e-4, **_ADAM, **_README),
        f"nnrnn-ptb-{_bptt}-paper": _row(_base, "nnRNN", 1024, 0.9, 8e-4, "C", Tdecay=1e-4, **_PAPER),
        f"lstm-ptb-{_bptt}": _row(_base, "LSTM", 1024, 0.9, 8e-3, "G"),
        f"lstm-ptb-{_bptt}-475": _row(_base, "LSTM", 475, *((0.99, 1e-3) if _bptt == 150 else (0.9, 3e-3)), "G"),
    }
