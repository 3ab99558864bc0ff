"""Transforms that users write: what is checked of them, and what they are told."""

from dataclasses import dataclass

import pytest
import torch

import funcparam as fp


class Base(fp.Transform):
    def forward(self, raw, state):
        return raw

    def right_inverse(self, value, *, generator=None):
        return value, {}

    def violation(self, value, state):
        return value.new_zeros(())


@dataclass
class Mutable(Base):
    scale: float = 1.0


@dataclass(frozen=True)
class Unpaired(Base):
    def right_inverse(self, value, *, generator=None):
        return value


TREE = {"w": torch.ones(2)}


def test_they_are_hashable():
    with pytest.raises(TypeError, match="'w': Mutable.* dataclass with frozen=True"):
        fp.parametrize(TREE, {"w": Mutable()})


def test_the_right_inverse_returns_raw_and_state():
    with pytest.raises(TypeError, match=r"'w': Unpaired.* to return \(raw, state\); got .*Tensor"):
        fp.parametrize(TREE, {"w": Unpaired()})


def test_a_plain_class_works():
    p = fp.parametrize(TREE, {"w": Base()})
    assert torch.equal(p(*p.init(TREE))["w"], TREE["w"])
