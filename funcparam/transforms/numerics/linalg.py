from __future__ import annotations

from typing import Any

import torch

# torch's stubs leave every result of torch.linalg unknown; from Any, annotated names are typed.
linalg: Any = torch.linalg

LinAlgError: type[RuntimeError] = linalg.LinAlgError
"""What a decomposition raises that has no result."""
