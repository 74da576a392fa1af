"""The differences between the JAX versions we support (0.10 to 0.12), and all reading of a jaxpr's insides."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.source_info_util import NameStack
from jax.interpreters import partial_eval
from jax.sharding import PartitionSpec

from peft_jax.core.weight import Weight

if TYPE_CHECKING:
    from typing_extensions import TypeIs

LIBRARIES = ("jax", "flax", "equinox", "optax")
JITS = ("jit", "pjit")
CALLS_AND_SCANS = (*JITS, "checkpoint", "remat", "remat2", "scan")

Program = core.Jaxpr | core.ClosedJaxpr


class Scan(NamedTuple):
    """A scan equation, the same for all versions."""

    body: core.ClosedJaxpr
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int


def scan_parts(eqn: core.JaxprEqn) -> Scan:
    """The parts of a scan equation."""
    p = eqn.params
    if "ft_in" in p:  # jax >= 0.11
        consts, carry, _ = p["ft_in"].unpack()
        num_consts, num_carry = len(list(consts.vals)), len(list(carry.vals))
    else:
        num_consts, num_carry = p["num_consts"], p["num_carry"]
    return Scan(p["jaxpr"], num_consts, num_carry, p["length"], p["reverse"], p["unroll"])


class ShardMap(NamedTuple):
    """A shard_map equation, the same for all versions."""

    body: Program
    in_specs: tuple[Any, ...]
    again: Callable[..., Callable[..., Any]]


def shard_map_parts(eqn: core.JaxprEqn) -> ShardMap:
    """The parts of a shard_map equation; ``again`` makes another one of it."""
    p = eqn.params
    axes = p.get("newly_manual_axes", p.get("manual_axes"))
    again = functools.partial(
        jax.shard_map, mesh=p["mesh"], out_specs=list(p["out_specs"]), check_vma=p["check_vma"], axis_names=axes
    )
    return ShardMap(p["jaxpr"], tuple(p["in_specs"]), again)


def platforms_of(eqn: core.JaxprEqn) -> tuple[tuple[str, ...] | None, ...] | None:
    """The platforms of each branch of a ``cond`` that `jax.lax.platform_dependent` made; None of any other."""
    found: tuple[tuple[str, ...] | None, ...] | None = eqn.params.get("branches_platforms")
    return found


def closed(jaxpr: Program) -> core.ClosedJaxpr:
    """A jaxpr that an equation holds, with its constants (checkpoint's has none and is stored bare)."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def bind(eqn: core.JaxprEqn, values: list[Any]) -> list[Any]:
    """Run one equation as it stands."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def is_plain(eqn: core.JaxprEqn) -> bool:
    """Whether an equation has no effects, and its results are arrays that no mesh has a part in."""
    for variable in eqn.outvars:
        kind = variable.aval
        if not isinstance(kind, jax.core.ShapedArray) or jnp.issubdtype(kind.dtype, jax.dtypes.extended):
            return False
        if not kind.sharding.mesh.empty:
            return False
    return not eqn.effects


def is_elementwise(eqn: core.JaxprEqn) -> bool:
    """Whether an equation is a product that sums over nothing, as ``jnp.einsum`` writes ``x * gain``."""
    return eqn.primitive.name == "dot_general" and not eqn.params["dimension_numbers"][0][0]


def placeholders(eqn: core.JaxprEqn) -> list[jax.Array]:
    """Arrays of the types of an equation's results."""
    types = [type_of(variable) for variable in eqn.outvars]
    return [jnp.zeros(kind.shape, kind.dtype) for kind in types]


def is_traced() -> bool:
    """Whether a program around this one is being traced; under ``jax.disable_jit`` there is none to speak of."""
    # A result without operands is a tracer exactly inside of a traced program, where it is dead code.
    return isinstance(jax.lax.iota(jnp.int32, 1), jax.core.Tracer) and not jax.config.values["jax_disable_jit"]


def run(program: core.ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
    """Run a jaxpr: inside of a program that is being traced as one call in it, else equation by equation.

    Tracing is cheap because JAX does not go through the equations of a call again. It has to see those with effects,
    and under ``jax.disable_jit`` there are no calls.
    """
    if program.effects or not is_traced():
        return core.jaxpr_as_fun(program)(*inputs)
    return bind(call(program, "adapted"), list(inputs))


def call(program: core.ClosedJaxpr, name: str) -> core.JaxprEqn:
    """An equation that calls a program; its operands and results are to be put in."""
    (eqn,) = jax.make_jaxpr(jax.jit(lambda x: x))(0).eqns
    params = {**eqn.params, "jaxpr": program, "name": name}
    for option in ("in_shardings", "in_layouts", "donated_invars"):
        params[option] *= len(program.jaxpr.invars)
    for option in ("out_shardings", "out_layouts"):
        params[option] *= len(program.jaxpr.outvars)
    return eqn.replace(params=params, effects=program.effects)


def make_jaxpr(
    invars: list[core.Var],
    outvars: list[core.Var | core.Literal],
    eqns: list[core.JaxprEqn],
    like: core.ClosedJaxpr,
) -> core.ClosedJaxpr:
    """A closed jaxpr without constants, from ``like`` with other inputs, equations and outputs."""
    effects = set[Any]()
    for eqn in eqns:
        effects |= eqn.effects
    info = like.jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    return core.ClosedJaxpr(core.Jaxpr((), invars, outvars, eqns, frozenset(effects), info), ())


def program_of(
    eqns: Sequence[core.JaxprEqn], taken: Sequence[core.Var], made: Sequence[core.Var], like: core.ClosedJaxpr
) -> core.ClosedJaxpr:
    """Equations of a program as one of their own, without the names of where they were: who calls it has a name."""
    new = {variable: core.Var(variable.aval) for variable in taken}
    own = []
    for eqn in eqns:
        invars = [atom if is_literal(atom) else new[atom] for atom in eqn.invars]
        for variable in eqn.outvars:
            new[variable] = core.Var(variable.aval)
        source = eqn.source_info.replace(name_stack=NameStack())
        outvars = [new[variable] for variable in eqn.outvars]
        own.append(eqn.replace(invars=invars, outvars=outvars, source_info=source))
    inputs = [new[variable] for variable in taken]
    outputs: list[core.Var | core.Literal] = [new[variable] for variable in made]
    return make_jaxpr(inputs, outputs, own, like)


def without_dead_code(program: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The program with the same inputs, without equations that no output and no effect depends on."""
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars), instantiate=True)
    return core.ClosedJaxpr(jaxpr, program.consts)


def passed_through(jaxpr: core.Jaxpr) -> list[int | None]:
    """For each output of a jaxpr, the number of the input that it is; None if it is computed.

    An input that goes through a ``jit``, a checkpoint or a scan unchanged stays what it is.
    """
    source: dict[core.Var, int] = dict(zip(jaxpr.invars, range(len(jaxpr.invars)), strict=True))
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in CALLS_AND_SCANS:
            continue
        scan = scan_parts(eqn) if eqn.primitive.name == "scan" else None
        for place, inner in enumerate(passed_through(closed(eqn.params["jaxpr"]).jaxpr)):
            if inner is None:
                continue
            atom = eqn.invars[inner]
            if is_literal(atom) or atom not in source:
                continue
            if scan is None or scan.num_consts + place == inner:  # in a scan a carry or a slice in its own place
                source[eqn.outvars[place]] = source[atom]
    return [None if is_literal(atom) else source.get(atom) for atom in jaxpr.outvars]


def is_hashable(value: object) -> bool:
    """Whether a value can be the key of a dictionary."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def where(eqn: core.JaxprEqn) -> str | None:
    """File and line that wrote an equation: the innermost that is neither JAX's nor a neural-network library's.

    Inside a jitted function the record ends with it: None for one of a library.
    """
    traceback = eqn.source_info.traceback
    frames: Any = traceback.frames if traceback else ()
    for frame in frames:
        file = pathlib.Path(frame.file_name)
        if not file.name.startswith("<") and not set(LIBRARIES) & set(file.parts):
            return f"{file.name}:{frame.line_num}"
    return None


def is_literal(atom: core.Var | core.Literal) -> "TypeIs[core.Literal]":
    """Whether an operand is a literal, which holds its value."""
    return isinstance(atom, core.Literal)


def literal_key(literal: core.Literal) -> bytes:
    """The value of a literal as a key, by which 0 and -0 differ; its type is not in it."""
    return np.asarray(literal.val).tobytes()


def is_number(value: Any) -> bool:
    """Whether a value is that of a literal: a number that is known while tracing."""
    return isinstance(value, (bool, int, float, np.generic)) or (isinstance(value, np.ndarray) and value.ndim == 0)


def folded(eqn: core.JaxprEqn, atoms: Sequence[core.Var | core.Literal]) -> core.Literal | None:
    """The result of converting a literal that this program was called with; None of any other equation."""
    if eqn.primitive.name != "convert_element_type" or is_literal(eqn.invars[0]):
        return None
    (known,) = atoms
    if not is_literal(known):
        return None
    aval = type_of(eqn.outvars[0])
    return core.Literal(np.asarray(known.val).astype(aval.dtype)[()], aval)


def type_of(atom: core.Var | core.Literal) -> jax.core.ShapedArray:
    """Shape and element type of an operand that is an array."""
    return cast(jax.core.ShapedArray, atom.aval)


def is_array(value: Any) -> bool:
    """Whether a leaf of a function's arguments is traced as an array."""
    if isinstance(value, (type, np.generic)) or not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return False
    return isinstance(value, jax.Array) or jnp.issubdtype(value.dtype, np.number) or value.dtype == bool


def dense_type(weight: Weight) -> Any:
    """The shape, element type, and sharding on an explicit mesh that a function is traced on in place of a weight."""
    stored = weight.array
    if isinstance(stored, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    kind = jax.typeof(stored)
    sharding = kind.sharding.update(spec=PartitionSpec(*weight.entries(tuple(kind.sharding.spec))))
    return kind.update(shape=weight.shape, dtype=weight.dtype, weak_type=False, sharding=sharding)


def view_type(view: Any) -> Any:
    """The type of an array that a view of a weight stands for, with the mesh axes that it varies over."""
    stored = jax.typeof(view.weight.array)
    sharding = stored.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(view.shape)))
    return stored.update(shape=view.shape, dtype=view.dtype, sharding=sharding, weak_type=False)


def is_sharded(weight: Weight) -> bool:
    """Whether an axis of a weight is sharded on a mesh of explicit axes."""
    return any(entry is not None for entry in jax.typeof(weight.array).sharding.spec)


def jit_again(run: Callable[..., Any], eqn: core.JaxprEqn, donated: tuple[bool, ...]) -> Callable[..., Any]:
    """``jax.jit`` of ``run(inner jaxpr, *values)``, with the options of the equation that called the inner jaxpr."""
    p = eqn.params
    make = _jitted.__wrapped__ if p["jaxpr"].consts else _jitted  # constants are not kept alive
    return make(run, p["jaxpr"], p["name"], p["inline"], donated, p["keep_unused"], out_shardings(eqn))


def out_shardings(eqn: core.JaxprEqn) -> tuple[Any, ...]:
    """Shardings that a jitted function was given for its results, None where it was not."""
    return tuple(one if isinstance(one, jax.sharding.Sharding) else None for one in eqn.params["out_shardings"])


@functools.lru_cache(maxsize=256)  # the same function for the same jaxpr, so that its second call traces nothing
def _jitted(
    run: Callable[..., Any],
    jaxpr: core.ClosedJaxpr,
    name: str,
    inline: bool,
    donated: tuple[bool, ...],
    keep_unused: bool,
    out_shardings: Any,
) -> Callable[..., Any]:
    inner = functools.partial(run, jaxpr)
    inner.__name__ = name  # type: ignore[attr-defined]
    options: dict[str, Any] = {}
    if any(out_shardings):
        options["out_shardings"] = list(out_shardings)
    numbers = tuple(number for number, given in enumerate(donated) if given)
    return jax.jit(inner, inline=inline, donate_argnums=numbers, keep_unused=keep_unused, **options)
