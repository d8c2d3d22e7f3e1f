"""Text in the forms that people have: what is read, and what is refused by its kind."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from faults.refusing import Fault, refusal, refused
from pyarrow import parquet
from tiny import dense_model, tiny_tokenizer, write_dense

from lrserve.errors import InputError
from lrserve.inputs.text import Documents, load_texts, mixed, read_documents
from lrserve.recipe import Recipe

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
TALK = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
SHARED = [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}]
RENDERED = ["<user>How?</user><assistant>So.</assistant>"]
ALPACA = [{"instruction": "Add.", "input": "1, 2", "output": "3"}, {"instruction": "Say hi.", "input": "", "output": "Hi"}]


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def table(**columns: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(columns), sink)
    return bytes(sink.getvalue().to_pybytes())


@dataclass(frozen=True)
class Form:
    """A file, what stands behind its name, and the texts in it."""

    name: str
    content: bytes
    texts: list[str]
    column: str = ""

    def __str__(self) -> str:
        return f"{self.name}{self.column}"


TWO = ["One, two", "three"]
RECORDS = [{"text": text} for text in TWO]
CSV = b'id,text\n1,"One, two"\n\n2,three\n'
FORMS = [
    Form("a.jsonl", lines(*RECORDS), TWO),
    Form("bom.jsonl", b"\xef\xbb\xbf" + lines(*RECORDS), TWO),
    Form("windows.jsonl", lines(*RECORDS).replace(b"\n", b"\r\n"), TWO),
    Form("CAPITALS.JSONL", lines(*RECORDS), TWO),
    Form("a.ndjson", lines(*RECORDS), TWO),
    Form("strings.jsonl", lines(*TWO), TWO),
    Form("a.json", json.dumps(RECORDS, indent=1).encode(), TWO),
    Form("array.jsonl", json.dumps(RECORDS).encode(), TWO),
    Form("lines.json", lines(*RECORDS), TWO),
    Form("strings.json", json.dumps(TWO).encode(), TWO),
    Form("one.json", json.dumps(RECORDS[0]).encode(), TWO[:1]),
    Form("alpaca.json", json.dumps(ALPACA).encode(), ["3", "Hi"], ":output"),
    Form("a.jsonl.gz", gzip.compress(lines(*RECORDS)), TWO),
    Form("named-otherwise.jsonl", gzip.compress(lines(*RECORDS)), TWO),
    Form("A.Json.GZ", gzip.compress(json.dumps(RECORDS).encode()), TWO),
    Form("a.csv", CSV, TWO),
    Form("bom.csv", b"\xef\xbb\xbf" + CSV, TWO),
    Form("one-column.csv", b'text\n"One, two"\nthree\n', TWO),
    Form("semicolon.csv", b"id;text\n1;One, two\n2;three\n", TWO),
    Form("lines.csv", b'text,n\n"One\ntwo",1\nthree,2\n', ["One\ntwo", "three"]),
    Form("long.csv", b"text,n\n" + b"x" * 200_000 + b",1\n", ["x" * 200_000]),
    Form("a.tsv", b"id\ttext\n1\tOne, two\n2\tthree\n", TWO),
    Form("quotes.tsv", b'id\ttext\n1\t"Oh," she said\n2\tthree"\n', ['"Oh," she said', 'three"']),
    Form("a.csv.gz", gzip.compress(CSV), TWO),
    Form("named.csv", b"a,b c\nno,One\n", ["One"], ":b c"),
    Form("a.parquet", table(id=[1, 2], text=TWO), TWO),
    Form("named.parquet", table(content=TWO, text=["no", "no"]), TWO, ":content"),
    Form("colon.parquet", table(**{"a:b": TWO}), TWO, ":a:b"),
    Form("a.PARQUET.gz", gzip.compress(table(text=TWO)), TWO),
    Form("null.parquet", table(text=["One, two", None, "three"]), TWO),
    Form("chat.jsonl", lines({"messages": TALK}), RENDERED),
    Form("sharegpt.json", json.dumps([{"id": "x", "conversations": SHARED}]).encode(), RENDERED),
    Form("chat.parquet", table(messages=[TALK]), RENDERED),
    Form("named-chat.jsonl", lines({"chosen": TALK}), RENDERED, ":chosen"),
    Form(
        "parts.jsonl", lines({"messages": [{"role": "user", "content": [{"type": "text", "text": "How?"}]}]}), ["<user>How?</user>"]
    ),
    Form("text-first.jsonl", lines({"messages": TALK, "text": "One, two"}), TWO[:1]),
    Form(
        "wiki.train.raw",
        b" \n = Valkyria = \n \n One, two \n still \n \t\n three \n",
        ["\n = Valkyria = ", " One, two \n still ", " three \n"],
    ),
    Form("lines.txt", b"One, two\nthree\n", TWO),
    Form("windows.txt", b"One, two\r\n\r\nthree", TWO),
    Form("bom.txt", b"\xef\xbb\xbfOne, two\n\nthree", TWO),
    Form("one-line.txt", b"word " * 1000, ["word " * 1000]),
    Form("no-suffix", b"One, two\n\nthree", TWO),
    Form("a.md", b"# [One](x), two\n\nthree", ["# [One](x), two", "three"]),
    Form("c.py", b"def f():\n    return {\n        'a': 1}\n\nx = [1]", ["def f():\n    return {\n        'a': 1}", "x = [1]"]),
    Form("with:colon.txt", b"One, two\n\nthree", TWO),
    Form("lone.jsonl", b'{"text": "abc \\ud83d"}\n', ["abc \ufffd"]),
    Form("pair.jsonl", b'{"text": "abc \\ud83d\\ude00"}\n', ["abc \U0001f600"]),
    Form("raw-surrogate.txt", b"abc \xed\xa0\xbd", ["abc \ufffd"]),
    Form("raw-pair.txt", b"abc \xed\xa0\xbd\xed\xb8\x80", ["abc \U0001f600"]),
]


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_forms_that_people_have_are_read(form: Form, tmp_path: Path) -> None:
    (tmp_path / form.name).write_bytes(form.content)
    assert list(read_documents(f"{tmp_path / form.name}{form.column}", chat_tokenizer()).texts) == form.texts


def test_what_is_left_out_or_replaced_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a \\ud83d\\ud83d"}\n{"text": null}\n{"text": "b \\udc00"}\n')
    surrogates, empty = sorted(read_documents(str(tmp_path / "a.jsonl")).notes, key=lambda note: "null" in note)
    assert surrogates == f"warning: 3 lone surrogates in {tmp_path / 'a.jsonl'} became U+FFFD: they are no characters"
    assert empty == f"warning: 1 records of {tmp_path / 'a.jsonl'} have no text (null): left out"


def test_templates_get_the_same_day_every_day(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": TALK}))
    found = read_documents(str(tmp_path / "a.jsonl"), chat_tokenizer("{{ strftime_now('%d %B %Y') }}"))
    assert found.texts == ("26 July 2024",)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dense(dense_model("LlamaForCausalLM"), tmp_path_factory.mktemp("texts") / "model")


def of(name: str, content: bytes, origin: str = "") -> Callable[[Path], object]:
    """Write a file; returns what the user calls it, its name with `origin` behind it."""

    def damage(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return f"{folder / name}{origin}"

    return damage


REFUSED = [
    Fault("missing", lambda folder: folder / "gone.parquet", ("no text file at", "gone.parquet")),
    Fault("missing with a column", lambda folder: "gone.parquet:content", ("no text file at gone.parquet",)),
    Fault("long name", lambda folder: "x" * 400, ("no text file at",)),
    Fault("device", lambda folder: "/dev/null", ("no text file at /dev/null",)),
    Fault("empty", of("a.jsonl", b""), ("a.jsonl", "holds no records")),
    Fault("only nulls", of("a.parquet", table(text=pyarrow.array([None, None], pyarrow.string()))), ("holds no text",)),
    Fault("alpaca array", of("a.json", json.dumps(ALPACA).encode()), ("'instruction', 'input', 'output'", "Alpaca", "FILE:output")),
    Fault("alpaca lines", of("a.jsonl", lines(*ALPACA)), ("'instruction', 'input', 'output'", "Alpaca", "FILE:output")),
    Fault("alpaca parquet", of("a.parquet", table(instruction=["a"], output=["b"])), ("'instruction', 'output'", "FILE:output")),
    Fault("alpaca csv", of("a.csv", b"instruction,output\na,b\n"), ("'instruction', 'output'", "FILE:output")),
    Fault("no column", of("a.csv", b"id,body\n1,x\n"), ("'id', 'body'", "FILE:body")),
    Fault("other column", of("a.parquet", table(text=TWO), ":content"), ("no column 'content'", "'text'")),
    Fault("later record", of("a.jsonl", lines({"text": "a"}, {"body": "b"})), ("line 2 has no 'text'", "'body'")),
    Fault("text is a number", of("a.jsonl", lines({"text": 3})), ("record 1", "'text' is int, not text")),
    Fault("text is bytes", of("a.parquet", table(text=[b"x"])), ("row 1", "'text' is bytes, not text")),
    Fault("line is a number", of("a.jsonl", b'{"text": "a"}\n3\n'), ("line 2 is not a JSON object",)),
    Fault("damaged line", of("a.jsonl", b'{"text": "a"}\n{"text": "b\n'), ("line 2 is not a JSON object", "fix or remove")),
    Fault("not JSON", of("a.json", b"One\n\ntwo"), ("a.json is not JSON", "line 1 column 1")),
    Fault("damaged array", of("a.json", json.dumps(ALPACA).encode()[:-4]), ("a.json is not JSON",)),
    Fault("deep", of("a.json", b"[" * 100_000), ("nested too deep",)),
    Fault("deep lines", of("a.jsonl", b'{"text":' * 100_000), ("line 1", "nested too deep")),
    Fault("number of 5000 digits", of("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}"), ("line 1", "digits")),
    Fault("null", of("a.json", b"null"), ("holds no JSON records",)),
    Fault("records under a key", of("a.json", json.dumps({"data": RECORDS}).encode()), ("under 'data'",)),
    Fault("JSON lines as text", of("a.txt", lines(*RECORDS)), ("a.txt holds JSON", ".jsonl")),
    Fault("JSON lines of no suffix", of("a", lines(*ALPACA)), ("holds JSON", ".jsonl")),
    Fault("JSON array as text", of("a.dat", json.dumps(ALPACA, indent=2).encode()), ("holds JSON", ".json")),
    Fault("damaged array as text", of("a.dat", json.dumps(ALPACA).encode()[:40]), ("holds JSON",)),
    Fault("strings as text", of("a.txt", json.dumps(TWO).encode()), ("holds JSON",)),
    Fault("PDF", of("a.pdf", b"%PDF-1.7\n%\xe2\xe3"), ("a PDF document", ".jsonl")),
    Fault("PDF as text", of("a.txt", b"%PDF-1.7\n%\xe2\xe3"), ("a PDF document",)),
    Fault("zip", of("a.zip", b"PK\x03\x04\x14\0"), ("a zip archive",)),
    Fault("docx", of("a.docx", b"PK\x03\x04\x14\0"), ("Office document",)),
    Fault("doc", of("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1"), ("Office document",)),
    Fault("tar.gz", of("a.tar.gz", gzip.compress(b"a" * 257 + b"ustar\x0000")), ("tar archive",)),
    Fault("zstd", of("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04"), ("zstd",)),
    Fault("html", of("a.html", b"<!DOCTYPE html>\n<html><p>One"), ("is HTML",)),
    Fault("xml", of("a.xml", b'<?xml version="1.0"?><mediawiki>'), ("is XML",)),
    Fault("UTF-16", of("a.txt", "One\n\ntwo".encode("utf-16")), ("not UTF-8", "UTF-16", "offset 0", "iconv -f UTF-16")),
    Fault("UTF-16 of no mark", of("a.txt", "One\n\ntwo".encode("utf-16-le")), ("not UTF-8", "offset 1", "iconv -f UTF-16LE")),
    Fault("UTF-16 JSON lines", of("a.jsonl", lines(*RECORDS).decode().encode("utf-16-be")), ("offset 0", "iconv -f UTF-16BE")),
    Fault("Latin-1", of("a.txt", b"One caf\xe9 and more"), ("not UTF-8", "0xe9", "offset 7", "iconv -f WINDOWS-1252")),
    Fault("Latin-1 CSV", of("a.csv", b"text\ncaf\xe9\n"), ("not UTF-8", "offset 8")),
    Fault("Latin-1 in gzip", of("a.txt.gz", gzip.compress(b"caf\xe9 and")), ("not UTF-8", "offset 3")),
    Fault("cut in a character", of("a.txt", "One café".encode()[:-1]), ("not UTF-8", "unexpected end of data", "offset 7")),
    Fault("binary", of("a.txt", bytes(range(256)) * 4), ("binary data", "offset 128")),
    Fault("zeros", of("a.txt", b"One\n\ntwo" + b"\0" * 3 + b"x" * 40), ("binary data", "offset 8")),
    Fault("cut gzip", of("a.jsonl.gz", gzip.compress(lines(*RECORDS))[:-12]), ("a.jsonl.gz", "damaged or cut short")),
    Fault("damaged gzip", of("a.gz", b"\x1f\x8b" + b"x" * 40), ("damaged or cut short",)),
    Fault("cut parquet", of("a.parquet", table(text=TWO)[:-6]), ("cannot be read as Parquet",)),
    Fault("no parquet", of("a.parquet", b"One\n\ntwo"), ("cannot be read as Parquet",)),
    Fault("ragged CSV", of("a.csv", b"id,text\n1,a,b\n"), ("line 2 has 3 columns", "header 2")),
    Fault("open quote", of("a.csv", b'id,text\n1,"a\n2,b\n'), ("is not CSV",)),
    Fault("no template", of("a.jsonl", lines({"messages": TALK})), ("record 1 is a conversation", "no chat template")),
    Fault("messages as text", of("a.csv", b'messages\n"[{""role"": 1}]"\n'), ("'messages' is str, not a list of messages",)),
    Fault("unknown speaker", of("a.jsonl", lines({"conversations": [{"from": "oracle", "value": "x"}]})), ("record 1", "'oracle'")),
    Fault("list of numbers", of("a.jsonl", lines({"text": [1, 2]})), ("record 1", "not of messages")),
    Fault("image", of("a.jsonl", lines({"messages": [{"role": "user", "content": [{"type": "image"}]}]})), ("more than text",)),
]


@pytest.mark.parametrize("fault", REFUSED, ids=str)
def test_what_is_not_understood_is_refused_by_its_kind(fault: Fault, model: Path, tmp_path: Path) -> None:
    origin = str(fault.damage(tmp_path))
    refused(fault, "compress-and-export", model, "--calibration", origin, "-o", tmp_path / "OUT")
    assert not (tmp_path / "OUT.work").exists()


def test_what_a_chat_template_refuses_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": TALK}, {"messages": [{"role": "system", "content": "x"}, *TALK]}))
    with pytest.raises(InputError, match=r"a\.jsonl line 2: the model's chat template refuses .*: System role not supported; fix"):
        read_documents(str(tmp_path / "a.jsonl"), chat_tokenizer(STRICT))


def test_parquet_without_its_reader_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(table(text=TWO))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow. Run: pip install 'lrserve\[datasets\]'"):
        read_documents(str(tmp_path / "a.parquet"))


def test_a_dataset_is_read_by_config_split_and_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for config, split, column in (("en", "train", "text"), ("en", "test", "text"), ("de", "train", "body")):
        folder = tmp_path / "data" / config
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.jsonl").write_bytes(lines(*({column: f"{config} {split} {n}"} for n in range(3))))
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n" + "".join(f"  - {{split: {s}, path: {name}/{s}.jsonl}}\n" for s in splits)
        for name, splits in (("en", ("train", "test")), ("de", ("train",)))
    )
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.chdir(tmp_path)
    assert read_documents("data:en").texts == tuple(f"en train {n}" for n in range(3))
    assert read_documents("data:en:test").texts == tuple(f"en test {n}" for n in range(3))
    assert read_documents(f"{tmp_path}/data:de::body").texts == tuple(f"de train {n}" for n in range(3))
    for origin, said in {
        "data": "Config name is missing",
        "data:en:dev": "not a readable|neither",
        "data:de": "no column 'text', .* but 'body'",
        "data:en::body": "no column 'body'; there are 'text'",
        "data:en:train:text:x": "no text file at",
    }.items():
        with pytest.raises(InputError, match=said):
            read_documents(origin)


def test_too_few_documents_are_cut_with_a_warning(tmp_path: Path) -> None:
    whole = " ".join(f"word-{n:04d}" for n in range(1100))
    (tmp_path / "a.txt").write_text(whole)
    texts = load_texts(str(tmp_path / "a.txt"), None, None)
    parts = [part.texts for part in (texts.calibration, texts.validation, texts.report)]
    assert "".join(text for part in parts for text in part) == whole
    assert [round(sum(map(len, part)) / len(whole), 2) for part in parts] == [0.8, 0.1, 0.1]
    assert [note.startswith(f"warning: {tmp_path / 'a.txt'} has so few documents") for note in texts.notes] == [True, True]


def test_a_mixture_has_each_share_of_the_characters_everywhere() -> None:
    a = Documents("a", tuple(f"a{n:03d} " + "x" * 95 for n in range(100)))
    b = Documents("b", tuple(f"b{n:03d} " + "y" * 15 for n in range(500)))
    found = mixed([(a, 0.75), (b, 0.25)])
    assert found.name == "a and b"
    for part in (found.texts, found.texts[: len(found.texts) // 3], found.texts[-len(found.texts) // 3 :]):
        total = sum(map(len, part))
        assert sum(len(text) for text in part if text[0] == "a") / total == pytest.approx(0.75, abs=0.03)
    assert found.notes == ("calibration text, characters: 10,000 of 10,000 of a; 3,333 of 10,000 of b",)
    assert mixed([(a, 3.0), (b, 1.0)]) == found


def test_a_mixture_without_shares_holds_everything() -> None:
    a, b = Documents("a", ("x" * 90, "y" * 10)), Documents("b", ("z" * 7,), notes=("warning",))
    found = mixed([(a, None), (b, None)])
    assert sorted(found.texts) == sorted([*a.texts, *b.texts])
    assert found.notes == b.notes


def test_a_recipe_lists_sources(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*RECORDS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "model: m\ntext: {calibration: [{source: 'a.jsonl:text', share: 0.7}, {source: 'owner/name::test', share: 0.3}]}\n"
    )
    recipe = Recipe.load(tmp_path / "recipe.yaml", {})
    assert recipe.text.sources == [(f"{tmp_path}/a.jsonl:text", 0.7), ("owner/name::test", 0.3)]
    (tmp_path / "saved.yaml").write_text(recipe.to_yaml())
    assert Recipe.load(tmp_path / "saved.yaml", {}) == recipe
    names = Recipe.model_validate({"model": "m", "text": {"calibration": ["a.jsonl", "b.jsonl"]}})
    assert names.text.sources == [("a.jsonl", None), ("b.jsonl", None)]


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ("[]", "text.calibration (recipe RECIPE): must have at least 1 entry"),
        ("[{source: a, share: 0}]", "text.calibration.0.share (recipe RECIPE): must be above 0; got 0"),
        ("[{source: a, share: .inf}]", "text.calibration.0.share (recipe RECIPE): must be a finite number"),
        ("[{share: 1}]", "text.calibration.0.source (recipe RECIPE): is missing"),
        ("[{source: a, part: 1}]", "there is no setting text.calibration.0.part (recipe RECIPE)"),
        ("[{source: a, share: 1}, b]", "text (recipe RECIPE): calibration: give every source a share, or none"),
        ("{source: a}", "text.calibration (recipe RECIPE): must be text"),
        ("[3]", "text.calibration.0 (recipe RECIPE): must be settings by name; got 3"),
    ],
)
def test_a_wrong_list_of_sources_is_refused(calibration: str, said: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: m\ntext: {{calibration: {calibration}}}\n")
    assert said.replace("RECIPE", str(recipe)) in refusal("compress-and-export", "--recipe", recipe, "-o", tmp_path / "OUT")
