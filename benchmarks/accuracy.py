"""How exact the exponential of a skew matrix is: funcparam's and PyTorch's, at any norm.

    python benchmarks/accuracy.py

The error of the value is measured against the eigendecomposition in double precision; that of
orthogonality is the largest entry of Q'Q - I. Prints a Markdown table.
"""

from itertools import product

import torch

from funcparam.transforms import Orthogonal

NORMS = (1e-3, 0.1, 1, 10, 100, 1000, 10000)


def skew(n, norm, dtype):
    torch.manual_seed(0)
    X = torch.randn(n, n, dtype=torch.double).tril(-1)
    A = X - X.mT
    return (A / torch.linalg.matrix_norm(A, 2) * norm).to(dtype)


def exact(A):
    values, vectors = torch.linalg.eigh(-1j * A.to(torch.complex128))
    return ((vectors * torch.exp(1j * values)) @ vectors.mH).real


def errors(Q, expected):
    Q = Q.double()
    value = (Q - expected).abs().max().item()
    orthogonality = (Q.mT @ Q - torch.eye(len(Q), dtype=Q.dtype)).abs().max().item()
    return value, orthogonality


def measure():
    """Errors of the value and of orthogonality, of PyTorch's, ours, and ours compiled.

    Compiled it does what it does on a device: it looks at no norm.
    """
    transform = Orthogonal(trivialize=False)
    compiled = torch.compile(transform.forward, backend="eager", fullgraph=True)
    for dtype, n, norm in product((torch.float32, torch.float64), (16, 128), NORMS):
        A = skew(n, norm, dtype)
        expected = exact(A)
        theirs = errors(torch.linalg.matrix_exp(A), expected)
        ours = errors(transform.forward(A.tril(), {}), expected)
        traced = errors(compiled(A.tril(), {}), expected)
        yield {
            "dtype": str(dtype).removeprefix("torch."),
            "n": n,
            "norm": norm,
            "errors": theirs + ours + traced,
        }


def report(*, quick=False):
    """All figures, and their table; it is quick anyway."""
    rows = list(measure())
    lines = [
        "| dtype | n | norm of A | PyTorch: value | Q'Q - I | funcparam: value | Q'Q - I"
        " | compiled: value | Q'Q - I |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = " | ".join(f"{error:.0e}" for error in row["errors"])
        lines.append(f"| {row['dtype']} | {row['n']} | {row['norm']:g} | {found} |")
    return rows, "\n".join(lines)


if __name__ == "__main__":
    print(report()[1])
