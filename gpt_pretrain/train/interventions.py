"""Interventions as a user names them: vectors in files, lists of interventions in files and on a command line."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from data_prep.pages.text import one_line
from data_prep.store.files import open_regular
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.train.weight_files import safetensors_file

MAX_FILE_BYTES = 64 << 20


def with_vectors(interventions: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """The same, each with the numbers of its vector in the place of a file's name.

    Raises ValueError where a file has no such vector.
    """
    return tuple(
        dataclasses.replace(each, vector=_vector_in(each.vector)) if isinstance(each.vector, str) else each
        for each in interventions
    )


def _vector_in(name: str) -> tuple[float, ...]:
    """PATH.safetensors, with :NAME if there are several tensors -> the numbers of a vector."""
    path, _, tensor = name.partition(".safetensors:")
    path = f"{path}.safetensors" if tensor else path
    where = f"intervention.vector={name}"
    try:
        file, _ = safetensors_file.read(Path(path).expanduser())
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from None
    names = sorted(file.tensors)
    if not tensor and len(names) == 1:
        tensor = names[0]
    if tensor not in file.tensors:
        raise ValueError(f"{where}: has {', '.join(names[:20]) or 'no tensor'}; expected {path}:NAME of one of them")
    found = file.read(tensor)
    if found.ndim != 1:
        raise ValueError(f"{where}: {tensor} has the shape {found.shape}, expected a vector")
    return tuple(map(float, found))


def chosen_interventions(text: str, recorded: Sequence[Intervention], option: str) -> tuple[Intervention, ...]:
    """What a user asks for when a trained model is used.

    Args:
      text: "none"; "checkpoint": those of `recorded` that are meant for evaluation and change activations; a file
        NAME.json; or JSON itself.
        JSON is an intervention, {"kind": "zero", "sites": ["mlp_out"], "layers": [3]}, or a list of them.
      recorded: those of the checkpoint.
      option: for errors.

    A function of the user's is imported where he has typed its name: in JSON on the command line, not in a file.

    Raises ValueError for what is no intervention, and for a function that only a file names.
    """
    if text == "none":
        return ()
    if text == "checkpoint":
        return _without_code(tuple(each for each in recorded if each.in_evaluation and not each.on_gradients), option)
    is_typed = text.lstrip()[:1] in ("{", "[")
    content = text
    if not is_typed:
        with open_regular(Path(text).expanduser()) as file:
            content = file.read(MAX_FILE_BYTES).decode("utf-8", "replace")
    where = option if is_typed else f"{option}: {text}"
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: no JSON ({error}); expected {{'kind': ...}} with double quotes, or a list"
        ) from None
    found = found if isinstance(found, list) else [found]
    if not all(isinstance(each, dict) for each in found):
        raise ValueError(f'{where}: expected an intervention such as {{"kind": "zero"}}, or a list of them')
    try:
        if not is_typed:
            return _without_code(tuple(Intervention.from_json({"version": 1, **each}) for each in found), where)
        known = {field.name for field in dataclasses.fields(Intervention)} - {"function"}
        if unknown := sorted({name for each in found for name in each} - known):
            raise ValueError(f"intervention: found {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")
        if missing := [each for each in found if "kind" not in each]:
            raise ValueError(f"intervention: found {missing[0]}, expected a kind")
        return with_vectors([Intervention(**each) for each in found])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def said(interventions: Sequence[Intervention], recorded: Sequence[Intervention], done: str) -> str:
    """A line for each intervention that is done; where none is, what training had; "" if neither.

    Args:
      done: what happens to the model, a participle.
    """
    if interventions:
        return "\n".join(f"intervention: {one_line(each.described())}" for each in interventions)
    if not recorded:
        return ""
    return (
        f"note: the model was trained with interventions, and is {done} without: "
        + one_line("; ".join(each.described() for each in recorded))
        + " (--interventions=checkpoint does those that are meant for evaluation)"
    )


def _without_code(interventions: tuple[Intervention, ...], where: str) -> tuple[Intervention, ...]:
    for each in interventions:
        if each.is_own:
            raise ValueError(
                f"{where}: {each.kind!r} is a function that is named in a file, and never imported from there. Name it "
                "yourself, as JSON on the command line."
            )
    return interventions
