"""What tracing counts, against torch's own counters and tensors that were really saved."""

import resource
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from meshwright.errors import ModelError
from meshwright.model.amounts import peak_bytes_of
from meshwright.model.load import load_model
from meshwright.model.shard import Column, Row
from meshwright.model.spec import LayerGraph, num_parameters, tensors_across
from meshwright.model.trace import trace
from meshwright.model.zoo.build import build_model
from meshwright.model.zoo.gpt import GPT
from meshwright.model.zoo.llama import Llama
from meshwright.model.zoo.mixtral import Mixtral
from meshwright.model.zoo.u_transformer import UTransformer
from meshwright.model.zoo.uneven import Uneven
from worlds import divided

pytestmark = pytest.mark.heavy

MODELS = {
    "gpt": lambda: GPT(vocabulary=61, positions=32, width=32, heads=4, layers=2),
    "llama": lambda: Llama(vocabulary=61, width=32, heads=4, kv_heads=2, layers=2, hidden=88),
    "mixtral": lambda: Mixtral(
        vocabulary=61, width=32, heads=4, kv_heads=2, layers=2, hidden=56, experts=4
    ),
    "u-transformer": lambda: UTransformer(
        vocabulary=61, positions=16, width=16, heads=2, layers=1, levels=2
    ),
    "uneven": lambda: Uneven(vocabulary=61, widths=(48, 24, 16), hidden=(96, 32, 48, 128)),
}


def batch(rows: int = 2, length: int = 16) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(61, (rows, length)), torch.randint(61, (rows, length))


def total(graph: LayerGraph, field: str) -> float:
    return sum(getattr(layer, field) for layer in graph.layers)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts_on_a_real_run(name):
    model, inputs = MODELS[name](), batch(rows=3)
    with FlopCounterMode(display=False) as forward:
        loss = model(*inputs)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    graph = trace(model, inputs)
    ours = total(graph, "forward_flops") + total(graph, "attention_flops")
    assert 3 * ours == forward.get_total_flops()
    assert 3 * total(graph, "backward_flops") == backward.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_once(name):
    model = MODELS[name]()
    assert num_parameters(trace(model, batch())) == sum(p.numel() for p in model.parameters())


def really_saved(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(*inputs)
        assert loss.requires_grad
    sizes = {k: t.untyped_storage().nbytes() for k, t in saved.items() if k not in weights}
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["gpt", "uneven"])
def test_saved_bytes_are_those_of_a_real_run(name):
    model = MODELS[name]()
    really = (really_saved(model, batch(rows=5)) - really_saved(model, batch(rows=2))) / 3
    assert total(trace(model, batch()), "saved_bytes") == pytest.approx(really, rel=0.01)


def test_fused_normalisation_keeps_less_than_its_steps_on_a_cpu():
    model = MODELS["llama"]()
    really = (really_saved(model, batch(rows=5)) - really_saved(model, batch(rows=2))) / 3
    # A CPU keeps x / rms(x) besides x, for each of the five normalisations.
    extra = 5 * 16 * 32 * 4
    assert total(trace(model, batch()), "saved_bytes") == pytest.approx(really - extra, rel=0.01)


def test_attention_dropout_does_not_unroll_the_fused_kernel():
    plain = GPT(vocabulary=61, positions=32, width=32, heads=4, layers=1)
    dropping = GPT(vocabulary=61, positions=32, width=32, heads=4, layers=1, dropout=0.1)
    a, b = (trace(model, batch()).layers[1] for model in (plain, dropping))
    assert (a.forward_flops, a.attention_flops) == (b.forward_flops, b.attention_flops)
    masks = 2 * 16 * 32 * 4
    assert a.saved_bytes < b.saved_bytes <= a.saved_bytes + masks


def test_amounts_do_not_depend_on_the_rows_of_the_example():
    model = MODELS["gpt"]()
    assert trace(model, batch(rows=1)) == trace(model, batch(rows=7))


def test_what_tensor_ranks_divide_is_looked_at_only_where_it_is_asked_for():
    model = GPT(vocabulary=32, positions=8, width=16, heads=4, layers=2)
    batch = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 8, dtype=torch.long)
    full, plain = trace(model, batch), trace(model, batch, divided=False)
    nothing = {"flops": 0.0, "traffic_bytes": 0.0, "saved_bytes": 0.0, "moments": ()}
    wanted = tuple(divided(layer, **nothing) for layer in full.layers)
    assert plain == replace(full, layers=wanted)
    assert plain != full


def test_equal_layers_share_a_signature():
    signatures = [layer.signature for layer in trace(MODELS["gpt"](), batch()).layers]
    assert signatures[1] == signatures[2]
    assert len(set(signatures)) == 3
    wider = GPT(vocabulary=61, positions=32, width=32, heads=8, layers=1)
    assert trace(wider, batch()).layers[1].signature != signatures[1]


def test_what_is_alive_at_each_cut_of_a_u():
    graph = trace(MODELS["uneven"](), batch())
    names = [[t.name for t in tensors_across(graph, cut)] for cut in range(1, len(graph.layers))]
    assert names == [
        ["embedding"],
        ["embedding", "encoder.0"],
        ["embedding", "encoder.0", "encoder.1"],
        ["embedding", "decoder.0/cat"],
        ["decoder.1/cat_1"],
    ]
    sizes = {t.name: t.bytes for t in graph.tensors}
    assert sizes["embedding"] == 16 * 48 * 4
    assert sizes["decoder.1/cat_1"] == 16 * 96 * 4


def test_the_middle_of_a_u_transformer_is_thin_beside_what_skips_it():
    graph = trace(MODELS["u-transformer"](), batch())
    middle = [layer.name for layer in graph.layers].index("middle.0")
    crossing = {t.name: t.bytes for t in tensors_across(graph, middle)}
    wide = 16 * 16 * 4
    assert crossing == {"encoder.0": wide, "encoder.2": wide / 2, "encoder.3": wide / 4}
    blocks = {layer.name: layer for layer in graph.layers}
    outer, inner = blocks["encoder.0"], blocks["middle.0"]
    assert outer.forward_flops == inner.forward_flops
    assert (outer.along("tensor").units, inner.along("tensor").units) == (2, 8)


def test_an_uneven_vocabulary_is_divided_in_proportion():
    head = trace(MODELS["llama"](), batch()).layers[-1]
    tensor = head.along("tensor")
    assert tensor.flops == pytest.approx(head.forward_flops)
    assert tensor.saved_bytes == pytest.approx(16 * 61 * 4)
    assert tensor.units == 0


class Pair(nn.Module):
    def __init__(self, second: Row | None) -> None:
        super().__init__()
        self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tensor_split = {"b": Column()} | ({"c": second} if second else {})

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(x))


class Integers(nn.Module):
    """Hands an integer tensor and a mask to a later layer, and freezes its first one."""

    def __init__(self, second: Row | None = None) -> None:
        super().__init__()
        self.a = nn.Embedding(5, 6).requires_grad_(False)
        self.pair = Pair(second)
        self.d = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y, order = self.a(x), x.argsort()
        return (self.d(self.pair(y)) * (order > 0)[..., None]).mean()


def test_integers_and_frozen_values_carry_no_gradient():
    graph = trace(Integers(Row()), (torch.zeros(2, 3, dtype=torch.long),), name="mine")
    flow = {t.name: t.gradient for t in graph.tensors}
    assert flow == {"a": False, "pair": True, "a/argsort": False}
    assert [layer.parameters for layer in graph.layers] == [0, 84, 42]
    assert [layer.along("tensor").parameters for layer in graph.layers] == [0, 78, 0]
    assert graph.name == "mine"


def test_a_table_that_does_not_fit_its_module_is_an_error():
    with pytest.raises(ModelError, match=r"pair: tensor_split: found a layer that fails"):
        trace(Integers(), (torch.zeros(2, 3, dtype=torch.long),))


class Rowwise(nn.Module):
    """Takes other steps for more than three rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return (y * 2 if x.shape[0] > 3 else y).mean()


def test_steps_that_depend_on_the_number_of_rows_are_an_error():
    with pytest.raises(ModelError, match=r"a: forward: found .* the same steps for every number"):
        trace(Rowwise(), (torch.zeros(2, 4),))


def test_batch_tensors_must_agree_on_rows():
    with pytest.raises(ModelError, match=r"\(2, 3\), \(4, 3\); wanted tensors whose dimension 0"):
        trace(MODELS["gpt"](), (torch.zeros(2, 3).long(), torch.zeros(4, 3).long()))


def test_a_large_model_is_traced_in_seconds_without_its_weights():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with torch.device("meta"):
        model = build_model("gpt2-xl", 1024)
    tokens = torch.empty(1, 1024, dtype=torch.long, device="meta")
    graph = trace(model, (tokens, tokens), "bf16", name="gpt2-xl")
    assert time.perf_counter() - start < 30
    # In KiB; the weights alone would be 6 GiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024
    assert num_parameters(graph) == num_parameters(load_model("gpt2-xl", 1024, "bf16"))
    assert len(graph.layers) == 50


def test_the_peak_of_a_run_is_what_was_alive_at_once() -> None:
    """Storages of 5, 1 and 3 bytes are numbered from 1, and freed by the negative number."""
    events, sizes = [1, 2, -1, 3, -2, -3], [5.0, 1.0, 3.0]
    assert peak_bytes_of(events, sizes, set()) == 6.0
    assert peak_bytes_of(events, sizes, {0}) == 4.0


def test_the_workspace_of_a_layer_is_what_its_fullest_moment_holds_beyond_what_is_saved() -> None:
    for layer in load_model("gpt-tiny", 32, "fp32").layers:
        assert layer.workspace_bytes == pytest.approx(max(each.row for each in layer.moments))
