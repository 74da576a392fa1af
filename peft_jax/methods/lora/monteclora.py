"""MonteCLoRA: in training A is a weighted mean of samples around it, whose weights and variances are trained.

https://openreview.net/forum?id=2HFmicB8kh (TMLR, 2025): A + c sum_n w_n Z_n diag(v)^(1/2), where Z_n is
normal, v is the diagonal of a Wishart sample with the trained scales, and the weights w are a softmax of normal
numbers, near a Dirichlet distribution with the trained concentrations. Outside of training A is itself. Numbers follow
PEFT 0.21.2, which leaves the penalty to the caller (`LoraModel._get_monteclora_loss`); here a training step adds it.
In PEFT's distance of two Dirichlet distributions the logarithms of single gamma functions have the wrong sign; the
penalty here is PEFT's.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import digamma, gammaln
from jaxtyping import Array, Float

from peft_jax.core.product import Product
from peft_jax.core.weight import MergeError
from peft_jax.methods.base import Arrays
from peft_jax.methods.fields import check_kinds
from peft_jax.methods.lora.variant import Shapes, Variant
from peft_jax.methods.training_hooks import Leaves

SAMPLER = "lora_monteclora_sampler"
SPREAD, CONCENTRATION = f"{SAMPLER}.std_prior", f"{SAMPLER}.expert_weights_prior"  # trained, both as logarithms
WEIGHTS, VARIANCE = f"{SAMPLER}.expert_weights", f"{SAMPLER}.gaussian_var_prior"  # PEFT's last sample, in its file
SCALER = "monteclora_scaler"  # in the state: the scale of the noise
LEAST_VARIANCE, LEAST = 1e-3, 1e-6  # as PEFT has them


@dataclasses.dataclass(frozen=True)
class MontecloraConfig:
    """How MonteCLoRA samples, and what its penalty is.

    Attributes:
        num_samples: Number of samples, at least 1.
        use_entropy: Whether the sum of squares of their weights is added to the loss.
        dirichlet_prior: Concentration that the weights' are drawn to, above 0.
        sample_scaler: Scale of the noise.
        kl_loss_weight: Factor of the distances from the priors.
        buffer_size: PEFT's number of samples drawn ahead; changes nothing here.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> options = MontecloraConfig(num_samples=3, sample_scaler=0.1)
        >>> config = pj.LoraConfig(target_modules=["q"], monteclora_config=options, init_lora_weights=False)
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((8, 6))}}, config)
        >>> f = pj.adapt(lambda params, x: x @ params["q"]["kernel"])
        >>> noisy = f(pj.with_dropout(params, jax.random.key(1)), jnp.ones((1, 8)))
        >>> bool(jnp.allclose(noisy, f(params, jnp.ones((1, 8)))))
        False
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.num_samples < 1 or self.dirichlet_prior <= 0 or self.buffer_size < 1:
            raise ValueError(
                f"MonteCLoRA takes num_samples and buffer_size of at least 1 and a dirichlet_prior above 0, got {self}."
            )


class Noise(NamedTuple):
    """The numbers that a forward pass draws for a layer.

    Attributes:
        normal: Normal numbers of each sample of A.
        squares: Chi-squared numbers of ``rank`` degrees of freedom: the diagonal of a Wishart sample of scale one.
        weights: Normal numbers of the samples' weights.
    """

    normal: Float[Array, "samples inputs rank"]
    squares: Float[Array, " rank"]
    weights: Float[Array, " samples"]


class MonteClora(Variant):
    """MonteCLoRA as a row of the table of variants."""

    field = "monteclora_config"
    options = MontecloraConfig
    axes = {
        SPREAD: ("rank",),
        CONCENTRATION: ("samples",),
        WEIGHTS: ("samples",),
        VARIANCE: ("rank", "column"),
    }
    frozen = (WEIGHTS, VARIANCE)
    penalizes = True
    in_training = SCALER

    def shapes(self, config: Any, module: str, whole: Shapes) -> Shapes:
        """Those of plain factors, and the sampler's."""
        samples, (_, rank) = config.monteclora_config["num_samples"], whole["lora_A"]
        return {**whole, SPREAD: (rank,), CONCENTRATION: (samples,), WEIGHTS: (samples,), VARIANCE: (rank, rank)}

    def initial(self, config: Any, role: str, shape: tuple[int, ...], key: jax.Array) -> Float[Array, "..."]:
        """A fresh array: the trained ones uniform in [0, 1)."""
        if role == WEIGHTS:
            return jnp.full(shape, 1 / shape[0])
        return jnp.eye(shape[0]) if role == VARIANCE else jax.random.uniform(key, shape)

    def state(self, config: Any, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The scale of the noise."""
        return {SCALER: jnp.full(names.shape, np.float32(config.monteclora_config["sample_scaler"]))}

    def inner(
        self, x: Float[Array, "*rows in"], params: Arrays, state: Mapping[str, Any], product: Product
    ) -> Float[Array, "*rows rank"]:
        """The product with a sampled A."""
        return product.down(x, first_factor(params, state))

    def penalty(self, config: Any, leaves: Leaves) -> Float[Array, ""]:
        """The mean of all layers' penalties."""
        total, count = jnp.zeros(()), jnp.zeros(())
        for leaf in leaves.values():
            of_layer = partial(penalty, options=config.monteclora_config)
            for _ in leaf.state["rank"].shape:
                of_layer = jax.vmap(of_layer)
            total += jnp.sum(of_layer(leaf.params, leaf.state))
            count += jnp.sum(leaf.state["rank"] > 0, dtype=jnp.float32)
        return total / count


def drawn(key: jax.Array, params: Arrays, rank: jax.Array) -> Noise:
    """The noise of a layer: only the diagonal of a Wishart sample counts, whose elements are independent."""
    of_normal, of_squares, of_weights = jax.random.split(key, 3)
    samples = params[CONCENTRATION].shape[-1]
    normal = jax.random.normal(of_normal, (samples, *params["lora_A"].shape))
    freedom = jnp.maximum(rank, 1).astype(jnp.float32)
    squares = 2 * jax.random.gamma(of_squares, jnp.broadcast_to(freedom / 2, params[SPREAD].shape))
    return Noise(normal, squares, jax.random.normal(of_weights, (samples,)))


def variances(params: Arrays, noise: Noise) -> Float[Array, " rank"]:
    """The variances of the columns of A."""
    return jnp.maximum(jnp.square(jnp.exp(params[SPREAD])) * noise.squares, LEAST_VARIANCE)


def weights(params: Arrays, noise: Noise) -> Float[Array, " samples"]:
    """The weights of the samples, which sum to one."""
    concentration = jnp.maximum(jnp.exp(params[CONCENTRATION]), LEAST)
    count = len(concentration)
    means = jnp.log(concentration) - jnp.mean(jnp.log(concentration))
    spread = 1 / concentration * (1 - 2 / count) + jnp.sum(1 / concentration) / count**2
    return jax.nn.softmax(jnp.sqrt(jnp.maximum(spread, LEAST) + LEAST) * noise.weights + means)


def sampled(params: Arrays, state: Mapping[str, Any], noise: Noise) -> Float[Array, "in rank"]:
    """A of a forward pass in training."""
    a = params["lora_A"]
    mean = jnp.einsum("s,sir->ir", weights(params, noise), noise.normal)
    change = state[SCALER] * mean * jnp.sqrt(variances(params, noise))[None]
    is_used = jnp.arange(a.shape[-1]) < state["rank"]  # layers of a stack may have fewer columns
    return a + jnp.where(is_used[None], change, 0).astype(a.dtype)


def first_factor(params: Arrays, state: Mapping[str, Any]) -> Float[Array, "in rank"]:
    """`sampled` with the noise of a leaf whose dropout is switched on.

    Raises:
        MergeError: if the layer's matrices come in groups, as experts'.
    """
    if params["lora_A"].ndim > 2:
        raise MergeError("MonteCLoRA is not for experts. Leave their modules out of target_modules.")
    return sampled(params, state, drawn(_key(state["dropout"]["key"]), params, state["rank"]))


def _key(key: jax.Array) -> jax.Array:
    """Another key than that of the inputs' dropout."""
    return jax.random.fold_in(jnp.reshape(key, -1)[0], 1)


def penalty(params: Arrays, state: Mapping[str, Any], options: Mapping[str, Any]) -> Float[Array, ""]:
    """The penalty of a layer, with the noise of its pass over the first micro batch; 0 where it is not adapted."""
    rank = state["rank"]
    noise = drawn(_key(state["dropout"]["key"]), params, rank)
    return jnp.where(rank > 0, of_noise(params, rank, noise, options), 0)


def of_noise(params: Arrays, rank: jax.Array, noise: Noise, options: Mapping[str, Any]) -> Float[Array, ""]:
    """The penalty of one layer: distances from the priors, and perhaps the sum of squares of its weights."""
    is_used = jnp.arange(params[SPREAD].shape[-1]) < rank
    size, prior = rank.astype(jnp.float32), jnp.float32(options["dirichlet_prior"])
    own, count = jnp.exp(params[CONCENTRATION]), options["num_samples"]
    dirichlet = gammaln(jnp.sum(own)) - gammaln(count * prior)
    dirichlet += jnp.sum(gammaln(own) - gammaln(prior))  # PEFT's sign
    dirichlet += jnp.sum((own - prior) * (digamma(own) - digamma(jnp.sum(own))))
    scale = jnp.exp(2 * params[SPREAD])
    wishart = 0.5 * size * jnp.sum(jnp.where(is_used, scale - 2 * params[SPREAD] - 1, 0))
    variance = variances(params, noise)
    normal = 0.5 * count * (jnp.sum(jnp.where(is_used, variance - jnp.log(variance), 0)) - size)
    entropy = jnp.sum(jnp.square(weights(params, noise))) if options["use_entropy"] else jnp.zeros(())
    return options["kl_loss_weight"] * (dirichlet + wishart + normal) + entropy
