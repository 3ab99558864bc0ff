"""What a program notes down; the run compares the notes made with torch and with compat."""

import atexit
import copy
import io
import os

import torch

NOTES = []


def note(label, value):
    """Keep a value: a tensor, a text, a number, or a list or dictionary of them."""
    if isinstance(value, dict):
        note(f"{label} keys", " ".join(map(str, value)))
        for name, item in value.items():
            note(f"{label} {name}", item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            note(f"{label} {i}", item)
    elif isinstance(value, torch.Tensor):
        NOTES.append((label, value.detach().clone()))
    else:
        NOTES.append((label, value if isinstance(value, int | float) else str(value)))


def attempt(label, call):
    """Keep what a call returns, or which error it raises."""
    try:
        result = call()
    except Exception as error:
        note(f"{label} raises", f"{type(error).__name__}: {error}")
        return None
    note(label, result)
    return result


def first_tensor(output):
    """The first floating-point tensor in what a model returned."""
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    items = output.values() if hasattr(output, "values") else output
    for item in items if hasattr(items, "__iter__") else ():
        found = first_tensor(item)
        if found is not None:
            return found
    return None


def fill(model):
    """Give each parameter a fixed value, where a package initialises computed weights.

    Torch drops what is written to them, and compat takes it.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def train(label, model, run, steps=3, rate=0.01):
    """Train by plain gradient descent, then evaluate, copy, save and load; keep all of it."""
    torch.manual_seed(0)
    note(f"{label} start", model.state_dict())
    note(f"{label} parameters", " ".join(name for name, _ in model.named_parameters()))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate)
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        loss = first_tensor(run(model)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        note(f"{label} loss {step}", loss)
        note(f"{label} gradient {step}", norm)
    note(f"{label} trained", model.state_dict())
    model.eval()
    with torch.no_grad():
        torch.manual_seed(0)
        expected = first_tensor(run(model))
        note(f"{label} output", expected)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        attempt(f"{label} loads", lambda: str(model.load_state_dict(torch.load(file))))
        torch.manual_seed(0)
        note(f"{label} loaded", first_tensor(run(model)))


def copied(label, model, run):
    """Keep the output of a copy of the model."""
    with torch.no_grad():
        torch.manual_seed(0)
        attempt(f"{label} copied", lambda: first_tensor(run(copy.deepcopy(model))))


@atexit.register
def _save():
    by = torch.nn.utils.parametrize.cached.__module__.split(".")[0]
    torch.save({"notes": NOTES, "by": by}, os.environ.get("ECOSYSTEM_NOTES", os.devnull))
