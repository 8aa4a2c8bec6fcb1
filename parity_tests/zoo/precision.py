"""Bugs in numbers of few bits: weights that are quantised, and products in float8."""

from parity_tests.zoo.bug import bugs

BUGS = [
    *bugs(
        "ref_numpy/quantise.py",
        (
            "uneven_range",
            "8 bits go to 128, which int8 does not hold.",
            "LIMITS = {8: 127, 4: 7}",
            "LIMITS = {8: 128, 4: 7}",
        ),
        (
            "truncated",
            "Values are cut off, not rounded.",
            "np.rint(groups",
            "np.trunc(groups",
        ),
        (
            "packed_halves_swapped",
            "Columns of the first half go into the high bits.",
            "nibbles[:, :half] | nibbles[:, half:] << 4",
            "nibbles[:, :half] << 4 | nibbles[:, half:]",
        ),
    ),
    *bugs(
        "torch_impl/quantise.py",
        (
            "sign_lost",
            "Negative 4-bit numbers come back positive.",
            "(signed << 4) >> 4, signed >> 4",
            "signed & 15, signed >> 4",
        ),
        (
            "scales_tiled",
            "Scales of groups are repeated in turns, not one after the other.",
            "scales.repeat_interleave(g, dim=1)",
            "scales.repeat(1, g)",
        ),
    ),
    *bugs(
        "ref_numpy/float8.py",
        (
            "scale_of_the_other_format",
            "The gradient is scaled for E5M2, but rounded to E4M3.",
            "return Scaled(round_to(x / scale, to), scale)",
            "return Scaled(round_to(x / scale, E4M3), scale)",
        ),
        (
            "no_subnormal_numbers",
            "Below the smallest normal number the steps go on getting smaller.",
            "np.maximum(exponent - 1, to.least) - to.digits",
            "exponent - 1 - to.digits",
        ),
        (
            "halves_upwards",
            "A half is rounded up, not to the even neighbour.",
            "np.rint(x / step) * step",
            "np.floor(x / step + np.float32(0.5)) * step",
        ),
        (
            "weight_gradient_of_the_input_as_it_was",
            "The gradient of W loses the scale of x.",
            "(dy8.scale * x8.scale)).astype",
            "(dy8.scale * w8.scale)).astype",
        ),
    ),
    *bugs(
        "torch_impl/float8.py",
        (
            "gradient_in_the_format_of_weights",
            "Gradients are rounded to E4M3, whose range they leave.",
            "to_float8(_filled(dy), E5M2)",
            "to_float8(_filled(dy), E4M3)",
        ),
        (
            "scale_per_sequence",
            "Each row has a largest magnitude of its own, but the first one's scale is used.",
            "x.abs().amax()",
            "x.abs().amax(-1).flatten()[0]",
        ),
        (
            "weight_not_transposed",
            "The gradient of x is multiplied by W^T.",
            "_product(dy8, _by_columns(w8), dy_scale",
            "_product(dy8, w8.t().contiguous().view_as(w8), dy_scale",
        ),
        (
            "evaluated_in_float8",
            "An evaluation rounds to float8 too, though the model is used in bfloat16.",
            "if torch.is_grad_enabled() else",
            "if True else",
        ),
        (
            "head_too",
            "The output projection computes in float8 as well.",
            "if isinstance(block, Block | CrossBlock):",
            "if isinstance(block, nn.Module):",
        ),
    ),
]
