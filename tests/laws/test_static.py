"""Law 1: a transform is static configuration, without tensors."""

import dataclasses
import pickle
from copy import deepcopy

import pytest
import torch

from tests.cases import every_case


@every_case
def test_hashable_comparable_picklable(case, shape):
    copy = pickle.loads(pickle.dumps(case.transform))
    assert copy == case.transform
    assert hash(copy) == hash(case.transform)
    assert deepcopy(case.transform) == case.transform


@every_case
def test_no_tensor_inside(case, shape):
    def fields(thing):
        for f in dataclasses.fields(thing):
            inner = getattr(thing, f.name)
            for item in inner if isinstance(inner, tuple) else (inner,):
                yield item
                if dataclasses.is_dataclass(item):
                    yield from fields(item)

    assert not any(isinstance(item, torch.Tensor) for item in fields(case.transform))


@every_case
def test_immutable(case, shape):
    name = dataclasses.fields(case.transform)[0].name if dataclasses.fields(case.transform) else "x"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(case.transform, name, None)
