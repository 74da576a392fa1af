"""Base class of methods that have modules of their own in PEFT's model, whose tensors are their arrays."""


class OwnTensors:
    """A method whose arrays are tensors of modules beside the model or around its layers, by PyTorch's names.

    `peft_jax.interop` reads and writes these tensors as they are.
    """

    @property
    def wrapped_layers(self) -> list[str]:
        """Paths of the model's layers that PEFT puts into a module of the method."""
        return []

    @property
    def unread_keys(self) -> set[str]:
        """The keys of tensors that nothing reads."""
        return set()

    def tensor_key(self, role: str) -> str:
        """The key of an array in PEFT's file."""
        raise NotImplementedError

    def own_name(self, key: str, adapter_name: str) -> str | None:
        """The name in PEFT's model of a tensor of such a module, by its key; None for another tensor."""
        raise NotImplementedError
