"""The shell in what others train with: transformers, accelerate, Lightning."""

import pytest
import torch
from torch import nn

import funcparam as fp
from funcparam.transforms import Identity, Orthogonal, SpectralNorm

RULES = {"bert.pooler.dense.weight": Orthogonal(), "*.intermediate.dense.weight": SpectralNorm()}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """What these packages warn of is theirs."""
    pytest.importorskip("transformers").logging.set_verbosity_error()


def classifier():
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
    )
    net = transformers.BertForSequenceClassification(config)
    return fp.Parametrized(net, fp.parametrize(net, RULES))


def data():
    tokens = torch.randint(0, 32, (16, 4), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 2} for row in tokens]


def trainer(folder, model, **options):
    import transformers

    arguments = transformers.TrainingArguments(
        str(folder),
        report_to=[],
        use_cpu=True,
        max_steps=4,
        save_steps=2,
        disable_tqdm=True,
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=data(), eval_dataset=data())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointed"]
)
def test_the_trainer_of_transformers_with_defaults(tmp_path, options, capsys):
    pytest.importorskip("accelerate")
    model = classifier()
    own = trainer(tmp_path, model, **options)
    own.train()
    assert own.evaluate()["eval_loss"] > 0
    again = classifier()
    trainer(tmp_path, again, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    plain = classifier()
    trainer(tmp_path / "plain", plain).train()
    torch.testing.assert_close(dict(plain.state_dict()), dict(model.state_dict()))


@pytest.mark.filterwarnings("ignore")
def test_what_transformers_saves_is_folded(tmp_path):
    import transformers

    model = classifier().eval()
    model.save_pretrained(tmp_path)
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    x = torch.stack([row["input_ids"] for row in data()])
    assert torch.equal(plain(x).logits, model(x).logits)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_saves_a_tied_embedding_that_has_a_rule(tmp_path):
    import transformers

    config = transformers.GPT2Config(vocab_size=32, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    net = transformers.GPT2LMHeadModel(config)
    model = fp.Parametrized(net, fp.parametrize(net, {"transformer.wte.weight": Identity()}))
    trainer(tmp_path, model).save_model(tmp_path)
    again = fp.Parametrized.from_checkpoint(
        net, tmp_path / "model.safetensors", model.parametrization
    )
    torch.testing.assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pattern", ["*.c_fc.weight", "transformer.wte.weight"])
def test_a_language_model_generates_as_the_folded_one(pattern, tmp_path):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=16, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    net = transformers.GPT2LMHeadModel(config)  # whose head is tied to the embedding
    model = fp.Parametrized(net, fp.parametrize(net, {pattern: Orthogonal()})).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = torch.arange(1, 5)[None]
    assert torch.equal(model.generate(prompt, **options), model.fold().generate(prompt, **options))
    assert model.config is model.net.config
    assert model.device.type == "cpu"
    model.save_pretrained(tmp_path)
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(plain(prompt).logits, model(prompt).logits)


@pytest.mark.filterwarnings("ignore")
def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, plain = classifier(), classifier()
    own = accelerate.Accelerator(cpu=True, mixed_precision="no")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapped, optimizer = own.prepare(model, optimizer)
    other = torch.optim.SGD(plain.parameters(), 0.1)
    x, y = (torch.stack([row[key] for row in data()]) for key in ("input_ids", "labels"))
    for net in (model, plain):
        net.eval()
    for _ in range(2):
        own.backward(wrapped(x, labels=y).loss)
        optimizer.step()
        optimizer.zero_grad()
        plain(x, labels=y).loss.backward()
        other.step()
        other.zero_grad()
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    own.save_state(tmp_path)
    with torch.no_grad():
        next(model.raw.parameters()).zero_()
    own.load_state(tmp_path)
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    assert own.unwrap_model(wrapped) is model


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
            self.model = fp.Parametrized(net, fp.parametrize(net, {"0.weight": Orthogonal()}))

        def training_step(self, batch, _):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(module, steps, **options):
        rows = torch.utils.data.TensorDataset(torch.ones(8, 4))
        own = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=options.pop("callbacks", None),
        )
        own.fit(module, torch.utils.data.DataLoader(rows, batch_size=4), **options)
        return own

    whole, part, again = Module(), Module(), Module()
    fit(whole, 4)
    fit(part, 2).save_checkpoint(tmp_path / "half.ckpt")
    fit(again, 4, ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(dict(again.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)
    pruning = lightning.pytorch.callbacks.ModelPruning("l1_unstructured", amount=0.3)
    with pytest.raises(TypeError, match="torch.nn.utils.prune is the transform Mask"):
        fit(Module(), 2, callbacks=[pruning])
