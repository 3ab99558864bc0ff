"""What a raw tensor is to an optimizer."""

from __future__ import annotations

from typing import Literal, TypeAlias

Role: TypeAlias = Literal["weight", "direction", "magnitude", "factor", "coordinates", "relative"]
"""What a raw tensor is, as optimizers have to know it:

* `"weight"`: it stands for the value itself, entry by entry or nearly so, as without a transform;
* `"direction"`: its length does not matter, so weight decay has no effect on the value;
* `"magnitude"`: it scales something, and 0 turns that off;
* `"factor"`: it is multiplied with another raw tensor, as the two of LoRA are;
* `"coordinates"`: a map such as softplus gives it a meaning, and 0 is a value like others;
* `"relative"`: it says how far the value is from a base point in state, so decay pulls there.
"""
