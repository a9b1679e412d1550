"""What must be refused, value by value, for fuzz.py: each would change a plan, a calibration or a
training in silence, or mean nothing at all."""

from __future__ import annotations

from typing import Any

from fuzz_text import Raw

Values = tuple[Any, ...]
FORMATS: Values = (True, 1.0, 0, 2, "1", None, [1])
NO_COUNT: Values = (0, -1, True, 1.5, "1", 10**30)
NO_TIME: Values = (0, -1, True, "soon", Raw("NaN"), Raw("1e400"))
NO_NAME: Values = (5, True, "x" * 201, "two\nlines", "\x1b[2J", ["n"])

PLAN: dict[str, Values] = {
    "format": FORMATS,
    "name": NO_NAME,
    "model.source": (5, "", "none.json", "gpt-3"),
    "cluster.source": (5, "", "none.toml", "."),
    "job.global_batch": NO_COUNT,
    "job.sequence": (*NO_COUNT, 1025),
    "job.precision": ("int8", "", 16, True),
    "job.optimizer": ("adam", "", 1),
    "schedule": ("2f2b", "", 1),
    "devices": ([], ["a:0"], ["a:0", "a:0"], ["a", "b-0:0"], ["z:0", "b-0:0"], "a:0"),
    "pipelines": ([], {}, 1),
    "pipelines.0.micro_batches": (*NO_COUNT, 2**18, 3),
    "pipelines.0.rows": (*NO_COUNT, 3),
    "pipelines.0.actions": (["F0"], "F0", []),
    "pipelines.0.stages": ([], [{}]),
    "pipelines.0.stages.0.layers": ([0], [0, 0], [6, 0], [0, -1], [1, 6], [0, 6.5], [0, 10**30]),
    "pipelines.0.stages.0.devices": ([], [[]], [["z:0"]], ["a:0"], [["a:0", "a:0"]]),
    "pipelines.0.stages.0.recompute": (1, "yes"),
    "pipelines.0.stages.0.boundary": ("direct", "teleport"),
    "pipelines.0.stages.1.rows": ([], [0], [1, 1], [-2], [2.0]),
    "prediction.step_seconds": NO_TIME,
    "prediction.parts.compute": (-1, "x", Raw("Infinity")),
    "prediction.parts": ({"thinking": 1.0}, [], 1),
    "prediction.memory.0.capacity": (0, -1, 2**61, 10**300, "4 parsecs"),
    "prediction.memory.0.parameters": (-1, 10**300, 1.5),
    "prediction.dropped": ({"x": -1}, {"x": 0.5}),
}
CLUSTER: dict[str, Values] = {
    "format": FORMATS[:-2],
    "name": NO_NAME,
    "links.network.bandwidth": ("0 GB/s", "-1 GB/s", "1e999 GB/s", "10 Gbit", 10, "1 bit/s"),
    "links.network.latency": ("-1 us", "11 s", "1 parsec", 5, "1e999 s"),
    "device.fast.memory": ("0 B", "-4 GiB", "1e30 GiB", 4, "4 GB/s"),
    "device.fast.peak": ({"int8": "1 TFLOP/s"}, {"fp32": "-1 TFLOP/s"}, {"fp32": 1e12}),
    "device.fast.matmul_efficiency": (0, -0.1, 1.1, "half", True),
    "device.fast.like": ("fast", "H1000", 5),
    "node.0.devices": ([], ["0 x cpu"], ["-1 x cpu"], ["1 x H1000"], "1 x cpu", ["1e9 x cpu"]),
    "node.0.name": ("", "a b", "a:0", "$(id)", "b-0", *NO_NAME),
    "node.0.site": ("moon", "", 1),
    "node.1.count": (0, -1, True, 1.5, 10**9),
    "link.0.between": (["a", "a"], ["a", "z"], ["a"], "a"),
    "link.0.bandwidth": ("0 bit/s", 1, "1 Gbit"),
}
MATRIX: dict[str, Values] = {
    "matrix.nodes": ([], ["a-0"], ["a-0", "a-0", "b"], ["a-0", "a-1", "z"]),
    "matrix.bandwidth": ([], [["-"]], "-"),
    "matrix.bandwidth.0.1": ("0 bit/s", "2 Gbit/s", "-", "fast"),
    "matrix.latency": ("-1 us", "1 hour", 5, [["-"]]),
}
MODEL: dict[str, Values] = {
    "name": NO_NAME,
    "layer": ([], {}, "enc"),
    "layer.0.name": ("", "dec", *NO_NAME),
    "layer.0.count": (0, -1, True, 1.5, 10_001, 10**30),
    "layer.0.forward": (-1, "12 GB", "much", "1e999 FLOP", True),
    "layer.0.parameters": (-1, 1.5, True, 10**16),
    "layer.0.output": (-1, "2 seconds", 1.5, 2**61),
    "layer.0.tensor_units": (0, -4, 2.0),
    "skip.0.from": ("dec", "nose", 1),
    "skip.0.bytes": (-1, "1 GFLOP"),
    "tied.0.layers": ([], ["dec"], ["dec", "dec"], ["dec", "nose"]),
    "tied.0.parameters": (0, -1),
}
CONFIG: dict[str, Values] = {
    "model_type": ("bert", None, 5, ["llama"], {}),
    "vocab_size": (0, -1, True, 256.0, "256", 10**8, 10**300),
    "max_position_embeddings": (0, -1, 2**31),
    "hidden_size": (0, -32, 33, 10**7),
    "num_hidden_layers": (0, -4, 10**5),
    "num_attention_heads": (0, 5, 10**6),
    "num_key_value_heads": (3, -1, True),
    "intermediate_size": (0, -1, 10**8),
    "head_dim": (7, 0, -8, "8"),
    "rope_theta": (0, -1, "big", Raw("Infinity"), True),
    "rope_parameters": (5, "x", {"rope_theta": -1}),
    "rms_norm_eps": (0, -1e-5, 1, Raw("Infinity"), "small"),
    "tie_word_embeddings": (0, 1, "yes", Raw("NaN")),
    "_name_or_path": (5, ["x"], "\x1b[2J"),
}
PROFILE: dict[str, Values] = {
    "format": FORMATS,
    "model": (*NO_NAME, "another"),
    "sequence": (*NO_COUNT, 17),
    "layers.0.forward_seconds": NO_TIME,
    "layers.0.backward_seconds": NO_TIME,
    "layers.0.input_seconds": (-1, Raw("NaN")),
    "layers.0.rows": NO_COUNT,
    "layers.0.tensor": NO_COUNT,
    "layers.0.spread": (-0.1, Raw("NaN")),
    "layers.0.precision": ("int8", "bf16"),
    "layers.0.signature": ("elsewhere", 5),
    "optimizers.0.seconds_per_parameter": NO_TIME,
    "optimizers.0.overhead_seconds": (-1, Raw("NaN")),
    "links.network.bandwidth": (0, -1, Raw("Infinity")),
    "links.network.latency": (-1, Raw("NaN")),
    "links.all_reduce_latency": (-1e-6,),
    "step_overhead_seconds": (-1, Raw("NaN")),
}
CALIBRATED: dict[str, Values] = {
    "calibration.format": FORMATS[:-2],
    "calibration.devices.cpu.matmul_efficiency": (0, -1, 1.5, 0.01, Raw("NaN")),
    "calibration.devices.cpu.launch_forward": (-1, 1.0, Raw("NaN")),
    "calibration.system.step": (-1, 10.0, Raw("Infinity")),
    "calibration.system.inside_efficiency": (0, 2, -0.5),
    "calibration.system.gradient_width": (0.1, 2, -1),
    "calibration.error.low": (-1, Raw("NaN"), "x"),
    "calibration.error.runs": (-1, 1.5),
}
LINKS: dict[str, Values] = {
    "pairs.0.between": (["a:0"], ["a:0", "z:0"], "a:0"),
    "pairs.0.bandwidth": (0, -1, Raw("NaN")),
    "pairs.0.latency": (-1, Raw("Infinity")),
    "pairs.0.residual": (-1, Raw("NaN")),
    "pairs.0.points.0.seconds": NO_TIME,
    "pairs.0.points.0.bytes": (-1, 1.5),
    "all_reduce.residuals": ([], [0.0], [-2, 0, 0]),
}
SETTINGS: dict[str, Values] = {
    "model": ("\x1b[2J", 5, None),
    "data": ("", 5),
    "options.steps": NO_COUNT,
    "learning_rate": (0, -1, 1e9, Raw("NaN"), True),
    "warmup_steps": (-1, 0.5),
    "weight_decay": (-0.1, Raw("NaN")),
    "options.clip_norm": (-1, Raw("NaN"), Raw("Infinity")),
    "options.seed": (-1, 2**63, 0.5, True),
    "options.timeout_seconds": (-1, 0, 1e300, Raw("NaN")),
    "shares": ({"a:0": 0}, {"a:0": 1.5}, {"a:0": Raw("NaN")}),
    "peak_flops": ({"a:0": -1}, {"a:0": Raw("Infinity")}),
    "options.debug": (1, "yes"),
}
METRICS: dict[str, Values] = {
    "5.step_seconds": NO_TIME,
    "5.loss": ("low", True, Raw("NaN")),
    "5.tokens_per_second": (-1, Raw("NaN")),
    "5.step": (-1, 0.5, True),
    "5.memory_bytes": (-1, 1e29, 10**30),
    "5": (None, [], 5, "step", {}),
}
TIMELINE: dict[str, Values] = {
    "source": ("guessed", 1),
    "step_seconds": NO_TIME,
    "devices": ("a:0", [5]),
    "intervals.0.rank": (-1, 0.5, True),
    "intervals.0.op": ("X", 5),
    "intervals.0.stream": ("thought", 5),
    "intervals.0.start_seconds": ("now", Raw("NaN")),
    "intervals.0.bytes": (-1, 0.5),
}
BED: dict[str, Values] = {
    "format": FORMATS[:-2],
    "name": NO_NAME,
    "mode": ("slow", "", 1),
    "compute_scale": (0, -1, 1e9, Raw("nan"), True),
    "bandwidth_scale": (0, -1, Raw("inf")),
    "latency_scale": (0, -1, Raw("nan")),
    "attempts": (*NO_COUNT, 101),
    "foreign_share": (0, -1, 2, Raw("nan")),
    "fastest_share": (0.5, 0, 2),
    "cluster": ("none.toml", {}, 5),
}
MUST: dict[str, dict[str, Values]] = {
    "plan": PLAN,
    "run plan": PLAN,
    "cluster": CLUSTER,
    "matrix": MATRIX,
    "model": MODEL,
    "config": CONFIG,
    "profile": PROFILE,
    "calibrated": CALIBRATED,
    "links": LINKS,
    "run settings": SETTINGS,
    "metrics": METRICS,
    "timeline": TIMELINE,
    "testbed": BED,
}
"""By kind of file: places with the values that none of them can have."""
OPTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("plan", "--global-batch"): ("0", "-1", "1.5", "1048577", "131073"),
    ("plan", "--sequence"): ("0", "-1", "1025", "134217729"),
    ("plan", "--budget"): ("0s", "5", "-5s", "1e999 s", "nan s", "5 parsecs"),
    ("profile", "--rows"): ("0", "1,0", "1,,2", "1;2", "-1", "1048577", "99999999999", "1.5"),
    ("profile", "--tensor"): ("0", "65537", "1,-2"),
    ("profile", "--processes"): ("0", "-1", "4097", "100000"),
    ("train", "--steps"): ("0", "-3", "1.5", "1000000001"),
    ("train", "--learning-rate"): ("0", "-1", "1001"),
    ("train", "--warmup-steps"): ("-1", "1.5"),
    ("train", "--clip-norm"): ("-1", "-0.5"),
    ("train", "--seed"): ("-1", "9223372036854775808", "0.5"),
    ("train", "--timeout"): ("0", "-1", "0.5", "1e7"),
    ("propose", "--propose"): ("-1", "1001"),
    ("verify", "--steps"): ("2", "-8", "1000000001"),
    ("verify", "--against"): ("ddp", "dp,dpp"),
    ("demo", "--steps"): ("1", "0", "-1", "1000000001"),
    ("reorder", "--order"): ("custom", "zb", "F0"),
    ("whatif", "--set"): ("link", "link.network=", "link.network=0", "link.network=5 parsecs",
                          "device.cpu.matmul_efficiency=2", "site.moon.uplink=1 Gbit/s"),
    ("whatif", "--add"): ("0xT4", "T5", "1000000xT4", "-1xT4"),
    ("whatif", "--without"): ("z", "a:9"),
    ("export", "--to"): ("fairseq", "torchtitan,megatron"),
}  # fmt: skip
"""By verb and option."""
