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
    "entmax forgets that alpha moves the threshold": Mutation(
        "maps/entmax.py", "by_e = (grad * (g - share * g.sum(-1, keepdim=True)))", "by_e = (grad * g)",
        "tests/maps/test_entmax.py -k gradient_in_alpha"),
    "entmax looks at too few scores": Mutation(
        "maps/entmax_rows.py", "top - 1.0 / e if", "top - 0.5 / e if", "tests/maps/test_entmax.py -k long_rows"),
    "entmax slope of softmax": Mutation(
        "maps/entmax.py", "s = torch.where(there, safe ** (1 - e), 0)", "s = torch.where(there, safe, 0)",
        "tests/maps/test_entmax.py -k gradient_in_scores"),
    "ranked attention keeps every equal score": Mutation(
        "kernels/block_attention/ranked_loops.py", "level = key == least and rest > 0", "level = key == least",
        "tests/attention/test_token_choice.py -k ranked_attention_is"),
    "top-p stops one early": Mutation(
        "kernels/block_attention/reach_loops.py", "                    if ahead > limit:", "                    if ahead >= limit:",
        "tests/attention/test_token_choice.py -k reach_by_sorting"),
    "listed pairs are counted in the rest too": Mutation(
        "attention/patterns/lists.py", "new = ~rest.holds(q, k, scene).expand(q.shape)", "new = torch.ones_like(q, dtype=torch.bool)",
        "tests/attention/test_patterns_lists.py -k two_parts"),
    "a step keeps the blocks of other tables": Mutation(
        "attention/patterns/pattern.py", "((here, above.length),) or self.reads():", "((here, above.length),):",
        "tests/attention/test_patterns_step.py -k bound_labels"),
    "statistics over masked scores": Mutation(
        "maps/top.py", "count = there.sum(-1, keepdim=True).clamp_min(1)", "count = torch.tensor(x.shape[-1])",
        "tests/maps/test_other_maps.py -k seen_scores"),
    "mapped attention sees ahead": Mutation(
        "attention/mapped/base.py", "if first is not None:", "if False:", "tests/attention/test_mapped.py -k query_by_query"),
    "gaps spread evenly": Mutation(
        "tasks/recall.py", "double().log() * (power - 1)", "double().log() * 0", "tests/test_tasks_attention.py -k power_law"),
    "distance to the first place": Mutation(
        "tasks/recall.py", "torch.where(same & (place < at_A[:, None]), place, 0).amax(1)",
        "torch.where(same & (place < at_A[:, None]), place, 1 << 30).amin(1)", "tests/test_tasks_attention.py -k distances_and_the_gap"),
    "retrieval looks from the answer": Mutation(
        "tasks/retrieval_heads.py", "most_LBHT[:, row_A, :, at_A - 1]", "most_LBHT[:, row_A, :, at_A]",
        "tests/test_tasks_attention.py -k looked_up_by_each_head"),
    "a task counts as kept by its mean": Mutation(
        "jobs/attention_suite_findings.py", 'max(point.metrics["loss"].high, point.metrics["loss"].mean)', 'point.metrics["loss"].mean',
        "tests/test_attention_suite.py -k interval_counts"),
    "least density past a gap": Mutation(
        "jobs/attention_suite_findings.py", "        if not kept:\n            break\n", "        if not kept:\n            continue\n",
        "tests/test_attention_suite.py -k above_which_nothing"),
    "a question asked again has another answer": Mutation(
        "tasks/recall.py", "task.input_ids.gather(1, at_BK)]", "task.input_ids.gather(1, at_BK.flip(1))]",
        "tests/test_recall_long.py -k asked_again"),
    "no rotation is slowed": Mutation(
        "tasks/recall_long.py", '"factor": longest / CONTEXT', '"factor": 1.0', "tests/test_recall_long.py -k slow_rotations"),
    "a pattern never fits a budget": Mutation(
        "jobs/attention_suite_findings.py", "if p.density <= OVER * level and (", "if c.budget <= OVER * level and (",
        "tests/test_attention_suite.py -k keeps_more"),
    "what the dense model cannot do counts as kept": Mutation(
        "jobs/attention_suite_findings.py", "mean >= 2 * MARGIN}", "mean >= 0 * MARGIN}", "tests/test_attention_suite.py -k dense_model_cannot"),
    "a fit serves another budget": Mutation(
        "jobs/attention_suite_methods.py", "key = one.name, budget, id(sitting)", "key = one.name, 0.0, id(sitting)",
        "tests/test_attention_suite.py -k shared_by_the_phases"),
    "a pattern's work is counted in one layer": Mutation(
        "jobs/attention_suite_methods.py", 'sites(sitting.model, "layers.*.attn"), made)', '["layers.*.attn"], made)',
        "tests/test_attention_suite.py -k work_is_counted"),
    "sparser with length is denser": Mutation(
        "jobs/attention_suite_findings.py", "(falls if far < near else rises)", "(rises if far < near else falls)",
        "tests/test_recall_long.py -k least_density"),
    "decoding goes on with the cache that is kept": Mutation(
        "jobs/attention_suite_run.py", "return copy.deepcopy(sitting.prefixes[at])", "return sitting.prefixes[at]",
        "tests/test_recall_long.py -k read_once"),
    "the longest length that fits is left out": Mutation(
        "jobs/attention_suite.py", "for n in request.lengths if n > longest}", "for n in request.lengths if n >= longest}",
        "tests/test_recall_long.py -k left_out"),
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
        "latents/topk.py", "self.strongest(rows, self.keeps)", "self.strongest(rows, min(self.keeps + 1, self.width))",
        f"{CONTRACT} -k 'latents/topk-L'"),
    "signs are not looked past": Mutation(
        "latents/abs_topk.py", "absolute = True", "absolute = False", "tests/test_latents_selections.py -k abs_topk"),
    "a negative latent is dead": Mutation(
        "selection.py", "on = self.weight != 0", "on = self.weight > 0", "tests/test_latents_selections.py -k negative"),
    "screened sizes keep their sign": Mutation(
        "kernels/sparse_encode/screen.py", "key_C[i] = abs(key_C[i])", "pass", "tests/numerics/test_signed_top_k.py"),
    "a group gives its smallest": Mutation(
        "kernels/sparse_encode/__init__.py", "(groups, -1)).max(-1)", "(groups, -1)).min(-1)", "tests/test_latents_selections.py -k group_max"),
    "norms of the decoder do not rank": Mutation(
        "latents/annealed_topk.py", "norm_G = self.W_dec_FD.detach().norm(dim=-1)", "norm_G = torch.ones_like(self.b_enc_F)",
        "tests/test_latents_selections.py -k rescaling"),
    "k falls too late": Mutation(
        "latents/annealing.py", "(k - begin) * done / steps)", "(k - begin) * done / (steps + 1))", "tests/test_latents_selections.py -k line"),
    "an adapter's pull is not shared out over its runs": Mutation(
        "latents/adapters.py", "self.y_ND - runs * self.pull_ND", "self.y_ND - self.pull_ND", "tests/test_latents_adapters.py -k through_the_hybrid"),
    "branches are not pulled through later ones": Mutation(
        "latents/adapters.py", "return y_ND + leaf_ND", "return y_ND.detach() + leaf_ND", "tests/test_latents_adapters.py -k through_the_hybrid"),
    "latents held at zero are not": Mutation(
        "latents/adapters.py", "else gone[n][chosen.index], 0)", "else ~gone[n][chosen.index], 0)", "tests/test_latents_adapters.py -k switched_off"),
    "edges forget biases of attention": Mutation(
        "circuits/transcoder_edges.py", "bias = (u_SGC * own.b_V_GC).sum() + (u_TD", "bias = (u_TD", "tests/test_circuit_edges.py -k sum_to_the_pre"),
    "heads are dealt to the wrong values": Mutation(
        "circuits/transcoder_edges.py", "u_SHC.unflatten(1, (own.W_V_GCD.shape[0], -1)).sum(2)",
        "u_SHC.unflatten(1, (-1, own.W_V_GCD.shape[0])).sum(1)", "tests/test_circuit_edges.py -k value_times_gradient"),
    "errors are what latents write": Mutation(
        "circuits/transcoder_edges.py", "_writes(transcoder).to(self.embedding_TD) - always_D", "_writes(transcoder).to(self.embedding_TD)",
        "tests/test_circuit_edges.py -k value_times_gradient"),
    "a path goes on from a latent with its value": Mutation(
        "circuits/transcoder_edges.py", "return _Open(steps, gives * trace.asks(n, edge.index, path.token)",
        "return _Open(steps, edge.value * trace.asks(n, edge.index, path.token)", "tests/test_circuit_edges.py -k all_paths"),
    "a head's path keeps the reader's token": Mutation(
        "circuits/transcoder_edges.py", "u_HD[edge.index], edge.token, n, n)", "u_HD[edge.index], path.token, n, n)",
        "tests/test_circuit_edges.py -k sources_sum"),
    "top-AFA stops before the target": Mutation(
        "latents/top_afa.py", ".abs().argmin(-1) + 1", ".clamp_max(0).abs().argmin(-1) + 1", "tests/test_latents_selections.py -k afa"),
    "gradients are not looked at": Mutation(
        "latents/gradient_topk.py", "value=self.beta), self.k))", "value=0.0), self.k))", "tests/test_latents_selections.py -k drive"),
    "a gradient of other rows": Mutation(
        "gradient_stream.py", "logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:]", "logits_BTV[:, 1:].flatten(0, 1), ids_BT[:, :-1]",
        "tests/test_latents_selections.py -k gradient_stream"),
    "alpha is forgotten": Mutation(
        "latents/k_sparse.py", "return round(self.alpha * self.k)", "return self.k", "tests/test_latents_selections.py -k k_sparse"),
    "a threshold one too low": Mutation(
        "latents/convert.py", "_between(made, rows, fire)", "_between(made, rows, fire + 1)", "tests/test_latents_selections.py -k fires"),
    "prefixes one latent longer": Mutation(
        "latents/matryoshka.py", "self.prefix_L, right=True", "self.prefix_L, right=False", "tests/test_latents_objectives.py -k matryoshka"),
    "reverse weights the wrong way round": Mutation(
        "latents/nested_topk.py", "torch.arange(n, 0, -1)", "torch.arange(1, n + 1)", "tests/test_latents_objectives.py -k nested_topk"),
    "those that fire often are asked to help": Mutation(
        "latents/mutual_choice.py", "rate_F < self.slack", "rate_F > self.slack", "tests/test_latents_objectives.py -k mutual_choice"),
    "a column keeps one row more": Mutation(
        "latents/feature_choice.py", "[:, None] < count_F[at_G]", "[:, None] <= count_F[at_G]",
        "tests/test_latents_objectives.py -k 'columns or feature_choice'"),
    "Zipf's rates without the cap": Mutation(
        "latents/zipf.py", "(k - torch.arange(width)) / tail_F", "k / tail_F", "tests/test_latents_objectives.py -k zipf"),
    "pursuit forgets that a row is taken out": Mutation(
        "latents/matching_pursuit.py", "along_B1 * left_BD - value_B1 * grad_BD", "along_B1 * left_BD",
        "tests/test_latents_objectives.py -k pursuit"),
    "archetypes leave the hull": Mutation(
        "latents/archetypal.py", ".clamp_max(1))", ".clamp(1, 1))", "tests/test_latents_objectives.py -k archetypal"),
    "agreement is paid for": Mutation(
        "latents/mutual_feature.py", "self.alpha * (1 - alike)", "self.alpha * alike", "tests/test_latents_objectives.py -k mutual_feature"),
    "the price does not follow p": Mutation(
        "latents/p_annealing.py", "torch.where(new > 0, _power(paid_BF, now) / new, 1.0)", "1.0", "tests/test_latents_objectives.py -k p_annealed"),
    "no warm-up": Mutation("latents/penalised.py", "int(self.steps) / self.warmup)", "1.0)", "tests/test_latents_objectives.py -k warm_up"),
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
        "attention/block.py", "score = score_BHQN.masked_fill(n > own_Q[:, None], -torch.inf)", "score = score_BHQN", f"{CONTRACT} -k 'attention'"),
    "a linear stays in the model": Mutation("site.py", "            swap.leave()", "            pass", f"{CONTRACT} -k 'wanda-L8'"),
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
        "kernels/sparse_encode/__init__.py", "(*_screened(x, w, b, k, coarse, absolute), None)",
        "(*_screened(x, w, b, k - 1 or 1, coarse, absolute), None)",
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
    "tiles of the mask's second half": Mutation(
        "kernels/block_attention/forward.py", "if tiles_PMR[number, j, row + r] else", "if tiles_PMR[number, j, r] else",
        "tests/numerics/test_block_attention_compiled.py -k output_and_lse"),
    "compiled attention sees a key ahead": Mutation(
        "kernels/block_attention/forward.py", "first_key + j - first_query)", "first_key + j - first_query - 1)",
        "tests/numerics/test_block_attention_compiled.py -k output_and_lse"),
    "an odd key pairs with what lay there": Mutation(
        "kernels/block_attention/forward_half.py", "if keys % 2:", "if False:", "tests/numerics/test_block_attention_compiled.py -k output_and_lse"),
    "attention backward forgets the mean": Mutation(
        "kernels/block_attention/backward.py", "(dP[j * lanes + r] - delta[r])", "dP[j * lanes + r]",
        "tests/numerics/test_block_attention_compiled.py -k gradients"),
    "listed keys' weights in another base": Mutation(
        "kernels/block_attention/loops.py", "more[place] * _LOG2E if biased", "more[place] if biased",
        "tests/numerics/test_block_attention_compiled.py -k listed_tokens"),
    "tiles that the diagonal cuts are counted whole": Mutation(
        "kernels/block_attention/pairs.py", "clean = blocks & ~cut_QN", "clean = blocks", "tests/numerics/test_block_attention_masks.py -k density"),
    "summaries are described in pages of another size": Mutation(
        "attention/block.py", "self.describe, self.block)", "self.describe, 1)", "tests/attention/test_dynamic.py -k summaries"),
    "strips of bounds begin at the wrong query": Mutation(
        "attention/quest.py", "at * rows - (S - T) % rows", "at * rows", "tests/attention/test_model_speed.py -k strips"),
    "a step counts its short last block as whole": Mutation(
        "attention/block.py", "(mask_BHQN[..., -1].sum()) * short", "(mask_BHQN[..., -1].sum()) * 0",
        "tests/attention/test_model_speed.py -k counts"),
    "a step leaves out its own block": Mutation(
        "attention/block.py", "score[..., -1] = torch.inf", "score[..., -1] = score[..., -1]", "tests/attention/test_model_speed.py -k step"),
    "bad values of earlier steps go through": Mutation(
        "attention/block.py", "self._refuse_values(out, v_BGSD, layer)", "pass", "tests/attention/test_model_speed.py -k refused"),
    "levels leave out their own mass": Mutation(
        "attention/dynamic/rules.py", "tail = mass.gather(-1, order).flip(-1).cumsum(-1).flip(-1)", "tail = mass.gather(-1, order)",
        "tests/attention/test_dynamic.py -k tail_levels"),
    "labels are the least channels": Mutation(
        "attention/dynamic/double_sparsity.py", "best = score_GD.topk(kept(self.channels, score_GD.shape[-1]), -1)",
        "best = score_GD.topk(kept(self.channels, score_GD.shape[-1]), -1, largest=False)", "tests/attention/test_dynamic.py -k double"),
    "slashes count from the wrong end": Mutation(
        "attention/dynamic/vertical_slash.py", "back_PS = (torch.arange(S - P, S, device", "back_PS = (torch.arange(S - P + 1, S + 1, device",
        "tests/attention/test_dynamic.py -k slash"),
    "calibration sees padding": Mutation("observing.py", "x[b : b + 1, :, real_S] for x", "x[b : b + 1] for x",
        "tests/attention/test_dynamic.py -k real_tokens"),
    "attention stays in the model's config": Mutation(
        "attach.py", "                config._attn_implementation_internal = self.before[i]", "                pass",
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
    "infinite weights are saved": Mutation(
        "learner.py", 'if not bool(torch.isfinite(tensors[f"{self.name}/method/{name}"]).all()):', "if False:", "tests/test_fit.py -k never_saved"),
    "every shard's candidate is kept": Mutation(
        "latents/sharded.py", "return torch.where(ours, weight_BK, weight_BK.new_zeros(())), unit_BK", "return weight_BK, unit_BK",
        "tests/test_fit_sharded.py -k as_one"),
    "b_dec learns from one shard": Mutation(
        "learner.py", "p.grad = self.shards.total(p.grad)", "pass", "tests/test_fit_sharded.py -k as_one"),
    "a run of discs turns without an end": Mutation(
        "tasks/othello.py", "((end_N == 1) & (length_N < size - 1))", "(length_N < size)", "tests/test_tasks_othello.py -k 'rules and 4'"),
    "latents vote whatever their precision": Mutation(
        "tasks/board_state.py", "(true_HGC >= PRECISE * fired_HG[..., None]) & ", "", "tests/test_tasks_othello.py -k reconstruction"),
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
    "the linear error stays in beside the nonlinear": Mutation(
        "jobs/judge_error.py", "[:, SKIP:] + linear_BTE", "[:, SKIP:] + 0 * linear_BTE", "tests/test_judge_error.py -k by_hand"),
    "error maps are fitted on what they are measured on": Mutation(
        "jobs/judge_error.py", "error_maps(*_rows(judge.model, fit, ", "error_maps(*_rows(judge.model, judge.batches, ",
        "tests/test_judge_error.py -k by_hand"),
    "positions are grouped from the wrong end of a doubling": Mutation(
        "jobs/judge_error.py", "place_N.log2().floor()", "place_N.log2().ceil()", "tests/test_judge_error.py -k position"),
    "thresholds of use run ahead of training": Mutation(
        "latents/feature_choice.py", "self.tau.lerp(edge_F, 1 - self.momentum)", "self.tau.lerp(edge_F, self.momentum)",
        "tests/test_latents_oracles.py -k feature_choice"),
    "a child comes without its parent": Mutation(
        "tasks/planted_kinds.py", "child = (on_NP & some_NP)[..., None]", "child = some_NP[..., None]",
        "tests/test_tasks_latents.py -k with_its_parent"),
    "a latent is shared by decoder alone": Mutation(
        "tasks/stability.py", "there_G & (match_G == same_G) & ", "there_G & ", "tests/test_tasks_latents.py -k both_matches"),
    "the error's norm is not squared": Mutation(
        "tasks/dark_matter.py", "square_N1 = error_ND.pow(2).sum(1, keepdim=True)", "square_N1 = error_ND.abs().sum(1, keepdim=True)",
        "tests/test_tasks_latents.py -k no_linear_map_sees"),
    "being off costs no bits": Mutation(
        "tasks/description.py", "share = torch.cat([count, off_G]) / codes.n", "share = count / codes.n",
        "tests/test_tasks_latents_description.py -k counting"),
    "bins may be too coarse": Mutation(
        "tasks/description.py", "- before <= allowed", "- before <= 2 * allowed", "tests/test_tasks_latents_description.py -k coarsest"),
    "a silent parent is absorbed by nobody": Mutation(
        "tasks/planted_absorption.py", "(silent_R & instead_R).float()", "silent_R.float()", "tests/test_tasks_latents.py -k folded"),
    "a threshold is judged where it was chosen": Mutation(
        "tasks/recovered.py", "f1(value_NC[1::2] > tau_C, on_NF[1::2, at])", "f1(value_NC[::2] > tau_C, on_NF[::2, at])",
        "tests/test_tasks_latents.py -k other_half"),
    "dead latents are duplicates": Mutation(
        "tasks/geometry.py", "nearest_other(learned.decoder[alive_G])", "nearest_other(learned.decoder)",
        "tests/test_tasks_latents.py -k dead_dense"),
    "columns keep no price": Mutation(
        "tasks/assignment.py", "v[j] -= reached - shortest[j]", "pass", "tests/test_tasks_latents.py -k ways_of_assigning"),
    "a suite forgets the lines it has": Mutation(
        "jobs/suite.py", "if card.name not in self.known]", "if card.name]", "tests/test_tasks_latents_suite.py -k lines_there_are_kept"),
    "each seed is compared with itself": Mutation(
        "jobs/suite_measures.py", "for j in range(count) if j != i) / (count - 1)", "for j in range(count) if j != i) / count",
        "tests/test_tasks_latents_suite.py -k averaged"),
    "the model of a stream is not named": Mutation("streams.py", '"model": weights_digest(self.model), ', "", "tests/test_fit.py -k another_model"),
    "the pseudo-residual points uphill": Mutation(
        "latents/end_to_end.py", "residual_NE = -(y_hat_NE.numel() / 2)", "residual_NE = (y_hat_NE.numel() / 2)",
        "tests/test_latents_in_model.py -k gradient_is_that_through"),
    "end-to-end KL is taken the other way round": Mutation(
        "latents/end_to_end.py", "kl_div(log_q, log_p,", "kl_div(log_p, log_q,", "tests/test_latents_in_model.py -k gradient_is_that_through"),
    "what is trained is not what is told of": Mutation(
        "latents/end_to_end.py", "if mse is None or not torch.allclose(mse, expected, rtol=1e-3, atol=1e-6):", "if mse is None:",
        "tests/test_latents_in_model.py -k makes_no_sense"),
    "a head reads in other units": Mutation(
        "latents/head_attribution.py", "value_MHSC, reads_MHC) * like", "value_MHSC, reads_MHC)", "tests/test_latents_in_model.py -k sum_to_the_pre"),
    "formation without its baseline": Mutation(
        "latents/track.py", " - _pairs(unit_ND.sum(0), torch.tensor(len(x_ND)))", "", "tests/test_latents_in_model.py -k formation"),
    "dictionaries begun before are initialised again": Mutation(
        "fit.py", "if learner.name not in begun:", "if True:", "tests/test_latents_in_model.py -k not_initialised_again"),
    "b_dec is folded into the encoder the wrong way round": Mutation(
        "formats/plain.py", "shift_F if centred else -shift_F, centred)", "-shift_F if centred else shift_F, centred)",
        "tests/formats/test_formats_read.py -k same_output"),
    "a threshold is written in scaled units": Mutation(
        "formats/plain.py", 'parts["theta"] = over(own.tau)', 'parts["theta"] = own.tau', "tests/formats/test_formats_write.py -k round_trip"),
    "a pickle may name anything": Mutation(
        "formats/torch_zip.py", "if argument not in (_DICT, _REBUILD, _PARAMETER, *_STORAGES):", "if False:",
        "tests/formats/test_formats_hostile.py -k whole_module"),
    "a tensor may repeat its bytes without end": Mutation(
        "formats/torch_zip.py", "or math.prod(shape) > len(flat) or", "or",
        "tests/formats/test_formats_hostile.py -k bytes_do_not_hold"),
    "units are settled in one place of two": Mutation(
        "formats/units.py", '("b_enc_F", "b_dec_D", "b_mag_F", "tau")', '("b_dec_D", "b_mag_F", "tau")', "tests/cli/test_cli_exchange.py -k settled"),
    "the skip connection is left out of the loss": Mutation(
        "latents/dictionary.py", "rest = y - self.skipped(x)", "rest = y - 0 * self.skipped(x)", "tests/test_latents_objects.py -k papers_formula"),
    "the loudest site sets the scale of all": Mutation(
        "latents/dictionary.py", "zip(spread, parts, strict=True)])", "zip([min(spread)] * len(parts), parts, strict=True)])",
        "tests/test_latents_objects.py -k sum_over_sites"),
    "mixed rows lose their targets": Mutation(
        "streams.py", "else torch.cat([y for _, y in parts])[mix])", "else torch.cat([y for _, y in parts]))",
        "tests/test_latents_objects.py -k mixed_rows"),
    "a crosscoder reads the model that it disturbs": Mutation(
        "jobs/judge_joined.py", "return y_BTE if self._reading else torch.cat", "return torch.cat", "tests/test_latents_objects.py -k clean_pass"),
    "tokens weigh alike in the variance over layers": Mutation(
        "latents/layers.py", "moment_P.square() / total_P.clamp_min(1e-300)", "(moment_P / total_P.clamp_min(1e-300)).square()",
        "tests/test_latents_objects.py -k variance_over"),
    "far layers are grouped": Mutation(
        "latents/groups.py", "at = apart.index(min(apart))", "at = apart.index(max(apart))", "tests/test_latents_objects.py -k scipys"),
    "a layer's latents write only there": Mutation(
        "latents/cross_layer.py", "here_M = routes.unit_M < len(table)", "here_M = routes.unit_M // self.each == layer",
        "tests/test_latents_objects.py -k cross_layer_loss"),
    "all layers read the first": Mutation(
        "latents/cross_layer.py", "x_SBD = self._by_layer(scaled.reshape(-1, self.d_in)).transpose(0, 1)",
        "x_SBD = self._by_layer(scaled.reshape(-1, self.d_in)).transpose(0, 1)[:1].expand(self.layers, -1, -1)",
        "tests/test_latents_objects.py -k cross_layer_loss"),
    "the second model is the first": Mutation(
        "streams.py", "(model, *([beside] if beside is not None else []))", "(model, *([model] if beside is not None else []))",
        "tests/test_latents_objects.py -k two_models"),
    "frequent classes weigh more": Mutation(
        "tasks/logistic.py", "torch.where(y_NC, 0.5 / yes_C, 0.5 / (len(y_NC) - yes_C))", "torch.where(y_NC, 1 / len(y_NC), 1 / len(y_NC))",
        "tests/test_tasks_concepts_probes.py -k weigh"),
    "the penalty is doubled": Mutation(
        "tasks/logistic.py", "l2 / 2 * w_PC.pow(2)", "l2 * w_PC.pow(2)", "tests/test_tasks_concepts_probes.py -k gradient"),
    "probes are judged where they were fitted": Mutation(
        "tasks/probing.py", "return _judged(probes.logits(x_ND[judge_R]), y_NC[judge_R], doc_N[judge_R], none)",
        "return _judged(probes.logits(x_ND[fit_R]), y_NC[fit_R], doc_N[fit_R], none)", "tests/test_tasks_concepts_probes.py -k other_side"),
    "one silent main latent is enough": Mutation(
        "tasks/absorption.py", "<= 0).all(1)]", "<= 0).any(1)]", "tests/test_tasks_concepts_probes.py -k splitting"),
    "absorption needs no margin": Mutation(
        "tasks/absorption.py", "second_R >= margin)", "second_R >= 0)", "tests/test_tasks_concepts_probes.py -k margin"),
    "ablated to nothing, not to the mean": Mutation(
        "tasks/removal.py", "(lens.codes.columns(latent_L) - mean_L) @", "lens.codes.columns(latent_L) @",
        "tests/test_tasks_concepts_probes.py -k taking_latents"),
    "the cause is that nothing changed": Mutation(
        "tasks/disentangle.py", "cause_P = (part.argmax(1) == attribute.value_N[source_P])",
        "cause_P = (part.argmax(1) == attribute.value_N[base_P])", "tests/test_tasks_concepts_rows.py -k half"),
    "silence agrees with silence": Mutation(
        "tasks/senses.py", "(latent_P == other_P) & (latent_P >= 0)", "(latent_P == other_P)", "tests/test_tasks_concepts_rows.py -k confusion"),
    "forgetting spares nothing": Mutation(
        "tasks/unlearning.py", "(keep_F <= rare) & (forget_F", "(forget_F", "tests/test_tasks_concepts_rows.py -k forget"),
    "a line break ends a name": Mutation(
        "tasks/python_rows.py", "last >= bare and last in ends", "last in ends", "tests/test_tasks_concepts_rows.py -k letters_words"),
    "seeds have no spread": Mutation(
        "jobs/latent_verdict.py", "sum(means) / len(means), min(means), max(means)", "sum(means) / len(means), *[sum(means) / len(means)] * 2",
        "tests/cli/test_cli_latent_suite.py -k seeds_become"),
    "a negative code is dropped": Mutation(
        "jobs/latent_bench.py", "latent_M + width * (value_M < 0), value_M.abs(), 2 * width", "latent_M, value_M.clamp_min(0), 2 * width",
        "tests/cli/test_cli_latent_suite.py -k both_signs"),
    "lasso codes shrink twice": Mutation(
        "latents/coding/penalty.py", "(size - step * weight).clamp_min(0)", "(size - 2 * step * weight).clamp_min(0)",
        "tests/test_coding_penalty.py -k 'soft and grid'"),
    "half thresholds too early": Mutation(
        "latents/coding/penalty.py", "size > 1.5 * w ** (2 / 3)", "size > 1.2 * w ** (2 / 3)", "tests/test_coding_penalty.py -k 'half and grid'"),
    "settled codes are not checked": Mutation(
        "latents/coding/support.py", "done_C = found_C & ~over_CF.any(-1)", "done_C = found_C",
        "tests/test_coding_solvers.py -k settl"),
    "codes have the derivative of least squares": Mutation(
        "latents/coding/support.py", "held = torch.where(live_CK, penalty.bend(size_CK, weight), held)", "held = held + 0.1",
        f"{CONTRACT} -k 'sparse_coding and M3'"),
    "the gap is not a bound": Mutation(
        "latents/coding/ista.py", "return (primal_B - dual_B) / (x", "return (primal_B - dual_B) / 10 / (x", "tests/test_coding_solvers.py -k gap"),
    "coordinates forget their length": Mutation(
        "latents/coding/coordinate.py", "1.0, weight, positive) / square", "1.0, weight, positive)", "tests/test_coding_solvers.py -k scikit"),
    "pursuit does not divide by length": Mutation(
        "latents/coding/pursuit.py", "c_BF = (r_BD @ atoms_FD.T) / length_F", "c_BF = r_BD @ atoms_FD.T", "tests/test_coding_solvers.py -k pursuit"),
    "OMP takes one atom more": Mutation(
        "latents/coding/omp.py", "pursuit(x_BD, atoms_FD, self.k, by", "pursuit(x_BD, atoms_FD, min(self.k + 1, *atoms_FD.shape), by",
        f"{CONTRACT} -k 'latents/omp and L4'"),
    "resolving keeps the decoder's lengths": Mutation(
        "latents/coding/resolve.py", "decoder / decoder.norm(dim=-1, keepdim=True).clamp_min(1e-8)", "decoder",
        "tests/test_coding_solvers.py -k resolving"),
    "MSSA's way back is another": Mutation(
        "latents/coding/crate.py", "weight_BKTT @ v_BKTP, self.basis_KDP", "weight_BKTT @ v_BKTP, self.basis_KDP.roll(1, 0)",
        "tests/test_coding_crate.py -k loop"),
    "the rate forgets the width": Mutation(
        "latents/coding/crate.py", "width / (tokens * epsilon**2)", "1 / (tokens * epsilon**2)", "tests/test_coding_crate.py -k rate"),
    "the graph does not hold rows together": Mutation(
        "latents/coding/nmf.py", "sparsity + smoothness * degree_N1 * codes_NF", "sparsity", "tests/test_coding_nmf.py -k 'never_rises'"),
    "stripes lie across": Mutation(
        "latents/coding/gabor.py", "(90 - torch.rad2deg(theta)) % 180", "torch.rad2deg(theta) % 180", "tests/test_coding_pictures.py -k stripes"),
    "whitening leaves the corners": Mutation(
        "latents/coding/patches.py", "f * torch.exp(-((f / CUT_OFF) ** 4))", "f", "tests/test_coding_pictures.py -k whitening"),
    "samples follow the square": Mutation(
        "latents/coding/source_selection.py", "exact = spare * score / score.sum()", "exact = spare * score**2 / (score**2).sum()",
        "tests/test_coding_sources_and_cca.py -k shares"),
    "CCA leaves the box": Mutation(
        "latents/coding/cca.py", "new.clamp(-1, 1))", "new)", "tests/test_coding_sources_and_cca.py -k optimality"),
    "the last bank is taken for the best": Mutation(
        "latents/coding/learned_bank.py", "if best is None or losses[-1] < min(losses[:-1]):", "if turn >= 0:",
        "tests/test_coding_learned_bank.py -k best_bank"),
    "codes begin at 0 whatever was given": Mutation(
        "latents/coding/convolutional.py", "new_zeros(full) if start is None else start.to(pictures_BHW)).flatten(1)",
        "new_zeros(full)).flatten(1)", "tests/test_coding_learned_bank.py -k begun"),
    "latents are listed backwards": Mutation(
        "tasks/codes.py", "order_M = key_M.argsort(stable=True)", "order_M = key_M.argsort(stable=True, descending=True)",
        "tests/test_tasks_codes.py -k orders"),
    "the last latent has no first activation": Mutation(
        "tasks/codes.py", "begin[1:] = torch.bincount", "begin[:-1] = torch.bincount", "tests/test_tasks_codes.py -k orders"),
    "kernels are not flipped": Mutation(
        "latents/coding/convolutional.py", "kernels_KSS.flip(1, 2)[None]", "kernels_KSS[None]", "tests/test_coding_convolutional.py -k operator"),
    "NSA sums no GQA group": Mutation(
        "attention/trained/nsa.py", ".unflatten(1, (self.key_heads, -1)).sum(2)", ".unflatten(1, (self.key_heads, -1))[:, :, 0]",
        "tests/attention/test_trained_blocks.py -k nsa_and"),
    "NSA sees a window before it ends": Mutation(
        "attention/trained/nsa.py", "* self.stride + self.compress - 1", "* self.stride", "tests/attention/test_trained_blocks.py -k nsa_and"),
    "NSA's gates begin wide": Mutation(
        "attention/trained/nsa.py", "drawn(draw, E, heads * 3, std=0.02)", "drawn(draw, E, heads * 3, std=E**-0.5)",
        "tests/attention/test_trained_blocks.py -k gates_begin"),
    "a layer computed again is computed unfrozen and dense": Mutation(
        "attention/trained/in_model.py", "return first, _both(second, inside())", "return first, second",
        "tests/attention/test_trained_in_model.py -k backward_pass"),
    "centroids move before the step is done": Mutation(
        "attention/trained/routing.py", "self.move_HCD.copy_(", "self.centroid_HCD.add_(",
        "tests/attention/test_trained_tokens.py -k follow_their_tokens"),
    "a short block's mean counts its padding": Mutation(
        "attention/trained/moba.py", "count[-1:] = S - (total.shape[2] - 1) * block", "pass",
        "tests/attention/test_trained_blocks.py -k truth_is_the_pooled"),
    "sparsek's tau stands still": Mutation(
        "attention/trained/projection.py", "- (mean - mean.detach()) - tau", "- tau", "tests/attention/test_trained_maps.py -k jacobian"),
    "sparsek forgets keys that one head still keeps": Mutation(
        "attention/trained/sparsek.py", "> tau[:, :, -1:]).any(1).any(0)]", "> tau[:, :, -1:]).all(1).all(0)]",
        "tests/attention/test_trained_maps.py -k at_a_time"),
    "biformer routes by its first head": Mutation(
        "attention/trained/biformer.py", ".mT).sum(1, keepdim=True)", ".mT)[:, :1]", "tests/attention/test_references_trained.py -k biformer"),
    "sea's cell is the later of two": Mutation(
        "attention/trained/sea.py", "* self.cells - 1) // (2 * seen_T)", "* self.cells) // (2 * seen_T)",
        "tests/attention/test_references_trained.py -k sea"),
    "DIFF pairs heads by halves": Mutation(
        "attention/trained/diff.py", "torch.stack(self._normed(out_BPTE).chunk(2, -1), 2).flatten(1, 2)",
        "torch.cat(self._normed(out_BPTE).chunk(2, -1), 1)",
        "tests/attention/test_trained_maps.py -k diff_and"),
    "a frozen model gathers gradients": Mutation(
        "attention/trained/in_model.py", "            p.requires_grad_(False)", "            pass",
        "tests/attention/test_trained_in_model.py -k frozen"),
    "a run is whole where one query has all its keys": Mutation(
        "attention/patterns/atoms.py", "surely = (low >= first.amax(1)[:, None]) &", "surely = (low >= first.amin(1)[:, None]) &",
        "tests/attention/test_patterns.py -k mean_what"),
    "tiles are told apart by distance alone": Mutation(
        "attention/patterns/atoms.py", "return [row_Q[row_X], grid.k.shape[column_X], apart_X]", "return [apart_X]",
        "tests/attention/test_patterns.py -k mean_what"),
    "the last keys' block counts as any other": Mutation(
        "attention/patterns/compile.py", "code([edge_Q[at][row_X], edge_N[column_X], *seen", "code([*seen",
        "tests/attention/test_patterns.py -k mean_what"),
    "a position without a label sees those without": Mutation(
        "attention/patterns/pattern.py", "self._above(scene)) & (q >= 0) & (k >= 0)", "self._above(scene))",
        "tests/attention/test_patterns.py -k mean_what"),
    "neighbourhoods are cut at the far border": Mutation(
        "attention/patterns/words.py", "first = first.minimum((count - n).clamp_min(0)).clamp_min(0)", "first = first.clamp_min(0)",
        "tests/attention/test_patterns.py -k neighbours"),
    "the first query block is counted whole": Mutation(
        "kernels/block_attention/pairs.py", "cut_QN = ragged_Q[:, None] | (", "cut_QN = (",
        "tests/attention/test_patterns.py -k mean_what"),
    "labels of padding are not left out": Mutation(
        "attention/bound.py", "return table[: len(real_S)][real_S]", "return table[: int(real_S.sum())]",
        "tests/attention/test_patterns_method.py -k padding"),
    "every head has the first shard": Mutation(
        "attention/patterns/words.py", "every(n, head % n)", "every(n, 0)",
        "tests/attention/test_patterns_zoo.py -k s2"),
    "a step drops what is above all": Mutation(
        "kernels/cache_steps/cpu.py", "at[j] < first or at[j] > recent", "at[j] < first", "tests/numerics/test_cache_steps.py -k drops_the_least"),
    "the last channels are left out of a dot product": Mutation(
        "kernels/block_attention/few.py", "    if D % W:\n        _plain", "    if False:\n        _plain",
        "tests/numerics/test_cache_steps.py -k drops_the_least"),
    "a token's own page may be missed": Mutation(
        "kernels/cache_steps/cpu.py", "bound[r, N - 1] = np.float32(np.inf)", "bound[r, N - 1] += np.float32(0.0)",
        "tests/numerics/test_cache_steps.py -k highest_bound"),
    "rebuilt keys turn backwards": Mutation(
        "kernels/cache_steps/chunks.py", "a * cos_U[i] - b * sin_U[i]", "a * cos_U[i] + b * sin_U[i]",
        "tests/numerics/test_cache_steps.py -k layers_own"),
    "window and store change weights": Mutation(
        "attention/cache/compressed.py", "(lse - far_lse)", "(far_lse - lse)", "tests/attention/test_cache_policies.py -k whole_window"),
    "a padded row steps like the others": Mutation(
        "attention/cache/policy.py", "cache.uniform and padding_BS is None", "cache.uniform",
        "tests/attention/test_cache_laws.py -k 'rows_do_not and window'"),
    "bounds keep tokens that were cropped": Mutation(
        "attention/cache/pages.py", "self.bounds.length = min(self.bounds.length, left // page)\n        if left % page:", "if False:",
        "tests/attention/test_cache_sessions.py -k guessed_wrong"),
    "the slot of a dropped entry gets another's key": Mutation(
        "attention/cache/entries.py", "x.scatter_(2, where, x[:, :, -1:].clone())", "x.scatter_(2, where, x[:, :, :1].clone())",
        "tests/attention/test_cache_policies.py -k random_eviction"),
    "padding takes places among the keys": Mutation(
        "attention/cache/policy.py", "(padding_BS.long().cumsum(1) - 1)", "(torch.ones_like(padding_BS).long().cumsum(1) - 1)",
        "tests/attention/test_cache_laws.py -k rows_do_not"),
    "votes are not pooled": Mutation(
        "attention/cache/snapkv.py", "pooled = max_pool1d(sorted_votes, width, stride=1, padding=width // 2)", "pooled = sorted_votes",
        "tests/attention/test_cache_policies.py -k evicting"),
    "a short last entry of a summary is thought whole": Mutation(
        "attention/cache/base.py", "done = min(self.grown.length, self.seen // self.every)", "done = self.grown.length",
        "tests/attention/test_cache_laws.py -k derives"),
    "real keys are those that the last query sees": Mutation(
        "attach.py", "real_BS = open_BTS.any(1)", "real_BS = open_BTS[:, -1]", "tests/test_attach.py -k packed"),
    "a mask is asked of one head": Mutation(
        "attach.py", "if mask.shape[1] > 1 and not", "if mask.shape[1] > 9 and not", "tests/test_attach.py -k masks"),
    "a mask that was written to is not read again": Mutation(
        "attach.py", "(mask._version, causal, B, T, S)", "(causal, B, T, S)", "tests/test_attach.py -k written_to"),
    "a plan that ends first takes a later one with it": Mutation(
        "attach.py", "            if not later:\n", "            if True:\n", "tests/test_attach.py -k any_order"),
    "every layer of an encoder is the first": Mutation(
        "attach.py", 'int(name.split(".")[1])', 'getattr(module, "layer_idx", 0) or 0', "tests/attention/test_model_families.py -k told"),
    "an encoder's padding asks": Mutation(
        "attention/heads.py", "if causal or T == S else", "if causal else",
        "tests/attention/test_in_every_model.py -k 'beside_padding and bert-attention/quest'"),
    "a stream stays behind on the layer that was taken out": Mutation(
        "site.py", "            hook.move(now)\n", "            pass\n", "tests/test_attach.py -k comes_to_stand"),
    "a glob goes before a name": Mutation("site.py", "return globs | named", "return named | globs", "tests/test_attach.py -k before_globs"),
    "a static cache passes": Mutation(
        "attach.py", 'getattr(layers[at], "is_compileable", False)', "False", "tests/test_site_attention.py -k static"),
    "an empty slot uses up packed values": Mutation(
        "kernels/coded_attention/reference.py", "values = values[bits.any(-1)]", "values = values.flatten(0, -2)",
        "tests/attention/test_cache_laws.py -k 'rows_do_not and mustafar'"),
    "every group of heads meets the first key heads": Mutation(
        "attention/per_head.py", "first, last = i * heads // share, ((i + 1) * heads - 1) // share + 1", "first, last = 0, (heads - 1) // share + 1",
        "tests/test_site_attention.py -k cut_through"),
    "a closing token sees more than its span": Mutation(
        "attention/cache/sentinel.py", " & (q_kind != CLOSE)[:, :, None]", "", "tests/attention/test_cache_policies.py -k wrapping"),
    "a controller is taught membership alone": Mutation(
        "attention/cache/controller.py", " + weight_GTT[:, at])", ")", "tests/attention/test_cache_learned.py -k all_the_probability"),
    "a prompt's newest chunks are blurred too": Mutation(
        "attention/cache/shadow.py", "far_B = line.count_B // C - self.policy.local", "far_B = line.count_B // C",
        "tests/attention/test_cache_policies.py -k landmarks_name"),
    "the current token may be released": Mutation(
        "attention/cache/adore.py", "score.masked_fill((place == now_B[:, None])[:, None], torch.inf)", "score",
        "tests/attention/test_cache_learned.py -k adore_attends"),
    "a chunk's decay runs the other way": Mutation(
        "attention/cache/attamba.py", "(-rate_GD[:, None] * back_P[:, None])", "(rate_GD[:, None] * back_P[:, None])",
        "tests/attention/test_cache_learned.py -k attamba_attends"),
    "llsa sees the mean of the block that a query stands in": Mutation(
        "attention/trained/llsa.py", "torch.where(seen < own_R[:, None], seen, -1)", "torch.where(seen <= own_R[:, None], seen, -1)",
        "tests/attention/test_trained_rest.py -k llsa_and"),
    "nosa lets the query choose the whole budget": Mutation(
        "attention/trained/nosa.py", "highest(score, keep - fixed)", "highest(score, keep)", "tests/attention/test_trained_rest.py -k nosa_and"),
    "flux decodes the other way": Mutation(
        "attention/trained/flux.py", "self._held_B = (z_B > 0)", "self._held_B = (z_B < 0)", "tests/attention/test_trained_rest.py -k flux_decides"),
    "sparsifiner drops nothing": Mutation(
        "attention/trained/sparsifiner.py", "torch.where(map_BHTI >= self.floor, map_BHTI, 0.0)", "map_BHTI",
        "tests/attention/test_trained_rest.py -k sparsifiner_and"),
    "spt forgets the distance": Mutation(
        "attention/trained/spt.py", ".double() * S - far", ".double() * S", "tests/attention/test_trained_rest.py -k spt_and"),
    "Performer's rotations keep the signs of QR": Mutation(
        "attention/trained/sea.py", "q * r.diagonal().sign()", "q", "tests/attention/test_trained_tokens.py -k comes_near"),
    "blocks do not see the anchor": Mutation(
        "attention/structured/star.py", "mask[:, 0] |= self.anchor", "mask[:, 0] |= False", "tests/attention/test_structured.py -k two_phases"),
    "a query meets its own block's regions too": Mutation(
        "attention/structured/combiner.py", "r * self.region // self.block < places", "r * self.region // self.block <= places",
        "tests/attention/test_structured.py -k factorised"),
    "every head leans to what is old": Mutation(
        "attention/structured/swat.py", "[-(2.0 ** (-8 * n / recent))", "[(2.0 ** (-8 * n / recent))", "tests/attention/test_structured.py -k swat"),
    "masking a pair does not raise the others": Mutation(
        "attention/structured/moa.py", "weight / (1 - weight).clamp_min(1e-6)", "weight", "tests/attention/test_structured_search.py -k influence"),
    "the search forgets what it spent": Mutation(
        "attention/structured/searched.py", "left -= cost[x, choice[x]]", "left -= 0", "tests/attention/test_structured_search.py -k best_of_all"),
    "an empty hash class is a key of zeros": Mutation(
        "attention/structured/lsg.py", "short, there = share.sum(-1) > 0,", "short, there = share.sum(-1) > -1,",
        "tests/attention/test_structured.py -k 'gathered and lsh'"),
    "shifted groups are served too": Mutation(
        "attention/structured/shifted.py", "self._mine if mode else _DENSE", "self._mine", "tests/attention/test_structured.py -k longlora"),
    "the odds forget one table alone": Mutation(
        "attention/dynamic/hashing.py", " - tables * x * (1 - x) ** (tables - 1)", "", "tests/attention/test_dynamic_tail.py -k magicpig"),
    "the tournament judges by first blocks": Mutation(
        "attention/dynamic/hip.py", "(start + stop - 1).div(2,", "start.div(1,", "tests/attention/test_dynamic_tail.py -k hip_is"),
    "the support adds to the estimate": Mutation(
        "attention/dynamic/scatterbrain.py", " - (rough - top).exp()", "", "tests/attention/test_dynamic_tail.py -k scatterbrain_is"),
    "a key graph points to the centre only": Mutation(
        "attention/dynamic/key_graph.py", "in ((centre, other), (other, centre))", "in ((other, centre),)",
        "tests/attention/test_dynamic_tail.py -k key_graph"),
    "pages begun since the choice are lost": Mutation(
        "attention/dynamic/lserve.py", "return mask | (n > first_T[:, None] // self.block)", "return mask & (n > -1) | (n > S)",
        "tests/attention/test_dynamic_tail.py -k takes_over"),
    "early tokens count for all who see them": Mutation(
        "attention/dynamic/zipvl.py", " / (~unseen_PS).sum(0)", "", "tests/attention/test_dynamic_steps.py -k favour"),
    "the sparse softmax keeps its size": Mutation(
        "attention/dynamic/rettention.py", 'state["share"] * super()._attend(q, k, v, scale, causal)', "super()._attend(q, k, v, scale, causal)",
        "tests/attention/test_dynamic_steps.py -k rettention"),
    "top-p of SpargeAttn takes the block that passes the share": Mutation(
        "attention/dynamic/sparge.py", "tail_levels(mass, within=True)", "tail_levels(mass)", "tests/attention/test_references_dynamic.py -k sparge"),
    "a segment's own blocks take part in the share of the others": Mutation(
        "attention/dynamic/permuted.py", "~seen | own, -torch.inf", "~seen, -torch.inf", "tests/attention/test_references_dynamic.py -k pbs"),
    "the hashing centre counts the sinks": Mutation(
        "attention/dynamic/magicpig.py", "min(self.sinks, self.centre - 1) : self.centre", ": self.centre",
        "tests/attention/test_references_dynamic.py -k magicpig"),
    "a run chooses at each step": Mutation(
        "attention/dynamic/sparse_d.py", 'if "mask" not in state or', "if True or", "tests/attention/test_dynamic_steps.py -k sparse_d"),
    "masses take their own lse": Mutation(
        "attention/dynamic/adaspa.py", "if lse_BHT is None else torch.maximum(lse_BHT, score.amax(-1))", "",
        "tests/attention/test_dynamic_more.py -k cached_lse"),
    "heads that keep most are given more": Mutation(
        "attention/dynamic/adaspa.py", "(rank_BH >= H - count_B1).double() - (rank_BH < count_B1).double()",
        "(rank_BH < count_B1).double() - (rank_BH >= H - count_B1).double()", "tests/attention/test_dynamic_more.py -k moves_budget"),
    "tiles are summed along the diagonal": Mutation(
        "attention/dynamic/antidiagonal.py", ".flip(3).flatten(3)", ".flatten(3)", "tests/attention/test_dynamic_more.py -k by_their_definition"),
    "chunks are cut from the first query": Mutation(
        "attention/dynamic/chunked.py", "((S - T + start) // self.chunk + 1) * self.chunk - (S - T)", "start + self.chunk",
        "tests/attention/test_dynamic_more.py -k through_a_cache"),
    "a head stops short of its target": Mutation(
        "attention/dynamic/chunked.py", "(recall_HC < self.target) | (density_HC", "(recall_HC < self.target) & (density_HC",
        "tests/attention/test_dynamic_more.py -k target_recall"),
    "blocks of lines are counted up to their end": Mutation(
        "attention/dynamic/flex_prefill.py", "(rank * block - 1)", "(rank * block)", "tests/attention/test_dynamic_more.py -k flex_prefill"),
    "segments of padding alone have a CLS": Mutation(
        "attention/structured/hat.py", "torch.cat([there.any(-1, keepdim=True), there], -1)",
        "torch.cat([torch.ones_like(there[..., :1]), there], -1)", "tests/attention/test_structured_layers.py -k hat_padding"),
    "depth does not still the maps": Mutation(
        "attention/structured/graph.py", "math.log(self.lam / number + 1)", "math.log(self.lam + 1)",
        "tests/attention/test_structured_layers.py -k fdgatii_is"),
    "cells' centres lie at the border": Mutation(
        "attention/structured/sampling.py", "align_corners=False", "align_corners=True", "tests/attention/test_structured_sampling.py -k bilinear"),
    "a page seen in part is shared": Mutation(
        "kernels/block_attention/paged.py", "full_R, spans, found = (length_R // page).tolist()",
        "full_R, spans, found = (-(-length_R // page)).tolist()",
        "tests/attention/test_schedule.py -k 'only_where or every_key_once'"),
    "a tile that holds one later key is whole": Mutation(
        "kernels/block_attention/irregular.py", "one & (last_k <= first_q)", "one & (first_k <= first_q)",
        "tests/attention/test_irregular.py -k dropped"),
    "pooling counts places behind the text": Mutation(
        "tasks/sources.py", "score.masked_fill(~there, -torch.inf).softmax(2)", "score.softmax(2)",
        "tests/test_tasks_attention_sources.py -k pools_real"),
    "a column sees one query less": Mutation(
        "kernels/block_attention/line_loops.py", "at_C[c + j] - first)", "at_C[c + j] - first + 1)",
        "tests/attention/test_by_lines.py -k masked_softmax"),
    "a key in a column and on a diagonal counts twice": Mutation(
        "kernels/block_attention/line_loops.py", "scores[count * LANES + r] += taken[n + r]", "pass",
        "tests/attention/test_by_lines.py -k masked_softmax"),
    "pairs of crossing lines are counted twice": Mutation(
        "kernels/block_attention/lines.py", "- (both_BHS * column_BHS).sum(-1)", "", "tests/attention/test_by_lines.py -k masked_softmax"),
    "some queries at a time see the keys of the next": Mutation(
        "attention/block.py", "k[:, :, : S - T + stop], v[:, :, : S - T + stop]", "k, v", "tests/attention/test_by_query.py -k at_a_time"),
    "zeros of two signs differ": Mutation(
        "kernels/block_attention/loops.py", "np.int32(0) if i == np.int32(-0x80000000) else ", "", "tests/attention/test_by_query.py -k highest"),
    "code of other types is run": Mutation(
        "compiled.py", "if found is None or tuple(", "if True or tuple(", "tests/numerics/test_compiled_loops.py -k other_types"),
    "kept loops forget what they import": Mutation(
        "compiled.py", "ast.ImportFrom) and node.level:", "ast.ImportFrom) and node.level > 9:", "tests/numerics/test_compiled_loops.py -k constant"),
    "predicates asked beyond the last key": Mutation(
        "kernels/block_attention/mask.py", "key.clamp_max(S - 1), head_H", "key, head_H", "tests/numerics/test_fuzz_kernels.py -k table"),
    "loops read memory under a transform": Mutation(
        "kernels/native.py", "and not transformed() and all(", "and all(", "tests/numerics/test_fuzz_kernels.py -k transforms"),
    "no second derivative of tiles": Mutation(
        "kernels/block_attention/tiles.py", "if torch.is_grad_enabled():      ", "if grad is None:      ",
        "tests/numerics/test_fuzz_kernels.py -k second"),
    "the loss's gradient has no graph": Mutation(
        "maps/entmax.py", "_Loss.apply(x, entmax(x, alpha), target", "_Loss.apply(x, entmax(x, alpha).detach(), target",
        "tests/maps/test_entmax.py -k second"),
}
