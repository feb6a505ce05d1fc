"""What a run will need, before it starts: from its compiled step, and on the devices that are here."""

import dataclasses
import importlib.util
import json
import math
import re
import shlex
from types import SimpleNamespace

import pytest
from support.runs import run_config
from support.training_runs import flags

from gpt_pretrain import preflight, settings
from gpt_pretrain.flags import bindings_of
from gpt_pretrain.forecast import advice as advice_lib
from gpt_pretrain.forecast import compilation, loading
from gpt_pretrain.forecast.collectives import Collective
from gpt_pretrain.forecast.compilation import Largest, Step, candidates, largest_that_fits
from gpt_pretrain.forecast.hlo import Program
from gpt_pretrain.forecast.kernels import Kernel
from gpt_pretrain.forecast.memory import Needed, There, needed_by_message
from gpt_pretrain.forecast.network import Network
from gpt_pretrain.forecast.prediction import predict
from gpt_pretrain.forecast.report import report, to_json
from gpt_pretrain.forecast.roofline import roofline_of
from gpt_pretrain.forecast.topologies import Topology, memory_fraction_of_gpus
from gpt_pretrain.parallel.devices import Chip
from gpt_pretrain.parallel.mesh import make_mesh
from gpt_pretrain.train.build import build
from gpt_pretrain.train.opened_data import open_data
from gpt_pretrain.train.stand_in import random_data
from gpt_pretrain.train.start import Start

GIB = 2**30
ALL = ((0, 1, 2, 3),)


# ---- the network ----


def tpus(*shape: int) -> list:
    """The devices of a slice, in the order of their coordinates."""
    places = [(x, y, z) for x in range(shape[0]) for y in range(shape[1]) for z in range((*shape, 1)[2])]
    return [SimpleNamespace(platform="tpu", process_index=0, coords=place) for place in places]


def gpus(hosts: int) -> list:
    return [SimpleNamespace(platform="gpu", process_index=host, coords=None) for host in range(hosts) for _ in range(8)]


LINES = Chip("lines", 1.0, link_rate=100.0, closes_rings_of=16)
RINGS = Chip("rings", 1.0, link_rate=100.0, closes_rings_of=4)
LINKED = Chip("linked", 1.0, link_rate=400.0, host_rate=50.0)


@pytest.mark.parametrize(
    "devices, chip, group, rate, link",
    [
        (tpus(4, 4), LINES, range(16), 200, "ICI"),  # a line along each of two axes
        (tpus(4, 4), LINES, range(4), 100, "ICI"),  # along one
        (tpus(4, 4), RINGS, range(4), 200, "ICI"),  # a ring, in both directions
        (tpus(4, 4, 4), RINGS, range(64), 600, "ICI"),
        (tpus(4, 4), RINGS, range(2), 100, "ICI"),  # half a ring is a line
        (gpus(2), LINKED, range(8), 400, "NVLink"),
        (gpus(2), LINKED, range(16), 400, "between hosts"),  # 8 adapters of 50
        (gpus(2), LINKED, [0, 8], 50, "between hosts"),
    ],
)
def test_devices_send_over_all_links_that_their_group_has(devices, chip, group, rate, link):
    collective = Collective("reduce-scatter", "f32", 1000, 3, (tuple(group),))
    network, size = Network(devices, chip), len(group)
    assert network.secs(collective) == pytest.approx(3 * 1000 * (size - 1) / size / rate)
    assert network.link(collective) == link


def test_links_that_are_not_known_give_no_seconds():
    assert Network(tpus(2, 2), Chip("other", 1.0)).secs(Collective("all-reduce", "f32", 8, 1, ALL)) is None


# ---- the roofline ----


def test_a_step_takes_the_longer_of_each_kernels_two_times_one_after_the_other():
    chip = Chip("any", 100.0, memory_rate=10.0)
    found = roofline_of(
        [Kernel("products", 10, 1000.0, 2), Kernel("copying", 100, 0.0, 3), Kernel("beside", 50, 0.0, 1, is_copy=True)],
        chip,
        100.0,
    )
    assert (found.flops, found.num_bytes, found.num_kernels) == (2000, 370, 6)
    assert (found.compute_secs, found.memory_secs, found.kernel_secs) == (20, 37, 2 * 10 + 3 * 10)


def test_without_a_datasheet_there_are_counts_and_no_seconds():
    found = roofline_of([Kernel("a", 10, 1000.0, 2), Kernel("b", 0, 0.0, 1, is_opaque=True)], None, None)
    assert (found.flops, found.opaque) == (2000, ("b",))
    assert found.compute_secs is found.memory_secs is found.kernel_secs is None


# ---- steps that were never compiled ----

TEXT = "HloModule step\n\nENTRY %main (p: f32[4]) -> f32[4] {\n  %p = f32[1000000]{0} parameter(0)\n  %r = f32[1000000]{0} all-reduce(%p), replica_groups=[1,4]<=[4]\n  ROOT %n = f32[1000000]{0} negate(%r)\n}\n"
CHIP = Chip("TPU of a kind", 1e12, 16 * GIB, 1e11, 1e10)


def step_of(peak_gib: float, *, refused=False, fsdp=1, state_gib=1.0, per_device=4, **changes) -> Step:
    """On the four devices that are here: built, with another memory and another text."""
    config = run_config("no data", batch_size=48, per_device_batch_size=per_device, **changes)
    config = dataclasses.replace(
        config, mesh=lambda devices: make_mesh(devices, fsdp=fsdp), peak_flops_per_device=CHIP.peak_flops
    )
    return _with_memory(config, int(peak_gib * GIB), int(state_gib * GIB), refused)


def _with_memory(config, peak: int, state: int, refused=False) -> Step:
    data = random_data(config)
    built = build(config, data, Start.anew(data))
    layout = max(built.layouts, key=lambda each: each.per_device)
    memory = Needed(state, None if refused else peak - state, None if refused else 0, peak)
    return Step(built, layout, memory, None if refused else TEXT, 0.1, 2.0)


def predicted(step: Step, there: There | None, largest: Largest | None = None, offered: float | None = None):
    """By the datasheet of `CHIP`, in the place of the CPU's that there is none of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt_pretrain.forecast.prediction.chip_of", lambda _: CHIP)
        return predict(step, there, largest, offered)


def searched(peak_of, there: There, *, first=4, batch_size=48, refused_from=math.inf) -> tuple[Largest, list[int]]:
    """The result, and which sizes were compiled."""
    asked_for = []

    def compile_step(config, data, devices) -> Step:
        size = config.per_device_batch_size
        asked_for.append(size)
        return _with_memory(config, int(peak_of(size) * GIB), GIB, refused=size >= refused_from)

    config = run_config("no data", batch_size=batch_size, per_device_batch_size=first, mesh=(4, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "compile_step", compile_step)
        asked = compile_step(config, None, None)
        return largest_that_fits(asked, there, random_data(config), None, lambda _: None), asked_for


def test_candidates_are_the_sizes_by_which_all_batches_can_be_cut():
    assert candidates([48], 4) == [1, 2, 3, 4, 6, 12]
    assert candidates([16, 48], 4) == [1, 2, 4, 6, 12]
    assert candidates([50], 4) == []


def test_the_search_finds_the_largest_size_that_fits_with_few_compilations():
    found, compiled = searched(lambda size: 1 + size, There(8 * GIB, 8 * GIB))
    assert (found.per_device_batch_size, found.is_final) == (6, True)
    assert len(compiled) <= 3


def test_the_search_goes_down_where_the_step_does_not_fit_or_was_refused():
    for refused_from in (math.inf, 4):
        found, _ = searched(lambda size: 1 + size, There(4 * GIB, 4 * GIB), first=12, refused_from=refused_from)
        assert (found.per_device_batch_size, found.is_final) == (3, True)


def test_where_all_sizes_fit_the_whole_batch_is_the_largest():
    found, _ = searched(lambda size: 1 + size, There(80 * GIB, 80 * GIB))
    assert (found.per_device_batch_size, found.is_final) == (12, True)


def test_where_none_fits_there_is_none():
    found, _ = searched(lambda size: 10 + size, There(8 * GIB, 8 * GIB))
    assert (found.step, found.is_final) == (None, True)


def test_the_search_does_not_compile_what_is_far_too_large():
    found, compiled = searched(lambda size: 1 + size, There(3 * GIB, 3 * GIB), first=1, batch_size=4 * 2 * 101)
    assert (found.per_device_batch_size, found.next_size) == (2, 101)
    assert found.next_bytes == 102 * GIB and 101 not in compiled


def test_the_search_makes_no_leap_where_the_compiler_begins_to_compute_things_again():
    found, compiled = searched(
        lambda size: min(1 + size, 7.9), There(8 * GIB, 8 * GIB), batch_size=4 * 5040, refused_from=15
    )
    assert (found.per_device_batch_size, found.is_final) == (14, True)
    assert max(compiled) == 15


def test_the_search_ends_after_eight_compilations_and_says_that_more_may_fit():
    # From 2 on, each needs a little too much, and the next smaller one always looks as if it fitted.
    found, compiled = searched(
        lambda size: 8.1 if size > 1 else 1.1, There(8 * GIB, 8 * GIB), first=1, batch_size=4 * 5040
    )
    assert (len(compiled), found.per_device_batch_size, found.is_final) == (8, 1, False)


# ---- words ----

THERE = There(8 * GIB, 8 * GIB)


def test_the_report_says_what_is_needed_and_what_it_takes():
    fits = step_of(5.0)
    largest = Largest(step_of(7.5, per_device=12), True, 24, 14 * GIB)
    text = report(predicted(fits, THERE, largest, offered=1e9), name="v5e:2x2", effort="little effort")
    for part in (
        "v5e:2x2: 4 x cpu on 1 host, mesh data=4 x fsdp=1",
        "48 x 8 tokens in 3 microbatches of 4 windows a device",
        "compiled in 2.0 s (little effort)",
        "5.00 GiB at the peak (state 1.00 GiB, temporary 4.00 GiB), 8.00 GiB usable: fits",
        "largest train.per_device_batch_size that fits: 12, which needs 7.50 GiB (24 about 14.00 GiB)",
        "all-reduce         f32         4.0 MB once a step, among 4",
        "0.1 ms at 100 GB/s",
        "tokens/s offered on this one: enough",
    ):
        assert part in text, text


def test_the_report_names_a_loader_that_is_too_slow():
    assert "offered on this one: TOO SLOW" in report(
        predicted(step_of(5.0), THERE, None, offered=10.0), name="", effort=""
    )


def test_where_it_does_not_fit_the_report_is_of_what_fits_and_says_so():
    largest = Largest(step_of(7.0, per_device=2), True)
    text = report(predicted(step_of(9.0), THERE, largest), name="", effort="")
    assert "DOES NOT FIT. What to change" in text
    assert "With train.per_device_batch_size=2:" in text


def test_the_json_has_every_number_that_a_program_needs():
    found = to_json(predicted(step_of(5.0), THERE, Largest(step_of(7.5, per_device=12), True)))
    assert json.loads(json.dumps(found)) == found
    assert found | {"devices": 4, "device_kind": "cpu", "state_bytes": GIB, "peak_bytes": 5 * GIB} == found
    assert found | {"device_bytes": 8 * GIB, "fits": True, "max_per_device_batch_size": 12} == found
    assert found["num_params"] > 1000 and found["compile_secs"] == 2.0
    (collective,) = found["collectives"]
    assert collective | {"op": "all-reduce", "dtype": "f32", "bytes": 4_000_000, "times_a_step": 1} == collective
    assert found["memory_secs"] == pytest.approx(8e6 / 1e11)
    assert found["network_secs"] > 0 and found["compute_secs"] == 0
    assert found["tokens_per_sec"] == pytest.approx(48 * 8 / max(found["kernel_secs"], found["network_secs"]))
    assert found["mfu"] > 0


# ---- advice ----


def config_with(advice: str):
    """What the trainer's configuration is with a piece of advice: its commands begin it."""
    words = []
    for word in shlex.split(advice):
        if not word.startswith("--"):
            break
        words.append(word.rstrip(",:"))
        if word.endswith((",", ":")):
            break
    args = preflight.make_parser().parse_args(words)
    shape = [
        f"model.{name} = {value}" for name, value in {"n_layer": 1, "n_head": 1, "n_embd": 6, "vocab_size": 264}.items()
    ]
    run = ["data.seq_len = 8", "train.batch_size = 48", "train.per_device_batch_size = 4", "train.num_tokens = 3072"]
    settings.parse([], [*shape, *run, *bindings_of(args)])
    return settings.train_config()


@pytest.mark.parametrize(
    "changes, fitting, expected",
    [
        ({}, 3, [{"per_device_batch_size": 3}, {"remat": "dots"}, {"remat": "full"}]),
        ({"per_device": 3, "model": {"remat": "dots"}}, None, [{"per_device_batch_size": 1}, {"remat": "full"}]),
        ({"per_device": 12, "refused": True}, None, [{"per_device_batch_size": 6}]),
        # fsdp=4 divides neither 6 nor 18.
        ({"state_gib": 4, "model": {"n_head": 1, "n_embd": 6}}, 3, [{"mesh": {"data": 2, "fsdp": 2}}]),
        ({"fsdp": 4, "gather_weights": "per_step"}, 3, [{"gather_weights": "per_use"}]),
    ],
)
def test_every_piece_of_advice_is_a_setting_that_is_accepted_and_the_expected_ones_are_there(
    changes, fitting, expected
):
    largest = Largest(step_of(7.0, per_device=fitting), True) if fitting else None
    found = advice_lib.advice(predicted(step_of(9.0, **changes), THERE, largest))
    assert found[-1] == "more devices, or ones with more memory"
    values = []
    for each in found[:-1]:
        config = config_with(each)
        data = random_data(config)
        built = build(config, data, Start.anew(data))
        values += [
            {"per_device_batch_size": config.per_device_batch_size},
            {"gather_weights": config.gather_weights},
            {"remat": config.model.remat},
            {"mesh": dict(built.mesh.shape)},
        ]
    assert all(each in values for each in expected), found


def test_advice_to_split_the_state_takes_back_a_mesh_that_was_set():
    step = step_of(9.0, state_gib=4, bound_config=lambda: "mesh.data = 4", parse_config=lambda _: {"mesh.data": 4})
    found = advice_lib.advice(predicted(step, THERE))
    assert any(each.startswith("--gin_param='mesh.data=-1' --gin_param='mesh.fsdp=4': ") for each in found), found


def test_what_is_done_already_is_not_advised():
    step = step_of(9.0, fsdp=4, gather_weights="per_use", per_device=1, model={"remat": "full"})
    assert advice_lib.advice(predicted(step, THERE, Largest(None, True))) == ["more devices, or ones with more memory"]


def test_more_of_a_gpus_memory_is_advised_where_it_then_fits(monkeypatch):
    found = advice_lib.advice(predicted(step_of(13.0), There(16 * GIB, 12 * GIB)))
    setting = re.match(r"XLA_CLIENT_MEM_FRACTION=(\S+) in the environment", found[0])
    assert setting
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", setting[1])
    assert memory_fraction_of_gpus() * 16 > 13


@pytest.mark.parametrize(
    "message, gib",
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5),
        ("total memory required for HLO temporaries (512.0M) exceeds", 0.5),
        ("something else", None),
    ],
)
def test_a_compilers_refusal_says_what_is_needed(message, gib):
    found = needed_by_message(message)
    assert found == (gib if gib is None else int(gib * GIB))


# ---- the command line ----


def refused(arguments, capsys) -> str:
    """The one line of an error of usage."""
    assert preflight.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and output.err.startswith("error: ")
    return output.err


@pytest.mark.parametrize(
    "name", ["", "v5e:", "v5e:2x2x2", "v5e:0x2", "h100:2x2x2", "h100:16", "rtx:8", "v5e:2by2", "v5e:2x-2"]
)
def test_a_topology_that_is_none_is_refused_in_a_line(name, capsys):
    if name == "v5e:":  # the default shape
        assert Topology.parse(name).shape == (2, 2)
        return
    assert f"--topology={name}: " in refused([f"--topology={name}"], capsys)


@pytest.mark.parametrize("name, extra", [("v5e:2x2", "aot-tpu"), ("h100:8", "aot-cuda")])
def test_a_compiler_that_is_not_installed_is_named_with_the_command_that_installs_it(name, extra, capsys, monkeypatch):
    found = importlib.util.find_spec
    hidden = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name in hidden else found(name, *args))
    assert f"pip install -e '.[{extra}]' -c constraints.txt" in refused([f"--topology={name}"], capsys)


@pytest.fixture
def preflight_here(monkeypatch, capsys):
    """`preflight_here(arguments)` -> (exit status, the report, the JSON, what it says meanwhile)."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")  # is put back

    def call(arguments):
        status = preflight.main([*arguments, "--json"])
        output = capsys.readouterr()
        assert status in (0, 1), output.err
        *lines, last = output.out.splitlines()
        return status, "\n".join(lines), json.loads(last), output.err

    return call


@pytest.mark.slow
def test_a_run_on_the_devices_that_are_here_is_foretold(tiny_dataset, tmp_path, preflight_here):
    hlo, arguments = tmp_path / "step.hlo", flags(tiny_dataset, tmp_path / "run", **{"model.n_layer": 1})
    status, text, found, said = preflight_here([*arguments, f"--save_hlo={hlo}", "--per_device_batch_size=1"])
    assert status == 0
    assert "memory" in text and ": fits" in text
    assert re.search(r"^loader     .*tokens/s offered on this one$", text, re.MULTILINE), text
    assert found["loader_offered_tokens_per_sec"] > 1000
    assert (found["devices"], found["device_kind"], found["fits"]) == (4, "cpu", True)
    assert found["max_per_device_batch_size"] == 2  # the whole batch of 8
    # One sum over the four devices of all gradients and two sums of the loss, in float32.
    largest = found["collectives"][0]
    assert (largest["op"], largest["dtype"], largest["times_a_step"]) == ("all-reduce", "f32", 1)
    sums = [each for each in found["collectives"] if each["op"] == "all-reduce" and each["dtype"] == "f32"]
    assert sum(each["bytes"] for each in sums) == pytest.approx(4 * found["num_params"], abs=8)
    assert found["state_bytes"] == pytest.approx(12 * found["num_params"], abs=64)
    assert found["peak_bytes"] > found["state_bytes"]
    assert found["tokens_per_sec"] is None and found["mfu"] is None  # there is no datasheet of CPUs
    assert found["compute_secs"] is None and found["flops"] > found["model_flops"] / 2
    assert Program(hlo.read_text()).entry.instructions
    assert said.count("trying train.per_device_batch_size") == 1
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_ends_with_status_1_and_advice(tiny_dataset, tmp_path, preflight_here, monkeypatch):
    monkeypatch.setattr("gpt_pretrain.forecast.memory._memory_of_this_machine", lambda: 2**20)
    arguments = flags("no data", tmp_path / "run", **{"model.n_layer": 1})
    status, text, found, _ = preflight_here([*arguments, "--no_search", "--per_device_batch_size=2"])
    assert (status, found["fits"], found["max_per_device_batch_size"]) == (1, False, None)
    assert "DOES NOT FIT. What to change" in text
    assert "  - --per_device_batch_size=1" in text
    assert "the data is not here to measure what is offered" in text


def test_a_run_of_one_step_offers_no_loader_to_measure(tiny_dataset):
    config = run_config(tiny_dataset, num_steps=1)
    data = open_data(config)
    start = Start.anew(data)
    assert loading.offered_tokens_per_sec(build(config, data, start), start) is None


def test_a_setting_that_cannot_be_is_refused_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
    assert preflight.main([*flags("no data", tmp_path / "run"), "--batch_size=7"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: train.batch_size=7 ") and "devices" in error
