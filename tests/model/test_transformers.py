"""The same model in transformers: as many parameters, the same loss, the same gradients."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from published import PUBLISHED
from tiny_configs import LENGTH, TINY
from weights_of import LAYOUTS, ours

from meshwright.model.hf import from_config
from meshwright.model.spec import num_parameters
from meshwright.model.transformer.counted_graph import counted_graph
from meshwright.model.transformer.families import FAMILIES
from meshwright.model.zoo.build import from_language_model

transformers = pytest.importorskip(
    "transformers", reason="transformers, which ours are compared with, is not installed"
)

UNTIED = ("flan-t5-xl",)
"""Models of which transformers 5 ties embedding and output projection although they are two."""


def theirs(config, **how):
    """The model of transformers for a config.json."""
    head = FAMILIES[config["model_type"]].heads[0]
    return getattr(transformers, head)._from_config(read(config), **how)


def read(config):
    """A config.json as transformers reads it, which writes into what it is given."""
    fields = copy.deepcopy({key: value for key, value in config.items() if key != "model_type"})
    return transformers.AutoConfig.for_model(config["model_type"], **fields)


@pytest.fixture
def exactly(monkeypatch):
    """Normalisations, softmaxes and angles that transformers computes in float32, whatever the
    model's precision, are computed in float64, so that only what is computed may differ."""
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(usual)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in UNTIED])
def test_published_models_have_as_many_parameters_as_in_transformers(name):
    with torch.device("meta"):
        model = theirs(PUBLISHED[name])
    model.tie_weights()
    counted = counted_graph(from_config(PUBLISHED[name], name), 512, "bf16")
    trained = (each for each in model.parameters() if each.requires_grad)
    assert num_parameters(counted) == sum(each.numel() for each in trained)


def test_every_family_of_decoders_is_compared():
    of_tiny = {config["model_type"] for config in TINY.values()}
    heads = {name: family.heads[0] for name, family in FAMILIES.items()}
    decoders = {name for name, head in heads.items() if head.endswith(("CausalLM", "LMHeadModel"))}
    assert of_tiny == decoders == set(LAYOUTS)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_takes(kind):
    """As far as transformers has a field of that name; it has none of some that it only reads."""
    family = FAMILIES[kind]
    windows = {"use_sliding_window": True} if "use_sliding_window" in family.follows else {}
    theirs = transformers.AutoConfig.for_model(kind, **windows)
    for name, value in family.usual.items():
        assert getattr(theirs, name, value) == value, name


@pytest.mark.parametrize(
    "name", [each for each in (*TINY, *PUBLISHED) if not each.startswith(("t5", "flan-t5"))]
)
def test_a_file_that_transformers_wrote_is_the_model_that_it_read(name):
    config = {**TINY, **PUBLISHED}[name]
    written = json.loads(read(config).to_json_string())
    assert from_config(written, name) == from_config(config, name)


@pytest.mark.heavy
@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("name", TINY)
def test_losses_and_all_gradients_are_those_of_transformers(name):
    config = from_config(TINY[name], name)
    random = torch.Generator().manual_seed(0)
    model = theirs(TINY[name], attn_implementation="eager", experts_implementation="eager").eval()
    with torch.no_grad():
        for value in (*model.parameters(), *_trained_by_hand(model)):
            value.add_(torch.randn(value.shape, generator=random, dtype=value.dtype), alpha=0.2)
    network = from_language_model(config).double()
    parameters = dict(network.named_parameters(remove_duplicate=False))
    network.load_state_dict(ours(list(network.state_dict()), model.state_dict(), config))
    tokens = torch.randint(3, config.vocabulary, (2, LENGTH + 1), generator=random)
    read, targets = tokens[:, :-1], tokens[:, 1:]
    wanted = F.cross_entropy(model(read, use_cache=False).logits.flatten(0, 1), targets.flatten())
    loss = network(read, targets)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-10)
    wanted.backward()
    loss.backward()
    theirs_by_name = dict(model.named_parameters(remove_duplicate=False))
    gradients = ours(list(parameters), {k: v.grad for k, v in theirs_by_name.items()}, config)
    for key, parameter in parameters.items():
        scale = gradients[key].abs().max().item()
        assert scale > 0, key
        torch.testing.assert_close(
            parameter.grad,
            gradients[key],
            rtol=0,
            atol=1e-9 * scale,
            msg=lambda m, k=key: f"{k}: {m}",
        )


def _trained_by_hand(model):
    """Biases that balance experts, and no gradient moves."""
    return [value for name, value in model.named_buffers() if name.endswith("correction_bias")]
