"""What --input may name: directories, braces, commas, ~, and never one file twice."""

import os

import pytest

from data_prep.inputs import paths
from data_prep.inputs.paths import expand
from data_prep.store.locations import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty directory, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(folder, *names: str) -> None:
    """Files with something in them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def refused(patterns: str) -> str:
    """The message for an input that cannot be."""
    with pytest.raises(InputError) as error:
        expand(patterns)
    return str(error.value)


NOTES = ["_SUCCESS", "_metadata", ".a.parquet.crc", "day=1/_common_metadata", "_delta_log/0.json", "dataset_info.json"]


@pytest.mark.parametrize("pattern", ["d", "./d/", "d/**/*", "d/**", "d/day=[12]", "d/day=*"])
def test_a_directory_in_hive_style_without_the_notes_in_it(folder, pattern):
    put(folder / "d", "day=1/b.parquet", "day=1/a.parquet", "day=2/c.parquet", *NOTES)
    if "**" in pattern:
        (folder / "d" / "dataset_info.json").unlink()  # a glob says what it means
    found = [os.path.normpath(path) for path in expand(pattern)]
    assert found == ["d/day=1/a.parquet", "d/day=1/b.parquet", "d/day=2/c.parquet"]


def test_a_directory_of_several_kinds_gives_parquet_and_json_or_else_text(folder):
    put(folder / "d", "a.parquet", "b.jsonl.gz", "README.txt", "x.csv")
    assert expand("d") == ["d/a.parquet", "d/b.jsonl.gz"]
    put(folder / "e", "a.txt", "b.txt.xz", "x.csv")
    assert expand("e") == ["e/a.txt", "e/b.txt.xz"]
    put(folder / "f", "x.csv")
    assert refused("f").startswith("f: no parquet, JSON lines or text files")


def test_links_to_directories_are_followed_but_not_in_circles(folder):
    put(folder, "d/a.txt", "e/b.txt")
    (folder / "d" / "more").symlink_to(folder / "e")
    (folder / "e" / "back").symlink_to(folder / "d")
    assert expand("d") == ["d/a.txt", "d/more/b.txt"]


def test_a_prepared_dataset_is_no_text(folder):
    put(folder, "d/manifest.json", "d/documents_train_000000.parquet")
    assert "is a prepared dataset" in refused("d")


def test_braces_and_recursive_globs(folder):
    put(folder, "a/1.txt", "b/2.txt", "b/c/3.txt", "x08.txt", "x09.txt", "x10.txt")
    assert expand("{b,a}/*.txt") == ["b/2.txt", "a/1.txt"]
    assert expand("x{08..10}.txt,{a,b/{c}}/*.txt".replace("{c}", "c")) == [
        "x08.txt",
        "x09.txt",
        "x10.txt",
        "a/1.txt",
        "b/c/3.txt",
    ]
    assert expand("**/[0-9].txt") == ["a/1.txt", "b/2.txt", "b/c/3.txt"]
    assert refused("{a,z}/1.txt") == "z/1.txt: no such file"


def test_commas_and_braces_in_names_of_files_that_are_there(folder):
    put(folder, "a,b.txt", "c.txt", "{d,e}.txt", "f", "x,y/g.txt", "h,i.txt")
    assert expand("a,b.txt,c.txt,{d,e}.txt") == ["a,b.txt", "c.txt", "{d,e}.txt"]
    assert expand("x,y") == ["x,y/g.txt"]
    assert expand(r"h\,*.txt,x\,y/g.txt") == ["h,i.txt", "x,y/g.txt"]
    assert expand(r"\{d\,e\}.txt") == ["{d,e}.txt"]


def test_home_and_file_urls(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    put(folder, "a.txt", "b.txt")
    assert expand("~/a.txt,~/b*.txt") == [f"{folder}/a.txt", f"{folder}/b.txt"]
    assert expand(f"file://{folder}/a.txt") == [f"{folder}/a.txt"]
    assert expand("~") == [f"{folder}/a.txt", f"{folder}/b.txt"]


def test_the_same_file_in_other_words_is_refused(folder):
    put(folder, "a.txt", "d/b.txt")
    os.symlink("a.txt", "link.txt")
    os.link("a.txt", "hard.txt")
    os.symlink("d", "e")
    for patterns in [
        "a.txt,./a.txt",
        f"a.txt,{folder}/a.txt",
        "link.txt,a.txt",
        "a.txt,hard.txt",
        "d,e",
        "d/*.txt,e/b.txt",
        "a.txt,d/../a.txt",
        "a.txt,a.txt",
        "{a,?}.txt",
    ]:
        assert "named more than once" in refused(patterns), patterns
    assert "it is the same file as a.txt" in refused("a.txt,hard.txt")


@pytest.mark.parametrize(
    "name, advice",
    [
        ("a.csv", "write its text as parquet or JSON lines first"),
        ("a.bin", "data_prep.convert takes token ids"),
        ("a.npy", "data_prep.convert takes token ids"),
        ("a.tar.gz", "unpack it"),
        ("a.parquet.gz", "expected a name ending in .parquet, .jsonl"),
        ("a", "expected a name ending in .parquet, .jsonl"),
    ],
)
def test_other_kinds_of_files_are_named_with_advice(folder, name, advice):
    put(folder, name)
    message = refused(name)
    assert message.startswith(f"{name}: unknown kind of file") and advice in message


def test_a_broken_link_says_where_it_leads(folder):
    os.symlink("gone.txt", "a.txt")
    assert refused("a.txt") == "a.txt: is a link to gone.txt, which is not there"


def test_remote_directories_and_globs_leave_notes_out():
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("day=1/a.parquet", "day=2/b.parquet", "_SUCCESS", "_delta_log/0.json", "README.txt"):
        memory.pipe(f"/hive/{name}", b"x")
    found = ["memory:///hive/day=1/a.parquet", "memory:///hive/day=2/b.parquet"]
    assert expand("memory://hive") == expand("memory://hive/") == found
    assert expand("memory://hive/*/*.parquet") == expand("memory://hive/day={1,2}/*.parquet") == found
    memory.pipe("/flat/a.parquet", b"x")
    memory.pipe("/flat/_SUCCESS", b"")
    assert expand("memory://flat/*") == ["memory:///flat/a.parquet"]


def test_presets_are_suggested_for_names_only(folder):
    assert "The presets are" in refused("sample-10bt") and "presets" not in refused("a/b.parquet")
    assert paths.find_preset("~/sample") is None
