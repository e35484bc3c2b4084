"""Side-by-side measurements: what a product costs, what a whole step costs, how a product grows with the sizes.

    python -m benchmarks                                 products, steps, scaling, written to benchmarks/results/
    python -m benchmarks products --cases 'rnn-*-B100' --rounds 9 --threads 1
    python -m benchmarks steps scaling --no-save
    python -m benchmarks products gpu --device cuda      on a CUDA device
    python -m benchmarks --toy --rounds 2 --no-save      everything once, at sizes that mean nothing

**products**: for each case of :mod:`benchmarks.cases`, in one process and interleaved (every round runs each method
once, in an order of its own): the gradient of the plain PyTorch model (forward and backward pass), which is the unit;
`hfopt.GaussNewton` under each linearisation policy; curvlinops' `GGNLinearOperator`, if it is installed; a double
backward pass run again for every product; `torch.func.jvp` with `vjp`. All multiply the same vector at the same
weights, and every result is compared with the product of the plain model in float64: `difference` is
max |difference| / max |float64 product|. A method that a model does not allow is listed with the reason. Of recurrent
networks, torch's own layer is the plain model (of the multiplicative RNN, which torch does not have, a Python loop);
a Python loop on the same weights is measured too, which can be differentiated in every way; `hfopt, on torch's layer`
is what a user's model with that layer gets, and `hfopt, general path` the same where nothing is replaced.

**steps**: the time of a whole `HessianFree.step`, divided by the sum of its gradients, products and evaluations, each
timed on its own between the steps, on the same closures. Every round starts at the same parameters and state.

**scaling**: the time of a product of the tanh recurrence per T B h^2, as one of T, B, h grows, and the memory that is
kept between products next to its formula (:mod:`benchmarks.scaling`).

**gpu**: on a CUDA device, a product of the tanh recurrence at T = 200, B = 1000, h = 100, that of the Python loop, 300
iterations of conjugate gradients, and the share of these in which the device waits.

Columns: *ms* median; *gradients* median and quartiles of the ratios within rounds; *set-up* what is done once before
the products, in gradients (for the cached policies the gradient of the loss falls out of it); *GFLOP/s* by the stated
count of operations; *of mm* that rate divided by the rate of `torch.mm` at the case's own shape in the same round, for
recurrences the product with the recurrent weights; *of floor* the time divided by what torch.mm would need, at that
rate, for all matrix products that tangent and adjoint have, those of inputs and readout included; *peak* and *kept*:
bytes a product needs at most, and bytes that stay allocated between products, parameters, data and vectors not counted.

Stated count: a matrix product of the forward pass is passed through twice by the tangent and twice by the adjoint, or
once and once where one operand is data: 4 F + 2 F_data. Of the tanh RNN only F = 2 T B h^2 counts (8 T B h^2 in all).

The process keeps freed memory instead of returning it to the kernel (:mod:`hfopt.experiment.memory`, as the runs do),
for all competitors alike: on large activations all of them would spend a good part of their time on page faults. On a
CUDA device TF32 is off for all of them.

Two threads on two cores show nothing when a third process runs; the load average is written into the results.
"""
