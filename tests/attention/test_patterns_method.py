"""Attention over a pattern: against masked attention written out, in models, while decoding, with padding and metadata."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.attention.pattern import PatternAttention
from rarefy.errors import BadInput
from rarefy.method import Sparse
from rarefy.site import replaced
from site_models import build


def heads(B: int = 2, H: int = 4, G: int = 2, S: int = 45, D: int = 8, T: int | None = None, dtype: Any = torch.float64) -> tuple[Tensor, ...]:
    r = torch.Generator().manual_seed(S)
    return tuple(torch.randn(B, n, s, D, generator=r, dtype=dtype) for n, s in ((H, T or S), (G, S), (G, S)))


def written_out(q: Tensor, k: Tensor, v: Tensor, see: Callable[[int, int, int, int], bool]) -> Tensor:
    """see(batch row, head, query position, key position)."""
    B, H, T, D = q.shape
    G, S = k.shape[1:3]
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                keys = [s for s in range(S) if see(b, h, S - T + t, s)]
                g = h // (H // G)
                p = (k[b, g, keys] @ q[b, h, t] * D**-0.5).softmax(-1)
                rows.append(p @ v[b, g, keys] if keys else torch.zeros(D, dtype=q.dtype))
    return torch.stack(rows).view(B, H, T, D)


ROWS = torch.tensor([[0] * 20 + [1] * 15 + [2] * 15, [3] * 9 + [-1] * 4 + [1] * 37])
CASES: list[tuple[str, dict[str, Tensor], Callable[[int, int, int, int], bool]]] = [
    ("window(7) | sinks(2)", {}, lambda b, h, q, k: 0 <= q - k < 7 or k < 2),
    ("heads(window(5), strided(4))", {}, lambda b, h, q, k: 0 <= q - k < 5 if h < 2 else (q - k) % 4 == 0),
    ("strided(9, offset=1)", {}, lambda b, h, q, k: (q - k) % 9 == 1),                             # query 0 sees nothing
    ('same("row")', {"row": ROWS}, lambda b, h, q, k: int(ROWS[b, q]) == int(ROWS[b, k]) >= 0),
    ('same("row") | shards(4)', {"row": ROWS[0]}, lambda b, h, q, k: int(ROWS[0, q]) == int(ROWS[0, k]) or k % 4 == h),
]


@pytest.mark.parametrize("sizes", [(8, 8), (5, 1), (16, 64)])
@pytest.mark.parametrize("text, tables, see", CASES, ids=[c[0] for c in CASES])
def test_it_is_masked_attention_forward_and_backward(text: str, tables: dict[str, Tensor], see: Any, sizes: tuple[int, int]) -> None:
    method = PatternAttention(pattern=text, block=sizes[0], query_block=sizes[1])
    for T, causal in ((45, True), (45, False), (6, True), (1, True)):
        given = [x.requires_grad_() for x in heads(T=T)]
        expected = written_out(*given, lambda b, h, q, k, c=causal: see(b, h, q, k) and (k <= q or not c))
        weight = torch.randn_like(expected)
        wanted = torch.autograd.grad((expected * weight).sum(), given)
        with method.bind(**tables):
            got = method.attend(*given, scale=8**-0.5, causal=causal)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        for a, b in zip(torch.autograd.grad((got * weight).sum(), given), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
        share = sum(see(b, h, q, k) and (k <= q or not causal) for b in range(2) for h in range(4) for q in range(45 - T, 45) for k in range(45))
        total = 8 * (sum(range(46 - T, 46)) if causal else 45 * T)
        assert method.measured_density() == pytest.approx(share / total, abs=1e-12)


@pytest.mark.parametrize("text", ["window(7) | sinks(2)", "blocks(4, window(1) | random(1, past=True))", 'same("row")', "heads(block(8), every(3))"])
def test_prefill_is_decoding(text: str) -> None:
    q, k, v = heads(S=50)
    method = PatternAttention(pattern=text, block=8, query_block=16)
    with method.bind(**({"row": ROWS} if "row" in text else {})):
        whole = method(q, k, v)
        steps = [method(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]) for t in range(50)]
    torch.testing.assert_close(torch.cat(steps, 2), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_it_were_not_there(side: str) -> None:
    q, k, v = heads(S=50)
    length, method = 31, PatternAttention(pattern='window(4) | same("row") | sinks(1)', block=8, query_block=8)
    at = torch.arange(50 - length, 50) if side == "left" else torch.arange(length)
    padding = torch.zeros(2, 50, dtype=torch.bool)
    padding[0], padding[1, at] = True, True
    with method.bind(row=ROWS):
        got = method.attend(q, k, v, scale=0.4, padding_BS=padding)
        first = method.attend(q[:1], k[:1], v[:1], scale=0.4, padding_BS=padding[:1])
    with method.bind(row=ROWS[1][at]):
        alone = method.attend(q[1:, :, at], k[1:, :, at], v[1:, :, at], scale=0.4)
    torch.testing.assert_close(got[1:, :, at], alone)
    torch.testing.assert_close(got[:1], first)
    others = torch.ones(50, dtype=torch.bool).index_fill(0, at, False)
    assert not got[1, :, others].any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pattern_in_a_model_is_the_models_own_attention_under_that_mask(name: str) -> None:
    model = build(name)
    ids = torch.randint(1, 61, (2, 37), generator=torch.Generator().manual_seed(3))
    keep = torch.tensor([[k <= q and (q - k < 6 or k < 2) for k in range(37)] for q in range(37)])
    bias = torch.zeros(2, 1, 37, 37).masked_fill(~keep, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=bias).logits
        with replaced(model, {"layers.*.attn": PatternAttention(pattern="window(6) | sinks(2)", block=8, query_block=8)}):
            got = model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_layers_are_told_apart_and_generate_goes_on_from_the_cache() -> None:
    model = build("llama")
    ids = torch.randint(1, 61, (2, 30), generator=torch.Generator().manual_seed(4))
    window = PatternAttention(pattern="window(5)", block=4, query_block=4)
    hybrid = PatternAttention(pattern="on_layers([1], full(), window(5))", block=4, query_block=4)
    with torch.no_grad():
        with replaced(model, {"layers.0.attn": window}):
            expected = model(input_ids=ids).logits
        with replaced(model, {"layers.*.attn": window}):
            all_local = model(input_ids=ids).logits
        with replaced(model, {"layers.*.attn": hybrid}):
            got = model(input_ids=ids).logits
            made = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
            again = ids
            for _ in range(6):
                again = torch.cat([again, model(input_ids=again, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, all_local, atol=1e-3)
    assert torch.equal(made, again)


def test_a_model_learns_through_a_pattern() -> None:
    model = build("llama").train()
    ids = torch.randint(1, 61, (2, 24), generator=torch.Generator().manual_seed(5))
    keep = torch.tensor([[k <= q and q - k < 6 for k in range(24)] for q in range(24)])
    bias = torch.zeros(2, 1, 24, 24).masked_fill(~keep, torch.finfo(torch.float32).min)
    grads = []
    for under in (True, False):
        model.zero_grad()
        with replaced(model, {"layers.*.attn": PatternAttention(pattern="window(6)", block=8, query_block=8)} if under else {}):
            model(input_ids=ids, labels=ids, **({} if under else {"attention_mask": bias})).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, got in grads[0].items():
        torch.testing.assert_close(got, grads[1][name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_cost_is_of_the_last_context() -> None:
    method = PatternAttention(pattern="strided(5)", block=8)
    method(*heads(S=20))
    density = sum(p // 5 + 1 for p in range(20)) / 210
    assert method.cost().flops == pytest.approx(4 * 4 * 8 * 10.5 * density) and isinstance(method, Sparse)


def test_bad_metadata_is_refused_by_name() -> None:
    method = PatternAttention(pattern='same("row")', block=8)
    q, k, v = heads(S=50)
    with pytest.raises(BadInput, match="'row', which is not bound"):
        method(q, k, v)
    with pytest.raises(BadInput, match="does not read 'rows'; it reads row; did you mean row"), method.bind(rows=ROWS):
        pass
    with method.bind(row=ROWS[:, :40]), pytest.raises(BadInput, match=r"\[50 or more\]"):
        method(q, k, v)
    with method.bind(row=ROWS.repeat(2, 1)[:3]), pytest.raises(BadInput, match="3"):
        method(q, k, v)
    with pytest.raises(BadInput, match="3 heads"):
        PatternAttention(pattern="heads(full(), window(3))")(*heads(H=3, G=3))
    assert not method._tables


def test_pairs_that_share_their_prompt_are_as_if_run_apart() -> None:
    """Prefix sharing (arXiv 2410.20305): packed prompts with two answers each give the logits and gradients of separate passes."""
    from rarefy.attention.patterns.zoo.documents import answer_positions, packed

    model = build("llama").train()
    lengths = [(7, (5, 4)), (3, (6, 8))]
    tables = packed(lengths)
    ids = torch.randint(1, 61, (1, 33), generator=torch.Generator().manual_seed(6))
    position = answer_positions(tables["part"], tables["part_parent"])
    pieces = {n: (tables["part"] == n).nonzero()[:, 0] for n in range(6)}
    answers = [(0, 1), (0, 2), (3, 4), (3, 5)]

    def gradients() -> dict[str, Tensor]:
        out = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return out

    weight = torch.randn(33, 61, generator=torch.Generator().manual_seed(7))
    apart = {}
    for prompt, answer in answers:
        at = torch.cat([pieces[prompt], pieces[answer]])
        apart[answer] = model(input_ids=ids[:, at], use_cache=False).logits[0, len(pieces[prompt]) :]
    sum((apart[n] * weight[pieces[n]]).sum() for n in apart).backward()
    expected = gradients()

    method = PatternAttention(pattern='same("part") | ancestor("part")', block=8, query_block=8)
    with replaced(model, {"layers.*.attn": method}), method.bind(**tables):
        # a mask of ones: without any, transformers takes positions that begin again for packed documents
        got = model(input_ids=ids, position_ids=position[None], attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        sum((got[pieces[n]] * weight[pieces[n]]).sum() for n in apart).backward()
    for n, logits in apart.items():
        torch.testing.assert_close(got[pieces[n]], logits, rtol=1e-4, atol=1e-5)
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)
