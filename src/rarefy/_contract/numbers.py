"""Laws about numbers: dtypes, empty and single rows, NaN, arguments, modes of torch (C3, C5, C6, C10, C13, C16)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import BadInput, Unsupported
from .spec import Broken, Case, Law, NotApplicable, chosen, close, require, same_bits, same_state, state_of


def dtypes(case: Case) -> None:
    """C3: the output's dtype is the input's; its error against float64 is bounded."""
    exact_method = case.ready(dtype=torch.float64)
    for dtype, bound in case.spec.bounds.items():
        method, inputs = case.ready(dtype=dtype), case.inputs(16, dtype=dtype)
        with torch.no_grad():
            got = method(*inputs)
            require(got.dtype == dtype, f"{dtype} in, {got.dtype} out")
            close(got, exact_method(*(x.double() if x.is_floating_point() else x for x in inputs)), bound, f"{dtype} against float64")


def shapes(case: Case) -> None:
    """C5: no rows, one row, one unit, and for row methods any leading dims."""
    method, inputs = case.ready(), case.inputs(6)
    with torch.no_grad():
        whole = method(*inputs)
        none = method(*(x[:0] for x in inputs))
        require(none.shape == whole[:0].shape and none.dtype == whole.dtype, f"empty batch gave {none.dtype} {list(none.shape)}")
        reference = method.reference(*(x[:0] for x in inputs))
        require(reference.shape == none.shape, f"reference of an empty batch gave {list(reference.shape)}")
        close(method(*(x[:1] for x in inputs)), whole[:1], 1e-5, "one row")
        if len(inputs) == 1:
            close(method(inputs[0].view(2, 3, -1)), whole.view(2, 3, -1), 1e-5, "rows as [2, 3, d]")
            close(method(inputs[0][0]), whole[0], 1e-5, "a row as [d]")
        wide = tuple(torch.stack((x, -x), -1).flatten(-2)[..., ::2] for x in inputs)
        require(not all(x.is_contiguous() for x in wide), "strided inputs are contiguous")
        close(method(*wide), whole, 1e-5, "strided inputs")
        if case.spec.one_unit is None:
            return
        small, small_inputs = case.spec.one_unit()
        close(small.eval()(*small_inputs), small.reference(*small_inputs), 1e-5, "one unit")


def _spoilt(inputs: tuple[Tensor, ...], which: int, value: float) -> tuple[Tensor, ...]:
    bad = [x.clone() for x in inputs]
    bad[which].view(-1)[bad[which].numel() // 2] = value
    return tuple(bad)


def _refuses(call: Callable[[], object], what: str, words: tuple[str, ...]) -> None:
    try:
        call()
    except Unsupported:
        return
    except BadInput as error:
        missing = [w for w in words if w not in str(error)]
        require(not missing, f"{what}: the message does not say {missing}: {error}")
        return
    raise Broken(f"{what} was accepted")


def not_a_number(case: Case) -> None:
    """C6: NaN and inf raise BadInput that says which method and what, before any state changes."""
    for value, word in ((float("nan"), "NaN"), (float("inf"), "inf"), (float("-inf"), "inf")):
        method, inputs = case.ready(), case.inputs(8)
        before = state_of(method)
        for which in (i for i, x in enumerate(inputs) if x.is_floating_point()):
            bad = _spoilt(inputs, which, value)
            _refuses(lambda m=method, b=bad: m(*b), f"forward with {word} in input {which}", (word, method.name))
        same_state(before, state_of(method), "refused forward")
        fresh = case.fresh()
        before = state_of(fresh)
        if fresh.fitted == "calibrated":
            _refuses(lambda m=fresh, b=_spoilt(inputs, 0, value): m.observe(*b), f"observe with {word}", (word, fresh.name))
        if fresh.fitted == "trained":
            fresh.train()
            x = _spoilt(inputs, 0, value)[0]
            _refuses(lambda m=fresh, x=x: m.loss(x, x), f"loss with {word}", (word, fresh.name))
            good = torch.zeros_like(x)
            _refuses(lambda m=fresh, g=good, x=x: m.loss(g, _target(m, g, x)), f"loss with {word} in the target", (word, fresh.name))
        same_state(before, state_of(fresh), "refused fitting")


def _target(method: object, x: Tensor, bad: Tensor) -> Tensor:
    width = getattr(method, "d_out", x.shape[-1])
    return bad[:, :1].new_full((len(x), width), float("nan")) if torch.isnan(bad).any() else bad.new_full((len(x), width), float("inf"))


def arguments(case: Case) -> None:
    """C10: constructor arguments out of range raise BadInput that names the argument and its value."""
    if not case.spec.bad_arguments:
        raise NotApplicable("no bad arguments are given")
    cls, wrong = type(case.fresh()), []
    for bad, name in case.spec.bad_arguments:
        what = ", ".join(f"{k}={v!r}" for k, v in bad.items())
        try:
            cls(**{**case.spec.sound_arguments, **bad})
        except BadInput as error:
            if name not in str(error) or str(bad[name]) not in str(error):
                wrong.append(f"{what}: names neither {name} nor its value: {error}")
        except Exception as error:
            wrong.append(f"{what} raised {type(error).__name__} instead of BadInput")
        else:
            wrong.append(f"{what} was accepted")
    require(not wrong, "; ".join(wrong))


def modes(case: Case) -> None:
    """C16: the same under inference_mode, near under autocast, the same gradients under checkpointing."""
    from torch.utils.checkpoint import checkpoint

    method, inputs = case.ready(), case.inputs(8)
    with torch.no_grad():
        plain = method(*inputs)
    with torch.inference_mode():
        same_bits(method(*inputs).clone(), plain, "inference_mode")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        close(method(*inputs).float(), plain, 0.2, "autocast to bfloat16")
    fresh = case.inputs(8)
    leaves = tuple(x.requires_grad_() for x in fresh if x.is_floating_point())
    out = method(*fresh)
    if not out.requires_grad:
        return
    wanted = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    again = checkpoint(lambda *xs: method(*xs), *fresh, use_reentrant=False)
    got = torch.autograd.grad(again.square().sum(), leaves, allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        require((a is None) == (b is None), "checkpointing changes which inputs have gradients")
        if a is not None and b is not None:
            same_bits(a, b, "gradient under checkpointing")


def compiled(case: Case) -> None:
    """C13: torch.compile (graph capture, eager backend) of forward gives what forward gives."""
    method, inputs = case.ready(), case.inputs(8)
    with torch.no_grad():
        plain = method(*inputs)
        torch._dynamo.reset()
        close(torch.compile(method, backend="eager")(*inputs), plain, 1e-5, "torch.compile")


def exported(case: Case) -> None:
    """C13b: torch.export of forward gives what forward gives."""
    method, inputs = case.ready(), case.inputs(8)
    with torch.no_grad():
        program = torch.export.export(method, inputs, strict=False)
        close(program.module()(*inputs), method(*inputs), 1e-5, "torch.export")


def device_moves(case: Case) -> None:
    """C4, the part that needs no GPU: every tensor of state moves with the method (to "meta" here)."""
    method = case.ready()
    held = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    method.to("meta")
    moved = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    stays = [k for k in held if not moved[k].is_meta]
    require(not stays, f"{stays} stay behind when the method moves")
    loose = [k for k, v in vars(method).items() if isinstance(v, Tensor)]
    require(not loose, f"{loose} are tensors that are neither parameter nor buffer")


def selection_is_sound(case: Case) -> None:
    """C5: a selection's index is in range and without repeats, and its two forms agree."""
    method, inputs = case.ready(), case.inputs(9)
    selection = chosen(method, inputs)
    mask = selection.mask
    require(mask.dtype == torch.bool and mask.shape[-1] == selection.n, f"mask is {mask.dtype} {list(mask.shape)}, n is {selection.n}")
    require(not (selection.dense != 0)[~mask].any(), "dense weights outside the mask")
    if selection.index is not None:
        require(selection.index.dtype == torch.long, f"index is {selection.index.dtype}")
        require((mask.sum(-1) == selection.index.shape[-1]).all(), "an index repeats in a row")


LAWS: dict[str, Law] = {
    "C3 dtypes": dtypes,
    "C4 state moves with the method": device_moves,
    "C5 empty, single and strided inputs": shapes,
    "C5b selections are sound": selection_is_sound,
    "C6 NaN and inf are refused": not_a_number,
    "C10 bad arguments are refused": arguments,
    "C13 torch.compile agrees": compiled,
    "C13b torch.export agrees": exported,
    "C16 modes of torch": modes,
}
