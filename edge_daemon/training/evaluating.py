"""A release measured on the device's own rows, beside what it would replace; the agent's part of a trial.

One model at a time is in memory. A release that does not load, or gives no number, is at fault itself; a base, data or
memory that is missing is this device's matter.
"""

from __future__ import annotations

import gc
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from edge_daemon.protocol import Evaluate, Evaluated, Unfit
from edge_daemon.training import fetching
from edge_daemon.training.control import Control, Stopped
from shared import release_pack
from shared.errors import DecodeError
from shared.modeling import evaluation, released, weights
from shared.modeling.base_model import Base
from shared.modeling.data import DataStore
from shared.modeling.faults import AdapterFault, BitsFault, DataFault, ModelFault, is_out_of_memory
from shared.release_messages import MOST, Score

log = logging.getLogger(__name__)
_BATCH = 16


@dataclass(frozen=True)
class Trial:
    """One order, on `device`; `store`: tokenised data, shared with training."""

    order: Evaluate
    control: Control
    device: str
    store: DataStore

    def run(self) -> Evaluated | Unfit:
        """The answer."""
        try:
            return self._measure()
        except AdapterFault as error:
            return self._unfit("load", error)
        except BitsFault as error:
            return self._unfit("bits", error)
        except ModelFault as error:
            return self._unfit("base", error)
        except DataFault as error:
            return self._unfit("data", error)
        except OSError as error:  # a file of the base or the disk: not the release's fault
            return self._unfit("base", error)
        except Stopped as stop:
            return self._unfit("stopped", stop)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                log.exception("the release can't be measured")
                return self._unfit("load", error)
            return self._unfit("memory", "memory ran out")

    def _measure(self) -> Evaluated | Unfit:
        order = self.order
        base = self._base()
        before = self._score(*self._before(base)) if order.data_path else None
        gc.collect()
        folder = Path(order.folder)
        model = released.opened(
            folder, order.kind, base, order.task, order.bits, self.device, self.control.poll
        )  # fmt: skip
        if not all(map(math.isfinite, released.says(model))):
            return self._unfit("score", "it answers with what is no number")
        after = self._score(model, order.release) if order.data_path else None
        if order.data_path and after is None:
            return self._unfit("score", "its loss is no number")
        if base is not None:
            released.name_base(folder, base)
        return Evaluated(release=order.release, before=before, after=after)

    def _base(self) -> Path | None:
        """The base's folder, fetched where its owner allows; None: a whole model, and no base here to compare with."""
        order = self.order
        if not order.base_path and order.source is None:
            return None
        if order.base_path or order.source is None:
            folder = weights.resolve(order.base_path, order.base.revision, hub=order.hub)
        else:
            folder = fetching.fetch(order.source, Path(order.bases_dir), order.disk_reserve, self.control.poll)
        digest = weights.base_digest(folder, Path(order.digests_path) if order.digests_path else None)
        if digest != order.base_digest:
            raise ModelFault(f"{folder}: digest {digest[:12]}, the release is for {order.base_digest[:12]}")
        return folder

    def _before(self, base: Path | None) -> tuple[Base | None, str]:
        """What is in use now, if it is for the same task and base; else the untuned base. With its name.

        Of another base the loss is no measure: it counts other tokens.
        """
        order, poll = self.order, self.control.poll
        if order.previous:
            previous = Path(order.previous)
            try:
                about = release_pack.about(previous)
                if (about.task, about.base_digest) == (order.task, order.base_digest):
                    opened = released.opened(previous, about.kind, base, order.task, order.bits, self.device, poll)
                    return opened, about.release
            except (DecodeError, AdapterFault, ModelFault, OSError, ValueError) as error:
                log.warning("what is in use can't be opened, the untuned base is compared with: %s", error)
        if base is None:
            return None, ""
        return released.untuned(base, order.task, order.bits, self.device, order.seed, poll), "base"

    def _score(self, model: Base | None, of: str) -> Score | None:
        """None: there is no model, or it gives no number."""
        if model is None:
            return None
        order = self.order
        data = self.store.load(
            order.data_path, order.task, model.tokenizer, order.base_digest, hub=order.hub, beat=self.control.poll
        )
        kept = data.held_out(order.hold_out)
        trained_on = order.trained_on and not kept.rows
        data = kept.some(1.0, order.rows) if kept.rows else data.some(order.share, order.rows)
        found = evaluation.evaluate(model, data, _BATCH, self.control.poll)
        if not found.loss <= MOST:
            return None  # NaN among them
        return Score(loss=found.loss, rows=found.rows, accuracy=found.accuracy, trained_on=trained_on, of=of)

    def _unfit(self, kind: str, reason: object) -> Unfit:
        return Unfit(release=self.order.release, kind=kind, reason=str(reason)[:500])  # type: ignore[arg-type]  # one of its words
