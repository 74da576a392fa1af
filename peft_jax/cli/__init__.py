"""The command line, one file a command."""

import os

# transformers says on import that it found no PyTorch, which is not needed here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
