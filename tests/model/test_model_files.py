"""Models written by hand."""

from dataclasses import replace

import pytest

from meshwright.errors import ModelError
from meshwright.model.load import load_model
from meshwright.model.spec import (
    Division,
    content_fingerprint,
    num_frozen_parameters,
    num_parameters,
    structure_fingerprint,
    tensors_across,
    with_division,
)

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
    assert enc.along("tensor") == Division(axis="tensor", units=1)
    assert (mid.attention_flops, mid.backward_flops, mid.saved_bytes) == (5e9, 1.5e12, 100)
    assert mid.along("tensor") == Division(
        axis="tensor",
        units=8,
        parameters=1000,
        flops=1.005e12,
        traffic_bytes=200.0,
        saved_bytes=100.0,
        forward_all_reduce_bytes=(100.0,),
        backward_all_reduce_bytes=(2.0 * 2**20,),
    )
    assert [(t.name, t.producer, t.consumers) for t in graph.tensors] == [
        ("enc0", 0, (1, 4)), ("enc1", 1, (2,)), ("enc2", 2, (3,)), ("mid", 3, (4,)),
        ("enc1/dec", 1, (4,)),
    ]  # fmt: skip
    assert {t.name for t in tensors_across(graph, 4)} == {"enc0", "mid", "enc1/dec"}
    assert graph.tied[0].layers == (0, 4)
    assert num_parameters(graph) == 12_001_077
    assert (graph.sequence, graph.precision) == (64, "bf16")


FROZEN = """
name = "adapted"

[[layer]]
name = "table"
forward = 0
frozen_parameters = 500
output = 64

[[layer]]
name = "base"
forward = 1000
frozen_parameters = 300
output = 64

[[layer]]
name = "block"
count = 2
forward = 1000
attention = 100
parameters = 100
frozen_parameters = 300
output = 64
tensor_units = 2

[[layer]]
name = "norm"
forward = 10
output = 64

[[layer]]
name = "head"
forward = 50
frozen_parameters = 400

[[skip]]
from = "base"
to = "norm"
bytes = 32

[[tied]]
name = "words"
layers = ["table", "head"]
parameters = 40
frozen = true
"""


def test_frozen_parameters_of_a_file_are_held_and_not_trained(tmp_path):
    graph = load(tmp_path, FROZEN)
    assert [x.parameters for x in graph.layers] == [0, 0, 100, 100, 0, 0]
    assert [x.frozen_parameters for x in graph.layers] == [500, 300, 300, 300, 0, 400]
    assert [x.cast_frozen for x in graph.layers] == [0, 300, 300, 300, 0, 400]
    assert [x.along("tensor").frozen_parameters for x in graph.layers] == [0, 0, 300, 300, 0, 0]
    (words,) = graph.tied
    assert (words.parameters, words.frozen_parameters) == (0, 40)
    assert (num_parameters(graph), num_frozen_parameters(graph)) == (200, 1840)


def test_backwards_of_a_file_follow_from_what_is_trained(tmp_path):
    """A quarter of a block's weights is trained; nothing is in the first two layers."""
    graph = load(tmp_path, FROZEN)
    assert [x.has_backward for x in graph.layers] == [False, False, True, True, True, True]
    assert [x.backward_flops for x in graph.layers] == [0, 0, 1450, 1450, 20, 50]
    assert [x.saved_bytes for x in graph.layers] == [0, 0, 64, 64, 64, 0]
    assert {t.name: t.gradient for t in graph.tensors} == {
        "table": False, "base": False, "block0": True, "block1": True, "norm": True,
        "base/norm": False,
    }  # fmt: skip
    first, second = (x.along("tensor") for x in graph.layers[2:4])
    assert first.backward_all_reduce_bytes == ()
    assert second.backward_all_reduce_bytes == (64,)


def test_a_file_that_freezes_nothing_is_read_as_ever(tmp_path):
    graph = load(tmp_path, GOOD)
    assert all(x.has_backward and not x.frozen_parameters for x in graph.layers)
    assert all(t.gradient for t in graph.tensors)
    enc, mid, dec = "b6f31ccf7d13", "99b93a098fb6", "5fa0149b1a52"
    assert [x.signature for x in graph.layers] == [enc, enc, enc, mid, dec]
    assert (structure_fingerprint(graph), content_fingerprint(graph)) == (
        "087735a31cfd",
        "059623529a08",
    )


@pytest.mark.parametrize(
    ("name", "mark"), [("gpt2", "3c2f1d963656"), ("mixtral-8x7b", "e9697331fac0")]
)
def test_profiles_measured_before_layers_had_axes_are_found(name, mark):
    """Profiles name a model by this fingerprint, in which `tensor` is the only axis."""
    assert content_fingerprint(load_model(name, 64, "fp32" if name == "gpt2" else "bf16")) == mark


def test_what_a_layer_does_along_any_axis_is_told_by_the_fingerprint(tmp_path):
    graph = load(tmp_path, GOOD)
    first, *others = graph.layers
    marks = {content_fingerprint(graph)}
    for axis in ("tensor", "another"):
        changed = with_division(first, Division(axis=axis, units=3))
        marks.add(content_fingerprint(replace(graph, layers=(changed, *others))))
        (tied,) = graph.tied
        changed = replace(tied, divided=(*tied.divided, axis))
        marks.add(content_fingerprint(replace(graph, tied=(changed,))))
    assert len(marks) == 5


def test_a_backward_of_nothing_is_a_mistake(tmp_path):
    text = FROZEN.replace(
        'name = "base"\nforward = 1000', 'name = "base"\nforward = 1000\nbackward = 5'
    )
    with pytest.raises(ModelError, match=r"layer\[1\]\.backward: found 5.*all weights are frozen"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("[[layer]]", "[[layer", "well-formed TOML"),
        ('name = "u"', "", r"m\.toml: name: found nothing"),
        ('"12 GFLOP"', '"12 GB"', r"layer\[0\]\.forward.*no such unit"),
        ('"12 GFLOP"', '"lots"', r"layer\[0\]\.forward.*found 'lots'"),
        ('"12 GFLOP"', "-3.0", r"layer\[0\]\.forward: found -3.0; wanted at least 0"),
        ("4_000_000", "-4", r"layer\[0\]\.parameters: found -4"),
        ("4_000_000", "1_000_000_000_000_001", r"parameters.*wanted at most 1,000,000,000,000,000"),
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
