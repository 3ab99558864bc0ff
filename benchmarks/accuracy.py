"""How exact the exponential of a skew matrix is: funcparam's and PyTorch's, at any norm.

    python benchmarks/accuracy.py

The error of the value is measured against the eigendecomposition in double precision; that of
orthogonality is the largest entry of Q'Q - I. Prints a Markdown table.
"""

import torch

from funcparam.transforms import Orthogonal


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
    return f"{value:.0e} | {orthogonality:.0e}"


def main():
    print("| dtype | n | norm of A | PyTorch: value | Q'Q - I | funcparam: value | Q'Q - I |")
    print("|---|---|---|---|---|---|---|")
    transform = Orthogonal(trivialize=False)
    for dtype in (torch.float32, torch.float64):
        for n in (16, 128):
            for norm in (1e-3, 0.1, 1, 10, 100, 1000, 10000):
                A = skew(n, norm, dtype)
                expected = exact(A)
                theirs = errors(torch.linalg.matrix_exp(A), expected)
                ours = errors(transform.forward(A.tril(), {}), expected)
                name = str(dtype).removeprefix("torch.")
                print(f"| {name} | {n} | {norm:g} | {theirs} | {ours} |")


if __name__ == "__main__":
    main()
