"""Everything runs offline, with caches of its own: set before transformers is imported anywhere."""

import os
import tempfile

_home = tempfile.mkdtemp(prefix="hf-treeflash-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = _home
os.environ["HF_MODULES_CACHE"] = os.path.join(_home, "modules")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
