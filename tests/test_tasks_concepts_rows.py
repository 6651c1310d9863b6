"""Judges of dictionaries on labelled rows: disentanglement, senses, supervised dictionaries, unlearning, rows of Python.

Shape letters: N = rows, D = width, F = latents, C = concepts, V = values, L = chosen latents.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize, one_hot

from rarefy.errors import BadInput
from rarefy.fidelity import fvu
from rarefy.tasks.codes import Codes, Lens, neurons
from rarefy.tasks.concepts import CONCEPTS
from rarefy.tasks.disentangle import Attribute, control, disentangle, read_out
from rarefy.tasks.python_rows import SENSES, package_of, python_rows
from rarefy.tasks.senses import Pairs, sense_pairs, strongest, tell_senses
from rarefy.tasks.supervised import conditional_means, least_squares, match
from rarefy.tasks.unlearning import chosen_latents, clamp, forgotten, losses
from site_models import BUILDERS


def as_codes(z_NF):
    row, latent = z_NF.nonzero(as_tuple=True)
    return Codes.sparse(latent, z_NF[row, latent], row, *z_NF.shape)


# --------------------------------------------------------------------------------------------------- disentanglement


def attributes(n=2000, d=40, values=(3, 4, 3), seed=0):
    """Rows that are a sum of one direction for the value of each attribute."""
    g = torch.Generator().manual_seed(seed)
    picked = [torch.randint(v, (n,), generator=g) for v in values]
    z_NV = torch.cat([one_hot(p, v) for p, v in zip(picked, values, strict=True)], 1).float() * (1 + torch.rand(n, 1, generator=g))
    rows_VD = normalize(torch.randn(sum(values), d, generator=g), dim=-1)
    x_ND = z_NV @ rows_VD + 0.05 * torch.randn(n, d, generator=g)
    made = [Attribute(f"a{i}", p, v) for i, (p, v) in enumerate(zip(picked, values, strict=True))]
    doc_N = torch.arange(n) // 25
    return x_ND, made, Lens(as_codes(z_NV), rows_VD), doc_N % 2, doc_N


def test_swapping_the_true_codes_changes_one_attribute_and_keeps_the_rest():
    x, made, truth, side, doc = attributes()
    out = read_out(x, made, side)
    assert min(out.accuracy) > 0.97
    best = disentangle(truth, out, side, doc)
    assert best.score.mean > 0.95 and best.cause > 0.95 and best.isolation > 0.95
    g = torch.Generator().manual_seed(3)
    turned = torch.linalg.qr(torch.randn(40, 40, generator=g))[0]
    for other in (neurons(x, x.mean(0)), Lens(Codes.dense((x - x.mean(0)) @ turned), turned.T)):
        assert disentangle(other, out, side, doc, sizes=(1, 2, 4)).score.mean < 0.7
    assert control(truth, out, doc, 2).mean > 0.95 > 0.5 > control(neurons(x, x.mean(0)), out, doc, 2).mean


def test_swapping_nothing_and_everything_scores_a_half():
    x, made, truth, side, doc = attributes()
    out = read_out(x, made, side)
    nothing = disentangle(Lens(truth.codes, torch.zeros_like(truth.decoder_FD)), out, side, doc)
    assert (nothing.cause, nothing.isolation, nothing.score.mean) == (0, 1, 0.5)
    everything = disentangle(neurons(x, x.mean(0)), out, side, doc, sizes=(40,))
    assert (everything.cause, everything.isolation, everything.score.mean) == (1, 0, 0.5)


def test_pairs_differ_in_every_attribute_and_stay_on_their_side():
    x, made, _, side, _ = attributes(n=600)
    out = read_out(x, made, side, pairs=50)
    for s in (0, 1):
        base, source = out.base_P[s], out.source_P[s]
        assert len(base) == 50 and (side[base] == s).all() and (side[source] == s).all()
        assert all((a.value_N[base] != a.value_N[source]).all() for a in made)


def test_control_changes_no_more_codes_than_it_may():
    """Against a loop that tries the best swaps one row at a time."""
    x, made, truth, side, doc = attributes(n=200)
    out = read_out(x, made, side, pairs=20)
    z = truth.codes.rows(torch.arange(200))
    effect_FV, hits, begin = truth.decoder_FD @ out.probes.weight_PC, [], 0
    for a in made:
        for b, s in zip(out.base_P[1].tolist(), out.source_P[1].tolist(), strict=True):
            change = z[s] - z[b]
            gain = change * (effect_FV[:, begin + a.value_N[s]] - effect_FV[:, begin + a.value_N[b]])
            logit = out.logit_NV[b].clone()
            for f in gain.argsort(descending=True)[:1].tolist():
                logit += change[f] * effect_FV[f] if gain[f] > 0 else 0
            hits.append(float(logit[begin : begin + a.values].argmax() == a.value_N[s]))
        begin += a.values
    assert control(truth, out, doc, 1).mean == pytest.approx(sum(hits) / len(hits))


def test_attributes_that_cannot_be_swapped_are_refused():
    x, made, _, side, _ = attributes(n=300)
    with pytest.raises(BadInput, match="at least two attributes"):
        read_out(x, made[:1], side)
    with pytest.raises(BadInput, match="side 1"):
        read_out(x, made, side * 0)


# ------------------------------------------------------------------------------------------------------------ senses


def test_confusion_by_hand():
    z = torch.tensor([[2.0, 1, 0], [3, 0, 0], [0, 4, 0], [0, 0, 0], [0, 0, 0]])
    assert strongest(as_codes(z)).tolist() == strongest(Codes.dense(z)).tolist() == [0, 0, 1, -1, -1]
    #        same latent, same sense | same, other sense | different, same | different, other | silent twice, same | other
    first, second = torch.tensor([0, 0, 0, 0, 3, 2]), torch.tensor([1, 1, 2, 2, 4, 3])
    same = torch.tensor([True, False, True, False, True, False])
    found = tell_senses(as_codes(z), Pairs(first, second, same, torch.arange(6)))
    assert (found.true_same, found.false_same, found.false_different, found.true_different) == (1, 1, 2, 2)
    assert found.accuracy.mean == 0.5 and found.precision == 0.5 and found.recall == pytest.approx(1 / 3)
    assert found.specificity == pytest.approx(2 / 3) and found.f1 == pytest.approx(2 / 5)


def test_an_oracle_tells_senses_and_dense_neurons_do_not():
    g = torch.Generator().manual_seed(0)
    word, sense = torch.randint(20, (800,), generator=g), torch.randint(4, (800,), generator=g)
    rows_FD = normalize(torch.randn(24, 64, generator=g), dim=-1)
    z = torch.cat([one_hot(word, 20) * 1.0, one_hot(sense, 4) * 1.5], 1)
    x = z @ rows_FD + 0.2 * torch.randn(800, 64, generator=g)
    pairs = sense_pairs(word, sense)
    assert len(pairs.same_P) == 2 * int(pairs.same_P.sum())
    oracle = tell_senses(as_codes(z), pairs)
    assert oracle.accuracy.mean == oracle.f1 == oracle.specificity == 1
    assert tell_senses(neurons(x, x.mean(0)).codes, pairs).accuracy.mean < 0.65


def test_pairs_hold_one_word_in_equal_numbers_of_the_same_and_different_senses():
    word = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, -1, 3, 3, 3])
    sense = torch.tensor([0, 0, 1, 1, 1, 1, 0, 1, 0, 0, -1, 1])        # 1: one sense; 2: twice in none; 3: too few known
    pairs = sense_pairs(word, sense)
    assert pairs.word_P.tolist() == [0, 0] and pairs.same_P.tolist() == [True, False]
    assert sorted([int(pairs.first_P[0]), int(pairs.second_P[0])]) == [0, 1]
    with pytest.raises(BadInput, match="no word occurs in two senses"):
        sense_pairs(word[3:9], sense[3:9])


# -------------------------------------------------------------------------------------------------------- supervised


def labelled(n=1500, d=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    y = torch.rand(n, 5, generator=g) < 0.3
    y[:, 1] |= y[:, 0] & (torch.rand(n, generator=g) < 0.7)             # two concepts that occur together
    rows = torch.randn(5, d, generator=g)
    return y.float() @ rows + 2 + 0.1 * torch.randn(n, d, generator=g), y, rows


def test_least_squares_recovers_planted_directions_and_means_are_conditional():
    x, y, rows = labelled()
    solved = least_squares(x, y)
    torch.testing.assert_close(solved.direction_CD, rows, atol=0.05, rtol=0)
    torch.testing.assert_close(solved.mean_D, torch.full((30,), 2.0), atol=0.05, rtol=0)
    means = conditional_means(x, y)
    torch.testing.assert_close(means.direction_CD[3], x[y[:, 3]].mean(0) - x.mean(0))
    assert fvu(x, solved(y)) < 0.01 < 0.05 < fvu(x, means(y))           # co-occurrence is counted twice by means
    lens = solved.lens(y)
    torch.testing.assert_close(lens.codes.rows(torch.arange(1500)) @ lens.decoder_FD + solved.mean_D, solved(y))
    assert torch.equal(lens.codes.fires.rows(torch.arange(1500)), y.float())
    torch.testing.assert_close(lens.decoder_FD.norm(dim=-1), torch.ones(5))


def test_concepts_that_imply_each_other_have_a_solution():
    x, y, _ = labelled()
    twice = torch.cat([y, y[:, :1]], 1)
    assert fvu(x, least_squares(x, twice)(twice)) == pytest.approx(fvu(x, least_squares(x, y)(y)), rel=1e-3)
    with pytest.raises(BadInput, match="no row has concept 0"):
        conditional_means(x, torch.zeros(1500, 1, dtype=torch.bool))


def test_match_is_the_best_f1_of_a_loop_and_is_taken_on_the_other_side():
    x, y, rows = labelled(n=300)
    side = torch.arange(300) % 2
    z = (x @ normalize(rows, dim=-1).T).relu()
    for codes in (as_codes(z), Codes.dense(z)):
        found = match(codes, y, side)

        def score(f, over, c, s):
            on, truth = z[side == s, f] > over, y[side == s, c]
            return 2 * float((on & truth).sum()) / max(1, float(on.sum() + truth.sum()))

        for c in range(5):
            tried = {(f, t): score(f, t * float(z[side == 0, f].max()), c, 0) for t in (0, 0.125, 0.25, 0.5) for f in range(5)}
            best = max(tried.values())
            allowed = [score(f, t * float(z[side == 0, f].max()), c, 1) for (f, t), v in tried.items() if v > best - 1e-6]
            assert min(abs(float(found.f1_C[c]) - a) for a in allowed) < 1e-5
    assert match(as_codes(y.float()), y, side).f1 == 1


# -------------------------------------------------------------------------------------------------------- unlearning


def test_latents_to_forget_fire_there_and_hardly_elsewhere():
    z = torch.zeros(200, 5)
    forget = torch.arange(200) < 100
    z[:50, 0] = 1                                                       # half of one, none of the other
    z[:90, 1], z[100:110, 1] = 1, 1                                     # most, and too much of the other
    z[:70, 2], z[100:101, 2] = 1, 1                                     # much, and once elsewhere
    z[100:101, 3] = 1
    assert chosen_latents(as_codes(z), forget, ~forget).tolist() == [2, 0]
    assert chosen_latents(as_codes(z), forget, ~forget, most=1).tolist() == [2]
    assert chosen_latents(Codes.dense(torch.randn(200, 3)), forget, ~forget).tolist() == []
    with pytest.raises(BadInput, match="0 rows to forget"):
        chosen_latents(as_codes(z), forget & False, ~forget)


def test_clamp_changes_firing_rows_and_no_others():
    rows_FD = torch.eye(4)[:3]
    lens = Lens(as_codes(torch.tensor([[2.0, 0, 0], [4, 1, 0]])), rows_FD)
    encode = lambda x_ND: Codes.dense(x_ND[:, :3].relu())
    x = torch.tensor([[[9.0, 9, 9, 9], [5, 2, 1, 7], [-1, 2, 1, 7]]])
    ablated = clamp(lens, encode, torch.tensor([0]), 0.0)(x)
    assert ablated.tolist() == [[[9, 9, 9, 9], [0, 2, 1, 7], [-1, 2, 1, 7]]]
    assert clamp(lens, encode, torch.tensor([0]), 2.0)(x)[0, 1].tolist() == [-6, 2, 1, 7]      # -2 times the mean of 2 and 4


def test_losses_are_those_of_the_model_by_document():
    torch.manual_seed(0)
    model = BUILDERS["llama"]().eval()
    batch = SimpleNamespace(input_ids=torch.randint(61, (2, 9)), doc=torch.tensor([[0] * 9, [0] * 4 + [2] * 5]))
    total, count = losses(model, [batch], {}, 4)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits
    want = torch.zeros(4, dtype=torch.float64)
    for b in range(2):
        for t in range(8):
            if batch.doc[b, t] == batch.doc[b, t + 1]:
                want[batch.doc[b, t + 1]] += cross_entropy(logits[b, t], batch.input_ids[b, t + 1]).double()
    torch.testing.assert_close(total, want, atol=1e-4, rtol=1e-5)
    assert count.tolist() == [11, 0, 4, 0]
    worse = losses(model, [batch], {"layers.0.resid_post": lambda x: x * 0}, 4)
    yes = torch.tensor([True, False, False, False])
    found = forgotten((total, count), worse, yes, ~yes & (count > 0), 3, 0.0)
    assert found.forget.mean == pytest.approx(float((worse[0] - total)[0] / 11)) and found.selective == pytest.approx(
        float((worse[0] - total)[0] / 11 - (worse[0] - total)[2] / 4))


# --------------------------------------------------------------------------------------------------- rows of Python

SOURCE = "import path\n\ndef join(path, Other=1):\n    return os.path + go(path=_x)\n"


def by_character(names_texts):
    docs = [SimpleNamespace(name=n, text=t) for n, t in names_texts]
    ids, doc, offsets = [], [], []
    for number, d in enumerate(docs):
        ids += [1] * len(d.text)
        doc += [number] * len(d.text)
        offsets += [(i, i + 1) for i in range(len(d.text))]
    batch = SimpleNamespace(input_ids=torch.tensor([ids]), doc=torch.tensor([doc]), offsets=torch.tensor([offsets]))
    return [batch], docs


def test_rows_know_letters_words_and_senses():
    batches, docs = by_character([("stdlib/p/a.py", SOURCE), ("bad.py", "def (\n"), ("stdlib/p/b.py", SOURCE), ("c.py", "x = 1\n")])
    keep = torch.ones_like(batches[0].input_ids, dtype=torch.bool)
    keep[0, 0] = False
    rows = python_rows(batches, docs, [keep])
    assert len(rows.at_N) == 2 * len(SOURCE) + 6 - 1 and rows.packages == ["p", "", "p", "c"]
    assert {int(d): int(rows.side_N[rows.doc_N == d][0]) for d in rows.doc_N.unique()} == {0: 0, 2: 1, 3: 1}
    here = rows.doc_N == 2
    letters = {i: chr(ord("a") + v) for i, v in enumerate(rows.letter_N[here].tolist()) if v >= 0}
    assert letters == {i: SOURCE[i].lower() for i in (SOURCE.index(w) for w in ("path", "join", "path,", "Other", "os", "path +", "go", "path="))}
    ends = [SOURCE.index(w) + 3 for w in ("path\n", "path,", "path +", "path=")]
    want = dict(zip(ends, ("import", "parameter", "attribute", "keyword argument"), strict=True))
    senses = {i: list(SENSES)[v] for i, v in enumerate(rows.sense_N[here].tolist()) if v >= 0}
    assert senses == {**want, SOURCE.index("Other") + 4: "parameter"}
    words = [rows.words[w] for w in rows.word_N[here].tolist() if w >= 0]
    assert words == ["path", "join", "path", "Other", "os", "path", "go", "path", "_x"]
    assert rows.concept_NC.shape[1] == len(CONCEPTS) and torch.equal(rows.of("name")[:, 0], rows.concept_NC[:, CONCEPTS.index("name")])


def test_common_concepts_have_rows_on_both_sides_in_several_documents():
    batches, docs = by_character([(f"{i}.py", SOURCE if i < 4 else "x = 1\n") for i in range(6)])
    rows = python_rows(batches, docs, [torch.ones_like(b.input_ids, dtype=torch.bool) for b in batches])
    common = rows.common(4, documents=2)
    assert "name" in common and "parameter" in common and "docstring" not in common and "name" not in rows.common(4, documents=4)
    assert rows.letters(5).tolist() == [ord("p") - ord("a")]


def test_text_that_is_not_python_is_refused():
    batches, docs = by_character([("a", "def (\n"), ("b", "x = 1\n")])
    with pytest.raises(BadInput, match="1 of 2 documents are Python source"):
        python_rows(batches, docs, [torch.ones_like(b.input_ids, dtype=torch.bool) for b in batches])


def test_packages():
    assert [package_of(n) for n in ("stdlib/asyncio/base.py", "stdlib/cmd.py", "inner/a.py")] == ["asyncio", "cmd", "inner"]
