"""The stateful API of `torch.nn.utils.parametrize` and `parametrizations`, thin over transforms.

`from funcparam.compat import parametrize, parametrizations` is a drop-in import;
[`install`][funcparam.compat.install] puts both in the place of torch's own, and `hooks` in that of
the older `torch.nn.utils.weight_norm` and `spectral_norm`.
"""

from funcparam.compat import hooks, parametrizations, parametrize
from funcparam.compat._convert import to_functional, to_stateful
from funcparam.compat._install import install, installed, uninstall

__all__ = [
    "hooks",
    "install",
    "installed",
    "parametrizations",
    "parametrize",
    "to_functional",
    "to_stateful",
    "uninstall",
]
