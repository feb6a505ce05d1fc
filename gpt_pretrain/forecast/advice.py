"""What makes a run fit that does not."""

import contextlib
import json

from data_prep.pages.numbers import size_text
from gpt_pretrain.forecast.compilation import candidates
from gpt_pretrain.forecast.prediction import Prediction
from gpt_pretrain.parallel.mesh import make_mesh
from gpt_pretrain.train.build import bytes_of_whole
from gpt_pretrain.train.weights import check_that_all_are_split

_MOST_OF_A_GPU = 0.92  # the rest is the driver's, NCCL's and cuDNN's


def advice(prediction: Prediction) -> list[str]:
    """The least change first."""
    step, there, largest = prediction.step, prediction.there, prediction.largest
    found = []
    if there and there.usable < step.memory.peak < _MOST_OF_A_GPU * there.total:
        fraction = min(_MOST_OF_A_GPU, step.memory.peak / there.total + 0.03)
        found.append(f"XLA_CLIENT_MEM_FRACTION={fraction:.2f} in the environment: JAX takes more of the GPU's memory")
    if largest and largest.step:
        needs = f"{largest.step.memory.peak / 2**30:.2f} GiB"
        size = largest.per_device_batch_size
        found.append(f"--per_device_batch_size={size}, which needs {needs}: the same updates in more pieces")
    elif largest is None and (smaller := _half(prediction)):
        found.append(f"--per_device_batch_size={smaller}, or less; without --no_search it is looked for")
    is_heavy = step.memory.state > 0.2 * step.memory.peak
    if prediction.whole_fraction > 0.5 and is_heavy and (fsdp := _most_that_splits(prediction)) > 1:
        state = f"{step.memory.state / 2**30:.2f} GiB"
        config = step.built.config
        data = config.parse_config(config.bound_config()).get("mesh.data", -1)
        rest = "" if data == -1 else f"{_setting('mesh.data', -1)} "
        found.append(f"{rest}{_setting('mesh.fsdp', fsdp)}: splits the state, {state} on each device now")
    if step.built.mesh.shape["fsdp"] > 1 and step.built.options.gather == "per_step":
        size = size_text(bytes_of_whole(step.built.spec))
        found.append(
            f"{_setting('train.gather_weights', 'per_use')}: weights and gradients are not whole meanwhile, "
            f"{size} a device; they cross the network in every microbatch"
        )
    if (remat := step.built.spec.remat) != "full":
        if remat == "none":
            found.append(
                f"{_setting('model.remat', 'dots')}: keeps of each layer its products only; some per cent slower"
            )
        found.append(f"{_setting('model.remat', 'full')}: layers are computed twice, not kept; a third more work")
    return [*found, "more devices, or ones with more memory"]


def _setting(name: str, value: object) -> str:
    return f"--gin_param='{name}={json.dumps(value)}'"


def _half(prediction: Prediction) -> int | None:
    """The largest size by which the batch can be cut that is at most half of what it is now."""
    step = prediction.step
    sizes = candidates([layout.batch_size for layout in step.built.layouts], prediction.num_devices)
    return max((size for size in sizes if size <= step.layout.per_device // 2), default=None)


def _most_that_splits(prediction: Prediction) -> int:
    """The largest `mesh.fsdp` of these devices that leaves no matrix whole."""
    built, num_devices = prediction.step.built, prediction.num_devices
    for fsdp in range(num_devices, 1, -1):
        if num_devices % fsdp == 0:
            with contextlib.suppress(ValueError):
                check_that_all_are_split(built.spec, make_mesh(list(built.mesh.devices.flat), fsdp=fsdp))
                return fsdp
    return 1
