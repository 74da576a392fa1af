"""The indefinite article in messages that name a type, an architecture or a method."""


def article(word: str, *, first: bool = False) -> str:
    """A word behind "a" or "an", by its first letter; with ``first``, as a sentence begins.

    Example:
        >>> article("Adapted"), article("LORA")
        ('an Adapted', 'a LORA')
        >>> article("opt", first=True)
        'An opt'
    """
    is_vowel = word[:1].lower() in tuple("aeiou")
    name = "an" if is_vowel else "a"
    return f"{name.capitalize() if first else name} {word}"
