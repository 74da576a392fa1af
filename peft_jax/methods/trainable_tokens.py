"""Trainable tokens: a few rows of an embedding, or outputs of a head, are trained in place of the base's.

There is no paper; numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import apply_merged
from peft_jax.core.float_types import added
from peft_jax.core.product import Lookup, Product
from peft_jax.core.targets import names_module, nothing_hit
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.fields import check_tokens
from peft_jax.methods.roles import Role
from peft_jax.methods.starts_from_weight import StartsFromWeight

ROWS, COLUMNS = "trainable_tokens_delta", "trainable_tokens_head"  # roles: tokens of an embedding, of a head
NONE = np.iinfo(np.int32).max  # from here down are indices that no matrix has


@register("TRAINABLE_TOKENS")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(StartsFromWeight, Method):
    """Trains the vectors of some tokens, and leaves all others as they are; fields and defaults are PEFT's.

    A head that is tied to an adapted embedding is adapted with it.

    Attributes:
        token_indices: Ids of the tokens.
        target_modules: Names (ends of module paths) of embeddings or heads, or one regex for whole paths; None for
            the model's input embedding.
        init_weights: True starts at the base's vectors; False at random ones.

    Raises:
        ValueError: if there are no tokens, or one is named twice or is no id.

    Example:
        >>> params = {"embed": {"embedding": jnp.ones((10, 3))}}
        >>> config = TrainableTokensConfig(token_indices=[4, 7], target_modules=["embed"])
        >>> pj.apply_adapter(params, config)["embed"]["embedding"].params["trainable_tokens_delta"].shape
        (2, 3)
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {ROWS: ("tokens", "out"), COLUMNS: ("tokens", "in")}

    on_input: ClassVar[bool] = True
    ensure_weight_tying = True  # PEFT has no such field here, and does so

    token_indices: Sequence[int] = ()
    target_modules: str | Sequence[str] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens(self.token_indices, "token_indices")

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the tokens."""
        return tuple(self.token_indices)

    def stacks_on(self, inner: Any) -> bool:
        """Whether ``inner`` trains other tokens."""
        return others(self.tokens, inner)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """A vector for each token."""
        return tokens_shape(self.token_indices, module, n_in, n_out, lookup=lookup)

    def init_on(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """The base's vectors, or random ones."""
        if self.init_weights:
            return *start_at_base(self.token_indices, base, names, adapted), base
        return *self.init(base.layout, base.shape, names, adapted, key), base

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Random vectors."""
        return jax.random.normal(key, shape)

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The tokens of each stacked layer."""
        return tokens_state(self.token_indices, adapted)

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """The matrix with the trained vectors in their places."""
        return merge_tokens(params, state, matrix)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """The base's product or lookup, with the tokens' part exchanged."""
        return apply_tokens(self, params, state, base, x, product)


@dataclasses.dataclass(frozen=True)
class Tokens(Role):
    """Tokens that are trained beside another method's matrices, its ``trainable_token_indices``.

    Attributes:
        tokens: Their ids.
    """

    tokens: tuple[int, ...]
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = TrainableTokensConfig.axes

    @property
    def label(self) -> str:
        """The config's field."""
        return "trainable_token_indices"

    def stacks_on(self, inner: Any) -> bool:
        """Whether ``inner`` trains other tokens."""
        return others(self.tokens, inner)

    def structure(self) -> tuple[Any, ...]:
        """Equal for two adapters exactly if they run in the same compiled program."""
        return (Tokens,)

    def init(
        self, config: Method, base: Weight, names: np.ndarray, adapted: np.ndarray
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The base's vectors."""
        return start_at_base(self.tokens, base, names, adapted)

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """Number of trained elements of each stacked layer."""
        return Method.sizes(params, state)

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """The matrix with the trained vectors in their places."""
        return merge_tokens(params, state, matrix)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """The base's product or lookup, with the tokens' part exchanged."""
        return apply_tokens(self, params, state, base, x, product)


def trains_tokens(config: Method) -> bool:
    """Whether an adapter trains vectors of tokens: PEFT saves no base weight of an embedding beside them."""
    return isinstance(config, TrainableTokensConfig) or config.trainable_token_indices is not None


def others(tokens: Sequence[int], rule: Any) -> bool:
    """Whether a rule trains the vectors of tokens, and none of these."""
    return isinstance(rule, TrainableTokensConfig | Tokens) and not set(tokens) & set(rule.tokens)


def tokens_by_module(
    given: Any, modules: Iterable[str], embedding: str, *, strict: bool = True
) -> dict[str, tuple[int, ...]]:
    """Which tokens ``trainable_token_indices`` means, by module.

    Args:
        given: Ids for the ``embedding``, or by name (end of a module path); None for no tokens.
        modules: Paths of the modules there are.
        embedding: Path, or its end, of the embedding of input tokens.
        strict: Whether each name has to hit a module.

    Raises:
        ValueError: if a name hits no module.
    """
    wanted = dict(given) if isinstance(given, Mapping) else {embedding: given} if given else {}
    found: dict[str, tuple[int, ...]] = {}
    modules = list(modules)
    for name, tokens in wanted.items():
        hits = [module for module in modules if names_module([name], module)]
        if not hits and strict:
            raise ValueError(nothing_hit(f"trainable_token_indices of '{name}'", name, modules))
        found |= dict.fromkeys(hits, tuple(tokens))
    return found


def tokens_shape(
    tokens: Sequence[int], module: str, n_in: int, n_out: int, *, lookup: bool
) -> dict[str, tuple[int, ...]]:
    """Shape of the trained vectors of a module.

    Raises:
        ValueError: if the module has no such tokens.
    """
    vocabulary, features = (n_in, n_out) if lookup else (n_out, n_in)
    if wrong := [token for token in tokens if token >= vocabulary]:
        raise ValueError(f"Tokens {wrong} are to be trained in '{module}', which has ids 0 to {vocabulary - 1} alone.")
    return {ROWS if lookup else COLUMNS: (len(tokens), features)}


def tokens_state(tokens: Sequence[int], adapted: np.ndarray) -> dict[str, Any]:
    """Which stacked layers have trained tokens, and which."""
    none = NONE - np.arange(len(tokens))  # all unlike, as scatters like it
    ids = np.where(adapted[..., None], np.array(tokens), none)
    return {"hit": jnp.asarray(adapted), "tokens": jnp.asarray(ids, jnp.int32)}


def start_at_base(
    tokens: Sequence[int], base: Weight, names: np.ndarray, adapted: np.ndarray
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The base's own vectors, float32, and the state."""
    (n_in, n_out), lookup = base.layout.sizes(base.shape), base.layout.lookup
    ((role, _),) = tokens_shape(tokens, str(names.flat[0]), n_in, n_out, lookup=lookup).items()
    matrix = base.layout.matrix(base.dense())
    ids = jnp.array(tokens, jnp.int32)
    rows = matrix[..., ids, :] if lookup else jnp.swapaxes(matrix[..., :, ids], -1, -2)
    rows = jnp.where(adapted[..., None, None], rows.astype(jnp.float32), 0)
    return {role: rows}, tokens_state(tokens, adapted)


def merge_tokens(params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """The matrix with the trained vectors in their places."""
    ids = state["tokens"]
    if ROWS in params:
        return matrix.at[ids].set(params[ROWS].astype(matrix.dtype), mode="drop")
    return matrix.at[:, ids].set(params[COLUMNS].T.astype(matrix.dtype), mode="drop")


def apply_tokens(
    method: Any, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
) -> Float[Array, "... out"]:
    """A product or lookup with `merge_tokens`, without the merged matrix."""
    ids = state["tokens"]
    if isinstance(product, Lookup) and ROWS in params:
        # Which of the trained vectors each id has, counted from 1; looked up as the base's rows are.
        n_in, _ = base.layout.sizes(base.shape)
        places = jnp.zeros((n_in, 1)).at[ids, 0].set(jnp.arange(1.0, len(ids) + 1), mode="drop")
        place = product.full(x, places)
        y = base.apply(x, product)
        own = product.trained(x, params[ROWS][jnp.maximum(place[..., 0] - 1, 0).astype(jnp.int32)])
        return jnp.where(place > 0, own.astype(y.dtype), y)
    if type(product) is not Product:
        return apply_merged(method, params, state, base, x, product)
    if ROWS in params:
        there = x.at[..., ids].get(mode="fill", fill_value=0)
        y = base.apply(x.at[..., ids].set(0, mode="drop", unique_indices=True), product)
        own = product.up(there.astype(params[ROWS].dtype), params[ROWS])
        return added(y, own)
    y = base.apply(x, product)
    own = product.down(x, params[COLUMNS].T)
    return y.at[..., ids].set(own.astype(y.dtype), mode="drop", unique_indices=True)
