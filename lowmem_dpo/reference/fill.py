"""The reference pass: score what the cache does not know yet, check a sample of what it does.

The reference is the policy at the start of the run, so this pass must run before the first update;
it goes through the very path that training scores with.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem_dpo.console import duration, name_rows, progress, say, warn
from lowmem_dpo.packs.packing import Pack, pack_trees
from lowmem_dpo.reference.cache import Fingerprint, ReferenceCache, fingerprint_difference
from lowmem_dpo.stopping import RunStopped, catch_signals
from lowmem_dpo.tokens.trees import Tree

WINDOW = 256  # pairs packed together; sorting by length within a window fills packs well
SECONDS_PER_SHARD = 30.0

Score = Callable[[Pack], Tensor]


@dataclass
class Reference:
    """Reference log-probs of a run.

    Attributes:
        logps: Tree digest to its token log-probs, [T] fp32 on the CPU.
        same_fingerprint: Whether all were scored under this run's numerics.
        num_scored: How many pairs this run had to score.
        recheck_rms: Difference of the re-scored sample, nat rms per token; None if nothing was
            cached.
        cache_error: Why not all of them could be written to the cache.
    """

    logps: dict[str, Tensor]
    same_fingerprint: bool
    num_scored: int
    recheck_rms: float | None
    cache_error: OSError | None = None

    def of(self, pack: Pack) -> Tensor:
        """[T] the reference log-probs of a pack, in the order of its rows."""
        return torch.cat([self.logps[tree.digest] for tree in pack.trees])


def prepare_reference(
    trees: Sequence[Tree],
    score: Score,
    cache: ReferenceCache,
    fingerprint: Fingerprint,
    *,
    pack_tokens: int,
    tolerance: float,
    accept_other: bool,
    seed: int,
) -> Reference:
    """Bring the cache up to date and read it.

    Args:
        trees: All pairs of the run, training and evaluation.
        score: A pack to its token log-probs [T], without gradient.
        cache: The shards of this reference.
        fingerprint: Of this run.
        pack_tokens: Tokens per micro-batch.
        tolerance: Largest rms difference per token between two correct computations, in nats.
        accept_other: Keep numbers of another fingerprint instead of scoring them again.
        seed: Chooses the sample.

    Raises:
        RunStopped: If cached numbers are not reproduced.
    """
    by_key = {tree.digest: tree for tree in trees}
    found = cache.read(list(by_key), fingerprint)
    known = dict(found.same)
    if found.other and accept_other:
        known.update(found.other)
    recheck = _recheck(by_key, known, score, pack_tokens, tolerance, seed) if known else None
    if recheck and not (accept_other and found.other):
        warn(f"cached reference numbers are reproduced to {recheck:.2e} nat per token, not exactly")
    missing = [tree for key, tree in by_key.items() if key not in known]
    say(f"reference: {len(by_key)} pairs, {len(known)} in the cache, {len(missing)} to score")
    if found.other and found.other_fingerprint is not None:
        changed = fingerprint_difference(found.other_fingerprint, fingerprint)
        if accept_other:
            say(f"reference: {len(found.other)} pairs are kept ({changed})")
        else:
            seconds = _seconds_per_pair(by_key, score, pack_tokens) * len(found.other)
            needed = duration(seconds)
            say(f"reference: {len(found.other)} pairs are scored again, about {needed} ({changed})")
    scored, unwritten = _score_missing(missing, score, cache, fingerprint, pack_tokens)
    known.update(scored)
    return Reference(
        logps=known,
        same_fingerprint=not (accept_other and found.other),
        num_scored=len(missing),
        recheck_rms=recheck,
        cache_error=unwritten,
    )


def _score_missing(
    missing: Sequence[Tree],
    score: Score,
    cache: ReferenceCache,
    fingerprint: Fingerprint,
    pack_tokens: int,
) -> tuple[dict[str, Tensor], OSError | None]:
    """Score pairs the cache lacks, writing a shard every half minute.

    A signal ends the pass after the micro-batch it falls into; what was scored is written first.

    Returns:
        The numbers, and why the last of them are not in the cache, if they are not.

    Raises:
        RunStopped: If some are not finite; names the data rows.
    """
    scored: dict[str, Tensor] = {}
    writer = _ShardWriter(cache, fingerprint)
    try:
        with catch_signals() as interrupt, progress("reference", len(missing), "pairs") as bar:
            for start in range(0, len(missing), WINDOW):
                for pack in pack_trees(missing[start : start + WINDOW], pack_tokens):
                    logps = _by_tree(pack, score(pack).cpu())
                    bad = [t.row for t in pack.trees if not logps[t.digest].isfinite().all()]
                    if bad:  # such a pair cannot be trained on
                        raise RunStopped(
                            f"the reference log-probs of {name_rows(bad)} are not finite: look at "
                            "these pairs, and at the dtype (float16 overflows where bfloat16 does "
                            "not)"
                        )
                    scored.update(logps)
                    writer.unwritten.update(logps)
                    if time.perf_counter() - writer.tried_at > SECONDS_PER_SHARD:
                        writer.write()
                    bar.advance(len(pack.trees))
                    if interrupt.requested:
                        raise KeyboardInterrupt
    finally:
        writer.write()
    return scored, writer.error


@dataclass
class _ShardWriter:
    """Writes shards; a full disk is said once, and tried again each time.

    Attributes:
        cache: Where they go.
        fingerprint: Under which numerics they were scored.
        unwritten: Pair keys to their log-probs: the next shard.
        tried_at: When one was last written, or could not be.
        error: Why the numbers since the last shard are not written.
    """

    cache: ReferenceCache
    fingerprint: Fingerprint
    unwritten: dict[str, Tensor] = field(default_factory=dict)
    tried_at: float = field(default_factory=time.perf_counter)
    error: OSError | None = None

    def write(self) -> None:
        if not self.unwritten:
            return
        try:
            self.cache.write(self.unwritten, self.fingerprint)
            self.unwritten, self.error = {}, None
        except OSError as error:
            if self.error is None:
                warn(
                    f"cannot write the reference cache in {self.cache.directory}: "
                    f"{error.strerror}; the numbers are kept in memory, and are lost with this "
                    "run unless there is room before the pass ends"
                )
            self.error = error
        self.tried_at = time.perf_counter()


def rms_difference(a: Tensor, b: Tensor) -> float:
    """Root mean square difference per token, in nats."""
    return (a - b).double().pow(2).mean().sqrt().item() if a.numel() else 0.0


def _by_tree(pack: Pack, logps: Tensor) -> dict[str, Tensor]:
    runs = logps.split([sum(counts) for counts in pack.counts])
    return {tree.digest: run.clone() for tree, run in zip(pack.trees, runs, strict=True)}


def _recheck(
    by_key: dict[str, Tree],
    known: dict[str, Tensor],
    score: Score,
    pack_tokens: int,
    tolerance: float,
    seed: int,
) -> float:
    """Score one micro-batch of known pairs again and compare."""
    pack = _sample_pack(by_key, list(known), pack_tokens, seed)
    again = _by_tree(pack, score(pack).cpu())
    rms = rms_difference(torch.cat([known[k] for k in again]), torch.cat(list(again.values())))
    if not rms <= tolerance:
        raise RunStopped(
            f"{len(again)} cached reference pairs, scored again, differ by {rms:.2e} nat rms per "
            f"token (at most {tolerance:g}): the cached numbers do not belong to this model; "
            "delete the cache folder, or set another cache_dir"
        )
    return rms


def _sample_pack(by_key: dict[str, Tree], keys: list[str], pack_tokens: int, seed: int) -> Pack:
    """One micro-batch filled with randomly drawn pairs."""
    random.Random(seed).shuffle(keys)
    sample, room = [], pack_tokens
    for key in keys:
        if by_key[key].num_tokens <= room:
            sample.append(by_key[key])
            room -= by_key[key].num_tokens
    return pack_trees(sample, pack_tokens)[0]


def _seconds_per_pair(by_key: dict[str, Tree], score: Score, pack_tokens: int) -> float:
    """Time one micro-batch, to predict how long scoring again will take."""
    pack = _sample_pack(by_key, list(by_key), pack_tokens, 0)
    begun = time.perf_counter()
    score(pack).cpu()
    return (time.perf_counter() - begun) / len(pack.trees)
