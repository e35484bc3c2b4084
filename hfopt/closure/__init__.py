"""An ordinary training closure as a twice differentiable function of the parameters, the same throughout a step."""

from hfopt.closure.trace import Closure

__all__ = ["Closure"]
