"""What makes a run fit that does not."""

from data_prep.pages.numbers import size_text
from gpt_pretrain.forecast.prediction import Prediction
from gpt_pretrain.train.build import bytes_of_whole

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
    elif largest is None and step.layout.per_device > 1:
        found.append(
            f"--per_device_batch_size={step.layout.per_device // 2} or less; without --no_search it is looked for"
        )
    is_heavy = step.memory.state > 0.2 * step.memory.peak
    if prediction.num_devices > 1 and prediction.whole_fraction > 0.5 and is_heavy:
        state = f"{step.memory.state / 2**30:.2f} GiB"
        found.append(f"--gin_param='mesh.fsdp={prediction.num_devices}': splits the state, {state} on each device now")
    if step.built.mesh.shape["fsdp"] > 1 and step.built.gather == "per_step":
        size = size_text(bytes_of_whole(step.built.spec))
        found.append(
            "--gin_param='train.gather_weights=\"per_use\"': weights and gradients are not whole meanwhile, "
            f"{size} a device; they cross the network in every microbatch"
        )
    if (remat := step.built.spec.remat) != "full":
        if remat == "none":
            found.append(
                "--gin_param='model.remat=\"dots\"': keeps of each layer its products only; some per cent slower"
            )
        found.append("--gin_param='model.remat=\"full\"': layers are computed twice, not kept; a third more work")
    return [*found, "more devices, or ones with more memory"]
