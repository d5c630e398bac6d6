"""Reading of data files: an error names file and line."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from hierbd3lm.data.files import file_kind, load_files, read_rows, read_text_rows
from hierbd3lm.data.loading import load_documents, load_reasoning_dataset
from hierbd3lm.evaluation.given_plans import read_plans
from hierbd3lm.evaluation.text_quality import read_texts

ROW = {"question": "Ä + 3?", "plan": "Add.", "execution": "5\n#### 5"}
BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines_of(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path, content):
    path.write_bytes(content)
    return path


def write_parquet(path, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


TWO = lines_of(ROW, ROW)
READABLE = {
    "rows.jsonl": TWO,
    "bom.jsonl": BOM + TWO,
    "crlf.jsonl": TWO.replace(b"\n", b"\r\n"),
    "blank_last.jsonl": TWO + b"\n \r\n\n",
    "blank_between.jsonl": b"\n" + lines_of(ROW) + b"\n\n" + lines_of(ROW),
    "no_last_end.jsonl": TWO.rstrip(),
    "array.json": BOM + json.dumps([ROW, ROW], indent=1).encode(),
    "lines.json": TWO,
    "rows.csv": BOM + b"question,plan,execution\r\n" + 2 * 'Ä + 3?,Add.,"5\n#### 5"\r\n'.encode(),
    "rows.jsonl.gz": gzip.compress(TWO),
    "rows.json.xz": lzma.compress(TWO),
    "rows.JSONL.bz2": bz2.compress(TWO),
}


@pytest.mark.parametrize("name", READABLE)
def test_every_form_of_a_file_gives_the_same_rows(tmp_path, name):
    assert load_reasoning_dataset(write(tmp_path / name, READABLE[name])).to_list() == [ROW, ROW]


def test_parquet_is_read(tmp_path):
    assert load_reasoning_dataset(write_parquet(tmp_path / "rows.parquet", [ROW, ROW])).to_list() == [ROW, ROW]


SURROGATE = b'{"question": "\\ud83d", "plan": "", "execution": "5"}\n'
UNREADABLE = {
    "broken.jsonl": (TWO + b'{"question": \n' + TWO, "line 3 of .*broken.jsonl must be a JSON object"),
    "cut.jsonl": (TWO + b'{"question": "a"', "line 3 of .*cut.jsonl must be a JSON object"),
    "latin.jsonl": (
        TWO + '{"a": "é"}\n'.encode("latin-1"),
        "line 3 of .*latin.jsonl must be UTF-8, .* 0xe9 in column 8",
    ),
    "surrogate.jsonl": (TWO + b"\n" + SURROGATE, "line 4 of .* must be Unicode text, but has a lone surrogate"),
    "number.jsonl": (TWO + b"5\n", "line 3 of .* must be a JSON object, but got '5'"),
    "list.json": (b'["a"]', "object 1 of .* must be a JSON object, but got 'a'"),
    "broken.json": (b'[{"a": 1},\n {"b" 2}]', "line 2 of .*broken.json must be JSON"),
    "twice.jsonl": (b'{"question": "a", "question": "b"}\n', "line 1 of .*: the name 'question' is there twice"),
    "twice.json": (b'[{"a": 1, "a": 2}]', "twice.json must be JSON, but: the name 'a' is there twice"),
    "short.csv": (b"question,plan,execution\na,b,c\nd,e\n", "line 3 of .*short.csv must be CSV, but: the number of"),
    "long.csv": (b"question,plan,execution\na,b,c,d\n", "line 2 of .*long.csv must be CSV, but: the number of"),
    "cut.jsonl.gz": (gzip.compress(TWO)[:-9], "cut.jsonl.gz must be a complete compressed file"),
    "plain.jsonl.gz": (TWO, "plain.jsonl.gz must be a complete compressed file"),
    "plain.json.xz": (TWO, "plain.json.xz must be a complete compressed file"),
    "empty.jsonl": (b"", "empty.jsonl must have at least one row"),
    "blank.jsonl": (b"\n \n", "blank.jsonl must have at least one row"),
    "empty.json": (b"", "empty.json must have at least one row"),
    "empty_array.json": (b"[]", "empty_array.json must have at least one row"),
    "only_names.csv": (b"question,plan,execution\n", "only_names.csv must have at least one row"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, name):
    content, message = UNREADABLE[name]
    with pytest.raises(ValueError, match=message):
        load_reasoning_dataset(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.gz"])
def test_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path, name):
    assert file_kind(tmp_path / name) is None
    with pytest.raises(ValueError, match=r"must be a \.json, \.jsonl, \.csv, \.txt, \.parquet file"):
        load_reasoning_dataset(write(tmp_path / name, b"a"))


# Types


def test_nulls_far_from_the_first_text_are_read(tmp_path):
    late = {"plan": None, "note": None, "extra": {"a": None}, "question": "x" * 1000}
    rows = [ROW | late] * 11_000 + [ROW | {"note": "here", "extra": {"a": "b"}}]  # more than 10 MB of nulls
    dataset = load_reasoning_dataset(write(tmp_path / "rows.jsonl", lines_of(*rows)))
    assert dataset[0] == rows[0] and dataset[-1] == rows[-1]


def test_texts_that_look_like_dates_or_numbers_stay_texts(tmp_path):
    row = {"question": "2020-01-01", "plan": "", "execution": "2020-01-02T00:00:00", "answer": "007"}
    assert load_reasoning_dataset(write(tmp_path / "rows.jsonl", lines_of(row))).to_list() == [row]
    csv = ",".join(row) + "\n" + ",".join(row.values()) + "\n"
    assert load_reasoning_dataset(write(tmp_path / "rows.csv", csv.encode())).to_list() == [row]


def test_columns_that_rows_lack_are_none_and_types_are_those_of_all_values(tmp_path):
    rows = [{"a": 1, "b": [1]}, {"a": 1.5, "c": {"d": 2}}, {"e": None}]
    dataset = load_files([write(tmp_path / "rows.jsonl", lines_of(*rows))], "rows")
    full = {"a": None, "b": None, "c": None, "e": None}
    assert dataset.to_list() == [full | row for row in rows]


@pytest.mark.parametrize("count", [3, 20_001])
def test_values_of_several_types_are_kept_as_texts(tmp_path, count):
    rows = [ROW | {"id": i, "meta": "a"} for i in range(count - 1)] + [ROW | {"id": "last", "meta": [1, "é"]}]
    dataset = load_reasoning_dataset(write(tmp_path / "rows.jsonl", lines_of(*rows)))
    assert dataset["id"][:] == [*map(str, range(count - 1)), "last"]
    assert dataset[-1]["meta"] == '[1, "é"]' and dataset[0]["meta"] == "a"


def test_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "rows.jsonl", lines_of(ROW))
    assert len(load_reasoning_dataset(path)) == 1
    assert len(load_reasoning_dataset(write(path, TWO))) == 2


BAD_VALUES = {"None": None, "a number": 5, "a list": ["a"]}


@pytest.mark.parametrize("value", BAD_VALUES.values(), ids=BAD_VALUES)
@pytest.mark.parametrize("before", [1, 10_001, 0], ids=["among texts", "far from the start", "in every row"])
@pytest.mark.parametrize("segment", ["question", "execution"])
def test_value_that_is_no_text_is_refused_with_its_row(tmp_path, segment, before, value):
    rows = [ROW] * before + [ROW | {segment: value}] * 2
    with pytest.raises(ValueError, match=rf"(row {before}|line {before + 1}) of .*: `{segment}` must be a string"):
        load_reasoning_dataset(write(tmp_path / "rows.jsonl", lines_of(*rows)))


def test_row_without_a_field_is_named(tmp_path):
    rows = [ROW, {"question": "a", "plan": "b"}]
    with pytest.raises(ValueError, match=r"row 1 of .*: `execution` must be a string, but got None"):
        load_reasoning_dataset(write(tmp_path / "rows.jsonl", lines_of(*rows)))


def test_plan_may_be_none_in_some_rows_or_in_all(tmp_path):
    for rows in ([ROW, ROW | {"plan": None}], [ROW | {"plan": None}] * 2):
        assert load_reasoning_dataset(write(tmp_path / "rows.jsonl", lines_of(*rows))).to_list() == rows


# Folders


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_files_of_a_folder_are_read_like_a_file(folder):
    late = [ROW | {"plan": None, "question": "2020-01-01"}] * 3
    write(folder / "train-0.jsonl", BOM + lines_of(*late))
    write(folder / "train-1.jsonl", lines_of(ROW | {"question": "x" * 1000}) * 11_000)
    write(folder / "test.jsonl", lines_of(ROW) + "é\n".encode("latin-1"))
    dataset = load_reasoning_dataset(folder, split="train")
    assert len(dataset) == 11_003 and dataset[:3]["question"] == ["2020-01-01"] * 3 and dataset[0]["plan"] is None
    with pytest.raises(ValueError, match=r"line 2 of .*test\.jsonl must be UTF-8"):
        load_reasoning_dataset(folder, split="test")


def test_folder_of_texts_is_streamed_in_order(folder):
    for number in range(3):
        write(folder / f"{number}.txt", f"{number}\n".encode())
    for streaming in (False, True):
        assert [row["text"] for row in load_documents(folder, streaming=streaming)] == ["0", "1", "2"]


# Plain text


def test_every_line_of_a_text_is_a_document(tmp_path):
    path = write(tmp_path / "a.txt", BOM + "one\r\n\ntwo\u2028still two\rtwo\n".encode())
    expected = ["one", "", "two\u2028still two\rtwo"]
    assert load_documents(path)["text"][:] == expected
    assert [row["text"] for row in load_documents(path, streaming=True)] == expected


def test_text_in_another_encoding_is_refused_also_as_a_stream(tmp_path):
    path = write(tmp_path / "a.txt", b"one\n" + "zwölf\n".encode("latin-1"))
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"line 2 of .*a\.txt must be UTF-8, but has the byte 0xf6 in column 3"):
            list(load_documents(path, streaming=streaming))


@pytest.mark.parametrize(("values", "message"), [(["a", None], "row 1 of .*, but got None"), ([4, 5], "row 0 .* 4")])
@pytest.mark.parametrize("detokenizer", [None, "wikitext"])
def test_document_that_is_no_text_is_refused(tmp_path, values, message, detokenizer):
    path = write(tmp_path / "a.jsonl", lines_of(*({"body": value} for value in values)))
    with pytest.raises(ValueError, match=message):
        load_documents(path, text_column="body", detokenizer=detokenizer)


def test_stream_of_json_lines_has_its_texts(tmp_path):
    path = write(tmp_path / "a.jsonl", BOM + lines_of({"text": "a", "n": None}, {"text": "é", "n": 1}))
    assert [row["text"] for row in load_documents(path, streaming=True)] == ["a", "é"]


# Other files that commands read


def test_every_reader_of_lines_takes_a_byte_order_mark_and_names_its_line(tmp_path):
    path = write(tmp_path / "plans.jsonl", BOM + lines_of(ROW).replace(b"\n", b"\r\n") + b"\n")
    assert read_plans(path) == {ROW["question"]: [ROW["plan"]]}
    assert read_texts(path, "execution") == [ROW["execution"]]
    write(path, lines_of(ROW) + '{"question": "é"}\n'.encode("latin-1"))
    for read in (read_plans, read_texts, lambda path: list(read_text_rows(path, ["question"]))):
        with pytest.raises(ValueError, match=r"line [12] of .*plans\.jsonl must"):
            read(path)


def test_places_are_lines_of_the_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", b"\n" + lines_of(ROW) + b"\n" + lines_of(ROW))
    assert [place for place, _ in read_rows(path)] == [f"line 2 of {path}", f"line 4 of {path}"]
    path = write(tmp_path / "rows.csv", b'a\n"x\ny"\nz\n')
    assert list(read_rows(path)) == [(f"line 3 of {path}", {"a": "x\ny"}), (f"line 4 of {path}", {"a": "z"})]
