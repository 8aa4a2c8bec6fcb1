"""Bugs in how a model learns: random numbers, batches, the loss, the optimizer, the loop."""

from parity_tests.zoo.bug import bugs

BUGS = [
    *bugs(
        "ref_numpy/rng.py",
        ("nine_rounds", "Philox stops a round early.", "range(10)", "range(9)"),
        (
            "uniform_reaches_one",
            "One bit too many of the second word: the largest uniform numbers are 1 and more.",
            "words[:, 1] >> 6",
            "words[:, 1] >> 5",
        ),
        (
            "purpose_left_out",
            "Draws for different purposes share their bits.",
            "counter[3] = key.purpose",
            "counter[3] = 0",
        ),
    ),
    *bugs(
        "torch_impl/rng.py",
        (
            "upper_half_of_the_seed_dropped",
            "Seeds that differ by a multiple of 2^32 give the same run.",
            "(key.seed & _LOW, key.seed >> 32)",
            "(key.seed & _LOW, 0)",
        ),
        (
            "sine_for_cosine",
            "Of the two normal numbers of a block the second comes first.",
            "[radius * torch.cos(angle), radius * torch.sin(angle)]",
            "[radius * torch.sin(angle), radius * torch.cos(angle)]",
        ),
        (
            "key_words_grow_alike",
            "Both words of the key grow by the constant of the first.",
            "(k1 + _W1) & _LOW",
            "(k1 + _W0) & _LOW",
        ),
    ),
    *bugs(
        "ref_numpy/data.py",
        (
            "targets_not_shifted",
            "A token's target is the token itself.",
            "return windows[..., :-1], windows[..., 1:]",
            "return windows[..., :-1], windows[..., :-1]",
        ),
        (
            "last_window_never_read",
            "The last place of the text is left out.",
            "config.batch_size) * places)",
            "config.batch_size) * (places - 1))",
        ),
    ),
    *bugs(
        "torch_impl/data.py",
        (
            "dealt_out_in_turns",
            "Sequences go to the micro-batches in turns, not in order.",
            "windows.view(config.micro_batches, -1, context_length + 1)",
            "windows.view(-1, config.micro_batches, context_length + 1).transpose(0, 1)",
        ),
        (
            "same_batch_every_step",
            "The step is not part of the key.",
            "Key(config.seed, DATA, step)",
            "Key(config.seed, DATA, 0)",
        ),
    ),
    *bugs(
        "ref_numpy/masking.py",
        (
            "the_mask_is_drawn",
            "A random token may be the mask.",
            "v * config.text_tokens",
            "v * config.vocab_size",
        ),
    ),
    *bugs(
        "torch_impl/masking.py",
        (
            "kept_tokens_not_guessed",
            "Chosen places that show their own token have no target.",
            "(u < CHOSEN).to",
            "(u < CHOSEN * (MASKED + REPLACED)).to",
        ),
    ),
    *bugs(
        "ref_numpy/pairs.py",
        (
            "end_not_learned",
            "The end of a target does not count, so nothing teaches the model to stop.",
            "following == config.padding_token, IGNORE",
            "following == config.end_token, IGNORE",
        ),
    ),
    *bugs(
        "torch_impl/pairs.py",
        (
            "begin_is_written",
            "When many targets are written at once, a target may begin a second time.",
            "never = torch.tensor([config.begin_token, config.padding_token]",
            "never = torch.tensor([config.padding_token, config.padding_token]",
        ),
        (
            "the_answer_is_shown",
            "The decoder reads the tokens that it is to write.",
            "target[..., :-1], target_out",
            "following, target_out",
        ),
        (
            "end_and_what_follows",
            "After its end a target goes on, so the part that is wholly right is too low.",
            "ended = ended | (token == config.end_token)",
            "ended = token == config.end_token",
        ),
    ),
    *bugs(
        "ref_numpy/packing.py",
        (
            "full_rows_refused",
            "A conversation that would fill a row exactly goes into a new one.",
            "left[row] >= lengths[number]",
            "left[row] > lengths[number]",
        ),
        (
            "counted_one_token_early",
            "Whether a target counts is taken from the token before it.",
            "np.where(counts[1:], ids[1:], IGNORE)",
            "np.where(counts[:-1], ids[1:], IGNORE)",
        ),
    ),
    *bugs(
        "torch_impl/packing.py",
        (
            "conversations_see_each_other",
            "All conversations of a row have one number.",
            "documents_in[row, place] = document",
            "documents_in[row, place] = 0",
        ),
        (
            "first_row_that_fits_ignored",
            "A row in which exactly the length is left is passed over.",
            "bisect_left(by_room, (length, -1))",
            "bisect_left(by_room, (length + 1, -1))",
        ),
    ),
    *bugs(
        "ref_numpy/linear_cross_entropy.py",
        (
            "chunks_counted_alone",
            "Each chunk takes the mean over its own places.",
            "t[chunk], label_smoothing, count)",
            "t[chunk], label_smoothing)",
        ),
        (
            "last_chunk_left_out",
            "Places after the last whole chunk have no loss.",
            "range(0, t.size, at_once)",
            "range(0, t.size - t.size % at_once, at_once)",
        ),
    ),
    *bugs(
        "torch_impl/linear_cross_entropy.py",
        (
            "ignored_places_push",
            "The gradient of a place that does not count is not set to zero.",
            "counts = counted.to(dtype)",
            "counts = torch.ones_like(counted, dtype=dtype)",
        ),
        (
            "gradient_of_the_last_chunk",
            "The weight's gradient is overwritten, chunk by chunk.",
            "torch.addmm(dweight, dlogits.t(), rows, out=dweight)",
            "torch.mm(dlogits.t(), rows, out=dweight)",
        ),
        (
            "smoothing_not_divided",
            "Every token gets all of the smoothing in the gradient.",
            "dlogits[:, :V] -= counts * (label_smoothing / V)",
            "dlogits[:, :V] -= counts * label_smoothing",
        ),
    ),
    *bugs(
        "ref_numpy/loss.py",
        (
            "ignored_tokens_counted",
            "The mean divides by all places, also those that do not count.",
            "count = int(counted.sum())",
            "count = t.size",
        ),
        (
            "smoothing_summed",
            "Label smoothing takes the sum over the vocabulary, not the mean.",
            "label_smoothing * log_p.mean(axis=-1)",
            "label_smoothing * log_p.sum(axis=-1)",
        ),
        (
            "ignored_tokens_push",
            "Places that do not count have a gradient.",
            "np.where(counted[:, None], dloss / max(count, 1) * dlogits, 0)",
            "dloss / max(count, 1) * dlogits",
        ),
        (
            "smoothing_not_differentiated",
            "The gradient forgets that smoothing has taken from the target.",
            "-= 1 - s  # (2)",
            "-= 1  # (2)",
        ),
    ),
    *bugs(
        "torch_impl/loss.py",
        (
            "mean_of_the_mean",
            "PyTorch averages, and the result is divided by the count again.",
            'reduction="sum"',
            'reduction="mean"',
        ),
        (
            "smoothing_dropped",
            "Label smoothing is not handed on.",
            "label_smoothing=label_smoothing,",
            "label_smoothing=0.0,",
        ),
        (
            "loss_in_the_precision_of_the_logits",
            "The loss of bfloat16 logits is summed in bfloat16.",
            "logits if logits.dtype == torch.float64 else logits.float()",
            "logits",
        ),
    ),
    *bugs(
        "ref_numpy/optim.py",
        (
            "epsilon_inside_the_root",
            "Adam's epsilon is added to v, not to its root.",
            "np.sqrt(v_hat) + epsilon",
            "np.sqrt(v_hat + epsilon)",
        ),
        (
            "bias_not_corrected",
            "The second moment, which starts at 0, is not divided by 1 - beta2^t.",
            "v_hat = v / (1 - beta2**t)\n    return",
            "v_hat = v\n    return",
        ),
        (
            "coupled_decay",
            "Weight decay is added to the gradient, as an L2 penalty.",
            "return adam(decayed, gradient, m",
            "return adam(param, gradient + weight_decay * param, m",
        ),
        (
            "norms_and_biases_decay",
            "Weight decay acts on every parameter.",
            "return param.ndim >= 2",
            "return param.ndim >= 1",
        ),
        (
            "steps_counted_from_two",
            "The bias correction of the first step is that of the second.",
            "(step + 1, learning_rate",
            "(step + 2, learning_rate",
        ),
        (
            "norm_without_root",
            "Gradients are clipped by the square of their norm.",
            "np.sqrt(sum((gradient * gradient).sum() for gradient in gradients.values()))",
            "sum((gradient * gradient).sum() for gradient in gradients.values())",
        ),
        (
            "warmup_from_zero",
            "The first step of the warm-up has a rate of 0.",
            "peak * (step + 1) / (warmup + 1)\n    if",
            "peak * step / warmup\n    if",
        ),
    ),
    *bugs(
        "torch_impl/optim.py",
        (
            "small_gradients_blown_up",
            "Gradients below the limit are scaled up to it.",
            "(limit / norm).clamp(max=1.0)",
            "(limit / norm)",
        ),
        (
            "betas_swapped",
            "The two decay rates of the moments are exchanged.",
            "(config.beta1, config.beta2)",
            "(config.beta2, config.beta1)",
        ),
        (
            "norms_and_biases_decay",
            "Weight decay acts on every parameter.",
            '"weight_decay": 0.0}',
            '"weight_decay": config.weight_decay}',
        ),
        (
            "quarter_of_a_cosine",
            "The schedule ends in the middle of the cosine.",
            "cos(pi * r)",
            "cos(pi * r / 2)",
        ),
        (
            "default_epsilon",
            "Adam's epsilon is PyTorch's default, whatever the config says.",
            '"eps": config.epsilon,',
            "",
        ),
        (
            "first_group_is_stepped",
            "Vectors, such as biases and the weights of norms, are never stepped.",
            "[param for param in rest if param.ndim < 2]",
            "[param for param in rest if param.ndim < 1]",
        ),
    ),
    *bugs(
        "ref_numpy/muon.py",
        (
            "wide_matrices_stretched",
            "The root that lets a tall matrix move further acts on wide ones.",
            "param.shape[0] / param.shape[1]",
            "param.shape[1] / param.shape[0]",
        ),
        (
            "no_look_ahead",
            "The step is the momentum itself, without Nesterov's look ahead.",
            "orthogonalise(momentum * m + (1 - momentum) * gradient)",
            "orthogonalise(m)",
        ),
    ),
    *bugs(
        "torch_impl/muon.py",
        (
            "one_norm_for_all_matrices",
            "Matrices of one shape are divided by the norm of all of them.",
            "sum((-2, -1), keepdim=True)",
            "sum()",
        ),
        (
            "tall_matrices_not_turned_back",
            "The step of a tall matrix is laid out as that of its transpose.",
            "return x.mT if is_tall else x",
            "return x.reshape_as(matrices) if is_tall else x",
        ),
    ),
    *bugs(
        "ref_numpy/train.py",
        (
            "mean_of_means",
            "Each micro-batch divides by its own count, so tokens beside few others weigh more.",
            "targets[m], config.label_smoothing, count)",
            "targets[m], config.label_smoothing, int((targets[m] != IGNORE).sum()) * len(targets))",
        ),
        (
            "last_micro_batch_only",
            "Gradients of the micro-batches overwrite each other.",
            "name: total[name] + gradient for",
            "name: gradient for",
        ),
        (
            "micro_batches_share_masks",
            "The dropout of each micro-batch begins at row 0.",
            "first_row=m * targets.shape[1]",
            "first_row=0",
        ),
    ),
    *bugs(
        "torch_impl/train.py",
        (
            "gradients_pile_up",
            "Gradients are not set to zero after a step.",
            "    optimizer.zero_grad(set_to_none=True)\n",
            "",
        ),
        (
            "count_of_one_micro_batch",
            "The loss divides by the tokens of the first micro-batch.",
            "(targets != IGNORE).sum()",
            "(targets[0] != IGNORE).sum()",
        ),
        (
            "one_mask_for_all_steps",
            "The step is not part of the dropout key.",
            "DropoutKey(config.seed, clock,",
            "DropoutKey(config.seed, torch.zeros_like(clock),",
        ),
        (
            "rate_of_the_step_before",
            "The schedule lags by a step.",
            "torch.take(state.rates, clock)",
            "torch.take(state.rates, (clock - 1).clamp(min=0))",
        ),
        (
            "short_window_dropped",
            "Evaluation leaves out the end of the text.",
            "    if rest:\n",
            "    if rest < 0:\n",
        ),
    ),
]
