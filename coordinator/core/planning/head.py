"""`head`: no LoRA at all, only the model's head is trained. The floor that every method has to beat; no paper's.

Devices, batches and bits are those of `uniform`, as if LoRA were trained, so that the floor sees the same samples; the
time expected is that of the forward pass and the head.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from coordinator.core.planning.base import FleetView, Plan, RoundReport
from coordinator.core.planning.common import End, steps_reason
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import demand, dense_params
from coordinator.core.planning.readings import capacity
from coordinator.core.planning.reasons import seconds, word
from coordinator.core.planning.uniform import UniformPlanner
from shared.errors import UserError
from shared.jobs import JobSpec
from shared.messages import Work


class HeadPlanner(msgspec.Struct, frozen=True, kw_only=True):
    """See the module. What is learned is what `uniform` learns."""

    name: str = "head"
    inner: UniformPlanner = UniformPlanner()

    @property
    def model(self) -> CostModel:
        """The cost model."""
        return self.inner.model

    def learn(self, report: RoundReport) -> HeadPlanner:
        """The planner that also knows this round."""
        return replace(self, inner=self.inner.learn(report))

    def plan(self, view: FleetView, job: JobSpec) -> Plan:
        """The next round. Raises `UserError` where the base has no head, or no candidate can take part."""
        trained = dense_params(view.facts)
        if not trained:
            raise UserError(f"strategy head: task.kind {job.task.kind} has no head to train alone")
        plan = self.inner.plan(view, job)
        need = demand(view.facts, job, {})
        candidates = {candidate.device: candidate for candidate in view.candidates}
        predicted: dict[str, float] = {}
        works: dict[str, Work] = {}
        for device, work in plan.participants.items():
            candidate = candidates[device]
            free = capacity(candidate.info, candidate.load, work.agents)
            step_s, _ = self.model.step(device, need, work.bits, work.batch, free)
            rank = word("rank", 0, "0 modules tuned, only the head", f"{trained} parameters of the head")
            predicted[device], steps = steps_reason(
                job, job.rounds.local_steps, step_s, "only the head is trained", End(job.rounds.train_for_s)
            )  # fmt: skip
            works[device] = replace(work, ranks={}, reasons={**work.reasons, "rank": rank, "steps": steps})
        reason = f"only the head is trained, {seconds(max(predicted.values()))} at most expected; {plan.reason}"
        return replace(plan, participants=works, predicted_s=predicted, reason=reason)
