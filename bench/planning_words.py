"""What `docs/results.md` says beside its figures."""

from __future__ import annotations

from bench.planning_grid import FULL_ROUNDS, MAX_SHARE, STRONG_SKEW, UNEQUAL_BATCHES

_UNEQUAL = ", ".join(f"`{name}`" for name in sorted(UNEQUAL_BATCHES))
RECIPE = f"""\
The same for all: rank 8, at most 16 in the global adapter (of `fedadapter` any width), batch 8 (2 to 64 where a
method moves it: with 32, the fleet's GPUs are done in half of a round, which cost `fedpipe` a seventh of its time
on validation rows), Adam with LoRA+ (factors A learn at an eighth of the rate), 256 rows evaluated a round. Rivals
have one batch, as in their papers ([decision 0020](decisions/0020-rivals-have-one-batch.md)); `hetlora` is without
its paper's pruning of its own ranks, `fedadapter` without its cache of activations. Every planner knows the
devices' probes ([0022](decisions/0022-a-probe-tells-devices-apart.md)). `fedpipe` and `legend` have all devices of a
round end together ([0030](decisions/0030-devices-of-a-round-end-together.md)): who is late ends, who is early goes on
for up to a quarter of its steps, who loads its base first trains less
([0031](decisions/0031-nobody-waits-for-a-base-to-load.md)). And `legend` regulates batches, which its paper does not
([0027](decisions/0027-legend-regulates-batches.md); a study below has it with one batch). Rivals wait for their
slowest. A probe is the device's true speed in its power mode, off by 15 % by chance: but for that
planners begin without knowledge.

Below Dirichlet {STRONG_SKEW:g} no device of nine or more has over {MAX_SHARE:g} of a round's mean in {_UNEQUAL},
whose batches differ (`strategy.max_share`, chosen on validation rows): by samples alone the fleet learns the data
of its fast devices. The others have one batch, so nearly equal shares. The cap holds for each module, so the mean
of `legend` over a layer's holders comes near that of `fsr` there.

**A step is charged as ten.** In the papers a round is a local epoch, of a hundred steps and more. Here eight are
computed, so that the grid fits a day, and the clock charges each as ten: training then outweighs transfers, as
there. Work whose time is over ends between two of the ten, and a computed step counts where half of them were done. The
study of short rounds below has the other regime.

**The clock's devices.** Seconds of a step come from the real agent under CPU quotas of 0.1 to 1
(`bench/record_steps.py`): a TX2, at 0.05, is extrapolated, heat, bandwidth and noise are assumed, and no CUDA
device was there to record. What a rank adds to a step, and what tuning the whole base adds (half of a step again, for
`full`), was not recorded and goes by FLOP. The kind `gpu` is a machine of 16 cores and reports no GPU. Memory is summed
of the same parts as in the planners' model, with constants of its own: what is said of it here proves nothing.

**The order over mosquitto**: with one emulated seed its spread is the length of a round, within which `fedpipe` and
`legend` tie. Both orders have these two before `uniform` or beside it, and `hetlora` last. It is of 2026-11-30, before
0031, of which a fleet whose devices train in every round has the first round alone.

`full` ends after {FULL_ROUNDS} rounds: each takes three to six times another's to compute, and by then the others
have long arrived or given up.

"""

PARTS_OF_FEDPIPE = """\
Until 20 local steps were asked for (`strategy.warm_up_steps`), three rounds here, all modules are tuned at rank 8,
planned like `uniform` but for their common end; then those with 80 % of the score, with ranks and batches by its
two-stage search. So at Dirichlet 1 half of a run or all of it is warm-up: what is faster there is planning of batches,
and that all end together. (In the study of 80 steps the warm-up is one round.) And memory is short on no device of this
fleet with bases so small: ranks and bits hardly move. The pair of unequal memory below shows them.
"""

NOTES = {
    "e2e": """
Tested on rows cut from the training rows, others than those that rates and target were chosen on. Of the task's own
test rows none has the attributes of a training row, and a third are about restaurants that training never names:
there nobody came near the target in 40 rounds.""",
}
"""Of tasks: what a reader has to know of the target."""

TRIED = """
## Where a claim fell short, what was tried

On validation rows, or as studies below; the [lab log](lab-log.md) has the entries by their dates.

- `fedpipe` under strong skew: shares by samples, by steps and capped (2026-11-29); a choice of modules after 8, 20
  and 50 steps, where 20 are as good as 50 (2026-11-30); all modules instead of those with 80 % of the score, which is
  no longer the paper's method (a study below); ranks to 16 and longer work for fast devices (2026-11-29), both slower;
  re-scoring every 3 rounds (2026-11-30, four validation seeds, and a study below). Rounds that end together (0030) and
  wait for nobody's base to load (0031) are a fifth shorter than before both, and a third as much of them is waiting; of
  that the seeds, which differ by a half in their number of rounds, let a tenth be seen in the time.
- `fedpipe` behind full fine-tuning after as many rounds: in the time of those rounds `full` does one or two. After 120
  rounds of `fedpipe`, a quarter of the time of 30 of `full`, it was no nearer (2026-11-30, one seed). With
  rates that fall (a study below) both end higher, and 1.8 points from each other; with all directions of the global
  adapter (a study below), which gained 0.3 and 1.9 points on two validation seeds, 2.2 (2026-12-01). Three seeds can't
  tell these apart.
- Equal devices, against `fedadapter`: its rounds take 18 s where those of `fedpipe` take 24 (29 before 0030), with a
  seventh of the traffic; among unequal devices its slowest hold it up. Tried on validation rows (2026-11-30): rounds of
  three quarters and of half the time, adapters rounded to bf16 and int8 (`strategy.global_codec`): from a fifth less to
  a seventh more time. Rivals could have the rounding as well, so the grid is without.
- Traffic of `legend`: every device fetches the whole global adapter, since its forward pass needs the blocks that
  it does not tune. At rank 8 instead of 16 it is a quarter less at Dirichlet 1, and one seed in three does not
  arrive at 0.1; bounded by each layer's own rank it is the same, since energy keeps fewer (2026-11-30). The adapters of
  `fedadapter` are a fifth of LoRA's.
- Exact aggregation against zero-padding: at these ranks, 2 to 8 of a global rank of 16 and two thirds of them 2, what
  padding loses is less than what seeds differ by. At ranks 2 to 64 it is not (a study below).
- The profile's minutes are sums over runs of several days, each beside one other, and beside a few minutes of tests in
  the newest 26. They are work, not waiting: the machine of the newest 60 takes a tenth to a quarter longer for a run
  than that on which it took 56 (2026-11-30). Of a run two thirds are training, a tenth is evaluation (2026-12-01).
"""
