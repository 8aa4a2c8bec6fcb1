"""Bugs in what becomes of text and how it is written: byte pair encoding, sampling, beams, generation."""

from parity_tests.zoo.bug import bugs

BUGS = [
    *bugs(
        "ref_numpy/bpe.py",
        (
            "ties_by_the_right_id",
            "Of equally frequent pairs the one with the smallest right id wins.",
            "-count[pair], ids[pair[0]], ids[pair[1]], pair",
            "-count[pair], ids[pair[1]], ids[pair[0]], pair",
        ),
        (
            "occurrences_overlap",
            "In a a a both pairs are merged.",
            "i += 2",
            "i += 1",
        ),
        (
            "rightmost_first",
            "Where a pair stands twice in a word the right one is merged first.",
            "i = ranks.index(first)",
            "i = len(ranks) - 1 - ranks[::-1].index(first)",
        ),
        (
            "stale_counts_believed",
            "A pair that has become rarer since it was queued is merged at its old count.",
            "if count[pair] != -negative_count:",
            "if count[pair] == 0:",
        ),
        (
            "last_learned_first",
            "The merges that were learned last are replayed first.",
            "first = min(ranks)",
            "first = max((r for r in ranks if r < len(rank)), default=len(rank))",
        ),
    ),
    *bugs(
        "torch_impl/bpe.py",
        (
            "shortest_special_token_first",
            "Where two special tokens begin at one place the shorter one wins.",
            "sorted(special_tokens, key=len, reverse=True)",
            "sorted(special_tokens, key=len)",
        ),
        (
            "text_becomes_special",
            "Special tokens in a text are read as such without leave.",
            "special = special_pattern(allowed_special)",
            "special = special_pattern(self.special_tokens)",
        ),
        (
            "order_of_new_words_lost",
            "Long words are stored under the numbers of short ones.",
            "np.array([*short, *long])",
            "np.array([*long, *short])",
        ),
    ),
    *bugs(
        "torch_impl/training/bpe_merges.py",
        (
            "left_neighbour_counted_once",
            "A pair that a merge destroys loses one occurrence, not those of all its words.",
            "count[x << 32 | a] -= w",
            "count[x << 32 | a] -= 1",
        ),
        (
            "runs_merged_everywhere",
            "In a run of one token, whole arrays merge overlapping places.",
            "p[in_run % 2 == 0], q[in_run % 2 == 0]",
            "p[in_run >= 0], q[in_run >= 0]",
        ),
        killed_by="parity_tests/test_bpe.py",
    ),
    *bugs(
        "torch_impl/training/bpe_table.py",
        (
            "first_pair_forgotten",
            "After a merge the pair at the very start of a word is not looked at again.",
            "if left >= 0 and",
            "if left > 0 and",
        ),
        (
            "stale_pairs_merged",
            "A pair is merged although its right token has changed.",
            "if token[p] < 0 or rank_of(token[p] << 32 | token[next[p]]) != rank:",
            "if token[p] < 0 or token[next[p]] < 0:",
        ),
        killed_by="parity_tests/test_bpe.py",
    ),
    *bugs(
        "ref_numpy/sampling.py",
        (
            "crossing_token_dropped",
            "Top-p leaves out the token that crosses p.",
            "cumulative - weights < p * cumulative[-1]",
            "(cumulative <= p * cumulative[-1]) | (falling == falling[0])",
        ),
        (
            "kth_dropped",
            "Top-k keeps what is larger than the k-th logit, and not the k-th itself.",
            "np.where(logits >= smallest_kept, logits",
            "np.where(logits > smallest_kept, logits",
        ),
        (
            "negative_logits_rewarded",
            "The repetition penalty divides negative logits, which raises them.",
            "np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)",
            "logits[ids] / penalty",
        ),
        (
            "slice_ends_included",
            "A u on the border of two slices draws the token before it.",
            'side="right"',
            'side="left"',
        ),
        (
            "temperature_multiplied",
            "A high temperature sharpens.",
            "x = x / config.temperature",
            "x = x * config.temperature",
        ),
    ),
    *bugs(
        "torch_impl/sampling.py",
        (
            "crossing_token_dropped",
            "Top-p leaves out the token that crosses p.",
            "cumulative - weights >= p * cumulative[..., -1:]",
            "(cumulative > p * cumulative[..., -1:]) & (order != order[..., :1])",
        ),
        (
            "last_of_equals",
            "At temperature 0 the last of the likeliest tokens is taken.",
            "x.argmax(-1), x.shape",
            "x.shape[-1] - 1 - x.flip(-1).argmax(-1), x.shape",
        ),
        (
            "share_of_exactly_p_dropped",
            "Min-p rules out what has exactly p of the likeliest's probability.",
            ".exp() < p, -inf)",
            ".exp() <= p, -inf)",
        ),
        (
            "sum_not_divided_out",
            "u is compared with a cumulative sum that does not end at 1.",
            "u[..., None] * cumulative[..., -1:], right=True",
            "u[..., None].clone(), right=True",
        ),
    ),
    *bugs(
        "ref_numpy/beam.py",
        (
            "end_not_counted",
            "The length of a finished hypothesis leaves out its end token.",
            "total / float(length) ** alpha",
            "total / float(max(length - 1, 1)) ** alpha",
        ),
        (
            "finished_go_on",
            "A hypothesis that has ended is extended as well.",
            "elif len(hypotheses) < width:",
            "if len(hypotheses) < width:",
        ),
        (
            "bound_too_low",
            "The exact search divides by the length so far, and stops while a longer text could still win.",
            "longest = n_tokens if exact and alpha > 0 else length",
            "longest = length",
        ),
        (
            "low_candidates_finish",
            "What completes a stop sequence is finished however low it stands.",
            "                if place < width:\n",
            "                if place >= 0:\n",
        ),
    ),
    *bugs(
        "torch_impl/beam.py",
        (
            "normalised_by_the_limit",
            "Finished hypotheses are divided by the longest length, not by their own.",
            "reached / float(length) ** alpha",
            "reached / float(n_tokens) ** alpha",
        ),
        (
            "logits_not_normalised",
            "Logits are added up as if they were log-probabilities.",
            "logits.double().log_softmax(dim=-1)",
            "logits.double()",
        ),
        (
            "first_of_equals_lost",
            "Of candidates that tie for the last place one too few is chosen.",
            "equal.cumsum(0) <= k - above.sum()",
            "equal.cumsum(0) < k - above.sum()",
        ),
        (
            "suffixes_forgotten",
            "A stop sequence that ends inside a longer pattern goes unnoticed.",
            "ends[node] |= ends[suffix[node]]",
            "ends[node] |= False",
        ),
    ),
    *bugs(
        "ref_numpy/generate.py",
        (
            "end_is_written",
            "An answer has its end token too.",
            "            return\n        ids.append(token)",
            "            yield token\n            return\n        ids.append(token)",
        ),
        (
            "one_draw_for_all",
            "Every token of a text is drawn with the same u.",
            "step=i, stream=stream), 1)[0]\n            tokens",
            "step=0, stream=stream), 1)[0]\n            tokens",
        ),
        (
            "cache_not_emptied",
            "When a text outgrows its context the old keys stay.",
            "        if starts == before:",
            "        if before is not None:",
        ),
        (
            "padding_seen",
            "The padding before a shorter prompt is read as text.",
            "PADDING, 0)",
            "0, 0)",
        ),
    ),
    *bugs(
        "torch_impl/generate.py",
        (
            "own_words_not_penalised",
            "The repetition penalty knows the prompt, and not what was written since.",
            "self.seen.scatter_(1, tokens[:, None].clamp(max=largest), True)",
            "pass",
        ),
        (
            "begin_and_padding_written",
            "An answer may contain the tokens that begin and fill up a target.",
            "forbidden=sampling.forbidden + never",
            "forbidden=sampling.forbidden",
        ),
        (
            "new_tokens_are_padding",
            "What was written beside a longer prompt is hidden again.",
            "F.pad(documents, (0, 1))",
            "F.pad(documents, (0, 1), value=PADDING)",
        ),
    ),
]
