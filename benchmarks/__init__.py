"""Side-by-side measurements: what a product costs, what a whole step costs, how a product grows with the sizes.

    python -m benchmarks                                 all three, written to benchmarks/results/
    python -m benchmarks products --cases 'rnn-*-B100' --rounds 9 --threads 1
    python -m benchmarks steps scaling --no-save
    python -m benchmarks --toy --rounds 2 --no-save      everything once, at sizes that mean nothing

**products**: for each case of :mod:`benchmarks.cases`, in one process and interleaved (every round runs each method
once, in an order of its own): the gradient of the plain PyTorch model (forward and backward pass), which is the unit;
`hfopt.GaussNewton` under each linearisation policy; curvlinops' `GGNLinearOperator`, if it is installed; a double
backward pass run anew for every product; `torch.func.jvp` with `vjp`. All multiply the same vector at the same
weights, and every result is compared with the product of the plain model in float64: `difference` is
max |difference| / max |float64 product|. A method that a model does not allow is listed with the reason.

**steps**: the time of a whole `HessianFree.step`, divided by the sum of its gradients, products and evaluations, each
timed on its own between the steps, on the same closures. Every round starts at the same parameters and state.

**scaling**: the time of a product of the tanh recurrence per T B h^2, as one of T, B, h grows.

Columns: *ms* median; *gradients* median and quartiles of the ratios within rounds; *set-up* what is done once before
the products, in gradients (for the cached policies the gradient of the loss falls out of it); *GFLOP/s* by the stated
count of operations; *of mm* that rate divided by the rate of `torch.mm` at the case's own shape in the same round;
*peak* and *kept*: bytes a product needs at most, and bytes that stay allocated between products, parameters, data and
vectors not counted.

Stated count: a matrix product of the forward pass is passed through twice by the tangent and twice by the adjoint, or
once and once where one operand is data: 4 F + 2 F_data. For recurrences only F = 2 T B h^2 counts (8 T B h^2 in all).

Two threads on two cores show nothing when a third process runs; the load average is written into the results.
"""
