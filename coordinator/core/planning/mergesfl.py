"""TEMPORARY"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from coordinator.core.planning.base import FleetView, Plan, RoundReport
from coordinator.core.planning.uniform import UniformPlanner
from shared.jobs import JobSpec


class MergeSflPlanner(msgspec.Struct, frozen=True, kw_only=True):
    name: str = "mergesfl"
    inner: UniformPlanner = UniformPlanner()

    def learn(self, report: RoundReport) -> MergeSflPlanner:
        return replace(self, inner=self.inner.learn(report))

    def plan(self, view: FleetView, job: JobSpec) -> Plan:
        plan = self.inner.plan(view, job)
        block = job.strategy.split.block or view.facts.blocks // 2
        low = {m.name for m in view.facts.modules if m.block < block}
        full = job.strategy.split.tuning == "full"
        works = {
            d: replace(
                w,
                ranks={} if full else {n: r for n, r in w.ranks.items() if n in low},
                split=replace(job.strategy.split, block=block),
            )
            for d, w in plan.participants.items()
        }
        return replace(plan, participants=works)
