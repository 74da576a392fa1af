"""A watch that keeps what it sees of one equation, to report it of every equation like it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn

from peft_jax.adapt.digits import Atom
from peft_jax.adapt.view import View, Watch


class Event(NamedTuple):
    """A report: the method of the watch, its arguments, and the calls inside of which it was made."""

    method: str
    arguments: tuple[Any, ...]
    calls: tuple[JaxprEqn, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Recorder:
    """Keeps the reports that a watch would get while an equation is traced.

    Attributes:
        events: The reports, in order, from inside of calls too.
        calls: The calls inside of which this recorder is.
    """

    events: list[Event] = dataclasses.field(default_factory=list)
    calls: tuple[JaxprEqn, ...] = ()

    def product(
        self, view: View, contracted: frozenset[Atom], stacked: frozenset[Atom], over: Sequence[int], looks_up: bool
    ) -> None:
        """Record the report `product`."""
        self._keep("product", _shapes(view), contracted, stacked, over, looks_up)

    def kernel(self, view: View, axes: Sequence[int], groups: int) -> None:
        """Record the report `kernel`."""
        self._keep("kernel", _shapes(view), axes, groups)

    def done(self, view: View, eqn: JaxprEqn | None, merged: bool) -> None:
        """Record the report `done`."""
        self._keep("done", _shapes(view), eqn, merged)

    @property
    def number(self) -> int:
        """The identity of the outermost recorder that this one is inside of."""
        return id(self.events)

    def inside(self, eqn: JaxprEqn) -> "Recorder":
        """A recorder that keeps reports beside those of this one."""
        return Recorder(self.events, (*self.calls, eqn))

    def _keep(self, method: str, *arguments: Any) -> None:
        self.events.append(Event(method, arguments, self.calls))

    def report(self, watch: Watch, traced: JaxprEqn, eqn: JaxprEqn) -> None:
        """Report everything to a watch, of an equation like the one that was traced."""
        for event in self.events:
            arguments = [eqn if argument is traced else argument for argument in event.arguments]
            getattr(_inside(watch, event.calls, traced, eqn), event.method)(*arguments)

    def replaced_by(self, watch: Watch, traced: JaxprEqn, eqn: JaxprEqn) -> Watch:
        """The watch as it goes on watching what an equation like the one that was traced has made."""
        return _inside(watch, self.calls, traced, eqn)


def _inside(watch: Watch, calls: Sequence[JaxprEqn], traced: JaxprEqn, eqn: JaxprEqn) -> Watch:
    for call in calls:
        watch = watch.inside(eqn if call is traced else call)
    return watch


def _shapes(view: View) -> View:
    """The view with shapes in place of arrays, which are known while they are traced alone."""
    shapes: View = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), view)
    return shapes
