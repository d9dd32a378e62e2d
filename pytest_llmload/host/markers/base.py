"""The base classes of markers: each marker is one class with its name, help, signature, reading and keyword form.

pytest's registration, ``pytest --markers``, the documentation, the validation of tests and the keywords of ``llm_load``
are all derived from these classes and the table that lists them (:mod:`pytest_llmload.host.markers.table`). The modules
of the classes are imported at every start of pytest, to register the markers: they import what reading needs inside
their methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pytest

if TYPE_CHECKING:
    from pytest_llmload.host.loads.strategies import Strategies
    from pytest_llmload.host.settings.settings import Settings

Fields = dict[str, Any]
_PARAMETER_SET = type(pytest.param())


def quoted(value: object) -> str:
    """Return a value as an error message quotes it, with late imports: most runs read markers but quote nothing."""
    from pytest_llmload.core import quoting

    return quoting.quoted(value)


class Value(NamedTuple):
    """One value of one marker: the fields of a LoadSpec that it sets."""

    fields: Fields
    id: str | None = None
    marks: tuple[pytest.Mark, ...] = ()


class Marker:
    """One marker. The first line of its docstring is its help, and ``signature`` holds the arguments it takes."""

    name: ClassVar[str]
    #: True if it states the requirements of a test on the machine, so that ``llm_load`` and ``llm_gpus`` heed it too.
    hardware: ClassVar[bool] = False

    @staticmethod
    def signature(*args: Any, **kwargs: Any) -> None:
        """Declare the marker's arguments; only the signature is used."""
        raise NotImplementedError

    @classmethod
    def usage(cls) -> str:
        """Return the marker as it is written, with its signature: ``gpu_count(n)``."""
        signature = inspect.signature(cls.signature)
        parameters = [value.replace(annotation=value.empty) for value in signature.parameters.values()]
        return cls.name + str(signature.replace(parameters=parameters, return_annotation=signature.empty))

    @classmethod
    def help(cls) -> str:
        """Return the marker's help, the first line of its docstring."""
        return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]

    @classmethod
    def bind(cls, mark: pytest.Mark, where: str) -> None:
        """Raise UsageError if the arguments of a mark do not fit the signature."""
        try:
            inspect.signature(cls.signature).bind(*mark.args, **mark.kwargs)
        except TypeError as error:
            raise pytest.UsageError(f"{where}: {cls.name}: {error}; write {cls.usage()}") from None

    @classmethod
    def keywords(cls) -> list[str]:
        """Return the names of its parameters, without ``*values``."""
        parameters = inspect.signature(cls.signature).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]


class LoadMarker(Marker):
    """A marker that says what to load: an axis of the variants of a test."""

    #: True if each of its positional arguments is a value; else all arguments together are one value.
    lists: ClassVar[bool] = False
    #: The prefix of texts of a marker that takes any text, which distinguishes it from a label of a different suite.
    telling: ClassVar[str] = ""

    def __init__(self, settings: Settings, strategies: Strategies) -> None:
        self.settings = settings
        self.strategies = strategies

    def read(self, args: tuple[Any, ...], kwargs: Fields, where: str) -> list[Value]:
        """Return the values of a mark's arguments, which fit the signature. Raises UsageError that says what to write.

        ``where`` names the test. The arguments may be ``pytest.param(...)`` only if the marker ``lists`` values.
        """
        raise NotImplementedError

    def from_keywords(self, keywords: Fields) -> tuple[tuple[Any, ...], Fields] | None:
        """Remove the marker's keywords from those of ``llm_load``; return its arguments, or None if it has none."""
        return ((keywords.pop(self.name),), {}) if self.name in keywords else None

    def extra_keywords(self) -> tuple[str, ...]:
        """Return the keywords of ``llm_load`` that the marker has beside its name."""
        return ()

    def values(self, mark: pytest.Mark, where: str) -> list[Value]:
        """Return the values that a mark lists. Raises UsageError that names the test and says what to write."""
        self.bind(mark, where)
        if self.lists:
            return self.read(mark.args, dict(mark.kwargs), where)
        # All arguments are one value, and each may be a pytest.param too.
        args = list(unpacked(mark.args, f"{where}: {self.name}"))
        kwargs = dict(zip(mark.kwargs, unpacked(mark.kwargs.values(), f"{where}: {self.name}"), strict=True))
        parts = [*args, *kwargs.values()]
        identity = next((name for _, name, _ in parts if name is not None), None)
        marks = tuple(inner for _, _, inners in parts for inner in inners)
        plain = {name: value for name, (value, _, _) in kwargs.items()}
        values = self.read(tuple(arg for arg, _, _ in args), plain, where)
        return [Value(value.fields, identity, marks) for value in values]

    def choices(
        self, args: Sequence[Any], allowed: Sequence[str], make: Callable[[Any], Fields], where: str
    ) -> list[Value]:
        """Return a value for each of the names that a marker lists, all of them among ``allowed``."""
        if not args:
            raise pytest.UsageError(f"{where}: {self.name} names nothing; write one or more of {', '.join(allowed)}")
        values = []
        for arg, identity, marks in unpacked(args, f"{where}: {self.name}"):
            if arg not in allowed:
                raise pytest.UsageError(f"{where}: {self.name}: unknown {quoted(arg)}; use one of {', '.join(allowed)}")
            values.append(Value(make(arg), identity, marks))
        return values

    def one(self, args: tuple[Any, ...], kwargs: Fields) -> Any:
        """Return the value of the marker's first parameter."""
        return args[0] if args else kwargs[self.keywords()[0]]


class LimitMarker(Marker):
    """A marker that bounds what a load may need, or says what it needs of the machine."""

    @classmethod
    def read(cls, mark: pytest.Mark, where: str) -> Any:
        """Return the limits of a mark. Raises UsageError that says what to write."""
        raise NotImplementedError


def unpacked(args: Iterable[Any], where: str) -> Iterator[tuple[Any, str | None, tuple[pytest.Mark, ...]]]:
    """Yield the values of a marker, each with its id and marks: ``pytest.param(value, marks=…, id=…)`` has them.

    Raises UsageError for a ``pytest.param`` of several values.
    """
    for arg in args:
        if isinstance(arg, _PARAMETER_SET):
            if len(arg.values) != 1:
                values = ", ".join(map(repr, arg.values))
                raise pytest.UsageError(
                    f"{where}: pytest.param({values}) has {len(arg.values)} values; give each pytest.param one"
                )
            marks = tuple(mark.mark if isinstance(mark, pytest.MarkDecorator) else mark for mark in arg.marks)
            yield arg.values[0], (arg.id if isinstance(arg.id, str) else None), marks
        else:
            yield arg, None, ()
