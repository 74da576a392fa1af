"""VB-LoRA: W' = W + A B, where both factors are made of parts, and each part mixes a few vectors of one trained bank.

Li et al., 2024, https://arxiv.org/abs/2405.15179, equations 3 and 4: a part is the sum of the k vectors with the
largest logits, weighted by the softmax of these logits. All layers share the bank. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.methods.added_change import FactoredChange
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, check_rank, unsupported
from peft_jax.methods.shared_arrays import TrainedSharedArrays
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields

FIRST, SECOND, BANK = "vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"


@register("VBLORA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(TargetFields, ExcludeFields, LayerFields, TrainedSharedArrays, FactoredChange):
    """Trains logits in each layer, and one bank of vectors that they choose from; fields and defaults are PEFT's.

    In a file the bank stands once. In a tree the first leaf trains it, and the others take it from there.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        r: Rank, at least 1.
        num_vectors: Number of vectors in the bank.
        vector_length: Their length, which divides the sizes of all modules.
        topk: Number of vectors that a part mixes, at most ``num_vectors``.
        vblora_dropout: Probability of zeroing an input of the low-rank path in training, in [0, 1).
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"vblora_only"`` (those of adapted modules).
        init_vector_bank_bound: The bank starts within plus and minus this number. Such an adapter starts with a change.
        init_logits_std: Standard deviation of fresh logits.

    Every other field of PEFT's ``VBLoRAConfig`` is known, and refused away from its default: files of the largest
    logits alone.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 4))}, "v": {"kernel": jnp.ones((8, 4))}}
        >>> config = VBLoRAConfig(r=2, num_vectors=16, vector_length=4, target_modules=["q", "v"])
        >>> params = pj.apply_adapter(params, config)
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'vblora_logits_A': (2, 2, 16), 'vblora_logits_B': (1, 2, 16), 'vblora_vector_bank': (16, 4)}
        >>> list(params["v"]["kernel"].params), params["v"]["kernel"].state["adapter"]["vblora_vector_bank"].shape
        (['vblora_logits_A', 'vblora_logits_B'], (16, 4))
    """

    learning_rate: ClassVar[float] = 1e-3
    carried: ClassVar[tuple[str, ...]] = (BANK,)
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        FIRST: ("rank", "parts", "vectors"),
        SECOND: ("parts", "rank", "vectors"),
    }
    shared_axes: ClassVar[Mapping[str, tuple[str, ...]]] = {BANK: ("vectors", "length")}
    structural: ClassVar[tuple[str, ...]] = ("topk",)

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = unsupported(False)
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        check_probability(self, "vblora_dropout")
        if min(self.num_vectors, self.vector_length) < 1:
            raise ValueError(
                f"A bank has num_vectors and vector_length of at least 1, got {self.num_vectors} and "
                f"{self.vector_length}."
            )
        if not 1 <= self.topk <= self.num_vectors:
            raise ValueError(f"topk is from 1 to num_vectors={self.num_vectors}, got {self.topk}.")

    @property
    def dropout_rate(self) -> float:
        """``vblora_dropout``."""
        return self.vblora_dropout

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The logits of the two factors' parts."""
        if n_in % self.vector_length or n_out % self.vector_length:
            raise ValueError(
                f"VBLORA with vector_length={self.vector_length} needs a divisor of the sizes of '{module}', which are "
                f"{n_in} and {n_out}. Choose another vector_length."
            )
        return {
            FIRST: (self.r, n_in // self.vector_length, self.num_vectors),
            SECOND: (n_out // self.vector_length, self.r, self.num_vectors),
        }

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Normal numbers."""
        return self.init_logits_std * jax.random.normal(key, shape)

    def shared_shapes(self, sizes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """The bank."""
        return {BANK: (self.num_vectors, self.vector_length)}

    def initial(self, sizes: Mapping[str, tuple[int, int]], key: jax.Array) -> dict[str, jax.Array]:
        """A bank of uniform numbers."""
        shape = (self.num_vectors, self.vector_length)
        return {BANK: self.init_vector_bank_bound * jax.random.uniform(key, shape, minval=-1.0)}

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """The number of logits of each stacked layer, and of elements of the bank in the first leaf's first one."""
        adapted = np.asarray(state["hit"])
        sizes = np.array(adapted * sum(int(np.prod(params[role].shape[adapted.ndim :])) for role in (FIRST, SECOND)))
        if BANK in params:
            sizes[(0,) * adapted.ndim] += int(np.prod(params[BANK].shape[adapted.ndim :]))
        return sizes

    def factors(
        self, params: Arrays, state: Mapping[str, Any], n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """The parts, one after the other."""
        bank = self.all_layers(params, state, BANK).astype(params[FIRST].dtype)
        first = self._mixed(params[FIRST], bank)  # (rank, parts, length)
        second = jnp.swapaxes(self._mixed(params[SECOND], bank), -3, -2)  # (parts, rank, length) before
        first, second = (factor.reshape(*factor.shape[:-2], -1) for factor in (first, second))
        return jnp.swapaxes(first, -1, -2), jnp.where(state["hit"][..., None, None], second, 0)

    def _mixed(
        self, logits: Float[Array, "*groups rows columns vectors"], bank: Float[Array, "*groups vectors length"]
    ) -> Float[Array, "*groups rows columns length"]:
        """The mixture of vectors at each place."""

        def mixed(logits: jax.Array, bank: jax.Array) -> jax.Array:
            largest, chosen = jax.lax.top_k(logits, self.topk)
            return jnp.sum(jax.nn.softmax(largest, axis=-1)[..., None] * bank[chosen], axis=-2)

        for _ in range(logits.ndim - 3):
            mixed = jax.vmap(mixed)
        return mixed(logits, bank)
