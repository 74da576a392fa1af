"""Makes model handles by what a checkpoint's config says it is."""

import os

import jax
import jax.numpy as jnp

from peft_jax.interop.checkpoint import find_checkpoint
from peft_jax.models.causal_lm import CausalLM, Source
from peft_jax.models.checkpoint import load_model, read_generation_config
from peft_jax.models.config import ModelConfig
from peft_jax.models.families import family_of


class AutoModelForCausalLM:
    """Makes causal language models from checkpoints of the Llama family (Llama, Mistral, Qwen2, Qwen3)."""

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike[str],
        *,
        dtype: str | jnp.dtype | None = None,
        load_in_8bit: bool = False,
        remat: bool = False,
    ) -> CausalLM:
        """Read a Hugging Face checkpoint.

        Args:
            name_or_path: Folder, or id on the Hugging Face hub.
            dtype: Element type of the parameters; None for the one that config.json names.
            load_in_8bit: Quantize the layers' matmul weights on the way, tensor by tensor; embeddings, norms and the
                output head stay in float.
            remat: Whether backward recomputes each layer instead of keeping its activations.

        Raises:
            FileNotFoundError: if there is no such checkpoint, or a file of it is missing.
            ValueError: if a file is damaged, the architecture is not supported, or tensors do not fit the config.

        Example:
            >>> from peft_jax.cli.demo_data import MODEL
            >>> model = AutoModelForCausalLM.from_pretrained(MODEL, load_in_8bit=True)
            >>> model.params["model"]["layers"]["mlp"]["up_proj"]["kernel"].q.dtype
            dtype('int8')
        """
        folder = find_checkpoint(name_or_path)
        config, params = load_model(folder, dtype=dtype, load_in_8bit=load_in_8bit)
        return CausalLM(params, config, Source(os.fspath(name_or_path), read_generation_config(folder)), remat)

    @staticmethod
    def from_config(
        config: ModelConfig, *, key: jax.Array | None = None, dtype: str | jnp.dtype = "float32", remat: bool = False
    ) -> CausalLM:
        """A model with random parameters.

        Args:
            config: The architecture.
            key: Random key; None means ``jax.random.key(0)``.
            dtype: Element type of the parameters.
            remat: As in `from_pretrained`.

        Example:
            >>> from peft_jax.models import LlamaConfig
            >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
            ...                      num_attention_heads=2)
            >>> AutoModelForCausalLM.from_config(config).num_parameters()
            1384
        """
        params = family_of(config).init_params(config, jax.random.key(0) if key is None else key, jnp.dtype(dtype))
        return CausalLM(params, config, remat=remat)
