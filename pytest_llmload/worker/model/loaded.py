"""What a load gave, as the checks and probes see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llmload.core.job import Job
from pytest_llmload.system.scratch import Scratch
from pytest_llmload.worker.adapters.attached import Attached
from pytest_llmload.worker.adapters.files import AdapterFiles
from pytest_llmload.worker.checkpoints.files import CheckpointFiles
from pytest_llmload.worker.checkpoints.names import CheckpointNames
from pytest_llmload.worker.model.tensors import Inventory

if TYPE_CHECKING:
    from pytest_llmload.worker.model.logits_monitor import LogitsMonitor
    from pytest_llmload.worker.model.padded_run import PaddedRun
    from pytest_llmload.worker.model.shards import Shards

#: One of these is there where a checkpoint has a tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass
class Loaded:
    """A live model in its process."""

    job: Job
    model: Any
    #: The module of torch.compile, or of data parallelism, around the model, where the user's loader returned one.
    wrapper: Any = None
    #: The one that the loading code gave with the model.
    given_tokenizer: Any = None
    #: transformers' loading info: missing_keys, unexpected_keys, mismatched_keys, error_msgs.
    #: None where the loading code does not say (a user's own loader).
    loading_info: dict[str, list[str]] | None = None
    #: True if the user's own loader made the model, so that nothing is known of it but what the spec says.
    own_code: bool = False
    #: Modules that a user's own loader returned in training mode; they were measured in evaluation mode.
    trained: tuple[str, ...] = ()
    #: Device map that the strategy decided on before the load: module -> ``0``, ``cpu``, ``disk``.
    planned_map: dict[str, Any] | None = None
    #: What each tensor is of the whole model, where the load is split over ranks.
    shards: Shards | None = None
    #: What the libraries logged at WARNING or above during the load.
    log: list[str] = field(default_factory=list)
    #: Facts worth telling that are not a failure.
    notes: list[str] = field(default_factory=list)
    #: Why there is no tokenizer.
    tokenizer_error: str = "the checkpoint has none"
    #: Names of the weights that were quantised before the first forward -> their scheme then, and their bytes.
    quantised: dict[str, tuple[str, int]] = field(default_factory=dict)
    #: Inputs that the model cannot run without although its forward names them as optional, as its error said.
    named_inputs: tuple[str, ...] = ()
    #: Output of the first forward, batch x position x vocabulary, until the probes have read it.
    logits: Any = None
    #: What the logits of the workload's tokens were; None before it was generated.
    logits_monitor: LogitsMonitor | None = None
    #: How the library renamed and fused tensors while it loaded the model (transformers 5); None: ask the model.
    #: Loading an adapter into the model replaces what it says there.
    conversions: list[Any] | None = None
    #: First forward's logits and the tokens of the workload, on the host; kept where they are compared with those of
    #: the model loaded whole.
    kept_logits: Any = None
    kept_tokens: Any = None
    #: A generation on a padded batch, run after all figures; None before, and where the model does not run one.
    padded_run: PaddedRun | None = None
    #: What the model needs besides itself: an engine that it was taken out of.
    engine: Any = None
    #: The folder of weights on disk, where the load made one.
    scratch: Scratch | None = None
    _inventory: Inventory | None = field(default=None, repr=False)
    _names: CheckpointNames | None = field(default=None, repr=False)
    _attached: Attached | None = field(default=None, repr=False)

    @property
    def outermost(self) -> Any:
        """Return what the loading code returned as its model, which a forward goes through."""
        return self.model if self.wrapper is None else self.wrapper

    @property
    def inventory(self) -> Inventory:
        """Return every tensor of the model, taken at the first use after the load or a forward."""
        if self._inventory is None:
            self._inventory = Inventory(self.model)
        return self._inventory

    @property
    def checkpoint_names(self) -> CheckpointNames:
        """Return where the checkpoint has the model's tensors, with its files open."""
        if self._names is None:
            files = CheckpointFiles(self.job.checkpoint.path)
            self._names = CheckpointNames(self.model, files, self.conversions)
        return self._names

    def forget(self) -> None:
        """Drop the inventory and the open files before a forward.

        The inventory keeps states alive that the forward may replace, open files keep pages mapped.
        """
        self._inventory = self._names = None

    def close(self) -> None:
        """Remove what lives outside the process; the model is of no use afterwards."""
        if self.scratch is not None:
            self.scratch.close()

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer that came with the model, else the checkpoint's.

        The result is None where there is none or it does not load. It is loaded at its first use: its memory is in no
        figure, and a large vocabulary takes as long as a small model.
        """
        path = Path(self.job.checkpoint.path)
        if self.given_tokenizer is not None or not any((path / file).exists() for file in _TOKENIZER_FILES):
            return self.given_tokenizer
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(path), trust_remote_code=self.job.trust_remote_code)
        except Exception as error:  # noqa: BLE001 - no load fails for its tokenizer; a request for text reports it
            self.tokenizer_error = f"{type(error).__name__}: {error}"
            return None

    @cached_property
    def adapter(self) -> AdapterFiles | None:
        """Return the files of the requested adapter."""
        return AdapterFiles(self.job.adapter.path) if self.job.adapter is not None else None

    @property
    def attached(self) -> Attached:
        """Return the adapters that are in the model, whichever code put them there."""
        if self._attached is None or self._attached.model is not self.model:
            self._attached = Attached(self.model)
        return self._attached

    @cached_property
    def merged(self) -> frozenset[str]:
        """Return names of the model's own tensors that a merged adapter changed: added to, or replaced."""
        if self.adapter is None or not self.job.spec.adapter_merged:
            return frozenset()
        if self.adapter.is_plain_lora:
            return frozenset((*(f"{target}.weight" for target in self.adapter.targets), *self.adapter.whole))
        owners = [(held, self.inventory.wrapping.owner(held.module)) for held in self.inventory.parameters()]
        modules = self.adapter.modules(owner for _, owner in owners if owner is not None)
        return frozenset(self.inventory.base_path(held) for held, owner in owners if owner in modules)

    @property
    def replaced(self) -> frozenset[str]:
        """Return names of the model's own tensors that the adapter's file has values for.

        These are merged ones, and trained biases.
        """
        if self.adapter is None or not self.attached.is_there:
            return self.merged
        own = {id(held.tensor): self.inventory.base_path(held) for held in self.inventory.parameters()}
        stored = self.attached.stored(self.inventory.state()).values()
        return self.merged | {own[id(tensor)] for tensor in stored if id(tensor) in own}

    @property
    def config(self) -> Any:
        """Return the model's configuration; None for a module that has none."""
        return getattr(self.model, "config", None)

    @property
    def text_config(self) -> Any:
        """Return the configuration of the language part, which a composite model nests."""
        config = self.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config
