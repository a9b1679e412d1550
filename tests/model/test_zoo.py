"""The models of the zoo: they learn, they look back only, and any of their modules can be made
from nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meshwright.model.zoo.gpt import GPT
from meshwright.model.zoo.llama import Llama, apply_rotary
from meshwright.model.zoo.mixtral import Experts, Mixtral
from meshwright.model.zoo.u_transformer import UTransformer
from meshwright.model.zoo.uneven import Uneven

MODELS = {
    "gpt": lambda: GPT(vocabulary=20, positions=16, width=32, heads=4, layers=2, dropout=0.1),
    "llama": lambda: Llama(vocabulary=20, width=32, heads=4, kv_heads=2, layers=2, hidden=64),
    "mixtral": lambda: Mixtral(
        vocabulary=20, width=32, heads=4, kv_heads=2, layers=2, hidden=48, experts=4
    ),
    "u-transformer": lambda: UTransformer(
        vocabulary=20, positions=16, width=16, heads=2, layers=1, levels=2
    ),
    "uneven": lambda: Uneven(vocabulary=20, widths=(32, 16, 8), hidden=(64, 16, 32, 48)),
}


class Logits(nn.Module):
    """Stands in for the loss and shows what it was given."""

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return logits


@pytest.mark.parametrize("name", MODELS)
def test_no_token_sees_what_follows_it(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    model.head.loss = Logits()
    tokens = torch.randint(20, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 20
    a, b = model(tokens, tokens), model(changed, tokens)
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_models_learn(name, precision):
    torch.manual_seed(0)
    model = MODELS[name]()
    tokens = torch.arange(12).repeat(4, 1) + torch.arange(4)[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", precision, enabled=precision is not None):
            loss = model(tokens, tokens + 1)
        assert loss.dtype == torch.float32
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(20.0).log().item(), abs=0.5)
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_set_by_its_modules_reset(name):
    with torch.device("meta"):
        model = MODELS[name]()
    real = model.to_empty(device="cpu")
    for parameter in real.parameters():
        nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(3)
    for module in real.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()
    assert all(p.isfinite().all() for p in real.parameters())
    assert real.head.linear.weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_residual_projections_of_gpt_start_smaller():
    torch.manual_seed(0)
    model = GPT(vocabulary=20, positions=16, width=64, heads=4, layers=8)
    assert model.blocks[0].mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.blocks[0].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_rotary_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q = torch.randn(8, dtype=torch.float64).expand(1, 10, 8)
    k = torch.randn(8, dtype=torch.float64).expand(1, 10, 8)
    scores = (apply_rotary(q, 8, 100.0) @ apply_rotary(k, 8, 100.0).mT)[0, 0]
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apply_rotary(q, 8, 100.0)[0, 0].norm(dim=-1), q[0].norm(dim=-1))


def test_experts_are_the_sum_over_each_tokens_choice():
    torch.manual_seed(0)
    module = Experts(width=8, hidden=12, experts=5, chosen=2).double()
    for p in module.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    logits, expert = (x @ module.router.weight.T).topk(2, dim=-1)
    shares = logits.softmax(-1)
    gate, up = torch.einsum("efd,bsd->ebsf", module.gate_up.weight, x).chunk(2, -1)
    every = torch.einsum("edf,ebsf->bsed", module.down.weight, F.silu(gate) * up)
    wanted = (every.gather(2, expert[..., None].expand(-1, -1, -1, 8)) * shares[..., None]).sum(2)
    torch.testing.assert_close(module(x), wanted)
    leaves = [x, *module.parameters()]
    ours = torch.autograd.grad(module(x).square().sum(), leaves)
    theirs = torch.autograd.grad(wanted.square().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
