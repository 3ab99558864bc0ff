"""What the helpers of a shell, which are made before it, know of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from funcparam.parametrization.parametrization import Parametrization
from funcparam.transforms.contract.base import Raw, State


class Shell(Protocol):
    """A [`funcparam.Parametrized`][], as far as they go."""

    parametrization: Parametrization[dict[str, Tensor]]

    def raw_and_state(self) -> tuple[dict[str, Raw], dict[str, State]]:
        """Its tensors as `p` takes them."""
        ...

    def values(self) -> dict[str, Tensor]:
        """The tensors that its network is called with."""
        ...

    def bound(self) -> AbstractContextManager[nn.Module]:
        """A block in which its network has them."""
        ...

    def state_dict(self, *, keep_vars: bool) -> Mapping[str, Any]:
        """All that it saves."""
        ...
