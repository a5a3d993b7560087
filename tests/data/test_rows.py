import csv
import gzip
import io
import json
import random
import re
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lowmem_dpo.data import rows as rows_module
from lowmem_dpo.data.rows import (
    MAX_ROW_BYTES,
    READERS,
    drop_nulls,
    is_row_file,
    printable_line,
    read_rows,
)

ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}
GOOD = json.dumps(ROW)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path, **kwargs):
    """The one-line message with which a file is refused, by an exception or by its first fault."""
    try:
        text = next(f"{row.place}: {row.fault}" for row in read_rows(path, **kwargs) if row.fault)
    except ValueError as error:
        text = str(error)
    assert str(path) in text and "\n" not in text
    return text


# .jsonl


def test_read_rows_counts_the_lines_of_jsonl(tmp_path):
    path = write(tmp_path, "a.jsonl", f"\n{GOOD}\r\n\n{GOOD}")
    assert [(r.number, r.place, r.value) for r in read_rows(path)] == [
        (2, f"{path}, line 2", ROW),
        (4, f"{path}, line 4", ROW),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json", "a.csv"])
def test_read_rows_accepts_a_byte_order_mark_and_odd_line_separators(tmp_path, name):
    row = {"prompt": "one\u2028two\u0085three äß語", "chosen": "c"}
    text = json.dumps([row] if name == "a.json" else row, ensure_ascii=False)
    if name == "a.csv":
        text = f"prompt,chosen\r\n{row['prompt']},c\r\n"
    path = write(tmp_path, name, text.encode("utf-8-sig"))
    assert [r.value for r in read_rows(path)] == [row]


def test_read_rows_goes_on_behind_a_bad_line(tmp_path):
    lines = [GOOD, '{"prompt": ', "x" * 50, "\xff", GOOD]
    path = write(tmp_path, "a.jsonl", "\n".join(lines).encode("latin-1"))
    rows = list(read_rows(path, max_row_bytes=len(GOOD) + 1))
    assert [(r.number, r.value) for r in rows if not r.fault] == [(1, ROW), (5, ROW)]
    faults = [(r.number, r.fault) for r in rows if r.fault]
    assert [number for number, _ in faults] == [2, 3, 4]
    for (_, fault), text in zip(faults, ["broken J", "longer than", "not valid UTF"], strict=True):
        assert text in fault


# .json


def test_read_rows_reads_the_items_of_a_list(tmp_path):
    values = [ROW, 12345, -1.5e10, "é語😀\u2028", [], {"a": [None, True]}, None]
    path = write(tmp_path, "a.json", json.dumps(values, indent=1, ensure_ascii=False))
    rows = list(read_rows(path))
    assert [row.value for row in rows] == values
    assert [row.number for row in rows] == list(range(1, 8))
    assert rows[2].place == f"{path}, row 3"
    assert list(read_rows(write(tmp_path, "b.json", " [ ]\n"))) == []
    assert list(read_rows(write(tmp_path, "c.json", " \n"))) == []


def test_read_rows_takes_one_object_and_json_lines_in_a_json_file(tmp_path):
    pretty = write(tmp_path, "a.json", json.dumps(ROW, indent=2))
    assert [(r.number, r.value) for r in read_rows(pretty)] == [(1, ROW)]
    lines = write(tmp_path, "b.json", f"\n{GOOD}\n{GOOD}\n")
    assert [(r.number, r.value) for r in read_rows(lines)] == [(2, ROW), (3, ROW)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"prompt": "p",}\n]', "line 2: broken JSON ("),
        (f"[{GOOD},\n{GOOD}\n{GOOD}]", "line 3: broken JSON (Expecting ',' delimiter, in row 2)"),
        (f"[{GOOD},\n", "line 2: broken JSON (Expecting value, in row 2)"),
        (f"[{GOOD}\n", "broken JSON (The list has no ], in row 1)"),
        ('[{"prompt": "p', "line 1: broken JSON (Unterminated string"),
        (f"[{GOOD}]\n]", "line 2: broken JSON (Extra data"),
        (json.dumps(ROW, indent=1) + "\n{", "broken JSON (Extra data"),
        (f"{GOOD}\n{{oops}}", "line 2: broken JSON"),
        ("{oops}", "row 1"),
    ],
)
def test_read_rows_names_the_line_of_broken_json(tmp_path, text, message):
    assert message in refusal(write(tmp_path, "a.json", text))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "lists or objects nested too deeply"),
        ("1" * 5000, "a number with too many digits"),
    ],
)
def test_read_rows_names_the_row_that_python_cannot_read(tmp_path, value, message):
    bad = f'{GOOD[:-1]}, "score": {value}}}'
    for text, name, place in (
        (f"{GOOD}\n\n{bad}\n", "a.jsonl", "line 3"),
        (f" [\n{GOOD},\n{GOOD}, {bad}\n]", "a.json", "row 3"),
        (f"{GOOD}\n{bad}", "a.json", "line 2"),
        (bad, "a.json", "row 1"),
    ):
        path = write(tmp_path, name, text)
        assert refusal(path).startswith(f"{path}, {place}: {message}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_read_rows_names_the_row_that_is_not_utf8(tmp_path, name):
    assert "not valid UTF-8" in refusal(write(tmp_path, name, b"[1,\xff\xfe]\n"))
    assert "not valid UTF-8" in refusal(write(tmp_path, name, b'[1,"\xe4'))


def test_read_rows_goes_on_behind_a_row_of_a_list_that_is_not_utf8(tmp_path):
    path = write(tmp_path, "a.json", b'[{"a": "\xc3\xa9"}, {"a": "\xe9"}, 3]')
    assert [(row.value, row.fault) for row in read_rows(path)] == [
        ({"a": "é"}, ""),
        (None, "not valid UTF-8 (byte 7 of the row); save the file as UTF-8"),
        (3, ""),
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", GOOD), ("a.json", GOOD), ("a.json", f"[{GOOD}]"), ("a.csv", '"a","b"\n1,2\n')],
)
def test_read_rows_says_what_to_do_about_utf16(tmp_path, name, text, encoding):
    message = refusal(write(tmp_path, name, text.encode(encoding)))
    assert re.search(r"(, line 1|, row 1): .*; save the file as UTF-8$", message)


# One row without an end


@pytest.mark.parametrize(
    ("name", "opening"),
    [("a.jsonl", b""), ("a.json", b"["), ("b.json", b"{"), ("c.json", b""), ("a.csv", b"")],
)
def test_read_rows_does_not_hold_a_row_without_an_end(tmp_path, monkeypatch, name, opening):
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 2**16)
    monkeypatch.setattr(rows_module, "MAX_JSON_BYTES", 2**20)
    path = write(tmp_path, name, opening + b'"')
    with path.open("ab") as file:
        file.write(b"x" * 2**24)
    tracemalloc.start()
    message = refusal(path, max_row_bytes=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "longer than 1 MiB" in message
    assert peak < 6 * 2**20


def test_read_rows_refuses_a_json_list_above_its_limit_but_no_rows_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_JSON_BYTES", 2**20)
    rows = [ROW | {"chosen": "x" * 2**10}] * 2**10
    as_list = write(tmp_path, "a.json", json.dumps(rows))
    assert re.search(
        "longer than 1 MiB.* write it as .jsonl, each row on its own", refusal(as_list)
    )
    as_lines = write(tmp_path, "b.json", "\n".join(map(json.dumps, rows)))
    assert [row.value for row in read_rows(as_lines)] == rows


def test_rows_of_a_megabyte_are_no_trouble(tmp_path):
    row = ROW | {"chosen": 'long "answer"\n' * 80_000}
    assert len(row["chosen"]) > 2**20
    table = io.StringIO()
    writer = csv.DictWriter(table, row)
    writer.writeheader()
    writer.writerow(row)
    for name, text in (
        ("a.jsonl", json.dumps(row)),
        ("a.json", json.dumps([row])),
        ("a.csv", table.getvalue()),
    ):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8", newline="")
        assert [r.value for r in read_rows(path)] == [row]
    assert csv.field_size_limit() < MAX_ROW_BYTES  # the process's own limit is back


# .csv


def test_read_rows_reads_csv_cells_that_span_lines(tmp_path):
    text = 'prompt,chosen,rejected\r\n"a, ""b""\nc",d,e\r\n\r\nf,g,\r\n'
    rows = list(read_rows(write(tmp_path, "a.csv", text)))
    assert [(r.number, r.value) for r in rows] == [
        (2, {"prompt": 'a, "b"\nc', "chosen": "d", "rejected": "e"}),
        (5, {"prompt": "f", "chosen": "g", "rejected": ""}),
    ]


def test_read_rows_reads_cells_between_tabs(tmp_path):
    text = 'prompt\tchosen\na, b;c\t"d\te\n""f"""\n'
    rows = list(read_rows(write(tmp_path, "a.tsv", text)))
    assert [row.value for row in rows] == [{"prompt": "a, b;c", "chosen": 'd\te\n"f"'}]
    message = "line 1: the header is one cell (a,b); separate cells by tabs"
    assert message in refusal(write(tmp_path, "b.tsv", "a,b\n1,2\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2,3\n", "line 2: has 3 cells, the header names 2 columns"),
        ("a,b\n1\n", "line 2: has 1 cells"),
        ("a,a\n1,2\n", "line 1: names of columns are empty or stand there twice"),
        ("a,\n1,2\n", "line 1: names of columns are empty"),
        ('a,b\n"1" x,2\n', "line 2: broken CSV"),
        ('a,b\n1,"2\n3\n', "broken CSV (unexpected end of data)"),
        (b"a,b\n1,\xff\n", "line 2: not valid UTF-8"),
        (b"a,\xe4\n1,2\n", "line 1: not valid UTF-8; save the file as UTF-8"),
        ("a;b\n1;2\n", "line 1: the header is one cell (a;b); separate cells by commas"),
        ("a\tb\n1\t2\n", "(a b); separate cells by commas, or name the file .tsv"),
    ],
)
def test_read_rows_refuses_bad_csv(tmp_path, text, message):
    assert message in refusal(write(tmp_path, "a.csv", text))


# .gz


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".JSONL"])
def test_read_rows_unpacks_text_files(tmp_path, suffix):
    text = {".json": f"[{GOOD}]", ".csv": "prompt,chosen,rejected\np,c,r\n"}
    text[".tsv"] = text[".csv"].replace(",", "\t")
    content = text.get(suffix, GOOD).encode()
    plain, packed = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    for path in (plain, packed):
        assert is_row_file(path)
        assert [row.value for row in read_rows(path)] == [ROW]
    assert not is_row_file(tmp_path / "a.parquet.gz") and not is_row_file(tmp_path / "a.gz")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_read_rows_names_a_gzip_file_that_is_none_or_not_whole(tmp_path, name):
    noise = random.Random(0).randbytes(1000).hex()
    whole = gzip.compress("\n".join([GOOD] * 5 + [noise]).encode())
    for content in (whole[:-20], whole[:200] + b"x" * 20 + whole[220:]):
        assert "the gzip file is cut off or broken" in refusal(write(tmp_path, name, content))
    message = refusal(write(tmp_path, name, GOOD))
    assert message.startswith(f"{tmp_path / name}, line 1: no gzip file") and "take .gz" in message


def test_read_rows_gives_the_rows_before_the_place_where_a_gzip_file_is_cut(tmp_path):
    whole = gzip.compress(f"{GOOD}\n".encode() + random.Random(0).randbytes(10**5))
    rows = read_rows(write(tmp_path, "a.jsonl.gz", whole[:5000]))
    assert next(rows).value == ROW
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line \d+: behind it the gzip file is cut"):
        list(rows)


def test_read_rows_does_not_unpack_a_list_beyond_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MAX_JSON_BYTES", 2**20)
    path = write(tmp_path, "a.json.gz", gzip.compress(b"[" + b" " * 2**24))
    tracemalloc.start()
    message = refusal(path, max_row_bytes=2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "one list or object longer than 1 MiB" in message
    assert peak < 6 * 2**20


# .parquet


def write_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_read_rows_reads_parquet_and_drops_what_arrow_filled_in(tmp_path):
    turns = [[{"role": "user", "content": "a", "name": "x"}], [{"role": "user", "content": "b"}]]
    rows = [{"prompt": turn, "score": i} for i, turn in enumerate(turns)] + [{"prompt": turns[1]}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    read = list(read_rows(path))
    assert [row.value for row in read] == rows
    assert (read[2].number, read[2].place) == (3, f"{path}, row 3")


def test_read_rows_refuses_a_broken_parquet_file(tmp_path):
    whole = write_parquet(tmp_path / "a.parquet", [ROW] * 5).read_bytes()
    for content in (b"", b"PAR1", b"prompt,chosen\n", whole[:-20], whole[:40] + b"x" * 200):
        path = write(tmp_path, "b.parquet", content)
        assert refusal(path).startswith(f"{path}, behind row 0: no Parquet file, or a broken one")


def test_drop_nulls_goes_into_lists_and_keeps_their_nulls():
    assert drop_nulls({"a": None, "b": [{"c": None}, None, 0], "d": ""}) == {
        "b": [{}, None, 0],
        "d": "",
    }


# Any bytes


@pytest.mark.parametrize("suffix", [*READERS, ".jsonl.gz", ".json.gz", ".tsv.gz"])
@given(data=st.data())
def test_read_rows_survives_any_bytes(tmp_path_factory, suffix, data):
    start = data.draw(
        st.sampled_from([b"", b"[", b"[{", b'{"prompt": "', b"PAR1", b'a,b\n"', b"["])
    )
    content = start + data.draw(st.binary(max_size=60))
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    try:
        for row in read_rows(path, max_row_bytes=40):
            assert "\n" not in row.fault
            assert row.place.startswith(f"{path}, ")
    except ValueError as error:
        assert str(error).startswith(f"{path}, ") and "\n" not in str(error)


@given(
    st.lists(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5)),
    st.booleans(),
)
@example(["\ud800", 23], True)
def test_read_rows_reads_what_json_wrote(tmp_path_factory, values, ensure_ascii):
    path = tmp_path_factory.getbasetemp() / "values.json"
    path.write_text(json.dumps(values, ensure_ascii=ensure_ascii), encoding="utf-8")
    assert [row.value for row in read_rows(path)] == values


def test_printable_line_is_one_short_line_that_can_be_printed():
    assert printable_line("a\n b\ud800") == "a b\\ud800"
    assert len(printable_line("x" * 10**6)) == 80


def test_read_rows_says_when_there_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_rows(tmp_path / "missing.jsonl")
