"""Bad input: what a transform is made from, shapes that it cannot serve, values that it refuses.

Every message says what was expected and what came, in one style.
"""

import dataclasses
import math
import re

import pytest
import torch

import funcparam as fp
from funcparam.transforms import (
    AOL,
    BOFT,
    HRA,
    IA3,
    LSQ,
    OFT,
    Affine,
    AlmostOrthogonal,
    Ball,
    BlockCirculant,
    BlockDiagonal,
    Cat,
    Chain,
    CholeskyFactor,
    Circulant,
    CorrelationCholesky,
    DeLoRA,
    DoRA,
    DoublyStochastic,
    FakeQuantize,
    FakeQuantizeFloat,
    FixedRank,
    Frozen,
    Gain,
    Grassmann,
    Identity,
    Interval,
    Invertible,
    Kronecker,
    LeftHalfPlane,
    LInfLipschitz,
    LoHa,
    LoRA,
    LowerBound,
    LowRank,
    Mask,
    Monarch,
    NMSparse,
    OperatorNorm,
    Ordered,
    Orthogonal,
    OrthogonalConv,
    Permute,
    Positive,
    PositiveDefinite,
    Product,
    PSDLowRank,
    RandLoRA,
    Reshape,
    Simplex,
    Skew,
    Sparse,
    SpecialLinear,
    SpecialOrthogonal,
    SpectralCap,
    SpectralNorm,
    StableDiagonal,
    Stack,
    Stiefel,
    Symmetric,
    Ternary,
    Toeplitz,
    TopK,
    Transform,
    Transpose,
    Triangular,
    Unitary,
    UnitNorm,
    UpperBound,
    VeRA,
    WeightNorm,
    WeightStandardization,
)
from tests.cases import CASES

# What an argument has to be, and what it must not be: of another type, or out of range.

INTEGER = "an integer", [2.5, "0", True, torch.tensor(1), (0,)], []
MAYBE_INTEGER = "an integer or None", [2.5, "0", False, torch.tensor(1)], []
POSITIVE_INTEGER = (
    "a positive integer",
    [2.5, 2.0, "2", True, None, torch.tensor(2)],
    [0, -1],
)
NUMBER = "a finite number", ["1", True, 1j, torch.tensor(1.0)], [math.nan, -math.inf, 10**400]
POSITIVE_NUMBER = (
    "a positive finite number",
    ["1", True, None, torch.tensor(1.0)],
    [0, -1e-3, math.nan, math.inf, 10**400],
)
MAYBE_POSITIVE = "a positive finite number or None", ["1", True], [0, -1e-3, math.inf]
MAYBE_COUNT = "a positive integer or None", [2.5, True], [0, -1]
NAME = "the name of a weight or None", [3, True, b"R"], []
FLAG = "one of True, False", [], ["yes", None, 2]
ORTHOGONAL_MAPS = "one of 'matrix_exp', 'cayley', 'householder'"


def choice(*names):
    return f"one of {', '.join(map(repr, names))}", [], ["abs", None, 0, names]


ARGUMENTS = [
    (Orthogonal, {}, "map", (ORTHOGONAL_MAPS + ", 'qr', 'newton_schulz'", [], ["polar", None, 0])),
    (Orthogonal, {}, "trivialize", FLAG),
    (SpecialOrthogonal, {}, "map", (ORTHOGONAL_MAPS, [], ["qr", None, 0])),
    (OrthogonalConv, {}, "map", (ORTHOGONAL_MAPS, [], ["qr", None, 0])),
    *((kind, {}, "groups", POSITIVE_INTEGER) for kind in (OrthogonalConv, AOL)),
    (Unitary, {}, "map", choice("matrix_exp", "cayley")),
    (AlmostOrthogonal, {}, "lam", POSITIVE_NUMBER),
    (AlmostOrthogonal, {}, "lam", ("at most 1", [], [1.5, 2])),
    (FixedRank, {}, "rank", POSITIVE_INTEGER),
    (WeightNorm, {}, "dim", MAYBE_INTEGER),
    (SpectralNorm, {}, "dim", INTEGER),
    (SpectralNorm, {}, "n_power_iterations", ("a positive integer or None", [1.5, True], [0, -1])),
    (SpectralNorm, {}, "eps", POSITIVE_NUMBER),
    (Positive, {}, "map", choice("softplus", "exp", "square")),
    (LowerBound, {}, "low", NUMBER),
    (UpperBound, {}, "high", NUMBER),
    (Interval, {"high": 1}, "low", NUMBER),
    (Interval, {"low": 0}, "high", NUMBER),
    (Interval, {"high": 1}, "low", ("below high", [], [1, 2.5])),
    (Simplex, {}, "map", choice("softmax", "stick_breaking")),
    (Triangular, {}, "upper", FLAG),
    (PositiveDefinite, {}, "eps", ("a finite number, at least 0", ["1", True], [-1.0, math.nan])),
    (PSDLowRank, {}, "rank", POSITIVE_INTEGER),
    (UnitNorm, {}, "dim", ("a sequence of integers", [2.5, "0", (1.0,), torch.tensor(1)], [])),
    (UnitNorm, {}, "dim", ("an integer or None", [True], [])),
    (UnitNorm, {}, "radius", MAYBE_POSITIVE),
    (StableDiagonal, {}, "pairs", FLAG),
    *(
        (kind, {}, "rank", POSITIVE_INTEGER)
        for kind in (LoRA, DoRA, DeLoRA, VeRA, RandLoRA, LoHa, LowRank)
    ),
    *(
        (kind, {"rank": 1}, "alpha", ("a finite number or None", ["1", True], [math.inf, math.nan]))
        for kind in (LoRA, DoRA, LoHa, RandLoRA)
    ),
    *((kind, {}, "blocks", POSITIVE_INTEGER) for kind in (OFT, BlockDiagonal, Monarch)),
    (LoRA, {"rank": 1}, "init", choice("kaiming", "gaussian", "pissa", "olora")),
    (LoRA, {"rank": 1}, "scale", choice("lora", "rslora")),
    (DeLoRA, {"rank": 1}, "strength", NUMBER),
    (VeRA, {"rank": 1}, "A", NAME),
    (VeRA, {"rank": 1}, "B", NAME),
    (HRA, {}, "rank", ("an even positive integer", [2.0, True], [0, 3, -2])),
    (BOFT, {}, "block_size", POSITIVE_INTEGER),
    (BOFT, {"block_size": 2}, "factors", POSITIVE_INTEGER),
    (Gain, {"part": Identity()}, "dim", MAYBE_INTEGER),
    (LInfLipschitz, {}, "dim", INTEGER),
    (Product, {}, "inner", ("a positive integer", [2.5, None, True], [0, -1])),
    (Product, {}, "inner", ("one of 'in', 'out'", [], ["side"])),
    (Sparse, {}, "entries", POSITIVE_INTEGER),
    (BlockCirculant, {}, "size", POSITIVE_INTEGER),
    (TopK, {}, "fraction", ("a number above 0 and at most 1", ["1", True], [0, 1.5, math.nan])),
    (NMSparse, {}, "n", POSITIVE_INTEGER),
    (NMSparse, {}, "m", POSITIVE_INTEGER),
    (NMSparse, {}, "dim", INTEGER),
    (SpectralCap, {}, "cap", POSITIVE_NUMBER),
    (OperatorNorm, {}, "samples", POSITIVE_INTEGER),
    (OperatorNorm, {}, "groups", POSITIVE_INTEGER),
    (Ball, {}, "p", ("one of 1, 2, inf", [], [3, "2", None])),
    (Ball, {}, "radius", POSITIVE_NUMBER),
    (Ball, {}, "dim", MAYBE_INTEGER),
    (LeftHalfPlane, {}, "pairs", FLAG),
    (IA3, {}, "dim", INTEGER),
    (Kronecker, {}, "left", ("a sequence of integers", [2, (2.0, 2), "22", (True, 2)], [])),
    (Kronecker, {}, "left", ("two positive sides", [], [(2, 0), (2,), (1, 2, 3), (-1, -1)])),
    (WeightStandardization, {}, "dim", INTEGER),
    (WeightStandardization, {}, "eps", POSITIVE_NUMBER),
    (DoublyStochastic, {}, "iterations", POSITIVE_INTEGER),
    (DoublyStochastic, {}, "temperature", POSITIVE_NUMBER),
    (Ternary, {}, "threshold", ("a number from 0 to below 1", ["0", True], [1.0, -0.1, math.nan])),
    (Ternary, {}, "dim", MAYBE_INTEGER),
    (Ternary, {}, "scale", choice("kept", "absmean")),
    (FakeQuantize, {}, "scheme", choice("narrow", "full", "affine")),
    (LSQ, {}, "init", choice("range", "lsq")),
    (FakeQuantizeFloat, {}, "format", choice("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")),
    (FakeQuantizeFloat, {"format": "float8_e5m2"}, "dim", MAYBE_INTEGER),
    (FakeQuantizeFloat, {"format": "float8_e5m2"}, "group_size", MAYBE_COUNT),
    (FakeQuantizeFloat, {"format": "float8_e5m2"}, "power_of_two", FLAG),
    *(
        row
        for kind in (FakeQuantize, LSQ)
        for row in (
            (kind, {}, "bits", ("an integer from 2 to 8", [4.0, True], [0, 1, 9])),
            (kind, {}, "dim", MAYBE_INTEGER),
            (kind, {}, "group_size", MAYBE_COUNT),
        )
    ),
    (Affine, {}, "scale", ("a finite number that is not 0", ["1", 1j], [0, 0.0, math.inf])),
    (Affine, {}, "shift", NUMBER),
    (Reshape, {"out_shape": (6,)}, "in_shape", ("a sequence of integers", [6, (6.0,), "6"], [])),
    (Reshape, {"in_shape": (6,)}, "out_shape", ("a sequence of integers", [6, (True,)], [])),
    (Permute, {}, "dims", ("a sequence of integers", [1, (0.0,), "01"], [])),
    (Permute, {}, "dims", ("a permutation, each dimension once", [], [(0, 0), (0, 2), (1, -1)])),
    (Transpose, {}, "dim0", INTEGER),
    (Transpose, {}, "dim1", INTEGER),
    (Cat, {"parts": [Identity()]}, "dim", INTEGER),
    (Cat, {"parts": [Identity()]}, "lengths", ("a sequence of integers", [1, (1.0,)], [])),
    (
        Cat,
        {"parts": [Identity()]},
        "lengths",
        ("one for each of 1 parts, at least 0", [], [(1, 2), (), (-1,)]),
    ),
    (Stack, {"parts": [Identity()]}, "dim", INTEGER),
]
WRONG = [
    (kind, others, name, what, bad, error)
    for kind, others, name, (what, types, ranges) in ARGUMENTS
    for error, values in ((TypeError, types), (ValueError, ranges))
    for bad in values
]


@pytest.mark.parametrize(
    ("kind", "others", "name", "what", "bad", "error"),
    WRONG,
    ids=[f"{row[0].__name__}({row[2]}={row[4]!r})" for row in WRONG],
)
def test_an_argument_is_refused(kind, others, name, what, bad, error):
    message = f"{kind.__name__} expects {name} to be {what}; got "
    with pytest.raises(error, match=re.escape(message)):
        kind(**others, **{name: bad})


def test_every_argument_of_every_transform_is_in_the_table():
    made = {
        (type(case.transform), f.name) for case in CASES for f in dataclasses.fields(case.transform)
    }
    parts = {row for row in made if row[1] == "parts" or (row[0] is Kronecker and row[1] in "AB")}
    functions = {row for row in made if row[0].__name__ == "Function"}
    assert made - parts - functions <= {(kind, name) for kind, _, name, _ in ARGUMENTS}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Reshape((2, 3), (5,)), ValueError, "Reshape expects two shapes with equally many"),
        (lambda: Reshape((-1,), (1,)), ValueError, "Reshape expects two shapes with equally many"),
        (lambda: Reshape((-1, -1), (-1,)), ValueError, "Reshape expects two shapes with equally"),
        (lambda: Reshape((-2,), (-2,)), ValueError, "Reshape expects two shapes with equally many"),
        (lambda: Kronecker((1, 1), A=3), TypeError, "Kronecker expects transforms; got 3"),
        (lambda: Interval(0, 1j), TypeError, "Interval expects high to be a finite number; got 1j"),
        (lambda: Chain(), ValueError, "Chain expects at least one transform; got none"),
        (lambda: Cat([]), ValueError, "Cat expects at least one transform; got none"),
        (lambda: Stack([]), ValueError, "Stack expects at least one transform; got none"),
        (lambda: Chain(Identity), TypeError, "Chain expects transforms; got <class"),
        (lambda: Cat([Identity]), TypeError, "Cat expects transforms; got <class"),
        (lambda: Stack(["Identity()"]), TypeError, "Stack expects transforms; got 'Identity"),
        (lambda: fp.transform(3), TypeError, "transform expects forward to be callable; got 3"),
        (
            lambda: fp.transform(torch.sin, 3),
            TypeError,
            "transform expects right_inverse to be callable or None; got 3",
        ),
    ],
)
def test_other_arguments_are_refused(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("transform", "shape", "message"),
    [
        (Orthogonal(), (3,), "expects a matrix or batch of matrices; got shape (3,)"),
        (SpecialOrthogonal(), (3, 2), "expects a square matrix or a batch of them; got shape"),
        (
            Unitary(),
            (3, 3),
            "expects a complex tensor; got torch.float32. A real unitary matrix is",
        ),
        (Stiefel(), (3,), "expects a matrix or batch of matrices; got shape (3,)"),
        (Grassmann(), (3,), "expects a matrix or batch of matrices; got shape (3,)"),
        (Grassmann(), (2, 3, 3), "less than the whole space; got shape (2, 3, 3)"),
        (AlmostOrthogonal(1), (3,), "expects a matrix or batch of matrices; got shape (3,)"),
        (FixedRank(3), (4, 2), "expects a matrix with both sides at least 3; got shape (4, 2)"),
        (FixedRank(1), (4,), "expects a matrix or batch of matrices; got shape (4,)"),
        (Invertible(), (3, 2), "expects a square matrix or a batch of them; got shape (3, 2)"),
        (Invertible(), (0, 0), "expects a matrix with at least one row and one column; got shape"),
        (SpecialLinear(), (2, 0, 0), "expects a matrix with at least one row and one column"),
        (SpecialLinear(), (3, 2), "expects a square matrix or a batch of them; got shape (3, 2)"),
        (WeightNorm(dim=2), (3, 3), "expects a tensor with a dimension 2; got shape (3, 3)"),
        (WeightNorm(), (), "expects a tensor with a dimension 0; got shape ()"),
        (SpectralNorm(), (), "expects a tensor with a dimension 0; got shape ()"),
        (SpectralNorm(dim=-3), (3, 3), "expects a tensor with a dimension -3; got shape (3, 3)"),
        (SpectralNorm(), (3, 0), "expects a tensor with entries; got shape (3, 0)"),
        (Symmetric(), (3, 2), "expects a square matrix or a batch of them; got shape (3, 2)"),
        (Skew(), (3,), "expects a matrix or batch of matrices; got shape (3,)"),
        (Simplex(), (), "expects at least one entry in the last dimension; got shape ()"),
        (Simplex(), (3, 0), "expects at least one entry in the last dimension; got shape (3, 0)"),
        (Ordered(), (), "expects a tensor with a dimension -1; got shape ()"),
        (Triangular(), (3,), "expects a matrix or batch of matrices; got shape (3,)"),
        (CholeskyFactor(), (3, 2), "expects a square matrix or a batch of them; got shape (3, 2)"),
        (PositiveDefinite(), (3,), "expects a matrix or batch of matrices; got shape (3,)"),
        (PositiveDefinite(), (2, 3), "expects a square matrix or a batch of them; got shape"),
        (PSDLowRank(3), (2, 2), "expects a matrix with sides of at least 3; got shape (2, 2)"),
        (CorrelationCholesky(), (2, 3), "expects a square matrix or a batch of them; got shape"),
        (CorrelationCholesky(), (2, 0, 0), "expects a matrix with at least one row; got shape"),
        (UnitNorm(2), (3, 3), "expects a tensor with a dimension 2; got shape (3, 3)"),
        (UnitNorm(), (3, 0), "expects at least one entry along dim -1; got shape (3, 0)"),
        (StableDiagonal(), (3,), "expects a complex tensor; got torch.float32. StableDiagonal("),
        (StableDiagonal(pairs=True), (2, 3), "in a last dimension of 2; got shape (2, 3)"),
        (Cat([Identity()] * 2), (3,), "expects dimension 0 to be divisible by 2; got shape (3,)"),
        (Cat([Identity()] * 2, [1, 1]), (3,), "expects dimension 0 to be of size 2; got shape"),
        (Cat([Identity()], dim=1), (3,), "expects a tensor with a dimension 1; got shape (3,)"),
        (Cat([Identity(), PositiveDefinite()]), (4, 3), "expects a square matrix"),
        (Stack([Identity()]), (2,), "expects dimension 0 to be of size 1; got shape (2,)"),
        (Stack([Triangular()]), (1, 3), "expects a matrix or batch of matrices; got shape (3,)"),
        (LoRA(3), (4, 2), "expects a matrix with both sides at least 3; got shape (4, 2)"),
        (LoRA(1), (4,), "expects a matrix or batch of matrices; got shape (4,)"),
        (LowRank(3), (4, 2), "expects a matrix with both sides at least 3; got shape (4, 2)"),
        (LowRank(1), (4,), "expects a matrix or batch of matrices; got shape (4,)"),
        (Circulant(), (3, 4), "expects a square matrix or a batch of them; got shape (3, 4)"),
        (Toeplitz(), (3,), "expects a matrix or batch of matrices; got shape (3,)"),
        (BlockDiagonal(2), (4, 3), "expects a matrix with both sides divisible by 2; got shape"),
        (Kronecker((2, 3)), (4, 4), "expects a matrix with sides divisible by (2, 3); got shape"),
        (DoublyStochastic(), (3, 4), "expects a square matrix or a batch of them; got shape"),
        (DoRA(3), (4, 2), "expects a matrix with both sides at least 3; got shape (4, 2)"),
        (VeRA(1), (4,), "expects a matrix or batch of matrices; got shape (4,)"),
        (LoHa(1), (4,), "expects a matrix or batch of matrices; got shape (4,)"),
        (OFT(2), (4, 3), "expects a number of inputs that 2 divides; got shape (4, 3)"),
        (Monarch(2), (4, 3), "expects a matrix with both sides divisible by 2; got shape (4, 3)"),
        (IA3(dim=1), (4,), "expects a tensor with a dimension 1; got shape (4,)"),
        (AOL(), (4,), "expects a matrix or a convolution kernel (out, in / groups, *taps); got"),
        (AOL(2), (4, 4), "expects a convolution kernel: a matrix, of shape (4, 4), has no groups"),
        (AOL(3), (4, 2, 3), "expects a number of outputs that 3 divides; got shape (4, 2, 3)"),
        (OrthogonalConv(), (4, 3), "*taps); got shape (4, 3). Use Orthogonal for a matrix"),
        (OrthogonalConv(), (4, 3, 0), "expects taps along every axis; got shape (4, 3, 0)"),
        (OrthogonalConv(groups=3), (4, 2, 3), "expects a number of outputs that 3 divides; got"),
        (LInfLipschitz(), (4,), "expects a matrix or batch of matrices; got shape (4,)"),
        (WeightStandardization(), (4,), "expects more than one entry at each index of dimension 0"),
        (WeightStandardization(), (4, 1), "more than one entry at each index of dimension 0; got"),
        (WeightStandardization(dim=2), (4, 3), "expects a tensor with a dimension 2; got shape"),
        (Ternary(dim=0), (4,), "expects more than one entry at each index of dimension 0; got"),
        (FakeQuantize(dim=1), (4,), "expects a tensor with a dimension 1; got shape (4,)"),
        *(
            (transform, shape, "expects a matrix with at least one row and one column; got shape")
            for transform, shape in (
                (Toeplitz(), (4, 0)),
                (Kronecker((1, 1)), (0, 2)),
                (Monarch(2), (4, 0)),
                (VeRA(1), (3, 0, 2)),
                (LoHa(1), (0, 3)),
                (OFT(1), (0, 2)),
            )
        ),
        (WeightStandardization(), (4, 0), "expects more than one entry at each index of dim"),
        (Reshape((6,), (2, 3)), (3, 2), "expects a shape that ends in (2, 3); got shape (3, 2)"),
        (Reshape((6,), (2, 3)), (3,), "expects a shape that ends in (2, 3); got shape (3,)"),
        (Permute((1, 0)), (2, 3, 4), "expects 2 dimensions; got shape (2, 3, 4)"),
        (Transpose(), (3,), "expects a tensor with a dimension -2; got shape (3,)"),
        (Chain(Symmetric(), Reshape((2, 8), (4, 4))), (4, 4), "Symmetric() expects a square"),
    ],
    ids=str,
)
def test_a_shape_is_refused(transform, shape, message):
    tree = {"layer": {"w": torch.ones(shape)}}
    with pytest.raises(ValueError, match=r"'layer\.w': .*" + re.escape(message)):
        fp.parametrize(tree, {"layer.w": transform})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_tensor_of_integers_is_refused(case):
    if isinstance(case.transform, Frozen):
        return
    value = torch.ones(case.shapes[0], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expects a (floating-point or )?complex tensor; got"):
        case.transform.check(value)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_refused_at_init(case, bad):
    value = case.feasible(torch.randn(case.shapes[0], dtype=torch.float64)).contiguous()
    tree = {"layer": {"w": value}}
    p = fp.parametrize(tree, {"layer.w": case.transform})
    value.view(-1)[-1] = bad
    with pytest.raises(ValueError, match=r"'layer\.w': expected finite values; got NaN or inf"):
        p.init(tree)


@pytest.mark.parametrize(
    ("transform", "value", "message"),
    [
        (Interval(0, 1), [0.5, 1.0], "strictly between 0 and 1; got entries from 0.5 to 1: clamp"),
        (Interval(0, 1), [0.5, 0.0], "strictly between 0 and 1; got entries from 0 to 0.5: clamp"),
        (Positive(), [1.0, 0.0], "every entry to be positive; got entries from 0 to 1: clamp the"),
        (Positive("exp"), [1.0, -1e-9], "to be positive; got entries from -1e-09 to 1: clamp"),
        (Positive("square"), [1.0, -1.0], "to be positive; got entries from -1 to 1: clamp the"),
        (LowerBound(1), [1.0], "every entry above 1; got entries from 1 to 1: clamp the value"),
        (UpperBound(1), [1.0], "every entry below 1; got entries from 1 to 1: clamp the value"),
        (Simplex(), [0.0, 1.0], "to be positive; got entries from 0 to 1: clamp the value first"),
        (
            Simplex("stick_breaking"),
            [-0.5, 1.5],
            "be positive; got entries from -0.5 to 1.5: clamp",
        ),
        (Ordered(), [1.0, 1.0], "expects entries that increase along the last dimension; sort"),
        (CholeskyFactor(), [[1.0, 0], [1, 0]], "expects a positive diagonal; clamp the value's"),
        (CorrelationCholesky(), [[-1.0, 0], [0, 1]], "expects a positive diagonal; clamp the"),
        (PositiveDefinite(), [[1.0, 2], [2, 1]], "has eigenvalues above 0.0; this one has not"),
        (PositiveDefinite(), [[1.0, 1], [1, 1]], "has eigenvalues above 0.0; this one has not"),
        (PositiveDefinite(0.5), [[0.4, 0], [0, 0.4]], "eigenvalues above 0.5; this one has not"),
        (UnitNorm(0), [[1.0, 0], [1, 0]], "expects no vector along dim 0 to be zero: it has no"),
        (StableDiagonal(), [1j], "expects every modulus strictly between 0 and 1; scale the"),
        (StableDiagonal(), [0j], "expects every modulus strictly between 0 and 1; scale the"),
        (StableDiagonal(pairs=True), [[0.6, 0.8]], "expects every modulus strictly between 0 and"),
        (FixedRank(2), [[1.0, 1], [1, 1]], "expects a matrix of rank at least 2, to rounding; use"),
        (FixedRank(1), [[0.0, 0], [0, 0]], "expects a matrix of rank at least 1, to rounding; use"),
        (Invertible(), [[1.0, 1], [1, 1]], "expects an invertible matrix; this one is singular"),
        (Invertible(), [[0.0]], "expects an invertible matrix; this one is singular to rounding"),
        (SpecialLinear(), [[[0.0, 0], [0, 1]]], "expects an invertible matrix; this one is sing"),
        (DoublyStochastic(), [[1.0, 0], [1e-9, -1e-9]], "expects no negative entry; clamp the"),
        (Cat([Identity(), Positive()]), [-1.0, -1.0], "be positive; got entries from -1 to -1"),
        (Chain(Ordered(), Positive()), [1.0, 0.5], "entries that increase along the last dim"),
        (Chain(Ordered(), Positive()), [-1.0, 0.5], "be positive; got entries from -1 to 0.5"),
    ],
    ids=str,
)
def test_a_value_without_a_projection_is_refused(transform, value, message):
    value = torch.tensor(value)
    tree = {"layer": {"w": value}}
    with pytest.raises(ValueError, match=r"'layer\.w': .*" + re.escape(message)):
        fp.parametrize(tree, {"layer.w": transform}).init(tree)
    transform.right_inverse(value.to("meta"))  # nothing to read


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_other_value_has_a_projection_or_is_refused(case):
    """Nothing in between: no NaN, and no value that is neither kept nor feasible."""
    value = 3 * torch.randn(case.shapes[0], dtype=torch.float64)
    if value_is_complex(case):
        value = torch.complex(value, value.flip(-1))
    try:
        raw, state = case.transform.right_inverse(value)
    except ValueError:  # the tables above have the messages
        return
    back = case.transform.forward(raw, state)
    assert back.isfinite().all()
    assert case.transform.violation(back, state) < 1e-9 or not case.measured


def value_is_complex(case):
    return case.feasible(torch.randn(case.shapes[0])).is_complex()


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Orthogonal(trivialize=False), "has no right inverse: use trivialize=True, which keeps"),
        (Orthogonal("cayley", trivialize=False), "has no right inverse: use trivialize=True"),
        (fp.transform(torch.sin), "has no right inverse. Make it with fp.transform(forward, right"),
        (Chain(fp.transform(torch.sin), Transpose()), "has no right inverse. Make it with"),
    ],
    ids=str,
)
def test_no_right_inverse_says_what_to_use(transform, message):
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        transform.right_inverse(torch.eye(3))
    tree = {"layer": {"w": torch.eye(3)}}
    with pytest.raises(NotImplementedError, match=r"'layer\.w': .*" + re.escape(message)):
        fp.parametrize(tree, {"layer.w": transform}).init(tree)


@pytest.mark.parametrize(
    ("transform", "key"),
    [
        (Mask(), "mask"),
        (Frozen(), "value"),
        (Invertible(), "base"),
        *((adapter, "base") for adapter in (LoRA(1), VeRA(1), LoHa(1), IA3(), OFT(1))),
    ],
    ids=lambda x: repr(x) if isinstance(x, Transform) else x,
)
def test_a_constraint_that_is_in_state_is_asked_for(transform, key):
    with pytest.raises(ValueError, match=rf"expects state with a '{key}', which is its constraint"):
        transform.violation(torch.eye(3), {})


def test_only_the_first_part_of_a_chain_has_named_raw_tensors():
    with pytest.raises(ValueError, match="only the first transform of a chain can have named raw"):
        Chain(Symmetric(), WeightNorm()).right_inverse(torch.eye(3))
