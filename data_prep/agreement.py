"""Whether what lies in an output directory is what was asked for, and may be continued."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from data_prep.engines.locks import spec_locked
from data_prep.outcome import Outcome
from data_prep.parts import PARTS
from data_prep.store.files import read_note, update_note
from data_prep.store.manifest import WORK_DIR, load
from data_prep.store.names import PATTERNS
from data_prep.store.places import exists, join, make_directory, names_in, remove_file
from data_prep.store.spec import Spec, few

SHARDS = "shards"  # folder of the notes on output files, in the work directory
SPEC_NAME, FAILED_NAME = "spec.json", "failed.json"  # there


def differences(there: Spec, asked: Spec, *, but_inputs: Sequence[str] | None = ()) -> list[str]:
    """One line for each field that differs; empty where the two are the same.

    Args:
      but_inputs: paths of inputs that may differ; None leaves all the inputs out.
    """
    values, wanted = there.to_json(), asked.to_json()
    lines = [
        f"{name}: {values.get(name)!r} there, {wanted.get(name)!r} asked for"
        for name in sorted(values.keys() | wanted.keys())
        if name != "inputs" and values.get(name) != wanted.get(name)
    ]
    if but_inputs is None:
        return lines
    old = {entry["path"]: entry for entry in there.inputs}
    new = {entry["path"]: entry for entry in asked.inputs}
    if list(old) != list(new):
        if missing := [path for path in old if path not in new]:
            lines.append(f"inputs: there but not asked for: {few(missing)}")
        if added := [path for path in new if path not in old]:
            lines.append(f"inputs: asked for but not there: {few(added)}")
        if set(old) == set(new):
            lines.append("inputs: the same files in another order")
    for path in old.keys() & new.keys() - set(but_inputs):
        lines += [
            f"inputs: {path}: {key} {old[path].get(key)!r} there, {value!r} asked for"
            for key, value in new[path].items()
            if value != old[path].get(key)
        ]
    return lines


def confirm_complete(
    output: str, spec: Spec, but_inputs: Sequence[str] | None = (), fingerprint: str | None = None
) -> Outcome:
    """The complete dataset in `output`, if it is the one that was asked for.

    Args:
      but_inputs: as for `differences`.
      fingerprint: what it has to be, where that is known.

    Raises ValueError with the differences.
    """
    manifest = load(output)
    lines = differences(manifest.spec, spec, but_inputs=but_inputs)
    if fingerprint not in (None, manifest.fingerprint):
        lines.append(f"fingerprint: {manifest.fingerprint} there, {fingerprint} asked for")
    if lines:
        raise _refusal(output, "holds a dataset", lines)
    return Outcome(manifest, was_complete=True)


def begin_or_continue(spec: Spec, output: str) -> None:
    """Makes the work directory ready: continues an unfinished preparation of the same spec, refuses any other."""
    work = join(output, WORK_DIR)
    with spec_locked(work):
        _begin_or_continue(spec, output, work)


def _begin_or_continue(spec: Spec, output: str, work: str) -> None:
    def continued(note: dict[str, Any] | None) -> dict[str, Any] | None:
        try:
            there = Spec.from_json(note.get("spec")) if note else None
        except ValueError:
            there = None
        if there is not None:
            # A file that could not be read may be replaced by a better copy.
            replaceable = (read_note(join(work, FAILED_NAME)) or {}).get("paths", [])
            if lines := differences(there, spec, but_inputs=replaceable):
                raise _refusal(output, "holds an unfinished preparation", lines)
        fields = {"spec": spec.to_json()}
        return fields if fields != note else None

    for name in (PARTS, SHARDS):
        make_directory(join(work, name))
    update_note(join(work, SPEC_NAME), continued)


def note_failed(work: str, paths: Sequence[str]) -> None:
    """Notes inputs that could not be read, so that they may differ when the preparation is continued."""
    with spec_locked(work):
        update_note(join(work, FAILED_NAME), lambda note: {"paths": sorted({*(note or {}).get("paths", []), *paths})})


def forget_spec(work: str) -> None:
    """Another spec is welcome to what was done so far."""
    remove_file(join(work, SPEC_NAME))


def refuse_strays(output: str) -> None:
    """ValueError where files of an unknown preparation would end up among ours."""
    if exists(join(output, WORK_DIR, SPEC_NAME)):
        return
    stray = [name for name in names_in(output) if any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)]
    if stray:
        raise ValueError(
            f"{output}: holds {stray[0]}, but neither a manifest nor an unfinished preparation "
            "that could be continued. Use another output directory, or delete that one."
        )


def _refusal(output: str, holds: str, lines: Sequence[str]) -> ValueError:
    return ValueError(
        f"{output}: {holds} of another spec:\n  "
        + "\n  ".join(lines)
        + "\nUse the same options, another output directory, or delete that one."
    )
