"""What the agent is told when it is to train: what the session machine decided, and where things lie on this disk."""

from __future__ import annotations

from pathlib import Path

from edge_daemon import protocol
from edge_daemon.adapters.store import UPDATE_FILE, Store
from edge_daemon.core import commands as cmd
from edge_daemon.core.state import identity_of
from edge_daemon.settings import EdgeSettings


def train(order: cmd.Train, settings: EdgeSettings, store: Store, adapter: Path, packet: int) -> protocol.Train:
    """The order. `adapter`: the global adapter; `packet`: bytes of the largest chunk that fits the broker's packets."""
    folder = store.work_folder(identity_of(order.assignment))
    return protocol.Train(
        assignment=order.assignment,
        device=settings.device,
        hub=settings.policy.hub,
        hold_out=settings.release.hold_out,
        base_path=order.base_path,
        data_path=order.data_path,
        adapter_path=str(adapter),
        update_path=str(folder / UPDATE_FILE),
        checkpoint_dir=str(folder),
        bases_dir=str(store.bases),
        disk_reserve=settings.policy.disk_reserve_bytes,
        digests_path=str(store.digests),
        train_for_s=order.train_for_s,
        batch_limit=order.batch_limit,
        fetch_s=order.fetch_s,
        packet=packet,
    )
