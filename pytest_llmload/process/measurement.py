"""One load from start to end, in a fixed order: each figure is measured at the same moment of every load."""

from __future__ import annotations

import gc
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from pytest_llmload.core.canonical import digest
from pytest_llmload.core.errors import LoadFailed
from pytest_llmload.core.job import MEMORY, Job
from pytest_llmload.core.results import LOADED, NOT_APPLIED, LoadResult, Problem
from pytest_llmload.core.units import counted
from pytest_llmload.probes.own import declared_by, own_probes
from pytest_llmload.process import job_strategies
from pytest_llmload.process.check_calls import CheckCalls
from pytest_llmload.process.given_model import as_loaded
from pytest_llmload.process.late_imports import imports_watched
from pytest_llmload.process.library_warnings import mismatches, warnings_of_libraries
from pytest_llmload.process.load_imports import import_all
from pytest_llmload.process.phases import Phases
from pytest_llmload.process.probe_calls import ProbeCalls
from pytest_llmload.quantisation.registry import method_of_config
from pytest_llmload.strategies import Refused, Strategy
from pytest_llmload.system.garbage import existing_hidden
from pytest_llmload.system.page_cache import set_page_cache
from pytest_llmload.worker.checkpoints.quantisation_config import contradiction, read_format
from pytest_llmload.worker.model.device import create_context, synchronize
from pytest_llmload.worker.parallel import world

if TYPE_CHECKING:
    from pytest_llmload.worker.model.loaded import Loaded


def new_result(job: Job) -> LoadResult:
    """Return the result of a load that has not begun."""
    digests = {"shape": job.checkpoint.shape, "weights": _weights_digest(job)}
    return LoadResult(spec=job.spec.to_json(), outcome=LOADED, digests=digests)


def measure(job: Job, phase: Callable[[str], None], into: LoadResult | None = None) -> tuple[LoadResult, Loaded | None]:
    """Load as the job says; return the measured result and the live model.

    The model is None if the checkpoint contradicts the spec, or if a library refuses the combination.

    ``phase`` is called before each of import, context, warm_up, page_cache, prepare, load, settle, applied, forward,
    logits, generate, timing, padded_batch, settings, fill, exercised and reference; their seconds add up to the load's.
    Exceptions of the import, the context and the loading call propagate; a forward or a generation that raises is a
    problem of the load, unless memory ran out. ``into`` is the result to fill: if an exception propagates, it contains
    what was measured until then. If ``job.measure`` is false, the model is loaded and nothing else is done; if
    ``job.checks`` is false, it is loaded and generates, but is not available to tests.
    """
    return Measurement(job, phase, into).measure()


class Measurement:
    """One load and its measurement; see :func:`measure`."""

    def __init__(self, job: Job, phase: Callable[[str], None], into: LoadResult | None = None) -> None:
        self.job = job
        self.result = into or new_result(job)
        self.phases = Phases(phase, self.result.phases)
        self.probes = ProbeCalls((), self.result)
        self.is_ready = False
        #: True once the loading call has returned, so that all probes have something to write.
        self._is_loaded = False

    def measure(self) -> tuple[LoadResult, Loaded | None]:
        """Load and measure; see :func:`measure`."""
        try:
            if not self.is_ready:
                self.ready()
            return self._run()
        except Exception:
            self.fill()
            raise
        finally:
            self.probes.close()

    def ready(self) -> None:
        """Do everything before the load that is not part of a figure: imports, the context, first kernels.

        It may run while the previous load is measured in a different process.
        """
        self.phases.enter("import")
        served_by = self._served_by = job_strategies.strategies(self.job)
        self._checks = self._new_checks(served_by)
        for strategy in served_by:
            strategy.prepare(self.job)
        import_all(self.job, served_by)
        compared = any(strategy.same_output for strategy in served_by)
        self._keep_output = self.job.measure and self.job.checks and compared and world.answers()
        self._import_own()
        from pytest_llmload.process.measuring_modules import kernel_warm_up

        own_code = served_by[0].own_code
        self.contradicted = "" if own_code else contradiction(self.job.spec, read_format(self.job.checkpoint.path))
        if self.contradicted:
            self.is_ready = True
            return
        self._at("start")
        self.phases.enter("context")
        create_context(self.job)
        self._at("device_ready")
        for strategy in served_by:
            strategy.context(self.job)
        self.phases.enter("warm_up")
        if note := kernel_warm_up.warm_up(self.job):
            self.result.notes.append(note)
        self.phases.leave()
        self.is_ready = True

    def _run(self) -> tuple[LoadResult, Loaded | None]:
        served_by = self._served_by
        if self.contradicted:
            return self._ended(Problem("quantised", self.contradicted))
        try:
            loaded = self._load(served_by)
        except Refused as refused:
            return self._ended(refused.problem)
        self._environment(loaded)
        if self.job.measure:
            if self.job.checks:
                self.phases.enter("applied")
                self._checks.after_load(loaded)
                self._forward(loaded)
            if self.job.generates:
                self._generate(loaded)
            self._finished(loaded)
            self.phases.enter("fill")
            self.fill()
            if self.job.checks:
                self.phases.enter("exercised")
                self._checks.after_figures(loaded)
            if self._keep_output:
                self.phases.enter("reference")
                self._checks.same_output(loaded)
                loaded.kept_logits = None
        self.phases.leave()
        loaded.forget()
        self.result.notes = list(dict.fromkeys([*self.result.notes, *loaded.notes, *loaded.log]))
        if self.result.problems:
            self.result.outcome = NOT_APPLIED
        return self.result, loaded

    def fill(self) -> None:
        """Make the probes write their figures; see :meth:`ProbeCalls.fill`."""
        self.probes.fill(is_loaded=self._is_loaded)

    def _at(self, moment: str, *args: Any) -> None:
        self.probes.at(moment, *args)

    def _new_checks(self, served_by: list[Strategy]) -> CheckCalls:
        return CheckCalls(self.job, self.result, served_by)

    def _import_own(self) -> None:
        """Import the measuring code itself, which needs torch and is therefore imported after the libraries."""
        from pytest_llmload.process.measuring_modules import generation, probes_for

        if self.job.measure:
            users = own_probes(self.job)
            self.result.declared = declared_by(users)
            probes = [probe(self.job) for probe in (*probes_for(self.job.figures), *users)]
            self.probes = ProbeCalls(probes, self.result)
            # Checked before a load that may take minutes.
            generation.check_length(self.job)

    def _ended(self, problem: Problem) -> tuple[LoadResult, None]:
        """Return the result of a load that cannot be as requested, so that there is no model."""
        from pytest_llmload.process.environment import environment

        self.result.problems.append(problem)
        self.result.outcome = NOT_APPLIED
        self.result.environment = environment(self.job)
        return self.result, None

    def _load(self, served_by: list[Strategy]) -> Loaded:
        self.phases.enter("page_cache")
        self.page_cache = set_page_cache(self.job.checkpoint.path, self.job.page_cache)
        # A rank must not read while a different one still evicts pages.
        world.agreed(self.job, True)
        self.phases.enter("prepare")
        kwargs = job_strategies.load_kwargs(self.job, served_by)
        gc.collect()
        self._at("mark")
        self.phases.enter("load")
        with existing_hidden():
            with imports_watched() as late, warnings_of_libraries() as log:
                synchronize(self.job)
                self._at("loading")
                begin = perf_counter()
                loaded = as_loaded(self.job, self._called(served_by[0], kwargs, log))
                loaded.own_code = served_by[0].own_code
                synchronize(self.job)
                self._at("returned")
                loaded = self._wrap(served_by, loaded)
                seconds = perf_counter() - begin
            self.phases.enter("settle")
            # Afterwards only the model keeps memory in use, not garbage in reference cycles.
            del kwargs
            gc.collect()
            self._at("loaded", loaded)
            self._is_loaded = True
        # Paths of this machine mean nothing where reports are read.
        loaded.log = [line.replace(self.job.checkpoint.path, self.job.spec.name) for line in log]
        self.result.phases["load"] = seconds
        if self.job.measure:
            self.result.metrics["load"] = seconds
            self.result.samples["load"] = [seconds]
        if late:
            what = counted(len(late), "module was", "modules were")
            loaded.notes.append(f"{what} imported during the load: {', '.join(late[:8])}")
        return loaded

    def _called(self, strategy: Strategy, kwargs: dict[str, Any], log: list[str]) -> Any:
        """Return what the loading call returns. Raises LoadFailed if the library only logged the actual error."""
        try:
            return strategy.load(self.job, kwargs)
        except RuntimeError as error:
            if not (unlike := mismatches(log)):
                raise
            raise LoadFailed("\n".join(["the checkpoint does not fit its config.json", *unlike])) from error

    def _wrap(self, served_by: list[Strategy], loaded: Loaded) -> Loaded:
        """Let each strategy change the loaded model; time each of them, as part of the load's time."""
        for strategy in served_by:
            if strategy.wrapping:
                begin = perf_counter()
                loaded = strategy.wrap(self.job, loaded)
                synchronize(self.job)
                self.result.phases[strategy.wrapping] = perf_counter() - begin
        return loaded

    def _environment(self, loaded: Loaded) -> None:
        from pytest_llmload.process.environment import environment

        method = method_of_config(getattr(loaded.config, "quantization_config", None))
        quantisers = (*(method.packages if method is not None else ()), *self._packages(loaded))
        self.result.environment = {**environment(self.job, quantisers), "page_cache": self.page_cache}
        attention = getattr(loaded.config, "_attn_implementation", None)
        if attention:
            self.result.environment["attn"] = str(attention)

    def _packages(self, loaded: Loaded) -> tuple[str, ...]:
        """Return the packages of the methods that hold weights: a user's loader may quantise without a config."""
        from pytest_llmload.quantisation.stored import packages_in

        return packages_in(loaded.model)

    def _forward(self, loaded: Loaded) -> None:
        from pytest_llmload.worker.model.generation import first_forward
        from pytest_llmload.worker.model.inputs import check_inputs

        loaded.forget()
        if refused := check_inputs(loaded):
            self.result.problems.append(Problem("forward", refused))
            return
        self._at("forwarding")
        self.phases.enter("forward")
        loaded.logits = self._checks.attempt("forward", loaded, lambda: first_forward(loaded))
        synchronize(self.job)
        self.phases.enter("logits")
        self._at("forwarded", loaded)
        self._checks.after_forward(loaded)
        if self._keep_output and loaded.logits is not None:
            loaded.kept_logits = loaded.logits.detach().float().cpu()
        loaded.logits = None

    def _generate(self, loaded: Loaded) -> None:
        from pytest_llmload.worker.model.generation import can_generate, generate_workload, no_single_tokens

        if self._checks.is_broken:
            return
        if why := no_single_tokens(loaded):
            names = [name for name, metric in self.result.table.items() if metric.section == "work"]
            self.result.unavailable |= dict.fromkeys(("ttft", "per_token", *names), why)
        if not can_generate(loaded):
            return
        on_logits = self._looking(loaded)
        self._at("generating")
        self.phases.enter("generate")
        tokens = self._checks.attempt("generate", loaded, lambda: generate_workload(loaded, on_logits=on_logits))
        synchronize(self.job)
        self.phases.enter("timing")
        if tokens is not None:
            if self._keep_output:
                loaded.kept_tokens = tokens.tolist()
            del tokens
            self._at("generated", loaded)

    def _finished(self, loaded: Loaded) -> None:
        """Call the probes' ``finished``, for what must not be part of a figure of memory or time."""
        from pytest_llmload.worker.model import padded_batch

        if MEMORY not in self.job.figures or not self.job.checks:
            return
        if self._checks.is_broken:
            return
        self.phases.enter("padded_batch")
        loaded.forget()
        try:
            loaded.padded_run = padded_batch.run(loaded)
        except Exception as error:  # noqa: BLE001 - the workload ran; the test does not require a padded batch
            text = " ".join(str(error).split())[:200]
            loaded.notes.append(f"the model does not run a padded batch ({type(error).__name__}: {text})")
        self.phases.enter("settings")
        self._at("finished", loaded)
        loaded.forget()

    def _looking(self, loaded: Loaded) -> Callable[[Any], None] | None:
        """Return the function that receives each token's logits; None if the first forward's are known to be wrong."""
        from pytest_llmload.worker.checks.finite import CHECK
        from pytest_llmload.worker.model.logits_monitor import LogitsMonitor

        if not self.job.checks or self._checks.found(CHECK):
            return None
        loaded.logits_monitor = LogitsMonitor(loaded.model)
        return loaded.logits_monitor.look


def _weights_digest(job: Job) -> str:
    """Return the digest of the files that the numbers depend on: the checkpoint's, and the adapter's."""
    weights = job.checkpoint.weights
    return weights if job.adapter is None else digest([weights, job.adapter.weights], len(weights) or 16)
