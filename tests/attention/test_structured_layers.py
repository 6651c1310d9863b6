"""Layers over documents, graphs and pictures: each against its definition written out, and what may reach what."""

import inspect
import textwrap

import pytest
import torch

from rarefy.attention.structured.graph import FDGATII, FORMS, EdgeAttention, edge_softmax, spread
from rarefy.attention.structured.hat import HAT, LAYOUTS, layout
from rarefy.attention.structured.hdt import HDT, Walk, ranks
from rarefy.attention.structured.trees import (
    DOCUMENT,
    NOTHING,
    SECTION,
    SENTENCE,
    TOKEN,
    document_tree,
    python_sections,
    text_sections,
    together,
    tree,
)
from rarefy.errors import BadInput


def letters(text):
    return [ord(c) % 97 for c in text]


def words(text):
    return [len(word) for word in text.split()]


def hat_inputs(T, batch=2, width=12):
    return torch.randn(batch, T, width, generator=torch.Generator().manual_seed(T), dtype=torch.float64)


@pytest.mark.parametrize("stack", ["SDSD", "SD|SD|S", "SSD", "SSDD", "DS"])
@pytest.mark.parametrize("T", [1, 5, 17, 20])
def test_hat_over_segments_is_the_whole_sequence_under_the_masks(stack, T):
    encoder, x = HAT(12, 3, segment=5, segments=4, stack=stack, wide=16).double(), hat_inputs(T)
    real = torch.arange(T) < torch.tensor([[T], [max(1, T - 7)]])
    for given in (None, real):
        for got, want in zip(encoder(x, given), encoder.reference(x, given), strict=True):
            torch.testing.assert_close(got, want)


def moved(encoder, T, at):
    """Which tokens' and segments' states a change at one token moves."""
    x = hat_inputs(T, batch=1)
    other = x.clone()
    other[0, at] = 3 * hat_inputs(1, batch=1)[0, 0]
    with torch.no_grad():
        (a, c), (b, d) = encoder(x), encoder(other)
    return set((a != b).any(-1)[0].nonzero()[:, 0].tolist()), set((c != d).any(-1)[0].nonzero()[:, 0].tolist())


def test_segments_of_hat_meet_in_their_cls_only():
    """After S nothing has left the segment; after D other segments' CLS know, their tokens do not; another S brings it to them."""
    mine, all_tokens, all_cls = set(range(5, 10)), set(range(20)), set(range(4))
    made = {stack: HAT(12, 3, segment=5, segments=4, stack=stack).double() for stack in ("S", "SD", "SDS", "SSDD", "DS")}
    assert moved(made["S"], 20, 7) == (mine, {1})
    assert moved(made["SD"], 20, 7) == (mine, all_cls)
    assert moved(made["SSDD"], 20, 7) == (mine, all_cls)
    assert moved(made["SDS"], 20, 7) == (all_tokens, all_cls)
    assert moved(made["DS"], 20, 7) == (mine, {1})
    blocked = made["SDS"]
    with torch.no_grad():
        blocked.layers[1].out.weight.zero_()                    # CLS tokens exchange nothing: nothing crosses
    assert moved(blocked, 20, 7) == (mine, {1})


def test_hat_forms_the_pairs_it_says_and_no_more():
    encoder, formed = HAT(12, 3, segment=8, segments=64, stack="SDS"), []
    for layer in encoder.layers:
        layer.qkv.register_forward_hook(lambda module, inputs, out: formed.append(out.shape[0] * out.shape[1] ** 2))
    encoder(torch.zeros(1, 512, 12))
    assert sum(formed) == encoder.pairs(512) == 2 * 64 * 81 + 64 * 64 < 0.02 * 3 * 512**2


def test_hat_padding_changes_nothing_and_layouts_are_words():
    encoder, x = HAT(12, 3, segment=5, segments=4).double(), hat_inputs(20)
    real = torch.arange(20).expand(2, 20) < 8
    other = torch.where(real[..., None], x, 9.0)
    for a, b in zip(encoder(x, real), encoder(other, real), strict=True):
        torch.testing.assert_close(a[:, : (8 if a.shape[1] == 20 else 2)], b[:, : (8 if b.shape[1] == 20 else 2)])
    for a, b in zip(encoder(x, real), encoder(x[:, :10], real[:, :10]), strict=True):          # segments of padding alone are as if not there
        torch.testing.assert_close(a[:, : (8 if a.shape[1] == 20 else 2)], b[:, : (8 if b.shape[1] == 10 else 2)])
    assert [layout(kind, 3, 1) for kind in LAYOUTS] == ["SDSDSD", "SDSS", "SSSD", "SSSD"]
    assert layout("ad_hoc", 4, 2) == "SSSSDD" and layout("late", 4) == "SSSDSD"
    for wrong in ({"stack": "SX"}, {"stack": ""}, {"heads": 5}):
        with pytest.raises(BadInput):
            HAT(**{"width": 12, "heads": 3, **wrong})
    with pytest.raises(BadInput, match="5 segments of 5"):
        encoder(hat_inputs(21))
    with pytest.raises(BadInput, match="no layout"):
        layout("x", 2)


SOURCE = textwrap.dedent('''\
    """Doc."""
    # remark
    X = 1
    Y = [
        2,
    ]

    @decorated
    def f(a):
        """Says."""
        if a:
            return (1 +
                    2)
        return 3
    class C:
        z = 1

        def g(self): pass
    print(X); print(Y)
''')


def test_python_is_cut_by_its_grammar():
    got = python_sections(SOURCE)
    assert "".join("".join(section) for section in got) == SOURCE
    assert [section[0].split("\n")[0] for section in got] == ['"""Doc."""', "@decorated", "class C:", "print(X); print(Y)"]
    assert [len(section) for section in got] == [3, 5, 3, 1]
    assert got[1][3].endswith("2)\n") and got[0][2] == "Y = [\n    2,\n]\n\n"
    piece = SOURCE[SOURCE.index("if a") :]                              # does not parse: lines instead
    cut = python_sections(piece)
    assert "".join("".join(section) for section in cut) == piece
    assert [section[0].split("\n")[0].strip() for section in cut] == ["if a:", "class C:", "print(X); print(Y)"]
    feed = "a = 1\n\x0c\ndef f():\n    return '\\d'\n"                  # a form feed begins no line, a strange escape warns nobody
    assert ["".join(s) for s in python_sections(feed)] == ["a = 1\n\x0c\n", "def f():\n    return '\\d'\n"]
    assert text_sections("one\ntwo\n\nthree\n") == [["one\n", "two\n", "\n"], ["three\n"]]


def test_the_standard_library_stays_whole():
    for module in (inspect, textwrap, ast_module()):
        text = inspect.getsource(module)
        got = python_sections(text)
        assert "".join("".join(section) for section in got) == text and len(got) > 5
        made = document_tree(text, words, length=300)
        assert len(made) == 300 and int((made.level == SENTENCE).sum()) >= 2


def ast_module():
    import ast

    return ast


def sees(one, i, j):
    """HDT's relation, from the tree alone: same parent, parent, or child."""
    def up(x):
        return next((p for p in range(x - 1, -1, -1) if one.level[p] < one.level[x]), None) if x else None

    return i == j or (up(i) is not None and up(i) == up(j)) or up(i) == j or up(j) == i


NESTED = [[[1, 2, 3], [4, 5]], [[6], [], [7, 8, 9, 10]], [], [[11, 12]]]


def test_a_tree_has_anchors_before_what_is_under_them():
    made = tree(NESTED)
    first, second = [SECTION, SENTENCE, *[TOKEN] * 3, SENTENCE, *[TOKEN] * 2], [SECTION, SENTENCE, TOKEN, SENTENCE, *[TOKEN] * 4]
    assert made.level.tolist() == [DOCUMENT, *first, *second, SECTION, SENTENCE, *[TOKEN] * 2]
    assert made.ids[made.level == TOKEN].tolist() == list(range(1, 13))
    section, sentence, token = ranks(made)
    assert section.tolist() == [0, *[1] * 8, *[2] * 8, *[3] * 4] and token[made.level == TOKEN].tolist() == [1, 2, 3, 1, 2, 1, 1, 2, 3, 4, 1, 2]
    assert sentence[made.level >= SENTENCE].tolist() == [1] * 4 + [2] * 3 + [1] * 2 + [2] * 5 + [1] * 3
    with pytest.raises(BadInput, match="no tokens"):
        tree([[[]], []])


@pytest.mark.parametrize("by_level", [True, False])
def test_a_walk_by_level_is_dense_attention_along_the_tree(by_level):
    trees = [tree(NESTED), document_tree(SOURCE, letters, length=60)]
    batch = together(trees)
    B, L = batch.level.shape
    q, k, v = (torch.randn(B, 2, L, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64, requires_grad=True) for n in range(3))
    keep = torch.eye(L, dtype=torch.bool).expand(B, L, L).clone()
    for b, one in enumerate(trees):
        n = len(one)
        keep[b, :n, :n] = torch.tensor([[sees(one, i, j) for j in range(n)] for i in range(n)])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None])
    walk = Walk(batch, 8, by_level=by_level)
    torch.testing.assert_close(walk.attend(q, k, v), want)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for got, true in zip(torch.autograd.grad((walk.attend(q, k, v) * weight).sum(), (q, k, v)),
                         torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(got, true)
    with pytest.raises(BadInput, match="2 trees"):
        walk.attend(q[:1], k[:1], v[:1])


def test_by_level_fewer_tiles_are_visited():
    made = document_tree(inspect.getsource(inspect), words, length=2048)
    whole = (-(-2048 // 32)) ** 2
    assert Walk(made, 32).tiles() < 0.75 * Walk(made, 32, by_level=False).tiles() < 0.3 * whole


def test_a_change_walks_up_and_down_the_tree():
    """A token's news reaches its sentence in one layer, the anchors of sibling sentences in two, those sentences in three."""
    made, x = together([tree(NESTED)]), torch.randn(1, 21, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[0, 3] = 3 * torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reached = []
    for layers in (1, 2, 3):
        encoder = HDT(12, 3, layers=layers, block=8).double()
        with torch.no_grad():
            reached.append((encoder(x, made) != encoder(other, made)).any(-1)[0].nonzero()[:, 0].tolist())
    assert reached[0] == [2, 3, 4, 5]
    assert reached[1] == [1, 2, 3, 4, 5, 6]
    assert reached[2] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17]


def test_filled_up_documents_are_read_as_if_alone():
    one, two = tree(NESTED), tree([[[5, 6]]])
    both = together([one, two])
    assert both.level[1].tolist()[-1] == NOTHING
    x = torch.randn(2, 21, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    encoder = HDT(12, 3, block=8).double()
    torch.testing.assert_close(encoder(x, both)[1, : len(two)], encoder(x[1:, : len(two)], together([two]))[0])
    with pytest.raises(BadInput, match="embeddings"):
        encoder(x[:1], both)


def graph(nodes=14, seed=0):
    draw = torch.Generator().manual_seed(seed)
    keep = torch.rand(nodes, nodes, generator=draw) < 0.3
    keep[5] = False                                              # nobody points to node 5
    return torch.randn(nodes, 6, generator=draw, dtype=torch.float64), keep.nonzero().T.flip(0).contiguous(), keep


@pytest.mark.parametrize("form", FORMS)
def test_attention_over_edges_is_masked_dense_attention(form):
    x, edges, keep = graph()
    layer = EdgeAttention(6, 2, 3, form).double()
    x.requires_grad_(True)
    got = layer(x, edges)
    want = torch.zeros(14, 2, 3, dtype=torch.float64)
    left, right = layer.ask(x).view(14, 2, 3), layer.give(x).view(14, 2, 3)
    leaky = torch.nn.functional.leaky_relu
    for i in range(14):
        near = keep[i].nonzero()[:, 0].tolist()
        for h in range(2):
            a = layer.weigh_2HD[:, h]
            one = [a[0] @ leaky(left[i, h] + right[j, h], 0.2) for j in near]
            e = one if form == "dynamic" else [leaky(a[0] @ left[i, h] + a[1] @ left[j, h], 0.2) for j in near]
            for weight, j in zip(torch.stack(e).softmax(0) if e else (), near, strict=True):
                want[i, h] = want[i, h] + weight * right[j, h]
    torch.testing.assert_close(got, want.flatten(1))
    torch.testing.assert_close(layer.reference(x, edges), got)
    assert not got[5].any()
    weight = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ours, theirs = (torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (layer(x, edges), layer.reference(x, edges)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_dynamic_attention_ranks_neighbours_by_who_asks_and_static_does_not():
    """a . LeakyReLU of x_i - x_j and of x_j - x_i is -0.8 |x_i - x_j|: every node likes itself best, which no static score can say."""
    x = torch.randn(14, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    everyone = torch.cartesian_prod(torch.arange(14), torch.arange(14)).T.contiguous()
    best = {}
    for form in FORMS:
        layer = EdgeAttention(6, 1, 12, form).double()
        if form == "dynamic":
            with torch.no_grad():
                layer.ask.weight.copy_(torch.cat([torch.eye(6), -torch.eye(6)]))
                layer.give.weight.copy_(-layer.ask.weight)
                layer.weigh_2HD.fill_(-1)
        ask, give = layer._sides(x)
        weight = edge_softmax(layer._score(ask[everyone[1]], give[everyone[0]]), everyone[1], 14)
        best[form] = weight.view(14, 14).argmax(0)                        # [from, to]
    assert best["dynamic"].tolist() == list(range(14)) and len(best["static"].unique()) == 1


def test_scores_may_be_large_and_edges_are_checked():
    got = edge_softmax(torch.tensor([[1000.0], [1001.0], [-1e4]], dtype=torch.float64), torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(got[:, 0], torch.tensor([1 / (1 + torch.e), torch.e / (1 + torch.e), 1.0], dtype=torch.float64))
    layer = EdgeAttention(6, 2, 3)
    for wrong in (torch.zeros(3, 2, dtype=torch.long), torch.zeros(2, 3), torch.tensor([[0], [14]])):
        with pytest.raises(BadInput, match="edges"):
            layer(torch.zeros(14, 6), wrong)


def test_fdgatii_is_its_formula():
    x, edges, _ = graph()
    model = FDGATII(6, 3, width=4, layers=3, alpha=0.2, lam=0.5).double()
    first = h = torch.relu(x @ model.enter.weight.T + model.enter.bias)
    for number, (attend, change) in enumerate(zip(model.attention, model.maps, strict=True), 1):
        s, theta = 0.8 * attend(h, edges) + 0.2 * first, torch.tensor(0.5 / number + 1).double().log()
        h = torch.relu(theta * (s @ change.weight.T) + (1 - theta) * s)
    torch.testing.assert_close(model(x, edges), h @ model.leave.weight.T + model.leave.bias)


def test_deep_stacks_keep_nodes_apart_where_a_gat_washes_them_out():
    generator = torch.Generator().manual_seed(0)
    x, edges = torch.randn(100, 16, generator=generator), torch.randint(100, (2, 800), generator=generator)
    with torch.no_grad():
        deep = [spread(h) for h in FDGATII(16, 4, width=16, layers=16).states(x, edges)]
        gat = [spread(h) for h in FDGATII(16, 4, width=16, layers=16, alpha=0.0, lam=None, form="static").states(x, edges)]
    assert gat[16] < 0.02 < 0.1 * deep[0] < deep[16]
    assert spread(torch.ones(5, 3)) == 0 == spread(torch.zeros(5, 3))
