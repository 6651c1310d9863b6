"""Vector code that loops of numba call: a register tile of a matrix product, and the two passes of an online softmax.

Written in LLVM's own language, so that sums stay in registers whatever an optimiser thinks of the loop, and width and tile follow the host.
A tile of logits lies [key, query]: queries are the lanes of vectors, so that maximum, exponential and sum need no shuffles.

Shape letters: L = lanes (queries in a tile), W = numbers in a vector, V = vectors side by side, R = rows of a product at a time.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false
from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

EXP2 = (0.6931469775983496, 0.24022242084797532, 0.055507337444260424, 0.009671512666146846, 0.0013264726843669056)
"""2^r = 1 + r (c1 + r (c2 + ...)) on [-1/2, 1/2], within 1e-7 of it: the least worst relative error of its degree that is exact at 0."""

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


class _HalfVector(ir.Type):
    """<32 x bfloat>, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "<32 x bfloat>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _HalfVector)

    def __hash__(self) -> int:
        return hash(_HalfVector)


@cache
def features() -> str:
    """What numba compiles for, as LLVM names it: "+avx2,+fma,..."."""
    return str(cpu_target.target_context.codegen().magic_tuple()[2])


WIDE = "+avx512f" in features()
W, VECTORS, ROWS = (16, 4, 4) if WIDE else (8, 2, 4)
"""Width and tile: 16 sums in 32 registers with AVX-512, 8 in 16 otherwise."""
PAIRS = WIDE and "+avx512bf16" in features() and llvm.llvm_version_info[0] >= 16
"""Whether the host multiplies pairs of bfloat16."""

_V, _VI = ir.VectorType(_F32, W), ir.VectorType(_I32, W)


def _number(n: int) -> ir.Constant:
    return ir.Constant(_I64, n)


def _splat(value: float | int, kind: ir.VectorType = _V) -> ir.Constant:
    return ir.Constant(kind, [value] * W)


def _pointer(context, builder, kind, array):  # type: ignore[no-untyped-def]
    return context.make_array(kind)(context, builder, array).data


def _load(builder, pointer, at, kind=_V):  # type: ignore[no-untyped-def]
    got = builder.load(builder.bitcast(builder.gep(pointer, [at]), kind.as_pointer()))
    got.align = 4
    return got


def _store(builder, pointer, at, value):  # type: ignore[no-untyped-def]
    builder.store(value, builder.bitcast(builder.gep(pointer, [at]), value.type.as_pointer())).align = 4


def _fma(builder):  # type: ignore[no-untyped-def]
    f = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_V, [_V] * 3), f"llvm.fma.v{W}f32")
    return lambda a, b, c: builder.call(f, [a, b, c])


def _spread(builder, scalar, kind):  # type: ignore[no-untyped-def]
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_VI, None))


def _pairs(builder):  # type: ignore[no-untyped-def]
    half = _HalfVector()
    f = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_V, [_V, half, half]), "llvm.x86.avx512bf16.dpbf16ps.512")
    return lambda a, b, c: builder.call(f, [c, builder.bitcast(a, half), builder.bitcast(b, half)])


def _loop(builder, count, begin):  # type: ignore[no-untyped-def]
    """(counter, values carried, finish): a loop of at least one round; finish(new values) closes it and gives them."""
    before, body = builder.block, builder.append_basic_block("body")
    builder.branch(body)
    builder.position_at_end(body)
    t = builder.phi(_I64)
    t.add_incoming(_number(0), before)
    carried = []
    for value in begin:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        carried.append(phi)

    def finish(new):  # type: ignore[no-untyped-def]
        end, after = builder.block, builder.append_basic_block("after")
        following = builder.add(t, _number(1))
        t.add_incoming(following, end)
        for phi, value in zip(carried, new, strict=True):
            phi.add_incoming(value, end)
        builder.cbranch(builder.icmp_signed("<", following, count), body, after)
        builder.position_at_end(after)
        return new

    return t, carried, finish


def product(rows: int, vectors: int, half: bool = False) -> Any:
    """Intrinsic: C[x, :] = keep * C[x, :] + sum over t of A[x, t] B[t, :], for `rows` x, `vectors` vectors of columns, count >= 1 t.

    A[x, t] lies at A[a + x * ax + t * at], B[t, :] at B[b + t * bt], C[x, :] at C[c + x * cx]; keep[:] at keep[k], used where k >= 0, else C
    starts from 0. With `half` A and B are uint32, each a pair of bfloat16 along t.
    """
    @intrinsic
    def run(typing, A, a, ax, at, B, b, bt, C, c, cx, count, keep, k):  # type: ignore[no-untyped-def]
        whole = types.int64
        signature = types.void(A, whole, whole, whole, B, whole, whole, C, whole, whole, whole, keep, whole)

        def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
            A_, a_, ax_, at_, B_, b_, bt_, C_, c_, cx_, count_, keep_, k_ = args
            pa, pb, pc, pk = (_pointer(context, builder, sig.args[i], x) for i, x in ((0, A_), (4, B_), (7, C_), (11, keep_)))
            kind = _VI if half else _V
            place = [[builder.add(builder.add(c_, builder.mul(_number(x), cx_)), _number(W * y)) for y in range(vectors)] for x in range(rows)]
            fresh, old, head = builder.block, builder.append_basic_block("old"), builder.append_basic_block("head")
            builder.cbranch(builder.icmp_signed(">=", k_, _number(0)), old, head)
            builder.position_at_end(old)
            scale = [_load(builder, pk, builder.add(k_, _number(W * y))) for y in range(vectors)]
            kept = [builder.fmul(_load(builder, pc, place[x][y]), scale[y]) for x in range(rows) for y in range(vectors)]
            builder.branch(head)
            builder.position_at_end(head)
            begin = []
            for value in kept:
                phi = builder.phi(_V)
                phi.add_incoming(_splat(0.0), fresh)
                phi.add_incoming(value, old)
                begin.append(phi)
            t, sums, finish = _loop(builder, count_, begin)
            from_b = builder.add(b_, builder.mul(t, bt_))
            right = [_load(builder, pb, builder.add(from_b, _number(W * y)), kind) for y in range(vectors)]
            from_a, new = builder.add(a_, builder.mul(t, at_)), []
            multiply = _pairs(builder) if half else _fma(builder)
            for x in range(rows):
                left = _spread(builder, builder.load(builder.gep(pa, [builder.add(from_a, builder.mul(_number(x), ax_))])), kind)
                new += [multiply(left, right[y], sums[x * vectors + y]) for y in range(vectors)]
            for i, value in enumerate(finish(new)):
                _store(builder, pc, place[i // vectors][i % vectors], value)
            return context.get_dummy_value()

        return signature, generate

    return run


def by_lanes(fresh: bool) -> Any:
    """Intrinsic: C[c + :] = C[c + :] (0 if `fresh`) times keep[k + :], plus the sum over count >= 1 t of A[a + t * at + :] B[b + shift[s + t] + :],
    lane by lane; `:` is VECTORS vectors."""
    @intrinsic
    def run(typing, A, a, at, B, b, shift, s, C, c, count, keep, k):  # type: ignore[no-untyped-def]
        whole = types.int64

        def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
            A_, a_, at_, B_, b_, shift_, s_, C_, c_, count_, keep_, k_ = args
            pa, pb, ps, pc, pk = (_pointer(context, builder, sig.args[i], x) for i, x in ((0, A_), (3, B_), (5, shift_), (7, C_), (10, keep_)))

            def side_by_side(pointer, at):  # type: ignore[no-untyped-def]
                return [_load(builder, pointer, builder.add(at, _number(W * y))) for y in range(VECTORS)]

            begin = [_splat(0.0)] * VECTORS
            if not fresh:
                begin = [builder.fmul(x, y) for x, y in zip(side_by_side(pc, c_), side_by_side(pk, k_), strict=True)]
            t, sums, finish = _loop(builder, count_, begin)
            left = side_by_side(pa, builder.add(a_, builder.mul(t, at_)))
            right = side_by_side(pb, builder.add(b_, builder.load(builder.gep(ps, [builder.add(s_, t)]))))
            multiply = _fma(builder)
            for y, value in enumerate(finish([multiply(*three) for three in zip(left, right, sums, strict=True)])):
                _store(builder, pc, builder.add(c_, _number(W * y)), value)
            return context.get_dummy_value()

        return types.void(A, whole, whole, B, whole, shift, whole, C, whole, whole, keep, whole), generate

    return run


def _exp2(builder, x):  # type: ignore[no-untyped-def]
    """2^x for x <= 0: 0 below -126.5, NaN for NaN. x is split into a whole number, which becomes the exponent, and a rest."""
    fma, magic = _fma(builder), _splat(12582912.0)                     # 1.5 * 2^23: adding it rounds to whole numbers
    x = builder.select(builder.fcmp_ordered("<", x, _splat(-127.0)), _splat(-127.0), x)
    shifted = builder.fadd(x, magic)
    rest = builder.fsub(x, builder.fsub(shifted, magic))
    value = _splat(EXP2[-1])
    for c in (*EXP2[-2::-1], 1.0):
        value = fma(value, rest, _splat(c))
    exponent = builder.shl(builder.add(builder.bitcast(shifted, _VI), _splat(127, _VI)), _splat(23, _VI))
    return builder.fmul(value, builder.bitcast(exponent, _V))


def maximum(vectors: int) -> Any:
    """Intrinsic: m[:] = max(m[:], the count >= 1 rows of S); S[j, :] at S[s + j * lanes], m at m[at]. NaN is passed over here."""
    @intrinsic
    def run(typing, S, s, lanes, count, m, at):  # type: ignore[no-untyped-def]
        def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
            S_, s_, lanes_, count_, m_, at_ = args
            ps, pm = _pointer(context, builder, sig.args[0], S_), _pointer(context, builder, sig.args[4], m_)
            places = [builder.add(at_, _number(W * y)) for y in range(vectors)]
            j, tops, finish = _loop(builder, count_, [_load(builder, pm, p) for p in places])
            row = builder.add(s_, builder.mul(j, lanes_))
            new = []
            for y in range(vectors):
                x = _load(builder, ps, builder.add(row, _number(W * y)))
                new.append(builder.select(builder.fcmp_ordered(">", x, tops[y]), x, tops[y]))
            for place, value in zip(places, finish(new), strict=True):
                _store(builder, pm, place, value)
            return context.get_dummy_value()

        return types.void(S, types.int64, types.int64, types.int64, m, types.int64), generate

    return run


def exponentials(vectors: int) -> Any:
    """Intrinsic: S[j, :] = 2^(S[j, :] - m[:]) for count >= 1 rows j; total[:] += their sum. m and total at [at]."""
    @intrinsic
    def run(typing, S, s, lanes, count, m, total, at):  # type: ignore[no-untyped-def]
        def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
            S_, s_, lanes_, count_, m_, total_, at_ = args
            ps, pm, pt = (_pointer(context, builder, sig.args[i], x) for i, x in ((0, S_), (4, m_), (5, total_)))
            places = [builder.add(at_, _number(W * y)) for y in range(vectors)]
            tops = [_load(builder, pm, p) for p in places]
            j, sums, finish = _loop(builder, count_, [_load(builder, pt, p) for p in places])
            row, new = builder.add(s_, builder.mul(j, lanes_)), []
            for y in range(vectors):
                place = builder.add(row, _number(W * y))
                e = _exp2(builder, builder.fsub(_load(builder, ps, place), tops[y]))
                _store(builder, ps, place, e)
                new.append(builder.fadd(sums[y], e))
            for place, value in zip(places, finish(new), strict=True):
                _store(builder, pt, place, value)
            return context.get_dummy_value()

        return types.void(S, types.int64, types.int64, types.int64, m, total, types.int64), generate

    return run


def paired_exponentials(vectors: int) -> Any:
    """Intrinsic: as `exponentials` times `scale` inside the power, for count >= 1 pairs of rows, whose results are rounded to bfloat16 and
    stored as pairs in P[j, :] at P[j * lanes + at], uint32; the sums are those of the float32 values."""
    @intrinsic
    def run(typing, S, lanes, count, m, total, at, P, scale):  # type: ignore[no-untyped-def]
        def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
            S_, lanes_, count_, m_, total_, at_, P_, scale_ = args
            ps, pm, pt, pp = (_pointer(context, builder, sig.args[i], x) for i, x in ((0, S_), (3, m_), (4, total_), (6, P_)))
            fma, by = _fma(builder), _spread(builder, scale_, _V)
            places = [builder.add(at_, _number(W * y)) for y in range(vectors)]
            less = [builder.fneg(_load(builder, pm, p)) for p in places]
            j, sums, finish = _loop(builder, count_, [_load(builder, pt, p) for p in places])
            first, new = builder.add(builder.mul(j, builder.mul(lanes_, _number(2))), at_), []
            for y in range(vectors):
                place = builder.add(first, _number(W * y))
                e = [_exp2(builder, fma(_load(builder, ps, p), by, less[y])) for p in (place, builder.add(place, lanes_))]
                up = [builder.add(builder.bitcast(x, _VI), _splat(0x8000, _VI)) for x in e]
                pair = builder.or_(builder.lshr(up[0], _splat(16, _VI)), builder.and_(up[1], _splat(-65536, _VI)))
                _store(builder, pp, builder.add(builder.add(builder.mul(j, lanes_), at_), _number(W * y)), pair)
                new.append(builder.fadd(builder.fadd(sums[y], e[0]), e[1]))
            for place, value in zip(places, finish(new), strict=True):
                _store(builder, pt, place, value)
            return context.get_dummy_value()

        whole = types.int64
        return types.void(S, whole, whole, m, total, whole, P, types.float32), generate

    return run


@intrinsic
def prefetch(typing, x, at):  # type: ignore[no-untyped-def]
    """Ask for the cache line of x[at]; any place may be named."""
    def generate(context, builder, sig, args):  # type: ignore[no-untyped-def]
        place = builder.gep(_pointer(context, builder, sig.args[0], args[0]), [args[1]])
        kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
        f = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(f, [place, ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)])     # to read, keep, data
        return context.get_dummy_value()

    return types.void(x, types.int64), generate
