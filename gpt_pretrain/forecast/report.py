"""A prediction as text for people and as JSON for programs."""

from collections.abc import Iterator
from typing import Any

from data_prep.pages.numbers import plural, short
from gpt_pretrain.forecast.advice import advice
from gpt_pretrain.forecast.prediction import Prediction, Traffic
from gpt_pretrain.train.report import how_reduced

_SMALL_BYTES = 10**6  # a step; what moves less is put on one line
_INDENT = " " * 11


def report(prediction: Prediction, *, name: str, effort: str) -> str:
    """
    Args:
      name: of the devices, as the user wrote it.
      effort: how hard XLA tried, in words; empty for as in a run.
    """
    lines = [
        *_run(prediction, name, effort),
        *_memory(prediction),
    ]
    if not prediction.fits:
        lines += ["DOES NOT FIT. What to change, one or several of:", *(f"  - {each}" for each in advice(prediction))]
        if prediction.timed is not prediction.step:
            lines.append(f"With train.per_device_batch_size={prediction.timed.layout.per_device}:")
    lines += [*_work(prediction), *_network(prediction), *_time(prediction), *_loader(prediction)]
    return "\n".join(lines)


def to_json(prediction: Prediction) -> dict[str, Any]:
    """Bytes, FLOPs and seconds are of one device and one step, tokens/s of all devices. null: not known."""
    step, there, largest, roofline = prediction.step, prediction.there, prediction.largest, prediction.roofline
    built, layout = step.built, step.layout
    return {
        "devices": prediction.num_devices,
        "device_kind": built.mesh.devices.flat[0].device_kind,
        "processes": prediction.num_processes,
        "mesh": dict(built.mesh.shape),
        "num_params": prediction.num_params,
        "whole_params_fraction": round(prediction.whole_fraction, 6),
        "dtype": built.spec.dtype,
        "attention": built.spec.attention,
        "remat": built.spec.remat,
        "gather_weights": built.options.gather if built.mesh.shape["fsdp"] > 1 else None,
        "num_microbatches": layout.num_microbatches,
        "per_device_batch_size": layout.per_device,
        "seq_len": built.config.data.seq_len,
        "state_bytes": step.memory.state,
        "temp_bytes": step.memory.temporary,
        "peak_bytes": step.memory.peak,
        "device_bytes": there.usable if there else None,
        "device_total_bytes": there.total if there else None,
        "fits": prediction.fits,
        "max_per_device_batch_size": largest.per_device_batch_size if largest else None,
        "max_is_final": largest.is_final if largest else None,
        "predicted_per_device_batch_size": prediction.timed.layout.per_device if roofline else None,
        "model_flops": prediction.model_flops,
        "flops": roofline.flops if roofline else None,
        "memory_traffic_bytes": roofline.num_bytes if roofline else None,
        "collectives": [_traffic_json(each) for each in prediction.traffic],
        "compute_secs": roofline.compute_secs if roofline else None,
        "memory_secs": roofline.memory_secs if roofline else None,
        "kernel_secs": roofline.kernel_secs if roofline else None,
        "network_secs": prediction.network_secs,
        "step_secs": prediction.step_secs[0] if prediction.step_secs else None,
        "tokens_per_sec": prediction.tokens_per_sec,
        "mfu": prediction.mfu,
        "loader_needed_tokens_per_sec": prediction.needed_tokens_per_sec,
        "loader_offered_tokens_per_sec": prediction.offered_tokens_per_sec,
        "lower_secs": round(step.lower_secs, 2),
        "compile_secs": round(step.compile_secs, 2),
    }


def _run(prediction: Prediction, name: str, effort: str) -> Iterator[str]:
    step = prediction.step
    built, layout, spec = step.built, step.layout, step.built.spec
    kind = built.mesh.devices.flat[0].device_kind
    mesh = " x ".join(f"{axis}={size}" for axis, size in built.mesh.shape.items())
    hosts = plural(prediction.num_processes, "host")
    yield f"{f'{name}: ' if name else ''}{prediction.num_devices} x {kind} on {hosts}, mesh {mesh}"
    whole = ""
    if prediction.num_devices > 1:
        whole = f", {100 * prediction.whole_fraction:.3g}% of them whole on every device"
    remat = "" if spec.remat == "none" else f", remat {spec.remat}"
    yield f"model      {prediction.num_params:,} parameters{whole}; {spec.dtype}, attention {spec.attention}{remat}"
    pieces = "1 microbatch" if layout.num_microbatches == 1 else f"{layout.num_microbatches} microbatches"
    tokens = f"{layout.batch_size:,} x {built.config.data.seq_len:,} tokens"
    yield f"step       {tokens} in {pieces} of {layout.per_device} windows a device"
    word = "compiled" if step.text is not None else "refused"
    note = f" ({effort})" if effort else ""
    if prediction.num_devices > 1:
        yield f"gradients  {how_reduced(built)}"
    yield f"compiler   lowered in {step.lower_secs:.1f} s, {word} in {step.compile_secs:.1f} s{note}"


def _memory(prediction: Prediction) -> Iterator[str]:
    memory, there, largest = prediction.step.memory, prediction.there, prediction.largest
    parts = f"state {_gib(memory.state)}"
    if memory.temporary is not None:
        parts += f", temporary {_gib(memory.temporary)}"
    least = "at least " if prediction.step.text is None else ""
    has = ""
    if there:
        of = "" if there.usable == there.total else f" of {_gib(there.total)}"
        has = f", {_gib(there.usable)} usable{of}: {'fits' if prediction.fits else 'DOES NOT FIT'}"
    yield f"memory     {least}{_gib(memory.peak)} at the peak ({parts}){has}"
    if there and there.note:
        yield f"{_INDENT}{there.note}"
    if largest:
        if largest.step is None:
            what = "none" if largest.is_final else "none so far"
        else:
            more = "" if largest.is_final else " or more"
            what = f"{largest.per_device_batch_size}{more}, which needs {_gib(largest.step.memory.peak)}"
            if largest.next_bytes:
                what += f" ({largest.next_size} about {_gib(largest.next_bytes)})"
        yield f"{_INDENT}largest train.per_device_batch_size that fits: {what}"


def _work(prediction: Prediction) -> Iterator[str]:
    roofline = prediction.roofline
    yield f"FLOPs      {_tera(prediction.model_flops)} a device by the convention of MFU (attention as if not causal)"
    if roofline is None:
        return
    unknown = ""
    if roofline.opaque:
        unknown = f"; not counted: {plural(len(roofline.opaque), 'kernel')}, {roofline.opaque[0]}"
    yield f"{_INDENT}{_tera(roofline.flops)} a device in the products of the compiled step, as they run{unknown}"
    kernels = f"{roofline.num_kernels:,} kernels"
    yield f"traffic    {roofline.num_bytes / 1e9:,.1f} GB of a device's memory, read and written by {kernels}"


def _network(prediction: Prediction) -> Iterator[str]:
    if prediction.roofline is None:
        return
    big = [each for each in prediction.traffic if _a_step(each) >= _SMALL_BYTES]
    small = [each for each in prediction.traffic if _a_step(each) < _SMALL_BYTES]
    lines = []
    for each in big:
        collective = each.collective
        among = "to another" if collective.op == "collective-permute" else f"among {len(collective.groups[0])}"
        often = _how_often(collective.times, prediction.timed.layout.num_microbatches)
        parts = [among, each.link, "" if each.secs is None else f"{_ms(each.secs)} a step"]
        size = f"{collective.num_bytes / 1e6:9,.1f} MB"
        lines.append(f"{collective.op:18} {collective.dtype:5} {size} {often}, {', '.join(filter(None, parts))}")
    if small:
        num_bytes, count = sum(map(_a_step, small)), sum(each.count for each in small)
        lines.append(f"{count} {'more, ' if big else ''}of {num_bytes / 1e3:,.1f} kB a step together")
    lines = lines or ["nothing is sent"]
    yield from (f"{'' if index else 'network':11}{line}" for index, line in enumerate(lines))


def _time(prediction: Prediction) -> Iterator[str]:
    roofline, chip, peak = prediction.roofline, prediction.chip, prediction.peak_flops
    if roofline is None:
        return
    if roofline.compute_secs is None or peak is None:
        yield "prediction none: the datasheet of this kind of device is not known here"
        return
    yield f"prediction compute  {_ms(roofline.compute_secs)} at {peak / 1e12:,.4g} TFLOP/s, the datasheet's peak"
    if roofline.memory_secs is None or roofline.kernel_secs is None or chip is None or chip.memory_rate is None:
        return
    yield f"{_INDENT}memory   {_ms(roofline.memory_secs)} at {chip.memory_rate / 1e9:,.0f} GB/s"
    yield f"{_INDENT}kernels  {_ms(roofline.kernel_secs)}: each takes the longer of its own two, one after the other"
    if prediction.network_secs is None or prediction.step_secs is None:
        return
    if prediction.num_devices > 1:
        yield f"{_INDENT}network  {_ms(prediction.network_secs)}: rings at full speed, one after the other"
    hidden, shown = prediction.step_secs
    rate, mfu = prediction.tokens_per_sec, prediction.mfu
    assert rate is not None and mfu is not None
    if shown == hidden:
        yield f"{_INDENT}a step takes at least {_ms(hidden)}"
    else:
        yield f"{_INDENT}a step takes at least {_ms(hidden)} with the network hidden, {_ms(shown)} with none of it"
    yield f"{_INDENT}at most {rate:,.0f} tokens/s ({rate / prediction.num_devices:,.0f} a device), MFU {100 * mfu:.1f}%"


def _loader(prediction: Prediction) -> Iterator[str]:
    needed, offered = prediction.needed_tokens_per_sec, prediction.offered_tokens_per_sec
    parts = []
    if needed is not None:
        parts.append(f"{short(round(needed))} tokens/s needed on each host")
    if offered is None:
        parts.append("the data is not here to measure what is offered")
    else:
        verdict = "" if needed is None else ": enough" if offered >= needed else ": TOO SLOW"
        parts.append(f"{short(round(offered))} tokens/s offered on this one{verdict}")
    yield f"loader     {'; '.join(parts)}"


def _traffic_json(traffic: Traffic) -> dict[str, Any]:
    collective = traffic.collective
    return {
        "op": collective.op,
        "dtype": collective.dtype,
        "bytes": collective.num_bytes,
        "times_a_step": collective.times,
        "count": traffic.count,
        "group_size": len(collective.groups[0]),
        "link": traffic.link or None,
        "secs": traffic.secs,
    }


def _a_step(traffic: Traffic) -> int:
    return traffic.collective.num_bytes * traffic.collective.times


def _how_often(times: int, num_microbatches: int) -> str:
    if times == 1:
        return "once a step"
    return f"once a microbatch ({times} times)" if times == num_microbatches else f"{times} times a step"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:,.4g} TFLOP"


def _ms(secs: float) -> str:
    return f"{1e3 * secs:,.1f} ms"
