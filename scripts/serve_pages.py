"""Times of decoding over pages and of attention to what is left, for docs/structured-attention.md. One thread.

    python scripts/serve_pages.py

Pages: 16 requests that begin with the same 4096 keys and go on with 256 of their own (8 heads on 2, width 64, pages of 16, float32), all read
by each, shared, and each request gathered and given to torch; and the loads of 8 workers with one request of 32768 keys among 15 of 256.
Left: 8 heads, 4096 tokens, a half and a quarter of queries and keys kept; 16 buckets; beside the same kernel on every block.
"""
import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from rarefy.kernels.block_attention import block_attention
from rarefy.kernels.block_attention.irregular import Irregular
from rarefy.kernels.block_attention.paged import Paged, schedule


def milliseconds(call, times=7):
    call()
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        took.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(took)


def pages():
    R, H, G, D, M, shared, own = 16, 8, 2, 64, 16, 4096, 256
    table = torch.cat([torch.arange(shared // M).expand(R, -1), shared // M + torch.arange(R * own // M).view(R, -1)], 1)
    k, v = (torch.randn(int(table.max()) + 1, M, G, D) for _ in range(2))
    q, length = torch.randn(R, H, D), torch.full((R,), shared + own)

    def gathered():
        for r in range(R):
            keys, values = (x[table[r]].flatten(0, 1).transpose(0, 1)[None] for x in (k, v))
            scaled_dot_product_attention(q[r][None, :, None], keys, values, enable_gqa=True)

    for name, share in (("each reads all", False), ("shared", True)):
        made = Paged(table, length, M, share=share)
        took = milliseconds(lambda made=made: made.attend(q, k, v, scale=0.125))
        plan = milliseconds(lambda share=share: Paged(table, length, M, share=share))
        print(f"pages, {name}: {took:.2f} ms a layer, {plan:.2f} ms to plan a step, {made.keys_read()} keys read")
    print(f"pages, gathered and torch: {milliseconds(gathered):.2f} ms a layer")
    pieces = schedule([(0, 0, 32768), *((r, 0, 256) for r in range(1, 16))], 8, 16)
    load = [sum(p.stop - p.start for p in pieces if p.worker == w) for w in range(8)]
    print(f"loads of 8 workers: {min(load)} .. {max(load)} keys, even share {sum(load) / 8:.0f}; uncut the longest is 32768")


def left():
    T, H, D, block = 4096, 8, 64, 64
    q, k, v = (torch.randn(1, H, T, D) for _ in range(3))
    whole = torch.ones(1, 1, T // block, T // block, dtype=torch.bool)
    how = {"block": block, "query_block": block, "scale": 0.125}
    dense = milliseconds(lambda: block_attention(q, k, v, whole, **how), 3)
    tiles = H * (T // block) * (T // block + 1) // 2
    causal = milliseconds(lambda: scaled_dot_product_attention(q, k, v, is_causal=True), 3)
    print(f"left, every block: {dense:.0f} ms, {tiles} tiles; torch, causal: {causal:.0f} ms")

    def kept(share):
        return Irregular.of_kept(*(torch.rand(1, H, T) < share for _ in range(2)), block=block)

    cases = {f"{share:g} kept": lambda share=share: kept(share) for share in (0.5, 0.25)}
    cases["16 buckets"] = lambda: Irregular(*(torch.randint(16, (1, H, T)) for _ in range(2)), block=block)
    for name, make in cases.items():
        made = make()
        took = milliseconds(lambda made=made: made.attend(q, k, v, scale=0.125), 3)
        print(f"left, {name}: {took:.0f} ms, {made.tiles()} tiles ({made.tiles() / tiles:.3f}), {milliseconds(make, 3):.0f} ms to make")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pages()
    left()


if __name__ == "__main__":
    main()
