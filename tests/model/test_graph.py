"""Cutting models into layers: what the parts hold, hand on and compute."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright.errors import ModelError
from meshwright.model.graph import LayeredModel, cut
from meshwright.model.zoo.gpt import GPT
from meshwright.model.zoo.llama import Llama
from meshwright.model.zoo.mixtral import Mixtral
from meshwright.model.zoo.u_transformer import UTransformer
from meshwright.model.zoo.uneven import Uneven

MODELS = {
    "gpt": lambda: GPT(vocabulary=50, positions=16, width=16, heads=4, layers=3, dropout=0.1),
    "untied": lambda: GPT(vocabulary=50, positions=16, width=16, heads=4, layers=2, tied=False),
    "llama": lambda: Llama(vocabulary=50, width=16, heads=4, kv_heads=2, layers=2, hidden=40),
    "mixtral": lambda: Mixtral(
        vocabulary=50, width=16, heads=4, kv_heads=2, layers=2, hidden=24, experts=4
    ),
    "u-transformer": lambda: UTransformer(
        vocabulary=50, positions=16, width=8, heads=2, layers=1, levels=2
    ),
    "uneven": lambda: Uneven(vocabulary=50, widths=(24, 16, 8), hidden=(64, 32, 16, 128)),
}


def tokens(rows: int = 2, length: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(50, (rows, length)), torch.randint(50, (rows, length))


def run(layered: LayeredModel, inputs: tuple[Tensor, ...]) -> Tensor:
    values = dict(zip(layered.inputs, inputs, strict=True))
    for part in layered.layers:
        made = part.module(*(values[name] for name in part.reads))
        values |= dict(zip(part.writes, made, strict=True))
    return values["loss"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_parts_in_order_are_the_model_bit_by_bit(name, precision):
    torch.manual_seed(0)
    model = MODELS[name]().to(torch.float64 if precision == "fp64" else torch.float32)
    inputs = tokens()
    layered = cut(model, inputs, precision)
    torch.manual_seed(2)
    whole = model(*inputs)
    gradients = torch.autograd.grad(whole, list(model.parameters()))
    torch.manual_seed(2)
    parts = run(layered, inputs)
    assert torch.equal(whole, parts)
    for a, b in zip(gradients, torch.autograd.grad(parts, list(model.parameters())), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_a_meta_model_are_those_of_the_real_one(name):
    with torch.device("meta"):
        model = MODELS[name]()
    layered = cut(model, tuple(t.to("meta") for t in tokens()))
    real = cut(MODELS[name](), tokens())
    assert [p.name for p in layered.layers] == [p.name for p in real.layers]
    assert layered.tensors == real.tensors
    assert all(p.is_meta for p in model.parameters())


def test_layers_are_named_after_their_modules_and_read_the_batch_where_they_need_it():
    layered = cut(MODELS["gpt"](), tokens())
    assert [p.name for p in layered.layers] == [
        "embedding", "blocks.0", "blocks.1", "blocks.2", "head",
    ]  # fmt: skip
    assert layered.layers[0].reads == ("tokens",)
    assert layered.layers[-1].reads == ("targets", "blocks.2")
    assert layered.layers[-1].writes == ("loss",)
    assert [t.name for t in layered.tensors] == [p.name for p in layered.layers[:-1]]


def test_tied_parameters_are_found():
    layered = cut(MODELS["gpt"](), tokens())
    assert layered.tied == {"embedding.tokens.weight": (0, 4)}
    assert layered.layers[4].parameters["head.linear.weight"] == "embedding.tokens.weight"
    assert cut(MODELS["untied"](), tokens()).tied == {}


def test_a_skip_connection_is_one_tensor_with_all_its_readers():
    layered = cut(MODELS["uneven"](), tokens())
    flow = {t.name: (t.producer, t.consumers, t.shape) for t in layered.tensors}
    assert flow["embedding"] == (0, (1, 4), (2, 8, 24))
    assert flow["encoder.0"] == (1, (2, 3), (2, 8, 16))
    assert all(t.gradient for t in layered.tensors)


def test_low_precision_is_seen_in_what_crosses():
    layered = cut(MODELS["llama"](), tokens(), "bf16")
    assert {t.dtype for t in layered.tensors} == {torch.bfloat16}


class Glue(nn.Module):
    """A forward with shapes, assertions, factories, structures, masks and a root parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.0)
        self.b = nn.Linear(6, 6)
        self.c = nn.LSTM(6, 6, batch_first=True)
        self.d = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.register_buffer("shift", torch.arange(6.0))

    def forward(self, x: Tensor, weights: Tensor, label: Tensor | None = None) -> Tensor:
        rows, length = x.shape[0], x.size(1)
        assert length == len(x[0])
        assert label is None
        positions = torch.arange(length, device=x.device)[None, :, None]
        mask = positions % 2 == 0
        y = self.drop(self.a(x + positions))
        y = torch.where(mask, self.b(y) * self.scale, y)
        z, (h, _) = self.c(y)
        if rows > 1 and z.dtype.is_floating_point and int(z.shape[-1]) == 6:
            z = z + h[0][:, None] + self.shift
        z = self.d(z) * self.scale + torch.zeros(rows, 1, 6, device=z.device)
        return ((z.view(rows, -1, 6).mT - x.mT).square() * weights.sum()).mean()


def test_operations_between_modules_belong_to_the_layer_before():
    torch.manual_seed(0)
    model, inputs = Glue(), (torch.randn(3, 4, 6), torch.rand(2))
    layered = cut(model, inputs)
    assert torch.equal(model(*inputs), run(layered, inputs))
    assert [p.name for p in layered.layers] == ["a", "b", "c", "d"]
    assert layered.layers[0].modules == ("a", "drop")
    assert layered.tied == {"scale": (1, 3)}
    by_name = {t.name: t for t in layered.tensors}
    assert not by_name["a/eq"].gradient
    assert "a/drop" in by_name


def test_a_sequential_model_has_its_elements_as_layers():
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.square().mean()

    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), inner, nn.Linear(4, 4), nn.Flatten(), Mean())
    layered = cut(model, (torch.randn(2, 4),))
    assert [p.name for p in layered.layers] == ["0", "2", "3"]
    assert layered.layers[-1].modules == ("3", "4", "5")


def test_a_module_called_twice_is_two_layers_of_tied_parameters():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.a(x))).mean()

    layered = cut(Twice(), (torch.randn(2, 3),))
    assert [p.name for p in layered.layers] == ["a", "b", "a@2"]
    assert layered.tied == {"a.weight": (0, 2), "a.bias": (0, 2)}


class Broken(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a = nn.Linear(4, 4)
        if kind == "unused":
            self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        if self.kind == "no layer":
            return F.linear(x, self.a.weight).mean()
        y = self.a(x)
        if self.kind == "branch" and y.sum() > 0:
            y = y * 2
        if self.kind == "item":
            y = y * y.sum().item()
        if self.kind == "wrong shape":
            y = y @ torch.zeros(5, 5)
        if self.kind == "detached":
            y = y.detach()
        if self.kind == "not scalar":
            return y
        return {"loss": y.mean()} if self.kind == "structure" else y.mean()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("branch", r"test_graph.py:\d+.*\n.*masks"),
        ("item", "do not depend on the values"),
        ("wrong shape", r"test_graph.py:\d+: found .*runs on the example batch"),
        ("detached", "no trainable parameter leads to"),
        ("not scalar", r"result of \(2, 4\); wanted one scalar"),
        ("structure", "result of dict; wanted one scalar"),
        ("no layer", "found no module with parameters"),
        ("unused", "b.weight .*never used"),
    ],
)
def test_a_model_that_cannot_be_cut_says_why(kind, text):
    with pytest.raises(ModelError, match=f"(?s){text}"):
        cut(Broken(kind), (torch.randn(2, 4),))


def test_more_batch_tensors_than_arguments_is_an_error():
    with pytest.raises(ModelError, match="3 batch tensors for 2 arguments"):
        cut(MODELS["gpt"](), (*tokens(), torch.zeros(2)))


def test_parts_make_tensors_on_the_device_of_their_inputs():
    with torch.device("meta"):
        model, glue = MODELS["gpt"](), Glue()
    first = cut(glue, (torch.randn(3, 4, 6), torch.rand(2))).layers[0]
    made = first.module(torch.randn(3, 4, 6, device="meta"))
    assert len(made) == 2
    assert all(t.is_meta for t in made)
    assert cut(model, tokens()).layers[0].module(tokens()[0].to("meta"))[0].is_meta
