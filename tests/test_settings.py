"""Gin files as people have them, and gin's text of a configuration read back."""

import codecs
import logging
import sys

import gin
import pytest

from gpt_pretrain import main, settings


@pytest.fixture(autouse=True)
def clean():
    yield
    gin.clear_config()


def value(name: str):
    return settings.values_of(gin.config_str())[name]


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
def test_gin_files_may_have_a_byte_order_mark_and_windows_line_ends(tmp_path, mark, encoding):
    for name, text in (
        ("base.gin", "train.sample_prompt = 'é 日'\r\n"),
        ("run.gin", "include 'base.gin'\r\nmodel.n_layer = 3\r\n"),
    ):
        (tmp_path / name).write_bytes(mark + text.encode(encoding))
    settings.parse([str(tmp_path / "run.gin")], [])
    assert (value("model.n_layer"), value("train.sample_prompt")) == (3, "é 日")


def test_a_gin_file_in_no_known_encoding_is_refused_by_name(tmp_path):
    (tmp_path / "run.gin").write_bytes("# für\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"run\.gin: found a byte at 3 that is no UTF-8"):
        settings.parse([str(tmp_path / "run.gin")], [])


@pytest.mark.parametrize(
    "binding, said",
    [
        ("optimizer.lr = nan", "expected a number, a 'text', True, .* Failed to parse token 'nan'"),
        ("optimizer.lr = [1,", "is a bracket or a text not closed"),
        ("optimizer.lr", "expected ':' or '='"),
        ("nothing.lr = 3", "No configurable matching 'nothing'"),
    ],
)
def test_what_is_no_binding_is_refused_in_one_line(binding, said):
    with pytest.raises(ValueError, match=rf"^gin: .*{said}") as error:
        settings.parse([], [binding])
    assert "\n" not in str(error.value) and " object at 0x" not in str(error.value)


def test_files_on_later_search_paths_are_found_in_silence(tmp_path, monkeypatch, caplog, capfd):
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a" / "base.gin").write_text("model.n_layer = 5\n")
    (tmp_path / "a" / "run.gin").write_text("include 'base.gin'\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with caplog.at_level(logging.DEBUG):
        settings.parse(["../a/run.gin"], [])
    assert value("model.n_layer") == 5
    said = caplog.text + "".join(capfd.readouterr())
    assert "not found" not in said.lower()
    with pytest.raises(ValueError, match=r"missing\.gin"):
        settings.parse(["missing.gin"], [])
    (tmp_path / "a" / "run.gin").write_text("include 'gone.gin'\n")
    with pytest.raises(ValueError, match=r"gone\.gin"):
        settings.parse(["../a/run.gin"], [])


def test_gin_files_are_no_urls_and_their_tilde_is_expanded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^--gin_file: gs://bucket/x\.gin is a URL"):
        settings.parse(["gs://bucket/x.gin"], [])
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.gin").write_text("model.n_layer = 7\n")
    settings.parse(["~/x.gin"], [])
    assert value("model.n_layer") == 7


def test_a_module_that_is_imported_late_may_register_with_gin(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text(
        "import gin\n"
        "@gin.register\n"
        "def lion(total_steps): ...\n"
        "@gin.configurable\n"
        "def shift(x_BTD, ctx, by=1.0): return x_BTD + by\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    bindings = ["model.interventions = [@intervention()]", "intervention.kind = 'late_module:shift'"]
    settings.parse([], bindings)
    config = settings.train_config()
    assert config.model.interventions[0].function.__name__ == "shift"
    del sys.modules["late_module"]


def test_a_configuration_is_read_back_with_macros_scopes_and_long_values():
    text = (
        "import my_module\n"
        "from a.b import c\n\n"
        "# Macros:\n"
        "rate = %base\n"
        "base = 1e-3\n"
        "small/width = 64\n"
        "loop = %loop\n\n"
        "# Parameters for train:\n"
        "train.optimizer = @small/lion\n"
        "train.model = @model()\n"
        "train.notes = \\\n    ('a long one, '\n     'in two parts')\n"
        "train.batch_size = ((0, 8),\n                    (5, %rate))\n"
        "train.writers = ['console']\n"
        "lion.lr = %rate\n"
        "lion.width = %small/width\n"
        "lion.turn = %loop\n"
        "lion.gone = %nowhere\n"
        "noise/intervention.sites = ['attn_out']\n"
        "data.mixture = {'a': ('x = 1', 2.0, %base)}\n"
    )
    assert settings.values_of(text) == {
        "train.optimizer": "@small/lion",
        "train.model": "@model()",
        "train.notes": "a long one, in two parts",
        "train.batch_size": ((0, 8), (5, 0.001)),
        "train.writers": ["console"],
        "lion.lr": 0.001,
        "lion.width": 64,
        "lion.turn": "%loop",
        "lion.gone": "%nowhere",
        "noise/intervention.sites": ["attn_out"],
        "data.mixture": {"a": ("x = 1", 2.0, 0.001)},
    }
    with pytest.raises(ValueError, match="a recorded configuration cannot be read"):
        settings.values_of("train.batch_size = = 3")


def test_what_gin_writes_of_a_run_is_read_back():
    settings.parse(
        [], ["train.save_dir = 'runs/' 'a very long name'", "optimizer.lr = 0.5", "rate = 3", "model.n_layer = %rate"]
    )
    config = settings.train_config()
    config.optimizer(100)
    values = config.parse_config(config.describe_config())
    assert (values["train.save_dir"], values["optimizer.lr"], values["model.n_layer"]) == (
        "runs/a very long name",
        0.5,
        3,
    )


def test_a_run_of_more_steps_than_can_be_counted_is_refused(tiny_dataset, tmp_path, capsys):
    shape = ["--model.n_layer=1", "--model.n_head=2", "--model.n_embd=8", "--model.vocab_size=264", "--batch_size=4"]
    arguments = [f"--data_dir={tiny_dataset}", f"--save_dir={tmp_path / 'run'}", "--seq_len=8", "--num_tokens=1e18"]
    assert main.main([*arguments, *shape]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: train.num_tokens: found 1000000000000000000, which makes 31250000000000000 steps")
