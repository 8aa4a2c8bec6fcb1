"""Bugs in who looks at whom: attention and its tiles, masks, heads, the cache."""

from parity_tests.zoo.bug import bugs

BUGS = [
    *bugs(
        "ref_numpy/attention.py",
        (
            "scale_by_width",
            "Scores are divided by D, not by its root.",
            "k.swapaxes(-1, -2) / sqrt(q.shape[-1])",
            "k.swapaxes(-1, -2) / q.shape[-1]",
        ),
        (
            "softmax_over_queries",
            "The weights of a key add up to 1 over the queries, not those of a query over its keys.",
            "total = weights.sum(axis=-1, keepdims=True)",
            "total = weights.sum(axis=-2, keepdims=True)",
        ),
        (
            "masked_by_a_large_number",
            "A forbidden key has the score -10000, not -inf, so a query that sees nothing sees all.",
            "np.where(mask, scores, -np.inf)",
            "np.where(mask, scores, -1e4)",
        ),
        (
            "softmax_not_shifted",
            "exp of a large score overflows, since the largest is not taken off first.",
            "np.exp(scores - highest)",
            "np.exp(scores)",
        ),
        (
            "low_scores_not_shifted",
            "Rows whose scores are all very negative underflow: only positive maxima are taken off.",
            "np.where(np.isneginf(highest), 0, highest)",
            "np.maximum(highest, 0)",
        ),
        (
            "softmax_gradient_elementwise",
            "The gradient of the softmax forgets that the weights of a row share one sum.",
            "p * (dp - (p * dp).sum(axis=-1, keepdims=True))",
            "p * dp",
        ),
        (
            "softmax_gradient_mean",
            "The sum over a row of p dp is a mean.",
            "(p * dp).sum(axis=-1, keepdims=True)",
            "(p * dp).mean(axis=-1, keepdims=True)",
        ),
        (
            "dk_unscaled",
            "The gradient of the keys lacks the factor 1 / sqrt D.",
            "ds.swapaxes(-1, -2) @ q * scale",
            "ds.swapaxes(-1, -2) @ q",
        ),
        (
            "dv_transpose_dropped",
            "dv is p dy, without the transpose.",
            "p.swapaxes(-1, -2) @ dy",
            "p @ dy",
        ),
    ),
    *bugs(
        "torch_impl/attention.py",
        (
            "scale_by_width",
            "Scores are divided by D, not by its root.",
            "fused_attention(q, k, v, allowed)",
            "fused_attention(q / q.shape[-1] ** 0.5, k, v, allowed)",
        ),
        (
            "blind_rows_average",
            "A query that sees nothing gets the mean of all values, and not 0.",
            "return torch.where(sees_something, y, 0.0)",
            "return y",
        ),
        (
            "biased_scores_masked_by_a_large_number",
            "With ALiBi a forbidden key has the bias -10000, and large scores see through it.",
            "torch.where(allowed, bias, -torch.inf)",
            "torch.where(allowed, bias, -1e4)",
        ),
        (
            "slopes_without_mask",
            "With ALiBi the mask is forgotten.",
            "torch.where(allowed, bias, -torch.inf)",
            "bias.expand(*q.shape[:-1], k.shape[-2])",
        ),
    ),
    *bugs(
        "ref_numpy/flash_attention.py",
        (
            "total_not_rescaled",
            "When a tile raises the highest score, the total of the tiles before keeps its old factor.",
            "total = rescale * total + weights",
            "total = total + weights",
        ),
        (
            "last_tile_dropped",
            "Where the tile does not divide the length, the rest is left out.",
            "range(0, length, size)",
            "range(0, length - size + 1, size)",
        ),
        (
            "log_sum_exp_without_the_highest",
            "The kept log-sum-exp lacks the highest score that was taken off.",
            "_finite(highest) + np.log(total)",
            "np.log(total)",
        ),
        (
            "dq_of_the_last_tile",
            "The gradient of a query is overwritten by each tile of keys, and not added to.",
            "dq[:, :, rows] += ds",
            "dq[:, :, rows] = ds",
        ),
        (
            "delta_is_a_mean",
            "delta is the mean of dy y over the head width, not the sum.",
            "(dy * y).sum(axis=-1, keepdims=True)",
            "(dy * y).mean(axis=-1, keepdims=True)",
        ),
        (
            "blind_row_is_nan",
            "A row that has seen nothing keeps -inf as its highest score, and -inf less -inf is NaN.",
            "shift = _finite(highest)",
            "shift = highest",
        ),
    ),
    *bugs(
        "torch_impl/flash_attention.py",
        (
            "window_one_too_wide",
            "A window of w lets a query see w + 1 keys.",
            "t - s < pattern.window)",
            "t - s <= pattern.window)",
        ),
        (
            "window_cut_one_too_short",
            "A block of queries is not given the first key of its window.",
            "max(start - pattern.window + 1, 0)",
            "max(start - pattern.window + 2, 0)",
        ),
        (
            "earlier_documents_seen",
            "A token sees its own document and those before it.",
            "pattern.documents[b, t] == pattern.documents[b, s]",
            "pattern.documents[b, t] >= pattern.documents[b, s]",
        ),
        (
            "far_keys_preferred",
            "ALiBi's bias has the wrong sign in the path by blocks.",
            "slopes[h] * -(t - s).abs()",
            "slopes[h] * (t - s).abs()",
        ),
        (
            "padding_seen_across_tiles",
            "A tile with one present key is taken for a tile in which all are present.",
            "tiles.all(-1)[:, :, None]",
            "tiles.any(-1)[:, :, None]",
        ),
        (
            "diagonal_tiles_taken_whole",
            "A tile on the diagonal counts as one that needs no mask.",
            "certain & (s + reach <= t)",
            "certain & (s <= t)",
        ),
        (
            "blind_row_passes_gradient_back",
            "A query that sees nothing attends to everything after all.",
            "return torch.where(sees_something, y, 0.0) if can_be_blind else y",
            "return y",
        ),
    ),
    *bugs(
        "ref_numpy/masks.py",
        (
            "causal_off_by_one",
            "A token does not see itself.",
            "k=before)",
            "k=before - 1)",
        ),
        (
            "window_off_by_one",
            "A window of w holds w + 1 keys.",
            "age < window",
            "age <= window",
        ),
        (
            "documents_go_on_counting",
            "A document's places start again only where its number is larger than the one before.",
            "documents[:, 1:] != documents[:, :-1]",
            "documents[:, 1:] > documents[:, :-1]",
        ),
    ),
    *bugs(
        "torch_impl/masks.py",
        (
            "past_hidden",
            "After a past, the causal mask is that of a text that begins here.",
            ".tril(before)",
            ".tril()",
        ),
        (
            "window_off_by_one",
            "A window of w holds w + 1 keys.",
            ".triu(before + 1 - window)",
            ".triu(before - window)",
        ),
        (
            "padding_is_a_document",
            "Places that hold no token see each other.",
            "(same & (documents != PADDING)[:, None, :])[:, None]",
            "same[:, None]",
        ),
        (
            "starts_added_up",
            "The starts of documents are summed, and not the last of them taken.",
            "torch.where(begins, places, 0).cummax(dim=1).values",
            "torch.where(begins, places, 0).cumsum(dim=1)",
        ),
    ),
    *bugs(
        "ref_numpy/config.py",
        (
            "pattern_from_the_last_layer",
            "Local and full layers are counted from the last one.",
            "self._pattern[layer % len(self._pattern)]",
            "self._pattern[(self.n_layer - 1 - layer) % len(self._pattern)]",
        ),
        killed_by="parity_tests/test_transformer.py",
    ),
    *bugs(
        "ref_numpy/multi_head_attention.py",
        (
            "groups_tiled",
            "Query head h reads key/value head h mod K, not h div (H / K).",
            "x.repeat(n_head // x.shape[1], axis=1)",
            "np.tile(x, (1, n_head // x.shape[1], 1, 1))",
        ),
        (
            "heads_cut_along_time",
            "Heads are made by a reshape alone, so a head holds other tokens' features.",
            "x.reshape(*x.shape[:2], n_head, -1).transpose(0, 2, 1, 3)",
            "x.reshape(x.shape[0], n_head, x.shape[1], -1)",
        ),
        (
            "shared_head_gradient_averaged",
            "Keys that several heads read get the mean of their gradients.",
            ".sum(axis=2)",
            ".mean(axis=2)",
        ),
        (
            "keys_not_rotated",
            "Only queries turn with their place.",
            "k, rope = rope_forward(k, places, config)",
            "_, rope = rope_forward(k, places, config)",
        ),
        (
            "query_norm_gradient_dropped",
            "The gradient of q does not go back through its normalisation.",
            'dq, gradients["q_norm.weight"] = rmsnorm_backward',
            '_, gradients["q_norm.weight"] = rmsnorm_backward',
        ),
    ),
    *bugs(
        "torch_impl/multi_head_attention.py",
        (
            "norms_swapped",
            "Queries are normalised with the weights of the keys, and keys with those of the queries.",
            "self.q_norm(q), self.k_norm(k)",
            "self.k_norm(q), self.q_norm(k)",
        ),
        (
            "keys_and_values_swapped",
            "The projection's rows are taken for q, v, k.",
            "q, k, v = self.qkv(x)",
            "q, v, k = self.qkv(x)",
        ),
        (
            "heads_not_joined",
            "The heads are laid out one after the other without bringing time back to its place.",
            "x.transpose(1, 2).flatten(2)",
            "x.reshape(x.shape[0], x.shape[2], -1)",
        ),
        (
            "values_rotated",
            "Values turn with their place too.",
            "q, k = rotation.turn(q), rotation.turn(k)",
            "q, k, v = rotation.turn(q), rotation.turn(k), rotation.turn(v)",
        ),
    ),
    *bugs(
        "ref_numpy/cross_attention.py",
        (
            "key_and_value_gradients_swapped",
            "The rows of kv.weight get each other's gradients.",
            "np.concatenate([dk, dv], axis=-1)",
            "np.concatenate([dv, dk], axis=-1)",
        ),
    ),
    *bugs(
        "torch_impl/cross_attention.py",
        (
            "keys_and_values_swapped",
            "What is looked at and what is found are exchanged.",
            "attention(q, k, v, mask)",
            "attention(q, v, k, mask)",
        ),
    ),
    *bugs(
        "ref_numpy/kv_cache.py",
        (
            "keys_kept_as_values",
            "The cache stores the keys twice.",
            ": S] = k, v",
            ": S] = k, k",
        ),
        (
            "advances_by_one",
            "However many tokens were read, the cache counts one.",
            "cache.length + tokens",
            "cache.length + 1",
        ),
    ),
    *bugs(
        "torch_impl/kv_cache.py",
        (
            "held_window_one_too_wide",
            "Where a step is replayed, a window of w holds w + 1 keys.",
            "s > self.place - window",
            "s >= self.place - window",
        ),
        (
            "values_not_reordered",
            "When beams change places, their keys go along and their values stay.",
            "self.k[:, :, :, known], self.v[:, :, :, known] = k, v",
            "self.k[:, :, :, known] = k",
        ),
        (
            "two_tokens_see_everything",
            "Two tokens after a past are not kept in causal order.",
            "if tokens > 1 else None",
            "if tokens > 2 else None",
        ),
        (
            "groups_tiled",
            "Query head h reads the cached head h mod K.",
            "k.repeat_interleave(readers, 1)",
            "k.repeat(1, readers, 1, 1)",
        ),
        (
            "written_at_the_start",
            "New keys and values overwrite the oldest.",
            "self.k[layer, :, :, self.length : S], self.v[layer, :, :, self.length : S] = k, v",
            "self.k[layer, :, :, : k.shape[2]], self.v[layer, :, :, : k.shape[2]] = k, v",
        ),
    ),
]
