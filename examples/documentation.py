"""Python's documentation, which the interpreter ships as text, for models of characters."""

from pydoc_data.topics import topics

import torch

CONTEXT, BATCH = 64, 16


def documentation():
    """The text as numbers, one a character: the first nine tenths, the rest, how many symbols."""
    text = "\n".join(topics[name] for name in sorted(topics))
    symbols = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([symbols[c] for c in text])
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:], len(symbols)


def draw(tokens, generator, count=BATCH):
    """Windows of `CONTEXT` characters, and for each of these the one that follows."""
    starts = torch.randint(len(tokens) - CONTEXT, (count, 1), generator=generator)
    windows = tokens[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]
