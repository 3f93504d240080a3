"""The job of the benchmarks that move payloads and train nothing."""

from __future__ import annotations

SIDE, RANK = 23_437, 16
"""A module of 23437 x 23437 at rank 16: an adapter of 3.0 MB."""
JOB = """
name = "overhead"
[base]
model = "{side}x{side}"
[task]
kind = "least_squares"
dataset = "points"
[rounds]
count = {rounds}
min_devices = {devices}
quorum = 1.0
local_steps = 1
[strategy]
rank = {rank}
batch = 1
batch_min = 1
batch_max = 1
global_rank = {rank}
aggregator = "{aggregator}"
"""

POLICY = {"policy": {"foreign_limit": 100.0}}
