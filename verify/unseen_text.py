"""Text that no bundled calibration text holds, for perplexity and for inputs that calibration did not see."""

from __future__ import annotations

import pydoc_data.topics


def help_text() -> str:
    """The help texts of the Python language, in the order of their names; half a million characters."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))
