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
        "latents/topk.py", "return self.aux_alpha * self.error(e_hat_BE, error_BE)",
        "return self.aux_alpha * self.error(e_hat_BE, error_BE) + 0 * self.error(e_hat_BE.detach(), error_BE) - self.aux_alpha"
        " * (self.error(e_hat_BE, error_BE) - self.error(e_hat_BE, error_BE).detach())", f"{CONTRACT} -k 'topk and M3b'"),
    "one latent more": Mutation(
        "latents/topk.py", "self.W_enc_FD, self.b_enc_F, self.k)", "self.W_enc_FD, self.b_enc_F, min(self.k + 1, self.width))[:2]",
        f"{CONTRACT} -k 'latents/topk-L'"),
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
        "attention/window.py", "(q - k < keep - first)", "(q - k <= keep - first)", f"{CONTRACT} -k 'window and L4'"),
    "a saved method is not compared": Mutation(
        "store/methods.py", "    if problems:\n", "    if False:\n", f"{CONTRACT} -k 'wanda-C2'"),
}
