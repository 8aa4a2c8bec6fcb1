"""Bugs in what is done to each token: norms, projections, activations, dropout, and in stacks of layers."""

from parity_tests.zoo.bug import bugs

BUGS = [
    *bugs(
        "ref_numpy/layernorm.py",
        (
            "epsilon_outside_the_root",
            "Epsilon is added to the standard deviation, not to the variance.",
            "1.0 / np.sqrt(variance + epsilon)",
            "1.0 / (np.sqrt(variance) + epsilon)",
        ),
        (
            "unbiased_variance",
            "The variance divides by C - 1.",
            "variance = (centred * centred).mean(axis=-1, keepdims=True)",
            "variance = x.var(axis=-1, ddof=1, keepdims=True)",
        ),
        (
            "gradient_through_mean_dropped",
            "The gradient forgets that x moves the mean.",
            "g - through_mean - through_scale",
            "g - through_scale",
        ),
        (
            "rms_gradient_without_weight",
            "The gradient of RMSNorm's input forgets the weight.",
            "weight, _ = cache\n    g = dy * weight",
            "weight, _ = cache\n    g = dy",
        ),
        (
            "rms_of_centred",
            "RMSNorm divides by the standard deviation.",
            "1.0 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)",
            "1.0 / np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)",
        ),
    ),
    *bugs(
        "torch_impl/layernorm.py",
        (
            "mean_in_half_precision",
            "On the CPU PyTorch's kernel keeps the mean of a bfloat16 row in bfloat16, for the way back.",
            'if x.device.type != "cpu" or x.dtype',
            "if x.is_floating_point() or x.dtype",
        ),
        (
            "default_epsilon",
            "The epsilon asked for is not handed on, so PyTorch's own is used.",
            "F.layer_norm(x, weight.shape, weight, bias, epsilon)",
            "F.layer_norm(x, weight.shape, weight, bias)",
        ),
        (
            "rms_epsilon_outside_the_root",
            "RMSNorm adds epsilon to the root of the mean of squares.",
            "torch.rsqrt(mean_square + epsilon)",
            "1 / (mean_square.sqrt() + epsilon)",
        ),
        (
            "rms_subtracts_the_mean",
            "RMSNorm is a LayerNorm without bias.",
            "return _RMSNorm.apply(x, weight, epsilon)",
            "return F.layer_norm(x, weight.shape, weight, None, epsilon)",
        ),
        (
            "rms_scale_without_gradient",
            "What comes back to RMSNorm's input takes its scale for a constant.",
            "torch.addcmul(dy * w, x_hat, through_scale, value=-1)",
            "(dy * w)",
        ),
        (
            "module_forgets_bias",
            "The module LayerNorm does not add its bias.",
            "layernorm(x, self.weight.to(x.dtype), bias, self.epsilon)",
            "layernorm(x, self.weight.to(x.dtype), None, self.epsilon)",
        ),
    ),
    *bugs(
        "ref_numpy/linear.py",
        (
            "bias_gradient_averaged",
            "The gradient of the bias is a mean over rows.",
            "dy_rows.sum(axis=0)",
            "dy_rows.mean(axis=0)",
        ),
    ),
    *bugs(
        "torch_impl/linear.py",
        (
            "generation_without_bias",
            "The product without a gradient, as in generation, is not given the bias.",
            '(x, weight, bias, "none"',
            '(x, weight, None, "none"',
        ),
    ),
    *bugs(
        "ref_numpy/activations.py",
        (
            "relu_gradient_at_zero",
            "At x = 0 the gradient passes.",
            "np.where(x > 0, dy, 0)",
            "np.where(x >= 0, dy, 0)",
        ),
        (
            "density_too_narrow",
            "The normal density in GELU's gradient is exp(-x^2), not exp(-x^2 / 2).",
            "np.exp(-0.5 * x * x)",
            "np.exp(-x * x)",
        ),
        (
            "cubic_not_differentiated",
            "In the tanh form's gradient the factor 3 of the cubic term is missing.",
            "1.0 + 3 * 0.044715 * x * x",
            "1.0 + 0.044715 * x * x",
        ),
        (
            "sigmoid_gradient_dropped",
            "SiLU's gradient has 1 - s where s (1 - s) x belongs.",
            "(1.0 + x * (1.0 - s))",
            "(1.0 + (1.0 - s))",
        ),
    ),
    *bugs(
        "torch_impl/activations.py",
        (
            "tanh_for_exact",
            "The exact GELU is the tanh approximation.",
            "return F.gelu(x)",
            'return F.gelu(x, approximate="tanh")',
        ),
        (
            "quick_gelu",
            "SiLU has the factor 1.702 of the quick GELU.",
            "F.silu(x)",
            "x * (1.702 * x).sigmoid()",
        ),
    ),
    *bugs(
        "ref_numpy/dropout.py",
        (
            "kept_units_scaled_down",
            "Kept units are multiplied by 1 - p.",
            "scale = 1.0 / (1.0 - _threshold(p) / 65536)",
            "scale = 1.0 - _threshold(p) / 65536",
        ),
        (
            "gradient_not_scaled",
            "The gradient of a kept unit lacks the factor 1 / (1 - p).",
            "dy * keep * scale",
            "dy * keep",
        ),
        (
            "halves_swapped",
            "The upper half of a word comes first.",
            "[words & 0xFFFF, words >> 16]",
            "[words >> 16, words & 0xFFFF]",
        ),
        (
            "dropped_at_the_threshold",
            "A unit whose bits equal the threshold goes as well: one in 65536.",
            ">= _threshold(p)).reshape",
            "> _threshold(p)).reshape",
        ),
    ),
    *bugs(
        "torch_impl/dropout.py",
        (
            "rows_overlap",
            "The first row of a micro-batch is counted in blocks, not in rows.",
            "key.first_row * blocks_per_row",
            "key.first_row",
        ),
        (
            "kept_units_not_scaled",
            "Kept units are not scaled up.",
            "key, x.device) * scale",
            "key, x.device)",
        ),
        (
            "one_mask_for_all_layers",
            "The site is not part of the key.",
            "key.step, key.site)",
            "key.step, 0)",
        ),
    ),
    *bugs(
        "ref_numpy/ffn.py",
        (
            "gate_and_product_swapped",
            "The two factors of SwiGLU get each other's gradients.",
            "dwide, dopened = dproduct",
            "dopened, dwide = dproduct",
        ),
        (
            "gradient_through_gate_dropped",
            "x is read twice, but only one of its gradients comes back.",
            "dx = through_gate + through_up",
            "dx = through_up",
        ),
        (
            "derivative_at_the_output",
            "The activation's derivative is taken at its output.",
            "FFNCache(up_cache, hidden, down_cache",
            "FFNCache(up_cache, bent, down_cache",
        ),
    ),
    *bugs(
        "torch_impl/ffn.py",
        (
            "gate_on_the_wrong_half",
            "SiLU bends the product and not the gate.",
            "silu(self.gate(x)) * self.up(x)",
            "self.gate(x) * silu(self.up(x))",
        ),
        (
            "narrow_then_bend",
            "The activation comes after the second projection.",
            "self.down(self.activation(self.up(x)))",
            "self.activation(self.down(self.up(x)))",
        ),
    ),
    *bugs(
        "ref_numpy/block.py",
        (
            "residual_of_the_normed",
            "The residual path carries the normed input.",
            "y = x + dropped",
            "y = normed + dropped",
        ),
        (
            "sublayers_share_a_mask",
            "Both sublayers of a block drop the same units.",
            "site=2 * layer + 2)",
            "site=2 * layer + 1)",
        ),
        (
            "post_norm_skipped_on_the_way_back",
            "The residual path's gradient does not go through the norm.",
            "return dsum + through_sublayer",
            "return dy + through_sublayer",
        ),
    ),
    *bugs(
        "torch_impl/block.py",
        (
            "one_norm_for_both",
            "The feed-forward layer is normed with the weights of the attention's norm.",
            "self.ffn, self.norm2, self.config",
            "self.ffn, self.norm1, self.config",
        ),
        (
            "residual_path_dropped_too",
            "Dropout acts on the sum with the residual path.",
            "x + dropout(sublayer(norm(x)), config.dropout, key)",
            "dropout(x + sublayer(norm(x)), config.dropout, key)",
        ),
    ),
    *bugs(
        "ref_numpy/cross_block.py",
        (
            "sites_of_the_block_before",
            "The three dropout sites begin one too early.",
            "for n in (1, 2, 3))",
            "for n in (0, 1, 2))",
        ),
    ),
    *bugs(
        "torch_impl/cross_block.py",
        (
            "one_norm_for_two",
            "The feed-forward layer is normed with the weights of the cross-attention's norm.",
            "self.ffn, self.norm3, self.config",
            "self.ffn, self.norm2, self.config",
        ),
    ),
    *bugs(
        "ref_numpy/transformer.py",
        (
            "tied_gradient_of_the_head_dropped",
            "A tied embedding learns from the lookup alone.",
            'gradients["token_embedding.weight"] = gradients["token_embedding.weight"] + dhead',
            "pass",
        ),
        (
            "embedding_scale_forgotten_on_the_way_back",
            "The gradient of a scaled embedding is not scaled.",
            "scaled = dx * _embedding_scale(cache.config)",
            "scaled = dx",
        ),
        (
            "position_gradient_averaged",
            "The table of positions gets the mean over the batch.",
            "dx.sum(axis=0) if shared",
            "dx.mean(axis=0) if shared",
        ),
    ),
    *bugs(
        "torch_impl/transformer.py",
        (
            "packed_documents_go_on_counting",
            "The second text of a packed sequence does not begin at place 0.",
            "        if documents is None:\n            places",
            "        if True:\n            places",
        ),
        (
            "embedding_not_scaled",
            "Embeddings beside sinusoids are not scaled by sqrt C.",
            "x = x * sqrt(self.config.d_model)",
            "pass",
        ),
    ),
    *bugs(
        "ref_numpy/transformer.py",
        (
            "places_start_again",
            "After a past, places are counted from 0.",
            "np.arange(before, S)",
            "np.arange(S - before)",
        ),
        killed_by="parity_tests/test_kv_cache.py",
    ),
    *bugs(
        "torch_impl/transformer.py",
        (
            "first_place_for_last",
            "Generation is given the logits of the first place.",
            "x[:, -1:] if last_only",
            "x[:, :1] if last_only",
        ),
        killed_by="parity_tests/test_kv_cache.py",
    ),
    *bugs(
        "ref_numpy/seq2seq.py",
        (
            "memory_gradient_of_one_block",
            "The encoder learns from the decoder's first block alone.",
            "dmemory = dmemory + dread",
            "dmemory = dread",
        ),
        (
            "shared_embedding_gradient_overwritten",
            "The embedding's gradient from the encoder replaces that from the decoder.",
            "gradients[name] + gradient if name in gradients else gradient",
            "gradient",
        ),
    ),
    *bugs(
        "torch_impl/seq2seq.py",
        (
            "causal_encoder",
            "The encoder sees only what came before.",
            "AttentionPattern(alibi_slopes=self.slopes(), key_mask",
            "AttentionPattern(causal=True, alibi_slopes=self.slopes(), key_mask",
        ),
        (
            "padding_of_the_source_seen",
            "The decoder looks at the padding of the source.",
            "padding_mask(present)\n",
            "padding_mask(torch.ones_like(present))\n",
        ),
    ),
]
