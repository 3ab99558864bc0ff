"""torch's switch of the cache, which code of others turns by hand: `_cache_enabled`, `_cache`.

bitsandbytes and axolotl count `torch.nn.utils.parametrize._cache_enabled` up before the forward of
a module and down after it, and at zero put a new dictionary in the place of `_cache`.
"""

from __future__ import annotations

import types
from typing import Any

import torch.nn.utils.parametrize as torch_api

_TORCHS: Any = torch_api


def entries() -> dict[Any, Any] | None:
    """Where torch caches values while its switch is on; None while it is off."""
    return _TORCHS._cache if _TORCHS._cache_enabled else None


class ShowsTorchsCache(types.ModuleType):
    """A module whose `_cache_enabled` and `_cache` are those of `torch.nn.utils.parametrize`."""

    @property
    def _cache_enabled(self) -> int:
        return _TORCHS._cache_enabled

    @_cache_enabled.setter
    def _cache_enabled(self, count: int) -> None:
        _TORCHS._cache_enabled = count

    @property
    def _cache(self) -> dict[Any, Any]:
        return _TORCHS._cache

    @_cache.setter
    def _cache(self, values: dict[Any, Any]) -> None:
        _TORCHS._cache = values
