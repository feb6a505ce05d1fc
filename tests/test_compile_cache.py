"""Compiled programs are kept in the user's cache folder, unless the user says otherwise."""

import os
import subprocess
import sys

import pytest
from support.environment import xla_flags

COMPILE = """
from gpt_pretrain import runtime
runtime.configure()
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
print(jax.config.jax_compilation_cache_dir)
"""


def compile_with(tmp_path, **changes) -> tuple[str, list]:
    """(the folder that JAX was told, files that are in the user's)"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "XLA_FLAGS": xla_flags(1), **changes}
    found = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    assert "rror" not in found.stderr, found.stderr
    return found.stdout.strip(), [each for each in (tmp_path / "cache").rglob("*") if each.is_file()]


def test_by_default_programs_are_kept_in_a_folder_for_this_kind_of_processor(tmp_path):
    folder, files = compile_with(tmp_path)
    assert folder.startswith(str(tmp_path / "cache" / "gpt_pretrain" / "compiled")) and files
    assert all(str(each).startswith(folder) for each in files)


@pytest.mark.parametrize("named", ["other", ""])
def test_a_folder_that_the_user_names_is_used_instead_and_an_empty_name_turns_it_off(tmp_path, named):
    folder, files = compile_with(tmp_path, JAX_COMPILATION_CACHE_DIR=named and str(tmp_path / named))
    assert folder in (named and str(tmp_path / named), "None") and not files
    assert bool(named) == (tmp_path / "other").exists()


def test_a_home_that_cannot_be_written_costs_only_the_cache(tmp_path):
    (tmp_path / "file").touch()
    folder, files = compile_with(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert folder == "None" and not files
