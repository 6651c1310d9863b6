"""Small wrongs to put into the source, and the tests that must turn red."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """One change of one file."""

    file: str
    """Below src/rarefy."""
    old: str
    """Occurs exactly once."""
    new: str
    tests: str
    """Arguments to pytest, of which at least one test must fail."""


CONTRACT = "tests/contract/test_contract.py"
MUTATIONS = {
    "n:m keeps one more": Mutation(
        "selection.py", "groups.topk(n, -1)", "groups.topk(min(n + 1, m), -1)", "tests/test_selection.py -k n_of_m"),
    "batch top-k forgets to round": Mutation(
        "selection.py", "min(scores.numel(), round(k * ", "min(scores.numel(), int(k * ", "tests/test_selection.py -k batch_top_k"),
    "threshold takes equals": Mutation("selection.py", "mask_=scores > tau)", "mask_=scores >= tau)", "tests/test_selection.py -k strict"),
    "kept rounds down": Mutation("selection.py", "max(1, round(budget * n))", "max(1, int(budget * n))", "tests/test_selection.py -k kept"),
    "sparsemax off by one": Mutation(
        "selection.py", "tau = (total.gather(-1, size - 1) - 1) / size", "tau = (total.gather(-1, size - 1) - 1) / (size + 1)",
        "tests/test_selection.py -k simplex"),
    "inf passes": Mutation(
        "selection.py", "not torch.isfinite(x).all()", "torch.isnan(x).any()", "tests/test_selection.py -k check_finite"),
    "random reads the scores": Mutation(
        "selection.py", "index = lottery.topk", "index = (lottery + scores).topk", "tests/test_selection.py -k random_k"),
    "theta's gradient has the wrong sign": Mutation(
        "surrogate.py", "grad_theta = (-(theta / ctx.bandwidth)", "grad_theta = ((theta / ctx.bandwidth)", "tests/test_surrogate.py"),
    "kernel twice as wide": Mutation(
        "surrogate.py", "near = ((pre - theta).abs() < ctx.bandwidth / 2).to(grad)\n        grad_theta = -(1",
        "near = ((pre - theta).abs() < ctx.bandwidth).to(grad)\n        grad_theta = -(1", "tests/test_surrogate.py"),
    "defaults are forgotten": Mutation("method.py", "bound.apply_defaults()", "pass", "tests/test_method.py -k outermost"),
    "True is a whole number": Mutation("method.py", " or isinstance(value, bool) or value < 1", " or value < 1", "tests/test_method.py -k positive"),
    "the auxiliary loss is detached": Mutation(
        "latents/topk.py", "mse_loss(e_hat_BE.to(error_BE.dtype), error_BE)",
        "mse_loss(e_hat_BE.to(error_BE.dtype).detach() + 0 * e_hat_BE.to(error_BE.dtype), error_BE)", f"{CONTRACT} -k 'topk and M3b'"),
    "one latent more": Mutation(
        "latents/topk.py", "self.W_enc_FD, self.b_enc_F, self.k, self.centre_D)",
        "self.W_enc_FD, self.b_enc_F, min(self.k + 1, self.width), self.centre_D)", f"{CONTRACT} -k 'latents/topk-L'"),
    "the threshold does not follow": Mutation("latents/batch_topk.py", "self.seen += 1", "self.tau.zero_()", f"{CONTRACT} -k 'batch_topk-L4'"),
    "input scale not undone": Mutation(
        "latents/dictionary.py", "return y / self.scale_out.to(y.dtype)", "return y", f"{CONTRACT} -k 'latents/topk-L2'"),
    "mask upside down": Mutation(
        "weights/linear.py", "return self.weight_OI * self.mask_OI", "return self.weight_OI * ~self.mask_OI", f"{CONTRACT} -k 'weights and L1'"),
    "Wanda without the root": Mutation("weights/wanda.py", "self.square_I.sqrt().float()", "self.square_I.float()", "tests/test_weights.py"),
    "Wanda unfitted": Mutation("weights/wanda.py", "if not self.finished:", "if False:", f"{CONTRACT} -k 'wanda and C11'"),
    "TEAL keeps the small": Mutation(
        "neurons/calibrated.py", "self.scores(x.detach()) > self.tau)", "self.scores(x.detach()) < self.tau)",
        f"{CONTRACT} -k 'teal and L'"),
    "WINA without the weights": Mutation("neurons/wina.py", "* wide(self.norm_I)", "* 1", "tests/test_neurons.py"),
    "NaN reaches the histogram": Mutation(
        "neurons/calibrated.py", 'check_finite(x, f"{self.name} calibration rows")', "pass", f"{CONTRACT} -k 'teal and C6'"),
    "the future is visible": Mutation(
        "attention/block.py", "score = score.masked_fill(n > own_Q[:, None], -torch.inf)", "pass", f"{CONTRACT} -k 'attention'"),
    "a linear stays in the model": Mutation("site.py", "            setattr(owner, leaf, old)", "            pass", f"{CONTRACT} -k 'wanda-L8'"),
    "hooks stay in the model": Mutation(
        "site.py", "    finally:\n        for handle in handles:\n            handle.remove()\n        for", "    finally:\n        for",
        f"{CONTRACT} -k 'topk-L8'"),
    "a checkpoint's tensors are not synced": Mutation(
        "store/checkpoint.py", "            fs.sync(part / TENSORS)\n", "", "tests/crash/test_checkpoint_power.py"),
    "a rename is not synced": Mutation("store/checkpoint.py", "            fs.sync_dir(root)\n", "", "tests/crash/test_checkpoint_power.py"),
    "the window is one key longer": Mutation(
        "attention/window.py", "(q - k < keep - first)", "(q - k <= keep - first)", "tests/test_attention.py -k window_and_sinks_by_hand"),
    "a saved method is not compared": Mutation(
        "store/methods.py", "    if problems:\n", "    if False:\n", f"{CONTRACT} -k 'wanda-C2'"),
    "top-k keeps one less": Mutation(
        "selection.py", "weight, index = scores.topk(k, dim=-1, sorted=False)", "weight, index = scores.topk(max(1, k - 1), dim=-1, sorted=False)",
        "tests/test_selection.py -k top_k"),
    "the encoder keeps one less": Mutation(
        "kernels/sparse_encode/__init__.py", "(*_screened(x, w, b, k, coarse), None)", "(*_screened(x, w, b, k - 1 or 1, coarse), None)",
        "tests/numerics/test_sparse_decode.py -k encode"),
    "the encoder learns nothing": Mutation(
        "kernels/sparse_encode/__init__.py", "scatter_rows(grad_M, ctx.routes, x_ND) if needs[2] else None", "None",
        "tests/numerics/test_sparse_decode.py -k encode"),
    "the encoder passes nothing back": Mutation(
        "kernels/sparse_encode/__init__.py", "bag(grad_M, ctx.routes, weight_FD) if needs[0] else None", "None",
        "tests/numerics/test_sparse_decode.py -k encode"),
    "the decoder's table learns from the wrong rows": Mutation(
        "kernels/sparse_decode/cpu.py", "            value = value_M[m]", "            value = value_M[at]",
        "tests/numerics/test_sparse_decode.py -k decode_equals"),
    "the screen trusts bfloat16": Mutation(
        "kernels/sparse_encode/screen.py", "        if not coarse:", "        if False:", "tests/numerics/test_top_k.py -k screened_product"),
    "minus zero is below zero": Mutation(
        "kernels/top_k/cpu.py", "floor = small(-1) if floor == 0 else floor", "floor = floor", "tests/numerics/test_top_k.py -k equals"),
    "memory in use is handed out again": Mutation(
        "kernels/pool.py", "and _is_free(buffer)", "and True", "tests/numerics/test_top_k.py -k pooled"),
    "neurons drop what they keep": Mutation(
        "neurons/linear.py", "kept_NI = self.select(x).mask.flatten(0, -2) if", "kept_NI = ~self.select(x).mask.flatten(0, -2) if",
        f"{CONTRACT} -k 'neurons and L1'"),
    "CE increase has the wrong sign": Mutation(
        "frontier.py", 'ce_N - cross_entropy(dense_NV, target_N, reduction="none")', 'cross_entropy(dense_NV, target_N, reduction="none") - ce_N',
        "tests/test_frontier.py -k by_hand"),
    "KL has the wrong sign": Mutation(
        "frontier.py", "log_target=True).sum(-1)", "log_target=True).sum(-1).neg()", "tests/test_frontier.py -k by_hand"),
    "KL is taken the other way round": Mutation(
        "frontier.py", "kl_div(log_NV, dense_NV,", "kl_div(dense_NV, log_NV,", "tests/test_frontier.py -k by_hand"),
    "attention stays in the model's config": Mutation(
        "attach.py", "            config._attn_implementation_internal = before[i]", "            pass",
        "tests/test_site_attention.py -k exceptions"),
    "a shard's data is not synced": Mutation(
        "store/writer.py", "        self._fs.sync(data_path(self.root, shard))\n", "", "tests/crash/test_store_power.py -k synced"),
    "a shard's names are not synced": Mutation(
        "store/writer.py", 'fs.write(index_path(self.root, shard), b"")\n                fs.sync_dir(self.root)',
        'fs.write(index_path(self.root, shard), b"")', "tests/crash/test_store_power.py -k synced"),
    "a full shard is not synced": Mutation(
        "store/writer.py", "            if not rows % layout.shard_rows:\n                self._sync(shard)\n", "",
        "tests/crash/test_store_power.py -k synced"),
    "rows are acknowledged before they are written": Mutation(
        "store/writer.py", "            fs.append(data_path(self.root, shard), piece)\n"
        "            fs.append(index_path(self.root, shard), self._records(shard, inside, piece, take, at + take == count))",
        "            fs.append(index_path(self.root, shard), self._records(shard, inside, piece, take, at + take == count))\n"
        "            fs.append(data_path(self.root, shard), piece)", "tests/crash/test_shards_kill.py -k every_operation"),
    "half an append counts": Mutation(
        "store/writer.py", "commits and at == take", "at == take", "tests/crash/test_shards_kill.py -k every_operation"),
    "what a power cut left is taken for damage": Mutation(
        "store/writer.py", "                trim(self.root, self._layout, fs)", "                pass", "tests/crash/test_store_power.py -k synced"),
    "a power cut's rows are believed": Mutation(
        "store/recover.py", "            if xxhash.xxh3_128_intdigest(data) != _sum(words[b - 1]):", "            if False:",
        "tests/crash/test_store_power.py -k synced"),
    "a block's checksum is not looked at": Mutation(
        "store/shards.py", "if xxhash.xxh3_128_intdigest(data) != int(index.sums", "if False and int(index.sums",
        "tests/fuzz/test_store_roundtrip.py -k flipped"),
    "a shard's header is not looked at": Mutation(
        "store/shards.py", "if os.pread(fd, HEADER, 0) != self._layout.header(shard):", "if False:", "tests/fuzz/test_store_roundtrip.py -k flipped"),
    "a seal is not looked at": Mutation(
        "store/sealed.py", "if xxhash.xxh3_128_hexdigest(body).encode() != tail[1]:", "if False:", "tests/fuzz/test_store_roundtrip.py -k flipped"),
    "a log line's seal is not looked at": Mutation(
        "store/lines.py", "if xxhash.xxh3_64_hexdigest(body).encode() != seal[1]:", "if False:", "tests/security/test_check.py -k newline"),
    "a log's line is not synced": Mutation(
        "store/lines.py", "        fs.sync(path)\n", "", "tests/crash/test_store_power.py -k lines_of_a_log"),
    "a page's seal is not looked at": Mutation(
        "store/sealed.py", "+ page[found.end() + 1 :]).encode() != found[1]:", "+ page[found.end() + 1 :]).encode() == b'':",
        "tests/security/test_check.py -k damaged_byte"),
    "links out of a store are followed": Mutation(
        "store/shards.py", "open_regular(path, follow=False)", "open_regular(path)", "tests/security/test_store_attacks.py -k links"),
    "a pipe is waited for": Mutation(
        "store/fs.py", '    if not stat.S_ISREG(found.st_mode):', '    if False:', "tests/security/test_check.py -k no_file"),
    "an epoch repeats rows": Mutation(
        "store/permutation.py", "        out[outside] = _feistel(out[outside], half, keys)", "        out[outside] %= np.uint64(n)",
        "tests/fuzz/test_store_roundtrip.py -k permutation"),
    "two writers share a folder": Mutation(
        "store/lock.py", "        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)", "        pass",
        "tests/crash/test_checkpoint_kill.py -k second_process"),
    "a renamed store is taken": Mutation(
        "store/layout.py", "(_NAME.fullmatch(root.name) and root.name != name)", "False", "tests/fuzz/test_store_roundtrip.py -k name_binds"),
    "resuming forgets the generator": Mutation(
        "fit.py", '    torch.set_rng_state(tensors["rng/torch"])\n', "", "tests/test_fit.py -k random_numbers"),
    "another run's checkpoint is taken up": Mutation(
        "fit.py", "            if different:\n", "            if False:\n", "tests/test_fit.py -k 'refused_and_shown'"),
    "any host is answered": Mutation(
        "ui/server.py", "if not host or (self.hosts and host not in self.hosts):", "if not host:", "tests/security/test_server.py -k other_hosts"),
    "any token opens": Mutation(
        "ui/server.py", 'return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode("utf-8"))', "return bool(given)",
        "tests/security/test_server.py -k token"),
    "another site may read": Mutation(
        "ui/server.py", "if origin is not None and urlsplit(origin).netloc != named[0]:", "if False:", "tests/security/test_server.py -k own_origin"),
    "a token closes the data block": Mutation(
        "ui/export.py", '.replace("<", "\\\\u003c")', "", "tests/ui/test_page.py -k cannot_be_left"),
    "weights may lie anywhere": Mutation(
        "hub.py", "not isinstance(name, str) or not _SHARD.fullmatch(name)", "not isinstance(name, str)", "tests/test_hub.py"),
    "the rate does not fall": Mutation(
        "learner.py", "return rise * (min(1.0, (self.steps - step) / tail) if tail else 1.0)", "return rise",
        "tests/test_fit.py -k loop_written_out"),
    "gradients are not clipped": Mutation("learner.py", "if clip and self._norm > clip:", "if False:", "tests/test_fit.py -k loop_written_out"),
    "idle rows of the pieces are not added": Mutation(
        "learner.py", "if name in self.method.row_counters:", "if False:", "tests/test_fit.py -k pieces"),
    "a lost step is not undone": Mutation(
        "fit.py", "                learner.undo()\n", "                pass\n", "tests/test_fit.py -k before_any_has_moved"),
    "a NaN gradient passes": Mutation("learner.py", "if not math.isfinite(self._norm):", "if False:", "tests/test_fit.py -k before_any_has_moved"),
    "infinite weights are saved": Mutation("learner.py", "if not bool(torch.isfinite(p).all()):", "if False:", "tests/test_fit.py -k never_saved"),
    "moments are not taken up": Mutation(
        "learner.py", "            self.optimiser.state[p][k] = tensors[key].to(p.device, copy=True)", "            pass",
        "tests/test_fit.py -k same_bits"),
    "random state is not taken up": Mutation(
        "fit.py", '    torch.set_rng_state(tensors["rng/torch"])\n', "", "tests/test_fit.py -k draws_random"),
    "training takes no lock": Mutation(
        "fit.py", 'held.enter_context(RunLock(run / "checkpoints"))', "pass", "tests/test_fit.py -k being_trained_in"),
    "a signal is not agreed on": Mutation(
        "world.py", "stop.agreed = signum", "stop.agreed = stop.seen", "tests/test_fit_parallel.py -k signal_to_one"),
    "gradients are not averaged": Mutation(
        "learner.py", "            world.mean_(p.grad for p in self.parameters if p.grad is not None)\n", "",
        "tests/test_fit_parallel.py -k test_two_processes_train_as_one"),
    "one process's error is its own": Mutation(
        "world.py", "most(rank + 1 if failed else 0,", "most(0,", "tests/test_fit_parallel.py -k test_a_loss_that_is_nan"),
    "layers do not see fitted layers": Mutation(
        "fit.py", "            done[name] = plan[name]\n", "            pass\n", "tests/test_calibrate.py -k fitted_layers_before"),
    "padding is shown": Mutation(
        "fit.py", "mask.bool() if mask is not None and mask.ndim == 2 else None", "None", "tests/test_calibrate.py -k padding"),
    "the model of a stream is not named": Mutation("streams.py", '"model": _digest(held), ', "", "tests/test_fit.py -k another_model"),
}
