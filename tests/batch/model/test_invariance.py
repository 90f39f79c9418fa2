"""float32 on the CPU: a sequence's logits are the same bits whatever shares its steps and however it is cut."""

import random

import pytest
import torch

from tests.batch.model.driver import Driver, Row
from tests.batch.model.test_text_parity import random_ids


def logits_in_company(model, ids, rng):
    """Logits [len(ids), V] of `ids` fed in random pieces among random other sequences that come and go."""
    driver, row, out = Driver(model, num_blocks=512), Row(list(ids)), []
    company: list[Row] = []
    while row.done < len(row.tokens):
        if len(company) < 6 and rng.random() < 0.7:
            company.append(Row(random_ids(rng.randint(1, 100), seed=rng.randint(0, 10**6))))
        work = [(row, next(driver.pieces(row, rng.choice([1, 2, 3, 7, 19, 32]))))]
        for other in company:
            work.append((other, next(driver.pieces(other, rng.choice([1, 1, 5, 32])))))
        rng.shuffle(work)
        place = [member for member, _ in work].index(row)
        out.append(driver.step(work, all_logits=True)[place])
        company = [other for other in company if other.done < len(other.tokens)]
    return torch.cat(out)


@pytest.mark.parametrize("name", ["scout", "maverick"])
@pytest.mark.parametrize("seed", range(4))
def test_company_and_cuts_do_not_change_a_bit(request, name, seed):
    model = request.getfixturevalue(name)
    ids = random_ids(75, seed)
    alone = Driver(model).logits(Row(ids))
    assert torch.equal(logits_in_company(model, ids, random.Random(seed)), alone)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(scout, threads):
    ids = random_ids(60, seed=5)
    before = torch.get_num_threads()
    expected = Driver(scout).logits(Row(ids))
    try:
        torch.set_num_threads(threads)
        assert torch.equal(Driver(scout).logits(Row(ids), 11), expected)
    finally:
        torch.set_num_threads(before)


def test_block_size_does_not_change_a_bit(scout):
    ids = random_ids(60, seed=6)
    expected = Driver(scout, block_size=8).logits(Row(ids))
    for block_size in (4, 12, 32):
        assert torch.equal(Driver(scout, block_size=block_size).logits(Row(ids), 9), expected)
