from types import SimpleNamespace

import pytest
import torch

from rarefy.errors import BadInput
from rarefy.tasks.concepts import CONCEPTS, ConceptScores, label, label_batches, spans_of

SOURCE = '''"""Doc."""
import os.path as p
from sys import argv

@wrap(1)
class Stack(Base):
    LIMIT = 10

    def push(self, item: int, times=2) -> None:
        # add
        for _ in range(times):
            if item >= self.LIMIT and True:
                raise ValueError(f"big {item!r}")
        self._items[0] += [x for x in (item, 1.5)]
        return {"a": sorted(item, key=len)}
'''


def pieces(source, concept):
    return [source[a:b] for a, b in spans_of(source)[concept]]


@pytest.mark.parametrize(("concept", "want"), [
    ("docstring", ['"""Doc."""']), ("comment", ["# add"]), ("number", ["1", "10", "2", "0", "1.5"]), ("class name", ["Stack"]),
    ("function name", ["push"]), ("parameter", ["self", "item", "times"]), ("parameter default", ["2"]), ("annotation", ["None", "int"]),
    ("attribute", ["LIMIT", "_items"]), ("function called", ["wrap", "range", "sorted", "ValueError"]), ("keyword argument", ["key"]),
    ("imported module", ["os.path as p", "sys"]), ("imported name", ["argv"]), ("decorator", ["wrap(1)"]), ("base class", ["Base"]),
    ("exception name", ["ValueError"]), ("UPPER_CASE name", ["LIMIT", "LIMIT"]), ("condition of if", ["item >= self.LIMIT and True"]),
    ("header of for", ["_", "range(times)"]), ("return value", ['{"a": sorted(item, key=len)}']), ("comprehension", ["[x for x in (item, 1.5)]"]),
    ("dict key", ['"a"']), ("raised value", ['ValueError(f"big {item!r}")']), ("comparison", [">="]), ("True or False", ["True"]),
    ("subscript", ["0"]), ("keyword raise", ["raise"]), ("keyword and", ["and"]), ("inside two brackets", ["item, 1.5", "item, key=len"]),
    ("assignment target", ["LIMIT", "self._items[0]"]), ("import line", ["import os.path as p", "from sys import argv"]),
])
def test_spans_of_a_known_file(concept, want):
    assert sorted(pieces(SOURCE, concept)) == sorted(want)


def test_there_are_many_concepts_and_none_twice():
    assert len(CONCEPTS) == len(set(CONCEPTS)) >= 40


def test_indentation_belongs_to_the_line_it_begins():
    text = "def f():\n    x = 1\n"
    tokens = [(0, 3), (3, 5), (5, 8), (8, 13), (13, 14)]      # def, " f", "():", newline+indent, x
    found = label(text, torch.tensor(tokens))
    assert found["indent 1"].tolist() == [False, False, False, True, True]
    assert found["indent 0"].tolist() == [True, True, True, False, False]
    assert found["function name"].tolist() == [False, True, False, False, False]     # " f": its space does not decide


def test_an_empty_span_carries_nothing():
    found = label("x = 1\n", torch.tensor([(0, 0), (0, 1)]))
    assert not any(v[0] for v in found.values()) and bool(found["name"][1])


@pytest.mark.parametrize("text", ["é = 'ü'; x.yy\n", "# ☃\ndef ñ(ä): return ä.yy\n", "s = '\U0001f600'; z.yy\n"])
def test_positions_are_characters_although_ast_counts_bytes(text):
    assert pieces(text, "attribute") == ["yy"]


@pytest.mark.parametrize("odd", ["\x0c", "\x1c", "\x85", "\u2028"])
def test_only_line_ends_of_python_end_lines(odd):
    text = f"# page{odd}break\n" + "s = 'a" + odd.strip("\x0c") + "b'\nx.yy = 5\n"
    assert pieces(text, "attribute") == ["yy"] and pieces(text, "number") == ["5"]


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_foreign_line_ends(end):
    text = end.join(["x = 1", "y.zz = 23", ""])
    assert pieces(text, "attribute") == ["zz"] and pieces(text, "number") == ["1", "23"]


@pytest.mark.parametrize("text", ["print 'two'\n", "def f(:\n", "x = '\0'\n", "  x\n y\n"])
def test_what_is_not_python_is_left_out(text):
    assert spans_of(text) is None and label(text, torch.tensor([(0, 1)])) is None


@pytest.mark.parametrize("text", ["", "\n", "# only\n", "x"])
def test_small_files(text):
    found = label(text, torch.tensor([(0, len(text))]))
    assert set(found) == set(CONCEPTS)


def test_labels_of_packed_batches_follow_documents():
    docs = [SimpleNamespace(name=n, text=t) for n, t in (("a", "x = 1\n"), ("b", "def (\n"), ("c", "y = 2\n"))]
    offsets = [(0, 0), (0, 1), (1, 3), (3, 5), (0, 0), (0, 3), (0, 0), (0, 1), (1, 3), (3, 5)]
    doc = [0] * 4 + [1] * 2 + [2] * 4
    batches = [SimpleNamespace(input_ids=torch.zeros(1, 5, dtype=torch.long), doc=torch.tensor([doc[i : i + 5]]),
                               offsets=torch.tensor([offsets[i : i + 5]])) for i in (0, 5)]
    labels, sides = label_batches(batches, docs)
    assert [s.tolist() for s in sides] == [[[0, 0, 0, 0, -1]], [[-1, 1, 1, 1, 1]]]
    assert labels[0]["number"].tolist() == [[False, False, False, True, False]]
    assert labels[1]["number"].tolist() == [[False, False, False, False, True]]


def naive(index, value, labels, side, width):
    """Per latent, loops only: best (concept, level) on side 0, its figures on side 1."""
    out = []
    for f in range(width):
        act = torch.zeros(len(labels))
        act[(index == f).any(1)] = value[index == f]
        rows = []
        for level in range(ConceptScores.LEVELS):
            fire = act >= 2.0 ** (level - 4) if level else act > 0
            for c in range(labels.shape[1]):
                figures = []
                for s in (0, 1):
                    on, truth = fire & (side == s), labels[:, c] & (side == s)
                    hit = int((on & truth).sum())
                    precision, recall = hit / max(1, int(on.sum())), hit / max(1, int(truth.sum()))
                    figures.append((2 * hit / max(1, int(on.sum()) + int(truth.sum())), precision, recall))
                rows.append((c, level, *figures))
        out.append(rows)
    return out


def data(n=400, width=13, k=3, concepts=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(width, generator=g)[:k] for _ in range(n)])
    value = torch.randn(n, k, generator=g).mul(1.5).exp().clamp(0.01, 100)
    labels = torch.rand(n, concepts, generator=g) < 0.3
    labels[:, 0] = ((index == 2) & (value > 1)).any(1)            # latent 2 tracks concept 0 above 1
    return index, value, labels, torch.randint(-1, 2, (n,), generator=g)


@pytest.mark.parametrize("split", [1, 63, 400])
def test_scores_equal_naive_loops_however_batched(split):
    index, value, labels, side = data()
    scores = ConceptScores(13, list("abcd"))
    for i in range(0, 400, split):
        some = slice(i, i + split)
        n, k = index[some].shape
        scores.observe(index[some].flatten(), value[some].flatten(), torch.arange(n).repeat_interleave(k), labels[some], side[some])
    best, table = scores.best(), naive(index, value, labels, side, 13)
    for f, rows in enumerate(table):
        top = max(r[2][0] for r in rows)
        found = next(r for r in rows if r[0] == int(best.concept[f]) and (2.0 ** (r[1] - 4) if r[1] else 0.0) == float(best.threshold[f]))
        assert found[2][0] == pytest.approx(top)                   # chosen on side 0
        assert (float(best.f1[f]), float(best.precision[f]), float(best.recall[f])) == pytest.approx(found[3])
    assert (int(best.concept[2]), float(best.threshold[2]), float(best.f1[2])) == (0, 1.0, 1.0)


def test_a_latent_that_never_fires_has_no_concept():
    scores = ConceptScores(3, ["a"])
    scores.observe(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([0]), torch.ones(2, 1, dtype=torch.bool), torch.tensor([0, 1]))
    assert scores.best().concept.tolist() == [0, -1, -1]


def test_figures_come_from_documents_not_chosen_on():
    scores = ConceptScores(1, ["a", "b"])
    labels = torch.tensor([[True, False], [True, False], [False, True], [False, True]])
    scores.observe(torch.zeros(4, dtype=torch.long), torch.ones(4), torch.arange(4), labels, torch.tensor([0, 0, 1, 1]))
    best = scores.best()
    assert int(best.concept[0]) == 0 and float(best.f1[0]) == 0


def test_scores_need_latents_and_concepts():
    for width, names in ((0, ["a"]), (3, [])):
        with pytest.raises(BadInput):
            ConceptScores(width, names)
