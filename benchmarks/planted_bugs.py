"""The bugs that `benchmarks/planted.py` plants: a new one is one line of `BUGS`."""

from __future__ import annotations

from typing import NamedTuple

Change = tuple[str, str, str]
"""A file of the package, a text that is in it once, and the text in its place."""


class Bug(NamedTuple):
    """A bug: its name, what it changes, the test files nearest to it, and whether their slow tests run."""

    name: str
    changes: tuple[Change, ...]
    tests: tuple[str, ...]
    slow: bool = False


def bug(name: str, path: str, old: str, new: str, *tests: str, slow: bool = False) -> Bug:
    return Bug(name, ((path, old, new),), tests, slow)


RULES = ("plain_formulas", "rules", "decays")
ENGINE = ("averager", "failing_updates", "guard", "rounding", "infinities", "cadence")
BLOCKS = (
    "applied",
    "applied_writes",
    "applied_graphs",
    "applied_orders",
    "applied_readers",
    "applied_replaced",
    "applied_threads",
)

BUGS: tuple[Bug, ...] = (
    # the core: rules and decays
    bug("a schedule read one step late", "rules/_rule.py", ".rate(tick.t) if", ".rate(tick.t - tick.elapsed) if", *RULES),
    bug("an exponential that forgets the elapsed time", "rules/_rule.py", "math.expm1(-rate * tick.elapsed)", "math.expm1(-rate)", *RULES),
    bug("a power of gamma instead of gamma + 1", "rules/_means.py", "math.expm1((self.gamma + 1) *", "math.expm1((self.gamma + 0) *", *RULES),
    bug("a uniform mean of one more", "rules/_means.py", "return {AVERAGE: 1 / tick.n}", "return {AVERAGE: 1 / max(tick.n - 1, 1)}", *RULES),
    bug("a window that fills its second slot first", "rules/_means.py", '(tick.n - 1) % self.size}": 1.0', 'tick.n % self.size}": 1.0', *RULES),
    bug("a window that weighs one slot double", "rules/_means.py", 'return {f"window.{i}": 1 / filled for i in range(filled)}', 'return {f"window.{i}": (2 if i == filled - 1 > 0 else 1) / (filled + (filled > 1)) for i in range(filled)}', *RULES),
    bug("a tail that begins one update early", "rules/_means.py", "before.t > self.start", "before.t >= self.start", *RULES),
    bug("a bema without the anchor's clock", "rules/_published.py", "since = (tick.inner or START).t", "since = tick.t", *RULES),
    bug("a bema that reads statistics as weights", "rules/_published.py", '''    def convex_readout(self, tick: Tick) -> dict[str, float]:
        return {AVERAGE: 1.0}
''', "", "running_statistics", "norms", "rules"),
    bug("an article rule that copies one call less", "rules/_published.py", "newest_copy <= self.update_after_step + 1", "newest_copy < self.update_after_step + 1", "rules", "ema", "plain_formulas"),
    bug("a ramp that is not clamped from below", "decays/_ramps.py", "return min(max(decay, self.min_decay), self.max_decay)", "return min(decay, self.max_decay)", *RULES),
    bug("a ratio of (2 + n)", "decays/_ramps.py", "9 / (10 + max(t - 1, 0.0))", "8 / (10 + max(t - 1, 0.0))", *RULES),
    # the core: the engine
    bug("a lerp in place of a copy", "_tensors.py", "            if fraction == 1:\n                if journal", "            if fraction > 1:\n                if journal", "tensors", *ENGINE),
    bug("slots in the dtype of narrow weights", "_dtypes.py", "return wanted or (torch.float32 if dtype.itemsize < 4 else dtype)", "return wanted or dtype", "tensors", *ENGINE),
    bug("a second slot that is not moved", "_tensors.py", "_lerp_alike_(slots, weights, fraction, journal)\n        else", "_lerp_alike_(rows[0], weights, fraction, journal)\n        else", "tensors", "averager"),
    bug("residues that are not reset by a copy", "_engine/rounding.py", "        torch._foreach_zero_(residues)\n", "", "rounding", "averager"),
    bug("seeds that are the same at every update", "_engine/slots.py", "seed(self.tick.n, self._name, slot, each)", "seed(self._name, slot, each)", "rounding"),
    bug("a cadence that drops the time between", "_engine/updating.py", "clock.since[1] + elapsed", "elapsed", "cadence", "averager"),
    bug("a skipped update whose time is lost", "_engine/guard.py", "self._clock.back_to(called._replace(calls=0))", "self._clock.back_to(called._replace(calls=0, elapsed=0.0))", "guard"),
    bug("a skipped update that is not counted", "_engine/guard.py", "        self.skipped += 1\n", "        self.skipped += 0\n", "guard"),
    bug("NaN that passes the guard in the last group", "_engine/guard.py", "return torch.stack(flags).all()", "return torch.stack(flags[:-1] or flags).all()", "guard"),
    bug("infinities that are looked for once", "_engine/infinities.py", "self._looked_at = self.none_in = None", "pass", "infinities"),
    bug("running statistics that are copied", "_engine/tracking.py", 'STATISTICS = ("running_mean", "running_var")', 'STATISTICS = ("running_mean",)', "running_statistics", "averager", "norms"),
    bug("buffers that a module does not save, averaged", "_engine/policies.py", '    if not item.persistent:\n        return "skip"', '    if not item.persistent and False:\n        return "skip"', "averager", "frozen"),
    bug("ties by object alone", "_engine/memory.py", "    if start is None:\n        return id(part)", "    if True:\n        return id(part)", "shared_memory"),
    bug("a wrapper's prefix that stays", "_engine/tracking.py", 'WRAPPERS = {"_orig_mod", ', "WRAPPERS = {", "wrappers", "averager"),
    bug("EMA: ignored names that are never copied", "ema.py", '("copy", "skip") if copying or fresh else ("copy",)', '("copy",)', "ema"),
    # checkpoints and files
    bug("a file without its last copies", "checkpoints/_own_format.py", 'copies = stored.under("copies/")', 'copies = stored.under("copied/")', "saving"),
    bug("a mark of rule changes that is lost", "checkpoints/_own_format.py", 'for name in ("run", "mixed", "pull") if stored.has(name)', 'for name in ("run", "pull") if stored.has(name)', "changes", "recording", "saving"),
    bug("statistics of a file read out as weights", "checkpoints/_checkpoint.py", "(convex if is_statistic(name) else plain)", "plain", "running_statistics", "saving"),
    bug("a readout in the narrowest dtype", "checkpoints/_checkpoint.py", "widest = max(specs", "widest = min(specs", "saving", "reading"),
    bug("a tied name that a file forgets", "checkpoints/_own_format.py", 'for n in (first, *e["aliases"])}', "for n in (first,)}", "saving", "shared_memory"),
    bug("checksums that nobody compares", "checkpoints/_safetensors/files.py", "            span.checksum = int(sums", "            _ = int(sums", "safetensor_files", "saving"),
    bug("a digest that nobody compares", "checkpoints/_safetensors/files.py", "if digest != wanted or not", "if not", "safetensor_files", "saving"),
    bug("files of two saves in one folder", "checkpoints/_own_format.py", "            _require_one_save(stored, tensors)\n", "", "saving", "saving_distributed", slow=True),
    bug("snapshots of two runs taken together", "checkpoints/_snapshots.py", "    if a.run != b.run:", "    if False:", "recording"),
    bug("names given twice", "checkpoints/_names.py", "    if len(set(order)) < len(order):", "    if False:", "peers_files", "peers_files_extra", "reading"),
    bug("a window's file with too few slots", "checkpoints/_own_format.py", "or _filled(rule, tick) > len(held[\"slots\"])", "", "saving", "hostile"),
    bug("coefficients that do not sum to 1", "offline/_coefficients.py", " or abs(given.sum() - 1) > _SLACK:", ":", "offline_average"),
    bug("integers from the first file", "offline/_combination.py", "        self._last = sources[-1].weights", "        self._last = sources[0].weights", "offline_average"),
    # sharding
    bug("rows that begin one rank late", "_ranks/sharding.py", "start = min(mesh.get_local_rank() * length, whole.shape[0])", "start = min(mesh.get_local_rank() * length + 1, whole.shape[0])", "sharding", slow=True),
    bug("boxes that meet by one row too many", "_ranks/shard_geometry.py", "return Box(starts, tuple(max(e - s, 0)", "return Box(starts, tuple(max(e - s, 1)", "saving_distributed", slow=True),
    bug("runs of a box that begin at 0", "_ranks/shard_geometry.py", "begin = sum(first * step for first, step in zip(box.offsets, steps, strict=True))", "begin = 0", "export_sharded", slow=True),
    bug("fingerprints without the place", "_ranks/replicas.py", "        mixed += torch.arange(start, start + mixed.numel(), device=tensor.device).mul_(_OTHER)\n", "", "replicas"),
    bug("the last rank's rows that are not gathered", "_ranks/replicas.py", "        if len(rest):\n", "        if False:\n", "sharding", slow=True),
    # the study
    bug("an early stop that waits one epoch less", "study/_course.py", "self._waited == self.plateau.stop", "self._waited + 1 == self.plateau.stop", "study_run"),
    bug("a verdict from too few seeds", "study/_statistics.py", "FEWEST_SEEDS = 8", "FEWEST_SEEDS = 2", "study_statistics"),
    bug("a claim that holds by its estimate", "study/_statistics.py", "if interval.low in claimed and interval.high in claimed:", "if interval.estimate in claimed:", "study_statistics"),
    bug("a gap over one epoch more", "study/recipes/_article_claims.py", "fmean(ema[:EARLY])", "fmean(ema[: EARLY + 1])", "study_article_claims"),
    bug("R2 with the unbiased variance", "study/recipes/_regression.py", "var(correction=0)", "var(correction=1)", "study_article"),
    bug("SWA of one epoch more", "study/recipes/article.py", "start=75 / 500", "start=74 / 500", "study_article", slow=True),
    bug("the last of equal epochs taken for the best", "study/_logbook.py", "or loss < self._least[arm]", "or loss <= self._least[arm]", "study_run"),
    bug("a claim that one of its parts is enough for", "study/_statistics.py", 'if "does not hold" in verdicts:', 'if {*verdicts} == {"does not hold"}:', "study_report_any"),
)  # fmt: skip

FAULTS: tuple[Bug, ...] = (
    bug("1. tensors of one storage are two tensors", "_engine/memory.py", "    if start is None:\n        return id(part)", "    if True:\n        return id(part)", "shared_memory"),
    bug("1. overlaps are not looked for", "_engine/refusals.py", "    if (pair := overlap(stored)) is not None:", "    if False:", "shared_memory"),
    bug("1. expanded parameters are taken", "_engine/refusals.py", "        if overlaps_itself(local(tensor)):", "        if False:", "shared_memory"),
    bug("1. conjugate and negative views are taken", "_engine/refusals.py", "    if tensor.is_conj() or tensor.is_neg():", "    if False:", "shared_memory"),
    bug("2. blocks above are not taken back first", "_engine/open_swaps.py", "involved = _involved(swap, wanted)", "involved = [swap]", *BLOCKS),
    bug("2. blocks beneath do not make way for what was replaced", "_engine/open_swaps.py", " and (other in above or not each.same())", " and other in above", "applied_replaced", slow=True),
    bug("2. what was replaced is not swapped in again", "_engine/open_swaps.py", "    _follow(again)\n", "", *BLOCKS),
    bug("2. moved tensors exchange contents where they are now", "_engine/swapped.py", "self._memory[i] if i in moved else t.detach()", "t.detach()", *BLOCKS),
    bug("2. tensors that change places overwrite each other", "_engine/swapped.py", "anew=k in shared", "anew=False", *BLOCKS),
    bug("2. two names of one tensor are not told", "_engine/swapped.py", "            for other in ties:", "            for other in ():", *BLOCKS),
    bug("2. what is written for one swap changes another", "_engine/open_swaps.py", "            each.part()", "            pass", "applied_replaced", slow=True),
    bug("3. writes in a block are not looked for", "_engine/swapped.py", "if now is not None or seen != [self._version] * len(seen):", "if now is not None:", *BLOCKS),
    bug("3. optimizers step in a block", "_engine/open_swaps.py", "        _hooks.append(register_optimizer_step_pre_hook(_refuse_step))", "        pass", *BLOCKS),
    bug("3. replaced modules keep the average", "_engine/swaps.py", "now = self.model.by_name() if self.strayed else None", "now = None if not self.strayed else {e.name: t for p in self._pairs for i in p.items for e in i.entries if (t := e.now()) is not None}", *BLOCKS),
    bug("3. what replaced a narrowed weight gets the narrowed content", "_engine/swapped.py", "self._write(i, tensor, self._places[i], ", "self._write(i, tensor, self._pairs.live[i], ", *BLOCKS),
    bug("3. tensors between each other count as one", "_engine/memory.py", " if any(_overlap(each, o) for o in others)", " if others", "shared_memory"),
    bug("4. autograd does not see the exchange", "_engine/swapped.py", "        set_versions(self._pairs.counted, [version] * len(self._pairs.counted))\n", "", *BLOCKS),
    bug("4. the versions of blocks are counted to", "_engine/swapped.py", "[before[i] + 1 for i in changed]", "[VERSIONS.fresh() for i in changed]", *BLOCKS),
    bug("5. no turns between threads", "_engine/open_swaps.py", "TURN = threading.RLock()", "import contextlib\n\n\nclass _Free(contextlib.nullcontext[None]):\n    def _at_fork_reinit(self) -> None: ...\n\n\nTURN = _Free()", *BLOCKS),
    bug("5. a file is written while another thread updates", "checkpoints/_save.py", "@open_swaps.in_turn  # a file", "# a file", "applied_threads"),
    bug("5. EMA moves while another thread's block begins", "ema.py", "    @open_swaps.in_turn\n    def update(self)", "    def update(self)", "applied_threads"),
    bug("5. another thread's block is not refused", "_engine/open_swaps.py", "    if mine.thread != swap.owner.thread or len(tasks) > 1:", "    if False:", *BLOCKS),
    bug("6. handlers run amid an exchange", "_engine/signals.py", "        if runs_below(frame, _critical, deliver.__code__):", "        if False:", "applied_signals", "applied_interrupted"),
    bug("6. an update that a signal stops is left there", "_engine/updating.py", "        self._journal.again()\n        self.run()", "        pass", "failing_updates"),
    bug("3. a call in a block takes over what was replaced there", "_engine/live.py", "if not open_swaps.is_swapped(self):", "if True:", "applied_writes"),
    bug("1. negative views are converted as they are stored", "_parts.py", "torch._foreach_copy_([part], [piece])", "part.copy_(piece)", "replaced_weights"),
    bug("1. ties of what is left out must stay", "_engine/live.py", 'kept = (item for item in tracked if item.policy != "skip")', "kept = tracked", "shared_memory"),
    bug("2. an update copies what another block has swapped", "_engine/live.py", 'open_swaps.refuse_swapped(call, self.stored())', 'open_swaps.refuse_swapped("update", self.averaged)', *BLOCKS),
    bug("2. a frozen tensor is read from another block", "_engine/readout.py", '        open_swaps.refuse_swapped("the average", [self._frozen[name]])\n', "", *BLOCKS),
    bug("2. begin takes what another block has swapped", "_engine/resumable.py", '        open_swaps.refuse_swapped(\n            "begin", [i', '        (\n            "begin", [i', *BLOCKS),
    bug("2. a file has another block's average as live weights", "checkpoints/_save.py", '        open_swaps.refuse_swapped("save", items)\n', "", *BLOCKS),
    bug("2. a file of EMA has another block's average as live weights", "checkpoints/_save.py", '        open_swaps.refuse_parts("save", list(held.items()))\n', "", "applied_readers"),
    bug("2. a pull moves what another block has swapped", "_engine/pulling.py", '    open_swaps.refuse_swapped("pull", live.averaged)\n', "", *BLOCKS),
    bug("2. a dropped averager leaves its model swapped", "_engine/applying.py", "WeakMethod(self._end),", "lambda end=self._end: end,", "applied"),
    bug("2. a copy takes what another block has swapped", "averager.py", '        open_swaps.refuse_swapped("copy", self._live.tracked)\n', "", *BLOCKS),
    bug("2. a decorated coroutine runs after its block", "_engine/applying.py", "        if any(runs_later(func) for runs_later in _RUN_LATER):", "        if False:", "applied"),
    bug("6. a signal leaves the inference mode on", "_modes.py", "InferenceMode = torch._C._InferenceMode", "InferenceMode = torch.inference_mode", "modes", slow=True),
    bug("6. a signal leaves gradients off", "_modes.py", "torch._C._set_grad_enabled(before)", "torch.set_grad_enabled(before)", "modes", slow=True),
    bug("6. a pull that a signal stops is left there", "_engine/averages.py", "        undisturbed(lambda: pull_(self._live, self.weights(name), fraction))", "        pull_(self._live, self.weights(name), fraction)", "failing_updates", slow=True),
    bug("6. a copy into the model that a signal stops is left there", "_engine/copying.py", "        undisturbed(copy)", "        copy()", "failing_updates", slow=True),
    bug("6. an update without its pull", "_engine/averages.py", "            undisturbed(both)", "            both()", "failing_updates", slow=True),
    bug("4. EMA rounds unseen by autograd", "_engine/second.py", "            item.local().copy_(slot)", "            item.local().data.copy_(slot)", "ema"),
    bug("7. EMA goes on with a shape that it overlooked", "ema.py", "        if self._live.suspect:", "        if False:", "failing_updates"),
    bug("7. EMA goes on where the two models share memory", "ema.py", "        if bound != self._bound or not self._wide.untouched(everywhere=everywhere):", "        if bound[1] != self._bound[1]:", "ema"),
    bug("7. a narrow tensor of EMA that was written to keeps its average", "_engine/second.py", "and versions(narrow) == seen", "", "ema"),
    bug("2. a tied weight that was moved, and lost its first name, does not come back", "_engine/swapped.py", "if names.get(id(t), set()) & set(items[i].names)]", "if i not in gone]", "applied_replaced"),
    bug("1. a model may have the memory of slots", "_engine/slots.py", "        if self._generation == live.generation:\n            return", "        if True:\n            return", "module"),
    bug("2. an average is read in a block on its module", "_engine/slots.py", "        if open_swaps.OPEN and self.shared():\n            slots", "        if False:\n            slots", "module"),
    bug("7. a replaced table of a shared module is not seen", "_engine/twins.py", "getattr(owner(), table, None) is not known", "False", "module"),
    bug("7. EMA stays with modules that were replaced", "ema.py", '        if self._live.model is not online or self._carrier.model is not placed["ema_model"]:', "        if False:", "ema"),
    bug("13. a late slot that the rule does not have", "_contract.py", "not _is_ours(rule) and slot not in rule.slots:", "False:", "contract"),
    bug("8. the step that makes a state is an update", "_engine/attachment.py", " and not (self._first and _makes_state()):", ":", "attach"),
    bug("11. a fraction of 0 is a lerp", "_engine/updating.py", "list(filter(_FRACTION, moves))", "list(moves)", "infinities"),
    bug("7. a replaced table of parameters is not seen", "_engine/live.py", "            if module._parameters is not table:\n                return True", "            if False:\n                return True", "replaced_weights"),
    bug("7. shapes are not looked at", "_engine/live.py", "            and list(map(FORM, tensors)) == forms\n", "", "failing_updates", "replaced_weights"),
    bug("7. a refused update leaves its slots", "_engine/slots.py", "if n > tick.n]:", "if n > tick.n and False]:", "failing_updates"),
    bug("7. a copied buffer of another shape is taken", "_engine/live.py", "if list(map(FORM, found)) != self._copied_forms:", "if len(found) < len(self.copied):", "failing_updates"),
    bug("7. an update that is left out looks at no copied buffer", "_engine/guard.py", "            self._live.copied_now()  #", "            pass  #", "failing_updates"),
    bug("7. an update looks at the first name of a tie alone", "_engine/live.py", "            and (watch.tied is None or watch.tied.same())\n", "", "shared_memory"),
    bug("7. a block looks at no tensor beside slots", "_engine/applying.py", "            or not known.places.same()\n", "            or not all(pairs.fit() for pairs in known.pairs)\n", "shared_memory"),
    bug("7. a copied averager has the model's dtype", "averager.py", "    changes.alike(state, averager._live, averager._averages, averager._updating)\n", "", "holders"),
    bug("8. each call of step is an update", "_engine/attachment.py", "        if self._depth == 0 and self._flags and", "        if self._flags and", "attach"),
    bug("10. statistics are extrapolated", "rules/_rule.py", "        return convex(self.readout(tick))", "        return self.readout(tick)", "running_statistics"),
    bug("10. Bema's clock is that of the run", "rules/_published.py", "since = (tick.inner or START).t", "since = tick.t", "plain_formulas", "rules"),
    bug("11. a constant infinity becomes NaN", "_engine/updating.py", "        if self._kept:\n            tensors.keep_(self._kept)", "", "infinities"),
)  # fmt: skip
