"""Models written by hand."""

import pytest

from meshwright.errors import ModelError
from meshwright.model.load import load_model
from meshwright.model.spec import alive_at, num_parameters

GOOD = """
name = "u"

[[layer]]
name = "enc"
count = 3
forward = "12 GFLOP"
parameters = 4_000_000
output = "2 MiB"
saved = "9 MiB"

[[layer]]
name = "mid"
forward = "1 TFLOP"
attention = 5e9
backward = "1.5 TFLOP"
parameters = 1000
output = 100
tensor_units = 8

[[layer]]
name = "dec"
forward = 1

[[skip]]
from = "enc0"
to = "dec"

[[skip]]
from = "enc1"
to = "dec"
bytes = "1 KiB"

[[tied]]
name = "table"
layers = ["dec", "enc0"]
parameters = 77
"""


def load(tmp_path, text):
    path = tmp_path / "m.toml"
    path.write_text(text)
    return load_model(path, 64, "bf16")


def test_a_hand_written_model_is_read_as_it_is_written(tmp_path):
    graph = load(tmp_path, GOOD)
    assert [layer.name for layer in graph.layers] == ["enc0", "enc1", "enc2", "mid", "dec"]
    enc, mid = graph.layers[1], graph.layers[3]
    assert (enc.forward_flops, enc.backward_flops, enc.saved_bytes) == (12e9, 24e9, 9 * 2**20)
    assert enc.signature == graph.layers[0].signature != mid.signature
    assert (enc.tensor_units, enc.split_flops) == (1, 0)
    assert (mid.attention_flops, mid.backward_flops, mid.saved_bytes) == (5e9, 1.5e12, 100)
    assert (mid.split_flops, mid.split_parameters) == (1.005e12, 1000)
    assert mid.forward_all_reduce_bytes == (100,)
    assert mid.backward_all_reduce_bytes == (2 * 2**20,)
    assert [(t.name, t.producer, t.consumers) for t in graph.tensors] == [
        ("enc0", 0, (1, 4)), ("enc1", 1, (2,)), ("enc2", 2, (3,)), ("mid", 3, (4,)),
        ("enc1/dec", 1, (4,)),
    ]  # fmt: skip
    assert {t.name for t in alive_at(graph, 4)} == {"enc0", "mid", "enc1/dec"}
    assert graph.tied[0].layers == (0, 4)
    assert num_parameters(graph) == 12_001_077
    assert (graph.sequence, graph.precision) == (64, "bf16")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("[[layer]]", "[[layer", "well-formed TOML"),
        ('name = "u"', "", r"m\.toml: name: found nothing"),
        ('"12 GFLOP"', '"12 GB"', r"layer\[0\]\.forward.*no such unit"),
        ('"12 GFLOP"', '"lots"', r"layer\[0\]\.forward.*found 'lots'"),
        ('"12 GFLOP"', "-3.0", r"layer\[0\]\.forward: found -3.0; wanted at least 0"),
        ("4_000_000", "-4", r"layer\[0\]\.parameters: found -4"),
        ("4_000_000", "4.5", r"layer\[0\]\.parameters: found 4.5; wanted a whole number"),
        ("count = 3", "count = 9_999", "layer: found 10,001 layers; wanted at most 10,000"),
        ("count = 3", "count = 0", r"layer\[0\]\.count: found 0"),
        ("forward = 1\n", "", r"layer\[2\]\.forward: found nothing"),
        ("forward = 1\n", "forward = 1\nspeed = 3\n", r"layer\[2\]\.speed: found an unknown field"),
        ('name = "mid"', 'name = "dec"', "layer: found 'dec' 2 times"),
        ('from = "enc0"', 'from = "enc"', r"skip\[0\]\.from: found 'enc'; wanted one of enc0"),
        ('from = "enc1"\nto = "dec"', 'from = "dec"\nto = "enc1"', r"skip\[1\]\.to: found 'enc1'"),
        ('["dec", "enc0"]', '["dec", "nose"]', r"tied\[0\]\.layers: found 'nose'"),
        ('["dec", "enc0"]', '["dec"]', r"tied\[0\]\.layers.*at least 2"),
        ('["dec", "enc0"]', '["dec", "dec"]', r"tied\[0\]\.layers: found a layer named twice"),
    ],
)
def test_a_bad_file_names_the_field(tmp_path, old, new, text):
    assert old in GOOD
    with pytest.raises(ModelError, match=text):
        load(tmp_path, GOOD.replace(old, new, 1))


def test_all_mistakes_are_told_at_once(tmp_path):
    text = GOOD.replace('to = "dec"', 'to = "nowhere"').replace('"enc0"]', '"gone"]')
    with pytest.raises(ModelError) as caught:
        load(tmp_path, text)
    assert [p.field for p in caught.value.problems] == [
        "skip[0].to",
        "skip[1].to",
        "tied[0].layers",
    ]


def test_a_model_without_layers_is_none(tmp_path):
    with pytest.raises(ModelError, match="layer: found nothing"):
        load(tmp_path, 'name = "empty"')
