import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compress.calibrate import text as text_module
from compress.calibrate.errors import InputError
from compress.calibrate.text import check_text, open_text, source_of


def lines(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path: Path, **columns: list) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_txt_is_one_document_without_its_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\ntwo \xc3\xa9")
    source = open_text(str(path))
    assert source.documents == ["one\n\ntwo é"]
    assert source.name == str(path)
    assert "1 document" in source.origin
    assert "a.txt" in source.origin


def test_jsonl_rows_are_documents_and_blank_ones_are_left_out(tmp_path):
    spec = lines(tmp_path / "a.jsonl", {"text": "one"}, {"text": "  "}, {"text": None}, {"text": "two"})
    assert open_text(spec).documents == ["one", "two"]


def test_parquet_reads_the_column_asked_for(tmp_path):
    spec = parquet(tmp_path / "a.parquet", text=["one", "two"], body=["x", None])
    assert open_text(spec).documents == ["one", "two"]
    assert open_text(spec, column="body").documents == ["x"]


def test_conversations_are_rendered_with_the_chat_template(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for spec in (lines(tmp_path / "a.jsonl", {"m": turns}), parquet(tmp_path / "a.parquet", m=[turns])):
        assert open_text(spec, "m", tokenizer=tokenizer).documents == [
            "<|start|>user\nhi<|end|><|start|>assistant\nyes<|end|>"
        ]
        assert open_text(spec, "m").documents == ["hi\n\nyes"]


def test_pydoc_needs_no_file():
    source = open_text("pydoc")
    assert len(source.documents) > 50
    assert "Python's own documentation" in source.origin
    check_text("pydoc")


def test_digest_tells_content_and_its_division_apart():
    assert source_of("a", ["xy"], "").digest == source_of("b", ["xy"], "").digest
    assert source_of("a", ["xy"], "").digest != source_of("a", ["x", "y"], "").digest


def test_no_more_than_the_limit_is_held_and_the_origin_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "MAX_CHARACTERS", 5)
    path = tmp_path / "a.txt"
    path.write_text("é" * 9, encoding="utf-8")
    for spec in (str(path), lines(tmp_path / "a.jsonl", {"text": "ééé"}, {"text": "éééé"}, {"text": "é"})):
        source = open_text(spec)
        assert source.characters == 5
        assert source.origin.startswith("the first ")


def error(spec: str, call=open_text, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("call", [open_text, check_text])
def test_faults_that_the_beginning_shows(tmp_path, call, monkeypatch):
    (tmp_path / "corpus").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "is a folder" in error("corpus", call)  # not a dataset of that name
    (tmp_path / "valid.txt").write_text("x")
    missing = error(str(tmp_path / "vald.txt"), call, option="eval.text")
    assert missing.startswith("eval.text=")
    assert "no such file; did you mean 'valid.txt'?" in missing
    assert "folder" in error(str(tmp_path / "nowhere" / "a.txt"), call)
    assert "is a folder" in error(str(tmp_path), call)
    (tmp_path / "a.csv").write_text("x")
    assert "'.csv'" in error(str(tmp_path / "a.csv"), call)
    assert ".parquet" in error(str(tmp_path / "a.csv"), call)
    (tmp_path / "e.txt").touch()
    assert "the file is empty" in error(str(tmp_path / "e.txt"), call)
    assert "is empty" in error("  ", call)
    (tmp_path / "l.txt").write_bytes(b"fine\nm\xe9moire\n")
    assert "line 2 isn't UTF-8" in error(str(tmp_path / "l.txt"), call)
    spec = lines(tmp_path / "c.jsonl", {"txet": "one", "id": 1})
    assert "no column 'text'" in error(spec, call)
    assert "did you mean 'txet'?" in error(spec, call)
    spec = parquet(tmp_path / "c.parquet", content=["one"])
    assert "no column 'context'; allowed: content; did you mean 'content'?" in error(spec, call, column="context")
    spec = lines(tmp_path / "n.jsonl", {"text": 3})
    assert "row 1 holds a int" in error(spec, call)
    spec = lines(tmp_path / "o.jsonl", ["x"])
    assert "line 1 is a list" in error(spec, call)
    (tmp_path / "b.parquet").write_bytes(Path(parquet(tmp_path / "f.parquet", text=["one"] * 99)).read_bytes()[:-50])
    assert "isn't a readable parquet file" in error(str(tmp_path / "b.parquet"), call)


def test_faults_that_only_reading_shows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "tw')
    check_text(str(path))
    assert "line 3 isn't valid JSON" in error(str(path))
    assert "truncated" in error(str(path))
    path.write_bytes(b'{"text": "one"}\n{"text": \n{"text": "two"}\n')
    assert "line 2" in error(str(path))
    assert "truncated" not in error(str(path))
    path.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    assert "line 2 isn't UTF-8" in error(str(path))
    lines(path, {"text": "one"}, {"body": "two"})
    assert "line 2: there is no column 'text'" in error(str(path))
    lines(path, {"text": " "}, {"text": ""})
    assert "there is no text in it" in error(str(path))


def test_parquet_damaged_inside_is_told(tmp_path):
    path = Path(parquet(tmp_path / "a.parquet", text=[f"row {i} " * 20 for i in range(2000)]))
    content = bytearray(path.read_bytes())
    content[100:4000] = bytes(3900)
    path.write_bytes(content)
    assert "can't be read" in error(str(path)) or "isn't a readable parquet" in error(str(path))


def test_an_unreadable_file_is_told(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "can't be read (Permission denied)" in error(str(path))


def test_a_template_that_refuses_a_conversation_is_passed_over(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    spec = lines(tmp_path / "a.jsonl", {"text": [{"role": "user", "content": "hi"}]})
    assert open_text(spec, tokenizer=tokenizer).documents == ["hi"]
