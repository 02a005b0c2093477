"""Do workers give the same bits in the same order, however many they are?"""

from __future__ import annotations

import pytest
import torch

from rondel.converters.errors import RondelError
from rondel.quant.workers import Workers, check_device


def test_bits_and_order_do_not_depend_on_the_number_of_threads():
    # A shape whose product torch sums in another order on two threads than on one.
    a = torch.randn(300, 3584, generator=torch.Generator().manual_seed(1))
    b = torch.randn(3584, 333, generator=torch.Generator().manual_seed(2))
    results = []
    for threads in (1, 2, 5):
        with Workers(threads) as workers:
            results.append(torch.stack(list(workers.map(lambda scale: (a * scale) @ b, (1.0, 3.0, 7.0)))))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_torch_gets_its_threads_back():
    before = torch.get_num_threads()
    with Workers(2):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_failing_piece_ends_the_work():
    def fail(item: int) -> None:
        if item == 2:
            raise ValueError("piece 2")

    with pytest.raises(ValueError, match="piece 2"), Workers(3) as workers:
        workers.run(fail, range(10))
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize("device", ["meta", "nothing"])
def test_a_device_that_cannot_compute_is_one_sentence(device: str):
    with pytest.raises(RondelError, match=f"--device {device}: torch cannot use it"):
        check_device(device)
    check_device("cpu")
