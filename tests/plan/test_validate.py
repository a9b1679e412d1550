"""Plans that do not hold together are refused with every mistake named."""

from __future__ import annotations

import json

import pytest

from meshwright.errors import PlanError
from meshwright.model.spec import structure_fingerprint
from meshwright.plan.files import load_plan, save_plan
from meshwright.plan.spec import Pipeline, Plan, PlanInput, Stage
from meshwright.plan.validate import validate_plan
from meshwright.records import fingerprint, plain
from worlds import chain, cluster, divided, in_a_row, layer, plan_by_hand

CLUSTER = cluster(("fast",) * 4)
MODEL = chain([1.0, 1.0, 1.0])


def good() -> dict:
    """A legal plan, as its JSON."""
    stages = (
        Stage(layers=(0, 2), devices=(("a:0",), ("a:1",))),
        Stage(layers=(2, 3), devices=(("a:2",),)),
    )
    plan = plan_by_hand(
        Pipeline(micro_batches=2, rows=4, stages=stages),
        sequence=8,
        model=PlanInput(name=MODEL.name, fingerprint=structure_fingerprint(MODEL)),
        cluster=PlanInput(name=CLUSTER.name, fingerprint=fingerprint(CLUSTER)),
    )
    return plain(plan)


def stage(plan: dict, index: int) -> dict:
    return plan["pipelines"][0]["stages"][index]


EDITS = {
    "gap": (lambda p: stage(p, 1).update(layers=[3, 4]), "pipelines[0].stages[1].layers", "a gap"),
    "overlap": (lambda p: stage(p, 1).update(layers=[1, 3]), "stages[1].layers", "an overlap"),
    "empty stage": (
        lambda p: stage(p, 0).update(layers=[0, 0]),
        "stages[0].layers",
        "at least one",
    ),
    "lost layers": (lambda p: stage(p, 1).update(layers=[2, 2]), "pipelines[0].stages", "all 3"),
    "device twice": (
        lambda p: stage(p, 1).update(devices=[["a:0"]]),
        "stages[1].devices",
        "a:0 again",
    ),
    "unlisted device": (lambda p: stage(p, 1).update(devices=[["a:3"]]), "devices", "lists"),
    "idle device": (lambda p: p["devices"].append("a:3"), "devices", "no stage uses"),
    "foreign device": (
        lambda p: (p["devices"].__setitem__(2, "z:9"), stage(p, 1).update(devices=[["z:9"]])),
        "devices",
        "a device of test",
    ),
    "nameless device": (
        lambda p: (p["devices"].__setitem__(2, "z"), stage(p, 1).update(devices=[["z"]])),
        "devices",
        "node:index",
    ),
    "empty mesh": (lambda p: stage(p, 1).update(devices=[[]]), "stages[1].devices", "empty mesh"),
    "rows do not divide": (
        lambda p: p["pipelines"][0].update(rows=3),
        "stages[0].devices",
        "2 replicas for micro-batches of 3 rows",
    ),
    "wrong shares": (lambda p: stage(p, 0).update(rows=[1, 1]), "stages[0].rows", "add up to 4"),
    "boundary of a first stage": (
        lambda p: stage(p, 0).update(boundary="broadcast"),
        "stages[0].boundary",
        "nothing comes from a stage before it",
    ),
    "wrong batch": (lambda p: p["job"].update(global_batch=9), "pipelines", "2 x 4 = 8 rows"),
    "no micro-batches": (
        lambda p: p["pipelines"][0].update(micro_batches=0),
        "pipelines[0].micro_batches",
        "at least 1",
    ),
    "endless program": (
        lambda p: (
            p["pipelines"][0].update(micro_batches=2**17, rows=8),
            p["job"].update(global_batch=2**20),
            p["pipelines"][0]["stages"].extend([{"layers": [3, 3], "devices": [["a:2"]]}] * 20),
        ),
        "pipelines",
        "at most 2,000,000",
    ),
    "no pipelines": (lambda p: p.update(pipelines=[]), "pipelines", "at least one pipeline"),
    "zero sequence": (lambda p: p["job"].update(sequence=0), "job.sequence", "at least 1"),
    "another sequence": (lambda p: p["job"].update(sequence=16), "job.sequence", "8, as the model"),
    "another model": (
        lambda p: p["model"].update(fingerprint="0" * 12),
        "model.fingerprint",
        "plan again",
    ),
    "another cluster": (
        lambda p: p["cluster"].update(fingerprint="0" * 12),
        "cluster.fingerprint",
        "plan again",
    ),
    "precision not offered": (
        lambda p: p["job"].update(precision="bf16"),
        "job.precision",
        "one that it has: fp32",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_each_mistake_is_named_with_its_field(name):
    edit, field, words = EDITS[name]
    data = good()
    edit(data)
    with pytest.raises(PlanError) as caught:
        validate_plan(Plan(**_records(data)), MODEL, CLUSTER, source="plan.json")
    hits = [p for p in caught.value.problems if field in p.field and words in str(p)]
    assert hits, str(caught.value)
    assert "plan.json" in str(caught.value)


def _records(data: dict) -> dict:
    from meshwright.records import parse

    plan = parse(data, Plan, source="plan.json", error=PlanError)
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


def test_replicas_of_a_layer_may_differ_in_tensor_width():
    data = good()
    wide = {"layers": [0, 3], "devices": [["a:0", "a:1"], ["a:2"]], "rows": [3, 1]}
    data["pipelines"][0]["stages"] = [wide]
    plan = Plan(**_records(data))
    validate_plan(plan, MODEL, CLUSTER)
    (replicas,) = plan.pipelines[0].stages
    assert [len(ranks) for ranks in replicas.devices] == [2, 1]
    wide["rows"] = [3, 2]
    with pytest.raises(PlanError, match="rows"):
        validate_plan(Plan(**_records(data)), MODEL, CLUSTER)


def test_all_mistakes_come_at_once(tmp_path):
    data = good()
    data["job"]["global_batch"] = 9
    stage(data, 1)["layers"] = [3, 4]
    data["devices"].append("a:3")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    assert len(caught.value.problems) == 3


def test_tensor_width_must_divide_the_heads():
    model = in_a_row((divided(layer(), units=3),), cut_bytes=0.0)
    data = good()
    data["model"]["fingerprint"] = ""
    data["pipelines"][0]["stages"] = [{"layers": [0, 1], "devices": [["a:0", "a:1"]]}]
    data["devices"] = ["a:0", "a:1"]
    with pytest.raises(PlanError, match="a width that divides 3"):
        validate_plan(Plan(**_records(data)), model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "well-formed JSON"),
        ("[1]", "a table of named fields"),
        ("{}", "format"),
        ('{"format": 2}', "wanted format 1"),
        ('{"format": 1, "colour": "red"}', "colour"),
    ],
)
def test_malformed_files_are_refused(tmp_path, text, words):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(PlanError, match="no such file"):
        load_plan(tmp_path / "none.json")


def test_a_plan_survives_the_disk_byte_for_byte(tmp_path):
    path = tmp_path / "plan.json"
    plan = Plan(**_records(good()))
    save_plan(plan, path)
    first = path.read_bytes()
    assert load_plan(path) == plan
    save_plan(load_plan(str(path)), str(path))
    assert path.read_bytes() == first
