"""Raw split for optimizers, by what each tensor is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from torch.optim import AdamW, Muon

from funcparam.parametrization.boundary import Entry, RawTree
from funcparam.parametrization.names import closest
from funcparam.parametrization.parametrization import Parametrization
from funcparam.parametrization.table import Table, Tabular
from funcparam.parametrization.tree import Leaf, flatten
from funcparam.training.arguments import expect_parametrization
from funcparam.training.choices import expect_multipliers, picked
from funcparam.training.named import Part, parts
from funcparam.training.together import Group, MakeOptimizer, Together, as_matrices
from funcparam.transforms.contract.signature import TensorSpec

Kind: TypeAlias = Literal[
    "matrix",
    "embedding",
    "vector",
    "direction",
    "magnitude",
    "factor",
    "coordinates",
    "relative",
]
T = TypeVar("T")

_KINDS: tuple[Kind, ...] = get_args(Kind)
_DECAYING: tuple[Kind, ...] = ("matrix", "embedding", "factor")
_ORTHOGONALIZED: tuple[Kind, ...] = ("matrix", "direction")


@dataclass(frozen=True)
class Member:
    """One tensor of raw, and how it is trained."""

    name: str
    tensor: Tensor
    kind: Kind
    batch: int | None
    """How many leading dimensions count matrices; None where there are none, or nobody knows."""
    lr_scale: float

    @property
    def is_matrix(self) -> bool:
        """Whether an optimizer of matrices may have it."""
        return self.kind in _ORTHOGONALIZED and self.batch is not None

    @property
    def is_frozen(self) -> bool:
        """Whether it waits for `requires_grad_()`."""
        return not self.tensor.requires_grad

    @property
    def decays(self) -> bool:
        """Whether weight decay has a meaning for it."""
        return self.kind in _DECAYING


@dataclass(frozen=True, repr=False)
class Groups(Tabular):
    """A complete partition of raw by what its tensors are, made by [`funcparam.groups`][].

    It prints as a table: each tensor with its kind, the matrices in it, whether weight decay has
    a meaning for it, and the multiplier of its learning rate.
    """

    members: tuple[Member, ...]

    @property
    def frozen(self) -> tuple[str, ...]:
        """What requires no gradients, so that an optimizer passes over it."""
        return tuple(member.name for member in self.members if member.is_frozen)

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def param_groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """List parameter groups for an optimizer of one's own.

        One for each kind and multiplier, with `lr` times the multiplier, and `weight_decay`, or 0
        where decay has no meaning. `"kind"` and `"names"` say what is in a group.

        Example:
            >>> import torch, funcparam as fp
            >>> from funcparam.transforms import WeightNorm
            >>> net = torch.nn.Linear(3, 2)
            >>> p = fp.parametrize(net, {"weight": WeightNorm()})
            >>> raw, state = p.init(net)
            >>> groups = fp.groups(raw, p, net).param_groups(lr=0.1, weight_decay=0.01)
            >>> [(group["kind"], group["weight_decay"]) for group in groups]
            [('magnitude', 0.0), ('direction', 0.0), ('vector', 0.0)]
            >>> optimizer = torch.optim.AdamW(groups)
        """
        return [
            {
                "params": [member.tensor for member in group],
                "names": [member.name for member in group],
                "kind": group[0].kind,
                "lr": lr * group[0].lr_scale,
                "weight_decay": weight_decay if group[0].decays else 0.0,
            }
            for group in _alike(self.members)
        ]

    def optimizer(
        self,
        matrices: MakeOptimizer | None = None,
        rest: MakeOptimizer | None = None,
    ) -> Together:
        """Train matrices and directions by one optimizer, and all the rest by another, as one.

        Kernels of convolutions are matrices with a row for each output channel, and a stack of
        matrices is as many matrices, so that an optimizer that takes two dimensions only, as
        `torch.optim.Muon` does, gets them too: it steps views of raw.

        The result is a `torch.optim.Optimizer`: schedulers, `GradScaler` and hooks take it, and its
        `state_dict` loads, by names, into the one that the same call makes later. Its
        `param_groups` are those of both; a scheduler that sets one learning rate for all sets it
        for both. Its `state[tensor]` is what the optimizer keeps; of a tensor that is stepped by
        views a dict of that for each, under `"0"`, `"1"`, and so on.

        Args:
            matrices: makes the optimizer of matrices from a list of parameter groups; None is
                `torch.optim.Muon` with a learning rate of 1e-3 in the scale of AdamW's, and
                PyTorch's weight decay, 0.1.
            rest: likewise for all the rest; None is `torch.optim.AdamW` with 1e-3, and PyTorch's
                weight decay, 0.01, where decay has a meaning.

        Raises:
            ValueError: an optimizer cannot take a tensor's shape; a matrix is not contiguous, so
                there is no view of it.

        Example:
            >>> from functools import partial
            >>> import torch, funcparam as fp
            >>> from funcparam.transforms import WeightNorm
            >>> net = torch.nn.Linear(3, 2)
            >>> p = fp.parametrize(net, {"weight": WeightNorm()})
            >>> raw, state = p.init(net)
            >>> optimizer = fp.groups(raw, p, net).optimizer(
            ...     matrices=partial(torch.optim.Muon, lr=0.02),
            ...     rest=partial(torch.optim.AdamW, lr=3e-3),
            ... )
            >>> torch.func.functional_call(net, p(raw, state), (torch.ones(1, 3),)).sum().backward()
            >>> optimizer.step()
        """
        matrices = matrices or partial(Muon, adjust_lr_fn="match_rms_adamw")
        made = [(matrices, True), (rest or AdamW, False)]
        return Together(
            [
                (
                    make,
                    [_group(alike) for alike in _alike(self.members) if alike[0].is_matrix == own],
                )
                for make, own in made
            ]
        )

    def _table(self) -> Table:
        head = ("raw", "kind", "matrices", "decay", "lr")
        rows = [
            (
                m.name,
                m.kind,
                _matrices(m),
                "yes" if m.decays else "",
                "frozen" if m.is_frozen else f"x {m.lr_scale:g}",
            )
            for m in self.members
        ]
        return Table(head, tuple(rows))


def groups(
    raw: RawTree,
    p: Parametrization[Any],
    net: nn.Module | None = None,
    *,
    kinds: Mapping[str, Kind] | None = None,
    batch: Mapping[str, int] | None = None,
    lr_scale: Mapping[str, float] | None = None,
) -> Groups:
    """Split raw for optimizers by what each tensor is, completely and without overlap.

    Each transform says what its raw tensors are; what has no rule is a matrix, an embedding or a
    vector. The kinds are

    * `"matrix"`, `"embedding"`, `"vector"`: the weight itself, or nearly so. With `net`, the weight
      of an `nn.Embedding` is an embedding;
    * `"direction"`: its length has no effect (`WeightNorm`, `SpectralNorm`, `UnitNorm`). That of an
      embedding is no matrix;
    * `"magnitude"`: a gain or a scale;
    * `"factor"`: of low rank, as the two of `LoRA` are;
    * `"coordinates"`: 0 has no special meaning (`Positive`, `Interval`, `Simplex`);
    * `"relative"`: 0 is the base point (`Orthogonal`, `Invertible`).

    Weight decay is for matrices, embeddings and factors. Matrices and directions are what Muon
    orthogonalizes. [`Groups.optimizer`][funcparam.Groups.optimizer] makes one optimizer of two, and
    [`Groups.param_groups`][funcparam.Groups.param_groups] plain groups for any other.

    Raw that `p.init` made is made to require gradients, but for that of weights that are frozen in
    `net`; raw of an adapter is trained although its weight is frozen. Where some of raw requires
    gradients already, and in a module, what does not is frozen, and stays so here; new raw that is
    joined to it goes through `fp.trainable` first. Frozen tensors are in the groups, too: an
    optimizer passes over them until `tensor.requires_grad_()` unfreezes them.

    Of the choices in a mapping the first that matches counts, by any name of a tied weight.

    Args:
        raw: the first of what `p.init` or `model.raw_and_state()` returns; a stack of them, too.
        p: what raw belongs to.
        net: the network, which knows what no rule tells: which weights are frozen, which are
            embeddings, and which kernels. Without it, weights of more than two dimensions are
            nobody's matrices, and complex ones never are.
        kinds: other kinds, by name or glob: `{"head.weight": "embedding"}`. `"vector"` is what is
            neither orthogonalized nor decays.
        batch: how many leading dimensions count matrices, by name or glob: `{"experts.*": 1}` for
            a weight `(experts, out, in)`, 0 for a kernel `(out, in, height, width)`.
        lr_scale: multipliers of the learning rate, by name, glob or kind: `{"*.B": 16.0}` is LoRA+
            (arXiv 2402.12354).

    Raises:
        ValueError: raw or net is not p's; a name or glob matches nothing, or nothing that is left;
            a kind is unknown; a multiplier is negative or not finite.
        TypeError: something in raw is not a tensor; a multiplier is not a number.

    Example:
        >>> import torch, funcparam as fp
        >>> from funcparam.transforms import Orthogonal, WeightNorm
        >>> net = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.Linear(4, 4))
        >>> p = fp.parametrize(net, {"0.weight": WeightNorm(), "1.weight": Orthogonal()})
        >>> raw, state = p.init(net)
        >>> fp.groups(raw, p, net)
        raw                 kind       matrices  decay  lr
        ------------------  ---------  --------  -----  ---
        0.weight.magnitude  magnitude                   x 1
        0.weight.direction  direction  4 x 6            x 1
        0.bias              vector                      x 1
        1.weight            relative                    x 1
        1.bias              vector                      x 1
    """
    expect_parametrization(p, "fp.groups(raw, p, net)")
    entries = {entry.name: entry for entry in p.entries}
    found = [*parts(raw)]
    _expect_raw_of(entries, found)
    leaves = _leaves(net, found)
    about = {x.name: (x, entries[x.weight], leaves.get(x.weight)) for x in found}
    names = {name: _names(known[0], known[1]) for name, known in about.items()}
    kind_of: dict[str, Kind] = {name: _kind(*known) for name, known in about.items()}
    kind_of |= _expect_kinds(picked(kinds, "kinds", names, kind_of))
    counted = picked(batch, "batch", names, kind_of)
    scales = picked(expect_multipliers(lr_scale or {}), "lr_scale", names, kind_of)
    members = tuple(
        Member(
            name,
            known[0].tensor,
            kind_of[name],
            _batch(*known, counted.get(name), kind_of[name]),
            scales.get(name, 1.0),
        )
        for name, known in about.items()
    )
    if not any(x.tensor.requires_grad or isinstance(x.tensor, nn.Parameter) for x in found):
        for known in about.values():  # raw that p.init made
            known[0].tensor.requires_grad_(_trains(*known))
    return Groups(members)


def _leaves(net: nn.Module | None, found: list[Part]) -> dict[str, Leaf]:
    if net is None:
        return {}
    leaves = {name: leaf for leaf in flatten(net)[0] for name in leaf.names}
    for part in found:
        if part.weight not in leaves:
            raise ValueError(
                f"net: expected the network that p was made for; it has no {part.weight!r}. That of"
                " a Parametrized is the one it was made of, or model.fold()"
            )
    return leaves


def _expect_kinds(chosen: dict[str, Kind]) -> dict[str, Kind]:
    for name, kind in chosen.items():
        if kind not in _KINDS:
            raise ValueError(f"kinds: {name!r}: expected one of {', '.join(_KINDS)}; got {kind!r}")
    return chosen


def _expect_raw_of(entries: Mapping[str, Entry], found: list[Part]) -> None:
    for part in found:
        if part.weight not in entries:
            near = closest(part.weight, [*entries])
            raise ValueError(f"raw: unknown name {part.weight!r}; {near}")
    seen: dict[int, str] = {}
    for part in found:
        other = seen.setdefault(id(part.tensor), part.name)
        if other != part.name:
            raise ValueError(
                f"raw: expected different tensors; {other!r} and {part.name!r} are one"
            )
    given = {part.name for part in found}
    for name in (name for entry in entries.values() for name in _trained_in(entry)):
        if name not in given:
            raise ValueError(
                f"raw: missing {name!r}, which would not be trained. To train a part, give its"
                " parametrization, p.select(...)"
            )


def _trained_in(entry: Entry) -> Iterator[str]:
    raw = entry.signature.raw
    for key, spec in [("", raw)] if isinstance(raw, TensorSpec) else raw:
        if spec.dtype.is_floating_point or spec.dtype.is_complex:
            yield f"{entry.name}.{key}" if key else entry.name


def _trains(part: Part, entry: Entry, leaf: Leaf | None) -> bool:
    """Whether the network trains its weight, or an adapter does in its place."""
    adapts = entry.transform is not None and entry.transform.adapts(part.key)
    return leaf is None or adapts or leaf.tensor.requires_grad


def _names(part: Part, entry: Entry) -> tuple[str, ...]:
    """The names of a tensor by each of those of its weight."""
    return tuple(Part(name, part.key, part.tensor).name for name in entry.names)


def _kind(part: Part, entry: Entry, leaf: Leaf | None) -> Kind:
    role = "weight" if entry.transform is None else entry.transform.role(part.key)
    if role != "weight":
        return role
    if len(_spec(part, entry).shape) < 2:
        return "vector"
    return "embedding" if _is_in(leaf, nn.Embedding, nn.EmbeddingBag) else "matrix"


def _is_in(leaf: Leaf | None, *kinds: type[nn.Module]) -> bool:
    return leaf is not None and any(isinstance(owner, kinds) for owner, _ in leaf.owners)


def _batch(
    part: Part, entry: Entry, leaf: Leaf | None, given: int | None, kind: Kind
) -> int | None:
    """How many dimensions count matrices, those of a stack of raws included."""
    spec = _spec(part, entry)
    stacked = part.tensor.ndim - len(spec.shape)
    if given is not None:
        if given not in range(len(spec.shape) - 1):
            raise ValueError(
                f"batch: {part.name!r} has shape {spec.shape}, of which at least two dimensions are"
                f" the matrix; got {given} that count matrices"
            )
        return given + stacked
    rows_of_their_own = kind == "direction" and _is_in(leaf, nn.Embedding, nn.EmbeddingBag)
    if len(spec.shape) < 2 or part.tensor.is_complex() or rows_of_their_own:
        return None
    if len(spec.shape) == 2 or _is_in(leaf, _ConvNd):
        return stacked
    is_own_shape = spec.shape != entry.signature.value.shape  # blocks that the transform made
    return len(spec.shape) - 2 + stacked if leaf or is_own_shape else None


def _spec(part: Part, entry: Entry) -> TensorSpec:
    raw = entry.signature.raw
    return raw if isinstance(raw, TensorSpec) else dict(raw)[part.key]


def _alike(members: Sequence[Member]) -> list[list[Member]]:
    """Members of one kind and multiplier together, in the order of the first of each."""
    found: dict[Any, list[Member]] = {}
    for member in members:
        found.setdefault((member.kind, member.is_matrix, member.lr_scale), []).append(member)
    return [*found.values()]


def _group(members: Sequence[Member]) -> Group:
    views = [
        [member.tensor]
        if not member.is_matrix or member.tensor.ndim == 2
        else [*as_matrices(member.name, member.tensor, member.batch or 0)]
        for member in members
    ]
    options: dict[str, Any] = {} if members[0].decays else {"weight_decay": 0.0}
    tensors = {member.name: member.tensor for member in members}
    return Group(tensors, views, {"kind": members[0].kind, **options}, members[0].lr_scale)


def _matrices(member: Member) -> str:
    if not member.is_matrix:
        return ""
    count, rows, columns = as_matrices(member.name, member.tensor, member.batch or 0).shape
    return f"{rows} x {columns}" if count == 1 else f"{count} of {rows} x {columns}"
