"""Nodes of a simulated fleet: the real runtimes of coordinator and daemons around virtual devices and a real model."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from coordinator import runtime as coordinator_runtime
from coordinator.adapters.worker import Top
from coordinator.core.planning.cost_model import CostModel
from coordinator.core.planning.demand import demand
from coordinator.core.planning.lower_part import demand_of
from coordinator.core.records import AnyRecord, RoundCommitted, RoundPlanned, UpdateAdmitted
from coordinator.settings import CoordinatorSettings
from coordinator.workers import protocol as worker_wire
from coordinator.workers.model_worker import ModelWorker
from edge_daemon import protocol
from edge_daemon.adapters.trainer import AgentSpoke, Trainer
from edge_daemon.core.state import Identity, Machine, identity_of
from edge_daemon.settings import EdgeSettings
from muster.testbed import device_model as dm
from muster.testbed.gradients import Workers
from muster.testbed.memory_fleet import VirtualFleet
from muster.testbed.memory_nodes import COORDINATOR, FLEET, Answers, CoordinatorNode, DeviceNode
from muster.testbed.memory_process import History, World
from muster.testbed.simulated import Expected, Watched
from muster.testbed.virtual_device import VirtualDevice
from muster.testbed.virtual_split import Bench
from muster.testbed.virtual_top import VirtualTop
from muster.testbed.virtual_trainer import Splitting, VirtualTrainer
from shared.blob_folder import BlobFolder
from shared.frames import FrameWriter
from shared.messages import Load
from shared.settings import BrokerSettings
from shared.transport.memory_network import Faults, MemoryNetwork

LATENCY_S = (0.01, 0.03)
IDLE_TICK_S = 2.0
EVALUATION_THREADS = 2
_JOIN_AGAIN_S = 5.0
"""Between looks at the clock of a daemon that nothing happens to: events are handled when they come."""


class NoHistory(History):
    """Nothing is checked here: a virtual device's update is what the real agent wrote."""

    def note_admitted(self, record: object, blobs: BlobFolder) -> None:
        """Nothing is kept."""


class ModelNode(CoordinatorNode):
    """The coordinator with the worker that knows the model, in this process."""

    def __init__(self, world: World, folder: Path, settings: CoordinatorSettings, evaluator: ModelWorker) -> None:
        super().__init__(world, folder, settings)
        self._answers = _Evaluating(evaluator)

    def worker(self) -> Answers:
        """Real evaluation on real text."""
        import torch

        # The processes that compute gradients rest meanwhile. Not their number: results must not depend on it.
        torch.set_num_threads(EVALUATION_THREADS)
        return self._answers

    def top(self) -> Top:
        """The real one, on the virtual clock."""
        self._top = VirtualTop(self.world.network, self.later, lambda reply: self.post(coordinator_runtime.Call(reply)))
        return self._top

    def _close(self) -> None:
        self._top.stop()
        super()._close()


def evaluator() -> ModelWorker:
    """The coordinator's model worker, for use in this process; it keeps its base from run to run."""
    return ModelWorker(FrameWriter(io.BytesIO()))


class _Evaluating:
    """The model worker as an `Answers`."""

    def __init__(self, worker: ModelWorker) -> None:
        self._worker = worker

    def answer(self, request: worker_wire.Prepare | worker_wire.Evaluate) -> worker_wire.FromWorker:
        """Serve one request."""
        return self._worker.answer(request)


class VirtualNode(DeviceNode):
    """The daemon of a virtual device. `rows`: of its data set; `scratch`: where updates are computed."""

    tick_s = IDLE_TICK_S

    def __init__(
        self, world: World, folder: Path, settings: EdgeSettings, device: VirtualDevice, rows: int, workers: Workers,
        scratch: Path, blob: Callable[[str], Path | None], splitting: Splitting | None = None,
    ) -> None:  # fmt: skip
        super().__init__(world, folder, settings)
        self.device = device
        self._rows = rows
        self._workers = workers
        self._scratch = scratch
        self._blob = blob
        self._splitting = splitting
        self._trainer: VirtualTrainer | None = None
        self._ahead: Identity | None = None

    def agent(self, post: Callable[[AgentSpoke], None]) -> Trainer:
        """An agent on the virtual clock."""
        self._trainer = VirtualTrainer(
            self.device, self._rows, self._workers, self._scratch, post, self.later, lambda: self.now, self._splitting
        )
        return self._trainer

    def machine(self) -> Machine:
        """The device's static facts."""
        return self.device.machine()

    def load(self) -> Load:
        """What its sensors read now."""
        return self.device.load(self.now)

    def _close(self) -> None:
        if self._trainer is not None:
            self._trainer.kill("its daemon ended")
        self.device.end_process(self.now)
        self._workers.forget(self.client_id)
        super()._close()

    def _handle(self, event: object) -> None:
        super()._handle(event)
        work = self.runtime.state.work
        if work is None or not self.runtime.state.accepted or self._ahead == identity_of(work):
            return
        if work.work.split is not None:
            return  # its gradients come from the top worker
        # The global adapter is the same blob everywhere: work can be computed while it is still being fetched.
        self._ahead, path = identity_of(work), self._blob(work.adapter.sha)
        if path is not None and self._trainer is not None:
            self._trainer.ahead(
                protocol.Train(
                    assignment=work, base_path=self.settings.models.get(work.base.model, work.base.model),
                    data_path=self.settings.data[work.task.dataset], adapter_path=str(path), device=self.client_id,
                    update_path="", checkpoint_dir="", train_for_s=work.work.train_for_s,
                )
            )  # fmt: skip


class SimulatedFleet(VirtualFleet):
    """A coordinator with its model worker, and virtual devices that join, leave and crash as their draws say."""

    def __init__(
        self, root: Path, devices: list[VirtualDevice], *, data: dict[str, Path], rows: dict[str, int], dataset: str,
        models: dict[str, str], workers: Workers, evaluator: ModelWorker, seed: int,
        labels: Mapping[str, dict[str, int]] | None = None,
    ) -> None:  # fmt: skip
        """`labels`: of each device's rows, where the job is of split learning, whose planner asks for them."""
        network = MemoryNetwork(seed, Faults(delay_s=LATENCY_S))
        self._by_name = {device.model.name: device for device in devices}
        self._clock = devices[0].clock  # which the whole fleet shares
        network.rate = self._rate
        broker = BrokerSettings(keepalive_s=30, reconnect_max_s=4.0)
        world = World(network, broker, NoHistory())
        settings = CoordinatorSettings(
            fleet=FLEET, state_dir=str(root / "coordinator"), models=models,
            broker=BrokerSettings(keepalive_s=30, window=32, queue=4096),
        )  # fmt: skip
        coordinator = ModelNode(world, root / "coordinator", settings, evaluator)
        coordinator.on_append = self._on_append
        scratch = root / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        bench = Bench()
        nodes = {
            name: VirtualNode(
                world, root / "devices" / name,
                EdgeSettings(
                    fleet=FLEET, device=name, state_dir=str(root / "devices" / name), broker=broker, models=models,
                    data={dataset: str(data[name])},
                ),
                device, rows[name], workers, scratch, lambda sha: coordinator.blobs.path(sha),
                Splitting(bench, labels[name]) if labels is not None else None,
            )
            for name, device in self._by_name.items()
        }  # fmt: skip
        super().__init__(network, coordinator, nodes)
        self._nodes = nodes
        self._watched = Watched({}, {}, {}, {})
        self.expected: dict[int, dict[str, Expected]] = {}
        """Round -> participant -> what its work should take."""
        self.happened: list[tuple[float, str, dm.Happening]] = []

    def start(self) -> None:
        """Start the coordinator, and let every device join when its time comes."""
        self.coordinator.start()
        for name, device in self._by_name.items():
            self._next(name, dm.happenings(device.model))

    def _next(self, name: str, happenings: Iterator[tuple[float, dm.Happening]]) -> None:
        """Schedule what happens next to a device, and with it what comes then."""
        found = next(happenings, None)
        if found is None:
            return
        at, what = found
        happen = self._happening(name, what)

        def due() -> None:
            happen()
            self._next(name, happenings)

        self.network.schedule(at, due)

    def _happening(self, name: str, what: dm.Happening) -> Callable[[], None]:
        node = self._nodes[name]

        def happen() -> None:
            if what == "join" and node.alive:
                # It may still be leaving.
                self.network.schedule(self.network.now + _JOIN_AGAIN_S, happen)
                return
            if what != "join" and not node.alive:
                return
            self.happened.append((self.network.now, name, what))
            if what == "join":
                node.start()
            elif what == "leave":
                node.leave()
            else:
                node.kill()

        return happen

    def _rate(self, client: str, _way: str) -> float:
        device = self._by_name.get(client)
        return device.bandwidth(self.network.now) if device is not None else float("inf")

    def watched(self) -> Watched:
        """What was seen so far, in seconds since the start."""
        return self._watched

    def _on_append(self, when: str, records: Sequence[AnyRecord]) -> None:
        """The round under way sets power modes and bandwidths; what the records do not tell is noted."""
        now, watched = self.network.now, self._watched
        for record in records if when == "before" else ():
            match record:
                case RoundPlanned():
                    self._clock.round = record.round
                    watched.planned_at[record.round] = now
                    self.expected[record.round] = self._expected(record)
                case UpdateAdmitted():
                    watched.admitted_at[record.round, record.device] = now
                case RoundCommitted():
                    self._clock.committed = record.round
                    watched.committed_at[record.round] = now
                    carried = [
                        (way, size) for (client, way), size in self.network.carried.items() if client != COORDINATOR
                    ]
                    up, down = (sum(size for way, size in carried if way == wanted) for wanted in ("up", "down"))
                    watched.bytes_at[record.round] = up, down
                case _:
                    pass

    def _expected(self, record: RoundPlanned) -> dict[str, Expected]:
        """What each participant trains, and the bytes that the planner's cost model expects it to hold."""
        job = self.coordinator.runtime.state.jobs[record.job]
        model = getattr(job.planner, "model", None)
        found: dict[str, Expected] = {}
        if job.facts is None:
            return found
        for device, work in record.plan.participants.items():
            known = self.coordinator.runtime.state.fleet.get(device)
            split = work.split is not None
            need = demand_of(job.facts, job.spec, work) if split else demand(job.facts, job.spec, work.ranks)
            peak = 0
            if isinstance(model, CostModel) and known is not None and known.info is not None:
                peak = int(model.memory(device, need, work.bits, work.batch, known.info)[0])
            found[device] = Expected(peak, need.adapter_params)
        return found
