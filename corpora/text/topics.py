"""The text that every Python installation carries: the help topics of pydoc."""

from __future__ import annotations

import hashlib
import platform


def topics() -> tuple[str, str]:
    """The help topics in the order of their names, and a sentence that says which text that is.

    Another version of Python has another text: results are told with its length and its hash.

    Raises:
        ModuleNotFoundError: this Python was installed without its help topics.
    """
    try:
        from pydoc_data.topics import topics as found
    except ImportError as error:  # some distributions package them apart
        raise ModuleNotFoundError(
            "this Python comes without the module pydoc_data, whose text is the default; choose another text, "
            "or install Python's documentation topics"
        ) from error
    text = "".join(found[name] for name in sorted(found))
    return text, (
        f"It is pydoc_data.topics of Python {platform.python_version()}: {len(text):,} characters with the SHA-256 "
        f"checksum {hashlib.sha256(text.encode()).hexdigest()[:12]}."
    )
