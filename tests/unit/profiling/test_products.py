"""Products: what is one, and what it costs, against counting by hand."""

import torch
from torch import nn
from torch.nn import functional as F

from lowmem_pnn.profiling.costs import Product
from lowmem_pnn.profiling.products import products_counted


def counted(*calls: object) -> list[Product]:
    with products_counted(1) as products:
        for call in calls:
            call()  # type: ignore[operator]
    return products


def test_a_matrix_product_costs_what_the_width_of_its_left_factor_says() -> None:
    x, batch = torch.ones(6, 5), torch.ones(2, 6, 5)
    linear = nn.Linear(5, 7)
    assert counted(lambda: linear(x), lambda: x @ x.T, lambda: batch @ batch.mT) == [
        Product(6 * 7 * 5, 6 * 7 * 4), Product(6 * 6 * 5, 6 * 6 * 4), Product(2 * 6 * 6 * 5, 2 * 6 * 6 * 4)
    ]  # fmt: skip


def test_a_convolution_costs_a_kernel_for_every_output_and_a_transposed_one_for_every_input() -> None:
    x = torch.ones(2, 4, 8, 8)
    grouped, transposed = nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 2, stride=2)
    assert counted(lambda: grouped(x), lambda: transposed(x)) == [
        Product(2 * 6 * 6 * 6 * (2 * 9), 2 * 6 * 6 * 6 * 4),
        Product(2 * 4 * 8 * 8 * (6 * 4), 2 * 6 * 16 * 16 * 4),
    ]


def test_attention_costs_both_of_its_products() -> None:
    x = torch.ones(2, 3, 16, 8)
    (product,) = counted(lambda: F.scaled_dot_product_attention(x, x, x))
    assert product.macs == 2 * 3 * 16 * 16 * (8 + 8)
    assert product.nbytes == 2 * 3 * 16 * (8 + 1) * 4  # the outputs, and the logarithms of the sums


def test_what_is_cheap_or_draws_random_numbers_is_no_product() -> None:
    x = torch.ones(2, 3, 16, 8)
    norm, dropout = nn.LayerNorm(8), nn.Dropout(0.5)
    assert counted(lambda: norm(x), lambda: F.gelu(x), lambda: dropout(x), lambda: x + x) == []


def test_costs_are_given_per_sample() -> None:
    x, linear = torch.ones(4, 5), nn.Linear(5, 7)
    with products_counted(4) as products:
        linear(x)
    assert products == [Product(35, 28)]
