"""The outbox and what became of work: an update stays until the coordinator has settled it; work ends once."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from edge_daemon.core import commands as cmd
from edge_daemon.core import events as ev
from edge_daemon.core import presence
from edge_daemon.core.presence import Result
from edge_daemon.core.state import KEPT_FINISHED, Finished, Identity, Offer, State, identity_of


def offer(state: State, new: Offer) -> Result:
    """Put a trained update into the outbox; its identity is never trained again."""
    journal = msgspec.structs.replace(state.journal, outbox=(*state.journal.outbox, new))
    note = cmd.Note(
        "info", f"{new.identity}: trained {new.facts.samples} samples ({new.facts.ended}), update {new.sha[:12]}"
    )
    return replace(state, journal=journal), [cmd.Adopt(new.identity, new.sha), cmd.DropWork(new.identity), note]


def settled(state: State, event: ev.Settled) -> Result:
    """The coordinator decided: forget the offer. An unknown one was settled before."""
    done = event.done
    known = [offer for offer in state.journal.outbox if offer.sha == done.sha]
    commands: list[cmd.Command] = []
    for one in known:
        state = _remove(state, one.sha)
        end = Finished(**one.identity._asdict(), verdict=done.verdict, reason=done.reason)
        state, more = finish(state, end)
        commands += [*more, cmd.DropWork(one.identity)]
        if done.verdict != "stored":
            commands.append(
                cmd.Note("warning", f"update of {one.identity} is {done.verdict}: {done.reason or 'no reason given'}")
            )
    if known:
        count = state.settled.get(done.verdict, 0) + len(known)
        state = replace(state, settled={**state.settled, done.verdict: count})
        commands += drop_blob(state, done.sha)
    return state, commands


def lost(state: State, event: ev.OfferLost) -> Result:
    """The file of an offer is gone: its work, if it is still the desired one, is to be done again."""
    gone = [offer.identity for offer in state.journal.outbox if offer.sha == event.sha]
    if not gone:
        return state, []
    state = _remove(state, event.sha)
    if state.work is not None and identity_of(state.work) in gone:
        state = replace(state, accepted=False, adapter_there=False)
    return state, [cmd.Note("error", f"update {event.sha[:12]} is lost: {event.reason}")]


def asked_amiss(state: State, event: ev.WantUnfit) -> Result:
    """It asks by what it was told before the broker's limit changed: the offer is announced at once, with what fits."""
    if all(offer.sha != event.sha for offer in state.journal.outbox):
        return state, []
    rest = {sha: when for sha, when in state.announcing.items() if sha != event.sha}
    note = cmd.Note("info", f"update {event.sha[:12]} is announced anew: asked for {event.reason}")
    return replace(state, announcing=rest), [note]


def finish(state: State, done: Finished) -> Result:
    """Note the end of a piece of work, and tell the coordinator where it does not know."""
    rest = tuple(old for old in state.journal.finished if old.identity != done.identity)
    journal = msgspec.structs.replace(state.journal, finished=(*rest, done)[-KEPT_FINISHED:])
    return replace(state, journal=journal), presence.ack_finished(state, done)


def fail(state: State, identity: Identity, reason: str, *, out_of_memory: bool = False, batch_limit: int = 0) -> Result:
    """Give up a piece of work. `batch_limit`: the largest batch that fits, where memory ran out; 0: none does."""
    if not out_of_memory and state.journal.batch_limit:
        # What an earlier agent of this work was killed for stays true, whatever the last one could not do.
        out_of_memory, batch_limit = True, state.journal.batch_limit
    end = Finished(
        **identity._asdict(), verdict="failed", reason=reason, out_of_memory=out_of_memory, batch_limit=batch_limit
    )
    state, commands = finish(state, end)
    return state, [*commands, cmd.DropWork(identity), cmd.Note("error", f"{identity} failed: {reason}")]


def fetch_again(state: State) -> list[cmd.Command]:
    """Ask once more for the global adapter under way, if there is one."""
    work = state.work
    if work is None or not state.accepted or state.adapter_there:
        return []
    return [cmd.Fetch(work.adapter, work.chunk)]


def drop_blob(state: State, sha: str) -> list[cmd.Command]:
    """Remove a content, unless an offer or the current work still refers to it."""
    wanted = state.journal.assignment
    used = {offer.sha for offer in state.journal.outbox} | ({wanted.adapter.sha} if wanted else set())
    return [] if sha in used else [cmd.DropBlob(sha)]


def _remove(state: State, sha: str) -> State:
    left = tuple(offer for offer in state.journal.outbox if offer.sha != sha)
    announcing = {name: when for name, when in state.announcing.items() if name != sha}
    return replace(state, journal=msgspec.structs.replace(state.journal, outbox=left), announcing=announcing)
