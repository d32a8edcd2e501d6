"""Parameters that several methods have, with one meaning in all of them."""

from typing import Annotated

from sdmerge.method import Param

Weights = Annotated[tuple[float, ...], Param("one weight for each model, in order", weight=True)]
NonNegativeWeights = Annotated[tuple[float, ...], Param("one weight for each model, in order", 0, weight=True)]
ByWeights = Annotated[bool, Param("divide the weights by their sum")]
SumByWeights = Annotated[bool, Param("divide the sum by the weights' sum")]
ByAgreeing = Annotated[bool, Param("divide by the weights of the models that agree")]
Lam = Annotated[float, Param("factor of the sum (λ)", weight=True)]
Vote = Annotated[str, Param("signs are elected by sum or by count", choices=("sum", "count"))]

Learned = Annotated[float, Param("how much of what B learned over C is added to A", weight=True)]
ShareOfB = Annotated[float, Param("share of B", weight=True)]
Between = Annotated[float, Param("where between A and B", 0, 1, weight=True)]

Chance = Annotated[tuple[float, ...], Param("probability to keep an element", 0, 1, weight=True)]
MeanChance = Annotated[tuple[float, ...], Param("mean probability to keep an element", 0, 1, weight=True)]
Slope = Annotated[float, Param("the smallest is kept with density - ε, the largest with density + ε", 0, 0.5)]
Kept = Annotated[tuple[float, ...], Param("share of each Δ that is kept", 0, 1, weight=True)]
Largest = Annotated[tuple[float, ...], Param("share of the largest changes that is dropped", 0, 1)]
Rescale = Annotated[bool, Param("divide what is kept by its probability")]
DropSeed = Annotated[int, Param("chooses the elements that are dropped", 0, 2**63 - 1)]

Iterations = Annotated[int, Param("steps at most", 0)]
Negligible = Annotated[float, Param("a change up to this size counts as none", 0)]
