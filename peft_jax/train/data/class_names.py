"""Names of classes in the description that Hugging Face's package datasets writes into Parquet and Arrow files.

Such a file numbers its classes, and its schema has the names: a JSON object with the features of the columns, of which
one of classes has the type ClassLabel. Lists of classes, as of words, have it inside.
"""

from collections.abc import Mapping
from typing import Any

from peft_jax.core.strict_json import JSONError, parse_json

KEY = b"huggingface"  # of a schema's metadata
CLASSES = "ClassLabel"
FIELDS = ("label", "labels", "tags", "ner_tags")  # of records that have classes

ClassNames = Mapping[str, tuple[str, ...]]  # by column


def class_names_of_schema(metadata: Mapping[bytes, bytes] | None, file: str) -> ClassNames:
    """The names of the classes of each column.

    Args:
        metadata: Those of an Arrow schema.
        file: Name of the file, for errors.

    Raises:
        ValueError: If the description is no JSON object.

    Example:
        >>> described = b'{"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}'
        >>> class_names_of_schema({b"huggingface": described}, "data.parquet")
        {'label': ('no', 'yes')}
    """
    if not metadata or KEY not in metadata:
        return {}
    try:
        described: Any = parse_json(metadata[KEY].decode("utf-8"))
    except (JSONError, UnicodeDecodeError) as error:
        raise ValueError(
            f"the description of columns in {file} (huggingface, in the metadata of its schema) is not JSON. Write the "
            "file again, or without it."
        ) from error
    info = described.get("info") if isinstance(described, dict) else None
    features = info.get("features") if isinstance(info, dict) else None
    return class_names_of_features(features) if isinstance(features, dict) else {}


def class_names_of_features(features: Mapping[str, Any]) -> ClassNames:
    """The names of the classes of each column, of features as `datasets.Features.to_dict` has them.

    Example:
        >>> words = {"feature": {"names": ["O", "B-PER"], "_type": "ClassLabel"}, "_type": "Sequence"}
        >>> class_names_of_features({"ner_tags": words, "text": {"dtype": "string", "_type": "Value"}})
        {'ner_tags': ('O', 'B-PER')}
    """
    found = {}
    for column, feature in features.items():
        inner = feature
        if isinstance(inner, list) and len(inner) == 1:  # an older way to write a list
            inner = inner[0]
        elif isinstance(inner, dict) and "feature" in inner:
            inner = inner["feature"]
        names = inner.get("names") if isinstance(inner, dict) and inner.get("_type") == CLASSES else None
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            found[column] = tuple(names)
    return found
