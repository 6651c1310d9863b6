import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from rarefy.builtin.corpus import Document, documents, pack, split, stdlib_held_out
from rarefy.errors import BadInput

SCRIPTS = Path(__file__).parents[1] / "scripts"


class Letters:
    """A tokenizer of one token a character."""

    def __init__(self, bos=0, eos=1) -> None:
        self.bos_token_id, self.eos_token_id, self.backend_tokenizer = bos, eos, self

    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        return type("E", (), {"ids": [ord(c) for c in text], "offsets": [(i, i + 1) for i in range(len(text))]})()


def test_a_folder_gives_its_texts_by_relative_name(tmp_path):
    (tmp_path / "in").mkdir()
    for name, text in (("b.txt", "bee"), ("in/a.py", "x = 1\n"), ("c.md", " \n"), ("d.bin", "no")):
        (tmp_path / name).write_text(text)
    (tmp_path / "e.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert [(d.name, d.text) for d in documents(str(tmp_path))] == [
        ("b.txt", "bee"), ("e.jsonl:1", "one"), ("e.jsonl:3", "two"), ("in/a.py", "x = 1\n")]
    both = f"{tmp_path / 'b.txt'}, {tmp_path / 'in'}"
    assert [d.text for d in documents(both)] == ["bee", "x = 1\n"]


def test_undecodable_files_are_counted_once_and_alone_refused(tmp_path):
    for i in range(3):
        (tmp_path / f"bad{i}.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.warns(UserWarning, match="3 files"), pytest.raises(BadInput, match="all 3 files are undecodable"):
        list(documents(str(tmp_path)))
    (tmp_path / "good.txt").write_text("yes")
    with pytest.warns(UserWarning, match=r"3 files.*bad0\.txt") as seen:
        assert [d.text for d in documents(str(tmp_path))] == ["yes"]
    assert len(seen) == 1


@pytest.mark.parametrize(("line", "what"), [
    ("{", "line 2: not JSON"), ('{"body": "x"}', "no text field 'text'"), ('{"text": 3}', "no text field"), ("[1]", "no text field"),
    pytest.param("[" * 200_000, "line 2: not JSON", id="deep"),
])
def test_bad_json_lines_are_named(tmp_path, line, what):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(BadInput, match=what):
        list(documents(str(tmp_path / "a.jsonl")))


def test_the_field_of_json_lines_can_be_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "é"}) + "\n")
    assert [d.text for d in documents(str(tmp_path / "a.jsonl"), field="body")] == ["é"]


def test_no_such_place_and_an_empty_one(tmp_path):
    with pytest.raises(BadInput, match="no such file or folder"):
        list(documents(str(tmp_path / "gone")))
    with pytest.raises(BadInput, match="no text in it"):
        list(documents(str(tmp_path)))


def test_datasets_are_an_extra_with_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match="pip install"):
        list(documents("datasets:some/thing:train"))


def source_corpus():
    spec = importlib.util.spec_from_file_location("source_corpus", SCRIPTS / "source_corpus.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["source_corpus"] = module      # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_library_and_the_training_script_hold_the_same_files_out():
    script = source_corpus()
    texts = {d.name: d.text for d in documents("stdlib")}
    assert len(texts) > 200 and all(n.startswith("stdlib/") for n in texts)
    assert not [n for n in texts if "site-packages" in n or "__pycache__" in n]
    assert [n for n in texts if stdlib_held_out(n)] == [n for n in texts if script.held_out(n)]
    fit_on, held = split((Document(n, t) for n, t in texts.items()), held_out=0.5)
    assert {d.name for d in held} == {n for n in texts if script.held_out(n)}
    assert len(fit_on) + len(held) == len(texts) and 0.02 < len(held) / len(texts) < 0.09


def test_split_goes_by_name_seed_and_fraction():
    docs = [Document(f"f{i}.txt", str(i)) for i in range(2000)]
    fit_on, held = split(docs, held_out=0.2, seed=3)
    assert len(held) == pytest.approx(400, abs=60) and not {d.name for d in fit_on} & {d.name for d in held}
    again = split(reversed(docs), held_out=0.2, seed=3)
    assert {d.name for d in again[1]} == {d.name for d in held}
    assert {d.name for d in split(docs, held_out=0.2, seed=4)[1]} != {d.name for d in held}
    assert {d.name for d in held} < {d.name for d in split(docs, held_out=0.4, seed=3)[1]}
    for bad in (0, 1, -0.1, float("nan")):
        with pytest.raises(BadInput, match="held_out"):
            split(docs, held_out=bad)


DOCS = [Document("a", "abcde"), Document("b", ""), Document("c", "xyz" * 20), Document("d", "é")]


@pytest.mark.parametrize("context", [1, 7, 63])
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_join_to_the_stream_and_keep_borders(context, batch):
    stream = [(t, n) for n, d in enumerate(DOCS) for t in (0, *map(ord, d.text))]
    batches = list(pack(DOCS, Letters(), context, batch))
    got = [(t, n) for b in batches for t, n in zip(b.input_ids.flatten().tolist(), b.doc.flatten().tolist(), strict=True)]
    assert got == stream[: len(stream) // context * context]
    assert all(b.input_ids.shape[1] == context and b.input_ids.shape[0] == batch for b in batches[:-1])
    for b in batches:
        assert b.input_ids.dtype == b.doc.dtype == b.offsets.dtype == torch.int64 and b.attention_mask is None
        for t, n, (s, e) in zip(b.input_ids.flatten().tolist(), b.doc.flatten().tolist(), b.offsets.flatten(0, 1).tolist(), strict=True):
            assert (t, e) == (0, 0) if s == e else DOCS[n].text[s:e] == chr(t)


def test_max_tokens_and_each_limit_what_is_taken():
    docs = [Document(f"d{i}", chr(97 + i) * 50) for i in range(8)]
    taken = list(pack(docs, Letters(), 10, 4, max_tokens=105))
    assert sum(b.input_ids.numel() for b in taken) == 100
    some = torch.cat([b.doc.flatten() for b in pack(docs, Letters(), 11, each=10)])
    assert some.bincount().tolist() == [11] * 8
    again = [b.offsets for b in pack(docs, Letters(), 11, each=10)]
    assert all(torch.equal(a, b.offsets) for a, b in zip(again, pack(docs, Letters(), 11, each=10), strict=True))


def test_without_bos_a_document_begins_with_eos():
    first = next(pack([Document("a", "bc")], Letters(bos=None, eos=9), 3))
    assert first.input_ids.tolist() == [[9, 98, 99]]


def test_text_shorter_than_a_context_is_refused():
    with pytest.raises(BadInput, match="6 tokens, shorter than one context of 7"):
        list(pack([Document("a", "abcde")], Letters(), 7))
