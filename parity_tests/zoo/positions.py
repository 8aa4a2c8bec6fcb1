"""Bugs in what a token is and where it stands: embedding, positions, rotation, ALiBi."""

from parity_tests.zoo.bug import bugs

BUGS = [
    *bugs(
        "ref_numpy/embedding.py",
        (
            "repeated_tokens_count_once",
            "A token that stands twice gets the gradient of one of its places.",
            "np.add.at(dweight, cache.ids, dy)",
            "dweight[cache.ids] += dy",
        ),
    ),
    *bugs(
        "torch_impl/embedding.py",
        (
            "token_0_is_padding",
            "Token 0 learns nothing.",
            "F.embedding(ids, weight)",
            "F.embedding(ids, weight, padding_idx=0)",
        ),
    ),
    *bugs(
        "ref_numpy/positions.py",
        (
            "sine_for_cosine",
            "Even features are cosines, odd ones sines.",
            "np.sin(angle), np.cos(angle))",
            "np.cos(angle), np.sin(angle))",
        ),
        (
            "shared_places_count_once",
            "A place that several sequences hold gets the gradient of one of them.",
            "np.add.at(dweight, cache.places, dy)",
            "dweight[cache.places] += dy",
        ),
    ),
    *bugs(
        "torch_impl/positions.py",
        (
            "sines_before_cosines",
            "All sines come first, then all cosines.",
            "torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)",
            "torch.cat([angle.sin(), angle.cos()], dim=-1)",
        ),
        (
            "table_stays_rounded",
            "A model that is moved to float64 keeps the table that it had in float32.",
            "self.table = table.to(self.table.device)",
            "self.table = self.table.to(table.dtype)",
        ),
    ),
    *bugs(
        "ref_numpy/rope.py",
        (
            "clockwise",
            "Pairs turn the other way round.",
            "a * cos - b * sin, a * sin + b * cos, config",
            "a * cos + b * sin, b * cos - a * sin, config",
        ),
        (
            "gradient_turns_on",
            "The gradient is turned forward again, not back.",
            "da * cos + db * sin, db * cos - da * sin",
            "da * cos - db * sin, db * cos + da * sin",
        ),
        (
            "frequencies_of_half_the_width",
            "The exponent of the base lacks its 2.",
            "-2.0 * pairs / config.head_width",
            "-1.0 * pairs / config.head_width",
        ),
        (
            "scale_stretches",
            "Position interpolation multiplies places where it ought to divide.",
            "places / config.rope_scale",
            "places * config.rope_scale",
        ),
    ),
    *bugs(
        "torch_impl/rope.py",
        (
            "sine_for_cosine",
            "The table of sines holds cosines.",
            "angles.sin().to(device, dtype)",
            "angles.cos().to(device, dtype)",
        ),
        (
            "interleaved_not_woven",
            "In the interleaved layout the angles of the pairs stand one after the other, twice.",
            "torch.stack([first, second], dim=-1).flatten(-2)",
            "torch.cat([first, second], dim=-1)",
        ),
        (
            "not_a_rotation",
            "Both features of a pair have their sines added, where the first ought to lose its own.",
            "by_feature(-sin, sin)",
            "by_feature(sin, sin)",
        ),
        (
            "angles_in_float32",
            "The exponents of the frequencies are rounded to float32.",
            "config.head_width, 2, dtype=torch.float64)",
            "config.head_width, 2, dtype=torch.float32)",
        ),
        (
            "table_stays_rounded",
            "A model that is moved to float64 keeps the angles that it had in float32.",
            "self._fill(self.cos.dtype, self.cos.device)\n        return self",
            "return self",
        ),
    ),
    *bugs(
        "ref_numpy/alibi.py",
        (
            "slopes_begin_at_one",
            "The first head's slope is 1, for h counts from 0.",
            "for h in range(1, power + 1)]",
            "for h in range(power)]",
        ),
        (
            "queries_at_the_start",
            "After a past, distances are counted as if the queries came first.",
            "np.arange(keys - queries, keys)",
            "np.arange(queries)",
        ),
    ),
    *bugs(
        "torch_impl/alibi.py",
        (
            "between_from_the_second",
            "Of the slopes between, the even ones are taken.",
            "range(1, 2 * (n_head - power), 2)",
            "range(2, 2 * (n_head - power) + 1, 2)",
        ),
        (
            "far_keys_preferred",
            "The bias has the wrong sign.",
            "return (-torch.as_tensor(slopes",
            "return (torch.as_tensor(slopes",
        ),
    ),
]
