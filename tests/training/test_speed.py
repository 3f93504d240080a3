"""The speed that a probe measures."""

from __future__ import annotations

import time

import torch

from shared.modeling import speed


def test_a_cores_speed_is_that_of_real_products() -> None:
    told: list[str] = []
    found = speed.measured("cpu", True, told.append)
    assert told == ["measuring speed"]
    matrix = torch.full((speed.CPU_SIZE, speed.CPU_SIZE), 1 / speed.CPU_SIZE)
    begun, count = time.process_time(), 0
    while time.process_time() - begun < 0.2:
        torch.mm(matrix, matrix)
        count += 1
    own = 2 * speed.CPU_SIZE**3 * count / (time.process_time() - begun)
    assert own / 5 < found < own * 5


def test_a_device_whose_products_fail_has_no_speed() -> None:
    assert speed.measured("cuda:99", True) == 0.0
